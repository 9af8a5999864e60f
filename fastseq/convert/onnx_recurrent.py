"""ONNX: its recurrent operators, onto layers; the files are read by `fastseq.formats.onnx`.

Conventions, from the documentation of the operators (onnx 1.23, ``docs/Operators.md``) and of ``com.microsoft``
(onnxruntime 1.32, ``docs/ContribOperators.md``); D is 1, or 2 for "bidirectional", forward first:

===================  ===========  ==============================================================================
operator             gates, rows  tensors
===================  ===========  ==============================================================================
RNN                  h            W (D, H, I), R (D, H, H), B (D, 2H): of the inputs, of the state
GRU                  z r h        W (D, 3H, I), R (D, 3H, H), B (D, 6H); ``linear_before_reset`` is `reset_after`
LSTM                 i o f c      W (D, 4H, I), R (D, 4H, H), B (D, 8H)
DynamicQuantizeLSTM  i o f c      W (D, I, 4H), R (D, H, 4H) of int8 or uint8, scales and zero points (D,) or (D, 4H)
===================  ===========  ==============================================================================

With ``layout`` 0 inputs are (T, B, I), outputs (T, D, B, H), states (D, B, H); with 1 the batch comes first. A GRU has
``(1 - z) h + z H``, as PyTorch's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastseq import layers
from fastseq.checks import Array
from fastseq.formats.onnx import Node
from fastseq.layers import Layer

QUANTISED = "DynamicQuantizeLSTM"
OPERATORS = {"RNN": "", "GRU": "", "LSTM": "", QUANTISED: "com.microsoft"}  # with their domains

# The place among ONNX's rows of each gate of PyTorch's: i f g o, r z n.
_ORDERS = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 2, 3, 1)}
_FUNCTIONS = {"RNN": None, "GRU": ("sigmoid", "tanh"), "LSTM": ("sigmoid", "tanh", "tanh")}
_NONLINEARITIES = ("tanh", "relu", "sigmoid")
_INPUTS = {
    "RNN": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
    "GRU": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
    "LSTM": ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"),
    QUANTISED: (
        *("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"),
        *("W_scale", "W_zero_point", "R_scale", "R_zero_point"),
    ),
}
_DIRECTIONS = ("forward", "reverse", "bidirectional")
_ATTRIBUTES = ("hidden_size", "direction", "layout", "activations", "activation_alpha", "activation_beta", "clip")
_MORE = {"RNN": (), "GRU": ("linear_before_reset",), "LSTM": ("input_forget",), QUANTISED: ("input_forget",)}


@dataclass(frozen=True)
class Feeding:
    """How the layer of an operator is fed: names of values, and what is done to them.

    Attributes
    ----------
    x : str
        The input.
    lengths : str
        The lengths; "" where there are none.
    initial : tuple of str
        The initial h, and of an LSTM c; "" for zeros.
    outputs : tuple of str
        Y, the last h, and of an LSTM c; "" for what is not used.
    time_first : bool
        Whether inputs are (T, B, I), outputs (T, D, B, H) and states (D, B, H), instead of with the batch first.
    reverse : bool
        Whether the layer, which has one direction, runs over reversed rows, whose outputs are reversed again.
    """

    x: str
    lengths: str
    initial: tuple[str, ...]
    outputs: tuple[str, ...]
    time_first: bool
    reverse: bool

    def run(self, layer: Any, values: Mapping[str, Array]) -> dict[str, Array]:
        """Run the layer as ONNX says.

        Parameters
        ----------
        layer : RNN, LSTM or GRU
        values : mapping from str to ndarray
            The values that are named above.

        Returns
        -------
        results : dict from str to ndarray
            The outputs that are used.
        """
        x = np.asarray(values[self.x])
        x = np.ascontiguousarray(x.swapaxes(0, 1)) if self.time_first else x
        lengths = np.asarray(values[self.lengths]) if self.lengths else None
        directions = 2 if layer.bidirectional else 1
        zeros = layer.initial_state(len(x))
        state = [
            self._turned(np.asarray(values[name])) if name else zero
            for name, zero in zip(self.initial, zeros, strict=True)
        ]
        turn = layers.Reverse(dtype=layer.dtype)
        x = turn(x, lengths=lengths) if self.reverse else x
        y, end = layer(x, tuple(state) if len(state) > 1 else state[0], lengths=lengths)
        y = turn(y, lengths=lengths) if self.reverse else y
        y = y.reshape(*y.shape[:2], directions, -1)
        y = y.transpose(1, 2, 0, 3) if self.time_first else y
        whole = [y, *(self._turned(one) for one in end)]
        return {name: np.ascontiguousarray(a) for name, a in zip(self.outputs, whole, strict=True) if name}

    def _turned(self, state: Array) -> Array:
        return state.swapaxes(0, 1) if self.time_first else state


class _Tensors(NamedTuple):
    """The constants of an operator as RNN, GRU and LSTM have them."""

    w: Array  # (D, gates H, I)
    r: Array  # (D, gates H, H)
    b: Array | None  # (D, 2 gates H)


def layer_of(node: Node, initialisers: Mapping[str, Array], *, dtype: str = "float32") -> tuple[Layer, Feeding]:
    """Return the layer of a recurrent operator, and how it is fed.

    Parameters
    ----------
    node : Node
        One of `OPERATORS`.
    initialisers : mapping from str to ndarray
        The constants of the graph, with the weights among them. Those of `DynamicQuantizeLSTM` are multiplied by their
        scales; ONNX Runtime rounds the inputs of the products besides, and the layer does not.
    dtype : {"float32", "float64"}
        Of the layer.

    Returns
    -------
    layer : RNN, GRU or LSTM
    feeding : Feeding

    Raises
    ------
    ValueError
        Naming the node, and all of it that is not supported or does not fit.
    """
    what = f"{node.op} {node.name!r}"
    if OPERATORS.get(node.op) != node.domain:
        raise ValueError(f"{what}: it should be one of {', '.join(OPERATORS)}, not of the domain {node.domain!r}")
    kind = "LSTM" if node.op == QUANTISED else node.op
    known = _INPUTS[node.op]
    if len(node.inputs) > len(known):
        raise ValueError(f"{what}: it has {len(node.inputs)} inputs, of {len(known)} that there are")
    inputs = dict(zip(known, (*node.inputs, *[""] * len(known)), strict=False))
    attributes, faults = _attributes(node, kind, inputs)
    names = ["W", "R", *(["B"] if inputs["B"] else []), *(known[8:] if node.op == QUANTISED else [])]
    faults += [f"{one} is missing" for one in names if not inputs[one]]
    missing = [one for one in names if inputs[one] and inputs[one] not in initialisers]
    faults += [f"{one} ({inputs[one]!r}) should be a constant" for one in missing]
    if faults:
        raise ValueError(f"{what}: {'; '.join(faults)}")
    constants = {one: initialisers[inputs[one]] for one in names}
    try:
        tensors = _dequantised(constants) if node.op == QUANTISED else _plain(constants)
        made = _filled(kind, attributes, tensors, dtype)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    states = ("initial_h", "initial_c") if kind == "LSTM" else ("initial_h",)
    outputs = (*node.outputs, *[""] * 3)[: 1 + len(states)]
    initial = tuple(inputs[one] for one in states)
    time_first, reverse = not attributes["layout"], attributes["direction"] == "reverse"
    return made, Feeding(inputs["X"], inputs["sequence_lens"], initial, outputs, time_first, reverse)


def _attributes(node: Node, kind: str, inputs: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return what the attributes say, and what of it is not supported."""
    given = dict(node.attributes)
    unknown = [name for name in given if name not in (*_ATTRIBUTES, *_MORE[node.op])]
    faults = [f"the attribute {name} is unknown" for name in unknown]
    faults += ["clip is not supported"] if "clip" in given else []
    faults += ["input_forget is not supported"] if given.get("input_forget", 0) else []
    faults += ["peepholes (P) are not supported"] if inputs.get("P") else []
    faults += ["X is missing"] if not inputs["X"] else []
    direction = given.get("direction", "forward")
    if direction not in _DIRECTIONS:
        faults.append(f"direction should be {', '.join(_DIRECTIONS)}, not {direction!r:.80}")
    if given.get("layout", 0) not in (0, 1):
        faults.append(f"layout should be 0 or 1, not {given['layout']!r:.80}")
    count = 2 if direction == "bidirectional" else 1
    functions = _FUNCTIONS[kind]
    default = list(functions or ("tanh",)) * count
    named = given.get("activations") or default
    activations = [str(one).lower() for one in named] if isinstance(named, list) else [str(named)]
    standard = activations == default
    if functions is None:
        standard = activations[0] in _NONLINEARITIES and activations == activations[:1] * count
    if not standard:
        faults.append(f"activations {', '.join(activations)} are not supported")
    for name in ("activation_alpha", "activation_beta"):
        faults += [f"{name} is not supported"] if given.get(name) else []
    return {
        "direction": direction,
        "layout": given.get("layout", 0),
        "hidden_size": given.get("hidden_size"),
        "nonlinearity": activations[0],
        "reset_after": bool(given.get("linear_before_reset", 0)),
    }, faults


