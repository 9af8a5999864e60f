"""Files: what is written reads back equal or is refused before, and a byte that has changed is found on loading."""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import assert_same_bits

import fastseq as fs
from fastseq.training import load_checkpoint, save_checkpoint

SHIPPED = Path(fs.__file__).parent / "data" / "pronounce.safetensors"


def states() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    h, c = rng.normal(size=(2, 1, 3)).astype("float32"), rng.normal(size=(2, 1, 3)).astype("float32")
    keys, projected = rng.normal(size=(2, 4, 3)).astype("float32"), rng.normal(size=(2, 4, 2)).astype("float32")
    return {
        "state": fs.State(h),
        "lstm": fs.LSTMState(h, c),
        "pair": fs.Seq2SeqState(h, c, keys, projected, [4, 2]),
        "pair_of_gru": fs.Seq2SeqState(h, None, keys, projected, [4, 2]),
        "pair_without_attention": fs.Seq2SeqState(h),
        "attention": fs.AttentionState([3, 2], [0, 0], *rng.normal(size=(2, 2, 1, 2, 3, 4)).astype("float32")),
        "attention_with_memory": fs.AttentionState(
            [3, 2],
            [0, 0],
            *rng.normal(size=(2, 2, 1, 2, 3, 4)).astype("float32"),
            memory_lengths=[2, 1],
            memory_keys=rng.normal(size=(2, 1, 2, 2, 4)).astype("float32"),
            memory_values=rng.normal(size=(2, 1, 2, 2, 4)).astype("float32"),
        ),
    }


def content() -> dict[str, Any]:
    return {"step": 3, "model": {"w": np.arange(3.0)}, "state": fs.State(np.ones((1, 1, 2)))}


def write(kind: str, path: Path) -> Callable[[Path], Any]:
    """Write a file of a kind; what reads it."""
    if kind == "checkpoint":
        save_checkpoint(path, content())
        return load_checkpoint
    made = {
        "layer": lambda: fs.GRU(2, 3, seed=0),
        "sequential": lambda: fs.Sequential(fs.Linear(2, 3, seed=0), fs.ReLU(), fs.Linear(3, 1, seed=1)),
        "graph": lambda: fs.Graph("x", {"a": (fs.Linear(2, 3, seed=0), "x"), "y": (fs.Concatenate(), "a", "x")}, "y"),
        "model": lambda: fs.models.MarkovChain(3).fit([0, 1, 2, 1]) and fs.models.RecurrentLM(3, 2, 2, seed=0),
        **{name: (lambda state=state: state) for name, state in states().items()},
    }[kind]()
    made.save(path)
    return fs.load


FILES = ["layer", "sequential", "graph", "model", "state", "pair", "attention", "checkpoint"]


@pytest.mark.parametrize("kind", FILES)
def test_a_flipped_bit_is_found_wherever_it_is(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a-file"
    read = write(kind, path)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    places = [*range(8), *rng.choice(np.arange(8, header), min(250, header - 8), replace=False)]
    places += [*rng.choice(np.arange(header, len(data)), min(100, len(data) - header), replace=False)]
    places += list(range(data.index(b"crc32") - 12, data.index(b"crc32") + 20))
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="a-file"):
            read(path)
        damaged[place] = (data[place] + int(rng.integers(1, 256))) % 256
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="a-file"):
            read(path)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_cut_or_longer_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a-file"
    read = write(kind, path)
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    cuts = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) - 1, *range(0, len(data), len(data) // 50)}
    for cut in cuts - {len(data)}:
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="a-file"):
            read(path)
    for more in (b"\0", b" ", data):
        path.write_bytes(data + more)
        with pytest.raises(ValueError, match="a-file"):
            read(path)


def test_a_checkpoint_of_numbers_that_numpy_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "a-file"
    header = {
        "__metadata__": {"fastseq.checkpoint": "{}", "fastseq.format": "1", "fastseq.checksum": "0"},
        "array": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(2))
    with pytest.raises(ValueError, match="a-file' is damaged: array is BF16"):
        fs.training.load_checkpoint(path)


