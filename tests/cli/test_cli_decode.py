"""`fastseq bench --kind decode` and `generate`: every engine chooses the same symbols; what is counted is right."""

import json
import re

import numpy as np
import pytest

from fastseq.bench import cases, engines, report, worker
from fastseq.bench.cases import decode, generate
from fastseq.bench.cases.decode import Decode, Transformer
from fastseq.bench.cases.generate import Beams, Sample
from fastseq.bench.engines import own
from fastseq.cli import bench, main, plot, table

TINY = Transformer(2, 16, 2, 11, 40)
DECODE, SAMPLE, BEAMS = Decode(TINY, 3, 5, 20), Sample(2, 24, 13, 2, 30), Beams(TINY, 3, 5, 20)
CASES = [DECODE, SAMPLE, BEAMS]
QUICK = ("--rounds", "1", "--threads", "1", "--vs", "reference")


@pytest.fixture(scope="module")
def expected():
    """What the reference gives in float64, by case."""
    built = {case: engines.build("exact", case, 1) for case in CASES}
    return {case: model.outputs(model.call()) for case, model in built.items()}


@pytest.mark.parametrize("engine", ["fastseq", "reference", "torch", "ctranslate2", "llamacpp", "greedy"])
def test_engines_choose_the_same(engine, expected):
    able = [case for case in CASES if engine in ("fastseq", *case.engines)]
    missing = bench.lacking(engine, able) if engine in engines.NEEDS else []
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")
    process = worker.Worker(engine, 1)
    try:
        for case in able:
            verdict = case.compare(engine, process.check(case), expected[case], 1e-5)
            assert verdict.fault is None, case.name
            assert verdict.symbols[0] == verdict.symbols[1] > 0
    finally:
        process.close()
    assert able


def test_the_text_does_not_collapse():
    ids, margins = engines.build("exact", Decode(Transformer(4, 32, 4, 96, 64), 2, 8, 50), 1), None
    ids, margins = ids.outputs(ids.call())
    assert ids.shape == margins.shape == (2, 50)
    assert all(len(set(row)) > 10 for row in ids) and np.mean(ids[0] == ids[1]) < 0.5
    assert margins.min() > 1e-6


def test_margins_are_those_of_the_full_pass():
    import fastseq as fs

    model = own.language_model(TINY, fs.reference, "float64")
    prompts = decode.random_symbols(11, 2, 4)
    ids = model.generate(prompts, 6, temperature=0)
    found = own.margins(model, prompts, ids)
    for row in range(2):
        for step in range(6):
            logits = model(np.concatenate([prompts[row], ids[row, :step]]))[-1]
            second, first = np.sort(logits)[-2:]
            assert ids[row, step] == logits.argmax()
            assert found[row, step] == pytest.approx((first - second) / np.abs(logits).max(), rel=1e-9)
    # What is not the likeliest has a margin below zero.
    assert own.margins(model, prompts, (ids + 1) % 11).min() < 0


def test_symbols_are_compared_up_to_a_tie():
    wanted = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    margins = np.array([[0.1, 0.2, 1e-6, 0.3], [0.1, 0.1, 0.1, 0.1]])
    same = cases.compare_symbols(wanted, wanted, margins, 1e-4)
    assert (same.fault, same.symbols) == (None, (8, 8))
    tied = np.array([[1, 2, 9, 9], [5, 6, 7, 8]])
    assert cases.compare_symbols(tied, wanted, margins, 1e-4).symbols == (6, 8)
    assert cases.compare_symbols(tied, wanted, margins, 1e-4).fault is None
    wrong = cases.compare_symbols(np.array([[1, 2, 3, 4], [5, 9, 7, 8]]), wanted, margins, 1e-4)
    assert wrong.symbols == (5, 8)
    assert wrong.fault == (
        "chose 9 and not 6 at symbol 1 of row 1, which the reference likes more by 1.0e-01 of its largest logit"
    )
    assert "shape (1, 4)" in cases.compare_symbols(wanted[:1], wanted, margins, 1e-4).fault


def test_llamacpp_alone_may_be_coarse():
    ids, wanted = np.array([[3, 1]]), np.array([[3, 2]])
    margins = np.array([[0.5, 0.01]])
    faults = {engine: DECODE.compare(engine, (ids,), (wanted, margins), 1e-3).fault for engine in DECODE.engines}
    assert [engine for engine, fault in faults.items() if fault is None] == ["llamacpp"]
    margins[0, 1] = 0.03
    assert DECODE.compare("llamacpp", (ids,), (wanted, margins), 1e-3).fault is not None


