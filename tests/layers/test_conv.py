"""Conv1d: both engines, PyTorch, finite differences, lengths, streams, bits, bad input, planted mistakes."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import Array, assert_close, assert_same_bits, inputs, random_lengths, strange, threads, tolerance

import fastseq as fs

BOTH = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])

# Channels in and out, size of windows, settings.
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "plain": (5, 7, 3, {}),
    "one": (3, 4, 1, {}),
    "wide": (33, 70, 5, {"padding": 2}),
    "causal": (6, 9, 4, {"padding": "causal"}),
    "same": (6, 9, 4, {"padding": "same", "bias": False}),
    "strided": (6, 5, 3, {"stride": 2, "padding": 1}),
    "far": (4, 5, 2, {"stride": 5, "padding": (0, 3)}),
    "same strided": (4, 5, 4, {"stride": 3, "padding": "same"}),
    "dilated": (4, 5, 3, {"dilation": 3, "padding": "causal"}),
    "dilated strided": (4, 5, 5, {"dilation": 2, "stride": 4, "padding": (3, 1)}),
    "dilated and strided alike": (4, 5, 4, {"dilation": 3, "stride": 3, "padding": 4}),
    "grouped": (6, 9, 3, {"groups": 3, "padding": 1}),
    "depthwise": (35, 35, 3, {"groups": 35, "padding": "causal"}),
    "depthwise dilated": (9, 9, 3, {"groups": 9, "padding": (1, 4), "dilation": 2, "stride": 2}),
    "depthwise twice": (5, 10, 3, {"groups": 5, "padding": 2, "stride": 2}),
    "grouped dilated": (6, 4, 3, {"groups": 2, "dilation": 2, "stride": 3, "padding": 3}),
    "more padding than frames": (3, 4, 2, {"padding": (40, 30), "stride": 3}),
}
LAYERS = pytest.mark.parametrize("case", CASES)
STREAMS = pytest.mark.parametrize(
    "settings",
    [
        {"padding": "causal"},
        {"padding": "valid"},
        {"padding": (2, 0)},
        {"padding": "causal", "stride": 2},
        {"padding": "valid", "stride": 3, "dilation": 2},
        {"padding": "causal", "dilation": 3, "groups": 2},
        {"padding": (3, 0), "stride": 7},
        {"padding": "causal", "groups": 6},
    ],
    ids=str,
)


def build(case: str, *, dtype: Any = "float32", module: Any = fs) -> Any:
    """A layer whose parameters are all random and distinct."""
    inner, outer, size, settings = CASES[case]
    layer = module.Conv1d(inner, outer, size, **settings, dtype=dtype)
    rng = np.random.default_rng(8)
    layer.load_state_dict({n: rng.normal(size=old.shape) / 3 for n, old in layer.parameters.items()})
    return layer


def wider(layer: Any) -> Any:
    """The same layer over NumPy, in a wider dtype."""
    dtype = "float64" if layer.dtype == np.float32 else np.longdouble
    other = fs.reference.Conv1d(**{**layer._config, "dtype": dtype})
    other.load_state_dict(layer.state_dict())
    return other


def train(layer: Any, x: Array, **options: Any) -> dict[str, Array]:
    """y, dx and the gradients of all parameters."""
    y, tape = layer.forward(x, **options)
    grads = {name: np.zeros_like(array) for name, array in layer.parameters.items()}
    dy = np.random.default_rng(10).normal(size=y.shape).astype(y.dtype)
    return {"y": y, "dx": layer.backward(dy, tape, grads=grads), **grads}


def compare(layer: Any, x: Array, **options: Any) -> None:
    """All that a layer computes, against the reference in a wider dtype."""
    exact = wider(layer)
    found, expected = train(layer, x, **options), train(exact, x.astype(exact.dtype), **options)
    k = layer.kernel_size * layer.in_channels
    for name, array in found.items():
        terms = {"y": k, "dx": layer.kernel_size * layer.out_channels}.get(name, found["y"].shape[0] * x.shape[1])
        assert array.dtype == layer.dtype
        assert_close(array, expected[name], (1 if name == "y" else 4) * tolerance(layer.dtype, terms, 1), name)
    assert_same_bits(layer(x, **options), found["y"], "call and forward")


@pytest.mark.every_isa
@DTYPES
@LAYERS
def test_parity(case: str, dtype: str) -> None:
    layer = build(case, dtype=dtype)
    for batch, time in ((3, 17), (1, 60), (2, 1), (5, 4), (0, 5), (3, 0)):
        x = inputs((batch, time, layer.in_channels), dtype)
        compare(layer, x)
        compare(layer, x, lengths=random_lengths(batch, time) if time else np.zeros(batch, int))
    compare(layer, inputs((17, layer.in_channels), dtype))


@pytest.mark.every_isa
@DTYPES
def test_parity_of_work_for_several_threads(dtype: str) -> None:
    for inner, outer, size, settings in (
        (64, 130, 3, {"padding": 1}),
        (300, 40, 4, {"stride": 2}),
        (60, 90, 5, {"dilation": 2, "padding": "causal", "groups": 2}),
        (200, 200, 7, {"groups": 200, "padding": "same"}),
    ):
        layer = fs.Conv1d(inner, outer, size, seed=1, dtype=dtype, **settings)
        x, lengths = inputs((4, 160, inner), dtype), np.array([160, 3, 80, 121])
        with threads(3):
            compare(layer, x, lengths=lengths)


@BOTH
def test_by_hand(module: Any) -> None:
    layer = module.Conv1d(1, 1, 3, dtype="float64", padding=(2, 0))
    layer.load_state_dict({"weight": [[[1.0, 10.0, 100.0]]], "bias": [5.0]})
    x = np.array([[1.0], [2.0], [3.0], [4.0]])
    np.testing.assert_array_equal(layer(x)[:, 0], [105, 215, 326, 437])
    _, tape = layer.forward(x)
    dx = layer.backward(np.array([[1.0], [0.0], [0.0], [2.0]]), tape)
    np.testing.assert_array_equal(dx[:, 0], [100, 2, 20, 200])
    np.testing.assert_array_equal(layer.grads["weight"], [[[4.0, 6.0, 9.0]]])
    np.testing.assert_array_equal(layer.grads["bias"], [3.0])


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")
def test_against_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch (the extra `peers`) is not installed")
    for case, (inner, outer, size, settings) in CASES.items():
        padding = settings.get("padding", 0)
        if padding == "same" and "stride" in settings:
            continue  # PyTorch has no such layer
        layer = build(case, dtype="float64")
        peer = torch.nn.Conv1d(
            inner, outer, size, **{**settings, "padding": padding if padding == "same" else 0}, dtype=torch.float64
        )
        peer.load_state_dict({name: torch.tensor(array) for name, array in layer.state_dict().items()})
        x = inputs((3, 23, inner), "float64")
        both = layer._ends if padding != "same" else (0, 0)
        wide = torch.tensor(np.pad(x, ((0, 0), both, (0, 0))).swapaxes(1, 2).copy(), requires_grad=True)
        expected = peer(wide)
        found = train(layer, x)
        dy = np.random.default_rng(10).normal(size=found["y"].shape)
        expected.backward(torch.tensor(dy.swapaxes(1, 2).copy()))
        pairs = {
            "y": expected.detach(),
            "dx": wide.grad[:, :, both[0] : both[0] + 23],
            "weight": peer.weight.grad,
            **({"bias": peer.bias.grad} if layer.bias else {}),
        }
        for name, array in pairs.items():
            other = array.numpy() if name in ("weight", "bias") else array.numpy().swapaxes(1, 2)
            assert_close(found[name], other, 1e-13, f"{case}: {name}")


def test_starts_as_pytorch_does() -> None:
    """Uniform in ±1/sqrt(K C / groups), both parameters; names and shapes are PyTorch's."""
    layer = fs.Conv1d(64, 64, 5, groups=4, seed=3)
    assert {name: array.shape for name, array in layer.parameters.items()} == {"weight": (64, 16, 5), "bias": (64,)}
    for array in layer.parameters.values():
        assert 0.9 < np.abs(array).max() * np.sqrt(80) <= 1
    again = fs.Conv1d(64, 64, 5, groups=4, seed=3)
    for name, array in layer.parameters.items():
        assert_same_bits(again.parameters[name], array)
    assert not np.array_equal(fs.Conv1d(64, 64, 5, groups=4).parameters["weight"], layer.parameters["weight"])


