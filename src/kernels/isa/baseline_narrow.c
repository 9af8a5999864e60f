/* The instruction set that every machine of this architecture has, narrow weights. */
#define FS_NARROW_TABLE fs_baseline_narrow
#define FS_REAL_BYTES 4
#define FS_VECTOR_BYTES 16
#define FS_BFLOAT16_BY "widened to float32"
#define FS_INT8_BY "pairs of int16"
#include "../narrow.h"
