"""Keras: layers and their conventions, onto layers here; the files are read by `fastseq.formats.keras`.

Conventions, from the sources of Keras 3.15 (``keras/src/layers/rnn``) and, for those of CuDNN, of Keras 2.2
(``keras/engine/saving.py``, ``preprocess_weights_for_loading``):

============  =====================  ==========================================================================
class         gates, in columns      biases
============  =====================  ==========================================================================
SimpleRNN     h                      (H,)
LSTM          i f c o                (4H,)
GRU           z r h                  ``reset_after`` (2, 3H): of the inputs, of the state; otherwise (3H,)
CuDNNLSTM     i f c o                (8H,): of the inputs, of the state
CuDNNGRU      z r h                  (6H,): of the inputs, of the state; the reset is after the product
============  =====================  ==========================================================================

A kernel is (I, gates H), the transpose of PyTorch's; of the CuDNN classes each gate's kernel (I, H) has the bytes of
its transpose (H, I), and each gate's recurrent kernel is transposed. Cells have ``z h + (1 - z) hh``, as PyTorch's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fastseq import layers
from fastseq.checks import Array
from fastseq.formats.contents import Contents
from fastseq.layers import Layer

# The place in Keras' columns of each gate of PyTorch's rows: i f g o, r z n.
_ORDERS = {"SimpleRNN": (0,), "LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2)}
_CUDNN = {"CuDNNLSTM": "LSTM", "CuDNNGRU": "GRU"}
_KINDS = {1: "SimpleRNN", 3: "GRU", 4: "LSTM"}  # by the number of gates
_OURS = {"SimpleRNN": "RNN", "LSTM": "LSTM", "GRU": "GRU"}
_ROLES = ("kernel", "recurrent_kernel", "bias")
_NONLINEARITIES = ("tanh", "relu", "sigmoid")
_ACTIVATIONS: dict[str, Callable[[], Layer] | None] = {
    "linear": None,
    "relu": layers.ReLU,
    "tanh": layers.Tanh,
    "sigmoid": layers.Sigmoid,
    "silu": layers.SiLU,
    "swish": layers.SiLU,
    "softmax": layers.Softmax,
    "gelu": layers.GELU,
}
_IDENTITIES = ("InputLayer", "SpatialDropout1D", "GaussianDropout", "GaussianNoise", "ActivityRegularization")
_MERGES = ("concat", "sum", "mul", "ave")
_DEPTH = 32  # of models in models


class _Fault(ValueError):
    """What is not supported, or wrong."""


def model(contents: Contents, *, dtype: str = "float32") -> Layer:
    """Return the model of a file, whose layers are in a chain.

    It is a `Sequential`, or a `ZeroPadded` where the embedding has ``mask_zero``. A mask changes what the layers after
    it make of the real steps; in the padding outputs are 0 here, where Keras repeats the last one. Layers that act in
    training alone are left out, except `Dropout`. A layer with ``stateful`` starts from zeros, and its state is the
    argument and the result of `run`.

    Parameters
    ----------
    contents : Contents
        What `fastseq.formats.keras.read` returned, of a file that has the model and not its weights alone.
    dtype : {"float32", "float64"}
        Of the layers.

    Returns
    -------
    model : Sequential or ZeroPadded

    Raises
    ------
    ValueError
        Listing all that is not supported or does not fit, by class and count.
    """
    file = _File(contents)
    config = contents.description.get("model")
    if config is None:
        raise ValueError("contents should have the model, but hold weights alone: read single layers with `layer`")
    chain = _Chain(file, dtype)
    try:
        chain.add_model(_entry(config), _Place("", ()), 0)
    except _Fault as fault:
        chain.faults[str(fault)] += 1
    if not chain.faults:
        chain.faults.update(f"the array {name} is of no layer" for name in contents.arrays if name not in file.used)
    if chain.faults:
        raise ValueError(f"the model is not supported: {_counted(chain.faults)}")
    if not chain.layers:
        raise ValueError("the model has no layer that computes anything")
    return (layers.ZeroPadded if chain.zero_padded else layers.Sequential)(*chain.layers)


def layer(
    contents: Contents,
    name: str,
    kind: str | None = None,
    *,
    activation: str | None = None,
    recurrent_activation: str | None = None,
    eps: float | None = None,
    dtype: str = "float32",
) -> Layer:
    """Return one layer of a file that holds weights alone.

    Its class and sizes come from the arrays: the ratio of the kernels says which recurrent layer it is, the size of the
    bias whether it has the CuDNN layout, which `return_sequences` and the like have no part in.

    Parameters
    ----------
    contents : Contents
        What `fastseq.formats.keras.read` returned.
    name : str
        The name of the layer, or the path of its arrays: ``"lstm_1"``, ``"layers/lstm"``.
    kind : {"Embedding", "Dense"}, optional
        Which it is, where there is one matrix without a name.
    activation : {"tanh", "relu", "sigmoid"}, optional
        Of a recurrent layer, which the arrays do not say; an LSTM and a GRU have "tanh" here. Not for the CuDNN layout.
    recurrent_activation : {"sigmoid"}, optional
        Of an LSTM or GRU. Older versions of Keras have "hard_sigmoid" by default, which is not supported.
    eps : float, optional
        Of a layer normalisation; Keras has 1e-3 by default.
    dtype : {"float32", "float64"}
        Of the layer.

    Returns
    -------
    layer : Layer
        For a `Bidirectional` of two recurrent layers one that is bidirectional.

    Raises
    ------
    ValueError
        Naming what is missing or does not fit.
    """
    file = _File(contents)
    own = file.parts(name)
    try:
        if set(own) == {"forward", "backward"}:
            directions = [_told(own[part], activation, recurrent_activation) for part in ("forward", "backward")]
            return _recurrent_layer(directions, dtype)
        if set(own) != {""}:
            raise _Fault(f"it has the parts {', '.join(sorted(own))}, and is no single layer")
        arrays = own[""]
        if "recurrent_kernel" in arrays:
            return _recurrent_layer([_told(arrays, activation, recurrent_activation)], dtype)
        return _plain_layer(arrays, kind, eps, dtype)
    except _Fault as fault:
        raise ValueError(f"{name}: {fault}") from None


class _Direction(NamedTuple):
    """A recurrent layer of Keras."""

    kind: str  # "SimpleRNN", "LSTM" or "GRU"
    cudnn: bool
    nonlinearity: str  # of a SimpleRNN
    reset_after: bool  # of a GRU
    arrays: Mapping[str, Array]  # by role

    def settings(self) -> dict[str, Any]:
        """Return the settings of the layer here, except those of its whole."""
        gates = len(_ORDERS[self.kind])
        kernel, recurrent = (self.arrays[role] for role in _ROLES[:2])
        if kernel.ndim != 2 or recurrent.ndim != 2 or not recurrent.shape[0] or not kernel.shape[0]:
            raise _Fault(f"kernels should be matrices, not {kernel.shape} and {recurrent.shape}")
        units = recurrent.shape[0]
        if recurrent.shape[1] != gates * units or kernel.shape[1] != gates * units:
            raise _Fault(f"kernels {kernel.shape} and {recurrent.shape} are not those of {units} units of {self.kind}")
        more: dict[str, Any] = {"nonlinearity": self.nonlinearity} if self.kind == "SimpleRNN" else {}
        more |= {"reset_after": self.reset_after} if self.kind == "GRU" else {}
        bias = self.arrays.get("bias")
        two = self.kind == "GRU" and self.reset_after
        wanted = (2 * gates * units,) if self.cudnn else (2, gates * units) if two else (gates * units,)
        if bias is not None and bias.shape != wanted:
            raise _Fault(f"bias should be of shape {wanted}, not {bias.shape}")
        return {"input_size": kernel.shape[0], "hidden_size": units, "bias": bias is not None, **more}

    def parameters(self) -> dict[str, Array]:
        """Return the arrays by PyTorch's names, without number and direction."""
        order = _ORDERS[self.kind]
        kernel, recurrent, bias = (self.arrays.get(role) for role in _ROLES)
        assert kernel is not None and recurrent is not None  # for mypy
        if self.cudnn:
            kernel = _each_gate(kernel, len(order), lambda k: k.T.reshape(k.shape, order="F"))
            recurrent = _each_gate(recurrent, len(order), lambda k: k.T)
        found = {"weight_ih": _rows(kernel.T, order), "weight_hh": _rows(recurrent.T, order)}
        if bias is not None:
            both = bias.reshape(2, -1) if bias.size == 2 * kernel.shape[1] else np.stack([bias, np.zeros_like(bias)])
            found |= {"bias_ih": _rows(both[0], order), "bias_hh": _rows(both[1], order)}
        return found


