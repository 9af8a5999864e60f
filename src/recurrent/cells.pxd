# One packed cell, and one step of it: what the layers and the decoders over recurrent layers have in common.

from runtime.kernels cimport FS_BLEND, FS_IDENTITY, fs_epilogue, fs_kernels, fs_step, fs_weights
from fastseq._parallel cimport TEAM_WORK, fs_barrier, team_wait

cdef enum Kind:
    RNN_CELL
    LSTM_CELL
    GRU_AFTER
    GRU_BEFORE


# The packed weights of one layer in one direction.
cdef struct CellWeights:
    const fs_kernels *kernels
    Kind kind
    fs_epilogue epilogue       # of the RNN
    Py_ssize_t input_size
    Py_ssize_t hidden_size
    Py_ssize_t output_size
    # All gates but for GRU_BEFORE, which has r and z here and n in `candidate`.
    fs_weights main
    int main_vectors
    fs_weights candidate
    fs_weights projection  # of no units where the LSTM has none


# What one thread does of a step of a cell.
cdef struct CellStep:
    fs_step main
    fs_step candidate      # GRU_BEFORE
    fs_step projection     # where the LSTM has one


cdef inline void take_share(fs_step *step, const fs_weights *weights, int share, int shares) noexcept nogil:
    """The panels of some weights that are one thread's."""
    step.weights = weights
    step.first = weights.panels * share // shares
    step.last = weights.panels * (share + 1) // shares


cdef enum:
    GATE_WORK = 32  # what a gate takes beside its sum, in multiply-adds


# Arrays of pointers with one entry a row; see fs_step. What a cell does not have is not looked at.
cdef struct CellPointers:
    const void **x
    const void **init
    const void **candidate_init
    const void **no_bias    # the bias of the projection
    const void **h
    const void **c_before
    void **c
    void **middle           # [hidden_size]: r * h, or the LSTM's output before its projection
    void **z                # [hidden_size]
    void **gates            # NULL: no tape
    void **out


cdef inline void set_init(const CellWeights *w, const CellPointers *at, Py_ssize_t row) noexcept nogil:
    """One row starts from the biases."""
    at.init[row] = w.main.bias
    if w.kind == GRU_BEFORE:
        at.candidate_init[row] = w.candidate.bias
    if w.projection.units:
        at.no_bias[row] = w.projection.bias


cdef inline void set_cell_step(
    CellStep *step, const CellWeights *w, const CellPointers *at, bint with_x, int share, int shares,
) noexcept nogil:
    """What one of some threads does of the panels; of how many rows, `do_cell` is told."""
    cdef fs_step *main = &step.main
    take_share(main, &w.main, share, shares)
    main.with_x = with_x
    main.epilogue = w.epilogue
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
    step.candidate = main[0]
    step.projection = main[0]
    if w.kind == GRU_BEFORE:
        main.out = at.middle
        take_share(&step.candidate, &w.candidate, share, shares)
        step.candidate.epilogue = FS_BLEND
        step.candidate.init = at.candidate_init
        step.candidate.h = <const void **> at.middle
    if w.projection.units:
        main.out = at.middle
        take_share(&step.projection, &w.projection, share, shares)
        step.projection.with_x = 0
        step.projection.epilogue = FS_IDENTITY
        step.projection.init = at.no_bias
        step.projection.h = <const void **> at.middle


ctypedef void (*cell_kernel)(const fs_step *step) noexcept nogil


cdef inline void last_panels_first(cell_kernel kernel, const fs_step *step, int vectors) noexcept nogil:
    """What a kernel does, but so many panels at once as it takes side by side for one row, the last of them first."""
    cdef fs_step some = step[0]
    cdef Py_ssize_t limit = 12 // vectors
    while some.last > step.first:
        some.first = max(step.first, some.last - limit)
        kernel(&some)
        some.last = some.first


cdef inline void do_panels(cell_kernel kernel, const fs_step *step, int vectors, bint backwards) noexcept nogil:
    if backwards:
        last_panels_first(kernel, step, vectors)
    else:
        kernel(step)


