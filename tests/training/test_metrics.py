"""Metrics: means over what counts, by hand; in `fit` weighted by what counts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import fastseq as fs
from fastseq.training import Batch, PaddedBatches, fit, metrics


def test_accuracy_leaves_out_padding_and_what_is_ignored() -> None:
    logits = np.zeros((2, 4, 3), "float32")
    targets = np.array([[0, 1, 2, -1], [-100, 2, 1, 1]])
    for row, step, guess in ((0, 0, 0), (0, 1, 1), (0, 2, 1), (1, 1, 2), (1, 2, 1), (1, 3, 0)):
        logits[row, step, guess] = 1
    logits[0, 3] = np.nan
    assert metrics.accuracy(logits, targets) == 4 / 6
    assert metrics.accuracy(logits, targets, [2, 2]) == 3 / 3
    assert metrics.accuracy(logits, targets, [4, 4], ignore_index=1) == 2 / 3
    assert metrics.accuracy(logits, targets.astype("int8"), np.array([3, 4], "uint8")) == 4 / 6
    assert metrics.accuracy(logits[:, 0], targets[:, 0]) == 1
    assert math.isnan(metrics.accuracy(logits, targets, [0, 0]))
    assert math.isnan(metrics.accuracy(logits[:, :1], [[-1], [-100]]))


def test_binary_accuracy() -> None:
    logits = np.array([[[1.0], [-1.0], [3.0]], [[0.0], [2.0], [np.nan]]])
    targets = np.array([[1, 1, -1], [0, 1, 1]])
    assert metrics.binary_accuracy(logits, targets) == 3 / 5
    assert metrics.binary_accuracy(logits, targets, [3, 2]) == 3 / 4
    assert metrics.binary_accuracy(logits[..., 0], np.array([[0.9, 0.2, 0.6], [0.5, 0.4, 0]]), [2, 2]) == 3 / 4
    assert metrics.binary_accuracy(logits[:, 0, 0], np.array([True, False])) == 1


def test_errors_of_real_numbers() -> None:
    y = np.array([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [np.inf, np.nan]]], "float32")
    t = np.array([[[1, 0], [0, 0]], [[5, 5], [0, 0]]])
    assert metrics.mean_absolute_error(y, t, [2, 1]) == pytest.approx((0 + 2 + 3 + 4 + 0 + 1) / 6)
    assert metrics.mean_squared_error(y, t, [2, 1]) == pytest.approx((0 + 4 + 9 + 16 + 0 + 1) / 6)
    assert metrics.mean_squared_error(y[:1, :, :1], t[:1, :, 0]) == pytest.approx(9 / 2)
    assert metrics.mean_absolute_error(y[:1, :, 0], t[:1, :, :1]) == pytest.approx(3 / 2)
    assert math.isnan(metrics.mean_squared_error(y, t, [0, 0]))
    # Means are not taken in float32.
    assert metrics.mean_absolute_error(np.float32([16777216, 0]), np.float32([1, 0])) == 16777215 / 2


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: metrics.accuracy(np.zeros((2, 3)), [0.0, 1.0]), TypeError, "targets"),
        (lambda: metrics.accuracy(np.zeros((2, 3)), [0]), ValueError, "targets"),
        (lambda: metrics.accuracy(np.zeros((2, 0)), [0, 0]), ValueError, "outputs"),
        (lambda: metrics.accuracy(["a"], [0]), TypeError, "outputs"),
        (lambda: metrics.accuracy(np.zeros((2, 3)), [0, 0], [1]), ValueError, "targets.*lengths"),
        (lambda: metrics.accuracy(np.zeros((1, 2, 3)), [[0, 0]], [3]), ValueError, r"lengths\[0\] is 3"),
        (lambda: metrics.accuracy(np.zeros((1, 3)), [0], ignore_index=1.0), TypeError, "ignore_index"),
        (lambda: metrics.mean_squared_error(np.zeros((2, 3)), np.zeros((3, 2))), ValueError, "targets"),
        (lambda: metrics.mean_absolute_error(np.zeros(2), np.zeros(2, bool)), TypeError, "targets"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        call()


def tagged() -> tuple[Any, Any]:
    """Ids of rows of very unequal lengths, and classes, some of which do not count."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 5, n) for n in (1, 2, 3, 9, 17, 18)]
    return ids, [np.where(rng.random(len(row)) < 0.4, -1, (row + 1) % 5) for row in ids]


def ignoring(y: Any, targets: Any, lengths: Any = None) -> Any:
    return fs.losses.softmax_cross_entropy(y, targets, ignore_index=-1, lengths=lengths)


