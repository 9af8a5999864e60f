"""Whole stacks of Transformer blocks, compiled, for inference; `fastseq.reference._transformer` has the same.

Arguments were checked before. How a run is laid out and shared among threads is in _schedule.pyx, how keys and values
are kept in _kv_pages.pyx; here is what Python calls: whole runs, runs that go on from what was kept, and the decoder
whose steps the loop of _decoding.pyx takes without Python.
"""

cimport cython
cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from decoding.decoder cimport FS_AGAIN, FS_DONE, FS_FULL, FS_NO_MEMORY, fs_decoder
from runtime.kernels cimport FS_GELU, FS_GELU_TANH, FS_IDENTITY, FS_RELU, fs_page, fs_weights
from transformer.kv_tables cimport fs_lines_new, fs_page_kind, fs_table, fs_table_clear, fs_table_extend, fs_table_roll
from fastseq._attention cimport mask_of, with_all_keys
from fastseq._kv_pages cimport PageLists, clear_tables, extend, pages_new, share, tables_of
from fastseq._kv_pages cimport Pages as PageTables
from fastseq._packing cimport PackedWeight, RowTable, copy_row, row_table
from fastseq._schedule cimport (
    CROSS_ATTENTION, FEED_FORWARD, MAX_SUBLAYERS, NO_GATE, PRODUCT_GATE, SELF_ATTENTION, SILU_GATE, Cursor, Layer, Norm,
    Plan, Sublayer, Task, plan_free, plan_make, run_some_steps, set_outputs,
)
from fastseq._simd cimport kernels_for

import numpy as np

from fastseq._kv_pages import Pages  # no-cython-lint: part of this set of operations

cnp.import_array()

# What linear1 is followed by, and how its results are multiplied with those of linear3.
cdef dict ACTIVATIONS = {
    "relu": (FS_RELU, NO_GATE),
    "gelu": (FS_GELU, NO_GATE),
    "gelu_tanh": (FS_GELU_TANH, NO_GATE),
    "geglu": (FS_GELU, PRODUCT_GATE),
    "swiglu": (FS_IDENTITY, SILU_GATE),
}


cdef const fs_weights *weights_of(PackedWeight packed) except NULL:
    """The panels of some packed weights, valid as long as these are kept."""
    return &packed.panels


cdef Norm norm_of(bint rms, double eps, cnp.ndarray weight, cnp.ndarray bias) noexcept:
    cdef Norm norm
    norm.rms = rms
    norm.eps = eps
    norm.weight = NULL if weight is None else cnp.PyArray_BYTES(weight)
    norm.bias = NULL if bias is None else cnp.PyArray_BYTES(bias)
    return norm


cdef class Block:
    """One block: its description, and the weights that others packed and it keeps. Immutable."""

    cdef list kept
    cdef Layer layer

    cdef const fs_weights *weights(self, packed) except NULL:
        self.kept.append(packed)
        return weights_of(packed)

    cdef int add_sublayer(self, settings, str kind, parts, norm) except -1:
        cdef Sublayer *sublayer = &self.layer.sublayers[self.layer.n_sublayers]
        if self.layer.n_sublayers == MAX_SUBLAYERS:
            raise ValueError(f"a block should have at most {MAX_SUBLAYERS} sublayers")
        self.layer.n_sublayers += 1
        self.kept.append(norm)
        weight, bias = norm
        sublayer.norm = norm_of(settings["norm"] == "rms", settings["eps"], weight, bias)
        if kind == "feed_forward":
            sublayer.kind = FEED_FORWARD
            sublayer.activation, sublayer.gate = ACTIVATIONS[settings["activation"]]
            sublayer.input = self.weights(parts["linear1"])
            sublayer.output = self.weights(parts["linear2"])
            if sublayer.gate != NO_GATE:
                sublayer.gated = self.weights(parts["linear3"])
        elif kind == "self_attention":
            sublayer.kind = SELF_ATTENTION
            sublayer.input = self.weights(parts["qkv"])
            sublayer.output = self.weights(parts["out"])
        else:
            sublayer.kind = CROSS_ATTENTION
            sublayer.input = self.weights(parts["q"])
            sublayer.memory = self.weights(parts["kv"])
            sublayer.output = self.weights(parts["out"])
        return 0


