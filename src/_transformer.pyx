"""Whole stacks of Transformer blocks, compiled, for inference; `fastseq.reference.transformer_operations` has the same.

Arguments were checked at the door. A run is a list of steps over the rows of all sequences, and a team of threads walks
it together. Steps that need no more than their own row stand in one segment, which is done in one of two ways:

* rows: threads take blocks of rows, and go through all steps of the segment with a block while it is in their cache;
* panels: where rows are few, each step is a segment of its own, and threads take panels of its weights.

Attention is a segment of its own. The threads meet after every segment. No choice changes a bit of the result: an
output is one chain over k, whoever computes it.
"""

cimport cython
cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.pycapsule cimport PyCapsule_GetPointer
from cython.parallel cimport parallel, threadid
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from leaves cimport (
    FS_ADD, FS_GELU, FS_GELU_TANH, FS_IDENTITY, FS_RELU, fs_attention, fs_finish, fs_leaves, fs_step, fs_weights,
)
from outer cimport fs_barrier, fs_barrier_wait
from share cimport (
    SHARE_CHUNK_WORK, SHARE_LINE, fs_counter, fs_counter_set, fs_flush_denormals, fs_restore_denormals, fs_take,
    fs_team_limit, fs_team_size, lines, threads_for,
)

import numpy as np

from fastseq import _simd

cnp.import_array()

cdef extern from "team.h" nogil:
    void fs_barrier_init(fs_barrier *barrier)

cdef enum Kind:
    PRODUCT  # y = f(x W^T + b), or y += that
    NORM
    TURN     # queries and keys by their positions, in place
    COPY     # heads of one width into heads of another, zeros behind them
    ATTEND

cdef enum:
    ROW_BLOCK = 192      # rows of a block: they read all weights of a segment once, and stay in a core's cache
    FEW_ROWS = 64        # so many rows a thread, and each reads the weights as fast as it multiplies
    POINTER_ROWS = 128   # rows whose pointers are made at once
    NORM_ROWS = 16       # rows of an item where a norm is a segment of its own
    MOST_STEPS = 20      # of a block
    ITEMS = 4            # items each thread finds at least, where there are so many

# What an element of a norm, of a copy, and a weight of attention takes beside the products, in multiply-adds.
cdef double NORM_WORK = 24
cdef double COPY_WORK = 8
cdef double WEIGHT_WORK = 32

cdef dict ACTIVATIONS = {"relu": FS_RELU, "gelu": FS_GELU, "gelu_tanh": FS_GELU_TANH}


cdef struct Norm:
    bint rms
    double eps
    const char *weight
    const char *bias


# Rows: the first, and the bytes from one to the next. Where there is only room for a block of them, which each thread
# has for itself, the first row of a block is that many bytes from where a thread's own rows begin.
cdef struct Place:
    char *data
    Py_ssize_t row
    Py_ssize_t own             # -1: none of that


cdef struct Step:
    Kind kind
    Py_ssize_t rows
    Place x
    Place y
    const fs_weights *weights  # PRODUCT
    fs_finish finish
    Norm norm                  # NORM, of `width` elements
    Py_ssize_t width           # or of a head, TURN and COPY
    Py_ssize_t heads
    Py_ssize_t y_width         # COPY
    Py_ssize_t turned          # TURN
    bint interleaved
    const char *cos
    const char *sin
    const int64_t *positions
    fs_attention attention     # ATTEND
    double work                # multiply-adds, of all of it


cdef struct Segment:
    Py_ssize_t first           # steps [first, last)
    Py_ssize_t last
    Py_ssize_t items
    Py_ssize_t rows_each       # rows of an item, or
    Py_ssize_t panels_each     # panels of an item; 0: rows
    double work                # of an item
    fs_counter counter


cdef struct Run:
    const fs_leaves *leaves
    Step *steps
    Segment *segments
    char *scratch              # of each thread
    Py_ssize_t scratch_each
    Py_ssize_t attend_bytes    # of them, for attention; then for norms; then the rows of its own
    Py_ssize_t norm_bytes
    fs_barrier barrier


cdef inline char *row_of(const Place *place, char *own, Py_ssize_t row, Py_ssize_t first) noexcept nogil:
    if place.own >= 0:
        return own + place.own + (row - first) * place.row
    return place.data + row * place.row


