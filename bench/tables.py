"""Write the tables of README.md and docs/ from the JSON files of ``fastseq bench --json``.

    python bench/tables.py            # writes them
    python bench/tables.py --check    # exit status 1 if a table is not what would be written

A table stands between two comments; the first names a file beside the page and, if not all cases are wanted, their
names::

    <!-- table of benchmarks/lstm.json: LSTM 1×100×256×256, LSTM 32×100×128×256 -->
    <!-- end of table -->

A file of ``bench/accuracy.py`` gives the table of its tasks in the same way. A file of ``fastseq bench`` is one run, so
its table is of one machine and one date. Ratios say how many times longer an engine takes than
fastseq: the median of the rounds, and its quartiles. A run with narrow weights gives the time of every engine, and its
error against float64.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import accuracy

from fastseq.cli.table import counted, duration

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- table of (\S+?\.json)(?:: (.*?))? -->\n).*?(<!-- end of table -->)", re.S)


def pages(root=ROOT):
    """The pages that may have tables."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def table(run, names=None):
    """The table of a run, as Markdown, and the line that says where and when it was measured."""
    cases = {case["name"]: case for case in run["cases"]}
    missing = [name for name in names or () if name not in cases]
    if missing:
        raise SystemExit(f"there is no case {', '.join(missing)} in the run of {run['date']}")
    chosen = [cases[name] for name in names or cases]
    if run.get("weights", ["float32"]) != ["float32"]:
        return narrow_table(run, chosen)
    peers = [engine for engine in run["vs"] if any("ratio" in case["engines"].get(engine, {}) for case in chosen)]
    head = ["case", "fastseq", chosen[0]["unit"], "of limit", *peers]
    lines = [*conditions(run, peers, "float32"), f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for case in chosen:
        ours = case["engines"]["fastseq"]
        cells = [case["name"], duration(ours["median"]), f"{ours['speed']:,.3g}", f"{ours['share_of_limit']:.0%}"]
        cells += [ratio(case["engines"].get(peer, {})) for peer in peers]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def conditions(run, peers, weights):
    """Where, when and with what a run was measured, and an empty line."""
    engines = dict.fromkeys(name.split()[0] for name in peers)  # "torch int8" is torch
    measured = [
        f"{run['date']}, fastseq {run['fastseq']} on {run['instruction_set']}, {counted(run['threads'], 'thread')},"
        f" {weights}, {counted(run['rounds'], 'round')}, {run['processor'] or 'unknown processor'}",
        *(f"{name} {run['versions'][name]}" for name in engines if name not in ("reference", "fastseq")),
    ]
    return f"{', '.join(measured)}.", ""


def narrow_table(run, cases):
    """The table of a run with narrow weights: of each engine its time, and its error in parentheses."""
    own = ["fastseq", *(f"fastseq {weights}" for weights in run["weights"] if weights != "float32")]
    names = [*own, *(name for name in run["vs"] if name != "reference" and name not in own)]
    names = [name for name in names if any("median" in case["engines"].get(name, {}) for case in cases)]
    lines = [
        *conditions(run, names, "types as named"),
        f"| case | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for case in cases:
        cells = [case["name"]]
        for name in names:
            of = case["engines"].get(name, {})
            cells.append(f"{duration(of['median'])} ({of['error']:.1e})" if "median" in of else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ratio(measured):
    """How many times longer an engine takes; empty where it was not measured."""
    if "ratio" not in measured:
        return ""
    low, high = measured["ratio_quartiles"]
    return f"{measured['ratio']:.2f}× ({low:.2f}–{high:.2f})"


def written(page):
    """A page with its tables as the files give them."""

    def one(found):
        begin, file, names, end = found.groups()
        run = json.loads((page.parent / file).read_text())
        make = accuracy.table if "tasks" in run else table
        return f"{begin}{make(run, names and [name.strip() for name in names.split(',')])}{end}"

    return TABLE.sub(one, page.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; say which pages are not up to date")
    options = parser.parse_args()
    old = [page for page in pages() if written(page) != page.read_text()]
    for page in old:
        print(f"{page.relative_to(ROOT)}: {'not up to date' if options.check else 'written'}")
        if not options.check:
            page.write_text(written(page))
    return int(options.check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
