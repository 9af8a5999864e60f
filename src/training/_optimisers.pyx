"""The compiled passes of the optimisers, and what clipping needs; see `fastseq.reference._optimisers`.

All arrays of a call are contiguous, of one size and of one type. Threads split the elements, and sums are made of
blocks of a fixed size that are added in order: the number of threads changes no bit.
"""

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport sqrt

from runtime.kernels cimport fs_kernels, fs_update
from fastseq._parallel cimport parallel_for

import numpy as np

from fastseq import _simd

cnp.import_array()

cdef enum:
    BLOCK = 1 << 14   # elements of a block: of a sum, and what threads take whole
    PASS_WORK = 8     # of an element; memory is the limit, and it counts for more than the arithmetic does
    CLIP_WORK = 4

ctypedef void (*pass_function)(const fs_update *update, ptrdiff_t first, ptrdiff_t last) noexcept nogil

cdef const fs_kernels *float32_kernels = <const fs_kernels *> PyCapsule_GetPointer(_simd.kernels[4], "fastseq.kernels")
cdef const fs_kernels *float64_kernels = <const fs_kernels *> PyCapsule_GetPointer(_simd.kernels[8], "fastseq.kernels")


cdef const fs_kernels *kernels_of(cnp.ndarray x) noexcept:
    return float32_kernels if cnp.PyArray_ITEMSIZE(x) == 4 else float64_kernels


cdef void *data(cnp.ndarray x) noexcept:
    """Where the elements are; of None, NULL."""
    return NULL if x is None else cnp.PyArray_DATA(x)


cdef Py_ssize_t blocks_of(ptrdiff_t n) noexcept:
    return (n + BLOCK - 1) // BLOCK


cdef struct Pass:
    pass_function f
    fs_update update
    ptrdiff_t n


cdef void pass_part(const void *given, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """The blocks [first, last) of a pass."""
    cdef const Pass *job = <const Pass *> given
    job.f(&job.update, first * BLOCK, min(job.n, last * BLOCK))


cdef int sweep(pass_function f, fs_update update, cnp.ndarray p, int n_threads) except -1:
    cdef Pass job
    job.f = f
    job.update = update
    job.n = cnp.PyArray_SIZE(p)
    return parallel_for(pass_part, &job, blocks_of(job.n), PASS_WORK * BLOCK, n_threads)


cdef fs_update prepared(
    cnp.ndarray p, cnp.ndarray g, cnp.ndarray first, cnp.ndarray second, cnp.ndarray out, double weight_decay,
) noexcept:
    cdef fs_update update
    update.p = data(p)
    update.g = data(g)
    update.first = data(first)
    update.second = data(second)
    update.out = data(out)
    update.rate = 0
    update.decay = weight_decay
    update.keep = 1
    update.momentum = 0
    update.take_first = 0
    update.keep_second = 0
    update.take_second = 0
    update.unbias = 1
    update.eps = 0
    update.nesterov = False
    return update


def sgd(
    cnp.ndarray p not None, cnp.ndarray g not None, cnp.ndarray momenta, cnp.ndarray out not None, double lr,
    double momentum, bint nesterov, double weight_decay, int n_threads,
):
    """One step of SGD; see `fastseq.reference._optimisers.sgd`."""
    cdef fs_update update = prepared(p, g, momenta, None, out, weight_decay)
    update.rate = lr
    update.momentum = momentum
    update.nesterov = nesterov
    sweep(kernels_of(p).sgd, update, p, n_threads)


def rmsprop(
    cnp.ndarray p not None, cnp.ndarray g not None, cnp.ndarray squares not None, cnp.ndarray momenta,
    cnp.ndarray out not None, double lr, double alpha, double eps, double momentum, double weight_decay, int n_threads,
):
    """One step of RMSProp; see `fastseq.reference._optimisers.rmsprop`."""
    cdef fs_update update = prepared(p, g, squares, momenta, out, weight_decay)
    update.rate = lr
    update.keep_second = alpha
    update.take_second = 1 - alpha
    update.eps = eps
    update.momentum = momentum
    sweep(kernels_of(p).rmsprop, update, p, n_threads)


def adam(
    cnp.ndarray p not None, cnp.ndarray g not None, cnp.ndarray means not None, cnp.ndarray squares not None,
    cnp.ndarray out not None, Py_ssize_t step, double lr, double beta1, double beta2, double eps, double weight_decay,
    bint decoupled, int n_threads,
):
    """One step of Adam or AdamW; see `fastseq.reference._optimisers.adam`."""
    cdef fs_update update = prepared(p, g, means, squares, out, 0 if decoupled else weight_decay)
    update.rate = lr / (1 - beta1 ** <double> step)
    update.keep = 1 - lr * weight_decay if decoupled else 1
    update.take_first = 1 - beta1
    update.keep_second = beta2
    update.take_second = 1 - beta2
    update.unbias = 1 / sqrt(1 - beta2 ** <double> step)
    update.eps = eps
    sweep(kernels_of(p).adam, update, p, n_threads)


cdef struct Clip:
    const fs_kernels *kernels
    char *x
    ptrdiff_t n
    double factor
    double *sums  # of each block


cdef void scale_part(const void *given, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Clip *job = <const Clip *> given
    cdef ptrdiff_t begin = first * BLOCK
    job.kernels.scale(min(job.n, last * BLOCK) - begin, job.x + begin * job.kernels.item_size, job.factor)


cdef void sum_part(const void *given, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Clip *job = <const Clip *> given
    cdef Py_ssize_t block
    cdef ptrdiff_t begin
    for block in range(first, last):
        begin = block * BLOCK
        job.sums[block] = job.kernels.sum_of_squares(
            min(job.n - begin, BLOCK), job.x + begin * job.kernels.item_size
        )


cdef Clip clip_of(cnp.ndarray x) noexcept:
    cdef Clip job
    job.kernels = kernels_of(x)
    job.x = cnp.PyArray_BYTES(x)
    job.n = cnp.PyArray_SIZE(x)
    job.factor = 1
    job.sums = NULL
    return job


def scale(cnp.ndarray x not None, double factor, int n_threads):
    """Multiply an array by a number, in place."""
    cdef Clip job = clip_of(x)
    job.factor = factor
    parallel_for(scale_part, &job, blocks_of(job.n), CLIP_WORK * BLOCK, n_threads)


def sum_of_squares(cnp.ndarray x not None, int n_threads):
    """The sum of the squares of all elements, in double."""
    cdef Clip job = clip_of(x)
    cdef Py_ssize_t block, blocks = blocks_of(job.n)
    cdef cnp.ndarray sums = np.empty(blocks)
    cdef double total = 0
    job.sums = <double *> cnp.PyArray_DATA(sums)
    parallel_for(sum_part, &job, blocks, CLIP_WORK * BLOCK, n_threads)
    for block in range(blocks):
        total += job.sums[block]
    return total
