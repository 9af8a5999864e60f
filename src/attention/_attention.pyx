"""Softmax attention and rotary positions, compiled; `fastseq.reference._attention` has the same in NumPy.

Arguments were checked at the door. Threads split sequences, key-value heads and, where these are few, queries; never a
sum. See kernels/attention.h.
"""

cimport cython
cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport ceil
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memset

from runtime.kernels cimport fs_attention, fs_heads, fs_kernels
from fastseq._parallel cimport SIGNAL_WORK, parallel_for, parallel_for_dynamic

import numpy as np

from fastseq import _simd

cnp.import_array()

# What a weight takes beside the products, and an element that is rotary_dim, in multiply-adds.
cdef double WEIGHT_WORK = 32
cdef double TURN_WORK = 8


cdef const fs_kernels *table(cnp.ndarray x) except NULL:
    return <const fs_kernels *> PyCapsule_GetPointer(_simd.kernels[x.itemsize], "fastseq.kernels")


@cython.internal
cdef class Job:
    """Attention over some arrays, which it keeps; heads of whole vectors."""

    cdef const fs_kernels *kernels
    cdef fs_attention job
    cdef tuple shapes  # of q, k and v as they were given
    cdef list arrays
    cdef object q, k, v, out, stats


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


cdef object widened(array, int lanes):
    """An array whose last axis is whole vectors: itself, or a copy with zeros behind it."""
    width = array.shape[-1]
    whole = -(-width // lanes) * lanes
    if width == whole:
        return array
    wide = np.zeros((*array.shape[:-1], whole), array.dtype)
    wide[..., :width] = array
    return wide


cdef object rows_like(array, width, make):
    """A new array of the form and memory order of one of heads, of another width."""
    order = np.argsort([-stride for stride in array.strides[:-1]], kind="stable")
    shape = [array.shape[axis] for axis in order]
    return make((*shape, width), array.dtype).transpose(*np.argsort(order), array.ndim - 1)


cdef Job job_of(q, k, v, spans, lengths, mask, bint causal, window, double scale):
    cdef Job made = Job()
    cdef fs_attention *job = &made.job
    cdef bint ragged = spans is not None
    cdef cnp.ndarray q_starts, k_starts, counted, strided
    cdef int axis
    memset(job, 0, sizeof(fs_attention))
    made.kernels = table(q)
    made.shapes = q.shape, k.shape, v.shape
    made.q, made.k, made.v = (widened(array, made.kernels.lanes) for array in (q, k, v))
    made.arrays = []
    job.width = made.q.shape[-1]
    job.value_width = made.v.shape[-1]
    if ragged:
        q_starts, k_starts = spans
        made.arrays += spans
        job.q_starts = <const int64_t *> cnp.PyArray_DATA(q_starts)
        job.k_starts = <const int64_t *> cnp.PyArray_DATA(k_starts)
        job.batch = len(q_starts) - 1
        job.heads, job.kv_heads = q.shape[1], k.shape[1]
        job.max_queries, job.max_keys = (int(np.diff(starts).max(initial=0)) for starts in spans)
    else:
        job.batch, job.heads, job.max_queries = q.shape[:3]
        job.kv_heads, job.max_keys = k.shape[1:3]
    job.q = heads_of(made.q, ragged)
    job.k = heads_of(made.k, ragged)
    job.v = heads_of(made.v, ragged)
    if lengths is not None:
        counted = lengths
        made.arrays.append(counted)
        job.lengths = <const int64_t *> cnp.PyArray_DATA(counted)
    if mask is not None and mask.size:
        if mask.shape[3] != job.max_keys:
            mask = np.broadcast_to(mask, (*mask.shape[:3], job.max_keys))
        if job.max_keys > 1 and mask.strides[3] != mask.itemsize:
            mask = np.ascontiguousarray(mask)
        strided = mask
        made.arrays.append(strided)
        job.mask = cnp.PyArray_DATA(strided)
        job.mask_is_bool = mask.dtype == bool
        for axis in range(3):
            job.mask_strides[axis] = 0 if strided.shape[axis] == 1 else cnp.PyArray_STRIDE(strided, axis)
    job.causal = causal
    # Beyond all keys and queries a window opens no more.
    job.window = 0 if window is None else min(window, job.max_queries + job.max_keys + 1)
    job.scale = scale
    job.factor = 1
    job.parts = 1
    return made


cdef double pair_work(const fs_attention *job) noexcept nogil:
    """Multiply-adds of a forward of all that reads one key-value head of one sequence."""
    cdef double weights = <double> job.max_queries * job.max_keys * (job.heads // job.kv_heads)
    return weights * (job.width + job.value_width + WEIGHT_WORK) * (0.5 if job.causal else 1)


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
    # Few heads are split so that every thread finds some, and long ones so that Ctrl-C is seen.
    job.parts = max(1, 4 * n_threads // max(1, pairs), <Py_ssize_t> min(ceil(8 * work / SIGNAL_WORK), 1e6))
    items.kernels = made.kernels
    items.job = job
    made.out, made.stats = out, stats
    parallel_for_dynamic(
        forward_part, &items, pairs * job.parts, max(1.0, work / job.parts),
        made.kernels.attend_scratch(job) * made.kernels.item_size, n_threads,
    )
    job.weights = NULL
    return out[..., :made.shapes[2][-1]], result


def attention(q, k, v, spans, lengths, mask, bint causal, window, double scale, bint want_weights, int n_threads):
    """softmax(q k^T scale + mask) v, and the softmax; see `fastseq.reference._attention.attention`."""
    return run(job_of(q, k, v, spans, lengths, mask, causal, window, scale), want_weights, n_threads)


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
    dq, dk, dv = (rows_like(array, array.shape[-1], np.zeros) for array in (kept.q, kept.k, kept.v))
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
    return tuple(d[..., :shape[-1]] for d, shape in zip((dq, dk, dv), kept.shapes))


cdef struct Turn:
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


cdef void turn_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Turn *t = <const Turn *> job
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
    """Heads rotary_dim by the angles of their positions; see `fastseq.reference._attention.rotary`."""
    cdef Turn job
    cdef cnp.ndarray y = np.empty((x.shape[0], x.shape[1], x.shape[2]), x.dtype)
    job.kernels = table(x)
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
    parallel_for(turn_part, &job, cnp.PyArray_DIM(x, 0), TURN_WORK * job.heads * job.width, n_threads)
    return y
