"""Work of many like items, shared out among threads: what the operations that have no time have in common."""

from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cython.parallel cimport parallel, threadid

cdef extern from "team.h" nogil:
    int fs_team_limit(int wanted)
    int fs_team_size()
    ctypedef struct fs_counter:
        pass
    void fs_counter_set(fs_counter *counter, long long first)
    long long fs_counter_get(fs_counter *counter)
    long long fs_take(fs_counter *counter)
    unsigned long long fs_flush_denormals()
    void fs_restore_denormals(unsigned long long before)

cdef enum:
    SHARE_TEAM_WORK = 1 << 18    # below this much work in all, waking another thread costs more than it gives
    SHARE_CHUNK_WORK = 1 << 29   # work between two looks for Ctrl-C: a tenth of a second at the worst
    SHARE_CHUNK_ITEMS = 1 << 20  # and so many items at most: the least of them waits for memory

    SHARE_LINE = 64              # bytes of a cache line: scratch of two threads does not meet in one

# One item of a job, with scratch memory of the thread that does it.
ctypedef void (*take_part)(const void *job, Py_ssize_t item, void *scratch) noexcept nogil

# Items [first, last) of a job. What one item gives may not depend on the others.
ctypedef void (*share_part)(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil


cdef inline int threads_for(Py_ssize_t items, double work_each, int n_threads) noexcept nogil:
    """How many threads some items pay for."""
    return <int> max(1, min(min(<double> n_threads, <double> items), items * work_each / SHARE_TEAM_WORK))


cdef inline void share_flushed(
    share_part part, const void *job, Py_ssize_t first, Py_ssize_t n, int thread, int team,
) noexcept nogil:
    """What one thread of a team does of n items."""
    cdef unsigned long long before
    if thread < team:
        before = fs_flush_denormals()
        part(job, first + n * thread // team, first + n * (thread + 1) // team)
        fs_restore_denormals(before)


cdef inline int share_out(
    share_part part, const void *job, Py_ssize_t items, double work_each, int n_threads,
) except -1:
    """Do all items of a job; the work of each is counted in multiply-adds that take as long."""
    cdef int most = threads_for(items, work_each, n_threads)
    # Every region is opened with all threads, or none: the runtime ends and starts threads when their number changes.
    cdef int region = fs_team_limit(n_threads) if most > 1 else 1
    cdef int threads = min(most, region)
    cdef Py_ssize_t chunk = <Py_ssize_t> min(<double> SHARE_CHUNK_ITEMS, SHARE_CHUNK_WORK / max(1.0, work_each))
    cdef Py_ssize_t first = 0, n
    while first < items:
        n = min(max(chunk, threads), items - first)
        with nogil:
            if threads <= 1:
                share_flushed(part, job, first, n, 0, 1)
            else:
                with parallel(num_threads=region):
                    share_flushed(part, job, first, n, threadid(), min(fs_team_size(), threads))
        PyErr_CheckSignals()
        first += n
    return 0


cdef inline Py_ssize_t lines(Py_ssize_t n_bytes) noexcept nogil:
    """That many bytes, as whole cache lines."""
    return (n_bytes + SHARE_LINE - 1) // SHARE_LINE * SHARE_LINE


cdef inline void take_flushed(
    take_part part, const void *job, fs_counter *counter, Py_ssize_t last, void *scratch,
) noexcept nogil:
    """What one thread of a team takes of the items before `last`."""
    cdef unsigned long long before = fs_flush_denormals()
    cdef Py_ssize_t item = fs_take(counter)
    while item < last:
        part(job, item, scratch)
        item = fs_take(counter)
    fs_restore_denormals(before)


cdef inline int take_out(
    take_part part, const void *job, Py_ssize_t items, double work_each, Py_ssize_t scratch_bytes, int n_threads,
) except -1:
    """Do all items of a job, each thread one after another; `work_each` is about the work of an item.

    The scratch of a thread stays its own until the end, and begins with -1 as an int64_t.
    """
    cdef int most = threads_for(items, work_each, n_threads)
    cdef int region = fs_team_limit(n_threads) if most > 1 else 1
    cdef int threads = min(most, region)
    # As many for each thread, or some would wait for the others.
    cdef Py_ssize_t chunk = threads * <Py_ssize_t> max(1.0, min(<double> items, SHARE_CHUNK_WORK / work_each))
    cdef Py_ssize_t each = lines(scratch_bytes), first = 0, last
    cdef fs_counter counter
    cdef char *memory = <char *> PyMem_RawMalloc(threads * each + SHARE_LINE)
    cdef char *scratch
    cdef int thread
    if memory == NULL:
        raise MemoryError(f"{threads * each} bytes of scratch")
    scratch = memory + (-<Py_ssize_t> memory & (SHARE_LINE - 1))
    try:
        for thread in range(threads):
            (<long long *> (scratch + thread * each))[0] = -1
        while first < items:
            last = min(items, first + chunk)
            fs_counter_set(&counter, first)
            with nogil:
                if threads == 1:
                    take_flushed(part, job, &counter, last, scratch)
                else:
                    with parallel(num_threads=region):
                        thread = threadid()
                        if thread < threads:
                            take_flushed(part, job, &counter, last, scratch + thread * each)
            PyErr_CheckSignals()
            first = last
    finally:
        PyMem_RawFree(memory)
    return 0
