/*
 * What the threads of one parallel region need: their number, a barrier that notices when a thread was kept from
 * running, and the flushing of denormals.
 */
#ifndef FASTSEQ_TEAM_H
#define FASTSEQ_TEAM_H

#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/resource.h>
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

/* Nanoseconds of a clock that only moves forward. */
static inline int64_t fs_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

enum {
    FS_SPIN = 200000,      /* ns; most waits between two steps are far shorter */
    FS_END_SPIN = 500000,  /* ns; at the end of a region, where shares are less even */
    FS_LATE = 200000,      /* ns; a thread that has a processor is rarely so late */
    FS_RECENT = 100000000, /* ns; what was known of a thread before that is out of date */
    FS_SPINS = 64,         /* pauses between two looks at the clock */
};

/* How often the system took the processor away from this thread; -1 where the system does not say. */
static inline long fs_preemptions(void)
{
#if defined(RUSAGE_THREAD)
    struct rusage usage;
    if (!getrusage(RUSAGE_THREAD, &usage))
        return usage.ru_nivcsw;
#endif
    return -1;
}

/* What was known of this thread when others last waited for it. */
static _Thread_local struct {
    long preemptions; /* -1: it woke late, or the system does not say */
    int64_t at; /* ns */
} fs_last_wait;

/*
 * Whether this thread, for which others wait, was kept from running; else its share was larger than theirs. To count
 * preemptions is a system call, so it is not done before somebody waits, and the first wait in a while tells nothing.
 */
static inline int fs_was_held_up(int64_t now)
{
    long preemptions = fs_preemptions();
    int held_up = fs_last_wait.preemptions == -1 || fs_last_wait.preemptions != preemptions;
    int recent = now - fs_last_wait.at < FS_RECENT;
    fs_last_wait.preemptions = preemptions;
    fs_last_wait.at = now;
    return held_up && recent;
}

static inline void fs_woke_late(int64_t now)
{
    fs_last_wait.preemptions = -1;
    fs_last_wait.at = now;
}

/*
 * A barrier for the steps of a sequence, far shorter than what the runtime's own is made for. It also finds out
 * whether the threads of the team have processors: `late` sums how long it waited for threads that were preempted or
 * woke late. Where that is more than its patience, all threads leave the next barrier with `dissolved` set.
 */
typedef struct fs_barrier {
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int phase;
    atomic_int sleepers;
    atomic_int dissolved;
    int64_t patience; /* ns */
    _Atomic int64_t late; /* ns */
    _Atomic int64_t waiting_since; /* ns; about when the first sleeper of this phase arrived */
    _Atomic int64_t woken_at; /* ns; the last time sleepers were woken */
    _Atomic int64_t latest_entry; /* ns; how late the last thread entered the region */
} fs_barrier;

static inline void fs_barrier_init(fs_barrier *barrier, int64_t patience)
{
    atomic_init(&barrier->arrived, 0);
    atomic_init(&barrier->phase, 0);
    atomic_init(&barrier->sleepers, 0);
    atomic_init(&barrier->dissolved, 0);
    barrier->patience = patience;
    atomic_init(&barrier->late, 0);
    atomic_init(&barrier->waiting_since, 0);
    atomic_init(&barrier->woken_at, 0);
    atomic_init(&barrier->latest_entry, 0);
}

static inline int64_t fs_barrier_late(fs_barrier *barrier)
{
    return atomic_load_explicit(&barrier->late, memory_order_relaxed);
}

/*
 * Whether the team had better part here, and one thread go on alone. The same on all threads from one barrier to the
 * next.
 */
static inline int fs_barrier_dissolved(fs_barrier *barrier)
{
    return atomic_load_explicit(&barrier->dissolved, memory_order_relaxed);
}

/*
 * Gives this processor up until the phase is over. Where the thread waited for has no processor, this one has to
 * fall idle before the system moves that thread here: yielding would keep both waiting for whole time slices.
 */
