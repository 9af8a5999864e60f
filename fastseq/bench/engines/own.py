"""fastseq and its NumPy reference: the same classes and calls, so the same code builds both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import fastseq
from fastseq.bench.cases import Case, Outputs, attention, language, recurrent
from fastseq.bench.cases.attention import Attention
from fastseq.bench.cases.decode import Decode, Transformer
from fastseq.bench.cases.encoder import Encoder
from fastseq.bench.cases.generate import Beams, Sample
from fastseq.bench.cases.language import Step
from fastseq.bench.cases.recurrent import Recurrent
from fastseq.bench.engines import Builder, Model, step_outputs
from fastseq.checks import Array


def builders(engine: str) -> dict[type[Case], Builder]:
    """What builds the cases in fastseq, in the reference, or in `exact`, the reference in float64."""
    own: dict[type[Case], Callable[..., Model]] = {
        Recurrent: _recurrent,
        Attention: _attention,
        Encoder: _encoder,
        Step: _step,
        Decode: _decode,
        Sample: _sample,
        Beams: _beams,
    }
    return {case: partial(build, engine) for case, build in own.items()}


def greedy() -> dict[type[Case], Builder]:
    """Builds beam search as greedy decoding of as many rows, in fastseq."""
    return {Beams: partial(_decode, "fastseq")}


def _package(engine: str, threads: int) -> tuple[Any, str]:
    """The package that has the layers, and their dtype."""
    if engine == "fastseq":
        fastseq.set_num_threads(threads)
        return fastseq, "float32"
    # NumPy takes its threads from the environment.
    return fastseq.reference, "float64" if engine == "exact" else "float32"


def _with_weights(layer: Any, weights: str) -> Any:
    """A layer or model, or its twin with weights of a narrow type."""
    return layer if weights == "float32" else layer.with_weights(weights)


def _recurrent(engine: str, case: Recurrent, threads: int, weights: str = "float32") -> Model:
    module, dtype = _package(engine, threads)
    numbers = recurrent.numbers(case)
    layer = getattr(module, case.kind.upper())(case.inputs, case.hidden, dtype=dtype)
    layer.load_state_dict(numbers.weights)
    layer = _with_weights(layer, weights)
    x = numbers.x.astype(dtype)
    states = [array[:, None].astype(dtype) for array in (numbers.h, numbers.c) if array is not None]
    state = module.LSTMState(*states) if case.kind == "lstm" else module.State(*states)
    if numbers.dy is not None:
        return _recurrent_training(layer, x, state, numbers.dy.astype(dtype))
    if not case.step:
        return Model(lambda: layer(x, state), lambda result: (result[0], *(part[:, 0] for part in result[1])))
    x_t, out = x[:, 0], np.empty((case.batch, case.hidden), dtype)
    return Model(
        lambda: layer.step(x_t, state, out=out),
        lambda result: (result[0][:, None], *(part[:, 0] for part in result[1])),
    )


def _recurrent_training(layer: Any, x: Array, state: Any, dy: Array) -> Model:
    def call() -> Any:
        layer.zero_grad()
        y, end, tape = layer.forward(x, state)
        return y, end, layer.backward(dy, tape)

    def outputs(result: Any) -> Outputs:
        y, end, (dx, start) = result
        return (y, *(part[:, 0] for part in end), dx, *(part[:, 0] for part in start), *layer.grads.values())

    return Model(call, outputs)


def _attention(engine: str, case: Attention, threads: int) -> Model:
    module, dtype = _package(engine, threads)
    q, k, v, dout = attention.numbers(case).astype(dtype)
    if not case.train:
        return Model(lambda: module.attention(q, k, v, causal=case.causal), lambda out: (out,))

    def call() -> Outputs:
        out, tape = module.attention_forward(q, k, v, causal=case.causal)
        return (out, *module.attention_backward(dout, tape))

    return Model(call, lambda result: result)


def _encoder(engine: str, case: Encoder, threads: int, weights: str = "float32") -> Model:
    model = _with_weights(encoder_model(*_package(engine, threads), case), weights)
    ids, lengths = case.ids(), None if case.shortest is None else case.lengths
    return Model(lambda: model(ids, lengths=lengths), lambda y: (y[case.real],))


def encoder_model(module: Any, dtype: str, case: Encoder) -> Any:
    """The encoder of a case, in `fastseq` or `fastseq.reference`."""
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
    model.load_state_dict(bert_state_dict(case.bert_weights()))
    return model


def _step(engine: str, case: Step, threads: int) -> Model:
    from fastseq import training

    module, dtype = _package(engine, threads)
    numbers = language.numbers(case)
    model = module.models.TransformerLM(
        language.SYMBOLS, case.width, case.heads, case.layers, context=case.time, dropout=0.0, dtype=dtype
    )
    model.load_state_dict(numbers.weights)
    optimiser = training.AdamW(model, **language.SETTINGS)
    batch = training.Batch(numbers.inputs, numbers.targets)

    def call() -> tuple[float, float]:
        loss, _, tape, *_ = model.training_forward(batch)
        model.zero_grad()
        model.training_backward(tape)
        norm = training.clip_grad_norm(model, language.MAX_NORM)
        optimiser.step()
        return loss, norm

    def named(arrays: Any) -> list[Array]:
        return [arrays[name] for name in numbers.weights]

    return Model(call, step_outputs(call, lambda: named(model.grads), lambda: named(model.parameters)))


def _decode(engine: str, case: Decode, threads: int, weights: str = "float32") -> Model:
    prompts, model = case.prompts(), _with_weights(language_model(case.model, *_package(engine, threads)), weights)

    def outputs(ids: Array) -> Outputs:
        return (ids, margins(model, prompts, ids)) if engine == "exact" else (ids,)

    call = partial(model.generate, prompts, case.new, temperature=0)
    return Model(call, outputs, partial(margins, model, prompts))


def _sample(engine: str, case: Sample, threads: int, weights: str = "float32") -> Model:
    module, dtype = _package(engine, threads)
    prompts = case.prompts()
    model = module.models.RecurrentLM(case.symbols, case.hidden, case.hidden, case.layers, dtype=dtype)
    model.load_state_dict(case.weights())
    model = _with_weights(model, weights)

    def outputs(drawn: Array) -> Outputs:
        ids = model.generate(prompts, case.compared, temperature=0)
        return (ids, margins(model, prompts, ids)) if engine == "exact" else (ids,)

    return Model(lambda: model.generate(prompts, case.new, seed=0), outputs, partial(margins, model, prompts))


def _beams(engine: str, case: Beams, threads: int, weights: str = "float32") -> Model:
    prompts, model = case.prompts(), _with_weights(language_model(case.model, *_package(engine, threads)), weights)
    greedy = _decode(engine, case, threads)

    def outputs(result: Any) -> Outputs:
        ids, log_probs = result
        more = greedy.outputs(greedy.call()) if engine == "exact" else ()
        return (ids, log_probs.sum(axis=1), *more)

    settings: dict[str, Any] = {"num_beams": case.batch, "return_log_probs": True}
    return Model(lambda: model.generate(prompts[:1], case.new, **settings), outputs)


def language_model(model: Transformer, module: Any, dtype: str) -> Any:
    """The Transformer language model of a case, in `fastseq` or `fastseq.reference`."""
    built = module.models.TransformerLM(
        model.symbols, model.width, model.heads, model.layers, context=model.context, dropout=0.0, dtype=dtype
    )
    built.load_state_dict(model.weights())
    return built


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
