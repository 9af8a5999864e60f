"""Files: layers and states as safetensors, with the class and its configuration in the metadata."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fastseq.checks import Array

_FORMAT = "1"


def save(path: str | os.PathLike[str], class_name: str, config: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Write arrays and what they belong to, whole or not at all.

    The file is written beside `path` under another name, flushed to the disk and renamed.
    """
    from safetensors.numpy import save as to_bytes

    metadata = {"fastseq.format": _FORMAT, "fastseq.class": class_name, "fastseq.config": json.dumps(config)}
    for name, array in arrays.items():
        if array.dtype.name not in ("float16", "float32", "float64"):
            raise TypeError(f"a file can hold float16, float32 and float64, but {name} is {array.dtype}")
    data = to_bytes({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata)
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: str | os.PathLike[str]) -> Any:
    """Read a layer or a state that its `save` wrote.

    Parameters
    ----------
    path : path
        A file written by ``layer.save`` or ``state.save``.

    Returns
    -------
    layer or state
        Of the class and the configuration that were saved.

    Raises
    ------
    ValueError
        The file is damaged, or holds something that fastseq did not write.
    OSError
        The file cannot be read.
    """
    import fastseq

    return load_into(path, fastseq)


def load_into(path: str | os.PathLike[str], namespace: ModuleType) -> Any:
    """`load`, with the classes of `namespace`."""
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):
        pass  # a file that is missing or not ours to read raises Python's own error
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except SafetensorError as error:
        raise ValueError(f"path: {os.fspath(path)!r} is not a whole safetensors file: {error}") from None
    name = metadata.get("fastseq.class")
    if name is None:
        raise ValueError(
            f"path: {os.fspath(path)!r} is a safetensors file that fastseq did not write;"
            " read its arrays with safetensors and give them to load_state_dict"
        )
    if metadata.get("fastseq.format") != _FORMAT:
        raise ValueError(f"path: {os.fspath(path)!r} was written by another version of fastseq")
    maker = _LOADABLE.get(name)
    if maker is None:
        raise ValueError(f"path: {os.fspath(path)!r} holds a {name!r}, which this version does not know")
    try:
        config = json.loads(metadata["fastseq.config"])
        if maker == "state":
            return getattr(namespace, name)(**arrays)
        layer = getattr(namespace, name)(**config)
        layer.load_state_dict(arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: {os.fspath(path)!r} is damaged: {error}") from None
    return layer


_LOADABLE = {"RNN": "layer", "LSTM": "layer", "GRU": "layer", "State": "state", "LSTMState": "state"}
