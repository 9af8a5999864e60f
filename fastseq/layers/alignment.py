"""Attention of a recurrent decoder to what its encoder made of the source: multiplicative and additive scores.

Inside, queries and keys are rows, those of one sequence after those of another, as in `fastseq.layers.attention`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fastseq import _attention, _dense, checks, threads
from fastseq.checks import Array
from fastseq.layers.attention import Frame
from fastseq.layers.base import Layer, Tape
from fastseq.layers.rows import Rows, padded, rows_of


class _Given(NamedTuple):
    """Queries and keys of a call."""

    query: Array  # (N, Q)
    keys: Array  # (M, K)
    frame: Frame
    flat: bool  # one query a sequence, without the axis of queries


class Alignment(Layer):
    """What both kinds share: shapes."""

    _dense: ClassVar[Any] = _dense
    _dtypes: ClassVar[tuple[str, ...] | None] = ("float32", "float64")

    query_size: int
    key_size: int

    def _projected(self, keys: Array) -> Array:
        """What scores take of keys (M, K), which does not depend on a query."""
        raise NotImplementedError

    def _run(self, query: Array, keys: Array, projected: Array, frame: Frame, want: bool) -> tuple[Array, Any]:
        """The contexts (N, K) of queries (N, Q), and if wanted the weights, (B, T, S) of the longest sequences."""
        raise NotImplementedError

    def _step(self, query: Array, keys: Array, projected: Array, lengths: Array, want: bool) -> tuple[Array, Any]:
        """The context (B, K) of one query (B, Q) a row, and if wanted the weights (B, S); keys (B, S, K) are padded."""
        raise NotImplementedError

    def _run_forward(self, query: Array, keys: Array, frame: Frame) -> tuple[Array, Any]:
        """`_run` for training."""
        raise NotImplementedError

    def _run_backward(self, dcontext: Array, kept: Any, targets: Mapping[str, Array]) -> tuple[Array, Array]:
        """The gradients of queries and keys, as rows."""
        raise NotImplementedError

    def _opened(self, query: Any, keys: Any, lengths: Any) -> _Given:
        array = checks.real_array("keys", keys, self.dtype)
        if array.ndim != 3 or array.shape[2] != self.key_size:
            raise ValueError(f"keys should be of shape (B, S, {self.key_size}), not {array.shape}")
        batch, time = array.shape[:2]
        asked = checks.real_array("query", query, self.dtype)
        if asked.ndim not in (2, 3) or asked.shape[-1] != self.query_size or len(asked) != batch:
            raise ValueError(
                f"query should be of shape ({batch}, T, {self.query_size}) or ({batch}, {self.query_size}),"
                f" not {asked.shape}"
            )
        flat = asked.ndim == 2
        counts = None if lengths is None else checks.lengths(lengths, batch, time)
        of_keys, of_query = rows_of(batch, time, counts), rows_of(batch, 1 if flat else asked.shape[1], None)
        whole = asked[:, None] if flat else asked
        return _Given(of_query.gather(whole), of_keys.gather(array), Frame(of_query, of_keys, False), flat)

    def __call__(self, query: Any, keys: Any, *, lengths: Any = None, return_weights: bool = False) -> Any:
        """Attend.

        Parameters
        ----------
        query : array of shape (B, T, Q), or (B, Q) for one query a row
        keys : array of shape (B, S, K)
            They are the values, too.
        lengths : array of shape (B,), optional
            The real keys of each row, integers in 0..S. Whatever stands past them changes nothing.
        return_weights : bool
            Whether to return the weights, too.

        Returns
        -------
        context : ndarray of shape (B, T, K), or (B, K)
            The mean of the keys under the weights; 0 where a row has no key.
        weights : ndarray of shape (B, T, S), or (B, S)
            With `return_weights`: exactly 0 past a row's length.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        given = self._opened(query, keys, lengths)
        wanted = checks.flag("return_weights", return_weights)
        rows, weights = self._run(given.query, given.keys, self._projected(given.keys), given.frame, wanted)
        context = given.frame.queries.scatter(rows)
        if given.flat:
            context, weights = context[:, 0], None if weights is None else weights[:, 0]
        return (context, weights) if wanted else context

    def forward(self, query: Any, keys: Any, *, lengths: Any = None, seed: int | None = None) -> tuple[Array, Tape]:
        """Attend, in training.

        Parameters
        ----------
        query, keys, lengths
            As for a call. Arrays are not to be changed as long as the tape is used.
        seed : int, optional
            Nothing here is random.

        Returns
        -------
        context : ndarray of shape (B, T, K), or (B, K)
        tape : Tape
        """
        checks.seed("seed", seed)
        given = self._opened(query, keys, lengths)
        rows, kept = self._run_forward(given.query, given.keys, given.frame)
        context = given.frame.queries.scatter(rows)
        return (context[:, 0] if given.flat else context), Tape(self, (kept, given.frame, given.flat))

    def backward(
        self, dcontext: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None
    ) -> tuple[Array, Array]:
        """Gradients, given that of the contexts.

        Parameters
        ----------
        dcontext : array of shape (B, T, K), or (B, K)
        tape : Tape
            What `forward` returned.
        grads : mapping from str to ndarray, optional
            Where the gradients of the parameters are added; `grads` of the layer by default.

        Returns
        -------
        dquery : ndarray of the shape of query
        dkeys : ndarray of the shape of keys
            0 past a row's length.
        """
        kept, frame, flat = self._kept(tape)
        queries: Rows = frame.queries
        shape = (queries.batch, queries.time, self.key_size)
        given = checks.like("dcontext", dcontext, self.dtype, (shape[0], shape[2]) if flat else shape).reshape(shape)
        dquery, dkeys = self._run_backward(queries.gather(given), kept, self._targets(grads))
        spread = queries.scatter(dquery)
        return (spread[:, 0] if flat else spread), frame.keys.scatter(dkeys)

    def _weights_of(self, weights: Array, frame: Frame) -> Array:
        """Weights (B, 1, ...) of the longest sequences as (B, T, S)."""
        return padded(weights, frame.queries, frame.keys)[:, 0]


