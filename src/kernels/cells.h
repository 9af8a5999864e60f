/*
 * The fused steps: a tile of pre-activations, and what the cell makes of it before anything is stored.
 *
 * Each cell is one finish_* function, its equations above it; `step_tile` is what they share. Where there is a tape
 * (`gates`), they leave on it what their backward twin in backward.h needs.
 */
#ifndef FASTSEQ_CELLS_H
#define FASTSEQ_CELLS_H

#include "backward.h"
#include "vec_math.h"
#include "kernels.h"
#include "microkernel.h"
#include "units.h"

enum cell { PLAIN, PRODUCT, LSTM, GRU, GRU_GATES };

/* h = f(a); or the candidate of the GRU that resets before: n = tanh(a), h = (1 - z) n + z carry */
static inline void plain_epilogue(const fs_step *s, ptrdiff_t row, ptrdiff_t panel, int vectors, const vec *a)
{
    const ptrdiff_t units = s->weights->units;
    if (s->back) {
        backward_epilogue(s, row, panel, vectors, a);
        return;
    }
    for (int v = 0; v < vectors; v++) {
        ptrdiff_t unit = (panel * 4 + v) * LANES;
        vec h = a[v];
        switch (s->epilogue) {
        case FS_IDENTITY: break;
        case FS_TANH: h = tanh_(h); break;
        case FS_RELU: h = relu_(h); break;
        case FS_SIGMOID: h = sigmoid_(h); break;
        case FS_ADD: h += load_units(s->out[row], unit, units); break;
        case FS_GELU: h = gelu_(h); break;
        case FS_GELU_TANH: h = gelu_tanh_(h); break;
        case FS_BLEND: {
            vec n = tanh_(h), z = load_units(s->z[row], unit, units);
            h = fma_(z, load_units(s->carry[row], unit, units), (broadcast(1) - z) * n);
            if (s->gates)
                store_gate(s->gates[row], 2, n, unit, units);
            break;
        }
        default: break;
        }
        store_units(s->out[row], h, unit, units);
    }
}

/* i = sigmoid(a_i)  f = sigmoid(a_f)  g = tanh(a_g);  c = f c + i g, which takes the place of a_i */
static inline void lstm_cell_epilogue(const fs_step *s, ptrdiff_t row, ptrdiff_t panel, vec *a)
{
    const ptrdiff_t units = s->weights->units, unit = panel * LANES;
    vec i = sigmoid_(a[0]), f = sigmoid_(a[1]), g = tanh_(a[2]);
    a[0] = fma_(f, load_units(s->c_before[row], unit, units), i * g);
    store_units(s->c[row], a[0], unit, units);
    if (s->gates) {
        store_gate(s->gates[row], 0, i, unit, units);
        store_gate(s->gates[row], 1, f, unit, units);
        store_gate(s->gates[row], 2, g, unit, units);
    }
}

/* o = sigmoid(a_o);  h = o tanh(c) */
static inline void lstm_output_epilogue(const fs_step *s, ptrdiff_t row, ptrdiff_t panel, const vec *a)
{
    const ptrdiff_t units = s->weights->units, unit = panel * LANES;
    vec o = sigmoid_(a[3]);
    store_units(s->out[row], o * tanh_(a[0]), unit, units);
    if (s->gates)
        store_gate(s->gates[row], 3, o, unit, units);
}

/* r = sigmoid(a_r)  z = sigmoid(a_z), which takes the place of a_z;  a_n = x_n + r h_n, which takes that of h_n */
static inline void gru_gates_after_epilogue(const fs_step *s, ptrdiff_t row, ptrdiff_t panel, vec *a, vec x_n)
{
    const ptrdiff_t units = s->weights->units, unit = panel * LANES;
    vec r = sigmoid_(a[0]), h_n = a[2];
    a[1] = sigmoid_(a[1]);
    a[2] = fma_(r, h_n, x_n);
    if (s->gates) {
        store_gate(s->gates[row], 0, r, unit, units);
        store_gate(s->gates[row], 1, a[1], unit, units);
        store_gate(s->gates[row], 3, h_n, unit, units);
    }
}

