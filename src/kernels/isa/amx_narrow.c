/* AMX-TILE, INT8 and BF16, and what few rows take beside them, narrow weights. */
#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define FS_NARROW_TABLE fs_amx_narrow
#define FS_REAL_BYTES 4
#define FS_VECTOR_BYTES 64
#define FS_TILES
#define FS_BFLOAT16_BY "AMX-BF16"
#define FS_INT8_BY "AMX-INT8, of few rows AVX-512 VNNI"
#include "../narrow.h"
#endif
