/*
 * The kernels: everything fastseq computes below its loops, once per instruction set and real type.
 *
 * A table of function pointers is chosen once, at import. Kernels work in the memory that they are given, start no
 * thread and know no Python. Real numbers pass as `void *`; which type they have is the table's own business, so that one
 * loop above serves every type.
 *
 * Packed weights. A weight matrix with `gates` rows for each unit is stored as panels:
 *
 *     [panel][k][vector][lane]     vector = block * gates + gate,  unit = (panel * blocks + block) * lanes + lane
 *
 * so that one panel row holds all gates of `blocks` blocks of units, and they meet in registers. There are
 * `blocks * gates` (3 or 4) vectors to a panel row. Units past the last are packed as zeros.
 *
 * Every pre-activation is one chain of multiply-adds: it starts from the bias and takes k in order, the
 * input's first, then the state's. No tile, batch, thread or chunk changes that order, so none changes a bit.
 */
#ifndef FASTSEQ_KERNELS_H
#define FASTSEQ_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* What a unit of one gate does with its pre-activation. */
enum fs_epilogue {
    FS_IDENTITY, /* h = a                                 */
    FS_TANH,     /* h = tanh(a)                           */
    FS_RELU,     /* h = max(a, 0)                         */
    FS_SIGMOID,  /* h = sigmoid(a)                        */
    FS_BLEND,    /* h = (1 - z) * tanh(a) + z * carry     */
    FS_ADD,      /* h += a                                */
    FS_GELU,     /* h = gelu(a), the erf form             */
    FS_GELU_TANH, /* h = gelu(a), the tanh form           */
    /* And where the step is one of a backward pass: see back.h. */
    FS_BACK_IDENTITY,
    FS_BACK_TANH,
    FS_BACK_RELU,
    FS_BACK_SIGMOID,
    FS_BACK_LSTM,
    FS_BACK_GRU_AFTER,
    FS_BACK_GRU_OUTPUT,
    FS_BACK_GRU_RESET
};

/* Sums of `multiply_adds`: enough to hide the latency of one behind the others. */
enum { FS_ACCUMULATORS = 12 };

/* Type of the numbers in packed panels. */
enum fs_weight_type {
    FS_REAL, /* the real type of the table                                  */
    FS_BFLOAT16, /* the upper half of a float32; for float32 rows               */
    FS_INT8, /* whole numbers from -127 to 127, times a scale of each output */
    FS_PAIRS /* within a kernel alone: int8 as it multiplies two at a time       */
};

/*
 * A product of narrow weights: n_rows narrow rows against `panels` panels (1, or of one row up to 12 / vectors), added to
 * out, [n_rows][panels][vectors][lanes] of float32.
 */
typedef struct fs_narrow_product {
    ptrdiff_t n_rows, panels, words; /* words: 32 bits of each output, see microkernel.h */
    int vectors; /* 3 or 4                                           */
    const void *rows; /* IN  narrow rows, row_bytes apart                 */
    ptrdiff_t row_bytes;
    const void *weights; /* IN  [panels][words][vectors][lanes] of words     */
    const void *scales; /* IN  int8: [panels][vectors][lanes] of float32    */
    const void *offsets; /* IN  int8: [panels][vectors][lanes] of int32      */
    void *out;
} fs_narrow_product;

/* What an instruction set does with narrow weights: src/kernels/narrow.h. */
typedef struct fs_narrow {
    const char *bfloat16, *int8; /* the instructions that each type takes, for people */
    ptrdiff_t (*words)(enum fs_weight_type type, ptrdiff_t k); /* that k numbers take */
    /* Bytes of a narrow row of k numbers; and such rows, made of rows of float32. */
    ptrdiff_t (*row_bytes)(enum fs_weight_type type, ptrdiff_t k);
    void (*rows)(enum fs_weight_type type, ptrdiff_t rows, ptrdiff_t k, const void *const *x, void *out);
    void (*product)(enum fs_weight_type type, const fs_narrow_product *product);
    /* Before products of so many rows, or of parts of them of 16 or more, and after them; NULL: there is nothing to do. */
    void (*begin)(enum fs_weight_type type, ptrdiff_t rows);
    void (*end)(enum fs_weight_type type, ptrdiff_t rows);
    /* As `pack` of fs_kernels, of uint16 or int8; offsets, of int8 alone: [panels][vectors][lanes] of int32. */
    void (*pack)(enum fs_weight_type type, const void *weight, const ptrdiff_t *gate_rows, int gates,
                 int blocks, ptrdiff_t units, ptrdiff_t k, void *panels, void *offsets);
} fs_narrow;