@BOTH
@LAYERS
def test_finite_differences(case: str, module: Any) -> None:
    layer = build(case, dtype="float64", module=module)
    x, lengths = inputs((2, 9, layer.in_channels), "float64"), np.array([9, 5])
    found = train(layer, x, lengths=lengths)
    dy = np.random.default_rng(10).normal(size=found["y"].shape)
    rng = np.random.default_rng(4)

    def loss(x: Array, arrays: dict[str, Array]) -> float:
        layer.load_state_dict(arrays)
        return float((layer(x, lengths=lengths) * dy).sum())

    start = layer.state_dict()
    for name, array in {"dx": x, **start}.items():
        for _ in range(3):
            way = rng.normal(size=array.shape)
            ends = [
                loss(x + step * way, start) if name == "dx" else loss(x, {**start, name: array + step * way})
                for step in (-1e-6, 1e-6)
            ]
            slope = (ends[1] - ends[0]) / 2e-6
            assert abs(slope - (found[name] * way).sum()) < 1e-7 * max(1, abs(slope)), name


# Lengths


@BOTH
@LAYERS
def test_output_lengths(case: str, module: Any) -> None:
    """Of a row alone it is the shape of its outputs."""
    layer = build(case, module=module)
    times = np.arange(31)
    expected = [layer(np.zeros((1, time, layer.in_channels), "float32")).shape[1] for time in times]
    found = layer.output_lengths(times)
    assert found.dtype == np.int64 and found.tolist() == expected
    assert layer.output_lengths(7).shape == () and layer.output_lengths([[3, 4]]).shape == (1, 2)
    for value, error in (([-1], ValueError), ([1.5], TypeError), ([True], TypeError)):
        with pytest.raises(error, match="lengths"):
            layer.output_lengths(value)


