"""The arguments of `fit`, what batches weigh in its means, states over streams, and what a failed run leaves."""

from __future__ import annotations

import functools
import math
import signal
import sys
import traceback
from typing import Any

import numpy as np
import pytest
from common import assert_same_bits
from learners import Affine, Leaky, Tiny, padded_squared_error, series, squared_error, streams
from test_metrics import ignoring, tagged

import fastseq as fs
from fastseq import checks
from fastseq.training import (
    SGD,
    Adam,
    AdamW,
    Batch,
    ConstantSchedule,
    PaddedBatches,
    PlateauSchedule,
    RMSProp,
    StepSchedule,
    Streams,
    arguments,
    fit,
    load_checkpoint,
)
from fastseq.training.learners import takes

quiet = functools.partial(fit, progress=False)


def tagger(seed: int = 0) -> Any:
    return fs.Sequential(fs.Embedding(5, 4, seed=seed), fs.GRU(4, 6, seed=1), fs.Linear(6, 5, seed=2))


def parameters(model: Any) -> list[Any]:
    return list(model.parameters.values())


# Arguments


def test_there_are_ten_epochs_where_nothing_is_said() -> None:
    history = quiet(Tiny(), streams())
    assert len(history) == 190 and history.stopped == "epochs"
    assert len(quiet(Tiny(), streams(), steps=7)) == 7


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("adam", lambda m: Adam(m, 0.03)),
        ("AdamW", lambda m: AdamW(m, 0.03)),
        ("sgd", lambda m: SGD(m, 0.03)),
        ("rmsprop", lambda m: RMSProp(m, 0.03)),
        (None, lambda m: AdamW(m, 0.03)),
    ],
)
def test_optimisers_by_name(name: Any, made: Any) -> None:
    one, other, third = Tiny(), Tiny(), Tiny()
    quiet(one, streams(), steps=9, optimiser=made(one))
    quiet(other, streams(), steps=9, optimiser=name, lr=0.03)
    quiet(third, streams(), steps=9, optimizer=name, lr=0.03)
    assert_same_bits(parameters(other), parameters(one))
    assert_same_bits(parameters(third), parameters(one))


def test_a_name_without_a_rate() -> None:
    one, other, third, fourth = Tiny(), Tiny(), Tiny(), Tiny()
    quiet(one, streams(), steps=5, optimiser=Adam(one))
    quiet(other, streams(), steps=5, optimiser="adam")
    assert_same_bits(parameters(other), parameters(one))
    history = quiet(third, streams(), steps=5, optimiser="sgd", schedule=ConstantSchedule(0.25))
    quiet(fourth, streams(), steps=5, optimiser=SGD(fourth, 0.25))
    assert_same_bits(parameters(third), parameters(fourth))
    np.testing.assert_array_equal(history.learning_rate, 0.25)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("cross_entropy", fs.losses.softmax_cross_entropy),
        ("softmax_cross_entropy", fs.losses.softmax_cross_entropy),
        ("mean-squared-error", fs.losses.mean_squared_error),
        ("binary_cross_entropy", fs.losses.binary_cross_entropy_with_logits),
        ("huber", fs.losses.huber),
    ],
)
def test_losses_by_name(name: str, function: Any) -> None:
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(n, 3)).astype("float32") for n in (1, 4, 2, 7)]
    if "softmax" in function.__name__:
        given = taken = [rng.integers(0, 3, len(row)) for row in x]
    else:  # integers are real numbers, too, and the last axis of 1 may be left out
        given = [rng.integers(0, 2, len(row)) for row in x]
        taken = [row[:, None].astype("float32") for row in given]
    losses = []
    for loss, targets in ((name, given), (function, taken)):
        model = fs.Linear(3, 3 if "softmax" in function.__name__ else 1, seed=0)
        losses.append(quiet(model, PaddedBatches(x, targets, batch_size=2), loss=loss, epochs=3).loss)
    assert_same_bits(losses[0], losses[1])


def test_losses_by_name_of_other_dtypes() -> None:
    layer = fs.reference.Linear(3, 1, dtype="longdouble", seed=0)
    history = quiet(layer, (np.ones((4, 5, 3)), np.zeros((4, 5))), loss="mean_squared_error", epochs=1)
    assert history.loss[0] > 0


@pytest.mark.parametrize(
    ("unknown", "said"),
    [
        ({"learning_rate": 0.1}, "fit has no argument learning_rate: here it is lr"),
        ({"n_epochs": 1}, "n_epochs: here it is epochs"),
        ({"batchsize": 1}, "batchsize: here it is batch_size"),
        ({"verbose": 1}, "verbose: here it is progress"),
        ({"validation_data": 1}, "validation_data: here it is validation$"),
        ({"early_stopping": 1}, "early_stopping: here it is patience"),
        ({"epoch": 1}, r"epoch: did you mean epochs\?"),
        ({"shuffle": True}, r"shuffle: every epoch has an order of its own; .*shuffle=False\) has one"),
        ({"Callback": 1}, r"Callback: did you mean callbacks\?"),
        ({"xyzzy": 1, "random_state": 2}, "xyzzy; and no random_state: here it is seed; its arguments are loss, optim"),
    ],
)
def test_unknown_arguments_are_refused_with_ours(unknown: Any, said: str) -> None:
    model, calls = Tiny(), []
    model.grads["bias"][:] = 1
    before = parameters(model)
    with pytest.raises(TypeError, match=said):
        fit(model, streams(), callbacks=[calls.append], **unknown)
    assert not calls and (model.grads["bias"] == 1).all()
    assert all(a is b for a, b in zip(before, parameters(model), strict=True))


