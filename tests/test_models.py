"""The models: against counting by hand, other people's least squares, enumeration, and themselves step by step."""

import copy
import importlib.util
import itertools
import math
import pickle

import numpy as np
import pytest
from common import assert_close, assert_same_bits, threads

import fastseq as fs
from fastseq import _models
from fastseq.models.base import Uniforms, sample
from fastseq.reference import autoregression

SMOOTHINGS = [1.0, 0.3, "witten_bell", "kneser_ney"]
needs_statsmodels = pytest.mark.skipif(
    importlib.util.find_spec("statsmodels") is None, reason="the package statsmodels is not installed"
)


def random_ids(vocab, shape, seed=0):
    """Ids of unequal frequency."""
    rng = np.random.default_rng([seed, 11])
    return np.minimum(rng.integers(0, vocab, shape), rng.integers(0, vocab, shape))


def random_sequences(vocab, seed=0):
    return [random_ids(vocab, n, seed + n) for n in (17, 0, 40, 1, 3, 25)]


def series(shape, seed=0):
    """Series that a model of order 2 would make, far from 0."""
    rng = np.random.default_rng([seed, 12])
    x = rng.normal(size=shape)
    for t in range(2, shape[-1]):
        x[..., t] += 0.6 * x[..., t - 1] - 0.3 * x[..., t - 2]
    return x + 20


def by_hand(sequences, vocab, order, smoothing, history, symbol):
    """P(symbol | history) by looking through all sequences, as the papers define it."""

    def grams(length):
        for s in sequences:
            padded = [vocab] * order + list(map(int, s))
            for t in range(order, len(padded)):
                yield (*padded[t - length : t], padded[t])

    history = ([vocab] * order + list(history))[len(history) :] if order else []

    def lower(length):
        if length < 0:
            return 1 / vocab
        context = tuple(history[order - length :])
        seen = list(grams(length))
        if smoothing == "kneser_ney" and length < order:
            longer = set(grams(length + 1))
            counts = {}
            for g in set(seen):
                begins = length > 0 and g[0] == vocab
                counts[g] = seen.count(g) if begins else sum(other[1:] == g for other in longer)
        else:
            counts = {g: seen.count(g) for g in set(seen)}
        here = {g: c for g, c in counts.items() if g[:-1] == context}
        if not here:
            return lower(length - 1)
        total, count = sum(here.values()), here.get((*context, symbol), 0)
        if smoothing == "witten_bell":
            return (count + len(here) * lower(length - 1)) / (total + len(here))
        n = [sum(c == k for c in counts.values()) for k in (1, 2, 3, 4)]
        d = [0.5, 0.5, 0.5]
        if all(n[:3]):
            y = n[0] / (n[0] + 2 * n[1])
            d = [1 - 2 * y * n[1] / n[0], 2 - 3 * y * n[2] / n[1], 3 - 4 * y * n[3] / n[2]]
            d = [min(max(v, 0.1), k) for k, v in zip((1, 2, 3), d, strict=True)]
        spread = sum(d[min(c, 3) - 1] for c in here.values())
        kept = count - d[min(count, 3) - 1] if count else 0
        return (kept + spread * lower(length - 1)) / total

    if isinstance(smoothing, str):
        return lower(order)
    seen = [g for g in grams(order) if g[:-1] == tuple(history)]
    if not seen and not smoothing:
        return 1 / vocab
    return (sum(g[-1] == symbol for g in seen) + smoothing) / (len(seen) + smoothing * vocab)


@pytest.mark.parametrize("smoothing", [0.0, *SMOOTHINGS])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_markov_counts_as_by_hand(order, smoothing):
    vocab, sequences = 4, random_sequences(4)
    model = fs.models.MarkovChain(vocab, order, smoothing=smoothing).fit(sequences)
    x = random_ids(vocab, 7, seed=5)
    with np.errstate(divide="ignore"):
        predicted = np.exp(model(x))
    for t in range(7):
        history = x[: t + 1]
        wanted = [by_hand(sequences, vocab, order, smoothing, history, s) for s in range(vocab)]
        np.testing.assert_allclose(predicted[t], wanted, rtol=1e-12)
    chain = [by_hand(sequences, vocab, order, smoothing, x[:t], x[t]) for t in range(7)]
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(model.log_prob(x), [np.log(chain).sum()], rtol=1e-12)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("order", [0, 1, 2, 4])
def test_markov_probabilities_of_all_sequences_sum_to_one(order, smoothing):
    model = fs.models.MarkovChain(3, order, smoothing=smoothing).fit(random_sequences(3))
    everything = np.array(list(itertools.product(range(3), repeat=5)))
    assert np.exp(model.log_prob(everything)).sum() == pytest.approx(1, abs=1e-12)


