"""Check that the engines agree, time them in turn, and hold them against the limits of the machine."""

from __future__ import annotations

import contextlib
import datetime
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fastseq import _simd
from fastseq.bench.cases import Case, Outputs, name_and_weights, named
from fastseq.bench.engines import NotNarrow
from fastseq.bench.interference import Others
from fastseq.bench.report import Report, Row
from fastseq.bench.roofline import ROOFS, Limits
from fastseq.bench.worker import EngineError, Worker
from fastseq.version import __version__

# Of the largest magnitude in the result. A gate exchanged or a state dropped costs far more, an approximate tanh less.
PEER_TOLERANCE = 1e-3
# The same with narrow weights, several times what the coarsest engine has. Where symbols are chosen: which share of
# them float64 has to choose, too. Of many symbols several are nearly as likely as the likeliest, and layers of random
# weights amplify what rounding does; then it has to be many times the share of nonsense, one in as many as there are.
NARROW_TOLERANCE = {"bfloat16": 0.05, "int8": 0.2}
LEAST_AGREED = {"bfloat16": 0.5, "int8": 0.2}
OVER_NONSENSE = 40


def n_steps(n_cases: int, n_engines: int, rounds: int) -> int:
    """How many times `measure` reports progress: engines, checks, limits, rounds."""
    return n_engines + n_cases + 1 + rounds * n_cases


