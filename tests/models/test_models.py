"""The models: against counting by hand, other people's least squares, enumeration, and themselves step by step."""

import copy
import importlib.util
import itertools
import math
import pickle

import numpy as np
import pytest
from common import assert_close, assert_same_bits, threads
from protocol import check_generate, check_gradients, fitted, log_softmax, random_ids, random_sequences

import fastseq as fs
from fastseq import _autoregression
from fastseq.reference import _autoregression as autoregression

SMOOTHINGS = [1.0, 0.3, "witten_bell", "kneser_ney"]
needs_statsmodels = pytest.mark.skipif(
    importlib.util.find_spec("statsmodels") is None, reason="the package statsmodels is not installed"
)


@pytest.fixture(autouse=True)
def one_thread():
    """So small as most models here are, more would be in each other's way on a busy machine."""
    fs.set_num_threads(1)


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


def test_markov_of_one_symbol():
    """Seen once: all others come after the only one that the chain knows."""
    model = fitted(fs.models.MarkovChain(3, 1), [[0]])
    np.testing.assert_allclose(np.exp(model.log_prob([[0], [1], [2]])), [1 / 2, 1 / 4, 1 / 4])


@pytest.mark.parametrize("smoothing", [0.0, *SMOOTHINGS])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_markov_counts_as_by_hand(order, smoothing):
    vocab, sequences = 4, random_sequences(4)
    model = fitted(fs.models.MarkovChain(vocab, order, smoothing=smoothing), sequences)
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
    model = fitted(fs.models.MarkovChain(3, order, smoothing=smoothing), random_sequences(3))
    everything = np.array(list(itertools.product(range(3), repeat=5)))
    assert np.exp(model.log_prob(everything)).sum() == pytest.approx(1, abs=1e-12)


def test_markov_forms_of_sequences():
    sequences = random_sequences(5)
    lengths = np.array([len(s) for s in sequences])
    padded = np.full((len(sequences), 50), -99)  # what is no id may stand in the padding
    for row, s in zip(padded, sequences, strict=True):
        row[: len(s)] = s
    model = fitted(fs.models.MarkovChain(5, 2), sequences)
    twin = fitted(fs.models.MarkovChain(5, 2), padded.astype(np.int16), lengths.astype(np.uint8))
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
    model = fitted(fs.models.MarkovChain(6, 3, smoothing="kneser_ney"), random_sequences(6))
    x = random_ids(6, (4, 9))
    first = model.log_prob(x[:, :1])
    rest = np.take_along_axis(model(x)[:, :-1], x[:, 1:, None], 2)[..., 0]
    np.testing.assert_allclose(model.log_prob(x), first + rest.sum(1), rtol=1e-13)


def test_markov_without_data_knows_nothing():
    for smoothing in [0.0, *SMOOTHINGS]:
        for nothing in [], [[]], np.zeros((3, 0), int):
            model = fitted(fs.models.MarkovChain(4, 2, smoothing=smoothing), nothing)
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
    assert_same_bits(chosen.log_prob(x), fitted(fs.models.MarkovChain(3, 2), x).log_prob(x))


def test_markov_choose_of_orders_with_more_parameters_than_any_number():
    x = random_ids(3, 2000)
    assert fs.models.MarkovChain.choose(x, 3, [1, 1000]).order == 1


def test_markov_criteria_by_hand():
    sequences = random_sequences(3)
    model = fitted(fs.models.MarkovChain(3, 2), sequences)
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
    model = fitted(fs.models.MarkovChain(4, 1, smoothing=0.5), random_ids(4, 300))
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


@pytest.mark.parametrize("order", [0, 1, 3])
def test_markov_generate(order):
    check_generate(fitted(fs.models.MarkovChain(5, order, smoothing="witten_bell"), random_sequences(5)), 5)


