"""What a recurrent decoder needs beside its cells, compiled; `fastseq.reference._additive_attention` has it in NumPy.

Arguments were checked at the door. Threads split queries, and in the backward the sequences of a batch; never a sum.
"""

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int64_t
from libc.string cimport memset

from attention.additive_attention cimport TANH_WORK, add_times, align_one, dot, hidden, real
from runtime.kernels cimport fs_kernels
from fastseq._parallel cimport parallel_for, parallel_for_dynamic

import numpy as np

from fastseq import _simd

cnp.import_array()

# Elements of an item, where each is for itself.
cdef Py_ssize_t LINE = 256

cdef const fs_kernels *table(cnp.ndarray x) except NULL:
    return <const fs_kernels *> PyCapsule_GetPointer(_simd.kernels[x.itemsize], "fastseq.kernels")


cdef struct Elements:
    const fs_kernels *kernels
    Py_ssize_t n
    const char *x
    const char *dy
    char *out


cdef void tanh_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Elements *e = <const Elements *> job
    cdef Py_ssize_t start = first * LINE, n = min(e.n, last * LINE) - start, at = start * e.kernels.item_size
    e.kernels.tanh(n, e.x + at, e.out + at)


cdef void slope(Py_ssize_t n, const real *y, const real *dy, real *dx) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        dx[i] = dy[i] * (<real> 1 - y[i] * y[i])


cdef void tanh_dx_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Elements *e = <const Elements *> job
    cdef Py_ssize_t start = first * LINE, n = min(e.n, last * LINE) - start, at = start * e.kernels.item_size
    if e.kernels.item_size == 4:
        slope(n, <const float *> (e.x + at), <const float *> (e.dy + at), <float *> (e.out + at))
    else:
        slope(n, <const double *> (e.x + at), <const double *> (e.dy + at), <double *> (e.out + at))