/* The packed weights of one product, a x + b h + bias. Read only. */
typedef struct fs_weights {
    ptrdiff_t units;    /* outputs, before padding to whole lanes                        */
    ptrdiff_t panels;   /* ceil(units / (blocks * lanes))                                */
    ptrdiff_t x_size;   /* reduction length of the input part; 0: there is none          */
    ptrdiff_t h_size;   /* reduction length of the recurrent part                        */
    const void *x;      /* [panels][x_size][blocks * gates][lanes], or NULL              */
    const void *h;      /* [panels][h_size][blocks * gates][lanes]                       */
    const void *bias;   /* [panels][blocks * gates][lanes]; where the chain starts       */
    const void *h_bias; /* [panels][lanes]: b_hn of the GRU that resets after, else NULL */
    enum fs_weight_type type; /* of x and h; biases are reals                             */
    /* Of narrow types, whose x and h are words as `narrow->pack` lays them out; else NULL. */
    const fs_narrow *narrow;
    const void *x_scales, *h_scales; /* int8: as the bias                                    */
    const void *x_offsets, *h_offsets;
} fs_weights;

/*
 * What a backward step needs beside the fields of fs_step. Arrays of pointers have one entry a row, and point to
 * [units] reals where nothing else is said. `units` is what the cell has of them: gates, c and dc are its own, dy and
 * dh_total those of its output.
 */
typedef struct fs_back {
    const void *const *dy;       /* IN  gradient of the output of this step; NULL: none joins here         */
    const void *const *gates;    /* IN  [gates][units]: the row of the tape                                */
    const void *const *h;        /* IN  h after the step, RNN                                              */
    const void *const *h_before; /* IN  h before the step, GRU                                             */
    const void *const *c;        /* IN  c after the step, LSTM                                             */
    const void *const *c_before; /* IN  c before the step, LSTM                                            */
    const void *const *dc;       /* IN  gradient that reaches c from later steps, LSTM                     */
    void *const *dc_before;      /* OUT gradient of c before the step, LSTM; may be dc                     */
    void *const *carry; /* OUT what reaches h before the step but through the recurrent weights, GRU; may be
                                    `init` of the same step */
    void *const *middle; /* OUT o * tanh(c) or r * h: what a second product of the cell took; or NULL */
    void *const *dh_total; /* OUT gradient of h after the step, or NULL                              */
    void *const *dc_total; /* OUT gradient of c after the step, or NULL                              */
    /* Bytes from the rows of this step to those of the one before it, which comes next and is fetched ahead. */
    ptrdiff_t dy_next, gates_next, h_next, c_next;
} fs_back;

/*
 * One time step for `rows` rows and the panels [first, last). All arrays of pointers have one entry a row.
 * Input rows (x, h, carry, init) may be shared between rows; out, c and z rows are distinct from one another
 * and from every input row of the same step.
 */
typedef struct fs_step {
    const fs_weights *weights;
    ptrdiff_t first, last, rows;
    int with_x; /* 0: `init` holds the input part already                             */
    enum fs_epilogue epilogue; /* for `plain`                                                        */
    const void *const *init; /* IN  [panels][vectors][lanes]: the bias, or bias plus input part    */
    const void *const *x; /* IN  [x_size]; not read when with_x is 0                            */
    const void *const *h; /* IN  [h_size]: what the recurrent weights multiply                  */
    const void *const *carry; /* IN  [units]: h of the step before, where a GRU carries it over     */
    const void *const *c_before; /* IN [units]: the LSTM's cell state                              */
    void *const *c; /* OUT [units]: the same after the step; may be c_before              */
    void *const *gates; /* OUT [gates][units]: what backward needs, or NULL                   */
    const fs_back *back; /* a backward step: `out` takes gradients of pre-activations; or NULL */
    void *const *z; /* GRU that resets before: OUT of `gru_gates`, IN of FS_BLEND, [units] */
    void *const *out; /* OUT [units]: h; of `gru_gates`: r * h; of `panels_product`: see below */
    /* Of `rows` and `back_rows` of a cell; see fs_cell. */
    void *const *state_part; /* IN [gates][units]: the product with the recurrent weights; OUT anything    */
    const void *const *vectors; /* IN  the sum of both biases, then `vectors` of the cell, NULL where none */
    /* IN of narrow weights: the rows of x and h as `fs_narrow_inputs` wrote them, one behind the other. */
    void *narrow_x, *narrow_h;
} fs_step;

