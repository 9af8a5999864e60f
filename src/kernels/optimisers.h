/*
 * Optimisers: one pass over a parameter, which reads it, its gradient and what the optimiser keeps, and writes the new
 * parameter and what is kept next. Also what clipping needs.
 *
 * Nothing is fused here: memory is the limit, and so every instruction set, and NumPy in the same type, gives the
 * same bits.
 */
#ifndef FASTSEQ_OPTIMISERS_H
#define FASTSEQ_OPTIMISERS_H

#include "vec.h"
#include "kernels.h"

INLINE vec root(vec x)
{
#if FS_VECTOR_BYTES == 64 && defined(__AVX512F__) && FS_REAL_BYTES == 4
    return (vec)_mm512_sqrt_ps((__m512)x);
#elif FS_VECTOR_BYTES == 64 && defined(__AVX512F__)
    return (vec)_mm512_sqrt_pd((__m512d)x);
#elif FS_VECTOR_BYTES == 32 && FS_REAL_BYTES == 4
    return (vec)_mm256_sqrt_ps((__m256)x);
#elif FS_VECTOR_BYTES == 32
    return (vec)_mm256_sqrt_pd((__m256d)x);
#elif defined(__x86_64__) && FS_REAL_BYTES == 4
    return (vec)_mm_sqrt_ps((__m128)x);
#elif defined(__x86_64__)
    return (vec)_mm_sqrt_pd((__m128d)x);
#elif defined(__aarch64__) && FS_REAL_BYTES == 4
    return (vec)vsqrtq_f32((float32x4_t)x);
#elif defined(__aarch64__)
    return (vec)vsqrtq_f64((float64x2_t)x);
#else
    for (int i = 0; i < LANES; i++)
        x[i] = FS_REAL_BYTES == 4 ? __builtin_sqrtf(x[i]) : __builtin_sqrt(x[i]);
    return x;
#endif
}

/* n <= LANES reals from the ith on; where n is known to be LANES, a plain load or store. */
INLINE vec take(const void *p, ptrdiff_t i, ptrdiff_t n)
{
    return n == LANES ? load((const real *)p + i) : load_part((const real *)p + i, n);
}

INLINE void give(void *p, ptrdiff_t i, vec v, ptrdiff_t n)
{
    if (n == LANES)
        store((real *)p + i, v);
    else
        store_part((real *)p + i, v, n);
}

INLINE vec number(double x)
{
    return broadcast((real)x);
}

/* The gradient with the decay of the weights in it. */
INLINE vec decayed(const fs_update *u, vec p, ptrdiff_t i, ptrdiff_t n)
{
    vec g = take(u->g, i, n);
    return u->decay != 0 ? g + number(u->decay) * p : g;
}

/*
 * The gradient as it is squared: where the square would be too large for the type, the largest number that has one, so
 * that the mean of squares does not become, and stay, infinite. What is no number stays.
 */
INLINE vec squarable(vec g)
{
    const vec limit = broadcast(FS_REAL_BYTES == 4 ? (real)0x1p63 : (real)0x1p511);
    const ivec sign = (ivec)broadcast((real)-0.0);
    const vec size = (vec)((ivec)g & ~sign);
    const ivec large = (ivec)(size > limit) & (ivec)(size < broadcast(INFINITE));
    return choose(large, (vec)((ivec)limit | ((ivec)g & sign)), g);
}

INLINE void sgd_some(const fs_update *u, ptrdiff_t i, ptrdiff_t n)
{
    vec p = take(u->p, i, n), g = decayed(u, p, i, n);
    if (u->first) {
        vec kept = number(u->momentum) * take(u->first, i, n) + g;
        give(u->first, i, kept, n);
        g = u->nesterov ? g + number(u->momentum) * kept : kept;
    }
    give(u->out, i, p - number(u->rate) * g, n);
}

