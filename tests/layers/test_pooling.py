"""LastStep, MeanOverTime and MaxOverTime: both sets of operations, by hand, padded and cut."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import assert_close, assert_same_bits, strange

import fastseq as fs

BOTH = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
KINDS = pytest.mark.parametrize("kind", ["LastStep", "MeanOverTime", "MaxOverTime"])
LENGTHS = np.array([3, 7, 0, 1, 6])
PAST = np.arange(7) >= LENGTHS[:, None]


def batch(dtype: str = "float64", *more: int) -> Any:
    return np.random.default_rng(0).normal(size=(5, 7, *(more or (4,)))).astype(dtype)


def trained(layer: Any, x: Any, **options: Any) -> tuple[Any, Any]:
    """Outputs, and the gradient of x."""
    y, tape = layer.forward(x, **options)
    return y, layer.backward(np.cos(np.arange(y.size)).reshape(y.shape).astype(y.dtype), tape)


@BOTH
@DTYPES
def test_by_hand(dtype: str, module: Any) -> None:
    x = np.array([[[1, -5], [4, -2], [4, -9], [7, 7]], [[2, 3], [8, 8], [8, 8], [8, 8]]], dtype)
    for kind, y, dx in (
        ("LastStep", [[4, -9], [2, 3]], [[[0, 0], [0, 0], [6, 12], [0, 0]], [[3, 9], [0, 0], [0, 0], [0, 0]]]),
        ("MeanOverTime", [[3, -16 / 3], [2, 3]], [[[2, 4], [2, 4], [2, 4], [0, 0]], [[3, 9], [0, 0], [0, 0], [0, 0]]]),
        ("MaxOverTime", [[4, -2], [2, 3]], [[[0, 0], [6, 12], [0, 0], [0, 0]], [[3, 9], [0, 0], [0, 0], [0, 0]]]),
    ):
        layer = getattr(module, kind)(dtype=dtype)
        assert layer.time == "pooling" and not layer.parameters
        out, tape = layer.forward(x, lengths=[3, 1])
        np.testing.assert_array_equal(out, np.array(y, dtype))
        assert_same_bits(layer(x, lengths=[3, 1]), out)
        np.testing.assert_array_equal(layer.backward(np.array([[6, 12], [3, 9]], dtype), tape), np.array(dx, dtype))


@BOTH
@DTYPES
@KINDS
def test_a_padded_row_is_the_row_alone(kind: str, dtype: str, module: Any) -> None:
    """In bits, whatever stands in the padding; zeros of a row without a step."""
    layer = getattr(module, kind)(dtype=dtype)
    for more in ((4,), (1,), (2, 3)):
        x = batch(dtype, *more)
        y, dx = trained(layer, x, lengths=LENGTHS)
        dy = np.cos(np.arange(y.size)).reshape(y.shape).astype(dtype)
        assert y.shape == (5, *more) and y.dtype == dx.dtype == dtype
        for b, n in enumerate(LENGTHS):
            one, tape = layer.forward(x[b : b + 1, :n])
            assert_same_bits(one[0], y[b])
            assert_same_bits(layer.backward(dy[b : b + 1], tape)[0], np.ascontiguousarray(dx[b, :n]))
        assert not y[2].any() and not dx[PAST].any() and not np.signbit(dx[PAST]).any()
        for garbage in (np.nan, np.inf, -np.inf, 3e38):
            x[PAST] = garbage
            for array, expected in zip(trained(layer, x, lengths=LENGTHS), (y, dx), strict=True):
                assert_same_bits(array, expected)
            assert_same_bits(layer(x, lengths=LENGTHS), y)
    x = batch(dtype)
    assert_same_bits(layer(x), layer(x, lengths=[7] * 5))
    assert_same_bits(layer(x[1]), layer(x)[1])
    alone, dx = trained(layer, x[1], lengths=[4])
    assert_same_bits(alone, layer(x[1:2, :4])[0])
    assert alone.shape == (4,) and dx.shape == (7, 4) and not dx[4:].any()


@KINDS
def test_against_the_reference(kind: str) -> None:
    x = np.random.default_rng(1).normal(size=(6, 90, 5)).astype("float32")
    x[0, 40] = np.nan
    x[1, 3] = x[1, 2] = -np.inf
    x[2, 5] = np.inf
    x[3] = 1
    lengths = np.array([90, 4, 44, 90, 0, 17])
    for options in ({"lengths": lengths}, {}):
        ours = trained(getattr(fs, kind)(), x, **options)
        theirs = trained(getattr(fs.reference, kind)(), x, **options)
        for one, other in zip(ours, theirs, strict=True):
            assert_same_bits(one, other)


@BOTH
@KINDS
def test_finite_differences(kind: str, module: Any) -> None:
    layer = getattr(module, kind)(dtype="float64")
    x = batch()
    y, dx = trained(layer, x, lengths=LENGTHS)
    dy = np.cos(np.arange(y.size)).reshape(y.shape)
    for place in np.ndindex(x.shape):
        ends = []
        for step in (1e-5, -1e-5):
            moved = x.copy()
            moved[place] += step
            ends.append((layer(moved, lengths=LENGTHS) * dy).sum())
        assert abs((ends[0] - ends[1]) / 2e-5 - dx[place]) < 1e-8


@BOTH
def test_the_first_of_equals_has_the_gradient(module: Any) -> None:
    x = np.array([[[2.0], [5], [5], [5]], [[-np.inf], [-np.inf], [-np.inf], [0]], [[1], [np.nan], [3], [np.nan]]])
    layer = module.MaxOverTime(dtype="float64")
    y, tape = layer.forward(x, lengths=[4, 3, 4])
    np.testing.assert_array_equal(y[:, 0], [5, -np.inf, np.nan])
    dx = layer.backward(np.ones_like(y), tape)[..., 0]
    np.testing.assert_array_equal(dx, [[0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]])


@BOTH
def test_a_mean_of_many_steps_is_exact_to_its_dtype(module: Any) -> None:
    x = np.full((2, 100_000, 1), 0.1, "float32")
    assert (module.MeanOverTime()(x, lengths=[100_000, 77_777]) == np.float32(0.1)).all()
    big = np.full((1, 4, 1), 3e38, "float32")
    assert module.MeanOverTime()(big)[0, 0] == np.float32(3e38)


@BOTH
@KINDS
def test_strange_arrays_and_none_at_all(kind: str, module: Any) -> None:
    layer = getattr(module, kind)()
    x = batch("float32")
    y, _ = trained(layer, x, lengths=LENGTHS)
    for form, own in strange(x).items():
        assert_same_bits(layer(own, lengths=LENGTHS), y, form)
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 4)):
        out, dx = trained(layer, np.zeros(shape, "float32"))
        assert out.shape == ((shape[0], *shape[2:]) if len(shape) == 3 else shape[1:]) and not out.any()
        assert dx.shape == shape
    for bad, error in (
        (x.astype(int), TypeError),
        (x > 0, TypeError),
        (x.astype(complex), TypeError),
        ("x", TypeError),
        (np.zeros(3, "f4"), ValueError),
    ):
        with pytest.raises(error, match=r"\bx should"):
            layer(bad)
    for lengths, error in (([1, 2], ValueError), ([8] * 5, ValueError), ([-1] * 5, ValueError), ([1.0] * 5, TypeError)):
        with pytest.raises(error, match="lengths"):
            layer(x, lengths=lengths)
    with pytest.raises(ValueError, match="dy should be of shape"):
        layer.backward(x, layer.forward(x)[1])


@BOTH
@KINDS
def test_files_pickles_and_copies(kind: str, module: Any, tmp_path: Path) -> None:
    layer = getattr(module, kind)(dtype="float64")
    layer.save(tmp_path / "layer")
    loaded = (fs.load if module is fs else fs.reference.load)(tmp_path / "layer")
    for other in (loaded, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), copy.copy(layer)):
        assert type(other) is type(layer) and repr(other) == repr(layer)
        assert_same_bits(other(batch(), lengths=LENGTHS), layer(batch(), lengths=LENGTHS))


@BOTH
@KINDS
def test_a_classifier_of_padded_rows(kind: str, module: Any) -> None:
    """Gradients of a padded batch are the sums of those of its rows."""
    model = module.Sequential(
        module.GRU(1, 6, bidirectional=True, dtype="float64", seed=0),
        getattr(module, kind)(dtype="float64"),
        module.Linear(12, 3, dtype="float64", seed=1),
    )
    x, labels = batch("float64", 1), np.array([0, 2, 1, 1, 0])
    x[PAST] = np.nan
    y, tape = model.forward(x, lengths=LENGTHS)
    assert y.shape == (5, 3)
    loss, dy = fs.losses.softmax_cross_entropy(y, labels)
    model.backward(dy, tape)
    whole = {name: array.copy() for name, array in model.grads.items()}
    model.zero_grad()
    losses = []
    for b, n in enumerate(LENGTHS):
        out, tape = model.forward(x[b : b + 1, :n])
        assert_close(out[0], y[b], 1e-13)
        own, gradient = fs.losses.softmax_cross_entropy(out, labels[b : b + 1])
        model.backward(gradient / 5, tape)
        losses.append(own)
    assert abs(np.mean(losses) - loss) < 1e-13
    for name, array in model.grads.items():
        assert_close(whole[name], array, 1e-12, name)
