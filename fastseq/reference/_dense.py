"""Linear, embedding, norms, activations, softmax and dropout as the textbooks write them.

Nothing here is shared with the compiled operations of `fastseq._dense`, which has the same functions. Arrays are
(rows, width). Each `_backward` returns the gradient of x, and adds to the arrays given for those of the parameters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastseq.checks import Array
from fastseq.narrow import NarrowArray


def linear_pack(weight: Any, bias: Array | None) -> tuple[Any, Array | None]:
    """The weights as the two below want them."""
    return weight, bias


def linear_forward(packed: tuple[Any, Array | None], x: Array, n_threads: int) -> Array:
    """y = x W^T + b"""
    W, b = packed
    y: Array = x @ W.T if b is None else x @ W.T + b
    return y


def linear_backward(
    packed: tuple[Array, Array | None], x: Array, dy: Array, dweight: Array, dbias: Array | None, n_threads: int
) -> Array:
    """dx = dy W;  dW = dy^T x;  db = sum over rows of dy"""
    W, _ = packed
    dweight += dy.T @ x
    if dbias is not None:
        dbias += dy.sum(axis=0)
    return dy @ W


def embedding_forward(weight: Array | NarrowArray, ids: Array, n_threads: int) -> Array:
    """The rows of a matrix that ids (rows,) name, as reals."""
    return weight.rows(ids) if isinstance(weight, NarrowArray) else weight[ids]


def embedding_backward(ids: Array, dy: Array, dweight: Array, padding_idx: int, n_threads: int) -> None:
    """Add each row of dy to the gradient of its id; that of `padding_idx` to none."""
    counted = ids != padding_idx
    np.add.at(dweight, ids[counted], dy[counted])


def far_rows(x: Array, squares: Array) -> tuple[Array, Array]:
    """Which rows have squares outside the range of their dtype, and the power of two that brings each of them near 1.

    Not those that are 0, or have something that is no number: nothing helps them.
    """
    info = np.finfo(x.dtype)
    outside = ~((squares >= info.tiny / info.eps) & (squares <= info.max))
    limit = np.abs(x).max(axis=1, initial=0)
    rows = np.flatnonzero(outside & np.isfinite(limit) & (limit >= info.tiny))
    exponents = np.clip(1 - np.frexp(limit[rows])[1], info.minexp, info.maxexp - 1)
    return rows, np.ldexp(np.ones(len(rows), np.promote_types(x.dtype, np.float64)), exponents)


def normalised(x: Array, eps: float, centred: bool) -> tuple[Array, Array, Array]:
    """(x - mean) scale; the mean, 0 if not `centred`; scale = 1 / sqrt(mean of (x - mean)^2 + eps)"""
    with np.errstate(all="ignore"):
        mean = x.mean(axis=1) if centred else np.zeros(len(x), x.dtype)
        d = x - mean[:, None] if centred else x
        squares = (d * d).mean(axis=1) + x.dtype.type(eps)
        scale = 1 / np.sqrt(squares)
        y = d * scale[:, None]
        rows, units = far_rows(x, squares)
        if len(rows):
            wide = x[rows] * units[:, None]
            middle = wide.mean(axis=1) if centred else np.zeros(len(rows))
            d = wide - middle[:, None]
            root = np.sqrt((d * d).mean(axis=1) + eps * units * units)
            good = np.isfinite(root) & (root > 0)
            y[rows[good]] = (d / root[:, None])[good]
            mean[rows[good]], scale[rows[good]] = (middle / units)[good], (units / root)[good]
    return y, mean, scale


def layer_norm_forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, n_threads: int
) -> tuple[Array, Array, Array]:
    """y = (x - mean) / sqrt(variance + eps) weight + bias; mean and 1 / sqrt(variance + eps) are kept"""
    y, mean, scale = normalised(x, eps, True)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y, mean, scale


def layer_norm_backward(
    x: Array,
    weight: Array | None,
    means: Array,
    scales: Array,
    dy: Array,
    dweight: Array | None,
    dbias: Array | None,
    n_threads: int,
) -> Array:
    """With g = dy weight and x^ = (x - mean) scale: dx = scale (g - mean of g - x^ mean of g x^)"""
    scale = scales[:, None]
    normal = (x - means[:, None]) * scale
    if dweight is not None:
        dweight += (dy * normal).sum(axis=0)
    if dbias is not None:
        dbias += dy.sum(axis=0)
    g = dy if weight is None else dy * weight
    dx: Array = scale * (g - g.mean(axis=1, keepdims=True) - normal * (g * normal).mean(axis=1, keepdims=True))
    return dx


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(z: Array) -> Array:
    """The finaliser of splitmix64, of 64-bit unsigned integers that wrap around."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_words(index: Array, seed: int, stream: int) -> Array:
    """32 random bits for each 64-bit index into a stream of a seed: the hash that src/kernels/rows.h defines."""
    key = mix(mix(np.array([seed], np.uint64) + GOLDEN) + np.uint64(stream) + GOLDEN)
    key = mix(key + (index >> np.uint64(32)) + GOLDEN)
    h = index.astype(np.uint32) + key.astype(np.uint32)
    h = ((h ^ (h >> np.uint32(17))) * np.uint32(0xED5AD4BB)) ^ (key >> np.uint64(32)).astype(np.uint32)
    h = (h ^ (h >> np.uint32(11))) * np.uint32(0xAC4C1B51)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x31848BAB)
    return h ^ (h >> np.uint32(14))


