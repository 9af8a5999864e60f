"""What parameters start from."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from common import Array, assert_same_bits

import fastseq as fs

BOTH = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
# Deviation over gain, of a matrix of these fans.
DEVIATIONS: dict[str, Any] = {
    "xavier_uniform": lambda fan_in, fan_out: np.sqrt(2 / (fan_in + fan_out)),
    "xavier_normal": lambda fan_in, fan_out: np.sqrt(2 / (fan_in + fan_out)),
    "he_uniform": lambda fan_in, fan_out: np.sqrt(1 / fan_in),
    "he_normal": lambda fan_in, fan_out: np.sqrt(1 / fan_in),
    "orthogonal": lambda fan_in, fan_out: np.sqrt(1 / max(fan_in, fan_out)),
}
GAINS = {"he_uniform": np.sqrt(2), "he_normal": np.sqrt(2)}
SCHEMES = pytest.mark.parametrize("scheme", DEVIATIONS)


def assert_drawn(array: Array, scheme: str, fan_in: int, fan_out: int, gain: float) -> None:
    """An array of the distribution of a scheme: mean, deviation, and how far it reaches."""
    values = array.astype("float64").ravel()
    deviation = gain * DEVIATIONS[scheme](fan_in, fan_out)
    n = values.size
    assert abs(values.mean()) < 5 * deviation / np.sqrt(n)
    assert abs(values.std() / deviation - 1) < 5 / np.sqrt(n)
    reach = np.abs(values).max() / deviation
    if scheme.endswith("uniform"):
        assert 0.99 * np.sqrt(3) < reach <= np.sqrt(3) * (1 + 1e-6)
    else:
        assert reach > 3


def assert_orthonormal(array: Array, gain: float = 1.0) -> None:
    q = array.reshape(len(array), -1).astype("float64") / gain
    product = q.T @ q if q.shape[0] >= q.shape[1] else q @ q.T
    np.testing.assert_allclose(product, np.eye(len(product)), atol=64 * np.finfo(array.dtype).eps)


@pytest.mark.parametrize("gain", [None, 0.3])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (70, 70), (20, 30, 5)], ids=str)
@SCHEMES
def test_distributions(scheme: str, shape: tuple[int, ...], gain: float | None) -> None:
    options = {} if gain is None else {"gain": gain}
    array = getattr(fs.init, scheme)(shape, seed=1, dtype="float64", **options)
    own = GAINS.get(scheme, 1.0) if gain is None else gain
    field = int(np.prod(shape[2:]))
    assert array.shape == shape and array.dtype == np.float64 and array.flags.writeable and array.flags.c_contiguous
    if scheme == "orthogonal":
        assert_orthonormal(array, own)
        assert_drawn(array, scheme, shape[1] * field, shape[0], own)
    else:
        assert_drawn(array, scheme, shape[1] * field, shape[0] * field, own)


@SCHEMES
def test_seeds_and_dtypes(scheme: str) -> None:
    make = getattr(fs.init, scheme)
    assert_same_bits(make((5, 7), seed=3), make([5, np.int8(7)], seed=3))
    assert not np.array_equal(make((5, 7), seed=3), make((5, 7), seed=4))
    assert not np.array_equal(make((5, 7)), make((5, 7)))
    assert make((5, 7)).dtype == np.float32
    for dtype in ("float16", ">f4", "float64", "longdouble"):
        assert make((5, 7), dtype=dtype).dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_allclose(make((5, 7), seed=3, gain=2), make((5, 7), seed=3, gain=1) * 2, rtol=1e-6)


def test_orthogonal_matrices_are_of_either_sign() -> None:
    """Q of a factorisation alone would have a diagonal of one sign."""
    firsts = [fs.init.orthogonal((3, 3), seed=seed)[0, 0] for seed in range(200)]
    assert 60 < sum(first > 0 for first in firsts) < 140
    determinants = [np.linalg.det(fs.init.orthogonal((3, 3), seed=seed, dtype="float64")) for seed in range(200)]
    assert 60 < sum(determinant > 0 for determinant in determinants) < 140


@SCHEMES
def test_bad_arguments(scheme: str) -> None:
    make = getattr(fs.init, scheme)
    for shape in (3, (), (3,), "ab", None, (2.0, 3), (True, 2)):
        with pytest.raises(TypeError, match="shape"):
            make(shape)
    for shape in ((0, 3), (2, -1)):
        with pytest.raises(ValueError, match="shape"):
            make(shape)
    for options, name in (({"gain": np.nan}, "gain"), ({"seed": -1}, "seed")):
        with pytest.raises(ValueError, match=name):
            make((2, 3), **options)
    for options, name in (({"gain": "1"}, "gain"), ({"seed": 1.5}, "seed"), ({"dtype": int}, "dtype")):
        with pytest.raises(TypeError, match=name):
            make((2, 3), **options)


# Layers


def recurrent(module: Any = fs) -> dict[str, tuple[Any, int]]:
    """Each kind of recurrent layer, and its gates."""
    return {
        "RNN": (module.RNN(60, 50, 2, bidirectional=True), 1),
        "LSTM": (module.LSTM(60, 50, 2, bidirectional=True), 4),
        "LSTM with a projection": (module.LSTM(60, 50, proj_size=40), 4),
        "GRU": (module.GRU(60, 50), 3),
    }


@SCHEMES
def test_every_gate_is_drawn_on_its_own(scheme: str) -> None:
    for kind, (layer, gates) in recurrent().items():
        fs.init.initialise(layer, scheme, seed=2)
        for name, array in layer.parameters.items():
            if name.startswith("bias"):
                assert not array.any(), (kind, name)
                continue
            blocks = np.split(array, 1 if name.startswith("weight_hr") else gates)
            for block in blocks:
                if scheme == "orthogonal":
                    assert_orthonormal(block)
                assert_drawn(block, scheme, block.shape[1], block.shape[0], GAINS.get(scheme, 1.0))
            assert len({block.tobytes() for block in blocks}) == len(blocks)


@BOTH
@SCHEMES
def test_linear(scheme: str, module: Any) -> None:
    layer = module.Linear(80, 60)
    fs.init.initialise(layer, scheme, seed=2)
    assert_drawn(layer.parameters["weight"], scheme, 80, 60, GAINS.get(scheme, 1.0))
    assert not layer.parameters["bias"].any()
    assert_same_bits(layer(np.eye(80, dtype="float32")), layer.parameters["weight"].T.copy())


@BOTH
def test_default_is_what_a_layer_is_made_with(module: Any) -> None:
    for name, arguments, options in (
        ("LSTM", (5, 6, 2), {"proj_size": 3}),
        ("GRU", (5, 6), {"bias": False}),
        ("RNN", (5, 6), {"bidirectional": True}),
        ("Linear", (5, 6), {}),
        ("Embedding", (5, 6), {"padding_idx": 2}),
    ):
        layer = getattr(module, name)(*arguments, **options, seed=1)
        made = getattr(module, name)(*arguments, **options, seed=9)
        fs.init.initialise(layer, seed=9)
        for parameter, array in layer.parameters.items():
            assert_same_bits(array, made.parameters[parameter], f"{name} {parameter}")
    norm = module.LayerNorm(4)
    norm.parameters["weight"] = norm.parameters["bias"] = np.arange(4.0)
    fs.init.initialise(norm, "orthogonal")
    assert norm.parameters["weight"].tolist() == [1] * 4 and norm.parameters["bias"].tolist() == [0] * 4


@BOTH
@pytest.mark.parametrize("scheme", ["default", "orthogonal"])
def test_the_forget_gate(scheme: str, module: Any) -> None:
    layer = module.LSTM(4, 5, 2, bidirectional=True)
    fs.init.initialise(layer, scheme, forget_bias=1.5, seed=0)
    plain = module.LSTM(4, 5, 2, bidirectional=True)
    fs.init.initialise(plain, scheme, seed=0)
    forget = np.r_[5:10]
    for name, array in layer.parameters.items():
        expected = plain.parameters[name].copy()
        if name.startswith("bias_ih"):
            expected[forget] = 1.5
        elif name.startswith("bias_hh"):
            expected[forget] = 0
        assert_same_bits(array, expected, name)
    # What it means: with nothing else to say, the cell keeps what it has.
    for name, array in layer.parameters.items():
        layer.parameters[name] = np.zeros_like(array)
    bias = np.zeros(20)
    bias[forget] = 30
    for name in [name for name in layer.parameters if name.startswith("bias_ih")]:
        layer.parameters[name] = bias
    start = layer.initial_state(1)
    c = np.random.default_rng(0).normal(size=start.c.shape)
    _, end = layer(np.zeros((1, 9, 4)), (start.h, c))
    np.testing.assert_allclose(end.c, c, rtol=1e-6)


@BOTH
def test_all_layers_of_a_model(module: Any) -> None:
    def make(seed: int) -> Any:
        model = module.Sequential(
            module.Embedding(9, 6),
            module.Sequential(module.LSTM(6, 8), module.LSTM(8, 8)),
            module.LayerNorm(8),
            module.Linear(8, 8),
            module.Linear(8, 8),
        )
        fs.init.initialise(model, "orthogonal", forget_bias=1, seed=seed)
        return model

    model, same, other = make(0), make(0), make(1)
    for name, array in model.parameters.items():
        assert_same_bits(array, same.parameters[name], name)
        if array.ndim == 2:
            assert not np.array_equal(array, other.parameters[name])
    for name in ("1.0.weight_hh_l0", "1.1.weight_hh_l0"):
        for block in np.split(model.parameters[name], 4):
            assert_orthonormal(block)
    assert_orthonormal(model.parameters["3.weight"])
    assert not np.array_equal(model.parameters["3.weight"], model.parameters["4.weight"])
    assert not np.array_equal(model.parameters["1.0.weight_hh_l0"], model.parameters["1.1.weight_hh_l0"])
    assert model.parameters["1.1.bias_ih_l0"][8:16].tolist() == [1] * 8


def test_a_layer_that_was_used_before_has_new_weights() -> None:
    layer = fs.LSTM(4, 5)
    x = np.ones((1, 3, 4), "float32")
    before, _ = layer(x)
    fs.init.initialise(layer, "xavier_normal")
    after, _ = layer(x)
    assert not np.array_equal(before, after)
    reference = fs.reference.LSTM(4, 5)
    reference.load_state_dict(layer.state_dict())
    np.testing.assert_allclose(after, reference(x)[0], rtol=1e-5, atol=1e-6)


def test_what_initialise_refuses() -> None:
    layer = fs.LSTM(3, 4)
    before = layer.state_dict()
    with pytest.raises(TypeError, match="layer"):
        fs.init.initialise(np.zeros(3))
    for weights, error in (("xavier", ValueError), (None, TypeError)):
        with pytest.raises(error, match="weights"):
            fs.init.initialise(layer, weights)
    for bias, error in ((np.nan, ValueError), ("1", TypeError), (True, TypeError)):
        with pytest.raises(error, match="forget_bias"):
            fs.init.initialise(layer, forget_bias=bias)
    for other in (fs.GRU(3, 4), fs.LSTM(3, 4, bias=False), fs.Sequential(fs.Linear(2, 3))):
        with pytest.raises(ValueError, match="forget_bias"):
            fs.init.initialise(other, forget_bias=1.0)
    with pytest.raises(ValueError, match="seed"):
        fs.init.initialise(layer, seed=-1)
    for name, array in before.items():
        assert_same_bits(layer.parameters[name], array)


def test_every_function_is_documented() -> None:
    for name in fs.init.__all__:
        assert inspect.getdoc(getattr(fs.init, name))
