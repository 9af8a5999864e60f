"""What a row of a batch makes of all its steps, or of windows of them: last, mean, maximum, reverse; vectorised.

`fastseq.reference._pooling` has the same row by row. Arrays are (B, T, D), `lengths` (B,) int64 or None: no
step past them is read into a result. Sums go from the first step to the last, so that neither the padding nor the rows
beside a row change a bit of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fastseq.checks import Array
from fastseq.windows import Windows


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


def window_pooling_forward(x: Array, windows: Windows, kind: str) -> Array:
    """y (B, outputs, C): "max" or "mean" of the real frames of each window; or "sum", over the size of windows."""
    shape = (len(x), windows.outputs, x.shape[2])
    real = np.zeros(shape[:2], np.int64)
    y = np.full(shape, -np.inf, x.dtype) if kind == "max" else np.zeros(shape, np.promote_types(x.dtype, np.float64))
    for rows, steps, frames, where in _met(windows, x.shape[1]):
        real[rows, steps] += True if where is None else where
        taken = True if where is None else where[..., None]
        (np.maximum if kind == "max" else np.add)(y[rows, steps], x[rows, frames], out=y[rows, steps], where=taken)
    if kind == "max":
        return y if real.all() else np.where(real[..., None] > 0, y, x.dtype.type(0))
    return (y / (windows.size if kind == "sum" else np.maximum(real, 1)[..., None])).astype(x.dtype)


def window_pooling_backward(x: Array, windows: Windows, kind: str, dy: Array) -> Array:
    """The gradient of x; of equal maxima the first has it."""
    dx, real = np.zeros_like(x), np.zeros(dy.shape[:2], np.int64)
    if kind == "max":
        y, left = window_pooling_forward(x, windows, kind), np.ones(dy.shape, bool)
        for rows, steps, frames, where in _met(windows, x.shape[1]):
            value, own = x[rows, frames], y[rows, steps]
            hit = left[rows, steps] & ((value == own) | (np.isnan(value) & np.isnan(own)))
            hit = hit if where is None else hit & where[..., None]
            left[rows, steps] &= ~hit
            dx[rows, frames] += np.where(hit, dy[rows, steps], x.dtype.type(0))
        return dx
    for rows, steps, _, where in _met(windows, x.shape[1]):
        real[rows, steps] += True if where is None else where
    share = dy / (x.dtype.type(windows.size) if kind == "sum" else np.maximum(real, 1)[..., None].astype(x.dtype))
    for rows, steps, frames, where in _met(windows, x.shape[1]):
        np.add(
            dx[rows, frames],
            share[rows, steps],
            out=dx[rows, frames],
            where=True if where is None else where[..., None],
        )
    return dx


def _met(windows: Windows, time: int) -> Iterator[tuple[slice, slice, slice, Array | None]]:
    """For each place in windows: rows of the batch, windows, the frames there, and where these are real."""
    batch, lefts, stride = len(windows.lefts), windows.lefts, windows.stride
    if not batch or not windows.outputs:
        return
    alike = bool((lefts == lefts[0]).all())
    for rows, left in (
        [(slice(None), int(lefts[0]))] if alike else [(slice(b, b + 1), int(lefts[b])) for b in range(batch)]
    ):
        lengths, counts = windows.lengths[rows, None], windows.counts[rows, None]
        whole = bool((lengths == time).all() and (counts == windows.outputs).all())
        first = max(0, -((windows.outputs - 1) * stride - left) // windows.dilation)
        for place in range(first, min(windows.size, (time - 1 + left) // windows.dilation + 1)):
            shift = place * windows.dilation - left
            start, end = max(0, -(shift // stride)), min(windows.outputs, -((shift - time) // stride))
            if start < end:
                frames = slice(start * stride + shift, (end - 1) * stride + shift + 1, stride)
                t = np.arange(start, end)
                where = None if whole else (t * stride + shift < lengths) & (t < counts)
                yield rows, slice(start, end), frames, where
