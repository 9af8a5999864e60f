"""Checkpoints: one safetensors file each, written whole or not at all, with a checksum over all of it.

The content is a dict, of dicts, lists, tuples, numbers, strings, arrays and states. The arrays are the tensors of the
file, named by their place; the rest is JSON in its metadata. What is written reads back equal: arrays with the numbers
they had, in native byte order, and NumPy's numbers as Python's.
"""

from __future__ import annotations

import os
import re
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fastseq import checks, io, state
from fastseq.checks import Array
from fastseq.formats import safetensors
from fastseq.formats.source import FormatError
from fastseq.io import write_whole

_FORMAT = "1"
_CONTENT, _VERSION = "fastseq.checkpoint", "fastseq.format"
_OLD_CHECKSUM = "fastseq.checksum"  # of the content, in files of older versions, which have none over all their bytes
_STATE_CLASSES = (state.State, state.LSTMState, state.Seq2SeqState, state.AttentionState, state.ConvState)
_STATES = {kind.__name__: kind for kind in _STATE_CLASSES}
_DTYPES = ("bool", *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float32", "float64")
_STORED = ("BOOL", *(f"{u}{bits}" for u in "IU" for bits in (8, 16, 32, 64)), "F16", "F32", "F64")  # the same in a file
_NAME = re.compile(r"step-(\d{8,})\.safetensors")


def save_checkpoint(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Parameters
    ----------
    path : path
        The file.
    content : dict
        Of dicts with strings as names, lists, tuples, numbers, strings, None, arrays and states.

    Raises
    ------
    TypeError
        The content holds something else, which is named.
    OSError
        The file cannot be written, as on a full disk; what `path` named before is still there.
    """
    import json

    target = checks.path("path", path)
    arrays: dict[str, Array] = {}
    text = json.dumps(_taken_apart(dict(checks.mapping("content", content)), "", arrays))
    write_whole(target, io.to_bytes(arrays, {_VERSION: _FORMAT, _CONTENT: text}))


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint.

    Parameters
    ----------
    path : path
        A file, or a folder in which `fit` wrote some: the newest one that can be read, then.

    Returns
    -------
    dict
        What was saved. Of a checkpoint of `fit`, ``["model"]`` is the state dict of the model, ``["step"]`` the
        count of steps, ``["history"]`` the arrays of the history.

    Raises
    ------
    ValueError
        The file is damaged, or is no checkpoint.
    OSError
        The file cannot be read, or there is none.
    """
    name = checks.path("path", path)
    if os.path.isdir(name):
        found = newest(name)
        if found is None:
            raise FileNotFoundError(f"path: there is no checkpoint in {name!r}")
        return found[1]
    return _read(name)


def _read(name: str) -> dict[str, Any]:
    import json

    io.check_whole(name)  # a file that is missing or not ours to read raises Python's own error
    try:
        file = safetensors.File(name)
        metadata = file.metadata
        if "fastseq.class" in metadata:
            raise ValueError(f"path: {name!r} is no checkpoint of fastseq, but what a save wrote: fastseq.load it")
        if _CONTENT not in metadata or not (_OLD_CHECKSUM in metadata or io.CHECKSUM in metadata):
            raise ValueError(f"path: {name!r} is a safetensors file, but no checkpoint of fastseq")
        if metadata.get(_VERSION) != _FORMAT:
            raise ValueError(f"path: {name!r} was written by another version of fastseq")
        io.check_names(name, metadata, {_CONTENT, _VERSION, _OLD_CHECKSUM})
        arrays = io.arrays_of(file, name, _STORED)
    except FormatError as error:
        raise ValueError(
            f"path: {name!r} is damaged: not a whole safetensors file: {error.place}: {error.what}"
        ) from None
    if io.CHECKSUM not in metadata and _checksum(metadata[_CONTENT], arrays) != metadata[_OLD_CHECKSUM]:
        raise ValueError(f"path: {name!r} is damaged: its content does not have the checksum it was written with")
    try:
        content = _put_together(json.loads(metadata[_CONTENT]), arrays)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"path: {name!r} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"path: {name!r} is damaged: it holds {checks.describe(content)}")
    return content


def _checksum(text: str, arrays: dict[str, Array]) -> str:
    """The checksum of a file of an older version."""
    value = zlib.crc32(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        value = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), value)
        value = zlib.crc32(array.reshape(-1).view(np.uint8).data, value)
    return f"{value:08x}"


def _taken_apart(value: Any, place: str, arrays: dict[str, Array]) -> Any:
    """A value as JSON has it; arrays are put into `arrays` by their place."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.bool_ | np.integer | np.floating) and not isinstance(value, np.longdouble):
        return value.item()
    if isinstance(value, np.ndarray):
        if value.dtype.name not in _DTYPES or isinstance(value, np.ma.MaskedArray):
            raise TypeError(
                f"a checkpoint can hold arrays of {', '.join(_DTYPES)}, but {place} is {checks.describe(value)}"
            )
        while place in arrays or place == "__metadata__":  # names may hold what places are made with
            place += "'"
        arrays[place] = value
        return {"array": place}
    if type(value).__name__ in _STATES and type(value) is _STATES[type(value).__name__]:
        named = {n: _taken_apart(array, f"{place}.{n}", arrays) for n, array in state.named_arrays(value).items()}
        return {"state": type(value).__name__, "named": named}
    if isinstance(value, list | tuple):
        items = [_taken_apart(item, f"{place}.{i}", arrays) for i, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if isinstance(value, dict):
        prefix = f"{place}/" if place else ""
        return {
            "dict": {n: _taken_apart(item, f"{prefix}{n}", arrays) for n, item in checks.mapping(place, value).items()}
        }
    raise TypeError(f"a checkpoint cannot hold {place}: {checks.describe(value)}")


def _put_together(value: Any, arrays: dict[str, Array]) -> Any:
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    if "named" in value:
        made: Any = _STATES[value["state"]]
        return made(**{name: _put_together(array, arrays) for name, array in value["named"].items()})
    if "state" in value:  # as older versions wrote it
        made = _STATES[value["state"]]
        return made(*_put_together(value["of"], arrays))
    if "dict" in value:
        return {name: _put_together(item, arrays) for name, item in value["dict"].items()}
    items = [_put_together(item, arrays) for item in value["list" if "list" in value else "tuple"]]
    return items if "list" in value else tuple(items)


def path_of(folder: str, step: int) -> str:
    """Where the checkpoint of a step is."""
    return os.path.join(folder, f"step-{step:08d}.safetensors")


def in_folder(folder: str) -> list[tuple[int, str]]:
    """The steps and paths of all checkpoints in a folder, oldest first; whether they are whole is not looked at."""
    found = [(_NAME.fullmatch(path.name), str(path)) for path in Path(folder).iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def newest(folder: str) -> tuple[str, dict[str, Any]] | None:
    """The path and content of the newest checkpoint that is whole; None where there is none at all."""
    faults = []
    for _, path in reversed(in_folder(folder)):
        try:
            content = _read(path)
        except (ValueError, OSError) as error:
            faults.append(str(error))
            continue
        if faults:
            warnings.warn(f"going back to {path!r}: {'; '.join(faults)}", stacklevel=3)
        return path, content
    if faults:
        raise ValueError(f"no checkpoint in {folder!r} can be read: {'; '.join(faults)}")
    return None


def remove_oldest(folder: str, step: int, keep: int | None, best: Iterable[int]) -> None:
    """Remove what is beyond the `keep` newest up to `step`; never what is in `best`."""
    if keep is None:
        return
    older = [entry for entry in in_folder(folder) if entry[0] <= step]
    spared = set(best)
    for old, path in older[:-keep]:
        if old not in spared:
            Path(path).unlink(missing_ok=True)
