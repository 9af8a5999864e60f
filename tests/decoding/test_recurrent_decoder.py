"""Compiled decoders over recurrent layers against steps in Python: the same bits, whatever becomes of the rows."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from common import KINDS, Array, assert_same_bits, make, random_state, run_python, threads
from decoders import AGAIN, DONE, Struct

import fastseq as fs
from fastseq import _recurrent, _recurrent_decoder
from fastseq.layers import inside
from fastseq.models.decoding import StateDecoder
from fastseq.models.recurrent_parts import Reader

pytestmark = pytest.mark.every_isa

DTYPES = ("float32", "float64")


DECODED = [kind for kind in KINDS if kind != "lstm_ln"]  # which models do not offer


class Network:
    """Embedding, a recurrent layer of any kind, and logits: what the decoders are of."""

    def __init__(
        self, kind: str, symbols: int, inputs: int, hidden: int, vocab: int, *, layers: int = 1, dtype: str = "float32"
    ) -> None:
        self.embedding = fs.Embedding(symbols, inputs, dtype=dtype, seed=1)
        self.recurrent = make(kind, inputs, hidden, num_layers=layers, dtype=dtype, seed=2)
        self.output = fs.Linear(self.recurrent._output_size, vocab, dtype=dtype, seed=3)

    def step(self, symbols: Array, state: Any) -> tuple[Array, Any]:
        y, state = self.recurrent.step(self.embedding(symbols), state)
        return self.output(y), state

    def decoder(self, state: Any, copies: int, n_threads: int) -> Any:
        cells = [cell for (cell,) in inside.cells(self.recurrent)]
        embedding = self.embedding.parameters["weight"]
        table = _recurrent.input_table(cells[0], embedding, n_threads)
        weights = _recurrent_decoder.Weights(embedding, cells[0], table, cells, inside.packed(self.output))
        return _recurrent_decoder.Decoder(weights, state.h, getattr(state, "c", None), copies, n_threads)

    def decoders(self, rows: int, copies: int, n_threads: int) -> tuple[Any, StateDecoder]:
        state = random_state(self.recurrent, rows)
        return self.decoder(state, copies, n_threads), StateDecoder(self, state)


def walk(compiled: Any, generic: Any, symbols: int, rows: int, steps: int, most: int, least: int = 1) -> None:
    """Random symbols, and now and then other rows: forked, in another order, fewer or more."""
    rng = np.random.default_rng(0)
    for step in range(steps):
        ids = rng.integers(0, symbols, rows)
        assert_same_bits(compiled.step(ids), generic.step(ids), f"step {step}")
        for _ in range(rng.integers(0, 3)):
            parents = rng.integers(0, rows, rng.integers(least, most + 1))
            compiled.choose(parents)
            generic.choose(parents)
            rows = len(parents)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", DECODED)
def test_same_bits_as_steps(kind: str, layers: int, dtype: str) -> None:
    for hidden, rows in ((1, 1), (5, 3), (37, 1), (64, 9)):
        network = Network(kind, 11, 6, hidden, 7 + hidden, layers=layers, dtype=dtype)
        compiled, generic = network.decoders(rows, 2, 1)
        walk(compiled, generic, 11, rows, 12, 2 * rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", DECODED)
def test_inputs_from_a_table_are_those_of_an_embedding(kind: str, bidirectional: bool, dtype: str) -> None:
    """Few rows and many, of different lengths, by one thread and by two."""
    rng = np.random.default_rng(2)
    for hidden, rows, time, layers in ((5, 1, 9, 1), (37, 3, 1, 2), (150, 2, 6, 1), (20, 40, 7, 2)):
        embedding = fs.Embedding(11, 6, dtype=dtype, seed=1)
        layer = make(kind, 6, hidden, num_layers=layers, bidirectional=bidirectional, dtype=dtype, seed=2)
        reader = Reader(embedding, layer)
        tables = reader.tables()
        assert tables is not None and len(tables) == 1 + bidirectional
        ids, lengths = rng.integers(0, 11, (rows, time)), rng.integers(0, time + 1, rows)
        for counts, n_threads in ((None, 1), (lengths, 1), (None, 2), (lengths, 2)):
            state = random_state(layer, rows)
            with threads(n_threads):
                y, end = reader(ids, state, counts)
                expected, expected_end = layer(embedding(ids), state, lengths=counts)
            assert_same_bits(y, expected)
            for one, other in zip(end, expected_end, strict=True):
                assert_same_bits(one, other)


def test_a_table_follows_the_parameters() -> None:
    model = fs.models.RecurrentLM(7, 5, 6, seed=1)
    before = model([[1, 2, 3]])
    model.parameters["recurrent.weight_ih_l0"] = 2 * model.parameters["recurrent.weight_ih_l0"]
    fresh = fs.models.RecurrentLM(7, 5, 6, seed=1)
    fresh.load_state_dict(model.state_dict())
    assert not np.array_equal(model([[1, 2, 3]]), before)
    assert_same_bits(model([[1, 2, 3]]), fresh([[1, 2, 3]]))


@pytest.mark.parametrize("kind", DECODED)
def test_rows_beyond_the_room_there_was(kind: str) -> None:
    network = Network(kind, 5, 4, 20, 6, layers=2)
    compiled, generic = network.decoders(2, 1, 1)
    walk(compiled, generic, 5, 2, 8, 300)


def test_a_cell_that_needs_whole_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="cells"):
        Network("lstm_ln", 5, 4, 20, 6).decoders(2, 1, 1)


@pytest.mark.parametrize("kind", DECODED)
def test_symbols_too_many_for_a_table(kind: str) -> None:
    symbols = 1 << 17
    network = Network(kind, symbols, 3, 21, 4, layers=2)
    compiled, generic = network.decoders(3, 2, 1)
    walk(compiled, generic, symbols, 3, 6, 6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", DECODED)
@pytest.mark.parametrize("n_threads", [2, 3])
def test_threads_change_no_bit(kind: str, dtype: str, n_threads: int) -> None:
    """Few rows, whose panels are split, and many, which are split themselves; as many at every step, for that is when
    threads are tried."""
    for hidden, rows, layers in ((300, 2, 2), (60, 150, 2), (130, 20, 1)):
        network = Network(kind, 9, 8, hidden, 100, layers=layers, dtype=dtype)
        compiled, generic = network.decoders(rows, 2, n_threads)
        with threads(1):
            walk(compiled, generic, 9, rows, 5, rows, rows)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_steps_in_parts(n_threads: int) -> None:
    """A step that takes long is done some rows at a time, and Ctrl-C looked for; a search may leave it there."""
    network = Network("lstm", 9, 8, 384, 10, layers=2)
    compiled, generic = network.decoders(700, 1, n_threads)
    ids = np.arange(700) % 9
    logits = np.empty((700, 10), np.float32)
    step, choose = functions_of(compiled)
    status = step(ids, logits)
    assert status == AGAIN
    while status == AGAIN:
        status = step(ids, logits)
    assert status == DONE
    assert_same_bits(logits, generic.step(ids))
    for decoder in (compiled, generic):
        decoder.step(ids)
    assert step(ids, logits) == AGAIN
    rows = np.arange(700)[::-1].copy()
    assert choose(rows) == DONE
    generic.choose(rows)
    assert_same_bits(compiled.step(ids), generic.step(ids))


def functions_of(decoder: Any) -> tuple[Any, Any]:
    """What a search calls: step(symbols, logits) and choose(parents); each returns a status."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    struct = Struct.from_address(get(decoder.capsule(), b"fastseq.decoder"))

    def ids_of(array: Array) -> Any:
        return array.ctypes.data_as(ctypes.POINTER(ctypes.c_int64))

    def step(symbols: Array, logits: Array) -> Any:
        return struct.step(struct.self, len(symbols), ids_of(symbols), logits.ctypes.data)

    def choose(parents: Array) -> Any:
        return struct.choose(struct.self, len(parents), ids_of(parents))

    return step, choose


