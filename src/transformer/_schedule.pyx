"""A run of Transformer blocks over rows: its steps, made of the description of the blocks, and how threads share them.

Each block of a run says which sublayers it has, in which order, with which weights (`Layer`); `add_block` makes steps
of it. A run is a list of steps over the rows of all sequences, and a team of threads does them together. Steps that
need only their own row stand in one segment, which is done in one of two ways:

* rows: threads take blocks of rows, and do all steps of the segment with a block while it is in their cache;
* panels: where rows are few, each product is a segment of its own. Each thread has panels of its weights, the same in
  every run of a plan: between two steps of decoding they stay in the cache of its core, as keys and values do.

Attention is a segment of its own. The threads meet after every segment. No choice changes a bit of the result: an
output is one chain over k, whoever computes it.
"""

from libc.math cimport sqrt
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from runtime.costs cimport (
    ACTIVATION_WORK, BLOCK_WORK, COPY_WORK, CORE_CACHE, NORM_WORK, READ_WORK, SIGNAL_WORK, threads_for,
)
from runtime.kernels cimport (
    FS_ADD, FS_IDENTITY, FS_PAGE, fs_attention, fs_epilogue, fs_kernels, fs_narrow_bytes, fs_narrow_inputs, fs_page,
    fs_step, fs_weights,
)
from runtime.scratch cimport lines, scratch_allocate, scratch_array, scratch_close
from runtime.team cimport fs_barrier, fs_counter_get, fs_counter_set, fs_take
from transformer.kv_tables cimport fs_page_layer
from fastseq._attention cimport MAX_WINDOW, pair_work, parts_for, set_mask
from fastseq._parallel cimport run_team, team_dissolved, team_wait

ctypedef fused real:
    float
    double

cdef enum:
    ROW_BLOCK = 192      # rows of a block: they read all weights of a segment once, and stay in a core's cache
    FEW_ROWS = 64        # so many rows a thread, and each reads the weights as fast as it multiplies
    POINTER_ROWS = 128   # rows whose pointers are made at once
    GATE_BLOCK = 256     # elements whose sigmoids are computed at once
    MAX_STEPS = 24       # of a block
    FEW_STEPS = 7        # of a block whose threads wait for each other, where rows are few
    # What an element takes beside the products, in multiply-adds.


cdef inline char *row_of(const Place *place, char *own, Py_ssize_t row, Py_ssize_t first) noexcept nogil:
    if place.own >= 0:
        return own + place.own + (row - first) * place.row
    return place.data + row * place.row


cdef void product(
    const fs_kernels *kernels, const Step *s, char *narrow, char *own, Py_ssize_t first, Py_ssize_t last,
    Py_ssize_t panel, Py_ssize_t panel_end,
) noexcept nogil:
    cdef const void *x[POINTER_ROWS]
    cdef const void *init[POINTER_ROWS]
    cdef void *out[POINTER_ROWS]
    cdef fs_step step
    cdef Py_ssize_t row = first, i
    memset(&step, 0, sizeof(step))
    step.weights = s.weights
    step.first = panel
    step.last = panel_end
    step.epilogue = s.epilogue
    step.init = init
    step.h = x
    step.out = out
    step.narrow_h = narrow
    while row < last:
        step.rows = min(POINTER_ROWS, last - row)
        for i in range(step.rows):
            x[i] = row_of(&s.x, own, row + i, first)
            init[i] = s.weights.bias
            out[i] = row_of(&s.y, own, row + i, first)
        fs_narrow_inputs(&step)
        kernels.plain(&step)
        row += POINTER_ROWS


cdef void norm(
    const fs_kernels *kernels, const Step *s, char *sums, char *own, Py_ssize_t first, Py_ssize_t last,
) noexcept nogil:
    cdef const char *x = row_of(&s.x, own, first, first)
    cdef char *y = row_of(&s.y, own, first, first)
    if s.norm.rms:
        kernels.rms_norm(last - first, s.width, s.norm.eps, x, s.norm.weight, y, sums)
    else:
        kernels.layer_norm(
            last - first, s.width, s.norm.eps, x, s.norm.weight, s.norm.bias, y, sums,
            sums + (last - first) * kernels.item_size,
        )