@BOTH
@DTYPES
@LAYERS
def test_a_padded_row_is_the_row_alone(case: str, dtype: str, module: Any) -> None:
    """In bits, whatever stands in the padding, and +0 past the lengths."""
    layer = build(case, dtype=dtype, module=module)
    lengths = np.array([12, 0, 5, 1, 9])
    x = inputs((5, 12, layer.in_channels), dtype)
    clean = train(layer, x, lengths=lengths)
    dirty = x.copy()
    dirty[np.arange(12) >= lengths[:, None]] = np.nan
    y, tape = layer.forward(dirty, lengths=lengths)
    dy = np.random.default_rng(10).normal(size=y.shape).astype(dtype)
    counts = layer.output_lengths(lengths)
    dy[np.arange(y.shape[1]) >= counts[:, None]] = np.inf
    grads = {name: np.zeros_like(array) for name, array in layer.parameters.items()}
    for name, array in {"y": y, "dx": layer.backward(dy, tape, grads=grads), **grads}.items():
        assert_same_bits(array, clean[name], name)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        assert not np.signbit(y[row, count:]).any() and not y[row, count:].any()
        assert not clean["dx"][row, length:].any()
        if module is fs:  # NumPy's product of a row is not that of several
            own = x[row : row + 1, :length]
            alone, tape = layer.forward(own)
            assert_same_bits(y[row : row + 1, :count], alone, f"row {row}")
            back = layer.backward(np.ascontiguousarray(dy[row : row + 1, :count]), tape)
            assert_same_bits(clean["dx"][row : row + 1, :length], back, f"dx of row {row}")


@BOTH
def test_rows_of_a_list(module: Any) -> None:
    layer = build("causal", module=module)
    rows = [inputs((n, 6), seed=n) for n in (4, 7, 2)]
    padded = np.zeros((3, 7, 6), "float32")
    for into, row in zip(padded, rows, strict=True):
        into[: len(row)] = row
    assert_same_bits(layer(rows), layer(padded, lengths=[4, 7, 2]))


