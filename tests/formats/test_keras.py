"""Files of Keras become models with its outputs; what is not supported is listed, and hostile files are refused."""

import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

import fastseq as fs
from fastseq.convert import keras as convert
from fastseq.formats import keras as formats

h5py = pytest.importorskip("h5py", reason="h5py is not installed: take the extra 'keras'")
PROGRAM = Path(__file__).with_name("keras_models.py")


def close(y, wanted, what=""):
    assert y.shape == wanted.shape, what
    error = np.abs(y - wanted).max(initial=0)
    assert error <= 1e-5 * max(np.abs(wanted).max(initial=0), 1e-2), f"{what}: {error}"


def check_folder(path):
    """Compare the models of a folder that `keras_models.py` wrote with what Keras computed."""
    about = f"{path}: {(path / 'repr.txt').read_text()}"
    with np.load(path / "arrays.npz") as arrays:
        x, y, padded = arrays["x"], arrays["y"], bool(arrays["padded"])
    outputs = []
    for name in ("m.keras", "m.h5"):
        made = convert.model(formats.read(path / name))
        outputs.append(made(x))
        if not padded:
            close(outputs[-1], y, about)
            continue
        assert isinstance(made, fs.ZeroPadded)
        for row, got, wanted in zip(x, outputs[-1], y, strict=True):  # in the padding Keras repeats the last output
            close(got[: np.count_nonzero(row)], wanted[: np.count_nonzero(row)], about)
            assert not got[np.count_nonzero(row) :].any()
    np.testing.assert_array_equal(*outputs)


def sweep(count, seed, folder):
    pytest.importorskip("keras", reason="Keras is not installed")
    pytest.importorskip("torch", reason="PyTorch is not installed: take the extra 'peers'")
    subprocess.run([sys.executable, PROGRAM, str(folder), str(count), str(seed)], check=True, timeout=3000)
    paths = sorted(folder.iterdir())
    assert len(paths) == count
    for path in paths:
        check_folder(path)


def test_random_models_have_the_outputs_of_keras(tmp_path):
    sweep(25, 0, tmp_path)


@pytest.mark.slow
def test_500_random_models_have_the_outputs_of_keras(tmp_path):
    sweep(500, 1, tmp_path)


# From here on files are written by hand, so that Keras need not be installed.


def entry(kind, name, **config):
    return {"class_name": kind, "config": {"name": name, **config}}


def config_of(*layers):
    return {"class_name": "Sequential", "config": {"name": "sequential", "layers": list(layers)}}


def write(path, groups, model=None):
    """Write the older layout: arrays by the name of the layer and their own."""
    with h5py.File(path, "w") as file:
        if model is not None:
            file.attrs["model_config"] = json.dumps(model)
        root = file.create_group("model_weights") if model is not None else file
        root.attrs["layer_names"] = np.array([name.encode() for name in groups])
        for name, arrays in groups.items():
            group = root.create_group(name)
            for inner, array in arrays.items():
                group[f"{name}/{inner}:0"] = array
    return path


def random(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype("f4") * 0.5 for shape in shapes]


