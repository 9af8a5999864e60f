"""ReLU, GELU, SiLU, tanh, sigmoid, softmax, RMSNorm and positions: both engines, forward and backward."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import Array, assert_close, assert_same_bits, inputs, strange, threads, tolerance

import fastseq as fs
from fastseq import _attention
from fastseq.reference import _attention as in_numpy

pytestmark = pytest.mark.every_isa

BOTH = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])

# Every kind of layer: its class, its arguments for a width, its options.
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "relu": ("ReLU", lambda width: (), {}),
    "gelu": ("GELU", lambda width: (), {}),
    "gelu_tanh": ("GELU", lambda width: ("tanh",), {}),
    "silu": ("SiLU", lambda width: (), {}),
    "tanh": ("Tanh", lambda width: (), {}),
    "sigmoid": ("Sigmoid", lambda width: (), {}),
    "softmax": ("Softmax", lambda width: (), {}),
    "rms": ("RMSNorm", lambda width: (width,), {}),
    "rms_axes": ("RMSNorm", lambda width: ((1, width),), {"eps": 0.3}),
    "rms_plain": ("RMSNorm", lambda width: (width,), {"elementwise_affine": False}),
    "sinusoidal": ("SinusoidalPositions", lambda width: (width,), {"base": 50.0}),
    "learned": ("LearnedPositions", lambda width: (150, width), {}),
    "rotary": ("RotaryPositions", lambda width: (2 * (width // 2),), {"base": 30.0}),
    "rotary_part": ("RotaryPositions", lambda width: (2,), {}),
    "rotary_interleaved": ("RotaryPositions", lambda width: (2 * (width // 2),), {"interleaved": True}),
}
LAYERS = pytest.mark.parametrize("case", CASES)
POSITIONS = ["sinusoidal", "learned", "rotary", "rotary_part", "rotary_interleaved"]


def build(case: str, width: int = 5, *, dtype: Any = "float32", module: Any = fs) -> Any:
    """A layer whose parameters are all random and distinct."""
    name, arguments, options = CASES[case]
    layer = getattr(module, name)(*arguments(width), **options, dtype=dtype)
    rng = np.random.default_rng([width, 50])
    layer.load_state_dict({n: rng.normal(size=old.shape) for n, old in layer.parameters.items()})
    return layer


def twin(layer: Any) -> Any:
    """The same layer over NumPy, in a wider dtype."""
    wide = "float64" if layer.dtype == np.float32 else np.longdouble
    other = getattr(fs.reference, type(layer).__name__)(**{**layer._config, "dtype": wide})
    other.load_state_dict(layer.state_dict())
    return other


def given(case: str, *lead: int, width: int = 5, dtype: Any = "float32", seed: int = 0) -> Array:
    x = inputs((*lead, width), dtype, seed)
    return x[..., None, :] if case == "rms_axes" else x


def gradient(y: Array, seed: int = 0) -> Array:
    return np.random.default_rng([seed, 51]).normal(size=y.shape).astype(y.dtype)


def train(layer: Any, x: Array, dy: Array | None = None, **options: Any) -> dict[str, Array]:
    """y, dx and the gradients of all parameters."""
    y, tape = layer.forward(x, seed=1, **options)
    grads = {name: np.zeros_like(array) for name, array in layer.parameters.items()}
    dx = layer.backward(gradient(y) if dy is None else dy, tape, grads=grads)
    return {"y": np.array(y), "x": dx, **grads}


def pytorch() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, while it starts
        return pytest.importorskip("torch", reason="PyTorch is not installed: take the extra 'peers'")


@BOTH
@pytest.mark.parametrize("case", [case for case in CASES if case not in POSITIONS])
def test_pytorch(case: str, module: Any) -> None:
    torch = pytorch()
    layer = build(case, 7, dtype="float64", module=module)
    nn = torch.nn
    theirs = {
        "relu": nn.ReLU,
        "gelu": nn.GELU,
        "gelu_tanh": lambda: nn.GELU("tanh"),
        "silu": nn.SiLU,
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
        "softmax": lambda: nn.Softmax(-1),
        "rms": lambda: nn.RMSNorm(7, eps=1e-5, dtype=torch.float64),
        "rms_axes": lambda: nn.RMSNorm((1, 7), eps=0.3, dtype=torch.float64),
        "rms_plain": lambda: nn.RMSNorm(7, eps=1e-5, elementwise_affine=False),
    }[case]()
    theirs.load_state_dict({n: torch.tensor(a) for n, a in layer.state_dict().items()})
    x = 3 * given(case, 4, 6, width=7, dtype="float64")
    result = train(layer, x)
    tensor = torch.tensor(x, requires_grad=True)
    out = theirs(tensor)
    out.backward(torch.tensor(gradient(result["y"])))
    assert_close(result["y"], out.detach().numpy(), 1e-13)
    assert_close(result["x"], tensor.grad.numpy(), 1e-12)
    for n, parameter in theirs.named_parameters():
        assert_close(result[n], parameter.grad.numpy(), 1e-12, n)


@BOTH
@LAYERS
def test_finite_differences(case: str, module: Any) -> None:
    layer = build(case, 4, dtype="float64", module=module)
    x = given(case, 2, 3, width=4, dtype="float64")
    result, state = train(layer, x), layer.state_dict()
    dy = gradient(result["y"])
    for name, array in {**state, "x": x}.items():
        expected = np.zeros_like(array)
        places = [(i, j) for i in range(5) for j in range(4)] if case == "learned" and name != "x" else None
        for place in places or np.ndindex(array.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = array.copy()
                moved[place] += step
                layer.load_state_dict(state if name == "x" else {**state, name: moved})
                ends.append((layer(moved if name == "x" else x) * dy).sum())
            expected[place] = (ends[0] - ends[1]) / 2e-5
        assert_close(result[name], expected, 1e-6, name)


# The compiled operations against the reference


@DTYPES
@LAYERS
def test_parity(case: str, dtype: str) -> None:
    for width in (2, 3, 4, 8, 15, 16, 17, 33, 64, 67, 130):
        layer = build(case, width, dtype=dtype)
        exact = twin(layer)
        for lead in ((7,), (2, 3), (1, 1)):
            if case in POSITIONS and len(lead) == 1:
                lead = (2, *lead)
            x = 2 * given(case, *lead, width=width, dtype=dtype)
            result, expected = train(layer, x), train(exact, x.astype(exact.dtype))
            assert_same_bits(layer(x), result["y"])
            for name, array in result.items():
                size = float(np.abs(expected[name]).max())
                bound = (1 if name == "y" else 4) * tolerance(dtype, width, 1) * max(1.0, 1 / max(size, 1e-30))
                assert array.dtype == dtype
                assert_close(array, expected[name], bound, f"{width} {lead} {name}")


def exactly(x: float, kind: str) -> float:
    """GELU of a float64 as exact as Python makes it."""
    if kind == "gelu":
        return 0.5 * x * math.erfc(-x / math.sqrt(2))
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x / (1 + math.exp(-2 * u)) if u > -340 else 0.0


@BOTH
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh"])
def test_gelu_of_numbers_of_any_size(kind: str, module: Any) -> None:
    """Within 2 ulp of the larger of the result and 2^-24 of x; a result that is not normal may become 0."""
    layer = build(kind, module=module)
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            rng.normal(size=4000) * 4,
            np.linspace(-14, 14, 4001),
            rng.normal(size=500) * 1e-3,
            2.0 ** rng.uniform(-120, 120, 500) * rng.choice([-1, 1], 500),
            [0.0, -0.0, 3e38, -3e38, 1e-44],
        ]
    ).astype("float32")
    y = layer(x)
    expected = np.array([exactly(value, kind) for value in x.astype("float64")])
    scale = np.maximum(np.abs(expected), 2.0**-24 * np.abs(x.astype("float64")))
    ulp = np.spacing(scale.astype("float32")).astype("float64")
    error = np.abs(y.astype("float64") - expected)
    normal = np.abs(expected) >= np.finfo("float32").tiny
    assert normal.sum() > 8000 and (error[normal] / ulp[normal]).max() <= 2
    assert (error[~normal] <= np.maximum(2 * ulp[~normal], np.finfo("float32").tiny)).all()
    dx = train(layer, x, np.ones_like(x))["x"]
    assert np.isfinite(dx).all()
    assert (dx[x > 20] == 1).all() and not dx[x < -20].any()


def exact_to_its_slope(kind: str, x: Array) -> tuple[Array, Array]:
    """What makes y and dx of float64, both exact where they are small."""
    with np.errstate(over="ignore"):
        s, rest = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(x))
        if kind == "tanh":
            return np.tanh(x), 1 / np.cosh(x) ** 2
        return (s, s * rest) if kind == "sigmoid" else (x * s, s + x * s * rest)


@BOTH
@pytest.mark.parametrize("kind", ["tanh", "sigmoid", "silu"])
def test_smooth_activations_of_numbers_of_any_size(kind: str, module: Any) -> None:
    """Within 3 ulp, the slopes within 6 or, where a SiLU's turns, 6 of 1: far from 0, too, where 1 - y^2 would be 0."""
    layer = build(kind, module=module)
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            rng.normal(size=4000) * 4,
            np.linspace(-40, 40, 4001),
            rng.normal(size=500) * 1e-3,
            2.0 ** rng.uniform(-120, 120, 500) * rng.choice([-1, 1], 500),
            [0.0, -0.0, 3e38, -3e38, 1e-44],
        ]
    ).astype("float32")
    result = train(layer, x, np.ones_like(x))
    assert_same_bits(layer(x), result["y"])
    turns = 1.0 if kind == "silu" else 0.0
    bounds = (("y", 3, 0.0), ("x", 6, turns))
    for (name, most, least), truth in zip(bounds, exact_to_its_slope(kind, x.astype("float64")), strict=True):
        ulp = np.spacing(np.maximum(np.abs(truth), least).astype("float32")).astype("float64")
        error = np.abs(result[name].astype("float64") - truth)
        normal = np.abs(truth) >= np.finfo("float32").tiny
        assert normal.sum() > 5000 and (error[normal] / ulp[normal]).max() <= most
        assert (error[~normal] <= np.maximum(2 * ulp[~normal], np.finfo("float32").tiny)).all()


