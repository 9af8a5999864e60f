"""Parts that the recurrent models share: layers by the names of their cells, an embedding read by a layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastseq import layers, threads
from fastseq.checks import Array
from fastseq.layers.recurrent import Recurrent
from fastseq.models.base import ParameterCache

CELLS: dict[str, type[Recurrent]] = {"rnn": layers.RNN, "lstm": layers.LSTM, "gru": layers.GRU}


class Reader:
    """An embedding and the recurrent layer over it, in inference.

    What the first layer makes of a symbol, before it looks at its state, is looked up: a table has it of all symbols,
    unless that would be large.

    Parameters
    ----------
    embedding, layer
        The layers.
    """

    def __init__(self, embedding: Any, layer: Any) -> None:
        self._embedding, self._layer = embedding, layer
        self._tables = ParameterCache(embedding, layer)

    def tables(self) -> tuple[Array, ...] | None:
        """One for each direction; None where there are none."""
        tables: tuple[Array, ...] | None = self._tables.get(self._make)
        return tables

    def _make(self) -> tuple[Array, ...] | None:
        operations, n_threads = self._layer._backend.recurrent, threads.get_num_threads()
        weight = self._embedding._arrays["weight"]
        tables = [operations.input_table(cell, weight, n_threads) for cell in self._layer._cells()[0]]
        return None if any(table is None for table in tables) else tuple(tables)

    def __call__(self, ids: Array, state: Any = None, lengths: Array | None = None) -> tuple[Array, Any]:
        """Outputs (B, T, D * H) and state after symbols (B, T), all as the layer has them; ids are checked."""
        tables = self.tables()
        if tables is None:
            outputs: tuple[Array, Any] = self._layer(self._embedding(ids), state, lengths=lengths)
            return outputs
        read: tuple[Array, Any] = self._layer._read(np.ascontiguousarray(ids), tables, state, lengths)
        return read


def rollout(recurrent: Any, output: Any, x: Array, state: Any, steps: int) -> Array:
    """Go on from `x` (B, I), each output taken for the next input: (B, steps, I)."""
    weight, bias = output._arrays["weight"], output._arrays["bias"]
    h, c = state.h, getattr(state, "c", None)
    y: Array
    y, _, _ = recurrent._backend.recurrent.rollout(
        recurrent._cells(), weight, bias, np.ascontiguousarray(x), h, c, steps, threads.get_num_threads()
    )
    return y
