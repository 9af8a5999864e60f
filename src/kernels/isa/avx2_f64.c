/* AVX2 and FMA, float64. */
#if defined(__AVX2__) && defined(__FMA__)
#define FS_SET "avx2"
#define FS_TABLE fs_avx2_f64
#define FS_REAL_BYTES 8
#define FS_VECTOR_BYTES 32
#include "../kernels.inc"
#endif
