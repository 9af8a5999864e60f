/*
 * Rows: layer normalisation, the gradient of an embedding, dropout.
 *
 * A sum over a row is ACCUMULATORS accumulators of vectors, each lane its own, which are then added up in one order: what a
 * row gives depends on nothing but the row. A sum over rows is one chain for each column, so that threads may split
 * the columns anywhere.
 */
#ifndef FASTSEQ_ROWS_H
#define FASTSEQ_ROWS_H

#include "vec_math.h"
#include "kernels.h"

enum { ACCUMULATORS = 4 };

/* The reals at p, of which there are `left`; lanes past the last hold `fill`. */
INLINE vec load_row(const real *p, ptrdiff_t left, real fill)
{
    if (left >= LANES)
        return load(p);
    vec v = broadcast(fill);
    memcpy(&v, p, (size_t)left * sizeof(real));
    return v;
}

INLINE void store_row(real *p, ptrdiff_t left, vec v)
{
    if (left >= LANES)
        store(p, v);
    else
        store_part(p, v, left);
}

/* The lanes moved so that those `distance` further on come first; the last ones hold anything. */
#if FS_VECTOR_BYTES / FS_REAL_BYTES == 16
#define FOLD(v, d)                                                                                          \
    __builtin_shufflevector(v, v, (0 + (d)) % 16, (1 + (d)) % 16, (2 + (d)) % 16, (3 + (d)) % 16,           \
                            (4 + (d)) % 16, (5 + (d)) % 16, (6 + (d)) % 16, (7 + (d)) % 16, (8 + (d)) % 16, \
                            (9 + (d)) % 16, (10 + (d)) % 16, (11 + (d)) % 16, (12 + (d)) % 16,              \
                            (13 + (d)) % 16, (14 + (d)) % 16, (15 + (d)) % 16)
#elif FS_VECTOR_BYTES / FS_REAL_BYTES == 8
#define FOLD(v, d)                                                                                           \
    __builtin_shufflevector(v, v, (0 + (d)) % 8, (1 + (d)) % 8, (2 + (d)) % 8, (3 + (d)) % 8, (4 + (d)) % 8, \
                            (5 + (d)) % 8, (6 + (d)) % 8, (7 + (d)) % 8)
#elif FS_VECTOR_BYTES / FS_REAL_BYTES == 4
#define FOLD(v, d) __builtin_shufflevector(v, v, (0 + (d)) % 4, (1 + (d)) % 4, (2 + (d)) % 4, (3 + (d)) % 4)
#else
#define FOLD(v, d) __builtin_shufflevector(v, v, (0 + (d)) % 2, (1 + (d)) % 2)
#endif

/* The sum of all lanes, halves onto each other until one is left. */
INLINE real sum_of_lanes(vec v)
{
#if FS_VECTOR_BYTES / FS_REAL_BYTES >= 16
    v += FOLD(v, 8);
#endif
#if FS_VECTOR_BYTES / FS_REAL_BYTES >= 8
    v += FOLD(v, 4);
#endif
#if FS_VECTOR_BYTES / FS_REAL_BYTES >= 4
    v += FOLD(v, 2);
#endif
    v += FOLD(v, 1);
    return v[0];
}

/* The largest of all lanes; where one is NaN, any of them. */
INLINE real max_of_lanes(vec v)
{
#if FS_VECTOR_BYTES / FS_REAL_BYTES >= 16
    v = vec_max(v, FOLD(v, 8));
#endif
#if FS_VECTOR_BYTES / FS_REAL_BYTES >= 8
    v = vec_max(v, FOLD(v, 4));
#endif
#if FS_VECTOR_BYTES / FS_REAL_BYTES >= 4
    v = vec_max(v, FOLD(v, 2));
#endif
    v = vec_max(v, FOLD(v, 1));
    return v[0];
}

INLINE real sum_of_accumulators(const vec *accumulators)
{
    return sum_of_lanes((accumulators[0] + accumulators[1]) + (accumulators[2] + accumulators[3]));
}

