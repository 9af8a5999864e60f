"""The tables of README.md and docs/ are what bench/tables.py writes from the JSON files beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from common import ROOT

from fastseq.bench.cases.recurrent import Recurrent
from fastseq.bench.report import Report, Row, as_json

sys.path.append(str(ROOT / "bench"))

import tables


@pytest.fixture
def run() -> dict[str, Any]:
    """A run of two cases beside two engines, one of which was not measured in one of them."""
    rows = []
    for hidden, peers in ((8, ["torch", "openvino"]), (16, ["torch"])):
        times = {"fastseq": [1e-3, 1e-3, 1e-3], **{peer: [2e-3, 3e-3, 4e-3] for peer in peers}}
        rows.append(Row(Recurrent("lstm", 1, 2, 3, hidden), seconds=times, floors=[5e-4, 5e-4, 5e-4]))
    about = {"date": "2026-11-30", "fastseq": "0", "instruction_set": "avx2", "threads": 1, "rounds": 3}
    about |= {"processor": "a processor", "vs": ["torch", "openvino"], "versions": {"torch": "2", "openvino": "3"}}
    told: dict[str, Any] = json.loads(as_json(Report(about, {1: 1e9}, {1024: 1e9}, rows)))
    return told


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tables_are_up_to_date(page: Path) -> None:
    assert tables.written(page) == page.read_text()


def test_a_table_is_of_one_run(run: dict[str, Any]) -> None:
    lines = tables.table(run).splitlines()
    assert lines[0] == ("2026-11-30, fastseq 0 on avx2, 1 thread, float32, 3 rounds, a processor, torch 2, openvino 3.")
    assert lines[2] == "| case | fastseq | GFLOP/s | of limit | torch | openvino |"
    assert lines[4].startswith("| LSTM 1×2×3×8 | 1.00 ms | ")
    assert lines[4].endswith(" | 50% | 3.00× (2.50–3.50) | 3.00× (2.50–3.50) |")
    assert lines[5].endswith(" | 50% | 3.00× (2.50–3.50) |  |")
    assert "openvino" not in tables.table(run, ["LSTM 1×2×3×16"])
    with pytest.raises(SystemExit, match="no case GRU"):
        tables.table(run, ["GRU"])


def test_what_stands_between_the_comments_is_replaced(run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one.json").write_text(json.dumps(run))
    page = tmp_path / "page.md"
    begin, end = "<!-- table of runs/one.json: LSTM 1×2×3×16 -->\n", "<!-- end of table -->"
    page.write_text(f"before\n\n{begin}an old figure\n{end}\n\nafter\n")
    assert tables.written(page) == f"before\n\n{begin}{tables.table(run, ['LSTM 1×2×3×16'])}{end}\n\nafter\n"
    page.write_text(tables.written(page))
    assert tables.written(page) == page.read_text()