def test_markov_forms_of_sequences():
    sequences = random_sequences(5)
    lengths = np.array([len(s) for s in sequences])
    padded = np.full((len(sequences), 50), -99)  # what is no id may stand in the padding
    for row, s in zip(padded, sequences, strict=True):
        row[: len(s)] = s
    model = fs.models.MarkovChain(5, 2).fit(sequences)
    twin = fs.models.MarkovChain(5, 2).fit(padded.astype(np.int16), lengths.astype(np.uint8))
    p = model.log_prob(sequences)
    assert p.shape == (6,) and p[1] == 0
    assert_same_bits(twin.log_prob(padded, lengths), p)
    for i, s in enumerate(sequences):
        assert_same_bits(model.log_prob(s), p[i : i + 1])
    y = model(padded, lengths=lengths)
    assert y.shape == (6, 50, 5)
    for row, s in zip(y, sequences, strict=True):
        assert_same_bits(row[: len(s)], model(s))
        assert (row[len(s) :] == 0).all()
    n = lengths.sum()
    assert model.bits_per_symbol(sequences) == pytest.approx(-p.sum() / n / math.log(2))
    assert model.perplexity(padded, lengths) == pytest.approx(math.exp(-p.sum() / n))


def test_markov_call_is_what_log_prob_adds():
    model = fs.models.MarkovChain(6, 3, smoothing="kneser_ney").fit(random_sequences(6))
    x = random_ids(6, (4, 9))
    first = model.log_prob(x[:, :1])
    rest = np.take_along_axis(model(x)[:, :-1], x[:, 1:, None], 2)[..., 0]
    np.testing.assert_allclose(model.log_prob(x), first + rest.sum(1), rtol=1e-13)


def test_markov_without_data_knows_nothing():
    for smoothing in [0.0, *SMOOTHINGS]:
        for nothing in [], [[]], np.zeros((3, 0), int):
            model = fs.models.MarkovChain(4, 2, smoothing=smoothing).fit(nothing)
            np.testing.assert_allclose(model.log_prob([[0, 1, 2], []]), [-3 * np.log(4), 0])
    assert model(np.zeros((2, 0), int)).shape == (2, 0, 4)
    assert model.log_prob(np.zeros((0, 5), int)).shape == (0,)
    with pytest.raises(ValueError, match="sequences should hold at least one symbol"):
        model.perplexity([[]])


def made_by_order_two(n, seed):
    """Symbols that need two before them: one of three follows, chosen by their sum."""
    rng = np.random.default_rng(seed)
    x = [0, 1]
    for u in rng.random(n):
        x.append((x[-1] + 2 * x[-2] + (u < 0.2)) % 3)
    return np.array(x)


@pytest.mark.parametrize("criterion", ["bic", "aic", "held_out"])
def test_markov_choose_finds_the_order(criterion):
    held_out = made_by_order_two(3000, 2) if criterion == "held_out" else None
    x = made_by_order_two(3000, 1)
    chosen = fs.models.MarkovChain.choose(x, 3, range(6), criterion, held_out)
    assert chosen.order == 2
    assert_same_bits(chosen.log_prob(x), fs.models.MarkovChain(3, 2).fit(x).log_prob(x))


def test_markov_criteria_by_hand():
    sequences = random_sequences(3)
    model = fs.models.MarkovChain(3, 2).fit(sequences)
    log_likelihood, n = 0.0, 0
    for s in sequences:
        for t in range(2, len(s)):
            following = [u[i] for u in sequences for i in range(2, len(u)) if (u[i - 2 : i] == s[t - 2 : t]).all()]
            log_likelihood += math.log(following.count(s[t]) / len(following))
            n += 1
    assert model.aic() == pytest.approx(2 * 18 - 2 * log_likelihood)
    assert model.bic() == pytest.approx(math.log(n) * 18 - 2 * log_likelihood)


