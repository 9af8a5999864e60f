"""What follows a context of a Markov chain, compiled; `fastseq.reference._markov` has the same in NumPy."""

cimport numpy as cnp
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport log
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memmove

from decoding.decoder cimport FS_DONE, FS_NO_MEMORY, fs_decoder

import numpy as np

cnp.import_array()

# The contexts of one length and what followed them; see fastseq/models/markov.py.
cdef struct Level:
    Py_ssize_t n
    const int64_t *contexts
    const int64_t *grams
    const int64_t *starts
    const double *kept
    const double *spread
    const double *total


cdef int step(void *self, ptrdiff_t rows, const int64_t *symbols, void *logits) noexcept nogil:
    (<Decoder> self).add(symbols)
    (<Decoder> self).predict(<double *> logits)
    return FS_DONE


cdef int choose(void *self, ptrdiff_t rows, const int64_t *parents) noexcept nogil:
    return (<Decoder> self).take(rows, parents)


cdef class Decoder:
    """Rows of symbols, of which a Markov chain needs the last few; see `fastseq.reference._markov.Decoder`."""

    cdef fs_decoder functions
    cdef list levels            # the arrays that belong to
    cdef Level *level
    cdef object level_array
    cdef Py_ssize_t order
    cdef Py_ssize_t rows
    cdef int64_t vocab
    cdef int64_t *recent        # (rows, order): the last symbol first

    def __init__(self, list levels, cnp.ndarray recent not None, vocab_size):
        cdef Py_ssize_t i
        cdef cnp.ndarray room = np.zeros((len(levels), sizeof(Level)), np.uint8)
        self.vocab = vocab_size
        self.rows, self.order = cnp.PyArray_DIM(recent, 0), cnp.PyArray_DIM(recent, 1)
        self.levels = [tuple(np.ascontiguousarray(array) for array in level) for level in levels]
        self.level_array = room
        self.level = <Level *> cnp.PyArray_DATA(room)
        for i in range(len(levels)):
            contexts, grams, starts, kept, spread, total = self.levels[i]
            self.level[i].n = len(contexts)
            self.level[i].contexts = <const int64_t *> cnp.PyArray_DATA(contexts)
            self.level[i].grams = <const int64_t *> cnp.PyArray_DATA(grams)
            self.level[i].starts = <const int64_t *> cnp.PyArray_DATA(starts)
            self.level[i].kept = <const double *> cnp.PyArray_DATA(kept)
            self.level[i].spread = <const double *> cnp.PyArray_DATA(spread)
            self.level[i].total = <const double *> cnp.PyArray_DATA(total)
        self.recent = <int64_t *> PyMem_RawMalloc(self.rows * self.order * sizeof(int64_t))
        if self.recent == NULL:
            raise MemoryError("for the symbols of the rows")
        cdef cnp.ndarray given = np.ascontiguousarray(recent, np.int64)
        memcpy(self.recent, cnp.PyArray_DATA(given), self.rows * self.order * sizeof(int64_t))
        self.functions.self = <void *> self
        self.functions.vocab = self.vocab
        self.functions.item_size = sizeof(double)
        self.functions.step = step
        self.functions.choose = choose

    def __dealloc__(self):
        PyMem_RawFree(self.recent)

    def capsule(self):
        """How the search drives this; it lives as long as this does."""
        return PyCapsule_New(&self.functions, "fastseq.decoder", NULL)

    def logits(self):
        """log P (B, V) of what follows each row."""
        cdef cnp.ndarray result = np.empty((self.rows, self.vocab))
        with nogil:
            self.predict(<double *> cnp.PyArray_DATA(result))
        return result

    cdef void add(self, const int64_t *symbols) noexcept nogil:
        """One symbol more of each row."""
        cdef Py_ssize_t row
        cdef int64_t *recent = self.recent
        if self.order == 0:
            return
        for row in range(self.rows):
            memmove(recent + 1, recent, (self.order - 1) * sizeof(int64_t))
            recent[0] = symbols[row]
            recent += self.order

    cdef int take(self, Py_ssize_t rows, const int64_t *parents) noexcept nogil:
        """The rows become these of the rows there were."""
        cdef Py_ssize_t row
        cdef int64_t *recent = <int64_t *> PyMem_RawMalloc(rows * self.order * sizeof(int64_t))
        if recent == NULL:
            return FS_NO_MEMORY
        for row in range(rows):
            memcpy(recent + row * self.order, self.recent + parents[row] * self.order, self.order * sizeof(int64_t))
        PyMem_RawFree(self.recent)
        self.recent = recent
        self.rows = rows
        return FS_DONE

    cdef void predict(self, double *logits) noexcept nogil:
        cdef Py_ssize_t row
        for row in range(self.rows):
            self.distribution(self.recent + row * self.order, logits + row * self.vocab)

    cdef void distribution(self, const int64_t *recent, double *p) noexcept nogil:
        """log P of every symbol, from the empty context to the longest that was seen."""
        cdef const Level *level
        cdef Py_ssize_t length, node = 0, gram
        cdef int64_t i
        cdef double last = 1, logarithm = 0
        for i in range(self.vocab):
            p[i] = 1 / <double> self.vocab
        for length in range(self.order + 1):
            level = &self.level[length]
            if length:
                node = self.find(level, node * (self.vocab + 1) + recent[length - 1])
                if node < 0:
                    break
            for i in range(self.vocab):
                p[i] *= level.spread[node]
            for gram in range(level.starts[node], level.starts[node + 1]):
                p[level.grams[gram] % self.vocab] += level.kept[gram]
            for i in range(self.vocab):
                p[i] /= level.total[node]
        for i in range(self.vocab):
            if p[i] != last:  # many that were not seen are equally likely
                last = p[i]
                logarithm = log(last)
            p[i] = logarithm

    cdef Py_ssize_t find(self, const Level *level, int64_t key) noexcept nogil:
        """The number of a context; -1 where it was not seen."""
        cdef Py_ssize_t low = 0, high = level.n, middle
        while low < high:
            middle = (low + high) // 2
            if level.contexts[middle] < key:
                low = middle + 1
            else:
                high = middle
        return low if low < level.n and level.contexts[low] == key else -1
