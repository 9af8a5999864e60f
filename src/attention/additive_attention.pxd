# Additive attention of one query: what a layer over whole sequences and the steps of a decoder have in common.

from libc.string cimport memset

from runtime.kernels cimport fs_kernels

ctypedef fused real:
    float
    double

cdef enum:
    ACCUMULATORS = 16     # partial sums of a dot product: vectors of any width add in the same order


cdef inline real dot(Py_ssize_t n, const real *a, const real *b) noexcept nogil:
    """The sum of products, in an order that no vector width changes."""
    cdef real[ACCUMULATORS] sums
    cdef Py_ssize_t i = 0, j, half = ACCUMULATORS // 2
    for j in range(ACCUMULATORS):
        sums[j] = 0
    while i + ACCUMULATORS <= n:
        for j in range(ACCUMULATORS):
            sums[j] += a[i + j] * b[i + j]
        i += ACCUMULATORS
    for j in range(n - i):
        sums[j] += a[i + j] * b[i + j]
    while half:
        for j in range(half):
            sums[j] += sums[j + half]
        half //= 2
    return sums[0]


cdef inline void add_times(Py_ssize_t n, real factor, const real *x, real *y) noexcept nogil:
    """y += factor x"""
    cdef Py_ssize_t i
    for i in range(n):
        y[i] += factor * x[i]


cdef inline void hidden(
    const fs_kernels *kernels, Py_ssize_t n, const real *query, const real *projected, real *u,
) noexcept nogil:
    """u = tanh(query + projected)"""
    cdef Py_ssize_t i
    for i in range(n):
        u[i] = query[i] + projected[i]
    kernels.tanh(n, u, u)


cdef inline void align_one(
    const fs_kernels *kernels, Py_ssize_t units, Py_ssize_t width, Py_ssize_t count, const real *query,
    const real *projected, const real *keys, const real *score, real *weights, real *context, real *scratch,
) noexcept nogil:
    """Scores, softmax and context of a query; `scratch` is room for so many units and scores."""
    cdef Py_ssize_t j
    cdef real *scores = scratch + units
    for j in range(count):
        hidden(kernels, units, query, projected + j * units, scratch)
        scores[j] = dot(units, score, <const real *> scratch)
    kernels.softmax(1, count, scores, weights)
    memset(context, 0, width * sizeof(real))
    for j in range(count):
        add_times(width, weights[j], keys + j * width, context)
