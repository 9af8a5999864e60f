"""Metrics of predictions, each a mean over the positions or elements that count.

>>> import numpy as np
>>> import fastseq as fs
>>> logits = np.array([[[0.1, 0.9], [0.8, 0.2], [0.0, 0.0]]])
>>> fs.training.metrics.accuracy(logits, np.array([[1, 1, 0]]), lengths=[2])
0.5
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.losses import report_count

__all__ = ["accuracy", "binary_accuracy", "mean_absolute_error", "mean_squared_error"]

IGNORED = (-1, -100)  # targets that never count, as the models and PyTorch mark them


def accuracy(outputs: Any, targets: Any, lengths: Any = None, *, ignore_index: int | None = None) -> float:
    """Share of the positions whose largest output is that of the target class.

    Parameters
    ----------
    outputs : array of shape (..., V)
        Logits or probabilities; of equal ones the lowest class is taken.
    targets : array of shape (...)
        Classes, of any integer dtype. Those of -1 and -100 do not count.
    lengths : array of shape (B,), optional
        The real steps of each row of targets (B, T). Past them nothing counts.
    ignore_index : int, optional
        Another target that does not count.

    Returns
    -------
    float
        NaN where nothing counts.
    """
    scores = _numbers("outputs", outputs)
    if not scores.ndim or scores.shape[-1] < 2:
        raise ValueError(
            f"outputs should be of shape (..., V) with V at least 2, not {scores.shape};"
            " for one logit a position there is binary_accuracy"
        )
    classes = checks.integers("targets", targets)
    if classes.shape != scores.shape[:-1]:
        raise ValueError(f"targets should be of shape {scores.shape[:-1]}, one for each position, not {classes.shape}")
    ignored = IGNORED if ignore_index is None else (*IGNORED, _index(ignore_index))
    counts = _real(classes, lengths) & ~np.isin(classes, ignored)
    return _mean(scores.argmax(axis=-1) == classes, counts)


def binary_accuracy(outputs: Any, targets: Any, lengths: Any = None) -> float:
    """Share of the elements whose logit is above 0 exactly where the target is 1.

    Parameters
    ----------
    outputs : array of shape (...) or (..., 1)
        Logits.
    targets : array of shape (...)
        0 or 1, booleans, or probabilities, which are taken for 1 above one half. Integers of -1 and -100 do not count.
    lengths : array of shape (B,), optional
        The real steps of each row (B, T, ...). Past them nothing counts.

    Returns
    -------
    float
        NaN where nothing counts.
    """
    given = checks.as_array("targets", targets)
    logits, wanted = _pair(outputs, given.astype(np.int8) if given.dtype.kind == "b" else given)
    counts = _real(wanted, lengths)
    if wanted.dtype.kind in "iu":
        counts = counts & ~np.isin(wanted, IGNORED)
    return _mean((logits > 0) == (wanted > 0.5), counts)


def mean_absolute_error(outputs: Any, targets: Any, lengths: Any = None) -> float:
    """|output - target|, the mean over the elements that count.

    Parameters
    ----------
    outputs, targets : arrays of one shape
        Real numbers. A last axis of 1 may be left out of either.
    lengths : array of shape (B,), optional
        The real steps of each row (B, T, ...). Past them nothing counts.

    Returns
    -------
    float
        NaN where nothing counts.
    """
    predicted, wanted = _pair(outputs, targets)
    return _mean(np.abs(_difference(predicted, wanted)), _real(wanted, lengths))


def mean_squared_error(outputs: Any, targets: Any, lengths: Any = None) -> float:
    """(output - target)^2, the mean over the elements that count.

    Parameters
    ----------
    outputs, targets : arrays of one shape
        Real numbers. A last axis of 1 may be left out of either.
    lengths : array of shape (B,), optional
        The real steps of each row (B, T, ...). Past them nothing counts.

    Returns
    -------
    float
        NaN where nothing counts.
    """
    predicted, wanted = _pair(outputs, targets)
    return _mean(np.square(_difference(predicted, wanted)), _real(wanted, lengths))


def _numbers(name: str, value: Any) -> Array:
    """Real numbers, integers too."""
    array = checks.as_array(name, value)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} should hold real numbers, not {array.dtype}")
    return array


def _index(value: Any) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise TypeError(f"ignore_index should be an integer, not {checks.describe(value)}")
    return int(value)


def _pair(outputs: Any, targets: Any) -> tuple[Array, Array]:
    """Outputs and targets, of one shape."""
    one, other = _numbers("outputs", outputs), _numbers("targets", targets)
    if one.shape == (*other.shape, 1):
        one = one[..., 0]
    elif other.shape == (*one.shape, 1):
        other = other[..., 0]
    if one.shape != other.shape:
        raise ValueError(f"targets should be of shape {one.shape}, as outputs, not {other.shape}")
    return one, other


def _difference(one: Array, other: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):  # what stands in the padding may be anything
        result: Array = one.astype(np.float64) - other.astype(np.float64)
    return result


def _real(targets: Array, lengths: Any) -> Array:
    """Elements of targets that are not padding."""
    if lengths is None:
        return np.ones(targets.shape, bool)
    if targets.ndim < 2:
        raise ValueError(f"targets should be of shape (B, T, ...) where lengths are given, not {targets.shape}")
    known = checks.lengths(lengths, *targets.shape[:2])
    steps = np.arange(targets.shape[1]) < known[:, None]
    return np.broadcast_to(steps.reshape(*steps.shape, *[1] * (targets.ndim - 2)), targets.shape)


def _mean(values: Array, counts: Array) -> float:
    """The mean of the values that count, whose number is reported."""
    count = int(np.count_nonzero(counts))
    report_count(count)
    return float(values[counts].mean(dtype=np.float64)) if count else math.nan
