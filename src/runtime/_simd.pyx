"""The instruction set: which the machine can run, which is used, and its kernels over arrays.

``FASTSEQ_ISA`` forces one. The other compiled modules take their table of kernels from `kernels_for`.
"""

import os

cimport numpy as cnp

from runtime.kernels cimport FS_ACCUMULATORS, fs_find_set, fs_kernels, fs_narrow, fs_set
from runtime.team cimport fs_flush_denormals, fs_has_openmp, fs_restore_denormals

import numpy as np

cnp.import_array()

# From the slowest on. In "amx_in_c", tiles are C's: it shows what is around them on machines without AMX.
NAMES = ("amx_in_c", "baseline", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx")
available = tuple(name for name in NAMES if fs_find_set(name.encode()) != NULL)
chosen = os.environ.get("FASTSEQ_ISA", available[-1])
if chosen not in available:
    raise ImportError(
        f"FASTSEQ_ISA should be an instruction set of this machine, {' or '.join(available)}, not {chosen!r}"
    )
openmp = bool(fs_has_openmp())

cdef const fs_set *chosen_set = fs_find_set(chosen.encode())
cdef const fs_kernels *float32_kernels = chosen_set.f32
cdef const fs_kernels *float64_kernels = chosen_set.f64

# The set whose kernels of reals are used, and those sets that have their own: the others add instructions for narrow
# weights to one of them.
chosen_reals = float32_kernels.set.decode()
available_reals = tuple(name for name in available if fs_find_set(name.encode()).f32.set == name.encode())
# Which instructions take products of each type of weights here.
narrow_instructions = {"bfloat16": chosen_set.narrow.bfloat16.decode(), "int8": chosen_set.narrow.int8.decode()}

# Numbers of a vector, by bytes in a real.
lanes = {4: float32_kernels.lanes, 8: float64_kernels.lanes}


cdef const fs_kernels *kernels_for(Py_ssize_t item_size) noexcept nogil:
    """The table of kernels of a real type, which has so many bytes: 4 or 8."""
    return float32_kernels if item_size == 4 else float64_kernels


cdef const fs_narrow *narrow_kernels() noexcept nogil:
    """What the instruction set has for narrow weights."""
    return chosen_set.narrow


ctypedef void (*map_function)(ptrdiff_t n, const void *x, void *y) noexcept nogil


cdef const fs_kernels *table(cnp.ndarray x) except NULL:
    if not cnp.PyArray_ISCARRAY_RO(x):
        raise ValueError("x should be contiguous, aligned and in native byte order")
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32:
        return float32_kernels
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64:
        return float64_kernels
    raise TypeError(f"x should be float32 or float64, not {x.dtype}")


cdef cnp.ndarray map_array(map_function f, cnp.ndarray x):
    cdef cnp.ndarray y = np.empty_like(x)
    cdef ptrdiff_t n = x.size
    cdef unsigned long long before
    with nogil:
        before = fs_flush_denormals()
        f(n, cnp.PyArray_DATA(x), cnp.PyArray_DATA(y))
        fs_restore_denormals(before)
    return y


def exp(cnp.ndarray x not None):
    """exp(x), elementwise."""
    return map_array(table(x).exp, x)


def tanh(cnp.ndarray x not None):
    """tanh(x), elementwise."""
    return map_array(table(x).tanh, x)


def sigmoid(cnp.ndarray x not None):
    """1 / (1 + exp(-x)), elementwise."""
    return map_array(table(x).sigmoid, x)


def multiply_adds(ptrdiff_t rounds):
    """Run float32 multiply-adds on registers alone; returns how many floating-point operations that was."""
    with nogil:
        float32_kernels.multiply_adds(rounds)
    return rounds * FS_ACCUMULATORS * 2 * float32_kernels.lanes


def read_memory(ptrdiff_t rounds, cnp.ndarray x not None):
    """Read a float32 or float64 array some times over; returns how many bytes that was."""
    cdef const fs_kernels *kernel = table(x)
    cdef ptrdiff_t n = x.size
    with nogil:
        kernel.read_memory(rounds, n, cnp.PyArray_DATA(x))
    return rounds * (n - n % (8 * kernel.lanes)) * kernel.item_size
