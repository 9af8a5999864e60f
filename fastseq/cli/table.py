"""The report of a benchmark as a table, and numbers with their units."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import geometric_mean, median

from fastseq.bench.cases import Case, name_and_weights
from fastseq.bench.engines import GREEDY
from fastseq.bench.report import Report, Row, is_narrow

TITLE = 26  # the width of the first column of the table
ENGINE = 11  # that of engines, unless a name is longer
SPEED = 9  # and of that of speeds


def table(report: Report) -> str:
    """Format a report as a table with a summary."""
    about = report.about
    threads = about["threads"]
    width = max(ENGINE, *map(len, report.engines))
    weights = " and ".join(about.get("weights", ["float32"]))
    lines = [
        f"fastseq {about['fastseq']}, {about['instruction_set']}, {counted(threads, 'thread')}, {weights}, "
        f"{counted(about['rounds'], 'round')}" + (f", {about['processor']}" if about["processor"] else ""),
        "beside "
        + ", ".join(
            f"{name} {version}"
            for name, version in {name_and_weights(name)[0]: text for name, text in about["versions"].items()}.items()
            if name != "fastseq"
        ),
        "multiply-adds: "
        + ", ".join(f"{rate / 1e9:.3g} GFLOP/s on {counted(n, 'thread')}" for n, rate in report.peaks.items()),
        "reading: " + ", ".join(f"{rate / 1e9:.3g} GB/s from {size(n)}" for n, rate in report.reads.items()),
        *about["notes"],
        *(_meanings(report) if report.narrow else []),
        "",
        f"{report.rows[0].case.axes:{TITLE}}  {'engine':{width}}  {'median':>8}  {report.rows[0].case.unit:>{SPEED}}"
        f"  {'of limit':>8}"
        + (f"  {'error':>8}" if report.narrow else "")
        + f"  {'over ' + report.own[0]:>12}  quartiles",
    ]
    for row in report.rows:
        title = row.case.name
        for engine in report.engines_of(row):
            cells = _cells(row, engine, report.narrow)
            lines.append(f"{title:{TITLE}}  {engine:{width}}  {cells}".rstrip())
            title = ""
        if row.disturbed:
            lines.append(f"{'':{TITLE}}  disturbed: others kept {row.others:.2f} processors busy meanwhile")
    lines += ["", *_summary(report)]
    return "\n".join(lines)


def _meanings(report: Report) -> list[str]:
    """What the columns of errors and of the limit mean, where weights are narrow."""
    meanings = dict.fromkeys(row.case.error_means for row in report.rows)
    return [f"error against float64: {'; '.join(meanings)}", "the limit is that of float32, and told of float32 alone"]


def _cells(row: Row, engine: str, narrow: bool) -> str:
    left_out = row.faults.get(engine, row.not_narrow.get(engine))
    if left_out is not None:
        return left_out
    cells = f"{duration(median(row.seconds[engine])):>8}  {_number(row.speed(engine)):>{SPEED}}"
    cells += f"  {'' if is_narrow(engine) else format(row.share(engine), '.0%'):>8}"
    if narrow:
        cells += f"  {_error(row, engine):>8}"
    if engine == row.base:
        return cells
    low, high = row.quartiles(engine)
    return f"{cells}  {median(row.ratios(engine)):12.2f}  {low:.2f} to {high:.2f}"


def _error(row: Row, engine: str) -> str:
    """The error that stands beside a time: of numbers, or how many symbols float64 agrees to."""
    error = row.error(engine)
    if error is not None:
        return f"{error:.1e}"
    return f"{row.agreed[engine]:.1%}" if engine in row.agreed else ""


def _summary(report: Report) -> list[str]:
    lines = []
    quiet = [row for row in report.rows if not row.disturbed]
    left_out = len(report.rows) - len(quiet)
    if left_out and quiet:
        lines.append(f"without the {counted(left_out, 'row')} that others disturbed:")
    rows = quiet or report.rows
    others = [engine for engine in report.about["vs"] if engine != GREEDY]
    for engine in report.own[1:]:
        ratios = {row.case: median(row.ratios(engine)) for row in rows}
        most = max(ratios, key=ratios.__getitem__)
        lines.append(f"{engine} takes {_mean(ratios, report.own[0])}, at most {ratios[most]:.2f} ({most.name})")
    for engine in others:
        ratios = {row.case: median(row.ratios(engine)) for row in rows if engine in row.seconds}
        lines += _compared(engine, ratios, report.own[0])
    if len(others) > 1:
        fastest = {
            row.case: min(median(row.ratios(engine)) for engine in others if engine in row.seconds)
            for row in rows
            if not row.seconds.keys().isdisjoint(others)
        }
        lines += _compared("the fastest of them", fastest, report.own[0])
        if len(report.own) > 1:
            ours = {row.case: min(median(row.ratios(engine)) for engine in report.own) for row in rows}
            ratios = {case: ratio / ours[case] for case, ratio in fastest.items()}
            lines += _compared("the fastest of them", ratios, "the fastest of fastseq's")
    for row in rows:
        if GREEDY in row.seconds:
            times = median(1 / ratio for ratio in row.ratios(GREEDY))
            lines.append(f"{row.case.name} takes {times:.2f} times as long as as many rows that are greedy")
    worst = {
        engine: max(errors)
        for engine in report.engines
        if (errors := [error for row in report.rows if (error := row.error(engine)) is not None])
    }
    if worst:
        said = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
        lines.append(f"largest error against float64: {said}")
    symbols = {
        engine: [row.symbols[engine] for row in report.rows if engine in row.symbols]
        for engine in report.engines
        if not is_narrow(engine)
    }
    if any(symbols.values()):
        said = ", ".join(
            f"{name} {sum(some for some, _ in pairs):,} of {sum(all_ for _, all_ in pairs):,}"
            for name, pairs in symbols.items()
            if pairs
        )
        lines.append(f"symbols as in float64, up to where two are as good as equally likely: {said}")
    return lines


def _compared(engine: str, ratios: Mapping[Case, float], base: str) -> list[str]:
    """How many times longer than `base` an engine takes, in a line, if it was measured at all."""
    if not ratios:
        return []
    least = min(ratios, key=ratios.__getitem__)
    faster = sum(ratio > 1 for ratio in ratios.values())
    return [
        f"{engine} takes {_mean(ratios, base)}, at least {ratios[least]:.2f} ({least.name});"
        f" {base} is faster in {faster} of {len(ratios)}"
    ]


def _mean(ratios: Mapping[Case, float], base: str) -> str:
    """The geometric mean of ratios to `base`, and those of the groups of cases where there are several."""
    groups: dict[str, list[float]] = {}
    for case, ratio in ratios.items():
        groups.setdefault(case.group, []).append(ratio)
    each = ", ".join(f"{group} {geometric_mean(some):.2f}" for group, some in groups.items())
    return (
        f"{geometric_mean(ratios.values()):.2f} times as long as {base}"
        f" (geometric mean{f': {each}' if len(groups) > 1 else ''})"
    )


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Format seconds with a unit."""
    factor, unit = next(((f, u) for f, u in ((1, "s"), (1e3, "ms")) if seconds * f >= 1), (1e6, "µs"))
    value = seconds * factor
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def size(n_bytes: float) -> str:
    """Format bytes with a unit."""
    units = ["bytes", "KB", "MB", "GB"]
    while n_bytes >= 1024 and len(units) > 1:
        n_bytes /= 1024
        units.pop(0)
    return f"{n_bytes:.3g} {units[0]}"


def counted(n: int, noun: str) -> str:
    """Format a number with its noun, in the plural unless it is one."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
