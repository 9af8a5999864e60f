"""NumPy's ``.npz``: a zip file with an array in each record. Arrays of objects, which are pickles, are refused."""

from __future__ import annotations

import os
import re
from functools import partial

import numpy as np

from fastseq.checks import Array
from fastseq.formats.archive import Archive
from fastseq.formats.contents import Contents
from fastseq.formats.source import LazyArrays, count_of, decoded, listed, short

_MAX_HEADER = 10_000  # bytes, as of NumPy
# A header as NumPy writes it, which is a dict of Python; it is not evaluated.
_HEADER = re.compile(
    rb"\{'descr': (?P<type>'[^']{1,20}'|\[.*), 'fortran_order': (?P<columns>True|False), "
    rb"'shape': \((?P<shape>[0-9, ]*)\),? ?\} *\n?"
)
_NUMBERS = re.compile(r"[<>|=](b1|[iu][1248]|f[248]|c8|c16)")
_TEXTS = re.compile(r"[<>|][US][1-9]\d{0,8}")


def read(path: str | os.PathLike[str]) -> Contents:
    """Read a file of `numpy.savez` or `numpy.savez_compressed`.

    Parameters
    ----------
    path : path

    Returns
    -------
    Contents
        Without the ending ``.npy`` in the names.

    Raises
    ------
    ValueError
        The file is damaged, or holds arrays of objects, of dates or with fields.
    OSError
        The file cannot be read.
    """
    archive = Archive(path)
    others = [name for name in archive.records if not name.endswith(".npy")]
    if others:
        raise archive.source.fault("zip directory", f"records that are no arrays: {listed(others)}")
    readers, tensors, refused = {}, {}, []
    for name in archive.records:
        dtype_name, columns, shape, offset = _header(archive, name)
        if not _NUMBERS.fullmatch(dtype_name) and not _TEXTS.fullmatch(dtype_name):
            refused.append(f"{name} ({dtype_name})")
            continue
        dtype = np.dtype(dtype_name)
        try:
            size = count_of(shape, dtype.itemsize) * dtype.itemsize
        except ValueError as error:
            raise archive.source.fault(short(name), str(error)) from None
        if offset + size != archive.records[name].size:
            raise archive.source.fault(
                short(name), f"{archive.records[name].size - offset} bytes for {dtype} of shape {short(shape)}"
            )
        own = name.removesuffix(".npy")
        readers[own] = partial(_array, archive, name, dtype, columns, shape, offset)
        tensors[own] = {"type": dtype.name, "shape": shape}
    if refused:
        raise archive.source.fault("types", f"neither numbers nor text, and never read: {listed(refused)}")
    return Contents("npz", LazyArrays(readers), {"tensors": tensors})


def _header(archive: Archive, name: str) -> tuple[str, bool, tuple[int, ...], int]:
    """The dtype of a record, whether its columns are contiguous, its shape, and where its numbers begin."""
    start = archive.begin(name, 12 + _MAX_HEADER)
    if start[:6] != b"\x93NUMPY" or start[6:8] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise archive.source.fault(short(name), "is no array as NumPy writes it")
    begin = 10 if start[6] == 1 else 12
    end = begin + int.from_bytes(start[8:begin], "little")
    found = _HEADER.fullmatch(start, begin, end)
    if not found or end > len(start):
        raise archive.source.fault(short(name), f"its header is {short(start[begin:end])}")
    lengths = [text.strip() for text in found["shape"].split(b",")]
    if lengths[-1] == b"":
        lengths.pop()
    if not all(text.isdigit() and len(text) < 20 for text in lengths):
        raise archive.source.fault(short(name), f"its shape is {short(found['shape'])}")
    return found["type"].decode("latin-1").strip("'"), found["columns"] == b"True", tuple(map(int, lengths)), end


def _array(archive: Archive, name: str, dtype: np.dtype, columns: bool, shape: tuple[int, ...], offset: int) -> Array:
    count = count_of(shape, dtype.itemsize)
    stored = archive.array(name, np.dtype(np.uint8) if dtype.name == "bool" else dtype, offset, count)
    return decoded(stored, dtype.name).reshape(shape, order="F" if columns else "C")
