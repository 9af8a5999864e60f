"""Decoding steps of recurrent models of symbols, compiled; `fastseq._decoding` calls them without Python code.

The states of all rows are kept in two buffers: a step reads one and writes the other. Beside each row stand the number
of the row it continues from in the buffer that is read and, where there is attention, the number of its source; so
forking and reordering rows moves no state. The part of the first layer's pre-activations that depends on the symbol
alone is read from a table with a row for each symbol, unless that table would be large.

Threads split rows or panels as in `_recurrent.pyx`, and the bits are those of a step of the model.
"""

cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from attention.additive_attention cimport align_one, real
from decoding.decoder cimport FS_AGAIN, FS_DONE, FS_NO_MEMORY, fs_decoder
from runtime.costs cimport SIGNAL_WORK, TANH_WORK, WEIGHT_WORK
from runtime.kernels cimport (
    FS_IDENTITY, FS_REAL, FS_TANH, fs_attention, fs_epilogue, fs_kernels, fs_narrow_bytes, fs_narrow_inputs, fs_step,
    fs_weights,
)
from runtime.scratch cimport CACHE_LINE, Scratch, lines, scratch_allocate, scratch_array, scratch_close
from runtime.team cimport fs_barrier
from fastseq._cells cimport (
    Cell, CellPointers, CellStep, CellWeights, Split, cell_work, do_cell, init_bytes, input_parts, inputs_bytes,
    narrow_h_bytes, narrow_x_bytes, set_cell_step, set_init, split_of, take_share,
)
from fastseq._packing cimport PackedWeight, RowTable, copy_row, pack_linear, row_table
from fastseq._parallel cimport run_team, team_wait

import numpy as np

cnp.import_array()

cdef enum Attention:
    NONE
    MULTIPLICATIVE  # queries are outputs of this step: logits are a linear map of tanh(W_c [context; output])
    ADDITIVE        # queries are from outputs of the step before: contexts are inputs of the first layer and logits

cdef dict ATTENTIONS = {None: NONE, "multiplicative": MULTIPLICATIVE, "additive": ADDITIVE}

cdef enum:
    BLOCK_ROWS = 128  # rows whose pointers are computed together

cdef double MAX_BYTES = 1e18  # sizes below do not overflow


# Pointers to the weights of a decoder. Read only.
cdef struct Network:
    const fs_kernels *kernels
    Py_ssize_t item
    Py_ssize_t layers
    const CellWeights **cells
    const CellWeights *inputs   # the weights of the first layer that multiply the embedding
    RowTable embedding          # of width inputs.input_size
    const char *table           # [symbols][panels][vectors][lanes], main then candidate, as `init` of a step; or NULL
    Py_ssize_t table_row
    Py_ssize_t table_main
    const fs_weights *output
    Attention attention
    const fs_weights *combine   # MULTIPLICATIVE: of context and output
    const fs_weights *query     # ADDITIVE: of the output of the last layer
    # Of narrow weights that take two vectors as one row, the size of the first; else 0.
    Py_ssize_t combined_size
    Py_ssize_t joined_size
    bint entered_together       # ADDITIVE, narrow: the first layer takes embedding and context as one row
    const char *score


def pack_pair(weight not None, cnp.ndarray bias, Py_ssize_t columns):
    """Pack a linear map whose input is two vectors; the first `columns` columns of the weight are of the first.

    A narrow weight takes both vectors as one row: they have one scale.
    """
    if not isinstance(weight, np.ndarray):
        return pack_linear(None, weight, bias)
    return pack_linear(np.ascontiguousarray(weight[:, :columns]), np.ascontiguousarray(weight[:, columns:]), bias)


