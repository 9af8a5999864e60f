"""Learning rates that change in the course of a run.

``schedule.lr_at(step)`` is the rate of a step, counted from 0. It depends on nothing else, except for the plateau,
which is told the validation losses.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from fastseq import checks

_MOST_EXPONENT = math.log(sys.float_info.max)


class Schedule(ABC):
    """What the schedules share. Those that depend on the step alone have nothing to save."""

    @abstractmethod
    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""

    def state_dict(self) -> dict[str, Any]:
        """What a later rate depends on."""
        return {}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        given, wanted = checks.mapping("mapping", mapping), self.state_dict()
        if set(given) != set(wanted):
            names = [", ".join(sorted(some)) or "nothing" for some in (wanted, given)]
            raise ValueError(f"mapping should hold the state of a {type(self).__name__}: {names[0]}, not {names[1]}")


class ConstantSchedule(Schedule):
    """One learning rate for the whole run.

    Parameters
    ----------
    lr : float
        That rate.
    """

    def __init__(self, lr: float) -> None:
        self._lr = checks.number("lr", lr, least=0)

    def lr_at(self, step: int) -> float:  # noqa: D102
        checks.size("step", step)
        return self._lr


class StepSchedule(Schedule):
    """The rate is multiplied by `gamma` every so many steps.

    Parameters
    ----------
    lr : float
        The rate of the first steps.
    step_size : int
        How many steps have one rate.
    gamma : float
        What the rate is multiplied by after them. With more than 1 it becomes infinite in the end, which an optimiser
        refuses.
    """

    def __init__(self, lr: float, step_size: int, gamma: float = 0.1) -> None:
        self._lr = checks.number("lr", lr, least=0)
        self._step_size = checks.size("step_size", step_size, 1)
        self._gamma = checks.number("gamma", gamma, above=0)

    def lr_at(self, step: int) -> float:  # noqa: D102
        times = checks.size("step", step) // self._step_size
        try:
            factor = self._gamma**times
        except OverflowError:
            factor = math.inf
        if self._lr == 0 or 0 < factor < math.inf:
            return float(self._lr * factor) if self._lr else 0.0
        # The rate may be a number though the factor is none.
        exponent = math.log(self._lr) + times * math.log(self._gamma)
        return math.exp(exponent) if exponent < _MOST_EXPONENT else math.inf


class CosineSchedule(Schedule):
    """Half a cosine down from `lr` to `final_lr`, after a linear way up [1]_.

    Parameters
    ----------
    lr : float
        The highest rate.
    total_steps : int
        The step from which on the rate is `final_lr`.
    warmup_steps : int
        In how many steps of equal height the rate climbs to `lr` first; less than `total_steps`.
    final_lr : float
        The rate at the end.

    References
    ----------
    .. [1] I. Loshchilov, F. Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017.
    """

    def __init__(self, lr: float, total_steps: int, *, warmup_steps: int = 0, final_lr: float = 0.0) -> None:
        self._lr = checks.number("lr", lr, least=0)
        self._total = checks.size("total_steps", total_steps, 1)
        self._warmup = checks.size("warmup_steps", warmup_steps)
        self._final = checks.number("final_lr", final_lr, least=0)
        if self._warmup >= self._total:
            raise ValueError(f"warmup_steps should be less than total_steps={self._total}, not {self._warmup}")

    def lr_at(self, step: int) -> float:  # noqa: D102
        number = checks.size("step", step)
        if number < self._warmup:
            return self._lr * (number + 1) / self._warmup
        part = min(1.0, (number - self._warmup) / (self._total - self._warmup))
        return self._final + (self._lr - self._final) * (1 + math.cos(math.pi * part)) / 2


class PlateauSchedule(Schedule):
    """The rate is multiplied by `factor` when the validation loss has stopped falling.

    Parameters
    ----------
    lr : float
        The rate of the first steps.
    factor : float in (0, 1)
        What the rate is multiplied by.
    patience : int
        How many validations in a row may be no better than the best; the next one lowers the rate.
    threshold : float in [0, 1)
        What share of the best loss a loss must lie below it to be better.
    min_lr : float
        The rate goes no lower.
    """

    def __init__(
        self, lr: float, *, factor: float = 0.1, patience: int = 10, threshold: float = 1e-4, min_lr: float = 0.0
    ) -> None:
        self._lr = checks.number("lr", lr, least=0)
        self._factor = checks.number("factor", factor, above=0, below=1)
        self._patience = checks.size("patience", patience)
        self._threshold = checks.number("threshold", threshold, least=0, below=1)
        self._min_lr = checks.number("min_lr", min_lr, least=0)
        self._best = math.inf
        self._bad = 0

    def lr_at(self, step: int) -> float:  # noqa: D102
        checks.size("step", step)
        return self._lr

    def observe(self, validation_loss: float) -> None:
        """Take note of a validation loss."""
        # Of a negative loss the same share is further down.
        if validation_loss < self._best - self._threshold * (abs(self._best) if math.isfinite(self._best) else 0):
            self._best, self._bad = float(validation_loss), 0
            return
        self._bad += 1
        if self._bad > self._patience:
            self._lr = min(self._lr, max(self._lr * self._factor, self._min_lr))
            self._bad = 0

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"lr": self._lr, "best": self._best, "bad": self._bad}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:  # noqa: D102
        super().load_state_dict(mapping)
        lr, bad = checks.number("lr", mapping["lr"], least=0), checks.size("bad", mapping["bad"])
        self._lr, self._best, self._bad = lr, float(mapping["best"]), bad
