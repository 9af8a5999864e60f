"""The trainer: the same bits whether interrupted or not, what ends a run, checkpoints that can be relied on."""

from __future__ import annotations

import errno
import math
import os
import pickle
import resource
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import assert_same_bits, run_python, threads
from learners import Affine, Leaky, Tiny, padded_squared_error, series, squared_error, streams

import fastseq as fs
from fastseq.training import (
    SGD,
    AdamW,
    Batch,
    ConstantSchedule,
    CosineSchedule,
    DivergenceError,
    History,
    PaddedBatches,
    PlateauSchedule,
    Windows,
    checkpoints,
    fit,
    load_checkpoint,
    save_checkpoint,
)

STEPS = 300
COLUMNS = ["step", "loss", "gradient_norm", "learning_rate", "tokens", "validation_step", "validation_loss"]


def train(model: Any = None, data: Any = None, **options: Any) -> tuple[Any, History, Any]:
    """A run with everything in it that could make it differ."""
    model = Tiny() if model is None else model
    defaults: dict[str, Any] = {
        "optimiser": AdamW(model, 0.02, groups=[{"names": "bias", "weight_decay": 0.0}]),
        "schedule": PlateauSchedule(0.02, factor=0.5, patience=2) if options.get("validation", True) else None,
        "steps": STEPS,
        "validation": streams(9),
        "validate_every": 13,
        "clip_norm": 1.0,
        "progress": False,
    }
    options = {**defaults, **options}
    history = fit(model, streams() if data is None else data, **options)
    return model, history, options["optimiser"]


def assert_same_run(one: Any, other: Any) -> None:
    """Parameters, history and optimiser have the same bits."""
    assert_same_bits(list(one[0].parameters.values()), list(other[0].parameters.values()), "parameters")
    for name in COLUMNS:
        assert_same_bits(getattr(one[1], name), getattr(other[1], name), name)
    states = [run[2].state_dict() for run in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert_same_bits(np.asarray(value), np.asarray(states[1][name]), name)


@pytest.fixture(scope="module")
def uninterrupted() -> Any:
    return train()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def name_of(step: int) -> str:
    return f"step-{step:08d}.safetensors"


# The same bits


def test_a_run_learns_and_has_the_same_bits_twice(uninterrupted: Any) -> None:
    model, history, _ = uninterrupted
    assert_same_run(train(), uninterrupted)
    assert history.stopped == "steps" and not history.interrupted and len(history) == STEPS
    np.testing.assert_array_equal(history.step, np.arange(1, STEPS + 1))
    np.testing.assert_array_equal(history.validation_step, np.arange(13, STEPS + 1, 13))
    assert history.validation_loss[-1] < 0.5 * history.validation_loss[0]
    assert len(set(history.learning_rate)) > 2  # the plateau was met, and what follows depends on it
    assert (history.gradient_norm > 1).any() and (history.gradient_norm < 1).any()
    assert set(history.tokens) == {3 * steps for steps in range(3, 8)} and history.tokens[:19].sum() == 387
    assert (history.seconds > 0).all()
    assert len(set(model.seeds)) == STEPS and all(0 <= seed < 2**63 for seed in model.seeds)


def test_another_seed_is_another_run(uninterrupted: Any) -> None:
    _, history, _ = train(seed=1, steps=5)
    assert not np.isin(history.loss, uninterrupted[1].loss).any()


# In the middle of an epoch, at its end, at a validation, in the first and the last step.
@pytest.mark.parametrize("cut", [1, 5, 13, 19, 26, 38, 100, 247, 299, 300])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(cut: int, tmp_path: Path, uninterrupted: Any) -> None:
    train(steps=cut, checkpoint=tmp_path, keep=1)
    resumed = train(Tiny(seed=5), checkpoint=tmp_path, resume=True, seed=77, validation=streams(9))
    assert_same_run(resumed, uninterrupted)


def test_a_run_resumed_after_every_few_steps(tmp_path: Path, uninterrupted: Any) -> None:
    for steps in (*range(7, STEPS, 31), STEPS):
        last = train(Tiny(seed=0 if steps == 7 else steps), steps=steps, checkpoint=tmp_path, resume=True)
    assert_same_run(last, uninterrupted)


@pytest.mark.parametrize("every", [1, 10])
def test_a_run_resumed_from_any_of_its_checkpoints(every: int, tmp_path: Path) -> None:
    whole = train(steps=30, checkpoint=tmp_path, checkpoint_every=every, keep=None)
    for step in {1, 2, 12, 13, 14, 20, 29} if every == 1 else {10, 20}:
        assert_same_run(train(steps=30, resume=tmp_path / name_of(step)), whole)
    assert_same_run(train(steps=30, resume=tmp_path), whole)


def test_seeds_that_nobody_chose_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    def data() -> PaddedBatches:
        rng = np.random.default_rng(0)
        sequences = [rng.normal(size=(n, 3)).astype("float32") for n in rng.integers(3, 9, 40)]
        return PaddedBatches(sequences, [-sequence for sequence in sequences], batch_size=4)

    whole = train(data=data(), seed=None, steps=17, checkpoint=tmp_path, checkpoint_every=7, keep=None)
    again = train(data=data(), seed=None, steps=17)
    assert (again[1].loss != whole[1].loss).any()
    assert_same_run(train(data=data(), seed=None, steps=17, resume=tmp_path / name_of(7)), whole)
    # The data of the caller is as it was; with a seed for the run all is fixed.
    assert_same_run(train(data=data(), seed=3, steps=17), train(data=data(), seed=3, steps=17))


def test_validations_and_checkpoints_change_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 60, "schedule": None}
    plain = train(validation=None, validate_every=None, **options)
    for more in (
        {"validate_every": 1},
        {"validation": Windows(series(), steps=5, batch_size=100), "validate_every": 7},
        {"checkpoint": tmp_path, "checkpoint_every": 1},
        {"progress": True},
        {"callbacks": [lambda info: None]},
    ):
        model, history, _ = train(**{**options, **more})
        assert_same_bits(list(model.parameters.values()), list(plain[0].parameters.values()))
        assert_same_bits(history.loss, plain[1].loss)


