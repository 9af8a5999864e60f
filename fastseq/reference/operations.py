"""RNN, LSTM and GRU as the textbooks write them, one equation a gate.

Nothing here is shared with the compiled operations: `pack`, `run`, `fits` and `step` are the four of both sets,
written twice. Arrays are batch first; a cell's functions see one time step, x (B, I) and h (B, H).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastseq.checks import Array

Cells = Sequence[Sequence["Cell"]]  # [layer][direction]


def sigmoid(a: Array) -> Array:
    """1 / (1 + exp(-a)), without overflow."""
    e = np.exp(-np.abs(a))
    return np.where(a >= 0, 1, e) / (1 + e)


def relu(a: Array) -> Array:
    """max(a, 0)"""
    return np.maximum(a, 0)


NONLINEARITIES: dict[str, Callable[[Array], Array]] = {
    "rnn_tanh": np.tanh,
    "rnn_relu": relu,
    "rnn_sigmoid": sigmoid,
}


class Cell:
    """The weights of one layer in one direction, split by gate: W of the input, U of the state, b and d."""

    def __init__(
        self,
        kind: str,
        weight_ih: Array,
        weight_hh: Array,
        bias_ih: Array | None,
        bias_hh: Array | None,
        weight_hr: Array | None,
    ) -> None:
        gates = {"lstm": 4, "gru_reset_after": 3, "gru_reset_before": 3}.get(kind, 1)
        none = np.zeros(len(weight_ih), weight_ih.dtype)
        self.kind = kind
        self.W = np.split(weight_ih, gates)
        self.U = np.split(weight_hh, gates)
        self.b = np.split(none if bias_ih is None else bias_ih, gates)
        self.d = np.split(none if bias_hh is None else bias_hh, gates)
        self.projection = weight_hr

    def step(self, x: Array, h: Array, c: Array | None) -> tuple[Array, Array | None]:
        """One time step: the state after it."""
        if self.kind == "lstm":
            assert c is not None
            return lstm(self, x, h, c)
        if self.kind == "gru_reset_after":
            return gru_reset_after(self, x, h), None
        if self.kind == "gru_reset_before":
            return gru_reset_before(self, x, h), None
        return rnn(self, x, h), None


pack = Cell


def rnn(cell: Cell, x: Array, h: Array) -> Array:
    """h' = f(W x + b + U h + d)"""
    (W,), (U,), (b,), (d,) = cell.W, cell.U, cell.b, cell.d
    return NONLINEARITIES[cell.kind](x @ W.T + b + h @ U.T + d)


def lstm(cell: Cell, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
    """Input, forget and output gates, and the candidate, in PyTorch's order i, f, g, o."""
    W_i, W_f, W_g, W_o = cell.W
    U_i, U_f, U_g, U_o = cell.U
    b_i, b_f, b_g, b_o = cell.b
    d_i, d_f, d_g, d_o = cell.d
    input_gate = sigmoid(x @ W_i.T + b_i + h @ U_i.T + d_i)
    forget_gate = sigmoid(x @ W_f.T + b_f + h @ U_f.T + d_f)
    candidate = np.tanh(x @ W_g.T + b_g + h @ U_g.T + d_g)
    output_gate = sigmoid(x @ W_o.T + b_o + h @ U_o.T + d_o)
    c = forget_gate * c + input_gate * candidate
    h = output_gate * np.tanh(c)
    if cell.projection is not None:
        h = h @ cell.projection.T
    return h, c


def gru_reset_after(cell: Cell, x: Array, h: Array) -> Array:
    """The reset gate acts on the product of the candidate's recurrent weights; order r, z, n."""
    W_r, W_z, W_n = cell.W
    U_r, U_z, U_n = cell.U
    b_r, b_z, b_n = cell.b
    d_r, d_z, d_n = cell.d
    reset_gate = sigmoid(x @ W_r.T + b_r + h @ U_r.T + d_r)
    update_gate = sigmoid(x @ W_z.T + b_z + h @ U_z.T + d_z)
    candidate = np.tanh(x @ W_n.T + b_n + reset_gate * (h @ U_n.T + d_n))
    return (1 - update_gate) * candidate + update_gate * h


def gru_reset_before(cell: Cell, x: Array, h: Array) -> Array:
    """The reset gate acts on the state before the candidate's recurrent weights see it; order r, z, n."""
    W_r, W_z, W_n = cell.W
    U_r, U_z, U_n = cell.U
    b_r, b_z, b_n = cell.b
    d_r, d_z, d_n = cell.d
    reset_gate = sigmoid(x @ W_r.T + b_r + h @ U_r.T + d_r)
    update_gate = sigmoid(x @ W_z.T + b_z + h @ U_z.T + d_z)
    candidate = np.tanh(x @ W_n.T + b_n + (reset_gate * h) @ U_n.T + d_n)
    return (1 - update_gate) * candidate + update_gate * h


def run(
    cells: Cells, x: Array, h: Array, c: Array | None, lengths: Array | None, n_threads: int
) -> tuple[Array, Array, Array | None]:
    """Whole sequences through all layers and directions.

    Parameters
    ----------
    cells : [layer][direction]
    x : array of shape (B, T, I)
    h, c : arrays of shape (B, num_layers * D, H)
        Where each row starts; c is None but for the LSTM.
    lengths : int array of shape (B,), or None
    n_threads : int
        For the compiled operations; NumPy has its own.

    Returns
    -------
    y, h, c
        Outputs (B, T, D * H), and where each row ends.
    """
    batch, time = x.shape[:2]
    if lengths is None:
        lengths = np.full(batch, time)
    h, c = h.copy(), None if c is None else c.copy()
    slot = 0
    for layer in cells:
        outputs = []
        for direction, cell in enumerate(layer):
            y = np.zeros((batch, time, h.shape[2]), x.dtype)
            for s in range(lengths.max(initial=0)):
                rows = np.flatnonzero(lengths > s)
                t = s if direction == 0 else lengths[rows] - 1 - s
                h_t, c_t = cell.step(x[rows, t], h[rows, slot], None if c is None else c[rows, slot])
                y[rows, t] = h[rows, slot] = h_t
                if c is not None:
                    c[rows, slot] = c_t
            outputs.append(y)
            slot += 1
        x = np.concatenate(outputs, axis=2)
    return x, *_read_only(h, c)


def fits(cells: Cells, x: object, dims: int, state: object, out: object) -> bool:
    """Whether the arguments of a call are known to need no check. Here they never are."""
    return False


def step(
    cells: Cells, x: Array, h: Array, c: Array | None, out: Array | None, n_threads: int
) -> tuple[Array, Array, Array | None]:
    """One time step through all layers of one direction: the outputs, in `out` if given, and the state after it."""
    h, c = h.copy(), None if c is None else c.copy()
    for slot, (cell,) in enumerate(cells):
        h_t, c_t = cell.step(x, h[:, slot], None if c is None else c[:, slot])
        x = h[:, slot] = h_t
        if c is not None:
            c[:, slot] = c_t
    if out is None:
        out = np.empty_like(x)
    out[...] = x
    return out, *_read_only(h, c)


def _read_only(*arrays: Array | None) -> tuple[Any, ...]:
    """Arrays become a state, which is immutable."""
    for array in arrays:
        if array is not None:
            array.flags.writeable = False
    return arrays
