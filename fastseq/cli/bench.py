"""``fastseq bench``: check that the engines agree, time them in turn, and hold them against the machine's limits."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fastseq import _simd, threads
from fastseq.cli import UsageError, attention, decode, encoder, engines, generate, info, language, plot, recurrent
from fastseq.cli.cases import Case
from fastseq.cli.interference import Others
from fastseq.cli.progress import Progress
from fastseq.cli.report import Report, Row, as_json, size, table
from fastseq.cli.roofline import ROOFS, Limits
from fastseq.cli.worker import EngineError, Worker
from fastseq.io import write_whole
from fastseq.version import __version__

# Of the largest magnitude in the result. A gate exchanged or a state dropped costs far more, an approximate tanh less.
PEER_TOLERANCE = 1e-3

# The kinds that are not recurrent layers, and what makes cases of the values of --shape, or the usual ones of none.
MODELS: dict[str, Callable[[Sequence[str]], list[Case]]] = {
    "attention": attention.chosen,
    "encoder": encoder.chosen,
    "train": language.chosen,
    "decode": decode.chosen,
    "generate": generate.chosen,
}


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit status."""
    # All that can be refused is refused before anything is measured.
    cases = chosen_cases(options.kind, options.shape, options.shapes, options.train)
    peers, asked = chosen_engines(options.vs, cases), options.vs is not None
    if options.threads is None:
        n_threads = info.thread_count()[0]
    else:
        n_threads = whole_number("--threads", options.threads, threads.MAX_THREADS)
    rounds = whole_number("--rounds", options.rounds, 10_000)
    check_memory(cases, 2 + len(peers))
    json_file = writable("--json", options.json)
    plot_file = writable("--plot", options.plot)
    if plot_file is not None:
        plot.check(plot_file)

    report = measure(cases, peers, n_threads, rounds, asked)
    if report is None:
        return 1
    print(table(report))
    if json_file is not None:
        write_whole(json_file, as_json(report).encode())
    if plot_file is not None:
        write_whole(plot_file, plot.roofline(report, plot_file.suffix[1:]))
    return 1 if any(row.faults for row in report.rows) else 0


def chosen_cases(kind: str, shapes: Sequence[str], named: str | None, train: bool = False) -> list[Case]:
    """The cases that some options ask for."""
    if kind not in MODELS:
        return recurrent.chosen(recurrent.KINDS if kind == "all" else (kind,), shapes, named, train)
    for option, given in (("--train", train), ("--shapes", named is not None)):
        if given:
            raise UsageError(f"{option} is for recurrent layers, not for --kind {kind}")
    return MODELS[kind](shapes)


def chosen_engines(text: str | None, cases: Sequence[Case]) -> list[str]:
    """The engines that --vs names; without it those that are usual for the cases and installed."""
    if text is None:
        usual = [name for name in engines.NEEDS if any(name in case.usual for case in cases)]
        return [name for name in usual if not lacking(name, cases)]
    able = [name for name in engines.NEEDS if any(name in case.engines for case in cases)]
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in able:
            raise UsageError(
                f"--vs should name some of {', '.join(able)}, which can do what is asked for, not {name!r}"
            )
    for name in names:
        missing = lacking(name, cases)
        if missing:
            raise UsageError(f"--vs {name} needs {' and '.join(missing)}, which is not installed")
    return names


def lacking(engine: str, cases: Sequence[Case]) -> list[str]:
    """The modules that are not installed and without which an engine cannot do some of the cases it could do."""
    needed = [module for case in cases if engine in case.engines for module in case.needs(engine)]
    return engines.missing(engine, needed)


