"""Bytes of files into named arrays and a description; what they mean for layers is decided in `fastseq.convert`.

Nothing here runs code from a file, opens a file that was not named, or allocates memory for what a file says before it
is held against its size.
"""

from __future__ import annotations

import importlib
import os
from io import BufferedReader

from fastseq.formats import archive, folder, safetensors
from fastseq.formats.contents import Contents
from fastseq.formats.source import FormatError, Source

__all__ = ["FORMATS", "Contents", "FormatError", "read", "recognise"]

# Formats by their names, with what the file is, and the module of this package that reads it.
FORMATS = {
    "fastseq": ("a file of fastseq", "safetensors"),
    "safetensors": ("safetensors", "safetensors"),
    "npz": ("NumPy's .npz", "npz"),
    "pytorch": ("a checkpoint of PyTorch", "pytorch"),
    "onnx": ("ONNX", "onnx"),
    "keras": ("Keras' .keras", "keras"),
    "hdf5": ("HDF5, as Keras' .h5", "keras"),
    "huggingface": ("a folder of Hugging Face", "folder"),
}
_HDF5 = b"\x89HDF\r\n\x1a\n"
_HDF5_PLACES = (0, 512, 1024, 2048)
_ONNX_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}  # with their wire types
_ONNX_GRAPH = 7
_MAX_FIELDS = 10_000


def recognise(path: str | os.PathLike[str]) -> str:
    """Return the format of a file or folder, by its content and not by its name.

    Parameters
    ----------
    path : path

    Returns
    -------
    str
        A name in `FORMATS`.

    Raises
    ------
    ValueError
        It is none of those.
    OSError
        It cannot be read.
    """
    if os.path.isdir(path):
        folder.check(path)
        return "huggingface"
    source = Source(path)
    start = source.read("the file", 0, min(16, source.size))
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= source.size - 8:
        return safetensors.read(path).format
    if start[:4] in (b"PK\3\4", b"PK\5\6"):
        return _of_archive(source)
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "pytorch"  # whose reader says how such a file is saved anew
    if any(source.read("the file", place, 8) == _HDF5 for place in _HDF5_PLACES if place + 8 <= source.size):
        return "hdf5"
    if _is_onnx(source):
        return "onnx"
    known = ", ".join(what for what, _ in FORMATS.values())
    raise source.fault("the file", f"begins with {start!r}, and is none of: {known}")


def _of_archive(source: Source) -> str:
    names = archive.Archive(source.path).records
    if all(name.endswith(".npy") for name in names):
        return "npz"
    if "model.weights.h5" in names and "config.json" in names:
        return "keras"
    if any(name.endswith("/data.pkl") for name in names):
        return "pytorch"
    raise source.fault("zip directory", "holds neither arrays of NumPy nor a model of Keras or PyTorch")


def _is_onnx(source: Source) -> bool:
    """Whether all bytes are fields that a model of ONNX has, and a graph is among them. Nothing is loaded."""
    found = set()
    with source.open("the file") as file:
        for _ in range(_MAX_FIELDS):
            place = file.tell()
            if place >= source.size:
                return place == source.size and _ONNX_GRAPH in found
            key, value = _varint(file), _varint(file)
            field, kind = key >> 3, key & 7
            if _ONNX_FIELDS.get(field) != kind or value < 0 or (kind and value > source.size):
                return False
            found.add(field)
            if kind:
                file.seek(value, os.SEEK_CUR)
    return False


def _varint(file: BufferedReader) -> int:
    """The next number of a protobuf; -1 where there is none."""
    value = 0
    for shift in range(0, 70, 7):
        octet = file.read(1)
        if not octet:
            return -1
        value |= (octet[0] & 0x7F) << shift
        if octet[0] < 0x80:
            return value
    return -1


def read(path: str | os.PathLike[str]) -> Contents:
    """Read a file or folder of any format in `FORMATS`.

    Parameters
    ----------
    path : path

    Returns
    -------
    Contents

    Raises
    ------
    ValueError
        It is of no known format, damaged, or holds what is not supported; the message names the file and the place.
    ImportError
        A package that the format needs is not installed.
    OSError
        It cannot be read.
    """
    _, module = FORMATS[recognise(path)]
    contents: Contents = importlib.import_module(f"fastseq.formats.{module}").read(path)
    return contents
