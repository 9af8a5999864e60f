"""What a graph asks of the layers at its nodes.

A node reads one or more arrays and gives one or more values. Most layers give one, their outputs, whose name is "". A
recurrent layer also gives the states after the last step, "h" and "c". A graph at a node gives its outputs by name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastseq.checks import Array

if TYPE_CHECKING:
    from fastseq.layers.base import Tape

OUTPUT = ""  # the name of the only output of a layer among the values it gives

# Whether a value has an axis of time, axis 1 of (B, T, ...): True, or False for (B, ...); None where nobody knows.
Timed = bool | None
Values = dict[str, Array]


class Connectable:
    """The part of `Layer` that graphs use; a layer with more than one input or value overrides some of it."""

    time: str
    carries_state: bool

    _length_names: ClassVar[tuple[str, ...]] = ("lengths",)  # what a call with several arrays calls their lengths

    def _values(self) -> tuple[str, ...]:
        """Return the names of the values that the layer gives at a node."""
        return (OUTPUT,)

    def _arity_fault(self, count: int) -> str | None:
        """Return why the layer cannot read `count` arrays; None where it can."""
        if not callable(self):
            return "cannot be called"
        fault = _call_fault(type(self).__call__, count)
        if fault is not None:
            return f"cannot be called with {count} input{'s' * (count != 1)}: {fault}"
        return "carries a state and takes one input" if self.carries_state and count != 1 else None

    def _times_after(self, timed: Sequence[Timed]) -> dict[str, Timed]:
        """Return which values have an axis of time, given which of the arrays have one."""
        if self.time == "pooling":
            return {OUTPUT: False}
        if self.time == "sequence":
            return {OUTPUT: timed[0] if timed else None}  # of attention, that of the queries
        known = True if True in timed else None if None in timed or not timed else False
        return {OUTPUT: known}

    def _time_fault(self, timed: Sequence[Timed]) -> str | None:
        """Return what is wrong with arrays that have an axis of time, or have none; None where nothing is."""
        if self.time != "pointwise" and timed and all(one is False for one in timed):
            return "needs an axis of time"
        return None

    def _widths_through(self, widths: Sequence[int | None]) -> tuple[dict[str, int | None], str | None]:
        """Return the sizes of the vectors of each value, given those of the arrays, and what is wrong with these.

        None is a size that is not known, and a fault that there is not.
        """
        me: Any = self
        takes, given = me._takes(), widths[0] if widths else None
        fits = None in (takes, given) or takes == given
        return {OUTPUT: me._width_after(given)}, None if fits else f"takes vectors of {takes}, not of {given}"

    def _lengths_of_values(self, lengths: Array, state: Any) -> dict[str, Array]:
        """Return the lengths of the values, of rows that start from a state; of those that have an axis of time."""
        me: Any = self
        return dict.fromkeys(self._values(), me._lengths_after(lengths, state))

    def _run_values(
        self, arrays: Sequence[Array], state: Any, lengths: Array | None, resets: Any
    ) -> tuple[Values, Any]:
        """Run in inference; return the values and the state."""
        me: Any = self
        if len(arrays) == 1:
            y, end = me.run(arrays[0], state, lengths=lengths, resets=resets)
            return {OUTPUT: y}, end
        return {OUTPUT: me(*arrays, **self._length_options(lengths))}, None

    def _forward_values(
        self, arrays: Sequence[Array], state: Any, lengths: Array | None, resets: Any, seed: int
    ) -> tuple[Values, Any, Tape]:
        """Run in training; return the values, the state and the tape."""
        me: Any = self
        if len(arrays) == 1:
            y, end, tape = me.forward_carrying(arrays[0], state, lengths=lengths, resets=resets, seed=seed)
            return {OUTPUT: y}, end, tape
        if not hasattr(me, "forward"):
            raise TypeError(f"a layer needs a forward to be trained, and {self!r} has none")
        y, *_, tape = me.forward(*arrays, seed=seed, **self._length_options(lengths))
        return {OUTPUT: y}, None, tape

    def _backward_values(
        self, dvalues: Mapping[str, Array], tape: Tape, count: int, truncate: int | None, grads: Any
    ) -> tuple[Array | None, ...]:
        """Return the gradient of each of the `count` arrays, given those of the values; None where an array has none.

        The gradient of the outputs is there; a value that is not among `dvalues` has none.
        """
        me: Any = self
        if count == 1:
            return (me.backward_carrying(dvalues[OUTPUT], tape, truncate=truncate, grads=grads),)
        result = me.backward(dvalues[OUTPUT], tape, grads=grads)
        found = result if isinstance(result, tuple) else (result,)
        if count and len(found) != count:
            raise ValueError(f"backward should return {count} gradients, one for each input, not {len(found)}")
        return tuple(one if isinstance(one, np.ndarray) else None for one in found[:count])

    def _step_values(self, arrays: Sequence[Array], state: Any) -> tuple[Values, Any]:
        """Run one time step (B, ...) of a layer whose `_stepless` is None."""
        me: Any = self
        if len(arrays) == 1:
            y_t, end = me._step_on(arrays[0], state)
            return {OUTPUT: y_t}, end
        return {OUTPUT: me(*(array[:, None] for array in arrays))[:, 0]}, None

    def _length_options(self, lengths: Array | None) -> dict[str, Array]:
        """Return the lengths by the names that a call with several arrays has for them."""
        return {} if lengths is None or self.time == "pointwise" else dict.fromkeys(self._length_names, lengths)


@functools.lru_cache(maxsize=256)
def _call_fault(call: Any, count: int) -> str | None:
    """Return why a ``__call__`` cannot take `count` arrays; None where it can. Graphs of many nodes ask it often."""
    try:
        inspect.signature(call).bind(*[None] * (1 + count))
    except TypeError as error:
        return str(error)
    return None
