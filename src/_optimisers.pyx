"""The compiled passes of the optimisers, and what clipping needs; see `fastseq.reference.optimisers`.

All arrays of a call are contiguous, of one size and of one type. Threads split the elements, and sums are made of
blocks of a fixed size that are added in order: the number of threads changes no bit.
"""

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer
from cython.parallel cimport parallel, threadid
from libc.math cimport sqrt

from leaves cimport fs_leaves, fs_update

import numpy as np

from fastseq import _simd

cnp.import_array()

cdef extern from "team.h" nogil:
    int fs_team_limit(int wanted)
    int fs_team_size()
    unsigned long long fs_flush_denormals()
    void fs_restore_denormals(unsigned long long before)

cdef enum:
    SERIAL = 1 << 16  # elements that do not pay for a second thread
    BLOCK = 1 << 14   # elements of a block: of a sum, and what threads take whole

ctypedef void (*pass_function)(const fs_update *update, ptrdiff_t first, ptrdiff_t last) noexcept nogil

cdef const fs_leaves *float32_leaves = <const fs_leaves *> PyCapsule_GetPointer(_simd.leaves[4], "fastseq.leaves")
cdef const fs_leaves *float64_leaves = <const fs_leaves *> PyCapsule_GetPointer(_simd.leaves[8], "fastseq.leaves")


cdef const fs_leaves *leaves_of(cnp.ndarray x) noexcept:
    return float32_leaves if cnp.PyArray_ITEMSIZE(x) == 4 else float64_leaves


cdef void *data(cnp.ndarray x) noexcept:
    """Where the elements are; of None, NULL."""
    return NULL if x is None else cnp.PyArray_DATA(x)


cdef inline ptrdiff_t border(ptrdiff_t n, int thread, int team) noexcept nogil:
    """The first element of a thread's share, which starts with a block."""
    cdef ptrdiff_t blocks = (n + BLOCK - 1) // BLOCK
    return min(n, blocks * thread // team * BLOCK)


cdef int team(ptrdiff_t n, int n_threads) noexcept nogil:
    return fs_team_limit(n_threads) if n_threads > 1 and n > SERIAL else 1


cdef void share(pass_function f, const fs_update *update, ptrdiff_t n, int thread, int team) noexcept nogil:
    cdef unsigned long long before = fs_flush_denormals()
    f(update, border(n, thread, team), border(n, thread + 1, team))
    fs_restore_denormals(before)


cdef void sweep(pass_function f, fs_update *update, ptrdiff_t n, int n_threads) noexcept:
    cdef int region
    with nogil:
        region = team(n, n_threads)
        if region == 1:
            share(f, update, n, 0, 1)
        else:
            with parallel(num_threads=region):
                share(f, update, n, threadid(), fs_team_size())


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
    """One step of SGD; see `fastseq.reference.optimisers.sgd`."""
    cdef fs_update update = prepared(p, g, momenta, None, out, weight_decay)
    update.rate = lr
    update.momentum = momentum
    update.nesterov = nesterov
    sweep(leaves_of(p).sgd, &update, cnp.PyArray_SIZE(p), n_threads)


def rmsprop(
    cnp.ndarray p not None, cnp.ndarray g not None, cnp.ndarray squares not None, cnp.ndarray momenta,
    cnp.ndarray out not None, double lr, double alpha, double eps, double momentum, double weight_decay, int n_threads,
):
    """One step of RMSProp; see `fastseq.reference.optimisers.rmsprop`."""
    cdef fs_update update = prepared(p, g, squares, momenta, out, weight_decay)
    update.rate = lr
    update.keep_second = alpha
    update.take_second = 1 - alpha
    update.eps = eps
    update.momentum = momentum
    sweep(leaves_of(p).rmsprop, &update, cnp.PyArray_SIZE(p), n_threads)


def adam(
    cnp.ndarray p not None, cnp.ndarray g not None, cnp.ndarray means not None, cnp.ndarray squares not None,
    cnp.ndarray out not None, Py_ssize_t step, double lr, double beta1, double beta2, double eps, double weight_decay,
    bint decoupled, int n_threads,
):
    """One step of Adam or AdamW; see `fastseq.reference.optimisers.adam`."""
    cdef fs_update update = prepared(p, g, means, squares, out, 0 if decoupled else weight_decay)
    update.rate = lr / (1 - beta1 ** <double> step)
    update.keep = 1 - lr * weight_decay if decoupled else 1
    update.take_first = 1 - beta1
    update.keep_second = beta2
    update.take_second = 1 - beta2
    update.unbias = 1 / sqrt(1 - beta2 ** <double> step)
    update.eps = eps
    sweep(leaves_of(p).adam, &update, cnp.PyArray_SIZE(p), n_threads)


cdef void scale_share(
    const fs_leaves *leaves, char *x, ptrdiff_t n, double factor, int thread, int team,
) noexcept nogil:
    cdef ptrdiff_t first = border(n, thread, team)
    cdef unsigned long long before = fs_flush_denormals()
    leaves.scale(border(n, thread + 1, team) - first, x + first * leaves.item_size, factor)
    fs_restore_denormals(before)


def scale(cnp.ndarray x not None, double factor, int n_threads):
    """Multiply an array by a number, in place."""
    cdef const fs_leaves *leaves = leaves_of(x)
    cdef ptrdiff_t n = cnp.PyArray_SIZE(x)
    cdef char *start = cnp.PyArray_BYTES(x)
    cdef int region
    with nogil:
        region = team(n, n_threads)
        if region == 1:
            scale_share(leaves, start, n, factor, 0, 1)
        else:
            with parallel(num_threads=region):
                scale_share(leaves, start, n, factor, threadid(), fs_team_size())


cdef void sum_share(
    const fs_leaves *leaves, const char *x, ptrdiff_t n, double *sums, int thread, int team,
) noexcept nogil:
    cdef ptrdiff_t i = border(n, thread, team), last = border(n, thread + 1, team)
    cdef unsigned long long before = fs_flush_denormals()
    while i < last:
        sums[i // BLOCK] = leaves.sum_of_squares(min(BLOCK, last - i), x + i * leaves.item_size)
        i += BLOCK
    fs_restore_denormals(before)


def sum_of_squares(cnp.ndarray x not None, int n_threads):
    """The sum of the squares of all elements, in double."""
    cdef const fs_leaves *leaves = leaves_of(x)
    cdef ptrdiff_t i, n = cnp.PyArray_SIZE(x)
    cdef ptrdiff_t blocks = (n + BLOCK - 1) // BLOCK
    cdef cnp.ndarray partial = np.empty(blocks)
    cdef const char *start = cnp.PyArray_BYTES(x)
    cdef double *sums = <double *> cnp.PyArray_DATA(partial)
    cdef double total = 0
    cdef int region
    with nogil:
        region = team(n, n_threads)
        if region == 1:
            sum_share(leaves, start, n, sums, 0, 1)
        else:
            with parallel(num_threads=region):
                sum_share(leaves, start, n, sums, threadid(), fs_team_size())
        for i in range(blocks):
            total += sums[i]
    return total
