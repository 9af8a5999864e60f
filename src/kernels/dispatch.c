/*
 * Which instruction sets can run here.
 */
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <string.h>

static const fs_set sets[] = {
    {"baseline", &fs_baseline_f32, &fs_baseline_f64, &fs_baseline_narrow},
#if defined(__x86_64__)
    {"avx2", &fs_avx2_f32, &fs_avx2_f64, &fs_avx2_narrow},
    {"avx_vnni", &fs_avx2_f32, &fs_avx2_f64, &fs_avx_vnni_narrow},
    {"avx512", &fs_avx512_f32, &fs_avx512_f64, &fs_avx512_narrow},
    {"avx512_vnni", &fs_avx512_f32, &fs_avx512_f64, &fs_avx512_vnni_narrow},
    {"avx512_bf16", &fs_avx512_f32, &fs_avx512_f64, &fs_avx512_bf16_narrow},
#endif
};

#if defined(__x86_64__)
/* The compiler's run-time support asks CPUID, and XGETBV whether the system saves the registers. */
static int has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static int has_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw");
}

/* CPUID 7, 1: AVX-VNNI, which GCC's run-time support knows by name from version 13 on. */
static int has_avx_vnni(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}

static int runs(const char *set)
{
    __builtin_cpu_init();
    if (!strcmp(set, "avx2"))
        return has_avx2();
    if (!strcmp(set, "avx_vnni"))
        return has_avx2() && has_avx_vnni();
    if (!strcmp(set, "avx512"))
        return has_avx512();
    if (!strcmp(set, "avx512_vnni"))
        return has_avx512() && __builtin_cpu_supports("avx512vnni");
    if (!strcmp(set, "avx512_bf16"))
        return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    return 1;
}
#else
static int runs(const char *set)
{
    return !strcmp(set, "baseline");
}
#endif

const fs_set *fs_find_set(const char *name)
{
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++)
        if (!strcmp(sets[i].name, name))
            return runs(name) ? &sets[i] : NULL;
    return NULL;
}
