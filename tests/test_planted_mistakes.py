"""Each mistake that is easy to make here turns the comparison of the other tests red.

A mistake is planted in what the compiled layer is given; the reference is given the right thing. First the same
comparison without it is green.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from common import (
    assert_agree,
    assert_close,
    assert_same_bits,
    inputs,
    make,
    random_lengths,
    random_state,
    reduction,
    reference,
    tolerance,
)

B, T, WIDTH, H = 5, 7, 4, 9


def compare(layer: Any, call: Any, x: Any, state: Any, lengths: Any = None) -> None:
    """The comparison of test_parity.py: what `call` gives, against the reference of `layer`."""
    relative = tolerance(layer.dtype, reduction(layer), T)
    assert_agree(call(x, state, lengths), reference(layer)(x, state, lengths=lengths), relative)


def honest(layer: Any) -> Any:
    return lambda x, state, lengths: layer(x, state, lengths=lengths)


def red(layer: Any, call: Any, x: Any, state: Any, lengths: Any = None) -> None:
    compare(layer, honest(layer), x, state, lengths)
    with pytest.raises(AssertionError, match="off by"):
        compare(layer, call, x, state, lengths)


def with_gates(
    layer: Any, order: tuple[int, ...], prefixes: tuple[str, ...] = ("weight_ih", "weight_hh", "bias")
) -> Any:
    """A layer of the same configuration whose parameters have their gates in another order."""
    other = make_like(layer)
    weights = layer.state_dict()
    for name, array in weights.items():
        if name.startswith(prefixes):
            blocks = np.split(array, len(order))
            weights[name] = np.concatenate([blocks[gate] for gate in order])
    other.load_state_dict(weights)
    return other


def make_like(layer: Any) -> Any:
    other = type(layer)(**layer._config)
    other.load_state_dict(layer.state_dict())
    return other


def setting(kind: str, **more: Any) -> tuple[Any, Any, Any]:
    layer = make(kind, WIDTH, H, **more)
    return layer, inputs((B, T, WIDTH)), random_state(layer, B)


@pytest.mark.parametrize("part", ["all", "weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize(
    "order", list(itertools.permutations(range(4)))[1:], ids=lambda o: "".join("ifgo"[g] for g in o)
)
def test_lstm_gate_orders(order: tuple[int, ...], part: str) -> None:
    layer, x, state = setting("lstm")
    prefixes = ("weight_ih", "weight_hh", "bias") if part == "all" else (part,)
    wrong = with_gates(layer, order, prefixes)
    if part.startswith("bias"):
        # The two biases of an LSTM are added: exchanged gates in one are seen as well.
        assert not np.array_equal(wrong.parameters[f"{part}_l0"], layer.parameters[f"{part}_l0"])
    red(layer, honest(wrong), x, state)


@pytest.mark.parametrize("part", ["all", "weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("kind", ["gru_after", "gru_before"])
@pytest.mark.parametrize(
    "order", list(itertools.permutations(range(3)))[1:], ids=lambda o: "".join("rzn"[g] for g in o)
)
def test_gru_gate_orders(order: tuple[int, ...], kind: str, part: str) -> None:
    layer, x, state = setting(kind)
    prefixes = ("weight_ih", "weight_hh", "bias") if part == "all" else (part,)
    red(layer, honest(with_gates(layer, order, prefixes)), x, state)


@pytest.mark.parametrize("kind", ["gru_after", "gru_before"])
def test_the_wrong_reset(kind: str) -> None:
    layer, x, state = setting(kind)
    other = make({"gru_after": "gru_before", "gru_before": "gru_after"}[kind], WIDTH, H)
    other.load_state_dict(layer.state_dict())
    red(layer, honest(other), x, state)


@pytest.mark.parametrize("kind", ["gru_after"])
def test_the_two_biases_of_a_gru_exchanged(kind: str) -> None:
    layer, x, state = setting(kind)
    other = make_like(layer)
    other.parameters["bias_ih_l0"] = layer.parameters["bias_hh_l0"]
    other.parameters["bias_hh_l0"] = layer.parameters["bias_ih_l0"]
    red(layer, honest(other), x, state)


@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru_after", "gru_before"])
def test_lengths_ignored(kind: str) -> None:
    layer, x, state = setting(kind)
    lengths = random_lengths(B, T)
    red(layer, lambda x, state, lengths: layer(x, state), x, state, lengths)

    def ignored_in_the_state(x: Any, state: Any, lengths: Any) -> Any:
        return layer(x, state, lengths=lengths)[0], layer(x, state)[1]

    red(layer, ignored_in_the_state, x, state, lengths)


def test_lengths_of_other_rows() -> None:
    layer, x, state = setting("lstm")
    lengths = random_lengths(B, T)
    assert len(set(lengths)) > 2
    red(layer, lambda x, state, lengths: layer(x, state, lengths=np.sort(lengths)), x, state, lengths)


@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru_after", "gru_before"])
def test_reverse_direction_started_in_the_padding(kind: str) -> None:
    layer, x, state = setting(kind, bidirectional=True)
    lengths = random_lengths(B, T)
    padding = np.arange(T) >= lengths[:, None]
    x[padding] = 0  # the kindest padding there is

    def started_in_the_padding(x: Any, state: Any, lengths: Any) -> Any:
        y, end = layer(x, state, lengths=lengths)
        whole, whole_end = layer(x, state)
        y[:, :, H:] = np.where(padding[..., None], 0, whole[:, :, H:])
        ends = [np.stack([a[:, 0], b[:, 1]], axis=1) for a, b in zip(end, whole_end, strict=True)]
        return y, type(end)(*ends)

    red(layer, started_in_the_padding, x, state, lengths)


def test_reverse_direction_not_reversed() -> None:
    layer, x, state = setting("lstm", bidirectional=True)

    def forward_twice(x: Any, state: Any, lengths: Any) -> Any:
        y, end = layer(x, state)
        flipped, _ = layer(x[:, ::-1], state)
        y[:, :, H:] = flipped[:, :, H:]
        return y, end

    red(layer, forward_twice, x, state)


def test_h_and_c_exchanged() -> None:
    layer, x, state = setting("lstm", num_layers=2)
    red(layer, lambda x, state, lengths: layer(x, (state.c, state.h)), x, state)

    def exchanged_on_the_way_out(x: Any, state: Any, lengths: Any) -> Any:
        y, end = layer(x, state)
        return y, type(end)(end.c, end.h)

    red(layer, exchanged_on_the_way_out, x, state)


@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru_after"])
def test_slots_of_the_state_exchanged(kind: str) -> None:
    """Directions outside layers, for layers outside directions."""
    layer, x, state = setting(kind, num_layers=2, bidirectional=True)
    swapped = type(state)(*(array[:, [0, 2, 1, 3]] for array in state))
    red(layer, lambda x, state, lengths: layer(x, swapped), x, state)


def test_initial_state_ignored() -> None:
    for kind in ("rnn_tanh", "lstm", "gru_after", "gru_before"):
        layer, x, state = setting(kind)
        red(layer, lambda x, state, lengths, layer=layer: layer(x), x, state)


def test_rows_exchanged() -> None:
    layer, x, state = setting("lstm")
    red(layer, lambda x, state, lengths: layer(x, state[[1, 0, 2, 3, 4]]), x, state)


def test_a_bias_added_once() -> None:
    for kind in ("rnn_tanh", "lstm", "gru_after", "gru_before"):
        layer, x, state = setting(kind)
        other = make_like(layer)
        other.parameters["bias_hh_l0"] = np.zeros_like(layer.parameters["bias_hh_l0"])
        red(layer, honest(other), x, state)


def test_the_projection_left_out() -> None:
    layer, x, state = setting("lstm_proj")
    other = make_like(layer)
    other.parameters["weight_hr_l0"] = np.eye(H // 2, H)
    red(layer, honest(other), x, state)


# And of the comparisons themselves


def test_an_error_just_beyond_the_contract_is_seen() -> None:
    expected = inputs((50,), "float64")
    largest = np.abs(expected).max()
    for dtype in ("float32", "float64"):
        relative = tolerance(dtype, 13, 7)
        for sign in (-1, 1):
            off = expected.copy()
            off[17] += sign * relative * largest * 0.99
            assert_close(off, expected, relative)
            off[17] += sign * relative * largest * 0.02
            with pytest.raises(AssertionError, match="off by"):
                assert_close(off, expected, relative)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen(value: float) -> None:
    expected = inputs((5,), "float64")
    off = expected.copy()
    off[2] = value
    assert_close(off, off, 1e-6)
    for actual, wanted in ((off, expected), (expected, off), (-off, off) if np.isinf(value) else (off, expected)):
        with pytest.raises(AssertionError):
            assert_close(actual, wanted, 1e-6)


def test_one_bit_is_seen() -> None:
    zeros = np.zeros(3, "float32")
    assert_same_bits(zeros, zeros.copy())
    for other in (np.array([0, -0.0, 0], "float32"), np.array([0, 0, 1e-45], "float32"), zeros.astype("float64")):
        with pytest.raises(AssertionError):
            assert_same_bits(other, zeros)
    layer = make("lstm", WIDTH, H)
    state = random_state(layer, 2)
    h = state.h.copy()
    h[1, 0, 3] = np.nextafter(h[1, 0, 3], np.float32(1))
    with pytest.raises(AssertionError, match="1 of"):
        assert_same_bits(type(state)(h, state.c), state)
