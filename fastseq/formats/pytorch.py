"""PyTorch's checkpoints: a zip file with a pickle that describes tensors, and a record for each of their storages.

The pickle is read by `fastseq.formats.pickles`, which makes no objects: a checkpoint may hold an optimiser or a
configuration of any class beside the tensors, and none of its code is imported or run.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from fastseq.checks import Array
from fastseq.formats.archive import ALWAYS_FINE, MAX_GROWTH, Archive
from fastseq.formats.contents import Contents
from fastseq.formats.pickles import Global, Opaque, interpreted, key_of, kind_of
from fastseq.formats.source import TYPES, LazyArrays, Source, count_of, decoded, listed, short

_MAX_PICKLE = 64 << 20  # bytes
_MAX_DEPTH = 8  # of dicts in dicts
_MAX_NAMES = 50_000
_MAX_NAME = 1000
_MAX_DICTS = 10_000
_MAX_PLAIN = 100_000  # values besides the tensors that the description has
_STORAGES = {
    "BoolStorage": "bool",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_UNTYPED = "UntypedStorage"
_MAPPINGS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict")
_TENSOR_CLASSES = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
# A call of these is no object beside the weights: whoever wrote the file wants something to run.
_CODE_MODULES = ("os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "importlib", "runpy", "pty", "ctypes")
_CODE_BUILTINS = ("eval", "exec", "compile", "open", "__import__", "input", "breakpoint")
_SAVE_ANEW = "load it with PyTorch and save its state dict: torch.save({}, new_path)"
_OLD_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


@dataclass(frozen=True)
class _Storage:
    """A record of numbers; `type` is None where it has none, or one of no use here, which `named` tells."""

    key: str
    count: int
    named: str
    type: str | None


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage; offset and strides count elements."""

    storage: _Storage
    type: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __str__(self) -> str:
        return f"a tensor of {self.type}, {self.shape}"


class _Unread(Opaque):
    """A tensor of a kind that is not supported."""

    def __str__(self) -> str:
        return f"a tensor of {self.what}, which is not supported"


def read(path: str | os.PathLike[str], *, key: str | None = None) -> Contents:
    """Read the state dict of a file of `torch.save`.

    Parameters
    ----------
    path : path
    key : str, optional
        Where in the file the state dict is, as ``"model"`` or ``"nets/encoder"``; ``""`` is everything in the file.
        It is needed where several dicts hold weights.

    Returns
    -------
    Contents
        The names of dicts in the state dict are joined with dots. Its ``description["key"]`` says where the state dict
        was, ``description["beside"]`` what else the file holds.

    Raises
    ------
    ValueError
        The file is damaged, holds several state dicts or none, or tensors that are not supported.
    OSError
        The file cannot be read.
    """
    _refuse_old(Source(path))
    archive = Archive(path)
    prefix = _prefix(archive)
    order = _byte_order(archive, prefix)
    place = f"{prefix}/data.pkl"
    pickle = archive.read(place, _MAX_PICKLE)
    content = interpreted(archive.source, place, pickle, _call, _load_storage)
    place_of_dict, chosen = _state_dict(archive.source, content, key)
    flat = dict(_flattened(archive.source, chosen))
    unread = [f"{name} ({value.what})" for name, value in flat.items() if isinstance(value, _Unread)]
    if unread:
        raise archive.source.fault(place, f"tensors of types that are not supported: {listed(unread)}")
    tensors = {name: value for name, value in flat.items() if isinstance(value, _Tensor)}
    return Contents(
        "pytorch",
        LazyArrays(_readers(archive, prefix, order, tensors)),
        {
            "key": place_of_dict,
            "byteorder": order,
            "beside": {} if chosen is content else _plain(content, chosen),
            "tensors": {name: {"type": tensor.type, "shape": tensor.shape} for name, tensor in tensors.items()},
        },
    )


def _refuse_old(source: Source) -> None:
    """Refuse what `torch.save` wrote before PyTorch 1.6, and other pickles."""
    start = source.read("the file", 0, min(source.size, len(_OLD_MAGIC)))
    if start == _OLD_MAGIC:
        how = _SAVE_ANEW.format("torch.load(path, map_location='cpu')")
        raise source.fault("the file", f"has the format of PyTorch before 1.6, which is not read; {how}")
    if start[:1] == b"\x80":
        raise source.fault("the file", "is a pickle, which is not read; write its arrays with numpy.savez")