INLINE real square_root(real x)
{
#if FS_REAL_BYTES == 4
    return __builtin_sqrtf(x);
#else
    return __builtin_sqrt(x);
#endif
}

/*
 * BODY for each vector of a row of N reals: at `i`, where `left` are left, of the chain i / LANES % ACCUMULATORS.
 * Chains and whole vectors are constants where the compiler sees them: sums stay in registers.
 */
#define FOR_ROW(N, BODY)                                                                                 \
    do {                                                                                                 \
        ptrdiff_t start_ = 0;                                                                            \
        for (; start_ + ACCUMULATORS * LANES <= (N); start_ += ACCUMULATORS * LANES)                     \
            _Pragma("GCC unroll 4") for (int accumulator = 0; accumulator < ACCUMULATORS; accumulator++) \
            {                                                                                            \
                const ptrdiff_t i = start_ + accumulator * LANES, left = LANES;                          \
                BODY                                                                                     \
            }                                                                                            \
        _Pragma("GCC unroll 4") for (int accumulator = 0; accumulator < ACCUMULATORS;                    \
                                     accumulator++) if (start_ + accumulator * LANES < (N))              \
        {                                                                                                \
            const ptrdiff_t i = start_ + accumulator * LANES, left = (N) - i;                            \
            BODY                                                                                         \
        }                                                                                                \
    } while (0)

/* Whether a mean of squares has all its digits: it has not overflowed, and what may have vanished is beneath them. */
INLINE int in_range(real x)
{
#if FS_REAL_BYTES == 4
    return x >= __FLT_MIN__ / __FLT_EPSILON__ && x <= __FLT_MAX__;
#else
    return x >= __DBL_MIN__ / __DBL_EPSILON__ && x <= __DBL_MAX__;
#endif
}

/* The power of two that brings the largest |x| into 1..4; 0 where that is 0, denormal or no number. */
INLINE real row_unit(ptrdiff_t n, const real *x)
{
#if FS_REAL_BYTES == 4
    enum { DIGITS = 23, EXPONENTS = 254 };
    uint32_t bits;
#else
    enum { DIGITS = 52, EXPONENTS = 2046 };
    uint64_t bits;
#endif
    real maximum = 0, unit;
    for (ptrdiff_t i = 0; i < n; i++) {
        const real size = x[i] < 0 ? -x[i] : x[i];
        if (!(size < INFINITE))
            return 0;
        maximum = size > maximum ? size : maximum;
    }
    memcpy(&bits, &maximum, sizeof bits);
    const int exponent = (int)(bits >> DIGITS);
    if (exponent == 0)
        return 0;
    bits = exponent < EXPONENTS ? (unsigned)(EXPONENTS - exponent) : 1;
    bits <<= DIGITS;
    memcpy(&unit, &bits, sizeof unit);
    return unit;
}

/*
 * A row whose squares leave the range of the type, normalised in units of its own: slow, and rarely called. False, and
 * nothing written, where that is no help. `mean` is NULL where nothing is subtracted.
 */
static __attribute__((noinline)) int norm_far(ptrdiff_t n, double eps, const real *x, const real *weight,
                                              const real *bias, real *y, real *mean, real *scale)
{
    const double unit = row_unit(n, x), more = eps * unit * unit;
    double middle = 0, squares = 0;
    if (unit == 0 || !(more < __builtin_inf()))
        return 0;
    for (ptrdiff_t i = 0; mean && i < n; i++)
        middle += x[i] * unit;
    middle /= (double)n;
    for (ptrdiff_t i = 0; i < n; i++)
        squares += (x[i] * unit - middle) * (x[i] * unit - middle);
    const double root = __builtin_sqrt(squares / (double)n + more);
    if (root == 0)
        return 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        real v = (real)((x[i] * unit - middle) / root);
        if (weight)
            v *= weight[i];
        y[i] = bias ? v + bias[i] : v;
    }
    if (mean)
        *mean = (real)(middle / unit);
    *scale = (real)(unit / root);
    return 1;
}

