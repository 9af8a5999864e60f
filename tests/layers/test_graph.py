"""Graph: what goes to which node follows from names alone; gradients through branches; files that lie."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import assert_close, assert_same_bits, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

import fastseq as fs
from fastseq import io
from fastseq.layers.wiring import Wiring

BOTH = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
LENGTHS = np.array([6, 2, 0, 5])
PAST = np.arange(6) >= LENGTHS[:, None]


def branching(module: Any = fs, dtype: str = "float64", dropout: float = 0.4) -> Any:
    """Three inputs, one of them without time; nodes in no order; shared values, both kinds of outputs."""
    m, of = module, {"dtype": dtype}
    return m.Graph(
        inputs=("tokens", "features", "speaker"),
        nodes={
            "labels": (m.Linear(23, 5, seed=5, **of), "with_part"),
            "embedded": (m.Embedding(11, 8, seed=1, **of), "tokens"),
            "joined": (m.Concatenate(**of), "embedded", "features", "speaker"),
            "hidden": (m.LSTM(13, 9, seed=2, **of), "joined"),
            "projected": (m.Linear(13, 9, seed=3, **of), "joined"),
            "skip": (m.Add(**of), "hidden", "projected"),
            "gated": (m.Multiply(**of), "skip", "gate", "dropped"),
            "gate": (m.Sigmoid(**of), "skip"),
            "dropped": (m.Dropout(dropout, **of), "hidden"),
            "attended": (m.MultiheadAttention(9, 3, seed=6, **of), "gated", "skip"),
            "pooled": (m.MeanOverTime(**of), "inner.second"),
            "inner": (inner(m, dtype), "attended", "speaker"),
            "with_part": (m.Concatenate(**of), "inner.first", "part", "skip"),
            "part": (m.Slice(2, 7, **of), "pooled"),
            "last": (m.Linear(9, 4, seed=7, **of), "hidden.c"),
            "score": (m.Add(**of), "last", "half"),
            "half": (m.Linear(9, 4, seed=8, **of), "pooled"),
        },
        outputs=("labels", "score"),
        without_time="speaker",
    )


def inner(m: Any, dtype: str) -> Any:
    of = {"dtype": dtype}
    return m.Graph(
        ("x", "v"),
        {
            "a": (m.Sequential(m.GRU(9, 9, seed=1, **of), m.Tanh(**of)), "x"),
            "b": (m.Concatenate(**of), "a", "v"),
            "c": (m.Linear(11, 9, seed=2, **of), "b"),
        },
        {"first": "a", "second": "c"},
        without_time=("v",),
    )


def arrays(dtype: str = "float64", seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, 11, (4, 6)),
        "features": rng.normal(size=(4, 6, 3)).astype(dtype),
        "speaker": rng.normal(size=(4, 2)).astype(dtype),
    }


def cosines(y: dict[str, Any]) -> dict[str, Any]:
    return {name: np.cos(np.arange(a.size)).reshape(a.shape).astype(a.dtype) for name, a in y.items()}


def chain(module: Any = fs, dtype: str = "float32") -> Any:
    """One input, one output; every node goes on by one step."""
    m, of = module, {"dtype": dtype}
    return m.Graph(
        "ids",
        {
            "embedded": (m.Embedding(11, 4, seed=1, **of), "ids"),
            "hidden": (m.LSTM(4, 5, 2, seed=2, **of), "embedded"),
            "both": (m.Concatenate(**of), "hidden", "embedded"),
            "inner": (m.Sequential(m.GRU(9, 6, seed=3, **of), m.Linear(6, 5, seed=4, **of)), "both"),
            "skip": (m.Add(**of), "inner", "hidden"),
            "y": (m.Linear(5, 3, seed=5, **of), "skip"),
        },
        "y",
    )


def by_hand(graph: Any, x: dict[str, Any]) -> dict[str, Any]:
    """The outputs of `branching`, written out, without lengths."""
    node = {name: one.layer for name, one in graph.nodes.items()}
    time = x["tokens"].shape[1]

    def always(vector: Any) -> Any:
        return np.repeat(vector[:, None], time, axis=1)

    joined = np.concatenate([node["embedded"](x["tokens"]), x["features"], always(x["speaker"])], axis=-1)
    hidden, state = node["hidden"](joined)
    skip = hidden + node["projected"](joined)
    gated = skip * node["gate"](skip) * hidden
    attended = node["attended"](gated, skip)
    own = {name: one.layer for name, one in node["inner"].nodes.items()}
    first = own["a"](attended)
    second = own["c"](np.concatenate([first, always(x["speaker"])], axis=-1))
    pooled = node["pooled"](second)
    labels = node["labels"](np.concatenate([first, always(pooled[:, 2:7]), skip], axis=-1))
    return {"labels": labels, "score": node["last"](state.c[:, 0]) + node["half"](pooled)}


@BOTH
def test_a_graph_is_its_nodes(module: Any) -> None:
    graph, x = branching(module), arrays()
    expected = by_hand(graph, x)
    y = graph(x)
    assert list(y) == ["labels", "score"]
    for name, array in expected.items():
        assert_close(y[name].reshape(array.shape), array, 1e-14, name)
    for form in (tuple(x.values()), dict(reversed(x.items()))):
        assert_same_bits(graph(form)["labels"], y["labels"])
    assert graph.time == "sequence" and graph.carries_state
    assert graph.inputs == ("tokens", "features", "speaker") and graph.outputs == ("labels", "score")
    assert graph.nodes["skip"].inputs == ("hidden", "projected")
    assert_same_bits(branching(module, dropout=0.0).forward(x)[0]["labels"], y["labels"])
    assert set(graph.parameters) >= {"labels.weight", "hidden.weight_ih_l0", "inner.a.0.bias_hh_l0", "inner.c.bias"}


@BOTH
def test_a_padded_batch_is_its_rows_cut(module: Any) -> None:
    """Whatever stands in the padding; outputs with an axis of time are +0 there."""
    graph, x = branching(module), arrays()
    y = graph(x, lengths=LENGTHS)
    for garbage in (0, 99):
        wild = {**x, "tokens": np.where(PAST, garbage, x["tokens"]), "features": x["features"].copy()}
        wild["features"][PAST] = np.nan if garbage else 1e30
        for name, array in graph(wild, lengths=LENGTHS).items():
            assert_same_bits(array, y[name], name)
    assert not y["labels"][PAST].any() and not np.signbit(y["labels"][PAST]).any()
    for b, n in enumerate(LENGTHS):
        if n:
            row = graph(
                {name: a[b : b + 1, :n] if a.ndim > 1 and name != "speaker" else a[b : b + 1] for name, a in x.items()}
            )
            assert_close(y["labels"][b, :n], row["labels"][0], 1e-13)
            assert_close(y["score"][b], row["score"][0], 1e-13)
    ragged = {name: [row[:n] for row, n in zip(x[name], LENGTHS, strict=True)] for name in ("tokens", "features")}
    assert_same_bits(graph({**ragged, "speaker": x["speaker"]})["labels"], y["labels"])


@BOTH
def test_joined_values_are_zero_in_the_padding(module: Any) -> None:
    """Vectors that are repeated, and attention to other keys, which is not zero by itself where queries are."""
    m, x = module, arrays("float32")
    graph = m.Graph(
        ("x", "v"),
        {
            "joined": (m.Concatenate(), "x", "v"),
            "h": (m.GRU(5, 4, seed=1), "joined"),
            "wide": (m.Linear(5, 4, seed=2), "joined"),
            "attended": (m.MultiheadAttention(4, 2, seed=3), "wide", "h"),
        },
        ("joined", "attended"),
        without_time="v",
    )
    for y in (graph((x["features"], x["speaker"]), lengths=LENGTHS), graph((x["features"], x["speaker"]))):
        assert y["joined"][~PAST].all() and y["attended"][~PAST][:4].all()
    for y in (graph, lambda *args, **more: graph.forward(*args, **more)[0]):
        for array in y((x["features"], x["speaker"]), lengths=LENGTHS).values():
            assert not array[PAST].any() and not np.signbit(array[PAST]).any()


@pytest.mark.parametrize(
    ("which", "with_lengths", "module"),
    [("labels", True, fs), ("score", False, fs), ("both", True, fs), ("both", False, fs.reference)],
    ids=["labels", "score", "both", "reference"],
)
def test_finite_differences_through_branches(which: str, with_lengths: bool, module: Any) -> None:
    """Of all parameters and real inputs, also where the gradient of one output alone is given."""
    graph, x = branching(module), arrays()
    options: dict[str, Any] = {"lengths": LENGTHS} if with_lengths else {}
    y, tape = graph.forward(x, seed=3, **options)
    dy = {name: array for name, array in cosines(y).items() if which in (name, "both")}
    if with_lengths and "labels" in dy:
        dy["labels"][PAST] = np.nan  # nothing there matters
    dx = graph.backward(dy, tape)
    assert list(dx) == list(x) and dx["tokens"] is None
    if with_lengths:
        assert not dx["features"][PAST].any() and not np.signbit(dx["features"][PAST]).any()

    def loss(given: Any) -> float:
        outputs = graph.forward(given, seed=3, **options)[0]
        return float(sum(np.nansum(outputs[name] * array) for name, array in dy.items()))

    rng = np.random.default_rng(1)
    for name in ("features", "speaker"):
        direction = rng.normal(size=x[name].shape)
        losses = [loss({**x, name: x[name] + sign * 1e-5 * direction}) for sign in (1, -1)]
        slope = (losses[0] - losses[1]) / 2e-5
        assert abs((dx[name] * direction).sum() - slope) <= 1e-6 * max(abs(slope), 1), name
    for name, array in graph.state_dict().items():
        direction = rng.normal(size=array.shape)
        losses = []
        for sign in (1, -1):
            graph.parameters[name] = array + sign * 1e-5 * direction
            losses.append(loss(x))
        graph.parameters[name] = array
        slope = (losses[0] - losses[1]) / 2e-5
        found = (graph.grads[name] * direction).sum()
        assert abs(found - slope) <= 1e-6 * max(abs(slope), np.abs(graph.grads[name]).max()), name
        reached = name.split(".")[0] not in {"labels": {"score", "last", "half"}, "score": {"labels"}}.get(which, set())
        assert bool(graph.grads[name].any()) == reached, name


@pytest.mark.every_isa
@pytest.mark.parametrize("with_lengths", [False, True])
def test_against_the_reference(with_lengths: bool) -> None:
    graph, exact = branching(dtype="float32"), branching(fs.reference)
    exact.load_state_dict(graph.state_dict())
    x = arrays("float32")
    options: dict[str, Any] = {"lengths": LENGTHS} if with_lengths else {}
    results = []
    for model in (graph, exact):
        y, tape = model.forward(x, seed=5, **options)
        grads = {name: np.zeros_like(array) for name, array in model.parameters.items()}
        dx = model.backward(cosines(y), tape, grads=grads)
        results.append({**y, "dx": dx["features"], "dspeaker": dx["speaker"], **grads})
    for name, array in results[1].items():
        relative = tolerance("float32", 40, 6)
        assert_close(results[0][name], array, relative if name in graph.outputs else 16 * relative, name)


@BOTH
def test_gradients_of_a_shared_value_are_summed(module: Any) -> None:
    """Each reader counts once for each time that it reads; no array that was given or returned is changed."""
    m, of = module, {"dtype": "float64"}
    graph = m.Graph(
        "x",
        {
            "a": (m.Tanh(**of), "x"),
            "twice": (m.Add(**of), "a", "a"),
            "square": (m.Multiply(**of), "a", "a", "twice"),
        },
        ("a", "twice", "square"),
    )
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    a = np.tanh(x)
    y, tape = graph.forward(x)
    for array, expected in zip(y.values(), (a, 2 * a, 2 * a**3), strict=True):
        assert_close(array, expected, 1e-14)
    dy = cosines(y)
    before = pickle.dumps(dy)
    slope = dy["a"] + 2 * dy["twice"] + 6 * a**2 * dy["square"]
    for _ in range(2):  # a tape may be used again
        assert_close(graph.backward(dy, tape), slope * (1 - a**2), 1e-13)
    assert pickle.dumps(dy) == before
    assert_close(graph.backward({"square": dy["square"]}, tape), 6 * a**2 * dy["square"] * (1 - a**2), 1e-13)
    assert_close(graph.backward((None, dy["twice"], None), tape), 2 * dy["twice"] * (1 - a**2), 1e-13)
    assert not graph.backward({}, tape).any()
    for name in ("a", "twice"):  # which are on tapes of other nodes
        with pytest.raises(ValueError, match="read-only"):
            y[name][0] = 0
    dropout = m.Dropout(0.0, **of)  # gives its input itself, which stays writeable
    graph = m.Graph("x", {"d": (dropout, "x"), "y": (m.Add(**of), "d", "d")}, ("d", "y"))
    assert not graph.forward(x)[0]["d"].flags.writeable and x.flags.writeable


@BOTH
def test_the_sum_has_a_fixed_order(module: Any) -> None:
    """That of the output first, then those of its readers from the last to the first, whatever the declaration."""
    m, of = module, {"dtype": "float32"}
    scales = [1e8, 1.0, -1e8, 3.0]

    def of_order(names: list[int]) -> Any:
        nodes: dict[str, Any] = {f"r{i}": (m.Linear(1, 1, bias=False, **of), "a") for i in names}
        graph = m.Graph("x", {"a": (m.Tanh(**of), "x"), **nodes}, ("a", *(f"r{i}" for i in range(4))))
        graph.load_state_dict({f"r{i}.weight": [[scale]] for i, scale in enumerate(scales)})
        y, tape = graph.forward(np.zeros((1, 1, 1), "f4"))
        return graph.backward({name: np.ones_like(a) for name, a in y.items()}, tape)

    for names in ([0, 1, 2, 3], [3, 1, 0, 2]):
        total = np.float32(1)
        for i in reversed(names):
            total = np.float32(total + np.float32(scales[i]))
        assert of_order(names).item() == total


@BOTH
def test_steps_are_the_call(module: Any) -> None:
    """In bits: one step after another, from any state, and with states that a run returned."""
    graph = chain(module)
    ids = np.random.default_rng(0).integers(0, 11, (3, 9))
    whole, end = graph.run(ids)
    assert list(end) == ["hidden", "inner"] and graph.unstreamable() is None
    for start in (None, graph.initial_state(3)):
        state, steps = start, []
        for t in range(9):
            y, state = graph.step(ids[:, t], state)
            steps.append(y)
        assert_same_bits(np.stack(steps, axis=1), whole)
        assert state == end
    _, middle = graph.run(ids[:, :5])
    before = pickle.dumps(middle)
    y, after = graph.step(ids[:, 5], middle)
    assert_same_bits(y, whole[:, 5])
    assert after == graph.run(ids[:, :6])[1] and pickle.dumps(middle) == before
    assert_same_bits(graph.run(ids[:, 6:], after)[0], whole[:, 6:])
    assert graph.step(ids[:0, 0])[0].shape == (0, 3)


@BOTH
def test_steps_of_several_inputs_and_outputs(module: Any) -> None:
    """An input without time is given at every step; a graph at a node goes on, too."""
    m = module
    graph = m.Graph(
        ("x", "v"),
        {
            "inner": (inner(m, "float32"), "x", "v"),
            "both": (m.Concatenate(), "inner.second", "inner.first"),
            "y": (m.LSTM(18, 4, seed=1), "both"),
        },
        ("y", "inner.first"),
        without_time="v",
    )
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(2, 5, 9)).astype("f4"), rng.normal(size=(2, 2)).astype("f4")
    whole, end = graph.run((x, v))
    assert list(whole) == ["y", "inner.first"]
    state, steps = None, []
    for t in range(5):
        y, state = graph.step({"x": x[:, t], "v": v}, state)
        steps.append(y)
    same: Any = assert_same_bits if m is fs else lambda one, other: assert_close(one, other, 1e-5)
    for name, array in whole.items():
        same(np.stack([y[name] for y in steps], axis=1), array)
    assert state == end or m is not fs
    middle = graph.forward_carrying((x[:, :2], v), seed=0)[1]
    same(graph((x[:, 2:], v), middle)["y"], whole["y"][:, 2:])
    resets = rng.random((2, 5)) < 0.4
    one = graph.run((x, v), resets=resets)
    assert not np.array_equal(one[0]["y"], whole["y"])
    for b in range(2):
        state, parts = None, []
        for t in range(5):
            state = None if resets[b, t] else state
            y, state = graph.step((x[b : b + 1, t], v[b : b + 1]), state)
            parts.append(y["y"][0])
        same(np.stack(parts), one[0]["y"][b])


@BOTH
def test_where_there_is_no_step(module: Any) -> None:
    m = module
    x = {"hidden": (m.GRU(3, 3, seed=0), "x")}
    for node, why in (
        ((m.MultiheadAttention(3, 1), "hidden"), r"nodes\['y'\]: MultiheadAttention.*would see nothing of the chunks"),
        ((m.MeanOverTime(), "hidden"), r"nodes\['y'\]: MeanOverTime.*one output for all steps"),
        ((m.GRU(3, 3, bidirectional=True), "hidden"), r"nodes\['y'\]: GRU.*bidirectional"),
        ((m.Add(), "hidden", "hidden.h"), r"'hidden.h' is a state after all steps"),
    ):
        graph = m.Graph("x", {**x, "y": node}, "y")
        with pytest.raises(ValueError, match=f"step needs layers that can go on by one step, but {why}"):
            graph.step(np.zeros((2, 3), "f4"))
        assert graph.unstreamable() is not None
        x = {"hidden": (m.GRU(3, 3, seed=0), "x")}
    with pytest.raises(ValueError, match=r"x_t should be of shape \(B, ...\), one step of each row, not \(\)"):
        chain(m).step(3)


@BOTH
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2}], ids=str)
def test_states_after_the_last_step(settings: dict[str, Any], module: Any) -> None:
    """Of the last layer, directions side by side; and their gradients."""
    m, of = module, {"dtype": "float64"}
    lstm = m.LSTM(3, 4, seed=1, **settings, **of)
    directions, outputs = 2 if lstm.bidirectional else 1, lstm.proj_size or 4
    width = directions * (outputs + 4)
    graph = m.Graph(
        "x",
        {
            "lstm": (lstm, "x"),
            "state": (m.Concatenate(**of), "lstm.c", "lstm.h"),
            "y": (m.Linear(width, 2, seed=2, **of), "state"),
        },
        "y",
    )
    assert graph.time == "pooling"
    x = np.random.default_rng(0).normal(size=(4, 6, 3))
    for lengths in (None, LENGTHS):
        _, end = lstm(x, lengths=lengths)
        last = np.concatenate([array[:, -directions:].reshape(4, -1) for array in (end.c, end.h)], axis=1)
        assert_close(graph(x, lengths=lengths), graph.nodes["y"].layer(last), 1e-14)
        y, tape = graph.forward(x, lengths=lengths)
        dy = np.cos(np.arange(y.size)).reshape(y.shape)
        dx = graph.backward(dy, tape)
        direction = np.random.default_rng(1).normal(size=x.shape)
        slope = (
            (graph(x + 1e-6 * direction, lengths=lengths) - graph(x - 1e-6 * direction, lengths=lengths)) * dy
        ).sum()
        assert abs((dx * direction).sum() - slope / 2e-6) < 1e-7


@BOTH
def test_within_each_other(module: Any) -> None:
    """A graph in a Sequential in a graph: the same bits as without."""
    m = module
    ids = np.random.default_rng(0).integers(0, 11, (4, 6))
    plain = chain(m)
    nested = m.Graph("i", {"s": (m.Sequential(chain(m), m.Softmax()), "i"), "y": (m.Add(), "s", "s")}, "y")
    expected = m.Softmax()(plain(ids))
    assert_same_bits(nested(ids), expected + expected)
    assert nested.nodes["s"].layer.time == "sequence" and nested.carries_state
    y, end = nested.run(ids, lengths=LENGTHS)
    assert not y[PAST].any() and end["s"][0] == plain.run(ids, lengths=LENGTHS)[1]
    steps, state = [], nested.initial_state(4)
    for t in range(6):
        y_t, state = nested.step(ids[:, t], state)
        steps.append(y_t)
    assert_same_bits(np.stack(steps, axis=1), nested(ids))
    out, tape = nested.forward(ids)
    assert nested.backward(np.ones_like(out), tape, truncate=2) is None
    assert nested.grads["s.0.hidden.weight_hh_l1"].any()
    pooled = m.Sequential(m.Graph("x", {"y": (m.LastStep(), "x")}, "y"), m.Linear(3, 2))
    assert pooled.time == "pooling" and pooled(np.zeros((2, 4, 3), "f4"), lengths=[1, 4]).shape == (2, 2)
    with pytest.raises(ValueError, match=r"layers\[1\], a GRU, should stand before layers\[0\], a Graph, which leaves"):
        m.Sequential(m.Graph("x", {"y": (m.LastStep(), "x")}, "y"), m.GRU(3, 2))
    with pytest.raises(ValueError, match=r"should take vectors of 4, which layers\[0\], Linear.* takes vectors of 5"):
        m.Sequential(m.Linear(3, 4), m.Graph("x", {"y": (m.Linear(5, 3), "x")}, "y"))
    with pytest.raises(ValueError, match=r"should take vectors of 7, which layers\[0\], Graph"):
        m.Sequential(m.Graph("x", {"y": (m.Linear(5, 7), "x")}, "y"), m.Linear(8, 1))
    two = m.Graph(("a", "b"), {"y": (m.Add(), "a", "b")}, "y")
    for layer in (two, m.Graph("x", {"a": (m.Tanh(), "x"), "b": (m.Tanh(), "x")}, ("a", "b")), m.Add()):
        with pytest.raises(TypeError, match=r"layers\[1\] should take one input and give one output, not as"):
            m.Sequential(m.Tanh(), layer)


@BOTH
def test_attention_to_another_value(module: Any) -> None:
    """Layers with several inputs: additive attention of a vector, a decoder over a memory."""
    m = module
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(4, 6, 6)).astype("f4"), rng.normal(size=(4, 5)).astype("f4")
    attention, decoder = m.AdditiveAttention(5, 6, 7, seed=1), m.TransformerDecoder(1, 6, 2, 8, dropout=0.0, seed=2)
    memory = m.GRU(6, 6, seed=3)
    graph = m.Graph(
        ("x", "v"),
        {"memory": (memory, "x"), "context": (attention, "v", "memory"), "decoded": (decoder, "x", "memory")},
        ("context", "decoded"),
        without_time="v",
    )
    keys, _ = memory(x, lengths=LENGTHS)
    y, tape = graph.forward((x, v), lengths=LENGTHS)
    assert_same_bits(np.array(y["context"]), attention(v, keys, lengths=LENGTHS))
    expected = decoder(x * ~PAST[:, :, None], keys, lengths=LENGTHS, memory_lengths=LENGTHS)
    assert_close(y["decoded"], expected, 1e-6)
    assert graph((x, v), lengths=LENGTHS)["context"].shape == (4, 6)
    dx = graph.backward(cosines(y), tape)
    assert dx["x"].shape == x.shape and dx["v"].any() and not dx["x"][PAST].any()
    assert all(array.any() for name, array in graph.grads.items() if "weight" in name)


@BOTH
def test_files_pickles_and_copies(module: Any, tmp_path: Path) -> None:
    graph, x = branching(module, "float32"), arrays("float32")
    graph.save(tmp_path / "graph")
    loaded = (fs.load if module is fs else fs.reference.load)(tmp_path / "graph")
    for other in (loaded, pickle.loads(pickle.dumps(graph)), copy.deepcopy(graph), copy.copy(graph)):
        assert type(other) is type(graph) and other._config == graph._config and repr(other) == repr(graph)
        assert type(other.nodes["inner"].layer) is module.Graph
        for name, array in graph(x, lengths=LENGTHS).items():
            assert_same_bits(other(x, lengths=LENGTHS)[name], array)
        assert_same_bits(other.forward(x, seed=3)[0]["labels"], graph.forward(x, seed=3)[0]["labels"])
        other.parameters["labels.bias"] = np.ones(5)
        assert not np.array_equal(other(x)["labels"], graph(x)["labels"])
        with pytest.raises(AttributeError):
            other.dtype = np.dtype("float64")
    renamed = module.Graph(
        "x", {"a": (module.Linear(2, 3), "x"), "b": (module.ReLU(), "a")}, {"any name.": "a", "b": "b"}
    )
    renamed.save(tmp_path / "renamed")
    assert list(fs.load(tmp_path / "renamed")(np.zeros((1, 2), "f4"))) == ["any name.", "b"]


@BOTH
def test_how_it_is_shown(module: Any) -> None:
    graph = module.Graph("x", {"a": (module.Linear(2, 3), "x"), "y": (module.Concatenate(), "a", "a")}, "y")
    made = "Graph('x', {'a': Linear(in_features=2, out_features=3), 'y': Concatenate()}, 'y')"
    assert repr(graph) == f"{made} with 9 parameters"
    lines = graph.summary().splitlines()
    assert [line.split() for line in lines] == [
        ["Graph", "output", "parameters"],
        ["a", "x", "->", "Linear(in_features=2,", "out_features=3)", "(B,", "T,", "3)", "9"],
        ["y", "a,", "a", "->", "Concatenate()", "(B,", "T,", "6)", "0"],
        ["in", "all", "9"],
    ]
    text = branching(module).summary()
    for row in ("inner.a.0", "pooled ", "attended, speaker -> Graph of", "hidden.c -> Linear"):
        assert row in text, row
    assert "... 16 more" in repr(branching(module))


def test_threads() -> None:
    """Many at once: layers hold nothing of a call."""
    graph = branching(dtype="float32")
    expected, found = {}, {}

    def work(seed: int, into: dict[int, Any]) -> None:
        x = arrays("float32", seed)
        for _ in range(5):
            y, tape = graph.forward(x, lengths=LENGTHS, seed=seed)
            grads = {name: np.zeros_like(array) for name, array in graph.parameters.items()}
            dx = graph.backward(cosines(y), tape, grads=grads)
            into[seed] = [graph(x, lengths=LENGTHS)["labels"], dx["features"], *grads.values()]

    for seed in range(4):
        work(seed, expected)
    pool = [threading.Thread(target=work, args=(seed, found)) for seed in range(4)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    for seed, results in expected.items():
        for one, other in zip(found[seed], results, strict=True):
            assert_same_bits(one, other)


@BOTH
def test_training_decreases_a_loss(module: Any) -> None:
    m = module
    model = m.Graph(
        "ids",
        {
            "embedded": (m.Embedding(7, 6, seed=1), "ids"),
            "hidden": (m.GRU(6, 8, seed=2), "embedded"),
            "wide": (m.Linear(6, 8, seed=3), "embedded"),
            "skip": (m.Add(), "hidden", "wide"),
            "y": (m.Linear(8, 7, seed=4), "skip"),
        },
        "y",
    )
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 7, n) for n in (9, 3, 7, 5, 8, 4, 6, 9)]
    targets = [(np.concatenate([[0], row[:-1]]) + row) % 7 for row in ids]
    history = fs.training.fit(model, (ids, targets), loss="cross_entropy", lr=0.02, epochs=40, progress=False)
    assert history.loss[-1] < 0.5 * history.loss[0]
    classifier = m.Graph("x", {"h": (m.LSTM(2, 6, seed=1), "x"), "y": (m.Linear(6, 3, seed=2), "h.h")}, "y")
    x, y = rng.normal(size=(24, 5, 2)).astype("f4"), rng.integers(0, 3, 24)
    x[:, :, 0] += y[:, None]
    history = fs.training.fit(classifier, (x, y), loss="cross_entropy", lr=0.05, epochs=30, progress=False)
    assert history.loss[-1] < 0.6 * history.loss[0]


def test_training_on_streams_carries_the_state() -> None:
    """Chunk after chunk, as in a whole: the parameters after a run are those of a Sequential of the same layers."""
    layers = {
        "e": lambda: fs.Embedding(5, 4, seed=1),
        "g": lambda: fs.GRU(4, 6, seed=2),
        "y": lambda: fs.Linear(6, 5, seed=3),
    }
    graph = fs.Graph("x", {"e": (layers["e"](), "x"), "g": (layers["g"](), "e"), "y": (layers["y"](), "g")}, "y")
    sequence = fs.Sequential(*(make() for make in layers.values()))
    ids = np.random.default_rng(0).integers(0, 5, 161)
    for model in (graph, sequence):
        data = fs.training.Streams(ids, batch_size=2, steps=8)
        fs.training.fit(model, data, loss="cross_entropy", steps=12, progress=False)
    for name, other in zip(graph.parameters, sequence.parameters, strict=True):
        assert_same_bits(np.asarray(graph.parameters[name]), np.asarray(sequence.parameters[other]))


def heads(**of: Any) -> Any:
    return fs.Graph(
        ("ids", "v"),
        {
            "embedded": (fs.Embedding(7, 6, seed=1, **of), "ids"),
            "joined": (fs.Concatenate(**of), "embedded", "v"),
            "hidden": (fs.GRU(8, 8, seed=2, **of), "joined"),
            "tags": (fs.Linear(8, 7, seed=3, **of), "hidden"),
            "score": (fs.Linear(8, 1, seed=4, **of), "hidden.h"),
        },
        ("tags", "score"),
        without_time="v",
    )


def heads_data(dtype: str) -> list[Any]:
    rng, batches = np.random.default_rng(0), []
    for counts in ([5, 3, 1, 4], [2, 5, 5, 3]):
        ids, v = rng.integers(0, 7, (4, 5)), rng.normal(size=(4, 2)).astype(dtype)
        targets = {"score": v.sum(axis=1), "tags": (ids + 1) % 7}
        batches.append(fs.training.Batch({"ids": ids, "v": v}, targets, np.array(counts)))
    return batches


def test_training_of_several_outputs() -> None:
    """The loss is the sum of those of the outputs, each with lengths if it has an axis of time."""
    data, losses = heads_data("float64"), {"score": "mean_squared_error", "tags": "cross_entropy"}
    graph, twin = heads(dtype="float64"), heads(dtype="float64")
    history = fs.training.fit(
        graph, data, loss=losses, optimiser=fs.training.SGD(graph, 0.1), epochs=1, validation=data, progress=False
    )
    assert data[0].tokens == 13
    for batch, loss in zip(data, history.loss, strict=True):
        y, tape = twin.forward(batch.inputs, lengths=batch.lengths)
        one, dtags = fs.losses.softmax_cross_entropy(y["tags"], batch.targets["tags"], lengths=batch.lengths)
        other, dscore = fs.losses.mean_squared_error(y["score"], batch.targets["score"][:, None])
        assert loss == pytest.approx(one + other, rel=1e-12)
        twin.zero_grad()
        twin.backward({"tags": dtags, "score": dscore}, tape)
        twin.load_state_dict({name: array - 0.1 * twin.grads[name] for name, array in twin.parameters.items()})
    for name, array in twin.parameters.items():
        assert_close(np.asarray(graph.parameters[name]), np.asarray(array), 1e-12, name)
    history = fs.training.fit(graph, data, loss=losses, lr=0.02, epochs=30, validation=data, progress=False)
    assert history.loss[-1] < 0.5 * history.loss[0] and history.validation_loss[-1] < history.validation_loss[0]
    before = graph.state_dict()
    tags = [batch._replace(targets={"tags": batch.targets["tags"]}) for batch in data]
    fs.training.fit(graph, tags, loss={"tags": "cross_entropy"}, optimiser="sgd", lr=0.1, epochs=1, progress=False)
    assert np.array_equal(graph.parameters["score.bias"], before["score.bias"])
    assert not np.array_equal(graph.parameters["tags.bias"], before["tags.bias"])


def test_what_training_of_several_outputs_refuses() -> None:
    graph, data = heads(), heads_data("float32")
    for loss, message in (
        ("cross_entropy", "loss should be a mapping from 'tags', 'score' to losses where a graph has several outputs"),
        ({"tag": "cross_entropy"}, "loss should have losses of the outputs 'tags', 'score': 'tag' is unknown"),
        ({}, "loss should have losses of the outputs 'tags', 'score': it is empty"),
        ({"tags": "cross_entropy"}, "data should give batches whose targets are a mapping from 'tags' to arrays, not"),
    ):
        with pytest.raises(ValueError, match=message):
            fs.training.fit(graph, data, loss=loss, progress=False)
    with pytest.raises(TypeError, match="loss should be a mapping only where model is a Graph"):
        fs.training.fit(fs.Linear(2, 2), data, loss={"y": "huber"}, progress=False)
    both = {"tags": "cross_entropy", "score": "huber"}
    with pytest.raises(ValueError, match="metrics should be left out where loss is a mapping"):
        fs.training.fit(graph, data, loss=both, metrics=["accuracy"], validation=data, progress=False)
    ended = fs.Graph(
        "x", {"a": (fs.Linear(2, 2), "x"), "b": (fs.Softmax(), "a"), "c": (fs.Linear(2, 1), "a")}, ("c", "b")
    )
    batch = fs.training.Batch(np.zeros((2, 3, 2), "f4"), {"b": np.zeros((2, 3), int)})
    with pytest.warns(UserWarning, match="model should end in logits with the loss cross-entropy"):
        fs.training.fit(ended, [batch], loss={"b": "cross_entropy"}, epochs=1, progress=False)


@BOTH
def test_initial_parameters(module: Any) -> None:
    graph = chain(module)
    fs.init.initialise(graph, "orthogonal", forget_bias=1.0, seed=1)
    assert (graph.parameters["hidden.bias_ih_l0"][5:10] == 1).all()
    fs.init.initialise(graph, seed=2)
    again = graph.state_dict()
    fs.init.initialise(graph, seed=2)
    for name, array in again.items():
        assert_same_bits(np.asarray(graph.parameters[name]), array)
    drawn = [again[name].reshape(-1)[:4] for name in ("inner.1.weight", "y.weight", "embedded.weight")]
    assert not np.array_equal(drawn[0], drawn[1]) and np.abs(drawn[2]).max() > 0


def bad_graphs(m: Any) -> dict[str, tuple[Callable[[], Any], str]]:
    a = {"a": (m.Linear(3, 3, seed=0), "x")}
    linear = m.Linear(3, 3)
    return {
        "unknown": (
            lambda: m.Graph("x", {**a, "b": (m.Add(), "a", "xx", "nothing")}, ("b", "c")),
            r"the graph cannot be made: nodes\['b'\] reads 'xx', which is no input and no node; 'x' may be meant;"
            r" nodes\['b'\] reads 'nothing', which is no input and no node; outputs: 'c' is 'c', which is no input and",
        ),
        "cycle": (
            lambda: m.Graph(
                "x",
                {
                    "a": (m.Add(), "x", "c"),
                    "b": (m.Tanh(), "a"),
                    "c": (m.Tanh(), "b"),
                    "d": (m.Add(), "e", "x"),
                    "e": (m.Tanh(), "d"),
                    "f": (m.Add(), "f", "e"),
                    "y": (m.Add(), "c", "f", "z"),
                },
                "y",
            ),
            r"reads 'z', which .*; nodes: 'a' reads 'c' reads 'b' reads 'a', which is a cycle; nodes: 'd' reads 'e'"
            r" reads 'd', which is a cycle; nodes: 'f' reads 'f', which is a cycle$",
        ),
        "unused": (
            lambda: m.Graph(("x", "q"), {**a, "b": (m.Tanh(), "a"), "c": (m.Tanh(), "b")}, "a"),
            r"nodes\['b'\] is not used: no output depends on it; nodes\['c'\] is not used.*; inputs: 'q' is not used",
        ),
        "names": (
            lambda: m.Graph(("x", "x"), {"x": (m.Tanh(), "x"), "a.b": (m.Tanh(), "x")}, ("x", "a.b", "x")),
            r"inputs has 'x' twice; outputs has 'x' twice; nodes: 'x' is an input, too; nodes: 'a.b' should be a name",
        ),
        "pairs": (lambda: m.Graph("x", [("a", (linear, "x")), ("a", (m.Tanh(), "x"))], "a"), "nodes has 'a' twice"),
        "without_time": (lambda: m.Graph("x", a, "a", without_time="y"), "without_time: 'y' is no input"),
        "input as output": (lambda: m.Graph("x", a, ("a", "x")), "outputs: 'x' is an input and not of a node"),
        "twice": (
            lambda: m.Graph("x", {"a": (linear, "x"), "b": (m.Sequential(linear), "a")}, "b"),
            "every layer should be there once, but Linear.* is there twice",
        ),
        "dtype": (
            lambda: m.Graph(
                "x", {**a, "b": (m.Tanh(dtype="float64"), "a"), "c": (m.LSTM(3, 3, dtype="float64"), "b")}, "c"
            ),
            r"nodes\['b'\], a Tanh, is of float64, not of float32 as the first; nodes\['c'\], a LSTM, is of float64",
        ),
        "arity": (
            lambda: m.Graph(
                "x", {"a": (m.Linear(3, 3), "x", "x"), "b": (m.Add(), "a"), "c": (m.LSTM(3, 3), "b", "x")}, "c"
            ),
            r"nodes\['a'\], a Linear, cannot be called with 2 inputs.*; nodes\['b'\], a Add, joins at least two inputs,"
            r" not 1; nodes\['c'\], a LSTM, carries a state and takes one input",
        ),
        "no input": (
            lambda: m.Graph("x", {"a": (m.Linear(3, 3),), "b": (m.Add(), "a", "x")}, "b"),
            r"nodes\['a'\], a Linear, cannot be called with 0 inputs",
        ),
        "value": (
            lambda: m.Graph("x", {"a": (m.GRU(3, 3), "x"), "b": (m.Add(), "a", "a.c", "b.h")}, "b"),
            r"nodes\['b'\] reads 'a.c', which there is not: a GRU gives 'a' or 'a.h'; nodes\['b'\] reads 'b.h', which",
        ),
        "several": (
            lambda: m.Graph(
                "x", {"g": (m.Graph("x", {"a": (m.Tanh(), "x"), "b": (m.Tanh(), "x")}, ("a", "b")), "x")}, "g"
            ),
            r"outputs: 'g' is 'g', which there is not: a Graph gives 'g.a' or 'g.b'",
        ),
        "time": (
            lambda: m.Graph(
                "x",
                {
                    "p": (m.LastStep(), "x"),
                    "a": (m.GRU(3, 3), "p"),
                    "b": (m.MeanOverTime(), "p"),
                    "c": (m.Add(), "a", "b"),
                },
                "c",
            ),
            r"nodes\['a'\], a GRU, needs an axis of time, and reads 'p'; nodes\['b'\], a MeanOverTime, needs an axis",
        ),
        "time of a graph": (
            lambda: m.Graph("x", {"g": (inner(m, "float32"), "x", "x")}, "g.first"),
            r"nodes\['g'\], a Graph, takes 'v' without an axis of time, and reads 'x' and 'x'",
        ),
        "widths": (
            lambda: m.Graph(
                "x",
                {
                    **a,
                    "b": (m.Concatenate(), "a", "a"),
                    "c": (m.Linear(5, 2), "b"),
                    "d": (m.Add(), "a", "b"),
                    "e": (m.Slice(4, 7), "b"),
                    "y": (m.Concatenate(), "c", "d", "e"),
                },
                "y",
            ),
            r"nodes\['c'\], Linear\(.*\), takes vectors of 5, not of 6 as 'b'; nodes\['d'\], Add\(\), joins vectors of"
            r" one size, not of 3 and 6 as 'a' and 'b'; nodes\['e'\], Slice\(.*\), takes vectors of at least 7",
        ),
        "widths of a graph": (
            lambda: m.Graph(
                "x", {**a, "g": (m.Graph("x", {"y": (m.Add(), "x", "z"), "z": (m.Linear(4, 3), "x")}, "y"), "a")}, "g"
            ),
            r"nodes\['g'\], Graph.*, cannot take these sizes, since nodes\['z'\], Linear.*, takes vectors of 4, not",
        ),
        "states of a recurrent node": (
            lambda: m.Graph("x", {"h": (m.GRU(3, 4), "x"), "y": (m.Linear(3, 1), "h.h")}, "y"),
            r"nodes\['y'\], .*takes vectors of 3, not of 4 as 'h.h'",
        ),
        "own time": (lambda: fs.Graph("x", {"o": (Odd("static"), "x")}, "o"), "has the time 'static', not one of"),
    }


class Odd(fs.Layer):
    def __init__(self, kind: str = "pointwise", count: int = 2) -> None:
        super().__init__(kind=kind, count=count, dtype="float32")
        self.time = kind

    def __call__(self, *arrays: Any) -> Any:
        return sum(arrays)

    def forward(self, *arrays: Any, seed: int | None = None) -> Any:
        return self(*arrays), self.tape()

    def backward(self, dy: Any, tape: Any, *, grads: Any = None) -> Any:
        return (dy,) * self.count


@BOTH
def test_what_is_no_graph(module: Any) -> None:
    """All faults at once, by name."""
    for make, message in bad_graphs(module).values():
        with pytest.raises(ValueError, match=message):
            make()


@BOTH
def test_arguments_of_other_types(module: Any) -> None:
    m = module
    node = (m.Tanh(), "x")
    for arguments, message in (
        ((3, {"a": node}, "a"), "inputs should be a name or a tuple of names, not int 3"),
        ((("x", 3), {"a": node}, "a"), "inputs should hold names"),
        (("", {"a": node}, "a"), "inputs should hold names"),
        (("x", 3, "a"), "nodes should be a mapping"),
        (("x", "ab", "a"), "nodes should be a mapping"),
        (("x", [3], "a"), "nodes should hold pairs"),
        (("x", {3: node}, "a"), "nodes should hold names"),
        (("x", {"a": m.Tanh()}, "a"), r"nodes\['a'\] should be a tuple of a layer and the names of what it reads"),
        (("x", {"a": ()}, "a"), r"nodes\['a'\] should be a tuple of a layer"),
        (("x", {"a": ("x", m.Tanh())}, "a"), r"nodes\['a'\] should begin with a layer, not str 'x'"),
        (("x", {"a": (m.Tanh, "x")}, "a"), r"nodes\['a'\] should begin with a layer"),
        (("x", {"a": (m.Tanh(), 3)}, "a"), r"nodes\['a'\] should hold names"),
        (("x", {"a": node}, 3), "outputs should be a name"),
        (("x", {"a": node}, {"y": 3}), "outputs should hold names"),
    ):
        with pytest.raises(TypeError, match=message):
            m.Graph(*arguments)
    for arguments, message in (
        (((), {"a": node}, "a"), "inputs should be at least one name"),
        (("x", {}, "a"), "nodes should be at least one node"),
        (("x", {"a": node}, ()), "outputs should be at least one name"),
        (("x", {"a": node}, {}), "outputs should be at least one name"),
    ):
        with pytest.raises(ValueError, match=message):
            m.Graph(*arguments)


@BOTH
def test_what_a_call_refuses(module: Any) -> None:
    graph, x = branching(module, "float32"), arrays("float32")
    for verb in (graph, graph.run, graph.forward, graph.forward_carrying):
        with pytest.raises(
            ValueError, match="x should have the inputs of the graph: 'speaker' is missing; 'y' is unknown"
        ):
            verb({"tokens": 1, "features": 2, "y": 3})
        for wrong in (x["tokens"], (1, 2), 3):
            with pytest.raises(
                TypeError, match="x should be a mapping from 'tokens', 'features', 'speaker' to arrays, or"
            ):
                verb(wrong)
        with pytest.raises(ValueError, match=r"^nodes\['embedded'\], a Embedding: ids"):
            verb({**x, "tokens": x["tokens"] + 9})
        with pytest.raises(ValueError, match=r"x should have inputs \(B, T, ...\) that agree.*'features' \(4, 5\)"):
            verb({**x, "features": x["features"][:, :5]}, lengths=LENGTHS)
        with pytest.raises(ValueError, match=r"x\['tokens'\] should be of shape \(B, T, ...\) where lengths are given"):
            verb({**x, "tokens": x["tokens"][0]}, lengths=LENGTHS)
        with pytest.raises(ValueError, match=r"x should have inputs \(B, ...\) that agree.*'speaker' \(1,\)"):
            verb({**x, "speaker": x["speaker"][:1]})
        with pytest.raises(ValueError, match="lengths should be in 0..6"):
            verb(x, lengths=[7, 1, 1, 1])
        for state in (3, (None,) * 3, [None]):
            with pytest.raises(TypeError, match="state should be a mapping with the states of 'hidden' and 'inner'"):
                verb(x, state)
        with pytest.raises(ValueError, match="state should have the states of 'hidden' and 'inner', not of 'hidden'"):
            verb(x, {"hidden": None})
        with pytest.raises(ValueError, match=r"nodes\['hidden'\], a LSTM: state.h should be of shape \(4, 1, 9\)"):
            verb(x, graph.initial_state(3))
    ragged = [np.zeros(n, int) for n in (3, 1, 2, 2)]
    with pytest.raises(ValueError, match=r"x\['features'\] should have rows of \[3, 1, 2, 2\] steps"):
        graph({**x, "tokens": ragged, "features": [np.zeros((n, 3), "f4") for n in (3, 1, 2, 1)]})
    still = module.Graph("v", {"y": (module.Linear(3, 3), "v")}, "y", without_time="v")
    with pytest.raises(ValueError, match="lengths should be None: no input has an axis of time"):
        still(np.zeros((2, 3), "f4"), lengths=[1, 1])
    for options in ({"state": {}}, {"resets": np.zeros((2, 4), bool)}):
        with pytest.raises(ValueError, match="should be None: .* carries no state"):
            still(np.zeros((2, 3), "f4"), **options)
    assert still.time == "pointwise" and still.initial_state(2) is None
    y, tape = graph.forward(x)
    for dy, error, message in (
        (3, TypeError, "dy should be a mapping from 'labels', 'score' to arrays, or a tuple of 2"),
        ({"label": 3}, ValueError, "dy should have outputs of the graph: 'label' is unknown"),
        ({"score": y["labels"]}, ValueError, r"dy\['score'\] should be of shape \(4, 4\)"),
    ):
        with pytest.raises(error, match=message):
            graph.backward(dy, tape)
    with pytest.raises(ValueError, match="of another layer"):
        graph.backward(y, still.forward(np.zeros((2, 3), "f4"))[1])
    with pytest.raises(ValueError, match="truncate should be None"):
        still.backward(np.zeros((2, 3), "f4"), still.forward(np.zeros((2, 3), "f4"))[1], truncate=1)


@BOTH
def test_errors_say_of_which_node_they_are(module: Any) -> None:
    graph = module.Graph(("x", "v"), {"inner": (inner(module, "float32"), "x", "v")}, "inner.second", without_time="v")
    x = {"x": np.zeros((2, 3, 9), "f4"), "v": np.zeros((2, 3, 2), "f4")}
    with pytest.raises(
        ValueError, match=r"^nodes\['inner'\], a Graph: nodes\['b'\], a Concatenate: arrays\[1\] should be of"
    ):
        graph(x)
    with pytest.raises(
        ValueError, match=r"^nodes\['inner'\], a Graph: nodes\['a'\], a Sequential: layers\[0\], a GRU: x"
    ):
        graph.step((np.zeros((2, 4), "f4"), x["v"][:, 0]))
    with pytest.raises(
        ValueError, match=r"^x_t should have inputs \(B, ...\) that agree in the first axes, not 'x' \(2,\), "
    ):
        graph.step((x["x"][:, 0], np.zeros((3, 2), "f4")))


def test_layers_of_ones_own() -> None:
    """Several inputs, a backward that returns one gradient for each; one that does not is refused."""
    graph = fs.Graph(("a", "b"), {"y": (Odd(), "a", "b")}, "y")
    x = np.ones((2, 3, 4), "f4")
    y, tape = graph.forward((x, 2 * x))
    assert (y == 3).all() and all((one == 1).all() for one in graph.backward(x, tape).values())
    wrong = fs.Graph(("a", "b"), {"y": (Odd(count=3), "a", "b")}, "y")
    with pytest.raises(ValueError, match="backward should return 2 gradients, one for each input, not 3"):
        wrong.backward(x, wrong.forward((x, x))[1])


def test_own_layers_in_files(tmp_path: Path) -> None:
    graph = fs.Graph("x", {"y": (Odd(), "x", "x")}, "y")
    graph.save(tmp_path / "graph")
    with pytest.raises(ValueError, match="it holds a 'Odd', which this version does not know"):
        fs.load(tmp_path / "graph")
    loaded = fs.load(tmp_path / "graph", classes=[Odd])
    assert_same_bits(loaded(np.ones((1, 2), "f4")), np.full((1, 2), 2, "f4"))


# Files that lie.


def good_config() -> dict[str, Any]:
    linear = {"class": "Linear", "config": {"in_features": 2, "out_features": 2}}
    nodes = [
        {"name": "a", **linear, "inputs": ["x"]},
        {"name": "b", "class": "Add", "config": {}, "inputs": ["a", "x"]},
    ]
    return {"inputs": ["x"], "nodes": nodes, "outputs": {"y": "b"}, "without_time": []}


def write(path: Path, config: Any) -> None:
    from safetensors.numpy import save_file

    metadata = {"fastseq.format": io._FORMAT, "fastseq.class": "Graph", "fastseq.config": json.dumps(config)}
    save_file({"a.weight": np.ones((2, 2), "f4"), "a.bias": np.ones(2, "f4")}, path, metadata)


def test_a_good_file(tmp_path: Path) -> None:
    write(tmp_path / "good", good_config())
    assert_same_bits(fs.load(tmp_path / "good")(np.ones((1, 2), "f4")), np.full((1, 2), 4, "f4"))


def changed(*path: Any, value: Any) -> Any:
    config = good_config()
    place: Any = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return config


HOSTILE: dict[str, Any] = {
    "list": [],
    "number": 3,
    "none": None,
    "empty": {},
    "no nodes": changed("nodes", value=[]),
    "nodes of numbers": changed("nodes", value=[3]),
    "nodes by name": changed("nodes", value={"a": {}}),
    "text for nodes": changed("nodes", value="abc"),
    "no class": changed("nodes", 0, value={"name": "a", "config": {}, "inputs": ["x"]}),
    "no name": changed("nodes", 0, value={"class": "Tanh", "config": {}, "inputs": ["x"]}),
    "class of states": changed("nodes", 1, "class", value="State"),
    "function": changed(
        "nodes", 1, value={"name": "b", "class": "load", "config": {"path": "/etc/passwd"}, "inputs": ["a"]}
    ),
    "a list for a class": changed("nodes", 1, "class", value=["Add"]),
    "inputs of numbers": changed("nodes", 1, "inputs", value=[1, 2]),
    "a number for inputs": changed("nodes", 1, "inputs", value=3),
    "text for inputs": changed("nodes", 1, "inputs", value="xq"),
    "cycle": changed("nodes", 0, "inputs", value=["b"]),
    "itself": changed("nodes", 1, "inputs", value=["b", "x"]),
    "unknown": changed("nodes", 1, "inputs", value=["a", "z"]),
    "name twice": changed("nodes", 1, "name", value="a"),
    "name with a dot": changed("nodes", 0, "name", value="a.weight"),
    "name of a number": changed("nodes", 0, "name", value=7),
    "unused": changed("outputs", value={"y": "a"}),
    "outputs of nothing": changed("outputs", value={}),
    "outputs of numbers": changed("outputs", value={"y": 3}),
    "outputs unknown": changed("outputs", value={"y": "zz"}),
    "inputs unknown": changed("inputs", value=["y"]),
    "inputs of nothing": changed("inputs", value=[]),
    "without_time of others": changed("without_time", value=["a"]),
    "no without_time": {name: part for name, part in good_config().items() if name != "without_time"},
    "widths": changed("nodes", 0, "config", "out_features", value=3),
    "sizes below zero": changed("nodes", 0, "config", "out_features", value=-2),
    "dtypes": changed("nodes", 1, "config", value={"dtype": "float64"}),
    "parts of none": changed("nodes", 1, "inputs", value=["a.h", "x"]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_configurations(name: str, tmp_path: Path) -> None:
    write(tmp_path / "graph", HOSTILE[name])
    with pytest.raises(ValueError, match=r"path: .* is damaged"):
        fs.load(tmp_path / "graph")


def test_deep_and_wide_configurations(tmp_path: Path) -> None:
    """What is nested or long ends in an error soon: nothing here grows faster than the file."""
    config = good_config()
    for _ in range(200):
        config = {
            "inputs": ["x"],
            "nodes": [{"name": "g", "class": "Graph", "config": config, "inputs": ["x"]}],
            "outputs": {"y": "g"},
            "without_time": [],
        }
    write(tmp_path / "deep", config)
    with pytest.raises(ValueError, match="is damaged"):
        fs.load(tmp_path / "deep")
    many = 1000
    tanh = {"class": "Tanh", "config": {}}
    circle = [{"name": f"n{i}", **tanh, "inputs": [f"n{(i + 1) % many}"]} for i in range(many)]
    write(tmp_path / "circle", changed("nodes", value=circle))
    with pytest.raises(ValueError, match="which is a cycle"):
        fs.load(tmp_path / "circle")
    pairs = [{"name": f"n{i}", **tanh, "inputs": [f"n{i ^ 1}"]} for i in range(many)]
    write(tmp_path / "pairs", changed("nodes", value=pairs))
    with pytest.raises(ValueError, match=r"and \d+ more|which is a cycle") as caught:
        fs.load(tmp_path / "pairs")
    assert len(str(caught.value)) < 10_000
    unknown = [{"name": f"n{i}", **tanh, "inputs": [f"m{i}"]} for i in range(many)]
    write(tmp_path / "unknown", changed("nodes", value=unknown))
    with pytest.raises(ValueError, match=r"and \d+ more"):
        fs.load(tmp_path / "unknown")
    line = [{"name": f"n{i}", **tanh, "inputs": [f"n{i + 1}" if i + 1 < many else "x"]} for i in range(many)]
    graph = {"inputs": ["x"], "nodes": line, "outputs": {"y": "n0"}, "without_time": []}
    from safetensors.numpy import save_file

    metadata = {"fastseq.format": io._FORMAT, "fastseq.class": "Graph", "fastseq.config": json.dumps(graph)}
    save_file({}, tmp_path / "line", metadata)
    assert len(fs.load(tmp_path / "line").nodes) == many


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_graphs_run_in_any_order_of_declaration(data: Any) -> None:
    """The same bits and gradients, however the nodes are shuffled."""
    count = data.draw(st.integers(1, 8))
    reads = [data.draw(st.lists(st.integers(-1, i - 1), min_size=1, max_size=3)) for i in range(count)]
    order = data.draw(st.permutations(range(count)))

    def of_order(places: Any) -> Any:
        nodes: dict[str, Any] = {}
        for i in places:
            names = ["x" if j < 0 else f"n{j}" for j in reads[i]]
            layer = fs.Linear(3, 3, seed=i) if len(names) == 1 else (fs.Add, fs.Multiply)[i % 2]()
            nodes[f"n{i}"] = (layer, *names)
        ends = [f"n{i}" for i in range(count) if all(i not in own for own in reads)]
        read = {j for own in reads for j in own}
        return fs.Graph("x", nodes, tuple(ends)) if -1 in read else None

    one, other = of_order(range(count)), of_order(order)
    if one is None:
        return
    assert set(one._wiring.order) == {f"n{i}" for i in range(count)}
    x = np.random.default_rng(0).normal(size=(2, 3, 3)).astype("f4")
    results = []
    for graph in (one, other):
        y, tape = graph.forward(x)
        dy = np.ones_like(y) if not isinstance(y, dict) else {name: np.ones_like(a) for name, a in y.items()}
        graph.backward(dy, tape)
        results.append(y if isinstance(y, dict) else {"y": y})
    for name, array in results[0].items():
        assert_same_bits(results[1][name], array)
    for name, array in one.grads.items():
        assert_close(other.grads[name], array, 1e-5)


# Mistakes that are easy to make here.


def red(check: Callable[[], Any]) -> None:
    with pytest.raises((AssertionError, ValueError, KeyError)):
        check()


def test_planted_mistakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each turns a comparison above red, which is green without it."""
    from fastseq.layers import graph as module
    from fastseq.layers.joining import Joining
    from fastseq.layers.recurrent import Recurrent

    def differences() -> None:
        test_finite_differences_through_branches("both", True, fs)

    def rows_cut() -> None:
        test_a_padded_batch_is_its_rows_cut(fs)

    mistakes: list[tuple[Any, str, Any, Callable[[], Any]]] = [
        # the last gradient in place of the sum
        (module, "_add", lambda g, value, gradient: g.update({value: gradient}), differences),
        # lengths that reach no node
        (module.Graph, "_opened", _without_lengths(module.Graph._opened), rows_cut),
        # gradients of arrays exchanged
        (Joining, "_backward_values", _exchanged(Joining._backward_values), differences),
        # gradients of c given to h
        (Recurrent, "_backward_values", _renamed(Recurrent._backward_values), differences),
        # the state of a node that starts anew
        (module.Graph, "_states", lambda self, state, resets: {}, lambda: test_steps_are_the_call(fs)),
        # nodes in the order of declaration
        (Wiring, "_sorted", lambda self: (list(self.nodes), []), lambda: test_a_graph_is_its_nodes(fs)),
        # padding that stays
        (module, "cleared", lambda array, lengths: array, lambda: test_joined_values_are_zero_in_the_padding(fs)),
        # the names that a decoder has for lengths
        (fs.TransformerDecoder, "_length_names", ("lengths",), lambda: test_attention_to_another_value(fs)),
    ]
    for check in (differences, rows_cut):
        check()
    for owner, name, wrong, check in mistakes:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, wrong)
            red(check)
        check()


