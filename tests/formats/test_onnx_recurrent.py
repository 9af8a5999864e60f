"""ONNX's recurrent operators become layers with the outputs of ONNX Runtime; what is not supported is named."""

import dataclasses
import warnings

import numpy as np
import pytest

import fastseq as fs
from fastseq.convert.onnx_recurrent import layer_of
from fastseq.formats import onnx as formats

onnx = pytest.importorskip("onnx", reason="onnx is not installed: take the extra 'test'")
runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: take the extra 'test'")
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4, "DynamicQuantizeLSTM": 4}


def model_of(node, values, initialisers, opset=14):
    """A model of one node; inputs are declared of any shape."""
    helper = onnx.helper
    kind = {np.dtype("f4"): 1, np.dtype("i4"): 6}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, kind[a.dtype], [None] * a.ndim) for n, a in values.items()],
        [helper.make_tensor_value_info(n, 1, None) for n in node.output if n],
        [onnx.numpy_helper.from_array(a, n) for n, a in initialisers.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def contents_of(model, folder):
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return formats.read(path)


def results(model, values):
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return runtime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]).run(None, values)


def converted(model, values, folder):
    contents = contents_of(model, folder)
    (node,) = contents.description["graph"].nodes
    layer, feeding = layer_of(node, contents.arrays)
    got = feeding.run(layer, values)
    return [got[name] for name in node.outputs if name]


def close(got, wanted, what, tolerance=1e-5):
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape, what
        error = np.abs(one - other).max(initial=0)
        assert error <= tolerance * max(np.abs(other).max(initial=0), 1e-2), f"{what}: {error}"


def drawn(rng, op=None):
    """A node with random attributes, its inputs and its constants."""
    draw = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
    op = op or draw("RNN", "GRU", "LSTM")
    quantised = op == "DynamicQuantizeLSTM"
    direction = draw("forward", "reverse", "bidirectional")
    count, gates = 2 if direction == "bidirectional" else 1, GATES[op]
    batch, time, inputs, hidden = (int(rng.integers(1, 7)) for _ in range(4))
    values = {"x": rng.normal(size=(time, batch, inputs)).astype("f4")}
    normal = lambda *shape: (rng.normal(size=shape) * 0.5).astype("f4")  # noqa: E731
    w, r = normal(count, gates * hidden, inputs), normal(count, gates * hidden, hidden)
    constants, last = {"w": w, "r": r}, {}
    if quantised:
        unsigned, wide = draw(True, False), draw(True, False)
        for name, array in (("w", w), ("r", r)):
            shape = (count, gates * hidden) if wide else (count,)
            constants[name] = rng.integers(*((0, 256) if unsigned else (-127, 128)), array.swapaxes(1, 2).shape).astype(
                "u1" if unsigned else "i1"
            )
            last[f"{name}_scale"] = rng.uniform(0.002, 0.006, shape).astype("f4")
            last[f"{name}_zero"] = np.full(shape, 128 if unsigned else 0, "u1" if unsigned else "i1")
    names = ["x", "w", "r", "", "", ""]
    if draw(True, True, False):
        constants["b"], names[3] = normal(count, 2 * gates * hidden), "b"
    if draw(True, False):
        values["lens"], names[4] = rng.integers(1, time + 1, batch).astype("i4"), "lens"
    if draw(True, False):
        values["h"], names[5] = normal(count, batch, hidden), "h"
    if gates == 4:
        names.append("")
        if draw(True, False):
            values["c"], names[6] = normal(count, batch, hidden), "c"
    if quantised:
        names += ["", *last]
    attributes = {"hidden_size": hidden, "direction": direction}
    if op == "GRU":
        attributes["linear_before_reset"] = int(draw(0, 1))
    if op == "RNN":
        attributes["activations"] = [draw("Tanh", "Relu", "Sigmoid")] * count
    if op == "LSTM" and draw(True, False):
        attributes["activations"] = ["Sigmoid", "Tanh", "Tanh"] * count
    outputs = [draw(name, name, "") for name in ("y", "y_h", "y_c")[: 3 if gates == 4 else 2]]
    outputs = outputs if any(outputs) else ["y"]
    node = onnx.helper.make_node(op, names, outputs, "one", domain="com.microsoft" if quantised else "", **attributes)
    return node, values, {**constants, **last}


def batch_first(node, values):
    """The same node and values with layout 1."""
    other = onnx.NodeProto()
    other.CopyFrom(node)
    other.attribute.append(onnx.helper.make_attribute("layout", 1))
    return other, {name: a if name == "lens" else a.swapaxes(0, 1).copy() for name, a in values.items()}


def sweep(count, seed, folder):
    for trial in range(count):
        node, values, constants = drawn(np.random.default_rng((seed, trial)))
        model = model_of(node, values, constants)
        wanted = results(model, values)
        close(converted(model, values, folder), wanted, f"trial {trial}: {node}")
        if trial % 3 == 0:  # ONNX Runtime has no layout 1
            other, turned = batch_first(node, values)
            names = [name for name in node.output if name]
            wanted = [
                a.transpose(2, 0, 1, 3) if name == "y" else a.swapaxes(0, 1)
                for name, a in zip(names, wanted, strict=True)
            ]
            close(converted(model_of(other, turned, constants), turned, folder), wanted, f"trial {trial}, layout 1")


def test_random_operators_have_the_outputs_of_onnx_runtime(tmp_path):
    sweep(120, 0, tmp_path)