@BOTH
@DTYPES
def test_smooth_activations_at_the_ends(dtype: str, module: Any) -> None:
    x = np.array([np.inf, -np.inf, np.nan], dtype)
    for kind, y, dx in (
        ("tanh", [1, -1, np.nan], [0, 0, np.nan]),
        ("sigmoid", [1, 0, np.nan], [0, 0, np.nan]),
        ("silu", [np.inf, np.nan, np.nan], [1, 0, np.nan]),
    ):
        with np.errstate(invalid="ignore"):
            result = train(build(kind, dtype=dtype, module=module), x, np.ones_like(x))
        np.testing.assert_array_equal(result["y"], y, kind)
        np.testing.assert_array_equal(result["x"], dx, kind)


@BOTH
@DTYPES
def test_relu_at_and_about_zero(dtype: str, module: Any) -> None:
    x = np.array([-1, -0.0, 0, 1e-30, 2, np.inf, -np.inf], dtype)
    layer = module.ReLU(dtype=dtype)
    result = train(layer, x, np.arange(1, 8).astype(dtype))
    np.testing.assert_array_equal(result["y"], [0, 0, 0, x[3], 2, np.inf, 0])
    np.testing.assert_array_equal(result["x"], [0, 0, 0, 4, 5, 6, 0])
    assert np.isnan(layer(np.array([np.nan], dtype))).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@BOTH
