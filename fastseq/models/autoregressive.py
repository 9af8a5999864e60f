"""Autoregressive models of real-valued series: the next value from the τ before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from fastseq import _models, checks, threads
from fastseq.checks import Array
from fastseq.models.base import Model, Series, row_sums, series_of

_CRITERIA = ("bic", "aic")


class AutoRegressive(Model):
    """AR(τ): x_t = b + φ_1 x_{t-1} + ... + φ_τ x_{t-τ} + e_t, with e_t Gaussian [1]_.

    Every series has coefficients of its own; a model of one series predicts any number of them.

    Parameters
    ----------
    order : int
        τ, at least 1.
    dtype : {"float32", "float64"}
        Of coefficients and predictions. Least squares are solved in float64.

    Attributes
    ----------
    coefficients : ndarray of shape (S, order)
        φ of each series that was fitted, that of the last value first.
    intercept : ndarray of shape (S,)
        b.
    sigma2 : ndarray of shape (S,)
        The variance of e, the mean of the squared residuals.

    References
    ----------
    .. [1] G. E. P. Box and G. M. Jenkins, "Time Series Analysis: Forecasting and Control", 1970.
    """

    _operations: ClassVar[Any] = _models
    _dtypes: ClassVar[tuple[str, ...] | None] = ("float32", "float64")
    _measured: ClassVar[tuple[str, ...]] = ("coefficients", "intercept", "sigma2", "counts")

    order: int

    def __init__(self, order: int, *, dtype: Any = "float64") -> None:
        self.order = checks.size("order", order, 1)
        self.dtype = checks.real_dtype("dtype", dtype, self._dtypes)
        self._start({"order": self.order, "dtype": self.dtype.name})

    @property
    def coefficients(self) -> Array:  # noqa: D102  see the class
        return self._needs_fit()["coefficients"]

    @property
    def intercept(self) -> Array:  # noqa: D102  see the class
        return self._needs_fit()["intercept"]

    @property
    def sigma2(self) -> Array:  # noqa: D102  see the class
        return self._needs_fit()["sigma2"]

    def _check_fitted(self, given: Mapping[str, Any]) -> dict[str, Array]:
        fitted = {name: checks.real_array(name, given[name], np.dtype(np.float64)) for name in ("sigma2", "counts")}
        fitted |= {name: checks.real_array(name, given[name], self.dtype) for name in ("coefficients", "intercept")}
        rows = len(fitted["sigma2"]) if fitted["sigma2"].ndim else 0
        for name, array in fitted.items():
            shape = (rows, self.order) if name == "coefficients" else (rows,)
            if array.shape != shape:
                raise ValueError(f"{name} should be of shape {shape}, not {array.shape}")
        return {name: np.array(fitted[name]) for name in self._measured}

    def fit(self, series: Any, lengths: Any = None, *, hold_back: int | None = None) -> AutoRegressive:
        """Conditional least squares: the likelihood given the first τ values of a series at its largest.

        Parameters
        ----------
        series : array of shape (S, T), or (T,) for one, or list of arrays
            Finite real numbers; each series is fitted on its own.
        lengths : array of shape (S,), optional
            The real values of each series.
        hold_back : int, optional
            The values at the start of each series that are not predicted, τ by default; more of them, to compare
            orders on the same values.

        Returns
        -------
        AutoRegressive
            Itself.
        """
        given = series_of("series", series, lengths, np.dtype(np.float64))
        first = self.order if hold_back is None else checks.size("hold_back", hold_back, self.order)
        given.check_finite("series")
        counts = given.lengths - first
        if (counts < self.order + 2).any():
            row = int(np.flatnonzero(counts < self.order + 2)[0])
            raise ValueError(
                f"series[{row}] should have at least {first + self.order + 2} values, not {given.lengths[row]}"
            )
        # Values far from 0 have nearly the same direction as the intercept; from its first value a series has not.
        base = given.values[:, :1]
        upper = self._operations.triangle(
            np.ascontiguousarray(given.values - base), given.lengths, self.order, first, threads.get_num_threads()
        )
        solution = _solve(upper[:, :-1, :-1], upper[:, :-1, -1])
        coefficients = np.ascontiguousarray(solution[:, 1:])
        self._take_fitted(
            {
                "coefficients": coefficients.astype(self.dtype),
                "intercept": (solution[:, 0] + base[:, 0] * (1 - coefficients.sum(axis=1))).astype(self.dtype),
                "sigma2": upper[:, -1, -1] ** 2 / counts,
                "counts": counts.astype(np.float64),
            }
        )
        return self

    def _given(self, series: Any, lengths: Any) -> Series:
        given = series_of("series", series, lengths, self.dtype)
        models = len(self.intercept)
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
            0 past the end of a series.
        """
        given = self._given(series, lengths)
        return given.like(self._predict(given))

    def _predict(self, given: Series) -> Array:
        y: Array = self._operations.predict(
            given.values, given.lengths, self.intercept, self.coefficients, threads.get_num_threads()
        )
        return y

    def log_prob(self, series: Any, lengths: Any = None) -> Array:
        """The Gaussian log-density of each series given its first τ values; arguments as of a call.

        Returns
        -------
        ndarray of shape (S,)
            float64; 0 for a series of no more than τ values.
        """
        given = self._given(series, lengths)
        residuals = given.values[:, self.order :].astype(np.float64) - self._predict(given)[:, self.order - 1 : -1]
        counts = np.maximum(given.lengths - self.order, 0)
        with np.errstate(over="ignore", invalid="ignore"):
            squares = row_sums(np.square(residuals), counts)
            # A series that was predicted without any error has a density without bound.
            sigma2 = np.maximum(self.sigma2, np.finfo(np.float64).tiny)
            result: Array = -0.5 * (counts * np.log(2 * np.pi * sigma2) + squares / sigma2)
        return result

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
        return given.like(self._rollout(given.recent("series", self.order), horizon))

    def _rollout(self, recent: Array, horizon: int) -> Array:
        y: Array = self._operations.rollout(
            recent, self.intercept, self.coefficients, horizon, threads.get_num_threads()
        )
        return y

    def aic(self) -> Array:
        """Akaike's criterion of each series that was fitted, (S,): 2 p - 2 log L, p = τ + 2; less is better."""
        return 2.0 * (self.order + 2) - 2 * self._log_likelihood()

    def bic(self) -> Array:
        """Schwarz's criterion of each series that was fitted, (S,): p log n - 2 log L for its n residuals."""
        penalty: Array = (self.order + 2) * np.log(self._needs_fit()["counts"])
        result: Array = penalty - 2 * self._log_likelihood()
        return result

    def _log_likelihood(self) -> Array:
        """Of what was fitted, at the variance that makes it largest."""
        sigma2 = np.maximum(self.sigma2, np.finfo(np.float64).tiny)
        result: Array = -0.5 * self._needs_fit()["counts"] * (np.log(2 * np.pi * sigma2) + 1)
        return result

    @classmethod
    def choose(
        cls, series: Any, orders: Iterable[int], criterion: str = "bic", *, lengths: Any = None, **settings: Any
    ) -> AutoRegressive:
        """The model of the best order, fitted to all of the series.

        Parameters
        ----------
        series, lengths
            As of `fit`. Many series have one order: that of the least sum of their criteria.
        orders : iterable of int
            What to choose from; the lower of two that are equally good.
        criterion : {"bic", "aic"}
            All orders are judged on the same values: those that have the highest order's number before them.
        **settings
            As of the class.
        """
        checks.choice("criterion", criterion, _CRITERIA)
        models = [cls(order, **settings) for order in sorted(set(orders))]
        if not models:
            raise ValueError("orders should hold at least one order")
        most = models[-1].order
        scores = [getattr(model.fit(series, lengths, hold_back=most), criterion)().sum() for model in models]
        return models[int(np.argmin(scores))].fit(series, lengths)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._config.items())
        return f"AutoRegressive({settings}) " + (f"of {len(self.sigma2):,} series" if self._fitted else "not fitted")


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
