"""`generate` and `stream`: the searches, compiled and in NumPy, against enumeration, distributions and each other."""

import concurrent.futures
import dataclasses
import functools
import inspect
import itertools
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from common import assert_same_bits, child_environment
from decoders import Whim
from protocol import fitted, log_softmax, random_ids, random_sequences

import fastseq as fs
from fastseq.models import decoding
from fastseq.reference import _decoding as numpy_decoding

ENGINES = pytest.mark.parametrize("engine", ["compiled", "reference"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
PROMPTS = [[3, 1], [], [0, 2, 2, 4, 1, 3, 0], [2], [3, 1]]


def same(actual, expected):
    """The same ids, and log-probabilities but for rounding, in the same form."""
    assert type(actual) is type(expected)
    if isinstance(expected, tuple | list):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            same(a, e)
    elif expected.dtype == np.int64:
        assert_same_bits(actual, expected)
    else:
        assert actual.dtype == expected.dtype == np.float64
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


# Filters and draws, against the same written once more


def filtered(logits, seen=(), temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0):
    """The distribution that is drawn from, with a full sort."""
    logits = logits.astype(np.float64)
    for symbol in set(seen):
        logits[symbol] = (
            logits[symbol] / repetition_penalty if logits[symbol] > 0 else logits[symbol] * repetition_penalty
        )
    logits = logits / temperature
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = order if top_k is None else order[:top_k]
    p = np.zeros(len(logits))
    p[kept] = np.exp(logits[kept] - logits.max())
    p /= p.sum()
    if top_p is not None:
        inside, total = [], 0.0
        for i in kept:
            inside.append(i)
            total += p[i]
            if total >= top_p - 1e-10:
                break
        p[[i for i in range(len(p)) if i not in inside]] = 0
        p /= p.sum()
    return p


FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.0},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 1.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.7, "repetition_penalty": 1.2},
]
# Logits with equals among them, and some that are impossible.
SHAPES = {
    "distinct": None,
    "equals": lambda logits, history: np.round(logits),
    "all equal": lambda logits, history: np.zeros_like(logits),
    "impossible": lambda logits, history: np.where(np.arange(len(logits)) % 3 == 1, -np.inf, logits),
}


@pytest.mark.parametrize("vocab", [5, 40, 700])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", FILTERS, ids=str)
@ENGINES
def test_draws_are_those_of_the_filtered_distribution(engine, settings, shape, vocab):
    """Each symbol is where the cumulative distribution passes the number that key and step give."""
    dtype = "float32" if vocab == 40 else "float64"
    model = Whim(vocab, dtype=dtype, engine=engine, shape=SHAPES[shape])
    drawn = model.generate(PROMPTS, 6, seed=4, **settings)
    keys = decoding.keys([np.array(p, np.int64) for p in PROMPTS], decoding.Options(1, seed=4))
    for prompt, row, key in zip(PROMPTS, drawn, keys, strict=True):
        history = list(prompt)
        for t, symbol in enumerate(row):
            cumulative = filtered(model.function(tuple(history)), history, **settings).cumsum()
            number = numpy_decoding.uniform(np.array([key]), t)[0]
            assert symbol == np.argmax(cumulative > number * cumulative[-1])
            history.append(int(symbol))


@pytest.mark.parametrize("k", [1, 3, 20, 40, 41, 300, 640, 650])
@ENGINES
def test_exactly_k_stay(engine, k):
    """Whatever is equal: few by a heap, many by a selection."""
    for seed, levels in itertools.product(range(3), (1, 2, 5, 1000)):
        values = np.random.default_rng(seed).integers(0, levels, 650) / 100
        model = Whim(650, engine=engine, shape=lambda logits, history, values=values: values)
        drawn = model.generate(np.zeros((1500 if engine == "compiled" else 50, 0), int), 1, top_k=k, seed=1)
        kept = np.argsort(-values, kind="stable")[:k]
        assert np.isin(drawn, kept).all()
        if k <= 41 and engine == "compiled":
            assert len(np.unique(drawn)) == k


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (0.0, [1]),
        (0.5, [1]),
        (0.5000001, [1, 3]),
        (0.75, [1, 3]),
        (0.875, [1, 3, 4]),
        (0.9, [1, 2, 3, 4]),
        (0.9375, [1, 2, 3, 4]),
        (0.95, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4, 5]),
    ],
)
@ENGINES
def test_the_smallest_set_that_reaches_p(engine, p, kept):
    """Sums that reach p but for rounding reach it; unlikely symbols stand first, and in between."""
    values = np.log([1 / 32, 1 / 2, 1 / 16, 1 / 4, 1 / 8, 1 / 32])
    model = Whim(6, engine=engine, shape=lambda logits, history: values)
    drawn = model.generate(np.zeros((2000, 0), int), 1, top_p=p, seed=1)
    assert np.unique(drawn).tolist() == kept