/* Bytes of the narrow rows of a step of so many rows, which multiply x (`of_x`) or h; 0 where weights are reals. */
static inline ptrdiff_t fs_narrow_bytes(const fs_weights *w, int of_x, ptrdiff_t rows)
{
    return w->narrow ? rows * w->narrow->row_bytes(w->type, of_x ? w->x_size : w->h_size) : 0;
}

/*
 * Where weights are narrow, make the narrow rows of a step, of x where it is multiplied and of h where narrow_h is not
 * NULL: once, before the kernel takes some of its panels or all.
 */
static inline void fs_narrow_inputs(const fs_step *s)
{
    const fs_weights *w = s->weights;
    if (w->narrow && s->with_x)
        w->narrow->rows(w->type, s->rows, w->x_size, s->x, s->narrow_x);
    if (w->narrow && s->narrow_h)
        w->narrow->rows(w->type, s->rows, w->h_size, s->h, s->narrow_h);
}

/* The most parameters that a cell has beside matrices and biases. */
enum { FS_VECTORS = 8 };

/*
 * A cell, as packing, forward, backward and decoding read it. `gates` is how many blocks of hidden_size rows weight_ih,
 * weight_hh and the biases have; they are named in that order.
 *
 * A step is a product of the first gates, `main`, and for the last `candidate_gates` a second product, whose state part
 * multiplies what `main` left in `middle`. Of the last `apart_gates`, input part and state part are summed apart, each from
 * its own bias. The kernels for both products have blocks * gates (3 or 4) vectors to a panel row.
 *
 * A cell whose equations need whole rows, as norms do, has `rows`: all its gates are apart, `main` is `plain` over the
 * gates in order, and `rows` continues from both parts of the rows [first, last): `init` is the input part, `state_part`
 * the state part, z room for as much, none of them has a bias. In a backward step `back_rows` takes the gradient of h in
 * `h`. Such a cell may have parameters beside matrices and biases: `vectors`, each so many times hidden_size.
 *
 * Columns of the gradients, each hidden_size wide: the state parts of the apart gates, then all gates in order. The first
 * gates - candidate_gates columns go back to h by the recurrent weights; the `gates` columns after those of the state
 * parts go back to x. Where there is `rows`, columns follow that are only summed: the gradients of the bias and of each of
 * `vectors`.
 */
typedef struct fs_cell {
    const char *name; /* the kind of a layer, as fastseq/layers/recurrent.py says it              */
    int gates;
    int candidate_gates; /* 0 or 1                                                                   */
    int apart_gates; /* 0 or 1; where there is `rows`: all                                       */
    int has_c; /* whether there is a cell state c beside h                                 */
    int carries; /* whether h reaches the next h outside the products, too                  */
    int tape_gates; /* vectors of hidden_size on the tape                                       */
    int tape_reals; /* and reals behind them                                                    */
    const char *gate_names; /* a letter for each vector on the tape that has a name, the first ones     */
    int blocks; /* of the panels of `main`                                                  */
    void (*main)(const fs_step *step);
    enum fs_epilogue epilogue; /* of `main`, where that is `plain`                                         */
    enum fs_epilogue
        candidate_epilogue; /* of the second product, by `plain`                                        */
    enum fs_epilogue back; /* the epilogue of a backward step                                          */
    enum fs_epilogue
        back_candidate; /* that of the backward step of the second product                          */
    void (*rows)(const fs_step *step, ptrdiff_t first, ptrdiff_t last); /* or NULL                  */
    void (*back_rows)(const fs_step *step, ptrdiff_t first, ptrdiff_t last);
    int vectors[FS_VECTORS]; /* 0 after the last                                                         */
} fs_cell;

/* What the softmax cross-entropy of a row is made of: see kernels/losses.h. */
typedef struct fs_softmax_sums {
    double others, target, offset;
} fs_softmax_sums;

/*
 * A loss of n elements: returns the sum of their losses; gradient[i] = scale d loss / d x[i]. Only `huber` looks at
 * delta.
 */
typedef double (*fs_loss)(ptrdiff_t n, const void *x, const void *targets, double delta, double scale,
                          void *gradient);

