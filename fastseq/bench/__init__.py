"""Benchmarks: cases, the engines that compute them, and how these are checked and timed.

`fastseq.cli` reads the options and prints the results.
"""

from __future__ import annotations


class UsageError(Exception):
    """A request that cannot be met: one line on standard error, exit status 2."""