def test_the_filters_of_the_reference():
    logits = np.array([1.0, -2.0, 3.0, 3.0, 0.0])
    inf = np.inf
    np.testing.assert_array_equal(numpy_decoding.penalised(logits, np.array([1, 2]), 2.0), [1, -4, 1.5, 3, 0])
    np.testing.assert_array_equal(numpy_decoding.with_temperature(logits, 0.5), [-4, -10, 0, 0, -6])
    np.testing.assert_array_equal(numpy_decoding.top_k(logits, 1), [-inf, -inf, 3, -inf, -inf])
    np.testing.assert_array_equal(numpy_decoding.top_k(logits, 3), [1, -inf, 3, 3, -inf])
    np.testing.assert_array_equal(numpy_decoding.top_p(np.log([0.2, 0.5, 0.3]), 0.7), [-inf, *np.log([0.5, 0.3])])
    assert [numpy_decoding.draw(np.log([0.25, 0.5, 0.25]), u) for u in (0, 0.24, 0.26, 0.74, 0.76)] == [0, 0, 1, 1, 2]
    never = np.array([-inf, 0.0, -inf])
    assert numpy_decoding.draw(never, 0.0) == numpy_decoding.draw(never, 1 - 2.0**-52) == 1
    assert not numpy_decoding.ends_with([1, 2], [(2, 1), (0, 1, 2)]) and numpy_decoding.ends_with(
        [1, 2], [(5,), (1, 2)]
    )
    u = numpy_decoding.uniform(np.arange(20000, dtype=np.uint64), 3)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.01


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.6}, {"temperature": 1.5, "top_k": 5}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.9}],
    ids=str,
)
def test_draws_follow_the_distribution(settings):
    """Chi-square of what 8000 rows draw, of the first symbol and of the second after it; 99.9 % points."""
    model = fitted(fs.models.MarkovChain(8, 1, smoothing=0.5), random_ids(8, 300))
    drawn = model.generate(np.full((8000, 1), 2), 2, seed=3, **settings)
    points = [0, 10.8, 13.8, 16.3, 18.5, 20.5, 22.5, 24.3, 26.1]
    followers = np.exp(model(np.arange(8)[:, None])[:, 0])
    first = filtered(np.log(followers[2]), **settings)
    likeliest = int(first.argmax())
    for seen, p in [
        (drawn[:, 0], first),
        (drawn[drawn[:, 0] == likeliest, 1], filtered(np.log(followers[likeliest]), **settings)),
    ]:
        counts = np.bincount(seen, minlength=8)
        assert not counts[p == 0].any()
        there = p > 0
        wanted = len(seen) * p[there]
        assert wanted.min() > 5
        assert ((counts[there] - wanted) ** 2 / wanted).sum() < points[there.sum() - 1]
        other = len(seen) * np.roll(p, 1)[there] + 1e-9  # a planted mistake: each symbol is taken for its neighbour
        assert ((counts[there] - other) ** 2 / other).sum() > 100


@DTYPES
@ENGINES
def test_greedy_is_the_likeliest_of_equals_the_lowest(engine, dtype):
    for vocab in (1, 2, 63, 64, 65, 1023, 1024, 1025, 1090, 2049):
        for shape in (None, lambda logits, history: np.round(logits)):
            model = Whim(vocab, vocab, dtype=dtype, engine=engine, shape=shape)
            row = model.generate(np.zeros(0, int), 3, temperature=0)
            for t in range(3):
                assert row[t] == model.function(tuple(row[:t])).argmax()


@ENGINES
def test_a_temperature_near_zero_is_greedy(engine):
    model = Whim(30, engine=engine)
    greedy = model.generate(PROMPTS, 8, temperature=0)
    assert_same_bits(model.generate(PROMPTS, 8, temperature=1e-300, seed=1), greedy)
    assert_same_bits(model.generate(PROMPTS, 8, top_k=1, seed=1), greedy)
    assert_same_bits(model.generate(PROMPTS, 8, top_p=0, seed=1), greedy)
    assert_same_bits(model.generate(PROMPTS, 8, temperature=0, top_k=3, top_p=0.5), greedy)


# Beam search


def all_hypotheses(log_p, prompt, vocab, max_new, stop, length_penalty):
    """Every way to go on, best first."""
    found = []

    def extend(said, total):
        if said and (len(said) == max_new or any(said[-len(one) :] == one for one in stop)):
            found.append((total / len(said) ** length_penalty, said))
            return
        step = log_p((*prompt, *said), said)
        for symbol in range(vocab):
            if step[symbol] > -np.inf:
                extend((*said, symbol), total + step[symbol])

    extend((), 0.0)
    return sorted(found, key=lambda one: -one[0])


STOPS = [None, 1, [0, [2, 2]], [[1, 0], [2, 1, 0]]]


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("stop", STOPS, ids=str)
@pytest.mark.parametrize("kind", ["chain", "chain in NumPy", "network", "network in NumPy"])
def test_wide_beams_find_what_an_exhaustive_search_finds(kind, stop, penalty):
    if "chain" in kind:
        models = fs.reference.models if "NumPy" in kind else fs.models
        model = fitted(models.MarkovChain(3, 2, smoothing="witten_bell"), random_sequences(3))
    else:
        module = fs.reference if "NumPy" in kind else fs
        model = module.models.RecurrentLM(3, 4, 5, dtype="float64", seed=2)
        for name in model.parameters:  # far from uniform
            model.parameters[name] = model.parameters[name] * 4
    sequences = [] if stop is None else [tuple(np.atleast_1d(one)) for one in np.atleast_1d(np.array(stop, object))]
    prompts = [[0, 1], [], [2]]
    found, log_probs = model.generate(
        prompts, 4, num_beams=81, num_results=7, stop=stop, length_penalty=penalty, return_log_probs=True
    )

    def log_p(history, said):
        if not history:
            return np.array([model.log_prob([[s]])[0] for s in range(3)])
        return log_softmax(model(np.array(history))[-1])

    for prompt, rows, sums in zip(prompts, found, log_probs, strict=True):
        wanted = all_hypotheses(log_p, tuple(prompt), 3, 4, sequences, penalty)
        assert [tuple(row) for row in rows] == [said for _, said in wanted[:7]]
        np.testing.assert_allclose(
            [one.sum() / len(one) ** penalty for one in sums], [rank for rank, _ in wanted[:7]], rtol=1e-9
        )