def test_markov_save_load_pickle(tmp_path):
    x = random_sequences(5)
    for model in [
        fitted(fs.models.MarkovChain(5, 3, smoothing="kneser_ney"), x),
        fitted(fs.models.MarkovChain(5, 0, smoothing=0.25), x),
        fitted(fs.models.MarkovChain(5, 2), []),
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
    model = fitted(fs.models.MarkovChain(3, 2), random_sequences(3))
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
        (lambda m: m.log_prob("word"), TypeError, "sequences should be ids, integers, not text: str 'word'; give each"),
        (lambda m: m.log_prob(["word"]), TypeError, "sequences should be ids, integers, not text"),
        (lambda m: m.log_prob([list("word")]), TypeError, "sequences should be ids, integers, not text: str 'w'"),
        (lambda m: m.generate(b"word", 2), TypeError, "prompt should be ids, integers, not text"),
        (lambda m: m.fit("word"), TypeError, "sequences should be ids, integers, not text"),
        (lambda m: m(np.array(["word"])), TypeError, "x should be ids, integers, not text"),
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
    model = fitted(fs.models.MarkovChain(3, 1), [[0, 1, 2]])
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
    ours = fitted(fs.models.AutoRegressive(order), x)
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
    model = fitted(fs.models.AutoRegressive(order), x, lengths)
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
        alone = fitted(fs.models.AutoRegressive(order), one)
        for name in ("coefficients", "intercept", "sigma2"):
            assert_same_bits(getattr(alone, name), getattr(model, name)[i : i + 1])
        assert_same_bits(alone.log_prob(one), density[i : i + 1])
        assert_same_bits(alone(one), y[i, :n])
        assert_same_bits(alone.forecast(one, 7), future[i])


def test_autoregressive_of_a_list_and_of_one_series_for_many():
    rows = [series((n,), seed=n) for n in (20, 31, 12)]
    model = fitted(fs.models.AutoRegressive(2), rows)
    for i, row in enumerate(rows):
        assert_same_bits(model.coefficients[i : i + 1], fitted(fs.models.AutoRegressive(2), row).coefficients)
    one = fitted(fs.models.AutoRegressive(2), rows[0])
    together = one.forecast(rows, 5)
    for i, row in enumerate(rows):
        assert_same_bits(together[i], one.forecast(row, 5))


def test_autoregressive_degenerate_series():
    constant, line = np.full(30, 7.0), np.arange(30.0)
    for x, wanted in (constant, 7.0), (line, 30.0):
        model = fitted(fs.models.AutoRegressive(3), x)
        np.testing.assert_allclose(model.forecast(x, 1), wanted, rtol=1e-9)
        assert not np.isnan(model.log_prob(x)).any()
    far = series((200,)) + 1e9
    np.testing.assert_allclose(
        fitted(fs.models.AutoRegressive(2), far).coefficients,
        fitted(fs.models.AutoRegressive(2), far - 1e9).coefficients,
        rtol=1e-5,
    )


@pytest.mark.parametrize("criterion", ["bic", "aic"])
def test_autoregressive_choose_finds_the_order_on_the_same_values(criterion):
    x = series((3, 2000))
    model = fs.models.AutoRegressive.choose(x, range(1, 7), criterion)
    assert model.order == 2 or (criterion == "aic" and model.order > 2)
    assert_same_bits(model.coefficients, fitted(fs.models.AutoRegressive(model.order), x).coefficients)
    scores = []
    for order in range(1, 7):
        n = 1994  # the values that have six before them
        total = 0.0
        for row in x:
            lags = np.stack([np.ones(n), *(row[6 - k : 2000 - k] for k in range(1, order + 1))], 1)
            _, squares, *_ = np.linalg.lstsq(lags, row[6:])
            total += n * (np.log(2 * np.pi * squares[0] / n) + 1)
            total += (order + 2) * (2 if criterion == "aic" else np.log(n))
        held = fitted(fs.models.AutoRegressive(order), x, hold_back=6)
        assert getattr(held, criterion)().sum() == pytest.approx(total)
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
            _autoregression.triangle(wide, lengths, order, order + 1, 1),
            autoregression.triangle(wide, lengths, order, order + 1, 1),
            1e-13,
        )
    arguments = intercept, coefficients
    assert_close(
        _autoregression.predict(x, lengths, *arguments, 1), autoregression.predict(x, lengths, *arguments, 1), 1e-5
    )
    assert_close(
        _autoregression.rollout(x[:, :3], *arguments, 9, 1), autoregression.rollout(x[:, :3], *arguments, 9, 1), 1e-5
    )
    weights = [(rng.normal(size=s) / 2).astype(dtype) for s in ((5, 3), (5,), (1, 5), (1,))]
    for activation in ("sigmoid", "tanh", "relu"):
        assert_close(
            _autoregression.rollout_perceptron(x[:, :3], *weights, activation, 9, 1),
            autoregression.rollout_perceptron(x[:, :3], *weights, activation, 9, 1),
            1e-5 if dtype == "float32" else 1e-13,
        )


def test_autoregressive_has_the_same_bits_on_any_number_of_threads():
    x = series((300, 200))
    results = []
    for n in (1, 2, 3):
        with threads(n):
            model = fitted(fs.models.AutoRegressive(4), x)
            results.append((model.coefficients, model.intercept, model.sigma2, model(x), model.forecast(x, 400)))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("model", ["perceptron", "forecaster", "lm"])
def test_trained_models_have_the_same_bits_on_any_number_of_threads(model):
    x = series((64, 60)).astype(np.float32)
    results = []
    for n in (1, 2, 3):
        with threads(n):
            if model == "lm":
                one = fs.models.RecurrentLM(30, 32, 64, 2, dropout=0.2, seed=0)
                one.fit(random_ids(30, (64, 20)), epochs=1, progress=False)
                results.append((*one.state_dict().values(), one.generate(random_ids(30, (64, 5)), 9, seed=1)))
            else:
                if model == "forecaster":
                    one = fs.models.RecurrentForecaster(1, 64, 2, cell="gru", dropout=0.2, seed=0)
                else:
                    one = fs.models.AutoRegressive(8, 32, dtype="float32", seed=0)
                one.fit(x, steps=3, batch_size=64, progress=False)
                results.append((*one.state_dict().values(), one.forecast(x, 300), one.log_prob(x)))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("model", ["perceptron", "forecaster"])
def test_trained_models_resume(model, dtype, tmp_path):
    """Checkpoints hold what was measured, too; a run of two halves has the bits of one."""
    x = series((90,)).astype(dtype)

    def make():
        if model == "perceptron":
            return fs.models.AutoRegressive(3, 4, dtype=dtype, seed=0)
        return fs.models.RecurrentForecaster(1, 4, dtype=dtype, seed=0)

    whole, half, other = make(), make(), make()
    whole.fit(x, epochs=4, progress=False)
    half.fit(x, epochs=2, progress=False, checkpoint=tmp_path)
    other.fit(x, epochs=4, progress=False, checkpoint=tmp_path, resume=True)
    assert_same_bits(tuple(other.state_dict().values()), tuple(whole.state_dict().values()))


def test_autoregressive_in_float32():
    x = series((5, 80)).astype(np.float32)
    model, twin = fitted(fs.models.AutoRegressive(2, dtype="float32"), x), fitted(fs.models.AutoRegressive(2), x)
    for y, wanted in (model(x), twin(x)), (model.forecast(x, 9), twin.forecast(x, 9)):
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, wanted, rtol=1e-5)


