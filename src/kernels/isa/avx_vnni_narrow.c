/* AVX2 with FMA and AVX-VNNI, narrow weights. */
#if defined(__AVX2__) && defined(__FMA__) && defined(__AVXVNNI__)
#define FS_NARROW_TABLE fs_avx_vnni_narrow
#define FS_REAL_BYTES 4
#define FS_VECTOR_BYTES 32
#define FS_BFLOAT16_BY "AVX2, widened to float32"
#define FS_INT8_BY "AVX-VNNI"
#include "../narrow.h"
#endif
