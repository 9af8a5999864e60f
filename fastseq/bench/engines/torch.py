"""PyTorch, and GPT-2 of transformers for decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from fastseq.bench.cases import Case, Outputs, attention, decode, language, recurrent
from fastseq.bench.cases.attention import Attention
from fastseq.bench.cases.decode import Decode, Transformer, Weights
from fastseq.bench.cases.encoder import Encoder
from fastseq.bench.cases.generate import Sample
from fastseq.bench.cases.language import Step
from fastseq.bench.cases.minilm import pytorch_weights
from fastseq.bench.cases.recurrent import Recurrent
from fastseq.bench.engines import Builder, Model, NotNarrow, step_outputs
from fastseq.checks import Array


def _torch(threads: int) -> Any:
    """The module, set to a number of threads."""
    import torch

    torch.set_num_threads(threads)
    return torch


def _with_weights(torch: Any, modules: dict[str, Any], weights: str) -> tuple[dict[str, Any], Any]:
    """Modules with weights of a type, by name, and the dtype that their inputs should have."""
    names, whole = list(modules), torch.nn.ModuleList(modules.values())
    if weights == "bfloat16":
        return dict(zip(names, whole.to(torch.bfloat16), strict=True)), torch.bfloat16
    if weights == "int8":
        kinds = {torch.nn.Linear, torch.nn.LSTM, torch.nn.GRU}
        whole = torch.ao.quantization.quantize_dynamic(whole.eval(), kinds, torch.qint8)
        if not any(type(module).__module__.startswith("torch.ao.nn.quantized") for module in whole.modules()):
            raise NotNarrow("not quantised")
    return dict(zip(names, whole, strict=True)), torch.float32


def _recurrent(case: Recurrent, threads: int, weights: str = "float32") -> Model:
    torch, numbers = _torch(threads), recurrent.numbers(case)
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[case.kind]
    layer = kind(case.inputs, case.hidden, batch_first=True)
    layer.load_state_dict({name: torch.from_numpy(array) for name, array in numbers.weights.items()})
    layer.train(case.train)
    built, dtype = _with_weights(torch, {"layer": layer}, weights)
    layer = built["layer"]
    x = torch.from_numpy(numbers.x).to(dtype)
    states = tuple(torch.from_numpy(array[None]).to(dtype) for array in (numbers.h, numbers.c) if array is not None)
    state = states if case.kind == "lstm" else states[0]
    if numbers.dy is not None:
        return _recurrent_training(layer, x, state, torch.from_numpy(numbers.dy))

    def call() -> Any:
        with torch.inference_mode():
            return layer(x, state)

    return Model(call, _recurrent_outputs)


def _recurrent_training(layer: Any, x: Any, state: Any, dy: Any) -> Model:
    states = state if isinstance(state, tuple) else (state,)
    inputs = [x, *states, *layer.parameters()]
    for array in inputs:
        array.requires_grad_()

    def call() -> Any:
        for array in inputs:
            array.grad = None
        result = layer(x, state)
        result[0].backward(dy)
        return result

    def outputs(result: Any) -> Outputs:
        dx, *gradients = (array.grad.numpy() for array in inputs)
        n = len(states)
        return (*_recurrent_outputs(result), dx, *(part[0] for part in gradients[:n]), *gradients[n:])

    return Model(call, outputs)


def _recurrent_outputs(result: Any) -> Outputs:
    y, ends = result
    ends = ends if isinstance(ends, tuple) else (ends,)
    return (y.detach().float().numpy(), *(end[0].detach().float().numpy() for end in ends))


def _attention(case: Attention, threads: int) -> Model:
    torch = _torch(threads)
    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v, dout = map(torch.from_numpy, attention.numbers(case))

    def infer() -> Any:
        with torch.inference_mode():
            return attend(q, k, v, is_causal=case.causal)

    def train() -> Any:
        for array in (q, k, v):
            array.grad = None
        out = attend(q, k, v, is_causal=case.causal)
        out.backward(dout)
        return out

    if not case.train:
        return Model(infer, lambda out: (out.numpy(),))
    for array in (q, k, v):
        array.requires_grad_()
    return Model(train, lambda out: (out.detach().numpy(), *(array.grad.numpy() for array in (q, k, v))))


def _encoder(case: Encoder, threads: int, weights: str = "float32") -> Model:
    """Its own encoder, fused; given a mask it leaves out padding itself, which transformers' BertModel does not.

    Of that one `quantize_dynamic` leaves attention in float32, so int8 has another one.
    """
    torch, given = _torch(threads), case.bert_weights()
    functional, a = torch.nn.functional, case.architecture
    arrays = {name: torch.from_numpy(array) for name, array in pytorch_weights(a, given).items()}
    dtype = torch.bfloat16 if weights == "bfloat16" else torch.float32
    if weights == "int8":
        encode = _encoder_of_linear_maps(torch, case, arrays)
    else:
        layer = torch.nn.TransformerEncoderLayer(a.width, a.heads, a.inner, 0.0, "gelu", a.eps, batch_first=True)
        encoder = torch.nn.TransformerEncoder(layer, a.layers).eval()
        encoder.load_state_dict(arrays)
        encode = encoder.to(dtype)
    words, places, kinds, *norm = (
        torch.from_numpy(given[f"embeddings.{name}"]).to(dtype)
        for name in (
            "word_embeddings.weight",
            "position_embeddings.weight",
            "token_type_embeddings.weight",
            "LayerNorm.weight",
            "LayerNorm.bias",
        )
    )
    tokens, padding = torch.from_numpy(case.ids()), None
    if case.shortest is not None:
        padding = torch.from_numpy(~case.real)

    def call() -> Any:
        with torch.inference_mode():
            x = functional.embedding(tokens, words) + places[: case.time] + kinds[0]
            x = functional.layer_norm(x, (a.width,), *norm, a.eps)
            return encode(x, src_key_padding_mask=padding)

    return Model(call, lambda y: (y.float().numpy()[case.real],))


def _encoder_of_linear_maps(torch: Any, case: Encoder, arrays: dict[str, Any]) -> Callable[..., Any]:
    """The encoder with int8 weights, which `quantize_dynamic` gives to modules of the class Linear."""
    functional, a = torch.nn.functional, case.architecture
    names = [f"layers.{i}" for i in range(a.layers)]
    parts = ("self_attn.in_proj_", "self_attn.out_proj.", "linear1.", "linear2.")
    maps = {
        f"{name}.{part}": _linear(torch, arrays[f"{name}.{part}weight"], arrays[f"{name}.{part}bias"])
        for name in names
        for part in parts
    }
    built, _ = _with_weights(torch, maps, "int8")

    def normed(x: Any, name: str) -> Any:
        return functional.layer_norm(x, (a.width,), arrays[f"{name}.weight"], arrays[f"{name}.bias"], a.eps)

    def encode(x: Any, src_key_padding_mask: Any) -> Any:
        mask = None if src_key_padding_mask is None else ~src_key_padding_mask[:, None, None, :]
        for name in names:
            attention_in, attention_out, linear1, linear2 = (built[f"{name}.{part}"] for part in parts)
            q, k, v = attention_in(x).unflatten(2, (3, a.heads, -1)).permute(2, 0, 3, 1, 4)
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = normed(x + attention_out(out.transpose(1, 2).flatten(2)), f"{name}.norm1")
            x = normed(x + linear2(functional.gelu(linear1(x))), f"{name}.norm2")
        return x

    return encode


def _step(case: Step, threads: int) -> Model:
    torch, numbers = _torch(threads), language.numbers(case)
    functional = torch.nn.functional
    w = {name: torch.from_numpy(array).requires_grad_() for name, array in numbers.weights.items()}
    layers = [f"encoder.layers.{i}" for i in range(case.layers)]
    # Fused is the fastest it has.
    optimiser = torch.optim.AdamW(w.values(), **language.SETTINGS, fused=True)
    inputs, targets = torch.from_numpy(numbers.inputs), torch.from_numpy(numbers.targets).flatten()

    def linear(x: Any, name: str) -> Any:
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def normed(x: Any, name: str) -> Any:
        return functional.layer_norm(x, (case.width,), w[f"{name}.weight"], w[f"{name}.bias"])

    def attended(x: Any, name: str) -> Any:
        projected = functional.linear(x, w[f"{name}.in_proj_weight"], w[f"{name}.in_proj_bias"])
        q, k, v = projected.unflatten(2, (3, case.heads, -1)).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return linear(out.transpose(1, 2).flatten(2), f"{name}.out_proj")

    def call() -> tuple[float, float]:
        x = functional.embedding(inputs, w["embedding.weight"]) + w["positions.weight"]
        for layer in layers:
            x = x + attended(normed(x, f"{layer}.norm1"), f"{layer}.self_attn")
            inner = functional.gelu(linear(normed(x, f"{layer}.norm2"), f"{layer}.linear1"), approximate="tanh")
            x = x + linear(inner, f"{layer}.linear2")
        # The output is tied to the embedding, except for the begin symbol.
        logits = functional.linear(normed(x, "encoder.norm"), w["embedding.weight"][: language.SYMBOLS])
        loss = functional.cross_entropy(logits.flatten(0, 1), targets)
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(w.values(), language.MAX_NORM)
        optimiser.step()
        return loss.item(), norm.item()

    def gradients() -> Iterable[Array]:
        return (parameter.grad.numpy() for parameter in w.values())

    def parameters() -> Iterable[Array]:
        return (parameter.detach().numpy() for parameter in w.values())

    return Model(call, step_outputs(call, gradients, parameters))


def _decode(case: Decode, threads: int, weights: str = "float32") -> Model:
    """Its loop is that of `generate`, whose bookkeeping took a tenth longer in the small model."""
    torch = _torch(threads)
    import transformers

    m = case.model
    config = transformers.GPT2Config(
        vocab_size=m.symbols + 1,
        n_positions=m.context,
        n_embd=m.width,
        n_layer=m.layers,
        n_head=m.heads,
        layer_norm_epsilon=decode.EPS,
        bos_token_id=None,
        eos_token_id=None,
    )
    # Eager attention took as long or longer.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    arrays = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in _of_gpt2(m, m.weights()).items()}
    model.transformer.load_state_dict(arrays)
    # Tied, except for the row of the begin symbol, which is never chosen.
    model.lm_head.weight = torch.nn.Parameter(model.transformer.wte.weight.detach()[: m.symbols])
    if weights == "int8":
        _use_linear(torch, transformers.pytorch_utils.Conv1D, model)
    model = _with_weights(torch, {"model": model}, weights)[0]["model"]
    tokens = torch.from_numpy(case.prompts_with_begin())

    def call() -> Any:
        with torch.inference_mode():
            result = model(tokens, use_cache=True, logits_to_keep=1)
            symbols = [result.logits[:, -1].argmax(1)]
            for _ in range(1, case.new):
                result = model(symbols[-1][:, None], past_key_values=result.past_key_values, use_cache=True)
                symbols.append(result.logits[:, -1].argmax(1))
            return torch.stack(symbols, 1)

    return Model(call, lambda ids: (ids.numpy(),))


def _use_linear(torch: Any, transposed: Any, model: Any) -> None:
    """Put Linear in the place of the linear maps of GPT-2, whose class `quantize_dynamic` does not know."""
    for parent in list(model.modules()):
        for name, part in parent.named_children():
            if isinstance(part, transposed):
                setattr(parent, name, _linear(torch, part.weight.T, part.bias))


def _linear(torch: Any, weight: Any, bias: Any) -> Any:
    """A module of the class Linear."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear


