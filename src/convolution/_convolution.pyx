"""Convolution over time, compiled: products of packed weights with windows of frames.

`fastseq.reference._convolution` has the same in NumPy.

A window of `size` neighbouring frames of a row (T, C) is size * C reals that lie one behind the other, so a
convolution is a product whose input rows overlap in memory: kernels get a pointer to each, and nothing is copied.
Windows that reach into the padding, and all windows with dilation or groups, are copied together, a block of them at a
time. Every output is one chain over the frames of its window in order, and the channels of each, whatever block or
thread computes it.

Where every channel is a group of its own, there is no product, and a loop over channels instead.

Backward, the gradient of x is again a convolution, of dy with the weights of the other direction; with a stride one for
each remainder of the frame by the stride, of the weights that meet such frames. So it is one chain an element, too.
"""

cimport numpy as cnp
from libc.math cimport ceil
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from runtime.costs cimport SIGNAL_WORK
from runtime.kernels cimport FS_IDENTITY, fs_kernels, fs_narrow_bytes, fs_step, fs_weights
from runtime.scratch cimport CACHE_LINE, lines
from fastseq._dense cimport add_products
from fastseq._packing cimport PackedWeight, pack_linear
from fastseq._parallel cimport parallel_for, parallel_for_dynamic

import math

import numpy as np

cnp.import_array()

cdef enum:
    BLOCK_WINDOWS = 512    # windows whose pointers are made at once
    ROOM_BYTES = 1 << 20   # of windows that are copied together at once
    SLOW_WORK = 2          # multiply-adds of a kernel that one here takes as long as


# Windows of the rows of a batch, and where what belongs to each of them is: outputs, or their gradients.
cdef struct Windows:
    Py_ssize_t batch
    Py_ssize_t size
    Py_ssize_t stride
    Py_ssize_t dilation
    Py_ssize_t frame_bytes     # what a window takes of each frame
    bint adjacent              # whether the frames of a window lie one behind the other
    const char *x
    Py_ssize_t x_row           # bytes from one row of the batch to the next, and
    Py_ssize_t x_frame         # from frame to frame
    const int64_t *lengths     # [batch]
    const int64_t *lefts       # [batch]
    const int64_t *starts      # [batch + 1]: the number of windows in the rows before each
    char *y
    Py_ssize_t y_row
    Py_ssize_t y_frame         # from window to window
    const int64_t *y_firsts    # [batch]: the frame of y that belongs to the first window; NULL: frame 0
    Py_ssize_t y_first_frame   # from frame to frame, for `y_firsts`


cdef Py_ssize_t row_of(const Windows *w, Py_ssize_t window) noexcept nogil:
    """The last row of the batch whose windows begin with this one or before it."""
    cdef Py_ssize_t b = 0, end = w.batch, middle
    while end - b > 1:
        middle = (b + end) // 2
        if w.starts[middle] <= window:
            b = middle
        else:
            end = middle
    return b


cdef inline char *output_of(const Windows *w, Py_ssize_t b, Py_ssize_t t) noexcept nogil:
    """What belongs to window t of row b."""
    cdef char *y = w.y + b * w.y_row + t * w.y_frame
    return y if w.y_firsts == NULL else y + w.y_firsts[b] * w.y_first_frame


cdef void place(
    const Windows *w, Py_ssize_t first, Py_ssize_t n, const void **y, const void **x, char *room,
) noexcept nogil:
    """Pointers to the windows [first, first + n) of the batch, and to what belongs to each.

    Windows that do not lie in one piece are copied into `room`.
    """
    cdef Py_ssize_t b = row_of(w, first), i, t, frame, size_bytes = w.size * w.frame_bytes
    cdef const char *row
    cdef char *target
    for i in range(n):
        while first + i >= w.starts[b + 1]:
            b += 1
        t = first + i - w.starts[b]
        y[i] = output_of(w, b, t)
        frame = t * w.stride - w.lefts[b]
        row = w.x + b * w.x_row
        if w.adjacent and frame >= 0 and frame + w.size <= w.lengths[b]:
            x[i] = row + frame * w.x_frame
            continue
        target = room + i * size_bytes
        x[i] = target
        for _ in range(w.size):
            if 0 <= frame < w.lengths[b]:
                memcpy(target, row + frame * w.x_frame, w.frame_bytes)
            else:
                memset(target, 0, w.frame_bytes)
            target += w.frame_bytes
            frame += w.dilation


