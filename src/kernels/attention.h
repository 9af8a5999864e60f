/*
 * Softmax attention, forward and backward, of one key-value head of one sequence at a time.
 *
 * Keys are taken in blocks of KEY_BLOCK from the first key on, with a running maximum and a running sum a query, so that
 * no more than a block of scores is ever held. What a query gives is one order of operations, fixed by its own keys:
 * a key that is forbidden adds a weight of exactly 0 wherever it stands, and where a whole block is, to do it and to leave
 * it out are the same.
 *
 * Forbidden keys may hold anything. Scores are replaced before anything is made of them; for the products after that,
 * 0 times NaN would be NaN, so where a factor holds anything that is not finite, the weights of forbidden keys are marked by a
 * negative zero, which no weight else is, and the products leave out what is marked.
 */
#ifndef FASTSEQ_ATTENTION_H
#define FASTSEQ_ATTENTION_H

#include "vec_math.h"
#include "kernels.h"
#include "kv_pages.h"
#include "rows.h"
#include "microkernel.h"

enum {
    KEY_BLOCK = 256, /* keys of a forward block: scores of a tile of rows stay in the first cache   */
    BACK_KEYS = 128, /* keys and queries of a backward block: two blocks of weights stay in the     */
    BACK_QUERIES = 96, /* second                                                                      */
    QUERY_BLOCK = 96, /* queries that one block of keys serves before the next is fetched            */
    PANEL = PAGE_PANEL, /* keys of a packed panel                                                      */
    TILE = ROWS_OF_4 > 4 ? 6
                         : 3, /* rows of a tile                                                              */
    INTERLEAVED_HEADS =
        4, /* heads that take interleave_heads in `attend_decode`                                      */
};

/*
 * c[row][v] = keep[row] c[row][v] + sum over k, in order, of x[row][k x_stride] w[k][v]; with keep NULL c starts at 0. At
 * maximum TILE rows, those of c c_row reals apart. Vectors go by fours: rows of w lie w_row reals apart, and four vectors from the
 * next four w_next.
 */
INLINE void multiply_tile(const int ROWS, const int VECTORS, const void *const *x, ptrdiff_t x_stride,
                          const real *w, ptrdiff_t w_row, ptrdiff_t k_size, real *c, ptrdiff_t c_row,
                          const real *keep)
{
    vec sums[6 * 4];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sums[r * VECTORS + v] = keep ? broadcast(keep[r]) * load(c + r * c_row + v * LANES) : (vec){0};
    microkernel_ahead(FS_REAL, ROWS, 1, VECTORS, w_row, x_stride, sums, x, w, 0, k_size, NULL);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            store(c + r * c_row + v * LANES, sums[r * VECTORS + v]);
}

INLINE void multiply_rows(const int ROWS, int vectors, const void *const *x, ptrdiff_t x_stride, const real *w,
                          ptrdiff_t w_row, ptrdiff_t w_next, ptrdiff_t k_size, real *c, ptrdiff_t c_row,
                          const real *keep)
{
    for (; vectors >= 4; vectors -= 4, w += w_next, c += 4 * LANES)
        multiply_tile(ROWS, 4, x, x_stride, w, w_row, k_size, c, c_row, keep);
    switch (vectors) {
    case 3: multiply_tile(ROWS, 3, x, x_stride, w, w_row, k_size, c, c_row, keep); break;
    case 2: multiply_tile(ROWS, 2, x, x_stride, w, w_row, k_size, c, c_row, keep); break;
    case 1: multiply_tile(ROWS, 1, x, x_stride, w, w_row, k_size, c, c_row, keep); break;
    }
}

INLINE void multiply_any(int rows, int vectors, const void *const *x, ptrdiff_t x_stride, const real *w,
                         ptrdiff_t w_row, ptrdiff_t w_next, ptrdiff_t k_size, real *c, ptrdiff_t c_row,
                         const real *keep)
{
    switch (rows) {
    case 1: multiply_rows(1, vectors, x, x_stride, w, w_row, w_next, k_size, c, c_row, keep); break;
    case 2: multiply_rows(2, vectors, x, x_stride, w, w_row, w_next, k_size, c, c_row, keep); break;
    case 3: multiply_rows(3, vectors, x, x_stride, w, w_row, w_next, k_size, c, c_row, keep); break;
#if FS_VECTOR_BYTES == 64 || defined(__aarch64__)
    case 4: multiply_rows(4, vectors, x, x_stride, w, w_row, w_next, k_size, c, c_row, keep); break;
    case 5: multiply_rows(5, vectors, x, x_stride, w, w_row, w_next, k_size, c, c_row, keep); break;
    case 6: multiply_rows(6, vectors, x, x_stride, w, w_row, w_next, k_size, c, c_row, keep); break;
#endif
    }
}

/* With rows of w that lie whole, w_row reals apart. */
static void multiply(int rows, int vectors, const void *const *x, ptrdiff_t x_stride, const real *w,
                     ptrdiff_t w_row, ptrdiff_t k_size, real *c, ptrdiff_t c_row, const real *keep)
{
    multiply_any(rows, vectors, x, x_stride, w, w_row, 4 * LANES, k_size, c, c_row, keep);
}

