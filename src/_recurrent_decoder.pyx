"""Steps of a recurrent model of symbols, compiled: what `fastseq._decode` drives, with no Python for a symbol.

The states of all rows stand in memory of the decoder, twice: a step reads the one and writes the other. Which old row
each row goes on from is a number beside it, so that forking and reordering rows moves none of them. What the first
layer makes of a symbol, as far as its chain goes without the state, is a table with a row for every symbol, unless
that would be large.

Threads split rows or panels as in `_recurrent.pyx`, and the bits are those of its `step`.
"""

cimport numpy as cnp
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from cython.parallel cimport parallel, threadid
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from cells cimport (
    GRU_BEFORE, CellPointers, CellStep, CellWeights, Split, cell_work, do_cell, init_bytes, input_parts, set_cell_step,
    set_init, split_of, take_share,
)
from decoder cimport FS_DONE, FS_NO_MEMORY, fs_decoder
from leaves cimport FS_IDENTITY, fs_leaves, fs_step, fs_weights
from outer cimport fs_barrier
from share cimport (
    SHARE_LINE, fs_flush_denormals, fs_restore_denormals, fs_team_limit, fs_team_size, lines, share_out,
)

import numpy as np

cnp.import_array()

cdef extern from "team.h" nogil:
    void fs_barrier_init(fs_barrier *barrier)

cdef enum:
    BLOCK_ROWS = 128           # rows whose pointers are made at once
    TABLE_BYTES = 1 << 23      # the largest table of inputs,
    TABLE_WORK = 1 << 29       # and the most multiply-adds that go into one

cdef double MOST_BYTES = 1e18  # sizes below do not overflow


# What the weights of a decoder are. Read only.
cdef struct Network:
    const fs_leaves *leaves
    Py_ssize_t item
    Py_ssize_t layers
    const CellWeights **cells
    const fs_weights *output
    const char *embedding      # [symbols][input_size]
    Py_ssize_t embedding_row
    const char *table          # [symbols][panels][vectors][lanes], main then candidate, as `init` of a step; or NULL
    Py_ssize_t table_row
    Py_ssize_t table_main


cdef struct Table:
    const Network *network
    char *rows


cdef void table_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """The inputs of some symbols."""
    cdef const Table *table = <const Table *> job
    cdef const Network *network = table.network
    cdef const CellWeights *cell = network.cells[0]
    cdef const void *x[BLOCK_ROWS]
    cdef const void *init[BLOCK_ROWS]
    cdef void *out[BLOCK_ROWS]
    cdef CellPointers at
    cdef CellStep step
    cdef Py_ssize_t base = first, i, n
    memset(&at, 0, sizeof(at))
    set_cell_step(&step, cell, &at, True, 0, 1)
    while base < last:
        n = min(BLOCK_ROWS, last - base)
        for i in range(n):
            x[i] = network.embedding + (base + i) * network.embedding_row
            out[i] = table.rows + (base + i) * network.table_row
        input_parts(&step, cell, n, x, init, out)
        base += BLOCK_ROWS


cdef class Weights:
    """The weights of a model, packed before, and the table of its inputs. Immutable.

    Parameters
    ----------
    cells : tuple of tuples of Cell
        One a layer, of one direction.
    output : Packed
        The linear layer from outputs to logits.
    embedding : ndarray of shape (symbols, input_size)
    n_threads : int
    """

    cdef Network network
    cdef list kept  # what the pointers are into

    def __init__(self, tuple cells not None, output, cnp.ndarray embedding not None, int n_threads):
        cdef Network *network = &self.network
        cdef Py_ssize_t i
        cdef cnp.ndarray pointers = np.empty(len(cells), np.uintp)
        self.kept = [cells, output, embedding, pointers]
        network.layers = len(cells)
        network.cells = <const CellWeights **> cnp.PyArray_DATA(pointers)
        for i in range(network.layers):
            network.cells[i] = <const CellWeights *> PyCapsule_GetPointer(cells[i][0].weights(), "fastseq.cell")
        network.leaves = network.cells[0].leaves
        network.item = network.leaves.item_size
        network.output = <const fs_weights *> PyCapsule_GetPointer(output.panels(), "fastseq.weights")
        network.embedding = cnp.PyArray_BYTES(embedding)
        network.embedding_row = cnp.PyArray_STRIDE(embedding, 0)
        self.make_table(cnp.PyArray_DIM(embedding, 0), n_threads)

    cdef int make_table(self, Py_ssize_t symbols, int n_threads) except -1:
        cdef Network *network = &self.network
        cdef const CellWeights *cell = network.cells[0]
        cdef cnp.ndarray rows
        cdef Table table
        cdef double work
        network.table_main = init_bytes(cell, &cell.main, cell.main_vectors)
        network.table_row = network.table_main
        if cell.kind == GRU_BEFORE:
            network.table_row += init_bytes(cell, &cell.candidate, 4)
        work = <double> network.table_row / network.item * cell.input_size
        if <double> symbols * network.table_row > TABLE_BYTES or symbols * work > TABLE_WORK:
            return 0
        rows = np.empty(symbols * network.table_row, np.uint8)
        self.kept.append(rows)
        table.network = network
        table.rows = cnp.PyArray_BYTES(rows)
        share_out(table_part, &table, symbols, work, n_threads)
        network.table = table.rows
        return 0


