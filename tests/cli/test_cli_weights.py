"""`fastseq bench --weights`: errors stand beside times, nonsense is refused, and without it nothing has changed."""

import dataclasses
import json
import re

import numpy as np
import pytest

from fastseq.bench import cases, engines, report, runner, worker
from fastseq.bench.cases import encoder, minilm
from fastseq.bench.cases.decode import Decode, Transformer
from fastseq.bench.cases.encoder import Encoder
from fastseq.bench.cases.generate import Beams, Sample
from fastseq.bench.cases.recurrent import KINDS, Recurrent
from fastseq.bench.engines import NotNarrow
from fastseq.cli import bench, main, table
from fastseq.narrow import TYPES

SMALL = minilm.Architecture(layers=2, width=32, heads=4, inner=48, vocabulary=50, positions=16)
TINY = Transformer(2, 32, 2, 11, 40)
NUMBERS = [
    *(Recurrent(kind, 2, 5, 24, 32) for kind in KINDS),
    Recurrent("lstm", 1, 1, 24, 32, step=True),
    Encoder(2, 7, architecture=SMALL),
    Encoder(5, 11, shortest=2, architecture=SMALL),
    Beams(TINY, 2, 5, 6),
]
SYMBOLS = [Decode(TINY, 3, 5, 20), Sample(2, 24, 13, 2, 30)]
CASES = NUMBERS + SYMBOLS
NARROW = TYPES[1:]
# The kinds that the tools of an engine for int8 leave in float32.
UNQUANTISED = {
    ("onnxruntime", NUMBERS[KINDS.index("gru")]),
    ("onnxruntime", NUMBERS[KINDS.index("rnn")]),
    ("torch", NUMBERS[KINDS.index("rnn")]),
}
QUICK = ("--rounds", "1", "--threads", "1")


@pytest.fixture(scope="module")
def exact():
    """What the reference gives in float64, by case: the model and its outputs."""
    built = {case: engines.build("exact", case, 1) for case in CASES}
    return {case: (model, model.outputs(model.call())) for case, model in built.items()}


ENGINES = "fastseq", "reference", "torch", "onnxruntime", "openvino", "ctranslate2"


@pytest.mark.parametrize(
    ("engine", "weights"),
    [
        (engine, weights)
        for engine in ENGINES
        for weights in NARROW
        if any(case.computed_by(cases.named(engine, weights)) for case in CASES)
    ],
)
def test_engines_are_about_right(engine, weights, exact):
    name = cases.named(engine, weights)
    able = [case for case in CASES if case.computed_by(name)]
    missing = bench.lacking(engine, able) if engine in engines.NEEDS else []
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")
    process = worker.Worker(name, 1)
    try:
        for case in able:
            expected = exact[case][1]
            left = weights == "int8" and (engine, case) in UNQUANTISED
            try:
                outputs = process.check(case)
            except NotNarrow as reason:
                assert re.fullmatch(r"not quantised|no \w+ on this machine", str(reason))
                assert left or engine in ("openvino", "ctranslate2")
                continue
            assert not left
            if case in SYMBOLS:
                agreed = np.mean(exact[case][0].margins(outputs[0]) > 0)
                assert agreed >= runner.LEAST_AGREED[weights], case.name
            else:
                verdict = case.compare(name, outputs, expected, runner.NARROW_TOLERANCE[weights])
                # What was computed in float32 would be nearer.
                assert verdict.fault is None and verdict.error > 1e-5, case.name
    finally:
        process.close()


def test_the_same_symbols_have_margins_above_zero(exact):
    for case in SYMBOLS:
        model, (ids, margins) = exact[case]
        np.testing.assert_array_equal(model.margins(ids), margins)
        assert margins.min() > 0
        assert np.mean(model.margins((ids + 1) % 7) > 0) < min(runner.LEAST_AGREED.values())


