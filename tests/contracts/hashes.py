"""Hashes of what every public class computes, to the last bit: a change of the house must not change them.

A program, and the cases of test_hashes.py. Run as a program it writes hashes.json anew, for every instruction set of
this machine that has kernels of reals of its own, which is right only where a change of results is meant::

    python tests/contracts/hashes.py

A case gives all arrays that come out of it. Compiled results of one instruction set are the same on every machine; so
whatever NumPy computes in its own way on each processor (sines, powers) stays out of the cases, or enters as data.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

from common import KINDS, child_environment, example, inputs, make, random_lengths, random_resets, threads, train  # noqa: E402

import fastseq as fs  # noqa: E402
from fastseq import _simd  # noqa: E402

FILE = Path(__file__).with_suffix(".json")
DTYPES = ("float32", "float64")
Case = Callable[[str], Any]


def cases() -> dict[str, Case]:
    """Every case by its name; each takes a dtype and returns arrays, in any nesting."""
    return dict([*recurrent(), *dense(), *attention(), *transformers(), *additive(), *losses(), *training(), *models()])


# Layers over time.


def recurrent() -> Iterator[tuple[str, Case]]:
    shapes = {
        "small": {"num_layers": 1},
        "stacked": {"num_layers": 2},
        "both ways": {"num_layers": 2, "bidirectional": True, "bias": False},
    }
    for kind in KINDS:
        for shape, settings in shapes.items():
            yield f"{kind}, {shape}", _of_layer(kind, settings)


def _of_layer(kind: str, settings: dict[str, Any]) -> Case:
    def case(dtype: str) -> Any:
        layer = make(kind, 21, 70, dtype=dtype, **settings)
        _start_uniform(layer)
        batch, time = 9, 17
        x, state, dy, dstate = example(layer, batch, time)
        lengths, resets = random_lengths(batch, time), random_resets(batch, time)
        results = [
            layer(x, state, lengths=lengths),
            layer(x, state, lengths=lengths, resets=resets, return_gates=True),
            layer(x[0]),
            train(layer, x, state, dy, dstate),
            train(layer, x, state, dy, dstate, lengths=lengths, resets=resets, truncate=5),
        ]
        if not layer.bidirectional:
            results.append([layer.step(x[:, 0], state), layer.step(x[:1, 0])])
        return results

    return case


# Layers of one step.


def dense() -> Iterator[tuple[str, Case]]:
    layers: dict[str, Callable[[str], Any]] = {
        "Linear": lambda dtype: fs.Linear(40, 75, dtype=dtype, seed=1),
        "Linear without bias": lambda dtype: fs.Linear(40, 3, bias=False, dtype=dtype, seed=1),
        "LayerNorm": lambda dtype: fs.LayerNorm(40, dtype=dtype),
        "LayerNorm of two axes": lambda dtype: fs.LayerNorm((30, 40), eps=1e-3, bias=False, dtype=dtype),
        "RMSNorm": lambda dtype: fs.RMSNorm(40, dtype=dtype),
        "ReLU": lambda dtype: fs.ReLU(dtype=dtype),
        "GELU": lambda dtype: fs.GELU(dtype=dtype),
        "GELU of tanh": lambda dtype: fs.GELU("tanh", dtype=dtype),
        "Tanh": lambda dtype: fs.Tanh(dtype=dtype),
        "Sigmoid": lambda dtype: fs.Sigmoid(dtype=dtype),
        "SiLU": lambda dtype: fs.SiLU(dtype=dtype),
        "Softmax": lambda dtype: fs.Softmax(dtype=dtype),
        "Dropout": lambda dtype: fs.Dropout(0.3, dtype=dtype),
        "LearnedPositions": lambda dtype: fs.LearnedPositions(50, 40, dtype=dtype, seed=1),
        "LastStep": lambda dtype: fs.LastStep(dtype=dtype),
        "MeanOverTime": lambda dtype: fs.MeanOverTime(dtype=dtype),
        "MaxOverTime": lambda dtype: fs.MaxOverTime(dtype=dtype),
        "Conv1d": lambda dtype: fs.Conv1d(40, 75, 3, padding=1, dtype=dtype, seed=1),
        "Conv1d with a stride": lambda dtype: fs.Conv1d(
            40, 24, 5, stride=3, dilation=2, padding="causal", groups=2, bias=False, dtype=dtype, seed=1
        ),
        "Conv1d of each channel": lambda dtype: fs.Conv1d(
            40, 40, 3, stride=2, padding="same", groups=40, dtype=dtype, seed=1
        ),
        "MaxPool1d": lambda dtype: fs.MaxPool1d(3, 2, padding=1, dtype=dtype),
        "AvgPool1d": lambda dtype: fs.AvgPool1d(4, 3, padding="same", count_include_pad=False, dtype=dtype),
        "Slice": lambda dtype: fs.Slice(3, 20, dtype=dtype),
        "Graph": _graph,
        "Sequential": lambda dtype: fs.Sequential(
            fs.Linear(40, 24, dtype=dtype, seed=1),
            fs.GRU(24, 33, dtype=dtype, seed=2),
            fs.Dropout(0.1, dtype=dtype),
            fs.LayerNorm(33, dtype=dtype),
            fs.LSTM(33, 20, bidirectional=True, dtype=dtype, seed=3),
            fs.MeanOverTime(dtype=dtype),
            fs.Linear(40, 5, dtype=dtype, seed=4),
        ),
    }
    for name, make_layer in layers.items():
        yield name, _of_dense(make_layer, _takes_lengths(name))
    yield "Embedding", _embedding
    joining: dict[str, Callable[[str], Any]] = {
        "Add": lambda dtype: fs.Add(dtype=dtype),
        "Multiply": lambda dtype: fs.Multiply(dtype=dtype),
        "Concatenate": lambda dtype: fs.Concatenate(dtype=dtype),
    }
    for name, make_layer in joining.items():
        yield name, _of_joining(make_layer)


def _graph(dtype: str) -> Any:
    return fs.Graph(
        "x",
        {
            "hidden": (fs.GRU(40, 33, dtype=dtype, seed=1), "x"),
            "gate": (fs.Linear(40, 33, dtype=dtype, seed=2), "x"),
            "gated": (fs.Multiply(dtype=dtype), "hidden", "gate", "dropped"),
            "dropped": (fs.Dropout(0.1, dtype=dtype), "hidden"),
            "mean": (fs.MeanOverTime(dtype=dtype), "gated"),
            "end": (fs.Sequential(fs.Slice(4, 24, dtype=dtype)), "mean"),
            "both": (fs.Concatenate(dtype=dtype), "gated", "end"),
            "skip": (fs.Add(dtype=dtype), "both", "wide"),
            "wide": (fs.Linear(40, 53, dtype=dtype, seed=3), "x"),
        },
        "skip",
    )


def _of_joining(make_layer: Callable[[str], Any]) -> Case:
    def case(dtype: str) -> Any:
        layer = make_layer(dtype)
        arrays = [inputs(shape, dtype, 3 + i) for i, shape in enumerate(((5, 9, 14), (5, 1, 14), (1, 9, 14)))]
        y, tape = layer.forward(*arrays)
        return [layer(*arrays), y, layer.backward(inputs(y.shape, dtype, 9), tape)]

    return case


def _takes_lengths(name: str) -> bool:
    over_time = ("LastStep", "MeanOverTime", "MaxOverTime", "MaxPool1d", "AvgPool1d", "Sequential", "Graph")
    return name in over_time or name.startswith("Conv1d")


def _of_dense(make_layer: Callable[[str], Any], with_lengths: bool) -> Case:
    def case(dtype: str) -> Any:
        layer = make_layer(dtype)
        _fill(layer)
        x = inputs((13, 30, 40), dtype)
        given: dict[str, Any] = {"lengths": np.maximum(random_lengths(13, 30), 1)} if with_lengths else {}
        y, *_, tape = layer.forward(x, **given, seed=7)
        return [layer(x, **given), _trained(layer, y, tape)]

    return case


def _embedding(dtype: str) -> Any:
    layer = fs.Embedding(19, 40, padding_idx=2, dtype=dtype, seed=1)
    ids = np.random.default_rng(3).integers(0, 19, (13, 30))
    y, tape = layer.forward(ids)
    return [layer(ids), _trained(layer, y, tape)]


def _start_uniform(layer: Any) -> None:
    """Parameters that do not depend on NumPy's products, as those of `common.fill` do."""
    rng = np.random.default_rng(12)
    layer.load_state_dict({name: rng.uniform(-0.15, 0.15, array.shape) for name, array in layer.parameters.items()})


