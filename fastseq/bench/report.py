"""Measurements of a run, and their JSON form."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from fastseq.bench.cases import Case, name_and_weights, named

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
    base : str
        What the others are compared with: fastseq with the first of the types of weights.
    not_narrow : dict
        By engine that has no narrow weights for the case: what it says instead.
    differences : dict
        By engine, where weights are narrow and the case tells it: the largest difference itself.
    agreed : dict
        By engine, where weights are narrow and symbols are chosen: the share of those that the float64 reference would
        choose, too, after the same text.
    alike : dict
        By engine, where symbols are chosen: how many rows of symbols are those of the reference, of how many.
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
    base: str = "fastseq"
    not_narrow: dict[str, str] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    agreed: dict[str, float] = field(default_factory=dict)
    alike: dict[str, tuple[int, int]] = field(default_factory=dict)

    def has(self, engine: str) -> bool:
        """Whether an engine computes the case, and rightly."""
        return self.case.computed_by(engine) and engine not in self.faults and engine not in self.not_narrow

    def error(self, engine: str) -> float | None:
        """What is told as the error of an engine, of numbers."""
        return self.differences.get(engine, self.errors.get(engine))

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
        return [peer / ours for peer, ours in zip(self.seconds[engine], self.seconds[self.base], strict=True)]

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
        return [*self.own, *self.about["vs"]]

    @property
    def own(self) -> list[str]:
        """fastseq, with each type of weights."""
        return [named("fastseq", weights) for weights in self.about.get("weights", ["float32"])]

    @property
    def narrow(self) -> bool:
        """Whether some engine has narrow weights, so that errors stand beside times."""
        return any(is_narrow(engine) for engine in self.engines)

    def engines_of(self, row: Row) -> list[str]:
        """Those of them that can compute a case."""
        return [engine for engine in self.engines if row.case.computed_by(engine)]


def is_narrow(engine: str) -> bool:
    """Whether the name of an engine says that its weights are narrow."""
    return name_and_weights(engine)[1] != "float32"


def as_json(report: Report) -> str:
    """Format a report as JSON, with every number of every round."""
    rows = []
    for row in report.rows:
        case = row.case
        engines: dict[str, Any] = {}
        for engine in report.engines_of(row):
            engines[engine] = {"error": row.errors.get(engine), "fault": row.faults.get(engine)}
            if engine in row.symbols:
                engines[engine]["symbols_compared"], engines[engine]["symbols"] = row.symbols[engine]
            if report.narrow:
                engines[engine] |= _with_narrow(row, engine)
            if engine in row.seconds:
                engines[engine] |= {
                    "seconds": row.seconds[engine],
                    "median": median(row.seconds[engine]),
                    "gflops": row.gflops(engine),
                    "speed": row.speed(engine),
                    # The limit is that of float32.
                    "share_of_limit": None if is_narrow(engine) else row.share(engine),
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


def _with_narrow(row: Row, engine: str) -> dict[str, Any]:
    """What JSON says of an engine besides, where narrow weights were asked for."""
    said: dict[str, Any] = {"weights": name_and_weights(engine)[1]}
    if engine in row.not_narrow:
        said["not_narrow"] = row.not_narrow[engine]
    if engine in row.differences:
        said["largest_difference"] = row.differences[engine]
    if engine in row.alike:
        said["rows_alike"], said["rows"] = row.alike[engine]
    if engine in row.agreed:
        said["share_agreed"] = row.agreed[engine]
    return said
