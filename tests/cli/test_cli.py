"""The command ``fastseq``: what it prints, what it writes, how it refuses. Nothing timed is asserted."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fastseq as fs
from fastseq import _simd, io
from fastseq.bench import cases, engines, interference, report, roofline, runner, worker
from fastseq.bench.cases import recurrent
from fastseq.cli import bench, main, plot, table

TINY = ("--vs", "reference", "--shape", "1,1,8,8", "--kind", "lstm", "--rounds", "1", "--threads", "1")


def fastseq(*arguments, **environment):
    """Run the command as a user does; the streams are pipes."""
    command = [sys.executable, "-m", "fastseq", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One run of a benchmark: the process, and what it wrote as JSON."""
    path = tmp_path_factory.mktemp("bench") / "result.json"
    done = fastseq("bench", *TINY, "--json", str(path))
    assert done.returncode == 0, done.stderr
    return done, json.loads(path.read_text())


def test_info():
    done = fastseq("info", FASTSEQ_NUM_THREADS="3")
    assert (done.returncode, done.stderr) == (0, "")
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in done.stdout.splitlines())
    assert facts["fastseq"] == fs.__version__
    assert facts["threads"] == "3 (from FASTSEQ_NUM_THREADS)"
    assert facts["NumPy"] == np.__version__
    assert facts["instruction set"].startswith(_simd.chosen)
    assert all(name in facts["instruction set"] for name in _simd.available)
    for weights, instructions in _simd.narrow_instructions.items():
        assert facts[f"{weights} weights"] == instructions
    assert facts["OpenMP"].startswith("yes") == _simd.openmp


def test_alone_it_is_help():
    done = fastseq()
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n    {command} " in done.stdout for command in ("info", "demo", "convert", "bench"))


def test_info_names_the_instruction_set_in_use():
    done = fastseq("info", FASTSEQ_ISA="baseline")
    assert re.search(r"instruction set\s+baseline \(", done.stdout)


def test_import_does_not_load_the_command():
    code = "import sys, fastseq; sys.exit('fastseq.cli' in sys.modules or 'argparse' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_bench_prints_every_case_and_engine(tiny):
    done, _ = tiny
    assert "LSTM 1×1×8×8" in done.stdout
    assert "LSTM step 1×1×8×8" in done.stdout
    assert len(re.findall(rf"^.{{{table.TITLE}}}  fastseq  .*%$", done.stdout, re.M)) == 2
    assert len(re.findall(rf"^.{{{table.TITLE}}}  reference  .*% .* to ", done.stdout, re.M)) == 2
    assert "fastseq is faster in" in done.stdout


def test_bench_in_a_pipe_has_no_progress(tiny):
    done, _ = tiny
    assert done.stderr == ""
    assert "\r" not in done.stdout and "\x1b" not in done.stdout


def test_bench_writes_json(tiny):
    _, result = tiny
    assert (result["threads"], result["rounds"], result["vs"]) == (1, 1, ["reference"])
    assert [case["name"] for case in result["cases"]] == ["LSTM 1×1×8×8", "LSTM step 1×1×8×8"]
    for case in result["cases"]:
        assert case["flops"] == 2 * 4 * 8 * (8 + 8)
        ours, reference = case["engines"]["fastseq"], case["engines"]["reference"]
        assert 0 < ours["error"] < 1e-5 and 0 < reference["error"] < 1e-5
        assert ours["ratio"] == 1
        assert reference["ratio"] == pytest.approx(reference["seconds"][0] / ours["seconds"][0])
        assert ours["share_of_limit"] == pytest.approx(case["limit"]["seconds"][0] / ours["seconds"][0])


