"""Gradient clipping, by the norm of all gradients together or element by element; in place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastseq import checks, threads
from fastseq.checks import Array
from fastseq.layers.base import Layer
from fastseq.training.optimisers import operations


def clip_grad_norm(layer_or_grads: Layer | Mapping[str, Array], max_norm: float) -> float:
    """Scale all gradients down by one factor where their norm is more than `max_norm`.

    Parameters
    ----------
    layer_or_grads : Layer or mapping from str to array
        Whose gradients, or the gradients themselves; changed in place.
    max_norm : float
        The most the norm may be. Infinity: the norm is only computed.

    Returns
    -------
    float
        The norm before: the root of the sum of all squares, which is summed in double and in one order. Where it
        is not finite, nothing was scaled.
    """
    grads = _gradients(layer_or_grads)
    limit = max_norm if max_norm == math.inf else checks.number("max_norm", max_norm, least=0)
    n_threads = threads.get_num_threads()
    total = 0.0
    for array in grads.values():
        total += operations(array).sum_of_squares(array, n_threads)
    norm = math.sqrt(total)
    factor = limit / (norm + 1e-6)  # PyTorch's
    if math.isfinite(norm) and factor < 1:
        for array in grads.values():
            if factor >= np.finfo(array.dtype).tiny:
                operations(array).scale(array, factor, n_threads)
            else:  # which is no number of the dtype, though what it makes of the gradients may be
                for _ in range(2):
                    operations(array).scale(array, math.sqrt(factor), n_threads)
    return norm


def clip_grad_value(layer_or_grads: Layer | Mapping[str, Array], limit: float) -> None:
    """Bring every element of the gradients into -limit..limit.

    Parameters
    ----------
    layer_or_grads : Layer or mapping from str to array
        Whose gradients, or the gradients themselves; changed in place.
    limit : float
        At least 0. NaN stays NaN.
    """
    grads = _gradients(layer_or_grads)
    limit = checks.number("limit", limit, least=0)
    for array in grads.values():
        own = array.dtype.type(min(limit, float(np.finfo(array.dtype).max)))
        np.clip(array, -own, own, out=array)


def _gradients(value: Any) -> Mapping[str, Array]:
    """Gradients that may be changed in place."""
    if isinstance(value, Layer):
        return value.grads
    grads = checks.mapping("layer_or_grads", value)
    for name, array in grads.items():
        if type(array) is not np.ndarray or array.dtype.kind != "f" or not array.flags.carray:
            raise ValueError(
                f"layer_or_grads[{name!r}] should be a writeable, contiguous array of real floating numbers,"
                f" not {checks.describe(array)}"
            )
    return grads