/* mean = sum x / n;  scale = 1 / sqrt(sum (x - mean)^2 / n + eps);  y = (x - mean) scale weight + bias */
static void layer_norm(ptrdiff_t rows, ptrdiff_t n, double eps, const void *x, const void *weight,
                       const void *bias, void *y, void *means, void *scales)
{
    const real *w = weight, *b = bias;
    for (ptrdiff_t r = 0; r < rows; r++) {
        const real *row = (const real *)x + r * n;
        real *out = (real *)y + r * n;
        vec sums[ACCUMULATORS] = {{0}}, squares[ACCUMULATORS] = {{0}};
        FOR_ROW(n, sums[accumulator] += load_row(row + i, left, 0););
        const real mean = sum_of_accumulators(sums) / (real)n;
        FOR_ROW(n, {
            const vec d = load_row(row + i, left, mean) - broadcast(mean);
            squares[accumulator] = fma_(d, d, squares[accumulator]);
        });
        const real variance = sum_of_accumulators(squares) / (real)n + (real)eps;
        if (!in_range(variance) && norm_far(n, eps, row, w, b, out, (real *)means + r, (real *)scales + r))
            continue;
        const real scale = 1 / square_root(variance);
        FOR_ROW(n, {
            vec v = (load_row(row + i, left, 0) - broadcast(mean)) * broadcast(scale);
            if (w)
                v *= load_row(w + i, left, 0);
            if (b)
                v += load_row(b + i, left, 0);
            store_row(out + i, left, v);
        });
        ((real *)means)[r] = mean;
        ((real *)scales)[r] = scale;
    }
}

/* With g = dy weight and x^ = (x - mean) scale:  dx = scale (g - mean of g - x^ mean of g x^) */
static void layer_norm_dx(ptrdiff_t rows, ptrdiff_t n, const void *x, const void *weight, const void *means,
                          const void *scales, const void *dy, void *dx)
{
    const real *w = weight;
    for (ptrdiff_t r = 0; r < rows; r++) {
        const real *row = (const real *)x + r * n, *d = (const real *)dy + r * n;
        real *out = (real *)dx + r * n;
        const vec mean = broadcast(((const real *)means)[r]), scale = broadcast(((const real *)scales)[r]);
        vec sums[ACCUMULATORS] = {{0}}, products[ACCUMULATORS] = {{0}};
        FOR_ROW(n, {
            vec g = load_row(d + i, left, 0);
            if (w)
                g *= load_row(w + i, left, 0);
            sums[accumulator] += g;
            products[accumulator] = fma_(g, (load_row(row + i, left, 0) - mean) * scale, products[accumulator]);
        });
        const vec of_g = broadcast(sum_of_accumulators(sums) / (real)n);
        const vec of_products = broadcast(sum_of_accumulators(products) / (real)n);
        FOR_ROW(n, {
            vec g = load_row(d + i, left, 0);
            if (w)
                g *= load_row(w + i, left, 0);
            const vec normal = (load_row(row + i, left, 0) - mean) * scale;
            store_row(out + i, left, (g - of_g - normal * of_products) * scale);
        });
    }
}

/* dweight += sum over rows of dy x^;  dbias += sum over rows of dy;  of `left` columns, at most ACCUMULATORS vectors */
INLINE void layer_norm_columns(ptrdiff_t rows, ptrdiff_t n, ptrdiff_t columns, const real *x, const real *means,
                               const real *scales, const real *dy, real *dw, real *db)
{
    vec products[ACCUMULATORS] = {{0}}, sums[ACCUMULATORS] = {{0}};
    for (ptrdiff_t r = 0; r < rows; r++, x += n, dy += n) {
        const vec mean = broadcast(means[r]), scale = broadcast(scales[r]);
        FOR_ROW(columns, {
            const vec d = load_row(dy + i, left, 0);
            products[accumulator] = fma_(d, (load_row(x + i, left, 0) - mean) * scale, products[accumulator]);
            sums[accumulator] += d;
        });
    }
    FOR_ROW(columns, {
        store_row(dw + i, left, load_row(dw + i, left, 0) + products[accumulator]);
        if (db)
            store_row(db + i, left, load_row(db + i, left, 0) + sums[accumulator]);
    });
}