def test_beams_are_compared_by_how_likely_their_text_is(expected):
    text, log_prob, ids, margins = expected[BEAMS]
    assert text.shape == (1, 20) and log_prob.shape == (1,) and ids.shape == margins.shape == (3, 20)
    other = text.copy()
    other[0, 4] += 1
    as_likely = BEAMS.compare("fastseq", (other, log_prob * (1 + 1e-9)), expected[BEAMS], 1e-5)
    assert (as_likely.fault, as_likely.symbols) == (None, (4, 20))
    worse = BEAMS.compare("fastseq", (other, log_prob * 1.01), expected[BEAMS], 1e-5)
    assert "differs from the reference by 1.0e-02" in worse.fault
    assert BEAMS.compare("fastseq", (text[:, :3], log_prob), expected[BEAMS], 1e-5).fault is not None
    assert BEAMS.compare("greedy", (ids,), expected[BEAMS], 1e-5).symbols == (60, 60)
    assert BEAMS.compare("greedy", (ids + 1,), expected[BEAMS], 1e-5).fault is not None


def test_beams_find_what_is_likelier_than_greedy(expected):
    import fastseq as fs

    model = own.language_model(TINY, fs.reference, "float64")
    (text, log_prob), prompt = expected[BEAMS][:2], None
    prompt = decode.random_symbols(11, 3, 5)[:1]
    greedy = model.generate(prompt, 20, temperature=0)
    before = model.log_prob(prompt)
    found = model.log_prob(np.concatenate([prompt, text], axis=1)) - before
    assert found == pytest.approx(log_prob)
    assert found >= model.log_prob(np.concatenate([prompt, greedy], axis=1)) - before