cdef class Weights:
    """The weights of a model, packed before. Immutable.

    Parameters
    ----------
    embedding : ndarray or NarrowArray of shape (symbols, E)
    inputs : Cell
        The weights of the first layer that multiply the embedding of a symbol. With additive attention and narrow
        weights they are not used: the first of the cells takes embedding and context as one row.
    table : ndarray or None
        Their product with the embedding of each symbol, `_recurrent.input_table`.
    cells : sequence of Cell
        One a layer. With additive attention the input of the first is the context; otherwise it is not used.
    output : PackedWeight
        From the output of a step to its logits; with additive attention, from output and context (`pack_pair`).
    attention : {"multiplicative", "additive"}, optional
    combine : PackedWeight, optional
        With multiplicative attention: from context and output (`pack_pair`) to the vector that logits are computed of.
    query : PackedWeight, optional
        With additive attention: W of the query W s, s the output of the last layer.
    score : ndarray of shape (A,), optional
        With additive attention: v of the scores v tanh(query + projected key).
    """

    cdef Network network
    cdef list kept  # owners of the memory that the pointers are into

    def __init__(
        self, embedding not None, inputs, cnp.ndarray table, cells, output, *, attention=None,
        combine=None, query=None, cnp.ndarray score=None,
    ):
        cdef Network *network = &self.network
        cdef Py_ssize_t i
        cdef cnp.ndarray pointers = np.empty(len(cells), np.uintp)
        self.kept = [embedding, table, pointers, score]
        network.layers = len(cells)
        network.cells = <const CellWeights **> cnp.PyArray_DATA(pointers)
        for i in range(network.layers):
            network.cells[i] = self.cell(cells[i])
            if network.cells[i].cell.rows != NULL:
                raise ValueError("cells should be of kinds whose steps need no input parts ahead of them")
        network.inputs = self.cell(inputs)
        network.kernels = network.inputs.kernels
        network.item = network.kernels.item_size
        network.output = self.panels(output)
        network.attention = ATTENTIONS[attention]
        network.combine = self.panels(combine)
        network.query = self.panels(query)
        network.combined_size = network.joined_size = 0
        cell_output = network.cells[network.layers - 1].output_size
        network.entered_together = network.attention == ADDITIVE and network.cells[0].main.narrow != NULL
        if network.attention == MULTIPLICATIVE and network.combine.narrow != NULL:
            network.combined_size = network.combine.h_size - cell_output
        if network.attention == ADDITIVE and network.output.narrow != NULL:
            network.joined_size = cell_output
        network.score = NULL if score is None else cnp.PyArray_BYTES(score)
        network.embedding = row_table(embedding)
        network.table_main = init_bytes(network.inputs, &network.inputs.main, network.inputs.main_vectors)
        network.table_row = inputs_bytes(network.inputs)
        network.table = NULL if table is None else cnp.PyArray_BYTES(table)

    cdef const CellWeights *cell(self, Cell cell) except NULL:
        self.kept.append(cell)
        return &cell.w

    cdef const fs_weights *panels(self, PackedWeight packed) except? NULL:
        if packed is None:
            return NULL
        self.kept.append(packed)
        return &packed.panels


# The sources that rows attend to: keys, and their projections for the scores.
cdef struct Sources:
    Py_ssize_t n
    Py_ssize_t width         # elements of a key: K; with multiplicative attention padded to whole vectors
    Py_ssize_t units         # elements of a projected key: A; padded likewise
    const char *keys         # [source][max_keys][width]
    const char *projected    # [source][max_keys][units]
    const int64_t *lengths   # [source]
    Py_ssize_t max_keys
    Py_ssize_t all_keys


# The rows of a decoder. Sizes that end in `_row`, `_each` or `_first` are in bytes.
cdef struct Rows:
    const Network *network
    Sources sources
    int n_threads
    Py_ssize_t rows
    Py_ssize_t capacity       # rows that the memory is for
    Scratch memory            # of all arrays below
    char *before              # [capacity][state_row]: h of every layer, then c; zeros after each
    char *after               # the same, written by the next step
    Py_ssize_t state_row
    Py_ssize_t h_row          # from the h of one layer to that of the next
    Py_ssize_t c_first        # from the beginning of a row to the c of the first layer
    Py_ssize_t c_row          # from the c of one layer to that of the next
    char *middle              # [capacity][middle_row]; see `CellPointers`
    char *z
    Py_ssize_t middle_row
    char *symbol_part         # [capacity][table_row]: where there is no table, a row of it for each row
    char *context             # [capacity][context_row]
    Py_ssize_t context_row
    char *mapped              # [capacity][mapped_row]: outputs of `combine`, or with additive attention of `query`
    Py_ssize_t mapped_row
    char *stats               # [capacity][2], of multiplicative attention
    Py_ssize_t *parent        # [capacity]: the row of `before` that each row continues from
    Py_ssize_t *source        # [capacity]: the source of each row
    Py_ssize_t *spare_parent  # [capacity]: where `choose` writes before it exchanges the pointers
    Py_ssize_t *spare_source
    char *scratch             # [n_threads][scratch_each], for attention
    Py_ssize_t scratch_each
    char *narrow              # of each thread, where weights are narrow: embeddings, narrow rows of x, and of h
    Py_ssize_t narrow_each
    Py_ssize_t vectors_each
    Py_ssize_t narrow_x_each
    bint backwards            # whether the next step takes the last panels first
    # One step.
    Py_ssize_t done           # rows that are done
    const int64_t *symbols
    char *logits
    Py_ssize_t last           # rows that are done after this parallel region
    bint split_panels         # whether threads split panels; else rows