def _without_lengths(opened: Any) -> Any:
    return lambda self, x, lengths: (opened(self, x, lengths)[0], None)


def _exchanged(backward: Any) -> Any:
    return lambda self, *arguments: tuple(reversed(backward(self, *arguments)))


def _renamed(backward: Any) -> Any:
    names = {"c": "h", "h": "c"}
    return lambda self, dvalues, *more: backward(self, {names.get(n, n): a for n, a in dvalues.items()}, *more)


def strided() -> Any:
    """Two convolutions with a stride, added, and what reads their frames."""
    return fs.Graph(
        "x",
        {
            "left": (fs.Conv1d(3, 8, 3, padding="causal", stride=2, seed=0), "x"),
            "right": (fs.Conv1d(3, 8, 5, padding="causal", stride=2, seed=1), "x"),
            "sum": (fs.Add(), "left", "right"),
            "hidden": (fs.GRU(8, 5, seed=2), "sum"),
            "mean": (fs.MeanOverTime(), "hidden"),
        },
        {"frames": "hidden", "whole": "mean"},
    )


def test_lengths_are_those_after_a_convolution() -> None:
    graph, x = strided(), np.random.default_rng(0).standard_normal((3, 9, 3)).astype("float32")
    lengths = [9, 4, 1]
    y, tape = graph.forward(x, lengths=lengths)
    assert y["frames"].shape == (3, 5, 5)
    for row, length in enumerate(lengths):
        alone = graph(x[row : row + 1, :length])
        steps = alone["frames"].shape[1]
        np.testing.assert_array_equal(y["frames"][row, :steps], alone["frames"][0])
        np.testing.assert_array_equal(y["whole"][row], alone["whole"][0])
        assert not y["frames"][row, steps:].any()
    dx = graph.backward({name: np.ones_like(array) for name, array in y.items()}, tape)
    _, tape = graph.forward(x[1:2, :4])
    alone = graph.backward({"frames": np.ones((1, 2, 5), "float32"), "whole": np.ones((1, 5), "float32")}, tape)
    np.testing.assert_allclose(dx[1, :4], alone[0], rtol=1e-5, atol=1e-6)
    assert not dx[1, 4:].any()


