"""Loops over many series, compiled: least squares, one-step predictions and closed-loop forecasts.

`fastseq.reference._autoregression` has the same operations in NumPy, and their documentation. Arguments were checked
before. Threads split the series; a series is one chain of sums in one order.
"""

cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from libc.math cimport hypot

from runtime.costs cimport SIGNAL_WORK_SCALAR, threads_for
from runtime.kernels cimport fs_kernels
from runtime.team cimport fs_barrier
from fastseq._parallel cimport run_team
from fastseq._simd cimport kernels_of

import numpy as np

from fastseq import _simd

cnp.import_array()

ctypedef fused real:
    float
    double

ctypedef void (*activation_kernel)(ptrdiff_t n, const void *x, void *y) noexcept nogil

ctypedef struct Job:
    Py_ssize_t rows
    Py_ssize_t time         # steps of the array below
    Py_ssize_t order
    Py_ssize_t hidden
    Py_ssize_t first        # of the steps that are done
    const char *x           # (rows, time)
    const cnp.int64_t *lengths
    const char *intercept   # (models,)
    const char *weights     # (models, order), the last value first
    Py_ssize_t models_step  # 1 where every row has a model of its own, 0 where all share one
    const char *hidden_weights  # (order, hidden), the oldest value first
    const char *hidden_bias
    const char *output_weights
    activation_kernel activation
    char *scratch           # (threads, hidden)
    char *y                 # what is written; its shape is the operation's

# One row's part of a job: steps from_step..to_step-1.
ctypedef void (*row_job)(
    const Job *job, Py_ssize_t row, Py_ssize_t from_step, Py_ssize_t to_step, int thread,
) noexcept nogil


# Some rows and steps of a job.
cdef struct Block:
    row_job each
    const Job *job
    Py_ssize_t base
    Py_ssize_t rows
    Py_ssize_t from_step
    Py_ssize_t to_step


