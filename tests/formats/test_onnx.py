"""ONNX files become plain graphs; hostile ones are refused, with the file and the place."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastseq as fs
from fastseq.formats import onnx as formats

onnx = pytest.importorskip("onnx", reason="onnx is not installed: take the extra 'test'")
helper = onnx.helper
TYPES = ["FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "BOOL", "INT8", "INT16", "INT32", "INT64"]
TYPES += ["UINT8", "UINT16", "UINT32", "UINT64"]


def model_of(*tensors, nodes=None, inputs=("x",), outputs=("y",)):
    """A model with some initialisers, by default of one node."""
    nodes = [helper.make_node("Identity", ["x"], ["y"])] if nodes is None else nodes
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, 1, ["batch", None, 3]) for n in inputs],
        [helper.make_tensor_value_info(n, 1, None) for n in outputs],
        list(tensors),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def write(folder, model):
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refuse(path, what):
    with pytest.raises(ValueError, match=what) as error:
        formats.read(path)
    assert str(error.value).startswith(f"{path}: ")


def numbers(kind):
    """Values that the type has exactly."""
    if kind == "BOOL":
        return np.array([[True, False, True]])
    signed = not kind.startswith("U")
    return np.array([[0, 1, 100], [-1 if signed else 2, -100 if signed else 200, 3]], "f8" if signed else "i8")


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_tensors_of_all_types_of_numbers(kind, raw, tmp_path):
    values, number = numbers(kind), getattr(onnx.TensorProto, kind)
    if raw:
        bits = values.astype("<f4").view("<u4") >> 16
        data = bits.astype("<u2") if kind == "BFLOAT16" else values.astype(helper.tensor_dtype_to_np_dtype(number))
        tensor = helper.make_tensor("t", number, values.shape, data.tobytes(), raw=True)
    else:
        tensor = helper.make_tensor("t", number, values.shape, values.ravel().tolist())
    contents = formats.read(write(tmp_path, model_of(tensor)))
    array = contents.arrays["t"]
    half = kind in ("FLOAT16", "BFLOAT16")
    assert array.dtype == (np.float32 if half else helper.tensor_dtype_to_np_dtype(number))
    np.testing.assert_array_equal(array, values)
    assert contents.description["stored"] == {"t": kind}


def test_a_graph_is_plain_values(tmp_path):
    branch = helper.make_graph(
        [helper.make_node("Add", ["x", "inner"], ["z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("z", 1, [1])],
        [helper.make_tensor("inner", 1, [1], [2.0])],
    )
    nodes = [
        helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", 9, [], [True])),
        helper.make_node("If", ["c"], ["y"], "choice", then_branch=branch, else_branch=branch),
        helper.make_node(
            "Own", ["x", "", "y"], ["", "w"], domain="com.own", a=1, b=1.5, c="text", d=[1, 2], e=["s", "t"]
        ),
    ]
    model = model_of(nodes=nodes, outputs=("w",))
    model.metadata_props.add(key="author", value="somebody")
    model.opset_import.append(helper.make_opsetid("com.own", 3))
    contents = formats.read(write(tmp_path, model))
    graph = contents.description["graph"]
    assert contents.description["opsets"] == {"": 18, "com.own": 3}
    assert contents.description["metadata"] == {"author": "somebody"}
    assert graph.inputs == (formats.Value("x", "FLOAT", ("batch", None, 3)),)
    assert graph.outputs == (formats.Value("w", "FLOAT", None),)
    constant, choice, own = graph.nodes
    assert constant.attributes["value"].dtype == bool and constant.attributes["value"].shape == ()
    assert choice.attributes["then_branch"].initialisers["inner"] == [2]
    assert choice.attributes["then_branch"].nodes[0].inputs == ("x", "inner")
    assert (own.op, own.domain, own.inputs, own.outputs) == ("Own", "com.own", ("x", "", "y"), ("", "w"))
    assert own.attributes == {"a": 1, "b": 1.5, "c": "text", "d": [1, 2], "e": ["s", "t"]}


def test_what_no_layer_takes_is_there_and_not_read(tmp_path):
    text = helper.make_tensor("labels", onnx.TensorProto.STRING, [2], [b"a", b"b"])
    four = helper.make_tensor("four", onnx.TensorProto.INT4, [2], [1, 2])
    contents = formats.read(write(tmp_path, model_of(text, four)))
    assert contents.description["graph"].unread == {
        "labels": formats.Unread("a tensor of STRING"),
        "four": formats.Unread("a tensor of INT4"),
    }
    assert not contents.arrays


def outside(location="data.bin", dims=(2, 3), **numbers):
    """A tensor whose data are in another file."""
    tensor = onnx.TensorProto(name="t", data_type=1, dims=dims, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": location, **numbers}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def test_data_beside_the_model(tmp_path, monkeypatch):
    values = np.arange(12, dtype="<f4")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "data.bin").write_bytes(values.tobytes())
    os.symlink("sub/data.bin", tmp_path / "link.bin")  # it stays in the folder
    second = outside("sub/data.bin", offset=24, length=24)
    second.name = "u"
    path = write(tmp_path, model_of(outside("sub/data.bin", length=24), second))
    arrays = formats.read(path).arrays
    np.testing.assert_array_equal(arrays["t"], values[:6].reshape(2, 3))
    np.testing.assert_array_equal(arrays["u"], values[6:].reshape(2, 3))
    np.testing.assert_array_equal(
        formats.read(write(tmp_path, model_of(outside("link.bin")))).arrays["t"].ravel(), values[:6]
    )
    monkeypatch.chdir(tmp_path)
    assert formats.read("m.onnx").arrays["t"].shape == (2, 3)


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (outside("../secret"), "outside the folder of the model"),
        (outside("sub/../../secret"), "outside the folder of the model"),
        (outside("..\\secret"), "outside the folder of the model"),
        (outside("C:\\secret"), "outside the folder of the model"),
        (outside("/etc/passwd"), "outside the folder of the model"),
        (outside("leaves"), "outside the folder of the model"),
        (outside("folder_leaves/secret"), "outside the folder of the model"),
        (outside("a\0b"), "outside the folder of the model"),
        (outside(""), "should have one location"),
        (outside("nowhere"), "cannot be opened"),
        (outside("."), "is no regular file|cannot be opened"),
        (outside("pipe"), "is no regular file"),
        (outside("loop"), "cannot be opened|Too many"),
        (outside(length=25), "is of 24 bytes, and the length of its external data is 25"),
        (outside(length=-24), "the length of external data should be a number"),
        (outside(offset="0x0"), "the offset of external data should be a number"),
        (outside(offset="9" * 400), "the offset of external data should be a number"),
        (outside(offset=1), "more than 'data.bin' has, 24"),
        (outside(offset=(1 << 63) - 1), "more than 'data.bin' has, 24"),
        (outside(dims=(1 << 40,)), "more than 'data.bin' has, 24"),
        (outside(dims=(1 << 62, 1 << 62)), "more than 'data.bin' has, 24"),
        (outside(dims=(-1, 6)), "has a size below 0"),
    ],
)
def test_external_data_that_lead_elsewhere_or_are_not_there(tensor, what, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(24))
    (folder / "data.bin").write_bytes(bytes(24))
    os.symlink("../secret", folder / "leaves")
    os.symlink("..", folder / "folder_leaves")
    os.symlink("loop", folder / "loop")
    os.mkfifo(folder / "pipe")
    refuse(write(folder, model_of(tensor)), what)


def test_tensors_that_overlap_in_another_file(tmp_path):
    (tmp_path / "data.bin").write_bytes(bytes(24))
    second = outside()
    second.name = "u"
    refuse(write(tmp_path, model_of(outside(), second)), "tensors overlap in 'data.bin'")
    twice = outside()
    twice.external_data.add(key="location", value="data.bin")
    refuse(write(tmp_path, model_of(twice)), "nothing twice")


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "data.bin").write_bytes(bytes(20))
    path = write(tmp_path, model_of(outside()))
    whole = os.fstat

    def before(descriptor):  # what it was when it was looked at
        about = whole(descriptor)
        return os.stat_result([*about[:6], 24 if about.st_size == 20 else about.st_size, *about[7:10]])

    monkeypatch.setattr(os, "fstat", before)
    refuse(path, "'data.bin' ended while it was read")


def proto(kind=1, dims=(2, 3), **fields):
    tensor = onnx.TensorProto(name="t", data_type=kind, dims=dims)
    for name, value in fields.items():
        if name == "raw_data":
            tensor.raw_data = value
        else:
            getattr(tensor, name).extend(value)
    return tensor


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (proto(raw_data=bytes(23)), "are 24 bytes, and it has 23"),
        (proto(dims=(1 << 31, 1 << 31), raw_data=bytes(24)), "and it has 24"),
        (proto(dims=(1 << 62, 4), raw_data=bytes(24)), "and it has 24"),
        (proto(dims=(0, 1 << 62, 1 << 62), raw_data=b""), "t"),
        (proto(dims=(-2, -3), raw_data=bytes(24)), "has a size below 0"),
        (proto(dims=(1,) * 70, raw_data=bytes(4)), "too many axes"),
        (proto(float_data=[1.0] * 5), "are 6 values, and it has 5"),
        (proto(int32_data=[1] * 6), "are 6 values, and it has 0"),
        (proto(3, int32_data=[300] * 6), "a value that is none of INT8"),
        (proto(9, int32_data=[2] * 6), "a value that is none of BOOL"),
        (proto(10, int32_data=[1 << 16] * 6), "a value that is none of FLOAT16"),
    ],
)
def test_tensors_that_lie(tensor, what, tmp_path):
    refuse(write(tmp_path, model_of(tensor)), what)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (lambda: model_of(nodes=[node("a", "b"), node("b", "a")], outputs=("b",)), "no node before it gives a"),
        (lambda: model_of(nodes=[node("x", "x")], outputs=("x",)), "it gives a name that is there already"),
        (lambda: model_of(nodes=[node("x", "y"), node("x", "y")]), "it gives a name that is there already"),
        (lambda: model_of(nodes=[node("nothing", "y")]), "no node before it gives nothing"),
        (lambda: model_of(nodes=[]), "graph.output: no node gives y"),
        (lambda: model_of(proto(raw_data=bytes(24)), proto(raw_data=bytes(24))), "two of this name"),
        (lambda: model_of(inputs=("x", "x")), "two of the name 'x'"),
        (lambda: model_of(nodes=[with_attributes(a=1, b=2)]), "two attributes 'a'"),
        (lambda: model_of(nodes=[with_attributes(a=b"\xff")]), "it is no text"),
        (lambda: onnx.ModelProto(), "it has no graph"),
    ],
)
def test_graphs_that_are_none(model, what, tmp_path):
    refuse(write(tmp_path, model()), what)


def node(source, target):
    return helper.make_node("Identity", [source], [target])


def with_attributes(**given):
    made = helper.make_node("Own", ["x"], ["y"], **given)
    for attribute in made.attribute:
        attribute.name = "a"
    return made


@pytest.mark.parametrize("depth", [20, 300, 5000])
def test_graphs_in_graphs(depth, tmp_path):
    """Those of people are few deep; protobuf refuses what is deeper than a hundred messages."""
    body = helper.make_graph(
        [node("x", "y")], "g", [], [helper.make_tensor_value_info("y", 1, None)]
    ).SerializeToString()
    output = body[body.index(b"\x62") :]  # field 12 of a graph
    for _ in range(depth):
        attribute = b"\x0a\x01b\x32" + varint(len(body)) + body + b"\xa0\x01\x05"
        branch = b"\x0a\x01x\x12\x01y\x22\x02If\x2a" + varint(len(attribute)) + attribute
        body = b"\x0a" + varint(len(branch)) + branch + output
    model = model_of()
    model.ClearField("graph")
    whole = model.SerializeToString() + b"\x3a" + varint(len(body)) + body
    whole += b"\x3a" + varint(9) + b"\x5a\x07\x0a\x01x\x12\x02\x0a\x00"  # merged into the graph: its input x
    (tmp_path / "deep.onnx").write_bytes(whole)
    if depth > 20:
        refuse(tmp_path / "deep.onnx", "it is no ONNX model")
        return
    graph = formats.read(tmp_path / "deep.onnx").description["graph"]
    for _ in range(depth):
        graph = graph.nodes[0].attributes["b"]
    assert graph.nodes[0].op == "Identity"


def varint(number):
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def test_other_files_are_refused(tmp_path):
    for data in (b"", b"x", b"\xff" * 99, b"PK\x03\x04"):
        (tmp_path / "f.onnx").write_bytes(data)
        refuse(tmp_path / "f.onnx", "it is no ONNX model")
    with pytest.raises(FileNotFoundError):
        formats.read(tmp_path / "nowhere.onnx")


CHILD = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from fastseq.convert.onnx_recurrent import layer_of
from fastseq.formats import onnx as formats
formats.read(sys.argv[3])  # what onnx takes to be imported
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        contents = formats.read(path)
        for node in contents.description["graph"].nodes:
            layer_of(node, contents.arrays)
    except ValueError as error:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""


def test_damaged_files_end_in_errors_and_take_no_memory(tmp_path):
    """A file cut at every byte, and 2,000 with changed bytes; every error but a ValueError ends the process."""
    constants = {"w": (1, 8, 2), "r": (1, 8, 2), "b": (1, 16)}
    tensors = [onnx.numpy_helper.from_array(np.ones(shape, "f4"), name) for name, shape in constants.items()]
    lstm = helper.make_node("LSTM", ["x", *constants], ["y"], "lstm", hidden_size=2, direction="forward")
    path = write(tmp_path, model_of(*tensors, nodes=[lstm]))
    data, folder = path.read_bytes(), tmp_path / "damaged"
    folder.mkdir()
    rng = np.random.default_rng(0)
    cut = [data[:end] for end in range(len(data))]
    changed = []
    for _ in range(2000):
        one = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            one[place] = rng.integers(256)
        changed.append(bytes(one))
    for number, one in enumerate(cut + changed):
        (folder / str(number)).write_bytes(one)
    root = str(Path(fs.__file__).parent.parent)
    command = [sys.executable, "-W", "error", "-c", CHILD, str(folder), root, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) < 64 * 1024  # kB


def test_without_onnx_the_error_says_what_to_install(monkeypatch, tmp_path):
    path = write(tmp_path, model_of())
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'fastseq\[onnx\]'"):
        formats.read(path)