def block_pack(settings, sublayers):
    """A block as `run_blocks` wants it; see `fastseq.reference._transformer.block_pack`."""
    cdef Block block = Block()
    cdef Layer *layer = &block.layer
    cdef cnp.ndarray cos, sin
    block.kept = []
    layer.heads = settings["heads"]
    layer.kv_heads = settings["kv_heads"]
    layer.head_dim = settings["head_dim"]
    layer.norm_first = settings["norm_first"]
    layer.window = settings["window"] or 0
    if settings["rotary"] is not None:
        cos, sin, layer.interleaved = settings["rotary"]
        block.kept += [cos, sin]
        layer.cos = cnp.PyArray_BYTES(cos)
        layer.sin = cnp.PyArray_BYTES(sin)
        layer.rotary_dim = 2 * cnp.PyArray_DIM(cos, 1)
    for kind, parts, norm in sublayers:
        block.add_sublayer(settings, kind, parts, norm)
    return block


cdef bint attends_memory(const Layer *layer) noexcept nogil:
    """Whether a block has attention to a memory."""
    cdef int j
    for j in range(layer.n_sublayers):
        if layer.sublayers[j].kind == CROSS_ATTENTION:
            return True
    return False


@cython.internal
cdef class Stack:
    """Blocks and the norm after the last, in the form of a task; it keeps them."""

    cdef list kept
    cdef Layer **layers
    cdef Py_ssize_t n_layers
    cdef bint has_final
    cdef Norm final

    def __cinit__(self, list blocks, final_norm):
        self.kept = [blocks, final_norm]
        self.n_layers = len(blocks)
        self.layers = <Layer **> malloc(self.n_layers * sizeof(Layer *))
        if self.layers == NULL:
            raise MemoryError(f"{self.n_layers} layers")
        for i, block in enumerate(blocks):
            self.layers[i] = &(<Block> block).layer
        self.has_final = final_norm is not None
        if self.has_final:
            kind, eps, weight, bias = final_norm
            self.final = norm_of(kind == "rms", eps, weight, bias)

    def __dealloc__(self):
        free(self.layers)

    cdef void start(self, Task *task) noexcept:
        """A task of these blocks over no rows yet."""
        memset(task, 0, sizeof(Task))
        task.layers = self.layers
        task.n_layers = self.n_layers
        task.has_final = self.has_final
        task.final = self.final


cdef void set_rows(Task *task, cnp.ndarray y, cnp.ndarray starts, cnp.ndarray positions, Py_ssize_t longest) noexcept:
    """The rows of a task: x in y, where the outputs will be."""
    task.stream = cnp.PyArray_BYTES(y)
    task.rows = cnp.PyArray_DIM(y, 0)
    task.width = cnp.PyArray_DIM(y, 1)
    task.batch = cnp.PyArray_DIM(starts, 0) - 1
    task.starts = <const int64_t *> cnp.PyArray_DATA(starts)
    task.positions = NULL if positions is None else <int64_t *> cnp.PyArray_DATA(positions)
    task.longest = longest


cdef int run(const Task *task, bint of_memory, int n_threads) except -1:
    """The whole of a task."""
    cdef Plan plan
    if plan_make(&plan, task, of_memory, n_threads):
        raise MemoryError("scratch for the blocks")
    try:
        run_to_end(&plan)
    finally:
        plan_free(&plan)
    return 0


cdef int run_to_end(Plan *plan) except -1:
    """All segments, with a look for Ctrl-C after every so much work."""
    cdef Cursor cursor
    memset(&cursor, 0, sizeof(cursor))
    while cursor.segment < plan.n_segments:
        with nogil:
            run_some_steps(plan, &cursor)
        PyErr_CheckSignals()
    return 0