cdef void gradient_windows(
    const void *source, Py_ssize_t first, Py_ssize_t n, const void **dy, const void **x, char *room,
) noexcept nogil:
    """A `gradient_rows`."""
    place(<const Windows *> source, first, n, dy, x, room)


cdef struct Product:
    Windows windows
    const fs_kernels *kernels
    const fs_weights *weights
    Py_ssize_t total       # windows
    Py_ssize_t block       # windows of an item
    Py_ssize_t parts       # into which the panels are divided
    Py_ssize_t room_bytes  # of the copies of the windows of an item; narrow rows follow


cdef void product_item(const void *job, Py_ssize_t item, void *scratch) noexcept nogil:
    """A block of windows times some panels."""
    cdef const Product *p = <const Product *> job
    cdef const void *x[BLOCK_WINDOWS]
    cdef const void *init[BLOCK_WINDOWS]
    cdef const void *out[BLOCK_WINDOWS]
    cdef Py_ssize_t first = item // p.parts * p.block, part = item % p.parts, panels = p.weights.panels, i
    cdef fs_step step
    memset(&step, 0, sizeof(step))
    step.rows = min(p.block, p.total - first)
    place(&p.windows, first, step.rows, out, x, <char *> scratch)
    for i in range(step.rows):
        init[i] = p.weights.bias
    step.weights = p.weights
    step.first = panels * part // p.parts
    step.last = panels * (part + 1) // p.parts
    step.epilogue = FS_IDENTITY
    step.init = init
    step.h = x
    step.out = <void **> out
    if p.weights.narrow != NULL:
        step.narrow_h = <char *> scratch + p.room_bytes
        p.weights.narrow.rows(p.weights.type, step.rows, p.weights.h_size, x, step.narrow_h)
    p.kernels.plain(&step)