def test_values_of_unequal_lengths_are_refused() -> None:
    nodes = {"slow": (fs.Conv1d(3, 3, 1, stride=2, seed=0), "x"), "sum": (fs.Add(), "slow", "x")}
    with pytest.raises(ValueError, match=r"nodes\['sum'\] .* same lengths, not 'slow' of \[2, 1\] and 'x' of \[4, 2\]"):
        fs.Graph("x", nodes, "sum")(np.zeros((2, 4, 3), "float32"), lengths=[4, 2])


def test_steps_between_frames_have_no_outputs() -> None:
    nodes = {name: (node.layer, *node.inputs) for name, node in strided().nodes.items() if name != "mean"}
    graph = fs.Graph("x", nodes, "hidden")
    x = np.random.default_rng(0).standard_normal((2, 9, 3)).astype("float32")
    state, frames = None, []
    for t in range(9):
        y, state = graph.step(x[:, t], state)
        assert (y is None) == (t % 2 == 1)
        frames += [] if y is None else [y]
    np.testing.assert_array_equal(np.stack(frames, axis=1), graph(x))
    np.testing.assert_array_equal(state["hidden"].h, graph.run(x)[1]["hidden"].h)


def test_a_step_that_mixes_frames_and_steps_is_refused() -> None:
    nodes = {"slow": (fs.Conv1d(3, 3, 1, stride=2, seed=0), "x"), "sum": (fs.Add(), "slow", "x")}
    graph, x = fs.Graph("x", nodes, "sum"), np.zeros((2, 3), "float32")
    _, state = graph.step(x)
    with pytest.raises(ValueError, match=r"nodes\['sum'\].* values of the same steps, not 'slow'"):
        graph.step(x, state)


