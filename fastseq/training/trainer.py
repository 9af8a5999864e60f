"""The trainer: what a run is, step by step, and how it goes on where it was left.

Everything random in a step comes from the seed of the run and the count of the step, and what a later step depends on
is in a checkpoint; so a resumed run has the bits of one that was never interrupted.
"""

from __future__ import annotations

import inspect
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.layers.base import Layer
from fastseq.state import State
from fastseq.training import checkpoints
from fastseq.training import data as datasets
from fastseq.training.clipping import clip_grad_norm
from fastseq.training.data import Batch
from fastseq.training.history import History
from fastseq.training.optimisers import AdamW, Optimiser

VALIDATION_SEED = 0  # where a model has no forward without dropout: the same masks in every validation


class DivergenceError(ValueError):
    """The loss or a gradient of a step is not finite; the parameters are those before the step.

    Attributes
    ----------
    step : int
        The step, counted from 1.
    loss : float
        Its loss.
    parameter : str or None
        The first parameter whose gradient is not finite, in the order of ``model.parameters``; None if all are.
    """

    def __init__(self, step: int, loss: float, norm: float, parameter: str | None) -> None:
        self.step, self.loss, self.parameter = step, loss, parameter
        if parameter is not None:
            what = f"the gradient of {parameter} is not finite"
        elif math.isfinite(norm):
            what = "all gradients are finite"
        else:
            what = "all gradients are finite, but the sum of their squares is not"
        super().__init__(f"training diverged in step {step}: the loss is {loss}, {what}; the parameters are unchanged")

    def __reduce__(self) -> tuple[Any, ...]:
        return _divergence, (self.step, self.loss, self.parameter, str(self))


def _divergence(step: int, loss: float, parameter: str | None, message: str) -> DivergenceError:
    error = DivergenceError(step, loss, math.nan, parameter)
    error.args = (message,)
    return error


class StepInfo(NamedTuple):
    """What a callback is told after a step.

    Attributes
    ----------
    step : int
        Steps taken, this one included.
    epoch : int
        The epoch of the step, from 0.
    loss, gradient_norm, learning_rate : float
        The loss before the step, the norm of all gradients before clipping, the rate of the step.
    tokens : int
        Time steps in the batch, without the padding.
    model : Layer
        The model, after the step.
    history : History
        The course of the run so far.
    """

    step: int
    epoch: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    model: Layer
    history: History