INLINE void rmsprop_some(const fs_update *u, ptrdiff_t i, ptrdiff_t n)
{
    vec p = take(u->p, i, n), g = squarable(decayed(u, p, i, n));
    vec squares = number(u->keep_second) * take(u->first, i, n) + number(u->take_second) * (g * g);
    give(u->first, i, squares, n);
    vec direction = g / (root(squares) + number(u->eps));
    if (u->second) {
        direction = number(u->momentum) * take(u->second, i, n) + direction;
        give(u->second, i, direction, n);
    }
    give(u->out, i, p - number(u->rate) * direction, n);
}

INLINE void adam_some(const fs_update *u, ptrdiff_t i, ptrdiff_t n)
{
    vec p = take(u->p, i, n), g = squarable(decayed(u, p, i, n));
    vec mean = take(u->first, i, n);
    /* From whichever is nearer: of a mean that hardly stays, nothing must. */
    mean = u->take_first < 0.5 ? mean + number(u->take_first) * (g - mean)
                               : g - number(1 - u->take_first) * (g - mean);
    give(u->first, i, mean, n);
    vec squares = number(u->keep_second) * take(u->second, i, n) + number(u->take_second) * (g * g);
    give(u->second, i, squares, n);
    vec direction = mean / (root(squares) * number(u->unbias) + number(u->eps));
    give(u->out, i, number(u->keep) * p - number(u->rate) * direction, n);
}

/* The update comes by value: a copy that nothing points to, whose numbers stay in registers. */
INLINE void sweep(void (*const some)(const fs_update *, ptrdiff_t, ptrdiff_t), const fs_update u, ptrdiff_t i,
                  ptrdiff_t last)
{
    for (; i + LANES <= last; i += LANES)
        some(&u, i, LANES);
    if (i < last)
        some(&u, i, last - i);
}

static void sgd(const fs_update *u, ptrdiff_t first, ptrdiff_t last)
{
    sweep(sgd_some, *u, first, last);
}

static void rmsprop(const fs_update *u, ptrdiff_t first, ptrdiff_t last)
{
    sweep(rmsprop_some, *u, first, last);
}

static void adam(const fs_update *u, ptrdiff_t first, ptrdiff_t last)
{
    sweep(adam_some, *u, first, last);
}

static void scale(ptrdiff_t n, void *x, double factor)
{
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES)
        give(x, i, number(factor) * take(x, i, LANES), LANES);
    if (i < n)
        give(x, i, number(factor) * take(x, i, n - i), n - i);
}

/* Sixteen sums, of every sixteenth element each, whatever the lanes; then these in pairs. */
enum { SUMS = 16, DOUBLES = FS_VECTOR_BYTES / 8 };

typedef double double_vec __attribute__((vector_size(FS_VECTOR_BYTES)));
typedef real short_vec __attribute__((vector_size(DOUBLES * sizeof(real))));
typedef real loose_short_vec
    __attribute__((vector_size(DOUBLES * sizeof(real)), aligned(FS_REAL_BYTES), may_alias));

static double sum_of_squares(ptrdiff_t n, const void *x)
{
    const real *p = x;
    double_vec sums[SUMS / DOUBLES] = {{0}};
    double total[SUMS];
    ptrdiff_t i = 0;
    for (; i + SUMS <= n; i += SUMS)
#pragma GCC unroll 16
        for (int k = 0; k < SUMS / DOUBLES; k++) {
            double_vec v = __builtin_convertvector((short_vec) * (const loose_short_vec *)(p + i + k * DOUBLES),
                                                   double_vec);
            sums[k] += v * v;
        }
    memcpy(total, sums, sizeof total);
    for (int k = 0; i < n; i++, k++)
        total[k] += (double)p[i] * (double)p[i];
    for (int half = SUMS / 2; half; half /= 2)
        for (int k = 0; k < half; k++)
            total[k] += total[k + half];
    return total[0];
}

#endif
