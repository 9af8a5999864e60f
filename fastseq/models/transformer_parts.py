"""What the Transformer models share: settings, initial weights, calls of an encoder over rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastseq import layers
from fastseq.checks import Array
from fastseq.layers import inside
from fastseq.layers.rows import Rows
from fastseq.layers.settings import KW_ONLY, Dtype, Resolved, choice, flag, floating, fraction, random_seed, size
from fastseq.layers.transformer import ACTIVATIONS, FEEDFORWARD, NORMS
from fastseq.models.base import Model

POSITIONS = ("learned", "sinusoidal", "rotary")
_DEVIATION = 0.02  # of initial weights


INNER = f"{FEEDFORWARD[:-1]}; 4 d_model by default."
ACTIVATION = "Between the two linear maps; gated ones as of `TransformerEncoder`."
NORM_FIRST = "Whether norms stand before attention and feed-forward, and one after the last layer; else after each sum."


class GenerativeTransformer(Model):
    """A model that generates from Transformer layers: its settings, and the parts that they determine."""

    _: KW_ONLY
    dim_feedforward: Resolved[int | None, int] = size(default=None, doc=INNER)
    dropout: float = fraction(
        default=0.0,
        doc="Share that training drops: of what enters the first layer, and in the layers as `TransformerEncoder` has"
        " it.",
    )
    activation: str = choice(ACTIVATIONS, default="gelu_tanh", doc=ACTIVATION)
    norm: str = choice(NORMS, default="layer", doc="`LayerNorm` or `RMSNorm`.")
    norm_first: bool = flag(default=True, doc=NORM_FIRST)
    positions: str | None = choice(
        POSITIONS,
        default="learned",
        optional=True,
        doc="Encoding of positions. None: a token's position shows only in what it may attend to.",
    )
    num_kv_heads: Resolved[int | None, int] = size(
        default=None, doc="Heads of keys and values, a divisor of `nhead`; as many as there are heads by default."
    )
    bias: bool = flag(default=True, doc="Whether linear maps and layer norms of the layers have biases.")
    tied: bool = flag(
        default=True,
        doc="Whether the output has the matrix of the embedding of what is generated [2]_; else one of its own,"
        " without bias.",
    )
    dtype: Dtype = floating(default="float32", doc="Of parameters and logits.")
    seed: int | None = random_seed(default=None, doc="Fixes the initial parameters.")

    if TYPE_CHECKING:  # each class declares these where they stand in its signature

        @property
        def d_model(self) -> int: ...  # noqa: D102

        @property
        def nhead(self) -> int: ...  # noqa: D102

    def _resolve(self) -> None:
        self.dim_feedforward = self.dim_feedforward or 4 * self.d_model
        self.num_kv_heads = self.num_kv_heads or self.nhead

    def _stack(self, kind: Any, num_layers: int, **more: Any) -> Any:
        """Make an encoder or a decoder of these settings."""
        return self._part(
            kind,
            num_layers,
            self.d_model,
            self.nhead,
            self.dim_feedforward,
            dropout=self.dropout,
            activation=self.activation,
            norm_first=self.norm_first,
            final_norm=self.norm_first,
            bias=self.bias,
            norm=self.norm,
            num_kv_heads=self.num_kv_heads,
            rotary=10000.0 if self.positions == "rotary" else None,
            **more,
        )

    def _positions_layer(self, count: int, seed: int | None) -> Any:
        """Make the layer that adds up to `count` positions to embeddings; None where the setting has no such layer."""
        if self.positions == "learned":
            return self._part(layers.LearnedPositions, count, self.d_model, seed=seed)
        return self._part(layers.SinusoidalPositions, self.d_model) if self.positions == "sinusoidal" else None

    def _output_map(self, embedding: Any, count: int, seed: int | None) -> Any:
        """Make the map from vectors to `count` logits."""
        if self.tied:
            return inside.TiedOutput(embedding, self._backend.dense, count)
        return self._part(layers.Linear, self.d_model, count, False, seed=seed)


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