# The rows of a decoder.
cdef struct Rows:
    const Network *network
    int n_threads
    Py_ssize_t rows
    Py_ssize_t room          # rows there is memory for
    char *memory             # what all below is in
    char *before             # [room][state_row]: h of every layer, then c
    char *after              # the same, which the next step writes
    Py_ssize_t state_row
    Py_ssize_t h_row         # bytes from the h of one layer to that of the next,
    Py_ssize_t c_first       # from the beginning to the c of the first layer,
    Py_ssize_t c_row         # and from there to that of the next
    char *middle             # [room][middle_row]; see `CellPointers`
    char *z
    Py_ssize_t middle_row
    Py_ssize_t *source       # [room]: the row of `before` that each row goes on from
    Py_ssize_t *spare        # [room]: room for others
    bint backwards           # the next step takes the last panels first
    # One step.
    const int64_t *symbols
    char *logits
    fs_barrier *barrier      # of the threads that share panels


cdef char *taken(char *memory, Py_ssize_t n_bytes, Py_ssize_t *all_bytes) noexcept nogil:
    """The next so many bytes of memory that is being laid out; of NULL, to count them."""
    cdef Py_ssize_t at = all_bytes[0]
    all_bytes[0] += lines(n_bytes)
    return NULL if memory == NULL else memory + at


cdef Py_ssize_t lay_out(Rows *job, char *memory, Py_ssize_t room) noexcept nogil:
    """Give everything its place; returns how many bytes that takes."""
    cdef Py_ssize_t n_bytes = 0
    job.room = room
    job.before = taken(memory, room * job.state_row, &n_bytes)
    job.after = taken(memory, room * job.state_row, &n_bytes)
    job.middle = taken(memory, room * job.middle_row, &n_bytes)
    job.z = taken(memory, room * job.middle_row, &n_bytes)
    job.source = <Py_ssize_t *> taken(memory, room * sizeof(Py_ssize_t), &n_bytes)
    job.spare = <Py_ssize_t *> taken(memory, room * sizeof(Py_ssize_t), &n_bytes)
    return n_bytes


cdef int make_room(Rows *job, Py_ssize_t room) noexcept nogil:
    """Memory for so many rows; what was there is left to the caller."""
    cdef Rows made = job[0]
    if <double> room * lay_out(&made, NULL, 1) > MOST_BYTES:
        return FS_NO_MEMORY
    cdef Py_ssize_t n_bytes = lay_out(&made, NULL, room) + SHARE_LINE
    made.memory = <char *> PyMem_RawMalloc(n_bytes)
    if made.memory == NULL:
        return FS_NO_MEMORY
    lay_out(&made, made.memory + (-<Py_ssize_t> made.memory & (SHARE_LINE - 1)), room)
    job[0] = made
    return FS_DONE


