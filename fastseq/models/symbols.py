"""Sequences of symbols in the forms in which they may be given."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastseq import checks, training
from fastseq.checks import Array
from fastseq.layers.rows import Rows, rows_of
from fastseq.models.forms import BATCH_SIZE, held_out, is_list_of_rows, last_part


class Symbols(NamedTuple):
    """Sequences of symbols one after another, without padding."""

    ids: Array  # (N,) int64
    lengths: Array  # (S,) int64, of each sequence

    @classmethod
    def of(cls, rows: list[Array]) -> Symbols:
        """Some sequences."""
        return cls(np.concatenate(rows), np.array([len(row) for row in rows], np.int64))

    def rows(self) -> Array:
        """Which sequence each symbol is of, (N,)."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def steps(self) -> Array:
        """Where in its sequence each symbol stands, (N,)."""
        starts = np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        result: Array = np.arange(len(self.ids)) - starts
        return result

    def split(self) -> list[Array]:
        """The sequences one by one."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []

    def padded(self) -> Array:
        """The sequences as rows (S, T), zeros past their ends."""
        longest = int(self.lengths.max(initial=0))
        result = np.zeros((len(self.lengths), longest), np.int64)
        result[self.rows(), self.steps()] = self.ids
        return result


class TokenRows(NamedTuple):
    """Sequences in the form they were given in."""

    ids: Array  # (N,) int64, of all real tokens one sequence after another
    rows: Rows
    unbatched: bool  # there was no batch

    def spread(self, values: Array, padding: Any = 0) -> Array:
        """Values (N, ...) of the tokens as (B, T, ...), or (T, ...)."""
        rows = self.rows
        array = np.full((rows.batch, rows.time, *values.shape[1:]), padding, values.dtype)
        if rows.lengths is None:
            array = values.reshape(array.shape)
        else:
            array[real_steps(rows.lengths, rows.time)] = values
        return array[0] if self.unbatched else array

    def gather(self, array: Array) -> Array:
        """The values of the real tokens, (N, W), of an array (B, T, W), or (T, W)."""
        return self.rows.gather(array[None] if self.unbatched else array)


def token_rows(name: str, value: Any, lengths: Any, count: int, lengths_name: str = "lengths") -> TokenRows:
    """Sequences of ids in any form: a list of them, an array (T,), or (B, T) with or without lengths."""
    given = symbols(name, value, lengths, count, lengths_name)
    is_list = lengths is None and is_list_of_rows(value)
    shape: tuple[int, ...] = () if is_list else np.shape(value)
    time = max(map(len, value), default=0) if is_list else shape[-1]
    return TokenRows(given.ids, rows_of(len(given.lengths), time, given.lengths), len(shape) == 1)


def no_text(name: str, value: Any) -> None:
    """Refuse text where ids belong, in any form: a string, bytes, a list or an array of strings."""
    one = value
    while isinstance(one, list | tuple) and len(one):
        one = one[0]
    if isinstance(one, str | bytes) or (isinstance(one, np.ndarray) and one.dtype.kind in "US"):
        raise TypeError(
            f"{name} should be ids, integers, not text: {checks.describe(one)}; give each symbol a number first,"
            " as in [symbols.index(s) for s in text]"
        )


def ids_array(name: str, value: Any) -> Array:
    """An array that may hold ids; text is refused."""
    no_text(name, value)
    return checks.as_array(name, value)


def symbols(name: str, value: Any, lengths: Any, vocab_size: int, lengths_name: str = "lengths") -> Symbols:
    """Sequences of ids in any form they may be given in.

    A list of sequences; an array (T,), which is one; or (B, T), with `lengths` where the rows are padded.
    """
    no_text(name, value)
    if lengths is None and is_list_of_rows(value):
        rows = [checks.integers(f"{name}[{i}]", row) for i, row in enumerate(value)]
        for i, row in enumerate(rows):
            if row.ndim != 1:
                raise ValueError(f"{name}[{i}] should be a sequence of ids, not {checks.describe(row)}")
        ids = np.concatenate(rows, dtype=np.int64, casting="unsafe")  # what does not fit becomes negative
        if np.count_nonzero((ids < 0) | (ids >= vocab_size)):
            for i, row in enumerate(rows):
                checks.ids(f"{name}[{i}]", row, vocab_size)  # says where
        return Symbols(ids, np.array([len(row) for row in rows], np.int64))
    array = checks.as_array(name, value)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2:
        raise ValueError(f"{name} should be of shape (B, T) or (T,), or a list of sequences, not {array.shape}")
    batch, time = array.shape
    if lengths is None:
        checked = checks.ids(name, value, vocab_size)
        return Symbols(checked.reshape(-1), np.full(batch, time, np.int64))
    counts = checks.lengths(lengths, batch, time, lengths_name)
    real = np.arange(time) < counts[:, None]
    return Symbols(checks.ids(name, array, vocab_size, real)[real], counts)


def text_split(given: Symbols, share: Any, seed: int | None) -> tuple[Symbols, Symbols | None]:
    """What is learnt from, and what is validated on: some of the sequences; of one the last part."""
    if share is None:
        return given, None
    if len(given.lengths) == 1:
        cut = last_part(len(given.ids), share, 1)
        return given.of([given.ids[:cut]]), given.of([given.ids[cut:]])
    rows = given.split()
    return tuple(given.of([rows[i] for i in which]) for which in held_out(len(rows), share, seed))  # type: ignore[return-value]


def whole_sequences(name: str, given: Symbols, batch_size: int | None) -> training.PaddedBatches:
    """Sequences to validate on, each from its begin symbol on; empty ones have no symbol that could count."""
    rows = [row for row in given.split() if len(row)]
    if not rows:
        raise ValueError(f"{name} should hold at least one symbol")
    return training.PaddedBatches(rows, batch_size=batch_size or BATCH_SIZE, shuffle=False)


def real_steps(lengths: Array, time: int) -> Array:
    """Where rows have steps and no padding, (B, T)."""
    result: Array = np.arange(time) < lengths[:, None]
    return result


def log_softmax_at(logits: Array, ids: Array) -> Array:
    """The log-probability of one symbol of each row of (N, V), in float64."""
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    result: Array = scores[np.arange(len(ids)), ids] - np.log(np.exp(scores).sum(axis=1))
    return result
