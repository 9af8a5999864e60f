"""Settings of the whole suite.

Modules marked `every_isa` run again, in a process of their own, for each other instruction set of this machine:
see kernels/test_every_isa.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from common import tolerance as contract_tolerance
from hypothesis import HealthCheck, settings

from fastseq import _parallel, threads

settings.register_profile(
    "fastseq", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("fastseq")


# A second run in one environment more, as .ci/run makes it, need not repeat what has passed in the first.
def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--passed", metavar="FILE", help="leave out the tests that FILE lists, and add those that pass")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    name = config.getoption("--passed")
    if name is None or not os.path.exists(name):
        return
    passed = set(Path(name).read_text().splitlines())
    left_out = [item for item in items if item.nodeid in passed]
    items[:] = [item for item in items if item.nodeid not in passed]
    config.hook.pytest_deselected(items=left_out)


class Passed:
    """Writes the names of the tests that pass; loaded in the process that gathers all reports."""

    def __init__(self, name: str) -> None:
        self._file = open(name, "a")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._file.write(f"{report.nodeid}\n")

    def pytest_unconfigure(self) -> None:
        self._file.close()


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--passed")
    if name is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Passed(name))


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
