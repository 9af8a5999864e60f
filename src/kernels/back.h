/*
 * What the backward equations of the cells have in common.
 *
 * A backward step is a plain product (plain.h): the tile has summed, from `init` on, the gradient that comes back through
 * the recurrent weights; the gradient of the output at this step joins it, and a function back_<cell> of cells/ makes the
 * gradients of the pre-activations from the sum. A name d<a> is the gradient of the loss with respect to <a>.
 */
#ifndef FASTSEQ_BACK_H
#define FASTSEQ_BACK_H

#include "kernels.h"
#include "units.h"

/* Fetch the gates of the next step, which is the one before in time. */
INLINE void fetch_gates(const fs_step *s, int gates, ptrdiff_t row, ptrdiff_t unit)
{
    for (int gate = 0; gate < gates; gate++)
        fetch(s->back->gates[row], unit + gate * s->weights->units, s->back->gates_next);
}

#endif
