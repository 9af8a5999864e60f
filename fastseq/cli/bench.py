"""``fastseq bench``: read the options, run the benchmark, print and write what it measured."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from fastseq import threads
from fastseq.bench import UsageError, engines, runner
from fastseq.bench.cases import Case, attention, decode, encoder, generate, language, named, recurrent
from fastseq.bench.report import Report, as_json
from fastseq.bench.worker import EngineError
from fastseq.cli import info, plot
from fastseq.cli.files import writable
from fastseq.cli.progress import Progress
from fastseq.cli.table import size, table
from fastseq.io import write_whole
from fastseq.narrow import TYPES

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
    weights, asked = chosen_weights(options.weights, cases), options.vs is not None
    peers = with_weights(chosen_engines(options.vs, cases), weights, cases, asked)
    if options.threads is None:
        n_threads = info.thread_count()[0]
    else:
        n_threads = whole_number("--threads", options.threads, threads.MAX_THREADS)
    rounds = whole_number("--rounds", options.rounds, 10_000)
    check_memory(cases, 1 + len(weights) + len(peers))
    json_file, plot_file = (
        None if text is None else writable(option, text)
        for option, text in (("--json", options.json), ("--plot", options.plot))
    )
    if plot_file is not None:
        if weights != ["float32"]:
            raise UsageError(f"--plot draws float32, not --weights {options.weights}")
        plot.check(plot_file)

    report = measure(cases, peers, n_threads, rounds, asked, weights)
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


def chosen_weights(text: str | None, cases: Sequence[Case]) -> list[str]:
    """The types of weights that --weights names; without it float32."""
    if text is None:
        return ["float32"]
    types = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in types:
        if name not in TYPES:
            raise UsageError(f"--weights should name some of {', '.join(TYPES)}, not {name!r}")
        if name != "float32" and not all(case.narrow for case in cases):
            raise UsageError(f"--weights {name} is for inference with recurrent layers, encoders and language models")
    return types


def with_weights(names: Sequence[str], weights: Sequence[str], cases: Sequence[Case], asked: bool) -> list[str]:
    """The engines, each with every type of weights with which it can compute some of the cases.

    The reference has narrow weights only where somebody asked for it: they are those of fastseq, and it takes long.
    """
    peers: list[str] = []
    for name in names:
        types = weights if asked or name != "reference" else [each for each in weights if each == "float32"]
        able = [named(name, each) for each in types]
        able = [engine for engine in able if any(case.computed_by(engine) for case in cases)]
        if asked and not able:
            raise UsageError(f"--vs {name} has no {' or '.join(weights)} weights for what is asked for")
        peers += able
    return peers


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


def measure(
    cases: Sequence[Case], peers: list[str], n_threads: int, rounds: int, asked: bool, weights: Sequence[str]
) -> Report | None:
    """Check, then time, with a progress line; None after an error message where that fails."""
    with Progress(runner.n_steps(len(cases), len(weights) + len(peers), rounds)) as progress:
        try:
            return runner.measure(cases, peers, n_threads, rounds, asked, progress.advance, complain, weights)
        except EngineError as error:
            complain(str(error))
            return None


def complain(message: str) -> None:
    """Print a message on standard error, over the progress line."""
    over = "\r\x1b[K" if sys.stderr.isatty() else ""  # what stands there is the progress line
    print(f"{over}fastseq bench: {message}", file=sys.stderr)
