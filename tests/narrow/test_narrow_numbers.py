"""What a float32 number becomes: bfloat16 to nearest even over every exponent, int8 with a scale for each row."""

from __future__ import annotations

import itertools
import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fastseq.narrow import NarrowArray, from_bfloat16, narrowed, quantize, scaled, split_rows, to_bfloat16

LOW = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]  # what is cut: nothing, less than half, a tie, more than half


def nearest(bits: int) -> int:
    """The bfloat16 nearest to a finite float32, of two as near the even one; by the definition, in whole numbers."""
    below, cut = bits >> 16, bits & 0xFFFF
    return below + (cut > 0x8000 or (cut == 0x8000 and below % 2 == 1))


def test_to_nearest_even_over_every_exponent() -> None:
    bits = [
        sign << 31 | exponent << 23 | upper << 16 | low
        for sign, exponent, upper, low in itertools.product((0, 1), range(255), (0, 1, 2, 0x55, 0x7E, 0x7F), LOW)
    ]
    x = np.array(bits, np.uint32).view(np.float32)
    found = to_bfloat16(x)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, [nearest(b) for b in bits])
    # The same by values: no other bfloat16 is nearer.
    some = np.random.default_rng(0).permutation(len(bits))[:500]
    for i in some[np.isfinite(from_bfloat16(found[some]))]:
        value, error = (
            Fraction(float(x[i])),
            abs(Fraction(float(from_bfloat16(found[i : i + 1])[0])) - Fraction(float(x[i]))),
        )
        for other in (
            found[i] ^ np.uint16(1),
            np.uint16(int(found[i]) + 1 & 0xFFFF),
            np.uint16(int(found[i]) - 1 & 0xFFFF),
        ):
            near = float(from_bfloat16(np.array([other]))[0])
            assert not np.isfinite(near) or abs(Fraction(near) - value) >= error


def test_random_numbers_round_as_ties_to_even_do() -> None:
    bits = np.random.default_rng(1).integers(0, 0x7F800000, 20000, dtype=np.uint32)
    np.testing.assert_array_equal(to_bfloat16(bits.view(np.float32)), [nearest(int(b)) for b in bits])


def test_what_bfloat16_has_stays() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    x = from_bfloat16(every)
    usual = ~np.isnan(x)
    np.testing.assert_array_equal(to_bfloat16(x)[usual], every[usual])
    assert np.isnan(from_bfloat16(to_bfloat16(x)[~usual])).all()


def test_nan_stays_nan_and_infinities_stay() -> None:
    nan = np.array([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7F80FFFF], np.uint32).view(np.float32)
    assert np.isnan(from_bfloat16(to_bfloat16(nan))).all()
    assert to_bfloat16(np.float32([np.inf, -np.inf])).tolist() == [0x7F80, 0xFF80]
    most = np.finfo("float32").max
    assert to_bfloat16(np.float32([most, -most])).tolist() == [0x7F80, 0xFF80]
    assert to_bfloat16(np.array([0x7F7F7FFF], np.uint32).view(np.float32)).tolist() == [0x7F7F]
    assert to_bfloat16(np.float32([0.0, -0.0])).tolist() == [0, 0x8000]


def test_strange_memory() -> None:
    x = np.random.default_rng(2).normal(size=(6, 10)).astype("float32")
    np.testing.assert_array_equal(to_bfloat16(x.T), to_bfloat16(x).T)
    np.testing.assert_array_equal(to_bfloat16(x[::2, ::-3]), to_bfloat16(x)[::2, ::-3])


def test_a_row_is_whole_numbers_times_its_scale() -> None:
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(200, 33)) * 10.0 ** rng.integers(-25, 30, (200, 1))).astype("float32")
    numbers, scales = quantize(x)
    assert numbers.dtype == np.int8 and scales.dtype == np.float32 and scales.shape == (200,)
    np.testing.assert_array_equal(scales, np.abs(x).max(1) / np.float32(127))
    assert (np.abs(numbers).max(1) == 127).all() and numbers.min() >= -127
    error = np.abs(numbers * scales.astype(np.float64)[:, None] - x)
    assert (error <= scales[:, None] * (0.5 + 1e-5)).all()