static inline void fs_barrier_sleep(fs_barrier *barrier, int phase, int64_t arrived)
{
#if defined(__linux__)
    int64_t since = fs_now(), woken;
    if (atomic_load(&barrier->sleepers) == 0)
        atomic_store_explicit(&barrier->waiting_since, arrived, memory_order_relaxed);
    atomic_fetch_add(&barrier->sleepers, 1);
    syscall(SYS_futex, &barrier->phase, FUTEX_WAIT_PRIVATE, phase, NULL, NULL, 0);
    atomic_fetch_sub(&barrier->sleepers, 1);
    woken = atomic_load_explicit(&barrier->woken_at, memory_order_relaxed);
    if (woken > since && fs_now() - woken > FS_LATE)
        fs_woke_late(fs_now());
#else
    (void)barrier, (void)phase, (void)arrived;
    sched_yield();
#endif
}

static inline void fs_barrier_delay(fs_barrier *barrier, int64_t late)
{
    atomic_fetch_add_explicit(&barrier->late, late, memory_order_relaxed);
}

/* Counts a thread that entered the region so late; of several only the latest, because the others wait as it does. */
static inline void fs_barrier_entered_late(fs_barrier *barrier, int64_t late)
{
    int64_t before = atomic_load_explicit(&barrier->latest_entry, memory_order_relaxed);
    while (late > before)
        if (atomic_compare_exchange_weak(&barrier->latest_entry, &before, late)) {
            fs_barrier_delay(barrier, late - before);
            return;
        }
}

/* The last thread to arrive says why others sleep: because it had no processor, or because its share was larger. */
static inline void fs_barrier_judge(fs_barrier *barrier)
{
    int64_t now = fs_now(), waited = now - atomic_load_explicit(&barrier->waiting_since, memory_order_relaxed);
    if (waited > FS_LATE && fs_was_held_up(now))
        fs_barrier_delay(barrier, waited);
}

static inline void fs_barrier_wake(fs_barrier *barrier, int team)
{
#if defined(__linux__)
    atomic_store_explicit(&barrier->woken_at, fs_now(), memory_order_relaxed);
    syscall(SYS_futex, &barrier->phase, FUTEX_WAKE_PRIVATE, team, NULL, NULL, 0);
#else
    (void)barrier, (void)team;
#endif
}

/* Spins until the phase is over, or for about so many ns; returns whether it is over. */
static inline int fs_barrier_spin(fs_barrier *barrier, int phase, int64_t ns)
{
    int64_t start = 0;
    for (;;) {
        for (int spin = 0; spin < FS_SPINS; spin++) {
            if (atomic_load_explicit(&barrier->phase, memory_order_acquire) != phase)
                return 1;
#if defined(__x86_64__)
            _mm_pause();
#endif
        }
        int64_t now = fs_now();
        if (start && now - start > ns)
            return 0;
        start = start ? start : now;
    }
}

/*
 * Returns once all `team` threads are here; what each wrote before, all can read after. A thread spins for so many ns
 * before it gives its processor up.
 */
static inline void fs_barrier_meet(fs_barrier *barrier, int team, int64_t spin)
{
    int phase = atomic_load_explicit(&barrier->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&barrier->arrived, 1, memory_order_acq_rel) == team - 1) {
        atomic_store_explicit(&barrier->arrived, 0, memory_order_relaxed);
        if (atomic_load(&barrier->sleepers))
            fs_barrier_judge(barrier);
        if (atomic_load_explicit(&barrier->late, memory_order_relaxed) > barrier->patience)
            atomic_store_explicit(&barrier->dissolved, 1, memory_order_relaxed);
        atomic_store(&barrier->phase, phase + 1);
        if (atomic_load(&barrier->sleepers))
            fs_barrier_wake(barrier, team);
        return;
    }
    if (!fs_barrier_spin(barrier, phase, spin)) {
        int64_t arrived = fs_now() - spin;
        while (atomic_load_explicit(&barrier->phase, memory_order_acquire) == phase)
            fs_barrier_sleep(barrier, phase, arrived);
    }
}

