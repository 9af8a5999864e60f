"""Work of many like items, shared out among threads: what the operations that have no time have in common."""

from cpython.exc cimport PyErr_CheckSignals
from cython.parallel cimport parallel, threadid

cdef extern from "team.h" nogil:
    int fs_team_limit(int wanted)
    int fs_team_size()
    unsigned long long fs_flush_denormals()
    void fs_restore_denormals(unsigned long long before)

cdef enum:
    SHARE_TEAM_WORK = 1 << 18    # below this much work in all, waking another thread costs more than it gives
    SHARE_CHUNK_WORK = 1 << 29   # work between two looks for Ctrl-C: a tenth of a second at the worst
    SHARE_CHUNK_ITEMS = 1 << 20  # and so many items at most: the least of them waits for memory

# Items [first, last) of a job. What one item gives may not depend on the others.
ctypedef void (*share_part)(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil


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
    cdef int most = <int> min(min(<double> n_threads, <double> items), items * work_each / SHARE_TEAM_WORK)
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
