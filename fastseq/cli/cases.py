"""What is benchmarked: what every row of the table can say of itself, whatever it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastseq.cli import UsageError
from fastseq.cli.engines import Model

ITEM = 4  # bytes in a float32


class Case:
    """One row of the table: a value that is compared, hashed, and sent to the processes of the engines.

    What it computes, on which numbers, follows from the case alone, so that all engines compute the same.
    """

    @property
    def group(self) -> str:
        """For people: the rows that a geometric mean is taken over, and that share a panel of the plot."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """For people."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """For people: which of its group it is."""
        raise NotImplementedError

    @property
    def axes(self) -> str:
        """For people: what the numbers in the name are."""
        raise NotImplementedError

    @property
    def notes(self) -> tuple[str, ...]:
        """For people: what else there is to know."""
        return ()

    @property
    def train(self) -> bool:
        """Whether it is forward and backward."""
        return False

    @property
    def engines(self) -> tuple[str, ...]:
        """Those that can compute it, beside fastseq."""
        raise NotImplementedError

    @property
    def usual(self) -> tuple[str, ...]:
        """Those of them that are measured where nobody names any."""
        return tuple(engine for engine in self.engines if engine != "reference")

    @property
    def outputs(self) -> int:
        """How many arrays, of those that `build` gives, are the forward's. What comes after is gradients."""
        return 1

    @property
    def terms(self) -> int:
        """How many terms the sums have that a result goes through, one after another."""
        raise NotImplementedError

    @property
    def flops(self) -> int:
        """Floating-point operations in the products that have to be computed; a multiply-add is two."""
        raise NotImplementedError

    @property
    def bytes_read(self) -> int:
        """Bytes that have to be read."""
        raise NotImplementedError

    @property
    def working_set(self) -> int:
        """Bytes that are read again in every call, and so stand in the cache they fit into."""
        return self.bytes_read

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

    def memory(self, engines: int) -> int:
        """About how many bytes the arrays take in all processes together."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """For programs: its kind and its numbers."""
        raise NotImplementedError

    def build(self, engine: str, threads: int) -> Model:
        """The case in an engine, in the engine's own process."""
        raise NotImplementedError


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
