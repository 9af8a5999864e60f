"""Pages of keys and values, compiled: what each sequence of a batch keeps between runs of a stack of blocks.

`fastseq.reference._transformer` has the same in NumPy. How sequences share pages is in kv_tables.h.
"""

cimport numpy as cnp
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from runtime.kernels cimport FS_PAGE, fs_page
from transformer.kv_tables cimport (
    fs_page_kind, fs_page_layer, fs_table, fs_table_clear, fs_table_extend, fs_table_first, fs_table_reserve,
    fs_table_share,
)
from fastseq._simd cimport kernels_for

import numpy as np


cnp.import_array()


cdef class Pages:
    """Keys and values of a batch of sequences; see `fastseq.reference._transformer.Pages`.

    Immutable. Another one with some of the rows, or a beginning of them, shares the memory.
    """

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
        """How many tokens the next one may attend to, itself among them; 0: all."""
        return self.kind.window

    @property
    def form(self):
        """What is the same for all rows: layers, key-value heads, elements of a head, and the dtype."""
        dtype = np.dtype(f"f{self.kind.kernels.item_size}")
        return self.kind.layers, self.kind.kv_heads, self.head_dim, dtype

    def take(self, rows, lengths=None):
        """Some rows, in any order and each any number of times; up to `lengths` of their tokens."""
        cdef Pages result = pages_like(self, len(rows))
        cdef Py_ssize_t i
        cdef const fs_table *table
        for i, row in enumerate(rows):
            table = &self.tables[<Py_ssize_t> row]
            share(&result.tables[i], table, table.length if lengths is None else lengths[i])
        return result

    @staticmethod
    def join(list many):
        """The rows of several, in order."""
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
            # Pages out of the window are never made; in the first that is, tokens that are not kept are 0.
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
    pages.kind.kernels = kernels_for(item)
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


cdef class PageLists:
    """The pages of each row and its tokens, in the form of the kernels; it keeps the pages."""

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
