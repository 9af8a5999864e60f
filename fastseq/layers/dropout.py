"""Dropout: a mask that is a function of a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fastseq import checks, threads
from fastseq.checks import Array
from fastseq.layers.base import Pointwise
from fastseq.layers.settings import KW_ONLY, Dtype, floating, fraction


class Dropout(Pointwise):
    """Dropout [1]_: in training each element is 0 with probability p, and divided by 1 - p otherwise.

    Calling the layer is inference and drops nothing. The mask depends on the seed of `forward` alone, whatever the
    number of threads; the tape holds the seed, and `backward` makes the mask again.

    References
    ----------
    .. [1] N. Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15, 2014.
    """

    _keeps_width: ClassVar[bool] = True
    _random: ClassVar[bool] = True

    p: float = fraction(default=0.5, doc="The share that is dropped.")
    _: KW_ONLY
    dtype: Dtype = floating(default="float32", of="outputs")

    def _forward(self, x: Any, seed: int | None) -> tuple[Array, Any]:
        x = checks.real_array("x", x, self.dtype)
        return (x if seed is None else self._masked(x, seed)), seed

    def _backward(self, dy: Array, kept: Any, targets: Mapping[str, Array]) -> Array:
        return self._masked(dy, kept)

    def _masked(self, x: Array, seed: int) -> Array:
        if self.p == 0:
            return x
        rows = np.ascontiguousarray(x).reshape(x.shape)
        return self._backend.dense.dropout(rows, self.p, seed, 0, threads.get_num_threads())
