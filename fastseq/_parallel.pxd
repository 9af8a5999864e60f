# Declarations for the other compiled modules: threads and the loops they share. See src/runtime/_parallel.pyx.

from runtime.team cimport fs_barrier

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
