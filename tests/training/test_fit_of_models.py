"""`fit` of every model: what it learns from, what it is validated on, what it changes, and what it refuses."""

import inspect

import numpy as np
import pytest
from common import assert_same_bits
from protocol import fitted, random_ids, random_sequences

import fastseq as fs

M, F = fs.models, fs.training
QUIET = {"progress": False}


@pytest.fixture(autouse=True)
def one_thread():
    """So small as the models here are, more would be in each other's way on a busy machine."""
    fs.set_num_threads(1)


def waves(count, steps, seed=0):
    """Series of one period and many phases."""
    phases = np.random.default_rng(seed).uniform(0, 6, (count, 1))
    return np.sin(0.4 * np.arange(steps) + phases)


def padded(rows, value=77):
    """Rows as an array with something in the padding, and their lengths."""
    lengths = np.array([len(row) for row in rows])
    array = np.full((len(rows), lengths.max(), *np.shape(rows[0])[1:]), value, np.asarray(rows[0]).dtype)
    for into, row in zip(array, rows, strict=True):
        into[: len(row)] = row
    return array, lengths


PAIRS = [random_ids(5, n, 1) for n in (4, 2, 7, 3)], [random_ids(4, n, 2) for n in (3, 5, 1, 6)]

# Of each model: how it is made, what it learns from, and something else it may learn from.
MODELS = {
    "markov": (lambda: M.MarkovChain(5, 1), (random_sequences(5),), ([[4, 4, 4]],)),
    "linear": (lambda: M.AutoRegressive(2), (waves(1, 40),), (5 + 9 * waves(1, 50, 3) ** 3,)),
    "perceptron": (lambda: M.AutoRegressive(2, 3, seed=0), (waves(2, 40),), (5 + 9 * waves(2, 50, 3),)),
    "forecaster": (lambda: M.RecurrentForecaster(1, 4, seed=0), (waves(2, 40),), (5 + 9 * waves(2, 50, 3),)),
    "lm": (lambda: M.RecurrentLM(5, 3, 4, seed=0), (random_ids(5, 90),), (random_sequences(5),)),
    "transformer": (lambda: M.TransformerLM(5, 8, 2, 1, context=16, seed=0), (random_ids(5, 90),), ([[1, 1, 2]],)),
    "encoder": (
        lambda: M.TransformerEncoderModel(5, 8, 2, 1, num_labels=3, seed=0),
        (random_sequences(5)[2:], [0, 1, 2, 0]),
        (random_sequences(5)[2:], [1, 1, 0, 0]),
    ),
    "seq2seq": (lambda: M.Seq2Seq(5, 4, 3, 4, seed=0), PAIRS, (PAIRS[0][::-1], PAIRS[1])),
    "transformer pairs": (
        lambda: M.TransformerSeq2Seq(5, 4, 8, 2, 1, 1, seed=0),
        PAIRS,
        (PAIRS[0][::-1], PAIRS[1]),
    ),
}
EACH = pytest.mark.parametrize("name", MODELS)
SOLVED = ("markov", "linear")
TRAINED = pytest.mark.parametrize("name", [name for name in MODELS if name not in SOLVED])


@EACH
def test_fit_returns_a_history(name):
    make, data, _ = MODELS[name]
    model = make()
    history = model.fit(*data, **({} if name in SOLVED else QUIET))
    assert type(history) is F.History and np.isfinite(history.loss).all()
    assert model.loss_unit in ("nats a symbol", "nats a value", "nats a label", "squared deviations a value")
    if name in SOLVED:
        assert history.step.tolist() == [1] and history.stopped == "epochs" and history.loss_unit == model.loss_unit
    else:
        assert history.stopped == "epochs"
        one = make().fit(*data, epochs=1, **QUIET)
        assert len(history) == 10 * len(one)  # epochs


