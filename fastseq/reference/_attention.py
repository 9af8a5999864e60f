"""Attention and rotary positions as the textbooks write them: `attend` is the place to begin.

Nothing here is shared with the compiled operations of `fastseq._attention`, which has the same functions. Heads come
in two forms. Dense: q (B, H, Tq, D), k (B, K, Tk, D), v (B, K, Tk, E). Ragged: q (Nq, H, D), k (Nk, K, D),
v (Nk, K, E), the sequences of a batch one after another, and `spans`, the two arrays (B + 1,) of where each begins.
Query head h reads key-value head h // (H // K).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fastseq.checks import Array
from fastseq.reference._dense import dropout as dropped

Spans = tuple[Array, Array]


def attend(
    q: Array, k: Array, v: Array, allowed: Array, bias: Array, scale: Any, kept: Array
) -> tuple[Array, Array, Array]:
    """Softmax attention [1]_ of every head of one sequence, in six steps.

    Parameters
    ----------
    q : array of shape (H, Tq, D)
    k, v : arrays of shapes (K, Tk, D) and (K, Tk, E)
    allowed : boolean array that broadcasts to (H, Tq, Tk)
        Whether query i may attend to key j.
    bias : array that broadcasts to (H, Tq, Tk)
        Added to the scaled scores.
    scale : number
        1 / sqrt(D), commonly.
    kept : array that broadcasts to (H, Tq, Tk)
        What dropout multiplies each weight by; ones in inference.

    Returns
    -------
    out : array of shape (H, Tq, E)
    weights : array of shape (H, Tq, Tk)
        Before dropout.
    counted : boolean array of shape (H, Tq, Tk)
        The pairs that contribute.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
    """
    queries, keys, values = q, shared(k, len(q)), shared(v, len(q))
    scores = queries @ keys.swapaxes(1, 2)
    scaled = scores * scale + bias  # by one over the root of the key size
    weights, counted = softmax(scaled, allowed)
    weighted = weighted_rows(weights * kept, values, counted)
    out = sum(weighted, np.zeros((*q.shape[:2], v.shape[2]), q.dtype))
    return out, weights, counted


def attend_backward(
    q: Array, k: Array, v: Array, counted: Array, scale: Any, kept: Array, weights: Array, dout: Array
) -> tuple[Array, Array, Array]:
    """The gradients of `attend`, its last line first. P are the weights, M what dropout multiplies them by.

    out = (P M) V               dV = (P M)^T dout;  dP = (dout V^T) M
    P = softmax(S)              dS = P (dP - sum over keys of dP P)
    S = scale Q K^T + bias      dQ = scale dS K;  dK = scale dS^T Q

    `counted` are the pairs that contribute. A key-value head sums over the query heads that read it.
    """
    zero = q.dtype.type(0)
    keys, values = shared(k, len(q)), shared(v, len(q))
    backwards = counted.swapaxes(1, 2)
    dvalues = sum(weighted_rows((weights * kept).swapaxes(1, 2), dout, backwards), np.zeros_like(values))
    dweights = np.where(counted, (dout @ values.swapaxes(1, 2)) * kept, zero)
    products = np.where(counted, dweights * weights, zero)
    dscores = np.where(counted, weights * (dweights - products.sum(axis=2, keepdims=True)), zero) * scale
    dqueries = sum(weighted_rows(dscores, keys, counted), np.zeros_like(q))
    dkeys = sum(weighted_rows(dscores.swapaxes(1, 2), q, backwards), np.zeros_like(keys))
    return dqueries, summed(dkeys, len(k)), summed(dvalues, len(v))


def shared(heads: Array, count: int) -> Array:
    """(K, T, D) as (H, T, D): each key-value head for every query head that reads it."""
    return np.repeat(heads, count // len(heads), axis=0)


def summed(dheads: Array, count: int) -> Array:
    """The gradient of `shared`: (H, T, D) as (K, T, D)."""
    return dheads.reshape(count, len(dheads) // count, *dheads.shape[1:]).sum(axis=1)


def softmax(scores: Array, allowed: Array) -> tuple[Array, Array]:
    """exp(score) / sum of exp(score) over the pairs that count, 0 elsewhere; and which pairs count.

    Those that are allowed do, unless all of their row have a score of -inf.
    """
    top = np.where(allowed, scores, -np.inf).max(axis=2, keepdims=True, initial=-np.inf)
    counted = np.broadcast_to(allowed & (top != -np.inf), scores.shape)
    e = np.where(counted, np.exp(scores - top), scores.dtype.type(0))
    total = e.sum(axis=2, keepdims=True)
    return np.where(counted, e / total, scores.dtype.type(0)), counted


def weighted_rows(weights: Array, rows: Array, counted: Array) -> Iterator[Array]:
    """For each j: weights (H, T, j) times rows (H, j, D), of every head and t; exactly 0 where (t, j) does not count.

    That is (H, T, D) for one j after another, since together they would be large. A product of matrices would
    multiply what is in forbidden places by 0, and 0 times NaN is NaN.
    """
    for j in range(rows.shape[1]):
        yield np.where(counted[:, :, j, None], weights[:, :, j, None] * rows[:, None, j], rows.dtype.type(0))


class Sequence(NamedTuple):
    """One sequence of a batch, as views: the heads first."""

    q: Array  # (H, Tq, D)
    k: Array  # (K, Tk, D)
    v: Array  # (K, Tk, E)


class Kept(NamedTuple):
    """What `attention_backward` needs of one sequence."""

    counted: Array
    weights: Array
    factors: Array


def sequences(q: Array, k: Array, v: Array, spans: Spans | None) -> list[Sequence]:
    """The sequences of a batch in either form."""
    if spans is None:
        return [Sequence(*heads) for heads in zip(q, k, v, strict=True)]
    of_q, of_k = ([slice(*ends) for ends in pairwise(starts)] for starts in spans)
    return [
        Sequence(q[i].swapaxes(0, 1), k[j].swapaxes(0, 1), v[j].swapaxes(0, 1)) for i, j in zip(of_q, of_k, strict=True)
    ]


def longest(q: Array, k: Array, spans: Spans | None) -> tuple[int, int]:
    """Tq and Tk: of the arrays, or of the longest sequences."""
    if spans is None:
        return q.shape[2], k.shape[2]
    return int(np.diff(spans[0]).max(initial=0)), int(np.diff(spans[1]).max(initial=0))


def heads_like(q: Array, width: int) -> Array:
    """An array of the form of q and in its order of memory, with heads of another width."""
    return np.empty_like(q, shape=(*q.shape[:-1], width), subok=False)


def may_attend(tq: int, tk: int, length: int, causal: bool, window: int | None) -> Array:
    """What `lengths`, `causal` and `window` allow, (1, Tq, Tk): query i stands at key i + Tk - Tq."""
    i, j = np.arange(tq)[:, None], np.arange(tk)
    distance = i + tk - tq - j
    allowed = np.broadcast_to(j < length, (tq, tk))
    if causal:
        allowed = allowed & (distance >= 0)
    if window is not None:
        allowed = allowed & (np.abs(distance) < window)
    return allowed[None]


def masked(mask: Array | None, b: int, tq: int, tk: int, dtype: Any) -> tuple[Array, Array]:
    """What a mask says of sequence b: which pairs it allows, and what it adds to their scores."""
    nothing = np.zeros((1, 1, 1), dtype)
    if mask is None:
        return nothing == 0, nothing
    own = mask[b if mask.shape[0] > 1 else 0]
    own = own[:, : tq if own.shape[1] > 1 else 1, : tk if own.shape[2] > 1 else 1]
    return (own, nothing) if own.dtype == bool else (own != -np.inf, np.where(own == -np.inf, 0, own))


def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    spans: Spans | None,
    lengths: Array | None,
    mask: Array | None,
    causal: bool,
    window: int | None,
    scale: float,
    dropout: float,
    seed: int,
    n_threads: int,
) -> tuple[Array, Any]:
    """`attend` for every sequence of a batch, and what backward needs.

    Parameters
    ----------
    q, k, v, spans
        In either form.
    lengths : array of shape (B,), optional
        Keys past them are forbidden.
    mask : array of 4 axes that broadcasts to (B, H, Tq, Tk), optional
        Booleans, True = may attend; or numbers that are added to the scaled scores, where -inf forbids.
    causal : bool
        Whether query i may attend only to keys up to i + Tk - Tq.
    window : int, optional
        How far from that key those are that it may attend to: less than this.
    scale : float
        What scores are multiplied by.
    dropout, seed
        Weight (b, h, i, j) is dropped as element ((b H + h) Tq + i) Tk + j is by `fastseq.reference._dense.dropout`.
    n_threads : int
        For the compiled operation.
    """
    (tq, tk), batch = longest(q, k, spans), sequences(q, k, v, spans)
    factors = np.ones((len(batch), q.shape[1], tq, tk), q.dtype)
    if dropout:
        factors = dropped(factors, dropout, seed, 0, n_threads)
    out = heads_like(q, v.shape[-1])
    kept = []
    with np.errstate(all="ignore"):
        for b, (own, result) in enumerate(zip(batch, sequences(out, k, v, spans), strict=True)):
            n, m = own.q.shape[1], own.k.shape[1]
            by_mask, bias = masked(mask, b, n, m, q.dtype)
            allowed = by_mask & may_attend(n, m, m if lengths is None else lengths[b], causal, window)
            kept_here = factors[b, :, :n, :m]
            result.q[...], weights, counted = attend(*own, allowed, bias, q.dtype.type(scale), kept_here)
            kept.append(Kept(counted, weights, kept_here))
    return out, (q, k, v, spans, q.dtype.type(scale), kept)


def attention(
    q: Array,
    k: Array,
    v: Array,
    spans: Spans | None,
    lengths: Array | None,
    mask: Array | None,
    causal: bool,
    window: int | None,
    scale: float,
    want_weights: bool,
    n_threads: int,
) -> tuple[Array, Array | None]:
    """`attention_forward` without dropout: the outputs, and if wanted the weights (B, H, Tq, Tk)."""
    out, kept = attention_forward(q, k, v, spans, lengths, mask, causal, window, scale, 0.0, 0, n_threads)
    if not want_weights:
        return out, None
    weights = np.zeros((len(kept[-1]), q.shape[1], *longest(q, k, spans)), q.dtype)
    for into, own in zip(weights, kept[-1], strict=True):
        into[:, : own.weights.shape[1], : own.weights.shape[2]] = own.weights
    return out, weights


def attention_backward(kept: Any, dout: Array, n_threads: int) -> tuple[Array, Array, Array]:
    """`attend_backward` for every sequence of a batch: dq, dk, dv in the forms of q, k, v."""
    q, k, v, spans, scale, of_sequences = kept
    dq, dk, dv = (heads_like(array, array.shape[-1]) for array in (q, k, v))
    batch = zip(
        sequences(q, k, v, spans),
        sequences(dout, k, v, spans),
        sequences(dq, dk, dv, spans),
        of_sequences,
        strict=True,
    )
    with np.errstate(all="ignore"):
        for own, given, result, (counted, weights, factors) in batch:
            gradients = attend_backward(*own, counted, scale, factors, weights, given.q)
            for into, gradient in zip(result, gradients, strict=True):
                into[...] = gradient
    return dq, dk, dv


def rotary(
    x: Array, cos: Array, sin: Array, positions: Array, interleaved: bool, inverse: bool, n_threads: int
) -> Array:
    """Rotary positions [1]_: turn pairs of elements by angles that grow with the position.

    a' = a cos - b sin;  b' = b cos + a sin

    Parameters
    ----------
    x : array of shape (N, H, D)
    cos, sin : arrays of shape (P, R / 2)
        Of the angle of each pair at each position; the first R of the D elements are turned.
    positions : array of shape (N,)
        Of each row, less than P.
    interleaved : bool
        Whether a pair is (2 i, 2 i + 1), and not (i, i + R / 2).
    inverse : bool
        Whether to turn back, which is the gradient too.
    n_threads : int
        For the compiled operation.

    References
    ----------
    .. [1] J. Su et al., "RoFormer: enhanced transformer with rotary position embedding", arXiv:2104.09864, 2021.
    """
    half = cos.shape[1]
    c, s = cos[positions, None], sin[positions, None]
    if inverse:
        s = -s
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    a, b = x[..., first], x[..., second]
    y = np.array(x, order="C")
    y[..., first] = a * c - b * s
    y[..., second] = b * c + a * s
    return y
