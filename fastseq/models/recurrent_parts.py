"""Parts that the recurrent models share: layers by the names of their cells, an embedding read by a layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastseq import layers
from fastseq.checks import Array
from fastseq.layers import inside
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
        layer, weight = self._layer, inside.arrays(self._embedding)["weight"]
        tables: list[Any] = [inside.input_table(layer, cell, weight) for cell in inside.cells(layer)[0]]
        return None if any(table is None for table in tables) else tuple(tables)

    def __call__(self, ids: Array, state: Any = None, lengths: Array | None = None) -> tuple[Array, Any]:
        """Outputs (B, T, D * H) and state after symbols (B, T), all as the layer has them; ids are checked."""
        tables = self.tables()
        if tables is None:
            outputs: tuple[Array, Any] = self._layer(self._embedding(ids), state, lengths=lengths)
            return outputs
        return inside.run_symbols(self._layer, np.ascontiguousarray(ids), tables, state, lengths)
