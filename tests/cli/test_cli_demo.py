"""The demo that comes with the package: what it says, what it draws, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from common import ROOT, run_python
from safetensors import safe_open

import fastseq as fs
from fastseq import cli
from fastseq.cli import demo

LETTERS = "'abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One call is time enough."""
    monkeypatch.setattr(demo, "SECONDS", 1e-9)
    monkeypatch.setattr(demo, "seconds_of", lambda call: (call(), 1.0)[1])
    fs.set_num_threads(1)


def tiny(path, kind):
    """A model that was hardly trained, in the form of the one that ships."""
    phonemes = ["AH", "B", "K", "T"]
    model = (
        fs.models.TransformerSeq2Seq(27, 4, 8, 2, 1, 2, max_length=64, seed=3)
        if kind == "transformer"
        else fs.models.Seq2Seq(27, 4, 6, 8, attention="multiplicative", seed=3)
    )
    words = [[2, 1], [3, 1, 20], [1, 2, 3], [11]]
    rate = fs.training.Adam(model, 0.02)
    model.fit(words, [[1, 0], [2, 0, 3], [0, 1, 2], [2]], epochs=60, optimiser=rate, progress=False)
    model.save(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name).astype(np.float16) for name in file.keys()}  # noqa: SIM118
    more = {"letters": json.dumps([*LETTERS]), "phonemes": json.dumps(phonemes)}
    path.write_bytes(fs.io.to_bytes(arrays, metadata | more))


@pytest.mark.parametrize("kind", ["transformer", "gru"])
def test_words_are_pronounced(kind, tmp_path, monkeypatch, capsys):
    tiny(tmp_path / "model", kind)
    monkeypatch.setattr(demo, "MODEL", tmp_path / "model")
    assert cli.main(["demo", "Ba", "cat"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == demo.MAP and any(line.startswith("cat:") for line in lines)
    assert out.count("fastseq 1.00 s · the same model in NumPy 1.00 s (1.0× slower) · same answer") == 2
    assert "b a" in out and "c a t" in out


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (1.6e-3, 55e-3, "fastseq 1.60 ms · the same model in NumPy 55.0 ms (34× slower)"),
        (0.002, 0.003, "fastseq 2.00 ms · the same model in NumPy 3.00 ms (1.5× slower)"),
        (0.124, 0.055, "fastseq 124 ms · the same model in NumPy 55.0 ms (2.3× faster)"),
    ],
)
def test_times_are_compared_in_words(ours, theirs, said):
    assert demo.comparison(ours, theirs) == said


def test_a_word_is_timed_more_than_once(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(demo, "SECONDS", 0.0)
    durations, clock = iter([9.0, 2.0, 5.0]), [0.0]
    monkeypatch.setattr(demo.time, "perf_counter", lambda: clock[0])
    assert demo.seconds_of(lambda: clock.__setitem__(0, clock[0] + next(durations))) == 2
    assert next(durations, None) is None


def test_the_map_shows_where_weights_are():
    weights = np.array([[1.0, 0.0, 0.0], [0.0, 0.45, 0.55], [0.2, 0.4, 0.4]])
    lines = demo.block_map(demo.Said("abc", ("AE", "B", "K"), weights))
    assert lines == ["    a b c", "AE  █", "B     ▒ ▒", "K   ░ ▒ ▒"]


def test_weights_are_those_of_the_phonemes(tmp_path):
    tiny(tmp_path / "model", "transformer")
    pronouncer = demo.Pronouncer(tmp_path / "model", fs)
    weights = pronouncer.attention("cab", ["K", "AH"])
    assert weights.shape == (2, 3)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["h3llo"], "'h3llo'"), ([""], "''"), (["two words"], "'two words'"), (["naïve"], "'naïve'"), (["a" * 99], "99")],
)
def test_bad_words(words, message, tmp_path, monkeypatch, capsys):
    tiny(tmp_path / "model", "transformer")
    monkeypatch.setattr(demo, "MODEL", tmp_path / "model")
    assert cli.main(["demo", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "WORDS" in captured.err and not captured.out


def test_engines_that_differ_are_a_failure(tmp_path, monkeypatch, capsys):
    tiny(tmp_path / "model", "transformer")
    monkeypatch.setattr(demo, "MODEL", tmp_path / "model")
    say = demo.Pronouncer.say

    def wrong(self, word):
        said = say(self, word)
        return said if type(self.model) is fs.models.TransformerSeq2Seq else (*said, "T")

    monkeypatch.setattr(demo.Pronouncer, "say", wrong)
    assert cli.main(["demo", "cab"]) == 1
    assert "ANOTHER ANSWER" in capsys.readouterr().out


def test_plot(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: take the extra 'plot'")
    tiny(tmp_path / "model", "transformer")
    monkeypatch.setattr(demo, "MODEL", tmp_path / "model")
    assert cli.main(["demo", "cab", "--plot", str(tmp_path / "map.png")]) == 0
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["demo", "cab", "--plot", str(tmp_path / "none" / "map.png")]) == 2
    assert "--plot" in capsys.readouterr().err


class TestWhatShips:
    """The file in the package."""

    def test_it_is_small_and_says_what_it_is(self):
        assert demo.MODEL.stat().st_size < 3_000_000
        pronouncer = demo.Pronouncer(demo.MODEL, fs)
        assert pronouncer.letters == [*LETTERS] and len(pronouncer.phonemes) == 39
        errors = json.loads(pronouncer.metadata["errors"])
        assert errors["words"] == 12_000 and 0 < errors["5 beams"]["word_error"] < 0.25

    def test_it_pronounces(self):
        pronouncer, reference = (demo.Pronouncer(demo.MODEL, engine) for engine in (fs, fs.reference))
        for word, phonemes in {"cat": "K AE T", "station": "S T EY SH AH N", "phone": "F OW N"}.items():
            assert " ".join(pronouncer.say(word)) == phonemes
            assert reference.say(word) == pronouncer.say(word)

    def test_it_is_part_of_the_package(self):
        assert "data/*.safetensors" in Path(ROOT, "pyproject.toml").read_text()

    def test_the_command(self):
        out = run_python("from fastseq.cli import main; raise SystemExit(main(['demo', 'cat']))").stdout
        assert "\ncat: K AE T\n" in out and "slower) · same answer\n" in out and "1,3" in out.splitlines()[-2]