def test_autoregressive_save_load_pickle(tmp_path):
    x = series((3, 50))
    model = fitted(fs.models.AutoRegressive(2), x)
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
        (lambda m, x: m.fit(x > 20), TypeError, "series should hold real numbers, not bool"),
        (lambda m, x: m.fit(x.astype(complex)), TypeError, "series should hold real numbers, not complex128"),
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
    model = fitted(fs.models.AutoRegressive(3), x)
    with pytest.raises(kind, match=message):
        call(model, x)


def test_autoregressive_edges():
    none = fitted(fs.models.AutoRegressive(2), np.zeros((0, 9)))
    assert none.forecast(np.zeros((0, 9)), 4).shape == (0, 4) and none.bic().shape == (0,)
    model = fitted(fs.models.AutoRegressive(3), series((50,)))
    assert model.forecast(series((2, 3)), 0).shape == (2, 0)
    assert model(np.zeros((4, 0))).shape == (4, 0)
    assert model.log_prob(np.ones((2, 3))).tolist() == [0, 0]
    assert model.log_prob(np.ones((0, 5))).shape == (0,)


# --- AutoRegressive with hidden units


def perceptron(order=3, hidden=5, activation="sigmoid", engine=fs, **more):
    """A perceptron whose standardisation was measured, and nothing more."""
    model = engine.models.AutoRegressive(order, hidden, activation=activation, seed=1, **more)
    model.fit(series((60,)), epochs=0, progress=False)
    return model


@pytest.mark.parametrize("engine", [fs, fs.reference], ids=["compiled", "reference"])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_perceptron_gradients(activation, engine):
    model = perceptron(activation=activation, engine=engine)
    windows = fs.training.Windows(series((40,)), steps=3, batch_size=16, seed=0)
    batch = next(windows.batches(0))

    def forward():
        loss, count, tape, _ = model.training_forward(batch)
        assert count == 16
        return loss, tape

    check_gradients(model, forward, lambda tape, grads: model.training_backward(tape, grads))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_perceptron_by_hand_and_closed_loop(activation, dtype):
    model = perceptron(activation=activation, dtype=dtype)
    x = series((4, 30)).astype(dtype)
    lengths = np.array([30, 3, 17, 30])
    x[1, 3:] = np.nan
    w = {name: a.astype(np.float64) for name, a in model.state_dict().items()}
    f = {"sigmoid": lambda a: 1 / (1 + np.exp(-a)), "tanh": np.tanh, "relu": lambda a: np.maximum(a, 0)}[activation]

    def following(past):
        z = (np.asarray(past[-3:], np.float64) - w["mean"]) / w["deviation"]
        y = w["output.weight"] @ f(w["hidden.weight"] @ z + w["hidden.bias"]) + w["output.bias"]
        return (y * w["deviation"] + w["mean"])[0]

    tolerance = 1e-4 if dtype == "float32" else 1e-12
    y, future = model(x, lengths=lengths), model.forecast(x, 8, lengths=lengths)
    assert y.dtype == future.dtype == dtype
    for row, n in enumerate(lengths):
        assert np.isnan(y[row, :2]).all() and (y[row, n:] == 0).all()
        np.testing.assert_allclose(y[row, 2:n], [following(x[row, : t + 1]) for t in range(2, n)], rtol=tolerance)
        past = list(x[row, :n])
        for step in range(8):
            past.append(following(past))
            np.testing.assert_allclose(future[row, step], past[-1], rtol=tolerance)
        assert_same_bits(model.forecast(x[row, :n], 8), future[row])
        residuals = x[row, 3:n] - y[row, 2 : n - 1].astype(np.float64)
        wanted = -0.5 * (np.log(2 * np.pi * model.sigma2) + residuals**2 / model.sigma2).sum() if n > 3 else 0.0
        np.testing.assert_allclose(model.log_prob(x[row, :n]), wanted, rtol=1e-5)


def test_perceptron_learns_what_no_linear_model_can(tmp_path):
    x = [0.3]
    for _ in range(600):
        x.append(3.9 * x[-1] * (1 - x[-1]))  # the logistic map
    x = np.array(x)
    linear = fitted(fs.models.AutoRegressive(2), x[:500])
    model = fs.models.AutoRegressive(2, 10, activation="tanh", seed=0)
    with pytest.raises(ValueError, match="this AutoRegressive should be fitted first"):
        model.log_prob(x)
    model.fit(x[:500], epochs=60, validation=x[500:], progress=False)
    assert model.history.loss[-1] < 0.2 * model.history.loss[0]
    assert model.sigma2[0] < 0.1 * linear.sigma2[0]
    residuals = x[2:500] - model(x[:500])[1:-1]
    assert model.sigma2[0] == pytest.approx((residuals**2).mean())
    assert model.bic()[0] < linear.bic()[0] and model.aic()[0] < linear.aic()[0]
    parameters = 2 * 10 + 10 + 10 + 1 + 1
    log_likelihood = model.log_prob(x[:500])[0]
    assert model.aic()[0] == pytest.approx(2 * parameters - 2 * log_likelihood)
    assert model.bic()[0] == pytest.approx(np.log(498) * parameters - 2 * log_likelihood)
    model.save(tmp_path / "m.safetensors")
    for twin in fs.load(tmp_path / "m.safetensors"), pickle.loads(pickle.dumps(model)):
        assert repr(twin) == repr(model)
        assert_same_bits(twin.forecast(x, 9), model.forecast(x, 9))
        assert_same_bits(twin.bic(), model.bic())


