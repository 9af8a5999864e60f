"""bench/accuracy.py measures what narrow weights cost, and writes the table of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from common import ROOT

sys.path.append(str(ROOT / "bench"))

import accuracy


def test_a_task_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "accuracy.json"
    command = ["--task", "lstm", "--steps", "2", "--count", "200", "--models", str(tmp_path), "--json", str(file)]
    assert accuracy.main(command) == 0
    assert (tmp_path / "lstm-2.safetensors").exists()
    out = capsys.readouterr().out
    run = json.loads(file.read_text())
    assert out == accuracy.table(run) + "\n"
    (measure,) = run["tasks"]["lstm"]["measures"]
    bits = measure["values"]
    assert list(bits) == ["float32", "bfloat16", "int8"]
    assert len(set(bits.values())) == 3  # a twin that were float32 would give the same bits
    assert all(0 < abs(bits[name] / bits["float32"] - 1) < 0.01 for name in accuracy.NARROW)
    assert accuracy.main([*command, "--keep", "*"]) == 0
    (kept,) = json.loads(file.read_text())["tasks"]["lstm"]["measures"]
    assert set(kept["values"].values()) == {bits["float32"]}


def test_a_missed_limit_is_named() -> None:
    values = {"float32": 20.0, "bfloat16": 20.1, "int8": 20.31}
    limits = {"bfloat16": 0.1, "int8": 0.3}
    difference = accuracy.Measure("words", "%", 2, values, limits=limits)
    assert difference.within("bfloat16") and not difference.within("int8")
    row = accuracy._row(difference)
    assert row == "| words | 20.00 % | 20.10 % (+0.10) | 20.31 % (+0.31), **missed** | at most +0.1 and +0.3 |"
    cosine = accuracy.Measure("cosine", "", 3, {"bfloat16": 0.999, "int8": 0.9}, "value", {"bfloat16": 1, "int8": 0.9})
    assert not cosine.within("bfloat16") and cosine.within("int8")
    assert accuracy.Measure("bits", "", 4, values, "percent").cost("bfloat16") == pytest.approx(0.5)
    assert accuracy.Measure("MB", "MB", 0, values, "ratio").cost("int8") == pytest.approx(1.0155)


def test_a_task_without_its_package_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert accuracy.main(["--task", "g2p-en", "--task", "pronounce", "--task", "sentences"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("left out: this example needs the package") == 3


@pytest.mark.parametrize("wrong", [["--count", "0"], ["--steps", "0"], ["--beams", "0"], ["--task", "nothing"]])
def test_useless_options_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        accuracy.main(wrong)
    assert stop.value.code == 2
