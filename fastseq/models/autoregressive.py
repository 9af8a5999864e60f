"""Autoregressive models of real-valued series: the next value from the τ before it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fastseq import checks, layers, losses, threads, training
from fastseq.checks import Array
from fastseq.layers.base import seeds_of
from fastseq.layers.settings import KW_ONLY, Dtype, choice, floating, random_seed, size
from fastseq.models.forms import BATCH_SIZE, no_targets
from fastseq.models.series import ScaledModel, Series, check_extent, gaussian, series_of
from fastseq.models.sums import bounded, row_sums
from fastseq.training import Batch, History

_CRITERIA = ("bic", "aic")


class AutoRegressive(ScaledModel):
    """AR(τ): x_t = b + φ_1 x_{t-1} + ... + φ_τ x_{t-τ} + e_t, with e_t Gaussian [1]_; or a perceptron in its place.

    Without `hidden`, every series has coefficients of its own, and a model of one series predicts any number of them.
    With it, one perceptron learns from all series and predicts any number: H = f(W x + b), O = V H + c, x the τ past
    values, oldest first, standardised by mean and deviation of what was fitted.

    Attributes
    ----------
    coefficients : ndarray of shape (S, order)
        φ of each series that was fitted, that of the last value first; of a linear model.
    intercept : ndarray of shape (S,)
        b, in float64; of a linear model.
    sigma2 : ndarray of shape (S,), or (1,) of a perceptron
        The variance of e, the mean of the squared residuals.
    history : History or None
        What the last `fit` returned.

    References
    ----------
    .. [1] G. E. P. Box and G. M. Jenkins, "Time Series Analysis: Forecasting and Control", 1970.
    """

    _real_children = ("hidden", "output")  # a few weights, which a forecast takes one step after another

    order: int = size(doc="τ, at least 1.")
    hidden: int | None = size(default=None, doc="Units of the perceptron; by default there is none.")
    _: KW_ONLY
    activation: str = choice(("sigmoid", "tanh", "relu"), default="sigmoid", doc="f; of a perceptron.")
    dtype: Dtype = floating(
        default="float64",
        doc="Of parameters, and of the predictions of a perceptron before they are scaled. Least squares are solved,"
        " and a linear model predicts, in float64. Predictions have the wider one of this and the dtype of the series.",
    )
    seed: int | None = random_seed(default=None, doc="Fixes the initial parameters of the perceptron.")

    def _resolve(self) -> None:
        if self.hidden is None and self.activation != "sigmoid":
            raise ValueError(f"activation should not be given where hidden is None, but is {self.activation!r}")

    def _build(self) -> None:
        self._history: History | None = None
        self._first_predicted = self.order  # by the last `fit`: of each series
        self._first: Any = None
        self._second: Any = None
        if self.hidden is not None:
            first, second = seeds_of(self.seed, 2)
            self._first = self._part(layers.Linear, self.order, self.hidden, seed=first)
            self._second = self._part(layers.Linear, self.hidden, 1, seed=second)
        self._start(hidden=self._first, output=self._second)

    @property
    def _measured(self) -> tuple[str, ...]:
        of_kind = ("coefficients", "intercept") if self.hidden is None else ("mean", "deviation")
        return (*of_kind, "sigma2", "counts")

    def _linear(self, name: str) -> Array:
        if self.hidden is not None:
            raise ValueError(f"a perceptron has no {name}; see parameters")
        return self._needs_fit()[name]

    @property
    def coefficients(self) -> Array:  # noqa: D102  see the class
        return self._linear("coefficients")

    @property
    def intercept(self) -> Array:  # noqa: D102  see the class
        return self._linear("intercept")

    @property
    def sigma2(self) -> Array:  # noqa: D102  see the class
        return self._needs_fit()["sigma2"]

    @property
    def history(self) -> History | None:  # noqa: D102  see the class
        return self._history

    def _check_fitted(self, given: Mapping[str, Any]) -> dict[str, Array]:
        wide = np.dtype(np.float64)
        fitted = {
            name: np.array(checks.real_array(name, value, self.dtype if name == "coefficients" else wide))
            for name, value in given.items()
        }
        rows = fitted["sigma2"].size if self.hidden is None else 1
        for name, array in fitted.items():
            shape = (rows, self.order) if name == "coefficients" else (rows,)
            if array.shape != shape:
                raise ValueError(f"{name} should be of shape {shape}, not {array.shape}")
        return fitted

    @property
    def loss_unit(self) -> str:
        """What the losses of a training are counted in."""
        return "nats a value" if self.hidden is None else super().loss_unit

    @checks.short_traceback
    def fit(
        self,
        series: Any,
        lengths: Any = None,
        *,
        hold_back: int | None = None,
        batch_size: int | None = None,
        seed: int | None = 0,
        validation_split: float | None = None,
        **settings: Any,
    ) -> History:
        """Make the likelihood given the first τ values of each series large.

        A linear model is solved for: conditional least squares, where it is largest. A perceptron is trained, from
        the parameters it has. Where this fails, the model is as it was.

        Parameters
        ----------
        series : array of shape (S, T), or (T,) for one, or list of arrays
            Finite real numbers.
        lengths : array of shape (S,), optional
            The real values of each series.
        hold_back : int, optional
            The values at the start of each series that are not predicted, τ by default; more of them, to compare
            orders on the same values.
        batch_size : int, optional
            Of a perceptron: values that are predicted in a batch; 32 by default.
        seed : int, optional
            Of a perceptron: fixes the order of what it learns from.
        validation_split : float in (0, 1), optional
            Of a perceptron: the share of the series, drawn by the seed, that it is validated on; of one series the
            last part.
        **settings
            Of a perceptron: as of `fastseq.training.fit`, ``epochs`` for example, where ``validation`` may be series,
            too. The optimiser is Adam with a learning rate of 0.01, unless another is given. A validation loss is
            the mean squared error of one-step predictions, in units of the deviation.

        Returns
        -------
        History
            Of a linear model one step: its loss is the mean negative log-density of a value, in nats.
        """
        no_targets("series", series, lengths)
        first = self.order if hold_back is None else checks.size("hold_back", hold_back, self.order)
        if self.hidden is None:
            others = {"batch_size": batch_size, "validation_split": validation_split}
            for name in [*settings, *(name for name, value in others.items() if value is not None)]:
                raise TypeError(f"{name} is a setting of training, which a linear model does without")
        given = series_of("series", series, lengths, self.dtype)
        given.check_finite("series")
        if self.hidden is None:
            self._history = self._solve_for(given, first)
            return self._history
        if settings.get("metrics"):
            raise ValueError(
                "metrics should be left out, as a call of this model does not predict windows by themselves"
            )
        settings["seed"] = seed
        size = BATCH_SIZE if batch_size is None else checks.size("batch_size", batch_size, 1)
        if validation_split is not None:
            given.check_lengths("series", first + 1)
        given, validation = self._held_out(given, validation_split, seed, self.order + 1, settings)
        if validation is not None:
            validation.check_lengths("validation", self.order + 1)
            settings["validation"] = training.Windows(validation.rows(), steps=self.order, batch_size=size, seed=0)
        given.check_lengths("series", first + 1)
        self._optimised(settings)
        rows = [row[first - self.order :] for row in given.rows()]
        data = training.Windows(rows, steps=self.order, batch_size=size, seed=seed)
        counts = np.array([float(sum(len(row) - self.order for row in rows))])
        self._first_predicted = first
        self._history = self._learn(given, "series", data, {"counts": counts}, settings)
        return self._history

    def _solve_for(self, given: Series, first: int) -> History:
        """Least squares."""
        begin = time.perf_counter()
        given.check_lengths("series", first + self.order + 2)
        # Values far from 0 have nearly the same direction as the intercept; from its first value a series has not.
        base = given.values[:, :1]
        with np.errstate(over="ignore", invalid="ignore"):
            apart = np.where(given.real(), given.values - base, 0)
        check_extent("series", np.abs(apart).max(axis=1, initial=0))
        upper = self._backend.autoregression.triangle(
            apart, given.lengths, self.order, first, threads.get_num_threads()
        )
        solution = _solve(upper[:, :-1, :-1], upper[:, :-1, -1])
        coefficients = np.ascontiguousarray(solution[:, 1:]).astype(self.dtype)
        # Of the coefficients as they are kept: so far from 0 their rounding does not move what is predicted.
        intercept = solution[:, 0] + base[:, 0] * (1 - coefficients.astype(np.float64).sum(axis=1))
        counts = (given.lengths - first).astype(np.float64)
        self._take_fitted(
            {
                "coefficients": coefficients,
                "intercept": intercept,
                "sigma2": upper[:, -1, -1] ** 2 / counts,
                "counts": counts,
            }
        )
        loss = -float(self._log_likelihood().sum() / max(counts.sum(), 1))
        seconds = time.perf_counter() - begin
        return History.of_one_step(loss, tokens=int(counts.sum()), seconds=seconds, unit=self.loss_unit)

    def _variance(self, given: Series) -> Array:
        first = self._first_predicted
        residuals = given.values[:, first:] - self._predict(given)[:, first - 1 : -1]
        counts = given.lengths - first
        return np.array([row_sums(np.square(residuals), counts).sum() / counts.sum()])

    def _windows(self, batch: Batch) -> tuple[Array, Array]:
        """The windows of a batch (B, τ) and what follows them (B, 1), standardised."""
        if batch.targets is None:
            raise ValueError("data should be Windows, or batches with targets")
        parts = []
        for name, value in (("inputs", batch.inputs), ("targets", batch.targets)):
            given = series_of(name, value, None, self.dtype, 1)
            if given.values.shape[1:] != (self.order, 1) or np.ndim(value) != 3:
                raise ValueError(f"{name} should be of shape (B, {self.order}, 1), not {np.shape(value)}")
            parts.append(self._standard(given.values)[..., 0])
        return parts[0], parts[1][:, -1:]

    def training_forward(
        self, batch: Batch, state: Any = None, seed: int | None = None
    ) -> tuple[float, int, Any, None]:
        """The mean squared error of a batch of `Windows` of τ steps, in units of the deviation."""
        if self.hidden is None:
            raise ValueError("a linear model is not trained; its fit solves for it")
        x, target = self._windows(batch)
        a, first = self._first.forward(x)
        h = self._backend.autoregression.activate(a, self.activation)
        y, second = self._second.forward(h)
        loss, dy = losses.mean_squared_error(y, target, _backend=self._backend)
        return loss, len(y), (dy, h, first, second), None

    def training_backward(self, tape: Any, grads: Any = None) -> None:
        """Add the gradients of the loss that `training_forward` returned."""
        dy, h, first, second = tape
        targets = self._child_targets(grads)
        dh = self._second.backward(dy, second, grads=targets["output"])
        slope = {"sigmoid": h * (1 - h), "tanh": 1 - h * h, "relu": (h > 0).astype(h.dtype)}[self.activation]
        self._first.backward(dh * slope, first, grads=targets["hidden"])

    def _raw_validation(self, value: Any) -> Series:
        return series_of("validation", value, None, self.dtype)

    def _given(self, series: Any, lengths: Any) -> Series:
        given = series_of("series", series, lengths, self.dtype)
        models = len(self.sigma2)
        if models not in (1, len(given.values)):
            raise ValueError(f"series should be as many as were fitted, {models}, not {len(given.values)}")
        return given

    def __call__(self, series: Any, *, lengths: Any = None) -> Array:
        """The value expected next, at every step.

        Parameters
        ----------
        series : array of shape (S, T), or (T,) for one, or list of arrays
            As many as were fitted; any number, if that was one.
        lengths : array of shape (S,), optional
            The real values of each series.

        Returns
        -------
        ndarray of shape (S, T), or (T,)
            At step t the expectation of x_{t+1} given x_t, ..., x_{t-τ+1}; NaN while there are fewer than τ values,
            0 past the end of a series. Of the wider dtype of the model's and the series'.
        """
        given = self._given(series, lengths)
        return given.like(self._predict(given))

    def _predict(self, given: Series) -> Array:
        """What a call returns, in float64."""
        y: Array
        if self.hidden is None:
            coefficients = self.coefficients.astype(given.values.dtype)
            y = self._backend.autoregression.predict(
                given.values, given.lengths, self.intercept, coefficients, threads.get_num_threads()
            )
            return y
        y = np.full_like(given.values, np.nan)
        if y.shape[1] >= self.order:
            standard = self._standard(given.values[..., None])[..., 0]
            windows = np.lib.stride_tricks.sliding_window_view(standard, self.order, axis=1)
            hidden = self._backend.autoregression.activate(self._first(windows), self.activation)
            y[:, self.order - 1 :] = self._raw(self._second(hidden))[..., 0]
        y[~given.real()] = 0
        return y

    def log_prob(self, series: Any, lengths: Any = None) -> Array:
        """The Gaussian log-density of each series given its first τ values; arguments as of a call.

        Returns
        -------
        ndarray of shape (S,)
            float64; 0 for a series of no more than τ values.
        """
        given = self._given(series, lengths)
        residuals = given.values[:, self.order :] - self._predict(given)[:, self.order - 1 : -1]
        return gaussian(residuals, np.maximum(given.lengths - self.order, 0), self.sigma2)

    def forecast(self, series: Any, horizon: int, *, lengths: Any = None) -> Array:
        """Go on from the end of each series, each prediction taken for a value.

        Parameters
        ----------
        series : array of shape (S, T), or (T,) for one, or list of arrays
            At least τ values each.
        horizon : int
            How many values.
        lengths : array of shape (S,), optional
            The real values of each series.

        Returns
        -------
        ndarray of shape (S, horizon), or (horizon,)
        """
        given = self._given(series, lengths)
        horizon = checks.size("horizon", horizon)
        given.check_lengths("series", self.order)
        places = given.lengths[:, None] - self.order + np.arange(self.order)
        recent = np.ascontiguousarray(np.take_along_axis(given.values, places, axis=1))
        return given.like(self._rollout(recent, horizon))

    def _rollout(self, recent: Array, horizon: int) -> Array:
        """What follows the last τ values (S, τ), in float64."""
        y: Array
        n_threads = threads.get_num_threads()
        if self.hidden is None:
            coefficients = self.coefficients.astype(recent.dtype)
            y = self._backend.autoregression.rollout(recent, self.intercept, coefficients, horizon, n_threads)
            return y
        first, second = (layer.parameters for layer in (self._first, self._second))
        weights = first["weight"], first["bias"], second["weight"], second["bias"]
        y = self._backend.autoregression.rollout_perceptron(
            self._standard(recent[..., None])[..., 0], *weights, self.activation, horizon, n_threads
        )
        return self._raw(y[..., None])[..., 0]

    def aic(self) -> Array:
        """Akaike's criterion of each series that was fitted, (S,): 2 p - 2 log L; less is better.

        p is τ + 2, for the coefficients, the intercept and the variance. A perceptron has one for all series, (1,), and
        p is the number of its parameters and the variance.
        """
        return 2.0 * self._freedom() - 2 * self._log_likelihood()

    def bic(self) -> Array:
        """Schwarz's criterion: p log n - 2 log L, of n residuals; p and shape as of `aic`."""
        penalty: Array = self._freedom() * np.log(self._needs_fit()["counts"])
        result: Array = penalty - 2 * self._log_likelihood()
        return result

    def _freedom(self) -> int:
        if self.hidden is None:
            return self.order + 2
        return sum(array.size for array in self._arrays.values()) + 1

    def _log_likelihood(self) -> Array:
        """Of what was fitted, at the variance that makes it largest."""
        result: Array = -0.5 * self._needs_fit()["counts"] * (np.log(2 * np.pi * bounded(self.sigma2)) + 1)
        return result

    @classmethod
    def choose(
        cls,
        series: Any,
        orders: Iterable[int],
        criterion: str = "bic",
        *,
        lengths: Any = None,
        hidden: int | None = None,
        activation: str = "sigmoid",
        dtype: Any = "float64",
        seed: int | None = None,
        **settings: Any,
    ) -> AutoRegressive:
        """The model of the best order, fitted to all of the series.

        Parameters
        ----------
        series, lengths, settings
            As of `fit`. Many series have one order: that of the least sum of their criteria.
        orders : iterable of int
            What to choose from; the lower of two that are equally good.
        criterion : {"bic", "aic"}
            All orders are judged on the same values: those that have the highest order's number before them.
        hidden, activation, dtype, seed
            As of the class.
        """
        checks.choice("criterion", criterion, _CRITERIA)
        tried = sorted(set(orders))
        if not tried:
            raise ValueError("orders should hold at least one order")

        def fitted(order: int, hold_back: int | None = None) -> AutoRegressive:
            model = cls(order, hidden, activation=activation, dtype=dtype, seed=seed)
            model.fit(series, lengths, hold_back=hold_back, **settings)
            return model

        limit = cls(tried[-1], hidden, activation=activation, dtype=dtype, seed=seed).order
        scores = [getattr(fitted(order, limit), criterion)().sum() for order in tried]
        return fitted(tried[int(np.argmin(scores))])

    def __repr__(self) -> str:
        if self.hidden is not None:
            return super().__repr__()
        return f"AutoRegressive(order={self.order}, dtype={self.dtype.name!r}) " + (
            f"of {len(self.sigma2):,} series" if self._fitted else "not fitted"
        )


def _solve(upper: Array, right: Array) -> Array:
    """Solve triangular systems (S, n, n); where one has no single solution, the smallest."""
    columns = np.linalg.norm(upper, axis=1)
    diagonal = np.diagonal(upper, axis1=1, axis2=2)
    precision = np.finfo(np.float64).eps * 64
    singular = (diagonal <= columns * precision).any(axis=1)
    result = np.empty_like(right)
    result[~singular] = np.linalg.solve(upper[~singular], right[~singular, :, None])[..., 0]
    result[singular] = (np.linalg.pinv(upper[singular], rcond=precision) @ right[singular, :, None])[..., 0]
    return result
