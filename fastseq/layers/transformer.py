"""Encoder and decoder of the Transformer: layers made of layers.

A call hands the packed weights of a whole stack to one operation. `forward` goes through the children one by one, and
`backward` through the same in reverse order. All of them see the real tokens of a batch alone, as rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from fastseq import checks, threads
from fastseq.checks import Array
from fastseq.layers.activation import GELU, ReLU, SiLU
from fastseq.layers.attention import Frame, MultiheadAttention, batched, check_rotary, head_dim, kv_heads
from fastseq.layers.base import SEQUENCE, Composite, Configured, Layer, Tape, child_seed, mask_seed, seeds_of
from fastseq.layers.derived import Derived
from fastseq.layers.dropout import Dropout
from fastseq.layers.linear import Linear
from fastseq.layers.norm import LayerNorm, RMSNorm
from fastseq.layers.rows import Rows, cut, padded, rows_of
from fastseq.layers.settings import (
    KW_ONLY,
    Dtype,
    Resolved,
    choice,
    flag,
    floating,
    fraction,
    number,
    random_seed,
    size,
)
from fastseq.state import AttentionState, attention_state, contents, pages_for

GATED = ("swiglu", "geglu")  # activations that multiply linear1's results with those of linear3
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", *GATED)
NORMS = ("layer", "rms")
MAX_LAYERS = 1024  # nobody stacks more, and each is some Python objects


class Tokens(NamedTuple):
    """The real tokens of a batch."""

    x: Array  # (N, d_model)
    rows: Rows
    unbatched: bool  # there was no batch


class Context(NamedTuple):
    """What all layers of a stack receive besides the tokens."""

    frame: Frame  # of self-attention
    mask: Array | None  # of self-attention, over the padded batch as all masks here
    causal: bool
    memory: Array | None = None  # what a decoder attends to, as rows
    memory_frame: Frame | None = None
    memory_mask: Array | None = None

    @classmethod
    def of(cls, rows: Rows, causal: bool, memory: Array | None = None, memory_rows: Rows | None = None) -> Context:
        """Return the context of tokens without masks, and in a decoder of a memory (M, d_model)."""
        frame = None if memory_rows is None else Frame(rows, memory_rows, False)
        return cls(Frame(rows, rows, False), None, causal, memory, frame)


D_MODEL = "The size of a token's vector."
NHEAD = "The number of heads, each of size d_model / nhead."
FEEDFORWARD = "The size between the two linear maps of the feed-forward."


class Stack(Configured, Composite):
    """What encoders, decoders and the layers of both share: settings, and how arguments are checked."""

    time = SEQUENCE

    _: KW_ONLY
    dropout: float = fraction(
        default=0.1,
        doc="Share that training drops: of attention weights, of what is between the two linear maps, and of what is"
        " added to the tokens.",
    )
    activation: str = choice(
        ACTIVATIONS,
        default="relu",
        doc='Between the two linear maps; "gelu" is the form with erf. "swiglu" and "geglu" are gated [3]_:'
        ' linear2(silu(linear1(x)) * linear3(x)), and the same with "gelu"; `linear3` has the shape of `linear1`.',
    )
    norm_first: bool = flag(
        default=False,
        doc="Whether norms stand before attention and feed-forward [2]_, instead of after each sum.",
    )
    layer_norm_eps: float = number(default=1e-5, least=0, doc="Keeps the roots in the norms away from 0.")
    bias: bool = flag(default=True, doc="Whether linear maps and layer norms have biases.")
    norm: str = choice(NORMS, default="layer", doc="`LayerNorm` or `RMSNorm`.")
    num_kv_heads: Resolved[int | None, int] = size(
        default=None,
        doc="Heads of keys and values, a divisor of `nhead`; as many as there are heads by default.",
    )
    rotary: float | None = number(
        default=None,
        above=0,
        doc="The base of rotary positions in self-attention, 10000.0 commonly; none by default.",
    )
    window: int | None = size(
        default=None, doc="In self-attention a token may attend only to those less than this many from it."
    )
    dtype: Dtype = floating(default="float32")
    seed: int | None = random_seed(default=None, doc="Fixes the initial parameters.")

    if TYPE_CHECKING:  # each class declares these where they stand in its signature

        @property
        def d_model(self) -> int: ...  # noqa: D102

        @property
        def nhead(self) -> int: ...  # noqa: D102

        @property
        def dim_feedforward(self) -> int: ...  # noqa: D102

    def _resolve(self) -> None:
        head = head_dim("d_model", self.d_model, "nhead", self.nhead)
        self.num_kv_heads = kv_heads(self.num_kv_heads, "nhead", self.nhead)
        check_rotary(self.rotary, head)

    def _of_layers(self) -> dict[str, Any]:
        """The settings that are those of every layer of the stack, except its seed."""
        return {name: getattr(self, name) for name in Block._settings if name != "seed"}

    def _gives(self) -> int:
        return self.d_model

    def _takes(self) -> int:
        return self.d_model

    def _norm_layer(self) -> Layer:
        """A norm of the kind that was asked for."""
        of, eps, dtype = self._backend.of, self.layer_norm_eps, self.dtype
        layer: Layer = (
            of(RMSNorm)(self.d_model, eps=eps, dtype=dtype)
            if self.norm == "rms"
            else of(LayerNorm)(self.d_model, eps=eps, bias=self.bias, dtype=dtype)
        )
        return layer

    def _tokens(self, name: str, value: Any, lengths_name: str, lengths: Any, time: str = "T") -> Tokens:
        """The real tokens of an argument."""
        value, lengths = checks.ragged(name, value, lengths)
        array, unbatched = batched(name, value, self.dtype, self.d_model, time)
        if lengths is not None:
            lengths = checks.lengths(lengths, len(array), array.shape[1], lengths_name)
        rows = rows_of(len(array), array.shape[1], lengths)
        return Tokens(rows.gather(array), rows, unbatched)

    def _mask(self, name: str, mask: Any, queries: Rows, keys: Rows) -> Array | None:
        """A mask of queries and keys."""
        shape = (queries.batch, self.nhead, queries.time, keys.time)
        return None if mask is None else checks.mask(name, mask, self.dtype, shape)


class Runs(Stack):
    """What encoders and decoders, and the layers of both, share: how they run over tokens."""

    _attends_memory: ClassVar[bool]

    @abstractmethod
    def _blocks(self) -> tuple[Block, ...]:
        """The layers one after another."""

    def _last_norm(self) -> Any:
        """The norm after the last of them, if there is one."""
        return None

    @abstractmethod
    def _forward_rows(self, x: Array, context: Context, seed: int) -> tuple[Array, Any]:
        """The outputs of training as rows, and what backward needs."""

    @abstractmethod
    def _backward_rows(self, dy: Array, kept: Any, grads: Mapping[str, Array] | None) -> tuple[Array, Array | None]:
        """The gradients of tokens and, in a decoder, memory; as rows."""

    def _packed_blocks(self, longest: int) -> list[Any]:
        """The layers as the operations want them, for sequences up to a length."""
        return [block._packed_for(longest) for block in self._blocks()]

    def _final_norm(self) -> tuple[str, float, Array, Array | None] | None:
        """The last norm as the operations want it."""
        norm = self._last_norm()
        return (
            None if norm is None else (self.norm, self.layer_norm_eps, norm._arrays["weight"], norm._arrays.get("bias"))
        )

    def _start_state(self, batch: int, memory: Any, tokens: Array | None) -> AttentionState:
        """Return the state of rows without tokens; `memory` are pages."""
        return attention_state(
            self._backend.transformer.no_pages(self._packed_blocks(1), self.dtype, batch), memory, tokens
        )

    def _check_state(self, state: Any, batch: int, tokens: bool) -> AttentionState:
        """Return a state in the form of this layer's operations; that of another layer is an error."""
        if not isinstance(state, AttentionState):
            raise TypeError(f"state should be an AttentionState, not {checks.describe(state)}")
        form = len(self._blocks()), self.num_kv_heads, self.d_model // self.nhead, self.dtype
        own, memory, ids, since = contents(state)
        if (
            own.form != form
            or own.window != (self.window or 0)
            or (memory is not None) != self._attends_memory
            or (ids is not None) != tokens
        ):
            raise ValueError(f"state should be of this {type(self).__name__}, not of another layer or model: {state!r}")
        if state.batch_size != batch:
            raise ValueError(f"state should have a batch of {batch}, not {state.batch_size}")
        own = pages_for(self._backend.transformer, own)
        memory = None if memory is None else pages_for(self._backend.transformer, memory)
        return attention_state(own, memory, ids, since)

    def _append_tokens(
        self, x: Array, starts: Array, state: AttentionState, tokens: Array | None
    ) -> tuple[Array, AttentionState]:
        """Return outputs (N, d_model) of more tokens of each row, and the state with them; `tokens` are all its ids."""
        own, memory, _, since = contents(state)
        longest = int((own.lengths + np.diff(starts)).max(initial=1))
        y, pages = self._backend.transformer.run_cached(
            self._packed_blocks(longest),
            x,
            starts,
            own,
            memory,
            self._final_norm(),
            threads.get_num_threads(),
        )
        return y, attention_state(pages, memory, tokens, since)

    def _stepped(self, x_t: Any, state: Any) -> tuple[Array, AttentionState]:
        """What `step` returns, given a state."""
        x = checks.real_array("x_t", x_t, self.dtype)
        if x.ndim != 2 or x.shape[1] != self.d_model:
            raise ValueError(f"x_t should be of shape (B, {self.d_model}), not {x.shape}")
        batch = len(x)
        state = self._start_state(batch, None, None) if state is None else self._check_state(state, batch, False)
        return self._append_tokens(np.ascontiguousarray(x), np.arange(batch + 1), state, None)

    def _run_rows(self, x: Array, context: Context, want_weights: bool) -> tuple[Array, list[Any] | None]:
        """A call over rows: the outputs as rows, and of every layer the weights (B, heads, Tq, Tk), or a pair."""
        rows = context.frame.queries
        keys = None if context.memory_frame is None else context.memory_frame.keys
        y, maps = self._backend.transformer.run_blocks(
            self._packed_blocks(rows.longest),
            x,
            rows.starts,
            None if self.rotary is None else rows.steps(),
            context.causal,
            cut(context.mask, rows, rows),
            context.memory,
            None if keys is None else keys.starts,
            None if keys is None else cut(context.memory_mask, rows, keys),
            self._final_norm(),
            want_weights,
            threads.get_num_threads(),
        )
        if maps is None:
            return y, None
        if keys is None:
            return y, [padded(own, rows, rows) for own in maps]
        return y, [(padded(own, rows, rows), padded(cross, rows, keys)) for own, cross in maps]

    def _returned(self, y: Array, weights: list[Any] | None, rows: Rows, unbatched: bool) -> Any:
        """What a call returns."""
        out = _single(rows.scatter(y), unbatched)
        if weights is None:
            return out
        maps = [_single(own, unbatched) for own in weights]
        return out, maps

    def _trained(self, tokens: Tokens, context: Context, seed: Any) -> tuple[Array, Tape]:
        """What `forward` returns."""
        y, kept = self._forward_rows(tokens.x, context, mask_seed(seed))
        return _single(tokens.rows.scatter(y), tokens.unbatched), Tape(self, (kept, context, tokens.unbatched))

    def _undone(self, dy: Any, tape: Tape, grads: Any) -> tuple[Array, Array | None]:
        """What `backward` returns: the gradients of tokens and memory."""
        kept, context, unbatched = self._kept(tape)
        rows = context.frame.queries
        gradient = rows.gather(_gradient(dy, self.dtype, rows, self.d_model, unbatched))
        dx, dmemory = self._backward_rows(gradient, kept, grads)
        dx = _single(rows.scatter(dx), unbatched)
        if dmemory is None:
            return dx, None
        return dx, _single(context.memory_frame.keys.scatter(dmemory), unbatched)


