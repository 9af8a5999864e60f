"""Convolution over time as the textbooks write it: each output is a product of the weights with the frames it takes.

Nothing here is shared with the compiled operations of `fastseq._convolution`, which has the same functions. x is
(B, T, C), y is (B, outputs, O), a weight (O, C / groups, size). `fastseq.windows.Windows` says which frames an output
takes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastseq.checks import Array
from fastseq.narrow import NarrowArray
from fastseq.windows import Windows


class Packed(NamedTuple):
    """The parameters, and into how many groups channels are divided."""

    weight: Any
    bias: Array | None
    groups: int

    def parts(self) -> list[tuple[slice, slice, Any]]:
        """Of each group: its inputs, its outputs, and its weights (O / groups, C / groups * size)."""
        outputs, inputs = self.weight.shape[0] // self.groups, self.weight.shape[1]
        parts = []
        for group in range(self.groups):
            own = slice(group * outputs, (group + 1) * outputs)
            parts.append((slice(group * inputs, (group + 1) * inputs), own, matrix(self.weight[own])))
        return parts


def matrix(weight: Any) -> Any:
    """Weights (outputs, inputs, size) as (outputs, inputs * size)."""
    return weight.matrix(0, 1, 2) if isinstance(weight, NarrowArray) else weight.reshape(len(weight), -1)


def conv_pack(weight: Any, bias: Array | None, groups: int) -> Packed:
    """The weights as the two below want them."""
    return Packed(weight, bias, groups)


def places(windows: Windows, b: int) -> tuple[Array, Array]:
    """The frames that each window of a row takes, (count, size), and which of them are real."""
    t, j = np.arange(windows.counts[b])[:, None], np.arange(windows.size)
    frames = t * windows.stride - windows.lefts[b] + j * windows.dilation
    real = (frames >= 0) & (frames < windows.lengths[b])
    return np.where(real, frames, 0), real


def seen(row: Array, frames: Array, real: Array) -> Array:
    """What windows take of a row (T, C): (count, C, size), zeros where a frame is not real."""
    if not len(row):
        return np.zeros((len(frames), row.shape[1], frames.shape[1]), row.dtype)
    taken: Array = np.where(real[..., None], row[frames], row.dtype.type(0))
    return taken.transpose(0, 2, 1)


def conv_forward(packed: Packed, x: Array, windows: Windows, n_threads: int) -> Array:
    """y_t = b + the sum over j of W_j x_(t stride - left + j dilation)"""
    batch, outputs = len(x), packed.weight.shape[0]
    y = np.zeros((batch, windows.outputs, outputs), x.dtype)
    for b in range(batch):
        taken = seen(x[b], *places(windows, b))
        for inputs, own, weight in packed.parts():
            count = windows.counts[b]
            y[b, :count, own] = taken[:, inputs].reshape(count, weight.shape[1]) @ weight.T
        if packed.bias is not None:
            y[b, : windows.counts[b]] += packed.bias
    return y


def conv_backward(
    packed: Packed, x: Array, windows: Windows, dy: Array, dweight: Array, dbias: Array | None, n_threads: int
) -> Array:
    """dW_j = sum over t of dy_t x_(t stride - left + j dilation)^T;  dx at each frame is summed over all W_j^T dy_t"""
    dx = np.zeros_like(x)
    for b in range(len(x)):
        frames, real = places(windows, b)
        taken, d = seen(x[b], frames, real), dy[b, : windows.counts[b]]
        if dbias is not None:
            dbias += d.sum(axis=0)
        for inputs, own, weight in packed.parts():
            rows = taken[:, inputs]
            flat = rows.reshape(len(rows), weight.shape[1])
            dweight[own] += (d[:, own].T @ flat).reshape(dweight[own].shape)
            dtaken = (d[:, own] @ weight).reshape(rows.shape).transpose(0, 2, 1)
            np.add.at(dx[b, :, inputs], frames[real], dtaken[real])
    return dx
