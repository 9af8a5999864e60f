# What simd/leaves.h declares; the comments are there.

cdef extern from "simd/leaves.h" nogil:
    ctypedef enum fs_finish "enum fs_finish":
        FS_IDENTITY
        FS_TANH
        FS_RELU
        FS_SIGMOID
        FS_BLEND

    enum:
        FS_CHAINS

    ctypedef struct fs_weights:
        ptrdiff_t units
        ptrdiff_t panels
        ptrdiff_t x_size
        ptrdiff_t h_size
        const void *x
        const void *h
        const void *bias
        const void *h_bias

    ctypedef struct fs_step:
        const fs_weights *weights
        ptrdiff_t first
        ptrdiff_t last
        ptrdiff_t rows
        int with_x
        fs_finish finish
        const void **init
        const void **x
        const void **h
        const void **carry
        void **c
        void **z
        void **out

    ctypedef struct fs_update:
        const void *p
        const void *g
        void *first
        void *second
        void *out
        double rate
        double decay
        double keep
        double momentum
        double take_first
        double keep_second
        double take_second
        double unbias
        double eps
        int nesterov

    ctypedef struct fs_leaves:
        const char *set
        int lanes
        int item_size
        int tile_rows[5]
        void (*exp)(ptrdiff_t n, const void *x, void *y) noexcept nogil
        void (*tanh)(ptrdiff_t n, const void *x, void *y) noexcept nogil
        void (*sigmoid)(ptrdiff_t n, const void *x, void *y) noexcept nogil
        double (*multiply_adds)(ptrdiff_t rounds) noexcept nogil
        double (*read_memory)(ptrdiff_t rounds, ptrdiff_t n, const void *data) noexcept nogil
        void (*pack)(
            const void *weight, const ptrdiff_t *gate_rows, int gates, int blocks,
            ptrdiff_t units, ptrdiff_t k, void *panels,
        ) noexcept nogil
        void (*panels_product)(const fs_step *step, int vectors) noexcept nogil
        void (*plain)(const fs_step *step) noexcept nogil
        void (*lstm)(const fs_step *step) noexcept nogil
        void (*gru)(const fs_step *step) noexcept nogil
        void (*gru_gates)(const fs_step *step) noexcept nogil
        void (*sgd)(const fs_update *update, ptrdiff_t first, ptrdiff_t last) noexcept nogil
        void (*rmsprop)(const fs_update *update, ptrdiff_t first, ptrdiff_t last) noexcept nogil
        void (*adam)(const fs_update *update, ptrdiff_t first, ptrdiff_t last) noexcept nogil
        void (*scale)(ptrdiff_t n, void *x, double factor) noexcept nogil
        double (*sum_of_squares)(ptrdiff_t n, const void *x) noexcept nogil

    const fs_leaves *fs_find_leaves(const char *set, int item_size)
