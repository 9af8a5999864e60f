"""Sums, products and concatenations of several arrays, equation by equation.

Nothing here is shared with `fastseq.joining`, which has the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastseq.checks import Array


def join_forward(arrays: Sequence[Array], kind: str) -> tuple[Array, Any]:
    """add: y = x_1 + ... + x_n;  multiply: y = x_1 ... x_n;  concatenate: y = (x_1, ..., x_n) along the last axis."""
    leading = np.broadcast_shapes(*(x.shape[:-1] for x in arrays))
    if kind == "concatenate":
        y = np.zeros((*leading, sum(x.shape[-1] for x in arrays)), arrays[0].dtype)
        start = 0
        for x in arrays:
            y[..., start : start + x.shape[-1]] = x
            start += x.shape[-1]
    else:
        y = sum(arrays[1:], arrays[0]) if kind == "add" else math.prod(arrays[1:], start=arrays[0])
    return y, arrays


def join_backward(dy: Array, kept: Any, kind: str) -> list[Array]:
    """add: dx_i = dy;  multiply: dx_i = dy times all x_j, j != i;  concatenate: dx_i is its part of dy.

    Where x_i was repeated, dx_i is the sum over all places that it stood in.
    """
    gradients, start = [], 0
    for i, x in enumerate(kept):
        if kind == "add":
            dx = dy
        elif kind == "multiply":
            dx = math.prod((other for j, other in enumerate(kept) if j != i), start=dy)
        else:
            dx = dy[..., start : start + x.shape[-1]]
            start += x.shape[-1]
        repeated = tuple(axis for axis in range(dy.ndim) if x.shape[axis] == 1 != dx.shape[axis])
        gradients.append(dx.sum(axis=repeated, keepdims=True) if repeated else dx.copy())
    return gradients
