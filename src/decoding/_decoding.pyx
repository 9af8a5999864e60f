"""From logits to the next symbol, compiled: `fastseq.reference._decoding` has the same searches in NumPy.

A search drives a decoder (decoder.h) for as many steps as it is asked for and takes the GIL only to look for Ctrl-C,
to make room for more steps, and to renew a decoder that is full. Scores are doubles. What is chosen for a row depends
on its own logits, its own history and its own random numbers, so that no row changes another.
"""

cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport INFINITY, log, pow
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from decoding.decoder cimport FS_AGAIN, FS_DONE, FS_FULL, fs_decoder
from runtime.kernels cimport fs_kernels
from fastseq._simd cimport kernels_for

import itertools

import numpy as np


cnp.import_array()

ctypedef fused real:
    float
    double

cdef enum:
    BLOCK = 1024  # logits whose maximum is looked for at once,
    LANES = 64    # so many side by side: enough that the compiler has a loop left to make vectors of
    FEW = 16      # a heap finds the k best if there are at least so many times k
    ROOM = 256    # steps there is room for at first, if the end is not known

# How a run of steps ends.
cdef enum:
    ENOUGH        # as many steps as were asked for are done, or no row goes on
    LOOK          # it is time to look for Ctrl-C
    MORE_ROOM
    FULL
    NO_MEMORY
    NOT_FINITE    # logits of `wrong_row` are NaN or infinite
    NOTHING_LEFT  # all logits of `wrong_row` are -inf

cdef double BETWEEN_LOOKS = 0.05  # seconds
cdef double REACHED = 1 - 1e-11   # the share of top_p that counts as all of it: sums of doubles are that exact


cdef inline double now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec + 1e-9 * t.tv_nsec


cdef inline uint64_t mixed(uint64_t x) noexcept nogil:
    """The output function of SplitMix64, after one step of its counter."""
    x += <uint64_t> 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * <uint64_t> 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * <uint64_t> 0x94D049BB133111EB
    return x ^ (x >> 31)


cdef inline double uniform(uint64_t key, Py_ssize_t step) noexcept nogil:
    """The random number of one step of a row, in [0, 1), of 52 bits: times any total it is less than the total."""
    return (mixed(key + mixed(<uint64_t> step)) >> 12) * 2.0 ** -52


cdef Py_ssize_t largest(const real *x, Py_ssize_t n, double *maximum) noexcept nogil:
    """The place of the first of the largest numbers, and the number; NaN, if any of them is."""
    cdef real lanes[LANES]
    cdef real best = -INFINITY, here
    cdef Py_ssize_t first = 0, last, i, j, place = 0
    while first < n:
        last = min(n, first + BLOCK)
        for j in range(LANES):
            lanes[j] = -INFINITY
        i = first
        while i + LANES <= last:
            for j in range(LANES):
                # NaN wins, and nothing wins over NaN.
                lanes[j] = x[i + j] if (x[i + j] > lanes[j]) | (x[i + j] != x[i + j]) else lanes[j]
            i += LANES
        here = -INFINITY
        for j in range(LANES):
            here = lanes[j] if (lanes[j] > here) | (lanes[j] != lanes[j]) else here
        while i < last:
            here = x[i] if (x[i] > here) | (x[i] != x[i]) else here
            i += 1
        if here > best:
            best = here
            place = first
        elif here != here:
            maximum[0] = here
            return first
        first = last
    maximum[0] = best
    if best > -INFINITY:
        while x[place] != best:
            place += 1
    return place


cdef inline int fault(double maximum) noexcept nogil:
    """What is wrong with logits of which this is the largest; 0: nothing."""
    if maximum == -INFINITY:
        return NOTHING_LEFT
    return 0 if maximum < INFINITY else NOT_FINITE


# Candidates: the likeliest first, of equals that of the lower beam, then the lower id.

cdef struct Candidate:
    double score
    Py_ssize_t beam
    int64_t id


cdef inline bint better(const Candidate *a, const Candidate *b) noexcept nogil:
    if a.score != b.score:
        return a.score > b.score
    if a.beam != b.beam:
        return a.beam < b.beam
    return a.id < b.id


cdef void sink(Candidate *heap, Py_ssize_t n) noexcept nogil:
    """The worst of a heap stands at its root; only the root itself may be out of place, and is moved."""
    cdef Candidate moved = heap[0]
    cdef Py_ssize_t i = 0, child
    while 2 * i + 1 < n:
        child = 2 * i + 1
        if child + 1 < n and better(&heap[child], &heap[child + 1]):
            child += 1
        if not better(&moved, &heap[child]):
            break
        heap[i] = heap[child]
        i = child
    heap[i] = moved


