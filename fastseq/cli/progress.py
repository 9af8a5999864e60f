"""A progress line on a terminal, nothing anywhere else."""

from __future__ import annotations

import shutil
import sys
from types import TracebackType
from typing import TextIO

WIDTH = 30


class Progress:
    """How far something is, on one line that is written over and removed at the end.

    Parameters
    ----------
    total : int
        How many times `advance` will be called.
    stream : text file
        Standard error by default. Nothing is written to what is not a terminal.
    """

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total = total
        self._done = 0
        self._shown = self._stream.isatty()

    def advance(self, doing: str) -> None:
        """Say what is being done now; what was said before is done."""
        if self._shown:
            filled = WIDTH * self._done // self._total
            line = f"{'█' * filled}{'░' * (WIDTH - filled)} {100 * self._done // self._total:3} %  {doing}"
            columns = shutil.get_terminal_size().columns
            self._stream.write(f"\r\x1b[K{line[: columns - 1]}")
            self._stream.flush()
        self._done += 1

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