cdef void lay_out(Rows *job, Py_ssize_t capacity, Scratch *scratch) noexcept nogil:
    """Set the pointers of all arrays for `capacity` rows."""
    cdef Py_ssize_t item = job.network.item
    job.capacity = capacity
    job.before = scratch_array(scratch, capacity * job.state_row)
    job.after = scratch_array(scratch, capacity * job.state_row)
    job.middle = scratch_array(scratch, capacity * job.middle_row)
    job.z = scratch_array(scratch, capacity * job.middle_row)
    job.symbol_part = scratch_array(scratch, capacity * job.network.table_row if job.network.table == NULL else 0)
    job.context = scratch_array(scratch, capacity * job.context_row)
    job.mapped = scratch_array(scratch, capacity * job.mapped_row)
    job.stats = scratch_array(scratch, capacity * 2 * item)
    job.parent = <Py_ssize_t *> scratch_array(scratch, capacity * sizeof(Py_ssize_t))
    job.source = <Py_ssize_t *> scratch_array(scratch, capacity * sizeof(Py_ssize_t))
    job.spare_parent = <Py_ssize_t *> scratch_array(scratch, capacity * sizeof(Py_ssize_t))
    job.spare_source = <Py_ssize_t *> scratch_array(scratch, capacity * sizeof(Py_ssize_t))


cdef int reserve_rows(Rows *job, Py_ssize_t capacity) noexcept nogil:
    """Take memory for `capacity` rows; the memory used before stays with the caller."""
    cdef Rows made = job[0]
    memset(&made.memory, 0, sizeof(Scratch))
    lay_out(&made, 1, &made.memory)
    if <double> capacity * made.memory.n_bytes > MAX_BYTES:
        return FS_NO_MEMORY
    made.memory.n_bytes = 0
    lay_out(&made, capacity, &made.memory)
    if scratch_allocate(&made.memory):
        return FS_NO_MEMORY
    lay_out(&made, capacity, &made.memory)
    memset(made.before, 0, capacity * made.state_row)
    memset(made.after, 0, capacity * made.state_row)
    job[0] = made
    return FS_DONE


cdef void product(
    const Rows *job, const fs_weights *weights, fs_epilogue epilogue, Py_ssize_t rows, const void **x,
    Py_ssize_t x_size, const void **h, void **out, int share, int shares, char *narrow,
) noexcept nogil:
    """out = f(W h + b) of a block of rows, or f(W x + U h + b) where the weights take an x of some size."""
    cdef const void *init[BLOCK_ROWS]
    cdef const void *joined[BLOCK_ROWS]
    cdef fs_step step
    cdef Py_ssize_t i, row_bytes = weights.h_size * sizeof(float), x_bytes = x_size * sizeof(float)
    memset(&step, 0, sizeof(step))
    take_share(&step, weights, share, shares)
    step.rows = rows
    step.with_x = weights.x_size > 0
    step.epilogue = epilogue
    step.init = init
    step.x = x
    step.h = h
    step.out = out
    for i in range(rows):
        init[i] = weights.bias
    if weights.narrow != NULL:
        if x_size:
            for i in range(rows):
                joined[i] = narrow + i * row_bytes
                memcpy(narrow + i * row_bytes, x[i], x_bytes)
                memcpy(narrow + i * row_bytes + x_bytes, h[i], row_bytes - x_bytes)
            step.h = joined
        step.narrow_h = narrow + job.vectors_each + job.narrow_x_each
        fs_narrow_inputs(&step)
    job.network.kernels.plain(&step)


