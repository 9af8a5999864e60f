/*
 * Long short-term memory. Gates i, f, g, o, in the order of the parameters; all four are on the tape.
 */
#ifndef FASTSEQ_CELL_LSTM_H
#define FASTSEQ_CELL_LSTM_H

#include "../back.h"
#include "../step.h"

/* i = sigmoid(a_i)  f = sigmoid(a_f)  g = tanh(a_g);  c = f c + i g, which takes the place of a_i */
static inline void lstm_cell_epilogue(const fs_step *s, ptrdiff_t row, ptrdiff_t panel, int vectors, vec *a,
                                      const vec *apart)
{
    const ptrdiff_t units = s->weights->units, unit = panel * LANES;
    vec i = sigmoid_(a[0]), f = sigmoid_(a[1]), g = tanh_(a[2]);
    (void)vectors, (void)apart;
    a[0] = fma_(f, load_units(s->c_before[row], unit, units), i * g);
    store_units(s->c[row], a[0], unit, units);
    if (s->gates) {
        store_gate(s->gates[row], 0, i, unit, units);
        store_gate(s->gates[row], 1, f, unit, units);
        store_gate(s->gates[row], 2, g, unit, units);
    }
}

/* o = sigmoid(a_o);  h = o tanh(c) */
static inline void lstm_output_epilogue(const fs_step *s, ptrdiff_t row, ptrdiff_t panel, int vectors, vec *a,
                                        const vec *apart)
{
    const ptrdiff_t units = s->weights->units, unit = panel * LANES;
    vec o = sigmoid_(a[3]);
    (void)vectors, (void)apart;
    store_units(s->out[row], o * tanh_(a[0]), unit, units);
    if (s->gates)
        store_gate(s->gates[row], 3, o, unit, units);
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

static void lstm(const fs_step *s)
{
    step(FUSED, lstm_cell_epilogue, lstm_output_epilogue, 4, s);
}

static const fs_cell lstm_cell = {
    .name = "lstm",
    .gates = 4,
    .has_c = 1,
    .tape_gates = 4,
    .gate_names = "ifgo",
    .blocks = 1,
    .main = lstm,
    .back = FS_BACK_LSTM,
};

#endif
