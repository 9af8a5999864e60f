# What kernels/kernels.h declares; the comments are there.

from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from "kernels/kernels.h" nogil:
    ctypedef enum fs_epilogue "enum fs_epilogue":
        FS_IDENTITY
        FS_TANH
        FS_RELU
        FS_SIGMOID
        FS_ADD
        FS_GELU
        FS_GELU_TANH
        FS_BACK_IDENTITY

    enum:
        FS_ACCUMULATORS

    ctypedef enum fs_weight_type "enum fs_weight_type":
        FS_REAL
        FS_BFLOAT16
        FS_INT8

    ctypedef struct fs_narrow:
        const char *bfloat16
        const char *int8
        ptrdiff_t (*words)(fs_weight_type type, ptrdiff_t k) noexcept nogil
        ptrdiff_t (*row_bytes)(fs_weight_type type, ptrdiff_t k) noexcept nogil
        void (*rows)(fs_weight_type type, ptrdiff_t rows, ptrdiff_t k, const void **x, void *out) noexcept nogil
        void (*pack)(
            fs_weight_type type, const void *weight, const ptrdiff_t *gate_rows, int gates, int blocks,
            ptrdiff_t units, ptrdiff_t k, void *panels, void *offsets,
        ) noexcept nogil

    ctypedef struct fs_weights:
        ptrdiff_t units
        ptrdiff_t panels
        ptrdiff_t x_size
        ptrdiff_t h_size
        const void *x
        const void *h
        const void *bias
        const void *h_bias
        fs_weight_type type
        const fs_narrow *narrow
        const void *x_scales
        const void *h_scales
        const void *x_offsets
        const void *h_offsets

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
        ptrdiff_t dy_next
        ptrdiff_t gates_next
        ptrdiff_t h_next
        ptrdiff_t c_next

    ctypedef struct fs_step:
        const fs_weights *weights
        ptrdiff_t first
        ptrdiff_t last
        ptrdiff_t rows
        int with_x
        fs_epilogue epilogue
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
        void **state_part
        const void **vectors
        void *narrow_x
        void *narrow_h

    ptrdiff_t fs_narrow_bytes(const fs_weights *w, int of_x, ptrdiff_t rows)
    void fs_narrow_inputs(const fs_step *s)

    enum:
        FS_VECTORS

    ctypedef struct fs_cell:
        const char *name
        int gates
        int candidate_gates
        int apart_gates
        bint has_c
        bint carries
        int tape_gates
        int tape_reals
        const char *gate_names
        int blocks
        void (*main)(const fs_step *step) noexcept nogil
        fs_epilogue epilogue
        fs_epilogue candidate_epilogue
        fs_epilogue back
        fs_epilogue back_candidate
        void (*rows)(const fs_step *step, ptrdiff_t first, ptrdiff_t last) noexcept nogil
        void (*back_rows)(const fs_step *step, ptrdiff_t first, ptrdiff_t last) noexcept nogil
        int vectors[FS_VECTORS]

    ctypedef struct fs_softmax_sums:
        double others
        double target
        double offset

    ctypedef double (*fs_loss)(
        ptrdiff_t n, const void *x, const void *targets, double delta, double scale, void *gradient,
    ) noexcept nogil

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

    ctypedef struct fs_heads:
        void *data
        ptrdiff_t batch
        ptrdiff_t row
        ptrdiff_t head

    enum:
        FS_PAGE

    ctypedef struct fs_page:
        pass

    ctypedef struct fs_attention:
        ptrdiff_t batch
        ptrdiff_t heads
        ptrdiff_t kv_heads
        ptrdiff_t width
        ptrdiff_t value_width
        ptrdiff_t max_queries
        ptrdiff_t max_keys
        fs_heads q
        fs_heads k
        fs_heads v
        fs_heads out
        fs_heads dout
        fs_heads dq
        fs_heads dk
        fs_heads dv
        void *stats
        void *weights
        const int64_t *q_starts
        const int64_t *k_starts
        const int64_t *lengths
        fs_page ***pages
        ptrdiff_t page_layer
        const void *mask
        int mask_is_bool
        ptrdiff_t mask_strides[3]
        int causal
        ptrdiff_t window
        double scale
        uint64_t seed
        uint32_t threshold
        double factor
        ptrdiff_t parts
        ptrdiff_t part
        int phase

    ctypedef struct fs_kernels:
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
        void (*weight_gradient)(
            ptrdiff_t n, ptrdiff_t groups, const void *a, const void *panel, int vectors, void *c, ptrdiff_t c_row,
        ) noexcept nogil
        void (*sum_rows)(const void **rows, ptrdiff_t n, ptrdiff_t first, ptrdiff_t last, void *sum) noexcept nogil
        void (*panels_product)(const fs_step *step, int vectors) noexcept nogil
        void (*plain)(const fs_step *step) noexcept nogil
        const fs_cell **cells
        void (*layer_norm)(
            ptrdiff_t rows, ptrdiff_t n, double eps, const void *x, const void *weight, const void *bias, void *y,
            void *means, void *scales,
        ) noexcept nogil
        void (*layer_norm_dx)(
            ptrdiff_t rows, ptrdiff_t n, const void *x, const void *weight, const void *means, const void *scales,
            const void *dy, void *dx,
        ) noexcept nogil
        void (*layer_norm_sums)(
            ptrdiff_t rows, ptrdiff_t n, ptrdiff_t first, ptrdiff_t last, const void *x, const void *means,
            const void *scales, const void *dy, void *dweight, void *dbias,
        ) noexcept nogil
        void (*rms_norm)(
            ptrdiff_t rows, ptrdiff_t n, double eps, const void *x, const void *weight, void *y, void *scales,
        ) noexcept nogil
        void (*rms_norm_dx)(
            ptrdiff_t rows, ptrdiff_t n, const void *x, const void *weight, const void *scales, const void *dy,
            void *dx,
        ) noexcept nogil
        void (*rms_norm_sums)(
            ptrdiff_t rows, ptrdiff_t n, ptrdiff_t first, ptrdiff_t last, const void *x, const void *scales,
            const void *dy, void *dweight,
        ) noexcept nogil
        void (*softmax)(ptrdiff_t rows, ptrdiff_t n, const void *x, void *y) noexcept nogil
        void (*softmax_dx)(ptrdiff_t rows, ptrdiff_t n, const void *y, const void *dy, void *dx) noexcept nogil
        void (*rotary)(
            ptrdiff_t heads, ptrdiff_t head, ptrdiff_t width, ptrdiff_t rotary_dim, int interleaved, int inverse,
            const void *x, const void *cos, const void *sin, void *y,
        ) noexcept nogil
        void (*activate)(fs_epilogue f, ptrdiff_t n, const void *x, void *y) noexcept nogil
        void (*activate_dx)(fs_epilogue f, ptrdiff_t n, const void *x, const void *dy, void *dx) noexcept nogil
        ptrdiff_t (*attend_scratch)(const fs_attention *job) noexcept nogil
        void (*attend)(const fs_attention *job, ptrdiff_t item, void *scratch) noexcept nogil
        void (*attend_decode)(
            const fs_attention *job, ptrdiff_t b, ptrdiff_t first, ptrdiff_t last, void *scratch,
        ) noexcept nogil
        void (*page_store)(
            ptrdiff_t kv_heads, ptrdiff_t width, ptrdiff_t head, const void *k, const void *v, fs_page *page,
            ptrdiff_t layer, ptrdiff_t slot,
        ) noexcept nogil
        void (*page_load)(
            ptrdiff_t width, const fs_page *page, ptrdiff_t before, ptrdiff_t slot, ptrdiff_t tokens, ptrdiff_t n,
            void *k, void *v,
        ) noexcept nogil
        void (*page_copy)(
            ptrdiff_t heads, ptrdiff_t width, ptrdiff_t tokens, const fs_page *from_, fs_page *to,
        ) noexcept nogil
        ptrdiff_t (*attend_back_scratch)(const fs_attention *job) noexcept nogil
        void (*attend_back)(const fs_attention *job, ptrdiff_t item, void *scratch) noexcept nogil
        void (*scatter_add)(
            ptrdiff_t rows, const int64_t *ids, int64_t skip, ptrdiff_t width, ptrdiff_t first, ptrdiff_t last,
            const void *dy, void *gradient,
        ) noexcept nogil
        void (*dropout)(
            ptrdiff_t n, const void *x, void *y, uint64_t first, uint64_t seed, uint64_t stream, uint32_t threshold,
            double scale,
        ) noexcept nogil
        void (*softmax_cross_entropy)(
            ptrdiff_t rows, ptrdiff_t n, const void *x, const int64_t *targets, double smoothing, double scale,
            void *gradient, fs_softmax_sums *sums,
        ) noexcept nogil
        fs_loss binary_cross_entropy
        fs_loss squared_error
        fs_loss huber
        void (*sgd)(const fs_update *update, ptrdiff_t first, ptrdiff_t last) noexcept nogil
        void (*rmsprop)(const fs_update *update, ptrdiff_t first, ptrdiff_t last) noexcept nogil
        void (*adam)(const fs_update *update, ptrdiff_t first, ptrdiff_t last) noexcept nogil
        void (*scale)(ptrdiff_t n, void *x, double factor) noexcept nogil
        double (*sum_of_squares)(ptrdiff_t n, const void *x) noexcept nogil

    ctypedef struct fs_set:
        const char *name
        const fs_kernels *f32
        const fs_kernels *f64
        const fs_narrow *narrow

    const fs_set *fs_find_set(const char *name)
