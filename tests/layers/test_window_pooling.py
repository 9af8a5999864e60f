"""MaxPool1d and AvgPool1d: by hand, both engines, PyTorch, finite differences, lengths, bad input, planted mistakes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import Array, assert_close, assert_same_bits, inputs, strange

import fastseq as fs

BOTH = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
CASES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "max": ("MaxPool1d", (3,), {}),
    "max of neighbours": ("MaxPool1d", (3, 1), {"padding": 1}),
    "max, dilated": ("MaxPool1d", (3, 2), {"padding": (1, 4), "dilation": 2}),
    "max, same": ("MaxPool1d", (4, 3), {"padding": "same"}),
    "max, causal": ("MaxPool1d", (4, 1), {"padding": "causal"}),
    "max of padding": ("MaxPool1d", (2, 1), {"padding": 3}),
    "mean": ("AvgPool1d", (3,), {}),
    "mean of neighbours": ("AvgPool1d", (3, 1), {"padding": 1}),
    "mean, strided": ("AvgPool1d", (4, 3), {"padding": (2, 1)}),
    "mean of real frames": ("AvgPool1d", (4, 3), {"padding": "same", "count_include_pad": False}),
    "mean of no frames": ("AvgPool1d", (2, 5), {"padding": 4, "count_include_pad": False}),
}
LAYERS = pytest.mark.parametrize("case", CASES)
LENGTHS = np.array([11, 0, 4, 1, 8])


def build(case: str, module: Any = fs, dtype: Any = "float64") -> Any:
    name, arguments, settings = CASES[case]
    return getattr(module, name)(*arguments, **settings, dtype=dtype)


def trained(layer: Any, x: Array, lengths: Any = None) -> tuple[Array, Array]:
    """Outputs, and the gradient of x; past the output lengths dy is NaN."""
    y, tape = layer.forward(x, lengths=lengths)
    dy = np.cos(np.arange(y.size)).reshape(y.shape).astype(y.dtype)
    if lengths is not None:
        dy[np.arange(y.shape[1]) >= layer.output_lengths(lengths)[:, None]] = np.nan
    return y, layer.backward(dy, tape)


@BOTH
@DTYPES
def test_by_hand(dtype: str, module: Any) -> None:
    x = np.array([[[1, -5], [4, -2], [4, -9], [7, 7], [3, 0]]], dtype)
    layer = module.MaxPool1d(2, 1, dtype=dtype)
    y, tape = layer.forward(x)
    np.testing.assert_array_equal(y[0], [[4, -2], [4, -2], [7, 7], [7, 7]])
    dx = layer.backward(np.array([[[1, 2], [4, 8], [16, 32], [64, 128]]], dtype), tape)
    np.testing.assert_array_equal(dx[0], [[0, 0], [5, 10], [0, 0], [80, 160], [0, 0]])  # of equals the first
    for pad, first in ((True, 2.5 / 1.5), (False, 2.5)):
        layer = module.AvgPool1d(3, 2, padding=(1, 1), count_include_pad=pad, dtype=dtype)
        y, tape = layer.forward(x)
        np.testing.assert_allclose(y[0, :, 0], [first, 5, 10 / 3 if pad else 5], rtol=1e-6)
        dx = layer.backward(np.ones_like(y), tape)
        end = 1 / 3 if pad else 1 / 2
        np.testing.assert_allclose(dx[0, :, 1], [end, end + 1 / 3, 1 / 3, 1 / 3 + end, end], rtol=1e-6)
    assert module.MaxPool1d(3).stride == 3 and module.MaxPool1d(3).time == "sequence"


@DTYPES
@LAYERS
def test_parity(case: str, dtype: str) -> None:
    for whole in (False, True):  # small whole numbers have equals
        for batch, time in ((5, 11), (1, 1), (3, 0), (0, 4)):
            x = inputs((batch, time, 3), dtype)
            x = np.round(x) if whole else x
            for lengths in (None, np.minimum(LENGTHS[:batch], time)):
                found = trained(build(case, fs, dtype), x, lengths)
                expected = trained(build(case, fs.reference, dtype), x, lengths)
                for one, other in zip(found, expected, strict=True):
                    assert one.dtype == dtype
                    assert_close(one, other, 4 * float(np.finfo(dtype).eps))
    x = inputs((2, 9, 2), dtype)
    x[0, 4] = np.nan
    x[1, 3] = np.inf
    for one, other in zip(
        trained(build(case, fs, dtype), x), trained(build(case, fs.reference, dtype), x), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_against_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch (the extra `peers`) is not installed")
    for kind, size, stride, padding, dilation in (
        ("MaxPool1d", 3, 1, 1, 1),
        ("MaxPool1d", 4, 3, 2, 2),
        ("MaxPool1d", 2, None, 0, 1),
        ("AvgPool1d", 3, 2, 1, 1),
        ("AvgPool1d", 4, None, 2, 1),
    ):
        for more in ({"dilation": dilation},) if kind == "MaxPool1d" else ({}, {"count_include_pad": False}):
            peer = getattr(torch.nn, kind)(size, stride, padding, **more)
            layer = getattr(fs, kind)(size, stride, padding=padding, dtype="float64", **more)
            x = inputs((2, 17, 3), "float64")
            given = torch.tensor(x.swapaxes(1, 2).copy(), requires_grad=True)
            y, dx = trained(layer, x)
            expected = peer(given)
            expected.backward(torch.tensor(np.cos(np.arange(y.size)).reshape(y.shape).swapaxes(1, 2).copy()))
            assert_close(y, expected.detach().numpy().swapaxes(1, 2), 1e-14)
            assert_close(dx, given.grad.numpy().swapaxes(1, 2), 1e-14)


@BOTH
@LAYERS
def test_finite_differences(case: str, module: Any) -> None:
    layer = build(case, module)
    x = np.random.default_rng(3).permutation(66).reshape(2, 11, 3) / 7.0  # no two are equal or near
    y, tape = layer.forward(x, lengths=[11, 6])
    dy = np.cos(np.arange(y.size)).reshape(y.shape)
    dx = layer.backward(dy, tape)
    for seed in range(3):
        way = np.random.default_rng(seed).normal(size=x.shape)
        ends = [(layer(x + step * way, lengths=[11, 6]) * dy).sum() for step in (-1e-6, 1e-6)]
        assert abs((ends[1] - ends[0]) / 2e-6 - (dx * way).sum()) < 1e-7


@BOTH
@DTYPES
@LAYERS
def test_a_padded_row_is_the_row_alone(case: str, dtype: str, module: Any) -> None:
    layer = build(case, module, dtype)
    x = inputs((5, 11, 2), dtype)
    x[np.arange(11) >= LENGTHS[:, None]] = np.nan
    y, dx = trained(layer, x, LENGTHS)
    counts = layer.output_lengths(LENGTHS)
    for row, (length, count) in enumerate(zip(LENGTHS, counts, strict=True)):
        own, tape = layer.forward(x[row : row + 1, :length])
        assert own.shape[1] == count
        assert_same_bits(y[row : row + 1, :count], own)
        dy = np.cos(np.arange(y.size)).reshape(y.shape).astype(dtype)[row : row + 1, :count]
        assert_same_bits(dx[row : row + 1, :length], layer.backward(dy, tape))
        for rest in (y[row, count:], dx[row, length:]):
            assert not rest.any() and not np.signbit(rest).any()


@BOTH
def test_forms_files_and_errors(module: Any, tmp_path: Path) -> None:
    for case in CASES:
        layer = build(case, module)
        x = inputs((3, 11, 2), "float64")
        assert_same_bits(layer(x[0]), layer(x)[0])
        for name, array in strange(x).items():
            assert_same_bits(layer(array), layer(x), name)
        layer.save(tmp_path / "layer")
        read = fs.load if module is fs else fs.reference.load
        for other in (read(tmp_path / "layer"), copy.deepcopy(layer)):
            assert repr(other) == repr(layer)
            assert_same_bits(other(x), layer(x))
        with pytest.raises(ValueError, match="needs all frames of a window at once"):
            module.Sequential(layer).step(x[:, 0])
    layer = module.MaxPool1d(2)
    for call, error, message in (
        (lambda: layer(np.zeros(3, "float32")), ValueError, "x should be of shape"),
        (lambda: layer(np.zeros((2, 3, 1), int)), TypeError, "x should hold real"),
        (lambda: layer(np.zeros((2, 3, 1), "float32"), lengths=[4, 0]), ValueError, "lengths"),
        (lambda: layer.backward(np.zeros((2, 3, 1)), layer.forward(x[:2])[1]), ValueError, "dy should be"),
        (lambda: module.MaxPool1d(0), ValueError, "kernel_size"),
        (lambda: module.MaxPool1d(2, 0), ValueError, "stride"),
        (lambda: module.MaxPool1d(2, padding="all"), ValueError, "padding"),
        (lambda: module.AvgPool1d(2, count_include_pad=1), TypeError, "count_include_pad"),
        (lambda: module.AvgPool1d(2, dilation=2), TypeError, "dilation"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_planted_mistakes() -> None:
    """A window that is shifted, padding that counts, lengths that are ignored: each is seen."""
    x, lengths = inputs((5, 11, 2), "float64"), LENGTHS
    right = fs.reference.AvgPool1d(3, 2, padding=(1, 1), count_include_pad=False, dtype="float64")(x, lengths=lengths)
    assert_close(
        fs.AvgPool1d(3, 2, padding=1, count_include_pad=False, dtype="float64")(x, lengths=lengths), right, 1e-15
    )
    for settings, given in (
        ({"padding": (0, 2), "count_include_pad": False}, lengths),
        ({"padding": (1, 1)}, lengths),
        ({"padding": (1, 1), "count_include_pad": False}, None),
    ):
        with pytest.raises(AssertionError, match="off by"):
            assert_close(fs.AvgPool1d(3, 2, **settings, dtype="float64")(x, lengths=given), right, 1e-15)
