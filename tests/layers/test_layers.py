"""Layers: parameters, state dicts, copies, seeds, repr; and files."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import pickle
import stat
import struct
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import KINDS, Array, assert_same_bits, inputs, make, random_state, run_python

import fastseq as fs

BOTH = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
X = inputs((3, 4, 3))


def every(kind: str, module: Any = fs, dtype: str = "float32", seed: int = 0) -> Any:
    return make(kind, 3, 6, num_layers=2, bidirectional=True, dtype=dtype, seed=seed, module=module)


def same(layer: Any, other: Any) -> None:
    assert type(layer) is type(other) and layer._config == other._config
    assert list(layer.parameters) == list(other.parameters)
    for name, array in layer.parameters.items():
        assert_same_bits(other.parameters[name], array, name)
    x = X.astype(layer.dtype)
    assert_same_bits(layer(x), other(x))


# Parameters


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes(kind: str, module: Any) -> None:
    layer = every(kind, module)
    gates = {"r": 1, "l": 4, "g": 3}[kind[0]]
    outputs = layer.proj_size or 6
    expected: dict[str, tuple[int, ...]] = {}
    for suffix, inputs_ in (("l0", 3), ("l0_reverse", 3), ("l1", 2 * outputs), ("l1_reverse", 2 * outputs)):
        expected[f"weight_ih_{suffix}"] = (gates * 6, inputs_)
        expected[f"weight_hh_{suffix}"] = (gates * 6, outputs)
        expected[f"bias_ih_{suffix}"] = expected[f"bias_hh_{suffix}"] = (gates * 6,)
        if layer.proj_size:
            expected[f"weight_hr_{suffix}"] = (outputs, 6)
        if kind == "lstm_ln":
            expected[f"ln_ih_weight_{suffix}"] = expected[f"ln_hh_weight_{suffix}"] = (24,)
            expected[f"ln_c_weight_{suffix}"] = expected[f"ln_c_bias_{suffix}"] = (6,)
    assert {name: array.shape for name, array in layer.parameters.items()} == expected
    assert {name: array.shape for name, array in layer.state_dict().items()} == expected
    assert len(layer.parameters) == len(expected)
    without = make(kind, 3, 6, bias=False, module=module)
    assert not any("bias" in name for name in without.parameters)


@BOTH
@pytest.mark.parametrize("scheme", ["default", "orthogonal"])
def test_norms_of_an_lstm_start_as_those_of_a_layer(scheme: str, module: Any) -> None:
    layer = module.LSTM(4, 5, 2, layer_norm=True, bidirectional=True, seed=0)
    for name, array in layer.parameters.items():
        layer.parameters[name] = np.full_like(array, 7)
    fs.init.initialise(layer, scheme, forget_bias=1.5, seed=0)
    norms = [name for name in layer.parameters if name.startswith("ln_")]
    assert len(norms) == 16
    for name in norms:
        assert (layer.parameters[name] == float("weight" in name)).all(), name
    assert not any((array == 7).any() for array in layer.parameters.values())


@BOTH
def test_norms_and_a_projection_exclude_each_other(module: Any) -> None:
    with pytest.raises(ValueError, match="proj_size should be 0 with layer_norm=True, not 2"):
        module.LSTM(4, 5, proj_size=2, layer_norm=True)


@BOTH
def test_parameters_are_read_only(module: Any) -> None:
    layer = make("lstm", 3, 6, module=module)
    for source in (layer, fs.reference.LSTM(3, 6), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        for array in source.parameters.values():
            assert not array.flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
    with pytest.raises(TypeError):
        del layer.parameters["weight_ih_l0"]
    with pytest.raises(AttributeError):
        layer.parameters = {}
    for change in (layer.parameters.clear, lambda: layer.parameters.pop("weight_ih_l0"), layer.parameters.popitem):
        with pytest.raises(TypeError):
            change()
    assert "weight_ih_l0" in layer.parameters and "weight_ih_l9" not in layer.parameters
    assert layer.parameters.get("weight_ih_l9") is None


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_copy_is_stale_after_every_change(kind: str, module: Any) -> None:
    """Each parameter, changed after a call, changes the result as it does in a new layer."""
    first = every(kind, module)
    other = every(kind, module, seed=1)
    for layer in (first, copy.copy(first), copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        layer(X)
        for name, array in other.parameters.items():
            before = layer(X)
            layer.parameters[name] = array
            assert (layer(X)[0] != before[0]).any(), name
            fresh = every(kind, module, seed=2)
            fresh.load_state_dict(layer.state_dict())
            assert_same_bits(layer(X), fresh(X), name)
        assert_same_bits(layer(X), other(X))


def test_a_copy_is_not_changed_with_its_original() -> None:
    for copied in (copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))):
        layer = every("lstm")
        other = copied(layer)
        expected = other(X)
        layer.load_state_dict(every("lstm", seed=1).state_dict())
        assert_same_bits(other(X), expected)
        assert (layer(X)[0] != expected[0]).any()


def test_what_is_assigned_is_copied() -> None:
    layer = make("gru_after", 3, 6)
    array = layer.state_dict()["weight_ih_l0"] + 1
    layer.parameters["weight_ih_l0"] = array
    expected = layer(X)
    array[...] = np.nan
    assert_same_bits(layer(X), expected)
    weights = layer.state_dict()
    layer.load_state_dict(weights)
    for array in weights.values():
        array[...] = np.nan
    assert_same_bits(layer(X), expected)


@BOTH
@pytest.mark.parametrize(
    ("name", "value", "error", "said"),
    [
        ("weight_ih_l1", np.zeros((24, 3)), ValueError, "weight_ih_l1"),
        ("", np.zeros((24, 3)), ValueError, "weight_ih_l0"),
        (5, np.zeros((24, 3)), (TypeError, ValueError), "name"),
        (None, np.zeros((24, 3)), (TypeError, ValueError), "name"),
        ("weight_ih_l0", np.zeros((3, 24)), ValueError, r"weight_ih_l0.*\(24, 3\).*\(3, 24\)"),
        ("weight_ih_l0", np.zeros(72), ValueError, "weight_ih_l0"),
        ("weight_ih_l0", 1.0, ValueError, "weight_ih_l0"),
        ("weight_ih_l0", np.zeros((24, 3), int), TypeError, "weight_ih_l0"),
        ("weight_ih_l0", np.zeros((24, 3), complex), TypeError, "weight_ih_l0"),
        ("weight_ih_l0", np.zeros((24, 3), bool), TypeError, "weight_ih_l0"),
        ("weight_ih_l0", np.zeros((24, 3), object), TypeError, "weight_ih_l0"),
        ("weight_ih_l0", None, TypeError, "weight_ih_l0"),
        ("weight_ih_l0", "x", TypeError, "weight_ih_l0"),
        ("weight_ih_l0", [[1.0], [1.0, 2.0]], ValueError, "weight_ih_l0"),
        ("bias_ih_l0", np.zeros((24, 1)), ValueError, "bias_ih_l0"),
    ],
    ids=str,
)
def test_wrong_parameters(name: Any, value: Any, error: Any, said: str, module: Any) -> None:
    layer = make("lstm", 3, 6, module=module)
    before = layer(X)
    with pytest.raises(error, match=said):
        layer.parameters[name] = value
    assert_same_bits(layer(X), before)


# State dicts


@BOTH
def test_state_dict_is_of_copies(module: Any) -> None:
    layer = make("lstm", 3, 6, module=module)
    before = layer(X)
    weights = layer.state_dict()
    assert type(weights) is dict
    for array in weights.values():
        array[...] = 0  # writeable, and no longer the layer's
    assert_same_bits(layer(X), before)


@BOTH
def test_load_state_dict_is_all_or_nothing_and_names_every_fault(module: Any) -> None:
    layer, other = every("lstm", module), every("lstm", module, seed=1)
    before = layer(X)
    weights: dict[str, Any] = other.state_dict()
    weights["weight_ih_l0"] = np.zeros((2, 2))
    weights["bias_hh_l1_reverse"] = np.zeros(3)
    weights["extra"] = np.zeros(1)
    weights["weight_ih_l2"] = np.zeros(1)
    del weights["weight_hh_l1"], weights["bias_ih_l0"]
    with pytest.raises(ValueError, match="mapping") as caught:
        layer.load_state_dict(weights)
    message = str(caught.value)
    for name in ("weight_ih_l0 ", "bias_hh_l1_reverse ", "extra ", "weight_ih_l2 ", "weight_hh_l1 ", "bias_ih_l0 "):
        assert name in message, name
    assert "weight_hh_l0 " not in message
    assert_same_bits(layer(X), before)


@BOTH
@pytest.mark.parametrize("name", ["weight_ih_l0", "bias_hh_l1_reverse"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (np.zeros((24, 3), int), TypeError),
        (np.zeros((24, 3), complex), TypeError),
        (np.zeros((24, 3), object), TypeError),
        (np.zeros((24, 3), bool), TypeError),
        (None, TypeError),
        ("text", TypeError),
        ([[1.0], [1.0, 2.0]], ValueError),
    ],
    ids=str,
)
def test_wrong_arrays_in_a_state_dict(name: str, value: Any, error: Any, module: Any) -> None:
    layer = every("lstm", module)
    before = layer(X)
    weights: dict[str, Any] = every("lstm", module, seed=1).state_dict()
    weights[name] = value
    with pytest.raises(error, match=name):
        layer.load_state_dict(weights)
    assert_same_bits(layer(X), before)


@BOTH
@pytest.mark.parametrize(
    "mapping",
    [
        None,
        5,
        "weights",
        [],
        [("weight_ih_l0", 1)],
        {5: np.zeros(1)},
        {None: np.zeros(1)},
        {},
        {"a": [[1.0], [1.0, 2.0]]},
    ],
    ids=str,
)
def test_wrong_mappings(mapping: Any, module: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="mapping"):
        make("lstm", 3, 6, module=module).load_state_dict(mapping)


def test_any_mapping_and_any_real_dtype() -> None:
    layer, other = make("lstm", 3, 6), make("lstm", 3, 6, seed=1)
    layer.load_state_dict(types.MappingProxyType(other.state_dict()))
    same(layer, make_like(other, layer))
    layer.load_state_dict(make("lstm", 3, 6, seed=2).parameters)
    layer.load_state_dict({name: array.astype("float64") for name, array in other.state_dict().items()})
    assert_same_bits(layer(X), other(X))
    layer.load_state_dict({name: array.tolist() for name, array in other.state_dict().items()})
    assert_same_bits(layer(X), other(X))


def make_like(source: Any, config_of: Any) -> Any:
    layer = type(config_of)(**config_of._config)
    layer.load_state_dict(source.state_dict())
    return layer


# Copies, seeds, words


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_pickle_and_copy(kind: str, dtype: str, module: Any) -> None:
    layer = every(kind, module, dtype)
    for called in (False, True):
        if called:
            layer(X)  # now there is a packed copy, which does not travel
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            same(layer, pickle.loads(pickle.dumps(layer, protocol)))
        same(layer, copy.deepcopy(layer))
        same(layer, copy.copy(layer))
        same(layer, pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(layer)))))


def test_a_pickle_holds_the_weights_once() -> None:
    layer = fs.LSTM(64, 64)
    layer(inputs((1, 2, 64)))
    weights = sum(array.nbytes for array in layer.parameters.values())
    assert len(pickle.dumps(layer)) < 1.1 * weights


@BOTH
def test_seeds(module: Any) -> None:
    for cls in (module.RNN, module.LSTM, module.GRU):
        for name, array in cls(3, 6, seed=5).parameters.items():
            assert_same_bits(cls(3, 6, seed=5).parameters[name], array)
            assert (cls(3, 6, seed=6).parameters[name] != array).any()
            assert (cls(3, 6).parameters[name] != cls(3, 6).parameters[name]).any()
            assert np.abs(array).max() <= 1 / math.sqrt(6) and len(np.unique(array)) == array.size
    assert_same_bits(
        fs.GRU(3, 6, seed=5).parameters["bias_ih_l0"], fs.reference.GRU(3, 6, seed=5).parameters["bias_ih_l0"]
    )


def test_a_layer_does_not_draw_from_the_global_generator() -> None:
    np.random.seed(0)
    first = np.random.random()
    np.random.seed(0)
    fs.LSTM(3, 6, seed=1)
    assert np.random.random() == first


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_repr(kind: str, module: Any) -> None:
    layer = every(kind, module)
    text = repr(layer)
    count = sum(array.size for array in layer.parameters.values())
    assert text.startswith(type(layer).__name__ + "(") and f"{count:,}" in text
    for part in ("input_size=3", "hidden_size=6", "num_layers=2", "bidirectional=True", "dtype='float32'"):
        assert part in text
    config = text[: text.rindex(")") + 1]
    same_config = eval(config, {name: getattr(module, name) for name in ("RNN", "LSTM", "GRU")})
    assert repr(same_config) == text


def test_repr_says_what_makes_the_kind() -> None:
    assert "nonlinearity='sigmoid'" in repr(make("rnn_sigmoid", 1, 2))
    assert "proj_size=1" in repr(make("lstm_proj", 1, 2))
    assert "layer_norm=True" in repr(make("lstm_ln", 1, 2))
    assert "reset_after=False" in repr(make("gru_before", 1, 2))
    assert "weight_ih_l0" in repr(make("lstm", 1, 2).parameters)


@BOTH
def test_dropout_does_nothing_in_inference(module: Any) -> None:
    layer, other = (module.LSTM(3, 6, 2, dropout=p, seed=0) for p in (0.9, 0))
    assert_same_bits(layer(X), other(X))
    assert_same_bits(layer.step(X[:, 0]), other.step(X[:, 0]))


def test_changing_a_size_reads_and_writes_nothing_outside_an_array() -> None:
    """A size that is assigned to is refused, or the next call is; or it changes nothing."""
    code = """
    import numpy as np, fastseq as fs
    for cls in (fs.RNN, fs.LSTM, fs.GRU):
        for name in ("hidden_size", "input_size", "num_layers", "proj_size", "bidirectional"):
            for value in (1, 64):
                layer = cls(8, 32, seed=0)
                expected = layer(np.ones((4, 3, 8), "float32"))[0]
                try:
                    setattr(layer, name, bool(value) if name == "bidirectional" else value)
                    y = layer(np.ones((4, 3, 8), "float32"))[0]
                except (AttributeError, TypeError, ValueError):
                    continue
                assert y.shape == expected.shape and (y == expected).all(), (cls, name, value)
    """
    run_python(code)


# Files


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind: str, dtype: str, module: Any, tmp_path: Path) -> None:
    layer = every(kind, module, dtype)
    for path in (tmp_path / "layer", str(tmp_path / "other.safetensors")):
        layer.save(path)
        same(layer, module.load(path))
    assert sorted(os.listdir(tmp_path)) == ["layer", "other.safetensors"]
    # Each side reads the files of the other.
    for other in (fs, fs.reference):
        assert type(other.load(tmp_path / "layer")) is getattr(other, type(layer).__name__)


def test_files_in_the_working_directory(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    layer = make("gru_before", 3, 6)
    layer.save("layer")
    same(layer, fs.load("layer"))
    layer.save(Path("layer"))
    assert os.listdir() == ["layer"]


def test_a_file_replaces_another_and_has_usual_permissions(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    path.write_bytes(b"something else")
    before = os.umask(0o027)
    try:
        make("lstm", 3, 6).save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    same(make("lstm", 3, 6), fs.load(path))


def test_a_file_is_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    layer = every("lstm_proj")
    layer.save(tmp_path / "layer")
    arrays = load_file(tmp_path / "layer")
    assert set(arrays) == set(layer.parameters)
    for name, array in arrays.items():
        assert_same_bits(array, layer.parameters[name])


def test_a_long_file_name(tmp_path: Path) -> None:
    """Any name that the file system can hold."""
    path = tmp_path / ("x" * 250)
    path.touch()
    make("lstm", 3, 6).save(path)
    same(make("lstm", 3, 6), fs.load(path))


@pytest.mark.parametrize("what", ["layer", "state"])
@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failed_save_leaves_nothing(what: str, failing: str, tmp_path: Path, monkeypatch: Any) -> None:
    layer = make("lstm", 3, 6)
    thing = layer if what == "layer" else random_state(layer, 2)
    path = tmp_path / "file"
    for old in (None, b"the old file"):
        if old is not None:
            path.write_bytes(old)
        for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

            def fail(*arguments: Any, error: BaseException = error, **more: Any) -> Any:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(os, failing, fail)
                with pytest.raises(type(error)):
                    thing.save(path)
            assert os.listdir(tmp_path) == ([] if old is None else ["file"])
            assert old is None or path.read_bytes() == old
    thing.save(path)
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A write that stops half way: the size of a file is limited, as a full disk limits it."""
    code = f"""
    import resource, signal, os, fastseq as fs
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    layer = fs.LSTM(64, 64)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        layer.save({str(tmp_path / "file")!r})
    except OSError:
        print(os.listdir({str(tmp_path)!r}))
    """
    assert run_python(code).stdout.strip() == "[]"


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    layer = make("lstm", 3, 6)
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "file", tmp_path / "folder"):
        with pytest.raises(OSError, match=r"missing|folder"):
            layer.save(path)
    assert os.listdir(tmp_path) == ["folder"] and not os.listdir(tmp_path / "folder")


@pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
@pytest.mark.parametrize("path", [None, 99_999, 1.5, [], object()], ids=lambda value: type(value).__name__)
def test_what_is_not_a_path(path: Any, module: Any) -> None:
    with pytest.raises(TypeError, match="path"):
        module.load(path)
    for thing in (make("lstm", 3, 6), random_state(make("lstm", 3, 6), 1)):
        with pytest.raises(TypeError, match="path"):
            thing.save(path)


def test_a_number_is_not_a_path_and_its_file_stays_open() -> None:
    code = """
    import os, fastseq as fs
    mine, _ = os.pipe()
    for number in (mine, True):
        try:
            fs.load(number)
        except TypeError:
            pass
        os.fstat(number)  # an error, if it was closed
    print("open")
    """
    assert run_python(code).stdout == "open\n"


def test_bytes_as_a_path(tmp_path: Path) -> None:
    """Python's own functions take them; if these do not, they say so."""
    path = os.fsencode(tmp_path / "file")
    layer = make("lstm", 3, 6)
    for call in (lambda: layer.save(path), lambda: fs.load(path)):
        try:
            call()
        except TypeError as error:
            assert "path" in str(error)


def test_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fs.load(tmp_path / "missing")
    with pytest.raises(OSError, match="folder|directory"):
        fs.load(tmp_path)
    with pytest.raises(ValueError, match="null"):
        fs.load("a\0b")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "layer"
    make("gru_after", 3, 6).save(path)
    return path.read_bytes()


