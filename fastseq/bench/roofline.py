"""The limits of this machine, measured: multiply-adds on registers, and reading what lies in a cache."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np

from fastseq import _simd
from fastseq.bench.worker import EngineError
from fastseq.checks import Array

BURST = 0.004  # seconds: long beside waking a thread, short beside the seconds in which a shared machine changes
TRIES = 3
# One in each cache of most machines, and one in none.
ROOFS = (16 * 2**10, 256 * 2**10, 4 * 2**20, 64 * 2**20)
LEAST = 4096  # bytes of a buffer: `read_memory` leaves out what is less than 8 vectors


class Limits:
    """What some threads at once can do at most. Measured anew at every call, because it changes.

    Parameters
    ----------
    threads : int
        How many work at once.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._barrier = threading.Barrier(threads)
        self._rounds: dict[int, int] = {}
        self._buffers: dict[int, list[Array]] = {}

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def multiply_adds(self) -> float:
        """Floating-point operations a second; a multiply-add is two."""
        return self._best(0, lambda thread, rounds: _simd.multiply_adds(rounds))

    def read(self, n_bytes: int) -> float:
        """Bytes a second out of a buffer of `n_bytes`, of which every thread reads its share."""
        if n_bytes not in self._buffers:
            share = max(n_bytes // self.threads, LEAST) // 4
            # Ones: untouched zeros would all be one page of memory, and stand in the nearest cache.
            self._buffers[n_bytes] = [np.ones(share, np.float32) for _ in range(self.threads)]
        buffers = self._buffers[n_bytes]
        return self._best(n_bytes, lambda thread, rounds: _simd.read_memory(rounds, buffers[thread]))

    def forget(self) -> None:
        """Let go of the buffers."""
        self._buffers.clear()

    def _best(self, key: int, work: Callable[[int, int], int]) -> float:
        """The best rate of some bursts: what disturbs a burst only ever makes it slower."""
        if key not in self._rounds:
            rounds = 1
            while (seconds := self._burst(work, rounds)[0]) < BURST / 4:
                rounds *= 4
            self._rounds[key] = max(1, round(rounds * BURST / seconds))
        return max(amount / seconds for seconds, amount in (self._burst(work, self._rounds[key]) for _ in range(TRIES)))

    def _burst(self, work: Callable[[int, int], int], rounds: int) -> tuple[float, int]:
        """All threads at once: from the first start to the last end, and what they did together."""

        def one(thread: int) -> tuple[float, float, int]:
            self._barrier.wait()
            start = perf_counter()
            amount = work(thread, rounds)
            return start, perf_counter(), amount

        try:
            pending = [self._pool.submit(one, thread) for thread in range(self.threads)]
        except RuntimeError as error:  # the system refused a thread; those that wait for it must not
            self._barrier.abort()
            raise EngineError(f"the limits of {self.threads} threads cannot be measured: {error}") from None
        starts, ends, amounts = zip(*(future.result() for future in pending), strict=True)
        return max(ends) - min(starts), sum(amounts)