static void layer_norm_sums(ptrdiff_t rows, ptrdiff_t n, ptrdiff_t first, ptrdiff_t last, const void *x,
                            const void *means, const void *scales, const void *dy, void *dweight, void *dbias)
{
    enum { STRIP = ACCUMULATORS * LANES };
    for (ptrdiff_t i = first; i < last; i += STRIP) {
        const real *at = (const real *)x + i, *d = (const real *)dy + i;
        real *dw = (real *)dweight + i, *db = dbias ? (real *)dbias + i : NULL;
        if (last - i >= STRIP)
            layer_norm_columns(rows, n, STRIP, at, means, scales, d, dw, db);
        else
            layer_norm_columns(rows, n, last - i, at, means, scales, d, dw, db);
    }
}

/* scale = 1 / sqrt(sum x^2 / n + eps);  y = x scale weight */
static void rms_norm(ptrdiff_t rows, ptrdiff_t n, double eps, const void *x, const void *weight, void *y,
                     void *scales)
{
    const real *w = weight;
    for (ptrdiff_t r = 0; r < rows; r++) {
        const real *row = (const real *)x + r * n;
        real *out = (real *)y + r * n;
        vec squares[ACCUMULATORS] = {{0}};
        FOR_ROW(n, {
            const vec v = load_row(row + i, left, 0);
            squares[accumulator] = fma_(v, v, squares[accumulator]);
        });
        const real square = sum_of_accumulators(squares) / (real)n + (real)eps;
        if (!in_range(square) && norm_far(n, eps, row, w, NULL, out, NULL, (real *)scales + r))
            continue;
        const real scale = 1 / square_root(square);
        FOR_ROW(n, {
            vec v = load_row(row + i, left, 0) * broadcast(scale);
            if (w)
                v *= load_row(w + i, left, 0);
            store_row(out + i, left, v);
        });
        ((real *)scales)[r] = scale;
    }
}

/* With g = dy weight and x^ = x scale:  dx = scale (g - x^ mean of g x^) */
static void rms_norm_dx(ptrdiff_t rows, ptrdiff_t n, const void *x, const void *weight, const void *scales,
                        const void *dy, void *dx)
{
    const real *w = weight;
    for (ptrdiff_t r = 0; r < rows; r++) {
        const real *row = (const real *)x + r * n, *d = (const real *)dy + r * n;
        real *out = (real *)dx + r * n;
        const vec scale = broadcast(((const real *)scales)[r]);
        vec products[ACCUMULATORS] = {{0}};
        FOR_ROW(n, {
            vec g = load_row(d + i, left, 0);
            if (w)
                g *= load_row(w + i, left, 0);
            products[accumulator] = fma_(g, load_row(row + i, left, 0) * scale, products[accumulator]);
        });
        const vec of_products = broadcast(sum_of_accumulators(products) / (real)n);
        FOR_ROW(n, {
            vec g = load_row(d + i, left, 0);
            if (w)
                g *= load_row(w + i, left, 0);
            store_row(out + i, left, (g - load_row(row + i, left, 0) * scale * of_products) * scale);
        });
    }
}

/* dweight += sum over rows of dy x^, of the columns [first, last) */
static void rms_norm_sums(ptrdiff_t rows, ptrdiff_t n, ptrdiff_t first, ptrdiff_t last, const void *x,
                          const void *scales, const void *dy, void *dweight)
{
    enum { STRIP = ACCUMULATORS * LANES };
    for (ptrdiff_t start = first; start < last; start += STRIP) {
        const ptrdiff_t columns = last - start < STRIP ? last - start : STRIP;
        real *dw = (real *)dweight + start;
        vec products[ACCUMULATORS] = {{0}};
        for (ptrdiff_t r = 0; r < rows; r++) {
            const real *row = (const real *)x + r * n + start, *d = (const real *)dy + r * n + start;
            const vec scale = broadcast(((const real *)scales)[r]);
            FOR_ROW(columns,
                    products[accumulator] = fma_(load_row(d + i, left, 0), load_row(row + i, left, 0) * scale,
                                                 products[accumulator]););
        }
        FOR_ROW(columns, store_row(dw + i, left, load_row(dw + i, left, 0) + products[accumulator]););
    }
}

