/*
 * The microkernel, the one inner loop of the project: a few rows times the vectors of a panel, all sums in registers.
 */
#ifndef FASTSEQ_MICROKERNEL_H
#define FASTSEQ_MICROKERNEL_H

#include "kernels.h"
#include "vec.h"

enum {
    MAX_ROWS = 8,
    MAX_PANELS = 4,
    CACHE_LINE = 64,
    MAX_TILE = 24, /* the most sums a tile holds: 6 rows of 4 vectors, or 8 of 3 */
    NARROW_ROWS = 48 * 64 /
        FS_VECTOR_BYTES /* the most of a narrow product: their sums stay in the first cache */
};

/* Lines fetched ahead at every k: as there are few rows, so are there tiles to do it. */
#define LINES_AHEAD(ROWS) ((ROWS) <= 4 ? 2 : 1)

/*
 * What a type makes of one k. Packed weights and inputs of a narrow type come in words of 32 bits: a word of the
 * weights holds the weights of one output at 2 (bfloat16) or 4 (int8) successive k, and goes with PARTS words of the
 * input row. Sums of int8 are integers, which stand in vectors of reals as they are.
 *
 *   FS_BFLOAT16   PARTS 1: both products in one instruction; 2: widened to float32, one k a part
 *   FS_INT8       PARTS 1: four products in one instruction, of inputs that are 128 more than they say;
 *                 2: by pairs of 16 bits, k 0 and 2, then 1 and 3
 *   FS_PAIRS      such pairs, split before: a word is two weights of 16 bits
 */
#if defined(FS_TILES) || (defined(__AVX512BF16__) && FS_VECTOR_BYTES == 64)
enum { BFLOAT16_PARTS = 1 };
#else
enum { BFLOAT16_PARTS = 2 };
#endif
#if defined(FS_TILES) || (defined(__AVX512VNNI__) && FS_VECTOR_BYTES == 64) || \
    (defined(__AVXVNNI__) && FS_VECTOR_BYTES == 32)
enum { INT8_PARTS = 1 };
#else
enum { INT8_PARTS = 2 };
#endif

INLINE int parts_of(const enum fs_weight_type TYPE)
{
    return TYPE == FS_BFLOAT16 ? BFLOAT16_PARTS : TYPE == FS_INT8 ? INT8_PARTS : 1;
}

typedef int16_t halves __attribute__((vector_size(FS_VECTOR_BYTES)));

/* One part of a vector of packed weights. */
INLINE vec weights_part(const enum fs_weight_type TYPE, vec words, const int PART)
{
    if (TYPE == FS_BFLOAT16 && BFLOAT16_PARTS == 2)
        return PART == 0 ? (vec)((ivec)words << 16) : (vec)((ivec)words & ~(integer)0xffff);
    if (TYPE == FS_INT8 && INT8_PARTS == 2)
        return PART == 0 ? (vec)((halves)words << 8 >> 8) : (vec)((halves)words >> 8);
    return words;
}

/* One part of an input, in every lane. */
INLINE vec input_part(const enum fs_weight_type TYPE, const real *input, const int PART)
{
    if (TYPE == FS_REAL)
        return broadcast(*input);
    integer word;
    memcpy(&word, input + PART, sizeof word);
    return (vec)ibroadcast(word);
}

/* For each lane, the sum of two products of 16 bits: no sum of int8 leaves 32 bits. */
INLINE ivec multiply_pairs(vec a, vec b)
{
#if FS_VECTOR_BYTES == 64 && defined(__AVX512BW__)
    return (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif FS_VECTOR_BYTES == 32
    return (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__) && FS_VECTOR_BYTES == 16
    return (ivec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    const ivec x = (ivec)a, y = (ivec)b;
    return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

/* sum + input * weight */
INLINE vec multiply_add(const enum fs_weight_type TYPE, vec input, vec weight, vec sum)
{
    /* By its name: of sums that are vectors of reals as C sees them, GCC's intrinsic makes copies, and spills them. */
#if defined(__AVX512VNNI__) && FS_VECTOR_BYTES == 64
    if (TYPE == FS_INT8) {
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(input), "vm"(weight));
        return sum;
    }
#elif defined(__AVXVNNI__) && FS_VECTOR_BYTES == 32
    if (TYPE == FS_INT8) {
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(input), "xm"(weight));
        return sum;
    }
#endif
    if (TYPE == FS_INT8 || TYPE == FS_PAIRS)
        return (vec)((ivec)sum + multiply_pairs(input, weight));
#if defined(__AVX512BF16__) && FS_VECTOR_BYTES == 64
    if (TYPE == FS_BFLOAT16)
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)input, (__m512bh)weight);
#endif
    return fma_(input, weight, sum);
}

