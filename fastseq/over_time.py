"""What a row of a batch makes of all its steps: the last, the mean, the maximum, the reverse; vectorised.

`fastseq.reference._pooling` has the same row by row. Arrays are (B, T, D), `lengths` (B,) int64 or None: no
step past them is read into a result. Sums go from the first step to the last, so that neither the padding nor the rows
beside a row change a bit of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastseq.checks import Array


def pooling_forward(x: Array, lengths: Array | None, kind: str) -> tuple[Array, Any]:
    """y (B, D), and what `pooling_backward` needs; zeros of a row without a step."""
    batch, time, width = x.shape
    counts = np.full(batch, time, np.int64) if lengths is None else lengths
    some = np.flatnonzero(counts)
    y = np.zeros((batch, width), x.dtype)
    places = None
    if kind == "last":
        y[some] = x[some, counts[some] - 1]
    elif kind == "last_of_directions" and len(some):
        y[some, : width // 2] = x[some, counts[some] - 1, : width // 2]
        y[some, width // 2 :] = x[some, 0, width // 2 :]
    elif kind == "mean":
        y[some] = _sums(x, lengths)[some] / counts[some, None]
    elif len(some):
        seen = x if lengths is None else np.where(_real(counts, time)[:, :, None], x, x.dtype.type(-np.inf))
        places = seen.argmax(axis=1)  # the first of equals, and the first NaN
        y[some] = np.take_along_axis(seen, places[:, None], axis=1)[some, 0]
    return y, (counts, time, places)


def pooling_backward(dy: Array, kept: Any, kind: str) -> Array:
    """The gradient of x."""
    counts, time, places = kept
    batch, width = dy.shape
    some = np.flatnonzero(counts)
    dx = np.zeros((batch, time, width), dy.dtype)
    if kind == "last":
        dx[some, counts[some] - 1] = dy[some]
    elif kind == "last_of_directions" and len(some):
        dx[some, counts[some] - 1, : width // 2] = dy[some, : width // 2]
        dx[some, 0, width // 2 :] = dy[some, width // 2 :]
    elif kind == "mean":
        share = dy / np.maximum(counts, 1)[:, None].astype(dy.dtype)
        np.copyto(dx, share[:, None], where=_real(counts, time)[:, :, None])
    elif len(some):
        dx[some[:, None], places[some], np.arange(width)] = dy[some]
    return dx


def reverse(x: Array, lengths: Array | None) -> Array:
    """The steps of each row (B, T, ...) in reverse order, and zeros behind them."""
    if lengths is None:
        return np.ascontiguousarray(x[:, ::-1])
    batch, time = x.shape[:2]
    real = _real(lengths, time)
    places = np.where(real, lengths[:, None] - 1 - np.arange(time), 0)
    y = np.zeros(x.shape, x.dtype)
    y[real] = x[np.arange(batch)[:, None], places][real]
    return y


def merge_forward(x: Array, mode: str) -> Array:
    """Sum, product or mean of the halves of the last axis."""
    width = x.shape[-1] // 2
    f, r = x[..., :width], x[..., width:]
    merged: Array = f * r if mode == "mul" else f + r if mode == "sum" else (f + r) / x.dtype.type(2)
    return merged


def merge_backward(dy: Array, x: Array, mode: str) -> Array:
    """The gradient of x."""
    if mode == "mul":
        width = x.shape[-1] // 2
        return np.concatenate([dy * x[..., width:], dy * x[..., :width]], axis=-1)
    return np.concatenate([dy, dy], axis=-1) if mode == "sum" else np.concatenate([dy, dy], axis=-1) / dy.dtype.type(2)


def _real(counts: Array, time: int) -> Array:
    """Where rows have steps and no padding, (B, T)."""
    result: Array = np.arange(time) < counts[:, None]
    return result


def _sums(x: Array, lengths: Array | None) -> Array:
    """The sum of the steps of each row, (B, D), of at least float64."""
    total = np.zeros((x.shape[0], x.shape[2]), np.promote_types(x.dtype, np.float64))
    for t in range(x.shape[1] if lengths is None else int(lengths.max(initial=0))):
        where = True if lengths is None else (lengths > t)[:, None]
        np.add(total, x[:, t], out=total, where=where)
    return total