def test_a_search_asks_again() -> None:
    model, in_python = (fs.models.RecurrentLM(10, 8, 384, 2, seed=1) for _ in range(2))
    in_python._backend = replace(in_python._backend, recurrent_decoder=None)
    prompts = np.arange(1400).reshape(700, 2) % 10
    found, expected = (one.generate(prompts, 3, seed=1, return_log_probs=True) for one in (model, in_python))
    assert_alike(found, expected)


def test_what_is_chosen_before_the_first_step() -> None:
    network = Network("lstm", 5, 4, 12, 6)
    compiled, generic = network.decoders(3, 1, 1)
    for decoder in (compiled, generic):
        decoder.choose(np.array([2, 0, 0, 2, 1]))
        decoder.choose(np.array([4, 1]))
    ids = np.array([3, 1])
    assert_same_bits(compiled.step(ids), generic.step(ids))


def test_rows_do_not_meet() -> None:
    """NaN of one row stays there, and is gone when the row is dropped."""
    network = Network("gru_after", 5, 4, 12, 6)
    state = random_state(network.recurrent, 3)
    h = state.h.copy()
    h[1] = np.nan
    compiled = network.decoder(fs.State(h), 1, 1)
    ids = np.array([1, 2, 3])
    logits = compiled.step(ids)
    assert np.isnan(logits[1]).all() and np.isfinite(logits[[0, 2]]).all()
    compiled.choose(np.array([2, 2, 0]))
    assert np.isfinite(compiled.step(ids)).all()


