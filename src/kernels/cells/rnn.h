/*
 * The plain RNN: h' = f(W_ih x + b_ih + W_hh h + b_hh), f being tanh, relu or sigmoid.
 */
#ifndef FASTSEQ_CELL_RNN_H
#define FASTSEQ_CELL_RNN_H

#include "../back.h"
#include "../step.h"

/* Forward: a plain product whose epilogue is f (plain.h). Backward, from h after the step:
 *
 * h = tanh(a)      da = dh (1 - h^2)
 * h = max(a, 0)    da = dh where not h <= 0, so that NaN stays
 * h = sigmoid(a)   da = dh h (1 - h) */
INLINE void back_rnn(const fs_step *s, ptrdiff_t row, ptrdiff_t unit, vec dh)
{
    const ptrdiff_t units = s->weights->units;
    const vec h = load_units(s->back->h[row], unit, units);
    vec da;
    fetch(s->back->h[row], unit, s->back->h_next);
    if (s->epilogue == FS_BACK_TANH)
        da = dh * fma_(-h, h, broadcast(1));
    else if (s->epilogue == FS_BACK_RELU)
        da = choose(h <= broadcast(0), broadcast(0), dh);
    else
        da = dh * h * (broadcast(1) - h);
    store_units(s->out[row], da, unit, units);
}

#define RNN_CELL(NAME, F, BACK) \
    {.name = NAME, .gates = 1, .gate_names = "", .blocks = 4, .main = plain, .epilogue = F, .back = BACK}

static const fs_cell rnn_tanh_cell = RNN_CELL("rnn_tanh", FS_TANH, FS_BACK_TANH);
static const fs_cell rnn_relu_cell = RNN_CELL("rnn_relu", FS_RELU, FS_BACK_RELU);
static const fs_cell rnn_sigmoid_cell = RNN_CELL("rnn_sigmoid", FS_SIGMOID, FS_BACK_SIGMOID);

#endif