/* n = tanh(a_n);  h = (1 - z) n + z h */
static inline void gru_output_epilogue(const fs_step *s, ptrdiff_t row, ptrdiff_t panel, const vec *a)
{
    const ptrdiff_t units = s->weights->units, unit = panel * LANES;
    vec z = a[1], n = tanh_(a[2]);
    vec h = fma_(z, load_units(s->carry[row], unit, units), (broadcast(1) - z) * n);
    store_units(s->out[row], h, unit, units);
    if (s->gates)
        store_gate(s->gates[row], 2, n, unit, units);
}

/* r = sigmoid(a_r)  z = sigmoid(a_z); z and r h are kept for the candidate */
static inline void gru_gates_epilogue(const fs_step *s, ptrdiff_t row, ptrdiff_t panel, const vec *a)
{
    const ptrdiff_t units = s->weights->units;
    for (int block = 0; block < 2; block++) {
        ptrdiff_t unit = (panel * 2 + block) * LANES;
        if (unit >= units)
            break;
        vec r = sigmoid_(a[2 * block]), z = sigmoid_(a[2 * block + 1]);
        store_units(s->z[row], z, unit, units);
        store_units(s->out[row], r * load_units(s->carry[row], unit, units), unit, units);
        if (s->gates) {
            store_gate(s->gates[row], 0, r, unit, units);
            store_gate(s->gates[row], 1, z, unit, units);
        }
    }
}

/*
 * ROWS rows from `row` on, PANELS panels from `panel` on. CELL, ROWS, PANELS, VECTORS and STRIDE are constants
 * where this is inlined.
 */
INLINE void step_tile(const int CELL, const int ROWS, const int PANELS, const int VECTORS, const int STRIDE,
                      const fs_step *s, ptrdiff_t row, ptrdiff_t panel, const char *ahead)
{
    const fs_weights *w = s->weights;
    const ptrdiff_t panel_row = STRIDE * LANES;
    vec sums[MAX_TILE];
    vec x_n[MAX_ROWS]; /* the GRU's candidate takes its input part apart from its recurrent part */

#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                sums[(r * PANELS + p) * VECTORS + v] =
                    load((const real *)s->init[row + r] + (panel + p) * panel_row + v * LANES);

    if (s->with_x)
        microkernel(ROWS, PANELS, VECTORS, STRIDE, 1, sums, s->x + row,
                    (const real *)w->x + panel * w->x_size * panel_row, w->x_size * panel_row, w->x_size);
    if (CELL == GRU) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; p++) {
                x_n[r * PANELS + p] = sums[(r * PANELS + p) * VECTORS + 2];
                sums[(r * PANELS + p) * VECTORS + 2] = load((const real *)w->h_bias + (panel + p) * LANES);
            }
    }
    if (CELL != PRODUCT)
        microkernel_ahead(ROWS, PANELS, VECTORS, panel_row, 1, sums, s->h + row,
                          (const real *)w->h + panel * w->h_size * panel_row, w->h_size * panel_row, w->h_size,
                          ahead);

    /* What is stored as it is, or added, needs no more than its registers. */
    if (CELL == PLAIN && PANELS == 1 && !s->back && (s->epilogue == FS_IDENTITY || s->epilogue == FS_ADD) &&
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
     * The gates are loops over what the tile holds, so the sums leave their registers here, once a step. The LSTM
     * and the GRU take two loops: within one, no row waits for itself, and the processor works on several at once.
     */
    vec a[MAX_TILE];
#pragma GCC unroll 24
    for (int i = 0; i < ROWS * PANELS * VECTORS; i++)
        a[i] = sums[i];
    for (int i = 0; i < ROWS * PANELS; i++) {
        const ptrdiff_t r = row + i / PANELS, p = panel + i % PANELS;
        switch (CELL) {
        case PLAIN: plain_epilogue(s, r, p, VECTORS, a + i * VECTORS); break;
        case LSTM: lstm_cell_epilogue(s, r, p, a + i * VECTORS); break;
        case GRU: gru_gates_after_epilogue(s, r, p, a + i * VECTORS, x_n[i]); break;
        case GRU_GATES: gru_gates_epilogue(s, r, p, a + i * VECTORS); break;
        case PRODUCT:
            for (int v = 0; v < VECTORS; v++)
                store((real *)s->out[r] + p * panel_row + v * LANES, a[i * VECTORS + v]);
        }
    }
    if (CELL == LSTM || CELL == GRU)
        for (int i = 0; i < ROWS * PANELS; i++) {
            const ptrdiff_t r = row + i / PANELS, p = panel + i % PANELS;
            if (CELL == LSTM)
                lstm_output_epilogue(s, r, p, a + i * VECTORS);
            else
                gru_output_epilogue(s, r, p, a + i * VECTORS);
        }
}