class MultiplicativeAttention(Alignment):
    """Attention with bilinear scores: s W h of a query s and a key h [1]_ (there the one called general).

    Parameters
    ----------
    query_size, key_size : int
        Q and K; W is the parameter `weight` (Q, K).
    dtype : {"float32", "float64"}
        Of parameters and outputs. Inputs of another real dtype are converted.
    seed : int, optional
        Fixes the initial parameters, uniform in ±1/sqrt(K).

    References
    ----------
    .. [1] M.-T. Luong, H. Pham and C. D. Manning, "Effective approaches to attention-based neural machine
       translation", EMNLP 2015.
    """

    _operations: ClassVar[Any] = _attention

    seed: int | None

    def __init__(self, query_size: int, key_size: int, *, dtype: Any = "float32", seed: int | None = None) -> None:
        self.query_size = checks.size("query_size", query_size, 1)
        self.key_size = checks.size("key_size", key_size, 1)
        self.dtype = checks.real_dtype("dtype", dtype, self._dtypes)
        self.seed = checks.seed("seed", seed)
        self._config = {
            "query_size": self.query_size,
            "key_size": self.key_size,
            "dtype": self.dtype.name,
            "seed": self.seed,
        }
        self._packed: tuple[Mapping[str, Array], Any] | None = None
        self._arrays = {}
        self._replace(self._initial(np.random.default_rng(self.seed)))

    def _initial(self, rng: np.random.Generator) -> dict[str, Array]:
        bound = 1 / math.sqrt(self.key_size)
        return {"weight": rng.uniform(-bound, bound, (self.query_size, self.key_size))}

    def _weights(self) -> Any:
        """The weights as the operations want them."""
        arrays, packed = self._arrays, self._packed
        if packed is not None and packed[0] is arrays:
            return packed[1]
        weights = self._dense.linear_pack(arrays["weight"], None)
        self._packed = (arrays, weights)
        return weights

    def _projected(self, keys: Array) -> Array:
        projected: Array = self._dense.linear_forward(self._weights(), keys, threads.get_num_threads())
        return projected

    def _run(self, query: Array, keys: Array, projected: Array, frame: Frame, want: bool) -> tuple[Array, Any]:
        q, k, v = query[:, None], projected[:, None], keys[:, None]
        context, weights = self._operations.attention(
            q, k, v, frame.spans, None, None, False, None, 1.0, want, threads.get_num_threads()
        )
        return context[:, 0], None if weights is None else self._weights_of(weights, frame)

    def _step(self, query: Array, keys: Array, projected: Array, lengths: Array, want: bool) -> tuple[Array, Any]:
        q, k, v = query[:, None, None], projected[:, None], keys[:, None]
        context, weights = self._operations.attention(
            q, k, v, None, lengths, None, False, None, 1.0, want, threads.get_num_threads()
        )
        return context[:, 0, 0], None if weights is None else weights[:, 0, 0]

    def _run_forward(self, query: Array, keys: Array, frame: Frame) -> tuple[Array, Any]:
        weights, n_threads = self._weights(), threads.get_num_threads()
        projected = self._dense.linear_forward(weights, keys, n_threads)
        q, k, v = query[:, None], projected[:, None], keys[:, None]
        context, kept = self._operations.attention_forward(
            q, k, v, frame.spans, None, None, False, None, 1.0, 0.0, 0, n_threads
        )
        return context[:, 0], (weights, keys, kept)

    def _run_backward(self, dcontext: Array, kept: Any, targets: Mapping[str, Array]) -> tuple[Array, Array]:
        weights, keys, of_attention = kept
        n_threads = threads.get_num_threads()
        dq, dk, dv = self._operations.attention_backward(of_attention, dcontext[:, None], n_threads)
        dprojected = np.ascontiguousarray(dk[:, 0])
        dkeys = self._dense.linear_backward(weights, keys, dprojected, targets["weight"], None, n_threads)
        return dq[:, 0], dkeys + dv[:, 0]
