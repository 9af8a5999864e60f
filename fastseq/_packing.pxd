# Declarations for the other compiled modules: packed weights. See src/packing/_packing.pyx.

cimport numpy as cnp
from libc.stdint cimport int8_t, uint16_t, uint32_t
from libc.string cimport memcpy

from runtime.kernels cimport FS_BFLOAT16, FS_REAL, fs_kernels, fs_weight_type, fs_weights


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
    const fs_kernels *kernels, PanelLayout layout, object of_x, object of_h, cnp.ndarray bias, cnp.ndarray h_bias,
)
cdef PackedWeight pack_linear(object of_x, object of_h, cnp.ndarray bias)
cdef PackedWeight pack_rows(
    const fs_kernels *kernels, cnp.ndarray weight, Py_ssize_t first, Py_ssize_t last, Py_ssize_t rotate,
)


# The rows of a matrix that ids name: vectors of symbols. Read only; points into the arrays it was made of.
cdef struct RowTable:
    fs_weight_type type
    Py_ssize_t width
    Py_ssize_t item       # bytes of a number as it is stored, and
    Py_ssize_t real_item  # as `copy_row` writes it
    const char *data      # [rows][width]
    const float *scales   # [rows], of int8
    float factor          # of narrow types: what every number is multiplied by


cdef RowTable row_table(object weight) except *


cdef inline void copy_row(const RowTable *table, Py_ssize_t row, char *out) noexcept nogil:
    """Write a row as reals."""
    cdef const char *data = table.data + row * table.width * table.item
    cdef float *y = <float *> out
    cdef Py_ssize_t i
    cdef uint32_t bits
    cdef float value
    if table.type == FS_REAL:
        memcpy(out, data, table.width * table.item)
    elif table.type == FS_BFLOAT16:
        for i in range(table.width):
            bits = <uint32_t> (<const uint16_t *> data)[i] << 16
            memcpy(&value, &bits, sizeof(value))
            y[i] = value * table.factor
    else:
        for i in range(table.width):
            y[i] = <float> (<const int8_t *> data)[i] * table.scales[row] * table.factor
