"""Linear, embedding, norms, activations, softmax and dropout, compiled.

`fastseq.reference._dense` has the same in NumPy.

Arguments were checked before; arrays are contiguous, except the rows of what a linear layer multiplies, which may lie
apart. Threads split rows, columns or elements, never a sum.
"""

cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from libc.math cimport ceil
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from runtime.costs cimport ACTIVATION_WORK, COPY_WORK, DROPOUT_WORK, NORM_WORK, SIGNAL_WORK, threads_for
from runtime.kernels cimport (
    FS_GELU, FS_GELU_TANH, FS_IDENTITY, FS_RELU, fs_epilogue, fs_kernels, fs_narrow_bytes, fs_step, fs_weights,
)
from runtime.scratch cimport CACHE_LINE, Scratch, scratch_array, scratch_close, scratch_open
from runtime.team cimport fs_barrier, fs_flush_denormals, fs_restore_denormals
from fastseq._packing cimport PackedWeight, RowTable, copy_row, pack_linear, row_table
from fastseq._parallel cimport parallel_for, run_team, team_wait
from fastseq._simd cimport kernels_of
from fastseq._weight_gradient cimport (
    GRADIENT_ROWS, WeightGradient, add_row, lay_out_factors, lay_out_sums, multiply_share, pack_share, set_factor,
    set_product, sum_weight_gradients, take_sums,
)

import numpy as np

cnp.import_array()

cdef enum:
    SCATTERED = 512   # bytes of a row below which reading the ids once more costs more than another thread gives
    BLOCK_ROWS = 512  # rows whose pointers are made at once
    NARROW_BLOCK = 8 * BLOCK_ROWS  # rows that stand as narrow rows at once


def linear_pack(weight not None, cnp.ndarray bias):
    """Pack the weights of a linear layer; returns a `PackedWeight`."""
    return pack_linear(None, weight, bias)


cdef struct Map:
    const fs_kernels *kernels
    const fs_weights *weights
    Py_ssize_t rows
    const char *x
    Py_ssize_t x_row
    char *y
    Py_ssize_t y_row
    bint by_panels
    char *narrow         # of narrow weights: the rows, narrow
    Py_ssize_t narrow_row


cdef void narrow_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Some rows as narrow weights multiply them."""
    cdef const Map *p = <const Map *> job
    cdef const void *x[BLOCK_ROWS]
    cdef Py_ssize_t base = first, rows, i
    while base < last:
        rows = min(BLOCK_ROWS, last - base)
        for i in range(rows):
            x[i] = p.x + (base + i) * p.x_row
        p.weights.narrow.rows(p.weights.type, rows, p.weights.h_size, x, p.narrow + base * p.narrow_row)
        base += rows


cdef void product_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Some rows of all panels, or all rows of some panels."""
    cdef const Map *p = <const Map *> job
    cdef const void *x[BLOCK_ROWS]
    cdef const void *init[BLOCK_ROWS]
    cdef void *out[BLOCK_ROWS]
    cdef fs_step step
    cdef Py_ssize_t i, base = 0 if p.by_panels else first, end = p.rows if p.by_panels else last
    memset(&step, 0, sizeof(step))
    step.weights = p.weights
    step.first = first if p.by_panels else 0
    step.last = last if p.by_panels else p.weights.panels
    step.epilogue = FS_IDENTITY
    step.init = init
    step.h = x
    step.out = out
    while base < end:
        step.rows = min(BLOCK_ROWS, end - base)
        for i in range(step.rows):
            x[i] = p.x + (base + i) * p.x_row
            init[i] = p.weights.bias
            out[i] = p.y + (base + i) * p.y_row
        step.narrow_h = p.narrow + base * p.narrow_row
        p.kernels.plain(&step)
        base += BLOCK_ROWS