def test_relu_lets_a_gradient_through_where_x_is_positive_and_nowhere_else(dtype: str, module: Any) -> None:
    x, dy = (a.ravel() for a in np.meshgrid([np.nan, -np.inf, -1, 0, 2, np.inf], [np.nan, np.inf, -3]))
    layer = module.ReLU(dtype=dtype)
    _, tape = layer.forward(x.astype(dtype))
    np.testing.assert_array_equal(layer.backward(dy.astype(dtype), tape), np.where(x > 0, dy, 0))


@BOTH
@DTYPES
def test_softmax_of_rows_of_any_kind(dtype: str, module: Any) -> None:
    layer = module.Softmax(dtype=dtype)
    x = inputs((6, 40), dtype)
    x[0] = -np.inf
    x[1, :39] = -np.inf
    x[2] += 1e4
    x[3, 7] = np.nan
    x[4] *= 1e30
    x[5, 3] = np.inf
    with np.errstate(all="ignore"):
        y = layer(x)
        dx = train(layer, x)["x"]
    assert not y[0].any() and not dx[0].any()
    np.testing.assert_array_equal(y[1], np.arange(40) == 39)
    assert_close(y[2], np.exp(x[2] - x[2].max()) / np.exp(x[2] - x[2].max()).sum(), 1e-5)
    assert np.isnan(y[3]).all()
    np.testing.assert_array_equal(y[4], np.arange(40) == x[4].argmax())
    assert np.isnan(y[5, 3])
    assert np.isfinite(dx[[0, 1, 2, 4]]).all()