# Bits


@pytest.mark.every_isa
@DTYPES
@LAYERS
def test_same_bits_in_any_batch_and_on_any_threads(case: str, dtype: str) -> None:
    layer = build(case, dtype=dtype)
    x, lengths = inputs((7, 90, layer.in_channels), dtype), random_lengths(7, 90)
    whole = train(layer, x, lengths=lengths)
    for n in (2, 3, 8):
        with threads(n):
            for name, array in train(layer, x, lengths=lengths).items():
                assert_same_bits(array, whole[name], f"{name} on {n} threads")
    for rows in ([3], [6, 2], [0, 1, 2, 3, 4]):
        assert_same_bits(layer(x[rows], lengths=lengths[rows]), whole["y"][rows])
    assert_same_bits(layer(x[2]), layer(x[[2, 5]])[0])


@pytest.mark.every_isa
def test_same_bits_of_every_number_of_windows() -> None:
    """How windows are put into tiles and blocks changes no bit."""
    layer = fs.Conv1d(4, 300, 3, padding=1, seed=1)
    x = inputs((1, 1200, 4))
    whole = layer(x)
    for time in (1, 2, 5, 6, 7, 11, 12, 13, 47, 300, 511, 512, 1023):
        assert_same_bits(layer(x[:, : time + 1])[:, :time], whole[:, :time], str(time))


@DTYPES
def test_memory_of_any_kind(dtype: str) -> None:
    for case in ("strided", "dilated", "grouped", "depthwise"):
        layer = build(case, dtype=dtype)
        x = inputs((3, 17, layer.in_channels), dtype)
        expected = train(layer, x)
        dy = np.random.default_rng(10).normal(size=expected["y"].shape).astype(dtype)
        for name, array in strange(x).items():
            assert_same_bits(layer(array), expected["y"], name)
        _, tape = layer.forward(x)
        for name, array in strange(dy).items():
            assert_same_bits(layer.backward(array, tape), expected["dx"], name)


@BOTH
def test_a_tape_belongs_to_its_forward(module: Any) -> None:
    layer = build("strided", module=module)
    x = inputs((2, 9, 6))
    expected = train(layer, x)
    y, tape = layer.forward(x)
    layer.parameters["weight"] = layer.parameters["weight"] * 3
    dy = np.random.default_rng(10).normal(size=y.shape).astype(y.dtype)
    for times in (1, 2):
        assert_same_bits(layer.backward(dy, tape), expected["dx"])
        assert_close(layer.grads["weight"], times * expected["weight"], 1e-6)
    assert not np.array_equal(layer(x), y)
    with pytest.raises(ValueError, match="tape"):
        build("strided", module=module).backward(dy, tape)


# Streams


@pytest.mark.every_isa
@DTYPES
@BOTH
@STREAMS
def test_steps_and_chunks_are_the_call(settings: dict[str, Any], module: Any, dtype: str) -> None:
    layer = module.Conv1d(6, 6, 4, **settings, dtype=dtype, seed=1)
    assert layer.carries_state
    x = inputs((3, 29, 6), dtype)
    same = assert_same_bits if module is fs else lambda a, b: assert_close(a, b, 1e-6)  # as NumPy's products have them
    whole, end = layer.run(x)
    same(whole, layer(x))
    state, outputs = layer.initial_state(3), []
    for t in range(29):
        before = state.copy()
        y_t, after = layer.step(x[:, t], state)
        assert state == before, "a state was changed"
        completes = layer.output_lengths(t + 1) - layer.output_lengths(t)
        assert (y_t is not None) == bool(completes) and completes in (0, 1)
        if y_t is not None:
            assert y_t.shape == (3, 6)
            outputs.append(y_t)
        state = after
    same(np.stack(outputs, axis=1), whole)
    assert state == end
    for cuts in ([1], [3, 3, 4, 20], [28], [5, 6, 7, 8, 9]):
        state, outputs = None, []
        for start, stop in itertools.pairwise([0, *cuts, 29]):
            y, state = layer.run(x[:, start:stop], state)
            outputs.append(y)
        same(np.concatenate(outputs, axis=1), whole)
        assert state == end