cdef void product(
    const fs_leaves *leaves, const Step *s, char *own, Py_ssize_t first, Py_ssize_t last, Py_ssize_t panel,
    Py_ssize_t panel_end,
) noexcept nogil:
    cdef const void *x[POINTER_ROWS]
    cdef const void *init[POINTER_ROWS]
    cdef void *out[POINTER_ROWS]
    cdef fs_step step
    cdef Py_ssize_t row = first, i
    memset(&step, 0, sizeof(step))
    step.weights = s.weights
    step.first = panel
    step.last = panel_end
    step.finish = s.finish
    step.init = init
    step.h = x
    step.out = out
    while row < last:
        step.rows = min(POINTER_ROWS, last - row)
        for i in range(step.rows):
            x[i] = row_of(&s.x, own, row + i, first)
            init[i] = s.weights.bias
            out[i] = row_of(&s.y, own, row + i, first)
        leaves.plain(&step)
        row += POINTER_ROWS


cdef void norm(
    const fs_leaves *leaves, const Step *s, char *sums, char *own, Py_ssize_t first, Py_ssize_t last,
) noexcept nogil:
    cdef const char *x = row_of(&s.x, own, first, first)
    cdef char *y = row_of(&s.y, own, first, first)
    if s.norm.rms:
        leaves.rms_norm(last - first, s.width, s.norm.eps, x, s.norm.weight, y, sums)
    else:
        leaves.layer_norm(
            last - first, s.width, s.norm.eps, x, s.norm.weight, s.norm.bias, y, sums,
            sums + (last - first) * leaves.item_size,
        )