class Encodes(Runs):
    """The verbs of an encoder and of its layers."""

    _attends_memory: ClassVar[bool] = False

    def initial_state(self, batch_size: int) -> AttentionState:
        """The state before the first token.

        Parameters
        ----------
        batch_size : int
            Rows of the batch, 0 or more.
        """
        return self._start_state(checks.size("batch_size", batch_size), None, None)

    def step(self, x_t: Any, state: Any = None) -> tuple[Array, AttentionState]:
        """One token more of each row; the bits are those of a causal call over all tokens.

        Parameters
        ----------
        x_t : array of shape (B, d_model)
            Real floating numbers.
        state : AttentionState, optional
            Where each row stands, which may be at different lengths; before the first token by default.

        Returns
        -------
        y_t : ndarray of shape (B, d_model)
        state : AttentionState
            For the next step. The one that was given still is what it was.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        return self._stepped(x_t, state)

    def _opened(self, x: Any, mask: Any, causal: Any, lengths: Any) -> tuple[Tokens, Context]:
        tokens = self._tokens("x", x, "lengths", lengths)
        rows = tokens.rows
        allowed = self._mask("mask", mask, rows, rows)
        return tokens, Context(Frame(rows, rows, False), allowed, checks.flag("causal", causal))

    def __call__(
        self, x: Any, *, mask: Any = None, causal: bool = False, lengths: Any = None, return_weights: bool = False
    ) -> Any:
        """Encode a batch of sequences; inference.

        Parameters
        ----------
        x : array of shape (B, T, d_model), or (T, d_model)
            Real floating numbers.
        mask : array that broadcasts to (B, heads, T, T), optional
            Booleans: True = may attend. Or real numbers, which are added to the scaled scores; -inf forbids.
        causal : bool
            Whether each token may attend only to those before it and itself.
        lengths : array of shape (B,), optional
            The real tokens of each row, integers in 0..T in any order. Nothing is computed for those past them, and
            nothing in them matters: outputs are 0 there.
        return_weights : bool
            Whether to return what each token attends to, too.

        Returns
        -------
        y : ndarray of shape (B, T, d_model)
        weights : ndarray of shape (B, heads, T, T); of an encoder a list of them, one a layer
            With `return_weights`.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        tokens, context = self._opened(x, mask, causal, lengths)
        y, weights = self._run_rows(tokens.x, context, checks.flag("return_weights", return_weights))
        return self._returned(y, weights, tokens.rows, tokens.unbatched)

    def forward(
        self, x: Any, *, mask: Any = None, causal: bool = False, lengths: Any = None, seed: int | None = None
    ) -> tuple[Array, Tape]:
        """Encode for training: what a call gives, except dropout, and what `backward` needs.

        Parameters
        ----------
        x, mask, causal, lengths
            As for a call. Arrays are not to be changed as long as the tape is used.
        seed : int, optional
            Fixes what dropout drops; drawn where it is not given.

        Returns
        -------
        y : ndarray of shape (B, T, d_model)
        tape : Tape
        """
        return self._trained(*self._opened(x, mask, causal, lengths), seed)

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> Array:
        """Gradients, given that of the outputs.

        Parameters
        ----------
        dy : array of the shape of y
            Past a row's length nothing in it matters.
        tape : Tape
            What `forward` returned.
        grads : mapping from str to ndarray, optional
            Where the gradients of the parameters are added; `grads` of the layer by default.

        Returns
        -------
        dx : ndarray of the shape of x
            0 past a row's length.
        """
        return self._undone(dy, tape, grads)[0]


