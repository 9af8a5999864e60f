"""Reverse, MergeDirections, LastOfDirections, ZeroPadded: both sets of operations, by hand, padded, trained, saved."""

import numpy as np
import pytest

import fastseq as fs

MODULES = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
LAYERS = {
    "Reverse": lambda m, **dtype: m.Reverse(**dtype),
    "sum": lambda m, **dtype: m.MergeDirections("sum", **dtype),
    "mul": lambda m, **dtype: m.MergeDirections("mul", **dtype),
    "ave": lambda m, **dtype: m.MergeDirections("ave", **dtype),
    "LastOfDirections": lambda m, **dtype: m.LastOfDirections(**dtype),
}
X = np.arange(12.0).reshape(1, 3, 4)


@MODULES
@pytest.mark.parametrize(
    ("name", "length", "wanted"),
    [
        ("Reverse", 2, [[[4, 5, 6, 7], [0, 1, 2, 3], [0, 0, 0, 0]]]),
        ("sum", 2, [[[2, 4], [10, 12], [0, 0]]]),
        ("mul", 2, [[[0, 3], [24, 35], [0, 0]]]),
        ("ave", 2, [[[1, 2], [5, 6], [0, 0]]]),
        ("LastOfDirections", 2, [[4, 5, 2, 3]]),
        ("LastOfDirections", 0, [[0, 0, 0, 0]]),
    ],
)
def test_by_hand_and_whatever_stands_in_the_padding(name, length, wanted, module):
    x = X.astype("f4")
    x[0, length:] = np.nan
    y, _ = LAYERS[name](module).run(x, lengths=[length])
    np.testing.assert_array_equal(y, wanted)
    assert not np.signbit(y).any()


@MODULES
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("lengths", [None, [3, 1, 0, 2]])
def test_backward_is_the_derivative(name, lengths, module):
    layer = LAYERS[name](module, dtype="float64")
    rng = np.random.default_rng(0)
    x, d = rng.normal(size=(2, 4, 3, 6))
    y, _, tape = layer.forward_carrying(x, lengths=lengths)
    dy = rng.normal(size=y.shape)
    dx = layer.backward_carrying(dy, tape)
    ends = [layer.run(x + sign * 1e-6 * d, lengths=lengths)[0] for sign in (1, -1)]
    real = np.ones((4, 3), bool) if lengths is None else np.arange(3) < np.array(lengths)[:, None]
    slope = ((ends[0] - ends[1]) * dy).sum() / 2e-6
    if layer.time == "pointwise":
        slope, real = (((ends[0] - ends[1]) * dy)[real]).sum() / 2e-6, real
    assert slope == pytest.approx((dx * d)[real].sum(), rel=1e-6)


@MODULES
@pytest.mark.parametrize("name", LAYERS)
def test_one_sequence_without_a_batch(name, module):
    x = np.random.default_rng(0).normal(size=(5, 6)).astype("f4")
    layer = LAYERS[name](module)
    np.testing.assert_array_equal(layer(x), layer(x[None])[0])


@pytest.mark.parametrize("name", ["sum", "LastOfDirections"])
def test_halves_are_needed(name):
    with pytest.raises(ValueError, match="both directions in the last axis"):
        LAYERS[name](fs)(np.zeros((2, 3, 5), "f4"))


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_last_of_directions_is_the_state(kind):
    layer = getattr(fs, kind)(3, 4, bidirectional=True, seed=0)
    y, state = layer(np.random.default_rng(0).normal(size=(3, 6, 3)), lengths=[6, 0, 4])
    np.testing.assert_array_equal(fs.LastOfDirections()(y, lengths=[6, 0, 4]), state.h.reshape(3, 8))


def classifier(module, *more):
    return module.ZeroPadded(module.Embedding(7, 3, seed=0), module.GRU(3, 4, seed=1), *more)


@MODULES
def test_zeros_are_padding_wherever_they_stand(module, tmp_path):
    model = classifier(module, module.LastStep(), module.Linear(4, 2, seed=2))
    y = model([[0, 5, 0, 1, 0], [5, 1, 0, 0, 0], [0, 0, 0, 5, 1], [0, 0, 0, 0, 0]])
    plain = module.Sequential(*classifier(module, module.LastStep(), module.Linear(4, 2, seed=2)).layers)
    np.testing.assert_array_equal(y[:3], np.repeat(plain([[5, 1]]), 3, axis=0))
    model.save(tmp_path / "m.safetensors")
    again = (fs if module is fs else fs.reference).load(tmp_path / "m.safetensors")
    assert type(again).__name__ == "ZeroPadded"
    np.testing.assert_array_equal(again([[0, 5, 1]]), model([[5, 1]]))


def test_where_every_step_has_an_output_zeros_stand_at_the_end():
    model = classifier(fs)
    y = model([[5, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(y[0, :2], model([[5, 1]])[0])
    assert not y[0, 2].any() and not y[1, 1:].any()
    for symbols in ([[0, 5]], [[5, 0, 1]]):
        with pytest.raises(ValueError, match="zeros at the end"):
            model(symbols)
    with pytest.raises(ValueError, match=r"symbols of shape \(B, T\)"):
        model([1, 2])


def test_lengths_and_zeros_are_both_padding_and_train():
    model = classifier(fs, fs.LastStep())
    np.testing.assert_array_equal(model([[5, 0, 1, 2]], lengths=[3]), model([[5, 1]]))
    y, tape = model.forward([[0, 5, 1], [2, 0, 0]])
    model.zero_grad()
    model.backward(np.ones_like(y), tape)
    assert not model.grads["0.weight"][0].any() and model.grads["0.weight"][[1, 2, 5]].any(axis=1).all()
