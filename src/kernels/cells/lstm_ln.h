/*
 * The layer-normalised LSTM: J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer normalization", arXiv:1607.06450, equations 20 to
 * 22. Gates i, f, g, o, in the order of the parameters.
 *
 * The norms of the pre-activations take the four gates of a row together, so this cell continues from whole rows.
 */
#ifndef FASTSEQ_CELL_LSTM_LN_H
#define FASTSEQ_CELL_LSTM_LN_H

#include "../rows.h"
#include "../step.h"

#define LN_EPS 1e-5

/* Places in fs_step.vectors. */
enum { LN_BIAS, LN_X_GAIN, LN_H_GAIN, LN_C_GAIN, LN_C_BIAS };
/* Vectors on the tape: the gates, t, and the four gates' input part and state part as the products gave them. */
enum { LN_I, LN_F, LN_G, LN_O, LN_T, LN_X, LN_H = LN_X + 4, LN_TAPE = LN_H + 4 };
/* Reals behind them: mean and scale of each norm. */
enum { LN_OF_X, LN_OF_H = 2, LN_OF_C = 4, LN_STATS = 6 };
/* Columns of the gradients: see fs_cell. */
enum {
    LN_D_H,
    LN_D_X = 4,
    LN_D_BIAS = 8,
    LN_D_X_GAIN = 12,
    LN_D_H_GAIN = 16,
    LN_D_C_GAIN = 20,
    LN_D_C_BIAS = 21
};

/* a = LN(W_ih x) gain_x + LN(W_hh h) gain_h + b
 * i = sigmoid(a_i)  f = sigmoid(a_f)  g = tanh(a_g)  o = sigmoid(a_o);  c = f c + i g
 * t = tanh(LN(c) gain_c + bias_c);  h = o t */
static void lstm_ln_row(const fs_step *s, ptrdiff_t row)
{
    const ptrdiff_t units = s->weights->units / 4;
    const real *bias = s->vectors[LN_BIAS];
    real *x = s->z[row], *h = s->state_part[row], *tape = s->gates ? s->gates[row] : NULL;
    real unkept[LN_STATS], *stats = tape ? tape + LN_TAPE * units : unkept;
    if (tape) {
        memcpy(tape + LN_X * units, s->init[row], (size_t)(4 * units) * sizeof(real));
        memcpy(tape + LN_H * units, h, (size_t)(4 * units) * sizeof(real));
    }
    layer_norm(1, 4 * units, LN_EPS, s->init[row], s->vectors[LN_X_GAIN], NULL, x, stats + LN_OF_X,
               stats + LN_OF_X + 1);
    layer_norm(1, 4 * units, LN_EPS, h, s->vectors[LN_H_GAIN], NULL, h, stats + LN_OF_H, stats + LN_OF_H + 1);
    for (ptrdiff_t unit = 0; unit < units; unit += LANES) {
        vec a[4];
        for (int gate = 0; gate < 4; gate++)
            a[gate] = load_gate(x, gate, unit, units) + load_gate(h, gate, unit, units) +
                      load_gate(bias, gate, unit, units);
        const vec i = sigmoid_(a[0]), f = sigmoid_(a[1]), g = tanh_(a[2]), o = sigmoid_(a[3]);
        store_units(s->c[row], fma_(f, load_units(s->c_before[row], unit, units), i * g), unit, units);
        store_gate(x, LN_O, o, unit, units);
        if (tape) {
            store_gate(tape, LN_I, i, unit, units);
            store_gate(tape, LN_F, f, unit, units);
            store_gate(tape, LN_G, g, unit, units);
            store_gate(tape, LN_O, o, unit, units);
        }
    }
    layer_norm(1, units, LN_EPS, s->c[row], s->vectors[LN_C_GAIN], s->vectors[LN_C_BIAS], h, stats + LN_OF_C,
               stats + LN_OF_C + 1);
    for (ptrdiff_t unit = 0; unit < units; unit += LANES) {
        const vec t = tanh_(load_units(h, unit, units));
        store_units(s->out[row], load_gate(x, LN_O, unit, units) * t, unit, units);
        if (tape)
            store_gate(tape, LN_T, t, unit, units);
    }
}

/* With x^ = (x - mean) scale, of the statistics of the forward:  dgain = dy x^, of one row */
INLINE void back_gain(ptrdiff_t n, const real *x, const real *stats, const real *dy, real *dgain)
{
    const vec mean = broadcast(stats[0]), scale = broadcast(stats[1]);
    FOR_ROW(n, {
        (void)accumulator;
        store_row(dgain + i, left, load_row(dy + i, left, 0) * ((load_row(x + i, left, 0) - mean) * scale));
    });
}

