"""Training of the recurrent layers on both engines: resets, gates, tapes, dropout, gradients and where they go."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import pytest
from common import (
    KINDS,
    Array,
    assert_agree,
    assert_close,
    assert_same_bits,
    bits,
    inputs,
    make,
    random_lengths,
    random_state,
    tolerance,
)

import fastseq as fs
from fastseq.training import gradient_flow

pytestmark = pytest.mark.parametrize(
    "module", [pytest.param(fs, id="compiled"), pytest.param(fs.reference, id="reference")]
)
EACH = pytest.mark.parametrize("kind", KINDS)
RELATIVE = tolerance("float64", 30, 12)


def example(layer: Any, batch: int = 5, time: int = 6) -> tuple[Array, Any]:
    return inputs((batch, time, layer.input_size), layer.dtype), random_state(layer, batch)


def gradient_of(y: Array, end: Any, seed: int = 0) -> tuple[Array, Any]:
    rng = np.random.default_rng([seed, 6])
    return rng.normal(size=y.shape).astype(y.dtype), type(end)(
        *(rng.normal(size=array.shape).astype(y.dtype) for array in end)
    )


def seen_of_c(layer: Any, suffix: str, c: Array, dseen: Array) -> tuple[Array, Array]:
    """What the output of an LSTM sees of its cell state (B, H), which may be normalised, and the gradient of c."""
    if not layer.layer_norm:
        return c, dseen
    norm = fs.reference.LayerNorm(layer.hidden_size, dtype="float64")
    norm.load_state_dict({name: layer.parameters[f"ln_c_{name}_{suffix}"] for name in ("weight", "bias")})
    seen, tape = norm.forward(c)
    return seen, norm.backward(dseen, tape)


def fresh(layer: Any) -> dict[str, Array]:
    return {name: np.zeros_like(array) for name, array in layer.parameters.items()}


# Resets


@pytest.mark.parametrize("with_lengths", [False, True], ids=["", "lengths"])
@EACH
def test_resets_cut_a_row_into_sequences(kind: str, with_lengths: bool, module: Any) -> None:
    """Each from zeros but for the first; forward from their first steps, in reverse from their last."""
    layer = make(kind, 4, 6, bidirectional=True, dtype="float64", module=module)
    x, state = example(layer, 6, 9)
    lengths = random_lengths(6, 9) if with_lengths else np.full(6, 9)
    resets = np.random.default_rng(1).random((6, 9)) < 0.35
    resets[:, 0] = [True, False] * 3
    y, end = layer(x, state, lengths=lengths if with_lengths else None, resets=resets)
    width = end.h.shape[2]
    for row, length in enumerate(lengths):
        here = [t for t in range(length) if resets[row, t]]
        # Forward: a sequence starts where there is a reset. In reverse: it starts, from its end, there.
        for direction, bounds in enumerate((sorted({0, length, *here}), sorted({0, length, *(t + 1 for t in here)}))):
            pieces = list(itertools.pairwise(bounds))
            carried = state[row]
            for begin, stop in pieces if direction == 0 else reversed(pieces):
                at_the_start = begin == 0 if direction == 0 else stop == length
                first = begin if direction == 0 else stop - 1
                start = carried if at_the_start and not resets[row, first] else layer.initial_state(1)
                part, carried = layer(x[row : row + 1, begin:stop], start)
                half = slice(direction * width, (direction + 1) * width)
                assert_close(y[row, begin:stop, half], part[0, :, half], RELATIVE, f"row {row} from {begin}")
            for array, expected in zip(end, carried, strict=True):
                assert_close(array[row, direction], expected[0, direction], RELATIVE, f"end of row {row}")
        assert not y[row, length:].any()


@EACH
def test_nothing_crosses_a_reset(kind: str, module: Any) -> None:
    """Neither NaN forward, nor gradients back."""
    layer = make(kind, 4, 6, num_layers=2, dtype="float64", module=module)
    x, state = example(layer)
    resets = np.zeros((5, 6), bool)
    resets[:, 3] = True
    dirty = x.copy()
    dirty[:, :3] = np.nan
    with np.errstate(all="ignore"):
        y, end = layer(dirty, state, resets=resets)
    assert_agree((y[:, 3:], end), layer(x[:, 3:]), RELATIVE)
    assert np.isnan(y[:, :3]).any()
    y, end, tape = layer.forward(x, state, resets=resets)
    dy, dstate = gradient_of(y, end)
    dy[:, :3] = 0
    dx, dstart = layer.backward(dy, tape, dstate=dstate)
    assert not dx[:, :3].any() and dx[:, 3:].all() | (kind == "rnn_relu")
    assert not any(array.any() for array in dstart)
    flow = gradient_flow(layer, tape, dy, dstate=dstate)
    assert not flow[:3].any() and flow[3:].all()


@EACH
def test_resets_of_unbatched_rows_and_of_other_forms(kind: str, module: Any) -> None:
    layer = make(kind, 4, 6, bidirectional=True, module=module)
    x, state = example(layer, 1)
    resets = np.array([False, True, False, False, True, False])
    expected = layer(x, state, resets=resets[None])
    y, end = layer(x[0], state, resets=resets)
    assert_same_bits((y[None], end), expected)
    assert_same_bits(layer(x, state, resets=[resets.tolist()]), expected)
    assert_same_bits(layer(x, state, resets=np.repeat(resets, 2)[None, ::2]), expected)
    assert (layer(x, state)[0] != expected[0]).any()
    assert layer(x[:, :0], state, resets=[[]])[0].shape[1] == 0


# Gates


@pytest.mark.parametrize("options", ["", "lengths", "resets"])
@EACH
def test_gates(kind: str, options: str, module: Any) -> None:
    """What they are called, and that the equations of the cell hold between them."""
    layer = make(kind, 4, 6, num_layers=2, bidirectional=True, dtype="float64", module=module)
    x, state = example(layer)
    lengths = random_lengths(5, 6) if options == "lengths" else None
    resets = np.random.default_rng(2).random((5, 6)) < 0.3 if options == "resets" else None
    y, end, gates = layer(x, state, lengths=lengths, resets=resets, return_gates=True)
    assert_same_bits((y, end), layer(x, state, lengths=lengths, resets=resets))
    names = {"RNN": "h", "LSTM": "ifgoch", "GRU": "rznh"}[type(layer).__name__]
    assert sorted(gates) == sorted(names)
    outputs = end.h.shape[2]
    for name, array in gates.items():
        assert array.shape == (5, 6, 4, outputs if name == "h" else 6) and array.dtype == layer.dtype
        if lengths is not None:
            assert not bits(array[np.arange(6) >= lengths[:, None]]).any()
    assert_close(gates["h"][:, :, 2:].reshape(5, 6, -1), y, 0)
    steps = np.full(5, 6) if lengths is None else lengths
    for row, direction in itertools.product(range(5), range(2)):
        for layer_number, s in itertools.product(range(2), range(steps[row])):
            slot = 2 * layer_number + direction
            t, before = (s, s - 1) if direction == 0 else (steps[row] - 1 - s, steps[row] - s)
            at = {name: array[row, t, slot] for name, array in gates.items()}
            h, *c = [array[row, slot] for array in state]
            if s:
                h, c = gates["h"][row, before, slot], [gates["c"][row, before, slot]] if "c" in gates else []
            if resets is not None and resets[row, t]:
                h, c = np.zeros_like(h), [np.zeros_like(part) for part in c]
            if "c" in gates:
                assert_close(at["c"], at["f"] * c[0] + at["i"] * at["g"], RELATIVE, "c")
                suffix = f"l{layer_number}" + "_reverse" * direction
                seen, _ = seen_of_c(layer, suffix, at["c"][None], at["c"][None])
                m = at["o"] * np.tanh(seen[0])
                if layer.proj_size:
                    m = layer.parameters[f"weight_hr_{suffix}"] @ m
                assert_close(at["h"], m, RELATIVE, "h")
            elif "z" in gates:
                assert_close(at["h"], (1 - at["z"]) * at["n"] + at["z"] * h, RELATIVE, "h")
    if "r" in gates:
        # The one gate that no other shows: from its own weights.
        weights = [layer.parameters[f"{name}_l0"][:6] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        for row in np.flatnonzero(steps):
            start = np.zeros(6) if resets is not None and resets[row, 0] else state.h[row, 0]
            a = weights[0] @ x[row, 0] + weights[2] + weights[1] @ start + weights[3]
            assert_close(gates["r"][row, 0, 0], 1 / (1 + np.exp(-a)), RELATIVE, "r")


@EACH
def test_gates_unbatched_and_of_one_layer(kind: str, module: Any) -> None:
    layer = make(kind, 4, 6, module=module)
    x, state = example(layer, 1)
    _, _, batched = layer(x, state, return_gates=True)
    y, end, gates = layer(x[0], state, return_gates=np.True_)
    assert y.shape[0] == 6 and end.batch_size == 1
    for name, array in gates.items():
        assert_same_bits(array, batched[name][0], name)
    before = y.copy()
    gates["h"][...] = 9  # is nobody else's
    assert_same_bits(y, before)


# Tapes and where gradients go


@EACH
def test_a_tape_may_be_used_again(kind: str, module: Any) -> None:
    layer = make(kind, 4, 6, num_layers=2, bidirectional=True, dtype="float64", module=module)
    x, state = example(layer)
    y, end, tape = layer.forward(x, state, lengths=random_lengths(5, 6))
    dy, dstate = gradient_of(y, end)
    copies = [array.copy() for array in (x, *state, y, *end, dy, *dstate)]
    first = layer.backward(dy, tape, dstate=dstate)
    once = {name: array.copy() for name, array in layer.grads.items()}
    layer.backward(dy, tape, truncate=1, grads=fresh(layer))
    assert_same_bits(layer.backward(dy, tape, dstate=dstate), first)
    for name, array in layer.grads.items():
        assert_same_bits(array, 2 * once[name], name)  # doubling rounds nothing
    for array, copy in zip((x, *state, y, *end, dy, *dstate), copies, strict=True):
        assert_same_bits(array, copy)


@pytest.mark.parametrize("looked", [False, True], ids=["first", "again"])
@EACH
def test_a_tape_belongs_to_the_parameters_of_its_forward(kind: str, looked: bool, module: Any) -> None:
    """Whether or not a backward, which packs the weights its own way, came before they changed."""
    alone, layer = (make(kind, 4, 6, num_layers=2, dtype="float64", module=module) for _ in range(2))
    x, state = example(layer)
    y, end, tape = alone.forward(x, state)
    dy, dstate = gradient_of(y, end)
    results = alone.backward(dy, tape, dstate=dstate)
    _, _, tape = layer.forward(x, state)
    if looked:
        layer.backward(dy, tape, grads=fresh(layer))
    for name, array in layer.state_dict().items():
        layer.parameters[name] = array + 1
    _, _, later = layer.forward(x, state)
    assert (layer.backward(dy, later, dstate=dstate)[0] != results[0]).any()
    layer.zero_grad()
    assert_same_bits(layer.backward(dy, tape, dstate=dstate), results)
    for name, array in layer.grads.items():
        assert_same_bits(array, alone.grads[name], name)


@EACH
def test_what_is_on_a_tape_cannot_be_changed_by_mistake(kind: str, module: Any) -> None:
    layer = make(kind, 4, 6, dtype="float64", module=module)
    x, state = example(layer)
    arrays = [array.copy() for array in state]
    lengths, resets = random_lengths(5, 6), np.zeros((5, 6), bool)
    y, end, tape = layer.forward(x, tuple(arrays) if len(arrays) == 2 else arrays[0], lengths=lengths, resets=resets)
    assert not y.flags.writeable and not any(array.flags.writeable for array in end)
    dy, _ = gradient_of(y, end)
    expected = layer.backward(dy, tape)
    for array in arrays:
        array.fill(9)
    lengths.fill(1)
    resets.fill(True)
    assert_same_bits(layer.backward(dy, tape), expected)


@EACH
def test_gradients_are_added_where_they_should_be(kind: str, module: Any) -> None:
    layer = make(kind, 4, 6, num_layers=2, bidirectional=True, dtype="float64", module=module)
    x, state = example(layer)
    y, end, tape = layer.forward(x, state)
    dy, _ = gradient_of(y, end)
    given = fresh(layer)
    one = layer.backward(dy, tape, grads=given)
    assert all(array.any() for array in given.values())
    assert not any(array.any() for array in layer.grads.values())
    held = dict(layer.grads)
    for array in held.values():
        array.fill(3)
    other = layer.backward(dy, tape)
    assert_same_bits(one, other)
    for name, array in layer.grads.items():
        assert array is held[name]
        assert_close(array, given[name] + 3, 1e-14, name)


def test_backward_in_several_threads(module: Any) -> None:
    layer = make("lstm", 4, 6, num_layers=2, bidirectional=True, module=module)
    x, state = example(layer)
    y, end, tape = layer.forward(x, state)
    dy, dstate = gradient_of(y, end)
    each = [fresh(layer) for _ in range(4)]
    layer.backward(dy, tape, dstate=dstate)
    workers = [
        threading.Thread(target=layer.backward, args=(dy, tape), kwargs={"dstate": dstate, "grads": grads})
        for grads in each
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for grads, (name, expected) in itertools.product(each, layer.grads.items()):
        assert_same_bits(grads[name], expected, name)


# Forms of arguments and results


@EACH
def test_unbatched(kind: str, module: Any) -> None:
    layer = make(kind, 4, 6, num_layers=2, bidirectional=True, module=module)
    x, state = example(layer, 1)
    y, end, tape = layer.forward(x, state, lengths=[4])
    dy, dstate = gradient_of(y, end)
    expected = layer.backward(dy, tape, dstate=dstate)
    y_0, end_0, tape_0 = layer.forward(x[0], state, lengths=[4])
    assert_same_bits((y_0[None], end_0), (y, end))
    assert not y_0.flags.writeable
    dx, dstart = layer.backward(dy[0], tape_0, dstate=dstate)
    assert_same_bits((dx[None], dstart), expected)
    assert_same_bits(gradient_flow(layer, tape_0, dy[0]), gradient_flow(layer, tape, dy))


@EACH
def test_forms_of_states(kind: str, module: Any) -> None:
    """An array or a pair goes in where a state does; what comes out is a state, also when none was given."""
    layer = make(kind, 4, 6, module=module)
    x, state = example(layer)
    plain: Any = tuple(state) if len(tuple(state)) == 2 else state.h
    y, end, tape = layer.forward(x, plain)
    assert_same_bits((y, end), layer.forward(x, state)[:2])
    dy, dstate = gradient_of(y, end)
    given = tuple(dstate) if len(tuple(dstate)) == 2 else dstate.h
    expected = layer.backward(dy, tape, dstate=dstate)
    assert_same_bits(layer.backward(dy, tape, dstate=given), expected)
    y, end, tape = layer.forward(x)
    assert_same_bits((y, end), layer(x, layer.initial_state(5)))
    dx, dstart = layer.backward(dy, tape)
    assert_same_bits((dx, dstart), layer.backward(dy, tape, dstate=layer.initial_state(5)))
    assert type(dstart) is type(layer.initial_state(0)) and dstart.batch_size == 5
    assert all(array.any() and not array.flags.writeable for array in dstart)


@EACH
def test_other_real_dtypes_are_converted(kind: str, module: Any) -> None:
    layer = make(kind, 4, 6, module=module)
    x, state = example(layer)
    y, end, tape = layer.forward(x, state)
    dy = gradient_of(y, end)[0].astype("float16")
    expected = layer.backward(dy.astype("float32"), tape)
    for dtype in ("float16", "float64", "longdouble"):
        assert_same_bits(layer.backward(dy.astype(dtype), tape), expected)
    assert_same_bits(layer.backward(dy.tolist(), tape), expected)
    assert_same_bits(layer.forward(x.astype("float64"), state)[:2], (y, end))


@EACH
def test_rows_of_no_steps(kind: str, module: Any) -> None:
    """What is asked of the final state is asked of the initial one."""
    layer = make(kind, 4, 6, num_layers=2, bidirectional=True, module=module)
    x, state = example(layer)
    y, end, tape = layer.forward(x, state, lengths=[0, 6, 0, 3, 0])
    dy, dstate = gradient_of(y, end)
    dx, dstart = layer.backward(dy, tape, dstate=dstate, truncate=1)
    for row in (0, 2, 4):
        assert end[row] == state[row] and dstart[row] == dstate[row]
        assert not bits(dx[row]).any()
    assert dx[1].any() and dstart[1] != dstate[1]


# Truncation


@pytest.mark.parametrize("k", [1, 2, 4])
@EACH
def test_truncate_is_carrying_the_state_from_chunk_to_chunk(kind: str, k: int, module: Any) -> None:
    """Its two senses agree: a state that is handed on is a value, whose gradient nobody asks for."""
    layer = make(kind, 4, 6, num_layers=2, dtype="float64", module=module)
    x, state = example(layer, 3, 10)
    y, end, tape = layer.forward(x, state)
    dy, dstate = gradient_of(y, end)
    truncated, chunked = fresh(layer), fresh(layer)
    dx, dstart = layer.backward(dy, tape, dstate=dstate, truncate=k, grads=truncated)
    first: Any = None
    for begin in range(0, 10, k):
        piece = slice(begin, begin + k)
        y_piece, state, tape = layer.forward(x[:, piece], state)
        assert_close(y_piece, y[:, piece], RELATIVE)
        last = dstate if begin + k >= 10 else None
        dx_piece, dstart_piece = layer.backward(dy[:, piece], tape, dstate=last, grads=chunked)
        assert_close(dx_piece, dx[:, piece], RELATIVE, f"dx from {begin}")
        first = first or dstart_piece
    assert_close(dstart.h, first.h, RELATIVE, "dstate")
    for name, array in truncated.items():
        assert_close(array, chunked[name], RELATIVE, name)


@EACH
def test_truncate_by_one_lets_only_its_own_output_reach_a_state(kind: str, module: Any) -> None:
    layer = make(kind, 4, 6, bidirectional=True, dtype="float64", module=module)
    x, state = example(layer)
    lengths = random_lengths(5, 6)
    y, end, tape = layer.forward(x, state, lengths=lengths)
    width = end.h.shape[2]
    for row, length in enumerate(lengths):
        for t, direction in itertools.product(range(length), range(2)):
            dy = np.zeros_like(y)
            dy[row, t, direction * width : (direction + 1) * width] = 1
            dx, dstart = layer.backward(dy, tape, truncate=1, grads=fresh(layer))
            others = dx.copy()
            others[row, t] = 0
            assert not others.any()
            reached = t == (0 if direction == 0 else length - 1)
            assert dstart.h[row, direction].any() == reached or kind == "rnn_relu"
            assert not np.delete(dstart.h, row, axis=0).any() and not dstart.h[row, 1 - direction].any()


def test_truncate_beyond_the_row_cuts_nothing(module: Any) -> None:
    layer = make("lstm", 4, 6, bidirectional=True, module=module)
    x, state = example(layer)
    y, end, tape = layer.forward(x, state)
    dy, dstate = gradient_of(y, end)
    expected = layer.backward(dy, tape, dstate=dstate)
    for k in (6, 7, np.int8(100), 2**62, 2**63 - 1):
        assert_same_bits(layer.backward(dy, tape, dstate=dstate, truncate=k), expected)
    assert (layer.backward(dy, tape, dstate=dstate, truncate=5)[0] != expected[0]).any()


# Dropout


def test_dropout_is_of_forward_and_between_layers(module: Any) -> None:
    x = inputs((5, 6, 4))
    for name in ("RNN", "LSTM", "GRU"):
        layer = getattr(module, name)(4, 6, 3, dropout=0.5, bidirectional=True, seed=0)
        called = layer(x)
        first, again, other = (layer.forward(x, seed=seed) for seed in (1, 1, 2))
        assert_same_bits(first[:2], again[:2])
        assert (first[0] != other[0]).any() and (first[0] != called[0]).any()
        assert (layer.forward(x)[0] != layer.forward(x)[0]).any()
        assert_same_bits(layer(x, return_gates=True)[:2], called)
        # The first layer has none above it yet; its states are those of the call.
        assert_same_bits(first[1].h[:, :2], called[1].h[:, :2])
        dy, _ = gradient_of(first[0], first[1])
        assert_same_bits(layer.backward(dy, first[2]), layer.backward(dy, again[2]))
        with pytest.warns(UserWarning, match="dropout should be 0 where num_layers is 1"):
            single = getattr(module, name)(4, 6, dropout=0.5, seed=0)
        assert_same_bits(single.forward(x, seed=1)[:2], single(x))


def test_what_dropout_drops(module: Any) -> None:
    """Through layers that hand on what they get: about the right share, the rest scaled, other masks every time."""
    p, width = 0.3, 50
    layer = module.RNN(width, width, 3, nonlinearity="relu", bias=False, dropout=p, dtype="float64")
    for name in layer.parameters:
        layer.parameters[name] = np.eye(width) if "_ih_" in name else np.zeros((width, width))
    x = np.random.default_rng(0).uniform(1, 2, (20, 10, width))
    y, _, tape = layer.forward(x, seed=5)
    ratio = y / x
    kept = ratio > 0
    np.testing.assert_allclose(ratio[kept], 1 / (1 - p) ** 2)
    share = kept.mean()
    assert abs(share - (1 - p) ** 2) < 0.02, "two masks that are independent"
    for axis in range(3):
        means = kept.mean(axis=tuple({0, 1, 2} - {axis}))
        assert np.abs(means - share).max() < 6 * np.sqrt(share * (1 - share) / (kept.size / kept.shape[axis]))
    dx, _ = layer.backward(np.ones_like(y), tape)
    np.testing.assert_allclose(dx, ratio)


# Gradient flow


@EACH
def test_gradient_flow_is_the_gradient_of_a_state_handed_on(kind: str, module: Any) -> None:
    layer = make(kind, 4, 6, dtype="float64", module=module)
    x, state = example(layer)
    y, end, gates = layer(x, state, return_gates=True)
    _, _, tape = layer.forward(x, state)
    dy, dstate = gradient_of(y, end)
    flow = gradient_flow(layer, tape, dy, dstate=dstate)
    assert flow.shape == (6, 1) and flow.dtype == np.float64
    assert not any(array.any() for array in layer.grads.values())
    for t in range(6):
        _, middle = layer(x[:, : t + 1], state)
        _, _, rest = layer.forward(x[:, t + 1 :], middle)
        _, dmiddle = layer.backward(dy[:, t + 1 :], rest, dstate=dstate, grads=fresh(layer))
        # As a value that is handed on, the state has nothing of the output of its own step, nor c of h.
        dh, *dc = [array[:, 0] for array in dmiddle]
        dh = dh + dy[:, t]
        dm = dh @ layer.parameters["weight_hr_l0"] if layer.proj_size else dh
        if dc:
            c = gates["c"][:, t, 0]
            seen, _ = seen_of_c(layer, "l0", c, c)
            _, more = seen_of_c(layer, "l0", c, dm * gates["o"][:, t, 0] * (1 - np.tanh(seen) ** 2))
            dc = [dc[0] + more]
        expected = np.sqrt(sum((array**2).sum() for array in (dh, *dc)))
        assert_close(flow[t], np.array([expected]), RELATIVE, f"step {t}")


@EACH
def test_gradient_flow_of_layers(kind: str, module: Any) -> None:
    """That of each layer is that of a layer alone, with the dx of the one above as its dy."""
    layer = make(kind, 4, 6, num_layers=2, bidirectional=True, dtype="float64", module=module)
    x, state = example(layer)
    lengths = random_lengths(5, 6)
    y, end, tape = layer.forward(x, state, lengths=lengths)
    dy, dstate = gradient_of(y, end)
    flow = gradient_flow(layer, tape, dy, dstate=dstate)
    below, tapes = x, []
    for number in range(2):
        config = {**layer._config, "num_layers": 1, "input_size": below.shape[2]}
        single = type(layer)(**config)
        single.load_state_dict(
            {name: layer.parameters[name.replace("_l0", f"_l{number}")] for name in single.parameters}
        )
        slots = slice(2 * number, 2 * number + 2)
        below, _, tape = single.forward(below, type(state)(*(array[:, slots] for array in state)), lengths=lengths)
        tapes.append((single, tape, slots))
    for single, tape, slots in reversed(tapes):
        of_layer = type(dstate)(*(array[:, slots] for array in dstate))
        assert_close(gradient_flow(single, tape, dy, dstate=of_layer), flow[:, slots], RELATIVE)
        dy, _ = single.backward(dy, tape, dstate=of_layer)


def test_gradient_flow_of_what_vanishes_and_explodes(module: Any) -> None:
    """Norms whose squares no float64 holds."""
    for scale, name in ((1e-3, "tanh"), (1e3, "relu")):
        layer = module.RNN(1, 2, nonlinearity=name, bias=False, dtype="float64")
        layer.parameters["weight_ih_l0"] = np.full((2, 1), 1e-200)
        layer.parameters["weight_hh_l0"] = np.eye(2) * scale
        y, _, tape = layer.forward(np.ones((1, 80, 1)))
        dy = np.zeros_like(y)
        dy[0, -1, 0] = 1
        flow = gradient_flow(layer, tape, dy)
        np.testing.assert_allclose(flow[:, 0], scale ** np.arange(79.0, -1, -1), rtol=1e-9)


@EACH
def test_gradient_flow_of_both_directions(kind: str, module: Any) -> None:
    """Each is 0 past what its output at one step depends on."""
    layer = make(kind, 4, 6, bidirectional=True, module=module)
    x, state = example(layer)
    y, _, tape = layer.forward(x, state, lengths=[6, 5, 4, 6, 6])
    dy = np.zeros_like(y)
    dy[:, 2] = 1
    flow = gradient_flow(layer, tape, dy)
    assert flow.shape == (6, 2)
    assert flow[:3, 0].all() and not flow[3:, 0].any()
    assert flow[2:, 1].all() and not flow[:2, 1].any()
