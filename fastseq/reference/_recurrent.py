"""RNN, LSTM and GRU as the textbooks write them, one equation a gate, and backpropagation through time beside them.

Nothing here is shared with the compiled operations: `pack`, `run`, `fits`, `step`, `forward`, `gates` and `backward`
are those of both sets, written twice. Arrays are batch first; a cell's functions see one time step, x (B, I) and
h (B, H). Each has its backward under it, which undoes it from its last line to its first: what a line of the forward
made has a gradient d<name>, and the comment at the end of a line quotes the part of the forward that the line undoes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastseq.checks import Array
from fastseq.narrow import Weight, split_rows

Cells = Sequence[Sequence["Cell"]]  # [layer][direction]
Kept = dict[str, Array]  # what a cell's backward needs of one step, by the names of its forward
Grads = tuple[Array | None, ...]  # gradients of weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, and the vectors
LN_EPS = 1e-5  # of the layer-normalised LSTM


def sigmoid(a: Array) -> Array:
    """1 / (1 + exp(-a)), without overflow."""
    e = np.exp(-np.abs(a))
    return np.where(a >= 0, 1, e) / (1 + e)


def sigmoid_backward(s: Array, ds: Array) -> Array:
    """s = sigmoid(a): s' = s (1 - s)"""
    return ds * s * (1 - s)


def tanh_backward(t: Array, dt: Array) -> Array:
    """t = tanh(a): t' = 1 - t²"""
    return dt * (1 - t * t)


def relu(a: Array) -> Array:
    """max(a, 0)"""
    return np.maximum(a, 0)


def relu_backward(r: Array, dr: Array) -> Array:
    """r = relu(a): r' = 1 but where r is 0; a NaN is not, and lets the gradient pass."""
    return np.where(r <= 0, 0, dr)


NONLINEARITIES: dict[str, tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]] = {
    "rnn_tanh": (np.tanh, tanh_backward),
    "rnn_relu": (relu, relu_backward),
    "rnn_sigmoid": (sigmoid, sigmoid_backward),
}
# What `gates` gives beside h.
GATES = {
    "lstm": ("i", "f", "g", "o", "c"),
    "lstm_ln": ("i", "f", "g", "o", "c"),
    "gru_reset_after": ("r", "z", "n"),
    "gru_reset_before": ("r", "z", "n"),
}


class Cell:
    """The weights of one layer in one direction, split by gate: W of the input, U of the state, b and d.

    The gradients of a cell's weights are a cell, too. What is split are views: adding to them adds to the arrays
    given here.
    """

    def __init__(
        self,
        kind: str,
        weight_ih: Weight,
        weight_hh: Weight,
        bias_ih: Array | None,
        bias_hh: Array | None,
        weight_hr: Weight | None,
        *vectors: Array | None,
    ) -> None:
        gates = {"lstm": 4, "lstm_ln": 4, "gru_reset_after": 3, "gru_reset_before": 3}.get(kind, 1)
        none = np.zeros(len(weight_ih), weight_ih.dtype)
        self.kind = kind
        self.W = split_rows(weight_ih, gates)
        self.U = split_rows(weight_hh, gates)
        self.b = np.split(none if bias_ih is None else bias_ih, gates)
        self.d = np.split(none if bias_hh is None else bias_hh, gates)
        self.projection: Any = weight_hr
        self.weight_ih, self.weight_hh = weight_ih, weight_hh
        self.vectors = vectors  # of the layer-normalised LSTM

    def forward(self, x: Array, h: Array, c: Array | None) -> tuple[Array, Array | None, Kept]:
        """One time step: the state after it, and what its backward needs."""
        if self.kind == "lstm":
            assert c is not None
            return lstm_forward(self, x, h, c)
        if self.kind == "lstm_ln":
            assert c is not None
            return lstm_ln_forward(self, x, h, c)
        if self.kind == "gru_reset_after":
            return gru_reset_after_forward(self, x, h)
        if self.kind == "gru_reset_before":
            return gru_reset_before_forward(self, x, h)
        return rnn_forward(self, x, h)

    def backward(
        self, sums: Cell, x: Array, h: Array, c: Array | None, kept: Kept, dh: Array, dc: Array | None
    ) -> tuple[Array, Array, Array | None, Array | None]:
        """One time step back.

        From the gradients of the state after the step, as far as later steps have given them: the gradients of its
        input and of the state before it; and all of that of c after it. Those of the weights are added to `sums`.
        """
        if self.kind == "lstm":
            assert c is not None and dc is not None
            return lstm_backward(self, sums, x, h, c, kept, dh, dc)
        if self.kind == "lstm_ln":
            assert c is not None and dc is not None
            return lstm_ln_backward(self, sums, x, h, c, kept, dh, dc)
        if self.kind == "gru_reset_after":
            return *gru_reset_after_backward(self, sums, x, h, kept, dh), None, None
        if self.kind == "gru_reset_before":
            return *gru_reset_before_backward(self, sums, x, h, kept, dh), None, None
        return *rnn_backward(self, sums, x, h, kept, dh), None, None


