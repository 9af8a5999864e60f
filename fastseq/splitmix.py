"""Random numbers as functions of a key and a step: SplitMix64 [1]_, over arrays of uint64.

References
----------
.. [1] G. L. Steele, D. Lea and C. H. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import numpy as np

from fastseq.checks import Array


def mixed(x: Array) -> Array:
    """The output function of SplitMix64, after one step of its counter [1]_."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: Array = x ^ (x >> np.uint64(31))
    return result


def uniform(keys: Array, step: int) -> Array:
    """Random numbers in [0, 1) of one step, one for each key: they depend on nothing else."""
    # 52 bits, so that the largest number times any total is less than the total.
    numbers: Array = (mixed(keys + mixed(np.array([step], np.uint64))) >> np.uint64(12)) * 2.0**-52
    return numbers