# What is computed


def test_steps_are_those_written_out_by_hand() -> None:
    model, other = Tiny(drop=0), Tiny(drop=0)
    optimiser = SGD(other, 0.1, momentum=0.5)
    history = fit(
        model, streams(), steps=25, optimiser=SGD(model, 0.7, momentum=0.5), schedule=lambda step: 0.1, progress=False
    )
    state, losses = None, []
    for batch in (*streams().batches(0), *streams().batches(1)):
        if batch.fresh.all():
            state = None
        loss, _, tape, state = other.training_forward(batch, state)
        other.zero_grad()
        other.training_backward(tape)
        losses.append(loss)
        optimiser.step()
        if len(losses) == 25:
            break
    assert_same_bits(history.loss, np.array(losses))
    assert_same_bits(list(model.parameters.values()), list(other.parameters.values()))


def test_the_validation_loss_is_the_mean_over_all_elements() -> None:
    model = Tiny(drop=0.9)
    _, history, _ = train(model, steps=19, validate_every=None)
    total = count = 0.0
    state = None
    for batch in streams(9).batches(0):
        loss, elements, state = model.evaluation_forward(batch, state)
        total, count = total + loss * elements, count + elements
    np.testing.assert_array_equal(history.validation_step, [19])
    np.testing.assert_allclose(history.validation_loss, [total / count], rtol=1e-12)


def test_a_model_without_evaluation_is_validated_with_one_seed() -> None:
    class Bare(Tiny):
        evaluation_forward = property()  # raises AttributeError

    model = Bare()
    train(model, steps=2, validate_every=1)
    chunks = len(streams(9))
    assert model.seeds[1 : 1 + chunks] == model.seeds[2 + chunks :] == [0] * chunks


def test_options_reach_training_and_no_validation() -> None:
    class Told(Tiny):
        evaluation_forward = property()

        def training_forward(self, batch: Any, state: Any = None, seed: Any = None, *, share: float = 0.0) -> Any:
            self.seeds.append((share, seed == 0))
            return super()._forward(batch, state, np.ones(batch.inputs.shape, bool))

    model = Told()
    train(model, steps=2, validate_every=1, options={"share": 0.5})
    chunks = len(streams(9))
    assert model.seeds == ([(0.5, False)] + [(0.0, True)] * chunks) * 2


def test_rows_that_are_fresh_start_from_zero() -> None:
    class Watching(Tiny):
        def training_forward(self, batch: Any, state: Any = None, seed: Any = None) -> Any:
            states.append(state)
            return super().training_forward(batch, state, seed)

    states: list[Any] = []
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3, 5, 3))
    fresh = [[True, True, True], [False, True, False], [False, False, False], None]
    batches = [Batch(a, a, None, None if f is None else np.array(f)) for a, f in zip(x, fresh, strict=True)]
    fit(Watching(drop=0), batches, steps=6, progress=False)
    assert states[0] is None and states[3] is None and states[4] is None
    assert not states[1].h[1].any() and states[1].h[[0, 2]].all()
    assert states[2].h.all() and states[5].h[[0, 2]].all()


def test_carried_states_of_any_shape() -> None:
    from fastseq.training.learners import renewed

    fresh = np.array([True, False])
    state = {
        "a": (np.full((2, 3), np.nan), [np.ones(2, int)]),
        "b": None,
        "c": fs.LSTMState(np.ones((2, 1, 1)), np.ones((2, 1, 2))),
    }
    new = renewed(state, fresh)
    np.testing.assert_array_equal(new["a"][0], [[0] * 3, [np.nan] * 3])
    np.testing.assert_array_equal(new["a"][1][0], [0, 1])
    assert isinstance(new["a"], tuple) and isinstance(new["a"][1], list) and new["b"] is None
    assert new["c"] == fs.LSTMState([[[0.0]], [[1.0]]], [[[0.0, 0.0]], [[1.0, 1.0]]])
    assert state["c"].h.all()


