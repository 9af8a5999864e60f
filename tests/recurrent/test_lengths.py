"""What lengths mean: padding, final states, rows of no steps, the reverse direction, dtypes, messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from common import KINDS, assert_close, assert_same_bits, bits, inputs, make, random_lengths, random_state, tolerance

import fastseq as fs

MODULES = [pytest.param(fs, id="compiled"), pytest.param(fs.reference, id="reference")]
pytestmark = [pytest.mark.every_isa, pytest.mark.parametrize("module", MODULES)]


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_positive_zero(kind: str, bidirectional: bool, module: Any) -> None:
    layer = make(kind, 4, 6, num_layers=2, bidirectional=bidirectional, module=module)
    lengths = random_lengths(8, 6)
    y, _ = layer(np.full((8, 6, 4), -1, "float32"), random_state(layer, 8), lengths=lengths)
    padding = np.arange(6) >= lengths[:, None]
    assert not bits(y[padding]).any()
    assert (y[~padding] != 0).all() or kind == "rnn_relu"


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_the_one_at_the_last_real_step(kind: str, module: Any) -> None:
    layer = make(kind, 4, 6, bidirectional=True, module=module)
    x, state, lengths = inputs((6, 5, 4)), random_state(layer, 6), random_lengths(6, 5)
    y, end = layer(x, state, lengths=lengths)
    width = end.h.shape[2]
    for row, length in enumerate(lengths):
        if length:
            np.testing.assert_array_equal(end.h[row, 0], y[row, length - 1, :width])
            np.testing.assert_array_equal(end.h[row, 1], y[row, 0, width:])
        else:
            assert end[row] == state[row]


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_no_steps_give_the_initial_state_back(kind: str, num_layers: int, module: Any) -> None:
    layer = make(kind, 4, 6, num_layers=num_layers, bidirectional=True, module=module)
    x, state = inputs((3, 5, 4)), random_state(layer, 3)
    y, end = layer(x, state, lengths=[0, 0, 0])
    assert_same_bits(end, state)
    assert y.shape[:2] == (3, 5) and not bits(y).any()
    assert_same_bits(layer(np.full_like(x, np.nan), state, lengths=[0, 0, 0]), (y, end))
    for time, lengths in ((0, None), (0, [0, 0, 0])):
        y, end = layer(x[:, :time], state, lengths=lengths)
        assert y.shape == (3, 0, 2 * state.h.shape[2]) and y.dtype == "float32"
        assert_same_bits(end, state)
    assert_same_bits(layer(x[:, :0])[1], layer.initial_state(3))


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind: str, module: Any) -> None:
    layer = make(kind, 4, 6, bidirectional=True, module=module)
    for time in (0, 1, 5):
        for lengths in (None, [], np.zeros(0, "uint8")):
            y, end = layer(np.zeros((0, time, 4), "float32"), layer.initial_state(0), lengths=lengths)
            assert y.shape == (0, time, 2 * end.h.shape[2])
            assert end.batch_size == 0 and end.h.shape[1] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_reverse_direction_starts_at_the_last_real_step(kind: str, module: Any) -> None:
    """It is the forward direction with its weights over the row turned round."""
    layer = make(kind, 4, 6, bidirectional=True, module=module)
    forward = make(kind, 4, 6, module=module)
    forward.load_state_dict(
        {name.removesuffix("_reverse"): a for name, a in layer.state_dict().items() if name.endswith("_reverse")}
    )
    x, state, lengths = inputs((6, 5, 4)), random_state(layer, 6), random_lengths(6, 5)
    y, end = layer(x, state, lengths=lengths)
    width = end.h.shape[2]
    start = type(state)(*(array[:, 1:] for array in state))
    for row, length in enumerate(lengths):
        turned, last = forward(x[row : row + 1, :length][:, ::-1], start[row])
        assert_close(y[row, :length, width:], turned[0, ::-1], tolerance("float32", 10, 5))
        for one, other in zip(end[row], last, strict=True):
            assert_close(one[:, 1:], other, tolerance("float32", 10, 5))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4"])
def test_any_integer_dtype(dtype: str, module: Any) -> None:
    layer = make("lstm", 4, 6, module=module)
    x, lengths = inputs((5, 6, 4)), random_lengths(5, 6)
    expected = layer(x, lengths=lengths)
    wide = np.zeros(10, dtype)
    wide[::2] = lengths
    for given in (lengths.astype(dtype), wide[::2]):
        assert_same_bits(layer(x, lengths=given), expected)
    assert_same_bits(layer(x, lengths=lengths.tolist()), expected)
    assert_same_bits(layer(x, lengths=tuple(lengths)), expected)


def test_uint8_lengths_of_more_than_half_their_range(module: Any) -> None:
    layer = make("gru_after", 1, 2, module=module)
    x, lengths = inputs((3, 255, 1)), np.array([200, 255, 130], "uint8")
    assert_same_bits(layer(x, lengths=lengths), layer(x, lengths=lengths.astype("int64")))


@pytest.mark.parametrize(
    ("lengths", "error"),
    [
        (np.ones(3, bool), TypeError),
        ([True, False, True], TypeError),
        (np.zeros(0, bool), (TypeError, ValueError)),
        (np.ones(3), TypeError),
        ([1.0, 2.0, 3.0], TypeError),
        (np.ones(3, complex), TypeError),
        (np.ones(3, object), TypeError),
        (["1", "2", "3"], TypeError),
        (np.ones(3, "m8[s]"), TypeError),
        ([None] * 3, TypeError),
        ({1, 2, 3}, TypeError),
        (3, ValueError),
        ([3, 3], ValueError),
        ([3, 3, 3, 3], ValueError),
        ([[3, 3, 3]], ValueError),
        ([[3], [3], [3]], ValueError),
        ([[1], [1, 2], []], ValueError),
        ([3, 3, 6], ValueError),
        ([-1, 3, 3], ValueError),
        (np.array([3, 3, 2**64 - 1], "uint64"), ValueError),
        ([3, 3, 2**70], (TypeError, ValueError, OverflowError)),
        (np.array([3, -128, 3], "int8"), ValueError),
    ],
    ids=str,
)
def test_wrong_lengths(lengths: Any, error: Any, module: Any) -> None:
    layer = make("lstm", 4, 6, module=module)
    with pytest.raises(error, match="lengths"):
        layer(inputs((3, 5, 4)), lengths=lengths)


def test_a_wrong_length_is_quoted_with_its_row(module: Any) -> None:
    layer = make("lstm", 4, 6, module=module)
    with pytest.raises(ValueError, match=r"0\.\.5.*lengths\[1\] is 6"):
        layer(inputs((3, 5, 4)), lengths=[5, 6, 7])


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_axes_have_their_own_message(kind: str, module: Any) -> None:
    layer = make(kind, 4, 6, num_layers=2, module=module)
    x, state = inputs((5, 3, 4)), random_state(layer, 3)  # time first
    with pytest.raises(ValueError, match=r"(?s)lengths.*\(T, B, I\)"):
        layer(x, lengths=[5, 4, 3])
    with pytest.raises(ValueError, match=r"(?s)state.*\(T, B, I\)"):
        layer(x, state)
    right = layer(x.swapaxes(0, 1), state, lengths=[5, 4, 3])
    assert right[0].shape[:2] == (3, 5)
    swapped = tuple(array.swapaxes(0, 1) for array in state)
    with pytest.raises(ValueError, match=r"(?s)state.*batch comes first"):
        layer(x.swapaxes(0, 1), swapped if len(swapped) == 2 else swapped[0])
