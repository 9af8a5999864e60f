"""Recurrent layers, compiled: the loops over layers, directions, time and rows.

`pack`, `run`, `fits`, `step`, `rollout`, `forward`, `gates` and `backward` are the operations of a layer, of which
`pack` is in `_cells`, `gates` and `backward` are in `_bptt`; `fastseq.reference._recurrent` has the same in NumPy, and
their documentation. Arguments were checked by the layer.

A direction of a layer is a `Job`. The rows of the batch stand longest first, so that the rows still running at a
step are the first ones. A job is done in one of two ways, chosen by `plan`:

* rows: the threads split the rows, and each runs all of time alone;
* panels: the threads split the units, and meet at a barrier every step.

Either way the input part of the pre-activations is computed inside the step, or, where there are too few rows to
fill a tile, ahead of it for a chunk of time. No choice changes a bit of the result: see kernels/kernels.h.
"""

cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from recurrent.arrays cimport padded_bytes, sequence, slot_of, state_copy
from runtime.costs cimport SIGNAL_WORK_LANE
from runtime.team cimport fs_barrier
from fastseq._bptt cimport Rows, Tape
from fastseq._cells cimport (
    Cell, CellPointers, CellStep, CellWeights, Split, cell_work, do_cell, init_bytes, input_parts, inputs_bytes,
    narrow_h_bytes, narrow_x_bytes, set_cell_step, set_init, split_of, work_of,
)
from fastseq._dense cimport multiply_rows
from fastseq._packing cimport PackedWeight, pack_linear
from fastseq._parallel cimport parallel_for, run_team, team_dissolved

import os

import numpy as np

from fastseq import _bptt, _cells

cnp.import_array()

pack, gates, backward = _cells.pack, _bptt.gates, _bptt.backward

cdef int PROCESSORS = os.cpu_count() or 1
# The most rows processed at once, over all threads, and the most input parts computed ahead.
cdef Py_ssize_t ROW_BLOCK = 4096
cdef Py_ssize_t POINTER_ROWS = 16 * ROW_BLOCK
cdef Py_ssize_t AHEAD_ROWS = 1024
cdef Py_ssize_t AHEAD_BYTES = 1024 * 1024

cdef enum:
    TABLE_BYTES = 1 << 23  # the largest table of inputs,
    TABLE_WORK = 1 << 29   # and the most multiply-adds that go into one
    TABLE_ROWS = 128       # rows of it whose pointers are made at once
    SMALL = 8192   # up to this many bytes of scratch stand on the stack
    POINTERS = 12  # arrays of pointers that `run_steps` keeps, one entry a row
    AHEAD = 3      # and those of the input parts, one entry a row and step
    NARROW_ROWS = 96  # rows of x that are made narrow at once, where input parts are computed ahead


cdef struct Table:
    const CellWeights *cell
    const char *embedding
    Py_ssize_t embedding_row
    char *rows
    Py_ssize_t row


cdef void table_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """The input parts of some symbols."""
    cdef const Table *table = <const Table *> job
    cdef const void *x[TABLE_ROWS]
    cdef const void *init[TABLE_ROWS]
    cdef void *out[TABLE_ROWS]
    cdef CellPointers at
    cdef CellStep step
    cdef Py_ssize_t base = first, i, n
    memset(&at, 0, sizeof(at))
    set_cell_step(&step, table.cell, &at, True, 0, 1)
    while base < last:
        n = min(TABLE_ROWS, last - base)
        for i in range(n):
            x[i] = table.embedding + (base + i) * table.embedding_row
            out[i] = table.rows + (base + i) * table.row
        input_parts(&step, table.cell, n, x, init, out)
        base += TABLE_ROWS


