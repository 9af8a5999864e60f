/* AVX2 and FMA, float32. */
#if defined(__AVX2__) && defined(__FMA__)
#define FS_SET "avx2"
#define FS_TABLE fs_avx2_f32
#define FS_REAL_BYTES 4
#define FS_VECTOR_BYTES 32
#include "../kernels.inc"
#endif