def run_blocks(
    list blocks not None, cnp.ndarray x not None, cnp.ndarray starts not None, cnp.ndarray positions, bint causal, mask,
    cnp.ndarray memory, cnp.ndarray memory_starts, memory_mask, final_norm, bint want_weights, int n_threads,
):
    """All blocks in order; see `fastseq.reference._transformer.run_blocks`."""
    cdef Stack stack = Stack(blocks, final_norm)
    cdef cnp.ndarray y = np.array(x, order="C"), own_mask, cross_mask, pointers
    cdef Py_ssize_t batch = len(starts) - 1, longest = np.diff(starts).max(initial=0), longest_memory = 0
    cdef Py_ssize_t heads = stack.layers[0].heads
    cdef bint crossing = attends_memory(stack.layers[0])
    cdef Task task
    if memory is not None:
        longest_memory = np.diff(memory_starts).max(initial=0)
    weights = None
    if want_weights:
        weights = [np.zeros((batch, heads, longest, longest), y.dtype) for _ in blocks]
        if crossing:
            weights = [(own, np.zeros((batch, heads, longest, longest_memory), y.dtype)) for own in weights]
    if not len(y):
        return y, weights
    own_mask, cross_mask = with_all_keys(mask, longest), with_all_keys(memory_mask, longest_memory)
    stack.start(&task)
    task.kernels = kernels_for(y.itemsize)
    set_rows(&task, y, starts, positions, longest)
    task.causal = causal
    task.mask = mask_of(own_mask)
    task.memory_mask = mask_of(cross_mask)
    if memory is not None:
        task.memory = cnp.PyArray_BYTES(memory)
        task.memory_row = cnp.PyArray_STRIDE(memory, 0)
        task.memory_rows = cnp.PyArray_DIM(memory, 0)
        task.memory_starts = <const int64_t *> cnp.PyArray_DATA(memory_starts)
        task.longest_memory = longest_memory
    if want_weights:
        pairs = weights if crossing else [(own, own) for own in weights]
        pointers = np.array([[own.ctypes.data, cross.ctypes.data] for own, cross in pairs], np.uintp)
        task.weights = <char **> cnp.PyArray_DATA(pointers)
    run(&task, False, n_threads)
    return y, weights


def no_pages(list blocks not None, dtype, Py_ssize_t rows):
    """Where sequences start: see `fastseq.reference._transformer.no_pages`."""
    cdef Layer *layer = &(<Block> blocks[0]).layer
    return pages_new(dtype.itemsize, len(blocks), layer.kv_heads, layer.head_dim, layer.window, rows)


def memory_pages(list blocks not None, cnp.ndarray memory not None, cnp.ndarray starts not None, int n_threads):
    """Keys and values of a memory; see `fastseq.reference._transformer.memory_pages`."""
    cdef Stack stack = Stack(blocks, None)
    cdef Layer *layer = stack.layers[0]
    cdef PageTables pages = pages_new(
        memory.itemsize, stack.n_layers, layer.kv_heads, layer.head_dim, 0, len(starts) - 1,
    )
    cdef cnp.ndarray rows = np.ascontiguousarray(memory), whose, positions
    cdef Py_ssize_t i
    cdef PageLists room
    cdef Task task
    counts = np.diff(starts)
    whose = np.repeat(np.arange(pages.rows), counts)
    positions = np.arange(len(rows)) - np.repeat(starts[:-1], counts)
    for i in range(pages.rows):
        extend(&pages.tables[i], &pages.kind, counts[i])
    if not len(rows):
        return pages
    room = PageLists(pages)
    stack.start(&task)
    task.kernels = pages.kind.kernels
    set_rows(&task, rows, starts, positions, counts.max(initial=0))
    task.memory = cnp.PyArray_BYTES(rows)
    task.memory_row = cnp.PyArray_STRIDE(rows, 0)
    task.kind = &pages.kind
    task.whose = <const int64_t *> cnp.PyArray_DATA(whose)
    task.memory_pages = room.pages
    run(&task, True, n_threads)
    return pages


