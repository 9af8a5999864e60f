"""What is benchmarked: one layer in one direction over one shape, its numbers, and the work in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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

ITEM = 4  # bytes in a float32


@dataclass(frozen=True)
class Case:
    """One row of the table.

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
    def name(self) -> str:
        """For people."""
        return f"{self.kind.upper()}{' step' if self.step else ' train' if self.train else ''} {self.shape}"

    @property
    def shape(self) -> str:
        """For people: batch, time, inputs, hidden."""
        return f"{self.batch}×{self.time}×{self.inputs}×{self.hidden}"

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

    @property
    def intensity(self) -> float:
        """Floating-point operations for each byte of weights read."""
        return self.flops / self.bytes_read

    def memory(self, engines: int) -> int:
        """About how many bytes the arrays take in all processes together."""
        weights = (self.input_bytes + self.recurrent_bytes) // ITEM
        # Each engine holds its own packed copy beside the plain one; one process computes in float64.
        copies, width = 2, self.inputs + 2 * self.hidden
        if self.train:
            # The gradients, and a packed copy for them; dx, dy, and of every step the gates, twice, and the states.
            copies, width = 4, 2 * self.inputs + (2 * GATES[self.kind] + 4) * self.hidden
        return (engines * ITEM + 2 * ITEM) * (copies * weights + self.batch * self.time * width)


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


def numbers(case: Case) -> Numbers:
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
