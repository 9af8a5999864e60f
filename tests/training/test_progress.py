"""What a run shows: a line an epoch, or a bar whose figures fit; the history and its picture."""

from __future__ import annotations

import io
import re
import signal
import sys
import threading
from typing import Any

import numpy as np
import pytest
from learners import Affine, Tiny, squared_error, streams

import fastseq as fs
from fastseq.training import AdamW, Batch, History, PaddedBatches, fit

LINE = r"epoch (\d+)/3 · loss ([\d.]+) · validation ([\d.]+) · [\d.]+ s"


class Terminal(io.StringIO):
    """Standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def opened(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in the place of standard error; within the test, where pytest has put its own there."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    return stream


def run(**options: Any) -> History:
    return fit(Tiny(), streams(), **{"epochs": 3, "validation": streams(9), **options})


@pytest.mark.parametrize("there", [True, False])
def test_without_a_terminal_there_is_a_line_an_epoch(
    there: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not there:
        for name in ("tqdm", "tqdm.auto"):
            monkeypatch.setitem(sys.modules, name, None)
    history = run()
    said = capsys.readouterr()
    assert said.out == "" and "\r" not in said.err
    lines = [re.fullmatch(LINE, line) for line in said.err.splitlines()]
    assert [int(line[1]) for line in lines if line] == [1, 2, 3]
    assert [line[2] for line in lines if line] == [f"{loss:.4g}" for loss in history.epoch_loss]
    assert [line[3] for line in lines if line] == [f"{loss:.4g}" for loss in history.validation_loss]
    run(progress=False)
    assert capsys.readouterr().err == ""


def test_a_terminal_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    for name in ("tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    run()
    assert len(re.findall(LINE, terminal.getvalue())) == 3


def test_losses_are_named_with_their_unit(capsys: pytest.CaptureFixture[str]) -> None:
    class Told(Tiny):
        loss_unit = "nats a symbol"

    history = fit(Told(), streams(), epochs=1)
    assert re.search(r" loss [\d.]+ nats a symbol ·", capsys.readouterr().err)
    assert (history.loss_label, history.loss_unit) == ("loss", "nats a symbol")
    x = np.zeros((3, 4), int)
    model = fs.Sequential(fs.Embedding(3, 4), fs.Linear(4, 3))
    fit(model, (x, x), loss=fs.losses.softmax_cross_entropy, epochs=1, validation=(x, x), metrics=["accuracy"])
    assert re.search(r"· cross-entropy [\d.]+ nats · validation [\d.]+ · accuracy [\d.]+ ·", capsys.readouterr().err)
    fit(Affine(), [Batch(np.ones((1, 2, 3)), np.ones((1, 2, 3)))], loss="mean_squared_error", epochs=1)
    assert re.search(r"· mean squared error [\d.]+ ·", capsys.readouterr().err)
    # An own loss is not taken for one of ours because of its name.
    squared = lambda y, t: squared_error(y, t)  # noqa: E731
    squared.__name__ = "huber"
    fit(Affine(), [Batch(np.ones((1, 2, 3)), np.ones((1, 2, 3)))], loss=squared, epochs=1)
    assert re.search(r"· loss [\d.]+ ·", capsys.readouterr().err)


def test_lines_say_how_a_run_ended(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run(steps=25, validation=None)
    assert [line.split(" · loss")[0] for line in capsys.readouterr().err.splitlines()] == [
        "epoch 1/3 · step 19/25",
        "epoch 2/3 · step 25/25",
    ]

    def interrupt(info: Any) -> None:
        if info.step == 21:
            signal.raise_signal(signal.SIGINT)

    run(callbacks=[interrupt], checkpoint=tmp_path)
    first, second, last = capsys.readouterr().err.splitlines()
    assert first.startswith("epoch 1/3 ") and second.startswith("epoch 2/3 ") and "validation" not in second
    assert last == f"stopped by Ctrl-C after step 21; the checkpoint is in {tmp_path}, resume=True goes on from it"
    run(checkpoint=tmp_path, resume=True)
    assert [line.split(" ")[1] for line in capsys.readouterr().err.splitlines()] == ["2/3", "3/3"]

    class Worse(Tiny):
        said = 0

        def evaluation_forward(self, batch: Any, state: Any = None) -> Any:
            type(self).said += 1
            return float(self.said), 1, None

    fit(Worse(), streams(), validation=[next(iter(streams().batches(0)))], patience=2, validate_every=5)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "stopped after step 15: no better validation in 2; the parameters are those of step 5, the best validation"
    )


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_figures_stand_before_the_bar_and_none_is_cut(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = opened(monkeypatch)
    pytest.importorskip("tqdm", reason="tqdm is not installed: take the extra 'train'")
    monkeypatch.setenv("COLUMNS", str(columns))
    workers = threading.active_count()
    history = run()
    assert threading.active_count() == workers
    # What is left of a longer frame is overwritten with spaces.
    frames = [frame.rstrip() for frame in re.split(r"[\r\n]", terminal.getvalue()) if frame.strip()]
    assert len(frames) > 1 and max(map(len, frames)) <= columns
    last = frames[-1]
    assert "57/57" in last
    figures = last[: re.search(r"[█▏▎▍▌▋▊▉#]", last).start()].strip().split(" · ")  # type: ignore[union-attr]
    wanted = [
        r"epoch 3/3",
        rf"loss {history.epoch_loss[-1]:.4g}",
        rf"validation {history.validation_loss[-1]:.4g}",
        r"[\d,]+ tokens/s",
        r"lr 0\.001",
        rf"gradient norm {history.gradient_norm[-1]:.3g}",
    ]
    assert len(figures) == {40: 2, 80: 3, 200: 6}[columns]
    for figure, pattern in zip(figures, wanted, strict=False):
        assert re.fullmatch(pattern, figure)


def test_nobody_has_to_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    closed.isatty = lambda: False  # type: ignore[method-assign]
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert len(run(epochs=1)) == 19


# The history


def test_epoch_means_are_weighted_by_what_counts() -> None:
    rng = np.random.default_rng(0)
    x = [rng.integers(0, 3, n) for n in (1, 2, 3, 9, 17)]
    y = [np.where(rng.random(len(row)) < 0.5, -1, row) for row in x]
    y[2][:] = -1

    def ignoring(outputs: Any, targets: Any, lengths: Any = None) -> Any:
        return fs.losses.softmax_cross_entropy(outputs, targets, ignore_index=-1, lengths=lengths)

    model = fs.Sequential(fs.Embedding(3, 4, seed=0), fs.Linear(4, 3, seed=0))
    data = PaddedBatches(x, y, batch_size=1)
    history = fit(model, data, loss=ignoring, optimiser=AdamW(model, 0.0), epochs=2, progress=False)
    count = [int((row >= 0).sum()) for row in y]
    losses = [
        float(fs.losses.softmax_cross_entropy(model(a), b, ignore_index=-1)[0]) for a, b in zip(x, y, strict=True)
    ]
    assert history.epoch_loss == pytest.approx([np.average(losses, weights=count)] * 2)
    assert sorted(history.count[:5]) == sorted(count) and 0 in count
    np.testing.assert_array_equal(history.epoch, [0] * 5 + [1] * 5)
    # So far, while an epoch is not over.
    history = fit(model, data, loss=ignoring, optimiser=AdamW(model, 0.0), steps=7, progress=False)
    assert history.epoch_loss[1] == pytest.approx(np.average(history.loss[5:], weights=history.count[5:]))
    assert History().epoch_loss.shape == (0,)


def test_a_history_of_one_step() -> None:
    history = History.of_one_step(0.5, tokens=20, seconds=0.1, unit="nats a symbol")
    assert len(history) == 1 and history.stopped == "epochs" and not history.interrupted
    assert [history.step[0], history.epoch[0], history.loss[0], history.tokens[0]] == [1, 0, 0.5, 20]
    assert history.epoch_loss == [0.5] and np.isnan(history.gradient_norm[0]) and history.validation_loss.size == 0
    assert history.loss_unit == "nats a symbol" and "1 step," in repr(history)
    copy = History()
    copy.load_state_dict(history.state_dict())
    assert copy.loss[0] == 0.5


def test_a_history_with_metrics_goes_into_a_state_dict() -> None:
    history = run(progress=False)
    history._add_validation(60, 0.5, {"a": 0.25})
    copy = History()
    copy.load_state_dict(history.state_dict())
    np.testing.assert_array_equal(copy.metrics["a"], [np.nan] * 3 + [0.25])
    with pytest.raises(ValueError, match=r"metrics\.a"):
        copy.load_state_dict({**history.state_dict(), "metrics.a": np.zeros(2)})
    np.testing.assert_array_equal(copy.metrics["a"], [np.nan] * 3 + [0.25])
    with pytest.raises(TypeError):
        history.metrics["a"] = np.zeros(3)  # type: ignore[index]


def test_a_picture_has_units_and_titles(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed: take the extra 'plot'")
    history = run(progress=False)
    history.loss_label, history.loss_unit = "cross-entropy", "nats a symbol"
    history._add_validation(57, 0.5, {"mean_squared_error": 0.25})
    losses, norms, metrics, rates = history.plot(tmp_path / "history.png").axes
    assert losses.get_ylabel() == "cross-entropy (nats a symbol)"
    assert losses.get_title() == "Training: 57 steps in 3 epochs"
    assert norms.get_title() and norms.get_ylabel() == "gradient norm before clipping"
    assert rates.get_ylabel() == "learning rate" and metrics.get_xlabel() == "optimiser step"
    assert [text.get_text() for text in metrics.get_legend().get_texts()] == ["mean squared error"]
    np.testing.assert_array_equal(losses.lines[1].get_xdata(), [19, 38, 57])
    np.testing.assert_array_equal(losses.lines[1].get_ydata(), history.epoch_loss)
