"""Optimisers and clipping: against PyTorch, against the equations in NumPy, groups, states, bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from common import assert_same_bits, bits, inputs, threads
from learners import Several

import fastseq as fs
from fastseq import _optimisers
from fastseq.layers.base import Composite
from fastseq.reference import _optimisers as equations
from fastseq.training import SGD, Adam, AdamW, RMSProp, clip_grad_norm, clip_grad_value

pytestmark = pytest.mark.every_isa

# Every optimiser with settings that leave no part of its rule out: ours, PyTorch's name, the settings of both.
RULES: list[tuple[Any, str, dict[str, Any]]] = [
    (SGD, "SGD", {"lr": 0.05}),
    (SGD, "SGD", {"lr": 0.05, "weight_decay": 0.1}),
    (SGD, "SGD", {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}),
    (SGD, "SGD", {"lr": 0.02, "momentum": 0.8, "nesterov": True}),
    (RMSProp, "RMSprop", {}),
    (RMSProp, "RMSprop", {"lr": 0.02, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.2}),
    (RMSProp, "RMSprop", {"lr": 0.02, "momentum": 0.7, "weight_decay": 0.1}),
    (Adam, "Adam", {}),
    (Adam, "Adam", {"lr": 0.02, "betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 0.2}),
    (AdamW, "AdamW", {}),
    (AdamW, "AdamW", {"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.3}),
]
EACH_RULE = pytest.mark.parametrize(
    ("make", "settings"), [(make, {"lr": 0.01, **settings}) for make, _, settings in RULES]
)


def set_gradients(layer: Any, step: int) -> None:
    """Other gradients in every step, of sizes that differ."""
    rng = np.random.default_rng([7, step])
    for array in layer.grads.values():
        array[...] = rng.normal(size=array.shape) * 10.0 ** rng.integers(-3, 2, array.shape)


@pytest.mark.parametrize(("make", "name", "settings"), RULES)
def test_fifty_steps_are_those_of_pytorch(make: Any, name: str, settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: take the extra 'peers'")
    layer = Several("float64")
    theirs = {n: torch.nn.Parameter(torch.tensor(np.array(a))) for n, a in layer.parameters.items()}
    peer = getattr(torch.optim, name)(theirs.values(), **settings)
    optimiser = make(layer, **settings)
    for step in range(50):
        set_gradients(layer, step)
        for n, gradient in layer.grads.items():
            theirs[n].grad = torch.tensor(np.array(gradient))
        peer.step()
        optimiser.step()
    for n, array in layer.parameters.items():
        np.testing.assert_allclose(array, theirs[n].detach().numpy(), rtol=1e-9, atol=1e-9)


def of_size(n: int, dtype: str) -> tuple[Any, ...]:
    """A parameter, a gradient, and two arrays to keep, the second of squares."""
    p, g, first, second = inputs((4, n), dtype, seed=n)
    return p, g, first, second**2


PASSES: dict[str, Any] = {
    "sgd": lambda o, p, g, a, b, out, n: o.sgd(p, g, None, out, 0.1, 0.0, False, 0.0, n),
    "sgd_decay": lambda o, p, g, a, b, out, n: o.sgd(p, g, None, out, 0.1, 0.0, False, 0.3, n),
    "sgd_momentum": lambda o, p, g, a, b, out, n: o.sgd(p, g, a, out, 0.1, 0.9, False, 0.3, n),
    "sgd_nesterov": lambda o, p, g, a, b, out, n: o.sgd(p, g, a, out, 0.1, 0.9, True, 0.0, n),
    "rmsprop": lambda o, p, g, a, b, out, n: o.rmsprop(p, g, b, None, out, 0.1, 0.99, 1e-8, 0.0, 0.3, n),
    "rmsprop_momentum": lambda o, p, g, a, b, out, n: o.rmsprop(p, g, b, a, out, 0.1, 0.9, 1e-3, 0.7, 0.0, n),
    "adam": lambda o, p, g, a, b, out, n: o.adam(p, g, a, b, out, 3, 0.1, 0.9, 0.999, 1e-8, 0.3, False, n),
    "adamw": lambda o, p, g, a, b, out, n: o.adam(p, g, a, b, out, 1, 0.1, 0.8, 0.99, 1e-3, 0.3, True, n),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", PASSES)
def test_compiled_passes_have_the_bits_of_the_equations(name: str, dtype: str) -> None:
    for n in (0, 1, 3, 16, 17, 100, 200_001):
        p, g, first, second = of_size(n, dtype)
        results = []
        for operations, n_threads in ((equations, 1), (_optimisers, 1), (_optimisers, 2), (_optimisers, 3)):
            a, b, out = first.copy(), second.copy(), np.full_like(p, np.nan)
            PASSES[name](operations, p.copy(), g.copy(), a, b, out, n_threads)
            results.append((out, a, b))
        for result in results[1:]:
            assert_same_bits(result, results[0], f"{name} of {n}")


@pytest.mark.parametrize("name", PASSES)
def test_passes_change_what_is_theirs_alone(name: str) -> None:
    p, g, a, b = of_size(37, "float32")
    before = p.copy(), g.copy()
    out = np.full(40, 5, "float32")
    p.flags.writeable = g.flags.writeable = False
    PASSES[name](_optimisers, p, g, a, b, out[:37], 1)
    assert_same_bits((p, g), before)
    assert (out[37:] == 5).all() and (out[:37] != 5).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sum_of_squares_and_scale(dtype: str) -> None:
    for n in (0, 1, 15, 16, 17, 16384, 16385, 300_000):
        x = inputs((n,), dtype, seed=n)
        exact = math.fsum(float(value) ** 2 for value in x)
        sums = {_optimisers.sum_of_squares(x, n_threads) for n_threads in (1, 2, 3)}
        assert len(sums) == 1 and math.isclose(sums.pop(), exact, rel_tol=1e-13)
        for n_threads in (1, 3):
            scaled, expected = x.copy(), x.copy()
            _optimisers.scale(scaled, 0.3, n_threads)
            equations.scale(expected, 0.3, 1)
            assert_same_bits(scaled, expected)


def test_float32_squares_neither_overflow_nor_vanish() -> None:
    assert _optimisers.sum_of_squares(np.full(4, 1e30, "float32"), 1) == pytest.approx(4e60, rel=1e-6)
    assert _optimisers.sum_of_squares(np.full(4, 1e-30, "float32"), 1) == pytest.approx(4e-60, rel=1e-6)


@EACH_RULE
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_steps_have_the_same_bits_for_any_threads(make: Any, settings: dict[str, Any], dtype: str) -> None:
    results = []
    for n_threads in (1, 2, 3):
        with threads(n_threads):
            layer = Several(dtype, sizes=((300, 500), (5,)))
            optimiser = make(layer, **settings)
            for step in range(3):
                set_gradients(layer, step)
                optimiser.step()
            results.append(list(layer.parameters.values()))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", ["float16", "longdouble"])
def test_other_dtypes_go_the_way_of_numpy(dtype: str) -> None:
    wide, other = Several("float64"), Several(dtype)
    for layer in (wide, other):
        # The eps of the others is 0 in float16.
        optimiser = SGD(layer, 0.01, momentum=0.9, weight_decay=0.1)
        for step in range(3):
            set_gradients(layer, step)
            assert clip_grad_norm(layer, 1.0) > 1
            optimiser.step()
    for name, array in other.parameters.items():
        assert array.dtype == dtype
        np.testing.assert_allclose(array.astype("float64"), wide.parameters[name], atol=0.02)


@EACH_RULE
def test_a_step_makes_new_parameters_and_keeps_the_gradients(make: Any, settings: dict[str, Any]) -> None:
    layer = Several()
    optimiser = make(layer, **settings)
    old = dict(layer.parameters)
    copies = {name: array.copy() for name, array in old.items()}
    set_gradients(layer, 0)
    gradients = {name: array.copy() for name, array in layer.grads.items()}
    optimiser.step()
    assert optimiser.steps == 1
    for name, array in layer.parameters.items():
        assert not array.flags.writeable
        assert array is not old[name] and not np.shares_memory(array, old[name])
        assert_same_bits(old[name], copies[name])
        assert_same_bits(layer.grads[name], gradients[name])
        assert (array != copies[name]).all()


@EACH_RULE
def test_given_gradients_are_those_of_the_layer(make: Any, settings: dict[str, Any]) -> None:
    layer, other = Several(), Several()
    set_gradients(layer, 0)
    make(layer, **settings).step()
    # Any strides and order of bytes do.
    given = {name: np.array(array, order="F").astype(">f4") for name, array in layer.grads.items()}
    make(other, **settings).step(given)
    assert_same_bits(list(other.parameters.values()), list(layer.parameters.values()))
    assert not any(array.any() for array in other.grads.values())


@EACH_RULE
def test_a_state_goes_on_with_the_same_bits(make: Any, settings: dict[str, Any]) -> None:
    layer = Several()
    optimiser = make(layer, **settings)
    for step in range(3):
        set_gradients(layer, step)
        optimiser.step()
    other = Several(seed=9)
    other.load_state_dict(layer.state_dict())
    resumed = make(other, **{**settings, "lr": 0.7})
    state = optimiser.state_dict()
    assert all(isinstance(value, np.ndarray | int | float) for value in state.values())
    resumed.load_state_dict(state)
    assert resumed.lr == optimiser.lr and resumed.steps == 3
    for one in (optimiser, resumed):
        set_gradients(one.layer, 3)
        one.step()
    assert_same_bits(list(other.parameters.values()), list(layer.parameters.values()))
    # What was given away is a copy.
    assert state["steps"] == 3 and all(
        array.size == 0 or (array != resumed.state_dict()[name]).any()
        for name, array in state.items()
        if isinstance(array, np.ndarray)
    )


def test_states_that_do_not_fit() -> None:
    optimiser = Adam(Several())
    state = optimiser.state_dict()
    before = Adam(Several()).state_dict()
    wrong = {name: value for name, value in state.items() if name != "mean.one.bias"}
    wrong["square.one.weight"] = np.zeros((3, 4), "float32")
    wrong["momentum.one.bias"] = np.zeros(5, "float32")
    with pytest.raises(ValueError, match=r"mean\.one\.bias is missing.*momentum\.one\.bias is unknown.*square\.one\.w"):
        optimiser.load_state_dict(wrong)
    with pytest.raises(ValueError, match="steps"):
        optimiser.load_state_dict({**state, "steps": -1})
    with pytest.raises(TypeError, match="mapping"):
        optimiser.load_state_dict(3)  # type: ignore[arg-type]
    assert_same_bits(list(optimiser.state_dict().values())[2:], list(before.values())[2:])


def test_groups() -> None:
    groups = [
        {"names": "*.bias", "weight_decay": 0.0},
        {"names": ["one.*", "two.bias"], "lr": 0.5},
        {"names": "two.weight", "frozen": True},
    ]
    layer = Several()
    optimiser = SGD(layer, 0.1, weight_decay=0.2, groups=groups)
    assert optimiser.trained == ("one.weight", "one.bias", "two.bias")
    old = dict(layer.parameters)
    for array in layer.grads.values():
        array.fill(1)
    optimiser.step()
    new = layer.parameters
    np.testing.assert_allclose(new["one.bias"], old["one.bias"] - 0.1, rtol=1e-6)  # the first group that matches
    np.testing.assert_allclose(new["one.weight"], old["one.weight"] - 0.5 * (1 + 0.2 * old["one.weight"]), rtol=1e-5)
    assert new["two.weight"] is old["two.weight"]
    optimiser.lr = 0.01  # a tenth, and so in every group
    old = dict(new)
    optimiser.step()
    np.testing.assert_allclose(new["one.bias"], old["one.bias"] - 0.01, rtol=1e-6)
    np.testing.assert_allclose(new["one.weight"], old["one.weight"] - 0.05 * (1 + 0.2 * old["one.weight"]), rtol=1e-5)


@pytest.mark.parametrize(("make", "name", "settings"), RULES)
def test_groups_are_those_of_pytorch(make: Any, name: str, settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: take the extra 'peers'")
    layer = Several("float64")
    first = settings.get("lr", {"RMSprop": 1e-2}.get(name, 1e-3))
    groups = [
        {"names": "one.weight", "lr": 7 * first},
        {"names": "*.bias", "weight_decay": 0.0},
        {"names": "two.weight", "lr": 3 * first, "weight_decay": 0.4},
    ]
    optimiser = make(layer, **settings, groups=groups)
    theirs = {n: torch.nn.Parameter(torch.tensor(np.array(a))) for n, a in layer.parameters.items()}
    biases = [parameter for n, parameter in theirs.items() if n.endswith("bias")]
    peer = getattr(torch.optim, name)(
        [
            {"params": [theirs["one.weight"]], "lr": 7 * first},
            {"params": biases, "weight_decay": 0.0},
            {"params": [theirs["two.weight"]], "lr": 3 * first, "weight_decay": 0.4},
        ],
        **settings,
    )
    for step in range(20):
        set_gradients(layer, step)
        for n, gradient in layer.grads.items():
            theirs[n].grad = torch.tensor(np.array(gradient))
        if step == 10:  # all rates by one factor
            optimiser.lr = first / 4
            for group in peer.param_groups:
                group["lr"] /= 4
        peer.step()
        optimiser.step()
    for n, array in layer.parameters.items():
        np.testing.assert_allclose(array, theirs[n].detach().numpy(), rtol=1e-9, atol=1e-12, err_msg=n)


@EACH_RULE
def test_a_rate_of_zero_with_groups(make: Any, settings: dict[str, Any]) -> None:
    settings = {**settings, "lr": 0.1}
    groups = [{"names": "one.*", "lr": 0.5}]
    with pytest.raises(ValueError, match="lr should be more than 0 where a group has an lr of its own"):
        make(Several(), **{**settings, "lr": 0}, groups=groups)
    # Groups without one, or with a rate of 0 of their own, do not mind.
    for some, rate in (([{"names": "one.*", "weight_decay": 0.1}], 0.0), ([{"names": "*", "lr": 0}], 0.1)):
        layer = Several()
        optimiser, old = make(layer, **{**settings, "lr": rate}, groups=some), dict(layer.parameters)
        set_gradients(layer, 0)
        optimiser.step()
        assert_same_bits(list(layer.parameters.values()), list(old.values()))
    # A rate that is set to 0 stops every group, and one set later makes them go on.
    layer, other = Several(), Several()
    optimiser, wanted = make(layer, **settings, groups=groups), make(other, **settings, groups=groups)
    optimiser.lr = 0
    old = dict(layer.parameters)
    set_gradients(layer, 0)
    optimiser.step()
    assert_same_bits(list(layer.parameters.values()), list(old.values()))
    optimiser.load_state_dict(wanted.state_dict())
    optimiser.lr = wanted.lr = 0.2
    set_gradients(other, 0)
    optimiser.step()
    wanted.step()
    assert_same_bits(list(layer.parameters.values()), list(other.parameters.values()))


def test_frozen_parameters_need_no_gradient_and_keep_no_array() -> None:
    layer = Several()
    optimiser = Adam(layer, groups=[{"names": "one.*", "frozen": True}])
    assert not any("one." in name for name in optimiser.state_dict())
    optimiser.step({name: array for name, array in layer.grads.items() if "two." in name})


def test_of_a_layer_made_of_layers() -> None:
    class Pair(Composite):
        def __init__(self) -> None:
            self.dtype = np.dtype("float32")
            self._config = {}
            self._children = {"a": Several(seed=1), "b": Several(seed=2)}

    pair, apart = Pair(), [Several(seed=1), Several(seed=2)]
    optimiser = AdamW(pair, groups=[{"names": "b.*", "frozen": True}])
    for step in range(2):
        set_gradients(apart[0], step)
        for name, array in apart[0].grads.items():
            pair.grads[f"a.{name}"][...] = array
        optimiser.step()
        if not step:
            single = AdamW(apart[0])
        single.step()
    for name, array in pair.parameters.items():
        assert_same_bits(array, apart["ab".index(name[0])].parameters[name[2:]])


def test_what_a_step_cannot_have_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Several()
    optimiser = Adam(layer)
    set_gradients(layer, 0)
    optimiser.step()
    parameters, state = dict(layer.parameters), optimiser.state_dict()
    empty_like, calls = np.empty_like, []

    def refusing(array: Any) -> Any:
        calls.append(array)
        if len(calls) == 3:
            raise MemoryError
        return empty_like(array)

    with monkeypatch.context() as patch:
        patch.setattr(np, "empty_like", refusing)
        with pytest.raises(MemoryError):
            optimiser.step()
    with pytest.raises(ValueError, match="grads.*one.bias is missing.*three is unknown.*one.weight should be of shape"):
        optimiser.step({"one.weight": np.zeros((5, 3), "float32"), "three": np.zeros(1, "float32")})
    with pytest.raises(TypeError, match="grads"):
        optimiser.step({**layer.grads, "one.bias": np.zeros(5, int)})
    assert all(layer.parameters[name] is array for name, array in parameters.items())
    now = optimiser.state_dict()
    assert now["steps"] == 1
    assert_same_bits([now[n] for n in state if "." in n], [state[n] for n in state if "." in n])


@pytest.mark.parametrize(
    ("make", "arguments", "error", "name"),
    [
        (SGD, {"lr": -1}, ValueError, "lr"),
        (SGD, {"lr": "1"}, TypeError, "lr"),
        (SGD, {"lr": True}, TypeError, "lr"),
        (SGD, {"lr": math.nan}, ValueError, "lr"),
        (SGD, {"lr": math.inf}, ValueError, "lr"),
        (SGD, {"lr": 10**400}, ValueError, "lr"),
        (SGD, {"momentum": -0.1}, ValueError, "momentum"),
        (SGD, {"nesterov": 1, "momentum": 0.5}, TypeError, "nesterov"),
        (SGD, {"nesterov": True}, ValueError, "momentum"),
        (SGD, {"weight_decay": -1}, ValueError, "weight_decay"),
        (RMSProp, {"alpha": 1}, ValueError, "alpha"),
        (RMSProp, {"eps": -1}, ValueError, "eps"),
        (RMSProp, {"momentum": None}, TypeError, "momentum"),
        (Adam, {"betas": 0.9}, TypeError, "betas"),
        (Adam, {"betas": (0.9,)}, TypeError, "betas"),
        (Adam, {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]"),
        (AdamW, {"eps": "0"}, TypeError, "eps"),
        (AdamW, {"groups": {"names": "*"}}, TypeError, "groups"),
        (AdamW, {"groups": ["*"]}, TypeError, r"groups\[0\]"),
        (AdamW, {"groups": [{"weight_decay": 0.0}]}, ValueError, "names"),
        (AdamW, {"groups": [{"names": "*.wieght"}]}, ValueError, "wieght"),
        (AdamW, {"groups": [{"names": ["one.bias", "three.*"]}]}, ValueError, "three"),
        (AdamW, {"groups": [{"names": 3}]}, TypeError, "names"),
        (AdamW, {"groups": [{"names": "*", "rate": 1}]}, ValueError, "rate"),
        (AdamW, {"groups": [{"names": "*", "lr": -1}]}, ValueError, "lr"),
        (AdamW, {"groups": [{"names": "*", "frozen": 1}]}, TypeError, "frozen"),
        (AdamW, {"lr": 0, "groups": [{"names": "*", "lr": 1}]}, ValueError, "lr"),
    ],
)
def test_bad_settings(make: Any, arguments: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        make(Several(), **{"lr": 0.1, **arguments})


def test_bad_layer_and_rate() -> None:
    with pytest.raises(TypeError, match="layer"):
        Adam({"weight": np.zeros(3)})  # type: ignore[arg-type]
    optimiser = Adam(Several())
    with pytest.raises(ValueError, match="lr"):
        optimiser.lr = -1
    optimiser.lr = 0.5
    assert optimiser.lr == 0.5 and "0.5" in repr(optimiser)


# Clipping


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_clip_grad_norm_is_that_of_pytorch(dtype: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: take the extra 'peers'")
    for most in (0.5, 1e6):
        layer = Several(dtype)
        set_gradients(layer, 1)
        theirs = [torch.nn.Parameter(torch.tensor(array)) for array in layer.grads.values()]
        for parameter, gradient in zip(theirs, layer.grads.values(), strict=True):
            parameter.grad = torch.tensor(np.array(gradient))
        expected = float(torch.nn.utils.clip_grad_norm_(theirs, most))
        relative = 1e-5 if dtype == "float32" else 1e-12
        assert clip_grad_norm(layer, most) == pytest.approx(expected, rel=relative)
        for gradient, parameter in zip(layer.grads.values(), theirs, strict=True):
            np.testing.assert_allclose(gradient, parameter.grad.numpy(), rtol=relative)


def test_clip_grad_norm() -> None:
    grads = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]], "float32")}
    assert clip_grad_norm(grads, math.inf) == 5 and grads["a"][0] == 3
    assert clip_grad_norm(grads, 10) == 5 and grads["a"][0] == 3
    assert clip_grad_norm(grads, 1) == 5
    assert clip_grad_norm(grads, 10) == pytest.approx(1, rel=1e-6)
    assert clip_grad_norm({}, 1) == 0
    for value in (np.nan, np.inf):
        grads["a"][1] = value
        before = {name: array.copy() for name, array in grads.items()}
        assert not math.isfinite(clip_grad_norm(grads, 0.1))
        assert_same_bits(list(grads.values()), list(before.values()))


def test_clip_grad_norm_has_the_same_bits_for_any_threads() -> None:
    results = []
    for n_threads in (1, 2, 3):
        with threads(n_threads):
            layer = Several(sizes=((700, 300), (5,)))
            set_gradients(layer, 0)
            norm = clip_grad_norm(layer, 1.0)
            results.append((np.array(norm), *layer.grads.values()))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_clip_grad_value() -> None:
    grads = {"a": np.array([-3.0, 0.1, np.nan, np.inf]), "b": np.array([[4.0]], "float32")}
    clip_grad_value(grads, 0.5)
    np.testing.assert_array_equal(grads["a"], [-0.5, 0.1, np.nan, 0.5])
    assert grads["b"][0, 0] == 0.5
    layer = Several()
    set_gradients(layer, 0)
    clip_grad_value(layer, 0.01)
    assert max(np.abs(array).max() for array in layer.grads.values() if array.size) == np.float32(0.01)


@pytest.mark.parametrize("clip", [clip_grad_norm, clip_grad_value])
def test_bad_clipping(clip: Any) -> None:
    for bad in (-1, math.nan):
        with pytest.raises(ValueError, match="max_norm|limit"):
            clip(Several(), bad)
    with pytest.raises(TypeError, match="max_norm|limit"):
        clip(Several(), None)
    with pytest.raises(TypeError, match="layer_or_grads"):
        clip([np.zeros(3)], 1)
    for array in (np.zeros(3, int), np.zeros((4, 4))[:, 1], [1.0], np.zeros((2, 3), order="F")):
        with pytest.raises(ValueError, match="layer_or_grads"):
            clip({"a": array}, 1)
    with pytest.raises(ValueError, match="layer_or_grads"):
        clip(dict(Several().parameters), 1)


def test_denormals_are_taken_for_zero() -> None:
    tiny = np.full(1000, 1e-40, "float32")
    _optimisers.scale(tiny, 0.5, 1)
    assert not bits(tiny).any()
    assert fs.get_num_threads() >= 1
    assert np.float32(1e-40) * np.float32(0.5) > 0  # and the control register is as it was
