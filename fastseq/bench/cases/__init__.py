"""Cases of the benchmark: what each row of the table computes, on which numbers, and how its results are compared.

A case knows no engine except by name; `fastseq.bench.engines` builds it. The name of an engine that computes with
narrow weights has their type behind it: "torch int8".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastseq.bench import UsageError
from fastseq.checks import Array

Outputs = tuple[Array, ...]

ITEM = 4  # bytes in a float32
OF_GRADIENTS = 4  # how many times as far off gradients may be: they are sums over what was rounded on the way there


class Verdict(NamedTuple):
    """What comes out where the outputs of an engine are compared with those of the float64 reference.

    Attributes
    ----------
    error : float, optional
        Of numbers: the largest difference over the largest magnitude.
    fault : str, optional
        What is wrong, if anything is.
    allowed : float
        How far off what is wrong might have been.
    symbols : tuple of two ints, optional
        Of symbols that were chosen: how many were compared, of how many.
    alike : tuple of two ints, optional
        Of rows of symbols: how many are those of the reference to the end, of how many.
    """

    error: float | None
    fault: str | None
    allowed: float
    symbols: tuple[int, int] | None = None
    alike: tuple[int, int] | None = None


def named(engine: str, weights: str) -> str:
    """The name of an engine that computes with weights of a type."""
    return engine if weights == "float32" else f"{engine} {weights}"


def name_and_weights(engine: str) -> tuple[str, str]:
    """What `named` put together."""
    name, _, weights = engine.partition(" ")
    return name, weights or "float32"


class Case(ABC):
    """One row of the table: a value that is compared, hashed, and sent to the processes of the engines.

    What it computes, on which numbers, follows from the case alone, so that all engines compute the same.
    """

    @property
    @abstractmethod
    def group(self) -> str:
        """Rows that share a geometric mean and a panel of the plot."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Display name of the case, e.g. "LSTM 1×100×64×128"."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Display name of the case within its group."""

    @property
    @abstractmethod
    def axes(self) -> str:
        """Names of the numbers in the label, e.g. "B×T×I×H"."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines printed above the table."""
        return ()

    @property
    def train(self) -> bool:
        """Whether it is forward and backward."""
        return False

    @property
    @abstractmethod
    def engines(self) -> tuple[str, ...]:
        """Those that can compute it, beside fastseq."""

    @property
    def narrow(self) -> Mapping[str, tuple[str, ...]]:
        """By type of narrow weights, the engines that may have a way to compute with them."""
        return {}

    def computed_by(self, engine: str) -> bool:
        """Whether an engine, with the weights that its name says, can compute it."""
        name, weights = name_and_weights(engine)
        able = ("fastseq", *self.engines) if weights == "float32" else self.narrow.get(weights, ())
        return name in able

    @property
    def usual(self) -> tuple[str, ...]:
        """Those of them that are measured where nobody names any."""
        return tuple(engine for engine in self.engines if engine != "reference")

    @property
    def outputs(self) -> int:
        """How many of the arrays that an engine returns are the forward's; those after them are gradients."""
        return 1

    def needs(self, engine: str) -> tuple[str, ...]:
        """The modules that an engine needs for it besides those it always needs."""
        return ()

    def compare(self, engine: str, outputs: Outputs, expected: Outputs, allowed: float) -> Verdict:
        """Hold what an engine computed against the float64 reference.

        Parameters
        ----------
        engine : str
        outputs, expected : tuple of arrays
            The arrays of the engine and of ``"exact"``.
        allowed : float
            How far from it results may be, over the largest magnitude.
        """
        results, gradients = slice(self.outputs), slice(self.outputs, None)
        error = largest_error(outputs[results], expected[results])
        in_gradients = largest_error(outputs[gradients], expected[gradients])
        worst = max(error, in_gradients)
        if error > allowed:
            return Verdict(worst, f"differs from the reference by {error:.1e} of its largest value", allowed)
        if in_gradients > OF_GRADIENTS * allowed:
            fault = f"differs from the reference by {in_gradients:.1e} of a gradient's largest value"
            return Verdict(worst, fault, OF_GRADIENTS * allowed)
        return Verdict(worst, None, allowed)

    @property
    def choices(self) -> int:
        """How many symbols engines choose the likeliest one of; 0: they choose none."""
        return 0

    @property
    def error_means(self) -> str:
        """What is told as the error of an engine where weights are narrow."""
        return "the largest difference of outputs, over the largest magnitude"

    def difference(self, outputs: Outputs, expected: Outputs) -> float | None:
        """The largest difference of outputs, where that is told in the place of the one over the largest magnitude."""
        return None

    @property
    @abstractmethod
    def terms(self) -> int:
        """Number of terms in the sums behind a result, over all layers in order."""

    @property
    @abstractmethod
    def flops(self) -> int:
        """Floating-point operations in the products that have to be computed; a multiply-add is two."""

    @property
    @abstractmethod
    def bytes_read(self) -> int:
        """Bytes that have to be read."""

    @property
    def working_set(self) -> int:
        """Bytes that are read again in every call, and so stand in the cache they fit into."""
        return self.bytes_read

    @property
    def unit(self) -> str:
        """Unit of speed, one for all cases of a kind."""
        return "GFLOP/s"

    @property
    def work(self) -> float:
        """What a call does, in `unit` times seconds."""
        return self.flops / 1e9

    @property
    def intensity(self) -> float:
        """Floating-point operations for each byte read."""
        return self.flops / self.bytes_read

    def floor(self, multiply_adds: float, read: float) -> float:
        """The least seconds it can take: to multiply, or to read, whichever takes longer.

        Parameters
        ----------
        multiply_adds : float
            Floating-point operations a second.
        read : float
            Bytes a second out of a buffer of `working_set`.
        """
        return max(self.flops / multiply_adds, self.bytes_read / read)

    @abstractmethod
    def memory(self, engines: int) -> int:
        """About how many bytes the arrays take in all processes together."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Kind and sizes of the case, for JSON."""


