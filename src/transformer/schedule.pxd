"""A run of Transformer blocks over rows: what its steps are, who does them, and in which memory.

A run is a list of steps over the rows of all sequences, and a team of threads walks it together. Steps that need no
more than their own row stand in one segment, which is done in one of two ways:

* rows: threads take blocks of rows, and go through all steps of the segment with a block while it is in their cache;
* panels: where rows are few, each product is a segment of its own. Each thread has panels of its weights, the same in
  every run of a plan: between two steps of decoding they stay in the cache of its core, as keys and values do.

Attention is a segment of its own. The threads meet after every segment. No choice changes a bit of the result: an
output is one chain over k, whoever computes it.
"""

from libc.math cimport sqrt
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from runtime.kernels cimport (
    FS_ADD, FS_IDENTITY, FS_PAGE, fs_attention, fs_epilogue, fs_kernels, fs_page, fs_step, fs_weights,
)
from transformer.kv_tables cimport fs_page_kind, fs_page_layer
from fastseq._parallel cimport (
    CACHE_LINE, SIGNAL_WORK, fs_barrier, fs_counter, fs_counter_get, fs_counter_set, fs_take, lines, run_team,
    team_dissolved, team_wait, threads_for,
)

cdef extern from *:
    """
    enum { MAX_WINDOW = 1 << 30 };
    """
    enum:
        MAX_WINDOW          # more keys than any sequence has

cdef enum Kind:
    PRODUCT  # y = f(x W^T + b), or y += that
    NORM
    ROTARY     # queries and keys by their positions, in place
    PAD_HEADS     # heads of one width into heads of another, zeros behind them
    APPEND_KV     # keys and values into pages
    ATTEND

cdef enum:
    ROW_BLOCK = 192      # rows of a block: they read all weights of a segment once, and stay in a core's cache
    FEW_ROWS = 64        # so many rows a thread, and each reads the weights as fast as it multiplies
    POINTER_ROWS = 128   # rows whose pointers are made at once
    MAX_STEPS = 24      # of a block
    ITEMS = 4            # items each thread finds at least, where there are so many
    FEW_STEPS = 7        # of a block whose threads wait for each other, where rows are few
    FEW_WORK = 1 << 17   # multiply-adds of such a step for each thread, or waiting costs more than it gives
    CACHE = 1 << 20      # bytes of weights that surely stay in a core's own cache;
    READ_WORK = 12       # if they do not, to read one takes as long as so many multiply-adds

# What an element of a norm, of a copy, and a weight of attention takes beside the products, in multiply-adds.
cdef enum:
    NORM_WORK = 24
    PAD_WORK = 8
    WEIGHT_WORK = 32


cdef struct Norm:
    bint rms
    double eps
    const char *weight
    const char *bias


cdef struct Mask:
    const void *data           # NULL: none
    bint is_bool
    Py_ssize_t strides[3]


# The weights and settings of one block.
cdef struct Layer:
    Py_ssize_t heads
    Py_ssize_t kv_heads
    Py_ssize_t head_dim
    Py_ssize_t window          # 0: none
    fs_epilogue activation
    bint norm_first
    bint cross
    bint interleaved
    const fs_weights *in_proj
    const fs_weights *out_proj
    const fs_weights *linear1
    const fs_weights *linear2
    const fs_weights *cross_q
    const fs_weights *cross_kv
    const fs_weights *cross_out
    Norm norms[3]
    const char *cos            # [positions][rotary_dim / 2], or NULL
    const char *sin
    Py_ssize_t rotary_dim


