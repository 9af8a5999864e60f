"""The forecaster of series over recurrent layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastseq import checks, layers, losses, training
from fastseq.checks import Array
from fastseq.layers import inside
from fastseq.layers.base import Tape, seeds_of
from fastseq.layers.recurrent import advice_on_dropout
from fastseq.layers.settings import KW_ONLY, Dtype, choice, floating, fraction, random_seed, size
from fastseq.models.base import Task, TrainedModel
from fastseq.models.forms import BATCH_SIZE, no_targets, padded_pair
from fastseq.models.recurrent_parts import CELLS
from fastseq.models.series import ScaledModel, Series, gaussian, series_of
from fastseq.models.symbols import real_steps
from fastseq.training import Batch, History


class RecurrentForecaster(ScaledModel, TrainedModel):
    """The latent autoregressive model of series: x_{t+1} = W h_t + b + e_t, h_t = f(x_t, h_{t-1}), e_t Gaussian.

    Inputs and outputs of the layers are standardised by mean and deviation of what was fitted; what comes in and goes
    out of the model is not. That is done in float64, and what goes out has the wider dtype of the model's and of what
    came in.

    Attributes
    ----------
    sigma2 : ndarray of shape (I,)
        The variance of e, the mean of the squared residuals of what was fitted.
    """

    _measured = ("mean", "deviation", "sigma2")

    input_size: int = size(doc="I, values a step. Where it is 1, the axis of values may be left out.")
    hidden_size: int = size(doc="The size of the state of the recurrent layer.")
    num_layers: int = size(default=1, doc="Recurrent layers, stacked.")
    _: KW_ONLY
    cell: str = choice(tuple(CELLS), default="lstm", doc="Which recurrent layer.")
    dropout: float = fraction(
        default=0.0, doc="Share of the outputs between layers that training drops; of two layers or more."
    )
    dtype: Dtype = floating(default="float32", doc="Of parameters and states.")
    seed: int | None = random_seed(default=None, doc="Fixes the initial parameters.")

    def _build(self) -> None:
        first, second = seeds_of(self.seed, 2)
        sizes = self.input_size, self.hidden_size, self.num_layers
        self._recurrent: Any = self._part(CELLS[self.cell], *sizes, dropout=self.dropout, seed=first)
        self._output: Any = self._part(layers.Linear, self.hidden_size, self.input_size, seed=second)
        self._start(recurrent=self._recurrent, output=self._output)

    def _advice(self) -> str | None:
        return advice_on_dropout(self.dropout, self.num_layers)

    @property
    def sigma2(self) -> Array:  # noqa: D102  see the class
        return self._needs_fit()["sigma2"]

    def _check_fitted(self, given: Mapping[str, Any]) -> dict[str, Array]:
        fitted = {name: np.array(checks.real_array(name, given[name], np.dtype(np.float64))) for name in given}
        for name, array in fitted.items():
            if array.shape != (self.input_size,):
                raise ValueError(f"{name} should be of shape ({self.input_size},), not {array.shape}")
        return fitted

    def _raw_validation(self, value: Any) -> Series:
        return self._given("validation", *padded_pair(value))

    def _given(self, name: str, series: Any, lengths: Any) -> Series:
        return series_of(name, series, lengths, self.dtype, self.input_size)

    def __call__(self, x: Any, state: Any = None, *, lengths: Any = None) -> Array:
        """The value expected next, at every step.

        Parameters
        ----------
        x : array of shape (B, T, I), or (T, I) for one series, or list of arrays
            Real floating numbers. If I is 1, the last axis may be left out.
        state : state, optional
            Where each row goes on; zeros by default.
        lengths : array of shape (B,), optional
            The real steps of each row.

        Returns
        -------
        ndarray of the shape of x
            At step t the expectation of x_{t+1}; 0 past the end of a row.
        """
        self._needs_units()
        given = self._given("x", x, lengths)
        return given.like(self._predict(given, state)[0])

    def _predict(self, given: Series, state: Any = None) -> tuple[Array, Any]:
        """What a call returns, (B, T, I), in float64, and where each row ends."""
        y, state = self._recurrent(self._standard(given.values), state, lengths=given.lengths)
        predicted = self._raw(self._output(y))
        predicted[~given.real()] = 0
        return predicted, state

    def step(self, x_t: Any, state: Any = None) -> tuple[Array, Any]:
        """The value expected after x_t (B, I), of the same shape, and the state for the next step."""
        self._needs_units()
        if np.shape(checks.as_array("x_t", x_t))[1:] != (self.input_size,):
            raise ValueError(f"x_t should be of shape (B, {self.input_size}), not {np.shape(x_t)}")
        # Rows of one step each; of one value a step, the axis of values stands for time.
        given = series_of("x_t", x_t, None, self.dtype)
        y, state = self._recurrent.step(self._standard(given.values), state)
        return given.like(self._raw(self._output(y))), state

    def forward(
        self, x: Any, state: Any = None, *, lengths: Any = None, seed: int | None = None
    ) -> tuple[Array, Any, Tape]:
        """Call for training: with dropout, and what `backward` needs; also the state each row ends in.

        What is predicted past the end of a row is not 0 here, but means nothing.
        """
        given = self._given("x", x, lengths)
        z, state, tapes = self._through(given.values, state, given.lengths, seed)
        y = given.like(self._raw(z))
        return y, state, Tape(self, (tapes, given, y.shape))

    def _through(
        self, values: Array, state: Any, lengths: Array | None, seed: int | None
    ) -> tuple[Array, Any, tuple[Tape, Tape]]:
        """All layers, forward; the outputs as they come from the last."""
        y, state, recurrent = self._recurrent.forward(self._standard(values), state, lengths=lengths, seed=seed)
        z, output = self._output.forward(y)
        return z, state, (recurrent, output)

    def backward(
        self, dy: Any, tape: Tape, *, dstate: Any = None, truncate: int | None = None, grads: Any = None
    ) -> tuple[Array, Any]:
        """Add the gradients of all parameters; return those of x and of the state that was given."""
        tapes, given, shape = self._kept(tape)
        dy = checks.like("dy", dy, given.values.dtype, shape).reshape(given.values.shape)
        _, deviation = self._units()
        with np.errstate(all="ignore"):
            dz = (dy * deviation).astype(self.dtype)
        dx, dstate = self._back(dz, tapes, grads, dstate, truncate)
        return given.like(dx / deviation), dstate

    def _back(
        self, dz: Array, tapes: tuple[Tape, Tape], grads: Any, dstate: Any = None, truncate: int | None = None
    ) -> tuple[Array, Any]:
        """All layers, in the reverse order of `_through`."""
        targets = self._child_targets(grads)
        recurrent, output = tapes
        dy = self._output.backward(dz, output, grads=targets["output"])
        result: tuple[Array, Any] = self._recurrent.backward(
            dy, recurrent, dstate=dstate, truncate=truncate, grads=targets["recurrent"]
        )
        return result

    def _task(self, batch: Batch, state: Any) -> Task:
        """Return values, and as targets those that follow; a batch without targets holds whole series."""
        given = self._given("inputs", batch.inputs, batch.lengths)
        if batch.targets is None:
            lengths = np.maximum(given.lengths - 1, 0)
            return Task(given.values[:, :-1], given.values[:, 1:], int(lengths.sum()), lengths)
        targets = self._given("targets", batch.targets, batch.lengths).values
        if targets.shape != given.values.shape:
            raise ValueError(f"targets should be of shape {given.values.shape}, as inputs, not {targets.shape}")
        return Task(given.values, targets, int(given.lengths.sum()), given.lengths)

    def _taped(self, task: Task, state: Any, seed: int | None) -> tuple[Array, Any, Any]:
        return self._through(task.inputs, state, task.lengths, seed)

    def _evaluated(self, task: Task, state: Any) -> tuple[Array, Any]:
        y, state = self._recurrent(self._standard(task.inputs), state, lengths=task.lengths)
        return self._output(y), state

    def _loss(self, outputs: Array, task: Task) -> tuple[float, Array]:
        """Return the mean squared error in units of the deviation, and its gradient."""
        return losses.mean_squared_error(
            outputs, self._standard(task.targets), lengths=task.lengths, _backend=self._backend
        )

    def training_backward(self, tape: Any, grads: Any = None, *, truncate: int | None = None) -> None:
        """Add the gradients of the loss that `training_forward` returned; `truncate` as of the recurrent layers."""
        gradient, tapes = tape
        self._back(gradient, tapes, grads, None, truncate)

    @checks.short_traceback
    def fit(
        self,
        series: Any,
        lengths: Any = None,
        *,
        window: int | None = None,
        batch_size: int | None = None,
        seed: int | None = 0,
        validation_split: float | None = None,
        **settings: Any,
    ) -> History:
        """Train, and measure what is left: `sigma2`. Where this fails, the model is as it was.

        Parameters
        ----------
        series : array of shape (S, T, I), or (T, I) for one, or list of arrays
            Finite real numbers, of which `fastseq.training.Windows` are made. If I is 1, the last axis may be left
            out.
        lengths : array of shape (S,), optional
            The real steps of each series.
        window : int, optional
            Steps of a window, 64 by default; a shorter series is a window as it is.
        batch_size : int, optional
            Windows in a batch; 32 by default.
        seed : int, optional
            Fixes the order of the windows and what dropout drops.
        validation_split : float in (0, 1), optional
            The share of the series, drawn by the seed, that the model is validated on; of one series the last part.
        **settings
            As of `fastseq.training.fit`: ``epochs``, ``validation``, which may be raw, as `series`, or a tuple of a
            padded array and lengths, ... The optimiser is Adam with a learning rate of 0.01, unless another is given.
            A validation loss is the mean squared error of the predictions that a call makes, in units of the
            deviation.

        Returns
        -------
        History
        """
        no_targets("series", series, lengths)
        given = self._given("series", series, lengths)
        given.check_finite("series")
        settings["seed"] = seed
        size = BATCH_SIZE if batch_size is None else checks.size("batch_size", batch_size, 1)
        steps = 64 if window is None else checks.size("window", window, 1)
        given, validation = self._held_out(given, validation_split, seed, 2, settings)
        if validation is not None:
            whole = self._predictable("validation", validation)
            inputs, targets = [row[:-1] for row in whole], [row[1:] for row in whole]
            settings["validation"] = training.PaddedBatches(inputs, targets, batch_size=size, shuffle=False)
        rows = self._predictable("series", given)
        steps = min(steps, max(map(len, rows)) - 1)  # a series that is shorter is a window as it is
        data = training.Windows(rows, steps=steps, batch_size=size, seed=seed)
        self._optimised(settings)
        return self._learn(given, "series", data, {}, settings)

    @staticmethod
    def _predictable(name: str, given: Series) -> list[Array]:
        """The series one by one, all but those in which nothing comes after anything."""
        rows = [row for row in given.rows() if len(row) > 1]
        if not rows:
            raise ValueError(f"{name} should have at least 2 steps, not {given.lengths.max(initial=0)}")
        return rows

    def _variance(self, given: Series) -> Array:
        residuals, counts = self._residuals(given)
        squares = np.square(residuals[real_steps(counts, residuals.shape[1])], dtype=np.float64)
        return np.asarray(squares.mean(axis=0))

    def _residuals(self, given: Series) -> tuple[Array, Array]:
        """What was predicted less what came, (S, T - 1, I), and how many steps of each series that is."""
        predicted, _ = self._predict(given)
        return given.values[:, 1:] - predicted[:, :-1], np.maximum(given.lengths - 1, 0)

    def log_prob(self, series: Any, lengths: Any = None) -> Array:
        """The Gaussian log-density of each series given its first step; arguments as of a call.

        Returns
        -------
        ndarray of shape (S,)
            float64.
        """
        given = self._given("series", series, lengths)
        sigma2 = self.sigma2
        residuals, counts = self._residuals(given)
        parts = [gaussian(residuals[..., i], counts, sigma2[i : i + 1]) for i in range(self.input_size)]
        return np.asarray(sum(parts))

    def forecast(self, series: Any, horizon: int, *, lengths: Any = None) -> Array:
        """Go on from the end of each series, each prediction taken for a value.

        Parameters
        ----------
        series, lengths
            As of a call; at least one step each.
        horizon : int
            How many steps.

        Returns
        -------
        ndarray of shape (S, horizon, I), or in the form the series were given in
        """
        self._needs_units()
        given = self._given("series", series, lengths)
        horizon = checks.size("horizon", horizon)
        given.check_lengths("series", 1)
        if horizon == 0:
            return given.like(np.empty((len(given.values), 0, self.input_size)))
        y, state = self._recurrent(self._standard(given.values), lengths=given.lengths)
        x = self._output(y[np.arange(len(y)), given.lengths - 1])
        later = inside.rollout(self._recurrent, self._output, x, state, horizon - 1)
        return given.like(self._raw(np.concatenate([x[:, None], later], axis=1)))