def test_perceptron_choose_and_many_series():
    x = series((3, 120))
    chosen = fs.models.AutoRegressive.choose(x, [1, 2], hidden=3, seed=0, epochs=15, progress=False)
    assert (chosen.order, chosen.hidden) == (2, 3)
    twin = fitted(fs.models.AutoRegressive(2, 3, seed=0), list(x), epochs=15, progress=False)
    assert_same_bits(chosen.forecast(x, 4), twin.forecast(x, 4))
    for wrong in (lambda: chosen.coefficients, lambda: chosen.intercept):
        with pytest.raises(ValueError, match="a perceptron has no"):
            wrong()
    with pytest.raises(TypeError, match="epochs is a setting of training"):
        fitted(fs.models.AutoRegressive(2), x, epochs=3)
    with pytest.raises(ValueError, match="a linear model is not trained"):
        fs.training.fit(fs.models.AutoRegressive(2), [fs.training.Batch(x)], epochs=1)
    with pytest.raises(ValueError, match=r"inputs should be of shape \(B, 2, 1\)"):
        chosen.training_forward(fs.training.Batch(x[..., None], x[..., None]))
    with pytest.raises(ValueError, match="hidden should be at least 1"):
        fs.models.AutoRegressive(2, 0)
    with pytest.raises(ValueError, match="activation should be one of"):
        fs.models.AutoRegressive(2, 3, activation="gelu")


# --- RecurrentLM

CELLS = ["rnn", "lstm", "gru"]
ENGINES = pytest.mark.parametrize("engine", [fs, fs.reference], ids=["compiled", "reference"])


def language_model(vocab=5, cell="lstm", engine=fs, dtype="float64", **more):
    return engine.models.RecurrentLM(vocab, 4, 6, 2, cell=cell, dtype=dtype, seed=3, **more)


@ENGINES
@pytest.mark.parametrize("cell", CELLS)
def test_lm_probabilities_of_all_sequences_sum_to_one(cell, engine):
    model = language_model(3, cell, engine)
    everything = np.array(list(itertools.product(range(3), repeat=5)))
    assert np.exp(model.log_prob(everything)).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_lm_is_its_layers(cell):
    model = language_model(cell=cell)
    x = random_ids(5, (3, 8))
    w = model.state_dict()
    layer = {"rnn": fs.RNN, "lstm": fs.LSTM, "gru": fs.GRU}[cell](4, 6, 2, dtype="float64")
    layer.load_state_dict({name[10:]: a for name, a in w.items() if name.startswith("recurrent.")})
    begun = np.concatenate([np.full((3, 1), 5), x], 1)
    y, _ = layer(w["embedding.weight"][begun])
    logits = y @ w["output.weight"].T + w["output.bias"]
    np.testing.assert_allclose(model(x), logits[:, 1:], rtol=1e-12)
    chain = np.take_along_axis(log_softmax(logits)[:, :-1], x[..., None], 2)[..., 0]
    np.testing.assert_allclose(model.log_prob(x), chain.sum(1), rtol=1e-12)
    assert model.bits_per_symbol(x) == pytest.approx(-chain.mean() / math.log(2))
    assert model.perplexity(x) == pytest.approx(math.exp(-chain.mean()))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS)
def test_lm_rows_have_the_same_bits_alone_padded_and_step_by_step(cell, dtype, monkeypatch):
    model = language_model(cell=cell, dtype=dtype)
    rows = random_sequences(5)
    lengths = np.array([len(r) for r in rows])
    padded = np.full((len(rows), 44), 99)
    for into, row in zip(padded, rows, strict=True):
        into[: len(row)] = row
    y = model(padded, lengths=lengths)
    p = model.log_prob(padded, lengths)
    assert p[1] == 0 and y.dtype == dtype and p.dtype == np.float64
    for row, logits, one in zip(rows, y, p, strict=True):
        assert (logits[len(row) :] == 0).all()
        assert_same_bits(logits[: len(row)], model(row))
        assert_same_bits(model.log_prob(row), one[None])
        state = None
        for t, symbol in enumerate(row):
            step, state = model.step([symbol], state)
            assert_same_bits(step[0], logits[t])
        half = len(row) // 2
        if half:
            _, middle = model.step(row[half - 1 : half], model.forward(row[None, : half - 1])[1] if half > 1 else None)
            assert_same_bits(model(row[None, half:], middle)[0], logits[half : len(row)])
    monkeypatch.setattr("fastseq.models.recurrent_lm._CHUNK", 7)
    monkeypatch.setattr("fastseq.models.recurrent_lm._ROWS", 2)
    assert_same_bits(model.log_prob(rows), p)


def test_lm_compiled_and_reference_agree():
    for cell in CELLS:
        model, twin = language_model(cell=cell), language_model(cell=cell, engine=fs.reference)
        twin.load_state_dict(model.state_dict())
        x = random_ids(5, (3, 8))
        np.testing.assert_allclose(model(x), twin(x), rtol=1e-10)
        assert_same_bits(model.generate(x, 20, seed=4), twin.generate(x, 20, seed=4))


@pytest.mark.parametrize("cell", CELLS)
def test_lm_generate(cell):
    check_generate(language_model(cell=cell, dtype="float32"), 5)


def test_lm_generate_follows_the_distribution():
    """Chi-square of pairs: 99.9 % point of 8 degrees of freedom."""
    model = language_model(3)
    for name in model.parameters:  # far from uniform
        model.parameters[name] = model.parameters[name] * 3
    drawn = model.generate(np.full((4000, 2), 1), 2, seed=5)
    everything = np.array([(1, 1, a, b) for a in range(3) for b in range(3)])
    wanted = 4000 * np.exp(model.log_prob(everything) - model.log_prob([[1, 1]]))
    seen = np.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9)
    assert wanted.min() > 5 and np.ptp(wanted) > 200
    assert ((seen - wanted) ** 2 / wanted).sum() < 26.1


