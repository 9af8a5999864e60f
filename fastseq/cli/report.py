"""What was measured, and how it is told: as a table, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import geometric_mean, median
from typing import Any

import numpy as np

from fastseq.cli.cases import Case
from fastseq.cli.engines import GREEDY

TITLE = 26  # the width of the first column of the table
SPEED = 9  # and of that of speeds
QUIET = 0.15  # processors that others may use; their time is counted in hundredths of a second


@dataclass
class Row:
    """The measurements of one case. Lists have one entry a round.

    Attributes
    ----------
    case : Case
    errors : dict
        By engine: the largest difference from the float64 reference, over the largest magnitude in it.
    faults : dict
        By engine that was left out: why.
    seconds : dict
        By engine: seconds a call.
    multiply_adds, read, floors : list of float
        The limits measured beside them: operations a second, bytes a second, seconds a call.
    others : float, optional
        How many processors others kept busy meanwhile, where the system says.
    symbols : dict
        By engine, where symbols are chosen: how many of them were compared with those of the float64 reference, of how
        many. They end where two are as good as equally likely and the engine took the other one.
    """

    case: Case
    errors: dict[str, float] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    multiply_adds: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)
    others: float | None = None
    symbols: dict[str, tuple[int, int]] = field(default_factory=dict)

    def has(self, engine: str) -> bool:
        """Whether an engine computes the case, and rightly."""
        return (engine == "fastseq" or engine in self.case.engines) and engine not in self.faults

    @property
    def disturbed(self) -> bool:
        """Whether others took so much that the times say little: threads that wait for each other wait for them."""
        return self.others is not None and self.others > QUIET

    def speed(self, engine: str) -> float:
        """What an engine does a second at the median, in the unit of the case."""
        return self.case.work / median(self.seconds[engine])

    def gflops(self, engine: str) -> float:
        """GFLOP/s at the median."""
        return self.case.flops / median(self.seconds[engine]) / 1e9

    def share(self, engine: str) -> float:
        """How much of the limit an engine reaches: paired by round, the median."""
        return median(floor / time for floor, time in zip(self.floors, self.seconds[engine], strict=True))

    def ratios(self, engine: str) -> list[float]:
        """How many times longer than fastseq an engine takes, round by round."""
        return [peer / ours for peer, ours in zip(self.seconds[engine], self.seconds["fastseq"], strict=True)]

    def quartiles(self, engine: str) -> tuple[float, float]:
        """The spread of `ratios`: half of them lie between these two."""
        low, high = np.percentile(self.ratios(engine), [25, 75])
        return float(low), float(high)


@dataclass
class Report:
    """A whole run.

    Attributes
    ----------
    about : dict
        Versions, machine and settings.
    peaks : dict
        By number of threads: multiply-adds, operations a second.
    reads : dict
        By bytes of a buffer: bytes a second, at the threads of the run.
    rows : list of Row
    """

    about: dict[str, Any]
    peaks: dict[int, float]
    reads: dict[int, float]
    rows: list[Row]

    @property
    def engines(self) -> list[str]:
        """fastseq first, then the others in the order they were asked for."""
        return ["fastseq", *self.about["vs"]]

    def engines_of(self, row: Row) -> list[str]:
        """Those of them that can compute a case."""
        return [engine for engine in self.engines if engine == "fastseq" or engine in row.case.engines]


def table(report: Report) -> str:
    """The report for people."""
    about = report.about
    threads = about["threads"]
    lines = [
        f"fastseq {about['fastseq']}, {about['instruction_set']}, {counted(threads, 'thread')}, float32, "
        f"{counted(about['rounds'], 'round')}" + (f", {about['processor']}" if about["processor"] else ""),
        "beside " + ", ".join(f"{name} {version}" for name, version in about["versions"].items() if name != "fastseq"),
        "multiply-adds: "
        + ", ".join(f"{rate / 1e9:.3g} GFLOP/s on {counted(n, 'thread')}" for n, rate in report.peaks.items()),
        "reading: " + ", ".join(f"{rate / 1e9:.3g} GB/s from {size(n)}" for n, rate in report.reads.items()),
        *about["notes"],
        "",
        f"{report.rows[0].case.axes:{TITLE}}  {'engine':11}  {'median':>8}  {report.rows[0].case.unit:>{SPEED}}"
        f"  {'of limit':>8}"
        f"  {'over fastseq':>12}  quartiles",
    ]
    for row in report.rows:
        title = row.case.name
        for engine in report.engines_of(row):
            lines.append(f"{title:{TITLE}}  {engine:11}  {_cells(row, engine)}".rstrip())
            title = ""
        if row.disturbed:
            lines.append(f"{'':{TITLE}}  disturbed: others kept {row.others:.2f} processors busy meanwhile")
    lines += ["", *_summary(report)]
    return "\n".join(lines)


def _cells(row: Row, engine: str) -> str:
    if engine in row.faults:
        return row.faults[engine]
    cells = f"{duration(median(row.seconds[engine])):>8}  {_number(row.speed(engine)):>{SPEED}}"
    cells += f"  {row.share(engine):8.0%}"
    if engine == "fastseq":
        return cells
    low, high = row.quartiles(engine)
    return f"{cells}  {median(row.ratios(engine)):12.2f}  {low:.2f} to {high:.2f}"


def _summary(report: Report) -> list[str]:
    lines = []
    quiet = [row for row in report.rows if not row.disturbed]
    left_out = len(report.rows) - len(quiet)
    if left_out and quiet:
        lines.append(f"without the {counted(left_out, 'row')} that others disturbed:")
    rows = quiet or report.rows
    others = [engine for engine in report.about["vs"] if engine != GREEDY]
    for engine in others:
        ratios = {row.case: median(row.ratios(engine)) for row in rows if engine in row.seconds}
        lines += _compared(engine, ratios)
    if len(others) > 1:
        fastest = {
            row.case: min(median(row.ratios(engine)) for engine in others if engine in row.seconds)
            for row in rows
            if not row.seconds.keys().isdisjoint(others)
        }
        lines += _compared("the fastest of them", fastest)
    for row in rows:
        if GREEDY in row.seconds:
            times = median(1 / ratio for ratio in row.ratios(GREEDY))
            lines.append(f"{row.case.name} takes {times:.2f} times as long as as many rows that are greedy")
    worst = {
        engine: max(row.errors[engine] for row in report.rows if engine in row.errors)
        for engine in report.engines
        if any(engine in row.errors for row in report.rows)
    }
    if worst:
        said = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
        lines.append(f"largest error against float64: {said}")
    symbols = {
        engine: [row.symbols[engine] for row in report.rows if engine in row.symbols] for engine in report.engines
    }
    if any(symbols.values()):
        said = ", ".join(
            f"{name} {sum(some for some, _ in pairs):,} of {sum(all_ for _, all_ in pairs):,}"
            for name, pairs in symbols.items()
            if pairs
        )
        lines.append(f"symbols as in float64, up to where two are as good as equally likely: {said}")
    return lines


def _compared(engine: str, ratios: Mapping[Case, float]) -> list[str]:
    """How many times longer than fastseq an engine takes, in a line, if it was measured at all."""
    if not ratios:
        return []
    least = min(ratios, key=ratios.__getitem__)
    faster = sum(ratio > 1 for ratio in ratios.values())
    groups: dict[str, list[float]] = {}
    for case, ratio in ratios.items():
        groups.setdefault(case.group, []).append(ratio)
    each = ", ".join(f"{group} {geometric_mean(some):.2f}" for group, some in groups.items())
    return [
        f"{engine} takes {geometric_mean(ratios.values()):.2f} times as long as fastseq (geometric mean"
        f"{f': {each}' if len(groups) > 1 else ''}), at least {ratios[least]:.2f} ({least.name});"
        f" fastseq is faster in {faster} of {len(ratios)}"
    ]


def as_json(report: Report) -> str:
    """The report for programs: every number of every round."""
    rows = []
    for row in report.rows:
        case = row.case
        engines: dict[str, Any] = {}
        for engine in report.engines_of(row):
            engines[engine] = {"error": row.errors.get(engine), "fault": row.faults.get(engine)}
            if engine in row.symbols:
                engines[engine]["symbols_compared"], engines[engine]["symbols"] = row.symbols[engine]
            if engine in row.seconds:
                engines[engine] |= {
                    "seconds": row.seconds[engine],
                    "median": median(row.seconds[engine]),
                    "gflops": row.gflops(engine),
                    "speed": row.speed(engine),
                    "share_of_limit": row.share(engine),
                    "ratio": median(row.ratios(engine)),
                    "ratio_quartiles": row.quartiles(engine),
                }
        rows.append(
            {
                "name": case.name,
                **case.describe(),
                "flops": case.flops,
                "unit": case.unit,
                "others": row.others,
                "limit": {"multiply_adds": row.multiply_adds, "read": row.read, "seconds": row.floors},
                "engines": engines,
            }
        )
    whole = {
        **report.about,
        "multiply_adds": [{"threads": n, "flops_per_second": rate} for n, rate in report.peaks.items()],
        "read": [{"bytes": n, "bytes_per_second": rate} for n, rate in report.reads.items()],
        "cases": rows,
    }
    return json.dumps(whole, indent=2) + "\n"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    factor, unit = next(((f, u) for f, u in ((1, "s"), (1e3, "ms")) if seconds * f >= 1), (1e6, "µs"))
    value = seconds * factor
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def size(n_bytes: float) -> str:
    """Bytes for people."""
    units = ["bytes", "KB", "MB", "GB"]
    while n_bytes >= 1024 and len(units) > 1:
        n_bytes /= 1024
        units.pop(0)
    return f"{n_bytes:.3g} {units[0]}"


def counted(n: int, noun: str) -> str:
    """A number and its noun, in the plural unless it is one."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
