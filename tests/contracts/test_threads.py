"""The thread contract: who decides the number, forks, many Python threads, Ctrl-C, and the control register."""

from __future__ import annotations

import concurrent.futures
import ctypes
import ctypes.util
import fcntl
import functools
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
from common import (
    KINDS,
    assert_same_bits,
    child_environment,
    example,
    inputs,
    make,
    random_lengths,
    random_state,
    run_python,
    threads,
    train,
)

import fastseq as fs
from fastseq import _parallel, _simd
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
    from common import assert_same_bits, example, inputs, make, random_state, train
    way = {way!r}
    layers = [make(kind, 40, 300) for kind in ("rnn_tanh", "lstm", "gru_before")]
    linear, last = fs.Linear(300, 200, seed=0), {{}}
    fs.set_num_threads(2)
    x = inputs((12, 9, 40))
    expected = [layer(x, random_state(layer, 12)) for layer in layers]

    def learn():
        results = [tuple(train(layer, *example(layer, 12, 9)).values()) for layer in layers]
        y, tape = linear.forward(inputs((100, 300)))
        loss, dy = fs.losses.mean_squared_error(y, inputs((100, 200), seed=1))
        return *results, linear.backward(dy, tape), (np.float64(loss).reshape(1),)

    learned = learn()

    def check():
        assert_same_bits(learn(), learned)
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
    result = run_python(code, timeout=300)
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


@pytest.mark.parametrize("parent", ["waits", "fails"])
def test_a_fork_that_hangs_leaves_nothing_behind(parent: str, tmp_path: Path) -> None:
    """The tests above end what they started, whatever went wrong in it."""
    lock = tmp_path / "held by the child"
    code = f"""
    import fcntl, os, time
    held = open({str(lock)!r}, "w")
    fcntl.flock(held, fcntl.LOCK_EX)
    child = os.fork()
    if not child:
        time.sleep(1000)
    held.close()
    assert {parent!r} == "waits"
    os.waitpid(child, 0)
    """
    with pytest.raises(subprocess.TimeoutExpired):
        run_python(code, timeout=5)
    with open(lock) as free:
        for _ in range(100):  # it was killed, and may need a moment to be gone
            try:
                fcntl.flock(free, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                sleep(0.1)
        else:
            pytest.fail("the child is still there")


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


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_many_python_threads_train_one_layer(kind: str, n_threads: int) -> None:
    """Each its own inputs, tape and gradients; neither copy of the weights packed when all begin."""
    work = [(1 + i % 9, 3 + i % 5, i) for i in range(24)]

    def learn(layer: Any, batch: int, time: int, seed: int) -> Any:
        more = {"lengths": random_lengths(batch, time, seed), "truncate": 2 if seed % 3 == 0 else None}
        return tuple(train(layer, *example(layer, batch, time, seed), **more).values())

    with threads(n_threads):
        alone = make(kind, 20, 90, num_layers=2, bidirectional=True)
        expected = [learn(alone, *item) for item in work]
        layer = make(kind, 20, 90, num_layers=2, bidirectional=True)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda item: learn(layer, *item), work))
    assert_same_bits(results, expected)


def test_many_python_threads_train_one_linear_layer() -> None:
    def learn(layer: Any, rows: int) -> Any:
        y, tape = layer.forward(inputs((rows, 90), seed=rows))
        grads = {name: np.zeros_like(array) for name, array in layer.parameters.items()}
        return y, layer.backward(y, tape, grads=grads), *grads.values()

    expected = [learn(fs.Linear(90, 150, seed=0), rows) for rows in range(1, 400, 17)]
    with threads(2):
        layer = fs.Linear(90, 150, seed=0)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda rows: learn(layer, rows), range(1, 400, 17)))
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


