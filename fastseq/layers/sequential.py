"""A container of layers that run in order."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.layers.base import (
    POINTWISE,
    POOLING,
    SEQUENCE,
    TIMES,
    Layer,
    Tape,
    child_seed,
    mask_seed,
    under,
)
from fastseq.layers.connectable import OUTPUT
from fastseq.layers.containers import (
    Container,
    check_takes,
    declares_widths,
    describe_no_layer,
    found_twice,
    locate,
    shortened,
)
from fastseq.layers.rows import cleared


class Sequential(Container):
    """Layers in order: the outputs of each are the inputs of the next.

    `lengths` are passed to every layer whose `time` is not "pointwise", up to the first that pools; outputs of
    pointwise layers in the padding are set to 0. Recurrent layers start from zeros, or from `state`, and pass on their
    outputs at every step. Parameters are named ``0.weight``, ``1.weight_ih_l0`` and so on.

    Parameters
    ----------
    *layers : layers
        At least one, none of them twice, all of one dtype. The size of the input vectors of each is that of the output
        vectors of the one before, as far as both are known. After a layer that pools there are only pointwise ones.
    """

    def __init__(self, *layers: Layer) -> None:
        if not layers:
            raise ValueError("layers should be at least one layer")
        pooled = None
        for place, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise TypeError(f"layers[{place}] should be a layer, not {describe_no_layer(layer)}")
            if layer.dtype != layers[0].dtype:
                raise ValueError(
                    f"layers should be of one dtype, not {layers[0].dtype} and, layers[{place}], {layer.dtype}"
                )
            checks.choice(f"layers[{place}].time", layer.time, TIMES)
            check_takes(f"layers[{place}]", layer, 1)
            if layer._arity_fault(1) is not None or OUTPUT not in layer._values():
                raise TypeError(f"layers[{place}] should take one input and give one output, not as {layer!r} does")
            if pooled is not None and layer.time != POINTWISE:
                raise ValueError(
                    f"layers[{place}], a {type(layer).__name__}, should stand before layers[{pooled}], a"
                    f" {type(layers[pooled]).__name__}, which leaves no axis of time"
                )
            pooled = place if layer.time == POOLING else pooled
        twice = found_twice(layers)
        if twice is not None:
            raise ValueError(f"layers should hold every layer once, but {twice!r} is there twice")
        _check_widths(layers)
        self.dtype = layers[0].dtype
        self._children = {str(place): layer for place, layer in enumerate(layers)}
        self._config = {"layers": [{"class": type(layer).__name__, "config": layer._config} for layer in layers]}
        self._become_twin_of_twins()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, first to last."""
        return tuple(self._children.values())

    @property
    def time(self) -> str:  # type: ignore[override]
        """How the layers together treat the axis of time: "pooling", "sequence" or "pointwise"."""
        times = {layer.time for layer in self}
        return next(time for time in (POOLING, SEQUENCE, POINTWISE) if time in times)

    def __len__(self) -> int:
        return len(self._children)

    def __getitem__(self, place: int) -> Layer:
        return self.layers[place]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __call__(self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None) -> Array:
        """Run all layers; inference.

        Parameters
        ----------
        x : array
            Inputs of the first layer.
        state : tuple, optional
            Initial states of the layers that carry one, as `run` or `initial_state` returned them.
        lengths : array of shape (B,), optional
            The real steps of each row of x (B, T, ...), integers in 0..T in any order. Past them `y` is 0, and does
            not depend on `x`.
        resets : array of bool of shape (B, T), optional
            True where states are reset to zeros before the step; for the layers that carry one.

        Returns
        -------
        y : ndarray
            Outputs of the last layer.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        return self.run(x, state, lengths=lengths, resets=resets)[0]

    def run(self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None) -> tuple[Array, Any]:
        """Run all layers in inference, and return their states.

        Parameters
        ----------
        x, state, lengths, resets
            As of a call.

        Returns
        -------
        y : ndarray
        state : tuple, or None
            The state of each layer after the last step of each row, None for layers that carry none; None where no
            layer carries one.
        """
        states = self._states(state, resets)
        ends = []
        x, lengths = self._opened(x, lengths)
        for place, (layer, start) in enumerate(zip(self, states, strict=True)):
            try:
                x, end = layer.run(x, start, lengths=lengths, resets=resets if layer.carries_state else None)
            except (TypeError, ValueError) as error:
                locate(error, f"layers[{place}]", layer)
                raise
            x, lengths = self._passed_on(layer, x, lengths, start)
            ends.append(end)
        return x, (tuple(ends) if self.carries_state else None)

    def step(self, x_t: Any, state: Any = None) -> tuple[Array | None, Any]:
        """Run one time step, for streams; the bits are those of a call over all steps.

        Parameters
        ----------
        x_t : array of shape (B, I), or (B,) of ids
            Inputs of the first layer at this step.
        state : tuple, optional
            As returned by the step before, `run` or `initial_state`; zeros by default.

        Returns
        -------
        y_t : ndarray of shape (B, ...), or None
            Outputs of the last layer at this step. None where a layer has none at this step, as a convolution with a
            stride may, see `Conv1d.step`; the layers after it stay as they are.
        state : tuple, or None
            The argument `state` of the next step, as `run` returns it.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be. Also where a layer needs all steps at once: one
            that pools or is bidirectional, attention, or positions.
        """
        lost = self._stepless()
        if lost is not None:
            raise ValueError(f"step needs layers that can go on by one step, but {lost}")
        x_t = checks.as_array("x_t", x_t)
        if not x_t.ndim:
            raise ValueError("x_t should be of shape (B, ...), one step of each row, not ()")
        ends = list(self._states(state, None))
        for place, layer in enumerate(self):
            try:
                x_t, ends[place] = layer._step_on(x_t, ends[place])
            except (TypeError, ValueError) as error:
                locate(error, f"layers[{place}]", layer)
                raise
            if x_t is None:
                break
        return x_t, (tuple(ends) if self.carries_state else None)

    def _step_on(self, x_t: Array, state: Any) -> tuple[Any, Any]:
        return self.step(x_t, state)

    def _stepless(self) -> str | None:
        return next((f"layers[{n}]: {why}" for n, part in enumerate(self) if (why := part._stepless())), None)

    def forward(
        self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None, seed: int | None = None
    ) -> tuple[Array, Tape]:
        """Run all layers in training, with dropout; return outputs and a tape for `backward`.

        Parameters
        ----------
        x, state, lengths, resets
            As for a call. `x` must not be changed while the tape is in use.
        seed : int, optional
            Fixes the masks of dropout, which differ from layer to layer; drawn by default.

        Returns
        -------
        y : ndarray
            Outputs of the last layer.
        tape : Tape
            For `backward`.
        """
        y, _, tape = self.forward_carrying(x, state, lengths=lengths, resets=resets, seed=seed)
        return y, tape

    def forward_carrying(
        self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None, seed: int | None = None
    ) -> tuple[Array, Any, Tape]:
        """Run `forward`, and return between y and tape the states, as `run` does."""
        seed = mask_seed(seed)
        states = self._states(state, resets)
        ends, kept = [], []
        x, lengths = self._opened(x, lengths)
        for place, (layer, start) in enumerate(zip(self, states, strict=True)):
            own = resets if layer.carries_state else None
            try:
                x, end, tape = layer.forward_carrying(
                    x, start, lengths=lengths, resets=own, seed=child_seed(seed, place)
                )
            except (TypeError, ValueError) as error:
                locate(error, f"layers[{place}]", layer)
                raise
            before = lengths
            x, lengths = self._passed_on(layer, x, lengths, start)
            kept.append((tape, before, lengths))
            ends.append(end)
        return x, (tuple(ends) if self.carries_state else None), Tape(self, (tuple(kept), x.shape))

    def backward(
        self, dy: Any, tape: Tape, *, truncate: int | None = None, grads: Mapping[str, Array] | None = None
    ) -> Array | None:
        """Compute gradients from that of the outputs.

        Parameters
        ----------
        dy : array of the shape of y
            Ignored past the length of a row.
        tape : Tape
            Returned by `forward`.
        truncate : int, optional
            For the layers that carry a state: how many steps gradients go back, as in recurrent layers.
        grads : mapping from str to ndarray, optional
            Arrays that gradients of parameters are added to; `grads` of the layers by default.

        Returns
        -------
        dx : ndarray of the shape of x, or None
            0 past the length of a row. None where inputs of the first layer are symbols, which have no gradient.
        """
        kept, shape = self._kept(tape)
        if truncate is not None and not self.carries_state:
            raise ValueError("truncate should be None where no layer carries a state")
        gradient: Array | None = checks.like("dy", dy, self.dtype, shape)
        targets = self._child_targets(grads)
        for (name, layer), (own, _, lengths) in zip(reversed(self._children.items()), reversed(kept), strict=True):
            if gradient is not None:
                gradient = cleared(gradient, lengths)
            cut = truncate if layer.carries_state else None
            gradient = layer.backward_carrying(gradient, own, truncate=cut, grads=targets[name])
        return gradient if gradient is None else cleared(gradient, kept[0][1])

    def initial_state(self, batch_size: int) -> Any:
        """Return the default initial states: a tuple, as `run` returns it.

        Parameters
        ----------
        batch_size : int
            Rows of the batch, 0 or more.
        """
        count = checks.size("batch_size", batch_size)
        if not self.carries_state:
            return None
        children: Iterator[Any] = iter(self)
        return tuple(layer.initial_state(count) if layer.carries_state else None for layer in children)

    def _states(self, state: Any, resets: Any) -> tuple[Any, ...]:
        """Check the states, and return one for each layer, None for zeros."""
        if not self.carries_state:
            self._check_no_state(state, resets)
        if state is None:
            return (None,) * len(self)
        if not isinstance(state, tuple | list) or len(state) != len(self):
            raise ValueError(
                f"state should be a tuple of {len(self)}, a state or None for each layer, not {checks.describe(state)}"
            )
        for place, (layer, own) in enumerate(zip(self, state, strict=True)):
            if own is not None and not layer.carries_state:
                raise ValueError(f"state[{place}] should be None: {layer._making()} carries no state")
        return tuple(state)

    def _opened(self, x: Any, lengths: Any) -> tuple[Any, Array | None]:
        """Return x and lengths after the checks that do not depend on the first layer."""
        x, lengths = checks.ragged("x", x, lengths)
        if lengths is None:
            return x, None
        x = checks.as_array("x", x)
        if x.ndim < 2:
            raise ValueError(f"x should be of shape (B, T, ...) where lengths are given, not {x.shape}")
        return x, checks.lengths(lengths, *x.shape[:2])

    def _passed_on(self, layer: Layer, y: Array, lengths: Array | None, state: Any) -> tuple[Array, Array | None]:
        """Return the inputs of the next layer, from the outputs of one that started from a state, and their lengths."""
        if layer.time == POOLING or lengths is None:
            return y, None
        after = layer._lengths_after(lengths, state)
        return cleared(y, after), after

    def _lengths_after(self, lengths: Array, state: Any = None) -> Array:
        for layer, start in zip(self, self._states(state, None), strict=True):
            lengths = layer._lengths_after(lengths, start)
        return lengths

    def _restored(self, arrays: Mapping[str, Any], weight_type: str) -> Sequential:
        children = self._children.items()
        return type(self)(*(layer._restored(under(name, arrays), weight_type) for name, layer in children))

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["layers"])  # type: ignore[misc]
        self._freeze()

    def __copy__(self) -> Sequential:
        return type(self)(*(copy.copy(layer) for layer in self))

    def _brief(self) -> str:
        return f"{type(self).__name__}({', '.join(shortened([layer._brief() for layer in self]))})"

    def _summary_rows(
        self, prefix: str, timed: bool = True, width: int | None = None
    ) -> list[tuple[str, str, str, int]]:
        rows = []
        for name, layer in self._children.items():
            own = f"{prefix}.{name}" if prefix else name
            if isinstance(layer, Container):
                rows += layer._summary_rows(own, timed, width)
            else:
                rows.append((own, layer._brief(), layer._output_form(timed, width), layer._count()))
            width = layer._gives() or width
            timed = timed and layer.time != POOLING
        return rows

    def _takes(self) -> int | None:
        first = self[0]
        return first._takes() if declares_widths(first) else None

    def _width_after(self, width: int | None) -> int | None:
        for layer in self:
            width = layer._width_after(width) if declares_widths(layer) else None
        return width

    def _gives(self) -> int | None:
        return next((width for layer in reversed(self.layers) if (width := layer._gives()) is not None), None)


class ZeroPadded(Sequential):
    """Layers in order over symbols (B, T) of which 0 is padding, wherever it stands in a row.

    A call, `run` and `forward` are those of `Sequential` with `lengths` counted from the symbols. Zeros before or
    between others are taken out where a layer pools, so that it does not matter where they stand; where every step has
    an output, they should stand at the end. `step` takes symbols that are not padding.

    Parameters
    ----------
    *layers : layers
        As of `Sequential`; the first takes symbols.
    """

    def _opened(self, x: Any, lengths: Any) -> tuple[Any, Array | None]:
        x, given = super()._opened(x, lengths)
        x = checks.as_array("x", x)
        if x.ndim != 2:
            raise ValueError(f"x should be symbols of shape (B, T), not {x.shape}")
        real = x != 0
        if given is not None:
            real &= np.arange(x.shape[1]) < given[:, None]
        counts = real.sum(axis=1, dtype=np.int64)
        if (real != (np.arange(x.shape[1]) < counts[:, None])).any():
            if self.time != POOLING:
                raise ValueError("x should have its zeros at the end of rows, since every step has an output")
            x = np.take_along_axis(x, np.argsort(~real, axis=1, kind="stable"), axis=1)
        return x, counts


def _check_widths(layers: Sequence[Layer]) -> None:
    """Raise an error where the sizes of outputs and of the next inputs are known and differ."""
    width, source = None, 0  # of the outputs of the layer before; the layer that determines it
    for place, layer in enumerate(layers):
        if not declares_widths(layer):
            width = None
            continue
        takes = layer._takes()
        if None not in (width, takes) and takes != width:
            raise ValueError(
                f"layers[{place}] should take vectors of {width}, which layers[{source}], {layers[source]._brief()},"
                f" gives, but {layer._brief()} takes vectors of {takes}"
            )
        width, source = layer._width_after(width), place if layer._gives() is not None else source
