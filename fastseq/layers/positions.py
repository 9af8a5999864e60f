"""Where a token stands, told to layers that look at all tokens alike: sinusoidal, learned and rotary positions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from fastseq import checks, threads
from fastseq.checks import Array
from fastseq.layers.base import Configured, Tape
from fastseq.layers.settings import KW_ONLY, Dtype, flag, floating, number, random_seed, size

FEWEST, FARTHEST = 64, 1 << 20  # positions that a table is made for


class Table:
    """Rows that are a function of the position, made from 0 up to the farthest that was asked for."""

    def __init__(self, made: Callable[[Array], tuple[Array, ...]]) -> None:
        self._made = made
        self._rows = made(np.arange(0))

    def of(self, positions: Array) -> tuple[tuple[Array, ...], Array]:
        """Tables, and which row of them each position has."""
        count = int(positions.max(initial=-1)) + 1
        if count > FARTHEST:  # a few far positions are no reason to fill the memory
            some, places = np.unique(positions, return_inverse=True)
            return self._made(some), places.reshape(positions.shape)
        return self.up_to(count), positions

    def up_to(self, count: int) -> tuple[Array, ...]:
        """Tables of at least `count` positions; the same arrays as before where those are enough."""
        rows = self._rows
        if len(rows[0]) < count:
            rows = self._rows = self._made(np.arange(max(FEWEST, 1 << (count - 1).bit_length())))
        return rows


def angles(positions: Array, pairs: int, width: int, base: float, dtype: np.dtype[Any]) -> Array:
    """p base^(-2 i / width) of every position p and pair i, (P, pairs), of at least float64."""
    wide = np.promote_types(dtype, np.float64).type
    rates: Array = wide(base) ** (-2 * np.arange(pairs, dtype=wide) / wide(width))
    return positions.astype(wide)[:, None] * rates


def turns(dim: int, base: float, dtype: np.dtype[Any]) -> Table:
    """cos and sin of the angles of rotary positions."""

    def made(positions: Array) -> tuple[Array, ...]:
        turned = angles(positions, dim // 2, dim, base, dtype)
        return np.cos(turned).astype(dtype), np.sin(turned).astype(dtype)

    return Table(made)


def waves(width: int, base: float, dtype: np.dtype[Any]) -> Table:
    """sin and cos of the angles of sinusoidal positions, in turn."""

    def made(positions: Array) -> tuple[Array, ...]:
        turned = angles(positions, (width + 1) // 2, width, base, dtype)
        both = np.stack([np.sin(turned), np.cos(turned)], axis=2).reshape(len(positions), 2 * turned.shape[1])
        return (np.ascontiguousarray(both[:, :width], dtype),)

    return Table(made)


class Positions(Configured):
    """What the layers of positions share."""

    _features = 1

    _keeps_width: ClassVar[bool] = True

    def _limit(self) -> int | None:
        """The number of positions; None: there is no limit."""
        return None

    def _stepless(self) -> str:
        return f"{self._making()} has to know where a step stands, and one step alone is at position 0"

    @abstractmethod
    def _forward(self, x: Array, places: Array) -> tuple[Array, Any]:
        """The outputs, and what `_backward` needs, given positions that broadcast to the vectors of x (..., T, D)."""

    @abstractmethod
    def _backward(self, dy: Array, kept: Any, targets: Mapping[str, Array]) -> Array:
        """The gradient of x; that of a parameter is added to `targets`."""

    def __call__(self, x: Any, *, positions: Any = None) -> Array:
        """Apply the positions; inference.

        Parameters
        ----------
        x : array of shape (..., T, D)
            Real floating numbers: vectors of D elements, or queries or keys (B, heads, T, D), for example.
        positions : array of shape (T,) or (B, T), optional
            Integers from 0 on; 0..T-1 by default.

        Returns
        -------
        y : ndarray of the shape of x

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        return self._forward(*self._given(x, positions))[0]

    def forward(self, x: Any, *, positions: Any = None, seed: int | None = None) -> tuple[Array, Tape]:
        """Call, and keep what `backward` needs.

        Parameters
        ----------
        x, positions
            As for a call.
        seed : int, optional
            Nothing here is random.

        Returns
        -------
        y : ndarray of the shape of x
        tape : Tape
        """
        checks.seed("seed", seed)
        y, kept = self._forward(*self._given(x, positions))
        return y, Tape(self, (y.shape, kept))

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> Array:
        """Gradients, given that of the outputs.

        Parameters
        ----------
        dy : array of the shape of y
        tape : Tape
            What `forward` returned.
        grads : mapping from str to ndarray, optional
            Where the gradient of the parameter, if there is one, is added; `grads` of the layer by default.

        Returns
        -------
        dx : ndarray of the shape of x
        """
        shape, kept = self._kept(tape)
        return self._backward(checks.like("dy", dy, self.dtype, shape), kept, self._targets(grads))

    def _given(self, x: Any, positions: Any) -> tuple[Array, Array]:
        """x, and the position of each of its vectors, in a shape that broadcasts to (..., T)."""
        x = checks.real_array("x", x, self.dtype)
        last, limit = self._takes(), self._limit()
        if x.ndim < 2 or (last is not None and x.shape[-1] != last):
            raise ValueError(f"x should be of shape (..., T, {'D' if last is None else last}), not {x.shape}")
        time = x.shape[-2]
        if positions is None:
            if limit is not None and time > limit:
                raise ValueError(f"x should have at most {limit} steps, not {time}")
            return x, np.arange(time)
        given = checks.integers("positions", positions)
        wanted = [(time,), *([(x.shape[0], time)] if x.ndim > 2 else [])]
        if given.shape not in wanted:
            raise ValueError(f"positions should be of shape {' or '.join(map(str, wanted))}, not {given.shape}")
        places = checks.ids("positions", given, np.iinfo(np.int64).max if limit is None else limit)
        return x, places.reshape(*places.shape[:-1], *(1,) * (x.ndim - 3), time) if places.ndim > 1 else places