def test_arguments_of_the_models_own_fit_are_known() -> None:
    with pytest.raises(TypeError, match=r"chunks: did you mean chunk\?"):
        fs.models.RecurrentLM(5, 4, 6).fit(np.arange(100) % 5, chunks=3)


# Data


def test_a_tuple_of_arrays_is_padded_batches() -> None:
    ids, targets = tagged()
    wanted = tagger()
    data = PaddedBatches(ids, targets, batch_size=4, seed=None)
    history = quiet(wanted, data, loss=ignoring, epochs=2, validation=data, seed=5)
    time = max(map(len, ids))
    x = np.full((6, time), 77)  # no id: what is past a length may be anything
    y = np.full((6, time), 99)
    for i, (row, target) in enumerate(zip(ids, targets, strict=True)):
        x[i, : len(row)], y[i, : len(row)] = row, target
    lengths = [len(row) for row in ids]
    for given in ((ids, targets), ([list(map(int, row)) for row in ids], targets), (x, y, lengths)):
        model = tagger()
        other = quiet(model, given, loss=ignoring, epochs=2, validation=given, batch_size=4, seed=5)
        assert_same_bits(parameters(model), parameters(wanted))
        np.testing.assert_allclose(other.validation_loss, history.validation_loss, rtol=1e-6)
    # 32 rows in a batch, and one number a row.
    many = np.zeros((70, 3), int)
    assert len(quiet(tagger(), (many, many), loss="cross_entropy", epochs=1)) == 3
    validated = arguments.rows_of("validation", (many, many))
    assert [len(validated.batches(size)) for size in (arguments.BATCH_SIZE, 10)] == [3, 7]
    rows = arguments.rows_of("data", (x, np.arange(6), lengths))
    assert rows is not None and [len(row) for row in rows.sequences] == lengths and list(rows.targets) == list(range(6))


def test_a_function_that_does_not_tell_its_arguments_takes_none_by_name() -> None:
    assert not takes(min, "lengths")
    assert takes(padded_squared_error, "lengths") and not takes(squared_error, "lengths")


def test_batches_may_still_be_a_tuple() -> None:
    made = tuple(Batch(one, one) for one in np.ones((3, 2, 4, 3)))
    assert len(quiet(Affine(), made, loss=squared_error, epochs=2)) == 6


@pytest.mark.parametrize(
    ("count", "share", "held"), [(10, 0.1, 1), (10, 0.26, 3), (3, 0.01, 1), (3, 0.99, 2), (2, 0.5, 1)]
)
def test_a_share_of_the_sequences_is_held_out(count: int, share: float, held: int) -> None:
    seen: dict[str, list[int]] = {"training": [], "validation": []}

    class Watching(fs.Linear):
        def forward_carrying(self, x: Any, *args: Any, **more: Any) -> Any:
            seen["training"] += x[:, 0, 0].astype(int).tolist()
            return super().forward_carrying(x, *args, **more)

        def run(self, x: Any, *args: Any, **more: Any) -> Any:
            seen["validation"] += x[:, 0, 0].astype(int).tolist()
            return super().run(x, *args, **more)

    x = np.arange(count, dtype="float32")[:, None, None]
    options: dict[str, Any] = {"loss": "mean_squared_error", "epochs": 1, "validation_split": share}
    quiet(Watching(1, 1), (x, x), seed=3, **options)
    assert len(seen["validation"]) == held
    assert sorted(seen["training"] + seen["validation"]) == list(range(count))
    first = sorted(seen["validation"])
    draws = set()
    for seed in (3, *range(8)):
        seen["validation"].clear()
        quiet(Watching(1, 1), (x, x), seed=seed, **options)
        draws.add(tuple(sorted(seen["validation"])))
        assert seed != 3 or sorted(seen["validation"]) == first
    assert len(draws) > 1
    with pytest.raises(ValueError, match="validation should be None with validation_split"):
        quiet(Watching(1, 1), (x, x), validation=(x, x), **options)
    with pytest.raises(ValueError, match="validation_split should be None where there are less than 2"):
        quiet(Watching(1, 1), (x[:1], x[:1]), **options)
    for bad in (0, 1, -0.1):
        with pytest.raises(ValueError, match="validation_split"):
            quiet(Watching(1, 1), (x, x), **{**options, "validation_split": bad})


# What batches weigh


def mean_over_rows(model: Any, ids: Any, targets: Any) -> float:
    """The cross-entropy of all that counts, row by row."""
    losses, counts = [], []
    for row, target in zip(ids, targets, strict=True):
        losses.append(fs.losses.softmax_cross_entropy(model(row[None])[0], target, ignore_index=-1)[0])
        counts.append(int((target >= 0).sum()))
    return float(np.average(losses, weights=counts))