def run_cached(
    list blocks not None, cnp.ndarray x not None, cnp.ndarray starts not None, PageTables pages not None,
    PageTables memory, final_norm, int n_threads,
):
    """Go on from what was kept; see `fastseq.reference._transformer.run_cached`."""
    cdef Stack stack = Stack(blocks, final_norm)
    cdef PageTables after = pages.take(range(pages.rows))
    cdef cnp.ndarray y = np.array(x, order="C"), whose, positions
    cdef Py_ssize_t i
    cdef PageLists room, memory_room
    cdef Task task
    counts = np.diff(starts)
    whose = np.repeat(np.arange(pages.rows), counts)
    positions = np.arange(len(y)) + np.repeat(pages.lengths - starts[:-1], counts)
    if not len(y):
        return y, after
    for i in range(pages.rows):
        extend(&after.tables[i], &after.kind, counts[i])
    room = PageLists(after)
    stack.start(&task)
    task.kernels = after.kind.kernels
    set_rows(&task, y, starts, positions, counts.max(initial=0))
    task.causal = True
    task.kind = &after.kind
    task.whose = <const int64_t *> cnp.PyArray_DATA(whose)
    task.pages = room.pages
    task.lengths = room.lengths
    task.longest_kept = room.longest
    if memory is not None:
        memory_room = PageLists(memory)
        task.memory_pages = memory_room.pages
        task.memory_lengths = memory_room.lengths
        task.longest_memory = memory_room.longest
    run(&task, False, n_threads)
    for i in range(after.rows):
        fs_table_roll(&after.tables[i], &after.kind)
    return y, after


# What the steps of a decoder use, without the GIL.
cdef struct Decoding:
    Task task                  # over a token of each row
    Plan plan                  # for that many rows
    Cursor cursor              # how far a step of it is
    int n_threads
    fs_page_kind kind
    Py_ssize_t rows
    fs_table *tables
    fs_table *memory_tables    # NULL: no memory
    int64_t max_tokens         # tokens of a row
    RowTable embedding         # of width
    const char *positions      # [max_tokens][width], or NULL
    # [rows], except starts: [rows + 1]
    char *room
    int64_t *starts
    int64_t *places
    int64_t *whose
    int64_t *lengths
    int64_t *memory_lengths
    fs_page ***pages
    fs_page ***memory_pages


cdef int make_room(Decoding *d) noexcept nogil:
    """Memory and plan for the rows there are now; -1 without memory."""
    cdef Py_ssize_t n = d.rows + 1, i, width = d.task.width * d.kind.kernels.item_size
    plan_free(&d.plan)
    free(d.room)
    d.room = <char *> malloc(n * (5 * sizeof(int64_t) + 2 * sizeof(fs_page **) + width) + 64)
    if d.room == NULL:
        return -1
    d.starts = <int64_t *> d.room
    d.places, d.whose, d.lengths, d.memory_lengths = d.starts + n, d.starts + 2 * n, d.starts + 3 * n, d.starts + 4 * n
    d.pages = <fs_page ***> (d.starts + 5 * n)
    d.memory_pages = d.pages + n
    d.task.stream = <char *> (d.memory_pages + n)
    d.task.stream += -<Py_ssize_t> d.task.stream & 63
    d.task.batch = d.task.rows = d.rows
    d.task.longest = 1
    d.task.longest_kept = d.task.longest_memory = 0
    for i in range(n):
        d.starts[i] = d.whose[i] = i
    for i in range(d.rows):
        d.task.longest_kept = max(d.task.longest_kept, d.tables[i].length + 1)
        if d.memory_tables != NULL:
            d.memory_lengths[i] = d.memory_tables[i].length
            d.memory_pages[i] = d.memory_tables[i].pages
            d.task.longest_memory = max(d.task.longest_memory, d.memory_lengths[i])
    d.task.starts, d.task.positions, d.task.whose, d.task.lengths = d.starts, d.places, d.whose, d.lengths
    d.task.pages = d.pages
    if d.memory_tables != NULL:
        d.task.memory_pages, d.task.memory_lengths = d.memory_pages, d.memory_lengths
    return plan_make(&d.plan, &d.task, False, d.n_threads)