def test_generate_follows_the_distribution():
    """Chi-square of the pairs that were drawn; 99.9 % points, and a planted mistake beyond them."""
    rng = np.random.default_rng(0)
    model = fs.models.MarkovChain(4, 1, smoothing=0.5).fit(random_ids(4, 300))
    drawn = model.generate(np.full((3000, 1), 2), 2, seed=3)
    p = np.exp(model(np.array([[0], [1], [2], [3]]))[:, 0])
    wanted = 3000 * p[2][:, None] * p
    seen = np.zeros((4, 4))
    np.add.at(seen, (drawn[:, 0], drawn[:, 1]), 1)
    assert ((seen - wanted) ** 2 / wanted).sum() < 37.7  # 15 degrees of freedom
    other = rng.permutation(drawn[:, 1])
    seen[:] = 0
    np.add.at(seen, (drawn[:, 0], other), 1)
    assert ((seen - wanted) ** 2 / wanted).sum() > 37.7


def test_temperature_sharpens():
    logits = np.log(np.array([[0.5, 0.3, 0.2]])).repeat(20000, 0)
    u = Uniforms(1, np.arange(20000, dtype=np.uint64)).draw(0)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.01
    for temperature in (0.5, 1.0, 2.0):
        p = np.array([0.5, 0.3, 0.2]) ** (1 / temperature)
        share = np.bincount(sample(logits, temperature, u), minlength=3) / 20000
        np.testing.assert_allclose(share, p / p.sum(), atol=0.015)
    assert (sample(logits, 0.0, u) == 0).all() and (sample(logits, 1e-300, u) == 0).all()
    never = np.array([[-np.inf, 0.0, -np.inf]])
    assert sample(never, 1.0, np.zeros(1)) == sample(never, 1.0, np.array([1 - 2.0**-52])) == 1


def check_generate(model, vocab):
    """What every `generate` promises."""
    prompts = [random_ids(vocab, n, seed=n) for n in (5, 0, 2, 9)]
    lengths = [len(p) for p in prompts]
    padded = np.full((4, 9), -1)
    for row, p in zip(padded, prompts, strict=True):
        row[: len(p)] = p
    together = model.generate(prompts, 12, seed=7)
    assert together.shape == (4, 12) and together.dtype == np.int64
    assert_same_bits(model.generate(padded, 12, lengths=lengths, seed=7), together)
    for p, row in zip(prompts, together, strict=True):
        assert_same_bits(model.generate(p[None], 12, seed=7), row[None])
        assert_same_bits(model.generate(p, 12, seed=7), row)
        assert_same_bits(model.generate(p, 5, seed=7), row[:5])
    assert (model.generate(prompts, 12, seed=8) != together).any()
    assert (model.generate(prompts, 12) != model.generate(prompts, 12)).any()
    many = model.generate(np.zeros((6, 3), int), 12, seed=1)
    assert len(np.unique(many, axis=0)) > 1
    assert_same_bits(many[:3], model.generate(np.zeros((3, 3), int), 12, seed=1))
    likeliest = model.generate(prompts, 3, temperature=0)
    for p, row in zip(prompts, likeliest, strict=True):
        if len(p):
            assert row[0] == np.ravel(model(p)[-1]).argmax()
    assert model.generate(prompts, 0).shape == (4, 0)
    assert model.generate(np.zeros((0, 3), int), 4).shape == (0, 4)
    for wrong, kind, message in [
        ({"max_new": -1}, ValueError, "max_new should be at least 0"),
        ({"max_new": 2.0}, TypeError, "max_new should be an integer"),
        ({"temperature": -1}, ValueError, "temperature should be at least 0"),
        ({"temperature": math.nan}, ValueError, "temperature should be at least 0"),
        ({"temperature": "hot"}, TypeError, "temperature should be a number"),
        ({"seed": -1}, ValueError, "seed should be at least 0"),
        ({"prompt": [[0, vocab]]}, ValueError, rf"but prompt\[0\]\[1\] is {vocab}"),
    ]:
        with pytest.raises(kind, match=message):
            model.generate(**{"prompt": [[0]], "max_new": 3, **wrong})


