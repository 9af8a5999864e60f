# Declarations for the other compiled modules: products with packed weights. See src/dense/_dense.pyx.

from fastseq._packing cimport PackedWeight


cdef int multiply_rows(
    PackedWeight packed, Py_ssize_t rows, const char *x, Py_ssize_t x_row, char *y, Py_ssize_t y_row, int n_threads,
) except -1
