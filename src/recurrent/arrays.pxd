# Arrays of sequences (B, T, width) and states (B, slots, H).

cimport numpy as cnp


cdef inline cnp.ndarray state_copy(cnp.ndarray state):
    """A contiguous copy; of None, None."""
    return None if state is None else cnp.PyArray_NewCopy(state, cnp.NPY_CORDER)


cdef inline char *slot_of(cnp.ndarray state, Py_ssize_t slot) noexcept:
    """State array (B, slots, H): the first row of one slot."""
    return cnp.PyArray_BYTES(state) + slot * cnp.PyArray_STRIDE(state, 1)


cdef inline cnp.ndarray sequence(cnp.ndarray x, Py_ssize_t width, int dtype, bint padded):
    """An array (B, T, width) for something of every step of x; what is padding holds zeros, the rest anything."""
    cdef cnp.npy_intp[3] shape
    shape[0], shape[1], shape[2] = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1), width
    if padded:
        return cnp.PyArray_ZEROS(3, shape, dtype, 0)
    return cnp.PyArray_EMPTY(3, shape, dtype, 0)


cdef inline Py_ssize_t padded_bytes(Py_ssize_t n_bytes) noexcept nogil:
    """Whole cache lines; and rows that lie a page apart would all meet in the same few lines of a cache."""
    cdef Py_ssize_t lines = (n_bytes + 63) // 64 * 64
    return lines + 64 if lines % 4096 == 0 else lines
