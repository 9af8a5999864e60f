"""Safetensors files: a header in JSON, then the bytes of the arrays, in order and without a gap."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fastseq.checks import Array
from fastseq.formats.contents import Contents
from fastseq.formats.source import TYPES, LazyArrays, Source, count_of, decoded, listed, short

HEADER_LIMIT = 100_000_000  # bytes, of the format
_ENTRY_LIMIT = 4096  # characters of what the header says of one array
_METADATA = "__metadata__"
# Types of the format by their names in `TYPES`; those that NumPy does not have at all are not among them.
STORED_TYPES = {
    "BOOL": "bool",
    **{f"{u}{bits}": f"{name}{bits}" for u, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
_SPACE = re.compile(r"[ \t\r\n]*")


class Entry(NamedTuple):
    """What the header says of an array: its type, in the names of the format, and its bytes, counted from the first."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class File:
    """A safetensors file whose header was read and checked.

    Attributes
    ----------
    metadata : dict from str to str
    entries : dict from str to Entry
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.source = source = Source(path)
        size = int.from_bytes(source.read("length of the header", 0, 8), "little")
        if not 2 <= size <= min(HEADER_LIMIT, source.size - 8):
            raise source.fault(
                "length of the header", f"{size} should be 2 to {HEADER_LIMIT}, in a file of {source.size} bytes"
            )
        if source.read("header", 8, 1) != b"{":
            raise source.fault("header", "should begin with {")
        try:
            self.metadata, self.entries = _Header(source.read("header", 8, size).decode()).parsed()
            self._begin = 8 + size
            _check_places(self.entries, source.size - self._begin)
        except (ValueError, RecursionError) as error:
            raise source.fault("header", str(error)) from None

    def stored(self, name: str) -> Array:
        """An array as it is in the file, the bits of bfloat16 as uint16."""
        entry = self.entries[name]
        dtype = np.dtype(TYPES[STORED_TYPES[entry.dtype]])
        count = (entry.end - entry.begin) // dtype.itemsize
        numbers = self.source.array(short(name), self._begin + entry.begin, dtype, count).reshape(entry.shape)
        return numbers.astype(dtype.newbyteorder("="), copy=False) if entry.dtype != "BOOL" else numbers != 0

    def array(self, name: str) -> Array:
        """An array, float16 and bfloat16 as float32."""
        return decoded(self.stored(name), STORED_TYPES[self.entries[name].dtype])


def read(path: str | os.PathLike[str]) -> Contents:
    """Read a safetensors file, of fastseq or of others.

    Parameters
    ----------
    path : path

    Returns
    -------
    Contents
        Its ``description["metadata"]`` has the strings that the writer added.

    Raises
    ------
    ValueError
        The file is damaged, or has types of numbers that NumPy does not have.
    OSError
        The file cannot be read.
    """
    file = File(path)
    unknown = [f"{name} ({entry.dtype})" for name, entry in file.entries.items() if entry.dtype not in STORED_TYPES]
    if unknown:
        raise file.source.fault("header", f"types that cannot be read, of {listed(unknown)}")
    tensors = {name: {"type": STORED_TYPES[entry.dtype], "shape": entry.shape} for name, entry in file.entries.items()}
    return Contents(
        "fastseq" if any(name.startswith("fastseq.") for name in file.metadata) else "safetensors",
        LazyArrays({name: partial(file.array, name) for name in file.entries}),
        {"metadata": file.metadata, "tensors": tensors},
    )


class _Header:
    """The text of a header, parsed one entry at a time, so that no text becomes a multiple of its size in memory."""

    def __init__(self, text: str) -> None:
        self._text, self._position = text, 0

    def parsed(self) -> tuple[dict[str, str], dict[str, Entry]]:
        """The metadata and the entries of a whole header."""
        metadata: dict[str, str] = {}
        entries = {}
        for name in self._members():
            if name == _METADATA:
                for key in self._members():
                    metadata[key] = self._string()
            else:
                entries[name] = self._entry(name)
        self._skip()
        if self._position != len(self._text):
            raise ValueError(f"something follows it at {self._position}")
        return metadata, entries

    def _members(self) -> Iterator[str]:
        """The names of an object's members, each only once; the value is taken before the next one."""
        self._take("{")
        seen = set()
        more = self._skip() != "}"
        while more:
            name = self._string()
            if name in seen:
                raise ValueError(f"{short(name)} appears twice")
            seen.add(name)
            self._take(":")
            yield name
            more = self._skip() == ","
            if more:
                self._take(",")
        self._take("}")

    def _entry(self, name: str) -> Entry:
        self._skip()
        end = self._text.find("}", self._position, self._position + _ENTRY_LIMIT) + 1
        if not end:
            raise ValueError(f"{short(name)} has no entry that ends")
        pairs = json.loads(self._text[self._position : end], object_pairs_hook=list)
        self._position = end
        if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
            raise ValueError(f"{short(name)} has no entry")
        if sorted(key for key, _ in pairs) != ["data_offsets", "dtype", "shape"]:
            raise ValueError(f"{short(name)} should have dtype, shape and data_offsets, each once")
        fields = dict(pairs)
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
            raise ValueError(f"{short(name)} has a dtype, shape or data_offsets of another type")
        if len(offsets) != 2 or any(type(offset) is not int for offset in offsets) or not 0 <= offsets[0] <= offsets[1]:
            raise ValueError(f"{short(name)} has the data_offsets {short(offsets)}")
        itemsize = np.dtype(TYPES[STORED_TYPES[dtype]]).itemsize if dtype in STORED_TYPES else 1
        size = count_of(shape, itemsize) * itemsize
        given = offsets[1] - offsets[0]
        if dtype in STORED_TYPES and size != given:
            raise ValueError(f"{short(name)} has {short(given)} bytes for {dtype} of shape {short(shape)}")
        return Entry(dtype, tuple(shape), *offsets)

    def _string(self) -> str:
        if self._skip() != '"':
            raise ValueError(f"a string should stand at {self._position}")
        string: str
        string, self._position = _decode(self._text, self._position)
        return string

    def _skip(self) -> str:
        """The next character that is no space."""
        space = _SPACE.match(self._text, self._position)
        assert space is not None  # it may be empty
        self._position = space.end()
        return self._text[self._position : self._position + 1]

    def _take(self, character: str) -> None:
        if self._skip() != character:
            raise ValueError(f"{character} should stand at {self._position}")
        self._position += 1


_decode: Any = json.JSONDecoder().raw_decode


def _check_places(entries: dict[str, Entry], size: int) -> None:
    """Every byte behind the header belongs to one array."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise ValueError(f"{short(name)} begins at {short(entry.begin)}, not at {short(end)} behind the one before")
        end = entry.end
    if end != size:
        raise ValueError(f"the arrays end at {short(end)} of {size} bytes")
