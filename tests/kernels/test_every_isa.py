"""Runs modules for the instruction sets that this process does not use.

Those marked `every_isa` for each set that has kernels of reals of its own, those marked `every_narrow_isa` for all.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from common import ROOT, child_environment, run_python

from fastseq import _simd

REALS = ("baseline", "avx2", "avx512")  # sets with kernels of reals of their own


def run_marked(mark: str, isa: str) -> None:
    """Run the tests of a mark in a process of their own."""
    if isa not in _simd.available:
        pytest.skip(f"this machine lacks {isa}")
    # The NumPy engine knows no instruction set.
    compiled = "not (-reference] or [reference- or [reference])"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", mark, "-k", compiled]
    result = subprocess.run(
        [*command, str(ROOT / "tests")],
        env=child_environment(FASTSEQ_ISA=isa),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"with FASTSEQ_ISA={isa}:\n{result.stdout[-20000:]}\n{result.stderr[-4000:]}"
    assert " passed" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("isa", [name for name in REALS if name != _simd.chosen_reals])
def test_every_isa(isa: str) -> None:
    run_marked("every_isa", isa)


@pytest.mark.slow
@pytest.mark.parametrize("isa", [name for name in _simd.NAMES if name != _simd.chosen])
def test_every_narrow_isa(isa: str) -> None:
    run_marked("every_narrow_isa", isa)


def test_sets_with_kernels_of_reals() -> None:
    assert _simd.available_reals == tuple(name for name in _simd.available if name in REALS)
    assert _simd.chosen_reals in _simd.available_reals


@pytest.mark.parametrize("isa", _simd.available)
def test_forced(isa: str) -> None:
    out = run_python("from fastseq import _simd; print(_simd.chosen, _simd.lanes)", FASTSEQ_ISA=isa).stdout
    assert out.split()[0] == isa


def test_the_widest_set_is_the_default() -> None:
    code = "import os; os.environ.pop('FASTSEQ_ISA', None); from fastseq import _simd; print(_simd.chosen)"
    assert run_python(code).stdout.strip() == _simd.available[-1]


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", "", *(n for n in _simd.NAMES if n not in _simd.available)])
def test_unknown_or_unavailable_set_is_an_import_error(isa: str) -> None:
    code = """
    try:
        import fastseq
    except ImportError as error:
        print(error)
    else:
        raise SystemExit("imported")
    """
    message = run_python(code, FASTSEQ_ISA=isa).stdout
    assert repr(isa) in message
    assert all(name in message for name in _simd.available)