def dropout(x: Array, p: float, seed: int, stream: int, n_threads: int) -> Array:
    """Each element of x times 1 / (1 - p), or 0 with probability p.

    Its own backward: the same elements are kept for the same seed, stream and position.

    Parameters
    ----------
    x : array
        Contiguous; element i is the i-th in memory.
    p : float in [0, 1)
    seed, stream : int
        What the mask is a function of, besides the position.
    n_threads : int
        For the compiled operation.
    """
    threshold = min(int(np.ceil(p * 2**32)), 2**32 - 1)
    kept = random_words(np.arange(x.size, dtype=np.uint64), seed, stream) >= threshold
    factor: Any = x.dtype.type(1 / (1 - p))
    return np.where(kept.reshape(x.shape), x * factor, x.dtype.type(0))


def rms_norm_forward(x: Array, weight: Array | None, eps: float, n_threads: int) -> tuple[Array, Array]:
    """y = x scale weight with scale = 1 / sqrt(mean of x^2 + eps), which is kept"""
    y, _, scale = normalised(x, eps, False)
    return (y if weight is None else y * weight), scale


def rms_norm_backward(
    x: Array, weight: Array | None, scales: Array, dy: Array, dweight: Array | None, n_threads: int
) -> Array:
    """With g = dy weight and x^ = x scale: dx = scale (g - x^ mean of g x^)"""
    scale = scales[:, None]
    normal = x * scale
    if dweight is not None:
        dweight += (dy * normal).sum(axis=0)
    g = dy if weight is None else dy * weight
    dx: Array = scale * (g - normal * (g * normal).mean(axis=1, keepdims=True))
    return dx


ERFC = np.frompyfunc(math.erfc, 1, 1)
ROOT_2_OVER_PI, CUBIC = math.sqrt(2 / math.pi), 0.044715


def widened(x: Array) -> Array:
    """x in a dtype in which what a GELU makes of it is exact to its own."""
    return x.astype(np.promote_types(x.dtype, np.float64), copy=False)


def normal_cdf(x: Array) -> Array:
    """The share of a normal distribution that lies below x; erfc, so that nothing cancels where it is small."""
    tail: Any = ERFC(x.astype(np.float64) * -math.sqrt(0.5))
    return np.asarray(0.5 * tail, x.dtype)


def activation_forward(x: Array, kind: str, n_threads: int) -> Array:
    """relu: max(x, 0);  gelu: x Phi(x);  gelu_tanh: x / 2 (1 + tanh u) with u = sqrt(2 / pi) (x + 0.044715 x^3);

    tanh;  sigmoid: 1 / (1 + exp(-x));  silu: x sigmoid(x)
    """
    if kind == "relu":
        return np.maximum(x, x.dtype.type(0))
    wide = widened(x)
    with np.errstate(all="ignore"):
        if kind == "tanh":
            return np.asarray(np.tanh(wide), x.dtype)
        if kind in ("sigmoid", "silu"):
            sigmoid = 1 / (1 + np.exp(-wide))
            return np.asarray(sigmoid if kind == "sigmoid" else wide * sigmoid, x.dtype)
        share = normal_cdf(wide) if kind == "gelu" else half_of_one_plus_tanh(wide)
        return np.asarray(wide * share, x.dtype)


def half_of_one_plus_tanh(x: Array) -> Array:
    """(1 + tanh u) / 2 of the u above, as 1 / (1 + exp(-2 u)): where it is small, nothing cancels"""
    return 1 / (1 + np.exp(-2 * ROOT_2_OVER_PI * (x + CUBIC * x * x * x)))


def activation_backward(x: Array, dy: Array, kind: str, n_threads: int) -> Array:
    """relu: dy where x > 0;  gelu: Phi(x) + x phi(x);  gelu_tanh: s + x s (1 - s) 2 du/dx with s = (1 + tanh u) / 2;

    tanh: 1 / cosh(x)^2;  sigmoid: s (1 - s) with s = 1 / (1 + exp(-x));  silu: s + x s (1 - s)
    """
    if kind == "relu":
        return np.where(x > 0, dy, x.dtype.type(0))
    wide = widened(x)
    with np.errstate(all="ignore"):
        if kind == "gelu":
            slope = normal_cdf(wide) + wide * np.exp(-wide * wide / 2) / math.sqrt(2 * math.pi)
        elif kind == "tanh":
            slope = 1 / np.cosh(wide) ** 2
        elif kind in ("sigmoid", "silu"):
            s, rest = 1 / (1 + np.exp(-wide)), 1 / (1 + np.exp(wide))
            slope = s * rest if kind == "sigmoid" else s + np.where(s * rest == 0, 0, wide * s * rest)
        else:
            s = half_of_one_plus_tanh(wide)
            steep = wide * s * (1 - s) * (2 * ROOT_2_OVER_PI * (1 + 3 * CUBIC * wide * wide))
            slope = s + np.where(s * (1 - s) == 0, 0, steep)  # far from 0, where x^2 may be inf
        return np.asarray(dy * slope, x.dtype)


def softmax_forward(x: Array, n_threads: int) -> Array:
    """y = exp(x - max) / sum of exp(x - max); 0 where the whole row is -inf"""
    with np.errstate(all="ignore"):
        top = x.max(axis=1, keepdims=True, initial=-np.inf)
        e = np.exp(x - top)
        return np.where(top == -np.inf, x.dtype.type(0), e / e.sum(axis=1, keepdims=True))


def softmax_backward(y: Array, dy: Array, n_threads: int) -> Array:
    """dx = y (dy - sum of dy y)"""
    return y * (dy - (dy * y).sum(axis=1, keepdims=True))