# Plain layers


def test_a_layer_with_a_loss() -> None:
    rng = np.random.default_rng(0)
    matrix, x = rng.normal(size=(3, 3)), rng.normal(size=(6, 4, 5, 3)).astype("float32")
    batches = [Batch(one, one @ matrix.T) for one in x]
    layer = Affine()
    optimiser = AdamW(layer, 0.05, weight_decay=0)
    history = fit(
        layer, batches, loss=squared_error, optimiser=optimiser, epochs=80, validation=batches, progress=False
    )
    np.testing.assert_allclose(layer.parameters["weight"], matrix, atol=1e-2)
    assert history.validation_loss[-1] < 1e-4 and history.stopped == "epochs" and len(history) == 480
    assert_same_bits(history.validation_step, np.arange(6, 481, 6))


def test_a_recurrent_layer_gets_its_state_lengths_seed_and_truncate() -> None:
    layer = Leaky()
    data = streams()
    fit(layer, data, loss=squared_error, steps=20, truncate=3, validation=data, progress=False)
    states = [call["state"] for call in layer.calls]
    assert states[0] is None and states[19] is None and all(isinstance(state, fs.State) for state in states[1:19])
    assert {call["truncate"] for call in layer.calls} == {3}
    assert len({call["seed"] for call in layer.calls}) == 20
    assert {call["lengths"] for call in layer.calls} == {None}

    layer, given = Leaky(), []
    sequences = [np.ones((n, 3), "float32") for n in (4, 2, 3)]

    def loss(y: Any, targets: Any, lengths: Any = None) -> Any:
        given.append(lengths)
        return padded_squared_error(y, targets, lengths)

    padded = PaddedBatches(sequences, sequences, batch_size=3, shuffle=False)
    history = fit(layer, padded, loss=loss, steps=1, validation=padded, progress=False)
    np.testing.assert_array_equal(layer.calls[0]["lengths"], [2, 3, 4])
    np.testing.assert_array_equal(given, [[2, 3, 4]] * 2)
    assert history.tokens[0] == 9
    with pytest.raises(ValueError, match="loss.*lengths"):
        fit(layer, padded, loss=squared_error, steps=1, progress=False)
    # Nothing is padded here.
    padded = PaddedBatches(sequences[:1], sequences[:1], batch_size=3)
    fit(layer, padded, loss=squared_error, steps=1, progress=False)


def padded() -> PaddedBatches:
    """Sequences of unequal lengths; the targets are their running sums."""
    rng = np.random.default_rng(0)
    sequences = [rng.normal(size=(n, 3)).astype("float32") for n in rng.integers(1, 12, 50)]
    return PaddedBatches(sequences, [np.tanh(np.cumsum(one, 0)) for one in sequences], batch_size=8)


def spelled() -> PaddedBatches:
    """Sequences of ids that go up by one, and what comes next."""
    rng = np.random.default_rng(0)
    sequences = [(np.arange(n) + rng.integers(7)) % 7 for n in rng.integers(1, 12, 50)]
    return PaddedBatches(sequences, [(one + 1) % 7 for one in sequences], batch_size=8)


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: fs.LSTM(3, 3, 2, dropout=0.1, seed=1), streams),
        (lambda: fs.GRU(3, 3, seed=1), padded),
        (lambda: fs.reference.RNN(3, 3, dtype="float64", seed=1), padded),
        (lambda: fs.Sequential(fs.Embedding(7, 4), fs.Dropout(0.1), fs.GRU(4, 5), fs.Linear(5, 7)), spelled),
        (lambda: fs.Linear(3, 3, seed=1), lambda: Windows(series(), steps=4, batch_size=32)),
    ],
    ids=["lstm", "gru", "rnn", "symbols", "linear"],
)
def test_layers_learn_and_go_on_where_they_were(make: Any, data: Any, tmp_path: Path) -> None:
    start = make().state_dict()
    losses = fs.losses if make().dtype == np.float32 else fs.reference.losses

    def run(model: Any, steps: int, **options: Any) -> Any:
        model.load_state_dict(start)
        optimiser = AdamW(model, 0.02)
        history = fit(
            model,
            data(),
            loss=losses.softmax_cross_entropy if data is spelled else losses.mean_squared_error,
            optimiser=optimiser,
            steps=steps,
            validation=data(),
            validate_every=10,
            progress=False,
            **options,
        )
        return model, history, optimiser

    with threads(1):
        whole = run(make(), 60)
    assert whole[1].validation_loss[-1] < 0.9 * whole[1].validation_loss[0]
    with threads(2):
        assert_same_run(run(make(), 60), whole)
    run(make(), 33, checkpoint=tmp_path)
    assert_same_run(run(make(), 60, checkpoint=tmp_path, resume=True), whole)


# What ends a run


