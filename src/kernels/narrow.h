/*
 * Products of narrow weights, bfloat16 and int8, with float32 rows: what an instruction set has for them.
 *
 *   bfloat16   the row is rounded, to nearest even; sums start from what they are added to, in float32
 *   int8       the row is divided by its scale, max |x| / 127, and rounded, to nearest even; sums are integers, exact;
 *              what is added is float(sum) * (scale of the row * scale of the output)
 *
 * Every step of int8 is rounded once and fused with none, so that it gives the same bits on every instruction set.
 *
 * A narrow row, as `narrow_rows` writes it, is a header of NARROW_HEAD bytes and words as microkernel.h reads them.
 */
#ifndef FASTSEQ_NARROW_H
#define FASTSEQ_NARROW_H

#include "microkernel.h"

enum {
    NARROW_HEAD = CACHE_LINE,
    FLOAT_INF = 0x7f800000,
    FLOAT_QUIET = 0x00400000,
    WEIGHTS_OF_WORD_BFLOAT16 = 2,
    WEIGHTS_OF_WORD_INT8 = 4
};

/* Rows and panels end with words of zeros, so that there are whole tiles of them. */
#if defined(FS_TILES)
#include "tiles.h"
enum { WHOLE_WORDS = TILE_WORDS };
#else
enum { WHOLE_WORDS = 1 };
#endif

typedef struct {
    float scale; /* int8: NaN of a row with NaN, inf of one with inf, 0 of one that is nearly 0 */
    int32_t infinities; /* int8: how many */
} narrow_head;

typedef int8_t bytes __attribute__((vector_size(LANES)));
typedef int16_t short_row __attribute__((vector_size(LANES * 2)));
typedef uint64_t quads __attribute__((vector_size(LANES * 2)));

static ptrdiff_t words_of(enum fs_weight_type type, ptrdiff_t k)
{
    const ptrdiff_t each = type == FS_BFLOAT16 ? WEIGHTS_OF_WORD_BFLOAT16 : WEIGHTS_OF_WORD_INT8;
    return (k + each * WHOLE_WORDS - 1) / (each * WHOLE_WORDS) * WHOLE_WORDS;
}

