/*
 * Memory for packed weights, which are read from end to end, again and again: in pages of 2 MB, where the system has them.
 * Among pages of 4 KB a processor waits for addresses, too: 8 rows times 12 MB of weights took a tenth less with large ones.
 *
 * What is large begins at such a page; smaller blocks stand side by side in chunks of several. A chunk is given back, or begun
 * anew, when the last of its blocks is freed: weights are packed and freed together. To be called with the GIL.
 */
#ifndef FASTSEQ_HUGE_PAGES_H
#define FASTSEQ_HUGE_PAGES_H

#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

enum {
    FS_HUGE_PAGE = 1 << 21,
    FS_HUGE_CHUNK = 4 * FS_HUGE_PAGE,
    FS_HUGE_LEAST = 1 << 14, /* smaller blocks are left to malloc: a small model takes little memory */
    FS_HUGE_LINE = 64
};

typedef struct fs_huge_chunk {
    size_t at; /* bytes that are taken, this head among them */
    size_t live; /* blocks that are not freed                 */
} fs_huge_chunk;

/* A line before each block. */
typedef struct fs_huge_head {
    void *memory; /* to be freed with the block, or */
    fs_huge_chunk *chunk;
} fs_huge_head;

static fs_huge_chunk *fs_huge_current, *fs_huge_spare;

static inline void *fs_huge_map(size_t align, size_t n_bytes)
{
    void *memory;
    if (posix_memalign(&memory, align, n_bytes))
        return NULL;
#if defined(MADV_HUGEPAGE)
    if (align == FS_HUGE_PAGE)
        (void)madvise(memory, n_bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

/* A chunk with room for so many bytes. */
static inline fs_huge_chunk *fs_huge_chunk_for(size_t n_bytes)
{
    if (fs_huge_current && fs_huge_current->at + n_bytes <= FS_HUGE_CHUNK)
        return fs_huge_current;
    fs_huge_current = fs_huge_spare ? fs_huge_spare : (fs_huge_chunk *)fs_huge_map(FS_HUGE_PAGE, FS_HUGE_CHUNK);
    fs_huge_spare = NULL;
    if (fs_huge_current)
        *fs_huge_current = (fs_huge_chunk){.at = FS_HUGE_LINE};
    return fs_huge_current;
}

/* So many zeros, from a cache line on; NULL without memory. */
static inline void *fs_huge_zeros(size_t n_bytes)
{
    const size_t whole = FS_HUGE_LINE + (n_bytes + FS_HUGE_LINE - 1) / FS_HUGE_LINE * FS_HUGE_LINE;
    fs_huge_chunk *chunk = NULL;
    char *memory;
    if (n_bytes < FS_HUGE_LEAST || whole > FS_HUGE_PAGE) {
        memory = fs_huge_map(whole > FS_HUGE_PAGE ? FS_HUGE_PAGE : FS_HUGE_LINE, whole);
        if (!memory)
            return NULL;
    } else {
        chunk = fs_huge_chunk_for(whole);
        if (!chunk)
            return NULL;
        memory = (char *)chunk + chunk->at;
        chunk->at += whole;
        chunk->live++;
    }
    *(fs_huge_head *)memory = (fs_huge_head){.memory = memory, .chunk = chunk};
    return memset(memory + FS_HUGE_LINE, 0, n_bytes);
}

static inline void fs_huge_free(void *block)
{
    const fs_huge_head *head = (fs_huge_head *)((char *)block - FS_HUGE_LINE);
    fs_huge_chunk *chunk = head->chunk;
    if (!chunk) {
        free(head->memory);
        return;
    }
    if (--chunk->live)
        return;
    if (chunk == fs_huge_current)
        chunk->at = FS_HUGE_LINE;
    else if (!fs_huge_spare)
        fs_huge_spare = chunk;
    else
        free(chunk);
}

#endif
