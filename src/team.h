/*
 * What the threads of one parallel region need: their number, a barrier, and the flushing of denormals.
 */
#ifndef FASTSEQ_TEAM_H
#define FASTSEQ_TEAM_H

#include <stdatomic.h>
#include <stdint.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#if defined(_OPENMP)
#include <omp.h>
#include <pthread.h>
#include <stdlib.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(_OPENMP)
static inline void *fs_wait_for_unlock(void *mutex)
{
    pthread_mutex_lock(mutex);
    pthread_mutex_unlock(mutex);
    return NULL;
}

/* How many of `n` threads the system lets run at once. */
static inline int fs_startable_threads(int n)
{
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_t *threads = malloc((size_t)n * sizeof *threads);
    int started = 0;
    if (!threads)
        return 0;
    pthread_mutex_lock(&gate);
    while (started < n && !pthread_create(&threads[started], NULL, fs_wait_for_unlock, &gate))
        started++;
    pthread_mutex_unlock(&gate);
    for (int i = 0; i < started; i++)
        pthread_join(threads[i], NULL);
    free(threads);
    /* Where there was an end to them, leave some room to whoever starts threads next. */
    return started == n ? n : started / 2;
}
#endif

/*
 * How many of `wanted` threads a region may ask for. The OpenMP runtime ends the process when the system refuses it
 * a thread, so where this thread asks for more than it last had, they are started and joined here first. The runtime
 * lets surplus threads go, so `last` follows it down as well. Two Python threads may still meet between this look
 * and their regions; nothing the runtime offers closes that gap.
 */
static inline int fs_team_limit(int wanted)
{
#if defined(_OPENMP)
    static _Thread_local int last = 1;
    if (wanted > last)
        wanted = 1 + fs_startable_threads(wanted - 1);
    if (wanted > 1)
        last = wanted;
#endif
    return wanted;
}

/* Threads that really run in this region; may be fewer than were asked for. */
static inline int fs_team_size(void)
{
#if defined(_OPENMP)
    return omp_get_num_threads();
#else
    return 1;
#endif
}

static inline int fs_has_openmp(void)
{
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

/* A barrier for the steps of a sequence, far shorter than what the runtime's own is made for. */
typedef struct fs_barrier {
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int phase;
    atomic_int sleepers;
} fs_barrier;

enum { FS_SPINS = 2000 }; /* ten to a hundred microseconds; most waits between steps are far shorter */

static inline void fs_barrier_init(fs_barrier *barrier)
{
    atomic_init(&barrier->arrived, 0);
    atomic_init(&barrier->phase, 0);
    atomic_init(&barrier->sleepers, 0);
}

/*
 * Gives this processor up until the phase is over. Where the thread waited for has no processor, this one has to
 * fall idle before the system moves that thread here: yielding would keep both waiting for whole time slices.
 */
static inline void fs_barrier_sleep(fs_barrier *barrier, int phase)
{
#if defined(__linux__)
    atomic_fetch_add(&barrier->sleepers, 1);
    syscall(SYS_futex, &barrier->phase, FUTEX_WAIT_PRIVATE, phase, NULL, NULL, 0);
    atomic_fetch_sub(&barrier->sleepers, 1);
#else
    (void)barrier, (void)phase;
    sched_yield();
#endif
}

/* Returns once all `team` threads are here; what each wrote before, all can read after. */
static inline void fs_barrier_wait(fs_barrier *barrier, int team)
{
    int phase = atomic_load_explicit(&barrier->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&barrier->arrived, 1, memory_order_acq_rel) == team - 1) {
        atomic_store_explicit(&barrier->arrived, 0, memory_order_relaxed);
        atomic_store(&barrier->phase, phase + 1);
#if defined(__linux__)
        if (atomic_load(&barrier->sleepers))
            syscall(SYS_futex, &barrier->phase, FUTEX_WAKE_PRIVATE, team, NULL, NULL, 0);
#endif
        return;
    }
    for (int spins = 0; atomic_load_explicit(&barrier->phase, memory_order_acquire) == phase; spins++) {
        if (spins >= FS_SPINS)
            fs_barrier_sleep(barrier, phase);
#if defined(__x86_64__)
        else
            _mm_pause();
#endif
    }
}

/* Items that the threads of a team take one by one, because some take longer than others. */
typedef struct fs_counter {
    _Alignas(64) atomic_llong next;
} fs_counter;

static inline void fs_counter_set(fs_counter *counter, long long first)
{
    atomic_store_explicit(&counter->next, first, memory_order_relaxed);
}

static inline long long fs_counter_get(fs_counter *counter)
{
    return atomic_load_explicit(&counter->next, memory_order_relaxed);
}

static inline long long fs_take(fs_counter *counter)
{
    return atomic_fetch_add_explicit(&counter->next, 1, memory_order_relaxed);
}

/*
 * Denormal numbers are taken and given as 0 while a kernel runs, because some processors take a hundred times
 * longer over them. The control register comes back as it was, sticky flags included, on every thread.
 */
static inline uint64_t fs_flush_denormals(void)
{
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040); /* flush to zero, denormals are zero */
    return before;
#elif defined(__aarch64__)
    uint64_t control, status; /* 32 bits each */
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    __asm__ volatile("mrs %0, fpsr" : "=r"(status));
    __asm__ volatile("msr fpcr, %0" : : "r"(control | (UINT64_C(1) << 24)));
    return status << 32 | (control & UINT32_MAX);
#else
    return 0;
#endif
}

static inline void fs_restore_denormals(uint64_t before)
{
#if defined(__x86_64__)
    _mm_setcsr((unsigned)before);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(before & UINT32_MAX));
    __asm__ volatile("msr fpsr, %0" : : "r"(before >> 32));
#else
    (void)before;
#endif
}

#endif
