"""Run one engine in its own process; it is stopped (SIGSTOP) except while it is being timed.

Idle threads of an engine spin for a while, some for as long as they live, and two engines that are awake at once
disturb each other many times over. So only the process whose turn it is runs; all others are stopped by signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import repeat
from multiprocessing.connection import Connection
from statistics import median
from time import perf_counter
from typing import Any

from fastseq.bench import engines
from fastseq.bench.cases import Case, Outputs
from fastseq.checks import Array

# Every name by which an engine or its matrix products may take the number of threads.
THREAD_VARIABLES = (
    "FASTSEQ_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)

SLICE = 0.05  # seconds of a turn
WARM = 0.005  # seconds before it, until caches and threads are awake
BLOCK = 50e-6  # seconds: calls shorter than this are timed several at once


class EngineError(Exception):
    """An engine failed: it could not start, build, run, or stay alive."""


class Worker:
    """A process that runs one engine. It is stopped between two requests.

    Parameters
    ----------
    engine : str
        A name that the cases know, with the type of its weights behind it where they are narrow.
    threads : int
        Given to the engine by environment and by its own interface.
    """

    # The path is handed over as it is, because -c and -m put the current directory in front of it.
    _START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fastseq.bench import worker; worker.main()"

    def __init__(self, engine: str, threads: int) -> None:
        self.engine = engine
        self._errors = tempfile.TemporaryFile()
        # Whatever the engine writes goes there, and away with the process, however that ends.
        self._folder = tempfile.TemporaryDirectory(prefix="fastseq-bench-")
        self._pipe, theirs = multiprocessing.Pipe()
        arguments = [json.dumps(sys.path), str(theirs.fileno()), engine, str(threads), str(os.getpid())]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", self._START, *arguments],
                env=os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads)) | {"TMPDIR": self._folder.name},
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for us, and we end it
            )
        try:
            self.version: str = self._answer()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def check(self, case: Case) -> Outputs:
        """Build a case, call it once, return its outputs and let go of it."""
        outputs: Outputs = self._ask("check", case)
        return outputs

    def build(self, case: Case) -> None:
        """Build a case, and let go of the one before."""
        self._ask("build", case)

    def margins(self, case: Case, ids: Array) -> Array:
        """Build a case, and look at the symbols of another engine, as `Model.margins` does."""
        margins: Array = self._ask("margins", case, ids)
        return margins

    def time(self) -> float:
        """Seconds a call of the case that was built, the median over a turn."""
        seconds: float = self._ask("time", None)
        return seconds

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()
        self._errors.close()
        self._folder.cleanup()

    def _ask(self, request: str, case: Case | None, ids: Array | None = None) -> Any:
        self._process.send_signal(signal.SIGCONT)
        with contextlib.suppress(OSError):  # the process has ended, which the answer says
            self._pipe.send((request, case, ids))
        return self._answer()

    def _answer(self) -> Any:
        try:
            error, answer = self._pipe.recv()
        except (EOFError, OSError):
            status = self._process.wait()
            raise EngineError(f"{self.engine}: its process ended with status {status}{self._last_words()}") from None
        self._process.send_signal(signal.SIGSTOP)
        if isinstance(error, engines.NotNarrow):
            raise error
        if error is not None:
            raise EngineError(f"{self.engine}: {error}")
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = [line for line in lines if line.strip()]
        return f": {said[-1].strip()}" if said else ""


def main() -> None:
    """The process: answer requests until the pipe closes."""
    handle, engine = int(sys.argv[2]), sys.argv[3]
    threads, parent = int(sys.argv[4]), int(sys.argv[5])
    _die_with(parent)
    pipe = Connection(handle)
    # One at a time: some engines start threads for every model.
    model: engines.Model | None = None

    def answer(request: str, case: Case | None, ids: Array | None) -> Any:
        nonlocal model
        if case is None:
            assert model is not None
            return timed(model.call)
        model = None
        model = engines.build(engine, case, threads)
        if request == "build":
            return None
        if ids is not None:
            assert model.margins is not None
            margins, model = model.margins(ids), None
            return margins
        outputs, model = model.outputs(model.call()), None
        return outputs

    _reply(pipe, lambda: engines.version(engine))
    while True:
        try:
            request, case, ids = pipe.recv()
        except EOFError:
            return
        _reply(pipe, partial(answer, request, case, ids))


def _reply(pipe: Connection, answer: Callable[[], Any]) -> None:
    try:
        pipe.send((None, answer()))
    except engines.NotNarrow as error:
        pipe.send((error, None))
    except Exception as error:  # an engine may raise anything; it is reported, and the others go on
        first, *_ = str(error).splitlines() or [""]
        pipe.send((f"{type(error).__name__}: {first}", None))


def _die_with(parent: int) -> None:
    """Be killed when the parent ends, however it ends: a stopped process would not see its pipe close."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)  # it ended before the line above


def timed(call: Callable[[], Any], duration: float = SLICE) -> float:
    """Seconds a call: the median over about `duration`, after a warm-up that is at least one call.

    Results are dropped at once, as a caller who has used them would, so that every call allocates anew.
    """
    start = perf_counter()
    calls = 0
    while calls == 0 or perf_counter() - start < WARM:
        call()
        calls += 1
    block = max(1, round(BLOCK / ((perf_counter() - start) / calls)))
    seconds: list[float] = []
    start = before = perf_counter()
    while not seconds or before - start < duration:
        for _ in repeat(None, block):
            call()
        after = perf_counter()
        seconds.append((after - before) / block)
        before = after
    return median(seconds)