def recurrent(gates, inputs, units, *bias, seed=0):
    return dict(
        zip(
            ("kernel", "recurrent_kernel", "bias"),
            random(seed, (inputs, gates * units), (units, gates * units), *([bias] if bias else [])),
            strict=False,
        )
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_by_hand(x, kernel, recurrent_kernel, bias):
    """Keras' LSTMCell over one sequence, gates i f c o."""
    units = len(recurrent_kernel)
    h = c = np.zeros(units)
    for x_t in x:
        i, f, g, o = np.split(x_t @ kernel + h @ recurrent_kernel + bias, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    return h


def gru_by_hand(x, kernel, recurrent_kernel, bias):
    """Keras' GRUCell over one sequence with reset_after, gates z r h."""
    h = np.zeros(len(recurrent_kernel))
    for x_t in x:
        xz, xr, xh = np.split(x_t @ kernel + bias[0], 3)
        hz, hr, hh = np.split(h @ recurrent_kernel + bias[1], 3)
        z, r = sigmoid(xz + hz), sigmoid(xr + hr)
        h = z * h + (1 - z) * np.tanh(xh + r * hh)
    return h


def as_cudnn(arrays, gates):
    """Arrays of Keras' LSTM or GRU (with two sets of biases) in the layout of the CuDNN classes.

    It is ``transform_kernels`` of Keras 2.2 in its other direction, ``kernel.T.reshape(kernel.shape)`` of each gate.
    """
    hidden = arrays["recurrent_kernel"].shape[0]
    flat = np.concatenate([part.T.ravel() for part in np.hsplit(arrays["kernel"], gates)])
    first = np.hstack([part.reshape(arrays["kernel"].shape[0], hidden) for part in np.split(flat, gates)])
    second = np.hstack([part.T for part in np.hsplit(arrays["recurrent_kernel"], gates)])
    return {"kernel": first, "recurrent_kernel": second, "bias": arrays["bias"].reshape(-1)}


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_the_cudnn_layout_is_told_by_class_and_by_the_size_of_the_bias(kind, tmp_path):
    gates = {"LSTM": 4, "GRU": 3}[kind]
    plain = recurrent(gates, 5, 4, 2, gates * 4)
    x = random(9, (6, 5))[0]
    by_hand = (
        lstm_by_hand(x, plain["kernel"], plain["recurrent_kernel"], plain["bias"].sum(axis=0))
        if kind == "LSTM"
        else gru_by_hand(x, **plain)
    )
    fast = as_cudnn(plain, gates)
    bare = formats.read(write(tmp_path / "bare.hdf5", {"rnn_1": fast}))
    assert bare.description["layout"] == "legacy"
    close(convert.layer(bare, "rnn_1")(x[None])[0][:, -1], by_hand[None])
    settings = {"units": 4, "return_sequences": False, "go_backwards": False}
    model = config_of(entry(f"CuDNN{kind}", "rnn_1", **settings))
    whole = formats.read(write(tmp_path / "whole.h5", {"rnn_1": fast}, model))
    close(convert.model(whole)(x[None]), by_hand[None])
    noise = config_of(
        entry(kind, "rnn_1", activation="tanh", recurrent_activation="sigmoid", reset_after=True, **settings)
    )
    with pytest.raises(ValueError, match="bias should be of shape"):  # the class says what the layout is
        convert.model(formats.read(write(tmp_path / "noise.h5", {"rnn_1": fast}, noise)))


def test_bare_weights_are_asked_for_what_they_do_not_say(tmp_path):
    groups = {
        "lstm": recurrent(4, 3, 2, 8),
        "gru": recurrent(3, 3, 2, 2, 6),
        "gru_before": recurrent(3, 3, 2, 6),
        "gru_bare": recurrent(3, 3, 2),
        "rnn": recurrent(1, 3, 2, 2),
        "words": {"embeddings": random(0, (7, 3))[0]},
        "dense": dict(zip(("kernel", "bias"), random(0, (3, 2), (2,)), strict=True)),
        "norm": {"gamma": np.ones(3, "f4"), "beta": np.zeros(3, "f4")},
        "both": {
            f"{part}_lstm/{role}": array
            for part, seed in (("forward", 1), ("backward", 2))
            for role, array in recurrent(4, 3, 2, 8, seed=seed).items()
        },
    }
    contents = formats.read(write(tmp_path / "w.hdf5", groups))
    told = {"activation": "tanh", "recurrent_activation": "sigmoid"}
    x = random(5, (1, 4, 3))[0]
    close(convert.layer(contents, "lstm", **told)(x)[0][0, -1], lstm_by_hand(x[0], **groups["lstm"]))
    assert (
        convert.layer(contents, "gru", **told).reset_after
        and not convert.layer(contents, "gru_before", **told).reset_after
    )
    assert convert.layer(contents, "rnn", activation="relu").nonlinearity == "relu"
    assert convert.layer(contents, "words").num_embeddings == 7
    close(convert.layer(contents, "dense")(x), x @ groups["dense"]["kernel"] + groups["dense"]["bias"])
    assert convert.layer(contents, "norm", eps=1e-3).eps == 1e-3
    both = convert.layer(contents, "both", **told)
    y = both(x)[1].h[0]
    forward, backward = (
        {role: groups["both"][f"{part}_lstm/{role}"] for role in groups["lstm"]} for part in ("forward", "backward")
    )
    close(y[0], lstm_by_hand(x[0], **forward))
    close(y[1], lstm_by_hand(x[0, ::-1], **backward))
    for name, settings, what in [
        ("lstm", {}, "activation should be 'tanh', not None"),
        ("lstm", {**told, "recurrent_activation": "hard_sigmoid"}, "recurrent_activation should be 'sigmoid'"),
        ("gru_bare", told, "whether it has reset_after"),
        ("norm", {}, "eps should be given"),
        ("nothing", {}, "name should be that of a layer.*lstm"),
        ("words", {"kind": "Dense"}, "of no Dense"),
    ]:
        with pytest.raises(ValueError, match=what):
            convert.layer(contents, name, **settings)
    with pytest.raises(ValueError, match="weights alone"):
        convert.model(contents)


def test_new_weights_files_have_numbers_and_names(tmp_path):
    with h5py.File(tmp_path / "n.weights.h5", "w") as file:
        for place, array in enumerate(recurrent(4, 3, 2, 8).values()):
            file[f"layers/lstm/cell/vars/{place}"] = array
        file.create_group("layers/lstm/vars").attrs["name"] = "reader"
        file["layers/embedding/vars/0"] = random(0, (7, 3))[0]
        file["optimizer/vars/0"] = np.zeros(3)
    contents = formats.read(tmp_path / "n.weights.h5")
    assert contents.description["layout"] == "weights" and len(contents.arrays) == 4
    told = {"activation": "tanh", "recurrent_activation": "sigmoid"}
    for name in ("reader", "lstm", "layers/lstm"):
        assert convert.layer(contents, name, **told).hidden_size == 2
    with pytest.raises(ValueError, match="kind should be 'Dense' or 'Embedding'"):
        convert.layer(contents, "embedding")
    assert convert.layer(contents, "embedding", "Embedding").embedding_dim == 3


def test_what_is_not_supported_is_listed_all_at_once(tmp_path):
    model = config_of(
        entry("Embedding", "e", input_dim=7, output_dim=3, mask_zero=True),
        entry("LSTM", "l", units=2, activation="tanh", recurrent_activation="hard_sigmoid", return_sequences=True),
        entry("Conv1D", "c1"),
        entry("Conv1D", "c2"),
        entry("GlobalMaxPooling1D", "p"),
        entry("Dense", "d", units=4, activation="elu"),
        {"class_name": "Attention", "module": "own", "registered_name": "own>Attention", "config": {"name": "a"}},
        entry("Bidirectional", "b", layer=entry("LSTM", "x", units=2), merge_mode=None),
    )
    groups = {
        "e": {"embeddings": random(0, (7, 3))[0]},
        "d": dict(zip(("kernel", "bias"), random(0, (3, 4), (4,)), strict=True)),
    }
    with pytest.raises(ValueError) as error:
        convert.model(formats.read(write(tmp_path / "m.h5", groups, model)))
    message = str(error.value)
    for what in (
        "LSTM with recurrent_activation='hard_sigmoid'",
        "Conv1D (2 times)",
        "GlobalMaxPooling1D behind mask_zero=True",
        "Dense with activation='elu'",
        "own>Attention of somebody's own",
        "Bidirectional with merge_mode=None",
    ):
        assert what in message


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"units": 3}, "units=3, whose arrays are of 2"),
        ({"return_state": True}, "return_state=True"),
        ({"use_bias": False}, "the array l/l/bias:0 is unknown"),
        ({"activation": "softsign"}, "activation='softsign'"),
        ({"go_backwards": 1}, "go_backwards=1"),
    ],
)
def test_settings_that_lie_or_are_not_supported(change, what, tmp_path):
    settings = {"units": 2, "activation": "tanh", "recurrent_activation": "sigmoid", **change}
    model = config_of(entry("LSTM", "l", **settings))
    with pytest.raises(ValueError, match=what):
        convert.model(formats.read(write(tmp_path / "m.h5", {"l": recurrent(4, 3, 2, 8)}, model)))