@BOTH
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("case", ["rms", "rms_plain", "softmax"])
def test_nan_and_inf_stay_in_their_row(case: str, value: float, module: Any) -> None:
    layer = build(case, 20, module=module)
    x = given(case, 6, width=20)
    clean = train(layer, x)
    x[2, 7] = value
    with np.errstate(all="ignore"):
        result = train(layer, x)
    for name in ("y", "x"):
        assert_same_bits(np.delete(result[name], 2, 0), np.delete(clean[name], 2, 0))
        assert np.isnan(result[name][2]).any()


# Positions


@BOTH
@pytest.mark.parametrize("width", [1, 2, 5, 6])
def test_sinusoidal_positions_by_hand(width: int, module: Any) -> None:
    layer = module.SinusoidalPositions(width, dtype="float64")
    y = layer(np.zeros((9, width)))
    for p in range(9):
        for i in range(width):
            angle = p / 10000 ** (2 * (i // 2) / width)
            assert abs(y[p, i] - (math.cos(angle) if i % 2 else math.sin(angle))) < 1e-14


@BOTH
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_positions_by_hand(interleaved: bool, module: Any) -> None:
    layer = module.RotaryPositions(6, base=100.0, interleaved=interleaved, dtype="float64")
    x = inputs((2, 3, 5, 8), "float64")
    y = layer(x)
    for p in range(5):
        for i in range(3):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + 3)
            turned = (x[..., p, a] + 1j * x[..., p, b]) * np.exp(1j * p / 100 ** (2 * i / 6))
            np.testing.assert_allclose(y[..., p, a], turned.real, atol=1e-14)
            np.testing.assert_allclose(y[..., p, b], turned.imag, atol=1e-14)
    np.testing.assert_array_equal(y[..., 6:], x[..., 6:])


@BOTH
@pytest.mark.parametrize("case", POSITIONS)
def test_positions_that_are_given(case: str, module: Any) -> None:
    """The same vectors at the same positions get the same, wherever they stand in the array."""
    layer = build(case, 6, dtype="float64", module=module)
    x = given(case, 3, 2, 9, width=6, dtype="float64")
    y = layer(x)
    order = np.array([4, 0, 8, 4])
    assert_same_bits(layer(x[:, :, order], positions=order), np.ascontiguousarray(y[:, :, order]))
    each = np.array([[0, 1], [7, 3], [8, 8]])
    rows = np.take_along_axis(x, each[:, None, :, None], axis=2)
    assert_same_bits(layer(rows, positions=each), np.take_along_axis(y, each[:, None, :, None], axis=2))
    assert_same_bits(layer(x[0, 0, 3:4], positions=[3]), y[0, 0, 3:4])
    result = train(layer, rows, positions=each.astype("uint8"))
    if case == "learned":
        expected = np.zeros((150, 6))
        np.add.at(expected, np.broadcast_to(each[:, None], (3, 2, 2)), gradient(result["y"]))
        assert_close(result["weight"], expected, 1e-13)
    for bad, error in (
        ([0.0] * 9, TypeError),
        ([True] * 9, TypeError),
        ([0] * 8, ValueError),
        (np.zeros((2, 9), int), ValueError),
        ([-1] * 9, ValueError),
        (0, ValueError),
    ):
        for verb in (layer, layer.forward):
            with pytest.raises(error, match="positions should"):
                verb(x, positions=bad)
    if case == "learned":
        with pytest.raises(ValueError, match=r"positions should be in 0..149, but positions\[8\] is 150"):
            layer(x, positions=[0] * 8 + [150])
        with pytest.raises(ValueError, match="x should have at most 150 steps, not 151"):
            layer(np.zeros((151, 6)))
    else:  # far away, without a table of all that is before it
        far = layer(x[:, :, :2], positions=[10**12, 3])
        assert_close(far[:, :, 1:], layer(x[:, :, 1:2], positions=[3]), 1e-15)
        assert np.isfinite(far).all()


@pytest.mark.parametrize("operations", [_attention, in_numpy], ids=["compiled", "reference"])
@DTYPES
def test_the_operation_of_rotary_positions(operations: Any, dtype: str) -> None:
    """Heads that lie side by side in a longer row; back again; any part of a head, in any order."""
    joined = inputs((300, 7, 20), dtype)
    x = joined[:, 2:5]
    rng = np.random.default_rng(0)
    for half in (1, 3, 8, 10):
        angles = rng.normal(size=(40, half))
        cos, sin = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
        positions = rng.integers(0, 40, 300)
        for interleaved in (False, True):
            y = operations.rotary(x, cos, sin, positions, interleaved, False, 2)
            assert y.flags.c_contiguous and y.shape == x.shape and y.dtype == dtype
            wide = (array.astype("longdouble") for array in (x, cos, sin))
            expected = in_numpy.rotary(*wide, positions, interleaved, False, 1)
            assert_close(y, expected, tolerance(dtype, 2, 1))
            back = operations.rotary(y, cos, sin, positions, interleaved, True, 1)
            assert_close(back, np.ascontiguousarray(x), 2 * tolerance(dtype, 2, 1))
            for n_threads in (1, 3):
                assert_same_bits(operations.rotary(x, cos, sin, positions, interleaved, False, n_threads), y)


# What holds for all of them


@DTYPES
@LAYERS
def test_threads(case: str, dtype: str) -> None:
    layer = build(case, 260, dtype=dtype)
    x = given(case, 5, 100, width=260, dtype=dtype)
    results = []
    for n_threads in (1, 2, 3):
        with threads(n_threads):
            results.append({"call": layer(x), **train(layer, x)})
    for other in results[1:]:
        for name, array in results[0].items():
            assert_same_bits(other[name], array, name)


@LAYERS
def test_a_row_alone_and_in_a_batch(case: str) -> None:
    layer = build(case, 37)
    x = given(case, 29, 3, width=37)
    whole = train(layer, x)
    for rows in (slice(3, 4), slice(5, 12), slice(28, None)):
        part = train(layer, x[rows], gradient(whole["y"])[rows])
        for name in ("y", "x"):
            assert_same_bits(part[name], whole[name][rows])


@BOTH
@LAYERS
def test_strange_arrays(case: str, module: Any) -> None:
    layer = build(case, 6, module=module)
    x = given(case, 3, 4, width=6)
    expected = train(layer, x)
    for (form, own), dy in zip(strange(x).items(), strange(gradient(expected["y"])).values(), strict=True):
        before = own.tobytes()
        result = train(layer, own, dy)
        assert_same_bits(layer(own), expected["y"], form)
        for name, array in expected.items():
            assert_same_bits(result[name], array, f"{form} {name}")
        assert own.tobytes() == before


@BOTH
@LAYERS
def test_nothing_to_do(case: str, module: Any) -> None:
    layer = build(case, module=module)
    for lead in ((0, 3), (2, 0)):
        x = given(case, *lead)
        result = train(layer, x)
        assert result["y"].shape == x.shape == layer(x).shape == result["x"].shape
        assert all(not result[name].any() for name in layer.parameters)
    if case == "softmax":
        assert train(layer, np.zeros((3, 0), "float32"))["x"].shape == (3, 0)
    if not layer.parameters and case not in POSITIONS and case not in ("softmax", "rms_plain"):
        assert layer(np.float32(2)).shape == ()


@BOTH
@LAYERS
def test_tapes_files_and_copies(case: str, module: Any, tmp_path: Path) -> None:
    layer = build(case, 6, module=module)
    x = given(case, 2, 4, width=6)
    y, tape = layer.forward(x)
    dy = gradient(y)
    first = np.array(layer.backward(dy, tape))
    for name, old in layer.parameters.items():
        layer.parameters[name] = old + 1
    assert_same_bits(layer.backward(dy, tape), first)
    with pytest.raises(ValueError, match="tape"):
        build(case, module=module).backward(dy, tape)
    for bad in (dy[:1], dy[..., :1]):
        with pytest.raises(ValueError, match="dy should be of shape"):
            layer.backward(bad, tape)
    with pytest.raises(ValueError, match="grads .*nonsense is unknown"):
        layer.backward(dy, tape, grads={**layer.grads, "nonsense": dy})
    layer.save(tmp_path / "layer")
    loaded = (fs.load if module is fs else fs.reference.load)(tmp_path / "layer")
    for other in (loaded, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), copy.copy(layer)):
        assert type(other) is type(layer) and repr(other) == repr(layer) and other._config == layer._config
        assert_same_bits(other(x), layer(x))
    assert module.Sequential(layer, copy.deepcopy(layer))(x).shape == x.shape