def plain_beams(model, prompt, max_new, width, stop, power, repetition_penalty):
    """Beam search that goes through all candidates, best first, and never ends before its time."""
    running, finished, order = [((), 0.0)], [], itertools.count()
    for n in range(1, max_new + 1):
        candidates = []
        for beam, (said, total) in enumerate(running):
            logits = model.function((*prompt, *said)).astype(np.float64)
            for symbol in {*prompt, *said}:
                x = logits[symbol]
                logits[symbol] = x / repetition_penalty if x > 0 else x * repetition_penalty
            step = log_softmax(logits)
            candidates += [(-(total + step[s]), beam, s) for s in range(model.vocab_size) if step[s] > -np.inf]
        before, running = running, []
        for cost, beam, symbol in sorted(candidates):
            said = (*before[beam][0], symbol)
            if len(running) == width:
                break
            if any(said[-len(one) :] == one for one in stop):
                finished.append((cost / n**power, next(order), said))
            else:
                running.append((said, -cost))
    finished += [(-total / max_new**power, next(order), said) for said, total in running]
    return [said for _, _, said in sorted(finished)]


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.6])
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("stop", [[], [(1,)], [(0, 2), (2,), (3, 1, 1)]], ids=str)
@pytest.mark.parametrize("width", [2, 3, 5])
@ENGINES
def test_narrow_beams(engine, width, stop, power, repetition_penalty):
    for seed in range(6):
        shape = (
            None if seed % 2 else lambda logits, history: np.where(np.arange(5) == len(history) % 5, -np.inf, logits)
        )
        model = Whim(5, seed, engine=engine, shape=shape)
        found = model.generate(
            PROMPTS,
            7,
            num_beams=width,
            num_results=width,
            stop=[list(one) for one in stop] or None,
            length_penalty=power,
            repetition_penalty=repetition_penalty,
        )
        for prompt, rows in zip(PROMPTS, found, strict=True):
            wanted = plain_beams(model, prompt, 7, width, stop, power, repetition_penalty)
            assert [tuple(row) for row in rows] == wanted[:width]


@ENGINES
def test_ties_of_beams(engine):
    """Where all is equally likely: lower beams first, then lower ids."""
    model = Whim(3, engine=engine, shape=lambda logits, history: np.zeros(3))
    found = model.generate([], 2, num_beams=4, num_results=4)
    assert [row.tolist() for row in found] == [[0, 0], [0, 1], [0, 2], [1, 0]]
    found = model.generate([], 2, num_beams=4, num_results=4, stop=1, length_penalty=0)
    assert [row.tolist() for row in found] == [[1], [0, 1], [2, 1], [0, 0]]


@ENGINES
def test_beams_end_when_none_can_get_better(engine):
    """All but the stop symbol become unlikely: it ends long before `max_new`, with the same results."""
    model = Whim(6, engine=engine, shape=lambda logits, history: logits + 8 * (np.arange(6) == 5) * (len(history) > 4))
    found = model.generate([[0], [1, 2, 3, 4]], 400, num_beams=3, num_results=3, stop=5, length_penalty=0.2)
    steps = model.spies[-1].steps()
    assert len(steps) < 30 and steps[-1] < steps[0]  # and the second prompt was done before the first
    for prompt, rows in zip([[0], [1, 2, 3, 4]], found, strict=True):
        assert [tuple(row) for row in rows] == plain_beams(model, prompt, 30, 3, [(5,)], 0.2, 1.0)[:3]


@ENGINES
def test_fewer_hypotheses_than_beams(engine):
    model = Whim(2, engine=engine)
    assert [len(rows) for rows in model.generate([[0], []], 1, num_beams=5, num_results=4)] == [2, 2]
    only = Whim(3, engine=engine, shape=lambda logits, history: np.where(np.arange(3) == 1, 0.0, -np.inf))
    assert [row.tolist() for row in only.generate([], 3, num_beams=4, num_results=2)] == [[1, 1, 1]]
    assert [row.tolist() for row in only.generate([], 3, num_beams=4, num_results=2, stop=1)] == [[1]]


@ENGINES
def test_beams_that_stay_are_not_chosen_anew(engine):
    """`choose` is called only where the parents are others than the rows that are there."""
    sharp = Whim(40, engine=engine)
    sharp.generate([[1], [2]], 12, num_beams=3)
    calls = sharp.spies[-1].calls
    assert calls[0] == ("choose", [0, 0, 0, 1, 1, 1]) and calls[1] == ("step", 6)
    rows = 2
    for name, value in calls:
        if name == "choose":
            assert value != list(range(rows))
            rows = len(value)
        else:
            assert value == rows
    assert len(sharp.spies[-1].steps()) == 11
    single = Whim(40, engine=engine)
    single.generate([[1], [2]], 12, temperature=0)
    assert [name for name, _ in single.spies[-1].calls] == ["step"] * 11


def test_beams_cost_a_batch():
    """As many steps as a batch of rows, and no more rows."""
    model = Whim(40)
    model.generate([[1]], 12, num_beams=4)
    assert model.spies[-1].steps() == [4] * 11


# Compiled against NumPy


