"""What parameters start from."""

from __future__ import annotations

import inspect
import itertools
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


WHOLE: dict[str, Any] = {
    "RNN": lambda m, s: m.RNN(3, 4, seed=s),
    "LSTM": lambda m, s: m.LSTM(3, 4, 2, bidirectional=True, proj_size=2, seed=s),
    "GRU": lambda m, s: m.GRU(3, 4, seed=s),
    "Linear": lambda m, s: m.Linear(3, 4, seed=s),
    "Conv1d": lambda m, s: m.Conv1d(4, 6, 3, groups=2, seed=s),
    "Embedding": lambda m, s: m.Embedding(9, 4, padding_idx=2, seed=s),
    "LayerNorm": lambda m, s: m.LayerNorm(4),
    "RMSNorm": lambda m, s: m.RMSNorm(4),
    "LearnedPositions": lambda m, s: m.LearnedPositions(9, 4, seed=s),
    "MultiheadAttention": lambda m, s: m.MultiheadAttention(4, 2, kdim=3, seed=s),
    "MultiplicativeAttention": lambda m, s: m.MultiplicativeAttention(3, 4, seed=s),
    "AdditiveAttention": lambda m, s: m.AdditiveAttention(3, 4, 5, seed=s),
    "TransformerEncoderLayer": lambda m, s: m.TransformerEncoderLayer(4, 2, seed=s),
    "TransformerEncoder": lambda m, s: m.TransformerEncoder(2, 4, 2, final_norm=True, seed=s),
    "TransformerDecoderLayer": lambda m, s: m.TransformerDecoderLayer(4, 2, seed=s),
    "TransformerDecoder": lambda m, s: m.TransformerDecoder(2, 4, 2, seed=s),
    "Transformer": lambda m, s: m.Transformer(4, 2, 1, 1, seed=s),
    "RecurrentLM": lambda m, s: m.models.RecurrentLM(20, 8, 8, seed=s),
    "RecurrentForecaster": lambda m, s: m.models.RecurrentForecaster(2, 8, seed=s),
    "TransformerLM": lambda m, s: m.models.TransformerLM(100, 16, 4, 2, seed=s),
    "TransformerLM untied": lambda m, s: m.models.TransformerLM(100, 16, 4, 2, tied=False, norm_first=False, seed=s),
    "TransformerEncoderModel": lambda m, s: m.models.TransformerEncoderModel(30, 8, 2, 2, num_labels=5, seed=s),
    "TransformerSeq2Seq": lambda m, s: m.models.TransformerSeq2Seq(20, 20, 16, 2, 1, 1, seed=s),
    "Seq2Seq": lambda m, s: m.models.Seq2Seq(20, 20, 8, 8, seed=s),
}


# The parts that the ones above are without.
MORE: dict[str, Any] = {
    "TransformerEncoderModel with a pooler": lambda m, s: m.models.TransformerEncoderModel(
        30, 16, 2, 2, num_labels=5, type_vocab_size=3, pooling="cls", pooler=True, seed=s
    ),
    "Seq2Seq with additive attention": lambda m, s: m.models.Seq2Seq(20, 20, 8, 8, 2, attention="additive", seed=s),
    "Seq2Seq with multiplicative attention": lambda m, s: m.models.Seq2Seq(
        20, 20, 8, 8, bidirectional=False, attention="multiplicative", seed=s
    ),
}


@BOTH
@pytest.mark.parametrize("kind", WHOLE)
def test_default_is_what_the_constructor_makes(kind: str, module: Any) -> None:
    """Of every layer and model with parameters, whatever it held before."""
    made, other = WHOLE[kind](module, 3), WHOLE[kind](module, 4)
    for name, array in other.parameters.items():
        other.parameters[name] = array + 5
    fs.init.initialise(other, "default", seed=3)
    for name, array in made.parameters.items():
        assert_same_bits(other.parameters[name], array, name)
    for name, array in other.parameters.items():
        other.parameters[name] = array + 9
    fs.init.initialise(other)
    assert all(np.abs(array).max(initial=0) < 6 for array in other.parameters.values())


@BOTH
@pytest.mark.parametrize("kind", [*WHOLE, *MORE])
def test_no_two_parameters_are_drawn_alike(kind: str, module: Any) -> None:
    """The seed of a whole fixes all of it, and no part has the seed of another."""
    make = {**WHOLE, **MORE}[kind]
    made, again = make(module, 3).state_dict(), make(module, 3).state_dict()
    for name, array in made.items():
        assert_same_bits(again[name], array, name)
    drawn = {name: array.reshape(-1)[:12] for name, array in made.items() if len(np.unique(array)) > 12}
    for one, other in itertools.combinations(drawn, 2):
        assert abs(np.corrcoef(drawn[one], drawn[other])[0, 1]) < 0.99, (one, other)


def test_every_public_class_with_parameters_is_tried() -> None:
    public = {name for name in fs.layers.__all__ if name not in ("Layer", "Sequential", "ZeroPadded", "Graph")}
    public |= {name for name in fs.models.__all__ if isinstance(getattr(fs.models, name), type)}
    none = {"Dropout", "GELU", "LastStep", "MaxOverTime", "MeanOverTime", "ReLU", "RotaryPositions", "SiLU", "Sigmoid"}
    none |= {"SinusoidalPositions", "Softmax", "Tanh", "MarkovChain", "AutoRegressive", "MaxPool1d", "AvgPool1d"}
    none |= {"LastOfDirections", "MergeDirections", "Reverse", "Add", "Concatenate", "Multiply", "Slice"}
    assert public - none == {kind.split()[0] for kind in WHOLE}


@BOTH
@pytest.mark.parametrize("scheme", ["default", *fs.init.SCHEMES])
def test_a_model_starts_as_good_as_chance(scheme: str, module: Any) -> None:
    ids = np.random.default_rng(0).integers(0, 20, (4, 12))
    for kind in WHOLE:
        model = WHOLE[kind](module, 0)
        if not hasattr(model, "log_prob") or "Forecaster" in kind:
            continue
        fs.init.initialise(model, scheme, seed=0)
        if "Seq2Seq" in kind:
            loss, chance = -model.log_prob(ids, ids).sum() / (4 * 13), np.log(21)
        elif "Encoder" in kind:
            loss, chance = -model.log_prob(ids, np.zeros(4, int)).mean(), np.log(5)
        else:
            loss, chance = -model.log_prob(ids).mean() / 12, np.log(model.vocab_size)
        assert abs(loss - chance) < 0.35 * chance, (kind, loss, chance)
        before = WHOLE[kind](module, 0).parameters
        drawn = [name for name, array in before.items() if not np.array_equal(array, model.parameters[name])]
        assert bool(drawn) == (scheme != "default") or kind == "TransformerSeq2Seq", kind
        assert not any("embedding" in name or "norm" in name for name in drawn)
        assert not any(name.startswith(("output", "head", "position")) for name in drawn)


def test_every_function_is_documented() -> None:
    for name in fs.init.__all__:
        assert inspect.getdoc(getattr(fs.init, name))
