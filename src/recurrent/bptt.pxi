# Backpropagation through time; part of _recurrent.pyx.
#
# A direction of a layer is undone in chunks of time, from its last step to its first. For each chunk the threads
#
# 1. take its steps backward: what comes back through the recurrent weights meets the gradient of the output, and the
#    fused kernel turns their sum into the gradients of the pre-activations. Rows or panels are split as in the forward;
# 2. multiply those with the weights of the input, which gives dx;
# 3. add their product with the inputs and the states to the weight gradients: one product over batch and time, summed
#    in one order (last step first, longest row first), whatever the chunks and the threads.
#
# A chunk has about GRADIENT_ROWS rows of gradients: few enough that what 1 has written is still in a cache for 2 and 3.

# The most rows of the batch processed at once. No number of threads may change it: the order of sums hangs on it.
cdef Py_ssize_t BACK_BLOCK = 1024

cdef enum:
    STEP_POINTERS = 16  # arrays of pointers a thread keeps while it runs, one entry a row

# Columns of the gradients a cell kernels, by kind: RNN a; LSTM i f g o; GRU_AFTER q r z n, where q = W_hn h + b_hn;
# GRU_BEFORE r z n. Each is `hidden_size` wide.
cdef int[4] BACK_GATES = [1, 4, 4, 3]
# Gates on the tape: LSTM i f g o; GRU_AFTER r z n q; GRU_BEFORE r z n. The RNN needs none.
cdef int[4] TAPE_GATES = [0, 4, 4, 3]
GATE_NAMES = {RNN_CELL: "", LSTM_CELL: "ifgo", GRU_AFTER: "rzn", GRU_BEFORE: "rzn"}


cdef class Tape:
    """What `backward` needs of one layer's `forward`."""

    cdef tuple cells
    cdef cnp.ndarray x, y, h, c
    cdef Rows rows
    cdef list gates    # of each direction: (B, T, gates * H), or None
    cdef list c_steps  # of each direction: c after every step, (B, T, H), or None