@DTYPES
@pytest.mark.parametrize("seed", range(40))
def test_compiled_and_reference_agree(seed, dtype):
    """Any settings together: the same symbols, in the same form."""
    rng = np.random.default_rng(seed)
    vocab = int(rng.choice([2, 5, 33, 200]))

    def maybe(*values):
        return values[rng.integers(len(values))]

    settings = {
        "repetition_penalty": maybe(1.0, 1.3, 0.7),
        "num_results": maybe(1, 1, 2, 3),
        "return_log_probs": maybe(True, False),
        "seed": maybe(5, rng.integers(0, 99, 4)),
        "stop": maybe(None, 1, [0, 1], [[1, 0], 0, [0, 0, 1]], []),
    }
    if rng.random() < 0.4:
        settings |= {"num_beams": maybe(3, 4, 6), "length_penalty": maybe(0.0, 1.0, 1.7)}
    else:
        settings |= {
            "temperature": maybe(0, 1.0, 1.0, 0.6, 2.0),
            "top_k": maybe(None, 1, 3, 15, 120),
            "top_p": maybe(None, 0.2, 0.7, 0.95),
        }
    shape = maybe(None, SHAPES["impossible"])
    prompts = [random_ids(vocab, n, seed) for n in (3, 0, 8, 1)]
    compiled, plain = (Whim(vocab, seed, dtype=dtype, engine=e, shape=shape) for e in ("compiled", "reference"))
    same(compiled.generate(prompts, 9, **settings), plain.generate(prompts, 9, **settings))
    # And so do the decoders: of every step the same rows.
    assert compiled.spies[-1].calls == plain.spies[-1].calls


@pytest.mark.parametrize("smoothing", [0.0, 0.5, "witten_bell", "kneser_ney"])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_the_decoders_of_markov_chains_agree(order, smoothing):
    chain = fitted(fs.models.MarkovChain(6, order, smoothing=smoothing), random_sequences(6))
    plain = fitted(fs.reference.models.MarkovChain(6, order, smoothing=smoothing), random_sequences(6))
    prompts = [random_ids(6, n, 3) for n in (5, 0, 1, 2, 30)]
    for settings in [{}, {"temperature": 0}, {"num_beams": 3, "stop": [[1, 2]]}, {"num_results": 3, "stop": 2}]:
        arguments = {"seed": 2, "return_log_probs": True, **settings}
        same(chain.generate(prompts, 15, **arguments), plain.generate(prompts, 15, **arguments))
    logits, decoder = plain._decoder(prompts, 1)
    compiled, _ = chain._decoder(prompts, 1)
    np.testing.assert_allclose(compiled, logits, rtol=1e-14)
    for prompt, row in zip(prompts, logits, strict=True):
        if len(prompt):
            assert_same_bits(row, chain(prompt)[-1])
    decoder.choose(np.array([4, 4, 0]))
    following = decoder.step(np.array([1, 2, 3]))
    for row, history in zip(following, ([*prompts[4], 1], [*prompts[4], 2], [*prompts[0], 3]), strict=True):
        assert_same_bits(row, chain(history)[-1])


# Rows


def models():
    chain = fitted(fs.models.MarkovChain(5, 2, smoothing="witten_bell"), random_sequences(5))
    network = fs.models.RecurrentLM(5, 6, 7, seed=1)
    transformer = fs.models.TransformerLM(5, 8, 2, 1, context=12, seed=1)
    for model in (network, transformer):
        for name in model.parameters:
            model.parameters[name] = model.parameters[name] * 3
    return {"chain": chain, "network": network, "transformer": transformer, "whim": Whim(5)}


MODELS = pytest.mark.parametrize("kind", ["chain", "network", "transformer", "whim"])


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": [7, 8, 9, 10, 7]},
        {"seed": [7, 8, 9, 10, 7], "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.4, "stop": [[1], [2, 3]]},
        {"seed": [7, 8, 9, 10, 7], "num_results": 2},
        {"num_beams": 3, "num_results": 2, "stop": 2, "repetition_penalty": 1.1},
    ],
    ids=str,
)
@MODELS
def test_a_row_depends_on_its_prompt_and_its_seed(kind, settings):
    """Not on the rows beside it, in every bit of its log-probabilities."""
    model = models()[kind]
    together = model.generate(PROMPTS, 20, return_log_probs=True, **settings)
    for i, prompt in enumerate(PROMPTS):
        own = dict(settings)
        if "seed" in own:
            own["seed"] = own["seed"][i]
        alone = model.generate(np.array(prompt, int), 20, return_log_probs=True, **own)
        assert_same_bits(alone[0], together[0][i])
        assert_same_bits(alone[1], together[1][i])
    backwards = dict(settings)
    if "seed" in backwards:
        backwards["seed"] = backwards["seed"][::-1]
    turned = model.generate(PROMPTS[::-1], 20, return_log_probs=True, **backwards)
    for i in range(5):
        assert_same_bits(turned[1][i], together[1][4 - i])
    if "num_beams" not in settings:  # the same prompt and the same seed, at the two ends
        assert_same_bits(together[0][0], together[0][4])


@MODELS
def test_several_draws_of_a_prompt(kind):
    """As if it stood there that often."""
    model = models()[kind]
    several = model.generate([[1], [2, 3], [1]], 8, num_results=3, seed=5, stop=[4])
    repeated = model.generate([[1]] * 3 + [[2, 3]] * 3 + [[1]] * 3, 8, seed=5, stop=[4])
    assert_same_bits([row for rows in several for row in rows], repeated)
    assert len({tuple(row) for row in repeated}) > 3
    assert_same_bits(model.generate([1], 8, num_results=3, seed=5, stop=[4]), several[0])