/* With the panels of `pack_transposed`, from zeros. */
static void multiply_panels(int rows, int vectors, const void *const *x, const real *panels, ptrdiff_t k_size,
                            real *c, ptrdiff_t c_row)
{
    multiply_any(rows, vectors, x, 1, panels, 4 * LANES, 4 * LANES * k_size, k_size, c, c_row, NULL);
}

INLINE int is_marked(real x)
{
    return x == 0 && __builtin_signbit(x);
}

/* As `multiply`, but what x marks by a negative zero takes no part. For factors that are not finite; slow. */
static void multiply_unmarked(int rows, int vectors, const void *const *x, ptrdiff_t x_stride, const real *w,
                              ptrdiff_t w_row, ptrdiff_t k_size, real *c, ptrdiff_t c_row, const real *keep)
{
    const real one = 1;
    for (int r = 0; r < rows; r++) {
        const real *row = x[r], *start = keep ? keep + r : NULL;
        ptrdiff_t k = 0;
        do {
            while (k < k_size && is_marked(row[k * x_stride]))
                k++;
            ptrdiff_t end = k;
            while (end < k_size && !is_marked(row[end * x_stride]))
                end++;
            const void *from = row + k * x_stride;
            if (end > k || start != &one) /* a sum of nothing still gets its start */
                multiply(1, vectors, &from, x_stride, w + k * w_row, w_row, end - k, c + r * c_row, c_row,
                         start);
            start = &one;
            k = end;
        } while (k < k_size);
    }
}

/* The lanes of some vectors turned: row i of the result is lane i of each, LANES rows of LANES. */
#define LANE_(i, d) ((i) & (d) ? LANES + (i) - (d) : (i))
#define OTHER_(i, d) ((i) & (d) ? LANES + (i) : (i) + (d))
#if FS_VECTOR_BYTES / FS_REAL_BYTES == 16
#define SWAP_(a, b, L, d)                                                                                 \
    __builtin_shufflevector(a, b, L(0, d), L(1, d), L(2, d), L(3, d), L(4, d), L(5, d), L(6, d), L(7, d), \
                            L(8, d), L(9, d), L(10, d), L(11, d), L(12, d), L(13, d), L(14, d), L(15, d))
#elif FS_VECTOR_BYTES / FS_REAL_BYTES == 8
#define SWAP_(a, b, L, d) \
    __builtin_shufflevector(a, b, L(0, d), L(1, d), L(2, d), L(3, d), L(4, d), L(5, d), L(6, d), L(7, d))
#elif FS_VECTOR_BYTES / FS_REAL_BYTES == 4
#define SWAP_(a, b, L, d) __builtin_shufflevector(a, b, L(0, d), L(1, d), L(2, d), L(3, d))
#else
#define SWAP_(a, b, L, d) __builtin_shufflevector(a, b, L(0, d), L(1, d))
#endif
#define TRANSPOSE_STAGE_(d)                                                  \
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) if (!(i & (d))) \
    {                                                                        \
        vec a = v[i], b = v[i + (d)];                                        \
        v[i] = SWAP_(a, b, LANE_, d);                                        \
        v[i + (d)] = SWAP_(a, b, OTHER_, d);                                 \
    }

INLINE void transpose_lanes(vec *v)
{
    TRANSPOSE_STAGE_(1)
#if FS_VECTOR_BYTES / FS_REAL_BYTES >= 4
    TRANSPOSE_STAGE_(2)
#endif
#if FS_VECTOR_BYTES / FS_REAL_BYTES >= 8
    TRANSPOSE_STAGE_(4)
#endif
#if FS_VECTOR_BYTES / FS_REAL_BYTES >= 16
    TRANSPOSE_STAGE_(8)
#endif
}

/* n rows of `width` reals, whole vectors, as panels [panel][width][PANEL], every panel whole; past the last row zeros. */
static void pack_transposed(const real *rows, ptrdiff_t row, ptrdiff_t n, ptrdiff_t width, real *panels)
{
    for (ptrdiff_t first = 0; first < n; first += LANES) {
        real *target = panels + first / PANEL * (PANEL * width) + first % PANEL;
        const ptrdiff_t count = n - first < LANES ? n - first : LANES;
        for (ptrdiff_t column = 0; column < width; column += LANES) {
            vec v[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                v[i] = i < count ? load(rows + (first + i) * row + column) : (vec){0};
            transpose_lanes(v);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                store(target + (column + i) * PANEL, v[i]);
        }
    }
    const ptrdiff_t whole = (n + LANES - 1) / LANES * LANES, end = (n + PANEL - 1) / PANEL * PANEL;
    for (ptrdiff_t first = whole; first < end; first += LANES)
        for (ptrdiff_t k = 0; k < width; k++)
            store(panels + first / PANEL * (PANEL * width) + k * PANEL + first % PANEL, (vec){0});
}

/* Whether all of n rows are finite. */
static int all_finite(const real *rows, ptrdiff_t row, ptrdiff_t n, ptrdiff_t width)
{
    vec sums[4] = {{0}};
    for (ptrdiff_t i = 0; i < n; i++)
        for (ptrdiff_t k = 0; k < width; k += LANES)
            sums[k / LANES % 4] += load(rows + i * row + k) * broadcast(0); /* inf and NaN give NaN */
    return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) == 0;
}

