"""States of recurrent layers and of attention: immutable values that belong to whoever holds them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np

from fastseq import _transformer, checks
from fastseq.checks import Array

S = TypeVar("S", bound="State")


class State:
    """The state of an RNN or a GRU.

    Parameters
    ----------
    h : array of shape (B, num_layers * D, H)
        Layers outermost, forward before reverse. Copied.

    Attributes
    ----------
    h : ndarray
        Read-only.

    Notes
    -----
    ``state[rows]`` is the state of some rows of the batch and keeps the axis. States compare by value,
    copy, pickle, `save`, and `fastseq.load`; `State.concatenate` joins batches. Unpacking gives the arrays.
    """

    __slots__ = ("h",)
    _fields: ClassVar[tuple[str, ...]] = ("h",)
    h: Array

    def __init__(self, h: Any) -> None:
        self._take(h=h)

    def _take(self, **arrays: Any) -> None:
        for name, value in arrays.items():
            array = checks.as_array(name, value)
            if array.dtype.kind != "f":
                raise TypeError(f"{name} should hold real floating numbers, not {array.dtype}")
            if array.ndim != 3:
                raise ValueError(f"{name} should be of shape (B, num_layers * D, H), not {array.shape}")
            array = np.array(array, dtype=np.dtype(array.dtype.type), order="C")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        shapes = {name: getattr(self, name).shape[:2] for name in self._fields}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"the arrays of a state should agree in batch and layers, not {shapes}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a {type(self).__name__} is immutable")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a {type(self).__name__} is immutable")

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return int(self.h.shape[0])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the arrays."""
        return self.h.dtype

    def __iter__(self) -> Iterator[Array]:
        return iter([getattr(self, name) for name in self._fields])

    def __getitem__(self: S, rows: Any) -> S:
        index = _row_indices(rows, self.batch_size)
        return type(self)(*(array[index] for array in self))

    @classmethod
    def concatenate(cls: type[S], states: Iterable[S]) -> S:
        """Join the batches of some states of one layer.

        Parameters
        ----------
        states : iterable of states
            At least one; of one class, dtype and size.
        """
        states = _of_one_class(cls, states)
        first = states[0]
        for state in states:
            for name in cls._fields:
                one, other = getattr(first, name), getattr(state, name)
                if one.shape[1:] != other.shape[1:] or one.dtype != other.dtype:
                    raise ValueError(
                        f"states should agree in all but the batch, but {name} is {one.dtype} of {one.shape} in"
                        f" one and {other.dtype} of {other.shape} in another"
                    )
        return cls(*(np.concatenate(arrays) for arrays in zip(*states, strict=True)))

    def copy(self: S) -> S:
        """A state of its own with the same numbers."""
        return type(self)(*self)

    def __copy__(self: S) -> S:
        return self.copy()

    def __deepcopy__(self: S, memo: dict[int, Any]) -> S:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(np.array(array) for array in self)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(
            a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True) for a, b in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]  # arrays are compared by value, and may be large

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={getattr(self, name).shape}" for name in self._fields)
        return f"{type(self).__name__}({shapes}, dtype={self.dtype.name})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file; `fastseq.load` reads it back."""
        from fastseq import io

        io.save(path, type(self).__name__, {}, {name: getattr(self, name) for name in self._fields})


def _of_one_class(cls: type[Any], states: Any) -> list[Any]:
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


def _row_indices(rows: Any, batch: int) -> Array:
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


class LSTMState(State):
    """The state of an LSTM.

    Parameters
    ----------
    h : array of shape (B, num_layers * D, P)
        Outputs; P is `proj_size` where the layer has one, else the hidden size.
    c : array of shape (B, num_layers * D, H)
        Cell states. Layers outermost, forward before reverse, in both. Copied.

    Attributes
    ----------
    h, c : ndarray
        Read-only.
    """

    __slots__ = ("c",)
    _fields: ClassVar[tuple[str, ...]] = ("h", "c")
    c: Array

    def __init__(self, h: Any, c: Any) -> None:
        self._take(h=h, c=c)
        if self.h.dtype != self.c.dtype:
            raise TypeError(f"h and c should have one dtype, not {self.h.dtype} and {self.c.dtype}")


# Slots are set through their descriptors: a state refuses assignment.
_new_state, _new_lstm_state = State.__new__, LSTMState.__new__
_set_h = State.h.__set__  # type: ignore[attr-defined, misc]
_set_c = LSTMState.c.__set__  # type: ignore[attr-defined, misc]