def test_other_python_threads_run_during_every_long_call() -> None:
    """The interpreter lock is released: a thread counts while a long call runs.

    Were it kept, it would change hands about once a call. On a busy machine some tries may be needed to see more.
    """
    code = """
    import sys, threading, time
    import numpy as np, fastseq as fs
    from fastseq import _dense, _losses, _optimisers
    from common import inputs, make

    def calls():
        x, dy = inputs((1, 500, 64)), inputs((1, 500, 256))
        lstm = make("lstm", 64, 256, num_layers=2)
        yield "call", lambda: lstm(x)
        yield "forward", lambda: lstm.forward(x)
        tape = lstm.forward(x)[2]
        yield "backward", lambda: lstm.backward(dy, tape)
        linear = fs.Linear(1000, 1000, seed=0)
        many = inputs((500, 1000))
        kept = linear.forward(many)[1]
        yield "linear", lambda: linear(many)
        yield "linear_backward", lambda: linear.backward(many, kept)
        few = inputs((100, 1000))
        wide = fs.Linear(1000, 2000, seed=0)
        after = wide.forward(few)[1]
        dwide = inputs((100, 2000))
        yield "linear_of_many_outputs_backward", lambda: wide.backward(dwide, after)
        weight, ids = np.ones((1000, 1000), "f4"), np.arange(15000) % 1000
        out = _dense.embedding_forward(weight, ids, 1)
        yield "embedding", lambda: _dense.embedding_forward(weight, ids, 1)
        yield "embedding_backward", lambda: _dense.embedding_backward(ids, out, weight, -1, 1)
        ones = np.ones(1000, "f4")
        _, means, scales = _dense.layer_norm_forward(out, ones, ones, 1e-5, 1)
        yield "norm", lambda: _dense.layer_norm_forward(out, ones, ones, 1e-5, 1)
        yield "norm_backward", lambda: _dense.layer_norm_backward(out, ones, means, scales, out, ones, ones, 1)
        yield "dropout", lambda: _dense.dropout(out, 0.5, 1, 1, 1)
        yield "cross_entropy", lambda: _losses.softmax_cross_entropy(out, ids, len(ids), 0.1, 1)
        yield "squared_error", lambda: _losses.mean_squared_error(out[None], out[None], None, out.size, 1)
        p, g, m, v, new = (np.ones(10_000_000, "f4") for _ in range(5))
        yield "adam", lambda: _optimisers.adam(p, g, m, v, new, 1, 0.1, 0.9, 0.99, 1e-8, 0.0, False, 1)
        large = np.ones(20_000_000, "f4")
        yield "sum_of_squares", lambda: _optimisers.sum_of_squares(large, 1)

    sys.setswitchinterval(1e-4)
    counted = 0
    stop = False
    def count():
        global counted
        while not stop:
            counted += 1
            time.sleep(0)
    worker = threading.Thread(target=count)
    worker.start()
    for name, call in calls():
        mean = 0
        for attempt in range(20):
            before, n, end = counted, 0, time.perf_counter() + 0.05
            while time.perf_counter() < end:
                call()
                n += 1
            mean = max(mean, (counted - before) / n)
            if mean > 12:
                break
        print(name, mean)
    stop = True
    worker.join()
    """
    counts = dict(line.split() for line in run_python(code, FASTSEQ_NUM_THREADS="1").stdout.splitlines())
    assert len(counts) == 15 and all(float(count) > 12 for count in counts.values()), str(counts)


# Ctrl-C

LONG = """
import dataclasses, itertools, signal, sys
import numpy as np, fastseq as fs
from common import assert_same_bits, example, inputs, make, random_state, train
signal.signal(signal.SIGINT, signal.default_int_handler)

class Watched:
    # Operations, and those of them that ran to their end: with no step of the interpreter between end and record.
    def __init__(self, operations):
        self.operations, self.ended = operations, []
    def __getattr__(self, name):
        def run(*arguments):
            self.ended.extend(itertools.starmap(getattr(self.operations, name), [arguments]))
            return self.ended.pop()
        return run

{setting}
expected = use()
watched = Watched(layer._backend.recurrent)
layer._backend = dataclasses.replace(layer._backend, recurrent=watched)
for word in ("ready", "again"):
    del watched.ended[:]
    print(word, flush=True)
    try:
        call()
        print("ran to the end")
    except KeyboardInterrupt:
        print("ran to the end" if watched.ended else "interrupted")
    assert_same_bits(use(), expected)
print("usable")
"""

OF_CALLS = """
layer = make({kind!r}, 256, 256, num_layers=40, bidirectional={bidirectional})
small, state = inputs((3, 2, 256)), random_state(layer, 3)
x = np.broadcast_to(np.float32(0.1), {shape})
use = lambda: layer(small, state)
call = lambda: layer(x)
"""

OF_BACKWARD = """
layer = make({kind!r}, 800, 800)
arrays = example(layer, 3, 2)
use = lambda: tuple(train(layer, *arrays).values())
y, _, tape = layer.forward(inputs({shape}))
call = lambda: layer.backward(y, tape)
"""

OF_LINEAR = """
layer = fs.Linear(2000, 2000, seed=0)
def use():
    y, tape = layer.forward(inputs((5, 2000)))
    grads = {name: np.zeros_like(array) for name, array in layer.parameters.items()}
    return y, layer.backward(y, tape, grads=grads), *grads.values()
y, tape = layer.forward(inputs((8000, 2000)))
call = lambda: layer.backward(y, tape)
"""


