/*
 * Losses and their gradients, in one go over what is in the cache.
 */
#ifndef FASTSEQ_LOSSES_H
#define FASTSEQ_LOSSES_H

#include "functions.h"
#include "rows.h"

/*
 * One row of softmax cross-entropy after another. With m the largest logit, t the target and e_j = exp(x_j - m):
 *
 *     sums: others = sum over j /= t of e_j,  target = e_t,  offset = sum over j of q_j (x_j - m)
 *     gradient_j = scale (e_j / (target + others) - q_j)
 *
 * where q, the distribution wanted, is `smoothing` / n everywhere and 1 - smoothing more at t. The loss of the row,
 * log(target + others) - offset, is left to the caller, who has a logarithm. At the target, e_t / sum - 1 is taken as
 * -others / sum: where the prediction is nearly right, nothing cancels. A row whose target is negative does not count:
 * it is not read, its gradient is 0 and so is its loss.
 */
static void softmax_cross_entropy(ptrdiff_t rows, ptrdiff_t n, const void *x, const int64_t *targets,
                                  double smoothing, double scale, void *gradient, fs_softmax_sums *sums)
{
    ivec lane = {0};
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
    for (ptrdiff_t r = 0; r < rows; r++) {
        const real *row = (const real *)x + r * n;
        real *g = (real *)gradient + r * n;
        const ptrdiff_t t = targets[r];
        if (t < 0) {
            memset(g, 0, (size_t)n * sizeof(real));
            sums[r] = (fs_softmax_sums){0, 1, 0};
            continue;
        }
        const real lowest = (real)-__builtin_inf();
        vec high[ROW_CHAINS], chains[ROW_CHAINS] = {{0}};
        for (int i = 0; i < ROW_CHAINS; i++)
            high[i] = broadcast(lowest);
        FOR_ROW(i, n, high[chain] = at_least(load_row(row, i, n, lowest), high[chain]));
        const real m = most_of(at_least(at_least(high[0], high[1]), at_least(high[2], high[3])));

        FOR_ROW(i, n, {
            vec e = exp_(load_row(row, i, n, lowest) - broadcast(m));
            store_row(g, i, n, e);
            const integer at = t - i >= 0 && t - i < LANES ? (integer)(t - i) : -1;
            chains[chain] += choose(lane == ibroadcast(at), broadcast(0), e);
        });
        const double others = sum_of_chains(chains), target = g[t], sum = target + others;
        double offset = (1 - smoothing) * ((double)row[t] - m);
        if (smoothing != 0) {
            vec spread[ROW_CHAINS] = {{0}};
            FOR_ROW(i, n, spread[chain] += load_row(row, i, n, m) - broadcast(m));
            offset += smoothing / (double)n * sum_of_chains(spread);
        }
        sums[r] = (fs_softmax_sums){others, target, offset};

        const vec factor = broadcast((real)(scale / sum)),
                  share = broadcast((real)(scale * smoothing / (double)n));
        for (ptrdiff_t i = 0; i < n; i += LANES)
            store_row(g, i, n, load_row(g, i, n, 0) * factor - share);
        g[t] = (real)(scale * (smoothing - smoothing / (double)n - others / sum));
    }
}

/* The sum of the lanes of two rows of doubles, kept apart from what they are the doubles of. */
typedef double wide __attribute__((vector_size(8 * FS_VECTOR_BYTES / FS_REAL_BYTES)));

INLINE double sum_of_wide(const wide *sums)
{
    double sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += (*sums)[i];
    return sum;
}

/* log(1 + e) for 0 <= e <= 1: 2 artanh(s) with s = e / (2 + e) <= 1/3, which loses nothing where e is small */
INLINE vec log1p_(vec e)
{
#if FS_REAL_BYTES == 4
    enum { TERMS = 8 }; /* what is left out is below 2^-27 */
#else
    enum { TERMS = 17 }; /* and 2^-56 */
#endif
    vec s = e / (broadcast(2) + e), s2 = s * s;
    vec sum = broadcast((real)2 / (2 * TERMS - 1));
#pragma GCC unroll 16
    for (int i = TERMS - 2; i >= 1; i--)
        sum = fma_(sum, s2, broadcast((real)2 / (2 * i + 1)));
    return fma_(s * s2, sum, s + s);
}

enum elementwise { BINARY_CROSS_ENTROPY, SQUARED_ERROR, HUBER };

/*
 * Of each element: loss, added up in double, and d loss / dx times `scale`.
 *
 *     binary cross-entropy:  max(x, 0) - x t + log(1 + exp(-|x|));          sigmoid(x) - t
 *     squared error:         d^2, d = x - t;                                2 d
 *     Huber:                 d c - c^2 / 2, c = d cut to -delta .. delta;   c
 */
INLINE double elementwise(const int LOSS, ptrdiff_t n, const void *x, const void *targets, double delta,
                          double scale, void *gradient)
{
    const vec factor = broadcast((real)(LOSS == SQUARED_ERROR ? 2 * scale : scale)),
              cut = broadcast((real)delta);
    const ivec sign = (ivec)broadcast((real)-0.0);
    wide sums = {0};
    for (ptrdiff_t i = 0; i < n; i += LANES) {
        vec a = load_row(x, i, n, 0), t = load_row(targets, i, n, 0), d = a - t, loss, slope;
        if (LOSS == BINARY_CROSS_ENTROPY) {
            loss = (relu_(a) - a * t) + log1p_(exp_((vec)((ivec)a | sign)));
            slope = sigmoid_(a) - t;
            if (n - i < LANES) /* log 2, past the end */
                loss = load_part((const real *)&loss, n - i);
        } else if (LOSS == SQUARED_ERROR) {
            loss = d * d;
            slope = d;
        } else {
            slope = at_most(at_least(d, -cut), cut);
            loss = slope * (d - slope * broadcast((real)0.5));
        }
        sums += __builtin_convertvector(loss, wide);
        store_row(gradient, i, n, slope * factor);
    }
    return sum_of_wide(&sums);
}

static double binary_cross_entropy(ptrdiff_t n, const void *x, const void *targets, double delta, double scale,
                                   void *gradient)
{
    return elementwise(BINARY_CROSS_ENTROPY, n, x, targets, delta, scale, gradient);
}

static double squared_error(ptrdiff_t n, const void *x, const void *targets, double delta, double scale,
                            void *gradient)
{
    return elementwise(SQUARED_ERROR, n, x, targets, delta, scale, gradient);
}

static double huber(ptrdiff_t n, const void *x, const void *targets, double delta, double scale, void *gradient)
{
    return elementwise(HUBER, n, x, targets, delta, scale, gradient);
}

#endif