cdef cnp.ndarray steps_together(cnp.ndarray x, Py_ssize_t width, bint padded):
    """`sequence` for what kernels alone read: the rows of a step lie together, each on cache lines of its own."""
    cdef Py_ssize_t row = padded_bytes(width * x.itemsize)
    n_bytes = x.shape[1] * x.shape[0] * row
    raw = (np.zeros if padded else np.empty)(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    by_step = raw[start:start + n_bytes].view(x.dtype).reshape(x.shape[1], x.shape[0], row // x.itemsize)
    return by_step[:, :, :width].swapaxes(0, 1)


def forward(
    tuple cells not None, cnp.ndarray x not None, cnp.ndarray h not None, cnp.ndarray c, lengths, resets,
    int n_threads,
):
    """One layer with a tape; see `fastseq.reference._recurrent.forward`."""
    cdef Py_ssize_t width = cnp.PyArray_DIM(h, 2)
    cdef int direction
    cdef Job job
    cdef Cell cell
    cdef Tape tape = Tape()
    cdef cnp.ndarray y, gates, c_steps, h_n = state_copy(h), c_n = state_copy(c)
    cdef bint padded = lengths is not None
    tape.cells, tape.x, tape.h, tape.c = cells, x, h, c
    tape.gates, tape.c_steps = [], []
    tape.rows = Rows()
    tape.rows.set(&job, x, lengths, resets, x.dtype, width if c is None else cnp.PyArray_DIM(c, 2))
    tape.y = y = sequence(x, len(cells) * width, cnp.PyArray_TYPE(x), padded)
    set_sequence(&job, x, y)
    for direction in range(len(cells)):
        cell = cells[direction]
        set_cell(&job, cell)
        set_state(&job, h, c, direction)
        gates = c_steps = None
        if TAPE_GATES[<int> cell.w.kind]:
            gates = steps_together(x, TAPE_GATES[<int> cell.w.kind] * cell.w.hidden_size, padded)
            job.gates = cnp.PyArray_BYTES(gates)
            job.gates_row = cnp.PyArray_STRIDE(gates, 0)
            job.gates_time = cnp.PyArray_STRIDE(gates, 1)
        if c is not None:
            c_steps = steps_together(x, cell.w.hidden_size, padded)
            job.c_out = cnp.PyArray_BYTES(c_steps)
            job.c_out_row = cnp.PyArray_STRIDE(c_steps, 0)
            job.c_out_time = cnp.PyArray_STRIDE(c_steps, 1)
        tape.gates.append(gates)
        tape.c_steps.append(c_steps)
        job.reverse = direction == 1
        job.y = cnp.PyArray_BYTES(y)
        job.y += direction * width * job.item
        execute(&job, n_threads)
        take_last(&job, job.y, job.y_row, job.y_time, h_n, direction)
        if c is not None:
            take_last(&job, job.c_out, job.c_out_row, job.c_out_time, c_n, direction)
    cnp.PyArray_CLEARFLAGS(y, cnp.NPY_ARRAY_WRITEABLE)
    return *finished(y, h_n, c_n), tape


def gates(Tape tape not None):
    """Every gate, h and c at every step; see `fastseq.reference._recurrent.gates`."""
    cdef Cell cell = tape.cells[0]
    batch, time = tape.x.shape[:2]
    units = cell.w.hidden_size
    named = {}
    for gate, name in enumerate(GATE_NAMES[cell.w.kind]):
        named[name] = np.stack([part[:, :, gate * units:(gate + 1) * units] for part in tape.gates], axis=2)
    if tape.c is not None:
        named["c"] = np.stack(tape.c_steps, axis=2)
    named["h"] = tape.y.reshape(batch, time, len(tape.cells), cell.w.output_size)
    return named


cdef fs_weights packed_rows(Cell cell, cnp.ndarray weight, Py_ssize_t first, Py_ssize_t last, Py_ssize_t rotate):
    """Rows [first, last) of a weight matrix (rows, columns) for a product over rows; `rotate` of them come last."""
    cdef fs_weights part
    cdef Py_ssize_t columns = cnp.PyArray_DIM(weight, 1), k = last - first, i
    cdef Py_ssize_t per_panel = 4 * cell.w.kernels.lanes
    part.units = columns
    part.panels = (columns + per_panel - 1) // per_panel
    part.x_size = 0
    part.h_size = k
    part.x = part.h_bias = NULL
    cdef cnp.ndarray array = aligned(cell, part.panels * k * per_panel)
    part.h = cnp.PyArray_DATA(array)
    part.bias = cnp.PyArray_DATA(aligned(cell, part.panels * per_panel))
    cdef const void **rows = <const void **> PyMem_RawMalloc(k * sizeof(void *))
    if rows == NULL:
        raise MemoryError(f"{k} pointers")
    for i in range(k):
        rows[i] = cnp.PyArray_BYTES(weight) + (first + (i + rotate) % k) * cnp.PyArray_STRIDE(weight, 0)
    with nogil:
        cell.w.kernels.pack_panels(rows, k, columns, 0, part.panels, cnp.PyArray_DATA(array))
    PyMem_RawFree(rows)
    return part


cdef int transpose(Cell cell) except -1:
    """Pack the weights for backward, once. Two threads may meet here and both do it; what the first made is kept."""
    cdef Transposed made
    cdef Py_ssize_t units = cell.w.hidden_size
    cdef Py_ssize_t rows = cnp.PyArray_DIM(cell.weight_ih, 0)
    if cell.has_transposed:
        return 0
    memset(&made, 0, sizeof(Transposed))
    made.input = packed_rows(cell, cell.weight_ih, 0, rows, 0)
    if cell.w.kind == GRU_AFTER:
        made.recurrent = packed_rows(cell, cell.weight_hh, 0, rows, 2 * units)
    elif cell.w.kind == GRU_BEFORE:
        made.recurrent = packed_rows(cell, cell.weight_hh, 0, 2 * units, 0)
        made.candidate = packed_rows(cell, cell.weight_hh, 2 * units, rows, 0)
    else:
        made.recurrent = packed_rows(cell, cell.weight_hh, 0, rows, 0)
    if cell.weight_hr is not None:
        made.projection = packed_rows(cell, cell.weight_hr, 0, cnp.PyArray_DIM(cell.weight_hr, 0), 0)
    if not cell.has_transposed:  # another thread may be multiplying with what it made meanwhile
        cell.transposed = made
        cell.has_transposed = True
    return 0


cdef struct Undo:
    const fs_kernels *kernels
    Kind kind
    fs_epilogue epilogue
    const Transposed *weights
    Py_ssize_t item
    Py_ssize_t cell_units        # hidden_size
    Py_ssize_t gradient_columns  # of a row of gradients; those for h come first, those for x from x_first on
    Py_ssize_t x_first
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


cdef void run_steps_back(Undo *job, int thread, int team, fs_barrier *barrier) noexcept nogil:
    """Step 1: what one thread does of the steps of the chunk, from the last to the first."""
    cdef const fs_kernels *kernels = job.kernels
    cdef const fs_weights *recurrent = &job.weights.recurrent
    cdef Py_ssize_t stride = 1 if job.split_panels else team
    cdef Py_ssize_t lane = 0 if job.split_panels else thread
    cdef bint meet = job.split_panels and team > 1
    cdef bint gru = job.kind == GRU_AFTER or job.kind == GRU_BEFORE
    cdef bint projected = job.weights.projection.units != 0
    # Where the rows of gradients of this step and of the one after it begin in the chunk; -1: in `later`.
    cdef Py_ssize_t first = 0, first_later = -1
    cdef Py_ssize_t step = job.to_step, count, n = 0, crossing, last, i, k, at, place, row, t
    cdef bint crosses, joins, cut
    cdef const void **init = <const void **> (job.pointers + thread * job.pointers_each)
    cdef const void **later = init + job.row_block
    cdef const void **dy = later + job.row_block
    cdef const void **gates = dy + job.row_block
    cdef const void **h = gates + job.row_block
    cdef const void **h_before = h + job.row_block
    cdef const void **c = h_before + job.row_block
    cdef const void **c_before = c + job.row_block
    cdef const void **dc = c_before + job.row_block
    cdef void **dc_before = <void **> (dc + job.row_block)
    cdef void **carry = dc_before + job.row_block
    cdef void **out = carry + job.row_block
    cdef void **middle = out + job.row_block
    cdef void **output = middle + job.row_block
    cdef void **dh_total = output + job.row_block
    cdef void **dc_total = dh_total + job.row_block
    cdef fs_weights nothing = recurrent[0]
    nothing.h_size = 0
    cdef fs_back back, second_back
    cdef fs_step main, second
    memset(&back, 0, sizeof(fs_back))
    memset(&main, 0, sizeof(fs_step))
    share_panels(&main, recurrent, job, thread, team)
    main.epilogue = job.epilogue
    main.init = init
    main.h = later
    main.out = out
    main.back = &back
    back.dy = dy
    back.gates = gates
    back.h = h
    back.h_before = h_before
    back.c = c
    back.c_before = c_before
    back.dc = dc
    back.dc_before = dc_before
    back.carry = carry
    back.dy_next = job.dy_time if job.reverse else -job.dy_time
    back.gates_next = job.gates_time if job.reverse else -job.gates_time
    back.h_next = job.y_time if job.reverse else -job.y_time
    back.c_next = job.c_steps_time if job.reverse else -job.c_steps_time
    back.dh_total = dh_total if job.dh_total != NULL else NULL
    second = main
    second_back = back
    second.back = &second_back
    second_back.dy = NULL
    second_back.dh_total = NULL
    if projected:
        # The gradient of the projected output first, then through the projection to the cell.
        main.epilogue = FS_BACK_IDENTITY
        main.out = output
        share_panels(&second, &job.weights.projection, job, thread, team)
        second.init = <const void **> job.no_init
        second.h = <const void **> output
        second_back.middle = middle
        second_back.dc_total = dc_total if job.dc_total != NULL else NULL
    elif job.kind == GRU_BEFORE:
        # The gradients of z and n first, then through n to r.
        share_panels(&second, &job.weights.candidate, job, thread, team)
        second.epilogue = FS_BACK_GRU_RESET
        second.init = <const void **> job.no_init
        second.h = <const void **> middle  # for a moment: the gradients of n
        second_back.middle = <void **> output
    else:
        back.dc_total = dc_total if job.dc_total != NULL else NULL

    while step > job.from_step:
        step -= 1
        count = running(job, step, job.block)
        cut = job.truncate != 0 and (step + 1) % job.truncate == 0
        # Rows into which a gradient comes from the step after this one stand in front, the others behind them.
        n = (count - lane + stride - 1) // stride
        crossing = 0
        last = n
        for k in range(n):
            at = lane + k * stride
            place = job.base + at
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
                later[i] = job.later + at * job.gradient_row
            else:
                later[i] = job.gradients + (first_later + at) * job.gradient_row
            out[i] = job.gradients + (first + at) * job.gradient_row
            carry[i] = job.carry + at * job.output_row
            init[i] = <const void *> carry[i] if joins or (gru and crosses) else job.zeros
            dy[i] = job.dy + row * job.dy_row + t * job.dy_time
            h[i] = job.y + row * job.y_row + t * job.y_time
            h_before[i] = job.h_rows[first + at]
            if job.gates != NULL:
                gates[i] = job.gates + row * job.gates_row + t * job.gates_time
            if job.kind == LSTM_CELL:
                c[i] = job.c_steps + row * job.c_steps_row + t * job.c_steps_time
                c_before[i] = state_before(
                    job, place, step, job.c_steps, job.c_steps_row, job.c_steps_time, job.c, job.c_row
                )
                dc_before[i] = job.dc + row * job.dc_row
                dc[i] = <const void *> dc_before[i] if joins or crosses else job.zeros
            if projected:
                middle[i] = job.middle + (first + at) * job.middle_row
                output[i] = job.outputs + (first + at) * job.output_row
            elif job.kind == GRU_BEFORE:
                middle[i] = <char *> out[i] + 2 * job.weights.recurrent.units * job.item
                output[i] = job.middle + (first + at) * job.middle_row
            if job.dh_total != NULL:
                dh_total[i] = job.dh_total + row * job.dh_total_row + t * job.dh_total_time
            if job.dc_total != NULL:
                dc_total[i] = job.dc_total + row * job.dc_total_row + t * job.dc_total_time
        first_later = first
        first += count
        main.rows = n
        step_back(job, &main, &back, recurrent, &nothing, crossing)
        if projected or job.kind == GRU_BEFORE:
            if meet:
                team_wait(barrier, team)
            second.rows = n
            if n:
                kernels.plain(&second)
        if meet:
            team_wait(barrier, team)

    # Before the first step: what is left reaches the initial state.
    if job.from_step:
        return
    main.epilogue = FS_IDENTITY
    main.back = NULL
    crossing = 0
    for k in range(n):
        at = lane + k * stride
        place = job.base + at
        row = place if job.order == NULL else job.order[place]
        if resets_at(job, place, 0):
            if thread == 0 or not job.split_panels:
                memset(job.dh + row * job.dh_row, 0, recurrent.units * job.item)
                if job.dc != NULL:
                    memset(job.dc + row * job.dc_row, 0, job.cell_units * job.item)
            continue
        later[crossing] = job.gradients + (first_later + at) * job.gradient_row
        init[crossing] = <const void *> (job.carry + at * job.output_row) if gru else job.zeros
        out[crossing] = job.dh + row * job.dh_row
        crossing += 1
    main.rows = crossing
    main.out = out
    if crossing:
        kernels.plain(&main)


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
    cdef Py_ssize_t columns = job.gradient_columns
    job.kernels.sum_rows(job.g_rows, job.n, columns * thread // team, columns * (thread + 1) // team, job.bias)
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


cdef Py_ssize_t padded_bytes(Py_ssize_t n_bytes) noexcept nogil:
    """Whole cache lines; and rows that lie a page apart would all meet in the same few lines of a cache."""
    cdef Py_ssize_t lines = (n_bytes + 63) // 64 * 64
    return lines + 64 if lines % 4096 == 0 else lines


cdef Py_ssize_t lay_out(Undo *job, size_t base) noexcept nogil:
    """Give every scratch array its place from `base` on; returns how many bytes that takes."""
    cdef Py_ssize_t n_bytes = 0, pointer = sizeof(void *)
    cdef const Transposed *weights = job.weights
    cdef bint with_middle = weights.projection.units or weights.candidate.units
    cdef Py_ssize_t widest = max(
        weights.recurrent.panels, weights.candidate.panels, weights.projection.panels, weights.input.panels,
    )
    # What has to start as zeros comes first: `zero_bytes` of them.
    job.zeros = taken(base, &n_bytes, widest * 4 * job.kernels.lanes * job.item)
    job.bias = taken(base, &n_bytes, job.gradient_columns * job.item)
    job.carry = taken(base, &n_bytes, job.row_block * job.output_row)
    lay_out_sums(&job.gradient, job.kernels, base, &n_bytes)
    job.zero_bytes = n_bytes
    job.gradients = taken(base, &n_bytes, job.chunk_rows * job.gradient_row)
    job.later = taken(base, &n_bytes, job.row_block * job.gradient_row)
    job.middle = taken(base, &n_bytes, job.chunk_rows * job.middle_row if with_middle else 0)
    job.outputs = taken(base, &n_bytes, job.chunk_rows * job.output_row if job.weights.projection.units else 0)
    lay_out_factors(&job.gradient, job.kernels, job.chunk_rows, base, &n_bytes)
    job.g_rows = <const void **> taken(base, &n_bytes, job.chunk_rows * pointer)
    job.h_rows = <const void **> taken(base, &n_bytes, job.chunk_rows * pointer)
    job.x_rows = <const void **> taken(base, &n_bytes, job.chunk_rows * pointer)
    job.dx_rows = <void **> taken(base, &n_bytes, job.chunk_rows * pointer)
    job.middle_rows = <const void **> taken(base, &n_bytes, job.chunk_rows * pointer)
    job.output_rows = <const void **> taken(base, &n_bytes, job.chunk_rows * pointer)
    job.no_init = <const void **> taken(base, &n_bytes, job.chunk_rows * pointer)
    job.pointers_each = (max(STEP_POINTERS * job.row_block, GRADIENT_ROWS) * pointer + 63) // 64 * 64
    job.pointers = taken(base, &n_bytes, job.threads * job.pointers_each)
    return n_bytes


cdef void set_products(Undo *job, char *weight_ih, char *weight_hh, char *weight_hr) noexcept nogil:
    """Which columns of the gradients meet which rows, and where the result belongs."""
    cdef Py_ssize_t units = job.cell_units, inputs = job.weights.input.units, outputs = job.weights.recurrent.units
    cdef WeightGradient *gradient = &job.gradient
    set_factor(&gradient.b[0], job.x_rows, 0, inputs)
    set_factor(&gradient.b[1], job.h_rows, 0, outputs)
    set_factor(&gradient.b[2], job.middle_rows, 0, units)
    gradient.n_b = 2
    if job.kind == GRU_AFTER or job.kind == GRU_BEFORE:
        # r and z; n for the input; and n for the state: q, or n again, which then saw r * h.
        set_factor(&gradient.a[0], job.g_rows, job.x_first, 2 * units)
        set_factor(&gradient.a[1], job.g_rows, job.x_first + 2 * units, units)
        set_factor(&gradient.a[2], job.g_rows, 0, units)
        gradient.n_a, gradient.n_products = 3, 4
        set_product(&gradient.products[0], &gradient.a[0], &gradient.b[0], weight_ih)
        set_product(&gradient.products[1], &gradient.a[1], &gradient.b[0], weight_ih + 2 * units * inputs * job.item)
        set_product(&gradient.products[2], &gradient.a[0], &gradient.b[1], weight_hh)
        set_product(&gradient.products[3], &gradient.a[2], &gradient.b[1], weight_hh + 2 * units * outputs * job.item)
        if job.kind == GRU_BEFORE:
            gradient.products[3].a, gradient.products[3].b = &gradient.a[1], &gradient.b[2]
            gradient.n_a, gradient.n_b = 2, 3
        return
    set_factor(&gradient.a[0], job.g_rows, 0, job.gradient_columns)
    gradient.n_a, gradient.n_products = 1, 2
    set_product(&gradient.products[0], &gradient.a[0], &gradient.b[0], weight_ih)
    set_product(&gradient.products[1], &gradient.a[0], &gradient.b[1], weight_hh)
    if job.weights.projection.units:
        set_factor(&gradient.a[1], job.output_rows, 0, outputs)
        gradient.n_a, gradient.n_b, gradient.n_products = 2, 3, 3
        set_product(&gradient.products[2], &gradient.a[1], &gradient.b[2], weight_hr)


cdef void add_gradients(Undo *job, char *bias_ih, char *bias_hh) noexcept nogil:
    """Add what was summed to the gradients of the parameters."""
    cdef const fs_kernels *kernels = job.kernels
    cdef Py_ssize_t units = job.cell_units * job.item
    cdef Py_ssize_t x_columns = job.weights.input.h_size
    cdef unsigned long long before = fs_flush_denormals()
    take_sums(&job.gradient, kernels)
    if bias_ih != NULL:
        add_row(kernels, job.bias + job.x_first * job.item, x_columns, bias_ih)
        if job.kind == GRU_AFTER:
            add_row(kernels, job.bias + units, 2 * job.cell_units, bias_hh)
            add_row(kernels, job.bias, job.cell_units, bias_hh + 2 * units)
        else:
            add_row(kernels, job.bias, x_columns, bias_hh)
    fs_restore_denormals(before)


cdef int undo(
    Undo *job, char *weight_ih, char *weight_hh, char *weight_hr, char *bias_ih, char *bias_hh, int n_threads,
) except -1:
    """Undo one direction of a layer."""
    if job.rows == 0 or job.time == 0:
        return 0
    cdef const Transposed *weights = job.weights
    cdef Py_ssize_t lanes = job.kernels.lanes, wide = 4 * lanes
    cdef Py_ssize_t step_work = weights.recurrent.panels * wide * (weights.recurrent.h_size + GATE_WORK)
    step_work += (weights.candidate.panels + weights.projection.panels) * wide * job.cell_units
    cdef Py_ssize_t work = 2 * step_work + 2 * weights.input.panels * wide * weights.input.h_size
    cdef Py_ssize_t limit = CHUNK_WORK * lanes
    job.row_block = min(job.rows, BACK_BLOCK, max(limit // work, 2 * job.kernels.tile_rows[4]))
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
    cdef Py_ssize_t n_bytes = lay_out(job, 0) + 64
    cdef char *scratch = <char *> PyMem_RawMalloc(n_bytes)
    if scratch == NULL:
        raise MemoryError(f"{n_bytes} bytes of scratch")
    lay_out(job, <size_t> scratch + (-<size_t> scratch & 63))
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
            add_gradients(job, bias_ih, bias_hh)
    finally:
        PyMem_RawFree(scratch)
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
    cdef Undo job
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
        transpose(cell)
        job.kernels, job.kind, job.item = cell.w.kernels, cell.w.kind, cell.item
        job.weights = &cell.transposed
        job.cell_units = cell.w.hidden_size
        job.gradient_columns = BACK_GATES[<int> cell.w.kind] * cell.w.hidden_size
        job.x_first = cell.w.hidden_size if cell.w.kind == GRU_AFTER else 0
        job.epilogue = (
            FS_BACK_LSTM if cell.w.kind == LSTM_CELL
            else FS_BACK_GRU_AFTER if cell.w.kind == GRU_AFTER
            else FS_BACK_GRU_OUTPUT if cell.w.kind == GRU_BEFORE
            else FS_BACK_TANH if cell.w.epilogue == FS_TANH
            else FS_BACK_RELU if cell.w.epilogue == FS_RELU
            else FS_BACK_SIGMOID
        )
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
        weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = grads[direction]
        undo(
            &job, bytes_of(weight_ih), bytes_of(weight_hh), bytes_of(weight_hr), bytes_of(bias_ih), bytes_of(bias_hh),
            n_threads,
        )
    return dx, dh_0, dc_0, ((flow_h, flow_c) if keep else None)
