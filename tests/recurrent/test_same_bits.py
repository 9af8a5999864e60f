"""The same bits, whatever the batch, the padding, the threads, the chunks, and however the arrays lie in memory.

The shapes are chosen by what `plan` in src/recurrent/_recurrent.pyx does with them: rows or units split between
threads, the input part inside the step or ahead of it, in one piece or several, one or several looks for Ctrl-C.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from common import (
    KINDS,
    assert_same_bits,
    bits,
    inputs,
    make,
    random_lengths,
    random_state,
    run_python,
    strange,
    threads,
    unchanged,
)
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.every_isa

BATCHES = (1, 2, 3, 5, 8, 13, 40)
DTYPES = ("float32", "float64")


def call(layer: Any, batch: int, time: int, n_threads: int = 1, **more: Any) -> Any:
    with threads(n_threads):
        return layer(inputs((batch, time, layer.input_size), layer.dtype), random_state(layer, batch), **more)


# Threads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_threads(kind: str, dtype: str) -> None:
    """Enough work for 7 threads, and enough units for each to have some, at every batch size."""
    layer = make(kind, 33, 241, dtype=dtype)
    for batch in BATCHES:
        time = max(3, 36 // batch)
        lengths = random_lengths(batch, time)
        plain, padded = call(layer, batch, time), call(layer, batch, time, lengths=lengths)
        for n_threads in (2, 3, 7):
            assert_same_bits(call(layer, batch, time, n_threads), plain, f"B={batch}, {n_threads} threads")
            assert_same_bits(call(layer, batch, time, n_threads, lengths=lengths), padded, f"B={batch} {n_threads=}")


@pytest.mark.parametrize("kind", KINDS)
def test_threads_both_directions_and_layers(kind: str) -> None:
    layer = make(kind, 20, 100, num_layers=2, bidirectional=True)
    for batch in (2, 40):
        lengths = random_lengths(batch, 11)
        expected = call(layer, batch, 11, lengths=lengths)
        for n_threads in (2, 3, 7):
            assert_same_bits(call(layer, batch, 11, n_threads, lengths=lengths), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_larger_than_a_cache(kind: str, dtype: str) -> None:
    """More than 1 MB of recurrent weights: large batches too split the units. Several chunks between signals."""
    gates = {"r": 1, "l": 4, "g": 3}[kind[0]]
    hidden = {1: 600, 3: 330, 4: 300}[gates] if dtype == "float32" else {1: 400, 3: 240, 4: 210}[gates]
    layer = make(kind, 7, hidden, dtype=dtype)
    assert layer.parameters["weight_hh_l0"].nbytes > 1e6 or kind == "lstm_proj"
    for batch, time in ((1, 4), (40, 5)):
        expected = call(layer, batch, time)
        for n_threads in (2, 7):
            assert_same_bits(call(layer, batch, time, n_threads), expected, f"{batch=} {n_threads=}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_is_cut_for_signals(kind: str) -> None:
    """Beyond 128 million multiply-adds a call is done in pieces; without lengths and with them."""
    layer = make(kind, 16, 256)
    gates = {"r": 1, "l": 4, "g": 3}[kind[0]]
    batch = 64
    time = 2 * 128 * 1024 * 1024 // (batch * gates * 256 * (16 + layer.parameters["weight_hh_l0"].shape[1])) + 3
    x, state = inputs((batch, time, 16)), random_state(layer, batch)
    with threads(2):
        y, end = layer(x, state)
        first, middle = layer(x[:, : time // 2], state)
        second, last = layer(x[:, time // 2 :], middle)
    assert_same_bits(np.concatenate([first, second], axis=1), y)
    assert_same_bits(last, end)


def test_a_team_that_is_smaller_than_asked_for() -> None:
    code = """
    import numpy as np, fastseq as fs, sys
    from common import KINDS, inputs, make, random_state, threads, bits
    import hashlib
    digest = hashlib.sha256()
    for kind in KINDS:
        layer = make(kind, 33, 241)
        for batch in (2, 40):
            with threads(7):
                y, end = layer(inputs((batch, 9, 33)), random_state(layer, batch))
            for array in (y, *end):
                digest.update(bits(array).tobytes())
    print(digest.hexdigest())
    """
    plain = run_python(code).stdout
    assert run_python(code, OMP_THREAD_LIMIT="2").stdout == plain
    assert run_python(code, OMP_DYNAMIC="true", OMP_NUM_THREADS="1").stdout == plain


# Rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(5, 9), (12, 70)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_and_in_a_batch(kind: str, size: tuple[int, int], dtype: str) -> None:
    layer = make(kind, *size, num_layers=2, bidirectional=True, dtype=dtype)
    x, state = inputs((40, 7, size[0]), dtype), random_state(layer, 40)
    alone = [layer(x[row : row + 1], state[row]) for row in range(40)]
    for batch in BATCHES:
        for n_threads in (1, 3):
            with threads(n_threads):
                y, end = layer(x[:batch], state[:batch])
            for row in range(batch):
                assert_same_bits((y[row : row + 1], end[row]), alone[row], f"row {row} of {batch}")
    order = np.random.default_rng(0).permutation(40)
    y, end = layer(x[order], state[order])
    assert_same_bits((y, end), tuple(zip_rows(alone, order)))


def zip_rows(alone: list[Any], order: Any) -> Any:
    states = [alone[row][1] for row in order]
    return np.concatenate([alone[row][0] for row in order]), type(states[0]).concatenate(states)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_a_length_is_the_row_cut_short(kind: str, dtype: str) -> None:
    layer = make(kind, 6, 37, num_layers=2, bidirectional=True, dtype=dtype)
    for batch in BATCHES:
        x, state = inputs((batch, 9, 6), dtype, seed=batch), random_state(layer, batch)
        lengths = random_lengths(batch, 9, seed=batch)
        y, end = layer(x, state, lengths=lengths)
        for row, length in enumerate(lengths):
            cut = layer(x[row : row + 1, :length], state[row])
            assert_same_bits((y[row : row + 1, :length], end[row]), cut, f"row {row} of length {length}")


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str, garbage: float) -> None:
    layer = make(kind, 6, 37, num_layers=2, bidirectional=True)
    for batch in BATCHES:
        x, state, lengths = inputs((batch, 9, 6)), random_state(layer, batch), random_lengths(batch, 9)
        padding = np.arange(9) >= lengths[:, None]
        clean, dirty = x.copy(), x.copy()
        clean[padding] = 0
        dirty[padding] = garbage
        for n_threads in (1, 3):
            with threads(n_threads):
                expected = layer(clean, state, lengths=lengths)
                assert_same_bits(layer(dirty, state, lengths=lengths), expected, f"B={batch}")
        assert not bits(expected[0][padding]).any(), "outputs in the padding are +0"


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_threads_together(kind: str) -> None:
    layer = make(kind, 20, 241, bidirectional=True)
    for batch in (2, 40):
        x, state, lengths = inputs((batch, 20, 20)), random_state(layer, batch), random_lengths(batch, 20)
        expected = layer(x, state, lengths=lengths)
        x[np.arange(20) >= lengths[:, None]] = np.nan
        for n_threads in (1, 3, 7):
            with threads(n_threads):
                assert_same_bits(layer(x, state, lengths=lengths), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_nan_stays_by_itself(kind: str) -> None:
    layer = make(kind, 6, 37, bidirectional=True)
    for batch in BATCHES[1:]:
        x, state = inputs((batch, 5, 6)), random_state(layer, batch)
        y, end = layer(x, state)
        x[1] = np.nan
        dirty, dirty_end = layer(x, state)
        others = np.arange(batch) != 1
        assert_same_bits((dirty[others], dirty_end[others]), (y[others], end[others]))


# Time


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_steps(kind: str, num_layers: int, dtype: str) -> None:
    layer = make(kind, 6, 37, num_layers=num_layers, dtype=dtype)
    for batch in BATCHES:
        x, state = inputs((batch, 8, 6), dtype), random_state(layer, batch)
        expected = layer(x, state)
        for cut in (0, 1, 3, 8):
            first, middle = layer(x[:, :cut], state)
            second, end = layer(x[:, cut:], middle)
            assert_same_bits((np.concatenate([first, second], axis=1), end), expected, f"B={batch}, cut at {cut}")
        for n_threads in (1, 3):
            with threads(n_threads):
                walker, steps = state, []
                for t in range(8):
                    y_t, walker = layer.step(x[:, t], walker)
                    steps.append(y_t)
            assert_same_bits((np.stack(steps, axis=1), walker), expected, f"B={batch}, step by step")


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_large_layers_on_threads(kind: str) -> None:
    layer = make(kind, 200, 520)
    for batch in (1, 40):
        x, state = inputs((batch, 2, 200)), random_state(layer, batch)
        expected = layer(x, state)
        for n_threads in (1, 2, 7):
            with threads(n_threads):
                first, middle = layer.step(x[:, 0], state)
                second, end = layer.step(x[:, 1], middle)
            assert_same_bits((np.stack([first, second], axis=1), end), expected, f"{batch=} {n_threads=}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_long_sequences(kind: str, dtype: str) -> None:
    """More steps than inputs are projected ahead, by number of rows and by bytes."""
    for hidden, time, batches in ((9, 1100, (1, 2, 3, 5)), (260, 300, (1, 2))):
        layer = make(kind, 3, hidden, dtype=dtype)
        x, state = inputs((max(batches), time, 3), dtype), random_state(layer, max(batches))
        first, middle = layer(x[:, :37], state)
        expected, end = layer(x[:, 37:], middle)
        for batch in batches:
            for n_threads in (1, 3) if hidden > 9 else (1,):
                with threads(n_threads):
                    y, last = layer(x[:batch], state[:batch])
                assert_same_bits(y[:, :37], first[:batch])
                assert_same_bits((y[:, 37:], last), (expected[:batch], end[:batch]))


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_in_long_sequences(kind: str) -> None:
    layer = make(kind, 3, 9, bidirectional=True)
    x, state, lengths = inputs((2, 1500, 3)), random_state(layer, 2), np.array([1100, 1024])
    y, end = layer(x, state, lengths=lengths)
    for row, length in enumerate(lengths):
        assert_same_bits((y[row : row + 1, :length], end[row]), layer(x[row : row + 1, :length], state[row]))


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_are_walked_at_once(kind: str) -> None:
    layer = make(kind, 2, 5, bidirectional=True)
    x, state, lengths = inputs((4100, 3, 2)), random_state(layer, 4100), random_lengths(4100, 3)
    y, end = layer(x, state, lengths=lengths)
    for part in (slice(0, 50), slice(4050, 4100), slice(1, 4098)):
        assert_same_bits((y[part], end[part]), layer(x[part], state[part], lengths=lengths[part]))
    with threads(7):
        assert_same_bits(layer(x, state, lengths=lengths), (y, end))


@given(data=st.data())
def test_any_cut_of_any_batch(data: st.DataObject) -> None:
    """Rows chosen, time cut, threads: all at once."""
    kind = data.draw(st.sampled_from(list(KINDS)))
    dtype = data.draw(st.sampled_from(DTYPES))
    batch, time = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 10))
    layer = make(kind, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40)), dtype=dtype)
    x, state = inputs((batch, time, layer.input_size), dtype), random_state(layer, batch)
    y, end = layer(x, state)
    rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=8))
    cut = data.draw(st.integers(0, time))
    with threads(data.draw(st.sampled_from([1, 2, 5]))):
        first, middle = layer(x[rows, :cut], state[rows])
        second, last = layer(x[rows, cut:], middle)
    assert_same_bits((np.concatenate([first, second], axis=1), last), (y[rows], end[rows]))


# Memory


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 4), (1, 5, 4), (3, 1, 4), (3, 5, 1), (0, 5, 4), (3, 0, 4)], ids=str)
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "lstm_proj", "gru_before"])
def test_inputs_in_strange_memory(kind: str, shape: tuple[int, ...], dtype: str) -> None:
    layer = make(kind, shape[2], 6, num_layers=2, bidirectional=True, dtype=dtype)
    x, state = inputs(shape, dtype), random_state(layer, shape[0])
    lengths = random_lengths(shape[0], shape[1]) if shape[0] else np.zeros(0, int)
    expected = layer(x, state, lengths=lengths)
    parts = [strange(array) for array in state]
    for name, odd in strange(x).items():
        arrays = [odd, *(part[name] for part in parts)]
        before = [array.tobytes() for array in arrays]
        given = parts[0][name] if len(parts) == 1 else tuple(part[name] for part in parts)
        assert_same_bits(layer(odd, given, lengths=lengths), expected, name)
        unchanged(arrays, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "lstm_proj", "gru_before"])
def test_steps_in_strange_memory(kind: str, dtype: str) -> None:
    layer = make(kind, 4, 6, num_layers=2, dtype=dtype)
    x, state = inputs((3, 4), dtype), random_state(layer, 3)
    expected = layer.step(x, state)
    parts = [strange(array) for array in state]
    for name, odd in strange(x).items():
        given = parts[0][name] if len(parts) == 1 else tuple(part[name] for part in parts)
        arrays = [odd, *(part[name] for part in parts)]
        before = [array.tobytes() for array in arrays]
        assert_same_bits(layer.step(odd, given), expected, name)
        unchanged(arrays, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_in_strange_memory(kind: str, dtype: str) -> None:
    layer = make(kind, 3, 6, dtype=dtype)
    x = inputs((2, 3, 3), dtype)
    expected, weights = layer(x), layer.state_dict()
    for name in strange(weights["weight_ih_l0"]):
        odd = {key: strange(w)[name] if w.ndim == 2 else w for key, w in weights.items()}
        other = make(kind, 3, 6, dtype=dtype, seed=5)
        assert (other(x)[0] != expected[0]).any()
        other.load_state_dict(odd)
        assert_same_bits(other(x), expected, name)


@pytest.mark.parametrize("kind", ["lstm", "gru_after"])
def test_one_row_broadcast_to_many(kind: str) -> None:
    """Strides of 0."""
    layer = make(kind, 4, 9)
    x = inputs((1, 1, 4))
    y, end = layer(np.broadcast_to(x, (6, 7, 4)))
    assert_same_bits((y, end), layer(np.tile(x, (6, 7, 1))))
    assert_same_bits(layer(np.broadcast_to(np.float32(0.5), (2, 3, 4))), layer(np.full((2, 3, 4), 0.5, "float32")))


def test_lengths_and_states_are_not_modified() -> None:
    layer = make("lstm", 4, 9, bidirectional=True)
    x, state, lengths = inputs((5, 6, 4)), random_state(layer, 5), random_lengths(5, 6)
    pair = tuple(array.copy() for array in state)
    arrays = [x, lengths, *pair, *layer.state_dict().values()]
    before = [array.tobytes() for array in arrays]
    layer(x, pair, lengths=lengths)
    unchanged(arrays, before)
    assert_same_bits(state, type(state)(*pair))
