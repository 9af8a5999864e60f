"""Cases as ONNX files, of standard operators, or of the fused ones that ONNX Runtime has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastseq.bench.cases import Outputs, attention, recurrent
from fastseq.bench.cases.attention import Attention
from fastseq.bench.cases.encoder import Encoder
from fastseq.bench.cases.minilm import Architecture
from fastseq.bench.cases.recurrent import Numbers, Recurrent
from fastseq.checks import Array

STANDARD, FUSED = ("", 20), ("com.microsoft", 1)  # operator sets; Gelu is in the former since 20


@dataclass(frozen=True)
class Exported:
    """A case as an ONNX file.

    Attributes
    ----------
    model : bytes
        The file.
    inputs : dict
        The arrays of the case, by the names of the graph's inputs.
    outputs : callable
        Takes the outputs of the graph, in order, to those of a `Model`.
    """

    model: bytes
    inputs: dict[str, Array]
    outputs: Callable[[Sequence[Array]], Outputs]


def of_recurrent(case: Recurrent) -> Exported:
    """Export a recurrent layer: one node."""
    numbers = recurrent.numbers(case)
    inputs = {"X": np.ascontiguousarray(numbers.x.swapaxes(0, 1)), "initial_h": numbers.h[None]}
    if numbers.c is not None:
        inputs["initial_c"] = numbers.c[None]

    def outputs(results: Sequence[Array]) -> Outputs:
        y, *ends = results
        return (y[:, 0].swapaxes(0, 1), *(end[0] for end in ends))

    return Exported(_recurrent(case, numbers), inputs, outputs)


def of_attention(case: Attention) -> Exported:
    """Export attention, of standard operators."""
    shape = case.batch, case.heads, case.time, case.width
    inputs = dict(zip("qkv", attention.numbers(case), strict=False))
    return Exported(_attention(shape, case.causal), inputs, tuple)


def of_encoder(case: Encoder, fused: bool) -> Exported:
    """Export an encoder, of the fused operators of ONNX Runtime or of standard ones."""
    masked = case.shortest is not None
    inputs = {"ids": case.ids()}
    if masked:
        inputs["mask"] = case.real.astype(np.int32)
    model = _encoder(case.architecture, case.bert_weights(), case.batch, case.time, masked, fused)
    return Exported(model, inputs, lambda results: (results[0][case.real],))


class Graph:
    """A graph that grows node by node; every node has one output that is used, named by a number."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inputs: list[Any] = []

    def input(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> str:
        """An input of the graph."""
        self._inputs.append(_value(name, dtype, shape))
        return name

    def constant(self, value: Any) -> str:
        """An array that belongs to the graph."""
        from onnx import numpy_helper

        name = f"constant{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, operator: str, *inputs: str, fused: bool = False, unused: int = 0, **attributes: Any) -> str:
        """A node; what is computed of it has the name that is returned. It may have more outputs that nobody uses."""
        from onnx import helper

        name = f"value{len(self._nodes)}"
        rest = [f"{name}_{i}" for i in range(unused)]
        domain = FUSED[0] if fused else STANDARD[0]
        self._nodes.append(helper.make_node(operator, list(inputs), [name, *rest], domain=domain, **attributes))
        return name

    def file(self, output: str, shape: tuple[int, ...]) -> bytes:
        """The graph as a file."""
        from onnx import checker, helper

        result = _value(output, "float32", shape)
        graph = helper.make_graph(self._nodes, "graph", self._inputs, [result], self._constants)
        opsets = [helper.make_opsetid(*opset) for opset in (STANDARD, FUSED)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        checker.check_model(model)
        return bytes(model.SerializeToString())


def _value(name: str, dtype: str, shape: tuple[int, ...]) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


# Where each gate of ONNX stands in PyTorch's order: i o f c in i f g o, and z r h in r z n.
_ONNX_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}


def _recurrent(case: Recurrent, numbers: Numbers) -> bytes:
    """A graph of one node, time-major as the operator requires."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    order = _ONNX_GATES[case.kind]

    def reordered(name: str) -> Array:
        blocks = np.split(numbers.weights[name], len(order))
        return np.concatenate([blocks[gate] for gate in order])

    constants = {
        "W": reordered("weight_ih_l0"),
        "R": reordered("weight_hh_l0"),
        "B": np.concatenate([reordered("bias_ih_l0"), reordered("bias_hh_l0")]),
    }
    parts = ["h", "c"] if case.kind == "lstm" else ["h"]
    state = [1, case.batch, case.hidden]
    settings: dict[str, Any] = {"hidden_size": case.hidden}
    if case.kind == "gru":
        settings["linear_before_reset"] = 1  # PyTorch's GRU, not the paper's
    node = helper.make_node(
        case.kind.upper(),
        ["X", "W", "R", "B", "", *(f"initial_{part}" for part in parts)],
        ["Y", *(f"Y_{part}" for part in parts)],
        **settings,
    )

    def value(name: str, shape: list[int]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        [node],
        case.kind,
        [value("X", [case.time, case.batch, case.inputs]), *(value(f"initial_{part}", state) for part in parts)],
        [value("Y", [case.time, 1, case.batch, case.hidden]), *(value(f"Y_{part}", state) for part in parts)],
        [numpy_helper.from_array(array[None], name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _attention(shape: tuple[int, int, int, int], causal: bool) -> bytes:
    """Attention of q, k and v of one shape (B, heads, T, D).

    Of standard operators of old: Attention of operator set 23 took as long or longer in both runtimes.
    """
    graph = Graph()
    q, k, v = (graph.input(name, shape) for name in "qkv")
    keys = graph.add("Transpose", k, perm=[0, 1, 3, 2])
    mask = np.where(np.tri(shape[2], dtype=bool), 0, -np.inf) if causal else None
    return graph.file(_attended(graph, q, keys, v, shape[3], mask if mask is None else _float(graph, mask)), shape)


def _float(graph: Graph, value: Any) -> str:
    return graph.constant(np.asarray(value, np.float32))


def _attended(graph: Graph, q: str, keys: str, v: str, width: int, mask: str | None) -> str:
    """softmax(q keys / sqrt(width) + mask) v, where keys are (B, heads, D, T)."""
    scores = graph.add("MatMul", graph.add("Mul", q, _float(graph, width**-0.5)), keys)
    if mask is not None:
        scores = graph.add("Add", scores, mask)
    return graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)


class _Weights:
    """The weights of an encoder as constants of a graph, those of linear maps the other way round, as it wants them."""

    def __init__(self, graph: Graph, arrays: Mapping[str, Array]) -> None:
        self._graph = graph
        self._arrays = arrays

    def of(self, name: str) -> str:
        array = self._arrays[name]
        turned = array.ndim == 2 and not name.startswith("embeddings.")
        return self._graph.constant(array.T if turned else array)

    def both(self, name: str) -> tuple[str, str]:
        return self.of(f"{name}.weight"), self.of(f"{name}.bias")

    def projections(self, layer: str) -> tuple[str, str]:
        """Those of queries, keys and values, side by side."""
        names = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
        weight = np.concatenate([self._arrays[f"{name}.weight"] for name in names]).T
        return self._graph.constant(weight), self._graph.constant(
            np.concatenate([self._arrays[f"{name}.bias"] for name in names])
        )


def _encoder(
    architecture: Architecture, weights: Mapping[str, Array], batch: int, time: int, masked: bool, fused: bool
) -> bytes:
    """A BERT encoder of ids (B, T) int32, and with padding a mask (B, T) int32, 1 where a token is real."""
    graph = Graph()
    given = _Weights(graph, weights)
    ids = graph.input("ids", (batch, time), "int32")
    mask = graph.input("mask", (batch, time), "int32") if masked else ""
    x = (_fused if fused else _plain)(graph, given, architecture, ids, mask, batch, time)
    return graph.file(x, (batch, time, architecture.width))


def _fused(
    graph: Graph, weights: _Weights, architecture: Architecture, ids: str, mask: str, batch: int, time: int
) -> str:
    """What ONNX Runtime's optimiser of Transformers makes of BERT."""
    eps = architecture.eps
    tables = [weights.of(f"embeddings.{name}_embeddings.weight") for name in ("word", "position", "token_type")]
    types = graph.constant(np.zeros((batch, time), np.int32))
    norm = weights.both("embeddings.LayerNorm")
    x = graph.add("EmbedLayerNormalization", ids, types, *tables, *norm, fused=True, unused=1, epsilon=eps)
    for layer in architecture.layer_names:
        inputs = [x, *weights.projections(layer), *([mask] if mask else [])]
        attended = graph.add("Attention", *inputs, fused=True, num_heads=architecture.heads)
        x = _added(graph, weights, f"{layer}.attention.output", attended, x, eps)
        inner, inner_bias = weights.both(f"{layer}.intermediate.dense")
        hidden = graph.add("BiasGelu", graph.add("MatMul", x, inner), inner_bias, fused=True)
        x = _added(graph, weights, f"{layer}.output", hidden, x, eps)
    return x


def _added(graph: Graph, weights: _Weights, name: str, x: str, skip: str, eps: float) -> str:
    """norm(skip + W x + b)."""
    weight, bias = weights.both(f"{name}.dense")
    norm = weights.both(f"{name}.LayerNorm")
    product = graph.add("MatMul", x, weight)
    return graph.add("SkipLayerNormalization", product, skip, *norm, bias, fused=True, epsilon=eps)


def _plain(
    graph: Graph, weights: _Weights, architecture: Architecture, ids: str, mask: str, batch: int, time: int
) -> str:
    """Of standard operators alone."""
    width, heads, size = architecture.width, architecture.heads, architecture.width // architecture.heads

    def linear(x: str, weight: str, bias: str) -> str:
        return graph.add("Add", graph.add("MatMul", x, weight), bias)

    def normed(x: str, name: str) -> str:
        return graph.add("LayerNormalization", x, *weights.both(name), axis=-1, epsilon=architecture.eps)

    words, positions, types = (
        weights.of(f"embeddings.{name}_embeddings.weight") for name in ("word", "position", "token_type")
    )
    places = graph.constant(np.arange(time, dtype=np.int32)[None])
    x = graph.add("Add", graph.add("Gather", words, ids), graph.add("Gather", positions, places))
    x = graph.add("Add", x, graph.add("Gather", types, graph.constant(np.zeros((1, 1), np.int32))))
    x = normed(x, "embeddings.LayerNorm")
    if mask:
        # 0 where a token is real; where it is not, low enough that nothing of it is left.
        hidden = graph.add("Sub", _float(graph, 1), graph.add("Cast", mask, to=1))
        hidden = graph.add("Mul", hidden, _float(graph, -1e4))
        mask = graph.add("Reshape", hidden, graph.constant(np.array([batch, 1, 1, time])))
    split = graph.constant(np.array([batch, time, heads, size]))
    joined = graph.constant(np.array([batch, time, width]))

    def headed(x: str, name: str, perm: list[int]) -> str:
        return graph.add("Transpose", graph.add("Reshape", linear(x, *weights.both(name)), split), perm=perm)

    for layer in architecture.layer_names:
        q = headed(x, f"{layer}.attention.self.query", [0, 2, 1, 3])
        keys = headed(x, f"{layer}.attention.self.key", [0, 2, 3, 1])
        v = headed(x, f"{layer}.attention.self.value", [0, 2, 1, 3])
        out = graph.add("Transpose", _attended(graph, q, keys, v, size, mask or None), perm=[0, 2, 1, 3])
        out = linear(graph.add("Reshape", out, joined), *weights.both(f"{layer}.attention.output.dense"))
        x = normed(graph.add("Add", x, out), f"{layer}.attention.output.LayerNorm")
        inner = graph.add("Gelu", linear(x, *weights.both(f"{layer}.intermediate.dense")))
        out = linear(inner, *weights.both(f"{layer}.output.dense"))
        x = normed(graph.add("Add", x, out), f"{layer}.output.LayerNorm")
    return x
