"""Teams of threads and the loops they share: every OpenMP region of the package is in `run_team`.

A call says how many threads it may use and how many pay; whether they run together now is decided here, region by
region. Where other processes keep a team's threads from running, the process does without teams for a while (see
`fs_pace` in team.h). No result depends on any of it.
"""

from cpython.exc cimport PyErr_CheckSignals
from cython.parallel cimport parallel, threadid
from libc.string cimport memset

from runtime.costs cimport SIGNAL_WORK, threads_for
from runtime.scratch cimport Scratch, lines, scratch_array, scratch_close, scratch_open
from runtime.team cimport (
    FS_BROKEN, FS_END_SPIN, FS_HELD, FS_LATE, FS_MEASURED, FS_SPIN, fs_barrier, fs_barrier_delay,
    fs_barrier_dissolved, fs_barrier_entered_late, fs_barrier_init, fs_barrier_late, fs_barrier_meet, fs_counter,
    fs_counter_set, fs_flush_denormals, fs_now, fs_pace, fs_pace_allows, fs_pace_mode_of, fs_pace_note,
    fs_pace_patience, fs_pace_set_mode, fs_restore_denormals, fs_take, fs_team_limit, fs_team_size,
)

cdef enum:
    CHUNK_ITEMS = 1 << 20  # items between two looks for Ctrl-C at most: the least of them waits for memory

cdef fs_pace pace  # of this process


def set_team_mode(str mode not None):
    """How teams behave where their threads have to wait for processors. For tests.

    Parameters
    ----------
    mode : {"measured", "held", "broken"}
        Teams are given up where they lose time, which is how a process starts; never; or every team dissolves as soon
        as it can, as if its threads had waited.
    """
    fs_pace_set_mode(&pace, {"measured": FS_MEASURED, "held": FS_HELD, "broken": FS_BROKEN}[mode])


def pauses(regions):
    """The pause, in ns, that a process would be in after each of some regions; 0: none. For tests.

    Parameters
    ----------
    regions : iterable of (int, int, int)
        When each was opened and closed, and how long it waited for threads without a processor, in ns.
    """
    cdef fs_pace trial
    memset(&trial, 0, sizeof(trial))
    result = []
    for opened, closed, late in regions:
        fs_pace_note(&trial, opened, closed, late)
        result.append(trial.pause if trial.until > closed else 0)
    return result


def late_entries(late):
    """What a region counts as lost, in ns, when its threads enter it so late. For tests.

    Parameters
    ----------
    late : iterable of int
        How late each thread enters, in ns.
    """
    cdef fs_barrier barrier
    fs_barrier_init(&barrier, 0)
    for one in late:
        fs_barrier_entered_late(&barrier, one)
    return fs_barrier_late(&barrier)


cdef inline void run_flushed(team_body body, void *job, int thread, int team, fs_barrier *barrier) noexcept nogil:
    cdef unsigned long long before = fs_flush_denormals()
    body(job, thread, team, barrier)
    fs_restore_denormals(before)


# A parallel region: when it was opened, and when the calling thread had done its share and met the others, in ns.
cdef struct Region:
    fs_barrier barrier
    long long opened
    long long met


cdef inline void run_share(team_body body, void *job, int thread, int team, Region *region) noexcept nogil:
    """What one thread of a team does in a region."""
    cdef long long now = fs_now()
    if now - region.opened > FS_LATE:
        if thread:
            fs_barrier_entered_late(&region.barrier, now - region.opened)
        else:  # the runtime waited for the others to come out of the region before
            fs_barrier_delay(&region.barrier, now - region.opened)
    run_flushed(body, job, thread, team, &region.barrier)
    # The runtime's own barrier spins for milliseconds, also where the thread it waits for wants this processor.
    if team > 1:
        fs_barrier_meet(&region.barrier, team, FS_END_SPIN)
    if thread == 0:
        region.met = fs_now()


