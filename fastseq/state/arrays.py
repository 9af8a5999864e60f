"""What states that are some named arrays have in common."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TypeVar

import numpy as np

from fastseq.checks import Array
from fastseq.state.rows import of_one_class, replaced, row_indices

S = TypeVar("S", bound="ArrayState")


class ArrayState:
    """An immutable value of read-only arrays, the batch first in each; arguments of the class are named as they are."""

    __slots__ = ()
    _fields: ClassVar[tuple[str, ...]]  # names of the arrays; the first is of real numbers

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a {type(self).__name__} is immutable")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a {type(self).__name__} is immutable")

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return len(getattr(self, self._fields[0]))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the real numbers."""
        dtype: np.dtype[Any] = getattr(self, self._fields[0]).dtype
        return dtype

    def __iter__(self) -> Iterator[Array]:
        return iter([getattr(self, name) for name in self._fields])

    def __getitem__(self: S, rows: Any) -> S:
        index = row_indices(rows, self.batch_size)
        return type(self)(*(array[index] for array in self))

    @classmethod
    def concatenate(cls: type[S], states: Iterable[S]) -> S:
        """Join the batches of some states of one layer.

        Parameters
        ----------
        states : iterable of states
            At least one; of one class, dtype and size.
        """
        states = of_one_class(cls, states)
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
        result: S = replaced(self, rows, other)
        return result

    def _arrays(self) -> dict[str, Array]:
        """The arrays by name, without those that are None."""
        named = {name: getattr(self, name) for name in self._fields}
        return {name: array for name, array in named.items() if array is not None}

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

        io.save(path, type(self).__name__, {}, self._arrays())