/* One query head of one sequence, as an item sees it; pointers to reals, distances in reals. */
typedef struct {
    const fs_attention *job;
    const real *q, *k, *v, *dout;
    real *out, *dq, *dk, *dv;
    const real *k_panels, *v_panels;
    fs_page **pages; /* where keys and values are; NULL: they are k_panels and v          */
    ptrdiff_t page_head; /* reals of a page before this head                         */
    real *weights; /* [queries][Tk], or NULL                                   */
    real *stats; /* of each query: the maximum, and 1 over the sum           */
    const char *mask; /* of query 0 and key 0                                     */
    ptrdiff_t queries, keys,
        ahead; /* ahead: what may be attended to is counted from query i's place i + ahead   */
    uint64_t first_weight; /* the number of the first weight, for dropout              */
    int unsure; /* whether a factor of the products is not finite: mark what is forbidden */
} head_view;

/* The keys [first, last) of a query that its place allows. */
INLINE void allowed_keys(const head_view *h, ptrdiff_t query, ptrdiff_t *first, ptrdiff_t *last)
{
    const ptrdiff_t place = query + h->ahead, window = h->job->window;
    ptrdiff_t from = 0, to = h->keys;
    if (h->job->causal && place + 1 < to)
        to = place + 1;
    if (window) {
        if (place - window + 1 > from)
            from = place - window + 1;
        if (place < to && to - place > window) /* no sum that could overflow */
            to = place + window;
    }
    *first = from;
    *last = to < from ? from : to;
}

/* What the mask says of the keys from `key` on: s with it, and `allowed`, lanes that it lets be. */
INLINE vec masked(const head_view *h, ptrdiff_t query, ptrdiff_t key, vec s, ivec *allowed)
{
    const fs_attention *job = h->job;
    const ptrdiff_t left = h->keys - key;
    const char *row =
        h->mask + query * job->mask_strides[2] + key * (job->mask_is_bool ? 1 : (ptrdiff_t)sizeof(real));
    if (job->mask_is_bool) {
        typedef int8_t bytes __attribute__((vector_size(FS_VECTOR_BYTES / FS_REAL_BYTES)));
        bytes b = {0};
        memcpy(&b, row, (size_t)(left < LANES ? left : LANES));
        *allowed = __builtin_convertvector(b, ivec) != ibroadcast(0);
        return s;
    }
    const vec more = left < LANES ? load_part((const real *)row, left) : load((const real *)row);
    *allowed = more != broadcast(-INFINITE);
    return s + more;
}

INLINE ivec lanes_between(ptrdiff_t first, ptrdiff_t last)
{
    ivec lane = {0};
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
    const integer low = (integer)(first < 0 ? 0 : first > LANES ? LANES : first);
    const integer high = (integer)(last < 0 ? 0 : last > LANES ? LANES : last);
    return (lane >= ibroadcast(low)) & (lane < ibroadcast(high));
}

/*
 * What is left to multiply scores by once they are final. With nothing to add to them that is the scale, which a maximum
 * can be taken before; else they are scaled at once.
 */
INLINE real scale_left(const fs_attention *job)
{
    return job->mask || !(job->scale > 0) ? 1 : (real)job->scale;
}

/*
 * The scores of one query in place: with the mask, -inf where forbidden, and scaled except for `scale_left`. `s` stands for
 * the keys from `key` on. Returns the largest of each lane.
 */
INLINE vec final_scores(const head_view *h, ptrdiff_t query, ptrdiff_t key, ptrdiff_t vectors, real *s)
{
    const vec forbidden = broadcast(-INFINITE), scale = broadcast((real)h->job->scale);
    const int scaled = scale_left(h->job) == 1;
    ptrdiff_t first, last, v = 0;
    vec maximum[4] = {forbidden, forbidden, forbidden,
                      forbidden}; /* a maximum waits for itself as a sum does */
    allowed_keys(h, query, &first, &last);
    while (v < vectors) {
        const ptrdiff_t at = key + v * LANES;
        if (!scaled && at >= first && at + 4 * LANES <= last && v + 4 <= vectors) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                maximum[i] = vec_max(load(s + (v + i) * LANES), maximum[i]);
            v += 4;
            continue;
        }
        vec x = load(s + v * LANES);
        x = scaled ? x * scale : x;
        if (h->mask) {
            ivec allowed;
            x = masked(h, query, at, x, &allowed);
            x = choose(allowed, x, forbidden);
        }
        if (at < first || at + LANES > last)
            x = choose(lanes_between(first - at, last - at), x, forbidden);
        store(s + v * LANES, x);
        maximum[v % 4] = vec_max(x, maximum[v % 4]);
        v++;
    }
    return vec_max(vec_max(maximum[0], maximum[1]), vec_max(maximum[2], maximum[3]));
}

/* exp(s - base) of final scores. */
INLINE vec weight_of(vec s, vec left, vec base)
{
    return exp_of_negative(s * left - base);
}