class Decodes(Runs):
    """The verbs of a decoder and of its layers."""

    _attends_memory: ClassVar[bool] = True

    def initial_state(self, memory: Any, *, memory_lengths: Any = None) -> AttentionState:
        """The state before the first token: the keys and values of a memory.

        Parameters
        ----------
        memory : array of shape (B, Tm, d_model)
            What the tokens attend to besides each other.
        memory_lengths : array of shape (B,), optional
            The real tokens of each row of memory.
        """
        if np.ndim(memory) != 3:
            raise ValueError(f"memory should be of shape (B, Tm, {self.d_model}), not {np.shape(memory)}")
        tokens = self._tokens("memory", memory, "memory_lengths", memory_lengths, "Tm")
        return self._memory_state(tokens.x, tokens.rows)

    def _memory_state(self, memory: Array, rows: Rows) -> AttentionState:
        """Return the state before the first token, given a memory (M, d_model)."""
        pages = self._backend.transformer.memory_pages(
            self._packed_blocks(1), memory, rows.starts, threads.get_num_threads()
        )
        return self._start_state(rows.batch, pages, None)

    def step(self, x_t: Any, state: Any) -> tuple[Array, AttentionState]:
        """One token more of each row; the bits are those of a causal call over all tokens.

        Parameters
        ----------
        x_t : array of shape (B, d_model)
            Real floating numbers.
        state : AttentionState
            Where each row stands, which may be at different lengths: what `initial_state` or an earlier step gave.

        Returns
        -------
        y_t : ndarray of shape (B, d_model)
        state : AttentionState
            For the next step. The one that was given still is what it was.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        if state is None:
            raise TypeError("state should be what initial_state or a step gave, not None")
        return self._stepped(x_t, state)

    def _opened(
        self, x: Any, memory: Any, mask: Any, causal: Any, lengths: Any, memory_mask: Any, memory_lengths: Any
    ) -> tuple[Tokens, Context]:
        tokens = self._tokens("x", x, "lengths", lengths)
        other = self._tokens("memory", memory, "memory_lengths", memory_lengths, "Tm")
        rows, keys = tokens.rows, other.rows
        same_batch("memory", memory, "x", tokens, other)
        allowed = self._mask("mask", mask, rows, rows)
        frame, memory_frame = Frame(rows, rows, False), Frame(rows, keys, False)
        of_memory = self._mask("memory_mask", memory_mask, rows, keys)
        return tokens, Context(frame, allowed, checks.flag("causal", causal), other.x, memory_frame, of_memory)

    def __call__(
        self,
        x: Any,
        memory: Any,
        *,
        mask: Any = None,
        causal: bool = True,
        lengths: Any = None,
        memory_mask: Any = None,
        memory_lengths: Any = None,
        return_weights: bool = False,
    ) -> Any:
        """Decode a batch of sequences, each with what an encoder made of another; inference.

        Parameters
        ----------
        x : array of shape (B, T, d_model), or (T, d_model)
            Real floating numbers.
        memory : array of shape (B, Tm, d_model), or (Tm, d_model)
            What the tokens of x attend to besides each other.
        mask : array that broadcasts to (B, heads, T, T), optional
            Booleans: True = may attend. Or real numbers, which are added to the scaled scores; -inf forbids.
        causal : bool
            Whether each token may attend only to those before it and itself.
        lengths : array of shape (B,), optional
            The real tokens of each row of x, integers in 0..T in any order. Past them outputs are 0 and nothing
            matters.
        memory_mask : array that broadcasts to (B, heads, T, Tm), optional
            As `mask`, of the attention to memory.
        memory_lengths : array of shape (B,), optional
            The real tokens of each row of memory.
        return_weights : bool
            Whether to return what each token attends to, too.

        Returns
        -------
        y : ndarray of shape (B, T, d_model)
        weights : pair of ndarrays of shapes (B, heads, T, T) and (B, heads, T, Tm); of a decoder a list of pairs
            With `return_weights`.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        tokens, context = self._opened(x, memory, mask, causal, lengths, memory_mask, memory_lengths)
        y, weights = self._run_rows(tokens.x, context, checks.flag("return_weights", return_weights))
        return self._returned(y, weights, tokens.rows, tokens.unbatched)

    def forward(
        self,
        x: Any,
        memory: Any,
        *,
        mask: Any = None,
        causal: bool = True,
        lengths: Any = None,
        memory_mask: Any = None,
        memory_lengths: Any = None,
        seed: int | None = None,
    ) -> tuple[Array, Tape]:
        """Decode for training: what a call gives, except dropout, and what `backward` needs.

        Parameters
        ----------
        x, memory, mask, causal, lengths, memory_mask, memory_lengths
            As for a call. Arrays are not to be changed as long as the tape is used.
        seed : int, optional
            Fixes what dropout drops; drawn where it is not given.

        Returns
        -------
        y : ndarray of shape (B, T, d_model)
        tape : Tape
        """
        return self._trained(*self._opened(x, memory, mask, causal, lengths, memory_mask, memory_lengths), seed)

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> tuple[Array, Array]:
        """Gradients, given that of the outputs.

        Parameters
        ----------
        dy : array of the shape of y
            Past a row's length nothing in it matters.
        tape : Tape
            What `forward` returned.
        grads : mapping from str to ndarray, optional
            Where the gradients of the parameters are added; `grads` of the layer by default.

        Returns
        -------
        dx, dmemory : ndarrays of the shapes of x and memory
            0 past a row's length.
        """
        dx, dmemory = self._undone(dy, tape, grads)
        assert dmemory is not None
        return dx, dmemory