cdef void enter(Decoding *d, Py_ssize_t row, int64_t symbol) noexcept nogil:
    """The vector of a symbol at its place, as the row of the stream."""
    cdef Py_ssize_t width = d.task.width, i
    cdef Py_ssize_t n_bytes = width * d.kind.kernels.item_size
    cdef char *x = d.task.stream + row * n_bytes
    cdef const char *position
    copy_row(&d.embedding, symbol, x)
    if d.positions == NULL:
        return
    position = d.positions + d.tables[row].length * n_bytes
    if d.kind.kernels.item_size == 4:
        for i in range(width):
            (<float *> x)[i] += (<const float *> position)[i]
    else:
        for i in range(width):
            (<double *> x)[i] += (<const double *> position)[i]


cdef void go_back(Decoding *d, Py_ssize_t rows) noexcept nogil:
    """Take back the last token of the first rows, where a step was not finished."""
    cdef Py_ssize_t i
    for i in range(rows):
        d.tables[i].length -= 1


cdef int decoder_step(void *self, ptrdiff_t rows, const int64_t *symbols, void *logits) noexcept nogil:
    cdef Decoding *d = <Decoding *> self
    cdef Py_ssize_t i
    if d.plan.lists.block == NULL and make_room(d):
        return FS_NO_MEMORY
    if d.cursor.segment == 0 and d.cursor.item == 0:
        for i in range(rows):
            if d.tables[i].length >= d.max_tokens:
                return FS_FULL
        for i in range(rows):
            enter(d, i, symbols[i])
            d.places[i] = d.tables[i].length
            if fs_table_extend(&d.tables[i], &d.kind, 1):
                go_back(d, i)
                return FS_NO_MEMORY
            d.lengths[i] = d.tables[i].length
            d.pages[i] = d.tables[i].pages
    set_outputs(&d.plan, logits)
    run_some_steps(&d.plan, &d.cursor)
    if d.cursor.segment < d.plan.n_segments:
        return FS_AGAIN
    memset(&d.cursor, 0, sizeof(Cursor))
    for i in range(rows):
        fs_table_roll(&d.tables[i], &d.kind)
    return FS_DONE


cdef int decoder_choose(void *self, ptrdiff_t rows, const int64_t *parents) noexcept nogil:
    cdef Decoding *d = <Decoding *> self
    cdef fs_table *tables
    cdef fs_table *memory = NULL
    cdef Py_ssize_t i
    if d.cursor.segment or d.cursor.item:
        memset(&d.cursor, 0, sizeof(Cursor))  # of a step that was left
        go_back(d, d.rows)
    tables = tables_of(d.tables, rows, parents)
    if tables == NULL:
        return FS_NO_MEMORY
    if d.memory_tables != NULL:
        memory = tables_of(d.memory_tables, rows, parents)
        if memory == NULL:
            clear_tables(tables, rows)
            return FS_NO_MEMORY
        clear_tables(d.memory_tables, d.rows)
        d.memory_tables = memory
    clear_tables(d.tables, d.rows)
    d.tables = tables
    if rows != d.rows:
        plan_free(&d.plan)
    d.rows = rows
    if d.memory_tables != NULL and d.plan.lists.block != NULL:
        for i in range(rows):
            d.memory_lengths[i] = d.memory_tables[i].length
            d.memory_pages[i] = d.memory_tables[i].pages
    return FS_DONE


