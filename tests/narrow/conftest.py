"""Settings of the tests of narrow weights."""

from __future__ import annotations

import pytest

import fastseq as fs


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """So small as most is here, more would be in each other's way on a busy machine."""
    fs.set_num_threads(1)