cdef void walk(Rows *job, Py_ssize_t first, Py_ssize_t last, int share, int shares) noexcept nogil:
    """One step of the rows [first, last): what one of some threads does that share the panels."""
    cdef const Network *network = job.network
    cdef const CellWeights *cell
    cdef const void *x[BLOCK_ROWS]
    cdef const void *init[BLOCK_ROWS]
    cdef const void *candidate_init[BLOCK_ROWS]
    cdef const void *no_bias[BLOCK_ROWS]
    cdef const void *h[BLOCK_ROWS]
    cdef const void *c_before[BLOCK_ROWS]
    cdef void *c[BLOCK_ROWS]
    cdef void *middle[BLOCK_ROWS]
    cdef void *z[BLOCK_ROWS]
    cdef void *out[BLOCK_ROWS]
    cdef CellPointers at
    cdef CellStep step
    cdef Py_ssize_t base = first, layer, row, i, n, h_at, c_at
    cdef const char *old
    cdef char *new
    at.x, at.init, at.candidate_init, at.no_bias, at.h, at.c_before = x, init, candidate_init, no_bias, h, c_before
    at.c, at.middle, at.z, at.out = c, middle, z, out
    at.gates = NULL
    while base < last:
        n = min(BLOCK_ROWS, last - base)
        for layer in range(network.layers):
            cell = network.cells[layer]
            h_at = layer * job.h_row
            c_at = job.c_first + layer * job.c_row
            for i in range(n):
                row = base + i
                old = job.before + job.source[row] * job.state_row
                new = job.after + row * job.state_row
                h[i] = old + h_at
                out[i] = new + h_at
                c_before[i] = old + c_at
                c[i] = new + c_at
                middle[i] = job.middle + row * job.middle_row
                z[i] = job.z + row * job.middle_row
                set_init(cell, &at, i)
                if layer:
                    x[i] = new + h_at - job.h_row
                elif network.table == NULL:
                    x[i] = network.embedding + job.symbols[row] * network.embedding_row
                else:
                    init[i] = network.table + job.symbols[row] * network.table_row
                    candidate_init[i] = <const char *> init[i] + network.table_main
            set_cell_step(&step, cell, &at, layer > 0 or network.table == NULL, share, shares)
            do_cell(&step, cell, n, job.backwards, shares, job.barrier)
        product(network, n, <const void **> out, job.logits + base * network.output.units * network.item, share, shares)
        base += BLOCK_ROWS


cdef void product(
    const Network *network, Py_ssize_t rows, const void **x, char *logits, int share, int shares,
) noexcept nogil:
    """The logits of a block of rows."""
    cdef const void *init[BLOCK_ROWS]
    cdef void *out[BLOCK_ROWS]
    cdef fs_step step
    cdef Py_ssize_t i
    memset(&step, 0, sizeof(step))
    take_share(&step, network.output, share, shares)
    step.rows = rows
    step.finish = FS_IDENTITY
    step.init = init
    step.h = x
    step.out = out
    for i in range(rows):
        init[i] = network.output.bias
        out[i] = logits + i * network.output.units * network.item
    network.leaves.plain(&step)


