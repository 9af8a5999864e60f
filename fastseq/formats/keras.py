"""Keras: ``.keras`` archives, ``.weights.h5``, and the HDF5 files of older versions.

HDF5 is read by h5py, the extra ``fastseq[keras]``. Of what HDF5 allows, only what Keras writes is read: groups and
datasets that lie in the file itself, each linked once, without filters. So an array takes no more memory than its bytes
in the file, and no other file is opened. Groups of optimisers are left out.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.formats.contents import Contents

_HDF5 = b"\x89HDF\r\n\x1a\n"
_ZIP = b"PK\x03\x04"
_CONFIG_LIMIT = 1 << 24  # bytes; the structure of a model of a thousand layers takes about one million
_OPTIMISERS = ("optimizer", "optimizer_weights")
# What h5py, HDF5 and zipfile raise for bytes that are not what they should be, also as subclasses.
_LIBRARY_ERRORS = (
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    OverflowError,
    RuntimeError,
    SystemError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
)


class _Fault(Exception):
    """Something in a file that is not read; its message has the place."""


def read(path: str | os.PathLike[str]) -> Contents:
    """Read a file that Keras wrote.

    Parameters
    ----------
    path : path
        A ``.keras`` archive, ``.weights.h5``, or ``.h5`` or ``.hdf5`` of an older version, told apart by their content.

    Returns
    -------
    contents : Contents
        `arrays` have the paths of the datasets, without ``model_weights/``. Half precision comes as float32. The
        description has "layout" ("keras", "weights" or "legacy"), "model" (the configuration of the model; None where
        the file holds weights alone), "keras_version", "stored" (the type of each array), and "names" (of the layouts
        "keras" and "weights" the name of the layer that has the arrays under a path, as far as it was written).

    Raises
    ------
    ValueError
        Naming the file, the place in it and what is wrong.
    ImportError
        h5py is not installed.
    OSError
        The file cannot be opened.
    """
    name = checks.path("path", path)
    h5py = _library()
    with open(name, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{name}: it is no regular file")
        start = file.read(8)
    try:
        if start.startswith(_ZIP):
            return _archive(h5py, name)
        if start == _HDF5:
            return _whole(h5py, name, Path(name), os.path.getsize(name), {})
        raise _Fault("the start: it is neither an HDF5 file nor a .keras archive")
    except _Fault as fault:
        raise ValueError(f"{name}: {fault}") from None


def _library() -> ModuleType:
    try:
        import h5py
    except ImportError:
        raise ImportError(
            "fastseq reads Keras' files with h5py, which is not installed: pip install 'fastseq[keras]'"
        ) from None
    module: ModuleType = h5py
    return module


def _archive(h5py: ModuleType, name: str) -> Contents:
    """Read a ``.keras`` archive: members of it are stored, as Keras writes them, and none is unpacked to a disk."""
    size = os.path.getsize(name)
    try:
        with zipfile.ZipFile(name) as archive:
            members: dict[str, zipfile.ZipInfo] = {}
            for member in archive.infolist():
                if member.filename in members:
                    raise _Fault(f"{member.filename!r}: the archive has it twice")
                members[member.filename] = member
            texts = {
                part: _json(part, _member(archive, members, part, _CONFIG_LIMIT))
                for part in ("config.json", "metadata.json")
                if part in members
            }
            if "config.json" not in texts:
                raise _Fault("config.json: the archive has none, so that it is no .keras archive")
            data = _member(archive, members, "model.weights.h5", size)
    except _LIBRARY_ERRORS as error:
        raise _Fault(f"the archive: {_said(error)}") from None
    metadata = texts.get("metadata.json")
    about = {"layout": "keras", "model": texts["config.json"]}
    about |= {"keras_version": metadata.get("keras_version") if isinstance(metadata, dict) else None}
    return _whole(h5py, "model.weights.h5", io.BytesIO(data), len(data), about)


def _member(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], name: str, limit: int) -> bytes:
    member = members.get(name)
    if member is None:
        raise _Fault(f"{name}: the archive has none")
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise _Fault(f"{name}: it is compressed, and Keras stores it as it is")
    if member.file_size > limit:
        raise _Fault(f"{name}: it should be of at most {limit} bytes, not {member.file_size}")
    with archive.open(member) as file:
        data = file.read(limit + 1)
    if len(data) != member.file_size:
        raise _Fault(f"{name}: it ends after {len(data)} bytes of {member.file_size}")
    return data


def _json(place: str, text: str | bytes) -> Any:
    """Parse JSON in which no name stands twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _Fault(f"{place}: it is no JSON that can be read: {_said(error)}") from None