def batches(vocab):
    """What the trainer gives: streams, fresh and carried on, and padded sequences."""
    streams = list(fs.training.Streams(random_ids(vocab, 60), batch_size=3, steps=5).batches(0))
    padded = fs.training.PaddedBatches(random_sequences(vocab)[2:], batch_size=4, seed=0)
    return {"fresh": streams[0], "carried": streams[1], "padded": next(padded.batches(0))}


@ENGINES
@pytest.mark.parametrize("kind", ["fresh", "carried", "padded"])
@pytest.mark.parametrize("cell", CELLS)
def test_lm_gradients(cell, kind, engine):
    model = language_model(cell=cell, engine=engine, dropout=0.3)
    batch = batches(5)[kind]
    state = model.initial_state(3) if kind == "carried" else None

    def forward():
        loss, count, tape, _ = model.training_forward(batch, state=state, seed=7)
        assert count == {"fresh": 18, "carried": 15, "padded": 40 + 1 + 3 + 25}[kind]
        return loss, tape

    check_gradients(model, forward, lambda tape, grads: model.training_backward(tape, grads))


@pytest.mark.parametrize("cell", CELLS)
def test_lm_gradients_of_forward(cell):
    model = language_model(cell=cell)
    rng = np.random.default_rng(0)
    x, lengths = random_ids(5, (3, 6)), np.array([6, 0, 4])
    dlogits = rng.normal(size=(3, 6, 5)) * (np.arange(6) < lengths[:, None])[..., None]
    _, state, _ = model.forward(random_ids(5, (3, 4), 9))
    dstate = type(state)(*(rng.normal(size=a.shape) for a in state))
    for given in None, state:

        def forward(given=given):
            logits, end, tape = model.forward(x, given, lengths=lengths)
            return (logits * dlogits).sum() + sum((a * b).sum() for a, b in zip(end, dstate, strict=True)), tape

        check_gradients(model, forward, lambda t, grads: model.backward(dlogits, t, dstate=dstate, grads=grads))
    before = model.forward(x, state, lengths=lengths)[2]
    back = model.backward(dlogits, before, dstate=dstate)
    direction = rng.normal(size=state.h.shape)
    ends = []
    for step in (1e-6, -1e-6):
        moved = type(state)(state.h + step * direction, *list(state)[1:])
        logits, end, _ = model.forward(x, moved, lengths=lengths)
        ends.append((logits * dlogits).sum() + sum((a * b).sum() for a, b in zip(end, dstate, strict=True)))
    assert (back.h * direction).sum() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)
    logits, _, tape = model.forward(x[0])
    assert logits.shape == (6, 5)
    model.zero_grad()
    model.backward(dlogits[0], tape)
    one = {name: a.copy() for name, a in model.grads.items()}
    model.zero_grad()
    model.backward(dlogits[:1], model.forward(x[:1])[2])
    for name, a in model.grads.items():
        assert_same_bits(a, one[name], name)


def test_lm_truncate_reaches_the_recurrent_layer():
    model = language_model()
    batch = batches(5)["fresh"]
    gradients = {}
    for truncate in (None, 2, 100):
        _, _, tape, _ = model.training_forward(batch)
        model.zero_grad()
        model.training_backward(tape, truncate=truncate)
        gradients[truncate] = {name: a.copy() for name, a in model.grads.items()}
    assert_same_bits(gradients[100]["recurrent.weight_hh_l0"], gradients[None]["recurrent.weight_hh_l0"])
    assert (gradients[2]["recurrent.weight_hh_l0"] != gradients[None]["recurrent.weight_hh_l0"]).any()
    assert_same_bits(gradients[2]["output.weight"], gradients[None]["output.weight"])


@pytest.mark.parametrize("kind", ["fresh", "carried", "padded"])
def test_lm_evaluation_is_training_without_dropout(kind):
    batch = batches(5)[kind]
    dropping = language_model(dropout=0.5)
    plain = language_model()
    plain.load_state_dict(dropping.state_dict())
    state = plain.initial_state(3) if kind == "carried" else None
    loss, count, _, end = plain.training_forward(batch, state=state)
    evaluated = dropping.evaluation_forward(batch, state=state)
    assert evaluated[:2] == (loss, count) and evaluated[2] == end
    assert dropping.training_forward(batch, state=state, seed=1)[0] != loss
    if kind == "padded":  # what it is the mean of is the chain rule
        log_prob = plain.log_prob(batch.inputs, batch.lengths)
        assert loss * count == pytest.approx(-log_prob.sum())
    if kind == "fresh":
        whole = np.concatenate([batch.inputs, batch.targets[:, -1:]], 1)
        assert loss * count == pytest.approx(-plain.log_prob(whole).sum())


@pytest.mark.parametrize("cell", CELLS)
def test_lm_learns(cell, tmp_path):
    cycle = np.tile([0, 1, 2, 0, 2, 1, 1], 60)  # what follows 0, 1 or 2 depends on what came before
    model = fs.models.RecurrentLM(3, 8, 24, cell=cell, seed=0)
    optimiser = fs.training.Adam(model, 0.02)
    history = model.fit(
        cycle, batch_size=4, chunk=15, epochs=20, optimiser=optimiser, validation=cycle[:70], progress=False
    )
    assert history.loss[-1] < 0.1 * history.loss[0] and len(history.validation_loss) == 20
    assert model.bits_per_symbol(cycle) < 0.15
    assert model.generate(cycle[:21], 14, temperature=0).tolist() == cycle[:14].tolist()
    model.save(tmp_path / "m.safetensors")
    for twin in fs.load(tmp_path / "m.safetensors"), pickle.loads(pickle.dumps(model)), copy.deepcopy(model):
        assert repr(twin) == repr(model)
        assert_same_bits(twin.log_prob(cycle), model.log_prob(cycle))
    reference = fs.reference.load(tmp_path / "m.safetensors")
    assert type(reference) is fs.reference.models.RecurrentLM
    assert reference.bits_per_symbol(cycle) == pytest.approx(model.bits_per_symbol(cycle), abs=1e-4)