def _each_gate(kernel: Array, gates: int, change: Callable[[Array], Array]) -> Array:
    return np.hstack([change(part) for part in np.hsplit(kernel, gates)])


def _rows(array: Array, order: tuple[int, ...]) -> Array:
    """Return the blocks of an array, one a gate, in another order."""
    blocks = np.split(array, len(order))
    return np.concatenate([blocks[place] for place in order])


def _recurrent_layer(directions: list[_Direction], dtype: str) -> Layer:
    """Make a layer of one or two directions."""
    kinds = [(one.kind, one.settings()) for one in directions]
    if kinds[0] != kinds[-1]:
        raise _Fault(f"both directions should be alike, not {kinds[0]} and {kinds[1]}")
    made: Layer = getattr(layers, _OURS[directions[0].kind])(
        **kinds[0][1], bidirectional=len(directions) == 2, dtype=dtype
    )
    ends = ("l0", "l0_reverse")
    return _filled(
        made,
        {f"{n}_{end}": a for one, end in zip(directions, ends, strict=False) for n, a in one.parameters().items()},
    )


def _filled(made: Layer, arrays: Mapping[str, Array]) -> Layer:
    try:
        made.load_state_dict(arrays)
    except (TypeError, ValueError) as error:
        raise _Fault(str(error)) from None
    return made