class Sublayer(ABC):
    """One part of a block, which computes f of x = norm(x + f(x)), or where norms stand first of x = x + f(norm(x)).

    The list of them is the description of a block: training goes through it, and `block_pack` makes of it what
    inference follows.
    """

    kind: ClassVar[str]  # as `block_pack` knows it

    def __init__(self, norm_name: str, norm: Any, drop: Any) -> None:
        self.norm_name = norm_name
        self.norm = norm
        self._drop = drop  # of f's result

    @abstractmethod
    def parts(self) -> dict[str, Any]:
        """The weights by their names in `block_pack`."""

    @abstractmethod
    def forward(self, x: Array, context: Context, seed: int) -> tuple[Array, Any]:
        """The result f(x) in training, and what `backward` needs."""

    @abstractmethod
    def backward(self, dout: Array, kept: Any, targets: Mapping[str, Any]) -> tuple[Array, Array | None]:
        """Gradients of x and, where there is one, of the memory; those of parameters are added to the targets."""


class SelfAttention(Sublayer):
    """Attention of the tokens to each other."""

    kind = "self_attention"

    def __init__(self, norm_name: str, norm: Any, drop: Any, attention: Any) -> None:
        super().__init__(norm_name, norm, drop)
        self._attention = attention

    def parts(self) -> dict[str, Any]:  # noqa: D102
        return {"qkv": self._attention._weights("in"), "out": self._attention._weights("out")}

    def forward(self, x: Array, context: Context, seed: int) -> tuple[Array, Any]:  # noqa: D102
        first = child_seed(seed, 0)
        out, kept = self._attention._run_forward((x,), context.frame, context.mask, context.causal, first)
        out, dropped = self._drop.forward(out, child_seed(seed, 1))
        return out, (kept, dropped)

    def backward(self, dout: Array, kept: Any, targets: Mapping[str, Any]) -> tuple[Array, Array | None]:  # noqa: D102
        of_attention, dropped = kept
        dout = self._drop.backward(dout, dropped)
        own = self._attention._targets(targets["self_attn"])
        (dx,) = self._attention._run_backward(dout, of_attention, own)
        return dx, None