cdef int multiply_rows(
    PackedWeight packed, Py_ssize_t rows, const char *x, Py_ssize_t x_row, char *y, Py_ssize_t y_row, int n_threads,
) except -1:
    """Multiply some rows, x_row bytes apart, with packed weights."""
    cdef const fs_weights *weights = &packed.panels
    cdef Py_ssize_t block = rows, first, items
    cdef double work_row = <double> weights.units * weights.h_size
    cdef Map job
    job.kernels = packed.kernels
    job.weights = weights
    job.x_row = x_row
    job.y_row = y_row
    job.by_panels = rows < 2 * packed.kernels.tile_rows[4] * n_threads
    if work_row * BLOCK_ROWS > SIGNAL_WORK and weights.panels >= 8 * n_threads:
        # Few rows between two looks for Ctrl-C would have to wait for all of the weights.
        job.by_panels = True
        block = BLOCK_ROWS
    cdef Scratch scratch
    memset(&scratch, 0, sizeof(scratch))
    job.narrow, job.narrow_row = NULL, fs_narrow_bytes(weights, False, 1)
    if weights.narrow != NULL:
        block = min(block, NARROW_BLOCK)
        scratch_array(&scratch, block * job.narrow_row)
        scratch_open(&scratch)
        job.narrow = scratch_array(&scratch, block * job.narrow_row)
    try:
        for first in range(0, rows, max(block, 1)):
            job.rows = min(block, rows - first)
            job.x = x + first * x_row
            job.y = y + first * y_row
            if weights.narrow != NULL:
                parallel_for(narrow_part, &job, job.rows, <double> COPY_WORK * weights.h_size, n_threads)
            items = weights.panels if job.by_panels else job.rows
            parallel_for(product_part, &job, items, job.rows * work_row / items, n_threads)
    finally:
        scratch_close(&scratch)
    return 0


cdef cnp.ndarray mapped(PackedWeight packed, cnp.ndarray x, int n_threads):
    """The rows of x times packed weights."""
    cdef Py_ssize_t rows = cnp.PyArray_DIM(x, 0)
    cdef cnp.ndarray y = np.empty((rows, packed.panels.units), x.dtype)
    multiply_rows(
        packed, rows, cnp.PyArray_BYTES(x), cnp.PyArray_STRIDE(x, 0), cnp.PyArray_BYTES(y), cnp.PyArray_STRIDE(y, 0),
        n_threads,
    )
    return y


def linear_forward(PackedWeight packed not None, cnp.ndarray x not None, int n_threads):
    """x W^T + b of the rows of x; see `fastseq.reference._dense.linear_forward`."""
    return mapped(packed, x, n_threads)


cdef struct Gradient:
    const fs_kernels *kernels
    WeightGradient gradient
    char *bias           # sum so far, or NULL
    Py_ssize_t zero_bytes  # from there on, which have to start as zeros
    const void **dy_rows
    const void **x_rows
    char *pointers       # of each thread, GRADIENT_ROWS
    char *room           # for rows that have to be copied together
    # What is done now:
    Py_ssize_t rows
    int part             # of the outputs, where there are several parts
    int parts


cdef void lay_out(Gradient *job, Py_ssize_t rows, Py_ssize_t room_row, int threads, Scratch *scratch) noexcept nogil:
    """Give the scratch arrays their places."""
    cdef Py_ssize_t pointer = sizeof(void *)
    job.bias = scratch_array(scratch, job.gradient.a[0].columns * job.kernels.item_size)
    lay_out_sums(&job.gradient, job.kernels, scratch)
    job.zero_bytes = scratch.n_bytes
    lay_out_factors(&job.gradient, job.kernels, rows, scratch)
    job.dy_rows = <const void **> scratch_array(scratch, rows * pointer)
    job.x_rows = <const void **> scratch_array(scratch, rows * pointer)
    job.pointers = scratch_array(scratch, threads * GRADIENT_ROWS * pointer)
    job.room = scratch_array(scratch, rows * room_row)


