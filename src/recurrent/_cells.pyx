"""One packed cell, and one step of it: what the recurrent layers and the decoders over them have in common.

Which cells there are, and what is particular to each, is in src/kernels/cells/.
"""

cimport numpy as cnp

from runtime.costs cimport CORE_CACHE, GATE_WORK, STEP_WORK, TEAM_WORK
from runtime.kernels cimport (
    FS_IDENTITY, fs_cell, fs_kernels, fs_narrow_bytes, fs_narrow_inputs, fs_step, fs_weights,
)
from runtime.team cimport fs_barrier
from fastseq._packing cimport PLAIN_BLOCKS, PackedWeight, PanelLayout, pack_gates, pack_linear, pack_rows
from fastseq._parallel cimport team_wait
from fastseq._simd cimport kernels_for

import numpy as np

cnp.import_array()

cdef enum:
    # What factors are cut to, so that a product of two stays within 64 bits; far beyond what any decision turns on.
    BOUND = 1 << 30


cdef class TransposedCell:
    """The weights of a `Cell` packed for `backward`. Immutable."""


cdef class Cell:
    """The packed weights of one layer in one direction. Immutable, except that `backward` adds its own packing."""

    @property
    def nbytes(self):
        """Bytes of the packed weights, without those of `backward`."""
        return sum([part.nbytes for part in self.packed])

    cdef TransposedCell transposed(self):
        """Return the weights for `backward`; pack them on first use.

        Threads that come here together may each pack them; every caller keeps what it was given.
        """
        cdef TransposedCell made = self.gradient
        cdef const fs_cell *cell = self.w.cell
        cdef const fs_kernels *kernels = self.w.kernels
        cdef Py_ssize_t units = self.w.hidden_size, rows = cell.gates * units
        cdef Py_ssize_t of_h = rows - cell.candidate_gates * units, apart = cell.apart_gates * units
        if made is not None:
            return made
        made = TransposedCell.__new__(TransposedCell)
        made.packed = []
        made.w.input = kept(made.packed, pack_rows(kernels, self.weight_ih, 0, rows, 0))
        # The gradients of the state parts that are summed apart come first: see fs_cell.
        made.w.recurrent = kept(made.packed, pack_rows(kernels, self.weight_hh, 0, of_h, of_h - apart))
        if cell.candidate_gates:
            made.w.candidate = kept(made.packed, pack_rows(kernels, self.weight_hh, of_h, rows, 0))
        if self.weight_hr is not None:
            made.w.projection = kept(made.packed, pack_rows(kernels, self.weight_hr, 0, self.w.output_size, 0))
        self.gradient = made
        return made


cdef fs_weights kept(list packed, PackedWeight part) noexcept:
    """The panels of some weights, which a list keeps."""
    packed.append(part)
    return part.panels


cdef const fs_cell *cell_named(const fs_kernels *kernels, str kind) except NULL:
    cdef int i = 0
    while kernels.cells[i] != NULL:
        if kernels.cells[i].name == kind.encode():
            return kernels.cells[i]
        i += 1
    raise KeyError(kind)


cdef void pack_whole_rows(Cell packed, weight_ih, weight_hh, bias, tuple vectors):
    """Pack a cell whose equations need whole rows: both products in the order of the gates, without a bias."""
    cdef CellWeights *w = &packed.w
    cdef PanelLayout layout
    cdef int i
    layout.first, layout.count, layout.blocks = 0, 1, PLAIN_BLOCKS
    layout.units = w.cell.gates * w.hidden_size
    w.main_vectors = PLAIN_BLOCKS
    w.main = kept(packed.packed, pack_gates(w.kernels, layout, weight_ih, weight_hh, None, None))
    packed.vectors = [bias, *vectors]
    for i, vector in enumerate(packed.vectors):
        if vector is not None:
            w.vectors[i] = cnp.PyArray_DATA(<cnp.ndarray> vector)


