"""Layers one after another."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from fastseq import checks
from fastseq.checks import Array
from fastseq.layers.attention import MultiheadAttention
from fastseq.layers.base import Composite, Layer, Tape, child_seed, mask_seed
from fastseq.layers.recurrent import Recurrent
from fastseq.layers.rows import cleared
from fastseq.layers.transformer import Encodes


class Sequential(Composite):
    """Layers one after another: each takes what the one before it gives.

    Recurrent layers start from zeros, and pass on their outputs at every step; `lengths` go to all of them, to encoders
    of Transformers and to self-attention. Parameters are named ``0.weight``, ``1.weight_ih_l0`` and so on.

    Parameters
    ----------
    *layers : layers
        At least one, no one twice, all of one dtype.
    """

    def __init__(self, *layers: Layer) -> None:
        if not layers:
            raise ValueError("layers should be at least one layer")
        for place, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise TypeError(f"layers[{place}] should be a layer, not {checks.describe(layer)}")
            if layer.dtype != layers[0].dtype:
                raise ValueError(
                    f"layers should be of one dtype, not {layers[0].dtype} and, layers[{place}], {layer.dtype}"
                )
        parts = [part for layer in layers for part in _parts(layer)]
        twice = next((part for place, part in enumerate(parts) if any(part is other for other in parts[:place])), None)
        if twice is not None:
            raise ValueError(f"layers should hold every layer once, but {twice!r} is there twice")
        self.dtype = layers[0].dtype
        self._children = {str(place): layer for place, layer in enumerate(layers)}
        self._config = {"layers": [{"class": type(layer).__name__, "config": layer._config} for layer in layers]}

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, first to last."""
        return tuple(self._children.values())

    def __len__(self) -> int:
        return len(self._children)

    def __getitem__(self, place: int) -> Layer:
        return self.layers[place]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __call__(self, x: Any, *, lengths: Any = None) -> Array:
        """Run all layers; inference.

        Parameters
        ----------
        x : array
            What the first layer takes.
        lengths : array of shape (B,), optional
            The real steps of each row of x (B, T, ...), integers in 0..T in any order. Past them `y` is 0 and nothing
            in `x` matters.

        Returns
        -------
        y : ndarray
            What the last layer gives.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        x, lengths = self._opened(x, lengths)
        for layer in self:
            if isinstance(layer, Recurrent):
                x, _ = layer(x, lengths=lengths)
            elif isinstance(layer, Sequential | MultiheadAttention | Encodes):
                x = layer(x, lengths=lengths)
            else:
                x = layer(x)  # type: ignore[operator]  # every layer can be called, each in its own way
        return x if _takes_lengths(self[-1]) else cleared(x, lengths)

    def forward(self, x: Any, *, lengths: Any = None, seed: int | None = None) -> tuple[Array, Tape]:
        """Run all layers for training: what a call gives, but for dropout, and what `backward` needs.

        Parameters
        ----------
        x, lengths
            As for a call. `x` is not to be changed as long as the tape is used.
        seed : int, optional
            Fixes what dropout drops, of each layer another; drawn where it is not given.

        Returns
        -------
        y : ndarray
            What the last layer gives.
        tape : Tape
            For `backward`.
        """
        seed = mask_seed(seed)
        x, lengths = self._opened(x, lengths)
        tapes = []
        for place, layer in enumerate(self):
            own = child_seed(seed, place)
            if isinstance(layer, Recurrent):
                x, _, tape = layer.forward(x, lengths=lengths, seed=own)
            elif isinstance(layer, Sequential | MultiheadAttention | Encodes):
                x, tape = layer.forward(x, lengths=lengths, seed=own)
            else:
                x, tape = layer.forward(x, seed=own)  # type: ignore[attr-defined]
            tapes.append(tape)
        y = x if _takes_lengths(self[-1]) else cleared(x, lengths)
        return y, Tape(self, (tuple(tapes), lengths, y.shape))

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> Array | None:
        """Gradients, given that of the outputs.

        Parameters
        ----------
        dy : array of the shape of y
            Past a row's length nothing in it matters.
        tape : Tape
            What `forward` returned.
        grads : mapping from str to ndarray, optional
            Where the gradients of the parameters are added; `grads` of the layers by default.

        Returns
        -------
        dx : ndarray of the shape of x, or None
            0 past a row's length. None where the first layer takes symbols, which have no gradient.
        """
        tapes, lengths, shape = self._kept(tape)
        dy = checks.like("dy", dy, self.dtype, shape)
        targets = self._child_targets(grads)
        if not _takes_lengths(self[-1]):
            dy = cleared(dy, lengths)
        for (name, layer), kept in zip(reversed(self._children.items()), reversed(tapes), strict=True):
            dy = layer.backward(dy, kept, grads=targets[name])  # type: ignore[attr-defined]
            if isinstance(layer, Recurrent):
                dy, _ = dy
        return dy if dy is None or _takes_lengths(self[0]) else cleared(dy, lengths)

    def _opened(self, x: Any, lengths: Any) -> tuple[Any, Array | None]:
        """x and lengths as the layers want them: what stands past a length can do no harm."""
        if lengths is None:
            return x, None
        x = checks.as_array("x", x)
        if x.ndim < 2:
            raise ValueError(f"x should be of shape (B, T, ...) where lengths are given, not {x.shape}")
        lengths = checks.lengths(lengths, *x.shape[:2])
        return (x if _takes_lengths(self[0]) else cleared(x, lengths)), lengths

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["layers"])  # type: ignore[misc]

    def __copy__(self) -> Sequential:
        return type(self)(*(copy.copy(layer) for layer in self))

    def _making(self) -> str:
        return f"{type(self).__name__}({', '.join(layer._making() for layer in self)})"


def _parts(layer: Layer) -> Iterator[Layer]:
    """A layer and all that it is made of."""
    yield layer
    if isinstance(layer, Composite):
        for child in layer._children.values():
            yield from _parts(child)


def _takes_lengths(layer: Layer) -> bool:
    return isinstance(layer, Recurrent | Sequential | MultiheadAttention | Encodes)