# Parts of a layer, in fastseq and in GPT-2; linear maps are transposed there.
_LINEAR = {
    "self_attn.in_proj_": "attn.c_attn.",
    "self_attn.out_proj.": "attn.c_proj.",
    "linear1.": "mlp.c_fc.",
    "linear2.": "mlp.c_proj.",
}
_NORMS = {"norm1.": "ln_1.", "norm2.": "ln_2."}


def _of_gpt2(model: Transformer, weights: Weights) -> dict[str, Array]:
    """Weights by the names of GPT-2 in transformers."""
    result = {"wte.weight": weights["embedding.weight"], "wpe.weight": weights["positions.weight"]}
    for part in ("weight", "bias"):
        result[f"ln_f.{part}"] = weights[f"encoder.norm.{part}"]
        for i in range(model.layers):
            for name, theirs in (_LINEAR | _NORMS).items():
                array = weights[f"encoder.layers.{i}.{name}{part}"]
                result[f"h.{i}.{theirs}{part}"] = array.T if array.ndim == 2 else array
    return result


def _sample(case: Sample, threads: int, weights: str = "float32") -> Model:
    """The loop that one writes by hand."""
    torch = _torch(threads)
    embedding = torch.nn.Embedding(case.symbols + 1, case.hidden)
    lstm = torch.nn.LSTM(case.hidden, case.hidden, case.layers, batch_first=True)
    output = torch.nn.Linear(case.hidden, case.symbols)
    parts = torch.nn.ModuleDict({"embedding": embedding, "recurrent": lstm, "output": output}).eval()
    parts.load_state_dict({name: torch.from_numpy(array) for name, array in case.weights().items()})
    built, _ = _with_weights(torch, dict(parts.items()), weights)
    embedding, lstm, output = built["embedding"], built["recurrent"], built["output"]
    tokens = torch.from_numpy(case.prompts_with_begin())

    def loop(new: int, choose: Callable[[Any], Any]) -> Any:
        with torch.inference_mode():
            y, state = lstm(embedding(tokens))
            symbols = [choose(output(y[:, -1]))]
            for _ in range(1, new):
                y, state = lstm(embedding(symbols[-1]), state)
                symbols.append(choose(output(y[:, -1])))
            return torch.cat(symbols, 1)

    def draw(logits: Any) -> Any:
        return torch.multinomial(torch.softmax(logits, 1), 1)

    def likeliest(logits: Any) -> Any:
        return logits.argmax(1, keepdim=True)

    return Model(lambda: loop(case.new, draw), lambda drawn: (loop(case.compared, likeliest).numpy(),))


BUILDERS: dict[type[Case], Builder] = {
    Recurrent: _recurrent,
    Attention: _attention,
    Encoder: _encoder,
    Step: _step,
    Decode: _decode,
    Sample: _sample,
}
