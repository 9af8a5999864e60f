"""The same bits in training, whatever the threads, the batch and the padding; and how far from the reference.

`forward` and `backward` of the compiled layers only. Lengths, resets and truncate are on wherever they may be.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from common import (
    GATES,
    KINDS,
    Array,
    assert_close,
    assert_same_bits,
    bits,
    example,
    inputs,
    make,
    random_lengths,
    random_resets,
    random_state,
    reduction,
    reference,
    strange,
    threads,
    tolerance,
    train,
    unchanged,
)

pytestmark = pytest.mark.every_isa

DTYPES = ("float32", "float64")


def assert_all_same(actual: dict[str, Array], expected: dict[str, Array], what: str = "") -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert_same_bits(actual[name], array, f"{what} {name}")


# Threads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_threads(kind: str, dtype: str) -> None:
    """Few rows, whose units are split, and many, with enough work for three threads."""
    layer = make(kind, 33, 140, dtype=dtype)
    for batch in (1, 3, 16, 40):
        time = max(4, 48 // batch)
        arrays = example(layer, batch, time)
        lengths, resets = random_lengths(batch, time), random_resets(batch, time)
        for options in ({}, {"lengths": lengths, "resets": resets, "truncate": 3}):
            with threads(1):
                expected = train(layer, *arrays, **options)
            for n_threads in (2, 3):
                with threads(n_threads):
                    assert_all_same(train(layer, *arrays, **options), expected, f"{batch=} {n_threads=}")


@pytest.mark.parametrize("kind", KINDS)
def test_threads_both_directions_and_layers(kind: str) -> None:
    layer = make(kind, 20, 70, num_layers=2, bidirectional=True)
    for batch in (2, 40):
        arrays = example(layer, batch, 9)
        lengths = random_lengths(batch, 9)
        with threads(1):
            expected = train(layer, *arrays, lengths=lengths)
        for n_threads in (2, 3):
            with threads(n_threads):
                assert_all_same(train(layer, *arrays, lengths=lengths), expected, f"{batch=} {n_threads=}")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_larger_than_a_cache(kind: str) -> None:
    layer = make(kind, 7, {1: 600, 4: 300, 3: 330}[GATES[KINDS[kind][0]]])
    assert layer.parameters["weight_hh_l0"].nbytes > 1e6 or kind == "lstm_proj"
    for batch, time in ((1, 4), (20, 4)):
        arrays = example(layer, batch, time)
        with threads(1):
            expected = train(layer, *arrays)
        for n_threads in (2, 3):
            with threads(n_threads):
                assert_all_same(train(layer, *arrays), expected, f"{batch=} {n_threads=}")


# A call and a forward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(3, 5), (12, 70)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_is_a_call(kind: str, size: tuple[int, int], dtype: str) -> None:
    layer = make(kind, *size, num_layers=2, bidirectional=True, dtype=dtype)
    for batch in (1, 2, 5, 13, 40):
        x, state = inputs((batch, 9, size[0]), dtype), random_state(layer, batch)
        lengths, resets = random_lengths(batch, 9), random_resets(batch, 9)
        for options in ({}, {"lengths": lengths}, {"resets": resets}, {"lengths": lengths, "resets": resets}):
            for n_threads in (1, 3):
                with threads(n_threads):
                    expected = layer(x, state, **options)
                    assert_same_bits(layer.forward(x, state, **options)[:2], expected, f"forward, {batch=}")
                    assert_same_bits(layer(x, state, **options, return_gates=True)[:2], expected, f"gates, {batch=}")


# Rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(5, 9), (12, 70)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_and_in_a_batch(kind: str, size: tuple[int, int], dtype: str) -> None:
    layer = make(kind, *size, num_layers=2, bidirectional=True, dtype=dtype)
    x, state, dy, dstate = example(layer, 17, 6)
    lengths, resets = random_lengths(17, 6), random_resets(17, 6)
    names = [name for name in train(layer, x, state, dy, dstate) if name not in layer.parameters]

    def some(rows: slice) -> dict[str, Array]:
        arrays = x[rows], state[rows], dy[rows], dstate[rows]
        result = train(layer, *arrays, truncate=4, lengths=lengths[rows], resets=resets[rows])
        return {name: result[name] for name in names}

    alone = [some(slice(row, row + 1)) for row in range(17)]
    for batch in (2, 3, 8, 17):
        for n_threads in (1, 3):
            with threads(n_threads):
                together = some(slice(0, batch))
            for row in range(batch):
                one = {name: array[row : row + 1] for name, array in together.items()}
                assert_all_same(one, alone[row], f"row {row} of {batch}")


# Padding


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str, garbage: float) -> None:
    """Neither how much there is of it, nor what stands in it."""
    layer = make(kind, 6, 37, num_layers=2, bidirectional=True)
    for batch in (1, 4, 13, 40):
        x, state, dy, dstate = example(layer, batch, 7)
        lengths, resets = random_lengths(batch, 7), random_resets(batch, 7)
        padding = np.arange(12) >= lengths[:, None]
        wide_x, wide_dy = (np.pad(array, ((0, 0), (0, 5), (0, 0))) for array in (x, dy))
        wide_resets = np.pad(resets, ((0, 0), (0, 5)))
        wide_x[padding] = wide_dy[padding] = garbage
        wide_resets[padding] = True
        for truncate in (None, 2):
            with threads(1):
                expected = train(layer, x, state, dy, dstate, truncate, lengths=lengths, resets=resets)
            for n_threads in (1, 3):
                with threads(n_threads):
                    result = train(layer, wide_x, state, wide_dy, dstate, truncate, lengths=lengths, resets=wide_resets)
                for name in ("y", "dx"):
                    assert not bits(result[name][padding]).any(), f"{name} in the padding is +0"
                    result[name] = result[name][:, :7]
                assert_all_same(result, expected, f"{batch=} {n_threads=}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_of_whole_rows_and_no_resets_change_nothing(kind: str, dtype: str) -> None:
    layer = make(kind, 6, 37, bidirectional=True, dtype=dtype)
    for batch in (1, 4, 13, 40):
        arrays = example(layer, batch, 7)
        expected = train(layer, *arrays)
        full, none = np.full(batch, 7), np.zeros((batch, 7), bool)
        for options in ({"lengths": full}, {"resets": none}, {"lengths": full, "resets": none}, {"truncate": 7}):
            assert_all_same(train(layer, *arrays, **options), expected, f"{batch=} {list(options)}")


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (5, 1), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm_proj", "gru_after", "gru_before"])
def test_arrays_in_strange_memory(kind: str, shape: tuple[int, int]) -> None:
    """Strided, read-only, byte-swapped, misaligned: the bits of contiguous copies; and nothing is written to."""
    layer = make(kind, 6, 9, bidirectional=True)
    x, state, dy, dstate = example(layer, *shape)
    options = {"truncate": 3, "lengths": random_lengths(*shape), "resets": random_resets(*shape)}
    expected = train(layer, x, state, dy, dstate, **options)
    ways = [strange(array) for array in (x, dy, *state, *dstate)]
    for way in ways[0]:
        arrays = [of_array[way] for of_array in ways]
        before = [array.tobytes() for array in arrays]
        states = arrays[2:3], arrays[3:]
        if len(arrays) == 6:
            states = arrays[2:4], arrays[4:]
        start, end = (tuple(one) if len(one) == 2 else one[0] for one in states)
        assert_all_same(train(layer, arrays[0], start, arrays[1], end, **options), expected, way)
        unchanged(arrays, before)
    resets = options["resets"]
    for odd in (np.asfortranarray(resets), np.repeat(resets, 2, axis=1)[:, ::2], np.flip(np.flip(resets).copy())):
        assert_all_same(train(layer, x, state, dy, dstate, **{**options, "resets": odd}), expected, "resets")
    # An array without memory of its own: one number everywhere.
    number = np.broadcast_to(np.float32(0.3), dy.shape)
    assert_all_same(train(layer, x, state, number, dstate), train(layer, x, state, number.copy(), dstate), "broadcast")


# Against the reference


def compare(layer: Any, batch: int, time: int, truncate: int | None = None, **options: Any) -> None:
    """Every result, within four times what the contract allows a call, of the largest magnitude in it."""
    arrays = example(layer, batch, time)
    longest = max(reduction(layer), GATES[type(layer).__name__] * layer.hidden_size, batch)
    relative = 4 * tolerance(layer.dtype, longest, time)
    result, expected = (train(one, *arrays, truncate, **options) for one in (layer, reference(layer)))
    # A norm takes out the size of a single input or unit, and its gradients cancel: they are held to what cancelled.
    cancels = getattr(layer, "layer_norm", False) and 1 in (layer.input_size, layer.hidden_size)
    largest = max(np.abs(array).max(initial=0) for array in expected.values()) if cancels else 0
    for name, array in expected.items():
        assert result[name].dtype == layer.dtype
        allowed = relative * max(1, largest / np.abs(array).max()) if cancels and array.any() else relative
        assert_close(result[name], array, allowed, f"{name} ({batch=} {time=} {truncate=} {list(options)})")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_configurations(kind: str, num_layers: int, bidirectional: bool, bias: bool, dtype: str) -> None:
    layer = make(kind, 5, 11, num_layers=num_layers, bidirectional=bidirectional, bias=bias, dtype=dtype)
    lengths, resets = random_lengths(5, 6), random_resets(5, 6)
    for truncate in (None, 1, 4):
        compare(layer, 5, 6, truncate)
        compare(layer, 5, 6, truncate, lengths=lengths)
        compare(layer, 5, 6, truncate, resets=resets)
        compare(layer, 5, 6, truncate, lengths=lengths, resets=resets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_sizes(kind: str, dtype: str) -> None:
    """Hidden sizes about every multiple of the lanes, inputs of few elements and batches of few rows."""
    for hidden in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65):
        layer = make(kind, 1 + hidden % 4, hidden, dtype=dtype, seed=hidden)
        batch = 1 + hidden % 7
        compare(layer, batch, 3)
        compare(layer, batch, 3, lengths=random_lengths(batch, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_far_wider_than_the_state_and_far_narrower(kind: str, dtype: str) -> None:
    """With more rows times steps than are multiplied at once."""
    for input_size, hidden in ((300, 5), (1, 90)):
        compare(make(kind, input_size, hidden, dtype=dtype), 9, 60)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_work_for_several_threads(kind: str, n_threads: int) -> None:
    layer = make(kind, 40, 130, bidirectional=True)
    with threads(n_threads):
        for batch, time in ((2, 7), (33, 5)):
            compare(layer, batch, time)
            lengths, resets = random_lengths(batch, time), random_resets(batch, time)
            compare(layer, batch, time, 2, lengths=lengths, resets=resets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_long_sequences(kind: str, dtype: str) -> None:
    compare(make(kind, 3, 9, dtype=dtype), 2, 700)


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows(kind: str) -> None:
    layer = make(kind, 2, 3)
    compare(layer, 4099, 2, lengths=random_lengths(4099, 2), resets=random_resets(4099, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_and_no_time(kind: str) -> None:
    layer = make(kind, 4, 7, num_layers=2, bidirectional=True)
    for batch, time in ((0, 5), (3, 0), (0, 0)):
        compare(layer, batch, time)
        compare(layer, batch, time, 2, lengths=np.zeros(batch, int), resets=np.zeros((batch, time), bool))
    compare(layer, 3, 5, lengths=[0, 0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_gates_and_flow(kind: str) -> None:
    layer = make(kind, 5, 19, num_layers=2, bidirectional=True)
    x, state, dy, dstate = example(layer, 6, 7)
    options = {"lengths": random_lengths(6, 7), "resets": random_resets(6, 7)}
    twin = reference(layer)
    relative = 4 * tolerance("float32", 4 * 19, 7)
    gates, expected = (one(x, state, **options, return_gates=True)[2] for one in (layer, twin))
    assert gates.keys() == expected.keys()
    for name, array in expected.items():
        assert gates[name].dtype == "float32"
        assert_close(gates[name], array, relative, name)
        assert not bits(gates[name][np.arange(7) >= options["lengths"][:, None]]).any()
    flows = [one._flow(dy, one.forward(x, state, **options)[2], dstate) for one in (layer, twin)]
    for flow, wanted in zip(*flows, strict=True):
        assert (flow is None) == (wanted is None)
        if wanted is not None:
            assert_close(flow, wanted, relative, "flow")


# What is not a number


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_go_where_the_reference_sends_them(kind: str, bidirectional: bool) -> None:
    layer = make(kind, 5, 9, bidirectional=bidirectional)
    twin = reference(layer)
    for value in (np.nan, np.inf, -np.inf):
        for place in ("x", "dy", "state", "dstate"):
            x, state, dy, dstate = example(layer, 3, 5)
            if place in ("x", "dy"):
                {"x": x, "dy": dy}[place][1, 3, 2] = value
            else:
                h = (state if place == "state" else dstate).h.copy()
                h[1, 0, 1] = value
                changed = type(state)(h, *tuple(state if place == "state" else dstate)[1:])
                state, dstate = (changed, dstate) if place == "state" else (state, changed)
            with np.errstate(all="ignore"):
                expected = train(twin, x, state, dy, dstate)
            result = train(layer, x, state, dy, dstate)
            for name, array in expected.items():
                assert_close(result[name], array, 4 * tolerance("float32", 36, 5), f"{value} in {place}: {name}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_saturated_by_gains(dtype: str) -> None:
    layer = make("lstm_ln", 3, 5, dtype=dtype)
    limit = 120 if dtype == "float32" else 760
    layer.parameters["ln_ih_weight_l0"] = np.linspace(-limit, limit, 20)
    compare(layer, 9, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lstm_ln"])  # whose pre-activations stay small
def test_saturated_gates(kind: str, dtype: str) -> None:
    """Pre-activations of either sign, up to where exp overflows and beyond."""
    layer = make(kind, 1, 1, bias=False, dtype=dtype)
    for name in layer.parameters:
        layer.parameters[name] = np.full(layer.parameters[name].shape, 1.0 if "_ih_" in name else 0.5)
    most = 120 if dtype == "float32" else 760
    x = np.linspace(-most, most, 2 * most + 1, dtype=dtype)[:, None, None]
    _, state, dy, dstate = example(layer, len(x), 1)
    with np.errstate(all="ignore"):
        expected = train(reference(layer), x, state, dy, dstate)
    result = train(layer, x, state, dy, dstate)
    for name in expected.keys() - layer.parameters.keys():  # theirs is one number, a sum that may cancel
        assert_close(result[name], expected[name], 4 * tolerance(dtype, 2, 1), name)
