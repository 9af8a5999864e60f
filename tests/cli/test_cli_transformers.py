"""`fastseq bench --kind attention`, `encoder`, `train`: every engine computes the same; what is counted is right."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import fastseq as fs
from fastseq.bench import cases, engines, report, runner, worker
from fastseq.bench.cases import attention, encoder, language, minilm
from fastseq.bench.cases.attention import Attention
from fastseq.bench.cases.encoder import Encoder
from fastseq.bench.cases.language import Step
from fastseq.bench.engines import own
from fastseq.cli import bench, main, plot, table

SMALL = minilm.Architecture(layers=2, width=32, heads=4, inner=48, vocabulary=50, positions=16)
STEP = Step(2, 16, 2, 3, 5)
CASES = [
    Attention(2, 3, 7, 8),
    Attention(2, 3, 7, 8, causal=True),
    Attention(2, 3, 7, 8, causal=True, train=True),
    Encoder(2, 7, architecture=SMALL),
    Encoder(5, 11, shortest=2, architecture=SMALL),
    STEP,
]
QUICK = ("--rounds", "1", "--threads", "1", "--vs", "reference")


@pytest.fixture(scope="module")
def expected():
    """What the reference gives in float64, by case."""
    built = {case: engines.build("exact", case, 1) for case in CASES}
    return {case: model.outputs(model.call()) for case, model in built.items()}


@pytest.mark.parametrize("engine", ["fastseq", *dict.fromkeys(engine for case in CASES for engine in case.engines)])
def test_engines_compute_the_same(engine, expected):
    missing = engines.missing(engine) if engine in engines.NEEDS else []
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")
    process = worker.Worker(engine, 1)
    try:
        for case in CASES:
            if engine in ("fastseq", *case.engines):
                assert cases.largest_error(process.check(case), expected[case]) < 1e-5, case.name
    finally:
        process.close()


def test_cases_are_measured_in_engines_that_can_compute_them():
    assert all(set(case.usual) <= set(case.engines) for case in CASES)


def test_gradients_follow_the_outputs(expected):
    out, *gradients = expected[CASES[2]]
    assert CASES[2].outputs == 1 and len(gradients) == 3
    assert all(gradient.shape == out.shape == (2, 3, 7, 8) for gradient in gradients)


def test_only_real_tokens_are_compared(expected):
    full, mixed = CASES[3:5]
    assert expected[full][0].shape == (2 * 7, 32)
    assert expected[mixed][0].shape == (mixed.lengths.sum(), 32)
    assert mixed.lengths.max() == 11 and 2 <= mixed.lengths.min() < 11


def test_lengths_matter(expected):
    # An engine that does not mask its padding would be seen.
    mixed = CASES[4]
    y = own.encoder_model(fs.reference, "float64", mixed)(mixed.ids())
    assert cases.largest_error((y[mixed.real],), expected[mixed]) > 10 * runner.PEER_TOLERANCE


def test_a_step_gives_loss_norm_gradients_and_parameters(expected):
    loss, norm, *rest = expected[STEP]
    weights = language.numbers(STEP).weights
    assert loss > 1 and norm > language.MAX_NORM
    assert [array.shape for array in rest] == 2 * [array.shape for array in weights.values()]
    gradients, parameters = rest[: len(weights)], rest[len(weights) :]
    assert np.sqrt(sum(np.sum(gradient**2) for gradient in gradients)) == pytest.approx(language.MAX_NORM, rel=1e-4)
    assert all(np.any(now != before) for now, before in zip(parameters, weights.values(), strict=True))


def test_bench_attention(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert main(["bench", "--kind", "attention", "--shape", "1,2,5,4", *QUICK, "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "B×heads×T×D" in said
    names = ["full 1×2×5×4", "causal 1×2×5×4", "causal train 1×2×5×4"]
    for name in names:
        assert len(re.findall(rf"^{name} +fastseq  .*%$", said, re.M)) == 1
    assert re.search(r"geometric mean: full \S+, causal \S+, causal train \S+\)", said)
    told = json.loads(path.read_text())["cases"]
    assert [case["name"] for case in told] == names
    # Two products forward, four on the way back; of 25 pairs 15 are causal.
    assert [case["flops"] for case in told] == [2 * 2 * 4 * n for n in (2 * 25, 2 * 15, 6 * 15)]
    assert all(case["kind"] == "attention" and case["engines"]["fastseq"]["error"] < 1e-5 for case in told)


def test_bench_encoder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(minilm, "real_weights", lambda: None)
    monkeypatch.setattr(encoder, "MINILM", SMALL)
    path = tmp_path / "result.json"
    assert main(["bench", "--kind", "encoder", "--shape", "2,5", *QUICK, "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "encoder: 2 layers, width 32, 4 heads, 48 within, random weights" in said
    (case,) = json.loads(path.read_text())["cases"]
    assert (case["name"], case["tokens"], case["real_weights"]) == ("encoder 2×5", 10, False)
    assert case["flops"] == 10 * 2 * 2 * (4 * 32 * 32 + 2 * 32 * 48) + 2 * 2 * 2 * 2 * 5 * 5 * 32
    assert case["weight_bytes_read"] == 4 * 2 * (4 * 32 * 32 + 2 * 32 * 48)


def test_bench_train(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert main(["bench", "--kind", "train", "--shape", "1,8,2,2,3", *QUICK, "--json", str(path)]) == 0
    (case,) = json.loads(path.read_text())["cases"]
    assert (case["name"], case["kind"], case["train"]) == ("step 1×8×2, 2×3", "train", True)
    forward = 2 * 2 * 3 * (12 * 8 * 8 + 96 * 8) + 2 * 2 * 2 * 6 * 8
    assert case["flops"] == 3 * forward
    assert case["weight_bytes_read"] == 2 * 4 * (12 * 8 * 8 + 96 * 8)


def test_what_is_measured_by_default():
    usual = {kind: bench.chosen_cases(kind, [], None) for kind in bench.MODELS}
    assert [len(usual[kind]) for kind in ("attention", "encoder", "train")] == [12, 7, 2]
    assert [case.shortest for case in usual["encoder"]] == [None] * 6 + [8]
    assert usual["encoder"][-1].lengths.shape == (32,)
    assert usual["train"] == [Step(4, 128, 4, 12, 64), Step(6, 384, 6, 8, 256)]
    for kind in usual:
        named = {case.name for case in usual[kind]}
        assert len(named) == len(usual[kind]) and max(map(len, named)) <= table.TITLE
        assert not any("reference" in case.usual for case in usual[kind]) or kind == "attention"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["attention", "--train"], "--train is for recurrent layers"),
        (["encoder", "--shapes", "few"], "--shapes is for recurrent layers"),
        (["attention", "--shape", "1,2,3"], "B,heads,T,D, not '1,2,3'"),
        (["encoder", "--shape", "1,513"], "T up to 512, not 513"),
        (["encoder", "--shape", "1,2,3"], "B,T, not '1,2,3'"),
        (["train", "--shape", "1,9,2,1,1"], "divides the width 9, not 2"),
        (["attention", "--shape", "9,9,999999,9"], "of memory"),
        (["attention", "--vs", "ctranslate2"], "some of reference, torch, onnxruntime, openvino, which"),
        (["train", "--vs", "onnxruntime"], "some of reference, torch, which"),
    ],
)
def test_bench_refuses_before_it_measures(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    status = main(["bench", "--kind", *arguments])
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    assert said.err.count("\n") == 1 and message in said.err


def test_the_limit_is_to_multiply_or_to_read():
    few, many = Encoder(1, 2, architecture=SMALL), Encoder(8, 16, architecture=SMALL)
    assert few.floor(1e12, 1e6) == pytest.approx(few.bytes_read / 1e6)
    assert many.floor(1e6, 1e12) == pytest.approx(many.flops / 1e6)
    assert few.bytes_read == many.bytes_read == few.working_set
    assert STEP.bytes_read == 2 * STEP.working_set


def test_weights_are_of_their_shapes():
    source = minilm.real_weights()
    if source is None:
        pytest.skip(f"{minilm.PACKAGE} is not installed")
    weights = minilm.weights(minilm.MINILM, source)
    assert {name: array.shape for name, array in weights.items()} == minilm.shapes(minilm.MINILM)
    assert all(array.dtype == np.float32 for array in weights.values())


def test_random_weights_are_the_same_in_every_process():
    one, other = minilm.weights(SMALL, None), minilm.weights(SMALL, None)
    assert {name: array.shape for name, array in one.items()} == minilm.shapes(SMALL)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def _report(rows):
    about = {
        "fastseq": "0",
        "instruction_set": "avx2",
        "threads": 1,
        "rounds": 1,
        "processor": None,
        "dtype": "float32",
    }
    about |= {"versions": {}, "notes": ["a note"], "vs": ["torch", "openvino"]}
    return report.Report(about, {1: 1e9}, {1024: 1e9}, rows)


def _row(case, **seconds):
    row = report.Row(case, dict.fromkeys(seconds, 0.0), {}, {engine: [s] for engine, s in seconds.items()})
    row.multiply_adds, row.read, row.floors = [1.0], [1.0], [1.0]
    return row


def test_engines_that_cannot_compute_a_case_are_not_in_its_rows():
    rows = [_row(CASES[0], fastseq=1.0, torch=2.0, openvino=8.0), _row(CASES[2], fastseq=1.0, torch=2.0)]
    said = table.table(_report(rows))
    assert "a note" in said
    assert said.count("openvino") == 3  # in a row, and twice below the table
    assert (
        "the fastest of them takes 2.00 times as long as fastseq (geometric mean: full 2.00, causal train 2.00)" in said
    )
    told = json.loads(report.as_json(_report(rows)))["cases"]
    assert [set(case["engines"]) for case in told] == [{"fastseq", "torch", "openvino"}, {"fastseq", "torch"}]


def test_rows_are_drawn():
    if not plot.importlib.util.find_spec("matplotlib"):
        pytest.skip("matplotlib is not installed")
    rows = [_row(case, fastseq=1e-3, torch=2e-3) for case in (*CASES[:3], attention.Attention(1, 1, 2, 2))]
    assert plot.roofline(_report(rows), "svg").count(b"causal train") >= 1
    assert set(engines.NEEDS) < set(plot.STYLES)


@pytest.mark.parametrize("cases", [CASES[:1], CASES[:3]], ids=["one panel", "several"])
def test_the_whole_title_and_every_name_are_in_the_picture(cases, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed: take the extra 'plot'")
    drawn = []
    draw = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), draw(self, *a, **k)))
    shown = _report([_row(case, **dict.fromkeys(plot.STYLES, 1e-3)) for case in cases])
    shown.about |= {"vs": [name for name in plot.STYLES if name != "fastseq"]}
    shown.about |= {"processor": "AMD EPYC 7571 32-Core Processor of a long name", "instruction_set": "avx512"}
    plot.roofline(shown, "png")
    (figure,) = drawn
    for artist in [figure._suptitle, *figure.legends]:
        box = artist.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert shown.about["processor"] in figure.get_suptitle().replace("\n", " ")


def test_what_an_engine_writes_goes_with_its_process():
    process = worker.Worker("reference", 1)
    try:
        environment = Path(f"/proc/{process.pid}/environ").read_text().split("\0")
        (folder,) = (Path(line.removeprefix("TMPDIR=")) for line in environment if line.startswith("TMPDIR="))
        assert folder.is_dir()
    finally:
        process.close()
    assert not folder.exists()