@BOTH
@STREAMS
def test_a_state_is_that_of_each_row(settings: dict[str, Any], module: Any) -> None:
    """At the last real frame of each, and any rows of it go on alone."""
    layer = module.Conv1d(6, 6, 4, **settings, dtype="float64", seed=1)
    x, lengths = inputs((3, 20, 6), "float64"), np.array([20, 2, 13])
    y, state = layer.run(x, lengths=lengths)
    more = inputs((3, 9, 6), "float64", 5)
    for row, length in enumerate(lengths):
        own, end = layer.run(x[row : row + 1, :length])
        assert_close(y[row : row + 1, : own.shape[1]], own, 1e-14)
        assert not y[row, own.shape[1] :].any()
        assert state[row] == end
        further, _ = layer.run(more[row : row + 1], state[row])
        assert_close(
            np.concatenate([own, further], axis=1),
            layer(np.concatenate([x[row : row + 1, :length], more[row : row + 1]], axis=1)),
            1e-14,
        )
    assert type(state).concatenate([state[0], state[1:]]) == state
    if settings == {"padding": "causal"}:
        layer.run(more, state)  # all rows always have an output
    elif len(set(state.wait.tolist())) > 1:
        with pytest.raises(ValueError, match=r"state\.wait should be the same in all rows"):
            layer.run(more, state)


@BOTH
def test_training_on_chunks(module: Any) -> None:
    """Outputs are those of the whole; gradients go back to the frames of the chunk, and no further."""
    layer = module.Conv1d(3, 4, 3, padding="causal", dilation=2, dtype="float64", seed=0)
    x = inputs((2, 12, 3), "float64")
    whole, tape = layer.forward(x)
    dy = np.random.default_rng(10).normal(size=whole.shape)
    whole_dx = layer.backward(dy, tape)
    grads = {name: array.copy() for name, array in layer.grads.items()}
    layer.zero_grad()
    state, dx = None, []
    for part in (slice(0, 5), slice(5, 12)):
        y, state, tape = layer.forward_carrying(x[:, part], state)
        assert_close(y, whole[:, part], 1e-14)
        dx.append(layer.backward_carrying(dy[:, part], tape, truncate=1))
    assert_close(dx[1], whole_dx[:, 5:], 1e-14)
    assert_close(dx[0][:, :1], whole_dx[:, :1], 1e-14)  # frame 0 is in no window of the second chunk
    for name, array in grads.items():
        assert_close(layer.grads[name], array, 1e-13)


@BOTH
def test_layers_that_run_on_no_stream(module: Any) -> None:
    for settings in ({"padding": 1}, {"padding": "same"}, {"padding": (9, 0)}, {"stride": 2, "padding": "same"}):
        layer = module.Conv1d(2, 3, 3, **settings)
        assert not layer.carries_state and "padding" in layer.unstreamable()
        x = inputs((2, 5, 2))
        y, state = layer.run(x)
        assert state is None
        assert_same_bits(y, layer(x))
        for call in (lambda: layer.step(x[:, 0]), lambda: layer.initial_state(2)):  # noqa: B023
            with pytest.raises(ValueError, match="padding='causal'"):
                call()
        with pytest.raises(ValueError, match="state should be None"):
            layer.run(x, 3)
    for settings in ({"padding": "valid"}, {"padding": "causal", "stride": 2}):
        assert "every frame" in module.Conv1d(2, 3, 3, **settings).unstreamable()
    assert module.Conv1d(2, 3, 3, padding="causal").unstreamable() is None


