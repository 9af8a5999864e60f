/* Tiles without AMX, narrow weights: what tests take for it. */
#define FS_NARROW_TABLE fs_amx_in_c_narrow
#define FS_REAL_BYTES 4
#define FS_VECTOR_BYTES 16
#define FS_TILES
#define FS_TILES_IN_C
#define FS_BFLOAT16_BY "tiles in C"
#define FS_INT8_BY "tiles in C"
#include "../narrow.h"
