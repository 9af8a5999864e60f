"""Rows of the batches of states: which are meant, and one state made of rows of two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array


def replaced(state: Any, rows: Any, other: Any) -> Any:
    """`replaced` of any kind of state: the rows of both, joined, and those that are wanted taken of them."""
    if type(other) is not type(state):
        raise TypeError(f"other should be a {type(state).__name__}, not {checks.describe(other)}")
    index = row_indices(rows, state.batch_size) % max(1, state.batch_size)
    if len(set(index.tolist())) != len(index):
        raise ValueError(f"rows should name each row once, not {checks.describe(rows)}")
    if other.batch_size != len(index):
        raise ValueError(f"other should have {len(index)} rows, as many as are replaced, not {other.batch_size}")
    wanted = np.arange(state.batch_size)
    wanted[index] = state.batch_size + np.arange(len(index))
    try:
        both = type(state).concatenate([state, other])
    except ValueError:
        raise ValueError(f"other should agree with {state!r} in all but the batch, not be {other!r}") from None
    return both[wanted]


def of_one_class(cls: type[Any], states: Any) -> list[Any]:
    """States to be joined, as a list; another class's are a `TypeError`."""
    if not isinstance(states, Iterable):
        raise TypeError(f"states should be an iterable of states, not {checks.describe(states)}")
    some = list(states)
    if not some:
        raise ValueError("states should hold at least one state")
    for state in some:
        if type(state) is not cls:
            raise TypeError(f"states should hold only {cls.__name__}, not {checks.describe(state)}")
    return some


def row_indices(rows: Any, batch: int) -> Array:
    """Indices of rows of a batch, given as an integer, a slice, integers or booleans."""
    if isinstance(rows, slice) or rows is Ellipsis:
        try:
            return np.arange(batch)[rows]
        except (TypeError, ValueError, IndexError) as error:
            raise type(error)(f"rows should be a slice of integers, not {rows!r}: {error}") from None
    given = checks.describe(rows)
    if isinstance(rows, tuple):
        raise TypeError(f"rows should be one index into the batch, not {given}")
    index = checks.as_array("rows", rows)
    if index.size == 0 and index.dtype.kind == "f":
        index = index.astype(np.intp)  # an empty list
    if index.dtype.kind not in "iub" or index.ndim > 1 or (index.dtype.kind == "b" and index.ndim != 1):
        raise TypeError(f"rows should be an integer, a slice, or integers or booleans, not {given}")
    if index.dtype.kind == "b":
        if len(index) != batch:
            raise ValueError(f"rows should be of shape ({batch},), one boolean a row, not {index.shape}")
        return np.flatnonzero(index)
    index = np.atleast_1d(index)
    if index.size and (index.min() < -batch or index.max() >= batch):
        raise ValueError(f"rows should be in {-batch}..{batch - 1} for a batch of {batch}, not {given}")
    return index