def test_lm_fits_sequences_in_any_form():
    rows = [np.tile([0, 1, 2], 4)[:n] for n in (12, 0, 5, 9)]
    lengths = [len(r) for r in rows]
    padded = np.full((4, 12), 77)
    for into, row in zip(padded, rows, strict=True):
        into[: len(row)] = row
    settings = {"epochs": 3, "progress": False}
    results = []
    for data, more in (
        ((rows,), {"batch_size": 2}),
        ((padded, lengths), {"batch_size": 2}),
        ((fs.training.PaddedBatches([r for r in rows if len(r)], batch_size=2, seed=0),), {}),
    ):
        model = fs.models.RecurrentLM(3, 4, 8, seed=0)
        model.fit(*data, **settings, **more)
        results.append(model.log_prob(rows))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])
    assert (results[0] > fs.models.RecurrentLM(3, 4, 8, seed=0).log_prob(rows))[[0, 2, 3]].all()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m: m([[0, 5]]), ValueError, r"x should be in 0..4, but x\[0, 1\] is 5"),  # 5 begins
        (lambda m: m([[0.5]]), TypeError, "x should hold integers"),
        (lambda m: m(np.zeros((1, 2, 3), int)), ValueError, "x should be of shape"),
        (lambda m: m([[0, 1]], m.initial_state(2)), ValueError, r"state.h should be of shape \(1, 2, 6\)"),
        (lambda m: m([[0, 1]], lengths=[3]), ValueError, "lengths should be in 0..2"),
        (lambda m: m.step([[0]]), ValueError, "x_t should be of shape"),
        (lambda m: m.step([9]), ValueError, r"x_t should be in 0..4, but x_t\[0\] is 9"),
        (lambda m: m.log_prob([[0, -1]]), ValueError, r"sequences\[0\]\[1\] is -1"),
        (lambda m: m.backward(np.zeros((1, 3, 5)), m.forward([[0, 1]])[2]), ValueError, "dlogits should be of shape"),
        (
            lambda m: m.backward(np.zeros((1, 2, 5)), fs.Linear(2, 2).forward(np.ones(2))[1]),
            ValueError,
            "tape should be",
        ),
        (lambda m: m.backward(np.zeros((1, 2, 5)), None), TypeError, "tape should be"),
        (lambda m: m.fit([0, 1, 2, 9], epochs=1), ValueError, r"but data\[3\] is 9|but data\[0, 3\] is 9"),
        (lambda m: m.fit([0, 1, 2], steps=1, batch_size=0), ValueError, "batch_size should be at least 1"),
        (lambda m: m.training_forward(fs.training.Batch(np.zeros((1, 2)))), TypeError, "inputs should hold integers"),
        (
            lambda m: m.training_forward(fs.training.Batch(np.zeros((1, 2), int), np.array([[0, 5]]))),
            ValueError,
            r"targets should be in 0..4, but targets\[0, 1\] is 5",
        ),
        (
            lambda m: m.training_forward(fs.training.Batch(np.zeros((1, 2), int), np.zeros((1, 3), int))),
            ValueError,
            "targets should be of shape",
        ),
        (lambda m: fs.models.RecurrentLM(0, 1, 1), ValueError, "vocab_size should be at least 1"),
        (lambda m: fs.models.RecurrentLM(1, 1, 1, cell="LSTM"), ValueError, "cell should be one of 'rnn'"),
        (lambda m: fs.models.RecurrentLM(1, 1, 1, dropout=1), ValueError, "dropout should be in"),
        (lambda m: fs.models.RecurrentLM(1, 1, 1, dtype="float16"), TypeError, "dtype should be float32 or float64"),
        (lambda m: m.load_state_dict({}), ValueError, "embedding.weight, .* are missing"),
    ],
)
def test_lm_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call(language_model())


def test_lm_edges():
    model = language_model()
    assert model(np.zeros((2, 0), int)).shape == (2, 0, 5)
    assert model(np.zeros((0, 3), int)).shape == (0, 3, 5)
    assert model(np.zeros(0, int)).shape == (0, 5)
    assert model.log_prob([[], []]).tolist() == [0, 0]
    assert model.log_prob(np.zeros((0, 3), int)).shape == (0,)
    assert model.initial_state(0).h.shape == (0, 2, 6)


# --- RecurrentForecaster


def forecaster(cell="lstm", inputs=1, engine=fs, dtype="float64", **more):
    """A model with a standardisation other than none."""
    model = engine.models.RecurrentForecaster(inputs, 6, 2, cell=cell, dtype=dtype, seed=4, **more)
    measured = {"mean": np.arange(3.0, 3 + inputs), "deviation": np.full(inputs, 2.5), "sigma2": np.full(inputs, 0.7)}
    model.load_state_dict({**model.state_dict(), **measured})
    return model


