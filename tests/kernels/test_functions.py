"""exp, tanh and sigmoid of the kernels: samples of what exhaustive_ulp.py looks at in full, and special values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import ulp
from common import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from fastseq import _simd

pytestmark = pytest.mark.every_isa

FUNCTIONS = ("exp", "tanh", "sigmoid")
WIDER = {"float32": np.float64, "float64": np.longdouble}


def worst(name: str, x: Any) -> tuple[float, Any]:
    error = ulp.errors(getattr(_simd, name)(x), ulp.exact(name, x.astype(WIDER[x.dtype.name])))
    at = error.argmax()
    return float(error[at]), x[at]


def samples(dtype: str) -> Any:
    """Every exponent and either sign; more where the results are neither 0, 1 nor infinite."""
    rng = np.random.default_rng(0)
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    patterns = rng.integers(0, np.iinfo(unsigned).max, 100_000, dtype=unsigned, endpoint=True).view(dtype)
    edge = 110 if dtype == "float32" else 750
    middle = [rng.uniform(-most, most, 300_000) for most in (1e-3, 0.5, 1, 2, 10, 25, edge)]
    ln2 = np.arange(-1100, 1100) * np.log(2) / 2  # where the reduction of the argument turns over
    x = np.concatenate([patterns, *middle, ln2, ln2 + 1e-7, ln2 - 1e-7], dtype=dtype)
    return x[np.isfinite(x)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_within_2_ulp(name: str, dtype: str) -> None:
    if dtype == "float64" and np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("this machine lacks a long double wider than float64")
    error, where = worst(name, samples(dtype))
    assert error <= 2, f"{error} ulp at {where!r}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values(name: str, dtype: str) -> None:
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e30, -1e30], dtype)
    results = {
        "exp": [1, 1, np.inf, 0, np.nan, np.nan, np.inf, 0],
        "tanh": [0, -0.0, 1, -1, np.nan, np.nan, 1, -1],
        "sigmoid": [0.5, 0.5, 1, 0, np.nan, np.nan, 1, 0],
    }
    expected = np.array(results[name], dtype)
    actual = getattr(_simd, name)(x)
    np.testing.assert_array_equal(actual, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(actual[numbers]), np.signbit(expected[numbers]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_where_results_leave_the_normal_numbers(name: str, dtype: str) -> None:
    """No NaN, nothing out of range and no step back where results overflow, underflow and saturate."""
    edge = 120 if dtype == "float32" else 800
    x = np.linspace(-edge, edge, 400_001, dtype=dtype)
    y = getattr(_simd, name)(x)
    assert not np.isnan(y).any(), f"NaN at {x[np.isnan(y)][:5]}"
    low, high = {"exp": (0, np.inf), "tanh": (-1, 1), "sigmoid": (0, 1)}[name]
    assert y.min() == low and y.max() == high
    slack = 4 * np.finfo(dtype).eps * np.abs(y[1:]) + 4 * np.finfo(dtype).smallest_subnormal
    with np.errstate(invalid="ignore"):
        assert not (y[1:] < y[:-1] - slack).any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tanh_is_odd_and_small_arguments_are_kept(dtype: str) -> None:
    x = samples(dtype)
    assert_same_bits(_simd.tanh(-x), -_simd.tanh(x))
    tiny = np.finfo(dtype).smallest_normal * np.arange(1, 100, dtype=dtype)
    np.testing.assert_array_equal(_simd.tanh(tiny), tiny)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_length_gives_the_same_bits(name: str, dtype: str) -> None:
    """Whole vectors and what is left of them, from any element on."""
    function = getattr(_simd, name)
    x = np.random.default_rng(0).normal(size=70).astype(dtype) * 20
    whole = function(x)
    for n in range(len(x)):
        for start in (0, 1, 3):
            assert_same_bits(function(x[start : start + n]), whole[start : start + n])
    assert_same_bits(function(x.reshape(7, 2, 5)), whole.reshape(7, 2, 5))


@given(value=st.floats(width=32), place=st.integers(0, 40), n=st.integers(1, 40))
def test_an_element_does_not_see_its_neighbours(value: float, place: int, n: int) -> None:
    x = np.random.default_rng(n).normal(size=n).astype("float32")
    x[place % n] = value
    for name in FUNCTIONS:
        function = getattr(_simd, name)
        assert_same_bits(function(x)[place % n :][:1], function(np.full(1, value, "float32")))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_arrays_are_refused(name: str) -> None:
    function = getattr(_simd, name)
    for x in (np.zeros(3, "float16"), np.zeros(3, int), np.zeros(3, complex), np.zeros(3, bool)):
        with pytest.raises(TypeError, match="x should be"):
            function(x)
    for x in (np.zeros(6)[::2], np.zeros(3, ">f8"), np.frombuffer(b"\0" * 25, offset=1)):
        with pytest.raises(ValueError, match="x should be"):
            function(x)
    for x in ([0.0], 1.0, None):
        with pytest.raises(TypeError):
            function(x)


def test_the_measure_itself() -> None:
    """Errors of a known number of ulp are measured as that, and what is not a number is seen."""
    truth = np.array([1.0, 1.5, 2.0, 1e-30])
    right = truth.astype("float32")
    np.testing.assert_allclose(ulp.errors(np.nextafter(right, np.float32(9)), right.astype(float)), 1)
    off = right + 3 * np.spacing(right)
    assert ulp.errors(off, right.astype(float)).min() >= 3
    for actual, exact in ((np.nan, 1.0), (np.inf, 1.0), (np.nan, 0.0), (1.0, np.inf), (1.0, 1e-40), (np.nan, np.inf)):
        assert np.isinf(ulp.errors(np.array([actual], "float32"), np.array([exact])))
    assert not ulp.errors(np.array([0, np.inf, np.nan], "float32"), np.array([1e-50, 1e50, np.nan])).any()
