"""Softmax attention over heads: full, causal, and causal forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastseq.bench.cases import ITEM, Case, shapes
from fastseq.checks import Array

AXES = "B,heads,T,D"
SHAPES = ((1, 12, 128, 64), (8, 8, 128, 64), (1, 12, 1024, 64), (2, 12, 1024, 64))


@dataclass(frozen=True)
class Attention(Case):
    """Attention over a shape.

    Parameters
    ----------
    batch, heads, time, width : int
        Of queries, keys and values, all (B, heads, T, D).
    causal : bool
        Whether each query attends only to the keys up to its own.
    train : bool
        Whether it is forward and backward: the gradients of queries, keys and values follow the output.
    """

    batch: int
    heads: int
    time: int
    width: int
    causal: bool = False
    train: bool = False

    @property
    def group(self) -> str:
        """Rows that share a geometric mean and a panel of the plot."""
        return f"{'causal' if self.causal else 'full'}{' train' if self.train else ''}"

    @property
    def name(self) -> str:
        """Display name of the case."""
        return f"{self.group} {self.label}"

    @property
    def label(self) -> str:
        """Display name of the case within its group."""
        return f"{self.batch}×{self.heads}×{self.time}×{self.width}"

    @property
    def axes(self) -> str:
        """Names of the numbers in the label."""
        return "B×heads×T×D"

    @property
    def engines(self) -> tuple[str, ...]:
        """Those that can compute it: a graph does not train."""
        return ("reference", "torch") if self.train else ("reference", "torch", "onnxruntime", "openvino")

    @property
    def usual(self) -> tuple[str, ...]:
        """All of them."""
        return self.engines

    @property
    def terms(self) -> int:
        """How many terms a result sums: those of a score, and the keys."""
        return self.width + self.time

    @property
    def pairs(self) -> int:
        """Of a query and a key that it may attend to."""
        each = self.time * (self.time + 1) // 2 if self.causal else self.time * self.time
        return self.batch * self.heads * each

    @property
    def flops(self) -> int:
        """Those of q k and of weights v; on the way back, of each product the gradients of both factors.

        Scores that are computed once more on the way back, so that they need not be kept, are not counted.
        """
        return 2 * (6 if self.train else 2) * self.pairs * self.width

    @property
    def bytes_read(self) -> int:
        """Bytes of queries, keys and values; in training once more on the way back, with the gradient."""
        return ITEM * (7 if self.train else 3) * self._size

    @property
    def working_set(self) -> int:
        """Bytes of queries, keys and values."""
        return ITEM * 3 * self._size

    @property
    def _size(self) -> int:
        return self.batch * self.heads * self.time * self.width

    def memory(self, engines: int) -> int:
        """About how many bytes the arrays take in all processes together: most hold all the scores."""
        scores = self.batch * self.heads * self.time * self.time
        return (engines * ITEM + 2 * ITEM) * ((10 if self.train else 4) * self._size + 2 * scores)

    def describe(self) -> dict[str, Any]:
        """Kind and sizes of the case, for JSON."""
        return {
            "kind": "attention",
            "causal": self.causal,
            "train": self.train,
            "batch": self.batch,
            "heads": self.heads,
            "time": self.time,
            "width": self.width,
            "bytes_read": self.bytes_read,
        }


def chosen(texts: Sequence[str]) -> list[Case]:
    """The cases that the values of --shape ask for, or the usual ones."""
    return [
        Attention(batch, heads, time, width, causal, train)
        for causal, train in ((False, False), (True, False), (True, True))
        for batch, heads, time, width in shapes(texts, AXES) or SHAPES
    ]


def numbers(case: Attention) -> Array:
    """Queries, keys, values, and the gradient of the outputs, float32; they depend on the shape alone."""
    shape = case.batch, case.heads, case.time, case.width
    return np.random.default_rng(shape).standard_normal((4, *shape), np.float32)
