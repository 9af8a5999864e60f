# What kv_tables.h declares; the comments are there.

from libc.stdint cimport int64_t

from runtime.kernels cimport fs_kernels, fs_page

cdef extern from "transformer/kv_tables.h" nogil:
    ctypedef struct fs_page_kind:
        const fs_kernels *kernels
        ptrdiff_t layers
        ptrdiff_t kv_heads
        ptrdiff_t width
        ptrdiff_t window

    ctypedef struct fs_table:
        fs_page **pages
        ptrdiff_t count
        ptrdiff_t room
        int64_t length

    void *fs_lines_new(size_t n_bytes)
    ptrdiff_t fs_page_layer(const fs_page_kind *kind)
    void fs_table_clear(fs_table *table)
    int fs_table_share(fs_table *table, const fs_table *other, int64_t length)
    int fs_table_extend(fs_table *table, const fs_page_kind *kind, int64_t more)
    void fs_table_roll(fs_table *table, const fs_page_kind *kind)
    int fs_table_reserve(fs_table *table, ptrdiff_t count)
    int64_t fs_table_first(const fs_table *table)
