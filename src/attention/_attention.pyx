"""Softmax attention and rotary positions, compiled; `fastseq.reference._attention` has the same in NumPy.

Arguments were checked before. Threads split sequences, key-value heads and, where these are few, queries; never a
sum. See kernels/attention.h. Masks, windows, costs and parts are prepared here for the blocks of a Transformer, too.
"""

cimport cython
cimport numpy as cnp
from libc.math cimport ceil, sqrt
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memset

from runtime.costs cimport ATTENTION_WORK, COPY_WORK, SIGNAL_WORK, WEIGHT_WORK
from runtime.kernels cimport fs_attention, fs_heads, fs_kernels
from fastseq._parallel cimport parallel_for, parallel_for_dynamic
from fastseq._simd cimport kernels_of

import numpy as np


cnp.import_array()

cdef enum:
    PARTS = 4              # parts that each thread finds at least, where there are so many queries
    PART_QUERIES = 8       # queries of a part at least: each part packs the keys for itself


@cython.internal
cdef class Job:
    """Attention over some arrays, which it keeps; heads of whole vectors."""

    cdef const fs_kernels *kernels
    cdef fs_attention job
    cdef Py_ssize_t width, value_width  # of heads as they were given
    cdef list arrays
    cdef cnp.ndarray q, k, v, out, stats


cdef fs_heads heads_of(cnp.ndarray array, bint ragged) noexcept:
    cdef fs_heads heads
    cdef Py_ssize_t item = array.itemsize
    heads.data = cnp.PyArray_DATA(array)
    if ragged:
        heads.batch = 0
        heads.row = cnp.PyArray_STRIDE(array, 0) // item
        heads.head = cnp.PyArray_STRIDE(array, 1) // item
    else:
        heads.batch = cnp.PyArray_STRIDE(array, 0) // item
        heads.head = cnp.PyArray_STRIDE(array, 1) // item
        heads.row = cnp.PyArray_STRIDE(array, 2) // item
    return heads


cdef cnp.ndarray widened(cnp.ndarray array, int lanes):
    """An array whose last axis is whole vectors: itself, or a copy with zeros behind it."""
    cdef Py_ssize_t width = cnp.PyArray_DIM(array, cnp.PyArray_NDIM(array) - 1)
    cdef Py_ssize_t whole = (width + lanes - 1) // lanes * lanes
    if width == whole:
        return array
    wide = np.zeros((<object> array).shape[:-1] + (whole,), array.dtype)
    wide[..., :width] = array
    return wide


cdef cnp.ndarray rows_like(cnp.ndarray array, Py_ssize_t width, make):
    """A new array of the form and memory order of one of heads, of another width."""
    if cnp.PyArray_IS_C_CONTIGUOUS(array):
        return make((<object> array).shape[:-1] + (width,), array.dtype)
    order = np.argsort([-stride for stride in (<object> array).strides[:-1]], kind="stable")
    shape = [array.shape[axis] for axis in order]
    return make((*shape, width), array.dtype).transpose(*np.argsort(order), array.ndim - 1)


cdef object narrowed(cnp.ndarray array, Py_ssize_t width):
    """The first elements of each head, of one whose last axis is whole vectors: `widened` undone."""
    return array if cnp.PyArray_DIM(array, cnp.PyArray_NDIM(array) - 1) == width else array[..., :width]


