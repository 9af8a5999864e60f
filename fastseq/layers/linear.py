"""Linear: parameters and shapes. The arithmetic is in the operations it calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastseq import checks, threads
from fastseq.checks import Array
from fastseq.layers.base import Layer, Tape


class Linear(Layer):
    """A linear map of the last axis: y = W x + b.

    Parameters
    ----------
    in_features, out_features : int
        I and O. W is the parameter `weight` (O, I), b is `bias` (O,).
    bias : bool
        Whether there is b.
    dtype : {"float32", "float64"}
        Of parameters and outputs. Inputs of another real dtype are converted.
    seed : int, optional
        Fixes the initial parameters, uniform in ±1/sqrt(I).
    """

    _features = 1

    in_features: int
    out_features: int
    bias: bool
    seed: int | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: Any = "float32",
        seed: int | None = None,
    ) -> None:
        self.in_features = checks.size("in_features", in_features, 1)
        self.out_features = checks.size("out_features", out_features, 1)
        self.bias = checks.flag("bias", bias)
        self.dtype = checks.real_dtype("dtype", dtype, self._backend.dtypes)
        self.seed = checks.seed("seed", seed)
        self._config = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias,
            "dtype": self.dtype.name,
            "seed": self.seed,
        }
        self._packed: tuple[Mapping[str, Array], Any] | None = None
        self._arrays = {}
        self._replace(self._initial(np.random.default_rng(self.seed)))

    def _initial(self, rng: np.random.Generator) -> dict[str, Array]:
        bound = 1 / np.sqrt(self.in_features)
        weight = rng.uniform(-bound, bound, (self.out_features, self.in_features))
        return {"weight": weight, **({"bias": rng.uniform(-bound, bound, self.out_features)} if self.bias else {})}

    def _gives(self) -> int:
        return self.out_features

    def _takes(self) -> int:
        return self.in_features

    def _weights(self) -> Any:
        """The weights as the operations want them."""
        arrays, packed = self._arrays, self._packed
        if packed is not None and packed[0] is arrays:
            return packed[1]
        weights = self._backend.dense.linear_pack(arrays["weight"], arrays.get("bias"))
        self._packed = (arrays, weights)
        return weights

    def _rows(self, x: Any) -> tuple[Array, tuple[int, ...]]:
        """The vectors of x as rows, and the shape of y."""
        x = checks.real_array("x", x, self.dtype)
        if not x.ndim or x.shape[-1] != self.in_features:
            raise ValueError(f"x should be of shape (..., {self.in_features}), not {x.shape}")
        return x.reshape(-1, self.in_features), (*x.shape[:-1], self.out_features)

    def __call__(self, x: Any) -> Array:
        """Map the last axis.

        Parameters
        ----------
        x : array of shape (..., I)
            Real floating numbers.

        Returns
        -------
        y : ndarray of shape (..., O)

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        rows, shape = self._rows(x)
        y: Array = self._backend.dense.linear_forward(self._weights(), rows, threads.get_num_threads())
        return y.reshape(shape)

    def forward(self, x: Any, seed: int | None = None) -> tuple[Array, Tape]:
        """Call, and keep what `backward` needs.

        Parameters
        ----------
        x : array of shape (..., I)
            Not to be changed as long as the tape is used.
        seed : int, optional
            Nothing here is random.

        Returns
        -------
        y : ndarray of shape (..., O)
        tape : Tape
        """
        checks.seed("seed", seed)
        rows, shape = self._rows(x)
        weights = self._weights()
        y = self._backend.dense.linear_forward(weights, rows, threads.get_num_threads())
        return y.reshape(shape), Tape(self, (weights, rows, shape))

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> Array:
        """Gradients, given that of the outputs.

        Parameters
        ----------
        dy : array of shape (..., O)
        tape : Tape
            What `forward` returned.
        grads : mapping from str to ndarray, optional
            Where the gradients of the parameters are added; `grads` of the layer by default.

        Returns
        -------
        dx : ndarray of shape (..., I)
        """
        weights, rows, shape = self._kept(tape)
        dy = checks.like("dy", dy, self.dtype, shape).reshape(-1, self.out_features)
        targets = self._targets(grads)
        dx: Array = self._backend.dense.linear_backward(
            weights, rows, dy, targets["weight"], targets.get("bias"), threads.get_num_threads()
        )
        return dx.reshape(*shape[:-1], self.in_features)
