"""Microbenchmarks: one thread, because two engines in one process disturb each other's.

For other engines, other numbers of threads and whole tables there is ``fastseq bench``, which gives every engine a
process of its own.
"""

import os

# Before NumPy is imported, or its matrix products start threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np
import pytest

import fastseq as fs


@pytest.fixture(autouse=True)
def one_thread():
    fs.set_num_threads(1)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
