"""The gradients of both engines against PyTorch's autograd, in float64."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from common import Array, assert_close, inputs, make, random_lengths, random_state

import fastseq as fs
from fastseq.training import gradient_flow

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch's own, while it starts
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: take the extra 'peers'")

from test_pytorch import SHARED, with_weights  # only where there is PyTorch

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

ENGINE = pytest.mark.parametrize("engine", [fs, fs.reference], ids=["compiled", "reference"])
RELATIVE = 1e-9


def tensor(array: Array) -> Any:
    return torch.tensor(np.ascontiguousarray(array), requires_grad=True)


def gradients(shape: tuple[int, ...], end: Any, seed: int = 11) -> tuple[Array, Any]:
    """dy and dstate."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), type(end)(*(rng.normal(size=array.shape) for array in end))


def scalar(y: Any, ends: Any, dy: Array, dstate: Any) -> Any:
    """The loss that has these gradients; PyTorch's states are (layers, B, H)."""
    ends = ends if isinstance(ends, tuple) else (ends,)
    pairs = [(end, torch.tensor(d.swapaxes(0, 1).copy())) for end, d in zip(ends, dstate, strict=True)]
    return (y * torch.tensor(dy)).sum() + sum((end * d).sum() for end, d in pairs)


def compare(layer: Any, results: Any, parameters: Any, x: Any, theirs: Any) -> None:
    """dx, dstate and all gradients of parameters."""
    dx, dstart = results
    assert_close(dx, x.grad.numpy(), RELATIVE, "dx")
    for name, array, their in zip(dstart._fields, dstart, theirs, strict=True):
        assert_close(array, their.grad.numpy().swapaxes(0, 1), RELATIVE, f"dstate.{name}")
    for name, parameter in parameters:
        assert_close(layer.grads[name], parameter.grad.numpy(), RELATIVE, name)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("kind", SHARED)
