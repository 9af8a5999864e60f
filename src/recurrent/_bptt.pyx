"""Backpropagation through time, and the gates that a tape has.

`backward` and `gates` are operations that `_recurrent` offers beside its own; `fastseq.reference._recurrent` has the
same in NumPy. A direction of a layer is undone in chunks of time, from its last step to its first. For each chunk the
threads

1. take its steps backward: what comes back through the recurrent weights meets the gradient of the output, and the
   fused kernel turns their sum into the gradients of the pre-activations. Rows or panels are split as in the forward;
2. multiply those with the weights of the input, which gives dx;
3. add their product with the inputs and the states to the weight gradients: one product over batch and time, summed
   in one order (last step first, longest row first), whatever the chunks and the threads.

A chunk has about GRADIENT_ROWS rows of gradients: few enough that what 1 has written is still in a cache for 2 and 3.
What is particular to a cell is in its descriptor, fs_cell in kernels/kernels.h.
"""

cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from libc.string cimport memcpy, memset

from recurrent.arrays cimport padded_bytes, sequence, slot_of, state_copy
from runtime.costs cimport GATE_WORK, SIGNAL_WORK_LANE
from runtime.kernels cimport (
    FS_ADD, FS_BACK_IDENTITY, FS_IDENTITY, FS_VECTORS, fs_back, fs_cell, fs_kernels, fs_step, fs_weights,
)
from runtime.scratch cimport Scratch, scratch_array, scratch_close, scratch_open
from runtime.team cimport fs_barrier, fs_flush_denormals, fs_restore_denormals
from fastseq._cells cimport Cell, Split, TransposedCell, TransposedWeights, split_of, take_share, work_of
from fastseq._parallel cimport run_team, team_wait
from fastseq._weight_gradient cimport (
    GRADIENT_ROWS, Factor, WeightGradient, add_row, lay_out_factors, lay_out_sums, set_factor, set_product,
    sum_weight_gradients, take_sums,
)

import numpy as np

cnp.import_array()

cdef enum:
    # The most rows of the batch processed at once. No number of threads may change it: the order of sums depends on it.
    BACK_BLOCK = 1024
    STEP_POINTERS = 16  # arrays of pointers a thread keeps while it runs, one entry a row


cdef class Rows:
    """The rows of a batch, longest first: their lengths and resets, and the arrays that hold them."""


cdef class Tape:
    """What `backward` needs of one layer's `forward`."""


def gates(Tape tape not None):
    """Every gate, h and c at every step; see `fastseq.reference._recurrent.gates`."""
    cdef Cell cell = tape.cells[0]
    cdef int gate
    batch, time = tape.x.shape[:2]
    units = cell.w.hidden_size
    named = {}
    for gate, name in enumerate(cell.w.cell.gate_names.decode()):
        named[name] = np.stack([part[:, :, gate * units:(gate + 1) * units] for part in tape.gates], axis=2)
    if tape.c is not None:
        named["c"] = np.stack(tape.c_steps, axis=2)
    named["h"] = tape.y.reshape(batch, time, len(tape.cells), cell.w.output_size)
    return named


cdef struct Undo:
    const fs_kernels *kernels
    const fs_cell *cell
    const TransposedWeights *weights
    Py_ssize_t item
    Py_ssize_t cell_units        # hidden_size
    Py_ssize_t gradient_columns  # of a row of gradients; see fs_cell
    Py_ssize_t summed_first      # those that are summed over rows begin there
    const void **vectors         # of `back_rows` of the cell; see fs_step
    Py_ssize_t h_columns         # those for h: the first
    Py_ssize_t x_first           # those for x begin there
    # Arrays by row and time, strides in bytes, the last axis contiguous.
    const char *x
    Py_ssize_t x_row
    Py_ssize_t x_time
    char *dx
    Py_ssize_t dx_row
    Py_ssize_t dx_time
    bint add_dx              # the other direction's is there already
    const char *y
    Py_ssize_t y_row
    Py_ssize_t y_time
    const char *dy
    Py_ssize_t dy_row
    Py_ssize_t dy_time
    const char *gates
    Py_ssize_t gates_row
    Py_ssize_t gates_time
    const char *c_steps
    Py_ssize_t c_steps_row
    Py_ssize_t c_steps_time
    char *dh_total           # gradients of the states at every step, or NULL
    Py_ssize_t dh_total_row
    Py_ssize_t dh_total_time
    char *dc_total
    Py_ssize_t dc_total_row
    Py_ssize_t dc_total_time
    const char *resets
    Py_ssize_t resets_row
    const char *h            # where each row started
    Py_ssize_t h_row
    const char *c
    Py_ssize_t c_row
    char *dh                 # IN gradient of the final state, OUT of the initial one
    Py_ssize_t dh_row
    char *dc
    Py_ssize_t dc_row
    Py_ssize_t rows
    Py_ssize_t time
    Py_ssize_t truncate      # steps from one cut to the next; 0: none
    bint reverse
    const Py_ssize_t *order
    const Py_ssize_t *steps
    # The plan.
    int threads
    bint split_panels
    # The block of rows and the chunk of time under way.
    Py_ssize_t base
    Py_ssize_t block
    Py_ssize_t from_step
    Py_ssize_t to_step
    Py_ssize_t n             # rows of gradients in the chunk
    # Scratch.
    char *pointers
    Py_ssize_t pointers_each
    Py_ssize_t row_block
    Py_ssize_t chunk_rows
    const char *zeros
    char *gradients          # [chunk row]: last step first, longest row first
    Py_ssize_t gradient_row
    char *later              # gradients of the step after the chunk, by place in the block
    char *middle             # [chunk row][hidden_size]: r * h or o * tanh(c)
    Py_ssize_t middle_row
    char *outputs            # [chunk row][output_size]: gradient of the projected output
    Py_ssize_t output_row
    char *carry              # [place][output_size]: what reaches h beside the product
    char *bias               # [gradient_columns]: sums so far
    Py_ssize_t zero_bytes    # of the scratch, from its beginning on, have to start as zeros
    WeightGradient gradient              # step 3
    const void **g_rows      # of the chunk: gradients
    const void **h_rows      # the state each step started from
    const void **x_rows
    void **dx_rows
    const void **middle_rows
    const void **output_rows
    const void **no_init     # as many pointers to zeros as any step has rows


