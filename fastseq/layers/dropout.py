"""Dropout: a mask that is a function of a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fastseq import checks, threads
from fastseq.checks import Array
from fastseq.layers.base import Layer, Tape, mask_seed


class Dropout(Layer):
    """Dropout [1]_: in training each element is 0 with probability p, and divided by 1 - p otherwise.

    Calling the layer is inference and drops nothing.

    Parameters
    ----------
    p : float in [0, 1)
        The share that is dropped.
    dtype : {"float32", "float64"}
        Of outputs. Inputs of another real dtype are converted.

    References
    ----------
    .. [1] N. Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15, 2014.
    """

    _keeps_width: ClassVar[bool] = True

    p: float

    def __init__(self, p: float = 0.5, *, dtype: Any = "float32") -> None:
        self.p = checks.fraction("p", p)
        self.dtype = checks.real_dtype("dtype", dtype, self._backend.dtypes)
        self._config = {"p": self.p, "dtype": self.dtype.name}
        self._arrays = {}

    def __call__(self, x: Any) -> Array:
        """x, as it is: inference drops nothing.

        Parameters
        ----------
        x : array
            Real floating numbers, of any shape.
        """
        return checks.real_array("x", x, self.dtype)

    def forward(self, x: Any, seed: int | None = None) -> tuple[Array, Tape]:
        """Drop some elements.

        Parameters
        ----------
        x : array
            Real floating numbers, of any shape.
        seed : int, optional
            Fixes the mask, whatever the number of threads; drawn where it is not given.

        Returns
        -------
        y : ndarray of the shape of x
        tape : Tape
            Holds the seed: `backward` finds the mask anew.
        """
        seed = mask_seed(seed)
        x = checks.real_array("x", x, self.dtype)
        return self._masked(x, seed), Tape(self, (seed, x.shape))

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
        seed, shape = self._kept(tape)
        self._targets(grads)
        return self._masked(checks.like("dy", dy, self.dtype, shape), seed)

    def _masked(self, x: Array, seed: int) -> Array:
        if self.p == 0:
            return x
        masked: Array = self._backend.dense.dropout(
            np.ascontiguousarray(x).reshape(x.shape), self.p, seed, 0, threads.get_num_threads()
        )
        return masked
