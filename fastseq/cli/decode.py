"""Greedy decoding with a language model in the arrangement of GPT-2 [1]_: a prompt, then one symbol after another.

References
----------
.. [1] A. Radford et al., "Language models are unsupervised multitask learners", 2019.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastseq.checks import Array
from fastseq.cli import UsageError, engines, language
from fastseq.cli.cases import ITEM, Case, Verdict, compare_symbols, shapes
from fastseq.cli.engines import Model, Outputs

AXES = "layers,width,heads,V,context,B"
SHAPES = (
    (12, 768, 12, 50257, 1024, 1),
    (12, 768, 12, 50257, 1024, 8),
    (4, 128, 4, 96, 256, 1),
    (4, 128, 4, 96, 256, 8),
)
PROMPT, NEW = 32, 128
# Of embedding and positions: what the layers add is larger, or each symbol would be the likeliest to follow itself.
DEVIATION = 0.05
# Of queries and keys: where attention is a mean of all keys, every text ends in the same few symbols.
SHARPNESS = 4.0
EPS = 1e-5  # of the norms
COARSE = 0.02  # how far off llama.cpp may be: it looks GELU up in a table of half precision
Weights = Mapping[str, Array]


@dataclass(frozen=True)
class Transformer:
    """A language model: how many layers, how wide, and what it may be given.

    Parameters
    ----------
    layers, width, heads : int
        The feed-forward is four times as wide within.
    symbols : int
        The symbols that are predicted; one more begins every text.
    context : int
        The most tokens that are looked at together, and rows of the embedding of positions.
    """

    layers: int
    width: int
    heads: int
    symbols: int
    context: int

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.layers}×{self.width}×{self.heads}"

    @property
    def layer_weights(self) -> int:
        """How many weights there are in the products of all layers."""
        return 12 * self.layers * self.width * self.width

    @property
    def output_weights(self) -> int:
        """How many there are in the output, which is the embedding."""
        return self.width * self.symbols

    @property
    def cached(self) -> int:
        """How many numbers of a token are kept: its key and its value in every layer."""
        return 2 * self.layers * self.width

    def weights(self) -> dict[str, Array]:
        """Random weights, float32, which depend on the model alone."""
        rng = np.random.default_rng([self.layers, self.width, self.heads, self.symbols, self.context])
        return language.weights(rng, self.layers, self.width, self.symbols, self.context, DEVIATION, SHARPNESS)

    def build(self, module: Any, dtype: str) -> Any:
        """The model in fastseq, compiled or not."""
        model = module.models.TransformerLM(
            self.symbols, self.width, self.heads, self.layers, context=self.context, dropout=0.0, dtype=dtype
        )
        model.load_state_dict(self.weights())
        return model

    def flops(self, batch: int, first: int, last: int) -> int:
        """Those of tokens `first` up to `last` of every row, through all layers; without the output."""
        pairs = (last * (last + 1) - first * (first + 1)) // 2
        return batch * (2 * self.layer_weights * (last - first) + 2 * self.cached * pairs)

    def memory(self, engines: int, batch: int, length: int) -> int:
        """About how many bytes it takes in all processes together."""
        # Plain and packed weights; a file of them, or what they are made of.
        weights = 3 * (self.layer_weights + self.output_weights + self.width * self.context)
        return (engines * ITEM + 2 * ITEM) * (weights + batch * (length * 2 * self.cached + 4 * self.symbols))


@dataclass(frozen=True)
class Decode(Case):
    """Greedy decoding.

    Parameters
    ----------
    model : Transformer
    batch : int
        Rows, each with a prompt of its own.
    prompt, new : int
        Symbols of a prompt, and how many are chosen.
    """

    model: Transformer
    batch: int
    prompt: int = PROMPT
    new: int = NEW

    @property
    def group(self) -> str:
        """For people."""
        return f"decode {self.model.label}"

    @property
    def name(self) -> str:
        """For people."""
        return f"decode {self.label}"

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.model.label}, batch {self.batch}"

    @property
    def axes(self) -> str:
        """For people."""
        return "layers×width×heads, batch"

    @property
    def notes(self) -> tuple[str, ...]:
        """For people: the rest of the sizes, and what PyTorch's is."""
        m = self.model
        notes = [
            f"decode {m.label}: vocabulary {m.symbols}, context {m.context}, {self.new} symbols after {self.prompt},"
            " greedy, random weights"
        ]
        if importlib.util.find_spec("transformers") is not None:
            version = importlib.metadata.version("transformers")
            notes.append(f"torch: GPT2LMHeadModel of transformers {version}, with its cache")
        if not engines.missing("llamacpp"):
            notes.append("llamacpp: float32, but for GELU, which it looks up in half precision")
        return tuple(notes)

    @property
    def engines(self) -> tuple[str, ...]:
        """Those that can compute it."""
        return ("reference", *_PEERS)

    def needs(self, engine: str) -> tuple[str, ...]:
        """PyTorch's GPT-2 is that of transformers."""
        return ("transformers",) if engine == "torch" else ()

    def compare(self, engine: str, outputs: Outputs, expected: Outputs, allowed: float) -> Verdict:
        """All symbols have to be the same, up to where two are as good as equally likely."""
        ids, margins = expected
        if engine == "llamacpp":
            allowed = max(allowed, COARSE)
        return compare_symbols(outputs[0], ids, margins, allowed)

    @property
    def terms(self) -> int:
        """How many terms a logit sums, in one layer after another."""
        return self.model.layers * (8 * self.model.width + self.length)

    @property
    def length(self) -> int:
        """How many tokens of a row go through the layers: begin symbol, prompt, and all that is chosen but the last."""
        return self.prompt + self.new

    @property
    def unit(self) -> str:
        """For people."""
        return "symbols/s"

    @property
    def work(self) -> float:
        """The symbols that are chosen."""
        return self.batch * self.new

    @property
    def flops(self) -> int:
        """Those of all linear maps and of causal attention."""
        return self._prompt_flops + self._step_flops

    @property
    def _prompt_flops(self) -> int:
        """Of what goes through the layers at once; only what comes after the last of it is predicted."""
        return self.model.flops(self.batch, 0, self.prompt + 1) + 2 * self.batch * self.model.output_weights

    @property
    def _step_flops(self) -> int:
        """Of what goes through them one by one."""
        outputs = 2 * self.batch * self.model.output_weights * (self.new - 1)
        return self.model.flops(self.batch, self.prompt + 1, self.length) + outputs

    @property
    def bytes_read(self) -> int:
        """Bytes that have to be read: all weights for each symbol, and keys and values of all tokens before."""
        return self._prompt_bytes + self._step_bytes

    @property
    def _prompt_bytes(self) -> int:
        return ITEM * (self.model.layer_weights + self.model.output_weights)

    @property
    def _step_bytes(self) -> int:
        steps, past = self.new - 1, (self.length * (self.length - 1) - self.prompt * (self.prompt + 1)) // 2
        return steps * self._prompt_bytes + ITEM * self.batch * self.model.cached * past

    @property
    def working_set(self) -> int:
        """Bytes of the weights, and of keys and values at the end."""
        return self._prompt_bytes + ITEM * self.batch * self.model.cached * self.length

    def floor(self, multiply_adds: float, read: float) -> float:
        """The least seconds it can take.

        Parameters
        ----------
        multiply_adds : float
            Floating-point operations a second.
        read : float
            Bytes a second out of a buffer of `working_set`.

        Notes
        -----
        The prompt goes through the layers at once, what is chosen one by one; for each of the two counts what takes
        longer, to read or to multiply.
        """
        prompt = max(self._prompt_flops / multiply_adds, self._prompt_bytes / read)
        return prompt + max(self._step_flops / multiply_adds, self._step_bytes / read)

    def memory(self, engines: int) -> int:
        """About how many bytes the arrays take in all processes together."""
        return self.model.memory(engines, self.batch, self.length)

    def describe(self) -> dict[str, Any]:
        """For programs."""
        return {
            "kind": "decode",
            "train": self.train,
            **vars(self.model),
            "batch": self.batch,
            "prompt": self.prompt,
            "new": self.new,
            "bytes_read": self.bytes_read,
        }

    def build(self, engine: str, threads: int) -> Model:
        """The case in an engine; its output is what was chosen, (B, new), and of exact the margins of it."""
        prompts = random_symbols(self.model.symbols, self.batch, self.prompt)
        if engine not in engines.OURS:
            return _PEERS[engine](self, self.model.weights(), prompts, threads)
        model = self.model.build(*engines.ours(engine, threads))

        def outputs(ids: Array) -> Outputs:
            return (ids, margins(model, prompts, ids)) if engine == "exact" else (ids,)

        return Model(lambda: model.generate(prompts, self.new, temperature=0), outputs)


