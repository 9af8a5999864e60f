/*
 * The fused step: a tile of pre-activations, and what an epilogue makes of them before anything is stored.
 *
 * A kernel of the table is `step` with its epilogues: those of the cells are in cells/, that of plain products in plain.h.
 */
#ifndef FASTSEQ_STEP_H
#define FASTSEQ_STEP_H

#include "kernels.h"
#include "microkernel.h"
#include "units.h"
#include "vec_math.h"

enum step_kind {
    PLAIN, /* one gate a unit, 4 blocks of units to a panel                                  */
    PRODUCT, /* the input part alone, stored as it lies in `init` of a later step              */
    FUSED, /* several gates a unit                                                           */
    FUSED_APART /* the same; of the last gate, the input part and the state part are summed apart */
};

/*
 * What a kernel makes of the sums of one row and one panel, a[vectors]. `apart`, of FUSED_APART: the input part of the
 * last gate, whose state part is the last of `a`. Where a kernel has two epilogues, the first may leave values in `a`.
 */
typedef void (*tile_epilogue)(const fs_step *s, ptrdiff_t row, ptrdiff_t panel, int vectors, vec *a,
                              const vec *apart);

/* One gate a unit: defined in plain.h, and the main kernel of the RNN. */
static void plain(const fs_step *s);

/*
 * ROWS rows from `row` on, PANELS panels from `panel` on. The arguments before `s` are constants where this is
 * inlined; SECOND may be NULL.
 */
INLINE void step_tile(const enum step_kind KIND, const tile_epilogue FIRST, const tile_epilogue SECOND,
                      const int ROWS, const int PANELS, const int VECTORS, const int STRIDE, const fs_step *s,
                      ptrdiff_t row, ptrdiff_t panel, const char *ahead)
{
    const fs_weights *w = s->weights;
    const ptrdiff_t panel_row = STRIDE * LANES;
    vec sums[MAX_TILE];
    vec apart[MAX_ROWS];

#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                sums[(r * PANELS + p) * VECTORS + v] =
                    load((const real *)s->init[row + r] + (panel + p) * panel_row + v * LANES);

    if (s->with_x)
        microkernel(FS_REAL, ROWS, PANELS, VECTORS, STRIDE, 1, sums, s->x + row,
                    (const real *)w->x + panel * w->x_size * panel_row, w->x_size * panel_row, w->x_size);
    if (KIND == FUSED_APART) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; p++) {
                apart[r * PANELS + p] = sums[(r * PANELS + p) * VECTORS + VECTORS - 1];
                sums[(r * PANELS + p) * VECTORS + VECTORS - 1] =
                    load((const real *)w->h_bias + (panel + p) * LANES);
            }
    }
    if (KIND != PRODUCT)
        microkernel_ahead(FS_REAL, ROWS, PANELS, VECTORS, panel_row, 1, sums, s->h + row,
                          (const real *)w->h + panel * w->h_size * panel_row, w->h_size * panel_row, w->h_size,
                          ahead);

    /* What is stored as it is, or added, needs no more than its registers. */
    if (KIND == PLAIN && PANELS == 1 && !s->back && (s->epilogue == FS_IDENTITY || s->epilogue == FS_ADD) &&
        (4 * panel + VECTORS) * LANES <= w->units) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            real *out = (real *)s->out[row + r] + 4 * panel * LANES;
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                const vec h = sums[r * VECTORS + v];
                store(out + v * LANES, s->epilogue == FS_ADD ? h + load(out + v * LANES) : h);
            }
        }
        return;
    }

    /*
     * The gates are loops over what the tile holds, so the sums leave their registers here, once a step. A cell may
     * take two loops: within one, no row waits for itself, and the processor works on several at once.
     */
    vec a[MAX_TILE];
#pragma GCC unroll 24
    for (int i = 0; i < ROWS * PANELS * VECTORS; i++)
        a[i] = sums[i];
    for (int i = 0; i < ROWS * PANELS; i++)
        FIRST(s, row + i / PANELS, panel + i % PANELS, VECTORS, a + i * VECTORS,
              KIND == FUSED_APART ? apart + i : NULL);
    if (SECOND)
        for (int i = 0; i < ROWS * PANELS; i++)
            SECOND(s, row + i / PANELS, panel + i % PANELS, VECTORS, a + i * VECTORS, NULL);
}