cdef class Decoder:
    """Rows of symbols that go on from pages, for the loop of `fastseq._decoding`.

    Parameters
    ----------
    blocks, final_norm
        As of `run_cached`; rotary tables hold `max_tokens` positions.
    embedding : array or NarrowArray of shape (ids, width)
    positions : array of shape (P, width), P at least `max_tokens`, or None
        Added to the vectors of symbols.
    output : Packed
        What makes logits of the last outputs.
    pages : Pages
        Where the rows are.
    memory : Pages or None
        What they attend to besides.
    max_tokens : int
        Tokens of a row. There `renew` has to be called.
    prefill : callable
        prefill(list of arrays of symbols) gives the pages of whole sequences.
    """

    cdef Decoding *d  # on a cache line of its own, as its barrier wants
    cdef fs_decoder decoder
    cdef list kept
    cdef object prefill

    def __cinit__(
        self, list blocks not None, final_norm, embedding not None, cnp.ndarray positions, output,
        PageTables pages not None, PageTables memory, int64_t max_tokens, prefill, int n_threads,
    ):
        cdef Stack stack = Stack(blocks, final_norm)
        cdef Decoding *d = <Decoding *> fs_lines_new(sizeof(Decoding))
        if d == NULL:
            raise MemoryError("a decoder")
        memset(d, 0, sizeof(Decoding))
        self.d = d
        self.kept = [stack, embedding, positions, output]
        self.prefill = prefill
        stack.start(&d.task)
        d.kind = pages.kind
        d.task.kernels = pages.kind.kernels
        d.task.kind = &d.kind
        d.task.width = embedding.shape[1]
        d.task.causal = True
        d.task.output = weights_of(output)
        d.n_threads = n_threads
        d.max_tokens = max_tokens
        d.embedding = row_table(embedding)
        d.positions = NULL if positions is None else cnp.PyArray_BYTES(positions)
        d.rows = pages.rows
        self.tables_from(pages)
        if memory is not None:
            rows = np.arange(pages.rows)
            d.memory_tables = tables_of(memory.tables, pages.rows, <const int64_t *> cnp.PyArray_DATA(rows))
            if d.memory_tables == NULL:
                raise MemoryError("the pages of a memory")
        self.decoder.self = d
        self.decoder.vocab = d.task.output.units
        self.decoder.item_size = d.kind.kernels.item_size
        self.decoder.step = decoder_step
        self.decoder.choose = decoder_choose

    def __dealloc__(self):
        if self.d == NULL:
            return
        plan_free(&self.d.plan)
        free(self.d.room)
        clear_tables(self.d.tables, self.d.rows)
        clear_tables(self.d.memory_tables, self.d.rows)
        free(self.d)

    cdef int tables_from(self, PageTables pages) except -1:
        cdef cnp.ndarray rows = np.arange(pages.rows)
        cdef fs_table *tables = tables_of(pages.tables, pages.rows, <const int64_t *> cnp.PyArray_DATA(rows))
        if tables == NULL:
            raise MemoryError("the pages of some rows")
        clear_tables(self.d.tables, self.d.rows)
        self.d.tables = tables
        return 0

    def capsule(self):
        """A capsule of the struct of decoder.h, which points into this object: keep it while the capsule is used."""
        return PyCapsule_New(&self.decoder, "fastseq.decoder", NULL)

    def renew(self, list symbols not None):
        """Compute the pages of full rows anew, from their last tokens.

        Parameters
        ----------
        symbols : list of arrays
            All symbols of all rows.
        """
        cdef PageTables fresh
        cdef fs_table table
        cdef Py_ssize_t i
        full = [i for i in range(self.d.rows) if self.d.tables[i].length >= self.d.max_tokens]
        fresh = self.prefill([symbols[i] for i in full])
        for i, row in enumerate(full):
            memset(&table, 0, sizeof(table))
            share(&table, &fresh.tables[i], fresh.tables[i].length)
            fs_table_clear(&self.d.tables[<Py_ssize_t> row])
            self.d.tables[<Py_ssize_t> row] = table
