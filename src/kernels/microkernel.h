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
    MAX_TILE = 24 /* the most sums a tile holds: 6 rows of 4 vectors, or 8 of 3 */
};

/* Lines fetched ahead at every k: as there are few rows, so are there tiles to do it. */
#define LINES_AHEAD(ROWS) ((ROWS) <= 4 ? 2 : 1)

/* Bytes of one packed weight of a type. */
INLINE ptrdiff_t weight_bytes(const enum fs_weight_type TYPE)
{
    switch (TYPE) {
    case FS_REAL: break;
    }
    return sizeof(real);
}

/* LANES packed weights as a vector of reals, `index` weights after p. */
INLINE vec load_weights(const enum fs_weight_type TYPE, const char *p, ptrdiff_t index)
{
    switch (TYPE) {
    case FS_REAL: break;
    }
    return load((const real *)p + index);
}

/* One k of a chain; the panels move on to the next. */
INLINE void microkernel_step(const enum fs_weight_type TYPE, const int ROWS, const int PANELS,
                             const int VECTORS, const ptrdiff_t stride, const ptrdiff_t x_stride, vec *sums,
                             const real *const *row, const char **panel, ptrdiff_t k)
{
    /* Of weights and inputs, the fewer stand in registers and the others pass through one: 4 rows of 3 vectors
     * fill 16 registers that way, and the other way would spill a sum at every k. */
    if (ROWS > PANELS * VECTORS) {
        vec weight[MAX_PANELS * 4];
#pragma GCC unroll 16
        for (int i = 0; i < PANELS * VECTORS; i++)
            weight[i] = load_weights(TYPE, panel[i / VECTORS], i % VECTORS * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            vec input = broadcast(row[r][k * x_stride]);
#pragma GCC unroll 16
            for (int i = 0; i < PANELS * VECTORS; i++)
                sums[r * PANELS * VECTORS + i] = fma_(input, weight[i], sums[r * PANELS * VECTORS + i]);
        }
    } else {
        vec input[MAX_ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
            input[r] = broadcast(row[r][k * x_stride]);
#pragma GCC unroll 16
        for (int i = 0; i < PANELS * VECTORS; i++) {
            vec weight = load_weights(TYPE, panel[i / VECTORS], i % VECTORS * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
                sums[r * PANELS * VECTORS + i] = fma_(input[r], weight, sums[r * PANELS * VECTORS + i]);
        }
    }
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++)
        panel[p] += stride * weight_bytes(TYPE);
}

/*
 * sums[row][panel][v] += sum over k, in order, of x[row][k] * weights[panel][k][v]
 *
 * TYPE, ROWS, PANELS and VECTORS are constants where this is inlined: the loops over them must vanish, or the compiler
 * keeps the sums in memory, at a fifth of the speed. Panels lie `panel_size` weights apart and their rows `stride`, of
 * which the first VECTORS * LANES are used. From one k to the next, x moves on by `x_stride` reals. What lies from
 * `ahead` on is fetched into the second cache meanwhile, a line or two at every k; NULL, constant: nothing is.
 */
INLINE void microkernel_ahead(const enum fs_weight_type TYPE, const int ROWS, const int PANELS,
                              const int VECTORS, const ptrdiff_t stride, const ptrdiff_t x_stride, vec *sums,
                              const void *const *x, const void *weights, ptrdiff_t panel_size, ptrdiff_t k_size,
                              const char *ahead)
{
    const real *row[MAX_ROWS];
    const char *panel[MAX_PANELS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
        row[r] = x[r];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++)
        panel[p] = (const char *)weights + p * panel_size * weight_bytes(TYPE);
    /* Several k at once where there are registers: what moves the pointers takes slots that multiply-adds could have. */
#if FS_VECTOR_BYTES == 64
#pragma GCC unroll 4
#endif
    for (ptrdiff_t k = 0; k < k_size; k++) {
        if (ahead)
            __builtin_prefetch(ahead + k * LINES_AHEAD(ROWS) * CACHE_LINE, 0, 2);
        if (ahead && LINES_AHEAD(ROWS) > 1)
            __builtin_prefetch(ahead + (k * LINES_AHEAD(ROWS) + 1) * CACHE_LINE, 0, 2);
        microkernel_step(TYPE, ROWS, PANELS, VECTORS, stride, x_stride, sums, row, panel, k);
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
