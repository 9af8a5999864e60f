# Declarations for the other compiled modules: pages of keys and values. See src/transformer/_kv_pages.pyx.

from libc.stdint cimport int64_t

from runtime.kernels cimport fs_page
from transformer.kv_tables cimport fs_page_kind, fs_table


cdef class Pages:
    cdef fs_page_kind kind
    cdef Py_ssize_t head_dim   # as layers have it: fewer elements than kind.width, which is whole vectors
    cdef Py_ssize_t rows
    cdef fs_table *tables      # [rows]


cdef class PageLists:
    cdef list kept
    cdef fs_page ***pages      # [rows][pages]
    cdef const int64_t *lengths  # [rows]
    cdef Py_ssize_t longest


cdef Pages pages_new(
    Py_ssize_t item, Py_ssize_t layers, Py_ssize_t kv_heads, Py_ssize_t head_dim, int64_t window, Py_ssize_t rows,
)
cdef int share(fs_table *table, const fs_table *other, int64_t length) except -1
cdef int extend(fs_table *table, const fs_page_kind *kind, int64_t more) except -1
cdef fs_table *tables_of(const fs_table *tables, Py_ssize_t rows, const int64_t *parents) noexcept nogil
cdef void clear_tables(fs_table *tables, Py_ssize_t rows) noexcept nogil
