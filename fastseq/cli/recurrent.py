"""Recurrent layers, one in one direction, inference and training: their shapes, their numbers, and every engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastseq.checks import Array
from fastseq.cli import engines
from fastseq.cli.cases import ITEM, Case, shapes
from fastseq.cli.engines import Model, Outputs

KINDS = ("lstm", "gru", "rnn")
GATES = {"lstm": 4, "gru": 3, "rnn": 1}

# Batch, time, inputs, hidden.
SHAPES = {
    "few": ((1, 1, 64, 128), (1, 100, 256, 256), (32, 100, 128, 256)),
    "table": (
        (1, 1, 64, 128),
        (1, 100, 64, 128),
        (1, 100, 256, 256),
        (1, 50, 512, 512),
        (8, 100, 128, 256),
        (32, 100, 128, 256),
        (64, 50, 512, 512),
        (128, 32, 256, 1024),
    ),
    "train": ((8, 100, 128, 256), (32, 100, 128, 256), (64, 50, 512, 512)),
}

AXES = "B,T,I,H"


@dataclass(frozen=True)
class Recurrent(Case):
    """A layer over a shape.

    Parameters
    ----------
    kind : {"lstm", "gru", "rnn"}
    batch, time, inputs, hidden : int
    step : bool
        Whether fastseq and the reference run it through ``layer.step``. Other engines have nothing but the call.
    train : bool
        Whether it is forward and backward: the gradients of the inputs, of the initial state and of all parameters.
    """

    kind: str
    batch: int
    time: int
    inputs: int
    hidden: int
    step: bool = False
    train: bool = False

    @property
    def group(self) -> str:
        """For people."""
        return self.kind.upper()

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.kind.upper()}{' step' if self.step else ' train' if self.train else ''} {self.shape}"

    @property
    def shape(self) -> str:
        """For people: batch, time, inputs, hidden."""
        return f"{self.batch}×{self.time}×{self.inputs}×{self.hidden}"

    @property
    def label(self) -> str:
        """For people."""
        return f"{'step ' if self.step else ''}{self.shape}"

    @property
    def axes(self) -> str:
        """For people."""
        return "B×T×I×H"

    @property
    def engines(self) -> tuple[str, ...]:
        """Those that can compute it: most do not train."""
        return ("reference", "torch") if self.train else ("reference", *_PEERS)

    @property
    def usual(self) -> tuple[str, ...]:
        """Those that are measured where nobody names any: the reference takes too long to train."""
        return super().usual if self.train else self.engines

    @property
    def terms(self) -> int:
        """How many terms a result sums."""
        return (self.inputs + self.hidden) * self.time

    @property
    def outputs(self) -> int:
        """How many arrays the forward gives: y and the parts of the state. What training gives after is gradients."""
        return 3 if self.kind == "lstm" else 2

    @property
    def products(self) -> int:
        """How many products there are with each weight: in training also for the gradients of both its factors."""
        return 3 if self.train else 1

    @property
    def readings(self) -> int:
        """How many of them read the weight: all but the one that makes its gradient."""
        return 2 if self.train else 1

    @property
    def flops(self) -> int:
        """Floating-point operations in the products; a multiply-add is two."""
        return self.input_flops + self.recurrent_flops

    @property
    def input_flops(self) -> int:
        """Those with the weights of the input."""
        return 2 * self.products * self.batch * self.time * GATES[self.kind] * self.hidden * self.inputs

    @property
    def recurrent_flops(self) -> int:
        """Those with the weights of the state."""
        return 2 * self.products * self.batch * self.time * GATES[self.kind] * self.hidden * self.hidden

    @property
    def input_bytes(self) -> int:
        """Bytes of the weights of the input."""
        return ITEM * GATES[self.kind] * self.hidden * self.inputs

    @property
    def recurrent_bytes(self) -> int:
        """Bytes of the weights of the state."""
        return ITEM * GATES[self.kind] * self.hidden * self.hidden

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that have to be read: those of the state every step, those of the input once."""
        return self.readings * (self.input_bytes + self.time * self.recurrent_bytes)

    @property
    def working_set(self) -> int:
        """Bytes of weights that are read over and over, and so stand in the cache they fit into."""
        return self.recurrent_bytes + (self.input_bytes if self.time == 1 else 0)

    def floor(self, multiply_adds: float, read: float) -> float:
        """The least seconds it can take.

        Parameters
        ----------
        multiply_adds : float
            Floating-point operations a second.
        read : float
            Bytes a second out of a buffer of `working_set`.

        Notes
        -----
        The weights of the state are read again every step, those of the input once for all steps, and in training both
        once more on the way back; for each of the two counts what takes longer, to read them or to multiply. At batch 1
        reading is what binds, at large batches multiplying is.
        """
        read /= self.readings
        recurrent = max(self.recurrent_flops / multiply_adds, self.time * self.recurrent_bytes / read)
        inputs = max(self.input_flops / multiply_adds, self.input_bytes / read)
        return recurrent + inputs

    def memory(self, engines: int) -> int:
        """About how many bytes the arrays take in all processes together."""
        weights = (self.input_bytes + self.recurrent_bytes) // ITEM
        # Each engine holds its own packed copy beside the plain one; one process computes in float64.
        copies, width = 2, self.inputs + 2 * self.hidden
        if self.train:
            # The gradients, and a packed copy for them; dx, dy, and of every step the gates, twice, and the states.
            copies, width = 4, 2 * self.inputs + (2 * GATES[self.kind] + 4) * self.hidden
        return (engines * ITEM + 2 * ITEM) * (copies * weights + self.batch * self.time * width)

    def describe(self) -> dict[str, Any]:
        """For programs."""
        return {
            "kind": self.kind,
            "step": self.step,
            "train": self.train,
            "batch": self.batch,
            "time": self.time,
            "inputs": self.inputs,
            "hidden": self.hidden,
            "weight_bytes_read": self.bytes_read,
        }

    def build(self, engine: str, threads: int) -> Model:
        """The case in an engine; its outputs are those of the forward, y (B, T, H), h (B, H) and, for LSTM, c (B, H).

        In training also the gradients of x, of the initial state, and of the parameters in the order of the weights.
        """
        given = numbers(self)
        if engine in engines.OURS:
            return _layer(*engines.ours(engine, threads), self, given)
        return _PEERS[engine](self, given, threads)