def _fill(layer: Any) -> None:
    """Numbers of usual size in place of the ones and zeros that layers start from."""
    rng = np.random.default_rng(11)
    arrays = {name: np.asarray(array) for name, array in layer.parameters.items()}
    layer.load_state_dict(
        {name: (array + rng.uniform(-0.2, 0.2, array.shape)).astype(array.dtype) for name, array in arrays.items()}
    )


def _trained(layer: Any, y: Any, tape: Any) -> Any:
    """What `forward` and then `backward` gave, gradients of parameters among them."""
    layer.zero_grad()
    gradient = layer.backward(inputs(y.shape, y.dtype, 5), tape)
    return [y, gradient, {name: array.copy() for name, array in layer.grads.items()}]


# Attention.


def attention() -> Iterator[tuple[str, Case]]:
    rng = np.random.default_rng(6)
    masks = {"boolean": rng.random((3, 1, 21, 37)) < 0.8, "floating": rng.uniform(-2, 2, (6, 21, 37))}
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"causal": True, "scale": 0.3},
        "lengths": {"lengths": [37, 0, 20]},
        "window": {"causal": True, "window": 9},
        "boolean mask": {"mask": masks["boolean"]},
        "floating mask": {"mask": masks["floating"], "lengths": [5, 37, 30]},
    }
    for name, given in options.items():
        for heads in (6, 2):
            yield f"attention, {name}, {heads} key-value heads", _of_attention(heads, given)
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "of other widths": {"kdim": 20, "vdim": 28},
        "two key-value heads": {"num_kv_heads": 2, "bias": False},
        "window": {"window": 5},
        "dropout": {"dropout": 0.2},
    }
    for name, given in settings.items():
        yield f"MultiheadAttention, {name}", _of_multihead(given)