/*
 * All rows against one panel. The tiles fetch the next panel meanwhile: one line of each of its rows, or two, which is
 * one of STRIDE parts of it or two. A product of the input part alone has few rows, and its panels lie in `x`.
 */
INLINE void step_panel(const enum step_kind KIND, const tile_epilogue FIRST, const tile_epilogue SECOND,
                       const int VECTORS, const int STRIDE, const fs_step *s, ptrdiff_t panel)
{
    const int limit = STRIDE == 3 ? ROWS_OF_3 : ROWS_OF_4;
    const ptrdiff_t k_size = s->weights->h_size, next = panel + 1 < s->last ? panel + 1 : panel;
    const char *base =
        KIND == PRODUCT ? NULL : (const char *)((const real *)s->weights->h + next * k_size * STRIDE * LANES);
    const char *ahead = base;
    ptrdiff_t tile = 0;
    for (ptrdiff_t row = 0, n; row < s->rows; row += n) {
        n = tile_height(s->rows - row, limit);
        if (KIND != PRODUCT)
            ahead = base + tile++ * LINES_AHEAD(n) % STRIDE * k_size * CACHE_LINE;
        switch (n) {
        case 1: step_tile(KIND, FIRST, SECOND, 1, 1, VECTORS, STRIDE, s, row, panel, ahead); break;
        case 2: step_tile(KIND, FIRST, SECOND, 2, 1, VECTORS, STRIDE, s, row, panel, ahead); break;
        case 3: step_tile(KIND, FIRST, SECOND, 3, 1, VECTORS, STRIDE, s, row, panel, ahead); break;
        case 4:
            if (limit >= 4)
                step_tile(KIND, FIRST, SECOND, 4, 1, VECTORS, STRIDE, s, row, panel, ahead);
            break;
        case 5:
            if (limit >= 5)
                step_tile(KIND, FIRST, SECOND, 5, 1, VECTORS, STRIDE, s, row, panel, ahead);
            break;
        case 6:
            if (limit >= 6)
                step_tile(KIND, FIRST, SECOND, 6, 1, VECTORS, STRIDE, s, row, panel, ahead);
            break;
        case 7:
            if (limit >= 7)
                step_tile(KIND, FIRST, SECOND, 7, 1, VECTORS, STRIDE, s, row, panel, ahead);
            break;
        case 8:
            if (limit >= 8)
                step_tile(KIND, FIRST, SECOND, 8, 1, VECTORS, STRIDE, s, row, panel, ahead);
            break;
        }
    }
}

#if FS_REAL_BYTES == 4
/* sums[row][panel][vector] += the products of the input part or the state part. */
INLINE void add_narrow_product(const int VECTORS, const fs_step *s, int of_x, ptrdiff_t row, ptrdiff_t rows,
                               ptrdiff_t panel, ptrdiff_t panels, vec *sums)
{
    const fs_weights *w = s->weights;
    const ptrdiff_t k_size = of_x ? w->x_size : w->h_size;
    const ptrdiff_t at = panel * VECTORS * LANES, row_bytes = w->narrow->row_bytes(w->type, k_size);
    const float *scales = of_x ? w->x_scales : w->h_scales;
    const int32_t *offsets = of_x ? w->x_offsets : w->h_offsets;
    fs_narrow_product p = {
        .n_rows = rows,
        .panels = panels,
        .words = w->narrow->words(w->type, k_size),
        .vectors = VECTORS,
        .rows = (const char *)(of_x ? s->narrow_x : s->narrow_h) + row * row_bytes,
        .row_bytes = row_bytes,
        .scales = scales ? scales + at : NULL,
        .offsets = offsets ? offsets + at : NULL,
        .out = sums,
    };
    p.weights = (const int32_t *)(of_x ? w->x : w->h) + at * p.words;
    w->narrow->product(w->type, &p);
}

