"""Whole stacks of Transformer blocks, compiled, for inference; `fastseq.reference._transformer` has the same.

Arguments were checked at the door. How a run is laid out and shared among threads is in stack.pxd, how keys and values
are kept in pages.h; here is what Python calls: whole runs, runs that go on from what was kept, and the decoder that
the loop of _decoding.pyx steps without Python.
"""

cimport cython
cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from decoding.decoder cimport FS_AGAIN, FS_DONE, FS_FULL, FS_NO_MEMORY, fs_decoder
from runtime.kernels cimport FS_GELU, FS_GELU_TANH, FS_PAGE, FS_RELU, fs_kernels, fs_page, fs_weights
from transformer.kv_tables cimport (
    fs_lines_new, fs_page_kind, fs_page_layer, fs_table, fs_table_clear, fs_table_extend, fs_table_first,
    fs_table_reserve, fs_table_roll, fs_table_share,
)
from transformer.schedule cimport Cursor, Layer, Mask, Norm, Plan, Task, plan_free, plan_make, run_some_steps

import numpy as np

from fastseq import _simd

cnp.import_array()

cdef dict ACTIVATIONS = {"relu": FS_RELU, "gelu": FS_GELU, "gelu_tanh": FS_GELU_TANH}


cdef const fs_kernels *kernels_of(Py_ssize_t item) except NULL:
    return <const fs_kernels *> PyCapsule_GetPointer(_simd.kernels[item], "fastseq.kernels")


cdef const fs_weights *weights_of(packed) except NULL:
    """The panels of a `Packed`, good as long as it is."""
    return <const fs_weights *> PyCapsule_GetPointer(packed.panels(), "fastseq.weights")


cdef Norm norm_of(bint rms, double eps, cnp.ndarray weight, cnp.ndarray bias) noexcept:
    cdef Norm norm
    norm.rms = rms
    norm.eps = eps
    norm.weight = NULL if weight is None else cnp.PyArray_BYTES(weight)
    norm.bias = NULL if bias is None else cnp.PyArray_BYTES(bias)
    return norm


cdef class Block:
    """One block: its settings, and the weights that others packed and it keeps. Immutable."""

    cdef list kept
    cdef Layer layer

    cdef const fs_weights *weights(self, packed) except NULL:
        self.kept.append(packed)
        return weights_of(packed)


def block_pack(settings, parts):
    """A block as `run_blocks` wants it; see `fastseq.reference._transformer.block_pack`."""
    cdef Block block = Block()
    cdef Layer *layer = &block.layer
    cdef cnp.ndarray cos, sin
    cdef int i
    block.kept = []
    layer.heads = settings["heads"]
    layer.kv_heads = settings["kv_heads"]
    layer.head_dim = settings["head_dim"]
    layer.activation = ACTIVATIONS[settings["activation"]]
    layer.norm_first = settings["norm_first"]
    layer.cross = settings["cross"]
    layer.window = settings["window"] or 0
    if settings["rotary"] is not None:
        cos, sin, layer.interleaved = settings["rotary"]
        block.kept += [cos, sin]
        layer.cos = cnp.PyArray_BYTES(cos)
        layer.sin = cnp.PyArray_BYTES(sin)
        layer.rotary_dim = 2 * cnp.PyArray_DIM(cos, 1)
    layer.in_proj = block.weights(parts["in_proj"])
    layer.out_proj = block.weights(parts["out_proj"])
    layer.linear1 = block.weights(parts["linear1"])
    layer.linear2 = block.weights(parts["linear2"])
    if layer.cross:
        layer.cross_q = block.weights(parts["cross_q"])
        layer.cross_kv = block.weights(parts["cross_kv"])
        layer.cross_out = block.weights(parts["cross_out"])
    for i in range(3 if layer.cross else 2):
        weight, bias = parts[f"norm{i + 1}"]
        block.kept += [weight, bias]
        layer.norms[i] = norm_of(settings["norm"] == "rms", settings["eps"], weight, bias)
    return block


@cython.internal
cdef class Stack:
    """Some blocks and the norm after the last, as a run wants them."""

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


