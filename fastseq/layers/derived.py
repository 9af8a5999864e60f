"""What is made from parameters, and made again after these have changed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from fastseq.checks import Array

T = TypeVar("T")


class Derived(Generic[T]):
    """A value made from parameters, packed weights for instance, kept as long as these are the same arrays.

    A change of parameters puts a new mapping in the place of the old one (`Layer._arrays`), so identity decides. Two
    threads that find nothing may both make the value; each gets a right one.
    """

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: tuple[Any, T] | None = None

    def get(self, of: Mapping[str, Array] | tuple[Any, ...], make: Callable[[Any], T]) -> T:
        """Return the value that ``make(of)`` gives, which is called only where `of` is not what it was.

        Parameters
        ----------
        of : mapping or tuple
            The parameters of a layer; or a tuple, whose members are compared by identity.
        make : callable
            Not kept, or a layer and its weights would hold each other.
        """
        kept = self._kept
        if kept is not None and (kept[0] is of or (type(of) is tuple and all(map(operator.is_, kept[0], of)))):
            return kept[1]
        value = make(of)
        self._kept = of, value
        return value
