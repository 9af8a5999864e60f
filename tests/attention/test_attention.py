"""`fs.attention`, forward and backward: both engines, against PyTorch, finite differences and each other."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import pytest
from common import Array, assert_close, assert_same_bits, inputs, strange, threads, tolerance, unchanged

import fastseq as fs
from fastseq import _attention
from fastseq.reference import _attention as in_numpy
from fastseq.reference import _dense as dense

pytestmark = pytest.mark.every_isa

BOTH = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])

# B, heads, kv_heads, Tq, Tk, D, E
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 3, 5, 5, 4, 4),
    (2, 4, 2, 3, 7, 6, 5),
    (1, 6, 1, 7, 3, 5, 9),
    (3, 2, 2, 1, 17, 8, 16),
    (2, 2, 1, 33, 40, 16, 8),
]
# Larger than any block of keys or queries that a kernel may work on at once.
LARGE = [(1, 2, 1, 70, 300, 64, 64), (2, 2, 2, 131, 131, 24, 40), (1, 4, 2, 3, 517, 32, 32)]


def heads(shape: tuple[int, ...], dtype: Any = "float64", seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """q, k, v and dout."""
    b, h, kv, tq, tk, d, e = shape
    parts = (b, h, tq, d), (b, kv, tk, d), (b, kv, tk, e), (b, h, tq, e)
    q, k, v, dout = (inputs(part, dtype, 10 * seed + i) for i, part in enumerate(parts))
    return q, k, v, dout


def boolean(shape: tuple[int, ...], seed: int = 0, *, share: float = 0.6) -> Array:
    return np.random.default_rng([seed, 20]).random(shape) < share


def additive(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Numbers, and -inf for about one in four."""
    rng = np.random.default_rng([seed, 21])
    return np.where(rng.random(shape) < 0.25, -np.inf, rng.normal(size=shape))


