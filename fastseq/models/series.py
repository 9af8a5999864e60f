"""Real-valued series, and models of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastseq import checks, training
from fastseq.checks import Array
from fastseq.layers.base import Layer
from fastseq.models.base import Model
from fastseq.models.forms import held_out, is_data, is_list_of_rows, last_part
from fastseq.models.sums import bounded, row_sums
from fastseq.training import History

_MOST_EXTENT = 1e150  # of series: its square, and that of its reciprocal, are ordinary numbers


class Series(NamedTuple):
    """Real-valued series as rows, padded."""

    values: Array  # (S, T), or (S, T, I) of I values a step; contiguous, at least float64
    lengths: Array  # (S,) int64
    unbatched: bool  # given without the axis of series
    flat: bool  # given without the axis of values, though `values` has it
    dtype: np.dtype[Any]  # of results: no narrower than that of the model, and of what was given
    precision: float  # the relative distance of two numbers next to each other, as they were given

    def like(self, result: Array) -> Array:
        """A result in the form and the dtype the series were given in."""
        if self.flat:
            result = result[..., 0]
        with np.errstate(over="ignore"):  # beyond float32 it is inf
            result = result.astype(self.dtype, copy=False)
        return result[0] if self.unbatched else result

    def real(self) -> Array:
        """Where there are values and no padding, (S, T)."""
        result: Array = np.arange(self.values.shape[1]) < self.lengths[:, None]
        return result

    def check_finite(self, name: str) -> None:
        """Refuse what is not finite among the real values."""
        wrong = ~np.isfinite(self.values)
        wrong[~self.real()] = False
        if wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            where = ", ".join(map(str, place[: wrong.ndim - self.flat]))
            raise ValueError(f"{name} should be finite, but {name}[{where}] is {self.values[place]}")

    def check_lengths(self, name: str, least: int) -> None:
        """Refuse series shorter than `least`."""
        if (self.lengths < least).any():
            row = int(np.flatnonzero(self.lengths < least)[0])
            raise ValueError(f"{name}[{row}] should have at least {least} values, not {self.lengths[row]}")

    def rows(self) -> list[Array]:
        """The series one by one, without padding."""
        return [row[:length] for row, length in zip(self.values, self.lengths, strict=True)]

    def some(self, which: Array) -> Series:
        """Some of the series."""
        return self._replace(values=self.values[which], lengths=self.lengths[which], unbatched=False)

    def steps(self, first: int, last: int) -> Series:
        """The steps from `first` up to `last` of the one series there is."""
        values = np.ascontiguousarray(self.values[:, first:last])
        return self._replace(values=values, lengths=np.array([last - first]))


def series_of(name: str, value: Any, lengths: Any, dtype: np.dtype[Any], width: int | None = None) -> Series:
    """Series in any form they may be given in: (T,), (S, T) with or without lengths, or a list of arrays.

    Of `width` values a step each form has an axis more, which may be left out where that is one. They are kept in
    float64 whatever the `dtype` of the model, so that centring loses nothing of values far from 0.
    """
    axes = 2 if width is not None and width > 1 else 1
    form = "(T,)" if axes == 1 else f"(T, {width})"
    wide = np.result_type(dtype, np.float64)
    if lengths is None and is_list_of_rows(value):
        given = [_real_values(f"{name}[{i}]", row) for i, row in enumerate(value)]
        if width == 1 and all(row.ndim == 2 for row in given):
            axes, form = 2, "(T, 1)"
        for i, row in enumerate(given):
            if row.ndim != axes or (axes == 2 and row.shape[1] != width):
                raise ValueError(f"{name}[{i}] should be of shape {form}, not {row.shape}")
        counts = np.array([len(row) for row in given], np.int64)
        own = np.result_type(*(row.dtype for row in given))
        array = np.zeros((len(given), int(counts.max()), *given[0].shape[1:]), wide)
        for into, row in zip(array, given, strict=True):
            into[: len(row)] = row
        unbatched = False
    else:
        array = _real_values(name, value)
        column = array.ndim == 2 and array.shape[1] == 1 < len(array)  # (T, 1): one series, not T of a step
        if width == 1 and (array.ndim == 3 or (column and lengths is None)):
            axes, form = 2, "(T, 1)"
        if array.ndim not in (axes, axes + 1) or (axes == 2 and array.shape[-1] != width):
            raise ValueError(f"{name} should be of shape (S, {form[1:]} or {form}, or a list, not {array.shape}")
        own = array.dtype
        unbatched = array.ndim == axes
        array = checks.real_array(name, array.astype(wide, copy=False), wide)
        array = array[None] if unbatched else array
        counts = np.full(len(array), array.shape[1], np.int64)
        if lengths is not None:
            counts = checks.lengths(lengths, *array.shape[:2])
    flat = width is not None and array.ndim == 2
    values = np.ascontiguousarray(array[..., None] if flat else array)
    precision = float(np.finfo(own if own.kind == "f" else np.float64).eps)
    own = own if own.itemsize <= wide.itemsize else wide
    return Series(values, counts, unbatched, flat, np.result_type(own, dtype), precision)


def _real_values(name: str, value: Any) -> Array:
    """Real numbers, integers among them."""
    array = checks.as_array(name, value)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} should hold real numbers, not {array.dtype}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def spread_of(given: Series, name: str) -> tuple[Array, Array]:
    """Mean and standard deviation of each column of the real values, (I,), in float64.

    A column that varies by no more than rounding counts as constant, and has deviation 1. Values are centred around
    the first one before anything is summed, and scaled by their range before anything is squared.
    """
    values = given.values[given.real()]
    values = values.reshape(len(values), -1).astype(np.float64)
    count, width = values.shape
    mean, deviation = np.zeros(width), np.ones(width)
    for i in range(width if count else 0):
        column = values[:, i]
        size = np.abs(column).max()
        unit = np.exp2(np.floor(np.log2(size))) if size else 1.0  # which divides without rounding
        first = column[0] / unit
        apart = column / unit - first
        extent = np.abs(apart).max()
        if not extent:
            mean[i] = column[0]
            continue
        middle = (apart / extent).mean()
        mean[i] = (first + middle * extent) * unit
        found = (apart / extent - middle).std() * extent  # less than 2
        if found * unit <= max(4 * np.finfo(np.float64).eps, given.precision) * size:
            continue
        deviation[i] = found * unit
    check_extent(name, deviation)
    return mean, deviation


def check_extent(name: str, extents: Array) -> None:
    """Refuse series that vary by so much, or so little, that float64 does not have the square of it."""
    wrong = (extents > _MOST_EXTENT) | ((extents > 0) & (extents < 1 / _MOST_EXTENT)) | np.isnan(extents)
    if wrong.any():
        raise ValueError(
            f"{name} should vary by between {1 / _MOST_EXTENT:g} and {_MOST_EXTENT:g}, or not at all, so that float64"
            f" has the square of it, not by {extents[wrong][0]:g}; scale them first"
        )


class ScaledModel(Model):
    """A model of series whose layers see values less their mean and divided by their deviation, as `fit` found them.

    What comes in and goes out is scaled in float64; the layers see their own dtype. A subclass measures ``mean``,
    ``deviation`` and ``sigma2``, the variance of what its predictions leave.
    """

    @property
    def loss_unit(self) -> str:
        """What the losses of a training are counted in."""
        return "squared deviations a value"

    def _start(self, **children: Layer | None) -> None:
        super()._start(**children)
        self._untouched = tuple(self._arrays.values())  # the parameters it was made with
        # While it is trained: the series, and for which arrays sigma2 was measured.
        self._learning_from: Series | None = None
        self._measured_for: tuple[Array, ...] = ()

    @abstractmethod
    def _raw_validation(self, value: Any) -> Series:
        """Check series to validate on in the forms in which `fit` takes them."""

    def _held_out(
        self, given: Series, share: Any, seed: int | None, least: int, settings: Mapping[str, Any]
    ) -> tuple[Series, Series | None]:
        """Return the series to learn from, and those to validate on, if there are any that are not in batches.

        Of one series the last part is held out; each part has `least` steps.
        """
        raw = settings.get("validation")
        if share is None:
            if raw is None or is_data(raw):
                return given, None
            validation = self._raw_validation(raw)
            validation.check_finite("validation")
            return given, validation
        if raw is not None:
            raise ValueError("validation_split should not be given with validation")
        if len(given.values) > 1:
            learnt, out = held_out(len(given.values), share, seed)
            return given.some(learnt), given.some(out)
        length = int(given.lengths.sum())
        cut = last_part(length, share, least)
        return given.steps(0, cut), given.steps(cut, length)

    @abstractmethod
    def _variance(self, given: Series) -> Array:
        """The mean square of what predictions leave of some series, as `sigma2` has it."""

    def _refresh(self) -> None:
        given = self._learning_from
        if given is None:
            return
        now = (*self._arrays.values(), self._fitted["mean"], self._fitted["deviation"])
        if len(now) == len(self._measured_for) and all(a is b for a, b in zip(now, self._measured_for, strict=True)):
            return
        self._measured_for = now  # before the predictions, which ask for nothing that is out of date
        self._take_fitted({**self._fitted, "sigma2": self._variance(given)})

    def _learn(self, given: Series, name: str, data: Any, measured: Mapping[str, Array], settings: Any) -> History:
        """Train on what was made of some series, with their mean and deviation; measure what is left."""
        with self._all_or_nothing():
            mean, deviation = spread_of(given, name)
            self._take_fitted({"mean": mean, "deviation": deviation, "sigma2": np.square(deviation), **measured})
            self._learning_from = given
            try:
                history = training.fit(self, data, **settings)
                self._refresh()
            finally:
                self._learning_from, self._measured_for = None, ()
        return history

    def _optimised(self, settings: dict[str, Any]) -> None:
        """Adam with a learning rate of 0.01, where no other optimiser is given."""
        if settings.get("optimiser") is None and settings.get("optimizer") is None:
            rate = settings.pop("lr", None)
            settings["optimiser"] = training.Adam(self, 0.01 if rate is None else rate)

    def _needs_units(self) -> None:
        """Refuse to predict before anything was learnt, loaded or set."""
        if not self._fitted and all(a is b for a, b in zip(self._arrays.values(), self._untouched, strict=True)):
            self._needs_fit()

    def _units(self) -> tuple[Array, Array]:
        """Mean and deviation, (I,) of float64; none have been measured of what was trained without `fit`."""
        if not self._fitted:
            return np.zeros(1), np.ones(1)
        return self._fitted["mean"], self._fitted["deviation"]

    def _standard(self, values: Array) -> Array:
        """What the layers see of some values (..., I)."""
        mean, deviation = self._units()
        with np.errstate(over="ignore", invalid="ignore"):
            return ((values - mean) / deviation).astype(self.dtype, order="C")

    def _raw(self, values: Array) -> Array:
        """What the layers' outputs (..., I) are, in float64."""
        mean, deviation = self._units()
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(values * deviation + mean)


def gaussian(residuals: Array, counts: Array, sigma2: Array) -> Array:
    """The log-density of the first `counts` residuals of each row of (S, T), of variance (S,) or (1,)."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = row_sums(np.square(residuals, dtype=np.float64), counts)
        variance = bounded(sigma2)
        result: Array = -0.5 * (counts * np.log(2 * np.pi * variance) + squares / variance)
    return result