@pytest.mark.parametrize("weights", NARROW)
def test_bench_recurrent(weights, tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = ["--kind", "lstm", "--shape", "2,3,24,32", "--vs", "reference", *QUICK, "--json", str(path)]
    assert main(["bench", "--weights", f"float32,{weights}", *arguments]) == 0
    said = capsys.readouterr().out
    assert f"1 thread, float32 and {weights}, 1 round" in said
    assert "error against float64: the largest difference of outputs\n" in said
    assert f"\nfastseq {weights} takes " in said and "largest error against float64: fastseq " in said
    assert re.search(r"beside reference \S+\n", said)  # once
    result = json.loads(path.read_text())
    assert result["weights"] == ["float32", weights] and result["vs"] == ["reference", f"reference {weights}"]
    (case,) = result["cases"]
    ours, twin = case["engines"]["fastseq"], case["engines"][f"fastseq {weights}"]
    assert (ours["weights"], twin["weights"]) == ("float32", weights)
    assert 0 < ours["largest_difference"] < 1e-5 < twin["largest_difference"] < 0.05
    assert twin["ratio"] == pytest.approx(twin["seconds"][0] / ours["seconds"][0])
    assert ours["share_of_limit"] > 0 and twin["share_of_limit"] is None
    row = rf"^ +fastseq {weights} +\S+ .s +\S+ +{twin['largest_difference']:.1e} +\S+  \S+ to \S+$"
    assert len(re.findall(row, said, re.M)) == 1
    reference = case["engines"][f"reference {weights}"]["largest_difference"]
    assert reference == pytest.approx(twin["largest_difference"], rel=0.1)


def test_bench_without_float32(tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = ["--kind", "gru", "--shape", "1,2,24,32", "--vs", "reference", *QUICK, "--json", str(path)]
    assert main(["bench", "--weights", "int8", *arguments]) == 0
    said = capsys.readouterr().out
    assert "over fastseq int8" in said and "reference int8 takes " in said and " as long as fastseq int8 " in said
    (case,) = json.loads(path.read_text())["cases"]
    assert set(case["engines"]) == {"fastseq int8", "reference int8"}
    assert case["engines"]["fastseq int8"]["ratio"] == 1


def test_bench_encoder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(minilm, "real_weights", lambda: None)
    monkeypatch.setattr(encoder, "MINILM", SMALL)
    path = tmp_path / "result.json"
    arguments = ["--kind", "encoder", "--shape", "2,5", "--vs", "reference", *QUICK, "--json", str(path)]
    assert main(["bench", "--weights", "bfloat16,int8", *arguments]) == 0
    assert "the largest difference of outputs, over the largest magnitude" in capsys.readouterr().out
    (case,) = json.loads(path.read_text())["cases"]
    errors = [case["engines"][f"fastseq {weights}"]["error"] for weights in NARROW]
    assert 1e-4 < errors[0] < errors[1] < 0.2
    assert "largest_difference" not in case["engines"]["fastseq int8"]


def test_bench_decode(tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = ["--kind", "decode", "--shape", "1,32,2,11,160,2", "--vs", "reference", *QUICK, "--json", str(path)]
    assert main(["bench", "--weights", "float32,int8", *arguments]) == 0
    said = capsys.readouterr().out
    assert "the share of symbols that float64 would choose, too, after the same text" in said
    (case,) = json.loads(path.read_text())["cases"]
    ours, twin = case["engines"]["fastseq"], case["engines"]["fastseq int8"]
    assert (ours["share_agreed"], ours["rows_alike"], ours["rows"]) == (1, 2, 2)
    assert runner.LEAST_AGREED["int8"] <= twin["share_agreed"] < 1
    assert f"  {twin['share_agreed']:.1%}  " in said
    # Of those of float32 alone it is said how far they are the same.
    assert re.search(r"as good as equally likely: fastseq \S+ of 256, reference \S+ of 256$", said, re.M)


def test_without_it_the_table_is_as_it_was():
    row = report.Row(Recurrent("lstm", 1, 2, 3, 4), {"fastseq": 1e-7, "onnxruntime": 2e-7})
    row.seconds, row.floors = {"fastseq": [1e-3, 1.1e-3], "onnxruntime": [3e-3, 3.3e-3]}, [1e-4, 1e-4]
    about = {"fastseq": "0", "instruction_set": "avx2", "threads": 2, "rounds": 2, "processor": "some", "notes": ["so"]}
    about |= {"vs": ["onnxruntime"], "versions": {"fastseq": "0", "onnxruntime": "1"}}
    whole = report.Report(about, {2: 2e9}, {1024: 1e9}, [row])
    assert table.table(whole).split("\n") == [
        "fastseq 0, avx2, 2 threads, float32, 2 rounds, some",
        "beside onnxruntime 1",
        "multiply-adds: 2 GFLOP/s on 2 threads",
        "reading: 1 GB/s from 1 KB",
        "so",
        "",
        "B×T×I×H                     engine         median    GFLOP/s  of limit  over fastseq  quartiles",
        "LSTM 1×2×3×4                fastseq       1.05 ms   0.000427       10%",
        "                            onnxruntime   3.15 ms   0.000142        3%          3.00  3.00 to 3.00",
        "",
        "onnxruntime takes 3.00 times as long as fastseq (geometric mean), at least 3.00 (LSTM 1×2×3×4);"
        " fastseq is faster in 1 of 1",
        "largest error against float64: fastseq 1.0e-07, onnxruntime 2.0e-07",
    ]
    told = json.loads(report.as_json(whole))
    assert "weights" not in told
    assert list(told["cases"][0]["engines"]["onnxruntime"]) == [
        *("error", "fault", "seconds", "median", "gflops", "speed"),
        *("share_of_limit", "ratio", "ratio_quartiles"),
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--weights", "int4"], "some of float32, bfloat16, int8, not 'int4'"),
        (["--weights", "int8,"], "not ''"),
        (["--weights", "int8", "--train"], "--weights int8 is for inference with"),
        (["--weights", "bfloat16", "--kind", "attention"], "--weights bfloat16 is for inference with"),
        (["--weights", "int8", "--kind", "train"], "--weights int8 is for inference with"),
        (["--weights", "float32,int8", "--plot", "a.png"], "--plot draws float32, not --weights float32,int8"),
        (["--weights", "int8", "--kind", "generate", "--vs", "greedy"], "--vs greedy has no int8 weights"),
    ],
)
def test_bench_refuses_before_it_measures(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err


def test_engines_with_every_type_they_have():
    lstm, decode = NUMBERS[:1], SYMBOLS[:1]
    peers = bench.with_weights(["reference", "onnxruntime", "openvino"], TYPES, lstm, False)
    assert peers == ["reference", "onnxruntime", "onnxruntime int8", "openvino", "openvino bfloat16"]
    assert bench.with_weights(["reference"], TYPES, lstm, True) == [cases.named("reference", each) for each in TYPES]
    assert bench.with_weights(["ctranslate2", "llamacpp"], NARROW, decode, False) == [
        "ctranslate2 bfloat16",
        "ctranslate2 int8",
    ]
    assert [cases.name_and_weights(name) for name in ("torch", "torch int8")] == [
        ("torch", "float32"),
        ("torch", "int8"),
    ]


class Answers:
    """A worker that gives these outputs, or raises them."""

    def __init__(self, *outputs, margins=None):
        self.outputs = outputs
        self.given = margins

    def check(self, case):
        if isinstance(self.outputs[0], Exception):
            raise self.outputs[0]
        return self.outputs

    def margins(self, case, ids):
        return self.given


def test_nonsense_is_refused_by_bounds_of_its_own():
    def checked(weights, y):
        one = np.ones((1, 1, 1))
        row = report.Row(Recurrent("gru", 1, 1, 1, 1))
        name = cases.named("torch", weights)
        workers = {"fastseq": Answers(one, one[0]), name: Answers(one * y, one[0])}
        runner.check_parity([row], workers, Answers(one, one[0]), lambda doing: None)
        return row.faults.get(name), row.differences.get(name)

    assert checked("float32", 1.01)[0] == "differs from the reference by 1.0e-02 of its largest value"
    assert checked("bfloat16", 1.01) == (None, pytest.approx(0.01))
    assert checked("int8", 0.9) == (None, pytest.approx(0.1))
    assert "1.0e-01" in checked("bfloat16", 0.9)[0] and "3.0e-01" in checked("int8", 1.3)[0]


def test_fastseq_that_is_nonsense_ends_the_benchmark():
    one = np.ones((1, 1, 1))
    rows = [report.Row(NUMBERS[1])]
    workers = {"fastseq": Answers(one, one[0]), "fastseq int8": Answers(one * 2, one[0])}
    with pytest.raises(worker.EngineError, match="fastseq int8: GRU .* differs .* more than 2.0e-01"):
        runner.check_parity(rows, workers, Answers(one, one[0]), lambda doing: None)


def test_symbols_are_refused_where_float64_chooses_others():
    case = Decode(TINY, 1, 5, 4)
    ids = np.array([[1, 2, 3, 4]])
    for agreed, fault in ((1, None), (0, "of its symbols float64 would choose 0% after the same text")):
        margins = np.where(np.arange(4) < agreed, 0.1, -0.1)[None]
        row = report.Row(case)
        workers = {"fastseq": Answers(ids), "torch int8": Answers(ids + 1)}
        runner.check_parity([row], workers, Answers(ids, np.ones((1, 4)), margins=margins), lambda doing: None)
        assert row.agreed == {"fastseq": 1, "torch int8": agreed / 4}
        assert row.alike == {"fastseq": (1, 1), "torch int8": (0, 1)}
        assert row.faults.get("torch int8") == fault


def test_of_many_symbols_fewer_have_to_be_those_of_float64():
    ids = np.array([[1, 2, 3, 4]])
    for symbols, agreed, refused in ((50, 1, True), (5000, 1, False), (5000, 0, True)):
        row = report.Row(Decode(dataclasses.replace(TINY, symbols=symbols), 1, 5, 4))
        margins = np.where(np.arange(4) < agreed, 0.1, -0.1)[None]
        workers = {"fastseq": Answers(ids), "torch bfloat16": Answers(ids + 1)}
        runner.check_parity([row], workers, Answers(ids, np.ones((1, 4)), margins=margins), lambda doing: None)
        assert ("torch bfloat16" in row.faults) == refused, (symbols, agreed)


def test_what_an_engine_leaves_in_float32_is_said_and_not_timed():
    one = np.ones((1, 1, 1))
    row = report.Row(Recurrent("gru", 1, 1, 1, 1))
    workers = {"fastseq": Answers(one, one[0]), "onnxruntime int8": Answers(NotNarrow("not quantised"))}
    runner.check_parity([row], workers, Answers(one, one[0]), lambda doing: None)
    assert not row.faults and not row.has("onnxruntime int8") and row.has("fastseq")
    row.seconds, row.floors = {"fastseq": [1.0]}, [1.0]
    about = {"fastseq": "0", "instruction_set": "avx2", "threads": 1, "rounds": 1, "processor": None, "notes": []}
    about |= {"vs": ["onnxruntime int8"], "weights": ["float32"], "versions": {"fastseq": "0", "onnxruntime int8": "1"}}
    whole = report.Report(about, {1: 1e9}, {1024: 1e9}, [row])
    said = table.table(whole)
    assert re.search(r"onnxruntime int8  not quantised$", said, re.M) and "beside onnxruntime 1\n" in said
    told = json.loads(report.as_json(whole))["cases"][0]["engines"]["onnxruntime int8"]
    assert told["not_narrow"] == "not quantised" and told["fault"] is None and "seconds" not in told


def test_the_best_of_fastseq_is_compared_with_the_fastest_of_all():
    row = report.Row(NUMBERS[0], errors={"fastseq": 1e-7})
    row.seconds = {"fastseq": [4.0], "fastseq int8": [1.0], "torch": [8.0], "torch int8": [2.0]}
    row.floors = [1.0]
    about = {"fastseq": "0", "instruction_set": "avx2", "threads": 1, "rounds": 1, "processor": None, "notes": []}
    about |= {"vs": ["torch", "torch int8"], "weights": ["float32", "int8"], "versions": {}}
    said = table.table(report.Report(about, {1: 1e9}, {1024: 1e9}, [row]))
    assert "fastseq int8 takes 0.25 times as long as fastseq (geometric mean), at most 0.25 (LSTM " in said
    assert "torch int8 takes 0.50 times as long as fastseq (geometric mean), at least 0.50" in said
    assert "the fastest of them takes 0.50 times as long as fastseq " in said
    assert "the fastest of them takes 2.00 times as long as the fastest of fastseq's " in said
