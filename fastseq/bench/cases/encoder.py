"""A whole encoder, that of MiniLM: ids to a vector for every token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastseq.bench import UsageError
from fastseq.bench.cases import ITEM, Case, minilm, shapes
from fastseq.bench.cases.minilm import MINILM, Architecture
from fastseq.checks import Array

AXES = "B,T"
SHAPES = ((1, 8), (1, 32), (1, 128), (1, 512), (8, 128), (32, 64))
MIXED = (32, 128, 8)  # batch, longest and shortest row


@dataclass(frozen=True)
class Encoder(Case):
    """The encoder over a batch.

    Parameters
    ----------
    batch, time : int
    shortest : int, optional
        Rows have lengths from this one to `time`, uniform; by default all are full. Engines that know no lengths get
        the batch padded, with its mask.
    architecture : Architecture
    weights : path, optional
        Where they are; random ones by default.

    Notes
    -----
    The output is the vectors of all real tokens, row after row.
    """

    batch: int
    time: int
    shortest: int | None = None
    architecture: Architecture = MINILM
    weights: Path | None = None

    @property
    def group(self) -> str:
        """Rows that share a geometric mean and a panel of the plot."""
        return "full rows" if self.shortest is None else "mixed lengths"

    @property
    def name(self) -> str:
        """Display name of the case."""
        return f"encoder {self.label}"

    @property
    def label(self) -> str:
        """Display name of the case within its group."""
        return f"{self.batch}×{self.time if self.shortest is None else f'({self.shortest} to {self.time})'}"

    @property
    def axes(self) -> str:
        """Names of the numbers in the label."""
        return "B×T"

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines printed above the table."""
        a = self.architecture
        which = "random weights" if self.weights is None else f"weights of all-MiniLM-L6-v2 ({minilm.PACKAGE})"
        return (f"encoder: {a.layers} layers, width {a.width}, {a.heads} heads, {a.inner} within, {which}",)

    @property
    def engines(self) -> tuple[str, ...]:
        """All."""
        return ("reference", "torch", "onnxruntime", "openvino", "ctranslate2")

    @property
    def narrow(self) -> Mapping[str, tuple[str, ...]]:
        """OpenVINO has int8 only for models that were quantised with data."""
        ours = ("fastseq", "reference", "torch", "ctranslate2")
        return {"bfloat16": (*ours, "openvino"), "int8": (*ours, "onnxruntime")}

    @property
    def lengths(self) -> Array:
        """The real tokens of each row."""
        if self.shortest is None:
            return np.full(self.batch, self.time)
        lengths = np.random.default_rng([self.batch, self.time]).integers(self.shortest, self.time + 1, self.batch)
        lengths[0] = self.time  # so that the batch is of its shape
        return lengths

    @property
    def real(self) -> Array:
        """Which tokens are real, (B, T) bool; the others are padding."""
        real: Array = np.arange(self.time) < self.lengths[:, None]
        return real

    def ids(self) -> Array:
        """The tokens, (B, T) int32, 0 where there is padding; they depend on the case alone."""
        rng = np.random.default_rng([self.batch, self.time, self.architecture.vocabulary])
        ids = rng.integers(0, self.architecture.vocabulary, (self.batch, self.time), np.int32)
        ids[~self.real] = 0
        return ids

    def bert_weights(self) -> dict[str, Array]:
        """The weights by the names they have in BERT."""
        return minilm.weights(self.architecture, self.weights)

    @property
    def terms(self) -> int:
        """How many terms a result sums, in one layer after another."""
        a = self.architecture
        return a.layers * (4 * a.width + a.inner + self.time)

    @property
    def flops(self) -> int:
        """Those of all linear maps and of attention, real tokens alone."""
        a, lengths = self.architecture, [int(length) for length in self.lengths]
        pairs = sum(length * length for length in lengths)
        return 2 * a.weights_of_layers * sum(lengths) + 4 * a.layers * a.width * pairs

    @property
    def bytes_read(self) -> int:
        """Bytes of the weights of all layers."""
        return ITEM * self.architecture.weights_of_layers

    def memory(self, engines: int) -> int:
        """About how many bytes the arrays take in all processes together."""
        a = self.architecture
        of_token = 8 * a.width + 2 * a.inner + 2 * a.heads * self.time
        # Plain and packed weights; files of them, and what is made of these.
        return (engines * ITEM + 2 * ITEM) * (4 * a.weights + self.batch * self.time * of_token)

    def describe(self) -> dict[str, Any]:
        """Kind and sizes of the case, for JSON."""
        return {
            "kind": "encoder",
            "train": self.train,
            "batch": self.batch,
            "time": self.time,
            "shortest": self.shortest,
            "tokens": int(self.lengths.sum()),
            "architecture": vars(self.architecture),
            "real_weights": self.weights is not None,
            "weight_bytes_read": self.bytes_read,
        }


def chosen(texts: Sequence[str]) -> list[Case]:
    """The cases that the values of --shape ask for, or the usual ones."""
    weights, wanted = minilm.real_weights(), shapes(texts, AXES)
    for _, time in wanted:
        if time > MINILM.positions:
            raise UsageError(f"--shape should have a T up to {MINILM.positions}, not {time}")
    rows: list[tuple[int, int, int | None]] = [(batch, time, None) for batch, time in wanted or SHAPES]
    if not wanted:
        rows.append(MIXED)
    return [Encoder(*row, architecture=MINILM, weights=weights) for row in rows]
