"""ReLU, GELU, SiLU, tanh, sigmoid and softmax as layers: shapes. The arithmetic is in the operations they call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fastseq import checks, threads
from fastseq.checks import Array
from fastseq.layers.base import Layer, Tape


class Elementwise(Layer):
    """What all but softmax share: a function of each element alone."""

    _keeps_width: ClassVar[bool] = True
    _kind: str

    def _start(self, kind: str, dtype: Any, **more: Any) -> None:
        self._kind = kind
        self.dtype = checks.real_dtype("dtype", dtype, self._backend.dtypes)
        self._config = {**more, "dtype": self.dtype.name}
        self._arrays = {}

    def __call__(self, x: Any) -> Array:
        """The function of every element.

        Parameters
        ----------
        x : array
            Real floating numbers, of any shape.

        Returns
        -------
        y : ndarray of the shape of x

        Raises
        ------
        TypeError
            Naming the argument, what it was and what it should be.
        """
        return self._applied(self._contiguous(x))

    def forward(self, x: Any, seed: int | None = None) -> tuple[Array, Tape]:
        """Call, and keep what `backward` needs.

        Parameters
        ----------
        x : array
            Not to be changed as long as the tape is used.
        seed : int, optional
            Nothing here is random.

        Returns
        -------
        y : ndarray of the shape of x
        tape : Tape
        """
        checks.seed("seed", seed)
        x = self._contiguous(x)
        return self._applied(x), Tape(self, x)

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> Array:
        """Gradient of the input, given that of the outputs.

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
        x = self._kept(tape)
        dy = checks.like("dy", dy, self.dtype, x.shape)
        self._targets(grads)
        dx: Array = self._backend.dense.activation_backward(x, dy, self._kind, threads.get_num_threads())
        return dx

    def _contiguous(self, x: Any) -> Array:
        x = checks.real_array("x", x, self.dtype)
        return x if x.flags.c_contiguous else np.ascontiguousarray(x)

    def _applied(self, x: Array) -> Array:
        y: Array = self._backend.dense.activation_forward(x, self._kind, threads.get_num_threads())
        return y


class ReLU(Elementwise):
    """The larger of x and 0; the slope at 0 is 0.

    Parameters
    ----------
    dtype : {"float32", "float64"}
        Of outputs. Inputs of another real dtype are converted.
    """

    def __init__(self, *, dtype: Any = "float32") -> None:
        self._start("relu", dtype)


class GELU(Elementwise):
    """The Gaussian error linear unit [1]_: x times the share of a standard normal distribution that lies below x.

    Parameters
    ----------
    approximate : {"none", "tanh"}
        "none" is x / 2 (1 + erf(x / sqrt(2))); "tanh" is x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
    dtype : {"float32", "float64"}
        Of outputs. Inputs of another real dtype are converted.

    References
    ----------
    .. [1] D. Hendrycks, K. Gimpel, "Gaussian error linear units (GELUs)", arXiv:1606.08415, 2016.
    """

    approximate: str

    def __init__(self, approximate: str = "none", *, dtype: Any = "float32") -> None:
        self.approximate = checks.choice("approximate", approximate, ("none", "tanh"))
        self._start("gelu" if approximate == "none" else "gelu_tanh", dtype, approximate=approximate)


class SiLU(Elementwise):
    """The sigmoid linear unit [1]_: x / (1 + exp(-x)); also called swish.

    Parameters
    ----------
    dtype : {"float32", "float64"}
        Of outputs. Inputs of another real dtype are converted.

    References
    ----------
    .. [1] S. Elfwing, E. Uchibe, K. Doya, "Sigmoid-weighted linear units for neural network function approximation in
       reinforcement learning", Neural Networks 107, 2018.
    """

    def __init__(self, *, dtype: Any = "float32") -> None:
        self._start("silu", dtype)


class Tanh(Elementwise):
    """The hyperbolic tangent of every element.

    Parameters
    ----------
    dtype : {"float32", "float64"}
        Of outputs. Inputs of another real dtype are converted.
    """

    def __init__(self, *, dtype: Any = "float32") -> None:
        self._start("tanh", dtype)


class Sigmoid(Elementwise):
    """1 / (1 + exp(-x)) of every element.

    Parameters
    ----------
    dtype : {"float32", "float64"}
        Of outputs. Inputs of another real dtype are converted.
    """

    def __init__(self, *, dtype: Any = "float32") -> None:
        self._start("sigmoid", dtype)


class Softmax(Layer):
    """exp(x) over its sum along the last axis. Where all of a row is -inf, the result is 0.

    Parameters
    ----------
    dtype : {"float32", "float64"}
        Of outputs. Inputs of another real dtype are converted.
    """

    _features = 1

    _keeps_width: ClassVar[bool] = True

    def __init__(self, *, dtype: Any = "float32") -> None:
        self.dtype = checks.real_dtype("dtype", dtype, self._backend.dtypes)
        self._config = {"dtype": self.dtype.name}
        self._arrays = {}

    def __call__(self, x: Any) -> Array:
        """The softmax of the last axis.

        Parameters
        ----------
        x : array of shape (..., n)
            Real floating numbers.

        Returns
        -------
        y : ndarray of the shape of x

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        rows, shape = self._rows(x)
        y: Array = self._backend.dense.softmax_forward(rows, threads.get_num_threads())
        return y.reshape(shape)

    def forward(self, x: Any, seed: int | None = None) -> tuple[Array, Tape]:
        """Call, and keep what `backward` needs.

        Parameters
        ----------
        x : array of shape (..., n)
        seed : int, optional
            Nothing here is random.

        Returns
        -------
        y : ndarray of the shape of x
            Read-only: the tape refers to it.
        tape : Tape
        """
        checks.seed("seed", seed)
        y = self(x)
        y.flags.writeable = False
        return y, Tape(self, y)

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> Array:
        """Gradient of the input, given that of the outputs.

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
        y = self._kept(tape)
        dy = checks.like("dy", dy, self.dtype, y.shape)
        self._targets(grads)
        width = y.shape[-1]
        dx: Array = self._backend.dense.softmax_backward(
            y.reshape(_count(y.shape), width), dy.reshape(_count(y.shape), width), threads.get_num_threads()
        )
        return dx.reshape(y.shape)

    def _rows(self, x: Any) -> tuple[Array, tuple[int, ...]]:
        """The rows of x, and its shape."""
        x = checks.real_array("x", x, self.dtype)
        if not x.ndim:
            raise ValueError(f"x should be of shape (..., n), not {x.shape}")
        return np.ascontiguousarray(x).reshape(_count(x.shape), x.shape[-1]), x.shape


def _count(shape: tuple[int, ...]) -> int:
    """How many rows an array of this shape has, also where a row has no element."""
    return int(np.prod(shape[:-1], dtype=np.int64))
