# Declarations for the other compiled modules: what a forward keeps for backward. See src/recurrent/_bptt.pyx.

cimport numpy as cnp


cdef class Rows:
    cdef object lengths, resets
    cdef cnp.ndarray order, steps, reset_bytes, zeros


cdef class Tape:
    cdef tuple cells
    cdef cnp.ndarray x, y, h, c
    cdef Rows rows
    cdef list gates    # of each direction: (B, T, gates * H), or None
    cdef list c_steps  # of each direction: c after every step, (B, T, H), or None
