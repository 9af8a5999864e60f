"""ONNX: the graph of a model as plain values, read by the package onnx, the extra ``fastseq[onnx]``.

Data beside the model are read from files in its folder alone: a place with ``..``, an absolute one and a symbolic link
that leaves the folder are refused. No tensor takes more memory than the bytes that stand for it, in the file or beside
it, and no byte stands for two. Nothing here knows what an operator computes.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Mapping, Set
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.formats.contents import Contents

_BFLOAT16 = "BFLOAT16"
# Types of tensors: what NumPy has for the bytes, and the field that has them where they are not bytes.
_TYPES = {
    "FLOAT": ("<f4", "float_data"),
    "DOUBLE": ("<f8", "double_data"),
    "FLOAT16": ("<f2", "int32_data"),
    _BFLOAT16: ("<u2", "int32_data"),
    "INT8": ("<i1", "int32_data"),
    "INT16": ("<i2", "int32_data"),
    "INT32": ("<i4", "int32_data"),
    "INT64": ("<i8", "int64_data"),
    "UINT8": ("<u1", "int32_data"),
    "UINT16": ("<u2", "int32_data"),
    "UINT32": ("<u4", "uint64_data"),
    "UINT64": ("<u8", "uint64_data"),
    "BOOL": ("|b1", "int32_data"),
}
_BITS = ("FLOAT16", _BFLOAT16)  # whose field has bits


@dataclass(frozen=True)
class Unread:
    """A tensor or an attribute that is not read: of a type that no layer takes."""

    kind: str


@dataclass(frozen=True)
class Value:
    """An input, an output or another value of a graph, as far as it is declared.

    `dtype` is ONNX's name of the element type, "" where it is no tensor or not declared; an axis of `shape` is a
    number, a name, or None.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Node:
    """An operator of a graph: an attribute is a number, a string, an array, a list of them, a `Graph`, or `Unread`."""

    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]  # "" where an optional one is left out
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Graph:
    """A graph, whose nodes come after those whose results they take."""

    name: str
    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    values: Mapping[str, Value]
    initialisers: Mapping[str, Array]
    unread: Mapping[str, Unread]  # initialisers that are not read


class _Fault(Exception):
    """Something in a file that is not read; its message has the place."""


def read(path: str | os.PathLike[str]) -> Contents:
    """Read an ONNX model.

    Parameters
    ----------
    path : path
        The model; data beside it are in its folder.

    Returns
    -------
    contents : Contents
        `arrays` are the initialisers; half precision comes as float32. The description has "graph" (a `Graph`),
        "opsets" (version by domain; that of ONNX's own operators is ""), "functions" (names of those that the model
        defines), "ir_version", "producer", "metadata", and "stored" (the type of each array).

    Raises
    ------
    ValueError
        Naming the file, the place in it and what is wrong.
    ImportError
        The package onnx is not installed.
    OSError
        The file cannot be opened.
    """
    name = checks.path("path", path)
    onnx = _library()
    try:
        model = onnx.ModelProto()
        try:
            model.ParseFromString(_bytes(name))
        except Exception as error:  # of protobuf, whose classes differ from one implementation to another
            if isinstance(error, OSError | _Fault | MemoryError):
                raise
            raise _Fault(f"the whole: it is no ONNX model: {_said(error)}") from None
        if not model.HasField("graph") or not model.opset_import:
            raise _Fault("the whole: it is no ONNX model: it has no graph, or no version of its operators")
        _check_text(model, "the whole")
        reader = _Reader(onnx, os.path.dirname(os.path.abspath(name)))
        graph = reader.graph(model.graph, "graph", set())
        opsets: dict[str, int] = {}
        for one in model.opset_import:
            domain = "" if one.domain == "ai.onnx" else one.domain
            if domain in opsets:
                raise _Fault(f"opset_import: {domain!r} stands there twice")
            opsets[domain] = one.version
    except _Fault as fault:
        raise ValueError(f"{name}: {fault}") from None
    description = {
        "graph": graph,
        "opsets": opsets,
        "functions": [one.name for one in model.functions],
        "ir_version": model.ir_version,
        "producer": model.producer_name,
        "metadata": {one.key: one.value for one in model.metadata_props},
        "stored": {tensor.name: reader.type_name(tensor.data_type) for tensor in model.graph.initializer},
    }
    return Contents("onnx", graph.initialisers, description)


def _library() -> ModuleType:
    try:
        import onnx
    except ImportError:
        raise ImportError(
            "fastseq reads ONNX files with the package onnx, which is not installed: pip install 'fastseq[onnx]'"
        ) from None
    module: ModuleType = onnx
    return module