# What may be asked of attention, for sizes B, H, Tq, Tk.
OPTIONS: dict[str, Any] = {
    "plain": lambda b, h, tq, tk: {},
    "causal": lambda b, h, tq, tk: {"causal": True},
    "lengths": lambda b, h, tq, tk: {"lengths": np.random.default_rng(5).integers(0, tk + 1, b)},
    "lengths_causal": lambda b, h, tq, tk: {"lengths": np.full(b, max(1, tk - 2)), "causal": True},
    "mask": lambda b, h, tq, tk: {"mask": boolean((b, h, tq, tk))},
    "mask_of_keys": lambda b, h, tq, tk: {"mask": boolean((b, 1, 1, tk))},
    "mask_of_queries": lambda b, h, tq, tk: {"mask": boolean((tq, 1))},
    "mask_of_heads": lambda b, h, tq, tk: {"mask": boolean((h, tq, tk)), "causal": True},
    "additive": lambda b, h, tq, tk: {"mask": additive((b, h, tq, tk))},
    "additive_shared": lambda b, h, tq, tk: {"mask": additive((tq, tk))},
    "scale": lambda b, h, tq, tk: {"scale": 0.3},
    "window": lambda b, h, tq, tk: {"window": 3},
    "window_causal": lambda b, h, tq, tk: {"window": 2, "causal": True},
    "all": lambda b, h, tq, tk: {
        "mask": additive((b, 1, tq, tk)),
        "causal": True,
        "lengths": np.full(b, tk - tk // 4),
        "scale": -0.4,
        "window": max(1, tk // 2),
    },
}
ASKED = pytest.mark.parametrize("option", OPTIONS)


def options_for(option: str, shape: tuple[int, ...]) -> dict[str, Any]:
    b, h, _, tq, tk, _, _ = shape
    chosen: dict[str, Any] = OPTIONS[option](b, h, tq, tk)
    return chosen


def allowed_by(shape: tuple[int, ...], options: dict[str, Any]) -> Array:
    """Which pairs may attend, asked one by one: (B, H, Tq, Tk)."""
    b, h, _, tq, tk, _, _ = shape
    mask = np.broadcast_to(options.get("mask", True), (b, h, tq, tk))
    allowed = np.zeros((b, h, tq, tk), bool)
    for place in np.ndindex(allowed.shape):
        row, _, i, j = place
        own = i + tk - tq
        allowed[place] = (
            (mask[place] if mask.dtype == bool else mask[place] != -np.inf)
            and (not options.get("causal") or j <= own)
            and ("lengths" not in options or j < options["lengths"][row])
            and (options.get("window") is None or abs(own - j) < options["window"])
        )
    return allowed


def both(module: Any, q: Array, k: Array, v: Array, dout: Array, options: dict[str, Any]) -> dict[str, Array]:
    """All that attention gives, by name."""
    out, weights = module.attention(q, k, v, **options, return_weights=True)
    trained, tape = module.attention_forward(q, k, v, **options)
    if q.dtype != np.longdouble:  # which has bytes that mean nothing
        assert_same_bits(module.attention(q, k, v, **options), out, "with and without weights")
        assert_same_bits(trained, out, "call and forward")
    dq, dk, dv = module.attention_backward(dout, tape)
    return {"out": out, "weights": weights, "dq": dq, "dk": dk, "dv": dv}


def near(actual: Array, expected: Array, relative: float, what: str) -> None:
    """`assert_close`, but of terms about 1 that may cancel: with a single key dq and dk are what is left of them."""
    size = float(np.abs(expected).max(initial=0))
    if size >= 1:
        assert_close(actual, expected, relative, what)
    else:
        assert actual.shape == expected.shape, what
        error = float(np.abs(actual.astype(expected.dtype) - expected).max(initial=0))
        assert error <= relative, f"{what}: off by {error:.3g}, allowed {relative:.3g}"


def pytorch() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, while it starts
        return pytest.importorskip("torch", reason="PyTorch is not installed: take the extra 'peers'")


# Against PyTorch and finite differences


@BOTH
@DTYPES
@ASKED
def test_pytorch(option: str, dtype: str, module: Any) -> None:
    torch = pytorch()
    for seed, shape in enumerate(SHAPES):
        q, k, v, dout = heads(shape, dtype, seed)
        options = options_for(option, shape)
        allowed = allowed_by(shape, options)
        result = both(module, q, k, v, dout, options)

        # PyTorch gives NaN for a row without keys: there it may attend to all, and its result counts for nothing.
        lonely = ~allowed.any(axis=3)
        bias = np.where(allowed | lonely[..., None], 0.0, -np.inf)
        mask = options.get("mask")
        if mask is not None and mask.dtype != bool:
            bias = bias + np.where(mask == -np.inf, 0, mask)
        tensors = [torch.tensor(array.astype("float64"), requires_grad=True) for array in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(
            *tensors, attn_mask=torch.tensor(bias), scale=options.get("scale"), enable_gqa=True
        )
        out.backward(torch.tensor(np.where(lonely[..., None], 0, dout.astype("float64"))))
        expected = {"out": np.where(lonely[..., None], 0, out.detach().numpy())}
        expected |= {name: tensor.grad.numpy() for name, tensor in zip(("dq", "dk", "dv"), tensors, strict=True)}

        relative = tolerance(dtype, shape[5], shape[4])
        for name, array in expected.items():
            assert result[name].dtype == dtype
            near(result[name], array, 4 * relative, f"{shape} {name}")
        assert not result["out"][lonely].any() and not result["dq"][lonely].any()


@BOTH
@ASKED
def test_finite_differences(option: str, module: Any) -> None:
    shape = (2, 4, 2, 3, 4, 3, 2)
    q, k, v, dout = heads(shape)
    options = options_for(option, shape)
    result = both(module, q, k, v, dout, options)
    arrays = {"q": q, "k": k, "v": v}
    for name, array in arrays.items():
        expected = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            losses = []
            for step in (1e-5, -1e-5):
                moved = array.copy()
                moved[place] += step
                losses.append((module.attention(**{**arrays, name: moved}, **options) * dout).sum())
            expected[place] = (losses[0] - losses[1]) / 2e-5
        assert_close(result[f"d{name}"], expected, 1e-7 + 1e-8 / max(1e-8, np.abs(expected).max()), name)


# What the contract says


@BOTH
@ASKED
def test_weights(option: str, module: Any) -> None:
    for shape in SHAPES:
        q, k, v, dout = heads(shape)
        options = options_for(option, shape)
        allowed = allowed_by(shape, options)
        result = both(module, q, k, v, dout, options)
        weights = result["weights"]
        assert weights.shape == allowed.shape and not weights[~allowed].any()
        np.testing.assert_allclose(weights.sum(axis=3), allowed.any(axis=3), rtol=1e-12)
        assert (weights[allowed] > 0).all()
        values = np.repeat(v, shape[1] // shape[2], axis=1)
        assert_close(result["out"], weights @ values, 1e-13)


@BOTH
@DTYPES
def test_a_row_that_may_attend_to_nothing(dtype: str, module: Any) -> None:
    q, k, v, dout = heads((2, 2, 2, 4, 5, 3, 3), dtype)
    mask = np.ones((2, 2, 4, 5), bool)
    mask[1, 0, 2] = False
    minus = np.where(mask, 0.0, -np.inf)
    for options in ({"mask": mask}, {"mask": minus}):
        result = both(module, q, k, v, dout, options)
        for name in ("out", "weights", "dq"):
            assert_same_bits(result[name][1, 0, 2], np.zeros_like(result[name][1, 0, 2]), name)
            assert result[name][1, 0, 1].any() and result[name][1, 1, 2].any()
    for options in ({"lengths": [0, 5]}, {"mask": np.zeros((2, 1, 1, 1), bool)}, {"mask": np.array(-np.inf)}):
        result = both(module, q, k, v, dout, options)
        for array in result.values():
            assert_same_bits(array[0], np.zeros_like(array[0]))
    # More queries than keys: the first ones stand before every key.
    result = both(module, *heads((1, 1, 1, 5, 2, 3, 3), dtype), {"causal": True})
    assert not result["out"][0, 0, :3].any() and result["out"][0, 0, 3:].all()
    # All scores are -inf by themselves.
    far = np.full((1, 1, 1, 3), np.finfo(dtype).max, dtype)
    result = both(module, far, -np.tile(far, (1, 1, 2, 1)), *heads((1, 1, 1, 1, 2, 3, 3), dtype)[2:], {})
    assert not any(array.any() for array in result.values())


@BOTH
@DTYPES
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(2, 4, 2, 5, 9, 4, 3), (2, 2, 1, 40, 150, 8, 8)])
def test_what_is_forbidden_leaks_nowhere(shape: Any, value: float, dtype: str, module: Any) -> None:
    q, k, v, dout = heads(shape, dtype)
    mask = np.ones((shape[3], shape[4]), bool)
    mask[:, 1] = False
    mask[3] = False  # a query that may attend to nothing
    lengths = np.array([shape[4] - 3, 4])
    for options in ({"mask": mask, "lengths": lengths}, {"mask": np.where(mask, 0.5, -np.inf), "lengths": lengths}):
        clean = both(module, q, k, v, dout, options)
        dirty_q, dirty_k, dirty_v, dirty_dout = (array.copy() for array in (q, k, v, dout))
        dirty_q[:, :, 3] = value
        dirty_dout[:, :, 3] = value
        for array in (dirty_k, dirty_v):
            array[:, :, 1] = value
            array[0, :, lengths[0] :] = value
            array[1, :, lengths[1] :] = value
        dirty = both(module, dirty_q, dirty_k, dirty_v, dirty_dout, options)
        for name, array in clean.items():
            assert_same_bits(dirty[name], array, name)
            assert array.any()
        for name in ("dk", "dv"):
            assert_same_bits(clean[name][1, :, 4:], np.zeros_like(clean[name][1, :, 4:]), name)


@BOTH
@DTYPES
@pytest.mark.parametrize("causal", [False, True])
def test_nan_in_a_place_that_is_allowed(dtype: str, module: Any, causal: bool) -> None:
    """It goes where it should, and no further: the softmax of a row has one sum."""
    q, k, v, dout = heads((1, 2, 1, 6, 6, 3, 3), dtype)
    k[0, 0, 2, 1] = np.nan
    out = module.attention(q, k, v, causal=causal)
    reached = np.arange(6) >= (2 if causal else 0)
    assert np.isnan(out[:, :, reached]).all() and np.isfinite(out[:, :, ~reached]).all()
    q, k, v, dout = heads((1, 2, 1, 6, 6, 3, 3), dtype)
    dout[0, 1, 4, 0] = np.nan
    result = both(module, q, k, v, dout, {"causal": causal})
    assert np.isnan(result["dq"][0, 1, 4]).all()
    assert np.isfinite(result["dq"][0, 0]).all() and np.isfinite(result["dq"][0, 1, [0, 1, 2, 3, 5]]).all()
    assert np.isnan(result["dv"][0, 0, :5, 0]).all() and np.isfinite(result["dv"][0, 0, :, 1:]).all()


@BOTH
@DTYPES
@pytest.mark.parametrize("size", [80.0, 1e4, 1e30])
def test_scores_of_any_size(size: float, dtype: str, module: Any) -> None:
    """The true maximum is subtracted, whatever it is."""
    q, k, v, dout = heads((1, 1, 1, 4, 70, 1, 3), dtype)
    q[...] = 1
    for sign in (1, -1):
        k[0, 0, :, 0] = sign * size
        result = both(module, q, k, v, dout, {"scale": 1.0})
        assert_close(result["out"], np.broadcast_to(v.mean(axis=2, keepdims=True), (1, 1, 4, 3)), 1e-5)
        for winner in (0, 33, 69):
            k[0, 0, :, 0] = -size
            k[0, 0, winner, 0] = sign * size if sign > 0 else -size / 2
            result = both(module, q, k, v, dout, {"scale": 1.0})
            assert_close(result["out"], np.broadcast_to(v[:, :, winner : winner + 1], (1, 1, 4, 3)), 1e-6)
            assert all(np.isfinite(array).all() for array in result.values())
        # The same from a mask: a number that is finite forbids nothing.
        even = both(module, q, np.zeros_like(k), v, dout, {"mask": np.full((4, 70), -size)})
        assert_close(even["out"], np.broadcast_to(v.mean(axis=2, keepdims=True), (1, 1, 4, 3)), 1e-5)
        mask = np.full((4, 70), -size)
        mask[:, 33], mask[:, 5] = sign * size if sign > 0 else -size / 2, -np.inf
        result = both(module, q, np.zeros_like(k), v, dout, {"mask": mask})
        assert_close(result["out"], np.broadcast_to(v[:, :, 33:34], (1, 1, 4, 3)), 1e-6)


@BOTH
def test_the_polarity_of_a_mask(module: Any) -> None:
    """True = may attend. PyTorch's layers have it the other way round; an inverted mask gives the complement."""
    q, k, v, _ = heads((1, 1, 1, 1, 4, 3, 2))
    mask = np.array([True, False, True, False])
    _, weights = module.attention(q, k, v, mask=mask, return_weights=True)
    _, inverted = module.attention(q, k, v, mask=~mask, return_weights=True)
    assert ((weights > 0) == mask).all() and ((inverted > 0) == ~mask).all()
    for verb in (module.attention, module.MultiheadAttention.__call__, module.TransformerEncoder.__call__):
        text = inspect.getdoc(verb)
        described = text[text.index("\nmask : ") :].split("\n")[2]
        assert described.strip().startswith("Booleans: True = may attend.")


@BOTH
def test_a_cached_prefix_needs_no_mask(module: Any) -> None:
    q, k, v, _ = heads((2, 2, 1, 9, 9, 4, 4))
    whole = module.attention(q, k, v, causal=True)
    for window in (None, 3):
        whole = module.attention(q, k, v, causal=True, window=window)
        assert_close(module.attention(q[:, :, -2:], k, v, causal=True, window=window), whole[:, :, -2:], 1e-14)


def test_a_cached_prefix_gives_the_same_bits() -> None:
    q, k, v, _ = heads((2, 4, 2, 150, 150, 16, 16), "float32")
    whole = fs.attention(q, k, v, causal=True)
    for i in (0, 1, 31, 64, 149):
        alone = fs.attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], causal=True)
        assert_same_bits(alone, whole[:, :, i : i + 1], f"query {i}")


