"""Linear, and the output map tied to an embedding: parameters and shapes. The arithmetic is in the operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastseq import checks, threads
from fastseq.checks import Array
from fastseq.layers.base import Pointwise
from fastseq.layers.derived import Derived
from fastseq.layers.embedding import Embedding
from fastseq.layers.settings import KW_ONLY, Dtype, flag, floating, random_seed, size


class Linear(Pointwise):
    """A linear map of the last axis: y = W x + b, x (..., I) and y (..., O)."""

    _features = 1
    _products = ("weight",)

    in_features: int = size(doc="I. W is the parameter `weight` (O, I).")
    out_features: int = size(doc="O.")
    bias: bool = flag(default=True, doc="Whether there is b, the parameter `bias` (O,).")
    _: KW_ONLY
    dtype: Dtype = floating(default="float32")
    seed: int | None = random_seed(default=None, doc="Fixes the initial parameters, uniform in ±1/sqrt(I).")

    def _build(self) -> None:
        self._packed: Derived[Any] = Derived()
        super()._build()

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
        return self._packed.get(self._arrays, self._pack)

    def _pack(self, arrays: Mapping[str, Array]) -> Any:
        return self._backend.dense.linear_pack(arrays["weight"], arrays.get("bias"))

    def _rows(self, x: Any) -> tuple[Array, tuple[int, ...]]:
        """The vectors of x as rows, and the shape of y."""
        x = checks.real_array("x", x, self.dtype)
        if not x.ndim or x.shape[-1] != self.in_features:
            raise ValueError(f"x should be of shape (..., {self.in_features}), not {x.shape}")
        return x.reshape(-1, self.in_features), (*x.shape[:-1], self.out_features)

    def _forward(self, x: Any, seed: int | None) -> tuple[Array, Any]:
        rows, shape = self._rows(x)
        weights = self._weights()
        y = self._backend.dense.linear_forward(weights, rows, threads.get_num_threads())
        return y.reshape(shape), (weights, rows)

    def _backward(self, dy: Array, kept: Any, targets: Mapping[str, Array]) -> Array:
        weights, rows = kept
        dx = self._backend.dense.linear_backward(
            weights,
            rows,
            dy.reshape(-1, self.out_features),
            targets["weight"],
            targets.get("bias"),
            threads.get_num_threads(),
        )
        return dx.reshape(*dy.shape[:-1], self.in_features)


class TiedOutput:
    """The output map whose matrix is the first `count` rows of an embedding's: y = E x."""

    def __init__(self, embedding: Embedding, operations: Any, count: int) -> None:
        self._embedding, self._operations, self._count = embedding, operations, count
        self._packed: Derived[Any] = Derived()

    def _weights(self) -> Any:
        """The weights as the operations want them."""
        return self._packed.get(self._embedding._arrays, self._pack)

    def _pack(self, arrays: Mapping[str, Array]) -> Any:
        return self._operations.linear_pack(arrays["weight"][: self._count], None)

    def __call__(self, x: Array) -> Array:  # noqa: D102
        y: Array = self._operations.linear_forward(self._weights(), x, threads.get_num_threads())
        return y

    def forward(self, x: Array) -> tuple[Array, Any]:
        """The outputs, and what `backward` needs."""
        return self(x), (self._weights(), x)

    def backward(self, dy: Array, kept: Any, grads: Mapping[str, Array] | None) -> Array:
        """The gradient of x; that of the matrix is added to the embedding's."""
        weights, x = kept
        dweight = self._embedding._targets(grads)["weight"][: self._count]
        dx: Array = self._operations.linear_backward(weights, x, dy, dweight, None, threads.get_num_threads())
        return dx
