/*
 * The gated recurrent unit, with the reset gate after the recurrent product (PyTorch's) or before it (the paper's). Gates
 * r, z, n, in the order of the parameters.
 */
#ifndef FASTSEQ_CELL_GRU_H
#define FASTSEQ_CELL_GRU_H

#include "../back.h"
#include "../step.h"

/* Reset after. r = sigmoid(a_r)  z = sigmoid(a_z), which takes the place of a_z
 * a_n = x_n + r q, q = W_hn h + b_hn, whose place it takes */
static inline void gru_gates_after_epilogue(const fs_step *s, ptrdiff_t row, ptrdiff_t panel, int vectors,
                                            vec *a, const vec *x_n)
{
    const ptrdiff_t units = s->weights->units, unit = panel * LANES;
    vec r = sigmoid_(a[0]), q = a[2];
    (void)vectors;
    a[1] = sigmoid_(a[1]);
    a[2] = fma_(r, q, *x_n);
    if (s->gates) {
        store_gate(s->gates[row], 0, r, unit, units);
        store_gate(s->gates[row], 1, a[1], unit, units);
        store_gate(s->gates[row], 3, q, unit, units);
    }
}

/* n = tanh(a_n);  h = (1 - z) n + z h */
static inline void gru_output_epilogue(const fs_step *s, ptrdiff_t row, ptrdiff_t panel, int vectors, vec *a,
                                       const vec *apart)
{
    const ptrdiff_t units = s->weights->units, unit = panel * LANES;
    vec z = a[1], n = tanh_(a[2]);
    (void)vectors, (void)apart;
    vec h = fma_(z, load_units(s->carry[row], unit, units), (broadcast(1) - z) * n);
    store_units(s->out[row], h, unit, units);
    if (s->gates)
        store_gate(s->gates[row], 2, n, unit, units);
}

/* Reset before. r = sigmoid(a_r)  z = sigmoid(a_z); z and r h are kept for the candidate */
static inline void gru_gates_epilogue(const fs_step *s, ptrdiff_t row, ptrdiff_t panel, int vectors, vec *a,
                                      const vec *apart)
{
    const ptrdiff_t units = s->weights->units;
    (void)vectors, (void)apart;
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

/* Reset before, the candidate. n = tanh(a_n);  h = (1 - z) n + z h */
INLINE vec gru_blend(const fs_step *s, ptrdiff_t row, ptrdiff_t unit, vec a_n)
{
    const ptrdiff_t units = s->weights->units;
    vec n = tanh_(a_n), z = load_units(s->z[row], unit, units);
    vec h = fma_(z, load_units(s->carry[row], unit, units), (broadcast(1) - z) * n);
    if (s->gates)
        store_gate(s->gates[row], 2, n, unit, units);
    return h;
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

/* Reset after. a_n = x_n + r q      dr = da_n q   dq = da_n r
 * The gradients leave in the order q, r, z, n: the state took part in the first three, the input in the last three. */
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

/* Reset before, up to the product with the candidate's recurrent weights; the gradients leave in the order r, z, n. */
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

static void gru(const fs_step *s)
{
    step(FUSED_APART, gru_gates_after_epilogue, gru_output_epilogue, 3, s);
}

static void gru_gates(const fs_step *s)
{
    step(FUSED, gru_gates_epilogue, NULL, 4, s);
}

static const fs_cell gru_reset_after_cell = {
    .name = "gru_reset_after",
    .gates = 3,
    .apart_gates = 1,
    .carries = 1,
    .tape_gates = 4, /* r z n q */
    .gate_names = "rzn",
    .blocks = 1,
    .main = gru,
    .back = FS_BACK_GRU_AFTER,
};

static const fs_cell gru_reset_before_cell = {
    .name = "gru_reset_before",
    .gates = 3,
    .candidate_gates = 1,
    .carries = 1,
    .tape_gates = 3,
    .gate_names = "rzn",
    .blocks = 2,
    .main = gru_gates,
    .candidate_epilogue = FS_BLEND,
    .back = FS_BACK_GRU_OUTPUT,
    .back_candidate = FS_BACK_GRU_RESET,
};

#endif