/* Weights, or gradients of scores, of one query: a negative zero where forbidden, and nowhere else. */
static void mark(const head_view *h, ptrdiff_t query, ptrdiff_t key, ptrdiff_t vectors, real *p)
{
    ptrdiff_t first, last;
    allowed_keys(h, query, &first, &last);
    for (ptrdiff_t v = 0; v < vectors; v++, key += LANES) {
        ivec allowed = lanes_between(first - key, last - key);
        if (h->mask && key < h->keys) {
            ivec by_mask;
            masked(h, query, key, broadcast(0), &by_mask);
            allowed &= by_mask;
        }
        store(p + v * LANES, choose(allowed, load(p + v * LANES) + broadcast(0), broadcast((real)-0.0)));
    }
}

/* Weights of one query dropped, in place, n keys from `key` on. */
static void drop_weights(const head_view *h, ptrdiff_t query, ptrdiff_t key, ptrdiff_t n, const real *p,
                         real *out)
{
    const fs_attention *job = h->job;
    dropout(n, p, out, h->first_weight + (uint64_t)query * (uint64_t)job->max_keys + (uint64_t)key, job->seed,
            0, job->threshold, job->factor);
}

/* The scores of some queries against the keys [key, key + vectors * LANES), before `final_scores`; rows KEYS apart. */
INLINE void raw_scores(const real *rows, ptrdiff_t row, int n, const real *panels, ptrdiff_t width,
                       ptrdiff_t key, ptrdiff_t vectors, real *s, ptrdiff_t s_row)
{
    const void *x[TILE];
    for (int r = 0; r < n; r++)
        x[r] = rows + r * row;
    multiply_panels(n, (int)vectors, x, panels + key * width, width, s, s_row);
}

/* The head in the page of a key; NULL: there is no page, and every key it would hold is forbidden. */
INLINE const real *in_page(const head_view *h, ptrdiff_t key)
{
    const fs_page *page = h->pages[key / FS_PAGE];
    return page ? page_data(page) + h->page_head : NULL;
}

/* `raw_scores` of n queries against the keys from `key` on, the first of a block; rows KEY_BLOCK apart. */
static void block_scores(const head_view *h, ptrdiff_t query, int n, ptrdiff_t key, ptrdiff_t vectors, real *s)
{
    const fs_attention *job = h->job;
    const real *q = h->q + query * job->q.row;
    if (!h->pages) {
        raw_scores(q, job->q.row, n, h->k_panels, job->width, key, vectors, s, KEY_BLOCK);
        return;
    }
    for (ptrdiff_t v = 0; v < vectors; v += FS_PAGE / LANES) {
        const real *panels = in_page(h, key + v * LANES);
        const ptrdiff_t count = vectors - v < FS_PAGE / LANES ? vectors - v : FS_PAGE / LANES;
        if (panels)
            raw_scores(q, job->q.row, n, panels, job->width, 0, count, s + v * LANES, KEY_BLOCK);
    }
}

/* sums[r] = keep[r] sums[r] + weights[r] times the values of `count` keys from `key` on, the first of a block. */
static void add_values(const head_view *h, int n, ptrdiff_t key, ptrdiff_t count, const void *const *weights,
                       real *sums, const real *keep)
{
    static const real ones[] = {1, 1, 1, 1, 1, 1};
    const fs_attention *job = h->job;
    const ptrdiff_t width = job->value_width;
    if (!h->pages) {
        (h->unsure ? multiply_unmarked : multiply)(n, (int)(width / LANES), weights, 1, h->v + key * job->v.row,
                                                   job->v.row, count, sums, width, keep);
        return;
    }
    for (ptrdiff_t first = 0; first < count; first += FS_PAGE) {
        const real *head = in_page(h, key + first);
        const void *some[TILE];
        if (!head)
            continue;
        for (int r = 0; r < n; r++)
            some[r] = (const real *)weights[r] + first;
        (h->unsure ? multiply_unmarked : multiply)(n, (int)(width / LANES), some, 1, head + FS_PAGE * width,
                                                   width, count - first < FS_PAGE ? count - first : FS_PAGE,
                                                   sums, width, keep);
        keep = ones; /* the chain goes on where the page before left it */
    }
}

/*
 * The scores of a block of one query become weights, in place, whose sum is added to `total`; both under the new `maximum`.
 * Returns what to multiply by all that was summed under the old one.
 */
INLINE real weigh(const head_view *h, ptrdiff_t query, ptrdiff_t key, ptrdiff_t vectors, real *s, real *maximum,
                  real *total)
{
    const real before = *maximum,
               now = max_of_lanes(final_scores(h, query, key, vectors, s)) * scale_left(h->job);
    *maximum = now > before || now != now ? now : before;
    /* Where nothing may be attended to yet, all weights are 0, and exp(-inf) is that. */
    const real base = *maximum == -INFINITE ? 0 : *maximum;
    const vec left = broadcast(scale_left(h->job));
    vec sum[2] = {{0}};
    ptrdiff_t v = 0;
    for (; v + 2 <= vectors; v += 2)
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const vec p = weight_of(load(s + (v + i) * LANES), left, broadcast(base));
            store(s + (v + i) * LANES, p);
            sum[i] += p;
        }
    if (v < vectors) {
        const vec p = weight_of(load(s + v * LANES), left, broadcast(base));
        store(s + v * LANES, p);
        sum[0] += p;
    }
    const real keep = exp_of_negative(broadcast(before - base))[0];
    *total = *total * keep + sum_of_lanes(sum[0] + sum[1]);
    return keep;
}

