"""CTranslate2: an encoder and a decoder, from specifications as its converters write them."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np

from fastseq.bench.cases import Case, minilm
from fastseq.bench.cases.decode import EPS, Decode, Transformer, Weights
from fastseq.bench.cases.encoder import Encoder
from fastseq.bench.cases.minilm import Architecture
from fastseq.bench.engines import Builder, Model, NotNarrow


def _check(weights: str) -> None:
    """It would compute with another type where it has not the instructions for one."""
    import ctranslate2

    if weights not in ctranslate2.get_supported_compute_types("cpu"):
        raise NotNarrow(f"no {weights} on this machine")


def _encoder(case: Encoder, threads: int, weights: str = "float32") -> Model:
    import ctranslate2

    _check(weights)
    with tempfile.TemporaryDirectory() as folder:
        _save_encoder(case.architecture, case.bert_weights(), folder)
        encoder = ctranslate2.Encoder(folder, "cpu", compute_type=weights, inter_threads=1, intra_threads=threads)
    tokens = ctranslate2.StorageView.from_array(case.ids())
    lengths = ctranslate2.StorageView.from_array(case.lengths.astype(np.int32))
    return Model(
        lambda: encoder.forward_batch(tokens, lengths), lambda result: (np.array(result.last_hidden_state)[case.real],)
    )


def _save_encoder(architecture: Architecture, weights: Weights, folder: str) -> None:
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
    maps = minilm.pytorch_weights(architecture, weights)
    for i, layer in enumerate(encoder.layer):
        start, name = f"layers.{i}.", architecture.layer_names[i]
        p = {key.removeprefix(start): array for key, array in maps.items() if key.startswith(start)}
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
        norm(attention.layer_norm, f"{name}.attention.output.LayerNorm")
        norm(forward.layer_norm, f"{name}.output.LayerNorm")
    # It wants a word for every id, whatever it is.
    spec.register_vocabulary([str(i) for i in range(architecture.vocabulary)])
    spec.config.layer_norm_epsilon = architecture.eps
    spec.config.unk_token = "0"
    spec.validate()
    spec.optimize(quantization="float32")
    spec.save(folder)


def _decode(case: Decode, threads: int, weights: str = "float32") -> Model:
    import ctranslate2

    _check(weights)
    with tempfile.TemporaryDirectory() as folder:
        _save_decoder(case.model, case.model.weights(), folder)
        generator = ctranslate2.Generator(folder, "cpu", compute_type=weights, inter_threads=1, intra_threads=threads)
    tokens = [[str(symbol) for symbol in row] for row in case.prompts_with_begin()]

    def call() -> Any:
        return generator.generate_batch(
            tokens, max_length=case.new, sampling_topk=1, include_prompt_in_result=False, end_token=[]
        )

    return Model(call, lambda results: (np.array([result.sequences_ids[0] for result in results]),))


def _save_decoder(model: Transformer, weights: Weights, folder: str) -> None:
    """What its converter makes of GPT-2."""
    from ctranslate2.specs import common_spec, transformer_spec

    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        model.layers, model.heads, pre_norm=True, activation=common_spec.Activation.GELUTanh
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights["embedding.weight"]
    decoder.position_encodings.encodings = weights["positions.weight"]
    decoder.projection.weight = weights["embedding.weight"]
    never = np.zeros(model.symbols + 1, np.float32)
    never[model.symbols] = -1e30  # the begin symbol
    decoder.projection.bias = never

    def norm(part: Any, name: str) -> None:
        part.gamma, part.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]

    norm(decoder.layer_norm, "encoder.norm")
    for i, layer in enumerate(decoder.layer):
        name = f"encoder.layers.{i}"
        maps = (
            (layer.self_attention.linear[0], "self_attn.in_proj_"),
            (layer.self_attention.linear[1], "self_attn.out_proj."),
            (layer.ffn.linear_0, "linear1."),
            (layer.ffn.linear_1, "linear2."),
        )
        for part, map_name in maps:
            part.weight, part.bias = weights[f"{name}.{map_name}weight"], weights[f"{name}.{map_name}bias"]
        norm(layer.self_attention.layer_norm, f"{name}.norm1")
        norm(layer.ffn.layer_norm, f"{name}.norm2")
    # It wants a word for every id, and names for the special ones.
    spec.register_vocabulary([str(i) for i in range(model.symbols + 1)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = str(model.symbols)
    spec.config.layer_norm_epsilon = EPS
    spec.validate()
    spec.optimize(quantization="float32")
    spec.save(folder)


BUILDERS: dict[type[Case], Builder] = {Encoder: _encoder, Decode: _decode}