@MODELS
def test_log_probs_are_those_of_the_model(kind):
    """Whatever was done to the logits, they add up to log P of what was chosen, given the prompt."""
    model = models()[kind]
    settings = {"stop": [1], "repetition_penalty": 1.5}
    for more in [
        {"temperature": 0.7, "top_k": 3, "top_p": 0.9},
        {"temperature": 0},
        {"num_results": 3},
        {"num_beams": 4, "num_results": 3},
    ]:
        ids, log_probs = model.generate(PROMPTS, 9, seed=3, return_log_probs=True, **settings, **more)
        for prompt, rows, values in zip(PROMPTS, ids, log_probs, strict=True):
            if "num_results" not in more:
                rows, values = [rows], [values]
            for row, value in zip(rows, values, strict=True):
                assert row.shape == value.shape and value.dtype == np.float64
                if kind == "whim":
                    chain = [log_softmax(model.function((*prompt, *row[:t])))[row[t]] for t in range(len(row))]
                    np.testing.assert_allclose(value, chain, rtol=1e-12)
                else:
                    both = model.log_prob([[*prompt, *row], prompt])
                    np.testing.assert_allclose(value.sum(), both[0] - both[1], rtol=2e-5)


@MODELS
def test_rows_that_end_leave(kind):
    """They come back as lists of their own lengths, and are no rows of later steps."""
    model = models()[kind]
    free = model.generate(PROMPTS, 15, seed=1)
    ended = model.generate(PROMPTS, 15, seed=1, stop=[2, [3, 3]])
    assert type(ended) is list and len({len(row) for row in ended}) > 1
    for long, row in zip(free, ended, strict=True):
        assert_same_bits(row, long[: len(row)])
        wanted = [t for t in range(15) if long[t] == 2 or (t and long[t] == long[t - 1] == 3)]
        assert len(row) == (wanted[0] + 1 if wanted else 15)
    if kind == "whim":
        lengths = np.array([len(row) for row in ended])
        rows = [int((lengths > t).sum()) for t in range(1, lengths.max())]
        assert model.spies[-1].steps() == rows and rows[-1] < 5


@ENGINES
def test_stop_sequences(engine):
    """They may overlap, and count only where all of them was chosen."""
    path = [4, 1, 1, 1, 2, 3, 1, 2, 3, 4]

    def shape(logits, history):
        return np.arange(5) == path[len(history) - 2]  # what comes after a prompt of two

    def length(stop, prompt=(1, 2)):
        (row,) = Whim(5, engine=engine, shape=shape).generate([prompt], 9, temperature=0, stop=stop)
        assert row.tolist() == path[: len(row)]
        return len(row)

    assert length(4) == length([4]) == length([[4]]) == length(np.array([4])) == length(np.int32(4)) == 1
    assert length([[1, 1, 2]]) == 5  # the first two of three are not the beginning of it
    assert length([[1, 2, 3, 4]]) == 9 and length([[1, 2, 3, 1, 2]]) == 8
    assert length([[2, 4]]) == 9 and length([[1, 2, 4]], (1, 2)) == 9  # began in the prompt
    assert length([[1, 2, 3], 3, [1, 1]]) == 3
    assert length([0, [3, 1], np.array([2, 3])]) == 6
    assert length([]) == 9
    assert length([list(path)]) == 9 and length([path[:9]]) == 9


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 3},
        {"temperature": 0},
        {"seed": 3, "temperature": 0.8, "top_k": 4, "top_p": 0.9, "repetition_penalty": 1.2},
        {"seed": [1, 2, 3, 4, 5], "stop": [1, [2, 2]]},
    ],
    ids=str,
)
@MODELS
def test_a_stream_is_what_generate_gives(kind, settings):
    model = models()[kind]
    together = model.generate(PROMPTS, 12, **settings)
    steps = list(model.stream(PROMPTS, 12, **settings))
    assert all(step.shape == (5,) and step.dtype == np.int64 for step in steps)
    for row, column in zip(together, np.transpose(steps), strict=True):
        assert column[: len(row)].tolist() == row.tolist() and (column[len(row) :] == -1).all()
    assert len(steps) == max(len(row) for row in together)
    alone = {**settings, "seed": settings["seed"][0]} if isinstance(settings.get("seed"), list) else settings
    symbols = list(model.stream(PROMPTS[0], 12, **alone))
    assert all(type(symbol) is int for symbol in symbols)
    assert symbols == model.generate(PROMPTS[0], 12, **alone).tolist()
    assert list(model.stream(PROMPTS, 0)) == list(model.stream(np.zeros((0, 3), int), 4)) == []
    padded = np.array([[0, 1, -9], [2, -9, -9]])
    assert_same_bits(
        np.transpose(list(model.stream(padded, 5, lengths=[2, 1], seed=1))),
        model.generate([[0, 1], [2]], 5, seed=1),
    )


@ENGINES
def test_a_stream_computes_what_is_asked_for(engine):
    model = Whim(5, engine=engine)
    stream = model.stream([1, 2], 400, seed=1)
    for n in range(5):
        next(stream)
        assert len(model.spies[-1].steps()) == n
    stream.close()
    long = model.generate([1, 2], 400, seed=1)
    assert list(model.stream([1, 2], 400, seed=1)) == long.tolist()  # more steps than there is room for at first


@ENGINES
def test_more_steps_than_there_is_room_for_at_first(engine):
    for settings in [{"seed": 1}, {"num_beams": 2, "num_results": 2}]:
        model = Whim(7, engine=engine, shape=lambda logits, history: np.where(np.arange(7) == 6, -np.inf, logits))
        known = model.generate([[1], [2]], 600, **settings, return_log_probs=True)
        grown = model.generate([[1], [2]], 600, **settings, return_log_probs=True, stop=6)
        for row, long in zip([*grown[0], *grown[1]], [*known[0], *known[1]], strict=True):
            same(row, long)


# What models with an end symbol of their own need