pack = Cell


def rnn_forward(cell: Cell, x: Array, h: Array) -> tuple[Array, None, Kept]:
    """h' = f(W x + b + U h + d)"""
    (W,), (U,), (b,), (d,) = cell.W, cell.U, cell.b, cell.d
    f, _ = NONLINEARITIES[cell.kind]
    h = f(x @ W.T + b + h @ U.T + d)
    return h, None, {"h": h}


def rnn_backward(cell: Cell, sums: Cell, x: Array, h: Array, kept: Kept, dh: Array) -> tuple[Array, Array]:
    """Undo `rnn_forward`."""
    _, f_backward = NONLINEARITIES[cell.kind]
    da = f_backward(kept["h"], dh)  # h = f(…)
    return affine_backward(cell, sums, 0, x, h, da)  # x @ W.T + b + h @ U.T + d


def affine_backward(cell: Cell, sums: Cell, gate: int, x: Array, h: Array, da: Array) -> tuple[Array, Array]:
    """Undo a gate's a = x @ W.T + b + h @ U.T + d: the gradients of x and h."""
    sums.d[gate] += da.sum(axis=0)  # + d
    sums.U[gate] += da.T @ h  # h @ U.T
    sums.b[gate] += da.sum(axis=0)  # + b
    sums.W[gate] += da.T @ x  # x @ W.T
    return da @ cell.W[gate], da @ cell.U[gate]


def lstm_forward(cell: Cell, x: Array, h: Array, c: Array) -> tuple[Array, Array, Kept]:
    """Input, forget and output gates, and the candidate, in PyTorch's order i, f, g, o."""
    W_i, W_f, W_g, W_o = cell.W
    U_i, U_f, U_g, U_o = cell.U
    b_i, b_f, b_g, b_o = cell.b
    d_i, d_f, d_g, d_o = cell.d
    i = sigmoid(x @ W_i.T + b_i + h @ U_i.T + d_i)
    f = sigmoid(x @ W_f.T + b_f + h @ U_f.T + d_f)
    g = np.tanh(x @ W_g.T + b_g + h @ U_g.T + d_g)
    o = sigmoid(x @ W_o.T + b_o + h @ U_o.T + d_o)
    c = f * c + i * g
    m = o * np.tanh(c)
    h = m if cell.projection is None else m @ cell.projection.T
    return h, c, {"i": i, "f": f, "g": g, "o": o, "c": c, "m": m}


def lstm_backward(
    cell: Cell, sums: Cell, x: Array, h: Array, c: Array, kept: Kept, dh: Array, dc: Array
) -> tuple[Array, Array, Array, Array]:
    """Undo `lstm_forward`."""
    i, f, g, o, m = (kept[name] for name in "ifgom")
    tanh_c = np.tanh(kept["c"])
    dm = dh
    if cell.projection is not None:
        assert sums.projection is not None
        sums.projection += dh.T @ m  # h = m @ projection.T
        dm = dh @ cell.projection  # h = m @ projection.T
    do = dm * tanh_c  # m = o * tanh(c)
    dc_after = dc + tanh_backward(tanh_c, dm * o)  # m = o * tanh(c), beside what later steps have of c
    di, dg = dc_after * g, dc_after * i  # c = … + i * g
    df, dc = dc_after * c, dc_after * f  # c = f * c + …
    dx_o, dh_o = affine_backward(cell, sums, 3, x, h, sigmoid_backward(o, do))  # o = sigmoid(…)
    dx_g, dh_g = affine_backward(cell, sums, 2, x, h, tanh_backward(g, dg))  # g = tanh(…)
    dx_f, dh_f = affine_backward(cell, sums, 1, x, h, sigmoid_backward(f, df))  # f = sigmoid(…)
    dx_i, dh_i = affine_backward(cell, sums, 0, x, h, sigmoid_backward(i, di))  # i = sigmoid(…)
    return dx_i + dx_f + dx_g + dx_o, dh_i + dh_f + dh_g + dh_o, dc, dc_after


