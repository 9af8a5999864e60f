"""The compiled layers against the NumPy reference in a wider dtype."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from common import (
    KINDS,
    assert_agree,
    assert_close,
    inputs,
    make,
    random_lengths,
    random_state,
    reduction,
    reference,
    threads,
)

pytestmark = pytest.mark.every_isa


def compare(layer: Any, batch: int, time: int, lengths: Any = None, relative: float = 0) -> None:
    """A call of a layer against the reference, with a random state."""
    from common import tolerance

    x = inputs((batch, time, layer.input_size), layer.dtype)
    state = random_state(layer, batch)
    relative = relative or tolerance(layer.dtype, reduction(layer), time)
    assert_agree(layer(x, state, lengths=lengths), reference(layer)(x, state, lengths=lengths), relative)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_configurations(kind: str, num_layers: int, bidirectional: bool, bias: bool, dtype: str) -> None:
    layer = make(kind, 5, 11, num_layers=num_layers, bidirectional=bidirectional, bias=bias, dtype=dtype)
    compare(layer, 5, 6)
    compare(layer, 5, 6, lengths=random_lengths(5, 6))
    compare(layer, 1, 9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_sizes(kind: str, dtype: str) -> None:
    """Hidden sizes about every multiple of the lanes, and inputs of one element."""
    for hidden in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 67):
        compare(make(kind, 1 + hidden % 4, hidden, dtype=dtype, seed=hidden), 1 + hidden % 5, 3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_batches(kind: str, dtype: str) -> None:
    """Every number of rows a tile may be left with, with lengths and without."""
    layer = make(kind, 4, 19, dtype=dtype)
    for batch in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 25):
        compare(layer, batch, 4)
        compare(layer, batch, 4, lengths=random_lengths(batch, 4, seed=batch))


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_work_for_several_threads(kind: str, n_threads: int) -> None:
    """Batches that are split by rows and by units, and lengths with them."""
    layer = make(kind, 40, 260, bidirectional=True)
    with threads(n_threads):
        for batch, time in ((2, 7), (33, 5)):
            compare(layer, batch, time)
            compare(layer, batch, time, lengths=random_lengths(batch, time))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_long_sequences(kind: str, dtype: str) -> None:
    """The input part is computed ahead in more than one piece, and the error stays within the contract."""
    compare(make(kind, 3, 9, dtype=dtype), 1, 1100)


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_are_walked_at_once(kind: str) -> None:
    layer = make(kind, 2, 3)
    compare(layer, 4099, 2)
    compare(layer, 4099, 2, lengths=random_lengths(4099, 2))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_step(kind: str, num_layers: int, dtype: str, tolerance: Any) -> None:
    layer = make(kind, 6, 13, num_layers=num_layers, dtype=dtype)
    relative = tolerance(dtype, reduction(layer), num_layers)
    for batch in (0, 1, 2, 5, 8):
        x, state = inputs((batch, 6), dtype), random_state(layer, batch)
        assert_agree(layer.step(x, state), reference(layer).step(x, state), relative)
        assert_agree(layer.step(x), reference(layer).step(x), relative)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_state_a_call_starts_from_zeros(kind: str) -> None:
    layer = make(kind, 4, 7, num_layers=2, bidirectional=True)
    x = inputs((3, 5, 4))
    zeros = layer.initial_state(3)
    assert all(not array.any() for array in zeros)
    for one, other in zip(layer(x)[1], layer(x, zeros)[1], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_unbatched(kind: str) -> None:
    layer = make(kind, 4, 7, bidirectional=True)
    x, state = inputs((1, 5, 4)), random_state(layer, 1)
    y, end = layer(x[0], state)
    batched, batched_end = layer(x, state)
    np.testing.assert_array_equal(y, batched[0])
    assert end == batched_end and end.batch_size == 1
    assert layer(x[0], state, lengths=[2])[1] == layer(x, state, lengths=[2])[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_real_dtypes_are_converted(kind: str, dtype: str) -> None:
    layer = make(kind, 4, 7, dtype=dtype)
    for given in ("float16", "float32", "float64", "longdouble"):
        x, state = inputs((2, 5, 4), given), random_state(layer, 2)
        wide = type(state)(*(array.astype(given) for array in state))
        y, end = layer(x, wide)
        assert y.dtype == dtype == end.dtype
        own = type(state)(*(array.astype(dtype) for array in wide))
        np.testing.assert_array_equal(y, layer(x.astype(dtype), own)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_lists_are_arrays(kind: str) -> None:
    layer = make(kind, 2, 3)
    x = inputs((2, 2, 2))
    np.testing.assert_array_equal(layer(x.tolist())[0], layer(x)[0])


# What is not a number


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_go_where_the_reference_sends_them(kind: str, bidirectional: bool, tolerance: Any) -> None:
    layer = make(kind, 5, 9, bidirectional=bidirectional)
    exact = reference(layer)
    for value, (row, t, i) in itertools.product((np.nan, np.inf, -np.inf), ((0, 0, 0), (1, 3, 4))):
        x, state = inputs((3, 5, 5)), random_state(layer, 3)
        x[row, t, i] = value
        with np.errstate(all="ignore"):
            expected = exact(x, state)
        assert_agree(layer(x, state), expected, tolerance("float32", 14, 5), f"{value} at {row, t, i}")
        h = state.h.copy()
        h[row, 0, i % h.shape[2]] = value
        start = type(state)(h, *(array for array in state if array is not state.h))
        with np.errstate(all="ignore"):
            expected = exact(inputs((3, 5, 5)), start)
        assert_agree(layer(inputs((3, 5, 5)), start), expected, tolerance("float32", 14, 5), f"{value} in h")
        with np.errstate(all="ignore"):
            expected = exact(x[row : row + 1], state[row])
        assert_agree(layer(x[row : row + 1], state[row]), expected, tolerance("float32", 14, 5), "a row alone")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("lstm")])
def test_nan_and_inf_in_the_cell_state(kind: str, tolerance: Any) -> None:
    layer = make(kind, 5, 9)
    for value in (np.nan, np.inf, -np.inf):
        state = random_state(layer, 2)
        c = state.c.copy()
        c[1, 0, 2] = value
        x, start = inputs((2, 4, 5)), type(state)(state.h, c)
        with np.errstate(all="ignore"):
            expected = reference(layer)(x, start)
        assert_agree(layer(x, start), expected, tolerance("float32", 14, 4))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_saturated_gates(kind: str, dtype: str, tolerance: Any) -> None:
    """Pre-activations of every size, up to where exp overflows and beyond, of either sign."""
    layer = make(kind, 1, 1, bias=False, dtype=dtype)
    for name in layer.parameters:
        layer.parameters[name] = np.full(layer.parameters[name].shape, 1.0 if "_ih_" in name else 0.5)
    most = 120 if dtype == "float32" else 760
    x = np.linspace(-most, most, 8 * most + 1, dtype=dtype)[:, None, None]
    state = random_state(layer, len(x))
    with np.errstate(all="ignore"):
        expected = reference(layer)(x, state)
    assert_agree(layer(x, state), expected, tolerance(dtype, 2, 1))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_denormal_inputs(kind: str, dtype: str, tolerance: Any) -> None:
    layer = make(kind, 5, 9, dtype=dtype)
    tiny = np.finfo(dtype).smallest_subnormal
    x = (inputs((3, 6, 5), dtype) * 1000).round() * tiny
    assert 0 < np.abs(x).max() < np.finfo(dtype).tiny
    small = [(array * 1000).round() * tiny for array in random_state(layer, 3)]
    for state in (random_state(layer, 3), type(random_state(layer, 3))(*small)):
        relative = tolerance(dtype, 14, 6)
        assert_agree(layer(x, state), reference(layer)(x, state), relative)


# What the reference itself promises


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "longdouble"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_takes_any_floating_dtype(kind: str, dtype: str, tolerance: Any) -> None:
    from fastseq import reference as numpy_layers

    layer = make(kind, 3, 5, dtype=dtype, module=numpy_layers)
    x, state = inputs((2, 4, 3), dtype), random_state(layer, 2)
    y, end = layer(x, state)
    assert y.dtype == layer.dtype == end.dtype
    if dtype != "longdouble":
        exact, _ = reference(layer, np.longdouble)(x, state)
        assert_close(y, exact, tolerance(dtype, 8, 4))