cdef void walk_flushed(Rows *job, Split split, int thread, int team) noexcept nogil:
    cdef unsigned long long before
    if thread >= team:
        return
    before = fs_flush_denormals()
    if split.panels:
        walk(job, 0, job.rows, thread, team)
    else:
        walk(job, job.rows * thread // team, job.rows * (thread + 1) // team, 0, 1)
    fs_restore_denormals(before)


cdef Split plan(const Rows *job) noexcept nogil:
    """How threads share a step."""
    cdef const Network *network = job.network
    cdef Py_ssize_t work = network.output.panels * 4 * network.leaves.lanes * network.output.h_size, meetings = 0
    cdef Py_ssize_t panels = network.cells[0].main.panels, layer
    cdef const CellWeights *cell
    for layer in range(network.layers):
        cell = network.cells[layer]
        work += cell_work(cell)
        meetings += 2 if cell.kind == GRU_BEFORE or cell.projection.units else 1
        if layer == 0 and network.table != NULL:
            work -= network.table_row // network.item * cell.input_size
    return split_of(
        job.rows, work, job.rows * work, meetings, panels, network.leaves.tile_rows[4], <int> network.item,
        job.n_threads,
    )


cdef int step(void *self, ptrdiff_t rows, const int64_t *symbols, void *logits) noexcept nogil:
    """See decoder.h."""
    cdef Rows *job = <Rows *> self
    cdef Split split = plan(job)
    cdef int region = fs_team_limit(job.n_threads) if split.threads > 1 else 1
    cdef Py_ssize_t row
    cdef fs_barrier barrier
    split.threads = min(split.threads, region)
    job.symbols = symbols
    job.logits = <char *> logits
    if split.threads == 1:
        walk_flushed(job, split, 0, 1)
    else:
        fs_barrier_init(&barrier)
        job.barrier = &barrier
        with parallel(num_threads=region):
            walk_flushed(job, split, threadid(), min(fs_team_size(), split.threads))
    job.before, job.after = job.after, job.before
    job.backwards = not job.backwards
    for row in range(rows):
        job.source[row] = row
    return FS_DONE


cdef int choose(void *self, ptrdiff_t rows, const int64_t *parents) noexcept nogil:
    """See decoder.h."""
    cdef Rows *job = <Rows *> self
    cdef Rows old = job[0]
    cdef Py_ssize_t row
    if rows <= job.room:
        for row in range(rows):
            job.spare[row] = job.source[parents[row]]
        job.source, job.spare = job.spare, job.source
    else:
        if make_room(job, rows) != FS_DONE:
            return FS_NO_MEMORY
        for row in range(rows):
            memcpy(
                job.before + row * job.state_row, old.before + old.source[parents[row]] * job.state_row, job.state_row,
            )
            job.source[row] = row
        PyMem_RawFree(old.memory)
    job.rows = rows
    return FS_DONE


cdef class Decoder:
    """The states of some rows of symbols: a `fastseq.models.decoding.Decoder`.

    Parameters
    ----------
    weights : Weights
    h : ndarray of shape (B, layers, H)
        Where the rows start.
    c : ndarray of shape (B, layers, H), or None
        The same of an LSTM.
    copies : int
        To how many rows each may be forked; there may be more, but memory for these is taken now.
    n_threads : int
    """

    cdef fs_decoder functions
    cdef Rows job
    cdef Weights weights

    def __init__(
        self, Weights weights not None, cnp.ndarray h not None, cnp.ndarray c, copies, int n_threads,
    ):
        cdef Rows *job = &self.job
        cdef const Network *network = &weights.network
        cdef Py_ssize_t layer, row
        cdef char *state
        room = max(1, len(h) * copies)
        self.weights = weights
        job.network = network
        job.n_threads = n_threads
        job.rows = cnp.PyArray_DIM(h, 0)
        job.h_row = lines(cnp.PyArray_DIM(h, 2) * network.item)
        job.c_first = network.layers * job.h_row
        job.c_row = 0 if c is None else lines(cnp.PyArray_DIM(c, 2) * network.item)
        job.state_row = job.c_first + network.layers * job.c_row
        job.middle_row = lines(network.cells[0].hidden_size * network.item)
        if room > MOST_BYTES or make_room(job, room) != FS_DONE:
            raise MemoryError(f"for the states of {room} rows")
        for row in range(job.rows):
            job.source[row] = row
            state = job.before + row * job.state_row
            for layer in range(network.layers):
                put(state + layer * job.h_row, h, row, layer)
                if c is not None:
                    put(state + job.c_first + layer * job.c_row, c, row, layer)
        self.functions.self = job
        self.functions.vocab = network.output.units
        self.functions.item_size = <int> network.item
        self.functions.step = step
        self.functions.choose = choose

    def __dealloc__(self):
        PyMem_RawFree(self.job.memory)

    def capsule(self):
        """How the search drives this; it lives as long as this does."""
        return PyCapsule_New(&self.functions, "fastseq.decoder", NULL)

    def step(self, symbols):
        """The logits (B, V) of what follows one symbol more of each row, (B,)."""
        cdef cnp.ndarray ids = np.ascontiguousarray(symbols, np.int64)
        cdef cnp.ndarray logits = np.empty((self.job.rows, self.functions.vocab), f"f{self.functions.item_size}")
        if self.job.rows:
            with nogil:
                step(&self.job, self.job.rows, <const int64_t *> cnp.PyArray_DATA(ids), cnp.PyArray_DATA(logits))
        return logits

    def choose(self, rows):
        """The rows become these of the rows there were."""
        cdef cnp.ndarray parents = np.ascontiguousarray(rows, np.int64)
        if choose(&self.job, len(parents), <const int64_t *> cnp.PyArray_DATA(parents)) != FS_DONE:
            raise MemoryError(f"for the states of {len(parents)} rows")


cdef void put(char *to, cnp.ndarray state, Py_ssize_t row, Py_ssize_t layer) noexcept:
    """One vector of a state array (B, layers, width), the last axis contiguous."""
    cdef const char *at = cnp.PyArray_BYTES(state)
    at += row * cnp.PyArray_STRIDE(state, 0) + layer * cnp.PyArray_STRIDE(state, 1)
    memcpy(to, at, cnp.PyArray_DIM(state, 2) * cnp.PyArray_ITEMSIZE(state))
