/*
 * exp, tanh and sigmoid over lanes: at most 2 ulp in float32 where the result is normal
 * (tests/exhaustive_ulp.py looks at every float32).
 *
 * All three rest on one reduction: y = n ln 2 + r with n whole and |r| <= ln 2 / 2, so that
 * exp(y) = 2^n (1 + p), p = expm1(r). Keeping p apart from the 1 saves a rounding wherever more is added to it.
 */
#ifndef FASTSEQ_FUNCTIONS_H
#define FASTSEQ_FUNCTIONS_H

#include "lanes.h"

#if FS_REAL_BYTES == 4
enum { MANTISSA_BITS = 23, EXPONENT_BIAS = 127 };
#define EXP_LOW (-104.0f)  /* exp rounds to 0 below */
#define EXP_HIGH 89.0f     /* and to inf above      */
#define SIGMOID_HIGH 88.0f /* |x| that 2^n can follow; sigmoid is denormal or rounds to 1 beyond */
#define TANH_HIGH 10.0f    /* tanh rounds to 1 above */
#else
enum { MANTISSA_BITS = 52, EXPONENT_BIAS = 1023 };
#define EXP_LOW (-746.0)
#define EXP_HIGH 710.0
#define SIGMOID_HIGH 709.0
#define TANH_HIGH 20.0
#endif

typedef struct {
    vec p;  /* expm1(r)                                        */
    ivec n; /* the whole number n, above it unspecified bits:   */
            /* only shifts by MANTISSA_BITS may look at it      */
} exp_parts;

/* Minimax for the relative error of what they are part of, 2^-32 and 2^-28, or 2^-61.
 * EXPM1: (expm1(r) - r) / r^2 on |r| <= ln 2 / 2.  TANH: (tanh(x) / x - 1) / x^2 in x^2 on |x| <= 0.625. */
#if FS_REAL_BYTES == 4
static const real EXPM1[] = {0x1.000000p-1f, 0x1.555554p-3f,  0x1.5554b0p-5f,
                             0x1.11118ap-7f, 0x1.6d723ep-10f, 0x1.a032c4p-13f};
static const real TANH[] = {-0x1.555532p-2f, 0x1.110726p-3f, -0x1.b83c1ap-5f, 0x1.5224e4p-6f, -0x1.75d9d2p-8f};
#else
static const real EXPM1[] = {0x1.0000000000000p-1,  0x1.5555555555559p-3,  0x1.555555555553ep-5,
                             0x1.111111110f6c4p-7,  0x1.6c16c16c1f0e3p-10, 0x1.a01a01afdd8f1p-13,
                             0x1.a01a017bb0d51p-16, 0x1.71ddf863b83fep-19, 0x1.27e53642b57a3p-22,
                             0x1.af5ea85138f77p-26, 0x1.1ee8892120d08p-29};
static const real TANH[] = {-0x1.5555555555552p-2,  0x1.1111111110c01p-3,   -0x1.ba1ba1b9ce42dp-5,
                            0x1.664f48702fc91p-6,   -0x1.226e32c03f157p-7,  0x1.d6d35828b994dp-9,
                            -0x1.7d9c1b72e51dap-10, 0x1.350ad12d85740p-11,  -0x1.f10bfa5a47b92p-13,
                            0x1.80038039610e1p-14,  -0x1.fa6a7f17525a6p-16, 0x1.956dd29329db3p-18};
#endif
enum { EXPM1_TERMS = sizeof EXPM1 / sizeof *EXPM1, TANH_TERMS = sizeof TANH / sizeof *TANH };

/* c[0] + c[1] x + ..., in pairs of terms: as many operations as one by one, but half as long a chain. */
INLINE vec polynomial(const int TERMS, const real *c, vec x, vec x2)
{
    vec sum = TERMS % 2 ? broadcast(c[TERMS - 1]) : fma_(broadcast(c[TERMS - 1]), x, broadcast(c[TERMS - 2]));
#pragma GCC unroll 8
    for (int i = TERMS - 4 + TERMS % 2; i >= 0; i -= 2)
        sum = fma_(sum, x2, fma_(broadcast(c[i + 1]), x, broadcast(c[i])));
    return sum;
}

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

    const vec r2 = r * r;
    return (exp_parts){fma_(r2, polynomial(EXPM1_TERMS, EXPM1, r, r2), r), (ivec)shifted};
}

/* 2^n for an n of exp_split, -EXPONENT_BIAS (which gives 0) <= n <= EXPONENT_BIAS. */
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

/* sigmoid(x) = 1 / (1 + exp(-x)); the denominator is 2^n + (2^n p + 1), largest term last */
INLINE vec sigmoid_(vec x)
{
    const vec bound = broadcast(SIGMOID_HIGH);
    exp_parts e = exp_split(at_most(at_least(-x, -bound), bound));
    vec scale = power_of_two(e.n);
    return broadcast(1) / (scale + fma_(scale, e.p, broadcast(1)));
}

/*
 * tanh(x) = 1 - 2 / (exp(2 |x|) + 1) with the sign of x, where that is well conditioned;
 * near 0, where 1 - ... would cancel, x + x^3 P(x^2).
 */
INLINE vec tanh_(vec x)
{
    const ivec sign = (ivec)broadcast((real)-0.0);
    vec y = (vec)((ivec)x & ~sign);
    vec bounded = at_most(y, broadcast(TANH_HIGH));
    exp_parts e = exp_split(bounded + bounded);
    vec scale = power_of_two(e.n);
    vec far = broadcast(1) - broadcast(2) / (scale + fma_(scale, e.p, broadcast(1)));

    vec y2 = y * y;
    vec near = fma_(y * y2, polynomial(TANH_TERMS, TANH, y2, y2 * y2), y);
    return (vec)((ivec)choose(y < broadcast((real)0.625), near, far) | ((ivec)x & sign));
}

INLINE vec relu_(vec x)
{
    return at_least(x, broadcast(0)); /* NaN stays */
}

#endif
