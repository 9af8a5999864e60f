"""PyTorch: arrays named as its modules name their parameters, onto layers.

The names of a file say which layers there are, and the shapes their sizes; both are those of `load_state_dict` here.
What they do not say is asked of the caller: the nonlinearity of an RNN, the number of heads, the epsilon of norms, and
which layer is meant where several have the same names. Dropout changes training alone, and is 0 unless it is given.

Names are those of the documentation of torch.nn 2.13, each beside the function that knows them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastseq import checks, layers
from fastseq.layers import Layer

Shapes = dict[str, tuple[int, ...]]

_RECURRENT = re.compile(r"(weight_ih|weight_hh|bias_ih|bias_hh|weight_hr)(?:_l(0|[1-9]\d{0,3})(_reverse)?)?")
_GATES = {1: "RNN", 3: "GRU", 4: "LSTM"}
_BLOCK = re.compile(r"(?:(?P<prefix>.*)\.)?(?P<name>(?:self_attn|multihead_attn|linear[12]|norm[123])\..+)", re.DOTALL)
_STACKED = re.compile(r"(?:(?P<prefix>.*)\.)?layers\.(?P<place>0|[1-9]\d{0,3})", re.DOTALL)
_OF_BLOCKS = ("nhead", "activation", "norm_first", "layer_norm_eps")
_ALWAYS = ("dropout", "dtype", "padding_idx", "seed")  # settings that may be given and are never asked


@dataclass(frozen=True)
class Found:
    """A layer that some of the arrays form.

    Attributes
    ----------
    prefix : str
        What stands before the names of its arrays, without the dot.
    kinds : dict from str
        The classes it may be of, each with its settings, as far as names and shapes say them. More than one where these
        are the same.
    asks : tuple of str
        The settings that they do not say.
    names : dict from str to str
        The names of its parameters here, and in the file.
    fault : str
        Why it cannot be made; empty where it can.
    """

    prefix: str
    kinds: dict[str, dict[str, Any]]
    asks: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    fault: str = ""


def find(arrays: Mapping[str, Any]) -> tuple[list[Found], list[str]]:
    """Return the layers that some arrays form, and the names that belong to none.

    Parameters
    ----------
    arrays : mapping from str to array
        A state dict, or the `arrays` of a file.

    Returns
    -------
    found : list of Found
        In the order of the names.
    others : list of str
        Names of arrays that are of no layer which is known here.
    """
    shapes = {
        name: tuple(array.shape)
        for name, array in checks.mapping("arrays", arrays).items()
        if "float" in str(array.dtype)  # NumPy's or PyTorch's
    }
    order = {name: place for place, name in enumerate(shapes)}
    found: list[Found] = []
    for convention in (_transformers, _attentions, _recurrents, _plain):
        for one in convention(shapes):
            found.append(one)
            for name in one.names.values():
                del shapes[name]
    found.sort(key=lambda one: min(order[name] for name in one.names.values()))
    claimed = {name for one in found for name in one.names.values()}
    return found, [name for name in arrays if name not in claimed]


def layer(arrays: Mapping[str, Any], prefix: str = "", *, kind: str | None = None, **settings: Any) -> Layer:
    """Return the layer whose arrays have a prefix.

    Parameters
    ----------
    arrays : mapping from str to array
        A state dict, or the `arrays` of a file. Arrays of other prefixes are left out.
    prefix : str
        What stands before the names of its parameters, with the dot or without: ``"encoder.lstm"``.
    kind : str, optional
        The class, where names and shapes are the same for several: ``"Embedding"`` or ``"Linear"``.
    **settings
        What the arrays do not say: `nonlinearity` of an `RNN`, `num_heads` of `MultiheadAttention`, `nhead`,
        `activation`, `norm_first` and `layer_norm_eps` of Transformers, `eps` of norms; and if wanted `dropout`,
        `padding_idx`, `dtype`, `seed`.

    Returns
    -------
    layer : Layer

    Raises
    ------
    ValueError
        Naming all that is missing, unknown or not supported.
    """
    start = f"{prefix.rstrip('.')}." if prefix else ""
    own = {
        name[len(start) :]: array for name, array in checks.mapping("arrays", arrays).items() if name.startswith(start)
    }
    if not own:
        raise ValueError(f"prefix should be that of some arrays, not {prefix!r}")
    found, others = find(own)
    if len(found) != 1 or others or found[0].prefix:
        parts = [*(f"a {_either(one.kinds)} {one.prefix!r}" for one in found), *others]
        raise ValueError(f"arrays under {prefix!r} are those of no single layer, but {_listed(parts)}")
    faults = _faults(found[0], kind, settings)
    faults += [f"{name} is no setting of it" for name in settings if name not in (*found[0].asks, *_ALWAYS)]
    if faults:
        raise ValueError(f"arrays under {prefix!r}: {'; '.join(faults)}")
    return _made(found[0], kind, settings, own)


def all_layers(
    arrays: Mapping[str, Any], *, kinds: Mapping[str, str] | None = None, **settings: Any
) -> dict[str, Layer]:
    """Return all layers that some arrays form, by prefix.

    Parameters
    ----------
    arrays : mapping from str to array
        A state dict, or the `arrays` of a file.
    kinds : mapping from prefix to str, optional
        The class of each layer whose names and shapes are the same for several.
    **settings
        As of `layer`: a value for all layers that ask for it, or a mapping from prefix to value.

    Returns
    -------
    layers : dict from str to Layer

    Raises
    ------
    ValueError
        Naming all that is missing, unknown or not supported: nothing is left out.
    """
    kinds = dict(kinds or {})
    found, others = find(arrays)
    faults = [f"{name} is of no layer that is known here" for name in others]
    prefixes, asked = {one.prefix for one in found}, {name for one in found for name in one.asks}
    faults += [f"kinds has {prefix!r}, which is the prefix of no layer" for prefix in kinds if prefix not in prefixes]
    faults += [f"{name} is no setting of any of the layers" for name in settings if name not in {*asked, *_ALWAYS}]
    given: dict[str, dict[str, Any]] = {}
    for one in found:
        given[one.prefix] = own = _given_to(one, settings)
        faults += [f"{one.prefix or 'the layer'}: {fault}" for fault in _faults(one, kinds.get(one.prefix), own)]
    if faults:
        raise ValueError(f"arrays cannot become layers: {'; '.join(faults)}")
    return {one.prefix: _made(one, kinds.get(one.prefix), given[one.prefix], arrays) for one in found}


def _given_to(one: Found, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the settings of all layers that one of them has."""
    takes = set(one.asks).union(*(_takes(kind) for kind in one.kinds if hasattr(layers, kind)))
    own = {}
    for name, value in settings.items():
        value = value.get(one.prefix) if isinstance(value, Mapping) else value
        if name in takes and value is not None:
            own[name] = value
    return own