def _whole(h5py: ModuleType, name: str, source: Path | io.BytesIO, size: int, about: dict[str, Any]) -> Contents:
    """Read an HDF5 file of some size."""
    try:
        with h5py.File(source, "r") as file:
            description = about or _legacy_description(file, size)
            legacy = description["layout"] == "legacy"
            root = file["model_weights"] if legacy and "model_weights" in _checked_links(h5py, file, "/") else file
            arrays, names = _arrays(h5py, root, size)
    except _LIBRARY_ERRORS as error:
        raise _Fault(f"{name}: {_said(error)}") from None
    stored = {key: kind for key, (_, kind) in arrays.items()}
    whole = {**description, "stored": stored, "names": names}
    return Contents("keras", {key: array for key, (array, _) in arrays.items()}, whole)


def _legacy_description(file: Any, size: int) -> dict[str, Any]:
    """Describe an HDF5 file: of older versions it has the configuration in attributes."""
    text = _attribute(file, "model_config", size)
    legacy = text is not None or "layer_names" in file.attrs
    return {
        "layout": "legacy" if legacy else "weights",
        "model": None if text is None else _json("the attribute model_config", text),
        "keras_version": _attribute(file, "keras_version", size),
    }


def _attribute(owner: Any, name: str, limit: int) -> str | None:
    """Return an attribute that is one string; None where there is none."""
    if name not in owner.attrs:
        return None
    if owner.attrs.get_id(name).shape != () or owner.attrs.get_id(name).get_storage_size() > limit:
        raise _Fault(f"the attribute {name}: it should be one string")
    value = owner.attrs[name]
    value = value.decode("utf-8") if isinstance(value, bytes) else value
    if not isinstance(value, str):
        raise _Fault(f"the attribute {name}: it should be a string")
    return value


def _checked_links(h5py: ModuleType, group: Any, place: str) -> list[str]:
    """Return the names in a group, none of which leads out of it."""
    names = list(group)
    for name in names:
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise _Fault(f"{place}{name}: it is a link of the kind {type(link).__name__}, which is not followed")
    return names


def _arrays(h5py: ModuleType, root: Any, size: int) -> tuple[dict[str, tuple[Array, str]], dict[str, str]]:
    """Return the datasets under a group with their stored types, and the names that groups have as an attribute."""
    arrays: dict[str, tuple[Array, str]] = {}
    names: dict[str, str] = {}
    left = size  # bytes that the file can still hold
    for place, item in _walk(h5py, root):
        if isinstance(item, h5py.Group):
            named = _attribute(item, "name", size) if "name" in item.attrs else None
            if named is not None:
                names[place.removesuffix("/vars")] = named
            continue
        if not isinstance(item, h5py.Dataset):
            raise _Fault(f"{place}: it is neither a group nor an array")
        arrays[place] = _array(h5py, place, item, left)
        left -= item.nbytes
    return arrays, names


def _walk(h5py: ModuleType, root: Any) -> Iterator[tuple[str, Any]]:
    """Yield all groups and datasets below one with their paths; each is linked once, so that there is no cycle."""
    seen = {h5py.h5o.get_info(root.id).addr}
    waiting = [("", root)]
    while waiting:
        prefix, group = waiting.pop()
        for name in _checked_links(h5py, group, prefix):
            if not prefix and name in _OPTIMISERS:
                continue
            place = f"{prefix}{name}"
            item = group[name]
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:
                raise _Fault(f"{place}: it is linked from a second place")
            seen.add(address)
            yield place, item
            if isinstance(item, h5py.Group):
                waiting.append((f"{place}/", item))


def _array(h5py: ModuleType, place: str, dataset: Any, left: int) -> tuple[Array, str]:
    """Read a dataset whose bytes are in the file."""
    plan = dataset.id.get_create_plist()
    if dataset.is_virtual or plan.get_external_count():
        raise _Fault(f"{place}: its data lie in another file, which is not opened")
    if plan.get_nfilters():
        raise _Fault(f"{place}: it is compressed or filtered, which Keras does not write")
    if dataset.shape is None or dataset.dtype.kind not in "fiubV":
        raise _Fault(f"{place}: it is no array of numbers, but {dataset.dtype}")
    bits = dataset.dtype.kind == "V"
    if bits and not (dataset.dtype.itemsize == 2 and _attribute(dataset, "dtype", 64) == "bfloat16"):
        raise _Fault(f"{place}: it is no array of numbers, but {dataset.dtype}")
    size = math.prod(dataset.shape) * dataset.dtype.itemsize
    if size > left or size > dataset.id.get_storage_size():
        raise _Fault(
            f"{place}: {dataset.shape} of {dataset.dtype} are {size} bytes, of which the file holds"
            f" {min(left, dataset.id.get_storage_size())}"
        )
    array = np.asarray(dataset[()])
    if bits:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32), "bfloat16"
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return (native.astype(np.float32) if native.dtype == np.float16 else native), native.dtype.name


def _said(error: BaseException) -> str:
    """Return the message of an error, in one line of moderate length."""
    return re.sub(r"\s+", " ", str(error))[:300] or type(error).__name__