cdef void run_team(team_body body, void *job, int threads, int n_threads) noexcept nogil:
    """Run `body` on each of up to `threads` threads, denormals flushed; returns when all have.

    `n_threads` is what the call may use. Every region is opened with that many or not at all: the runtime ends and
    starts threads when their number changes.
    """
    cdef int limit = 1
    cdef long long closed
    cdef Region region
    if threads > 1 and fs_pace_allows(&pace):
        limit = fs_team_limit(n_threads)
    threads = min(threads, limit)
    if threads <= 1:
        run_flushed(body, job, 0, 1, NULL)
        return
    fs_barrier_init(&region.barrier, fs_pace_patience(&pace))
    region.opened = fs_now()
    with parallel(num_threads=limit):
        if threadid() < threads:
            run_share(body, job, threadid(), min(fs_team_size(), threads), &region)
    closed = fs_now()
    if closed - region.met > FS_LATE:
        fs_barrier_delay(&region.barrier, closed - region.met)
    if fs_pace_mode_of(&pace) == FS_MEASURED:
        fs_pace_note(&pace, region.opened, closed, fs_barrier_late(&region.barrier))


cdef void team_wait(fs_barrier *barrier, int team) noexcept nogil:
    """Return once all threads of the team are here; what each wrote before, all can read after."""
    fs_barrier_meet(barrier, team, FS_SPIN)


cdef bint team_dissolved(fs_barrier *barrier) noexcept nogil:
    """Whether to end the region here, because its threads wait for processors; one thread will go on alone.

    The same on all threads from one `team_wait` to the next. What heeds it is free to.
    """
    return fs_barrier_dissolved(barrier)


cdef struct Range:
    range_body body
    const void *job
    Py_ssize_t first
    Py_ssize_t items


cdef void run_range(void *job, int thread, int team, fs_barrier *barrier) noexcept nogil:
    """An even share of the items for each thread."""
    cdef const Range *loop = <const Range *> job
    loop.body(
        loop.job, loop.first + loop.items * thread // team, loop.first + loop.items * (thread + 1) // team,
    )


cdef int parallel_for(
    range_body body, const void *job, Py_ssize_t items, double work_each, int n_threads,
) except -1:
    """Do all items of a job, an even share on each thread; the work of an item is counted in multiply-adds."""
    cdef int threads = threads_for(items, work_each, n_threads)
    cdef Py_ssize_t chunk = <Py_ssize_t> min(<double> CHUNK_ITEMS, SIGNAL_WORK / max(1.0, work_each))
    cdef Range loop
    loop.body, loop.job, loop.first = body, job, 0
    while loop.first < items:
        loop.items = min(max(chunk, threads), items - loop.first)
        with nogil:
            run_team(run_range, &loop, threads, n_threads)
        PyErr_CheckSignals()
        loop.first += loop.items
    return 0


cdef struct Queue:
    item_body body
    const void *job
    fs_counter counter
    Py_ssize_t last
    char *scratch
    Py_ssize_t scratch_each


cdef void run_queue(void *job, int thread, int team, fs_barrier *barrier) noexcept nogil:
    """Each thread takes the next item, as soon as it has done its last."""
    cdef Queue *loop = <Queue *> job
    cdef Py_ssize_t item = fs_take(&loop.counter)
    while item < loop.last:
        loop.body(loop.job, item, loop.scratch + thread * loop.scratch_each)
        item = fs_take(&loop.counter)


cdef int parallel_for_dynamic(
    item_body body, const void *job, Py_ssize_t items, double work_each, Py_ssize_t scratch_bytes, int n_threads,
) except -1:
    """Do all items of a job, each thread one after another; `work_each` is about the work of an item.

    The scratch of a thread stays its own until the end, and begins with -1 as an int64_t.
    """
    cdef int threads = threads_for(items, work_each, n_threads), thread
    # As many for each thread, or some would wait for the others.
    cdef Py_ssize_t chunk = threads * <Py_ssize_t> max(1.0, min(<double> items, SIGNAL_WORK / work_each))
    cdef Py_ssize_t first = 0
    cdef Queue loop
    cdef Scratch scratch
    memset(&scratch, 0, sizeof(scratch))
    loop.body, loop.job, loop.scratch_each = body, job, lines(scratch_bytes)
    scratch_array(&scratch, threads * loop.scratch_each)
    scratch_open(&scratch)
    loop.scratch = scratch_array(&scratch, threads * loop.scratch_each)
    try:
        for thread in range(threads):
            (<long long *> (loop.scratch + thread * loop.scratch_each))[0] = -1
        while first < items:
            loop.last = min(items, first + chunk)
            fs_counter_set(&loop.counter, first)
            with nogil:
                run_team(run_queue, &loop, threads, n_threads)
            PyErr_CheckSignals()
            first = loop.last
    finally:
        scratch_close(&scratch)
    return 0