/* What a block of keys adds to a tile of n queries. */
static void attend_tile(const head_view *h, ptrdiff_t query, int n, ptrdiff_t key, real *scores, real *sums,
                        real *maximum, real *total)
{
    const fs_attention *job = h->job;
    ptrdiff_t first = PTRDIFF_MAX, last = 0;
    for (int r = 0; r < n; r++) {
        ptrdiff_t from, to;
        allowed_keys(h, query + r, &from, &to);
        first = from < to && from < first ? from : first;
        last = from < to && to > last ? to : last;
    }
    last = last < key + KEY_BLOCK ? last : key + KEY_BLOCK;
    if (last <= key || first >= key + KEY_BLOCK)
        return;
    const ptrdiff_t vectors = (last - key + LANES - 1) / LANES;
    const void *weights[TILE];
    real keep[TILE];
    block_scores(h, query, n, key, vectors, scores);
    for (int r = 0; r < n; r++) {
        real *s = scores + r * KEY_BLOCK;
        keep[r] = weigh(h, query + r, key, vectors, s, maximum + r, total + r);
        if (job->threshold)
            drop_weights(h, query + r, key, last - key, s, s);
        if (h->unsure)
            mark(h, query + r, key, vectors, s);
        weights[r] = s;
    }
    add_values(h, n, key, last - key, weights, sums, keep);
}

/* The softmax weights of one query, from what the forward found: exp(s - maximum) / sum; in place. */
INLINE void softmax_weights(const fs_attention *job, const real *stats, ptrdiff_t vectors, real *s)
{
    const vec left = broadcast(scale_left(job)), base = broadcast(stats[0]), inverse = broadcast(stats[1]);
    for (ptrdiff_t v = 0; v < vectors; v++)
        store(s + v * LANES, weight_of(load(s + v * LANES), left, base) * inverse);
}

static void write_weights(const head_view *h, ptrdiff_t query, int n, real *scores)
{
    const fs_attention *job = h->job;
    for (ptrdiff_t key = 0; key < h->keys; key += KEY_BLOCK) {
        const ptrdiff_t count = h->keys - key < KEY_BLOCK ? h->keys - key : KEY_BLOCK;
        const ptrdiff_t vectors = (count + LANES - 1) / LANES;
        block_scores(h, query, n, key, vectors, scores);
        for (int r = 0; r < n; r++) {
            real *s = scores + r * KEY_BLOCK;
            final_scores(h, query + r, key, vectors, s);
            softmax_weights(job, h->stats + 2 * (query + r), vectors, s);
            memcpy(h->weights + (query + r) * job->max_keys + key, s, (size_t)count * sizeof(real));
        }
    }
}

/* What is left of one query when it has seen all its keys. */
INLINE void query_epilogue(real *out, real *stats, ptrdiff_t width, const real *sums, real maximum, real total)
{
    const real inverse = total == 0 ? 0 : 1 / total;
    for (ptrdiff_t e = 0; e < width; e += LANES) /* + 0: a sum of nothing but underflow is +0 */
        store(out + e, load(sums + e) * broadcast(inverse) + broadcast(0));
    stats[0] = maximum == -INFINITE ? 0 : maximum;
    stats[1] = inverse;
}

/* The queries [from, to) of one head. */
static void attend_queries(const head_view *h, ptrdiff_t from, ptrdiff_t to, real *scratch)
{
    const fs_attention *job = h->job;
    const ptrdiff_t value_width = job->value_width;
    real *scores = scratch, *sums = scores + TILE * KEY_BLOCK;
    real maximum[QUERY_BLOCK], total[QUERY_BLOCK];
    for (ptrdiff_t block = from, rows; block < to; block += rows) {
        rows = to - block < QUERY_BLOCK ? to - block : QUERY_BLOCK;
        memset(sums, 0, (size_t)(rows * value_width) * sizeof(real));
        for (ptrdiff_t r = 0; r < rows; r++) {
            maximum[r] = -INFINITE;
            total[r] = 0;
        }
        ptrdiff_t first, last, key, ignored;
        allowed_keys(h, block, &first, &ignored);
        allowed_keys(h, block + rows - 1, &ignored, &last);
        for (key = first / KEY_BLOCK * KEY_BLOCK; key < last; key += KEY_BLOCK)
            for (ptrdiff_t r = 0, n; r < rows; r += n) {
                n = tile_height(rows - r, TILE);
                attend_tile(h, block + r, (int)n, key, scores, sums + r * value_width, maximum + r, total + r);
            }
        for (ptrdiff_t r = 0; r < rows; r++)
            query_epilogue(h->out + (block + r) * job->out.row, h->stats + 2 * (block + r), value_width,
                           sums + r * value_width, maximum[r], total[r]);
        if (h->weights)
            for (ptrdiff_t r = 0, n; r < rows; r += n) {
                n = tile_height(rows - r, TILE);
                write_weights(h, block + r, (int)n, scores);
            }
    }
}

INLINE real *at(const fs_heads *heads, ptrdiff_t batch, ptrdiff_t first, ptrdiff_t head)
{
    return (real *)heads->data + batch * heads->batch + first * heads->row + head * heads->head;
}