def input_table(Cell cell not None, embedding not None, int n_threads):
    """What a layer makes of the vector of each symbol, as far as its chains go without state.

    Parameters
    ----------
    cell : Cell
    embedding : ndarray or NarrowArray of shape (symbols, input_size)
    n_threads : int

    Returns
    -------
    ndarray or None
        A row for each symbol, for `run`; None where that would be large, or weights are narrow.
    """
    cdef Table table
    cdef Py_ssize_t symbols = len(embedding)
    cdef double work
    if cell.w.main.narrow != NULL or not isinstance(embedding, np.ndarray):
        return None
    table.cell = &cell.w
    table.row = inputs_bytes(&cell.w)
    work = <double> table.row / cell.item * cell.w.input_size
    if <double> symbols * table.row > TABLE_BYTES or symbols * work > TABLE_WORK:
        return None
    cdef cnp.ndarray rows = np.empty((symbols, table.row // cell.item), embedding.dtype)
    table.embedding = cnp.PyArray_BYTES(<cnp.ndarray> embedding)
    table.embedding_row = cnp.PyArray_STRIDE(<cnp.ndarray> embedding, 0)
    table.rows = cnp.PyArray_BYTES(rows)
    parallel_for(table_part, &table, symbols, work, n_threads)
    return rows


cdef struct Job:
    const CellWeights *cell
    Py_ssize_t item
    # Arrays by row and time, strides in bytes, the last axis contiguous.
    const char *x            # or ids, int64, where there is a table
    Py_ssize_t x_row
    Py_ssize_t x_time
    const char *table        # the input parts of each id, or NULL
    char *y
    Py_ssize_t y_row
    Py_ssize_t y_time
    const char *h            # where each row starts
    Py_ssize_t h_row
    const char *c            # the same, LSTM
    Py_ssize_t c_row
    char *c_out              # c after each step; where no time is kept, c_out_time is 0 and c_out may be c
    Py_ssize_t c_out_row
    Py_ssize_t c_out_time
    char *gates              # the tape, or NULL
    Py_ssize_t gates_row
    Py_ssize_t gates_time
    const char *resets       # a byte for each row and time, or NULL
    Py_ssize_t resets_row
    const char *zeros        # a state of zeros, where there are resets
    Py_ssize_t rows
    Py_ssize_t time
    bint reverse
    const Py_ssize_t *order  # row of the batch at each place, longest first; NULL: as they stand
    const Py_ssize_t *steps  # steps of the row at each place; NULL: all of `time`
    # The plan.
    int threads
    bint split_panels
    Py_ssize_t ahead         # steps whose input part is computed ahead of them; 0: inside the step
    # Scratch, by place in the block of rows.
    char *pointers           # for each thread, POINTERS arrays of row_block pointers, and AHEAD arrays
    Py_ssize_t pointers_each
    Py_ssize_t row_block
    char *middle             # [place]: what a cell keeps between its products; see `CellPointers`
    char *z                  # [place]
    Py_ssize_t middle_row
    char *narrow             # of narrow weights, for each thread: narrow rows of x, and of what else is multiplied
    Py_ssize_t narrow_each
    Py_ssize_t narrow_rows   # of x
    Py_ssize_t narrow_x_each
    char *input_part         # [step of the chunk][place][panels][vectors][lanes], main then candidate
    Py_ssize_t input_part_main
    Py_ssize_t input_part_row
    # What is done now: steps [from_step, to_step) for the `block` rows from place `base` on.
    Py_ssize_t base
    Py_ssize_t block
    Py_ssize_t from_step
    Py_ssize_t to_step


cdef void plan(Job *job, int n_threads) noexcept nogil:
    """Choose the number of threads, how they split the work, and what is computed ahead."""
    cdef int max_rows = job.cell.kernels.tile_rows[job.cell.main_vectors]
    cdef Py_ssize_t work = cell_work(job.cell), each
    cdef Split split = split_of(
        job.rows, work, work_of(job.rows, work, job.time), 1, job.cell.main.panels, max_rows, job.item, n_threads,
    )
    job.threads = split.threads
    job.split_panels = split.panels
    job.ahead = 0
    cdef bint few = job.rows < max_rows and job.time > 1
    if job.table == NULL and (few or job.cell.cell.rows != NULL):
        each = job.rows * init_bytes(job.cell, &job.cell.main, job.cell.main_vectors)
        job.ahead = max(1, min(job.time, AHEAD_ROWS // job.rows, AHEAD_BYTES // each))


cdef void run_steps(void *made, int thread, int team, fs_barrier *barrier) noexcept nogil:
    """What one thread does of a block of rows and a chunk of time, which ends early where the team dissolves."""
    cdef Job *job = <Job *> made
    cdef Py_ssize_t base = job.base, rows = job.block, from_step = job.from_step, to_step = job.to_step
    cdef const CellWeights *cell = job.cell
    cdef Py_ssize_t stride = 1 if job.split_panels else team
    cdef Py_ssize_t lane = 0 if job.split_panels else thread
    cdef Py_ssize_t x_step = -job.x_time if job.reverse else job.x_time
    cdef Py_ssize_t y_step = -job.y_time if job.reverse else job.y_time
    cdef Py_ssize_t c_step = -job.c_out_time if job.reverse else job.c_out_time
    cdef Py_ssize_t gates_step = -job.gates_time if job.reverse else job.gates_time
    cdef int share = thread if job.split_panels else 0
    cdef int shares = team if job.split_panels else 1
    cdef Py_ssize_t n = 0, place, at_block, row, t, i, s, m
    cdef char *y
    cdef const void **pointers = <const void **> (job.pointers + thread * job.pointers_each)
    cdef const char **reset = <const char **> pointers
    cdef const void **ahead_x = pointers + POINTERS * job.row_block
    cdef const void **ahead_init = ahead_x + job.ahead * job.row_block
    cdef void **ahead_out = <void **> (ahead_init + job.ahead * job.row_block)
    cdef CellPointers at
    at.x = pointers + job.row_block
    at.init = at.x + job.row_block
    at.candidate_init = at.init + job.row_block
    at.no_bias = at.candidate_init + job.row_block
    at.h = at.no_bias + job.row_block
    at.c_before = at.h + job.row_block
    at.c = <void **> (at.c_before + job.row_block)
    at.middle = at.c + job.row_block
    at.z = at.middle + job.row_block
    at.out = at.z + job.row_block
    cdef void **on_tape = at.out + job.row_block
    at.gates = NULL if job.gates == NULL else on_tape
    at.narrow_x = job.narrow + thread * job.narrow_each
    at.narrow_h = at.narrow_x + job.narrow_x_each

    # The rows of this thread that run at from_step.
    i = lane
    while i < rows:
        place = base + i
        if job.steps != NULL and job.steps[place] <= from_step:
            break
        row = place if job.order == NULL else job.order[place]
        t = from_step
        if job.reverse:
            t = (job.time if job.steps == NULL else job.steps[place]) - 1 - from_step
        y = job.y + row * job.y_row + t * job.y_time
        at.x[n] = job.x + row * job.x_row + t * job.x_time
        at.out[n] = y
        at.h[n] = job.h + row * job.h_row if from_step == 0 else y - y_step
        at.c[n] = job.c_out + row * job.c_out_row + t * job.c_out_time
        at.c_before[n] = job.c + row * job.c_row if from_step == 0 else <char *> at.c[n] - c_step
        on_tape[n] = job.gates + row * job.gates_row + t * job.gates_time
        if job.resets != NULL:
            reset[n] = job.resets + row * job.resets_row + t
        at.middle[n] = job.middle + i * job.middle_row
        at.z[n] = job.z + i * job.middle_row
        set_init(cell, &at, n)
        n += 1
        i += stride
    if n == 0:
        return

    cdef CellStep step
    set_cell_step(&step, cell, &at, job.ahead == 0 and job.table == NULL, share, shares)

    # The input part of these steps, ahead of them. Each thread computes what it will itself read.
    if job.ahead:
        m = 0
        for s in range(to_step - from_step):
            for i in range(n):
                at_block = lane + i * stride
                if job.steps != NULL and job.steps[base + at_block] <= from_step + s:
                    break
                ahead_x[m] = <const char *> at.x[i] + s * x_step
                ahead_out[m] = job.input_part + (s * job.row_block + at_block) * job.input_part_row
                m += 1
        i = 0
        while i < m:
            input_parts(&step, cell, min(job.narrow_rows, m - i), ahead_x + i, ahead_init + i, ahead_out + i)
            i += job.narrow_rows
        for i in range(n):
            at.init[i] = job.input_part + (lane + i * stride) * job.input_part_row
            if cell.candidate.units:
                at.candidate_init[i] = <const char *> at.init[i] + job.input_part_main

    cdef Py_ssize_t init_step = job.row_block * job.input_part_row if job.ahead else 0
    for s in range(from_step, to_step):
        if job.steps != NULL:
            while n > 0 and job.steps[base + lane + (n - 1) * stride] <= s:
                n -= 1
        if n == 0:
            break
        if job.resets != NULL:
            for i in range(n):
                if reset[i][0]:
                    at.h[i] = job.zeros
                    at.c_before[i] = job.zeros
                reset[i] += -1 if job.reverse else 1
        if job.table != NULL:
            for i in range(n):
                at.init[i] = job.table + (<const int64_t *> at.x[i])[0] * job.input_part_row
                if cell.candidate.units:
                    at.candidate_init[i] = <const char *> at.init[i] + job.input_part_main
        do_cell(&step, cell, n, False, shares, barrier)
        if shares > 1 and team_dissolved(barrier):
            if thread == 0:
                job.to_step = s + 1
            break
        for i in range(n):
            at.x[i] = <const char *> at.x[i] + x_step
            at.h[i] = at.out[i]
            at.out[i] = <char *> at.out[i] + y_step
            at.c_before[i] = at.c[i]
            at.c[i] = <char *> at.c[i] + c_step
            on_tape[i] = <char *> on_tape[i] + gates_step
            at.init[i] = <const char *> at.init[i] + init_step
        if cell.candidate.units:
            for i in range(n):
                at.candidate_init[i] = <const char *> at.candidate_init[i] + init_step


cdef int execute(Job *job, int n_threads) except -1:
    """Do a job. What it needs beside the arrays is scratch of its own."""
    if job.rows == 0 or job.time == 0:
        return 0
    plan(job, n_threads)
    cdef Py_ssize_t work = cell_work(job.cell)
    cdef Py_ssize_t limit = <Py_ssize_t> SIGNAL_WORK_LANE * job.cell.kernels.lanes * min(job.threads, PROCESSORS)
    # Blocks of even height, such that one step of one is done within the limit.
    cdef Py_ssize_t max_rows = min(ROW_BLOCK, POINTER_ROWS // job.threads, limit // work)
    max_rows = max(max_rows, job.cell.kernels.tile_rows[job.cell.main_vectors] * min(job.threads, PROCESSORS))
    cdef Py_ssize_t blocks = (job.rows + max_rows - 1) // max_rows
    job.row_block = (job.rows + blocks - 1) // blocks
    job.pointers_each = <Py_ssize_t> sizeof(void *) * job.row_block * (POINTERS + AHEAD * job.ahead)
    # Rows of scratch start on cache lines of their own.
    job.middle_row = (job.cell.main.units * job.item + 63) // 64 * 64
    job.input_part_main = init_bytes(job.cell, &job.cell.main, job.cell.main_vectors)
    job.input_part_row = inputs_bytes(job.cell)
    cdef Py_ssize_t pointer_bytes = (job.threads * job.pointers_each + 63) // 64 * 64
    cdef Py_ssize_t middle_bytes = 0
    if job.cell.candidate.units or job.cell.projection.units or job.cell.cell.rows != NULL:
        middle_bytes = job.row_block * job.middle_row
    # Of weights that are real, all rows of x are multiplied at once.
    job.narrow_rows = max(job.row_block, NARROW_ROWS if job.ahead else 0)
    job.narrow_x_each = narrow_x_bytes(job.cell, job.narrow_rows)
    job.narrow_each = job.narrow_x_each + narrow_h_bytes(job.cell, job.row_block)
    if job.cell.main.narrow == NULL:
        job.narrow_rows = max(job.row_block, job.ahead * job.row_block)
    cdef Py_ssize_t narrow_bytes = job.threads * job.narrow_each
    cdef Py_ssize_t n_bytes = (
        64 + pointer_bytes + 2 * middle_bytes + narrow_bytes + job.ahead * job.row_block * job.input_part_row
    )
    cdef char[SMALL] small
    cdef char *scratch = small
    if n_bytes > SMALL:
        scratch = <char *> PyMem_RawMalloc(n_bytes)
        if scratch == NULL:
            raise MemoryError(f"{n_bytes} bytes of scratch")
    job.pointers = scratch + (-(<Py_ssize_t> scratch) & 63)
    job.middle = job.pointers + pointer_bytes
    job.z = job.middle + middle_bytes
    job.narrow = job.z + middle_bytes
    job.input_part = job.narrow + narrow_bytes

    cdef Py_ssize_t chunk = limit // (job.row_block * work) + 1
    if job.ahead:
        chunk = min(chunk, job.ahead)
    cdef Py_ssize_t time
    try:
        job.base = 0
        while job.base < job.rows:
            job.block = min(job.row_block, job.rows - job.base)
            time = job.time if job.steps == NULL else job.steps[job.base]
            job.from_step = 0
            while job.from_step < time:
                job.to_step = min(time, job.from_step + chunk)
                with nogil:
                    run_team(run_steps, job, job.threads, n_threads)
                PyErr_CheckSignals()
                job.from_step = job.to_step
            job.base += job.block
    finally:
        if scratch != small:
            PyMem_RawFree(scratch)
    return 0


cdef void set_cell(Job *job, Cell cell) noexcept:
    job.cell = &cell.w
    job.item = cell.item
    job.table = NULL


cdef void set_state(Job *job, cnp.ndarray h, cnp.ndarray c, Py_ssize_t slot) noexcept:
    """Where the rows of one slot start; c is where they end, too."""
    job.h = slot_of(h, slot)
    job.h_row = cnp.PyArray_STRIDE(h, 0)
    job.c = job.c_out = NULL
    job.c_row = job.c_out_row = job.c_out_time = 0
    if c is not None:
        job.c = job.c_out = slot_of(c, slot)
        job.c_row = job.c_out_row = cnp.PyArray_STRIDE(c, 0)


cdef void set_no_tape(Job *job) noexcept:
    job.gates = NULL
    job.gates_row = job.gates_time = 0
    job.resets = job.zeros = NULL


cdef tuple finished(cnp.ndarray y, cnp.ndarray h, cnp.ndarray c):
    """Outputs and state; the arrays of a state are read-only."""
    cnp.PyArray_CLEARFLAGS(h, cnp.NPY_ARRAY_WRITEABLE)
    if c is not None:
        cnp.PyArray_CLEARFLAGS(c, cnp.NPY_ARRAY_WRITEABLE)
    return y, h, c


cdef Rows rows_of(Job *job, cnp.ndarray x, lengths, resets, dtype, Py_ssize_t width):
    """Put the rows and times of x into a job; the states are of a dtype and at most `width` wide.

    The job points into what is returned.
    """
    cdef Rows rows = Rows.__new__(Rows)
    job.rows = cnp.PyArray_DIM(x, 0)
    job.time = cnp.PyArray_DIM(x, 1)
    job.order = NULL
    job.steps = NULL
    set_no_tape(job)
    if lengths is not None:
        rows.order = np.argsort(-lengths, kind="stable").astype(np.intp, copy=False)
        rows.steps = lengths[rows.order].astype(np.intp, copy=False)
        job.order = <const Py_ssize_t *> cnp.PyArray_DATA(rows.order)
        job.steps = <const Py_ssize_t *> cnp.PyArray_DATA(rows.steps)
    if resets is not None:
        rows.reset_bytes = np.ascontiguousarray(resets).view(np.uint8)
        rows.zeros = np.zeros(width, dtype)
        job.resets = cnp.PyArray_BYTES(rows.reset_bytes)
        job.resets_row = job.time
        job.zeros = cnp.PyArray_BYTES(rows.zeros)
    return rows


cdef void set_sequence(Job *job, cnp.ndarray x, cnp.ndarray y) noexcept:
    job.x = cnp.PyArray_BYTES(x)
    job.x_row = cnp.PyArray_STRIDE(x, 0)
    job.x_time = cnp.PyArray_STRIDE(x, 1)
    job.y_row = cnp.PyArray_STRIDE(y, 0)
    job.y_time = cnp.PyArray_STRIDE(y, 1)


cdef void take_last(
    const Job *job, const char *steps_of, Py_ssize_t row_stride, Py_ssize_t time_stride, cnp.ndarray state,
    Py_ssize_t slot,
) noexcept:
    """Where each row ends is what it has at its last step; a row of no steps keeps what it came with."""
    cdef Py_ssize_t place, row, steps
    cdef Py_ssize_t n_bytes = cnp.PyArray_DIM(state, 2) * job.item
    for place in range(job.rows):
        row = place if job.order == NULL else job.order[place]
        steps = job.time if job.steps == NULL else job.steps[place]
        if steps:
            memcpy(
                slot_of(state, slot) + row * cnp.PyArray_STRIDE(state, 0),
                steps_of + row * row_stride + (0 if job.reverse else steps - 1) * time_stride,
                n_bytes,
            )


def run(
    tuple cells not None, cnp.ndarray x not None, cnp.ndarray h not None, cnp.ndarray c, lengths, resets,
    int n_threads, tuple tables=None,
):
    """Whole sequences through all layers and directions; see `fastseq.reference._recurrent.run`.

    With `tables`, one `input_table` for each direction of the first layer, x is (B, T) of ids, int64 and contiguous.
    """
    cdef Py_ssize_t width = cnp.PyArray_DIM(h, 2), slot = 0
    cdef int direction, directions
    cdef Job job
    cdef Rows _rows
    cdef cnp.ndarray ids = x, y = x, h_n = state_copy(h), c_n = state_copy(c)
    _rows = rows_of(&job, x, lengths, resets, h.dtype, width if c is None else cnp.PyArray_DIM(c, 2))
    for layer in cells:
        directions = len(layer)
        y = sequence(x, directions * width, cnp.PyArray_TYPE(h), lengths is not None)
        set_sequence(&job, x, y)
        for direction in range(directions):
            set_cell(&job, layer[direction])
            set_state(&job, h, c_n, slot)
            if tables is not None and x is ids:
                job.table = cnp.PyArray_BYTES(<cnp.ndarray> tables[direction])
            job.reverse = direction == 1
            job.y = cnp.PyArray_BYTES(y)
            job.y += direction * width * job.item
            execute(&job, n_threads)
            take_last(&job, job.y, job.y_row, job.y_time, h_n, slot)
            slot += 1
        x = y
    return finished(y, h_n, c_n)


cdef inline bint is_usual(object value, int dims, int dtype) noexcept:
    """An array of exactly this dtype, contiguous, aligned, in native byte order."""
    return (
        cnp.PyArray_CheckExact(value)
        and cnp.PyArray_NDIM(<cnp.ndarray> value) == dims
        and cnp.PyArray_TYPE(<cnp.ndarray> value) == dtype
        and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> value)
    )


cdef inline bint is_state(object value, int dtype, Py_ssize_t batch, Py_ssize_t slots, Py_ssize_t width) noexcept:
    return (
        is_usual(value, 3, dtype)
        and cnp.PyArray_DIM(<cnp.ndarray> value, 0) == batch
        and cnp.PyArray_DIM(<cnp.ndarray> value, 1) == slots
        and cnp.PyArray_DIM(<cnp.ndarray> value, 2) == width
    )


def fits(tuple cells not None, x, int dims, state, out):
    """Whether the arguments of a call need no check: a quick yes for the usual case. No says nothing.

    `x` should have `dims` dimensions; that the state is of the layer's class was looked at. A step takes few
    microseconds, and the checks in Python take as many.
    """
    cdef tuple first = cells[0]
    cdef Cell cell = first[0]
    cdef int dtype = cnp.NPY_FLOAT32 if cell.item == 4 else cnp.NPY_FLOAT64
    cdef Py_ssize_t batch, slots = len(cells) * len(first)
    if (dims == 2 and len(first) != 1) or not is_usual(x, dims, dtype):
        return False
    batch = cnp.PyArray_DIM(<cnp.ndarray> x, 0)
    if cnp.PyArray_DIM(<cnp.ndarray> x, dims - 1) != cell.w.input_size:
        return False
    if not is_state(state.h, dtype, batch, slots, cell.w.output_size):
        return False
    if cell.w.cell.has_c and not is_state(state.c, dtype, batch, slots, cell.w.hidden_size):
        return False
    return out is None or (
        is_usual(out, 2, dtype)
        and cnp.PyArray_ISWRITEABLE(<cnp.ndarray> out)
        and cnp.PyArray_DIM(<cnp.ndarray> out, 0) == batch
        and cnp.PyArray_DIM(<cnp.ndarray> out, 1) == cell.w.output_size
    )


def step(
    tuple cells not None, cnp.ndarray x not None, cnp.ndarray h not None, cnp.ndarray c, cnp.ndarray out,
    int n_threads,
):
    """One time step through all layers of one direction; see `fastseq.reference._recurrent.step`."""
    cdef Py_ssize_t slot, row, i, width = cnp.PyArray_DIM(h, 2), batch = cnp.PyArray_DIM(x, 0)
    cdef Job job
    cdef cnp.ndarray h_n = cnp.PyArray_EMPTY(3, cnp.PyArray_DIMS(h), cnp.PyArray_TYPE(h), 0)
    cdef cnp.ndarray c_n = state_copy(c)
    cdef cnp.npy_intp[2] shape
    cdef char *to
    job.rows = batch
    job.time = 1
    job.reverse = False
    job.order = NULL
    job.steps = NULL
    set_no_tape(&job)
    job.x = cnp.PyArray_BYTES(x)
    job.x_row = cnp.PyArray_STRIDE(x, 0)
    job.x_time = 0
    job.y_row = cnp.PyArray_STRIDE(h_n, 0)
    job.y_time = 0
    for slot in range(len(cells)):
        set_cell(&job, cells[slot][0])
        set_state(&job, h, c_n, slot)
        job.y = slot_of(h_n, slot)
        execute(&job, n_threads)
        # The next layer takes this one's output.
        job.x = job.y
        job.x_row = job.y_row
    if out is None:
        shape[0], shape[1] = batch, width
        out = cnp.PyArray_EMPTY(2, shape, cnp.PyArray_TYPE(h), 0)
    for row in range(batch):
        to = cnp.PyArray_BYTES(out)
        to += row * cnp.PyArray_STRIDE(out, 0)
        if cnp.PyArray_STRIDE(out, 1) == job.item:
            memcpy(to, job.x + row * job.x_row, width * job.item)
        else:
            for i in range(width):
                memcpy(to + i * cnp.PyArray_STRIDE(out, 1), job.x + row * job.x_row + i * job.item, job.item)
    return finished(out, h_n, c_n)


def rollout(
    tuple cells not None, weight not None, cnp.ndarray bias not None, cnp.ndarray x not None,
    cnp.ndarray h not None, cnp.ndarray c, Py_ssize_t steps, int n_threads,
):
    """Steps that each take what a linear map makes of the one before; see `fastseq.reference._recurrent.rollout`."""
    cdef Py_ssize_t slot, t
    cdef Job job
    cdef char *to
    cdef PackedWeight head = pack_linear(None, weight, bias)
    cdef cnp.ndarray y = np.empty((x.shape[0], steps, weight.shape[0]), x.dtype)
    # A step may not write where it reads, so there are two arrays of states.
    cdef cnp.ndarray before = state_copy(h), after = np.empty_like(before), c_n = state_copy(c)
    job.rows = cnp.PyArray_DIM(x, 0)
    job.time = 1
    job.reverse = False
    job.order = NULL
    job.steps = NULL
    set_no_tape(&job)
    job.x_time = job.y_time = 0
    job.x = cnp.PyArray_BYTES(x)
    job.x_row = cnp.PyArray_STRIDE(x, 0)
    for t in range(steps):
        for slot in range(len(cells)):
            set_cell(&job, cells[slot][0])
            set_state(&job, before, c_n, slot)
            job.y = slot_of(after, slot)
            job.y_row = cnp.PyArray_STRIDE(after, 0)
            execute(&job, n_threads)
            job.x = job.y
            job.x_row = job.y_row
        to = cnp.PyArray_BYTES(y) + t * cnp.PyArray_STRIDE(y, 1)
        multiply_rows(head, job.rows, job.x, job.x_row, to, cnp.PyArray_STRIDE(y, 0), n_threads)
        job.x = to
        job.x_row = cnp.PyArray_STRIDE(y, 0)
        before, after = after, before
    return finished(y, before, c_n)


cdef cnp.ndarray steps_together(cnp.ndarray x, Py_ssize_t width, bint padded):
    """`sequence` for what kernels alone read: the rows of a step lie together, each on cache lines of its own."""
    cdef Py_ssize_t row = padded_bytes(width * x.itemsize)
    n_bytes = x.shape[1] * x.shape[0] * row
    raw = (np.zeros if padded else np.empty)(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    by_step = raw[start:start + n_bytes].view(x.dtype).reshape(x.shape[1], x.shape[0], row // x.itemsize)
    return by_step[:, :, :width].swapaxes(0, 1)


def forward(
    tuple cells not None, cnp.ndarray x not None, cnp.ndarray h not None, cnp.ndarray c, lengths, resets,
    int n_threads,
):
    """One layer with a tape; see `fastseq.reference._recurrent.forward`."""
    cdef Py_ssize_t width = cnp.PyArray_DIM(h, 2), tape_row
    cdef int direction
    cdef Job job
    cdef Cell cell
    cdef Tape tape = Tape.__new__(Tape)
    cdef cnp.ndarray y, on_tape, c_steps, h_n = state_copy(h), c_n = state_copy(c)
    cdef bint padded = lengths is not None
    tape.cells, tape.x, tape.h, tape.c = cells, x, h, c
    tape.gates, tape.c_steps = [], []
    tape.rows = rows_of(&job, x, lengths, resets, x.dtype, width if c is None else cnp.PyArray_DIM(c, 2))
    tape.y = y = sequence(x, len(cells) * width, cnp.PyArray_TYPE(x), padded)
    set_sequence(&job, x, y)
    for direction in range(len(cells)):
        cell = cells[direction]
        set_cell(&job, cell)
        set_state(&job, h, c, direction)
        on_tape = c_steps = None
        if cell.w.cell.tape_gates:
            tape_row = cell.w.cell.tape_gates * cell.w.hidden_size + cell.w.cell.tape_reals
            on_tape = steps_together(x, tape_row, padded)
            job.gates = cnp.PyArray_BYTES(on_tape)
            job.gates_row = cnp.PyArray_STRIDE(on_tape, 0)
            job.gates_time = cnp.PyArray_STRIDE(on_tape, 1)
        if c is not None:
            c_steps = steps_together(x, cell.w.hidden_size, padded)
            job.c_out = cnp.PyArray_BYTES(c_steps)
            job.c_out_row = cnp.PyArray_STRIDE(c_steps, 0)
            job.c_out_time = cnp.PyArray_STRIDE(c_steps, 1)
        tape.gates.append(on_tape)
        tape.c_steps.append(c_steps)
        job.reverse = direction == 1
        job.y = cnp.PyArray_BYTES(y)
        job.y += direction * width * job.item
        execute(&job, n_threads)
        take_last(&job, job.y, job.y_row, job.y_time, h_n, direction)
        if c is not None:
            take_last(&job, job.c_out, job.c_out_row, job.c_out_time, c_n, direction)
    cnp.PyArray_CLEARFLAGS(y, cnp.NPY_ARRAY_WRITEABLE)
    return *finished(y, h_n, c_n), tape
