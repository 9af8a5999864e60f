"""States of attention: the keys and values of the tokens so far, on shared pages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastseq import backend, checks
from fastseq.checks import Array
from fastseq.state.rows import of_one_class, replaced, row_indices

MAX_TOKENS = (1 << 31) - 1  # of a row; more are some weeks of decoding
MAX_TABLES = 1 << 31  # bytes of the tables of pages of a state that is made of arrays: 8 for every 64 tokens


class Contents(NamedTuple):
    """What a state of attention holds, without copies."""

    own: Any  # pages of the keys and values of the tokens, of the set of operations that made them
    memory: Any  # pages of the memory, where there is one
    tokens: Array | None  # (B, T) ids
    since: Array | None  # (B,) first tokens, where a state was made of arrays that begin within a page


class AttentionState:
    """What layers of attention keep of the tokens they have seen: their keys and values.

    A state shares what it keeps with those it was made of, as long as they agree: to go on from it, to take some of its
    rows, one of them several times, or to go back to an earlier length, copies little or nothing.

    Parameters
    ----------
    lengths : array of shape (B,)
        Tokens of each row.
    firsts : array of shape (B,)
        The first token of each row that is kept: with a window, those before it may be gone.
    keys, values : arrays of shape (B, layers, kv_heads, T, D)
        Of the tokens from the first that is kept on; zeros past the last. Copied.
    window : int
        How many tokens the next one looks back on, itself among them; 0: all.
    memory_lengths, memory_keys, memory_values : arrays, optional
        The same of what a decoder attends to besides: (B,) and (B, layers, kv_heads, S, D).
    tokens : array of shape (B, T), optional
        The ids of the tokens, where a model of symbols keeps them.

    Attributes
    ----------
    lengths, firsts, keys, values, window, memory_lengths, memory_keys, memory_values, tokens
        As above; arrays are copies, made when they are asked for, and None where there are none.

    Notes
    -----
    ``state[rows]`` is the state of some rows of the batch and keeps the axis. States compare by value, copy, pickle,
    `save`, and `fastseq.load`; `AttentionState.concatenate` joins batches, `rolled_back` goes back in time.
    """

    __slots__ = ("_memory", "_own", "_since", "_tokens")
    _own: Any  # Pages of the set of operations that made them
    _memory: Any
    _tokens: Array | None
    _since: Array | None  # firsts, where a state was made of arrays that begin within a page

    def __init__(
        self,
        lengths: Any,
        firsts: Any,
        keys: Any,
        values: Any,
        window: Any = 0,
        *,
        memory_lengths: Any = None,
        memory_keys: Any = None,
        memory_values: Any = None,
        tokens: Any = None,
    ) -> None:
        window = checks.as_array("window", window)
        if window.size != 1:
            raise ValueError(f"window should be one integer, not of shape {window.shape}")
        window = checks.size("window", window.item())
        own = _pages_of("", window, lengths, firsts, keys, values)
        memory = None
        of_memory = {"memory_lengths": memory_lengths, "memory_keys": memory_keys, "memory_values": memory_values}
        missing = [name for name, value in of_memory.items() if value is None]
        if 0 < len(missing) < len(of_memory):
            raise ValueError(f"{', '.join(of_memory)} should be given together, but not {', '.join(missing)}")
        if memory_lengths is not None:
            memory = _pages_of(
                "memory_", 0, memory_lengths, np.zeros(len(own.lengths), np.int64), memory_keys, memory_values
            )
            if len(memory.lengths) != len(own.lengths) or memory.form != own.form:
                raise ValueError(f"memory_keys should agree with keys except for T, not be of {np.shape(memory_keys)}")
        if tokens is not None:
            tokens = checks.integers("tokens", tokens)
            if tokens.ndim != 2 or len(tokens) != len(own.lengths) or tokens.shape[1] < own.lengths.max(initial=0):
                raise ValueError(f"tokens should have those of all {len(own.lengths)} rows, not be of {tokens.shape}")
            tokens = checks.ids("tokens", tokens, MAX_TOKENS, np.arange(tokens.shape[1]) < own.lengths[:, None])
            tokens = np.maximum(tokens, 0)  # past the ends
        since = np.array(firsts, np.int64)
        self._take(own, memory, tokens, None if np.array_equal(since, own.firsts) else since)

    def _take(self, own: Any, memory: Any, tokens: Array | None, since: Array | None) -> None:
        for name, value in (("_own", own), ("_memory", memory), ("_tokens", tokens), ("_since", since)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a {type(self).__name__} is immutable")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a {type(self).__name__} is immutable")

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return len(self.lengths)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of keys and values."""
        dtype: np.dtype[Any] = self._own.form[3]
        return dtype

    @property
    def lengths(self) -> Array:  # noqa: D102  see the class
        lengths: Array = self._own.lengths
        return lengths

    @property
    def firsts(self) -> Array:  # noqa: D102
        firsts: Array = self._own.firsts
        return firsts if self._since is None else np.maximum(firsts, self._since)

    def _kept(self) -> tuple[Array, Array, Array]:
        """First token of each row, and keys and values from it on."""
        firsts, keys, values = self._own.arrays()
        if self._since is None:
            return firsts, keys, values
        since = self.firsts
        steps = np.arange(int((self.lengths - since).max(initial=0))) + (since - firsts)[:, None]
        past = steps >= (self.lengths - firsts)[:, None]
        steps = np.where(past, 0, steps)[:, None, None, :, None]
        arrays = [np.take_along_axis(array, steps, axis=3) if array.size else array for array in (keys, values)]
        for array in arrays:
            array.swapaxes(1, 3)[past] = 0
        return since, arrays[0], arrays[1]

    @property
    def window(self) -> int:  # noqa: D102
        return int(self._own.window)

    @property
    def keys(self) -> Array:  # noqa: D102
        return self._kept()[1]

    @property
    def values(self) -> Array:  # noqa: D102
        return self._kept()[2]

    @property
    def memory_lengths(self) -> Array | None:  # noqa: D102
        return None if self._memory is None else self._memory.lengths

    @property
    def memory_keys(self) -> Array | None:  # noqa: D102
        return None if self._memory is None else self._memory.arrays()[1]

    @property
    def memory_values(self) -> Array | None:  # noqa: D102
        return None if self._memory is None else self._memory.arrays()[2]

    @property
    def tokens(self) -> Array | None:  # noqa: D102
        return None if self._tokens is None else self._tokens.copy()

    def _arrays(self) -> dict[str, Array]:
        """What makes such a state."""
        firsts, keys, values = self._kept()
        arrays = {"lengths": self.lengths, "firsts": firsts, "keys": keys, "values": values}
        arrays["window"] = np.array([self.window])
        if self._memory is not None:
            arrays["memory_lengths"] = self._memory.lengths
            _, arrays["memory_keys"], arrays["memory_values"] = self._memory.arrays()
        if self._tokens is not None:
            arrays["tokens"] = self._tokens
        return arrays

    def __getitem__(self, rows: Any) -> AttentionState:
        index = row_indices(rows, self.batch_size)
        memory, tokens, since = self._memory, self._tokens, self._since
        return attention_state(
            self._own.take(index),
            None if memory is None else memory.take(index),
            None if tokens is None else tokens[index],
            None if since is None else since[index],
        )

    def replaced(self, rows: Any, other: AttentionState) -> AttentionState:
        """The state with some rows taken from another.

        Parameters
        ----------
        rows : int, slice, or array of integers or booleans
            Which rows of this state, each once.
        other : AttentionState
            Of this layer or model, with as many rows as are replaced, in their order.
        """
        result: AttentionState = replaced(self, rows, other)
        return result

    def rolled_back(self, lengths: Any) -> AttentionState:
        """The state at an earlier time.

        Parameters
        ----------
        lengths : int, or array of shape (B,)
            Tokens of each row from then on: at most as many as there are, and with a window not so few that what the
            next token looks back on is gone.
        """
        given = checks.integers("lengths", lengths)
        if given.shape not in ((), self.lengths.shape):
            raise ValueError(f"lengths should be an integer, or of shape {self.lengths.shape}, not {given.shape}")
        wanted = np.broadcast_to(given.astype(np.int64), self.lengths.shape)  # what does not fit becomes negative
        needed = np.maximum(wanted - self.window + 1, 0) if self.window else np.zeros_like(wanted)
        for i, (length, limit, least) in enumerate(zip(wanted, self.lengths, self.firsts, strict=True)):
            if not 0 <= length <= limit:
                raise ValueError(f"lengths[{i}] should be in 0..{limit}, not {length}")
            if needed[i] < least:
                raise ValueError(
                    f"lengths[{i}] should be at least {least + self.window - 1}: what came before token {least} is"
                    f" out of the window, and gone; not {length}"
                )
        tokens = None
        if self._tokens is not None:
            tokens = np.where(np.arange(self._tokens.shape[1]) < wanted[:, None], self._tokens, 0)
        return attention_state(self._own.take(np.arange(len(wanted)), wanted), self._memory, tokens, self._since)

    @classmethod
    def concatenate(cls, states: Iterable[AttentionState]) -> AttentionState:
        """Join the batches of some states of one layer, or one model.

        Parameters
        ----------
        states : iterable of states
            At least one.
        """
        states = of_one_class(cls, states)
        first = states[0]
        for state in states:
            if _kind(state) != _kind(first):
                raise ValueError(
                    f"states should agree in all but the batch and lengths, not be {first!r} and {state!r}"
                )
        own = _joined([state._own for state in states])
        memory = None if first._memory is None else _joined([state._memory for state in states])
        since = None
        if any(state._since is not None for state in states):
            since = np.concatenate([state.firsts for state in states])
        if first._tokens is None:
            return attention_state(own, memory, None, since)
        time = max(state._tokens.shape[1] for state in states)
        rows = [np.pad(state._tokens, ((0, 0), (0, time - state._tokens.shape[1]))) for state in states]
        return attention_state(own, memory, np.concatenate(rows), since)

    def copy(self) -> AttentionState:
        """A state of its own with the same numbers. What it holds never changes, and is shared."""
        return attention_state(self._own, self._memory, self._tokens, self._since)

    def __copy__(self) -> AttentionState:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionState:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return _attention_state_from, (self._arrays(),)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        if _kind(self) != _kind(other) or not np.array_equal(self.lengths, other.lengths):
            return False
        longest = int(self.lengths.max(initial=0))
        if self._tokens is not None and other._tokens is not None:
            real = np.arange(longest) < self.lengths[:, None]
            if not np.array_equal(self._tokens[:, :longest][real], other._tokens[:, :longest][real]):
                return False
        if not _same_pages(self._own, other._own):
            return False
        if self._memory is None:
            return True
        if not np.array_equal(self._memory.lengths, other._memory.lengths):
            return False
        return _same_pages(self._memory, other._memory)

    __hash__ = None  # type: ignore[assignment]  # arrays are compared by value, and may be large

    def __repr__(self) -> str:
        layers, kv_heads, size, dtype = self._own.form
        memory = "" if self._memory is None else f", memory_lengths={self._memory.lengths.tolist()}"
        return (
            f"{type(self).__name__}(lengths={self.lengths.tolist()}, layers={layers}, kv_heads={kv_heads}, D={size}"
            f"{memory}, dtype={np.dtype(dtype).name})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file; `fastseq.load` reads it back."""
        from fastseq import io

        io.save(path, type(self).__name__, {}, self._arrays())


def attention_state(own: Any, memory: Any, tokens: Array | None, since: Array | None = None) -> AttentionState:
    """A state of pages that a set of operations made: no check, no copy. For the layers."""
    state = AttentionState.__new__(AttentionState)
    state._take(own, memory, tokens, since)
    return state


def contents(state: AttentionState) -> Contents:
    """Return what a state holds, as `attention_state` takes it."""
    return Contents(state._own, state._memory, state._tokens, state._since)


def _attention_state_from(arrays: Mapping[str, Array]) -> AttentionState:
    return AttentionState(**arrays)


def pages_for(operations: Any, pages: Any) -> Any:
    """Pages as a set of operations wants them: its own as they are, another's converted."""
    if isinstance(pages, operations.Pages):
        return pages
    return operations.Pages.of(pages.window, pages.lengths, *pages.arrays())


def _pages_of(prefix: str, window: int, lengths: Any, firsts: Any, keys: Any, values: Any) -> Any:
    """Arrays that are looked at, as pages."""
    arrays = [checks.as_array(f"{prefix}{name}", value) for name, value in (("keys", keys), ("values", values))]
    for name, array in zip(("keys", "values"), arrays, strict=True):
        if array.dtype.kind != "f":
            raise TypeError(f"{prefix}{name} should hold real floating numbers, not {array.dtype}")
        if array.ndim != 5 or array.shape != arrays[0].shape or array.dtype != arrays[0].dtype:
            raise ValueError(
                f"{prefix}keys and {prefix}values should be of one dtype and shape (B, layers, kv_heads, T, D),"
                f" not {arrays[0].shape} and {array.shape}"
            )
    if 0 in (arrays[0].shape[1], arrays[0].shape[2], arrays[0].shape[4]):
        raise ValueError(
            f"{prefix}keys and {prefix}values should have layers, heads and elements, not be of shape {arrays[0].shape}"
        )
    batch, time = arrays[0].shape[0], arrays[0].shape[3]
    counts = []
    for name, value in (("lengths", lengths), ("firsts", firsts)):
        count = checks.integers(f"{prefix}{name}", value)
        if count.shape != (batch,):
            raise ValueError(f"{prefix}{name} should be of shape ({batch},), not {count.shape}")
        if batch and not 0 <= int(count.min()) <= int(count.max()) <= MAX_TOKENS:
            raise ValueError(f"{prefix}{name} should be in 0..{MAX_TOKENS}, not {count.tolist()}")
        counts.append(count.astype(np.int64))
    kept = counts[0] - counts[1]
    if (kept < 0).any() or kept.max(initial=0) > time:
        raise ValueError(f"{prefix}lengths should be in firsts..firsts + {time}, not {counts[0].tolist()}")
    needed = np.maximum(counts[0] - window + 1, 0) if window else np.zeros_like(counts[0])
    if (counts[1] > needed).any():
        row = int(np.argmax(counts[1] > needed))
        raise ValueError(
            f"{prefix}firsts should be at most the first token that the next one looks back on, {needed[row]}, but"
            f" {prefix}firsts[{row}] is {counts[1][row]}"
        )
    if int(counts[0].sum()) // 8 > MAX_TABLES:
        raise MemoryError(f"the tables of {int(counts[0].sum())} tokens")
    native = [np.ascontiguousarray(array, array.dtype.newbyteorder("=")) for array in arrays]
    return backend.for_dtype(native[0].dtype).transformer.Pages.of(window, *counts, *native)


def _kind(state: AttentionState) -> tuple[Any, ...]:
    """What two states have in common that can be joined."""
    layers, kv_heads, size, dtype = state._own.form
    return layers, kv_heads, size, np.dtype(dtype), state.window, state._memory is None, state._tokens is None


def _joined(many: list[Any]) -> Any:
    kind = type(many[0])
    return kind.join([one if type(one) is kind else kind.of(one.window, one.lengths, *one.arrays()) for one in many])


def _same_pages(one: Any, other: Any) -> bool:
    """Whether what the next token may look back on is the same."""
    sides = [(pages.lengths, *pages.arrays()) for pages in (one, other)]
    for i, length in enumerate(one.lengths):
        first = max(int(length) - one.window + 1, 0) if one.window else 0
        a, b = (
            [array[i, :, :, first - firsts[i] : length - firsts[i]] for array in (keys, values)]
            for _, firsts, keys, values in sides
        )
        if not all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True)):
            return False
    return True