class CrossAttention(Sublayer):
    """Attention of the tokens to a memory."""

    kind = "cross_attention"

    def __init__(self, norm_name: str, norm: Any, drop: Any, attention: Any) -> None:
        super().__init__(norm_name, norm, drop)
        self._attention = attention

    def parts(self) -> dict[str, Any]:  # noqa: D102
        return {part: self._attention._weights(part) for part in ("q", "kv", "out")}

    def forward(self, x: Array, context: Context, seed: int) -> tuple[Array, Any]:  # noqa: D102
        sources, first = (x, context.memory), child_seed(seed, 0)
        out, kept = self._attention._run_forward(sources, context.memory_frame, context.memory_mask, False, first)
        out, dropped = self._drop.forward(out, child_seed(seed, 1))
        return out, (kept, dropped)

    def backward(self, dout: Array, kept: Any, targets: Mapping[str, Any]) -> tuple[Array, Array | None]:  # noqa: D102
        of_attention, dropped = kept
        dout = self._drop.backward(dout, dropped)
        own = self._attention._targets(targets["multihead_attn"])
        dx, dmemory = self._attention._run_backward(dout, of_attention, own)
        return dx, dmemory


class FeedForward(Sublayer):
    """Two linear maps with an activation between them; gated, the activation is multiplied with a third map of x.

    y = W_2 f(W_1 x + b_1) + b_2;  gated y = W_2 (f(W_1 x + b_1) * (W_3 x + b_3)) + b_2
    """

    kind = "feed_forward"

    def __init__(self, norm_name: str, norm: Any, drop: Any, linears: Mapping[str, Any], activation: Any) -> None:
        super().__init__(norm_name, norm, drop)
        self._linears = linears  # linear1, linear2; gated, linear3
        self._activation = activation

    def parts(self) -> dict[str, Any]:  # noqa: D102
        return {name: linear._weights() for name, linear in self._linears.items()}

    def forward(self, x: Array, context: Context, seed: int) -> tuple[Array, Any]:  # noqa: D102
        hidden, of_first = self._linears["linear1"].forward(x)
        active, of_active = self._activation.forward(hidden)
        of_gate = None
        if "linear3" in self._linears:
            gated, of_third = self._linears["linear3"].forward(x)
            active, of_gate = active * gated, (active, gated, of_third)
        active, dropped_inside = self._drop.forward(active, child_seed(seed, 0))
        out, of_second = self._linears["linear2"].forward(active)
        out, dropped = self._drop.forward(out, child_seed(seed, 1))
        return out, (of_first, of_active, of_gate, dropped_inside, of_second, dropped)

    def backward(self, dout: Array, kept: Any, targets: Mapping[str, Any]) -> tuple[Array, Array | None]:  # noqa: D102
        of_first, of_active, of_gate, dropped_inside, of_second, dropped = kept
        dout = self._drop.backward(dout, dropped)
        dactive = self._linears["linear2"].backward(dout, of_second, grads=targets["linear2"])
        dactive = self._drop.backward(dactive, dropped_inside)
        if of_gate is None:
            dhidden = self._activation.backward(dactive, of_active)
            dx: Array = self._linears["linear1"].backward(dhidden, of_first, grads=targets["linear1"])
            return dx, None
        active, gated, of_third = of_gate
        dhidden = self._activation.backward(dactive * gated, of_active)
        dx = self._linears["linear1"].backward(dhidden, of_first, grads=targets["linear1"])
        return dx + self._linears["linear3"].backward(dactive * active, of_third, grads=targets["linear3"]), None


