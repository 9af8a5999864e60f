# Declarations for the other compiled modules: threads and the loops they share. See src/runtime/_parallel.pyx.

cdef extern from "runtime/team.h" nogil:
    ctypedef struct fs_barrier:
        pass
    ctypedef struct fs_counter:
        pass
    void fs_counter_set(fs_counter *counter, long long first)
    long long fs_counter_get(fs_counter *counter)
    long long fs_take(fs_counter *counter)
    unsigned long long fs_flush_denormals()
    void fs_restore_denormals(unsigned long long before)

cdef enum:
    TEAM_WORK = 1 << 18    # multiply-adds in all; below this, waking another thread costs more than it gives
    SIGNAL_WORK = 1 << 29   # multiply-adds between two looks for Ctrl-C: a tenth of a second at the worst
    CACHE_LINE = 64        # bytes: scratch of two threads does not meet in one

# What one thread of a team does. `barrier` is that of the team, NULL for a team of one.
ctypedef void (*team_body)(void *job, int thread, int team, fs_barrier *barrier) noexcept nogil

# Items [first, last) of a job. The result of one item may not depend on the others.
ctypedef void (*range_body)(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil

# One item of a job, with scratch memory of the thread that does it.
ctypedef void (*item_body)(const void *job, Py_ssize_t item, void *scratch) noexcept nogil

cdef void run_team(team_body body, void *job, int threads, int n_threads) noexcept nogil
cdef void team_wait(fs_barrier *barrier, int team) noexcept nogil
cdef bint team_dissolved(fs_barrier *barrier) noexcept nogil
cdef int parallel_for(
    range_body body, const void *job, Py_ssize_t items, double work_each, int n_threads,
) except -1
cdef int parallel_for_dynamic(
    item_body body, const void *job, Py_ssize_t items, double work_each, Py_ssize_t scratch_bytes, int n_threads,
) except -1


cdef inline int threads_for(Py_ssize_t items, double work_each, int n_threads) noexcept nogil:
    """How many threads some items pay for."""
    return <int> max(1, min(min(<double> n_threads, <double> items), items * work_each / TEAM_WORK))


cdef inline Py_ssize_t lines(Py_ssize_t n_bytes) noexcept nogil:
    """That many bytes, rounded up to whole cache lines."""
    return (n_bytes + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
