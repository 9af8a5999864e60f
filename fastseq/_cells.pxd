# Declarations for the other compiled modules: one packed cell, and one step of it. See src/recurrent/_cells.pyx.

cimport numpy as cnp

from runtime.kernels cimport FS_VECTORS, fs_cell, fs_kernels, fs_step, fs_weights
from runtime.team cimport fs_barrier


# The packed weights of one layer in one direction.
cdef struct CellWeights:
    const fs_kernels *kernels
    const fs_cell *cell    # what the cell is: which gates, products and kernels
    Py_ssize_t input_size
    Py_ssize_t hidden_size
    Py_ssize_t output_size
    fs_weights main
    int main_vectors       # of a panel row
    fs_weights candidate   # of no units where the cell has no second product
    fs_weights projection  # of no units where the LSTM has none
    const void *vectors[FS_VECTORS + 1]  # of `rows` of the cell; see fs_step


# The weights of a cell as backward multiplies with them: gradients of pre-activations in, of what they saw out.
cdef struct TransposedWeights:
    fs_weights recurrent   # to h, of all gates except the candidate
    fs_weights candidate   # to r * h
    fs_weights projection  # to o * tanh(c)
    fs_weights input       # to x


cdef class TransposedCell:
    cdef TransposedWeights w
    cdef list packed       # keeps what the pointers above point into


cdef class Cell:
    cdef CellWeights w
    cdef int item
    cdef list packed       # keeps what the pointers above point into
    cdef cnp.ndarray weight_ih, weight_hh, weight_hr
    cdef list vectors      # keeps those of `w`
    cdef TransposedCell gradient  # or None until it is asked for

    cdef TransposedCell transposed(self)


# Arrays of pointers with one entry a row; see fs_step. What a cell does not have is not looked at.
cdef struct CellPointers:
    const void **x
    const void **init
    const void **candidate_init
    const void **no_bias    # the bias of the projection, and of the state part where the cell has `rows`
    const void **h
    const void **c_before
    void **c
    void **middle           # [hidden_size]: r * h, or the LSTM's output before its projection; or the state part
    void **z                # [hidden_size]; of a cell with `rows`, as `middle`, [gates][hidden_size]
    void **gates            # NULL: no tape
    void **out
    # Of narrow weights: room for the narrow rows that one thread makes, see narrow_x_bytes and narrow_h_bytes.
    char *narrow_x
    char *narrow_h


# What one thread does of a step of a cell.
cdef struct CellStep:
    fs_step main
    fs_step candidate
    fs_step projection
    fs_step rows
    int share    # this thread's, of as many as the team has


# How threads share steps of rows.
cdef struct Split:
    int threads
    bint panels  # not rows


cdef void set_cell_step(
    CellStep *step, const CellWeights *w, const CellPointers *at, bint with_x, int share, int shares,
) noexcept nogil
cdef void do_cell(
    CellStep *step, const CellWeights *w, Py_ssize_t rows, bint backwards, int team, fs_barrier *barrier,
) noexcept nogil
cdef void input_parts(
    const CellStep *step, const CellWeights *w, Py_ssize_t rows, const void **x, const void **init, void **out,
) noexcept nogil
cdef Py_ssize_t narrow_x_bytes(const CellWeights *w, Py_ssize_t rows) noexcept nogil
cdef Py_ssize_t narrow_h_bytes(const CellWeights *w, Py_ssize_t rows) noexcept nogil
cdef Py_ssize_t inputs_bytes(const CellWeights *w) noexcept nogil
cdef Py_ssize_t cell_work(const CellWeights *w) noexcept nogil
cdef Py_ssize_t work_of(Py_ssize_t rows, Py_ssize_t work, Py_ssize_t time) noexcept nogil
cdef Split split_of(
    Py_ssize_t rows, Py_ssize_t step_work, Py_ssize_t all_work, Py_ssize_t meetings, Py_ssize_t panels, int tile,
    int item, int n_threads,
) noexcept nogil


cdef inline void take_share(fs_step *step, const fs_weights *weights, int share, int shares) noexcept nogil:
    """Give a step those panels of some weights that are one thread's."""
    step.weights = weights
    step.first = weights.panels * share // shares
    step.last = weights.panels * (share + 1) // shares


cdef inline void set_init(const CellWeights *w, const CellPointers *at, Py_ssize_t row) noexcept nogil:
    """Start the sums of one row from the biases."""
    at.init[row] = w.main.bias
    if w.candidate.units:
        at.candidate_init[row] = w.candidate.bias
    if w.projection.units:
        at.no_bias[row] = w.projection.bias
    elif w.cell.rows != NULL:
        at.no_bias[row] = w.main.bias


cdef inline Py_ssize_t init_bytes(const CellWeights *w, const fs_weights *weights, int vectors) noexcept nogil:
    """Bytes of the pre-activations of one row."""
    return weights.panels * vectors * w.kernels.lanes * w.kernels.item_size
