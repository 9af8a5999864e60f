"""Batch norms folded into the layer before them: against the two one after the other, and PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from common import assert_close, assert_same_bits, inputs

import fastseq as fs
from fastseq.convert import batch_norm

EPS = 1e-3


def norm(channels: int) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    names = ("running_mean", "weight", "bias")
    return {"running_var": rng.uniform(0.1, 3, channels), **{name: rng.normal(size=channels) for name in names}}


def normalised(y: Any, own: dict[str, Any]) -> Any:
    scaled = (y - own["running_mean"]) / np.sqrt(own["running_var"] + EPS)
    return scaled * own.get("weight", 1) + own.get("bias", 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_folded_is_one_after_the_other(bias: bool, affine: bool) -> None:
    own = norm(6) if affine else {name: a for name, a in norm(6).items() if name.startswith("running")}
    for layer in (
        fs.Conv1d(4, 6, 3, padding=1, bias=bias, dtype="float64", seed=1),
        fs.Conv1d(4, 6, 3, groups=2, bias=bias, dtype="float64", seed=1),
        fs.Linear(4, 6, bias=bias, dtype="float64", seed=1),
    ):
        x = inputs((2, 9, 4), "float64")
        before = layer.state_dict()
        weight, summand = batch_norm.folded(before["weight"], before.get("bias"), **own, eps=EPS)
        whole = type(layer)(**{**layer._config, "bias": True})
        whole.load_state_dict({"weight": weight, "bias": summand})
        assert_close(whole(x), normalised(layer(x), own), 1e-14)
        for wrong in ({**own, "running_var": own["running_var"][::-1]}, {**own, "running_mean": -own["running_mean"]}):
            with pytest.raises(AssertionError, match="off by"):
                assert_close(whole(x), normalised(layer(x), wrong), 1e-14)


def test_alone_it_is_a_depthwise_convolution() -> None:
    factor, summand = batch_norm.factors(**norm(5), eps=EPS)
    layer = fs.Conv1d(5, 5, 1, groups=5, dtype="float64")
    layer.load_state_dict({"weight": factor[:, None, None], "bias": summand})
    x = inputs((2, 7, 5), "float64")
    assert_close(layer(x), normalised(x, norm(5)), 1e-14)


def test_state_dicts() -> None:
    conv, other = fs.Conv1d(4, 6, 3, bias=False, seed=1).state_dict(), fs.Linear(6, 2, seed=2).state_dict()
    arrays = {
        "a.conv.weight": conv["weight"],
        **{f"a.norm.{name}": array.astype("float32") for name, array in norm(6).items()},
        "a.norm.num_batches_tracked": np.array(7),
        **{f"out.{name}": array for name, array in other.items()},
    }
    before = dict(arrays)
    folded = batch_norm.fold(arrays, {"a.norm": "a.conv"}, eps=EPS)
    assert set(folded) == {"a.conv.weight", "a.conv.bias", "out.weight", "out.bias"}
    assert folded["a.conv.weight"].dtype == np.float32 and folded["out.weight"] is other["weight"]
    assert arrays.keys() == before.keys() and all(arrays[name] is before[name] for name in arrays)
    own = {name: array.astype("float32") for name, array in norm(6).items()}
    assert_same_bits(folded["a.conv.weight"], batch_norm.folded(conv["weight"], None, **own, eps=EPS)[0])
    with pytest.raises(ValueError, match=r"b\.conv\.weight and a\.norm2\.running_mean and|are missing"):
        batch_norm.fold(arrays, {"a.norm2": "b.conv"}, eps=EPS)


def test_bad_arguments() -> None:
    own, weight = norm(6), np.zeros((6, 4, 3))
    for changed, error, message in (
        ({"running_mean": np.zeros(5)}, ValueError, "running_var should be of shape"),
        ({"running_var": -np.ones(6)}, ValueError, "running_var should hold variances"),
        ({"running_var": np.full(6, np.nan)}, ValueError, "running_var should hold variances"),
        ({"weight": np.zeros(6, int)}, TypeError, "weight should hold real"),
        ({"bias": np.zeros((6, 1))}, ValueError, "bias should be of shape"),
        ({"layer_weight": np.zeros((5, 4))}, ValueError, "layer_weight should be of shape"),
        ({"layer_weight": np.zeros(6)}, ValueError, "layer_weight should be of shape"),
        ({"layer_bias": np.zeros(7)}, ValueError, "layer_bias should be of shape"),
        ({"eps": -1}, ValueError, "eps"),
        ({"eps": "1"}, TypeError, "eps"),
    ):
        with pytest.raises(error, match=message):
            batch_norm.folded(**{"layer_weight": weight, "layer_bias": None, **own, "eps": EPS, **changed})


def test_against_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch (the extra `peers`) is not installed")
    peer = torch.nn.Sequential(torch.nn.Conv1d(4, 6, 3, padding=1), torch.nn.BatchNorm1d(6, eps=EPS)).double()
    with torch.no_grad():
        for name, array in norm(6).items():
            getattr(peer[1], name).copy_(torch.tensor(array))
    arrays = {name: array.numpy() for name, array in peer.state_dict().items()}
    folded = batch_norm.fold(arrays, {"1": "0"}, eps=EPS)
    layer = fs.Conv1d(4, 6, 3, padding=1, dtype="float64")
    layer.load_state_dict({name.removeprefix("0."): array for name, array in folded.items()})
    x = inputs((2, 9, 4), "float64")
    with torch.no_grad():
        expected = peer.eval()(torch.tensor(x.swapaxes(1, 2).copy())).numpy().swapaxes(1, 2)
    assert_close(layer(x), expected, 1e-14)
