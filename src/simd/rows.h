/*
 * Rows: layer normalisation, the gradient of an embedding, dropout.
 *
 * A sum over a row is ROW_CHAINS chains of vectors, each lane its own, which are then added up in one order: what a
 * row gives depends on nothing but the row. A sum over rows is one chain for each column, so that threads may split
 * the columns anywhere.
 */
#ifndef FASTSEQ_ROWS_H
#define FASTSEQ_ROWS_H

#include "leaves.h"
#include "lanes.h"

enum { ROW_CHAINS = 4 };

/* The reals from `i` on of a row of n; past its end lanes hold `fill`. */
INLINE vec load_row(const real *row, ptrdiff_t i, ptrdiff_t n, real fill)
{
    if (n - i >= LANES)
        return load(row + i);
    vec v = broadcast(fill);
    memcpy(&v, row + i, (size_t)(n - i) * sizeof(real));
    return v;
}

INLINE void store_row(real *row, ptrdiff_t i, ptrdiff_t n, vec v)
{
    if (n - i >= LANES)
        store(row + i, v);
    else
        store_part(row + i, v, n - i);
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
INLINE real sum_of(vec v)
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
INLINE real most_of(vec v)
{
#if FS_VECTOR_BYTES / FS_REAL_BYTES >= 16
    v = at_least(v, FOLD(v, 8));
#endif
#if FS_VECTOR_BYTES / FS_REAL_BYTES >= 8
    v = at_least(v, FOLD(v, 4));
#endif
#if FS_VECTOR_BYTES / FS_REAL_BYTES >= 4
    v = at_least(v, FOLD(v, 2));
#endif
    v = at_least(v, FOLD(v, 1));
    return v[0];
}

INLINE real sum_of_chains(const vec *chains)
{
    return sum_of((chains[0] + chains[1]) + (chains[2] + chains[3]));
}

INLINE real square_root(real x)
{
#if FS_REAL_BYTES == 4
    return __builtin_sqrtf(x);
#else
    return __builtin_sqrt(x);
#endif
}

/* The vector at i goes to chain i / LANES % ROW_CHAINS; BODY adds to `chain`. */
#define FOR_ROW(I, N, BODY)                                                                            \
    do {                                                                                               \
        ptrdiff_t I = 0;                                                                               \
        for (; I + ROW_CHAINS * LANES <= (N);)                                                         \
            _Pragma("GCC unroll 4") for (int chain = 0; chain < ROW_CHAINS; chain++, I += LANES) BODY; \
        for (int chain = 0; I < (N); chain++, I += LANES)                                              \
            BODY;                                                                                      \
    } while (0)

/* mean = sum x / n;  scale = 1 / sqrt(sum (x - mean)^2 / n + eps);  y = (x - mean) scale weight + bias */
static void layer_norm(ptrdiff_t rows, ptrdiff_t n, double eps, const void *x, const void *weight,
                       const void *bias, void *y, void *means, void *scales)
{
    const real *w = weight, *b = bias;
    for (ptrdiff_t r = 0; r < rows; r++) {
        const real *row = (const real *)x + r * n;
        real *out = (real *)y + r * n;
        vec sums[ROW_CHAINS] = {{0}}, squares[ROW_CHAINS] = {{0}};
        FOR_ROW(i, n, sums[chain] += load_row(row, i, n, 0));
        const real mean = sum_of_chains(sums) / (real)n;
        FOR_ROW(i, n, {
            vec d = load_row(row, i, n, mean) - broadcast(mean);
            squares[chain] = fma_(d, d, squares[chain]);
        });
        const real scale = 1 / square_root(sum_of_chains(squares) / (real)n + (real)eps);
        for (ptrdiff_t i = 0; i < n; i += LANES) {
            vec v = (load_row(row, i, n, 0) - broadcast(mean)) * broadcast(scale);
            if (w && b)
                v = fma_(v, load_row(w, i, n, 0), load_row(b, i, n, 0));
            else if (w)
                v *= load_row(w, i, n, 0);
            store_row(out, i, n, v);
        }
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
        const real mean = ((const real *)means)[r], scale = ((const real *)scales)[r];
        vec sums[ROW_CHAINS] = {{0}}, products[ROW_CHAINS] = {{0}};
        FOR_ROW(i, n, {
            vec g = load_row(d, i, n, 0);
            if (w)
                g *= load_row(w, i, n, 0);
            sums[chain] += g;
            products[chain] =
                fma_(g, (load_row(row, i, n, 0) - broadcast(mean)) * broadcast(scale), products[chain]);
        });
        const vec of_g = broadcast(sum_of_chains(sums) / (real)n);
        const vec of_products = broadcast(sum_of_chains(products) / (real)n);
        for (ptrdiff_t i = 0; i < n; i += LANES) {
            vec g = load_row(d, i, n, 0);
            if (w)
                g *= load_row(w, i, n, 0);
            vec normal = (load_row(row, i, n, 0) - broadcast(mean)) * broadcast(scale);
            store_row(out, i, n, (g - of_g - normal * of_products) * broadcast(scale));
        }
    }
}

/* dweight += sum over rows of dy x^;  dbias += sum over rows of dy;  of the columns [first, last) */
static void layer_norm_sums(ptrdiff_t rows, ptrdiff_t n, ptrdiff_t first, ptrdiff_t last, const void *x,
                            const void *means, const void *scales, const void *dy, void *dweight, void *dbias)
{
    real *dw = dweight, *db = dbias;
    for (ptrdiff_t i = first; i < last; i += LANES) {
        vec products = {0}, sums = {0};
        for (ptrdiff_t r = 0; r < rows; r++) {
            const vec mean = broadcast(((const real *)means)[r]), scale = broadcast(((const real *)scales)[r]);
            vec d = load_row((const real *)dy + r * n, i, last, 0);
            products = fma_(d, (load_row((const real *)x + r * n, i, last, 0) - mean) * scale, products);
            sums += d;
        }
        store_row(dw, i, last, load_row(dw, i, last, 0) + products);
        if (db)
            store_row(db, i, last, load_row(db, i, last, 0) + sums);
    }
}

/* gradient[ids[r]] += dy[r], for r in order, of the columns [first, last); the row `skip` stays as it is */
static void scatter_add(ptrdiff_t rows, const int64_t *ids, int64_t skip, ptrdiff_t width, ptrdiff_t first,
                        ptrdiff_t last, const void *dy, void *gradient)
{
    for (ptrdiff_t r = 0; r < rows; r++) {
        if (ids[r] == skip)
            continue;
        const real *d = (const real *)dy + r * width;
        real *g = (real *)gradient + ids[r] * width;
        for (ptrdiff_t i = first; i < last; i += LANES)
            store_row(g, i, last, load_row(g, i, last, 0) + load_row(d, i, last, 0));
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
            vec v = load_row((const real *)x, i, end, 0) * factor;
            store_row((real *)y, i, end, choose(__builtin_convertvector(kept, ivec), v, broadcast(0)));
        }
    }
}

#endif
