"""The reference and the compiled layers against ONNX Runtime, which has both GRUs and the sigmoid RNN.

ONNX orders the gates i o f c (LSTM) and z r h (GRU), puts time before the batch, and directions before the batch
in states.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from common import (
    KINDS,
    NOT_IN_ONNX,
    Array,
    assert_agree,
    assert_close,
    inputs,
    make,
    random_state,
    reduction,
    tolerance,
)

import fastseq as fs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: take the extra 'test'")
    ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: take the extra 'test'")

ORDER = {"RNN": [0], "LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2]}  # where each of ONNX's gates stands in ours
SHARED = [kind for kind in KINDS if kind not in NOT_IN_ONNX]


def gates(array: Array, order: list[int]) -> Array:
    return np.concatenate([np.split(array, len(order))[gate] for gate in order])


def session(layer: Any, direction: str, suffixes: list[str], use_lengths: bool) -> Any:
    """One ONNX operator with the weights of a one-layer layer, for some of its directions."""
    kind, weights = type(layer).__name__, layer.state_dict()
    order = ORDER[kind]
    settings: dict[str, Any] = {"hidden_size": layer.hidden_size, "direction": direction}
    if kind == "RNN":
        name = {"tanh": "Tanh", "relu": "Relu", "sigmoid": "Sigmoid"}[layer.nonlinearity]
        settings["activations"] = [name] * len(suffixes)
    if kind == "GRU":
        settings["linear_before_reset"] = int(layer.reset_after)

    def stacked(part: str) -> Array:
        return np.stack([gates(weights[f"{part}_l0{suffix}"], order) for suffix in suffixes])

    constants = {"W": stacked("weight_ih"), "R": stacked("weight_hh")}
    if layer.bias:
        constants["B"] = np.concatenate([stacked("bias_ih"), stacked("bias_hh")], axis=1)
    names = ["X", "W", "R", "B" if layer.bias else "", "lengths" if use_lengths else "", "h"]
    outs = ["Y", "h_n"]
    if kind == "LSTM":
        names.append("c")
        outs.append("c_n")
    real = onnx.TensorProto.FLOAT
    info = onnx.helper.make_tensor_value_info
    free = [info("X", real, [None, None, layer.input_size])]
    free += [info("lengths", onnx.TensorProto.INT32, [None])] if use_lengths else []
    free += [info(name, real, [len(suffixes), None, layer.hidden_size]) for name in names[5:]]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(kind, names, outs, **settings)],
        "layer",
        free,
        [info(name, real, None) for name in outs],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def call(layer: Any, direction: str, x: Array, state: Any, lengths: Any = None) -> tuple[Array, Any]:
    """ONNX Runtime on arrays in our order of axes."""
    suffixes = {"forward": [""], "reverse": ["_reverse"], "bidirectional": ["", "_reverse"]}[direction]
    feed = {"X": np.ascontiguousarray(x.swapaxes(0, 1))}
    for name, array in zip(state._fields, state, strict=True):
        feed[name] = np.ascontiguousarray(array.swapaxes(0, 1))
    if lengths is not None:
        feed["lengths"] = np.asarray(lengths, "int32")
    y, *ends = session(layer, direction, suffixes, lengths is not None).run(None, feed)
    return y.transpose(2, 0, 1, 3).reshape(*x.shape[:2], -1), type(state)(*(end.swapaxes(0, 1) for end in ends))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("lengths", [None, [3, 7, 1, 7, 2, 5]], ids=["whole", "lengths"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("kind", SHARED)
def test_against_onnxruntime(kind: str, direction: str, lengths: Any, bias: bool) -> None:
    layer = make(kind, 5, 8, bidirectional=direction == "bidirectional", bias=bias)
    exact = make(kind, 5, 8, bidirectional=direction == "bidirectional", bias=bias, module=fs.reference)
    x, state = inputs((6, 7, 5)), random_state(layer, 6)
    expected = call(layer, direction, x, state, lengths)
    relative = tolerance("float32", reduction(layer), 7)
    assert_agree(exact(x, state, lengths=lengths), expected, relative, "reference")
    assert_agree(layer(x, state, lengths=lengths), expected, relative, "compiled")


@pytest.mark.parametrize("lengths", [None, [3, 7, 1, 7, 2, 5]], ids=["whole", "lengths"])
@pytest.mark.parametrize("kind", SHARED)
def test_the_reverse_direction_alone(kind: str, lengths: Any) -> None:
    layer = make(kind, 5, 8, bidirectional=True)
    x, state = inputs((6, 7, 5)), random_state(layer, 6)
    only = type(state)(*(array[:, 1:] for array in state))
    expected, end = call(layer, "reverse", x, only, lengths)
    y, ours = layer(x, state, lengths=lengths)
    assert_close(y[..., 8:], expected, tolerance("float32", 13, 7))
    for one, other in zip(ours, end, strict=True):
        assert_close(one[:, 1:], other, tolerance("float32", 13, 7))


@pytest.mark.parametrize("kind", SHARED)
def test_a_larger_layer(kind: str) -> None:
    layer = make(kind, 40, 130, bidirectional=True)
    x, state, lengths = inputs((9, 25, 40)), random_state(layer, 9), [25, 3, 7, 1, 25, 12, 13, 2, 24]
    expected = call(layer, "bidirectional", x, state, lengths)
    assert_agree(layer(x, state, lengths=lengths), expected, tolerance("float32", reduction(layer), 25))