def test_no_array_is_left_out(tmp_path):
    model = config_of(entry("LSTM", "l", units=2, activation="tanh", recurrent_activation="sigmoid"))
    groups = {"l": recurrent(4, 3, 2, 8), "lost": {"kernel": np.ones((2, 2), "f4")}}
    with pytest.raises(ValueError, match="the array lost/lost/kernel:0 is of no layer"):
        convert.model(formats.read(write(tmp_path / "m.h5", groups, model)))


def node(*names):
    return [[[name, 0, 0, {}] for name in names]]


def test_functional_models_are_chains(tmp_path):
    dense = dict(zip(("kernel", "bias"), random(0, (3, 3), (3,)), strict=True))
    layers = [
        {**entry("Dense", "b", units=3, activation="relu"), "name": "b", "inbound_nodes": node("a")},
        {**entry("InputLayer", "i"), "name": "i", "inbound_nodes": []},
        {**entry("Dense", "a", units=3), "name": "a", "inbound_nodes": node("i")},
    ]
    config = {
        "class_name": "Model",
        "config": {"layers": layers, "input_layers": [["i", 0, 0]], "output_layers": [["b", 0, 0]]},
    }
    contents = formats.read(write(tmp_path / "m.h5", {"a": dense, "b": dense}, config))
    x = random(1, (2, 3))[0]
    first = x @ dense["kernel"] + dense["bias"]
    close(convert.model(contents)(x), np.maximum(first @ dense["kernel"] + dense["bias"], 0))
    for nodes, what in [
        (node("i"), "branches behind i"),
        (node("a", "i"), "more than one input"),
        ([*node("a"), *node("i")], "more than one input, or is used more than once"),
        (node("b"), "in no chain"),
    ]:
        layers[0]["inbound_nodes"] = nodes
        with pytest.raises(ValueError, match=what):
            convert.model(formats.read(write(tmp_path / "m.h5", {"a": dense, "b": dense}, config)))