@pytest.mark.parametrize("order", [0, 1, 3])
def test_markov_generate(order):
    check_generate(fs.models.MarkovChain(5, order, smoothing="witten_bell").fit(random_sequences(5)), 5)


def test_markov_save_load_pickle(tmp_path):
    x = random_sequences(5)
    for model in [
        fs.models.MarkovChain(5, 3, smoothing="kneser_ney").fit(x),
        fs.models.MarkovChain(5, 0, smoothing=0.25).fit(x),
        fs.models.MarkovChain(5, 2).fit([]),
    ]:
        model.save(tmp_path / "m.safetensors")
        for twin in fs.load(tmp_path / "m.safetensors"), pickle.loads(pickle.dumps(model)), copy.deepcopy(model):
            assert repr(twin) == repr(model)
            assert_same_bits(twin.log_prob(x), model.log_prob(x))
    other = fs.models.MarkovChain(5, 2)
    assert "not fitted" in repr(other)
    other.save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="this MarkovChain should be fitted first"):
        fs.load(tmp_path / "m.safetensors").log_prob(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [1, 2]}, "counts should be of shape"),
        ({"grams": [[0, 1, 2]] * 2, "counts": [1, 2]}, "different"),
        ({"grams": [[0, 1, 2]], "counts": [0]}, "at least 1"),
        ({"grams": [[0, 9, 9]], "counts": [1]}, "but grams"),
        ({"grams": [[0, 3, 1]], "counts": [1]}, "begin symbols before"),
        ({"grams": [[3, 3, 3]], "counts": [1]}, "begin symbols before"),
        ({"grams": [[0, 1]], "counts": [1]}, "grams should be of shape"),
        ({"grams": [[0.0, 1.0, 1.0]], "counts": [1]}, "grams should hold integers"),
        ({"more": [1]}, "more is unknown"),
        ({"counts": None}, "counts should be there too"),
    ],
)
def test_markov_state_dict_that_does_not_fit(change, message):
    model = fs.models.MarkovChain(3, 2).fit(random_sequences(3))
    before = model.log_prob([[0, 1, 2]])
    wrong = {name: value for name, value in {**model.state_dict(), **change}.items() if value is not None}
    wrong = {name: np.array(value) for name, value in wrong.items()}
    if "counts" in change and "grams" not in change and "counts" in wrong:
        wrong["grams"] = wrong["grams"][:3]
    with pytest.raises((ValueError, TypeError), match=message):
        model.load_state_dict(wrong)
    assert_same_bits(model.log_prob([[0, 1, 2]]), before)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m: m.fit([[0, 1], [2, 3]]), ValueError, r"should be in 0..2, but sequences\[1\]\[1\] is 3"),
        (lambda m: m.fit(np.array([[0, 1], [2, -1]])), ValueError, r"but sequences\[1, 1\] is -1"),
        (lambda m: m.log_prob([[0.0, 1.0]]), TypeError, r"sequences\[0\] should hold integers, not float64"),
        (lambda m: m.log_prob(np.ones((2, 3), bool)), TypeError, "integers, not bool"),
        (lambda m: m.log_prob("word"), ValueError, r"sequences should be of shape \(B, T\)"),
        (lambda m: m.log_prob(["word"]), TypeError, "sequences should hold integers, not <U4"),
        (lambda m: m.log_prob([[1, [2]]]), ValueError, r"sequences\[0\] should be an array"),
        (lambda m: m.log_prob(np.zeros((2, 3, 4), int)), ValueError, "should be of shape"),
        (lambda m: m.log_prob([[[1]], [[2]]]), ValueError, r"sequences\[0\] should be a sequence of ids"),
        (lambda m: m.log_prob([[1, 2]], [3]), ValueError, "lengths should be in 0..2"),
        (lambda m: m.log_prob([[1, 2]], [1, 2]), ValueError, "lengths should be of shape"),
        (lambda m: m(np.array([0, 5])), ValueError, r"but x\[1\] is 5|but x\[0, 1\] is 5"),
        (lambda m: type(m)(0), ValueError, "vocab_size should be at least 1"),
        (lambda m: type(m)(2**40), OverflowError, "vocab_size should be at most"),
        (lambda m: type(m)(3, -1), ValueError, "order should be at least 0"),
        (lambda m: type(m)(3, smoothing=-1.0), ValueError, "smoothing should be at least 0"),
        (lambda m: type(m)(3, smoothing=math.inf), ValueError, "smoothing should be at least 0"),
        (lambda m: type(m)(3, smoothing="none"), ValueError, "smoothing should be one of 'witten_bell'"),
        (lambda m: type(m)(3, smoothing=None), TypeError, "smoothing should be a number"),
        (lambda m: type(m)(3).log_prob([[1]]), ValueError, "should be fitted first"),
        (lambda m: type(m)(3).bic(), ValueError, "should be fitted first"),
        (lambda m: m.choose([[1]], 3, []), ValueError, "orders should hold at least one"),
        (lambda m: m.choose([[1]], 3, [4]), ValueError, "sequences should hold symbols with 4 others before"),
        (lambda m: m.choose([[1]], 3, criterion="best"), ValueError, "criterion should be one of 'bic'"),
        (lambda m: m.choose([[1]], 3, criterion="held_out"), ValueError, "held_out should be given"),
        (lambda m: m.choose([[1]], 3, held_out=[[1]]), ValueError, "held_out should be given"),
    ],
)
def test_markov_bad_input(call, kind, message):
    model = fs.models.MarkovChain(3, 1).fit([[0, 1, 2]])
    with pytest.raises(kind, match=message):
        call(model)