def test_loss_of_what_is_solved_for_is_the_mean_of_log_prob():
    sequences = random_sequences(5)
    chain = M.MarkovChain(5, 1)
    history = chain.fit(sequences)
    n = sum(map(len, sequences))
    assert history.loss[0] == pytest.approx(-chain.log_prob(sequences).sum() / n) and history.tokens[0] == n
    x = 3 + np.random.default_rng(0).normal(size=(2, 40))
    model = M.AutoRegressive(2)
    history = model.fit(x)
    assert history.loss[0] == pytest.approx(-model.log_prob(x).sum() / (2 * 38), rel=1e-6) and history.tokens[0] == 76


# --- What is learnt from


def test_forecaster_learns_from_series_shorter_than_the_window():
    rows = [*waves(20, 60), waves(1, 66)[0] * 0 + np.linspace(-1, 1, 66)]
    model = M.RecurrentForecaster(1, 16, seed=0)
    history = model.fit(rows, epochs=25, batch_size=4, **QUIET)
    assert history.tokens[: len(history) // 25].sum() == 20 * 59 + 2 * 64
    short = np.array(rows[:20])
    assert np.square(model(short)[:, 10:-1] - short[:, 11:]).mean() < 0.01


def test_lm_learns_from_a_short_text_by_default():
    text = np.tile([0, 1, 2, 0, 2, 1, 1], 30)[:200]
    model = M.RecurrentLM(3, 8, 24, seed=0)
    seen = []
    history = model.fit(text, epochs=60, lr=0.02, callbacks=[lambda info: seen.append(info.tokens)], **QUIET)
    assert sum(seen[: len(history) // 60]) == 199  # all but the last are inputs
    assert model.bits_per_symbol(text) < 0.15
    with pytest.raises(ValueError, match="ids should have at least batch_size"):
        M.RecurrentLM(3, 8, 24, seed=0).fit(text[:4], batch_size=5, **QUIET)


class Watched(M.TransformerLM):
    """A model that writes down what it is trained on."""

    def training_forward(self, batch, state=None, seed=None):
        task = self._task(batch, state)
        self._seen.append((*task.inputs, task.targets))
        return super().training_forward(batch, state, seed)


@pytest.mark.parametrize("size", [10, 16, 17, 33, 64])
def test_transformer_lm_learns_from_all_symbols_and_positions(size):
    text = np.arange(size)
    model = Watched(size, 8, 2, 1, context=16, seed=0)
    model._seen = []
    history = model.fit(text, epochs=5, **QUIET)
    each = len(history) // 5
    for epoch in range(5):
        learnt = [following for _, _, following in model._seen[epoch * each : (epoch + 1) * each]]
        assert set(np.concatenate(learnt)) == set(text)
    positions = np.concatenate([rows.steps() for _, rows, _ in model._seen])
    assert set(positions) == set(range(min(size, 16)))
    first = [tokens[0] for tokens, _, _ in model._seen if size in tokens]
    assert len(first) == 5 and model.begin == size  # the begin symbol is learnt from in every epoch
    for tokens, _, following in model._seen:
        assert (following[tokens < size] == tokens[tokens < size] + 1).all()


@TRAINED
def test_batches_are_not_put_into_batches(name):
    make = MODELS[name][0]
    batches = [F.Batch(np.zeros((2, 3), int), np.zeros((2, 3), int))]
    settings = {"batch_size": 4, "validation_split": 0.5}
    if "chunk" in inspect.signature(make().fit).parameters:
        settings["chunk"] = 5
    if name in ("perceptron", "forecaster"):
        return  # they take series alone
    for setting, value in settings.items():
        with pytest.raises(ValueError, match=f"{setting} should not be given with data that already is in batches"):
            make().fit(batches, **{setting: value}, **QUIET)


def test_pairs_may_be_padded():
    make, (sources, targets), _ = MODELS["seq2seq"]
    model, twin = make(), make()
    model.fit(sources, targets, epochs=2, **QUIET)
    (source, source_lengths), (target, lengths) = padded(sources, 99), padded(targets, -5)
    twin.fit(source, target, source_lengths=source_lengths, lengths=lengths, epochs=2, **QUIET)
    assert_same_bits(tuple(twin.parameters.values()), tuple(model.parameters.values()))


# --- What is validated on


def nats(model, rows):
    """The mean over all symbols of -log P."""
    return -model.log_prob(rows).sum() / sum(map(len, rows))


@pytest.mark.parametrize("size", [1, 9, 40, 1300])
@pytest.mark.parametrize("name", ["lm", "transformer"])
def test_validation_of_a_text_is_what_log_prob_says(name, size):
    make, data, _ = MODELS[name]
    text = random_ids(5, size, seed=8)
    for form in (text, text.tolist(), [text], text[None], (np.append(text, [99, 98])[None], [size])):
        model = make()
        history = model.fit(*data, steps=2, validate_every=2, validation=form, **QUIET)
        assert history.validation_loss[-1] == pytest.approx(nats(model, [text]), rel=1e-5)


@pytest.mark.parametrize("name", ["lm", "transformer"])
def test_validation_of_sequences_is_what_log_prob_says(name):
    make, data, _ = MODELS[name]
    rows = [random_ids(5, n, n) for n in (3, 0, 17, 1, 600, 5)]
    for form in (rows, padded(rows), tuple(rows)):
        model = make()
        history = model.fit(*data, steps=2, validate_every=2, validation=form, batch_size=2, **QUIET)
        assert history.validation_loss[-1] == pytest.approx(nats(model, rows), rel=1e-5)
    with pytest.raises(ValueError, match="validation should hold at least one symbol"):
        make().fit(*data, validation=[[], []], **QUIET)
    with pytest.raises(ValueError, match="validation_split should not be given with validation"):
        make().fit(*data, validation=rows, validation_split=0.5, **QUIET)


@pytest.mark.parametrize("name", ["seq2seq", "transformer pairs"])
def test_validation_of_pairs_is_what_log_prob_says(name):
    make, data, _ = MODELS[name]
    sources, targets = [random_ids(5, n, n) for n in (3, 1, 8)], [random_ids(4, n, n) for n in (6, 0, 2)]
    (source, source_lengths), (target, lengths) = padded(sources, 99), padded(targets, -5)
    for form in ((sources, targets), (source, target, source_lengths, lengths)):
        model = make()
        history = model.fit(
            *data, steps=2, validate_every=2, validation=form, batch_size=2, label_smoothing=0.5, **QUIET
        )
        wanted = -model.log_prob(sources, targets).sum() / (8 + 3)  # their ends, too
        assert history.validation_loss[-1] == pytest.approx(wanted, rel=1e-5)


def test_batches_without_targets_are_nothing_to_autoregress_on():
    with pytest.raises(ValueError, match="data should be Windows, or batches with targets"):
        M.AutoRegressive(2, 3, seed=0).training_forward(fs.training.Batch(np.ones((2, 2, 1))))


@pytest.mark.parametrize("pooling", ["mean", None])
def test_validation_of_labels_is_what_log_prob_says(pooling):
    rows = [random_ids(5, n, n) for n in (3, 1, 8)]
    labels = [0, 2, 1] if pooling else [np.arange(len(row)) % 3 for row in rows]
    model = M.TransformerEncoderModel(5, 8, 2, 1, pooling=pooling, num_labels=3, seed=0)
    array, lengths = padded(rows)
    of_array = labels if pooling else padded(labels)[0]
    for form in ((rows, labels), (array, of_array, lengths)):
        history = model.fit(rows, labels, steps=2, validate_every=2, validation=form, batch_size=2, **QUIET)
        wanted = -model.log_prob(rows, labels).sum() / (3 if pooling else 12)
        assert history.validation_loss[-1] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_validation_of_series_is_what_a_call_says(dtype):
    x, rows = 5 + 2 * waves(3, 40), [row[:n] for row, n in zip(4 + waves(4, 90, 2), (90, 1, 7, 30), strict=True)]
    for form in (rows, padded(rows)):
        model = M.RecurrentForecaster(1, 4, dtype=dtype, seed=0)
        history = model.fit(x, epochs=2, window=10, validation=form, batch_size=2, **QUIET)
        errors = np.concatenate([model(row)[:-1] - row[1:] for row in rows]) / model.state_dict()["deviation"]
        assert history.validation_loss[-1] == pytest.approx(np.square(errors).mean(), rel=1e-5)
    model = M.AutoRegressive(2, 3, dtype=dtype, seed=0)
    long = [row for row in rows if len(row) > 1]
    history = model.fit(x, epochs=2, validation=long, batch_size=2, **QUIET)
    errors = np.concatenate([model(row)[1:-1] - row[2:] for row in long]) / model.state_dict()["deviation"]
    assert history.validation_loss[-1] == pytest.approx(np.square(errors).mean(), rel=1e-5)


@TRAINED
def test_validation_split(name):
    make, data, _ = MODELS[name]
    first, second, other = make(), make(), make()
    histories = [
        model.fit(*data, epochs=1, validation_split=share, seed=3, **QUIET)
        for model, share in ((first, 0.3), (second, 0.3), (other, None))
    ]
    assert len(histories[0].validation_loss) == 1 and len(histories[2].validation_loss) == 0
    assert_same_bits(histories[0].validation_loss, histories[1].validation_loss)
    assert histories[0].tokens.sum() < histories[2].tokens.sum()
    for share in (0, 1, -0.2, "much"):
        with pytest.raises((ValueError, TypeError), match="validation_split should be"):
            make().fit(*data, validation_split=share, **QUIET)


def test_validation_split_takes_the_last_part_of_one_text_and_of_one_series():
    text, model = random_ids(5, 100), M.RecurrentLM(5, 3, 4, seed=0)
    history = model.fit(text, epochs=1, validation_split=0.2, **QUIET)
    assert history.tokens.sum() == 79
    assert history.validation_loss[-1] == pytest.approx(nats(model, [text[80:]]), rel=1e-5)
    x = waves(1, 50)[0] + np.arange(50)
    forecaster = M.RecurrentForecaster(1, 4, seed=0)
    forecaster.fit(x, epochs=1, validation_split=0.2, **QUIET)
    assert forecaster.state_dict()["mean"][0] == pytest.approx(x[:40].mean())


# --- What a fit that fails has changed


class Broken(Exception):
    pass


def breaks(step):
    """A callback that raises after a step."""

    def callback(info):
        if info.step == step:
            raise Broken

    return callback


def interrupts(info):
    raise KeyboardInterrupt


FAILURES = {
    "a misspelt option": ({"epoch": 3}, TypeError),
    "an option of a wrong value": ({"epochs": -1}, ValueError),
    "a wrong validation": ({"validation": 3}, (TypeError, ValueError)),
    "a callback": ({"epochs": 2, "callbacks": [breaks(2)]}, Broken),
    "Ctrl-C": ({"epochs": 2, "callbacks": [interrupts]}, KeyboardInterrupt),
    "a checkpoint": ({"epochs": 1, "checkpoint": "/dev/null/folder"}, OSError),
    "divergence": ({"epochs": 50, "lr": 1e300}, (F.DivergenceError, ValueError)),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("before", ["unfitted", "fitted"])
@EACH
def test_a_fit_that_fails_changes_nothing(name, before, failure):
    make, data, other = MODELS[name]
    model = make()
    if before == "fitted":
        model.fit(*data, **({} if name in SOLVED else {"epochs": 1, **QUIET}))
    settings, error = FAILURES[failure]
    was, history = model.state_dict(), getattr(model, "history", None)
    if name in SOLVED:
        settings, error = {"epochs": 3}, TypeError
    with np.errstate(all="ignore"), pytest.raises(error):
        model.fit(*other, **settings, **({} if name in SOLVED else QUIET))
    now = model.state_dict()
    assert list(now) == list(was)
    for key, array in was.items():
        assert_same_bits(now[key], array, key)
    assert getattr(model, "history", None) is history
    if before == "unfitted" and "mean" in model._measured:
        with pytest.raises(ValueError, match="should be fitted first"):
            model.forecast(other[0], 2)


@EACH
def test_bad_data_changes_nothing(name):
    make, data, _ = MODELS[name]
    model = fitted(make(), *data, **({} if name in SOLVED else {"epochs": 1, **QUIET}))
    was = model.state_dict()
    bad = [[np.nan, 1.0, 2.0, 3.0, 4.0, 5.0]] if hasattr(model, "forecast") else [[0, 1, 99]]
    with pytest.raises(ValueError):
        model.fit(bad, *([[0]] if len(data) == 2 else []))
    for key, array in model.state_dict().items():
        assert_same_bits(array, was[key], key)


def test_a_chain_that_cannot_load_is_what_it_was(monkeypatch):
    model = fitted(M.MarkovChain(5, 1), random_sequences(5))
    was = model.log_prob([[0, 1, 2]])
    other = fitted(M.MarkovChain(5, 1), [[4, 4, 4]]).state_dict()

    def fails(*arguments):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("fastseq.models.markov._count", fails)
        for change in (lambda: model.load_state_dict(other), lambda: model.fit([[4, 4, 4]])):
            with pytest.raises(MemoryError):
                change()
    assert_same_bits(model.log_prob([[0, 1, 2]]), was)
    assert model.state_dict()["counts"].sum() > 3


# --- Scaling


def test_a_constant_series_has_no_deviation():
    for make in (lambda: M.AutoRegressive(3, 4, seed=0), lambda: M.RecurrentForecaster(1, 4, seed=0)):
        for value in (14.62, 0.1 + 0.2, -1e-300, 1e300, 0.0):
            x = np.full(1000, value)
            model = fitted(make(), x, epochs=0, **QUIET)
            assert model.state_dict()["deviation"] == [1] and model.state_dict()["mean"] == [value]
        x = np.full(1000, 14.62)
        x[::3] = np.nextafter(14.62, 15)  # as it was rounded here and there
        assert fitted(make(), x, epochs=0, **QUIET).state_dict()["deviation"] == [1]
        x = np.full(1000, 14.62, np.float32)
        x[::3] = np.nextafter(np.float32(14.62), np.float32(15))
        assert fitted(make(), x, epochs=0, **QUIET).state_dict()["deviation"] == [1]
        x = 14.62 + 1e-12 * waves(1, 1000)[0]
        assert fitted(make(), x, epochs=0, **QUIET).state_dict()["deviation"] == pytest.approx(x.std(), rel=1e-2)


def test_a_constant_column_does_not_blow_up_what_is_a_little_different():
    x = np.stack([waves(1, 200)[0], np.full(200, 14.62)], axis=1)
    model = fitted(M.RecurrentForecaster(2, 4, dtype="float64", seed=0), x, epochs=1, **QUIET)
    moved = x + [0, 0.01]
    difference = np.abs(model.forecast(moved, 5)[:, 0] - model.forecast(x, 5)[:, 0])
    assert 0 < difference.max() < 0.01


def test_mean_and_deviation_by_hand():
    x = 7 + 3 * np.random.default_rng(0).normal(size=(300, 2)) * [1, 100]
    state = fitted(M.RecurrentForecaster(2, 3, seed=0), x, epochs=0, **QUIET).state_dict()
    np.testing.assert_allclose(state["mean"], x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(state["deviation"], x.std(0), rtol=1e-12)
    far = fitted(M.RecurrentForecaster(2, 3, seed=0), x + 1e9, epochs=0, **QUIET).state_dict()
    np.testing.assert_allclose(far["deviation"], (x + 1e9 - 1e9).std(0), rtol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "perceptron", "forecaster"])
def test_forecasts_far_from_zero_are_not_rounded_to_float32(kind):
    """The same as near 0, but for the digits that float64 loses."""
    near = waves(1, 120)[0]
    far = near + 1e6
    make = {
        "linear": lambda: M.AutoRegressive(2, dtype="float32"),
        "perceptron": lambda: M.AutoRegressive(3, 6, dtype="float32", seed=0),
        "forecaster": lambda: M.RecurrentForecaster(1, 6, seed=0),
    }[kind]
    settings = {} if kind == "linear" else {"epochs": 3, **QUIET}
    one, other = fitted(make(), near, **settings), fitted(make(), far, **settings)
    for y, wanted in ((other.forecast(far, 20), one.forecast(near, 20)), (other(far)[5:], one(near)[5:])):
        assert y.dtype == np.float64
        np.testing.assert_allclose(y - 1e6, wanted, atol=1e-3)
        assert len(np.unique(y)) > 10
    narrow = near.astype(np.float32)
    assert one(narrow).dtype == one.forecast(narrow, 3).dtype == np.float32
    assert one.forecast(list(range(9)), 3).dtype == np.float64


@pytest.mark.parametrize("kind", ["linear", "perceptron", "forecaster"])
@pytest.mark.parametrize("unit", [1e300, 1e-300, 1e140, 1e-140, 1e60])
def test_ends_of_the_range_of_float64(kind, unit):
    """Right in any unit, or refused by name where the variance would be no number."""
    x = 2 + waves(1, 80)[0] + 0.1 * np.random.default_rng(0).normal(size=80)
    make = {
        "linear": lambda: M.AutoRegressive(2, dtype="float32"),
        "perceptron": lambda: M.AutoRegressive(3, 6, seed=0),
        "forecaster": lambda: M.RecurrentForecaster(1, 6, seed=0),
    }[kind]
    settings = {} if kind == "linear" else {"epochs": 2, **QUIET}
    model = make()
    if unit in (1e300, 1e-300):
        with pytest.raises(ValueError, match="series should vary by between 1e-150 and 1e[+]150, or not at all"):
            model.fit(unit * x, **settings)
        return
    model.fit(unit * x, **settings)
    near = fitted(make(), x, **settings)
    np.testing.assert_allclose(model.forecast(unit * x, 9) / unit, near.forecast(x, 9), rtol=1e-3)
    n = len(x) - (1 if kind == "forecaster" else model.order)
    assert model.log_prob(unit * x)[0] + n * np.log(unit) == pytest.approx(near.log_prob(x)[0], rel=1e-2, abs=1)


# --- Checkpoints


@pytest.mark.parametrize("name", ["perceptron", "forecaster"])
def test_a_checkpoint_holds_the_variance_of_its_parameters(name, tmp_path):
    make, (x,), _ = MODELS[name]
    during = []
    model = make()
    model.fit(
        x,
        epochs=3,
        checkpoint=tmp_path,
        keep=None,
        callbacks=[lambda info: during.append(info.model.log_prob(x))],
        **QUIET,
    )
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    for file in files:
        twin = make()
        content = F.load_checkpoint(file)
        twin.load_state_dict(content["model"])
        first = 1 if name == "forecaster" else 2
        errors = twin(x)[:, first - 1 : -1] - x[:, first:]
        assert twin.sigma2[0] == pytest.approx(np.square(errors).mean(), rel=1e-6)
        assert_same_bits(twin.log_prob(x), during[content["step"] - 1])
    assert_same_bits(twin.log_prob(x), model.log_prob(x))


# --- What is refused


def test_nothing_is_forecast_before_anything_is_learnt():
    x = waves(2, 20)
    model = M.RecurrentForecaster(1, 4, seed=0)
    for call in (
        lambda: model.forecast(x, 3),
        lambda: model.forecast(x, 0),
        lambda: model(x),
        lambda: model.step(x[:, :1]),
        lambda: model.log_prob(x),
        lambda: model.sigma2,
    ):
        with pytest.raises(ValueError, match="this RecurrentForecaster should be fitted first"):
            call()
    F.fit(model, F.Windows(x[0], steps=5, batch_size=4), epochs=1, **QUIET)  # of its own will without scaling
    assert model.forecast(x, 3).shape == (2, 3)
    other = M.RecurrentForecaster(1, 4, seed=0)
    other.load_state_dict(model.state_dict())
    assert_same_bits(other.forecast(x, 3), model.forecast(x, 3))


TEXT = "You may"


@pytest.mark.parametrize("name", ["markov", "lm", "transformer", "encoder", "seq2seq", "transformer pairs"])
@pytest.mark.parametrize("text", [TEXT, list(TEXT), [TEXT, TEXT], np.array(list(TEXT)), TEXT.encode()])
def test_text_is_no_ids(name, text):
    make, data, _ = MODELS[name]
    model = make()
    calls = [lambda: model.fit(text, *data[1:])]
    if name in ("seq2seq", "transformer pairs"):
        calls += [
            lambda: model.generate(text, 3),
            lambda: next(model.stream(text, 3)),
            lambda: model(text, [0]),
            lambda: model([0], text),
            lambda: model.log_prob([[0]], text),
            lambda: model.initial_state(text),
            lambda: model.step(text, None),
        ]
    elif name == "encoder":
        calls += [lambda: model(text), lambda: model.predict(text), lambda: model.forward(text)]
    else:
        model.fit(*data, **({} if name == "markov" else {"epochs": 1, **QUIET}))
        calls += [
            lambda: model.generate(text, 3),
            lambda: next(model.stream(text, 3)),
            lambda: model(text),
            lambda: model.log_prob(text),
            lambda: model.bits_per_symbol(text),
        ]
        if name != "markov":
            calls += [
                lambda: model.step(text),
                lambda: model.forward(text),
                lambda: model.fit(*data, validation=text, **QUIET),
            ]
    for i, call in enumerate(calls):
        with pytest.raises(TypeError, match=r"should be ids, integers, not text: .*; give each symbol a number"):
            print(i, call())


def test_settings_without_effect_are_refused():
    with pytest.raises(ValueError, match="activation should not be given where hidden is None"):
        M.AutoRegressive(2, activation="tanh")
    with pytest.raises(ValueError, match="chunk should be given with one text alone"):
        M.RecurrentLM(5, 3, 4).fit(random_sequences(5), chunk=9, **QUIET)
    for name in ("batch_size", "validation_split", "epochs", "lr"):
        with pytest.raises(TypeError, match=f"{name} is a setting of training, which a linear model does without"):
            M.AutoRegressive(2).fit(waves(1, 40), **{name: 1})


# --- The choice of an order


def test_markov_choose_of_padded_and_of_many_short_sequences():
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(400):  # the third symbol follows from the two before; no sequence goes on
        a, b = rng.integers(0, 3, 2)
        rows.append(np.array([a, b, (a + 2 * b) % 3, rng.integers(0, 3)])[: rng.integers(2, 5)])
    array, lengths = padded(rows, -1)
    for criterion, more in (("bic", {}), ("aic", {}), ("held_out", {"held_out": rows[::2]})):
        chosen = M.MarkovChain.choose(rows, 3, [0, 1, 2], criterion, **more)
        assert chosen.order == 2
        twin = M.MarkovChain.choose(array, 3, [0, 1, 2], criterion, lengths=lengths, **more)
        assert twin.order == 2
        assert_same_bits(twin.log_prob(rows), chosen.log_prob(rows))
    # Sequences end: what stands before the first symbol of one is not the end of another.
    only = [np.array([0, 1]), np.array([1, 0])] * 50
    assert M.MarkovChain.choose(only, 2, [0, 1]).order == 1
    with pytest.raises(ValueError, match="sequences should hold symbols with 2 others before them"):
        M.MarkovChain.choose(only, 2, [0, 1, 2])


@pytest.mark.parametrize("hidden", [None, 2])
def test_autoregressive_choose_of_padded_and_of_many_short_series(hidden):
    rng = np.random.default_rng(4)
    rows = []
    for _ in range(60):
        x = list(rng.normal(size=2))
        for _ in range(int(rng.integers(8, 14))):
            x.append(0.5 * x[-1] - 0.7 * x[-2] + 0.1 * rng.normal())
        rows.append(np.array(x))
    array, lengths = padded(rows, np.nan)
    more = {} if hidden is None else {"hidden": hidden, "seed": 0, "epochs": 2, **QUIET}
    chosen = M.AutoRegressive.choose(rows, [1, 2, 3], **more)
    twin = M.AutoRegressive.choose(array, [1, 2, 3], lengths=lengths, **more)
    assert twin.order == chosen.order >= 2
    assert_same_bits(tuple(twin.state_dict().values()), tuple(chosen.state_dict().values()))


def test_a_column_is_one_series() -> None:
    series = np.sin(np.arange(40) / 3)
    model = fs.models.RecurrentForecaster(1, 6, seed=0)
    model.fit(series[:, None], epochs=1, progress=False)
    assert_same_bits(model.forecast(series[:, None], 5), model.forecast(series, 5)[:, None])
    assert model.log_prob(series[:, None]).shape == model.log_prob(series).shape == (1,)
    assert_same_bits(model.log_prob(series[:, None]), model.log_prob(series))


@pytest.mark.parametrize(
    ("make", "data", "name"),
    [
        (lambda: M.RecurrentLM(5, 4, 6), random_ids(5, 40, 0), "data"),
        (lambda: M.TransformerLM(5, 4, 2, 1, context=8), random_ids(5, 40, 0), "data"),
        (lambda: M.MarkovChain(5), random_ids(5, 40, 0), "sequences"),
        (lambda: M.RecurrentForecaster(1, 4), waves(1, 40)[0], "series"),
        (lambda: M.RecurrentForecaster(1, 4), waves(3, 40).T[:, :1], "series"),
        (lambda: M.AutoRegressive(2), waves(1, 40)[0], "series"),
    ],
)
def test_targets_are_no_lengths(make, data, name):
    """A model that makes the targets itself says so, of arrays and of lists."""
    said = rf"lengths should be .*, not targets: the model makes these itself.*, as in fit\({name}\)"
    for given in ((data[:-1], data[1:]), (list(data[:-1]), list(data[1:])), ([data[:-1]], [data[1:]])):
        with pytest.raises(ValueError, match=said):
            make().fit(*given)


def test_lengths_are_no_targets():
    M.MarkovChain(5).fit([[1, 2], [3, 0]], [2, 1])
    M.MarkovChain(5).fit([3], [1])
    M.RecurrentForecaster(1, 4).fit(waves(2, 9), np.array([9, 7]), epochs=1, **QUIET)


def test_rows_with_an_axis_of_one_value_are_series():
    """A list of (T, 1) is what a list of (T,) is, and what comes out has the axis, too."""
    rows = [waves(1, 30)[0], waves(1, 21, seed=1)[0]]
    models = [M.RecurrentForecaster(1, 4, seed=0) for _ in range(2)]
    columns = [row[:, None] for row in rows]
    losses = [model.fit(given, epochs=2, **QUIET).loss for model, given in zip(models, (rows, columns), strict=True)]
    assert_same_bits(*losses)
    one, other = models[0].forecast(rows, 3), models[0].forecast(columns, 3)
    assert other.shape == (2, 3, 1)
    assert_same_bits(one, other[..., 0])
    assert_same_bits(models[0](rows), models[0](columns)[..., 0])
    assert_same_bits(models[0].log_prob(rows), models[0].log_prob(columns))
    for mixed in ([rows[0], columns[1]], [columns[0], waves(2, 9).T]):
        with pytest.raises(ValueError, match=r"series\[\d\] should be of shape"):
            models[0].forecast(mixed, 3)