/* Sequence `b` and key-value head `kv`, without what differs between the query heads of its group. */
static head_view view_of(const fs_attention *job, ptrdiff_t b, ptrdiff_t kv)
{
    head_view h = {.job = job, .queries = job->max_queries, .keys = job->max_keys};
    ptrdiff_t q_first = 0, k_first = 0, batch = b;
    h.ahead = job->max_keys - job->max_queries;
    if (job->q_starts) {
        batch = 0;
        q_first = job->q_starts[b];
        h.queries = job->q_starts[b + 1] - q_first;
    }
    if (job->k_starts) {
        k_first = job->k_starts[b];
        h.keys = job->k_starts[b + 1] - k_first;
        h.ahead = h.keys - h.queries;
    }
    if (job->lengths)
        h.keys = job->lengths[b];
    if (job->pages) {
        h.pages = job->pages[b];
        h.page_head = job->page_layer + kv * page_head_size(job->width);
        h.ahead = h.keys - h.queries;
    }
    h.q = at(&job->q, batch, q_first, 0);
    h.k = at(&job->k, batch, k_first, kv);
    h.v = at(&job->v, batch, k_first, kv);
    h.out = at(&job->out, batch, q_first, 0);
    if (job->dout.data) {
        h.dout = at(&job->dout, batch, q_first, 0);
        h.dq = at(&job->dq, batch, q_first, 0);
        h.dk = at(&job->dk, batch, k_first, kv);
        h.dv = at(&job->dv, batch, k_first, kv);
    }
    return h;
}

/* The same for one query head. */
static head_view view_of_head(head_view h, ptrdiff_t b, ptrdiff_t head)
{
    const fs_attention *job = h.job;
    const ptrdiff_t rows = (b * job->heads + head) * job->max_queries;
    h.q += head * job->q.head;
    h.out += head * job->out.head;
    h.stats = (real *)job->stats + 2 * rows;
    h.weights = job->weights ? (real *)job->weights + rows * job->max_keys : NULL;
    h.mask =
        job->mask ? (const char *)job->mask + b * job->mask_strides[0] + head * job->mask_strides[1] : NULL;
    h.first_weight = (uint64_t)rows * (uint64_t)job->max_keys;
    if (job->dout.data) {
        h.dout += head * job->dout.head;
        h.dq += head * job->dq.head;
    }
    return h;
}

static ptrdiff_t whole_panels(ptrdiff_t keys)
{
    return (keys + PANEL - 1) / PANEL * PANEL;
}

/* Whether there can be a key that some query may not attend to, and others may. */
INLINE int forbids(const fs_attention *job)
{
    return job->causal || job->window || job->mask;
}

/* Reals of keys that are packed. */
INLINE ptrdiff_t packed_keys(const fs_attention *job)
{
    return job->pages ? 0 : whole_panels(job->max_keys) * job->width;
}

/* Whether a value of a head is not finite, or stands in a page with one. */
static int any_unsure(const head_view *h)
{
    for (ptrdiff_t i = 0; i * FS_PAGE < h->keys; i++)
        if (h->pages[i] && __atomic_load_n(&h->pages[i]->unsure, __ATOMIC_RELAXED))
            return 1;
    return 0;
}

/* Reals of scratch. */
static ptrdiff_t attend_scratch(const fs_attention *job)
{
    return 16 + packed_keys(job) + (TILE > INTERLEAVED_HEADS ? TILE : INTERLEAVED_HEADS) * KEY_BLOCK +
           QUERY_BLOCK * job->value_width;
}

/*
 * Item (b, kv, part): some of the queries of all heads that read one key-value head. The scratch, aligned, remembers whose
 * keys are packed in it: it begins with -1 in an int64_t.
 */
static void attend(const fs_attention *job, ptrdiff_t item, void *scratch)
{
    const ptrdiff_t pair = item / job->parts, part = item % job->parts;
    const ptrdiff_t b = pair / job->kv_heads, kv = pair % job->kv_heads, group = job->heads / job->kv_heads;
    head_view shared = view_of(job, b, kv);
    const ptrdiff_t tiles = (shared.queries + TILE - 1) / TILE;
    const ptrdiff_t from = tiles * part / job->parts * TILE;
    ptrdiff_t to = tiles * (part + 1) / job->parts * TILE;
    int64_t *header = scratch;
    real *panels = (real *)scratch + 64 / sizeof(real);
    to = to < shared.queries ? to : shared.queries;
    if (from >= to)
        return;
    if (job->pages) {
        shared.unsure = forbids(job) && any_unsure(&shared);
    } else {
        if (header[0] != pair) {
            header[0] = pair;
            pack_transposed(shared.k, job->k.row, shared.keys, job->width, panels);
            header[1] = forbids(job) && !all_finite(shared.v, job->v.row, shared.keys, job->value_width);
        }
        shared.k_panels = panels;
        shared.unsure = (int)header[1];
    }
    for (ptrdiff_t head = kv * group; head < (kv + 1) * group; head++) {
        const head_view h = view_of_head(shared, b, head);
        attend_queries(&h, from, to, panels + packed_keys(job));
    }
}

/* Where an item of backward keeps what; all of it scratch. */
typedef struct {
    const real *k_panels, *v_panels;
    real *weights, *scores; /* [BACK_QUERIES][BACK_KEYS]: weights, as dropped; gradients of the scores */
    real *deltas; /* [queries]: dout . out                                                  */
} back_scratch;

