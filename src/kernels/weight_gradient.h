/*
 * The product of a weight gradient, C += A^T B, summed over the rows of A and B one after another, and the packing
 * of its two factors: A in groups of as many columns as a tile has rows, B in panels.
 */
#ifndef FASTSEQ_WEIGHT_GRADIENT_H
#define FASTSEQ_WEIGHT_GRADIENT_H

#include "microkernel.h"
#include "units.h"

enum { PACK_ROWS = 16 }; /* rows packed together: what they touch stays in the first cache */

/* [group][row][ROWS_OF_4]; columns past the last are zeros. */
static void pack_groups(const void *const *rows, ptrdiff_t n, ptrdiff_t columns, void *groups)
{
    for (ptrdiff_t first = 0; first < n; first += PACK_ROWS) {
        const ptrdiff_t last = first + PACK_ROWS < n ? first + PACK_ROWS : n;
        real *group = groups;
        for (ptrdiff_t column = 0; column < columns; column += ROWS_OF_4, group += n * ROWS_OF_4) {
            const ptrdiff_t left = columns - column;
            if (left >= ROWS_OF_4)
                for (ptrdiff_t k = first; k < last; k++)
                    memcpy(group + k * ROWS_OF_4, (const real *)rows[k] + column, ROWS_OF_4 * sizeof(real));
            else
                for (ptrdiff_t k = first; k < last; k++)
                    for (ptrdiff_t i = 0; i < ROWS_OF_4; i++)
                        group[k * ROWS_OF_4 + i] = i < left ? ((const real *)rows[k])[column + i] : 0;
        }
    }
}

/* [panel][row][4][lanes] for the panels [first, last); columns past the last are zeros. */
static void pack_panels(const void *const *rows, ptrdiff_t n, ptrdiff_t columns, ptrdiff_t first,
                        ptrdiff_t last, void *panels)
{
    for (ptrdiff_t panel = first; panel < last; panel++) {
        real *to = (real *)panels + panel * n * 4 * LANES;
        const ptrdiff_t column = panel * 4 * LANES;
        if (columns - column >= 4 * LANES)
            for (ptrdiff_t k = 0; k < n; k++, to += 4 * LANES)
                for (int v = 0; v < 4; v++)
                    store(to + v * LANES, load((const real *)rows[k] + column + v * LANES));
        else
            for (ptrdiff_t k = 0; k < n; k++, to += 4 * LANES)
                for (int v = 0; v < 4; v++) {
                    const ptrdiff_t unit = column + v * LANES;
                    store(to + v * LANES, unit < columns ? load_units(rows[k], unit, columns) : broadcast(0));
                }
    }
}

INLINE void weight_gradient_tile(const int VECTORS, ptrdiff_t n, const real *group, const real *panel, real *c,
                                 ptrdiff_t c_row)
{
    vec sums[ROWS_OF_4 * 4];
    const void *a[MAX_ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS_OF_4; r++) {
        a[r] = group + r;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sums[r * VECTORS + v] = load(c + r * c_row + v * LANES);
    }
    microkernel(FS_REAL, ROWS_OF_4, 1, VECTORS, 4, ROWS_OF_4, sums, a, panel, 0, n);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS_OF_4; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            store(c + r * c_row + v * LANES, sums[r * VECTORS + v]);
}

/* Some groups against one panel of `vectors` vectors in use; c has whole tiles, c_row reals from row to row. */
static void weight_gradient(ptrdiff_t n, ptrdiff_t groups, const void *a, const void *panel, int vectors,
                            void *c, ptrdiff_t c_row)
{
    for (ptrdiff_t g = 0; g < groups; g++) {
        const real *group = (const real *)a + g * n * ROWS_OF_4;
        real *tile = (real *)c + g * ROWS_OF_4 * c_row;
        /* What the next tile adds to comes from afar, in short pieces: have it here by then. */
        if (g + 1 < groups)
            for (int r = 0; r < ROWS_OF_4; r++)
                for (int v = 0; v < vectors; v++)
                    __builtin_prefetch(tile + (ROWS_OF_4 + r) * c_row + v * LANES, 1, 3);
        switch (vectors) {
        case 1: weight_gradient_tile(1, n, group, panel, tile, c_row); break;
        case 2: weight_gradient_tile(2, n, group, panel, tile, c_row); break;
        case 3: weight_gradient_tile(3, n, group, panel, tile, c_row); break;
        default: weight_gradient_tile(4, n, group, panel, tile, c_row);
        }
    }
}

INLINE void sum_vectors(const int VECTORS, const void *const *rows, ptrdiff_t n, ptrdiff_t column, real *sum)
{
    vec total[8];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++)
        total[v] = load(sum + column + v * LANES);
    for (ptrdiff_t k = 0; k < n; k++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++)
            total[v] += load((const real *)rows[k] + column + v * LANES);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++)
        store(sum + column + v * LANES, total[v]);
}

/* sum[i] += row[i] for every row, one after another, and the columns [first, last) */
static void sum_rows(const void *const *rows, ptrdiff_t n, ptrdiff_t first, ptrdiff_t last, void *sum)
{
    ptrdiff_t column = first;
    for (; column + 8 * LANES <= last; column += 8 * LANES)
        sum_vectors(8, rows, n, column, sum);
    for (; column + LANES <= last; column += LANES)
        sum_vectors(1, rows, n, column, sum);
    if (column < last) {
        vec total = load_units(sum, column, last);
        for (ptrdiff_t k = 0; k < n; k++)
            total += load_units(rows[k], column, last);
        store_units(sum, total, column, last);
    }
}

#endif
