"""Where a token stands, told to layers that look at all tokens alike: sinusoidal, learned and rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from fastseq import checks, threads
from fastseq.checks import Array
from fastseq.layers.base import Layer, Tape

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


class Positions(Layer):
    """What the layers of positions share."""

    _features = 1

    _keeps_width: ClassVar[bool] = True

    _width: tuple[int, ...]  # of the last axis: what it may be, or nothing where that is looked at elsewhere
    _limit: int | None = None  # positions, if there is a limit

    def _takes(self) -> int | None:
        return self._width[0] if self._width else None

    def _stepless(self) -> str:
        return f"{self._making()} has to know where a step stands, and one step alone is at position 0"

    def _given(self, x: Any, positions: Any) -> tuple[Array, Array]:
        """x, and the position of each of its vectors: (T,), or (B, T)."""
        x = checks.real_array("x", x, self.dtype)
        if x.ndim < 2 or (self._width and x.shape[-1] not in self._width):
            last = self._width[0] if self._width else "D"
            raise ValueError(f"x should be of shape (..., T, {last}), not {x.shape}")
        time = x.shape[-2]
        if positions is None:
            if self._limit is not None and time > self._limit:
                raise ValueError(f"x should have at most {self._limit} steps, not {time}")
            return x, np.arange(time)
        given = checks.integers("positions", positions)
        wanted = [(time,), *([(x.shape[0], time)] if x.ndim > 2 else [])]
        if given.shape not in wanted:
            raise ValueError(f"positions should be of shape {' or '.join(map(str, wanted))}, not {given.shape}")
        return x, checks.ids("positions", given, np.iinfo(np.int64).max if self._limit is None else self._limit)


def _spread(positions: Array, x: Array) -> Array:
    """Positions (T,) or (B, T) as an array that broadcasts to the vectors of x (B, ..., T, D)."""
    if positions.ndim == 1:
        return positions
    return positions.reshape(len(positions), *(1,) * (x.ndim - 3), positions.shape[1])


class SinusoidalPositions(Positions):
    """Adds sines and cosines of the position, of one wavelength for each pair of elements [1]_.

    Element 2 i gets sin(p / base^(2 i / d_model)), element 2 i + 1 the cosine.

    Parameters
    ----------
    d_model : int
        The size of a vector.
    base : float
        Wavelengths go from 2 pi to 2 pi base.
    dtype : {"float32", "float64"}
        Of outputs. Inputs of another real dtype are converted.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
    """

    d_model: int
    base: float

    def __init__(self, d_model: int, *, base: float = 10000.0, dtype: Any = "float32") -> None:
        self.d_model = checks.size("d_model", d_model, 1)
        self.base = checks.number("base", base, above=0)
        self.dtype = checks.real_dtype("dtype", dtype, self._backend.dtypes)
        self._config = {"d_model": self.d_model, "base": self.base, "dtype": self.dtype.name}
        self._width = (self.d_model,)
        self._arrays = {}
        self._waves = waves(self.d_model, self.base, self.dtype)

    def __call__(self, x: Any, *, positions: Any = None) -> Array:
        """Add the encoding of each vector's position.

        Parameters
        ----------
        x : array of shape (..., T, d_model)
            Real floating numbers.
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
        x, places = self._given(x, positions)
        (table,), rows = self._waves.of(_spread(places, x))
        y: Array = x + table[rows]
        return y

    def _table(self, count: int) -> Array:
        """What is added at the positions 0..count - 1, and at some more."""
        return self._waves.up_to(count)[0]

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
        y = self(x, positions=positions)
        return y, Tape(self, y.shape)

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> Array:
        """Gradient of the input: that of the outputs.

        Parameters
        ----------
        dy : array of the shape of y
        tape : Tape
            What `forward` returned.
        grads : mapping, optional
            An empty one: there are no parameters.

        Returns
        -------
        dx : ndarray of the shape of x
        """
        shape = self._kept(tape)
        self._targets(grads)
        return checks.like("dy", dy, self.dtype, shape)