@pytest.mark.parametrize(
    ("setting", "n_threads"),
    [
        pytest.param(OF_CALLS.format(kind="lstm", shape=(1, 60_000, 256), bidirectional=False), 1, id="lstm"),
        pytest.param(OF_CALLS.format(kind="gru_before", shape=(2, 30_000, 256), bidirectional=False), 2, id="gru"),
        pytest.param(OF_CALLS.format(kind="rnn_tanh", shape=(600, 600, 256), bidirectional=True), 2, id="rnn"),
        pytest.param(OF_BACKWARD.format(kind="lstm", shape=(16, 300, 800)), 1, id="lstm backward"),
        pytest.param(OF_BACKWARD.format(kind="gru_before", shape=(60, 100, 800)), 2, id="gru backward"),
        pytest.param(OF_LINEAR, 1, id="linear backward"),
    ],
)
def test_ctrl_c(setting: str, n_threads: int) -> None:
    """A call of a second and more ends with KeyboardInterrupt, and all works after it, twice.

    How soon is measured elsewhere; here the call must not have run to its end.
    """
    import time

    code = LONG.replace("{setting}", setting)
    environment = child_environment(FASTSEQ_NUM_THREADS=str(n_threads))
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        try:
            said = []
            for line in child.stdout:
                said.append(line.strip())
                if said[-1] in ("ready", "again"):
                    time.sleep(0.2)  # into the call
                    child.send_signal(signal.SIGINT)
        finally:
            child.kill()
    assert said == ["ready", "interrupted", "again", "interrupted", "usable"]


def test_signals_are_looked_for_all_through_a_call() -> None:
    """Never is a large part of a call gone by without a look, be it a part of its own, as each of backward is."""
    code = """
    import signal, time
    import numpy as np, fastseq as fs
    from common import inputs, make
    looks = []
    signal.signal(signal.SIGALRM, lambda *_: looks.append(time.perf_counter()))
    lstm, gru = make("lstm", 500, 500), make("gru_before", 500, 500)
    x, dy = inputs((30, 100, 500)), inputs((30, 100, 500), seed=1)
    linear, wide = fs.Linear(1500, 1500, seed=0), fs.Linear(1000, 20_000, seed=0)
    many, few, of_few = inputs((4000, 1500)), inputs((380, 1000)), inputs((380, 20_000))
    tapes = [layer.forward(given)[-1] for layer, given in ((lstm, x), (gru, x), (linear, many), (wide, few))]
    for name, call in (
        ("forward", lambda: lstm.forward(x)),
        ("backward", lambda: lstm.backward(dy, tapes[0])),
        ("gru_backward", lambda: gru.backward(dy, tapes[1])),
        ("linear_backward", lambda: linear.backward(many, tapes[2])),
        ("wide_backward", lambda: wide.backward(of_few, tapes[3])),
    ):
        call()  # packs what has to be packed, and has memory at hand
        least = 1.0
        for attempt in range(10):  # a busy machine may take a large part as well
            looks[:] = [time.perf_counter()]
            signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
            call()
            signal.setitimer(signal.ITIMER_REAL, 0)
            looks.append(time.perf_counter())
            least = min(least, np.diff(looks).max() / (looks[-1] - looks[0]))
            if least < 0.3:
                break
        print(name, least)
    """
    out = run_python(code, FASTSEQ_NUM_THREADS="1").stdout
    shares = {name: float(share) for name, share in (line.split() for line in out.splitlines())}
    assert len(shares) == 5 and all(share < 0.3 for share in shares.values()), shares


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


EVERY_FLAG = 0x3D if os.uname().machine == "x86_64" else 0x1F
INVALID, DIVIDE, INEXACT = (1, 4, 32) if EVERY_FLAG == 0x3D else (1, 2, 16)


@pytest.fixture
def libm() -> Any:
    name = ctypes.util.find_library("m")
    if name is None:
        pytest.skip("this machine lacks a C mathematics library to ask")
    library = ctypes.CDLL(name)
    gc.disable()  # what a collection calls back, Hypothesis for one, calculates between the test and what it asks for
    yield library
    gc.enable()
    library.feclearexcept(EVERY_FLAG)


def extreme(array: Any) -> Any:
    """Denormal numbers, large ones and an infinity: what raises every flag there is."""
    array = array.copy()
    array[...] = 1e-40
    array[0] = 1e30
    array[1, 2] = np.inf
    return array