cdef void attend(Rows *job, Py_ssize_t first, Py_ssize_t last, Py_ssize_t h_at, char *scratch) noexcept nogil:
    """Compute the contexts of rows [first, last) by multiplicative attention; the queries are in `after`."""
    cdef const Network *network = job.network
    cdef const Sources *sources = &job.sources
    cdef Py_ssize_t item = network.item, row = first, end, source
    # The source whose keys the kernel has packed; a cache line further begins the scratch of the kernel.
    cdef int64_t *packed = <int64_t *> scratch
    cdef fs_attention attention = attention_of(sources)
    attention.q.row = job.state_row // item
    attention.out.row = job.context_row // item
    while row < last:
        source = job.source[row]
        end = row + 1
        while end < last and job.source[end] == source:
            end += 1
        attention.max_queries = end - row
        attention.max_keys = sources.lengths[source]
        attention.q.data = job.after + row * job.state_row + h_at
        attention.k.data = <char *> sources.projected + source * sources.max_keys * sources.units * item
        attention.v.data = <char *> sources.keys + source * sources.max_keys * sources.width * item
        attention.out.data = job.context + row * job.context_row
        attention.stats = job.stats + row * 2 * item
        if packed[0] != source:
            packed[0] = source
            (<int64_t *> (scratch + CACHE_LINE))[0] = -1
        network.kernels.attend(&attention, 0, scratch + CACHE_LINE)
        row = end


cdef fs_attention attention_of(const Sources *sources) noexcept nogil:
    """Describe attention of one sequence and one head; the caller sets arrays, row sizes and counts of keys."""
    cdef fs_attention attention
    memset(&attention, 0, sizeof(attention))
    attention.batch = attention.heads = attention.kv_heads = attention.parts = 1
    attention.width = attention.k.row = sources.units
    attention.value_width = attention.v.row = sources.width
    attention.max_keys = sources.max_keys
    attention.scale = attention.factor = 1
    return attention


cdef inline void align_rows(Rows *job, Py_ssize_t first, Py_ssize_t last, real *scratch) noexcept nogil:
    """Compute the contexts of rows [first, last) by additive attention; the queries are in `mapped`."""
    cdef const Sources *sources = &job.sources
    cdef Py_ssize_t row, begin
    for row in range(first, last):
        begin = job.source[row] * sources.max_keys
        align_one(
            job.network.kernels, sources.units, sources.width, sources.lengths[job.source[row]],
            <const real *> (job.mapped + row * job.mapped_row),
            <const real *> sources.projected + begin * sources.units,
            <const real *> sources.keys + begin * sources.width, <const real *> job.network.score,
            scratch + sources.units + sources.max_keys, <real *> (job.context + row * job.context_row), scratch,
        )


