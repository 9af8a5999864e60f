"""Ctrl-C in a run: noted, and answered where nothing is left half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """Notes Ctrl-C instead of raising KeyboardInterrupt; the second time it is raised.

    Only in the main thread, and only where nobody has set SIGINT to be ignored.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None
        self._held = self._again = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and not self._held:
            raise KeyboardInterrupt
        self._again = self.asked
        self.asked = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What is done inside is done as a whole: a second Ctrl-C is raised after it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._again:
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if before not in (None, signal.SIG_IGN):
                self._before = before
                signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