def _of_attention(kv_heads: int, given: dict[str, Any]) -> Case:
    def case(dtype: str) -> Any:
        q = inputs((3, 6, 21, 19), dtype)
        k, v = inputs((3, kv_heads, 37, 19), dtype, 1), inputs((3, kv_heads, 37, 19), dtype, 2)
        given_here = {name: _as(dtype, value) for name, value in given.items()}
        out, tape = fs.attention_forward(q, k, v, **given_here)
        return [
            fs.attention(q, k, v, **given_here, return_weights=True),
            fs.attention(q[:, :, :1], k[:, :, :1], v[:, :, :1]),
            out,
            fs.attention_backward(inputs(out.shape, dtype, 3), tape),
        ]

    return case


def _as(dtype: str, value: Any) -> Any:
    return value.astype(dtype) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


def _of_multihead(settings: dict[str, Any]) -> Case:
    def case(dtype: str) -> Any:
        layer = fs.MultiheadAttention(48, 6, **settings, dtype=dtype, seed=1)
        _fill(layer)
        query = inputs((3, 29, 48), dtype)
        arrays = [query]
        if "kdim" in settings:
            arrays += [inputs((3, 29, 20), dtype, 1), inputs((3, 29, 28), dtype, 2)]
        given: dict[str, Any] = {"causal": True, "lengths": [29, 3, 0]}
        y, tape = layer.forward(*arrays, **given, seed=3)
        return [layer(*arrays, **given, return_weights=True), layer(*arrays), _trained(layer, y, tape)]

    return case


def transformers() -> Iterator[tuple[str, Case]]:
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "norm first": {"norm_first": True, "activation": "gelu", "final_norm": True},
        "narrow": {"norm": "rms", "num_kv_heads": 2, "bias": False, "activation": "gelu_tanh", "window": 7},
        "dropout": {"dropout": 0.2},
    }
    for name, given in settings.items():
        given = {"dropout": 0.0, **given}
        yield f"TransformerEncoder, {name}", _of_encoder(given)
        yield f"TransformerDecoder, {name}", _of_decoder(given)
    yield "TransformerEncoderLayer", _encoder_layer
    yield "TransformerDecoderLayer", _decoder_layer
    yield "Transformer", _transformer


def _of_encoder(settings: dict[str, Any]) -> Case:
    def case(dtype: str) -> Any:
        layer = fs.TransformerEncoder(2, 48, 4, 100, **settings, dtype=dtype, seed=1)
        _fill(layer)
        x = inputs((4, 23, 48), dtype)
        given: dict[str, Any] = {"lengths": [23, 0, 1, 11], "causal": True}
        y, tape = layer.forward(x, **given, seed=3)
        first, state = layer.step(x[:, 0])
        return [layer(x), layer(x, **given), first, layer.step(x[:, 1], state)[0], _trained(layer, y, tape)]

    return case