class SinusoidalPositions(Positions):
    """Adds sines and cosines of the position, of one wavelength for each pair of elements [1]_.

    Element 2 i gets sin(p / base^(2 i / d_model)), element 2 i + 1 the cosine.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
    """

    d_model: int = size(doc="The size of a vector.")
    _: KW_ONLY
    base: float = number(default=10000.0, above=0, doc="Wavelengths go from 2 pi to 2 pi base.")
    dtype: Dtype = floating(default="float32", of="outputs")

    def _takes(self) -> int:
        return self.d_model

    def _build(self) -> None:
        self._waves = waves(self.d_model, self.base, self.dtype)
        super()._build()

    def _table(self, count: int) -> Array:
        """What is added at the positions 0..count - 1, and at some more."""
        return self._waves.up_to(count)[0]

    def _forward(self, x: Array, places: Array) -> tuple[Array, Any]:
        (table,), rows = self._waves.of(places)
        return x + table[rows], None

    def _backward(self, dy: Array, kept: Any, targets: Mapping[str, Array]) -> Array:
        return dy


class LearnedPositions(Positions):
    """Adds a learned vector for each position.

    References
    ----------
    .. [1] A. Radford et al., "Language models are unsupervised multitask learners", 2019.
    """

    max_length: int = size(doc="P. The parameter `weight` is (P, D), a row for each position.")
    d_model: int = size(doc="D.")
    _: KW_ONLY
    dtype: Dtype = floating(default="float32")
    seed: int | None = random_seed(
        default=None, doc="Fixes the initial parameters, normal with mean 0 and deviation 0.02 [1]_."
    )

    def _takes(self) -> int:
        return self.d_model

    def _limit(self) -> int:
        return self.max_length

    def _initial(self, rng: np.random.Generator) -> dict[str, Array]:
        return {"weight": rng.normal(0, 0.02, (self.max_length, self.d_model))}

    def _table(self, count: int) -> Array:
        """What is added at all positions; `count` of them are there."""
        return self._arrays["weight"]

    def _forward(self, x: Array, places: Array) -> tuple[Array, Any]:
        vectors = self._backend.dense.embedding_forward(
            self._arrays["weight"], places.reshape(-1), threads.get_num_threads()
        )
        return x + vectors.reshape(*places.shape, self.d_model), np.broadcast_to(places, x.shape[:-1])

    def _backward(self, dy: Array, kept: Any, targets: Mapping[str, Array]) -> Array:
        rows, none = dy.reshape(-1, self.d_model), -1  # no position is left out
        self._backend.dense.embedding_backward(
            np.ascontiguousarray(kept).reshape(-1), rows, targets["weight"], none, threads.get_num_threads()
        )
        return dy


class RotaryPositions(Positions):
    """Turns pairs of elements of queries and keys by angles in proportion to the position [1]_.

    A product of a query and a key then depends on how far they are apart. Pair i of a vector at position p is turned by
    p / base^(2 i / dim).

    References
    ----------
    .. [1] J. Su et al., "RoFormer: enhanced transformer with rotary position embedding", arXiv:2104.09864, 2021.
    """

    dim: int = size(least=2, doc="How many elements of each vector are rotated, the first ones; even. The others stay.")
    _: KW_ONLY
    base: float = number(default=10000.0, above=0, doc="Wavelengths go from 2 pi to 2 pi base.")
    interleaved: bool = flag(
        default=False, doc="Whether elements 2 i and 2 i + 1 are a pair, instead of i and i + dim / 2."
    )
    dtype: Dtype = floating(default="float32", of="outputs")

    def _resolve(self) -> None:
        if self.dim % 2:
            raise ValueError(f"dim should be even, not {self.dim}")

    def _build(self) -> None:
        self._turns = turns(self.dim, self.base, self.dtype)
        super()._build()

    def _forward(self, x: Array, places: Array) -> tuple[Array, Any]:
        if x.shape[-1] < self.dim:
            raise ValueError(f"x should be of shape (..., T, D) with D at least dim={self.dim}, not {x.shape}")
        spread = np.ascontiguousarray(np.broadcast_to(places, x.shape[:-1])).reshape(-1)
        return self._rotated(np.ascontiguousarray(x), spread, False), spread

    def _backward(self, dy: Array, kept: Any, targets: Mapping[str, Array]) -> Array:
        return self._rotated(dy, kept, True)

    def _rotated(self, x: Array, places: Array, inverse: bool) -> Array:
        (cos, sin), places = self._turns.of(places)
        rows = x.reshape(len(places), 1, x.shape[-1])
        y = self._backend.attention.rotary(rows, cos, sin, places, self.interleaved, inverse, threads.get_num_threads())
        return y.reshape(x.shape)