cdef void put(Candidate *heap, Py_ssize_t *n, Py_ssize_t room, const Candidate *one) noexcept nogil:
    """Take a candidate into a heap; where there is no room, in place of the worst, which is worse."""
    cdef Py_ssize_t i, parent
    if n[0] == room:
        heap[0] = one[0]
        sink(heap, room)
        return
    i = n[0]
    n[0] += 1
    while i > 0:
        parent = (i - 1) // 2
        if not better(&heap[parent], one):
            break
        heap[i] = heap[parent]
        i = parent
    heap[i] = one[0]


cdef void sort_heap(Candidate *heap, Py_ssize_t n) noexcept nogil:
    """The best first."""
    cdef Candidate worst
    while n > 1:
        n -= 1
        worst = heap[0]
        heap[0] = heap[n]
        sink(heap, n)
        heap[n] = worst


cdef Py_ssize_t best_few(const double *scores, Py_ssize_t n, Py_ssize_t k, Candidate *heap) noexcept nogil:
    """The place of the k-th best score: one pass, with a heap of those that are best so far."""
    cdef Candidate one
    cdef Py_ssize_t filled = 0, i
    one.beam = 0
    for i in range(n):
        if filled < k or scores[i] > heap[0].score:
            one.score = scores[i]
            one.id = i
            put(heap, &filled, k, &one)
    return <Py_ssize_t> heap[0].id


cdef inline bint before(const double *scores, int64_t a, int64_t b) noexcept nogil:
    # Without branches: half of them would be mispredicted.
    return (scores[a] > scores[b]) | ((scores[a] == scores[b]) & (a < b))


cdef int64_t best_until(
    const double *scores, const double *weights, int64_t *places, Py_ssize_t n, double wanted,
) noexcept nogil:
    """The place at which the weights of the best scores reach a sum; each counts 1 where there are no weights.

    Quickselect: what stands before a pivot is added up, and one side is looked at further. `places` are those of the
    scores that may be among the best, n of them, in order; they do not stay so.
    """
    cdef Py_ssize_t low = 0, high = n, middle, i
    cdef int64_t pivot, one
    cdef double taken = 0, ahead, with_pivot
    while high - low > 1:
        middle = low + (high - low) // 2
        # The median of three goes to the front.
        if before(scores, places[middle], places[low]):
            places[middle], places[low] = places[low], places[middle]
        if before(scores, places[high - 1], places[low]):
            places[high - 1], places[low] = places[low], places[high - 1]
        if before(scores, places[high - 1], places[middle]):
            places[high - 1], places[middle] = places[middle], places[high - 1]
        places[middle], places[low] = places[low], places[middle]
        pivot = places[low]
        middle = low
        ahead = 0
        for i in range(low + 1, high):
            one = places[i]
            places[i] = places[middle + 1]
            places[middle + 1] = one
            middle += before(scores, one, pivot)
        if weights == NULL:
            ahead = middle - low
        else:
            for i in range(low + 1, middle + 1):
                ahead += weights[places[i]]
        places[low] = places[middle]
        places[middle] = pivot
        with_pivot = taken + ahead + (1 if weights == NULL else weights[pivot])
        if taken + ahead >= wanted:
            high = middle
        elif with_pivot >= wanted:
            return pivot
        else:
            taken = with_pivot
            low = middle + 1
    return places[low] if low < high else places[low - 1]


