"""What a twin gives for a row depends on that row alone: not on batch, padding, threads, chunks, steps or caches."""

from __future__ import annotations

import fnmatch
from typing import Any

import numpy as np
import pytest
from common import KINDS, assert_same_bits, inputs, make, random_state, threads
from protocol import log_softmax
from twins import ALL, EACH_TYPE, GENERATE, SIZE, arrays_in, ids_of, spread_out

import fastseq as fs

pytestmark = pytest.mark.every_narrow_isa


def twin_of(name: str, weights: str, keep: Any = ()) -> Any:
    return ALL[name].original().with_weights(weights, keep=keep)


# The complaint about int8 elsewhere: a quantized model gives one sentence another embedding as soon as it stands in a
# batch with others. There, one scale is found for all of a batch, so that a row with large numbers takes the precision
# of its neighbours.


def neighbours(x: Any) -> Any:
    """A batch of the row and one that is 10,000 times as large."""
    return np.stack([x, x[::-1] * np.float32(1e4)])


BESIDE: dict[str, Any] = {
    "Linear": lambda: fs.Linear(SIZE, 70, seed=1),
    "Conv1d": lambda: fs.Conv1d(SIZE, 70, 3, padding=1, seed=1),
    "LSTM": lambda: make("lstm", SIZE, 21, num_layers=2),
    "LSTM both ways": lambda: make("lstm_proj", SIZE, 21, bidirectional=True),
    "GRU": lambda: make("gru_after", SIZE, 21),
    "GRU that resets before": lambda: make("gru_before", SIZE, 21),
    "RNN": lambda: make("rnn_relu", SIZE, 21),
    "MultiheadAttention": lambda: fs.MultiheadAttention(SIZE, 2, seed=1),
    "TransformerEncoder": lambda: fs.TransformerEncoder(2, SIZE, 2, 37, dropout=0.0, norm_first=True, seed=1),
    "Sequential": lambda: fs.Sequential(fs.Linear(SIZE, 20, seed=1), fs.GRU(20, 21, seed=2), fs.MeanOverTime()),
}


def first_of(result: Any) -> list[Any]:
    """The first row of every array of a result."""
    return [a[:1] for a in arrays_in(result)]


@EACH_TYPE
@pytest.mark.parametrize("name", BESIDE)
def test_a_row_alone_and_beside_a_huge_one(name: str, weights: str) -> None:
    twin = BESIDE[name]().with_weights(weights)
    x = inputs((9, SIZE))
    alone = first_of(twin(x[None]))
    assert_same_bits(first_of(twin(neighbours(x))), alone)
    with threads(3):
        assert_same_bits(first_of(twin(np.concatenate([neighbours(x)] * 20))), alone)


@EACH_TYPE
def test_a_memory_beside_a_huge_one(weights: str) -> None:
    x, memory = inputs((5, SIZE)), inputs((4, SIZE), seed=1)
    twin = fs.TransformerDecoder(2, SIZE, 2, 37, dropout=0.0, seed=1).with_weights(weights)
    assert_same_bits(twin(neighbours(x), neighbours(memory))[:1], twin(x[None], memory[None]))
    for layer in (fs.AdditiveAttention(SIZE, SIZE, 21, seed=1), fs.MultiplicativeAttention(SIZE, SIZE, seed=1)):
        twin = layer.with_weights(weights)
        alone = twin(x[:1], memory[None])
        assert_same_bits(twin(neighbours(x)[:, 0] * np.float32([[1], [7]]), neighbours(memory))[:1][0], alone[0])


@EACH_TYPE
@pytest.mark.parametrize("name", ["TransformerLM, gpt2", "TransformerEncoderModel, mean", "RecurrentLM, lstm"])
def test_a_sentence_beside_one_of_huge_vectors(name: str, weights: str) -> None:
    """The vectors of some symbols are 10,000 times as large as those of others."""
    model = ALL[name].original()
    embedding = next(key for key in model.parameters if key.endswith("embedding.weight") or "word" in key)
    table = np.array(model.parameters[embedding])
    table[6:] *= 1e4
    model.parameters[embedding] = table
    twin = model.with_weights(weights)
    small, large = ids_of(6, batch=1), ids_of(7, batch=1) % 6 + 6
    alone, beside = twin(small), twin(np.concatenate([small, large]))
    assert_same_bits(first_of(beside), first_of(alone))


