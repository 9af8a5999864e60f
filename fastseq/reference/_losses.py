"""The losses as the textbooks write them, each with its gradient.

Nothing here is shared with the compiled operations of `fastseq._losses`, which has the same functions. Each returns
the mean over what counts, and the gradient of that mean; what does not count is not looked at, and its gradient is 0.
"""

from __future__ import annotations

import numpy as np

from fastseq.checks import Array
from fastseq.reference._recurrent import sigmoid


@np.errstate(all="ignore")
def softmax_cross_entropy(
    logits: Array, targets: Array, count: int, label_smoothing: float, n_threads: int
) -> tuple[float, Array]:
    """-sum of q log p, where p = softmax(logits) and q is 1 at the target, or smoothed.

    Parameters
    ----------
    logits : array of shape (rows, classes)
    targets : int64 array of shape (rows,)
        A class; -1 in a row that does not count.
    count : int
        Rows that count.
    label_smoothing : float
        The share of q that is spread over all classes alike.
    n_threads : int
        For the compiled operation.
    """
    gradient = np.zeros_like(logits)
    rows = np.flatnonzero(targets >= 0)
    if not count:
        return 0.0, gradient
    x = logits[rows]
    classes = x.shape[1]
    smoothing = x.dtype.type(label_smoothing)
    q = np.full_like(x, smoothing / classes)
    q[np.arange(count), targets[rows]] += 1 - smoothing
    shifted = x - x.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    gradient[rows] = (np.exp(log_p) - q) / count
    wanted = np.where(q == 0, 0, -q * log_p)  # a class that is neither wanted nor possible costs nothing
    return _sum(wanted) / count, gradient


@np.errstate(all="ignore")
def binary_cross_entropy_with_logits(
    logits: Array, targets: Array, lengths: Array | None, count: int, n_threads: int
) -> tuple[float, Array]:
    """-t log p - (1 - t) log(1 - p) = max(x, 0) - x t + log(1 + exp(-|x|)), where p = sigmoid(x)

    Parameters
    ----------
    logits, targets : arrays of shape (rows, time, inner)
    lengths : int64 array of shape (rows,), or None
        Steps of each row that count.
    count : int
        Elements that count.
    n_threads : int
        For the compiled operation.
    """
    counted = _counted(logits, lengths)
    x, t = logits[counted], targets[counted]
    losses = np.maximum(x, 0) - x * t + np.log1p(np.exp(-np.abs(x)))
    miss = np.where(x > 0, 1 - t, t)
    far = np.where(miss == 0, miss, miss * np.abs(x))  # 0 times infinity is 0 here
    losses = np.where(np.isinf(x), far, losses)
    return _mean(losses, sigmoid(x) - t, logits, counted, count)


@np.errstate(all="ignore")
def mean_squared_error(
    predictions: Array, targets: Array, lengths: Array | None, count: int, n_threads: int
) -> tuple[float, Array]:
    """(x - t)^2; arguments as above"""
    counted = _counted(predictions, lengths)
    d = predictions[counted] - targets[counted]
    loss, half = _mean(d * d, d, predictions, counted, count)
    return loss, 2 * half


@np.errstate(all="ignore")
def huber(
    predictions: Array, targets: Array, delta: float, lengths: Array | None, count: int, n_threads: int
) -> tuple[float, Array]:
    """d^2 / 2 where |d| <= delta, else delta (|d| - delta / 2), where d = x - t; arguments as above"""
    counted = _counted(predictions, lengths)
    d = predictions[counted] - targets[counted]
    losses = np.where(np.abs(d) <= delta, d * d / 2, delta * (np.abs(d) - delta / 2))
    return _mean(losses, np.clip(d, -delta, delta), predictions, counted, count)


def _counted(x: Array, lengths: Array | None) -> Array:
    """Which elements of x count."""
    if lengths is None:
        return np.ones(x.shape, bool)
    return np.broadcast_to((np.arange(x.shape[1]) < lengths[:, None])[:, :, None], x.shape)


def _mean(losses: Array, slopes: Array, x: Array, counted: Array, count: int) -> tuple[float, Array]:
    """The mean of the losses, and their slopes as its gradient where x counted."""
    gradient = np.zeros_like(x)
    if not count:
        return 0.0, gradient
    gradient[counted] = slopes / count
    return _sum(losses) / count, gradient


def _sum(losses: Array) -> float:
    """The sum, in double: its range is not that of the losses."""
    return float(losses.sum(dtype=np.promote_types(losses.dtype, np.float64)))
