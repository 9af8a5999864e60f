"""Zip files: the records of PyTorch, NumPy and Keras files, found and checked without extracting anything.

`zipfile` reads a directory of any length, takes the last of two records of a name and lets records overlap. Here what
a file says is checked against its bytes before memory is allocated for it.
"""

from __future__ import annotations

import os
import struct
import zlib
from bisect import bisect_left, bisect_right
from typing import Any, NamedTuple

import numpy as np

from fastseq.checks import Array
from fastseq.formats.source import FormatError, Source, short

_MAX_RECORDS = 50_000
_MAX_DIRECTORY = 16 << 20  # bytes
_END, _END_SIZE = b"PK\5\6", 22
_LOCATOR, _END_64 = b"PK\6\7", b"PK\6\6"
# signature, flags, method, checksum, stored size, size, lengths of name, extra and comment, disk, attributes, offset
_ENTRY = struct.Struct("<4s4x2H4x3I4H2x2I")
_LOCAL = struct.Struct("<4s2x2H16x2H")  # signature, flags, method, lengths of name and extra
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _UTF8 = 0x1, 0x800
_LINK, _KIND = 0o120000, 0o170000  # of the modes of Unix
# A file of weights does not become a hundred times as large; a bomb does.
MAX_GROWTH, ALWAYS_FINE = 100, 16 << 20
_IN_64 = 0xFFFFFFFF


class Record(NamedTuple):
    """One file in the archive: where its header is, whether it is deflated, its bytes there and its size."""

    header: int
    deflated: bool
    stored: int
    size: int
    crc: int


