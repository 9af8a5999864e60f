/*
 * Pages of keys and values: how a token is put into one, how tokens are taken out, and how a page is begun from another. How a
 * page is laid out is said in kernels.h.
 */
#ifndef FASTSEQ_KV_PAGES_H
#define FASTSEQ_KV_PAGES_H

#include "vec.h"
#include "kernels.h"
#include "rows.h"

enum { PAGE_PANEL = 4 * LANES }; /* keys of a panel; FS_PAGE is a multiple of it */

/* Reals of one head in a page. */
INLINE ptrdiff_t page_head_size(ptrdiff_t width)
{
    return 2 * FS_PAGE * width;
}

/* The first real after the header. */
INLINE real *page_data(const fs_page *page)
{
    return (real *)((char *)page + FS_PAGE_HEADER);
}

/* Where the first element of a key is, of a head that begins at `data`; the others follow PAGE_PANEL apart. */
INLINE real *page_key(real *data, ptrdiff_t width, ptrdiff_t slot)
{
    return data + slot / PAGE_PANEL * (PAGE_PANEL * width) + slot % PAGE_PANEL;
}

static void page_store(ptrdiff_t kv_heads, ptrdiff_t width, ptrdiff_t head, const void *k, const void *v,
                       fs_page *page, ptrdiff_t layer, ptrdiff_t slot)
{
    vec sum = {0};
    for (ptrdiff_t i = 0; i < kv_heads; i++) {
        real *data = page_data(page) + layer + i * page_head_size(width);
        const real *key = (const real *)k + i * head, *value = (const real *)v + i * head;
        real *to = page_key(data, width, slot), *values = data + (FS_PAGE + slot) * width;
        for (ptrdiff_t e = 0; e < width; e++)
            to[e * PAGE_PANEL] = key[e];
        for (ptrdiff_t e = 0; e < width; e += LANES) {
            const vec some = load(value + e);
            store(values + e, some);
            sum += some * broadcast(0); /* inf and NaN give NaN */
        }
    }
    if (!(sum_of_lanes(sum) == 0)) /* several threads may be at the tokens of one page */
        __atomic_store_n(&page->unsure, 1, __ATOMIC_RELAXED);
}

static void page_load(ptrdiff_t width, const fs_page *page, ptrdiff_t before, ptrdiff_t slot, ptrdiff_t tokens,
                      ptrdiff_t n, void *k, void *v)
{
    real *data = page_data(page) + before, *keys = k, *values = v;
    for (ptrdiff_t i = 0; i < tokens; i++) {
        const real *from = page_key(data, width, slot + i);
        for (ptrdiff_t e = 0; e < n; e++)
            keys[i * n + e] = from[e * PAGE_PANEL];
        memcpy(values + i * n, data + (FS_PAGE + slot + i) * width, (size_t)n * sizeof(real));
    }
}

static void page_copy(ptrdiff_t heads, ptrdiff_t width, ptrdiff_t tokens, const fs_page *from, fs_page *to)
{
    for (ptrdiff_t i = 0; i < heads; i++) {
        const real *source = page_data(from) + i * page_head_size(width);
        real *target = page_data(to) + i * page_head_size(width);
        for (ptrdiff_t slot = 0; slot < tokens; slot += PAGE_PANEL) {
            const ptrdiff_t count = tokens - slot < PAGE_PANEL ? tokens - slot : PAGE_PANEL;
            for (ptrdiff_t e = 0; e < width; e++)
                for (ptrdiff_t j = 0; j < count; j += LANES)
                    store(target + slot * width + e * PAGE_PANEL + j,
                          load(source + slot * width + e * PAGE_PANEL + j));
        }
        memcpy(target + FS_PAGE * width, source + FS_PAGE * width, (size_t)(tokens * width) * sizeof(real));
    }
    __atomic_store_n(&to->unsure, __atomic_load_n(&from->unsure, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
}

#endif