def _takes(kind: str) -> set[str]:
    return {name for name in inspect.signature(getattr(layers, kind)).parameters if name in _ALWAYS}


def _faults(one: Found, kind: str | None, given: Mapping[str, Any]) -> list[str]:
    """Say why a layer cannot be made with these settings."""
    faults = [one.fault] if one.fault else []
    if kind is not None and kind not in one.kinds:
        faults.append(f"kind should be {_either(one.kinds)}, not {kind!r}")
    if kind is None and len(one.kinds) > 1:
        faults.append(f"kind should be given, {_either(one.kinds)}, whose arrays look alike")
    faults += [f"{name} should be given, which the arrays do not say" for name in one.asks if name not in given]
    return faults


def _made(one: Found, kind: str | None, given: Mapping[str, Any], arrays: Mapping[str, Any]) -> Layer:
    """Make a layer without faults."""
    own = {name: arrays[theirs] for name, theirs in one.names.items()}
    double = all(str(array.dtype).endswith("float64") for array in own.values())
    name = kind or next(iter(one.kinds))
    made: Layer = getattr(layers, name)(**{"dtype": "float64" if double else "float32", **one.kinds[name], **given})
    try:
        made.load_state_dict(own)
    except ValueError as error:
        raise ValueError(f"{one.prefix}: {error}" if one.prefix else str(error)) from None
    return made


def _either(kinds: Iterable[str]) -> str:
    return " or ".join(map(repr, kinds))


def _listed(parts: list[str]) -> str:
    return ", ".join(parts[:20]) + (f" and {len(parts) - 20} more" if len(parts) > 20 else "")