class Ending(Whim):
    """Outputs 0..V-1 and an end, V; prompts are of other symbols."""

    def __init__(self, vocab_size, seed=0, **settings):
        super().__init__(vocab_size, seed, logits=vocab_size + 1, **settings)

    def given(self, prompts):
        rows = [np.array(prompt, np.int64) for prompt in prompts]
        begin = functools.partial(self._decoder, rows)
        return decoding.Given(rows, begin, False, self.vocab_size, self._backend.decoding, end=self.vocab_size)

    def begun(self, prompts, max_new, **settings):
        return decoding.generated(self.given(prompts), decoding.Options(max_new, **settings))

    def streamed(self, prompts, max_new, **settings):
        return decoding.streamed(self.given(prompts), decoding.Options(max_new, **settings))


@ENGINES
def test_an_end_is_no_symbol(engine):
    model = Ending(5, engine=engine)
    prompts = [[90, 91], [92], [], [93, 91, 90]]  # of another vocabulary
    ids, log_probs = model.begun(prompts, 14, seed=2, stop=[[3, 3], 1], return_log_probs=True)
    plain = Whim(6, engine=engine)
    whole = plain.generate([[]] * 4, 14, seed=2)
    assert whole.shape == (4, 14)
    ways = set()
    for prompt, row, value in zip(prompts, ids, log_probs, strict=True):
        said = tuple(int(symbol) for symbol in row)
        ended = len(value) == len(row) + 1
        stopped = said[-1:] == (1,) or said[-2:] == (3, 3)
        assert ended or stopped or len(row) == 14
        assert 5 not in said and row.dtype == np.int64
        ways.add((ended, stopped))
        for t, symbol in enumerate((*said, 5)[: len(value)]):
            assert value[t] == pytest.approx(log_softmax(model.function((*prompt, *said[:t])))[symbol], rel=1e-12)
    assert {(True, False), (False, True)} <= ways
    steps = np.array(list(model.streamed(prompts, 14, seed=2, stop=[[3, 3], 1])))
    for row, column in zip(ids, steps.T, strict=True):
        assert column[: len(row)].tolist() == row.tolist() and (column[len(row) :] == -1).all()
    assert (steps >= 0).any(axis=1).all()
    beams = model.begun(prompts, 6, num_beams=3, num_results=3, return_log_probs=True)
    for rows, values in zip(*beams, strict=True):
        sums = [value.sum() / len(value) for value in values]
        assert sums == sorted(sums, reverse=True)
        assert all(len(value) - len(row) in (0, 1) and 5 not in row for row, value in zip(rows, values, strict=True))
    assert [row.tolist() for row in model.begun(prompts, 0)] == [[]] * 4
    with pytest.raises(ValueError, match=r"stop should be in 0\.\.4, but stop is 5"):
        model.begun(prompts, 3, stop=5)


@ENGINES
def test_the_prompt_of_another_vocabulary_has_no_penalty(engine):
    """Only what was chosen is penalised; a language model penalises its prompt, too."""
    flat = {"shape": lambda logits, history: np.array([3.0, 2.0, 1.0, -9.0]), "engine": engine}
    (row,) = Ending(3, **flat).begun([[0, 0]], 3, temperature=0, repetition_penalty=10)
    assert row.tolist() == [0, 1, 2]
    row = Whim(4, **flat).generate([0, 0], 4, temperature=0, repetition_penalty=10)
    assert row.tolist() == [1, 2, 0, 0]  # 0.3, 0.2 and 0.1, and never the one whose logit got lower


# The struct


@pytest.mark.parametrize("settings", [{"seed": 1}, {"num_beams": 3}, {"stop": 0, "seed": 2, "num_results": 2}], ids=str)
@pytest.mark.parametrize("full_at", [0, 1, 4])
def test_a_decoder_that_is_full_is_renewed(full_at, settings):
    """With the whole histories of the rows that go on, but for the symbols it was about to be told."""
    model, plain = Whim(5, full_at=full_at), Whim(5)
    wanted = plain.generate(PROMPTS, 9, **settings)
    got = model.generate(PROMPTS, 9, **settings)
    assert len(model.spies[-1].renewed) == 1
    same(got, wanted)
    assert model.spies[-1].calls == plain.spies[-1].calls


def test_a_decoder_without_memory():
    with pytest.raises(MemoryError, match="states of the rows"):
        Whim(5, no_memory_at=3).generate(PROMPTS, 9)


def test_logits_of_another_kind_than_the_decoder_gives():
    model = Whim(5)
    spy = model._decoder([np.zeros(1, np.int64)], 1)[1]
    for wrong in np.zeros((1, 5), np.float32), np.zeros((2, 5)), np.zeros((1, 4)):
        with pytest.raises(ValueError, match="logits should be of float64 and of shape"):
            fs._decoding.search(
                spy, wrong, [np.zeros(1, np.int64)], np.zeros(1, np.uint64), decoding.Options(3, stop=())
            )


# The options, declared and documented once


@pytest.mark.parametrize("verb", ["generate", "stream"])
@pytest.mark.parametrize("kind", ["MarkovChain", "RecurrentLM", "TransformerLM", "Seq2Seq", "TransformerSeq2Seq"])
def test_generate_and_stream_take_the_options(kind, verb):
    function = getattr(getattr(fs.models, kind), verb)
    taken = dict(list(inspect.signature(function).parameters.items())[2:])
    assert taken.pop("lengths").default is None
    fields = {field.name: field for field in dataclasses.fields(decoding.Options)}
    if verb == "generate":
        assert list(taken) == list(fields)
    assert [name for name in fields if name in taken] == list(taken)
    for name, parameter in taken.items():
        default = fields[name].default
        assert parameter.default == (inspect.Parameter.empty if default is dataclasses.MISSING else default)
        assert re.search(rf"^{name} : ", inspect.getdoc(function), re.MULTILINE)
    assert "{" not in function.__doc__


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        decoding.Options(3).temperature = 0.0


# Bad input


