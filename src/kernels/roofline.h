/*
 * The two limits every kernel is held against: multiply-adds on registers alone, and bytes read.
 */
#ifndef FASTSEQ_ROOFLINE_H
#define FASTSEQ_ROOFLINE_H

#include "vec.h"
#include "kernels.h"

/* `rounds` times FS_ACCUMULATORS multiply-adds of LANES reals; returns something that depends on all of them. */
static double multiply_adds(ptrdiff_t rounds)
{
    vec sums[FS_ACCUMULATORS];
    vec factor = broadcast((real)0.999), term = broadcast((real)0.001);
    /* The compiler must not know the operands, or it computes the loop away. */
    __asm__ volatile("" : "+m"(factor), "+m"(term));
    vec a = factor, b = term;
#pragma GCC unroll 12
    for (int i = 0; i < FS_ACCUMULATORS; i++)
        sums[i] = broadcast((real)i);
    for (ptrdiff_t round = 0; round < rounds; round++)
#pragma GCC unroll 12
        for (int i = 0; i < FS_ACCUMULATORS; i++)
            sums[i] = fma_(sums[i], a, b);
    vec total = sums[0];
#pragma GCC unroll 12
    for (int i = 1; i < FS_ACCUMULATORS; i++)
        total += sums[i];
    return (double)total[0];
}

/* Reads n reals (a multiple of 8 vectors is read, the rest is not) `rounds` times. */
static double read_memory(ptrdiff_t rounds, ptrdiff_t n, const void *data)
{
    vec sums[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        sums[i] = broadcast(0);
    for (ptrdiff_t round = 0; round < rounds; round++) {
        const real *p = data;
        __asm__ volatile("" : "+r"(p)); /* every round reads anew */
        for (ptrdiff_t k = 0; k + 8 * LANES <= n; k += 8 * LANES)
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++)
                sums[i] += load(p + k + i * LANES);
    }
    vec total = sums[0];
#pragma GCC unroll 8
    for (int i = 1; i < 8; i++)
        total += sums[i];
    return (double)total[0];
}

#endif
