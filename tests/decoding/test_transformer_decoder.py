"""The compiled decoder of Transformers: the bits of steps in Python, however rows are forked, moved and dropped."""

import ctypes

import numpy as np
import pytest
from common import assert_same_bits, threads
from decoders import AGAIN, DONE, FULL, Struct

import fastseq as fs
from fastseq.models.decoding import StateDecoder

pytestmark = pytest.mark.every_isa

LMS = {
    "learned": {},
    "rotary_rms": {"positions": "rotary", "norm": "rms", "num_kv_heads": 1, "tied": False, "bias": False},
    "sinusoidal_post": {"positions": "sinusoidal", "norm_first": False, "activation": "relu"},
    "window": {"positions": None, "window": 3},
}
PAIRS = {
    "sinusoidal": {},
    "learned": {"positions": "learned", "norm_first": False},
    "rotary": {"positions": "rotary", "num_kv_heads": 1, "tied": False},
}

pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
pointer_of.restype = ctypes.c_void_p
pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]


@pytest.fixture(autouse=True)
def one_thread():
    """So small as most models here are, more would be in each other's way on a busy machine."""
    fs.set_num_threads(1)


class Driven:
    """A compiled decoder with the verbs of one in Python, and all symbols of its rows."""

    def __init__(self, decoder, prompts, vocab):
        self.decoder, self.rows = decoder, [list(map(int, row)) for row in prompts]
        self.capsule = decoder.capsule()
        self.struct = Struct.from_address(pointer_of(self.capsule, b"fastseq.decoder"))
        assert self.struct.vocab == vocab
        self.parts = 0  # of steps

    def step(self, symbols):
        logits = np.empty((len(symbols), self.struct.vocab), f"f{self.struct.item_size}")
        status = self.begin(symbols, logits)
        if status == FULL:
            self.decoder.renew([np.array(row, np.int64) for row in self.rows])
            status = self.begin(symbols, logits)
        while status == AGAIN:
            status = self.begin(symbols, logits)
        assert status == DONE
        for row, symbol in zip(self.rows, symbols, strict=True):
            row.append(int(symbol))
        return logits

    def begin(self, symbols, logits):
        """A step, or a part of it: its status."""
        given = (ctypes.c_int64 * len(symbols))(*map(int, symbols))
        self.parts += 1
        return self.struct.step(self.struct.self, len(symbols), given, logits.ctypes.data)

    def choose(self, rows):
        given = (ctypes.c_int64 * len(rows))(*map(int, rows))
        assert self.struct.choose(self.struct.self, len(rows), given) == 0
        self.rows = [list(self.rows[row]) for row in rows]


def spread_out(model):
    rng = np.random.default_rng(5)
    for name, old in model.parameters.items():
        model.parameters[name] = old + rng.normal(0, 0.2, old.shape)
    return model


def language_model(kind, dtype="float32", width=24, **more):
    settings = {"context": 140, **LMS[kind], **more}
    return spread_out(fs.models.TransformerLM(11, width, 4, 2, dtype=dtype, seed=1, **settings))


def pair_model(kind, dtype="float32"):
    return spread_out(
        fs.models.TransformerSeq2Seq(9, 11, 24, 4, 1, 2, max_length=100, dtype=dtype, seed=1, **PAIRS[kind])
    )


def compare(model, prompts, vocab, steps, seed=0, longest=10**9):
    """Both decoders through the same steps, forks and drops."""
    rng = np.random.default_rng(seed)
    begun = prompts if vocab == 11 else model._source("source", prompts, "lengths", None)
    logits, decoder = model._decoder(begun, 1)
    one = Driven(decoder, prompts if vocab == 11 else [[] for _ in prompts], vocab)
    if vocab == 11:
        expected, state = model._prefilled([model._with_begin(row) for row in prompts])
        other = StateDecoder(model, state)
        assert_same_bits(logits, model._output(expected))
    else:
        state = model.initial_state(prompts)
        expected, state = model.step(np.full(len(prompts), model.begin), state)
        other = StateDecoder(model, state)
        assert_same_bits(logits, expected)
    count = len(prompts)
    for step in range(steps):
        if rng.random() < 0.4:
            rows = rng.integers(0, count, rng.integers(1, 7))
            one.choose(rows)
            other.choose(rows)
            count = len(rows)
        symbols = rng.integers(0, 11, count)
        assert_same_bits(one.step(symbols), other.step(symbols), f"step {step}")


