/*
 * Tables of pages: the keys and values of one sequence, shared between all that hold a beginning of it.
 *
 * A page is written at its end alone, and what is written stays. So tables share pages: a copy of a table, or a shorter one, costs a
 * pointer a page. Whoever is the first to go on from the end of a page may write there; for another, and for a table that ends
 * before the end of its last page, the page is begun anew.
 */
#ifndef FASTSEQ_KV_TABLES_H
#define FASTSEQ_KV_TABLES_H

#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"

/* What the pages of one stack have in common. */
typedef struct fs_page_kind {
    const fs_kernels *kernels;
    ptrdiff_t layers, kv_heads;
    ptrdiff_t width; /* of a head, whole vectors    */
    ptrdiff_t window; /* keys that a query looks back on, itself among them; 0: all */
} fs_page_kind;

typedef struct fs_table {
    fs_page **pages; /* NULL where they are out of the window */
    ptrdiff_t count, room;
    int64_t length; /* tokens */
} fs_table;

/* Reals of a layer in a page. */
static inline ptrdiff_t fs_page_layer(const fs_page_kind *kind)
{
    return 2 * FS_PAGE * kind->width * kind->kv_heads;
}

/* Whole cache lines of memory, for free; NULL without memory. aligned_alloc wants a size of whole lines. */
static inline void *fs_lines_new(size_t n_bytes)
{
    return aligned_alloc(64, (n_bytes + 63) / 64 * 64);
}

static inline fs_page *fs_page_new(const fs_page_kind *kind)
{
    const size_t reals = (size_t)(kind->layers * fs_page_layer(kind));
    fs_page *page = fs_lines_new(FS_PAGE_HEADER + reals * (size_t)kind->kernels->item_size);
    if (page)
        *page = (fs_page){.owners = 1};
    return page;
}

static inline void fs_page_release(fs_page *page)
{
    if (page && __atomic_sub_fetch(&page->owners, 1, __ATOMIC_ACQ_REL) == 0)
        free(page);
}

static inline void fs_table_clear(fs_table *table)
{
    for (ptrdiff_t i = 0; i < table->count; i++)
        fs_page_release(table->pages[i]);
    free(table->pages);
    *table = (fs_table){0};
}

/* Room for so many pages; 0, or -1 without memory. */
static inline int fs_table_reserve(fs_table *table, ptrdiff_t count)
{
    if (count <= table->room)
        return 0;
    const ptrdiff_t room = count > 2 * table->room ? count : 2 * table->room;
    fs_page **pages = realloc(table->pages, (size_t)room * sizeof *pages);
    if (!pages)
        return -1;
    table->pages = pages;
    table->room = room;
    return 0;
}

/* An empty table becomes the beginning of another. */
static inline int fs_table_share(fs_table *table, const fs_table *other, int64_t length)
{
    const ptrdiff_t count = (ptrdiff_t)((length + FS_PAGE - 1) / FS_PAGE);
    if (fs_table_reserve(table, count))
        return -1;
    for (ptrdiff_t i = 0; i < count; i++) {
        table->pages[i] = other->pages[i];
        if (table->pages[i])
            __atomic_add_fetch(&table->pages[i]->owners, 1, __ATOMIC_RELAXED);
    }
    table->count = count;
    table->length = length;
    return 0;
}

/* Makes the places of so many more tokens this table's own. Without memory -1, and the table is as it was. */
static inline int fs_table_extend(fs_table *table, const fs_page_kind *kind, int64_t more)
{
    const int64_t end = table->length + more, slot = table->length % FS_PAGE;
    const ptrdiff_t count = (ptrdiff_t)((end + FS_PAGE - 1) / FS_PAGE);
    if (fs_table_reserve(table, count))
        return -1;
    if (slot && more) {
        fs_page **last = &table->pages[table->count - 1];
        int64_t filled = slot;
        const int64_t after = slot + more < FS_PAGE ? slot + more : FS_PAGE;
        if (!__atomic_compare_exchange_n(&(*last)->filled, &filled, after, 0, __ATOMIC_ACQ_REL,
                                         __ATOMIC_ACQUIRE)) {
            fs_page *own = fs_page_new(kind);
            if (!own)
                return -1;
            kind->kernels->page_copy(kind->layers * kind->kv_heads, kind->width, (ptrdiff_t)slot, *last, own);
            own->filled = after;
            fs_page_release(*last);
            *last = own;
        }
    }
    const ptrdiff_t before = table->count;
    for (; table->count < count; table->count++) {
        const int64_t left = end - table->count * FS_PAGE;
        fs_page *page = fs_page_new(kind);
        if (!page) {
            while (table->count > before)
                fs_page_release(table->pages[--table->count]);
            return -1;
        }
        page->filled = left < FS_PAGE ? left : FS_PAGE;
        table->pages[table->count] = page;
    }
    table->length = end;
    return 0;
}

/* Tokens before this one are out of the window of all that come after `length` of them. */
static inline int64_t fs_first_kept(int64_t length, int64_t window)
{
    return window && length >= window ? (length - window + 1) / FS_PAGE * FS_PAGE : 0;
}

/* Lets go of the first pages. */
static inline void fs_table_drop(fs_table *table, ptrdiff_t count)
{
    for (ptrdiff_t i = count - 1; i >= 0 && table->pages[i]; i--) {
        fs_page_release(table->pages[i]);
        table->pages[i] = NULL;
    }
}

/* Lets go of the pages that are out of the window. */
static inline void fs_table_roll(fs_table *table, const fs_page_kind *kind)
{
    fs_table_drop(table, (ptrdiff_t)(fs_first_kept(table->length, kind->window) / FS_PAGE));
}

/* The first token that is kept. */
static inline int64_t fs_table_first(const fs_table *table)
{
    ptrdiff_t i = 0;
    while (i < table->count && !table->pages[i])
        i++;
    return i * FS_PAGE;
}

#endif
