"""The trainer: what a run is, step by step, and how it goes on where it was left.

Everything random in a step comes from the seed of the run and the count of the step, and what a later step depends on
is in a checkpoint; so a resumed run has the bits of one that was never interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from fastseq import checks, elsewhere
from fastseq.checks import Array
from fastseq.layers import inside
from fastseq.layers.base import Layer
from fastseq.training import arguments, checkpoints
from fastseq.training import data as datasets
from fastseq.training import progress as shows
from fastseq.training.clipping import clip_grad_norm
from fastseq.training.data import Batch
from fastseq.training.history import History
from fastseq.training.interrupts import Interrupts
from fastseq.training.learners import VALIDATION_SEED, Evaluation, Learner, Mean, carried, learner_of
from fastseq.training.optimisers import Optimiser

P = ParamSpec("P")
R = TypeVar("R")


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

    def __init__(self, step: int, loss: float, norm: float, parameter: str | None, cause: str | None = None) -> None:
        self.step, self.loss, self.parameter = step, loss, parameter
        if parameter is not None:
            what = f"the gradient of {parameter} is not finite"
        elif math.isfinite(norm):
            what = "all gradients are finite"
        else:
            what = "all gradients are finite, but the sum of their squares is not"
        why = "" if cause is None else f"; {cause}"
        super().__init__(
            f"training diverged in step {step}: the loss is {loss}, {what}; the parameters are unchanged{why}"
        )

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


def _of_one_data(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate `fit` so that x and y given apart are told to be one argument."""

    @functools.wraps(function)
    def of_one_data(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > 2:
            raise TypeError(
                f"data should be one argument, a tuple (x, y): fit(model, (x, y)); and all others go by name, not by"
                f" place as {checks.describe(args[2])} does"
            )
        return function(*args, **kwargs)

    return of_one_data


@checks.short_traceback
@_of_one_data
def fit(
    model: Layer,
    data: Any,
    *,
    loss: Callable[..., tuple[float, Array]] | str | Mapping[str, Any] | None = None,
    optimiser: Optimiser | str | None = None,
    lr: float | None = None,
    schedule: Any = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    validation: Any = None,
    validation_split: float | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    clip_norm: float | None = None,
    truncate: int | None = None,
    options: Mapping[str, Any] | None = None,
    metrics: Any = (),
    callbacks: Sequence[Callable[[StepInfo], Any]] = (),
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    keep: int | None = 3,
    resume: bool | str | os.PathLike[str] = False,
    seed: int | None = 0,
    optimizer: Optimiser | str | None = None,
    **unknown: Any,
) -> History:
    """Train a model.

    Parameters
    ----------
    model : Layer
        A model with ``training_forward`` and ``training_backward``, or any layer together with `loss`.
    data : tuple of arrays, PaddedBatches, PairedBatches, Streams, Windows or list of Batch
        A tuple is ``(x, y)`` or ``(x, y, lengths)``: sequences and the target of each, or of each of its steps. They
        are arrays whose first axis is that of the sequences, or lists of rows, which may be of unequal lengths; they
        become `PaddedBatches`. Data may also be anything with ``batches(epoch, start)`` and a length.
    loss : callable, str, or mapping from str, optional
        For a layer: ``loss(outputs, targets) -> (mean, gradient)``, see `fastseq.losses`, or "cross_entropy",
        "mean_squared_error", "binary_cross_entropy" or "huber". It gets ``lengths`` where the batch has them and the
        outputs an axis of time. A third result says over how many elements the mean is taken, by which batches are
        weighted in the means over an epoch and the validation data; losses of this package say it by themselves.
        For a graph with several outputs a mapping from their names to losses, whose sum is the loss; data is a list of
        `Batch`, whose targets are a mapping, too.
    optimiser : Optimiser or str, optional
        Or "sgd", "rmsprop", "adam" or "adamw". ``AdamW(model)`` by default.
    lr : float, optional
        The learning rate, where `optimiser` is a name or left out.
    schedule : schedule or callable, optional
        ``schedule.lr_at(step)``, or ``schedule(step)``, is the learning rate of a step counted from 0. By default
        that of the optimiser.
    epochs, steps : int, optional
        How long: until one of them is reached; 10 epochs where neither is given. Counted from the beginning of the
        run, also where it is resumed.
    batch_size : int, optional
        Sequences in a batch, where data is a tuple; 32 by default.
    validation : like `data`, optional
        What the model is validated on.
    validation_split : float, optional
        The share of the sequences that is held out and validated on, drawn by the seed; where data is a tuple.
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
    metrics : list of names and functions, or mapping from names to functions
        What is measured on the validation data beside the loss, and kept in ``history.metrics``: a function of
        `fastseq.training.metrics`, or its name, or your own ``metric(outputs, targets, lengths=None) -> mean``.
    callbacks : sequence of callables
        Each is called with a `StepInfo` after every step; returning True ends the run.
    progress : bool
        Whether to show the run: a bar where tqdm is installed and standard error is a terminal, else a line an epoch.
    checkpoint : path, optional
        A folder for checkpoints; made, if need be. One is written at the end of the run in any case.
    checkpoint_every : int, optional
        Steps from one checkpoint to the next; by default there is one after every epoch. There is also one after
        every validation with a new best loss.
    keep : int or None
        How many checkpoints are kept, beside that of the best validation; None: all.
    resume : bool or path
        True: from the newest checkpoint in the folder that can be read, or from the beginning if there is none.
        A path: from that checkpoint. From the checkpoint come parameters, all that the optimiser and the schedule have
        learnt, and the seeds of run and data. A learning rate, a kind of optimiser or schedule, or data other than the
        run began with are refused; any other argument that differs holds from there on.
    seed : int, optional
        Fixes what is random in the model, dropout for example, and in the order of the data. None: drawn.
    optimizer : Optimiser or str, optional
        The same as `optimiser`.

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
        Naming the argument, what it was and what it should be; or naming the checkpoint that cannot be read. Nothing
        has changed then. Of data or a loss that fails in the course of the run: see the notes.
    OSError
        A checkpoint could not be written. The model, the optimiser and the checkpoints before are whole.

    Notes
    -----
    Ctrl-C ends the run after the step it falls in: a checkpoint is written, and the history returned with
    ``history.interrupted``. A second one raises `KeyboardInterrupt` at once, or right after the parameters where they
    are just being changed. Where `fit` does not run in the main thread it sees none of this.

    Whatever ends a run with an exception, parameters, optimiser and schedule are those after the last whole step: of an
    exception in a callback, in a validation or while a checkpoint is written that step is the one before it; of one in
    data, model, loss, schedule or optimiser it is the step before the one that failed. The gradients are those last
    computed. Parameters of the best validation are not put back then.

    A model to be trained is a `Layer` with

    * ``training_forward(batch, state=None, seed=None) -> (loss, count, tape, state)``: the mean loss over `count`
      elements, what the backward needs, and the state to be carried to the next batch;
    * ``training_backward(tape, grads=None)``, which adds the gradient of that loss into the gradients;
    * optionally ``evaluation_forward(batch, state=None) -> (loss, count, state)``, which drops nothing. Without
      it validations use ``training_forward``, with one seed;
    * and optionally ``loss_unit``, the unit of its loss, "nats a symbol" for example.
    """
    elsewhere.refuse("fit", unknown, _names(model))
    learner = learner_of(model, loss, truncate, options, arguments.metrics_of(metrics))
    run = _Run(learner, arguments.optimiser_of(model, optimiser, optimizer, lr, schedule is not None), schedule)
    run.limits(epochs, steps, clip_norm)
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise TypeError(f"callbacks should be a list of functions, not {checks.describe(callbacks)}")
    run.callbacks = tuple(callbacks)
    wanted = checks.flag("progress", progress)
    given = checks.seed("seed", seed)
    found = run.store(checkpoint, checkpoint_every, keep, resume)
    drawn = int(np.random.SeedSequence().generate_state(1)[0]) if given is None else given
    run.seed = drawn if found is None else found.seed()
    run.take_data(data, batch_size, validation, validation_split)
    run.validations(validate_every, patience, metrics)
    run.restore(found)
    shown = shows.shown(wanted, done=run.step, total=run.total(), epochs=run.epochs, steps=run.steps)
    with Interrupts() as interrupts:
        try:
            return run.go(interrupts, shown)
        finally:
            shown.close()


_FIT = inspect.signature(fit).parameters


def _names(model: Any) -> list[str]:
    """The arguments of `fit`, and those that the `fit` of the model has beside them."""
    own = inspect.signature(model.fit).parameters.values() if callable(getattr(model, "fit", None)) else ()
    named = [one.name for one in own if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    ours = [name for name in _FIT if name not in ("model", "data", "optimizer", "unknown")]
    return ours + [name for name in named if name not in ours and name != "data"]


class _Run:
    """A run: what it was given, and where it is."""

    callbacks: tuple[Callable[[StepInfo], Any], ...] = ()
    seed: int
    data: Any
    validation: Any = None

    def __init__(self, learner: Learner, optimiser: Optimiser, schedule: Any) -> None:
        self.learner, self.model = learner, learner.model
        self.optimiser = optimiser
        if schedule is not None and not callable(getattr(schedule, "lr_at", schedule)):
            raise TypeError(f"schedule should be a schedule or a function of the step, not {checks.describe(schedule)}")
        self.schedule = schedule
        self.history = History()
        self.history.loss_label, self.history.loss_unit = learner.label, learner.unit
        self.step = self.epoch = self.index = 0  # steps taken; epoch and batch of the next
        self.state: Any = None  # where the rows of the last batch ended
        self.best_loss, self.best_step, self.bad = math.inf, 0, 0
        self.best: dict[str, Array] | None = None
        self.owed = False  # Ctrl-C came before a validation that was due
        self.told_to_stop = False
        self.folder: str | None = None
        self.saved = -1
        # What a run that goes on has to have in common with this one.
        self.began: dict[str, Any] = {"lr": optimiser.lr, "schedule": _schedule_as_given(schedule)}

    def limits(self, epochs: Any, steps: Any, clip_norm: Any) -> None:
        """How long, and how far."""
        if epochs is None and steps is None:
            epochs = arguments.EPOCHS
        self.epochs = None if epochs is None else checks.size("epochs", epochs)
        self.steps = None if steps is None else checks.size("steps", steps)
        self.clip_norm = math.inf if clip_norm is None else checks.number("clip_norm", clip_norm, above=0)

    def take_data(self, data: Any, batch_size: Any, validation: Any, share: Any) -> None:
        """What to learn from, and what to be validated on."""
        size = None if batch_size is None else checks.size("batch_size", batch_size, 1)
        rows, given = self._rows_or_batches("data", data)
        for name, value in (("batch_size", size), ("validation_split", share)):
            if rows is None and value is not None:
                raise ValueError(
                    f"{name} should be None where data is not a tuple of arrays, but {checks.describe(data)}"
                )
        held = None
        if share is not None:
            if validation is not None:
                raise ValueError("validation should be None with validation_split, which makes it of the data")
            rows, held = rows.split(arguments.split_share(share), self.seed)  # type: ignore[union-attr]
        size = arguments.BATCH_SIZE if size is None else size
        if rows is not None:
            given = rows.batches(size)
        self.learner.check_data("data", given)
        self.data = datasets.seeded(given, self.seed)
        if validation is not None:
            held, validation = self._rows_or_batches("validation", validation)
        if held is not None:
            validation = held.batches(size, shuffle=share is None)
        if validation is not None:
            self.learner.check_data("validation", validation)
            self.validation = datasets.seeded(validation, VALIDATION_SEED)
        self.began |= {
            "batches": len(self.data),
            "batch_size": size if rows is not None else None,
            "validation_split": share,
            "validation_batches": None if self.validation is None else len(self.validation),
        }

    def _rows_or_batches(self, name: str, value: Any) -> tuple[arguments.Rows | None, Any]:
        """Sequences and targets where those were given, else what gives batches; the other is None."""
        rows = arguments.rows_of(name, value)
        if rows is None:
            return None, datasets.checked(name, value)
        self.learner.check_rows(name, rows)
        return rows, None

    def validations(self, every: Any, patience: Any, metrics: Any) -> None:
        """How often there is a validation, and what follows from it."""
        self.validate_every = None if every is None else checks.size("validate_every", every, 1)
        self.patience = None if patience is None else checks.size("patience", patience, 1)
        if self.validation is None:
            for name, value in (("validate_every", every), ("patience", patience), ("metrics", metrics or None)):
                if value is not None:
                    raise ValueError(
                        f"validation should be given with {name}, or validation_split, a share of data; not None"
                    )
            if hasattr(self.schedule, "observe"):
                raise ValueError(
                    f"validation should be given with a {type(self.schedule).__name__}, whose rate follows it, not None"
                )
        self.learner.check_metrics(self.validation)

    def store(self, folder: Any, every: Any, keep: Any, resume: Any) -> _Found | None:
        """Where checkpoints go, and the one to start from; nothing is written."""
        self.checkpoint_every = None if every is None else checks.size("checkpoint_every", every, 1)
        self.keep = None if keep is None else checks.size("keep", keep, 1)
        if isinstance(resume, np.bool_):
            resume = bool(resume)
        there = False
        if folder is None:
            if every is not None:
                raise ValueError("checkpoint should be a folder with checkpoint_every, not None")
            if resume is True:
                raise ValueError("checkpoint should be a folder with resume=True, not None")
        else:
            self.folder = checks.path("checkpoint", folder)
            there = os.path.isdir(self.folder)
        beside = resume is False or (resume is not True and not _within(resume, self.folder))
        if beside and self.folder is not None and there and checkpoints.in_folder(self.folder):
            raise ValueError(
                f"checkpoint: {self.folder!r} holds the checkpoints of another run:"
                " go on with resume=True, or take another folder"
            )
        if resume is False:
            return None
        if resume is True:
            found = checkpoints.newest(str(self.folder)) if there else None
        else:
            path = checks.path("resume", resume)
            found = path, checkpoints.load_checkpoint(path)
        return None if found is None else _Found(*found)

    def content(self) -> dict[str, Any]:
        """All that a later step depends on, and what happened so far."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.index,
            "seed": self.seed,
            "began": self.began,
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

    def restore(self, found: _Found | None) -> None:
        """Be where a checkpoint was written, if there is one; where that fails, all is as it was."""
        undo: list[Callable[[], None]] = []
        try:
            if found is not None:
                with found.faults():
                    self._restore(found, undo)
                at = None if self.folder is None else checkpoints.path_of(self.folder, self.step)
                if at is not None and os.path.abspath(found.path) == os.path.abspath(at):
                    self.saved = self.step
            if self.folder is not None:
                os.makedirs(self.folder, exist_ok=True)
            if found is not None:
                with found.faults():
                    self.model.load_state_dict(found.content["model"])
        except BaseException:
            for back in reversed(undo):
                back()
            raise

    def _restore(self, found: _Found, undo: list[Callable[[], None]]) -> None:
        """All but the parameters of the model, which come last."""
        content = found.content
        kind, parts = content["optimiser"]["kind"], {"optimiser": self.optimiser}
        if kind != type(self.optimiser).__name__:
            raise ValueError(f"its optimiser is {kind}, not {type(self.optimiser).__name__}")
        for name, array in content["model"].items():
            if name in self.model.parameters and array.dtype != self.model.dtype:
                raise ValueError(f"its {name} is {array.dtype}, that of the model {self.model.dtype}")
        self._compare(content)
        states = {"optimiser": content["optimiser"]["state"]}
        for part in ("schedule", "data"):
            if content[part] is not None and hasattr(getattr(self, part), "load_state_dict"):
                parts[part], states[part] = getattr(self, part), content[part]
        for part, one in parts.items():
            before = one.state_dict()
            one.load_state_dict(states[part])
            undo.append(functools.partial(one.load_state_dict, before))
        self.state = content["state"]
        self.history.load_state_dict(content["history"])
        self.step, self.epoch, self.index = content["step"], content["epoch"], content["batch"]
        best = content["validation"]
        self.best_loss, self.best_step, self.bad = best["loss"], best["step"], best["bad"]
        self.owed, self.best = best["owed"], best["model"]
        if self.patience is not None and self.best is None and self.best_step:
            self.best = self._best_of(found)

    def _compare(self, content: Mapping[str, Any]) -> None:
        """Refuse what was given differently and would have no effect, or another than is meant."""
        began = content["began"]
        own, state = dict(self.began), content["optimiser"]["state"]
        if self.schedule is None and own["lr"] not in (began["lr"], state["lr"]):
            raise ValueError(f"its run began with lr={began['lr']:g}, not {own['lr']:g}; a schedule can change it")
        if began["schedule"] is not None:
            before, now = began["schedule"], own["schedule"] or {"kind": None}
            if before["kind"] != now["kind"]:
                raise ValueError(f"its schedule is {before['kind']}, not {now['kind']}")
            if now["state"] not in (before["state"], content["schedule"]):
                raise ValueError(f"its schedule began with {before['state']}, not {now['state']}")
        for name, what in _COMPARED.items():
            if began[name] != own[name] and (name != "validation_batches" or None not in (began[name], own[name])):
                raise ValueError(f"its run began with {what}{began[name]!r}, not {own[name]!r}")
        self.began = began

    def _best_of(self, found: _Found) -> dict[str, Array]:
        """The parameters of the best validation of a run that had no use for them yet."""
        if self.best_step == self.step:
            model = found.content["model"]
        else:
            try:
                beside = os.path.dirname(os.path.abspath(found.path))
                model = checkpoints.load_checkpoint(checkpoints.path_of(beside, self.best_step))["model"]
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"the parameters of its best validation, for patience, cannot be had: {error}"
                ) from None
        return {name: model[name] for name in self.model.parameters}

    def total(self) -> int:
        """Steps of the whole run."""
        whole = math.inf if self.epochs is None else self.epochs * len(self.data)
        return int(min(whole, math.inf if self.steps is None else self.steps))

    def ended(self, interrupts: Interrupts) -> str:
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

    def go(self, interrupts: Interrupts, shown: shows.Silent) -> History:
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
            info, count = self.take(Batch(*batch), begin, interrupts)
            shown.step(info, count)
            at_end = self.index == 0
            if self.validation is not None and _due(self.step, self.validate_every, at_end):
                self.validate(interrupts)
            for callback in self.callbacks:
                answer = callback(info)
                self.told_to_stop |= isinstance(answer, bool | np.bool_) and bool(answer)
            if at_end:
                shown.epoch(self.history)
            improved = self.best_step == self.step
            if improved or _due(self.step, self.checkpoint_every, at_end):
                self.save()
        self.history.stopped = self.ended(interrupts)
        self.history.interrupted = self.history.stopped == "interrupted"
        self.save()
        best = None if self.patience is None or self.history.interrupted else self.best
        if best is not None:
            with interrupts.held():
                inside.adopt_parameters(self.model, best)
        shown.end(self.history, self.note(best is not None))
        return self.history

    def note(self, back: bool) -> str:
        """What a person should know of the end of the run."""
        parts = []
        if self.history.interrupted:
            parts.append(f"stopped by Ctrl-C after step {self.step:,}")
            if self.folder is not None:
                parts.append(f"the checkpoint is in {self.folder}, resume=True goes on from it")
        elif self.history.stopped == "patience":
            parts.append(f"stopped after step {self.step:,}: no better validation in {self.bad}")
        if back and self.best_step != self.step:
            parts.append(f"the parameters are those of step {self.best_step:,}, the best validation")
        return "; ".join(parts)

    def take(self, batch: Batch, begin: float, interrupts: Interrupts) -> tuple[StepInfo, int]:
        """One step, and over how many elements its loss is the mean; nothing has changed where it fails."""
        rate = self.optimiser.lr
        if self.schedule is not None:
            rate = float(getattr(self.schedule, "lr_at", self.schedule)(self.step))
        seed = _seed_of(self.seed, self.step)
        loss, count, tape, state = self.learner.forward(batch, carried(self.state, batch.fresh), seed)
        self.model.zero_grad()
        self.learner.backward(tape)
        del tape
        own = self.model.grads
        grads = {name: own[name] for name in self.optimiser.trained}
        norm = clip_grad_norm(grads, self.clip_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            bad = next((name for name, array in grads.items() if not np.isfinite(array).all()), None)
            raise DivergenceError(self.step + 1, loss, norm, bad, datasets.not_finite(self.data, batch))
        info = StepInfo(self.step + 1, self.epoch, loss, norm, rate, batch.tokens, self.model, self.history)
        with interrupts.held():
            self.change(rate)
            self.step += 1
            self.index += 1
            if self.index >= len(self.data):
                self.epoch, self.index = self.epoch + 1, 0
            self.state = None if batch.fresh is None else state
            self.history._add(
                step=info.step,
                epoch=info.epoch,
                loss=loss,
                count=count,
                gradient_norm=norm,
                learning_rate=rate,
                tokens=info.tokens,
                seconds=time.perf_counter() - begin,
            )
        return info, count

    def change(self, rate: float) -> None:
        """Change the parameters; where that fails the rate is the old one, too."""
        before = self.optimiser.lr
        self.optimiser.lr = rate
        try:
            self.optimiser.step()
        except BaseException:
            self.optimiser.lr = before
            raise

    def validate(self, interrupts: Interrupts) -> None:
        """The mean loss over the validation data; left to the next run where Ctrl-C comes first."""
        self.owed = True
        loss, metrics, state = Mean(), {name: Mean() for name in self.learner.metrics}, None
        for given in self.validation.batches(0, 0) if self.validation is not None else ():
            if interrupts.asked:
                return
            batch = Batch(*given)
            result: Evaluation = self.learner.evaluate(batch, carried(state, batch.fresh))
            state = None if batch.fresh is None else result.state
            loss.add(result.loss, result.elements)
            for name, (value, count) in result.metrics.items():
                metrics[name].add(value, count)
        self.owed = False
        if self.validation is None:
            return
        if not loss.count:
            raise ValueError("validation should have something that counts, but all of it is padding or ignored")
        with interrupts.held():
            self.history._add_validation(self.step, loss.value, {name: mean.value for name, mean in metrics.items()})
            if hasattr(self.schedule, "observe"):
                self.schedule.observe(loss.value)
            if loss.value < self.best_loss:
                self.best_loss, self.best_step, self.bad = loss.value, self.step, 0
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


# What of a run has to be as it was at its beginning, and what that is called.
_COMPARED = {
    "batch_size": "batch_size=",
    "validation_split": "validation_split=",
    "batches": "a number of batches in an epoch of ",
    "validation_batches": "a number of batches of validation of ",
}


class _Found(NamedTuple):
    """A checkpoint to start from."""

    path: str
    content: dict[str, Any]

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """Name the checkpoint in what does not fit."""
        try:
            yield
        except KeyError as error:
            raise ValueError(f"path: {self.path!r} is no checkpoint of fit: {error} is missing") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"path: {self.path!r} does not fit this run: {error}") from None

    def seed(self) -> int:
        """The seed of its run."""
        with self.faults():
            return checks.size("seed", self.content["seed"])


def _schedule_as_given(schedule: Any) -> dict[str, Any] | None:
    """A schedule as a checkpoint remembers it: its kind, and what it depends on beside the step."""
    if schedule is None:
        return None
    state = schedule.state_dict() if hasattr(schedule, "state_dict") else None
    return {"kind": type(schedule).__name__, "state": state}


def _within(resume: Any, folder: str | None) -> bool:
    """Whether a checkpoint lies in a folder, or is the folder."""
    if folder is None:
        return False
    path = os.path.abspath(checks.path("resume", resume))
    return os.path.abspath(folder) in (path, os.path.dirname(path))


def _seed_of(run: int, step: int) -> int:
    """The seed of a step; three numbers, where data makes its own of two."""
    return int(np.random.SeedSequence([run, step, 1]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _due(step: int, every: int | None, at_end: bool) -> bool:
    """Whether it is time for what is done every so many steps, or after every epoch."""
    return at_end if every is None else step % every == 0