/* All rows against one panel. Of a plain cell, the tiles fetch the next panel meanwhile, a quarter or half of it each. */
INLINE void step_panel(const int CELL, const int VECTORS, const int STRIDE, const fs_step *s, ptrdiff_t panel)
{
    const int limit = STRIDE == 3 ? ROWS_OF_3 : ROWS_OF_4;
    const ptrdiff_t k_size = s->weights->h_size, next = panel + 1 < s->last ? panel + 1 : panel;
    const char *base =
        CELL == PLAIN ? (const char *)s->weights->h + next * k_size * STRIDE * LANES * (ptrdiff_t)sizeof(real)
                      : NULL;
    const char *ahead = base;
    ptrdiff_t tile = 0;
    for (ptrdiff_t row = 0, n; row < s->rows; row += n) {
        n = tile_height(s->rows - row, limit);
        if (CELL == PLAIN)
            ahead = base + tile++ * LINES_AHEAD(n) % 4 * k_size * CACHE_LINE;
        switch (n) {
        case 1: step_tile(CELL, 1, 1, VECTORS, STRIDE, s, row, panel, ahead); break;
        case 2: step_tile(CELL, 2, 1, VECTORS, STRIDE, s, row, panel, ahead); break;
        case 3: step_tile(CELL, 3, 1, VECTORS, STRIDE, s, row, panel, ahead); break;
        case 4:
            if (limit >= 4)
                step_tile(CELL, 4, 1, VECTORS, STRIDE, s, row, panel, ahead);
            break;
        case 5:
            if (limit >= 5)
                step_tile(CELL, 5, 1, VECTORS, STRIDE, s, row, panel, ahead);
            break;
        case 6:
            if (limit >= 6)
                step_tile(CELL, 6, 1, VECTORS, STRIDE, s, row, panel, ahead);
            break;
        case 7:
            if (limit >= 7)
                step_tile(CELL, 7, 1, VECTORS, STRIDE, s, row, panel, ahead);
            break;
        case 8:
            if (limit >= 8)
                step_tile(CELL, 8, 1, VECTORS, STRIDE, s, row, panel, ahead);
            break;
        }
    }
}

INLINE void step(const int CELL, const int VECTORS, const fs_step *s)
{
    const fs_weights *w = s->weights;
    ptrdiff_t panel = s->first;
    /* The last panel of a plain cell may hold fewer than 4 blocks of units. */
    const ptrdiff_t last_blocks = (w->units + LANES - 1) / LANES - (w->panels - 1) * 4;
    const int ragged = CELL == PLAIN && s->last == w->panels && last_blocks < 4;
    const ptrdiff_t whole = s->last - ragged;

    if (s->rows == 1) {
        /* A single row reads weights as fast as the cache gives them: from several panels at once, because few
         * sums wait on themselves and one stream of memory waits on the prefetcher. */
        const int limit = 12 / VECTORS;
        for (; panel + limit <= whole; panel += limit)
            step_tile(CELL, 1, limit, VECTORS, VECTORS, s, 0, panel, NULL);
        for (; panel + 2 <= whole; panel += 2)
            step_tile(CELL, 1, 2, VECTORS, VECTORS, s, 0, panel, NULL);
    }
    for (; panel < whole; panel++)
        step_panel(CELL, VECTORS, VECTORS, s, panel);
    if (ragged && panel < s->last)
        switch (last_blocks) {
        case 1: step_panel(CELL, 1, VECTORS, s, panel); break;
        case 2: step_panel(CELL, 2, VECTORS, s, panel); break;
        case 3: step_panel(CELL, 3, VECTORS, s, panel); break;
        }
}

#endif
