"""Sums, products and concatenations of several arrays; vectorised.

`fastseq.reference._joining` has the same equation by equation. Arrays have the same number of axes. An axis of size 1
is repeated to that of the others, except the last axis of a concatenation. The gradient of what was repeated is a sum
from the first to the last, so that zeros in the padding change no bit of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastseq.checks import Array


def join_forward(arrays: Sequence[Array], kind: str) -> tuple[Array, Any]:
    """y, of "add", "multiply" or "concatenate", and what `join_backward` needs."""
    shapes = [array.shape for array in arrays]
    if kind == "concatenate":
        leading = np.broadcast_shapes(*(shape[:-1] for shape in shapes))
        return np.concatenate([np.broadcast_to(a, (*leading, a.shape[-1])) for a in arrays], axis=-1), shapes
    with np.errstate(all="ignore"):
        combine = np.add if kind == "add" else np.multiply
        y = combine(arrays[0], arrays[1])
        for array in arrays[2:]:
            y = combine(y, array)
    return y, (shapes if kind == "add" else list(arrays))


def join_backward(dy: Array, kept: Any, kind: str) -> list[Array]:
    """The gradient of each array."""
    if kind == "add":
        return [_reduced(dy, shape) for shape in kept]
    if kind == "concatenate":
        ends = np.cumsum([shape[-1] for shape in kept])
        return [_reduced(part, shape) for part, shape in zip(np.split(dy, ends[:-1], axis=-1), kept, strict=True)]
    gradients = []
    with np.errstate(all="ignore"):
        for place, array in enumerate(kept):
            gradient = dy
            for other in (*kept[:place], *kept[place + 1 :]):
                gradient = gradient * other
            gradients.append(_reduced(gradient, array.shape))
    return gradients


def _reduced(gradient: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of an array of this shape, which was repeated to that of `gradient`; never `gradient` itself."""
    whole = gradient
    for axis, count in enumerate(shape):
        if count == 1 and whole.shape[axis] != 1:
            total = np.zeros(np.delete(whole.shape, axis), np.promote_types(whole.dtype, np.float64))
            for step in np.moveaxis(whole, axis, 0):
                total += step
            whole = np.expand_dims(total, axis)
    with np.errstate(all="ignore"):
        return np.array(whole, gradient.dtype, order="C")