@BOTH
@LAYERS
def test_bad_x(case: str, module: Any) -> None:
    layer = build(case, 6, module=module)
    x = given(case, 2, 4, width=6)
    for verb in (layer, layer.forward):
        for bad in (x.astype(int), x.astype(complex), x > 0, x.astype(object), "x", None, [["x"]]):
            with pytest.raises(TypeError, match=r"\bx should"):
                verb(bad)
        if case in POSITIONS or case.startswith("rms"):
            for wrong in (x[..., :1], np.zeros(()), np.zeros(3)):
                with pytest.raises(ValueError, match=r"\bx should be of shape"):
                    verb(wrong)
    for dtype in ("float16", "float64", "longdouble"):
        assert layer(x.astype(dtype)).dtype == "float32"


def test_bad_settings() -> None:
    for kind, arguments, options, error, name in (
        (fs.GELU, ("sigmoid",), {}, ValueError, "approximate"),
        (fs.GELU, (None,), {}, TypeError, "approximate"),
        (fs.ReLU, (), {"dtype": "float16"}, TypeError, "dtype"),
        (fs.Softmax, (), {"dtype": int}, TypeError, "dtype"),
        (fs.RMSNorm, (0,), {}, ValueError, "normalized_shape"),
        (fs.RMSNorm, ((),), {}, ValueError, "normalized_shape"),
        (fs.RMSNorm, (3,), {"eps": -1}, ValueError, "eps"),
        (fs.RMSNorm, (3,), {"elementwise_affine": 1}, TypeError, "elementwise_affine"),
        (fs.SinusoidalPositions, (0,), {}, ValueError, "d_model"),
        (fs.SinusoidalPositions, (4,), {"base": 0}, ValueError, "base"),
        (fs.LearnedPositions, (0, 4), {}, ValueError, "max_length"),
        (fs.LearnedPositions, (4, 4), {"seed": -1}, ValueError, "seed"),
        (fs.RotaryPositions, (3,), {}, ValueError, "dim"),
        (fs.RotaryPositions, (0,), {}, ValueError, "dim"),
        (fs.RotaryPositions, (4,), {"interleaved": 1}, TypeError, "interleaved"),
    ):
        with pytest.raises(error, match=rf"\b{name} should"):
            kind(*arguments, **options)