cdef class Search:
    """What drawing and beams have in common: rows, their logits and what was chosen, one record a step."""

    cdef object decoder, prompts
    cdef fs_decoder *model
    cdef const fs_kernels *kernels
    cdef Py_ssize_t vocab
    cdef Py_ssize_t max_rows        # rows at most: as many are recorded of every step
    cdef Py_ssize_t active      # rows that go on
    cdef Py_ssize_t rows        # rows of the decoder, and of logits
    cdef Py_ssize_t step        # symbols chosen of every row that goes on
    cdef Py_ssize_t max_new
    cdef Py_ssize_t room        # steps there is room for
    cdef Py_ssize_t wrong_row
    cdef bint single            # logits are float32
    cdef bint told              # whether the decoder knows the last symbols
    cdef bint with_log_probs
    cdef double penalty
    cdef double looked          # when Ctrl-C was last looked for
    cdef char *logits           # (rows, vocab)
    cdef int64_t *source        # (active,): which row of the decoder each goes on from
    cdef int64_t *symbols       # (active,): what was chosen last
    cdef double *scores         # (vocab,)
    cdef double *weights        # (vocab,)
    cdef uint64_t *seen         # (active, words): a bit for each symbol that the penalty is on
    cdef Py_ssize_t words
    cdef Py_ssize_t n_stops
    cdef int64_t *stop_ends     # (n_stops,): the last symbols of the sequences that end a row, sorted
    cdef int64_t *stop_starts   # (n_stops + 1,): where each sequence starts in
    cdef int64_t *stop_symbols
    # What was recorded, (room, max_rows): symbols, -1 where a row had ended; and log P where it is wanted.
    cdef int64_t *ids
    cdef double *log_probs
    cdef cnp.ndarray id_array, log_prob_array
    cdef list kept              # the arrays that the pointers are into

    def __init__(self, decoder, cnp.ndarray logits not None, list prompts, settings, Py_ssize_t max_rows):
        self.kept = []
        self.decoder = decoder
        self.prompts = prompts
        self.model = <fs_decoder *> PyCapsule_GetPointer(decoder.capsule(), "fastseq.decoder")
        self.kernels = kernels_for(8)
        self.vocab = self.model.vocab
        self.single = self.model.item_size == 4
        dtype = np.float32 if self.single else np.float64
        if logits.dtype != dtype or logits.shape[0] != len(prompts) or logits.shape[1] != self.vocab:
            raise ValueError(
                f"logits should be of {np.dtype(dtype)} and of shape {len(prompts), self.vocab}, not of"
                f" {logits.dtype} and {(<object> logits).shape}"
            )
        self.max_rows = max_rows
        self.active = self.rows = len(prompts)
        self.max_new = settings.max_new
        self.told = True
        self.with_log_probs = settings.return_log_probs
        self.penalty = settings.repetition_penalty
        cdef cnp.ndarray held = np.empty((max_rows, self.vocab), dtype)
        held[:self.rows] = logits
        self.kept.append(held)
        self.logits = cnp.PyArray_BYTES(held)
        self.source = <int64_t *> self.hold(max_rows)
        self.symbols = <int64_t *> self.hold(max_rows)
        self.scores = <double *> self.hold(self.vocab)
        self.weights = <double *> self.hold(self.vocab)
        self.words = (self.vocab + 63) // 64 if self.penalty != 1 else 0
        self.seen = <uint64_t *> self.hold(max_rows * self.words)
        self.set_stops(settings.stop)
        self.make_room(self.max_new if not self.n_stops else min(self.max_new, ROOM))
        self.looked = now()

    cdef void *hold(self, cnp.npy_intp count) except? NULL:
        """So many zeros of 8 bytes, which stay as long as this does."""
        cdef cnp.ndarray array = cnp.PyArray_ZEROS(1, &count, cnp.NPY_INT64, 0)
        self.kept.append(array)
        return cnp.PyArray_DATA(array)

    cdef void *keep(self, values, dtype) except? NULL:
        """The same of some values."""
        cdef cnp.ndarray array = np.array(values, dtype)
        self.kept.append(array)
        return cnp.PyArray_DATA(array)

    cdef int set_stops(self, stops) except -1:
        ordered = sorted(stops, key=lambda sequence: sequence[-1])
        self.n_stops = len(ordered)
        self.stop_ends = <int64_t *> self.keep([sequence[-1] for sequence in ordered], np.int64)
        self.stop_starts = <int64_t *> self.keep([0, *itertools.accumulate(map(len, ordered))], np.int64)
        self.stop_symbols = <int64_t *> self.keep([symbol for s in ordered for symbol in s], np.int64)
        return 0

    cdef int make_room(self, Py_ssize_t room) except -1:
        """Have room for the records of so many steps."""
        cdef Py_ssize_t steps = min(self.step, room)
        cdef cnp.ndarray ids = np.empty((room, self.max_rows), np.int64)
        cdef cnp.ndarray log_probs = np.empty((room if self.with_log_probs else 0, self.max_rows))
        if self.room:
            ids[:steps] = self.id_array[:steps]
            if self.with_log_probs:
                log_probs[:steps] = self.log_prob_array[:steps]
        self.id_array, self.log_prob_array = ids, log_probs
        self.ids = <int64_t *> cnp.PyArray_DATA(ids)
        self.log_probs = <double *> cnp.PyArray_DATA(log_probs)
        self.room = room
        return 0

    cdef int start_seen(self, rows) except -1:
        """The bits of what each prompt holds, in order."""
        cdef Py_ssize_t row
        cdef int64_t symbol
        if self.words:
            for row, prompt in enumerate(rows):
                for symbol in np.unique(prompt):
                    self.see(self.seen + row * self.words, symbol)
        return 0

    cdef inline void see(self, uint64_t *seen, int64_t symbol) noexcept nogil:
        if self.words:
            seen[symbol // 64] |= <uint64_t> 1 << (symbol % 64)

    def advance(self, Py_ssize_t steps):
        """Choose up to so many symbols more of every row; whether any row goes on after them."""
        cdef Py_ssize_t until = self.step + min(steps, self.max_new - self.step)
        cdef int status
        while True:
            with nogil:
                status = self.run(until)
            PyErr_CheckSignals()
            self.looked = now()
            if status == ENOUGH:
                return self.active > 0 and self.step < self.max_new
            if status == MORE_ROOM:
                self.make_room(min(self.max_new, 2 * self.room))
            elif status == FULL:
                self.decoder.renew([np.concatenate([self.prompt_of(i), self.said(i)]) for i in range(self.active)])
            elif status == NO_MEMORY:
                raise MemoryError("for the states of the rows")
            elif status != LOOK:
                where = f"the logits of prompt {self.wrong_row} at step {self.step} are"
                if status == NOTHING_LEFT:
                    raise ValueError(f"{where} all -inf: nothing is left to choose from")
                raise ValueError(f"{where} NaN or infinite: the weights of the model should be looked at")

    cdef int run(self, Py_ssize_t until) noexcept nogil:
        """As many steps as can be done without the GIL."""
        cdef int status
        while self.active and self.step < until:
            if not self.told:
                status = self.tell()
                if status:
                    return status
            if self.step == self.room:
                return MORE_ROOM
            status = self.select()
            if status:
                return status
            if now() - self.looked > BETWEEN_LOOKS:
                return LOOK
        return ENOUGH

    cdef int tell(self) noexcept nogil:
        """Let the decoder have the rows that go on, and the symbols that were chosen."""
        cdef Py_ssize_t i
        cdef bint same = self.active == self.rows
        cdef int status
        for i in range(self.active):
            same &= self.source[i] == i
        if not same:
            if self.model.choose(self.model.self, self.active, self.source) != FS_DONE:
                return NO_MEMORY
            self.rows = self.active
            for i in range(self.active):
                self.source[i] = i
        status = self.model.step(self.model.self, self.rows, self.symbols, self.logits)
        if status == FS_DONE:
            self.told = True
            return 0
        return FULL if status == FS_FULL else LOOK if status == FS_AGAIN else NO_MEMORY

    cdef int select(self) noexcept nogil:
        """One symbol for every row, from its logits."""
        return ENOUGH

    cdef bint said_before(self, Py_ssize_t row, const int64_t *symbols, Py_ssize_t n) noexcept nogil:
        """Whether the last that was chosen of a row is some symbols."""
        return False

    cdef bint ends(self, Py_ssize_t row, int64_t symbol) noexcept nogil:
        """Whether a row ends with one more symbol."""
        cdef Py_ssize_t low = 0, high = self.n_stops, middle
        while low < high:
            middle = (low + high) // 2
            if self.stop_ends[middle] < symbol:
                low = middle + 1
            else:
                high = middle
        while low < self.n_stops and self.stop_ends[low] == symbol:
            if self.stops(row, low):
                return True
            low += 1
        return False

    cdef inline bint stops(self, Py_ssize_t row, Py_ssize_t i) noexcept nogil:
        """Whether all but the last of a stop sequence is the last that was chosen of a row."""
        cdef Py_ssize_t n = self.stop_starts[i + 1] - self.stop_starts[i] - 1
        return n == 0 or (n <= self.step and self.said_before(row, self.stop_symbols + self.stop_starts[i], n))

    cdef inline double penalised(self, double logit) noexcept nogil:
        return logit / self.penalty if logit > 0 else logit * self.penalty

    def prompt_of(self, Py_ssize_t row):
        raise NotImplementedError

    def said(self, Py_ssize_t row):
        raise NotImplementedError


cdef void penalise(Search search, const real *x, const uint64_t *seen) noexcept nogil:
    """The logits of a row as scores, with the penalty on those that were seen."""
    cdef Py_ssize_t i, word, bit
    for i in range(search.vocab):
        search.scores[i] = x[i]
    for word in range(search.words):
        if seen[word]:
            for bit in range(64):
                if seen[word] >> bit & 1:
                    search.scores[64 * word + bit] = search.penalised(search.scores[64 * word + bit])


cdef double log_total(Search search, const real *x, double maximum) noexcept nogil:
    """The logarithm of the sum of exp(x - maximum)."""
    cdef double total = 0
    cdef Py_ssize_t i
    for i in range(search.vocab):
        search.weights[i] = x[i] - maximum
    search.kernels.exp(search.vocab, search.weights, search.weights)
    for i in range(search.vocab):
        total += search.weights[i]
    return log(total)


cdef class Draws(Search):
    """One symbol after another of every row, drawn or the likeliest; see `fastseq.reference._decoding.Draws`."""

    cdef Py_ssize_t copies
    cdef int64_t *row           # (active,): which of all rows each is
    cdef int64_t *lengths       # (max_rows,): of those that ended
    cdef uint64_t *keys         # (max_rows,): of the random numbers; NULL where none are drawn
    cdef double temperature
    cdef double top_p
    cdef Py_ssize_t top_k
    cdef int64_t *places        # (vocab,)
    cdef int64_t *left          # (vocab,): ids that the filters left, in order
    cdef Candidate *heap        # (top_k,), where that is few

    def __init__(self, decoder, logits, list prompts, keys, settings):
        cdef Py_ssize_t i
        self.copies = settings.num_results
        super().__init__(decoder, logits, prompts, settings, len(prompts) * self.copies)
        self.active = self.max_rows
        self.row = <int64_t *> self.hold(self.max_rows)
        self.lengths = <int64_t *> self.hold(self.max_rows)
        self.keys = NULL if keys is None else <uint64_t *> self.keep(keys, np.uint64)
        self.temperature = settings.temperature
        self.top_k = self.vocab if settings.top_k is None else min(self.vocab, settings.top_k)
        self.top_p = 1 if settings.top_p is None else settings.top_p
        for i in range(self.max_rows):
            self.row[i] = i
            self.source[i] = i // self.copies
            self.lengths[i] = -1
        self.start_seen([prompts[i // self.copies] for i in range(self.max_rows)])
        if self.temperature > 0 and (self.top_k < self.vocab or self.top_p < 1):
            self.places = <int64_t *> self.hold(self.vocab)
            self.left = <int64_t *> self.hold(self.vocab)
            if self.few():
                self.heap = <Candidate *> self.hold(self.top_k * (sizeof(Candidate) // 8))

    cdef inline bint few(self) noexcept nogil:
        return self.top_k <= self.vocab // FEW

    cdef int select(self) noexcept nogil:
        cdef Py_ssize_t i, going_on = 0
        cdef int64_t *ids = self.ids + self.step * self.max_rows
        cdef double *log_probs = self.log_probs + self.step * self.max_rows if self.with_log_probs else NULL
        cdef int64_t symbol
        cdef int status
        for i in range(self.max_rows):
            ids[i] = -1
        for i in range(self.active):
            if self.single:
                status = choose(self, i, <const float *> self.logits + self.source[i] * self.vocab, ids, log_probs)
            else:
                status = choose(self, i, <const double *> self.logits + self.source[i] * self.vocab, ids, log_probs)
            if status:
                self.wrong_row = self.row[i] // self.copies
                return status
        for i in range(self.active):
            symbol = ids[self.row[i]]
            if self.n_stops and self.ends(i, symbol):
                self.lengths[self.row[i]] = self.step + 1
                continue
            self.see(self.seen + i * self.words, symbol)
            if going_on < i:
                self.row[going_on] = self.row[i]
                self.source[going_on] = self.source[i]
                memcpy(self.seen + going_on * self.words, self.seen + i * self.words, self.words * sizeof(uint64_t))
            self.symbols[going_on] = symbol
            going_on += 1
        self.active = going_on
        self.step += 1
        self.told = False
        return 0

    cdef int64_t draw(self, double number, double *sum_of_weights) noexcept nogil:
        """Filter the scores, of which the largest is 0, and draw: where their cumulative sum passes the number."""
        cdef Py_ssize_t n = self.vocab, i, low, high
        cdef bint all_left = True
        cdef double total = 0
        if self.temperature != 1:
            for i in range(n):
                self.scores[i] /= self.temperature
        if self.top_k < n:
            n = self.leave(self.best_k(), n, all_left)
            all_left = False
        self.kernels.exp(n, self.scores, self.weights)
        if self.top_p < 1:
            n = self.leave(self.reaches_p(n), n, all_left)
            all_left = False
        for i in range(n):
            total += self.weights[i]
            self.weights[i] = total
        sum_of_weights[0] = total
        number *= total
        low = 0
        high = n - 1
        while low < high:
            i = (low + high) // 2
            if self.weights[i] <= number:
                low = i + 1
            else:
                high = i
        return low if all_left else self.left[low]

    cdef Py_ssize_t leave(self, Py_ssize_t last, Py_ssize_t n, bint all_left) noexcept nogil:
        """Leave the scores up to that at a place, the best first, with their weights; how many they are."""
        cdef Py_ssize_t i, count = 0
        cdef double score = self.scores[last]
        for i in range(n):
            if self.scores[i] > score or (self.scores[i] == score and i <= last):
                self.left[count] = i if all_left else self.left[i]
                self.scores[count] = self.scores[i]
                self.weights[count] = self.weights[i]
                count += 1
        return count

    cdef Py_ssize_t best_k(self) noexcept nogil:
        """The place of the k-th best score."""
        cdef Py_ssize_t i
        if self.few():
            return best_few(self.scores, self.vocab, self.top_k, self.heap)
        for i in range(self.vocab):
            self.places[i] = i
        return best_until(self.scores, NULL, self.places, self.vocab, self.top_k)

    cdef Py_ssize_t reaches_p(self, Py_ssize_t n) noexcept nogil:
        """The place at which the weights, the largest first, reach the share p of all."""
        cdef Py_ssize_t i, count = 0
        cdef double total = 0, least
        for i in range(n):
            total += self.weights[i]
        # All that are less than this are, together, less than what need not be reached.
        least = (1 - self.top_p) * total / n * REACHED
        for i in range(n):
            self.places[count] = i
            count += self.weights[i] >= least
        return best_until(self.scores, self.weights, self.places, count, self.top_p * total * REACHED)

    cdef bint said_before(self, Py_ssize_t row, const int64_t *symbols, Py_ssize_t n) noexcept nogil:
        cdef const int64_t *ids = self.ids + (self.step - n) * self.max_rows + self.row[row]
        cdef Py_ssize_t i
        for i in range(n):
            if ids[i * self.max_rows] != symbols[i]:
                return False
        return True

    def prompt_of(self, Py_ssize_t row):
        """The prompt of a row that goes on."""
        return self.prompts[self.row[row] // self.copies]

    def said(self, Py_ssize_t row):
        """What the decoder was told of a row that goes on."""
        return self.id_array[:self.step - 1, self.row[row]]

    def latest(self):
        """The symbols of the last step (rows,), -1 where a row had ended before it."""
        return self.id_array[self.step - 1].copy()

    def results(self):
        """For each prompt a list of what was chosen: ids, and their log P or None."""
        cdef Py_ssize_t row, n
        found = [[] for _ in range(self.max_rows // self.copies)]
        for row in range(self.max_rows):
            n = self.step if self.lengths[row] < 0 else self.lengths[row]
            ids = self.id_array[:n, row].copy()
            log_probs = self.log_prob_array[:n, row].copy() if self.with_log_probs else None
            found[row // self.copies].append((ids, log_probs))
        return found


cdef int choose(Draws search, Py_ssize_t i, const real *x, int64_t *ids, double *log_probs) noexcept nogil:
    """The symbol of one row that goes on, and its log P."""
    cdef double maximum, total = 0
    cdef Py_ssize_t place
    cdef int status
    cdef bint plain = search.penalty == 1
    if plain:
        place = largest(x, search.vocab, &maximum)
    else:
        penalise(search, x, search.seen + i * search.words)
        place = largest(<const double *> search.scores, search.vocab, &maximum)
    status = fault(maximum)
    if status:
        return status
    if search.temperature > 0:
        if plain:
            for place in range(search.vocab):
                search.scores[place] = x[place] - maximum
        else:
            for place in range(search.vocab):
                search.scores[place] -= maximum
        place = search.draw(uniform(search.keys[search.row[i]], search.step), &total)
        plain &= search.temperature == 1 and search.top_k == search.vocab and search.top_p >= 1
    else:
        plain = False
    ids[search.row[i]] = place
    if log_probs != NULL:
        if not plain:
            largest(x, search.vocab, &maximum)
        # What was drawn from may be the distribution of the model, and then its sum is known.
        log_probs[search.row[i]] = x[place] - maximum - (log(total) if plain else log_total(search, x, maximum))
    return 0


# A hypothesis that is kept.
cdef struct Hypothesis:
    double rank        # log P / n ** length_penalty
    Py_ssize_t n       # symbols
    Py_ssize_t parent  # the row that all but the last symbol are of, at the step before the last
    int64_t id
    double log_prob    # of the last symbol


cdef class Beams(Search):
    """Some hypotheses of every prompt side by side, the likeliest; see `fastseq.reference._decoding.Beams`."""

    cdef Py_ssize_t beams
    cdef Py_ssize_t wanted      # results of each prompt
    cdef double length_penalty
    cdef int64_t *prompt        # (active,): of which prompt each row is, in order
    cdef double *sums           # (active,): log P so far
    # Of each row the largest score and the logarithm of its sum of exponentials; and those without a penalty.
    cdef double *maximum_of
    cdef double *total_of
    cdef double *plain_maximum_of
    cdef double *plain_total_of
    # The same of the rows that are being made, which change places with these at the end of a step.
    cdef int64_t *next_prompt
    cdef double *next_sums
    cdef uint64_t *next_seen
    cdef Py_ssize_t going_on
    cdef Candidate *heap        # (beams,)
    cdef Hypothesis *hypotheses  # (prompts, beams): the best that are finished, the best first
    cdef int64_t *finished      # (prompts,): how many there are
    cdef int64_t *parents       # (room, max_rows): from which row of the step before each row of a record goes on
    cdef cnp.ndarray parent_array

    def __init__(self, decoder, logits, list prompts, settings):
        cdef Py_ssize_t i
        self.beams = settings.num_beams
        super().__init__(decoder, logits, prompts, settings, len(prompts) * self.beams)
        self.wanted = settings.num_results
        self.length_penalty = settings.length_penalty
        self.prompt = <int64_t *> self.hold(self.max_rows)
        self.sums = <double *> self.hold(self.max_rows)
        self.maximum_of = <double *> self.hold(self.max_rows)
        self.total_of = <double *> self.hold(self.max_rows)
        self.plain_maximum_of = <double *> self.hold(self.max_rows)
        self.plain_total_of = <double *> self.hold(self.max_rows)
        self.next_prompt = <int64_t *> self.hold(self.max_rows)
        self.next_sums = <double *> self.hold(self.max_rows)
        self.next_seen = <uint64_t *> self.hold(self.max_rows * self.words)
        self.heap = <Candidate *> self.hold(self.beams * (sizeof(Candidate) // 8))
        self.hypotheses = <Hypothesis *> self.hold(self.max_rows * (sizeof(Hypothesis) // 8))
        self.finished = <int64_t *> self.hold(len(prompts))
        for i in range(self.active):
            self.prompt[i] = i
            self.source[i] = i
        self.start_seen(prompts)

    cdef int make_room(self, Py_ssize_t room) except -1:
        cdef cnp.ndarray parents = np.empty((room, self.max_rows), np.int64)
        if self.room:
            parents[:self.step] = self.parent_array[:self.step]
        self.parent_array = parents
        self.parents = <int64_t *> cnp.PyArray_DATA(parents)
        return Search.make_room(self, room)

    cdef int select(self) noexcept nogil:
        cdef Py_ssize_t first = 0, last
        cdef int status
        self.going_on = 0
        while first < self.active:
            last = first + 1
            while last < self.active and self.prompt[last] == self.prompt[first]:
                last += 1
            status = self.go_on(first, last)
            if status:
                self.wrong_row = self.prompt[first]
                return status
            first = last
        self.prompt, self.next_prompt = self.next_prompt, self.prompt
        self.sums, self.next_sums = self.next_sums, self.sums
        self.seen, self.next_seen = self.next_seen, self.seen
        self.active = self.going_on
        self.step += 1
        self.told = False
        return 0

    cdef int go_on(self, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
        """One step of the beams of one prompt, rows first..last-1; their logits stand in the same order."""
        cdef Py_ssize_t row, i, n = 0, prompt = self.prompt[first], at = self.step * self.max_rows
        cdef const Candidate *one
        cdef int status
        for row in range(first, last):
            if self.single:
                status = look_at(self, row, <const float *> self.logits + row * self.vocab, &n)
            else:
                status = look_at(self, row, <const double *> self.logits + row * self.vocab, &n)
            if status:
                return status
        if self.n_stops:
            for row in range(first, last):
                self.epilogue(row, n)
        sort_heap(self.heap, n)
        if n and self.step + 1 < self.max_new and not self.done(prompt, self.heap[0].score):
            for i in range(n):
                one = &self.heap[i]
                row = self.going_on
                self.next_prompt[row] = prompt
                self.next_sums[row] = one.score
                self.source[row] = one.beam
                self.symbols[row] = one.id
                self.ids[at + row] = one.id
                self.parents[at + row] = one.beam
                if self.with_log_probs:
                    self.log_probs[at + row] = self.log_prob_of(one.beam, one.id)
                if self.words:
                    memcpy(
                        self.next_seen + row * self.words, self.seen + one.beam * self.words,
                        self.words * sizeof(uint64_t),
                    )
                    self.see(self.next_seen + row * self.words, one.id)
                self.going_on += 1
        elif self.step + 1 == self.max_new:
            for i in range(n):
                self.offer(&self.heap[i])
        return 0

    cdef void epilogue(self, Py_ssize_t row, Py_ssize_t n) noexcept nogil:
        """Offer what ends a row, where it is better than the worst that does not."""
        cdef Candidate one
        cdef Py_ssize_t i = 0
        cdef bint found
        one.beam = row
        while i < self.n_stops:
            one.id = self.stop_ends[i]
            found = False
            while i < self.n_stops and self.stop_ends[i] == one.id:
                found = found or self.stops(row, i)
                i += 1
            if found:
                one.score = self.sums[row] + ((self.score_of(row, one.id) - self.maximum_of[row]) - self.total_of[row])
                if one.score > -INFINITY and (n < self.beams or better(&one, &self.heap[0])):
                    self.offer(&one)

    cdef inline double logit_of(self, Py_ssize_t row, int64_t symbol) noexcept nogil:
        cdef Py_ssize_t at = row * self.vocab + symbol
        return (<const float *> self.logits)[at] if self.single else (<const double *> self.logits)[at]

    cdef inline double score_of(self, Py_ssize_t row, int64_t symbol) noexcept nogil:
        cdef double logit = self.logit_of(row, symbol)
        if self.words and self.seen[row * self.words + symbol // 64] >> (symbol % 64) & 1:
            return self.penalised(logit)
        return logit

    cdef inline double log_prob_of(self, Py_ssize_t row, int64_t symbol) noexcept nogil:
        """log P of a symbol after a row, under the model itself."""
        if self.penalty == 1:
            return self.logit_of(row, symbol) - self.maximum_of[row] - self.total_of[row]
        return self.logit_of(row, symbol) - self.plain_maximum_of[row] - self.plain_total_of[row]

    cdef void offer(self, const Candidate *one) noexcept nogil:
        """Keep a hypothesis that is finished, if it is among the best; of equals, the one that was there is better."""
        cdef Py_ssize_t prompt = self.prompt[one.beam], i = self.finished[prompt]
        cdef Hypothesis *kept = self.hypotheses + prompt * self.beams
        cdef double rank = one.score / pow(<double> (self.step + 1), self.length_penalty)
        if i == self.beams:
            if rank <= kept[i - 1].rank:
                return
            i -= 1
        else:
            self.finished[prompt] += 1
        while i > 0 and kept[i - 1].rank < rank:
            kept[i] = kept[i - 1]
            i -= 1
        kept[i].rank = rank
        kept[i].n = self.step + 1
        kept[i].parent = one.beam
        kept[i].id = one.id
        kept[i].log_prob = self.log_prob_of(one.beam, one.id) if self.with_log_probs else 0

    cdef bint done(self, Py_ssize_t prompt, double best) noexcept nogil:
        """Whether no hypothesis that goes on can become better than all that are kept; `best` is the largest sum."""
        if self.finished[prompt] < self.beams:
            return False
        cdef double worst = self.hypotheses[(prompt + 1) * self.beams - 1].rank
        # A sum only falls, and is never divided by more than this.
        return best / pow(<double> self.max_new, self.length_penalty) <= worst

    cdef bint said_before(self, Py_ssize_t row, const int64_t *symbols, Py_ssize_t n) noexcept nogil:
        cdef Py_ssize_t at = self.step * self.max_rows
        while n > 0:
            n -= 1
            at -= self.max_rows
            if self.ids[at + row] != symbols[n]:
                return False
            row = self.parents[at + row]
        return True

    cdef int trace(self, cnp.ndarray into, const char *records, Py_ssize_t row) except -1:
        """What was recorded of a row and its parents, backwards from the last place of an array of 8-byte numbers."""
        cdef Py_ssize_t n = cnp.PyArray_DIM(into, 0), at
        cdef int64_t *numbers = <int64_t *> cnp.PyArray_DATA(into)
        while n > 0:
            n -= 1
            at = n * self.max_rows + row
            numbers[n] = (<const int64_t *> records)[at]
            row = self.parents[at]
        return 0

    def prompt_of(self, Py_ssize_t row):
        """The prompt of a row that goes on."""
        return self.prompts[self.prompt[row]]

    def said(self, Py_ssize_t row):
        """What the decoder was told of a row that goes on."""
        symbols = np.empty(self.step - 1, np.int64)
        self.trace(symbols, <const char *> self.ids, self.parents[(self.step - 1) * self.max_rows + row])
        return symbols

    def results(self):
        """For each prompt a list of the best hypotheses: ids, and their log P or None."""
        cdef Py_ssize_t prompt, i
        cdef const Hypothesis *one
        found = []
        for prompt in range(len(self.prompts)):
            found.append([])
            for i in range(min(self.wanted, self.finished[prompt])):
                one = &self.hypotheses[prompt * self.beams + i]
                ids = np.empty(one.n, np.int64)
                ids[one.n - 1] = one.id
                self.trace(ids[:one.n - 1], <const char *> self.ids, one.parent)
                log_probs = None
                if self.with_log_probs:
                    log_probs = np.empty(one.n)
                    log_probs[one.n - 1] = one.log_prob
                    self.trace(log_probs[:one.n - 1], <const char *> self.log_probs, one.parent)
                found[prompt].append((ids, log_probs))
        return found


cdef void put_all(Beams search, Py_ssize_t row, const real *x, Py_ssize_t *n) noexcept nogil:
    """Put into the heap what is better than the worst there; of equals, what is there came earlier and stays."""
    cdef Candidate one
    cdef double maximum = search.maximum_of[row], total = search.total_of[row], so_far = search.sums[row]
    cdef double least = -INFINITY if n[0] < search.beams else search.heap[0].score
    one.beam = row
    cdef Py_ssize_t i
    for i in range(search.vocab):
        one.score = so_far + ((x[i] - maximum) - total)
        if one.score > least and not (search.n_stops and search.ends(row, i)):
            one.id = i
            put(search.heap, n, search.beams, &one)
            if n[0] == search.beams:
                least = search.heap[0].score


cdef int look_at(Beams search, Py_ssize_t row, const real *x, Py_ssize_t *n) noexcept nogil:
    """Put into the heap what may follow a row and does not end it."""
    cdef double maximum
    cdef int status
    if search.penalty == 1:
        largest(x, search.vocab, &maximum)
    else:
        if search.with_log_probs:
            largest(x, search.vocab, &search.plain_maximum_of[row])
            search.plain_total_of[row] = log_total(search, x, search.plain_maximum_of[row])
        penalise(search, x, search.seen + row * search.words)
        largest(<const double *> search.scores, search.vocab, &maximum)
    status = fault(maximum)
    if status:
        return status
    search.maximum_of[row] = maximum
    if search.penalty == 1:
        search.total_of[row] = log_total(search, x, maximum)
        put_all(search, row, x, n)
    else:
        search.total_of[row] = log_total(search, <const double *> search.scores, maximum)
        put_all(search, row, <const double *> search.scores, n)
    return 0


def search(decoder, logits, list prompts, keys, settings):
    """Draws of some prompts, or beams; see `fastseq.reference._decoding.search`."""
    if settings.num_beams > 1:
        return Beams(decoder, logits, prompts, settings)
    return Draws(decoder, logits, prompts, keys, settings)
