"""Whether anybody else used the processors while something was measured."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter


class Others:
    """Counts what other processes, and other machines on the same host, took of the processors since it was made.

    Parameters
    ----------
    ours : iterable of int
        The ids of our own processes beside this one.
    proc : path
        Where the system tells of itself.
    """

    def __init__(self, ours: Iterable[int], proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._ours = [os.getpid(), *ours]
        self._start = perf_counter()
        self._before = self._seconds()

    def processors(self) -> float | None:
        """How many processors they kept busy, the mean since the start; None where the system does not say."""
        now = self._seconds()
        if now is None or self._before is None:
            return None
        return max(0.0, (now - self._before) / (perf_counter() - self._start))

    def _seconds(self) -> float | None:
        try:
            # Of all processors: user nice system idle iowait irq softirq steal.
            ticks = [int(field) for field in (self._proc / "stat").read_text().split("\n")[0].split()[1:9]]
            busy = sum(ticks) - ticks[3] - ticks[4]
            for process in self._ours:
                # After the name, which may hold anything; user and system are the 14th and 15th field of all.
                fields = (self._proc / str(process) / "stat").read_text().rpartition(")")[2].split()
                busy -= int(fields[11]) + int(fields[12])
        except (OSError, ValueError, IndexError):
            return None
        return busy / os.sysconf("SC_CLK_TCK")
