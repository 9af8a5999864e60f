"""exp, tanh and sigmoid over an array, beside NumPy."""

import numpy as np
import pytest

from fastseq import _simd


def numpy_sigmoid(x):
    return 1 / (1 + np.exp(-x))


FUNCTIONS = {
    "exp": (_simd.exp, np.exp),
    "tanh": (_simd.tanh, np.tanh),
    "sigmoid": (_simd.sigmoid, numpy_sigmoid),
}


@pytest.mark.parametrize("engine", ["fastseq", "numpy"])
@pytest.mark.parametrize("n", [256, 65536])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def bench_leaf(benchmark, rng, name, dtype, n, engine):
    benchmark.group = f"{name} {dtype} {n}"
    x = rng.normal(0, 3, n).astype(dtype)
    ours, theirs = FUNCTIONS[name]
    np.testing.assert_allclose(ours(x), theirs(x.astype("float64")), rtol=8 * np.finfo(dtype).eps)
    benchmark(ours if engine == "fastseq" else theirs, x)