# The compiled operations against the reference


def wide(array: Any, dtype: str) -> Any:
    return array.astype("float64" if dtype == "float32" else np.longdouble) if array.dtype.kind == "f" else array


@DTYPES
@ASKED
def test_parity(option: str, dtype: str) -> None:
    for seed, shape in enumerate([*SHAPES, *LARGE] if dtype == "float32" else [*SHAPES, LARGE[1]]):
        arrays = heads(shape, dtype, seed)
        options = options_for(option, shape)
        mask = options.get("mask")
        if mask is not None and mask.dtype.kind == "f":
            options["mask"] = mask.astype(dtype)
        result = both(fs, *arrays, options)
        exact = {**options, **({"mask": wide(options["mask"], dtype)} if "mask" in options else {})}
        expected = both(fs.reference, *(wide(array, dtype) for array in arrays), exact)
        relative = tolerance(dtype, shape[5], shape[4])
        for name, array in result.items():
            assert array.dtype == dtype
            if name in ("out", "weights"):
                assert_close(array, expected[name], relative, f"{shape} {name}")
            else:
                near(array, expected[name], 4 * relative, f"{shape} {name}")


def ragged(dense_heads: Array, lengths: Array) -> Array:
    """The real rows of (B, H, T, D), one sequence after another: (N, H, D)."""
    return np.concatenate([own[:, :n].swapaxes(0, 1) for own, n in zip(dense_heads, lengths, strict=True)])


