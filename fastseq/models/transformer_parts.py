"""Parts that the Transformer models share: initial weights, calls of an encoder over rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastseq.checks import Array
from fastseq.layers import inside
from fastseq.layers.rows import Rows

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
    return inside.run_rows(encoder, x, inside.Context.of(rows, causal), want_weights)


def initialise(model: Any, num_layers: int, residual: float) -> None:
    """Normal weights of deviation 0.02, those that end a residual branch times `residual`; biases 0, norms 1."""
    rng = np.random.default_rng(model.seed)
    arrays: dict[str, Array] = {}
    for name, old in inside.arrays(model).items():
        if old.ndim == 2:
            ends = name.endswith(("out_proj.weight", "linear2.weight"))
            arrays[name] = np.asarray(rng.normal(0, _DEVIATION * (residual if ends else 1.0), old.shape))
        elif name.endswith("bias"):
            arrays[name] = np.zeros(old.shape)
    inside.copy_parameters(model, arrays)