@ENGINES
@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_forecaster_call_steps_and_closed_loop(cell, inputs, engine):
    model = forecaster(cell, inputs, engine)
    lengths = np.array([9, 4, 1])
    x = series((3, 9, inputs))
    x[1, 4:] = np.nan
    x[2, 1:] = np.nan
    y, future = model(x, lengths=lengths), model.forecast(x, 6, lengths=lengths)
    assert y.shape == x.shape and future.shape == (3, 6, inputs)
    w = model.state_dict()
    layer = {"rnn": engine.RNN, "lstm": engine.LSTM, "gru": engine.GRU}[cell](inputs, 6, 2, dtype="float64")
    layer.load_state_dict({name[10:]: a for name, a in w.items() if name.startswith("recurrent.")})
    for row, n in enumerate(lengths):
        hidden, _ = layer((x[row : row + 1, :n] - w["mean"]) / 2.5)
        wanted = (hidden[0] @ w["output.weight"].T + w["output.bias"]) * 2.5 + w["mean"]
        np.testing.assert_allclose(y[row, :n], wanted, rtol=1e-12)
        assert (y[row, n:] == 0).all()
        state, expected = None, None
        for t in range(n):
            expected, state = model.step(x[row : row + 1, t], state)
            np.testing.assert_allclose(expected[0], y[row, t], rtol=1e-12)
        for t in range(6):
            np.testing.assert_allclose(future[row, t], expected[0], rtol=1e-10)
            expected, state = model.step(expected, state)
        residuals = x[row, 1:n] - y[row, : n - 1]
        wanted = -0.5 * (np.log(2 * np.pi * 0.7) + residuals**2 / 0.7).sum()
        np.testing.assert_allclose(model.log_prob(x, lengths)[row], wanted, rtol=1e-12, atol=1e-12)
        if engine is fs:
            assert_same_bits(model.forecast(x[row : row + 1, :n], 6)[0], future[row])
            assert_same_bits(model(x[row : row + 1, :n])[0], y[row, :n])


def test_forecaster_forms_of_series():
    model = forecaster()
    x = series((2, 7))
    y = model(x)
    assert y.shape == (2, 7)
    assert_same_bits(model(x[..., None])[..., 0], y)
    assert_same_bits(model(list(x)), y)
    assert_same_bits(model(x[0]), y[0])
    assert model.forecast(x[0], 3).shape == (3,) and model.forecast(x, 3).shape == (2, 3)
    assert model.forecast(x[..., None], 0).shape == (2, 0, 1)
    wide = forecaster(inputs=2)
    assert wide.forecast(series((7, 2)), 3).shape == (3, 2)
    assert wide([series((7, 2)), series((4, 2))]).shape == (2, 7, 2)


@ENGINES
@pytest.mark.parametrize("kind", ["windows", "whole", "carried"])
@pytest.mark.parametrize("cell", CELLS)
def test_forecaster_gradients(cell, kind, engine):
    model = forecaster(cell, 2, engine, dropout=0.3)
    values = series((40, 2))
    batch = {
        "windows": next(fs.training.Windows(values, steps=6, batch_size=4, seed=0).batches(0)),
        "whole": next(fs.training.PaddedBatches([values[:9], values[9:14]], batch_size=2, seed=0).batches(0)),
        "carried": list(fs.training.Streams(values, batch_size=2, steps=5).batches(0))[1],
    }[kind]
    state = None
    if kind == "carried":
        state = model.forward(series((2, 3, 2)))[1]

    def forward():
        loss, count, tape, _ = model.training_forward(batch, state=state, seed=3)
        assert count == {"windows": 24, "whole": 8 + 4, "carried": 10}[kind]
        return loss, tape

    check_gradients(model, forward, lambda tape, grads: model.training_backward(tape, grads))
    if kind != "whole":
        plain = forecaster(cell, 2, engine)
        loss, count, _, end = plain.training_forward(batch, state=state)
        assert model.evaluation_forward(batch, state=state) == (loss, count, end)