def normalise(z: Array) -> tuple[Array, Array]:
    """Each row of z with mean 0 and variance 1, and 1 / sqrt(variance + eps)"""
    centred = z - z.mean(axis=1, keepdims=True)
    scale = 1 / np.sqrt((centred * centred).mean(axis=1, keepdims=True) + z.dtype.type(LN_EPS))
    return centred * scale, scale


def normalise_backward(n: Array, scale: Array, dn: Array) -> Array:
    """n, scale = normalise(z): the gradient of z."""
    dz: Array = scale * (dn - dn.mean(axis=1, keepdims=True) - n * (dn * n).mean(axis=1, keepdims=True))
    return dz


def lstm_ln_forward(cell: Cell, x: Array, h: Array, c: Array) -> tuple[Array, Array, Kept]:
    """An LSTM that normalises both products, each over all four gates, and the cell state its output is made of."""
    ln_ih_weight, ln_hh_weight, ln_c_weight, *ln_c_bias = cell.vectors
    u, scale_u = normalise(x @ cell.weight_ih.T)
    v, scale_v = normalise(h @ cell.weight_hh.T)
    a = u * ln_ih_weight + np.concatenate(cell.b) + v * ln_hh_weight + np.concatenate(cell.d)
    a_i, a_f, a_g, a_o = np.split(a, 4, axis=1)
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)
    c = f * c + i * g
    w, scale_w = normalise(c)
    t = np.tanh(w * ln_c_weight + (ln_c_bias[0] if ln_c_bias else 0))
    h = o * t
    scales = {"scale_u": scale_u, "scale_v": scale_v, "scale_w": scale_w}
    return h, c, {"i": i, "f": f, "g": g, "o": o, "c": c, "t": t, "u": u, "v": v, "w": w, **scales}


def lstm_ln_backward(
    cell: Cell, sums: Cell, x: Array, h: Array, c: Array, kept: Kept, dh: Array, dc: Array
) -> tuple[Array, Array, Array, Array]:
    """Undo `lstm_ln_forward`."""
    ln_ih_weight, ln_hh_weight, ln_c_weight, *_ = cell.vectors
    of_ih_weight, of_hh_weight, of_c_weight, *of_c_bias = sums.vectors
    assert of_ih_weight is not None and of_hh_weight is not None and of_c_weight is not None
    i, f, g, o, t, u, v, w = (kept[name] for name in "ifgotuvw")
    do = dh * t  # h = o * t
    da_t = tanh_backward(t, dh * o)  # h = o * t, t = tanh(…)
    if of_c_bias and of_c_bias[0] is not None:
        of_c_bias[0] += da_t.sum(axis=0)  # … + ln_c_bias
    of_c_weight += (da_t * w).sum(axis=0)  # w * ln_c_weight
    dw = da_t * ln_c_weight  # w * ln_c_weight
    dc_after = dc + normalise_backward(w, kept["scale_w"], dw)  # normalise(c), beside what later steps have of c
    di, dg = dc_after * g, dc_after * i  # c = … + i * g
    df, dc = dc_after * c, dc_after * f  # c = f * c + …
    of_gates = (sigmoid_backward(i, di), sigmoid_backward(f, df), tanh_backward(g, dg), sigmoid_backward(o, do))
    da = np.concatenate(of_gates, axis=1)  # i, f, g, o = sigmoid(a_i), …; np.split(a, 4, axis=1)
    for gate, of_gate in enumerate(of_gates):
        sums.b[gate] += of_gate.sum(axis=0)  # … + np.concatenate(cell.b)
        sums.d[gate] += of_gate.sum(axis=0)  # … + np.concatenate(cell.d)
    of_hh_weight += (da * v).sum(axis=0)  # v * ln_hh_weight
    dhh = normalise_backward(v, kept["scale_v"], da * ln_hh_weight)  # v, scale_v = normalise(…)
    sums.weight_hh += dhh.T @ h  # h @ cell.weight_hh.T
    of_ih_weight += (da * u).sum(axis=0)  # u * ln_ih_weight
    dih = normalise_backward(u, kept["scale_u"], da * ln_ih_weight)  # u, scale_u = normalise(…)
    sums.weight_ih += dih.T @ x  # x @ cell.weight_ih.T
    return dih @ cell.weight_ih, dhh @ cell.weight_hh, dc, dc_after