def counting_loss(y: Any, targets: Any, lengths: Any = None) -> Any:
    """A loss that is none of ours, and says what counts."""
    real = targets >= 0
    if lengths is not None:
        real &= np.arange(targets.shape[1]) < lengths[:, None]
    shifted = y - y.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    each = -np.take_along_axis(logs, np.maximum(targets, 0)[..., None], -1)[..., 0]
    count = int(real.sum())
    return np.sum(each[real]) / max(count, 1), np.zeros_like(y), count


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(fs.losses.softmax_cross_entropy, ignore_index=-1),
        ignoring,
        lambda *args, **more: tuple(2 * part for part in ignoring(*args, **more)),
        lambda *args, **more: (ignoring(*args, **more)[0] + ignoring(*args, **more)[0], ignoring(*args, **more)[1]),
        counting_loss,
        functools.partial(fs.reference.losses.softmax_cross_entropy, ignore_index=-1),
    ],
    ids=["partial", "wrapped", "scaled", "twice", "own", "reference"],
)
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_batches_weigh_what_counts_in_them(loss: Any, batch_size: int, request: Any) -> None:
    ids, targets = tagged()
    targets[3][:] = -1  # a batch in which nothing counts, where rows stand alone
    model = tagger()
    data = PaddedBatches(ids, targets, batch_size=batch_size, shuffle=False)
    history = quiet(model, data, loss=loss, optimiser=AdamW(model, 0.0), epochs=1, validation=data)
    factor = 2 if "scaled" in request.node.name or "twice" in request.node.name else 1
    wanted = factor * mean_over_rows(model, ids, targets)
    np.testing.assert_allclose(history.validation_loss, [wanted], rtol=1e-5)
    np.testing.assert_allclose(history.epoch_loss, [wanted], rtol=1e-5)


def test_a_batch_of_nothing_changes_no_mean() -> None:
    x = np.ones((1, 4, 3), "float32")
    batch = Batch(x, 2 * x, np.array([4]))
    empty = Batch(np.full((1, 4, 3), np.nan, "float32"), x, np.array([0]))
    layer = Affine()
    none = quiet(layer, [batch], loss=padded_squared_error, epochs=1, lr=0.0, validation=[batch])
    for made in ([empty, batch], [batch, empty], [batch, empty, batch]):
        more = quiet(layer, [batch], loss=padded_squared_error, epochs=1, lr=0.0, validation=made)
        assert more.validation_loss == none.validation_loss

    def undefined(y: Any, targets: Any, lengths: Any) -> Any:
        value, gradient = padded_squared_error(y, targets, lengths)
        return (value if lengths.sum() else math.nan), gradient

    more = quiet(layer, [batch], loss=undefined, epochs=1, lr=0.0, validation=[empty, batch])
    assert more.validation_loss == none.validation_loss
    with pytest.raises(ValueError, match="validation should have something that counts"):
        quiet(layer, [batch], loss=padded_squared_error, epochs=1, validation=[empty])


def test_lengths_weigh_a_loss_that_says_nothing() -> None:
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(n, 3)).astype("float32") for n in (1, 3, 9, 17)]
    layer = Affine()
    data = PaddedBatches(x, x, batch_size=2, shuffle=False)
    history = quiet(layer, data, loss=padded_squared_error, lr=0.0, epochs=1, validation=data)
    assert history.validation_loss == pytest.approx(np.mean((layer(np.concatenate(x)) - np.concatenate(x)) ** 2))
    uneven = [Batch(one, one) for one in (np.ones((2, 2, 3)), np.zeros((2, 7, 3)))]
    history = quiet(layer, uneven, loss=squared_error, lr=0.0, epochs=1, validation=uneven)
    losses = [squared_error(layer(batch.inputs), batch.targets)[0] for batch in uneven]
    assert history.validation_loss == pytest.approx(np.average(losses, weights=[2, 7]))


