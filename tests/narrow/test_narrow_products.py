"""Products of narrow weights: int8 equals NumPy exactly on every instruction set, bfloat16 as closely as float32."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from common import assert_same_bits, run_python, threads
from twins import EACH_TYPE, TYPES, digests

import fastseq as fs
from fastseq import _simd
from fastseq.narrow import NarrowArray, from_bfloat16, to_bfloat16

every_isa = pytest.mark.every_narrow_isa
# Neither a panel, nor a word, nor a vector divides these; (inputs, outputs).
SIZES = [(1, 1), (2, 5), (3, 70), (17, 33), (63, 65), (66, 130), (129, 200), (261, 3)]
NONE, INF, NAN = np.float32(0), np.float32(np.inf), np.float32(np.nan)


def linear(weight: Any, bias: Any = None, weights: str = "int8") -> Any:
    """The twin of a linear layer of some weights."""
    weight = np.asarray(weight, np.float32)
    layer = fs.Linear(weight.shape[1], weight.shape[0], bias is not None, seed=0)
    layer.parameters["weight"] = weight
    if bias is not None:
        layer.parameters["bias"] = bias
    return layer.with_weights(weights)


def reference(twin: Any, x: Any) -> Any:
    """What NumPy makes of the narrow weights of a twin."""
    y = np.asarray(x, np.float32) @ twin._arrays["weight"].T
    with np.errstate(all="ignore"):
        return y + twin._arrays["bias"] if "bias" in twin._arrays else y


def usual(inputs_size: int, outputs: int, rows: int) -> tuple[Any, Any, Any]:
    """Weights, a bias and inputs, each row of another size."""
    rng = np.random.default_rng([inputs_size, outputs])
    weight = rng.normal(size=(outputs, inputs_size)) * rng.lognormal(0, 2, (outputs, 1))
    x = rng.normal(size=(rows, inputs_size)) * rng.lognormal(0, 3, (rows, 1))
    return weight.astype("float32"), rng.normal(size=outputs).astype("float32"), x.astype("float32")


@every_isa
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_int8_is_numpy_exactly_whatever_the_rows(size: tuple[int, int]) -> None:
    weight, bias, x = usual(*size, rows=100)
    twin = linear(weight, bias)
    wanted = reference(twin, x)
    for rows in range(1, 101):
        np.testing.assert_array_equal(twin(x[:rows]), wanted[:rows], err_msg=f"{rows} rows")


@every_isa
@pytest.mark.parametrize("power", [-12, -19, -21, -40])
def test_int8_is_numpy_where_scales_and_results_are_denormal(power: int) -> None:
    weight, _, _ = usual(17, 33, rows=1)
    x = np.ldexp(np.random.default_rng(0).normal(size=(9, 17)), -98).astype("float32")
    twin = linear(np.ldexp(weight, power))
    np.testing.assert_array_equal(twin(x), reference(twin, x))


@every_isa
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bfloat16_is_numpy_whatever_the_rows(size: tuple[int, int]) -> None:
    weight, bias, x = usual(*size, rows=100)
    twin = linear(weight, bias, "bfloat16")
    narrow_x, narrow_w = (from_bfloat16(to_bfloat16(a)).astype(np.float64) for a in (x, weight))
    y = twin(x)
    bound = 4 * np.finfo("float32").eps * np.sqrt(size[0]) * (np.abs(narrow_x) @ np.abs(narrow_w.T) + np.abs(bias))
    assert (np.abs(y - (narrow_x @ narrow_w.T + bias)) <= bound).all()
    for rows in range(1, 100):
        assert_same_bits(twin(x[:rows]), y[:rows], f"{rows} rows")


@every_isa
@EACH_TYPE
def test_more_rows_than_are_narrow_at_once(weights: str) -> None:
    twin = linear(*usual(5, 7, 0)[:2], weights)
    x = usual(5, 7, 4100)[2]
    y = twin(x)
    if weights == "int8":
        np.testing.assert_array_equal(y, reference(twin, x))
    for first in (0, 511, 2047, 4094):
        assert_same_bits(twin(x[first : first + 3]), y[first : first + 3])
    with threads(3):
        assert_same_bits(twin(x), y)


@every_isa
def test_weights_and_inputs_at_both_ends() -> None:
    rng = np.random.default_rng(0)
    weight = rng.choice([-1, 1], (70, 131)) * np.float32(3)
    twin = linear(weight)
    assert set(np.unique(twin._arrays["weight"].values)) == {-127, 127}
    x = np.concatenate([weight[:9], -weight[:9], np.ones((1, 131)), -np.ones((1, 131))]).astype("float32")
    np.testing.assert_array_equal(twin(x), reference(twin, x))
    np.testing.assert_allclose(np.diag(twin(x))[:9], 131 * 9, rtol=1e-6)
    np.testing.assert_allclose(np.diag(twin(x)[9:18]), -131 * 9, rtol=1e-6)


@every_isa
@pytest.mark.parametrize("signs", ["same", "opposite", "mixed"])
def test_the_longest_sums_stay_in_32_bits(signs: str) -> None:
    inputs_size = 2**17
    rng = np.random.default_rng(1)
    weight = np.ones((3, inputs_size), np.float32)
    weight[1] = -1
    weight[2, ::2] = -1
    x = np.ones((2, inputs_size), np.float32)
    x[1] = weight[2] if signs == "opposite" else rng.choice([-1, 1], inputs_size) if signs == "mixed" else 1
    twin = linear(weight)
    y = twin(x)
    np.testing.assert_array_equal(y, reference(twin, x))
    np.testing.assert_array_equal(
        y[0, :2],
        np.float32([1, -1]) * np.float32(127 * 127 * inputs_size) * np.float32(np.float32(1 / np.float32(127)) ** 2),
    )


@every_isa
def test_a_scale_for_each_output_and_each_row() -> None:
    """Powers of two, with which every product is a whole number that float32 has: any other scale gives another."""
    rng = np.random.default_rng(2)
    numbers = rng.integers(-126, 127, (150, 30))
    numbers[:, 3] = 127
    powers = 2.0 ** rng.permutation(np.arange(150) % 40 - 20)
    twin = linear(numbers * powers[:, None])
    np.testing.assert_array_equal(twin._arrays["weight"].scales, powers)
    np.testing.assert_array_equal(twin._arrays["weight"].values, numbers)
    x = rng.integers(-126, 127, (37, 30))
    x[:, 7] = -127
    of_x = 2.0 ** (np.arange(37) - 18)
    wanted = (x @ numbers.T) * of_x[:, None] * powers
    np.testing.assert_array_equal(twin((x * of_x[:, None]).astype("float32")), wanted)


@every_isa
def test_inputs_are_rounded_to_nearest_even() -> None:
    halves = np.arange(-126.5, 127, 1)
    near = np.nextafter(np.float32(halves), np.float32(np.inf)), np.nextafter(np.float32(halves), np.float32(-np.inf))
    for values in (halves, *near):
        rows = np.stack([np.full(len(values), 127), values], 1).astype("float32")
        y = linear([[0, 1]])(rows)
        np.testing.assert_array_equal(np.rint(y[:, 0] * 127 / 127), np.rint(np.float64(values)))
    # What a row of bfloat16 makes of every exponent, with ties: the same as NumPy.
    bits = (np.arange(2, 255, dtype=np.uint32)[:, None] << 23) | np.uint32(
        [0, 0x8000, 0x18000, 0x7FFF, 0x8001, 0x17FFF, 0x18001, 0x7F8000, 0x7F7FFF, 0x7FFFFF, 0x12345]
    )
    x = np.concatenate([bits.ravel(), bits.ravel() | np.uint32(1 << 31)]).view(np.float32)[:, None]
    y = linear([[1]], weights="bfloat16")(x)
    assert_same_bits(y, from_bfloat16(to_bfloat16(x)))


@every_isa
@EACH_TYPE
def test_rows_of_zeros_and_next_to_nothing(weights: str) -> None:
    weight, bias, x = usual(21, 34, 12)
    weight[3] = 0
    weight[5] = 1e-33  # below 2^-100, a row of zeros to int8
    weight[7, 4:] = 1e-42
    x[1] = 0
    x[2] = 1e-40
    x[4, 1:] = -1e-39
    x[6] = np.float32(2.0**-101)
    x[8] *= np.float32(2.0**-95) / np.abs(x[8]).max()
    twin = linear(weight, bias, weights)
    y = twin(x)
    np.testing.assert_array_equal(y[[1, 2]], np.broadcast_to(bias, (2, 34)))
    np.testing.assert_array_equal(y[:, 3], np.broadcast_to(bias[3], 12))
    assert np.isfinite(y).all()
    if weights == "int8":
        np.testing.assert_array_equal(y, reference(twin, x))
        np.testing.assert_array_equal(y[:, 5], np.broadcast_to(bias[5], 12))
        np.testing.assert_array_equal(y[6], bias)
        small = np.zeros(34, np.float32)
        alone = linear(weight, small)
        wanted = reference(alone, x[8:9])
        assert wanted.any()
        np.testing.assert_array_equal(alone(x[8:9]), wanted)
    else:
        np.testing.assert_allclose(y, reference(twin, x), rtol=1e-5, atol=1e-6)


def with_infinities(rng: Any, rows: int, inputs_size: int) -> Any:
    """Inputs with one, two or many infinities, of one sign and of both, and NaN."""
    x = rng.normal(size=(rows, inputs_size)).astype("float32")
    for row in range(rows):
        kind = row % 6
        places = rng.permutation(inputs_size)
        if kind == 1:
            x[row, places[0]] = rng.choice([-INF, INF])
        elif kind == 2:
            x[row, places[:2]] = INF
        elif kind == 3:
            x[row, places[:2]] = INF, -INF
        elif kind == 4:
            x[row, places[: inputs_size // 2]] = rng.choice([-INF, INF], inputs_size // 2)
        elif kind == 5:
            x[row, places[:3]] = NAN, INF, -INF
    return x


@every_isa
@EACH_TYPE
@pytest.mark.parametrize("size", [(6, 5), (37, 70)], ids=str)
def test_infinities_and_nan_go_where_float32_sends_them(size: tuple[int, int], weights: str) -> None:
    rng = np.random.default_rng([*size, 7])
    weight = rng.normal(size=(size[1], size[0])).astype("float32")
    weight[rng.random(weight.shape) < 0.2] = 0
    weight[1] = 0
    weight[2] = np.abs(weight[2]) + 0.1
    bias = rng.normal(size=size[1]).astype("float32")
    x = with_infinities(rng, 36, size[0])
    twin = linear(weight, bias, weights)
    with np.errstate(all="ignore"):
        wanted = x.astype("float32") @ twin.parameters["weight"].T + bias
    together = twin(x)
    alone = np.stack([twin(row) for row in x])
    for y in (together, alone):
        for kind in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(kind(y), kind(wanted), err_msg=kind.__name__)
    every_nan = np.uint32([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7F80FFFF]).view(np.float32)
    for nan in every_nan:
        row = np.where(np.arange(size[0]) == 3, nan, x[0])
        assert np.isnan(twin(row)).all()
    ours = reference(twin, x)
    if weights == "int8":
        np.testing.assert_array_equal(together, ours)
    else:
        np.testing.assert_allclose(together, ours, rtol=1e-4, atol=1e-5)


@every_isa
@EACH_TYPE
def test_infinite_weights_are_as_in_numpy(weights: str) -> None:
    rng = np.random.default_rng(3)
    weight, bias, x = usual(19, 40, 9)
    for row, values in enumerate([[INF], [-INF], [NAN], [INF, INF], [INF, -INF], [NAN, INF]]):
        weight[3 * row, rng.permutation(19)[: len(values)]] = values
    x[2] = 0
    x[5, 3] = INF
    x[7, 2] = NAN
    twin = linear(weight, bias, weights)
    y = twin(x)
    wanted = reference(twin, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-5 if weights == "bfloat16" else 0, atol=0)
    rest = np.setdiff1d(np.arange(40), np.arange(0, 18, 3))
    assert not np.isfinite(y[:, 0:18:3]).any() or weights == "bfloat16"
    assert np.isfinite(np.delete(y, [5, 7], axis=0)[:, rest]).all()


@every_isa
def test_bfloat16_of_what_is_too_large() -> None:
    """The largest float32 rounds to infinity, as a weight and as an input."""
    most = np.finfo("float32").max
    twin = linear([[1, 0.5], [most, 0]], weights="bfloat16")
    with np.errstate(all="ignore"):
        assert np.isposinf(twin.parameters["weight"][1, 0])
    y = twin(np.float32([[most, 0], [-most, 0], [1, 1]]))
    np.testing.assert_array_equal(y, [[INF, INF], [-INF, -INF], [1.5, INF]])


@every_isa
@EACH_TYPE
def test_products_do_not_depend_on_threads(weights: str) -> None:
    for size in ((129, 200), (40, 700)):
        weight, bias, x = usual(*size, rows=67)
        twin = linear(weight, bias, weights)
        results = []
        for count in (1, 2, 3):
            with threads(count):
                results.append((twin(x), twin(x[:1]), twin(x[:5])))
        assert_same_bits(results[1], results[0])
        assert_same_bits(results[2], results[0])


@every_isa
def test_a_narrow_array_is_what_it_says() -> None:
    for weights in TYPES:
        weight = usual(9, 20, 0)[0]
        array = linear(weight, weights=weights)._arrays["weight"]
        assert isinstance(array, NarrowArray) and array.type == weights
        assert array.shape == (20, 9) and array.size == 180 and len(array) == 20
        assert array.nbytes == (360 if weights == "bfloat16" else 180 + 80)
        np.testing.assert_array_equal(array[3:7].real(), array.real()[3:7])
        np.testing.assert_array_equal(array.times(2.0).rows([4, 1]), 2 * array.real()[[4, 1]])


def test_every_instruction_set_gives_the_same() -> None:
    """int8 products on all sets; layers where kernels of reals are shared, of bfloat16 where it is multiplied alike."""
    each = {_simd.chosen: digests()}
    for isa in _simd.available:
        if isa != _simd.chosen:
            each[isa] = json.loads(run_python("import twins; twins.print_digests()", FASTSEQ_ISA=isa).stdout)
    assert all(found["products equal the reference"] for found in each.values()), each
    assert len({found["products"] for found in each.values()}) == 1
    for what, shared in (("int8", ["reals"]), ("bfloat16", ["reals", "bfloat16 by"])):
        seen: dict[Any, str] = {}
        for isa, found in each.items():
            assert seen.setdefault(tuple(found[key] for key in shared), found[what]) == found[what], (what, isa)
