"""Folders of Hugging Face: config.json, safetensors in one file or in shards, and where the tokenizer is.

Nothing outside the folder is opened: names in the index are plain names, and links are refused, except those of
Hugging Face's own cache, which lead from ``models--x/snapshots/y/`` to ``models--x/blobs/``.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from fastseq.checks import Array
from fastseq.formats import safetensors
from fastseq.formats.contents import Contents
from fastseq.formats.source import FormatError, LazyArrays, Source, listed, short

_MAX_JSON = 1 << 20  # bytes; as Python's values they may be 24 times as large
_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_TOKENIZER = "tokenizer.json"
_OLD_WEIGHTS = ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")


def check(path: str | os.PathLike[str]) -> None:
    """Raise a `ValueError` where a folder is none of Hugging Face's with weights in safetensors."""
    folder = _Folder(path)
    if not folder.has(_CONFIG):
        raise folder.fault(_CONFIG, "is missing: no folder of Hugging Face")
    if not folder.has(_WEIGHTS) and not folder.has(_INDEX):
        others = [name for name in _OLD_WEIGHTS if folder.has(name)]
        how = f"; of {listed(others)} save it anew with save_pretrained(folder)" if others else ""
        raise folder.fault(_WEIGHTS, f"is missing, and so is {_INDEX}{how}")


def read(path: str | os.PathLike[str]) -> Contents:
    """Read the configuration and the arrays of a folder.

    Parameters
    ----------
    path : path

    Returns
    -------
    Contents
        Its ``description["config"]`` is what config.json holds, ``description["tokenizer"]`` the path of tokenizer.json
        or None, ``description["files"]`` the files with arrays.

    Raises
    ------
    ValueError
        A file is damaged, missing, or not inside the folder.
    OSError
        A file cannot be read.
    """
    check(path)
    folder = _Folder(path)
    config = folder.json(_CONFIG)
    where = folder.json(_INDEX) if folder.has(_INDEX) else None
    names = [_WEIGHTS] if where is None else _shards(folder, where)
    readers, tensors = {}, {}
    for name in names:
        shard = safetensors.read(folder.file(name))
        for tensor in shard.arrays:
            if tensor in readers:
                raise folder.fault(name, f"{short(tensor)} is in another shard, too")
            if where is not None and where["weight_map"].get(tensor) != name:
                raise folder.fault(_INDEX, f"does not say that {short(tensor)} is in {name}")
            readers[tensor] = _Reader(shard, tensor)
        tensors.update(shard.description["tensors"])
    missing = [] if where is None else [name for name in where["weight_map"] if name not in readers]
    if missing:
        raise folder.fault(_INDEX, f"tensors that are in no shard: {listed(missing)}")
    return Contents(
        "huggingface",
        LazyArrays(readers),
        {
            "config": config,
            "tokenizer": folder.file(_TOKENIZER) if folder.has(_TOKENIZER) else None,
            "files": names,
            "tensors": tensors,
        },
    )


class _Reader:
    """Reads one tensor of a shard."""

    def __init__(self, shard: Contents, name: str) -> None:
        self._shard, self._name = shard, name

    def __call__(self) -> Array:
        return self._shard.arrays[self._name]


def _shards(folder: _Folder, index: dict[str, Any]) -> list[str]:
    """The names of the shards of an index, which are checked."""
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise folder.fault(_INDEX, "should have a weight_map of names")
    names = sorted({name if isinstance(name, str) else "" for name in places.values()})
    wrong = [name for name in names if not _PLAIN_NAME.fullmatch(name)]
    if wrong:
        raise folder.fault(_INDEX, f"should name safetensors files in the folder, not {listed(wrong)}")
    return names


class _Folder:
    """A folder whose files are opened only if they are inside it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        whole = Path(self.path).resolve()
        cache = whole.parent.name == "snapshots" and whole.parents[1].name.startswith("models--")
        self._inside = whole.parents[1] / "blobs" if cache else None

    def fault(self, name: str, what: str) -> FormatError:
        return FormatError(self.path, name, what)

    def has(self, name: str) -> bool:
        return os.path.lexists(os.path.join(self.path, name))

    def file(self, name: str) -> str:
        """The path of a file of a plain name, with links of the cache followed."""
        path = os.path.join(self.path, name)
        if not self.has(name):
            raise self.fault(name, "is missing")
        if not os.path.islink(path):
            return path
        target = Path(path).resolve()
        if self._inside is None or target.parent != self._inside:
            raise self.fault(name, f"is a link to {short(os.readlink(path))}, and nothing outside the folder is opened")
        return str(target)

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file."""
        source = Source(self.file(name))
        if source.size > _MAX_JSON:
            raise self.fault(name, f"{source.size} bytes are more than {_MAX_JSON}")
        try:
            value = json.loads(source.read(name, 0, source.size).decode(), object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise self.fault(name, str(error)) from None
        if not isinstance(value, dict):
            raise self.fault(name, f"should be an object, not a {type(value).__name__}")
        return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of names and values, each name once."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name appears twice in an object")
    return made
