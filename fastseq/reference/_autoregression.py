"""Autoregressive models of series, in NumPy: the operations of `src/autoregression/_autoregression.pyx` once more.

`n_threads` is there because the compiled operations have it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastseq.checks import Array

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "sigmoid": lambda a: 0.5 + 0.5 * np.tanh(0.5 * a),
    "tanh": lambda a: np.tanh(a),
    "relu": lambda a: np.maximum(a, 0),
}


def triangle(x: Array, lengths: Array, order: int, first: int, n_threads: int) -> Array:
    """The triangular factor of every series' equations.

    The equations of a series are one for each step t from `first` to its end, (1, x_{t-1}, ..., x_{t-order}, x_t).
    As rows of a matrix A they have an upper triangular R with R'R = A'A and no negative diagonal: least squares of
    its last column over the others is that of A's, and its last diagonal element the root of the sum of squares.

    Parameters
    ----------
    x : ndarray of shape (S, T)
    lengths : ndarray of shape (S,)
    order, first : int
        `first` is at least `order`.

    Returns
    -------
    ndarray of shape (S, order + 2, order + 2)
    """
    result = np.zeros((len(x), order + 2, order + 2))
    for into, values, length in zip(result, x, lengths, strict=True):
        steps = np.arange(first, length)
        if len(steps):
            equations = np.stack(
                [np.ones(len(steps)), *(values[steps - k] for k in range(1, order + 1)), values[steps]]
            )
            upper = np.linalg.qr(equations.T, mode="r")
            into[: len(upper)] = upper * np.where(np.diagonal(upper) < 0, -1, 1)[:, None]
    return result


def predict(x: Array, lengths: Array, intercept: Array, coefficients: Array, n_threads: int) -> Array:
    """What is expected after every step: intercept + Σ_k coefficients[k] x_{t-k}.

    Parameters
    ----------
    x : ndarray of shape (S, T)
    lengths : ndarray of shape (S,)
    intercept : ndarray of shape (S,) or (1,)
    coefficients : ndarray of shape (S, order) or (1, order)
        The first is that of the last value.

    Returns
    -------
    ndarray of shape (S, T)
        NaN before there are `order` values; 0 past the end of a series.
    """
    order, time = coefficients.shape[1], x.shape[1]
    y = np.full_like(x, np.nan)
    if time >= order:
        y[:, order - 1 :] = intercept[:, None]
        for k in range(order):
            y[:, order - 1 :] += coefficients[:, k, None] * x[:, order - 1 - k : time - k]
    y[np.arange(time) >= lengths[:, None]] = 0
    return y


def rollout(recent: Array, intercept: Array, coefficients: Array, horizon: int, n_threads: int) -> Array:
    """What follows when each prediction is taken for a value, and the next one made from it.

    Parameters
    ----------
    recent : ndarray of shape (S, order)
        The last values of each series, oldest first.
    intercept, coefficients
        As of `predict`.

    Returns
    -------
    ndarray of shape (S, horizon)
    """
    order = coefficients.shape[1]
    y = np.concatenate([recent, np.empty((len(recent), horizon), recent.dtype)], axis=1)
    for t in range(order, order + horizon):
        y[:, t] = intercept + (coefficients * y[:, t - order : t][:, ::-1]).sum(axis=1)
    return y[:, order:]


def rollout_perceptron(
    recent: Array,
    hidden_weight: Array,
    hidden_bias: Array,
    output_weight: Array,
    output_bias: Array,
    activation: str,
    horizon: int,
    n_threads: int,
) -> Array:
    """The same for a perceptron: the next value is output_weight f(hidden_weight x + hidden_bias) + output_bias.

    Parameters
    ----------
    recent : ndarray of shape (S, order)
        The last values of each series, oldest first.
    hidden_weight : ndarray of shape (hidden, order)
    hidden_bias : ndarray of shape (hidden,)
    output_weight : ndarray of shape (1, hidden)
    output_bias : ndarray of shape (1,)
    activation : {"sigmoid", "tanh", "relu"}
        f.

    Returns
    -------
    ndarray of shape (S, horizon)
    """
    order = recent.shape[1]
    y = np.concatenate([recent, np.empty((len(recent), horizon), recent.dtype)], axis=1)
    for t in range(order, order + horizon):
        hidden = _ACTIVATIONS[activation](y[:, t - order : t] @ hidden_weight.T + hidden_bias)
        y[:, t] = (hidden @ output_weight.T + output_bias)[:, 0]
    return y[:, order:]


def activate(x: Array, activation: str) -> Array:
    """What `rollout_perceptron` makes of its hidden units: "sigmoid", "tanh" or "relu" of each element."""
    return _ACTIVATIONS[activation](x)