/* y = exp(x - max x) / sum exp(x - max x); 0 where all of x is -inf */
static void softmax(ptrdiff_t rows, ptrdiff_t n, const void *x, void *y)
{
    for (ptrdiff_t r = 0; r < rows; r++) {
        const real *row = (const real *)x + r * n;
        real *out = (real *)y + r * n;
        vec maximum[ACCUMULATORS], sums[ACCUMULATORS] = {{0}};
        for (int i = 0; i < ACCUMULATORS; i++)
            maximum[i] = broadcast(-INFINITE);
        FOR_ROW(n, maximum[accumulator] = vec_max(load_row(row + i, left, -INFINITE), maximum[accumulator]););
        const real all =
            max_of_lanes(vec_max(vec_max(maximum[0], maximum[1]), vec_max(maximum[2], maximum[3])));
        const vec base = broadcast(all == -INFINITE ? 0 : all);
        FOR_ROW(n, {
            const vec p = exp_of_negative(load_row(row + i, left, -INFINITE) - base);
            sums[accumulator] += p;
            store_row(out + i, left, p);
        });
        const real sum = sum_of_accumulators(sums), inverse = sum == 0 ? 0 : 1 / sum;
        FOR_ROW(n, store_row(out + i, left, load_row(out + i, left, 0) * broadcast(inverse)););
    }
}

/* dx = y (dy - sum of dy y) */
static void softmax_dx(ptrdiff_t rows, ptrdiff_t n, const void *y, const void *dy, void *dx)
{
    for (ptrdiff_t r = 0; r < rows; r++) {
        const real *row = (const real *)y + r * n, *d = (const real *)dy + r * n;
        real *out = (real *)dx + r * n;
        vec sums[ACCUMULATORS] = {{0}};
        FOR_ROW(n, sums[accumulator] =
                       fma_(load_row(row + i, left, 0), load_row(d + i, left, 0), sums[accumulator]););
        const vec sum = broadcast(sum_of_accumulators(sums));
        FOR_ROW(n, store_row(out + i, left, load_row(row + i, left, 0) * (load_row(d + i, left, 0) - sum)););
    }
}

/* Pairs (a, b) become (a cos - b sin, b cos + a sin), or turn the other way; what stands behind them stays. */
static void rotary(ptrdiff_t heads, ptrdiff_t head, ptrdiff_t width, ptrdiff_t rotary_dim, int interleaved,
                   int inverse, const void *x, const void *cos, const void *sin, void *y)
{
    const ptrdiff_t pairs = rotary_dim / 2, step = interleaved ? 2 : 1, other = interleaved ? 1 : pairs;
    const real *c = cos, *s = sin, direction = inverse ? -1 : 1;
    for (ptrdiff_t h = 0; h < heads; h++) {
        const real *in = (const real *)x + h * head;
        real *out = (real *)y + h * width;
        if (interleaved)
            for (ptrdiff_t i = 0; i < pairs; i++) {
                const real a = in[i * step], b = in[i * step + other], t = direction * s[i];
                out[i * step] = a * c[i] - b * t;
                out[i * step + other] = b * c[i] + a * t;
            }
        else
            for (ptrdiff_t i = 0; i < pairs; i += LANES) {
                const ptrdiff_t left = pairs - i;
                const vec a = load_row(in + i, left, 0), b = load_row(in + i + other, left, 0);
                const vec u = load_row(c + i, left, 0), t = broadcast(direction) * load_row(s + i, left, 0);
                store_row(out + i, left, a * u - b * t);
                store_row(out + i + other, left, b * u + a * t);
            }
        memmove(out + rotary_dim, in + rotary_dim, (size_t)(width - rotary_dim) * sizeof(real));
    }
}