def test_epochs_or_steps_whichever_comes_first() -> None:
    for options, steps, reason in (
        ({"epochs": 2, "steps": None}, 38, "epochs"),
        ({"epochs": 2, "steps": 20}, 20, "steps"),
        ({"epochs": 1, "steps": 20}, 19, "epochs"),
        ({"epochs": 0, "steps": None}, 0, "epochs"),
        ({"steps": 0}, 0, "steps"),
    ):
        _, history, _ = train(**options)
        assert len(history) == steps and history.stopped == reason


def test_callbacks_see_every_step_and_may_end_the_run() -> None:
    infos = []

    def at_twelve(info: Any) -> Any:
        infos.append(info)
        return np.True_ if info.step == 12 else "go on"

    model, history, _ = train(callbacks=[lambda info: False, at_twelve])
    assert history.stopped == "callback" and len(history) == 12
    assert [info.step for info in infos] == list(range(1, 13))
    assert {info.epoch for info in infos} == {0}
    assert all(info.model is model and info.history is history for info in infos)
    assert [info.loss for info in infos] == list(history.loss)
    assert [info.gradient_norm for info in infos] == list(history.gradient_norm)
    assert [info.learning_rate for info in infos] == list(history.learning_rate)
    assert [info.tokens for info in infos] == list(history.tokens)
    with pytest.raises(AttributeError):
        infos[0].step = 3  # read-only


class Scripted(Tiny):
    """A model whose validation losses are written down."""

    script: list[float]

    def evaluation_forward(self, batch: Any, state: Any = None) -> Any:
        return self.script[self.told() - 1], 1, None

    def told(self) -> int:
        self._validations = getattr(self, "_validations", 0) + 1
        return self._validations


def scripted(losses: list[float], **options: Any) -> tuple[Any, History, dict[int, Any]]:
    Scripted.script = losses
    model, seen = Scripted(), {0: None}
    (batch,) = list(streams().batches(0, 18))
    history = fit(
        model,
        streams(),
        **{"steps": 40, "validation": [batch], "validate_every": 4, "progress": False, **options},
        callbacks=[lambda info: seen.update({info.step: dict(model.parameters)})],
    )
    return model, history, seen


def test_early_stopping_restores_the_best() -> None:
    model, history, seen = scripted([5, 3, 4, 2, 2, math.nan, 3, 1], patience=3)
    assert history.stopped == "patience" and len(history) == 28
    assert all(model.parameters[name] is array for name, array in seen[16].items())
    # A run that ends otherwise restores it too; without patience it is left as it is.
    model, history, seen = scripted([5, 3, 4, 2, 2], patience=3, steps=20)
    assert history.stopped == "steps"
    assert all(model.parameters[name] is array for name, array in seen[16].items())
    model, history, seen = scripted([5, 3, 4, 2, 2], steps=20)
    assert all(model.parameters[name] is array for name, array in seen[20].items())


