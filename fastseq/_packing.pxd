# Declarations for the other compiled modules: packed weights. See src/packing/_packing.pyx.

cimport numpy as cnp

from runtime.kernels cimport fs_kernels, fs_weights


cdef enum:
    PLAIN_BLOCKS = 4  # blocks of units in a panel of one gate


# Which gates of a matrix of shape (gates * units, k) meet in a panel, and in how many blocks of units.
cdef struct PanelLayout:
    int first
    int count
    int blocks
    Py_ssize_t units


cdef class PackedWeight:
    cdef const fs_kernels *kernels
    cdef fs_weights panels       # as kernels read them; points into `buffers`
    cdef Py_ssize_t n_bytes
    cdef list buffers
    cdef cnp.ndarray weight      # of a linear map: what `transposed` is packed from
    cdef PackedWeight gradient   # the transposed weights, or None until they are asked for

    cdef PackedWeight transposed(self)


cdef PackedWeight pack_gates(
    const fs_kernels *kernels, PanelLayout layout, cnp.ndarray of_x, cnp.ndarray of_h, cnp.ndarray bias,
    cnp.ndarray h_bias,
)
cdef PackedWeight pack_linear(cnp.ndarray of_x, cnp.ndarray of_h, cnp.ndarray bias)
cdef PackedWeight pack_rows(
    const fs_kernels *kernels, cnp.ndarray weight, Py_ssize_t first, Py_ssize_t last, Py_ssize_t rotate,
)