def test_rows_weigh_alike_where_time_has_ended() -> None:
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(n, 1)).astype("float32") for n in (1, 2, 3, 9, 17)]
    y = np.array([0, 1, 2, 0, 1])
    model = fs.Sequential(fs.GRU(1, 4, seed=0), fs.LastStep(), fs.Linear(4, 3, seed=1))
    data = PaddedBatches(x, y, batch_size=2, shuffle=False)
    history = quiet(model, data, loss="cross_entropy", lr=0.0, epochs=1, validation=data, metrics=["accuracy"])
    losses = [fs.losses.softmax_cross_entropy(model(row[None]), y[i : i + 1])[0] for i, row in enumerate(x)]
    assert history.validation_loss == pytest.approx(np.mean(losses))
    right = [model(row[None])[0].argmax() == wanted for row, wanted in zip(x, y, strict=True)]
    assert history.metrics["accuracy"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("value", [3.0, (3.0,), None, (1.0, 2.0, 3.0, 4.0)])
def test_what_a_loss_should_return(value: Any) -> None:
    with pytest.raises(TypeError, match=r"loss should return \(mean, gradient\)"):
        quiet(Affine(), [Batch(np.ones((1, 2, 3)), np.ones((1, 2, 3)))], loss=lambda y, t: value)


def test_a_target_a_row_needs_a_pooling_layer() -> None:
    x, y = np.ones((4, 5, 1), "float32"), np.array([0, 1, 2, 0])
    with pytest.raises(ValueError, match="targets should have an axis of time.*LastStep"):
        quiet(fs.Sequential(fs.GRU(1, 3), fs.Linear(3, 3)), (x, y), loss="cross_entropy")


# Callbacks


@pytest.mark.parametrize("which", [0, 1, 2])
def test_any_of_several_callbacks_may_end_the_run(which: int) -> None:
    calls: list[int] = []

    def asking(place: int) -> Any:
        def callback(info: Any) -> bool:
            calls.append(place)
            return place == which and info.step == 3

        return callback

    history = quiet(Tiny(), streams(), callbacks=[asking(i) for i in range(3)])
    assert history.stopped == "callback" and len(history) == 3
    assert calls == [0, 1, 2] * 3  # all of them are told of the step


# States over streams


def stream_model(dtype: str = "float64") -> Any:
    return fs.Sequential(fs.LSTM(1, 5, dtype=dtype, seed=0), fs.Linear(5, 1, dtype=dtype, seed=1))


def test_a_container_carries_its_state_over_streams() -> None:
    x = np.sin(np.arange(81) * 0.2)
    data = Streams(x, batch_size=2, steps=8)
    model = stream_model()
    history = quiet(model, data, loss="mean_squared_error", optimiser=SGD(model, 0.0), epochs=1, validation=data)
    whole = np.stack([x[:40], x[40:80]])[..., None], np.stack([x[1:41], x[41:]])[..., None]
    wanted = np.mean((model(whole[0]) - whole[1]) ** 2)
    assert len(history) == 5
    np.testing.assert_allclose([history.epoch_loss, history.validation_loss], wanted, rtol=1e-12)
    # And a gradient: with truncate the same as by hand.
    one, other = stream_model(), stream_model()
    quiet(one, data, loss="mean_squared_error", optimiser=SGD(one, 0.5), steps=2, truncate=3)
    state, optimiser = None, SGD(other, 0.5)
    for batch in list(data.batches(0))[:2]:
        y, state, tape = other.forward_carrying(batch.inputs, state)
        other.zero_grad()
        other.backward(fs.losses.mean_squared_error(y, batch.targets)[1], tape, truncate=3)
        optimiser.step()
    assert_same_bits(parameters(one), parameters(other))


@pytest.mark.parametrize(
    ("make", "lost"),
    [
        (lambda: fs.GRU(3, 3, bidirectional=True), "bidirectional"),
        (lambda: fs.Sequential(fs.LSTM(3, 3), fs.RNN(3, 2, bidirectional=True), fs.Linear(4, 3)), "bidirectional"),
        (lambda: fs.TransformerEncoder(1, 4, 2, 8), "carries no state"),
        (lambda: fs.Sequential(fs.GRU(3, 4), fs.MultiheadAttention(4, 2), fs.Linear(4, 3)), "carries no state"),
    ],
)
def test_what_cannot_go_on_refuses_streams(make: Any, lost: str) -> None:
    batches = list(streams().batches(0))
    for given in (streams(), batches):
        for options in ({"data": given}, {"data": [Batch(*batches[0][:2])], "validation": given}):
            with pytest.raises(ValueError, match=f"should not be streams.*{lost}"):
                quiet(make(), loss=squared_error, steps=1, **options)

    class Own:
        def __len__(self) -> int:
            return len(batches)

        def batches(self, epoch: int, start: int = 0) -> Any:
            return iter(batches[start:])

    model = make()
    with pytest.raises(ValueError, match=lost):
        quiet(model, Own(), loss=squared_error, steps=1)
    # Without streams there is nothing to lose.
    assert not any(gradient.any() for gradient in model.grads.values())
    quiet(fs.GRU(3, 3, bidirectional=True), [Batch(*batches[0][:2])], loss=lambda y, t: (0.0, y), steps=1)


def test_a_batch_that_carries_nothing_ends_what_was_carried() -> None:
    x = np.random.default_rng(0).normal(size=(3, 2, 4, 3)).astype("float32")
    go_on = np.array([False, False])
    batches = [Batch(x[0], x[0], None, ~go_on), Batch(x[1], x[1]), Batch(x[2], x[2], None, go_on)]
    layer = Leaky()
    history = quiet(layer, batches, loss=squared_error, steps=3, lr=0.0, validation=batches, validate_every=3)
    assert [call["state"] for call in layer.calls] == [None] * 3
    alone = [squared_error(layer(batch.inputs)[0], batch.targets)[0] for batch in batches]
    assert history.validation_loss == pytest.approx(np.mean(alone))
    assert_same_bits(history.loss, np.array(alone))
    # The other rows of a batch in which one is fresh go on.
    batches[2] = Batch(x[2], x[2], None, np.array([True, False]))
    batches[1] = Batch(x[1], x[1], None, go_on)
    layer = Leaky()
    quiet(layer, batches, loss=squared_error, steps=3)
    assert not layer.calls[2]["state"].h[0].any() and layer.calls[2]["state"].h[1].all()


def test_rows_that_go_on_have_to_be_as_many() -> None:
    x = np.ones((3, 4, 3), "float32")
    batches = [Batch(x, x, None, np.ones(3, bool)), Batch(x[:2], x[:2], None, np.array([True, False]))]
    with pytest.raises(ValueError, match="data should give batches of as many rows as the one before.*3, not 2"):
        quiet(Leaky(), batches, loss=squared_error, steps=2)


# What a failed run leaves


class Boom(RuntimeError):
    """Raised on purpose."""


def up_to(steps: int) -> Any:
    """Parameters and optimiser after some steps."""
    model = Tiny()
    optimiser, schedule = AdamW(model, 0.02), PlateauSchedule(0.02, factor=0.5, patience=0)
    quiet(
        model, streams(), steps=steps, optimiser=optimiser, schedule=schedule, validation=streams(9), validate_every=2
    )
    return model, optimiser, schedule


class Failing(Tiny):
    """Fails where it is told to."""

    where = ""

    def training_forward(self, batch: Any, state: Any = None, seed: Any = None) -> Any:
        if self.where == "forward" and len(self.seeds) == 5:
            raise Boom
        return super().training_forward(batch, state, seed)

    def training_backward(self, tape: Any, grads: Any = None) -> None:
        super().training_backward(tape, grads)
        if self.where == "backward" and len(self.seeds) == 6:
            raise Boom

    def evaluation_forward(self, batch: Any, state: Any = None) -> Any:
        if self.where == "validation" and len(self.seeds) == 6:
            raise Boom
        return super().evaluation_forward(batch, state)


class FailingAdamW(AdamW):
    """Fails in the step it is told to, before anything has changed."""

    fails = False

    def step(self, grads: Any = None) -> None:
        if self.fails and self.steps == 5:
            raise Boom
        super().step(grads)


@pytest.mark.parametrize(
    ("where", "steps"),
    [
        ("data", 5),
        ("forward", 5),
        ("backward", 5),
        ("schedule", 5),
        ("optimiser", 5),
        ("validation", 6),
        ("callback", 6),
    ],
)
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_a_run_that_fails_leaves_what_was_after_the_last_whole_step(
    where: str, steps: int, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "Boom", error)

    class Rate(PlateauSchedule):
        def lr_at(self, step: int) -> float:
            if where == "schedule" and step == 5:
                raise error
            return super().lr_at(step)

    class Data(Streams):
        def _batches(self, epoch: int, start: int) -> Any:
            for i, batch in enumerate(super()._batches(epoch, start)):
                if where == "data" and i == 5:
                    raise error
                yield batch

    def callback(info: Any) -> None:
        if where == "callback" and info.step == 6:
            raise error

    model = Failing()
    monkeypatch.setattr(Failing, "where", where)
    monkeypatch.setattr(FailingAdamW, "fails", where == "optimiser")
    optimiser, schedule = FailingAdamW(model, 0.02), Rate(0.02, factor=0.5, patience=0)
    with pytest.raises(error):
        quiet(
            model,
            Data(series(388), batch_size=3, steps=7, seed=5),
            optimiser=optimiser,
            schedule=schedule,
            validation=streams(9),
            validate_every=2,
            patience=10,
            callbacks=[callback],
        )
    wanted = up_to(steps)
    assert_same_bits(parameters(model), parameters(wanted[0]))
    ours, theirs = optimiser.state_dict(), wanted[1].state_dict()
    assert_same_bits([np.asarray(ours[name]) for name in theirs], [np.asarray(value) for value in theirs.values()])
    if where != "validation":
        assert schedule.state_dict() == wanted[2].state_dict()
    # What is left can be trained on.
    monkeypatch.setattr(Failing, "where", "")
    monkeypatch.setattr(FailingAdamW, "fails", False)
    quiet(model, streams(), steps=2, optimiser=optimiser)


def test_a_second_ctrl_c_never_falls_into_a_change_of_parameters() -> None:
    class Interrupted(AdamW):
        def _pass(self, p: Any, *args: Any) -> None:
            super()._pass(p, *args)
            if self.steps == 5 and p.ndim == 2:  # one of two parameters has been passed
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    model = Tiny()
    optimiser = Interrupted(model, 0.02)
    before = signal.getsignal(signal.SIGINT)
    infos: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        quiet(model, streams(), optimiser=optimiser, callbacks=[infos.append])
    assert signal.getsignal(signal.SIGINT) is before
    whole = Tiny()
    quiet(whole, streams(), steps=6, optimiser=AdamW(whole, 0.02))
    assert_same_bits(parameters(model), parameters(whole))
    assert optimiser.steps == 6 and len(infos) == 5 and len(infos[0].history) == 6


@pytest.mark.parametrize(
    "options",
    [
        {"callbacks": [3]},
        {"validation": streams(9), "metrics": ["acuracy"]},
        {"resume": "nowhere"},
        {"clip_norm": -1},
        {"data": (np.ones((2, 3)), np.ones((3, 3)))},
        {"progress": "yes"},
        {"patience": 3},
        {"epoch": 3},
    ],
)
def test_a_bad_argument_changes_nothing_at_all(options: dict[str, Any], tmp_path: Any) -> None:
    model = Tiny()
    optimiser, data = AdamW(model, 0.02), streams(None)
    optimiser.step(), model.grads["bias"].fill(3)
    before, state = parameters(model), optimiser.state_dict()
    with pytest.raises((TypeError, ValueError, OSError)):
        fit(model, options.pop("data", data), optimiser=optimiser, checkpoint=tmp_path / "new", **options)
    assert all(a is b for a, b in zip(before, parameters(model), strict=True))
    assert_same_bits([np.asarray(v) for v in optimiser.state_dict().values()], [np.asarray(v) for v in state.values()])
    assert (model.grads["bias"] == 3).all() and not list(tmp_path.iterdir())


# Going on


def checkpointed(folder: Any, **options: Any) -> Any:
    model = Tiny()
    given = {"optimiser": AdamW(model, 0.02), "schedule": PlateauSchedule(0.02), "validation": streams(9), **options}
    quiet(model, streams(), steps=20, checkpoint=folder, **given)
    return model


@pytest.mark.parametrize(
    ("began", "options", "said"),
    [
        ({}, {"optimiser": "adam", "schedule": PlateauSchedule(0.02)}, "its optimiser is AdamW, not Adam"),
        ({}, {"schedule": StepSchedule(0.02, 5)}, "its schedule is PlateauSchedule, not StepSchedule"),
        ({}, {"schedule": None}, "its schedule is PlateauSchedule, not None"),
        ({}, {"schedule": PlateauSchedule(0.01)}, "its schedule began with {'lr': 0.02.*not {'lr': 0.01"),
        (
            {},
            {"validation": streams(9).__class__(series(), batch_size=3, steps=11)},
            ".* batches of validation of 19, not",
        ),
        ({"schedule": None}, {"schedule": None, "optimiser": None, "lr": 0.01}, "its run began with lr=0.02, not 0.01"),
        ({"schedule": None}, {"schedule": None, "optimiser": None}, "its run began with lr=0.02, not 0.001"),
    ],
)
def test_what_would_be_ignored_is_refused_on_going_on(began: Any, options: Any, said: str, tmp_path: Any) -> None:
    checkpointed(tmp_path, **began)
    model = Tiny(seed=3)
    before = parameters(model)
    given = {"optimiser": AdamW(model, 0.02), "schedule": PlateauSchedule(0.02), "validation": streams(9), **options}
    states = [one.state_dict() for one in (given["optimiser"], given["schedule"]) if hasattr(one, "state_dict")]
    with pytest.raises(ValueError, match=f"does not fit this run: {said}"):
        quiet(model, streams(), steps=30, checkpoint=tmp_path, resume=True, **given)
    assert all(a is b for a, b in zip(before, parameters(model), strict=True))
    after = [one.state_dict() for one in (given["optimiser"], given["schedule"]) if hasattr(one, "state_dict")]
    for one, other in zip(states, after, strict=True):
        assert_same_bits([np.asarray(v) for v in one.values()], [np.asarray(v) for v in other.values()])


def test_the_same_objects_go_on(tmp_path: Any) -> None:
    model = Tiny()
    optimiser, schedule = AdamW(model, 0.02), PlateauSchedule(0.02, factor=0.5, patience=0, threshold=0.9)
    options: dict[str, Any] = {"optimiser": optimiser, "schedule": schedule, "validation": streams(9)}
    options.update(validate_every=1, checkpoint=tmp_path)
    quiet(model, streams(), steps=20, **options)
    assert schedule.state_dict()["lr"] < 0.02
    assert len(quiet(model, streams(), steps=30, resume=True, **options)) == 30


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path: Any) -> None:
    """The optimiser and the schedule fit; the parameters, which come last, do not."""
    checkpointed(tmp_path)

    class Stubborn(Tiny):
        def load_state_dict(self, mapping: Any) -> None:
            raise ValueError("never")

    model = Stubborn()
    optimiser, schedule = AdamW(model, 0.02), PlateauSchedule(0.02)
    before = optimiser.state_dict(), schedule.state_dict()
    with pytest.raises(ValueError, match="does not fit this run: never"):
        quiet(
            model,
            streams(),
            optimiser=optimiser,
            schedule=schedule,
            validation=streams(9),
            checkpoint=tmp_path,
            resume=True,
        )
    assert_same_bits(
        [np.asarray(v) for v in optimiser.state_dict().values()], [np.asarray(v) for v in before[0].values()]
    )
    assert schedule.state_dict() == before[1]


