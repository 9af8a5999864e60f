"""The reference and the compiled layers against PyTorch: what both share, only an outsider can judge."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from common import (
    KINDS,
    NOT_IN_PYTORCH,
    assert_agree,
    assert_close,
    inputs,
    make,
    random_lengths,
    random_state,
    reduction,
    tolerance,
)

import fastseq as fs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch's own, while it starts
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: take the extra 'peers'")

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

SHARED = [kind for kind in KINDS if kind not in NOT_IN_PYTORCH]


def twin(layer: Any) -> Any:
    """PyTorch's layer of the same configuration, with weights of its own."""
    more: dict[str, Any] = {}
    if hasattr(layer, "nonlinearity"):
        more["nonlinearity"] = layer.nonlinearity
    if layer.proj_size:
        more["proj_size"] = layer.proj_size
    return getattr(torch.nn, type(layer).__name__)(
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        bias=layer.bias,
        bidirectional=layer.bidirectional,
        batch_first=True,
        dtype=getattr(torch, layer.dtype.name),
        **more,
    )


def with_weights(layer: Any) -> Any:
    other = twin(layer)
    other.load_state_dict({name: torch.tensor(array) for name, array in layer.state_dict().items()})
    return other


def call(module: Any, x: Any, state: Any, lengths: Any = None) -> tuple[Any, Any]:
    """PyTorch on arrays in our order of axes; returns outputs and a state in it."""
    theirs = [torch.tensor(np.ascontiguousarray(array.swapaxes(0, 1))) for array in state]
    start = tuple(theirs) if len(theirs) == 2 else theirs[0]
    sequence: Any = torch.tensor(x)
    pack, pad = torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence
    with torch.no_grad():
        if lengths is not None:
            sequence = pack(sequence, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
        y, end = module(sequence, start)
        if lengths is not None:
            y, _ = pad(y, batch_first=True, total_length=x.shape[1])
    ends = end if isinstance(end, tuple) else (end,)
    return y.numpy(), type(state)(*(array.numpy().swapaxes(0, 1) for array in ends))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("kind", SHARED)
def test_against_pytorch(kind: str, num_layers: int, bidirectional: bool, bias: bool) -> None:
    """The reference in float64 closely, the compiled layers in both dtypes as the contract says."""
    config: dict[str, Any] = {"num_layers": num_layers, "bidirectional": bidirectional, "bias": bias}
    exact = make(kind, 5, 8, **config, dtype="float64", module=fs.reference)
    oracle = with_weights(exact)
    x, state = inputs((6, 7, 5), "float64"), random_state(exact, 6)
    # PyTorch refuses rows of no steps.
    for lengths in (None, np.maximum(random_lengths(6, 7), 1), np.array([3, 7, 1, 7, 2, 5])):
        expected = call(oracle, x, state, lengths)
        assert_agree(exact(x, state, lengths=lengths), expected, 1e-13, "reference")
        for dtype in ("float64", "float32"):
            layer = make(kind, 5, 8, **config, dtype=dtype)
            layer.load_state_dict(exact.state_dict())
            given = type(state)(*(array.astype(dtype) for array in state))
            # In float32 the weights and inputs are rounded too; the map does not expand, so that is a few eps.
            relative = tolerance(dtype, reduction(layer), 7)
            assert_agree(layer(x.astype(dtype), given, lengths=lengths), expected, relative, dtype)


@pytest.mark.parametrize("kind", SHARED)
def test_compiled_against_pytorch_in_float32(kind: str) -> None:
    layer = make(kind, 40, 130, num_layers=2, bidirectional=True)
    x, state, lengths = inputs((9, 25, 40)), random_state(layer, 9), np.maximum(random_lengths(9, 25), 1)
    expected = call(with_weights(layer), x, state, lengths)
    assert_agree(layer(x, state, lengths=lengths), expected, tolerance("float32", reduction(layer), 25))


@pytest.mark.parametrize("kind", SHARED)
def test_step_against_pytorch(kind: str) -> None:
    layer = make(kind, 5, 8, num_layers=3, dtype="float64")
    oracle = with_weights(layer)
    x, ours = inputs((4, 6, 5), "float64"), random_state(layer, 4)
    theirs = ours
    for t in range(6):
        expected, theirs = call(oracle, x[:, t : t + 1], theirs)
        y_t, ours = layer.step(x[:, t], ours)
        assert_agree((y_t, ours), (expected[:, 0], theirs), tolerance("float64", 16, 6))


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("kind", SHARED)
def test_a_pytorch_state_dict_loads_as_it_is(kind: str, bidirectional: bool) -> None:
    for module in (fs, fs.reference):
        layer = make(kind, 5, 8, num_layers=2, bidirectional=bidirectional, module=module)
        oracle = twin(layer)
        assert list(oracle.state_dict()) == list(layer.state_dict())
        layer.load_state_dict(oracle.state_dict())
        x, state = inputs((3, 4, 5)), random_state(layer, 3)
        assert_agree(layer(x, state), call(oracle, x, state), tolerance("float32", 24, 4))


def test_a_pytorch_tensor_is_an_array() -> None:
    layer = make("lstm", 5, 8)
    x, state = inputs((3, 4, 5)), random_state(layer, 3)
    expected, end = layer(x, state)
    y, other = layer(torch.tensor(x), tuple(torch.tensor(array) for array in state), lengths=torch.tensor([4, 4, 4]))
    assert_close(y, expected, 0)
    assert other == end


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: torch.nn.LSTM(5, 9), "LSTM(5, 9)"),
        (lambda: torch.nn.GRU(5, 8), "GRU(5, 8)"),
        (lambda: torch.nn.RNN(5, 8), "RNN(5, 8)"),
        (lambda: torch.nn.LSTM(5, 8, num_layers=2), "LSTM(5, 8, num_layers=2)"),
        (lambda: torch.nn.LSTM(5, 8, bidirectional=True), "LSTM(5, 8, bidirectional=True)"),
        (lambda: torch.nn.LSTM(5, 8, bias=False), "LSTM(5, 8, bias=False)"),
        (lambda: torch.nn.LSTM(5, 8, proj_size=3), "LSTM(5, 8, proj_size=3)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_state_dict_of_another_layer_is_recognised(made: Any, said: str) -> None:
    layer = make("lstm", 5, 8)
    before = layer.state_dict()
    with pytest.raises(ValueError, match="mapping") as caught:
        layer.load_state_dict(made().state_dict())
    assert said in str(caught.value)
    assert all((layer.parameters[name] == array).all() for name, array in before.items())


def test_a_prefix_is_recognised() -> None:
    model = torch.nn.ModuleDict({"encoder": torch.nn.LSTM(5, 8)})
    with pytest.raises(ValueError, match=r"'encoder\.'"):
        make("lstm", 5, 8).load_state_dict(model.state_dict())


def test_tensors_that_numpy_cannot_take_are_named() -> None:
    layer = make("lstm", 5, 8)
    weights = torch.nn.LSTM(5, 8).bfloat16().state_dict()
    with pytest.raises((TypeError, ValueError), match="weight_ih_l0"):
        layer.load_state_dict(weights)


def test_a_tensor_that_numpy_cannot_take_is_named() -> None:
    layer = make("lstm", 5, 8)
    for x in (torch.zeros(1, 2, 5, requires_grad=True), torch.zeros(1, 2, 5, dtype=torch.bfloat16)):
        with pytest.raises((TypeError, ValueError), match=r"\bx\b"):
            layer(x)