# --- AutoRegressive


@needs_statsmodels
@pytest.mark.parametrize("order", [1, 2, 9, 20])
def test_autoregressive_agrees_with_statsmodels_on_the_sunspots(order):
    from statsmodels.datasets import sunspots
    from statsmodels.tsa.ar_model import AutoReg

    x = sunspots.load().data["SUNACTIVITY"].to_numpy(float)
    theirs = AutoReg(x, order, trend="c").fit()
    ours = fs.models.AutoRegressive(order).fit(x)
    np.testing.assert_allclose(np.r_[ours.intercept, ours.coefficients[0]], theirs.params, rtol=1e-9, atol=1e-9)
    assert ours.sigma2[0] == pytest.approx(theirs.sigma2, rel=1e-10)
    for name, value in (("aic", theirs.aic), ("bic", theirs.bic)):
        assert getattr(ours, name)()[0] == pytest.approx(value, rel=1e-10)
    assert ours.log_prob(x)[0] == pytest.approx(theirs.llf, rel=1e-10)
    np.testing.assert_allclose(ours.forecast(x, 40), theirs.predict(len(x), len(x) + 39), rtol=1e-9)
    np.testing.assert_allclose(ours(x)[order - 1 : -1], theirs.fittedvalues, rtol=1e-9)


@pytest.mark.parametrize("order", [1, 3])
def test_autoregressive_many_series_are_each_fitted_by_least_squares(order):
    lengths = np.array([60, 9, 33, 60])
    x = series((4, 60))
    x[1, 9:] = np.nan
    model = fs.models.AutoRegressive(order).fit(x, lengths)
    density = model.log_prob(x, lengths)
    y = model(x, lengths=lengths)
    future = model.forecast(x, 7, lengths=lengths)
    assert y.shape == (4, 60) and future.shape == (4, 7)
    for i, n in enumerate(lengths):
        one = x[i, :n]
        lags = np.stack([np.ones(n - order), *(one[order - k : n - k] for k in range(1, order + 1))], 1)
        solution, *_ = np.linalg.lstsq(lags, one[order:])
        np.testing.assert_allclose(np.r_[model.intercept[i], model.coefficients[i]], solution, rtol=1e-9)
        residuals = one[order:] - lags @ solution
        assert model.sigma2[i] == pytest.approx((residuals**2).mean())
        wanted = -0.5 * (np.log(2 * np.pi * model.sigma2[i]) + residuals**2 / model.sigma2[i]).sum()
        assert density[i] == pytest.approx(wanted)
        assert np.isnan(y[i, : order - 1]).all() and (y[i, n:] == 0).all()
        np.testing.assert_allclose(y[i, order - 1 : n - 1], lags @ solution)
        past = list(one)
        for step in range(7):
            past.append(solution[0] + sum(solution[k] * past[-k] for k in range(1, order + 1)))
            assert future[i, step] == pytest.approx(past[-1])
        alone = fs.models.AutoRegressive(order).fit(one)
        for name in ("coefficients", "intercept", "sigma2"):
            assert_same_bits(getattr(alone, name), getattr(model, name)[i : i + 1])
        assert_same_bits(alone.log_prob(one), density[i : i + 1])
        assert_same_bits(alone(one), y[i, :n])
        assert_same_bits(alone.forecast(one, 7), future[i])


