"""Linear, embedding, layer normalisation and dropout, compiled; `fastseq.reference.dense` has the same in NumPy.

Arguments were checked at the door; arrays are contiguous, but for the rows of what a linear layer multiplies, which
may lie apart. Threads split rows, columns or elements, never a sum.
"""

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport ceil
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from leaves cimport FS_IDENTITY, fs_leaves, fs_step, fs_weights
from share cimport share_out

import numpy as np

from fastseq import _simd

cnp.import_array()

cdef enum:
    LINE = 64         # bytes of a cache line: two threads do not write to one
    SCATTERED = 512   # bytes of a row below which reading the ids once more costs more than another thread gives
    BLOCK_ROWS = 512  # rows whose pointers are made at once
    PANEL_BLOCKS = 4

# What an element takes, in multiply-adds.
cdef double NORM_WORK = 24
cdef double DROPOUT_WORK = 12
cdef double COPY_WORK = 8


cdef const fs_leaves *table(cnp.ndarray x) except NULL:
    return <const fs_leaves *> PyCapsule_GetPointer(_simd.leaves[x.itemsize], "fastseq.leaves")


cdef class Packed:
    """The packed weights of a linear layer. Immutable."""

    cdef const fs_leaves *leaves
    cdef fs_weights part
    cdef cnp.ndarray weight
    cdef list buffers  # keeps what the pointers above point into


cdef const void *panels_of(Packed packed, cnp.ndarray weight):
    """Panels of a matrix of `units` rows, on a cache line of their own."""
    cdef ptrdiff_t none = 0
    cdef Py_ssize_t k = weight.shape[1], units = weight.shape[0], item = weight.itemsize
    cdef Py_ssize_t n_bytes = packed.part.panels * PANEL_BLOCKS * packed.leaves.lanes * k * item
    raw = np.empty(n_bytes + LINE, np.uint8)
    packed.buffers.append(raw)
    cdef char *start = cnp.PyArray_BYTES(raw)
    start += -(<Py_ssize_t> start) & (LINE - 1)
    with nogil:
        packed.leaves.pack(cnp.PyArray_DATA(weight), &none, 1, PANEL_BLOCKS, units, k, start)
    return start


def linear_pack(cnp.ndarray weight not None, cnp.ndarray bias):
    """Pack the weights of a linear layer; returns a `Packed`."""
    cdef Packed packed = Packed()
    cdef Py_ssize_t units = weight.shape[0]
    packed.leaves = table(weight)
    packed.weight = weight
    packed.buffers = []
    packed.part.units = units
    packed.part.panels = (units + PANEL_BLOCKS * packed.leaves.lanes - 1) // (PANEL_BLOCKS * packed.leaves.lanes)
    packed.part.x_size = 0
    packed.part.h_size = weight.shape[1]
    packed.part.x = NULL
    packed.part.h = panels_of(packed, weight)
    column = np.zeros((units, 1), weight.dtype) if bias is None else bias.reshape(-1, 1)
    packed.part.bias = panels_of(packed, column)
    packed.part.h_bias = NULL
    return packed


cdef struct Product:
    const fs_leaves *leaves
    const fs_weights *weights
    Py_ssize_t rows
    const char *x
    Py_ssize_t x_row
    char *y
    Py_ssize_t y_row
    bint by_panels