def test_whole_numbers_are_nearest_even() -> None:
    halves = np.arange(-126.5, 127, 1, dtype=np.float32)
    numbers, scales = quantize(np.stack([np.full_like(halves, -127), halves], 1))
    assert (scales == 1).all()
    np.testing.assert_array_equal(numbers[:, 1], [int(v) + (int(v) % 2) * (1 if v > 0 else -1) for v in halves])


def test_small_rows_are_zeros() -> None:
    least = np.float32(2.0**-100)
    rows = [[least, 0], [np.nextafter(least, np.float32(0)), 0], [0, 0], [1e-44, -1e-40], [-least, least / 254]]
    numbers, scales = quantize(np.array(rows, np.float32))
    assert scales.tolist() == [least / np.float32(127), 0, 0, 0, least / np.float32(127)]
    assert numbers.tolist() == [[127, 0], [0, 0], [0, 0], [0, 0], [-127, 0]]


def test_rows_with_nan_and_infinities() -> None:
    inf, nan = np.inf, np.nan
    numbers, scales = quantize(np.float32([[1, inf, -2], [inf, -inf, 5], [nan, 1, 2], [nan, inf, -inf]]))
    np.testing.assert_array_equal(scales, [inf, inf, nan, nan])
    assert numbers[:2].tolist() == [[0, 1, 0], [1, -1, 0]]


def test_the_largest_numbers() -> None:
    most = np.finfo("float32").max
    numbers, scales = quantize(np.float32([[most, -most, most / 2]]))
    assert numbers.tolist() == [[127, -127, 64]] and np.isfinite(scales).all()


def test_rows_without_numbers() -> None:
    numbers, scales = quantize(np.zeros((3, 0), np.float32))
    assert numbers.shape == (3, 0) and scales.tolist() == [0, 0, 0]


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_a_matrix_shares_its_rows_and_cannot_be_changed(weights: str) -> None:
    x = np.random.default_rng(4).normal(size=(12, 5)).astype("float32")
    whole = narrowed(x, weights)
    parts = split_rows(whole, 4)
    assert [part.shape for part in parts] == [(3, 5)] * 4
    np.testing.assert_array_equal(np.concatenate([part.real() for part in parts]), whole.real())
    assert all(np.shares_memory(part.values, whole.values) for part in parts)
    for array in arrays_of(whole):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    doubled = scaled(whole, 2.0)
    assert doubled.values is whole.values
    np.testing.assert_array_equal(doubled.real(), 2 * whole.real())
    np.testing.assert_array_equal(scaled(x, 2.0), 2 * x)
    np.testing.assert_allclose(whole.real(), x, atol=np.abs(x).max() / 100)


def arrays_of(whole: NarrowArray) -> list[Any]:
    return [array for array in (whole.values, whole.scales) if array is not None]


def test_a_product_in_numpy_by_hand() -> None:
    """x (2, 3) times three numbers: every sum written out."""
    weight = NarrowArray("int8", np.array([[127, -3, 10]], np.int8), np.float32([0.5]))
    x = np.float32([[254, 2, -4], [0, 0, 0]])
    assert (x @ weight.T).tolist() == [[(127 * 127 + 1 * -3 + -2 * 10) * 2 * 0.5], [0]]
    assert (x[0] @ weight.T).shape == (1,) and (x[None] @ weight.T).shape == (1, 2, 1)
    weight = NarrowArray("bfloat16", to_bfloat16(np.float32([[1, 2, 4]])))
    rounded = struct.unpack("<f", struct.pack("<I", 0x3F810000))[0]  # 1 + 2^-7: of 1 + 2^-7 - 2^-9
    assert (np.float32([[rounded - 2.0**-9, 0, 1]]) @ weight.T).tolist() == [[rounded + 4]]
