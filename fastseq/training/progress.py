"""How a run is shown: a line of text an epoch, or a bar of tqdm where there is a terminal to draw it in."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from fastseq.training.history import History
from fastseq.training.learners import Mean

if TYPE_CHECKING:
    from fastseq.training.trainer import StepInfo

_BAR, _TIMES = "{desc} {bar} {n_fmt}/{total_fmt}", " [{elapsed}<{remaining}]"
_NARROW = 60  # columns below which there is no room for times


class Silent:
    """Shows nothing; what a run calls to be shown."""

    def step(self, info: StepInfo, count: int) -> None:
        """A step was taken, whose loss is the mean over `count` elements."""

    def epoch(self, history: History) -> None:
        """The last step was the last one of its epoch; its validation is done."""

    def end(self, history: History, note: str) -> None:
        """The run has ended; `note` says why, where that was not asked for."""

    def close(self) -> None:
        """Nothing more will be shown, whether the run has ended or failed."""


class Lines(Silent):
    """A line of text an epoch, on standard error: the mean loss, the validation, the time.

    Parameters
    ----------
    epochs, steps : int or None
        Of the whole run, where it has so many.
    """

    def __init__(self, epochs: int | None, steps: int | None) -> None:
        self._epochs, self._steps = epochs, steps
        self._begin = time.perf_counter()
        self._said = 0  # steps that the lines so far are about

    def step(self, info: StepInfo, count: int) -> None:  # noqa: D102
        pass

    def epoch(self, history: History) -> None:  # noqa: D102
        now = time.perf_counter()
        figures = [
            f"epoch {history._columns['epoch'][-1] + 1}{f'/{self._epochs}' if self._epochs is not None else ''}",
            *([] if self._steps is None else [f"step {len(history):,}/{self._steps:,}"]),
            *history._figures(),
            f"{now - self._begin:.3g} s" if now - self._begin < 100 else f"{now - self._begin:,.0f} s",
        ]
        _say(" · ".join(figures))
        self._begin, self._said = now, len(history)

    def end(self, history: History, note: str) -> None:  # noqa: D102
        if self._said < len(history) and history._columns["seconds"]:
            self.epoch(history)
        if note:
            _say(note)


class Bar(Silent):
    """A bar of tqdm, the figures before it; in a narrow terminal those that matter least are left out.

    Parameters
    ----------
    bar : type
        A class of tqdm.
    done : int
        Steps that were taken before this run.
    total : int
        Steps of the whole run.
    epochs : int or None
        Of the whole run.
    """

    def __init__(self, bar: Any, done: int, total: int, epochs: int | None) -> None:
        # Without a thread of its own, which a process that forks would rather not have.
        quiet = type("Bar", (bar,), {"monitor_interval": 0})
        self._bar = quiet(
            total=total, initial=done, unit="step", file=sys.stderr, dynamic_ncols=True, bar_format=_BAR, leave=True
        )
        self._epochs = epochs
        self._epoch = -1
        self._mean = Mean()
        self._tokens, self._seconds = 0.0, 0.0  # of the last steps, older ones counting less

    def step(self, info: StepInfo, count: int) -> None:  # noqa: D102
        if info.epoch != self._epoch:
            self._epoch, self._mean = info.epoch, Mean()
        self._mean.add(info.loss, count)
        self._tokens = 0.9 * self._tokens + info.tokens
        self._seconds = 0.9 * self._seconds + info.history._columns["seconds"][-1]
        self._describe(info.history)
        self._bar.update(1)

    def _describe(self, history: History) -> None:
        """Write the figures before the bar: as many as the terminal has room for, none of them cut."""
        figures = [
            f"epoch {self._epoch + 1}{f'/{self._epochs}' if self._epochs is not None else ''}",
            *history._figures(self._mean.value),
            f"{self._tokens / max(self._seconds, 1e-9):,.0f} tokens/s",
            f"lr {history._columns['learning_rate'][-1]:.3g}",
            f"gradient norm {history._columns['gradient_norm'][-1]:.3g}",
        ]
        columns = _columns()
        times = _TIMES if columns >= _NARROW else ""
        room = columns - len(f" ## {self._bar.total}/{self._bar.total} ") - len(times and " [00:00:00<00:00:00]")
        text = figures[0]
        for figure in figures[1:]:
            if len(text) + len(figure) + 3 > room:
                break
            text += f" · {figure}"
        self._bar.bar_format = _BAR + times
        self._bar.set_description_str(text, refresh=False)

    def epoch(self, history: History) -> None:  # noqa: D102
        self._describe(history)

    def end(self, history: History, note: str) -> None:  # noqa: D102
        if self._epoch >= 0:
            self._describe(history)
        self._bar.close()
        if note:
            _say(note)

    def close(self) -> None:  # noqa: D102
        self._bar.close()


def shown(wanted: bool, *, done: int, total: int, epochs: int | None, steps: int | None) -> Silent:
    """What shows a run: a bar where tqdm is installed and standard error is a terminal or a notebook, else lines."""
    if not wanted or sys.stderr is None:
        return Silent()
    bar = _bar()
    return Lines(epochs, steps) if bar is None else Bar(bar, done, total, epochs)


def _bar() -> Any:
    """The class of tqdm to draw with; None where there is none, or what is drawn would be a file or a pipe."""
    notebook = "ipykernel" in sys.modules
    if not (notebook or sys.stderr.isatty()):
        return None
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm


def _columns() -> int:
    """The width of the terminal."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def _say(text: str) -> None:
    # A run does not fail because nobody reads what it says.
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
