/* AVX-512 F and DQ, float64. */
#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define FS_SET "avx512"
#define FS_TABLE fs_avx512_f64
#define FS_REAL_BYTES 8
#define FS_VECTOR_BYTES 64
#include "../kernels.inc"
#endif