def test_arrays_go_on_with_the_split_they_began_with(tmp_path: Any) -> None:
    ids, targets = tagged()

    def run(epochs: int, seed: int = 0, **options: Any) -> Any:
        model = tagger()
        given = {"loss": ignoring, "validation_split": 0.4, "batch_size": 2, "lr": 0.02, **options}
        return model, quiet(model, (ids, targets), epochs=epochs, seed=seed, **given)

    whole = run(4)
    run(2, checkpoint=tmp_path)
    resumed = run(4, seed=9, checkpoint=tmp_path, resume=True)
    assert_same_bits(parameters(resumed[0]), parameters(whole[0]))
    assert_same_bits(resumed[1].validation_loss, whole[1].validation_loss)
    for options, said in (
        ({"validation_split": 0.2}, "validation_split=0.4, not 0.2"),
        ({"validation_split": None, "validation": (ids, targets)}, "validation_split=0.4, not None"),
        ({"batch_size": 3}, "batch_size=2, not 3"),
    ):
        with pytest.raises(ValueError, match=f"began with {said}"):
            run(5, checkpoint=tmp_path, resume=True, **options)


def test_patience_on_going_on_has_the_best_parameters(tmp_path: Any) -> None:
    class Scripted(Tiny):
        script = (5.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0)
        said = 0

        def evaluation_forward(self, batch: Any, state: Any = None) -> Any:
            type(self).said += 1
            return self.script[self.said - 1], 1, None

    (batch,) = streams().batches(0, 18)
    seen: dict[int, Any] = {}
    options: dict[str, Any] = {"validation": [batch], "validate_every": 2, "checkpoint": tmp_path, "keep": 1}
    quiet(
        Scripted(),
        streams(),
        steps=7,
        callbacks=[lambda info: seen.update({info.step: dict(info.model.parameters)})],
        **options,
    )
    model = Scripted()
    history = quiet(model, streams(), steps=40, patience=4, resume=True, **options)
    assert history.stopped == "patience" and len(history) == 12
    assert_same_bits(parameters(model), list(seen[4].values()))
    for path in tmp_path.glob("step-00000004*"):
        path.unlink()
    Scripted.said = 0
    for path in tmp_path.iterdir():
        path.unlink()
    quiet(Scripted(), streams(), steps=7, **options)
    next(iter(tmp_path.glob("step-00000004*"))).unlink()
    with pytest.raises(ValueError, match="best validation, for patience, cannot be had"):
        quiet(Scripted(), streams(), steps=40, patience=4, resume=True, **options)