cdef void gradient_share(void *gradient, int thread, int team, fs_barrier *barrier) noexcept nogil:
    """What one thread adds of some rows."""
    cdef Gradient *job = <Gradient *> gradient
    cdef Py_ssize_t rows = job.rows, columns = job.gradient.a[0].columns
    cdef const void **pointers = <const void **> (job.pointers + thread * GRADIENT_ROWS * sizeof(void *))
    if job.part == 0:
        job.kernels.sum_rows(job.dy_rows, rows, columns * thread // team, columns * (thread + 1) // team, job.bias)
    if job.parts == 1:
        sum_weight_gradients(&job.gradient, job.kernels, rows, pointers, thread, team, barrier)
    else:
        if job.part == 0:
            pack_share(&job.gradient, job.kernels, 0, rows, pointers, thread, team)
            if team > 1:
                team_wait(barrier, team)
        multiply_share(&job.gradient.products[0], job.kernels, rows, job.part * team + thread, job.parts * team)


cdef int add_products(
    const fs_kernels *kernels, gradient_rows rows_of, const void *source, Py_ssize_t total, Py_ssize_t room_row,
    Py_ssize_t units, Py_ssize_t k, char *dweight, char *dbias, int n_threads,
) except -1:
    """dweight += dy^T x;  dbias += the sum over the rows of dy

    Parameters
    ----------
    rows_of, source
        Where the rows are, `total` of them: dy of `units` reals, x of k.
    room_row : int
        Bytes of a row of x, where rows of x may have to be copied; else 0.
    dweight, dbias : pointers to reals, (units, k) and (units,)
        `dbias` may be NULL.
    """
    cdef Gradient job
    cdef Py_ssize_t block, first
    cdef Scratch scratch
    cdef unsigned long long before
    job.kernels = kernels
    cdef double work = <double> units * k
    # Few enough rows that Ctrl-C is seen in time; and where that would be too few, some of the outputs at a time.
    cdef Py_ssize_t limit = GRADIENT_ROWS if room_row else 8 * GRADIENT_ROWS
    block = min(total, max(GRADIENT_ROWS, <Py_ssize_t> min(<double> limit, SIGNAL_WORK / work)))
    job.parts = <int> min(<double> units, ceil(block * work / SIGNAL_WORK)) if block <= GRADIENT_ROWS else 1
    cdef int threads = threads_for(units, total * <double> k, n_threads)
    if total == 0:
        return 0
    job.gradient.n_a = job.gradient.n_b = job.gradient.n_products = 1
    set_factor(&job.gradient.a[0], NULL, 0, units)
    set_factor(&job.gradient.b[0], NULL, 0, k)
    set_product(&job.gradient.products[0], &job.gradient.a[0], &job.gradient.b[0], dweight)
    memset(&scratch, 0, sizeof(scratch))
    lay_out(&job, block, room_row, threads, &scratch)
    scratch_open(&scratch)
    lay_out(&job, block, room_row, threads, &scratch)
    with nogil:
        memset(job.bias, 0, job.zero_bytes)
    job.gradient.a[0].rows = job.dy_rows
    job.gradient.b[0].rows = job.x_rows
    try:
        for first in range(0, total, block):
            job.rows = min(block, total - first)
            with nogil:
                rows_of(source, first, job.rows, job.dy_rows, job.x_rows, job.room)
            for job.part in range(job.parts):
                with nogil:
                    run_team(gradient_share, &job, threads, n_threads)
                PyErr_CheckSignals()
        with nogil:
            before = fs_flush_denormals()
            take_sums(&job.gradient, job.kernels)
            if dbias != NULL:
                add_row(job.kernels, job.bias, units, dbias)
            fs_restore_denormals(before)
    finally:
        scratch_close(&scratch)
    return 0


cdef struct Factors:
    const char *dy
    Py_ssize_t dy_row
    const char *x
    Py_ssize_t x_row


cdef void rows_of_arrays(
    const void *source, Py_ssize_t first, Py_ssize_t n, const void **dy, const void **x, char *room,
) noexcept nogil:
    """Rows of two arrays; a `gradient_rows`."""
    cdef const Factors *factors = <const Factors *> source
    cdef Py_ssize_t i
    for i in range(n):
        dy[i] = factors.dy + (first + i) * factors.dy_row
        x[i] = factors.x + (first + i) * factors.x_row


cdef int add_weight_gradient(
    cnp.ndarray x, cnp.ndarray dy, cnp.ndarray dweight, cnp.ndarray dbias, int n_threads,
) except -1:
    """dweight += dy^T x;  dbias += the sum over the rows of dy"""
    cdef Factors factors
    factors.dy, factors.dy_row = cnp.PyArray_BYTES(dy), cnp.PyArray_STRIDE(dy, 0)
    factors.x, factors.x_row = cnp.PyArray_BYTES(x), cnp.PyArray_STRIDE(x, 0)
    return add_products(
        kernels_of(x), rows_of_arrays, &factors, cnp.PyArray_DIM(x, 0), 0, cnp.PyArray_DIM(dweight, 0),
        cnp.PyArray_DIM(dweight, 1), cnp.PyArray_BYTES(dweight),
        NULL if dbias is None else cnp.PyArray_BYTES(dbias), n_threads,
    )


def linear_backward(
    PackedWeight packed not None, cnp.ndarray x not None, cnp.ndarray dy not None, cnp.ndarray dweight not None,
    cnp.ndarray dbias, int n_threads,
):
    """Gradient of x; those of the parameters are added; see `fastseq.reference._dense.linear_backward`."""
    cdef cnp.ndarray dx = mapped(packed.transposed(), dy, n_threads)
    add_weight_gradient(x, dy, dweight, dbias, n_threads)
    return dx


cdef struct Rows:
    const fs_kernels *kernels
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
    fs_epilogue activation
    int smooth
    uint64_t seed
    uint64_t stream
    uint32_t threshold
    double factor


cdef inline void *data_or_null(cnp.ndarray array) noexcept:
    return NULL if array is None else cnp.PyArray_DATA(array)


cdef inline Py_ssize_t strips(const Rows *s) noexcept nogil:
    """How many strips a row has, which are what threads split where they split columns."""
    return (s.width * s.kernels.item_size + s.strip - 1) // s.strip


cdef inline Py_ssize_t column(const Rows *s, Py_ssize_t strip) noexcept nogil:
    """The first column of a strip."""
    return min(s.width, strip * s.strip // s.kernels.item_size)


cdef struct Lookup:
    RowTable table
    const int64_t *ids
    char *out


cdef void gather_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Lookup *s = <const Lookup *> job
    cdef Py_ssize_t row
    for row in range(first, last):
        copy_row(&s.table, s.ids[row], s.out + row * s.table.width * s.table.real_item)


def embedding_forward(weight not None, cnp.ndarray ids not None, int n_threads):
    """The rows of a matrix that ids (rows,) name, as reals."""
    cdef Lookup job
    cdef cnp.ndarray y = np.empty((ids.shape[0], weight.shape[1]), weight.dtype)
    job.table = row_table(weight)
    job.ids = <const int64_t *> cnp.PyArray_DATA(ids)
    job.out = cnp.PyArray_BYTES(y)
    parallel_for(gather_part, &job, cnp.PyArray_DIM(ids, 0), <double> COPY_WORK * job.table.width, n_threads)
    return y


cdef void scatter_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Rows *s = <const Rows *> job
    s.kernels.scatter_add(
        s.rows, s.ids, s.skip, s.width, column(s, first), column(s, last), s.dy, s.dweight,
    )


def embedding_backward(
    cnp.ndarray ids not None, cnp.ndarray dy not None, cnp.ndarray dweight not None, Py_ssize_t padding_idx,
    int n_threads,
):
    """Add each row of dy (rows, width) to the gradient of its id, in order; that of `padding_idx` to none."""
    cdef Rows job
    job.kernels = kernels_of(dy)
    job.rows = cnp.PyArray_DIM(ids, 0)
    job.width = cnp.PyArray_DIM(dweight, 1)
    job.ids = <const int64_t *> cnp.PyArray_DATA(ids)
    job.skip = padding_idx
    job.strip = SCATTERED
    job.dy = cnp.PyArray_BYTES(dy)
    job.dweight = cnp.PyArray_BYTES(dweight)
    cdef Py_ssize_t items = strips(&job)
    parallel_for(scatter_part, &job, items, <double> COPY_WORK * job.rows * job.width / items, n_threads)


cdef void norm_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Rows *s = <const Rows *> job
    cdef Py_ssize_t item = s.kernels.item_size, at = first * s.width * item
    s.kernels.layer_norm(
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
    job.kernels = kernels_of(x)
    job.width = cnp.PyArray_DIM(x, 1)
    job.eps = eps
    job.x = cnp.PyArray_BYTES(x)
    job.weight = <const char *> data_or_null(weight)
    job.bias = <const char *> data_or_null(bias)
    job.out = cnp.PyArray_BYTES(y)
    job.means = cnp.PyArray_BYTES(means)
    job.scales = cnp.PyArray_BYTES(scales)
    parallel_for(norm_part, &job, cnp.PyArray_DIM(x, 0), <double> NORM_WORK * job.width, n_threads)
    return y, means, scales


cdef void norm_dx_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Rows *s = <const Rows *> job
    cdef Py_ssize_t item = s.kernels.item_size, at = first * s.width * item
    s.kernels.layer_norm_dx(
        last - first, s.width, s.x + at, s.weight, s.means + first * item, s.scales + first * item, s.dy + at,
        s.out + at,
    )


cdef void norm_sums_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Rows *s = <const Rows *> job
    s.kernels.layer_norm_sums(
        s.rows, s.width, column(s, first), column(s, last), s.x, s.means, s.scales, s.dy, s.dweight, s.dbias,
    )


def layer_norm_backward(
    cnp.ndarray x not None, cnp.ndarray weight, cnp.ndarray means not None, cnp.ndarray scales not None,
    cnp.ndarray dy not None, cnp.ndarray dweight, cnp.ndarray dbias, int n_threads,
):
    """Gradient of x; those of the parameters are added."""
    cdef Rows job
    cdef cnp.ndarray dx = np.empty_like(x)
    job.kernels = kernels_of(x)
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
    job.strip = CACHE_LINE
    parallel_for(norm_dx_part, &job, job.rows, <double> NORM_WORK * job.width, n_threads)
    cdef Py_ssize_t items = strips(&job)
    if dweight is not None:
        parallel_for(norm_sums_part, &job, items, <double> NORM_WORK * job.rows * job.width / items, n_threads)
    return dx


cdef void rms_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Rows *s = <const Rows *> job
    cdef Py_ssize_t item = s.kernels.item_size, at = first * s.width * item
    s.kernels.rms_norm(last - first, s.width, s.eps, s.x + at, s.weight, s.out + at, s.scales + first * item)


def rms_norm_forward(cnp.ndarray x not None, cnp.ndarray weight, double eps, int n_threads):
    """y, and 1 / sqrt(mean of squares + eps) of each row of x (rows, width)."""
    cdef Rows job
    cdef cnp.ndarray y = np.empty_like(x), scales = np.empty(x.shape[0], x.dtype)
    job.kernels = kernels_of(x)
    job.width = cnp.PyArray_DIM(x, 1)
    job.eps = eps
    job.x = cnp.PyArray_BYTES(x)
    job.weight = <const char *> data_or_null(weight)
    job.out = cnp.PyArray_BYTES(y)
    job.scales = cnp.PyArray_BYTES(scales)
    parallel_for(rms_part, &job, cnp.PyArray_DIM(x, 0), <double> NORM_WORK * job.width, n_threads)
    return y, scales


cdef void rms_dx_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Rows *s = <const Rows *> job
    cdef Py_ssize_t item = s.kernels.item_size, at = first * s.width * item
    s.kernels.rms_norm_dx(
        last - first, s.width, s.x + at, s.weight, s.scales + first * item, s.dy + at, s.out + at,
    )


cdef void rms_sums_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Rows *s = <const Rows *> job
    s.kernels.rms_norm_sums(s.rows, s.width, column(s, first), column(s, last), s.x, s.scales, s.dy, s.dweight)


def rms_norm_backward(
    cnp.ndarray x not None, cnp.ndarray weight, cnp.ndarray scales not None, cnp.ndarray dy not None,
    cnp.ndarray dweight, int n_threads,
):
    """Gradient of x; that of the weight is added."""
    cdef Rows job
    cdef cnp.ndarray dx = np.empty_like(x)
    job.kernels = kernels_of(x)
    job.rows = cnp.PyArray_DIM(x, 0)
    job.width = cnp.PyArray_DIM(x, 1)
    job.x = cnp.PyArray_BYTES(x)
    job.weight = <const char *> data_or_null(weight)
    job.scales = cnp.PyArray_BYTES(scales)
    job.dy = cnp.PyArray_BYTES(dy)
    job.out = cnp.PyArray_BYTES(dx)
    job.dweight = <char *> data_or_null(dweight)
    job.strip = CACHE_LINE
    parallel_for(rms_dx_part, &job, job.rows, <double> NORM_WORK * job.width, n_threads)
    cdef Py_ssize_t items = strips(&job)
    if dweight is not None:
        parallel_for(rms_sums_part, &job, items, <double> NORM_WORK * job.rows * job.width / items, n_threads)
    return dx


cdef fs_epilogue activation_of(str kind):
    return FS_RELU if kind == "relu" else FS_GELU if kind == "gelu" else FS_GELU_TANH


cdef enum:  # the activations that are made of tanh and sigmoid
    OTHER
    TANH
    SIGMOID
    SILU
    SMOOTH_BLOCK = 256


cdef int smooth_of(str kind):
    return TANH if kind == "tanh" else SIGMOID if kind == "sigmoid" else SILU if kind == "silu" else OTHER


ctypedef fused real:
    float
    double


cdef void smooth(const fs_kernels *kernels, int kind, Py_ssize_t n, const real *x, real *y) noexcept nogil:
    """tanh(x), sigmoid(x) or x sigmoid(x)."""
    cdef Py_ssize_t i
    if kind == TANH:
        kernels.tanh(n, x, y)
        return
    kernels.sigmoid(n, x, y)
    if kind == SILU:
        for i in range(n):
            y[i] = x[i] * y[i]


cdef void smooth_dx(
    const fs_kernels *kernels, int kind, Py_ssize_t n, const real *x, const real *dy, real *dx,
) noexcept nogil:
    """dy times the slope, made of s(x) and s(-x) = 1 - s(x), s the sigmoid: where one of them is small nothing cancels.

    sigmoid: s(x) s(-x);  tanh: 4 s(2 x) s(-2 x);  silu: s(x) + x s(x) s(-x).
    """
    cdef real up[SMOOTH_BLOCK]
    cdef real down[SMOOTH_BLOCK]
    cdef real steep
    cdef Py_ssize_t i, first = 0, m
    while first < n:
        m = min(SMOOTH_BLOCK, n - first)
        for i in range(m):
            up[i] = 2 * x[first + i] if kind == TANH else x[first + i]
            down[i] = -up[i]
        kernels.sigmoid(m, up, up)
        kernels.sigmoid(m, down, down)
        for i in range(m):
            steep = up[i] * down[i]
            if kind == TANH:
                steep = 4 * steep
            elif kind == SILU:
                steep = up[i] if steep == 0 else up[i] + x[first + i] * steep  # far from 0 x may be inf
            dx[first + i] = dy[first + i] * steep
        first += m


cdef void smooth_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """As `activation_part`."""
    cdef const Rows *s = <const Rows *> job
    cdef Py_ssize_t start = column(s, first), n = column(s, last) - start
    if s.kernels.item_size == sizeof(float):
        if s.dy == NULL:
            smooth[float](s.kernels, s.smooth, n, <const float *> s.x + start, <float *> s.out + start)
        else:
            smooth_dx[float](
                s.kernels, s.smooth, n, <const float *> s.x + start, <const float *> s.dy + start,
                <float *> s.out + start,
            )
    elif s.dy == NULL:
        smooth[double](s.kernels, s.smooth, n, <const double *> s.x + start, <double *> s.out + start)
    else:
        smooth_dx[double](
            s.kernels, s.smooth, n, <const double *> s.x + start, <const double *> s.dy + start,
            <double *> s.out + start,
        )


cdef void activation_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Of some elements y, or with a dy the gradient of x."""
    cdef const Rows *s = <const Rows *> job
    cdef Py_ssize_t start = column(s, first), n = column(s, last) - start, at = start * s.kernels.item_size
    if s.dy == NULL:
        s.kernels.activate(s.activation, n, s.x + at, s.out + at)
    else:
        s.kernels.activate_dx(s.activation, n, s.x + at, s.dy + at, s.out + at)


cdef cnp.ndarray activated(cnp.ndarray x, cnp.ndarray dy, str kind, int n_threads):
    cdef Rows job
    cdef cnp.ndarray y = np.empty_like(x)
    job.kernels = kernels_of(x)
    job.width = cnp.PyArray_SIZE(x)
    job.strip = CACHE_LINE
    job.activation = activation_of(kind)
    job.smooth = smooth_of(kind)
    job.x = cnp.PyArray_BYTES(x)
    job.dy = <const char *> data_or_null(dy)
    job.out = cnp.PyArray_BYTES(y)
    parallel_for(
        activation_part if job.smooth == OTHER else smooth_part, &job, strips(&job),
        <double> ACTIVATION_WORK * CACHE_LINE / job.kernels.item_size, n_threads,
    )
    return y


def activation_forward(cnp.ndarray x not None, str kind not None, int n_threads):
    """f(x), elementwise; see `fastseq.reference._dense.activation_forward`."""
    return activated(x, None, kind, n_threads)


def activation_backward(cnp.ndarray x not None, cnp.ndarray dy not None, str kind not None, int n_threads):
    """f'(x) dy, elementwise."""
    return activated(x, dy, kind, n_threads)


cdef void softmax_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Of some rows y, or with a dy the gradient of x, where x is the y of the forward."""
    cdef const Rows *s = <const Rows *> job
    cdef Py_ssize_t at = first * s.width * s.kernels.item_size
    if s.dy == NULL:
        s.kernels.softmax(last - first, s.width, s.x + at, s.out + at)
    else:
        s.kernels.softmax_dx(last - first, s.width, s.x + at, s.dy + at, s.out + at)


cdef cnp.ndarray softmaxed(cnp.ndarray x, cnp.ndarray dy, int n_threads):
    cdef Rows job
    cdef cnp.ndarray y = np.empty_like(x)
    job.kernels = kernels_of(x)
    job.width = cnp.PyArray_DIM(x, 1)
    job.x = cnp.PyArray_BYTES(x)
    job.dy = <const char *> data_or_null(dy)
    job.out = cnp.PyArray_BYTES(y)
    parallel_for(softmax_part, &job, cnp.PyArray_DIM(x, 0), <double> ACTIVATION_WORK * job.width, n_threads)
    return y


def softmax_forward(cnp.ndarray x not None, int n_threads):
    """The softmax of each row of x (rows, width)."""
    return softmaxed(x, None, n_threads)


def softmax_backward(cnp.ndarray y not None, cnp.ndarray dy not None, int n_threads):
    """Gradient of x, given y and its gradient."""
    return softmaxed(y, dy, n_threads)


cdef void dropout_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Rows *s = <const Rows *> job
    cdef Py_ssize_t start = column(s, first), item = s.kernels.item_size
    s.kernels.dropout(
        column(s, last) - start, s.x + start * item, s.out + start * item, start, s.seed, s.stream, s.threshold,
        s.factor,
    )


def dropout(cnp.ndarray x not None, double p, seed, stream, int n_threads):
    """Each element of x times 1 / (1 - p), or 0 with probability p; see `fastseq.reference._dense.dropout`."""
    cdef Rows job
    cdef cnp.ndarray y = np.empty_like(x)
    job.kernels = kernels_of(x)
    job.width = cnp.PyArray_SIZE(x)
    job.strip = CACHE_LINE
    job.x = cnp.PyArray_BYTES(x)
    job.out = cnp.PyArray_BYTES(y)
    job.seed = seed
    job.stream = stream
    job.threshold = <uint32_t> min(ceil(p * 4294967296.0), 4294967295.0)
    job.factor = 1 / (1 - p)
    cdef double strip_work = <double> DROPOUT_WORK * CACHE_LINE / job.kernels.item_size
    parallel_for(dropout_part, &job, strips(&job), strip_work, n_threads)
    return y