cdef inline Py_ssize_t steps_of(const Undo *job, Py_ssize_t place) noexcept nogil:
    return job.time if job.steps == NULL else job.steps[place]


cdef inline Py_ssize_t time_of(const Undo *job, Py_ssize_t place, Py_ssize_t step) noexcept nogil:
    """Where in its arrays the row at a place has one of its steps."""
    return steps_of(job, place) - 1 - step if job.reverse else step


cdef inline bint resets_at(const Undo *job, Py_ssize_t place, Py_ssize_t step) noexcept nogil:
    """Whether the state of the row at a place went back to zero before a step."""
    cdef Py_ssize_t row
    if job.resets == NULL:
        return False
    row = place if job.order == NULL else job.order[place]
    return job.resets[row * job.resets_row + time_of(job, place, step)] != 0


cdef inline Py_ssize_t running(const Undo *job, Py_ssize_t step, Py_ssize_t limit) noexcept nogil:
    """How many of the first `limit` rows of the block run at a step."""
    if job.steps != NULL:
        while limit > 0 and job.steps[job.base + limit - 1] <= step:
            limit -= 1
    return limit


cdef const char *state_before(
    const Undo *job, Py_ssize_t place, Py_ssize_t step, const char *states, Py_ssize_t row_stride,
    Py_ssize_t time_stride, const char *start, Py_ssize_t start_row,
) noexcept nogil:
    """The state that the row at a place had before a step."""
    cdef Py_ssize_t row = place if job.order == NULL else job.order[place]
    if resets_at(job, place, step):
        return job.zeros
    if step == 0:
        return start + row * start_row
    return states + row * row_stride + time_of(job, place, step - 1) * time_stride


cdef void list_chunk(Undo *job) noexcept nogil:
    """Write down the rows of the chunk: where their gradients, inputs and states are."""
    cdef Py_ssize_t n = 0, i, row, t, place, step = job.to_step, rows = job.block
    while step > job.from_step:
        step -= 1
        for i in range(running(job, step, rows)):
            place = job.base + i
            row = place if job.order == NULL else job.order[place]
            t = time_of(job, place, step)
            job.g_rows[n] = job.gradients + n * job.gradient_row
            job.x_rows[n] = job.x + row * job.x_row + t * job.x_time
            job.dx_rows[n] = job.dx + row * job.dx_row + t * job.dx_time
            job.h_rows[n] = state_before(job, place, step, job.y, job.y_row, job.y_time, job.h, job.h_row)
            job.middle_rows[n] = job.middle + n * job.middle_row
            job.output_rows[n] = job.outputs + n * job.output_row
            n += 1
    job.n = n


cdef inline void share_panels(
    fs_step *step, const fs_weights *weights, const Undo *job, int thread, int team,
) noexcept nogil:
    if job.split_panels:
        take_share(step, weights, thread, team)
    else:
        take_share(step, weights, 0, 1)


cdef void leave_out(fs_step *step, fs_back *back, Py_ssize_t rows) noexcept nogil:
    """Go past the first rows of a step."""
    step.rows -= rows
    step.init += rows
    step.h += rows
    step.out += rows
    back.gates += rows
    back.h += rows
    back.h_before += rows
    back.c += rows
    back.c_before += rows
    back.dc += rows
    back.dc_before += rows
    back.carry += rows
    if back.dy != NULL:
        back.dy += rows
    if back.middle != NULL:
        back.middle += rows
    if back.dh_total != NULL:
        back.dh_total += rows
    if back.dc_total != NULL:
        back.dc_total += rows


