"""States of layers over windows of time: convolutions and poolings."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.state.arrays import ArrayState


class ConvState(ArrayState):
    """The state of a layer over windows of time, `Conv1d` for example, between two frames of a stream.

    Parameters
    ----------
    frames : array of shape (B, R, C)
        The last R frames, the oldest first: as many as the next window may take of the past. Copied.
    wait : array of integers of shape (B,)
        How many more frames come before the one that completes the next window. Copied.

    Attributes
    ----------
    frames, wait : ndarray
        Read-only; `wait` of int64.

    Notes
    -----
    ``state[rows]`` is the state of some rows of the batch and keeps the axis. States compare by value,
    copy, pickle, `save`, and `fastseq.load`; `ConvState.concatenate` joins batches. Unpacking gives the arrays.
    """

    __slots__ = ("frames", "wait")
    _fields = ("frames", "wait")
    frames: Array
    wait: Array

    def __init__(self, frames: Any, wait: Any) -> None:
        array = checks.as_array("frames", frames)
        if array.dtype.kind != "f":
            raise TypeError(f"frames should hold real floating numbers, not {array.dtype}")
        if array.ndim != 3:
            raise ValueError(f"frames should be of shape (B, R, C), not {array.shape}")
        waits = checks.integers("wait", wait)
        if waits.shape != array.shape[:1]:
            raise ValueError(f"wait should be of shape ({len(array)},), one a row of the batch, not {waits.shape}")
        if (waits < 0).any():
            raise ValueError(f"wait should be 0 or more, not {waits.min()}")
        _set(self, np.array(array, np.dtype(array.dtype.type), order="C"), waits.astype(np.int64))


def _set(state: ConvState, frames: Array, wait: Array) -> None:
    for name, array in (("frames", frames), ("wait", wait)):
        array.flags.writeable = False
        object.__setattr__(state, name, array)


def adopt_frames(frames: Array, wait: Array) -> ConvState:
    """A `ConvState` of arrays that nobody else holds, or that are read-only: no check, no copy. For the layers."""
    state = ConvState.__new__(ConvState)
    _set(state, frames, wait)
    return state
