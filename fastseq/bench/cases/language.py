"""A whole step of training a character Transformer: forward, backward, clipping and AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastseq.bench import UsageError
from fastseq.bench.cases import ITEM, Case, shapes
from fastseq.checks import Array

AXES = "layers,width,heads,B,T"
SHAPES = ((4, 128, 4, 12, 64), (6, 384, 6, 8, 256))
SYMBOLS = 96
MAX_NORM = 1.0
# With the usual eps of 1e-8 an element whose gradient is rounding and nothing else moves as far as all others, forward
# or back as it happens, and parameters could not be compared after some steps.
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-4, "weight_decay": 0.1}
STEPS_COMPARED = 3


@dataclass(frozen=True)
class Step(Case):
    """A step of the Transformer in the arrangement of GPT-2: pre-norm, tanh GELU, learned positions, tied output.

    Parameters
    ----------
    layers, width, heads : int
        The feed-forward is four times as wide within.
    batch, time : int
        Of symbols; there are as many positions as time steps.

    Notes
    -----
    Outputs are loss and norm, then the clipped gradients of the first step and the parameters after three, in the order
    of the weights.
    """

    layers: int
    width: int
    heads: int
    batch: int
    time: int

    @property
    def group(self) -> str:
        """Rows that share a geometric mean and a panel of the plot."""
        return "step"

    @property
    def name(self) -> str:
        """Display name of the case."""
        return f"step {self.label}"

    @property
    def label(self) -> str:
        """Display name of the case within its group."""
        return f"{self.layers}×{self.width}×{self.heads}, {self.batch}×{self.time}"

    @property
    def axes(self) -> str:
        """Names of the numbers in the label."""
        return "layers×width×heads, B×T"

    @property
    def train(self) -> bool:
        """It is."""
        return True

    @property
    def engines(self) -> tuple[str, ...]:
        """Those that train."""
        return ("reference", "torch")

    @property
    def outputs(self) -> int:
        """Loss and norm."""
        return 2

    @property
    def terms(self) -> int:
        """How many terms a gradient sums: in one layer after another, over all symbols."""
        return self.layers * 8 * self.width * self.batch * self.time

    @property
    def weights(self) -> int:
        """How many there are in products, those of the output among them."""
        return self.width * (12 * self.layers * self.width + SYMBOLS)

    @property
    def flops(self) -> int:
        """Those of all linear maps and of causal attention, and on the way back of the gradients of both factors."""
        attention = 4 * self.layers * self.width * self.batch * (self.time * (self.time + 1) // 2)
        return 3 * (2 * self.weights * self.batch * self.time + attention)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights: once on the way forward, once on the way back."""
        return 2 * self.working_set

    @property
    def working_set(self) -> int:
        """Bytes of weights."""
        return ITEM * self.weights

    def memory(self, engines: int) -> int:
        """About how many bytes the arrays take in all processes together."""
        of_token = self.layers * (40 * self.width + 2 * self.heads * self.time) + 4 * SYMBOLS
        # The weights, packed weights, gradients, what AdamW keeps of each, and what is new.
        return (engines * ITEM + 2 * ITEM) * (7 * self.weights + self.batch * self.time * of_token)

    def describe(self) -> dict[str, Any]:
        """Kind and sizes of the case, for JSON."""
        return {
            "kind": "train",
            "train": True,
            "layers": self.layers,
            "width": self.width,
            "heads": self.heads,
            "batch": self.batch,
            "time": self.time,
            "symbols": SYMBOLS,
            "weight_bytes_read": self.bytes_read,
        }


def chosen(texts: Sequence[str]) -> list[Case]:
    """The cases that the values of --shape ask for, or the usual ones."""
    wanted = shapes(texts, AXES)
    for _, width, heads, _, _ in wanted:
        if width % heads:
            raise UsageError(f"--shape should have a number of heads that divides the width {width}, not {heads}")
    return [Step(layers, width, heads, batch, time) for layers, width, heads, batch, time in wanted or SHAPES]


@dataclass(frozen=True)
class Numbers:
    """The numbers of a case, the same in every process.

    Attributes
    ----------
    weights : dict
        Float32, by the names they have in `fastseq.models.TransformerLM`.
    inputs, targets : arrays of shape (B, T)
        Ids.
    """

    weights: dict[str, Array]
    inputs: Array
    targets: Array


def numbers(case: Step) -> Numbers:
    """The numbers of a case; they depend on the case alone."""
    rng = np.random.default_rng([case.layers, case.width, case.heads, case.batch, case.time])
    given = weights(rng, case.layers, case.width, SYMBOLS, case.time, 0.3)
    frequency = 1 / np.arange(1, SYMBOLS + 1)
    inputs, targets = rng.choice(SYMBOLS, (2, case.batch, case.time), p=frequency / frequency.sum())
    return Numbers(given, inputs, targets)


def weights(
    rng: np.random.Generator,
    layers: int,
    width: int,
    symbols: int,
    context: int,
    deviation: float,
    sharpness: float = 1.0,
) -> dict[str, Array]:
    """Random weights in the arrangement of GPT-2, float32, by the names of `fastseq.models.TransformerLM`.

    Parameters
    ----------
    rng : Generator
    layers, width, symbols, context : int
        There are as many positions as `context` says.
    deviation : float
        That of the embedding, which is the output too, and of the positions.
    sharpness : float
        What the weights of queries and keys are multiplied by, each: the larger, the fewer keys a query attends to.
    """
    inner = 4 * width

    def normal(deviation: float, *shape: int) -> Array:
        return np.float32(deviation) * rng.standard_normal(shape, np.float32)

    def norm(name: str) -> dict[str, Array]:
        return {f"{name}.weight": 1 + normal(0.1, width), f"{name}.bias": normal(0.1, width)}

    def linear(name: str, outputs: int, inputs: int) -> dict[str, Array]:
        return {f"{name}.weight": normal(inputs**-0.5, outputs, inputs), f"{name}.bias": normal(0.1, outputs)}

    # One symbol more: the begin of a text.
    result = {
        "embedding.weight": normal(deviation, symbols + 1, width),
        "positions.weight": normal(deviation, context, width),
    }
    for i in range(layers):
        layer = f"encoder.layers.{i}"
        result |= {
            f"{layer}.self_attn.in_proj_weight": normal(width**-0.5, 3 * width, width),
            f"{layer}.self_attn.in_proj_bias": normal(0.1, 3 * width),
            **linear(f"{layer}.self_attn.out_proj", width, width),
            **linear(f"{layer}.linear1", inner, width),
            **linear(f"{layer}.linear2", width, inner),
            **norm(f"{layer}.norm1"),
            **norm(f"{layer}.norm2"),
        }
        result[f"{layer}.self_attn.in_proj_weight"][: 2 * width] *= np.float32(sharpness)
    return result | norm("encoder.norm")
