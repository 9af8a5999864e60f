"""States of recurrent layers and of attention: immutable values that belong to whoever holds them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np

from fastseq import backend, checks
from fastseq.checks import Array

S = TypeVar("S", bound="State")

MAX_TOKENS = (1 << 31) - 1  # of a row; more are some weeks of decoding
MAX_TABLES = 1 << 31  # bytes of the tables of pages of a state that is made of arrays: 8 for every 64 tokens


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
        shapes = {name: getattr(self, name).shape[:2] for name in arrays}
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

    def replaced(self: S, rows: Any, other: S) -> S:
        """The state with some rows taken from another: where a stream ends and a new one begins, for example.

        Parameters
        ----------
        rows : int, slice, or array of integers or booleans
            Which rows of this state, each once.
        other : state
            Of this class, dtype and size, with as many rows as are replaced, in their order.
        """
        result: S = _replaced(self, rows, other)
        return result

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


def _replaced(state: Any, rows: Any, other: Any) -> Any:
    """`replaced` of any kind of state: the rows of both, joined, and those that are wanted taken of them."""
    if type(other) is not type(state):
        raise TypeError(f"other should be a {type(state).__name__}, not {checks.describe(other)}")
    index = _row_indices(rows, state.batch_size) % max(1, state.batch_size)
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


class Seq2SeqState(State):
    """The state of a recurrent decoder between two symbols, and what it attends to in the source.

    Parameters
    ----------
    h : array of shape (B, num_layers, H)
    c : array of shape (B, num_layers, H), optional
        Of an LSTM.
    keys : array of shape (B, S, K), optional
        With attention: the outputs of the encoder.
    projected : array of shape (B, S, A), optional
        What the scores take of them.
    lengths : array of shape (B,), optional
        How many keys of each row are real; what stands past them does not matter.

    Attributes
    ----------
    h, c, keys, projected, lengths : ndarray or None
        Read-only copies; keys and projected have zeros past the lengths.
    """

    __slots__ = ("c", "keys", "lengths", "projected")
    _fields = ("h", "c", "keys", "projected", "lengths")
    c: Array | None
    keys: Array | None
    projected: Array | None
    lengths: Array | None

    def __init__(self, h: Any, c: Any = None, keys: Any = None, projected: Any = None, lengths: Any = None) -> None:
        for name in self._fields:
            object.__setattr__(self, name, None)
        self._take(**{"h": h} if c is None else {"h": h, "c": c})
        of_source = {"keys": keys, "projected": projected, "lengths": lengths}
        missing = [name for name, value in of_source.items() if value is None]
        if 0 < len(missing) < len(of_source):
            verb = "is" if len(missing) == 1 else "are"
            raise ValueError(f"keys, projected and lengths should be given together: {', '.join(missing)} {verb} None")
        if not missing:
            self._take_source(**of_source)
        for name, array in self._named().items():
            if array.dtype != self.h.dtype and name != "lengths":
                raise TypeError(f"h and {name} should have one dtype, not {self.h.dtype} and {array.dtype}")

    def _take_source(self, keys: Any, projected: Any, lengths: Any) -> None:
        arrays = {}
        for name, value, width in (("keys", keys, "K"), ("projected", projected, "A")):
            array = checks.as_array(name, value)
            if array.dtype.kind != "f":
                raise TypeError(f"{name} should hold real floating numbers, not {array.dtype}")
            if array.ndim != 3 or len(array) != self.batch_size:
                raise ValueError(f"{name} should be of shape ({self.batch_size}, S, {width}), not {array.shape}")
            arrays[name] = np.array(array, dtype=np.dtype(array.dtype.type), order="C")
        time = arrays["keys"].shape[1]
        if arrays["projected"].shape[1] != time:
            raise ValueError(f"projected should have the {time} steps of keys, not {arrays['projected'].shape[1]}")
        arrays["lengths"] = checks.lengths(lengths, self.batch_size, time)
        past = np.arange(time) >= arrays["lengths"][:, None]
        arrays["keys"][past] = arrays["projected"][past] = 0
        for name, array in arrays.items():
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def _named(self) -> dict[str, Array]:
        """The arrays there are."""
        named = {name: getattr(self, name) for name in self._fields}
        return {name: array for name, array in named.items() if array is not None}

    def __iter__(self) -> Iterator[Array]:
        return iter(self._named().values())

    def __getitem__(self, rows: Any) -> Seq2SeqState:
        index = _row_indices(rows, self.batch_size)
        return adopt_pair(*(None if array is None else array[index] for array in self._all()))

    def _all(self) -> tuple[Array | None, ...]:
        return tuple(getattr(self, name) for name in self._fields)

    @classmethod
    def concatenate(cls, states: Iterable[Seq2SeqState]) -> Seq2SeqState:
        """Join the batches of some states of one model; sources may be of other lengths.

        Parameters
        ----------
        states : iterable of states
            At least one; of one dtype and size.
        """
        if not isinstance(states, Iterable):
            raise TypeError(f"states should be an iterable of states, not {checks.describe(states)}")
        states = list(states)
        if not states:
            raise ValueError("states should hold at least one state")
        first = states[0]
        for state in states:
            if type(state) is not cls:
                raise TypeError(f"states should hold only {cls.__name__}, not {checks.describe(state)}")
            if state._kind() != first._kind():
                raise ValueError(
                    f"states should agree in all but the batch and the lengths, not be {first!r} and {state!r}"
                )
        joined = []
        for name in cls._fields:
            arrays = [getattr(state, name) for state in states]
            if name in ("keys", "projected") and first.keys is not None:
                time = max(array.shape[1] for array in arrays)
                arrays = [np.pad(array, ((0, 0), (0, time - array.shape[1]), (0, 0))) for array in arrays]
            joined.append(None if arrays[0] is None else np.concatenate(arrays))
        return adopt_pair(*joined)

    def _kind(self) -> tuple[Any, ...]:
        """What states have in common that can be joined."""
        widths = {name: array.shape[-1] for name, array in self._named().items() if name != "lengths"}
        return self.dtype, self.h.shape[1], widths

    def copy(self) -> Seq2SeqState:
        """A state of its own with the same numbers."""
        return adopt_pair(*(None if array is None else array.copy() for array in self._all()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(None if array is None else np.array(array) for array in self._all())

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        if self._kind() != other._kind() or self.batch_size != other.batch_size:
            return False
        longest = None
        if self.lengths is not None and other.lengths is not None:
            if not np.array_equal(self.lengths, other.lengths):
                return False
            longest = int(self.lengths.max(initial=0))
        for name, one in self._named().items():
            own, its = one, getattr(other, name)
            if name in ("keys", "projected"):
                own, its = own[:, :longest], its[:, :longest]
            if not np.array_equal(own, its, equal_nan=name != "lengths"):
                return False
        return True

    __hash__ = None

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={array.shape}" for name, array in self._named().items())
        return f"{type(self).__name__}({shapes}, dtype={self.dtype.name})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file; `fastseq.load` reads it back."""
        from fastseq import io

        io.save(path, type(self).__name__, {}, self._named())


def adopt_pair(
    h: Array | None, c: Array | None, keys: Array | None, projected: Array | None, lengths: Array | None
) -> Seq2SeqState:
    """A `Seq2SeqState` of arrays that nobody else holds, or that are read-only: no check, no copy. For the models."""
    state = Seq2SeqState.__new__(Seq2SeqState)
    for name, array in zip(Seq2SeqState._fields, (h, c, keys, projected, lengths), strict=True):
        if array is not None:
            array.flags.writeable = False
        object.__setattr__(state, name, array)
    return state


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
                raise ValueError(f"memory_keys should agree with keys but for T, not be of {np.shape(memory_keys)}")
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
        index = _row_indices(rows, self.batch_size)
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
        result: AttentionState = _replaced(self, rows, other)
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
        states = _of_one_class(cls, states)
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
