"""States: small immutable values."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import numpy as np
import pytest
from common import KINDS, assert_same_bits, inputs, make, random_state
from hypothesis import given
from hypothesis import strategies as st

import fastseq as fs

STATES = ["gru_after", "lstm", "lstm_proj"]


def some(kind: str = "lstm", batch: int = 5, dtype: str = "float32", seed: int = 0) -> Any:
    return random_state(make(kind, 2, 4, num_layers=2, dtype=dtype), batch, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind: str) -> None:
    for module in (fs, fs.reference):
        layer = make(kind, 3, 8, num_layers=3, bidirectional=True, module=module)
        for state in (layer.initial_state(2), layer(inputs((2, 4, 3)))[1]):
            assert type(state) is (fs.LSTMState if kind.startswith("lstm") else fs.State)
            assert state.h.shape == (2, 6, layer.proj_size or 8)
            if kind.startswith("lstm"):
                assert state.c.shape == (2, 6, 8)
            assert state.batch_size == 2 and state.dtype == "float32"


@pytest.mark.parametrize("kind", STATES)
def test_immutable(kind: str) -> None:
    layer = make(kind, 2, 4)
    for state in (some(kind), layer.initial_state(2), layer(inputs((2, 3, 2)))[1], layer.step(inputs((2, 2)))[1]):
        for name in state._fields:
            with pytest.raises(AttributeError):
                setattr(state, name, getattr(state, name))
            with pytest.raises(AttributeError):
                delattr(state, name)
            with pytest.raises(ValueError, match="read-only"):
                getattr(state, name)[0] = 0
        with pytest.raises(AttributeError):
            state.other = 1
        with pytest.raises(TypeError):
            hash(state)


@pytest.mark.parametrize("kind", STATES)
def test_arrays_are_copied_in(kind: str) -> None:
    arrays = [array.copy() for array in some(kind)]
    state = type(some(kind))(*arrays)
    before = state.copy()
    for array in arrays:
        array[...] = 0
    assert state == before
    for array in state:
        assert array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative


def test_the_outputs_of_a_call_do_not_share_memory_with_its_state() -> None:
    for kind in KINDS:
        layer = make(kind, 2, 4)
        y, state = layer(inputs((2, 3, 2)))
        y_t, after = layer.step(inputs((2, 2)), state)
        before = after.copy(), state.copy()
        y[...] = y_t[...] = 7
        assert (after, state) == before


@pytest.mark.parametrize("kind", STATES)
def test_unpacking_gives_the_arrays(kind: str) -> None:
    state = some(kind)
    parts = list(state)
    assert parts[0] is state.h and len(parts) == len(state._fields)
    if kind != "gru_after":
        h, c = state
        assert h is state.h and c is state.c


# Rows


@pytest.mark.parametrize("kind", STATES)
def test_rows(kind: str) -> None:
    state = some(kind)
    mask = np.array([True, False, True, True, False])
    for rows, expected in (
        (2, [2]),
        (-1, [4]),
        (np.int64(3), [3]),
        (np.uint8(3), [3]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, -2), [4, 2, 0]),
        (slice(9, 12), []),
        ([4, 0, 0], [4, 0, 0]),
        ([], []),
        (np.array([1, -1]), [1, 4]),
        (np.array([1, 3], "uint8"), [1, 3]),
        (mask, [0, 2, 3]),
        (mask.tolist(), [0, 2, 3]),
        (np.zeros(5, bool), []),
    ):
        chosen = state[rows]
        assert type(chosen) is type(state)
        assert_same_bits(chosen, type(state)(*(array[np.array(expected, int)] for array in state)), str(rows))
        assert all(not array.flags.writeable for array in chosen)


@pytest.mark.parametrize(
    "rows",
    [5, -6, 2**70, [0, 5], [-6], np.array([5]), [True, False], np.ones(6, bool), np.ones((5, 2), bool), [0.5], "a"]
    + [1.0, None, (0, 1), ..., {}, [[0, 1]], np.zeros((1, 1), int), slice(0, 1, 0), slice("a"), True, [[0], [0, 1]]],
    ids=str,
)
def test_wrong_rows(rows: Any) -> None:
    state = some()
    if rows is ...:
        assert state[rows] == state
        return
    with pytest.raises((TypeError, ValueError), match="rows"):
        state[rows]


def test_rows_out_of_range_are_a_value_error() -> None:
    for rows in (5, -6, [0, 5], np.ones(6, bool)):
        with pytest.raises(ValueError, match="rows"):
            some()[rows]


def test_iterating_over_rows_is_not_possible_by_accident() -> None:
    """A state iterates over its arrays; rows are asked for by index."""
    assert len(list(some("gru_after", batch=5))) == 1


@given(data=st.data())
def test_rows_like_those_of_an_array(data: st.DataObject) -> None:
    batch = data.draw(st.integers(0, 6))
    state = some(batch=batch)
    rows = data.draw(st.slices(batch) if batch else st.just(slice(None)))
    assert_same_bits(state[rows], type(state)(state.h[rows], state.c[rows]))


# Joining


@pytest.mark.parametrize("kind", STATES)
def test_concatenate(kind: str) -> None:
    state = some(kind, 6)
    cls = type(state)
    assert cls.concatenate([state[:2], state[2:3], state[3:3], state[3:]]) == state
    assert cls.concatenate(state[i] for i in range(6)) == state
    assert cls.concatenate((state,)) == state


@pytest.mark.parametrize(
    ("states", "error"),
    [
        ([], ValueError),
        (lambda: [some(), some("gru_after")], TypeError),
        (lambda: [some("gru_after")], TypeError),
        (lambda: [some(), some().h], TypeError),
        (lambda: [some(), None], TypeError),
        (lambda: [some(), some(dtype="float64")], ValueError),
        (lambda: [some(), some("lstm_proj")], ValueError),
        (lambda: [some(), random_state(make("lstm", 2, 4), 2)], ValueError),
        (5, TypeError),
        (None, TypeError),
        (lambda: some(), TypeError),
    ],
)
def test_wrong_states_to_concatenate(states: Any, error: Any) -> None:
    with pytest.raises(error, match="states"):
        fs.LSTMState.concatenate(states() if callable(states) else states)


# Values


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", STATES)
def test_copies(kind: str, dtype: str, tmp_path: Any) -> None:
    state = some(kind, dtype=dtype)
    state.save(tmp_path / "state.safetensors")
    copies = [state.copy(), copy.copy(state), copy.deepcopy(state), fs.load(tmp_path / "state.safetensors")]
    copies += [pickle.loads(pickle.dumps(state, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    copies += [fs.reference.load(tmp_path / "state.safetensors")]
    for other in copies:
        assert other is not state and other == state and not other != state
        assert_same_bits(other, state)
        for one, two in zip(other, state, strict=True):
            assert not np.shares_memory(one, two)
            assert not one.flags.writeable


def test_an_empty_state_is_saved_too(tmp_path: Any) -> None:
    some(batch=0).save(tmp_path / "state")
    assert fs.load(tmp_path / "state") == some(batch=0)


def test_equality() -> None:
    state = some()
    for part in ("h", "c"):
        arrays = {"h": state.h.copy(), "c": state.c.copy()}
        arrays[part][4, 1, 3] += 1
        assert fs.LSTMState(**arrays) != state
    assert state != some(seed=1)
    assert state != state[:4] and state != some(batch=1)
    assert state != fs.LSTMState(state.c, state.h)
    assert state != fs.LSTMState(state.h.astype("float64"), state.c.astype("float64"))
    assert fs.State(state.h) != state and fs.State(state.h) == fs.State(state.h)
    assert state != (state.h, state.c) and state != None and state != 1  # noqa: E711
    nan = fs.State(np.full((1, 1, 1), np.nan))
    assert nan == nan.copy()


def test_repr() -> None:
    assert repr(some("lstm_proj")) == "LSTMState(h=(5, 2, 2), c=(5, 2, 4), dtype=float32)"
    assert repr(some("gru_after", dtype="float64")) == "State(h=(5, 2, 4), dtype=float64)"


@pytest.mark.parametrize("given_dtype", [">f4", ">f8", "float16"])
def test_any_real_dtype_comes_in_native_order(given_dtype: str) -> None:
    h = some("gru_after").h.astype(given_dtype)
    state = fs.State(h)
    assert state.dtype.isnative and state.dtype.itemsize == h.itemsize
    np.testing.assert_array_equal(state.h, h)


@pytest.mark.parametrize(
    ("make_it", "error", "name"),
    [
        (lambda: fs.State(np.zeros((1, 2))), ValueError, "h"),
        (lambda: fs.State(np.zeros((1, 2, 3, 4))), ValueError, "h"),
        (lambda: fs.State(np.zeros((1, 2, 3), int)), TypeError, "h"),
        (lambda: fs.State(np.zeros((1, 2, 3), complex)), TypeError, "h"),
        (lambda: fs.State(np.zeros((1, 2, 3), bool)), TypeError, "h"),
        (lambda: fs.State(np.zeros((1, 2, 3), object)), TypeError, "h"),
        (lambda: fs.State(None), TypeError, "h"),
        (lambda: fs.State("h"), TypeError, "h"),
        (lambda: fs.State(1.0), ValueError, "h"),
        (lambda: fs.State([[[1.0]], [[1.0, 2.0]]]), ValueError, "h"),
        (lambda: fs.State(), TypeError, "h"),
        (lambda: fs.LSTMState(np.zeros((1, 2, 3))), TypeError, "c"),
        (lambda: fs.LSTMState(np.zeros((1, 2, 3)), None), TypeError, "c"),
        (lambda: fs.LSTMState(np.zeros((1, 2, 3)), np.zeros((1, 2))), ValueError, "c"),
        (lambda: fs.LSTMState(np.zeros((1, 2, 3)), np.zeros((2, 2, 3))), ValueError, "c"),
        (lambda: fs.LSTMState(np.zeros((1, 2, 3)), np.zeros((1, 1, 3))), ValueError, "c"),
        (lambda: fs.LSTMState(np.zeros((1, 2, 3)), np.zeros((1, 2, 3), "float32")), TypeError, "c"),
        (lambda: fs.LSTMState(np.zeros((1, 2, 3)), [[[1.0]], [[1.0, 2.0]]]), ValueError, "c"),
    ],
)
def test_wrong_arrays(make_it: Any, error: Any, name: str) -> None:
    with pytest.raises(error, match=rf"\b{name}\b"):
        make_it()


# Going into a layer


@pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_array_or_a_pair_does_too(kind: str, module: Any) -> None:
    layer = make(kind, 2, 4, num_layers=2, module=module)
    x, state = inputs((3, 5, 2)), random_state(layer, 3)
    expected, stepped = layer(x, state), layer.step(x[:, 0], state)
    arrays = [array.copy() for array in state]
    for given_state in [arrays, tuple(arrays)] if len(arrays) == 2 else [arrays[0], arrays[0].tolist()]:
        assert_same_bits(layer(x, given_state), expected)
        assert_same_bits(layer.step(x[:, 0], given_state), stepped)


@pytest.mark.parametrize("verb", ["call", "step"])
@pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_that_do_not_fit(kind: str, module: Any, verb: str) -> None:
    layer = make(kind, 2, 4, num_layers=2, module=module)
    x = inputs((3, 5, 2)) if verb == "call" else inputs((3, 2))
    run = layer if verb == "call" else layer.step
    state, lstm = random_state(layer, 3), kind.startswith("lstm")
    h = state.h

    def with_h(array: Any) -> Any:
        return (array, state.c) if lstm else array

    other = random_state(make("gru_after" if lstm else "lstm", 2, 4, num_layers=2), 3)
    wrong: list[tuple[Any, Any]] = [
        (other, TypeError),
        ("state", TypeError),
        (5, (TypeError, ValueError)),
        ({}, TypeError),
        (with_h(h.astype(int)), TypeError),
        (with_h(h.astype(complex)), TypeError),
        (with_h(h.astype(bool)), TypeError),
        (with_h(h.astype(object)), TypeError),
        (with_h([[[1.0]], [[1.0, 2.0]]]), ValueError),
        (with_h(h[0]), ValueError),
        (with_h(h[:, :1]), ValueError),
        (with_h(h[:, :, :1]), ValueError),
        (with_h(np.concatenate([h, h], axis=2)), ValueError),
        (with_h(h[..., None]), ValueError),
        (random_state(make(kind, 2, 6, num_layers=2), 3), ValueError),
        (random_state(make(kind, 2, 4, num_layers=1), 3), ValueError),
    ]
    # Never a broadcast, not of one row either.
    wrong += [(random_state(layer, batch), ValueError) for batch in (0, 1, 2, 4, 6)]
    if lstm:
        wrong += [
            (h, (TypeError, ValueError)),
            ((h,), TypeError),
            ((h, state.c, h), TypeError),
            ((h, state.c[:1]), ValueError),
            ((h, None), TypeError),
            ((None, state.c), TypeError),
            ((h, state.c[:, :, :1]), ValueError),
        ]
    else:
        wrong += [((h, h), (TypeError, ValueError))]
    if kind == "lstm_proj":
        wrong += [((state.c, state.h), ValueError)]
    for value, error in wrong:
        with pytest.raises(error, match="state"):
            run(x, value)


def test_streams_of_their_own_on_threads() -> None:
    """States belong to who holds them: streams over one layer at once do not disturb each other."""
    layer = make("lstm", 3, 16, num_layers=2)
    x = inputs((4, 40, 3))
    expected = layer(x)[0]
    got: dict[int, Any] = {}

    def stream(row: int) -> None:
        state = None
        outputs = []
        for t in range(40):
            y_t, state = layer.step(x[row : row + 1, t], state)
            outputs.append(y_t)
        got[row] = np.stack(outputs, axis=1)

    workers = [threading.Thread(target=stream, args=(row,)) for row in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert_same_bits(np.concatenate([got[row] for row in range(4)]), expected)
