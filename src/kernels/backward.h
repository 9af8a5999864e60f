/*
 * What each cell does with the gradient of its output: the backward twins of the finish_* functions in cells.h.
 *
 * The tile before them has summed, from `init` on, the gradient that comes back through the recurrent weights; here
 * the gradient of the output at this step joins it, and the gradients of the pre-activations come out. A name d<a> is
 * the gradient of the loss with respect to <a>.
 */
#ifndef FASTSEQ_BACKWARD_H
#define FASTSEQ_BACKWARD_H

#include "vec_math.h"
#include "kernels.h"
#include "units.h"

INLINE void fetch_gates(const fs_step *s, int gates, ptrdiff_t row, ptrdiff_t unit)
{
    for (int gate = 0; gate < gates; gate++)
        fetch(s->back->gates[row], unit + gate * s->weights->units, s->back->gates_next);
}

/* h = tanh(a)      da = dh (1 - h^2)
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

/* h = o tanh(c)                     do = dh tanh(c), and dc += dh o (1 - tanh(c)^2)
 * c = f c' + i g                    di = dc g   df = dc c'   dg = dc i   dc' = dc f
 * sigmoid(a), or tanh(a) for g      da = d i (1 - i), or dg (1 - g^2) */
INLINE void back_lstm(const fs_step *s, ptrdiff_t row, ptrdiff_t unit, vec dh)
{
    const fs_back *b = s->back;
    const ptrdiff_t units = s->weights->units;
    const vec one = broadcast(1);
    fetch_gates(s, 4, row, unit);
    fetch(b->c_before[row], unit, b->c_next);
    const vec i = load_gate(b->gates[row], 0, unit, units), f = load_gate(b->gates[row], 1, unit, units);
    const vec g = load_gate(b->gates[row], 2, unit, units), o = load_gate(b->gates[row], 3, unit, units);
    const vec c_before = load_units(b->c_before[row], unit, units);
    const vec t = tanh_(load_units(b->c[row], unit, units));
    const vec dc = fma_(dh * o, fma_(-t, t, one), load_units(b->dc[row], unit, units));
    store_gate(s->out[row], 0, dc * g * (i * (one - i)), unit, units);
    store_gate(s->out[row], 1, dc * c_before * (f * (one - f)), unit, units);
    store_gate(s->out[row], 2, dc * i * fma_(-g, g, one), unit, units);
    store_gate(s->out[row], 3, dh * t * (o * (one - o)), unit, units);
    store_units(b->dc_before[row], dc * f, unit, units);
    if (b->middle)
        store_units(b->middle[row], o * t, unit, units);
    if (b->dc_total)
        store_units(b->dc_total[row], dc, unit, units);
}

/* h' = (1 - z) n + z h      dn = dh' (1 - z)   dz = dh' (h - n)   dh = dh' z
 * n = tanh(a_n)             da_n = dn (1 - n^2)
 * z = sigmoid(a_z)          da_z = dz z (1 - z) */
typedef struct {
    vec n, z, h;
} blend_gradients;

INLINE blend_gradients back_blend(vec dh, vec z, vec n, vec h_before)
{
    const vec one = broadcast(1);
    return (blend_gradients){dh * (one - z) * fma_(-n, n, one), dh * (h_before - n) * (z * (one - z)), dh * z};
}

/* a_n = x_n + r q, q = W_hn h + b_hn      dr = da_n q   dq = da_n r
 * The gradients leave in the order q, r, z, n: the state took part in the first three, the input in the last. */
INLINE void back_gru_after(const fs_step *s, ptrdiff_t row, ptrdiff_t unit, vec dh)
{
    const fs_back *b = s->back;
    const ptrdiff_t units = s->weights->units;
    fetch_gates(s, 4, row, unit);
    fetch(b->h_before[row], unit, b->h_next);
    const vec r = load_gate(b->gates[row], 0, unit, units), z = load_gate(b->gates[row], 1, unit, units);
    const vec n = load_gate(b->gates[row], 2, unit, units), q = load_gate(b->gates[row], 3, unit, units);
    const blend_gradients d = back_blend(dh, z, n, load_units(b->h_before[row], unit, units));
    store_gate(s->out[row], 0, d.n * r, unit, units);
    store_gate(s->out[row], 1, d.n * q * (r * (broadcast(1) - r)), unit, units);
    store_gate(s->out[row], 2, d.z, unit, units);
    store_gate(s->out[row], 3, d.n, unit, units);
    store_units(b->carry[row], d.h, unit, units);
}

/* The GRU that resets before, up to the product with the candidate's recurrent weights; order r, z, n. */
INLINE void back_gru_output(const fs_step *s, ptrdiff_t row, ptrdiff_t unit, vec dh)
{
    const fs_back *b = s->back;
    const ptrdiff_t units = s->weights->units;
    fetch_gates(s, 3, row, unit);
    fetch(b->h_before[row], unit, b->h_next);
    const vec z = load_gate(b->gates[row], 1, unit, units), n = load_gate(b->gates[row], 2, unit, units);
    const blend_gradients d = back_blend(dh, z, n, load_units(b->h_before[row], unit, units));
    store_gate(s->out[row], 1, d.z, unit, units);
    store_gate(s->out[row], 2, d.n, unit, units);
    store_units(b->carry[row], d.h, unit, units);
}

/* And from there on: the candidate saw r h      dr = d(r h) h   dh += d(r h) r */
INLINE void back_gru_reset(const fs_step *s, ptrdiff_t row, ptrdiff_t unit, vec d_rh)
{
    const fs_back *b = s->back;
    const ptrdiff_t units = s->weights->units;
    const vec r = load_gate(b->gates[row], 0, unit, units),
              h_before = load_units(b->h_before[row], unit, units);
    store_gate(s->out[row], 0, d_rh * h_before * (r * (broadcast(1) - r)), unit, units);
    store_units(b->carry[row], fma_(d_rh, r, load_units(b->carry[row], unit, units)), unit, units);
    store_units(b->middle[row], r * h_before, unit, units);
}

/* What a tile summed, `vectors` blocks of units of one row. */
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

#endif