@pytest.mark.parametrize("operations", [_attention, in_numpy], ids=["compiled", "reference"])
@DTYPES
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "additive", "window"])
def test_sequences_one_after_another(kind: str, dropout: float, dtype: str, operations: Any) -> None:
    """The ragged form against each sequence alone, with other lengths of queries and keys."""
    q, k, v, dout = heads((4, 4, 2, 6, 9, 4, 3), dtype)
    tq, tk = np.array([6, 0, 2, 5]), np.array([3, 4, 0, 9])
    starts = tuple(np.concatenate([[0], np.cumsum(n)]) for n in (tq, tk))
    mask = {"mask": boolean((4, 1, 6, 9)), "additive": additive((1, 4, 6, 9)).astype(dtype)}.get(kind)
    settings = (kind == "causal", 3 if kind == "window" else None, 0.5)
    parts = ragged(q, tq), ragged(k, tk), ragged(v, tk)
    out, kept = operations.attention_forward(*parts, starts, None, mask, *settings, dropout, 3, 2)
    gradients = operations.attention_backward(kept, ragged(dout, tq), 2)
    factors = np.ones((4, 4, 6, 9), dtype)
    factors = dense.dropout(factors, dropout, 3, 0, 1) if dropout else factors
    called, weights = operations.attention(*parts, starts, None, mask, *settings, True, 2)
    if not dropout:
        assert_same_bits(called, out)
    assert weights.shape == (4, 4, 6, 9)
    for b in range(4):
        n, m = tq[b], tk[b]
        own = [a[b : b + 1] for a in (q[:, :, :n], k[:, :, :m], v[:, :, :m], dout[:, :, :n])]
        part = None
        if mask is not None:
            part = (mask[b : b + 1] if len(mask) > 1 else mask)[:, :, :n, :m]
        # Alone and dense, from the weights by hand: (P M) V.
        alone, alone_weights = fs.reference.attention(
            *own[:3], mask=part, causal=settings[0], window=settings[1], scale=0.5, return_weights=True
        )
        assert_close(weights[b, :, :n, :m], alone_weights[0], 1e-5 if dtype == "float32" else 1e-13, "weights")
        assert not weights[b, :, n:].any() and not weights[b, :, :, m:].any()
        product = (alone_weights[0] * factors[b, :, :n, :m]) @ np.repeat(own[2][0], 2, axis=0)
        got = out[starts[0][b] : starts[0][b + 1]].swapaxes(0, 1)
        assert_close(got, product, 1e-5 if dtype == "float32" else 1e-13, f"sequence {b}")
        if not dropout:
            assert_close(got, alone[0], 1e-5 if dtype == "float32" else 1e-13)
            _, tape = fs.reference.attention_forward(
                *own[:3], mask=part, causal=settings[0], window=settings[1], scale=0.5
            )
            for gradient, expected, s in zip(
                gradients, fs.reference.attention_backward(own[3], tape), (0, 1, 1), strict=True
            ):
                ends = slice(starts[s][b], starts[s][b + 1])
                assert_close(gradient[ends].swapaxes(0, 1), expected[0], 1e-4 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("operations", [_attention, in_numpy], ids=["compiled", "reference"])
@DTYPES
def test_dropout(dtype: str, operations: Any) -> None:
    """Weights are dropped as `dense.dropout` drops the elements of (B, H, Tq, Tk), forward and backward."""
    shape = (2, 4, 2, 5, 7, 4, 3)
    q, k, v, dout = heads(shape, dtype)
    out, kept = operations.attention_forward(q, k, v, None, None, None, False, None, 0.5, 0.3, 11, 2)
    dq, dk, dv = operations.attention_backward(kept, dout, 2)
    _, weights = fs.reference.attention(q, k, v, scale=0.5, return_weights=True)
    factors = dense.dropout(np.ones((2, 4, 5, 7), dtype), 0.3, 11, 0, 1)
    assert 0.1 < (factors == 0).mean() < 0.5
    values, keys = np.repeat(v, 2, axis=1), np.repeat(k, 2, axis=1)
    relative = 1e-5 if dtype == "float32" else 1e-13
    assert_close(out, (weights * factors) @ values, relative)
    dweights = (dout @ values.swapaxes(2, 3)) * factors
    dscores = weights * (dweights - (dweights * weights).sum(axis=3, keepdims=True)) * dweights.dtype.type(0.5)
    assert_close(dq, dscores @ keys, relative)
    assert_close(dk, (dscores.swapaxes(2, 3) @ q).reshape(2, 2, 2, 7, 4).sum(axis=2), relative)
    assert_close(dv, ((weights * factors).swapaxes(2, 3) @ dout).reshape(2, 2, 2, 7, 3).sum(axis=2), relative)


# The same bits


@DTYPES
@pytest.mark.parametrize("shape", [(2, 2, 1, 70, 200, 16, 16), (1, 1, 1, 300, 300, 8, 8), (7, 4, 4, 5, 5, 3, 3)])
def test_threads(shape: Any, dtype: str) -> None:
    arrays = heads(shape, dtype)
    for option in ("plain", "causal", "lengths", "additive", "window_causal"):
        results = []
        for n_threads in (1, 2, 3):
            with threads(n_threads):
                results.append(both(fs, *arrays, options_for(option, shape)))
        for other in results[1:]:
            for name, array in results[0].items():
                assert_same_bits(other[name], array, f"{option} {name}")


@DTYPES
def test_a_row_alone_and_in_a_batch(dtype: str) -> None:
    shape = (5, 4, 2, 40, 90, 8, 8)
    q, k, v, dout = heads(shape, dtype)
    lengths = np.array([90, 1, 0, 37, 64])
    for more in ({}, {"causal": True}, {"mask": additive((5, 4, 40, 90)).astype(dtype)}):
        whole = both(fs, q, k, v, dout, {"lengths": lengths, **more})
        for b in range(5):
            row = slice(b, b + 1)
            own = {name: value[row] if name == "mask" else value for name, value in more.items()}
            alone = both(fs, q[row], k[row], v[row], dout[row], {"lengths": lengths[row], **own})
            for name, array in alone.items():
                assert_same_bits(array, whole[name][row], f"row {b} {name}")


@DTYPES
def test_padding(dtype: str) -> None:
    """Keys past the lengths change nothing, however many there are."""
    q, k, v, dout = heads((3, 2, 2, 9, 200, 8, 8), dtype)
    lengths = np.array([70, 3, 0])
    whole = both(fs, q, k, v, dout, {"lengths": lengths})
    for tk in (70, 71, 128):
        short = both(fs, q, k[:, :, :tk], v[:, :, :tk], dout, {"lengths": lengths})
        for name, array in short.items():
            full = whole[name]
            if name == "weights":
                full = full[..., :tk]
            assert_same_bits(array, full[:, :, :tk] if name in ("dk", "dv") else full, f"{tk} {name}")


# Arrays


@BOTH
def test_strange_arrays(module: Any) -> None:
    shape = (2, 4, 2, 5, 6, 3, 4)
    arrays = heads(shape, "float32")
    mask = additive((2, 4, 5, 6)).astype("float32")
    expected = both(module, *arrays, {"mask": mask})
    forms = [strange(array) for array in (*arrays, mask)]
    for form in forms[0]:
        own = [of[form] for of in forms]
        before = [array.tobytes() for array in own]
        result = both(module, *own[:4], {"mask": own[4]})
        unchanged(own, before)
        for name, array in expected.items():
            assert type(result[name]) is np.ndarray
            assert_same_bits(result[name], array, f"{form} {name}")
    boolean_mask = boolean((2, 4, 5, 6))
    expected = both(module, *arrays, {"mask": boolean_mask})
    for other in (
        np.asfortranarray(boolean_mask),
        np.repeat(boolean_mask, 2, axis=3)[..., ::2],
        boolean_mask[..., ::-1].copy()[..., ::-1],
        boolean_mask.tolist(),
    ):
        for name, array in both(module, *arrays, {"mask": other}).items():
            assert_same_bits(array, expected[name], name)
    # Heads side by side in a row, as projections give them.
    side = [np.ascontiguousarray(array.swapaxes(1, 2)).swapaxes(1, 2) for array in arrays]
    joined = np.concatenate([a.swapaxes(1, 2).reshape(2, -1, a.shape[1] * 3) for a in (arrays[1], arrays[1])], axis=2)
    k = joined[:, :, 6:].reshape(2, 6, 2, 3).swapaxes(1, 2)
    result = both(module, side[0], k, side[2], side[3], {"mask": boolean_mask})
    for name, array in expected.items():
        assert_same_bits(result[name], array, name)
    # One array broadcast.
    one = np.broadcast_to(arrays[0][:1, :1], arrays[0].shape)
    assert_same_bits(module.attention(one, *arrays[1:3]), module.attention(one.copy(), *arrays[1:3]))


@BOTH
@DTYPES
def test_nothing_to_do(dtype: str, module: Any) -> None:
    for shape in ((0, 2, 1, 3, 4, 5, 5), (2, 2, 2, 0, 4, 5, 6), (2, 2, 1, 3, 0, 5, 6), (0, 1, 1, 0, 0, 1, 1)):
        b, h, kv, tq, tk, d, e = shape
        for option in ("plain", "causal", "window", "lengths", "mask"):
            result = both(module, *heads(shape, dtype), options_for(option, shape))
            assert result["out"].shape == (b, h, tq, e) and result["weights"].shape == (b, h, tq, tk)
            assert result["dq"].shape == (b, h, tq, d) and result["dk"].shape == (b, kv, tk, d)
            assert all(array.dtype == dtype and not array.any() for array in result.values())


@BOTH
def test_other_real_dtypes_are_converted(module: Any) -> None:
    q, k, v, _ = heads((1, 2, 2, 3, 4, 2, 2), "float32")
    expected = module.attention(q, k, v)
    for dtype in ("float16", "float64", "longdouble"):
        assert_same_bits(
            module.attention(q, k.astype(dtype).astype("float32"), v), module.attention(q, k.astype(dtype), v)
        )
    assert module.attention(q, k.astype("float64"), v.astype("float64")).dtype == "float32"
    assert_same_bits(module.attention(q, k.astype("float64"), v.astype("float64")), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "longdouble"])
