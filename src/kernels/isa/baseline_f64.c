/* 128-bit lanes: x86-64-v2, AArch64, or whatever the compiler makes of them elsewhere, float64. */
#define FS_SET "baseline"
#define FS_TABLE fs_baseline_f64
#define FS_REAL_BYTES 8
#define FS_VECTOR_BYTES 16
#include "../kernels.inc"