# What a run is over. All sequences stand one after another, as rows.
cdef struct Task:
    const fs_kernels *kernels
    Layer **layers
    Py_ssize_t n_layers
    Py_ssize_t batch
    Py_ssize_t rows
    Py_ssize_t width
    char *stream               # IN, OUT [rows][width]
    const int64_t *starts      # [batch + 1] first row of each sequence
    const int64_t *positions   # [rows] for rotary positions and for pages
    Py_ssize_t longest         # rows of a sequence
    bint causal
    Mask mask
    const char *memory         # [memory_rows], memory_row bytes apart; NULL: there is none, or it is in pages
    Py_ssize_t memory_row
    Py_ssize_t memory_rows
    const int64_t *memory_starts
    Py_ssize_t longest_memory
    Mask memory_mask
    char **weights             # OUT of each block its own [batch][heads][longest][longest], and the memory's; or NULL
    bint has_final
    Norm final
    const fs_weights *output   # a product after the last norm, or NULL
    char *outputs              # OUT [rows][output.units]
    # Where keys and values are kept, those of the rows among them; pages NULL: nowhere.
    const fs_page_kind *kind
    fs_page ***pages     # [batch][pages]
    const int64_t *whose       # [rows] of which sequence each is
    const int64_t *lengths     # [batch] keys, those of the rows among them
    Py_ssize_t longest_kept
    fs_page ***memory_pages
    const int64_t *memory_lengths


# Rows: the first, and the bytes from one to the next. Where there is only room for a block of them, which each thread
# has for itself, the first row of a block is that many bytes from where a thread's own rows begin.
cdef struct Place:
    char *data
    Py_ssize_t row
    Py_ssize_t own             # -1: none of that


cdef struct Step:
    Kind kind
    Py_ssize_t rows
    Place x
    Place y
    const fs_weights *weights  # PRODUCT
    fs_epilogue epilogue
    Norm norm                  # NORM, of `width` elements
    Py_ssize_t width           # or of a head, ROTARY, PAD_HEADS and APPEND_KV
    Py_ssize_t heads
    Py_ssize_t y_width         # PAD_HEADS
    Py_ssize_t rotary_dim          # ROTARY
    bint interleaved
    const char *cos
    const char *sin
    const int64_t *positions   # ROTARY and APPEND_KV
    const int64_t *whose       # APPEND_KV: x holds keys, and values after all keys
    fs_page ***pages
    Py_ssize_t page_layer
    fs_attention attention     # ATTEND
    double work                # multiply-adds, of all of it


cdef struct Segment:
    Py_ssize_t first           # steps [first, last)
    Py_ssize_t last
    Py_ssize_t items
    Py_ssize_t rows_each       # rows of an item, or
    Py_ssize_t panels_each     # panels of an item; 0: rows
    Py_ssize_t heads_parts     # items of a sequence for `attend_decode`, each some of its heads; 0: items of `attend`
    double work                # of an item
    bint dealt                 # items are dealt out, not taken
    fs_counter counter         # the next to be taken, or where dealing begins


# How far a run is: what comes next.
cdef struct Cursor:
    Py_ssize_t segment
    Py_ssize_t item


cdef struct Plan:
    const fs_kernels *kernels
    int item
    int threads                # that pay
    int n_threads              # that there may be
    bint few                   # rows: panels are split
    Py_ssize_t n_steps
    Step *steps
    Py_ssize_t n_segments
    Segment *segments
    char *room                 # everything
    char *memory               # rows that steps share; NULL while its size is being counted
    Py_ssize_t n_bytes         # of it
    Py_ssize_t own_bytes       # of a thread's own rows
    char *scratch_room
    char *scratch              # in it, of each thread
    Py_ssize_t scratch_each
    Py_ssize_t attend_bytes    # of them, for attention; then for norms; then the rows of its own
    Py_ssize_t norm_bytes
    # What is done now: from where the counters stand through `last_item` of the last segment.
    Py_ssize_t first_segment
    Py_ssize_t last_segment
    Py_ssize_t last_item


cdef inline char *row_of(const Place *place, char *own, Py_ssize_t row, Py_ssize_t first) noexcept nogil:
    if place.own >= 0:
        return own + place.own + (row - first) * place.row
    return place.data + row * place.row


