"""What attention keeps of the past: cached decoding against the full pass, in bits, and states as values."""

import copy
import pickle
import threading

import numpy as np
import pytest
from common import assert_close, assert_same_bits, inputs, run_python, threads, tolerance
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import fastseq as fs

pytestmark = pytest.mark.every_isa

ENGINES = pytest.mark.parametrize("engine", [fs, fs.reference], ids=["compiled", "reference"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
# What makes a stack: sizes that are whole vectors and such that are not, and every kind of attention.
STACKS = {
    "plain": {},
    "post_rms": {"norm_first": False, "norm": "rms", "activation": "gelu"},
    "rotary": {"rotary": 10000.0, "num_kv_heads": 2},
    "window": {"window": 7, "bias": False},
    "long_window": {"window": 70, "rotary": 100.0},
    "last_only": {"window": 1, "num_kv_heads": 1},
}
EACH = pytest.mark.parametrize("kind", STACKS)


@pytest.fixture(autouse=True)
def one_thread():
    """So small as most stacks here are, more would be in each other's way on a busy machine."""
    fs.set_num_threads(1)


def stack(name, kind="plain", engine=fs, dtype="float32", width=24, layers=2):
    made = getattr(engine, name)(layers, width, 4, 40, dropout=0.0, dtype=dtype, seed=1, **STACKS[kind])
    rng = np.random.default_rng(7)
    for parameter, old in made.parameters.items():
        made.parameters[parameter] = old + rng.normal(0, 0.1, old.shape)
    return made


def stepped(layer, x, state):
    """All tokens of (B, T, W), one after another."""
    out = np.empty_like(x)
    for t in range(x.shape[1]):
        out[:, t], state = layer.step(x[:, t], state)
    return out, state


@ENGINES
@EACH
@DTYPES
@pytest.mark.parametrize("width", [24, 64])
def test_steps_of_an_encoder_are_its_causal_call(engine, kind, dtype, width):
    if engine is fs.reference and width == 64:
        width = 8
    layer = stack("TransformerEncoder", kind, engine, dtype, width)
    time = 150 if engine is fs else 12
    x = inputs((3, time, width), dtype)
    out, state = stepped(layer, x, layer.initial_state(3))
    if engine is fs:
        assert_same_bits(out, layer(x, causal=True))
    else:
        assert_close(out, layer(x, causal=True), tolerance(dtype, 40, time))
    assert state.lengths.tolist() == [time] * 3 and state.dtype == dtype


# Heads take turns in a step, as many as their size allows; 300 keys are more than a block of scores.
@DTYPES
@pytest.mark.parametrize("window", [None, 130])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(1, 1, 5), (2, 2, 16), (3, 1, 24), (4, 4, 32), (5, 5, 48), (6, 2, 64), (7, 7, 8), (8, 4, 33), (6, 6, 130)],
)
def test_steps_of_any_heads(heads, kv_heads, size, window, dtype):
    layer = fs.TransformerEncoderLayer(
        heads * size, heads, 8, num_kv_heads=kv_heads, window=window, dropout=0.0, dtype=dtype, seed=2
    )
    x = inputs((2, 300, heads * size), dtype)
    assert_same_bits(stepped(layer, x, layer.initial_state(2))[0], layer(x, causal=True))


@EACH
@pytest.mark.parametrize("width", [24, 64])
def test_steps_of_a_decoder_are_its_call(kind, width):
    layer = stack("TransformerDecoder", kind, width=width)
    x, memory = inputs((3, 100, width)), inputs((3, 90, width), seed=1)
    lengths = np.array([90, 1, 40])
    memory[1, 1:] = np.nan
    out, _ = stepped(layer, x, layer.initial_state(memory, memory_lengths=lengths))
    assert_same_bits(out, layer(x, memory, memory_lengths=lengths))


def test_steps_of_a_transformer_are_its_call():
    layer = fs.Transformer(16, 2, 2, 2, 24, dropout=0.0, seed=0)
    src, tgt = inputs((2, 9, 16)), inputs((2, 12, 16), seed=1)
    lengths = np.array([4, 9])
    out, _ = stepped(layer, tgt, layer.initial_state(src, src_lengths=lengths))
    assert_same_bits(out, layer(src, tgt, src_lengths=lengths))


