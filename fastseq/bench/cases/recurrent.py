"""Recurrent layers, one in one direction, inference and training: their shapes and their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastseq.bench.cases import ITEM, Case, Outputs, shapes
from fastseq.checks import Array

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

    Notes
    -----
    Outputs are y (B, T, H), h (B, H) and, for LSTM, c (B, H); in training then the gradients of x, of the initial
    state, and of the parameters in the order of the weights.
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
        """Rows that share a geometric mean and a panel of the plot."""
        return self.kind.upper()

    @property
    def name(self) -> str:
        """Display name of the case."""
        return f"{self.kind.upper()}{' step' if self.step else ' train' if self.train else ''} {self.shape}"

    @property
    def shape(self) -> str:
        """Batch, time, inputs and hidden units as text."""
        return f"{self.batch}×{self.time}×{self.inputs}×{self.hidden}"

    @property
    def label(self) -> str:
        """Display name of the case within its group."""
        return f"{'step ' if self.step else ''}{self.shape}"

    @property
    def axes(self) -> str:
        """Names of the numbers in the label."""
        return "B×T×I×H"

    @property
    def engines(self) -> tuple[str, ...]:
        """Those that can compute it: most do not train."""
        return ("reference", "torch") if self.train else ("reference", "torch", "onnxruntime", "openvino")

    @property
    def narrow(self) -> Mapping[str, tuple[str, ...]]:
        """Inference alone."""
        if self.train:
            return {}
        ours = ("fastseq", "reference", "torch")
        return {"bfloat16": (*ours, "openvino"), "int8": (*ours, "onnxruntime")}

    @property
    def error_means(self) -> str:
        """They are below 1, so the difference itself is told."""
        return "the largest difference of outputs"

    def difference(self, outputs: Outputs, expected: Outputs) -> float | None:
        """That of y."""
        return float(np.max(np.abs(outputs[0] - expected[0])))

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
        """Kind and sizes of the case, for JSON."""
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
