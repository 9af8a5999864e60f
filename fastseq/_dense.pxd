# Declarations for the other compiled modules: products with packed weights, and their gradients. See
# src/dense/_dense.pyx.

from runtime.kernels cimport fs_kernels
from fastseq._packing cimport PackedWeight

# Pointers to the rows [first, first + n) of both factors of a weight gradient. Rows of x that do not lie in one piece
# are copied into `room`, which has space for n of them.
ctypedef void (*gradient_rows)(
    const void *source, Py_ssize_t first, Py_ssize_t n, const void **dy, const void **x, char *room,
) noexcept nogil


cdef int multiply_rows(
    PackedWeight packed, Py_ssize_t rows, const char *x, Py_ssize_t x_row, char *y, Py_ssize_t y_row, int n_threads,
) except -1
cdef int add_products(
    const fs_kernels *kernels, gradient_rows rows_of, const void *source, Py_ssize_t total, Py_ssize_t room_row,
    Py_ssize_t units, Py_ssize_t k, char *dweight, char *dbias, int n_threads,
) except -1
