"""Files of twins: the same bits after loading, dtypes that others can read, and faults that are refused by name."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import assert_same_bits
from safetensors import safe_open
from twins import ALL, EACH_TYPE, MODELS, arrays_in, ids_of, narrow_bytes

import fastseq as fs
from fastseq.io import CHECKSUM

SOME = [
    "lstm_proj, both ways",
    "Linear",
    "Conv1d in groups",
    "Embedding",
    "MultiheadAttention, other keys",
    "AdditiveAttention",
    "TransformerDecoderLayer, swiglu",
    "Transformer",
    "Sequential",
    "Graph",
    *(name for name in MODELS if name.split(", ")[-1] not in ("rnn", "lstm", "window", "untied", "tokens")),
]


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def content(path: Path) -> Any:
    """What a file says, whatever the order of its metadata."""
    header, data = header_of(path), path.read_bytes()
    header["__metadata__"].pop(CHECKSUM)
    return header, data[8 + int.from_bytes(data[:8], "little") :]


def write(path: Path, header: dict[str, Any], arrays: bytes) -> None:
    """A safetensors file with its checksum, whatever its header says."""
    header["__metadata__"][CHECKSUM] = "00000000"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = bytearray(len(text).to_bytes(8, "little") + text + arrays)
    place = data.index(f'"{CHECKSUM}":"'.encode()) + len(CHECKSUM) + 4
    data[place : place + 8] = f"{zlib.crc32(data):08x}".encode()
    path.write_bytes(data)


def rewritten(path: Path, change: Any) -> None:
    """Change a file by a function of its arrays, name to (dtype, shape, bytes), and its metadata."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = header_of(path)
    metadata = header.pop("__metadata__")
    arrays = {
        name: [one["dtype"], one["shape"], data[begin + one["data_offsets"][0] : begin + one["data_offsets"][1]]]
        for name, one in header.items()
    }
    change(arrays, metadata)
    made: dict[str, Any] = {"__metadata__": metadata}
    whole = b""
    for name, (dtype, shape, own) in arrays.items():
        made[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(whole), len(whole) + len(own)]}
        whole += own
    write(path, made, whole)


@EACH_TYPE
@pytest.mark.parametrize("name", SOME)
def test_the_same_bits_after_loading(name: str, weights: str, tmp_path: Path) -> None:
    case, path = ALL[name], tmp_path / "twin.safetensors"
    original = case.original()
    twin = original.with_weights(weights)
    twin.save(path)
    wanted = list(arrays_in(case.run(twin)))
    for loaded in (fs.load(path), fs.load(path, weights=weights)):
        assert type(loaded) is type(twin) and loaded.weights == weights
        assert narrow_bytes(loaded) == narrow_bytes(twin)
        assert_same_bits(list(arrays_in(case.run(loaded))), wanted)
        with pytest.raises(TypeError, match="zero_grad needs float32 weights"):
            loaded.zero_grad()
    # From the float32 file, while loading.
    original.save(tmp_path / "whole.safetensors")
    loaded = fs.load(tmp_path / "whole.safetensors", weights=weights)
    assert loaded.weights == weights
    assert_same_bits(list(arrays_in(case.run(loaded))), wanted)
    # Saved again, the same file.
    loaded.save(tmp_path / "again.safetensors")
    assert content(tmp_path / "again.safetensors") == content(path)
    reference = fs.reference.load(path)
    assert reference.weights == weights and type(reference).__module__.startswith(type(twin).__module__.split(".")[0])


@EACH_TYPE
def test_other_readers_see_what_it_is(weights: str, tmp_path: Path) -> None:
    path = tmp_path / "twin.safetensors"
    twin = ALL["TransformerLM, gpt2"].original().with_weights(weights, keep=["*linear2*"])
    twin.save(path)
    narrow = narrow_bytes(twin)
    dtype = {"bfloat16": "BF16", "int8": "I8"}[weights]
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["fastseq.weights"] == weights
        names = set(file.keys())
        scales = {f"{name}.scale" for name in narrow} if weights == "int8" else set()
        assert names == set(twin.parameters) | scales
        for name in twin.parameters:
            part = file.get_slice(name)
            assert part.get_dtype() == (dtype if name in narrow else "F32")
            assert tuple(part.get_shape()) == twin.parameters[name].shape
        for name in scales:
            assert file.get_slice(name).get_dtype() == "F32"
            assert_same_bits(file.get_tensor(name), np.array(twin._arrays[name.removesuffix(".scale")].scales))
        if weights == "int8":
            name = next(iter(narrow))
            assert_same_bits(file.get_tensor(name), np.array(twin._arrays[name].values))
    header = header_of(path)
    assert sum(one.get("dtype") == "BF16" for one in header.values()) == (len(narrow) if weights == "bfloat16" else 0)


