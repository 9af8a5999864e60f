/*
 * Tiles, as AMX multiplies them: eight registers of up to 16 rows of one vector, and the product of two.
 *
 * A tile of inputs holds, for up to 16 rows, 16 words; one of weights, for 16 words, one vector of outputs; one of sums,
 * for those rows, that vector. Registers 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights.
 *
 * Where FS_TILES_IN_C is defined, C does the same in the same order, so that the logic around the tiles is tested where
 * there is no AMX. As on AMX, a tile that is used before `tiles_configure` is a fault; and so is one that nobody released.
 */
#ifndef FASTSEQ_TILES_H
#define FASTSEQ_TILES_H

#include "kernels.h"
#include "vec.h"

enum { TILE_ROWS = 16, TILE_WORDS = 16, FIRST_INPUTS = 4, FIRST_WEIGHTS = 6, TILES = 8 };

#if !defined(FS_TILES_IN_C)

/* The 64 bytes that LDTILECFG reads. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_configuration;

static void tiles_configure(int rows)
{
    tile_configuration c = {.palette = 1};
    for (int t = 0; t < TILES; t++) {
        c.row_bytes[t] = FS_VECTOR_BYTES;
        c.rows[t] = (uint8_t)(t < FIRST_WEIGHTS ? rows : TILE_WORDS);
    }
    /* GCC's intrinsic says of the first 8 bytes alone that they are read. */
    __asm__ volatile("ldtilecfg %0" : : "m"(c));
}

static void tiles_release(void)
{
    _tile_release();
}

/* Of tiles in C: a fault where a tile of rows that begins at `row` ends past the last. */
INLINE void tile_rows_end(ptrdiff_t row, ptrdiff_t n_rows)
{
    (void)row, (void)n_rows;
}

/* The number of a register is a part of the instruction. */
INLINE void tile_load(const int TILE, const void *p, ptrdiff_t row_bytes)
{
    switch (TILE) {
    case 0: _tile_loadd(0, p, row_bytes); break;
    case 1: _tile_loadd(1, p, row_bytes); break;
    case 2: _tile_loadd(2, p, row_bytes); break;
    case 3: _tile_loadd(3, p, row_bytes); break;
    case 4: _tile_loadd(4, p, row_bytes); break;
    case 5: _tile_loadd(5, p, row_bytes); break;
    case 6: _tile_loadd(6, p, row_bytes); break;
    case 7: _tile_loadd(7, p, row_bytes); break;
    }
}

INLINE void tile_zero(const int TILE)
{
    switch (TILE) {
    case 0: _tile_zero(0); break;
    case 1: _tile_zero(1); break;
    case 2: _tile_zero(2); break;
    case 3: _tile_zero(3); break;
    }
}

INLINE void tile_store(const int TILE, void *p, ptrdiff_t row_bytes)
{
    switch (TILE) {
    case 0: _tile_stored(0, p, row_bytes); break;
    case 1: _tile_stored(1, p, row_bytes); break;
    case 2: _tile_stored(2, p, row_bytes); break;
    case 3: _tile_stored(3, p, row_bytes); break;
    }
}

/* sums 2 i + j += inputs i * weights j; inputs of int8 are without a sign, as `int8_row` writes them */
INLINE void tile_multiply(const enum fs_weight_type TYPE, const int I, const int J)
{
    switch (2 * I + J + (TYPE == FS_INT8 ? 4 : 0)) {
    case 0: _tile_dpbf16ps(0, 4, 6); break;
    case 1: _tile_dpbf16ps(1, 4, 7); break;
    case 2: _tile_dpbf16ps(2, 5, 6); break;
    case 3: _tile_dpbf16ps(3, 5, 7); break;
    case 4: _tile_dpbusd(0, 4, 6); break;
    case 5: _tile_dpbusd(1, 4, 7); break;
    case 6: _tile_dpbusd(2, 5, 6); break;
    case 7: _tile_dpbusd(3, 5, 7); break;
    }
}

#else

static _Thread_local struct {
    int rows; /* of inputs and sums; 0: not configured */
    int32_t words[TILES][16][16];
} unit;

static void tiles_configure(int rows)
{
    if (unit.rows)
        __builtin_trap();
    memset(&unit, 0, sizeof unit);
    unit.rows = rows;
}

static void tiles_release(void)
{
    unit.rows = 0;
}

static void tile_rows_end(ptrdiff_t row, ptrdiff_t n_rows)
{
    if (row + unit.rows > n_rows)
        __builtin_trap();
}

/* The rows of a tile, and the bytes of one. */
static int tile_shape(int tile, size_t *row_bytes)
{
    if (!unit.rows)
        __builtin_trap();
    *row_bytes = tile < FIRST_INPUTS || tile >= FIRST_WEIGHTS ? FS_VECTOR_BYTES : TILE_WORDS * 4;
    return tile < FIRST_WEIGHTS ? unit.rows : TILE_WORDS;
}

static void tile_load(int tile, const void *p, ptrdiff_t row_bytes)
{
    size_t n;
    const int rows = tile_shape(tile, &n);
    for (int row = 0; row < rows; row++)
        memcpy(unit.words[tile][row], (const char *)p + row * row_bytes, n);
}

static void tile_zero(int tile)
{
    memset(unit.words[tile], 0, sizeof unit.words[tile]);
}

static void tile_store(int tile, void *p, ptrdiff_t row_bytes)
{
    size_t n;
    const int rows = tile_shape(tile, &n);
    for (int row = 0; row < rows; row++)
        memcpy((char *)p + row * row_bytes, unit.words[tile][row], n);
}

static float upper_half(int32_t word)
{
    float x;
    word &= ~0xffff;
    memcpy(&x, &word, sizeof x);
    return x;
}

/* As the manual gives TDPBF16PS: the even and the odd of each pair are summed apart, from 0. */
static float bfloat16_sum(const int32_t *inputs, const int32_t (*weights)[16], int lane)
{
    float even = 0, odd = 0;
    for (int k = 0; k < TILE_WORDS; k++) {
        even += upper_half((int32_t)((uint32_t)inputs[k] << 16)) *
                upper_half((int32_t)((uint32_t)weights[k][lane] << 16));
        odd += upper_half(inputs[k]) * upper_half(weights[k][lane]);
    }
    return even + odd;
}

static int32_t int8_sum(const int32_t *inputs, const int32_t (*weights)[16], int lane)
{
    int32_t sum = 0;
    for (int k = 0; k < TILE_WORDS; k++)
        for (int i = 0; i < 4; i++)
            sum += ((const uint8_t *)&inputs[k])[i] * ((const int8_t *)&weights[k][lane])[i];
    return sum;
}

/* Sums of int8 wrap around, as on AMX: inputs without a sign take them out of 32 bits, and offsets back. */
static void tile_multiply(enum fs_weight_type type, int i, int j)
{
    const int32_t (*inputs)[16] = unit.words[FIRST_INPUTS + i];
    const int32_t (*weights)[16] = unit.words[FIRST_WEIGHTS + j];
    int32_t (*sums)[16] = unit.words[2 * i + j];
    for (int row = 0; row < unit.rows; row++)
        for (int lane = 0; lane < LANES; lane++)
            if (type == FS_INT8)
                sums[row][lane] =
                    (int32_t)((uint32_t)sums[row][lane] + (uint32_t)int8_sum(inputs[row], weights, lane));
            else {
                float sum;
                memcpy(&sum, &sums[row][lane], sizeof sum);
                sum += bfloat16_sum(inputs[row], weights, lane);
                memcpy(&sums[row][lane], &sum, sizeof sum);
            }
}

#endif
#endif
