"""``fastseq info``: what is installed, and what it found on this machine."""

from __future__ import annotations

import platform

import numpy as np

from fastseq import _simd, threads
from fastseq.bench import UsageError
from fastseq.bench.runner import processor
from fastseq.version import __version__


def thread_count() -> tuple[int, str]:
    """The number of threads fastseq would use and where it came from; a `UsageError` if it is set wrongly."""
    try:
        return threads.explain()
    except ValueError as error:
        raise UsageError(str(error)) from None


def run() -> None:
    """Print it, one fact a line."""
    count, source = thread_count()
    facts = {
        "fastseq": __version__,
        "instruction set": f"{_simd.chosen} (this machine has {', '.join(_simd.available)})",
        **{f"{name} weights": instructions for name, instructions in _simd.narrow_instructions.items()},
        "OpenMP": "yes" if _simd.openmp else "no: everything runs on one thread",
        "threads": f"{count} (from {source})",
        "NumPy": np.__version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }
    name = processor()
    if name is not None:
        facts["processor"] = name
    width = max(map(len, facts))
    for fact, value in facts.items():
        print(f"{fact:{width}}  {value}")