# Hostile files.


def small(path):
    return write(path, {"l": recurrent(4, 3, 2, 8)}, config_of(entry("LSTM", "l", units=2)))


def archive(path, **members):
    """Write a .keras archive; a member of None is left out."""
    with h5py.File(io.BytesIO(), "w") as file:
        for place, array in enumerate(recurrent(4, 3, 2, 8).values()):
            file[f"layers/lstm/cell/vars/{place}"] = array
        file.flush()
        data = file.id.get_file_image()
    config = config_of(entry("LSTM", "lstm", units=2, activation="tanh", recurrent_activation="sigmoid"))
    whole = {"config.json": json.dumps(config), "metadata.json": "{}", "model.weights.h5": data, **members}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in whole.items():
            if content is not None:
                file.writestr(name, content)
    return path


def refuse(path, what, place=None):
    with pytest.raises(ValueError, match=what) as error:
        formats.read(path)
    assert str(error.value).startswith(f"{path}: {place or ''}")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (
            lambda f, d: f.__setitem__("a", h5py.ExternalLink(str(d / "secret.h5"), "/x")),
            "a: it is a link of the kind ExternalLink",
        ),
        (lambda f, d: f.__setitem__("a", h5py.SoftLink("/x")), "a: it is a link of the kind SoftLink"),
        (lambda f, d: f.create_group("a/b").__setitem__("up", f["a"]), "a/b/up: it is linked from a second place"),
        (lambda f, d: f.__setitem__("twice", f.create_dataset("a", data=np.ones(3))), "linked from a second place"),
        (
            lambda f, d: f.create_dataset("a", (1000,), "f4", external=[(str(d / "secret.h5"), 0, 4000)]),
            "a: its data lie in another file",
        ),
        (lambda f, d: f.create_virtual_dataset("a", virtual(d)), "a: its data lie in another file"),
        (
            lambda f, d: f.create_dataset("a", data=np.zeros((100, 100)), compression="gzip"),
            "a: it is compressed or filtered",
        ),
        (lambda f, d: f.create_dataset("a", data=np.zeros((9, 9)), fletcher32=True), "a: it is compressed or filtered"),
        (
            lambda f, d: f.create_dataset("a", (1 << 40,), "f4"),
            "a: .* are 4398046511104 bytes, of which the file holds 0",
        ),
        (lambda f, d: f.create_dataset("a", (1 << 40,), "f4", chunks=(1 << 20,)), "a: .* of which the file holds 0"),
        (lambda f, d: f.create_dataset("a", (1 << 31, 1 << 31), "f8", chunks=(64, 64)), "of which the file holds 0"),
        (lambda f, d: f.create_dataset("a", data=["text"]), "a: it is no array of numbers"),
        (lambda f, d: f.create_dataset("a", data=np.zeros(2, "f4,i4")), "a: it is no array of numbers"),
        (lambda f, d: f.create_dataset("a", data=np.zeros(2, "V2")), "a: it is no array of numbers"),
        (lambda f, d: f.create_dataset("a", data=h5py.Empty("f4")), "a: it is no array of numbers"),
        (lambda f, d: f.__setitem__("a", np.dtype("f4")), "a: it is neither a group nor an array"),
        (lambda f, d: f.attrs.__setitem__("model_config", '{"a": 1, "a": 2}'), "a name stands twice"),
        (lambda f, d: f.attrs.__setitem__("model_config", "[" * 10_000), "it is no JSON that can be read"),
        (lambda f, d: f.attrs.__setitem__("model_config", ["{}"] * 3), "it should be one string"),
        (lambda f, d: f.attrs.__setitem__("model_config", 7), "it should be a string"),
    ],
)
def test_hdf5_that_keras_does_not_write_is_refused(make, what, tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = np.arange(1000.0)
    path = tmp_path / "hostile.h5"
    with h5py.File(path, "w") as file:
        make(file, tmp_path)
    refuse(path, what)


def virtual(folder):
    layout = h5py.VirtualLayout((1000,), "f8")
    layout[:] = h5py.VirtualSource(str(folder / "secret.h5"), "x", (1000,))
    return layout


@pytest.mark.parametrize(
    ("members", "what", "place"),
    [
        ({"config.json": None}, "the archive has none", "config.json"),
        ({"model.weights.h5": None}, "the archive has none", "model.weights.h5"),
        ({"model.weights.h5": b"no HDF5"}, "signature", "model.weights.h5"),
        ({"config.json": "{"}, "it is no JSON", "config.json"),
        ({"config.json": '{"x":' * 50_000}, "it is no JSON", "config.json"),
        ({"config.json": '{"x": 1, "x": 2}'}, "a name stands twice", "config.json"),
        ({"config.json": " " * ((1 << 24) + 1)}, "at most", "config.json"),
    ],
)
def test_archives_that_are_not_whole_are_refused(members, what, place, tmp_path):
    refuse(archive(tmp_path / "m.keras", **members), what, place)


def test_zip_bombs_and_members_that_are_there_twice(tmp_path):
    path = tmp_path / "bomb.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("config.json", " " * 50_000_000)
    refuse(path, "it is compressed", "config.json")
    archive(path)
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("config.json", "{}")
    refuse(path, "the archive has it twice", "'config.json'")


def test_members_that_lead_out_of_the_archive_are_never_opened(tmp_path):
    path = archive(tmp_path / "m.keras", **{"../outside": "x", "/etc/passwd": "x"})
    assert convert.model(formats.read(path)) is not None
    assert sorted(os.listdir(tmp_path)) == ["m.keras"]


def test_other_files_are_refused(tmp_path):
    for data in (b"", b"x", b"\x89HDF\r\n\x1a", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n" + b"\xff" * 200):
        (tmp_path / "f.h5").write_bytes(data)
        refuse(tmp_path / "f.h5", "neither an HDF5 file|archive|signature|version")
    os.mkfifo(tmp_path / "pipe")
    held = os.open(tmp_path / "pipe", os.O_RDWR)  # otherwise to open it waits for a writer
    try:
        with pytest.raises(ValueError, match="it is no regular file"):
            formats.read(tmp_path / "pipe")
    finally:
        os.close(held)
    with pytest.raises(FileNotFoundError):
        formats.read(tmp_path / "nowhere.h5")


def damaged(data, rng, step, count):
    """Yield a file cut at every `step` bytes, and with changed bytes."""
    for end in range(0, len(data), step):
        yield data[:end]
    for _ in range(count):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            changed[place] = rng.integers(256)
        yield bytes(changed)


CHILD = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from fastseq.convert import keras as convert
from fastseq.formats import keras as formats
formats.read(sys.argv[3])  # what h5py takes to be imported
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        convert.model(formats.read(path))
    except ValueError as error:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""


@pytest.mark.parametrize("make", [small, archive])
@pytest.mark.parametrize(("step", "changes"), [(9, 300), pytest.param(1, 5000, marks=pytest.mark.slow)])
def test_damaged_files_end_in_errors_and_take_no_memory(make, step, changes, tmp_path):
    """In a process of its own, since HDF5 is written in C; every error but a ValueError ends it."""
    path = make(tmp_path / "whole")
    data, folder = path.read_bytes(), tmp_path / "damaged"
    folder.mkdir()
    for number, changed in enumerate(damaged(data, np.random.default_rng(0), step, changes)):
        (folder / str(number)).write_bytes(changed)
    root = str(Path(fs.__file__).parent.parent)
    command = [sys.executable, "-W", "error", "-c", CHILD, str(folder), root, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) < 64 * 1024  # kB


def test_without_h5py_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with tempfile.NamedTemporaryFile() as file, pytest.raises(ImportError, match=r"pip install 'fastseq\[keras\]'"):
        formats.read(file.name)
