"""The inside interface: what models, training and initialisation need of layers beyond the verbs users call.

Parameters without a copy, packed weights, rows of real tokens, steps. These are functions and not methods, so that
`dir` of a layer shows what a user may call and nothing else. Outside `fastseq/layers/` nobody uses an underscored
member of a layer, except subclasses, of self.

Of a batch (B, T, ...), rows (N, ...) are the real tokens, sequence after sequence; `Rows` has where each sequence
begins. Arguments are not checked, except where a function says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastseq import threads
from fastseq.checks import Array
from fastseq.layers.additive_attention import AdditiveAttention, Alignment, AttentionSteps
from fastseq.layers.attention import Frame
from fastseq.layers.base import Composite, Layer, Tape
from fastseq.layers.graph import Graph
from fastseq.layers.linear import Linear, TiedOutput
from fastseq.layers.positions import LearnedPositions, SinusoidalPositions
from fastseq.layers.recurrent import Recurrent
from fastseq.layers.rows import Rows
from fastseq.layers.sequential import Sequential
from fastseq.layers.transformer.block import Context, Runs
from fastseq.layers.transformer.decoder import Decodes
from fastseq.state import AttentionState, State, adopt

__all__ = [
    "AttentionSteps",
    "Context",
    "PackedStack",
    "TiedOutput",
    "adopt_parameters",
    "append_tokens",
    "arrays",
    "attend",
    "attend_backward",
    "attend_forward",
    "attend_padded",
    "attend_step",
    "backward_rows",
    "become_twin",
    "cells",
    "check_state",
    "check_trainable",
    "children",
    "constructor_call",
    "copy_parameters",
    "drawn_children",
    "flow",
    "forward_rows",
    "initial_arrays",
    "input_table",
    "last_layers",
    "memory_state",
    "norm_parameters",
    "output_lengths",
    "packed",
    "packed_stack",
    "position_table",
    "project_keys",
    "rollout",
    "row_blocks",
    "run_rows",
    "run_symbols",
    "split_cells",
    "start_state",
    "timed_outputs",
]


# Parameters.


def arrays(layer: Layer) -> Mapping[str, Array]:
    """Return all parameters by name, read-only and not copied.

    A change of a parameter puts another mapping in its place: of a layer that is no composite it is the same object as
    long as no parameter has changed.
    """
    return layer._arrays


def adopt_parameters(layer: Layer, changed: Mapping[str, Array]) -> None:
    """Replace parameters without copying.

    Each array is C-contiguous, of the layer's dtype and of the shape of the parameter; the caller passes ownership, and
    it becomes read-only.
    """
    layer._adopt(changed)


def copy_parameters(layer: Layer, changed: Mapping[str, Array]) -> None:
    """Replace parameters by copies of some arrays of their shapes, converted to the layer's dtype."""
    layer._assign(changed)


def become_twin(layer: Layer, given: Mapping[str, Any], weight_type: str) -> None:
    """Make a new layer the twin that a file holds, of arrays and narrow arrays by name; a fault is a ValueError."""
    layer._take_narrow(given, weight_type)


def check_trainable(layer: Layer, what: str) -> None:
    """Raise a TypeError that says what needs float32 weights, where the layer is a twin with narrow ones."""
    layer._refuse_where_narrow(what)


def constructor_call(layer: Layer) -> str:
    """Return the call that makes a layer of this configuration, for messages."""
    return layer._making()


def children(layer: Layer) -> Mapping[str, Any]:
    """Return the layers that a layer is made of, by name; none, where it is not made of layers."""
    return layer._children if isinstance(layer, Composite) else {}


def drawn_children(layer: Layer) -> list[tuple[int, Layer]]:
    """Return the children that `fastseq.init.initialise` draws, each with its place among all children."""
    own_rule = layer._by_own_rule if isinstance(layer, Composite) else ()
    return [(place, child) for place, (name, child) in enumerate(children(layer).items()) if name not in own_rule]


def initial_arrays(layer: Layer, seed: int | None) -> Mapping[str, Array]:
    """Return the parameters of a layer of the same configuration, made with another seed."""
    config = dict(layer._config)
    if "seed" in config:
        config["seed"] = seed
    return type(layer)(**config)._arrays


def norm_parameters(layer: Layer) -> set[str]:
    """Return the names of gains and biases of the norms within a recurrent cell, which no initialisation draws."""
    if not isinstance(layer, Recurrent):
        return set()
    return {name for name in layer._arrays if name.startswith(tuple(layer._vectors()))} if layer._vectors() else set()


def row_blocks(layer: Layer, name: str) -> list[int]:
    """Return how the rows of a matrix divide into matrices of their own: of each gate, or of q, k and v."""
    return layer._row_blocks(name)