def test_tiny_numbers_are_flushed_as_in_steps() -> None:
    network = Network("rnn_relu", 3, 2, 8, 4)
    parameters = network.recurrent.parameters
    for name, old in parameters.items():
        parameters[name] = np.zeros_like(old) if "bias" in name else np.full_like(old, 1e-3)
    network.embedding.parameters["weight"] = np.full((3, 2), 1e-37, np.float32)
    network.output.parameters["weight"] = np.full((4, 8), 0.5, np.float32)
    network.output.parameters["bias"] = np.zeros(4, np.float32)
    state = fs.State(np.full((1, 1, 8), 1e-36, np.float32))
    compiled, generic = network.decoder(state, 1, 1), StateDecoder(network, state)
    walk(compiled, generic, 3, 1, 5, 1)
    assert np.float32(1e-30) * np.float32(1e-10) > 0  # and nobody else's are


def test_a_decoder_keeps_what_it_needs() -> None:
    model = fs.models.RecurrentLM(12, 8, 16, 2, seed=1)
    logits, decoder = model._decoder([np.array([1, 2, 3])], 1)
    state = model.initial_state(1)
    for symbol in (1, 2, 3):
        expected, state = model.step(np.array([symbol]), state)
    assert_same_bits(logits, expected)
    expected, _ = model.step(np.array([4]), state)
    del model, logits, state
    gc.collect()
    assert_same_bits(decoder.step(np.array([4])), expected)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_generate_is_what_steps_in_python_generate(cell: str, dtype: str) -> None:
    model = fs.models.RecurrentLM(20, 8, 30, 2, cell=cell, dtype=dtype, seed=1)
    in_python = fs.models.RecurrentLM(20, 8, 30, 2, cell=cell, dtype=dtype, seed=1)
    in_python._backend = replace(in_python._backend, recurrent_decoder=None)
    prompts = [[1, 2, 3], [], [4], [1, 2, 3]]
    for settings in (
        {"seed": 1},
        {"temperature": 0},
        {"seed": 2, "top_k": 4, "repetition_penalty": 1.3, "stop": [5, [1, 2]]},
        {"num_beams": 4, "num_results": 3, "stop": 7},
        {"num_results": 3, "seed": 4, "stop": 3},
    ):
        found = model.generate(prompts, 30, return_log_probs=True, **settings)
        expected = in_python.generate(prompts, 30, return_log_probs=True, **settings)
        assert_alike(found, expected)
    alone = list(model.stream([4], 10, seed=3))
    np.testing.assert_array_equal(alone, in_python.generate([4], 10, seed=3))


