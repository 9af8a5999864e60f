"""What every public class computes is, to the last bit, what it was: see hashes.py."""

from __future__ import annotations

import json

import pytest
from hashes import DTYPES, FILE, cases, hash_of

from fastseq import _simd

pytestmark = pytest.mark.every_isa

CASES = cases()
KNOWN = json.loads(FILE.read_text())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_as_ever(name: str, dtype: str) -> None:
    assert hash_of(CASES[name], dtype) == KNOWN[_simd.chosen_reals][f"{name}, {dtype}"]


def test_every_case_is_known() -> None:
    for known in KNOWN.values():
        assert set(known) == {f"{name}, {dtype}" for name in CASES for dtype in DTYPES}
