"""MultiheadAttention, encoders, decoders and the Transformer: both engines, forward and backward."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import Array, assert_close, assert_same_bits, inputs, strange, threads, tolerance

import fastseq as fs
from fastseq import init
from fastseq.layers.base import child_seed

pytestmark = pytest.mark.every_isa

BOTH = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])

E, HEADS, FF = 8, 4, 10
SIZES = (E, HEADS, FF)
# Every kind of layer: its class, its arguments, its options.
CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "mha": ("MultiheadAttention", (E, HEADS), {}),
    "mha_nobias": ("MultiheadAttention", (E, HEADS), {"bias": False}),
    "mha_kv_heads": ("MultiheadAttention", (E, HEADS), {"num_kv_heads": 2}),
    "mha_rotary": ("MultiheadAttention", (E, 2), {"rotary": 100.0}),
    "mha_window": ("MultiheadAttention", (E, HEADS), {"window": 2}),
    "layer": ("TransformerEncoderLayer", SIZES, {}),
    "layer_pre": ("TransformerEncoderLayer", SIZES, {"norm_first": True, "activation": "gelu"}),
    "layer_tanh": ("TransformerEncoderLayer", SIZES, {"activation": "gelu_tanh", "bias": False}),
    "layer_llama": (
        "TransformerEncoderLayer",
        (E, 2, FF),
        {"norm": "rms", "norm_first": True, "rotary": 50.0, "num_kv_heads": 1, "window": 3, "bias": False},
    ),
    "layer_swiglu": ("TransformerEncoderLayer", SIZES, {"activation": "swiglu"}),
    "layer_eps": ("TransformerEncoderLayer", SIZES, {"layer_norm_eps": 0.3, "norm": "rms"}),
    "encoder": ("TransformerEncoder", (2, *SIZES), {"final_norm": True}),
    "encoder_pre": ("TransformerEncoder", (3, *SIZES), {"norm_first": True, "activation": "gelu"}),
    "encoder_modern": (
        "TransformerEncoder",
        (2, E, 2, FF),
        {"norm": "rms", "norm_first": True, "rotary": 50.0, "num_kv_heads": 1, "window": 3, "final_norm": True},
    ),
    "decoder_layer": ("TransformerDecoderLayer", SIZES, {}),
    "decoder_layer_pre": ("TransformerDecoderLayer", SIZES, {"norm_first": True, "activation": "gelu", "bias": False}),
    "decoder": ("TransformerDecoder", (2, *SIZES), {"final_norm": True, "activation": "gelu"}),
    "encoder_geglu": ("TransformerEncoder", (2, *SIZES), {"norm_first": True, "activation": "geglu", "bias": False}),
    "decoder_swiglu": ("TransformerDecoder", (2, *SIZES), {"norm_first": True, "activation": "swiglu"}),
    "decoder_modern": (
        "TransformerDecoder",
        (2, E, 2, FF),
        {"norm": "rms", "norm_first": True, "rotary": 50.0, "num_kv_heads": 1, "window": 2, "activation": "gelu_tanh"},
    ),
    "transformer": ("Transformer", (E, HEADS, 2, 1, FF), {}),
    "transformer_pre": ("Transformer", (E, HEADS, 1, 2, FF), {"norm_first": True, "activation": "gelu", "bias": False}),
}
LAYERS = pytest.mark.parametrize("case", CASES)
ENCODERS = [case for case in CASES if case.startswith(("layer", "encoder"))]
DECODERS = [case for case in CASES if case.startswith("decoder")]
MHA = [case for case in CASES if case.startswith("mha")]


def build(case: str, *, dtype: Any = "float64", module: Any = fs, dropout: float = 0.0, seed: int = 0) -> Any:
    """A layer whose parameters are all random and distinct."""
    name, arguments, options = CASES[case]
    layer = getattr(module, name)(*arguments, **{**options, "dropout": dropout}, dtype=dtype)
    fill(layer, seed)
    return layer


def fill(layer: Any, seed: int = 0) -> None:
    rng = np.random.default_rng([seed, 30])
    arrays = {}
    for name, old in layer.parameters.items():
        scale = 1 / np.sqrt(old.shape[-1]) if old.ndim == 2 else 0.3
        arrays[name] = rng.normal(size=old.shape) * scale + ("norm" in name and name.endswith("weight"))
    layer.load_state_dict(arrays)


def twin(layer: Any, dtype: Any = None) -> Any:
    """The same layer over NumPy, in a wider dtype."""
    wide = dtype or ("float64" if layer.dtype == np.float32 else np.longdouble)
    other = getattr(fs.reference, type(layer).__name__)(**{**layer._config, "dtype": wide})
    other.load_state_dict(layer.state_dict())
    return other


def sources(layer: Any, *lead: int, dtype: Any = None, memory: int = 6, seed: int = 0) -> tuple[Array, ...]:
    """What a layer takes: x (B, T, E), and for decoders the memory; `src` and `tgt` of a Transformer."""
    dtype = dtype or layer.dtype
    width = getattr(layer, "embed_dim", 0) or layer.d_model
    x = inputs((*lead, width), dtype, seed)
    if isinstance(layer, fs.TransformerDecoder | fs.TransformerDecoderLayer | fs.Transformer):
        return x, inputs((*lead[:-1], memory, width), dtype, seed + 50)
    return (x,)


def gradient(y: Array, seed: int = 0) -> Array:
    return np.random.default_rng([seed, 31]).normal(size=y.shape).astype(y.dtype)


def train(
    layer: Any, given: tuple[Array, ...], seed: int = 3, dy: Array | None = None, **options: Any
) -> dict[str, Array]:
    """All that a forward and a backward give, by name: y, d0, d1, ... of what was passed, and the parameters."""
    y, tape = layer.forward(*given, seed=seed, **options)
    grads = {name: np.zeros_like(array) for name, array in layer.parameters.items()}
    dsources = layer.backward(gradient(y) if dy is None else dy, tape, grads=grads)
    if isinstance(dsources, np.ndarray):
        dsources = (dsources,)
    return {"y": y, **{f"d{i}": array for i, array in enumerate(dsources)}, **grads}


def lengths_of(layer: Any, first: Array, second: Array | None = None) -> dict[str, Array]:
    """Lengths under the names that a layer has for them."""
    if isinstance(layer, fs.Transformer):
        return {"src_lengths": first, "tgt_lengths": second}
    if isinstance(layer, fs.TransformerDecoder | fs.TransformerDecoderLayer):
        return {"lengths": first, "memory_lengths": second}
    return {"lengths": first}


# Options of a call that every kind takes.
def asked(layer: Any, kind: str, given: tuple[Array, ...]) -> dict[str, Any]:
    batch, first = given[0].shape[:2]
    second = given[-1].shape[1]
    heads = getattr(layer, "num_heads", 0) or layer.nhead
    rng = np.random.default_rng(40)

    def mask(queries: int, keys: int, shape: tuple[int, ...]) -> Array:
        pattern: Array = rng.random((*shape, queries, keys)) < 0.7
        pattern[..., 0] = True
        return pattern

    if kind == "plain":
        return {}
    if kind == "causal":
        return {"causal": not isinstance(layer, fs.TransformerDecoder | fs.TransformerDecoderLayer | fs.Transformer)}
    if kind == "lengths":
        return lengths_of(layer, np.array([first, first // 2, 1])[:batch], np.array([2, second, second - 1])[:batch])
    own, cross = (batch, heads), (batch, 1)
    additive = kind == "additive"

    def made(queries: int, keys: int, shape: tuple[int, ...]) -> Array:
        pattern = mask(queries, keys, shape)
        return np.where(pattern, rng.normal(size=pattern.shape), -np.inf).astype(layer.dtype) if additive else pattern

    if isinstance(layer, fs.Transformer):
        return {
            "src_mask": made(first, first, own),
            "tgt_mask": made(second, second, own),
            "memory_mask": made(second, first, cross),
        }
    if isinstance(layer, fs.TransformerDecoder | fs.TransformerDecoderLayer):
        return {"mask": made(first, first, own), "memory_mask": made(first, second, cross)}
    return {"mask": made(first, first, own)}


KINDS = pytest.mark.parametrize("kind", ["plain", "causal", "lengths", "mask", "additive"])


def pytorch() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, while it starts
        return pytest.importorskip("torch", reason="PyTorch is not installed: take the extra 'peers'")


# Against PyTorch


def assert_as_pytorch(ours: dict[str, Array], theirs: Any, out: Any, tensors: list[Any], relative: float) -> None:
    assert_close(ours["y"], out.detach().numpy(), relative, "y")
    for i, tensor in enumerate(tensors):
        assert_close(ours[f"d{i}"], tensor.grad.numpy(), 4 * relative, f"gradient of argument {i}")
    for name, parameter in theirs.named_parameters():
        # Adding to all keys changes no softmax: that gradient is what is left of terms that cancel.
        expected = parameter.grad.numpy()
        size = max(np.abs(expected).max(), 0.05)
        assert_close(ours[name] / size, expected / size, 4 * relative / max(np.abs(expected / size).max(), 1e-30), name)


@BOTH
@DTYPES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["self", "key", "value", "sizes", "one_size"])
def test_multihead_attention_of_pytorch(form: str, bias: bool, dtype: str, module: Any) -> None:
    torch = pytorch()
    options = {"sizes": {"kdim": 5, "vdim": 7}, "one_size": {"kdim": 5, "vdim": 5}}.get(form, {})
    theirs = torch.nn.MultiheadAttention(E, HEADS, bias=bias, batch_first=True, dtype=getattr(torch, dtype), **options)
    ours = module.MultiheadAttention(E, HEADS, bias=bias, dtype=dtype, **options)
    ours.load_state_dict({name: array.numpy() for name, array in theirs.state_dict().items()})
    fill(ours)
    theirs.load_state_dict({name: torch.tensor(array) for name, array in ours.state_dict().items()})
    x, key, value = inputs((3, 4, E), dtype), inputs((3, 6, E), dtype, 1), inputs((3, 6, E), dtype, 2)
    if form == "sizes":
        key, value = inputs((3, 6, 5), dtype, 1), inputs((3, 6, 7), dtype, 2)
    if form == "one_size":
        key = inputs((3, 6, 5), dtype, 1)
    given = {"self": (x,), "key": (x, key), "one_size": (x, key)}.get(form, (x, key, value))
    keys = given[-1].shape[1]
    lengths = np.array([keys, 1, keys - 1])
    mask = np.tril(np.ones((4, keys), bool), 1)
    for more in ({}, {"mask": mask}, {"mask": mask, "lengths": lengths}):
        if form == "self" and "lengths" in more:
            continue  # queries in the padding, which PyTorch computes
        theirs.zero_grad()
        tensors = [torch.tensor(array, requires_grad=True) for array in given]
        three = {1: tensors * 3, 2: [*tensors, tensors[-1]], 3: tensors}[len(tensors)]
        out, weights = theirs(
            *three,
            attn_mask=torch.tensor(~more["mask"]) if "mask" in more else None,
            key_padding_mask=torch.tensor(np.arange(keys) >= lengths[:, None]) if "lengths" in more else None,
            average_attn_weights=False,
        )
        result = train(ours, given, **more)
        out.backward(torch.tensor(gradient(result["y"])))
        assert_as_pytorch(result, theirs, out, tensors, 1e-5 if dtype == "float32" else 1e-12)
        called, own_weights = ours(*given, **more, return_weights=True)
        assert_same_bits(called, result["y"])
        assert_close(own_weights, weights.detach().numpy(), 1e-5 if dtype == "float32" else 1e-12)
        assert_same_bits(ours(*given, **more), called)


OF_PYTORCH = {
    "norm_first": [False, True],
    "activation": ["relu", "gelu"],
    "bias": [True, False],
}


@BOTH
@DTYPES
@pytest.mark.parametrize("norm_first", OF_PYTORCH["norm_first"])
@pytest.mark.parametrize("activation", OF_PYTORCH["activation"])
@pytest.mark.parametrize("bias", OF_PYTORCH["bias"])
@pytest.mark.parametrize(
    "name",
    ["TransformerEncoderLayer", "TransformerEncoder", "TransformerDecoderLayer", "TransformerDecoder", "Transformer"],
)
def test_pytorch(name: str, bias: bool, activation: str, norm_first: bool, dtype: str, module: Any) -> None:
    """Outputs and all gradients, causal or not, with masks and lengths, and state dicts both ways."""
    torch = pytorch()
    nn = torch.nn
    options = {"dropout": 0.0, "activation": activation, "norm_first": norm_first, "bias": bias}
    for_torch = {**options, "batch_first": True, "dtype": getattr(torch, dtype)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors, that there are none with norm_first
        if name.endswith("Layer"):
            theirs = getattr(nn, name)(*SIZES, **for_torch)
            ours = getattr(module, name)(*SIZES, **options, dtype=dtype)
        elif name == "Transformer":
            theirs = nn.Transformer(E, HEADS, 2, 2, FF, **for_torch)
            ours = module.Transformer(E, HEADS, 2, 2, FF, **options, dtype=dtype)
        else:
            norm = nn.LayerNorm(E, bias=bias, dtype=getattr(torch, dtype))
            layer = getattr(nn, f"{name}Layer")(*SIZES, **for_torch)
            theirs = getattr(nn, name)(layer, 2, norm)
            ours = getattr(module, name)(2, *SIZES, **options, final_norm=True, dtype=dtype)
    assert list(ours.parameters) == [n for n, _ in theirs.named_parameters()] or set(ours.parameters) == {
        n for n, _ in theirs.named_parameters()
    }
    ours.load_state_dict({n: array.numpy() for n, array in theirs.state_dict().items()})
    fill(ours)
    theirs.load_state_dict({n: torch.tensor(array) for n, array in ours.state_dict().items()})

    decodes = not name.startswith("TransformerEncoder")
    given = sources(ours, 3, 5)
    first, second = (np.array([5, 2, 4]), np.array([1, 6, 3]))
    causal_mask = np.tril(np.ones((5, 5), bool))
    for causal in (False, True):
        for padded in (False, True):
            theirs.zero_grad()
            tensors = [torch.tensor(array, requires_grad=True) for array in given]
            own: dict[str, Any] = {}
            others: dict[str, Any] = {}
            past = [
                torch.tensor(np.arange(a.shape[1]) >= n[:, None])
                for a, n in zip(given, (first, second)[: len(given)], strict=True)
            ]
            if padded:
                own = lengths_of(ours, first, second)
            if name == "Transformer":
                own["causal"] = causal
                others["tgt_mask"] = torch.tensor(~np.tril(np.ones((6, 6), bool))) if causal else None
                if padded:
                    others["src_key_padding_mask"] = others["memory_key_padding_mask"] = past[0]
                    others["tgt_key_padding_mask"] = past[1]
            elif decodes:
                own["causal"] = causal
                own["memory_mask"] = np.arange(6) != 2
                others["memory_mask"] = torch.tensor(np.broadcast_to(np.arange(6) == 2, (5, 6)).copy())
                others["tgt_mask"] = torch.tensor(~causal_mask) if causal else None
                if padded:
                    others["tgt_key_padding_mask"], others["memory_key_padding_mask"] = past
            else:
                own["causal"] = causal
                others["src_mask" if name.endswith("Layer") else "mask"] = (
                    torch.tensor(~causal_mask) if causal else None
                )
                if padded:
                    others["src_key_padding_mask"] = past[0]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = theirs(*tensors, **others)
            result = train(ours, given, **own)
            assert_same_bits(ours(*given, **own), result["y"], "call and forward")
            real = np.ones(out.shape[:2], bool)
            if padded:
                real = ~(past[1] if name == "Transformer" else past[0]).numpy()
            out.backward(torch.tensor(gradient(result["y"]) * real[..., None].astype(dtype)))
            assert not result["y"][~real].any()
            out = out * torch.tensor(real[..., None])
            assert_as_pytorch(result, theirs, out, tensors, 2e-5 if dtype == "float32" else 1e-12)


def test_initial_parameters_are_distributed_as_those_of_pytorch() -> None:
    torch = pytorch()
    torch.manual_seed(0)
    for options in ({}, {"kdim": 300, "vdim": 500}):
        theirs = torch.nn.MultiheadAttention(400, 4, **options)
        ours = fs.MultiheadAttention(400, 4, **options, seed=0)
        for name, parameter in theirs.named_parameters():
            a, b = ours.parameters[name].astype("float64"), parameter.detach().numpy().astype("float64")
            assert abs(a.std() - b.std()) <= 0.02 * b.std() and abs(a.mean()) <= 0.02 * b.std()
            assert abs(np.abs(a).max() - np.abs(b).max()) <= 0.01 * np.abs(b).max()
    layer = fs.TransformerEncoderLayer(400, 4, 900, seed=1)
    theirs = torch.nn.TransformerEncoderLayer(400, 4, 900)
    for name, parameter in theirs.named_parameters():
        a, b = layer.parameters[name].astype("float64"), parameter.detach().numpy().astype("float64")
        assert abs(a.std() - b.std()) <= 0.1 * b.std() and abs(a.mean() - b.mean()) <= 0.2 * b.std()


# Finite differences


@BOTH
@LAYERS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_finite_differences(case: str, dropout: float, module: Any) -> None:
    """Along random directions of each array; of what was passed, in every place."""
    layer = build(case, module=module, dropout=dropout)
    given = sources(layer, 2, 4, memory=3)
    options = asked(layer, "lengths", given) if dropout else asked(layer, "additive", given)
    result = train(layer, given, **options)
    dy = gradient(result["y"])
    state = layer.state_dict()
    rng = np.random.default_rng(7)

    def loss(arrays: dict[str, Array]) -> float:
        layer.load_state_dict({name: arrays[name] for name in state})
        passed = [arrays[f"d{i}"] for i in range(len(given))]
        return float((layer.forward(*passed, seed=3, **options)[0] * dy).sum())

    arrays = {**state, **{f"d{i}": array for i, array in enumerate(given)}}
    for name, array in arrays.items():
        for _ in range(2):
            direction = rng.normal(size=array.shape)
            ends = [loss({**arrays, name: array + step * direction}) for step in (1e-5, -1e-5)]
            expected = (ends[0] - ends[1]) / 2e-5
            actual = float((result[name] * direction).sum())
            assert abs(actual - expected) <= 1e-6 * (1 + abs(expected)), name
    assert all(result[name].any() for name in arrays if "in_proj_bias" not in name)


@BOTH
def test_every_place_of_a_small_layer(module: Any) -> None:
    """Not only along random directions."""
    layer = module.TransformerDecoderLayer(
        4, 2, 3, dropout=0.2, norm="rms", num_kv_heads=1, rotary=9.0, dtype="float64"
    )
    fill(layer)
    given = sources(layer, 2, 3, memory=2)
    options = {"lengths": [3, 2], "memory_lengths": [1, 2]}
    result = train(layer, given, **options)
    dy, state = gradient(result["y"]), layer.state_dict()
    arrays = {**state, "d0": given[0], "d1": given[1]}
    for name, array in arrays.items():
        expected = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = {**arrays, name: array.copy()}
                moved[name][place] += step
                layer.load_state_dict({n: moved[n] for n in state})
                ends.append((layer.forward(moved["d0"], moved["d1"], seed=3, **options)[0] * dy).sum())
            expected[place] = (ends[0] - ends[1]) / 2e-5
        assert_close(result[name], expected, 1e-6, name)


# The compiled operations against the reference


@DTYPES
@KINDS
@LAYERS
def test_parity(case: str, kind: str, dtype: str) -> None:
    layer = build(case, dtype=dtype)
    exact = twin(layer)
    given = sources(layer, 3, 7)
    options = asked(layer, kind, given)
    wide = {
        name: value.astype(exact.dtype) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value
        for name, value in options.items()
    }
    result = train(layer, given, **options)
    expected = train(exact, tuple(array.astype(exact.dtype) for array in given), **wide)
    bound = 4 * tolerance(dtype, 4 * E, 7)
    for name, array in result.items():
        size = float(np.abs(expected[name]).max(initial=0))
        # A gradient of what the softmax does not see is what is left of terms that cancel.
        assert_close(array, expected[name], bound * max(1.0, 1 / max(size, 1e-30)), name)


@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder"])
@pytest.mark.parametrize("options", [{}, {"norm": "rms", "norm_first": True, "rotary": 1e4, "num_kv_heads": 2}])
def test_parity_of_work_for_several_threads(name: str, options: dict[str, Any]) -> None:
    layer = getattr(fs, name)(2, 64, 4, 160, activation="gelu", dropout=0.0, seed=1, **options)
    exact = twin(layer)
    given = sources(layer, 3, 90, memory=70)
    lengths = lengths_of(layer, np.array([90, 20, 61]), np.array([3, 70, 50]))
    for n_threads in (1, 3):
        with threads(n_threads):
            result = train(layer, given, **lengths)
            assert_same_bits(layer(*given, **lengths), result["y"])
    expected = train(exact, tuple(array.astype("float64") for array in given), **lengths)
    for part, array in result.items():
        size = float(np.abs(expected[part]).max())
        assert_close(array, expected[part], 4 * tolerance("float32", 160, 90) * max(1.0, 1 / size), part)


# A call and a forward; rows and padding; threads


@BOTH
@DTYPES
@KINDS
@LAYERS
def test_call_and_forward(case: str, kind: str, dtype: str, module: Any) -> None:
    """What a layer computes in training without dropout and in inference is the same to the bit."""
    layer = build(case, dtype=dtype, module=module)
    for lead in ((3, 5), (1, 1), (2, 9)):
        given = sources(layer, *lead)
        options = asked(layer, kind, given)
        y, _ = layer.forward(*given, **options)
        assert_same_bits(layer(*given, **options), y)
        with_weights, _ = layer(*given, **options, return_weights=True)
        assert_same_bits(with_weights, y)


@LAYERS
def test_a_row_alone_and_in_a_batch(case: str) -> None:
    layer = build(case, dtype="float32")
    given = sources(layer, 5, 9)
    first, second = np.array([9, 1, 4, 0, 7]), np.array([2, 6, 5, 3, 1])
    options = lengths_of(layer, first, second)
    y, tape = layer.forward(*given, **options)
    dy = gradient(y)
    gradients = layer.backward(dy, tape)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    called = layer(*given, **options)
    for b in range(5):
        # Without padding, and without the others.
        ends = (first[b], second[b])[: len(given)]
        alone = tuple(array[b : b + 1, :n] for array, n in zip(given, ends, strict=True))
        n = ends[-1] if isinstance(layer, fs.Transformer) else ends[0]
        own_y, own_tape = layer.forward(*alone)
        assert_same_bits(own_y, y[b : b + 1, :n], f"row {b}")
        assert_same_bits(layer(*alone), called[b : b + 1, :n], f"call of row {b}")
        own = layer.backward(dy[b : b + 1, :n], own_tape)
        for i, (part, whole) in enumerate(zip(own if isinstance(own, tuple) else (own,), gradients, strict=True)):
            assert_same_bits(part, whole[b : b + 1, : ends[i]], f"gradient {i} of row {b}")
            assert_same_bits(whole[b, ends[i] :], np.zeros_like(whole[b, ends[i] :]), "gradient of padding")
        assert_same_bits(y[b, n:], np.zeros_like(y[b, n:]), "padding")


@BOTH
@DTYPES
@LAYERS
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_padding_changes_nothing(case: str, value: float, dtype: str, module: Any) -> None:
    layer = build(case, dtype=dtype, module=module)
    given = sources(layer, 3, 6)
    first, second = np.array([6, 0, 2]), np.array([4, 5, 6])
    options = lengths_of(layer, first, second)
    clean = train(layer, given, **options)
    dirty = [array.copy() for array in given]
    for array, ends in zip(dirty, (first, second)[: len(given)], strict=True):
        array[np.arange(array.shape[1]) >= ends[:, None]] = value
    dy = gradient(clean["y"])
    ends = second if isinstance(layer, fs.Transformer) else first
    dy[np.arange(dy.shape[1]) >= ends[:, None]] = value
    result = train(layer, tuple(dirty), dy=dy, **options)
    for name, array in clean.items():
        assert_same_bits(result[name], array, name)
        assert np.isfinite(array).all()
    assert_same_bits(layer(*dirty, **options), layer(*given, **options))


@pytest.mark.parametrize("case", ["mha", "encoder", "encoder_modern", "decoder", "transformer"])
def test_more_padding(case: str) -> None:
    """Gradients of parameters, too, do not depend on how much there is."""
    layer = build(case, dtype="float32")
    given = sources(layer, 3, 6)
    options = lengths_of(layer, np.array([6, 0, 3]), np.array([4, 5, 1]))
    wider = tuple(np.pad(array, ((0, 0), (0, 5), (0, 0)), constant_values=np.nan) for array in given)
    clean = train(layer, given, **options)
    dy = np.pad(gradient(clean["y"]), ((0, 0), (0, 5), (0, 0)), constant_values=np.nan)
    result = train(layer, wider, dy=dy, **options)
    for name, array in clean.items():
        got = result[name][:, : array.shape[1]] if name == "y" or name in ("d0", "d1") else result[name]
        assert_same_bits(got, array, name)


@pytest.mark.parametrize("form", ["key", "value"])
@BOTH
def test_padding_of_keys_in_cross_attention(form: str, module: Any) -> None:
    layer = module.MultiheadAttention(E, HEADS, num_kv_heads=2, window=4, seed=0)
    fill(layer)
    given = [inputs((3, 4, E)), inputs((3, 6, E), seed=1), inputs((3, 6, E), seed=2)][: 2 if form == "key" else 3]
    lengths = np.array([6, 0, 3])
    for causal in (False, True):
        clean = train(layer, tuple(given), lengths=lengths, causal=causal)
        dirty = [array.copy() for array in given]
        for array in dirty[1:]:
            array[np.arange(6) >= lengths[:, None]] = np.nan
        result = train(layer, tuple(dirty), lengths=lengths, causal=causal)
        for name, array in clean.items():
            assert_same_bits(result[name], array, name)
        for i in range(1, len(given)):
            past = clean[f"d{i}"][np.arange(6) >= lengths[:, None]]
            assert_same_bits(past, np.zeros_like(past))
        bias = layer.parameters["out_proj.bias"]
        assert_same_bits(clean["y"][1], np.broadcast_to(bias, (4, E)).copy(), "no key: only the bias")
        # The length of the array counts for what comes first, and not that of a row.
        weights = layer(*given, lengths=lengths, causal=causal, return_weights=True)[1]
        i, j = np.arange(4)[:, None], np.arange(6)
        allowed = (abs(i + 2 - j) < 4) & (i + 2 - j >= (0 if causal else -9))
        for b in range(3):
            assert ((weights[b] > 0) == (allowed & (j < lengths[b]))).all()


@LAYERS
def test_threads(case: str) -> None:
    name, arguments, options = CASES[case]
    wide = {E: 48, FF: 96}
    layer = getattr(fs, name)(*(wide.get(n, n) for n in arguments), **{**options, "dropout": 0.2})
    fill(layer)
    given = sources(layer, 4, 70, memory=60)
    lengths = lengths_of(layer, np.array([70, 33, 1, 50]), np.array([60, 7, 44, 1]))
    results = []
    for n_threads in (1, 2, 3):
        with threads(n_threads):
            results.append({"call": layer(*given, **lengths), **train(layer, given, **lengths)})
    for other in results[1:]:
        for part, array in results[0].items():
            assert_same_bits(other[part], array, part)


# Dropout


@BOTH
def test_dropout_stands_where_pytorch_has_it(module: Any) -> None:
    """On the weights, on what attention gives, inside the feed-forward and after it: each with a seed of its own."""
    p, seed = 0.4, 12
    layer = module.TransformerEncoderLayer(E, HEADS, FF, dropout=p, activation="gelu", dtype="float64")
    fill(layer)
    x = sources(layer, 2, 5)[0]
    parts = layer._children
    drop, gelu = module.Dropout(p, dtype="float64"), module.GELU(dtype="float64")
    own, second = child_seed(seed, 0), child_seed(seed, 1)
    attention = module.MultiheadAttention(E, HEADS, dropout=p, dtype="float64")
    attention.load_state_dict(parts["self_attn"].state_dict())
    attended, _ = attention.forward(x, seed=child_seed(own, 0))
    h = parts["norm1"](x + drop.forward(attended, seed=child_seed(own, 1))[0])
    hidden, _ = drop.forward(gelu(parts["linear1"](h)), seed=child_seed(second, 0))
    expected = parts["norm2"](h + drop.forward(parts["linear2"](hidden), seed=child_seed(second, 1))[0])
    assert_close(layer.forward(x, seed=seed)[0], expected, 1e-13)
    assert not np.allclose(layer(x), expected)


@BOTH
@LAYERS
def test_dropout_and_seeds(case: str, module: Any) -> None:
    layer = build(case, dropout=0.5, module=module)
    given = sources(layer, 2, 6)
    first, again, other = (layer.forward(*given, seed=seed)[0] for seed in (1, 1, 2))
    assert_same_bits(again, first)
    assert not np.array_equal(first, other) and not np.array_equal(first, layer(*given))
    assert not np.array_equal(layer.forward(*given)[0], layer.forward(*given)[0])


@BOTH
def test_layers_of_a_stack_drop_different_elements(module: Any) -> None:
    encoder = module.TransformerEncoder(2, E, HEADS, FF, dropout=0.5, dtype="float64", seed=0)
    same = {n: a for n, a in encoder.state_dict().items() if n.startswith("layers.0.")}
    encoder.load_state_dict({n: same[n.replace("layers.1.", "layers.0.")] for n in encoder.parameters})
    x = sources(encoder, 2, 6)[0]
    y, _ = encoder.forward(x, seed=3)
    one, two = (encoder.layers[0].forward(x, seed=child_seed(3, i))[0] for i in (0, 1))
    assert not np.array_equal(one, two)
    assert_close(y, encoder.layers[1].forward(one, seed=child_seed(3, 1))[0], 1e-13)


# Weights


@BOTH
@KINDS
@LAYERS
def test_weights(case: str, kind: str, module: Any) -> None:
    layer = build(case, module=module)
    given = sources(layer, 3, 5)
    options = asked(layer, kind, given)
    heads = getattr(layer, "num_heads", 0) or layer.nhead
    _, weights = layer(*given, **options, return_weights=True)
    maps: list[tuple[Array, int, int]] = []
    if isinstance(layer, fs.Transformer):
        encoder, decoder = weights
        assert len(encoder) == layer.num_encoder_layers and len(decoder) == layer.num_decoder_layers
        maps += [(own, 5, 5) for own in encoder]
        maps += [entry for own, cross in decoder for entry in ((own, 6, 6), (cross, 6, 5))]
    elif isinstance(layer, fs.TransformerDecoder | fs.TransformerDecoderLayer):
        pairs = weights if isinstance(layer, fs.TransformerDecoder) else [weights]
        assert len(pairs) == getattr(layer, "num_layers", 1)
        maps += [entry for own, cross in pairs for entry in ((own, 5, 5), (cross, 5, 6))]
    else:
        own_maps = weights if isinstance(layer, fs.TransformerEncoder) else [weights]
        assert len(own_maps) == getattr(layer, "num_layers", 1)
        maps += [(own, 5, 5) for own in own_maps]
    for own, queries, keys in maps:
        assert own.shape == (3, heads, queries, keys)
        sums = own.sum(axis=3)
        assert np.all((np.abs(sums - 1) < 1e-12) | (sums == 0))
        assert (sums > 0).any()
    first = maps[0][0]
    if kind == "lengths":
        lengths = next(iter(options.values()))
        for b in range(3):
            assert (first[b, :, : lengths[b], : lengths[b]] > 0).any()
            assert not first[b, :, lengths[b] :].any() and not first[b, :, :, lengths[b] :].any()
    if kind == "mask":
        assert not first[~next(iter(options.values()))].any()


@BOTH
def test_weights_of_the_first_layer_by_hand(module: Any) -> None:
    encoder = build("encoder_pre", module=module)
    x = sources(encoder, 2, 5)[0]
    _, weights = encoder(x, causal=True, return_weights=True)
    layer = encoder.layers[0]
    normed = layer._children["norm1"](x)
    attention = layer._children["self_attn"]
    assert_close(weights[0], attention(normed, causal=True, return_weights=True)[1], 1e-13)


# Positions, windows and heads of keys and values


@BOTH
@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
@pytest.mark.parametrize("width", [FF, 300])
def test_a_gated_feed_forward_by_hand(width: int, activation: str, module: Any) -> None:
    """linear2(f(linear1(x)) * linear3(x)); what else the layer does is that of a layer with the same f and no gate."""
    plain = {"swiglu": fs.SiLU, "geglu": fs.GELU}[activation](dtype="float64")
    layer = module.TransformerEncoderLayer(
        E, HEADS, width, activation=activation, dropout=0.0, dtype="float64", norm_first=True
    )
    fill(layer)
    parts = layer.parameters
    assert parts["linear3.weight"].shape == (width, E)
    assert parts["linear3.bias"].shape == (width,)
    (x,) = sources(layer, 3, 5)
    other = module.TransformerEncoderLayer(E, HEADS, 1, dtype="float64", norm_first=True)
    other.load_state_dict(
        {name: parts.get(name) for name in other.parameters if not name.startswith("linear")}
        | {
            "linear1.weight": np.zeros((1, E)),
            "linear1.bias": np.zeros(1),
            "linear2.weight": np.zeros((E, 1)),
            "linear2.bias": np.zeros(E),
        }
    )
    before = other(x)  # the sum after attention: its feed-forward adds 0
    normed = (before - before.mean(-1, keepdims=True)) / np.sqrt(before.var(-1, keepdims=True) + 1e-5)
    normed = normed * parts["norm2.weight"] + parts["norm2.bias"]
    hidden, gated = (normed @ parts[f"{name}.weight"].T + parts[f"{name}.bias"] for name in ("linear1", "linear3"))
    expected = before + (plain(hidden) * gated) @ parts["linear2.weight"].T + parts["linear2.bias"]
    assert_close(layer(x), expected, 1e-13)
    y, _ = layer.forward(x)
    assert_close(y, expected, 1e-13)


@BOTH
@DTYPES
@pytest.mark.parametrize("case", ["layer_swiglu", "encoder_geglu", "decoder_swiglu"])
def test_steps_of_a_gated_feed_forward(case: str, dtype: str, module: Any) -> None:
    layer = build(case, dtype=dtype, module=module)
    given = sources(layer, 3, 5)
    state = layer.initial_state(*(given[1:] or (3,)))
    expected = layer(*given, causal=True)
    for t in range(given[0].shape[1]):
        y, state = layer.step(given[0][:, t], state)
        if module is fs:
            assert_same_bits(y, expected[:, t])
        else:
            assert_close(y, expected[:, t], tolerance(dtype, E, 5))


@BOTH
def test_rotary_positions_in_attention(module: Any) -> None:
    """By hand, through the public function."""
    layer = module.MultiheadAttention(E, 2, rotary=20.0, num_kv_heads=1, dtype="float64")
    fill(layer)
    x = inputs((3, 5, E), "float64")
    arrays = layer.state_dict()
    projected = x @ arrays["in_proj_weight"].T + arrays["in_proj_bias"]
    q, k, v = (part.reshape(3, 5, -1, 4).swapaxes(1, 2) for part in np.split(projected, [8, 12], axis=2))
    turn = module.RotaryPositions(4, base=20.0, dtype="float64")
    out = module.attention(turn(q), turn(k), v, causal=True).swapaxes(1, 2).reshape(3, 5, E)
    expected = out @ arrays["out_proj.weight"].T + arrays["out_proj.bias"]
    assert_close(layer(x, causal=True), expected, 1e-13)
    # Scores know the distance alone: of one token over and over, each looks back at the same.
    weights = layer(np.tile(x[:, :1], (1, 70, 1)), return_weights=True, causal=True)[1]
    late, early = weights[:, :, 69, 29:] / weights[:, :, 69, 69:], weights[:, :, 40, :41] / weights[:, :, 40, 40:41]
    np.testing.assert_allclose(late, early, rtol=1e-10)


@BOTH
def test_rotary_positions_in_a_layer(module: Any) -> None:
    """Its attention is that of a layer of attention by itself, made with the same options."""
    layer, x = build("layer_llama", module=module), inputs((3, 5, E), "float64")
    options = {name: CASES["layer_llama"][2][name] for name in ("rotary", "num_kv_heads", "window", "bias")}
    attention = module.MultiheadAttention(E, 2, **options, dtype="float64")
    arrays = layer.state_dict().items()
    attention.load_state_dict({n.removeprefix("self_attn."): a for n, a in arrays if n.startswith("self_attn.")})
    _, expected = attention(layer._children["norm1"](x), causal=True, return_weights=True)
    assert_close(layer(x, causal=True, return_weights=True)[1], expected, 1e-13)


@BOTH
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("mha", "encoder", "decoder"))])
def test_masks_with_lengths(case: str, module: Any) -> None:
    """Rows of a mask are those of the padded batch, and so are its columns, however short the longest sequence is."""
    layer = build(case, module=module)
    given = sources(layer, 3, 7)
    options = {**asked(layer, "additive", given), **lengths_of(layer, np.array([4, 0, 2]), np.array([3, 1, 5]))}
    y, weights = layer(*given, **options, return_weights=True)
    result = train(layer, given, **options)
    assert_same_bits(result["y"], y)
    dy, total = gradient(y), {name: np.zeros_like(array) for name, array in layer.parameters.items()}
    for b, (n, m) in enumerate(((4, 3), (0, 1), (2, 5))):
        alone = tuple(array[b : b + 1, :k] for array, k in zip(given, (n, m), strict=False))
        own = {name: mask[b : b + 1, :, :n] for name, mask in options.items() if "mask" in name}
        own = {name: mask[..., : m if name.startswith("memory") else n] for name, mask in own.items()}
        assert_close(layer(*alone, **own), y[b : b + 1, :n], 1e-13)
        single = train(layer, alone, dy=dy[b : b + 1, :n], **own)
        for i in range(len(given)):
            assert_close(single[f"d{i}"], result[f"d{i}"][b : b + 1, : (n, m)[i]], 1e-12)
        for name, array in total.items():
            array += single[name]
    for name, array in total.items():
        assert_close(result[name], array, 1e-12, name)
    first = weights[0] if isinstance(weights, list) else weights
    first = first[0] if isinstance(first, tuple) else first
    assert first.shape == options["mask"].shape and not first[options["mask"] == -np.inf].any()


@BOTH
def test_a_window_in_an_encoder(module: Any) -> None:
    layer = build("encoder_modern", module=module)
    x = sources(layer, 2, 9)[0]
    y = layer(x)
    moved = x.copy()
    moved[:, 0] += 1
    # Two layers with a window of 3 reach 2 steps each.
    assert_same_bits(layer(moved)[:, 5:], y[:, 5:])
    assert not np.array_equal(layer(moved)[:, 4], y[:, 4])


# Files, copies, parameters


@BOTH
@LAYERS
def test_files_pickles_and_copies(case: str, module: Any, tmp_path: Path) -> None:
    layer = build(case, dtype="float32", module=module, dropout=0.25)
    given = sources(layer, 2, 4)
    layer.save(tmp_path / "layer")
    loaded = (fs.load if module is fs else fs.reference.load)(tmp_path / "layer")
    fresh = type(layer)(**layer._config)
    fresh.load_state_dict(layer.state_dict())
    for other in (loaded, fresh, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), copy.copy(layer)):
        assert type(other) is type(layer)
        assert repr(other) == repr(layer) and other._config == layer._config
        assert_same_bits(other(*given), layer(*given))
        assert_same_bits(other.forward(*given, seed=1)[0], layer.forward(*given, seed=1)[0])
        name = next(iter(other.parameters))
        other.parameters[name] = other.parameters[name] + 1
        assert not np.array_equal(other(*given), layer(*given))
    count = sum(array.size for array in layer.parameters.values())
    assert repr(layer).endswith(f" with {count:,} parameters")


@BOTH
@LAYERS
def test_changed_parameters_are_used(case: str, module: Any) -> None:
    """Packed weights of every part are made anew."""
    layer = build(case, module=module)
    given = sources(layer, 2, 4)
    before = layer(*given)
    for name, old in layer.parameters.items():
        changed = old + np.linspace(0.5, 1, old.size) if name.endswith("in_proj_bias") else old * 1.5 + 0.1
        layer.parameters[name] = changed
        assert not np.array_equal(layer(*given), before), name
        assert_close(layer(*given), twin(layer, "float64")(*given), 1e-11, name)
        layer.parameters[name] = old
        assert_same_bits(layer(*given), before, name)


@BOTH
@LAYERS
def test_seeds(case: str, module: Any) -> None:
    name, arguments, options = CASES[case]
    made = [getattr(module, name)(*arguments, **options, seed=seed) for seed in (1, 1, 2)]
    for n, array in made[0].parameters.items():
        assert_same_bits(made[1].parameters[n], array)
        if array.ndim == 2:
            assert not np.array_equal(array, made[2].parameters[n])
    matrices = [array for array in made[0].parameters.values() if array.ndim == 2]
    firsts = [array.flat[0] for array in matrices]
    assert len(set(firsts)) == len(firsts), "two children start from the same numbers"
    init.initialise(made[2], seed=1)
    for n, array in made[0].parameters.items():
        assert_same_bits(made[2].parameters[n], array, n)


@BOTH
def test_initialise(module: Any) -> None:
    """Queries, keys and values have a matrix each."""
    encoder = module.TransformerEncoder(2, 60, 6, 80, num_kv_heads=2, seed=0)
    init.initialise(encoder, "orthogonal", seed=1)
    for name, array in encoder.parameters.items():
        if array.ndim == 1:
            assert not array.any() or "norm" in name
            continue
        parts = np.split(array, [60, 80]) if "in_proj" in name else [array]
        for part in parts:
            small = part @ part.T if len(part) <= part.shape[1] else part.T @ part
            np.testing.assert_allclose(small, np.eye(len(small)), atol=1e-5)


@BOTH
@LAYERS
def test_grads(case: str, module: Any) -> None:
    layer = build(case, module=module)
    given = sources(layer, 2, 4)
    assert all(not array.any() for array in layer.grads.values())
    assert list(layer.grads) == list(layer.parameters)
    y, tape = layer.forward(*given, seed=1)
    dy = gradient(y)
    own = {name: np.zeros_like(array) for name, array in layer.parameters.items()}
    first = layer.backward(dy, tape, grads=own)
    assert not any(array.any() for array in layer.grads.values())
    for name, old in layer.parameters.items():  # a tape belongs to the parameters of its forward
        layer.parameters[name] = old + 1
    again = layer.backward(dy, tape)
    for one, other in zip(first, again, strict=True):
        assert_same_bits(other, one)
    for name, array in layer.grads.items():
        assert_same_bits(array, own[name], name)
    layer.backward(dy, tape)
    for name, array in layer.grads.items():
        np.testing.assert_allclose(array, 2 * own[name], rtol=1e-9, atol=1e-12)
    layer.zero_grad()
    assert not any(array.any() for array in layer.grads.values())
    with pytest.raises(ValueError, match="tape"):
        build(case, module=module).backward(dy, tape)
    with pytest.raises(TypeError, match="tape"):
        layer.backward(dy, None)
    for bad in (dy[:1], dy[..., :1], dy[0]):
        with pytest.raises(ValueError, match="dy should be of shape"):
            layer.backward(bad, tape)
    with pytest.raises(ValueError, match="grads .*nonsense is unknown"):
        layer.backward(dy, tape, grads={**own, "nonsense": dy})
    with pytest.raises(ValueError, match="grads .*(is|are) missing"):
        layer.backward(dy, tape, grads={})


@BOTH
@LAYERS
def test_state_dicts_that_do_not_fit(case: str, module: Any) -> None:
    layer = build(case, module=module)
    state = layer.state_dict()
    name = next(iter(state))
    short = {n: a for n, a in state.items() if n != name}
    for bad in (short, {**short, "nonsense": state[name]}, {**state, name: state[name][:-1]}):
        with pytest.raises(ValueError, match=f"mapping does not fit.*{name}"):
            layer.load_state_dict(bad)
    for n, array in state.items():
        assert_same_bits(layer.parameters[n], array)


# Arrays


@BOTH
@LAYERS
def test_strange_arrays(case: str, module: Any) -> None:
    layer = build(case, dtype="float32", module=module)
    given = sources(layer, 2, 4)
    for more in ({}, lengths_of(layer, np.array([3, 4]), np.array([6, 2]))):
        expected = train(layer, given, **more)
        forms = [strange(array) for array in given]
        of_dy = strange(gradient(expected["y"]))
        for form in forms[0]:
            own = tuple(of[form] for of in forms)
            before = [array.tobytes() for array in own]
            result = train(layer, own, dy=of_dy[form], **more)
            assert_same_bits(layer(*own, **more), expected["y"])
            assert [array.tobytes() for array in own] == before
            for name, array in expected.items():
                assert_same_bits(result[name], array, f"{form} {name}")


@BOTH
@LAYERS
def test_nothing_to_do(case: str, module: Any) -> None:
    layer = build(case, module=module)
    for lead in ((0, 3), (2, 0), (0, 0)):
        given = sources(layer, *lead, memory=4)
        result = train(layer, given)
        last = given[-1] if isinstance(layer, fs.Transformer) else given[0]
        assert result["y"].shape == last.shape
        for i, array in enumerate(given):
            assert result[f"d{i}"].shape == array.shape
        assert layer(*given).shape == last.shape
        if 0 in last.shape[:2]:
            assert all(not result[name].any() for name in layer.parameters)
    given = sources(layer, 2, 3)
    result = train(layer, given, **lengths_of(layer, np.zeros(2, int), np.zeros(2, int)))
    assert not any(array.any() for array in result.values())
    if case in DECODERS:  # nothing to attend to in the memory
        y = layer(*given, memory_lengths=[0, 0])
        assert np.isfinite(y).all() and y.any()
        assert_same_bits(layer(given[0], given[1][:, :0]), y)


@BOTH
@LAYERS
def test_without_a_batch(case: str, module: Any) -> None:
    layer = build(case, module=module)
    given = sources(layer, 1, 4)
    alone = tuple(array[0] for array in given)
    whole, single = train(layer, given), train(layer, alone, dy=gradient(train(layer, given)["y"])[0])
    for name, array in whole.items():
        of_batch = name == "y" or name in ("d0", "d1")
        assert_same_bits(single[name], array[0] if of_batch else array, name)
    y, weights = layer(*alone, return_weights=True)
    assert_same_bits(y, whole["y"][0])
    leaf = weights
    while not isinstance(leaf, np.ndarray):
        leaf = leaf[0]
    assert leaf.ndim == 3
    if case in DECODERS:
        with pytest.raises(ValueError, match="memory should"):
            layer(alone[0], given[1])


@BOTH
@LAYERS
def test_other_real_dtypes_are_converted(case: str, module: Any) -> None:
    layer = build(case, dtype="float32", module=module)
    given = sources(layer, 2, 3)
    for dtype in ("float16", "float64", "longdouble"):
        other = tuple(array.astype(dtype) for array in given)
        assert layer(*other).dtype == "float32"
        assert_same_bits(layer(*other), layer(*(array.astype("float32") for array in other)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "longdouble"])
@LAYERS
def test_the_reference_takes_any_floating_dtype(case: str, dtype: str) -> None:
    layer = build(case, dtype=dtype, module=fs.reference)
    assert all(array.dtype == dtype for array in train(layer, sources(layer, 2, 3)).values())


# Bad input


@BOTH
@LAYERS
def test_bad_arrays(case: str, module: Any) -> None:
    layer = build(case, module=module)
    given = sources(layer, 2, 4)
    names = {"Tr": ("src", "tgt"), "Mu": ("query",)}.get(type(layer).__name__[:2], ("x", "memory"))
    if type(layer).__name__ != "Transformer" and names[0] == "src":
        names = ("x", "memory")
    for verb in (layer, layer.forward):
        for place, array in enumerate(given):
            for bad in (array.astype(int), array.astype(complex), array > 0, array.astype(object), "x", None):
                with pytest.raises(TypeError, match=rf"\b{names[place]} should"):
                    verb(*given[:place], bad, *given[place + 1 :])
            for bad in (array[..., :-1], array[None], np.zeros(E), np.zeros(())):
                with pytest.raises(ValueError, match=rf"\b{names[place]} should"):
                    verb(*given[:place], bad, *given[place + 1 :])
        if len(given) == 2:
            with pytest.raises(ValueError, match=rf"{names[1]} should"):
                verb(given[0], given[1][:1])
    with pytest.raises(TypeError, match="seed should"):
        layer.forward(*given, seed=1.5)
    with pytest.raises(TypeError, match="return_weights should"):
        layer(*given, return_weights=1)


@BOTH
@LAYERS
def test_bad_options(case: str, module: Any) -> None:
    layer = build(case, module=module)
    given = sources(layer, 2, 4)
    parameters = inspect.signature(layer.forward).parameters
    for verb in (layer, layer.forward):
        for name in parameters:
            if name.endswith("mask"):
                with pytest.raises(ValueError, match=rf"{name} should be of a shape that broadcasts to \(2, "):
                    verb(*given, **{name: np.ones((9, 9), bool)})
                with pytest.raises(TypeError, match=rf"{name} should hold booleans"):
                    verb(*given, **{name: np.ones((1, 1), int)})
            if name.endswith("lengths"):
                for bad in ([1], [[1, 2]], [99, 1], [-1, 1]):
                    with pytest.raises(ValueError, match=rf"{name} should be"):
                        verb(*given, **{name: bad})
                for bad in ([1.0, 2.0], [True, False]):
                    with pytest.raises(TypeError, match=rf"{name} should hold integers"):
                        verb(*given, **{name: bad})
        for bad in (1, None, "yes"):
            with pytest.raises(TypeError, match="causal should be True or False"):
                verb(*given, causal=bad)


@BOTH
def test_bad_sources_of_multihead_attention(module: Any) -> None:
    layer = module.MultiheadAttention(E, HEADS, seed=0)
    x, key = inputs((2, 3, E)), inputs((2, 5, E))
    other = module.MultiheadAttention(E, HEADS, kdim=5, vdim=6)
    for verb in (layer, layer.forward):
        with pytest.raises(ValueError, match="key should be given where value is"):
            verb(x, None, key)
        with pytest.raises(ValueError, match="key should be of shape"):
            verb(x, key[:1])
        with pytest.raises(ValueError, match="key should be of shape"):
            verb(x, key[0])
        with pytest.raises(ValueError, match="value should be of shape"):
            verb(x, key, key[..., :3])
        with pytest.raises(ValueError, match="value should have 5 steps as key has, not 4"):
            verb(x, key, key[:, :4])
        with pytest.raises(ValueError, match=r"mask should be of a shape that broadcasts to \(2, 4, 3, 5\)"):
            verb(x, key, mask=np.ones((3, 3), bool))
        with pytest.raises(ValueError, match=r"lengths should be in 0..5"):
            verb(x, key, lengths=[6, 1])
    with pytest.raises(ValueError, match="key should be given: kdim is 5, not 8"):
        other(x)
    with pytest.raises(ValueError, match="value should be given: vdim is 6, not 5"):
        other(x, key[..., :5])
    with pytest.raises(ValueError, match="key should be None: rotary"):
        module.MultiheadAttention(E, HEADS, rotary=10.0)(x, x)


BAD_SETTINGS: list[tuple[str, Any, type[Exception]]] = [
    ("dropout", 1.0, ValueError),
    ("dropout", "0.1", TypeError),
    ("bias", 1, TypeError),
    ("num_kv_heads", 3, ValueError),
    ("num_kv_heads", 0, ValueError),
    ("num_kv_heads", 1.0, TypeError),
    ("rotary", 0, ValueError),
    ("rotary", True, TypeError),
    ("window", 0, ValueError),
    ("window", 1.5, TypeError),
    ("dtype", "float16", TypeError),
    ("dtype", int, TypeError),
    ("seed", -1, ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD_SETTINGS)
def test_bad_settings_of_all(name: str, value: Any, error: type[Exception]) -> None:
    for kind, arguments in (
        (fs.MultiheadAttention, (E, HEADS)),
        (fs.TransformerEncoderLayer, SIZES),
        (fs.TransformerEncoder, (2, *SIZES)),
        (fs.TransformerDecoder, (2, *SIZES)),
        (fs.Transformer, (E, HEADS, 1, 1, FF)),
    ):
        with pytest.raises(error, match=rf"\b{name} should"):
            kind(*arguments, **{name: value})


@BOTH
def test_bad_sizes(module: Any) -> None:
    with pytest.raises(ValueError, match="embed_dim should be a multiple of num_heads=3, not 8"):
        module.MultiheadAttention(8, 3)
    with pytest.raises(ValueError, match="rotary should be None where the size of a head is odd, 3"):
        module.MultiheadAttention(6, 2, rotary=10.0)
    with pytest.raises(ValueError, match="kdim and vdim should be 8"):
        module.MultiheadAttention(8, 2, rotary=10.0, kdim=4)
    for kind, before in ((module.TransformerEncoderLayer, ()), (module.TransformerDecoder, (2,))):
        with pytest.raises(ValueError, match="d_model should be a multiple of nhead=3, not 8"):
            kind(*before, 8, 3)
        for place, name in enumerate(("d_model", "nhead", "dim_feedforward")):
            for bad, error in ((0, ValueError), (2.0, TypeError), (True, TypeError), (2**70, OverflowError)):
                sizes = [8, 2, 4]
                sizes[place] = bad
                with pytest.raises(error, match=rf"\b{name} should"):
                    kind(*before, *sizes)
        for name, bad, error in (
            ("activation", "tanh", ValueError),
            ("activation", None, TypeError),
            ("norm", "batch", ValueError),
            ("norm_first", 0, TypeError),
            ("layer_norm_eps", -1, ValueError),
            ("layer_norm_eps", "1", TypeError),
        ):
            with pytest.raises(error, match=rf"\b{name} should"):
                kind(*before, 8, 2, **{name: bad})
    for bad, error in ((0, ValueError), (1025, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match="num_layers should"):
            module.TransformerEncoder(bad, 8, 2)
        with pytest.raises(error, match="num_decoder_layers should"):
            module.Transformer(8, 2, 1, bad)
    with pytest.raises(TypeError, match="final_norm should"):
        module.TransformerEncoder(1, 8, 2, final_norm=1)
    with pytest.raises(AttributeError, match="nhead is fixed"):
        module.TransformerEncoder(1, 8, 2, 4).nhead = 4


# Signatures, and layers one after another


SIGNATURES = {
    "MultiheadAttention": "(embed_dim, num_heads, *, kdim=None, vdim=None, num_kv_heads=None, bias=True, dropout=0.0, "
    "rotary=None, window=None, dtype='float32', seed=None)",
    "TransformerEncoderLayer": "(d_model, nhead, dim_feedforward=2048, *, dropout=0.1, activation='relu', "
    "norm_first=False, layer_norm_eps=1e-05, bias=True, norm='layer', num_kv_heads=None, rotary=None, window=None, "
    "dtype='float32', seed=None)",
    "TransformerEncoder": "(num_layers, d_model, nhead, dim_feedforward=2048, *, dropout=0.1, activation='relu', "
    "norm_first=False, layer_norm_eps=1e-05, final_norm=False, bias=True, norm='layer', num_kv_heads=None, "
    "rotary=None, window=None, dtype='float32', seed=None)",
    "Transformer": "(d_model=512, nhead=8, num_encoder_layers=6, num_decoder_layers=6, dim_feedforward=2048, *, "
    "dropout=0.1, activation='relu', norm_first=False, layer_norm_eps=1e-05, bias=True, norm='layer', "
    "num_kv_heads=None, rotary=None, window=None, dtype='float32', seed=None)",
    "attention": "(q, k, v, *, mask=None, causal=False, lengths=None, scale=None, window=None, return_weights=False)",
    "attention_forward": "(q, k, v, *, mask=None, causal=False, lengths=None, scale=None, window=None)",
    "attention_backward": "(dout, tape)",
}
SIGNATURES["TransformerDecoderLayer"] = SIGNATURES["TransformerEncoderLayer"]
SIGNATURES["TransformerDecoder"] = SIGNATURES["TransformerEncoder"]
VERBS = {
    "MultiheadAttention": "query, key=None, value=None, *, mask=None, causal=False, lengths=None",
    "TransformerEncoder": "x, *, mask=None, causal=False, lengths=None",
    "TransformerEncoderLayer": "x, *, mask=None, causal=False, lengths=None",
    "TransformerDecoder": "x, memory, *, mask=None, causal=True, lengths=None, memory_mask=None, memory_lengths=None",
    "TransformerDecoderLayer": "x, memory, *, mask=None, causal=True, lengths=None, memory_mask=None, "
    "memory_lengths=None",
    "Transformer": "src, tgt, *, src_mask=None, tgt_mask=None, memory_mask=None, src_lengths=None, tgt_lengths=None, "
    "causal=True",
}


def bare(function: Any) -> str:
    """A signature without its annotations."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


