"""How many threads a call may use: the one place that decides it.

In this order: what `set_num_threads` was given, the environment variable ``FASTSEQ_NUM_THREADS``, the
environment variable ``OMP_NUM_THREADS``, and else what the process may use of the machine: the processors of
its affinity mask, or fewer if its control groups (version 2) have a quota.

A call whose work is too small to pay for more threads uses fewer, and so does one that the system refuses threads.
In a child made by ``os.fork`` there is one thread, because the parent's workers do not exist there.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from fastseq import checks

MAX_THREADS = 1024  # far beyond use, and before a system refuses to start more threads

_set: int | None = None
_default: tuple[int, str] | None = None
_forked = False


def set_num_threads(n: int) -> None:
    """Use up to `n` threads in every later call of this process.

    Parameters
    ----------
    n : int
        1 to 1024. Honoured as given, also where the machine has fewer processors.
    """
    global _set
    number = checks.size("n", n, 1)
    if number > MAX_THREADS:
        raise ValueError(f"n should be at most {MAX_THREADS}, not {checks.describe(number)}")
    _set = number


def get_num_threads() -> int:
    """The number of threads that a call may use."""
    return explain()[0]


def explain() -> tuple[int, str]:
    """The number of threads that a call may use, and where the number came from."""
    global _default
    if _forked:
        return 1, "a forked process has one thread"
    if _set is not None:
        return _set, "set_num_threads"
    if _default is None:
        _default = _from_environment() or _from_machine()
    return _default


def _from_environment() -> tuple[int, str] | None:
    for name in ("FASTSEQ_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(name, "").strip()
        if not text:
            continue
        if name == "OMP_NUM_THREADS":
            text = text.split(",")[0].strip()  # one number for each level of nesting; the first is ours
        if text.isascii() and text.isdecimal() and len(text) < 8 and 1 <= int(text) <= MAX_THREADS:
            return int(text), name
        if name == "FASTSEQ_NUM_THREADS":
            raise ValueError(f"{name} should be a number from 1 to {MAX_THREADS}, not {text!r:.80}")
    return None


def _from_machine() -> tuple[int, str]:
    if hasattr(os, "sched_getaffinity"):
        processors, source = len(os.sched_getaffinity(0)), "affinity"
    else:
        processors, source = os.cpu_count() or 1, "processors"
    quota = _cgroup_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    if quota is not None and quota < processors:
        return min(max(1, math.ceil(quota)), MAX_THREADS), "cgroup quota"
    return min(processors, MAX_THREADS), source


def _cgroup_quota(membership: Path, root: Path) -> float | None:
    """The smallest quota, in processors, of the process' control group and those above it; None if none."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    path = next((line[3:] for line in lines if line.startswith("0::")), None)
    if path is None:
        return None
    group = root / path.strip("/")
    quotas = []
    while True:
        try:
            quota, period = (group / "cpu.max").read_text().split()
            if quota != "max":
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            pass
        if group == root or root not in group.parents:
            break
        group = group.parent
    return min(quotas, default=None)


def _after_fork_in_child() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
