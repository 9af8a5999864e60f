/*
 * exp, tanh and sigmoid over lanes: at most 2 ulp in float32 where the result is normal
 * (tests/exhaustive_ulp.py looks at every float32).
 *
 * All three rest on one reduction: y = n ln 2 + r with n whole and |r| <= ln 2 / 2, so that
 * exp(y) = 2^n (1 + p), p = expm1(r). Keeping p apart from the 1 saves a rounding wherever more is added to it.
 */
#ifndef FASTSEQ_VEC_MATH_H
#define FASTSEQ_VEC_MATH_H

#include "vec.h"

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
    vec whole; /* n as a real                                      */
    vec rest;  /* what was rounded off r: p is short of about that */
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
#pragma GCC unroll 16
    for (int i = TERMS - 4 + TERMS % 2; i >= 0; i -= 2)
        sum = fma_(sum, x2, fma_(broadcast(c[i + 1]), x, broadcast(c[i])));
    return sum;
}

/*
 * exp of y + low, where low is what was rounded off y; NULL: nothing. y must lie where n fits the exponent: the callers
 * clamp. NaN gives p = NaN.
 */
INLINE exp_parts exp_split_sum(vec y, const vec *low)
{
    /* Adding 1.5 * 2^MANTISSA_BITS rounds to a whole number and puts it into the low bits. The high part of
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
    const vec high = r;
    r = low ? high + fma_(n, broadcast(-ln2_low), *low) : fma_(n, broadcast(-ln2_low), high);

    const vec r2 = r * r;
    const vec rest = low ? fma_(n, broadcast(-ln2_low), *low) - (r - high) : broadcast(0);
    return (exp_parts){fma_(r2, polynomial(EXPM1_TERMS, EXPM1, r, r2), r), (ivec)shifted, n, rest};
}

INLINE exp_parts exp_split(vec y)
{
    return exp_split_sum(y, NULL);
}

/* 2^n for an n of exp_split, -EXPONENT_BIAS (which gives 0) <= n <= EXPONENT_BIAS. */
INLINE vec power_of_two(ivec n)
{
    return (vec)((n << MANTISSA_BITS) + ibroadcast((integer)EXPONENT_BIAS << MANTISSA_BITS));
}

/* y 2^n, also where 2^n itself is no normal number. */
INLINE vec times_power_of_two(vec y, exp_parts e)
{
#if FS_VECTOR_BYTES == 64 && defined(__AVX512F__) && FS_REAL_BYTES == 4
    return (vec)_mm512_scalef_ps((__m512)y, (__m512)e.whole);
#elif FS_VECTOR_BYTES == 64 && defined(__AVX512F__)
    return (vec)_mm512_scalef_pd((__m512d)y, (__m512d)e.whole);
#else
    ivec n = (e.n << (FS_REAL_BYTES * 8 - 16)) >> (FS_REAL_BYTES * 8 - 16);
    ivec half = n >> 1;
    return y * power_of_two(half) * power_of_two(n - half);
#endif
}

INLINE vec exp_(vec x)
{
    exp_parts e = exp_split(vec_min(vec_max(x, broadcast(EXP_LOW)), broadcast(EXP_HIGH)));
    return times_power_of_two(broadcast(1) + e.p, e);
}

/* exp(x) for x <= 0, or NaN */
INLINE vec exp_of_negative(vec x)
{
    exp_parts e = exp_split(vec_max(x, broadcast(EXP_LOW)));
    return times_power_of_two(broadcast(1) + e.p, e);
}

/* sigmoid(x) = 1 / (1 + exp(-x)); the denominator is 2^n + (2^n p + 1), largest term last */
INLINE vec sigmoid_(vec x)
{
    const vec bound = broadcast(SIGMOID_HIGH);
    exp_parts e = exp_split(vec_min(vec_max(-x, -bound), bound));
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
    vec bounded = vec_min(y, broadcast(TANH_HIGH));
    exp_parts e = exp_split(bounded + bounded);
    vec scale = power_of_two(e.n);
    vec far = broadcast(1) - broadcast(2) / (scale + fma_(scale, e.p, broadcast(1)));

    vec y2 = y * y;
    vec near = fma_(y * y2, polynomial(TANH_TERMS, TANH, y2, y2 * y2), y);
    return (vec)((ivec)choose(y < broadcast((real)0.625), near, far) | ((ivec)x & sign));
}

INLINE vec relu_(vec x)
{
    return vec_max(x, broadcast(0)); /* NaN stays */
}

INLINE vec magnitude(vec x)
{
    return (vec)((ivec)x & ~(ivec)broadcast((real)-0.0));
}

/* a * b - ab, where ab is that product rounded: exact, except where it underflows. */
INLINE vec product_error(vec a, vec b, vec ab)
{
#if FS_VECTOR_BYTES > 16 || defined(__aarch64__)
    return fma_(a, b, -ab);
#else
    /* Without a fused multiply-add: T. J. Dekker, "A floating-point technique for extending the available precision",
     * Numerische Mathematik 18, 1971. Halves of 12 and 26 bits have products that are exact. */
    const ivec upper = ibroadcast(-((integer)1 << (MANTISSA_BITS + 1) / 2));
    vec a1 = (vec)((ivec)a & upper), b1 = (vec)((ivec)b & upper), a2 = a - a1, b2 = b - b1;
    return ((a1 * b1 - ab) + a1 * b2 + a2 * b1) + a2 * b2;
#endif
}

/*
 * The tail of the normal distribution: P(-t) = exp(-t^2 / 2) g(t), where g falls slowly from 1/2, and its density. With g apart
 * from the exponential no digit cancels, however small the tail; t^2 is taken with what was rounded off.
 *
 * NORMAL: in float32 g itself, as a polynomial in u = t / 4 - 1, minimax of degree 17 over 0 <= t <= 8, its relative error
 * 2^-27 where P > 2^-24 and growing as P falls below; in float64 g / (1 - u) in u = (t - 4.5) / (t + 4.5), 2^-59.
 * CENTRE: (P(x) - 1/2) / x in x^2 for |x| <= 0.7, 2^-29 and 2^-72.
 */
#if FS_REAL_BYTES == 4
#define TAIL_HIGH 16.0f /* exp(-t^2 / 2) rounds to 0 */
static const real NORMAL[] = {
    0x1.82b4bcp-4f,  -0x1.5cf978p-4f, 0x1.2dd9f8p-4f, -0x1.f6a6eep-5f,  0x1.94405ep-5f,  -0x1.3aaba2p-5f,
    0x1.dc0598p-6f,  -0x1.652e04p-6f, 0x1.f6c374p-7f, -0x1.062ae0p-7f,  0x1.2b881cp-7f,  -0x1.d61ea4p-7f,
    -0x1.fb49dcp-8f, 0x1.71f0a4p-7f,  0x1.b13bbep-6f, -0x1.74062ep-10f, -0x1.357e2ap-6f, -0x1.46103ap-7f};
static const real CENTRE[] = {0x1.988454p-2f, -0x1.10582ap-4f, 0x1.46c924p-7f, -0x1.35fea4p-10f,
                              0x1.b55fa0p-14f};
#else
#define TAIL_HIGH 40.0
static const real NORMAL[] = {
    0x1.5b5acd3b15fbbp-4,   -0x1.23636f8969e77p-4,  0x1.965ef9ffe5a0ep-5,  -0x1.ccd4a11cba8edp-6,
    0x1.95881ac198878p-7,   -0x1.ed4974ef1bae3p-9,  0x1.ec162d10f9928p-12, 0x1.9781ce8ebe086p-13,
    -0x1.abb36d2bbc6e9p-14, 0x1.7ca6972c978afp-21,  0x1.a1b9f07d81811p-17, -0x1.db39364d5d193p-20,
    -0x1.a8a192f244880p-20, 0x1.7c9cf890c6614p-22,  0x1.ffe67e16d7332p-23, -0x1.dd6ff3bff7036p-25,
    -0x1.6dd0d16b78d7ep-25, 0x1.d51b0d54b9958p-28,  0x1.1c0a49a2704d6p-27, -0x1.113864802d9afp-32,
    -0x1.965d15554b840p-30, -0x1.a31c3dc141ceep-33, 0x1.750582d49c988p-33, 0x1.b74de2bae292cp-35,
    0x1.5ce7721320723p-42};
static const real CENTRE[] = {0x1.9884533d43651p-2,   -0x1.1058377e2cee0p-4,  0x1.46d04297691d9p-7,
                              -0x1.37403f6ba1008p-10, 0x1.e42b0d520776bp-14,  -0x1.3ce8fabcd524fp-17,
                              0x1.658a1fd07266cp-21,  -0x1.62220716c02a1p-25, 0x1.3869c0b57f238p-29,
                              -0x1.ee371e43ca107p-34, 0x1.410e7c747f6dap-38};
#endif
enum { NORMAL_TERMS = sizeof NORMAL / sizeof *NORMAL, CENTRE_TERMS = sizeof CENTRE / sizeof *CENTRE };
#define ROOT_OF_TWO_PI_INVERSE ((real)0x1.9884533d43651p-2) /* 1 / sqrt(2 pi) */

/* A sum or a product with what was rounded off it. */
typedef struct {
    vec high, low;
} vec_pair;

INLINE vec_pair sum_pair(vec a, vec b)
{
    const vec sum = a + b, of_b = sum - a;
    return (vec_pair){sum, (a - (sum - of_b)) + (b - of_b)};
}

/* The same where |a| is at least |b|. */
INLINE vec_pair ordered_sum_pair(vec a, vec b)
{
    const vec sum = a + b;
    return (vec_pair){sum, b - (sum - a)};
}

INLINE vec_pair product_pair(vec a, vec b)
{
    const vec product = a * b;
    return (vec_pair){product, product_error(a, b, product)};
}

/* a * b + c, rounded once or nearly so also where there is no fused multiply-add. */
INLINE vec fused(vec a, vec b, vec c)
{
#if FS_VECTOR_BYTES > 16 || defined(__aarch64__)
    return fma_(a, b, c);
#else
    const vec_pair product = product_pair(a, b), sum = sum_pair(c, product.high);
    return sum.high + (sum.low + product.low);
#endif
}

typedef struct {
    vec_pair tail; /* P(-t) 2^-n                                                */
    exp_parts e;   /* of exp(-t^2 / 2): its n, and 1 + p, which gives the density */
} normal_parts;

/* For 0 <= t, or NaN. */
INLINE normal_parts normal_of(vec t)
{
    t = vec_min(t, broadcast(TAIL_HIGH));
    const vec half = broadcast((real)-0.5);
    const vec_pair square = product_pair(t, t);
    const vec low = half * square.low;
    const exp_parts e = exp_split_sum(half * square.high, &low);
#if FS_REAL_BYTES == 4
    const vec bounded = vec_min(t, broadcast(8)), quarter = bounded * broadcast(0.25f),
              u = quarter - broadcast(1);
    /* The last terms, which bear the most, one by one: in pairs more is rounded off. Of the last two all is kept. */
    vec inner = polynomial(NORMAL_TERMS - 4, NORMAL + 4, u, u * u);
#pragma GCC unroll 2
    for (int i = 3; i > 1; i--)
        inner = fused(inner, u, broadcast(NORMAL[i]));
    const vec_pair first = product_pair(u, inner), second = sum_pair(broadcast(NORMAL[1]), first.high);
    const vec_pair product = product_pair(u, second.high);
    vec_pair g = sum_pair(broadcast(NORMAL[0]), product.high);
    g.low += u * (second.low + first.low);
    /* What was rounded off u, exactly, times the slope: g' = t g - 1 / sqrt(2 pi). */
    const vec rounded_off = (quarter - (u + broadcast(1))) * broadcast(4);
    g.low += product.low + rounded_off * fma_(bounded, g.high, broadcast(-ROOT_OF_TWO_PI_INVERSE));
#else
    const vec inverse = broadcast(1) / (t + broadcast(4.5)), u = (t - broadcast(4.5)) * inverse;
    const vec_pair g = {broadcast(9) * inverse * polynomial(NORMAL_TERMS, NORMAL, u, u * u), {0}};
#endif
    /* g (1 + p) */
    const vec_pair more = product_pair(g.high, e.p);
    const vec_pair tail = ordered_sum_pair(g.high, more.high);
    return (normal_parts){{tail.high, fma_(g.high, e.rest, tail.low + more.low + g.low)}, e};
}

INLINE vec normal_density(normal_parts normal)
{
    return times_power_of_two(broadcast(1) + normal.e.p, normal.e) * broadcast(ROOT_OF_TWO_PI_INVERSE);
}

/* gelu(x) = x P(x), P the distribution function of the standard normal: the erf form. At most 2 ulp of the larger of
 * |y| and 2^-24 |x| in float32. */
INLINE vec gelu_(vec x)
{
    const vec t = magnitude(x), x2 = x * x;
    const normal_parts normal = normal_of(t);
    const ivec negative = x < broadcast(0), bounded = t < broadcast(TAIL_HIGH);
    const ivec far = (x < broadcast((real)-0.55)) | (x > broadcast((real)0.7));
    const vec high = times_power_of_two(normal.tail.high, normal.e),
              low = times_power_of_two(normal.tail.low, normal.e);
    const vec near = fused(x, polynomial(CENTRE_TERMS, CENTRE, x2, x2 * x2), broadcast((real)0.5));
    const vec factor = choose(far, choose(negative, high, broadcast(1) - high), near);
    const vec y = x * factor;
    /* The far tail is small, and only there are both roundings seen. */
    return choose(far & bounded & negative, y + fma_(x, low, product_error(x, factor, y)), y);
}

#if FS_REAL_BYTES == 4
/*
 * Both forms for narrow weights, whose rounding is 2^13 times as coarse: within 2^-21 |x|, at a third of the time. Of
 * the erf form, (P(t) - 1/2) / t is a polynomial in u = 2 (t / 5.25)^2 - 1; past 5.25, P is 1.
 */
static const real GELU_OF_SQUARE[] = {0x1.13c84ap-3f,  -0x1.12f364p-4f, 0x1.96af60p-5f,  -0x1.45c9cep-5f,
                                      0x1.06a30ap-5f,  -0x1.996d6cp-6f, 0x1.2c9c84p-6f,  -0x1.a95bccp-7f,
                                      0x1.2785c2p-7f,  -0x1.4ba4f0p-8f, 0x1.f89e64p-10f, -0x1.6be00cp-10f,
                                      0x1.7810d2p-10f, -0x1.198b2ap-11f};
enum { GELU_OF_SQUARE_TERMS = sizeof GELU_OF_SQUARE / sizeof *GELU_OF_SQUARE };

INLINE vec gelu_near(vec x)
{
    const real end = 5.25f;
    const vec t = vec_min(magnitude(x), broadcast(end));
    const vec u = fma_(t * t, broadcast(2 / (end * end)), broadcast(-1));
    const vec half = t * polynomial(GELU_OF_SQUARE_TERMS, GELU_OF_SQUARE, u, u * u);
    const ivec negative = x < broadcast(0), inside = t < broadcast(end);
    const vec tail = (vec)((ivec)(broadcast(0.5f) - half) & inside);
    return choose(x < broadcast(-end), broadcast(-0.0f), x * choose(negative, tail, broadcast(1) - tail));
}
#endif

/* gelu'(x) = P(x) + x p(x), p the density */
INLINE vec gelu_slope(vec x)
{
    const normal_parts normal = normal_of(magnitude(x));
    const vec tail = times_power_of_two(normal.tail.high, normal.e);
    return fma_(x, normal_density(normal), choose(x < broadcast(0), tail, broadcast(1) - tail));
}

#define GELU_LINEAR 0x1.9884533d43651p+0 /* 2 sqrt(2 / pi)          */
#define GELU_CUBIC 0x1.2444f2a4d8b4bp-4  /* 2 sqrt(2 / pi) 0.044715 */

/*
 * 1 + exp(-x (a + b x^2)), a and b as above: what the tanh of the other GELU is made of, (1 + tanh(y)) / 2 =
 * 1 / (1 + exp(-2 y)). The argument is taken with what was rounded off, because its exponential has as many ulp of error
 * as it is large.
 */
INLINE vec gelu_divisor(vec x)
{
    const real a = (real)GELU_LINEAR, b = (real)GELU_CUBIC;
    const vec sign = (vec)((ivec)x & (ivec)broadcast((real)-0.0));
    const vec t = vec_min(magnitude(x), broadcast(TAIL_HIGH));
    const vec_pair square = product_pair(t, t);
    const vec_pair cubic = product_pair(square.high, broadcast(b)), factor = sum_pair(broadcast(a), cubic.high);
    vec low =
        fma_(square.low, broadcast(b), factor.low + cubic.low + broadcast((real)(GELU_LINEAR - (double)a)));
    low = fma_(square.high, broadcast((real)(GELU_CUBIC - (double)b)), low);
    const vec_pair y = product_pair(t, factor.high);
    low = fma_(t, low, y.low);
    /* -y with the sign of x */
    const vec signed_low = (vec)((ivec)-low ^ (ivec)sign);
    const vec bounded = (vec)((ivec)-vec_min(y.high, broadcast(SIGMOID_HIGH)) ^ (ivec)sign);
    exp_parts e = exp_split_sum(bounded, &signed_low);
    vec scale = power_of_two(e.n);
    return scale + fma_(scale, e.p, broadcast(1));
}

/* gelu(x) = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 */
INLINE vec gelu_tanh_(vec x)
{
    return x / choose(x < broadcast(-TAIL_HIGH), broadcast(INFINITE), gelu_divisor(x));
}

#if FS_REAL_BYTES == 4
INLINE vec gelu_tanh_near(vec x)
{
    const vec y = x * fma_(x * x, broadcast((real)GELU_CUBIC), broadcast((real)GELU_LINEAR));
    return choose(x < broadcast(-TAIL_HIGH), broadcast(-0.0f), x * sigmoid_(y));
}
#endif

/* With s = 1 / (1 + exp(-x (a + b x^2))): s + x s (1 - s) (a + 3 b x^2); s is taken at -|x|, where 1 - s does not cancel */
INLINE vec gelu_tanh_slope(vec x)
{
    const vec t = vec_min(magnitude(x), broadcast(TAIL_HIGH)), tail = broadcast(1) / gelu_divisor(-t);
    const vec upper = broadcast(1) - tail;
    const vec inner = fma_(t * t, broadcast((real)(3 * GELU_CUBIC)), broadcast((real)GELU_LINEAR));
    return fma_(x, inner * (tail * upper), choose(x < broadcast(0), tail, upper));
}

#endif