ATTENTIONS = (None, "multiplicative", "additive")
SOURCES = (4, 1, 9)  # lengths


def decoders_of(model: Any, lengths: tuple[int, ...], copies: int = 2) -> tuple[Any, StateDecoder]:
    """The compiled decoder of a model from sequence to sequence, and one that takes its steps; they begin alike."""
    rng = np.random.default_rng(1)
    sources = [rng.integers(0, model.source_vocab_size, n) for n in lengths]
    logits, compiled = model._decoder(model._source("source", sources, "lengths", None), copies)
    expected, state = model.step(np.full(len(sources), model.begin), model.initial_state(sources))
    assert_same_bits(logits, expected)
    return compiled, StateDecoder(model, state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attending_has_the_bits_of_steps(attention: str | None, cell: str, dtype: str) -> None:
    """Rows of other sources side by side, and forked ones that share theirs."""
    for hidden, layers, bidirectional in ((1, 1, True), (17, 2, True), (40, 3, False)):
        model = fs.models.Seq2Seq(
            9, 7, 5, hidden, layers, cell=cell, bidirectional=bidirectional, attention=attention, dtype=dtype, seed=1
        )
        walk(*decoders_of(model, SOURCES), 7, len(SOURCES), 12, 8)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_long_sources_and_many_rows(attention: str | None) -> None:
    model = fs.models.Seq2Seq(9, 7, 5, 12, attention=attention, seed=1)
    walk(*decoders_of(model, (300, 2, 700)), 7, 3, 5, 200)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_targets_too_many_for_a_table(attention: str | None, cell: str) -> None:
    model = fs.models.Seq2Seq(9, 50_000, 5, 17, cell=cell, attention=attention, seed=1)
    walk(*decoders_of(model, SOURCES), 50_000, 3, 5, 6)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("n_threads", [2, 3])
def test_threads_change_no_bit_of_what_attends(attention: str | None, n_threads: int) -> None:
    for hidden, sources in ((200, SOURCES), (60, 40 * SOURCES), (120, SOURCES)):
        model = fs.models.Seq2Seq(9, 70, 8, hidden, 2, attention=attention, seed=1)
        with threads(n_threads):
            compiled, generic = decoders_of(model, sources)
        with threads(1):
            walk(compiled, generic, 70, len(sources), 5, len(sources), len(sources))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_what_is_said_of_a_source_is_what_steps_in_python_say(attention: str | None) -> None:
    model = fs.models.Seq2Seq(9, 7, 5, 17, 2, attention=attention, seed=1)
    in_python = fs.models.Seq2Seq(9, 7, 5, 17, 2, attention=attention, seed=1)
    in_python._backend = replace(in_python._backend, recurrent_decoder=None)
    sources = [[1, 2, 3], [4], [1, 2, 3], [8, 7, 6, 5, 4, 3]]
    for settings in (
        {"seed": 1},
        {"temperature": 0},
        {"num_beams": 4, "num_results": 2},
        {"num_results": 3, "seed": 2},
    ):
        assert_alike(
            model.generate(sources, 20, return_log_probs=True, **settings),
            in_python.generate(sources, 20, return_log_probs=True, **settings),
        )


NAMES = ("target_embedding.weight", "decoder.weight_ih_l0", "decoder.bias_hh_l1", "output.weight")
NAMES_OF = {
    "multiplicative": (*NAMES, "attention.weight", "combine.weight"),
    "additive": (*NAMES, "attention.query.weight", "attention.key.bias", "attention.score.weight"),
}


@pytest.mark.parametrize(("attention", "name"), [(a, name) for a in NAMES_OF for name in NAMES_OF[a]])
def test_new_parameters_of_what_attends_are_seen(attention: str, name: str) -> None:
    model = fs.models.Seq2Seq(9, 7, 5, 17, 2, attention=attention, seed=1)
    model.generate([1, 2, 3], 2, seed=1)
    old = model.parameters[name]
    model.parameters[name] = 0.5 * old[::-1] if old.ndim == 1 or len(old) > 1 else 0.5 * old[:, ::-1]
    walk(*decoders_of(model, SOURCES), 7, 3, 3, 3)


def assert_alike(found: Any, expected: Any) -> None:
    """Results of `generate`: the same symbols, and log-probabilities that are as good as the same."""
    for one, other in zip(found, expected, strict=True):
        for row, wanted in zip(one, other, strict=True):
            for a, b in zip(_flat(row), _flat(wanted), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12)


def _flat(row: Any) -> list[Array]:
    return list(row) if isinstance(row, list) else [row]


@pytest.mark.parametrize("layer", ["embedding.weight", "recurrent.weight_ih_l0", "recurrent.bias_hh_l0", "output.bias"])
def test_new_parameters_are_seen(layer: str) -> None:
    """In the table of inputs too, which is of two layers."""
    model = fs.models.RecurrentLM(20, 8, 30, seed=1)
    in_python = fs.models.RecurrentLM(20, 8, 30, seed=1)
    in_python._backend = replace(in_python._backend, recurrent_decoder=None)
    before = model.generate([1], 40, temperature=0, return_log_probs=True)
    for each in (model, in_python):
        each.parameters[layer] = -each.parameters[layer][::-1]
    after = model.generate([1], 40, temperature=0, return_log_probs=True)
    expected = in_python.generate([1], 40, temperature=0, return_log_probs=True)
    assert abs(after[1] - before[1]).max() > 1e-3
    np.testing.assert_array_equal(after[0], expected[0])
    np.testing.assert_allclose(after[1], expected[1], rtol=1e-12)


def test_weights_are_packed_once() -> None:
    model = fs.models.RecurrentLM(20, 8, 30, seed=1)
    model.generate([1], 2, seed=1)
    kept = model._for_decoders.get(lambda: None)
    model.generate([1], 2, seed=1)
    assert kept is not None and model._for_decoders.get(lambda: None) is kept
    model.parameters["output.bias"] = np.zeros(20)
    model.generate([1], 2, seed=1)
    assert model._for_decoders.get(lambda: None) is not kept


def test_memory_that_cannot_be_had() -> None:
    """For copies, when a decoder is made, and for more rows than it was made for; it works on after it."""
    network = Network("lstm", 5, 4, 20, 6)
    with pytest.raises(MemoryError):
        network.decoders(2, 1 << 40, 1)
    with pytest.raises(MemoryError):
        network.decoders(2, 1 << 80, 1)
    code = """
    import resource, numpy as np, fastseq as fs
    from common import assert_same_bits
    from test_recurrent_decoder import Network

    compiled, generic = Network("lstm", 5, 4, 512, 6, layers=2).decoders(2, 1, 1)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    many = np.zeros(6_000, np.int64)
    resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), hard))
    try:
        compiled.choose(many)
    except MemoryError:
        print("refused")
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    ids = np.array([1, 0])
    assert_same_bits(compiled.step(ids), generic.step(ids))
    for rows in (many, ids):
        compiled.choose(rows)
        generic.choose(rows)
    assert_same_bits(compiled.step(ids), generic.step(ids))
    """
    assert run_python(code, OPENBLAS_NUM_THREADS="1", FASTSEQ_NUM_THREADS="1").stdout == "refused\n"
