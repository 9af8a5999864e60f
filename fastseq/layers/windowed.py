"""What layers over windows of time share: Conv1d, MaxPool1d and AvgPool1d. Settings of windows, lengths, shapes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.layers.base import SEQUENCE, Layer, Tape
from fastseq.layers.settings import REQUIRED, checked, size
from fastseq.windows import Windows

LIMIT = (1 << 31) - 1  # of a setting of windows, so that no sum of a few of them leaves 64 bits
PADDINGS = ("same", "valid", "causal")


def window_size(*, doc: str, default: Any = REQUIRED, optional: bool = False, before: str = "") -> Any:
    """Declare a number of frames, at least 1; or None by default."""
    if optional:

        def check(name: str, value: Any) -> int:
            return _frames(name, value, 1)

        return checked(check, default=None, takes="int", form="int", doc=doc)
    return size(default=default, limit=LIMIT, doc=doc, before=before)


def padding(*, doc: str) -> Any:
    """Declare the padding of windows: a number, a pair, or one of `PADDINGS`."""
    form = 'int, pair of int, or one of {"same", "valid", "causal"}'
    return checked(_padding, default=0, takes="int | tuple[int, int] | str", form=form, doc=doc)


def _padding(name: str, value: Any) -> int | tuple[int, int] | str:
    if isinstance(value, str):
        return checks.choice(name, value, PADDINGS)
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise ValueError(f"{name} should be a pair, frames on the left and on the right, not {value!r}")
        return _frames(f"{name}[0]", value[0], 0), _frames(f"{name}[1]", value[1], 0)
    return _frames(name, value, 0)


def _frames(name: str, value: Any, least: int) -> int:
    number = checks.size(name, value, least)
    if number > LIMIT:
        raise ValueError(f"{name} should be at most {LIMIT}, not {number}")
    return number


class Windowed(Layer):
    """A layer each of whose outputs is made of a window of frames."""

    time = SEQUENCE

    kernel_size: int
    stride: int
    padding: int | tuple[int, int] | str
    dilation: int
    _reach: int  # frames from the first of a window to its last
    _ends: tuple[int, int] | None  # frames of padding; None: as many as the length of a row asks for

    def _set_ends(self) -> None:
        """Find out how much padding there is; called when the settings are there."""
        self._reach = self.dilation * (self.kernel_size - 1)
        if isinstance(self.padding, tuple):
            self._ends = self.padding
        elif isinstance(self.padding, int):
            self._ends = self.padding, self.padding
        elif self.padding == "same":
            self._ends = (self._reach // 2, self._reach - self._reach // 2) if self.stride == 1 else None
        else:
            self._ends = (self._reach if self.padding == "causal" else 0), 0

    def _counts(self, frames: Any) -> Any:
        """The number of windows of rows of so many frames."""
        if self._ends is None:
            return -(-frames // self.stride)
        return np.maximum(0, (frames + sum(self._ends) - self._reach - 1) // self.stride + 1)

    def _windows(self, batch: int, time: int, lengths: Array | None) -> Windows:
        """The windows of whole rows."""
        frames = np.full(batch, time, np.int64) if lengths is None else lengths
        counts = self._counts(frames)
        if self._ends is None:
            lefts = np.maximum(0, (counts - 1) * self.stride + self._reach + 1 - frames) // 2
        else:
            lefts = np.full(batch, self._ends[0], np.int64)
        outputs = int(self._counts(time))
        return Windows(self.kernel_size, self.stride, self.dilation, frames, lefts, counts, outputs)

    def _lengths_after(self, lengths: Array, state: Any = None) -> Array:
        counts: Array = self._counts(lengths)
        return counts

    def _opened(self, x: Any, lengths: Any) -> tuple[Array, Array | None, bool]:
        """x (B, T, C), contiguous, and lengths, both checked; whether there was a batch."""
        x, lengths = checks.ragged("x", x, lengths)
        x = checks.real_array("x", x, self.dtype)
        width = self._takes()
        if x.ndim not in (2, 3) or (width is not None and x.shape[-1] != width):
            raise ValueError(f"x should be of shape (B, T, {'C' if width is None else width}), not {x.shape}")
        batched = x.ndim == 3
        x = x if batched else x[None]
        if lengths is not None:
            lengths = checks.lengths(lengths, *x.shape[:2])
        return (x if x.flags.c_contiguous else np.ascontiguousarray(x)), lengths, batched

    @abstractmethod
    def _compute(self, x: Array, windows: Windows) -> tuple[Array, Any]:
        """Return outputs (B, outputs, ...), and what `_backward` needs."""

    @abstractmethod
    def _backward(self, dy: Array, kept: Any, targets: Mapping[str, Array]) -> Array:
        """Return the gradient of x, and add those of parameters to `targets`; `dy` has the shape of y."""

    def __call__(self, x: Any, *, lengths: Any = None) -> Array:
        """Compute the outputs of all windows; inference.

        Parameters
        ----------
        x : array of shape (B, T, C), or (T, C) for one sequence; or list of arrays (T_i, C)
            Real floating numbers.
        lengths : array of shape (B,), optional
            The real steps of each row, integers in 0..T. What is past them counts as padding does.

        Returns
        -------
        y : ndarray of shape (B, T', C'), or (T', C')
            T' is ``output_lengths(T)``. 0 past the output length of a row, ``output_lengths(lengths)``.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        x, lengths, batched = self._opened(x, lengths)
        y, _ = self._compute(x, self._windows(len(x), x.shape[1], lengths))
        return y if batched else y[0]

    def forward(self, x: Any, *, lengths: Any = None, seed: int | None = None) -> tuple[Array, Tape]:
        """Compute the outputs of all windows in training, and a tape for `backward`.

        Parameters
        ----------
        x, lengths
            As for a call. `x` must not be changed while the tape is in use.
        seed : int, optional
            Nothing here is random.

        Returns
        -------
        y : ndarray of shape (B, T', C'), or (T', C')
        tape : Tape
        """
        checks.seed("seed", seed)
        x, lengths, batched = self._opened(x, lengths)
        y, kept = self._compute(x, self._windows(len(x), x.shape[1], lengths))
        return (y if batched else y[0]), Tape(self, (y.shape, batched, 0, kept))

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> Array:
        """Compute gradients from that of the outputs.

        Parameters
        ----------
        dy : array of the shape of y
            Ignored past the output length of a row.
        tape : Tape
            Returned by `forward`.
        grads : mapping from str to ndarray, optional
            Arrays that gradients of parameters are added to; `grads` of the layer by default.

        Returns
        -------
        dx : ndarray of the shape of x
            0 past the length of a row.
        """
        shape, batched, before, kept = self._kept(tape)
        dy = checks.like("dy", dy, self.dtype, shape if batched else shape[1:])
        dx = self._backward(dy if batched else dy[None], kept, self._targets(grads))[:, before:]
        return dx if batched else dx[0]

    def unstreamable(self) -> str | None:
        """Return why the layer cannot be trained on consecutive chunks of streams; None where it can."""
        return self._stepless()