def without_checksum(data: bytes) -> bytes:
    """A file as an older version wrote it."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    del header["__metadata__"]["fastseq.crc32"]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def test_files_of_older_versions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a-file"
    for kind in FILES[:-1]:
        read = write(kind, path)
        made = read(path)
        path.write_bytes(without_checksum(path.read_bytes()))
        assert type(read(path)) is type(made)


def test_checkpoints_of_older_versions_are_read(tmp_path: Path) -> None:
    from safetensors.numpy import save

    array = np.arange(3.0)
    text = json.dumps(
        {
            "dict": {
                "a": {"array": "a"},
                "state": {"state": "State", "of": {"list": [{"array": "state.0"}]}},
                "n": 3,
            }
        }
    )
    arrays = {"a": array, "state.0": np.ones((1, 1, 2))}
    value = zlib.crc32(text.encode())
    for name, one in arrays.items():
        value = zlib.crc32(f"{name} {one.dtype} {one.shape}".encode(), value)
        value = zlib.crc32(one.tobytes(), value)
    metadata = {"fastseq.format": "1", "fastseq.checkpoint": text, "fastseq.checksum": f"{value:08x}"}
    path = tmp_path / "a-file"
    path.write_bytes(save(arrays, metadata))
    back = load_checkpoint(path)
    assert back["n"] == 3 and back["state"] == fs.State(np.ones((1, 1, 2)))
    assert_same_bits(back["a"], array)
    path.write_bytes(save({**arrays, "a": array + 1}, metadata))
    with pytest.raises(ValueError, match="a-file.*checksum"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", states())
def test_a_state_in_a_checkpoint_reads_back_equal(name: str, tmp_path: Path) -> None:
    state = states()[name]
    save_checkpoint(tmp_path / "file", {"one": state, "many": (state, [state])})
    back = load_checkpoint(tmp_path / "file")
    for one in (back["one"], back["many"][0], back["many"][1][0]):
        assert type(one) is type(state) and one == state
        assert repr(one) == repr(state)


@pytest.mark.parametrize("dtype", ["?", "b", "h", "i", "q", "B", "H", "I", "Q", "e", "f", "d"])
def test_arrays_in_a_checkpoint_read_back_equal(dtype: str, tmp_path: Path) -> None:
    values = np.arange(6).reshape(2, 3).astype(dtype)
    content = {
        "native": values,
        "swapped": values.astype(values.dtype.newbyteorder(">")),
        "turned": values.T,
        "strided": values[:, ::2],
        "none": values[:0],
        "number": values[1, 1:2].reshape(()),
        "__metadata__": values + values,
        "": values,
    }
    save_checkpoint(tmp_path / "file", content)
    back = load_checkpoint(tmp_path / "file")
    assert back.keys() == content.keys()
    for name, array in content.items():
        assert_same_bits(back[name], array.astype(array.dtype.newbyteorder("=")), name)


def test_swapped_parameters_and_numbers_without_axes_read_back(tmp_path: Path) -> None:
    layer = fs.reference.Linear(2, 3, seed=0)
    layer.load_state_dict({name: array.astype(">f8") for name, array in layer.parameters.items()})
    layer.save(tmp_path / "file")
    assert_same_bits(list(fs.load(tmp_path / "file").parameters.values()), list(layer.parameters.values()))
    fs.io.save(tmp_path / "raw", "State", {}, {"h": np.arange(3.0).astype(">f8").reshape(1, 1, 3)})
    assert_same_bits(fs.load(tmp_path / "raw").h, np.arange(3.0).reshape(1, 1, 3))


@pytest.mark.parametrize(
    "value",
    [
        object(),
        1j,
        b"bytes",
        {1, 2},
        np.float64,
        np.longdouble(1),
        np.complex64(1),
        np.datetime64("2000-01-01"),
        np.array(["a"]),
        np.array([None]),
        np.array([1j]),
        np.zeros(2, "datetime64[s]"),
        np.zeros(2, [("a", "f4")]),
        np.ma.masked_array([1.0, 2.0], [True, False]),
        {3: 4},
    ],
    ids=lambda value: repr(value).split(" at 0x")[0],  # the same in every process
)
def test_what_a_checkpoint_cannot_hold_is_refused_before_it_is_written(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a\.inside|a/inside|a should"):
        save_checkpoint(tmp_path / "file", {"a": {"inside": value} if not isinstance(value, dict) else value})
    assert not os.listdir(tmp_path)


def test_numbers_in_a_checkpoint_read_back_equal(tmp_path: Path) -> None:
    numbers = [math.inf, -math.inf, -0.0, 5e-324, 2**200, -1, np.float32(0.1), np.float16(0.1), np.uint64(2**64 - 1)]
    save_checkpoint(tmp_path / "file", {"numbers": numbers, "nan": math.nan, "bool": np.True_, "text": "ü\ud800\0"})
    back = load_checkpoint(tmp_path / "file")
    assert back["numbers"] == numbers and math.copysign(1, back["numbers"][2]) == -1
    assert math.isnan(back["nan"]) and back["bool"] is True and back["text"] == "ü\ud800\0"


def test_a_checkpoint_and_a_saved_layer_say_what_they_are(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a-checkpoint", content())
    for module in (fs, fs.reference):
        with pytest.raises(ValueError, match=r"a-checkpoint' is a checkpoint.*fastseq\.training\.load_checkpoint"):
            module.load(tmp_path / "a-checkpoint")
    fs.Linear(2, 3).save(tmp_path / "a-layer")
    with pytest.raises(ValueError, match=r"a-layer' is no checkpoint.*fastseq\.load"):
        load_checkpoint(tmp_path / "a-layer")


def test_the_shipped_model_is_read_and_has_a_checksum(tmp_path: Path) -> None:
    data = SHIPPED.read_bytes()
    model = fs.load(SHIPPED)
    assert b'"fastseq.crc32":"' in data[:4000]
    path = tmp_path / "a-file"
    path.write_bytes(without_checksum(data))
    assert_same_bits(list(fs.load(path).parameters.values()), list(model.parameters.values()))
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="a-file.*checksum"):
        fs.load(path)
