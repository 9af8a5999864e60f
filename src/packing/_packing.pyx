"""Packed weights: the one place that knows how the numbers of a weight matrix lie in memory for the kernels.

A `PackedWeight` holds the panels of one product: of a linear map, of the gates of a recurrent cell, of attention's
projections, of tied output weights, and of the transposed weights of a backward pass. kernels/kernels.h describes the
layout, kernels/microkernel.h reads it. It says which type its numbers have and how many bytes they take.
"""

cimport numpy as cnp
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc

from runtime.huge_pages cimport huge_zeros
from runtime.kernels cimport FS_BFLOAT16, FS_INT8, FS_REAL, fs_kernels, fs_weight_type, fs_weights
from fastseq._simd cimport kernels_for, narrow_kernels

import numpy as np

cnp.import_array()


cdef class PackedWeight:
    """The packed weights of one product. Immutable, except that the transposed weights are added on first use."""

    @property
    def type(self):
        """Type of the packed numbers: "float32", "float64", "bfloat16" or "int8"."""
        if self.panels.type == FS_REAL:
            return f"float{8 * self.kernels.item_size}"
        return "bfloat16" if self.panels.type == FS_BFLOAT16 else "int8"

    @property
    def nbytes(self):
        """Bytes of the panels and biases, without those of the transposed weights."""
        return self.n_bytes

    cdef PackedWeight transposed(self):
        """Return the weights of dx = dy W; pack them on first use.

        Threads that come here together may each pack them; every caller keeps what it was given.
        """
        cdef PackedWeight packed = self.gradient
        if packed is None:
            packed = pack_rows(self.kernels, self.weight, 0, cnp.PyArray_DIM(self.weight, 0), 0)
            self.gradient = packed
        return packed


cdef PackedWeight no_panels(const fs_kernels *kernels, Py_ssize_t units, int blocks):
    """A product of so many outputs whose weights are still to be packed."""
    cdef PackedWeight packed = PackedWeight.__new__(PackedWeight)
    cdef Py_ssize_t per_panel = blocks * kernels.lanes
    packed.kernels = kernels
    packed.buffers = []
    packed.panels.type = FS_REAL
    packed.panels.units = units
    packed.panels.panels = (units + per_panel - 1) // per_panel
    return packed


cdef char *room(PackedWeight packed, Py_ssize_t count):
    """Zeros for `count` packed numbers, on cache lines of their own."""
    cdef cnp.ndarray array = huge_zeros(count * packed.kernels.item_size)
    packed.buffers.append(array)
    packed.n_bytes += cnp.PyArray_NBYTES(array)
    return cnp.PyArray_BYTES(array)


cdef const void *packed_matrix(PackedWeight packed, PanelLayout layout, cnp.ndarray weight):
    """Panels of some gates of a weight matrix of shape (gates * units, k), C-contiguous."""
    cdef ptrdiff_t[4] gate_rows
    cdef const fs_kernels *kernels = packed.kernels
    cdef Py_ssize_t k = cnp.PyArray_DIM(weight, 1)
    cdef const void *source = cnp.PyArray_DATA(weight)
    cdef void *target = room(packed, packed.panels.panels * k * layout.count * layout.blocks * kernels.lanes)
    set_gate_rows(gate_rows, layout)
    with nogil:
        kernels.pack(source, gate_rows, layout.count, layout.blocks, layout.units, k, target)
    return target


cdef void set_gate_rows(ptrdiff_t *gate_rows, PanelLayout layout) noexcept:
    """Where the rows of each gate of a layout begin."""
    cdef int i
    for i in range(layout.count):
        gate_rows[i] = (layout.first + i) * layout.units


# Where the panels of one matrix are; scales and offsets of int8 alone.
cdef struct Panels:
    const void *data
    const void *scales
    const void *offsets


cdef Panels packed_panels(PackedWeight packed, PanelLayout layout, object weight) except *:
    """Panels of some gates of an ndarray or a `NarrowArray`."""
    cdef Panels panels
    cdef ptrdiff_t[4] gate_rows
    cdef cnp.ndarray values
    cdef fs_weight_type type
    cdef Py_ssize_t k, outputs
    cdef char *words
    cdef char *offsets = NULL
    cdef const void *source
    panels.scales = panels.offsets = NULL
    if isinstance(weight, np.ndarray):
        panels.data = packed_matrix(packed, layout, weight)
        return panels
    type = FS_BFLOAT16 if weight.type == "bfloat16" else FS_INT8
    values = np.ascontiguousarray(weight.values)
    k, source = cnp.PyArray_DIM(values, 1), cnp.PyArray_DATA(values)
    outputs = packed.panels.panels * layout.count * layout.blocks * packed.kernels.lanes
    packed.panels.type = type
    packed.panels.narrow = narrow_kernels()
    words = room(packed, packed.panels.narrow.words(type, k) * outputs)
    if type == FS_INT8:
        offsets = room(packed, outputs)
        panels.scales = packed_matrix(packed, layout, np.ascontiguousarray(weight.scales, np.float32).reshape(-1, 1))
    set_gate_rows(gate_rows, layout)
    with nogil:
        packed.panels.narrow.pack(
            type, source, gate_rows, layout.count, layout.blocks, layout.units, k, words, offsets,
        )
    panels.data, panels.offsets = words, offsets
    return panels


