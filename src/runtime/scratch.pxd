# Scratch memory of one call: arrays one after another in one block, each on cache lines of its own.
#
# The arrays are laid out twice, by one function: first without a block, which counts the bytes, then in it:
#
#     memset(&scratch, 0, sizeof(scratch))
#     lay_out(&job, &scratch)
#     scratch_open(&scratch)  # raises MemoryError
#     lay_out(&job, &scratch)
#     ...
#     scratch_close(&scratch)

from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc

cdef enum:
    CACHE_LINE = 64  # bytes: two threads whose arrays met in one would slow each other down

cdef struct Scratch:
    char *block  # as it was allocated
    char *base   # its first cache line; NULL while bytes are counted
    Py_ssize_t n_bytes


cdef inline Py_ssize_t lines(Py_ssize_t n_bytes) noexcept nogil:
    """That many bytes, rounded up to whole cache lines."""
    return (n_bytes + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


cdef inline char *scratch_array(Scratch *scratch, Py_ssize_t n_bytes) noexcept nogil:
    """The next array, uninitialised."""
    cdef char *array = <char *> (<size_t> scratch.base + <size_t> scratch.n_bytes)
    scratch.n_bytes += lines(n_bytes)
    return array


cdef inline int scratch_allocate(Scratch *scratch) noexcept nogil:
    """Allocate what was counted, and begin with the first array again; -1 without memory."""
    scratch.block = <char *> PyMem_RawMalloc(scratch.n_bytes + CACHE_LINE)
    if scratch.block == NULL:
        return -1
    scratch.base = scratch.block + (-<Py_ssize_t> scratch.block & (CACHE_LINE - 1))
    scratch.n_bytes = 0
    return 0


cdef inline int scratch_open(Scratch *scratch) except -1:
    """`scratch_allocate`, or a MemoryError."""
    if scratch_allocate(scratch):
        raise MemoryError(f"{scratch.n_bytes} bytes of scratch")
    return 0


cdef inline void scratch_close(Scratch *scratch) noexcept nogil:
    """Free the block, if there is one."""
    PyMem_RawFree(scratch.block)