cdef void step_back(
    const Undo *job, const fs_step *step, const fs_back *back, const fs_weights *product, const fs_weights *nothing,
    Py_ssize_t crossing,
) noexcept nogil:
    """A backward step: the first `crossing` rows with the recurrent product, the others without."""
    cdef fs_back rest_back = back[0]
    cdef fs_step rest = step[0]
    rest.weights = product
    rest.rows = crossing
    rest.back = &rest_back
    if crossing:
        job.kernels.plain(&rest)
    rest.weights = nothing
    rest.rows = step.rows
    if crossing < step.rows:
        leave_out(&rest, &rest_back, crossing)
        job.kernels.plain(&rest)


# Arrays of pointers of one thread, one entry for each of its rows that runs at a step; see fs_step and fs_back.
cdef struct BackPointers:
    const void **init
    const void **later       # gradients of the step after this one
    const void **dy
    const void **gates
    const void **h
    const void **h_before
    const void **c
    const void **c_before
    const void **dc
    void **dc_before
    void **carry
    void **out
    void **middle
    void **output
    void **dh_total
    void **dc_total


# What one thread does of each step.
cdef struct BackStep:
    fs_step main
    fs_back main_back
    fs_step second           # through the candidate or the projection, where the cell has one
    fs_back second_back
    fs_weights nothing       # recurrent weights of no length
    bint has_second
    bint has_rows            # `second` is no product, but `back_rows` of the cell


cdef BackPointers pointers_of(const Undo *job, int thread) noexcept nogil:
    """Divide the room for pointers that one thread has."""
    cdef BackPointers at
    cdef Py_ssize_t n = job.row_block
    at.init = <const void **> (job.pointers + thread * job.pointers_each)
    at.later = at.init + n
    at.dy = at.later + n
    at.gates = at.dy + n
    at.h = at.gates + n
    at.h_before = at.h + n
    at.c = at.h_before + n
    at.c_before = at.c + n
    at.dc = at.c_before + n
    at.dc_before = <void **> (at.dc + n)
    at.carry = at.dc_before + n
    at.out = at.carry + n
    at.middle = at.out + n
    at.output = at.middle + n
    at.dh_total = at.output + n
    at.dc_total = at.dh_total + n
    return at


cdef void set_back_step(
    BackStep *step, const Undo *job, const BackPointers *at, int thread, int team,
) noexcept nogil:
    """Set all of a step that stays the same from one to the next."""
    cdef const TransposedWeights *weights = job.weights
    cdef fs_back *back = &step.main_back
    memset(step, 0, sizeof(BackStep))
    step.nothing = weights.recurrent
    step.nothing.h_size = 0
    share_panels(&step.main, &weights.recurrent, job, thread, team)
    step.main.epilogue = job.cell.back
    step.main.init = at.init
    step.main.h = at.later
    step.main.out = at.out
    step.main.back = back
    back.dy = at.dy
    back.gates = at.gates
    back.h = at.h
    back.h_before = at.h_before
    back.c = at.c
    back.c_before = at.c_before
    back.dc = at.dc
    back.dc_before = at.dc_before
    back.carry = at.carry
    back.dy_next = job.dy_time if job.reverse else -job.dy_time
    back.gates_next = job.gates_time if job.reverse else -job.gates_time
    back.h_next = job.y_time if job.reverse else -job.y_time
    back.c_next = job.c_steps_time if job.reverse else -job.c_steps_time
    back.dh_total = at.dh_total if job.dh_total != NULL else NULL
    step.second = step.main
    step.second_back = back[0]
    step.second.back = &step.second_back
    step.second.init = <const void **> job.no_init
    step.second_back.dy = NULL
    step.second_back.dh_total = NULL
    if weights.projection.units:
        # The gradient of the projected output first, then through the projection to the cell.
        step.has_second = True
        step.main.epilogue = FS_BACK_IDENTITY
        step.main.out = at.output
        share_panels(&step.second, &weights.projection, job, thread, team)
        step.second.h = <const void **> at.output
        step.second_back.middle = at.middle
        step.second_back.dc_total = at.dc_total if job.dc_total != NULL else NULL
    elif weights.candidate.units:
        # The gradients of z and n first, then through n to r.
        step.has_second = True
        share_panels(&step.second, &weights.candidate, job, thread, team)
        step.second.epilogue = job.cell.back_candidate
        step.second.h = <const void **> at.middle  # in this one step: the gradients of n
        step.second_back.middle = <void **> at.output
    elif job.cell.rows != NULL:
        # The gradient of the output first, then through the cell, whole rows.
        step.has_rows = True
        step.main.out = at.output
        step.second.h = <const void **> at.output
        step.second.vectors = job.vectors
        step.second_back.dc_total = at.dc_total if job.dc_total != NULL else NULL
    else:
        back.dc_total = at.dc_total if job.dc_total != NULL else NULL