def random_symbols(symbols: int, batch: int, length: int) -> Array:
    """Prompts (B, T), which depend on these numbers alone."""
    return np.random.default_rng([symbols, batch, length]).integers(0, symbols, (batch, length))


def margins(model: Any, prompts: Array, ids: Array) -> Array:
    """By how much each symbol of (B, T) was likelier than any other, over the largest logit; computed all at once."""
    result = np.empty(ids.shape)
    for i, (prompt, row) in enumerate(zip(prompts, ids, strict=True)):  # logits of one row can be many
        logits = model(np.concatenate([prompt, row[:-1]]))[len(prompt) - 1 :]
        largest = np.abs(logits).max(axis=1)
        places = np.arange(len(row)), row
        chosen = logits[places]
        logits[places] = -np.inf
        result[i] = (chosen - logits.max(axis=1)) / largest
    return result


def chosen(texts: Sequence[str]) -> list[Case]:
    """The cases that the values of --shape ask for, or the usual ones."""
    wanted = shapes(texts, AXES)
    for _, width, heads, _, context, _ in wanted:
        if width % heads:
            raise UsageError(f"--shape should have a number of heads that divides the width {width}, not {heads}")
        if context < PROMPT + NEW:
            raise UsageError(f"--shape should have a context of at least {PROMPT + NEW} symbols, not {context}")
    return [Decode(Transformer(*sizes), batch) for *sizes, batch in wanted or SHAPES]