def _joined(prefix: str | None, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _grouped(shapes: Shapes, split: Callable[[str], tuple[str, str] | None]) -> dict[str, Shapes]:
    """Return the shapes of the names that `split` knows, by prefix and rest."""
    groups: dict[str, Shapes] = {}
    for name, shape in shapes.items():
        if (parts := split(name)) is not None:
            groups.setdefault(parts[0], {})[parts[1]] = shape
    return groups


def _parted(name: str) -> tuple[str, str]:
    prefix, _, last = name.rpartition(".")
    return prefix, last


def _recurrents(shapes: Shapes) -> list[Found]:
    """torch.nn.RNN, LSTM and GRU: ``weight_ih_l0``, ``bias_hh_l1_reverse``; RNNCell, LSTMCell, GRUCell: ``weight_ih``.

    The rows of `weight_hh` are gates × H; its columns are H, or with `weight_hr` (P, H) P.
    """

    def split(name: str) -> tuple[str, str] | None:
        prefix, last = _parted(name)
        return (prefix, last) if _RECURRENT.fullmatch(last) else None

    return [_recurrent(prefix, own) for prefix, own in _grouped(shapes, split).items()]


def _recurrent(prefix: str, own: Shapes) -> Found:
    cell = all(_RECURRENT.fullmatch(name)[2] is None for name in own)  # type: ignore[index]
    named = {(f"{name}_l0" if cell else name): shape for name, shape in own.items()}
    names = {name: _joined(prefix, theirs) for name, theirs in zip(named, own, strict=True)}
    matches = [match for name in named if (match := _RECURRENT.fullmatch(name)) and match[2]]
    inputs, states, projection = (named.get(f"weight_{name}_l0", ()) for name in ("ih", "hh", "hr"))
    hidden = projection[-1] if projection else states[-1] if states else 0
    if len(inputs) != 2 or len(states) != 2 or not hidden or states[0] % hidden or states[0] // hidden not in _GATES:
        return Found(prefix, {}, names=names, fault="the shapes of weight_ih and weight_hh are of no recurrent layer")
    parts = {match[1] for match in matches}
    count, bidirectional = 1 + max(int(match[2]) for match in matches), any(match[3] for match in matches)
    wanted = [
        f"{part}_l{n}{end}" for part in parts for n in range(count) for end in ("", "_reverse")[: 1 + bidirectional]
    ]
    kind = _GATES[states[0] // hidden]
    settings: dict[str, Any] = {"input_size": inputs[1], "hidden_size": hidden, "num_layers": count}
    settings |= {"bias": "bias_ih" in parts, "bidirectional": bidirectional}
    settings |= {"proj_size": states[1]} if projection and kind == "LSTM" else {}
    fault = "; ".join(checks.are((name for name in wanted if name not in names), "missing"))
    if not fault and any(named[name] != states for name in wanted if name.startswith("weight_hh")):
        fault = f"weight_hh should be of shape {states} in every layer and direction"
    return Found(prefix, {kind: settings}, ("nonlinearity",) if kind == "RNN" else (), names, fault)


def _attentions(shapes: Shapes) -> list[Found]:
    """torch.nn.MultiheadAttention: ``in_proj_weight`` (3E, E), or ``q_proj_weight`` (E, E) and those of k and v."""
    ours = {"in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v"}

    def split(name: str) -> tuple[str, str] | None:
        prefix, last = _parted(name)
        if last in ours:
            return prefix, last
        owner, part = _parted(prefix)
        return (owner, f"out_proj.{last}") if part == "out_proj" and last in ("weight", "bias") else None

    found = []
    for prefix, own in _grouped(shapes, split).items():
        whole, query = own.get("in_proj_weight"), own.get("q_proj_weight", ())
        matrix = query if whole is None else whole
        if not matrix:
            continue
        names = {name: _joined(prefix, name) for name in own}
        fault = "bias_k and bias_v (add_bias_kv=True) are not supported" if {"bias_k", "bias_v"} & own.keys() else ""
        if len(matrix) != 2 or matrix[0] != matrix[1] * (1 if whole is None else 3):
            fault = fault or "the weights of queries, keys and values are of no MultiheadAttention"
        settings: dict[str, Any] = {"embed_dim": matrix[-1], "bias": "in_proj_bias" in own}
        if whole is None:
            for name in ("k", "v"):
                settings[f"{name}dim"] = own.get(f"{name}_proj_weight", matrix)[-1]
        found.append(Found(prefix, {"MultiheadAttention": settings}, ("num_heads",), names, fault))
    return found


def _transformers(shapes: Shapes) -> list[Found]:
    """torch.nn.TransformerEncoderLayer, -DecoderLayer; of these -Encoder, -Decoder; of both torch.nn.Transformer.

    A layer has ``self_attn``, ``linear1``, ``linear2``, ``norm1``, ``norm2``, and of a decoder ``multihead_attn`` and
    ``norm3``; a stack ``layers.0`` and so on and perhaps ``norm``; a Transformer ``encoder`` and ``decoder``.
    """

    def split(name: str) -> tuple[str, str] | None:
        match = _BLOCK.fullmatch(name)
        return match and (match["prefix"] or "", match["name"])

    found = []
    stacks: dict[str, dict[int, Found]] = {}
    for prefix, own in _grouped(shapes, split).items():
        wide, attention = own.get("linear1.weight", ()), own.get("self_attn.in_proj_weight", ())
        if len(wide) != 2 or attention != (3 * wide[1], wide[1]):
            continue
        kind = f"Transformer{'Decoder' if 'multihead_attn.in_proj_weight' in own else 'Encoder'}Layer"
        settings = {"d_model": wide[1], "dim_feedforward": wide[0], "bias": "linear1.bias" in own}
        one = Found(prefix, {kind: settings}, _OF_BLOCKS, {name: _joined(prefix, name) for name in own})
        stacked = _STACKED.fullmatch(prefix)
        if stacked:
            stacks.setdefault(stacked["prefix"] or "", {})[int(stacked["place"])] = one
        else:
            found.append(one)
    return found + _paired({prefix: _stack(prefix, blocks, shapes) for prefix, blocks in stacks.items()})


def _stack(prefix: str, blocks: Mapping[int, Found], shapes: Shapes) -> Found:
    """Return the encoder or decoder that some layers form."""
    names = {f"layers.{n}.{ours}": theirs for n, block in blocks.items() for ours, theirs in block.names.items()}
    norm = {f"norm.{name}": _joined(prefix, f"norm.{name}") for name in ("weight", "bias")}
    norm = {ours: theirs for ours, theirs in norm.items() if theirs in shapes}
    first = next(iter(blocks.values()))
    ((kind, settings),) = first.kinds.items()
    fault = ""
    if sorted(blocks) != list(range(len(blocks))):
        fault = f"layers should be numbered from 0 on without a gap, not {_listed([str(n) for n in sorted(blocks)])}"
    elif any(block.kinds != first.kinds for block in blocks.values()):
        fault = "layers should be of one kind and size"
    settings = {**settings, "num_layers": len(blocks), "final_norm": bool(norm)}
    return Found(prefix, {kind.removesuffix("Layer"): settings}, _OF_BLOCKS, {**names, **norm}, fault)


def _paired(stacks: dict[str, Found]) -> list[Found]:
    """Join encoders and decoders that form a Transformer."""
    found = dict(stacks)
    for prefix, encoder in stacks.items():
        owner, part = _parted(prefix)
        decoder = stacks.get(_joined(owner, "decoder"))
        if part != "encoder" or decoder is None or encoder.fault or decoder.fault:
            continue
        halves = {"encoder": encoder, "decoder": decoder}
        sizes = [one.kinds.get(f"Transformer{name.title()}", {}) for name, one in halves.items()]
        shared = {name: sizes[0].get(name) for name in ("d_model", "dim_feedforward", "bias")}
        if not all(size and size["final_norm"] and shared.items() <= size.items() for size in sizes):
            continue
        counts = {f"num_{name}_layers": size["num_layers"] for name, size in zip(halves, sizes, strict=True)}
        names = {f"{name}.{ours}": theirs for name, one in halves.items() for ours, theirs in one.names.items()}
        for name in halves:
            del found[_joined(owner, name)]
        found[owner] = Found(owner, {"Transformer": {**shared, **counts}}, _OF_BLOCKS, names)
    return list(found.values())


def _plain(shapes: Shapes) -> list[Found]:
    """Layers of a ``weight`` and perhaps a ``bias``.

    torch.nn.Linear (O, I) and (O,); Embedding (V, D) alone, as Linear(bias=False); LayerNorm, both of one shape;
    RMSNorm a vector alone, as LayerNorm(bias=False). GroupNorm and InstanceNorm look like LayerNorm: whoever gives
    `eps` says that it is a LayerNorm.
    """
    owners: dict[str, set[str]] = {}
    for name in shapes:
        prefix, last = _parted(name)
        owners.setdefault(prefix, set()).add(last)
    found = []
    for prefix, own in owners.items():
        if own not in ({"weight"}, {"weight", "bias"}):
            continue
        names = {name: _joined(prefix, name) for name in sorted(own, reverse=True)}
        weight, bias = shapes[names["weight"]], shapes[names["bias"]] if "bias" in own else None
        if not weight or min(weight) < 1:
            continue
        linear = {"out_features": weight[0], "in_features": weight[-1], "bias": bias is not None}
        if len(weight) == 2 and bias is None:
            table = {"num_embeddings": weight[0], "embedding_dim": weight[1]}
            found.append(Found(prefix, {"Embedding": table, "Linear": linear}, names=names))
        elif len(weight) == 2 and bias == weight[:1]:
            found.append(Found(prefix, {"Linear": linear}, names=names))
        elif bias == weight:
            found.append(Found(prefix, {"LayerNorm": {"normalized_shape": weight}}, ("eps",), names))
        elif len(weight) == 1 and bias is None:
            of_norm = {"normalized_shape": weight}
            found.append(Found(prefix, {"RMSNorm": of_norm, "LayerNorm": {**of_norm, "bias": False}}, ("eps",), names))
    return found