cdef int multiply_windows(const Windows *windows, PackedWeight packed, int n_threads) except -1:
    """Multiply all windows with packed weights."""
    cdef Product job
    cdef const fs_weights *weights = &packed.panels
    cdef Py_ssize_t tile = packed.kernels.tile_rows[4], size_bytes = windows.size * windows.frame_bytes, share
    cdef double work
    job.windows = windows[0]
    job.kernels = packed.kernels
    job.weights = weights
    job.total = windows.starts[windows.batch]
    if job.total == 0:
        return 0
    job.parts = 1
    if job.total < min(2 * tile * n_threads, <Py_ssize_t> BLOCK_WINDOWS):
        job.block = job.total
        job.parts = min(weights.panels, <Py_ssize_t> n_threads)
    else:
        share = (job.total + n_threads - 1) // n_threads
        job.block = max(1, min(min(<Py_ssize_t> BLOCK_WINDOWS, ROOM_BYTES // size_bytes), share) // tile) * tile
    work = <double> job.block * weights.units * weights.h_size
    # So that Ctrl-C is seen in time.
    job.parts = max(job.parts, <Py_ssize_t> min(<double> weights.panels, ceil(work / SIGNAL_WORK)))
    job.room_bytes = lines(job.block * size_bytes)
    parallel_for_dynamic(
        product_item, &job, (job.total + job.block - 1) // job.block * job.parts, work / job.parts,
        job.room_bytes + fs_narrow_bytes(weights, False, job.block), n_threads,
    )
    return 0


ctypedef fused real:
    float
    double


# A convolution of every channel by itself, or its gradients.
cdef struct Channels:
    Windows windows
    Py_ssize_t channels
    Py_ssize_t item_size
    const char *zeros  # [channels]: a frame of padding
    const char *bias   # [channels]
    char *weight       # [size][channels]; of a gradient, what it is added to
    char *dbias        # [channels] of a gradient


cdef void multiply_each(const Channels *p, Py_ssize_t first, Py_ssize_t last, const real *bias) noexcept nogil:
    """y = b + the sum over j, in order, of w_j x_j, of the windows [first, last)."""
    cdef const Windows *w = &p.windows
    cdef Py_ssize_t b = row_of(w, first), i, j, c, t, frame
    cdef const real *x
    cdef const real *weight
    cdef real *y
    for i in range(first, last):
        while i >= w.starts[b + 1]:
            b += 1
        t = i - w.starts[b]
        frame = t * w.stride - w.lefts[b]
        y = <real *> output_of(w, b, t)
        memcpy(y, bias, p.channels * sizeof(real))
        for j in range(w.size):
            x = <const real *> p.zeros
            if 0 <= frame < w.lengths[b]:
                x = <const real *> (w.x + b * w.x_row + frame * w.x_frame)
            weight = <const real *> p.weight + j * p.channels
            for c in range(p.channels):
                y[c] = y[c] + weight[c] * x[c]
            frame += w.dilation


cdef void channels_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Channels *p = <const Channels *> job
    if p.item_size == sizeof(float):
        multiply_each[float](p, first, last, <const float *> p.bias)
    else:
        multiply_each[double](p, first, last, <const double *> p.bias)


cdef void sum_each(const Channels *p, Py_ssize_t first, Py_ssize_t last, real *dbias) noexcept nogil:
    """dw_j += dy x_j and db += dy, of the channels [first, last), window after window."""
    cdef const Windows *w = &p.windows
    cdef Py_ssize_t b, t, j, c, frame
    cdef const real *x
    cdef const real *dy
    cdef real *sums
    for b in range(w.batch):
        for t in range(w.starts[b + 1] - w.starts[b]):
            dy = <const real *> output_of(w, b, t)
            for c in range(first, last):
                dbias[c] = dbias[c] + dy[c]
            frame = t * w.stride - w.lefts[b]
            for j in range(w.size):
                x = <const real *> p.zeros
                if 0 <= frame < w.lengths[b]:
                    x = <const real *> (w.x + b * w.x_row + frame * w.x_frame)
                sums = <real *> p.weight + j * p.channels
                for c in range(first, last):
                    sums[c] = sums[c] + dy[c] * x[c]
                frame += w.dilation


cdef void channel_sums_part(const void *job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Of some strips of channels, each a cache line."""
    cdef const Channels *p = <const Channels *> job
    cdef Py_ssize_t strip = CACHE_LINE // p.item_size
    if p.item_size == sizeof(float):
        sum_each[float](p, first * strip, min(p.channels, last * strip), <float *> p.dbias)
    else:
        sum_each[double](p, first * strip, min(p.channels, last * strip), <double *> p.dbias)


cdef int multiply_channels(const Windows *windows, cnp.ndarray weight, cnp.ndarray bias, int n_threads) except -1:
    """Multiply the channels of all windows with weights (size, C), each by itself."""
    cdef Channels job
    cdef cnp.ndarray zeros = np.zeros(weight.shape[1], weight.dtype)
    job.windows = windows[0]
    job.channels, job.item_size = cnp.PyArray_DIM(weight, 1), cnp.PyArray_ITEMSIZE(weight)
    job.zeros = cnp.PyArray_BYTES(zeros)
    job.bias = cnp.PyArray_BYTES(zeros if bias is None else bias)
    job.weight = cnp.PyArray_BYTES(weight)
    job.dbias = NULL
    parallel_for(
        channels_part, &job, windows.starts[windows.batch], <double> SLOW_WORK * windows.size * job.channels, n_threads,
    )
    return 0


cdef int add_channel_gradients(const Windows *windows, cnp.ndarray dweight, cnp.ndarray dbias, int n_threads) except -1:
    """The gradients of weights (size, C) and biases (C,), which begin as zeros."""
    cdef Channels job
    cdef cnp.ndarray zeros = np.zeros(dweight.shape[1], dweight.dtype)
    cdef Py_ssize_t strips
    job.windows = windows[0]
    job.channels, job.item_size = cnp.PyArray_DIM(dweight, 1), cnp.PyArray_ITEMSIZE(dweight)
    job.zeros = job.bias = cnp.PyArray_BYTES(zeros)
    job.weight = cnp.PyArray_BYTES(dweight)
    job.dbias = cnp.PyArray_BYTES(dbias)
    strips = (job.channels * job.item_size + CACHE_LINE - 1) // CACHE_LINE
    parallel_for(
        channel_sums_part, &job, strips,
        <double> SLOW_WORK * windows.starts[windows.batch] * windows.size * job.channels / strips, n_threads,
    )
    return 0


cdef class PackedConvolution:
    """The weights of a convolution, packed for each group.

    Immutable, except that what only `backward` needs is packed on first use.
    """

    cdef cnp.ndarray weight  # (O, C / groups, size); None of narrow weights
    cdef Py_ssize_t outputs
    cdef Py_ssize_t inputs   # of a group
    cdef list groups         # of PackedWeight, (O / groups, size * C / groups)
    cdef dict transposed     # by the places in a window: of each group (C / groups, len(places) * O / groups)
    cdef cnp.ndarray taps    # (size, C) where every channel is by itself, and there are no `groups`; else None
    cdef cnp.ndarray bias    # (C,), then

    @property
    def nbytes(self):
        """Bytes of the panels and biases, without those that only `backward` needs."""
        return sum(packed.nbytes for packed in self.groups) if self.taps is None else self.taps.nbytes

    cdef list meeting(self, object places):
        """Of each group the weights of dx of frames that are met at these places of windows; packed on first use."""
        packed = self.transposed.get(places)
        if packed is None:
            packed = []
            for part in np.split(self.weight, len(self.groups)):
                flat = part[:, :, list(places)].transpose(1, 2, 0).reshape(self.inputs, -1)
                packed.append(pack_linear(None, np.ascontiguousarray(flat), None))
            self.transposed[places] = packed
        return packed


def conv_pack(weight not None, cnp.ndarray bias, Py_ssize_t groups):
    """Pack the weights of a convolution, an ndarray or a `NarrowArray`; returns a `PackedConvolution`."""
    cdef PackedConvolution packed = PackedConvolution.__new__(PackedConvolution)
    cdef Py_ssize_t group, each = weight.shape[0] // groups
    packed.weight = weight if isinstance(weight, np.ndarray) else None
    packed.outputs, packed.inputs = weight.shape[0], weight.shape[1]
    packed.groups, packed.transposed = [], {}
    if packed.inputs == each == 1 and packed.weight is not None:
        packed.taps, packed.bias = np.ascontiguousarray(weight[:, 0].T), bias
        return packed
    for group in range(groups):
        own = slice(group * each, (group + 1) * each)
        part = weight[own]
        if isinstance(part, np.ndarray):
            part = np.ascontiguousarray(part.transpose(0, 2, 1)).reshape(each, -1)
        else:
            part = part.matrix(0, 2, 1)
        packed.groups.append(pack_linear(None, part, None if bias is None else bias[own]))
    return packed


cdef object set_windows(
    Windows *w, cnp.ndarray x, Py_ssize_t channels, Py_ssize_t size, Py_ssize_t stride, Py_ssize_t dilation,
    cnp.ndarray lengths, cnp.ndarray lefts, cnp.ndarray counts,
):
    """Windows that take so many channels of the frames of x; returns what to keep as long as they are used."""
    cdef cnp.ndarray starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    w.batch = cnp.PyArray_DIM(x, 0)
    w.size, w.stride, w.dilation = size, stride, dilation
    w.frame_bytes = channels * cnp.PyArray_ITEMSIZE(x)
    w.adjacent = size == 1 or (dilation == 1 and channels == cnp.PyArray_DIM(x, 2))
    w.x, w.x_row, w.x_frame = cnp.PyArray_BYTES(x), cnp.PyArray_STRIDE(x, 0), cnp.PyArray_STRIDE(x, 1)
    w.lengths = <const int64_t *> cnp.PyArray_DATA(lengths)
    w.lefts = <const int64_t *> cnp.PyArray_DATA(lefts)
    w.starts = <const int64_t *> cnp.PyArray_DATA(starts)
    w.y_firsts, w.y_first_frame = NULL, 0
    return starts, lengths, lefts


cdef void set_outputs(Windows *w, cnp.ndarray y, Py_ssize_t stride) noexcept:
    """What belongs to each window: every frame of y, or those that are `stride` frames apart."""
    w.y, w.y_row, w.y_frame = cnp.PyArray_BYTES(y), cnp.PyArray_STRIDE(y, 0), stride * cnp.PyArray_STRIDE(y, 1)


def conv_forward(PackedConvolution packed not None, cnp.ndarray x not None, windows, int n_threads):
    """The outputs (B, outputs, O) of x (B, T, C); see `fastseq.reference._convolution.conv_forward`."""
    cdef Windows w
    cdef Py_ssize_t groups = len(packed.groups), group, item = cnp.PyArray_ITEMSIZE(x)
    cdef cnp.ndarray counts = windows.counts
    cdef bint whole = not (counts < windows.outputs).any()
    cdef cnp.ndarray y = (np.empty if whole else np.zeros)((len(x), windows.outputs, packed.outputs), x.dtype)
    _kept = set_windows(
        &w, x, packed.inputs, windows.size, windows.stride, windows.dilation, windows.lengths, windows.lefts, counts,
    )
    set_outputs(&w, y, 1)
    if packed.taps is not None:
        multiply_channels(&w, packed.taps, packed.bias, n_threads)
    for group in range(groups):
        multiply_windows(&w, packed.groups[group], n_threads)
        w.x += packed.inputs * item
        w.y += packed.outputs // groups * item
    return y


cdef int add_input_gradient(
    PackedConvolution packed, cnp.ndarray dx, cnp.ndarray dy, object windows, int n_threads,
) except -1:
    """dx of all frames that windows take; the others stay as they are.

    Frame p = q stride + r - left of a row is met by window t at place j where t stride + j dilation = q stride + r.
    For one r these are the places first + m step with t = q - offset - m hop: windows of dy of dilation hop.
    """
    cdef Windows w
    cdef Py_ssize_t groups = len(packed.groups), outputs = packed.outputs // max(1, groups), group, item, r
    cdef Py_ssize_t size = windows.size, stride = windows.stride, dilation = windows.dilation, first, back
    cdef Py_ssize_t common = math.gcd(stride, dilation), step = stride // common, hop = dilation // common
    cdef cnp.ndarray lengths = windows.lengths, lefts = windows.lefts, q, y_firsts
    item = cnp.PyArray_ITEMSIZE(dx)
    for first in range(min(step, size)):
        r = first * dilation % stride
        places = tuple(range(first, size, step))[::-1]
        back = first * dilation // stride + (len(places) - 1) * hop
        q = np.maximum(0, -((r - lefts) // stride))  # the first q of each row whose frame is not before frame 0
        y_firsts = q * stride + r - lefts
        counts = np.maximum(0, -((y_firsts - lengths) // stride))
        _kept = set_windows(&w, dy, outputs, len(places), 1, hop, windows.counts, back - q, counts)
        set_outputs(&w, dx, stride)
        w.y_firsts, w.y_first_frame = <const int64_t *> cnp.PyArray_DATA(y_firsts), cnp.PyArray_STRIDE(dx, 1)
        if packed.taps is not None:
            multiply_channels(&w, packed.taps[list(places)], None, n_threads)
        for group in range(groups):
            multiply_windows(&w, packed.meeting(places)[group], n_threads)
            w.x += outputs * item
            w.y += packed.inputs * item
    return 0


def conv_backward(
    PackedConvolution packed not None, cnp.ndarray x not None, windows, cnp.ndarray dy not None,
    cnp.ndarray dweight not None, cnp.ndarray dbias, int n_threads,
):
    """Gradient of x; those of the parameters are added; see `fastseq.reference._convolution.conv_backward`."""
    cdef Windows w
    cdef Py_ssize_t groups = len(packed.groups), outputs = packed.outputs // max(1, groups), group, item
    cdef Py_ssize_t size = windows.size, columns = size * packed.inputs
    cdef cnp.ndarray taps, biases
    cdef cnp.ndarray dx = np.zeros_like(x), sums = np.zeros((packed.outputs, size, packed.inputs), x.dtype)
    item = cnp.PyArray_ITEMSIZE(x)
    add_input_gradient(packed, dx, dy, windows, n_threads)
    _kept = set_windows(
        &w, x, packed.inputs, size, windows.stride, windows.dilation, windows.lengths, windows.lefts, windows.counts,
    )
    set_outputs(&w, dy, 1)
    if packed.taps is not None:
        taps, biases = np.zeros_like(packed.taps), np.zeros(packed.outputs, x.dtype)
        add_channel_gradients(&w, taps, biases, n_threads)
        dweight[:, 0] += taps.T
        if dbias is not None:
            dbias += biases
        return dx
    for group in range(groups):
        add_products(
            (<PackedWeight> packed.groups[group]).kernels, gradient_windows, &w, w.starts[w.batch], columns * item,
            outputs, columns, cnp.PyArray_BYTES(sums) + group * outputs * columns * item,
            NULL if dbias is None else cnp.PyArray_BYTES(dbias) + group * outputs * item, n_threads,
        )
        w.x += packed.inputs * item
        w.y += outputs * item
    dweight += sums.transpose(0, 2, 1)
    return dx