@ENGINES
@pytest.mark.parametrize("targets", ["given", "the next steps"])
def test_forecaster_padded_losses_are_those_of_the_rows(targets, engine):
    """In training and in evaluation: padding counts nowhere, whatever stands in it."""
    model = forecaster("gru", 2, engine)
    x, lengths = series((3, 2, 9)).swapaxes(1, 2), np.array([9, 4, 6])
    wanted = None if targets == "the next steps" else x[:, ::-1] + 1
    rows, total, count = [], 0.0, 0
    grads = {name: np.zeros_like(a) for name, a in model.parameters.items()}
    for i, n in enumerate(lengths):
        batch = fs.training.Batch(x[i : i + 1, :n], None if wanted is None else wanted[i : i + 1, :n])
        loss, own, tape, _ = model.training_forward(batch)
        assert model.evaluation_forward(batch)[:2] == (loss, own)
        one = {name: np.zeros_like(a) for name, a in model.parameters.items()}
        model.training_backward(tape, one)
        rows.append((one, own))
        total, count = total + loss * own, count + own
    for one, own in rows:
        for name in grads:
            grads[name] += one[name] * own / count
    for padding in (0.0, 1e6, np.nan):
        inputs = np.where(np.arange(9)[:, None] < lengths[:, None, None], x, padding)
        outputs = None if wanted is None else np.where(np.arange(9)[:, None] < lengths[:, None, None], wanted, padding)
        batch = fs.training.Batch(inputs, outputs, lengths)
        loss, own, tape, state = model.training_forward(batch)
        assert own == count and loss == pytest.approx(total / count, rel=1e-12)
        evaluated = model.evaluation_forward(batch)
        assert evaluated[1] == count and evaluated[0] == pytest.approx(total / count, rel=1e-12)
        assert evaluated[2] == state
        found = {name: np.zeros_like(a) for name, a in model.parameters.items()}
        model.training_backward(tape, found)
        for name, gradient in found.items():
            np.testing.assert_allclose(gradient, grads[name], rtol=1e-9, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("kind", ["markov", "lm", "transformer"])
def test_hypotheses_are_ranked_by_their_mean_by_default(kind):
    made = {
        "markov": lambda: fitted(fs.models.MarkovChain(5, 2), random_sequences(5)),
        "lm": lambda: language_model(dtype="float32"),
        "transformer": lambda: fs.models.TransformerLM(5, 8, 2, 1, dtype="float64", seed=1),
    }[kind]()
    for name, array in made.parameters.items():  # far from uniform
        made.parameters[name] = array * 3
    stop = [2, 3] if kind == "lm" else [1, 2]  # symbols that end some hypotheses, and not all
    _, log_probs = made.generate([[0], [3, 1]], 6, num_beams=6, num_results=6, stop=stop, return_log_probs=True)
    sums = 0
    for each in log_probs:
        means = [p.sum() / len(p) for p in each]
        assert (np.diff(means) < 1e-12).all()
        sums += (np.diff([p.sum() for p in each]) > 0).sum()
    assert sums  # which another penalty would not have


@pytest.mark.parametrize("cell", CELLS)
def test_forecaster_gradients_of_forward(cell):
    model = forecaster(cell, 2)
    rng = np.random.default_rng(1)
    x, lengths, dy = series((3, 5, 2)), np.array([5, 2, 4]), rng.normal(size=(3, 5, 2))
    dy *= (np.arange(5) < lengths[:, None])[..., None]

    def forward(x=x):
        y, _, tape = model.forward(x, lengths=lengths)
        return (y * dy).sum(), tape

    check_gradients(model, forward, lambda tape, grads: model.backward(dy, tape, grads=grads))
    dx, dstate = model.backward(dy, forward()[1])
    direction = rng.normal(size=x.shape)
    slope = (forward(x + 1e-6 * direction)[0] - forward(x - 1e-6 * direction)[0]) / 2e-6
    assert (dx * direction).sum() == pytest.approx(slope, rel=1e-6, abs=1e-8)
    assert dstate.h.shape == (3, 2, 6)


@pytest.mark.parametrize("cell", CELLS)
def test_forecaster_learns(cell, tmp_path):
    t = np.arange(300)
    x = 50 + 10 * np.sin(0.3 * t)
    model = fs.models.RecurrentForecaster(1, 16, cell=cell, seed=0)
    with pytest.raises(ValueError, match="this RecurrentForecaster should be fitted first"):
        model.log_prob(x)
    history = model.fit(x[:250], epochs=25, window=30, validation=x[200:], progress=False)
    assert history.loss[-1] < 0.05 * history.loss[0] and len(history.validation_loss) == 25
    residuals = x[1:250] - model(x[:250])[:-1]
    assert model.sigma2[0] == pytest.approx((residuals**2).mean(), rel=1e-4)
    assert model.sigma2[0] < 0.1 * x.var()
    assert np.abs(model(x)[100:-1] - x[101:]).mean() < 1.5
    model.save(tmp_path / "m.safetensors")
    for twin in fs.load(tmp_path / "m.safetensors"), pickle.loads(pickle.dumps(model)), copy.deepcopy(model):
        assert repr(twin) == repr(model)
        assert_same_bits(twin.forecast(x, 20), model.forecast(x, 20))
        assert_same_bits(twin.log_prob(x), model.log_prob(x))


def test_forecaster_does_not_mind_the_unit():
    x = series((90,))
    forecasts = []
    for scale, shift in ((1, 0), (1024, -4096)):  # powers of two: no rounding
        model = fs.models.RecurrentForecaster(1, 8, dtype="float64", seed=0)
        model.fit(scale * x + shift, epochs=3, window=20, progress=False)
        forecasts.append((model.forecast(scale * x + shift, 10) - shift) / scale)
    np.testing.assert_allclose(forecasts[1], forecasts[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m, x: m(x[0]), ValueError, r"x should be of shape \(S, T, 2\) or \(T, 2\), or a list, not \(7,\)"),
        (lambda m, x: m(x[:, :, None]), ValueError, "x should be of shape"),
        (lambda m, x: m([x.T, x]), ValueError, r"x\[1\] should be of shape \(T, 2\), not \(2, 7\)"),
        (lambda m, x: m.step(x), ValueError, r"x_t should be of shape \(B, 2\), not \(2, 7\)"),
        (lambda m, x: m.forecast(x.T, -1), ValueError, "horizon should be at least 0"),
        (lambda m, x: m.forecast(x.T[:0], 3), ValueError, r"series\[0\] should have at least 1 values, not 0"),
        (lambda m, x: m.fit(x.T[:1], epochs=1), ValueError, "series should have at least 2 steps, not 1"),
        (lambda m, x: m.fit(np.where(x.T > 20, np.nan, x.T), epochs=1), ValueError, r"series should be finite"),
        (lambda m, x: m.fit(x.T, epochs=1, window=0), ValueError, "window should be at least 1"),
        (lambda m, x: m(x.T > 20), TypeError, "x should hold real numbers, not bool"),
        (lambda m, x: fs.models.RecurrentForecaster(0, 3), ValueError, "input_size should be at least 1"),
        (lambda m, x: fs.models.RecurrentForecaster(1, 3, cell="elman"), ValueError, "cell should be one of"),
        (
            lambda m, x: m.load_state_dict({**m.state_dict(), "mean": np.zeros(3)}),
            ValueError,
            r"mean should be of shape \(2,\), not \(3,\)",
        ),
    ],
)
def test_forecaster_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call(forecaster(inputs=2), series((2, 7)))
