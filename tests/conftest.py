"""Settings of the whole suite.

Modules marked `every_isa` run again, in a process of their own, for each other instruction set of this machine:
see test_every_isa.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from common import tolerance as contract_tolerance
from hypothesis import HealthCheck, settings

from fastseq import _parallel, threads

settings.register_profile(
    "fastseq", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("fastseq")


# Results of several threads are tested, also where other processes keep the machine busy.
_parallel.set_team_mode("held")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Whatever a test sets, the next one starts from what there was."""
    before = threads._set
    yield
    threads._set = before


@pytest.fixture
def tolerance():
    """tolerance(dtype, K, T) of the numeric contract."""
    return contract_tolerance
