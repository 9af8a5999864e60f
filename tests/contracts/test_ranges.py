"""The ends of the range of float32 and float64 in norms, losses, clipping, optimisers and schedules."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from common import assert_same_bits
from learners import Several

import fastseq as fs
from fastseq.training import SGD, Adam, AdamW, CosineSchedule, RMSProp, StepSchedule, clip_grad_norm, clip_grad_value

pytestmark = pytest.mark.every_isa

MODULES = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
INF = math.inf


# Losses


@MODULES
@DTYPES
@pytest.mark.parametrize(
    ("logit", "target", "loss", "slope"),
    [
        (INF, 0.0, INF, 1.0),
        (INF, 0.5, INF, 0.5),
        (INF, 1.0, 0.0, 0.0),
        (-INF, 0.0, 0.0, 0.0),
        (-INF, 0.5, INF, -0.5),
        (-INF, 1.0, INF, -1.0),
        (1e38, 0.0, 1e38, 1.0),
        (1e38, 1.0, 0.0, 0.0),
        (-1e38, 1.0, 1e38, -1.0),
        (-1e38, 0.0, 0.0, 0.0),
    ],
)
def test_binary_cross_entropy_of_logits_without_end(
    logit: float, target: float, loss: float, slope: float, dtype: str, module: Any
) -> None:
    for more in (0, 20):  # alone, and among others
        x, t = np.zeros(1 + more, dtype), np.zeros(1 + more, dtype)
        x[-1], t[-1] = logit, target
        got, gradient = module.losses.binary_cross_entropy_with_logits(x, t)
        assert got == pytest.approx((loss + more * math.log(2)) / (1 + more), rel=1e-6)
        np.testing.assert_allclose(gradient[-1], slope / (1 + more), rtol=1e-6, atol=1e-30)


@MODULES
def test_a_mean_of_losses_has_the_range_of_double(module: Any) -> None:
    losses = module.losses
    many = np.full(4, 1e19, "float32")
    assert losses.mean_squared_error(many, 0 * many)[0] == pytest.approx(1e38, rel=1e-6)
    large = np.full(4, 3e38, "float32")
    assert losses.huber(large, 0 * large)[0] == pytest.approx(3e38, rel=1e-6)
    assert losses.binary_cross_entropy_with_logits(large, 0 * large)[0] == pytest.approx(3e38, rel=1e-6)
    logits = np.array([[3e38, 0]] * 4, "float32")
    loss, gradient = losses.softmax_cross_entropy(logits, np.ones(4, int))
    assert loss == pytest.approx(3e38, rel=1e-6)
    np.testing.assert_allclose(gradient, [[0.25, -0.25]] * 4, rtol=1e-6)
    # Of one element the square is too large, as in PyTorch; the gradient is not.
    for value in (2e38, 1e30):
        loss, gradient = losses.mean_squared_error(np.full(2, value, "float32"), np.zeros(2, "float32"))
        assert loss == INF
        np.testing.assert_allclose(gradient, value, rtol=1e-6)


@MODULES
@pytest.mark.parametrize("delta", [1e-50, 1e39, 1e300])
def test_huber_with_an_end_that_float32_does_not_have(delta: float, module: Any) -> None:
    x = np.array([INF, 3e38, 2.0], "float32")
    t = np.array([0.0, -3e38, 1.0], "float32")
    for i, wanted in ((0, INF), (1, INF), (2, 0.5 if delta > 1 else 0.0)):
        loss, gradient = module.losses.huber(x[i : i + 1], t[i : i + 1], delta=delta)
        assert loss == pytest.approx(wanted, abs=1e-30)
        assert not np.isnan(gradient).any()


@MODULES
@DTYPES
def test_a_target_that_is_impossible_costs_without_end_however_smoothed(dtype: str, module: Any) -> None:
    logits = np.array([[0, -INF]], dtype)
    for target in (0, 1):
        for smoothing in (0.1, 0.5, 1.0):
            loss, gradient = module.losses.softmax_cross_entropy(logits, np.array([target]), label_smoothing=smoothing)
            assert loss == INF
            wanted = [1, 0] - (smoothing / 2 + (1 - smoothing) * (np.arange(2) == target))
            np.testing.assert_allclose(gradient, [wanted], rtol=1e-5)


# Norms

ENDS = {"float32": (1e20, 1e-25, 3e38, 1e30), "float64": (1e160, 1e-170, 1.5e308, 1e200)}


def rows(dtype: str, size: float, width: int) -> Any:
    x = np.random.default_rng(0).uniform(0.1, 1, (3, width)) * np.array([-1, 1])[np.arange(width) % 2]
    return (x * size).astype(dtype)


def normalised(kind: str, x: Any, eps: float) -> Any:
    """In numbers of which there are enough."""
    scaled = x / np.abs(x).max()
    if kind == "LayerNorm":
        scaled = scaled - scaled.mean(axis=-1, keepdims=True)
    more = eps / float(np.abs(x).max()) / float(np.abs(x).max())
    root = np.sqrt(np.square(scaled).mean(axis=-1, keepdims=True) + more)
    return np.divide(scaled, root, where=root > 0, out=np.zeros_like(scaled))


@MODULES
@DTYPES
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("width", [1, 3, 8, 33, 200])
def test_norms_of_rows_of_any_size(kind: str, dtype: str, width: int, module: Any) -> None:
    for size in ENDS[dtype]:
        for eps in (1e-5, 0.0):
            layer = getattr(module, kind)(width, eps=eps, dtype=dtype)
            x = rows(dtype, size, width)
            if eps == 0 and kind == "LayerNorm" and width == 1:
                continue  # 0 / 0
            ordinary = rows(dtype, 1, width)
            both = np.concatenate([ordinary, x, ordinary])
            y = layer(both)
            assert y.dtype == dtype
            tolerance = 1e-5 if dtype == "float32" else 1e-12
            wide = x.astype(np.longdouble) if dtype == "float64" else x.astype("float64")
            np.testing.assert_allclose(y[3:6], normalised(kind, wide, eps), rtol=tolerance, atol=tolerance)
            # Its neighbours have the bits they have without it.
            assert_same_bits(y[:3], layer(ordinary))
            assert_same_bits(y[6:], layer(ordinary))
            assert_same_bits(layer.forward(both)[0], y)


@MODULES
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_gradients_of_norms_of_large_rows(kind: str, module: Any) -> None:
    layer = getattr(module, kind)(33)
    x, dy = rows("float32", 1e25, 33), rows("float32", 1, 33)[::-1].copy()
    _, tape = layer.forward(x)
    dx = layer.backward(dy, tape)
    wide = getattr(fs.reference, kind)(33, dtype="float64")
    _, tape = wide.forward(x.astype("float64"))
    wanted = wide.backward(dy.astype("float64"), tape)
    np.testing.assert_allclose(dx, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    for name, gradient in layer.grads.items():
        np.testing.assert_allclose(gradient, wide.grads[name], rtol=1e-4, atol=1e-4)


@MODULES
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_rows_that_nothing_helps_are_as_they_were(kind: str, module: Any) -> None:
    layer = getattr(module, kind)(9)
    for value in (np.nan, np.inf, -np.inf):
        x = rows("float32", 1e25, 9)
        x[1, 4] = value
        y = layer(x)
        assert np.isnan(y[1, 4]) and np.isfinite(y[[0, 2]]).all()
    np.testing.assert_array_equal(layer(np.zeros((2, 9), "float32")), 0)


# Clipping


@DTYPES
def test_clipping_gradients_of_any_size(dtype: str) -> None:
    for size in (1e30, 1e-30, 3e38):
        values = np.random.default_rng(0).normal(size=50) * size / 10
        for most in (1e-30, 1e-10, 1.0, 1e10, 1e40):
            grads = {"a": values[:20].astype(dtype), "b": values[20:].astype(dtype)}
            whole = np.concatenate([grads["a"], grads["b"]]).astype("float64")
            norm = math.sqrt(np.square(whole).sum())
            assert clip_grad_norm(grads, most) == pytest.approx(norm, rel=1e-6)
            wanted = whole * min(1, most / (norm + 1e-6))
            got = np.concatenate([grads["a"], grads["b"]])
            tiny = float(np.finfo(dtype).tiny)
            np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=tiny)


def test_clipping_by_a_value_that_float32_does_not_have() -> None:
    grads = {"a": np.array([-np.inf, 3e38, 1.0, np.nan], "float32")}
    with np.errstate(all="raise"):
        clip_grad_value(grads, 1e39)
    most = np.finfo("float32").max
    np.testing.assert_array_equal(grads["a"], np.array([-most, 3e38, 1, np.nan], "float32"))
    clip_grad_value(grads, 1e-50)
    np.testing.assert_array_equal(grads["a"], [0, 0, 0, np.nan])


# Optimisers


def travelled(make: Any, dtype: str, gradients: Any, module: Any = fs, **settings: Any) -> Any:
    """How far a parameter that starts from 0 goes in each step."""
    layer = module.Linear(len(gradients[0]), 1, bias=False, dtype=dtype)
    layer.parameters["weight"] = np.zeros((1, len(gradients[0])), dtype)
    optimiser = make(layer, **settings)
    places = [np.zeros(len(gradients[0]))]
    for gradient in gradients:
        layer.grads["weight"][...] = gradient
        optimiser.step()
        places.append(np.array(layer.parameters["weight"][0], "float64"))
    return np.diff(places, axis=0)


def both(make: Any, gradients: Any, **settings: Any) -> tuple[Any, Any]:
    """In float32, and in float64."""
    numbers = np.array(gradients, "float32")
    return travelled(make, "float32", numbers, **settings), travelled(make, "float64", numbers, **settings)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.999), (1e-3, 0.0), (0.3, 0.3), (0.6, 0.9), (0.9, 0.999)])
@pytest.mark.parametrize("make", [Adam, AdamW])
def test_a_mean_that_hardly_stays_leaves_nothing(make: Any, betas: tuple[float, float]) -> None:
    gradients = [[1.0, 1e3], [1e-6, -1e-5], [-1e-7, 1e-6], [1e4, 1e4], [1e-6, 1e-6]]
    got, wanted = both(make, gradients, lr=0.01, betas=betas)
    # The way is a difference of places, each rounded.
    rounding = np.finfo("float32").eps * np.abs(np.cumsum(wanted, axis=0)).max(axis=0)
    assert (np.abs(got - wanted) <= 1e-4 * np.abs(wanted) + rounding + 1e-8).all(), (got, wanted)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (Adam, {}),
        (AdamW, {"weight_decay": 0.1}),
        (Adam, {"betas": (0.0, 0.0)}),
        (RMSProp, {}),
        (RMSProp, {"momentum": 0.9}),
        (RMSProp, {"alpha": 0.0}),
    ],
)
def test_a_gradient_too_large_to_be_squared_is_a_step_all_the_same(make: Any, settings: dict[str, Any]) -> None:
    settings = dict(settings)
    for size in (1e15, 1e19, 1e25, 3e38):
        got, wanted = both(make, [[size, -size, 1.0]], lr=0.01, **settings)
        np.testing.assert_allclose(got, wanted, rtol=1e-4)
        # And it does not stand still for ever.
        got, wanted = both(make, [[size, -size, 1.0]] * 5, lr=0.01, **settings)
        np.testing.assert_allclose(got, wanted, rtol=1e-3)
    if make is AdamW:
        settings["weight_decay"] = 0.0  # with this rate it would take the parameters out of range
    for size in (1e-12, 1e-19, 1e-25, 1e-35):
        got, wanted = both(make, [[size, -size, 1.0]] * 3, lr=1e30, **settings)
        np.testing.assert_allclose(got, wanted, rtol=1e-3)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_no_number_is_not_hidden(value: float) -> None:
    for make in (SGD, Adam, AdamW, RMSProp):
        got, wanted = both(make, [[1.0, value]], lr=0.01)
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
        assert np.isnan(got[0, 1]) or np.isinf(got[0, 1])


@pytest.mark.parametrize("betas", [(0.9, 0.999), (1 - 1e-9, 1 - 1e-9), (1e-9, 1e-9), (0.0, 1 - 1e-12)])
def test_the_bias_in_the_first_and_in_the_millionth_step(betas: tuple[float, float]) -> None:
    for steps in (0, 10**6, 10**12):
        results = []
        for dtype in ("float32", "float64"):
            layer = fs.Linear(3, 1, bias=False, dtype=dtype)
            layer.parameters["weight"] = np.zeros((1, 3), dtype)
            optimiser = Adam(layer, 0.01, betas=betas)
            state = optimiser.state_dict() | {"steps": steps}
            optimiser.load_state_dict(state)
            layer.grads["weight"][...] = [1.0, -1e-3, 1e3]
            optimiser.step()
            results.append(np.array(layer.parameters["weight"], "float64"))
        assert np.isfinite(results[0]).all()
        np.testing.assert_allclose(results[0], results[1], rtol=1e-4)


# Schedules


def test_a_rate_that_leaves_the_range() -> None:
    assert StepSchedule(1e-3, 1, gamma=10).lr_at(400) == INF
    assert StepSchedule(1e-3, 1, gamma=10).lr_at(10**18) == INF
    assert StepSchedule(0.0, 1, gamma=10).lr_at(400) == 0
    assert StepSchedule(1e-300, 1, gamma=10).lr_at(400) == pytest.approx(1e100, rel=1e-9)
    assert StepSchedule(1e200, 1, gamma=0.1).lr_at(400) == pytest.approx(1e-200, rel=1e-9)
    assert StepSchedule(1.0, 1, gamma=0.1).lr_at(10**18) == 0
    assert StepSchedule(1.0, 1, gamma=1.0).lr_at(10**18) == 1
    layer = Several()
    with pytest.raises(ValueError, match="lr should be .*not float inf"):
        Adam(layer).lr = StepSchedule(1e-3, 1, gamma=10).lr_at(400)


def test_a_cosine_at_its_ends() -> None:
    for warmup in (0, 1, 2):
        schedule = CosineSchedule(0.4, 10, warmup_steps=warmup, final_lr=0.1)
        assert schedule.lr_at(max(0, warmup - 1)) == schedule.lr_at(warmup) == 0.4
        assert schedule.lr_at(10) == schedule.lr_at(2**62) == 0.1
    assert CosineSchedule(0.4, 1).lr_at(0) == 0.4 and CosineSchedule(0.4, 1).lr_at(1) == 0
    long = CosineSchedule(0.4, 2**62, warmup_steps=1)
    assert long.lr_at(2**61) == pytest.approx(0.2) and long.lr_at(1) == 0.4
