/*
 * A step of decoding: attention of the last query of a sequence to keys and values in pages.
 *
 * One query's sums are few, and each waits for itself at every key. So heads take interleave_heads, as many as keep the processor
 * busy. What a head gives is, number by number, what `attend` makes of it.
 */
#ifndef FASTSEQ_ATTEND_DECODE_H
#define FASTSEQ_ATTEND_DECODE_H

#include "attention.h"

/*
 * c[h][v] = keep[h] c[h][v] + sum over k, in order, of x[h][k] w[h][k][v], for each of some heads; with keep NULL c starts
 * at 0. Rows of w lie w_row reals apart.
 */
INLINE void interleaved_tile(const int HEADS, const int VECTORS, const real *const *x, const real *const *w,
                             ptrdiff_t w_row, ptrdiff_t k_size, real *const *c, ptrdiff_t at, const real *keep)
{
    vec sums[8];
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sums[h * VECTORS + v] = keep ? broadcast(keep[h]) * load(c[h] + at + v * LANES) : (vec){0};
    for (ptrdiff_t k = 0; k < k_size; k++)
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
            const vec input = broadcast(x[h][k]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                sums[h * VECTORS + v] =
                    fma_(input, load(w[h] + k * w_row + at + v * LANES), sums[h * VECTORS + v]);
        }
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            store(c[h] + at + v * LANES, sums[h * VECTORS + v]);
}

/* Of n <= INTERLEAVED_HEADS heads so many at a time that about 8 sums wait for each other. */
static void interleave_heads(int n, int vectors, const real *const *x, const real *const *w, ptrdiff_t w_row,
                             ptrdiff_t k_size, real *const *c, const real *keep)
{
    int h = 0;
    if (n == 4 && vectors <= 2) {
        if (vectors == 1)
            interleaved_tile(4, 1, x, w, w_row, k_size, c, 0, keep);
        else
            interleaved_tile(4, 2, x, w, w_row, k_size, c, 0, keep);
        return;
    }
    for (; h + 2 <= n; h += 2)
        for (int v = 0; v < vectors; v += 4) {
            const real *some = keep ? keep + h : NULL;
            switch (vectors - v) {
            case 1: interleaved_tile(2, 1, x + h, w + h, w_row, k_size, c + h, v * LANES, some); break;
            case 2: interleaved_tile(2, 2, x + h, w + h, w_row, k_size, c + h, v * LANES, some); break;
            case 3: interleaved_tile(2, 3, x + h, w + h, w_row, k_size, c + h, v * LANES, some); break;
            default: interleaved_tile(2, 4, x + h, w + h, w_row, k_size, c + h, v * LANES, some);
            }
        }
    if (h < n) {
        const void *row = x[h];
        multiply(1, vectors, &row, 1, w[h], w_row, k_size, c[h], 0, keep ? keep + h : NULL);
    }
}

/*
 * The heads [first, last) of the one query of sequence b, whose keys and values are in pages: what `attend` does for each of
 * them, in the same order, but in interleave_heads, because the sums of one query alone wait for themselves. No mask, no weights, no
 * dropout.
 */
static void attend_decode(const fs_attention *job, ptrdiff_t b, ptrdiff_t first, ptrdiff_t last, void *scratch)
{
    static const real ones[INTERLEAVED_HEADS] = {1, 1, 1, 1};
    const ptrdiff_t group = job->heads / job->kv_heads, width = job->width;
    const head_view h = view_of(job, b, 0);
    real *scores = (real *)scratch + 64 / sizeof(real), *sums = scores + INTERLEAVED_HEADS * KEY_BLOCK;
    ptrdiff_t key_first, key_last;
    if (h.queries < 1)
        return;
    if (forbids(job) && any_unsure(&h)) {
        for (ptrdiff_t head = first; head < last; head++) {
            head_view one = view_of_head(view_of(job, b, head / group), b, head);
            one.unsure = 1;
            attend_queries(&one, 0, 1, scores);
        }
        return;
    }
    allowed_keys(&h, 0, &key_first, &key_last);
    for (int n; first < last; first += n) {
        n = last - first < INTERLEAVED_HEADS ? (int)(last - first) : INTERLEAVED_HEADS;
        real maximum[INTERLEAVED_HEADS], total[INTERLEAVED_HEADS], keep[INTERLEAVED_HEADS],
            *s[INTERLEAVED_HEADS], *sum[INTERLEAVED_HEADS];
        const real *q[INTERLEAVED_HEADS], *w[INTERLEAVED_HEADS];
        ptrdiff_t before[INTERLEAVED_HEADS]; /* reals of a page */
        memset(sums, 0, (size_t)(n * width) * sizeof(real));
        for (int i = 0; i < n; i++) {
            maximum[i] = -INFINITE;
            total[i] = 0;
            q[i] = h.q + (first + i) * job->q.head;
            sum[i] = sums + i * width;
            before[i] = job->page_layer + (first + i) / group * page_head_size(width);
        }
        for (ptrdiff_t key = key_first / KEY_BLOCK * KEY_BLOCK; key < key_last; key += KEY_BLOCK) {
            const ptrdiff_t count = key_last - key < KEY_BLOCK ? key_last - key : KEY_BLOCK;
            for (ptrdiff_t at = 0; at < count; at += PANEL) {
                const fs_page *page = h.pages[(key + at) / FS_PAGE];
                const ptrdiff_t vectors = (count - at + LANES - 1) / LANES;
                for (int i = 0; page && i < n; i++) {
                    s[i] = scores + i * KEY_BLOCK + at;
                    w[i] = page_data(page) + before[i] + at % FS_PAGE * width;
                }
                if (page)
                    interleave_heads(n, vectors < 4 ? (int)vectors : 4, q, w, PANEL, width, s, NULL);
            }
            for (int i = 0; i < n; i++)
                keep[i] = weigh(&h, 0, key, (count + LANES - 1) / LANES, scores + i * KEY_BLOCK, maximum + i,
                                total + i);
            const real *kept = keep;
            for (ptrdiff_t at = 0; at < count; at += FS_PAGE) {
                const fs_page *page = h.pages[(key + at) / FS_PAGE];
                const real *weights[INTERLEAVED_HEADS];
                if (!page)
                    continue;
                for (int i = 0; i < n; i++) {
                    weights[i] = scores + i * KEY_BLOCK + at;
                    w[i] = page_data(page) + before[i] + FS_PAGE * width;
                }
                interleave_heads(n, (int)(width / LANES), weights, w, width,
                                 count - at < FS_PAGE ? count - at : FS_PAGE, sum, kept);
                kept = ones; /* the chain goes on where the page before left it */
            }
        }
        for (int i = 0; i < n; i++)
            query_epilogue(h.out + (first + i) * job->out.head,
                           (real *)job->stats + 2 * (b * job->heads + first + i), width, sum[i], maximum[i],
                           total[i]);
    }
}

#endif
