"""How far exp, tanh, sigmoid and gelu are off, in units in the last place of the true result."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def exact(name: str, x: Array) -> Array:
    """The function in the dtype of x, which is wider than that of what is judged."""
    with np.errstate(all="ignore"):
        if name == "exp":
            return np.exp(x)
        if name == "tanh":
            return np.tanh(x)
        if name == "gelu":
            from scipy.special import erfc

            return x * erfc(-x / np.sqrt(2)) / 2
        if name == "gelu_tanh":
            return x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return 1 / (1 + np.exp(-x))


def errors(actual: Array, truth: Array, least: Array | float = 0) -> Array:
    """|actual - truth| in ulp of the truth, or of `least` where that is more; 0 where the truth is no normal number.

    There the result is to be finite or infinite as the truth is, and no further off than a normal number is from 0:
    what is not gives inf.
    """
    info = np.finfo(actual.dtype)
    with np.errstate(all="ignore"):
        rounded = truth.astype(actual.dtype)
        size = np.abs(truth)
        normal = (size >= info.smallest_normal) & np.isfinite(rounded)
        ulp = np.ldexp(truth.dtype.type(1), np.frexp(np.maximum(size, least))[1] - 1 - info.nmant)
        error = np.abs(actual - truth) / ulp
        error[~normal] = 0
        error[np.isnan(error)] = np.inf
        small = size < info.smallest_normal
        wrong = small & ~(np.abs(actual) <= info.smallest_normal)
        wrong |= ~np.isfinite(rounded) & ~np.isnan(rounded) & (actual != rounded)
        wrong |= np.isnan(rounded) & ~np.isnan(actual)
    error[wrong] = np.inf
    return error