def recurrent_work(kinds: Any = KINDS, size: int = 9, batch: int = 3) -> list[Any]:
    """Calls and backward passes on numbers that raise flags."""
    work = []
    for kind in kinds:
        layer = make(kind, 4, size, num_layers=2)
        x, state, dy, dstate = example(layer, batch, 5)
        work.append(functools.partial(layer, extreme(x), state))
        for given in ((extreme(x), state, dy, dstate), (x, state, extreme(dy), dstate)):
            work.append(functools.partial(train, layer, *given))
    return work


def other_work(size: int = 9, batch: int = 3) -> list[Any]:
    """The same of the layers that have no time."""
    work = []
    for layer in (fs.Linear(20, size), fs.LayerNorm(20), fs.Dropout(0.3)):
        x = inputs((batch, 5, 20))
        y, tape = layer.forward(x)
        work += [functools.partial(layer.forward, extreme(x)), functools.partial(layer.backward, extreme(y), tape)]
    embedding = fs.Embedding(7, 20)
    y, tape = embedding.forward(np.arange(batch * 5).reshape(batch, 5) % 7)
    return [*work, functools.partial(embedding.backward, extreme(y), tape)]


def test_the_sticky_flags_and_the_rounding_are_kept(libm: Any) -> None:
    """Exceptions that were flagged before a call still are, and none that the kernel met is."""
    work = [(call, EVERY_FLAG) for call in recurrent_work()]
    # How the work of these is shared out is a ratio, outside the kernel, that may be rounded.
    work += [(call, EVERY_FLAG & ~INEXACT) for call in other_work()]
    for number, (call, flags) in enumerate(work):
        call()  # what is packed and made once
        for before in (0, INVALID, DIVIDE, EVERY_FLAG & ~INVALID):
            libm.feclearexcept(EVERY_FLAG)
            if before:
                libm.feraiseexcept(before)
            before = libm.fetestexcept(flags)
            rounding = libm.fegetround()
            call()
            after = libm.fetestexcept(flags)
            assert (after, libm.fegetround()) == (before, rounding), f"call {number}"


def test_every_thread_keeps_its_control_register(libm: Any) -> None:
    """Whether denormals are flushed, rounding and sticky flags, of each thread of the runtime: it is asked itself."""
    maps = Path("/proc/self/maps")
    found = {line.split()[-1] for line in maps.read_text().splitlines() if "omp" in Path(line.split()[-1]).name}
    runtimes = [path for path in found if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))]
    if not _simd.openmp:
        pytest.skip("this machine lacks OpenMP")
    runtime = ctypes.CDLL(next(path for path in runtimes if hasattr(ctypes.CDLL(path), "GOMP_parallel")))
    task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    n_threads = 3

    def of_each(action: Any) -> dict[int, Any]:
        """What a function gives on each thread of a region."""
        given: dict[int, Any] = {}
        runtime.GOMP_parallel(
            task(lambda _: given.update({runtime.omp_get_thread_num(): action()})), None, n_threads, 0
        )
        return given

    def register() -> Any:
        environment = (ctypes.c_uint32 * 8)()
        libm.fegetenv(environment)
        return environment[7] if EVERY_FLAG == 0x3D else tuple(environment[:2])

    def flagged() -> Any:
        libm.feclearexcept(EVERY_FLAG)
        libm.feraiseexcept(DIVIDE)
        return register()

    values = inputs((300, 1000))
    layer = fs.Linear(1000, 300)
    layer.backward(values[:, :300], layer.forward(values)[1])
    calls = recurrent_work(["rnn_tanh", "lstm_proj", "gru_before"], 300, 40) + recurrent_work(["lstm"], 300, 2)
    alone = len(calls)
    calls += other_work(300, 400)
    calls.append(lambda: fs.losses.mean_squared_error(extreme(values), values))
    calls.append(lambda: fs.losses.softmax_cross_entropy(extreme(values), np.arange(300)))
    calls += [optimiser(layer, 0.1).step for optimiser in (fs.training.SGD, fs.training.RMSProp, fs.training.Adam)]
    with threads(n_threads):
        for number, call in enumerate(calls):
            call()
            before = of_each(flagged)
            assert len(before) == n_threads
            call()
            after = of_each(register)
            if number >= alone:
                before[0] = after[0]  # the calling thread had numbers of its own to reckon with
            assert after == before, f"call {number}"


def test_a_build_without_openmp_runs_on_one_thread() -> None:
    """Here: either there is OpenMP, or any number gives the results of one."""
    assert _simd.openmp in (True, False)
    layer = make("lstm", 40, 300)
    x = inputs((40, 5, 40))
    with threads(1):
        expected = layer(x)
    with threads(5):
        assert_same_bits(layer(x), expected)