def test_the_reference_takes_any_floating_dtype(dtype: str) -> None:
    result = both(fs.reference, *heads((1, 2, 1, 3, 4, 2, 2), dtype), {"causal": True})
    assert all(array.dtype == dtype for array in result.values())


@BOTH
def test_tapes(module: Any) -> None:
    arrays = heads((1, 2, 1, 3, 4, 2, 2))
    _, tape = module.attention_forward(*arrays[:3])
    first, second = (module.attention_backward(arrays[3], tape) for _ in range(2))
    assert_same_bits(second, first)
    assert "(1, 2, 3, 2)" in repr(tape)
    other = fs.reference if module is fs else fs
    with pytest.raises(ValueError, match="tape should be"):
        other.attention_backward(arrays[3], tape)
    for bad in (None, 3, first):
        with pytest.raises(TypeError, match="tape should be"):
            module.attention_backward(arrays[3], bad)
    for bad in (arrays[3][:, :1], arrays[3][0], arrays[3][..., :1]):
        with pytest.raises(ValueError, match=r"dout should be of shape \(1, 2, 3, 2\)"):
            module.attention_backward(bad, tape)
    with pytest.raises(TypeError, match="dout should hold real"):
        module.attention_backward(arrays[3].astype(int), tape)


# Bad input


