"""What happened in a run: numbers of every step and of every validation, and why it ended."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array

_FIELDS: dict[str, str] = {
    "step": "int64",
    "loss": "float64",
    "gradient_norm": "float64",
    "learning_rate": "float64",
    "tokens": "int64",
    "seconds": "float64",
    "validation_step": "int64",
    "validation_loss": "float64",
}


class History:
    """The course of a run.

    Attributes
    ----------
    step, loss, gradient_norm, learning_rate, tokens, seconds : ndarray
        One number for each step: its count from 1, the loss before it, the norm of all gradients before clipping,
        the learning rate, the time steps in its batch, the seconds that it took.
    validation_step, validation_loss : ndarray
        One number for each validation: after how many steps, and the loss.
    interrupted : bool
        Whether Ctrl-C ended the run.
    stopped : str
        Why the run ended: "epochs", "steps", "patience", "callback", "interrupted"; "" while it goes on.
    """

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in _FIELDS}
        self.interrupted = False
        self.stopped = ""

    def _add(self, **numbers: float) -> None:
        for name, value in numbers.items():
            self._columns[name].append(value)

    def _array(self, name: str) -> Array:
        return np.array(self._columns[name], _FIELDS[name])

    step = property(lambda self: self._array("step"))
    loss = property(lambda self: self._array("loss"))
    gradient_norm = property(lambda self: self._array("gradient_norm"))
    learning_rate = property(lambda self: self._array("learning_rate"))
    tokens = property(lambda self: self._array("tokens"))
    seconds = property(lambda self: self._array("seconds"))
    validation_step = property(lambda self: self._array("validation_step"))
    validation_loss = property(lambda self: self._array("validation_loss"))

    def __len__(self) -> int:
        """Steps."""
        return len(self._columns["step"])

    def __repr__(self) -> str:
        parts = [f"{len(self):,} steps"]
        if len(self):
            parts.append(f"loss {self._columns['loss'][-1]:.4g}")
        if self._columns["validation_loss"]:
            parts.append(f"validation loss {self._columns['validation_loss'][-1]:.4g}")
        return f"<history of {', '.join(parts)}{f', ended by {self.stopped}' if self.stopped else ''}>"

    def state_dict(self) -> dict[str, Any]:
        """All arrays by name."""
        return {name: self._array(name) for name in _FIELDS}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        given = checks.mapping("mapping", mapping)
        faults = [name for name in _FIELDS if name not in given or np.ndim(given[name]) != 1]
        if faults:
            raise ValueError(f"mapping should hold arrays of one axis named {', '.join(_FIELDS)}; see {faults[0]}")
        self._columns = {name: np.asarray(given[name], _FIELDS[name]).tolist() for name in _FIELDS}

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw losses, gradient norms and learning rates over the steps.

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

        figure = Figure(figsize=(8, 6), layout="constrained")
        losses, norms = figure.subplots(2, 1, sharex=True)
        losses.plot(self.step, self.loss, color="#9ab8d6", linewidth=0.8, label="training")
        if len(self) >= 20:
            width = max(5, len(self) // 50)
            means = np.convolve(self.loss, np.ones(width) / width, "valid")
            losses.plot(self.step[width - 1 :], means, color="#1f5a96", label=f"training, mean of {width}")
        if self._columns["validation_step"]:
            losses.plot(
                self.validation_step, self.validation_loss, "o-", color="#c8553d", markersize=3, label="validation"
            )
        losses.set_ylabel("loss")
        losses.legend(frameon=False)
        norms.plot(self.step, self.gradient_norm, color="#1f5a96", linewidth=0.8)
        norms.set_ylabel("gradient norm", color="#1f5a96")
        norms.set_xlabel("step")
        rates = norms.twinx()
        rates.plot(self.step, self.learning_rate, color="#c8553d")
        rates.set_ylabel("learning rate", color="#c8553d")
        rates.set_ylim(bottom=0)
        for axes in (losses, norms):
            axes.grid(alpha=0.25)
        if path is not None:
            figure.savefig(checks.path("path", path), dpi=150)
        return figure