cdef void turn(const fs_leaves *leaves, const Step *s, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef Py_ssize_t row, angles
    cdef char *heads
    for row in range(first, last):
        heads = s.x.data + row * s.x.row
        angles = s.positions[row] * (s.turned // 2) * leaves.item_size
        leaves.rotary(
            s.heads, s.width, s.width, s.turned, s.interleaved, 0, heads, s.cos + angles, s.sin + angles, heads,
        )


cdef void copy(Py_ssize_t item, const Step *s, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef Py_ssize_t row, head, n_bytes = min(s.width, s.y_width) * item
    cdef char *y
    for row in range(first, last):
        for head in range(s.heads):
            y = s.y.data + row * s.y.row + head * s.y_width * item
            memcpy(y, s.x.data + row * s.x.row + head * s.width * item, n_bytes)
            memset(y + n_bytes, 0, s.y_width * item - n_bytes)


cdef void do_item(const Run *run, const Segment *segment, Py_ssize_t item, char *scratch) noexcept nogil:
    """What one thread does of a segment."""
    cdef const Step *s = &run.steps[segment.first]
    cdef Py_ssize_t first = item * segment.rows_each, last = min(s.rows, first + segment.rows_each), i
    cdef char *sums = scratch + run.attend_bytes
    cdef char *own = sums + run.norm_bytes
    if s.kind == ATTEND:
        run.leaves.attend(&s.attention, item, scratch)
        return
    if segment.panels_each:
        first = item * segment.panels_each
        product(run.leaves, s, NULL, 0, s.rows, first, min(s.weights.panels, first + segment.panels_each))
        return
    for i in range(segment.first, segment.last):
        s = &run.steps[i]
        if s.kind == PRODUCT:
            product(run.leaves, s, own, first, last, 0, s.weights.panels)
        elif s.kind == NORM:
            norm(run.leaves, s, sums, own, first, last)
        elif s.kind == TURN:
            turn(run.leaves, s, first, last)
        else:
            copy(run.leaves.item_size, s, first, last)


cdef void walk(
    Run *run, Py_ssize_t segment, Py_ssize_t last_segment, Py_ssize_t last_item, int thread, int team,
) noexcept nogil:
    """What one thread of a team takes: from where the counters stand through `last_item` of the last segment."""
    cdef unsigned long long before = fs_flush_denormals()
    cdef char *scratch = run.scratch + thread * run.scratch_each
    cdef Segment *s
    cdef Py_ssize_t item, end
    while segment <= last_segment:
        s = &run.segments[segment]
        end = last_item if segment == last_segment else s.items
        if run.steps[s.first].kind == ATTEND:
            (<int64_t *> scratch)[0] = -1  # whose keys are packed there
        item = fs_take(&s.counter)
        while item < end:
            do_item(run, s, item, scratch)
            item = fs_take(&s.counter)
        if team > 1:
            fs_barrier_wait(&run.barrier, team)
        segment += 1
    fs_restore_denormals(before)


cdef class Block:
    """One block: its settings, and the weights that others packed and it keeps. Immutable."""

    cdef list kept
    cdef const fs_leaves *leaves
    cdef int item
    cdef Py_ssize_t heads, kv_heads, head_dim, window
    cdef fs_finish activation
    cdef bint norm_first, rms, cross, interleaved
    cdef double eps
    cdef const fs_weights *in_proj
    cdef const fs_weights *out_proj
    cdef const fs_weights *linear1
    cdef const fs_weights *linear2
    cdef const fs_weights *cross_q
    cdef const fs_weights *cross_kv
    cdef const fs_weights *cross_out
    cdef Norm norms[3]
    cdef cnp.ndarray cos, sin

    cdef const fs_weights *weights(self, packed) except NULL:
        self.kept.append(packed)
        return <const fs_weights *> PyCapsule_GetPointer(packed.panels(), "fastseq.weights")


cdef Norm norm_of(bint rms, double eps, cnp.ndarray weight, cnp.ndarray bias) noexcept:
    cdef Norm norm
    norm.rms = rms
    norm.eps = eps
    norm.weight = NULL if weight is None else cnp.PyArray_BYTES(weight)
    norm.bias = NULL if bias is None else cnp.PyArray_BYTES(bias)
    return norm


def block_pack(settings, parts):
    """A block as `run_blocks` wants it; see `fastseq.reference.transformer_operations.block_pack`."""
    cdef Block block = Block()
    cdef int i
    block.kept = []
    block.heads = settings["heads"]
    block.kv_heads = settings["kv_heads"]
    block.head_dim = settings["head_dim"]
    block.activation = ACTIVATIONS[settings["activation"]]
    block.norm_first = settings["norm_first"]
    block.rms = settings["norm"] == "rms"
    block.eps = settings["eps"]
    block.cross = settings["cross"]
    block.window = settings["window"] or 0
    if settings["rotary"] is not None:
        block.cos, block.sin, block.interleaved = settings["rotary"]
    block.in_proj = block.weights(parts["in_proj"])
    block.out_proj = block.weights(parts["out_proj"])
    block.linear1 = block.weights(parts["linear1"])
    block.linear2 = block.weights(parts["linear2"])
    if block.cross:
        block.cross_q = block.weights(parts["cross_q"])
        block.cross_kv = block.weights(parts["cross_kv"])
        block.cross_out = block.weights(parts["cross_out"])
    for i in range(3 if block.cross else 2):
        weight, bias = parts[f"norm{i + 1}"]
        block.kept += [weight, bias]
        block.norms[i] = norm_of(block.rms, block.eps, weight, bias)
    return block


@cython.internal
cdef class Builder:
    """Lays out the steps of a run, and the memory that they share."""

    cdef const fs_leaves *leaves
    cdef int item
    cdef bint few                   # rows: panels are split
    cdef Py_ssize_t count, room     # steps
    cdef Step *steps
    cdef char *memory               # NULL while its size is being counted
    cdef Py_ssize_t n_bytes
    cdef Py_ssize_t own_bytes       # of a thread's own rows

    cdef Place place(self, Py_ssize_t rows, Py_ssize_t width) noexcept:
        """Room for some rows."""
        cdef Place place
        place.row = width * self.item
        place.own = -1
        place.data = self.memory + self.n_bytes
        self.n_bytes += lines(rows * place.row)
        return place

    cdef Place own_place(self, Py_ssize_t rows, Py_ssize_t width) noexcept:
        """Room for rows that no other block of rows sees: of each thread, where blocks of rows are taken."""
        cdef Place place
        if self.few:
            return self.place(rows, width)
        place.row = width * self.item
        place.own = self.own_bytes
        place.data = NULL
        self.own_bytes += lines(ROW_BLOCK * place.row)
        return place

    cdef Step *add(self, Kind kind, Py_ssize_t rows, Place x, Place y) noexcept:
        cdef Step *step = &self.steps[self.count]
        self.count += 1
        memset(step, 0, sizeof(Step))
        step.kind = kind
        step.rows = rows
        step.x = x
        step.y = y
        return step

    cdef void product(
        self, Py_ssize_t rows, Place x, Place y, const fs_weights *weights, fs_finish finish,
    ) noexcept:
        cdef Step *step = self.add(PRODUCT, rows, x, y)
        step.weights = weights
        step.finish = finish
        step.work = <double> rows * weights.units * weights.h_size

    cdef void norm(self, Py_ssize_t rows, Py_ssize_t width, Place x, Place y, Norm norm) noexcept:
        cdef Step *step = self.add(NORM, rows, x, y)
        step.norm = norm
        step.width = width
        step.work = NORM_WORK * rows * width

    cdef void copy(
        self, Py_ssize_t rows, Place x, Place y, Py_ssize_t heads, Py_ssize_t width, Py_ssize_t y_width,
    ) noexcept:
        cdef Step *step = self.add(COPY, rows, x, y)
        step.heads = heads
        step.width = width
        step.y_width = y_width
        step.work = COPY_WORK * rows * heads * y_width

    cdef void attend(self, Py_ssize_t rows, fs_attention *job) noexcept:
        cdef Step *step
        cdef Place nowhere
        memset(&nowhere, 0, sizeof(nowhere))
        step = self.add(ATTEND, rows, nowhere, nowhere)
        step.attention = job[0]
        step.work = <double> job.batch * job.heads * job.most_queries * job.most_keys * (2 * job.width + WEIGHT_WORK)


cdef fs_attention ragged_job(
    Block block, Py_ssize_t width, Place q, Place k, Place v, Place out, cnp.ndarray q_starts, cnp.ndarray k_starts,
    Py_ssize_t most_queries, Py_ssize_t most_keys, cnp.ndarray mask, cnp.ndarray weights,
) noexcept:
    """Attention between rows; each place is that of the first head."""
    cdef fs_attention job
    cdef int axis
    memset(&job, 0, sizeof(job))
    job.batch = cnp.PyArray_DIM(q_starts, 0) - 1
    job.heads = block.heads
    job.kv_heads = block.kv_heads
    job.width = job.value_width = width
    job.most_queries = most_queries
    job.most_keys = most_keys
    job.q.data, job.q.row, job.q.head = q.data, q.row // block.item, width
    job.k.data, job.k.row, job.k.head = k.data, k.row // block.item, width
    job.v.data, job.v.row, job.v.head = v.data, v.row // block.item, width
    job.out.data, job.out.row, job.out.head = out.data, out.row // block.item, width
    job.q_starts = <const int64_t *> cnp.PyArray_DATA(q_starts)
    job.k_starts = <const int64_t *> cnp.PyArray_DATA(k_starts)
    if mask is not None:
        job.mask = cnp.PyArray_DATA(mask)
        job.mask_is_bool = cnp.PyArray_TYPE(mask) == cnp.NPY_BOOL
        for axis in range(3):
            job.mask_strides[axis] = 0 if cnp.PyArray_DIM(mask, axis) == 1 else cnp.PyArray_STRIDE(mask, axis)
    if weights is not None:
        job.weights = cnp.PyArray_DATA(weights)
    job.window = min(block.window, most_queries + most_keys + 1)
    job.scale = 1 / np.sqrt(block.head_dim)
    job.factor = 1
    job.parts = 1
    return job


cdef cnp.ndarray usable(mask, Py_ssize_t most_keys):
    """A mask whose last axis is contiguous and holds every key."""
    if mask is None or not mask.size:
        return None
    if mask.shape[3] != most_keys:
        mask = np.broadcast_to(mask, (*mask.shape[:3], most_keys))
    return mask if most_keys <= 1 or mask.strides[3] == mask.itemsize else np.ascontiguousarray(mask)


cdef int lay_out(
    Builder builder, list blocks, cnp.ndarray y, cnp.ndarray starts, cnp.ndarray positions, bint causal,
    cnp.ndarray mask, cnp.ndarray memory, cnp.ndarray memory_starts, cnp.ndarray memory_mask, bint has_final,
    Norm final, list weights, Py_ssize_t longest, Py_ssize_t longest_memory,
) except -1:
    """The memory of a run and, where there is room for them, all steps; the rows of y hold x at first."""
    cdef Py_ssize_t rows = cnp.PyArray_DIM(y, 0), width = cnp.PyArray_DIM(y, 1), item = builder.item
    cdef Py_ssize_t others = 0 if memory is None else cnp.PyArray_DIM(memory, 0)
    cdef Py_ssize_t lanes = builder.leaves.lanes, whole, all_heads, widest = 0
    cdef Place stream, given, normal, projected, spread, k, v, context, outputs, hidden
    cdef Block block
    cdef fs_attention job
    cdef Step *step
    cdef int last
    cdef Py_ssize_t i
    builder.count = builder.n_bytes = builder.own_bytes = 0
    stream.data, stream.row, stream.own = cnp.PyArray_BYTES(y), width * item, -1
    if memory is not None:
        given.data, given.row, given.own = cnp.PyArray_BYTES(memory), cnp.PyArray_STRIDE(memory, 0), -1
    # Places that every block uses anew.
    block = blocks[0]
    whole = (block.head_dim + lanes - 1) // lanes * lanes
    all_heads = block.heads + 2 * block.kv_heads
    for other in blocks:
        widest = max(widest, (<Block> other).linear1.units)
    stats = builder.place(1, 2 * (cnp.PyArray_DIM(starts, 0) - 1) * block.heads * longest)
    normal = builder.own_place(rows, width)
    hidden = builder.own_place(rows, widest)
    projected = builder.place(rows, all_heads * block.head_dim)
    spread = projected if whole == block.head_dim else builder.place(rows, all_heads * whole)
    context = builder.place(rows, block.heads * whole)
    outputs = context if whole == block.head_dim else builder.place(rows, block.heads * block.head_dim)
    cdef Place cross_projected, cross_spread, cross_q, cross_q_spread
    if block.cross:
        cross_projected = builder.place(others, 2 * block.kv_heads * block.head_dim)
        cross_spread = (
            cross_projected if whole == block.head_dim else builder.place(others, 2 * block.kv_heads * whole)
        )
        cross_q = builder.place(rows, block.heads * block.head_dim)
        cross_q_spread = cross_q if whole == block.head_dim else builder.place(rows, block.heads * whole)
    if builder.steps == NULL:
        return 0
    for i in range(len(blocks)):
        block = blocks[i]
        own, crossed = (weights[i] if block.cross else (weights[i], None)) if weights is not None else (None, None)
        last = 2 if block.cross else 1
        if block.cross:
            builder.product(others, given, cross_projected, block.cross_kv, FS_IDENTITY)
            if whole != block.head_dim:
                builder.copy(others, cross_projected, cross_spread, 2 * block.kv_heads, block.head_dim, whole)
        # Self-attention.
        if block.norm_first:
            builder.norm(rows, width, stream, normal, block.norms[0])
        builder.product(rows, normal if block.norm_first else stream, projected, block.in_proj, FS_IDENTITY)
        if block.cos is not None:
            step = builder.add(TURN, rows, projected, projected)
            step.heads = block.heads + block.kv_heads
            step.width = block.head_dim
            step.turned = 2 * cnp.PyArray_DIM(block.cos, 1)
            step.interleaved = block.interleaved
            step.cos = cnp.PyArray_BYTES(block.cos)
            step.sin = cnp.PyArray_BYTES(block.sin)
            step.positions = <const int64_t *> cnp.PyArray_DATA(positions)
            step.work = COPY_WORK * rows * step.heads * step.width
        if whole != block.head_dim:
            builder.copy(rows, projected, spread, all_heads, block.head_dim, whole)
        k, v = spread, spread
        k.data = spread.data + block.heads * whole * item
        v.data = k.data + block.kv_heads * whole * item
        job = ragged_job(block, whole, spread, k, v, context, starts, starts, longest, longest, mask, own)
        job.causal = causal
        job.stats = stats.data
        builder.attend(rows, &job)
        if whole != block.head_dim:
            builder.copy(rows, context, outputs, block.heads, whole, block.head_dim)
        builder.product(rows, outputs, stream, block.out_proj, FS_ADD)
        if not block.norm_first:
            builder.norm(rows, width, stream, stream, block.norms[0])
        # Attention to the memory.
        if block.cross:
            if block.norm_first:
                builder.norm(rows, width, stream, normal, block.norms[1])
            builder.product(rows, normal if block.norm_first else stream, cross_q, block.cross_q, FS_IDENTITY)
            if whole != block.head_dim:
                builder.copy(rows, cross_q, cross_q_spread, block.heads, block.head_dim, whole)
            v = cross_spread
            v.data = cross_spread.data + block.kv_heads * whole * item
            job = ragged_job(
                block, whole, cross_q_spread, cross_spread, v, context, starts, memory_starts, longest,
                longest_memory, memory_mask, crossed,
            )
            job.window = 0
            job.stats = stats.data
            builder.attend(rows, &job)
            if whole != block.head_dim:
                builder.copy(rows, context, outputs, block.heads, whole, block.head_dim)
            builder.product(rows, outputs, stream, block.cross_out, FS_ADD)
            if not block.norm_first:
                builder.norm(rows, width, stream, stream, block.norms[1])
        # Feed-forward.
        if block.norm_first:
            builder.norm(rows, width, stream, normal, block.norms[last])
        builder.product(rows, normal if block.norm_first else stream, hidden, block.linear1, block.activation)
        builder.product(rows, hidden, stream, block.linear2, FS_ADD)
        if not block.norm_first:
            builder.norm(rows, width, stream, stream, block.norms[last])
    if has_final:
        builder.norm(rows, width, stream, stream, final)
    return 0


cdef Py_ssize_t segments_of(Builder builder, Segment *segments, int n_threads) noexcept:
    """The steps as segments; how many."""
    cdef Py_ssize_t n = 0, i = 0, pairs, longest
    cdef Segment *s
    cdef Step *step
    cdef double work
    while i < builder.count:
        step = &builder.steps[i]
        s = &segments[n]
        n += 1
        memset(s, 0, sizeof(Segment))
        s.first = i
        work = step.work
        i += 1
        if step.kind == ATTEND:
            pairs = step.attention.batch * step.attention.kv_heads
            longest = max(1, step.attention.most_queries // 8)
            # Few heads are split so that every thread finds some, and long ones so that Ctrl-C is seen.
            step.attention.parts = max(
                1, min(longest, ITEMS * n_threads // max(1, pairs)),
                <Py_ssize_t> min(8 * work / (max(1, pairs) * SHARE_CHUNK_WORK), 1e6),
            )
            s.items = pairs * step.attention.parts
        elif builder.few and step.kind == PRODUCT:
            s.panels_each = max(1, step.weights.panels // (ITEMS * n_threads))
            s.items = (step.weights.panels + s.panels_each - 1) // s.panels_each
        else:
            while not builder.few and i < builder.count and builder.steps[i].kind != ATTEND:
                if builder.steps[i].rows != step.rows:
                    break
                work += builder.steps[i].work
                i += 1
            s.rows_each = NORM_ROWS if builder.few else rows_each(step.rows, n_threads)
            s.items = (step.rows + s.rows_each - 1) // s.rows_each
        s.last = i
        s.work = work / max(1, s.items)
    return n


cdef Py_ssize_t rows_each(Py_ssize_t rows, int n_threads) noexcept:
    """Rows of a block: as many blocks for each thread, of even height, whole tiles where that is possible."""
    cdef Py_ssize_t blocks = (rows + ROW_BLOCK * n_threads - 1) // (ROW_BLOCK * n_threads) * n_threads
    cdef Py_ssize_t each = (rows + blocks - 1) // blocks
    return min(ROW_BLOCK, (each + 5) // 6 * 6)


def run_blocks(
    list blocks not None, cnp.ndarray x not None, cnp.ndarray starts not None, cnp.ndarray positions, bint causal, mask,
    cnp.ndarray memory, cnp.ndarray memory_starts, memory_mask, final_norm, bint want_weights, int n_threads,
):
    """One block after another; see `fastseq.reference.transformer_operations.run_blocks`."""
    cdef Builder builder = Builder()
    cdef Block first = blocks[0]
    cdef cnp.ndarray y = np.array(x, order="C")
    cdef Py_ssize_t rows = cnp.PyArray_DIM(y, 0), longest, longest_memory = 0, batch = len(starts) - 1, count
    cdef Norm final
    cdef Run run
    cdef double work = 0
    cdef Py_ssize_t i
    cdef int threads, region
    cdef bint has_final = final_norm is not None
    memset(&final, 0, sizeof(final))
    longest = np.diff(starts).max(initial=0)
    if memory is not None:
        longest_memory = np.diff(memory_starts).max(initial=0)
    if has_final:
        kind, eps, weight, bias = final_norm
        final = norm_of(kind == "rms", eps, weight, bias)
    weights = None
    if want_weights:
        weights = [np.zeros((batch, first.heads, longest, longest), y.dtype) for _ in blocks]
        if first.cross:
            weights = [(own, np.zeros((batch, first.heads, longest, longest_memory), y.dtype)) for own in weights]
    if rows == 0:
        return y, weights
    builder.leaves = first.leaves = <const fs_leaves *> PyCapsule_GetPointer(_simd.leaves[y.itemsize], "fastseq.leaves")
    builder.item = y.itemsize
    for block in blocks:
        (<Block> block).item = builder.item
        work += (<double> first.in_proj.units + first.out_proj.units + 2 * first.linear1.units) * first.out_proj.units
    threads = threads_for(rows, work, n_threads)
    region = fs_team_limit(n_threads) if threads > 1 else 1
    threads = min(threads, region)
    builder.few = rows < FEW_ROWS * threads
    mask, memory_mask = usable(mask, longest), usable(memory_mask, longest_memory)

    lay_out(
        builder, blocks, y, starts, positions, causal, mask, memory, memory_starts, memory_mask, has_final, final,
        weights, longest, longest_memory,
    )
    cdef Py_ssize_t most_steps = MOST_STEPS * len(blocks) + 1
    cdef Py_ssize_t n_bytes = lines(builder.n_bytes), step_bytes = lines(most_steps * sizeof(Step))
    cdef char *room = <char *> PyMem_RawMalloc(n_bytes + step_bytes + most_steps * sizeof(Segment) + SHARE_LINE)
    cdef char *scratch = NULL
    if room == NULL:
        raise MemoryError(f"{n_bytes} bytes")
    try:
        builder.memory = room + (-<Py_ssize_t> room & (SHARE_LINE - 1))
        builder.steps = <Step *> (builder.memory + n_bytes)
        lay_out(
            builder, blocks, y, starts, positions, causal, mask, memory, memory_starts, memory_mask, has_final, final,
            weights, longest, longest_memory,
        )
        run.leaves = builder.leaves
        run.steps = builder.steps
        run.segments = <Segment *> (builder.memory + n_bytes + step_bytes)
        count = segments_of(builder, run.segments, threads)
        run.attend_bytes = 0
        for i in range(builder.count):
            if builder.steps[i].kind == ATTEND:
                run.attend_bytes = max(run.attend_bytes, builder.leaves.attend_scratch(&builder.steps[i].attention))
        run.attend_bytes = lines(run.attend_bytes * builder.item)
        run.norm_bytes = lines(2 * ROW_BLOCK * builder.item)
        run.scratch_each = run.attend_bytes + run.norm_bytes + builder.own_bytes
        scratch = <char *> PyMem_RawMalloc(threads * run.scratch_each + SHARE_LINE)
        if scratch == NULL:
            raise MemoryError(f"{threads * run.scratch_each} bytes of scratch")
        run.scratch = scratch + (-<Py_ssize_t> scratch & (SHARE_LINE - 1))
        walk_all(&run, count, threads, region)
    finally:
        PyMem_RawFree(room)
        PyMem_RawFree(scratch)
    return y, weights


cdef int walk_all(Run *run, Py_ssize_t count, int threads, int region) except -1:
    """All segments, with a look for Ctrl-C after every so much work."""
    cdef Py_ssize_t segment = 0, item = 0, last, last_item, i
    cdef double budget, left
    cdef int thread
    while segment < count:
        # As far as the work allows, and at least an item for each thread.
        budget = <double> threads * SHARE_CHUNK_WORK
        last = segment
        last_item = item
        fs_counter_set(&run.segments[segment].counter, item)
        while True:
            left = run.segments[last].items - last_item
            if left * run.segments[last].work > budget and last_item + threads < run.segments[last].items:
                # As many for each thread, or some would wait for the others.
                i = <Py_ssize_t> (budget / run.segments[last].work)
                last_item += max(i // threads, 1) * threads
                break
            budget -= left * run.segments[last].work
            last_item = run.segments[last].items
            if last + 1 == count or budget <= 0:
                break
            last += 1
            last_item = 0
            fs_counter_set(&run.segments[last].counter, 0)
        with nogil:
            if threads == 1:
                walk(run, segment, last, last_item, 0, 1)
            else:
                fs_barrier_init(&run.barrier)
                with parallel(num_threads=region):
                    thread = threadid()
                    if thread < threads:
                        walk(run, segment, last, last_item, thread, min(fs_team_size(), threads))
        PyErr_CheckSignals()
        segment, item = last, last_item
        if item == run.segments[last].items:
            segment, item = last + 1, 0
    return 0
