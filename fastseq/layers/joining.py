"""Add, Multiply, Concatenate and Slice: layers without parameters for graphs. The arithmetic is in their operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.layers.base import Configured, Pointwise, Tape
from fastseq.layers.connectable import OUTPUT
from fastseq.layers.settings import KW_ONLY, Dtype, floating, size


class Joining(Configured):
    """What layers of several arrays share: shapes."""

    _kind: ClassVar[str]

    _: KW_ONLY
    dtype: Dtype = floating(default="float32", of="outputs")

    def __call__(self, *arrays: Any) -> Array:
        """Apply the layer; inference.

        Parameters
        ----------
        *arrays : arrays of shape (..., D)
            At least two, of the same number of axes. An axis of size 1 is repeated to the size that others have.

        Returns
        -------
        y : ndarray

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        return self._joined(arrays)[0]

    def forward(self, *arrays: Any, seed: int | None = None) -> tuple[Array, Tape]:
        """Apply the layer in training; return outputs and a tape for `backward`.

        Parameters
        ----------
        *arrays : arrays
            As for a call. Must not be changed while the tape is in use.
        seed : int, optional
            Nothing here is random.

        Returns
        -------
        y : ndarray
        tape : Tape
        """
        checks.seed("seed", seed)
        y, kept = self._joined(arrays)
        return y, Tape(self, (y.shape, kept))

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> tuple[Array, ...]:
        """Compute gradients from that of the outputs.

        Parameters
        ----------
        dy : array of the shape of y
        tape : Tape
            Returned by `forward`.
        grads : mapping, optional
            An empty one: there are no parameters.

        Returns
        -------
        tuple of ndarray
            The gradient of each array, of its shape.
        """
        shape, kept = self._kept(tape)
        self._targets(grads)
        return tuple(self._backend.joining.join_backward(checks.like("dy", dy, self.dtype, shape), kept, self._kind))

    def _joined(self, arrays: Sequence[Any]) -> tuple[Array, Any]:
        if len(arrays) < 2:
            raise ValueError(f"arrays should be at least two, not {len(arrays)}")
        checked = [checks.real_array(f"arrays[{place}]", array, self.dtype) for place, array in enumerate(arrays)]
        first = checked[0]
        for place, array in enumerate(checked):
            if array.ndim != first.ndim or not array.ndim:
                raise ValueError(
                    f"arrays[{place}] should be of shape (..., D) with {max(first.ndim, 1)} axes as arrays[0], not"
                    f" {array.shape}"
                )
        kept = first.ndim - (self._kind == "concatenate")
        for axis in range(kept):
            sizes = {array.shape[axis] for array in checked} - {1}
            if len(sizes) > 1:
                shapes = ", ".join(str(array.shape) for array in checked)
                raise ValueError(f"arrays should agree in axis {axis}, or have the size 1 there, not {shapes}")
        y, tape = self._backend.joining.join_forward(checked, self._kind)
        return y, tape

    def _arity_fault(self, count: int) -> str | None:
        return None if count > 1 else f"joins at least two inputs, not {count}"

    def _widths_through(self, widths: Sequence[int | None]) -> tuple[dict[str, int | None], str | None]:
        known = {width for width in widths if width is not None} - {1}
        fault = None if len(known) < 2 else f"joins vectors of one size, not of {' and '.join(map(str, widths))}"
        return {OUTPUT: next(iter(known), None) if len(known) == 1 else None}, fault


class Add(Joining):
    """The sum of two or more arrays."""

    _kind = "add"


class Multiply(Joining):
    """The product of two or more arrays, element by element."""

    _kind = "multiply"


class Concatenate(Joining):
    """Two or more arrays side by side, in the last axis: the vectors of one step become one vector."""

    _kind = "concatenate"

    def _widths_through(self, widths: Sequence[int | None]) -> tuple[dict[str, int | None], str | None]:
        known = [width for width in widths if width is not None]
        return {OUTPUT: sum(known) if len(known) == len(widths) else None}, None


class Slice(Pointwise):
    """The elements from `start` to `stop`, without the latter, of the last axis of x (..., D)."""

    _features = 1

    start: int = size(least=0, doc="The first element.")
    stop: int = size(doc="After the last element; more than `start`, and at most D.")
    _: KW_ONLY
    dtype: Dtype = floating(default="float32", of="outputs")

    def _resolve(self) -> None:
        if self.stop <= self.start:
            raise ValueError(f"stop should be more than start={self.start}, not {self.stop}")

    def _gives(self) -> int:
        return self.stop - self.start

    def _widths_through(self, widths: Sequence[int | None]) -> tuple[dict[str, int | None], str | None]:
        after, _ = super()._widths_through(widths)
        width = widths[0]
        few = width is not None and width < self.stop
        return after, f"takes vectors of at least {self.stop}, not of {width}" if few else None

    def _forward(self, x: Any, seed: int | None) -> tuple[Array, Any]:
        x = checks.real_array("x", x, self.dtype)
        if not x.ndim or x.shape[-1] < self.stop:
            raise ValueError(f"x should be of shape (..., D) with D at least {self.stop}, not {x.shape}")
        return x[..., self.start : self.stop].copy(), x.shape

    def _backward(self, dy: Array, kept: Any, targets: Mapping[str, Array]) -> Array:
        dx = np.zeros(kept, self.dtype)
        dx[..., self.start : self.stop] = dy
        return dx
