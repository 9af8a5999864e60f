/*
 * exp, tanh and sigmoid over lanes: at most 2 ulp in float32 where the result is normal
 * (tests/exhaustive_ulp.py looks at every float32).
 *
 * All three rest on one reduction: y = n ln 2 + r with n whole and |r| <= ln 2 / 2, so that
 * exp(y) = 2^n (1 + p), p = expm1(r). p is kept apart from the 1, which is what lets tanh be accurate near 0
 * without a second branch.
 */
#ifndef FASTSEQ_FUNCTIONS_H
#define FASTSEQ_FUNCTIONS_H

#include "lanes.h"

#if FS_REAL_BYTES == 4
enum { MANTISSA_BITS = 23, EXPONENT_BIAS = 127 };
#define EXP_LOW (-104.0f)  /* exp rounds to 0 below */
#define EXP_HIGH 89.0f     /* and to inf above      */
#define SIGMOID_LOW (-88.0f) /* of -x: one power of two reaches from here ... */
#define SIGMOID_HIGH 88.8f   /* ... to here, where it is inf and sigmoid 0    */
#define TANH_HIGH 10.0f    /* tanh rounds to 1 above */
#else
enum { MANTISSA_BITS = 52, EXPONENT_BIAS = 1023 };
#define EXP_LOW (-746.0)
#define EXP_HIGH 710.0
#define SIGMOID_LOW (-708.0)
#define SIGMOID_HIGH 709.8
#define TANH_HIGH 20.0
#endif

typedef struct {
    vec p;  /* expm1(r)                                        */
    ivec n; /* the whole number n, above it unspecified bits:   */
            /* only shifts by MANTISSA_BITS may look at it      */
} exp_parts;

/* (expm1(r) - r) / r^2 on |r| <= ln 2 / 2: minimax for the relative error of expm1, 2^-32 and 2^-61. */
#if FS_REAL_BYTES == 4
static const real EXPM1[] = {0x1.000000p-1f, 0x1.555554p-3f, 0x1.5554b0p-5f, 0x1.11118ap-7f, 0x1.6d723ep-10f,
                             0x1.a032c4p-13f};
#else
static const real EXPM1[] = {0x1.0000000000000p-1,  0x1.5555555555559p-3,  0x1.555555555553ep-5,
                             0x1.111111110f6c4p-7,  0x1.6c16c16c1f0e3p-10, 0x1.a01a01afdd8f1p-13,
                             0x1.a01a017bb0d51p-16, 0x1.71ddf863b83fep-19, 0x1.27e53642b57a3p-22,
                             0x1.af5ea85138f77p-26, 0x1.1ee8892120d08p-29};
#endif
enum { EXPM1_TERMS = sizeof EXPM1 / sizeof *EXPM1 };

/* y must lie where n fits the exponent: the callers clamp. NaN gives p = NaN. */
INLINE exp_parts exp_split(vec y)
{
    /* Adding 1.5 * 2^MANTISSA_BITS rounds to a whole number and leaves it in the low bits. The high part of
     * ln 2 is short enough that n times it is exact even without a fused multiply-add. */
#if FS_REAL_BYTES == 4
    const real rounder = 0x1.8p23f, log2_e = 0x1.715476p+0f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
#else
    const real rounder = 0x1.8p52, log2_e = 0x1.71547652b82fep+0, ln2_high = 0x1.62e42feep-1,
               ln2_low = 0x1.a39ef35793c76p-33;
#endif
    vec shifted = fma_(y, broadcast(log2_e), broadcast(rounder));
    vec n = shifted - broadcast(rounder);
    vec r = fma_(n, broadcast(-ln2_high), y);
    r = fma_(n, broadcast(-ln2_low), r);

    /* In pairs of terms: as many operations as one by one, but half as long a chain. */
    const vec r2 = r * r;
    vec q = EXPM1_TERMS % 2 ? broadcast(EXPM1[EXPM1_TERMS - 1])
                            : fma_(broadcast(EXPM1[EXPM1_TERMS - 1]), r, broadcast(EXPM1[EXPM1_TERMS - 2]));
#pragma GCC unroll 8
    for (int i = EXPM1_TERMS - 4 + EXPM1_TERMS % 2; i >= 0; i -= 2)
        q = fma_(q, r2, fma_(broadcast(EXPM1[i + 1]), r, broadcast(EXPM1[i])));
    return (exp_parts){fma_(r2, q, r), (ivec)shifted};
}

/* 2^n for an n of exp_split, -EXPONENT_BIAS (which gives 0) <= n <= EXPONENT_BIAS + 1 (which gives inf). */
INLINE vec power_of_two(ivec n)
{
    return (vec)((n << MANTISSA_BITS) + ibroadcast((integer)EXPONENT_BIAS << MANTISSA_BITS));
}

INLINE vec exp_(vec x)
{
    exp_parts e = exp_split(at_most(at_least(x, broadcast(EXP_LOW)), broadcast(EXP_HIGH)));
    /* n itself can leave the exponent's range by a little, so 2^n is applied in two halves. */
    ivec n = (e.n << (FS_REAL_BYTES * 8 - 16)) >> (FS_REAL_BYTES * 8 - 16);
    ivec half = n >> 1;
    vec y = broadcast(1) + e.p;
    return y * power_of_two(half) * power_of_two(n - half);
}

/* sigmoid(x) = 1 / (1 + exp(-x)) */
INLINE vec sigmoid_(vec x)
{
    exp_parts e = exp_split(at_most(at_least(-x, broadcast(SIGMOID_LOW)), broadcast(SIGMOID_HIGH)));
    vec scale = power_of_two(e.n);
    return broadcast(1) / (broadcast(1) + fma_(scale, e.p, scale));
}

/* tanh(x) = E / (E + 2), E = expm1(2 |x|) = 2^n p + (2^n - 1), with the sign of x */
INLINE vec tanh_(vec x)
{
    const ivec sign = (ivec)broadcast((real)-0.0);
    vec y = at_most((vec)((ivec)x & ~sign), broadcast(TANH_HIGH));
    exp_parts e = exp_split(y + y);
    vec scale = power_of_two(e.n);
    vec E = fma_(scale, e.p, scale - broadcast(1));
    return (vec)((ivec)(E / (E + broadcast(2))) | ((ivec)x & sign));
}

INLINE vec relu_(vec x)
{
    return at_least(x, broadcast(0)); /* NaN stays */
}

#endif