def test_a_folder_of_another_run_is_not_mixed_with_a_resumed_one(tmp_path: Any) -> None:
    for name in ("one", "other"):
        checkpointed(tmp_path / name, schedule=None)
    model = Tiny()
    options: dict[str, Any] = {"optimiser": AdamW(model, 0.02), "validation": streams(9), "steps": 21}
    with pytest.raises(ValueError, match="another run"):
        quiet(model, streams(), checkpoint=tmp_path / "one", resume=tmp_path / "other", **options)
    quiet(model, streams(), checkpoint=tmp_path / "one", resume=tmp_path / "one", **options)
    assert load_checkpoint(tmp_path / "one")["step"] == 21


# Errors


def files_of(error: BaseException) -> list[str]:
    return [frame.filename for frame in traceback.extract_tb(error.__traceback__)]


@pytest.mark.parametrize(
    "call",
    [
        lambda: fit(Tiny(), streams(), epoch=3),
        lambda: fit(Tiny(), streams(), clip_norm="1"),
        lambda: fit(Tiny(), streams(), optimiser=AdamW(Tiny())),
        lambda: fit(Tiny(), (np.ones((2, 3)), np.ones(3)), progress=False),
        lambda: fit(Tiny(), streams(), callbacks=[lambda info: checks.size("steps", -1)], progress=False),
        lambda: fit(fs.GRU(3, 4), streams(), loss="mean_squared_error", progress=False),
    ],
)
def test_errors_end_at_the_line_of_the_caller(call: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    files = files_of(caught.value)
    assert files[-1] == __file__ and not [name for name in files if checks._PACKAGE in name]


def test_other_errors_keep_their_frames() -> None:
    def fail(info: Any) -> None:
        int("one")

    with pytest.raises(ValueError, match="invalid literal") as caught:
        fit(Tiny(), streams(), callbacks=[fail], progress=False)
    files = files_of(caught.value)
    assert files[-1] == __file__ and [name for name in files if name.endswith("trainer.py")]


def test_names_agree_with_their_number() -> None:
    layer, state = fs.Linear(2, 3), fs.Linear(2, 3).state_dict()
    with pytest.raises(ValueError, match=": bias is missing$"):
        layer.load_state_dict({"weight": state["weight"]})
    with pytest.raises(ValueError, match=": weight and bias are missing; a, b and c are unknown$"):
        layer.load_state_dict({"a": 1.0, "b": 1.0, "c": 1.0})
    assert checks.are([], "missing") == []


# Data, targets and names as other libraries have them


def classifier(*more: Any) -> Any:
    return fs.Sequential(fs.GRU(4, 3, seed=0), fs.LastStep(), *more)


ROWS = np.random.default_rng(0).normal(size=(12, 5, 4)).astype("float32")
CLASSES = np.arange(12) % 3
TUPLE = r"a tuple \(x, y\)"


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ((ROWS, CLASSES), TypeError, r"data should be one argument, a tuple \(x, y\): fit\(model, \(x, y\)\)"),
        (([ROWS, CLASSES],), TypeError, TUPLE),
        ((zip(ROWS, CLASSES, strict=True),), TypeError, f"not zip .*{TUPLE}"),
        ((ROWS,), TypeError, TUPLE),
        (((ROWS, np.eye(3)[CLASSES]),), ValueError, r"targets\[0\] .* labels.argmax\(-1\) makes classes of one-hot"),
        (((ROWS[:, :3], np.eye(3, dtype=int)[CLASSES]),), ValueError, r"targets should .* labels.argmax\(-1\) makes"),
        (((ROWS, CLASSES == 1),), TypeError, r"data: y should .*y.astype\(int\) makes them of booleans"),
        (((ROWS, CLASSES.astype(float)),), TypeError, r"targets.astype\(int\) makes them of real numbers"),
        (
            (((9 * ROWS).astype(int), CLASSES),),
            TypeError,
            r'x should .* 4 values, not int64; x.astype\("float32"\)',
        ),
        (((ROWS[..., 0], CLASSES),), ValueError, r"data: x should have values \(T, I\).* give x\[..., None\]"),
        (((list(ROWS[..., 0]), CLASSES),), ValueError, r"of a list \[row\[:, None\] for row in x\]"),
    ],
)
def test_what_is_given_elsewhere_is_told_how(given: Any, error: Any, said: str) -> None:
    model = classifier()
    before = parameters(model)
    with pytest.raises(error, match=said):
        quiet(model, *given, loss="cross_entropy", epochs=1)
    assert all(a is b for a, b in zip(before, parameters(model), strict=True))