@ENGINE
def test_against_autograd(engine: Any, kind: str, num_layers: int, bidirectional: bool, bias: bool) -> None:
    config: dict[str, Any] = {"num_layers": num_layers, "bidirectional": bidirectional, "bias": bias}
    layer = make(kind, 5, 8, **config, dtype="float64", module=engine)
    x, state = inputs((6, 7, 5), "float64"), random_state(layer, 6)
    pack, pad = torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence
    # PyTorch refuses rows of no steps.
    for lengths in (None, np.maximum(random_lengths(6, 7), 1)):
        oracle = with_weights(layer)
        sequence, theirs = tensor(x), [tensor(array.swapaxes(0, 1)) for array in state]
        start = tuple(theirs) if len(theirs) == 2 else theirs[0]
        if lengths is None:
            their_y, their_end = oracle(sequence, start)
        else:
            packed = pack(sequence, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
            their_y, their_end = oracle(packed, start)
            their_y, _ = pad(their_y, batch_first=True, total_length=7)
        y, end, tape = layer.forward(x, state, lengths=lengths)
        dy, dstate = gradients(y.shape, end)
        scalar(their_y, their_end, dy, dstate).backward()
        assert_close(y, their_y.detach().numpy(), RELATIVE, "y")
        layer.zero_grad()
        compare(layer, layer.backward(dy, tape, dstate=dstate), oracle.named_parameters(), sequence, theirs)


@pytest.mark.parametrize("truncate", [None, 1, 3])
@pytest.mark.parametrize("with_resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("kind", SHARED)
@ENGINE
def test_resets_and_truncate(engine: Any, kind: str, with_resets: bool, truncate: int | None) -> None:
    """Step by step: zeros in the place of a state, and states cut off what they come from."""
    layer = make(kind, 5, 8, num_layers=2, dtype="float64", module=engine)
    oracle = with_weights(layer)
    x, state = inputs((4, 8, 5), "float64"), random_state(layer, 4)
    resets = np.random.default_rng(12).random((4, 8)) < 0.3
    sequence, theirs = tensor(x), [tensor(array.swapaxes(0, 1)) for array in state]
    current = tuple(theirs)
    outputs = []
    for t in range(8):
        if truncate and t and t % truncate == 0:
            current = tuple(part.detach() for part in current)
        if with_resets:
            keep = torch.tensor(~resets[:, t]).double()[None, :, None]
            current = tuple(part * keep for part in current)
        y_t, end = oracle(sequence[:, t : t + 1], current if len(current) == 2 else current[0])
        current = end if isinstance(end, tuple) else (end,)
        outputs.append(y_t)
    y, end, tape = layer.forward(x, state, resets=resets if with_resets else None)
    dy, dstate = gradients(y.shape, end)
    scalar(torch.cat(outputs, dim=1), current, dy, dstate).backward()
    results = layer.backward(dy, tape, dstate=dstate, truncate=truncate)
    compare(layer, results, oracle.named_parameters(), sequence, theirs)


@pytest.mark.parametrize("kind", [kind for kind in SHARED if kind != "lstm_proj"])
@ENGINE
def test_gradient_flow(engine: Any, kind: str) -> None:
    """The cells of PyTorch, whose every state keeps its gradient."""
    layer = make(kind, 5, 8, dtype="float64", module=engine)
    name = type(layer).__name__
    more = {"nonlinearity": layer.nonlinearity} if name == "RNN" else {}
    cell = getattr(torch.nn, f"{name}Cell")(5, 8, dtype=torch.float64, **more)
    cell.load_state_dict({n.removesuffix("_l0"): torch.tensor(a) for n, a in layer.state_dict().items()})
    x, state = inputs((4, 6, 5), "float64"), random_state(layer, 4)
    y, end, tape = layer.forward(x, state)
    dy, dstate = gradients(y.shape, end)
    current = tuple(torch.tensor(array[:, 0]) for array in state)
    states = []
    for t in range(6):
        after = cell(torch.tensor(x[:, t]), current if len(current) == 2 else current[0])
        current = after if isinstance(after, tuple) else (after,)
        for part in current:
            part.retain_grad()
        states.append(current)
    loss = sum((parts[0] * torch.tensor(dy[:, t])).sum() for t, parts in enumerate(states))
    loss += sum((part * torch.tensor(d[:, 0])).sum() for part, d in zip(current, dstate, strict=True))
    loss.backward()
    expected = np.array([[np.sqrt(sum(float((part.grad**2).sum()) for part in parts))] for parts in states])
    assert_close(gradient_flow(layer, tape, dy, dstate=dstate), expected, RELATIVE)
    assert not any(array.any() for array in layer.grads.values())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@ENGINE
def test_layer_norm(engine: Any, bias: bool) -> None:
    """PyTorch has no layer-normalised LSTM; equations 20 to 22 of Ba et al. over its norm."""
    layer = make("lstm_ln", 5, 8, bias=bias, dtype="float64", module=engine)
    p = {name.removesuffix("_l0"): tensor(array) for name, array in layer.state_dict().items()}
    x, state = inputs((4, 6, 5), "float64"), random_state(layer, 4)
    sequence, theirs = tensor(x), [tensor(array.swapaxes(0, 1)) for array in state]

    def norm(z: Any, weight: str, bias: str) -> Any:
        return torch.nn.functional.layer_norm(z, z.shape[-1:], p[weight], p.get(bias))

    h, c = theirs[0][0], theirs[1][0]
    outputs = []
    for t in range(6):
        a = norm(h @ p["weight_hh"].T, "ln_hh_weight", "bias_hh")
        a = a + norm(sequence[:, t] @ p["weight_ih"].T, "ln_ih_weight", "bias_ih")
        i, f, g, o = a.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * norm(c, "ln_c_weight", "ln_c_bias").tanh()
        outputs.append(h)
    y, end, tape = layer.forward(x, state)
    dy, dstate = gradients(y.shape, end)
    their_y = torch.stack(outputs, dim=1)
    scalar(their_y, (h[None], c[None]), dy, dstate).backward()
    assert_close(y, their_y.detach().numpy(), RELATIVE, "y")
    parameters = [(f"{name}_l0", value) for name, value in p.items()]
    compare(layer, layer.backward(dy, tape, dstate=dstate), parameters, sequence, theirs)
