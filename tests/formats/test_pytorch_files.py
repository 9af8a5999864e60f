"""Checkpoints of PyTorch: equal to `torch.load` on random state dicts; what is not read says how to save it anew."""

from __future__ import annotations

import argparse
import io
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastseq import formats
from fastseq.formats import pytorch

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

DTYPES = {
    "float32": "float32",
    "float64": "float64",
    "float16": "float32",
    "bfloat16": "float32",
    "int8": "int8",
    "uint8": "uint8",
    "int16": "int16",
    "int32": "int32",
    "int64": "int64",
    "uint16": "uint16",
    "uint32": "uint32",
    "bool": "bool",
    "complex64": "complex64",
}
VIEWS = [
    lambda t: t,
    lambda t: t.T,
    lambda t: t[1:],
    lambda t: t[:, ::2],
    lambda t: t[0],
    lambda t: t[0, 0],
    lambda t: t[:0],
    lambda t: t[:1].expand(3, -1),
    lambda t: t.unsqueeze(1),
    lambda t: torch.nn.Parameter(t) if t.is_floating_point() else t,
]


def random_tensors(seed: int) -> dict[str, Any]:
    """Tensors of all types; several view the same storage."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = OrderedDict()
    for index in range(int(rng.integers(1, 10))):
        kind = list(DTYPES)[rng.integers(len(DTYPES))]
        base = torch.from_numpy(rng.integers(0, 100, (3, 4)) - 20).to(getattr(torch, kind))
        for view in range(int(rng.integers(1, 4))):
            tensors[f"cell.{index}.weight_{view}"] = VIEWS[rng.integers(len(VIEWS))](base)
    tensors["always"] = torch.ones(2)
    return tensors


def assert_equal(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        stored = str(tensor.dtype).removeprefix("torch.")
        array = found[name]
        assert array.dtype == DTYPES[stored] and array.shape == tuple(tensor.shape), name
        widened = tensor.detach().float() if stored in ("float16", "bfloat16") else tensor.detach()
        assert array.tobytes() == widened.numpy().tobytes(), name


def nested(tensors: Any, seed: int) -> tuple[Any, str]:
    """A file that has a state dict somewhere, and where."""
    cases = [
        (tensors, ""),
        ({"state_dict": tensors, "epoch": 3, "lr": 0.1}, "state_dict"),
        ({"model": tensors, "args": argparse.Namespace(hidden=3), "best": torch.tensor(0.5)}, "model"),
        ({"a": {"b": tensors}, "rng": torch.get_rng_state(), "np": np.float64(3), "array": np.ones(3)}, "a/b"),
        ([tensors, {"steps": [1, 2, 3]}], "0"),
    ]
    return cases[seed % len(cases)]


@pytest.mark.parametrize("seed", range(150))
def test_random_state_dicts_read_as_torch_loads_them(seed: int, tmp_path: Path) -> None:
    tensors = random_tensors(seed)
    content, key = nested(tensors, seed)
    torch.save(content, tmp_path / "a.pt", pickle_protocol=2 + seed % 4)
    loaded = torch.load(tmp_path / "a.pt", weights_only=False)
    for step in key.split("/") if key else []:
        loaded = loaded[int(step) if step.isdigit() else step]
    contents = formats.read(tmp_path / "a.pt")
    assert contents.format == "pytorch" and contents.description["key"] == key
    assert_equal(contents.arrays, loaded)
    for name, stored in contents.description["tensors"].items():
        assert stored == {"type": str(loaded[name].dtype).removeprefix("torch."), "shape": tuple(loaded[name].shape)}


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 2000, 500))
def test_many_random_state_dicts(first: int) -> None:
    for seed in range(first, first + 500):
        tensors = random_tensors(seed)
        file = io.BytesIO()
        torch.save(nested(tensors, seed)[0], file)
        path = Path(f"/dev/shm/fastseq-{seed}.pt") if Path("/dev/shm").is_dir() else Path(f"fastseq-{seed}.pt")
        try:
            path.write_bytes(file.getvalue())
            assert_equal(formats.read(path).arrays, tensors)
        finally:
            path.unlink()


def rewritten(path: Path, change: Any) -> None:
    """Write a checkpoint again with another pickle."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, change(data) if name.endswith("/data.pkl") else data)