def _prefix(archive: Archive) -> str:
    """The folder in the archive that everything is in."""
    found = [name.removesuffix("/data.pkl") for name in archive.records if name.endswith("/data.pkl")]
    found = [prefix for prefix in found if "/" not in prefix]
    if len(found) != 1:
        raise archive.source.fault("zip directory", "should have one record data.pkl, as torch.save writes it")
    prefix = found[0]
    if any(name == f"{prefix}/constants.pkl" or name.startswith(f"{prefix}/code/") for name in archive.records):
        how = _SAVE_ANEW.format("torch.jit.load(path).state_dict()")
        raise archive.source.fault("zip directory", f"is a TorchScript archive, which is a program; {how}")
    return prefix


def _byte_order(archive: Archive, prefix: str) -> str:
    """Of the numbers in the records: "little" or "big"."""
    name = f"{prefix}/byteorder"
    if name not in archive.records:
        return "little"
    text = archive.read(name, 100)
    if text not in (b"little", b"big"):
        raise archive.source.fault(name, f"should be little or big, not {short(text)}")
    return text.decode()


# What the pickle calls.


def _call(function: Global, arguments: tuple[Any, ...]) -> Any:
    """The value of a call: that of the few functions that tensors are made by, and nothing of all others."""
    module, name = function.module.replace("__builtin__", "builtins"), function.name
    top = module.partition(".")[0]
    if top in _CODE_MODULES or (top == "builtins" and name in _CODE_BUILTINS):
        raise ValueError(f"calls {function}: the file would run code where it is unpickled; nothing was run")
    whole = f"{module}.{name}"
    if whole in _MAPPINGS:
        return _mapping(arguments[1:] if name == "defaultdict" else arguments)
    if whole == "torch.Size" and len(arguments) == 1 and isinstance(arguments[0], tuple | list):
        return tuple(arguments[0])
    if module == "torch._utils" and name.startswith("_rebuild"):
        return _rebuilt(name, arguments)
    if whole == "torch._tensor._rebuild_from_type_v2" and len(arguments) == 4:
        rebuild, cls, inner, _ = arguments
        plain = isinstance(cls, Global) and str(cls) in _TENSOR_CLASSES
        if plain and isinstance(rebuild, Global) and rebuild.module == "torch._utils" and isinstance(inner, tuple):
            return _rebuilt(rebuild.name, inner)
        return _Unread(f"the class {kind_of(cls)}")
    return Opaque(function)


def _mapping(arguments: tuple[Any, ...]) -> Any:
    """A dict of what `OrderedDict` is called with: nothing, a dict or pairs."""
    if not arguments:
        return {}
    items = arguments[0]
    if isinstance(items, dict):
        return dict(items)
    if not isinstance(items, list | tuple) or not all(isinstance(i, list | tuple) and len(i) == 2 for i in items):
        return Opaque("a dict")
    return {key_of(key): value for key, value in items}


def _rebuilt(name: str, arguments: tuple[Any, ...]) -> Any:
    """The tensor that a function of `torch._utils` makes."""
    if name in ("_rebuild_parameter", "_rebuild_parameter_with_state") and arguments:
        return arguments[0]
    if name == "_rebuild_tensor" and len(arguments) == 4:
        return _tensor(arguments)
    if name == "_rebuild_tensor_v2" and len(arguments) in (6, 7):
        return _tensor(arguments[:4], metadata=arguments[6:])
    if name == "_rebuild_tensor_v3" and len(arguments) in (7, 8):
        return _tensor(arguments[:4], dtype=arguments[6], metadata=arguments[7:])
    return _Unread(f"torch._utils.{name}")


def _tensor(view: tuple[Any, ...], dtype: Any = None, metadata: tuple[Any, ...] = ()) -> _Tensor | _Unread:
    storage, offset, shape, strides = view
    if not isinstance(storage, _Storage):
        raise ValueError(f"a tensor of {kind_of(storage)}, which is no storage")
    if dtype is not None and not isinstance(dtype, Global):
        raise ValueError(f"a tensor of the dtype {kind_of(dtype)}")
    name = storage.type if dtype is None else dtype.name
    if name not in TYPES or (dtype is not None and storage.type not in (None, name)):
        return _Unread(storage.named if dtype is None else str(dtype))
    if metadata and metadata[0]:
        return _Unread("a view that is to be conjugated or negated")
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor whose offset, shape and strides are no numbers")
    if len(shape) != len(strides) or any(type(stride) is not int or stride < 0 for stride in strides):
        raise ValueError(f"a tensor of {len(shape)} axes with other strides")
    itemsize = np.dtype(TYPES[name]).itemsize
    elements, size = count_of(shape, itemsize), storage.count // (1 if storage.named != _UNTYPED else itemsize)
    end = offset + 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if elements and end > size:
        raise ValueError(f"a tensor that reaches to element {end} of a storage of {size}")
    if elements > max(MAX_GROWTH * size, ALWAYS_FINE):
        raise ValueError(f"a tensor of {elements} elements over a storage of {size}")
    return _Tensor(storage, name, offset, shape, strides)