/* h = o t                           do = dh t   dt = dh o
 * t = tanh(LN(c) gain_c + bias_c)   dbias_c = dt (1 - t^2), and dc += what comes back through the norm
 * c = f c' + i g                    di = dc g   df = dc c'   dg = dc i   dc' = dc f
 * sigmoid(a), or tanh(a) for g      da = d i (1 - i), or dg (1 - g^2)
 * a = LN(x) gain_x + LN(h) gain_h + b   db = da, and dx and dh come back through the norms */
static void back_lstm_ln_row(const fs_step *s, ptrdiff_t row)
{
    const fs_back *b = s->back;
    const ptrdiff_t units = s->weights->units;
    const vec one = broadcast(1);
    const real *tape = b->gates[row], *stats = tape + LN_TAPE * units, *c = b->c[row];
    const real *x = tape + LN_X * units, *h = tape + LN_H * units;
    real *out = s->out[row], *da = out + LN_D_BIAS * units;
    real *dgain_c = out + LN_D_C_GAIN * units, *dbias_c = out + LN_D_C_BIAS * units;
    for (ptrdiff_t unit = 0; unit < units; unit += LANES) {
        const vec dh = load_units(s->h[row], unit, units);
        const vec o = load_gate(tape, LN_O, unit, units), t = load_gate(tape, LN_T, unit, units);
        store_gate(da, 3, dh * t * (o * (one - o)), unit, units);
        store_units(dbias_c, dh * o * fma_(-t, t, one), unit, units);
    }
    real *through = dgain_c; /* until that has its own place */
    layer_norm_dx(1, units, c, s->vectors[LN_C_GAIN], stats + LN_OF_C, stats + LN_OF_C + 1, dbias_c, through);
    for (ptrdiff_t unit = 0; unit < units; unit += LANES) {
        const vec i = load_gate(tape, LN_I, unit, units), f = load_gate(tape, LN_F, unit, units);
        const vec g = load_gate(tape, LN_G, unit, units), before = load_units(b->c_before[row], unit, units);
        const vec dc = load_units(b->dc[row], unit, units) + load_units(through, unit, units);
        store_gate(da, 0, dc * g * (i * (one - i)), unit, units);
        store_gate(da, 1, dc * before * (f * (one - f)), unit, units);
        store_gate(da, 2, dc * i * fma_(-g, g, one), unit, units);
        store_units(b->dc_before[row], dc * f, unit, units);
        if (b->dc_total)
            store_units(b->dc_total[row], dc, unit, units);
    }
    back_gain(units, c, stats + LN_OF_C, dbias_c, dgain_c);
    back_gain(4 * units, x, stats + LN_OF_X, da, out + LN_D_X_GAIN * units);
    back_gain(4 * units, h, stats + LN_OF_H, da, out + LN_D_H_GAIN * units);
    layer_norm_dx(1, 4 * units, x, s->vectors[LN_X_GAIN], stats + LN_OF_X, stats + LN_OF_X + 1, da,
                  out + LN_D_X * units);
    layer_norm_dx(1, 4 * units, h, s->vectors[LN_H_GAIN], stats + LN_OF_H, stats + LN_OF_H + 1, da,
                  out + LN_D_H * units);
}

static void lstm_ln_rows(const fs_step *s, ptrdiff_t first, ptrdiff_t last)
{
    for (ptrdiff_t row = first; row < last; row++)
        lstm_ln_row(s, row);
}

static void back_lstm_ln_rows(const fs_step *s, ptrdiff_t first, ptrdiff_t last)
{
    for (ptrdiff_t row = first; row < last; row++)
        back_lstm_ln_row(s, row);
}

static const fs_cell lstm_ln_cell = {
    .name = "lstm_ln",
    .gates = 4,
    .apart_gates = 4,
    .has_c = 1,
    .tape_gates = LN_TAPE,
    .tape_reals = LN_STATS,
    .gate_names = "ifgo",
    .blocks = 4,
    .main = plain,
    .back = FS_BACK_IDENTITY,
    .rows = lstm_ln_rows,
    .back_rows = back_lstm_ln_rows,
    .vectors = {4, 4, 1, 1}, /* gain_x, gain_h, gain_c, bias_c */
};

#endif