def test_validation_is_looked_at_like_data() -> None:
    with pytest.raises(ValueError, match=r"validation: x should have values \(T, I\)"):
        quiet(classifier(), (ROWS, CLASSES), validation=(ROWS[..., 0], CLASSES), loss="cross_entropy")


def test_data_of_torch() -> None:
    Dataset = type("TensorDataset", (), {"__module__": "torch.utils.data.dataset", "__len__": lambda self: 3})
    with pytest.raises(TypeError, match=r"tuple \(x, y\).*tuple\(part.numpy\(\) for part in dataset.tensors\)"):
        quiet(classifier(), Dataset(), loss="cross_entropy")


def test_labels_of_every_step_may_not_be_one_hot() -> None:
    model = fs.Sequential(fs.GRU(4, 3))
    with pytest.raises(ValueError, match=r"one class for each row of logits, not \(12, 5, 3\); labels.argmax"):
        quiet(model, (ROWS, np.zeros((12, 5, 3), "float32")), loss="cross_entropy")


@pytest.mark.parametrize("split", [None, 0.4])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_is_not_finite_is_found(value: float, split: Any) -> None:
    """In what was given, whatever the order of the batches and what was held out."""
    x, y = ROWS.copy(), CLASSES.astype("float32")
    places = {"x[4][3, 2]": (x, (4, 3, 2)), "y[7]": (y, 7)}
    for place, (array, at) in places.items():
        kept, array[at] = array[at], value
        model = fs.Sequential(fs.GRU(4, 1, seed=0), fs.LastStep())
        with pytest.raises(fs.training.DivergenceError) as caught:
            for seed in range(20):  # some runs hold the row out
                quiet(model, (x, y), loss="mse", epochs=1, batch_size=4, validation_split=split, seed=seed)
        assert str(caught.value).endswith(f"the parameters are unchanged; data: {place} is {value}")
        array[at] = kept
    x[4, 3, 2] = value
    with pytest.raises(fs.training.DivergenceError, match=r"; inputs\[0, 3, 2\] of the batch is"):
        quiet(fs.GRU(4, 1), [Batch(x[4:], y[4:, None, None] * np.ones((8, 5, 1)))], loss="mse")
    with pytest.raises(fs.training.DivergenceError, match=r"; sequences\[4\]\[3, 2\] is"):
        quiet(fs.GRU(4, 4), PaddedBatches(x, x, batch_size=12), loss="mse")


