"""The thread contract: who decides the number, forks, many Python threads, Ctrl-C, and the control register."""

from __future__ import annotations

import concurrent.futures
import ctypes
import ctypes.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import (
    KINDS,
    assert_same_bits,
    child_environment,
    inputs,
    make,
    random_lengths,
    random_state,
    run_python,
    threads,
)

import fastseq as fs
from fastseq import _simd
from fastseq import threads as policy

# Who decides

WHO = "import fastseq as fs; from fastseq.threads import explain; print(*explain(), fs.get_num_threads(), sep='|')"


def who(code: str = WHO, **environment: str) -> tuple[int, str]:
    environment = {"FASTSEQ_NUM_THREADS": "", "OMP_NUM_THREADS": "", **environment}
    n, source, again = run_python(code, **environment).stdout.strip().split("|")
    assert n == again
    return int(n), source


def test_the_order_of_who_decides() -> None:
    both = {"FASTSEQ_NUM_THREADS": "5", "OMP_NUM_THREADS": "3"}
    assert who("import fastseq as fs; fs.set_num_threads(9); " + WHO, **both) == (9, "set_num_threads")
    assert who(**both) == (5, "FASTSEQ_NUM_THREADS")
    assert who(OMP_NUM_THREADS="3") == (3, "OMP_NUM_THREADS")
    assert who(OMP_NUM_THREADS="3,2") == (3, "OMP_NUM_THREADS")
    n, source = who()
    assert 1 <= n <= len(os.sched_getaffinity(0)) and source in ("affinity", "cgroup quota")


def test_affinity() -> None:
    one = min(os.sched_getaffinity(0))
    assert who(f"import os; os.sched_setaffinity(0, [{one}]); " + WHO)[0] == 1


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "2 3", "99999999", "1" * 5000])
def test_nonsense_in_our_variable_is_a_value_error_that_names_it(text: str) -> None:
    code = """
    import fastseq as fs
    for call in (fs.get_num_threads, lambda: fs.LSTM(1, 1)([[1.0]])):
        try:
            call()
        except ValueError as error:
            assert "FASTSEQ_NUM_THREADS" in str(error), error
        else:
            raise SystemExit("nothing was raised")
    fs.set_num_threads(2)
    assert fs.get_num_threads() == 2
    """
    run_python(code, FASTSEQ_NUM_THREADS=text)


@pytest.mark.parametrize("text", ["0", "-1", "x", " "])
def test_nonsense_in_the_variable_of_others_is_passed_over(text: str) -> None:
    code = "import os; os.environ['OMP_NUM_THREADS'] = " + repr(text) + "; " + WHO
    assert who(code)[1] in ("affinity", "cgroup quota")


def tree(root: Path, groups: dict[str, str]) -> Path:
    """A tree of control groups: path to the text of its cpu.max."""
    for name, text in groups.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "cpu.max").write_text(text)
    return root


