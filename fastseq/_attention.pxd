# Declarations for the other compiled modules: how masks, windows, costs and parts of attention are prepared, for calls
# over arrays as for blocks of a Transformer. See src/attention/_attention.pyx.

cimport numpy as cnp

from runtime.kernels cimport fs_attention

cdef enum:
    MAX_WINDOW = 1 << 30   # more keys than any sequence has

# A mask that broadcasts to (batch, heads, queries, keys); the keys of a query are contiguous.
cdef struct Mask:
    const void *data           # NULL: none
    bint is_bool
    Py_ssize_t strides[3]      # bytes from one sequence, head and query to the next

cdef cnp.ndarray with_all_keys(mask, Py_ssize_t max_keys)
cdef Mask mask_of(cnp.ndarray mask) noexcept
cdef void set_mask(fs_attention *job, const Mask *mask) noexcept nogil
cdef double pair_work(const fs_attention *job) noexcept nogil
cdef Py_ssize_t parts_for(const fs_attention *job, int n_threads) noexcept nogil