/* Some rows against some panels, as `step_tile`. */
INLINE void narrow_step_tile(const enum step_kind KIND, const tile_epilogue FIRST, const tile_epilogue SECOND,
                             const int VECTORS, const fs_step *s, ptrdiff_t row, ptrdiff_t rows,
                             ptrdiff_t panel, ptrdiff_t panels)
{
    const fs_weights *w = s->weights;
    const ptrdiff_t tiles = rows * panels, panel_row = (ptrdiff_t)VECTORS * LANES;
    const ptrdiff_t blocks = (w->units + LANES - 1) / LANES;
    vec sums[NARROW_ROWS * 4], apart[NARROW_ROWS];
    for (ptrdiff_t i = 0; i < tiles; i++)
        for (int v = 0; v < VECTORS; v++)
            sums[i * VECTORS + v] =
                load((const real *)s->init[row + i / panels] + (panel + i % panels) * panel_row + v * LANES);
    if (s->with_x)
        add_narrow_product(VECTORS, s, 1, row, rows, panel, panels, sums);
    if (KIND == FUSED_APART)
        for (ptrdiff_t i = 0; i < tiles; i++) {
            apart[i] = sums[i * VECTORS + VECTORS - 1];
            sums[i * VECTORS + VECTORS - 1] = load((const real *)w->h_bias + (panel + i % panels) * LANES);
        }
    if (KIND != PRODUCT)
        add_narrow_product(VECTORS, s, 0, row, rows, panel, panels, sums);
    for (int second = 0; second < (SECOND ? 2 : 1); second++)
        for (ptrdiff_t i = 0; i < tiles; i++) {
            const ptrdiff_t of_panel = panel + i % panels;
            /* The last panel of a plain step may hold fewer than 4 blocks of units. */
            const ptrdiff_t left = KIND == PLAIN ? blocks - of_panel * 4 : VECTORS;
            (second ? SECOND : FIRST)(s, row + i / panels, of_panel, left < VECTORS ? (int)left : VECTORS,
                                      sums + i * VECTORS, KIND == FUSED_APART ? apart + i : NULL);
        }
}

/* `step`, of narrow weights. */
INLINE void narrow_step(const enum step_kind KIND, const tile_epilogue FIRST, const tile_epilogue SECOND,
                        const int VECTORS, const fs_step *s)
{
    const fs_weights *w = s->weights;
    const int limit = s->rows == 1 ? 12 / VECTORS : 1;
    if (w->narrow->begin)
        w->narrow->begin(w->type, s->rows);
    for (ptrdiff_t panel = s->first, panels; panel < s->last; panel += panels) {
        panels = s->last - panel < limit ? s->last - panel : limit;
        for (ptrdiff_t row = 0, rows; row < s->rows; row += rows) {
            rows = tile_height(s->rows - row, NARROW_ROWS);
            narrow_step_tile(KIND, FIRST, SECOND, VECTORS, s, row, rows, panel, panels);
        }
    }
    if (w->narrow->end)
        w->narrow->end(w->type, s->rows);
}
#endif

INLINE void step(const enum step_kind KIND, const tile_epilogue FIRST, const tile_epilogue SECOND,
                 const int VECTORS, const fs_step *s)
{
    const fs_weights *w = s->weights;
    ptrdiff_t panel = s->first;
#if FS_REAL_BYTES == 4
    if (w->narrow) {
        narrow_step(KIND, FIRST, SECOND, VECTORS, s);
        return;
    }
#endif
    /* The last panel of a plain step may hold fewer than 4 blocks of units. */
    const ptrdiff_t last_blocks = (w->units + LANES - 1) / LANES - (w->panels - 1) * 4;
    const int ragged = KIND == PLAIN && s->last == w->panels && last_blocks < 4;
    const ptrdiff_t whole = s->last - ragged;

    if (s->rows == 1) {
        /* A single row reads weights as fast as the cache gives them: from several panels at once, because few
         * sums wait on themselves and one stream of memory waits on the prefetcher. */
        const int limit = 12 / VECTORS;
        for (; panel + limit <= whole; panel += limit)
            step_tile(KIND, FIRST, SECOND, 1, limit, VECTORS, VECTORS, s, 0, panel, NULL);
        for (; panel + 2 <= whole; panel += 2)
            step_tile(KIND, FIRST, SECOND, 1, 2, VECTORS, VECTORS, s, 0, panel, NULL);
    }
    for (; panel < whole; panel++)
        step_panel(KIND, FIRST, SECOND, VECTORS, VECTORS, s, panel);
    if (ragged && panel < s->last)
        switch (last_blocks) {
        case 1: step_panel(KIND, FIRST, SECOND, 1, VECTORS, s, panel); break;
        case 2: step_panel(KIND, FIRST, SECOND, 2, VECTORS, s, panel); break;
        case 3: step_panel(KIND, FIRST, SECOND, 3, VECTORS, s, panel); break;
        }
}

#endif
