"""Layer normalisation, and that by the root of the mean square alone."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

import numpy as np

from fastseq import checks, threads
from fastseq.checks import Array
from fastseq.layers.base import Pointwise
from fastseq.layers.settings import KW_ONLY, Dtype, Resolved, checked, flag, floating, number


def _shape(name: str, given: Any) -> tuple[int, ...]:
    """The last axes of what is normalised."""
    shape = tuple(given) if isinstance(given, tuple | list) else (given,)
    if not shape:
        raise ValueError(f"{name} should have at least one axis, not ()")
    return tuple(checks.size(name, size, 1) for size in shape)


class Norm(Pointwise):
    """What both share: settings, and the last axes as rows."""

    _keeps_width: ClassVar[bool] = True

    normalized_shape: Resolved[int | tuple[int, ...], tuple[int, ...]] = checked(
        _shape,
        takes="int | tuple[int, ...]",
        form="int or tuple of int",
        doc="The last axes of x, over which means are taken; the shape of the parameters.",
    )
    _: KW_ONLY
    eps: float = number(default=1e-5, least=0, doc="Keeps the root away from 0.")
    elementwise_affine: bool = flag(default=True, doc="Whether there are parameters; `weight` starts at ones.")
    dtype: Dtype = floating(default="float32")

    def _build(self) -> None:
        self._width = prod(self.normalized_shape)
        self._features = len(self.normalized_shape)
        super()._build()

    def _takes(self) -> int | None:
        return self.normalized_shape[-1]

    def _initial(self, rng: np.random.Generator) -> dict[str, Array]:
        return {"weight": np.ones(self.normalized_shape)} if self.elementwise_affine else {}

    def _rows(self, x: Any) -> tuple[Array, Array]:
        """x, and what is normalised of it as contiguous rows."""
        x, last = checks.real_array("x", x, self.dtype), self.normalized_shape
        if x.ndim < len(last) or x.shape[x.ndim - len(last) :] != last:
            raise ValueError(f"x should be of shape (..., {', '.join(map(str, last))}), not {x.shape}")
        return x, np.ascontiguousarray(x).reshape(-1, self._width)


class LayerNorm(Norm):
    """Layer normalisation [1]_ over the last axes: y = (x - mean) / sqrt(variance + eps) weight + bias.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer normalization", arXiv:1607.06450, 2016.
    """

    _: KW_ONLY
    bias: bool = flag(
        default=True, before="dtype", doc="Whether there is `bias`, zeros at first, where there is `weight`."
    )

    def _initial(self, rng: np.random.Generator) -> dict[str, Array]:
        weight = super()._initial(rng)
        return {**weight, "bias": np.zeros(self.normalized_shape)} if weight and self.bias else weight

    def _forward(self, x: Any, seed: int | None) -> tuple[Array, Any]:
        x, rows = self._rows(x)
        weight, bias = _flat(self._arrays, "weight"), _flat(self._arrays, "bias")
        y, means, scales = self._backend.dense.layer_norm_forward(
            rows, weight, bias, self.eps, threads.get_num_threads()
        )
        return y.reshape(x.shape), (rows, weight, means, scales)

    def _backward(self, dy: Array, kept: Any, targets: Mapping[str, Array]) -> Array:
        rows, weight, means, scales = kept
        dweight, dbias = _flat(targets, "weight"), _flat(targets, "bias")
        dx = self._backend.dense.layer_norm_backward(
            rows, weight, means, scales, dy.reshape(-1, self._width), dweight, dbias, threads.get_num_threads()
        )
        return dx.reshape(dy.shape)


class RMSNorm(Norm):
    """Normalisation by the root of the mean square [1]_ over the last axes: y = x / sqrt(mean of x^2 + eps) weight.

    References
    ----------
    .. [1] B. Zhang, R. Sennrich, "Root mean square layer normalization", NeurIPS 2019.
    """

    def _forward(self, x: Any, seed: int | None) -> tuple[Array, Any]:
        x, rows = self._rows(x)
        weight = _flat(self._arrays, "weight")
        y, scales = self._backend.dense.rms_norm_forward(rows, weight, self.eps, threads.get_num_threads())
        return y.reshape(x.shape), (rows, weight, scales)

    def _backward(self, dy: Array, kept: Any, targets: Mapping[str, Array]) -> Array:
        rows, weight, scales = kept
        dx = self._backend.dense.rms_norm_backward(
            rows, weight, scales, dy.reshape(-1, self._width), _flat(targets, "weight"), threads.get_num_threads()
        )
        return dx.reshape(dy.shape)


def _flat(arrays: Mapping[str, Array], name: str) -> Array | None:
    """A view of an array as one row, if it is there."""
    array = arrays.get(name)
    return None if array is None else array.reshape(-1)