@pytest.mark.parametrize("cut", [15, 16, 18, 20, 27, 28])
def test_early_stopping_goes_on_where_it_was(cut: int, tmp_path: Path) -> None:
    losses = [5, 3, 4, 2, 2, math.nan, 3, 1]
    whole, _, _ = scripted(losses, patience=3)
    scripted(losses, patience=3, steps=cut, checkpoint=tmp_path)
    resumed, history, _ = scripted(losses[cut // 4 :], patience=3, checkpoint=tmp_path, resume=True)
    assert history.stopped == "patience" and len(history) == 28
    np.testing.assert_array_equal(history.validation_loss, losses[:7])
    assert_same_bits(list(resumed.parameters.values()), list(whole.parameters.values()))


# Ctrl-C


def interrupting(step: int, times: int = 1) -> Any:
    def callback(info: Any) -> None:
        if info.step == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    return callback


@pytest.mark.parametrize("step", [1, 12, 19, 100])
def test_ctrl_c_ends_the_run_after_the_step(step: int, tmp_path: Path, uninterrupted: Any) -> None:
    before = signal.getsignal(signal.SIGINT)
    model, history, _ = train(callbacks=[interrupting(step)], checkpoint=tmp_path, patience=50)
    assert signal.getsignal(signal.SIGINT) is before
    assert history.interrupted and history.stopped == "interrupted" and len(history) == step
    assert files(tmp_path)[-1] == name_of(step)
    assert_same_bits(list(load_checkpoint(tmp_path)["model"].values()), list(model.parameters.values()))
    resumed = train(checkpoint=tmp_path, resume=True)
    assert not resumed[1].interrupted
    assert_same_run(resumed, uninterrupted)


def test_ctrl_c_in_the_forward_or_in_a_validation(tmp_path: Path, uninterrupted: Any) -> None:
    class Interrupted(Tiny):
        """Ctrl-C comes in one training forward, or in the middle of one validation."""

        at: Any
        at_evaluation: Any

        def training_forward(self, batch: Any, state: Any = None, seed: Any = None) -> Any:
            if len(self.seeds) == self.at:
                signal.raise_signal(signal.SIGINT)
            return super().training_forward(batch, state, seed)

        def evaluation_forward(self, batch: Any, state: Any = None) -> Any:
            self._evaluated = getattr(self, "_evaluated", 0) + 1
            if self._evaluated == self.at_evaluation:
                signal.raise_signal(signal.SIGINT)
            return super().evaluation_forward(batch, state)

    for at, at_evaluation, steps in ((31, None, 32), (25, None, 26), (None, 30, 26)):
        folder = tmp_path / f"{at}-{at_evaluation}"
        Interrupted.at, Interrupted.at_evaluation = at, at_evaluation
        model = Interrupted()
        _, history, _ = train(model, checkpoint=folder)
        assert history.interrupted and len(history) == steps
        # A validation that was begun, or was due, is left to the next run.
        assert list(history.validation_step) == ([13, 26] if steps == 32 else [13])
        assert load_checkpoint(folder)["validation"]["owed"] is (steps == 26)
        assert_same_run(train(checkpoint=folder, resume=True), uninterrupted)


def test_a_second_ctrl_c_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(callbacks=[interrupting(3, times=2)])
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_are_put_back_after_an_error_and_ignored_signals_stay_so() -> None:
    def fail(info: Any) -> None:
        raise RuntimeError("no")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="no"):
        train(callbacks=[fail])
    assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _, history, _ = train(callbacks=[interrupting(3)], steps=5)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert not history.interrupted and len(history) == 5


def test_other_threads_can_train(uninterrupted: Any) -> None:
    results: list[Any] = []
    workers = [threading.Thread(target=lambda: results.append(train())) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result in results:
        assert_same_run(result, uninterrupted)
    assert len(results) == 2


def test_ctrl_c_from_outside(tmp_path: Path) -> None:
    code = f"""
        import os, signal, threading
        import fastseq as fs
        from learners import Tiny, streams
        def send(info):
            if info.step == 50:
                os.kill(os.getpid(), signal.SIGINT)
        history = fs.training.fit(Tiny(), streams(), steps=10**9, checkpoint={str(tmp_path)!r}, callbacks=[send])
        print(history.interrupted, len(history))
    """
    said = run_python(code).stdout.split()
    assert said[0] == "True" and 50 <= int(said[1]) <= 51
    assert files(tmp_path)[-1] == name_of(int(said[1]))


# Divergence


class Diverging(Tiny):
    """From some step on the loss, or one gradient, is not finite."""

    def __init__(self, what: str, at: int, value: float = math.nan, **settings: Any) -> None:
        super().__init__(**settings)
        self.what, self.at, self.value = what, at, value

    def training_forward(self, batch: Any, state: Any = None, seed: Any = None) -> Any:
        loss, *rest = super().training_forward(batch, state, seed)
        return (self.value if self.what == "loss" and len(self.seeds) >= self.at else loss), *rest

    def training_backward(self, tape: Any, grads: Any = None) -> None:
        super().training_backward(tape, grads)
        if len(self.seeds) >= self.at:
            for name in ("weight", "bias"):
                if name in self.what:
                    self.grads[name].flat[-1] = self.value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("what", "parameter"), [("bias", "bias"), ("weight", "weight"), ("bias weight", "weight"), ("loss", None)]
)
def test_divergence_stops_before_anything_changes(
    what: str, parameter: str | None, value: float, tmp_path: Path
) -> None:
    good, _, optimiser = train(steps=20, checkpoint=tmp_path / "good")
    bad = Diverging(what, 21, value)
    folder = tmp_path / "bad"
    bad_optimiser = AdamW(bad, 0.02, groups=[{"names": "bias", "weight_decay": 0.0}])
    with pytest.raises(ValueError, match="step 21") as caught:
        train(bad, checkpoint=folder, checkpoint_every=10, optimiser=bad_optimiser)
    error = caught.value
    assert isinstance(error, DivergenceError)
    assert error.step == 21 and error.parameter == parameter
    assert math.isfinite(error.loss) == (what != "loss")
    assert f"loss is {error.loss}" in str(error) and (parameter is None or f"gradient of {parameter} " in str(error))
    assert_same_bits(list(bad.parameters.values()), list(good.parameters.values()))
    states = bad_optimiser.state_dict(), optimiser.state_dict()
    assert_same_bits([np.asarray(v) for v in states[0].values()], [np.asarray(v) for v in states[1].values()])
    assert files(folder)[-1] == name_of(20)
    assert load_checkpoint(folder)["step"] == 20
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.step, copy.parameter, str(copy)) == (21, parameter, str(error))


def test_gradients_too_large_to_be_squared_diverge_and_frozen_ones_do_not() -> None:
    with pytest.raises(DivergenceError, match="sum of their squares") as caught:
        train(Diverging("weight", 3, 1e200, dtype="float64"))
    assert caught.value.parameter is None
    model = Diverging("weight", 3)
    optimiser = AdamW(model, groups=[{"names": "weight", "frozen": True}])
    _, history, _ = train(model, optimiser=optimiser, steps=6)
    assert np.isfinite(history.gradient_norm).all()


# Checkpoints


