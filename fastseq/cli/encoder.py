"""A whole encoder, that of MiniLM: ids to a vector for every token, in every engine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastseq.checks import Array
from fastseq.cli import UsageError, engines, graphs, minilm
from fastseq.cli.cases import ITEM, Case, shapes
from fastseq.cli.engines import Model
from fastseq.cli.minilm import MINILM, Architecture

AXES = "B,T"
SHAPES = ((1, 8), (1, 32), (1, 128), (1, 512), (8, 128), (32, 64))
MIXED = (32, 128, 8)  # batch, longest and shortest row
Weights = Mapping[str, Array]


@dataclass(frozen=True)
class Encoder(Case):
    """The encoder over a batch.

    Parameters
    ----------
    batch, time : int
    shortest : int, optional
        Rows have lengths from this one to `time`, uniform; by default all are full. Engines that know no lengths get
        the batch padded, with its mask.
    architecture : Architecture
    weights : path, optional
        Where they are; random ones by default.
    """

    batch: int
    time: int
    shortest: int | None = None
    architecture: Architecture = MINILM
    weights: Path | None = None

    @property
    def group(self) -> str:
        """For people."""
        return "full rows" if self.shortest is None else "mixed lengths"

    @property
    def name(self) -> str:
        """For people."""
        return f"encoder {self.label}"

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.batch}×{self.time if self.shortest is None else f'({self.shortest} to {self.time})'}"

    @property
    def axes(self) -> str:
        """For people."""
        return "B×T"

    @property
    def notes(self) -> tuple[str, ...]:
        """For people: which encoder it is."""
        a = self.architecture
        which = "random weights" if self.weights is None else f"weights of all-MiniLM-L6-v2 ({minilm.PACKAGE})"
        return (f"encoder: {a.layers} layers, width {a.width}, {a.heads} heads, {a.inner} within, {which}",)

    @property
    def engines(self) -> tuple[str, ...]:
        """All."""
        return ("reference", *_PEERS)

    @property
    def lengths(self) -> Array:
        """The real tokens of each row."""
        if self.shortest is None:
            return np.full(self.batch, self.time)
        lengths = np.random.default_rng([self.batch, self.time]).integers(self.shortest, self.time + 1, self.batch)
        lengths[0] = self.time  # so that the batch is of its shape
        return lengths

    @property
    def terms(self) -> int:
        """How many terms a result sums, in one layer after another."""
        a = self.architecture
        return a.layers * (4 * a.width + a.inner + self.time)

    @property
    def flops(self) -> int:
        """Those of all linear maps and of attention, real tokens alone."""
        a, lengths = self.architecture, [int(length) for length in self.lengths]
        pairs = sum(length * length for length in lengths)
        return 2 * a.weights_of_layers * sum(lengths) + 4 * a.layers * a.width * pairs

    @property
    def bytes_read(self) -> int:
        """Bytes of the weights of all layers."""
        return ITEM * self.architecture.weights_of_layers

    def memory(self, engines: int) -> int:
        """About how many bytes the arrays take in all processes together."""
        a = self.architecture
        of_token = 8 * a.width + 2 * a.inner + 2 * a.heads * self.time
        # Plain and packed weights; files of them, and what is made of these.
        return (engines * ITEM + 2 * ITEM) * (4 * a.weights + self.batch * self.time * of_token)

    def describe(self) -> dict[str, Any]:
        """For programs."""
        return {
            "kind": "encoder",
            "train": self.train,
            "batch": self.batch,
            "time": self.time,
            "shortest": self.shortest,
            "tokens": int(self.lengths.sum()),
            "architecture": vars(self.architecture),
            "real_weights": self.weights is not None,
            "weight_bytes_read": self.bytes_read,
        }

    def build(self, engine: str, threads: int) -> Model:
        """The case in an engine; its output is the vectors of all real tokens, row after row."""
        weights = minilm.weights(self.architecture, self.weights)
        rng = np.random.default_rng([self.batch, self.time, self.architecture.vocabulary])
        ids = rng.integers(0, self.architecture.vocabulary, (self.batch, self.time), np.int32)
        real = np.arange(self.time) < self.lengths[:, None]
        ids[~real] = 0
        if engine in engines.OURS:
            model = _model(*engines.ours(engine, threads), self, weights, ids)
        else:
            model = _PEERS[engine](self, weights, ids, threads)
        return Model(model.call, lambda result: tuple(y[real] for y in model.outputs(result)))


def chosen(texts: Sequence[str]) -> list[Case]:
    """The cases that the values of --shape ask for, or the usual ones."""
    weights, wanted = minilm.real_weights(), shapes(texts, AXES)
    for _, time in wanted:
        if time > MINILM.positions:
            raise UsageError(f"--shape should have a T up to {MINILM.positions}, not {time}")
    rows: list[tuple[int, int, int | None]] = [(batch, time, None) for batch, time in wanted or SHAPES]
    if not wanted:
        rows.append(MIXED)
    return [Encoder(*row, architecture=MINILM, weights=weights) for row in rows]


_SELF, _OUT, _IN, _LAST = "attention.self.", "attention.output.", "intermediate.dense.", "output."


def _model(module: Any, dtype: str, case: Encoder, weights: Weights, ids: Array) -> Model:
    from fastseq.models import bert_state_dict

    a = case.architecture
    model = module.models.TransformerEncoderModel(
        a.vocabulary,
        a.width,
        a.heads,
        a.layers,
        dim_feedforward=a.inner,
        max_length=a.positions,
        type_vocab_size=2,
        dropout=0.0,
        layer_norm_eps=a.eps,
        pooling=None,
        dtype=dtype,
    )
    model.load_state_dict(bert_state_dict(weights))
    lengths = None if case.shortest is None else case.lengths
    return Model(lambda: model(ids, lengths=lengths), lambda y: (y,))


def _of_pytorch(architecture: Architecture, weights: Weights) -> dict[str, Array]:
    """The weights of the layers by the names of PyTorch's Transformer."""
    result: dict[str, Array] = {}
    for i, layer in enumerate(architecture.layer_names):
        for part in ("weight", "bias"):
            projections = [weights[f"{layer}.{_SELF}{name}.{part}"] for name in ("query", "key", "value")]
            result |= {
                f"layers.{i}.self_attn.in_proj_{part}": np.concatenate(projections),
                f"layers.{i}.self_attn.out_proj.{part}": weights[f"{layer}.{_OUT}dense.{part}"],
                f"layers.{i}.linear1.{part}": weights[f"{layer}.{_IN}{part}"],
                f"layers.{i}.linear2.{part}": weights[f"{layer}.{_LAST}dense.{part}"],
                f"layers.{i}.norm1.{part}": weights[f"{layer}.{_OUT}LayerNorm.{part}"],
                f"layers.{i}.norm2.{part}": weights[f"{layer}.{_LAST}LayerNorm.{part}"],
            }
    return result