@pytest.mark.parametrize("location", ["cuda:0", "cuda", "cuda:7", "mps", "xpu:1"])
def test_storages_of_other_devices_are_read(location: str, tmp_path: Path) -> None:
    tensors = random_tensors(3)
    torch.save(tensors, tmp_path / "a.pt")

    def change(pickle: bytes) -> bytes:
        data = location.encode()
        assert b"X\3\0\0\0cpu" in pickle
        return pickle.replace(b"X\3\0\0\0cpu", b"X" + len(data).to_bytes(4, "little") + data)

    rewritten(tmp_path / "a.pt", change)
    assert_equal(formats.read(tmp_path / "a.pt").arrays, tensors)


MODULES = [
    lambda: torch.nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2),
    lambda: torch.nn.GRU(3, 4).half(),
    lambda: torch.nn.TransformerEncoderLayer(8, 2).bfloat16(),
    lambda: torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3), torch.nn.BatchNorm1d(3), torch.nn.Embedding(5, 3)),
]


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.filterwarnings("ignore")
def test_state_dicts_of_modules_in_checkpoints_of_a_training(make: Any, tmp_path: Path) -> None:
    module = make()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    content = {
        "model_state_dict": module.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
        "epoch": 3,
    }
    torch.save(content, tmp_path / "a.pt")
    contents = formats.read(tmp_path / "a.pt")
    assert contents.description["key"] == "model_state_dict" and contents.description["beside"]["epoch"] == 3
    assert_equal(contents.arrays, module.state_dict())
    whole = pytorch.read(tmp_path / "a.pt", key="")
    name = "optimizer_state_dict.state.0.exp_avg"
    expected = optimizer.state_dict()["state"][0]["exp_avg"].float().numpy()
    assert np.array_equal(whole.arrays[name], expected)


def test_attributes_of_tensors_and_buffers_do_not_hinder(tmp_path: Path) -> None:
    tensor = torch.ones(2)
    tensor.note = "mine"
    torch.save({"a": tensor, "b": torch.nn.Buffer(torch.zeros(3))}, tmp_path / "a.pt")
    arrays = formats.read(tmp_path / "a.pt").arrays
    assert arrays["a"].tolist() == [1, 1] and arrays["b"].tolist() == [0, 0, 0]


class Subclass(torch.Tensor):
    """A tensor of a class that nobody knows."""


@pytest.mark.filterwarnings("ignore")
def test_kinds_of_tensors_that_are_not_read_are_named_all_at_once(tmp_path: Path) -> None:
    content = {
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
        "sparse": torch.ones(2).to_sparse(),
        "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
        "meta": torch.ones(2, device="meta"),
        "own": torch.ones(2).as_subclass(Subclass),
        "good": torch.ones(2),
    }
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt: a/data.pkl: tensors of types that are not supported") as raised:
        formats.read(tmp_path / "a.pt")
    text = str(raised.value)
    assert all(f"'{name} (" in text for name in content if name != "good") and "'good" not in text


@pytest.mark.filterwarnings("ignore")
def test_what_is_refused_says_how_to_save_it_anew(tmp_path: Path) -> None:
    module = torch.nn.LSTM(2, 3)
    torch.save(module.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(module, tmp_path / "module.pt")
    torch.jit.script(torch.nn.Linear(2, 3)).save(str(tmp_path / "script.pt"))
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    for name, words in (
        ("old.pt", r"before 1.6.*torch.save\(torch.load\(path, map_location='cpu'\), new_path\)"),
        ("module.pt", r"whole object.*torch.nn.modules.rnn.LSTM.*torch.save\(model.state_dict\(\), new_path\)"),
        ("script.pt", r"TorchScript.*torch.save\(torch.jit.load\(path\).state_dict\(\), new_path\)"),
        ("tensor.pt", r"no dict of tensors, but a tensor of float32"),
    ):
        with pytest.raises(ValueError, match=words):
            formats.read(tmp_path / name)
