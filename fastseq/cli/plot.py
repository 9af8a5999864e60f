"""The roofline: operations a second over operations for each byte read, under the measured limits."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from fastseq.bench import UsageError
from fastseq.bench.report import Report, Row
from fastseq.cli.table import size

INK, FAINT = "#22262b", "#9aa3ad"
# Colours that people who do not see red or green can tell apart, each with a marker of its own.
STYLES = {
    "fastseq": ("#d55e00", "o"),
    "reference": ("#8a8f98", "X"),
    "torch": ("#0072b2", "s"),
    "onnxruntime": ("#009e73", "^"),
    "openvino": ("#b5579a", "D"),
    "ctranslate2": ("#e3b505", "v"),
    "llamacpp": ("#56b4e9", "P"),
    "greedy": ("#8a8f98", "d"),
}
LABELS = 0.3  # of the height of a panel, at its foot


def check(path: Path) -> None:
    """Refuse what cannot be drawn: without matplotlib, or in a format it does not write."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed")
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UsageError(f"--plot should end in one of {', '.join(sorted(formats))}, not {path.suffix or path.name!r}")


def roofline(report: Report, file_format: str) -> bytes:
    """Draw a report.

    Parameters
    ----------
    report : Report
    file_format : str
        One that matplotlib writes: ``"png"``, ``"svg"``, ``"pdf"``.

    Returns
    -------
    bytes
        What belongs into the file.
    """
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(row.case.group for row in report.rows))
    intensities = [row.case.intensity for row in report.rows]
    left, right = min(intensities) / 8, max(intensities) * 2.5
    peak = report.peaks[report.about["threads"]] / 1e9
    speeds = [row.gflops(engine) for row in report.rows for engine in row.seconds]
    top = max(peak, *speeds) * 2
    bottom = top / (top / (min(speeds) * 0.8)) ** (1 / (1 - LABELS))

    figure = Figure(figsize=(5.2 * len(groups) + 0.8, 6.2), dpi=160, layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    slopes = []
    for panel, group in zip(panels, groups, strict=True):
        panel.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
        _decorate(panel, group)
        slopes += _roofs(panel, peak, report.reads, left, right)
        _points(panel, [row for row in report.rows if row.case.group == group], report.engines)
    panels[0].set_ylabel("GFLOP/s", color=INK)

    about = report.about
    threads = f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}"
    where = ", ".join(filter(None, [about["processor"], about["instruction_set"], threads, about["dtype"]]))
    trains = {row.case.train for row in report.rows}
    done = "Inference and training" if len(trains) > 1 else "Training" if True in trains else "Inference"
    # About so many characters of this size stand beside each other.
    title = fill(f"{done} on {where}", int(9.5 * figure.get_figwidth()))
    figure.suptitle(title, color=INK, fontsize=13)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = min(len(labels), 4 * len(groups))
    # They were drawn last first.
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=columns, frameon=False)
    figure.draw_without_rendering()  # lays the panels out; only then is it known how steep a slope is
    for label in slopes:
        (x0, y0), (x1, y1) = label.axes.transData.transform([(1, 1), (10, 10)])
        label.set_rotation(math.degrees(math.atan2(y1 - y0, x1 - x0)))
    data = io.BytesIO()
    figure.savefig(data, format=file_format)
    return data.getvalue()


def _decorate(panel: Any, title: str) -> None:
    from matplotlib.ticker import FuncFormatter

    panel.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold")
    panel.set_xlabel("floating-point operations for each byte read", color=INK)
    panel.grid(which="major", color="#e8ebee", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(colors=INK, which="both")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _roofs(panel: Any, peak: float, reads: dict[int, float], left: float, right: float) -> list[Any]:
    """The level roof of multiply-adds, and slopes for sizes of buffer; returns the labels of the slopes."""
    panel.hlines(peak, left, right, color=INK, linewidth=1.6)
    panel.annotate(
        f"multiply-adds: {peak:.3g} GFLOP/s", (right, peak), (-4, 4), textcoords="offset points", ha="right", color=INK
    )
    labels, below = [], 0.0
    for n_bytes, rate in sorted(reads.items(), key=lambda item: item[1]):
        slope = rate / 1e9
        # Caches of about one speed would be one line with two labels.
        if slope < 1.3 * below or peak / slope <= left:
            continue
        below, end = slope, min(peak / slope, right)
        panel.plot([left, end], [left * slope, end * slope], color=FAINT, linewidth=1.2)
        labels.append(
            panel.annotate(
                f"read from {size(n_bytes)}: {slope:.3g} GB/s",
                (left, left * slope),
                (6, 9),
                textcoords="offset points",
                rotation_mode="anchor",
                fontsize=7.5,
                color="#6c757f",
            )
        )
    return labels


def _points(panel: Any, rows: Sequence[Row], engines: Sequence[str]) -> None:
    """A point for each engine, those of a shape on one stem, and the name of the shape at its foot."""
    rows = sorted(rows, key=lambda row: row.case.intensity)
    to_axes = panel.transData + panel.transAxes.inverted()
    wanted = [float(to_axes.transform((row.case.intensity, 1.0))[0]) for row in rows]
    for row, place in zip(rows, spread(wanted, 0.042), strict=True):
        x, speeds = row.case.intensity, [row.gflops(engine) for engine in row.seconds]
        panel.vlines(x, min(speeds), max(speeds), color=FAINT, linewidth=0.8, zorder=2)
        panel.annotate(
            row.case.label,
            (x, min(speeds)),
            (place, LABELS - 0.035),
            textcoords="axes fraction",
            rotation=90,
            ha="center",
            va="top",
            fontsize=8,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.8, "shrinkA": 2, "shrinkB": 0},
        )
    for engine in reversed(engines):  # fastseq last, above the others
        color, marker = STYLES[engine]
        ours = engine == "fastseq"
        measured = [row for row in rows if engine in row.seconds]
        panel.scatter(
            [row.case.intensity for row in measured],
            [row.gflops(engine) for row in measured],
            s=70 if ours else 30,
            color=color,
            marker=marker,
            edgecolors="white",
            linewidths=0.8,
            zorder=4 if ours else 3,
            label=engine,
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places at least `gap` apart, as near to the wanted ones as can be.

    Parameters
    ----------
    wanted : sequence of float
        In ascending order.
    gap : float
    """
    # Without the gaps the places have only to ascend: those that do not are moved together to their mean.
    groups: list[list[float]] = []
    for i, place in enumerate(wanted):
        groups.append([place - i * gap])
        while len(groups) > 1 and sum(groups[-2]) / len(groups[-2]) > sum(groups[-1]) / len(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    level = [sum(group) / len(group) for group in groups for _ in group]
    return [place + i * gap for i, place in enumerate(level)]
