"""What a recurrent decoder needs beside its cells, compiled; `fastseq.reference.alignment_operations` has it in NumPy.

Arguments were checked at the door. Threads split elements, never a sum.
"""

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer

from leaves cimport fs_leaves
from share cimport share_out

import numpy as np

from fastseq import _simd

cnp.import_array()

ctypedef fused real:
    float
    double

# What an element takes, in multiply-adds, and how many of them are an item.
cdef double TANH_WORK = 16
cdef Py_ssize_t LINE = 256


cdef const fs_leaves *table(cnp.ndarray x) except NULL:
    return <const fs_leaves *> PyCapsule_GetPointer(_simd.leaves[x.itemsize], "fastseq.leaves")


cdef struct Elements:
    const fs_leaves *leaves
    Py_ssize_t n
    const char *x
    const char *dy
    char *out


cdef void tanh_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Elements *e = <const Elements *> job
    cdef Py_ssize_t start = first * LINE, n = min(e.n, last * LINE) - start, at = start * e.leaves.item_size
    e.leaves.tanh(n, e.x + at, e.out + at)


cdef void slope(Py_ssize_t n, const real *y, const real *dy, real *dx) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        dx[i] = dy[i] * (1 - y[i] * y[i])


cdef void tanh_dx_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Elements *e = <const Elements *> job
    cdef Py_ssize_t start = first * LINE, n = min(e.n, last * LINE) - start, at = start * e.leaves.item_size
    if e.leaves.item_size == 4:
        slope(n, <const float *> (e.x + at), <const float *> (e.dy + at), <float *> (e.out + at))
    else:
        slope(n, <const double *> (e.x + at), <const double *> (e.dy + at), <double *> (e.out + at))


def tanh_forward(cnp.ndarray x not None, int n_threads):
    """tanh(x), elementwise, of a contiguous array."""
    cdef Elements job
    cdef cnp.ndarray y = np.empty_like(x)
    job.leaves = table(x)
    job.n = cnp.PyArray_SIZE(x)
    job.x = cnp.PyArray_BYTES(x)
    job.out = cnp.PyArray_BYTES(y)
    share_out(tanh_part, &job, (job.n + LINE - 1) // LINE, TANH_WORK * LINE, n_threads)
    return y


def tanh_backward(cnp.ndarray y not None, cnp.ndarray dy not None, int n_threads):
    """dx = dy (1 - y^2), of what `tanh_forward` gave."""
    cdef Elements job
    cdef cnp.ndarray dx = np.empty_like(y)
    job.leaves = table(y)
    job.n = cnp.PyArray_SIZE(y)
    job.x = cnp.PyArray_BYTES(y)
    job.dy = cnp.PyArray_BYTES(dy)
    job.out = cnp.PyArray_BYTES(dx)
    share_out(tanh_dx_part, &job, (job.n + LINE - 1) // LINE, LINE, n_threads)
    return dx