def test_bench_decode(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert main(["bench", "--kind", "decode", "--shape", "1,8,2,7,160,2", *QUICK, "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "decode 1×8×2: vocabulary 7, context 160, 128 symbols after 32, greedy, random weights" in said
    assert re.search(r"engine +median +symbols/s +of limit", said)
    assert "as equally likely: fastseq 256 of 256, reference 256 of 256" in said
    assert "largest error" not in said
    (case,) = json.loads(path.read_text())["cases"]
    assert (case["name"], case["kind"], case["unit"]) == ("decode 1×8×2, batch 2", "decode", "symbols/s")
    ours = case["engines"]["fastseq"]
    assert (ours["symbols_compared"], ours["symbols"], ours["error"]) == (256, 256, None)
    assert ours["speed"] == pytest.approx(256 / ours["median"])


def test_bench_generate(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "SHAPES", ((1, 8, 7, 2, 9),))
    monkeypatch.setattr(generate, "SEARCHED", Transformer(1, 8, 2, 7, 160))
    path = tmp_path / "result.json"
    assert main(["bench", "--kind", "generate", *QUICK[:4], "--vs", "greedy,reference", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^sample LSTM 1×8, batch 2 +fastseq", said, re.M)
    assert re.search(r"^4 beams 1×8×2 takes \S+ times as long as as many rows that are greedy$", said, re.M)
    assert "greedy takes" not in said and "the fastest" not in said
    sample, beams = json.loads(path.read_text())["cases"]
    assert set(sample["engines"]) == {"fastseq", "reference"}
    assert set(beams["engines"]) == {"fastseq", "greedy", "reference"}
    assert (beams["kind"], beams["batch"], beams["heads"]) == ("beams", 4, 2)
    assert beams["engines"]["fastseq"]["error"] < 1e-5


def test_a_wrong_symbol_ends_the_benchmark(capsys, monkeypatch):
    def build(case, engine, threads):
        model = engines.build(engine, case, threads)
        if engine == "exact":
            return model
        return engines.Model(model.call, lambda ids: ((ids + 1) % 7,))

    def check(process, case):
        model = build(case, process.engine, 1)
        return model.outputs(model.call())

    monkeypatch.setattr(worker.Worker, "check", check)
    assert main(["bench", "--kind", "decode", "--shape", "1,8,2,7,160,1", *QUICK]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "fastseq: decode 1×8×2, batch 1 chose " in said.err


def test_what_is_measured_by_default():
    usual = bench.chosen_cases("decode", [], None)
    sizes = [(case.model.layers, case.model.width, case.model.heads, case.model.symbols, case.batch) for case in usual]
    assert sizes == [(12, 768, 12, 50257, 1), (12, 768, 12, 50257, 8), (4, 128, 4, 96, 1), (4, 128, 4, 96, 8)]
    assert all((case.prompt, case.new) == (32, 128) for case in usual)
    sample, beams = bench.chosen_cases("generate", [], None)
    assert (sample.layers, sample.hidden, sample.symbols, sample.batch, sample.new) == (2, 256, 96, 1, 1000)
    assert (beams.batch, beams.model.layers, beams.model.width) == (4, 4, 128)
    assert bench.chosen_cases("generate", ["1,2,3,4,5"], None) == [Sample(1, 2, 3, 4, 5)]


def test_every_engine_computes_something():
    every = [case for kind in bench.MODELS for case in bench.chosen_cases(kind, [], None)]
    assert {engine for case in every for engine in case.engines} == set(engines.NEEDS)
    for case in every:
        able = {engine for engine in engines.NEEDS if type(case) in engines.builders(engine)}
        assert set(case.engines) <= able
    assert set(engines.NEEDS) < set(plot.STYLES)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["decode", "--train"], "--train is for recurrent layers"),
        (["decode", "--shape", "1,8,2,7,160"], "layers,width,heads,V,context,B, not '1,8,2,7,160'"),
        (["decode", "--shape", "1,9,2,7,160,1"], "divides the width 9, not 2"),
        (["decode", "--shape", "1,8,2,7,159,1"], "a context of at least 160 symbols, not 159"),
        (["decode", "--shape", "99,99999,3,9,160,1"], "of memory"),
        (["decode", "--vs", "openvino"], "some of reference, torch, ctranslate2, llamacpp, which"),
        (["decode", "--vs", "greedy"], "some of reference, torch, ctranslate2, llamacpp, which"),
        (["generate", "--vs", "ctranslate2"], "some of reference, torch, greedy, which"),
        (["generate", "--shape", "1,2,3,4"], "layers,hidden,V,B,symbols, not '1,2,3,4'"),
    ],
)
def test_bench_refuses_before_it_measures(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    status = main(["bench", "--kind", *arguments])
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    assert said.err.count("\n") == 1 and message in said.err


def test_what_is_not_installed_is_named(capsys, monkeypatch):
    there = {"torch", "onnxruntime", "onnx", "openvino", "ctranslate2"}  # whatever this environment has
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: name if name in there else None)
    assert main(["bench", "--kind", "decode", "--vs", "torch"]) == 2
    assert "--vs torch needs transformers, which is not installed" in capsys.readouterr().err
    assert main(["bench", "--kind", "decode", "--vs", "llamacpp"]) == 2
    assert "--vs llamacpp needs llama_cpp and gguf, which is not installed" in capsys.readouterr().err
    usual = bench.chosen_engines(None, bench.chosen_cases("decode", [], None))
    assert not {"torch", "llamacpp"} & set(usual)
    # It draws from an LSTM without transformers.
    assert bench.lacking("torch", bench.chosen_cases("generate", [], None)) == []
    there.remove("torch")
    assert main(["bench", "--kind", "decode", "--vs", "torch"]) == 2
    assert "--vs torch needs torch and transformers, which is not installed" in capsys.readouterr().err


def test_what_is_counted():
    # Of one layer of width 4: 12 squares of weights; an output for each of 3 symbols.
    case = Decode(Transformer(1, 4, 2, 3, 40), 2, prompt=2, new=3)
    weights, outputs, cached = 12 * 16, 4 * 3, 2 * 4
    assert case.length == 5
    # Begin and prompt at once, then two of the three that are chosen; those look at 4 and 5 tokens.
    prompt = 2 * (2 * weights * 3 + 2 * cached * (1 + 2 + 3) + 2 * outputs)
    steps = 2 * (2 * weights * 2 + 2 * cached * (4 + 5) + 2 * outputs * 2)
    assert case.flops == prompt + steps
    read = 4 * (weights + outputs)
    assert case.bytes_read == 3 * read + 4 * 2 * cached * (3 + 4)
    assert case.working_set == read + 4 * 2 * cached * 5
    assert case.floor(1e12, 1e6) == pytest.approx(case.bytes_read / 1e6)
    assert case.floor(1e3, 1e12) == pytest.approx(case.flops / 1e3)
    assert (case.unit, case.work) == ("symbols/s", 6)
    assert DECODE.memory(3) > DECODE.memory(2)
    # One prompt for all beams.
    assert case.flops - Beams(case.model, 2, 2, 3).flops == prompt / 2


def test_what_is_counted_of_an_lstm():
    case = Sample(2, 4, 5, 3, 10)
    weights = 2 * 4 * 4 * (4 + 4)
    assert case.working_set == 4 * (weights + 4 * 5)
    assert case.bytes_read == 10 * case.working_set + 32 * 4 * weights // 2
    assert case.flops == 2 * 3 * (42 * weights + 10 * 4 * 5)
    assert case.work == 30


def test_rows_are_told_in_their_unit():
    row = report.Row(DECODE, seconds={"fastseq": [2e-3]})
    assert row.speed("fastseq") == pytest.approx(60 / 2e-3)
    assert table._number(12345.6) == "12,346" and table._number(12.345) == "12.3"