@BOTH
def test_bad_arrays(module: Any) -> None:
    shape = (2, 4, 2, 3, 5, 6, 7)
    q, k, v, _ = heads(shape)
    for verb in (module.attention, module.attention_forward):
        for place, name in enumerate("qkv"):
            for bad in (q.astype(int), q.astype(complex), q > 0, q.astype(object), "q", None, [["x"]]):
                arrays = [q, k, v]
                arrays[place] = bad
                with pytest.raises(TypeError, match=rf"\b{name} should"):
                    verb(*arrays)
            for bad in (np.zeros(3), np.zeros((2, 3, 4)), np.zeros((2, 2, 3, 0)), np.zeros((2, 0, 3, 6)), np.zeros(())):
                arrays = [q, k, v]
                arrays[place] = bad
                with pytest.raises(ValueError, match=rf"\b{name} should"):
                    verb(*arrays)
        for bad in (k[:1], k[..., :5], k[:, [0, 1, 0]]):
            with pytest.raises(ValueError, match=r"\bk should"):
                verb(q, bad, v[:, [0, 1, 0]] if bad.shape[1] == 3 else v)
        for bad in (v[:1], v[:, :1], v[:, :, :4]):
            with pytest.raises(ValueError, match=r"\bv should be of shape \(2, 2, 5, E\)"):
                verb(q, k, bad)