/* ds = p (dp - delta) scale, where dp = dout v, as dropped; and p, as dropped. s: scores before, ds after; dp: p after. */
static void back_row(const head_view *h, ptrdiff_t query, ptrdiff_t key, ptrdiff_t vectors, real delta, real *s,
                     real *dp)
{
    const fs_attention *job = h->job;
    const real *stats = h->stats + 2 * query;
    const vec base = broadcast(stats[0]), inverse = broadcast(stats[1]), scale = broadcast((real)job->scale);
    const vec forbidden = broadcast(-INFINITE), left = broadcast(scale_left(job));
    const ptrdiff_t n = vectors * LANES;
    final_scores(h, query, key, vectors, s);
    if (job->threshold)
        drop_weights(h, query, key, n, dp, dp);
    for (ptrdiff_t i = 0; i < n; i += LANES) {
        const vec score = load(s + i), p = weight_of(score, left, base) * inverse;
        const vec ds = p * (load(dp + i) - broadcast(delta)) * scale;
        store(s + i, choose(score == forbidden, broadcast(0), ds));
        store(dp + i, choose(score == forbidden, broadcast(0), p));
    }
    if (job->threshold)
        drop_weights(h, query, key, n, dp, dp);
    if (h->unsure) {
        mark(h, query, key, vectors, s);
        mark(h, query, key, vectors, dp);
    }
}

/* The queries [query, query + rows) and the keys [key, key + keys), at most a block of each. */
static void back_block(const head_view *h, const back_scratch *scratch, ptrdiff_t query, ptrdiff_t rows,
                       ptrdiff_t key, ptrdiff_t keys, int want_q, int want_kv)
{
    static const real ones[] = {1, 1, 1, 1, 1, 1};
    const fs_attention *job = h->job;
    const ptrdiff_t all = (keys + LANES - 1) / LANES * LANES;
    for (ptrdiff_t r = 0, n; r < rows; r += n) {
        n = tile_height(rows - r, TILE);
        ptrdiff_t ignored, last;
        allowed_keys(h, query + r + n - 1, &ignored, &last);
        last = last < key ? key : last < key + keys ? last : key + keys;
        const ptrdiff_t vectors = (last - key + LANES - 1) / LANES;
        real *s = scratch->scores + r * BACK_KEYS, *p = scratch->weights + r * BACK_KEYS;
        const void *x[TILE];
        if (vectors) {
            raw_scores(h->q + (query + r) * job->q.row, job->q.row, (int)n, scratch->k_panels, job->width, key,
                       vectors, s, BACK_KEYS);
            raw_scores(h->dout + (query + r) * job->dout.row, job->dout.row, (int)n, scratch->v_panels,
                       job->value_width, key, vectors, p, BACK_KEYS);
        }
        for (int i = 0; i < n; i++) {
            x[i] = s + i * BACK_KEYS;
            back_row(h, query + r + i, key, vectors, scratch->deltas[query + r + i], s + i * BACK_KEYS,
                     p + i * BACK_KEYS);
            for (ptrdiff_t k = vectors * LANES; k < all; k += LANES) {
                store(s + i * BACK_KEYS + k, broadcast((real)-0.0));
                store(p + i * BACK_KEYS + k, broadcast((real)-0.0));
            }
        }
        if (want_q && vectors)
            (h->unsure ? multiply_unmarked : multiply)((int)n, (int)(job->width / LANES), x, 1,
                                                       h->k + key * job->k.row, job->k.row, last - key,
                                                       h->dq + (query + r) * job->dq.row, job->dq.row, ones);
    }
    if (!want_kv)
        return;
    for (ptrdiff_t k = 0, n; k < keys; k += n) {
        n = tile_height(keys - k, TILE);
        /* The first query that may attend to one of these keys. */
        ptrdiff_t first = job->causal ? key + k - h->ahead - query : 0;
        first = first < 0 ? 0 : first;
        if (first >= rows)
            continue;
        const void *p[TILE], *s[TILE];
        for (int i = 0; i < n; i++) {
            p[i] = scratch->weights + first * BACK_KEYS + k + i;
            s[i] = scratch->scores + first * BACK_KEYS + k + i;
        }
        (h->unsure ? multiply_unmarked : multiply)(
            (int)n, (int)(job->value_width / LANES), p, BACK_KEYS, h->dout + (query + first) * job->dout.row,
            job->dout.row, rows - first, h->dv + (key + k) * job->dv.row, job->dv.row, ones);
        (h->unsure ? multiply_unmarked : multiply)(
            (int)n, (int)(job->width / LANES), s, BACK_KEYS, h->q + (query + first) * job->q.row, job->q.row,
            rows - first, h->dk + (key + k) * job->dk.row, job->dk.row, ones);
    }
}

