"""Models as the loop of the trainer sees them: forward, backward and evaluation of a batch, and the carried state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.layers import Graph, Sigmoid, Softmax, inside
from fastseq.layers.base import POOLING, Layer
from fastseq.losses import counting
from fastseq.state import ArrayState
from fastseq.training import arguments
from fastseq.training.data import Batch, Listed, PaddedBatches, PairedBatches, Streams

VALIDATION_SEED = 0  # where a model has no forward without dropout: the same masks in every validation


class Evaluation(NamedTuple):
    """What a batch of the validation data gives: means, and over how many elements each is taken."""

    loss: float
    elements: int
    state: Any
    metrics: dict[str, tuple[float, int]]


class Learner:
    """A model with a loss of its own.

    Parameters
    ----------
    model : Layer
        With ``training_forward`` and ``training_backward``.
    truncate : int or None
        Handed to the backward.
    options : mapping
        Handed to ``training_forward``.
    metrics : mapping from str to callable
        What is measured on the validation data beside the loss.
    """

    label, unit = "loss", ""

    def __init__(
        self,
        model: Any,
        truncate: int | None,
        options: Mapping[str, Any],
        metrics: Mapping[str, Callable[..., Any]],
    ) -> None:
        self.model = model
        self.unit = str(getattr(model, "loss_unit", self.unit))
        self._more = {} if truncate is None else {"truncate": truncate}
        self._given = dict(options)
        self.metrics = dict(metrics)

    def check_data(self, name: str, data: Any) -> None:
        """Refuse data that the model cannot learn from, as far as that can be seen without a batch of it."""

    def check_rows(self, name: str, rows: arguments.Rows) -> None:
        """Refuse sequences and targets that the model would take for something else."""

    def check_metrics(self, data: Any) -> None:
        """Refuse metrics where the validation data has no targets to hold the outputs against."""
        if not self.metrics:
            return
        untold = isinstance(data, PaddedBatches) and data._targets is None
        if untold or isinstance(data, PairedBatches):
            raise ValueError(
                f"metrics should be left out where validation has no target for each output of the model, as"
                f" {type(data).__name__}{' without targets' if untold else ''}"
            )

    def forward(self, batch: Batch, state: Any, seed: int) -> tuple[float, int, Any, Any]:
        """Loss, count, tape and state of a batch."""
        loss, count, tape, state = self.model.training_forward(batch, state=state, seed=seed, **self._given)
        return float(loss), int(count), tape, state

    def backward(self, tape: Any) -> None:
        """Add the gradients of the loss of a forward."""
        self.model.training_backward(tape, **self._more)

    def evaluate(self, batch: Batch, state: Any) -> Evaluation:
        """A batch without dropout, where the model can do without."""
        metrics = self._measured(self._outputs(batch, state), batch) if self.metrics else {}
        if hasattr(self.model, "evaluation_forward"):
            loss, count, state = self.model.evaluation_forward(batch, state=state)
        else:
            loss, count, _, state = self.model.training_forward(batch, state=state, seed=VALIDATION_SEED)
        return Evaluation(float(loss), int(count), state, metrics)

    def _outputs(self, batch: Batch, state: Any) -> Array:
        """What the model predicts for a batch."""
        options = {"state": state, "lengths": batch.lengths}
        taken = {name: one for name, one in options.items() if one is not None and takes(self.model, name)}
        y = self.model(batch.inputs, **taken)
        outputs: Array = y[0] if isinstance(y, tuple) else y
        return outputs

    def _lengths(self, batch: Batch) -> Array | None:
        """Lengths of the outputs; None where there are none, or no axis of time."""
        if self.model.time == POOLING or batch.lengths is None:
            return None
        lengths: Array = self.model.output_lengths(batch.lengths)
        return lengths

    def _measured(self, outputs: Array, batch: Batch) -> dict[str, tuple[float, int]]:
        """The metrics of a batch."""
        if batch.targets is None or batch.target_lengths is not None:
            raise ValueError("metrics should be left out where batches have no target for each output of the model")
        lengths, result = self._lengths(batch), {}
        for name, function in self.metrics.items():
            with counting() as counts:
                value = (
                    function(outputs, batch.targets) if lengths is None else function(outputs, batch.targets, lengths)
                )
            if not isinstance(value, int | float | np.number):
                raise TypeError(f"metrics: {name} should return a number, not {checks.describe(value)}")
            result[name] = float(value), self._count(counts, batch)
        return result

    def _count(self, counts: list[int], batch: Batch) -> int:
        """Over how many elements a mean was taken."""
        assert batch.targets is not None
        return _counted(counts, batch.targets, self._lengths(batch), self.model.time != POOLING)


class LayerLearner(Learner):
    """A layer and a loss."""

    def __init__(
        self, layer: Any, loss: arguments.Loss, truncate: int | None, metrics: Mapping[str, Callable[..., Any]]
    ) -> None:
        super().__init__(layer, truncate, {}, metrics)
        self._loss, self.label = loss, loss.label
        self.unit = self.unit or loss.unit
        self._check_logits(inside.last_layers(layer)[0], loss)

    def _check_logits(self, last: Any, loss: arguments.Loss) -> None:
        """Warn of a last layer whose outputs are no logits, which the loss takes them for."""
        for kind, label in ((Softmax, "cross-entropy"), (Sigmoid, "binary cross-entropy")):
            if isinstance(last, kind) and loss.label == label:
                checks.warn(
                    f"model should end in logits with the loss {label}, which takes the {kind.__name__.lower()} itself,"
                    f" not in {inside.constructor_call(last)}: leave that layer out"
                )

    def check_data(self, name: str, data: Any) -> None:
        """Refuse streams where the layer would lose what came before a chunk."""
        listed = isinstance(data, Listed) and any(batch.fresh is not None for batch in data._made)
        if isinstance(data, Streams) or listed:
            self._check_carries(name)
        if isinstance(data, PaddedBatches) and data._targets is None:
            raise ValueError(f"{name} should have targets where a layer is trained with a loss")

    def check_rows(self, name: str, rows: arguments.Rows) -> None:
        """Refuse what a call of the layer would not take as it is meant."""
        given = (checks.as_array(f"{name}: x", row) for row in rows.sequences)
        x = next((row for row in given if row.size), np.zeros((0, 0)))
        if x.dtype.kind in "iu" and x.ndim == 2:
            raise TypeError(
                f"{name}: x should hold real floating numbers where a step has {x.shape[1]} values, not {x.dtype};"
                ' x.astype("float32") makes them of integers'
            )
        if x.dtype.kind == "f" and x.ndim == 1:
            raise ValueError(
                f"{name}: x should have values (T, I) in each sequence, not the shape {x.shape}: for one value a step"
                " give x[..., None], or of a list [row[:, None] for row in x]"
            )
        y = checks.as_array(f"{name}: y", rows.targets[0]) if rows.targets else x
        if y.dtype.kind == "b":
            raise TypeError(
                f"{name}: y should hold integers or real floating numbers, not {y.dtype}; y.astype(int) makes them of"
                " booleans"
            )

    def check_metrics(self, data: Any) -> None:
        """All is checked with the loss."""

    def _check_carries(self, name: str) -> None:
        lost = self.model.unstreamable()
        if lost is not None:
            raise ValueError(f"{name} should not be streams, chunks that go on where the last one ended: {lost}")

    def _options(self, batch: Batch, state: Any) -> dict[str, Any]:
        if batch.fresh is not None:
            self._check_carries("data")
        return {"lengths": batch.lengths} if state is None else {"state": state, "lengths": batch.lengths}

    def _loss_of(self, y: Any, batch: Batch) -> tuple[float, int, Any]:
        if batch.targets is None:
            raise ValueError("data should give batches with targets where a layer is trained with a loss")
        if isinstance(y, dict):
            raise ValueError(
                f"loss should be a mapping from {', '.join(map(repr, y))} to losses where a graph has several outputs"
            )
        return self._loss_between(self._loss, y, batch.targets, self.model.time != POOLING, self._lengths(batch))

    def _loss_between(
        self, loss: arguments.Loss, y: Array, targets: Array, timed: bool, lengths: Array | None
    ) -> tuple[float, int, Array]:
        """The loss of one output, over how many elements it is a mean, and its gradient."""
        if timed and targets.ndim == 1 and y.ndim > 2:
            raise ValueError(
                f"targets should have an axis of time as the outputs {y.shape} have, not the shape {targets.shape}; for"
                " one target a row put fastseq.LastStep(), MeanOverTime() or MaxOverTime() where time should end"
            )
        options = {}
        if lengths is not None and takes(loss.function, "lengths"):
            options["lengths"] = lengths
        elif lengths is not None and (lengths < y.shape[1]).any():
            raise ValueError("loss should take lengths where data gives padded batches")
        with counting() as counts:
            result = loss.function(y, targets, **options)
        if not isinstance(result, tuple) or len(result) not in (2, 3):
            raise TypeError(
                f"loss should return (mean, gradient) or (mean, gradient, count), not {checks.describe(result)}"
            )
        value, gradient, *told = result
        count = checks.size("the count of loss", *told) if told else _counted(counts, targets, lengths, timed)
        return float(value), count, gradient

    def forward(self, batch: Batch, state: Any, seed: int) -> tuple[float, int, Any, Any]:  # noqa: D102
        y, state, tape = self.model.forward_carrying(batch.inputs, seed=seed, **self._options(batch, state))
        value, count, gradient = self._loss_of(y, batch)
        return value, count, (gradient, tape), state

    def backward(self, tape: Any) -> None:  # noqa: D102
        gradient, layer_tape = tape
        self.model.backward(gradient, layer_tape, **self._more)

    def evaluate(self, batch: Batch, state: Any) -> Evaluation:  # noqa: D102
        y, state = self.model.run(batch.inputs, **self._options(batch, state))
        value, count, _ = self._loss_of(y, batch)
        return Evaluation(value, count, state, self._measured(y, batch))


class HeadsLearner(LayerLearner):
    """A graph with several outputs and a loss for some of them: their sum."""

    def __init__(
        self,
        graph: Graph,
        losses: Mapping[str, arguments.Loss],
        truncate: int | None,
        metrics: Mapping[str, Callable[..., Any]],
    ) -> None:
        Learner.__init__(self, graph, truncate, {}, metrics)
        unknown = checks.are((repr(name) for name in losses if name not in graph.outputs), "unknown")
        if unknown or not losses:
            outputs = ", ".join(map(repr, graph.outputs))
            raise ValueError(
                f"loss should have losses of the outputs {outputs}: {unknown[0] if unknown else 'it is empty'}"
            )
        if metrics:
            raise ValueError("metrics should be left out where loss is a mapping, with a loss for each output")
        self._losses = dict(losses)
        self._timed = inside.timed_outputs(graph)
        for name, last in zip(graph.outputs, inside.last_layers(graph), strict=True):
            if name in losses:
                self._check_logits(last, losses[name])

    def _loss_of(self, y: Any, batch: Batch) -> tuple[float, int, Any]:
        """The sum of all losses; it counts as often as the first of them does."""
        y = y if isinstance(y, dict) else dict.fromkeys(self._losses, y)
        targets = batch.targets
        if not isinstance(targets, Mapping) or set(targets) != set(self._losses):
            raise ValueError(
                f"data should give batches whose targets are a mapping from {', '.join(map(repr, self._losses))} to"
                f" arrays, not {checks.describe(targets)}"
            )
        lengths = inside.output_lengths(self.model, batch.lengths)
        total, counts, gradients = 0.0, [], {}
        for name, loss in self._losses.items():
            value, count, gradients[name] = self._loss_between(
                loss, y[name], targets[name], self._timed[name], lengths.get(name)
            )
            total += value
            counts.append(count)
        return total, counts[0], gradients


def _counted(counts: list[int], targets: Array, lengths: Array | None, timed: bool) -> int:
    """Over how many elements a mean was taken: as reported, where that is one number, else the real steps."""
    if counts and min(counts) == max(counts):
        return counts[0]
    if not timed:
        return len(targets)
    return int(np.prod(targets.shape[:2]) if lengths is None else lengths.sum())


def takes(function: Any, name: str) -> bool:
    """Whether a callable takes an argument by name; one that does not tell takes none."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def learner_of(model: Any, loss: Any, truncate: Any, options: Any, metrics: Mapping[str, Any]) -> Learner:
    """The model and the loss that were given."""
    if not isinstance(model, Layer):
        raise TypeError(f"model should be a layer or a model of fastseq, not {checks.describe(model)}")
    if truncate is not None:
        truncate = checks.size("truncate", truncate, 1)
    whole = hasattr(model, "training_forward")
    backward = getattr(model, "training_backward" if whole else "backward", None)
    if backward is None:
        raise TypeError(f"model should have a backward to be trained, but {model!r} has none")
    if truncate is not None and not takes(backward, "truncate"):
        raise ValueError(f"truncate should be None where the backward of the model takes none: {model!r}")
    given = {} if options is None else checks.mapping("options", options)
    for name in given:
        if name in ("batch", "state", "seed") or not takes(getattr(model, "training_forward", None), name):
            raise ValueError(f"options should have names that training_forward of the model takes, not {name!r}")
    if whole:
        if loss is not None:
            raise ValueError(f"loss should be None where the model has its own: {model!r}")
        return Learner(model, truncate, given, metrics)
    if isinstance(loss, Mapping):
        if not isinstance(model, Graph):
            raise TypeError(f"loss should be a mapping only where model is a Graph, not {model!r}")
        losses = {name: arguments.loss_of(one, model.dtype) for name, one in checks.mapping("loss", loss).items()}
        return HeadsLearner(model, losses, truncate, metrics)
    return LayerLearner(model, arguments.loss_of(loss, model.dtype), truncate, metrics)