@pytest.mark.parametrize(
    ("membership", "groups", "expected"),
    [
        ("0::/\n", {".": "150000 100000\n"}, 1.5),
        ("0::/\n", {".": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"a/b": "200000 100000\n"}, 2),
        ("0::/a/b\n", {"a/b": "max 100000\n", "a": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", {"a/b": "400000 100000\n", "a": "300000 100000\n", ".": "900000 100000\n"}, 3),
        ("0::/a/b\n", {"a/c": "100000 100000\n"}, None),
        ("1:cpu:/x\n0::/a\n", {"a": "100000 100000\n"}, 1),
        ("1:cpu:/a\n", {"a": "100000 100000\n"}, None),
        ("", {"a": "100000 100000\n"}, None),
        ("0::/a\n", {"a": "", ".": "100000 50000\n"}, 2),
        ("0::/a\n", {"a": "nonsense\n"}, None),
        ("0::/a\n", {"a": "100000 0\n"}, None),
        ("0::/a\n", {"a": "100000\n"}, None),
        ("0::/../../a\n", {".": "100000 100000\n"}, None),
        ("0::/name with spaces\n", {"name with spaces": "100000 100000\n"}, 1),
    ],
)
def test_control_groups(membership: str, groups: dict[str, str], expected: Any, tmp_path: Path) -> None:
    root = tree(tmp_path / "cgroup", groups)
    root.mkdir(exist_ok=True)
    (tmp_path / "membership").write_text(membership)
    got = policy._cgroup_quota(tmp_path / "membership", root)
    assert got == expected or (".." in membership and got in (None, 1))


def test_control_groups_that_are_not_there(tmp_path: Path) -> None:
    assert policy._cgroup_quota(tmp_path / "missing", tmp_path) is None


@pytest.mark.parametrize(("quota", "expected"), [(0.2, 1), (1.0, 1), (1.5, 2), (2.5, 3), (100.0, 8), (None, 8)])
def test_a_quota_is_rounded_up_and_never_adds(quota: Any, expected: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(policy, "_cgroup_quota", lambda membership, root: quota)
    assert policy._from_machine()[0] == expected


def test_the_number_is_honoured_as_given() -> None:
    for n in (1, 2, 7, 64, 1024):
        fs.set_num_threads(n)
        assert fs.get_num_threads() == n
        assert policy.explain() == (n, "set_num_threads")


# Forks


@pytest.mark.parametrize("way", ["os.fork", "multiprocessing", "fork in a thread", "twice"])
def test_a_fork_after_use_works(way: str) -> None:
    code = f"""
    import os, multiprocessing, threading, sys
    import numpy as np, fastseq as fs
    from common import assert_same_bits, inputs, make, random_state
    way = {way!r}
    layers = [make(kind, 40, 300) for kind in ("rnn_tanh", "lstm", "gru_before")]
    fs.set_num_threads(2)
    x = inputs((12, 9, 40))
    expected = [layer(x, random_state(layer, 12)) for layer in layers]

    def check():
        for layer, wanted in zip(layers, expected):
            assert_same_bits(layer(x, random_state(layer, 12)), wanted)
            assert_same_bits(layer(x[:1], random_state(layer, 12)[:1]), (wanted[0][:1], wanted[1][:1]))
        fs.set_num_threads(3)
        assert fs.get_num_threads() >= 1
        assert_same_bits(layers[1](x, random_state(layers[1], 12)), expected[1])

    def fork(depth):
        child = os.fork()
        if not child:
            try:
                check()
                if depth > 1:
                    fork(depth - 1)
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0

    if way == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=check)
        process.start()
        process.join()
        assert process.exitcode == 0
    elif way == "fork in a thread":
        worker = threading.Thread(target=fork, args=(1,))
        worker.start()
        worker.join()
    else:
        fork(2 if way == "twice" else 1)
    check()  # and the parent goes on
    print("whole")
    """
    result = run_python(code, timeout=60)
    assert result.stdout == "whole\n" and "Error" not in result.stderr


def test_a_fork_before_use_works() -> None:
    code = """
    import os, fastseq as fs
    from common import inputs, make
    layer = make("lstm", 40, 300)
    child = os.fork()
    y = layer(inputs((12, 9, 40)))[0]
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    """
    run_python(code, timeout=60)


def test_spawned_workers() -> None:
    code = """
    import concurrent.futures, multiprocessing, pickle
    import fastseq as fs
    from common import assert_same_bits, inputs, make
    if __name__ == "__main__":
        layer = make("gru_after", 4, 30)
        x = inputs((4, 5, 4))
        context = multiprocessing.get_context("forkserver")
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            y, state = pool.submit(layer, x).result(timeout=60)
        assert_same_bits((y, state), layer(x))
    """
    run_python(code, timeout=100)


# Many Python threads


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_many_python_threads_use_one_layer(kind: str, n_threads: int) -> None:
    """Each its own input, state and lengths; the weights not yet packed when all begin."""
    reference = make(kind, 20, 90, num_layers=2)
    work = [(1 + i % 9, 3 + i % 5, i) for i in range(40)]

    def call(layer: Any, batch: int, time: int, seed: int) -> Any:
        x, state = inputs((batch, time, 20), seed=seed), random_state(layer, batch, seed)
        y, end = layer(x, state, lengths=random_lengths(batch, time, seed))
        return y, end, layer.step(x[:, 0], state)

    with threads(n_threads):
        expected = [call(reference, *item) for item in work]
        layer = make(kind, 20, 90, num_layers=2)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda item: call(layer, *item), work))
    assert_same_bits(results, expected)


def test_weights_changed_while_others_call() -> None:
    """A call sees all of one set of weights or all of another."""
    layer = make("gru_after", 8, 40)
    sets = [make("gru_after", 8, 40, seed=seed).state_dict() for seed in range(2)]
    x = inputs((3, 6, 8))
    allowed = []
    for weights in sets:
        layer.load_state_dict(weights)
        allowed.append(layer(x)[0].tobytes())
    stop = False

    def change() -> None:
        while not stop:
            for weights in sets:
                layer.load_state_dict(weights)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        changing = pool.submit(change)
        try:
            calls = [pool.submit(lambda: [layer(x)[0].tobytes() for _ in range(50)]) for _ in range(3)]
            seen = {result for future in calls for result in future.result()}
        finally:
            stop = True
        changing.result()
    assert seen <= set(allowed)


def test_other_python_threads_run_during_a_call() -> None:
    """The interpreter lock is released: a thread counts while a long call runs, and cuts it short by its end."""
    code = """
    import threading, time, numpy as np, fastseq as fs, sys
    sys.setswitchinterval(1e-4)
    layer = fs.LSTM(64, 256, 4)
    x = np.zeros((1, 3000, 64), "float32")
    counted = 0
    stop = False
    def count():
        global counted
        while not stop:
            counted += 1
            time.sleep(0)
    worker = threading.Thread(target=count)
    worker.start()
    before = counted
    layer(x)
    during = counted - before
    stop = True
    worker.join()
    assert during > 100, during
    """
    run_python(code, FASTSEQ_NUM_THREADS="1")


# Ctrl-C

LONG = """
import signal, sys
import numpy as np, fastseq as fs
from common import assert_same_bits, inputs, make, random_state
signal.signal(signal.SIGINT, signal.default_int_handler)
layer = make({kind!r}, 256, 256, num_layers=40, bidirectional={bidirectional})
small, state = inputs((3, 2, 256)), random_state(layer, 3)
expected = layer(small, state)
x = np.broadcast_to(np.float32(0.1), {shape})
print("ready", flush=True)
try:
    layer(x)
    print("ran to the end")
except KeyboardInterrupt:
    print("interrupted")
assert_same_bits(layer(small, state), expected)
try:
    print("again", flush=True)
    layer(x)
    print("ran to the end")
except KeyboardInterrupt:
    print("interrupted")
assert_same_bits(layer(small, state), expected)
print("usable")
"""


@pytest.mark.parametrize(
    ("kind", "shape", "n_threads"),
    [("lstm", (1, 60_000, 256), 1), ("gru_before", (2, 30_000, 256), 2), ("rnn_tanh", (600, 600, 256), 2)],
    ids=str,
)
def test_ctrl_c(kind: str, shape: tuple[int, ...], n_threads: int) -> None:
    """A call of a minute and more ends with KeyboardInterrupt, and all works after it, twice.

    How soon is measured elsewhere; here the call must not have run to its end.
    """
    import time

    code = LONG.format(kind=kind, shape=shape, bidirectional=kind == "rnn_tanh")
    environment = child_environment(FASTSEQ_NUM_THREADS=str(n_threads))
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        try:
            said = []
            for line in child.stdout:
                said.append(line.strip())
                if said[-1] in ("ready", "again"):
                    time.sleep(0.3)  # into the call
                    child.send_signal(signal.SIGINT)
        finally:
            child.kill()
    assert said == ["ready", "interrupted", "again", "interrupted", "usable"]


# The control register


def test_the_caller_keeps_denormals() -> None:
    for kind in KINDS:
        layer = make(kind, 20, 90)
        tiny = np.nextafter(0, 1)
        for n_threads in (1, 2):
            with threads(n_threads):
                layer(inputs((40, 9, 20)))
                layer(np.full((40, 9, 20), 1e-40, "float32"))
                layer.step(inputs((40, 20)))
            assert tiny * 1 == tiny and tiny > 0
            assert (np.full(9, 1e-40, "float32") * np.float32(0.5)).min() > 0


def test_an_interrupted_or_failed_call_keeps_denormals() -> None:
    layer = make("lstm", 20, 90)
    with pytest.raises(ValueError, match="x should be"):
        layer(np.zeros((1, 2, 3)))
    assert np.nextafter(0, 1) * 1 > 0


def test_the_sticky_flags_and_the_rounding_are_kept() -> None:
    """Exceptions that were flagged before a call still are, and none that the kernel met is."""
    name = ctypes.util.find_library("m")
    if name is None:
        pytest.skip("this machine lacks a C mathematics library to ask")
    libm = ctypes.CDLL(name)
    every = 0x3D if sys.platform == "linux" and os.uname().machine == "x86_64" else 0x1F
    invalid, divide = (1, 4) if every == 0x3D else (1, 2)
    layers = [make(kind, 4, 9) for kind in KINDS]
    x = np.full((3, 5, 4), 1e-40, "float32")
    x[0] = 1e30
    x[1, 2] = np.inf
    state = [random_state(layer, 3) for layer in layers]
    for layer, start in zip(layers, state, strict=True):
        layer(x, start)
        for before in (0, invalid, divide, every & ~invalid):
            libm.feclearexcept(every)
            if before:
                libm.feraiseexcept(before)
            before = libm.fetestexcept(every)
            rounding = libm.fegetround()
            layer(x, start)
            after = libm.fetestexcept(every)
            assert (after, libm.fegetround()) == (before, rounding)
    libm.feclearexcept(every)


def test_a_build_without_openmp_runs_on_one_thread() -> None:
    """Here: either there is OpenMP, or any number gives the results of one."""
    assert _simd.openmp in (True, False)
    layer = make("lstm", 40, 300)
    x = inputs((40, 5, 40))
    with threads(1):
        expected = layer(x)
    with threads(5):
        assert_same_bits(layer(x), expected)