@BOTH
def test_bad_options(module: Any) -> None:
    q, k, v, _ = heads((2, 4, 2, 3, 5, 6, 7))
    for verb in (module.attention, module.attention_forward):
        for bad in (np.ones((3, 5), int), np.ones((3, 5), complex), np.ones((3, 5), object), "mask", [["a"]]):
            with pytest.raises(TypeError, match=r"mask should hold booleans, True where"):
                verb(q, k, v, mask=bad)
        for bad in ((5, 3), (3, 4), (3, 3, 5), (1, 2, 4, 3, 5), (0, 1, 3, 5), (2, 2, 3, 5), (0,)):
            with pytest.raises(ValueError, match=r"mask should be of a shape that broadcasts to \(2, 4, 3, 5\), not"):
                verb(q, k, v, mask=np.ones(bad, bool))
        for bad in (1, 0, "causal", None, np.array([True])):
            with pytest.raises(TypeError, match="causal should be True or False"):
                verb(q, k, v, causal=bad)
        for bad in ([5], [5, 5, 5], [[5, 5]], 5, [5, 6], [-1, 5]):
            with pytest.raises(ValueError, match="lengths should be"):
                verb(q, k, v, lengths=bad)
        for bad in ([True, False], [1.0, 2.0], ["a", "b"], "ab"):
            with pytest.raises(TypeError, match="lengths should hold integers"):
                verb(q, k, v, lengths=bad)
        for bad in ("1", [1], True, 1j):
            with pytest.raises(TypeError, match="scale should be a number"):
                verb(q, k, v, scale=bad)
        for bad in (np.nan, np.inf, 10**400):
            with pytest.raises(ValueError, match="scale should be finite"):
                verb(q, k, v, scale=bad)
        for bad in (0, -1):
            with pytest.raises(ValueError, match="window should be at least 1"):
                verb(q, k, v, window=bad)
        for bad in (1.0, True, "1"):
            with pytest.raises(TypeError, match="window should be an integer"):
                verb(q, k, v, window=bad)
        with pytest.raises(OverflowError, match="window"):
            verb(q, k, v, window=2**70)
        assert verb(q, k, v, window=2**62, causal=True)[0].shape
    with pytest.raises(TypeError, match="return_weights should be True or False"):
        module.attention(q, k, v, return_weights=1)
    if module is fs:
        with pytest.raises(TypeError, match="q should be float32 or float64, not float16"):
            fs.attention(q.astype("float16"), k, v)


def test_the_six_steps_can_be_read() -> None:
    """The notes walk through attention in six steps; they stand in the reference under their names, in order."""
    source = inspect.getsource(in_numpy.attend)
    lines = [line.strip() for line in source.splitlines() if " = " in line and '"""' not in line]
    starts = ("queries, keys, values = ", "scores = ", "scaled = ", "weights, ", "weighted = ", "out = ")
    steps = [line for line in lines if line.startswith(starts)]
    assert len(steps) == 6 and all(line.startswith(start) for line, start in zip(steps, starts, strict=True))