def test_training_takes_the_lengths_after_a_convolution() -> None:
    """Of one output and of several: the loss is that over the frames of each row, and no others."""
    rng, lengths = np.random.default_rng(0), np.array([9, 4, 1])
    x, tags = rng.standard_normal((3, 9, 3)).astype("float32"), rng.integers(0, 4, (3, 5))
    frames = np.array([5, 2, 1])

    def nodes() -> dict[str, Any]:
        slow, fine = fs.Conv1d(3, 4, 3, padding="causal", stride=2, seed=0), fs.Linear(3, 2, seed=1)
        return {"tags": (slow, "x"), "value": (fine, "x")}

    one = fs.Graph("x", {"tags": nodes()["tags"]}, "tags")
    of_tags = fs.losses.softmax_cross_entropy(one(x, lengths=lengths), tags, lengths=frames)[0]
    history = fs.training.fit(
        one, [fs.training.Batch(x, tags, lengths)], loss="cross_entropy", epochs=1, progress=False
    )
    assert history.loss[0] == pytest.approx(of_tags, rel=1e-6)
    both = fs.Graph("x", nodes(), ("tags", "value"))
    of_value = fs.losses.mean_squared_error(both(x)["value"], x[:, :, :2], lengths=lengths)[0]
    batch = fs.training.Batch(x, {"tags": tags, "value": x[:, :, :2]}, lengths)
    losses = {"tags": "cross_entropy", "value": "mean_squared_error"}
    history = fs.training.fit(both, [batch], loss=losses, epochs=1, progress=False)
    assert history.loss[0] == pytest.approx(of_tags + of_value, rel=1e-6)
