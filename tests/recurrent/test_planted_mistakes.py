"""Each mistake that is easy to make here turns the comparison of the other tests red.

A mistake is planted in what the compiled layer is given; the reference is given the right thing. First the same
comparison without it is green.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from common import (
    GATES,
    Array,
    assert_agree,
    assert_close,
    assert_same_bits,
    example,
    inputs,
    make,
    random_lengths,
    random_resets,
    random_state,
    reduction,
    reference,
    tolerance,
    train,
)

from fastseq import _dense

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


def test_norms_left_out_or_exchanged() -> None:
    layer, x, state = setting("lstm_ln")
    gains = ["ln_ih_weight_l0", "ln_hh_weight_l0"]
    for name in (*gains, "ln_c_weight_l0", "ln_c_bias_l0"):
        other = make_like(layer)
        other.parameters[name] = np.full_like(layer.parameters[name], "weight" in name)
        red(layer, honest(other), x, state)
    other = make_like(layer)
    for name, from_name in zip(gains, gains[::-1], strict=True):
        other.parameters[name] = layer.parameters[from_name]
    red(layer, honest(other), x, state)
    plain = make("lstm", WIDTH, H)
    plain.load_state_dict({name: layer.parameters[name] for name in plain.parameters})
    red(layer, honest(plain), x, state)


# Gradients


Results = dict[str, Array]
CELLS = pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "lstm_proj", "lstm_ln", "gru_after", "gru_before"])
GRUS = pytest.mark.parametrize("kind", ["gru_after", "gru_before"])


class Lesson:
    """A layer and all that its gradients depend on."""

    def __init__(self, kind: str, truncate: int | None = None, dropout: float = 0.0, **config: Any) -> None:
        self.layer = make(kind, WIDTH, H, **config)
        if dropout:
            weights = self.layer.state_dict()
            self.layer = type(self.layer)(**{**self.layer._config, "dropout": dropout})
            self.layer.load_state_dict(weights)
        self.x, self.state, self.dy, self.dstate = example(self.layer, B, T)
        self.truncate = truncate
        self.options: dict[str, Any] = {"seed": 3}

    def taught(self, layer: Any, **other: Any) -> Results:
        """What a layer learns of it, or of another lesson that differs in some places; outputs are left to others."""
        arrays = [other.pop(name, getattr(self, name)) for name in ("x", "state", "dy", "dstate", "truncate")]
        results = train(layer, *arrays, **{**self.options, **other})
        return {name: array for name, array in results.items() if name != "y" and not name.startswith("end.")}

    def compare(self, results: Results) -> None:
        """The comparison of test_training_bits.py."""
        longest = max(reduction(self.layer), GATES[type(self.layer).__name__] * H, B)
        for name, expected in self.taught(reference(self.layer)).items():
            assert_close(results[name], expected, 4 * tolerance("float32", longest, T), name)

    def red(self, mistake: Callable[[Results], Any], where: str) -> None:
        """Honest results are right; a mistake, made in them or in a call of its own, shows in what `where` begins."""
        results = self.taught(self.layer)
        self.compare(results)
        changed = mistake({name: array.copy() for name, array in results.items()})
        names = [name for name in changed if name.startswith(where)]
        assert names
        for name in names:
            assert changed[name].shape == results[name].shape
            with pytest.raises(AssertionError, match=f"^{name}: off by"):
                self.compare({**results, name: changed[name]})


def test_all_that_is_compared() -> None:
    for kind, names in (("lstm_proj", 8), ("lstm_ln", 11), ("gru_after", 6), ("rnn_tanh", 6)):
        lesson = Lesson(kind)
        results = lesson.taught(lesson.layer)
        assert len(results) == names
        for name in results:
            lesson.red(lambda results, name=name: {name: results[name] * np.float32(1.0005)}, name)


@pytest.mark.parametrize("part", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize(("kind", "order"), [("lstm", (0, 1, 3, 2)), ("lstm", (1, 0, 2, 3)), ("gru_after", (1, 0, 2))])
def test_gates_of_gradients_exchanged(kind: str, order: tuple[int, ...], part: str) -> None:
    def exchanged(results: Results) -> Results:
        name = f"{part}_l0"
        blocks = np.split(results[name], len(order))
        return {name: np.concatenate([blocks[gate] for gate in order])}

    Lesson(kind).red(exchanged, part)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[1:], ids=str)
def test_gates_exchanged_on_the_way_back(order: tuple[int, ...]) -> None:
    """What comes back through weights whose gates are in another order: dx, and the state before."""
    lesson = Lesson("lstm")
    lesson.red(lambda _: lesson.taught(with_gates(lesson.layer, order)), ("dx", "dstart"))


@GRUS
def test_the_gradient_of_the_wrong_reset(kind: str) -> None:
    lesson = Lesson(kind)
    other = make({"gru_after": "gru_before", "gru_before": "gru_after"}[kind], WIDTH, H)
    other.load_state_dict(lesson.layer.state_dict())
    lesson.red(lambda _: lesson.taught(other), "")


def test_the_gradients_of_the_two_biases_of_a_gru_exchanged() -> None:
    names = ["bias_ih_l0", "bias_hh_l0"]
    Lesson("gru_after").red(lambda results: dict(zip(names, (results[n] for n in names[::-1]), strict=True)), "bias")


def test_h_and_c_exchanged_in_the_gradients_of_states() -> None:
    lesson = Lesson("lstm", num_layers=2, bidirectional=True)
    c_and_h = (lesson.dstate.c, lesson.dstate.h)
    lesson.red(lambda _: lesson.taught(lesson.layer, dstate=c_and_h), "")
    names = ["dstart.h", "dstart.c"]
    lesson.red(lambda results: dict(zip(names, (results[n] for n in names[::-1]), strict=True)), "dstart")


@CELLS
def test_gradients_of_states_ignored_or_of_other_slots(kind: str) -> None:
    lesson = Lesson(kind, num_layers=2, bidirectional=True)
    lesson.red(lambda _: lesson.taught(lesson.layer, dstate=None), "")
    swapped = type(lesson.dstate)(*(array[:, [0, 2, 1, 3]] for array in lesson.dstate))

    def reached(_: Results) -> Results:
        results = lesson.taught(lesson.layer, dstate=swapped)
        return {name: array for name, array in results.items() if not name.endswith("l1_reverse")}

    lesson.red(reached, "")
    lesson.red(lambda results: {"dstart.h": results["dstart.h"][:, [0, 2, 1, 3]]}, "dstart")


@CELLS
def test_gradients_of_states_given_at_the_end_of_the_padding(kind: str) -> None:
    """They belong to the last real step; past it there is nothing for them to come back through."""
    lesson = Lesson(kind)
    lengths = lesson.options["lengths"] = random_lengths(B, T)
    running = [row for row in range(B) if 0 < lengths[row] < T]
    dy = np.where((np.arange(T) < lengths[:, None])[..., None], lesson.dy, 0)

    def walked_through_the_padding(results: Results) -> Results:
        whole = lesson.taught(lesson.layer, lengths=None, dy=dy)
        for name in ("dx", "dstart.h"):
            results[name][running] = whole[name][running]
        return {**whole, "dx": results["dx"], "dstart.h": results["dstart.h"]}

    lesson.red(walked_through_the_padding, "")


@CELLS
def test_lengths_ignored_in_gradients(kind: str) -> None:
    lesson = Lesson(kind)
    lesson.options["lengths"] = random_lengths(B, T)
    lesson.red(lambda _: lesson.taught(lesson.layer, lengths=None), "")
    lesson.red(lambda _: lesson.taught(lesson.layer, lengths=np.sort(lesson.options["lengths"])), "")


@CELLS
def test_gradients_of_a_reverse_direction_started_in_the_padding(kind: str) -> None:
    """Kindly: zeros stand there, in x and in dy, and the gradient of the final state is zero."""
    lesson = Lesson(kind, bidirectional=True)
    lengths = lesson.options["lengths"] = random_lengths(B, T)
    padding = np.arange(T) >= lengths[:, None]
    lesson.x[padding] = lesson.dy[padding] = 0
    lesson.dstate = None

    def started_in_the_padding(results: Results) -> Results:
        whole = lesson.taught(lesson.layer, lengths=None)
        kept = {name: array for name, array in whole.items() if name.endswith("_reverse")}
        start = results["dstart.h"]
        start[:, 1] = whole["dstart.h"][:, 1]
        return {**kept, "dx": np.where(padding[..., None], 0, whole["dx"]), "dstart.h": start}

    lesson.red(started_in_the_padding, "")


@CELLS
@pytest.mark.parametrize("k", [1, 2, 3])
def test_truncation_off_by_one(k: int, kind: str) -> None:
    """One step more, one less, none, and cuts counted from the last step."""
    lesson = Lesson(kind, truncate=k)
    for other in (k + 1, k - 1 or None, None):
        lesson.red(lambda _, other=other: lesson.taught(lesson.layer, truncate=other), "")

    def pieces(*bounds: int) -> Results:
        total: Results = {}
        state, dx = lesson.state, []
        for begin, end in itertools.pairwise((0, *bounds, T)):
            steps = slice(begin, end)
            last = lesson.dstate if end == T else None
            y_state = lesson.layer(lesson.x[:, steps], state)[1]
            here = lesson.taught(
                lesson.layer, x=lesson.x[:, steps], state=state, dy=lesson.dy[:, steps], dstate=last, truncate=None
            )
            dx.append(here["dx"])
            for name, array in here.items():
                if name in lesson.layer.parameters:
                    total[name] = total.get(name, 0) + array
            state = y_state
        return {**total, "dx": np.concatenate(dx, axis=1)}

    lesson.compare({**lesson.taught(lesson.layer), **pieces(*range(k, T, k))})
    lesson.red(lambda _: pieces(*range(k + 1, T, k)), "")
    if T % k:
        lesson.red(lambda _: pieces(*range(T % k, T, k)), "")


@CELLS
def test_resets_ignored_or_at_other_steps_in_gradients(kind: str) -> None:
    lesson = Lesson(kind, bidirectional=True)
    resets = lesson.options["resets"] = random_resets(B, T)
    assert resets[:, 1:-1].any()
    lesson.red(lambda _: lesson.taught(lesson.layer, resets=None), "")
    for shift in (-1, 1):  # as if a direction dropped the state after a step, not before it
        lesson.red(lambda _, shift=shift: lesson.taught(lesson.layer, resets=np.roll(resets, shift, axis=1)), "")


class OtherMasks:
    """The operations of dropout, which make a mistake in the nth call: the first is of forward."""

    def __init__(self, mistake: Callable[..., Array], call: int) -> None:
        self.mistake, self.left = mistake, call

    def dropout(self, x: Array, p: float, seed: int, stream: int, n_threads: int) -> Array:
        self.left -= 1
        return (_dense.dropout if self.left + 1 else self.mistake)(x, p, seed, stream, n_threads)


@CELLS
@pytest.mark.parametrize(
    "mistake",
    [
        lambda x, p, seed, stream, n_threads: _dense.dropout(x, p, seed + 1, stream, n_threads),
        lambda x, p, seed, stream, n_threads: _dense.dropout(x, p, seed, stream + 1, n_threads),
        lambda x, p, seed, stream, n_threads: x,
        lambda x, p, seed, stream, n_threads: _dense.dropout(x, p, seed, stream, n_threads) * np.float32(1 - p),
    ],
    ids=["another seed", "another layer", "none", "not scaled"],
)
def test_gradients_through_another_dropout_mask(mistake: Any, kind: str) -> None:
    lesson = Lesson(kind, num_layers=2, dropout=0.4)

    def wrong(_: Results) -> Results:
        layer = make_like(lesson.layer)
        layer._backend = replace(layer._backend, dense=OtherMasks(mistake, 1))
        results = lesson.taught(layer)
        # Gradients of the layer above the mask are right.
        return {name: array for name, array in results.items() if "_l1" not in name and "start" not in name}

    lesson.red(wrong, "")


def test_gradients_that_replace_what_was_there() -> None:
    """The two directions of a layer add to one dx."""
    lesson = Lesson("lstm", bidirectional=True)
    half = lesson.dy.copy()
    half[..., :H] = 0
    lesson.red(lambda _: {"dx": lesson.taught(lesson.layer, dy=half)["dx"]}, "dx")


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