def whole_number(option: str, text: str, limit: int) -> int:
    """The value of an option, from 1 to `limit`."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or not 1 <= int(text) <= limit:
        raise UsageError(f"{option} should be a whole number from 1 to {limit}, not {text!r}")
    return int(text)


def check_memory(cases: Sequence[Case], n_engines: int) -> None:
    """Refuse what the machine cannot hold: to run out of memory ends processes, not always ours."""
    try:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return
    needed = max(case.memory(n_engines) for case in cases)
    if needed > available:
        raise UsageError(f"--shape asks for about {size(needed)} of memory, and this machine has {size(available)}")


def writable(option: str, text: str | None) -> Path | None:
    """The path an option names, if a file can be put there."""
    if text is None:
        return None
    path = Path(text)
    try:
        if path.is_dir():
            raise UsageError(f"{option} should name a file, but {text} is a directory")
        if path.exists() and not path.is_file():
            # It will be replaced by renaming, which must not happen to a device.
            raise UsageError(f"{option} should name a plain file, which {text} is not")
        target = path.resolve()
        if not os.access(target if target.exists() else target.parent, os.W_OK) or not target.parent.is_dir():
            raise UsageError(f"{option}: {text} cannot be written")
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{option}: {text!r} cannot be written: {error}") from None
    return path


def measure(
    cases: Sequence[Case],
    peers: list[str],
    n_threads: int,
    rounds: int,
    asked: bool,
) -> Report | None:
    """Check, then time. None where fastseq or an engine that was asked for failed; that is told on standard error.

    Parameters
    ----------
    cases : sequence of Case
    peers : list of str
        The engines to stand beside fastseq.
    n_threads, rounds : int
    asked : bool
        Whether somebody named the peers: one that cannot start is left out otherwise.
    """
    rows = [Row(case) for case in cases]
    with contextlib.ExitStack() as stack:
        starts = 1 + len(peers)
        steps = starts + len(cases) + 1 + rounds * len(cases)
        progress = stack.enter_context(Progress(steps))
        try:
            workers: dict[str, Worker] = {}
            for name in ["fastseq", *peers]:
                progress.advance(f"starting {name}")
                try:
                    workers[name] = stack.enter_context(contextlib.closing(Worker(name, n_threads)))
                except EngineError as error:
                    if asked or name == "fastseq":
                        raise
                    complain(f"left out {error}")
            with contextlib.closing(Worker("exact", n_threads)) as exact:  # it ends before anything is timed
                check_parity(rows, workers, exact, progress)
            progress.advance("measuring the limits")
            limits = stack.enter_context(contextlib.closing(Limits(n_threads)))
            peaks, reads = roofs(limits)
            for row in rows:
                measured = {name: worker for name, worker in workers.items() if row.has(name)}
                for worker in measured.values():
                    worker.build(row.case)
                others = Others(worker.pid for worker in workers.values())
                for turn in range(rounds):
                    progress.advance(f"timing {row.case.name}, round {turn + 1} of {rounds}")
                    time_once(row, measured, limits, turn)
                row.others = others.processors()
                limits.forget()
        except EngineError as error:
            complain(str(error))
            return None
    about = {
        "fastseq": __version__,
        "instruction_set": _simd.chosen,
        "openmp": _simd.openmp,
        "threads": n_threads,
        "rounds": rounds,
        "dtype": "float32",
        "notes": list(dict.fromkeys(note for case in cases for note in case.notes)),
        "vs": [name for name in peers if name in workers],
        "versions": {name: worker.version for name, worker in workers.items()},
        "processor": info.processor(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return Report(about, peaks, reads, rows)


def check_parity(rows: Sequence[Row], workers: dict[str, Worker], exact: Worker, progress: Progress) -> None:
    """Compare every engine with the float64 reference; what differs is left out, and fastseq must not."""
    for row in rows:
        progress.advance(f"checking {row.case.name}")
        expected = exact.check(row.case)
        for name, worker in workers.items():
            if name != "fastseq" and name not in row.case.engines:
                continue
            try:
                outputs = worker.check(row.case)
            except EngineError as failure:
                if name == "fastseq":
                    raise
                row.faults[name] = f"failed: {failure}"
                continue
            allowed = tolerance(row.case) if name == "fastseq" else PEER_TOLERANCE
            verdict = row.case.compare(name, outputs, expected, allowed)
            if verdict.error is not None:
                row.errors[name] = verdict.error
            if verdict.symbols is not None:
                row.symbols[name] = verdict.symbols
            if verdict.fault is not None:
                row.faults[name] = verdict.fault
                if name == "fastseq":
                    raise EngineError(f"fastseq: {row.case.name} {verdict.fault}, more than {verdict.allowed:.1e}")


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


def complain(message: str) -> None:
    """Tell something on standard error, away from the progress line."""
    over = "\r\x1b[K" if sys.stderr.isatty() else ""  # what stands there is the progress line
    print(f"{over}fastseq bench: {message}", file=sys.stderr)
