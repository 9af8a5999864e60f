"""Files that lie, each with the words its error should have; `python hostile.py FOLDER` writes them all.

Everything is written by hand, byte by byte, so that each file is wrong in one place only.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Safetensors.


def safetensors(header: bytes | str | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape: Any, begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def of_safetensors() -> Iterator[tuple[str, bytes, str]]:
    good = entry([2], 0, 8)
    text = json.dumps(good)
    yield "empty", b"", "begins with b''"
    yield "seven-bytes", bytes(7), "begins with"
    for length in (0, 1, 90, 99_000_000, 2**63, 2**64 - 1):
        yield f"header-of-{length}", safetensors({"a": good}, bytes(8), length), "begins with|header: "
    yield "header-of-spaces", safetensors(b" " * 64), "begins with"
    yield "header-a-list", safetensors('[{"a": 1}]'), "begins with"
    yield "header-cut", safetensors('{"a": ' + text, bytes(8)), "header: } should stand"
    yield "header-twice", safetensors('{"a": ' + text + "}{}", bytes(8)), "something follows"
    yield "header-not-utf-8", safetensors(b'{"\xff": ' + text.encode() + b"}", bytes(8)), "header: 'utf-8'"
    yield "header-with-nan", safetensors('{"a":' + text.replace("[2]", "[NaN]") + "}", bytes(8)), "lengths"
    yield "header-deep-shape", safetensors('{"a":{"dtype":"F32","shape":' + "[" * 4000 + "}}", bytes(8)), "header: "
    yield "header-deep", safetensors('{"a":' * 100_000), "'a' should have dtype|no entry|header: "
    yield "header-deep-metadata", safetensors('{"__metadata__":{"a":' + "[" * 100_000), "a string should stand"
    yield "header-entry-without-end", safetensors('{"a":{' + " " * 1_000_000), "no entry that ends"
    yield "metadata-of-numbers", safetensors({"__metadata__": {"a": 1}}), "a string should stand"
    yield "metadata-twice", safetensors('{"__metadata__":{},"__metadata__":{}}'), "appears twice"
    yield "metadata-key-twice", safetensors('{"__metadata__":{"a":"1","a":"2"}}'), "'a' appears twice"
    yield "tensor-twice", safetensors('{"a":' + text + ',"a":' + text + "}", bytes(8)), "'a' appears twice"
    yield "dtype-twice", safetensors('{"a":{"dtype":"F64",' + text[1:] + "}", bytes(8)), "each once"
    yield "no-shape", safetensors({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "dtype, shape and"
    yield "overlap", safetensors({"a": good, "b": entry([2], 4, 12)}, bytes(12)), "'b' begins at 4"
    yield "same-bytes", safetensors({"a": good, "b": good}, bytes(8)), "begins at 0"
    yield "gap", safetensors({"a": good, "b": entry([2], 12, 20)}, bytes(20)), "'b' begins at 12"
    yield "beyond-the-end", safetensors({"a": entry([4], 0, 16)}, bytes(8)), "end at 16 of 8"
    yield "bytes-behind", safetensors({"a": good}, bytes(9)), "end at 8 of 9"
    yield "end-before-begin", safetensors({"a": entry([2], 8, 0)}, bytes(8)), "data_offsets"
    yield "negative-offset", safetensors({"a": entry([2], -8, 0)}, bytes(8)), "data_offsets"
    yield "offset-of-2-64", safetensors({"a": entry([2], 2**64, 2**64 + 8)}, bytes(8)), "'a' begins at"
    yield "offset-a-real", safetensors({"a": entry([2], 0.0, 8.0)}, bytes(8)), "data_offsets"
    yield "offset-of-many-digits", safetensors('{"a":' + text.replace("8]", "9" * 3900 + "]") + "}"), "'a' has"
    yield "shape-overflows", safetensors({"a": entry([2**32, 2**32], 0, 8)}, bytes(8)), "too large"
    yield "shape-overflows-to-0", safetensors({"a": entry([2**63, 2], 0, 0)}), "too large"
    yield "shape-large-and-empty", safetensors({"a": entry([2**62, 0], 0, 0)}), "too large"
    yield "shape-negative", safetensors({"a": entry([-2, -1], 0, 8)}, bytes(8)), "lengths from 0"
    yield "shape-of-truths", safetensors({"a": entry([True, 2], 0, 8)}, bytes(8)), "lengths from 0"
    yield "shape-of-reals", safetensors({"a": entry([2.0], 0, 8)}, bytes(8)), "lengths from 0"
    yield "shape-of-100-axes", safetensors({"a": entry([1] * 99 + [2], 0, 8)}, bytes(8)), "up to 64 lengths"
    yield "type-that-lies", safetensors({"a": entry([2], 0, 8, "F64")}, bytes(8)), "8 bytes for F64"
    yield "type-unknown", safetensors({"a": entry([8], 0, 8, "F8_E4M3")}, bytes(8)), "cannot be read, of 'a .F8_E4M3.'"


# Zip files, whose directory may say something else than the records.


def zipped(records: Sequence[tuple[str, bytes, dict[str, Any]]], **end: int) -> bytes:
    """A zip file; of each record fields may be said otherwise, and of the end of the directory."""
    body, directory = b"", b""
    for name, data, lies in records:
        stored = lies.get("stored", data)
        method = 8 if "stored" in lies else 0
        said = {
            "flags": 0,
            "method": method,
            "crc": zlib.crc32(data),
            "stored_size": len(stored),
            "size": len(data),
            "mode": 0,
            "header": len(body),
            "name": name.encode(),
            **{key: value for key, value in lies.items() if key != "stored"},
        }
        local = lies.get("local_name", name).encode()
        body += struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, method, 0, 0, 0, 0, 0, len(local), 0) + local + stored
        directory += struct.pack(
            "<4s6H3I5H2I",
            *(b"PK\1\2", 0x314, 20, said["flags"], said["method"], 0, 0),
            *(said["crc"], said["stored_size"], said["size"], len(said["name"]), 0, 0, 0, 0, said["mode"] << 16),
            said["header"],
        )
        directory += said["name"]
    fields = {"count": len(records), "size": len(directory), "offset": len(body), **end}
    counts, place = [fields["count"]] * 2, (fields["size"], fields["offset"])
    return body + directory + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *counts, *place, 0)


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(data) + packer.flush()


def npy(descr: str, shape: str, data: bytes = b"", version: int = 1, header: str | None = None) -> bytes:
    text = header or f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode() + data


F4 = npy("'<f4'", "(2,)", bytes(8))


def of_zip() -> Iterator[tuple[str, bytes, str]]:
    def one(**lies: Any) -> bytes:
        return zipped([("a.npy", F4, lies)])

    good = one()
    yield "zip-cut", good[:-1], "there is none"
    yield "zip-longer", good + b"\0", "there is none|bytes follow"
    yield "zip-comment-lies", good[:-2] + b"\7\0", "bytes follow its end"
    yield "zip-without-directory", b"PK\3\4" + bytes(200), "there is none"
    yield "zip-offset-beyond", zipped([("a.npy", F4, {})], offset=2**32 - 1), "do not end where"
    yield "zip-size-beyond", zipped([("a.npy", F4, {})], size=2**32 - 1), "do not end where"
    yield "zip-count-more", zipped([("a.npy", F4, {})], count=2), "ends early"
    yield "zip-count-less", zipped([("a.npy", F4, {})], count=0), "bytes more than its 0"
    yield "zip-count-65535", zipped([("a.npy", F4, {})], count=65535), "are more than"
    end_64 = b"PK\6\7" + struct.pack("<IQI", 0, 2**63, 1)
    yield "zip64-nowhere", good[:-22] + end_64 + good[-22:], "do not fit"
    yield "zip64-not-there", good[:-22] + b"PK\6\7" + struct.pack("<IQI", 0, 0, 1) + good[-22:], "points nowhere"
    yield "zip64-without-sizes", one(size=2**32 - 1), "no sizes of zip64"
    yield "zip-twice", zipped([("a.npy", F4, {}), ("a.npy", F4, {})]), "'a.npy' appears twice"
    for name, path in (("up", "../a.npy"), ("inner", "x/../../a.npy"), ("root", "/a.npy"), ("back", "..\\a.npy")):
        yield f"zip-path-{name}", zipped([(path, F4, {})]), "no path inside"
    yield "zip-link", one(mode=0o120777), "is a link"
    yield "zip-encrypted", one(flags=1), "is encrypted"
    yield "zip-method", one(method=14), "compression"
    yield "zip-method-lies", one(method=8), "not the one of the directory|would become"
    yield "zip-size-lies", one(size=2**31), "stored as"
    yield "zip-stored-beyond", one(size=2**31, stored_size=2**31), "reach into the directory"
    yield "zip-header-beyond", one(header=2**31), "reach into the directory"
    yield "zip-checksum", one(crc=1), "checksum"
    yield "zip-name-lies", one(local_name="b.npy"), "not the one of the directory"
    yield "zip-name-not-utf-8", one(name=b"\xff.npy", flags=0x800), "not UTF-8"
    two = [("a.npy", F4, {}), ("b.npy", F4, {"header": 0, "local_name": "b.npy"})]
    yield "zip-same-bytes", zipped(two), "not the one of the directory|overlaps"
    inner = zipped([("b.npy", F4, {})])[: 30 + 5 + len(F4)]
    quoted = [("a.npy", npy("'|u1'", f"({len(inner)},)", inner), {})]
    place = zipped(quoted).index(inner)
    yield "zip-overlap", zipped([*quoted, ("b.npy", F4, {"header": place})]), "'a.npy': overlaps"
    zeros = npy("'|u1'", f"({80 << 20},)")
    zeros += bytes(80 << 20)
    yield "zip-bomb", zipped([("a.npy", zeros, {"stored": deflated(zeros)})]), "no file of weights"
    many = deflated(F4 + bytes(15 << 20))
    yield "zip-bomb-that-lies", zipped([("a.npy", F4, {"stored": many})]), "damaged"
    yield "zip-deflate-damaged", zipped([("a.npy", F4, {"stored": b"\xff" * 100})]), "damaged"
    yield "zip-of-text", zipped([("a.txt", b"text", {})]), "neither arrays"


def of_npz() -> Iterator[tuple[str, bytes, str]]:
    def one(*args: Any, **more: Any) -> bytes:
        return zipped([("a.npy", npy(*args, **more), {})])

    pickle = b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R."
    yield "npz-objects", one("'|O'", "(1,)", pickle), "neither numbers nor text"
    yield "npz-fields", one("[('a', '<f4')]", "(2,)", bytes(8)), "neither numbers nor text"
    yield "npz-dates", one("'<M8[s]'", "(1,)", bytes(8)), "neither numbers nor text"
    yield "npz-void", one("'|V8'", "(1,)", bytes(8)), "neither numbers nor text"
    yield "npz-text-of-nothing", one("'<U0'", "(1000000000,)"), "neither numbers nor text"
    code = "{'descr': __import__('os').system('true'), 'fortran_order': False, 'shape': (2,), }\n"
    yield "npz-code", one("", "", bytes(8), header=code), "its header is"
    yield "npz-deep", one("", "", header="(" * 9000), "its header is"
    yield "npz-version", one("'<f4'", "(2,)", bytes(8), version=9), "no array as NumPy"
    yield "npz-not-npy", zipped([("a.npy", bytes(100), {})]), "no array as NumPy"
    yield "npz-header-beyond", zipped([("a.npy", b"\x93NUMPY\1\0\xff\xff{}", {})]), "its header is"
    yield "npz-header-of-4-gb", zipped([("a.npy", b"\x93NUMPY\2\0\xff\xff\xff\xff{}", {})]), "its header is"
    yield "npz-shape-lies", one("'<f4'", "(3,)", bytes(8)), "8 bytes for float32"
    yield "npz-shape-overflows", one("'<f4'", f"({2**32}, {2**32})", bytes(8)), "too large"
    yield "npz-shape-digits", one("'<f4'", "(" + "9" * 5000 + ",)", bytes(8)), "its shape is"
    yield "npz-shape-negative", one("'<f4'", "(-2,)", bytes(8)), "its header is"
    yield "npz-shape-of-100-axes", one("'<f4'", "(" + "1, " * 99 + "2)", bytes(8)), "up to 64 lengths"
    yield "npz-type-lies", one("'<f8'", "(2,)", bytes(8)), "8 bytes for float64"


# PyTorch: pickles by hand.


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def numbers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tensor(
    shape: Sequence[int] = (2,),
    strides: Sequence[int] = (1,),
    offset: int = 0,
    key: str = "0",
    count: int = 2,
    kind: bytes = b"ctorch\nFloatStorage\n",
) -> bytes:
    storage = b"(" + text("storage") + kind + text(key) + text("cpu") + number(count) + b"tQ"
    hooks = named("collections", "OrderedDict") + b")R"
    view = storage + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + hooks
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + view + b"tR"


def mapping(*items: tuple[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in items) + b"u"


def checkpoint(content: bytes, *more: tuple[str, bytes], data: bytes = bytes(8), raw: bool = False) -> bytes:
    pickle = content if raw else b"\x80\x02" + content + b"."
    return zipped([("x/data.pkl", pickle, {}), ("x/data/0", data, {}), *((name, value, {}) for name, value in more)])


def of_pytorch(marker: str) -> Iterator[tuple[str, bytes, str]]:
    good = mapping(("a", tensor()))

    def calls(module: str, name: str, argument: bytes) -> bytes:
        return named(module, name) + argument + b"\x85R"

    touch = f"touch {marker}"
    yield "pt-os-system", checkpoint(calls("os", "system", text(touch))), "calls os.system"
    beside = mapping(("model", good), ("x", calls("posix", "system", text(touch))))
    yield "pt-posix-system", checkpoint(beside), "calls posix.system"
    opened = text(f"open({marker!r}, 'w')")
    yield "pt-eval", checkpoint(calls("__builtin__", "eval", opened)), "calls __builtin__.eval"
    yield "pt-popen", checkpoint(calls("subprocess", "Popen", text(touch))), "calls subprocess.Popen"
    getter = named("builtins", "getattr") + named("builtins", "eval") + text("__call__") + b"\x86R" + opened + b"\x85R"
    yield "pt-getattr", checkpoint(getter), "whole object"
    stack = text("os") + text("system") + b"\x93" + text(touch) + b"\x85R"
    yield "pt-stack-global", checkpoint(b"\x80\x04" + stack + b".", raw=True), "calls os.system"
    yield "pt-object", checkpoint(named("os", "system") + text(touch) + b"\x85\x81"), "whole object"
    yield "pt-build", checkpoint(mapping(("a", named("os", "x") + b")\x81" + text(touch) + b"b"))), "no dict of tensors"
    yield "pt-inst", checkpoint(b"(" + text(touch) + b"ios\nsystem\n"), "opcode b'i' is not allowed"
    yield "pt-obj", checkpoint(b"(" + named("os", "system") + text(touch) + b"o"), "opcode b'o' is not allowed"
    yield "pt-extension", checkpoint(b"\x82\1"), "opcode .* is not allowed"
    yield "pt-text-opcodes", checkpoint(b"I1\n"), "opcode b'I' is not allowed"
    yield "pt-call-of-text", checkpoint(text("os.system") + text(touch) + b"\x85R"), "str is called"
    yield "pt-protocol", checkpoint(b"\x80\x09" + good + b".", raw=True), "protocol"
    yield "pt-no-stop", checkpoint(b"\x80\x02" + good, raw=True), "ends early"
    yield "pt-after-stop", checkpoint(good + b"."), "stops where"
    yield "pt-underflow", checkpoint(b"\x86"), "takes a value where"
    yield "pt-append-to-number", checkpoint(number(1) + number(1) + b"a"), "appended to int"
    yield "pt-odd-items", checkpoint(b"}(" + number(1) + b"u"), "items are set"
    yield "pt-memo-bomb", checkpoint(b"Nr\xff\xff\xff\xff"), "no dict of tensors"
    yield "pt-memo-missing", checkpoint(b"j\xff\xff\xff\xff"), "takes a value where"
    yield "pt-integer-of-2-gb", checkpoint(b"\x8b\xff\xff\xff\x7f"), "an integer of"
    yield "pt-bytes-of-2-63", checkpoint(b"\x8e" + struct.pack("<Q", 2**63)), "ends early"
    yield "pt-text-of-4-gb", checkpoint(b"X\xff\xff\xff\xff"), "ends early"
    yield "pt-text-not-utf-8", checkpoint(b"X\1\0\0\0\xff"), "'utf-8'"
    yield "pt-frame", checkpoint(b"\x95" + struct.pack("<Q", 2**63)), "a frame"
    yield "pt-deep-lists", checkpoint(b"]" * 90_000 + b"a" * 89_999), "no dict of tensors"
    yield "pt-deep-lists-more", checkpoint(b"]" * 1_000_000), "more than 100000"
    yield "pt-deep-marks", checkpoint(b"(" * 1_000_000), "nested deeper"
    yield "pt-deep-key", checkpoint(b"}N" + b"\x85" * 90_000 + b"Ns"), "no dict of tensors"
    doubled = b"}N" + b"q\0h\0\x86" * 20_000 + b"Ns"
    yield "pt-doubled-key", checkpoint(doubled), "no dict of tensors"
    collide = b"".join(number(k * (2**61 - 1)) + b"N" for k in range(1, 30_000))
    yield "pt-keys-that-collide", checkpoint(b"}(" + collide + b"u"), "no dict of tensors"
    # Ten times the same list or dict in each, 100 deep: 10^100 paths.
    same = [b"h" + bytes([level]) for level in range(100)]
    lists = b"]q\0" + b"".join(b"0](" + each * 10 + b"eq" + bytes([level + 1]) for level, each in enumerate(same))
    yield "pt-laughs", checkpoint(lists), "no dict of tensors"
    dicts = b"}q\0"
    for level, each in enumerate(same):
        dicts += b"0}(" + b"".join(text(str(k)) + each for k in range(10)) + b"uq" + bytes([level + 1])
    yield "pt-laughs-of-dicts", checkpoint(dicts), "no dict of tensors"
    yield "pt-holds-itself", checkpoint(b"}q\0" + text("a") + b"h\0s"), "no dict of tensors"
    yield "pt-state-holds-itself", checkpoint(b"}q\0(" + text("a") + tensor() + text("b") + b"h\0u"), "dicts deeper"
    yield "pt-many-opcodes", checkpoint(b"N0" * 500_000), "more than 400000 opcodes"
    long = b"}" + text("a" * 1_000_000) + b"}" + text("b") + tensor() + b"ss"
    yield "pt-long-names", checkpoint(long), "no dict of tensors"
    for name, more, words in (
        ("beyond", {"shape": (3,)}, "reaches to element 3"),
        ("offset-beyond", {"offset": 1}, "reaches to element 3"),
        ("offset-of-2-63", {"offset": 2**63}, "reaches to element"),
        ("offset-negative", {"offset": -1}, "no numbers"),
        ("stride-negative", {"strides": (-1,)}, "other strides"),
        ("stride-of-2-63", {"strides": (2**63,)}, "reaches to element"),
        ("strides-missing", {"strides": ()}, "other strides"),
        ("shape-negative", {"shape": (-2,)}, "lengths from 0"),
        ("shape-overflows", {"shape": (2**32, 2**32), "strides": (0, 0)}, "too large"),
        ("shape-empty-and-large", {"shape": (0, 2**62), "strides": (0, 0)}, "too large"),
        ("shape-repeats", {"shape": (2**28, 2), "strides": (0, 1)}, "elements over a storage"),
        ("shape-of-100-axes", {"shape": (1,) * 100, "strides": (0,) * 100}, "up to 64 lengths"),
        ("count-negative", {"count": -1}, "storage of int numbers"),
        ("count-less", {"count": 1}, "reaches to element 2"),
        ("count-more", {"count": 3}, "8 bytes in 'x/data/0' for 3"),
        ("count-of-2-63", {"count": 2**63}, "8 bytes in 'x/data/0'"),
        ("type-lies", {"kind": named("torch", "DoubleStorage")}, "8 bytes in 'x/data/0' for 2 numbers of 8"),
        ("type-unknown", {"kind": named("torch", "QInt8Storage")}, "not supported: 'a .QInt8Storage.'"),
        ("type-not-of-torch", {"kind": named("os", "system")}, "storage of type os.system"),
        ("record-missing", {"key": "1"}, "'x/data/1' is missing"),
        ("record-of-parent", {"key": "../../x"}, "is missing"),
    ):
        yield f"pt-{name}", checkpoint(mapping(("a", tensor(**more)))), words
    number_tensor = named("torch._utils", "_rebuild_tensor_v2") + b"(" + number(1) * 6 + b"tR"
    yield "pt-tensor-of-number", checkpoint(mapping(("a", number_tensor))), "which is no storage"
    yield "pt-persistent-id", checkpoint(text("x") + b"Q"), "names no storage"
    rebuild = named("torch._tensor", "_rebuild_from_type_v2")
    arguments = b")q\0" + (b"0(" + rebuild + named("torch", "Tensor") + b"h\0Ntq\0") * 10_000
    yield "pt-rebuild-nested", checkpoint(arguments + b"0" + rebuild + b"h\0R"), "no dict of tensors|whole object"
    damaged = checkpoint(good).replace(b"x/data/0" + bytes(8), b"x/data/0" + bytes(7) + b"\1")
    yield "pt-record-damaged", damaged, "checksum"
    yield "pt-byteorder", checkpoint(good, ("x/byteorder", b"middle")), "little or big"
    yield "pt-two-pickles", checkpoint(good, ("y/data.pkl", b"\x80\x02N.")), "one record data.pkl"
    yield "pt-torchscript", checkpoint(good, ("x/constants.pkl", b"\x80\x02)."), ("x/code/a.py", b"")), "TorchScript"
    yield "pt-two-state-dicts", checkpoint(mapping(("model", good), ("ema", good))), "key='model'.*key='ema'"
    yield "pt-nothing", checkpoint(b"N"), "no dict of tensors"
    yield "pt-old", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "before 1.6"
    yield "pt-plain-pickle", b"\x80\x04" + calls("os", "system", text(touch)) + b".", "is a pickle"


def of_others() -> Iterator[tuple[str, bytes, str]]:
    yield "text", b"hello, world, this is text\n", "begins with"
    yield "gguf", b"GGUF" + bytes(100), "begins with"
    yield "npy-alone", F4, "begins with"
    yield "onnx-length-beyond", b"\x08\x08\x3a\xff\xff\xff\xff\x7f", "begins with"
    yield "onnx-varint-without-end", b"\x08" + b"\xff" * 100, "begins with"
    yield "onnx-many-fields", b"\x08\x08" * 200_000, "begins with"


def files(folder: Path, marker: str) -> Iterator[tuple[str, str]]:
    """Write all files; their paths, and the words of their errors as a regular expression."""
    for made in (of_safetensors(), of_zip(), of_npz(), of_pytorch(marker), of_others()):
        for name, data, words in made:
            path = folder / name
            assert not path.exists(), name
            path.write_bytes(data)
            yield str(path), words
    yield from folders(folder)


def folders(folder: Path) -> Iterator[tuple[str, str]]:
    """Write folders as of Hugging Face, and things that are no plain files."""
    secret = folder / "secret.safetensors"
    secret.write_bytes(safetensors({"a": entry([2], 0, 8)}, bytes(8)))
    good = secret.read_bytes()

    def make(name: str, **content: Any) -> Path:
        path = folder / name
        path.mkdir()
        for file, value in {"config.json": {}, "model.safetensors": good, **content}.items():
            if isinstance(value, Path):
                os.symlink(value, path / file)
            elif value is not None:
                (path / file).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
        return path

    def index(places: Any) -> dict[str, Any]:
        return {"model.safetensors": None, "model.safetensors.index.json": {"weight_map": places}}

    shards = {"s1.safetensors": good, "s2.safetensors": good}
    for name, content, words in (
        ("empty", {"config.json": None, "model.safetensors": None}, "config.json: is missing"),
        ("no-weights", {"model.safetensors": None, "pytorch_model.bin": b""}, "save_pretrained"),
        ("link", {"model.safetensors": secret}, "is a link"),
        ("link-relative", {"model.safetensors": Path("..") / secret.name}, "is a link"),
        ("link-config", {"config.json": Path("/etc/hostname")}, "is a link"),
        ("link-nowhere", {"config.json": Path("/nowhere")}, "is a link"),
        ("link-tokenizer", {"tokenizer.json": Path("/etc/hostname")}, "is a link"),
        ("parent", index({"a": f"../{secret.name}"}), "should name safetensors files"),
        ("absolute", index({"a": str(secret)}), "should name safetensors files"),
        ("number", index({"a": 3}), "should name safetensors files"),
        ("no-map", index([]), "should have a weight_map"),
        ("shard-missing", index({"a": "s1.safetensors"}), "s1.safetensors: is missing"),
        ("shard-link", {**index({"a": "s1.safetensors"}), "s1.safetensors": secret}, "is a link"),
        ("shards-of-same", {**index({"a": "s1.safetensors", "b": "s2.safetensors"}), **shards}, "in another shard"),
        ("shards-other", {**index({"a": "s1.safetensors", "b": "s1.safetensors"}), **shards}, "in no shard"),
        ("shards-not-named", {**index({"b": "s1.safetensors"}), **shards}, "does not say"),
        ("config-deep", {"config.json": b"[" * 1_000_000}, "config.json: "),
        ("config-deep-object", {"config.json": b'{"a":' * 100_000}, "config.json: "),
        ("config-a-list", {"config.json": []}, "should be an object"),
        ("config-twice", {"config.json": b'{"a": 1, "a": 2}'}, "appears twice"),
        ("config-not-json", {"config.json": b"\xff\xfe"}, "config.json: "),
        ("config-large", {"config.json": b" " * (3 << 20)}, "are more than"),
        ("config-wide", {"config.json": b"[" + b"{}," * 300_000 + b"{}]"}, "should be an object"),
        ("digits", {"config.json": b'{"a": ' + b"9" * 1_000_000 + b"}"}, "config.json: "),
    ):
        yield str(make(f"folder-{name}", **content)), words
    os.mkfifo(folder / "fifo")
    yield str(folder / "fifo"), "no plain file|not a plain file"
    path = make("folder-fifo", **{"model.safetensors": None})
    os.mkfifo(path / "model.safetensors")
    yield str(path), "not a plain file"
    path = make("folder-folder", **{"config.json": None})
    (path / "config.json").mkdir()
    yield str(path), "not a plain file"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for made, expected in files(target, str(target / "marker")):
        print(made, expected)
