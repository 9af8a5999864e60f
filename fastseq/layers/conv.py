"""Conv1d: parameters, states, shapes. The arithmetic is in the operations it calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastseq import checks, threads
from fastseq.checks import Array
from fastseq.layers.base import Configured, Tape
from fastseq.layers.derived import Derived
from fastseq.layers.settings import KW_ONLY, Dtype, flag, floating, random_seed, size
from fastseq.layers.windowed import LIMIT, Windowed, padding, window_size
from fastseq.state import ConvState, adopt_frames
from fastseq.windows import Windows


class Conv1d(Windowed, Configured):
    """Convolution over time: y_t = b + sum over j of W_j x_(t stride - left + j dilation); x (B, T, C), y (B, T', O).

    W_j is ``weight[:, :, j]``; `left` is the number of zeros before the first frame. The parameters are those of
    PyTorch's layer, whose axis of channels comes before that of time; here it is the last one.

    With padding "causal" or "valid", or a pair (left, 0) with left at most dilation (kernel_size - 1), no output takes
    a later frame than the one it ends at, and the layer runs on streams: `run` takes a chunk of any number of frames,
    `step` one frame.
    """

    _products = ("weight",)

    in_channels: int = size(doc="C.")
    out_channels: int = size(doc="O.")
    kernel_size: int = window_size(doc="Frames that an output takes: K.")
    _: KW_ONLY
    stride: int = window_size(default=1, doc="Frames from one output to the next.")
    padding: int | tuple[int, int] | str = padding(
        doc="Frames of zeros on both sides, or on the left and on the right of each row. "
        '"valid" is none. "causal" is dilation (kernel_size - 1) on the left, so that an output takes its own frame '
        'and those before it. "same" gives T outputs, with a stride ceil(T / stride), T the length of the row; where '
        "the number of zeros is odd, the right has one more."
    )
    dilation: int = window_size(default=1, doc="Frames from one that an output takes to the next.")
    groups: int = size(
        default=1,
        limit=LIMIT,
        doc="Into how many parts channels are divided: outputs of a part take inputs of that part. Divides both "
        "numbers of channels. `weight` is of shape (O, C / groups, K).",
    )
    bias: bool = flag(default=True, doc="Whether there is b, the parameter `bias` (O,).")
    dtype: Dtype = floating(default="float32")
    seed: int | None = random_seed(default=None, doc="Fixes the initial parameters, uniform in ±1/sqrt(K C / groups).")

    def _resolve(self) -> None:
        for name in ("in_channels", "out_channels"):
            channels = getattr(self, name)
            if channels % self.groups:
                raise ValueError(f"groups should divide {name}={channels}, not be {self.groups}")
        self._set_ends()

    def _build(self) -> None:
        self._packed: Derived[Any] = Derived()
        super()._build()

    def _initial(self, rng: np.random.Generator) -> dict[str, Array]:
        shape = (self.out_channels, self.in_channels // self.groups, self.kernel_size)
        bound = 1 / np.sqrt(shape[1] * shape[2])
        weight = rng.uniform(-bound, bound, shape)
        return {"weight": weight, **({"bias": rng.uniform(-bound, bound, self.out_channels)} if self.bias else {})}

    def _gives(self) -> int:
        return self.out_channels

    def _takes(self) -> int:
        return self.in_channels

    def _product_groups(self, prefix: str) -> list[tuple[str, ...]]:
        """Where every channel is a group of its own, there is no product that narrow weights could be of."""
        return [] if self.in_channels == self.out_channels == self.groups else super()._product_groups(prefix)

    def _weights(self) -> Any:
        """The weights as the operations want them."""
        return self._packed.get(self._arrays, self._pack)

    def _pack(self, arrays: Mapping[str, Array]) -> Any:
        return self._backend.convolution.conv_pack(arrays["weight"], arrays.get("bias"), self.groups)

    def _compute(self, x: Array, windows: Windows) -> tuple[Array, Any]:
        weights = self._weights()
        y = self._backend.convolution.conv_forward(weights, x, windows, threads.get_num_threads())
        return y, (weights, x, windows)

    def _backward(self, dy: Array, kept: Any, targets: Mapping[str, Array]) -> Array:
        weights, x, windows = kept
        n_threads = threads.get_num_threads()
        return self._backend.convolution.conv_backward(
            weights, x, windows, dy, targets["weight"], targets.get("bias"), n_threads
        )

    @property
    def carries_state(self) -> bool:  # type: ignore[override]
        """Whether `run` and `step` go on from a state: where no output takes a later frame than it ends at."""
        return self._stepless() is None

    def _stepless(self) -> str | None:
        if self._ends is not None and self._ends[1] == 0 and self._ends[0] <= self._reach:
            return None
        late = "later frames than" if self._ends is None or self._ends[1] else "frames long before"
        return f"{self._brief()} takes {late} the one that an output belongs to: padding='causal' does not"

    def unstreamable(self) -> str | None:
        """Return why the layer cannot be trained on consecutive chunks of streams; None where it can."""
        lost = self._stepless()
        if lost is None and (self.stride > 1 or self._ends != (self._reach, 0)):
            return f"{self._brief()} has no output for every frame, as padding='causal' and a stride of 1 have"
        return lost

    def initial_state(self, batch_size: int) -> ConvState:
        """The state in which a stream begins: its past are zeros.

        Parameters
        ----------
        batch_size : int
            Rows of the batch, 0 or more.
        """
        self._check_streams()
        assert self._ends is not None
        count = checks.size("batch_size", batch_size)
        frames = np.zeros((count, self._reach, self.in_channels), self.dtype)
        return adopt_frames(frames, np.full(count, self._reach - self._ends[0], np.int64))

    def run(self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None) -> tuple[Array, Any]:
        """Go on with a chunk of a stream, of any number of frames; inference.

        The outputs of chunks, one behind the other, are those of a call over all frames, bit for bit.

        Parameters
        ----------
        x : array of shape (B, T, C), or (T, C) for one sequence
            The frames of the chunk.
        state : ConvState, optional
            What the chunk before returned; by default a stream begins. All rows must have come equally far, where the
            stride is more than 1 or padding is not "causal".
        lengths : array of shape (B,), optional
            The real frames of each row in this chunk.
        resets : None
            A convolution does not forget within a chunk.

        Returns
        -------
        y : ndarray of shape (B, T', O), or (T', O)
            The outputs that the chunk completes; with a stride, or padding that is not "causal", there may be none.
        state : ConvState, or None
            After the last real frame of each row; None of a layer that does not run on streams, which takes x as a
            whole.
        """
        if not self.carries_state:
            self._check_no_state(state, resets)
            return self(x, lengths=lengths), None
        x, lengths, batched = self._opened(x, lengths)
        x, windows, end = self._continued(x, state, lengths, resets)
        y, _ = self._compute(x, windows)
        return (y if batched else y[0]), end

    def step(self, x_t: Any, state: Any = None) -> tuple[Array | None, ConvState]:
        """Go on with one frame of a stream.

        A frame goes in at every step. An output comes out when the frame completes a window: with "causal" padding and
        a stride of 1 at every step; with a stride s at the first step and every s-th after it; with "valid" padding at
        step dilation (kernel_size - 1) + 1 for the first time. At all other steps the output is None.

        Parameters
        ----------
        x_t : array of shape (B, C)
            The frame.
        state : ConvState, optional
            What the step before returned; by default a stream begins.

        Returns
        -------
        y_t : ndarray of shape (B, O), or None
            The output whose window ends at this frame, with the bits of a call; None where there is none.
        state : ConvState
            To be given to the next step.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be. Also for a padding on the right.
        """
        self._check_streams()
        x = checks.real_array("x_t", x_t, self.dtype)
        if x.ndim != 2 or x.shape[1] != self.in_channels:
            raise ValueError(f"x_t should be of shape (B, {self.in_channels}), not {x.shape}")
        x, windows, end = self._continued(x[:, None], state, None, None)
        return (self._compute(x, windows)[0][:, 0] if windows.outputs else None), end

    def _step_on(self, x_t: Array, state: Any) -> tuple[Any, Any]:
        return self.step(x_t, state)

    def forward_carrying(
        self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None, seed: int | None = None
    ) -> tuple[Array, Any, Tape]:
        """Run `forward` on a chunk of a stream: as `run`, with a tape between."""
        if not self.carries_state:
            return super().forward_carrying(x, state, lengths=lengths, resets=resets, seed=seed)
        checks.seed("seed", seed)
        x, lengths, batched = self._opened(x, lengths)
        whole, windows, end = self._continued(x, state, lengths, resets)
        y, kept = self._compute(whole, windows)
        return (y if batched else y[0]), end, Tape(self, (y.shape, batched, self._reach, kept))

    def backward_carrying(
        self, dy: Any, tape: Tape, *, truncate: int | None = None, grads: Mapping[str, Array] | None = None
    ) -> Array | None:
        """Run `backward`; nothing recurs here that `truncate` could cut."""
        return self.backward(dy, tape, grads=grads)

    def _lengths_after(self, lengths: Array, state: Any = None) -> Array:
        counts: Array = self._counts(lengths) if state is None else _completed(lengths, state.wait, self.stride)
        return counts

    def _continued(self, x: Array, state: Any, lengths: Array | None, resets: Any) -> tuple[Array, Windows, ConvState]:
        """The frames of a chunk behind those of the state, the windows that they complete, and the state at the end."""
        if resets is not None:
            raise ValueError(f"resets should be None: {self._making()} does not forget within a chunk")
        batch, time = x.shape[:2]
        past, wait = self._past(state, batch)
        whole = np.concatenate([past, x], axis=1)
        frames = np.full(batch, time, np.int64) if lengths is None else lengths
        counts = _completed(frames, wait, self.stride)
        outputs = int(_completed(time, wait[:1].max(initial=0), self.stride))
        windows = Windows(self.kernel_size, self.stride, self.dilation, frames + self._reach, -wait, counts, outputs)
        if lengths is None:
            last = whole[:, time:].copy()
        else:
            last = np.take_along_axis(whole, (lengths[:, None] + np.arange(self._reach))[..., None], axis=1)
        return whole, windows, adopt_frames(last, wait + counts * self.stride - frames)

    def _past(self, state: Any, batch: int) -> tuple[Array, Array]:
        """The arrays of a state, checked."""
        state = self.initial_state(batch) if state is None else state
        if not isinstance(state, ConvState):
            raise TypeError(f"state should be a ConvState, not {checks.describe(state)}")
        frames = checks.real_array("state.frames", state.frames, self.dtype)
        wanted = (batch, self._reach, self.in_channels)
        if frames.shape != wanted:
            raise ValueError(f"state.frames should be of shape {wanted}, not {frames.shape}")
        if batch and (state.wait != state.wait[0]).any():
            raise ValueError(
                f"state.wait should be the same in all rows, which have outputs at the same frames, not {state.wait}"
            )
        limit = max(self._reach, self.stride - 1)
        if state.wait.max(initial=0) > limit:
            raise ValueError(f"state.wait should be at most {limit}, not {state.wait.max()}")
        return frames, state.wait

    def _check_streams(self) -> None:
        lost = self._stepless()
        if lost is not None:
            raise ValueError(f"a stream needs a layer that can go on frame by frame, but {lost}")


def _completed(frames: Any, wait: Any, stride: int) -> Any:
    """How many windows some more frames complete, after those that come before the next one is complete."""
    return np.maximum(0, -((wait - frames) // stride))