def _plain(constants: Mapping[str, Array]) -> _Tensors:
    for name, array in constants.items():
        if array.dtype.kind != "f":
            raise ValueError(f"{name} should be of floating numbers, not {array.dtype}")
    return _Tensors(constants["W"], constants["R"], constants.get("B"))


def _dequantised(constants: Mapping[str, Array]) -> _Tensors:
    """Return the weights that quantised ones stand for: (q - zero point) scale."""
    found = []
    for name in ("W", "R"):
        quantised, scale, zero = (constants[f"{name}{end}"] for end in ("", "_scale", "_zero_point"))
        if quantised.dtype not in (np.int8, np.uint8) or zero.dtype != quantised.dtype or scale.dtype.kind != "f":
            raise ValueError(f"{name} and its zero point should be of int8 or of uint8, and its scale of float32")
        if quantised.ndim != 3 or scale.shape != zero.shape:
            raise ValueError(f"{name} should have three axes, and its scale and zero point one shape")
        directions, _, rows = quantised.shape
        if scale.shape not in ((directions,), (directions, rows)):
            raise ValueError(f"{name}_scale should be of shape ({directions},) or ({directions}, {rows})")
        scale, zero = (a.reshape(directions, 1, -1) for a in (scale, zero))
        found.append(((quantised.astype(np.float32) - zero.astype(np.float32)) * scale).swapaxes(1, 2))
    bias = {"B": constants["B"]} if "B" in constants else {}
    return _plain({"W": found[0], "R": found[1], **bias})