class Block(Runs):
    """What the layers of encoder and decoder share: a list of sublayers, each with a sum and a norm."""

    _cross: ClassVar[bool]  # whether it attends to a memory, too

    d_model: int = size(doc=D_MODEL)
    nhead: int = size(doc=NHEAD)
    dim_feedforward: int = size(default=2048, doc=FEEDFORWARD)

    def _build(self) -> None:
        of, dtype = self._backend.of, self.dtype
        # Each child with parameters has the seed of its place.
        seeds = iter(seeds_of(self.seed, 8))
        attentions: dict[str, Any] = {
            "self_attn": self._attention_layer(next(seeds), rotary=self.rotary, window=self.window)
        }
        if self._cross:
            attentions["multihead_attn"] = self._attention_layer(next(seeds))
        inner = self.d_model, self.dim_feedforward
        sizes = {"linear1": inner, "linear2": inner[::-1]} | ({"linear3": inner} if self.activation in GATED else {})
        linears = {n: of(Linear)(*size, self.bias, seed=next(seeds), dtype=dtype) for n, size in sizes.items()}
        norms = {f"norm{i + 1}": self._norm_layer() for i in range(3 if self._cross else 2)}
        self._children = {**attentions, **linears, **norms}
        self.self_attn: Any = attentions["self_attn"]
        self.linear1: Any = linears["linear1"]
        self.linear2: Any = linears["linear2"]
        drop = of(Dropout)(self.dropout, dtype=dtype)
        named = iter(norms.items())
        self._sublayers: list[Sublayer] = [SelfAttention(*next(named), drop, attentions["self_attn"])]
        if self._cross:
            self._sublayers.append(CrossAttention(*next(named), drop, attentions["multihead_attn"]))
        self._sublayers.append(FeedForward(*next(named), drop, linears, self._activation_layer()))
        self._packed: Derived[Any] = Derived()

    def _attention_layer(self, seed: Any, **more: Any) -> Any:
        """Attention of this block's sizes."""
        return self._backend.of(MultiheadAttention)(
            self.d_model,
            self.nhead,
            num_kv_heads=self.num_kv_heads,
            bias=self.bias,
            dropout=self.dropout,
            dtype=self.dtype,
            seed=seed,
            **more,
        )

    def _activation_layer(self) -> Any:
        """What follows linear1."""
        if self.activation == "relu":
            return self._backend.of(ReLU)(dtype=self.dtype)
        if self.activation == "swiglu":
            return self._backend.of(SiLU)(dtype=self.dtype)
        return self._backend.of(GELU)("tanh" if self.activation == "gelu_tanh" else "none", dtype=self.dtype)

    def _blocks(self) -> tuple[Block, ...]:
        return (self,)

    def _returned(self, y: Array, weights: list[Any] | None, rows: Rows, unbatched: bool) -> Any:
        returned = super()._returned(y, weights, rows, unbatched)
        return returned if weights is None else (returned[0], returned[1][0])

    def _packed_for(self, longest: int) -> Any:
        """The description with all weights as `run_blocks` wants it, for sequences up to a length."""
        turns = None if self.self_attn._turns is None else self.self_attn._turns.up_to(longest)
        of = (*[child._arrays for child in self._children.values()], turns)
        return self._packed.get(of, self._pack)

    def _pack(self, of: tuple[Any, ...]) -> Any:
        *_, turns = of
        settings = {
            "heads": self.nhead,
            "kv_heads": self.num_kv_heads,
            "head_dim": self.d_model // self.nhead,
            "activation": self.activation,
            "norm_first": self.norm_first,
            "norm": self.norm,
            "eps": self.layer_norm_eps,
            "window": self.window,
            "rotary": None if turns is None else (*turns, False),
        }
        sublayers = [
            (sublayer.kind, sublayer.parts(), tuple(map(sublayer.norm._arrays.get, ("weight", "bias"))))
            for sublayer in self._sublayers
        ]
        return self._backend.transformer.block_pack(settings, sublayers)

    def _forward_rows(self, x: Array, context: Context, seed: int) -> tuple[Array, Any]:
        kept = []
        for i, sublayer in enumerate(self._sublayers):
            own = child_seed(seed, i)
            if self.norm_first:
                normed, of_norm = sublayer.norm.forward(x)
                more, of_sublayer = sublayer.forward(normed, context, own)
                x = x + more
            else:
                more, of_sublayer = sublayer.forward(x, context, own)
                x, of_norm = sublayer.norm.forward(x + more)
            kept.append((of_norm, of_sublayer))
        return x, kept

    def _backward_rows(self, dy: Array, kept: Any, grads: Mapping[str, Array] | None) -> tuple[Array, Array | None]:
        targets, dx, dmemory = self._child_targets(grads), dy, None
        for sublayer, (of_norm, of_sublayer) in reversed(list(zip(self._sublayers, kept, strict=True))):
            of_own = targets[sublayer.norm_name]
            if self.norm_first:
                dnormed, of_memory = sublayer.backward(dx, of_sublayer, targets)
                dx = dx + sublayer.norm.backward(dnormed, of_norm, grads=of_own)
            else:
                dsum = sublayer.norm.backward(dx, of_norm, grads=of_own)
                dmore, of_memory = sublayer.backward(dsum, of_sublayer, targets)
                dx = dsum + dmore
            dmemory = of_memory if dmemory is None else dmemory
        return dx, dmemory