static ptrdiff_t narrow_row_bytes(enum fs_weight_type type, ptrdiff_t k)
{
    /* Whole vectors are written, so that a row ends with room for one. */
    const ptrdiff_t n_bytes = words_of(type, k) * parts_of(type) * 4;
    return NARROW_HEAD + (n_bytes + FS_VECTOR_BYTES + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
}

/* The reals at x[k .. k + LANES), zeros from `size` on. */
INLINE vec load_until(const real *x, ptrdiff_t k, ptrdiff_t size)
{
    return size - k >= LANES ? load(x + k) : load_part(x + k, size - k);
}

/* The bits of bfloat16 in the upper half of each lane: rounded to nearest even, NaN kept. */
INLINE ivec round_bfloat16(vec x)
{
    const ivec bits = (ivec)x, upper = ibroadcast(~(integer)0xffff);
    const ivec is_nan = (bits & 0x7fffffff) > FLOAT_INF;
    const ivec numbers = bits & ~is_nan; /* to which the half can be added within 32 bits */
    const ivec rounded = (numbers + 0x7fff + ((numbers >> 16) & 1)) & upper;
    return (is_nan & ((bits | FLOAT_QUIET) & upper)) | (~is_nan & rounded);
}

/* What the loops over whole vectors leave of a row, which hold `each` bytes of a number. */
INLINE void pad_row(enum fs_weight_type type, ptrdiff_t k_size, ptrdiff_t each, int value, char *out)
{
    const ptrdiff_t written = (k_size + LANES - 1) / LANES * LANES * each;
    const ptrdiff_t size = words_of(type, k_size) * parts_of(type) * 4;
    if (written < size)
        memset(out + written, value, (size_t)(size - written));
}

static void bfloat16_row(ptrdiff_t k_size, const real *x, char *row)
{
    char *out = row + NARROW_HEAD;
    for (ptrdiff_t k = 0; k < k_size; k += LANES) {
        const ivec bits = round_bfloat16(load_until(x, k, k_size));
        if (BFLOAT16_PARTS == 2)
            store((real *)out + k, (vec)bits);
        else {
            const short_row two = __builtin_convertvector(bits >> 16, short_row);
            memcpy(out + 2 * k, &two, sizeof two);
        }
    }
    pad_row(FS_BFLOAT16, k_size, 2 * BFLOAT16_PARTS, 0, out);
}

INLINE ivec int_max(ivec a, ivec b)
{
    const ivec larger = a > b;
    return (larger & a) | (~larger & b);
}

/* The bits of max |x|, NaN above inf above all numbers; `infinities` receives how many are infinite. */
INLINE int32_t magnitude(ptrdiff_t k_size, const real *x, int32_t *infinities)
{
    ivec most = {0};
    int32_t max = 0;
    for (ptrdiff_t k = 0; k < k_size; k += LANES)
        most = int_max((ivec)load_until(x, k, k_size) & 0x7fffffff, most);
    for (int lane = 0; lane < LANES; lane++)
        max = most[lane] > max ? most[lane] : max;
    *infinities = 0;
    if (max == FLOAT_INF)
        for (ptrdiff_t k = 0; k < k_size; k++)
            *infinities += x[k] == INFINITE || x[k] == -INFINITE;
    return max;
}

/* LANES whole numbers of at most 127 as the words of a row. */
INLINE void store_int8(char *out, ptrdiff_t k, ivec q)
{
    if (INT8_PARTS == 1) {
        const bytes four = __builtin_convertvector(q + 128, bytes);
        memcpy(out + k, &four, sizeof four);
    } else {
        /* Of each four, the second and the third change places: see microkernel.h. */
        const quads four = (quads) __builtin_convertvector(q, short_row);
        const quads pairs =
            (four & 0xffff00000000ffff) | (four >> 16 & 0xffff0000) | (four << 16 & 0xffff00000000);
        memcpy(out + 2 * k, &pairs, sizeof pairs);
    }
}

static void int8_row(ptrdiff_t k_size, const real *x, char *row)
{
    const real small = 0x1p-100f; /* rows below give 0: the inverse of their scale would be infinite */
    const vec shift = broadcast(0x1.8p23f); /* adding it rounds to whole numbers, to nearest even */
    char *out = row + NARROW_HEAD;
    narrow_head head;
    const int32_t bits = magnitude(k_size, x, &head.infinities);
    real max, inverse;
    memcpy(&max, &bits, sizeof max);
    head.scale = bits < FLOAT_INF ? max < small ? 0 : max / 127 : max;
    inverse = head.scale > 0 ? 127 / max : 0; /* of a row with NaN or inf, 0 */
    for (ptrdiff_t k = 0; k < k_size; k += LANES) {
        const vec v = load_until(x, k, k_size);
        ivec q;
        if (bits >= FLOAT_INF)
            q = (v == -INFINITE) - (v == INFINITE); /* a comparison that holds is -1 */
        else
            q = (ivec)(v * broadcast(inverse) + shift) - (ivec)shift;
        store_int8(out, k, q);
    }
    pad_row(FS_INT8, k_size, INT8_PARTS, INT8_PARTS == 1 ? 128 : 0, out);
    memcpy(row, &head, sizeof head);
}

static void narrow_rows(enum fs_weight_type type, ptrdiff_t rows, ptrdiff_t k_size, const void *const *x,
                        void *out)
{
    const ptrdiff_t row_bytes = narrow_row_bytes(type, k_size);
    for (ptrdiff_t row = 0; row < rows; row++)
        if (type == FS_BFLOAT16)
            bfloat16_row(k_size, x[row], (char *)out + row * row_bytes);
        else
            int8_row(k_size, x[row], (char *)out + row * row_bytes);
}

/* The sums of a tile start from what they are added to, or of int8 from whole numbers. */
INLINE vec first_sum(const enum fs_weight_type TYPE, const fs_narrow_product *p, const real *out, int i)
{
    if (TYPE == FS_BFLOAT16)
        return load(out);
    return INT8_PARTS == 1 ? load((const real *)p->offsets + i * LANES) : (vec){0};
}

/* out += the whole numbers times both scales. */
INLINE void add_scaled(const fs_narrow_product *p, const char *narrow_row, vec sum, int i, real *out)
{
    narrow_head head;
    memcpy(&head, narrow_row, sizeof head);
    const vec scale = broadcast(head.scale) * load((const real *)p->scales + i * LANES);
    store(out, load(out) + __builtin_convertvector((ivec)sum, vec) * scale);
}

/* ROWS rows from `row` on against PANELS panels; out[row][panel][vector] += the products. */
INLINE void narrow_tile(const enum fs_weight_type TYPE, const int ROWS, const int PANELS, const int VECTORS,
                        const fs_narrow_product *p, ptrdiff_t row)
{
    const int per_row = PANELS * VECTORS;
    const char *rows = (const char *)p->rows + row * p->row_bytes;
    real *out = (real *)p->out + row * per_row * LANES;
    vec sums[MAX_TILE];
    const void *x[MAX_ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
        x[r] = rows + r * p->row_bytes + NARROW_HEAD;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
        for (int i = 0; i < per_row; i++)
            sums[r * per_row + i] = first_sum(TYPE, p, out + (r * per_row + i) * LANES, i);
    microkernel(TYPE, ROWS, PANELS, VECTORS, VECTORS, parts_of(TYPE), sums, x, p->weights,
                p->words * VECTORS * LANES, p->words);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
        for (int i = 0; i < per_row; i++) {
            real *sum = out + (r * per_row + i) * LANES;
            if (TYPE == FS_INT8)
                add_scaled(p, rows + r * p->row_bytes, sums[r * per_row + i], i, sum);
            else
                store(sum, sums[r * per_row + i]);
        }
}

/*
 * Where a word takes two instructions, what they share of it, which is to bring the weights into the form that they
 * multiply, is done once for many rows: of SPLIT_WORDS words at a time, so that it stays in the first cache.
 */
enum { SPLIT_WORDS = 64, SPLIT_ROWS = 4 };

/* Functions of their own: inlined, their constants would take registers that tiles need. */
static __attribute__((noinline)) void split_words(enum fs_weight_type type, ptrdiff_t n, int vectors,
                                                  const real *words, real *parts)
{
    for (ptrdiff_t i = 0; i < n; i++)
        for (int v = 0; v < vectors; v++) {
            const vec both = load(words + (i * vectors + v) * LANES);
            const vec first =
                type == FS_INT8 ? weights_part(FS_INT8, both, 0) : weights_part(FS_BFLOAT16, both, 0);
            const vec second =
                type == FS_INT8 ? weights_part(FS_INT8, both, 1) : weights_part(FS_BFLOAT16, both, 1);
            store(parts + (2 * i * vectors + v) * LANES, first);
            store(parts + ((2 * i + 1) * vectors + v) * LANES, second);
        }
}

/* sums[row] += ROWS rows times some words that were split; k counts parts. */
INLINE void split_tile(const enum fs_weight_type TYPE, const int ROWS, const int VECTORS,
                       const fs_narrow_product *p, ptrdiff_t row, ptrdiff_t word, const real *parts,
                       ptrdiff_t n, vec *all_sums)
{
    vec sums[MAX_TILE];
    const void *x[MAX_ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
        x[r] = (const char *)p->rows + (row + r) * p->row_bytes + NARROW_HEAD + word * 8;
#pragma GCC unroll 24
    for (int i = 0; i < ROWS * VECTORS; i++)
        sums[i] = all_sums[row * VECTORS + i];
    microkernel(TYPE == FS_INT8 ? FS_PAIRS : FS_REAL, ROWS, 1, VECTORS, VECTORS, 1, sums, x, parts, 0, n);
#pragma GCC unroll 24
    for (int i = 0; i < ROWS * VECTORS; i++)
        all_sums[row * VECTORS + i] = sums[i];
}

/* All rows against one panel, its words split first. */
INLINE void split_panel(const enum fs_weight_type TYPE, const int VECTORS, const fs_narrow_product *p)
{
    const int limit = VECTORS == 3 ? ROWS_OF_3 : ROWS_OF_4;
    real *out = p->out, parts[SPLIT_WORDS * 2 * 4 * LANES] __attribute__((aligned(CACHE_LINE)));
    vec sums[NARROW_ROWS * 4];
    for (ptrdiff_t i = 0; i < p->n_rows * VECTORS; i++)
        sums[i] = first_sum(TYPE, p, out + i * LANES, 0);
    for (ptrdiff_t word = 0; word < p->words; word += SPLIT_WORDS) {
        const ptrdiff_t n = p->words - word < SPLIT_WORDS ? p->words - word : SPLIT_WORDS;
        split_words(TYPE, n, VECTORS, (const real *)p->weights + word * VECTORS * LANES, parts);
        for (ptrdiff_t row = 0, rows; row < p->n_rows; row += rows) {
            rows = tile_height(p->n_rows - row, limit);
            switch (rows) {
            case 1: split_tile(TYPE, 1, VECTORS, p, row, word, parts, 2 * n, sums); break;
            case 2: split_tile(TYPE, 2, VECTORS, p, row, word, parts, 2 * n, sums); break;
            case 3: split_tile(TYPE, 3, VECTORS, p, row, word, parts, 2 * n, sums); break;
            case 4:
                if (limit >= 4)
                    split_tile(TYPE, 4, VECTORS, p, row, word, parts, 2 * n, sums);
                break;
            case 5:
                if (limit >= 5)
                    split_tile(TYPE, 5, VECTORS, p, row, word, parts, 2 * n, sums);
                break;
            case 6:
                if (limit >= 6)
                    split_tile(TYPE, 6, VECTORS, p, row, word, parts, 2 * n, sums);
                break;
            case 7:
                if (limit >= 7)
                    split_tile(TYPE, 7, VECTORS, p, row, word, parts, 2 * n, sums);
                break;
            case 8:
                if (limit >= 8)
                    split_tile(TYPE, 8, VECTORS, p, row, word, parts, 2 * n, sums);
                break;
            }
        }
    }
    for (ptrdiff_t i = 0; i < p->n_rows * VECTORS; i++)
        if (TYPE == FS_INT8)
            add_scaled(p, (const char *)p->rows + i / VECTORS * p->row_bytes, sums[i], (int)(i % VECTORS),
                       out + i * LANES);
        else
            store(out + i * LANES, sums[i]);
}

/* Where a row has several infinities, the sum of its integers does not say what theirs is: NaN where signs differ. */
static void add_infinities(const fs_narrow_product *p, ptrdiff_t row)
{
    const int8_t *weights = p->weights;
    const char *words = (const char *)p->rows + row * p->row_bytes + NARROW_HEAD;
    const ptrdiff_t lanes = (ptrdiff_t)p->vectors * LANES;
    real *out = (real *)p->out + row * p->panels * lanes;
    for (ptrdiff_t lane = 0; lane < p->panels * lanes; lane++) {
        const int8_t *w = weights + (lane / lanes * p->words * lanes + lane % lanes) * 4;
        for (ptrdiff_t k = 0; k < 4 * p->words; k++) {
            const int8_t weight = w[k / 4 * lanes * 4 + k % 4];
            int sign;
            if (INT8_PARTS == 1)
                sign = (int)((const uint8_t *)words)[k] - 128;
            else
                sign = ((const int16_t *)words)[k / 4 * 4 + (k % 4 == 1 ? 2 : k % 4 == 2 ? 1 : k % 4)];
            if (sign)
                out[lane] += (real)(sign * weight) * INFINITE;
        }
    }
}

INLINE void narrow_panels(const enum fs_weight_type TYPE, const int VECTORS, const fs_narrow_product *p)
{
    const int few = FS_VECTOR_BYTES == 64 ? 3 : 2; /* whose parts are split as they are read, without a spill */
    const int limit = parts_of(TYPE) == 2 ? few : VECTORS == 3 ? ROWS_OF_3 : ROWS_OF_4;
    if (p->n_rows == 1)
        switch (p->panels) { /* see `step` for why */
        case 1: narrow_tile(TYPE, 1, 1, VECTORS, p, 0); return;
        case 2: narrow_tile(TYPE, 1, 2, VECTORS, p, 0); return;
        case 3: narrow_tile(TYPE, 1, 3, VECTORS, p, 0); return;
        default: narrow_tile(TYPE, 1, 12 / VECTORS, VECTORS, p, 0); return;
        }
    if (parts_of(TYPE) == 2 && p->n_rows >= SPLIT_ROWS) {
        split_panel(TYPE, VECTORS, p);
        return;
    }
    for (ptrdiff_t row = 0, n; row < p->n_rows; row += n) {
        n = tile_height(p->n_rows - row, limit);
        switch (n) {
        case 1: narrow_tile(TYPE, 1, 1, VECTORS, p, row); break;
        case 2: narrow_tile(TYPE, 2, 1, VECTORS, p, row); break;
        case 3: narrow_tile(TYPE, 3, 1, VECTORS, p, row); break;
        case 4:
            if (limit >= 4)
                narrow_tile(TYPE, 4, 1, VECTORS, p, row);
            break;
        case 5:
            if (limit >= 5)
                narrow_tile(TYPE, 5, 1, VECTORS, p, row);
            break;
        case 6:
            if (limit >= 6)
                narrow_tile(TYPE, 6, 1, VECTORS, p, row);
            break;
        case 7:
            if (limit >= 7)
                narrow_tile(TYPE, 7, 1, VECTORS, p, row);
            break;
        case 8:
            if (limit >= 8)
                narrow_tile(TYPE, 8, 1, VECTORS, p, row);
            break;
        }
    }
}

#if defined(FS_TILES)
/*
 * Tiles sum bfloat16 in an order that is their own, so that all rows take them. Sums of int8 are exact, and few rows
 * are faster without.
 */
#if defined(FS_TILES_IN_C)
enum { INT8_TILES_FROM = 1 };
#else
enum { INT8_TILES_FROM = 4 };
#endif

/* Sums of int8 before their offsets may have left 32 bits, which those bring back. */
typedef uint32_t wrapping __attribute__((vector_size(FS_VECTOR_BYTES)));

INLINE int by_tiles(enum fs_weight_type type, ptrdiff_t rows)
{
    return type == FS_BFLOAT16 || rows >= INT8_TILES_FROM;
}

static void narrow_begin(enum fs_weight_type type, ptrdiff_t rows)
{
    if (by_tiles(type, rows))
        tiles_configure(rows < TILE_ROWS ? (int)rows : TILE_ROWS);
}

static void narrow_end(enum fs_weight_type type, ptrdiff_t rows)
{
    if (by_tiles(type, rows))
        tiles_release();
}

/* `rows` of one tile or two against one vector of a panel or two: sums[row][vector] += the products. */
INLINE void tile_block(const enum fs_weight_type TYPE, const int ROW_TILES, const int VECTORS,
                       const fs_narrow_product *p, const ptrdiff_t *row, const char *weights, char *sums)
{
    const ptrdiff_t sums_bytes = p->panels * p->vectors * FS_VECTOR_BYTES;
    const ptrdiff_t word_bytes = (ptrdiff_t)p->vectors * FS_VECTOR_BYTES;
    const char *rows = (const char *)p->rows + NARROW_HEAD;
    for (int i = 0; i < ROW_TILES; i++)
        tile_rows_end(row[i], p->n_rows);
#pragma GCC unroll 4
    for (int i = 0; i < ROW_TILES * VECTORS; i++)
        if (TYPE == FS_INT8)
            tile_zero(i / VECTORS * 2 + i % VECTORS);
        else
            tile_load(i / VECTORS * 2 + i % VECTORS,
                      sums + row[i / VECTORS] * sums_bytes + i % VECTORS * FS_VECTOR_BYTES, sums_bytes);
    for (ptrdiff_t word = 0; word < p->words; word += TILE_WORDS) {
#pragma GCC unroll 2
        for (int i = 0; i < ROW_TILES; i++)
            tile_load(FIRST_INPUTS + i, rows + row[i] * p->row_bytes + word * 4, p->row_bytes);
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; j++)
            tile_load(FIRST_WEIGHTS + j, weights + word * word_bytes + j * FS_VECTOR_BYTES, word_bytes);
#pragma GCC unroll 4
        for (int i = 0; i < ROW_TILES * VECTORS; i++)
            tile_multiply(TYPE, i / VECTORS, i % VECTORS);
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROW_TILES * VECTORS; i++)
        tile_store(i / VECTORS * 2 + i % VECTORS,
                   sums + row[i / VECTORS] * sums_bytes + i % VECTORS * FS_VECTOR_BYTES, sums_bytes);
}

/*
 * All rows against one vector or two. The last tile of rows is whole, too: what it shares with the one before is of one
 * block, which loads its sums before it stores any.
 */
INLINE void tile_rows(const enum fs_weight_type TYPE, const int VECTORS, const fs_narrow_product *p,
                      const char *weights, char *sums)
{
    const ptrdiff_t tiles = (p->n_rows + TILE_ROWS - 1) / TILE_ROWS;
    const ptrdiff_t last = p->n_rows < TILE_ROWS ? 0 : p->n_rows - TILE_ROWS;
    if (tiles % 2) {
        const ptrdiff_t row = 0;
        tile_block(TYPE, 1, VECTORS, p, &row, weights, sums);
    }
    for (ptrdiff_t tile = tiles % 2; tile < tiles; tile += 2) {
        const ptrdiff_t next = (tile + 1) * TILE_ROWS, rows[2] = {tile * TILE_ROWS, next < last ? next : last};
        tile_block(TYPE, 2, VECTORS, p, rows, weights, sums);
    }
}

INLINE void tile_product(const enum fs_weight_type TYPE, const fs_narrow_product *p)
{
    const ptrdiff_t per_row = p->panels * p->vectors, panel_bytes = p->words * p->vectors * FS_VECTOR_BYTES;
    vec whole[NARROW_ROWS * 4]; /* sums of int8 */
    char *sums = TYPE == FS_INT8 ? (char *)whole : p->out;
    for (ptrdiff_t panel = 0; panel < p->panels; panel++)
        for (int v = 0; v < p->vectors; v += 2) {
            const ptrdiff_t at = (panel * p->vectors + v) * FS_VECTOR_BYTES;
            const char *weights = (const char *)p->weights + panel * panel_bytes + v * FS_VECTOR_BYTES;
            if (v + 1 < p->vectors)
                tile_rows(TYPE, 2, p, weights, sums + at);
            else
                tile_rows(TYPE, 1, p, weights, sums + at);
        }
    for (ptrdiff_t i = 0; TYPE == FS_INT8 && i < p->n_rows * per_row; i++) {
        const int lane = (int)(i % per_row);
        const wrapping sum = (wrapping)whole[i] + (wrapping)first_sum(TYPE, p, NULL, lane);
        add_scaled(p, (const char *)p->rows + i / per_row * p->row_bytes, (vec)sum, lane,
                   (real *)p->out + i * LANES);
    }
}
#endif

static void narrow_product(enum fs_weight_type type, const fs_narrow_product *p)
{
#if defined(FS_TILES)
    if (type == FS_BFLOAT16)
        tile_product(FS_BFLOAT16, p);
    else if (by_tiles(FS_INT8, p->n_rows))
        tile_product(FS_INT8, p);
#else
    if (type == FS_BFLOAT16 && p->vectors == 3)
        narrow_panels(FS_BFLOAT16, 3, p);
    else if (type == FS_BFLOAT16)
        narrow_panels(FS_BFLOAT16, 4, p);
#endif
    else if (p->vectors == 3)
        narrow_panels(FS_INT8, 3, p);
    else
        narrow_panels(FS_INT8, 4, p);
    for (ptrdiff_t row = 0; type == FS_INT8 && row < p->n_rows; row++) {
        narrow_head head;
        memcpy(&head, (const char *)p->rows + row * p->row_bytes, sizeof head);
        if (head.infinities > 1)
            add_infinities(p, row);
    }
}

/* As `pack` of the kernels, of uint16 (bfloat16) or int8: [panel][word][vector][lane], words of zeros past the last unit. */
static void narrow_pack(enum fs_weight_type type, const void *weight, const ptrdiff_t *gate_rows, int gates,
                        int blocks, ptrdiff_t units, ptrdiff_t k_size, void *panels, void *offsets)
{
    const int each = type == FS_BFLOAT16 ? WEIGHTS_OF_WORD_BFLOAT16 : WEIGHTS_OF_WORD_INT8, size = 4 / each;
    const ptrdiff_t panel_row = (ptrdiff_t)gates * blocks * LANES, panel_units = (ptrdiff_t)blocks * LANES;
    const ptrdiff_t words = words_of(type, k_size);
    char *panel = panels;
    int32_t *offset = offsets;
    for (ptrdiff_t first = 0; first < units; first += panel_units, panel += words * panel_row * 4)
        for (ptrdiff_t lane = 0; lane < panel_row; lane++) {
            const ptrdiff_t vector = lane / LANES, gate = vector % gates;
            const ptrdiff_t unit = first + vector / gates * LANES + lane % LANES;
            const char *row = (const char *)weight + (gate_rows[gate] + unit) * k_size * size;
            int32_t sum = 0;
            for (ptrdiff_t k = 0; k < words * each; k++) {
                char *to = panel + (k / each * panel_row + lane) * 4 + k % each * size;
                if (unit < units && k < k_size) {
                    memcpy(to, row + k * size, (size_t)size);
                    sum += type == FS_INT8 ? *(const int8_t *)(row + k) : 0;
                } else
                    memset(to, 0, (size_t)size);
            }
            if (type == FS_INT8)
                *offset++ = (int32_t)(-128u * (uint32_t)sum);
        }
}

const fs_narrow FS_NARROW_TABLE = {
    .bfloat16 = FS_BFLOAT16_BY,
    .int8 = FS_INT8_BY,
    .words = words_of,
    .row_bytes = narrow_row_bytes,
    .rows = narrow_rows,
    .product = narrow_product,
#if defined(FS_TILES)
    .begin = narrow_begin,
    .end = narrow_end,
#endif
    .pack = narrow_pack,
};

#endif