@BOTH
def test_signatures(module: Any) -> None:
    for name, signature in SIGNATURES.items():
        assert bare(getattr(module, name)) == signature
    for name, arguments in VERBS.items():
        kind = getattr(module, name)
        assert bare(kind.__call__) == f"(self, {arguments}, return_weights=False)"
        assert bare(kind.forward) == f"(self, {arguments}, seed=None)"
        assert bare(kind.backward) == "(self, dy, tape, *, grads=None)"


@BOTH
@pytest.mark.parametrize("kind", ["encoder", "layer", "attention"])
def test_in_a_sequential(kind: str, module: Any) -> None:
    """Encoders receive the lengths; what stands in the padding changes nothing."""
    middle = {
        "encoder": lambda: module.TransformerEncoder(2, E, HEADS, FF, dropout=0.2, seed=2, dtype="float64"),
        "layer": lambda: module.TransformerEncoderLayer(E, HEADS, FF, dropout=0.2, seed=2, dtype="float64"),
        "attention": lambda: module.MultiheadAttention(E, HEADS, dropout=0.2, seed=2, dtype="float64"),
    }[kind]()
    model = module.Sequential(
        module.Embedding(11, E, seed=1, dtype="float64"),
        module.SinusoidalPositions(E, dtype="float64"),
        middle,
        module.Linear(E, 3, seed=3, dtype="float64"),
    )
    ids = np.random.default_rng(0).integers(0, 11, (3, 6))
    lengths = np.array([6, 2, 0])
    y = model(ids, lengths=lengths)
    for b, n in enumerate(lengths):
        assert_close(y[b, :n], model(ids[b : b + 1, :n])[0], 1e-13)
        assert not y[b, n:].any()
    other = np.where(np.arange(6) < lengths[:, None], ids, 3)
    for given in (ids, other):
        out, tape = model.forward(given, lengths=lengths, seed=1)
        grads = {name: np.zeros_like(array) for name, array in model.parameters.items()}
        dy = np.random.default_rng(1).normal(size=out.shape)
        dy[np.arange(6) >= lengths[:, None]] = np.nan
        assert model.backward(dy, tape, grads=grads) is None
        if given is ids:
            first = grads
    for name, array in first.items():
        assert_same_bits(grads[name], array, name)
        assert np.isfinite(array).all() and (array.any() or "in_proj_bias" in name)
    again = pickle.loads(pickle.dumps(model))
    assert_same_bits(again(ids, lengths=lengths), y)


def test_one_changed_parameter_makes_the_packed_weights_stale() -> None:
    encoder = fs.TransformerEncoder(2, 16, 2, 32, seed=0)
    x = inputs((2, 5, 16))
    before = encoder(x)
    name = "layers.1.linear2.weight"
    encoder.load_state_dict({**encoder.state_dict(), name: 2 * encoder.parameters[name]})
    other = fs.TransformerEncoder(2, 16, 2, 32, seed=1)
    other.load_state_dict(encoder.state_dict())
    assert np.any(before != encoder(x))
    assert_same_bits(encoder(x), other(x))
    encoder.layers[0].parameters["linear1.bias"] = np.ones(32)
    other.load_state_dict(encoder.state_dict())
    assert_same_bits(encoder(x), other(x))