def fit(
    model: Layer,
    data: Any,
    *,
    loss: Callable[..., tuple[float, Array]] | None = None,
    optimiser: Optimiser | None = None,
    schedule: Any = None,
    epochs: int | None = None,
    steps: int | None = None,
    validation: Any = None,
    validate_every: int | None = None,
    patience: int | None = None,
    clip_norm: float | None = None,
    truncate: int | None = None,
    options: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callable[[StepInfo], Any]] = (),
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    keep: int | None = 3,
    resume: bool | str | os.PathLike[str] = False,
    seed: int | None = 0,
) -> History:
    """Train a model.

    Parameters
    ----------
    model : Layer
        A model with ``training_forward`` and ``training_backward``, or any layer together with `loss`.
    data : PaddedBatches, PairedBatches, Streams, Windows or list of Batch
        Or anything with ``batches(epoch, start)`` and a length.
    loss : callable, optional
        For a layer: ``loss(outputs, targets) -> (mean, gradient)``, with ``lengths`` where batches are padded; see
        `fastseq.losses`.
    optimiser : Optimiser, optional
        ``AdamW(model)`` by default.
    schedule : schedule or callable, optional
        ``schedule.lr_at(step)``, or ``schedule(step)``, is the learning rate of a step counted from 0. By default
        that of the optimiser.
    epochs, steps : int, optional
        How long; at least one of them. Counted from the beginning of the run, also where it is resumed.
    validation : like `data`, optional
        What the model is validated on.
    validate_every : int, optional
        Steps from one validation to the next; by default there is one after every epoch.
    patience : int, optional
        After how many validations in a row without a new best loss the run ends. The parameters of the best
        validation are put back at the end of a run that Ctrl-C did not end.
    clip_norm : float, optional
        The most the norm of all gradients may be; see `clip_grad_norm`.
    truncate : int, optional
        Handed to the backward of a recurrent layer or model: how many steps a gradient goes back.
    options : mapping from str, optional
        Handed to every ``training_forward`` of a model: what it takes by name besides batch, state and seed. A
        validation gets none of it.
    callbacks : sequence of callables
        Each is called with a `StepInfo` after every step; returning True ends the run.
    progress : bool
        Whether to show a bar, where tqdm is installed: loss, tokens per second, gradient norm, learning rate.
    checkpoint : path, optional
        A folder for checkpoints; made, if need be. One is written at the end of the run in any case.
    checkpoint_every : int, optional
        Steps from one checkpoint to the next; by default there is one after every epoch. There is also one after
        every validation with a new best loss.
    keep : int or None
        How many checkpoints are kept, beside that of the best validation; None: all.
    resume : bool or path
        True: from the newest checkpoint in the folder that can be read, or from the beginning if there is none.
        A path: from that checkpoint. The seeds are those of the checkpoint.
    seed : int, optional
        Fixes what is random in the model, dropout for example. None: drawn.

    Returns
    -------
    History
        The course of the run, from its beginning.

    Raises
    ------
    DivergenceError
        A `ValueError`: the loss or a gradient was not finite. The parameters and checkpoints are those before the
        step.
    ValueError, TypeError
        Naming the argument, what it was and what it should be; or naming the checkpoint that cannot be read.
    OSError
        A checkpoint could not be written. The model, the optimiser and the checkpoints before are whole.

    Notes
    -----
    Ctrl-C ends the run after the step it falls in: a checkpoint is written, and the history returned with
    ``history.interrupted``. A second one raises `KeyboardInterrupt` at once. Where `fit` does not run in the main
    thread it sees none of this.

    A model to be trained is a `Layer` with

    * ``training_forward(batch, state=None, seed=None) -> (loss, count, tape, state)``: the mean loss over `count`
      elements, what the backward needs, and the state to be carried to the next batch;
    * ``training_backward(tape, grads=None)``, which adds the gradient of that loss into the gradients;
    * and optionally ``evaluation_forward(batch, state=None) -> (loss, count, state)``, which drops nothing. Without
      it validations use ``training_forward``, with one seed.
    """
    learner = _learner(model, loss, truncate, options)
    run = _Run(learner, data, validation, AdamW(model) if optimiser is None else optimiser, schedule, seed)
    run.limits(epochs, steps, validate_every, patience, clip_norm)
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise TypeError(f"callbacks should be a list of functions, not {checks.describe(callbacks)}")
    run.callbacks = tuple(callbacks)
    shown = checks.flag("progress", progress)
    run.store(checkpoint, checkpoint_every, keep, resume)
    with _Interrupts() as interrupts, _Bar(shown, run.total(), run.step) as bar:
        return run.go(interrupts, bar)


class _Learner:
    """A model as the loop sees it."""

    def __init__(self, model: Any, truncate: int | None, options: Mapping[str, Any]) -> None:
        self.model = model
        self._more = {} if truncate is None else {"truncate": truncate}
        self._given = dict(options)

    def forward(self, batch: Batch, state: Any, seed: int) -> tuple[float, int, Any, Any]:
        loss, count, tape, state = self.model.training_forward(batch, state=state, seed=seed, **self._given)
        return float(loss), int(count), tape, state

    def backward(self, tape: Any) -> None:
        self.model.training_backward(tape, **self._more)

    def evaluate(self, batch: Batch, state: Any) -> tuple[float, int, Any]:
        if hasattr(self.model, "evaluation_forward"):
            loss, count, state = self.model.evaluation_forward(batch, state=state)
        else:
            loss, count, _, state = self.model.training_forward(batch, state=state, seed=VALIDATION_SEED)
        return float(loss), int(count), state


