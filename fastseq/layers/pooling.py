"""Pooling: LastStep, MeanOverTime and MaxOverTime of all steps of a row, MaxPool1d and AvgPool1d of windows of them.

The arithmetic is in their operations.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.layers.base import POOLING, Configured, Tape
from fastseq.layers.settings import KW_ONLY, Dtype, Resolved, flag, floating
from fastseq.layers.windowed import Windowed, padding, window_size
from fastseq.windows import Windows


class Pooling(Configured):
    """What the three share: shapes."""

    time = POOLING

    _keeps_width: ClassVar[bool] = True
    _kind: ClassVar[str]

    _: KW_ONLY
    dtype: Dtype = floating(default="float32", of="outputs")

    def __call__(self, x: Any, *, lengths: Any = None) -> Array:
        """One output for each row.

        Parameters
        ----------
        x : array of shape (B, T, ...), or (T, D) for one sequence; or list of arrays (T_i, ...)
            Real floating numbers.
        lengths : array of shape (B,), optional
            The real steps of each row, integers in 0..T. Nothing past them matters.

        Returns
        -------
        y : ndarray of shape (B, ...), or (D,)
            0 for a row without steps.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        return self._pooled(x, lengths)[0]

    def forward(self, x: Any, *, lengths: Any = None, seed: int | None = None) -> tuple[Array, Tape]:
        """Call, and keep what `backward` needs.

        Parameters
        ----------
        x, lengths
            As for a call. `x` is not to be changed as long as the tape is used.
        seed : int, optional
            Nothing here is random.

        Returns
        -------
        y : ndarray of shape (B, ...), or (D,)
        tape : Tape
        """
        checks.seed("seed", seed)
        y, kept = self._pooled(x, lengths)
        return y, Tape(self, kept)

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
            0 past a row's length.
        """
        kept, shape, y_shape = self._kept(tape)
        dy = checks.like("dy", dy, self.dtype, y_shape)
        self._targets(grads)
        dx: Array = self._backend.pooling.pooling_backward(
            _flat(dy[None] if len(shape) == 2 else dy, 1), kept, self._kind
        )
        return dx.reshape(shape)

    def _pooled(self, x: Any, lengths: Any) -> tuple[Array, Any]:
        """The outputs, and what is on a tape."""
        x, lengths = checks.ragged("x", x, lengths)
        x = checks.real_array("x", x, self.dtype)
        if x.ndim < 2:
            raise ValueError(f"x should be of shape (B, T, ...) or (T, D), not {x.shape}")
        whole = x[None] if x.ndim == 2 else x
        if lengths is not None:
            lengths = checks.lengths(lengths, *whole.shape[:2])
        y, kept = self._backend.pooling.pooling_forward(_flat(whole, 2), lengths, self._kind)
        y = y[0] if x.ndim == 2 else y.reshape(len(x), *x.shape[2:])
        return y, (kept, x.shape, y.shape)


def _flat(array: Array, leading: int) -> Array:
    """An array with all but its leading axes as one, also where it is empty."""
    return array.reshape(*array.shape[:leading], int(np.prod(array.shape[leading:], dtype=np.int64)))


class LastStep(Pooling):
    """The last real step of each row: what a classifier takes of a recurrent layer.

    Of a bidirectional layer the reverse half of it has seen one step alone; `MeanOverTime` and `MaxOverTime` take all.
    """

    _kind = "last"


class MeanOverTime(Pooling):
    """The mean of the real steps of each row."""

    _kind = "mean"


class MaxOverTime(Pooling):
    """The largest value of each element over the real steps of a row; of equals the first has the gradient."""

    _kind = "max"


class WindowPooling(Windowed, Configured):
    """What the poolings over windows share."""

    _keeps_width: ClassVar[bool] = True

    kernel_size: int = window_size(doc="Frames that an output is made of.")
    stride: Resolved[int | None, int] = window_size(
        optional=True, doc="Frames from one output to the next; by default `kernel_size`."
    )
    _: KW_ONLY
    padding: int | tuple[int, int] | str = padding(
        doc="Frames of padding on both sides, or on the left and on the right of each row. "
        '"valid" is none. "same" gives ceil(T / stride) outputs, T the length of the row; where the number of frames '
        'is odd, the right has one more. "causal" has all on the left, so that an output is made of its own frame '
        "and those before it."
    )
    dtype: Dtype = floating(default="float32", of="outputs")

    @abstractmethod
    def _function(self) -> str:
        """The name that operations have for what is made of a window."""

    def _resolve(self) -> None:
        self.stride = self.stride or self.kernel_size
        self._set_ends()

    def _compute(self, x: Array, windows: Windows) -> tuple[Array, Any]:
        return self._backend.pooling.window_pooling_forward(x, windows, self._function()), (x, windows)

    def _backward(self, dy: Array, kept: Any, targets: Mapping[str, Array]) -> Array:
        x, windows = kept
        return self._backend.pooling.window_pooling_backward(x, windows, self._function(), dy)

    def _stepless(self) -> str:
        return f"{self._brief()} needs all frames of a window at once"


class MaxPool1d(WindowPooling):
    """The largest value of each channel over windows of time, x (B, T, C), y (B, T', C).

    Padding and what is past the length of a row do not count; a window of nothing else gives 0. Of equals the first has
    the gradient.
    """

    _: KW_ONLY
    dilation: int = window_size(default=1, before="dtype", doc="Frames from one that an output is made of to the next.")

    def _function(self) -> str:
        return "max"


class AvgPool1d(WindowPooling):
    """The mean of each channel over windows of time, x (B, T, C), y (B, T', C)."""

    dilation = 1

    _: KW_ONLY
    count_include_pad: bool = flag(
        default=True,
        before="dtype",
        doc="Whether padding, and what is past the length of a row, counts as zeros; else the mean is of real frames "
        "alone, and 0 where a window has none.",
    )

    def _function(self) -> str:
        return "sum" if self.count_include_pad else "mean"
