"""Attention: the function over heads, and the layer with projections. The arithmetic is in the operations they call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fastseq import checks, elsewhere, threads
from fastseq.backend import COMPILED, Backend
from fastseq.checks import Array
from fastseq.layers.base import SEQUENCE, Configured, Tape, mask_seed
from fastseq.layers.derived import Derived
from fastseq.layers.positions import turns
from fastseq.layers.rows import Rows, cut, padded, rows_of
from fastseq.layers.settings import KW_ONLY, Dtype, Resolved, flag, floating, fraction, number, random_seed, size


class AttentionTape:
    """The values that `attention_backward` needs from one `attention_forward`; opaque, may be used several times."""

    __slots__ = ("_backend", "_dtype", "_kept", "_shape")

    def __init__(self, backend: Backend, kept: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._backend = backend
        self._kept = kept
        self._dtype = dtype
        self._shape = shape

    def __repr__(self) -> str:
        return f"<tape of attention with outputs of shape {self._shape}>"


@elsewhere.naming
@elsewhere.hiding_private
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    causal: bool = False,
    lengths: Any = None,
    scale: float | None = None,
    window: int | None = None,
    return_weights: bool = False,
    _backend: Backend = COMPILED,
) -> Any:
    """Softmax attention [1]_: for each query the mean of the values, weighted by softmax(scale q . k + mask).

    Parameters
    ----------
    q : array of shape (B, heads, Tq, D)
        Queries, float32 or float64.
    k : array of shape (B, kv_heads, Tk, D)
        Keys. Query head i reads key-value head i // (heads / kv_heads).
    v : array of shape (B, kv_heads, Tk, E)
        Values.
    mask : array that broadcasts to (B, heads, Tq, Tk), optional
        Booleans: True = may attend. Or real numbers, which are added to the scaled scores; -inf forbids.
    causal : bool
        Whether query i may attend only to keys up to i + Tk - Tq. So the last query attends to all keys, and cached
        keys of earlier steps need no mask.
    lengths : array of shape (B,), optional
        The real keys of each row of the batch, integers in 0..Tk; those past them are forbidden.
    scale : float, optional
        Factor of the scores; 1 / sqrt(D) by default.
    window : int, optional
        Query i may attend only to keys less than this many from key i + Tk - Tq.
    return_weights : bool
        Whether to return the attention weights, too.

    Returns
    -------
    out : ndarray of shape (B, heads, Tq, E)
        0 where a query may attend to nothing. Forbidden keys and values have no effect, even if they are NaN or inf.
    weights : ndarray of shape (B, heads, Tq, Tk)
        With `return_weights`: exactly 0 where forbidden.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it should be.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
    """
    others = mask is None and lengths is None and scale is None and window is None and return_weights is False
    if others and (causal is False or causal is True):
        usual = _backend.attention.usual_attention(q, k, v, causal, threads.get_num_threads())
        if usual is not None:
            return usual
    given = _given(_backend, q, k, v, mask, causal, lengths, scale, window)
    wanted = checks.flag("return_weights", return_weights)
    out, weights = _backend.attention.attention(*given, wanted, threads.get_num_threads())
    return (out, weights) if wanted else out


@elsewhere.hiding_private
def attention_forward(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    causal: bool = False,
    lengths: Any = None,
    scale: float | None = None,
    window: int | None = None,
    _backend: Backend = COMPILED,
) -> tuple[Array, AttentionTape]:
    """Compute `attention` in training; return outputs and a tape for `attention_backward`.

    Parameters
    ----------
    q, k, v, mask
        As for `attention`; must not be changed while the tape is in use.
    causal, lengths, scale, window
        As for `attention`.

    Returns
    -------
    out : ndarray of shape (B, heads, Tq, E)
        Must not be changed either.
    tape : AttentionTape
    """
    given = _given(_backend, q, k, v, mask, causal, lengths, scale, window)
    out, kept = _backend.attention.attention_forward(*given, 0.0, 0, threads.get_num_threads())
    return out, AttentionTape(_backend, kept, out.dtype, out.shape)


@elsewhere.hiding_private
def attention_backward(dout: Any, tape: AttentionTape, *, _backend: Backend = COMPILED) -> tuple[Array, Array, Array]:
    """Compute the gradients of queries, keys and values from that of the outputs.

    Parameters
    ----------
    dout : array of shape (B, heads, Tq, E)
    tape : AttentionTape
        Returned by `attention_forward`.

    Returns
    -------
    dq, dk, dv : ndarrays of the shapes of q, k and v
        0 where a query may attend to nothing, and where no query may attend to a key.
    """
    if not isinstance(tape, AttentionTape):
        raise TypeError(f"tape should be what attention_forward returned, not {checks.describe(tape)}")
    if tape._backend is not _backend:
        raise ValueError(f"tape should be of the attention_forward beside this attention_backward, not {tape!r}")
    gradient = checks.like("dout", dout, tape._dtype, tape._shape)
    return _backend.attention.attention_backward(tape._kept, gradient, threads.get_num_threads())


class _Given(NamedTuple):
    """Checked arguments of `attention`, in the order of the operations."""

    q: Array
    k: Array
    v: Array
    spans: tuple[Array, Array] | None
    lengths: Array | None
    mask: Array | None
    causal: bool
    window: int | None
    scale: float


def _given(
    backend: Backend, q: Any, k: Any, v: Any, mask: Any, causal: Any, lengths: Any, scale: Any, window: Any
) -> _Given:
    queries = checks.as_array("q", q)
    if queries.dtype.kind != "f":
        raise TypeError(f"q should hold real floating numbers, not {queries.dtype}")
    dtype = np.dtype(queries.dtype.type)
    checks.real_dtype("q", dtype, backend.dtypes)
    arrays = [checks.real_array(name, a, dtype) for name, a in (("q", queries), ("k", k), ("v", v))]
    for name, form, array in zip("qkv", ("heads, Tq, D", "kv_heads, Tk, D", "kv_heads, Tk, E"), arrays, strict=True):
        if array.ndim != 4:
            raise ValueError(f"{name} should be of shape (B, {form}), not {array.shape}")
        if not array.shape[1] or not array.shape[3]:
            raise ValueError(f"{name} should have at least one head, of at least one element, not {array.shape}")
    queries, keys, values = arrays
    batch, heads, tq, width = queries.shape
    kv_heads, tk = keys.shape[1:3]
    if keys.shape != (batch, kv_heads, tk, width):
        raise ValueError(f"k should be of shape ({batch}, kv_heads, Tk, {width}) as q is, not {keys.shape}")
    if values.shape[:3] != keys.shape[:3]:
        raise ValueError(f"v should be of shape ({batch}, {kv_heads}, {tk}, E) as k is, not {values.shape}")
    if heads % kv_heads:
        raise ValueError(f"k should have a number of heads that divides the {heads} of q, not {kv_heads}")
    return _Given(
        queries,
        keys,
        values,
        None,
        None if lengths is None else checks.lengths(lengths, batch, tk),
        None if mask is None else checks.mask("mask", mask, dtype, (batch, heads, tq, tk)),
        checks.flag("causal", causal),
        _window(window),
        1 / math.sqrt(width) if scale is None else checks.number("scale", scale),
    )


def _window(value: Any) -> int | None:
    return None if value is None else checks.size("window", value, 1)


class Frame(NamedTuple):
    """Conversion of rows of queries and keys to the heads that attention takes: packed sequences, or a padded batch."""

    queries: Rows
    keys: Rows
    dense: bool  # heads are (B, heads, T, D), and causal masks count from the last key of the array, padding included

    @property
    def spans(self) -> tuple[Array, Array] | None:
        """The first row of each sequence of queries and of keys; None for a padded batch."""
        return None if self.dense else (self.queries.starts, self.keys.starts)

    @property
    def lengths(self) -> Array | None:
        """The number of real keys of each sequence of a padded batch; None for packed sequences."""
        return self.keys.lengths if self.dense else None

    def mask(self, mask: Array | None) -> Array | None:
        """Return a mask over the padded batch in the form that goes with these heads."""
        return mask if self.dense else cut(mask, self.queries, self.keys)

    def arrange(self, heads: Array, rows: Rows) -> Array:
        """Convert rows (N, H, D) to heads."""
        if not self.dense:
            return heads
        shape = (rows.batch, rows.time, *heads.shape[1:])
        array = heads if rows.places is None else rows.scatter(_flat(heads))
        return array.reshape(shape).swapaxes(1, 2)

    def restore(self, heads: Array, rows: Rows) -> Array:
        """Convert heads back to rows (N, H, D)."""
        if not self.dense:
            return heads
        count, width = heads.shape[1], heads.shape[3]
        array = heads.swapaxes(1, 2).reshape(rows.batch, rows.time, count * width)
        return rows.gather(array).reshape(-1, count, width)


class _Kept(NamedTuple):
    """The tape of a run over rows."""

    sources: tuple[Array, ...]
    projections: tuple[tuple[int, str, Any], ...]  # of each: the source, the part of the weights, these packed
    frame: Frame
    turned: tuple[Array, Array, Array] | None  # of rotary positions: cos, sin and the position of each row
    attention: Any
    out: Array  # of attention, as rows
    output: Any  # the packed weights of the output projection


class MultiheadAttention(Configured):
    """Attention of several heads [1]_ between learned projections of queries, keys and values.

    Notes
    -----
    Parameters are PyTorch's: `in_proj_weight`, rows for queries, keys and values, or `q_proj_weight`, `k_proj_weight`
    and `v_proj_weight` where sizes differ; `in_proj_bias`; `out_proj.weight` and `out_proj.bias`.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
    .. [2] J. Ainslie et al., "GQA: training generalized multi-query transformer models from multi-head checkpoints",
       EMNLP 2023.
    .. [3] J. Su et al., "RoFormer: enhanced transformer with rotary position embedding", arXiv:2104.09864, 2021.
    """

    _products = ("*_weight", "out_proj.weight")

    time = SEQUENCE

    _naming: ClassVar[tuple[str, ...]] = ("__call__", "forward")

    embed_dim: int = size(doc="E, the size of a query and of an output.")
    num_heads: int = size(doc="The number of heads, each of size E / num_heads.")
    _: KW_ONLY
    kdim: Resolved[int | None, int] = size(default=None, doc="The size of a key; E by default.")
    vdim: Resolved[int | None, int] = size(default=None, doc="The size of a value; E by default.")
    num_kv_heads: Resolved[int | None, int] = size(
        default=None,
        doc="Heads of keys and values, a divisor of `num_heads`; each is read by as many query heads [2]_.",
    )
    bias: bool = flag(default=True, doc="Whether all projections have biases.")
    dropout: float = fraction(default=0.0, doc="Share of the attention weights that training drops.")
    rotary: float | None = number(
        default=None, above=0, doc="The base of rotary positions [3]_, 10000.0 commonly; for self-attention only."
    )
    window: int | None = size(
        default=None, doc="Query i may attend only to keys less than this many from its own, key i + Tk - Tq."
    )
    dtype: Dtype = floating(default="float32")
    seed: int | None = random_seed(
        default=None,
        doc="Fixes the initial parameters: `in_proj_weight` uniform in ±sqrt(6 / (rows + columns)),"
        " `out_proj.weight` in ±1/sqrt(E), biases 0.",
    )

    def _resolve(self) -> None:
        self._head_dim = head_dim("embed_dim", self.embed_dim, "num_heads", self.num_heads)
        self.kdim, self.vdim = self.kdim or self.embed_dim, self.vdim or self.embed_dim
        self.num_kv_heads = kv_heads(self.num_kv_heads, "num_heads", self.num_heads)
        check_rotary(self.rotary, self._head_dim)
        self._together = self.kdim == self.vdim == self.embed_dim
        if self.rotary is not None and not self._together:
            raise ValueError(
                f"kdim and vdim should be {self.embed_dim}, as embed_dim is, where rotary is given:"
                f" it is for self-attention, not for {self.kdim} and {self.vdim}"
            )

    def _build(self) -> None:
        q, kv = self.embed_dim, self.num_kv_heads * self._head_dim
        # The rows of `in_proj_weight` that each projection uses.
        self._rows = {
            "in": slice(0, q + 2 * kv),
            "q": slice(0, q),
            "k": slice(q, q + kv),
            "v": slice(q + kv, q + 2 * kv),
            "kv": slice(q, q + 2 * kv),
        }
        self._scale = 1 / math.sqrt(self._head_dim)
        self._turns = None if self.rotary is None else turns(self._head_dim, self.rotary, self.dtype)
        self._packed: dict[str, Derived[Any]] = {}
        super()._build()

    def _initial(self, rng: np.random.Generator) -> dict[str, Array]:
        def glorot(rows: slice, columns: int) -> Array:
            bound = math.sqrt(6 / (rows.stop - rows.start + columns))
            return rng.uniform(-bound, bound, (rows.stop - rows.start, columns))

        whole = self._rows["in"]
        if self._together:
            arrays = {"in_proj_weight": glorot(whole, self.embed_dim)}
        else:
            widths = {"q": self.embed_dim, "k": self.kdim, "v": self.vdim}
            arrays = {f"{part}_proj_weight": glorot(self._rows[part], width) for part, width in widths.items()}
        if self.bias:
            arrays["in_proj_bias"] = np.zeros(whole.stop)
        bound = 1 / math.sqrt(self.embed_dim)
        arrays["out_proj.weight"] = rng.uniform(-bound, bound, (self.embed_dim, self.embed_dim))
        if self.bias:
            arrays["out_proj.bias"] = np.zeros(self.embed_dim)
        return arrays

    def _gives(self) -> int:
        return self.embed_dim

    def _takes(self) -> int:
        return self.embed_dim

    def _row_blocks(self, name: str) -> list[int]:
        if name != "in_proj_weight":
            return super()._row_blocks(name)
        return [self._rows[part].stop - self._rows[part].start for part in "qkv"]

    def _part(self, arrays: Mapping[str, Array], part: str) -> tuple[Array, Array | None]:
        """Return views of weight and bias of a projection, in a mapping of parameters or of gradients."""
        if part == "out":
            return arrays["out_proj.weight"], arrays.get("out_proj.bias")
        rows, bias = self._rows[part], arrays.get("in_proj_bias")
        weight = arrays["in_proj_weight"][rows] if self._together else arrays[f"{part}_proj_weight"]
        return weight, None if bias is None else bias[rows]

    def _weights(self, part: str) -> Any:
        """Return the packed weights of a projection."""
        packed = self._packed.get(part)
        if packed is None:
            packed = self._packed.setdefault(part, Derived())
        return packed.get(self._arrays, lambda arrays: self._backend.dense.linear_pack(*self._part(arrays, part)))

    def _parts(self, sources: int) -> tuple[tuple[int, str], ...]:
        """Return pairs of source and projection, given how many arrays were passed."""
        if self._together and sources == 1:
            return ((0, "in"),)
        if self._together and sources == 2:
            return (0, "q"), (1, "kv")
        return (0, "q"), (min(1, sources - 1), "k"), (sources - 1, "v")

    def _projected(self, sources: tuple[Array, ...], frame: Frame) -> tuple[list[Array], tuple[Any, ...], Any]:
        """Return queries, keys and values as heads; the projections; cos, sin and positions of rotary positions."""
        n_threads = threads.get_num_threads()
        projections = tuple((source, part, self._weights(part)) for source, part in self._parts(len(sources)))
        parts = [
            self._backend.dense.linear_forward(weights, sources[source], n_threads)
            for source, _, weights in projections
        ]
        heads = self._split([_heads(rows, self._head_dim) for rows in parts])
        turned = None
        if self._turns is not None:
            cos, sin = self._turns.up_to(frame.queries.longest)
            turned = cos, sin, frame.queries.steps()
            heads[:2] = [self._backend.attention.rotary(rows, *turned, False, False, n_threads) for rows in heads[:2]]
        return heads, projections, turned

    def _split(self, parts: list[Array]) -> list[Array]:
        """Return views of q, k and v, given the outputs of the projections."""
        a, b = self.num_heads, self.num_heads + self.num_kv_heads
        if len(parts) == 1:
            return [parts[0][:, :a], parts[0][:, a:b], parts[0][:, b:]]
        if len(parts) == 2:
            return [parts[0], parts[1][:, : b - a], parts[1][:, b - a :]]
        return parts

    def _output(self, out: Array, weights: Any) -> Array:
        y: Array = self._backend.dense.linear_forward(weights, out, threads.get_num_threads())
        return y

    def _arguments(self, heads: list[Array], frame: Frame, mask: Array | None, causal: bool) -> _Given:
        """Return the arguments that all attention operations take."""
        q, k, v = heads
        arranged = frame.arrange(q, frame.queries), frame.arrange(k, frame.keys), frame.arrange(v, frame.keys)
        return _Given(*arranged, frame.spans, frame.lengths, frame.mask(mask), causal, self.window, self._scale)

    def _run(
        self, sources: tuple[Array, ...], frame: Frame, mask: Array | None, causal: bool, want_weights: bool
    ) -> tuple[Array, Array | None]:
        """Run inference over rows; return outputs as rows, and the attention weights."""
        heads, _, _ = self._projected(sources, frame)
        arguments = self._arguments(heads, frame, mask, causal)
        out, weights = self._backend.attention.attention(*arguments, want_weights, threads.get_num_threads())
        rows = _flat(frame.restore(out, frame.queries))
        y = self._output(rows, self._weights("out"))
        return y, None if weights is None else padded(weights, frame.queries, frame.keys)

    def _run_forward(
        self, sources: tuple[Array, ...], frame: Frame, mask: Array | None, causal: bool, seed: int
    ) -> tuple[Array, _Kept]:
        """Run `_run` in training."""
        heads, projections, turned = self._projected(sources, frame)
        arguments = self._arguments(heads, frame, mask, causal)
        out, kept = self._backend.attention.attention_forward(*arguments, self.dropout, seed, threads.get_num_threads())
        rows, output = _flat(frame.restore(out, frame.queries)), self._weights("out")
        return self._output(rows, output), _Kept(sources, projections, frame, turned, kept, rows, output)

    def _run_backward(self, dy: Array, kept: _Kept, targets: Mapping[str, Array]) -> list[Array]:
        """Return the gradient of each source, as rows."""
        n_threads, frame = threads.get_num_threads(), kept.frame
        drows = self._backend.dense.linear_backward(kept.output, kept.out, dy, *self._part(targets, "out"), n_threads)
        dout = frame.arrange(_heads(drows, self._head_dim), frame.queries)
        dq, dk, dv = self._backend.attention.attention_backward(kept.attention, dout, n_threads)
        dheads = [frame.restore(dq, frame.queries), frame.restore(dk, frame.keys), frame.restore(dv, frame.keys)]
        if kept.turned is not None:
            dheads[:2] = [
                self._backend.attention.rotary(rows, *kept.turned, False, True, n_threads) for rows in dheads[:2]
            ]
        dsources: list[Any] = [None] * len(kept.sources)
        for (source, part, weights), dpart in zip(
            kept.projections, self._joined(dheads, len(kept.projections)), strict=True
        ):
            rows = kept.sources[source]
            dx = self._backend.dense.linear_backward(weights, rows, dpart, *self._part(targets, part), n_threads)
            dsources[source] = dx if dsources[source] is None else dsources[source] + dx
        return dsources

    def _joined(self, dheads: list[Array], parts: int) -> list[Array]:
        """Return gradients of the outputs of the projections: the reverse of `_split`."""
        dq, dk, dv = dheads
        joined = {1: [[dq, dk, dv]], 2: [[dq], [dk, dv]], 3: [[dq], [dk], [dv]]}[parts]
        return [_flat(np.concatenate(arrays, axis=1) if len(arrays) > 1 else arrays[0]) for arrays in joined]

    def __call__(
        self,
        query: Any,
        key: Any = None,
        value: Any = None,
        *,
        mask: Any = None,
        causal: bool = False,
        lengths: Any = None,
        return_weights: bool = False,
    ) -> Any:
        """Attend.

        Parameters
        ----------
        query : array of shape (B, Tq, E), or (Tq, E)
        key : array of shape (B, Tk, kdim), optional
            By default the queries are keys and values, too: self-attention.
        value : array of shape (B, Tk, vdim), optional
            By default the keys are the values, too.
        mask : array that broadcasts to (B, heads, Tq, Tk), optional
            Booleans: True = may attend. Or real numbers, which are added to the scaled scores; -inf forbids.
        causal : bool
            Whether query i may attend only to keys up to i + Tk - Tq.
        lengths : array of shape (B,), optional
            The real keys of each row of the batch; those past them are forbidden. In self-attention outputs past them
            are 0.
        return_weights : bool
            Whether to return the attention weights, too.

        Returns
        -------
        out : ndarray of shape (B, Tq, E)
        weights : ndarray of shape (B, heads, Tq, Tk)
            With `return_weights`: exactly 0 where forbidden.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        sources, frame, allowed, unbatched = self._opened(query, key, value, mask, lengths)
        wanted = checks.flag("return_weights", return_weights)
        y, weights = self._run(sources, frame, allowed, checks.flag("causal", causal), wanted)
        out = frame.queries.scatter(y)
        if unbatched:
            out, weights = out[0], None if weights is None else weights[0]
        return (out, weights) if wanted else out

    def forward(
        self,
        query: Any,
        key: Any = None,
        value: Any = None,
        *,
        mask: Any = None,
        causal: bool = False,
        lengths: Any = None,
        seed: int | None = None,
    ) -> tuple[Array, Tape]:
        """Attend, in training.

        Parameters
        ----------
        query, key, value, mask, causal, lengths
            As for a call. Arrays must not be changed while the tape is in use.
        seed : int, optional
            Fixes the masks of dropout; drawn by default.

        Returns
        -------
        out : ndarray of shape (B, Tq, E)
        tape : Tape
        """
        sources, frame, allowed, unbatched = self._opened(query, key, value, mask, lengths)
        y, kept = self._run_forward(sources, frame, allowed, checks.flag("causal", causal), mask_seed(seed))
        out = frame.queries.scatter(y)
        return (out[0] if unbatched else out), Tape(self, (kept, unbatched))

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> Any:
        """Compute gradients from that of the outputs.

        Parameters
        ----------
        dy : array of shape (B, Tq, E)
        tape : Tape
            Returned by `forward`.
        grads : mapping from str to ndarray, optional
            Arrays that gradients of parameters are added to; `grads` of the layer by default.

        Returns
        -------
        dquery, or tuple of dquery, dkey, or of dquery, dkey, dvalue
            One for each array that was passed to `forward`, of its shape; 0 in padding.
        """
        kept, unbatched = self._kept(tape)
        queries, keys = kept.frame.queries, kept.frame.keys
        shape = (queries.batch, queries.time, self.embed_dim)
        dy = checks.like("dy", dy, self.dtype, shape[1:] if unbatched else shape).reshape(shape)
        dsources = self._run_backward(queries.gather(dy), kept, self._targets(grads))
        arrays = [rows.scatter(drows) for rows, drows in zip((queries, keys, keys), dsources, strict=False)]
        if unbatched:
            arrays = [array[0] for array in arrays]
        return arrays[0] if len(arrays) == 1 else tuple(arrays)

    def _opened(
        self, query: Any, key: Any, value: Any, mask: Any, lengths: Any
    ) -> tuple[tuple[Array, ...], Frame, Array | None, bool]:
        """Check arguments; return sources as rows, their frame, the mask, and whether there is no axis of batch."""
        if key is None and value is not None:
            raise ValueError("key should be given where value is")
        if key is not None and self.rotary is not None:
            raise ValueError("key should be None: rotary positions are for self-attention")
        for width, name in ((self.kdim, "kdim"), (self.vdim, "vdim")):
            missing = "key" if key is None else "value"
            of = self.embed_dim if key is None else self.kdim
            if value is None and width != of:
                raise ValueError(f"{missing} should be given: {name} is {width}, not {of}")
        if key is None:
            query, lengths = checks.ragged("query", query, lengths)
        x, unbatched = batched("query", query, self.dtype, self.embed_dim, "Tq")
        passed = [x]
        for name, array, width in (("key", key, self.kdim), ("value", value, self.vdim)):
            if array is not None:
                other, single = batched(name, array, self.dtype, width, "Tk")
                if single != unbatched or len(other) != len(x):
                    form = f"(Tk, {width})" if unbatched else f"({len(x)}, Tk, {width})"
                    raise ValueError(f"{name} should be of shape {form} as query is, not {np.shape(array)}")
                passed.append(other)
        if len(passed) == 3 and passed[2].shape[1] != passed[1].shape[1]:
            raise ValueError(f"value should have {passed[1].shape[1]} steps as key has, not {passed[2].shape[1]}")
        batch, tk = passed[-1].shape[:2]
        if lengths is not None:
            lengths = checks.lengths(lengths, batch, tk)
        shape = (batch, self.num_heads, x.shape[1], tk)
        allowed = None if mask is None else checks.mask("mask", mask, self.dtype, shape)
        keys = rows_of(batch, tk, lengths)
        queries = keys if key is None else rows_of(batch, x.shape[1], None)
        sources = tuple(rows.gather(array) for rows, array in zip((queries, keys, keys), passed, strict=False))
        return sources, Frame(queries, keys, key is not None), allowed, unbatched


