"""Losses and their gradients, compiled; `fastseq.reference._losses` has the same in NumPy.

Threads split rows. What a row adds to the loss is a double of its own, and these are added up in one order, so that
neither the number of threads nor rows that do not count change a bit.
"""

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport log, log1p
from libc.stdint cimport int64_t
from libc.string cimport memset

from runtime.kernels cimport fs_kernels, fs_loss, fs_softmax_sums
from fastseq._parallel cimport parallel_for

import numpy as np

from fastseq import _simd

cnp.import_array()

# What an element takes, in multiply-adds.
cdef double SOFTMAX_WORK = 48
cdef double ELEMENT_WORK = 32
# Elements whose losses are added up at once.
cdef Py_ssize_t BLOCK = 4096


cdef const fs_kernels *table(cnp.ndarray x) except NULL:
    return <const fs_kernels *> PyCapsule_GetPointer(_simd.kernels[x.itemsize], "fastseq.kernels")


cdef struct Softmax:
    const fs_kernels *kernels
    Py_ssize_t classes
    const char *logits
    const int64_t *targets
    double smoothing
    double scale
    char *gradient
    fs_softmax_sums *sums


cdef void softmax_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Softmax *s = <const Softmax *> job
    cdef Py_ssize_t at = first * s.classes * s.kernels.item_size
    s.kernels.softmax_cross_entropy(
        last - first, s.classes, s.logits + at, s.targets + first, s.smoothing, s.scale, s.gradient + at,
        s.sums + first,
    )


def softmax_cross_entropy(
    cnp.ndarray logits not None, cnp.ndarray targets not None, Py_ssize_t count, double label_smoothing,
    int n_threads,
):
    """The mean over rows that count; see `fastseq.reference._losses.softmax_cross_entropy`."""
    cdef Py_ssize_t rows = cnp.PyArray_DIM(logits, 0), row
    cdef cnp.ndarray gradient = np.empty_like(logits)
    cdef cnp.ndarray scratch = np.empty(3 * rows)
    cdef double total = 0
    cdef fs_softmax_sums one
    cdef Softmax job
    job.kernels = table(logits)
    job.classes = cnp.PyArray_DIM(logits, 1)
    job.logits = cnp.PyArray_BYTES(logits)
    job.targets = <const int64_t *> cnp.PyArray_DATA(targets)
    job.smoothing = label_smoothing
    job.scale = 1.0 / max(count, 1)
    job.gradient = cnp.PyArray_BYTES(gradient)
    job.sums = <fs_softmax_sums *> cnp.PyArray_DATA(scratch)
    parallel_for(softmax_part, &job, rows, SOFTMAX_WORK * job.classes, n_threads)
    with nogil:
        for row in range(rows):
            one = job.sums[row]
            # Where the target has the largest logit, nothing is lost beside its 1.
            total += (log1p(one.others) if one.target == 1 else log(one.target + one.others)) - one.offset
    return total / max(count, 1), gradient


cdef struct Elements:
    fs_loss kernel
    Py_ssize_t item
    Py_ssize_t width
    Py_ssize_t inner
    const char *x
    const char *targets
    const int64_t *lengths  # steps of each row that count, of `inner` elements each; NULL: all of them
    double delta
    double scale
    char *gradient
    double *sums


cdef void elements_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Elements *s = <const Elements *> job
    cdef Py_ssize_t row, i, n, at
    for row in range(first, last):
        n = s.width if s.lengths == NULL else s.lengths[row] * s.inner
        s.sums[row] = 0
        i = 0
        while i < n:
            at = (row * s.width + i) * s.item
            s.sums[row] += s.kernel(min(BLOCK, n - i), s.x + at, s.targets + at, s.delta, s.scale, s.gradient + at)
            i += BLOCK
        memset(s.gradient + (row * s.width + n) * s.item, 0, (s.width - n) * s.item)


cdef tuple elements_loss(
    cnp.ndarray x, cnp.ndarray targets, cnp.ndarray lengths, Py_ssize_t count, fs_loss kernel, double delta,
    int n_threads,
):
    """The mean over the elements that count of x (rows, time, inner) and its gradient."""
    cdef Py_ssize_t rows = cnp.PyArray_DIM(x, 0), row
    cdef cnp.ndarray gradient = np.empty_like(x)
    cdef cnp.ndarray scratch = np.empty(rows)
    cdef double total = 0
    cdef Elements job
    job.kernel = kernel
    job.item = cnp.PyArray_ITEMSIZE(x)
    job.inner = cnp.PyArray_DIM(x, 2)
    job.width = cnp.PyArray_DIM(x, 1) * job.inner
    job.x = cnp.PyArray_BYTES(x)
    job.targets = cnp.PyArray_BYTES(targets)
    job.lengths = NULL
    if lengths is not None:
        job.lengths = <const int64_t *> cnp.PyArray_DATA(lengths)
    job.delta = delta
    job.scale = 1.0 / max(count, 1)
    job.gradient = cnp.PyArray_BYTES(gradient)
    job.sums = <double *> cnp.PyArray_DATA(scratch)
    parallel_for(elements_part, &job, rows, ELEMENT_WORK * job.width, n_threads)
    with nogil:
        for row in range(rows):
            total += job.sums[row]
    return total / max(count, 1), gradient


def binary_cross_entropy_with_logits(
    cnp.ndarray logits not None, cnp.ndarray targets not None, cnp.ndarray lengths, Py_ssize_t count, int n_threads,
):
    """max(x, 0) - x t + log(1 + exp(-|x|)), the mean; x (rows, time, inner)."""
    return elements_loss(logits, targets, lengths, count, table(logits).binary_cross_entropy, 0, n_threads)


def mean_squared_error(
    cnp.ndarray predictions not None, cnp.ndarray targets not None, cnp.ndarray lengths, Py_ssize_t count,
    int n_threads,
):
    """(x - t)^2, the mean; x (rows, time, inner)."""
    return elements_loss(predictions, targets, lengths, count, table(predictions).squared_error, 0, n_threads)


def huber(
    cnp.ndarray predictions not None, cnp.ndarray targets not None, double delta, cnp.ndarray lengths,
    Py_ssize_t count, int n_threads,
):
    """d^2 / 2 where |d| <= delta, else delta (|d| - delta / 2), d = x - t, the mean; x (rows, time, inner)."""
    return elements_loss(predictions, targets, lengths, count, table(predictions).huber, delta, n_threads)