def refuse(content: bytes, folder: Path, module: Any = fs) -> str:
    """Loading the content raises a ValueError that names the file; returns its message."""
    path = folder / "damaged-file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged-file") as caught:
        module.load(path)
    return str(caught.value)


def test_truncated_files(saved: bytes, tmp_path: Path) -> None:
    for n in (0, 1, 7, 8, 9, 100, len(saved) // 2, len(saved) - 1):
        refuse(saved[:n], tmp_path)
        refuse(saved[:n], tmp_path, fs.reference)


def test_files_with_more_at_their_end(saved: bytes, tmp_path: Path) -> None:
    refuse(saved + b"\0", tmp_path)


def test_foreign_files(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(100))
    for content in (b"hello", b"\x89PNG" + bytes(100), b"PK\x03\x04" + bytes(1000), bytes(1000), b"\xff" * 1000):
        refuse(content, tmp_path)
    refuse(buffer.getvalue(), tmp_path)
    refuse(json.dumps({"weights": [1, 2]}).encode(), tmp_path)


def pieces(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data; without the checksum, which would find every change before anything else did."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    del header["__metadata__"]["fastseq.crc32"]
    return header, content[8 + size :]


def joined(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


def with_config(content: bytes, text: str) -> bytes:
    header, data = pieces(content)
    header["__metadata__"]["fastseq.config"] = text
    return joined(header, data)


def test_other_safetensors_files(saved: bytes, tmp_path: Path) -> None:
    from safetensors.numpy import save

    message = refuse(save({"weight_ih_l0": np.zeros((3, 3), "float32")}), tmp_path)
    assert "load_state_dict" in message
    refuse(save({}), tmp_path)
    refuse(save({"a": np.zeros(3)}, {"format": "pt"}), tmp_path)
    for kind, size in (("BF16", 2), ("F8_E4M3", 1), ("I64", 8), ("BOOL", 1), ("F4", 1), ("C64", 8)):
        header = {"a": {"dtype": kind, "shape": [2], "data_offsets": [0, 2 * size]}}
        refuse(joined(header, bytes(2 * size)), tmp_path)


@pytest.mark.parametrize("key", ["fastseq.format", "fastseq.class", "fastseq.config"])
@pytest.mark.parametrize("value", [None, "", "9", "Nonsense", "load", "State", "LSTM", "{}", "[]", "null", "{", "\0"])
def test_damaged_metadata(key: str, value: Any, saved: bytes, tmp_path: Path) -> None:
    header, data = pieces(saved)
    if value is None:
        del header["__metadata__"][key]
    else:
        header["__metadata__"][key] = value
    refuse(joined(header, data), tmp_path)
    refuse(joined(header, data), tmp_path, fs.reference)


@pytest.mark.parametrize(
    "config",
    [
        '{"input_size": 3}',
        '{"input_size": 3, "hidden_size": 6, "other": 1}',
        '{"input_size": 3, "hidden_size": 7}',
        '{"input_size": 3, "hidden_size": 0}',
        '{"input_size": 3, "hidden_size": "6"}',
        '{"input_size": 3, "hidden_size": 6, "dtype": "float16x"}',
        '{"input_size": 3, "hidden_size": 6, "dtype": "f4,("}',
        '{"input_size": 3, "hidden_size": 6, "bias": 1}',
        '{"input_size": 3, "hidden_size": 6, "num_layers": 2}',
        '{"input_size": 3, "hidden_size": 4611686018427387904}',
        '{"input_size": 3, "hidden_size": 1180591620717411303424}',
        '{"input_size": 3, "hidden_size": 1e400}',
        "[" * 100_000,
        "3",
        '"text"',
    ],
    ids=lambda text: text[:70],
)
def test_damaged_configurations(config: str, saved: bytes, tmp_path: Path) -> None:
    refuse(with_config(saved, config), tmp_path)


def test_damaged_arrays(saved: bytes, tmp_path: Path) -> None:
    header, data = pieces(saved)
    for change in ("missing", "renamed", "reshaped", "integers"):
        damaged = json.loads(json.dumps(header))
        entry = damaged["weight_ih_l0"]
        if change == "renamed":
            damaged["weight_ih_l7"] = damaged.pop("weight_ih_l0")
        elif change == "reshaped":
            entry["shape"] = entry["shape"][::-1]
        elif change == "integers":
            entry["dtype"] = "I32"
        else:
            del damaged["weight_ih_l0"]
        refuse(joined(damaged, data), tmp_path)


def test_damaged_states(tmp_path: Path) -> None:
    from safetensors.numpy import save

    metadata = {"fastseq.format": "1", "fastseq.class": "LSTMState", "fastseq.config": "{}"}
    cube = np.zeros((1, 2, 3), "float32")
    faults: list[dict[str, Array]] = [
        {},
        {"h": cube},
        {"h": cube, "c": cube, "d": cube},
        {"h": cube, "c": cube[0]},
        {"h": cube, "c": cube[:, :1]},
        {"h": cube, "c": cube.astype("float64")},
        {"h": cube, "c": cube.astype("int32")},
    ]
    for arrays in faults:
        refuse(save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, metadata), tmp_path)


def test_a_file_with_any_byte_changed_loads_or_is_refused(saved: bytes, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    header_size = 8 + struct.unpack("<Q", saved[:8])[0]
    path = tmp_path / "damaged-file"
    for position in rng.integers(0, header_size, 400):
        damaged = bytearray(saved)
        damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            fs.load(path)
        except ValueError as error:
            assert "damaged-file" in str(error)


def test_a_reference_layer_of_a_dtype_that_files_cannot_hold(tmp_path: Path) -> None:
    layer = fs.reference.LSTM(3, 6, dtype=np.longdouble)
    if layer.dtype == np.float64:
        pytest.skip("this machine lacks a long double wider than float64")
    with pytest.raises(TypeError, match="float"):
        layer.save(tmp_path / "file")
    assert not os.listdir(tmp_path)
    half = fs.reference.LSTM(3, 6, dtype="float16")
    half.save(tmp_path / "half")
    assert fs.reference.load(tmp_path / "half").dtype == "float16"
    with pytest.raises(ValueError, match="half"):
        fs.load(tmp_path / "half")


@BOTH
@pytest.mark.parametrize("prefix", ["module.", "lstm.", "model.encoder."])
def test_a_prefix_of_all_names_is_told(prefix: str, module: Any) -> None:
    """The message holds an expression that works."""
    for layer in (module.LSTM(3, 4, seed=0), module.Sequential(module.LSTM(3, 4, seed=0), module.Linear(4, 2, seed=1))):
        others = {"head.weight": np.zeros(3)}
        for more in ({}, others):
            mapping = {**{f"{prefix}{name}": array for name, array in layer.state_dict().items()}, **more}
            with pytest.raises(ValueError, match=f"without the prefix {prefix!r} the names fit") as caught:
                layer.load_state_dict(mapping)
            expression = str(caught.value).rpartition("give ")[2]
            assert ("startswith" in expression) == bool(more)
            layer.load_state_dict(eval(expression, {"mapping": mapping}))
    with pytest.raises(ValueError, match="missing") as caught:
        module.Linear(3, 4).load_state_dict({"a.weight": np.zeros((4, 3)), "b.bias": np.zeros(4)})
    assert "prefix" not in str(caught.value)


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (".pt", r"layer.load_state_dict\(torch.load\(path, weights_only=True\)\)"),
        (".PTH", r"layer.load_state_dict\(torch.load\(path, weights_only=True\)\)"),
        (".onnx", "initializers by the names of its parameters"),
        (".h5", "arrays by the names of its parameters"),
        (".keras", "arrays by the names of its parameters"),
    ],
)
def test_files_of_other_libraries(ending: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{ending}"
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(ValueError, match=f"is not a whole safetensors file: .*{said}"):
        fs.load(path)
    with pytest.raises(FileNotFoundError):
        fs.load(tmp_path / f"another{ending}")


@BOTH
def test_dropout_between_layers_of_which_there_is_one(module: Any, tmp_path: Path) -> None:
    """A warning at the line that asks for it; none where a model, a copy or a file makes such a layer."""
    models = fs.models if module is fs else module.models
    said = "dropout should be 0 where num_layers is 1: .* 0.3 drops nothing"
    for cls in (module.LSTM, module.GRU, module.RNN, models.RecurrentForecaster):
        with pytest.warns(UserWarning, match=said) as warned:
            layer = cls(3, 4, dropout=0.3)
        assert [one.filename for one in warned] == [__file__]
        layer.save(tmp_path / "layer")
        for other in (pickle.loads(pickle.dumps(layer)), copy.copy(layer), module.load(tmp_path / "layer")):
            assert other.dropout == 0.3
        cls(3, 4, 2, dropout=0.3)
        cls(3, 4)
    models.RecurrentLM(5, 4, 3, dropout=0.3)
    models.Seq2Seq(5, 4, 3, 3, dropout=0.3)