def shapes(texts: Sequence[str], axes: str) -> list[tuple[int, ...]]:
    """The values of --shape, as many numbers as there are axes, from 1 on."""
    wanted = []
    for text in texts:
        parts = [part.strip() for part in text.split(",")]
        numbers = all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts)
        if not numbers or len(parts) != len(axes.split(",")):
            raise UsageError(f"--shape should be whole numbers {axes}, not {text!r}")
        shape = tuple(map(int, parts))
        if min(shape) < 1:
            raise UsageError(f"--shape should be of numbers from 1 on, not {text!r}")
        wanted.append(shape)
    return list(dict.fromkeys(wanted))


def largest_error(outputs: Outputs, expected: Outputs) -> float:
    """The largest difference over the largest magnitude, of the worst array; infinite where shapes differ, or NaN."""
    if [array.shape for array in outputs] != [array.shape for array in expected]:
        return math.inf
    errors = [np.max(np.abs(one - other)) / np.max(np.abs(other)) for one, other in zip(outputs, expected, strict=True)]
    return float(max(errors, default=0)) if np.all(np.isfinite(errors)) else math.inf


ERROR_OF_SYMBOLS = "the share of symbols that float64 would choose, too, after the same text"


def compare_symbols(ids: Array, expected: Array, margins: Array, allowed: float) -> Verdict:
    """Compare greedily chosen symbols with those of the reference.

    Where the two likeliest are as good as equal, rounding chooses, and what follows in this row is another text.

    Parameters
    ----------
    ids, expected : arrays of shape (B, T)
    margins : array of shape (B, T)
        By how much the symbol that was expected is likelier than any other: the difference of the logits, over the
        largest magnitude of one.
    allowed : float
        The largest margin at which the symbols may differ.
    """
    if ids.shape != expected.shape:
        fault = f"chose symbols of shape {ids.shape} where the reference chose {expected.shape}"
        return Verdict(None, fault, allowed, (0, expected.size), (0, len(expected)))
    compared = alike = 0
    for i, (row, wanted) in enumerate(zip(ids, expected, strict=True)):
        different = np.flatnonzero(row != wanted)
        first = int(different[0]) if len(different) else len(row)
        compared += first
        alike += not len(different)
        if len(different) and margins[i, first] > allowed:
            fault = (
                f"chose {row[first]} and not {wanted[first]} at symbol {first} of row {i}, which the reference likes"
                f" more by {margins[i, first]:.1e} of its largest logit"
            )
            return Verdict(None, fault, allowed, (compared, expected.size), (alike, len(ids)))
    return Verdict(None, None, allowed, (compared, expected.size), (alike, len(ids)))