def pack(str kind, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, *vectors):
    """Pack the weights of one layer in one direction; returns a `Cell`. See `fastseq.reference._recurrent.pack`."""
    cdef Cell packed = Cell.__new__(Cell)
    cdef CellWeights *w = &packed.w
    cdef const fs_kernels *kernels = kernels_for(weight_ih.itemsize)
    cdef const fs_cell *cell = cell_named(kernels, kind)
    cdef PanelLayout layout
    w.kernels, w.cell = kernels, cell
    w.input_size = weight_ih.shape[1]
    w.hidden_size = weight_ih.shape[0] // cell.gates
    w.output_size = weight_hh.shape[1]
    packed.item = kernels.item_size
    if isinstance(weight_ih, np.ndarray):
        packed.weight_ih, packed.weight_hh, packed.weight_hr = weight_ih, weight_hh, weight_hr
    packed.packed = []
    if bias_ih is None:
        bias_ih = bias_hh = np.zeros(weight_ih.shape[0], weight_ih.dtype)
    with np.errstate(all="ignore"):  # inf and NaN are the user's
        bias = bias_ih + bias_hh
    if cell.rows != NULL:
        pack_whole_rows(packed, weight_ih, weight_hh, bias, vectors)
        return packed
    if cell.apart_gates:
        apart = (cell.gates - cell.apart_gates) * w.hidden_size
        bias[apart:] = bias_ih[apart:]
    layout.first, layout.count, layout.blocks = 0, cell.gates - cell.candidate_gates, cell.blocks
    layout.units = w.hidden_size
    w.main_vectors = layout.count * layout.blocks
    h_bias = bias_hh if cell.apart_gates else None
    w.main = kept(packed.packed, pack_gates(kernels, layout, weight_ih, weight_hh, bias, h_bias))
    if cell.candidate_gates:
        layout.first, layout.count, layout.blocks = layout.count, cell.candidate_gates, PLAIN_BLOCKS
        w.candidate = kept(packed.packed, pack_gates(kernels, layout, weight_ih, weight_hh, bias, None))
    if weight_hr is not None:
        w.projection = kept(packed.packed, pack_linear(None, weight_hr, None))
    return packed


cdef void set_cell_step(
    CellStep *step, const CellWeights *w, const CellPointers *at, bint with_x, int share, int shares,
) noexcept nogil:
    """Set what one of some threads does of the panels; `do_cell` receives the number of rows.

    Of a cell with `rows`, `with_x` is not looked at: its input parts were computed by `input_parts`.
    """
    cdef fs_step *main = &step.main
    take_share(main, &w.main, share, shares)
    main.with_x = with_x
    main.epilogue = w.cell.epilogue
    main.init = at.init
    main.x = at.x
    main.h = at.h
    main.carry = at.h
    main.c_before = at.c_before
    main.c = at.c
    main.gates = at.gates
    main.back = NULL
    main.z = at.z
    main.out = at.out
    main.narrow_x = at.narrow_x
    main.narrow_h = at.narrow_h
    step.candidate = main[0]
    step.projection = main[0]
    if w.candidate.units:
        main.out = at.middle
        take_share(&step.candidate, &w.candidate, share, shares)
        step.candidate.epilogue = w.cell.candidate_epilogue
        step.candidate.init = at.candidate_init
        step.candidate.h = <const void **> at.middle
    if w.projection.units:
        main.out = at.middle
        take_share(&step.projection, &w.projection, share, shares)
        step.projection.with_x = 0
        step.projection.epilogue = FS_IDENTITY
        step.projection.init = at.no_bias
        step.projection.h = <const void **> at.middle
    if w.cell.rows != NULL:
        step.rows = main[0]
        step.rows.state_part = at.middle
        step.rows.vectors = <const void **> w.vectors
        step.share = share
        main.with_x = 0  # `init` of `rows` has it
        main.init = at.no_bias
        main.out = at.middle


ctypedef void (*cell_kernel)(const fs_step *step) noexcept nogil


cdef void do_panels(cell_kernel kernel, const fs_step *step, int vectors, bint backwards) noexcept nogil:
    """Run a kernel over the panels of a step.

    Backwards, it takes the last panels first, as many at once as a kernel takes side by side for one row.
    """
    cdef fs_step some = step[0]
    cdef Py_ssize_t limit = 12 // vectors
    if not backwards:
        kernel(step)
        return
    while some.last > step.first:
        some.first = max(step.first, some.last - limit)
        kernel(&some)
        some.last = some.first


