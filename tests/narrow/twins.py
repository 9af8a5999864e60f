"""What the tests of narrow weights share: layers and models of every kind, their twins, and how twins are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from common import KINDS, inputs, make, random_lengths, random_resets, random_state, threads, tolerance

import fastseq as fs
from fastseq import _simd, narrow

TYPES = ("bfloat16", "int8")
EACH_TYPE = pytest.mark.parametrize("weights", TYPES)

BATCH, TIME, SIZE = 6, 7, 12
# What one number that enters a product may differ by where both sides round it, each to another side: of the largest.
FLIP = {"bfloat16": 2.0**-7, "int8": 2.0**-5}


def spread_out(layer: Any, seed: int = 0) -> Any:
    """The layer with parameters that are distinct and count, biases and norms too."""
    rng = np.random.default_rng([seed, 31])
    for name, array in layer.parameters.items():
        amount = rng.uniform(0.05, 0.3, array.shape) * rng.choice([-1, 1], array.shape)
        layer.parameters[name] = array + amount * (1 if array.ndim == 1 else 0.3)
    return layer


class Case(NamedTuple):
    """A layer or a model, and what it is asked; every array that it gives has a batch in front."""

    make: Callable[[Any], Any]
    run: Callable[[Any], list[Any]]

    def original(self) -> Any:
        return spread_out(self.make(fs))

    def twins(self, weights: str, keep: Any = ()) -> tuple[Any, Any]:
        """The twin, and that over NumPy."""
        made, other = self.original(), self.make(fs.reference)
        other.load_state_dict(made.state_dict())
        return made.with_weights(weights, keep=keep), other.with_weights(weights, keep=keep)


def lengths_of(most: int = TIME, least: int = 0, batch: int = BATCH) -> Any:
    return np.maximum(random_lengths(batch, most), least)


def ids_of(vocab: int, time: int = TIME, seed: int = 0, batch: int = BATCH) -> Any:
    return np.random.default_rng([seed, 32]).integers(0, vocab, (batch, time))


def _run_recurrent(layer: Any) -> list[Any]:
    x, state = inputs((BATCH, TIME, layer.input_size)), random_state(layer, BATCH)
    lengths, resets = random_lengths(BATCH, TIME), random_resets(BATCH, TIME)
    given = [*layer(x, state, lengths=lengths), layer(x, state, resets=resets)[0], *layer(x)]
    return given if layer.bidirectional else [*given, *layer.step(x[:, 0], state)]


def _recurrent() -> Iterator[tuple[str, Case]]:
    shapes: dict[str, dict[str, Any]] = {
        "one": {},
        "stacked": {"num_layers": 2, "bias": False},
        "both ways": {"num_layers": 2, "bidirectional": True},
    }
    for kind in KINDS:
        for shape, settings in shapes.items():
            yield (
                f"{kind}, {shape}",
                Case(lambda module, k=kind, s=settings: make(k, 11, 21, module=module, **s), _run_recurrent),
            )


def _run_attention(layer: Any) -> list[Any]:
    query, key, value = (inputs((BATCH, TIME, n), seed=i) for i, n in enumerate((SIZE, layer.kdim, layer.vdim)))
    if layer.kdim != SIZE or layer.vdim != SIZE:
        return [layer(query, key, value, lengths=lengths_of(least=1))]
    crossed = [] if layer.rotary is not None or layer.window is not None else [layer(query, key, value)]
    return [layer(query, lengths=lengths_of(least=1)), layer(query, causal=True), *crossed]


def _run_alignment(layer: Any) -> list[Any]:
    query, keys = inputs((BATCH, 9)), inputs((BATCH, TIME, SIZE), seed=1)
    return [*layer(query, keys, lengths=lengths_of(least=1), return_weights=True)]


def _run_encoder(layer: Any) -> list[Any]:
    x = inputs((BATCH, TIME, SIZE))
    state, steps = layer.initial_state(BATCH), []
    for t in range(3):
        y, state = layer.step(x[:, t], state)
        steps.append(y)
    return [layer(x, lengths=lengths_of()), layer(x, causal=True), *steps]


def _run_decoder(layer: Any) -> list[Any]:
    x, memory, lengths = inputs((BATCH, TIME, SIZE)), inputs((BATCH, 5, SIZE), seed=1), lengths_of(5, 1)
    state = layer.initial_state(memory, memory_lengths=lengths)
    first, state = layer.step(x[:, 0], state)
    return [
        layer(x, memory, causal=True, lengths=lengths_of(), memory_lengths=lengths),
        first,
        layer.step(x[:, 1], state)[0],
    ]


def _run_transformer(layer: Any) -> list[Any]:
    src, tgt = inputs((BATCH, 5, SIZE)), inputs((BATCH, TIME, SIZE), seed=1)
    return [layer(src, tgt, src_lengths=lengths_of(5, 1), tgt_lengths=lengths_of())]


def _layers() -> Iterator[tuple[str, Case]]:
    yield from _recurrent()
    x = inputs((BATCH, TIME, SIZE))
    yield "Linear", Case(lambda m: m.Linear(SIZE, 75, seed=1), lambda layer: [layer(x)])
    yield "Linear without bias", Case(lambda m: m.Linear(SIZE, 5, bias=False, seed=1), lambda layer: [layer(x)])
    yield (
        "Conv1d",
        Case(
            lambda m: m.Conv1d(SIZE, 75, 3, padding="causal", seed=1),
            lambda layer: [layer(x), layer(x, lengths=lengths_of()), layer.step(x[:, 0])[0]],
        ),
    )
    yield (
        "Conv1d in groups",
        Case(
            lambda m: m.Conv1d(SIZE, 8, 4, stride=2, dilation=2, padding=3, groups=2, seed=1),
            lambda layer: [layer(x), layer(x, lengths=lengths_of())],
        ),
    )
    yield "Embedding", Case(lambda m: m.Embedding(13, SIZE, seed=1), lambda layer: [layer(ids_of(13))])
    for name, given in {
        "plain": {},
        "other keys": {"kdim": 5, "vdim": 9, "bias": False},
        "shared heads": {"num_kv_heads": 1, "rotary": 1000.0, "window": 3},
    }.items():
        yield (
            f"MultiheadAttention, {name}",
            Case(lambda m, g=given: m.MultiheadAttention(SIZE, 2, seed=1, **g), _run_attention),
        )
    yield "AdditiveAttention", Case(lambda m: m.AdditiveAttention(9, SIZE, 21, seed=1), _run_alignment)
    yield "MultiplicativeAttention", Case(lambda m: m.MultiplicativeAttention(9, SIZE, seed=1), _run_alignment)
    settings: dict[str, dict[str, Any]] = {
        "after": {"activation": "relu"},
        "before": {"norm_first": True, "activation": "gelu", "bias": False},
        "swiglu": {"norm_first": True, "activation": "swiglu", "norm": "rms", "num_kv_heads": 1, "rotary": 100.0},
        "window": {"activation": "gelu_tanh", "window": 3},
    }
    for name, given in settings.items():
        given = {"dim_feedforward": 37, "dropout": 0.0, "seed": 2, **given}
        encoder = Case(lambda m, g=given: m.TransformerEncoderLayer(SIZE, 2, **g), _run_encoder)
        yield f"TransformerEncoderLayer, {name}", encoder
        yield (
            f"TransformerDecoderLayer, {name}",
            Case(lambda m, g=given: m.TransformerDecoderLayer(SIZE, 2, **g), _run_decoder),
        )
    given = {"dim_feedforward": 37, "dropout": 0.0, "seed": 2}
    encoder = Case(lambda m: m.TransformerEncoder(2, SIZE, 2, final_norm=True, **given), _run_encoder)
    yield "TransformerEncoder", encoder
    yield "TransformerDecoder", Case(lambda m: m.TransformerDecoder(2, SIZE, 2, **given), _run_decoder)
    yield "Transformer", Case(lambda m: m.Transformer(SIZE, 2, 1, 2, **given), _run_transformer)
    yield "Sequential", Case(_sequential, _run_sequential)
    yield "Graph", Case(_graph, _run_sequential)


def _sequential(module: Any) -> Any:
    return module.Sequential(
        module.Embedding(13, SIZE, seed=1),
        module.GRU(SIZE, 21, seed=2),
        module.LayerNorm(21),
        module.Sequential(module.LSTM(21, 20, seed=3), module.Tanh()),
        module.Linear(20, 5, seed=4),
    )


def _graph(module: Any) -> Any:
    return module.Graph(
        "ids",
        {
            "embedded": (module.Embedding(13, SIZE, seed=1), "ids"),
            "hidden": (module.GRU(SIZE, 21, seed=2), "embedded"),
            "gate": (module.Linear(SIZE, 21, seed=3), "embedded"),
            "gated": (module.Multiply(), "hidden", "gate"),
            "inner": (module.Sequential(module.LSTM(21, 20, seed=4), module.Tanh()), "gated"),
            "both": (module.Concatenate(), "inner", "hidden"),
            "y": (module.Linear(41, 5, seed=5), "both"),
        },
        "y",
    )


def _run_sequential(layer: Any) -> list[Any]:
    ids = ids_of(13)
    first, state = layer.step(ids[:, 0])
    return [layer(ids, lengths=lengths_of()), first, layer.step(ids[:, 1], state)[0]]


# Every kind of Transformer language model.
LMS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "untied": {"tied": False, "bias": False, "norm_first": False, "positions": "sinusoidal", "activation": "relu"},
    "llama": {"norm": "rms", "positions": "rotary", "num_kv_heads": 1, "activation": "swiglu", "bias": False},
    "window": {"positions": None, "window": 3, "activation": "gelu"},
}


def _run_language(model: Any) -> list[Any]:
    ids = ids_of(13)
    logits, state = model.step(ids[:, 0])
    more = [model.step(ids[:, 1], state)[0]] if state is not None else []
    return [model(ids), model.log_prob(ids, lengths=lengths_of()), logits, *more]


def _run_pairs(model: Any) -> list[Any]:
    source, target, lengths = ids_of(13), ids_of(11, 5, 1), lengths_of(least=1)
    given = {"source_lengths": lengths, "lengths": lengths_of(5)}
    logits, state = model.step(target[:, 0], model.initial_state(source, lengths=lengths))
    return [
        model(source, target, **given),
        model.log_prob(source, target, **given),
        logits,
        model.step(target[:, 1], state)[0],
    ]


def _run_classifier(model: Any) -> list[Any]:
    ids = ids_of(13)
    types = {"type_ids": ids % 2} if model.type_vocab_size else {}
    return [model(ids, lengths=lengths_of(least=1), **types)]


def _run_forecaster(model: Any) -> list[Any]:
    series = inputs((BATCH, TIME, 2)).astype("float64")
    return [model(series.astype("float32"))[0], model.forecast(series, 4)]


def _forecaster(module: Any, cell: str) -> Any:
    model = module.models.RecurrentForecaster(2, 21, 2, cell=cell, seed=1)
    model.load_state_dict(fs.models.RecurrentForecaster(2, 21, 2, cell=cell, seed=1).state_dict())
    rng = np.random.default_rng(3)
    model.fit(rng.normal(2, 3, (40, 2)), window=10, epochs=1, batch_size=4, progress=False, seed=1)
    return model


def _models() -> Iterator[tuple[str, Case]]:
    for cell in ("rnn", "lstm", "gru"):
        yield (
            f"RecurrentLM, {cell}",
            Case(lambda m, c=cell: m.models.RecurrentLM(13, SIZE, 21, 2, cell=c, seed=1), _run_language),
        )
        yield f"RecurrentForecaster, {cell}", Case(lambda m, c=cell: _forecaster(m, c), _run_forecaster)
    for name, given in LMS.items():
        yield (
            f"TransformerLM, {name}",
            Case(lambda m, g=given: m.models.TransformerLM(13, SIZE, 2, 2, context=20, seed=1, **g), _run_language),
        )
    for attention in (None, "additive", "multiplicative"):
        for cell in ("rnn", "lstm", "gru"):
            given = {"attention": attention, "cell": cell, "bidirectional": cell != "rnn"}
            layers = 2 if cell == "gru" else 1
            yield (
                f"Seq2Seq, {attention}, {cell}",
                Case(lambda m, g=given, n=layers: m.models.Seq2Seq(13, 11, SIZE, 21, n, seed=1, **g), _run_pairs),
            )
    for name, given in {"tied": {}, "untied": {"tied": False, "positions": "learned", "bias": False}}.items():
        yield (
            f"TransformerSeq2Seq, {name}",
            Case(
                lambda m, g=given: m.models.TransformerSeq2Seq(13, 11, SIZE, 2, 1, 2, max_length=20, seed=1, **g),
                _run_pairs,
            ),
        )
    for name, given in {
        "mean": {"type_vocab_size": 2, "normalize": True},
        "tokens": {"pooling": None, "norm_first": True, "activation": "relu"},
        "pooler": {"pooling": "cls", "pooler": True},
        "labels": {"num_labels": 4},
    }.items():
        given = {"dropout": 0.0, "dim_feedforward": 37, "max_length": 9, "seed": 1, **given}
        yield (
            f"TransformerEncoderModel, {name}",
            Case(lambda m, g=given: m.models.TransformerEncoderModel(13, SIZE, 2, 2, **g), _run_classifier),
        )


LAYERS, MODELS = dict(_layers()), dict(_models())
ALL = {**LAYERS, **MODELS}
GENERATE = tuple(name for name in MODELS if "LM" in name or "Seq2Seq" in name)
WITHOUT_PRODUCTS = ("Embedding",)  # the table alone is narrow


def arrays_in(result: Any) -> Iterator[Any]:
    """All arrays of a result, states included."""
    if isinstance(result, np.ndarray):
        yield result
    elif hasattr(result, "_fields"):
        yield from (a for a in result if isinstance(a, np.ndarray))
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from arrays_in(part)
    elif result is not None and not isinstance(result, fs.AttentionState):
        raise TypeError(type(result))


def assert_twins_agree(actual: Any, expected: Any, weights: str, relative: float, what: str = "") -> None:
    """Every row within `relative`, except where a number lay between two narrow ones and each side took another.

    That happens to one row in many thousands: one row of an array may be off, by what such a number can do.
    """
    pairs = list(zip(arrays_in(actual), arrays_in(expected), strict=True))
    assert pairs
    for place, (a, e) in enumerate(pairs):
        assert a.shape == e.shape and a.dtype == e.dtype, f"{what}[{place}]: {a.dtype}{a.shape}, not {e.dtype}{e.shape}"
        e = e.astype(np.float64)
        finite = np.isfinite(e)
        np.testing.assert_array_equal(a[~finite], e[~finite], err_msg=f"{what}[{place}]")
        error = np.abs(np.where(finite, a - np.where(finite, e, 0), 0)).reshape(len(e), -1).max(1, initial=0)
        error /= max(np.abs(e[finite]).max(initial=0), 1e-30)
        assert (error > relative).sum() <= 1, f"{what}[{place}]: rows off by {error}, allowed {relative}"
        assert error.max(initial=0) <= FLIP[weights], f"{what}[{place}]: off by {error.max()}"


# What a process that is forced to another instruction set computes.


def products(rows: int = 23) -> Iterator[tuple[Any, Any, Any]]:
    """Linear layers of awkward sizes with int8 weights, inputs, and the reference."""
    for inputs_size, outputs in ((1, 1), (3, 5), (17, 70), (64, 33), (129, 200), (250, 3)):
        layer = fs.Linear(inputs_size, outputs, seed=inputs_size)
        rng = np.random.default_rng([inputs_size, outputs])
        layer.parameters["weight"] = rng.normal(size=(outputs, inputs_size)) * rng.lognormal(0, 2, (outputs, 1))
        layer.parameters["bias"] = rng.normal(size=outputs)
        x = (rng.normal(size=(rows, inputs_size)) * rng.lognormal(0, 3, (rows, 1))).astype("float32")
        twin = layer.with_weights("int8")
        yield twin, x, x @ twin._arrays["weight"].T + layer.parameters["bias"]


def digest(arrays: Any) -> str:
    whole = hashlib.sha256()
    for array in arrays_in(arrays):
        whole.update(np.ascontiguousarray(array + 0).tobytes())
    return whole.hexdigest()


def digests() -> dict[str, Any]:
    """Of products, of layers and of models, for each type."""
    found: dict[str, Any] = {"reals": _simd.chosen_reals, "bfloat16 by": _simd.narrow_instructions["bfloat16"]}
    found["products equal the reference"] = all(np.array_equal(twin(x), y) for twin, x, y in products())
    found["products"] = digest([twin(x) for twin, x, _ in products()])
    some = ["lstm, both ways", "gru_before, one", "lstm_proj, stacked", "MultiheadAttention, other keys"]
    some += ["TransformerDecoderLayer, swiglu", "RecurrentLM, gru", "TransformerLM, gpt2", "Seq2Seq, additive, lstm"]
    for weights in TYPES:
        with threads(1):
            results = []
            for name in some:
                twin = ALL[name].original().with_weights(weights)
                results.append(ALL[name].run(twin))
            found[weights] = digest(results)
    return found


def print_digests() -> None:
    print(json.dumps(digests()))


def relative_for(time: int = TIME) -> float:
    """The numeric contract for what the cases above sum."""
    return tolerance("float32", 40, time)


def narrow_bytes(layer: Any) -> dict[str, int]:
    """Bytes of the narrow arrays of a twin, by name."""
    return {name: a.nbytes for name, a in layer._arrays.items() if isinstance(a, narrow.NarrowArray)}