def adopt(h: Array, c: Array | None) -> State:
    """A state of fresh, read-only arrays that nobody else holds: no check, no copy. For the layers."""
    if c is None:
        state = _new_state(State)
        _set_h(state, h)
        return state
    state = _new_lstm_state(LSTMState)
    _set_h(state, h)
    _set_c(state, c)
    return state


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

    __slots__ = ("_memory", "_own", "_tokens")
    _own: Any  # Pages of the set of operations that made them
    _memory: Any
    _tokens: Array | None

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
        window = checks.size("window", np.asarray(window).item())
        own = _pages_of("", window, lengths, firsts, keys, values)
        memory = None
        if memory_lengths is not None:
            memory = _pages_of(
                "memory_", 0, memory_lengths, np.zeros(len(own.lengths), np.int64), memory_keys, memory_values
            )
            if len(memory.lengths) != len(own.lengths) or memory.form != own.form:
                raise ValueError(f"memory_keys should agree with keys but for T, not be of {np.shape(memory_keys)}")
        if tokens is not None:
            tokens = checks.integers("tokens", tokens).astype(np.int64)
            if tokens.ndim != 2 or len(tokens) != len(own.lengths) or tokens.shape[1] < own.lengths.max(initial=0):
                raise ValueError(f"tokens should have those of all {len(own.lengths)} rows, not be of {tokens.shape}")
        self._take(own, memory, tokens)

    def _take(self, own: Any, memory: Any, tokens: Array | None) -> None:
        for name, value in (("_own", own), ("_memory", memory), ("_tokens", tokens)):
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
        return firsts

    @property
    def window(self) -> int:  # noqa: D102
        return int(self._own.window)

    @property
    def keys(self) -> Array:  # noqa: D102
        keys: Array = self._own.arrays()[1]
        return keys

    @property
    def values(self) -> Array:  # noqa: D102
        values: Array = self._own.arrays()[2]
        return values

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
        firsts, keys, values = self._own.arrays()
        arrays = {"lengths": self.lengths, "firsts": firsts, "keys": keys, "values": values}
        arrays["window"] = np.array([self.window])
        if self._memory is not None:
            arrays["memory_lengths"] = self._memory.lengths
            _, arrays["memory_keys"], arrays["memory_values"] = self._memory.arrays()
        if self._tokens is not None:
            arrays["tokens"] = self._tokens
        return arrays

    def __getitem__(self, rows: Any) -> AttentionState:
        index = _row_indices(rows, self.batch_size)
        memory = None if self._memory is None else self._memory.take(index)
        return attention_state(self._own.take(index), memory, None if self._tokens is None else self._tokens[index])

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
        wanted = np.broadcast_to(given, self.lengths.shape)
        needed = np.maximum(wanted - self.window + 1, 0) if self.window else np.zeros_like(wanted)
        for i, (length, most, least) in enumerate(zip(wanted, self.lengths, self.firsts, strict=True)):
            if not 0 <= length <= most:
                raise ValueError(f"lengths[{i}] should be in 0..{most}, not {length}")
            if needed[i] < least:
                raise ValueError(
                    f"lengths[{i}] should be at least {least + self.window - 1}: what came before token {least} is"
                    f" out of the window, and gone; not {length}"
                )
        tokens = None
        if self._tokens is not None:
            tokens = np.where(np.arange(self._tokens.shape[1]) < wanted[:, None], self._tokens, 0)
        return attention_state(self._own.take(np.arange(len(wanted)), wanted), self._memory, tokens)

    @classmethod
    def concatenate(cls, states: Iterable[AttentionState]) -> AttentionState:
        """Join the batches of some states of one layer, or one model.

        Parameters
        ----------
        states : iterable of states
            At least one.
        """
        states = _of_one_class(cls, states)
        first = states[0]
        for state in states:
            if _kind(state) != _kind(first):
                raise ValueError(
                    f"states should agree in all but the batch and lengths, not be {first!r} and {state!r}"
                )
        own = _joined([state._own for state in states])
        memory = None if first._memory is None else _joined([state._memory for state in states])
        if first._tokens is None:
            return attention_state(own, memory, None)
        time = max(state._tokens.shape[1] for state in states)
        rows = [np.pad(state._tokens, ((0, 0), (0, time - state._tokens.shape[1]))) for state in states]
        return attention_state(own, memory, np.concatenate(rows))

    def copy(self) -> AttentionState:
        """A state of its own with the same numbers. What it holds never changes, and is shared."""
        return attention_state(self._own, self._memory, self._tokens)

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


def attention_state(own: Any, memory: Any, tokens: Array | None) -> AttentionState:
    """A state of pages that a set of operations made: no check, no copy. For the layers."""
    state = AttentionState.__new__(AttentionState)
    state._take(own, memory, tokens)
    return state


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
    batch, time = arrays[0].shape[0], arrays[0].shape[3]
    counts = [
        checks.integers(f"{prefix}{name}", v).astype(np.int64) for name, v in (("lengths", lengths), ("firsts", firsts))
    ]
    for name, count in zip(("lengths", "firsts"), counts, strict=True):
        if count.shape != (batch,) or (count < 0).any():
            raise ValueError(f"{prefix}{name} should be of shape ({batch},), from 0 on, not {checks.describe(count)}")
    kept = counts[0] - counts[1]
    if (kept < 0).any() or kept.max(initial=0) > time:
        raise ValueError(f"{prefix}lengths should be in firsts..firsts + {time}, not {counts[0].tolist()}")
    native = [np.ascontiguousarray(array, array.dtype.newbyteorder("=")) for array in arrays]
    return _operations_for(native[0].dtype).Pages.of(window, *counts, *native)


def _operations_for(dtype: np.dtype[Any]) -> Any:
    """The compiled operations, where they know a dtype."""
    if dtype.name in ("float32", "float64"):
        return _transformer
    from fastseq.reference import transformer_operations

    return transformer_operations


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
