"""`fastseq inspect`: what it prints and writes is what the file holds; what is refused is one line."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import fastseq as fs
from fastseq.cli import main


def refused(arguments, capsys):
    assert main(["inspect", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("fastseq inspect: error: ")
    return said.err


def test_tensors_types_and_bytes_are_listed(tmp_path, capsys):
    path = tmp_path / "a"
    save_file({"w": np.zeros((2, 3), "f2"), "n": np.array(3), "b": np.array([True])}, path, {"made by": "me"})
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: safetensors" and lines[1] == "3 tensors, 8 numbers, 21 bytes"
    assert sorted(line.split() for line in lines[2:5]) == [
        ["b", "1", "bool", "1", "bytes"],
        ["n", "one", "number", "int64", "8", "bytes"],
        ["w", "2", "×", "3", "float16", "12", "bytes"],
    ]
    assert lines[5:] == ["metadata.made by: me"]


def test_json_has_everything(tmp_path, capsys):
    fs.Linear(2, 3, seed=0).save(tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a"), "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["file"] == str(tmp_path / "a") and found["format"] == "fastseq"
    assert found["tensors"]["weight"] == {"type": "float32", "shape": [3, 2], "bytes": 24}
    assert found["description"]["metadata"]["fastseq.class"] == "Linear"
    assert "a file of fastseq" in capsys.readouterr().out


def test_an_empty_file_of_arrays_is_listed(tmp_path, capsys):
    np.savez(tmp_path / "a.npz")
    assert main(["inspect", str(tmp_path / "a.npz")]) == 0
    assert "0 tensors, 0 numbers, 0 bytes" in capsys.readouterr().out


def test_what_a_terminal_would_obey_is_not_printed(tmp_path, capsys):
    name = "\x1b]0;title\x07\n"
    np.savez(tmp_path / "a.npz", **{name: np.zeros(2)})
    assert main(["inspect", str(tmp_path / "a.npz")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b]0;title" in out and out.count("\n") == 3


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    (tmp_path / "a").write_text("hello\nworld")
    assert "is none of" in refused([tmp_path / "a"], capsys)
    assert "No such file" in refused([tmp_path / "b"], capsys)
    assert "config.json: is missing" in refused([tmp_path], capsys)
    np.savez(tmp_path / "c.npz", a=np.zeros(2))
    assert "--key is for checkpoints of PyTorch" in refused([tmp_path / "c.npz", "--key", "model"], capsys)
    assert "--json" in refused([tmp_path / "c.npz", "--json", tmp_path], capsys)
    deep = tmp_path / "deep"
    deep.mkdir()
    save_file({"a": np.zeros(2)}, deep / "model.safetensors")
    (deep / "config.json").write_text('{"a":' * 900 + "1" + "}" * 900)
    assert main(["inspect", str(deep)]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_file_is_asked_for(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["inspect"])
    assert ended.value.code == 2 and "FILE" in capsys.readouterr().err