def test_bytes_of_a_file(tmp_path: Path) -> None:
    layer = fs.LSTM(200, 300, seed=0)
    sizes = {}
    for weights in ("float32", "bfloat16", "int8"):
        (layer if weights == "float32" else layer.with_weights(weights)).save(tmp_path / weights)
        sizes[weights] = (tmp_path / weights).stat().st_size
    assert sizes["bfloat16"] < 0.52 * sizes["float32"] and sizes["int8"] < 0.28 * sizes["float32"]


@EACH_TYPE
@pytest.mark.parametrize("name", ["lstm_proj, both ways", "TransformerLM, gpt2"])
def test_a_file_that_is_cut(name: str, weights: str, tmp_path: Path) -> None:
    path = tmp_path / "a-file"
    ALL[name].original().with_weights(weights).save(path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for length in (0, 7, 8, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="a-file"):
            fs.load(path)
    for place in (header + 3, len(data) - 1, header // 2):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(ValueError, match="a-file"):
            fs.load(path)


def _drop_scale(arrays: Any, metadata: Any) -> None:
    del arrays["weight_hh_l0.scale"]


def _short_scale(arrays: Any, metadata: Any) -> None:
    dtype, shape, own = arrays["weight_ih_l0.scale"]
    arrays["weight_ih_l0.scale"] = [dtype, [shape[0] - 1], own[:-4]]


def _wide_scale(arrays: Any, metadata: Any) -> None:
    dtype, shape, own = arrays["weight_ih_l0.scale"]
    arrays["weight_ih_l0.scale"] = [dtype, [*shape, 1], own]


def _double_scale(arrays: Any, metadata: Any) -> None:
    _, shape, own = arrays["weight_ih_l0.scale"]
    arrays["weight_ih_l0.scale"] = ["F64", shape, np.frombuffer(own, "<f4").astype("<f8").tobytes()]


def _strange_scale(arrays: Any, metadata: Any) -> None:
    arrays["nothing.scale"] = ["F32", [1], bytes(4)]


def _as_vector(arrays: Any, metadata: Any) -> None:
    dtype, shape, own = arrays["weight_ih_l0"]
    arrays["weight_ih_l0"] = [dtype, [shape[0] * shape[1]], own]


def _other_shape(arrays: Any, metadata: Any) -> None:
    dtype, shape, own = arrays["weight_ih_l0"]
    arrays["weight_ih_l0"] = [dtype, [shape[0], shape[1] - 1], own[: -len(own) // shape[1] or None]]


def _half_kept(arrays: Any, metadata: Any) -> None:
    _, shape, _ = arrays["weight_ih_l0"]
    arrays["weight_ih_l0"] = ["F32", shape, bytes(4 * shape[0] * shape[1])]
    arrays.pop("weight_ih_l0.scale", None)


def _narrow_bias(arrays: Any, metadata: Any) -> None:
    _, shape, _ = arrays["bias_ih_l0"]
    arrays["bias_ih_l0"] = [
        "I8" if metadata["fastseq.weights"] == "int8" else "BF16",
        shape,
        bytes(shape[0] * (1 if metadata["fastseq.weights"] == "int8" else 2)),
    ]


def _other_type(arrays: Any, metadata: Any) -> None:
    metadata["fastseq.weights"] = {"int8": "bfloat16", "bfloat16": "int8"}[metadata["fastseq.weights"]]


def _no_type(arrays: Any, metadata: Any) -> None:
    metadata.pop("fastseq.weights")


def _unknown_type(arrays: Any, metadata: Any) -> None:
    metadata["fastseq.weights"] = "int4"


def _unknown_dtype(arrays: Any, metadata: Any) -> None:
    dtype, shape, own = arrays["weight_hh_l0"]
    arrays["weight_hh_l0"] = ["U8" if dtype == "I8" else "I16", shape, own]


def _lost_array(arrays: Any, metadata: Any) -> None:
    arrays.pop("weight_hh_l0")
    arrays.pop("weight_hh_l0.scale", None)


FAULTS: list[tuple[Any, str, str]] = [
    (_drop_scale, "int8", r"weight_hh_l0.scale should be 16 scales of float32"),
    (_short_scale, "int8", r"weight_ih_l0.scale should be 16 scales of float32"),
    (_wide_scale, "int8", r"weight_ih_l0.scale should be 16 scales of float32"),
    (_double_scale, "int8", r"weight_ih_l0.scale should be 16 scales of float32"),
    (_strange_scale, "int8", r"nothing.scale is unknown"),
    (_as_vector, "both", r"weight_ih_l0 is no matrix of (int8|bfloat16)"),
    (_other_shape, "both", r"weight_ih_l0 should be of shape \(16, 3\), not \(16, 2\)"),
    (_half_kept, "both", r"weight_ih_l0 and weight_hh_l0 should be of one type"),
    (_narrow_bias, "both", r"bias_ih_l0 is no matrix of (int8|bfloat16)"),
    (_other_type, "both", r"weight_hh_l0 is (I8|BF16)|weight_ih_l0 is (I8|BF16)"),
    (_no_type, "both", r"weight_.h_l0 is (I8|BF16)"),
    (_unknown_type, "both", "has weights of a type that this version does not know"),
    (_unknown_dtype, "both", r"weight_hh_l0 is (U8|I16)"),
    (_lost_array, "both", r"weight_hh_l0 is missing|weight_hh_l0"),
]


@pytest.mark.parametrize(
    ("change", "weights", "message"),
    [(c, w, m) for c, kind, m in FAULTS for w in ("bfloat16", "int8") if kind in ("both", w)],
)
def test_a_damaged_twin_is_refused(change: Any, weights: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a-file"
    fs.LSTM(3, 4, seed=0).with_weights(weights).save(path)
    rewritten(path, lambda arrays, metadata: None)
    assert fs.load(path).weights == weights
    rewritten(path, change)
    for load in (fs.load, fs.reference.load):
        with pytest.raises(ValueError, match=f"a-file.*({message})"):
            load(path)


@EACH_TYPE
def test_narrow_where_the_layer_has_no_product(weights: str, tmp_path: Path) -> None:
    path = tmp_path / "a-file"
    layer = fs.Sequential(fs.Linear(3, 4, seed=0), fs.LearnedPositions(5, 4, seed=0))
    layer.with_weights(weights).save(path)

    def change(arrays: Any, metadata: Any) -> None:
        arrays["1.weight"] = ["I8" if weights == "int8" else "BF16", [5, 4], bytes(20 if weights == "int8" else 40)]
        if weights == "int8":
            arrays["1.weight.scale"] = ["F32", [5], bytes(20)]

    rewritten(path, change)
    with pytest.raises(ValueError, match=f"a-file.*1.weight should be of float32, not {weights}"):
        fs.load(path)


def test_what_weights_can_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a-file"
    layer = fs.GRU(3, 4, seed=0)
    layer.save(path)
    assert fs.load(path).weights == fs.load(path, weights="float32").weights == "float32"
    for wrong in ("int4", "", 8, "float64"):
        with pytest.raises(ValueError, match="weights should be 'float32', 'bfloat16', 'int8' or None"):
            fs.load(path, weights=wrong)
    layer.with_weights("int8").save(path)
    for other in ("float32", "bfloat16"):
        with pytest.raises(
            ValueError, match=f"weights should be 'int8', as '.*a-file' has them, or None, not '{other}'"
        ):
            fs.load(path, weights=other)
    fs.GRU(3, 4, dtype="float64").save(path)
    with pytest.raises(ValueError, match="float32"):
        fs.load(path, weights="int8")
    layer.initial_state(2).save(path)
    with pytest.raises(ValueError, match="a-file"):
        fs.load(path, weights="int8")


def test_files_of_float32_are_written_and_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "a-file"
    for layer in (fs.GRU(3, 4, seed=0), fs.Linear(3, 4, dtype="float64", seed=0)):
        layer.save(path)
        header = header_of(path)
        assert set(header["__metadata__"]) == {"fastseq.format", "fastseq.class", "fastseq.config", CHECKSUM}
        loaded = fs.load(path)
        assert loaded.weights == layer.dtype.name
        for name, array in layer.parameters.items():
            assert_same_bits(loaded.parameters[name], array)
    shipped = Path(fs.__file__).parent / "data" / "pronounce.safetensors"
    model = fs.load(shipped)
    prompt = ids_of(20, 5, batch=3)
    narrow = fs.load(shipped, weights="int8")
    assert narrow.weights == "int8"
    assert len(narrow.generate(prompt, 6, temperature=0)) == len(model.generate(prompt, 6, temperature=0)) == 3


def test_what_was_measured_of_a_series_is_kept(tmp_path: Path) -> None:
    twin = ALL["RecurrentForecaster, gru"].original().with_weights("int8")
    twin.save(tmp_path / "a-file")
    loaded = fs.load(tmp_path / "a-file")
    series = np.random.default_rng(0).normal(2, 3, (2, 20, 2))
    assert_same_bits(loaded.forecast(series, 3), twin.forecast(series, 3))
    assert_same_bits(loaded.log_prob(series), twin.log_prob(series))
