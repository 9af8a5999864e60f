"""Sums over the rows of a batch whose bits do not depend on the other rows."""

from __future__ import annotations

import numpy as np

from fastseq.checks import Array


def bounded(sigma2: Array) -> Array:
    """A variance that can be divided by: what is predicted without any error has a density without bound."""
    return np.maximum(sigma2, np.finfo(np.float64).tiny)


def row_sums(values: Array, counts: Array) -> Array:
    """The sum of the first `counts` values of every row."""
    real = np.arange(values.shape[1]) < counts[:, None]
    return sums(np.repeat(np.arange(len(values)), counts), values[real], len(values))


def sums(rows: Array, values: Array, count: int) -> Array:
    """The sum of the values of each of `count` rows, added in order, so that no row beside it changes a bit."""
    result: Array = np.bincount(rows, values, count).astype(np.float64, copy=False)
    return result