cdef Job job_of(
    cnp.ndarray q, cnp.ndarray k, cnp.ndarray v, spans, lengths, mask, bint causal, window, double scale,
):
    cdef Job made = Job()
    cdef fs_attention *job = &made.job
    cdef bint ragged = spans is not None
    cdef int last = 2 if ragged else 3
    cdef cnp.ndarray q_starts, k_starts, counted, strided
    cdef Mask allowed
    memset(job, 0, sizeof(fs_attention))
    made.kernels = kernels_of(q)
    made.q, made.k, made.v = (
        widened(q, made.kernels.lanes), widened(k, made.kernels.lanes), widened(v, made.kernels.lanes),
    )
    made.width, made.value_width = cnp.PyArray_DIM(q, last), cnp.PyArray_DIM(v, last)
    made.arrays = []
    job.width = cnp.PyArray_DIM(made.q, last)
    job.value_width = cnp.PyArray_DIM(made.v, last)
    job.heads, job.kv_heads = cnp.PyArray_DIM(q, 1), cnp.PyArray_DIM(k, 1)
    if ragged:
        q_starts, k_starts = spans
        made.arrays += spans
        job.q_starts = <const int64_t *> cnp.PyArray_DATA(q_starts)
        job.k_starts = <const int64_t *> cnp.PyArray_DATA(k_starts)
        job.batch = len(q_starts) - 1
        job.max_queries, job.max_keys = np.diff(q_starts).max(initial=0), np.diff(k_starts).max(initial=0)
    else:
        job.batch, job.max_queries, job.max_keys = (
            cnp.PyArray_DIM(q, 0), cnp.PyArray_DIM(q, 2), cnp.PyArray_DIM(k, 2),
        )
    job.q = heads_of(made.q, ragged)
    job.k = heads_of(made.k, ragged)
    job.v = heads_of(made.v, ragged)
    if lengths is not None:
        counted = lengths
        made.arrays.append(counted)
        job.lengths = <const int64_t *> cnp.PyArray_DATA(counted)
    strided = with_all_keys(mask, job.max_keys)
    made.arrays.append(strided)
    allowed = mask_of(strided)
    set_mask(job, &allowed)
    job.causal = causal
    job.window = 0 if window is None else min(window, MAX_WINDOW)
    job.scale = scale
    job.factor = 1
    job.parts = 1
    return made


cdef cnp.ndarray with_all_keys(mask, Py_ssize_t max_keys):
    """A mask whose last axis is contiguous and holds every key; None where there is none, or nothing to attend to."""
    if mask is None or not mask.size:
        return None
    if mask.shape[3] != max_keys:
        mask = np.broadcast_to(mask, (*mask.shape[:3], max_keys))
    return mask if max_keys <= 1 or mask.strides[3] == mask.itemsize else np.ascontiguousarray(mask)


cdef Mask mask_of(cnp.ndarray mask) noexcept:
    """Where a mask is that `with_all_keys` returned."""
    cdef Mask result
    cdef int axis
    memset(&result, 0, sizeof(result))
    if mask is not None:
        result.data = cnp.PyArray_DATA(mask)
        result.is_bool = cnp.PyArray_TYPE(mask) == cnp.NPY_BOOL
        for axis in range(3):
            result.strides[axis] = 0 if cnp.PyArray_DIM(mask, axis) == 1 else cnp.PyArray_STRIDE(mask, axis)
    return result


cdef void set_mask(fs_attention *job, const Mask *mask) noexcept nogil:
    cdef int axis
    job.mask = mask.data
    job.mask_is_bool = mask.is_bool
    for axis in range(3):
        job.mask_strides[axis] = mask.strides[axis]


