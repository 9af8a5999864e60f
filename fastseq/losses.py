"""Losses: each gives the mean over what counts, and its gradient with respect to the first argument.

>>> import numpy as np
>>> import fastseq as fs
>>> loss, gradient = fs.losses.mean_squared_error(np.array([1.0, 3.0]), np.array([1.0, 1.0]))
>>> loss, gradient
(2.0, array([0., 2.]))
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import numpy as np

from fastseq import checks, elsewhere, threads
from fastseq.backend import COMPILED, Backend
from fastseq.checks import Array

__all__ = ["binary_cross_entropy_with_logits", "huber", "mean_squared_error", "softmax_cross_entropy"]

_counts: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("fastseq.losses", default=None)


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """Collect the number of elements of every mean taken within the block, by losses and metrics of this package.

    The trainer weights the mean of each batch by it; a function that wraps a loss need not pass it on.
    """
    counts: list[int] = []
    token = _counts.set(counts)
    try:
        yield counts
    finally:
        _counts.reset(token)


def report_count(count: int) -> None:
    """Report the number of elements of a mean to the innermost `counting`."""
    counts = _counts.get()
    if counts is not None:
        counts.append(count)


@elsewhere.hiding_private
def softmax_cross_entropy(
    logits: Any,
    targets: Any,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    lengths: Any = None,
    _backend: Backend = COMPILED,
) -> tuple[float, Array]:
    """-log softmax(logits)[target], the mean over the positions that count.

    Parameters
    ----------
    logits : array of shape (..., V)
        Real floating numbers.
    targets : array of shape (...)
        Any integer dtype, each in 0..V-1.
    ignore_index : int, optional
        A target that does not count; it may lie outside 0..V-1.
    label_smoothing : float in [0, 1]
        The share of each target that is spread over all V classes alike.
    lengths : array of shape (B,), optional
        The real steps of each row of logits (B, T, V). Past them nothing counts, whatever stands there.

    Returns
    -------
    loss : float
        0 where nothing counts.
    gradient : ndarray of shape (..., V)
        0 where a position does not count.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it should be; of a target out of range, its position and value.
    """
    x = _real(_backend, "logits", logits)
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"logits should be of shape (..., V) with V at least 1, not {x.shape}")
    smoothing = checks.number("label_smoothing", label_smoothing, least=0)
    if smoothing > 1:
        raise ValueError(f"label_smoothing should be in [0, 1], not {checks.describe(label_smoothing)}")
    given = checks.as_array("targets", targets)
    if given.shape != x.shape[:-1] or given.dtype.kind not in "iu":
        _check_classes(given, x.shape)
    given = checks.integers("targets", given)
    if given.shape != x.shape[:-1]:
        raise ValueError(f"targets should be of shape {x.shape[:-1]}, one for each row of logits, not {given.shape}")
    counted = None
    if lengths is not None:
        if x.ndim != 3:
            raise ValueError(f"logits should be of shape (B, T, V) where lengths are given, not {x.shape}")
        counted = np.arange(x.shape[1]) < checks.lengths(lengths, *x.shape[:2])[:, None]
    if ignore_index is not None:
        if isinstance(ignore_index, bool | np.bool_) or not isinstance(ignore_index, int | np.integer):
            raise TypeError(f"ignore_index should be an integer, not {checks.describe(ignore_index)}")
        real = given != ignore_index
        counted = real if counted is None else counted & real
    classes = checks.ids("targets", given, x.shape[-1], counted)
    count = classes.size if counted is None else int(np.count_nonzero(counted))
    report_count(count)
    loss, gradient = _backend.losses.softmax_cross_entropy(
        x.reshape(-1, x.shape[-1]), classes.reshape(-1), count, smoothing, threads.get_num_threads()
    )
    return loss, gradient.reshape(x.shape)


@elsewhere.hiding_private
def binary_cross_entropy_with_logits(
    logits: Any, targets: Any, *, lengths: Any = None, _backend: Backend = COMPILED
) -> tuple[float, Array]:
    """-t log sigmoid(x) - (1 - t) log(1 - sigmoid(x)), the mean over the elements that count.

    Parameters
    ----------
    logits : array
        x: real floating numbers, of any shape.
    targets : array of the shape of logits
        t: probabilities, real floating numbers.
    lengths : array of shape (B,), optional
        The real steps of each row of logits (B, T, ...). Past them nothing counts, whatever stands there.

    Returns
    -------
    loss : float
        0 where nothing counts.
    gradient : ndarray of the shape of logits
    """
    return _over_elements(_backend, "binary_cross_entropy_with_logits", "logits", logits, targets, (), lengths)


@elsewhere.hiding_private
def mean_squared_error(
    predictions: Any, targets: Any, *, lengths: Any = None, _backend: Backend = COMPILED
) -> tuple[float, Array]:
    """(prediction - target)^2, the mean over the elements that count.

    Parameters
    ----------
    predictions : array
        Real floating numbers, of any shape.
    targets : array of the shape of predictions
        Real floating numbers.
    lengths : array of shape (B,), optional
        The real steps of each row of predictions (B, T, ...). Past them nothing counts, whatever stands there.

    Returns
    -------
    loss : float
        0 where nothing counts.
    gradient : ndarray of the shape of predictions
    """
    return _over_elements(_backend, "mean_squared_error", "predictions", predictions, targets, (), lengths)


@elsewhere.hiding_private
def huber(
    predictions: Any, targets: Any, *, delta: float = 1.0, lengths: Any = None, _backend: Backend = COMPILED
) -> tuple[float, Array]:
    """d^2 / 2 where |d| <= delta, else delta (|d| - delta / 2), d = prediction - target; the mean [1]_.

    Parameters
    ----------
    predictions : array
        Real floating numbers, of any shape.
    targets : array of the shape of predictions
        Real floating numbers.
    delta : float
        Where the parabola becomes a line; more than 0.
    lengths : array of shape (B,), optional
        The real steps of each row of predictions (B, T, ...). Past them nothing counts, whatever stands there.

    Returns
    -------
    loss : float
        0 where nothing counts.
    gradient : ndarray of the shape of predictions

    References
    ----------
    .. [1] P. J. Huber, "Robust estimation of a location parameter", Annals of Mathematical Statistics 35, 1964.
    """
    more = (checks.number("delta", delta, above=0),)
    return _over_elements(_backend, "huber", "predictions", predictions, targets, more, lengths)


def _check_classes(array: Array, shape: tuple[int, ...]) -> None:
    """Refuse labels in forms that other libraries have, saying how they become classes."""
    if array.shape == shape and array.dtype.kind in "iufb" and shape[-1] > 1:
        raise ValueError(
            f"targets should be of shape {shape[:-1]}, one class for each row of logits, not {array.shape};"
            " labels.argmax(-1) makes classes of one-hot labels"
        )
    if array.size and array.dtype.kind in "fb":
        what = "booleans" if array.dtype.kind == "b" else "real numbers"
        raise TypeError(f"targets should hold integers, not {array.dtype}; targets.astype(int) makes them of {what}")


def _over_elements(
    backend: Backend, name: str, first: str, predictions: Any, targets: Any, more: tuple[float, ...], lengths: Any
) -> tuple[float, Array]:
    """The other losses ; `first` is what the first argument is called."""
    x = _real(backend, first, predictions)
    t = checks.like("targets", targets, x.dtype, x.shape)
    # Of `huber`: where the line begins has to be a number of the dtype, and more than 0.
    more = tuple(min(max(value, float(np.finfo(x.dtype).tiny)), float(np.finfo(x.dtype).max)) for value in more)
    count = x.size
    rows, time = x.shape[:2] if x.ndim > 1 else (1, x.size)
    if lengths is not None:
        if x.ndim < 2:
            raise ValueError(f"{first} should be of shape (B, T, ...) where lengths are given, not {x.shape}")
        lengths = checks.lengths(lengths, rows, time)
        count = int(lengths.sum()) * int(np.prod(x.shape[2:]))
    report_count(count)
    shape = (rows, time, int(np.prod(x.shape[2:])))
    loss, gradient = getattr(backend.losses, name)(
        x.reshape(shape), t.reshape(shape), *more, lengths, count, threads.get_num_threads()
    )
    return loss, gradient.reshape(x.shape)


def _real(backend: Backend, name: str, value: Any) -> Array:
    """An array of a dtype that the operations take, contiguous; it says itself which."""
    array = checks.as_array(name, value)
    if array.dtype.kind != "f":
        raise TypeError(f"{name} should hold real floating numbers, not {array.dtype}")
    dtype = np.dtype(array.dtype.type)
    checks.real_dtype(name, dtype, backend.dtypes)
    return np.ascontiguousarray(checks.real_array(name, array, dtype)).reshape(array.shape)