cdef cnp.ndarray usable(mask, Py_ssize_t max_keys):
    """A mask whose last axis is contiguous and holds every key."""
    if mask is None or not mask.size:
        return None
    if mask.shape[3] != max_keys:
        mask = np.broadcast_to(mask, (*mask.shape[:3], max_keys))
    return mask if max_keys <= 1 or mask.strides[3] == mask.itemsize else np.ascontiguousarray(mask)


cdef Mask mask_of(cnp.ndarray mask) noexcept:
    cdef Mask result
    cdef int axis
    memset(&result, 0, sizeof(result))
    if mask is not None:
        result.data = cnp.PyArray_DATA(mask)
        result.is_bool = cnp.PyArray_TYPE(mask) == cnp.NPY_BOOL
        for axis in range(3):
            result.strides[axis] = 0 if cnp.PyArray_DIM(mask, axis) == 1 else cnp.PyArray_STRIDE(mask, axis)
    return result


cdef int run(const Task *task, bint of_memory, int n_threads) except -1:
    """The whole of a task."""
    cdef Plan plan
    if plan_make(&plan, task, of_memory, n_threads):
        raise MemoryError("scratch for the blocks")
    try:
        walk_all(&plan)
    finally:
        plan_free(&plan)
    return 0


cdef int walk_all(Plan *plan) except -1:
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
    """One block after another; see `fastseq.reference._transformer.run_blocks`."""
    cdef Stack stack = Stack(blocks, final_norm)
    cdef cnp.ndarray y = np.array(x, order="C"), own_mask, cross_mask, pointers
    cdef Py_ssize_t batch = len(starts) - 1, longest = np.diff(starts).max(initial=0), longest_memory = 0
    cdef Py_ssize_t heads = stack.layers[0].heads
    cdef Task task
    if memory is not None:
        longest_memory = np.diff(memory_starts).max(initial=0)
    weights = None
    if want_weights:
        weights = [np.zeros((batch, heads, longest, longest), y.dtype) for _ in blocks]
        if stack.layers[0].cross:
            weights = [(own, np.zeros((batch, heads, longest, longest_memory), y.dtype)) for own in weights]
    if not len(y):
        return y, weights
    own_mask, cross_mask = usable(mask, longest), usable(memory_mask, longest_memory)
    stack.start(&task)
    task.kernels = kernels_of(y.itemsize)
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
        pairs = weights if stack.layers[0].cross else [(own, own) for own in weights]
        pointers = np.array([[own.ctypes.data, cross.ctypes.data] for own, cross in pairs], np.uintp)
        task.weights = <char **> cnp.PyArray_DATA(pointers)
    run(&task, False, n_threads)
    return y, weights