def test_bench_trains(tmp_path):
    path = tmp_path / "result.json"
    done = fastseq("bench", "--train", "--vs", "reference", "--shape", "2,1,8,5", *TINY[4:], "--json", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(re.findall(r"^LSTM train 2×1×8×5  +fastseq  .*%$", done.stdout, re.M)) == 1
    (case,) = json.loads(path.read_text())["cases"]
    assert (case["name"], case["train"], case["step"]) == ("LSTM train 2×1×8×5", True, False)
    assert case["flops"] == 3 * 2 * 2 * 4 * 5 * (8 + 5)
    assert all(0 < case["engines"][name]["error"] < 1e-5 for name in ("fastseq", "reference"))


def test_bench_on_a_terminal_shows_progress_and_removes_it():
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fastseq", "bench", *TINY]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:  # the end of a terminal
        pass
    os.close(ours)
    assert process.wait() == 0
    assert "timing LSTM 1×1×8×8, round 1 of 1" in said.decode()
    assert said.endswith(b"\r\x1b[K")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "1,2,3"], "B,T,I,H, not '1,2,3'"),
        (["--shape", "1,2,3,x"], "B,T,I,H, not '1,2,3,x'"),
        (["--shape", "1,0,3,4"], "from 1 on, not '1,0,3,4'"),
        (["--shape", "1,1,999999999,999999999"], "of memory"),
        (["--vs", "reference,keras"], "not 'keras'"),
        (
            ["--train", "--vs", "torch,openvino"],
            "some of reference, torch, which can do what is asked for, not 'openvino'",
        ),
        (["--kind", "transformer"], "transformer"),
        (["--threads", "0"], "--threads should be a whole number from 1 to 1024, not '0'"),
        (["--rounds", "many"], "--rounds should be a whole number"),
        (["--json", "/nonexistent/result.json"], "cannot be written"),
        (["--json", "/dev/null"], "plain file"),
        (["--json", "."], "directory"),
        (["--plot", "/nonexistent/result.png"], "cannot be written"),
        (["--speed", "high"], "--speed"),
    ],
)
def test_bench_refuses_before_it_measures(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    try:
        status = main(["bench", *arguments])
    except SystemExit as ended:  # argparse ends so
        status = ended.code
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    assert said.err.count("\n") == 1 and said.err.startswith("fastseq") and message in said.err


def test_bench_names_what_no_engine_can_before_what_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(engines.NEEDS, "torch", ("no_such_module",))
    assert main(["bench", "--train", "--vs", "torch,openvino"]) == 2
    assert "not 'openvino'" in capsys.readouterr().err


def test_bench_refuses_an_engine_that_is_not_installed(capsys, monkeypatch):
    monkeypatch.setitem(engines.NEEDS, "torch", ("no_such_module",))
    assert main(["bench", "--vs", "torch"]) == 2
    assert "--vs torch needs no_such_module, which is not installed" in capsys.readouterr().err
    inference, training = (bench.chosen_cases("all", [], None, train) for train in (False, True))
    assert "torch" not in bench.chosen_engines(None, inference)
    assert bench.chosen_engines(None, training) == []
    assert bench.chosen_engines("reference", training) == ["reference"]


def test_bench_refuses_a_bad_thread_count_in_the_environment():
    done = fastseq("bench", FASTSEQ_NUM_THREADS="several")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "FASTSEQ_NUM_THREADS" in done.stderr


def test_fastseq_wrong_ends_the_benchmark(capsys, monkeypatch):
    # No float32 result is this near, so every engine counts as wrong.
    monkeypatch.setattr(runner, "tolerance", lambda case: 1e-12)
    assert main(["bench", *TINY]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "LSTM 1×1×8×8 differs from the reference" in said.err


def test_a_peer_that_is_wrong_is_left_out_and_named(capsys, monkeypatch):
    monkeypatch.setattr(runner, "PEER_TOLERANCE", 1e-12)
    assert main(["bench", *TINY]) == 1
    said = capsys.readouterr().out
    assert len(re.findall(r"reference  +differs from the reference", said)) == 2
    assert "reference takes" not in said


def test_largest_error_sees_every_output():
    y, h, c = np.ones((2, 3, 4)), np.ones((2, 4)), np.full((2, 4), 2.0)
    assert cases.largest_error((y, h, c), (y, h, c)) == 0
    assert cases.largest_error((y, h, c + 0.5), (y, h, c)) == 0.25
    assert cases.largest_error((y, c, h), (y, h, c)) == 1
    assert cases.largest_error((y, h), (y, h, c)) == np.inf
    assert cases.largest_error((y * np.nan, h, c), (y, h, c)) == np.inf


class Answers:
    """A worker that gives these outputs."""

    def __init__(self, *outputs):
        self.outputs = outputs

    def check(self, case):
        return self.outputs


@pytest.mark.parametrize(
    "y, dx, fault",
    [
        (1.0009, 1.0039, None),
        (1.0011, 1.0, "1.1e-03 of its largest value"),
        (1.0, 0.9959, "4.1e-03 of a gradient's largest value"),
        (1.0, np.nan, "inf of a gradient's largest value"),
    ],
)
def test_gradients_may_be_four_times_as_far_off(y, dx, fault):
    one = np.ones((1, 1))
    row = report.Row(recurrent.Recurrent("gru", 1, 1, 1, 1, train=True))
    workers = {"fastseq": Answers(one, one, one), "torch": Answers(one, one * y, one * dx)}
    runner.check_parity([row], workers, Answers(one, one, one), lambda doing: None)
    assert row.errors["torch"] == pytest.approx(np.inf if np.isnan(dx) else max(abs(y - 1), abs(dx - 1)))
    assert row.faults == ({} if fault is None else {"torch": f"differs from the reference by {fault}"})


@pytest.fixture(scope="module")
def exact():
    """The float64 reference in its process."""
    process = worker.Worker("exact", 1)
    yield process
    process.close()


@pytest.mark.parametrize("engine", ["onnxruntime", "torch", "openvino"])
def test_engines_compute_the_same(engine, exact):
    if engines.missing(engine):
        pytest.skip(f"{engine} is not installed")
    peer = worker.Worker(engine, 1)
    try:
        for kind in recurrent.KINDS:
            case = recurrent.Recurrent(kind, 2, 3, 5, 7)
            assert cases.largest_error(peer.check(case), exact.check(case)) < 1e-5
    finally:
        peer.close()


@pytest.mark.parametrize("engine", ["fastseq", "torch"])
def test_engines_train_the_same(engine, exact):
    if engine in engines.NEEDS and engines.missing(engine):
        pytest.skip(f"{engine} is not installed")
    peer = worker.Worker(engine, 1)
    try:
        for kind, parts in (("lstm", 2), ("gru", 1), ("rnn", 1)):
            case = recurrent.Recurrent(kind, 2, 3, 5, 7, train=True)
            given = recurrent.numbers(case)
            outputs, expected = peer.check(case), exact.check(case)
            shapes = [(2, 3, 7), *[(2, 7)] * parts, (2, 3, 5), *[(2, 7)] * parts]
            assert [array.shape for array in outputs] == shapes + [array.shape for array in given.weights.values()]
            assert cases.largest_error(outputs, expected) < 1e-5
            assert case.outputs == 1 + parts
    finally:
        peer.close()


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_every_call_starts_from_no_gradients(engine):
    if engines.missing(engine):
        pytest.skip(f"{engine} is not installed")
    model = engines.build(engine, recurrent.Recurrent("lstm", 2, 3, 5, 7, train=True), 1)
    first = [np.array(array) for array in model.outputs(model.call())]
    for once, again in zip(first, model.outputs(model.call()), strict=True):
        np.testing.assert_array_equal(again, once)


def test_worker_that_dies_is_told():
    dying = worker.Worker("fastseq", 1)
    try:
        dying._process.send_signal(signal.SIGKILL)
        with pytest.raises(worker.EngineError, match="fastseq: its process ended with status -9"):
            dying.check(recurrent.Recurrent("rnn", 1, 1, 2, 3))
    finally:
        dying.close()


def test_worker_is_stopped_between_requests():
    idle = worker.Worker("fastseq", 1)
    try:
        for _ in range(100):
            state = Path(f"/proc/{idle._process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "T":
                break
            time.sleep(0.01)
        assert state == "T"
    finally:
        idle.close()


def test_worker_takes_its_threads_from_us(monkeypatch):
    monkeypatch.setenv("FASTSEQ_NUM_THREADS", "7")
    busy = worker.Worker("fastseq", 2)
    try:
        environment = Path(f"/proc/{busy._process.pid}/environ").read_text().split("\0")
        assert {f"{name}=2" for name in worker.THREAD_VARIABLES} <= set(environment)
    finally:
        busy.close()


def test_others_are_counted_and_ours_are_not(tmp_path, monkeypatch):
    tick, clock = os.sysconf("SC_CLK_TCK"), iter([100.0, 110.0])
    monkeypatch.setattr(interference, "perf_counter", lambda: next(clock))

    def tell(total, ours):
        # user nice system idle iowait irq softirq steal guest guest_nice
        seconds = [total, 1, 2, 5000 + total, 70 + total, 3, 4, 5, 900, 900]
        (tmp_path / "stat").write_text("cpu  " + " ".join(str(tick * value) for value in seconds) + "\ncpu0 1\n")
        for process, (user, system) in ours.items():
            (tmp_path / str(process)).mkdir(exist_ok=True)
            fields = ["S", *"0" * 10, str(tick * user), str(tick * system), *"9" * 30]
            (tmp_path / str(process) / "stat").write_text(f"{process} (a ) name) {' '.join(fields)}\n")

    tell(1000, {os.getpid(): (10, 1), 99: (20, 2)})
    watch = interference.Others([99], tmp_path)
    tell(1016, {os.getpid(): (14, 2), 99: (24, 4)})
    assert watch.processors() == pytest.approx((16 - 5 - 6) / 10)


def test_the_limits_are_measured_on_all_threads():
    measured = roofline.Limits(2)
    try:
        seconds, flops = measured._burst(lambda thread, rounds: _simd.multiply_adds(rounds), 1000)
        assert seconds > 0 and flops == 2 * _simd.multiply_adds(1000)
        assert measured.read(100_000) > 0
        assert [buffer.nbytes for buffer in measured._buffers[100_000]] == [50_000, 50_000]
    finally:
        measured.close()


def test_floor():
    # At batch 1 the weights of the state are read every step; at a large batch the multiply-adds take longer.
    one = recurrent.Recurrent("lstm", 1, 10, 64, 128)
    assert one.floor(1e9, 1e6) == pytest.approx((10 * 4 * 4 * 128 * 128 + 4 * 4 * 128 * 64) / 1e6)
    many = recurrent.Recurrent("gru", 64, 10, 64, 128)
    assert many.floor(1e9, 1e9) == pytest.approx(many.flops / 1e9)


def test_floor_of_training():
    # Three products with each weight, two of which read it.
    for shape, multiply_adds, read, times in (((1, 10, 64, 128), 1e12, 1e6, 2), ((64, 10, 64, 128), 1e9, 1e9, 3)):
        forward, both = (recurrent.Recurrent("gru", *shape, train=train) for train in (False, True))
        expected = times * forward.floor(multiply_adds, read)
        assert both.floor(multiply_adds, read) == pytest.approx(expected)
        assert both.flops == 3 * forward.flops and both.bytes_read == 2 * forward.bytes_read
        assert both.memory(2) > forward.memory(2)


def test_ratios_are_paired_by_round():
    row = report.Row(
        recurrent.Recurrent("rnn", 1, 1, 2, 3), seconds={"fastseq": [1.0, 10.0, 1.0], "torch": [2.0, 20.0, 4.0]}
    )
    assert row.ratios("torch") == [2, 2, 4]
    assert row.quartiles("torch") == (2, 3)


def test_disturbed_rows_are_named_and_left_out_of_the_summary():
    def row(kind, peer, others):
        seconds = {"fastseq": [1.0], "torch": [peer]}
        return report.Row(
            recurrent.Recurrent(kind, 1, 1, 2, 3), {"fastseq": 0.0}, {}, seconds, [1.0], [1.0], [1.0], others
        )

    about = {"fastseq": "0", "instruction_set": "avx2", "threads": 2, "rounds": 1, "processor": None, "vs": ["torch"]}
    about |= {"versions": {"fastseq": "0", "torch": "2"}, "notes": []}
    rows = [row("lstm", 500.0, 0.9), row("gru", 2.0, 0.0), row("rnn", 2.0, None)]
    said = table.table(report.Report(about, {2: 1e9}, {1024: 1e9}, rows))
    assert said.count("disturbed: others kept 0.90 processors busy") == 1
    assert "without the 1 row that others disturbed" in said
    assert "torch takes 2.00 times as long as fastseq (geometric mean: GRU 2.00, RNN 2.00), at least" in said


def test_write_whole_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_bytes(b"old")

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr(io.os, "fsync", full)
    with pytest.raises(OSError):
        io.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_spread_keeps_labels_apart_and_near():
    assert plot.spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert plot.spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])


def test_table_has_the_24_shapes():
    chosen = [case for case in bench.chosen_cases("all", [], "table") if not case.step]
    assert len(chosen) == len(set(chosen)) == 24


def test_nine_shapes_train():
    chosen = bench.chosen_cases("all", [], None, train=True)
    assert len(chosen) == len(set(chosen)) == 9
    assert all(case.train and not case.step for case in chosen)
    assert bench.chosen_cases("rnn", ["1,1,2,3"], None, train=True) == [
        recurrent.Recurrent("rnn", 1, 1, 2, 3, train=True)
    ]