def gru_reset_after_forward(cell: Cell, x: Array, h: Array) -> tuple[Array, None, Kept]:
    """The reset gate acts on the product of the candidate's recurrent weights; order r, z, n."""
    W_r, W_z, W_n = cell.W
    U_r, U_z, U_n = cell.U
    b_r, b_z, b_n = cell.b
    d_r, d_z, d_n = cell.d
    r = sigmoid(x @ W_r.T + b_r + h @ U_r.T + d_r)
    z = sigmoid(x @ W_z.T + b_z + h @ U_z.T + d_z)
    u = h @ U_n.T + d_n
    n = np.tanh(x @ W_n.T + b_n + r * u)
    h = (1 - z) * n + z * h
    return h, None, {"r": r, "z": z, "u": u, "n": n}


def gru_reset_after_backward(cell: Cell, sums: Cell, x: Array, h: Array, kept: Kept, dh: Array) -> tuple[Array, Array]:
    """Undo `gru_reset_after_forward`."""
    r, z, u, n = (kept[name] for name in "rzun")
    dz = dh * (h - n)  # h = (1 - z) * n + z * h
    dn = dh * (1 - z)  # h = (1 - z) * n + …
    dh_carried = dh * z  # h = … + z * h
    da = tanh_backward(n, dn)  # n = tanh(…)
    dr, du = da * u, da * r  # … + r * u
    sums.b[2] += da.sum(axis=0)  # … + b_n
    sums.W[2] += da.T @ x  # x @ W_n.T
    dx_n = da @ cell.W[2]  # x @ W_n.T
    sums.d[2] += du.sum(axis=0)  # u = … + d_n
    sums.U[2] += du.T @ h  # u = h @ U_n.T
    dh_n = du @ cell.U[2]  # u = h @ U_n.T
    dx_z, dh_z = affine_backward(cell, sums, 1, x, h, sigmoid_backward(z, dz))  # z = sigmoid(…)
    dx_r, dh_r = affine_backward(cell, sums, 0, x, h, sigmoid_backward(r, dr))  # r = sigmoid(…)
    return dx_r + dx_z + dx_n, dh_r + dh_z + dh_n + dh_carried


def gru_reset_before_forward(cell: Cell, x: Array, h: Array) -> tuple[Array, None, Kept]:
    """The reset gate acts on the state before the candidate's recurrent weights see it; order r, z, n."""
    W_r, W_z, W_n = cell.W
    U_r, U_z, U_n = cell.U
    b_r, b_z, b_n = cell.b
    d_r, d_z, d_n = cell.d
    r = sigmoid(x @ W_r.T + b_r + h @ U_r.T + d_r)
    z = sigmoid(x @ W_z.T + b_z + h @ U_z.T + d_z)
    n = np.tanh(x @ W_n.T + b_n + (r * h) @ U_n.T + d_n)
    h = (1 - z) * n + z * h
    return h, None, {"r": r, "z": z, "n": n}


def gru_reset_before_backward(cell: Cell, sums: Cell, x: Array, h: Array, kept: Kept, dh: Array) -> tuple[Array, Array]:
    """Undo `gru_reset_before_forward`."""
    r, z, n = (kept[name] for name in "rzn")
    dz = dh * (h - n)  # h = (1 - z) * n + z * h
    dn = dh * (1 - z)  # h = (1 - z) * n + …
    dh_carried = dh * z  # h = … + z * h
    dx_n, drh = affine_backward(cell, sums, 2, x, r * h, tanh_backward(n, dn))  # n = tanh(… (r * h) @ U_n.T + d_n)
    dr, dh_n = drh * h, drh * r  # r * h
    dx_z, dh_z = affine_backward(cell, sums, 1, x, h, sigmoid_backward(z, dz))  # z = sigmoid(…)
    dx_r, dh_r = affine_backward(cell, sums, 0, x, h, sigmoid_backward(r, dr))  # r = sigmoid(…)
    return dx_r + dx_z + dx_n, dh_r + dh_z + dh_n + dh_carried


class Step(NamedTuple):
    """One own step of a direction, for all rows that have it."""

    rows: Array
    t: Any  # where it is in time: one index, or one a row
    fresh: Array  # for each of the rows, whether it started again from zeros
    h: Array  # the state before the step
    c: Array | None
    kept: Kept


class Tape(NamedTuple):
    """What `backward` needs of a `forward`."""

    cells: Sequence[Cell]
    x: Array
    h: Array
    c: Array | None
    lengths: Array | None
    resets: Array | None
    y: Array
    steps: list[list[Step]]  # of each direction, in its own order