cdef Py_ssize_t list_step(
    const Undo *job, const BackPointers *at, Py_ssize_t step, Py_ssize_t n, Py_ssize_t lane, Py_ssize_t stride,
    Py_ssize_t first, Py_ssize_t first_later,
) noexcept nogil:
    """Write down where the `n` rows of one thread have what a step reads and writes.

    Rows into which a gradient comes from the step after this one stand in front, the others behind them; returns how
    many those in front are. `first` and `first_later` are the rows of the chunk where the gradients of this step and of
    the one after it begin; the latter is -1 where they are in `later`.
    """
    cdef bint cut = job.truncate != 0 and (step + 1) % job.truncate == 0, crosses, joins
    cdef Py_ssize_t crossing = 0, last = n, i, k, place_in_block, place, row, t
    for k in range(n):
        place_in_block = lane + k * stride
        place = job.base + place_in_block
        row = place if job.order == NULL else job.order[place]
        t = time_of(job, place, step)
        joins = step + 1 == steps_of(job, place)
        crosses = not joins and not cut and not resets_at(job, place, step + 1)
        if crosses:
            i = crossing
            crossing += 1
        else:
            last -= 1
            i = last
        if first_later < 0:
            at.later[i] = job.later + place_in_block * job.gradient_row
        else:
            at.later[i] = job.gradients + (first_later + place_in_block) * job.gradient_row
        at.out[i] = job.gradients + (first + place_in_block) * job.gradient_row
        at.carry[i] = job.carry + place_in_block * job.output_row
        at.init[i] = <const void *> at.carry[i] if joins or (job.cell.carries and crosses) else job.zeros
        at.dy[i] = job.dy + row * job.dy_row + t * job.dy_time
        at.h[i] = job.y + row * job.y_row + t * job.y_time
        at.h_before[i] = job.h_rows[first + place_in_block]
        if job.gates != NULL:
            at.gates[i] = job.gates + row * job.gates_row + t * job.gates_time
        if job.cell.has_c:
            at.c[i] = job.c_steps + row * job.c_steps_row + t * job.c_steps_time
            at.c_before[i] = state_before(
                job, place, step, job.c_steps, job.c_steps_row, job.c_steps_time, job.c, job.c_row
            )
            at.dc_before[i] = job.dc + row * job.dc_row
            at.dc[i] = <const void *> at.dc_before[i] if joins or crosses else job.zeros
        if job.weights.projection.units:
            at.middle[i] = job.middle + (first + place_in_block) * job.middle_row
            at.output[i] = job.outputs + (first + place_in_block) * job.output_row
        elif job.weights.candidate.units:
            at.middle[i] = <char *> at.out[i] + job.h_columns * job.item
            at.output[i] = job.middle + (first + place_in_block) * job.middle_row
        elif job.cell.rows != NULL:
            at.output[i] = job.outputs + (first + place_in_block) * job.output_row
        if job.dh_total != NULL:
            at.dh_total[i] = job.dh_total + row * job.dh_total_row + t * job.dh_total_time
        if job.dc_total != NULL:
            at.dc_total[i] = job.dc_total + row * job.dc_total_row + t * job.dc_total_time
    return crossing


cdef void reach_start(
    const Undo *job, BackStep *step, const BackPointers *at, int thread, Py_ssize_t n, Py_ssize_t lane,
    Py_ssize_t stride, Py_ssize_t first,
) noexcept nogil:
    """Give the initial states their gradients: what comes back from the first step, at `first` in the chunk."""
    cdef Py_ssize_t crossing = 0, k, place_in_block, place, row
    for k in range(n):
        place_in_block = lane + k * stride
        place = job.base + place_in_block
        row = place if job.order == NULL else job.order[place]
        if resets_at(job, place, 0):
            if thread == 0 or not job.split_panels:
                memset(job.dh + row * job.dh_row, 0, job.weights.recurrent.units * job.item)
                if job.dc != NULL:
                    memset(job.dc + row * job.dc_row, 0, job.cell_units * job.item)
            continue
        at.later[crossing] = job.gradients + (first + place_in_block) * job.gradient_row
        at.init[crossing] = (
            <const void *> (job.carry + place_in_block * job.output_row) if job.cell.carries else job.zeros
        )
        at.out[crossing] = job.dh + row * job.dh_row
        crossing += 1
    step.main.epilogue = FS_IDENTITY
    step.main.back = NULL
    step.main.rows = crossing
    step.main.out = at.out
    if crossing:
        job.kernels.plain(&step.main)


