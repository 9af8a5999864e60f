"""Linear, Embedding, LayerNorm, Dropout and Sequential: both engines, forward and backward."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import Array, assert_close, assert_same_bits, inputs, random_lengths, threads, tolerance

import fastseq as fs
from fastseq import io
from fastseq.reference import _dense as dense

BOTH = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])

# Every kind of layer: its class, its arguments for a width, its options, and the shape of one vector of its input.
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "linear": ("Linear", lambda width: (width, width + 3), {}),
    "linear_nobias": ("Linear", lambda width: (width, 2 * width + 1), {"bias": False}),
    "embedding": ("Embedding", lambda width: (11, width), {}),
    "embedding_padding": ("Embedding", lambda width: (11, width), {"padding_idx": 4}),
    "norm": ("LayerNorm", lambda width: (width,), {}),
    "norm_axes": ("LayerNorm", lambda width: ((2, width),), {"eps": 0.3}),
    "norm_nobias": ("LayerNorm", lambda width: (width,), {"bias": False}),
    "norm_plain": ("LayerNorm", lambda width: (width,), {"elementwise_affine": False}),
    "dropout": ("Dropout", lambda width: (0.3,), {}),
    "dropout_none": ("Dropout", lambda width: (0.0,), {}),
}
LAYERS = pytest.mark.parametrize("case", CASES)
OF_FLOATS = pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("embedding")])


def build(case: str, width: int = 5, *, dtype: Any = "float32", module: Any = fs) -> Any:
    """A layer whose parameters are all random and distinct."""
    name, arguments, options = CASES[case]
    layer = getattr(module, name)(*arguments(width), **options, dtype=dtype)
    rng = np.random.default_rng([width, 8])
    size = np.sqrt(layer.in_features) if name == "Linear" else 1
    layer.load_state_dict({n: rng.normal(size=old.shape) / size for n, old in layer.parameters.items()})
    return layer


def twin(layer: Any, dtype: Any = None) -> Any:
    """The same layer over NumPy, in a wider dtype."""
    wide = dtype or ("float64" if layer.dtype == np.float32 else np.longdouble)
    other = getattr(fs.reference, type(layer).__name__)(**{**layer._config, "dtype": wide})
    other.load_state_dict(layer.state_dict())
    return other


def given(layer: Any, *lead: int, width: int = 5, dtype: Any = None, seed: int = 0) -> Array:
    """What a layer takes, with these leading axes."""
    if isinstance(layer, fs.Embedding):
        return np.random.default_rng([seed, 9]).integers(0, layer.num_embeddings, lead)
    last = {fs.Linear: lambda: (layer.in_features,), fs.LayerNorm: lambda: layer.normalized_shape}
    shape = next((f() for kind, f in last.items() if isinstance(layer, kind)), (width,))
    return inputs((*lead, *shape), dtype or layer.dtype, seed)


def gradient(y: Array, seed: int = 0) -> Array:
    return np.random.default_rng([seed, 10]).normal(size=y.shape).astype(y.dtype)


def train(layer: Any, x: Array, **options: Any) -> tuple[Array, dict[str, Array]]:
    """y, and dx with the gradients of all parameters."""
    y, tape = layer.forward(x, seed=3, **options)
    grads = {name: np.zeros_like(array) for name, array in layer.parameters.items()}
    dx = layer.backward(gradient(y), tape, grads=grads)
    return y, grads if dx is None else {"x": dx, **grads}


def compare(layer: Any, x: Array) -> None:
    """Call, forward and backward of a layer against the reference in a wider dtype."""
    exact = twin(layer)
    wide = x if x.dtype.kind == "i" else x.astype(exact.dtype)
    y, grads = train(layer, x)
    expected, expected_grads = train(exact, wide)
    rows = x.size if x.dtype.kind == "i" else x.size // max(1, x.shape[-1])
    relative = tolerance(layer.dtype, layer._width if isinstance(layer, fs.LayerNorm) else x.shape[-1], 1)
    assert_close(y, expected, relative, "y")
    assert_close(layer(x), exact(wide), relative, "call")
    assert grads.keys() == expected_grads.keys()
    for name, array in grads.items():
        assert array.dtype == layer.dtype
        k = y.shape[-1] if name == "x" else rows
        assert_close(array, expected_grads[name], 4 * tolerance(layer.dtype, max(k, x.shape[-1]), 1), name)
    if not isinstance(layer, fs.Dropout) or layer.p == 0:
        assert_same_bits(layer(x), y, "call and forward")


# The compiled operations against the reference


@pytest.mark.every_isa
@DTYPES
@LAYERS
def test_parity(case: str, dtype: str) -> None:
    for width in (1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 67, 130):
        if case.startswith("norm"):
            width += 3  # the gradient of fewer elements is what is left of terms that cancel
        layer = build(case, width, dtype=dtype)
        for lead in ((7,), (2, 3), (1,)):
            compare(layer, given(layer, *lead, width=width))


@pytest.mark.every_isa
@LAYERS
def test_parity_of_work_for_several_threads(case: str) -> None:
    layer = build(case, 300)
    for n_threads in (1, 3):
        with threads(n_threads):
            compare(layer, given(layer, 9, 150, width=300))


@pytest.mark.every_isa
@DTYPES
def test_linear_of_every_number_of_rows(dtype: str) -> None:
    """How rows are put into tiles, and panels cut, changes no bit."""
    for width, units in ((7, 300), (70, 64), (33, 130), (128, 50)):
        layer = fs.Linear(width, units, dtype=dtype, seed=1)
        x = inputs((40, width), dtype)
        compare(layer, x)
        whole = layer(x)
        for rows in range(1, 20):
            assert_same_bits(layer(x[:rows]), whole[:rows])


def test_packed_weights_share_memory_with_no_other() -> None:
    """Layers of all sizes come and go; those that are left give what they gave."""
    rng = np.random.default_rng(0)
    alive: dict[int, tuple[Any, Array, Array]] = {}
    for i in range(300):
        width, units = (int(n) for n in rng.choice([3, 60, 130, 500, 900], 2))
        layer = fs.Linear(width, units, seed=i) if i % 2 else fs.GRU(width, units // 3 + 1, seed=i)
        x = rng.standard_normal((1, 2, width), dtype="float32")
        alive[i] = layer, x, layer(x) if i % 2 else layer(x)[0]
        for gone in rng.choice(list(alive), rng.integers(0, min(4, len(alive))), replace=False):
            del alive[gone]
    for i, (layer, x, expected) in alive.items():
        assert_same_bits(layer(x) if i % 2 else layer(x)[0], expected)


@pytest.mark.every_isa
def test_linear_of_many_and_of_few_rows() -> None:
    """More rows than pointers are made for at once, and so few that threads split the outputs."""
    layer = build("linear", 40)
    compare(layer, given(layer, 1100))
    wide = fs.Linear(64, 5000, seed=1)
    with threads(3):
        for rows in (1, 2, 5):
            compare(wide, given(wide, rows))


@BOTH
@LAYERS
def test_a_vector_without_leading_axes(case: str, module: Any) -> None:
    layer = build(case, module=module)
    x = given(layer, 1)
    alone = layer(x[0])
    assert_same_bits(np.asarray(alone)[None], layer(x))
    if not isinstance(layer, fs.Dropout) or layer.p == 0:
        y, grads = train(layer, x[0])
        whole, whole_grads = train(layer, x)
        assert_same_bits(y[None], whole)
        assert grads.get("x") is None or grads["x"].shape == x[0].shape
        for name in layer.parameters:
            np.testing.assert_allclose(grads[name], whole_grads[name], rtol=1, atol=10)  # another dy: the shape counts


@BOTH
@LAYERS
def test_nothing_to_do(case: str, module: Any) -> None:
    layer = build(case, module=module)
    for lead in ((0,), (2, 0), (0, 3)):
        y, grads = train(layer, given(layer, *lead))
        assert y.shape[: len(lead)] == lead and y.size == 0
        for name in layer.parameters:
            assert not grads[name].any() and grads[name].shape == layer.parameters[name].shape


@BOTH
def test_layer_norm_of_one_and_of_two_elements(module: Any) -> None:
    one, two = build("norm", 1, module=module), module.LayerNorm(2, eps=0)
    y, grads = train(one, inputs((4, 1)))
    assert_same_bits(y, np.broadcast_to(one.parameters["bias"], (4, 1)).copy())
    assert not grads["x"].any()
    np.testing.assert_allclose(two(np.array([[3.0, 5.0], [7.0, -1.0]])), [[-1, 1], [1, -1]], rtol=1e-6)


@pytest.mark.every_isa
@DTYPES
def test_layer_norm_far_from_zero(dtype: str) -> None:
    """The variance is taken about the mean, not as a difference of squares."""
    layer = fs.LayerNorm(100, dtype=dtype)
    x = (inputs((4, 100), "float64") + 1000).astype(dtype)
    exact = twin(layer)(x.astype(np.longdouble))
    assert_close(layer(x), exact, 3000 * tolerance(dtype, 100, 1))
    assert_close(layer(np.full((2, 100), 7, dtype)), np.zeros((2, 100)), 0)


@pytest.mark.every_isa
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@OF_FLOATS
def test_nan_and_inf_stay_in_their_row(case: str, value: float) -> None:
    layer = build(case, 20)
    x = given(layer, 6, width=20)
    x[2, ..., 7] = value
    others = [0, 1, 3, 4, 5]
    with np.errstate(all="ignore"):
        y, grads = train(layer, x)
        expected, expected_grads = train(twin(layer), x.astype("float64"))
    assert_close(y, expected, tolerance("float32", 40, 1))
    assert_close(grads["x"], expected_grads["x"], 4 * tolerance("float32", 40, 1))
    assert (np.isfinite(y[others]).all() and not np.isfinite(y[2]).all()) or case == "dropout"


def test_denormals_are_as_before_after_a_call() -> None:
    tiny = np.float32(1e-40)
    layer = fs.Linear(300, 300)
    with threads(2):
        train(layer, inputs((300, 300)))
    assert tiny * np.float32(0.5) != 0


# Gradients


@BOTH
@LAYERS
def test_finite_differences(case: str, module: Any) -> None:
    layer = build(case, 4, dtype="float64", module=module)
    x = given(layer, 2, 3, width=4)
    y, grads = train(layer, x)
    dy = gradient(y)
    state = layer.state_dict()

    def loss(name: str, values: Array) -> float:
        layer.load_state_dict(state if name == "x" else {**state, name: values})
        return float((layer.forward(values if name == "x" else x, seed=3)[0] * dy).sum())

    values = dict(state) if x.dtype.kind == "i" else {**state, "x": x}
    assert values.keys() == grads.keys()
    for name, array in values.items():
        expected = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            step = np.zeros_like(array)
            step[place] = 1e-5
            expected[place] = (loss(name, array + step) - loss(name, array - step)) / 2e-5
        if case == "embedding_padding":
            assert expected[4].any() == (x == 4).any()
            expected[4] = 0
        assert_close(grads[name], expected, 1e-6, name)


def pytorch() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, while it starts
        return pytest.importorskip("torch", reason="PyTorch is not installed: take the extra 'peers'")


@BOTH
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("dropout")])
def test_pytorch(case: str, module: Any) -> None:
    """Outputs, gradients and state dicts, both ways."""
    torch = pytorch()
    name, arguments, options = CASES[case]
    layer = build(case, 7, dtype="float64", module=module)
    theirs = getattr(torch.nn, name)(*arguments(7), **options, dtype=torch.float64)
    assert {n: tuple(p.shape) for n, p in theirs.named_parameters()} == {
        n: a.shape for n, a in layer.parameters.items()
    }
    theirs.load_state_dict({n: torch.tensor(a) for n, a in layer.state_dict().items()})
    fresh = build(case, 7, dtype="float64", module=module)
    fresh.load_state_dict({n: p.detach().numpy() for n, p in theirs.named_parameters()})

    x = given(layer, 4, 3, width=7)
    y, grads = train(fresh, x)
    tensor = torch.tensor(x, requires_grad=x.dtype.kind == "f")
    out = theirs(tensor)
    out.backward(torch.tensor(gradient(y)))
    assert_close(y, out.detach().numpy(), 1e-9, "y")
    if x.dtype.kind == "f":
        assert_close(grads["x"], tensor.grad.numpy(), 1e-9, "dx")
    for n, parameter in theirs.named_parameters():
        assert_close(grads[n], parameter.grad.numpy(), 1e-9, n)


@pytest.mark.parametrize("case", ["linear", "embedding", "embedding_padding", "norm"])
def test_initial_parameters_are_distributed_as_those_of_pytorch(case: str) -> None:
    torch = pytorch()
    torch.manual_seed(0)
    name, arguments, options = CASES[case]
    ours, theirs = (
        getattr(fs, name)(*arguments(900), **options, seed=0) if name != "LayerNorm" else fs.LayerNorm(900),
        getattr(torch.nn, name)(*arguments(900), **options),
    )
    for n, parameter in theirs.named_parameters():
        a, b = ours.parameters[n].astype("float64"), parameter.detach().numpy().astype("float64")
        assert abs(a.std() - b.std()) < 0.05 * b.std() + 1e-12 and abs(a.mean() - b.mean()) < 0.1 * b.std() + 1e-12
        if name == "Linear":
            assert abs(np.abs(a).max() - np.abs(b).max()) < 0.01 * np.abs(b).max()
    if case == "embedding_padding":
        assert not ours.parameters["weight"][4].any()


# The same bits


@pytest.mark.every_isa
@DTYPES
@LAYERS
def test_threads(case: str, dtype: str) -> None:
    layer = build(case, 260, dtype=dtype)
    x = given(layer, 500, width=260)
    results = []
    for n_threads in (1, 2, 3, 5):
        with threads(n_threads):
            results.append((layer(x), *train(layer, x)))
    for n_threads, (call, y, grads) in zip((2, 3, 5), results[1:], strict=True):
        assert_same_bits(call, results[0][0], f"call with {n_threads} threads")
        assert_same_bits(y, results[0][1], f"y with {n_threads} threads")
        for name, array in grads.items():
            assert_same_bits(array, results[0][2][name], f"{name} with {n_threads} threads")


@pytest.mark.every_isa
@pytest.mark.parametrize("case", [case for case in CASES if case != "dropout"])
def test_a_row_alone_and_in_a_batch(case: str) -> None:
    layer = build(case, 37)
    x = given(layer, 29, width=37)
    y, tape = layer.forward(x)
    dy = gradient(y)
    dx = layer.backward(dy, tape)
    for rows in (slice(3, 4), slice(5, 12), slice(28, None)):
        part, part_tape = layer.forward(x[rows])
        assert_same_bits(part, y[rows], f"rows {rows}")
        assert_same_bits(layer(x[rows]), y[rows], f"rows {rows} of a call")
        if dx is not None:
            assert_same_bits(layer.backward(dy[rows], part_tape), dx[rows], f"dx of rows {rows}")


@BOTH
@LAYERS
def test_arrays_in_any_memory(case: str, module: Any) -> None:
    layer = build(case, module=module)
    x = given(layer, 6, 4)
    y, grads = train(layer, x)
    dy = gradient(y)

    def forms(array: Array) -> dict[str, Array]:
        spread = np.zeros([2 * size for size in array.shape], array.dtype)
        spread[tuple(slice(None, None, 2) for _ in array.shape)] = array
        frozen = array.copy()
        frozen.flags.writeable = False
        raw = np.zeros(array.nbytes + 1, np.uint8)
        off = raw[1:].view(array.dtype).reshape(array.shape)
        off[...] = array
        return {
            "strided": spread[tuple(slice(None, None, 2) for _ in array.shape)],
            "transposed": np.ascontiguousarray(array.T).T,
            "reversed": array[::-1].copy()[::-1],
            "read-only": frozen,
            "byte-swapped": array.astype(array.dtype.newbyteorder()),
            "misaligned": off,
        }

    for (form, x_form), dy_form in zip(forms(x).items(), forms(dy).values(), strict=True):
        before = x_form.copy()
        again, tape = layer.forward(x_form, seed=3)
        assert_same_bits(layer(x_form), layer(x), form)
        assert_same_bits(again, y, form)
        own = {name: np.zeros_like(array) for name, array in layer.parameters.items()}
        dx = layer.backward(dy_form, tape, grads=own)
        if dx is not None:
            assert_same_bits(dx, grads["x"], form)
        for name, array in own.items():
            assert_same_bits(array, grads[name], f"{form} {name}")
        np.testing.assert_array_equal(x_form, before)


@BOTH
@OF_FLOATS
def test_other_real_dtypes_are_converted(case: str, module: Any) -> None:
    for dtype in ("float32", "float64"):
        layer = build(case, dtype=dtype, module=module)
        for other in ("float16", "float32", "float64", "longdouble"):
            x = given(layer, 3, dtype=other)
            assert layer(x).dtype == dtype
            assert_same_bits(layer(x), layer(x.astype(dtype)))
            y, tape = layer.forward(x, seed=1)
            assert y.dtype == dtype
            dx = layer.backward(gradient(y).astype(other), tape)
            assert dx.dtype == dtype


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "longdouble"])
@LAYERS
def test_the_reference_takes_any_floating_dtype(case: str, dtype: str) -> None:
    layer = build(case, dtype=dtype, module=fs.reference)
    y, grads = train(layer, given(layer, 4))
    assert y.dtype == dtype and all(array.dtype == dtype for array in grads.values())


# Tapes and gradients


@BOTH
@LAYERS
def test_tapes(case: str, module: Any) -> None:
    """A tape may be used again, and belongs to the parameters of its forward."""
    layer = build(case, module=module)
    x = given(layer, 6)
    y, tape = layer.forward(x, seed=3)
    dy = gradient(y)
    first = layer.backward(dy, tape)
    before = {name: array.copy() for name, array in layer.grads.items()}
    for name, old in layer.parameters.items():
        layer.parameters[name] = old + 1
    layer.zero_grad()
    second = layer.backward(dy, tape)
    if first is not None:
        assert_same_bits(second, first)
    for name, array in layer.grads.items():
        assert_same_bits(array, before[name], name)
    layer.backward(dy, tape)
    for name, array in layer.grads.items():
        np.testing.assert_allclose(array, 2 * before[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="tape"):
        build(case, module=module).backward(dy, tape)
    with pytest.raises(TypeError, match="tape"):
        layer.backward(dy, None)


@BOTH
@LAYERS
def test_bad_gradients(case: str, module: Any) -> None:
    layer = build(case, module=module)
    y, tape = layer.forward(given(layer, 6), seed=3)
    for dy in (y[:5], y[..., :-1], y[None], np.zeros(())):
        with pytest.raises(ValueError, match=r"dy should be of shape"):
            layer.backward(dy, tape)
    for dy in (y.astype(int), y.astype(complex), y > 0, None, "dy"):
        with pytest.raises(TypeError, match=r"dy should"):
            layer.backward(dy, tape)
    with pytest.raises(ValueError, match=r"grads .*nonsense is unknown"):
        layer.backward(y, tape, grads={**layer.grads, "nonsense": y})
    for name in layer.grads:
        with pytest.raises(ValueError, match=rf"grads .*{name} is missing"):
            layer.backward(y, tape, grads={n: a for n, a in layer.grads.items() if n != name})


# Bad input


@BOTH
@OF_FLOATS
def test_bad_x(case: str, module: Any) -> None:
    layer = build(case, module=module)
    x = given(layer, 6)
    for call in (layer, layer.forward):
        for bad in (x.astype(int), x.astype(complex), x > 0, x.astype(object), "x", None, [["x"]]):
            with pytest.raises(TypeError, match=r"\bx should"):
                call(bad)
        if not case.startswith("dropout"):
            for wrong in (x[..., :-1], np.zeros((0,)), np.zeros(()), np.concatenate([x, x], axis=-1)):
                with pytest.raises(ValueError, match=r"\bx should be of shape"):
                    call(wrong)
    for seed in (-1, 2**64):
        with pytest.raises((ValueError, OverflowError), match="seed"):
            layer.forward(x, seed=seed)
    for seed in (1.0, "1", True):
        with pytest.raises(TypeError, match="seed"):
            layer.forward(x, seed=seed)


@BOTH
def test_bad_ids(module: Any) -> None:
    layer = build("embedding", module=module)
    for call in (layer, layer.forward):
        for bad in (np.zeros(3), np.zeros(3, bool), True, 1.0, None, "ids", np.zeros(3, complex)):
            with pytest.raises(TypeError, match=r"\bids should"):
                call(bad)
        for value, place, ids in (
            (11, "ids[1]", [0, 11]),
            (-1, "ids[1, 0]", np.array([[3, 4], [-1, 11]], "int8")),
            (200, "ids[2]", np.array([0, 0, 200], "uint8")),
            (2**64 - 1, "ids[0]", np.array([2**64 - 1], "uint64")),
            (11, "ids", 11),
        ):
            with pytest.raises(ValueError) as error:
                call(ids)
            assert f"ids should be in 0..10, but {place} is {value}" in str(error.value)


@BOTH
@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", ">i4", ">u8"]
)
def test_ids_of_any_integer_dtype(dtype: str, module: Any) -> None:
    layer = build("embedding", module=module)
    ids = given(layer, 3, 4)
    assert_same_bits(layer(ids.astype(dtype)), layer(ids))
    assert_same_bits(layer(ids), layer.parameters["weight"][ids])
    assert layer([]).shape == (0, 5) and layer(ids.tolist()).shape == (3, 4, 5) and layer(3).shape == (5,)


@BOTH
@pytest.mark.parametrize(
    ("name", "arguments", "options", "error", "match"),
    [
        *(("Linear", (value, 3), {}, TypeError, "in_features") for value in (None, 2.0, True, "2")),
        *(("Linear", (2, value), {}, ValueError, "out_features") for value in (0, -1)),
        ("Linear", (2, 2**64), {}, OverflowError, "out_features"),
        ("Linear", (2, 3), {"bias": 1}, TypeError, "bias"),
        ("Linear", (2, 3), {"dtype": "int32"}, TypeError, "dtype"),
        ("Linear", (2, 3), {"seed": -1}, ValueError, "seed"),
        ("Embedding", (0, 3), {}, ValueError, "num_embeddings"),
        ("Embedding", (2, 0.5), {}, TypeError, "embedding_dim"),
        *(("Embedding", (2, 3), {"padding_idx": value}, ValueError, "padding_idx") for value in (2, -3)),
        *(("Embedding", (2, 3), {"padding_idx": value}, TypeError, "padding_idx") for value in (True, 1.0, "1")),
        *(("LayerNorm", (value,), {}, (TypeError, ValueError), "normalized_shape") for value in (0, (), (2, 0), 1.5)),
        ("LayerNorm", (3,), {"eps": -1e-5}, ValueError, "eps"),
        *(("LayerNorm", (3,), {"eps": value}, ValueError, "eps") for value in (np.nan, np.inf, 10**400)),
        *(("LayerNorm", (3,), {"eps": value}, TypeError, "eps") for value in ("1", None, True)),
        ("LayerNorm", (3,), {"elementwise_affine": None}, TypeError, "elementwise_affine"),
        *(("Dropout", (value,), {}, ValueError, r"\bp\b") for value in (1, -0.1, np.nan, 1.5)),
        *(("Dropout", (value,), {}, TypeError, r"\bp\b") for value in (None, "0.5", True)),
        ("Dropout", (0.5,), {"dtype": "complex64"}, TypeError, "dtype"),
        ("Sequential", (), {}, ValueError, "layers"),
        ("Sequential", (3,), {}, TypeError, r"layers\[0\]"),
    ],
)
def test_bad_settings(name: str, arguments: Any, options: Any, error: Any, match: str, module: Any) -> None:
    with pytest.raises(error, match=match):
        getattr(module, name)(*arguments, **options)


@LAYERS
def test_the_compiled_layers_are_float32_or_float64(case: str) -> None:
    with pytest.raises(TypeError, match=r"dtype.*float32.*float64"):
        build(case, dtype="float16")


# Embedding


@BOTH
def test_the_padding_row(module: Any) -> None:
    for index, row in ((3, 3), (-1, 10), (np.int8(0), 0)):
        layer = module.Embedding(11, 6, padding_idx=index, seed=0)
        assert layer.padding_idx == row and not layer.parameters["weight"][row].any()
        assert np.abs(np.delete(layer.parameters["weight"], row, axis=0)).min() > 0
        ids = np.arange(11).repeat(2)
        y, tape = layer.forward(ids)
        assert layer.backward(np.ones_like(y), tape) is None
        expected = np.full((11, 6), 2.0)
        expected[row] = 0
        np.testing.assert_array_equal(layer.grads["weight"], expected)


@BOTH
def test_a_tape_has_its_own_ids(module: Any) -> None:
    layer = build("embedding", module=module)
    ids = np.arange(6)
    y, tape = layer.forward(ids)
    ids[...] = 99
    layer.backward(np.ones_like(y), tape)
    assert layer.grads["weight"][:6].all() and not layer.grads["weight"][6:].any()


# Dropout


@pytest.mark.every_isa
@DTYPES
def test_both_engines_drop_the_same(dtype: str) -> None:
    x = inputs((37, 53), dtype) + 10
    for p, seed in ((0.3, 0), (0.5, 1), (0.999, 2**63 - 1), (1 - 2**-40, 7), (1e-12, 3)):
        for stream in (0, 1, 1000):
            compiled = fs.Dropout._backend.dense.dropout(x, p, seed, stream, 1)
            assert_same_bits(compiled, dense.dropout(x, p, seed, stream, 1), f"p {p}, seed {seed}, stream {stream}")
        layer, reference = fs.Dropout(p, dtype=dtype), fs.reference.Dropout(p, dtype=dtype)
        (y, tape), (expected, reference_tape) = layer.forward(x, seed=seed), reference.forward(x, seed=seed)
        assert_same_bits(y, expected)
        assert_same_bits(layer.backward(x, tape), reference.backward(x, reference_tape))


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    n = 1_000_000
    for p in (0.1, 0.5, 0.9):
        y, _ = fs.Dropout(p).forward(np.ones(n, "float32"), seed=4)
        assert set(np.unique(y)) == {np.float32(0), np.float32(1 / (1 - p))}
        assert abs((y == 0).mean() - p) < 5 * np.sqrt(p * (1 - p) / n)
        assert_same_bits(fs.Dropout(p).forward(np.ones(n, "float32"), seed=4)[0], y)


def test_masks_are_independent_of_one_another() -> None:
    """Neighbours of every distance, rows of a power of two, seeds and streams: nothing goes with anything."""
    n = 1 << 18
    index = np.arange(n, dtype=np.uint64)

    def mask(seed: int, stream: int, start: int = 0) -> Array:
        return (dense.random_words(index + np.uint64(start), seed, stream) >= 2**31) * 2.0 - 1

    base = mask(0, 0)
    others = {f"lag {lag}": np.roll(base, lag) for lag in (1, 2, 3, 7, 16, 64, 96, 256, 1024, 4096, 65536)}
    others |= {f"seed {seed}": mask(seed, 0) for seed in (1, 2, 3, 2**32, 2**62)}
    others |= {f"stream {stream}": mask(0, stream) for stream in (1, 2, 3)}
    others |= {f"2^32 on, {k}": mask(0, 0, k << 32) for k in (1, 2)}
    others |= {"none": np.ones(n)}
    for name, other in others.items():
        assert abs((base * other).mean()) < 5 / np.sqrt(n), name
    words = dense.random_words(index, 5, 0)
    for bit in range(32):
        assert abs(((words >> np.uint32(bit)) & 1).mean() - 0.5) < 2.5 / np.sqrt(n), f"bit {bit}"


@BOTH
def test_dropout_is_of_forward_alone(module: Any) -> None:
    layer = module.Dropout(0.5)
    x = inputs((50, 40))
    assert_same_bits(layer(x), x)
    (one, _), (other, _) = layer.forward(x), layer.forward(x)
    assert not np.array_equal(one, other)
    assert not np.array_equal(layer.forward(x, seed=1)[0], layer.forward(x, seed=2)[0])
    y, tape = layer.forward(x, seed=1)
    np.testing.assert_array_equal(layer.backward(np.ones_like(x), tape) == 0, y == 0)


# Files, pickles, copies


@BOTH
@LAYERS
def test_files_pickles_and_copies(case: str, module: Any, tmp_path: Path) -> None:
    layer = build(case, module=module)
    x = given(layer, 4)
    layer.save(tmp_path / "layer")
    loaded = (fs.load if module is fs else fs.reference.load)(tmp_path / "layer")
    for other in (loaded, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), copy.copy(layer)):
        assert type(other) is type(layer) and other._config == layer._config and repr(other) == repr(layer)
        assert_same_bits(other(x), layer(x))
        for name, array in layer.parameters.items():
            other.parameters[name] = array + 1
        if layer.parameters and case != "norm_plain":
            assert not np.array_equal(other(x), layer(x))
    count = sum(array.size for array in layer.parameters.values())
    assert repr(layer).startswith(type(layer).__name__ + "(") and repr(layer).endswith(f"{count} parameters")
    with pytest.raises(AttributeError):
        layer.dtype = np.dtype("float64")


# Sequential


def stack(module: Any = fs, dtype: Any = "float32", dropout: float = 0.4) -> Any:
    """Something of everything."""
    return module.Sequential(
        module.Embedding(12, 5, dtype=dtype, seed=1),
        module.LSTM(5, 6, 2, dropout=dropout, bidirectional=True, dtype=dtype, seed=2),
        module.Dropout(dropout, dtype=dtype),
        module.Sequential(
            module.LayerNorm(12, dtype=dtype),
            module.Linear(12, 7, dtype=dtype, seed=3),
            module.GRU(7, 4, dtype=dtype, seed=4),
        ),
        module.Linear(4, 3, dtype=dtype, seed=5),
    )


@BOTH
def test_sequential_is_its_layers_one_after_another(module: Any) -> None:
    model = stack(module)
    embedding, lstm, dropout, inner, linear = model
    ids = np.random.default_rng(0).integers(0, 12, (4, 6))
    middle, _ = lstm(embedding(ids))
    last, _ = inner[2](inner[1](inner[0](middle)))
    y = model(ids)
    assert_same_bits(y, linear(last))
    assert len(model) == 5 and model[2] is dropout and model.layers[-1] is linear
    assert set(model.parameters) == {
        f"{place}.{name}" for place, layer in enumerate(model) for name in layer.parameters
    }
    assert "3.1.weight" in model.parameters
    still = stack(module, dropout=0.0)
    assert_same_bits(still.forward(ids)[0], still(ids))


@BOTH
@pytest.mark.parametrize("with_lengths", [False, True])
def test_finite_differences_through_sequential(with_lengths: bool, module: Any) -> None:
    model = stack(module, dtype="float64")
    ids = np.random.default_rng(0).integers(0, 12, (3, 4))
    options = {"lengths": np.array([4, 0, 3])} if with_lengths else {}
    y, tape = model.forward(ids, seed=3, **options)
    dy = gradient(y)
    assert model.backward(dy, tape) is None
    state = model.state_dict()
    rng = np.random.default_rng(1)
    for name, array in state.items():
        direction = rng.normal(size=array.shape)
        losses = []
        for sign in (1, -1):
            model.parameters[name] = array + sign * 1e-5 * direction
            losses.append((model.forward(ids, seed=3, **options)[0] * dy).sum())
        model.parameters[name] = array
        slope = (losses[0] - losses[1]) / 2e-5
        found = (model.grads[name] * direction).sum()
        assert abs(found - slope) <= 1e-6 * max(abs(slope), np.abs(model.grads[name]).max()), name


@pytest.mark.every_isa
def test_sequential_against_the_reference() -> None:
    model = stack()
    exact = stack(fs.reference, "float64")
    exact.load_state_dict(model.state_dict())
    ids, lengths = np.random.default_rng(0).integers(0, 12, (5, 6)), random_lengths(5, 6)
    for options in ({}, {"lengths": lengths}):
        y, grads = train(model, ids, **options)
        expected, expected_grads = train(exact, ids, **options)
        assert_close(y, expected, tolerance("float32", 12, 6))
        for name, array in grads.items():
            assert_close(array, expected_grads[name], 4 * tolerance("float32", 30, 6), name)


@BOTH
def test_nothing_past_a_length_matters(module: Any) -> None:
    """Whatever stands there, in x and in dy; outputs and dx are +0, even behind a layer with a bias."""
    lengths = np.array([5, 0, 2, 4])
    past = np.arange(5) >= lengths[:, None]
    for layers in (
        lambda: [module.Linear(3, 4, seed=1), module.LSTM(4, 4, seed=2), module.Linear(4, 2, seed=3)],
        lambda: [module.LSTM(3, 4, seed=2), module.LayerNorm(4)],
        lambda: [module.LayerNorm(3), module.Dropout(0.2), module.GRU(3, 4, seed=2)],
    ):
        model = module.Sequential(*layers())
        x = inputs((4, 5, 3))
        x[past] = 0
        y, tape = model.forward(x, lengths=lengths, seed=1)
        dy = gradient(y)
        dx = model.backward(dy, tape)
        expected = {name: array.copy() for name, array in model.grads.items()}
        for array in (y, dx, model(x, lengths=lengths)):
            assert not array[past].any() and not np.signbit(array[past]).any()
        for garbage in (np.nan, np.inf, 1e30):
            x[past], dy[past] = garbage, garbage
            model.zero_grad()
            again, tape = model.forward(x, lengths=lengths, seed=1)
            assert_same_bits(again, y)
            assert_same_bits(model(x, lengths=lengths), model(np.nan_to_num(x), lengths=lengths))
            assert_same_bits(model.backward(dy, tape), dx)
            for name, array in model.grads.items():
                assert_same_bits(array, expected[name], name)
    symbols = stack(module)
    ids = np.random.default_rng(0).integers(0, 12, (4, 5))
    wild = np.where(past, 99, ids)
    assert_same_bits(symbols(wild, lengths=lengths), symbols(ids, lengths=lengths))
    with pytest.raises(ValueError, match="ids"):
        symbols(wild)


@BOTH
def test_infinite_weights_do_not_reach_what_is_past_a_length(module: Any) -> None:
    model = module.Sequential(module.Linear(3, 4))
    model.parameters["0.weight"] = np.full((4, 3), np.inf)
    past = np.arange(5) >= np.array([[3], [0]])
    with np.errstate(all="ignore"):
        y, tape = model.forward(inputs((2, 5, 3)), lengths=[3, 0])
        dx = model.backward(np.ones_like(y), tape)
    for array in (y, dx):
        assert not array[past].any() and not np.isfinite(array[~past]).any()


@BOTH
def test_layers_of_a_sequential_drop_each_their_own(module: Any) -> None:
    model = module.Sequential(module.Dropout(0.5), module.Sequential(module.Dropout(0.5), module.Dropout(0.5)))
    y, _ = model.forward(np.ones((1000, 50)), seed=3)
    assert set(np.unique(y)) == {0, 8}
    assert abs((y != 0).mean() - 1 / 8) < 0.01


@BOTH
def test_what_sequential_refuses(module: Any) -> None:
    linear = module.Linear(3, 3)
    with pytest.raises(ValueError, match="twice"):
        module.Sequential(linear, module.Dropout(), linear)
    with pytest.raises(ValueError, match="twice"):
        module.Sequential(linear, module.Sequential(module.Dropout(), linear))
    with pytest.raises(TypeError, match=r"layers\[1\]"):
        module.Sequential(linear, module.Linear)
    with pytest.raises(ValueError, match=r"one dtype.*layers\[1\]"):
        module.Sequential(linear, module.Linear(3, 3, dtype="float64"))
    model = module.Sequential(linear)
    with pytest.raises(ValueError, match="x should be of shape"):
        model(np.zeros(3), lengths=[1])
    with pytest.raises(ValueError, match="lengths"):
        model(np.zeros((2, 4, 3)), lengths=[1, 5])
    with pytest.raises(ValueError, match="dy should be of shape"):
        y, tape = model.forward(np.zeros((2, 3)))
        model.backward(y[:1], tape)
    with pytest.raises(ValueError, match="tape"):
        module.Sequential(module.Linear(3, 3)).backward(y, tape)


@BOTH
def test_grads_of_sequential(module: Any) -> None:
    model = stack(module)
    ids = np.random.default_rng(0).integers(0, 12, (3, 4))
    y, tape = model.forward(ids, seed=1)
    own = {name: np.zeros_like(array) for name, array in model.parameters.items()}
    model.backward(gradient(y), tape, grads=own)
    assert not any(array.any() for array in model.grads.values())
    model.backward(gradient(y), tape)
    for name, array in model.grads.items():
        assert array.any()
        assert_same_bits(array, own[name], name)
    assert not np.array_equal(model.forward(ids, seed=2)[0], y)
    assert_same_bits(model.forward(ids, seed=1)[0], y)


@BOTH
def test_files_pickles_and_copies_of_sequential(module: Any, tmp_path: Path) -> None:
    model = stack(module)
    ids = np.random.default_rng(0).integers(0, 12, (3, 4))
    model.save(tmp_path / "model")
    loaded = (fs.load if module is fs else fs.reference.load)(tmp_path / "model")
    for other in (loaded, pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
        assert [type(layer) for layer in other] == [type(layer) for layer in model]
        assert other._config == model._config and repr(other) == repr(model)
        assert_same_bits(other(ids), model(ids))
        assert_same_bits(other.forward(ids, seed=3)[0], model.forward(ids, seed=3)[0])
        other.parameters["4.bias"] = np.ones(3)
        assert not np.array_equal(other(ids), model(ids))
    assert repr(model).startswith("Sequential(Embedding(num_embeddings=12, ")


def test_a_sequential_of_what_no_file_can_hold(tmp_path: Path) -> None:
    class Own(fs.Linear):
        pass

    with pytest.raises(TypeError, match="not a Own, unless it is given to fastseq.register"):
        fs.Sequential(Own(2, 3)).save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config",
    [
        {"layers": 3},
        {"layers": [3]},
        {"layers": []},
        {"layers": [{"class": "Linear"}]},
        {"layers": [{"class": "State", "config": {}}]},
        {"layers": [{"class": "load", "config": {"path": "/etc/passwd"}}]},
        {"layers": [{"class": ["Linear"], "config": {}}]},
        {"layers": [{"class": "Linear", "config": {"in_features": 2, "out_features": -3}}]},
        {"layers": [{"class": "Linear", "config": {"in_features": 2, "out_features": 4}}]},
        [],
        "layers",
        None,
        3,
    ],
)
def test_a_damaged_sequential(config: Any, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "model"
    fs.Sequential(fs.Linear(2, 3)).save(path)
    metadata = {"fastseq.format": io._FORMAT, "fastseq.class": "Sequential", "fastseq.config": json.dumps(config)}
    save_file(load_file(path), path, metadata)
    with pytest.raises(ValueError, match=r"path: .* is damaged"):
        fs.load(path)


def test_pytorch_sequential() -> None:
    torch = pytorch()
    ours = fs.Sequential(
        fs.Linear(4, 6, dtype="float64"), fs.LayerNorm(6, dtype="float64"), fs.Linear(6, 2, dtype="float64")
    )
    theirs = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 2)).double()
    ours.load_state_dict({name: array.numpy() for name, array in theirs.state_dict().items()})
    x = inputs((5, 4), "float64")
    y, grads = train(ours, x)
    tensor = torch.tensor(x, requires_grad=True)
    out = theirs(tensor)
    out.backward(torch.tensor(gradient(y)))
    assert_close(y, out.detach().numpy(), 1e-9)
    assert_close(grads["x"], tensor.grad.numpy(), 1e-9)
    for name, parameter in theirs.named_parameters():
        assert_close(grads[name], parameter.grad.numpy(), 1e-9, name)