def _load_storage(persistent: Any) -> _Storage:
    """The storage that a persistent id names. On which device it was does not matter."""
    if not isinstance(persistent, tuple) or len(persistent) != 5 or persistent[0] != "storage":
        raise ValueError("a persistent id that names no storage")
    _, kind, key, _, count = persistent
    if not isinstance(kind, Global) or kind.module.partition(".")[0] != "torch" or not isinstance(key, str):
        raise ValueError(f"a storage of type {kind_of(kind)}")
    if type(count) is not int or count < 0:
        raise ValueError(f"a storage of {kind_of(count)} numbers")
    return _Storage(key, count, kind.name, _STORAGES.get(kind.name))


# Where the state dict is.


def _state_dict(source: Source, content: Any, key: str | None) -> tuple[str, Any]:
    """Where the state dict is, and the dict."""
    if isinstance(content, Opaque):
        whole = "holds a whole object, not a state dict"
        raise source.fault("data.pkl", f"{whole}: {content}; " + _SAVE_ANEW.format("model.state_dict()"))
    dicts = dict(_dicts(source, content))
    if key is not None:
        if key not in dicts:
            raise source.fault("data.pkl", f"nothing is at key={short(key)}; there are {listed(list(dicts))}")
        return key, dicts[key]
    of_model = {name: _values(found) for name, found in dicts.items() if "optim" not in name.lower()}
    tensors = {name: sum(isinstance(value, _Tensor | _Unread) for value in values) for name, values in of_model.items()}
    candidates = [name for name in tensors if any(map(_is_weight, of_model[name]))]
    candidates = candidates or [name for name, count in tensors.items() if count]
    if len(candidates) == 1:
        return candidates[0], dicts[candidates[0]]
    if candidates:
        found = ", ".join(f"key={short(name)} ({tensors[name]} tensors)" for name in candidates[:20])
        rest = "" if "" in candidates else "; key='' reads all"
        raise source.fault("data.pkl", f"{len(candidates)} dicts of tensors; say which: {found}{rest}")
    held = f"a dict with {listed(list(map(str, content)))}" if isinstance(content, dict) else _described(content)
    how = _SAVE_ANEW.format("model.state_dict()")
    raise source.fault("data.pkl", f"holds no dict of tensors, but {held}; {how}")


def _dicts(source: Source, content: Any) -> Iterator[tuple[str, Any]]:
    """Dicts and lists in what a file holds that may have tensors in them, by where they are, each once."""
    waiting = [("", content, 0)]
    seen = {id(content)}
    for place, value, depth in waiting:
        if not isinstance(value, dict | list | tuple):
            return
        if len(waiting) > _MAX_DICTS:
            raise source.fault("data.pkl", f"holds more than {_MAX_DICTS} dicts of dicts or tensors")
        yield place, value
        for name, inner in _items(value):
            if id(inner) in seen or not isinstance(name, str) or len(name) > _MAX_NAME or depth == _MAX_DEPTH:
                continue
            if isinstance(inner, dict | list | tuple) and any(map(_may_hold_tensors, _values(inner))):
                seen.add(id(inner))
                waiting.append((f"{place}/{name}" if place else name, inner, depth + 1))