def test_autoregressive_of_a_list_and_of_one_series_for_many():
    rows = [series((n,), seed=n) for n in (20, 31, 12)]
    model = fs.models.AutoRegressive(2).fit(rows)
    for i, row in enumerate(rows):
        assert_same_bits(model.coefficients[i : i + 1], fs.models.AutoRegressive(2).fit(row).coefficients)
    one = fs.models.AutoRegressive(2).fit(rows[0])
    together = one.forecast(rows, 5)
    for i, row in enumerate(rows):
        assert_same_bits(together[i], one.forecast(row, 5))


def test_autoregressive_degenerate_series():
    constant, line = np.full(30, 7.0), np.arange(30.0)
    for x, wanted in (constant, 7.0), (line, 30.0):
        model = fs.models.AutoRegressive(3).fit(x)
        np.testing.assert_allclose(model.forecast(x, 1), wanted, rtol=1e-9)
        assert not np.isnan(model.log_prob(x)).any()
    far = series((200,)) + 1e9
    np.testing.assert_allclose(
        fs.models.AutoRegressive(2).fit(far).coefficients,
        fs.models.AutoRegressive(2).fit(far - 1e9).coefficients,
        rtol=1e-5,
    )


@pytest.mark.parametrize("criterion", ["bic", "aic"])
def test_autoregressive_choose_finds_the_order_on_the_same_values(criterion):
    x = series((3, 2000))
    model = fs.models.AutoRegressive.choose(x, range(1, 7), criterion)
    assert model.order == 2 or (criterion == "aic" and model.order > 2)
    assert_same_bits(model.coefficients, fs.models.AutoRegressive(model.order).fit(x).coefficients)
    scores = []
    for order in range(1, 7):
        n = 1994  # the values that have six before them
        total = 0.0
        for row in x:
            lags = np.stack([np.ones(n), *(row[6 - k : 2000 - k] for k in range(1, order + 1))], 1)
            _, squares, *_ = np.linalg.lstsq(lags, row[6:])
            total += n * (np.log(2 * np.pi * squares[0] / n) + 1)
            total += (order + 2) * (2 if criterion == "aic" else np.log(n))
        fitted = fs.models.AutoRegressive(order).fit(x, hold_back=6)
        assert getattr(fitted, criterion)().sum() == pytest.approx(total)
        scores.append(total)
    assert model.order == 1 + int(np.argmin(scores))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_autoregressive_operations_compiled_and_in_numpy(dtype):
    rng = np.random.default_rng(5)
    lengths = np.array([40, 0, 3, 17])
    x = rng.normal(size=(4, 40)).astype(dtype)
    intercept, coefficients = rng.normal(size=4).astype(dtype), (rng.normal(size=(4, 3)) / 3).astype(dtype)
    wide = x.astype(np.float64)
    for order in (1, 3):
        assert_close(
            _models.triangle(wide, lengths, order, order + 1, 1),
            autoregression.triangle(wide, lengths, order, order + 1, 1),
            1e-13,
        )
    arguments = intercept, coefficients
    assert_close(_models.predict(x, lengths, *arguments, 1), autoregression.predict(x, lengths, *arguments, 1), 1e-5)
    assert_close(_models.rollout(x[:, :3], *arguments, 9, 1), autoregression.rollout(x[:, :3], *arguments, 9, 1), 1e-5)
    weights = [(rng.normal(size=s) / 2).astype(dtype) for s in ((5, 3), (5,), (1, 5), (1,))]
    for activation in ("sigmoid", "tanh", "relu"):
        assert_close(
            _models.rollout_perceptron(x[:, :3], *weights, activation, 9, 1),
            autoregression.rollout_perceptron(x[:, :3], *weights, activation, 9, 1),
            1e-5 if dtype == "float32" else 1e-13,
        )


