"""Parts that the Transformer models share: initial weights, the tied output, calls of an encoder over rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastseq import threads
from fastseq.checks import Array
from fastseq.layers.attention import Frame
from fastseq.layers.rows import Rows
from fastseq.layers.transformer import Context
from fastseq.models.base import Model, ParameterCache

POSITIONS = ("learned", "sinusoidal", "rotary")
_DEVIATION = 0.02  # of initial weights


def attention_maps(weights: list[Array], rows: Rows, unbatched: bool) -> list[Array]:
    """Attention of every layer, (B, heads, longest, longest), with zeros up to (B, heads, T, T)."""
    maps = []
    for own in weights:
        whole = np.zeros((*own.shape[:2], rows.time, rows.time), own.dtype)
        whole[:, :, : own.shape[2], : own.shape[3]] = own
        maps.append(whole[0] if unbatched else whole)
    return maps


def encode(encoder: Any, x: Array, rows: Rows, causal: bool, want_weights: bool = False) -> tuple[Array, Any]:
    """An encoder over rows: outputs as rows, and the attention of every layer."""
    y, weights = encoder._run(x, Context(Frame(rows, rows, False), None, causal), want_weights)
    return y, weights


def initialise(model: Model, num_layers: int, residual: float) -> None:
    """Normal weights of deviation 0.02, those that end a residual branch times `residual`; biases 0, norms 1."""
    rng = np.random.default_rng(model._config["seed"])
    arrays: dict[str, Array] = {}
    for name, old in model._arrays.items():
        if old.ndim == 2:
            ends = name.endswith(("out_proj.weight", "linear2.weight"))
            arrays[name] = np.asarray(rng.normal(0, _DEVIATION * (residual if ends else 1.0), old.shape))
        elif name.endswith("bias"):
            arrays[name] = np.zeros(old.shape)
    model._replace(arrays)


class TiedOutput:
    """The output map whose matrix is the embedding's, without the row of the begin symbol: y = E x."""

    def __init__(self, embedding: Any, operations: Any, count: int) -> None:
        self._embedding, self._operations, self._count = embedding, operations, count
        self._packed = ParameterCache(embedding)

    def _weights(self) -> Any:
        return self._packed.get(
            lambda: self._operations.linear_pack(self._embedding._arrays["weight"][: self._count], None)
        )

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
