"""Readers of files: equal to the libraries that wrote them; a file that is cut, damaged or changed is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import assert_same_bits
from hostile import checkpoint, entry, mapping, named, number, safetensors, tensor, text, zipped
from safetensors.numpy import save_file

import fastseq as fs
from fastseq import formats
from fastseq.formats import pytorch

DTYPES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8"]
SHAPES = [(), (1,), (0,), (3, 0, 2), (5,), (2, 3), (4, 1, 3), (1, 1, 1, 1, 2)]


def random_arrays(seed: int, dtypes: list[str] = DTYPES) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    arrays = {}
    for index in range(int(rng.integers(1, 12))):
        shape = SHAPES[rng.integers(len(SHAPES))]
        dtype = np.dtype(dtypes[rng.integers(len(dtypes))])
        values = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
        array = np.asarray(values[..., 0] % 2 == 1 if dtype.name == "bool" else values.view(dtype)[..., 0])
        arrays[f"layer.{index}.ü weight"] = array
    return arrays


def widened(array: Any) -> Any:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def assert_equal(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert list(found) == list(expected) or sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert_same_bits(found[name], widened(array), name)


@pytest.mark.parametrize("seed", range(50))
def test_safetensors_read_equal(seed: int, tmp_path: Path) -> None:
    arrays = random_arrays(seed, DTYPES)
    save_file(arrays, tmp_path / "a", {"key": "value", "ü": '"{}\\'})
    contents = formats.read(tmp_path / "a")
    assert_equal(contents.arrays, arrays)
    assert contents.format == "safetensors" and contents.description["metadata"] == {"key": "value", "ü": '"{}\\'}
    for name, stored in contents.description["tensors"].items():
        assert stored == {"type": arrays[name].dtype.name, "shape": arrays[name].shape}


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_reads_equal(seed: int, save: Any, tmp_path: Path) -> None:
    arrays = random_arrays(seed, [*DTYPES, ">f4", ">i8", ">f2", "c16"])
    arrays |= {"turned": np.arange(6.0).reshape(2, 3).T, "text": np.array(["a", "üb"]), "bytes": np.array(b"abc")}
    save(tmp_path / "a.npz", **arrays)
    contents = formats.read(tmp_path / "a.npz")
    native = {name: array.astype(array.dtype.newbyteorder("=")) for name, array in arrays.items()}
    assert contents.format == "npz"
    assert contents.arrays.keys() == native.keys()
    for name, array in native.items():
        assert contents.arrays[name].dtype == widened(array).dtype and contents.arrays[name].shape == array.shape
        assert contents.arrays[name].tobytes() == widened(array).tobytes(), name


def test_bfloat16_of_safetensors_is_float32(tmp_path: Path) -> None:
    values = np.array([1.5, -0.0, np.inf, 3.0e38, 1e-40], np.float32)
    bits = (values.view(np.uint32) >> 16).astype("<u2")
    (tmp_path / "a").write_bytes(safetensors({"a": entry([5], 0, 10, "BF16")}, bits.tobytes()))
    contents = formats.read(tmp_path / "a")
    assert contents.description["tensors"]["a"]["type"] == "bfloat16"
    assert_same_bits(contents.arrays["a"], (bits.astype(np.uint32) << 16).view(np.float32))


def test_a_header_with_spaces_and_entries_in_any_order_is_read(tmp_path: Path) -> None:
    first = json.dumps(entry([2], 0, 8))
    header = '{ "b" : {"shape" : [1], "data_offsets":[8 , 12],"dtype":"F32"} ,\n "__metadata__" : { }, "a": ' + first
    data = np.arange(3, dtype="<f4")
    (tmp_path / "a").write_bytes(safetensors(header + "}   ", data.tobytes()))
    assert_equal(formats.read(tmp_path / "a").arrays, {"b": data[2:], "a": data[:2]})


# PyTorch without PyTorch: pickles by hand. test_pytorch_files.py compares with torch.load.

NUMBERS = np.arange(6, dtype="<f4")


def write_checkpoint(path: Path, content: bytes, *more: Any, data: bytes = NUMBERS.tobytes()) -> Path:
    path.write_bytes(checkpoint(content, *more, data=data))
    return path


def test_strided_tied_and_empty_tensors(tmp_path: Path) -> None:
    content = mapping(
        ("whole", tensor((2, 3), (3, 1), count=6)),
        ("turned", tensor((3, 2), (1, 3), count=6)),
        ("part", tensor((2, 2), (3, 1), offset=1, count=6)),
        ("repeated", tensor((4, 3), (0, 1), offset=3, count=6)),
        ("overlapping", tensor((4, 3), (1, 1), count=6)),
        ("one", tensor((), (), offset=5, count=6)),
        ("empty", tensor((0, 3), (3, 1), offset=100, count=6)),
    )
    arrays = formats.read(write_checkpoint(tmp_path / "a", content)).arrays
    whole = NUMBERS.reshape(2, 3)
    expected = {
        "whole": whole,
        "turned": whole.T,
        "part": whole[:, 1:],
        "repeated": np.tile(NUMBERS[3:], (4, 1)),
        "overlapping": np.lib.stride_tricks.sliding_window_view(NUMBERS, 3),
        "one": NUMBERS[5],
        "empty": whole[:0],
    }
    for name, array in expected.items():
        assert arrays[name].shape == array.shape and np.array_equal(arrays[name], array), name
        assert not arrays[name].flags.writeable or not array.size
    assert np.shares_memory(arrays["whole"], arrays["turned"])  # a storage of several is read once


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize(("kind", "dtype"), [("Float", "f4"), ("Half", "f2"), ("Long", "i8"), ("Bool", "?")])
def test_both_byte_orders(order: str, kind: str, dtype: str, tmp_path: Path) -> None:
    values = np.array([0, 1, 0, 1, 1, 0], dtype)
    data = values.astype(values.dtype.newbyteorder("<" if order == "little" else ">")).tobytes()
    content = mapping(("a", tensor((6,), count=6, kind=named("torch", f"{kind}Storage"))))
    path = write_checkpoint(tmp_path / "a", content, ("x/byteorder", order.encode()), data=data)
    assert_same_bits(formats.read(path).arrays["a"], widened(values))


def test_bool_of_any_byte_is_true_or_false(tmp_path: Path) -> None:
    content = mapping(("a", tensor((3,), count=3, kind=named("torch", "BoolStorage"))))
    array = formats.read(write_checkpoint(tmp_path / "a", content, data=b"\0\1\xff")).arrays["a"]
    assert_same_bits(array, np.array([False, True, True]))


GOOD = mapping(("w", tensor((6,), count=6)))
COUNTS = mapping(("steps", tensor((6,), count=6, kind=named("torch", "LongStorage"))))
OPTIMIZER = mapping(("state", b"}" + number(0) + mapping(("exp_avg", tensor((6,), count=6))) + b"s"))


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (GOOD, ""),
        (mapping(("state_dict", GOOD), ("epoch", number(3))), "state_dict"),
        (mapping(("model", GOOD), ("optimizer", OPTIMIZER)), "model"),
        (mapping(("optim_states", b"]" + mapping(("m", tensor((6,), count=6))) + b"a"), ("net", GOOD)), "net"),
        (mapping(("deep", mapping(("inside", GOOD)))), "deep/inside"),
        (GOOD + mapping(("epoch", number(1))) + b"\x86", "0"),
        (mapping(("model", GOOD), ("loss", tensor((), (), count=6))), "model"),
        (mapping(("model_ema", GOOD), ("other", named("argparse", "Namespace") + b")\x81" + GOOD + b"b")), "model_ema"),
    ],
)
def test_the_one_state_dict_is_found(content: bytes, key: str, tmp_path: Path) -> None:
    contents = formats.read(write_checkpoint(tmp_path / "a", content))
    assert contents.description["key"] == key
    assert_equal(contents.arrays, {"w": NUMBERS})


def test_several_state_dicts_are_asked_about(tmp_path: Path) -> None:
    content = mapping(("model", GOOD), ("ema", GOOD), ("optimizer", OPTIMIZER), ("epoch", number(7)))
    path = write_checkpoint(tmp_path / "a", content)
    with pytest.raises(ValueError, match=r"a: data.pkl: 2 dicts.*key='model' \(1 tensors\), key='ema' \(1 tensors\)"):
        formats.read(path)
    assert list(pytorch.read(path, key="ema").arrays) == ["w"]
    assert list(pytorch.read(path, key="").arrays) == ["model.w", "ema.w", "optimizer.state.0.exp_avg"]
    with pytest.raises(ValueError, match="nothing is at key='emma'.*'ema'"):
        pytorch.read(path, key="emma")


def test_objects_beside_the_tensors_are_described_and_not_made(tmp_path: Path) -> None:
    state = mapping(("hidden", number(128)), ("name", text("lstm")), ("inner", named("my.code", "Thing") + b")\x81"))
    config = named("argparse", "Namespace") + b")\x81" + state + b"b"
    scalar = named("numpy.core.multiarray", "scalar") + named("numpy", "dtype") + b"\x85R"
    words = b"}" + b"".join(text(f"word{k}") + number(k) + b"s" for k in range(50))
    content = mapping(("model", GOOD), ("args", config), ("best", scalar), ("words", words), ("cpu", b"N"))
    contents = formats.read(write_checkpoint(tmp_path / "a", content))
    beside = contents.description["beside"]
    assert beside["args"] == {
        "class": "argparse.Namespace",
        "hidden": 128,
        "name": "lstm",
        "inner": "an object of my.code.Thing",
    }
    assert beside["best"] == "an object of numpy.core.multiarray.scalar" and beside["cpu"] is None
    assert beside["words"] == {f"word{k}": k for k in range(50)} and beside["model"] == "the state dict"


def test_a_description_stays_small_whatever_is_shared(tmp_path: Path) -> None:
    same = b"}q\1"
    for level in range(1, 60):
        same += b"0}(" + b"".join(text(str(k)) + b"h" + bytes([level]) for k in range(10)) + b"uq" + bytes([level + 1])
    content = same + b"0" + mapping(("model", GOOD), ("paths", b"h\x3c"))
    contents = formats.read(write_checkpoint(tmp_path / "a", content))
    assert len(json.dumps(contents.description)) < 2_000_000


# What is cut, damaged or changed.


def small_files(tmp_path: Path) -> dict[str, bytes]:
    arrays = {"a": np.arange(3, dtype="f4"), "b": np.ones((1, 2), "f2")}
    save_file(arrays, tmp_path / "s", {"key": "value"})
    np.savez(tmp_path / "n.npz", **arrays)
    np.savez_compressed(tmp_path / "c.npz", **arrays)
    fs.Linear(1, 2, seed=0).save(tmp_path / "f")
    content = mapping(("model", mapping(("w", tensor((6,), count=6)))), ("epoch", number(3)))
    write_checkpoint(tmp_path / "p", content, ("x/byteorder", b"little"))
    names = {"safetensors": "s", "npz": "n.npz", "compressed": "c.npz", "fastseq": "f", "pytorch": "p"}
    return {name: (tmp_path / file).read_bytes() for name, file in names.items()}


def outcome(path: Path) -> dict[str, Any] | None:
    """The arrays of a file, or None where it is refused as it should be."""
    try:
        return dict(formats.read(path).arrays)
    except ValueError as error:
        assert str(path) in str(error) and str(error).count(": ") >= 2, error
        return None


@pytest.mark.parametrize("kind", ["safetensors", "npz", "compressed", "fastseq", "pytorch"])
def test_a_file_cut_anywhere_is_refused(kind: str, tmp_path: Path) -> None:
    data = small_files(tmp_path)[kind]
    path = tmp_path / "a-file"
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        assert outcome(path) is None, cut


@pytest.mark.parametrize("kind", ["safetensors", "npz", "compressed", "fastseq", "pytorch"])
def test_a_flipped_byte_is_refused_or_changes_no_number(kind: str, tmp_path: Path) -> None:
    """Zip files have a checksum for each record; safetensors have none, so there numbers may change."""
    data = small_files(tmp_path)[kind]
    path = tmp_path / "a-file"
    path.write_bytes(data)
    expected = outcome(path)
    assert expected is not None
    rng = np.random.default_rng(0)
    for place in range(len(data)):
        for change in (0xFF, 1 << int(rng.integers(8))):
            path.write_bytes(data[:place] + bytes([data[place] ^ change]) + data[place + 1 :])
            found = outcome(path)
            if found is not None and kind not in ("safetensors", "fastseq"):
                assert sum(a.nbytes for a in found.values()) == sum(a.nbytes for a in expected.values()), place
                values = sorted(a.tobytes() for a in found.values())
                assert values == sorted(a.tobytes() for a in expected.values()), place


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    os.utime(path, ns=(0, 0))  # the clock of the file system may not have moved since


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


@pytest.mark.parametrize("change", [shrink, overwrite, replace])
@pytest.mark.parametrize("kind", ["safetensors", "npz", "compressed", "fastseq", "pytorch"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    kind: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "a-file"
    path.write_bytes(small_files(tmp_path)[kind])
    arrays = formats.read(path).arrays
    change(path)
    with pytest.raises(ValueError, match="a-file: .*: the file has changed since"):
        list(arrays.values())
    path.unlink()
    with pytest.raises(FileNotFoundError):
        list(arrays.values())


# Recognition and folders.


def test_formats_are_recognised_by_content(tmp_path: Path) -> None:
    small = small_files(tmp_path)
    names = {"compressed": "npz"}
    cases = {
        **{name: (names.get(name, name), data) for name, data in small.items()},
        "hdf5": ("hdf5", b"\x89HDF\r\n\x1a\n" + bytes(100)),
        "hdf5-later": ("hdf5", bytes(512) + b"\x89HDF\r\n\x1a\n"),
        "keras": ("keras", zipped([("config.json", b"{}", {}), ("model.weights.h5", b"", {})])),
        "onnx": ("onnx", b"\x08\x0a" + b"\x12\x04fast" + b"\x3a\x02\x12\x00" + b"\x42\x02\x10\x15"),
        "old": ("pytorch", b"\x80\x02\x8a\x0al"),
        "nothing": ("npz", zipped([])),
    }
    for name, (format, data) in cases.items():
        path = tmp_path / f"{name}.anything"
        path.write_bytes(data)
        assert formats.recognise(path) == format, name
    assert formats.FORMATS.keys() >= {format for format, _ in cases.values()}


def make_folder(path: Path, **files: Any) -> Path:
    path.mkdir(parents=True)
    for name, value in files.items():
        (path / name).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return path


ONE = safetensors({"a": entry([2], 0, 8)}, np.array([1, 2], "<f4").tobytes())
OTHER = safetensors({"b": entry([1], 0, 2, "F16")}, np.array([3], "<f2").tobytes())
INDEX = {"metadata": {}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}


def test_a_folder_of_one_file_or_of_shards(tmp_path: Path) -> None:
    config = {"model_type": "bert", "hidden_size": 2}
    one = make_folder(tmp_path / "one", **{"config.json": config, "model.safetensors": ONE, "tokenizer.json": {}})
    contents = formats.read(one)
    assert contents.format == "huggingface" and contents.description["config"] == config
    assert contents.description["tokenizer"] == str(one / "tokenizer.json")
    assert_equal(contents.arrays, {"a": np.array([1, 2], "f4")})
    shards = {"config.json": config, "m-1.safetensors": ONE, "m-2.safetensors": OTHER}
    two = make_folder(tmp_path / "two", **shards, **{"model.safetensors.index.json": INDEX})
    contents = formats.read(two)
    assert contents.description["tokenizer"] is None
    assert contents.description["files"] == ["m-1.safetensors", "m-2.safetensors"]
    assert contents.description["tensors"]["b"] == {"type": "float16", "shape": (1,)}
    assert_equal(contents.arrays, {"a": np.array([1, 2], "f4"), "b": np.array([3], "f4")})


def test_links_of_the_cache_of_hugging_face_are_followed_to_its_blobs_alone(tmp_path: Path) -> None:
    blobs = make_folder(tmp_path / "models--me--mine" / "blobs", config=b"{}", weights=ONE)
    (tmp_path / "secret").write_bytes(b"{}")
    snapshot = make_folder(tmp_path / "models--me--mine" / "snapshots" / "abc")
    (snapshot / "config.json").symlink_to("../../blobs/config")
    (snapshot / "model.safetensors").symlink_to(blobs / "weights")
    assert_equal(formats.read(snapshot).arrays, {"a": np.array([1, 2], "f4")})
    (snapshot / "tokenizer.json").symlink_to("../../../secret")
    with pytest.raises(ValueError, match="abc: tokenizer.json: is a link"):
        formats.read(snapshot)