def test_checkpoints_are_kept_to_a_number_with_the_best_beside(tmp_path: Path) -> None:
    losses = [5, 3, 4, 4, 4, 4, 4, 4, 4, 4]
    scripted(losses, checkpoint=tmp_path / "two", checkpoint_every=2, keep=2)
    assert files(tmp_path / "two") == [name_of(step) for step in (8, 38, 40)]
    scripted(losses, checkpoint=tmp_path / "one", checkpoint_every=3, keep=1, steps=39)
    assert files(tmp_path / "one") == [name_of(step) for step in (8, 39)]
    scripted(losses, checkpoint=tmp_path / "all", checkpoint_every=10, keep=None)
    assert files(tmp_path / "all") == [name_of(step) for step in (4, 8, 10, 20, 30, 40)]
    train(checkpoint=tmp_path / "epochs", steps=40, validation=None, validate_every=None)
    assert files(tmp_path / "epochs") == [name_of(step) for step in (19, 38, 40)]


def test_a_run_from_an_older_checkpoint_keeps_its_own(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "checkpoint": tmp_path,
        "checkpoint_every": 10,
        "validation": None,
        "validate_every": None,
    }
    train(steps=50, keep=None, **options)
    train(steps=25, keep=1, resume=tmp_path / name_of(20), **options)
    assert files(tmp_path) == [name_of(step) for step in (25, 30, 40, 50)]


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    model, history, _ = train(steps=20, checkpoint=tmp_path, patience=9)
    content = load_checkpoint(tmp_path / name_of(20))
    assert (content["step"], content["epoch"], content["batch"], content["seed"]) == (20, 1, 1, 0)
    assert_same_bits(content["history"]["loss"], history.loss)
    other = Tiny(seed=4)
    other.load_state_dict(content["model"])
    assert isinstance(content["state"], fs.State)
    assert_same_bits(list(content["validation"]["model"].values()), list(model.parameters.values()))


def test_contents_of_any_kind(tmp_path: Path) -> None:
    content = {
        "numbers": [1, -0.1, math.inf, True, None, "text ü", 2**62, np.float32(0.1), np.int8(3)],
        "arrays": ({"a/b": np.arange(6).reshape(2, 3).T, "a": {"b": np.ones(())}}, np.zeros((0, 3), "float16")),
        "flags": np.array([True, False]),
        "state": fs.LSTMState(np.ones((2, 1, 3)), np.full((2, 1, 4), 2.0)),
        "nothing": {},
    }
    save_checkpoint(tmp_path / "file", content)
    back = load_checkpoint(tmp_path / "file")
    assert back["numbers"] == [1, -0.1, math.inf, True, None, "text ü", 2**62, float(np.float32(0.1)), 3]
    assert isinstance(back["arrays"], tuple) and back["nothing"] == {}
    assert_same_bits(back["arrays"][0]["a/b"], np.arange(6).reshape(2, 3).T)
    assert_same_bits(back["arrays"][0]["a"]["b"], np.ones(()))
    assert_same_bits(back["arrays"][1], np.zeros((0, 3), "float16"))
    assert_same_bits(back["flags"], content["flags"])
    assert back["state"] == content["state"]
    for bad in ({"a": object()}, {"a": np.zeros(2, complex)}, {"a": np.zeros(2, np.longdouble)}, {3: 4}, [1]):
        with pytest.raises(TypeError, match="a|content"):
            save_checkpoint(tmp_path / "other", bad)  # type: ignore[arg-type]
    assert files(tmp_path) == ["file"]


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    train(steps=3, checkpoint=tmp_path)
    path = tmp_path / name_of(3)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    damaged = [b"", data[:4], data[: header - 3], data[:header], data[:-1], data + b"0", b"\0" * len(data)]
    for place in (*rng.integers(0, len(data), 60), *rng.integers(8, header, 60), *range(8), len(data) - 1):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"step-00000003\.safetensors' (is|was)"):
            load_checkpoint(path)
        with pytest.raises(ValueError, match=r"step-00000003\.safetensors"):
            train(resume=path)
    with pytest.raises(ValueError, match=r"no checkpoint.*step-00000003\.safetensors"):
        train(checkpoint=tmp_path, resume=True)
    path.write_bytes(data)
    assert load_checkpoint(path)["step"] == 3


