"""Whole stacks of Transformer blocks [1]_ for inference, as the textbooks write them.

Nothing here is shared with the compiled operations of `fastseq._transformer`, which has the same functions. Rows are
the tokens of all sequences one after another: x (N, d_model), and `starts` (B + 1,) of where each sequence begins.

References
----------
.. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fastseq.checks import Array
from fastseq.reference._attention import attention, rotary
from fastseq.reference._dense import activation_forward, layer_norm_forward, linear_forward, rms_norm_forward

FinalNorm = tuple[str, float, Array | None, Array | None] | None
PAGE = 64  # tokens that are let go of together, once they are out of the window


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
    final_norm: FinalNorm,
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
        x, maps = through(block, x, [partial(sublayer, block, run=run) for sublayer in sublayers])
        weights.append((maps[0], maps[1]) if block.settings["cross"] else maps[0])
    return ended(final_norm, x), weights if want_weights else None


def through(block: Block, x: Array, sublayers: list[Any]) -> tuple[Array, list[Any]]:
    """A block: each sublayer with its sum and its norm; and what each sublayer gives besides."""
    others = []
    for i, sublayer in enumerate(sublayers):
        weight_and_bias = block.parts[f"norm{i + 1}"]
        if block.settings["norm_first"]:
            more, other = sublayer(normed(block, weight_and_bias, x))
            x = x + more
        else:
            more, other = sublayer(x)
            x = normed(block, weight_and_bias, x + more)
        others.append(other)
    return x, others


def ended(final_norm: FinalNorm, x: Array) -> Array:
    """What comes after the last block: a norm, or nothing."""
    if final_norm is None:
        return x
    kind, eps, weight, bias = final_norm
    return norm(kind, eps, weight, bias, x)


def heads_of(block: Block, x: Array, positions: Array | None) -> list[Array]:
    """[q k v] = W_in x + b_in as heads (N, heads, D); q and k turned by their positions, where that is wanted."""
    heads, kv_heads, size = (block.settings[name] for name in ("heads", "kv_heads", "head_dim"))
    projected = linear_forward(block.parts["in_proj"], x, 1).reshape(len(x), heads + 2 * kv_heads, size)
    q, k, v = np.split(projected, [heads, heads + kv_heads], axis=1)
    if block.settings["rotary"] is not None:
        cos, sin, interleaved = block.settings["rotary"]
        angles: Any = positions
        q, k = (rotary(rows, cos, sin, angles, interleaved, False, 1) for rows in (q, k))
    return [q, k, v]


def joined(heads: Array) -> Array:
    """Heads (N, H, D) side by side, (N, H D)."""
    return heads.reshape(len(heads), heads.shape[1] * heads.shape[2])


def self_attention(block: Block, x: Array, run: Run) -> tuple[Array, Array | None]:
    """[q k v] = W_in x + b_in;  y = W_out attention(q, k, v) + b_out"""
    q, k, v = heads_of(block, x, run.positions)
    spans = run.starts, run.starts
    scale, window = 1 / np.sqrt(block.settings["head_dim"]), block.settings["window"]
    out, weights = attention(q, k, v, spans, None, run.mask, run.causal, window, scale, run.want_weights, 1)
    return linear_forward(block.parts["out_proj"], joined(out), 1), weights


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
    return linear_forward(block.parts["cross_out"], joined(out), 1), weights


def feed_forward(block: Block, x: Array, run: Run | None = None) -> tuple[Array, None]:
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


class Pages:
    """Keys and values of a batch of sequences in all layers of a stack. Immutable.

    Parameters
    ----------
    window : int
        How many tokens the next one looks back on, itself among them; 0: all.
    lengths : array of shape (B,)
        Tokens of each row.
    firsts : array of shape (B,)
        The first token of each row that is kept: those before it are out of the window.
    keys, values : arrays of shape (B, layers, kv_heads, T, D)
        From token 0 on; what is not kept may be anything.
    """

    def __init__(self, window: int, lengths: Array, firsts: Array, keys: Array, values: Array) -> None:
        self.window, self.lengths, self.firsts = window, lengths, firsts
        self.keys, self.values = keys, values

    @property
    def form(self) -> tuple[int, int, int, Any]:
        """What is the same for all rows: layers, key-value heads, elements of a head, and the dtype."""
        _, layers, kv_heads, _, size = self.keys.shape
        return layers, kv_heads, size, self.keys.dtype

    def take(self, rows: Any, lengths: Array | None = None) -> Pages:
        """Some rows, in any order and as often as they are named; up to `lengths` of their tokens."""
        index = np.asarray(rows, np.intp)
        lengths = self.lengths[index] if lengths is None else np.asarray(lengths)
        return Pages(self.window, lengths, self.firsts[index], self.keys[index], self.values[index])

    @staticmethod
    def join(many: list[Pages]) -> Pages:
        """The rows of some, one after another."""
        time = max(one.keys.shape[3] for one in many)
        keys, values = (
            np.concatenate([longer(array, time) for array in arrays])
            for arrays in ([one.keys for one in many], [one.values for one in many])
        )
        lengths, firsts = (
            np.concatenate(arrays) for arrays in zip(*((p.lengths, p.firsts) for p in many), strict=True)
        )
        return Pages(many[0].window, lengths, firsts, keys, values)

    def arrays(self) -> tuple[Array, Array, Array]:
        """First token kept (B,), and keys and values (B, layers, kv_heads, T, D) from it on, zeros past the last."""
        time = int((self.lengths - self.firsts).max(initial=0))
        shape = (*self.keys.shape[:3], time, self.keys.shape[4])
        keys, values = np.zeros(shape, self.keys.dtype), np.zeros(shape, self.keys.dtype)
        for i, (first, length) in enumerate(zip(self.firsts, self.lengths, strict=True)):
            keys[i, :, :, : length - first] = self.keys[i, :, :, first:length]
            values[i, :, :, : length - first] = self.values[i, :, :, first:length]
        return self.firsts, keys, values

    @staticmethod
    def of(window: int, lengths: Array, firsts: Array, keys: Array, values: Array) -> Pages:
        """The opposite of `arrays`."""
        shape = (*keys.shape[:3], int(lengths.max(initial=0)), keys.shape[4])
        whole_keys, whole_values = np.zeros(shape, keys.dtype), np.zeros(shape, keys.dtype)
        for i, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
            whole_keys[i, :, :, first:length] = keys[i, :, :, : length - first]
            whole_values[i, :, :, first:length] = values[i, :, :, : length - first]
        return Pages(window, lengths, firsts, whole_keys, whole_values)


def longer(array: Array, time: int) -> Array:
    """(B, L, K, T, D) with zeros up to a time."""
    result = np.zeros((*array.shape[:3], time, array.shape[4]), array.dtype)
    result[:, :, :, : array.shape[3]] = array
    return result


def no_pages(blocks: list[Block], dtype: Any, rows: int) -> Pages:
    """Where so many sequences start."""
    settings = blocks[0].settings
    empty = np.zeros((rows, len(blocks), settings["kv_heads"], 0, settings["head_dim"]), dtype)
    return Pages(settings["window"] or 0, np.zeros(rows, np.int64), np.zeros(rows, np.int64), empty, empty)


def memory_pages(blocks: list[Block], memory: Array, starts: Array, n_threads: int) -> Pages:
    """The keys and values that every block makes of a memory: [k v] = W_kv memory + b_kv.

    Parameters
    ----------
    blocks : list of Block
    memory : array of shape (N, d_model)
        The tokens of all sequences one after another.
    starts : array of shape (B + 1,)
        Where each begins.
    """
    pages = no_pages(blocks, memory.dtype, len(starts) - 1)
    kv_heads, size = blocks[0].settings["kv_heads"], blocks[0].settings["head_dim"]
    made = [
        np.split(linear_forward(block.parts["cross_kv"], memory, 1).reshape(len(memory), 2 * kv_heads, size), 2, axis=1)
        for block in blocks
    ]
    return appended(pages, starts, made, 0)


def appended(pages: Pages, starts: Array, made: list[Any], window: int) -> Pages:
    """Pages with more tokens: of each layer keys and values (N, kv_heads, D), rows as `starts` says."""
    lengths = pages.lengths + np.diff(starts)
    time = int(lengths.max(initial=0))
    keys, values = longer(pages.keys[:, :, :, :time], time), longer(pages.values[:, :, :, :time], time)
    for layer, (k, v) in enumerate(made):
        for i in range(len(lengths)):
            new = slice(starts[i], starts[i + 1])
            at = slice(pages.lengths[i], lengths[i])
            keys[i, layer, :, at] = k[new].swapaxes(0, 1)
            values[i, layer, :, at] = v[new].swapaxes(0, 1)
    out = np.where((window > 0) & (lengths >= window), (lengths - window + 1) // PAGE * PAGE, 0)
    return Pages(window, lengths, np.maximum(pages.firsts, out), keys, values)


def run_cached(
    blocks: list[Block],
    x: Array,
    starts: Array,
    pages: Pages,
    memory: Pages | None,
    final_norm: FinalNorm,
    n_threads: int,
) -> tuple[Array, Pages]:
    """`run_blocks`, causal, of sequences that go on: what came before is in pages.

    Parameters
    ----------
    blocks : list of Block
    x : array of shape (N, d_model)
        The new tokens of all sequences one after another.
    starts : array of shape (B + 1,)
        Where those of each sequence begin.
    pages : Pages
        Keys and values of the tokens before.
    memory : Pages or None
        What `memory_pages` made.
    final_norm
        As of `run_blocks`.

    Returns
    -------
    y : array of shape (N, d_model)
    pages : Pages
        With the new tokens.
    """
    made: list[Any] = []
    positions = np.arange(len(x)) + np.repeat(pages.lengths - starts[:-1], np.diff(starts))

    def attend_self(block: Block, x: Array) -> tuple[Array, None]:
        q, k, v = heads_of(block, x, positions)
        made.append((k, v))
        window = block.settings["window"]
        own = appended(pages, starts, made, 0)
        return attended(block, "out_proj", q, starts, own, len(made) - 1, True, window), None

    def attend_memory(block: Block, x: Array) -> tuple[Array, None]:
        q = linear_forward(block.parts["cross_q"], x, 1).reshape(
            len(x), block.settings["heads"], block.settings["head_dim"]
        )
        others: Any = memory
        return attended(block, "cross_out", q, starts, others, len(made) - 1, False, None), None

    for block in blocks:
        cross = [partial(attend_memory, block)] if block.settings["cross"] else []
        x, _ = through(block, x, [partial(attend_self, block), *cross, partial(feed_forward, block)])
    return ended(final_norm, x), appended(pages, starts, made, pages.window)


def attended(
    block: Block, out: str, q: Array, starts: Array, pages: Pages, layer: int, causal: bool, window: int | None
) -> Array:
    """y = W_out attention(q, k, v) + b_out, with the keys and values of a layer in pages."""
    k_starts = np.concatenate([[0], np.cumsum(pages.lengths)])
    k, v = (
        np.concatenate([rows[i, layer, :, :length].swapaxes(0, 1) for i, length in enumerate(pages.lengths)])
        for rows in (pages.keys, pages.values)
    )
    scale = 1 / np.sqrt(block.settings["head_dim"])
    mixed, _ = attention(q, k, v, (starts, k_starts), None, None, causal, window, scale, False, 1)
    return linear_forward(block.parts[out], joined(mixed), 1)