/* Some queries and some keys of one head: dq of those, dk and dv of these. */
static void back_range(const head_view *h, const back_scratch *scratch, ptrdiff_t query_from,
                       ptrdiff_t query_to, ptrdiff_t key_from, ptrdiff_t key_to, int want_q, int want_kv)
{
    for (ptrdiff_t key = key_from; key < key_to; key += BACK_KEYS) {
        const ptrdiff_t keys = key_to - key < BACK_KEYS ? key_to - key : BACK_KEYS;
        for (ptrdiff_t query = query_from; query < query_to; query += BACK_QUERIES) {
            const ptrdiff_t rows = query_to - query < BACK_QUERIES ? query_to - query : BACK_QUERIES;
            ptrdiff_t first, last, ignored;
            allowed_keys(h, query, &first, &ignored);
            allowed_keys(h, query + rows - 1, &ignored, &last);
            if (first < key + keys && last > key)
                back_block(h, scratch, query, rows, key, keys, want_q, want_kv);
        }
    }
}

static ptrdiff_t attend_back_scratch(const fs_attention *job)
{
    return 16 + whole_panels(job->max_keys) * (job->width + job->value_width) + 2 * BACK_QUERIES * BACK_KEYS +
           job->max_queries;
}

/* + 0: a sum of nothing but underflow is +0 */
static void settle(real *rows, ptrdiff_t row, ptrdiff_t n, ptrdiff_t width)
{
    for (ptrdiff_t i = 0; i < n; i++)
        for (ptrdiff_t k = 0; k < width; k += LANES)
            store(rows + i * row + k, load(rows + i * row + k) + broadcast(0));
}

/* deltas[query] = dout . out, in the order of a product, so that dp less it is exactly 0 where there is a single key. */
static void find_deltas(const head_view *h, ptrdiff_t from, ptrdiff_t to, real *deltas)
{
    const fs_attention *job = h->job;
    for (ptrdiff_t query = from; query < to; query += LANES) {
        const ptrdiff_t count = to - query < LANES ? to - query : LANES;
        vec sum = {0};
        for (ptrdiff_t e = 0; e < job->value_width; e += LANES) {
            vec dout[LANES], out[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                const ptrdiff_t row = query + (i < count ? i : 0);
                dout[i] = load(h->dout + row * job->dout.row + e);
                out[i] = load(h->out + row * job->out.row + e);
            }
            transpose_lanes(dout);
            transpose_lanes(out);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                sum = fma_(dout[i], out[i], sum);
        }
        store_row(deltas + query, count, sum);
    }
}

/*
 * Item (b, kv) of backward: all queries and, of all parts, some keys; parts come one after another. Where there are fewer
 * heads than threads, items are (b, kv, part) in two phases: dq of some queries, against all keys; dk and dv of some keys,
 * against all queries. The scores are then computed twice, and every sum is still the same one.
 */
static void attend_back(const fs_attention *job, ptrdiff_t item, void *memory)
{
    const ptrdiff_t pair = job->phase ? item / job->parts : item,
                    part = job->phase ? item % job->parts : job->part;
    const ptrdiff_t b = pair / job->kv_heads, kv = pair % job->kv_heads, group = job->heads / job->kv_heads;
    const int want_q = job->phase != 2, want_kv = job->phase != 1;
    head_view shared = view_of(job, b, kv);
    int64_t *header = memory;
    real *panels = (real *)memory + 64 / sizeof(real);
    real *v_panels = panels + whole_panels(job->max_keys) * job->width;
    back_scratch scratch = {.k_panels = panels, .v_panels = v_panels};
    scratch.weights = v_panels + whole_panels(job->max_keys) * job->value_width;
    scratch.scores = scratch.weights + BACK_QUERIES * BACK_KEYS;
    scratch.deltas = scratch.scores + BACK_QUERIES * BACK_KEYS;
    if (header[0] != pair) {
        header[0] = pair;
        pack_transposed(shared.k, job->k.row, shared.keys, job->width, panels);
        pack_transposed(shared.v, job->v.row, shared.keys, job->value_width, v_panels);
        header[1] = forbids(job) && !all_finite(shared.k, job->k.row, shared.keys, job->width);
    }
    ptrdiff_t query_from = 0, query_to = shared.queries, key_from = 0, key_to = shared.keys;
    if (job->phase == 1) {
        query_from = query_to * part / job->parts;
        query_to = query_to * (part + 1) / job->parts;
    } else {
        const ptrdiff_t blocks = (key_to + BACK_KEYS - 1) / BACK_KEYS;
        key_from = blocks * part / job->parts * BACK_KEYS;
        key_to = part + 1 < job->parts ? blocks * (part + 1) / job->parts * BACK_KEYS : key_to;
    }
    for (ptrdiff_t head = kv * group; head < (kv + 1) * group; head++) {
        head_view h = view_of_head(shared, b, head);
        h.unsure =
            header[1] || (forbids(job) && (!all_finite(h.q, job->q.row, h.queries, job->width) ||
                                           !all_finite(h.dout, job->dout.row, h.queries, job->value_width)));
        find_deltas(&h, query_from, query_to, scratch.deltas);
        back_range(&h, &scratch, query_from, query_to, key_from, key_to, want_q, want_kv);
        if (want_q)
            settle(h.dq + query_from * job->dq.row, job->dq.row, query_to - query_from, job->width);
    }
    if (want_kv) {
        settle(shared.dk + key_from * job->dk.row, job->dk.row, key_to - key_from, job->width);
        settle(shared.dv + key_from * job->dv.row, job->dv.row, key_to - key_from, job->value_width);
    }
}

#endif