def test_resuming_goes_back_to_the_newest_whole_checkpoint(tmp_path: Path, uninterrupted: Any) -> None:
    train(steps=60, checkpoint=tmp_path, checkpoint_every=20, validation=None, validate_every=None, schedule=None)
    whole = train(steps=80, validation=None, validate_every=None, schedule=None)
    path = tmp_path / name_of(60)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=rf"going back to .*{name_of(40)}.*{name_of(60)}.*damaged"):
        resumed = train(
            steps=80,
            checkpoint=tmp_path,
            checkpoint_every=20,
            validation=None,
            validate_every=None,
            schedule=None,
            resume=True,
        )
    assert_same_run(resumed, whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(tmp_path)["step"] == 80  # and the damaged one has been written again
    assert load_checkpoint(path)["step"] == 60


def test_a_full_disk(tmp_path: Path) -> None:
    train(steps=20, checkpoint=tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    model = Tiny()
    optimiser = AdamW(model, 0.02, groups=[{"names": "bias", "weight_decay": 0.0}])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match="large|space"):
            train(model, optimiser=optimiser, checkpoint=tmp_path, resume=True, checkpoint_every=5, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    # What was trained is whole: it is the run up to there.
    whole = train(steps=25)
    assert_same_bits(list(model.parameters.values()), list(whole[0].parameters.values()))
    assert optimiser.steps == 25


def test_an_error_while_writing_leaves_the_older_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Any, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    train(steps=20, checkpoint=tmp_path, keep=1)
    before = files(tmp_path)
    monkeypatch.setattr(checkpoints, "write_whole", full)
    with pytest.raises(OSError, match="No space"):
        train(checkpoint=tmp_path, resume=True, keep=1)
    assert files(tmp_path) == before


def test_a_folder_with_another_run_is_not_mixed_with_it(tmp_path: Path) -> None:
    train(steps=2, checkpoint=tmp_path / "new" / "folder")
    with pytest.raises(ValueError, match="resume=True"):
        train(steps=2, checkpoint=tmp_path / "new" / "folder")
    assert files(tmp_path / "new" / "folder") == [name_of(2)]


def test_a_finished_run_is_given_back(tmp_path: Path) -> None:
    whole = train(steps=20, checkpoint=tmp_path)
    content = (tmp_path / name_of(20)).read_bytes()
    assert_same_run(train(steps=20, checkpoint=tmp_path, resume=True), whole)
    assert (tmp_path / name_of(20)).read_bytes() == content
    _, history, _ = train(steps=10, checkpoint=tmp_path, resume=True)
    assert len(history) == 20


def test_checkpoints_of_something_else(tmp_path: Path) -> None:
    train(steps=2, checkpoint=tmp_path)
    path = tmp_path / name_of(2)
    model = Tiny()
    for options in (
        {"model": Tiny(4), "data": streams()},
        {"model": Tiny(dtype="float64")},
        {"model": model, "optimiser": SGD(model, 0.1)},
        {"model": model, "optimiser": AdamW(model, groups=[{"names": "bias", "frozen": True}])},
        {"data": fs.training.Streams(series(), batch_size=3, steps=11, seed=5)},
        {"data": Windows(series(), steps=7, batch_size=9)},
        {"schedule": ConstantSchedule(0.1)},
    ):
        with pytest.raises(ValueError, match=r"step-00000002\.safetensors' does not fit"):
            train(**options, resume=path)
    save_checkpoint(tmp_path / "other", {"step": 3})
    with pytest.raises(ValueError, match="no checkpoint of fit"):
        train(resume=tmp_path / "other")
    layer = fs.GRU(2, 3)
    layer.save(tmp_path / "layer")
    with pytest.raises(ValueError, match="no checkpoint"):
        load_checkpoint(tmp_path / "layer")
    for missing in (tmp_path / "nothing", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(OSError, match="nothing|empty"):
            load_checkpoint(missing)


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"steps": -1}, ValueError, "steps"),
        ({"epochs": 1.5}, TypeError, "epochs"),
        ({"data": 3}, TypeError, "data"),
        ({"data": []}, ValueError, "data"),
        ({"data": [np.zeros(3)]}, TypeError, r"data\[0\]"),
        ({"data": [(1, 2, 3, 4, 5, 6)]}, TypeError, r"data\[0\]"),
        ({"loss": squared_error}, ValueError, "loss"),
        ({"optimiser": 3}, TypeError, "optimiser.*'adamw'"),
        ({"optimiser": AdamW}, TypeError, r"optimiser.*AdamW\(model, lr\)"),
        ({"optimiser": "adm"}, ValueError, "optimiser.*'adam' may be meant"),
        ({"optimiser": "sgd", "schedule": None}, ValueError, "lr should be given with optimiser='sgd'"),
        ({"optimizer": "adam"}, TypeError, "optimiser and optimizer"),
        ({"lr": 0.1}, ValueError, r"lr should be None where optimiser is AdamW\(lr=0.02\)"),
        ({"lr": 0.1, "optimiser": None}, ValueError, "lr should be None with a schedule"),
        ({"lr": -0.1, "optimiser": None, "schedule": None}, ValueError, "lr"),
        ({"batch_size": 3}, ValueError, "batch_size should be None where data is not a tuple"),
        ({"validation_split": 0.1}, ValueError, "validation_split should be None where data is not a tuple"),
        ({"data": (np.ones((3, 2)),)}, ValueError, "data should be .x, y. or .x, y, lengths."),
        ({"data": (np.ones((3, 2)), 3)}, TypeError, "data: y"),
        ({"data": (np.ones((3, 2)), np.ones((2, 2)))}, ValueError, "data: y should have a target for each of the 3"),
        ({"data": (np.ones((3, 2)), np.ones((3, 2)), [2, 2, 3])}, ValueError, r"data: lengths\[2\] is 3"),
        ({"data": ([[1.0], [1.0, 2.0]], [1, 2], [1, 2])}, ValueError, "data: x should be an array of padded rows"),
        ({"metrics": ["acuracy"]}, ValueError, r"metrics\[0\].*'accuracy' may be meant"),
        ({"metrics": [3]}, TypeError, r"metrics\[0\]"),
        ({"metrics": 3}, TypeError, "metrics"),
        ({"metrics": {"one": 3}}, TypeError, r"metrics\['one'\]"),
        ({"metrics": [lambda y, t: 0.0]}, ValueError, "metrics should be a mapping"),
        ({"metrics": ["accuracy", "accuracy"]}, ValueError, "metrics.*'accuracy' is there twice"),
        ({"optimiser": AdamW(Tiny())}, ValueError, "optimiser"),
        ({"schedule": 0.1}, TypeError, "schedule"),
        ({"schedule": lambda step: -1.0}, ValueError, "lr"),
        ({"validation": 3}, TypeError, "validation"),
        ({"validation": None}, ValueError, "validation.*validate_every"),
        ({"validation": None, "validate_every": None, "patience": 2}, ValueError, "validation.*patience"),
        (
            {"validation": None, "validate_every": None, "schedule": PlateauSchedule(0.1)},
            ValueError,
            "validation.*PlateauSchedule",
        ),
        ({"validation": None, "validate_every": None, "metrics": "accuracy"}, ValueError, "validation.*metrics"),
        ({"validate_every": 0}, ValueError, "validate_every"),
        ({"patience": 0}, ValueError, "patience"),
        ({"clip_norm": 0}, ValueError, "clip_norm"),
        ({"clip_norm": "1"}, TypeError, "clip_norm"),
        ({"truncate": 0}, ValueError, "truncate"),
        ({"truncate": 2}, ValueError, "truncate"),
        ({"options": 3}, TypeError, "options"),
        ({"options": {"rate": 1}}, ValueError, "options should have names .* not 'rate'"),
        ({"options": {"seed": 1}}, ValueError, "options should have names .* not 'seed'"),
        ({"callbacks": print}, TypeError, "callbacks"),
        ({"callbacks": [3]}, TypeError, "callbacks"),
        ({"progress": 1}, TypeError, "progress"),
        ({"checkpoint": 3}, TypeError, "checkpoint"),
        ({"checkpoint_every": 3}, ValueError, "checkpoint_every"),
        ({"keep": 0}, ValueError, "keep"),
        ({"resume": True}, ValueError, "checkpoint.*resume"),
        ({"resume": 3}, TypeError, "resume"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": "0"}, TypeError, "seed"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        train(**options)


def test_bad_models() -> None:
    class Backless(Affine):
        backward = property()

    with pytest.raises(TypeError, match="model"):
        fit(lambda x: x, streams(), steps=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss"):
        fit(Affine(), streams(), steps=1, progress=False)
    with pytest.raises(TypeError, match="backward"):
        fit(Backless(), streams(), steps=1, loss=squared_error, progress=False)
    with pytest.raises(ValueError, match="targets"):
        fit(Affine(), [Batch(np.zeros((1, 2, 3)))], steps=1, loss=squared_error, progress=False)


def test_data_that_gives_less_than_it_says() -> None:
    class Short:
        def __len__(self) -> int:
            return 5

        def batches(self, epoch: int, start: int = 0) -> Any:
            return iter(list(streams().batches(epoch))[start:3])

    with pytest.raises(ValueError, match="data should give 5 batches"):
        train(data=Short())


# Seeing it


def test_history_draws_itself(tmp_path: Path, uninterrupted: Any) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed: take the extra 'plot'")
    _, history, _ = uninterrupted
    drawn = history.plot(tmp_path / "history.png")
    assert isinstance(drawn, figure.Figure)
    assert (tmp_path / "history.png").stat().st_size > 10_000
    np.testing.assert_array_equal(drawn.axes[0].lines[0].get_ydata(), history.loss)
    assert isinstance(History().plot(), figure.Figure)


def test_a_history_says_what_it_is(uninterrupted: Any) -> None:
    assert "300 steps" in repr(uninterrupted[1]) and "ended by steps" in repr(uninterrupted[1])
    assert repr(History()) == "<history of 0 steps>"
    with pytest.raises(ValueError, match="mapping"):
        History().load_state_dict({"step": np.zeros(3)})
    copy = History()
    copy.load_state_dict(uninterrupted[1].state_dict())
    assert_same_bits(list(copy.state_dict().values()), list(uninterrupted[1].state_dict().values()))


def test_a_cosine_to_the_end_of_the_run() -> None:
    _, history, _ = train(schedule=CosineSchedule(0.1, 50, warmup_steps=10), steps=50)
    assert history.learning_rate[0] == pytest.approx(0.01) and history.learning_rate.argmax() in (9, 10)
    assert history.learning_rate[-1] < 1e-3