/* gradient[ids[r]] += dy[r], for r in order, of the columns [first, last); the row `skip` stays as it is */
static void scatter_add(ptrdiff_t rows, const int64_t *ids, int64_t skip, ptrdiff_t width, ptrdiff_t first,
                        ptrdiff_t last, const void *dy, void *gradient)
{
    for (ptrdiff_t r = 0; r < rows; r++) {
        if (ids[r] == skip)
            continue;
        const real *d = (const real *)dy + r * width + first;
        real *g = (real *)gradient + ids[r] * width + first;
        FOR_ROW(last - first, store_row(g + i, left, load_row(g + i, left, 0) + load_row(d + i, left, 0)););
    }
}

/*
 * Dropout masks. Element i of a stream of a seed is kept where the hash h of (seed, stream, i), 32 bits, is at least
 * p 2^32. All of it is arithmetic of unsigned integers that wraps around:
 *
 *     mix(z):  z = (z ^ z >> 30) 0xbf58476d1ce4e5b9;  z = (z ^ z >> 27) 0x94d049bb133111eb;  z ^ z >> 31
 *     key = mix(mix(mix(seed + G) + stream + G) + (i >> 32) + G), G = 0x9e3779b97f4a7c15            64 bits
 *     h = (the low halves of i and key added)                                                      32 bits
 *     h = (h ^ h >> 17) 0xed5ad4bb, and the high half of key exclusive-or'd
 *     h = (h ^ h >> 11) 0xac4c1b51;  h = (h ^ h >> 15) 0x31848bab;  h = h ^ h >> 14
 *
 * mix is the finaliser of splitmix64; the rest, 32 bits wide so that every instruction set has it in lanes, is the
 * three-round hash of C. Wellons' search for hashes of low bias, with a key between its rounds.
 */
typedef uint32_t words __attribute__((vector_size(4 * FS_VECTOR_BYTES / FS_REAL_BYTES)));
typedef int32_t word_masks __attribute__((vector_size(4 * FS_VECTOR_BYTES / FS_REAL_BYTES)));

INLINE uint64_t mix(uint64_t z)
{
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

INLINE words hash_words(words h, uint32_t key)
{
    h = ((h ^ h >> 17) * 0xed5ad4bbu) ^ key;
    h = (h ^ h >> 11) * 0xac4c1b51u;
    h = (h ^ h >> 15) * 0x31848babu;
    return h ^ h >> 14;
}

/* y[i] = x[i] scale where element first + i is kept, else 0 */
static void dropout(ptrdiff_t n, const void *x, void *y, uint64_t first, uint64_t seed, uint64_t stream,
                    uint32_t threshold, double scale)
{
    const uint64_t golden = UINT64_C(0x9e3779b97f4a7c15), key = mix(mix(seed + golden) + stream + golden);
    const vec factor = broadcast((real)scale);
    words lane = {0};
    for (int i = 0; i < LANES; i++)
        lane[i] = (uint32_t)i;
    for (ptrdiff_t start = 0, end; start < n; start = end) {
        /* As far as the high half of the index stays. */
        const uint64_t index = first + (uint64_t)start, left = (UINT64_C(1) << 32) - (index & UINT32_MAX);
        const uint64_t block = mix(key + (index >> 32) + golden);
        end = (uint64_t)(n - start) < left ? n : start + (ptrdiff_t)left;
        words counter = lane + (uint32_t)index + (uint32_t)block;
        for (ptrdiff_t i = start; i < end; i += LANES, counter += (uint32_t)LANES) {
            word_masks kept = (word_masks)(hash_words(counter, (uint32_t)(block >> 32)) >= threshold);
            vec v = load_row((const real *)x + i, end - i, 0) * factor;
            store_row((real *)y + i, end - i, choose(__builtin_convertvector(kept, ivec), v, broadcast(0)));
        }
    }
}

#endif
