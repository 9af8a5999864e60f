/*
 * Which instruction sets can run here.
 */
#include "kernels.h"

#include <string.h>

#if defined(__x86_64__)
/* The compiler's run-time support asks CPUID, and XGETBV whether the system saves the registers. */
static int runs(const char *set)
{
    __builtin_cpu_init();
    if (!strcmp(set, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!strcmp(set, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
    return 1;
}
#else
static int runs(const char *set)
{
    return !strcmp(set, "baseline");
}
#endif

const fs_kernels *fs_find_kernels(const char *set, int item_size)
{
    static const fs_kernels *const tables[] = {
#if defined(__x86_64__)
        &fs_avx512_f32,   &fs_avx512_f64,   &fs_avx2_f32, &fs_avx2_f64,
#endif
        &fs_baseline_f32, &fs_baseline_f64,
    };
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        if (tables[i]->item_size == item_size && !strcmp(tables[i]->set, set))
            return runs(set) ? tables[i] : NULL;
    return NULL;
}