def _may_hold_tensors(value: Any) -> bool:
    return isinstance(value, dict | list | tuple | _Tensor | _Unread)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Names and values of a dict; those of a list are numbers."""
    if isinstance(value, dict):
        yield from value.items()
    else:
        yield from ((str(index), inner) for index, inner in enumerate(value))


def _values(value: Any) -> list[Any]:
    return list(value.values() if isinstance(value, dict) else value)


def _is_weight(value: Any) -> bool:
    """Whether it is one of reals with an axis: not a count, a loss, or the state of a random generator."""
    if isinstance(value, _Tensor):
        return len(value.shape) > 0 and "float" in value.type
    return isinstance(value, _Unread)


def _flattened(source: Source, chosen: Any) -> Iterator[tuple[str, Any]]:
    """The tensors, and what is no dict, of a state dict, by their names joined with dots."""
    waiting: list[tuple[str, Any, int]] = [("", chosen, 0)]
    names: set[str] = set()
    for prefix, value, depth in waiting:
        if depth > _MAX_DEPTH or len(names) > _MAX_NAMES or len(waiting) > _MAX_NAMES:
            raise source.fault("data.pkl", f"has dicts deeper than {_MAX_DEPTH}, or more than {_MAX_NAMES} names")
        for key, inner in _items(value):
            name = f"{prefix}{key}"
            if len(name) > _MAX_NAME:
                raise source.fault("data.pkl", f"a name of more than {_MAX_NAME} characters: {short(name)}")
            if isinstance(inner, dict | list | tuple):
                waiting.append((f"{name}.", inner, depth + 1))
                continue
            if name in names:
                raise source.fault("data.pkl", f"two values have the name {short(name)}")
            names.add(name)
            yield name, inner


def _plain(content: Any, chosen: Any) -> Any:
    """What a file holds except the state dict as plain values; tensors and objects are described."""
    left = _MAX_PLAIN

    def plain(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if value is chosen:
            return "the state dict"
        if isinstance(value, str | int | float | None):
            return value
        inside = value.state if isinstance(value, Opaque) else value
        if not isinstance(inside, dict | list | tuple):
            return _described(value)
        if depth == _MAX_DEPTH or left < len(inside):
            return f"{kind_of(value)} of {len(inside)}"
        if not isinstance(inside, dict):
            return [plain(inner, depth + 1) for inner in inside]
        items = {key if isinstance(key, str | int) else str(key): plain(v, depth + 1) for key, v in inside.items()}
        return {"class": str(value.what), **items} if isinstance(value, Opaque) else items

    return plain(content, 0)


def _described(value: Any) -> str:
    return str(value) if isinstance(value, _Tensor) else kind_of(value)


# Reading of tensors.


def _readers(
    archive: Archive, prefix: str, order: str, tensors: Mapping[str, _Tensor]
) -> dict[str, Callable[[], Array]]:
    """What reads each tensor; a storage that several of them view is read once and kept."""
    storages = {}
    uses = Counter(tensor.storage.key for tensor in tensors.values())
    for name, tensor in tensors.items():
        storage, record = tensor.storage, f"{prefix}/data/{tensor.storage.key}"
        if record not in archive.records:
            raise archive.source.fault(short(name), f"its record {short(record)} is missing")
        itemsize = 1 if storage.type is None else np.dtype(TYPES[storage.type]).itemsize
        size = archive.records[record].size
        if not 0 <= size - storage.count * itemsize < itemsize:
            raise archive.source.fault(
                short(name), f"{size} bytes in {short(record)} for {storage.count} numbers of {itemsize} bytes"
            )
        kept = uses[storage.key] > 1
        storages[storage.key, tensor.type] = _Numbers(archive, record, tensor.type, order, kept)
    return {name: partial(_view, storages[t.storage.key, t.type], t) for name, t in tensors.items()}


class _Numbers:
    """The numbers of a storage, decoded; kept where they are to be."""

    def __init__(self, archive: Archive, record: str, type: str, order: str, kept: bool) -> None:
        self._archive, self._record, self._type, self._kept = archive, record, type, kept
        self._dtype = np.dtype(TYPES[type]).newbyteorder("<" if order == "little" else ">")
        self._numbers: Array | None = None

    def __call__(self) -> Array:
        if self._numbers is not None:
            return self._numbers
        octets = self._archive.array(self._record, np.dtype(np.uint8), 0, self._archive.records[self._record].size)
        whole = octets[: len(octets) // self._dtype.itemsize * self._dtype.itemsize]
        numbers = decoded(whole.view(self._dtype), self._type)
        if self._kept:
            self._numbers = numbers
        return numbers


def _view(numbers: _Numbers, tensor: _Tensor) -> Array:
    """The tensor as a view that cannot be written to: its elements may overlap."""
    flat = numbers()
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, flat.dtype)
    strides = [
        stride * flat.itemsize if length > 1 else 0 for length, stride in zip(tensor.shape, tensor.strides, strict=True)
    ]
    return as_strided(flat[tensor.offset :], tensor.shape, strides, writeable=False)