def _of_decoder(settings: dict[str, Any]) -> Case:
    def case(dtype: str) -> Any:
        layer = fs.TransformerDecoder(2, 48, 4, 100, **settings, dtype=dtype, seed=1)
        _fill(layer)
        x, memory = inputs((4, 23, 48), dtype), inputs((4, 15, 48), dtype, 1)
        given: dict[str, Any] = {"lengths": [23, 0, 1, 11], "memory_lengths": [15, 3, 0, 7]}
        y, tape = layer.forward(x, memory, **given, seed=3)
        first, state = layer.step(x[:, 0], layer.initial_state(memory, memory_lengths=given["memory_lengths"]))
        return [layer(x, memory, **given), first, layer.step(x[:, 1], state)[0], _trained(layer, y, tape)]

    return case


def _encoder_layer(dtype: str) -> Any:
    layer = fs.TransformerEncoderLayer(48, 4, 100, dropout=0.0, dtype=dtype, seed=1)
    x = inputs((4, 23, 48), dtype)
    mask = np.random.default_rng(4).random((4, 1, 23, 23)) < 0.8
    y, tape = layer.forward(x, mask=mask)
    return [layer(x, mask=mask, return_weights=True), _trained(layer, y, tape)]


def _decoder_layer(dtype: str) -> Any:
    layer = fs.TransformerDecoderLayer(48, 4, 100, dropout=0.0, dtype=dtype, seed=1)
    x, memory = inputs((4, 23, 48), dtype), inputs((4, 15, 48), dtype, 1)
    mask = np.random.default_rng(4).uniform(-1, 1, (4, 23, 15)).astype(dtype)
    y, tape = layer.forward(x, memory, memory_mask=mask)
    return [layer(x, memory, memory_mask=mask), _trained(layer, y, tape)]


def _transformer(dtype: str) -> Any:
    layer = fs.Transformer(48, 4, 2, 1, 100, dropout=0.0, dtype=dtype, seed=1)
    source, target = inputs((4, 23, 48), dtype), inputs((4, 15, 48), dtype, 1)
    given: dict[str, Any] = {"src_lengths": [23, 1, 9, 4], "tgt_lengths": [15, 15, 0, 2]}
    y, tape = layer.forward(source, target, **given)
    first, _ = layer.step(target[:, 0], layer.initial_state(source, src_lengths=given["src_lengths"]))
    return [layer(source, target, **given), first, _trained(layer, y, tape)]


def additive() -> Iterator[tuple[str, Case]]:
    makers: dict[str, Callable[[str], Any]] = {
        "AdditiveAttention": lambda dtype: fs.AdditiveAttention(24, 30, 40, dtype=dtype, seed=1),
        "MultiplicativeAttention": lambda dtype: fs.MultiplicativeAttention(24, 30, dtype=dtype, seed=1),
    }
    for name, make_layer in makers.items():
        yield name, _of_additive(make_layer)


def _of_additive(make_layer: Callable[[str], Any]) -> Case:
    def case(dtype: str) -> Any:
        layer = make_layer(dtype)
        query, keys = inputs((5, 24), dtype), inputs((5, 33, 30), dtype, 1)
        lengths = [33, 1, 0, 20, 7]
        y, tape = layer.forward(query, keys, lengths=lengths)
        return [layer(query, keys, lengths=lengths, return_weights=True), _trained(layer, y, tape)]

    return case


# Losses and training.


def losses() -> Iterator[tuple[str, Case]]:
    lengths = [20, 0, 7, 13]
    ids = np.random.default_rng(8).integers(0, 31, (4, 20))
    options: dict[str, Callable[[str], Any]] = {
        "softmax_cross_entropy": lambda dtype: fs.losses.softmax_cross_entropy(
            inputs((4, 20, 31), dtype), ids, lengths=lengths, label_smoothing=0.1, ignore_index=3
        ),
        "binary_cross_entropy_with_logits": lambda dtype: fs.losses.binary_cross_entropy_with_logits(
            inputs((4, 20, 31), dtype), (inputs((4, 20, 31), dtype, 1) > 0).astype(dtype), lengths=lengths
        ),
        "huber": lambda dtype: fs.losses.huber(
            inputs((4, 20, 31), dtype), inputs((4, 20, 31), dtype, 1), delta=0.7, lengths=lengths
        ),
        "mean_squared_error": lambda dtype: fs.losses.mean_squared_error(
            inputs((4, 20, 31), dtype), inputs((4, 20, 31), dtype, 1), lengths=lengths
        ),
    }
    yield from options.items()


