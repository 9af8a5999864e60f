"""Whole stacks of Transformer blocks [1]_ for inference, as the textbooks write them.

Nothing here is shared with the compiled operations of `fastseq._transformer`, which has the same functions. Rows are
the tokens of all sequences one after another: x (N, d_model), and `starts` (B + 1,) of where each sequence begins.

References
----------
.. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastseq.checks import Array
from fastseq.reference.attention_operations import attention, rotary
from fastseq.reference.dense import activation_forward, layer_norm_forward, linear_forward, rms_norm_forward


class Block(NamedTuple):
    """The settings of a block, and its weights by the names they have in it."""

    settings: Mapping[str, Any]
    parts: Mapping[str, Any]


class Run(NamedTuple):
    """What is the same for all blocks of a run."""

    starts: Array
    positions: Array | None
    causal: bool
    mask: Array | None
    memory: Array | None
    memory_starts: Array | None
    memory_mask: Array | None
    want_weights: bool


def block_pack(settings: Mapping[str, Any], parts: Mapping[str, Any]) -> Block:
    """A block as `run_blocks` wants it.

    Parameters
    ----------
    settings : mapping
        heads, kv_heads, head_dim; activation; norm_first, norm, eps; cross, whether it attends to a memory; window, and
        rotary: None, or (cos, sin, interleaved).
    parts : mapping
        in_proj (rows q, k, v), out_proj, linear1, linear2; with a memory cross_q, cross_kv (rows k, v) and cross_out:
        each what `linear_pack` returned. norm1, norm2, with a memory norm3: pairs (weight, bias), either may be None.
    """
    return Block(dict(settings), dict(parts))


def run_blocks(
    blocks: list[Block],
    x: Array,
    starts: Array,
    positions: Array | None,
    causal: bool,
    mask: Array | None,
    memory: Array | None,
    memory_starts: Array | None,
    memory_mask: Array | None,
    final_norm: tuple[str, float, Array | None, Array | None] | None,
    want_weights: bool,
    n_threads: int,
) -> tuple[Array, list[Any] | None]:
    """One block after another, and a norm after the last if there is one.

    Post-norm:  x = norm1(x + self(x));  x = norm2(x + cross(x));  x = norm3(x + feed_forward(x))
    Pre-norm:   x = x + self(norm1(x));  x = x + cross(norm2(x));  x = x + feed_forward(norm3(x))

    Without a memory there is no cross, and the last norm is norm2. Masks are those of the ragged form of `attention`.
    """
    run = Run(starts, positions, causal, mask, memory, memory_starts, memory_mask, want_weights)
    weights = []
    for block in blocks:
        sublayers = [self_attention, *([cross_attention] if block.settings["cross"] else []), feed_forward]
        maps = []
        for i, sublayer in enumerate(sublayers):
            weight_and_bias = block.parts[f"norm{i + 1}"]
            if block.settings["norm_first"]:
                more, attended = sublayer(block, normed(block, weight_and_bias, x), run)
                x = x + more
            else:
                more, attended = sublayer(block, x, run)
                x = normed(block, weight_and_bias, x + more)
            maps.append(attended)
        weights.append((maps[0], maps[1]) if block.settings["cross"] else maps[0])
    if final_norm is not None:
        kind, eps, weight, bias = final_norm
        x = norm(kind, eps, weight, bias, x)
    return x, weights if want_weights else None


def self_attention(block: Block, x: Array, run: Run) -> tuple[Array, Array | None]:
    """[q k v] = W_in x + b_in;  y = W_out attention(q, k, v) + b_out"""
    heads, kv_heads, size = (block.settings[name] for name in ("heads", "kv_heads", "head_dim"))
    projected = linear_forward(block.parts["in_proj"], x, 1).reshape(len(x), heads + 2 * kv_heads, size)
    q, k, v = np.split(projected, [heads, heads + kv_heads], axis=1)
    if block.settings["rotary"] is not None:
        cos, sin, interleaved = block.settings["rotary"]
        positions: Any = run.positions
        q, k = (rotary(rows, cos, sin, positions, interleaved, False, 1) for rows in (q, k))
    spans = run.starts, run.starts
    scale, window = 1 / np.sqrt(size), block.settings["window"]
    out, weights = attention(q, k, v, spans, None, run.mask, run.causal, window, scale, run.want_weights, 1)
    return linear_forward(block.parts["out_proj"], out.reshape(len(x), heads * size), 1), weights


def cross_attention(block: Block, x: Array, run: Run) -> tuple[Array, Array | None]:
    """q = W_q x + b_q;  [k v] = W_kv memory + b_kv;  y = W_out attention(q, k, v) + b_out"""
    heads, kv_heads, size = (block.settings[name] for name in ("heads", "kv_heads", "head_dim"))
    memory: Any = run.memory
    q = linear_forward(block.parts["cross_q"], x, 1).reshape(len(x), heads, size)
    projected = linear_forward(block.parts["cross_kv"], memory, 1).reshape(len(memory), 2 * kv_heads, size)
    k, v = np.split(projected, 2, axis=1)
    spans: Any = (run.starts, run.memory_starts)
    scale = 1 / np.sqrt(size)
    out, weights = attention(q, k, v, spans, None, run.memory_mask, False, None, scale, run.want_weights, 1)
    return linear_forward(block.parts["cross_out"], out.reshape(len(x), heads * size), 1), weights


def feed_forward(block: Block, x: Array, run: Run) -> tuple[Array, None]:
    """y = W_2 f(W_1 x + b_1) + b_2"""
    hidden = linear_forward(block.parts["linear1"], x, 1)
    return linear_forward(block.parts["linear2"], activation_forward(hidden, block.settings["activation"], 1), 1), None


def normed(block: Block, weight_and_bias: tuple[Array | None, Array | None], x: Array) -> Array:
    """A norm of a block."""
    return norm(block.settings["norm"], block.settings["eps"], *weight_and_bias, x)


def norm(kind: str, eps: float, weight: Array | None, bias: Array | None, x: Array) -> Array:
    """Layer normalisation, or that by the root of the mean square alone."""
    if kind == "rms":
        return rms_norm_forward(x, weight, eps, 1)[0]
    return layer_norm_forward(x, weight, bias, eps, 1)[0]
