# Declarations for the other compiled modules: gradients of weight matrices. See src/dense/_weight_gradient.pyx.

from runtime.kernels cimport fs_kernels
from runtime.scratch cimport Scratch
from runtime.team cimport fs_barrier

cdef enum:
    GRADIENT_ROWS = 384           # rows of a block: a panel of so many stays in a core's second cache
    GROUPS_BYTES = 384 * 1024     # of the groups that stay there while they are multiplied with every panel
    MAX_FACTORS = 3
    MAX_PRODUCTS = 4


# A factor: some columns of rows anywhere, and where a block of them is packed.
cdef struct Factor:
    const void **rows
    Py_ssize_t first      # columns [first, first + columns) of each row
    Py_ssize_t columns
    char *packed


# What a product is added to: a weight gradient, contiguous.
cdef struct Product:
    const Factor *a
    const Factor *b
    char *target
    char *sum             # so far; whole groups of rows, whole panels of columns
    Py_ssize_t sum_columns


cdef struct WeightGradient:
    int n_a
    Factor[MAX_FACTORS] a
    int n_b
    Factor[MAX_FACTORS] b
    int n_products
    Product[MAX_PRODUCTS] products


cdef void set_factor(Factor *factor, const void **rows, Py_ssize_t first, Py_ssize_t columns) noexcept nogil
cdef void set_product(Product *product, const Factor *a, const Factor *b, char *target) noexcept nogil
cdef void lay_out_sums(
    WeightGradient *job, const fs_kernels *kernels, Scratch *scratch,
) noexcept nogil
cdef void lay_out_factors(
    WeightGradient *job, const fs_kernels *kernels, Py_ssize_t rows, Scratch *scratch,
) noexcept nogil
cdef void pack_share(
    const WeightGradient *job, const fs_kernels *kernels, Py_ssize_t first, Py_ssize_t n, const void **rows, int thread,
    int team,
) noexcept nogil
cdef void multiply_share(
    const Product *product, const fs_kernels *kernels, Py_ssize_t n, int thread, int team,
) noexcept nogil
cdef void sum_weight_gradients(
    const WeightGradient *job, const fs_kernels *kernels, Py_ssize_t rows, const void **pointers, int thread, int team,
    fs_barrier *barrier,
) noexcept nogil
cdef void add_row(const fs_kernels *kernels, const char *row, Py_ssize_t columns, char *target) noexcept nogil
cdef void take_sums(const WeightGradient *job, const fs_kernels *kernels) noexcept nogil
