/* AVX2 with FMA, narrow weights. */
#if defined(__AVX2__) && defined(__FMA__)
#define FS_NARROW_TABLE fs_avx2_narrow
#define FS_REAL_BYTES 4
#define FS_VECTOR_BYTES 32
#define FS_BFLOAT16_BY "AVX2, widened to float32"
#define FS_INT8_BY "AVX2, pairs of int16"
#include "../narrow.h"
#endif