def test_autoregressive_has_the_same_bits_on_any_number_of_threads():
    x = series((300, 200))
    results = []
    for n in (1, 2, 3):
        with threads(n):
            model = fs.models.AutoRegressive(4).fit(x)
            results.append((model.coefficients, model.intercept, model.sigma2, model(x), model.forecast(x, 400)))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_autoregressive_in_float32():
    x = series((5, 80)).astype(np.float32)
    model, twin = fs.models.AutoRegressive(2, dtype="float32").fit(x), fs.models.AutoRegressive(2).fit(x)
    for y, wanted in (model(x), twin(x)), (model.forecast(x, 9), twin.forecast(x, 9)):
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, wanted, rtol=1e-5)


def test_autoregressive_save_load_pickle(tmp_path):
    x = series((3, 50))
    model = fs.models.AutoRegressive(2).fit(x)
    model.save(tmp_path / "m.safetensors")
    for twin in fs.load(tmp_path / "m.safetensors"), pickle.loads(pickle.dumps(model)), copy.deepcopy(model):
        assert repr(twin) == repr(model) == "AutoRegressive(order=2, dtype='float64') of 3 series"
        assert_same_bits(twin.forecast(x, 5), model.forecast(x, 5))
        assert_same_bits(twin.bic(), model.bic())
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"coefficients should be of shape \(3, 4\), not \(3, 2\)"):
        fs.models.AutoRegressive(4).load_state_dict(state)
    with pytest.raises(ValueError, match=r"intercept should be of shape \(3,\)"):
        model.load_state_dict({**state, "intercept": state["intercept"][:2]})


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m, x: type(m)(0), ValueError, "order should be at least 1"),
        (lambda m, x: type(m)(1, dtype="int64"), TypeError, "dtype should be a floating dtype"),
        (lambda m, x: m.fit(x[:, :7]), ValueError, r"series\[0\] should have at least 8 values, not 7"),
        (lambda m, x: m.fit(x, [50, 7]), ValueError, r"series\[1\] should have at least 8 values, not 7"),
        (lambda m, x: m.fit(x, hold_back=2), ValueError, "hold_back should be at least 3"),
        (lambda m, x: m.fit(np.where(x == x[1, 4], np.inf, x)), ValueError, r"series\[1, 4\] is inf"),
        (lambda m, x: m.fit(x.astype(int)), TypeError, "series should hold real floating numbers"),
        (lambda m, x: m.fit(x[None]), ValueError, "series should be of shape"),
        (lambda m, x: m.fit([x]), ValueError, r"series\[0\] should be of shape"),
        (lambda m, x: m.fit(x, [50]), ValueError, "lengths should be of shape"),
        (lambda m, x: m(x[:1]), ValueError, "series should be as many as were fitted, 2, not 1"),
        (lambda m, x: m.forecast(x, -1), ValueError, "horizon should be at least 0"),
        (lambda m, x: m.forecast(x, 3, lengths=[50, 2]), ValueError, r"series\[1\] should have at least 3 values"),
        (lambda m, x: type(m)(2).forecast(x, 3), ValueError, "this AutoRegressive should be fitted first"),
        (lambda m, x: m.choose(x, []), ValueError, "orders should hold at least one"),
        (lambda m, x: m.choose(x, [1], "r2"), ValueError, "criterion should be one of"),
    ],
)
def test_autoregressive_bad_input(call, kind, message):
    x = series((2, 50))
    model = fs.models.AutoRegressive(3).fit(x)
    with pytest.raises(kind, match=message):
        call(model, x)


def test_autoregressive_edges():
    model = fs.models.AutoRegressive(3).fit(series((50,)))
    assert model.forecast(series((2, 3)), 0).shape == (2, 0)
    assert model(np.zeros((4, 0))).shape == (4, 0)
    assert model.log_prob(np.ones((2, 3))).tolist() == [0, 0]
    assert model.log_prob(np.ones((0, 5))).shape == (0,)