class Tower(Runs):
    """What encoder and decoder share: some layers, and a norm after the last."""

    _block: ClassVar[type[Block]]  # the class of a layer

    num_layers: int = size(limit=MAX_LAYERS, doc="How many layers.")
    d_model: int = size(doc=D_MODEL)
    nhead: int = size(doc=NHEAD)
    dim_feedforward: int = size(default=2048, doc=FEEDFORWARD)
    _: KW_ONLY
    final_norm: bool = flag(default=False, before="bias", doc="Whether there is a norm after the last layer.")

    def _build(self) -> None:
        kind, config = self._backend.of(self._block), self._of_layers()
        seeds = seeds_of(self.seed, self.num_layers)
        self._children = {f"layers.{i}": kind(**config, seed=seed) for i, seed in enumerate(seeds)}
        self._each: Any = tuple(self._children.values())
        if self.final_norm:
            self._children["norm"] = self._norm_layer()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, first to last."""
        layers: tuple[Layer, ...] = self._each
        return layers

    def _blocks(self) -> tuple[Block, ...]:
        blocks: tuple[Block, ...] = self._each
        return blocks

    def _last_norm(self) -> Any:
        return self._children.get("norm")

    def _forward_rows(self, x: Array, context: Context, seed: int) -> tuple[Array, Any]:
        kept = []
        for i, block in enumerate(self._blocks()):
            x, of_block = block._forward_rows(x, context, child_seed(seed, i))
            kept.append(of_block)
        norm = self._last_norm()
        if norm is None:
            return x, (kept, None)
        x, of_norm = norm.forward(x)
        return x, (kept, of_norm)

    def _backward_rows(self, dy: Array, kept: Any, grads: Mapping[str, Array] | None) -> tuple[Array, Array | None]:
        targets, (of_blocks, of_norm) = self._child_targets(grads), kept
        norm = self._last_norm()
        dx = dy if norm is None else norm.backward(dy, of_norm, grads=targets["norm"])
        dmemory = None
        for i in reversed(range(self.num_layers)):
            dx, more = self._blocks()[i]._backward_rows(dx, of_blocks[i], targets[f"layers.{i}"])
            dmemory = more if dmemory is None or more is None else dmemory + more
        return dx, dmemory


class TransformerEncoderLayer(Encodes, Block):
    """A layer of an encoder [1]_: self-attention and feed-forward, each added to its input.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
    .. [2] R. Xiong et al., "On layer normalization in the Transformer architecture", ICML 2020.
    .. [3] N. Shazeer, "GLU variants improve Transformer", arXiv:2002.05202, 2020.
    """

    _cross: ClassVar[bool] = False


class TransformerDecoderLayer(Decodes, Block):
    """A layer of a decoder [1]_: self-attention, attention to a memory and feed-forward, each added to its input.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
    .. [2] R. Xiong et al., "On layer normalization in the Transformer architecture", ICML 2020.
    .. [3] N. Shazeer, "GLU variants improve Transformer", arXiv:2002.05202, 2020.
    """

    _cross: ClassVar[bool] = True


class TransformerEncoder(Encodes, Tower):
    """The encoder of the Transformer [1]_: layers of self-attention and feed-forward.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
    .. [2] R. Xiong et al., "On layer normalization in the Transformer architecture", ICML 2020.
    .. [3] N. Shazeer, "GLU variants improve Transformer", arXiv:2002.05202, 2020.
    """

    _block = TransformerEncoderLayer


class TransformerDecoder(Decodes, Tower):
    """The decoder of the Transformer [1]_: layers of self-attention, attention to a memory and feed-forward.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
    .. [2] R. Xiong et al., "On layer normalization in the Transformer architecture", ICML 2020.
    .. [3] N. Shazeer, "GLU variants improve Transformer", arXiv:2002.05202, 2020.
    """

    _block = TransformerDecoderLayer


class Transformer(Stack):
    """The Transformer [1]_: an encoder, and a decoder that attends to what the encoder made; both end with a norm.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
    .. [2] R. Xiong et al., "On layer normalization in the Transformer architecture", ICML 2020.
    .. [3] N. Shazeer, "GLU variants improve Transformer", arXiv:2002.05202, 2020.
    """

    d_model: int = size(default=512, doc=D_MODEL)
    nhead: int = size(default=8, doc=NHEAD)
    num_encoder_layers: int = size(default=6, limit=MAX_LAYERS, doc="How many layers the encoder has.")
    num_decoder_layers: int = size(default=6, limit=MAX_LAYERS, doc="How many layers the decoder has.")
    dim_feedforward: int = size(default=2048, doc=FEEDFORWARD)

    def _build(self) -> None:
        config = {**self._of_layers(), "final_norm": True}
        first, second = seeds_of(self.seed, 2)
        of = self._backend.of
        self.encoder = of(TransformerEncoder)(num_layers=self.num_encoder_layers, seed=first, **config)
        self.decoder = of(TransformerDecoder)(num_layers=self.num_decoder_layers, seed=second, **config)
        self._children = {"encoder": self.encoder, "decoder": self.decoder}

    def _opened(
        self,
        src: Any,
        tgt: Any,
        src_mask: Any,
        tgt_mask: Any,
        memory_mask: Any,
        src_lengths: Any,
        tgt_lengths: Any,
        causal: Any,
    ) -> tuple[Tokens, Context, Tokens, Context]:
        """The tokens of source and target, and what the layers of encoder and decoder are told except the memory."""
        source = self._tokens("src", src, "src_lengths", src_lengths, "S")
        target = self._tokens("tgt", tgt, "tgt_lengths", tgt_lengths)
        same_batch("tgt", tgt, "src", source, target)
        keys, rows = source.rows, target.rows
        of_encoder = Context(Frame(keys, keys, False), self._mask("src_mask", src_mask, keys, keys), False)
        of_decoder = Context(
            Frame(rows, rows, False),
            self._mask("tgt_mask", tgt_mask, rows, rows),
            checks.flag("causal", causal),
            None,
            Frame(rows, keys, False),
            self._mask("memory_mask", memory_mask, rows, keys),
        )
        return source, of_encoder, target, of_decoder

    def __call__(
        self,
        src: Any,
        tgt: Any,
        *,
        src_mask: Any = None,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        src_lengths: Any = None,
        tgt_lengths: Any = None,
        causal: bool = True,
        return_weights: bool = False,
    ) -> Any:
        """Encode the sources and decode the targets; inference.

        Parameters
        ----------
        src : array of shape (B, S, d_model), or (S, d_model)
            Real floating numbers.
        tgt : array of shape (B, T, d_model), or (T, d_model)
        src_mask, tgt_mask, memory_mask : arrays that broadcast to (B, heads, S, S), (B, heads, T, T), (B, heads, T, S)
            Optional. Booleans: True = may attend. Or real numbers, which are added to the scaled scores; -inf forbids.
        src_lengths, tgt_lengths : arrays of shape (B,), optional
            The real tokens of each row; nothing is computed for those past them, and nothing in them matters.
        causal : bool
            Whether each token of the target may attend only to those of the target before it and itself.
        return_weights : bool
            Whether to return what each token attends to, too.

        Returns
        -------
        y : ndarray of shape (B, T, d_model)
            0 past a row's length.
        weights : pair of lists
            With `return_weights`: of the encoder's layers (B, heads, S, S), and of the decoder's the pairs
            (B, heads, T, T) and (B, heads, T, S).

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        source, of_encoder, target, of_decoder = self._opened(
            src, tgt, src_mask, tgt_mask, memory_mask, src_lengths, tgt_lengths, causal
        )
        wanted = checks.flag("return_weights", return_weights)
        memory, encoder_weights = self.encoder._run_rows(source.x, of_encoder, wanted)
        y, decoder_weights = self.decoder._run_rows(target.x, of_decoder._replace(memory=memory), wanted)
        out = _single(target.rows.scatter(y), target.unbatched)
        if encoder_weights is None or decoder_weights is None:
            return out
        return out, tuple(
            [_single(own, target.unbatched) for own in maps] for maps in (encoder_weights, decoder_weights)
        )

    def forward(
        self,
        src: Any,
        tgt: Any,
        *,
        src_mask: Any = None,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        src_lengths: Any = None,
        tgt_lengths: Any = None,
        causal: bool = True,
        seed: int | None = None,
    ) -> tuple[Array, Tape]:
        """Encode and decode for training: what a call gives, except dropout, and what `backward` needs.

        Parameters
        ----------
        src, tgt, src_mask, tgt_mask, memory_mask, src_lengths, tgt_lengths, causal
            As for a call. Arrays are not to be changed as long as the tape is used.
        seed : int, optional
            Fixes what dropout drops; drawn where it is not given.

        Returns
        -------
        y : ndarray of shape (B, T, d_model)
        tape : Tape
        """
        source, of_encoder, target, of_decoder = self._opened(
            src, tgt, src_mask, tgt_mask, memory_mask, src_lengths, tgt_lengths, causal
        )
        seed = mask_seed(seed)
        memory, encoded = self.encoder._forward_rows(source.x, of_encoder, child_seed(seed, 0))
        y, decoded = self.decoder._forward_rows(target.x, of_decoder._replace(memory=memory), child_seed(seed, 1))
        kept = encoded, decoded, source.rows, target.rows, target.unbatched
        return _single(target.rows.scatter(y), target.unbatched), Tape(self, kept)

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> tuple[Array, Array]:
        """Gradients, given that of the outputs.

        Parameters
        ----------
        dy : array of the shape of y
            Past a row's length nothing in it matters.
        tape : Tape
            What `forward` returned.
        grads : mapping from str to ndarray, optional
            Where the gradients of the parameters are added; `grads` of the layers by default.

        Returns
        -------
        dsrc, dtgt : ndarrays of the shapes of src and tgt
            0 past a row's length.
        """
        encoded, decoded, source, target, unbatched = self._kept(tape)
        targets = self._child_targets(grads)
        gradient = target.gather(_gradient(dy, self.dtype, target, self.d_model, unbatched))
        dtgt, dmemory = self.decoder._backward_rows(gradient, decoded, targets["decoder"])
        assert dmemory is not None
        dsrc, _ = self.encoder._backward_rows(dmemory, encoded, targets["encoder"])
        return _single(source.scatter(dsrc), unbatched), _single(target.scatter(dtgt), unbatched)

    def initial_state(self, src: Any, *, src_mask: Any = None, src_lengths: Any = None) -> AttentionState:
        """The state before the first token of the target: the sources encoded.

        Parameters
        ----------
        src : array of shape (B, S, d_model)
            Real floating numbers.
        src_mask, src_lengths
            As for a call.
        """
        memory = self.encoder(src, mask=src_mask, lengths=src_lengths)
        state: AttentionState = self.decoder.initial_state(memory, memory_lengths=src_lengths)
        return state

    def step(self, tgt_t: Any, state: Any) -> tuple[Array, AttentionState]:
        """One token more of each target, (B, d_model): outputs of that shape, and the state for the next step."""
        stepped: tuple[Array, AttentionState] = self.decoder.step(tgt_t, state)
        return stepped


def same_batch(name: str, value: Any, as_name: str, one: Tokens, other: Tokens) -> None:
    """Refuse an argument of another batch than an earlier one."""
    if one.unbatched != other.unbatched or one.rows.batch != other.rows.batch:
        raise ValueError(
            f"{name} should have the batch of {as_name}, {'none' if one.unbatched else one.rows.batch},"
            f" not be of shape {np.shape(value)}"
        )


def _single(array: Any, unbatched: bool) -> Any:
    """An array without its batch, where none was given; or each of a pair."""
    if not unbatched:
        return array
    return tuple(part[0] for part in array) if isinstance(array, tuple) else array[0]


def _gradient(dy: Any, dtype: np.dtype[Any], rows: Rows, width: int, unbatched: bool) -> Array:
    """The gradient of outputs, (B, T, width)."""
    shape = rows.batch, rows.time, width
    return checks.like("dy", dy, dtype, shape[1:] if unbatched else shape).reshape(shape)