cdef inline void do_cell(
    CellStep *step, const CellWeights *w, Py_ssize_t rows, bint backwards, int team, fs_barrier *barrier,
) noexcept nogil:
    """One step of `rows` rows; where a team shares the panels, it meets after every product.

    Where every other step takes its panels backwards, it begins with those that the one before it left in the cache.
    """
    step.main.rows = step.candidate.rows = step.projection.rows = rows
    if w.kind == RNN_CELL:
        do_panels(w.kernels.plain, &step.main, 4, backwards)
    elif w.kind == LSTM_CELL:
        do_panels(w.kernels.lstm, &step.main, 4, backwards)
    elif w.kind == GRU_AFTER:
        do_panels(w.kernels.gru, &step.main, 3, backwards)
    else:
        do_panels(w.kernels.gru_gates, &step.main, 4, backwards)
        if team > 1:
            team_wait(barrier, team)
        do_panels(w.kernels.plain, &step.candidate, 4, backwards)
    if w.projection.units:
        if team > 1:
            team_wait(barrier, team)
        do_panels(w.kernels.plain, &step.projection, 4, backwards)
    if team > 1:
        team_wait(barrier, team)


cdef inline void input_parts(
    const CellStep *step, const CellWeights *w, Py_ssize_t rows, const void **x, const void **init, void **out,
) noexcept nogil:
    """The chains of some rows as far as their inputs go, of the panels of a step: those of `candidate` behind `main`.

    `init` is room for a pointer a row; `out` stays as it is.
    """
    cdef fs_step product = step.main
    cdef Py_ssize_t i, behind = init_bytes(w, &w.main, w.main_vectors)
    product.rows = rows
    product.with_x = 1
    product.x = x
    product.init = init
    product.out = out
    for i in range(rows):
        init[i] = w.main.bias
    w.kernels.panels_product(&product, w.main_vectors)
    if w.kind == GRU_BEFORE:
        for i in range(rows):
            init[i] = w.candidate.bias
            out[i] = <char *> out[i] + behind
        product.weights = step.candidate.weights
        product.first = step.candidate.first
        product.last = step.candidate.last
        w.kernels.panels_product(&product, 4)
        for i in range(rows):
            out[i] = <char *> out[i] - behind


cdef inline Py_ssize_t init_bytes(const CellWeights *w, const fs_weights *weights, int vectors) noexcept nogil:
    """Bytes of the pre-activations of one row."""
    return weights.panels * vectors * w.kernels.lanes * w.kernels.item_size


cdef inline Py_ssize_t inputs_bytes(const CellWeights *w) noexcept nogil:
    """Bytes of what `input_parts` makes of one row."""
    cdef Py_ssize_t n_bytes = init_bytes(w, &w.main, w.main_vectors)
    if w.kind == GRU_BEFORE:
        n_bytes += init_bytes(w, &w.candidate, 4)
    return n_bytes


cdef inline Py_ssize_t work_of_part(const CellWeights *w, const fs_weights *weights, int vectors) noexcept nogil:
    return weights.panels * vectors * w.kernels.lanes * (weights.x_size + weights.h_size + GATE_WORK)


cdef inline Py_ssize_t cell_work(const CellWeights *w) noexcept nogil:
    """Multiply-adds of one row in one step, those of padding included."""
    cdef Py_ssize_t work = work_of_part(w, &w.main, w.main_vectors)
    if w.kind == GRU_BEFORE:
        work += work_of_part(w, &w.candidate, 4)
    if w.projection.units:
        work += work_of_part(w, &w.projection, 4)
    return work


cdef enum:
    STEP_WORK = 32 * 1024   # below this many multiply-adds, a barrier costs more than another thread gives
    CACHE = 1024 * 1024     # bytes of weights that a core's own cache holds
    # What factors are cut to, so that a product of two stays within 64 bits; far beyond what any decision turns on.
    BOUND = 1 << 30


# How threads share steps of rows.
cdef struct Split:
    int threads
    bint panels  # not rows


cdef inline Py_ssize_t work_of(Py_ssize_t rows, Py_ssize_t work, Py_ssize_t time) noexcept nogil:
    """The work of `time` steps of some rows, or something as good as that."""
    return min(rows * work, BOUND) * min(time, BOUND)


cdef inline Split split_of(
    Py_ssize_t rows, Py_ssize_t step_work, Py_ssize_t all_work, Py_ssize_t meetings, Py_ssize_t panels, int tile,
    int item, int n_threads,
) noexcept nogil:
    """`step_work` is that of one row in one step, in which threads meet some times where they split panels."""
    cdef Split split
    cdef Py_ssize_t by_rows = min(n_threads, rows)
    cdef Py_ssize_t by_panels = min(n_threads, panels, rows * step_work // (STEP_WORK * meetings))
    # Panels where there are few rows to split, and where all weights would not stay in a core's cache.
    split.panels = (rows < 2 * tile * n_threads and by_panels >= by_rows) or step_work * item > CACHE
    split.threads = <int> max(1, min(by_panels if split.panels else by_rows, all_work // TEAM_WORK))
    if split.threads == 1:
        split.panels = True
    return split