/*
 * One step of an optimiser over one parameter of n reals. `out` is distinct from every other array. The numbers are
 * rounded to the table's real type; a slot that an optimiser does not use is NULL.
 */
typedef struct fs_update {
    const void *p; /* IN     [n]: the parameter                                              */
    const void *g; /* IN     [n]: its gradient                                               */
    void *first; /* IN/OUT [n]: momentum of `sgd` (or NULL) and `adam`; squares of `rmsprop` */
    void *second; /* IN/OUT [n]: squares of `adam`; momentum of `rmsprop` (or NULL)         */
    void *out; /* OUT    [n]: the parameter after the step                               */
    double rate; /* how far along the direction; of `adam`, lr over the bias of the mean   */
    double decay; /* added to the gradient, times the parameter                             */
    double keep; /* of `adam`: the parameter is multiplied by this first                   */
    double momentum; /* of `sgd` and `rmsprop`: how much of the momentum stays                 */
    double take_first; /* of `adam`: share of the gradient in the mean, 1 - beta1                */
    double keep_second; /* share of the squares that stays: beta2 or alpha                        */
    double take_second; /* share of the new square, 1 - keep_second                               */
    double unbias; /* of `adam`: 1 / sqrt(1 - beta2^t)                                       */
    double eps; /* added to the root of the squares                                       */
    int nesterov; /* of `sgd`                                                               */
} fs_update;

/* Heads: [batch][row][head][reals] in any order of the first three, distances in reals. Whole vectors: see fs_attention. */
typedef struct fs_heads {
    void *data; /* NULL: there are none               */
    ptrdiff_t batch; /* from one sequence to the next; not used where sequences are ragged */
    ptrdiff_t row;
    ptrdiff_t head;
} fs_heads;

/*
 * A page: the keys and values of FS_PAGE tokens of one sequence, in every key-value head of every layer of a stack. After the
 * header, for each of those heads: keys as panels [FS_PAGE / panel][width][panel], a panel being four vectors of keys, so that
 * scores need no packing; then values [FS_PAGE][width].
 */
enum { FS_PAGE = 64, FS_PAGE_HEADER = 64 };

typedef struct fs_page {
    int64_t owners; /* tables that hold it; atomic                                */
    int64_t filled; /* tokens that are written, or promised to one table; atomic  */
    int64_t unsure; /* whether a value in it is not finite: set, never unset      */
} fs_page;

/*
 * Attention over a batch. Its items are independent; each is computed by one thread, in scratch memory of its own.
 * `width` and `value_width` are whole vectors: the door pads with zeros, which change no sum.
 */
typedef struct fs_attention {
    ptrdiff_t batch, heads, kv_heads, width, value_width;
    ptrdiff_t max_queries, max_keys; /* of every sequence, or of the longest where they are ragged      */
    fs_heads q, k, v; /* IN  width, width, value_width                                   */
    fs_heads out; /* OUT of forward, IN of backward: value_width                     */
    fs_heads dout; /* IN  of backward; no data: this is a forward                     */
    fs_heads dq, dk, dv; /* OUT of backward, added to; zeros                                */
    void *
        stats; /* OUT of forward, IN of backward: [batch][heads][max_queries][2]: maximum, 1 over the sum of the softmax */
    void *weights; /* OUT [batch][heads][max_queries][max_keys], zeros before; or NULL */
    const int64_t *q_starts, *k_starts; /* [batch + 1] first row of each sequence; NULL: not ragged */
    const int64_t *lengths; /* [batch] keys of each sequence; NULL: all of them                */
    /* [batch][pages] where the keys and values are, in place of k and v, for queries that are the last ones of their sequence; a
     * page all of whose keys are out of the window may be NULL. width and value_width are the same. */
    fs_page ***pages;
    ptrdiff_t page_layer; /* reals of a page before those of this layer                      */
    const void *mask; /* of booleans, or of reals that are added; or NULL                */
    int mask_is_bool;
    ptrdiff_t mask_strides[3]; /* bytes from one sequence, head and query to the next              */
    int causal;
    ptrdiff_t window; /* 0: none                                                         */
    double scale;
    uint64_t seed; /* of dropout                                                      */
    uint32_t threshold; /* 0: no dropout                                                   */
    double factor; /* of the weights that are kept                                    */
    ptrdiff_t parts; /* items of each key-value head; of backward in phase 0, one after another */
    ptrdiff_t part; /* which of them, in that phase                                    */
    int phase; /* of backward: 0 all at once, 1 dq, 2 dk and dv                     */
} fs_attention;

