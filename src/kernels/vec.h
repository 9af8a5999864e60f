/*
 * Lanes: a vector of `LANES` reals, the type every kernel is written over.
 *
 * Arithmetic and comparison are the compiler's own vector operators; the one operation they lack, the fused
 * multiply-add, is named here for each instruction set. Contraction is off, so nothing else is ever fused.
 * The baseline of x86-64 has no fused multiply-add: there it rounds twice.
 */
#ifndef FASTSEQ_VEC_H
#define FASTSEQ_VEC_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#if FS_REAL_BYTES == 4
typedef float real;
typedef int32_t integer;
#else
typedef double real;
typedef int64_t integer;
#endif

enum { LANES = FS_VECTOR_BYTES / FS_REAL_BYTES };

#define INFINITE ((real)__builtin_inf())

typedef real vec __attribute__((vector_size(FS_VECTOR_BYTES)));
typedef integer ivec __attribute__((vector_size(FS_VECTOR_BYTES)));
typedef real loose_vec __attribute__((vector_size(FS_VECTOR_BYTES), aligned(FS_REAL_BYTES), may_alias));

/* The registers decide how many rows a tile of 3 or 4 vectors can hold with its weights and inputs. */
#if FS_VECTOR_BYTES == 64
enum { ROWS_OF_3 = 8, ROWS_OF_4 = 6 }; /* 32 registers */
#elif defined(__aarch64__)
enum { ROWS_OF_3 = 7, ROWS_OF_4 = 6 }; /* 32 registers, inputs broadcast by lane */
#else
enum { ROWS_OF_3 = 4, ROWS_OF_4 = 3 }; /* 16 registers */
#endif

INLINE vec broadcast(real x)
{
    return x - (vec){0}; /* not {0} + x, which would turn -0 into +0 and keep the addition */
}

INLINE ivec ibroadcast(integer x)
{
    return x - (ivec){0};
}

INLINE vec load(const real *p)
{
    return *(const loose_vec *)p;
}

INLINE void store(real *p, vec v)
{
    *(loose_vec *)p = v;
}

/* The first n < LANES reals at p, zeros after them; nothing past them is read. */
INLINE vec load_part(const real *p, ptrdiff_t n)
{
    vec v = {0};
    memcpy(&v, p, (size_t)n * sizeof(real));
    return v;
}

INLINE void store_part(real *p, vec v, ptrdiff_t n)
{
    memcpy(p, &v, (size_t)n * sizeof(real));
}

/* a * b + c, rounded once where the instruction set can. */
INLINE vec fma_(vec a, vec b, vec c)
{
#if FS_VECTOR_BYTES == 64 && defined(__AVX512F__) && FS_REAL_BYTES == 4
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FS_VECTOR_BYTES == 64 && defined(__AVX512F__)
    return (vec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif FS_VECTOR_BYTES == 32 && FS_REAL_BYTES == 4
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif FS_VECTOR_BYTES == 32
    return (vec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__) && FS_REAL_BYTES == 4
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#elif defined(__aarch64__)
    return (vec)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return a * b + c;
#endif
}

/* where(mask, a, b); a mask is a comparison of two vectors. */
INLINE vec choose(ivec mask, vec a, vec b)
{
    return (vec)((mask & (ivec)a) | (~mask & (ivec)b));
}

/* min(x, bound) and max(x, bound), where NaN stays NaN: x86 gives the second operand then. */
INLINE vec vec_min(vec x, vec bound)
{
#if FS_VECTOR_BYTES == 64 && defined(__AVX512F__) && FS_REAL_BYTES == 4
    return (vec)_mm512_min_ps((__m512)bound, (__m512)x);
#elif FS_VECTOR_BYTES == 64 && defined(__AVX512F__)
    return (vec)_mm512_min_pd((__m512d)bound, (__m512d)x);
#elif FS_VECTOR_BYTES == 32 && FS_REAL_BYTES == 4
    return (vec)_mm256_min_ps((__m256)bound, (__m256)x);
#elif FS_VECTOR_BYTES == 32
    return (vec)_mm256_min_pd((__m256d)bound, (__m256d)x);
#elif FS_VECTOR_BYTES == 16 && defined(__x86_64__) && FS_REAL_BYTES == 4
    return (vec)_mm_min_ps((__m128)bound, (__m128)x);
#elif FS_VECTOR_BYTES == 16 && defined(__x86_64__)
    return (vec)_mm_min_pd((__m128d)bound, (__m128d)x);
#else
    return choose(x > bound, bound, x);
#endif
}

INLINE vec vec_max(vec x, vec bound)
{
#if FS_VECTOR_BYTES == 64 && defined(__AVX512F__) && FS_REAL_BYTES == 4
    return (vec)_mm512_max_ps((__m512)bound, (__m512)x);
#elif FS_VECTOR_BYTES == 64 && defined(__AVX512F__)
    return (vec)_mm512_max_pd((__m512d)bound, (__m512d)x);
#elif FS_VECTOR_BYTES == 32 && FS_REAL_BYTES == 4
    return (vec)_mm256_max_ps((__m256)bound, (__m256)x);
#elif FS_VECTOR_BYTES == 32
    return (vec)_mm256_max_pd((__m256d)bound, (__m256d)x);
#elif FS_VECTOR_BYTES == 16 && defined(__x86_64__) && FS_REAL_BYTES == 4
    return (vec)_mm_max_ps((__m128)bound, (__m128)x);
#elif FS_VECTOR_BYTES == 16 && defined(__x86_64__)
    return (vec)_mm_max_pd((__m128d)bound, (__m128d)x);
#else
    return choose(x < bound, bound, x);
#endif
}

#endif