class Archive:
    """The records of a zip file, by their names.

    Attributes
    ----------
    source : Source
    records : dict from str to Record
        Without those of folders.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.source = Source(path)
        self.records: dict[str, Record] = {}
        count, size, self._directory = self._end()
        if not count <= _MAX_RECORDS or size > _MAX_DIRECTORY:
            raise self._fault(f"{count} records in {size} bytes are more than {_MAX_RECORDS} in {_MAX_DIRECTORY}")
        data = self.source.read("zip directory", self._directory, size)
        try:
            position = 0
            for _ in range(count):
                position = self._add(data, position)
        except struct.error:
            raise self._fault("ends early") from None
        if position != size:
            raise self._fault(f"has {size - position} bytes more than its {count} records")
        self._headers = sorted(record.header for record in self.records.values())
        total = sum(record.size for record in self.records.values())
        if total > MAX_GROWTH * self.source.size + ALWAYS_FINE:
            raise self._fault(f"{self.source.size} bytes would become {total}, which no file of weights does")

    def _fault(self, what: str) -> FormatError:
        return self.source.fault("zip directory", what)

    def _end(self) -> tuple[int, int, int]:
        """Number of records, size and offset of the directory."""
        size = self.source.size
        tail = self.source.read("zip directory", max(0, size - _END_SIZE - 0xFFFF), min(size, _END_SIZE + 0xFFFF))
        place = tail.rfind(_END)
        if place < 0 or len(tail) - place < _END_SIZE:
            raise self._fault("there is none: the file was cut, or is no zip file")
        _, disk, of_disk, here, count, length, offset, comment = struct.unpack_from("<4s4H2IH", tail, place)
        if place + _END_SIZE + comment != len(tail):
            raise self._fault("bytes follow its end")
        end = size - len(tail) + place
        locator = self.source.read("zip directory", max(0, end - 20), min(end, 20))
        if locator[:4] == _LOCATOR:
            end = int.from_bytes(locator[8:16], "little")
            record = self.source.read("zip64 end", end, 56)
            if record[:4] != _END_64:
                raise self._fault("the zip64 locator points nowhere")
            disk, of_disk, here, count, length, offset = struct.unpack_from("<2I4Q", record, 16)
        if disk or of_disk or here != count:
            raise self._fault("belongs to an archive of several files")
        if offset + length != end:
            raise self._fault(f"{length} bytes at {offset} do not end where its end is, at {end}")
        return count, length, offset

    def _add(self, data: bytes, position: int) -> int:
        """Check an entry of the directory; the position of the next one."""
        fields: tuple[Any, ...] = _ENTRY.unpack_from(data, position)
        signature, flags, method, crc, stored, size, name_size, extra_size, comment_size, disk, mode, header = fields
        position += _ENTRY.size
        raw = data[position : position + name_size]
        extra = data[position + name_size : position + name_size + extra_size]
        end: int = position + name_size + extra_size + comment_size
        if signature != b"PK\1\2" or end > len(data):
            raise self._fault(f"entry {len(self.records)} is none")
        try:
            name = raw.decode("utf-8" if flags & _UTF8 else "cp437")
        except UnicodeDecodeError:
            raise self._fault(f"the name {short(raw)} is not UTF-8") from None
        if _IN_64 in (size, stored, header):
            size, stored, header = self._sizes_64(name, extra, size, stored, header)
        self._check_name(name, mode >> 16)
        if flags & _ENCRYPTED:
            raise self._fault(f"{short(name)} is encrypted")
        if method not in (_STORED, _DEFLATED) or disk:
            raise self._fault(f"{short(name)} has a compression or disk that is not supported")
        if method == _STORED and stored != size:
            raise self._fault(f"{short(name)} has {size} bytes, stored as {stored}")
        if header + _LOCAL.size + name_size + stored > self._directory:
            raise self._fault(f"{short(name)}: {stored} bytes at {header} reach into the directory")
        if not name.endswith("/"):
            self.records[name] = Record(header, method == _DEFLATED, stored, size, crc)
        return end

    def _sizes_64(self, name: str, extra: bytes, *sizes: int) -> list[int]:
        """The sizes and the offset of an entry, those that are in its zip64 field from there."""
        position = 0
        while position + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, position)
            position += 4
            if kind == 1:
                field = extra[position : position + length]
                wanted = [index for index, size in enumerate(sizes) if size == _IN_64]
                if len(field) < 8 * len(wanted):
                    break
                found = list(sizes)
                for index, value in zip(wanted, struct.unpack_from(f"<{len(wanted)}Q", field), strict=True):
                    found[index] = value
                return found
            position += length
        raise self._fault(f"{short(name)} has no sizes of zip64")

    def _check_name(self, name: str, mode: int) -> None:
        if name in self.records:
            raise self._fault(f"{short(name)} appears twice")
        if not name or name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise self._fault(f"{short(name)} is no path inside the archive")
        if mode & _KIND == _LINK:
            raise self._fault(f"{short(name)} is a link")

    def place(self, name: str) -> int:
        """Where the bytes of a record begin; its local header is checked."""
        record = self.records[name]
        local = self.source.read(short(name), record.header, _LOCAL.size)
        signature, flags, method, name_size, extra_size = _LOCAL.unpack(local)
        begin: int = record.header + _LOCAL.size + name_size + extra_size
        raw = self.source.read(short(name), record.header + _LOCAL.size, name_size)
        same = raw.decode("utf-8" if flags & _UTF8 else "cp437", "replace") == name
        if signature != b"PK\3\4" or not same or (method == _DEFLATED) != record.deflated:
            raise self.source.fault(short(name), f"its header at {record.header} is not the one of the directory")
        following = bisect_right(self._headers, record.header)
        limit: int = self._headers[following] if following < len(self._headers) else self._directory
        shared = following - bisect_left(self._headers, record.header) > 1
        if begin + record.stored > limit or shared:
            raise self.source.fault(short(name), "overlaps the record that follows")
        return begin

    def begin(self, name: str, size: int) -> bytes:
        """The first bytes of a record, at most `size`, unchecked."""
        record, place = self.records[name], self.place(name)
        data = self.source.read(short(name), place, min(record.stored, size))
        return self._inflated(name, data, size) if record.deflated else data

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of a record of at most `limit`."""
        if self.records[name].size > limit:
            raise self.source.fault(short(name), f"{self.records[name].size} bytes are more than {limit}")
        return self.array(name, np.dtype(np.uint8), 0, self.records[name].size).tobytes()

    def array(self, name: str, dtype: np.dtype[Any], offset: int, count: int) -> Array:
        """Numbers of a record from an offset to its end; the checksum of the record is checked."""
        record, place = self.records[name], self.place(name)
        if offset + count * dtype.itemsize != record.size:
            raise self.source.fault(short(name), f"{count} of {dtype} after {offset} bytes are not its {record.size}")
        data = self.source.array(short(name), place, np.dtype(np.uint8), record.stored)
        if record.deflated:
            data = np.frombuffer(self._inflated(name, data.data, record.size + 1), np.uint8)
        if len(data) != record.size or zlib.crc32(data.data) != record.crc:
            raise self.source.fault(short(name), "damaged: its bytes do not have the checksum that was written")
        aligned = data[offset:] if offset % dtype.alignment == 0 else data[offset:].copy()
        numbers: Array = aligned.view(dtype)
        return numbers

    def _inflated(self, name: str, data: bytes | memoryview, limit: int) -> bytes:
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, limit)
        except zlib.error as error:
            raise self.source.fault(short(name), f"damaged: {error}") from None
