/*
 * Losses and their gradients, in one go over what is in the cache.
 */
#ifndef FASTSEQ_LOSSES_H
#define FASTSEQ_LOSSES_H

#include "vec_math.h"
#include "rows.h"

/*
 * Softmax cross-entropy. With m the largest logit of a row, t its target and e_j = exp(x_j - m):
 *
 *     sums: others = sum over j /= t of e_j,  target = e_t,  offset = sum over j of q_j (x_j - m)
 *     gradient_j = scale (e_j / (target + others) - q_j)
 *
 * where q, the distribution wanted, is `smoothing` / n everywhere and 1 - smoothing more at t. The loss of the row,
 * log(target + others) - offset, is left to the caller, who has a logarithm. At the target, e_t / sum - 1 is taken as
 * -others / sum: where the prediction is nearly right, nothing cancels.
 */
INLINE real row_max(ptrdiff_t n, const real *x)
{
    const real lowest = (real)-__builtin_inf();
    vec high[ACCUMULATORS];
    for (int i = 0; i < ACCUMULATORS; i++)
        high[i] = broadcast(lowest);
    FOR_ROW(n, high[accumulator] = vec_max(load_row(x + i, left, lowest), high[accumulator]););
    return max_of_lanes(vec_max(vec_max(high[0], high[1]), vec_max(high[2], high[3])));
}

/* e[j] = exp(x[j] - maximum); returns their sum without that of the target */
INLINE real row_exp(ptrdiff_t n, const real *x, real maximum, ptrdiff_t target, real *e)
{
    vec sums[ACCUMULATORS] = {{0}};
    ivec lane;
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
    FOR_ROW(n, {
        const vec v = exp_(load_row(x + i, left, (real)-__builtin_inf()) - broadcast(maximum));
        const integer at = target - i >= 0 && target - i < LANES ? (integer)(target - i) : -1;
        store_row(e + i, left, v);
        sums[accumulator] += choose(lane == ibroadcast(at), broadcast(0), v);
    });
    return sum_of_accumulators(sums);
}

/* The sum of x[j] - maximum. */
INLINE real row_spread(ptrdiff_t n, const real *x, real maximum)
{
    vec sums[ACCUMULATORS] = {{0}};
    FOR_ROW(n, sums[accumulator] += load_row(x + i, left, maximum) - broadcast(maximum););
    return sum_of_accumulators(sums);
}

/*
 * Rows go through each of the three passes a few at a time, as many as stay in the cache: one row waits for its own
 * sums maximum of the time. A row whose target is negative does not count: it is not read, its gradient is 0 and so is
 * its loss.
 */
static void softmax_cross_entropy(ptrdiff_t rows, ptrdiff_t n, const void *logits, const int64_t *targets,
                                  double smoothing, double scale, void *gradient, fs_softmax_sums *sums)
{
    enum { BLOCK_ROWS = 16, CACHED = 4096 };
    real maximum[BLOCK_ROWS], others[BLOCK_ROWS];
    const double share = smoothing / (double)n;
    const ptrdiff_t fit = n > CACHED ? 1 : CACHED / n, block = fit < BLOCK_ROWS ? fit : BLOCK_ROWS;
    for (ptrdiff_t first = 0; first < rows; first += block) {
        const ptrdiff_t count = rows - first < block ? rows - first : block;
        const real *x = (const real *)logits + first * n;
        real *g = (real *)gradient + first * n;
        const int64_t *t = targets + first;
        fs_softmax_sums *s = sums + first;

        for (ptrdiff_t r = 0; r < count; r++)
            if (t[r] >= 0)
                maximum[r] = row_max(n, x + r * n);
        for (ptrdiff_t r = 0; r < count; r++)
            if (t[r] >= 0)
                others[r] = row_exp(n, x + r * n, maximum[r], t[r], g + r * n);
        for (ptrdiff_t r = 0; r < count; r++) {
            real *row = g + r * n;
            if (t[r] < 0) {
                memset(row, 0, (size_t)n * sizeof(real));
                s[r] = (fs_softmax_sums){0, 1, 0};
                continue;
            }
            s[r].others = others[r];
            s[r].target = row[t[r]];
            s[r].offset = 0;
            if (smoothing != 1) /* else the target may have -inf */
                s[r].offset = (1 - smoothing) * ((double)x[r * n + t[r]] - maximum[r]);
            if (smoothing != 0)
                s[r].offset += share * row_spread(n, x + r * n, maximum[r]);
            const double factor = scale / (s[r].target + s[r].others);
            const vec times = broadcast((real)factor), less = broadcast((real)(scale * share));
            FOR_ROW(n, store_row(row + i, left, load_row(row + i, left, 0) * times - less););
            row[t[r]] = (real)(scale * (smoothing - share) - factor * s[r].others);
        }
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
 *                            of infinite x: |x| (1 - t), of -inf |x| t, where 0 |x| = 0
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
        vec a = load_row((const real *)x + i, n - i, 0), t = load_row((const real *)targets + i, n - i, 0),
            d = a - t, loss, slope;
        if (LOSS == BINARY_CROSS_ENTROPY) {
            const vec size = (vec)((ivec)a & ~sign), miss = choose(a > 0, broadcast(1) - t, t);
            loss = (relu_(a) - a * t) + log1p_(exp_((vec)((ivec)a | sign)));
            loss = choose(size == broadcast(INFINITE), choose(miss == 0, miss, miss * size), loss);
            slope = sigmoid_(a) - t;
            if (n - i < LANES) /* log 2, past the end */
                loss = load_part((const real *)&loss, n - i);
        } else if (LOSS == SQUARED_ERROR) {
            loss = d * d;
            slope = d;
        } else {
            slope = vec_min(vec_max(d, -cut), cut);
            loss = slope * (d - slope * broadcast((real)0.5));
        }
        sums += __builtin_convertvector(loss, wide);
        store_row((real *)gradient + i, n - i, slope * factor);
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