def tanh_forward(cnp.ndarray x not None, int n_threads):
    """tanh(x), elementwise, of a contiguous array."""
    cdef Elements job
    cdef cnp.ndarray y = np.empty_like(x)
    job.kernels = table(x)
    job.n = cnp.PyArray_SIZE(x)
    job.x = cnp.PyArray_BYTES(x)
    job.out = cnp.PyArray_BYTES(y)
    parallel_for(tanh_part, &job, (job.n + LINE - 1) // LINE, TANH_WORK * LINE, n_threads)
    return y


def tanh_backward(cnp.ndarray y not None, cnp.ndarray dy not None, int n_threads):
    """dx = dy (1 - y^2), of what `tanh_forward` gave."""
    cdef Elements job
    cdef cnp.ndarray dx = np.empty_like(y)
    job.kernels = table(y)
    job.n = cnp.PyArray_SIZE(y)
    job.x = cnp.PyArray_BYTES(y)
    job.dy = cnp.PyArray_BYTES(dy)
    job.out = cnp.PyArray_BYTES(dx)
    parallel_for(tanh_dx_part, &job, (job.n + LINE - 1) // LINE, LINE, n_threads)
    return dx


cdef struct Alignment:
    const fs_kernels *kernels
    Py_ssize_t units        # A
    Py_ssize_t width        # K
    Py_ssize_t max_count         # of a row of weights
    # Rows, contiguous, in bytes of the arrays; the last axis of each as above.
    const char *query       # [N][A]
    const char *projected   # [M][A]
    const char *keys        # [M][K]
    const char *score       # [A]
    const int64_t *starts   # backward: of the queries of each sequence; NULL: one a sequence
    const int64_t *firsts   # the first key of each query, or of each sequence
    const int64_t *counts   # and how many there are
    char *weights           # [N][max_count], zeros past the counts
    char *context           # [N][K]
    # Backward.
    const char *dcontext    # [N][K]
    char *dquery            # [N][A]
    char *dprojected        # [M][A], added to
    char *dkeys             # [M][K], added to
    char *dscores           # [sequences][A]


cdef inline void align_query(
    const Alignment *job, Py_ssize_t n, Py_ssize_t first, Py_ssize_t count, const real *kind, real *scratch,
) noexcept nogil:
    """Scores, softmax and context of query n; `kind` says of which real type."""
    cdef Py_ssize_t units = job.units, width = job.width
    cdef const real *query = <const real *> job.query + n * units
    cdef const real *projected = <const real *> job.projected + first * units
    cdef const real *keys = <const real *> job.keys + first * width
    cdef const real *score = <const real *> job.score
    cdef real *weights = <real *> job.weights + n * job.max_count
    cdef real *context = <real *> job.context + n * width
    align_one(job.kernels, units, width, count, query, projected, keys, score, weights, context, scratch)
    memset(weights + count, 0, (job.max_count - count) * sizeof(real))


cdef void align_part(const void *job, Py_ssize_t item, void *scratch) noexcept nogil:
    cdef const Alignment *a = <const Alignment *> job
    if a.kernels.item_size == 4:
        align_query(a, item, a.firsts[item], a.counts[item], <const float *> NULL, <float *> scratch)
    else:
        align_query(a, item, a.firsts[item], a.counts[item], <const double *> NULL, <double *> scratch)


cdef inline void align_back_query(
    const Alignment *job, Py_ssize_t n, Py_ssize_t first, Py_ssize_t count, real *dscore, real *scratch,
) noexcept nogil:
    """`align_query`, its last line first; what was thrown away is computed again."""
    cdef Py_ssize_t units = job.units, width = job.width, i, j
    cdef const real *query = <const real *> job.query + n * units
    cdef const real *projected = <const real *> job.projected + first * units
    cdef const real *keys = <const real *> job.keys + first * width
    cdef const real *score = <const real *> job.score
    cdef const real *weights = <const real *> job.weights + n * job.max_count
    cdef const real *dcontext = <const real *> job.dcontext + n * width
    cdef real *dquery = <real *> job.dquery + n * units
    cdef real *dprojected = <real *> job.dprojected + first * units
    cdef real *dkeys = <real *> job.dkeys + first * width
    cdef real *u = scratch
    cdef real *dweights = u + units
    cdef real *dscores = dweights + job.max_count
    cdef real d
    for j in range(count):
        dweights[j] = dot(width, dcontext, keys + j * width)
        add_times(width, weights[j], dcontext, dkeys + j * width)
    job.kernels.softmax_dx(1, count, weights, dweights, dscores)
    memset(dquery, 0, units * sizeof(real))
    for j in range(count):
        hidden(job.kernels, units, query, projected + j * units, u)
        add_times(units, dscores[j], <const real *> u, dscore)
        for i in range(units):
            d = dscores[j] * score[i] * (<real> 1 - u[i] * u[i])
            dprojected[j * units + i] += d
            dquery[i] += d


cdef inline void align_back_sequence(const Alignment *job, Py_ssize_t item, real *scratch) noexcept nogil:
    """All queries of a sequence, in their order."""
    cdef Py_ssize_t n = item if job.starts == NULL else job.starts[item]
    cdef Py_ssize_t last = item + 1 if job.starts == NULL else job.starts[item + 1]
    cdef real *dscore = <real *> job.dscores + item * job.units
    memset(dscore, 0, job.units * sizeof(real))
    while n < last:
        align_back_query(job, n, job.firsts[item], job.counts[item], dscore, scratch)
        n += 1


cdef void align_back_part(const void *job, Py_ssize_t item, void *scratch) noexcept nogil:
    cdef const Alignment *a = <const Alignment *> job
    if a.kernels.item_size == 4:
        align_back_sequence(a, item, <float *> scratch)
    else:
        align_back_sequence(a, item, <double *> scratch)


cdef int set_arrays(
    Alignment *job, cnp.ndarray query, cnp.ndarray projected, cnp.ndarray keys, cnp.ndarray score, cnp.ndarray firsts,
    cnp.ndarray counts,
) except -1:
    memset(job, 0, sizeof(Alignment))
    job.kernels = table(query)
    job.units = cnp.PyArray_DIM(query, 1)
    job.width = cnp.PyArray_DIM(keys, 1)
    job.query = cnp.PyArray_BYTES(query)
    job.projected = cnp.PyArray_BYTES(projected)
    job.keys = cnp.PyArray_BYTES(keys)
    job.score = cnp.PyArray_BYTES(score)
    job.firsts = <const int64_t *> cnp.PyArray_DATA(firsts)
    job.counts = <const int64_t *> cnp.PyArray_DATA(counts)
    return 0


def align(
    cnp.ndarray query not None, cnp.ndarray projected not None, cnp.ndarray keys not None, cnp.ndarray score not None,
    cnp.ndarray firsts not None, cnp.ndarray counts not None, int n_threads,
):
    """Additive attention of every query; see `fastseq.reference._additive_attention.align`."""
    cdef Alignment job
    cdef Py_ssize_t n = cnp.PyArray_DIM(query, 0), max_count = counts.max(initial=0)
    cdef cnp.ndarray context = np.empty((n, keys.shape[1]), query.dtype)
    cdef cnp.ndarray weights = np.empty((n, max_count), query.dtype)
    set_arrays(&job, query, projected, keys, score, firsts, counts)
    job.max_count = max_count
    job.context = cnp.PyArray_BYTES(context)
    job.weights = cnp.PyArray_BYTES(weights)
    cdef double work = <double> max_count * (job.units * TANH_WORK + job.width)
    cdef Py_ssize_t scratch = (job.units + max_count) * job.kernels.item_size
    parallel_for_dynamic(align_part, &job, n, max(1.0, work), scratch, n_threads)
    return context, weights


def align_backward(
    cnp.ndarray query not None, cnp.ndarray projected not None, cnp.ndarray keys not None, cnp.ndarray score not None,
    cnp.ndarray starts, cnp.ndarray firsts not None, cnp.ndarray counts not None, cnp.ndarray weights not None,
    cnp.ndarray dcontext not None, cnp.ndarray dprojected not None, cnp.ndarray dkeys not None,
    cnp.ndarray dscore not None, int n_threads,
):
    """The gradients; see `fastseq.reference._additive_attention.align_backward`."""
    cdef Alignment job
    cdef Py_ssize_t sequences = cnp.PyArray_DIM(counts, 0), n = cnp.PyArray_DIM(query, 0), i
    cdef cnp.ndarray dquery = np.empty_like(query)
    cdef cnp.ndarray dscores = np.empty((sequences, query.shape[1]), query.dtype)
    cdef const void *row
    set_arrays(&job, query, projected, keys, score, firsts, counts)
    job.max_count = cnp.PyArray_DIM(weights, 1)
    if starts is not None:
        job.starts = <const int64_t *> cnp.PyArray_DATA(starts)
    job.weights = cnp.PyArray_BYTES(weights)
    job.dcontext = cnp.PyArray_BYTES(dcontext)
    job.dquery = cnp.PyArray_BYTES(dquery)
    job.dprojected = cnp.PyArray_BYTES(dprojected)
    job.dkeys = cnp.PyArray_BYTES(dkeys)
    job.dscores = cnp.PyArray_BYTES(dscores)
    cdef double work = <double> job.max_count * (job.units * (TANH_WORK + 4) + 2 * job.width) * n / max(1, sequences)
    cdef Py_ssize_t scratch = (job.units + 2 * job.max_count) * job.kernels.item_size
    parallel_for_dynamic(align_back_part, &job, sequences, max(1.0, work), scratch, n_threads)
    for i in range(sequences):
        row = job.dscores + i * job.units * job.kernels.item_size
        job.kernels.sum_rows(&row, 1, 0, job.units, cnp.PyArray_DATA(dscore))
    return dquery
