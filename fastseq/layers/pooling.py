"""LastStep, MeanOverTime and MaxOverTime: one vector of all steps of a row. The arithmetic is in their operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.layers.base import POOLING, Layer, Tape


class Pooling(Layer):
    """What the three share: shapes."""

    time = POOLING

    _keeps_width: ClassVar[bool] = True
    _kind: ClassVar[str]

    def __init__(self, *, dtype: Any = "float32") -> None:
        self.dtype = checks.real_dtype("dtype", dtype, self._backend.dtypes)
        self._config = {"dtype": self.dtype.name}
        self._arrays = {}

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

    Parameters
    ----------
    dtype : {"float32", "float64"}
        Of outputs. Inputs of another real dtype are converted.
    """

    _kind = "last"


class MeanOverTime(Pooling):
    """The mean of the real steps of each row.

    Parameters
    ----------
    dtype : {"float32", "float64"}
        Of outputs. Inputs of another real dtype are converted.
    """

    _kind = "mean"


class MaxOverTime(Pooling):
    """The largest value of each element over the real steps of a row; of equals the first has the gradient.

    Parameters
    ----------
    dtype : {"float32", "float64"}
        Of outputs. Inputs of another real dtype are converted.
    """

    _kind = "max"