def test_metrics_of_a_layer_are_means_over_all_the_validation_data() -> None:
    ids, targets = tagged()
    model = fs.Sequential(fs.Embedding(5, 4, seed=0), fs.GRU(4, 6, seed=1), fs.Linear(6, 5, seed=2))

    def steps(outputs: Any, targets: Any, lengths: Any = None) -> float:
        """One for a batch that is short, with nothing said of what counts."""
        return float(targets.shape[1] < 4)

    history = fit(
        model,
        (ids, targets),
        loss=ignoring,
        epochs=2,
        validation=PaddedBatches(ids, targets, batch_size=3, shuffle=False),
        metrics={"right": metrics.accuracy, "short": steps},
        progress=False,
    )
    right = total = 0
    for row, wanted in zip(ids, targets, strict=True):
        guesses = model(row[None])[0].argmax(-1)
        right, total = right + int((guesses == wanted)[wanted >= 0].sum()), total + int((wanted >= 0).sum())
    assert list(history.metrics) == ["right", "short"]
    assert history.metrics["right"][-1] == pytest.approx(right / total)
    np.testing.assert_allclose(history.metrics["short"], 6 / 50)
    assert history.metrics["right"].shape == history.validation_loss.shape == (2,)


def test_metrics_of_a_model_with_a_loss_of_its_own() -> None:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 9, n) for n in (3, 4, 9, 5)]
    labels = np.array([0, 1, 1, 0])
    for pooling, targets in (("mean", labels), (None, [row % 2 for row in ids])):
        model = fs.models.TransformerEncoderModel(9, 8, 2, 1, pooling=pooling, num_labels=2, seed=0)
        data = PaddedBatches(ids, targets, batch_size=2)
        history = fit(model, data, epochs=1, validation=data, metrics=["accuracy"], progress=False)
        right = [
            np.mean(model(row[None])[0].argmax(-1) == np.asarray(wanted)) * np.size(wanted)
            for row, wanted in zip(ids, targets, strict=True)
        ]
        assert history.metrics["accuracy"][-1] == pytest.approx(sum(right) / sum(map(np.size, targets)))
    text = fs.models.RecurrentLM(5, 4, 6, seed=0)
    history = fit(
        text,
        fs.training.Streams(np.arange(100) % 5, batch_size=2, steps=7),
        epochs=1,
        validation=fs.training.Streams(np.arange(41) % 5, batch_size=1, steps=7),
        metrics="accuracy",
        progress=False,
    )
    ids = np.arange(41) % 5
    assert history.metrics["accuracy"][-1] == pytest.approx(np.mean(text(ids[None, :-1])[0].argmax(-1) == ids[1:]))
    for data in (
        PaddedBatches([ids], batch_size=1),
        [Batch(ids[None])],
    ):
        with pytest.raises(ValueError, match="metrics should be left out"):
            fit(text, data, epochs=1, validation=data, metrics="accuracy", progress=False)


def test_metrics_are_kept_in_checkpoints_and_may_come_and_go(tmp_path: Any) -> None:
    ids, targets = tagged()

    def run(epochs: int, **options: Any) -> Any:
        model = fs.Sequential(fs.Embedding(5, 4, seed=0), fs.Linear(4, 5, seed=2))
        data = PaddedBatches(ids, targets, batch_size=3)
        return fit(model, data, loss=ignoring, epochs=epochs, validation=data, progress=False, **options)

    run(1, metrics=["accuracy"], checkpoint=tmp_path)
    history = run(2, metrics={"other": lambda y, t, lengths=None: 0.5}, checkpoint=tmp_path, resume=True)
    assert history.metrics["accuracy"].shape == (2,) and math.isnan(history.metrics["accuracy"][1])
    assert math.isnan(history.metrics["other"][0]) and history.metrics["other"][1] == 0.5
    whole = run(3, metrics=["accuracy"])
    again = run(3, metrics=["accuracy"], checkpoint=tmp_path, resume=True)
    assert again.metrics["accuracy"][2] == whole.metrics["accuracy"][2]
    with pytest.raises(TypeError, match="metrics: wrong should return a number"):
        run(1, metrics={"wrong": lambda y, t, lengths=None: y})


def test_accuracy_of_one_logit_names_the_metric_for_it() -> None:
    with pytest.raises(ValueError, match="for one logit a position there is binary_accuracy"):
        metrics.accuracy(np.zeros((3, 1)), [0, 1, 1])