@EACH
def test_compiled_against_reference(kind):
    layer, reference = stack("TransformerEncoder", kind), stack("TransformerEncoder", kind, fs.reference, "float64")
    reference.load_state_dict(layer.state_dict())
    x = inputs((2, 80, 24))
    state, other = layer.initial_state(2), reference.initial_state(2)
    out, state = stepped(layer, x, state)
    expected, other = stepped(reference, x.astype("float64"), other)
    assert_close(out, expected, tolerance("float32", 96, 80))
    assert_close(state.keys, other.keys, tolerance("float32", 96, 80))
    assert_close(state.values, other.values, tolerance("float32", 96, 80))
    # A state of one engine goes on in the other.
    more = inputs((2, 24), seed=3)
    mixed = fs.reference.TransformerEncoder(2, 24, 4, 40, dropout=0.0, **STACKS[kind])
    mixed.load_state_dict(layer.state_dict())
    assert_close(mixed.step(more, state)[0], layer.step(more, state)[0], tolerance("float32", 96, 81))


def test_rows_at_different_lengths_and_any_batch():
    layer = stack("TransformerEncoder", "rotary")
    x = inputs((4, 140, 24))
    lengths = [3, 64, 65, 139]
    states = []
    for row, length in enumerate(lengths):
        _, state = stepped(layer, x[row : row + 1, :length], layer.initial_state(1))
        states.append(state)
    together, after = layer.step(x[np.arange(4), lengths], fs.AttentionState.concatenate(states))
    full = layer(x, causal=True)
    assert_same_bits(together, full[np.arange(4), lengths])
    assert after.lengths.tolist() == [length + 1 for length in lengths]


@pytest.mark.parametrize("n_threads", [2, 3])
def test_any_number_of_threads(n_threads):
    layer = stack("TransformerEncoder", "plain", width=256)
    x = inputs((9, 5, 256))
    expected, _ = stepped(layer, x, layer.initial_state(9))
    with threads(n_threads):
        assert_same_bits(stepped(layer, x, layer.initial_state(9))[0], expected)


def test_a_state_stays_what_it_was():
    layer = stack("TransformerEncoder")
    x, y = inputs((2, 70, 24)), inputs((2, 70, 24), seed=5)
    _, state = stepped(layer, x, layer.initial_state(2))
    before, saved = state.copy(), pickle.dumps(state)
    one, _ = stepped(layer, x, state)
    other, _ = stepped(layer, y, state)  # the page after which both go on may be written by one alone
    assert_same_bits(one, layer(np.concatenate([x, x], 1), causal=True)[:, 70:])
    assert_same_bits(other, layer(np.concatenate([x, y], 1), causal=True)[:, 70:])
    assert state == before == pickle.loads(saved)


def test_one_state_in_many_threads():
    layer = stack("TransformerEncoder", width=64)
    x = inputs((1, 30, 64))
    _, state = stepped(layer, x, layer.initial_state(1))
    more = [inputs((1, 60, 64), seed=i) for i in range(4)]
    expected = [layer(np.concatenate([x, one], 1), causal=True)[:, 30:] for one in more]
    found = [None] * 4

    def work(i):
        fs.set_num_threads(1)
        found[i] = stepped(layer, more[i], state)[0]

    for _ in range(5):
        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        [worker.start() for worker in workers]
        [worker.join() for worker in workers]
        assert_same_bits(found, expected)


def test_rows_forks_and_the_past():
    layer = stack("TransformerEncoder", "rotary")
    x = inputs((3, 66, 24))
    _, state = stepped(layer, x, layer.initial_state(3))
    forked = state[[2, 0, 2, 2]]
    assert forked.batch_size == 4 and forked.lengths.tolist() == [66] * 4
    more = inputs((4, 24), seed=9)
    out, _ = layer.step(more, forked)
    whole = np.concatenate([x[[2, 0, 2, 2]], more[:, None]], 1)
    assert_same_bits(out, layer(whole, causal=True)[:, -1])
    back = state.rolled_back([5, 66, 64])
    out, _ = layer.step(more[:3], back)
    for row, length in enumerate([5, 66, 64]):
        whole = np.concatenate([x[row, :length], more[row : row + 1]])
        assert_same_bits(out[row], layer(whole, causal=True)[-1])
    assert state[1] == state[[1]] == copy.deepcopy(state[1:2]) and state[0] != state[1]
    assert_same_bits(state[np.array([True, False, True])].keys, state.keys[[0, 2]])