def _torch(case: Encoder, weights: Weights, ids: Array, threads: int) -> Model:
    """Its own encoder, fused; given a mask it leaves out padding itself, which transformers' BertModel does not."""
    torch = engines.torch(threads)
    functional, a = torch.nn.functional, case.architecture
    layer = torch.nn.TransformerEncoderLayer(a.width, a.heads, a.inner, 0.0, "gelu", a.eps, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, a.layers).eval()
    arrays = _of_pytorch(a, weights)
    encoder.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    words, places, kinds, *norm = (
        torch.from_numpy(weights[f"embeddings.{name}"])
        for name in (
            "word_embeddings.weight",
            "position_embeddings.weight",
            "token_type_embeddings.weight",
            "LayerNorm.weight",
            "LayerNorm.bias",
        )
    )
    tokens, padding = torch.from_numpy(ids), None
    if case.shortest is not None:
        padding = torch.from_numpy(np.arange(case.time) >= case.lengths[:, None])

    def call() -> Any:
        with torch.inference_mode():
            x = functional.embedding(tokens, words) + places[: case.time] + kinds[0]
            x = functional.layer_norm(x, (a.width,), *norm, a.eps)
            return encoder(x, src_key_padding_mask=padding)

    return Model(call, lambda y: (y.numpy(),))