cdef void run_steps_back(const Undo *job, int thread, int team, fs_barrier *barrier) noexcept nogil:
    """Step 1: what one thread does of the steps of the chunk, from the last to the first."""
    cdef Py_ssize_t stride = 1 if job.split_panels else team
    cdef Py_ssize_t lane = 0 if job.split_panels else thread
    cdef bint meet = job.split_panels and team > 1
    cdef Py_ssize_t first = 0, first_later = -1, step = job.to_step, count, n = 0, crossing
    cdef BackPointers at = pointers_of(job, thread)
    cdef BackStep back
    set_back_step(&back, job, &at, thread, team)
    while step > job.from_step:
        step -= 1
        count = running(job, step, job.block)
        n = (count - lane + stride - 1) // stride
        crossing = list_step(job, &at, step, n, lane, stride, first, first_later)
        first_later = first
        first += count
        back.main.rows = n
        step_back(job, &back.main, &back.main_back, &job.weights.recurrent, &back.nothing, crossing)
        if back.has_second:
            if meet:
                team_wait(barrier, team)
            back.second.rows = n
            if n:
                job.kernels.plain(&back.second)
        if back.has_rows:
            if meet:
                team_wait(barrier, team)
            if job.split_panels:
                job.cell.back_rows(&back.second, n * thread // team, n * (thread + 1) // team)
            else:
                job.cell.back_rows(&back.second, 0, n)
        if meet:
            team_wait(barrier, team)
    if job.from_step == 0:
        reach_start(job, &back, &at, thread, n, lane, stride, first_later)


cdef void multiply_inputs(Undo *job, int thread, int team) noexcept nogil:
    """Step 2: dx of some rows of the chunk."""
    cdef Py_ssize_t first = job.n * thread // team, last = job.n * (thread + 1) // team, i, block
    cdef const void **rows = <const void **> (job.pointers + thread * job.pointers_each)
    cdef fs_step step
    memset(&step, 0, sizeof(fs_step))
    take_share(&step, &job.weights.input, 0, 1)
    step.epilogue = FS_ADD if job.add_dx else FS_IDENTITY
    step.init = <const void **> job.no_init
    while first < last:
        block = min(last - first, GRADIENT_ROWS)
        for i in range(block):
            rows[i] = <const char *> job.g_rows[first + i] + job.x_first * job.item
        step.rows = block
        step.h = rows
        step.out = job.dx_rows + first
        job.kernels.plain(&step)
        first += block


cdef void add_products(Undo *job, int thread, int team, fs_barrier *barrier) noexcept nogil:
    """Step 3: what one thread does to add the chunk to the weight gradients."""
    cdef Py_ssize_t first = job.summed_first, columns = job.gradient_columns - first
    cdef Py_ssize_t begin = first + columns * thread // team, end = first + columns * (thread + 1) // team
    job.kernels.sum_rows(job.g_rows, job.n, begin, end, job.bias)
    cdef const void **rows = <const void **> (job.pointers + thread * job.pointers_each)
    sum_weight_gradients(&job.gradient, job.kernels, job.n, rows, thread, team, barrier)


cdef void undo_chunk(void *undo, int thread, int team, fs_barrier *barrier) noexcept nogil:
    """All three steps, for one thread."""
    cdef Undo *job = <Undo *> undo
    run_steps_back(job, thread, team, barrier)
    if team > 1:
        team_wait(barrier, team)
    multiply_inputs(job, thread, team)
    add_products(job, thread, team, barrier)


cdef void lay_out(Undo *job, Scratch *scratch) noexcept nogil:
    """Give every scratch array its place."""
    cdef Py_ssize_t pointer = sizeof(void *)
    cdef const TransposedWeights *weights = job.weights
    cdef bint with_middle = weights.projection.units or weights.candidate.units
    cdef bint with_outputs = weights.projection.units or job.cell.rows != NULL
    cdef Py_ssize_t widest = max(
        weights.recurrent.panels, weights.candidate.panels, weights.projection.panels, weights.input.panels,
    )
    # What has to start as zeros comes first: `zero_bytes` of them.
    job.zeros = scratch_array(scratch, widest * 4 * job.kernels.lanes * job.item)
    job.bias = scratch_array(scratch, job.gradient_columns * job.item)
    job.carry = scratch_array(scratch, job.row_block * job.output_row)
    lay_out_sums(&job.gradient, job.kernels, scratch)
    job.zero_bytes = scratch.n_bytes
    job.gradients = scratch_array(scratch, job.chunk_rows * job.gradient_row)
    job.later = scratch_array(scratch, job.row_block * job.gradient_row)
    job.middle = scratch_array(scratch, job.chunk_rows * job.middle_row if with_middle else 0)
    job.outputs = scratch_array(scratch, job.chunk_rows * job.output_row if with_outputs else 0)
    lay_out_factors(&job.gradient, job.kernels, job.chunk_rows, scratch)
    job.g_rows = <const void **> scratch_array(scratch, job.chunk_rows * pointer)
    job.h_rows = <const void **> scratch_array(scratch, job.chunk_rows * pointer)
    job.x_rows = <const void **> scratch_array(scratch, job.chunk_rows * pointer)
    job.dx_rows = <void **> scratch_array(scratch, job.chunk_rows * pointer)
    job.middle_rows = <const void **> scratch_array(scratch, job.chunk_rows * pointer)
    job.output_rows = <const void **> scratch_array(scratch, job.chunk_rows * pointer)
    job.no_init = <const void **> scratch_array(scratch, job.chunk_rows * pointer)
    job.pointers_each = (max(STEP_POINTERS * job.row_block, GRADIENT_ROWS) * pointer + 63) // 64 * 64
    job.pointers = scratch_array(scratch, job.threads * job.pointers_each)


cdef const Factor *add_gradient_columns(
    Undo *job, const void **rows, Py_ssize_t first, Py_ssize_t columns,
) noexcept nogil:
    """One factor more on the side of the gradients."""
    cdef Factor *factor = &job.gradient.a[job.gradient.n_a]
    set_factor(factor, rows, first, columns)
    job.gradient.n_a += 1
    return factor


cdef const Factor *add_inputs(Undo *job, const void **rows, Py_ssize_t columns) noexcept nogil:
    """One factor more on the side of what the weights multiplied."""
    cdef Factor *factor = &job.gradient.b[job.gradient.n_b]
    set_factor(factor, rows, 0, columns)
    job.gradient.n_b += 1
    return factor


cdef void add_product(Undo *job, const Factor *a, const Factor *b, char *target) noexcept nogil:
    set_product(&job.gradient.products[job.gradient.n_products], a, b, target)
    job.gradient.n_products += 1


cdef void set_products(Undo *job, char *weight_ih, char *weight_hh, char *weight_hr) noexcept nogil:
    """Which columns of the gradients meet which rows, and where the result belongs."""
    cdef const fs_cell *cell = job.cell
    cdef Py_ssize_t units = job.cell_units, inputs = job.weights.input.units, outputs = job.weights.recurrent.units
    # Gates whose input part and state part have one gradient come first; then the one that is apart, or the candidate.
    cdef Py_ssize_t shared = (cell.gates - cell.apart_gates - cell.candidate_gates) * units
    cdef Py_ssize_t others = cell.gates * units - shared
    cdef const Factor *x
    cdef const Factor *h
    cdef const Factor *a = NULL
    job.gradient.n_a = job.gradient.n_b = job.gradient.n_products = 0
    x = add_inputs(job, job.x_rows, inputs)
    h = add_inputs(job, job.h_rows, outputs)
    if shared:
        a = add_gradient_columns(job, job.g_rows, job.x_first, shared)
        add_product(job, a, x, weight_ih)
        add_product(job, a, h, weight_hh)
    weight_hh += shared * outputs * job.item
    if others:
        a = add_gradient_columns(job, job.g_rows, job.x_first + shared, others)
        add_product(job, a, x, weight_ih + shared * inputs * job.item)
    if cell.apart_gates:
        add_product(job, add_gradient_columns(job, job.g_rows, 0, others), h, weight_hh)
    elif cell.candidate_gates:
        add_product(job, a, add_inputs(job, job.middle_rows, units), weight_hh)
    if job.weights.projection.units:
        a = add_gradient_columns(job, job.output_rows, 0, outputs)
        add_product(job, a, add_inputs(job, job.middle_rows, units), weight_hr)


cdef void add_summed(Undo *job, char *bias_ih, char *bias_hh, char **vectors) noexcept nogil:
    """Add the columns that are only summed to the gradients of biases and vectors."""
    cdef const char *sums = job.bias + job.summed_first * job.item
    cdef Py_ssize_t columns = job.cell.gates * job.cell_units
    cdef int i
    if bias_ih != NULL:
        add_row(job.kernels, sums, columns, bias_ih)
        add_row(job.kernels, sums, columns, bias_hh)
    for i in range(FS_VECTORS):
        sums += columns * job.item
        columns = job.cell.vectors[i] * job.cell_units
        if vectors[i] != NULL:
            add_row(job.kernels, sums, columns, vectors[i])


cdef void add_gradients(Undo *job, char *bias_ih, char *bias_hh, char **vectors) noexcept nogil:
    """Add what was summed to the gradients of the parameters."""
    cdef const fs_kernels *kernels = job.kernels
    cdef Py_ssize_t x_columns = job.weights.input.h_size, apart = job.cell.apart_gates * job.cell_units
    cdef const char *of_x = job.bias + job.x_first * job.item
    cdef unsigned long long before = fs_flush_denormals()
    take_sums(&job.gradient, kernels)
    if job.cell.rows != NULL:
        add_summed(job, bias_ih, bias_hh, vectors)
    elif bias_ih != NULL:
        add_row(kernels, of_x, x_columns, bias_ih)
        add_row(kernels, of_x, x_columns - apart, bias_hh)
        if apart:
            add_row(kernels, job.bias, apart, bias_hh + (x_columns - apart) * job.item)
    fs_restore_denormals(before)


cdef int undo(
    Undo *job, char *weight_ih, char *weight_hh, char *weight_hr, char *bias_ih, char *bias_hh, char **vectors,
    int n_threads,
) except -1:
    """Undo one direction of a layer."""
    if job.rows == 0 or job.time == 0:
        return 0
    cdef const TransposedWeights *weights = job.weights
    cdef Py_ssize_t lanes = job.kernels.lanes, wide = 4 * lanes
    cdef Py_ssize_t step_work = weights.recurrent.panels * wide * (weights.recurrent.h_size + GATE_WORK)
    step_work += (weights.candidate.panels + weights.projection.panels) * wide * job.cell_units
    cdef Py_ssize_t work = 2 * step_work + 2 * weights.input.panels * wide * weights.input.h_size
    cdef Py_ssize_t limit = <Py_ssize_t> SIGNAL_WORK_LANE * lanes
    job.row_block = min(job.rows, <Py_ssize_t> BACK_BLOCK, max(limit // work, 2 * job.kernels.tile_rows[4]))
    cdef Py_ssize_t rows = min(job.row_block, job.rows)
    cdef Split split = split_of(
        rows, step_work, work_of(rows, work, job.time), 1, weights.recurrent.panels, job.kernels.tile_rows[4], job.item,
        n_threads,
    )
    job.threads = split.threads
    job.split_panels = split.panels
    cdef Py_ssize_t chunk = max(1, min(GRADIENT_ROWS, limit // work) // job.row_block)
    chunk = min(chunk, job.time)
    job.chunk_rows = max(chunk * job.row_block, job.row_block)
    job.gradient_row = padded_bytes(job.gradient_columns * job.item)
    job.output_row = padded_bytes(weights.recurrent.panels * wide * job.item)
    job.middle_row = padded_bytes(job.cell_units * job.item)
    set_products(job, weight_ih, weight_hh, weight_hr)
    cdef Scratch scratch
    memset(&scratch, 0, sizeof(scratch))
    lay_out(job, &scratch)
    scratch_open(&scratch)
    lay_out(job, &scratch)
    set_products(job, weight_ih, weight_hh, weight_hr)
    with nogil:
        memset(<char *> job.zeros, 0, job.zero_bytes)
    cdef Py_ssize_t i, place, row, to_step, from_step
    for i in range(job.chunk_rows):
        job.no_init[i] = job.zeros
    try:
        job.base = 0
        while job.base < job.rows:
            job.block = min(job.row_block, job.rows - job.base)
            for i in range(job.block):
                place = job.base + i
                row = place if job.order == NULL else job.order[place]
                memcpy(job.carry + i * job.output_row, job.dh + row * job.dh_row, weights.recurrent.units * job.item)
            to_step = job.time if job.steps == NULL else job.steps[job.base]
            while to_step > 0:
                from_step = max(0, to_step - chunk)
                job.from_step, job.to_step = from_step, to_step
                with nogil:
                    list_chunk(job)
                    run_team(undo_chunk, job, job.threads, n_threads)
                    # The first step of this chunk is what the next one continues from.
                    i = running(job, from_step, job.block)
                    memcpy(job.later, job.gradients + (job.n - i) * job.gradient_row, i * job.gradient_row)
                PyErr_CheckSignals()
                to_step = from_step
            job.base += job.row_block
        with nogil:
            add_gradients(job, bias_ih, bias_hh, vectors)
    finally:
        scratch_close(&scratch)
    return 0


cdef char *bytes_of(array) noexcept:
    return NULL if array is None else cnp.PyArray_BYTES(<cnp.ndarray> array)


cdef Py_ssize_t stride_of(array, int axis) noexcept:
    return 0 if array is None else cnp.PyArray_STRIDE(<cnp.ndarray> array, axis)


def backward(
    Tape tape not None, cnp.ndarray dy not None, dh, dc, truncate, tuple grads not None, bint keep, int n_threads,
):
    """Undo `forward`; see `fastseq.reference._recurrent.backward`."""
    cdef Py_ssize_t width = cnp.PyArray_DIM(tape.h, 2), at
    cdef int direction, directions = len(tape.cells)
    cdef bint padded = tape.rows.steps is not None
    cdef cnp.ndarray x = tape.x, dh_0, dc_0 = None, gates, c_steps, flow_h = None, flow_c = None
    cdef cnp.ndarray dx = sequence(x, cnp.PyArray_DIM(x, 2), cnp.PyArray_TYPE(x), padded)
    cdef Cell cell
    cdef TransposedCell weights
    cdef Undo job
    cdef char *vectors[FS_VECTORS]
    cdef int i
    memset(&job, 0, sizeof(Undo))
    dh_0 = np.zeros_like(tape.h) if dh is None else state_copy(dh)
    if tape.c is not None:
        dc_0 = np.zeros_like(tape.c) if dc is None else state_copy(dc)
    if keep:
        batch, time = x.shape[:2]
        flow_h = np.zeros((batch, time, directions, width), x.dtype)
        if tape.c is not None:
            flow_c = np.zeros((batch, time, directions, tape.c.shape[2]), x.dtype)
    job.rows, job.time = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1)
    job.truncate = 0 if truncate is None else min(truncate, job.time)
    if padded:
        job.order = <const Py_ssize_t *> cnp.PyArray_DATA(tape.rows.order)
        job.steps = <const Py_ssize_t *> cnp.PyArray_DATA(tape.rows.steps)
    if tape.rows.reset_bytes is not None:
        job.resets = cnp.PyArray_BYTES(tape.rows.reset_bytes)
        job.resets_row = job.time
    job.x, job.x_row, job.x_time = cnp.PyArray_BYTES(x), cnp.PyArray_STRIDE(x, 0), cnp.PyArray_STRIDE(x, 1)
    job.dx, job.dx_row, job.dx_time = cnp.PyArray_BYTES(dx), cnp.PyArray_STRIDE(dx, 0), cnp.PyArray_STRIDE(dx, 1)
    job.y_row, job.y_time = cnp.PyArray_STRIDE(tape.y, 0), cnp.PyArray_STRIDE(tape.y, 1)
    job.dy_row, job.dy_time = cnp.PyArray_STRIDE(dy, 0), cnp.PyArray_STRIDE(dy, 1)
    job.h_row, job.dh_row = cnp.PyArray_STRIDE(tape.h, 0), cnp.PyArray_STRIDE(dh_0, 0)
    job.c_row, job.dc_row = stride_of(tape.c, 0), stride_of(dc_0, 0)
    job.dh_total_row, job.dh_total_time = stride_of(flow_h, 0), stride_of(flow_h, 1)
    job.dc_total_row, job.dc_total_time = stride_of(flow_c, 0), stride_of(flow_c, 1)
    for direction in range(directions):
        cell = tape.cells[direction]
        weights = cell.transposed()
        job.kernels, job.cell, job.item = cell.w.kernels, cell.w.cell, cell.item
        job.weights = &weights.w
        job.cell_units = cell.w.hidden_size
        job.x_first = job.cell.apart_gates * job.cell_units
        job.gradient_columns = job.x_first + job.cell.gates * job.cell_units
        job.summed_first = 0
        if job.cell.rows != NULL:
            job.vectors = cell.w.vectors
            job.summed_first = job.gradient_columns
            job.gradient_columns += job.cell.gates * job.cell_units
            for i in range(FS_VECTORS):
                job.gradient_columns += job.cell.vectors[i] * job.cell_units
        job.h_columns = (job.cell.gates - job.cell.candidate_gates) * job.cell_units
        job.add_dx = direction > 0
        job.reverse = direction == 1
        at = direction * width * job.item
        job.y, job.dy = cnp.PyArray_BYTES(tape.y) + at, cnp.PyArray_BYTES(dy) + at
        job.h, job.dh = slot_of(tape.h, direction), slot_of(dh_0, direction)
        if tape.c is not None:
            job.c, job.dc = slot_of(tape.c, direction), slot_of(dc_0, direction)
        gates, c_steps = tape.gates[direction], tape.c_steps[direction]
        job.gates, job.gates_row, job.gates_time = bytes_of(gates), stride_of(gates, 0), stride_of(gates, 1)
        job.c_steps = bytes_of(c_steps)
        job.c_steps_row, job.c_steps_time = stride_of(c_steps, 0), stride_of(c_steps, 1)
        if keep:
            job.dh_total = cnp.PyArray_BYTES(flow_h) + direction * cnp.PyArray_STRIDE(flow_h, 2)
        if flow_c is not None:
            job.dc_total = cnp.PyArray_BYTES(flow_c) + direction * cnp.PyArray_STRIDE(flow_c, 2)
        weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, *of_vectors = grads[direction]
        memset(vectors, 0, sizeof(vectors))
        for i, vector in enumerate(of_vectors):
            vectors[i] = bytes_of(vector)
        undo(
            &job, bytes_of(weight_ih), bytes_of(weight_hh), bytes_of(weight_hr), bytes_of(bias_ih), bytes_of(bias_hh),
            vectors, n_threads,
        )
    return dx, dh_0, dc_0, ((flow_h, flow_c) if keep else None)
