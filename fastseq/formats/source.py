"""Bytes of a file, read in parts: what has to be checked of every format, whatever the file says."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BufferedReader
from typing import Any

import numpy as np

from fastseq.checks import Array
from fastseq.narrow import from_bfloat16

_MAX_AXES = 64  # of NumPy
_MAX_BYTES = 2**60
# Types by their names here: the dtype of their bytes in a file, little-endian.
TYPES = {
    "bool": "|u1",
    **{
        f"{u}int{bits}": f"{'<' if bits > 8 else '|'}{u or 'i'}{bits // 8}"
        for u in ("", "u")
        for bits in (8, 16, 32, 64)
    },
    "float16": "<f2",
    "bfloat16": "<u2",
    "float32": "<f4",
    "float64": "<f8",
    "complex64": "<c8",
    "complex128": "<c16",
}


class FormatError(ValueError):
    """A file is damaged, or holds what is not supported: ``"<path>: <place>: <what>"``."""

    def __init__(self, path: str, place: str, what: str) -> None:
        super().__init__(f"{path}: {place}: {what}")
        self.place, self.what = place, what


class Source:
    """A plain file that is read in parts.

    It is opened for each part, so that nothing has to be closed. Whether it is still the same file is checked each
    time: one that was replaced, cut or written to since is refused. It is not mapped: a page of a mapped file that is
    cut meanwhile ends the process.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        status = os.stat(self.path)
        if not stat.S_ISREG(status.st_mode):
            raise self.fault("the file", "is not a plain file")
        self.size = status.st_size
        self._version = _version(status)

    def fault(self, place: str, what: str) -> FormatError:
        """The error that says what is wrong where."""
        return FormatError(self.path, place, what)

    def open(self, place: str) -> BufferedReader:
        """Open the file; refused where it has changed since."""
        file = open(self.path, "rb")
        if _version(os.fstat(file.fileno())) != self._version:
            file.close()
            raise self.fault(place, "the file has changed since it was opened")
        return file

    def _check_inside(self, place: str, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise self.fault(place, f"{size} bytes at {offset} do not fit into the {self.size} bytes of the file")

    def read(self, place: str, offset: int, size: int) -> bytes:
        """Some bytes."""
        self._check_inside(place, offset, size)
        with self.open(place) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise self.fault(place, "the file was cut while it was read")
        return data

    def array(self, place: str, offset: int, dtype: np.dtype[Any], count: int) -> Array:
        """Numbers as they are in the file, with one axis."""
        size = count * dtype.itemsize
        self._check_inside(place, offset, size)
        numbers = np.empty(count, dtype)
        with self.open(place) as file:
            file.seek(offset)
            if file.readinto(numbers.view(np.uint8).data) != size:
                raise self.fault(place, "the file was cut while it was read")
        return numbers


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class LazyArrays(Mapping[str, Array]):
    """Arrays by their names, each read when it is asked for."""

    def __init__(self, readers: Mapping[str, Callable[[], Array]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Array:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def count_of(shape: Sequence[Any], itemsize: int) -> int:
    """Number of elements of an array of this shape; a `ValueError` where NumPy could not hold it."""
    if len(shape) > _MAX_AXES or any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"a shape should be up to {_MAX_AXES} lengths from 0, not {short(shape)}")
    if math.prod(length or 1 for length in shape) * itemsize > _MAX_BYTES:
        raise ValueError(f"an array of shape {short(shape)} is too large")
    return math.prod(shape)


def decoded(stored: Array, type: str) -> Array:
    """Numbers of the file as arrays of native byte order; float16 and bfloat16 as float32, bytes of bool as bool.

    Parameters
    ----------
    stored : ndarray
        Of the dtype that `TYPES` has for the type, in any byte order.
    type : str
        A name in `TYPES`.
    """
    if type == "bool":
        truths: Array = stored != 0
        return truths
    if type == "bfloat16":
        return from_bfloat16(stored)
    native = np.dtype(np.float32) if type == "float16" else stored.dtype.newbyteorder("=")
    numbers: Array = stored.astype(native, copy=False)
    return numbers


def short(value: Any) -> str:
    """A value of a file in a message, not longer than a line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def listed(names: Sequence[str], limit: int = 20) -> str:
    """Names of a file in a message; the first of them where there are many."""
    shown = ", ".join(map(short, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
