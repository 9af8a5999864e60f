/* AVX-512 F, DQ, BW and VNNI, narrow weights. */
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#define FS_NARROW_TABLE fs_avx512_vnni_narrow
#define FS_REAL_BYTES 4
#define FS_VECTOR_BYTES 64
#define FS_BFLOAT16_BY "AVX-512, widened to float32"
#define FS_INT8_BY "AVX-512 VNNI"
#include "../narrow.h"
#endif
