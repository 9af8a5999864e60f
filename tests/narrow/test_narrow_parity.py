"""Twins of every layer and every model compute what those over NumPy do."""

from __future__ import annotations

import pytest
from twins import ALL, EACH_TYPE, assert_twins_agree, relative_for

pytestmark = pytest.mark.every_narrow_isa


@EACH_TYPE
@pytest.mark.parametrize("name", ALL)
def test_a_twin_is_its_reference(name: str, weights: str) -> None:
    case = ALL[name]
    twin, reference = case.twins(weights)
    assert twin.weights == reference.weights == weights
    assert_twins_agree(case.run(twin), case.run(reference), weights, relative_for(), name)