cdef inline void product(
    const fs_kernels *kernels, const Step *s, char *own, Py_ssize_t first, Py_ssize_t last, Py_ssize_t panel,
    Py_ssize_t panel_end,
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
    while row < last:
        step.rows = min(POINTER_ROWS, last - row)
        for i in range(step.rows):
            x[i] = row_of(&s.x, own, row + i, first)
            init[i] = s.weights.bias
            out[i] = row_of(&s.y, own, row + i, first)
        kernels.plain(&step)
        row += POINTER_ROWS


cdef inline void norm(
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


cdef inline void rotate(const fs_kernels *kernels, const Step *s, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef Py_ssize_t row, angles
    cdef char *heads
    for row in range(first, last):
        heads = s.x.data + row * s.x.row
        angles = s.positions[row] * (s.rotary_dim // 2) * kernels.item_size
        kernels.rotary(
            s.heads, s.width, s.width, s.rotary_dim, s.interleaved, 0, heads, s.cos + angles, s.sin + angles, heads,
        )


cdef inline void copy(Py_ssize_t item, const Step *s, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef Py_ssize_t row, head, n_bytes = min(s.width, s.y_width) * item
    cdef char *y
    for row in range(first, last):
        for head in range(s.heads):
            y = s.y.data + row * s.y.row + head * s.y_width * item
            memcpy(y, s.x.data + row * s.x.row + head * s.width * item, n_bytes)
            memset(y + n_bytes, 0, s.y_width * item - n_bytes)


cdef inline void keep(const fs_kernels *kernels, const Step *s, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
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


cdef inline void do_item(const Plan *plan, const Segment *segment, Py_ssize_t item, char *scratch) noexcept nogil:
    """What one thread does of a segment."""
    cdef const Step *s = &plan.steps[segment.first]
    cdef Py_ssize_t first = item * segment.rows_each, last = min(s.rows, first + segment.rows_each), i
    cdef char *sums = scratch + plan.attend_bytes
    cdef char *own = sums + plan.norm_bytes
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
        product(plan.kernels, s, NULL, 0, s.rows, first, min(s.weights.panels, first + segment.panels_each))
        return
    for i in range(segment.first, segment.last):
        s = &plan.steps[i]
        if s.kind == PRODUCT:
            product(plan.kernels, s, own, first, last, 0, s.weights.panels)
        elif s.kind == NORM:
            norm(plan.kernels, s, sums, own, first, last)
        elif s.kind == ROTARY:
            rotate(plan.kernels, s, first, last)
        elif s.kind == APPEND_KV:
            keep(plan.kernels, s, first, last)
        else:
            copy(plan.kernels.item_size, s, first, last)


cdef inline void run_steps(void *made, int thread, int team, fs_barrier *barrier) noexcept nogil:
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
        if s.dealt:
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


cdef inline void run_some_steps(Plan *plan, Cursor *cursor) noexcept nogil:
    """From where the cursor stands as far as so much work allows, and at least an item for each thread."""
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


cdef inline Place place(Plan *plan, Py_ssize_t rows, Py_ssize_t width) noexcept nogil:
    """Room for some rows."""
    cdef Place place
    place.row = width * plan.item
    place.own = -1
    place.data = plan.memory + plan.n_bytes
    plan.n_bytes += lines(rows * place.row)
    return place


cdef inline Place own_place(Plan *plan, Py_ssize_t rows, Py_ssize_t width) noexcept nogil:
    """Room for rows that no other block of rows sees: of each thread, where blocks of rows are taken."""
    cdef Place own
    if plan.few:
        return place(plan, rows, width)
    own.row = width * plan.item
    own.own = plan.own_bytes
    own.data = NULL
    plan.own_bytes += lines(ROW_BLOCK * own.row)
    return own


cdef inline Place given_place(const char *data, Py_ssize_t row) noexcept nogil:
    """Rows that are there."""
    cdef Place given
    given.data = <char *> data
    given.row = row
    given.own = -1
    return given


cdef inline Step *add(Plan *plan, Kind kind, Py_ssize_t rows, Place x, Place y) noexcept nogil:
    cdef Step *step = &plan.steps[plan.n_steps]
    plan.n_steps += 1
    memset(step, 0, sizeof(Step))
    step.kind = kind
    step.rows = rows
    step.x = x
    step.y = y
    return step


cdef inline void add_product(
    Plan *plan, Py_ssize_t rows, Place x, Place y, const fs_weights *weights, fs_epilogue epilogue,
) noexcept nogil:
    cdef Step *step = add(plan, PRODUCT, rows, x, y)
    step.weights = weights
    step.epilogue = epilogue
    step.work = <double> rows * weights.units * weights.h_size


cdef inline void add_norm(
    Plan *plan, Py_ssize_t rows, Py_ssize_t width, Place x, Place y, Norm norm,
) noexcept nogil:
    cdef Step *step = add(plan, NORM, rows, x, y)
    step.norm = norm
    step.width = width
    step.work = <double> NORM_WORK * rows * width


cdef inline void add_pad_heads(
    Plan *plan, Py_ssize_t rows, Place x, Place y, Py_ssize_t heads, Py_ssize_t width, Py_ssize_t y_width,
) noexcept nogil:
    cdef Step *step
    if width == y_width:
        return
    step = add(plan, PAD_HEADS, rows, x, y)
    step.heads = heads
    step.width = width
    step.y_width = y_width
    step.work = <double> PAD_WORK * rows * heads * y_width


cdef inline void add_keep(
    Plan *plan, Py_ssize_t rows, Place keys, const Task *task, fs_page ***pages, Py_ssize_t layer,
) noexcept nogil:
    cdef Step *step = add(plan, APPEND_KV, rows, keys, keys)
    step.heads = task.kind.kv_heads
    step.width = task.kind.width
    step.positions = task.positions
    step.whose = task.whose
    step.pages = pages
    step.page_layer = layer * fs_page_layer(task.kind)
    step.work = <double> PAD_WORK * rows * step.heads * step.width


cdef inline void add_attend(
    Plan *plan, const Task *task, const Layer *layer, Place q, Place out, Place stats, Py_ssize_t width,
    fs_attention *job,
) noexcept nogil:
    """Attention of all rows; the job says where keys and values are."""
    cdef Place nowhere = given_place(NULL, 0)
    cdef Step *step
    job.batch = task.batch
    job.heads = layer.heads
    job.kv_heads = layer.kv_heads
    job.width = job.value_width = width
    job.max_queries = task.longest
    job.q.data, job.q.row, job.q.head = q.data, q.row // plan.item, width
    job.out.data, job.out.row, job.out.head = out.data, out.row // plan.item, width
    job.q_starts = task.starts
    job.stats = stats.data
    job.scale = 1 / sqrt(<double> layer.head_dim)
    job.factor = 1
    job.parts = 1
    step = add(plan, ATTEND, task.rows, nowhere, nowhere)
    step.attention = job[0]
    step.work = <double> job.batch * job.heads * job.max_queries * job.max_keys * (2 * width + WEIGHT_WORK)


cdef inline void set_mask(fs_attention *job, const Mask *mask) noexcept nogil:
    cdef int axis
    job.mask = mask.data
    job.mask_is_bool = mask.is_bool
    for axis in range(3):
        job.mask_strides[axis] = mask.strides[axis]


cdef inline void lay_out(Plan *plan, const Task *task) noexcept nogil:
    """The memory of a run and, where there is room for them, all steps."""
    cdef Py_ssize_t rows = task.rows, width = task.width, item = plan.item, others = task.memory_rows
    cdef Py_ssize_t lanes = task.kernels.lanes, whole, all_heads, widest = 0
    cdef Place stream = given_place(task.stream, width * item)
    cdef Place given = given_place(task.memory, task.memory_row)
    cdef Place normal, projected, spread, k, v, context, outputs, hidden, stats, source
    cdef Place cross_projected = given, cross_spread = given, cross_q = stream, cross_q_spread = stream
    cdef const Layer *layer = task.layers[0]
    cdef fs_attention job
    cdef Step *step
    cdef int last
    cdef Py_ssize_t i, head_dim = layer.head_dim, kv_heads = layer.kv_heads
    plan.n_steps = plan.n_bytes = plan.own_bytes = 0
    # Places that every block uses anew.
    whole = (head_dim + lanes - 1) // lanes * lanes
    all_heads = layer.heads + 2 * kv_heads
    for i in range(task.n_layers):
        widest = max(widest, task.layers[i].linear1.units)
    stats = place(plan, 1, 2 * task.batch * layer.heads * task.longest)
    normal = own_place(plan, rows, width)
    hidden = own_place(plan, rows, widest)
    projected = place(plan, rows, all_heads * head_dim)
    spread = projected if whole == head_dim else place(plan, rows, all_heads * whole)
    context = place(plan, rows, layer.heads * whole)
    outputs = context if whole == head_dim else place(plan, rows, layer.heads * head_dim)
    if layer.cross:
        cross_projected = place(plan, others, 2 * kv_heads * head_dim)
        cross_spread = cross_projected if whole == head_dim else place(plan, others, 2 * kv_heads * whole)
        cross_q = place(plan, rows, layer.heads * head_dim)
        cross_q_spread = cross_q if whole == head_dim else place(plan, rows, layer.heads * whole)
    if plan.steps == NULL:
        return
    for i in range(task.n_layers):
        layer = task.layers[i]
        last = 2 if layer.cross else 1
        source = normal if layer.norm_first else stream
        if layer.cross and task.memory_pages == NULL:
            add_product(plan, others, given, cross_projected, layer.cross_kv, FS_IDENTITY)
            add_pad_heads(plan, others, cross_projected, cross_spread, 2 * kv_heads, head_dim, whole)
        # Self-attention.
        if layer.norm_first:
            add_norm(plan, rows, width, stream, normal, layer.norms[0])
        add_product(plan, rows, source, projected, layer.in_proj, FS_IDENTITY)
        if layer.cos != NULL:
            step = add(plan, ROTARY, rows, projected, projected)
            step.heads = layer.heads + kv_heads
            step.width = head_dim
            step.rotary_dim = layer.rotary_dim
            step.interleaved = layer.interleaved
            step.cos = layer.cos
            step.sin = layer.sin
            step.positions = task.positions
            step.work = <double> PAD_WORK * rows * step.heads * step.width
        add_pad_heads(plan, rows, projected, spread, all_heads, head_dim, whole)
        k, v = spread, spread
        k.data = spread.data + layer.heads * whole * item
        v.data = k.data + kv_heads * whole * item
        memset(&job, 0, sizeof(job))
        if task.pages != NULL:
            add_keep(plan, rows, k, task, task.pages, i)
            job.pages = task.pages
            job.page_layer = i * fs_page_layer(task.kind)
            job.lengths = task.lengths
            job.max_keys = task.longest_kept
        else:
            job.k.data, job.k.row, job.k.head = k.data, k.row // item, whole
            job.v.data, job.v.row, job.v.head = v.data, v.row // item, whole
            job.k_starts = task.starts
            job.max_keys = task.longest
        job.causal = task.causal
        job.window = min(layer.window, MAX_WINDOW)
        job.weights = task.weights[2 * i] if task.weights != NULL else NULL
        set_mask(&job, &task.mask)
        add_attend(plan, task, layer, spread, context, stats, whole, &job)
        add_pad_heads(plan, rows, context, outputs, layer.heads, whole, head_dim)
        add_product(plan, rows, outputs, stream, layer.out_proj, FS_ADD)
        if not layer.norm_first:
            add_norm(plan, rows, width, stream, stream, layer.norms[0])
        # Attention to the memory.
        if layer.cross:
            if layer.norm_first:
                add_norm(plan, rows, width, stream, normal, layer.norms[1])
            add_product(plan, rows, source, cross_q, layer.cross_q, FS_IDENTITY)
            add_pad_heads(plan, rows, cross_q, cross_q_spread, layer.heads, head_dim, whole)
            memset(&job, 0, sizeof(job))
            if task.memory_pages != NULL:
                job.pages = task.memory_pages
                job.page_layer = i * fs_page_layer(task.kind)
                job.lengths = task.memory_lengths
            else:
                v = cross_spread
                v.data = cross_spread.data + kv_heads * whole * item
                job.k.data, job.k.row, job.k.head = cross_spread.data, cross_spread.row // item, whole
                job.v.data, job.v.row, job.v.head = v.data, v.row // item, whole
                job.k_starts = task.memory_starts
            job.max_keys = task.longest_memory
            job.weights = task.weights[2 * i + 1] if task.weights != NULL else NULL
            set_mask(&job, &task.memory_mask)
            add_attend(plan, task, layer, cross_q_spread, context, stats, whole, &job)
            add_pad_heads(plan, rows, context, outputs, layer.heads, whole, head_dim)
            add_product(plan, rows, outputs, stream, layer.cross_out, FS_ADD)
            if not layer.norm_first:
                add_norm(plan, rows, width, stream, stream, layer.norms[1])
        # Feed-forward.
        if layer.norm_first:
            add_norm(plan, rows, width, stream, normal, layer.norms[last])
        add_product(plan, rows, source, hidden, layer.linear1, layer.activation)
        add_product(plan, rows, hidden, stream, layer.linear2, FS_ADD)
        if not layer.norm_first:
            add_norm(plan, rows, width, stream, stream, layer.norms[last])
    if task.has_final:
        add_norm(plan, rows, width, stream, stream, task.final)
    if task.output != NULL:
        add_product(
            plan, rows, stream, given_place(task.outputs, task.output.units * item), task.output, FS_IDENTITY,
        )


cdef inline void lay_out_memory(Plan *plan, const Task *task) noexcept nogil:
    """The same for the keys and values of a memory, which every block makes of it, into pages."""
    cdef const Layer *layer = task.layers[0]
    cdef Py_ssize_t lanes = task.kernels.lanes, whole = (layer.head_dim + lanes - 1) // lanes * lanes, i
    cdef Py_ssize_t heads = 2 * layer.kv_heads
    cdef Place given = given_place(task.memory, task.memory_row)
    cdef Place projected, spread
    plan.n_steps = plan.n_bytes = plan.own_bytes = 0
    projected = place(plan, task.rows, heads * layer.head_dim)
    spread = projected if whole == layer.head_dim else place(plan, task.rows, heads * whole)
    if plan.steps == NULL:
        return
    for i in range(task.n_layers):
        add_product(plan, task.rows, given, projected, task.layers[i].cross_kv, FS_IDENTITY)
        add_pad_heads(plan, task.rows, projected, spread, heads, layer.head_dim, whole)
        add_keep(plan, task.rows, spread, task, task.memory_pages, i)


cdef inline Py_ssize_t rows_each(Py_ssize_t rows, int n_threads) noexcept nogil:
    """Rows of a block: as many blocks for each thread, of even height, whole tiles where that is possible."""
    cdef Py_ssize_t blocks = (rows + ROW_BLOCK * n_threads - 1) // (ROW_BLOCK * n_threads) * n_threads
    cdef Py_ssize_t each = (rows + blocks - 1) // blocks
    return min(ROW_BLOCK, (each + 5) // 6 * 6)


cdef inline bint takes_turns(const fs_attention *job) noexcept nogil:
    """Whether a step of decoding: `attend_decode` is quicker at that."""
    return job.pages != NULL and job.max_queries == 1 and job.mask == NULL and job.weights == NULL


cdef inline void make_segments(Plan *plan) noexcept nogil:
    """The steps as segments."""
    cdef Py_ssize_t n = 0, i = 0, pairs, longest
    cdef int n_threads = plan.threads
    cdef Segment *s
    cdef Step *step
    cdef double work
    while i < plan.n_steps:
        step = &plan.steps[i]
        s = &plan.segments[n]
        n += 1
        memset(s, 0, sizeof(Segment))
        s.first = i
        work = step.work
        i += 1
        if step.kind == ATTEND and takes_turns(&step.attention):
            # As many heads for each thread.
            s.heads_parts = 1 if step.attention.batch % n_threads == 0 else min(step.attention.heads, n_threads)
            s.items = step.attention.batch * s.heads_parts
            s.dealt = plan.few
        elif step.kind == ATTEND:
            pairs = step.attention.batch * step.attention.kv_heads
            longest = max(1, step.attention.max_queries // 8)
            # Few heads are split so that every thread finds some, and long ones so that Ctrl-C is seen.
            step.attention.parts = max(
                1, min(longest, ITEMS * n_threads // max(1, pairs)),
                <Py_ssize_t> min(8 * work / (max(1, pairs) * SIGNAL_WORK), 1e6),
            )
            s.items = pairs * step.attention.parts
            s.dealt = plan.few
        elif plan.few and step.kind == PRODUCT:
            # As many for each thread, and fewer where Ctrl-C would wait for them.
            s.panels_each = max(
                1,
                min((step.weights.panels + n_threads - 1) // n_threads,
                    <Py_ssize_t> (SIGNAL_WORK * step.weights.panels / max(1.0, work))),
            )
            s.items = (step.weights.panels + s.panels_each - 1) // s.panels_each
            s.dealt = True
        else:
            while i < plan.n_steps and plan.steps[i].kind != ATTEND and plan.steps[i].rows == step.rows:
                if plan.few and plan.steps[i].kind == PRODUCT:
                    break
                work += plan.steps[i].work
                i += 1
            s.dealt = plan.few
            if plan.few:
                s.rows_each = max(1, (step.rows + n_threads - 1) // n_threads)
            else:
                s.rows_each = rows_each(step.rows, n_threads)
            s.items = (step.rows + s.rows_each - 1) // s.rows_each
        s.last = i
        s.work = work / max(1, s.items)
    plan.n_segments = n


cdef inline void plan_free(Plan *plan) noexcept nogil:
    free(plan.room)
    free(plan.scratch_room)
    memset(plan, 0, sizeof(Plan))


cdef inline int plan_make(Plan *plan, const Task *task, bint of_memory, int n_threads) noexcept nogil:
    """Steps, segments and memory of a run; -1 without memory."""
    cdef const Layer *layer = task.layers[0]
    cdef double work = 0, work_each
    cdef Py_ssize_t i, most_steps, n_bytes, step_bytes, segment_bytes, scratch_bytes
    memset(plan, 0, sizeof(Plan))
    plan.kernels = task.kernels
    plan.item = task.kernels.item_size
    for i in range(task.n_layers):
        work += (
            <double> layer.in_proj.units + layer.out_proj.units + 2 * task.layers[i].linear1.units
        ) * layer.out_proj.units
    plan.threads = threads_for(task.rows, work, n_threads)
    if task.rows < FEW_ROWS and not of_memory:
        work_each = max(task.rows, READ_WORK) if work * plan.item > CACHE else task.rows
        plan.threads = <int> max(
            1, min(<double> n_threads, work_each * work / (<double> FEW_STEPS * task.n_layers * FEW_WORK)),
        )
    plan.n_threads = n_threads
    plan.few = task.rows < FEW_ROWS * plan.threads
    if of_memory:
        lay_out_memory(plan, task)
    else:
        lay_out(plan, task)
    most_steps = MAX_STEPS * task.n_layers + 2
    n_bytes, step_bytes = lines(plan.n_bytes), lines(most_steps * sizeof(Step))
    segment_bytes = lines(most_steps * sizeof(Segment))
    plan.room = <char *> malloc(n_bytes + step_bytes + segment_bytes + CACHE_LINE)
    if plan.room == NULL:
        return -1
    plan.memory = plan.room + (-<Py_ssize_t> plan.room & (CACHE_LINE - 1))
    plan.steps = <Step *> (plan.memory + n_bytes)
    plan.segments = <Segment *> (plan.memory + n_bytes + step_bytes)
    if of_memory:
        lay_out_memory(plan, task)
    else:
        lay_out(plan, task)
    make_segments(plan)
    for i in range(plan.n_steps):
        if plan.steps[i].kind == ATTEND:
            plan.attend_bytes = max(plan.attend_bytes, plan.kernels.attend_scratch(&plan.steps[i].attention))
    plan.attend_bytes = lines(plan.attend_bytes * plan.item)
    plan.norm_bytes = lines(2 * ROW_BLOCK * plan.item)
    plan.scratch_each = plan.attend_bytes + plan.norm_bytes + plan.own_bytes
    scratch_bytes = plan.threads * plan.scratch_each
    plan.scratch_room = <char *> malloc(scratch_bytes + CACHE_LINE)
    if plan.scratch_room == NULL:
        plan_free(plan)
        return -1
    plan.scratch = plan.scratch_room + (-<Py_ssize_t> plan.scratch_room & (CACHE_LINE - 1))
    return 0