def training() -> Iterator[tuple[str, Case]]:
    optimisers: dict[str, Callable[[Any], Any]] = {
        "SGD": lambda model: fs.training.SGD(model, 0.1, weight_decay=0.01),
        "SGD with momentum": lambda model: fs.training.SGD(model, 0.1, momentum=0.9, nesterov=True),
        "RMSProp": lambda model: fs.training.RMSProp(model, 0.01, momentum=0.5),
        "Adam": lambda model: fs.training.Adam(model, 0.01),
        "AdamW": lambda model: fs.training.AdamW(model, 0.01),
    }
    for name, make_optimiser in optimisers.items():
        yield f"{name}, trained parameters", _of_optimiser(make_optimiser)


def _of_optimiser(make_optimiser: Callable[[Any], Any]) -> Case:
    def case(dtype: str) -> Any:
        model = fs.Sequential(
            fs.Embedding(11, 20, dtype=dtype, seed=1),
            fs.LSTM(20, 40, dtype=dtype, seed=2),
            fs.Dropout(0.1, dtype=dtype),
            fs.Linear(40, 11, dtype=dtype, seed=3),
        )
        ids = np.random.default_rng(9).integers(0, 11, (12, 16))
        history = fs.training.fit(
            model,
            (ids, np.roll(ids, 1, axis=1)),
            loss="cross_entropy",
            optimiser=make_optimiser(model),
            batch_size=5,
            epochs=3,
            clip_norm=1.0,
            progress=False,
            seed=4,
        )
        return [history.loss, model.state_dict()]

    return case


# Models.


def models() -> Iterator[tuple[str, Case]]:
    yield "MarkovChain", _markov
    yield "AutoRegressive", _autoregressive
    for cell in ("rnn", "lstm", "gru"):
        yield f"RecurrentForecaster, {cell}", _of_forecaster(cell)
        yield (
            f"RecurrentLM, {cell}",
            _of_language(lambda dtype, c=cell: fs.models.RecurrentLM(13, 12, 40, 2, cell=c, dtype=dtype, seed=1)),
        )
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "narrow": {"norm": "rms", "num_kv_heads": 2, "bias": False, "tied": False, "window": 6, "positions": None},
    }
    for name, given in settings.items():
        yield (
            f"TransformerLM, {name}",
            _of_language(
                lambda dtype, given=given: fs.models.TransformerLM(
                    13, 48, 4, 2, context=40, **given, dtype=dtype, seed=1
                )
            ),
        )
    yield "TransformerEncoderModel", _encoder_model
    for attention in (None, "additive", "multiplicative"):
        yield (
            f"Seq2Seq, {attention}",
            _of_pairs(lambda dtype, a=attention: fs.models.Seq2Seq(13, 11, 12, 40, attention=a, dtype=dtype, seed=1)),
        )
    yield (
        "TransformerSeq2Seq",
        _of_pairs(
            lambda dtype: fs.models.TransformerSeq2Seq(
                13, 11, 48, 4, 1, 2, max_length=40, positions="learned", dtype=dtype, seed=1
            )
        ),
    )


WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"seed": 1, "temperature": 0.8, "top_k": 5, "return_log_probs": True},
    {"seed": 2, "top_p": 0.8, "repetition_penalty": 1.3},
    {"num_beams": 4, "num_results": 2, "length_penalty": 0.7, "stop": [3], "return_log_probs": True},
)


def _markov(dtype: str) -> Any:
    ids = np.random.default_rng(5).integers(0, 7, (6, 50))
    results = []
    for smoothing in (0.5, "witten_bell", "kneser_ney"):
        model = fs.models.MarkovChain(7, 2, smoothing=smoothing)
        model.fit(ids, lengths=[50, 3, 20, 0, 50, 9])
        results.append([model(ids), model.log_prob(ids), *(model.generate(ids[:3, :5], 12, **way) for way in WAYS)])
    return results


def _series() -> Any:
    return np.random.default_rng(5).uniform(-1, 1, (3, 60)).cumsum(axis=1)