cdef class Pages:
    """Keys and values of a batch of sequences; see `fastseq.reference._transformer.Pages`.

    Immutable. Another one with some of the rows, or a beginning of them, shares the memory.
    """

    cdef fs_page_kind kind
    cdef Py_ssize_t head_dim, rows
    cdef fs_table *tables

    def __dealloc__(self):
        cdef Py_ssize_t i
        if self.tables != NULL:
            for i in range(self.rows):
                fs_table_clear(&self.tables[i])
        free(self.tables)

    @property
    def lengths(self):
        """Tokens of each row, (B,)."""
        return np.array([self.tables[i].length for i in range(self.rows)], np.int64)

    @property
    def firsts(self):
        """The first token of each row that is kept, (B,)."""
        return np.array([fs_table_first(&self.tables[i]) for i in range(self.rows)], np.int64)

    @property
    def window(self):
        """How many tokens the next one looks back on, itself among them; 0: all."""
        return self.kind.window

    @property
    def form(self):
        """What is the same for all rows: layers, key-value heads, elements of a head, and the dtype."""
        dtype = np.dtype(f"f{self.kind.kernels.item_size}")
        return self.kind.layers, self.kind.kv_heads, self.head_dim, dtype

    def take(self, rows, lengths=None):
        """Some rows, in any order and as often as they are named; up to `lengths` of their tokens."""
        cdef Pages result = pages_like(self, len(rows))
        cdef Py_ssize_t i
        cdef const fs_table *table
        for i, row in enumerate(rows):
            table = &self.tables[<Py_ssize_t> row]
            share(&result.tables[i], table, table.length if lengths is None else lengths[i])
        return result

    @staticmethod
    def join(list many):
        """The rows of some, one after another."""
        cdef Pages result = pages_like(many[0], sum([(<Pages> one).rows for one in many])), one
        cdef Py_ssize_t i = 0, row
        for one in many:
            for row in range(one.rows):
                share(&result.tables[i], &one.tables[row], one.tables[row].length)
                i += 1
        return result

    def arrays(self):
        """First token kept (B,), and keys and values (B, layers, kv_heads, T, D) from it on, zeros past the last."""
        cdef Py_ssize_t i, layer, head, token, n, before
        cdef const fs_table *table
        cdef cnp.ndarray k, v
        lengths = self.lengths
        firsts = self.firsts
        shape = self.rows, self.kind.layers, self.kind.kv_heads, (lengths - firsts).max(initial=0), self.head_dim
        keys, values = (np.zeros(shape, f"f{self.kind.kernels.item_size}") for _ in range(2))
        for i in range(self.rows):
            table = &self.tables[i]
            for layer in range(self.kind.layers):
                for head in range(self.kind.kv_heads):
                    before = layer * fs_page_layer(&self.kind) + head * 2 * FS_PAGE * self.kind.width
                    for token in range(firsts[i], table.length, FS_PAGE):
                        n = min(FS_PAGE, table.length - token)
                        at = slice(token - firsts[i], token - firsts[i] + n)
                        k, v = keys[i, layer, head, at], values[i, layer, head, at]
                        self.kind.kernels.page_load(
                            self.kind.width, table.pages[token // FS_PAGE], before, 0, n, self.head_dim,
                            cnp.PyArray_DATA(k), cnp.PyArray_DATA(v),
                        )
        return firsts, keys, values

    @staticmethod
    def of(int64_t window, lengths, firsts, cnp.ndarray keys, cnp.ndarray values):
        """The opposite of `arrays`."""
        cdef Py_ssize_t layers = keys.shape[1], kv_heads = keys.shape[2], head_dim = keys.shape[4]
        cdef Pages result = pages_new(keys.itemsize, layers, kv_heads, head_dim, window, len(lengths))
        cdef Py_ssize_t i, layer, token, before, width = result.kind.width
        cdef fs_table *table
        cdef cnp.ndarray k, v
        room = keys.shape[0], layers, kv_heads, keys.shape[3], width
        spread_keys, spread_values = np.zeros(room, keys.dtype), np.zeros(room, keys.dtype)
        spread_keys[..., :head_dim], spread_values[..., :head_dim] = keys, values
        for i in range(len(lengths)):
            table = &result.tables[i]
            # Pages that are gone are never made; in the first that is there, what is not kept is 0.
            before = firsts[i] // FS_PAGE
            if fs_table_reserve(table, before):
                raise MemoryError(f"the table of a row of {lengths[i]} tokens")
            if before:
                memset(table.pages, 0, before * sizeof(fs_page *))
            table.count = before
            table.length = before * FS_PAGE
            extend(table, &result.kind, lengths[i] - table.length)
            for layer in range(layers):
                for token in range(before * FS_PAGE, lengths[i]):
                    if token < firsts[i]:
                        k = v = np.zeros((kv_heads, width), keys.dtype)
                    else:
                        k = np.ascontiguousarray(spread_keys[i, layer, :, token - firsts[i]])
                        v = np.ascontiguousarray(spread_values[i, layer, :, token - firsts[i]])
                    result.kind.kernels.page_store(
                        kv_heads, width, width, cnp.PyArray_DATA(k), cnp.PyArray_DATA(v),
                        table.pages[token // FS_PAGE], layer * fs_page_layer(&result.kind), token % FS_PAGE,
                    )
        return result


cdef Pages pages_new(
    Py_ssize_t item, Py_ssize_t layers, Py_ssize_t kv_heads, Py_ssize_t head_dim, int64_t window, Py_ssize_t rows,
):
    """Rows without tokens."""
    cdef Pages pages = Pages()
    cdef Py_ssize_t lanes
    pages.kind.kernels = kernels_of(item)
    lanes = pages.kind.kernels.lanes
    pages.kind.layers = layers
    pages.kind.kv_heads = kv_heads
    pages.kind.width = (head_dim + lanes - 1) // lanes * lanes
    pages.kind.window = window
    pages.head_dim = head_dim
    pages.tables = <fs_table *> calloc(max(1, rows), sizeof(fs_table))
    if pages.tables == NULL:
        raise MemoryError(f"the tables of {rows} rows")
    pages.rows = rows
    return pages


cdef Pages pages_like(Pages other, Py_ssize_t rows):
    return pages_new(
        other.kind.kernels.item_size, other.kind.layers, other.kind.kv_heads, other.head_dim, other.kind.window, rows,
    )


cdef int share(fs_table *table, const fs_table *other, int64_t length) except -1:
    if fs_table_share(table, other, length):
        raise MemoryError("the pages of a row")
    return 0


cdef int extend(fs_table *table, const fs_page_kind *kind, int64_t more) except -1:
    if fs_table_extend(table, kind, more):
        raise MemoryError(f"keys and values of {more} tokens")
    return 0


def no_pages(list blocks not None, dtype, Py_ssize_t rows):
    """Where sequences start: see `fastseq.reference._transformer.no_pages`."""
    cdef Layer *layer = &(<Block> blocks[0]).layer
    return pages_new(dtype.itemsize, len(blocks), layer.kv_heads, layer.head_dim, layer.window, rows)


@cython.internal
cdef class Room:
    """What the kernels want to know of pages that a run reads, and writes to."""

    cdef list kept
    cdef fs_page ***pages
    cdef const int64_t *lengths
    cdef Py_ssize_t longest

    def __cinit__(self, Pages pages):
        cdef Py_ssize_t i
        cdef cnp.ndarray lengths = pages.lengths
        self.pages = <fs_page ***> malloc(max(1, pages.rows) * sizeof(fs_page **))
        if self.pages == NULL:
            raise MemoryError(f"{pages.rows} rows")
        for i in range(pages.rows):
            self.pages[i] = pages.tables[i].pages
        self.kept = [pages, lengths]
        self.lengths = <const int64_t *> cnp.PyArray_DATA(lengths)
        self.longest = lengths.max(initial=0)

    def __dealloc__(self):
        free(self.pages)


def memory_pages(list blocks not None, cnp.ndarray memory not None, cnp.ndarray starts not None, int n_threads):
    """Keys and values of a memory; see `fastseq.reference._transformer.memory_pages`."""
    cdef Stack stack = Stack(blocks, None)
    cdef Layer *layer = stack.layers[0]
    cdef Pages pages = pages_new(
        memory.itemsize, stack.n_layers, layer.kv_heads, layer.head_dim, 0, len(starts) - 1,
    )
    cdef cnp.ndarray rows = np.ascontiguousarray(memory), whose, positions
    cdef Py_ssize_t i
    cdef Room room
    cdef Task task
    counts = np.diff(starts)
    whose = np.repeat(np.arange(pages.rows), counts)
    positions = np.arange(len(rows)) - np.repeat(starts[:-1], counts)
    for i in range(pages.rows):
        extend(&pages.tables[i], &pages.kind, counts[i])
    if not len(rows):
        return pages
    room = Room(pages)
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
    list blocks not None, cnp.ndarray x not None, cnp.ndarray starts not None, Pages pages not None,
    Pages memory, final_norm, int n_threads,
):
    """Go on from what was kept; see `fastseq.reference._transformer.run_cached`."""
    cdef Stack stack = Stack(blocks, final_norm)
    cdef Pages after = pages.take(range(pages.rows))
    cdef cnp.ndarray y = np.array(x, order="C"), whose, positions
    cdef Py_ssize_t i
    cdef Room room, memory_room
    cdef Task task
    counts = np.diff(starts)
    whose = np.repeat(np.arange(pages.rows), counts)
    positions = np.arange(len(y)) + np.repeat(pages.lengths - starts[:-1], counts)
    if not len(y):
        return y, after
    for i in range(pages.rows):
        extend(&after.tables[i], &after.kind, counts[i])
    room = Room(after)
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
        memory_room = Room(memory)
        task.memory_pages = memory_room.pages
        task.memory_lengths = memory_room.lengths
        task.longest_memory = memory_room.longest
    run(&task, False, n_threads)
    for i in range(after.rows):
        fs_table_roll(&after.tables[i], &after.kind)
    return y, after


# What a decoder is, below the GIL.
cdef struct Decoding:
    Task task                  # over a token of each row
    Plan plan                  # for so many rows
    Cursor cursor              # how far a step of it is
    int n_threads
    fs_page_kind kind
    Py_ssize_t rows
    fs_table *tables
    fs_table *memory_tables    # NULL: no memory
    int64_t max_tokens               # tokens of a row
    const char *embedding      # [ids][width]
    const char *positions      # [max_tokens][width], or NULL
    # [rows], but for starts
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


cdef void clear_tables(fs_table *tables, Py_ssize_t rows) noexcept nogil:
    cdef Py_ssize_t i
    if tables != NULL:
        for i in range(rows):
            fs_table_clear(&tables[i])
    free(tables)


cdef fs_table *tables_of(const fs_table *tables, Py_ssize_t rows, const int64_t *parents) noexcept nogil:
    """Tables that share with those of the parents; NULL without memory."""
    cdef fs_table *result = <fs_table *> calloc(rows, sizeof(fs_table))
    cdef const fs_table *parent
    cdef Py_ssize_t i
    if result == NULL:
        return NULL
    for i in range(rows):
        parent = &tables[parents[i]]
        if fs_table_share(&result[i], parent, parent.length):
            clear_tables(result, rows)
            return NULL
    return result


cdef void enter(Decoding *d, Py_ssize_t row, int64_t symbol) noexcept nogil:
    """The vector of a symbol at its place, as the row of the stream."""
    cdef Py_ssize_t width = d.task.width, i
    cdef Py_ssize_t n_bytes = width * d.kind.kernels.item_size
    cdef char *x = d.task.stream + row * n_bytes
    cdef const char *position
    memcpy(x, d.embedding + symbol * n_bytes, n_bytes)
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
    """The first rows give up the place of a token that did not come."""
    cdef Py_ssize_t i
    for i in range(rows):
        d.tables[i].length -= 1


cdef int decoder_step(void *self, ptrdiff_t rows, const int64_t *symbols, void *logits) noexcept nogil:
    cdef Decoding *d = <Decoding *> self
    cdef Py_ssize_t i
    if d.plan.room == NULL and make_room(d):
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
    d.plan.steps[d.plan.n_steps - 1].y.data = <char *> logits
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
    if d.memory_tables != NULL and d.plan.room != NULL:
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
    embedding : array of shape (ids, width)
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
        self, list blocks not None, final_norm, cnp.ndarray embedding not None, cnp.ndarray positions, output,
        Pages pages not None, Pages memory, int64_t max_tokens, prefill, int n_threads,
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
        d.embedding = cnp.PyArray_BYTES(embedding)
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

    cdef int tables_from(self, Pages pages) except -1:
        cdef cnp.ndarray rows = np.arange(pages.rows)
        cdef fs_table *tables = tables_of(pages.tables, pages.rows, <const int64_t *> cnp.PyArray_DATA(rows))
        if tables == NULL:
            raise MemoryError("the pages of some rows")
        clear_tables(self.d.tables, self.d.rows)
        self.d.tables = tables
        return 0

    def capsule(self):
        """The struct of decoder.h, good as long as this is."""
        return PyCapsule_New(&self.decoder, "fastseq.decoder", NULL)

    def renew(self, list symbols not None):
        """Begin the rows anew that hold as many tokens as they may.

        Parameters
        ----------
        symbols : list of arrays
            All symbols of all rows.
        """
        cdef Pages fresh
        cdef fs_table table
        cdef Py_ssize_t i
        full = [i for i in range(self.d.rows) if self.d.tables[i].length >= self.d.max_tokens]
        fresh = self.prefill([symbols[i] for i in full])
        for i, row in enumerate(full):
            memset(&table, 0, sizeof(table))
            share(&table, &fresh.tables[i], fresh.tables[i].length)
            fs_table_clear(&self.d.tables[<Py_ssize_t> row])
            self.d.tables[<Py_ssize_t> row] = table
