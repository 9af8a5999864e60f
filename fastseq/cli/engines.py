"""The engines: each turns a case into a call to time, on the same numbers and the same number of threads.

An engine is imported where its model is built, which is in a process of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from fastseq.checks import Array
from fastseq.cli.cases import Case, Numbers, numbers

Outputs = tuple[Array, ...]


@dataclass(frozen=True)
class Model:
    """A case in one engine.

    Attributes
    ----------
    call : callable
        What is timed: inputs lie ready in the layout of the engine, results are new arrays every time.
    outputs : callable
        Takes what `call` returned to y (B, T, H), h (B, H) and, for LSTM, c (B, H); in training also to the gradients
        of x, of the initial state and of the parameters in the order of the weights. Not timed.
    """

    call: Callable[[], Any]
    outputs: Callable[[Any], Outputs]


def missing(engine: str) -> list[str]:
    """The modules an engine needs that are not installed."""
    return [name for name in NEEDS[engine] if importlib.util.find_spec(name) is None]


def _layer(module: Any, dtype: str, case: Case, numbers: Numbers) -> Model:
    layer = getattr(module, case.kind.upper())(case.inputs, case.hidden, dtype=dtype)
    layer.load_state_dict(numbers.weights)
    x = numbers.x.astype(dtype)
    states = [array[:, None].astype(dtype) for array in (numbers.h, numbers.c) if array is not None]
    state = module.LSTMState(*states) if case.kind == "lstm" else module.State(*states)
    if numbers.dy is not None:
        return _training_layer(layer, x, state, numbers.dy.astype(dtype))
    if not case.step:
        return Model(lambda: layer(x, state), lambda result: (result[0], *(part[:, 0] for part in result[1])))
    x_t, out = x[:, 0], np.empty((case.batch, case.hidden), dtype)
    return Model(
        lambda: layer.step(x_t, state, out=out),
        lambda result: (result[0][:, None], *(part[:, 0] for part in result[1])),
    )


def _training_layer(layer: Any, x: Array, state: Any, dy: Array) -> Model:
    def call() -> Any:
        layer.zero_grad()
        y, end, tape = layer.forward(x, state)
        return y, end, layer.backward(dy, tape)

    def outputs(result: Any) -> Outputs:
        y, end, (dx, start) = result
        return (y, *(part[:, 0] for part in end), dx, *(part[:, 0] for part in start), *layer.grads.values())

    return Model(call, outputs)


def _fastseq(case: Case, numbers: Numbers, threads: int) -> Model:
    import fastseq

    fastseq.set_num_threads(threads)
    return _layer(fastseq, "float32", case, numbers)


def _reference(case: Case, numbers: Numbers, threads: int) -> Model:
    # NumPy takes its threads from the environment.
    from fastseq import reference

    return _layer(reference, "float32", case, numbers)


def _exact(case: Case, numbers: Numbers, threads: int) -> Model:
    from fastseq import reference

    return _layer(reference, "float64", case, numbers)


def _torch(case: Case, numbers: Numbers, threads: int) -> Model:
    import torch

    torch.set_num_threads(threads)
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[case.kind]
    layer = kind(case.inputs, case.hidden, batch_first=True)
    layer.load_state_dict({name: torch.from_numpy(array) for name, array in numbers.weights.items()})
    layer.train(case.train)
    x = torch.from_numpy(numbers.x)
    states = tuple(torch.from_numpy(array[None]) for array in (numbers.h, numbers.c) if array is not None)
    state = states if case.kind == "lstm" else states[0]
    if numbers.dy is not None:
        return _training_torch(layer, x, state, torch.from_numpy(numbers.dy))

    def call() -> Any:
        with torch.inference_mode():
            return layer(x, state)

    return Model(call, _torch_outputs)


def _training_torch(layer: Any, x: Any, state: Any, dy: Any) -> Model:
    states = state if isinstance(state, tuple) else (state,)
    leaves = [x, *states, *layer.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()

    def call() -> Any:
        for leaf in leaves:
            leaf.grad = None
        result = layer(x, state)
        result[0].backward(dy)
        return result

    def outputs(result: Any) -> Outputs:
        dx, *gradients = (leaf.grad.numpy() for leaf in leaves)
        n = len(states)
        return (*_torch_outputs(result), dx, *(part[0] for part in gradients[:n]), *gradients[n:])

    return Model(call, outputs)


def _torch_outputs(result: Any) -> Outputs:
    y, ends = result
    ends = ends if isinstance(ends, tuple) else (ends,)
    return (y.detach().numpy(), *(end[0].detach().numpy() for end in ends))


# Where each gate of ONNX stands in PyTorch's order: i o f c in i f g o, and z r h in r z n.
_ONNX_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}


def onnx_model(case: Case, numbers: Numbers) -> bytes:
    """A case as an ONNX file of one node, time-major as the operator wants it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    order = _ONNX_GATES[case.kind]

    def reordered(name: str) -> Array:
        blocks = np.split(numbers.weights[name], len(order))
        return np.concatenate([blocks[gate] for gate in order])

    constants = {
        "W": reordered("weight_ih_l0"),
        "R": reordered("weight_hh_l0"),
        "B": np.concatenate([reordered("bias_ih_l0"), reordered("bias_hh_l0")]),
    }
    parts = ["h", "c"] if case.kind == "lstm" else ["h"]
    state = [1, case.batch, case.hidden]
    settings: dict[str, Any] = {"hidden_size": case.hidden}
    if case.kind == "gru":
        settings["linear_before_reset"] = 1  # PyTorch's GRU, not the paper's
    node = helper.make_node(
        case.kind.upper(),
        ["X", "W", "R", "B", "", *(f"initial_{part}" for part in parts)],
        ["Y", *(f"Y_{part}" for part in parts)],
        **settings,
    )

    def value(name: str, shape: list[int]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        [node],
        case.kind,
        [value("X", [case.time, case.batch, case.inputs]), *(value(f"initial_{part}", state) for part in parts)],
        [value("Y", [case.time, 1, case.batch, case.hidden]), *(value(f"Y_{part}", state) for part in parts)],
        [numpy_helper.from_array(array[None], name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _onnx_inputs(numbers: Numbers) -> dict[str, Array]:
    inputs = {"X": np.ascontiguousarray(numbers.x.swapaxes(0, 1)), "initial_h": numbers.h[None]}
    if numbers.c is not None:
        inputs["initial_c"] = numbers.c[None]
    return inputs


def _onnx_outputs(result: Any) -> Outputs:
    y, *ends = result
    return (y[:, 0].swapaxes(0, 1), *(end[0] for end in ends))


def _onnxruntime(case: Case, numbers: Numbers, threads: int) -> Model:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(onnx_model(case, numbers), options, ["CPUExecutionProvider"])
    inputs = _onnx_inputs(numbers)
    return Model(lambda: session.run(None, inputs), _onnx_outputs)


def _openvino(case: Case, numbers: Numbers, threads: int) -> Model:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(onnx_model(case, numbers)), "CPU", settings).create_infer_request()
    inputs = _onnx_inputs(numbers)
    # Inputs are read where they lie. Results are copied out of the request, which writes over them next time.
    return Model(
        lambda: request.infer(inputs, share_inputs=True, share_outputs=False),
        lambda result: _onnx_outputs(result.to_tuple()),
    )


BUILDERS: dict[str, Callable[[Case, Numbers, int], Model]] = {
    "fastseq": _fastseq,
    "reference": _reference,
    "exact": _exact,
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
# What may stand after --vs, and what each needs.
NEEDS = {
    "reference": (),
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "onnx"),
}
TRAINED = ("reference", "torch")  # those of them that train


def build(engine: str, case: Case, threads: int) -> Model:
    """A case in an engine, in its own process."""
    return BUILDERS[engine](case, numbers(case), threads)


def version(engine: str) -> str:
    """The version of an engine, in its own process."""
    name = {"reference": "numpy", "exact": "numpy"}.get(engine, engine)
    module: ModuleType = importlib.import_module(name)
    return str(module.__version__)