class _LayerLearner(_Learner):
    """A layer and a loss."""

    def __init__(self, layer: Any, loss: Callable[..., tuple[float, Array]], truncate: int | None) -> None:
        super().__init__(layer, truncate, {})
        self._loss = loss
        self._takes = set(inspect.signature(layer.forward).parameters)
        self._call_takes = set(inspect.signature(layer).parameters) if callable(layer) else set()
        self._loss_takes_lengths = _takes(loss, "lengths")

    def _options(self, takes: set[str], batch: Batch, state: Any, seed: int | None) -> dict[str, Any]:
        options = {"state": state, "lengths": batch.lengths, "seed": seed}
        return {name: value for name, value in options.items() if name in takes and value is not None}

    def _loss_of(self, y: Array, batch: Batch) -> tuple[float, int, Array]:
        targets, lengths = batch.targets, batch.lengths
        if targets is None:
            raise ValueError("data should give batches with targets where a layer is trained with a loss")
        if lengths is None or targets.ndim < 2:
            value, gradient = self._loss(y, targets)
            return float(value), int(np.prod(targets.shape[:2])), gradient
        if self._loss_takes_lengths:
            value, gradient = self._loss(y, targets, lengths=lengths)
        elif (lengths == targets.shape[1]).all():
            value, gradient = self._loss(y, targets)
        else:
            raise ValueError("loss should take lengths where data gives padded batches")
        return float(value), int(lengths.sum()), gradient

    def forward(self, batch: Batch, state: Any, seed: int) -> tuple[float, int, Any, Any]:
        y, *rest = self.model.forward(batch.inputs, **self._options(self._takes, batch, state, seed))
        value, count, gradient = self._loss_of(y, batch)
        return value, count, (gradient, rest[-1]), rest[0] if len(rest) == 2 else None

    def backward(self, tape: Any) -> None:
        gradient, layer_tape = tape
        self.model.backward(gradient, layer_tape, **self._more)

    def evaluate(self, batch: Batch, state: Any) -> tuple[float, int, Any]:
        result = self.model(batch.inputs, **self._options(self._call_takes, batch, state, None))
        y, state = result if isinstance(result, tuple) else (result, None)
        value, count, _ = self._loss_of(y, batch)
        return value, count, state


