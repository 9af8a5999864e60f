/* AVX-512 F, DQ and BW, narrow weights. */
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define FS_NARROW_TABLE fs_avx512_narrow
#define FS_REAL_BYTES 4
#define FS_VECTOR_BYTES 64
#define FS_BFLOAT16_BY "AVX-512, widened to float32"
#define FS_INT8_BY "AVX-512, pairs of int16"
#include "../narrow.h"
#endif