cdef void product_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Some rows of all panels, or all rows of some panels."""
    cdef const Product *p = <const Product *> job
    cdef const void *x[BLOCK_ROWS]
    cdef const void *init[BLOCK_ROWS]
    cdef void *out[BLOCK_ROWS]
    cdef fs_step step
    cdef Py_ssize_t i, base = 0 if p.by_panels else first, end = p.rows if p.by_panels else last
    step.weights = p.weights
    step.first = first if p.by_panels else 0
    step.last = last if p.by_panels else p.weights.panels
    step.with_x = 0
    step.finish = FS_IDENTITY
    step.init = init
    step.x = x
    step.h = x
    step.carry = x
    step.c = NULL
    step.c_before = NULL
    step.gates = NULL
    step.back = NULL
    step.z = NULL
    step.out = out
    while base < end:
        step.rows = min(BLOCK_ROWS, end - base)
        for i in range(step.rows):
            x[i] = p.x + (base + i) * p.x_row
            init[i] = p.weights.bias
            out[i] = p.y + (base + i) * p.y_row
        p.leaves.plain(&step)
        base += BLOCK_ROWS


def linear_forward(Packed packed not None, cnp.ndarray x not None, int n_threads):
    """x W^T + b of the rows of x; see `fastseq.reference.dense.linear_forward`."""
    cdef Py_ssize_t rows = cnp.PyArray_DIM(x, 0)
    cdef cnp.ndarray y = np.empty((rows, packed.part.units), x.dtype)
    cdef Product job
    job.leaves = packed.leaves
    job.weights = &packed.part
    job.rows = rows
    job.x = cnp.PyArray_BYTES(x)
    job.x_row = cnp.PyArray_STRIDE(x, 0)
    job.y = cnp.PyArray_BYTES(y)
    job.y_row = cnp.PyArray_STRIDE(y, 0)
    job.by_panels = rows < 2 * packed.leaves.tile_rows[4] * n_threads
    cdef Py_ssize_t items = packed.part.panels if job.by_panels else rows
    cdef double work = <double> rows * packed.part.units * packed.part.h_size
    share_out(product_part, &job, items if rows else 0, work / max(items, 1), n_threads)
    return y


def linear_backward(
    Packed packed not None, cnp.ndarray x not None, cnp.ndarray dy not None, cnp.ndarray dweight not None,
    cnp.ndarray dbias, int n_threads,
):
    """Gradient of x; those of the parameters are added; see `fastseq.reference.dense.linear_backward`."""
    with np.errstate(all="ignore"):  # inf and NaN are the user's
        dweight += dy.T @ x
        if dbias is not None:
            dbias += dy.sum(axis=0)
        return dy @ packed.weight


cdef struct Rows:
    const fs_leaves *leaves
    Py_ssize_t rows
    Py_ssize_t width
    Py_ssize_t strip  # bytes of each row that a thread takes at least, where threads split columns
    const char *x
    const int64_t *ids
    int64_t skip
    double eps
    const char *weight
    const char *bias
    char *means
    char *scales
    const char *dy
    char *out
    char *dweight
    char *dbias
    uint64_t seed
    uint64_t stream
    uint32_t threshold
    double factor


cdef inline void *data_or_null(cnp.ndarray array) noexcept:
    return NULL if array is None else cnp.PyArray_DATA(array)


cdef inline Py_ssize_t strips(const Rows *s) noexcept nogil:
    """How many strips a row has, which are what threads split where they split columns."""
    return (s.width * s.leaves.item_size + s.strip - 1) // s.strip


cdef inline Py_ssize_t column(const Rows *s, Py_ssize_t strip) noexcept nogil:
    """The first column of a strip."""
    return min(s.width, strip * s.strip // s.leaves.item_size)


cdef void gather_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Rows *s = <const Rows *> job
    cdef Py_ssize_t row, n_bytes = s.width * s.leaves.item_size
    for row in range(first, last):
        memcpy(s.out + row * n_bytes, s.weight + s.ids[row] * n_bytes, n_bytes)


def embedding_forward(cnp.ndarray weight not None, cnp.ndarray ids not None, int n_threads):
    """The rows of a matrix that ids (rows,) name."""
    cdef Rows job
    cdef cnp.ndarray y = np.empty((ids.shape[0], weight.shape[1]), weight.dtype)
    job.leaves = table(weight)
    job.width = cnp.PyArray_DIM(weight, 1)
    job.weight = cnp.PyArray_BYTES(weight)
    job.ids = <const int64_t *> cnp.PyArray_DATA(ids)
    job.out = cnp.PyArray_BYTES(y)
    share_out(gather_part, &job, cnp.PyArray_DIM(ids, 0), COPY_WORK * job.width, n_threads)
    return y


cdef void scatter_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Rows *s = <const Rows *> job
    s.leaves.scatter_add(
        s.rows, s.ids, s.skip, s.width, column(s, first), column(s, last), s.dy, s.dweight,
    )


def embedding_backward(
    cnp.ndarray ids not None, cnp.ndarray dy not None, cnp.ndarray dweight not None, Py_ssize_t padding_idx,
    int n_threads,
):
    """Add each row of dy (rows, width) to the gradient of its id, in order; that of `padding_idx` to none."""
    cdef Rows job
    job.leaves = table(dy)
    job.rows = cnp.PyArray_DIM(ids, 0)
    job.width = cnp.PyArray_DIM(dweight, 1)
    job.ids = <const int64_t *> cnp.PyArray_DATA(ids)
    job.skip = padding_idx
    job.strip = SCATTERED
    job.dy = cnp.PyArray_BYTES(dy)
    job.dweight = cnp.PyArray_BYTES(dweight)
    cdef Py_ssize_t items = strips(&job)
    share_out(scatter_part, &job, items, COPY_WORK * job.rows * job.width / items, n_threads)


cdef void norm_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Rows *s = <const Rows *> job
    cdef Py_ssize_t item = s.leaves.item_size, at = first * s.width * item
    s.leaves.layer_norm(
        last - first, s.width, s.eps, s.x + at, s.weight, s.bias, s.out + at, s.means + first * item,
        s.scales + first * item,
    )


def layer_norm_forward(
    cnp.ndarray x not None, cnp.ndarray weight, cnp.ndarray bias, double eps, int n_threads,
):
    """y, and the mean and 1 / sqrt(variance + eps) of each row of x (rows, width)."""
    cdef Rows job
    cdef cnp.ndarray y = np.empty_like(x)
    cdef cnp.ndarray means = np.empty(x.shape[0], x.dtype), scales = np.empty(x.shape[0], x.dtype)
    job.leaves = table(x)
    job.width = cnp.PyArray_DIM(x, 1)
    job.eps = eps
    job.x = cnp.PyArray_BYTES(x)
    job.weight = <const char *> data_or_null(weight)
    job.bias = <const char *> data_or_null(bias)
    job.out = cnp.PyArray_BYTES(y)
    job.means = cnp.PyArray_BYTES(means)
    job.scales = cnp.PyArray_BYTES(scales)
    share_out(norm_part, &job, cnp.PyArray_DIM(x, 0), NORM_WORK * job.width, n_threads)
    return y, means, scales


cdef void norm_dx_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Rows *s = <const Rows *> job
    cdef Py_ssize_t item = s.leaves.item_size, at = first * s.width * item
    s.leaves.layer_norm_dx(
        last - first, s.width, s.x + at, s.weight, s.means + first * item, s.scales + first * item, s.dy + at,
        s.out + at,
    )


cdef void norm_sums_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Rows *s = <const Rows *> job
    s.leaves.layer_norm_sums(
        s.rows, s.width, column(s, first), column(s, last), s.x, s.means, s.scales, s.dy, s.dweight, s.dbias,
    )


def layer_norm_backward(
    cnp.ndarray x not None, cnp.ndarray weight, cnp.ndarray means not None, cnp.ndarray scales not None,
    cnp.ndarray dy not None, cnp.ndarray dweight, cnp.ndarray dbias, int n_threads,
):
    """Gradient of x; those of the parameters are added."""
    cdef Rows job
    cdef cnp.ndarray dx = np.empty_like(x)
    job.leaves = table(x)
    job.rows = cnp.PyArray_DIM(x, 0)
    job.width = cnp.PyArray_DIM(x, 1)
    job.x = cnp.PyArray_BYTES(x)
    job.weight = <const char *> data_or_null(weight)
    job.means = cnp.PyArray_BYTES(means)
    job.scales = cnp.PyArray_BYTES(scales)
    job.dy = cnp.PyArray_BYTES(dy)
    job.out = cnp.PyArray_BYTES(dx)
    job.dweight = <char *> data_or_null(dweight)
    job.dbias = <char *> data_or_null(dbias)
    job.strip = LINE
    share_out(norm_dx_part, &job, job.rows, NORM_WORK * job.width, n_threads)
    cdef Py_ssize_t items = strips(&job)
    if dweight is not None:
        share_out(norm_sums_part, &job, items, NORM_WORK * job.rows * job.width / items, n_threads)
    return dx


cdef void dropout_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Rows *s = <const Rows *> job
    cdef Py_ssize_t start = column(s, first), item = s.leaves.item_size
    s.leaves.dropout(
        column(s, last) - start, s.x + start * item, s.out + start * item, start, s.seed, s.stream, s.threshold,
        s.factor,
    )


def dropout(cnp.ndarray x not None, double p, seed, stream, int n_threads):
    """Each element of x times 1 / (1 - p), or 0 with probability p; see `fastseq.reference.dense.dropout`."""
    cdef Rows job
    cdef cnp.ndarray y = np.empty_like(x)
    job.leaves = table(x)
    job.width = cnp.PyArray_SIZE(x)
    job.strip = LINE
    job.x = cnp.PyArray_BYTES(x)
    job.out = cnp.PyArray_BYTES(y)
    job.seed = seed
    job.stream = stream
    job.threshold = <uint32_t> min(ceil(p * 4294967296.0), 4294967295.0)
    job.factor = 1 / (1 - p)
    share_out(dropout_part, &job, strips(&job), DROPOUT_WORK * LINE / job.leaves.item_size, n_threads)
    return y