def _with_begin(case: Decode, prompts: Array) -> Array:
    """Prompts with the begin symbol in front, which is what peers are given."""
    return np.concatenate([np.full((case.batch, 1), case.model.symbols), prompts], axis=1)


def _torch(case: Decode, weights: Weights, prompts: Array, threads: int) -> Model:
    """Its loop is that of `generate`, whose bookkeeping took a tenth longer in the small model."""
    torch = engines.torch(threads)
    import transformers

    m = case.model
    config = transformers.GPT2Config(
        vocab_size=m.symbols + 1,
        n_positions=m.context,
        n_embd=m.width,
        n_layer=m.layers,
        n_head=m.heads,
        layer_norm_epsilon=EPS,
        bos_token_id=None,
        eos_token_id=None,
    )
    # Eager attention took as long or longer.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    arrays = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in _of_gpt2(m, weights).items()}
    model.transformer.load_state_dict(arrays)
    # Tied, but for the row of the begin symbol, which is never chosen.
    model.lm_head.weight = torch.nn.Parameter(model.transformer.wte.weight.detach()[: m.symbols])
    tokens = torch.from_numpy(_with_begin(case, prompts))

    def call() -> Any:
        with torch.inference_mode():
            result = model(tokens, use_cache=True, logits_to_keep=1)
            symbols = [result.logits[:, -1].argmax(1)]
            for _ in range(1, case.new):
                result = model(symbols[-1][:, None], past_key_values=result.past_key_values, use_cache=True)
                symbols.append(result.logits[:, -1].argmax(1))
            return torch.stack(symbols, 1)

    return Model(call, lambda ids: (ids.numpy(),))


# The parts of a layer, here and in GPT-2; those that are linear maps, and the other way round there.
_LINEAR = {
    "self_attn.in_proj_": "attn.c_attn.",
    "self_attn.out_proj.": "attn.c_proj.",
    "linear1.": "mlp.c_fc.",
    "linear2.": "mlp.c_proj.",
}
_NORMS = {"norm1.": "ln_1.", "norm2.": "ln_2."}


def _of_gpt2(model: Transformer, weights: Weights) -> dict[str, Array]:
    """The weights by the names of GPT-2 in transformers."""
    result = {"wte.weight": weights["embedding.weight"], "wpe.weight": weights["positions.weight"]}
    for part in ("weight", "bias"):
        result[f"ln_f.{part}"] = weights[f"encoder.norm.{part}"]
        for i in range(model.layers):
            for name, theirs in (_LINEAR | _NORMS).items():
                array = weights[f"encoder.layers.{i}.{name}{part}"]
                result[f"h.{i}.{theirs}{part}"] = array.T if array.ndim == 2 else array
    return result


def _ctranslate2(case: Decode, weights: Weights, prompts: Array, threads: int) -> Model:
    import ctranslate2

    with tempfile.TemporaryDirectory() as folder:
        _save_for_ctranslate2(case.model, weights, folder)
        generator = ctranslate2.Generator(folder, "cpu", compute_type="float32", inter_threads=1, intra_threads=threads)
    tokens = [[str(symbol) for symbol in row] for row in _with_begin(case, prompts)]

    def call() -> Any:
        return generator.generate_batch(
            tokens, max_length=case.new, sampling_topk=1, include_prompt_in_result=False, end_token=[]
        )

    return Model(call, lambda results: (np.array([result.sequences_ids[0] for result in results]),))


def _save_for_ctranslate2(model: Transformer, weights: Weights, folder: str) -> None:
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


def _llamacpp(case: Decode, weights: Weights, prompts: Array, threads: int) -> Model:
    import llama_cpp

    llama_cpp.llama_log_set(_silent(llama_cpp), None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        _save_for_llamacpp(case.model, weights, path)
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap = False  # the file will be gone
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    if not model:
        raise RuntimeError("llama.cpp did not take the model")
    tokens = _with_begin(case, prompts)
    context = llama_cpp.llama_init_from_model(model, _llamacpp_settings(llama_cpp, case, threads))
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
    """Takes what llama.cpp tells, several lines for every call."""
    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def _llamacpp_settings(llama_cpp: Any, case: Decode, threads: int) -> Any:
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = case.batch * case.model.context
    settings.n_batch = settings.n_ubatch = case.batch * (case.prompt + 1)
    settings.n_seq_max = case.batch
    settings.n_threads = settings.n_threads_batch = threads
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # with it, it took longer
    return settings


def _save_for_llamacpp(model: Transformer, weights: Weights, path: Path) -> None:
    """What its converter makes of GPT-2, but without words: symbols have numbers alone."""
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


_PEERS: dict[str, Callable[[Decode, Weights, Array, int], Model]] = {
    "torch": _torch,
    "ctranslate2": _ctranslate2,
    "llamacpp": _llamacpp,
}
