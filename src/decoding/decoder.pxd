"""How the decoding loop and the models meet; decoder.h says what each part means."""

from libc.stdint cimport int64_t

cdef extern from "decoding/decoder.h" nogil:
    enum:
        FS_DONE
        FS_NO_MEMORY
        FS_FULL
        FS_AGAIN

    ctypedef struct fs_decoder:
        void *self
        ptrdiff_t vocab
        int item_size
        int (*step)(void *self, ptrdiff_t rows, const int64_t *symbols, void *logits) noexcept nogil
        int (*choose)(void *self, ptrdiff_t rows, const int64_t *parents) noexcept nogil