def test_a_run_that_diverges_by_itself_names_no_data() -> None:
    model = fs.Sequential(fs.GRU(4, 1), fs.LastStep())
    with pytest.raises(fs.training.DivergenceError, match="the parameters are unchanged$"):
        quiet(model, (ROWS, CLASSES), loss=lambda y, t: (math.nan, np.zeros_like(y)))


@pytest.mark.parametrize(
    ("short", "ours"), [("mse", "mean_squared_error"), ("MSE", "mean_squared_error"), ("ce", "cross_entropy")]
)
def test_short_names_of_losses(short: str, ours: str) -> None:
    assert arguments.loss_of(short, np.dtype("float32"))[1:] == arguments.loss_of(ours, np.dtype("float32"))[1:]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bce", "'binary_cross_entropy' is nearest, whose outputs are logits"),
        ("nll", "'cross_entropy' is nearest, whose outputs are logits: leave out the last softmax"),
        ("sparse_categorical_crossentropy", "'cross_entropy' is nearest, whose outputs are logits"),
        ("CategoricalCrossentropy", r"labels.argmax\(-1\)"),
        ("mae", "'huber' is nearest"),
        ("l1", "'huber' is nearest"),
    ],
)
def test_losses_of_another_meaning_lead_to_ours(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"loss should be one of 'cross_entropy', .*{said}"):
        quiet(classifier(), (ROWS, CLASSES), loss=name)


def test_short_names_of_metrics() -> None:
    given = {"epochs": 1, "validation_split": 0.5}
    for metrics in ("accuracy", "acc", ["acc"]):
        history = quiet(classifier(), (ROWS, CLASSES), loss="cross_entropy", metrics=metrics, **given)
        assert list(history.metrics) == ["accuracy"]
    model = fs.Sequential(fs.GRU(4, 1), fs.LastStep())
    history = quiet(model, (ROWS, CLASSES), loss="mse", metrics=["mse", "mae"], **given)
    assert list(history.metrics) == ["mean_squared_error", "mean_absolute_error"]
    with pytest.raises(ValueError, match="validation should be given with metrics, or validation_split, a share"):
        quiet(classifier(), (ROWS, CLASSES), loss="cross_entropy", metrics="accuracy")


@pytest.mark.parametrize(
    ("last", "loss"),
    [
        (fs.Softmax, "cross_entropy"),
        (lambda: fs.Sequential(fs.Softmax()), fs.losses.softmax_cross_entropy),
        (fs.Sigmoid, "binary_cross_entropy"),
    ],
)
def test_losses_of_logits_warn_of_what_are_none(last: Any, loss: Any) -> None:
    model = fs.Sequential(fs.GRU(4, 3 if last is not fs.Sigmoid else 1), fs.LastStep(), last())
    y = CLASSES if last is not fs.Sigmoid else CLASSES % 2
    with pytest.warns(UserWarning, match="model should end in logits with the loss .*leave that layer out") as warned:
        quiet(model, (ROWS, y), loss=loss, epochs=1)
    assert len(warned) == 1