def test_values_of_states(tmp_path: Path) -> None:
    layer = fs.Conv1d(2, 3, 4, padding="causal", stride=2, seed=0)
    _, state = layer.run(inputs((3, 7, 2)))
    assert state.frames.shape == (3, 3, 2) and state.wait.tolist() == [1, 1, 1] and state.batch_size == 3
    assert repr(state) == "ConvState(frames=(3, 3, 2), wait=(3,), dtype=float32)"
    for other in (copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state)), fs.ConvState(*state)):
        assert other == state and other is not state and other.frames is not state.frames
    state.save(tmp_path / "state")
    assert fs.load(tmp_path / "state") == state
    assert state != fs.ConvState(state.frames, state.wait + 1) and state != fs.ConvState(state.frames + 1, state.wait)
    assert state.replaced(1, layer.initial_state(1))[1] == layer.initial_state(1)
    with pytest.raises(AttributeError, match="immutable"):
        state.frames = 3
    with pytest.raises(ValueError, match="read-only"):
        state.wait[0] = 3
    for arguments, error, message in (
        ((np.zeros((2, 3)), [0, 0]), ValueError, "frames should be of shape"),
        ((np.zeros((2, 3, 1), int), [0, 0]), TypeError, "frames should hold real"),
        ((np.zeros((2, 3, 1)), [0]), ValueError, "wait should be of shape"),
        ((np.zeros((2, 3, 1)), [0, -1]), ValueError, "wait should be 0 or more"),
        ((np.zeros((2, 3, 1)), [0, 0.5]), TypeError, "wait should hold integers"),
    ):
        with pytest.raises(error, match=message):
            fs.ConvState(*arguments)


# In containers, files and training


def stack(module: Any, dtype: str = "float64") -> Any:
    return module.Sequential(
        module.Conv1d(3, 6, 3, padding="causal", dtype=dtype, seed=1),
        module.ReLU(dtype=dtype),
        module.Conv1d(6, 4, 3, stride=2, padding="causal", dtype=dtype, seed=2),
        module.GRU(4, 5, dtype=dtype, seed=3),
        module.Conv1d(5, 2, 2, dtype=dtype, seed=4),
        module.Sigmoid(dtype=dtype),
    )


@BOTH
def test_in_a_sequential(module: Any) -> None:
    """Lengths change from layer to layer, forward and backward; a row is the row alone."""
    model = stack(module)
    assert model.time == "sequence" and model.output_lengths([0, 1, 2, 3, 10]).tolist() == [0, 0, 0, 1, 4]
    x, lengths = inputs((4, 11, 3), "float64"), np.array([11, 4, 0, 7])
    dirty = x.copy()
    dirty[np.arange(11) >= lengths[:, None]] = np.nan
    y, tape = model.forward(dirty, lengths=lengths)
    counts = model.output_lengths(lengths)
    dy = np.random.default_rng(10).normal(size=y.shape)
    dx = model.backward(np.where(np.arange(y.shape[1])[:, None] < counts[:, None, None], dy, np.nan), tape)
    grads = {name: array.copy() for name, array in model.grads.items()}
    model.zero_grad()
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        alone, tape = model.forward(x[row : row + 1, :length])
        assert_close(y[row : row + 1, :count], alone, 1e-14)
        assert not y[row, count:].any() and not dx[row, length:].any()
        assert_close(dx[row : row + 1, :length], model.backward(dy[row : row + 1, :count], tape), 1e-12)
    for name, array in grads.items():
        assert_close(model.grads[name], array, 1e-12, name)


def test_steps_of_a_sequential() -> None:
    """With the bits of a call; layers after one without an output stay where they are."""
    for dtype in ("float32", "float64"):
        model = stack(fs, dtype)
        x = inputs((2, 13, 3), dtype)
        whole, end = model.run(x)
        state, outputs = None, []
        for t in range(13):
            y_t, state = model.step(x[:, t], state)
            if y_t is not None:
                outputs.append(y_t)
        assert_same_bits(np.stack(outputs, axis=1), whole)
        assert state == end
        parts, state = [], None
        for start, stop in ((0, 4), (4, 5), (5, 13)):
            y, state = model.run(x[:, start:stop], state)
            parts.append(y)
        assert_same_bits(np.concatenate(parts, axis=1), whole)
        nested = fs.Sequential(fs.Sequential(*stack(fs, dtype).layers[:3]), *stack(fs, dtype).layers[3:])
        assert nested.step(x[:, 0])[0] is None
        with pytest.raises(ValueError, match="resets"):
            model.run(x, resets=np.zeros((2, 13), bool))