cdef double pair_work(const fs_attention *job) noexcept nogil:
    """Multiply-adds of a forward of all queries that read one key-value head of one sequence."""
    cdef double weights = <double> job.max_queries * job.max_keys * (job.heads // job.kv_heads)
    return weights * (job.width + job.value_width + WEIGHT_WORK) * (0.5 if job.causal else 1)


cdef Py_ssize_t parts_for(const fs_attention *job, int n_threads) noexcept nogil:
    """Into how many parts a forward splits the queries that read one key-value head of one sequence.

    Few heads are split so that every thread finds some, and long ones so that Ctrl-C is seen.
    """
    cdef Py_ssize_t pairs = max(1, job.batch * job.kv_heads)
    return max(
        1, min(job.max_queries // PART_QUERIES, PARTS * n_threads // pairs),
        <Py_ssize_t> min(ceil(8 * pair_work(job) / SIGNAL_WORK), 1e6),
    )


cdef struct Items:
    const fs_kernels *kernels
    const fs_attention *job


cdef void forward_part(const void *job, Py_ssize_t item, void *scratch) noexcept nogil:
    cdef const Items *items = <const Items *> job
    items.kernels.attend(items.job, item, scratch)


cdef void backward_part(const void *job, Py_ssize_t item, void *scratch) noexcept nogil:
    cdef const Items *items = <const Items *> job
    items.kernels.attend_back(items.job, item, scratch)


cdef object run(Job made, want_weights, int n_threads):
    """Results of a forward: outputs, and weights where they are wanted."""
    cdef fs_attention *job = &made.job
    cdef Items items
    cdef cnp.ndarray out = rows_like(made.q, job.value_width, np.empty)
    cdef cnp.ndarray stats = np.empty((job.batch, job.heads, job.max_queries, 2), out.dtype)
    cdef cnp.ndarray weights
    cdef Py_ssize_t pairs = job.batch * job.kv_heads
    cdef double work = pair_work(job)
    job.out = heads_of(out, job.q_starts != NULL)
    job.stats = cnp.PyArray_DATA(stats)
    result = None
    if want_weights:
        weights = np.zeros((job.batch, job.heads, job.max_queries, job.max_keys), out.dtype)
        job.weights = cnp.PyArray_DATA(weights)
        result = weights
    job.parts = parts_for(job, n_threads)
    items.kernels = made.kernels
    items.job = job
    made.out, made.stats = out, stats
    parallel_for_dynamic(
        forward_part, &items, pairs * job.parts, max(1.0, work / job.parts),
        made.kernels.attend_scratch(job) * made.kernels.item_size, n_threads if pairs * work > ATTENTION_WORK else 1,
    )
    job.weights = NULL
    return narrowed(out, made.value_width), result


def attention(q, k, v, spans, lengths, mask, bint causal, window, double scale, bint want_weights, int n_threads):
    """softmax(q k^T scale + mask) v, and the softmax; see `fastseq.reference._attention.attention`."""
    return run(job_of(q, k, v, spans, lengths, mask, causal, window, scale), want_weights, n_threads)


cdef inline bint is_usual(object value, int dtype) noexcept:
    """Whether an array of heads (B, heads, T, D) is of exactly this dtype, contiguous, aligned and in native order."""
    return (
        cnp.PyArray_CheckExact(value)
        and cnp.PyArray_NDIM(<cnp.ndarray> value) == 4
        and cnp.PyArray_TYPE(<cnp.ndarray> value) == dtype
        and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> value)
        and cnp.PyArray_DIM(<cnp.ndarray> value, 1) > 0
        and cnp.PyArray_DIM(<cnp.ndarray> value, 3) > 0
    )


def usual_attention(q, k, v, bint causal, int n_threads):
    """Outputs of attention without mask, lengths and window, where the arrays need no check; else None.

    A quick answer for the usual case, of small arrays too: the checks in Python take as long as the arithmetic. None
    says nothing about the arrays.
    """
    cdef int dtype = cnp.NPY_FLOAT32
    cdef cnp.npy_intp *of_q
    cdef cnp.npy_intp *of_k
    cdef cnp.npy_intp *of_v
    if cnp.PyArray_CheckExact(q) and cnp.PyArray_TYPE(<cnp.ndarray> q) == cnp.NPY_FLOAT64:
        dtype = cnp.NPY_FLOAT64
    if not (is_usual(q, dtype) and is_usual(k, dtype) and is_usual(v, dtype)):
        return None
    of_q, of_k, of_v = (
        cnp.PyArray_DIMS(<cnp.ndarray> q), cnp.PyArray_DIMS(<cnp.ndarray> k), cnp.PyArray_DIMS(<cnp.ndarray> v),
    )
    if (
        of_k[0] != of_q[0] or of_v[0] != of_q[0] or of_v[1] != of_k[1] or of_v[2] != of_k[2] or of_k[3] != of_q[3]
        or of_q[1] % of_k[1]
    ):
        return None
    return run(job_of(q, k, v, None, None, None, causal, None, 1 / sqrt(<double> of_q[3])), False, n_threads)[0]


def attention_forward(
    q, k, v, spans, lengths, mask, bint causal, window, double scale, double dropout, seed, int n_threads,
):
    """The same for training, with dropout, and what backward needs."""
    cdef Job made = job_of(q, k, v, spans, lengths, mask, causal, window, scale)
    if dropout:
        made.job.seed = seed
        made.job.threshold = <uint32_t> min(ceil(dropout * 4294967296.0), 4294967295.0)
        made.job.factor = 1 / (1 - dropout)
    out, _ = run(made, False, n_threads)
    return out, made


def attention_backward(Job kept not None, dout, int n_threads):
    """Gradients of q, k and v."""
    cdef fs_attention job = kept.job
    cdef Items items
    cdef bint ragged = job.q_starts != NULL
    cdef Py_ssize_t pairs = job.batch * job.kv_heads, part, parts
    cdef double work = 2.5 * pair_work(&job)
    wide = widened(dout, kept.kernels.lanes)
    cdef cnp.ndarray dq = rows_like(kept.q, job.width, np.zeros), dk = rows_like(kept.k, job.width, np.zeros)
    cdef cnp.ndarray dv = rows_like(kept.v, job.value_width, np.zeros)
    job.dout = heads_of(wide, ragged)
    job.dq = heads_of(dq, ragged)
    job.dk = heads_of(dk, ragged)
    job.dv = heads_of(dv, ragged)
    items.kernels = kept.kernels
    items.job = &job
    cdef Py_ssize_t scratch = kept.kernels.attend_back_scratch(&job) * kept.kernels.item_size
    parts = <Py_ssize_t> max(1.0, min(ceil(4 * work / SIGNAL_WORK), 1e6))
    job.parts = parts
    if pairs < n_threads and parts * pairs * work / parts > SIGNAL_WORK / 256:
        job.parts = max(4 * n_threads, parts)
        for phase in (1, 2):
            job.phase = phase
            parallel_for_dynamic(
                backward_part, &items, pairs * job.parts, max(1.0, work / job.parts), scratch, n_threads,
            )
    else:
        for part in range(parts):
            job.part = part
            parallel_for_dynamic(backward_part, &items, pairs, max(1.0, work / parts), scratch, n_threads)
    return narrowed(dq, kept.width), narrowed(dk, kept.width), narrowed(dv, kept.value_width)


cdef struct Rotation:
    const fs_kernels *kernels
    const char *x
    Py_ssize_t x_row
    Py_ssize_t x_head
    char *y
    Py_ssize_t heads
    Py_ssize_t width
    Py_ssize_t rotary_dim
    const char *cos
    const char *sin
    const int64_t *positions
    bint interleaved
    bint inverse


cdef void rotary_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Rotation *t = <const Rotation *> job
    cdef Py_ssize_t row, angles, item = t.kernels.item_size
    for row in range(first, last):
        angles = t.positions[row] * (t.rotary_dim // 2) * item
        t.kernels.rotary(
            t.heads, t.x_head, t.width, t.rotary_dim, t.interleaved, t.inverse, t.x + row * t.x_row,
            t.cos + angles, t.sin + angles, t.y + row * t.heads * t.width * item,
        )


def rotary(
    cnp.ndarray x not None, cnp.ndarray cos not None, cnp.ndarray sin not None, cnp.ndarray positions not None,
    bint interleaved, bint inverse, int n_threads,
):
    """Heads turned by the angles of their positions; see `fastseq.reference._attention.rotary`."""
    cdef Rotation job
    cdef cnp.ndarray y = np.empty((x.shape[0], x.shape[1], x.shape[2]), x.dtype)
    job.kernels = kernels_of(x)
    job.x = cnp.PyArray_BYTES(x)
    job.x_row = cnp.PyArray_STRIDE(x, 0)
    job.x_head = cnp.PyArray_STRIDE(x, 1) // job.kernels.item_size
    job.y = cnp.PyArray_BYTES(y)
    job.heads = cnp.PyArray_DIM(x, 1)
    job.width = cnp.PyArray_DIM(x, 2)
    job.rotary_dim = 2 * cnp.PyArray_DIM(cos, 1)
    job.cos = cnp.PyArray_BYTES(cos)
    job.sin = cnp.PyArray_BYTES(sin)
    job.positions = <const int64_t *> cnp.PyArray_DATA(positions)
    job.interleaved = interleaved
    job.inverse = inverse
    parallel_for(rotary_part, &job, cnp.PyArray_DIM(x, 0), COPY_WORK * job.heads * job.width, n_threads)
    return y
