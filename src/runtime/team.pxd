# What runtime/team.h declares; the comments are there.

cdef extern from "runtime/team.h" nogil:
    enum:
        FS_LATE
        FS_SPIN
        FS_END_SPIN

    bint fs_has_openmp()
    int fs_team_limit(int wanted)
    int fs_team_size()
    long long fs_now()

    ctypedef struct fs_barrier:
        pass
    void fs_barrier_init(fs_barrier *barrier, long long patience)
    void fs_barrier_meet(fs_barrier *barrier, int team, long long spin)
    bint fs_barrier_dissolved(fs_barrier *barrier)
    long long fs_barrier_late(fs_barrier *barrier)
    void fs_barrier_delay(fs_barrier *barrier, long long late)
    void fs_barrier_entered_late(fs_barrier *barrier, long long late)

    ctypedef struct fs_pace:
        long long until
        long long pause
    enum:
        FS_MEASURED
        FS_HELD
        FS_BROKEN
    int fs_pace_mode_of(fs_pace *pace)
    void fs_pace_set_mode(fs_pace *pace, int mode)
    bint fs_pace_allows(fs_pace *pace)
    long long fs_pace_patience(fs_pace *pace)
    void fs_pace_note(fs_pace *pace, long long opened, long long closed, long long late)

    ctypedef struct fs_counter:
        pass
    void fs_counter_set(fs_counter *counter, long long first)
    long long fs_counter_get(fs_counter *counter)
    long long fs_take(fs_counter *counter)

    unsigned long long fs_flush_denormals()
    void fs_restore_denormals(unsigned long long before)