cdef void run_step(
    Rows *job, Py_ssize_t first, Py_ssize_t last, int share, int shares, fs_barrier *barrier, char *scratch,
    char *narrow,
) noexcept nogil:
    """Run one step of rows [first, last) on one of `shares` threads that split the panels."""
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
    cdef void *mapped[BLOCK_ROWS]
    cdef CellPointers at
    cdef CellStep step
    cdef Py_ssize_t base = first, layer, row, i, n, h_at, c_at, top_at = (network.layers - 1) * job.h_row, mine, end
    cdef const char *old
    cdef char *new
    at.x, at.init, at.candidate_init, at.no_bias, at.h, at.c_before = x, init, candidate_init, no_bias, h, c_before
    at.c, at.middle, at.z, at.out = c, middle, z, out
    at.gates = NULL
    at.narrow_x = narrow + job.vectors_each
    at.narrow_h = at.narrow_x + job.narrow_x_each
    while base < last:
        n = min(BLOCK_ROWS, last - base)
        # Attention is split by rows: this thread computes [mine, end).
        mine = base + n * share // shares
        end = base + n * (share + 1) // shares
        if network.attention == ADDITIVE:
            for i in range(n):
                h[i] = job.before + job.parent[base + i] * job.state_row + top_at
                mapped[i] = job.mapped + (base + i) * job.mapped_row
            product(job, network.query, FS_IDENTITY, n, NULL, 0, h, mapped, share, shares, narrow)
            wait_for_team(barrier, shares)
            if network.item == 4:
                align_rows(job, mine, end, <float *> scratch)
            else:
                align_rows(job, mine, end, <double *> scratch)
            wait_for_team(barrier, shares)
        if network.table == NULL and not network.entered_together:
            for i in range(n):
                x[i] = vector_of(&network.embedding, job.symbols[base + i], narrow, i)
                out[i] = job.symbol_part + (base + i) * network.table_row
            set_cell_step(&step, network.inputs, &at, True, share, shares)
            input_parts(&step, network.inputs, n, x, init, out)
        for layer in range(network.layers):
            cell = network.cells[layer]
            h_at = layer * job.h_row
            c_at = job.c_first + layer * job.c_row
            for i in range(n):
                row = base + i
                old = job.before + job.parent[row] * job.state_row
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
                    continue
                if network.entered_together:
                    x[i] = entering(job, row, narrow + i * cell.input_size * network.item)
                    continue
                x[i] = job.context + row * job.context_row
                if network.table == NULL:
                    init[i] = job.symbol_part + row * network.table_row
                else:
                    init[i] = network.table + job.symbols[row] * network.table_row
                candidate_init[i] = <const char *> init[i] + network.table_main
            set_cell_step(&step, cell, &at, layer > 0 or network.attention == ADDITIVE, share, shares)
            do_cell(&step, cell, n, job.backwards, shares, barrier)
        if network.attention == MULTIPLICATIVE:
            attend(job, mine, end, top_at, scratch)
            wait_for_team(barrier, shares)
            for i in range(n):
                x[i] = job.context + (base + i) * job.context_row
                h[i] = out[i]
                mapped[i] = job.mapped + (base + i) * job.mapped_row
            product(
                job, network.combine, FS_TANH, n, x, network.combined_size, h, mapped, share, shares, narrow,
            )
            wait_for_team(barrier, shares)
        for i in range(n):
            if network.attention == NONE:
                h[i] = out[i]
            elif network.attention == MULTIPLICATIVE:
                h[i] = mapped[i]
            else:
                x[i] = out[i]
                h[i] = job.context + (base + i) * job.context_row
        for i in range(n):
            out[i] = job.logits + (base + i) * network.output.units * network.item
        product(job, network.output, FS_IDENTITY, n, x, network.joined_size, h, out, share, shares, narrow)
        base += BLOCK_ROWS


cdef inline const void *vector_of(
    const RowTable *embedding, int64_t symbol, char *vectors, Py_ssize_t i,
) noexcept nogil:
    """The vector of a symbol; of a narrow embedding, at place i of some room."""
    cdef char *vector
    if embedding.type == FS_REAL:
        return embedding.data + symbol * embedding.width * embedding.item
    vector = vectors + i * embedding.width * embedding.real_item
    copy_row(embedding, symbol, vector)
    return vector


cdef inline const void *entering(const Rows *job, Py_ssize_t row, char *out) noexcept nogil:
    """The vector of a symbol and the context behind it, as one row."""
    cdef const RowTable *embedding = &job.network.embedding
    cdef Py_ssize_t n_bytes = embedding.width * embedding.real_item
    cdef Py_ssize_t context_bytes = job.network.cells[0].input_size * sizeof(float) - n_bytes
    copy_row(embedding, job.symbols[row], out)
    memcpy(out + n_bytes, job.context + row * job.context_row, context_bytes)
    return out


cdef inline void wait_for_team(fs_barrier *barrier, int team) noexcept nogil:
    if team > 1:
        team_wait(barrier, team)


