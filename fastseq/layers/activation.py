"""ReLU, GELU, SiLU, tanh, sigmoid and softmax as layers: shapes. The arithmetic is in the operations they call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fastseq import checks, threads
from fastseq.checks import Array
from fastseq.layers.base import Pointwise, Tape
from fastseq.layers.settings import KW_ONLY, Dtype, choice, floating


class Elementwise(Pointwise):
    """What all except softmax share: a function of each element alone, of an array of any shape."""

    _keeps_width: ClassVar[bool] = True
    _kind: ClassVar[str]

    _: KW_ONLY
    dtype: Dtype = floating(default="float32", of="outputs")

    def _function(self) -> str:
        """The name that operations have for the function."""
        return self._kind

    def _forward(self, x: Any, seed: int | None) -> tuple[Array, Any]:
        x = checks.real_array("x", x, self.dtype)
        x = x if x.flags.c_contiguous else np.ascontiguousarray(x)
        return self._backend.dense.activation_forward(x, self._function(), threads.get_num_threads()), x

    def _backward(self, dy: Array, kept: Any, targets: Mapping[str, Array]) -> Array:
        return self._backend.dense.activation_backward(kept, dy, self._function(), threads.get_num_threads())


class ReLU(Elementwise):
    """The larger of x and 0; the slope at 0 is 0."""

    _kind = "relu"


class GELU(Elementwise):
    """The Gaussian error linear unit [1]_: x times the share of a standard normal distribution that lies below x.

    References
    ----------
    .. [1] D. Hendrycks, K. Gimpel, "Gaussian error linear units (GELUs)", arXiv:1606.08415, 2016.
    """

    approximate: str = choice(
        ("none", "tanh"),
        default="none",
        doc='"none" is x / 2 (1 + erf(x / sqrt(2))); "tanh" is x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).',
    )

    def _function(self) -> str:
        return "gelu" if self.approximate == "none" else "gelu_tanh"


class SiLU(Elementwise):
    """The sigmoid linear unit [1]_: x / (1 + exp(-x)); also called swish.

    References
    ----------
    .. [1] S. Elfwing, E. Uchibe, K. Doya, "Sigmoid-weighted linear units for neural network function approximation in
       reinforcement learning", Neural Networks 107, 2018.
    """

    _kind = "silu"


class Tanh(Elementwise):
    """The hyperbolic tangent of every element."""

    _kind = "tanh"


class Sigmoid(Elementwise):
    """1 / (1 + exp(-x)) of every element."""

    _kind = "sigmoid"


class Softmax(Pointwise):
    """exp(x) over its sum along the last axis of x (..., n). Where all of a row is -inf, the result is 0."""

    _features = 1
    _keeps_width: ClassVar[bool] = True

    _: KW_ONLY
    dtype: Dtype = floating(default="float32", of="outputs")

    def _rows(self, array: Array) -> Array:
        """An array as contiguous rows, also where a row has no element."""
        count = int(np.prod(array.shape[:-1], dtype=np.int64))
        return np.ascontiguousarray(array).reshape(count, array.shape[-1])

    def _forward(self, x: Any, seed: int | None) -> tuple[Array, Any]:
        x = checks.real_array("x", x, self.dtype)
        if not x.ndim:
            raise ValueError(f"x should be of shape (..., n), not {x.shape}")
        y = self._backend.dense.softmax_forward(self._rows(x), threads.get_num_threads()).reshape(x.shape)
        return y, y

    def forward(self, x: Any, seed: int | None = None) -> tuple[Array, Tape]:
        """Apply the layer in training, as other layers; y is read-only, since the tape refers to it."""
        y, tape = super().forward(x, seed)
        y.flags.writeable = False
        return y, tape

    def _backward(self, dy: Array, kept: Any, targets: Mapping[str, Array]) -> Array:
        dx = self._backend.dense.softmax_backward(self._rows(kept), self._rows(dy), threads.get_num_threads())
        return dx.reshape(dy.shape)