@EACH_TYPE
@pytest.mark.parametrize("kind", KINDS)
def test_batch_padding_threads_chunks_and_steps(kind: str, weights: str) -> None:
    """Recurrent layers."""
    layer = make(kind, 19, 70, num_layers=2).with_weights(weights)
    batch, time = 17, 11
    x, state = inputs((batch, time, 19)), random_state(layer, batch)
    y, end = layer(x, state)
    for count in (2, 3):
        with threads(count):
            assert_same_bits(layer(x, state), (y, end))
            assert_same_bits(layer(x[:1], state[:1]), (y[:1], end[:1]))
    for rows in ([4], [16, 2, 9], list(range(7))):
        assert_same_bits(layer(x[rows], state[rows]), (y[rows], end[rows]))
    lengths = np.random.default_rng(0).integers(0, time + 1, batch)
    padded = np.where((np.arange(time) >= lengths[:, None])[..., None], np.float32(np.nan), x)
    cut, cut_end = layer(padded, state, lengths=lengths)
    for row, length in enumerate(lengths):
        assert_same_bits(cut[row, :length], y[row, :length])
        assert not cut[row, length:].any()
        assert_same_bits(layer(x[row : row + 1, :length], state[row : row + 1])[1], cut_end[row : row + 1])
    now, parts = state, []
    for first, last in ((0, 4), (4, 5), (5, 11)):
        part, now = layer(x[:, first:last], now)
        parts.append(part)
    assert_same_bits((np.concatenate(parts, 1), now), (y, end))
    now = state
    for t in range(time):
        part, now = layer.step(x[:, t], now)
        assert_same_bits(part, y[:, t])
    assert_same_bits(now, end)


@EACH_TYPE
def test_both_directions_of_many_and_few_rows(weights: str) -> None:
    layer = make("gru_before", 130, 33, bidirectional=True, num_layers=2).with_weights(weights)
    x = inputs((140, 9, 130))
    lengths = np.random.default_rng(1).integers(1, 10, 140)
    y = layer(x, lengths=lengths)[0]
    for count in (1, 3):
        with threads(count):
            for rows in ([139], [0, 77, 3]):
                assert_same_bits(layer(x[rows], lengths=lengths[rows])[0], y[rows])


@EACH_TYPE
@pytest.mark.parametrize(
    "name", ["TransformerEncoder", "TransformerEncoderLayer, swiglu", "TransformerEncoderLayer, window"]
)
def test_encoders_in_a_batch_padded_on_threads_and_in_steps(name: str, weights: str) -> None:
    layer = twin_of(name, weights)
    x = inputs((5, 12, SIZE))
    y = layer(x, causal=True)
    lengths = np.array([12, 0, 5, 1, 9])
    padded = np.where((np.arange(12) >= lengths[:, None])[..., None], np.float32(np.inf), x)
    for count in (1, 2, 3):
        with threads(count):
            cut = layer(padded, causal=True, lengths=lengths)
            for row, length in enumerate(lengths):
                assert_same_bits(cut[row, :length], y[row, :length])
            assert_same_bits(layer(x[3:4], causal=True), y[3:4])
    state = layer.initial_state(5)
    for t in range(12):
        step, state = layer.step(x[:, t], state)
        assert_same_bits(step, y[:, t])


@EACH_TYPE
@pytest.mark.parametrize(
    "name", ["TransformerDecoder", "TransformerDecoderLayer, swiglu", "TransformerDecoderLayer, before"]
)
def test_decoders_in_steps(name: str, weights: str) -> None:
    layer = twin_of(name, weights)
    x, memory, lengths = inputs((4, 6, SIZE)), inputs((4, 5, SIZE), seed=1), np.array([5, 2, 1, 4])
    y = layer(x, memory, causal=True, memory_lengths=lengths)
    for row, length in enumerate(lengths):
        alone = layer(x[row : row + 1], memory[row : row + 1, :length], causal=True)
        assert_same_bits(alone, y[row : row + 1])
    state = layer.initial_state(memory, memory_lengths=lengths)
    for t in range(6):
        step, state = layer.step(x[:, t], state)
        assert_same_bits(step, y[:, t])


def lively(name: str) -> Any:
    """A model of which generated symbols depend on what was before them."""
    model = ALL[name].original()
    for key, array in model.parameters.items():
        if array.ndim == 2:
            model.parameters[key] = 2.5 * array
    if name == "TransformerSeq2Seq, tied":  # the end, the last vector, would come at once
        table = np.array(model.parameters["target_embedding.weight"])
        table[-1] *= -1
        model.parameters["target_embedding.weight"] = table
    return model


def begun(model: Any, prompt: Any) -> Any:
    """The logits of the first new symbol of a batch of prompts, and the state there, by steps of the model."""
    state = None
    if hasattr(model, "target_vocab_size"):
        return model.step(np.full(len(prompt), model.begin), model.initial_state(prompt))
    for symbols in prompt.T:
        logits, state = model.step(symbols, state)
    return logits, state


def scored(model: Any, prompt: Any, symbols: Any, count: int) -> Any:
    """The log probabilities that steps give the symbols of a row, and the end where `count` is one more."""
    logits, state = begun(model, prompt[None])
    found = []
    for symbol in [*symbols, logits.shape[1] - 1][:count]:
        found.append(log_softmax(logits)[0, symbol])
        if len(found) < count:
            logits, state = model.step(np.array([symbol]), state)
    return np.array(found)


