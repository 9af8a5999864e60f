"""Operators of ONNX: the single-operator cases of the onnx package, and graphs of operators."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import assert_close, assert_same_bits

import fastseq as fs
from fastseq.layers.operators import (
    ONNX,
    Apply,
    Cast,
    Constant,
    MatMul,
    Operator,
    Reduce,
    Reshape,
    SliceAxes,
    Transpose,
)

onnx = pytest.importorskip("onnx", reason="onnx is not installed: take the extra 'test'")
BOTH = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])

# Inputs of operators that are settings here, in the order of ONNX.
SETTINGS: dict[str, tuple[str, ...]] = {
    **{name: ("axes",) for name in ONNX if name.startswith("Reduce") or "squeeze" in name.lower()},
    "Slice": ("starts", "ends", "axes", "steps"),
    "Clip": ("alpha", "beta"),
}
COMPILED = (fs.ReLU, fs.Sigmoid, fs.Tanh)


@cache
def cases() -> dict[str, Any]:
    """The cases of one node, of an operator in the table."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_model_tests(kind="node")
    nodes = {case.name: case.model.graph.node for case in found}
    ours = {name for name, own in nodes.items() if len(own) == 1 and own[0].op_type in ONNX and not own[0].domain}
    return {case.name: case for case in found if case.name in ours}


class NotHere(Exception):
    """What the operators do not express."""