def carried(state: Any, fresh: Array | None) -> Any:
    """The state that a batch starts from, of the one that the batch before ended in."""
    if fresh is None or fresh.all():
        return None
    return renewed(state, fresh)


def renewed(state: Any, fresh: Array) -> Any:
    """A state in which the fresh rows are zero; states, arrays, and tuples, lists and dicts of them."""
    if state is None or not fresh.any():
        return state
    if isinstance(state, ArrayState):
        return type(state)(*(renewed(array, fresh) for array in state))
    if isinstance(state, np.ndarray):
        if len(state) != len(fresh):
            raise ValueError(
                f"data should give batches of as many rows as the one before where rows go on, {len(state)},"
                f" not {len(fresh)}"
            )
        return np.where(fresh.reshape(-1, *[1] * (state.ndim - 1)), state.dtype.type(0), state)
    if isinstance(state, dict):
        return {name: renewed(part, fresh) for name, part in state.items()}
    return type(state)(renewed(part, fresh) for part in state)


class Mean:
    """A mean over batches, each with its weight; a batch in which nothing counts changes nothing."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float, count: int) -> None:
        """Take in the mean of a batch over `count` elements."""
        if count:
            self.total, self.count = self.total + value * count, self.count + count

    @property
    def value(self) -> float:
        """The mean; NaN where nothing counted."""
        return self.total / self.count if self.count else float("nan")
