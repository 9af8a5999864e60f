#ifndef FS_DECODER_H
#define FS_DECODER_H

#include <stddef.h>
#include <stdint.h>

/*
 * What the decoding loop of _decoding.pyx knows of a model. A decoder holds the states of some rows of symbols; a
 * PyCapsule "fastseq.decoder" holds this struct, and both belong to the Python object whose `capsule()` gave it.
 * The functions are called without the GIL, by one thread at a time, and never raise.
 */
enum {
    FS_DONE = 0,
    FS_NO_MEMORY = -1, /* the decoder is as it was before the call */
    /* Of step alone: nothing was done. With the GIL, `renew` of the object is given all symbols of each row, the
       prompt and what it was told after it, and then the step is asked for again. */
    FS_FULL = 1,
    /* Of step alone: some of it is done. Once Ctrl-C was looked for, the same step is asked for again, or no more. */
    FS_AGAIN = 2,
};

typedef struct fs_decoder {
    void *self;
    ptrdiff_t vocab; /* V: logits a row */
    int item_size; /* of a logit; 4: float32, 8: float64 */
    /* One more symbol of each row, symbols [rows]: the logits of what follows, [rows][vocab], are written whole.
       `rows` is always the number of rows there are, at least 1; symbols are ids of the model, in range. */
    int (*step)(void *self, ptrdiff_t rows, const int64_t *symbols, void *logits);
    /* From now on there are `rows` rows, at least 1, of which row i goes on from where the old row parents[i] is.
       An old row may stand there often, or never. */
    int (*choose)(void *self, ptrdiff_t rows, const int64_t *parents);
} fs_decoder;

#endif