# Containers.


def last_layers(layer: Layer) -> list[Layer]:
    """Return the layer that gives each output, of the innermost containers."""
    if isinstance(layer, Sequential):
        return last_layers(layer[-1])
    if isinstance(layer, Graph):
        nodes = [layer.nodes[layer._wiring.source(value)].layer for value in layer._wiring.outputs.values()]
        return [node if isinstance(node, Graph) and len(node.outputs) > 1 else last_layers(node)[0] for node in nodes]
    return [layer]


def timed_outputs(graph: Graph) -> dict[str, bool]:
    """Return which outputs of a graph have an axis of time, by name."""
    return {name: graph._wiring.timed[value] is not False for name, value in graph._wiring.outputs.items()}


def output_lengths(graph: Graph, lengths: Array | None) -> dict[str, Array]:
    """Return the lengths of each output of a graph that has an axis of time, by name; none without lengths."""
    found = graph._lengths_by_value(lengths, {})
    return {name: found[value] for name, value in graph._wiring.outputs.items() if value in found}


# Packed weights.


def packed(linear: Linear | TiedOutput) -> Any:
    """Return the packed weights of a linear map, as `linear_forward` and compiled decoders take them."""
    return linear._weights()


def position_table(positions: LearnedPositions | SinusoidalPositions, count: int) -> Array:
    """Return what is added at the positions 0..count - 1, (P, D) with P at least `count`."""
    return positions._table(count)


# Recurrent layers: steps and symbols. D directions, H hidden units, V symbols.


def cells(layer: Recurrent) -> tuple[tuple[Any, ...], ...]:
    """Return the packed weights: of each layer a tuple of one cell a direction."""
    packed_cells: tuple[tuple[Any, ...], ...] = layer._cells()
    return packed_cells


def split_cells(layer: Recurrent, columns: int) -> tuple[Any, list[Any]]:
    """Return the cells of a layer of one direction whose input comes in two parts: `columns` elements, and the rest.

    The first result takes the first part and no state, for `input_table`. The second has a cell for each layer; that of
    the first layer takes the second part of the input. Narrow weights are not split, as an input has one scale: the
    cell of the first layer takes both parts as one.
    """
    ((weight_ih, weight_hh, *more),) = layer._by_direction(layer._arrays, 0)
    if not isinstance(weight_ih, np.ndarray):
        whole = [cell for (cell,) in layer._cells()]
        return whole[0], whole
    first, second = (np.ascontiguousarray(part) for part in (weight_ih[:, :columns], weight_ih[:, columns:]))
    pack = layer._backend.recurrent.pack
    upper = [cell for (cell,) in layer._cells()[1:]]
    return pack(layer._cell, first, weight_hh[:, :0], *more), [pack(layer._cell, second, weight_hh, *more), *upper]


def input_table(layer: Recurrent, cell: Any, embedding: Array) -> Array | None:
    """Return what a cell of the first layer makes of each symbol before it reads its state; `embedding` is (V, I).

    None where the table would be large.
    """
    table: Array | None = layer._backend.recurrent.input_table(cell, embedding, threads.get_num_threads())
    return table


def run_symbols(
    layer: Recurrent, ids: Array, tables: tuple[Array, ...], state: Any, lengths: Array | None
) -> tuple[Array, State]:
    """Run a layer over symbols, (B, T) int64 and contiguous, whose inputs are in tables of `input_table`; inference.

    Returns the outputs (B, T, D H) and the state each row ends in. `state` is checked.
    """
    h, c = layer._state_arrays(state, *ids.shape)
    y, h, c = layer._backend.recurrent.run(layer._cells(), ids, h, c, lengths, None, threads.get_num_threads(), tables)
    return y, adopt(h, c)


def rollout(layer: Recurrent, output: Linear, x: Array, state: State, steps: int) -> Array:
    """Return (B, steps, I): the outputs that follow `x` (B, I), each the input of the next step."""
    weight, bias = output._arrays["weight"], output._arrays["bias"]
    h, c = state.h, getattr(state, "c", None)
    y: Array
    y, _, _ = layer._backend.recurrent.rollout(
        layer._cells(), weight, bias, np.ascontiguousarray(x), h, c, steps, threads.get_num_threads()
    )
    return y


def flow(layer: Recurrent, dy: Any, tape: Tape, dstate: Any) -> tuple[Array, Array | None]:
    """Return the gradients of h, and of c where there is one, after every step: (B, T, num_layers D, H).

    Arguments are checked as those of `backward`; no gradient of a parameter is added anywhere.
    """
    return layer._flow(dy, tape, dstate)


# Encoders and decoders of the Transformer, and single layers of them, over rows (N, d_model).


