"""Blocks of Transformers: their settings, their sublayers, and how they run over rows of real tokens.

A call passes the packed weights of a whole stack to one operation. `forward` goes through the sublayers in order, and
`backward` through them in reverse order. All of them see the real tokens of a batch alone, as rows.
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
        """Return the layers, first to last."""

    def _last_norm(self) -> Any:
        """Return the norm after the last layer, if there is one."""
        return None

    @abstractmethod
    def _forward_rows(self, x: Array, context: Context, seed: int) -> tuple[Array, Any]:
        """Run in training over rows (N, d_model): the outputs, and what `_backward_rows` needs."""

    @abstractmethod
    def _backward_rows(self, dy: Array, kept: Any, grads: Mapping[str, Array] | None) -> tuple[Array, Array | None]:
        """Return the gradients of tokens (N, d_model) and, in a decoder, of memory (M, d_model)."""

    def _packed_blocks(self, longest: int) -> list[Any]:
        """Return the packed layers for sequences of at most `longest` tokens."""
        return [block._packed_for(longest) for block in self._blocks()]

    def _final_norm(self) -> tuple[str, float, Array, Array | None] | None:
        """Return kind, epsilon, weight and bias of the norm after the last layer."""
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
        """Check arguments and return what `step` returns."""
        x = checks.real_array("x_t", x_t, self.dtype)
        if x.ndim != 2 or x.shape[1] != self.d_model:
            raise ValueError(f"x_t should be of shape (B, {self.d_model}), not {x.shape}")
        batch = len(x)
        state = self._start_state(batch, None, None) if state is None else self._check_state(state, batch, False)
        return self._append_tokens(np.ascontiguousarray(x), np.arange(batch + 1), state, None)

    def _run_rows(self, x: Array, context: Context, want_weights: bool) -> tuple[Array, list[Any] | None]:
        """Run in inference over rows (N, d_model): the outputs, and of each layer the attention weights, or a pair."""
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
        """Return what a call returns: outputs (B, T, d_model), and attention weights where there are any."""
        out = single(rows.scatter(y), unbatched)
        if weights is None:
            return out
        maps = [single(own, unbatched) for own in weights]
        return out, maps

    def _forward_padded(self, tokens: Tokens, context: Context, seed: Any) -> tuple[Array, Tape]:
        """Return what `forward` returns: outputs (B, T, d_model), and the tape."""
        y, kept = self._forward_rows(tokens.x, context, mask_seed(seed))
        return single(tokens.rows.scatter(y), tokens.unbatched), Tape(self, (kept, context, tokens.unbatched))

    def _backward_padded(self, dy: Any, tape: Tape, grads: Any) -> tuple[Array, Array | None]:
        """Return the gradients of tokens (B, T, d_model) and, in a decoder, memory."""
        kept, context, unbatched = self._kept(tape)
        rows = context.frame.queries
        gradient = rows.gather(output_gradient(dy, self.dtype, rows, self.d_model, unbatched))
        dx, dmemory = self._backward_rows(gradient, kept, grads)
        dx = single(rows.scatter(dx), unbatched)
        if dmemory is None:
            return dx, None
        return dx, single(context.memory_frame.keys.scatter(dmemory), unbatched)


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


def same_batch(name: str, value: Any, as_name: str, one: Tokens, other: Tokens) -> None:
    """Refuse an argument of another batch than an earlier one."""
    if one.unbatched != other.unbatched or one.rows.batch != other.rows.batch:
        raise ValueError(
            f"{name} should have the batch of {as_name}, {'none' if one.unbatched else one.rows.batch},"
            f" not be of shape {np.shape(value)}"
        )


def single(array: Any, unbatched: bool) -> Any:
    """An array without its batch, where none was given; or each of a pair."""
    if not unbatched:
        return array
    return tuple(part[0] for part in array) if isinstance(array, tuple) else array[0]


def output_gradient(dy: Any, dtype: np.dtype[Any], rows: Rows, width: int, unbatched: bool) -> Array:
    """The gradient of outputs, (B, T, width)."""
    shape = rows.batch, rows.time, width
    return checks.like("dy", dy, dtype, shape[1:] if unbatched else shape).reshape(shape)
