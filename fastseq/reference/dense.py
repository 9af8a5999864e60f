"""Dropout as the textbook writes it, over a mask that is computed where it is needed and never stored."""

from __future__ import annotations

import numpy as np

from fastseq.checks import Array

GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: Array) -> Array:
    """64 bits that look random, of each of a row of counters; arithmetic is modulo 2⁶⁴."""
    z = state + np.uint64(GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def dropout(x: Array, p: float, seed: int, stream: int, n_threads: int) -> Array:
    """Each element of x is 0 with probability p, else divided by 1 - p.

    Which ones follows from `seed`, `stream` and their places, so that the gradient of the result, given as x, becomes
    that of x.
    """
    key = splitmix64(splitmix64(np.array([seed], np.uint64)) ^ np.uint64((stream + 1) * GOLDEN % 2**64))
    uniform = (splitmix64(key + np.arange(x.size, dtype=np.uint64)) >> np.uint64(11)) * 2.0**-53
    result: Array = np.where(uniform.reshape(x.shape) >= p, x * x.dtype.type(1 / (1 - p)), x.dtype.type(0))
    return result