cdef void rotate(const fs_kernels *kernels, const Step *s, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef Py_ssize_t row, angles
    cdef char *heads
    for row in range(first, last):
        heads = s.x.data + row * s.x.row
        angles = s.positions[row] * (s.rotary_dim // 2) * kernels.item_size
        kernels.rotary(
            s.heads, s.width, s.width, s.rotary_dim, s.interleaved, 0, heads, s.cos + angles, s.sin + angles, heads,
        )


cdef void pad_heads(Py_ssize_t item, const Step *s, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef Py_ssize_t row, head, n_bytes = min(s.width, s.y_width) * item
    cdef char *y
    for row in range(first, last):
        for head in range(s.heads):
            y = s.y.data + row * s.y.row + head * s.y_width * item
            memcpy(y, s.x.data + row * s.x.row + head * s.width * item, n_bytes)
            memset(y + n_bytes, 0, s.y_width * item - n_bytes)


cdef void append_kv(const fs_kernels *kernels, const Step *s, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef Py_ssize_t row
    cdef int64_t position
    cdef const char *keys
    for row in range(first, last):
        position = s.positions[row]
        keys = s.x.data + row * s.x.row
        kernels.page_store(
            s.heads, s.width, s.width, keys, keys + s.heads * s.width * kernels.item_size,
            s.pages[s.whose[row]][position // FS_PAGE], s.page_layer, position % FS_PAGE,
        )


cdef void multiply_gated(
    Gate gate, Py_ssize_t n, const real *x, const real *gated, const real *sigmoids, real *y,
) noexcept nogil:
    cdef Py_ssize_t i
    if gate == SILU_GATE:
        for i in range(n):
            y[i] = x[i] * sigmoids[i] * gated[i]
    else:
        for i in range(n):
            y[i] = x[i] * gated[i]


cdef void apply_gate(
    const fs_kernels *kernels, const Step *s, char *own, Py_ssize_t first, Py_ssize_t last,
) noexcept nogil:
    """y = x * gated, or silu(x) * gated with silu(x) = x * sigmoid(x)"""
    cdef double sigmoids[GATE_BLOCK]
    cdef Py_ssize_t row, at, n, bytes_before
    cdef char *x
    cdef char *y
    cdef char *gated
    for row in range(first, last):
        at = 0
        while at < s.width:
            n = min(GATE_BLOCK, s.width - at)
            bytes_before = at * kernels.item_size
            x = row_of(&s.x, own, row, first) + bytes_before
            y = row_of(&s.y, own, row, first) + bytes_before
            gated = row_of(&s.gated, own, row, first) + bytes_before
            if s.gate == SILU_GATE:
                kernels.sigmoid(n, x, sigmoids)
            if kernels.item_size == sizeof(float):
                multiply_gated[float](s.gate, n, <float *> x, <float *> gated, <float *> sigmoids, <float *> y)
            else:
                multiply_gated[double](s.gate, n, <double *> x, <double *> gated, sigmoids, <double *> y)
            at += n


cdef void do_item(const Plan *plan, const Segment *segment, Py_ssize_t item, char *scratch) noexcept nogil:
    """One item of a segment, by one thread."""
    cdef const Step *s = &plan.steps[segment.first]
    cdef Py_ssize_t first = item * segment.rows_each, last = min(s.rows, first + segment.rows_each), i
    cdef char *sums = scratch + plan.attend_bytes
    cdef char *narrow = sums + plan.norm_bytes
    cdef char *own = narrow + plan.narrow_bytes
    if s.kind == ATTEND:
        if segment.heads_parts:
            first, i = item // segment.heads_parts, item % segment.heads_parts
            plan.kernels.attend_decode(
                &s.attention, first, s.attention.heads * i // segment.heads_parts,
                s.attention.heads * (i + 1) // segment.heads_parts, scratch,
            )
        else:
            plan.kernels.attend(&s.attention, item, scratch)
        return
    if segment.panels_each:
        first = item * segment.panels_each
        product(plan.kernels, s, narrow, NULL, 0, s.rows, first, min(s.weights.panels, first + segment.panels_each))
        return
    for i in range(segment.first, segment.last):
        s = &plan.steps[i]
        if s.kind == PRODUCT:
            product(plan.kernels, s, narrow, own, first, last, 0, s.weights.panels)
        elif s.kind == NORM:
            norm(plan.kernels, s, sums, own, first, last)
        elif s.kind == ROTARY:
            rotate(plan.kernels, s, first, last)
        elif s.kind == APPEND_KV:
            append_kv(plan.kernels, s, first, last)
        elif s.kind == GATE:
            apply_gate(plan.kernels, s, own, first, last)
        else:
            pad_heads(plan.kernels.item_size, s, first, last)


cdef void run_steps(void *made, int thread, int team, fs_barrier *barrier) noexcept nogil:
    """What one thread of a team takes, which ends early where the team dissolves."""
    cdef Plan *plan = <Plan *> made
    cdef char *scratch = plan.scratch + thread * plan.scratch_each
    cdef Segment *s
    cdef Py_ssize_t segment = plan.first_segment, item, end
    while segment <= plan.last_segment:
        s = &plan.segments[segment]
        end = plan.last_item if segment == plan.last_segment else s.items
        if plan.steps[s.first].kind == ATTEND:
            (<int64_t *> scratch)[0] = -1  # whose keys are packed there
        if s.shared_out:
            item = fs_counter_get(&s.counter)
            for item in range(item + (end - item) * thread // team, item + (end - item) * (thread + 1) // team):
                do_item(plan, s, item, scratch)
        else:
            item = fs_take(&s.counter)
            while item < end:
                do_item(plan, s, item, scratch)
                item = fs_take(&s.counter)
        if team > 1:
            team_wait(barrier, team)
            if team_dissolved(barrier):
                if thread == 0 and segment < plan.last_segment:
                    plan.last_segment, plan.last_item = segment, s.items
                return
        segment += 1


cdef void run_some_steps(Plan *plan, Cursor *cursor) noexcept nogil:
    """Go on from where the cursor stands, until it is time to look for Ctrl-C; at least an item for each thread."""
    cdef Py_ssize_t first = cursor.segment, last = first, last_item = cursor.item, each
    cdef double budget = <double> plan.threads * SIGNAL_WORK, left
    fs_counter_set(&plan.segments[first].counter, last_item)
    while True:
        left = plan.segments[last].items - last_item
        if left * plan.segments[last].work > budget and last_item + plan.threads < plan.segments[last].items:
            # As many for each thread, or some would wait for the others.
            each = <Py_ssize_t> (budget / plan.segments[last].work) // plan.threads
            last_item += max(each, 1) * plan.threads
            break
        budget -= left * plan.segments[last].work
        last_item = plan.segments[last].items
        if last + 1 == plan.n_segments or budget <= 0:
            break
        last += 1
        last_item = 0
        fs_counter_set(&plan.segments[last].counter, 0)
    plan.first_segment, plan.last_segment, plan.last_item = first, last, last_item
    run_team(run_steps, plan, plan.threads, plan.n_threads)
    cursor.segment, cursor.item = plan.last_segment, plan.last_item
    if plan.last_item == plan.segments[plan.last_segment].items:
        cursor.segment, cursor.item = plan.last_segment + 1, 0


# From blocks to steps.


cdef Place place(Plan *plan, Py_ssize_t rows, Py_ssize_t width) noexcept nogil:
    """Room for some rows."""
    cdef Place place
    place.row = width * plan.item
    place.own = -1
    place.data = plan.memory + plan.n_bytes
    plan.n_bytes += lines(rows * place.row)
    return place


cdef Place own_place(Plan *plan, Py_ssize_t rows, Py_ssize_t width) noexcept nogil:
    """Room for rows that no other block of rows sees: of each thread, where blocks of rows are taken."""
    cdef Place own
    if plan.few:
        return place(plan, rows, width)
    own.row = width * plan.item
    own.own = plan.own_bytes
    own.data = NULL
    plan.own_bytes += lines(ROW_BLOCK * own.row)
    return own


cdef Place given_place(const char *data, Py_ssize_t row) noexcept nogil:
    """Rows that have their place."""
    cdef Place given
    given.data = <char *> data
    given.row = row
    given.own = -1
    return given


cdef Place part_of(Place rows, Py_ssize_t n_bytes) noexcept nogil:
    """What stands in each row after its first bytes."""
    rows.data += n_bytes
    return rows


cdef Step *add(Plan *plan, StepKind kind, Py_ssize_t rows, Place x, Place y) noexcept nogil:
    cdef Step *step = &plan.steps[plan.n_steps]
    plan.n_steps += 1
    memset(step, 0, sizeof(Step))
    step.kind = kind
    step.rows = rows
    step.x = x
    step.y = y
    return step


cdef void add_product(
    Plan *plan, Py_ssize_t rows, Place x, Place y, const fs_weights *weights, fs_epilogue epilogue,
) noexcept nogil:
    cdef Step *step = add(plan, PRODUCT, rows, x, y)
    step.weights = weights
    step.epilogue = epilogue
    step.work = rows * product_work(weights)


cdef void add_norm(Plan *plan, Py_ssize_t rows, Py_ssize_t width, Place x, Place y, const Norm *norm) noexcept nogil:
    cdef Step *step = add(plan, NORM, rows, x, y)
    step.norm = norm[0]
    step.width = width
    step.work = <double> NORM_WORK * rows * width


cdef void add_pad_heads(
    Plan *plan, Py_ssize_t rows, Place x, Place y, Py_ssize_t heads, Py_ssize_t width, Py_ssize_t y_width,
) noexcept nogil:
    cdef Step *step
    if width == y_width:
        return
    step = add(plan, PAD_HEADS, rows, x, y)
    step.heads = heads
    step.width = width
    step.y_width = y_width
    step.work = <double> COPY_WORK * rows * heads * y_width


cdef void add_rotary(Plan *plan, const Task *task, const Layer *layer, Place heads) noexcept nogil:
    """Queries and keys turned by their positions, in place."""
    cdef Step *step = add(plan, ROTARY, task.rows, heads, heads)
    step.heads = layer.heads + layer.kv_heads
    step.width = layer.head_dim
    step.rotary_dim = layer.rotary_dim
    step.interleaved = layer.interleaved
    step.cos = layer.cos
    step.sin = layer.sin
    step.positions = task.positions
    step.work = <double> COPY_WORK * task.rows * step.heads * step.width


cdef void add_append_kv(
    Plan *plan, const Task *task, Place keys, fs_page ***pages, Py_ssize_t layer,
) noexcept nogil:
    cdef Step *step = add(plan, APPEND_KV, task.rows, keys, keys)
    step.heads = task.kind.kv_heads
    step.width = task.kind.width
    step.positions = task.positions
    step.whose = task.whose
    step.pages = pages
    step.page_layer = layer * fs_page_layer(task.kind)
    step.work = <double> COPY_WORK * task.rows * step.heads * step.width


cdef void add_gate(Plan *plan, Py_ssize_t rows, Py_ssize_t width, Place x, Place gated, Gate gate) noexcept nogil:
    cdef Step *step = add(plan, GATE, rows, x, x)
    step.width = width
    step.gated = gated
    step.gate = gate
    step.work = <double> (ACTIVATION_WORK if gate == SILU_GATE else COPY_WORK) * rows * width


# The places that every block uses anew. `whole` heads have the width of whole vectors; where a head has that anyway,
# both places are one.
cdef struct Places:
    Py_ssize_t whole           # elements of a whole head
    Place stream
    Place normal               # what a norm gives that stands before its sublayer
    Place qkv                  # of self-attention: queries, keys and values
    Place whole_qkv
    Place q                    # of attention to a memory
    Place whole_q
    Place memory
    Place kv                   # of the memory
    Place whole_kv
    Place stats                # of the softmax
    Place whole_context        # what attention gives
    Place context
    Place hidden               # of feed-forward
    Place gated


cdef void set_kv_places(Places *at, Plan *plan, const Task *task, Py_ssize_t rows) noexcept nogil:
    """Places for the keys and values of a memory of some rows."""
    cdef const Layer *layer = task.layers[0]
    cdef Py_ssize_t lanes = task.kernels.lanes
    at.whole = (layer.head_dim + lanes - 1) // lanes * lanes
    at.memory = given_place(task.memory, task.memory_row)
    at.kv = place(plan, rows, 2 * layer.kv_heads * layer.head_dim)
    at.whole_kv = at.kv if at.whole == layer.head_dim else place(plan, rows, 2 * layer.kv_heads * at.whole)


cdef void set_places(Places *at, Plan *plan, const Task *task) noexcept nogil:
    cdef const Layer *layer = task.layers[0]
    cdef const Sublayer *sublayer
    cdef Py_ssize_t rows = task.rows, size = layer.head_dim, all_heads = layer.heads + 2 * layer.kv_heads
    cdef Py_ssize_t hidden = 0, gated = 0, i, j
    for i in range(task.n_layers):
        for j in range(task.layers[i].n_sublayers):
            sublayer = &task.layers[i].sublayers[j]
            if sublayer.kind == FEED_FORWARD:
                hidden = max(hidden, sublayer.input.units)
                if sublayer.gated != NULL:
                    gated = max(gated, sublayer.gated.units)
    set_kv_places(at, plan, task, task.memory_rows)
    at.stream = given_place(task.stream, task.width * plan.item)
    at.stats = place(plan, 1, 2 * task.batch * layer.heads * task.longest)
    at.normal = own_place(plan, rows, task.width)
    at.hidden = own_place(plan, rows, hidden)
    at.gated = own_place(plan, rows, gated)
    at.qkv = place(plan, rows, all_heads * size)
    at.whole_qkv = at.qkv if at.whole == size else place(plan, rows, all_heads * at.whole)
    at.whole_context = place(plan, rows, layer.heads * at.whole)
    at.context = at.whole_context if at.whole == size else place(plan, rows, layer.heads * size)
    # Attention to a memory comes after self-attention, whose places it takes.
    at.q, at.whole_q = at.qkv, at.whole_qkv
    at.q.row = layer.heads * size * plan.item
    at.whole_q.row = layer.heads * at.whole * plan.item


cdef void add_kv_of_memory(
    Plan *plan, const Task *task, Py_ssize_t rows, const Places *at, const fs_weights *weights,
) noexcept nogil:
    """The keys and values that a block makes of a memory of some rows."""
    cdef const Layer *layer = task.layers[0]
    add_product(plan, rows, at.memory, at.kv, weights, FS_IDENTITY)
    add_pad_heads(plan, rows, at.kv, at.whole_kv, 2 * layer.kv_heads, layer.head_dim, at.whole)


cdef void set_keys(
    fs_attention *job, Place k, Py_ssize_t kv_heads, Py_ssize_t whole, int item, const int64_t *starts,
) noexcept nogil:
    """Where keys are, and values after all keys of a row."""
    job.k.data, job.k.row, job.k.head = k.data, k.row // item, whole
    job.v.data, job.v.row, job.v.head = k.data + kv_heads * whole * item, k.row // item, whole
    job.k_starts = starts


cdef void set_pages(
    fs_attention *job, const Task *task, fs_page ***pages, const int64_t *lengths, Py_ssize_t layer,
) noexcept nogil:
    """The same, in pages."""
    job.pages = pages
    job.page_layer = layer * fs_page_layer(task.kind)
    job.lengths = lengths


cdef void add_attention(
    Plan *plan, const Task *task, const Layer *layer, const Places *at, Place q, const fs_weights *output,
    fs_attention *job,
) noexcept nogil:
    """Attention of all rows, and its output projection; the job says where keys and values are."""
    cdef Place nowhere = given_place(NULL, 0)
    cdef Step *step
    job.batch = task.batch
    job.heads = layer.heads
    job.kv_heads = layer.kv_heads
    job.width = job.value_width = at.whole
    job.max_queries = task.longest
    job.q.data, job.q.row, job.q.head = q.data, q.row // plan.item, at.whole
    job.out.data, job.out.row, job.out.head = at.whole_context.data, at.whole_context.row // plan.item, at.whole
    job.q_starts = task.starts
    job.stats = at.stats.data
    job.scale = 1 / sqrt(<double> layer.head_dim)
    job.factor = 1
    job.parts = 1
    step = add(plan, ATTEND, task.rows, nowhere, nowhere)
    step.attention = job[0]
    step.work = job.batch * job.kv_heads * pair_work(job)
    add_pad_heads(plan, task.rows, at.whole_context, at.context, layer.heads, at.whole, layer.head_dim)
    add_product(plan, task.rows, at.context, at.stream, output, FS_ADD)


cdef void add_self_attention(
    Plan *plan, const Task *task, Py_ssize_t i, const Sublayer *sublayer, const Places *at, Place x,
) noexcept nogil:
    cdef const Layer *layer = task.layers[i]
    cdef Place keys = part_of(at.whole_qkv, layer.heads * at.whole * plan.item)
    cdef fs_attention job
    add_product(plan, task.rows, x, at.qkv, sublayer.input, FS_IDENTITY)
    if layer.cos != NULL:
        add_rotary(plan, task, layer, at.qkv)
    add_pad_heads(
        plan, task.rows, at.qkv, at.whole_qkv, layer.heads + 2 * layer.kv_heads, layer.head_dim, at.whole,
    )
    memset(&job, 0, sizeof(job))
    if task.pages != NULL:
        add_append_kv(plan, task, keys, task.pages, i)
        set_pages(&job, task, task.pages, task.lengths, i)
        job.max_keys = task.longest_kept
    else:
        set_keys(&job, keys, layer.kv_heads, at.whole, plan.item, task.starts)
        job.max_keys = task.longest
    job.causal = task.causal
    job.window = min(layer.window, MAX_WINDOW)
    job.weights = task.weights[2 * i] if task.weights != NULL else NULL
    set_mask(&job, &task.mask)
    add_attention(plan, task, layer, at, at.whole_qkv, sublayer.output, &job)


cdef void add_cross_attention(
    Plan *plan, const Task *task, Py_ssize_t i, const Sublayer *sublayer, const Places *at, Place x,
) noexcept nogil:
    """Attention to the memory, whose keys and values are there."""
    cdef const Layer *layer = task.layers[i]
    cdef fs_attention job
    add_product(plan, task.rows, x, at.q, sublayer.input, FS_IDENTITY)
    add_pad_heads(plan, task.rows, at.q, at.whole_q, layer.heads, layer.head_dim, at.whole)
    memset(&job, 0, sizeof(job))
    if task.memory_pages != NULL:
        set_pages(&job, task, task.memory_pages, task.memory_lengths, i)
    else:
        set_keys(&job, at.whole_kv, layer.kv_heads, at.whole, plan.item, task.memory_starts)
    job.max_keys = task.longest_memory
    job.weights = task.weights[2 * i + 1] if task.weights != NULL else NULL
    set_mask(&job, &task.memory_mask)
    add_attention(plan, task, layer, at, at.whole_q, sublayer.output, &job)


cdef void add_feed_forward(
    Plan *plan, const Task *task, const Sublayer *sublayer, const Places *at, Place x,
) noexcept nogil:
    add_product(plan, task.rows, x, at.hidden, sublayer.input, sublayer.activation)
    if sublayer.gate != NO_GATE:
        add_product(plan, task.rows, x, at.gated, sublayer.gated, FS_IDENTITY)
        add_gate(plan, task.rows, sublayer.gated.units, at.hidden, at.gated, sublayer.gate)
    add_product(plan, task.rows, at.hidden, at.stream, sublayer.output, FS_ADD)


cdef void add_block(Plan *plan, const Task *task, Py_ssize_t i, const Places *at) noexcept nogil:
    """The steps of a block: each sublayer, with its norm before it or after the sum."""
    cdef const Layer *layer = task.layers[i]
    cdef const Sublayer *sublayer
    cdef Place x = at.normal if layer.norm_first else at.stream
    cdef int j
    for j in range(layer.n_sublayers):  # first, so that they divide no segment of the other rows
        if layer.sublayers[j].kind == CROSS_ATTENTION and task.memory_pages == NULL:
            add_kv_of_memory(plan, task, task.memory_rows, at, layer.sublayers[j].memory)
    for j in range(layer.n_sublayers):
        sublayer = &layer.sublayers[j]
        if layer.norm_first:
            add_norm(plan, task.rows, task.width, at.stream, at.normal, &sublayer.norm)
        if sublayer.kind == SELF_ATTENTION:
            add_self_attention(plan, task, i, sublayer, at, x)
        elif sublayer.kind == CROSS_ATTENTION:
            add_cross_attention(plan, task, i, sublayer, at, x)
        else:
            add_feed_forward(plan, task, sublayer, at, x)
        if not layer.norm_first:
            add_norm(plan, task.rows, task.width, at.stream, at.stream, &sublayer.norm)


cdef void lay_out_blocks(Plan *plan, const Task *task) noexcept nogil:
    """The steps of all blocks, and what comes after the last."""
    cdef Places at
    cdef Py_ssize_t i
    set_places(&at, plan, task)
    if plan.steps == NULL:
        return
    for i in range(task.n_layers):
        add_block(plan, task, i, &at)
    if task.has_final:
        add_norm(plan, task.rows, task.width, at.stream, at.stream, &task.final)
    if task.output != NULL:
        add_product(
            plan, task.rows, at.stream, given_place(task.outputs, task.output.units * plan.item), task.output,
            FS_IDENTITY,
        )


cdef void lay_out_memory(Plan *plan, const Task *task) noexcept nogil:
    """The steps that put the keys and values of a memory, which every block makes of it, into pages."""
    cdef const Layer *layer
    cdef Places at
    cdef Py_ssize_t i
    cdef int j
    set_kv_places(&at, plan, task, task.rows)
    if plan.steps == NULL:
        return
    for i in range(task.n_layers):
        layer = task.layers[i]
        for j in range(layer.n_sublayers):
            if layer.sublayers[j].kind == CROSS_ATTENTION:
                add_kv_of_memory(plan, task, task.rows, &at, layer.sublayers[j].memory)
                add_append_kv(plan, task, at.whole_kv, task.memory_pages, i)


cdef void lay_out(Plan *plan, const Task *task, bint of_memory) noexcept nogil:
    """Count the bytes that the rows of a run take and, where they and the steps have room, make the steps."""
    plan.n_steps = plan.n_bytes = plan.own_bytes = 0
    if of_memory:
        lay_out_memory(plan, task)
    else:
        lay_out_blocks(plan, task)


# From steps to segments.


cdef double product_work(const fs_weights *weights) noexcept nogil:
    """Multiply-adds of a row."""
    return 0 if weights == NULL else <double> weights.units * weights.h_size


cdef double block_work(const Layer *layer) noexcept nogil:
    """Multiply-adds of a row in the products of a block. Attention to a memory is not counted: it adds steps, too."""
    cdef double work = 0
    cdef int j
    cdef const Sublayer *sublayer
    for j in range(layer.n_sublayers):
        sublayer = &layer.sublayers[j]
        if sublayer.kind != CROSS_ATTENTION:
            work += product_work(sublayer.input) + product_work(sublayer.gated) + product_work(sublayer.output)
    return work


cdef Py_ssize_t rows_each(Py_ssize_t rows, int n_threads) noexcept nogil:
    """Rows of a block: as many blocks for each thread, of even height, whole tiles where that is possible."""
    cdef Py_ssize_t blocks = (rows + ROW_BLOCK * n_threads - 1) // (ROW_BLOCK * n_threads) * n_threads
    cdef Py_ssize_t each = (rows + blocks - 1) // blocks
    return min(ROW_BLOCK, (each + 5) // 6 * 6)


cdef bint is_decode_step(const fs_attention *job) noexcept nogil:
    """Whether it is a step of decoding, at which `attend_decode` is quicker."""
    return job.pages != NULL and job.max_queries == 1 and job.mask == NULL and job.weights == NULL


cdef void split_attention(Segment *s, fs_attention *job, int n_threads) noexcept nogil:
    """The items of a segment that is attention."""
    if is_decode_step(job):
        # As many heads for each thread.
        s.heads_parts = 1 if job.batch % n_threads == 0 else min(job.heads, n_threads)
        s.items = job.batch * s.heads_parts
    else:
        job.parts = parts_for(job, n_threads)
        s.items = job.batch * job.kv_heads * job.parts


cdef void split_panels(Segment *s, const Step *step, int n_threads) noexcept nogil:
    """The items of a segment that is one product: as many for each thread, and more where Ctrl-C would wait for one."""
    cdef Py_ssize_t panels = step.weights.panels
    s.panels_each = max(
        1, min((panels + n_threads - 1) // n_threads, <Py_ssize_t> (SIGNAL_WORK * panels / max(1.0, step.work))),
    )
    s.items = (panels + s.panels_each - 1) // s.panels_each


cdef void split_rows(Segment *s, Py_ssize_t rows, bint few, int n_threads) noexcept nogil:
    """The items of a segment whose steps need only their own row."""
    s.rows_each = max(1, (rows + n_threads - 1) // n_threads) if few else rows_each(rows, n_threads)
    s.items = (rows + s.rows_each - 1) // s.rows_each


cdef bint stands_alone(const Plan *plan, const Step *step) noexcept nogil:
    """Whether a step is a segment of its own."""
    return step.kind == ATTEND or (plan.few and step.kind == PRODUCT)


cdef void make_segments(Plan *plan) noexcept nogil:
    """The steps as segments."""
    cdef Py_ssize_t i = 0
    cdef Segment *s
    cdef Step *step
    cdef double work
    plan.n_segments = 0
    while i < plan.n_steps:
        step = &plan.steps[i]
        s = &plan.segments[plan.n_segments]
        plan.n_segments += 1
        memset(s, 0, sizeof(Segment))
        s.first = i
        s.shared_out = plan.few
        work = step.work
        i += 1
        if step.kind == ATTEND:
            split_attention(s, &step.attention, plan.threads)
        elif stands_alone(plan, step):
            split_panels(s, step, plan.threads)
        else:
            while i < plan.n_steps and plan.steps[i].rows == step.rows and not stands_alone(plan, &plan.steps[i]):
                work += plan.steps[i].work
                i += 1
            split_rows(s, step.rows, plan.few, plan.threads)
        s.last = i
        s.work = work / max(1, s.items)


cdef void plan_free(Plan *plan) noexcept nogil:
    scratch_close(&plan.lists)
    scratch_close(&plan.of_threads)
    memset(plan, 0, sizeof(Plan))


cdef void choose_threads(Plan *plan, const Task *task, bint of_memory, int n_threads) noexcept nogil:
    """How many threads pay for a run, and how they split it."""
    cdef double work = 0, work_each
    cdef Py_ssize_t i
    for i in range(task.n_layers):
        work += block_work(task.layers[i])
    plan.n_threads = n_threads
    plan.threads = threads_for(task.rows, work, n_threads)
    if task.rows < FEW_ROWS and not of_memory:
        work_each = max(task.rows, READ_WORK) if work * plan.item > CORE_CACHE else task.rows
        plan.threads = <int> max(
            1, min(<double> n_threads, work_each * work / (<double> FEW_STEPS * task.n_layers * BLOCK_WORK)),
        )
    plan.few = task.rows < FEW_ROWS * plan.threads


cdef int make_scratch(Plan *plan) noexcept nogil:
    """The scratch memory of each thread; -1 without memory."""
    cdef Py_ssize_t i
    for i in range(plan.n_steps):
        if plan.steps[i].kind == ATTEND:
            plan.attend_bytes = max(plan.attend_bytes, plan.kernels.attend_scratch(&plan.steps[i].attention))
        elif plan.steps[i].kind == PRODUCT:
            plan.narrow_bytes = max(
                plan.narrow_bytes,
                fs_narrow_bytes(plan.steps[i].weights, False, min(POINTER_ROWS, plan.steps[i].rows)),
            )
    plan.attend_bytes = lines(plan.attend_bytes * plan.item)
    plan.norm_bytes = lines(2 * ROW_BLOCK * plan.item)
    plan.scratch_each = plan.attend_bytes + plan.norm_bytes + plan.narrow_bytes + plan.own_bytes
    scratch_array(&plan.of_threads, plan.threads * plan.scratch_each)
    if scratch_allocate(&plan.of_threads):
        return -1
    plan.scratch = plan.of_threads.base
    return 0


cdef void lay_out_lists(Plan *plan, Py_ssize_t n_bytes, Py_ssize_t max_steps) noexcept nogil:
    """Give the rows between steps, the steps and the segments their places."""
    plan.memory = scratch_array(&plan.lists, n_bytes)
    plan.steps = <Step *> scratch_array(&plan.lists, max_steps * sizeof(Step))
    plan.segments = <Segment *> scratch_array(&plan.lists, max_steps * sizeof(Segment))


cdef int plan_make(Plan *plan, const Task *task, bint of_memory, int n_threads) noexcept nogil:
    """Steps, segments and memory of a run; -1 without memory."""
    cdef Py_ssize_t max_steps = MAX_STEPS * task.n_layers + 2, n_bytes
    memset(plan, 0, sizeof(Plan))
    plan.kernels = task.kernels
    plan.item = task.kernels.item_size
    choose_threads(plan, task, of_memory, n_threads)
    lay_out(plan, task, of_memory)  # counts the bytes
    n_bytes = plan.n_bytes
    lay_out_lists(plan, n_bytes, max_steps)
    if scratch_allocate(&plan.lists):
        return -1
    lay_out_lists(plan, n_bytes, max_steps)
    lay_out(plan, task, of_memory)
    make_segments(plan)
    if make_scratch(plan):
        plan_free(plan)
        return -1
    return 0


cdef void set_outputs(Plan *plan, void *outputs) noexcept nogil:
    """Where the last step writes: that of a plan whose task has an output product."""
    plan.steps[plan.n_steps - 1].y.data = <char *> outputs
