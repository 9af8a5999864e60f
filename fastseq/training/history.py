"""What happened in a run: numbers of every step, epoch and validation, and why it ended."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array

_FIELDS: dict[str, str] = {
    "step": "int64",
    "epoch": "int64",
    "loss": "float64",
    "count": "int64",
    "gradient_norm": "float64",
    "learning_rate": "float64",
    "tokens": "int64",
    "seconds": "float64",
    "validation_step": "int64",
    "validation_loss": "float64",
}
_METRIC = "metrics."  # what the names of the metrics begin with in a state dict


class History:
    """The course of a run.

    Attributes
    ----------
    step, epoch, loss, count, gradient_norm, learning_rate, tokens, seconds : ndarray
        One number for each step: its count from 1, its epoch from 0, the loss before it, the mean over `count`
        elements, the norm of all gradients before clipping, the learning rate, the time steps in its batch, the seconds
        that it took.
    epoch_loss : ndarray
        One number for each epoch begun, in order: the mean loss over all elements of its steps. While an epoch is not
        over, that of the steps so far.
    validation_step, validation_loss : ndarray
        One number for each validation: after how many steps, and the loss, the mean over all elements.
    metrics : mapping from str to ndarray
        Of each metric one number for each validation; NaN where it was not measured.
    loss_label, loss_unit : str
        What the loss is called, "cross-entropy" for example, and its unit, "nats a symbol", or "".
    interrupted : bool
        Whether Ctrl-C ended the run.
    stopped : str
        Why the run ended: "epochs", "steps", "patience", "callback", "interrupted"; "" while it goes on.
    """

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in _FIELDS}
        self._metrics: dict[str, list[float]] = {}
        self.loss_label, self.loss_unit = "loss", ""
        self.interrupted = False
        self.stopped = ""

    @classmethod
    def of_one_step(cls, loss: float, *, tokens: int, seconds: float, unit: str = "") -> History:
        """The history of a model that is fitted at once, by counting or by solving equations.

        Parameters
        ----------
        loss : float
            The mean loss over what the model was fitted to, in `unit`.
        tokens : int
            Time steps it was fitted to.
        seconds : float
            How long that took.
        unit : str
            "nats a symbol", for example.
        """
        history = cls()
        history._add(step=1, epoch=0, loss=loss, count=tokens, gradient_norm=math.nan, learning_rate=math.nan)
        history._add(tokens=tokens, seconds=seconds)
        history.loss_unit, history.stopped = unit, "epochs"
        return history

    def _add(self, **numbers: float) -> None:
        for name, value in numbers.items():
            self._columns[name].append(value)

    def _add_validation(self, step: int, loss: float, metrics: Mapping[str, float]) -> None:
        """A validation; what was not measured before, or is not now, is NaN."""
        before = len(self._columns["validation_step"])
        self._add(validation_step=step, validation_loss=loss)
        for name in {**self._metrics, **metrics}:
            values = self._metrics.setdefault(name, [math.nan] * before)
            values.append(metrics.get(name, math.nan))

    def _array(self, name: str) -> Array:
        return np.array(self._columns[name], _FIELDS[name])

    step = property(lambda self: self._array("step"))
    epoch = property(lambda self: self._array("epoch"))
    loss = property(lambda self: self._array("loss"))
    count = property(lambda self: self._array("count"))
    gradient_norm = property(lambda self: self._array("gradient_norm"))
    learning_rate = property(lambda self: self._array("learning_rate"))
    tokens = property(lambda self: self._array("tokens"))
    seconds = property(lambda self: self._array("seconds"))
    validation_step = property(lambda self: self._array("validation_step"))
    validation_loss = property(lambda self: self._array("validation_loss"))

    @property
    def epoch_loss(self) -> Array:  # noqa: D102  see the class
        return self._epochs()[1]

    @property
    def metrics(self) -> Mapping[str, Array]:  # noqa: D102  see the class
        return MappingProxyType({name: np.array(values, np.float64) for name, values in self._metrics.items()})

    def _epochs(self) -> tuple[Array, Array]:
        """The last step of each epoch, and the mean loss over it; steps in which nothing counts have no part in it."""
        epochs, first = np.unique(self.epoch, return_index=True)
        last = np.append(first[1:], len(self))[: len(epochs)]
        means = [_mean(self.loss[a:b], self.count[a:b]) for a, b in zip(first, last, strict=True)]
        return self.step[last - 1] if len(self) else self.step, np.array(means, np.float64)

    def _last_epoch_loss(self) -> float:
        """The mean loss over the epoch of the last step."""
        epochs = self._columns["epoch"]
        first = len(epochs)
        while first and epochs[first - 1] == epochs[-1]:
            first -= 1
        return _mean(np.array(self._columns["loss"][first:]), np.array(self._columns["count"][first:]))

    def _figures(self, loss: float | None = None) -> list[str]:
        """The loss, by default the mean over the last epoch, and the validation if it is of that epoch; in words."""
        value = self._last_epoch_loss() if loss is None else loss
        figures = [f"{self.loss_label} {value:.4g}{f' {self.loss_unit}' if self.loss_unit else ''}"]
        steps = self._columns["validation_step"]
        epochs = self._columns["epoch"]
        recent = steps and (loss is not None or epochs[steps[-1] - 1] == epochs[-1])
        if recent:
            figures.append(f"validation {self._columns['validation_loss'][-1]:.4g}")
            figures += [f"{name.replace('_', ' ')} {values[-1]:.4g}" for name, values in self._metrics.items()]
        return figures

    def __len__(self) -> int:
        """Steps."""
        return len(self._columns["step"])

    def __repr__(self) -> str:
        parts = [f"{len(self):,} step{'' if len(self) == 1 else 's'}"]
        if len(self):
            parts.append(f"{self.loss_label} of the last epoch {self._last_epoch_loss():.4g}")
        if self._columns["validation_loss"]:
            parts.append(f"validation loss {self._columns['validation_loss'][-1]:.4g}")
        return f"<history of {', '.join(parts)}{f', ended by {self.stopped}' if self.stopped else ''}>"

    def state_dict(self) -> dict[str, Any]:
        """All arrays by name; those of a metric are named ``metrics.<name>``."""
        metrics = {f"{_METRIC}{name}": array for name, array in self.metrics.items()}
        return {**{name: self._array(name) for name in _FIELDS}, **metrics}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        given = checks.mapping("mapping", mapping)
        faults = [name for name in _FIELDS if name not in given or np.ndim(given[name]) != 1]
        if faults:
            raise ValueError(f"mapping should hold arrays of one axis named {', '.join(_FIELDS)}; see {faults[0]}")
        metrics = {name.removeprefix(_METRIC): given[name] for name in given if name.startswith(_METRIC)}
        for name, values in metrics.items():
            if np.shape(values) != np.shape(given["validation_step"]):
                raise ValueError(f"mapping should hold a number for each validation as {_METRIC}{name}")
        self._columns = {name: np.asarray(given[name], _FIELDS[name]).tolist() for name in _FIELDS}
        self._metrics = {name: np.asarray(values, np.float64).tolist() for name, values in metrics.items()}

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw losses, gradient norms, learning rates and metrics over the steps.

        Parameters
        ----------
        path : path, optional
            Where the picture is written.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        ImportError
            matplotlib is not installed: take the extra ``plot``.
        """
        from matplotlib.figure import Figure

        panels = 3 if self._metrics else 2
        figure = Figure(figsize=(8, 3 * panels), layout="constrained")
        losses, norms, *more = figure.subplots(panels, 1, sharex=True)
        self._draw_losses(losses)
        norms.plot(self.step, self.gradient_norm, color="#1f5a96", linewidth=0.8)
        norms.set_ylabel("gradient norm before clipping", color="#1f5a96")
        norms.set_title("Gradient norm and learning rate")
        rates = norms.twinx()
        rates.plot(self.step, self.learning_rate, color="#c8553d")
        rates.set_ylabel("learning rate", color="#c8553d")
        rates.set_ylim(bottom=0)
        for axes in more:
            for name, values in self.metrics.items():
                axes.plot(self.validation_step, values, "o-", markersize=3, label=name.replace("_", " "))
            axes.set_title("Metrics on the validation data")
            axes.legend(frameon=False)
        for axes in (losses, norms, *more):
            axes.grid(alpha=0.25)
        (more or [norms])[-1].set_xlabel("optimiser step")
        if path is not None:
            figure.savefig(checks.path("path", path), dpi=150)
        return figure

    def _draw_losses(self, axes: Any) -> None:
        """The panel of the losses: of every step, the mean over each epoch or some steps, and of the validations."""
        axes.plot(self.step, self.loss, color="#9ab8d6", linewidth=0.8, label="training, each step")
        ends, means = self._epochs()
        if len(ends) > 1:
            axes.plot(ends, means, "o-", color="#1f5a96", markersize=3, label="training, mean over the epoch")
        elif len(self) >= 20:
            width = max(5, len(self) // 50)
            running = np.convolve(self.loss, np.ones(width) / width, "valid")
            axes.plot(self.step[width - 1 :], running, color="#1f5a96", label=f"training, mean of {width} steps")
        if self._columns["validation_step"]:
            axes.plot(
                self.validation_step, self.validation_loss, "o-", color="#c8553d", markersize=3, label="validation"
            )
        axes.set_ylabel(f"{self.loss_label}{f' ({self.loss_unit})' if self.loss_unit else ''}")
        axes.set_title(f"Training: {len(self):,} steps in {len(ends):,} epoch{'' if len(ends) == 1 else 's'}")
        axes.legend(frameon=False)


def _mean(values: Array, counts: Array) -> float:
    """The mean of means, each over its count; those of nothing have no part in it."""
    some = counts > 0
    if not some.any():
        return math.nan
    return float((values[some] * counts[some]).sum() / counts[some].sum())
