"""Additive and multiplicative attention: both engines against PyTorch, differences and each other; bits; bad input."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from common import Array, assert_close, assert_same_bits, reference, strange, threads, tolerance, unchanged

import fastseq as fs
from fastseq import _additive_attention
from fastseq.reference import _additive_attention as in_numpy

pytestmark = pytest.mark.every_isa

B, T, S, Q, K, A = 4, 3, 7, 5, 6, 19
LENGTHS = np.array([3, 7, 0, 1])
KINDS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "additive": ("AdditiveAttention", (Q, K, A), {}),
    "additive_nobias": ("AdditiveAttention", (Q, K, A), {"bias": False}),
    "multiplicative": ("MultiplicativeAttention", (Q, K), {}),
}
EVERY = pytest.mark.parametrize("kind", KINDS)
BOTH = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


def made(kind: str, module: Any = fs, dtype: Any = "float64") -> Any:
    name, sizes, more = KINDS[kind]
    layer = getattr(module, name)(*sizes, dtype=dtype, seed=1, **more)
    rng = np.random.default_rng(3)
    layer.load_state_dict({n: 0.5 * rng.normal(size=a.shape) for n, a in layer.parameters.items()})
    return layer


def arrays(dtype: Any = "float64", seed: int = 0) -> tuple[Array, Array, Array]:
    """query, keys and dcontext."""
    rng = np.random.default_rng([seed, 7])
    shapes = (B, T, Q), (B, S, K), (B, T, K)
    query, keys, dcontext = (rng.normal(size=shape).astype(dtype) for shape in shapes)
    return query, keys, dcontext


def everything(layer: Any, query: Array, keys: Array, dcontext: Array, lengths: Any) -> dict[str, Array]:
    """What a call, a forward and a backward give, by name."""
    context, weights = layer(query, keys, lengths=lengths, return_weights=True)
    again, tape = layer.forward(query, keys, lengths=lengths)
    assert np.array_equal(again, context, equal_nan=True)
    grads = {name: np.zeros_like(a) for name, a in layer.parameters.items()}
    dquery, dkeys = layer.backward(dcontext, tape, grads=grads)
    return {"context": context, "weights": weights, "dquery": dquery, "dkeys": dkeys, **grads}


@BOTH
@EVERY
def test_is_the_formula_and_its_gradients_are_those_of_pytorch(kind: str, module: Any) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: take the extra 'peers'")
    layer = made(kind, module)
    query, keys, dcontext = arrays()
    p = {n: torch.tensor(a, requires_grad=True) for n, a in layer.parameters.items()}
    q, k = (torch.tensor(a, requires_grad=True) for a in (query, keys))
    if kind == "multiplicative":
        scores = torch.einsum("btq,qk,bsk->bts", q, p["weight"], k)
    else:
        hidden = (q @ p["query.weight"].T)[:, :, None] + (k @ p["key.weight"].T)[:, None]
        if "key.bias" in p:
            hidden = hidden + p["key.bias"]
        scores = torch.tanh(hidden) @ p["score.weight"][0]
    past = torch.arange(S) >= torch.tensor(LENGTHS)[:, None, None]
    weights = torch.softmax(scores.masked_fill(past, -1e30), dim=2) * ~past
    context = weights @ k
    context.backward(torch.tensor(dcontext))
    ours = everything(layer, query, keys, dcontext, LENGTHS)
    theirs = {"context": context, "weights": weights, "dquery": q.grad, "dkeys": k.grad}
    theirs |= {n: a.grad for n, a in p.items()}
    assert set(ours) == set(theirs)
    for name, array in ours.items():
        assert_close(array, theirs[name].detach().numpy(), 1e-13, name)
    # More than one key of unequal weight, or nothing would be seen of the scores.
    assert ours["weights"][1].max() < 0.99 and np.ptp(ours["weights"][1], axis=1).min() > 0.05


@BOTH
@EVERY
def test_gradients_by_differences(kind: str, module: Any) -> None:
    layer = made(kind, module)
    query, keys, dcontext = arrays()
    found = everything(layer, query, keys, dcontext, LENGTHS)
    rng = np.random.default_rng(5)

    def value(query: Array, keys: Array) -> float:
        return float((layer(query, keys, lengths=LENGTHS) * dcontext).sum())

    places: dict[str, tuple[Array, Any]] = {"dquery": (query, None), "dkeys": (keys, None)}
    for name, direction in [(n, rng.normal(size=found[n].shape)) for n in found if n not in ("context", "weights")]:
        step, ends = 1e-5, []
        for sign in (1, -1):
            if name in places:
                moved = places[name][0] + sign * step * direction
                ends.append(value(moved, keys) if name == "dquery" else value(query, moved))
            else:
                before = layer.parameters[name].copy()
                layer.parameters[name] = before + sign * step * direction
                ends.append(value(query, keys))
                layer.parameters[name] = before
        slope, wanted = float((found[name] * direction).sum()), (ends[0] - ends[1]) / (2 * step)
        assert abs(slope - wanted) <= 1e-7 * max(1.0, abs(wanted)), name


@DTYPES
@EVERY
@pytest.mark.parametrize(
    "sizes", [(4, 3, 7, 5, 6, 19), (1, 1, 1, 1, 1, 1), (3, 2, 40, 33, 130, 100), (70, 2, 5, 8, 8, 16)]
)
def test_compiled_and_reference_agree(kind: str, dtype: str, sizes: tuple[int, ...]) -> None:
    batch, time, most, q, k, a = sizes
    name, whole, more = KINDS[kind]
    layer = getattr(fs, name)(*(q, k, a)[: len(whole)], dtype=dtype, seed=2, **more)
    rng = np.random.default_rng(4)
    query, keys, dcontext = (
        rng.normal(size=s).astype(dtype) for s in ((batch, time, q), (batch, most, k), (batch, time, k))
    )
    lengths = rng.integers(0, most + 1, batch)
    lengths[0] = most
    ours = everything(layer, query, keys, dcontext, lengths)
    wanted = everything(reference(layer), query, keys, dcontext, lengths)
    relative = tolerance(dtype, q + k + a + most, batch * time)
    for part, array in ours.items():
        assert_close(array, wanted[part], relative if part in ("context", "weights") else 4 * relative, part)


@BOTH
@EVERY
@DTYPES
def test_what_stands_past_the_lengths_does_not_matter(kind: str, module: Any, dtype: str) -> None:
    layer = made(kind, module, dtype)
    query, keys, dcontext = arrays(dtype)
    found = everything(layer, query, keys, dcontext, LENGTHS)
    past = np.arange(S) >= LENGTHS[:, None]
    for filling in (0, np.nan, np.inf):
        keys[past] = filling
        for name, array in everything(layer, query, keys, dcontext, LENGTHS).items():
            assert_same_bits(array, found[name], name)
    assert not found["weights"].swapaxes(1, 2)[past].any() and not found["dkeys"][past].any()
    np.testing.assert_allclose(found["weights"].sum(2)[LENGTHS > 0], 1, rtol=1e-6)
    assert not found["context"][2].any() and not found["dquery"][2].any()
    for name, array in found.items():
        assert not np.signbit(array[array == 0]).any(), f"{name} has a negative zero"


@EVERY
@DTYPES
def test_the_same_bits(kind: str, dtype: str) -> None:
    """Whatever batch, padding and threads, for all queries together or each alone."""
    layer = made(kind, dtype=dtype)
    query, keys, dcontext = arrays(dtype)
    found = everything(layer, query, keys, dcontext, LENGTHS)
    for b, length in enumerate(LENGTHS):
        alone = everything(layer, query[b : b + 1], keys[b : b + 1, :length], dcontext[b : b + 1], None)
        for name in ("context", "dquery"):
            assert_same_bits(alone[name][0], found[name][b], name)
        assert_same_bits(alone["dkeys"][0], found["dkeys"][b, :length])
        assert_same_bits(alone["weights"][0], found["weights"][b, :, :length])
    for t in range(T):
        context, weights = layer(query[:, t], keys, lengths=LENGTHS, return_weights=True)
        assert_same_bits(context, found["context"][:, t])
        assert_same_bits(weights, found["weights"][:, t])
    wide = np.concatenate([keys, np.full((B, 4, K), np.nan, dtype)], axis=1)
    padded = everything(layer, query, wide, dcontext, LENGTHS)
    for name in layer.parameters:
        assert_same_bits(padded[name], found[name], name)


@EVERY
def test_the_same_bits_on_any_number_of_threads(kind: str) -> None:
    name, sizes, more = KINDS[kind]
    layer = getattr(fs, name)(*(48, 64, 96)[: len(sizes)], seed=0, **more)
    rng = np.random.default_rng(0)
    query, keys, dcontext = (rng.normal(size=s).astype("float32") for s in ((40, 9, 48), (40, 30, 64), (40, 9, 64)))
    lengths = rng.integers(0, 31, 40)
    results = []
    for n in (1, 2, 3, 5):
        with threads(n):
            results.append(everything(layer, query, keys, dcontext, lengths))
    for other in results[1:]:
        for part, array in other.items():
            assert_same_bits(array, results[0][part], part)


@EVERY
def test_one_query_a_row(kind: str) -> None:
    layer = made(kind)
    query, keys, dcontext = arrays()
    flat, tape = layer.forward(query[:, 1], keys, lengths=LENGTHS)
    assert flat.shape == (B, K)
    dquery, dkeys = layer.backward(dcontext[:, 1], tape)
    other, tape = layer.forward(query[:, 1:2], keys, lengths=LENGTHS)
    wanted = layer.backward(dcontext[:, 1:2], tape)
    assert_same_bits(flat, other[:, 0])
    assert_same_bits(dquery, wanted[0][:, 0])
    assert_same_bits(dkeys, wanted[1])


@BOTH
@EVERY
def test_nothing_to_do(kind: str, module: Any) -> None:
    layer = made(kind, module)
    query, keys, dcontext = arrays()
    for q, k, d in [
        (query[:0], keys[:0], dcontext[:0]),
        (query[:, :0], keys, dcontext[:, :0]),
        (query, keys[:, :0], dcontext),
    ]:
        found = everything(layer, q, k, d, None)
        assert found["context"].shape == (*q.shape[:2], K) and found["weights"].shape == (*q.shape[:2], k.shape[1])
        assert not any(array.any() for array in found.values())


@EVERY
def test_not_finite_goes_where_the_reference_sends_it(kind: str) -> None:
    layer, other = made(kind), made(kind, fs.reference)
    query, keys, _ = arrays()
    keys[0, 1, 2], query[1, 0, 0], keys[1, 3, 1] = np.nan, np.nan, 1e300
    for ours, theirs in zip(
        layer(query, keys, return_weights=True), other(query, keys, return_weights=True), strict=True
    ):
        assert_close(ours, theirs, 1e-12)
    assert np.isnan(layer(query, keys)[0]).all(axis=1).all()


@BOTH
@EVERY
def test_arrays_of_any_kind(kind: str, module: Any) -> None:
    layer = made(kind, module)
    query, keys, dcontext = arrays()
    found = everything(layer, query, keys, dcontext, LENGTHS)
    for (what, q), k, d, n in zip(
        strange(query).items(),
        strange(keys).values(),
        strange(dcontext).values(),
        [LENGTHS.astype(t) for t in ("u1", "i2", "i4", "i8", "u8", ">i4")] * 2,
        strict=False,
    ):
        before = [array.tobytes() for array in (q, k, d)]
        for name, array in everything(layer, q, k, d, n).items():
            assert_same_bits(array, found[name], f"{what} {name}")
        unchanged([q, k, d], before)
    assert layer(query.astype("float32"), keys.astype("float16"), lengths=LENGTHS).dtype == "float64"


@BOTH
@EVERY
def test_is_kept(kind: str, module: Any, tmp_path: Any) -> None:
    layer = made(kind, module)
    query, keys, _ = arrays()
    layer.save(tmp_path / "layer")
    load = fs.load if module is fs else fs.reference.load
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), load(tmp_path / "layer")):
        assert type(other) is type(layer) and repr(other) == repr(layer)
        assert_same_bits(other(query, keys), layer(query, keys))
    name, sizes, _ = KINDS[kind]
    assert repr(layer).startswith(f"{name}(query_size={Q}, key_size={K}")
    count = sum(a.size for a in layer.parameters.values())
    assert repr(layer).endswith(f"with {count} parameters")
    assert len(sizes) == 2 or set(layer.parameters) - {"key.bias"} == {"query.weight", "key.weight", "score.weight"}


@BOTH
@EVERY
def test_the_tape_is_not_changed_and_gradients_are_added(kind: str, module: Any) -> None:
    layer = made(kind, module)
    query, keys, dcontext = arrays()
    _, tape = layer.forward(query, keys, lengths=LENGTHS)
    first = layer.backward(dcontext, tape)
    once = {name: a.copy() for name, a in layer.grads.items()}
    second = layer.backward(dcontext, tape)
    for one, other in zip(first, second, strict=True):
        assert_same_bits(other, one)
    for name, a in layer.grads.items():
        np.testing.assert_allclose(a, 2 * once[name], rtol=1e-12, err_msg=name)
    with pytest.raises(ValueError, match="tape should be of a forward of this"):
        made(kind, module).backward(dcontext, tape)
    with pytest.raises(TypeError, match="tape should be what forward returned"):
        layer.backward(dcontext, None)
    with pytest.raises(ValueError, match="grads does not fit"):
        layer.backward(dcontext, tape, grads={})
    with pytest.raises(ValueError, match="dcontext should be of shape"):
        layer.backward(dcontext[:, :1], tape)


@BOTH
@EVERY
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": np.zeros((B, T, Q + 1))}, ValueError, r"query should be of shape \(4, T, 5\) or \(4, 5\), not"),
        ({"query": np.zeros((B + 1, T, Q))}, ValueError, "query should be of shape"),
        ({"query": np.zeros(Q)}, ValueError, "query should be of shape"),
        ({"query": np.zeros((B, T, Q), complex)}, TypeError, "query should hold real floating numbers"),
        ({"query": None}, TypeError, "query should"),
        ({"keys": np.zeros((B, K))}, ValueError, r"keys should be of shape \(B, S, 6\), not \(4, 6\)"),
        ({"keys": np.zeros((B, S, K + 1))}, ValueError, "keys should be of shape"),
        ({"keys": np.zeros((B, S, K), int)}, TypeError, "keys should hold real floating numbers"),
        ({"lengths": [1, 2, 3]}, ValueError, "lengths should be of shape"),
        ({"lengths": [1, 2, 3, 8]}, ValueError, r"lengths should be in 0..7, but lengths\[3\] is 8"),
        ({"lengths": [True] * 4}, TypeError, "lengths should hold integers"),
        ({"return_weights": 1}, TypeError, "return_weights should be True or False"),
    ],
)
def test_bad_input(kind: str, module: Any, change: dict[str, Any], error: Any, message: str) -> None:
    layer = made(kind, module)
    query, keys, _ = arrays()
    with pytest.raises(error, match=message):
        layer(**{"query": query, "keys": keys, "lengths": LENGTHS, **change})
    if "return_weights" not in change:
        with pytest.raises(error, match=message):
            layer.forward(**{"query": query, "keys": keys, "lengths": LENGTHS, **change})


@BOTH
def test_bad_settings(module: Any) -> None:
    for wrong, error in ((0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="query_size should"):
            module.AdditiveAttention(wrong, 2, 3)
        with pytest.raises(error, match="key_size should"):
            module.MultiplicativeAttention(2, wrong)
        with pytest.raises(error, match="hidden_size should"):
            module.AdditiveAttention(2, 2, wrong)
    with pytest.raises(TypeError, match="bias should"):
        module.AdditiveAttention(2, 2, 3, bias=1)
    with pytest.raises(TypeError, match="dtype should"):
        module.MultiplicativeAttention(2, 2, dtype="int8")
    with pytest.raises(ValueError, match="seed should"):
        module.MultiplicativeAttention(2, 2, seed=-1)


# Planted mistakes: the comparison with the reference sees each.


def compare(layer: Any, honest: Any, change: Any = None) -> None:
    query, keys, dcontext = arrays()
    ours = everything(layer, query, keys, dcontext, LENGTHS) if change is None else change(layer, query, keys, dcontext)
    wanted = everything(honest, query, keys, dcontext, LENGTHS)
    for name, array in ours.items():
        assert_close(array, wanted[name], 1e-12, name)


PARAMETER_MISTAKES = {
    "score": lambda p: {**p, "score.weight": p["score.weight"][:, ::-1]},
    "no bias": lambda p: {**p, "key.bias": 0 * p["key.bias"]},
    "units": lambda p: {**p, "query.weight": p["query.weight"][::-1]},
    "keys": lambda p: {**p, "key.weight": p["key.weight"][:, ::-1]},
}


@pytest.mark.parametrize("mistake", PARAMETER_MISTAKES)
def test_mistakes_in_the_parameters_are_seen(mistake: str) -> None:
    layer, honest = made("additive"), made("additive", fs.reference)
    compare(layer, honest)
    layer.load_state_dict(PARAMETER_MISTAKES[mistake](layer.state_dict()))
    with pytest.raises(AssertionError, match="off by"):
        compare(layer, honest)


@EVERY
@pytest.mark.parametrize("mistake", ["lengths ignored", "other lengths", "keys of another row"])
def test_mistakes_of_rows_are_seen(kind: str, mistake: str) -> None:
    layer, honest = made(kind), made(kind, fs.reference)
    changes = {
        "lengths ignored": lambda own, q, k, d: everything(own, q, k, d, None),
        "other lengths": lambda own, q, k, d: everything(own, q, k, d, np.sort(LENGTHS)),
        "keys of another row": lambda own, q, k, d: everything(own, q, k[::-1], d, LENGTHS),
    }
    compare(layer, honest)
    with pytest.raises(AssertionError, match="off by"):
        compare(layer, honest, changes[mistake])


def test_the_usual_scale_would_be_seen() -> None:
    layer, honest = made("multiplicative"), made("multiplicative", fs.reference)
    layer.parameters["weight"] = layer.parameters["weight"] / np.sqrt(Q)
    with pytest.raises(AssertionError, match="off by"):
        compare(layer, honest)


BACKWARD_MISTAKES = ["no product of weights", "no score", "no slope of tanh", "keys by dcontext alone"]


@pytest.mark.parametrize("mistake", BACKWARD_MISTAKES)
def test_mistakes_in_the_backward_are_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward that leaves a factor out, in the place of the reference's, disagrees with the compiled one."""

    def align_backward(*given: Any) -> Any:
        q, p, k, v, starts, firsts, counts, weights, dcontext, dp, dk, dv, _ = given
        dq = np.zeros_like(q)
        for i, (first, count) in enumerate(zip(firsts, counts, strict=True)):
            own = slice(first, first + count)
            for j in range(starts[i], starts[i + 1]):
                w, dc = weights[j, :count], dcontext[j]
                dk[own] += np.outer(np.ones(count) if mistake == "keys by dcontext alone" else w, dc)
                dw = k[own] @ dc
                de = w * (dw - (0 if mistake == "no product of weights" else w @ dw))
                t = np.tanh(q[j] + p[own])
                dv += de @ t
                du = de[:, None] * (1 if mistake == "no score" else v)
                du = du * (1 if mistake == "no slope of tanh" else 1 - t * t)
                dp[own] += du
                dq[j] = du.sum(axis=0)
        return dq

    layer, honest = made("additive"), made("additive", fs.reference)
    compare(layer, honest)
    monkeypatch.setattr(in_numpy, "align_backward", align_backward)
    with pytest.raises(AssertionError, match="off by"):
        compare(layer, honest)


# The elementwise operations.


@DTYPES
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 5000])
def test_tanh(count: int, dtype: str) -> None:
    rng = np.random.default_rng(count)
    x, dy = rng.normal(size=(2, count)).astype(dtype)
    y = _additive_attention.tanh_forward(x, 1)
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(y, in_numpy.tanh_forward(x.astype("longdouble"), 1), rtol=2 * eps)
    assert_same_bits(_additive_attention.tanh_forward(x, 3), y)
    dx = _additive_attention.tanh_backward(y, dy, 1)
    assert_same_bits(dx, in_numpy.tanh_backward(y, dy, 1))
    assert_same_bits(_additive_attention.tanh_backward(y, dy, 3), dx)