def forward(
    cells: Sequence[Cell],
    x: Array,
    h: Array,
    c: Array | None,
    lengths: Array | None,
    resets: Array | None,
    n_threads: int,
) -> tuple[Array, Array, Array | None, Tape]:
    """Whole sequences through all directions of one layer.

    Parameters
    ----------
    cells : one a direction
    x : array of shape (B, T, I)
        The tape refers to it.
    h, c : arrays of shape (B, D, H)
        Where each row starts; c is None except for the LSTM.
    lengths : int array of shape (B,), or None
    resets : bool array of shape (B, T), or None
        Where a direction is about to take a row's x at t, the row's state goes back to zeros.
    n_threads : int
        For the compiled operations; NumPy has its own.

    Returns
    -------
    y, h, c, tape
        Outputs (B, T, D * H), where each row ends, and what `backward` needs.
    """
    batch, time = x.shape[:2]
    width = h.shape[2]
    steps_of_row = np.full(batch, time) if lengths is None else lengths
    h_n, c_n = h.copy(), None if c is None else c.copy()
    y = np.zeros((batch, time, len(cells) * width), x.dtype)
    tape = Tape(cells, x, h, c, lengths, resets, y, [])
    for direction, cell in enumerate(cells):
        outputs = y[:, :, direction * width : (direction + 1) * width]
        steps = []
        for s in range(steps_of_row.max(initial=0)):
            rows = np.flatnonzero(steps_of_row > s)
            t = s if direction == 0 else steps_of_row[rows] - 1 - s
            fresh = np.zeros(len(rows), bool) if resets is None else resets[rows, t]
            before_h, before_c = h_n[rows, direction], None if c_n is None else c_n[rows, direction]
            before_h[fresh] = 0
            if before_c is not None:
                before_c[fresh] = 0
            h_t, c_t, kept = cell.forward(x[rows, t], before_h, before_c)
            outputs[rows, t] = h_n[rows, direction] = h_t
            if c_n is not None:
                c_n[rows, direction] = c_t
            steps.append(Step(rows, t, fresh, before_h, before_c, kept))
        tape.steps.append(steps)
    return y, h_n, c_n, tape


def backward(
    tape: Tape,
    dy: Array,
    dh: Array | None,
    dc: Array | None,
    truncate: int | None,
    grads: Sequence[Grads],
    keep: bool,
    n_threads: int,
) -> tuple[Array, Array, Array | None, tuple[Array, Array | None] | None]:
    """Backpropagation through time: undo `forward`.

    Parameters
    ----------
    tape : what `forward` gave
    dy : array of shape (B, T, D * H)
        The gradient of y.
    dh, dc : arrays of shape (B, D, H), or None for zeros
        The gradients of where each row ends.
    truncate : int, or None
        No gradient crosses from a direction's own step m * truncate to the one before, m >= 1.
    grads : one tuple (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, *vectors) a direction
        What the gradients of the weights are added to; None for what the cell does not have.
    keep : bool
        Whether to return the gradients of all states.
    n_threads : int
        For the compiled operations; NumPy has its own.

    Returns
    -------
    dx, dh, dc, flow
        The gradients of x and of where each row started; with `keep` those of h (B, T, D, H) and c after every step
        as well, each with all that follows from it, which for c is h of the same step, too. Else None.
    """
    batch, time = tape.x.shape[:2]
    width = tape.h.shape[2]
    dx = np.zeros(tape.x.shape, tape.x.dtype)
    dh = np.zeros_like(tape.h) if dh is None else dh.copy()
    if tape.c is not None:
        dc = np.zeros_like(tape.c) if dc is None else dc.copy()
    flow_h = np.zeros((batch, time, *dh.shape[1:]), dh.dtype)
    flow_c = None if dc is None else np.zeros((batch, time, *dc.shape[1:]), dc.dtype)
    for direction, cell in enumerate(tape.cells):
        d_outputs = dy[:, :, direction * width : (direction + 1) * width]
        arrays = [None if array is None else np.zeros_like(array) for array in grads[direction]]
        sums = Cell(cell.kind, *arrays)  # type: ignore[arg-type]
        for s, step in reversed(list(enumerate(tape.steps[direction]))):
            rows, t = step.rows, step.t
            dh_t = dh[rows, direction] + d_outputs[rows, t]  # outputs[rows, t] = h_n[rows, direction] = h_t
            dc_t = None if dc is None else dc[rows, direction]  # c_n[rows, direction] = c_t
            flow_h[rows, t, direction] = dh_t
            x_t = tape.x[rows, t]
            dx_t, dh_t, dc_t, dc_after = cell.backward(  # cell.forward(…)
                sums, x_t, step.h, step.c, step.kept, dh_t, dc_t
            )
            dx[rows, t] += dx_t  # x[rows, t]
            cut = step.fresh | (truncate is not None and s > 0 and s % truncate == 0)
            dh_t[cut] = 0  # before_h[fresh] = 0
            dh[rows, direction] = dh_t  # before_h = h_n[rows, direction]
            if dc is not None and dc_t is not None and flow_c is not None:
                flow_c[rows, t, direction] = dc_after
                dc_t[cut] = 0  # before_c[fresh] = 0
                dc[rows, direction] = dc_t  # before_c = c_n[rows, direction]
        for target, array in zip(grads[direction], arrays, strict=True):
            if target is not None:
                target += array
    return dx, dh, dc, (flow_h, flow_c) if keep else None