cdef void run_rows(void *rows, int thread, int team, fs_barrier *barrier) noexcept nogil:
    """Run the part of one thread of a step of rows [done, last)."""
    cdef Rows *job = <Rows *> rows
    cdef char *scratch = job.scratch + thread * job.scratch_each
    cdef char *narrow = job.narrow + thread * job.narrow_each
    cdef Py_ssize_t first = job.done, n = job.last - first
    if job.split_panels or team == 1:
        run_step(job, first, job.last, thread, team, barrier, scratch, narrow)
    else:
        run_step(job, first + n * thread // team, first + n * (thread + 1) // team, 0, 1, NULL, scratch, narrow)


cdef Split plan(const Rows *job, Py_ssize_t *chunk) noexcept nogil:
    """Choose how threads share a step, and how many rows they compute between two checks for Ctrl-C."""
    cdef const Network *network = job.network
    cdef const Sources *sources = &job.sources
    cdef Py_ssize_t work = product_work(network, network.output), all_work, barriers = 0, layer, keys, parts
    cdef int tile = network.kernels.tile_rows[4]
    cdef const CellWeights *cell
    for layer in range(network.layers):
        cell = network.cells[layer]
        work += cell_work(cell)
        barriers += 2 if cell.candidate.units or cell.projection.units else 1
    cell = network.cells[0]
    if network.attention != ADDITIVE:
        work -= network.table_row // network.item * cell.input_size
    if network.table == NULL:
        work += network.table_row // network.item * network.inputs.input_size
    all_work = work
    if network.attention != NONE:
        barriers += 2
        keys = sources.all_keys // sources.n
        all_work += keys * (sources.units + sources.width + WEIGHT_WORK)
        if network.attention == ADDITIVE:
            all_work += keys * sources.units * TANH_WORK
            work += product_work(network, network.query)
        else:
            work += product_work(network, network.combine)
    parts = (job.rows - 1) // max(2 * tile * job.n_threads, SIGNAL_WORK // all_work) + 1
    chunk[0] = (job.rows + parts - 1) // parts
    return split_of(
        chunk[0], work, chunk[0] * all_work, barriers, cell.main.panels, tile, <int> network.item, job.n_threads,
    )


cdef inline Py_ssize_t product_work(const Network *network, const fs_weights *weights) noexcept nogil:
    return weights.panels * 4 * network.kernels.lanes * (weights.x_size + weights.h_size)


cdef int step(void *self, ptrdiff_t rows, const int64_t *symbols, void *logits) noexcept nogil:
    """See decoder.h."""
    cdef Rows *job = <Rows *> self
    cdef Py_ssize_t chunk, row
    cdef Split split = plan(job, &chunk)
    job.last = min(rows, job.done + chunk)
    job.split_panels = split.panels
    job.symbols = symbols
    job.logits = <char *> logits
    run_team(run_rows, job, split.threads, job.n_threads)
    if job.last < rows:
        job.done = job.last
        return FS_AGAIN
    job.done = 0
    job.before, job.after = job.after, job.before
    job.backwards = not job.backwards
    for row in range(rows):
        job.parent[row] = row
    return FS_DONE


cdef int choose(void *self, ptrdiff_t rows, const int64_t *parents) noexcept nogil:
    """See decoder.h."""
    cdef Rows *job = <Rows *> self
    cdef Rows old = job[0]
    cdef Py_ssize_t row
    if rows <= job.capacity:
        for row in range(rows):
            job.spare_parent[row] = job.parent[parents[row]]
            job.spare_source[row] = job.source[parents[row]]
        job.parent, job.spare_parent = job.spare_parent, job.parent
        job.source, job.spare_source = job.spare_source, job.source
    else:
        if reserve_rows(job, rows) != FS_DONE:
            return FS_NO_MEMORY
        for row in range(rows):
            memcpy(
                job.before + row * job.state_row, old.before + old.parent[parents[row]] * job.state_row, job.state_row,
            )
            job.parent[row] = row
            job.source[row] = old.source[parents[row]]
        scratch_close(&old.memory)
    job.rows = rows
    job.done = 0  # a step that was begun may have been given up
    return FS_DONE


cdef object whole_vectors(array, Py_ssize_t lanes):
    """Return an array padded with zeros so that its last axis is a whole number of vectors."""
    wide = -(-array.shape[-1] // lanes) * lanes
    return np.pad(array, ((0, 0), (0, 0), (0, wide - array.shape[-1]))) if wide > array.shape[-1] else array


cdef class Decoder:
    """The states of rows of symbols: a `fastseq.models.decoding.Decoder`.

    Parameters
    ----------
    weights : Weights
    h : ndarray of shape (B, layers, H)
        Where the rows start.
    c : ndarray of shape (B, layers, H), or None
        The same of an LSTM.
    copies : int
        Rows that memory is taken for at once, over B; for more it is taken when `choose` asks for them.
    n_threads : int
    keys, projected, lengths : ndarrays of shapes (B, S, K), (B, S, A) and (B,), optional
        With attention: the keys of each row, their projections for the scores, and the number of real keys, 1 or more.
    """

    cdef fs_decoder functions
    cdef Rows job
    cdef Weights weights
    cdef list kept  # the arrays of the sources, and scratch

    def __init__(
        self, Weights weights not None, cnp.ndarray h not None, cnp.ndarray c, copies, int n_threads, keys=None,
        projected=None, lengths=None,
    ):
        cdef Rows *job = &self.job
        cdef const Network *network = &weights.network
        cdef Py_ssize_t layer, row
        cdef char *state
        capacity = max(1, len(h) * copies)
        self.weights = weights
        self.kept = []
        job.network = network
        job.n_threads = n_threads
        job.rows = cnp.PyArray_DIM(h, 0)
        job.h_row = lines(cnp.PyArray_DIM(h, 2) * network.item)
        job.c_first = network.layers * job.h_row
        job.c_row = 0 if c is None else lines(cnp.PyArray_DIM(c, 2) * network.item)
        job.state_row = job.c_first + network.layers * job.c_row
        job.middle_row = lines(network.cells[0].hidden_size * network.item)
        if network.attention != NONE:
            self.set_sources(keys, projected, lengths)
        self.set_narrow()
        if capacity > MAX_BYTES or reserve_rows(job, capacity) != FS_DONE:
            raise MemoryError(f"for the states of {capacity} rows")
        for row in range(job.rows):
            job.parent[row] = job.source[row] = row
            state = job.before + row * job.state_row
            for layer in range(network.layers):
                copy_vector(state + layer * job.h_row, h, row, layer)
                if c is not None:
                    copy_vector(state + job.c_first + layer * job.c_row, c, row, layer)
        self.functions.self = job
        self.functions.vocab = network.output.units
        self.functions.item_size = <int> network.item
        self.functions.step = step
        self.functions.choose = choose

    cdef int set_narrow(self) except -1:
        """Room for what each thread makes of narrow weights' rows."""
        cdef Rows *job = &self.job
        cdef const Network *network = job.network
        cdef const CellWeights *cell = network.inputs
        cdef Py_ssize_t layer, h_each = 0, floats = 0
        job.narrow, job.narrow_each, job.vectors_each = NULL, 0, 0
        job.narrow_x_each = narrow_x_bytes(cell, BLOCK_ROWS)
        for layer in range(network.layers):
            cell = network.cells[layer]
            job.narrow_x_each = max(job.narrow_x_each, narrow_x_bytes(cell, BLOCK_ROWS))
            h_each = max(h_each, narrow_h_bytes(cell, BLOCK_ROWS))
        for weights in [<size_t> network.output, <size_t> network.combine, <size_t> network.query]:
            h_each = max(h_each, self.narrow_bytes(<const fs_weights *> <size_t> weights))
        if network.embedding.type != FS_REAL:
            floats = network.embedding.width
        if network.entered_together:
            floats = max(floats, network.cells[0].input_size)
        if network.combined_size:
            floats = max(floats, network.combine.h_size)
        if network.joined_size:
            floats = max(floats, network.output.h_size)
        if h_each + job.narrow_x_each + floats == 0:
            return 0
        job.vectors_each = lines(BLOCK_ROWS * floats * sizeof(float))
        job.narrow_each = job.vectors_each + job.narrow_x_each + h_each
        cdef cnp.ndarray room = np.empty(job.n_threads * job.narrow_each + CACHE_LINE, np.uint8)
        job.narrow = cnp.PyArray_BYTES(room)
        job.narrow += -<Py_ssize_t> job.narrow & (CACHE_LINE - 1)
        self.kept.append(room)
        return 0

    cdef Py_ssize_t narrow_bytes(self, const fs_weights *weights):
        return 0 if weights == NULL else fs_narrow_bytes(weights, False, BLOCK_ROWS)

    cdef int set_sources(self, keys, projected, lengths) except -1:
        cdef Rows *job = &self.job
        cdef const Network *network = job.network
        cdef Sources *sources = &job.sources
        cdef Py_ssize_t reals, thread
        cdef fs_attention attention
        if network.attention == MULTIPLICATIVE:
            keys, projected = (whole_vectors(array, network.kernels.lanes) for array in (keys, projected))
        cdef cnp.ndarray of_keys = np.ascontiguousarray(keys), of_projected = np.ascontiguousarray(projected)
        cdef cnp.ndarray counts = np.ascontiguousarray(lengths, np.int64)
        sources.n, sources.max_keys, sources.width = keys.shape
        sources.units = cnp.PyArray_DIM(of_projected, 2)
        sources.keys = cnp.PyArray_BYTES(of_keys)
        sources.projected = cnp.PyArray_BYTES(of_projected)
        sources.lengths = <const int64_t *> cnp.PyArray_DATA(counts)
        sources.all_keys = int(counts.sum())
        job.context_row = lines(sources.width * network.item)
        if network.attention == MULTIPLICATIVE:
            attention = attention_of(sources)
            reals = network.kernels.attend_scratch(&attention)
            job.mapped_row = lines(network.combine.units * network.item)
        else:
            reals = sources.units + 2 * sources.max_keys
            job.mapped_row = lines(network.query.units * network.item)
        job.scratch_each = CACHE_LINE + lines(reals * network.item)
        cdef cnp.ndarray scratch = np.empty(job.n_threads * job.scratch_each + CACHE_LINE, np.uint8)
        job.scratch = cnp.PyArray_BYTES(scratch)
        job.scratch += -<Py_ssize_t> job.scratch & (CACHE_LINE - 1)
        for thread in range(job.n_threads):
            (<int64_t *> (job.scratch + thread * job.scratch_each))[0] = -1
        self.kept += [of_keys, of_projected, counts, scratch]
        return 0

    def __dealloc__(self):
        scratch_close(&self.job.memory)

    def capsule(self):
        """Return a capsule with the pointers that `_decoding` calls; keep this object alive while it is used."""
        return PyCapsule_New(&self.functions, "fastseq.decoder", NULL)

    def step(self, symbols):
        """Return the logits (B, V) after one more symbol of each row, (B,)."""
        cdef cnp.ndarray ids = np.ascontiguousarray(symbols, np.int64)
        cdef cnp.ndarray logits = np.empty((self.job.rows, self.functions.vocab), f"f{self.functions.item_size}")
        cdef const int64_t *given = <const int64_t *> cnp.PyArray_DATA(ids)
        cdef void *to = cnp.PyArray_DATA(logits)
        cdef int status
        if self.job.rows:
            status = FS_AGAIN
            while status == FS_AGAIN:
                with nogil:
                    status = step(&self.job, self.job.rows, given, to)
                PyErr_CheckSignals()
        return logits

    def choose(self, rows):
        """Replace the rows by those of these numbers; a row may be taken several times."""
        cdef cnp.ndarray parents = np.ascontiguousarray(rows, np.int64)
        if choose(&self.job, len(parents), <const int64_t *> cnp.PyArray_DATA(parents)) != FS_DONE:
            raise MemoryError(f"for the states of {len(parents)} rows")


cdef void copy_vector(char *to, cnp.ndarray state, Py_ssize_t row, Py_ssize_t layer) noexcept:
    """Copy the vector of a row and a layer of a state array (B, layers, width), whose last axis is contiguous."""
    cdef const char *at = cnp.PyArray_BYTES(state)
    at += row * cnp.PyArray_STRIDE(state, 0) + layer * cnp.PyArray_STRIDE(state, 1)
    memcpy(to, at, cnp.PyArray_DIM(state, 2) * cnp.PyArray_ITEMSIZE(state))