@EACH_TYPE
@pytest.mark.parametrize("name", GENERATE)
def test_generated_symbols_are_those_of_steps(name: str, weights: str) -> None:
    """The compiled search, with its caches, against steps of the model; logits of steps against a whole call."""
    model = lively(name).with_weights(weights)
    prompt = ids_of(11, 5, batch=4)
    whole = model.generate(prompt, 9, temperature=0)
    for row, symbols in enumerate(whole):
        logits, state = begun(model, prompt[row : row + 1])
        steps = [logits]
        for symbol in symbols:
            assert symbol == logits.argmax()
            logits, state = model.step(np.array([symbol]), state)
            steps.append(logits)
        if len(symbols) < 9:
            assert logits.argmax() == logits.shape[1] - 1  # the end
        together = np.concatenate(steps)
        if hasattr(model, "target_vocab_size"):
            assert_same_bits(together, model(prompt[row], symbols))
        else:
            every = next(arrays_in(model(np.concatenate([prompt[row], symbols]))))
            assert_same_bits(together, every[-len(together) :])
        assert_same_bits(model.generate(prompt[row], 9, temperature=0), symbols)
    assert len({symbols.tobytes() for symbols in whole}) > 1
    with threads(3):
        assert_same_bits(list(model.generate(prompt, 9, temperature=0)), list(whole))


@EACH_TYPE
@pytest.mark.parametrize("name", GENERATE)
def test_beams_and_samples(name: str, weights: str) -> None:
    model = lively(name).with_weights(weights)
    prompt = ids_of(11, 5, batch=3)
    for way in ({"num_beams": 4, "num_results": 2}, {"seed": 3, "top_k": 7}):
        given = {**way, "return_log_probs": True}
        symbols, log_probs = model.generate(prompt, 6, **given)
        for row in range(3):
            results = (
                [(symbols[row], log_probs[row])] if "seed" in way else zip(symbols[row], log_probs[row], strict=True)
            )
            for own, wanted in results:
                found = scored(model, prompt[row], own, len(wanted)) if "seed" not in way else wanted
                np.testing.assert_allclose(wanted, found, rtol=1e-6, atol=1e-6)
        assert_same_bits(_flat(model.generate(prompt[:1], 6, **given)), _flat((symbols[:1], log_probs[:1])))
        with threads(3):
            assert_same_bits(_flat(model.generate(prompt, 6, **given)), _flat((symbols, log_probs)))


def _flat(result: Any) -> list[Any]:
    return list(arrays_in(result))


# Twins of which some matrices stay float32, where compiled search takes both kinds.
MIXED = {
    "TransformerLM, gpt2": ["embedding.weight", "*linear1*", "*self_attn*"],
    "RecurrentLM, gru": ["embedding.weight", "output.weight", "*_l1"],
    "Seq2Seq, additive, lstm": ["target_embedding.weight", "decoder*", "output.weight", "*query*", "*key*"],
    "Seq2Seq, multiplicative, gru": ["target_embedding.weight", "decoder*_l0", "combine.weight", "output.weight"],
    "TransformerSeq2Seq, tied": ["target_embedding.weight", "source_embedding.weight", "*multihead_attn*"],
}


@EACH_TYPE
@pytest.mark.parametrize("name", MIXED)
def test_twins_that_keep_some(name: str, weights: str) -> None:
    original, prompt = lively(name), ids_of(11, 5, batch=3)
    for pattern in MIXED[name]:
        assert fnmatch.filter(original.parameters, pattern), f"{pattern} fits none of {list(original.parameters)}"
        model = original.with_weights(weights, keep=[pattern])
        for way in ({"temperature": 0}, {"num_beams": 3}):
            symbols, log_probs = model.generate(prompt, 5, return_log_probs=True, **way)
            for row in range(3):
                found = scored(model, prompt[row], symbols[row], len(log_probs[row]))
                np.testing.assert_allclose(log_probs[row], found, rtol=1e-6, atol=1e-6, err_msg=pattern)


@EACH_TYPE
@pytest.mark.parametrize(
    "name",
    [
        "Seq2Seq, additive, gru",
        "TransformerSeq2Seq, untied",
        "TransformerEncoderModel, labels",
        "TransformerLM, llama",
        "RecurrentLM, gru",
    ],
)
def test_models_padded_and_on_threads(name: str, weights: str) -> None:
    model = twin_of(name, weights)
    ids, lengths = ids_of(11, 8, batch=4), np.array([8, 1, 5, 3])
    pairs = "Seq2Seq" in name

    def call(rows: Any) -> Any:
        more = (ids_of(11, 6, 1, batch=4)[rows],) if pairs else ()
        given = {"source_lengths" if pairs else "lengths": lengths[rows]}
        return list(arrays_in(model(ids[rows], *more, **given)))

    together = call(slice(None))
    for count in (1, 2, 3):
        with threads(count):
            for row in range(4):
                assert_same_bits(call([row]), [a[row : row + 1] for a in together])
            assert_same_bits(call(slice(None)), together)


def test_spread_out_changes_everything() -> None:
    layer = fs.GRU(3, 4, seed=0)
    before = layer.state_dict()
    spread_out(layer)
    assert all((before[name] != array).all() for name, array in layer.parameters.items())