def test_trains_on_padded_rows() -> None:
    """The loss counts the outputs that a row has, not its frames: what is past them is no mistake."""
    model = fs.Sequential(fs.Conv1d(1, 8, 3, stride=2, seed=0), fs.ReLU(), fs.Conv1d(8, 1, 1, seed=1))
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 22, 40)
    x = rng.normal(size=(40, 21, 1)).astype("float32")
    y = x[:, :20:2] + x[:, 1:21:2] - x[:, 2:21:2]
    for row, length in enumerate(lengths):
        x[row, length:] = 50
        y[row, model.output_lengths(length) :] = 1e4
    batches = [fs.training.Batch(x[i : i + 8], y[i : i + 8], lengths[i : i + 8]) for i in range(0, 40, 8)]
    history = fs.training.fit(model, batches, loss="mse", optimiser="adam", lr=0.02, epochs=60, progress=False)
    assert history.epoch_loss[-1] < 0.05 < history.epoch_loss[0]


@BOTH
def test_saved_copied_and_described(module: Any, tmp_path: Path) -> None:
    for case in CASES:
        layer = build(case, module=module)
        x = inputs((2, 9, layer.in_channels))
        layer.save(tmp_path / "layer")
        read = fs.load if module is fs else fs.reference.load
        for other in (read(tmp_path / "layer"), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(other) is type(layer) and repr(other) == repr(layer)
            assert_same_bits(other(x), layer(x))
    layer = module.Conv1d(3, 4, 5, padding=(4, 0), stride=2)
    assert repr(layer).endswith("with 64 parameters") and "padding=(4, 0)" in repr(layer)
    assert layer._takes() == 3 and layer._gives() == 4
    with pytest.raises(ValueError, match="layers"):
        module.Sequential(layer, module.Linear(3, 2))


# Bad input


def test_bad_settings() -> None:
    for name, value, error in (
        ("in_channels", 0, ValueError),
        ("out_channels", 2.0, TypeError),
        ("kernel_size", 0, ValueError),
        ("kernel_size", 2**40, ValueError),
        ("kernel_size", "3", TypeError),
        ("stride", 0, ValueError),
        ("stride", True, TypeError),
        ("stride", 2**64, OverflowError),
        ("dilation", -1, ValueError),
        ("groups", 0, ValueError),
        ("groups", 4, ValueError),
        ("padding", -1, ValueError),
        ("padding", "full", ValueError),
        ("padding", (1, 2, 3), ValueError),
        ("padding", (1, -2), ValueError),
        ("padding", (1, "2"), TypeError),
        ("padding", None, TypeError),
        ("padding", 2**40, ValueError),
        ("bias", 1, TypeError),
        ("dtype", "int32", TypeError),
        ("seed", -1, ValueError),
    ):
        settings = {"in_channels": 6, "out_channels": 6, "kernel_size": 3, name: value}
        for module in (fs, fs.reference):
            with pytest.raises(error, match=name.replace("channels", "")):
                module.Conv1d(**settings)
    with pytest.raises(TypeError):
        fs.Conv1d(6, 6, 3, 1)  # type: ignore[misc]


@BOTH
def test_bad_arguments(module: Any) -> None:
    layer = module.Conv1d(3, 4, 2, padding="causal", stride=2, seed=0)
    x = inputs((2, 5, 3))
    y, tape = layer.forward(x)
    state = layer.initial_state(2)
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: layer(inputs((2, 5, 4))), ValueError, "x should be of shape"),
        (lambda: layer(inputs((3,))), ValueError, "x should be of shape"),
        (lambda: layer(inputs((1, 2, 5, 3))), ValueError, "x should be of shape"),
        (lambda: layer(x.astype(int)), TypeError, "x should hold real"),
        (lambda: layer(x.astype(complex)), TypeError, "x should hold real"),
        (lambda: layer(x, lengths=[6, 1]), ValueError, "lengths should be in 0..5"),
        (lambda: layer(x, lengths=[1]), ValueError, "lengths should be of shape"),
        (lambda: layer(x, lengths=[True, False]), TypeError, "lengths should hold integers"),
        (lambda: layer.forward(x, seed="a"), TypeError, "seed"),
        (lambda: layer.backward(y[:, :-1], tape), ValueError, "dy should be of shape"),
        (lambda: layer.backward(y, 3), TypeError, "tape"),
        (lambda: layer.backward(y, tape, grads={}), ValueError, "grads"),
        (lambda: layer.step(x), ValueError, "x_t should be of shape"),
        (lambda: layer.step(inputs((2, 4))), ValueError, "x_t should be of shape"),
        (lambda: layer.step(x[:, 0], layer.initial_state(3)), ValueError, r"state\.frames should be of shape"),
        (lambda: layer.step(x[:, 0], fs.State(np.zeros((2, 1, 3)))), TypeError, "state should be a ConvState"),
        (lambda: layer.step(x[:, 0], fs.ConvState(state.frames, [9, 9])), ValueError, r"state\.wait should be at most"),
        (
            lambda: layer.step(x[:, 0], fs.ConvState(state.frames, [0, 1])),
            ValueError,
            r"state\.wait should be the same",
        ),
        (lambda: layer.run(x, resets=np.zeros((2, 5), bool)), ValueError, "resets should be None"),
        (lambda: layer.initial_state(-1), ValueError, "batch_size"),
        (lambda: layer.load_state_dict({"weight": np.zeros((4, 3, 3)), "bias": np.zeros(4)}), ValueError, "weight"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    assert_same_bits(layer(x), y)


# Planted mistakes: each turns the comparison with the reference red


def _mirrored(layer: Any) -> dict[str, Array]:
    arrays = layer.state_dict()
    return {**arrays, "weight": arrays["weight"][:, :, ::-1]}


def _exchanged(layer: Any) -> dict[str, Array]:
    """Channels and places of a window taken for one another, as a weight of another layout would be."""
    arrays = layer.state_dict()
    weight = arrays["weight"]
    return {**arrays, "weight": weight.swapaxes(1, 2).reshape(weight.shape)}


MISTAKES: dict[str, Any] = {
    "windows mirrored": lambda layer: ({}, _mirrored(layer), {}),
    "layout exchanged": lambda layer: ({}, _exchanged(layer), {}),
    "one frame late": lambda layer: ({"padding": (4, 1)}, None, {}),
    "stride ignored": lambda layer: ({"stride": 1}, None, {}),
    "dilation ignored": lambda layer: ({"dilation": 1, "padding": (5, 2)}, None, {}),
    "lengths ignored": lambda layer: ({}, None, {"lengths": None}),
    "bias forgotten": lambda layer: ({}, {**layer.state_dict(), "bias": np.zeros(4)}, {}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes(mistake: str) -> None:
    settings = {"stride": 2, "dilation": 2, "padding": (3, 2)}
    layer = fs.Conv1d(3, 4, 3, **settings, dtype="float64", seed=2)
    x, lengths = inputs((3, 13, 3), "float64"), np.array([13, 8, 5])
    right = {"y": wider(layer)(x.astype(np.longdouble), lengths=lengths)}
    assert_close(layer(x, lengths=lengths), right["y"], 1e-14)
    changed, arrays, options = MISTAKES[mistake](layer)
    other = fs.Conv1d(3, 4, 3, **{**settings, **changed}, dtype="float64")
    other.load_state_dict(layer.state_dict() if arrays is None else arrays)
    wrong = other(x, **{"lengths": lengths, **options})[:, : right["y"].shape[1]]
    with pytest.raises(AssertionError, match=r"off by|shape"):
        assert_close(wrong, right["y"], 1e-14)


def test_planted_mistakes_of_groups() -> None:
    """Groups in another order: outputs, and the gradient of the weights."""
    layer = build("grouped", dtype="float64")
    x = inputs((2, 9, 6), "float64")
    right = train(wider(layer), x.astype(np.longdouble))
    turned = train(layer, np.roll(x, 2, axis=2))
    for name in ("y", "weight"):
        with pytest.raises(AssertionError, match="off by"):
            assert_close(turned[name], right[name], 1e-13)
