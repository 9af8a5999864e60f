# A run of Transformer blocks over rows: what a block and a run are, and the plan that is made of them. See
# src/transformer/_schedule.pyx.

from libc.stdint cimport int64_t

from runtime.kernels cimport fs_attention, fs_epilogue, fs_kernels, fs_page, fs_weights
from runtime.scratch cimport Scratch
from runtime.team cimport fs_counter
from transformer.kv_tables cimport fs_page_kind
from fastseq._attention cimport Mask

cdef enum:
    MAX_SUBLAYERS = 3

cdef enum SublayerKind:
    SELF_ATTENTION
    CROSS_ATTENTION
    FEED_FORWARD

cdef enum Gate:
    NO_GATE
    PRODUCT_GATE           # activation(x W1 + b1) times x W3 + b3
    SILU_GATE              # silu(x W1 + b1) times x W3 + b3: the activation of the first product is the identity


cdef struct Norm:
    bint rms
    double eps
    const char *weight         # [width], or NULL
    const char *bias           # [width], or NULL


# x = norm(x + f(x)), or where norms stand first x = x + f(norm(x)).
cdef struct Sublayer:
    SublayerKind kind
    Norm norm
    const fs_weights *input    # queries, keys and values; queries; or linear1
    const fs_weights *memory   # CROSS_ATTENTION: keys and values
    const fs_weights *gated    # FEED_FORWARD: linear3, NULL without a gate
    const fs_weights *output   # what is added to x
    fs_epilogue activation     # FEED_FORWARD: of linear1
    Gate gate


# The description of a block that `block_pack` made: settings, and the sublayers in order.
cdef struct Layer:
    Py_ssize_t heads
    Py_ssize_t kv_heads
    Py_ssize_t head_dim
    Py_ssize_t window          # of self-attention; 0: none
    bint norm_first
    const char *cos            # [positions][rotary_dim / 2], or NULL
    const char *sin
    Py_ssize_t rotary_dim
    bint interleaved
    int n_sublayers
    Sublayer sublayers[MAX_SUBLAYERS]


# What a run is over. The rows of all sequences follow each other, sequence by sequence.
cdef struct Task:
    const fs_kernels *kernels
    Layer **layers
    Py_ssize_t n_layers
    Py_ssize_t batch
    Py_ssize_t rows
    Py_ssize_t width
    char *stream               # INOUT [rows][width]
    const int64_t *starts      # [batch + 1] first row of each sequence
    const int64_t *positions   # [rows] for rotary positions and for pages
    Py_ssize_t longest         # rows of a sequence
    bint causal
    Mask mask
    const char *memory         # [memory_rows], memory_row bytes apart; NULL: no memory, or one in pages
    Py_ssize_t memory_row
    Py_ssize_t memory_rows
    const int64_t *memory_starts
    Py_ssize_t longest_memory
    Mask memory_mask
    char **weights             # OUT of each block its own [batch][heads][longest][longest], and the memory's; or NULL
    bint has_final
    Norm final
    const fs_weights *output   # a product after the last norm, or NULL
    char *outputs              # OUT [rows][output.units]
    # Where keys and values are kept, those of the rows among them; pages NULL: nowhere.
    const fs_page_kind *kind
    fs_page ***pages           # [batch][pages]
    const int64_t *whose       # [rows] of which sequence each is
    const int64_t *lengths     # [batch] keys, those of the rows among them
    Py_ssize_t longest_kept
    fs_page ***memory_pages
    const int64_t *memory_lengths


cdef enum StepKind:
    PRODUCT    # y = f(x W^T + b), or y += x W^T + b
    NORM
    ROTARY     # queries and keys by their positions, in place
    PAD_HEADS  # heads of one width into heads of another, zeros behind them
    APPEND_KV  # keys and values into pages
    GATE       # y = x * gated, or silu(x) * gated
    ATTEND


# Rows: the first, and the bytes from one to the next. Where only a block of them has room, which each thread has for
# itself, the first row of a block is `own` bytes from where a thread's own rows begin.
cdef struct Place:
    char *data
    Py_ssize_t row
    Py_ssize_t own             # -1: all rows have room


cdef struct Step:
    StepKind kind
    Py_ssize_t rows
    Place x
    Place y
    const fs_weights *weights  # PRODUCT
    fs_epilogue epilogue
    Norm norm                  # NORM, of `width` elements
    Py_ssize_t width           # of a row, NORM and GATE; of a head, ROTARY, PAD_HEADS and APPEND_KV
    Py_ssize_t heads
    Py_ssize_t y_width         # PAD_HEADS
    Py_ssize_t rotary_dim      # ROTARY
    bint interleaved
    const char *cos
    const char *sin
    Place gated                # GATE
    Gate gate
    const int64_t *positions   # ROTARY and APPEND_KV
    const int64_t *whose       # APPEND_KV: x holds keys, and values after all keys
    fs_page ***pages
    Py_ssize_t page_layer
    fs_attention attention     # ATTEND
    double work                # multiply-adds, of all of it


cdef struct Segment:
    Py_ssize_t first           # steps [first, last)
    Py_ssize_t last
    Py_ssize_t items
    Py_ssize_t rows_each       # rows of an item, or
    Py_ssize_t panels_each     # panels of an item; 0: rows
    Py_ssize_t heads_parts     # items of a sequence for `attend_decode`, each some of its heads; 0: items of `attend`
    double work                # of an item
    bint shared_out            # each thread has its share of the items; else it takes the next one
    fs_counter counter         # the next to be taken, or the first that is shared out


# How far a run is: what comes next.
cdef struct Cursor:
    Py_ssize_t segment
    Py_ssize_t item


cdef struct Plan:
    const fs_kernels *kernels
    int item                   # bytes of a real
    int threads                # that pay
    int n_threads              # that may be used
    bint few                   # rows: panels are split
    Py_ssize_t n_steps
    Step *steps
    Py_ssize_t n_segments
    Segment *segments
    Scratch lists              # holds the rows that steps share, the steps and the segments
    char *memory               # rows that steps share; NULL while its size is being counted
    Py_ssize_t n_bytes         # of it
    Py_ssize_t own_bytes       # of a thread's own rows
    Scratch of_threads         # holds what each thread has for itself
    char *scratch              # in it, of each thread
    Py_ssize_t scratch_each
    Py_ssize_t attend_bytes    # of them, for attention; then for norms; then narrow rows; then the rows of its own
    Py_ssize_t norm_bytes
    Py_ssize_t narrow_bytes
    # What is done now: from where the counters stand through `last_item` of the last segment.
    Py_ssize_t first_segment
    Py_ssize_t last_segment
    Py_ssize_t last_item


cdef int plan_make(Plan *plan, const Task *task, bint of_memory, int n_threads) noexcept nogil
cdef void plan_free(Plan *plan) noexcept nogil
cdef void set_outputs(Plan *plan, void *outputs) noexcept nogil
cdef void run_some_steps(Plan *plan, Cursor *cursor) noexcept nogil