cdef void do_cell(
    CellStep *step, const CellWeights *w, Py_ssize_t rows, bint backwards, int team, fs_barrier *barrier,
) noexcept nogil:
    """Compute one step of `rows` rows; where a team shares the panels, it meets after every product.

    Where every other step takes its panels backwards, it begins with those that the one before it left in the cache.
    """
    step.main.rows = step.candidate.rows = step.projection.rows = rows
    fs_narrow_inputs(&step.main)
    do_panels(w.cell.main, &step.main, w.main_vectors, backwards)
    if w.candidate.units:
        if team > 1:
            team_wait(barrier, team)
        fs_narrow_inputs(&step.candidate)
        do_panels(w.kernels.plain, &step.candidate, PLAIN_BLOCKS, backwards)
    if w.projection.units:
        if team > 1:
            team_wait(barrier, team)
        fs_narrow_inputs(&step.projection)
        do_panels(w.kernels.plain, &step.projection, PLAIN_BLOCKS, backwards)
    if w.cell.rows != NULL:
        if team > 1:
            team_wait(barrier, team)
        w.cell.rows(&step.rows, rows * step.share // team, rows * (step.share + 1) // team)
    if team > 1:
        team_wait(barrier, team)


cdef void input_parts(
    const CellStep *step, const CellWeights *w, Py_ssize_t rows, const void **x, const void **init, void **out,
) noexcept nogil:
    """Compute the input parts of some rows, of the panels of a step: those of `candidate` behind `main`.

    `init` is room for a pointer a row; `out` stays as it is. Of narrow weights, `narrow_x` has room for them.
    """
    cdef fs_step product = step.main
    cdef Py_ssize_t i, behind = init_bytes(w, &w.main, w.main_vectors)
    product.rows = rows
    product.with_x = 1
    product.narrow_h = NULL
    product.x = x
    product.init = init
    product.out = out
    for i in range(rows):
        init[i] = w.main.bias
    fs_narrow_inputs(&product)
    w.kernels.panels_product(&product, w.main_vectors)
    if w.candidate.units:
        for i in range(rows):
            init[i] = w.candidate.bias
            out[i] = <char *> out[i] + behind
        product.weights = step.candidate.weights
        product.first = step.candidate.first
        product.last = step.candidate.last
        w.kernels.panels_product(&product, PLAIN_BLOCKS)
        for i in range(rows):
            out[i] = <char *> out[i] - behind


cdef Py_ssize_t inputs_bytes(const CellWeights *w) noexcept nogil:
    """Bytes of what `input_parts` computes of one row."""
    return init_bytes(w, &w.main, w.main_vectors) + init_bytes(w, &w.candidate, PLAIN_BLOCKS)


cdef Py_ssize_t narrow_x_bytes(const CellWeights *w, Py_ssize_t rows) noexcept nogil:
    """Room that some rows take as narrow inputs, where weights are narrow."""
    return fs_narrow_bytes(&w.main, True, rows)


cdef Py_ssize_t narrow_h_bytes(const CellWeights *w, Py_ssize_t rows) noexcept nogil:
    """Room that some rows take as narrow states, or as what the second product of a cell multiplies."""
    return max(
        fs_narrow_bytes(&w.main, False, rows), fs_narrow_bytes(&w.candidate, False, rows),
        fs_narrow_bytes(&w.projection, False, rows),
    )


cdef Py_ssize_t work_of_part(const CellWeights *w, const fs_weights *weights, int vectors) noexcept nogil:
    return weights.panels * vectors * w.kernels.lanes * (weights.x_size + weights.h_size + GATE_WORK)


cdef Py_ssize_t cell_work(const CellWeights *w) noexcept nogil:
    """Multiply-adds of one row in one step, those of padding included."""
    return (
        work_of_part(w, &w.main, w.main_vectors) + work_of_part(w, &w.candidate, PLAIN_BLOCKS)
        + work_of_part(w, &w.projection, PLAIN_BLOCKS)
    )


cdef Py_ssize_t work_of(Py_ssize_t rows, Py_ssize_t work, Py_ssize_t time) noexcept nogil:
    """The work of `time` steps of some rows, bounded so that it does not overflow."""
    return min(rows * work, BOUND) * min(time, BOUND)


cdef Split split_of(
    Py_ssize_t rows, Py_ssize_t step_work, Py_ssize_t all_work, Py_ssize_t meetings, Py_ssize_t panels, int tile,
    int item, int n_threads,
) noexcept nogil:
    """Choose how threads share the work.

    `step_work` is that of one row in one step, in which threads meet `meetings` times where they split panels.
    """
    cdef Split split
    cdef Py_ssize_t by_rows = min(n_threads, rows)
    cdef Py_ssize_t by_panels = min(n_threads, panels, rows * step_work // (STEP_WORK * meetings))
    # Panels where there are few rows to split, and where all weights would not stay in a core's cache.
    split.panels = (rows < 2 * tile * n_threads and by_panels >= by_rows) or step_work * item > CORE_CACHE
    split.threads = <int> max(1, min(by_panels if split.panels else by_rows, all_work // TEAM_WORK))
    if split.threads == 1:
        split.panels = True
    return split