def _takes(function: Any, name: str) -> bool:
    """Whether a callable takes an argument; one that does not tell takes none."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _learner(model: Any, loss: Any, truncate: Any, options: Any) -> _Learner:
    """The model and the loss that were given."""
    if not isinstance(model, Layer):
        raise TypeError(f"model should be a layer or a model of fastseq, not {checks.describe(model)}")
    if truncate is not None:
        truncate = checks.size("truncate", truncate, 1)
    whole = hasattr(model, "training_forward")
    backward = getattr(model, "training_backward" if whole else "backward", None)
    if backward is None:
        raise TypeError(f"model should have a backward to be trained, but {model!r} has none")
    if truncate is not None and not _takes(backward, "truncate"):
        raise ValueError(f"truncate should be None where the backward of the model takes none: {model!r}")
    given = {} if options is None else checks.mapping("options", options)
    for name in given:
        if name in ("batch", "state", "seed") or not _takes(getattr(model, "training_forward", None), name):
            raise ValueError(f"options should have names that training_forward of the model takes, not {name!r}")
    if whole:
        if loss is not None:
            raise ValueError(f"loss should be None where the model has its own: {model!r}")
        return _Learner(model, truncate, given)
    if not callable(loss):
        raise TypeError(f"loss should be callable where a layer is trained, not {checks.describe(loss)}")
    return _LayerLearner(model, loss, truncate)


def _renewed(state: Any, fresh: Array) -> Any:
    """A state in which the fresh rows are zero; states, arrays, and tuples, lists and dicts of them."""
    if state is None or not fresh.any():
        return state
    if isinstance(state, State):
        return type(state)(*(_renewed(array, fresh) for array in state))
    if isinstance(state, np.ndarray):
        return np.where(fresh.reshape(-1, *[1] * (state.ndim - 1)), state.dtype.type(0), state)
    if isinstance(state, dict):
        return {name: _renewed(part, fresh) for name, part in state.items()}
    return type(state)(_renewed(part, fresh) for part in state)


def _carried(state: Any, fresh: Array | None) -> Any:
    """The state that a batch starts from, of the one that the batch before ended in."""
    if fresh is None or fresh.all():
        return None
    return _renewed(state, fresh)


class _Run:
    """A run: what it was given, and where it is."""

    callbacks: tuple[Callable[[StepInfo], Any], ...] = ()

    def __init__(self, learner: _Learner, data: Any, validation: Any, optimiser: Any, schedule: Any, seed: Any) -> None:
        self.learner, self.model = learner, learner.model
        known = checks.seed("seed", seed)
        self.seed = int(np.random.SeedSequence().generate_state(1)[0]) if known is None else known
        self.data = datasets.seeded(datasets.checked("data", data), self.seed)
        self.validation = None
        if validation is not None:
            self.validation = datasets.seeded(datasets.checked("validation", validation), VALIDATION_SEED)
        if not isinstance(optimiser, Optimiser):
            raise TypeError(f"optimiser should be an optimiser of fastseq.training, not {checks.describe(optimiser)}")
        if optimiser.layer is not self.model:
            raise ValueError("optimiser should be of the model that is trained, not of another layer")
        self.optimiser = optimiser
        if schedule is not None and not callable(getattr(schedule, "lr_at", schedule)):
            raise TypeError(f"schedule should be a schedule or a function of the step, not {checks.describe(schedule)}")
        self.schedule = schedule
        self.history = History()
        self.step = self.epoch = self.index = 0  # steps taken; epoch and batch of the next
        self.state: Any = None  # where the rows of the last batch ended
        self.best_loss, self.best_step, self.bad = math.inf, 0, 0
        self.best: dict[str, Array] | None = None
        self.owed = False  # Ctrl-C came before a validation that was due
        self.told_to_stop = False
        self.folder: str | None = None
        self.saved = -1

    def limits(self, epochs: Any, steps: Any, validate_every: Any, patience: Any, clip_norm: Any) -> None:
        """How long, and how often."""
        if epochs is None and steps is None:
            raise ValueError("epochs or steps should say how long to train; both are None")
        self.epochs = None if epochs is None else checks.size("epochs", epochs)
        self.steps = None if steps is None else checks.size("steps", steps)
        self.validate_every = None if validate_every is None else checks.size("validate_every", validate_every, 1)
        self.patience = None if patience is None else checks.size("patience", patience, 1)
        if self.validation is None:
            for name, value in (("validate_every", validate_every), ("patience", patience)):
                if value is not None:
                    raise ValueError(f"validation should be given with {name}, not None")
        self.clip_norm = math.inf if clip_norm is None else checks.number("clip_norm", clip_norm, above=0)

    def store(self, folder: Any, every: Any, keep: Any, resume: Any) -> None:
        """Where checkpoints go, and which one to start from."""
        self.checkpoint_every = None if every is None else checks.size("checkpoint_every", every, 1)
        self.keep = None if keep is None else checks.size("keep", keep, 1)
        if isinstance(resume, np.bool_):
            resume = bool(resume)
        if folder is None:
            if every is not None:
                raise ValueError("checkpoint should be a folder with checkpoint_every, not None")
            if resume is True:
                raise ValueError("checkpoint should be a folder with resume=True, not None")
        else:
            self.folder = checks.path("checkpoint", folder)
            os.makedirs(self.folder, exist_ok=True)
        if resume is False:
            if self.folder is not None and checkpoints.in_folder(self.folder):
                raise ValueError(
                    f"checkpoint: {self.folder!r} holds the checkpoints of another run:"
                    " go on with resume=True, or take another folder"
                )
            return
        found: tuple[str, dict[str, Any]] | None
        if resume is True:
            assert self.folder is not None
            found = checkpoints.newest(self.folder)
        else:
            path = checks.path("resume", resume)
            found = path, checkpoints.load_checkpoint(path)
        if found is not None:
            path, content = found
            self.restore(path, content)
            if self.folder is not None and os.path.abspath(path) == os.path.abspath(
                checkpoints.path_of(self.folder, self.step)
            ):
                self.saved = self.step

    def content(self) -> dict[str, Any]:
        """All that a later step depends on, and what happened so far."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.index,
            "seed": self.seed,
            "model": self.model.state_dict(),
            "optimiser": {"kind": type(self.optimiser).__name__, "state": self.optimiser.state_dict()},
            "schedule": self.schedule.state_dict() if hasattr(self.schedule, "state_dict") else None,
            "data": self.data.state_dict() if hasattr(self.data, "state_dict") else None,
            "state": self.state,
            "validation": {
                "loss": self.best_loss,
                "step": self.best_step,
                "bad": self.bad,
                "owed": self.owed,
                "model": self.best,
            },
            "history": self.history.state_dict(),
        }

    def restore(self, path: str, content: dict[str, Any]) -> None:
        """Be where a checkpoint was written."""
        try:
            kind = content["optimiser"]["kind"]
            if kind != type(self.optimiser).__name__:
                raise ValueError(f"its optimiser is {kind}, not {type(self.optimiser).__name__}")
            for name, array in content["model"].items():
                if name in self.model.parameters and array.dtype != self.model.dtype:
                    raise ValueError(f"its {name} is {array.dtype}, that of the model {self.model.dtype}")
            self.model.load_state_dict(content["model"])
            self.optimiser.load_state_dict(content["optimiser"]["state"])
            self.seed, self.state = checks.size("seed", content["seed"]), content["state"]
            for part in ("schedule", "data"):
                if content[part] is not None and hasattr(getattr(self, part), "load_state_dict"):
                    getattr(self, part).load_state_dict(content[part])
            self.history.load_state_dict(content["history"])
            self.step, self.epoch, self.index = content["step"], content["epoch"], content["batch"]
            best = content["validation"]
            self.best_loss, self.best_step, self.bad = best["loss"], best["step"], best["bad"]
            self.owed, self.best = best["owed"], best["model"]
        except KeyError as error:
            raise ValueError(f"path: {path!r} is no checkpoint of fit: {error} is missing") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"path: {path!r} does not fit this run: {error}") from None

    def total(self) -> int:
        """Steps of the whole run."""
        whole = math.inf if self.epochs is None else self.epochs * len(self.data)
        return int(min(whole, math.inf if self.steps is None else self.steps))

    def ended(self, interrupts: _Interrupts) -> str:
        """Why there is no further step; "" if there is one."""
        if interrupts.asked:
            return "interrupted"
        if self.told_to_stop:
            return "callback"
        if self.patience is not None and self.bad >= self.patience:
            return "patience"
        if self.steps is not None and self.step >= self.steps:
            return "steps"
        if self.epochs is not None and self.epoch >= self.epochs:
            return "epochs"
        return ""

    def go(self, interrupts: _Interrupts, bar: _Bar) -> History:
        """All steps."""
        if self.owed:
            self.validate(interrupts)
        batches: Iterator[Any] = iter(())
        fetched = -1  # the epoch that `batches` is of
        while not self.ended(interrupts):
            begin = time.perf_counter()
            if fetched != self.epoch:
                fetched, batches = self.epoch, iter(self.data.batches(self.epoch, self.index))
            batch = next(batches, None)
            if batch is None:
                raise ValueError(
                    f"data should give {len(self.data)} batches in an epoch, not {self.index} as in epoch {self.epoch}"
                )
            info = self.take(Batch(*batch), begin)
            bar.advance(info, self.history)
            at_end = self.index == 0
            if self.validation is not None and _due(self.step, self.validate_every, at_end):
                self.validate(interrupts)
            for callback in self.callbacks:
                answer = callback(info)
                self.told_to_stop |= isinstance(answer, bool | np.bool_) and bool(answer)
            improved = self.best_step == self.step
            if improved or _due(self.step, self.checkpoint_every, at_end):
                self.save()
        self.history.stopped = self.ended(interrupts)
        self.history.interrupted = self.history.stopped == "interrupted"
        self.save()
        if self.best is not None and self.patience is not None and not self.history.interrupted:
            self.model._adopt(self.best)
        return self.history

    def take(self, batch: Batch, begin: float) -> StepInfo:
        """One step; nothing has changed where it fails."""
        rate = self.optimiser.lr
        if self.schedule is not None:
            rate = float(getattr(self.schedule, "lr_at", self.schedule)(self.step))
        seed = _seed_of(self.seed, self.step)
        loss, _, tape, state = self.learner.forward(batch, _carried(self.state, batch.fresh), seed)
        self.model.zero_grad()
        self.learner.backward(tape)
        del tape
        own = self.model.grads
        grads = {name: own[name] for name in self.optimiser.trained}
        norm = clip_grad_norm(grads, self.clip_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            bad = next((name for name, array in grads.items() if not np.isfinite(array).all()), None)
            raise DivergenceError(self.step + 1, loss, norm, bad)
        self.optimiser.lr = rate
        self.optimiser.step()
        info = StepInfo(self.step + 1, self.epoch, loss, norm, rate, batch.tokens, self.model, self.history)
        self.step += 1
        self.index += 1
        if self.index >= len(self.data):
            self.epoch, self.index = self.epoch + 1, 0
        self.state = None if batch.fresh is None else state
        self.history._add(
            step=info.step,
            loss=loss,
            gradient_norm=norm,
            learning_rate=rate,
            tokens=info.tokens,
            seconds=time.perf_counter() - begin,
        )
        return info

    def validate(self, interrupts: _Interrupts) -> None:
        """The mean loss over the validation data; left to the next run where Ctrl-C comes first."""
        self.owed = True
        total, count, state = 0.0, 0, None
        for given in self.validation.batches(0, 0) if self.validation is not None else ():
            if interrupts.asked:
                return
            batch = Batch(*given)
            loss, elements, state = self.learner.evaluate(batch, _carried(state, batch.fresh))
            total, count = total + loss * elements if elements else total, count + elements
        self.owed = False
        if not count:
            return
        mean = total / count
        self.history._add(validation_step=self.step, validation_loss=mean)
        if hasattr(self.schedule, "observe"):
            self.schedule.observe(mean)
        if mean < self.best_loss:
            self.best_loss, self.best_step, self.bad = mean, self.step, 0
            # Parameters are replaced, never changed: these stay as they are.
            self.best = dict(self.model.parameters) if self.patience is not None else None
        else:
            self.bad += 1

    def save(self) -> None:
        """Write a checkpoint, if that is wanted and not done; only then remove older ones."""
        if self.folder is None or self.saved == self.step:
            return
        checkpoints.save_checkpoint(checkpoints.path_of(self.folder, self.step), self.content())
        self.saved = self.step
        checkpoints.remove_oldest(self.folder, self.step, self.keep, (self.best_step,))


def _seed_of(run: int, step: int) -> int:
    """The seed of a step; three numbers, where data makes its own of two."""
    return int(np.random.SeedSequence([run, step, 1]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _due(step: int, every: int | None, at_end: bool) -> bool:
    """Whether it is time for what is done every so many steps, or after every epoch."""
    return at_end if every is None else step % every == 0


class _Interrupts:
    """Notes Ctrl-C instead of raising KeyboardInterrupt; the second time it is raised.

    Only in the main thread, and only where nobody has set SIGINT to be ignored.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if before not in (None, signal.SIG_IGN):
                self._before = before
                signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


class _Bar:
    """A bar of tqdm, where it is wanted and installed."""

    def __init__(self, shown: bool, total: int, done: int) -> None:
        self._bar: Any = None
        self._rate = 0.0
        if not shown:
            return
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return
        # Without a thread of its own, which a process that forks would rather not have.
        quiet = type("Bar", (tqdm,), {"monitor_interval": 0})
        self._bar = quiet(total=total, initial=done, unit="step", file=sys.stderr, dynamic_ncols=True)

    def advance(self, info: StepInfo, history: History) -> None:
        """Show a step."""
        if self._bar is None:
            return
        rate = info.tokens / max(history._columns["seconds"][-1], 1e-9)
        self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
        shown = {
            "loss": f"{info.loss:.4g}",
            "tokens/s": f"{self._rate:,.0f}",
            "norm": f"{info.gradient_norm:.3g}",
            "lr": f"{info.learning_rate:.3g}",
        }
        if history._columns["validation_loss"]:
            shown["validation"] = f"{history._columns['validation_loss'][-1]:.4g}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(1)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