def _bytes(name: str) -> bytes:
    with open(name, "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise _Fault("the whole: it is no regular file")
        return file.read(about.st_size)


def _check_text(message: Any, place: str) -> None:
    """Raise a fault where a field that should be text is none: such a field comes as bytes."""
    for field, value in message.ListFields():
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        here = f"{place}.{field.name}"
        for one in [value] if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value:
            if field.type == field.TYPE_MESSAGE:
                _check_text(one, here)
            elif not isinstance(one, str):
                raise _Fault(f"{here}: it is no text: {one!r:.80}")


class _Reader:
    """Turns protocol buffers into plain values."""

    def __init__(self, onnx: ModuleType, folder: str) -> None:
        self._onnx, self._folder = onnx, folder
        self._read: dict[str, int] = {}  # bytes read of each file beside the model

    def graph(self, proto: Any, place: str, outer: Set[str]) -> Graph:
        """Return a graph; `outer` are the names that the graph around it has."""
        initialisers: dict[str, Array] = {}
        unread: dict[str, Unread] = {}
        for tensor in proto.initializer:
            here = f"{place}.initializer {tensor.name!r}"
            if tensor.name in initialisers or tensor.name in unread:
                raise _Fault(f"{here}: there are two of this name")
            array = self.tensor(tensor, here)
            if isinstance(array, Unread):
                unread[tensor.name] = array
            else:
                initialisers[tensor.name] = array
        unread |= {one.values.name: Unread("a sparse tensor") for one in proto.sparse_initializer}
        inputs = self._values(proto.input, f"{place}.input")
        own = {*initialisers, *unread, *inputs}
        known = {*outer, *own}
        nodes = []
        for number, one in enumerate(proto.node):
            here = f"{place}.node {number} ({one.op_type} {one.name!r})"
            nodes.append(self._node(one, here, known))
            new = [name for name in one.output if name]
            if len(set(new)) < len(new) or not own.isdisjoint(new):
                raise _Fault(f"{here}: it gives a name that is there already")
            own.update(new)
            known.update(new)
        outputs = self._values(proto.output, f"{place}.output")
        missing = [name for name in outputs if name not in known]
        if missing:
            raise _Fault(f"{place}.output: no node gives {', '.join(missing)}")
        return Graph(
            proto.name,
            tuple(nodes),
            tuple(inputs.values()),
            tuple(outputs.values()),
            self._values(proto.value_info, f"{place}.value_info"),
            initialisers,
            unread,
        )

    def _node(self, proto: Any, place: str, known: Set[str]) -> Node:
        missing = [name for name in proto.input if name and name not in known]
        if missing:
            raise _Fault(f"{place}: no node before it gives {', '.join(missing)}")
        attributes: dict[str, Any] = {}
        for one in proto.attribute:
            if one.name in attributes:
                raise _Fault(f"{place}: there are two attributes {one.name!r}")
            attributes[one.name] = self._attribute(one, f"{place}.{one.name}", known)
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        return Node(proto.name, proto.op_type, domain, tuple(proto.input), tuple(proto.output), attributes)

    def _attribute(self, proto: Any, place: str, known: Set[str]) -> Any:
        kind = self._onnx.AttributeProto.AttributeType.Name(proto.type) if proto.type in _KINDS else str(proto.type)
        if proto.ref_attr_name or kind not in _KINDS.values():
            return Unread(f"an attribute of the kind {kind}")
        if kind == "TENSOR":
            return self.tensor(proto.t, place)
        if kind == "GRAPH":
            return self.graph(proto.g, place, known)
        try:
            if kind == "STRING":
                return proto.s.decode()
            if kind == "STRINGS":
                return [one.decode() for one in proto.strings]
        except UnicodeDecodeError as error:
            raise _Fault(f"{place}: it is no text: {error}") from None
        return {"FLOAT": proto.f, "INT": proto.i, "FLOATS": list(proto.floats), "INTS": list(proto.ints)}[kind]

    def _values(self, protos: Any, place: str) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for one in protos:
            if one.name in found:
                raise _Fault(f"{place}: there are two of the name {one.name!r}")
            dtype, shape = "", None
            if one.HasField("type") and one.type.HasField("tensor_type"):
                tensor = one.type.tensor_type
                dtype = self.type_name(tensor.elem_type) if tensor.elem_type else ""
                if tensor.HasField("shape"):
                    shape = tuple(_axis(axis) for axis in tensor.shape.dim)
            found[one.name] = Value(one.name, dtype, shape)
        return found

    def type_name(self, number: int) -> str:
        """Return ONNX's name of an element type."""
        try:
            return str(self._onnx.TensorProto.DataType.Name(number))
        except ValueError:
            return f"type {number}"

    def tensor(self, proto: Any, place: str) -> Array | Unread:
        """Return an array whose bytes are there."""
        name = self.type_name(proto.data_type)
        if name not in _TYPES:
            return Unread(f"a tensor of {name}")
        if proto.HasField("segment"):
            raise _Fault(f"{place}: it is in segments, which are not supported")
        dtype, field = np.dtype(_TYPES[name][0]), _TYPES[name][1]
        shape = tuple(proto.dims)
        if any(size < 0 for size in shape) or len(shape) > 32:
            raise _Fault(f"{place}: its shape {shape!s:.200} has a size below 0, or too many axes")
        count = math.prod(shape)
        if proto.data_location == self._onnx.TensorProto.EXTERNAL:
            data: Any = self._external(proto, place, count * dtype.itemsize)
        elif proto.HasField("raw_data"):
            data = proto.raw_data
        else:
            values = getattr(proto, field)
            if len(values) != count:
                raise _Fault(f"{place}: {shape} are {count} values, and it has {len(values)}")
            return _shaped(_widened(self._of_field(values, name, dtype, place), name), shape, place)
        if len(data) != count * dtype.itemsize:
            raise _Fault(f"{place}: {shape} of {name} are {count * dtype.itemsize} bytes, and it has {len(data)}")
        return _shaped(_widened(np.frombuffer(data, dtype), name), shape, place)

    @staticmethod
    def _of_field(values: Any, name: str, dtype: np.dtype[Any], place: str) -> Array:
        """Return the values of a field in the type that they stand for."""
        if dtype.kind == "f" and name not in _BITS:
            return np.array(values, dtype)
        wide = np.array(values, np.uint64 if dtype.kind == "u" and dtype.itemsize > 2 else np.int64)
        narrow = np.dtype("<u2") if name in _BITS else dtype
        made = wide.astype(narrow)
        if (made.astype(wide.dtype) != wide).any():
            raise _Fault(f"{place}: it has a value that is none of {name}")
        return made.view(dtype) if name in _BITS else made

    def _external(self, proto: Any, place: str, size: int) -> bytes:
        """Return the bytes of a tensor from a file in the folder of the model."""
        keys = [one.key for one in proto.external_data]
        given = {one.key: one.value for one in proto.external_data}
        location = given.get("location", "")
        if len(keys) != len(given) or not location:
            raise _Fault(f"{place}: external_data should have one location, and nothing twice")
        numbers = {"offset": 0, "length": size}
        for key in numbers:
            if not re.fullmatch("[0-9]{1,19}", text := given.get(key, "0")):
                raise _Fault(f"{place}: the {key} of external data should be a number, not {text!r:.80}")
            numbers[key] = int(text) if key in given else numbers[key]
        if numbers["length"] != size:
            raise _Fault(f"{place}: it is of {size} bytes, and the length of its external data is {numbers['length']}")
        path = self._inside(location, place)
        try:
            file = open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
        except OSError as error:
            raise _Fault(f"{place}: the file {location!r:.200} beside the model cannot be opened: {error}") from None
        with file:
            about = os.fstat(file.fileno())
            used = self._read.get(path, 0) + size
            if not stat.S_ISREG(about.st_mode):
                raise _Fault(f"{place}: {location!r:.200} is no regular file")
            if numbers["offset"] + size > about.st_size:
                raise _Fault(
                    f"{place}: {size} bytes from {numbers['offset']} on are more than {location!r:.200} has,"
                    f" {about.st_size}"
                )
            if used > about.st_size:
                raise _Fault(f"{place}: tensors overlap in {location!r:.200}")
            self._read[path] = used
            file.seek(numbers["offset"])
            data = file.read(size)
        if len(data) != size:
            raise _Fault(f"{place}: {location!r:.200} ended while it was read")
        return data

    def _inside(self, location: str, place: str) -> str:
        """Return the path of a file in the folder of the model, all links resolved."""
        parts = re.split(r"[/\\]", location)
        outside = os.path.isabs(location) or ".." in parts or "\0" in location or re.match(r"[A-Za-z]:", location)
        folder = os.path.realpath(self._folder)
        path = "" if outside else os.path.realpath(os.path.join(self._folder, location))
        if outside or os.path.commonpath([folder, path]) != folder:
            raise _Fault(f"{place}: its external data {location!r:.200} are outside the folder of the model")
        return path


# Attributes that are read; numbers of AttributeProto.AttributeType.
_KINDS = {1: "FLOAT", 2: "INT", 3: "STRING", 4: "TENSOR", 5: "GRAPH", 6: "FLOATS", 7: "INTS", 8: "STRINGS"}


def _widened(array: Array, name: str) -> Array:
    """Return an array in the machine's order of bytes, and half precision as float32."""
    if name == _BFLOAT16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32 if name == "FLOAT16" else array.dtype.newbyteorder("="), copy=False)


def _shaped(array: Array, shape: tuple[int, ...], place: str) -> Array:
    try:
        return array.reshape(shape)
    except ValueError as error:  # of no elements, and an axis that NumPy has no number for
        raise _Fault(f"{place}: {error}") from None


def _axis(proto: Any) -> int | str | None:
    if proto.HasField("dim_value"):
        return int(proto.dim_value)
    return str(proto.dim_param) or None


def _said(error: BaseException) -> str:
    """Return the message of an error, in one line of moderate length."""
    return re.sub(r"\s+", " ", str(error))[:300] or type(error).__name__
