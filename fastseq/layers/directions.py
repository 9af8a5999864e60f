"""Reverse, MergeDirections and LastOfDirections: what other libraries do with directions of recurrent layers.

Here a bidirectional layer gives its directions side by side, aligned in time. The arithmetic is in the operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastseq import checks
from fastseq.checks import Array
from fastseq.layers.base import SEQUENCE, Configured, Pointwise, Tape
from fastseq.layers.pooling import Pooling
from fastseq.layers.settings import KW_ONLY, Dtype, choice, floating


class Reverse(Configured):
    """The real steps of each row in reverse order; padding stays behind them, and is 0."""

    time = SEQUENCE

    _keeps_width: ClassVar[bool] = True

    _: KW_ONLY
    dtype: Dtype = floating(default="float32", of="outputs")

    def __call__(self, x: Any, *, lengths: Any = None) -> Array:
        """Reverse rows.

        Parameters
        ----------
        x : array of shape (B, T, ...), or (T, D) for one sequence; or list of arrays (T_i, ...)
            Real floating numbers.
        lengths : array of shape (B,), optional
            The real steps of each row, integers in 0..T.

        Returns
        -------
        y : ndarray of the shape of x

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        return self._reversed(x, lengths)[0]

    def forward(self, x: Any, *, lengths: Any = None, seed: int | None = None) -> tuple[Array, Tape]:
        """Call, and keep what `backward` needs.

        Parameters
        ----------
        x, lengths
            As for a call.
        seed : int, optional
            Nothing here is random.

        Returns
        -------
        y : ndarray of the shape of x
        tape : Tape
        """
        checks.seed("seed", seed)
        y, lengths = self._reversed(x, lengths)
        return y, Tape(self, (lengths, y.shape))

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> Array:
        """Gradient of the input, given that of the outputs.

        Parameters
        ----------
        dy : array of the shape of y
        tape : Tape
            What `forward` returned.
        grads : mapping, optional
            An empty one: there are no parameters.

        Returns
        -------
        dx : ndarray of the shape of x
        """
        lengths, shape = self._kept(tape)
        self._targets(grads)
        return self._operated(checks.like("dy", dy, self.dtype, shape), lengths)

    def _reversed(self, x: Any, lengths: Any) -> tuple[Array, Array | None]:
        x, lengths = checks.ragged("x", x, lengths)
        x = checks.real_array("x", x, self.dtype)
        if x.ndim < 2:
            raise ValueError(f"x should be of shape (B, T, ...) or (T, D), not {x.shape}")
        if lengths is not None:
            lengths = checks.lengths(lengths, *(x[None] if x.ndim == 2 else x).shape[:2])
        return self._operated(x, lengths), lengths

    def _operated(self, x: Array, lengths: Array | None) -> Array:
        whole = x[None] if x.ndim == 2 else x
        y: Array = self._backend.pooling.reverse(whole, lengths)
        return y.reshape(x.shape)


class MergeDirections(Pointwise):
    """One vector of those of both directions: f and r of x (..., 2H), f first, become y (..., H)."""

    _features = 1

    mode: str = choice(("sum", "mul", "ave"), default="sum", doc='"sum": f + r; "mul": f r; "ave": (f + r) / 2.')
    _: KW_ONLY
    dtype: Dtype = floating(default="float32", of="outputs")

    def _width_after(self, width: int | None) -> int | None:
        return None if width is None else width // 2

    def _forward(self, x: Any, seed: int | None) -> tuple[Array, Any]:
        x = checks.real_array("x", x, self.dtype)
        _check_halves(x, 1)
        return self._backend.pooling.merge_forward(x, self.mode), x

    def _backward(self, dy: Array, kept: Any, targets: Mapping[str, Array]) -> Array:
        return self._backend.pooling.merge_backward(dy, kept, self.mode)


class LastOfDirections(Pooling):
    """The outputs of both directions after their last steps: of x (B, T, 2H) f at the last real step, r at the first.

    It is what a classifier takes of a bidirectional layer, and what the state of it holds.
    """

    _kind = "last_of_directions"

    def _pooled(self, x: Any, lengths: Any) -> tuple[Array, Any]:
        x, lengths = checks.ragged("x", x, lengths)
        x = checks.real_array("x", x, self.dtype)
        _check_halves(x, 2)
        return super()._pooled(x, lengths)


def _check_halves(x: Array, axes: int) -> None:
    if x.ndim < axes or x.shape[-1] % 2:
        form = ", ".join([*["B", "T"][2 - axes :][: axes - 1], "2 H"])
        raise ValueError(f"x should be of shape (..., {form}), both directions in the last axis, not {x.shape}")