typedef struct fs_kernels {
    const char *set; /* "baseline", "avx2" or "avx512"                                  */
    int lanes; /* reals in a vector                                               */
    int item_size; /* bytes in a real                                                 */
    int tile_rows[5]; /* [v]: the most rows a tile takes at v (3 or 4) vectors a row     */

    /* y[i] = f(x[i]) for n reals; x and y may be the same array. At most 2 ulp in float32. */
    void (*exp)(ptrdiff_t n, const void *x, void *y);
    void (*tanh)(ptrdiff_t n, const void *x, void *y);
    void (*sigmoid)(ptrdiff_t n, const void *x, void *y);

    /*
     * Packs one weight matrix of rows of k reals: unit u of the panel's gate g is row gate_rows[g] + u. Writes
     * every panel whole, padding included.
     */
    void (*pack)(const void *weight, const ptrdiff_t *gate_rows, int gates, int blocks, ptrdiff_t units,
                 ptrdiff_t k, void *panels);

    /*
     * C += A^T B, summed over the n rows of A and B one after another; a row of each is where rows[k] points.
     * pack_groups: [group][n][tile_rows[4]], every group whole; pack_panels: [panel][n][4][lanes], the panels
     * [first, last). weight_gradient: `groups` groups against one panel, into tile_rows[4] * groups rows of c that lie c_row
     * reals apart. sum_rows: sum += every row of A, columns [first, last).
     */
    void (*pack_groups)(const void *const *rows, ptrdiff_t n, ptrdiff_t columns, void *groups);
    void (*pack_panels)(const void *const *rows, ptrdiff_t n, ptrdiff_t columns, ptrdiff_t first,
                        ptrdiff_t last, void *panels);
    void (*weight_gradient)(ptrdiff_t n, ptrdiff_t groups, const void *a, const void *panel, int vectors,
                            void *c, ptrdiff_t c_row);
    void (*sum_rows)(const void *const *rows, ptrdiff_t n, ptrdiff_t first, ptrdiff_t last, void *sum);

    /* The limits, measured: rounds of FS_ACCUMULATORS vectors of multiply-adds on registers; rounds of reading n reals. */
    double (*multiply_adds)(ptrdiff_t rounds);
    double (*read_memory)(ptrdiff_t rounds, ptrdiff_t n, const void *data);

    /* Input part of any cell, as it lies in `init`: out[row] is [panels][vectors][lanes], whole panels. */
    void (*panels_product)(const fs_step *step, int vectors);

    /* One gate a unit, 4 blocks: any dense product, second products of cells, and backward steps. */
    void (*plain)(const fs_step *step);
    /* The cells, NULL after the last: src/kernels/cells/. */
    const fs_cell *const *cells;

    /* Rows of n reals, one behind the other: kernels/rows.h has the equations. weight and bias may be NULL. */
    void (*layer_norm)(ptrdiff_t rows, ptrdiff_t n, double eps, const void *x, const void *weight,
                       const void *bias, void *y, void *means, void *scales);
    void (*layer_norm_dx)(ptrdiff_t rows, ptrdiff_t n, const void *x, const void *weight, const void *means,
                          const void *scales, const void *dy, void *dx);
    void (*layer_norm_sums)(ptrdiff_t rows, ptrdiff_t n, ptrdiff_t first, ptrdiff_t last, const void *x,
                            const void *means, const void *scales, const void *dy, void *dweight, void *dbias);
    void (*scatter_add)(ptrdiff_t rows, const int64_t *ids, int64_t skip, ptrdiff_t width, ptrdiff_t first,
                        ptrdiff_t last, const void *dy, void *gradient);
    void (*dropout)(ptrdiff_t n, const void *x, void *y, uint64_t first, uint64_t seed, uint64_t stream,
                    uint32_t threshold, double scale);

    void (*rms_norm)(ptrdiff_t rows, ptrdiff_t n, double eps, const void *x, const void *weight, void *y,
                     void *scales);
    void (*rms_norm_dx)(ptrdiff_t rows, ptrdiff_t n, const void *x, const void *weight, const void *scales,
                        const void *dy, void *dx);
    void (*rms_norm_sums)(ptrdiff_t rows, ptrdiff_t n, ptrdiff_t first, ptrdiff_t last, const void *x,
                          const void *scales, const void *dy, void *dweight);
    void (*softmax)(ptrdiff_t rows, ptrdiff_t n, const void *x, void *y);
    void (*softmax_dx)(ptrdiff_t rows, ptrdiff_t n, const void *y, const void *dy, void *dx);
    /* Heads of `rotary_dim` reals and what stands behind them, `width` in all, rotary_dim by the angles of one position. */
    void (*rotary)(ptrdiff_t heads, ptrdiff_t head, ptrdiff_t width, ptrdiff_t rotary_dim, int interleaved,
                   int inverse, const void *x, const void *cos, const void *sin, void *y);
    /* y = f(x), and dx = f'(x) dy, of n reals; f is FS_RELU, FS_GELU or FS_GELU_TANH. */
    void (*activate)(enum fs_epilogue f, ptrdiff_t n, const void *x, void *y);
    void (*activate_dx)(enum fs_epilogue f, ptrdiff_t n, const void *x, const void *dy, void *dx);

    /* kernels/attention.h: one item of a forward and of a backward, and how many reals of scratch they take. */
    ptrdiff_t (*attend_scratch)(const fs_attention *job);
    void (*attend)(const fs_attention *job, ptrdiff_t item, void *scratch);
    /* kernels/attend_decode.h: some heads of sequence b where each has one query, and pages; no mask, weights, or dropout. */
    void (*attend_decode)(const fs_attention *job, ptrdiff_t b, ptrdiff_t first, ptrdiff_t last, void *scratch);
    /* Keys and values of one token, of all heads of a layer, `head` reals apart, into a page. */
    void (*page_store)(ptrdiff_t kv_heads, ptrdiff_t width, ptrdiff_t head, const void *k, const void *v,
                       fs_page *page, ptrdiff_t layer, ptrdiff_t slot);
    /* And back, of one head, `before` reals of a page before it: `tokens` rows of `n` reals from a slot on. */
    void (*page_load)(ptrdiff_t width, const fs_page *page, ptrdiff_t before, ptrdiff_t slot, ptrdiff_t tokens,
                      ptrdiff_t n, void *k, void *v);
    /* The first tokens of a page into another, of so many heads in all. */
    void (*page_copy)(ptrdiff_t heads, ptrdiff_t width, ptrdiff_t tokens, const fs_page *from, fs_page *to);
    ptrdiff_t (*attend_back_scratch)(const fs_attention *job);
    void (*attend_back)(const fs_attention *job, ptrdiff_t item, void *scratch);

    /* kernels/losses.h */
    void (*softmax_cross_entropy)(ptrdiff_t rows, ptrdiff_t n, const void *x, const int64_t *targets,
                                  double smoothing, double scale, void *gradient, fs_softmax_sums *sums);
    fs_loss binary_cross_entropy, squared_error, huber;

    /* One step of an optimiser over the elements [first, last); fastseq/reference/_optimisers.py has the equations. */
    void (*sgd)(const fs_update *update, ptrdiff_t first, ptrdiff_t last);
    void (*rmsprop)(const fs_update *update, ptrdiff_t first, ptrdiff_t last);
    void (*adam)(const fs_update *update, ptrdiff_t first, ptrdiff_t last);
    /* x[i] * factor, in place; the sum of x[i]^2 in double, in one order on every instruction set. */
    void (*scale)(ptrdiff_t n, void *x, double factor);
    double (*sum_of_squares)(ptrdiff_t n, const void *x);
} fs_kernels;

/* An instruction set: kernels of reals, which several sets may share, and what it has for narrow weights. */
typedef struct fs_set {
    const char *name;
    const fs_kernels *f32, *f64;
    const fs_narrow *narrow;
} fs_set;

/* A set by its name; NULL where this machine, or its operating system, cannot run it. */
const fs_set *fs_find_set(const char *name);

extern const fs_kernels fs_baseline_f32, fs_baseline_f64;
extern const fs_narrow fs_baseline_narrow, fs_amx_in_c_narrow;
#if defined(__x86_64__)
extern const fs_kernels fs_avx2_f32, fs_avx2_f64, fs_avx512_f32, fs_avx512_f64;
extern const fs_narrow fs_avx2_narrow, fs_avx_vnni_narrow, fs_avx512_narrow, fs_avx512_vnni_narrow,
    fs_avx512_bf16_narrow, fs_amx_narrow;
#endif

#endif