def layer_and_inputs(node: Any, arrays: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The layer of a node, and the arrays that it reads."""
    attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    given = [arrays.get(name) for name in node.input]
    options: dict[str, Any] = {}
    for name, value in attributes.items():
        if name in ("saturate", "round_mode", "fmod", "direction"):
            continue
        if name == "noop_with_empty_axes":
            if value:
                raise NotHere(name)  # that is Identity
            continue
        if name == "to":
            value = onnx.helper.tensor_dtype_to_np_dtype(value).name
            if value not in ("float32", "float64", "int64", "int32", "int8", "uint8", "bool"):
                raise NotHere(value)
        options[name] = bool(value) if name in ("keepdims", "allowzero", "select_last_index") else value
    if node.op_type == "Constant":
        value = onnx.numpy_helper.to_array(options.pop("value"))
        layer = Constant(list(value.shape), dtype=value.dtype.name)
        layer.parameters["value"] = value
        return layer, []
    settings = SETTINGS.get(node.op_type, ())
    if settings:
        for name, array in zip(settings, given[1:], strict=False):
            if array is not None:
                options[name] = array.tolist()
        given = given[:1]
        if "axes" in options and not options["axes"] and node.op_type.startswith("Reduce"):
            options.pop("axes")
    if "dtype" not in options and given and given[0].dtype == np.float64:
        options["dtype"] = "float64"
    return ONNX[node.op_type](**options), [array for array in given if array is not None]


def result(case: Any, inputs: Any) -> Any:
    names = [value.name for value in case.model.graph.input]
    arrays = dict(zip(names, (np.asarray(array) for array in inputs), strict=False))
    layer, given = layer_and_inputs(case.model.graph.node[0], arrays)
    if any(array.dtype.kind not in "fiub" for array in given):
        raise NotHere("a dtype that NumPy has not, or text")
    return layer(*(array.astype("float32") if isinstance(layer, COMPILED) else array for array in given))


def test_the_cases_of_onnx() -> None:
    """Every case of an operator in the table that the operators express; 2e-3 where it is of float16."""
    done, left, faults = Counter[str](), Counter[str](), []
    for name, case in cases().items():
        kind = case.model.graph.node[0].op_type
        for inputs, outputs in case.data_sets:
            expected = np.asarray(outputs[0])
            try:
                y = result(case, inputs)
                assert y.shape == expected.shape, f"{y.shape} and not {expected.shape}"
                assert y.dtype == expected.dtype or kind in ("Relu", "Sigmoid", "Tanh"), y.dtype
                relative = 2e-3 if expected.dtype == np.float16 else 2e-6 if expected.dtype.kind == "f" else 0
                assert_close(np.asarray(y, "float64"), np.asarray(expected, "float64"), relative)
                done[kind] += 1
            except NotHere:
                left[kind] += 1
            except (AssertionError, TypeError, ValueError) as error:
                faults.append(f"{name}: {error}")
    assert not faults, faults
    assert sum(done.values()) > 400 and set(left) <= {"Cast", "Equal", "ReduceSum"}
    assert set(ONNX) - set(done) == {"Cast"}


def test_casts() -> None:
    x = np.array([-1.7, 0.0, 2.5], "f4")
    for to, expected in (("int64", [-1, 0, 2]), ("bool", [True, False, True]), ("float64", x)):
        y = Cast(to)(x)
        assert y.dtype == to and np.array_equal(y, expected)


def attention_by_hand(module: Any, dtype: str = "float32") -> Any:
    """Scores of a recurrent layer's outputs, softmax over time, and the sum under these weights: all by operators."""
    o, of = module.operators, {"dtype": dtype}
    graph = module.Graph(
        "x",
        {
            "time_first": (o.Transpose([1, 0, 2], **of), "x"),
            "again": (o.Transpose([1, 0, 2], **of), "time_first"),
            "h": (module.LSTM(3, 4, seed=1, **of), "again"),
            "vector": (o.Constant([4, 1], **of),),
            "scores": (o.MatMul(**of), "h", "vector"),
            "weights": (o.SoftmaxAxis(1, **of), "scores"),
            "weighted": (o.Apply("Mul", **of), "h", "weights"),
            "sum": (o.Reduce("ReduceSum", [1], keepdims=False, **of), "weighted"),
            "two": (o.Constant([1], [2], "int64", **of),),
            "order": (o.Constant([4], [3, 2, 1, 0], "int64", **of),),
            "gathered": (o.Gather(-1, **of), "sum", "order"),
            "raised": (o.Apply("Pow", **of), "gathered", "two"),
            "part": (o.SliceAxes([-1], [-4], [1], [-1], **of), "raised"),
            "wide": (o.ConcatAxis(1, **of), "part", "raised"),
            "y": (module.Linear(7, 2, seed=2, **of), "wide"),
        },
        {"result": "y", "weights": "weights"},
    )
    graph.parameters["vector.value"] = np.array([[0.3], [-1.0], [0.7], [2.0]])
    return graph


@BOTH
def test_a_graph_of_operators(module: Any, tmp_path: Path) -> None:
    graph = attention_by_hand(module)
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype("f4")
    h, _ = graph.nodes["h"].layer(x)
    scores = h @ np.array([[0.3], [-1.0], [0.7], [2.0]], "f4")
    weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    squares = (h * weights).sum(axis=1)[:, ::-1] ** 2
    expected = graph.nodes["y"].layer(np.concatenate([squares[:, :0:-1], squares], axis=1))
    y = graph(x)
    assert_close(y["result"], expected, 1e-5)
    assert_close(y["weights"], weights, 1e-6)
    graph.save(tmp_path / "graph")
    loaded = (fs.load if module is fs else fs.reference.load)(tmp_path / "graph")
    for other in (loaded, pickle.loads(pickle.dumps(graph)), copy.copy(graph), copy.deepcopy(graph)):
        assert type(other.nodes["sum"].layer) is module.operators.Reduce
        assert repr(other) == repr(graph)
        for name, array in y.items():
            assert_same_bits(other(x)[name], array)
    assert "order" in graph.summary() and graph.weights == "float32"
    _, end = graph.run(x[:, :3])
    assert not np.array_equal(graph(x, end)["result"], y["result"])


@BOTH
def test_what_graphs_of_operators_refuse(module: Any) -> None:
    graph, x = attention_by_hand(module), np.zeros((2, 5, 3), "f4")
    with pytest.raises(
        ValueError, match=r"nodes\['time_first'\], a Transpose: lengths should be None: Transpose\(.*whole"
    ):
        graph(x, lengths=[1, 2])
    with pytest.raises(ValueError, match=r"nodes\['time_first'\]: Transpose.* computes on whole arrays"):
        graph.step(x[:, 0])
    with pytest.raises(TypeError, match=r"nodes\['time_first'\], a Transpose: a layer needs a forward to be trained"):
        graph.forward(x)
    for layer, arrays, message in (
        (Transpose([0, 0]), (x,), "arrays do not fit Transpose.*float32 \\(2, 5, 3\\)"),
        (Reshape([7, -1]), (x,), "arrays do not fit Reshape"),
        (Reshape(), (x,), "takes 2 input"),
        (Reduce("ReduceMax", [3]), (x,), "arrays do not fit Reduce"),
        (SliceAxes([0], [1], [5]), (x,), "arrays do not fit SliceAxes"),
        (ONNX["Gather"](), (x, np.array([2])), "arrays do not fit Gather"),
        (ONNX["Div"](), (np.array([1]), np.array([0])), "an integer is divided by 0"),
        (MatMul(), (x, x), "arrays do not fit MatMul"),
        (Apply("Add"), (x, x[:, :2]), "arrays do not fit Apply"),
        (Apply("Add"), (x,), r"takes 2 input\(s\), not 1"),
        (ONNX["Flatten"](4), (x,), "axis 4 is out of bounds"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*arrays)
    with pytest.raises(TypeError, match=r"arrays\[0\] should hold real numbers, integers or booleans, not <U1"):
        Transpose()(np.array([["a"]]))
    for make, message in (
        (lambda: Apply("Nonsense"), "function should be one of"),
        (lambda: Apply("Exp", 0.5), "alpha should be None: Exp has none"),
        (lambda: SliceAxes([0], [1, 2]), "ends should be 1 as starts are, not 2"),
        (lambda: SliceAxes([0], [1], [0], [0]), "steps should not be 0"),
        (lambda: Constant([2], [1], "int64"), "values should be 2 elements, not 1"),
        (lambda: Constant([2], [1, 2]), "values should be None"),
        (lambda: Constant([-1]), "shape should be at least 0"),
        (lambda: Constant([1 << 40, 1 << 40], [], "int64"), "shape should have a product of 64 bits"),
        (lambda: fs.Graph("x", {"c": (Constant([1]), "x")}, "c"), r"takes 0 inputs, not 1"),
    ):
        with pytest.raises((ValueError, OverflowError), match=message):
            make()
    for make in (lambda: Transpose(3), lambda: Transpose([True]), lambda: Apply(), lambda: Apply(3)):
        with pytest.raises(TypeError):
            make()


class Halves(Operator):
    """One of one's own."""

    def _call(self, *arrays: Any) -> Any:
        return arrays[0] / 2


def test_an_operator_of_ones_own(tmp_path: Path) -> None:
    graph = fs.Graph("x", {"y": (Halves(), "x")}, "y")
    fs.register(Halves)
    graph.save(tmp_path / "graph")
    assert fs.load(tmp_path / "graph")(np.ones(3, "f4")).tolist() == [0.5] * 3