def _told(arrays: Mapping[str, Array], activation: str | None, recurrent_activation: str | None) -> _Direction:
    """Return the recurrent layer that some arrays are, with what the caller says of it."""
    missing = [role for role in _ROLES[:2] if role not in arrays]
    recurrent, bias = arrays.get("recurrent_kernel"), arrays.get("bias")
    if missing or recurrent is None or recurrent.ndim != 2 or not recurrent.shape[0]:
        raise _Fault(f"it has {', '.join(arrays)}, which are of no recurrent layer")
    units, rest = recurrent.shape[0], recurrent.shape[1] % recurrent.shape[0]
    kind = _KINDS.get(recurrent.shape[1] // units if not rest else 0)
    if kind is None:
        raise _Fault(f"recurrent_kernel should have 1, 3 or 4 times as many columns as rows, not {recurrent.shape}")
    two = bias is not None and bias.size == 2 * recurrent.shape[1]
    cudnn = two and bias is not None and bias.ndim == 1
    asked = {} if cudnn else {"activation": (activation, _NONLINEARITIES if kind == "SimpleRNN" else ("tanh",))}
    if not cudnn and kind != "SimpleRNN":
        asked["recurrent_activation"] = (recurrent_activation, ("sigmoid",))
    for name, (value, allowed) in asked.items():
        if value not in allowed:
            raise _Fault(
                f"{name} should be {_either(allowed)}, not {value!r}; the arrays of this {kind} do not say which it is"
            )
    if kind == "GRU" and bias is None:
        raise _Fault("it is a GRU without bias, whose arrays do not say whether it has reset_after")
    return _Direction(kind, cudnn, activation or "tanh", two, arrays)


def _plain_layer(arrays: Mapping[str, Array], kind: str | None, eps: float | None, dtype: str) -> Layer:
    """Make the layer that arrays without a recurrent kernel are; those of new files have numbers for names."""
    shapes = [array.ndim for array in arrays.values()]
    known = {"embeddings": "Embedding", "kernel": "Dense", "gamma": "LayerNormalization", "beta": "LayerNormalization"}
    kinds = {known[role] for role in arrays if role in known}
    if not kinds and "0" in arrays:
        kinds = {(2,): {"Embedding", "Dense"}, (2, 1): {"Dense"}, (1, 1): {"LayerNormalization"}}.get(
            tuple(shapes), set()
        )
    if len(kinds) > 1 and kind in kinds:
        kinds = {kind}
    if len(kinds) > 1:
        raise _Fault(f"kind should be {_either(sorted(kinds))}, whose arrays look alike, not {kind!r}")
    if not kinds or (kind is not None and kind not in kinds):
        raise _Fault(f"it has {', '.join(arrays)}, which are of no {kind or 'layer that is known here'}")
    (found,) = kinds
    roles = {"Embedding": ["embeddings"], "Dense": ["kernel", "bias"], "LayerNormalization": ["gamma", "beta"]}[found]
    named = dict(zip(roles, arrays.values(), strict=False)) if "0" in arrays else dict(arrays)
    if unknown := [role for role in named if role not in roles]:
        raise _Fault(f"it has {', '.join(unknown)}, too, and is no {found}")
    if found == "LayerNormalization":
        if eps is None:
            raise _Fault("eps should be given, which the arrays do not say")
        return _norm(named, eps, dtype)
    return _embedding(named["embeddings"], dtype) if found == "Embedding" else _linear(named, dtype)


def _linear(arrays: Mapping[str, Array], dtype: str) -> Layer:
    kernel, bias = arrays["kernel"], arrays.get("bias")
    if kernel.ndim != 2 or not kernel.size:
        raise _Fault(f"kernel should be a matrix, not {kernel.shape}")
    made = layers.Linear(kernel.shape[0], kernel.shape[1], bias is not None, dtype=dtype)
    return _filled(made, {"weight": kernel.T} | ({} if bias is None else {"bias": bias}))


def _embedding(table: Array, dtype: str) -> Layer:
    if table.ndim != 2 or not table.size:
        raise _Fault(f"embeddings should be a matrix, not {table.shape}")
    return _filled(layers.Embedding(*table.shape, dtype=dtype), {"weight": table})


def _norm(arrays: Mapping[str, Array], eps: Any, dtype: str) -> Layer:
    """Make a layer normalisation, which has a scale of ones where there is none."""
    size = next(iter(arrays.values())).shape
    if len(size) != 1 or not size[0]:
        raise _Fault(f"gamma and beta should be of one axis, not {size}")
    if not isinstance(eps, float | int) or isinstance(eps, bool):
        raise _Fault(f"epsilon should be a number, not {eps!r}")
    made = layers.LayerNorm(size[0], eps=float(eps), bias="beta" in arrays, dtype=dtype)
    beta = {"bias": arrays["beta"]} if "beta" in arrays else {}
    return _filled(made, {"weight": arrays.get("gamma", np.ones(size)), **beta})


class _Entry(NamedTuple):
    """A layer in the configuration of a model."""

    kind: str
    name: str
    config: dict[str, Any]
    whole: dict[str, Any]


def _entry(item: Any) -> _Entry:
    """Return a layer of a configuration, looked at."""
    if not isinstance(item, dict) or not isinstance(item.get("class_name"), str):
        raise _Fault("the configuration of a layer should have a class_name")
    config = item.get("config")
    config = {"layers": config} if isinstance(config, list) else config  # a Sequential of Keras 2.1 and before
    if not isinstance(config, dict):
        raise _Fault(f"the configuration of a {item['class_name']} should be an object")
    module, registered = item.get("module"), item.get("registered_name") or item["class_name"]
    foreign = isinstance(module, str) and module.partition(".")[0] not in ("keras", "tf_keras")
    foreign = foreign or registered != item["class_name"]
    kind = f"the class {registered} of somebody's own" if foreign else item["class_name"]
    name = item.get("name") or config.get("name")
    return _Entry(kind, name if isinstance(name, str) else "", config, item)


class _Place(NamedTuple):
    """Where the arrays of a layer stand."""

    path: str  # in the layouts whose arrays have numbers
    names: tuple[str, ...]  # in the legacy layout: of the layers around it and its own; "forward_" is a beginning

    def within(self, path: str, *names: str) -> _Place:
        return _Place(f"{self.path}/{path}" if self.path else path, (*self.names, *names))


class _File:
    """The arrays of a file, by the layers they belong to."""

    def __init__(self, contents: Contents) -> None:
        self.arrays, self.names = contents.arrays, contents.description.get("names", {})
        self.legacy = contents.description.get("layout") == "legacy"
        self.used: set[str] = set()
        self._groups: dict[str, list[str]] = {}
        for name in self.arrays:
            if any(part.startswith("seed_generator") for part in name.split("/")):
                self.used.add(name)  # the state of random numbers, which inference has no use for
                continue
            key = name.partition("/")[0] if self.legacy else name.rpartition("/vars/")[0]
            self._groups.setdefault(key, []).append(name)

    def take(self, place: _Place, roles: Iterable[str], cell: bool = False) -> dict[str, Array]:
        """Return the arrays of a layer by their roles, which are all it should have."""
        roles = list(roles)
        group = place.names[0] if self.legacy else f"{place.path}/cell" if cell else place.path
        found = [name for name in self._groups.get(group, []) if not self.legacy or _is_of(name, place.names[1:])]
        by_role: dict[str, str] = {}
        for name in found:
            role = _last(name)
            if not self.legacy:
                role = roles[int(role)] if role.isdecimal() and int(role) < len(roles) else role
            if role in by_role or role not in roles:
                raise _Fault(f"the array {name} is unknown or is there twice")
            by_role[role] = name
        missing = [role for role in roles if role not in by_role]
        if missing:
            raise _Fault(f"{', '.join(missing)} of {place.names[-1] if place.names else group} is not in the file")
        self.used.update(by_role.values())
        return {role: self.arrays[by_role[role]] for role in roles}

    def parts(self, name: str) -> dict[str, dict[str, Array]]:
        """Return the arrays of a layer by part ("", "forward" or "backward") and role, or number."""
        paths = {path for path, own in self.names.items() if own == name} | {name.rstrip("/"), f"layers/{name}"}
        found: dict[str, dict[str, Array]] = {}
        for group, members in self._groups.items():
            path = next((p for p in paths if group == p or (not self.legacy and group.startswith(f"{p}/"))), None)
            for member in members if path is not None else ():
                inner = member.split("/")[1:-1] if self.legacy else group[len(path or "") :].split("/")
                part = next((p for p in ("forward", "backward") for one in inner if one.startswith(f"{p}_")), "")
                role = _last(member)
                if not self.legacy and group.endswith("/cell") and role in ("0", "1", "2"):
                    role = _ROLES[int(role)]
                own = found.setdefault(part, {})
                if role in own:
                    raise ValueError(f"{name}: it has {role} twice, and is no single layer")
                own[role] = self.arrays[member]
        if not found:
            raise ValueError(f"name should be that of a layer, not {name!r}; there are {', '.join(self._groups)[:500]}")
        return {part: dict(sorted(own.items())) if "0" in own else own for part, own in found.items()}


def _last(name: str) -> str:
    return name.rpartition("/")[2].partition(":")[0]


def _is_of(name: str, around: tuple[str, ...]) -> bool:
    """Return whether an array of the legacy layout is of a layer within others."""
    parts = name.split("/")[1:-1]
    return all(any(p == one or (one.endswith("_") and p.startswith(one)) for p in parts) for one in around)


@dataclass
class _Chain:
    """The layers that a model becomes, and what the next ones depend on."""

    file: _File
    dtype: str
    layers: list[Layer] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    timed: bool = True  # whether there is an axis of time
    masked: bool = False  # whether padding is known from the symbols
    zero_padded: bool = False

    def add_model(self, entry: _Entry, place: _Place, depth: int) -> None:
        """Add the layers of a model, all of them, whatever is wrong with one."""
        if entry.kind not in ("Sequential", "Functional", "Model"):
            raise _Fault(f"{entry.kind} as a model")
        if depth > _DEPTH:
            raise _Fault(f"models in models, more than {_DEPTH} deep")
        members = entry.config.get("layers")
        if not isinstance(members, list):
            raise _Fault(f"the configuration of a {entry.kind} should have a list of layers")
        entries = [_entry(member) for member in members]
        counts: Counter[str] = Counter()
        places = {}
        for number, one in enumerate(entries):
            snake = _snake(one.kind)
            path = f"layers/{snake}_{counts[snake]}" if counts[snake] else f"layers/{snake}"
            counts[snake] += 1
            places[number] = place.within(path, one.name)
        order = range(len(entries)) if entry.kind == "Sequential" else _order(entry.config, entries)
        for number in order:
            try:
                self.add(entries[number], places[number], depth)
            except _Fault as fault:
                self.faults[str(fault)] += 1

    def add(self, entry: _Entry, place: _Place, depth: int) -> None:
        """Add the layers that one of Keras becomes."""
        if entry.kind in ("Sequential", "Functional", "Model"):
            return self.add_model(entry, place, depth + 1)
        if entry.kind not in _BUILDERS:
            raise _Fault(entry.kind)
        policy = entry.config.get("dtype")
        quantised = isinstance(policy, dict) and policy.get("class_name") not in ("DTypePolicy", "Policy")
        if quantised or entry.config.get("quantization_config"):
            raise _Fault(f"{entry.kind} with quantised weights")
        if not self.timed and entry.kind in _OF_TIME:
            raise _Fault(f"{entry.kind} behind a layer that leaves no axis of time")
        return _BUILDERS[entry.kind](self, entry, place, depth)

    def activation(self, entry: _Entry, name: str = "activation") -> None:
        """Add an activation of a layer."""
        kind = _function(entry.config.get(name, "linear"))
        if kind not in _ACTIVATIONS:
            raise _Fault(f"{entry.kind} with {name}={kind!r}")
        make = _ACTIVATIONS[kind]
        if make is not None:
            self.put(make(dtype=self.dtype))  # type: ignore[call-arg]

    def put(self, *made: Layer) -> None:
        """Append layers."""
        self.layers.extend(made)


def _function(value: Any) -> str:
    """Return the name of an activation of a configuration."""
    if isinstance(value, dict):
        value = value.get("config") if isinstance(value.get("config"), str) else value.get("class_name")
    return "linear" if value is None else str(value)


def _option(entry: _Entry, name: str, *allowed: Any) -> Any:
    """Return a setting of a layer; it has the first of the values allowed where it is missing."""
    value = entry.config.get(name, allowed[0])
    if not any(value == one and type(value) is type(one) for one in allowed):
        raise _Fault(f"{entry.kind} with {name}={value!r:.60}")
    return value


def _direction(chain: _Chain, entry: _Entry, place: _Place) -> _Direction:
    """Return a recurrent layer of a configuration."""
    kind = _CUDNN.get(entry.kind, entry.kind)
    cudnn = entry.kind in _CUDNN
    for name in ("return_state", "time_major"):
        _option(entry, name, False)
    allowed = {} if cudnn else {"activation": _NONLINEARITIES if kind == "SimpleRNN" else ("tanh",)}
    allowed |= {} if cudnn or kind == "SimpleRNN" else {"recurrent_activation": ("sigmoid",)}
    for name, functions in allowed.items():
        if (function := _function(entry.config.get(name))) not in functions:
            raise _Fault(f"{entry.kind} with {name}={function!r:.60}")
    after = kind == "GRU" and (cudnn or _option(entry, "reset_after", False, True))
    bias = cudnn or _option(entry, "use_bias", True, False)
    arrays = chain.file.take(place, _ROLES if bias else _ROLES[:2], cell=not cudnn)
    found = _Direction(kind, cudnn, _function(entry.config.get("activation", "tanh")), after, arrays)
    units = found.settings()["hidden_size"]
    if entry.config.get("units") != units:
        raise _Fault(f"{entry.kind} with units={entry.config.get('units')!r:.60}, whose arrays are of {units}")
    return found


def _add_recurrent(chain: _Chain, entry: _Entry, place: _Place, depth: int) -> None:
    backwards, sequences = _option(entry, "go_backwards", False, True), _option(entry, "return_sequences", False, True)
    if backwards and sequences and chain.masked:
        raise _Fault(f"{entry.kind} with go_backwards=True and return_sequences=True behind mask_zero=True")
    made = _recurrent_layer([_direction(chain, entry, place)], chain.dtype)
    chain.put(*([layers.Reverse(dtype=chain.dtype)] if backwards else []), made)
    if not sequences:
        chain.put(layers.LastStep(dtype=chain.dtype))
        chain.timed = chain.masked = False


def _add_bidirectional(chain: _Chain, entry: _Entry, place: _Place, depth: int) -> None:
    forward = _entry(entry.config.get("layer"))
    if forward.kind not in (*_ORDERS, *_CUDNN):
        raise _Fault(f"Bidirectional of {forward.kind}")
    merge = _option(entry, "merge_mode", *_MERGES)
    given = entry.config.get("backward_layer")
    backward = forward if given is None else _entry(given)
    same = ("return_sequences", "units", "activation", "recurrent_activation", "use_bias", "reset_after")
    if backward.kind != forward.kind or any(backward.config.get(n) != forward.config.get(n) for n in same):
        raise _Fault("Bidirectional of two layers that are not alike")
    swapped = _option(forward, "go_backwards", False, True)
    if given is not None and _option(backward, "go_backwards", False, True) == swapped:
        raise _Fault("Bidirectional of two layers of one direction")
    sequences = _option(forward, "return_sequences", False, True)
    if swapped and sequences and chain.masked:
        raise _Fault("Bidirectional with go_backwards=True and return_sequences=True behind mask_zero=True")
    parts = {
        "forward": forward,
        "backward": backward,
    }  # of two layers that were given the names are in the configuration
    places = [place.within(f"{part}_layer", one.name if given else f"{part}_") for part, one in parts.items()]
    directions = [_direction(chain, one, at) for one, at in zip(parts.values(), places, strict=True)]
    chain.put(*([layers.Reverse(dtype=chain.dtype)] if swapped else []), _recurrent_layer(directions, chain.dtype))
    if not sequences:
        chain.put(layers.LastOfDirections(dtype=chain.dtype))
        chain.timed = chain.masked = False
    if merge != "concat":
        chain.put(layers.MergeDirections(merge, dtype=chain.dtype))


def _add_dense(chain: _Chain, entry: _Entry, place: _Place, depth: int) -> None:
    _option(entry, "lora_rank", None)
    bias = _option(entry, "use_bias", True, False)
    made = _linear(chain.file.take(place, _ROLES[::2] if bias else _ROLES[:1]), chain.dtype)
    if entry.config.get("units") != made.out_features:  # type: ignore[attr-defined]
        raise _Fault(f"Dense with units={entry.config.get('units')!r:.60}, whose arrays are of another number")
    chain.put(made)
    chain.activation(entry)


def _add_embedding(chain: _Chain, entry: _Entry, place: _Place, depth: int) -> None:
    if chain.layers:
        raise _Fault("Embedding behind another layer")
    _option(entry, "lora_rank", None)
    chain.masked = chain.zero_padded = _option(entry, "mask_zero", False, True)
    table = chain.file.take(place, ["embeddings"])["embeddings"]
    if table.shape != (entry.config.get("input_dim"), entry.config.get("output_dim")):
        raise _Fault("Embedding whose array is not of input_dim rows and output_dim columns")
    chain.put(_embedding(table, chain.dtype))


def _add_norm(chain: _Chain, entry: _Entry, place: _Place, depth: int) -> None:
    axis = entry.config.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    if axis not in (-1, 2 if chain.timed else 1) or isinstance(axis, bool):
        raise _Fault(f"LayerNormalization with axis={axis!r:.60}")
    _option(entry, "rms_scaling", False)
    roles = [role for role, name in (("gamma", "scale"), ("beta", "center")) if _option(entry, name, True, False)]
    if not roles:
        raise _Fault("LayerNormalization with scale=False and center=False")
    chain.put(_norm(chain.file.take(place, roles), entry.config.get("epsilon", 1e-3), chain.dtype))


def _add_dropout(chain: _Chain, entry: _Entry, place: _Place, depth: int) -> None:
    rate = entry.config.get("rate")
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 <= rate < 1:
        raise _Fault(f"Dropout with rate={rate!r:.60}")
    chain.put(layers.Dropout(float(rate), dtype=chain.dtype))


def _add_activation(chain: _Chain, entry: _Entry, place: _Place, depth: int) -> None:
    chain.activation(entry)


def _add_relu(chain: _Chain, entry: _Entry, place: _Place, depth: int) -> None:
    _option(entry, "max_value", None)
    for name in ("negative_slope", "threshold"):
        _option(entry, name, 0.0, 0, None)
    chain.put(layers.ReLU(dtype=chain.dtype))


def _add_softmax(chain: _Chain, entry: _Entry, place: _Place, depth: int) -> None:
    _option(entry, "axis", -1)
    if chain.masked:
        raise _Fault("Softmax behind mask_zero=True")
    chain.put(layers.Softmax(dtype=chain.dtype))


def _add_mean(chain: _Chain, entry: _Entry, place: _Place, depth: int) -> None:
    _add_pooling(chain, entry, layers.MeanOverTime)


def _add_max(chain: _Chain, entry: _Entry, place: _Place, depth: int) -> None:
    if chain.masked:
        raise _Fault("GlobalMaxPooling1D behind mask_zero=True, which it does not regard")
    _add_pooling(chain, entry, layers.MaxOverTime)


def _add_pooling(chain: _Chain, entry: _Entry, kind: type[Layer]) -> None:
    _option(entry, "data_format", "channels_last")
    _option(entry, "keepdims", False)
    chain.put(kind(dtype=chain.dtype))
    chain.timed = chain.masked = False


def _add_distributed(chain: _Chain, entry: _Entry, place: _Place, depth: int) -> None:
    inner = _entry(entry.config.get("layer"))
    if inner.kind not in ("Dense", "Activation", "LayerNormalization", "Dropout"):
        raise _Fault(f"TimeDistributed of {inner.kind}")
    chain.timed = False  # for the layer within
    try:
        chain.add(inner, place.within("layer"), depth)
    finally:
        chain.timed = True


def _add_nothing(chain: _Chain, entry: _Entry, place: _Place, depth: int) -> None:
    """Add nothing for what does nothing in inference."""


_BUILDERS: dict[str, Callable[[_Chain, _Entry, _Place, int], None]] = {
    **dict.fromkeys((*_ORDERS, *_CUDNN), _add_recurrent),
    **dict.fromkeys(_IDENTITIES, _add_nothing),
    "Bidirectional": _add_bidirectional,
    "Dense": _add_dense,
    "Embedding": _add_embedding,
    "LayerNormalization": _add_norm,
    "Dropout": _add_dropout,
    "Activation": _add_activation,
    "ReLU": _add_relu,
    "Softmax": _add_softmax,
    "GlobalAveragePooling1D": _add_mean,
    "GlobalMaxPooling1D": _add_max,
    "TimeDistributed": _add_distributed,
}
_OF_TIME = (*_ORDERS, *_CUDNN, "Bidirectional", "GlobalAveragePooling1D", "GlobalMaxPooling1D", "TimeDistributed")


def _order(config: dict[str, Any], entries: list[_Entry]) -> list[int]:
    """Return the places of the layers of a functional model in the order they run, if they are in a chain."""
    places = {one.name: place for place, one in enumerate(entries)}
    after: dict[str, list[str]] = {}
    for one in entries:
        if one.kind == "NotEqual":  # the mask of an embedding, which follows from mask_zero
            continue
        sources, others = _sources(one)
        unknown = [name for name in others if places.get(name) is None or entries[places[name]].kind != "NotEqual"]
        if unknown or len(sources) > 1 or (not sources and one.kind != "InputLayer"):
            raise _Fault(f"{one.kind} that has more than one input, or is used more than once")
        for source in sources:
            after.setdefault(source, []).append(one.name)
    starts = [one.name for one in entries if one.kind == "InputLayer"]
    if len(starts) != 1:
        raise _Fault(f"a model of {len(starts)} inputs")
    order = [starts[0]]
    while order[-1] in after:
        following = after.pop(order[-1])
        if len(following) > 1:
            raise _Fault(f"a model that branches behind {order[-1]}")
        order += following
    masks = sum(one.kind == "NotEqual" for one in entries)
    if len(order) + masks != len(entries) or _names(config.get("output_layers")) != [order[-1]]:
        raise _Fault("a model whose layers are in no chain from one input to one output")
    return [places[name] for name in order]


def _sources(entry: _Entry) -> tuple[list[str], list[str]]:
    """Return the names of the layers whose outputs one takes, as its input and otherwise."""
    nodes = entry.whole.get("inbound_nodes")
    if not isinstance(nodes, list) or len(nodes) > 1:
        return ["", ""], []
    if not nodes:
        return [], []
    node = nodes[0]
    if isinstance(node, dict):  # Keras 3
        return _tensors(node.get("args")), _tensors(node.get("kwargs"))
    if not isinstance(node, list):
        return ["", ""], []
    sources, others = [], []
    for tensor in node:
        if (
            not isinstance(tensor, list)
            or not tensor
            or not isinstance(tensor[0], str)
            or tensor[1:3] not in ([0, 0], [])
        ):
            return ["", ""], []
        sources.append(tensor[0])
        if len(tensor) > 3 and isinstance(tensor[3], dict) and any(v is not None for v in tensor[3].values()):
            others.append("")
    return sources, others


def _tensors(value: Any) -> list[str]:
    """Return the names of the layers whose tensors stand anywhere in a value."""
    found, waiting = [], [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict) and one.get("class_name") == "__keras_tensor__":
            config = one.get("config")
            history = config.get("keras_history") if isinstance(config, dict) else None
            match history:
                case [str(name), 0, 0]:
                    found.append(name)
                case _:
                    found.append("")
        elif isinstance(one, dict | list):
            waiting += list(one.values()) if isinstance(one, dict) else one
    return found


def _names(value: Any) -> list[Any]:
    """Return the names of the layers of inputs or outputs: [name, 0, 0], or a list of such."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return [one[0] for one in value if isinstance(one, list) and one]
    return [value[0]] if isinstance(value, list) and value else []


def _snake(kind: str) -> str:
    """Return the name that Keras gives to the group of a class; from ``keras/src/utils/naming.py``."""
    name = re.sub(r"\W+", "", kind)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _counted(faults: Counter[str]) -> str:
    parts = [text if count == 1 else f"{text} ({count} times)" for text, count in faults.items()]
    return "; ".join(parts[:50]) + (f"; and {len(parts) - 50} more" if len(parts) > 50 else "")


def _either(values: Iterable[str]) -> str:
    return " or ".join(map(repr, values))