@pytest.mark.slow
def test_2000_random_operators_have_the_outputs_of_onnx_runtime(tmp_path):
    sweep(2000, 1, tmp_path)


def test_quantised_lstms_are_those_of_the_weights_that_they_stand_for(tmp_path):
    """Exactly those of an LSTM of these weights, and near ONNX Runtime's, which rounds inputs and states to 8 bits."""
    for trial in range(40):
        node, values, constants = drawn(np.random.default_rng((2, trial)), "DynamicQuantizeLSTM")
        model = model_of(node, values, constants)
        got = converted(model, values, tmp_path)
        plain = {"b": constants["b"]} if "b" in constants else {}
        for name in ("w", "r"):
            scale, zero = (constants[f"{name}_{end}"].astype("f4") for end in ("scale", "zero"))
            shape = (len(scale), 1, -1)
            wide = (constants[name].astype("f4") - zero.reshape(shape)) * scale.reshape(shape)
            plain[name] = np.ascontiguousarray(wide.swapaxes(1, 2))
        lstm = onnx.helper.make_node("LSTM", [*node.input][:7], [*node.output], "one")
        lstm.attribute.extend(node.attribute)
        close(got, results(model_of(lstm, values, plain), values), f"trial {trial}")
        close(got, results(model, values), f"trial {trial}", 0.05)


def official():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators that are none of these
        from onnx.backend.test.loader import load_model_tests

        cases = load_model_tests(kind="node")
    return {c.name: c for c in cases if c.name.startswith(("test_lstm_", "test_gru_", "test_rnn_", "test_simple_rnn_"))}


def test_the_18_cases_of_onnx(tmp_path):
    cases = official()
    assert len(cases) >= 18
    for name, case in cases.items():
        model, (inputs, wanted) = case.model, case.data_sets[0]
        node = model.graph.node[0]
        values = dict(zip([one.name for one in model.graph.input], inputs, strict=True))
        for one in ("W", "R", "B", "P"):
            if one in values:
                model.graph.initializer.append(onnx.numpy_helper.from_array(values[one], one))
        if "P" in node.input:
            with pytest.raises(ValueError, match=r"peepholes \(P\) are not supported"):
                converted(model, values, tmp_path)
            continue
        close(converted(model, values, tmp_path), wanted, name, 1e-5)


NODE = formats.Node("one", "LSTM", "", ("x", "w", "r", "b", "", "", "", ""), ("y", "", ""), {"hidden_size": 2})
CONSTANTS = {
    "w": np.ones((1, 8, 3), "f4"),
    "r": np.ones((1, 8, 2), "f4"),
    "b": np.ones((1, 16), "f4"),
    "p": np.ones((1, 6), "f4"),
}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"attributes": {"clip": 1.0}}, "clip is not supported"),
        ({"attributes": {"input_forget": 1}}, "input_forget is not supported"),
        ({"attributes": {"activations": ["Sigmoid", "Tanh", "Softsign"]}}, "activations sigmoid, tanh, softsign"),
        ({"attributes": {"activations": ["Tanh", "Tanh", "Tanh"]}}, "activations tanh, tanh, tanh are not"),
        ({"attributes": {"activation_alpha": [0.1]}}, "activation_alpha is not supported"),
        ({"attributes": {"direction": "sideways"}}, "direction should be"),
        ({"attributes": {"layout": 2}}, "layout should be 0 or 1"),
        ({"attributes": {"colour": 2}}, "the attribute colour is unknown"),
        ({"attributes": {"hidden_size": 3}}, "W should be of shape"),
        ({"attributes": {"hidden_size": -2}}, "W should be of shape"),
        ({"attributes": {"hidden_size": 1 << 62}}, "W should be of shape"),
        ({"attributes": {"direction": "bidirectional"}}, "W should be of shape"),
        ({"inputs": ("x", "w", "r", "b", "", "", "", "p")}, r"peepholes \(P\) are not supported"),
        ({"inputs": ("x", "w", "q")}, r"R \('q'\) should be a constant"),
        ({"inputs": ("x", "", "r")}, "W is missing"),
        ({"inputs": ("x", "w", "r", "r")}, "B should be of shape"),
        ({"inputs": ("x", "w", "r", *["b"] * 6)}, "9 inputs, of 8"),
        ({"op": "Loop"}, "it should be one of RNN, GRU, LSTM, DynamicQuantizeLSTM"),
        ({"domain": "own"}, "not of the domain 'own'"),
        (
            {
                "op": "RNN",
                "inputs": ("x", "w", "r"),
                "attributes": {"activations": ["Tanh", "Relu"], "direction": "bidirectional"},
            },
            "activations tanh, relu",
        ),
    ],
)
def test_what_is_not_supported_is_named(change, what):
    assert isinstance(layer_of(NODE, CONSTANTS)[0], fs.LSTM)
    with pytest.raises(ValueError, match=what) as error:
        layer_of(dataclasses.replace(NODE, **change), CONSTANTS)
    assert str(error.value).startswith(f"{change.get('op', 'LSTM')} 'one': ")


def test_all_faults_stand_in_one_message():
    attributes = {"clip": 1.0, "input_forget": 1, "layout": 3}
    with pytest.raises(ValueError, match=r"clip.*input_forget.*layout.*R \('q'\) should be a constant"):
        layer_of(dataclasses.replace(NODE, attributes=attributes, inputs=("x", "w", "q")), CONSTANTS)