cdef void rows_of(void *block, int thread, int team, fs_barrier *barrier) noexcept nogil:
    """The part of one thread."""
    cdef const Block *b = <const Block *> block
    cdef Py_ssize_t row
    for row in range(b.base + b.rows * thread // team, b.base + b.rows * (thread + 1) // team):
        b.each(b.job, row, b.from_step, b.to_step, thread)


cdef int execute(row_job each, const Job *job, Py_ssize_t steps, Py_ssize_t step_work, int n_threads) except -1:
    """Do all rows and steps, in blocks between which Ctrl-C is looked for."""
    cdef Py_ssize_t limit = max(1, SIGNAL_WORK_SCALAR // step_work), block_rows = min(job.rows, limit), chunk
    cdef Block block
    if job.rows == 0 or steps == 0:
        return 0
    cdef int threads = threads_for(job.rows, <double> steps * step_work, n_threads)
    block.each, block.job, block.base = each, job, 0
    chunk = max(1, limit // block_rows)
    while block.base < job.rows:
        block.rows = min(block_rows, job.rows - block.base)
        block.from_step = 0
        while block.from_step < steps:
            block.to_step = min(steps, block.from_step + chunk)
            with nogil:
                run_team(rows_of, &block, threads, n_threads)
            PyErr_CheckSignals()
            block.from_step = block.to_step
        block.base += block.rows
    return 0


cdef void triangle_row(const Job *job, Py_ssize_t row, Py_ssize_t from_step, Py_ssize_t to_step,
                       int thread) noexcept nogil:
    """Givens rotations take one equation after another into the triangle."""
    cdef Py_ssize_t width = job.order + 2, t, j, k
    cdef double *triangle = <double *> job.y + row * (width + 1) * width
    cdef double *equation = triangle + width * width
    cdef const double *x = <const double *> job.x + row * job.time
    cdef double *upper
    cdef double length, cosine, sine, a, b
    for t in range(job.first + from_step, min(job.first + to_step, job.lengths[row])):
        equation[0] = 1
        for k in range(job.order):
            equation[1 + k] = x[t - 1 - k]
        equation[width - 1] = x[t]
        for j in range(width):
            if equation[j] == 0:
                continue
            upper = triangle + j * width
            length = hypot(upper[j], equation[j])
            cosine = upper[j] / length
            sine = equation[j] / length
            upper[j] = length
            for k in range(j + 1, width):
                a = upper[k]
                b = equation[k]
                upper[k] = cosine * a + sine * b
                equation[k] = cosine * b - sine * a


def triangle(cnp.ndarray x not None, cnp.ndarray lengths not None, Py_ssize_t order, Py_ssize_t first, int n_threads):
    """The triangular factor of every series' equations; see `fastseq.reference._autoregression.triangle`."""
    cdef Job job
    cdef Py_ssize_t width = order + 2
    job.rows = cnp.PyArray_DIM(x, 0)
    job.time = cnp.PyArray_DIM(x, 1)
    job.order = order
    job.first = first
    job.x = cnp.PyArray_BYTES(x)
    job.lengths = <const cnp.int64_t *> cnp.PyArray_DATA(lengths)
    # One row more than the triangle has: the equation that is being taken in.
    cdef cnp.ndarray result = np.zeros((job.rows, width + 1, width))
    job.y = cnp.PyArray_BYTES(result)
    execute(triangle_row, &job, max(0, job.time - first), 2 * width * width + 32 * width, n_threads)
    return result[:, :width]


cdef void predict_row(const Job *job, Py_ssize_t row, Py_ssize_t from_step, Py_ssize_t to_step, int thread,
                      real kind) noexcept nogil:
    cdef const real *x = <const real *> job.x + row * job.time
    cdef real *y = <real *> job.y + row * job.time
    cdef Py_ssize_t model = row * job.models_step, t, k
    cdef const real *weights = <const real *> job.weights + model * job.order
    cdef real total
    for t in range(max(from_step, job.order - 1), min(to_step, job.lengths[row])):
        total = (<const real *> job.intercept)[model]
        for k in range(job.order):
            total += weights[k] * x[t - k]
        y[t] = total


cdef void predict_row_float(const Job *job, Py_ssize_t row, Py_ssize_t from_step, Py_ssize_t to_step,
                            int thread) noexcept nogil:
    predict_row[float](job, row, from_step, to_step, thread, 0)


cdef void predict_row_double(const Job *job, Py_ssize_t row, Py_ssize_t from_step, Py_ssize_t to_step,
                             int thread) noexcept nogil:
    predict_row[double](job, row, from_step, to_step, thread, 0)


def predict(
    cnp.ndarray x not None, cnp.ndarray lengths not None, cnp.ndarray intercept not None,
    cnp.ndarray coefficients not None, int n_threads,
):
    """What follows every step; see `fastseq.reference._autoregression.predict`."""
    cdef Job job
    cdef Py_ssize_t row
    job.rows = cnp.PyArray_DIM(x, 0)
    job.time = cnp.PyArray_DIM(x, 1)
    job.order = cnp.PyArray_DIM(coefficients, 1)
    job.x = cnp.PyArray_BYTES(x)
    job.lengths = <const cnp.int64_t *> cnp.PyArray_DATA(lengths)
    set_linear(&job, intercept, coefficients)
    cdef cnp.ndarray result = np.zeros_like(x)
    result[:, :job.order - 1] = np.nan
    for row in np.flatnonzero(lengths < job.order - 1):
        result[row, job.lengths[row]:] = 0
    job.y = cnp.PyArray_BYTES(result)
    cdef bint single = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32
    execute(predict_row_float if single else predict_row_double, &job, job.time, job.order + 1, n_threads)
    return result


cdef void set_linear(Job *job, cnp.ndarray intercept, cnp.ndarray coefficients):
    job.intercept = cnp.PyArray_BYTES(intercept)
    job.weights = cnp.PyArray_BYTES(coefficients)
    job.models_step = cnp.PyArray_DIM(coefficients, 0) > 1


cdef void rollout_row(const Job *job, Py_ssize_t row, Py_ssize_t from_step, Py_ssize_t to_step, int thread,
                      real kind) noexcept nogil:
    cdef real *y = <real *> job.y + row * job.time + job.order
    cdef Py_ssize_t model = row * job.models_step, t, k
    cdef const real *weights = <const real *> job.weights + model * job.order
    cdef real total
    for t in range(from_step, to_step):
        total = (<const real *> job.intercept)[model]
        for k in range(job.order):
            total += weights[k] * y[t - 1 - k]
        y[t] = total


cdef void rollout_row_float(const Job *job, Py_ssize_t row, Py_ssize_t from_step, Py_ssize_t to_step,
                            int thread) noexcept nogil:
    rollout_row[float](job, row, from_step, to_step, thread, 0)


cdef void rollout_row_double(const Job *job, Py_ssize_t row, Py_ssize_t from_step, Py_ssize_t to_step,
                             int thread) noexcept nogil:
    rollout_row[double](job, row, from_step, to_step, thread, 0)


cdef cnp.ndarray begun(Job *job, cnp.ndarray recent, Py_ssize_t horizon):
    """The past of every series with room for its future behind it: what is predicted is read again from there."""
    job.rows = cnp.PyArray_DIM(recent, 0)
    job.order = cnp.PyArray_DIM(recent, 1)
    job.time = job.order + horizon
    result = np.empty((job.rows, job.time), recent.dtype)
    result[:, :job.order] = recent
    job.y = cnp.PyArray_BYTES(result)
    return result


def rollout(
    cnp.ndarray recent not None, cnp.ndarray intercept not None, cnp.ndarray coefficients not None,
    Py_ssize_t horizon, int n_threads,
):
    """What follows when predictions are taken for values; see `fastseq.reference._autoregression.rollout`."""
    cdef Job job
    cdef cnp.ndarray result = begun(&job, recent, horizon)
    set_linear(&job, intercept, coefficients)
    cdef bint single = cnp.PyArray_TYPE(recent) == cnp.NPY_FLOAT32
    execute(rollout_row_float if single else rollout_row_double, &job, horizon, job.order + 1, n_threads)
    return np.ascontiguousarray(result[:, job.order:])


cdef void perceptron_row(const Job *job, Py_ssize_t row, Py_ssize_t from_step, Py_ssize_t to_step, int thread,
                         real kind) noexcept nogil:
    cdef real *y = <real *> job.y + row * job.time
    cdef real *hidden = <real *> job.scratch + thread * job.hidden
    cdef const real *weights
    cdef real value, total
    cdef Py_ssize_t t, j, k
    for t in range(from_step, to_step):
        for j in range(job.hidden):
            hidden[j] = (<const real *> job.hidden_bias)[j]
        for k in range(job.order):
            weights = <const real *> job.hidden_weights + k * job.hidden
            value = y[t + k]
            for j in range(job.hidden):
                hidden[j] += weights[j] * value
        if job.activation != NULL:
            job.activation(job.hidden, hidden, hidden)
        else:
            for j in range(job.hidden):
                if hidden[j] < 0:
                    hidden[j] = 0
        total = (<const real *> job.intercept)[0]
        for j in range(job.hidden):
            total += (<const real *> job.output_weights)[j] * hidden[j]
        y[t + job.order] = total


cdef void perceptron_row_float(const Job *job, Py_ssize_t row, Py_ssize_t from_step, Py_ssize_t to_step,
                               int thread) noexcept nogil:
    perceptron_row[float](job, row, from_step, to_step, thread, 0)


cdef void perceptron_row_double(const Job *job, Py_ssize_t row, Py_ssize_t from_step, Py_ssize_t to_step,
                                int thread) noexcept nogil:
    perceptron_row[double](job, row, from_step, to_step, thread, 0)


def rollout_perceptron(
    cnp.ndarray recent not None, cnp.ndarray hidden_weight not None, cnp.ndarray hidden_bias not None,
    cnp.ndarray output_weight not None, cnp.ndarray output_bias not None, str activation, Py_ssize_t horizon,
    int n_threads,
):
    """The same for a perceptron; see `fastseq.reference._autoregression.rollout_perceptron`."""
    cdef Job job
    cdef cnp.ndarray result = begun(&job, recent, horizon)
    cdef const fs_kernels *kernels = kernels_of(recent)
    cdef cnp.ndarray turned = np.ascontiguousarray(hidden_weight.T)
    job.hidden = cnp.PyArray_DIM(hidden_bias, 0)
    job.hidden_weights = cnp.PyArray_BYTES(turned)
    job.hidden_bias = cnp.PyArray_BYTES(hidden_bias)
    job.output_weights = cnp.PyArray_BYTES(output_weight)
    job.intercept = cnp.PyArray_BYTES(output_bias)
    if activation == "sigmoid":
        job.activation = kernels.sigmoid
    elif activation == "tanh":
        job.activation = kernels.tanh
    else:
        job.activation = NULL
    cdef cnp.ndarray scratch = np.empty((n_threads, job.hidden), recent.dtype)
    job.scratch = cnp.PyArray_BYTES(scratch)
    cdef bint single = cnp.PyArray_TYPE(recent) == cnp.NPY_FLOAT32
    execute(
        perceptron_row_float if single else perceptron_row_double, &job, horizon,
        job.hidden * (job.order + 10), n_threads,
    )
    return np.ascontiguousarray(result[:, job.order:])


def activate(cnp.ndarray x not None, str activation):
    """What `rollout_perceptron` makes of its hidden units; see `fastseq.reference._autoregression.activate`."""
    if activation == "relu":
        return np.maximum(x, 0)
    return getattr(_simd, activation)(x)
