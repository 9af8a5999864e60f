"""Windows of time: which frames of a row each output of a convolution or a pooling over time takes."""

from __future__ import annotations

from typing import NamedTuple

from fastseq.checks import Array


class Windows(NamedTuple):
    """The windows of the rows of a batch (B, T, C).

    Window t of row b takes the frames t * stride - lefts[b] + j * dilation of the row, j in 0..size-1. Those that are
    not in 0..lengths[b]-1 are padding: zeros of a convolution or a mean, and left out of a maximum.
    """

    size: int
    stride: int
    dilation: int
    lengths: Array  # (B,) int64, frames of each row
    lefts: Array  # (B,) int64; a window may begin after frame 0, then it is negative
    counts: Array  # (B,) int64, windows of each row
    outputs: int  # steps of the outputs: at least the largest count
