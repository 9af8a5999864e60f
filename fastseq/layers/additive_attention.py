"""Attention of a recurrent decoder to what its encoder made of the source: multiplicative and additive scores.

Inside, queries and keys are rows, those of one sequence after those of another, as in `fastseq.layers.attention`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fastseq import checks, threads
from fastseq.checks import Array
from fastseq.layers.attention import Frame
from fastseq.layers.base import SEQUENCE, Composite, Configured, Tape, seeds_of
from fastseq.layers.derived import Derived
from fastseq.layers.linear import Linear
from fastseq.layers.rows import Rows, padded, rows_of
from fastseq.layers.settings import KW_ONLY, Dtype, flag, floating, random_seed, size


class _Given(NamedTuple):
    """Queries and keys of a call."""

    query: Array  # (N, Q)
    keys: Array  # (M, K)
    frame: Frame
    flat: bool  # one query a sequence, without the axis of queries


class Alignment(Configured):
    """What both kinds share: shapes."""

    time = SEQUENCE

    _naming: ClassVar[tuple[str, ...]] = ("__call__", "forward")

    query_size: int = size(doc="Q.")
    key_size: int = size(doc="K.")

    @abstractmethod
    def _project_keys(self, keys: Array) -> Array:
        """Return what scores take of keys (M, K), which does not depend on a query: (M, A)."""

    @abstractmethod
    def _attend(self, query: Array, keys: Array, projected: Array, frame: Frame, want: bool) -> tuple[Array, Any]:
        """Return the contexts (N, K) of queries (N, Q), and if wanted the attention weights (B, T, S)."""

    @abstractmethod
    def _attend_padded(self, query: Array, keys: Array, projected: Array, lengths: Array) -> Array:
        """Return the context (B, K) of one query (B, Q) a row; keys (B, S, K) and projected (B, S, A) are padded."""

    @abstractmethod
    def _attend_forward(self, query: Array, keys: Array, frame: Frame) -> tuple[Array, Any]:
        """`_attend` in training: the contexts, and what `_attend_backward` needs."""

    @abstractmethod
    def _attend_backward(self, dcontext: Array, kept: Any, targets: Mapping[str, Array]) -> tuple[Array, Array]:
        """Return the gradients of queries (N, Q) and keys (M, K)."""

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
        projected = self._project_keys(given.keys)
        rows, weights = self._attend(given.query, given.keys, projected, given.frame, wanted)
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
        rows, kept = self._attend_forward(given.query, given.keys, given.frame)
        context = given.frame.queries.scatter(rows)
        return (context[:, 0] if given.flat else context), Tape(self, (kept, given.frame, given.flat))

    def backward(self, dcontext: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> tuple[Array, Array]:
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
        dquery, dkeys = self._attend_backward(queries.gather(given), kept, self._targets(grads))
        spread = queries.scatter(dquery)
        return (spread[:, 0] if flat else spread), frame.keys.scatter(dkeys)

    def _weights_of(self, weights: Array, frame: Frame) -> Array:
        """Weights (B, 1, ...) of the longest sequences as (B, T, S)."""
        return padded(weights, frame.queries, frame.keys)[:, 0]


class MultiplicativeAttention(Alignment):
    """Attention with bilinear scores: s W h of a query s and a key h [1]_ (there the one called general).

    W is the parameter `weight` (Q, K).

    References
    ----------
    .. [1] M.-T. Luong, H. Pham and C. D. Manning, "Effective approaches to attention-based neural machine
       translation", EMNLP 2015.
    """

    _products = ("weight",)

    _: KW_ONLY
    dtype: Dtype = floating(default="float32")
    seed: int | None = random_seed(default=None, doc="Fixes the initial parameters, uniform in ±1/sqrt(K).")

    def _build(self) -> None:
        self._packed: Derived[Any] = Derived()
        super()._build()

    def _initial(self, rng: np.random.Generator) -> dict[str, Array]:
        bound = 1 / math.sqrt(self.key_size)
        return {"weight": rng.uniform(-bound, bound, (self.query_size, self.key_size))}

    def _weights(self) -> Any:
        """The weights as the operations want them."""
        return self._packed.get(self._arrays, self._pack)

    def _pack(self, arrays: Mapping[str, Array]) -> Any:
        return self._backend.dense.linear_pack(arrays["weight"], None)

    def _project_keys(self, keys: Array) -> Array:
        projected: Array = self._backend.dense.linear_forward(self._weights(), keys, threads.get_num_threads())
        return projected

    def _attend(self, query: Array, keys: Array, projected: Array, frame: Frame, want: bool) -> tuple[Array, Any]:
        q, k, v = query[:, None], projected[:, None], keys[:, None]
        context, weights = self._backend.attention.attention(
            q, k, v, frame.spans, None, None, False, None, 1.0, want, threads.get_num_threads()
        )
        return context[:, 0], None if weights is None else self._weights_of(weights, frame)

    def _attend_padded(self, query: Array, keys: Array, projected: Array, lengths: Array) -> Array:
        q, k, v = query[:, None, None], projected[:, None], keys[:, None]
        context, _ = self._backend.attention.attention(
            q, k, v, None, lengths, None, False, None, 1.0, False, threads.get_num_threads()
        )
        return context[:, 0, 0]

    def _attend_forward(self, query: Array, keys: Array, frame: Frame) -> tuple[Array, Any]:
        weights, n_threads = self._weights(), threads.get_num_threads()
        projected = self._backend.dense.linear_forward(weights, keys, n_threads)
        q, k, v = query[:, None], projected[:, None], keys[:, None]
        context, kept = self._backend.attention.attention_forward(
            q, k, v, frame.spans, None, None, False, None, 1.0, 0.0, 0, n_threads
        )
        return context[:, 0], (weights, keys, kept)

    def _attend_backward(self, dcontext: Array, kept: Any, targets: Mapping[str, Array]) -> tuple[Array, Array]:
        weights, keys, of_attention = kept
        n_threads = threads.get_num_threads()
        dq, dk, dv = self._backend.attention.attention_backward(of_attention, dcontext[:, None], n_threads)
        dprojected = np.ascontiguousarray(dk[:, 0])
        dkeys = self._backend.dense.linear_backward(weights, keys, dprojected, targets["weight"], None, n_threads)
        return dq[:, 0], dkeys + dv[:, 0]


class AdditiveAttention(Alignment, Composite):
    """Attention with scores v tanh(W s + U h + b) of a query s and a key h [1]_.

    W is the parameter `query.weight` (A, Q), U is `key.weight` (A, K), b is `key.bias` (A,) and v is `score.weight`
    (1, A).

    References
    ----------
    .. [1] D. Bahdanau, K. Cho and Y. Bengio, "Neural machine translation by jointly learning to align and translate",
       ICLR 2015.
    """

    _real_children = ("score",)  # a vector, which no product with rows takes

    hidden_size: int = size(doc="A.")
    _: KW_ONLY
    bias: bool = flag(default=True, doc="Whether there is b.")
    dtype: Dtype = floating(default="float32")
    seed: int | None = random_seed(default=None, doc="Fixes the initial parameters, each uniform in ±1/sqrt(columns).")

    def _build(self) -> None:
        linear = self._backend.of(Linear)
        seeds, of_type = seeds_of(self.seed, 3), {"dtype": self.dtype}
        self._query = linear(self.query_size, self.hidden_size, False, seed=seeds[0], **of_type)
        self._key = linear(self.key_size, self.hidden_size, self.bias, seed=seeds[1], **of_type)
        self._score = linear(self.hidden_size, 1, False, seed=seeds[2], **of_type)
        self._children = {"query": self._query, "key": self._key, "score": self._score}

    @staticmethod
    def _places(frame: Frame) -> tuple[Array, Array, Array]:
        """Where the queries of each sequence begin, and its keys, and how many those are."""
        starts = frame.keys.starts
        return frame.queries.starts, starts[:-1], np.diff(starts)

    def _aligned(self, q: Array, projected: Array, keys: Array, firsts: Array, counts: Array) -> tuple[Array, Array]:
        """Contexts of queries after their linear map, each with keys of its own, and weights."""
        result: tuple[Array, Array] = self._backend.additive_attention.align(
            q, projected, keys, self._score._arrays["weight"][0], firsts, counts, threads.get_num_threads()
        )
        return result

    def _project_keys(self, keys: Array) -> Array:
        projected: Array = self._key(keys)
        return projected

    def _attend(self, query: Array, keys: Array, projected: Array, frame: Frame, want: bool) -> tuple[Array, Any]:
        context, weights = self._all(self._query(query), projected, keys, frame)
        if not want:
            return context, None
        whole = np.zeros((frame.queries.batch, frame.queries.time, frame.keys.time), weights.dtype)
        whole[:, :, : weights.shape[1]] = frame.queries.scatter(weights)
        return context, whole

    def _all(self, q: Array, projected: Array, keys: Array, frame: Frame) -> tuple[Array, Array]:
        starts, firsts, counts = self._places(frame)
        many = np.diff(starts)
        return self._aligned(q, projected, keys, np.repeat(firsts, many), np.repeat(counts, many))

    def _attend_padded(self, query: Array, keys: Array, projected: Array, lengths: Array) -> Array:
        batch, time = keys.shape[:2]
        of_keys, flat = (array.reshape(batch * time, array.shape[2]) for array in (keys, projected))
        return self._attend_step(query, of_keys, flat, np.arange(batch) * time, lengths)[0]

    def _attend_step(
        self, query: Array, keys: Array, projected: Array, firsts: Array, counts: Array
    ) -> tuple[Array, Array]:
        """Return the context (B, K) of one query (B, Q) a row, and attention weights (B, S)."""
        return self._aligned(self._query(query), projected, keys, firsts, counts)

    def _attend_forward(self, query: Array, keys: Array, frame: Frame) -> tuple[Array, Any]:
        q, of_query = self._query.forward(query)
        projected, of_keys = self._key.forward(keys)
        score = self._score._arrays["weight"][0]
        context, weights = self._all(q, projected, keys, frame)
        return context, (q, projected, keys, score, weights, self._places(frame), of_query, of_keys)

    def _attend_backward(self, dcontext: Array, kept: Any, targets: Mapping[str, Array]) -> tuple[Array, Array]:
        q, projected, keys, score, weights, (starts, firsts, counts), of_query, of_keys = kept
        of_children: Mapping[str, Any] = self._child_targets(targets)
        dprojected, dkeys = np.zeros_like(projected), np.zeros_like(keys)
        dq = self._backend.additive_attention.align_backward(
            q,
            projected,
            keys,
            score,
            starts,
            firsts,
            counts,
            weights,
            np.ascontiguousarray(dcontext),
            dprojected,
            dkeys,
            of_children["score"]["weight"][0],
            threads.get_num_threads(),
        )
        dquery = self._query.backward(dq, of_query, grads=of_children["query"])
        return dquery, dkeys + self._key.backward(dprojected, of_keys, grads=of_children["key"])


class AttentionSteps:
    """Additive attention in training whose queries come step by step, as those of a decoder do.

    Parameters
    ----------
    attention : AdditiveAttention
    keys : array of shape (M, K)
        Those of all rows, as rows; every step attends to them.
    """

    def __init__(self, attention: AdditiveAttention, keys: Array) -> None:
        self.attention = attention
        self.keys = keys
        self.projected, self.of_key = attention._key.forward(keys)
        self.score = attention._score._arrays["weight"][0]

    def step(self, query: Array, firsts: Array, counts: Array) -> tuple[Array, Any]:
        """Attend: the context (B, K) of one query (B, Q) a row, and what `AttentionStepsBackward.step` needs.

        The keys of row b are the `counts[b]` from `firsts[b]` on.
        """
        q, of_query = self.attention._query.forward(query)
        context, weights = self.attention._aligned(q, self.projected, self.keys, firsts, counts)
        return context, (q, weights, firsts, counts, of_query)

    def backward(self, grads: Mapping[str, Array] | None) -> AttentionStepsBackward:
        """Begin the backward of all steps; gradients of parameters are added to `grads`."""
        return AttentionStepsBackward(self, grads)


class AttentionStepsBackward:
    """The backward of `AttentionSteps`: `step` for each step in any order, then `finish`."""

    def __init__(self, steps: AttentionSteps, grads: Mapping[str, Array] | None) -> None:
        attention = steps.attention
        self._steps = steps
        self._targets: dict[str, Any] = attention._child_targets(attention._targets(grads))
        self._dprojected, self._dkeys = np.zeros_like(steps.projected), np.zeros_like(steps.keys)

    def step(self, dcontext: Array, kept: Any) -> Array:
        """Return the gradient of the query (B, Q) of a step; those of the keys are summed until `finish`."""
        steps, attention = self._steps, self._steps.attention
        q, weights, firsts, counts, of_query = kept
        dq = attention._backend.additive_attention.align_backward(
            q,
            steps.projected,
            steps.keys,
            steps.score,
            None,
            firsts,
            counts,
            weights,
            np.ascontiguousarray(dcontext),
            self._dprojected,
            self._dkeys,
            self._targets["score"]["weight"][0],
            threads.get_num_threads(),
        )
        return attention._query.backward(dq, of_query, grads=self._targets["query"])

    def finish(self) -> Array:
        """Return the gradient of the keys (M, K)."""
        steps = self._steps
        return self._dkeys + steps.attention._key.backward(self._dprojected, steps.of_key, grads=self._targets["key"])
