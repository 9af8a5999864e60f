"""What all models share: files, state dicts, what `fit` measured, and the verbs."""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fastseq import checks, io, losses, training
from fastseq.checks import Array
from fastseq.layers import inside
from fastseq.layers.base import SEQUENCE, Composite, Configured, Layer
from fastseq.layers.derived import Derived
from fastseq.training import Batch, History

M = TypeVar("M", bound="Model")


class ParameterCache:
    """A value computed from the parameters of some layers, as long as these stay the same.

    Parameters
    ----------
    *layers
        With parameters of their own: not composites.
    """

    def __init__(self, *layers: Any) -> None:
        self._layers = layers
        self._kept: Derived[Any] = Derived()

    def get(self, make: Callable[[], Any]) -> Any:
        """Return the cached value; build it with `make` on first use and after a parameter has changed."""
        return self._kept.get(tuple([inside.arrays(layer) for layer in self._layers]), lambda _: make())


class Model(Configured, Composite):
    """Layers with trained parameters, none in some models, and what `fit` measured beside them.

    A subclass declares its settings, and has `_build`, which makes the layers and passes them to `_start`.
    """

    time = SEQUENCE
    _by_own_rule = ("output", "head")  # with another start the first losses are far from what chance gives

    @property
    def _measured(self) -> tuple[str, ...]:
        """The names of what `fit` measures: all of them are in `_fitted`, or none."""
        return ()

    def _part(self, kind: type[Layer], *sizes: Any, **settings: Any) -> Any:
        """Make a layer over the operations of the model, and of its dtype."""
        made: Any = self._backend.of(kind)
        return made(*sizes, dtype=self.dtype, **settings)

    def _start(self, **children: Layer | None) -> None:
        """Take the layers that have parameters, by the names that these begin with; None stands for no layer."""
        self._children = {name: child for name, child in children.items() if child is not None}
        self._fitted: Mapping[str, Array] = {}

    @property
    def loss_unit(self) -> str:
        """What the losses of a training are counted in."""
        return "nats a symbol"

    def _check_fitted(self, given: Mapping[str, Any]) -> dict[str, Array]:
        """What `fit` measured, from a file or a state dict, looked at; a fault is a `ValueError`."""
        return {name: np.array(value) for name, value in given.items()}

    def _take_fitted(self, fitted: Mapping[str, Array]) -> None:
        for array in fitted.values():
            array.flags.writeable = False
        self._fitted = fitted

    def _refresh(self) -> None:
        """Bring up to date what was measured; while a model is trained, its parameters change with every step."""

    def _needs_fit(self) -> Mapping[str, Array]:
        if not self._fitted:
            raise ValueError(f"this {type(self).__name__} should be fitted first")
        self._refresh()
        return self._fitted

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Put parameters and what was measured back to what they were where the block fails, by Ctrl-C too."""
        arrays, fitted = dict(self._arrays), self._fitted
        try:
            yield
        except BaseException:
            self._adopt(arrays)
            self._fitted = fitted
            raise

    def _train(self, data: Any, settings: Mapping[str, Any]) -> History:
        """`fastseq.training.fit`; where it fails, the model is as it was."""
        with self._all_or_nothing():
            return training.fit(self, data, **settings)

    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters by name, and of what `fit` measured."""
        self._refresh()
        return {**super().state_dict(), **{name: np.array(array) for name, array in self._fitted.items()}}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Take all parameters, and what `fit` measured, from what `state_dict` returned.

        Parameters
        ----------
        mapping : mapping from str to array
            Without anything that `fit` measured, that stays as it is.

        Raises
        ------
        ValueError
            Naming every name that is unknown, missing or does not fit; the model is as it was then.
        """
        given = checks.mapping("mapping", mapping)
        measured = {name: given[name] for name in self._measured if name in given}
        if measured and len(measured) < len(self._measured):
            missing = [name for name in self._measured if name not in given]
            raise ValueError(f"mapping does not fit {self!r}: {', '.join(missing)} should be there too")
        fitted = self._check_fitted(measured) if measured else self._fitted
        super().load_state_dict({name: value for name, value in given.items() if name not in measured})
        self._take_fitted(fitted)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a safetensors file, whole or not at all; `fastseq.load` reads it back."""
        self._refresh()
        arrays = {**self._arrays, **self._fitted}
        io.save(path, type(self).__name__, self._config, arrays, weights=self._weight_type)

    def _take_narrow(self, given: Mapping[str, Any], weight_type: str) -> None:
        measured = {name: given[name] for name in self._measured if name in given}
        super()._take_narrow({name: array for name, array in given.items() if name not in measured}, weight_type)
        if measured:
            self._take_fitted(self._check_fitted(measured))

    def _restored(self: M, arrays: Mapping[str, Any], weight_type: str) -> M:
        self._refresh()
        made = super()._restored(arrays, weight_type)
        made._take_fitted(self._fitted)
        return made

    def __getstate__(self) -> dict[str, Any]:
        self._refresh()
        return {**super().__getstate__(), "fitted": dict(self._fitted)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if state["fitted"]:
            self._take_fitted(self._check_fitted(state["fitted"]))


class Task(NamedTuple):
    """A batch in the form in which the layers of a model take it."""

    inputs: Any  # as `_taped` and `_evaluated` of the model take it
    targets: Array
    elements: int  # over which the loss is the mean
    lengths: Array | None = None  # (B,) real steps, where outputs are padded


class TrainedModel(Model):
    """A model with a loss of its own, trained by `fastseq.training.fit`.

    A subclass says what the layers take of a batch, runs them for training and for evaluation, and has `_back`, which
    undoes them in the reverse order.
    """

    @abstractmethod
    def _task(self, batch: Batch, state: Any) -> Task:
        """Check a batch and put it into the form that the layers take."""

    @abstractmethod
    def _taped(self, task: Task, state: Any, seed: int | None) -> tuple[Array, Any, Any]:
        """Run all layers for training; return outputs, state, and what `_back` needs."""

    @abstractmethod
    def _evaluated(self, task: Task, state: Any) -> tuple[Array, Any]:
        """Run all layers without dropout; return outputs and state."""

    @abstractmethod
    def _back(self, gradient: Array, kept: Any, grads: Any) -> Any:
        """Undo all layers, given the gradient of their outputs."""

    def _loss(self, outputs: Array, task: Task) -> tuple[float, Array]:
        """Return the mean loss and its gradient: cross-entropy, unless a subclass has another."""
        return losses.softmax_cross_entropy(outputs, task.targets, lengths=task.lengths, _backend=self._backend)

    def training_forward(self, batch: Batch, state: Any = None, seed: int | None = None) -> tuple[float, int, Any, Any]:
        """Compute the mean loss of a batch, for `fastseq.training.fit`.

        Parameters
        ----------
        batch : Batch
            Of the data that `fit` of the model makes.
        state : state, optional
            Where the batch before ended, of a model that carries a state.
        seed : int, optional
            Fixes what dropout drops.

        Returns
        -------
        loss : float
        count : int
            Elements over which the loss is the mean.
        tape : object
            For `training_backward`.
        state : state or None
        """
        task = self._task(batch, state)
        outputs, state, kept = self._taped(task, state, seed)
        loss, gradient = self._loss(outputs, task)
        return loss, task.elements, (gradient, kept), state

    def training_backward(self, tape: Any, grads: Any = None) -> None:
        """Add the gradients of the loss that `training_forward` returned."""
        gradient, kept = tape
        self._back(gradient, kept, grads)

    def evaluation_forward(self, batch: Batch, state: Any = None) -> tuple[float, int, Any]:
        """Return loss, count and state as of `training_forward`, without dropout."""
        task = self._task(batch, state)
        outputs, state = self._evaluated(task, state)
        loss, _ = self._loss(outputs, task)
        return loss, task.elements, state