def _filled(kind: str, attributes: Mapping[str, Any], tensors: _Tensors, dtype: str) -> Layer:
    """Make the layer of some tensors."""
    order = _ORDERS[kind]
    count = 2 if attributes["direction"] == "bidirectional" else 1
    w, r, b = tensors
    hidden = attributes["hidden_size"]
    hidden = hidden if isinstance(hidden, int) else r.shape[-1] if r.ndim == 3 else 0
    rows = len(order) * hidden
    if w.ndim != 3 or w.shape[:2] != (count, rows) or not w.shape[2] or not rows:
        raise ValueError(f"W should be of shape ({count}, {rows}, I), not {w.shape}")
    if r.shape != (count, rows, hidden):
        raise ValueError(f"R should be of shape {(count, rows, hidden)}, not {r.shape}")
    if b is not None and b.shape != (count, 2 * rows):
        raise ValueError(f"B should be of shape {(count, 2 * rows)}, not {b.shape}")
    settings: dict[str, Any] = {"bias": b is not None, "bidirectional": count == 2, "dtype": dtype}
    settings |= {"nonlinearity": attributes["nonlinearity"]} if kind == "RNN" else {}
    settings |= {"reset_after": attributes["reset_after"]} if kind == "GRU" else {}
    made: Layer = getattr(layers, kind)(w.shape[2], hidden, **settings)
    arrays: dict[str, Array] = {}
    for place, end in enumerate(("l0", "l0_reverse")[:count]):
        arrays |= {f"weight_ih_{end}": _rows(w[place], order), f"weight_hh_{end}": _rows(r[place], order)}
        if b is not None:
            halves = np.split(b[place], 2)
            arrays |= {f"bias_ih_{end}": _rows(halves[0], order), f"bias_hh_{end}": _rows(halves[1], order)}
    made.load_state_dict(arrays)
    return made


def _rows(array: Array, order: tuple[int, ...]) -> Array:
    """Return the blocks of an array, one a gate, in another order."""
    blocks = np.split(array, len(order))
    return np.concatenate([blocks[place] for place in order])