def gates(tape: Tape) -> dict[str, Array]:
    """What stood in the gates at every step: each (B, T, D, H), with zeros in the padding; and h."""
    shape = (*tape.y.shape[:2], len(tape.cells))
    hidden = len(tape.cells[0].U[0])
    names = GATES.get(tape.cells[0].kind, ())
    result = {name: np.zeros((*shape, hidden), tape.y.dtype) for name in names}
    for direction, steps in enumerate(tape.steps):
        for step in steps:
            for name in names:
                result[name][step.rows, step.t, direction] = step.kept[name]
    result["h"] = tape.y.reshape(*shape, tape.h.shape[2])
    return result


def run(
    cells: Cells,
    x: Array,
    h: Array,
    c: Array | None,
    lengths: Array | None,
    resets: Array | None,
    n_threads: int,
    tables: None = None,
) -> tuple[Array, Array, Array | None]:
    """Whole sequences through all layers and directions.

    Parameters
    ----------
    cells : [layer][direction]
    x : array of shape (B, T, I)
    h, c : arrays of shape (B, num_layers * D, H)
        Where each row starts; c is None except for the LSTM.
    lengths, resets, n_threads
        As `forward` takes them.
    tables : None
        What `input_table` gives.

    Returns
    -------
    y, h, c
        Outputs (B, T, D * H), and where each row ends.
    """
    h, c = h.copy(), None if c is None else c.copy()
    for number, layer in enumerate(cells):
        slots = slice(number * len(layer), (number + 1) * len(layer))
        c_0 = None if c is None else c[:, slots]
        x, h[:, slots], c_n, _ = forward(layer, x, h[:, slots], c_0, lengths, resets, n_threads)
        if c is not None:
            c[:, slots] = c_n
    return x, *_read_only(h, c)


def rollout(
    cells: Cells, weight: Weight, bias: Array, x: Array, h: Array, c: Array | None, steps: int, n_threads: int
) -> tuple[Array, Array, Array | None]:
    """Steps of which each takes what a linear map makes of the outputs of the one before: x' = W y + b.

    Parameters
    ----------
    cells : [layer][direction]
        Of one direction.
    weight, bias : arrays of shapes (I, H) and (I,)
    x : array of shape (B, I)
        What the first step takes.
    h, c : arrays of shape (B, num_layers, H)
        Where each row starts; c is None except for the LSTM.
    steps, n_threads : int

    Returns
    -------
    y, h, c
        What the linear map gave after each step, (B, steps, I), and where each row ends.
    """
    y = np.empty((len(x), steps, len(weight)), x.dtype)
    h, c = h.copy(), None if c is None else c.copy()
    for t in range(steps):
        out, h, c = step(cells, x, h, c, None, n_threads)
        y[:, t] = x = out @ weight.T + bias
    return y, *_read_only(h, c)


def input_table(cell: Cell, embedding: Weight, n_threads: int) -> None:
    """A table of the input parts of pre-activations. Here there is none: the layer is called on the embeddings."""


def fits(cells: Cells, x: object, dims: int, state: object, out: object) -> bool:
    """Whether the arguments of a call are known to need no check. Here they never are."""
    return False


def step(
    cells: Cells, x: Array, h: Array, c: Array | None, out: Array | None, n_threads: int
) -> tuple[Array, Array, Array | None]:
    """One time step through all layers of one direction: the outputs, in `out` if given, and the state after it."""
    h, c = h.copy(), None if c is None else c.copy()
    for slot, (cell,) in enumerate(cells):
        h_t, c_t, _ = cell.forward(x, h[:, slot], None if c is None else c[:, slot])
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
