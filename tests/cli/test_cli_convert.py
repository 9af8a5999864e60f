"""`fastseq convert`: the twin that it writes is that of the library, and what it refuses leaves no file."""

import re

import numpy as np
import pytest
from safetensors import safe_open

import fastseq as fs
from fastseq.cli import main


@pytest.fixture
def saved(tmp_path):
    """A language model in a file with metadata of others, as that of the demo has."""
    path = tmp_path / "model.safetensors"
    fs.models.TransformerLM(20, 32, 4, 2, context=16, seed=1).save(path)
    path.write_bytes(fs.io.with_metadata(path.read_bytes(), {"letters": '["a", "b"]'}))
    return path


def _refused(arguments, capsys):
    assert main(["convert", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("fastseq convert: error: ")
    return said.err


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_the_twin_is_that_of_the_library(weights, saved, tmp_path, capsys):
    target = tmp_path / "twin.safetensors"
    assert main(["convert", str(saved), str(target), "--weights", weights]) == 0
    source, model = fs.load(saved), fs.load(target)
    assert (source.weights, model.weights) == ("float32", weights)
    ids = np.arange(10)
    np.testing.assert_array_equal(model(ids), source.with_weights(weights)(ids))
    with safe_open(target, framework="numpy") as file:
        assert file.metadata()["letters"] == '["a", "b"]'
    before, after = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{re.escape(str(saved))}: \S+ KB", before)
    share = round(100 * target.stat().st_size / saved.stat().st_size)
    assert re.fullmatch(rf"{re.escape(str(target))}: \S+ KB, {share}%, {weights} weights", after) and share < 70


def test_what_is_kept_stays_float32(saved, tmp_path):
    target = tmp_path / "twin.safetensors"
    keep = ["--keep", "embedding.weight", "--keep", "*linear1*"]
    assert main(["convert", str(saved), str(target), "--weights", "int8", *keep]) == 0
    source, twin = fs.load(saved).parameters, fs.load(target).parameters
    kept = [name for name in source if np.array_equal(source[name], twin[name]) and source[name].ndim == 2]
    assert kept == [
        "embedding.weight",
        *(name for name in source if name == "positions.weight" or "linear1.weight" in name),
    ]


def test_a_file_of_that_name_is_replaced(saved, tmp_path):
    target = tmp_path / "twin.safetensors"
    target.write_bytes(b"old")
    assert main(["convert", str(saved), str(target), "--weights", "int8"]) == 0
    assert fs.load(target).weights == "int8"


def test_the_source_is_not_replaced(saved, tmp_path, capsys):
    before = saved.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(saved)
    for target in (saved, link):
        assert "another file than IN" in _refused([saved, target, "--weights", "int8"], capsys)
    assert saved.read_bytes() == before


def test_what_is_refused_leaves_no_file(saved, tmp_path, capsys):
    target, twin, state, double = (tmp_path / name for name in ("out", "twin", "state", "double"))
    fs.load(saved, weights="int8").save(twin)
    fs.State(np.zeros((1, 1, 3), np.float32)).save(state)
    fs.GRU(3, 4, dtype="float64").save(double)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(saved.read_bytes()[:-1])
    for source, more, message in (
        (tmp_path / "none", [], "No such file"),
        (damaged, [], "damaged"),
        (state, [], "holds a State, which has no weights"),
        (double, [], "float32"),
        (twin, [], "with_weights"),
        (saved, ["--keep", "nothing*"], "'nothing*' fits none"),
    ):
        assert message in _refused([source, target, "--weights", "bfloat16", *more], capsys)
        assert not target.exists()
    assert "directory" in _refused([saved, tmp_path, "--weights", "int8"], capsys)
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(saved), str(target)])
    assert ended.value.code == 2 and "--weights" in capsys.readouterr().err
