"""Layer normalisation, and that by the root of the mean square alone."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

import numpy as np

from fastseq import checks, threads
from fastseq.checks import Array
from fastseq.layers.base import Layer, Tape


class LayerNorm(Layer):
    """Layer normalisation [1]_ over the last axes: y = (x - mean) / sqrt(variance + eps) weight + bias.

    Parameters
    ----------
    normalized_shape : int or tuple of int
        The last axes of x, over which mean and variance are taken; the shape of the parameters `weight` and `bias`.
    eps : float
        Keeps the root away from 0.
    elementwise_affine : bool
        Whether there are `weight`, ones at first, and `bias`, zeros.
    bias : bool
        Whether there is `bias`, where there is `weight`.
    dtype : {"float32", "float64"}
        Of parameters and outputs. Inputs of another real dtype are converted.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer normalization", arXiv:1607.06450, 2016.
    """

    _keeps_width: ClassVar[bool] = True

    normalized_shape: tuple[int, ...]
    eps: float
    elementwise_affine: bool
    bias: bool

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        *,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        dtype: Any = "float32",
    ) -> None:
        self.normalized_shape = _shape(normalized_shape)
        self.eps = checks.number("eps", eps, least=0)
        self.elementwise_affine = checks.flag("elementwise_affine", elementwise_affine)
        self.bias = checks.flag("bias", bias)
        self.dtype = checks.real_dtype("dtype", dtype, self._backend.dtypes)
        self._config = {
            "normalized_shape": self.normalized_shape,
            "eps": self.eps,
            "elementwise_affine": self.elementwise_affine,
            "bias": self.bias,
            "dtype": self.dtype.name,
        }
        self._width = prod(self.normalized_shape)
        self._features = len(self.normalized_shape)
        self._arrays = {}
        self._replace(self._initial(np.random.default_rng()))

    def _takes(self) -> int | None:
        return self.normalized_shape[-1]

    def _initial(self, rng: np.random.Generator) -> dict[str, Array]:
        if not self.elementwise_affine:
            return {}
        weight = {"weight": np.ones(self.normalized_shape)}
        return {**weight, "bias": np.zeros(self.normalized_shape)} if self.bias else weight

    def __call__(self, x: Any) -> Array:
        """Normalise the last axes.

        Parameters
        ----------
        x : array of shape (..., *normalized_shape)
            Real floating numbers.

        Returns
        -------
        y : ndarray of the shape of x

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        return self._normalised(x)[0]

    def forward(self, x: Any, seed: int | None = None) -> tuple[Array, Tape]:
        """Call, and keep what `backward` needs.

        Parameters
        ----------
        x : array of shape (..., *normalized_shape)
            Not to be changed as long as the tape is used.
        seed : int, optional
            Nothing here is random.

        Returns
        -------
        y : ndarray of the shape of x
        tape : Tape
        """
        checks.seed("seed", seed)
        y, kept = self._normalised(x)
        return y, Tape(self, kept)

    def _normalised(self, x: Any) -> tuple[Array, tuple[Any, ...]]:
        arrays = self._arrays
        x, rows = _rows(x, self.dtype, self.normalized_shape)
        weight = _flat(arrays, "weight")
        y, means, scales = self._backend.dense.layer_norm_forward(
            rows, weight, _flat(arrays, "bias"), self.eps, threads.get_num_threads()
        )
        return y.reshape(x.shape), (x.shape, rows, weight, means, scales)

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> Array:
        """Gradients, given that of the outputs.

        Parameters
        ----------
        dy : array of the shape of y
        tape : Tape
            What `forward` returned.
        grads : mapping from str to ndarray, optional
            Where the gradients of the parameters are added; `grads` of the layer by default.

        Returns
        -------
        dx : ndarray of the shape of x
        """
        shape, rows, weight, means, scales = self._kept(tape)
        dy = checks.like("dy", dy, self.dtype, shape).reshape(-1, self._width)
        targets = self._targets(grads)
        dx: Array = self._backend.dense.layer_norm_backward(
            rows, weight, means, scales, dy, _flat(targets, "weight"), _flat(targets, "bias"), threads.get_num_threads()
        )
        return dx.reshape(shape)