@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder"])
@DTYPES
@ENGINES
def test_save_and_load(name, dtype, engine, tmp_path):
    layer = stack(name, "long_window", engine, dtype)
    x = inputs((2, 140 if engine is fs else 6, 24), dtype)
    memory = inputs((2, 5, 24), dtype, seed=2)
    start = (
        layer.initial_state(2) if name == "TransformerEncoder" else layer.initial_state(memory, memory_lengths=[5, 2])
    )
    _, state = stepped(layer, x, start)
    state.save(tmp_path / "state")
    loaded = engine.load(tmp_path / "state")
    assert loaded == state == pickle.loads(pickle.dumps(state)) and repr(loaded) == repr(state)
    more = inputs((2, 24), dtype, seed=4)
    assert_same_bits(layer.step(more, loaded)[0], layer.step(more, state)[0])


def test_a_window_rolls():
    layer = stack("TransformerEncoder", "window")
    x = inputs((1, 400, 24))
    _, state = stepped(layer, x, layer.initial_state(1))
    assert state.firsts.tolist() == [(400 - 7 + 1) // 64 * 64] and state.keys.shape[3] == 400 - state.firsts[0]
    earliest = int(state.firsts[0]) + 7 - 1
    back = state.rolled_back(earliest)
    assert_same_bits(layer.step(x[:, earliest], back)[0], layer(x, causal=True)[:, earliest])
    with pytest.raises(ValueError, match=rf"lengths\[0\] should be at least {earliest}"):
        state.rolled_back(earliest - 1)


def test_memory_of_a_window_does_not_grow():
    code = """
    import resource
    import numpy as np
    import fastseq as fs
    layer = fs.TransformerEncoder(2, 64, 4, 64, window=16, dropout=0.0, seed=0)
    x, state = np.ones((1, 64), "float32"), layer.initial_state(1)
    for t in range(6000):
        _, state = layer.step(x, state)
        if t == 500:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    assert int(run_python(code, FASTSEQ_NUM_THREADS="1").stdout) < 2000  # KB; all keys and values take 6000


def test_what_is_out_of_the_window_leaks_nowhere():
    layer = stack("TransformerEncoder", "window", layers=1)
    x = inputs((1, 40, 24))
    x[0, 10] = np.nan
    out, _ = stepped(layer, x, layer.initial_state(1))
    assert np.isnan(out[0, 10:17]).all() and np.isfinite(out[0, :10]).all() and np.isfinite(out[0, 17:]).all()
    assert_same_bits(out, layer(x, causal=True))


def test_bad_input():
    layer, other = stack("TransformerEncoder"), stack("TransformerEncoder", "rotary")
    decoder = stack("TransformerDecoder")
    x = inputs((2, 24))
    _, state = layer.step(x)
    for wrong in (inputs((2, 23)), inputs((2, 1, 24)), inputs((24,))):
        with pytest.raises(ValueError, match=r"x_t should be of shape \(B, 24\)"):
            layer.step(wrong)
    with pytest.raises(ValueError, match="state should have a batch of 2, not 3"):
        layer.step(x, state[[0, 0, 1]])
    for foreign in (
        other.initial_state(2),
        decoder.initial_state(inputs((2, 3, 24))),
        stack("TransformerEncoder", width=8).initial_state(2),
    ):
        with pytest.raises(ValueError, match="state should be of this TransformerEncoder"):
            layer.step(x, foreign)
    with pytest.raises(TypeError, match="state should be an AttentionState"):
        layer.step(x, fs.State(np.zeros((2, 1, 24))))
    with pytest.raises(TypeError, match="state should be what initial_state or a step gave"):
        decoder.step(x, None)
    with pytest.raises(ValueError, match=r"lengths\[1\] should be in 0..1, not 2"):
        state.rolled_back([1, 2])
    with pytest.raises(ValueError, match="lengths should be an integer, or of shape"):
        state.rolled_back([1, 1, 1])
    with pytest.raises(AttributeError, match="immutable"):
        state.lengths = np.zeros(2)
    with pytest.raises(TypeError, match="states should hold only AttentionState"):
        fs.AttentionState.concatenate([state, fs.State(np.zeros((2, 1, 24)))])
    with pytest.raises(ValueError, match="states should agree"):
        fs.AttentionState.concatenate([state, other.initial_state(1)])
    arrays = {"lengths": [2], "firsts": [0], "keys": np.zeros((1, 1, 2, 2, 3)), "values": np.zeros((1, 1, 2, 2, 3))}
    for name, value, error in (
        ("lengths", [3], ValueError),
        ("lengths", [-1], ValueError),
        ("lengths", [[2]], ValueError),
        ("firsts", [3], ValueError),
        ("keys", np.zeros((1, 1, 2, 2, 3), int), TypeError),
        ("values", np.zeros((1, 1, 2, 1, 3)), ValueError),
        ("tokens", [[1]], ValueError),
        ("memory_lengths", [1, 2], ValueError),
    ):
        extra = {"memory_keys": np.zeros((2, 1, 2, 2, 3)), "memory_values": np.zeros((2, 1, 2, 2, 3))}
        with pytest.raises(error, match=name.split("_")[-1] if "memory" not in name else "memory"):
            fs.AttentionState(**{**arrays, name: value, **(extra if name == "memory_lengths" else {})})


def test_keys_past_the_last_token_are_zeros() -> None:
    ones = np.ones((2, 1, 2, 3, 4))
    state = fs.AttentionState(lengths=[5, 1], firsts=[2, 0], keys=ones, values=2 * ones, window=3)
    for array, value in ((state.keys, 1), (state.values, 2)):
        assert (array[0] == value).all() and (array[1, ..., 0, :] == value).all() and not array[1, ..., 1:, :].any()


class States(RuleBasedStateMachine):
    """States of a language model and the symbols that each row has seen, whatever is done to them."""

    @initialize(kind=st.sampled_from(["learned", "rotary", "window"]))
    def begin(self, kind):
        settings = {"positions": None, "window": 5} if kind == "window" else {"positions": kind}
        self.model = fs.models.TransformerLM(9, 16, 2, 2, context=150, seed=2, **settings)
        self.window = settings.get("window", 0)
        self.state, self.rows = self.model.initial_state(2), [[], []]
        self.kept = []

    @rule(seed=st.integers(0, 999), count=st.integers(1, 40))
    def step(self, seed, count):
        rng = np.random.default_rng(seed)
        for _ in range(count):
            if max(map(len, self.rows)) >= 148:
                return
            ids = rng.integers(0, 9, len(self.rows))
            self.logits, self.state = self.model.step(ids, self.state)
            self.rows = [[*row, int(one)] for row, one in zip(self.rows, ids, strict=True)]
        expected = self.model(self.rows)
        assert_same_bits(self.logits, expected[np.arange(len(self.rows)), [len(row) - 1 for row in self.rows]])

    @rule(data=st.data())
    def fork(self, data):
        picked = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=4))
        self.state, self.rows = self.state[picked], [self.rows[i] for i in picked]

    @rule(data=st.data())
    def roll_back(self, data):
        lengths = [data.draw(st.integers(0, len(row))) for row in self.rows]
        least = [first + self.window - 1 if first else 0 for first in self.state.firsts]
        lengths = [max(length + 1, most) for length, most in zip(lengths, least, strict=True)]  # and the begin symbol
        self.state = self.state.rolled_back(lengths)
        self.rows = [row[: length - 1] for row, length in zip(self.rows, lengths, strict=True)]

    @rule()
    def keep(self):
        self.kept.append((self.state, self.rows))

    @precondition(lambda self: self.kept)
    @rule()
    def join(self):
        state, rows = self.kept.pop()
        if len(rows) + len(self.rows) <= 6:
            self.state = fs.AttentionState.concatenate([self.state, state])
            self.rows = [*self.rows, *rows]

    @rule()
    def through_bytes(self):
        self.state = pickle.loads(pickle.dumps(self.state))

    @invariant()
    def lengths_and_tokens(self):
        assert self.state.lengths.tolist() == [len(row) + 1 for row in self.rows]
        for row, tokens in zip(self.rows, self.state.tokens, strict=True):
            assert tokens[1 : len(row) + 1].tolist() == row


States.TestCase.settings = hypothesis_settings(max_examples=12, stateful_step_count=20)
TestStates = States.TestCase