def _autoregressive(dtype: str) -> Any:
    series = _series()
    results = []
    for hidden in (None, 6):
        model = fs.models.AutoRegressive(3, hidden, dtype=dtype, seed=1)
        model.fit(series, **({} if hidden is None else {"epochs": 3, "progress": False}))
        results.append([model(series), model.forecast(series, 5), model.log_prob(series)])
    return results[1:]


def _of_forecaster(cell: str) -> Case:
    def case(dtype: str) -> Any:
        series = _series()[..., None].astype(dtype)
        model = fs.models.RecurrentForecaster(1, 24, 2, cell=cell, dtype=dtype, seed=1)
        model.fit(series, window=20, epochs=2, progress=False)
        return [model.state_dict(), model(series), model.forecast(series, 7), model.log_prob(series)]

    return case


def _of_language(make_model: Callable[[str], Any]) -> Case:
    def case(dtype: str) -> Any:
        ids = np.random.default_rng(5).integers(0, 13, 500)
        model = make_model(dtype)
        model.fit(ids, batch_size=4, steps=6, progress=False)
        rows = ids[:60].reshape(3, 20)
        logits, state = model.step(rows[:, 0])
        return [
            model.state_dict(),
            model(rows),
            model.log_prob(rows, lengths=[20, 0, 7]),
            logits,
            model.step(rows[:, 1], state)[0],
            *(model.generate(rows[:, :6], 15, lengths=[6, 1, 3], **way) for way in WAYS),
        ]

    return case


def _encoder_model(dtype: str) -> Any:
    ids = np.random.default_rng(5).integers(0, 13, (3, 20))
    results = []
    for given in {"pooling": "mean", "normalize": True}, {"pooling": None}, {"num_labels": 4, "pooling": "cls"}:
        model = fs.models.TransformerEncoderModel(
            13, 48, 4, 2, max_length=30, dropout=0.0, type_vocab_size=2, **given, dtype=dtype, seed=1
        )
        y, tape = model.forward(ids, lengths=[20, 4, 9], type_ids=ids % 2)
        results.append([model(ids, lengths=[20, 4, 9]), _trained(model, y, tape)])
    return results


def _of_pairs(make_model: Callable[[str], Any]) -> Case:
    def case(dtype: str) -> Any:
        rng = np.random.default_rng(5)
        sources = [rng.integers(0, 11, n) for n in rng.integers(2, 9, 24)]
        model = make_model(dtype)
        model.fit(sources, [source[::-1] for source in sources], batch_size=8, epochs=2, progress=False)
        source = rng.integers(0, 11, (3, 9))
        target = rng.integers(0, 11, (3, 7))
        return [
            model.state_dict(),
            model(source, target, source_lengths=[9, 2, 5], lengths=[7, 7, 1]),
            model.log_prob(source, target, lengths=[7, 2, 0]),
            *(model.generate(source, 12, lengths=[9, 2, 5], **way) for way in WAYS),
        ]

    return case


# Hashes.


def digest(result: Any) -> str:
    """A hash of all arrays in a result, in order, with their shapes and dtypes."""
    whole = hashlib.sha256()
    for array in _arrays(result):
        whole.update(f"{array.dtype.str} {array.shape} ".encode())
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()[:16]


def _arrays(result: Any) -> Iterator[Any]:
    if result is None:
        return
    if isinstance(result, (np.ndarray, float, int)):
        yield np.asarray(result)
    elif isinstance(result, Mapping):
        for name in sorted(result):
            yield from _arrays(result[name])
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from _arrays(part)
    else:  # a state
        yield from (array for array in result if array is not None)


def hashes() -> dict[str, str]:
    """Of every case and dtype, on the instruction set of this process; the same on one thread and on three."""
    found = {}
    for name, case in cases().items():
        for dtype in DTYPES:
            found[f"{name}, {dtype}"] = hash_of(case, dtype)
    return found


def hash_of(case: Case, dtype: str) -> str:
    each = set()
    for n_threads in (1, 3):
        with threads(n_threads):
            each.add(digest(case(dtype)))
    assert len(each) == 1, "results depend on the number of threads"
    return each.pop()


def main() -> None:
    if sys.argv[1:] == ["--one"]:
        print(json.dumps(hashes()))
        return
    program = [sys.executable, __file__, "--one"]
    found = {}
    for isa in _simd.available_reals:
        child = subprocess.run(
            program, env=child_environment(FASTSEQ_ISA=isa), stdout=subprocess.PIPE, text=True, check=True
        )
        found[isa] = json.loads(child.stdout)
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
