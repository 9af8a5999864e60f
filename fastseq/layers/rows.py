"""The real tokens of a padded batch as rows one after another, and back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastseq.checks import Array


class Rows(NamedTuple):
    """Where the real tokens of a batch (B, T, ...) are."""

    batch: int
    time: int
    lengths: Array | None  # (B,) int64; None: every token is real
    starts: Array  # (B + 1,) int64, of the rows of each sequence
    places: Array | None  # (N,) of each row in the flattened batch; None: each stands in its own

    @property
    def longest(self) -> int:
        """The most real tokens of a sequence."""
        if self.lengths is None:
            return self.time if self.batch else 0
        return int(self.lengths.max(initial=0))

    def gather(self, array: Array) -> Array:
        """The real tokens of (B, T, W), contiguous: (N, W)."""
        if self.places is None:
            return np.ascontiguousarray(array).reshape(-1, array.shape[2])
        if array.flags.c_contiguous:
            return np.take(array.reshape(-1, array.shape[2]), self.places, axis=0)
        return np.ascontiguousarray(array[np.divmod(self.places, max(1, self.time))])

    def scatter(self, rows: Array) -> Array:
        """(N, W) as (B, T, W), with zeros in the padding."""
        if self.places is None:
            return rows.reshape(self.batch, self.time, rows.shape[1])
        array = np.zeros((self.batch * self.time, rows.shape[1]), rows.dtype)
        array[self.places] = rows
        return array.reshape(self.batch, self.time, rows.shape[1])

    def steps(self) -> Array:
        """Where in its sequence each row stands, (N,)."""
        result: Array = np.arange(self.starts[-1]) - np.repeat(self.starts[:-1], np.diff(self.starts))
        return result


def rows_of(batch: int, time: int, lengths: Array | None) -> Rows:
    """The rows of a batch, given lengths that are checked."""
    if lengths is None or not np.count_nonzero(lengths != time):
        starts = np.arange(batch + 1, dtype=np.int64) * time
        return Rows(batch, time, None, starts, None)
    starts = np.zeros(batch + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    places = np.flatnonzero(np.arange(time) < lengths[:, None])
    return Rows(batch, time, lengths, starts, places)


def cut(mask: Array | None, queries: Rows, keys: Rows) -> Array | None:
    """A mask of four axes, without what is past the longest sequences."""
    if mask is None:
        return None
    if mask.shape[2] > 1:
        mask = mask[:, :, : queries.longest]
    if mask.shape[3] > 1:
        mask = mask[:, :, :, : keys.longest]
    return mask


def padded(weights: Array, queries: Rows, keys: Rows) -> Array:
    """Weights (B, heads, ...) of the longest sequences with zeros up to (B, heads, Tq, Tk)."""
    shape = (*weights.shape[:2], queries.time, keys.time)
    if weights.shape == shape:
        return weights
    result = np.zeros(shape, weights.dtype)
    result[:, :, : weights.shape[2], : weights.shape[3]] = weights
    return result


def cleared(array: Array, lengths: Array | None) -> Array:
    """An array (B, T, ...) with zeros past the lengths, +0; a copy, where there is anything to clear."""
    if lengths is None:
        return array
    past = np.arange(array.shape[1]) >= lengths[:, None]
    padding = array[past]
    if padding.any() or np.signbit(padding).any():
        array = array.copy()
        array[past] = 0
    return array