/* One part of one k of a chain. */
INLINE void microkernel_part(const enum fs_weight_type TYPE, const int ROWS, const int PANELS,
                             const int VECTORS, const int PART, vec *sums, const real *const *row,
                             const real *const *panel, ptrdiff_t k)
{
    /* Of weights and inputs, the fewer stand in registers and the others pass through one: 4 rows of 3 vectors
     * fill 16 registers that way, and the other way would spill a sum at every k. */
    if (ROWS > PANELS * VECTORS) {
        vec weight[MAX_PANELS * 4];
#pragma GCC unroll 16
        for (int i = 0; i < PANELS * VECTORS; i++)
            weight[i] = weights_part(TYPE, load(panel[i / VECTORS] + i % VECTORS * LANES), PART);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            vec input = input_part(TYPE, row[r] + k, PART);
#pragma GCC unroll 16
            for (int i = 0; i < PANELS * VECTORS; i++)
                sums[r * PANELS * VECTORS + i] =
                    multiply_add(TYPE, input, weight[i], sums[r * PANELS * VECTORS + i]);
        }
    } else {
        vec input[MAX_ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
            input[r] = input_part(TYPE, row[r] + k, PART);
#pragma GCC unroll 16
        for (int i = 0; i < PANELS * VECTORS; i++) {
            vec weight = weights_part(TYPE, load(panel[i / VECTORS] + i % VECTORS * LANES), PART);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
                sums[r * PANELS * VECTORS + i] =
                    multiply_add(TYPE, input[r], weight, sums[r * PANELS * VECTORS + i]);
        }
    }
}

/*
 * sums[row][panel][v] += sum over k, in order, of x[row][k] * weights[panel][k][v]
 *
 * TYPE, ROWS, PANELS and VECTORS are constants where this is inlined: the loops over them must vanish, or the compiler
 * keeps the sums in memory, at a fifth of the speed. Panels lie `panel_size` reals apart and their rows `stride`, of
 * which the first VECTORS * LANES are used; of a narrow type, k counts words, and what is said of reals holds for
 * words. From one k to the next, x moves on by `x_stride` reals. What lies from `ahead` on is fetched into the second
 * cache meanwhile, a line or two at every k; NULL, constant: nothing is.
 */
INLINE void microkernel_ahead(const enum fs_weight_type TYPE, const int ROWS, const int PANELS,
                              const int VECTORS, const ptrdiff_t stride, const ptrdiff_t x_stride, vec *sums,
                              const void *const *x, const void *weights, ptrdiff_t panel_size, ptrdiff_t k_size,
                              const char *ahead)
{
    const real *row[MAX_ROWS];
    const real *panel[MAX_PANELS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
        row[r] = x[r];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++)
        panel[p] = (const real *)weights + p * panel_size;
    /* Several k at once where there are registers: what moves the pointers takes slots that multiply-adds could have. */
#if FS_VECTOR_BYTES == 64
#pragma GCC unroll 4
#endif
    for (ptrdiff_t k = 0; k < k_size; k++) {
        if (ahead)
            __builtin_prefetch(ahead + k * LINES_AHEAD(ROWS) * CACHE_LINE, 0, 2);
        if (ahead && LINES_AHEAD(ROWS) > 1)
            __builtin_prefetch(ahead + (k * LINES_AHEAD(ROWS) + 1) * CACHE_LINE, 0, 2);
        microkernel_part(TYPE, ROWS, PANELS, VECTORS, 0, sums, row, panel, k * x_stride);
        if (parts_of(TYPE) == 2)
            microkernel_part(TYPE, ROWS, PANELS, VECTORS, 1, sums, row, panel, k * x_stride);
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++)
            panel[p] += stride;
    }
}

/* The same with nothing fetched ahead; STRIDE is in vectors. */
INLINE void microkernel(const enum fs_weight_type TYPE, const int ROWS, const int PANELS, const int VECTORS,
                        const int STRIDE, const int X_STRIDE, vec *sums, const void *const *x,
                        const void *weights, ptrdiff_t panel_size, ptrdiff_t k_size)
{
    microkernel_ahead(TYPE, ROWS, PANELS, VECTORS, STRIDE * LANES, X_STRIDE, sums, x, weights, panel_size,
                      k_size, NULL);
}

/* How many of the rows left the next tile takes: as few tiles as possible, of even height. */
INLINE ptrdiff_t tile_height(ptrdiff_t rows_left, int limit)
{
    ptrdiff_t tiles = (rows_left + limit - 1) / limit;
    return (rows_left + tiles - 1) / tiles;
}

#endif