BAD = [
    ({"max_new": -1}, ValueError, "max_new should be at least 0"),
    ({"max_new": 1.5}, TypeError, "max_new should be an integer"),
    ({"max_new": True}, TypeError, "max_new should be an integer"),
    ({"temperature": -0.1}, ValueError, "temperature should be at least 0"),
    ({"temperature": np.inf}, ValueError, "temperature should be at least 0"),
    ({"temperature": "1"}, TypeError, "temperature should be a number"),
    ({"top_k": 0}, ValueError, "top_k should be at least 1"),
    ({"top_k": 2.0}, TypeError, "top_k should be an integer"),
    ({"top_p": -0.1}, ValueError, "top_p should be at least 0"),
    ({"top_p": 1.1}, ValueError, "top_p should be at most 1"),
    ({"top_p": np.nan}, ValueError, "top_p should be"),
    ({"top_p": [0.5]}, TypeError, "top_p should be a number"),
    ({"repetition_penalty": 0}, ValueError, "repetition_penalty should be more than 0"),
    ({"num_beams": 0}, ValueError, "num_beams should be at least 1"),
    ({"num_beams": 2, "temperature": 0.5}, ValueError, "temperature should be 0 or 1 where num_beams is 2"),
    ({"num_beams": 2, "top_k": 5}, ValueError, "top_k should be None where num_beams is 2"),
    ({"num_beams": 2, "top_p": 0.5}, ValueError, "top_p should be None where num_beams is 2"),
    ({"num_beams": 2, "num_results": 3}, ValueError, "num_results should be at most num_beams, 2, not 3"),
    ({"length_penalty": -1}, ValueError, "length_penalty should be at least 0"),
    ({"num_results": 0}, ValueError, "num_results should be at least 1"),
    ({"return_log_probs": 1}, TypeError, "return_log_probs should be True or False"),
    ({"stop": 5}, ValueError, r"stop should be in 0\.\.4, but stop is 5"),
    ({"stop": [1, -1]}, ValueError, r"stop\[1\] should be in 0\.\.4"),
    ({"stop": [[1, 7]]}, ValueError, r"stop\[0\] should be in 0\.\.4, but stop\[0\]\[1\] is 7"),
    ({"stop": [1, []]}, ValueError, r"stop\[1\] should be an id or a sequence of at least one id"),
    ({"stop": [[[1]]]}, ValueError, r"stop\[0\] should be an id or a sequence"),
    ({"stop": "a"}, TypeError, "stop should be ids or sequences of ids"),
    ({"stop": b"a"}, TypeError, "stop should be ids or sequences of ids"),
    ({"stop": ["a"]}, TypeError, r"stop\[0\] should hold integers"),
    ({"stop": 1.5}, TypeError, "stop should hold integers"),
    ({"stop": True}, TypeError, "stop should hold integers"),
    ({"stop": {1: 2}}, TypeError, "stop should hold integers"),
    ({"seed": -1}, ValueError, "seed should be at least 0"),
    ({"seed": 1.5}, TypeError, "seed should be an integer"),
    ({"seed": [1]}, ValueError, r"seed should be an integer, or of shape \(2,\), one a row, not \(1,\)"),
    ({"seed": [[1, 2]]}, ValueError, "seed should be an integer, or of shape"),
    ({"seed": [1, -2]}, ValueError, r"seed\[1\] should be at least 0"),
    ({"seed": [1.0, 2.0]}, TypeError, "seed should hold integers"),
    ({"seed": [True, False]}, TypeError, "seed should hold integers"),
    ({"prompt": [[0], [5]]}, ValueError, r"prompt\[1\] should be in 0\.\.4, but prompt\[1\]\[0\] is 5"),
    ({"prompt": [[[0]]]}, ValueError, "prompt"),
    ({"prompt": np.zeros((1, 2, 3), int)}, ValueError, "prompt should be of shape"),
    ({"prompt": np.zeros((2, 3))}, TypeError, "prompt should hold integers"),
    ({"prompt": np.zeros((2, 3), int), "lengths": [1, 4]}, ValueError, r"lengths should be in 0\.\.3"),
]


@pytest.mark.parametrize("model", [Whim(5), fs.models.RecurrentLM(5, 2, 2)], ids=["whim", "network"])
@pytest.mark.parametrize(("wrong", "error", "message"), BAD, ids=[f"{wrong}" for wrong, _, _ in BAD])
def test_bad_arguments(model, wrong, error, message):
    """Each is named, by `generate` as by `stream`, before anything is computed, however little is asked for."""
    arguments = {"prompt": [[0], [1]], "max_new": 3, **wrong}
    for max_new in {arguments["max_new"], 0} if arguments["max_new"] == 3 else {arguments["max_new"]}:
        with pytest.raises(error, match=message):
            model.generate(**{**arguments, "max_new": max_new})
    if not {"num_beams", "num_results", "length_penalty", "return_log_probs"} & set(wrong):
        with pytest.raises(error, match=message):
            model.stream(**arguments)


@DTYPES
@ENGINES
def test_logits_that_are_nan_or_all_impossible(engine, dtype):
    """The row and the step are named; wherever in the row the NaN stands."""
    ways = [
        {},
        {"temperature": 0},
        {"num_beams": 2},
        {"repetition_penalty": 1.3},
        {"num_beams": 2, "repetition_penalty": 2.0},
    ]
    for place, value, settings in itertools.product([0, 63, 64, 699], [np.nan, np.inf], ways):

        def shape(logits, history, place=place, value=value):
            bad = history[:1] == (2,) and len(history) == 5
            return np.where((np.arange(700) == place) & bad, value, logits)

        model = Whim(700, dtype=dtype, engine=engine, shape=shape)
        with pytest.raises(ValueError, match="prompt 1 at step 3 are NaN or infinite: the weights"):
            model.generate([[1], [2, 3], [3]], 6, seed=1, **settings)
    for settings in ways:

        def nothing(logits, history):
            return np.full(6, -np.inf) if len(history) == 2 else logits

        model = Whim(6, dtype=dtype, engine=engine, shape=nothing)
        with pytest.raises(ValueError, match="prompt 0 at step 1 are all -inf: nothing is left"):
            model.generate([[1], []], 6, seed=1, **settings)
        with pytest.raises(ValueError, match="prompt 1 at step 0 are all -inf"):
            model.generate([[1], [2, 3]], 6, seed=1, **settings)


@pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
def test_weights_that_are_nan(module):
    model = module.models.RecurrentLM(5, 3, 4, seed=0)
    weight = np.array(model.parameters["output.weight"])
    weight[3, 2] = np.nan
    model.parameters["output.weight"] = weight
    for settings in {}, {"temperature": 0}, {"num_beams": 3}:
        with pytest.raises(ValueError, match="prompt 0 at step 0 are NaN or infinite: the weights"):
            model.generate([[1], [2]], 4, **settings)
    with pytest.raises(ValueError, match="weights"):
        next(model.stream([1], 4))


@ENGINES
def test_nothing_to_do(engine):
    model = Whim(5, engine=engine)
    assert_same_bits(model.generate([[1], [2]], 0), np.empty((2, 0), np.int64))
    assert_same_bits(model.generate([1], 0), np.empty(0, np.int64))
    assert_same_bits(model.generate(np.zeros((0, 4), int), 3), np.empty((0, 3), np.int64))
    assert_same_bits(model.generate([[1], [2]], 0, stop=1), [np.empty(0, np.int64)] * 2)
    assert model.generate(np.zeros((0, 4), int), 3, stop=1) == []
    assert model.generate(np.zeros((0, 4), int), 3, num_results=2) == []
    assert model.generate(np.zeros((0, 4), int), 3, seed=[]).shape == (0, 3)
    ids, log_probs = model.generate([[1], [2]], 0, num_results=2, num_beams=3, return_log_probs=True)
    assert_same_bits(ids, [[np.empty(0, np.int64)] * 2] * 2)
    assert_same_bits(log_probs, [[np.empty(0)] * 2] * 2)
    assert not model.spies


def test_more_symbols_than_any_memory():
    """Without `stop` their number is known, and there is no room for them; with it, it is only the most."""
    chain = models()["chain"]
    for many in 1 << 50, (1 << 63) - 1:
        with pytest.raises((MemoryError, ValueError, OverflowError)):
            chain.generate([[1]], many)
        with pytest.raises((MemoryError, ValueError, OverflowError)):
            chain.generate([[1]], many, num_beams=2)
        assert len(chain.generate([[1]], many, stop=2, seed=1)[0]) < 100
        # A search ends once as many hypotheses as beams have ended and none can become better; here all end at once.
        everything = list(range(chain.vocab_size))
        assert len(chain.generate([[1]], many, stop=everything, num_beams=2, length_penalty=0)[0]) == 1
    assert chain.generate([[1]], 5).shape == (1, 5)


# Threads and signals


@MODELS
def test_many_python_threads_use_one_model(kind):
    model = models()[kind]
    work = [
        {"prompt": PROMPTS[: 1 + i % 5], "max_new": 5 + i, **({"num_beams": 3} if i % 3 else {"seed": i, "top_k": 3})}
        for i in range(12)
    ]
    expected = [model.generate(**one) for one in work]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda one: model.generate(**one), work))
    for a, e in zip(results, expected, strict=True):
        assert_same_bits(a, e)


def test_streams_in_turn():
    """Two streams of one model know nothing of each other."""
    for model in models().values():
        alone = [list(model.stream([1, 2], 9, seed=seed)) for seed in (1, 2)]
        streams = [model.stream([1, 2], 9, seed=seed) for seed in (1, 2)]
        assert np.transpose(list(zip(*streams, strict=True))).tolist() == alone


ENDLESS = """
import signal
import numpy as np, fastseq as fs
from common import assert_same_bits
signal.signal(signal.SIGINT, signal.default_int_handler)
chain = fs.models.MarkovChain(50, 1)
chain.fit(np.arange(200) % 49)
use = lambda: chain.generate([[1], [2]], 20, seed=1)
expected = use()
ways = [{"stop": [[49] * 20], "seed": 1}, {"num_beams": 3, "stop": [[49] * 20]}]
for way in ways:
    print("ready", flush=True)
    try:
        chain.generate([[1], [2]], 1 << 40, **way)
        print("ran to the end")
    except KeyboardInterrupt:
        print("interrupted")
    assert_same_bits(use(), expected)
print("usable")
"""


def test_control_c():
    """A search without end ends with KeyboardInterrupt, and all works after it."""
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS], env=child_environment(), stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            said = []
            for line in child.stdout:
                said.append(line.strip())
                if said[-1] == "ready":
                    time.sleep(0.2)  # into the search
                    child.send_signal(signal.SIGINT)
        finally:
            child.kill()
    assert said == ["ready", "interrupted", "ready", "interrupted", "usable"]


def test_signals_are_looked_for_often():
    """However short the steps: a handler runs all through a search that does not come back to Python."""
    chain = fitted(fs.models.MarkovChain(50, 1), np.arange(200) % 49)
    looks = []
    before = signal.signal(signal.SIGALRM, lambda *_: looks.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        begun = time.process_time()
        while time.process_time() - begun < 0.6:
            chain.generate([[1]], 400_000, seed=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(looks) >= 5
