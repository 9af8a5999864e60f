"""The gradient of a weight matrix: products A^T B, summed over rows, by all threads of a region.

The rows of both factors are packed a block at a time, and each thread multiplies its share of the groups of A, which
are rows of the result, with every panel of B. A sum takes row after row, so neither blocks nor threads change it.
"""

from runtime.kernels cimport fs_kernels
from runtime.scratch cimport Scratch, scratch_array
from runtime.team cimport fs_barrier
from fastseq._parallel cimport team_wait


cdef void set_factor(Factor *factor, const void **rows, Py_ssize_t first, Py_ssize_t columns) noexcept nogil:
    factor.rows = rows
    factor.first = first
    factor.columns = columns


cdef void set_product(Product *product, const Factor *a, const Factor *b, char *target) noexcept nogil:
    product.a = a
    product.b = b
    product.target = target


cdef Py_ssize_t groups_of(const fs_kernels *kernels, const Factor *a) noexcept nogil:
    return (a.columns + kernels.tile_rows[4] - 1) // kernels.tile_rows[4]


cdef Py_ssize_t panels_of(const fs_kernels *kernels, const Factor *b) noexcept nogil:
    return (b.columns + 4 * kernels.lanes - 1) // (4 * kernels.lanes)


cdef void lay_out_sums(
    WeightGradient *job, const fs_kernels *kernels, Scratch *scratch,
) noexcept nogil:
    """Give the sums their place in the scratch; they have to start as zeros."""
    cdef Product *product
    cdef int i
    for i in range(job.n_products):
        product = &job.products[i]
        product.sum_columns = panels_of(kernels, product.b) * 4 * kernels.lanes
        product.sum = scratch_array(
            scratch,
            groups_of(kernels, product.a) * kernels.tile_rows[4] * product.sum_columns * kernels.item_size,
        )


cdef void lay_out_factors(
    WeightGradient *job, const fs_kernels *kernels, Py_ssize_t rows, Scratch *scratch,
) noexcept nogil:
    """Give the packed factors of at most `rows` rows their place in the scratch."""
    cdef Py_ssize_t depth = min(rows, GRADIENT_ROWS) * kernels.item_size
    cdef int i
    for i in range(job.n_a):
        job.a[i].packed = scratch_array(scratch, groups_of(kernels, &job.a[i]) * kernels.tile_rows[4] * depth)
    for i in range(job.n_b):
        job.b[i].packed = scratch_array(scratch, panels_of(kernels, &job.b[i]) * 4 * kernels.lanes * depth)


cdef void pack_share(
    const WeightGradient *job, const fs_kernels *kernels, Py_ssize_t first, Py_ssize_t n, const void **rows, int thread,
    int team,
) noexcept nogil:
    """What one thread packs of the rows [first, first + n) of all factors."""
    cdef Py_ssize_t tile = kernels.tile_rows[4], item = kernels.item_size, group, end, columns, panels, k
    cdef const Factor *a
    cdef const Factor *b
    cdef int i
    for i in range(job.n_a):
        a = &job.a[i]
        group = groups_of(kernels, a) * thread // team
        end = groups_of(kernels, a) * (thread + 1) // team
        columns = min(a.columns, end * tile) - group * tile
        if columns > 0:
            for k in range(n):
                rows[k] = <const char *> a.rows[first + k] + (a.first + group * tile) * item
            kernels.pack_groups(rows, n, columns, a.packed + group * n * tile * item)
    for i in range(job.n_b):
        b = &job.b[i]
        panels = panels_of(kernels, b)
        kernels.pack_panels(
            b.rows + first, n, b.columns, panels * thread // team, panels * (thread + 1) // team, b.packed,
        )


cdef void multiply_share(
    const Product *product, const fs_kernels *kernels, Py_ssize_t n, int thread, int team,
) noexcept nogil:
    """What one thread adds of a product of n rows that are packed."""
    cdef Py_ssize_t tile = kernels.tile_rows[4], wide = 4 * kernels.lanes, item = kernels.item_size
    cdef Py_ssize_t group = groups_of(kernels, product.a) * thread // team
    cdef Py_ssize_t end = groups_of(kernels, product.a) * (thread + 1) // team
    cdef Py_ssize_t limit = max(1, GROUPS_BYTES // (n * tile * item))
    cdef Py_ssize_t count, panel, columns
    while group < end:
        count = min(limit, end - group)
        for panel in range(panels_of(kernels, product.b)):
            columns = min(wide, product.b.columns - panel * wide)
            kernels.weight_gradient(
                n, count, product.a.packed + group * n * tile * item, product.b.packed + panel * n * wide * item,
                <int> ((columns + kernels.lanes - 1) // kernels.lanes),
                product.sum + (group * tile * product.sum_columns + panel * wide) * item, product.sum_columns,
            )
        group += count


cdef void sum_weight_gradients(
    const WeightGradient *job, const fs_kernels *kernels, Py_ssize_t rows, const void **pointers, int thread, int team,
    fs_barrier *barrier,
) noexcept nogil:
    """What one thread of a team adds of all products; `pointers` is its own, for GRADIENT_ROWS of them."""
    cdef Py_ssize_t blocks = (rows + GRADIENT_ROWS - 1) // GRADIENT_ROWS, block, first, n
    cdef int i
    for block in range(blocks):
        first = rows * block // blocks
        n = rows * (block + 1) // blocks - first
        pack_share(job, kernels, first, n, pointers, thread, team)
        if team > 1:
            team_wait(barrier, team)
        for i in range(job.n_products):
            multiply_share(&job.products[i], kernels, n, thread, team)
        if team > 1:
            team_wait(barrier, team)


cdef void add_row(const fs_kernels *kernels, const char *row, Py_ssize_t columns, char *target) noexcept nogil:
    """target += row"""
    cdef const void *one = row
    kernels.sum_rows(&one, 1, 0, columns, target)


cdef void take_sums(const WeightGradient *job, const fs_kernels *kernels) noexcept nogil:
    """Add all sums to their targets."""
    cdef const Product *product
    cdef Py_ssize_t row
    cdef int i
    for i in range(job.n_products):
        product = &job.products[i]
        for row in range(product.a.columns):
            add_row(
                kernels, product.sum + row * product.sum_columns * kernels.item_size, product.b.columns,
                product.target + row * product.b.columns * kernels.item_size,
            )