def _of_layer(architecture: Architecture, weights: Weights, i: int) -> dict[str, Array]:
    start = f"layers.{i}."
    every = _of_pytorch(architecture, weights)
    return {name.removeprefix(start): array for name, array in every.items() if name.startswith(start)}


def _graph(run: Callable[..., Model], fused: bool) -> Callable[[Encoder, Weights, Array, int], Model]:
    def build(case: Encoder, weights: Weights, ids: Array, threads: int) -> Model:
        masked = case.shortest is not None
        model = graphs.encoder(case.architecture, weights, case.batch, case.time, masked, fused)
        inputs = {"ids": ids}
        if masked:
            inputs["mask"] = (np.arange(case.time) < case.lengths[:, None]).astype(np.int32)
        return run(model, inputs, threads, tuple)

    return build


def _ctranslate2(case: Encoder, weights: Weights, ids: Array, threads: int) -> Model:
    import ctranslate2

    with tempfile.TemporaryDirectory() as folder:
        _save_for_ctranslate2(case.architecture, weights, folder)
        encoder = ctranslate2.Encoder(folder, "cpu", compute_type="float32", inter_threads=1, intra_threads=threads)
    tokens = ctranslate2.StorageView.from_array(ids)
    lengths = ctranslate2.StorageView.from_array(case.lengths.astype(np.int32))
    return Model(lambda: encoder.forward_batch(tokens, lengths), lambda result: (np.array(result.last_hidden_state),))


def _save_for_ctranslate2(architecture: Architecture, weights: Weights, folder: str) -> None:
    """What its converter makes of BERT."""
    from ctranslate2.specs import common_spec, transformer_spec

    spec = transformer_spec.TransformerEncoderModelSpec(
        transformer_spec.TransformerEncoderSpec(
            architecture.layers,
            architecture.heads,
            pre_norm=False,
            activation=common_spec.Activation.GELU,
            layernorm_embedding=True,
            num_source_embeddings=2,
            embeddings_merge=common_spec.EmbeddingsMerge.ADD,
        )
    )
    encoder = spec.encoder
    encoder.scale_embeddings = False
    for part, name in ((encoder.embeddings[0], "word"), (encoder.embeddings[1], "token_type")):
        part.weight = weights[f"embeddings.{name}_embeddings.weight"]
    encoder.position_encodings.encodings = weights["embeddings.position_embeddings.weight"]

    def norm(part: Any, name: str) -> None:
        part.gamma, part.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]

    norm(encoder.layernorm_embedding, "embeddings.LayerNorm")
    for i, layer in enumerate(encoder.layer):
        p, name = _of_layer(architecture, weights, i), architecture.layer_names[i]
        attention, forward = layer.self_attention, layer.ffn
        attention.linear[0].weight, attention.linear[0].bias = (
            p["self_attn.in_proj_weight"],
            p["self_attn.in_proj_bias"],
        )
        for part, map_name in (
            (attention.linear[1], "self_attn.out_proj"),
            (forward.linear_0, "linear1"),
            (forward.linear_1, "linear2"),
        ):
            part.weight, part.bias = p[f"{map_name}.weight"], p[f"{map_name}.bias"]
        norm(attention.layer_norm, f"{name}.{_OUT}LayerNorm")
        norm(forward.layer_norm, f"{name}.{_LAST}LayerNorm")
    # It wants a word for every id, whatever it is.
    spec.register_vocabulary([str(i) for i in range(architecture.vocabulary)])
    spec.config.layer_norm_epsilon = architecture.eps
    spec.config.unk_token = "0"
    spec.validate()
    spec.optimize(quantization="float32")
    spec.save(folder)


_PEERS: dict[str, Callable[[Encoder, Weights, Array, int], Model]] = {
    "torch": _torch,
    "onnxruntime": _graph(engines.onnxruntime, fused=True),
    "openvino": _graph(engines.openvino, fused=False),
    "ctranslate2": _ctranslate2,
}
