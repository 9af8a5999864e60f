"""llama.cpp: greedy decoding, from a GGUF file."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastseq.bench.cases import Case
from fastseq.bench.cases.decode import EPS, Decode, Transformer, Weights
from fastseq.bench.engines import Builder, Model
from fastseq.checks import Array


def _decode(case: Decode, threads: int) -> Model:
    import llama_cpp

    llama_cpp.llama_log_set(_silent(llama_cpp), None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        _save(case.model, case.model.weights(), path)
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap = False  # the file will be gone
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    if not model:
        raise RuntimeError("llama.cpp did not take the model")
    tokens = case.prompts_with_begin()
    context = llama_cpp.llama_init_from_model(model, _settings(llama_cpp, case, threads))
    if not context:
        raise RuntimeError("llama.cpp did not make a context")
    memory = llama_cpp.llama_get_memory(context)
    batch = llama_cpp.llama_batch_init(tokens.size, 0, 1)

    def decode(columns: Array, position: int) -> Iterator[int]:
        """Put symbols (B, T) through the layers; the likeliest to follow each row."""
        batch.n_tokens = columns.size
        for i, (row, place) in enumerate(np.ndindex(columns.shape)):
            batch.token[i] = columns[row, place]
            batch.pos[i] = position + place
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row
            batch.logits[i] = place == columns.shape[1] - 1
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama.cpp could not decode")
        for row in range(len(columns)):
            logits = llama_cpp.llama_get_logits_ith(context, (row + 1) * columns.shape[1] - 1)
            yield int(np.ctypeslib.as_array(logits, (case.model.symbols,)).argmax())  # without the begin symbol

    def call() -> Array:
        llama_cpp.llama_memory_clear(memory, True)
        ids = np.empty((case.batch, case.new), np.int64)
        ids[:, 0] = list(decode(tokens, 0))
        for step in range(1, case.new):
            ids[:, step] = list(decode(ids[:, step - 1 : step], case.prompt + step))
        return ids

    return Model(call, lambda ids: (ids,))


@functools.cache  # it has to live as long as the library
def _silent(llama_cpp: Any) -> Any:
    """A callback that drops the log of llama.cpp, several lines for every call."""
    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def _settings(llama_cpp: Any, case: Decode, threads: int) -> Any:
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = case.batch * case.model.context
    settings.n_batch = settings.n_ubatch = case.batch * (case.prompt + 1)
    settings.n_seq_max = case.batch
    settings.n_threads = settings.n_threads_batch = threads
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # with it, it took longer
    return settings


def _save(model: Transformer, weights: Weights, path: Path) -> None:
    """What its converter makes of GPT-2, without a vocabulary of words."""
    import gguf

    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(model.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.width)
    writer.add_feed_forward_length(4 * model.width)
    writer.add_head_count(model.heads)
    writer.add_layer_norm_eps(EPS)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(model.symbols + 1)
    # Tied: the output is the embedding, where there is none of its own.
    arrays = {"token_embd.weight": weights["embedding.weight"], "position_embd.weight": weights["positions.weight"]}
    names = {
        "self_attn.in_proj_": "attn_qkv.",
        "self_attn.out_proj.": "attn_output.",
        "linear1.": "ffn_up.",
        "linear2.": "ffn_down.",
        "norm1.": "attn_norm.",
        "norm2.": "ffn_norm.",
    }
    for part in ("weight", "bias"):
        arrays[f"output_norm.{part}"] = weights[f"encoder.norm.{part}"]
        for i in range(model.layers):
            for name, theirs in names.items():
                arrays[f"blk.{i}.{theirs}{part}"] = weights[f"encoder.layers.{i}.{name}{part}"]
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


BUILDERS: dict[type[Case], Builder] = {Decode: _decode}
