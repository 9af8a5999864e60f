"""States of recurrent layers and of recurrent decoders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.state.arrays import ArrayState
from fastseq.state.rows import row_indices


class State(ArrayState):
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
        for name, array in self._arrays().items():
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

    def __iter__(self) -> Iterator[Array]:
        return iter(self._arrays().values())

    def __getitem__(self, rows: Any) -> Seq2SeqState:
        index = row_indices(rows, self.batch_size)
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
        widths = {name: array.shape[-1] for name, array in self._arrays().items() if name != "lengths"}
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
        for name, one in self._arrays().items():
            own, its = one, getattr(other, name)
            if name in ("keys", "projected"):
                own, its = own[:, :longest], its[:, :longest]
            if not np.array_equal(own, its, equal_nan=name != "lengths"):
                return False
        return True

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={array.shape}" for name, array in self._arrays().items())
        return f"{type(self).__name__}({shapes}, dtype={self.dtype.name})"


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
