"""What a recurrent decoder needs beside its cells, as the papers write it.

Nothing here is shared with the compiled operations of `fastseq._additive_attention`, which has the same functions.
"""

from __future__ import annotations

import numpy as np

from fastseq.checks import Array


def tanh_forward(x: Array, n_threads: int) -> Array:
    """y = tanh(x)"""
    return np.tanh(x)


def tanh_backward(y: Array, dy: Array, n_threads: int) -> Array:
    """dx = dy (1 - y^2)"""
    return dy * (1 - y * y)


def align(
    query: Array, projected: Array, keys: Array, score: Array, firsts: Array, counts: Array, n_threads: int
) -> tuple[Array, Array]:
    """Additive attention [1]_: e_j = v tanh(q + p_j), w = softmax(e), c = sum of w_j k_j.

    Parameters
    ----------
    query : array of shape (N, A)
        q of each query: W s of the paper.
    projected, keys : arrays of shapes (M, A) and (M, K)
        p and k of each key: U h + b, and h.
    score : array of shape (A,)
        v.
    firsts, counts : arrays of shape (N,)
        The first key of each query, and how many it has.
    n_threads : int
        For the compiled operation.

    Returns
    -------
    context : array of shape (N, K)
    weights : array of shape (N, max_count)
        Of as many keys as any query has; 0 past those of a query.

    References
    ----------
    .. [1] D. Bahdanau, K. Cho and Y. Bengio, "Neural machine translation by jointly learning to align and translate",
       ICLR 2015.
    """
    context = np.zeros((len(query), keys.shape[1]), query.dtype)
    weights = np.zeros((len(query), counts.max(initial=0)), query.dtype)
    with np.errstate(all="ignore"):
        for n, (q, first, count) in enumerate(zip(query, firsts, counts, strict=True)):
            own = slice(first, first + count)
            e = np.tanh(q + projected[own]) @ score
            w = np.exp(e - e.max(initial=-np.inf))
            weights[n, :count] = w = w / w.sum()
            context[n] = w @ keys[own]
    return context, weights


def align_backward(
    query: Array,
    projected: Array,
    keys: Array,
    score: Array,
    starts: Array | None,
    firsts: Array,
    counts: Array,
    weights: Array,
    dcontext: Array,
    dprojected: Array,
    dkeys: Array,
    dscore: Array,
    n_threads: int,
) -> Array:
    """The gradient of the queries; those of p, k and v are added to the arrays given.

    With t_j = tanh(q + p_j): dk_j = w_j dc;  dw_j = dc k_j;  de = w (dw - sum of w dw);  dv = sum of de_j t_j;
    dp_j = de_j v (1 - t_j^2);  dq = sum of dp_j

    Here `firsts` and `counts` are of sequences: queries starts[i]..starts[i + 1] - 1 are those of sequence i; without
    `starts` each sequence has one.
    """
    dquery = np.zeros_like(query)
    if starts is None:
        starts = np.arange(len(counts) + 1)
    with np.errstate(all="ignore"):
        for i, (first, count) in enumerate(zip(firsts, counts, strict=True)):
            own = slice(first, first + count)
            for n in range(starts[i], starts[i + 1]):
                w, dc = weights[n, :count], dcontext[n]
                dkeys[own] += np.outer(w, dc)
                dw = keys[own] @ dc
                de = w * (dw - w @ dw)
                t = np.tanh(query[n] + projected[own])
                dscore += de @ t
                du = de[:, None] * score * (1 - t * t)
                dprojected[own] += du
                dquery[n] = du.sum(axis=0)
    return dquery
