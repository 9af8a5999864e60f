"""The last step, the mean, the maximum and the reverse of each row, or those of windows of it, row after row.

Nothing here is shared with `fastseq.over_time`, which has the same functions. x is (B, T, D), y is (B, D), or of
windows (B, outputs, D).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastseq.checks import Array
from fastseq.windows import Windows


def pooling_forward(x: Array, lengths: Array | None, kind: str) -> tuple[Array, Any]:
    """last: y = x_n;  mean: y = (x_1 + ... + x_n) / n;  max: y = max of x_1 ... x_n;  0 where n is 0.

    last_of_directions: y = the first half of x_n, the second half of x_1.
    """
    batch, time, width = x.shape
    y, steps = np.zeros((batch, width), x.dtype), [time] * batch if lengths is None else lengths.tolist()
    for b, n in enumerate(steps):
        row = x[b, :n]
        if not n:
            continue
        if kind == "last":
            y[b] = row[-1]
        elif kind == "last_of_directions":
            y[b] = np.concatenate([np.split(row[-1], 2)[0], np.split(row[0], 2)[1]])
        elif kind == "max":
            y[b] = row.max(axis=0)
        else:
            total = row[0].astype(np.promote_types(x.dtype, np.float64))
            for step in row[1:]:
                total = total + step
            y[b] = total / n
    return y, (x, steps)


def pooling_backward(dy: Array, kept: Any, kind: str) -> Array:
    """last: dx_n = dy;  mean: dx_t = dy / n;  max: dx_t = dy at the first t with x_t = y.

    last_of_directions: dx_n = the first half of dy, dx_1 = the second half, summed where n is 1.
    """
    x, steps = kept
    dx = np.zeros_like(x)
    for b, n in enumerate(steps):
        if not n:
            continue
        if kind == "last":
            dx[b, n - 1] = dy[b]
        elif kind == "last_of_directions":
            f, r = np.split(dy[b], 2)
            dx[b, n - 1] += np.concatenate([f, np.zeros_like(r)])
            dx[b, 0] += np.concatenate([np.zeros_like(f), r])
        elif kind == "mean":
            dx[b, :n] = dy[b] / x.dtype.type(n)
        else:
            for d in range(x.shape[2]):
                column = x[b, :n, d]
                at = np.isnan(column) if np.isnan(column).any() else column == column.max()
                dx[b, np.flatnonzero(at)[0], d] = dy[b, d]
    return dx


def reverse(x: Array, lengths: Array | None) -> Array:
    """y_t = x_(n + 1 - t) for t up to n, then 0. It is its own backward."""
    y = np.zeros_like(x)
    for b in range(len(x)):
        n = x.shape[1] if lengths is None else int(lengths[b])
        y[b, :n] = np.flip(x[b, :n], axis=0)
    return y


def merge_forward(x: Array, mode: str) -> Array:
    """sum: y = f + r;  mul: y = f r;  ave: y = (f + r) / 2."""
    f, r = np.split(x, 2, axis=-1)
    return {"sum": f + r, "mul": f * r, "ave": (f + r) * x.dtype.type(0.5)}[mode]


def merge_backward(dy: Array, x: Array, mode: str) -> Array:
    """sum: df = dr = dy;  mul: df = dy r, dr = dy f;  ave: df = dr = dy / 2."""
    f, r = np.split(x, 2, axis=-1)
    half = dy * x.dtype.type(0.5)
    df, dr = {"sum": (dy, dy), "mul": (dy * r, dy * f), "ave": (half, half)}[mode]
    return np.concatenate([df, dr], axis=-1)


def frames_of(windows: Windows, b: int, t: int) -> Array:
    """The real frames of a window, in order."""
    frames = t * windows.stride - windows.lefts[b] + np.arange(windows.size) * windows.dilation
    return frames[(frames >= 0) & (frames < windows.lengths[b])]


def window_pooling_forward(x: Array, windows: Windows, kind: str) -> Array:
    """max: y_t = max of the real frames of window t;  mean: their mean;  sum: their sum / size;  0 where none is"""
    y = np.zeros((len(x), windows.outputs, x.shape[2]), x.dtype)
    for b in range(len(x)):
        for t in range(windows.counts[b]):
            taken = x[b, frames_of(windows, b, t)]
            if len(taken):
                total = sum(taken[1:].astype(np.promote_types(x.dtype, np.float64)), taken[0])
                y[b, t] = (
                    taken.max(axis=0) if kind == "max" else total / (windows.size if kind == "sum" else len(taken))
                )
    return y


def window_pooling_backward(x: Array, windows: Windows, kind: str, dy: Array) -> Array:
    """max: dx gets dy_t at the first frame with x = y_t;  mean, sum: every frame gets its share"""
    dx = np.zeros_like(x)
    for b in range(len(x)):
        for t in range(windows.counts[b]):
            frames = frames_of(windows, b, t)
            if kind == "max" and len(frames):
                for d in range(x.shape[2]):
                    column = x[b, frames, d]
                    at = np.isnan(column) if np.isnan(column).any() else column == column.max()
                    dx[b, frames[np.flatnonzero(at)[0]], d] += dy[b, t, d]
            elif kind != "max":
                dx[b, frames] += dy[b, t] / x.dtype.type(windows.size if kind == "sum" else max(1, len(frames)))
    return dx