class PackedStack(NamedTuple):
    """The packed weights of a stack, as the inference schedule and compiled decoders take them."""

    blocks: list[Any]  # one a layer
    norm: tuple[str, float, Array, Array | None] | None  # after the last layer: its kind, epsilon, weight and bias


def run_rows(stack: Runs, x: Array, context: Context, want_weights: bool = False) -> tuple[Array, list[Any] | None]:
    """Run a stack in inference: the outputs (N, d_model), and if wanted the attention weights of each layer.

    Those are (B, heads, T, T), in a decoder pairs of these and (B, heads, T, Tm).
    """
    return stack._run_rows(x, context, want_weights)


def forward_rows(stack: Runs, x: Array, context: Context, seed: int) -> tuple[Array, Any]:
    """Run a stack in training: the outputs (N, d_model), and what `backward_rows` needs; `seed` is of dropout."""
    return stack._forward_rows(x, context, seed)


def backward_rows(stack: Runs, dy: Array, kept: Any, grads: Mapping[str, Array] | None) -> tuple[Array, Array | None]:
    """Return the gradients of `x` (N, d_model) and, in a decoder, of the memory (M, d_model).

    Those of the parameters are added to `grads`, by default to those of the stack.
    """
    return stack._backward_rows(dy, kept, grads)


def packed_stack(stack: Runs, longest: int) -> PackedStack:
    """Return the packed weights for sequences of at most `longest` tokens."""
    return PackedStack(stack._packed_blocks(longest), stack._final_norm())


def start_state(stack: Runs, batch: int, tokens: Array | None = None) -> AttentionState:
    """Return the state of B rows without tokens; `tokens` (B, T) where the state keeps ids."""
    return stack._start_state(batch, None, tokens)


def memory_state(decoder: Decodes, memory: Array, rows: Rows) -> AttentionState:
    """Return the state of a decoder before the first token, given its memory (M, d_model)."""
    return decoder._memory_state(memory, rows)


def check_state(stack: Runs, state: Any, batch: int, tokens: bool = False) -> AttentionState:
    """Check that a state is of this stack, for B rows, and keeps ids or not; return it as the operations take it."""
    return stack._check_state(state, batch, tokens)


def append_tokens(
    stack: Runs, x: Array, starts: Array, state: AttentionState, tokens: Array | None = None
) -> tuple[Array, AttentionState]:
    """Append tokens `x` (N, d_model) to the rows of a state: their outputs (N, d_model), and the state after them.

    Those of row b are ``x[starts[b] : starts[b + 1]]``. `tokens` (B, T) are all ids of each row, where the state keeps
    them.
    """
    return stack._append_tokens(x, starts, state, tokens)


# Attention of a recurrent decoder. Queries (N, Q) and keys (M, K) are rows; A is the width of projected keys.


def project_keys(attention: Alignment, keys: Array) -> Array:
    """Return what scores take of keys, (M, A); it does not depend on a query."""
    return attention._project_keys(keys)


def attend(
    attention: Alignment, query: Array, rows: Rows, keys: Array, projected: Array, key_rows: Rows, want_weights: bool
) -> tuple[Array, Any]:
    """Return the contexts (N, K) of queries, and if wanted the attention weights (B, T, S); inference."""
    return attention._attend(query, keys, projected, Frame(rows, key_rows, False), want_weights)


def attend_forward(attention: Alignment, query: Array, rows: Rows, keys: Array, key_rows: Rows) -> tuple[Array, Any]:
    """Return the contexts (N, K) of queries, and what `attend_backward` needs."""
    return attention._attend_forward(query, keys, Frame(rows, key_rows, False))


def attend_backward(
    attention: Alignment, dcontext: Array, kept: Any, grads: Mapping[str, Array] | None
) -> tuple[Array, Array]:
    """Return the gradients of queries (N, Q) and keys (M, K); those of the parameters are added to `grads`."""
    return attention._attend_backward(dcontext, kept, attention._targets(grads))


def attend_padded(attention: Alignment, query: Array, keys: Array, projected: Array, lengths: Array) -> Array:
    """Return the context (B, K) of one query (B, Q) a row; keys (B, S, K) and projected keys (B, S, A) are padded."""
    return attention._attend_padded(query, keys, projected, lengths)


def attend_step(
    attention: AdditiveAttention, query: Array, keys: Array, projected: Array, firsts: Array, counts: Array
) -> tuple[Array, Array]:
    """Return the context (B, K) of one query (B, Q) a row, and attention weights (B, S); inference.

    The keys of row b are the `counts[b]` from `firsts[b]` on. `AttentionSteps` is the same in training.
    """
    return attention._attend_step(query, keys, projected, firsts, counts)