def measure(
    cases: Sequence[Case],
    peers: list[str],
    n_threads: int,
    rounds: int,
    asked: bool,
    advance: Callable[[str], None],
    complain: Callable[[str], None],
    weights: Sequence[str] = ("float32",),
) -> Report:
    """Check, then time; an `EngineError` where fastseq, or an engine that was asked for, fails.

    Parameters
    ----------
    cases : sequence of Case
    peers : list of str
        The engines to stand beside fastseq, with the types of their weights.
    n_threads, rounds : int
    asked : bool
        Whether somebody named the peers: one that cannot start is left out otherwise.
    advance : callable
        Called with what is done next, `n_steps` times in all.
    complain : callable
        Called with why an engine was left out.
    weights : sequence of str
        Types of fastseq's own weights; the others are compared with the first.
    """
    own = [named("fastseq", each) for each in weights]
    rows = [Row(case, base=own[0]) for case in cases]
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in [*own, *peers]:
            advance(f"starting {name}")
            try:
                workers[name] = stack.enter_context(contextlib.closing(Worker(name, n_threads)))
            except EngineError as error:
                if asked or name in own:
                    raise
                complain(f"left out {error}")
        with contextlib.closing(Worker("exact", n_threads)) as exact:  # it ends before anything is timed
            check_parity(rows, workers, exact, advance)
        advance("measuring the limits")
        limits = stack.enter_context(contextlib.closing(Limits(n_threads)))
        peaks, reads = roofs(limits)
        for row in rows:
            measured = {name: worker for name, worker in workers.items() if row.has(name)}
            for worker in measured.values():
                worker.build(row.case)
            others = Others(worker.pid for worker in workers.values())
            for turn in range(rounds):
                advance(f"timing {row.case.name}, round {turn + 1} of {rounds}")
                time_once(row, measured, limits, turn)
            row.others = others.processors()
            limits.forget()
    about = {
        "date": datetime.date.today().isoformat(),
        "fastseq": __version__,
        "instruction_set": _simd.chosen,
        "openmp": _simd.openmp,
        "threads": n_threads,
        "rounds": rounds,
        "dtype": "float32",
        "notes": list(dict.fromkeys(note for case in cases for note in case.notes)),
        "vs": [name for name in peers if name in workers],
        "versions": {name: worker.version for name, worker in workers.items()},
        "processor": processor(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if list(weights) != ["float32"]:
        about["weights"] = list(weights)
    return Report(about, peaks, reads, rows)


def check_parity(
    rows: Sequence[Row], workers: dict[str, Worker], exact: Worker, advance: Callable[[str], None]
) -> None:
    """Compare every engine with the float64 reference; what differs is left out, and fastseq must not."""
    narrow = any(name_and_weights(name)[1] != "float32" for name in workers)
    for row in rows:
        advance(f"checking {row.case.name}")
        expected = exact.check(row.case)
        for name, worker in workers.items():
            if not row.case.computed_by(name):
                continue
            own = name_and_weights(name)[0] == "fastseq"
            try:
                outputs = worker.check(row.case)
            except NotNarrow as reason:
                row.not_narrow[name] = str(reason)
                continue
            except EngineError as failure:
                if own:
                    raise
                row.faults[name] = f"failed: {failure}"
                continue
            allowed = _hold(row, name, outputs, expected)
            if narrow and name not in row.faults:
                _tell_error(row, name, outputs, expected, exact)
            if own and name in row.faults:
                limit = f", more than {allowed:.1e}" if math.isfinite(allowed) else ""
                raise EngineError(f"{name}: {row.case.name} {row.faults[name]}{limit}")


def _hold(row: Row, name: str, outputs: Outputs, expected: Outputs) -> float:
    """Hold what an engine computed against the float64 reference; returns how far off it might have been."""
    engine, weights = name_and_weights(name)
    if weights == "float32":
        allowed = tolerance(row.case) if engine == "fastseq" else PEER_TOLERANCE
    else:
        # Another symbol makes another text, so those that are chosen are looked at one by one, in `_tell_error`.
        allowed = math.inf if row.case.choices else NARROW_TOLERANCE[weights]
    verdict = row.case.compare(engine, outputs, expected, allowed)
    if verdict.error is not None:
        row.errors[name] = verdict.error
    if verdict.symbols is not None:
        row.symbols[name] = verdict.symbols
    if verdict.alike is not None:
        row.alike[name] = verdict.alike
    if verdict.fault is not None:
        row.faults[name] = verdict.fault
    return verdict.allowed


def _tell_error(row: Row, name: str, outputs: Outputs, expected: Outputs, exact: Worker) -> None:
    """Note the error that stands beside the time where weights are narrow, and refuse symbols that are nonsense."""
    difference = row.case.difference(outputs, expected)
    if difference is not None:
        row.differences[name] = difference
    if not row.case.choices:
        return
    if np.array_equal(outputs[0], expected[0]):
        row.agreed[name] = 1.0
        return
    row.agreed[name] = float(np.mean(exact.margins(row.case, outputs[0]) > 0))
    least = min(LEAST_AGREED.get(name_and_weights(name)[1], 0.0), OVER_NONSENSE / row.case.choices)
    if row.agreed[name] < least:
        row.faults[name] = f"of its symbols float64 would choose {row.agreed[name]:.0%} after the same text"


def tolerance(case: Case) -> float:
    """How far float32 results may be from exact ones, over the largest magnitude: what fastseq promises."""
    return 16 * float(np.finfo(np.float32).eps) * math.ceil(math.log2(2 + case.terms))


def roofs(limits: Limits) -> tuple[dict[int, float], dict[int, float]]:
    """Multiply-adds by threads, and reading by bytes."""
    peaks = {limits.threads: limits.multiply_adds()}
    if limits.threads > 1:
        # Whether more threads have more to give: two virtual processors may be one core.
        with contextlib.closing(Limits(1)) as one:
            peaks = {1: one.multiply_adds(), **peaks}
    reads = {n_bytes: limits.read(n_bytes) for n_bytes in ROOFS}
    limits.forget()
    return peaks, reads


def time_once(row: Row, workers: dict[str, Worker], limits: Limits, turn: int) -> None:
    """One round of a case: the limits, and every engine, each round another one first."""
    multiply_adds, read = limits.multiply_adds(), limits.read(row.case.working_set)
    row.multiply_adds.append(multiply_adds)
    row.read.append(read)
    row.floors.append(row.case.floor(multiply_adds, read))
    names = list(workers)
    first = turn % len(names)
    for name in names[first:] + names[:first]:
        row.seconds.setdefault(name, []).append(workers[name].time())


def processor(source: Path = Path("/proc/cpuinfo")) -> str | None:
    """The name of the processor; None where the system does not say."""
    try:
        lines = source.read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return value.strip()
    return None
