/*
 * Steps of one gate a unit: every dense product, the RNN, second products of cells, and all backward steps.
 */
#ifndef FASTSEQ_PLAIN_H
#define FASTSEQ_PLAIN_H

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "step.h"

/* A backward step, of `vectors` blocks of units of one row; see back.h. */
static void backward_epilogue(const fs_step *s, ptrdiff_t row, ptrdiff_t panel, int vectors, const vec *a)
{
    const fs_back *b = s->back;
    const ptrdiff_t units = s->weights->units;
    for (int v = 0; v < vectors; v++) {
        const ptrdiff_t unit = (panel * 4 + v) * LANES;
        vec dh = a[v];
        if (b->dy) {
            dh += load_units(b->dy[row], unit, units);
            fetch(b->dy[row], unit, b->dy_next);
        }
        if (b->dh_total)
            store_units(b->dh_total[row], dh, unit, units);
        switch (s->epilogue) {
        case FS_BACK_LSTM: back_lstm(s, row, unit, dh); break;
        case FS_BACK_GRU_AFTER: back_gru_after(s, row, unit, dh); break;
        case FS_BACK_GRU_OUTPUT: back_gru_output(s, row, unit, dh); break;
        case FS_BACK_GRU_RESET: back_gru_reset(s, row, unit, dh); break;
        case FS_BACK_TANH:
        case FS_BACK_RELU:
        case FS_BACK_SIGMOID: back_rnn(s, row, unit, dh); break;
        default: store_units(s->out[row], dh, unit, units);
        }
    }
}

/* Either GELU: that of narrow weights where they are. */
INLINE vec gelu_after(const fs_step *s, vec a)
{
#if FS_REAL_BYTES == 4
    if (s->weights->narrow)
        return s->epilogue == FS_GELU ? gelu_near(a) : gelu_tanh_near(a);
#endif
    return s->epilogue == FS_GELU ? gelu_(a) : gelu_tanh_(a);
}

/* h = f(a); what f is, the step says */
static inline void plain_epilogue(const fs_step *s, ptrdiff_t row, ptrdiff_t panel, int vectors, vec *a,
                                  const vec *apart)
{
    const ptrdiff_t units = s->weights->units;
    (void)apart;
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
        case FS_GELU:
        case FS_GELU_TANH: h = gelu_after(s, h); break;
        case FS_BLEND: h = gru_blend(s, row, unit, h); break;
        default: break;
        }
        store_units(s->out[row], h, unit, units);
    }
}

static void plain(const fs_step *s)
{
    step(PLAIN, plain_epilogue, NULL, 4, s);
}

/* The sums as they are, whole panels. */
static inline void product_epilogue(const fs_step *s, ptrdiff_t row, ptrdiff_t panel, int vectors, vec *a,
                                    const vec *apart)
{
    (void)apart;
    for (int v = 0; v < vectors; v++)
        store((real *)s->out[row] + (panel * vectors + v) * LANES, a[v]);
}

static void panels_product(const fs_step *s, int vectors)
{
    if (vectors == 3)
        step(PRODUCT, product_epilogue, NULL, 3, s);
    else
        step(PRODUCT, product_epilogue, NULL, 4, s);
}

#endif