/*
 * Whether teams of threads are worth their while. Where other processes use the processors, a team waits for
 * whichever of its threads has none, for whole time slices, and one thread alone is faster by far. So where teams
 * lose more than a share of their time to such waits, the process does without them for a pause, which doubles while
 * the attempts after it go no better. One for the process; all threads may read and change it, and no result depends
 * on it.
 */
typedef struct fs_pace {
    _Atomic int64_t until; /* ns; no teams before */
    _Atomic int64_t pause; /* ns; the last one */
    _Atomic int64_t debt;  /* ns lost, less the share that may be */
    atomic_int mode;       /* an fs_pace_mode */
} fs_pace;

enum fs_pace_mode {
    FS_MEASURED,
    /* For tests: */
    FS_HELD,   /* teams whatever happens */
    FS_BROKEN, /* teams that dissolve at the first barrier */
};

#define FS_PATIENCE INT64_C(5000000)     /* ns: the debt at which teams are given up */
#define FS_TRIAL INT64_C(2000000) /* ns: the first teams after a pause may lose it: threads have to wake */
#define FS_LOSS_SHARE 4 /* a quarter of a team's time may be lost, and two threads are still faster */
#define FS_PAUSE_LEAST INT64_C(2000000) /* ns: being wrong once costs next to nothing */
#define FS_PAUSE_MOST INT64_C(500000000) /* ns: how late it is noticed that the processors are free again */
#define FS_CALM INT64_C(50000000) /* ns: calm for so long and four pauses, and the next pause is short again */

static inline int fs_pace_mode_of(fs_pace *pace)
{
    return atomic_load_explicit(&pace->mode, memory_order_relaxed);
}

static inline void fs_pace_set_mode(fs_pace *pace, int mode)
{
    atomic_store_explicit(&pace->mode, mode, memory_order_relaxed);
}

static inline int fs_pace_allows(fs_pace *pace)
{
    int64_t until = atomic_load_explicit(&pace->until, memory_order_relaxed);
    return until == 0 || fs_pace_mode_of(pace) != FS_MEASURED || fs_now() >= until;
}

/* How long the next team may wait for threads without a processor. */
static inline int64_t fs_pace_patience(fs_pace *pace)
{
    int mode = fs_pace_mode_of(pace);
    if (mode != FS_MEASURED)
        return mode == FS_HELD ? INT64_MAX : -1;
    return FS_PATIENCE - atomic_load_explicit(&pace->debt, memory_order_relaxed);
}

/* Takes note of a region that was open from `opened` to `closed` and waited for `late`, all in ns. */
static inline void fs_pace_note(fs_pace *pace, int64_t opened, int64_t closed, int64_t late)
{
    int64_t debt = late + atomic_load_explicit(&pace->debt, memory_order_relaxed);
    debt -= (closed - opened) / FS_LOSS_SHARE;
    if (debt >= FS_PATIENCE) {
        int64_t until = atomic_load_explicit(&pace->until, memory_order_relaxed);
        int64_t pause = 2 * atomic_load_explicit(&pace->pause, memory_order_relaxed);
        if (until == 0 || opened - until > 2 * pause + FS_CALM)
            pause = FS_PAUSE_LEAST;
        if (pause > FS_PAUSE_MOST)
            pause = FS_PAUSE_MOST;
        atomic_store_explicit(&pace->pause, pause, memory_order_relaxed);
        atomic_store_explicit(&pace->until, closed + pause, memory_order_relaxed);
        debt = FS_PATIENCE - FS_TRIAL; /* the next attempt is given up at the first wait for a time slice */
    }
    atomic_store_explicit(&pace->debt, debt > 0 ? debt : 0, memory_order_relaxed);
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