def batched(name: str, value: Any, dtype: np.dtype[Any], width: int, time: str = "T") -> tuple[Array, bool]:
    """Return an array (B, T, width), and whether it was passed without the axis of batch."""
    array = checks.real_array(name, value, dtype)
    if array.ndim not in (2, 3) or array.shape[-1] != width:
        raise ValueError(f"{name} should be of shape (B, {time}, {width}) or ({time}, {width}), not {array.shape}")
    return (array[None], True) if array.ndim == 2 else (array, False)


def head_dim(of: str, size: int, by: str, heads: int) -> int:
    """Return the size of a head."""
    if size % heads:
        raise ValueError(f"{of} should be a multiple of {by}={heads}, not {size}")
    return size // heads


def kv_heads(count: int | None, of: str, heads: int) -> int:
    """Return the number of heads of keys and values; by default that of the queries."""
    if count is None:
        return heads
    if heads % count:
        raise ValueError(f"num_kv_heads should divide {of}={heads}, not be {count}")
    return count


def check_rotary(base: float | None, size: int) -> None:
    """Raise an error for rotary positions in heads of odd size."""
    if base is not None and size % 2:
        raise ValueError(f"rotary should be None where the size of a head is odd, {size}, not {base}")


def _heads(rows: Array, size: int) -> Array:
    """Reshape rows (N, H D) to heads (N, H, D)."""
    return rows.reshape(len(rows), rows.shape[1] // size, size)


def _flat(heads: Array) -> Array:
    """Reshape heads (N, H, D) to contiguous rows (N, H D)."""
    return np.ascontiguousarray(heads).reshape(len(heads), heads.shape[1] * heads.shape[2])