# Beside other processes

MS = 1_000_000


def steady(count: int, length: int, late: int, between: int = 0) -> list[tuple[int, int, int]]:
    """Regions one after another, each so long and so late, in ns."""
    return [(i * (length + between), i * (length + between) + length, late) for i in range(1, count + 1)]


def test_teams_that_lose_little_go_on() -> None:
    assert not any(_parallel.pauses(steady(1000, 10 * MS, 0)))
    assert not any(_parallel.pauses(steady(1000, 10 * MS, 2 * MS)))  # a quarter may be lost
    assert not any(_parallel.pauses([(MS, 2 * MS, 4 * MS)]))  # once is an accident


def test_teams_that_lose_much_pause_for_longer_and_longer() -> None:
    """As regions come in a process: the next is opened when the pause is over."""
    regions: list[tuple[int, int, int]] = []
    for _ in range(14):
        pause = _parallel.pauses(regions)[-1] if regions else 0
        opened = (regions[-1][1] if regions else MS) + pause
        regions.append((opened, opened + 4 * MS, 3 * MS))
    pauses = [pause // MS for pause in _parallel.pauses(regions)]
    first = pauses.index(2)
    assert first == 2 and pauses[:first] == [0, 0]
    assert pauses[first:] == [2, 4, 8, 16, 32, 64, 128, 256, 500, 500, 500, 500]


def test_of_threads_that_enter_a_region_late_the_latest_counts() -> None:
    assert _parallel.late_entries([]) == 0
    assert _parallel.late_entries([MS, 3 * MS, 2 * MS]) == 3 * MS


def test_threads_that_wake_slowly_after_a_pause_end_it() -> None:
    """They slept through the pause; were that counted as before it, one pause would follow the other for ever."""
    regions = [(i * 4 * MS, (i + 1) * 4 * MS, 12 * MS) for i in range(1, 9)]
    pause = _parallel.pauses(regions)[-1]
    opened = regions[-1][1] + pause
    assert pause > 100 * MS
    assert not _parallel.pauses([*regions, (opened, opened + 20 * MS, MS)])[-1]
    assert _parallel.pauses([*regions, (opened, opened + 4 * MS, 3 * MS)])[-1] > pause


def test_a_pause_after_long_calm_is_short_again() -> None:
    crowded = [(i * 4 * MS, (i + 1) * 4 * MS, 12 * MS) for i in range(1, 12)]
    calm = [(5000 * MS + i * MS, 5001 * MS + i * MS, 0) for i in range(100)]
    again = [(5200 * MS, 5204 * MS, 12 * MS)]
    pauses = _parallel.pauses(crowded + calm + again)
    assert max(pauses[: len(crowded)]) > 100 * MS and pauses[-1] == 2 * MS


@pytest.fixture
def broken_teams() -> Iterator[None]:
    _parallel.set_team_mode("broken")
    yield
    _parallel.set_team_mode("held")


def test_a_team_that_dissolves_gives_the_same_bits(broken_teams: None) -> None:
    """One thread takes up the work where the team left it."""
    for kind in KINDS:
        for batch in (1, 2, 40):
            layer = make(kind, 30, 200, num_layers=2, bidirectional=True)
            x, state, dy, dstate = example(layer, batch, 23)
            lengths = random_lengths(batch, 23)
            with threads(1):
                expected = layer(x, state, lengths=lengths), train(layer, x, state, dy, dstate, lengths=lengths)
            with threads(3):
                assert_same_bits(layer(x, state, lengths=lengths), expected[0], f"{kind}, {batch} rows")
                for name, array in train(layer, x, state, dy, dstate, lengths=lengths).items():
                    assert_same_bits(array, expected[1][name], f"{kind}, {batch} rows, {name}")
    encoder = fs.TransformerEncoder(3, 96, 4, 200, seed=1)
    model = fs.models.TransformerLM(20, 96, 4, 2, context=64, seed=2)
    for batch, steps in ((1, 30), (5, 61)):
        x, lengths = inputs((batch, steps, 96)), random_lengths(batch, steps)
        prompts = [[1, 2, 3]] * batch
        with threads(1):
            expected = encoder(x, lengths=lengths), model.generate(prompts, 40, seed=3)
        with threads(3):
            assert_same_bits(encoder(x, lengths=lengths), expected[0], f"encoder, {batch} rows")
            assert (model.generate(prompts, 40, seed=3) == expected[1]).all()