class RMSNorm(Layer):
    """Normalisation by the root of the mean square [1]_ over the last axes: y = x / sqrt(mean of x^2 + eps) weight.

    Parameters
    ----------
    normalized_shape : int or tuple of int
        The last axes of x, over which the mean is taken; the shape of the parameter `weight`.
    eps : float
        Keeps the root away from 0.
    elementwise_affine : bool
        Whether there is `weight`, ones at first.
    dtype : {"float32", "float64"}
        Of parameters and outputs. Inputs of another real dtype are converted.

    References
    ----------
    .. [1] B. Zhang, R. Sennrich, "Root mean square layer normalization", NeurIPS 2019.
    """

    _keeps_width: ClassVar[bool] = True

    normalized_shape: tuple[int, ...]
    eps: float
    elementwise_affine: bool

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        *,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        dtype: Any = "float32",
    ) -> None:
        self.normalized_shape = _shape(normalized_shape)
        self.eps = checks.number("eps", eps, least=0)
        self.elementwise_affine = checks.flag("elementwise_affine", elementwise_affine)
        self.dtype = checks.real_dtype("dtype", dtype, self._backend.dtypes)
        self._config = {
            "normalized_shape": self.normalized_shape,
            "eps": self.eps,
            "elementwise_affine": self.elementwise_affine,
            "dtype": self.dtype.name,
        }
        self._width = prod(self.normalized_shape)
        self._features = len(self.normalized_shape)
        self._arrays = {}
        self._replace(self._initial(np.random.default_rng()))

    def _takes(self) -> int | None:
        return self.normalized_shape[-1]

    def _initial(self, rng: np.random.Generator) -> dict[str, Array]:
        return {"weight": np.ones(self.normalized_shape)} if self.elementwise_affine else {}

    def __call__(self, x: Any) -> Array:
        """Normalise the last axes.

        Parameters
        ----------
        x : array of shape (..., *normalized_shape)
            Real floating numbers.

        Returns
        -------
        y : ndarray of the shape of x

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        return self._normalised(x)[0]

    def forward(self, x: Any, seed: int | None = None) -> tuple[Array, Tape]:
        """Call, and keep what `backward` needs.

        Parameters
        ----------
        x : array of shape (..., *normalized_shape)
            Not to be changed as long as the tape is used.
        seed : int, optional
            Nothing here is random.

        Returns
        -------
        y : ndarray of the shape of x
        tape : Tape
        """
        checks.seed("seed", seed)
        y, kept = self._normalised(x)
        return y, Tape(self, kept)

    def _normalised(self, x: Any) -> tuple[Array, tuple[Any, ...]]:
        weight = _flat(self._arrays, "weight")
        x, rows = _rows(x, self.dtype, self.normalized_shape)
        y, scales = self._backend.dense.rms_norm_forward(rows, weight, self.eps, threads.get_num_threads())
        return y.reshape(x.shape), (x.shape, rows, weight, scales)

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> Array:
        """Gradients, given that of the outputs.

        Parameters
        ----------
        dy : array of the shape of y
        tape : Tape
            What `forward` returned.
        grads : mapping from str to ndarray, optional
            Where the gradients of the parameters are added; `grads` of the layer by default.

        Returns
        -------
        dx : ndarray of the shape of x
        """
        shape, rows, weight, scales = self._kept(tape)
        dy = checks.like("dy", dy, self.dtype, shape).reshape(-1, self._width)
        dx: Array = self._backend.dense.rms_norm_backward(
            rows, weight, scales, dy, _flat(self._targets(grads), "weight"), threads.get_num_threads()
        )
        return dx.reshape(shape)


def _shape(given: Any) -> tuple[int, ...]:
    """The last axes of what is normalised."""
    shape = tuple(given) if isinstance(given, tuple | list) else (given,)
    if not shape:
        raise ValueError("normalized_shape should have at least one axis, not ()")
    return tuple(checks.size("normalized_shape", size, 1) for size in shape)


def _rows(x: Any, dtype: np.dtype[Any], last: tuple[int, ...]) -> tuple[Array, Array]:
    """x, and what is normalised of it as contiguous rows."""
    x = checks.real_array("x", x, dtype)
    if x.ndim < len(last) or x.shape[x.ndim - len(last) :] != last:
        raise ValueError(f"x should be of shape (..., {', '.join(map(str, last))}), not {x.shape}")
    return x, np.ascontiguousarray(x).reshape(-1, prod(last))


def _flat(arrays: Mapping[str, Array], name: str) -> Array | None:
    """A view of an array as one row, if it is there."""
    array = arrays.get(name)
    return None if array is None else array.reshape(-1)
