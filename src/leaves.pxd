# What simd/leaves.h declares; the comments are there.

cdef extern from "simd/leaves.h" nogil:
    ctypedef enum fs_finish "enum fs_finish":
        FS_IDENTITY
        FS_TANH
        FS_RELU
        FS_SIGMOID
        FS_BLEND
        FS_ADD
        FS_BACK_IDENTITY
        FS_BACK_TANH
        FS_BACK_RELU
        FS_BACK_SIGMOID
        FS_BACK_LSTM
        FS_BACK_GRU_AFTER
        FS_BACK_GRU_OUTPUT
        FS_BACK_GRU_RESET

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

    ctypedef struct fs_back:
        const void **dy
        const void **gates
        const void **h
        const void **h_before
        const void **c
        const void **c_before
        const void **dc
        void **dc_before
        void **carry
        void **middle
        void **dh_total
        void **dc_total

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
        const void **c_before
        void **c
        void **gates
        const fs_back *back
        void **z
        void **out

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
        void (*pack_groups)(const void **rows, ptrdiff_t n, ptrdiff_t columns, void *groups) noexcept nogil
        void (*pack_panels)(
            const void **rows, ptrdiff_t n, ptrdiff_t columns, ptrdiff_t first, ptrdiff_t last, void *panels,
        ) noexcept nogil
        void (*outer)(
            ptrdiff_t n, ptrdiff_t groups, const void *a, const void *panel, int vectors, void *c, ptrdiff_t c_row,
        ) noexcept nogil
        void (*sum_rows)(const void **rows, ptrdiff_t n, ptrdiff_t first, ptrdiff_t last, void *sum) noexcept nogil
        void (*panels_product)(const fs_step *step, int vectors) noexcept nogil
        void (*plain)(const fs_step *step) noexcept nogil
        void (*lstm)(const fs_step *step) noexcept nogil
        void (*gru)(const fs_step *step) noexcept nogil
        void (*gru_gates)(const fs_step *step) noexcept nogil

    const fs_leaves *fs_find_leaves(const char *set, int item_size)