class LearnedPositions(Positions):
    """Adds a learned vector for each position.

    Parameters
    ----------
    max_length, d_model : int
        P and D: the parameter `weight` is (P, D), a row for each position.
    dtype : {"float32", "float64"}
        Of parameters and outputs. Inputs of another real dtype are converted.
    seed : int, optional
        Fixes the initial parameters, normal with mean 0 and deviation 0.02 [1]_.

    References
    ----------
    .. [1] A. Radford et al., "Language models are unsupervised multitask learners", 2019.
    """

    max_length: int
    d_model: int
    seed: int | None

    def __init__(self, max_length: int, d_model: int, *, dtype: Any = "float32", seed: int | None = None) -> None:
        self.max_length = checks.size("max_length", max_length, 1)
        self.d_model = checks.size("d_model", d_model, 1)
        self.dtype = checks.real_dtype("dtype", dtype, self._backend.dtypes)
        self.seed = checks.seed("seed", seed)
        self._config = {
            "max_length": self.max_length,
            "d_model": self.d_model,
            "dtype": self.dtype.name,
            "seed": self.seed,
        }
        self._width, self._limit = (self.d_model,), self.max_length
        self._arrays = {}
        self._replace(self._initial(np.random.default_rng(self.seed)))

    def _initial(self, rng: np.random.Generator) -> dict[str, Array]:
        return {"weight": rng.normal(0, 0.02, (self.max_length, self.d_model))}

    def __call__(self, x: Any, *, positions: Any = None) -> Array:
        """Add the vector of each position.

        Parameters
        ----------
        x : array of shape (..., T, D)
            Real floating numbers, T at most P.
        positions : array of shape (T,) or (B, T), optional
            Integers in 0..P-1; 0..T-1 by default.

        Returns
        -------
        y : ndarray of the shape of x

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        return self._added(x, positions)[0]

    def _table(self, count: int) -> Array:
        """What is added at all positions; `count` of them are there."""
        return self._arrays["weight"]

    def _added(self, x: Any, positions: Any) -> tuple[Array, Array]:
        x, places = self._given(x, positions)
        vectors = self._backend.dense.embedding_forward(
            self._arrays["weight"], places.reshape(-1), threads.get_num_threads()
        )
        spread = _spread(places, x)
        return x + vectors.reshape(*spread.shape, self.d_model), np.broadcast_to(spread, x.shape[:-1])

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
        y, places = self._added(x, positions)
        return y, Tape(self, places)

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> Array:
        """Gradients, given that of the outputs.

        Parameters
        ----------
        dy : array of the shape of y
        tape : Tape
            What `forward` returned.
        grads : mapping from str to ndarray, optional
            Where the gradient of the parameter is added; `grads` of the layer by default.

        Returns
        -------
        dx : ndarray of the shape of x
        """
        places = self._kept(tape)
        dx = checks.like("dy", dy, self.dtype, (*places.shape, self.d_model))
        none = -1  # no position is left out
        self._backend.dense.embedding_backward(
            np.ascontiguousarray(places).reshape(-1),
            dx.reshape(-1, self.d_model),
            self._targets(grads)["weight"],
            none,
            threads.get_num_threads(),
        )
        return dx


class RotaryPositions(Positions):
    """Turns pairs of elements of queries and keys by angles in proportion to the position [1]_.

    A product of a query and a key then depends on how far they are apart. Pair i of a vector at position p is turned by
    p / base^(2 i / dim).

    Parameters
    ----------
    dim : int
        How many elements of each vector are turned, the first ones; even. The others stay.
    base : float
        Wavelengths go from 2 pi to 2 pi base.
    interleaved : bool
        Whether elements 2 i and 2 i + 1 are a pair, instead of i and i + dim / 2.
    dtype : {"float32", "float64"}
        Of outputs. Inputs of another real dtype are converted.

    References
    ----------
    .. [1] J. Su et al., "RoFormer: enhanced transformer with rotary position embedding", arXiv:2104.09864, 2021.
    """

    dim: int
    base: float
    interleaved: bool

    def __init__(self, dim: int, *, base: float = 10000.0, interleaved: bool = False, dtype: Any = "float32") -> None:
        self.dim = checks.size("dim", dim, 2)
        if self.dim % 2:
            raise ValueError(f"dim should be even, not {self.dim}")
        self.base = checks.number("base", base, above=0)
        self.interleaved = checks.flag("interleaved", interleaved)
        self.dtype = checks.real_dtype("dtype", dtype, self._backend.dtypes)
        self._config = {
            "dim": self.dim,
            "base": self.base,
            "interleaved": self.interleaved,
            "dtype": self.dtype.name,
        }
        self._width = ()
        self._turns = turns(self.dim, self.base, self.dtype)
        self._arrays = {}

    def __call__(self, x: Any, *, positions: Any = None) -> Array:
        """Turn each vector as its position says.

        Parameters
        ----------
        x : array of shape (..., T, D)
            Real floating numbers, D at least `dim`: queries or keys (B, heads, T, D), for example.
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
        x, places = self._placed(x, positions)
        return self._turned(x, places, False)

    def _placed(self, x: Any, positions: Any) -> tuple[Array, Array]:
        """x, contiguous, and the position of each of its vectors, (N,)."""
        x, places = self._given(x, positions)
        if x.shape[-1] < self.dim:
            raise ValueError(f"x should be of shape (..., T, D) with D at least dim={self.dim}, not {x.shape}")
        spread = np.broadcast_to(_spread(places, x), x.shape[:-1])
        return np.ascontiguousarray(x), np.ascontiguousarray(spread).reshape(-1)

    def _turned(self, x: Array, places: Array, inverse: bool) -> Array:
        (cos, sin), places = self._turns.of(places)
        y: Array = self._backend.attention.rotary(
            x.reshape(len(places), 1, x.shape[-1]),
            cos,
            sin,
            places,
            self.interleaved,
            inverse,
            threads.get_num_threads(),
        )
        return y.reshape(x.shape)

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
        x, places = self._placed(x, positions)
        return self._turned(x, places, False), Tape(self, (x.shape, places))

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> Array:
        """Gradient of the input: that of the outputs, turned back.

        Parameters
        ----------
        dy : array of the shape of y
        tape : Tape
            What `forward` returned.
        grads : mapping, optional
            An empty one: there are no parameters.

        Returns
        -------
        dx : ndarray of the shape of x
        """
        shape, places = self._kept(tape)
        self._targets(grads)
        return self._turned(checks.like("dy", dy, self.dtype, shape), places, True)