@pytest.mark.parametrize("kind", LMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_language_models(kind, dtype):
    prompts = [np.arange(length) % 11 for length in (0, 62, 7, 1)]
    compare(language_model(kind, dtype), prompts, 11, 90)


@pytest.mark.parametrize("kind", LMS)
def test_windows_that_move_on(kind):
    prompts = [np.arange(length) % 11 for length in (0, 30, 7)]
    compare(language_model(kind, context=12), prompts, 11, 40)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_from_sequence_to_sequence(kind, dtype):
    sources = [np.arange(length) % 9 for length in (1, 70, 5)]
    compare(pair_model(kind, dtype), sources, 12, 80)


@pytest.mark.parametrize("n_threads", [2, 3])
def test_any_number_of_threads(n_threads):
    model = language_model("learned", width=128)
    prompts = [np.arange(length) % 11 for length in (3, 30, 7, 12, 9, 1, 2, 2, 5)]
    expected = model.generate(prompts, 30, temperature=0.7, seed=3)
    with threads(n_threads):
        assert_same_bits(model.generate(prompts, 30, temperature=0.7, seed=3), expected)
        compare(model, prompts, 11, 20)


@pytest.mark.parametrize("kind", LMS)
def test_a_row_does_not_know_its_neighbours(kind):
    model = language_model(kind, context=20)
    prompts = [np.arange(length) % 11 for length in (3, 30, 0, 12)]
    together = model.generate(prompts, 40, seed=[5, 6, 7, 8], temperature=1.2, stop=[4, [2, 1]])
    for row, (prompt, seed) in enumerate(zip(prompts, [5, 6, 7, 8], strict=True)):
        alone = model.generate([prompt], 40, seed=[seed], temperature=1.2, stop=[4, [2, 1]])
        assert_same_bits(together[row], alone[0])


@pytest.mark.parametrize("n_threads", [1, 2])
def test_steps_in_parts(n_threads):
    """A step that takes long is done some segments at a time, and Ctrl-C looked for; a search may leave it there."""
    model = spread_out(fs.models.TransformerLM(10, 512, 4, 3, context=80, seed=1))
    prompts = [np.arange(length) % 10 for length in (3, 63)] * 60  # one of the two begins a page
    with threads(n_threads):
        _, one = model._decoder(prompts, 1)
        _, state = model._prefilled([model._with_begin(row) for row in prompts])
        one, other = Driven(one, prompts, 10), StateDecoder(model, state)
        symbols = np.arange(120) % 10
        assert one.begin(symbols, np.empty((120, 10), np.float32)) == AGAIN
        rows = np.arange(120)[::-1].copy()
        one.choose(rows)
        other.choose(rows)
        assert_same_bits(one.step(symbols), other.step(symbols))
        assert_same_bits(one.step(symbols), other.step(symbols))
    assert one.parts > 3


def test_targets_longer_than_the_positions():
    model = pair_model("sinusoidal")
    with pytest.raises(ValueError, match="max_length=100"):
        model.generate([[1, 2]], 101)
    with pytest.raises(ValueError, match="max_length=100"):
        model.stream([[1, 2]], 101)
    endless = pair_model("rotary")
    endless.parameters["decoder.norm.bias"] = np.full(24, 9.0)
    endless.parameters["output.weight"] = np.concatenate(
        [endless.parameters["output.weight"][:11], np.full((1, 24), -9.0)]
    )
    assert list(map(len, endless.generate([[1, 2], [3]], 100, seed=0))) == [100, 100]
    state = model.initial_state([[1, 2]])
    for _ in range(100):
        _, state = model.step([1], state)
    with pytest.raises(ValueError, match="max_length=100"):
        model.step([1], state)
    with pytest.raises(ValueError, match="max_length=100"):
        model.generate([np.zeros(101, int)], 5)
