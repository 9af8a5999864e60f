"""Hostile files: each ends in a `ValueError` that names file and place, soon, in little memory; no code of one runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from common import ROOT
from hostile import files

# Reads every file of a list with no more than 64 MB of memory besides those that are in use; a crash ends the output.
READER = """
import json, resource, sys, time
from fastseq import formats
from fastseq.cli import inspect
import fastseq.formats.npz, fastseq.formats.pytorch

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
for path in json.load(open(sys.argv[1])):
    start, error = time.process_time(), None
    print(json.dumps({"path": path}), flush=True)
    try:
        for array in formats.read(path).arrays.values():
            array.sum()
    except BaseException as raised:
        error = raised
    kind = type(error).__mro__[0].__name__ if not isinstance(error, ValueError) else "ValueError"
    print(json.dumps({"kind": kind, "text": str(error), "seconds": time.process_time() - start}), flush=True)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, Any], Path]:
    """The files with the words they should end in, and what the reader said of each."""
    folder = tmp_path_factory.mktemp("hostile")
    expected = dict(files(folder, str(folder / "marker")))
    (folder / "list.json").write_text(json.dumps(list(expected)))
    command = [sys.executable, "-c", READER, str(folder / "list.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0 and not run.stderr, (run.stderr, lines[-1:])
    found = {lines[i]["path"]: lines[i + 1] for i in range(0, len(lines), 2)}
    return expected, found, folder


def test_there_are_enough_and_no_two_are_the_same(corpus: Any) -> None:
    expected, found, _ = corpus
    assert len(expected) >= 60 and found.keys() == expected.keys()


def test_each_ends_in_an_error_that_names_file_and_place(corpus: Any) -> None:
    expected, found, folder = corpus
    wrong = []
    for path, words in expected.items():
        kind, text = found[path]["kind"], found[path]["text"]
        named = re.match(rf"{re.escape(path)}(/[^:]*)?: [^:]+: \S", text)
        if kind != "ValueError" or not named or not re.search(words, text.replace(str(folder), "")) or len(text) > 2000:
            wrong.append((Path(path).name, kind, text[:300], words))
    assert not wrong


def test_each_ends_within_a_second(corpus: Any) -> None:
    _, found, _ = corpus
    assert not {Path(path).name: one["seconds"] for path, one in found.items() if one["seconds"] > 1}


def test_no_code_of_a_file_has_run(corpus: Any) -> None:
    assert not (corpus[2] / "marker").exists()