cdef PackedWeight pack_gates(
    const fs_kernels *kernels, PanelLayout layout, object of_x, object of_h, cnp.ndarray bias, cnp.ndarray h_bias,
):
    """Pack some gates of W_x x + W_h h + bias.

    Parameters
    ----------
    of_x, of_h : ndarrays of shapes (gates * units, I) and (gates * units, H), C-contiguous, or both `NarrowArray`
        `of_x` may be None.
    bias : ndarray of shape (gates * units,), or None for zeros
    h_bias : ndarray of shape (gates * units,), or None
        Where the input part and the state part of the last gate are summed apart: the bias of its state part.
    """
    cdef PackedWeight packed = no_panels(kernels, layout.units, layout.blocks)
    cdef fs_weights *panels = &packed.panels
    cdef PanelLayout last = layout
    cdef Panels made
    if of_x is not None:
        made = packed_panels(packed, layout, of_x)
        panels.x_size, panels.x = of_x.shape[1], made.data
        panels.x_scales, panels.x_offsets = made.scales, made.offsets
    made = packed_panels(packed, layout, of_h)
    panels.h_size, panels.h = of_h.shape[1], made.data
    panels.h_scales, panels.h_offsets = made.scales, made.offsets
    if bias is None:
        panels.bias = room(packed, panels.panels * layout.count * layout.blocks * kernels.lanes)
    else:
        panels.bias = packed_matrix(packed, layout, bias.reshape(-1, 1))
    if h_bias is not None:
        last.first, last.count = layout.first + layout.count - 1, 1
        panels.h_bias = packed_matrix(packed, last, h_bias.reshape(-1, 1))
    return packed


cdef PackedWeight pack_linear(object of_x, object of_h, cnp.ndarray bias):
    """Pack a linear map, W_h h + bias, or W_x x + W_h h + bias of inputs that lie in two places."""
    cdef PanelLayout layout
    layout.first, layout.count, layout.blocks, layout.units = 0, 1, PLAIN_BLOCKS, of_h.shape[0]
    cdef PackedWeight packed = pack_gates(kernels_for(of_h.itemsize), layout, of_x, of_h, bias, None)
    packed.weight = of_h if isinstance(of_h, np.ndarray) else None
    return packed


cdef PackedWeight pack_rows(
    const fs_kernels *kernels, cnp.ndarray weight, Py_ssize_t first, Py_ssize_t last, Py_ssize_t rotate,
):
    """Pack rows [first, last) of a matrix for a product over its rows, as a backward pass has it.

    `rotate` of these rows come last.
    """
    cdef Py_ssize_t columns = cnp.PyArray_DIM(weight, 1), k = last - first, i
    cdef PackedWeight packed = no_panels(kernels, columns, PLAIN_BLOCKS)
    cdef Py_ssize_t panels = packed.panels.panels, panel_row = PLAIN_BLOCKS * kernels.lanes
    cdef void *target = room(packed, panels * k * panel_row)
    cdef const void **rows = <const void **> PyMem_RawMalloc(k * sizeof(void *))
    if rows == NULL:
        raise MemoryError(f"{k} pointers")
    for i in range(k):
        rows[i] = cnp.PyArray_BYTES(weight) + (first + (i + rotate) % k) * cnp.PyArray_STRIDE(weight, 0)
    with nogil:
        kernels.pack_panels(rows, k, columns, 0, panels, target)
    PyMem_RawFree(rows)
    packed.panels.h_size = k
    packed.panels.h = target
    packed.panels.bias = room(packed, panels * panel_row)
    return packed


cdef RowTable row_table(object weight) except *:
    """Table of the rows of an ndarray or a `NarrowArray`, C-contiguous; the caller keeps it."""
    cdef RowTable table
    cdef cnp.ndarray values = weight if isinstance(weight, np.ndarray) else weight.values
    table.width = cnp.PyArray_DIM(values, 1)
    table.item = table.real_item = cnp.PyArray_ITEMSIZE(values)
    table.data = cnp.PyArray_BYTES(values)
    table.type, table.scales, table.factor = FS_REAL, NULL, 1
    if values is not weight:
        table.real_item = sizeof(float)
        table.type = FS_BFLOAT16 if weight.type == "bfloat16" else FS_INT8
        table.factor = weight.factor
        if table.type == FS_INT8:
            table.scales = <const float *> cnp.PyArray_DATA(weight.scales)
    return table
