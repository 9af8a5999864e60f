/*
 * Which instruction sets can run here.
 */
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <string.h>

static const fs_set sets[] = {
    {"amx_in_c", &fs_baseline_f32, &fs_baseline_f64, &fs_amx_in_c_narrow},
    {"baseline", &fs_baseline_f32, &fs_baseline_f64, &fs_baseline_narrow},
#if defined(__x86_64__)
    {"avx2", &fs_avx2_f32, &fs_avx2_f64, &fs_avx2_narrow},
    {"avx_vnni", &fs_avx2_f32, &fs_avx2_f64, &fs_avx_vnni_narrow},
    {"avx512", &fs_avx512_f32, &fs_avx512_f64, &fs_avx512_narrow},
    {"avx512_vnni", &fs_avx512_f32, &fs_avx512_f64, &fs_avx512_vnni_narrow},
    {"avx512_bf16", &fs_avx512_f32, &fs_avx512_f64, &fs_avx512_bf16_narrow},
    {"amx", &fs_avx512_f32, &fs_avx512_f64, &fs_amx_narrow},
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

static int has_avx512_bf16(void)
{
    return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

/* Tiles are registers that a process of Linux has to ask for; it may be refused them. */
static int has_amx(void)
{
#if defined(__linux__)
    enum {
        ARCH_REQ_XCOMP_PERM = 0x1023,
        TILE_DATA = 18,
        AMX = 1 << 22 | 1 << 24 | 1 << 25,
        TILE_STATE = 3 << 17
    };
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & AMX) != AMX)
        return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & TILE_STATE) == TILE_STATE && !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA);
#else
    return 0;
#endif
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
        return has_avx512_bf16();
    if (!strcmp(set, "amx"))
        return has_avx512_bf16() && has_amx();
    return 1;
}
#else
static int runs(const char *set)
{
    return !strcmp(set, "baseline") || !strcmp(set, "amx_in_c");
}
#endif

const fs_set *fs_find_set(const char *name)
{
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++)
        if (!strcmp(sets[i].name, name))
            return runs(name) ? &sets[i] : NULL;
    return NULL;
}