def chosen(kinds: Sequence[str], texts: Sequence[str], named: str | None, train: bool) -> list[Case]:
    """The cases that some options ask for; inference of a single step of a single row also through ``layer.step``."""
    wanted: list[tuple[int, ...]] = []
    if named is not None or not texts:
        wanted += SHAPES[named or ("train" if train else "few")]
    wanted += shapes(texts, AXES)
    cases: list[Case] = []
    for kind in kinds:
        for batch, time, inputs, hidden in dict.fromkeys(wanted):
            cases.append(Recurrent(kind, batch, time, inputs, hidden, train=train))
            if batch == time == 1 and not train:
                cases.append(Recurrent(kind, batch, time, inputs, hidden, step=True))
    return cases


@dataclass(frozen=True)
class Numbers:
    """The numbers of a case, float32, the same in every process.

    Attributes
    ----------
    weights : dict
        By PyTorch's names, in PyTorch's order of gates.
    x : array of shape (B, T, I)
    h, c : arrays of shape (B, H)
        Where the rows start; not zero, so that an engine that drops or exchanges them shows it. c is the LSTM's.
    dy : array of shape (B, T, H)
        In training, the gradient that is handed to backward.
    """

    weights: dict[str, Array]
    x: Array
    h: Array
    c: Array | None
    dy: Array | None


def numbers(case: Recurrent) -> Numbers:
    """The numbers of a case; they depend on the case alone."""
    seed = [KINDS.index(case.kind), case.batch, case.time, case.inputs, case.hidden]
    rng = np.random.default_rng(seed)
    rows, bound = GATES[case.kind] * case.hidden, case.hidden**-0.5

    def uniform(bound: float, *shape: int) -> Array:
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    weights = {
        "weight_ih_l0": uniform(bound, rows, case.inputs),
        "weight_hh_l0": uniform(bound, rows, case.hidden),
        "bias_ih_l0": uniform(bound, rows),
        "bias_hh_l0": uniform(bound, rows),
    }
    x = rng.standard_normal((case.batch, case.time, case.inputs), np.float32)
    h = uniform(0.5, case.batch, case.hidden)
    c = uniform(1.0, case.batch, case.hidden) if case.kind == "lstm" else None
    dy = rng.standard_normal((case.batch, case.time, case.hidden), np.float32) if case.train else None
    return Numbers(weights, x, h, c, dy)


def _layer(module: Any, dtype: str, case: Recurrent, numbers: Numbers) -> Model:
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


def _torch(case: Recurrent, numbers: Numbers, threads: int) -> Model:
    torch = engines.torch(threads)
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


def onnx_model(case: Recurrent, numbers: Numbers) -> bytes:
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


def _onnx_outputs(results: Sequence[Array]) -> Outputs:
    y, *ends = results
    return (y[:, 0].swapaxes(0, 1), *(end[0] for end in ends))


def _onnxruntime(case: Recurrent, numbers: Numbers, threads: int) -> Model:
    return engines.onnxruntime(onnx_model(case, numbers), _onnx_inputs(numbers), threads, _onnx_outputs)


def _openvino(case: Recurrent, numbers: Numbers, threads: int) -> Model:
    return engines.openvino(onnx_model(case, numbers), _onnx_inputs(numbers), threads, _onnx_outputs)


_PEERS: dict[str, Callable[[Recurrent, Numbers, int], Model]] = {
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
