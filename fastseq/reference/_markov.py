"""What follows a context of a Markov chain, symbol by symbol, in NumPy; `fastseq._markov` has the same compiled."""

from __future__ import annotations

import numpy as np

from fastseq.checks import Array

# The contexts of one length: contexts, grams and starts, then kept, spread and total; see `fastseq.models.markov`.
Level = tuple[Array, Array, Array, Array, Array, Array]


class Decoder:
    """Rows of symbols, of which a Markov chain needs the last few.

    Parameters
    ----------
    levels : list of Level
        Of contexts of 0, 1, ... symbols.
    recent : int64 array of shape (B, order)
        The last symbols of each row, the last one first; `vocab_size` where there are fewer.
    vocab_size : int
    """

    def __init__(self, levels: list[Level], recent: Array, vocab_size: int) -> None:
        self._levels = levels
        self._recent = recent
        self._vocab_size = vocab_size

    def logits(self) -> Array:
        """log P (B, V) of what follows each row."""
        with np.errstate(divide="ignore"):
            result: Array = np.log([self._distribution(row) for row in self._recent])
        return result

    def _distribution(self, recent: Array) -> Array:
        """P of every symbol, from the empty context to the longest that was seen."""
        p = np.full(self._vocab_size, 1 / self._vocab_size)
        node = 0
        for length, (contexts, grams, starts, kept, spread, total) in enumerate(self._levels):
            if length:
                key = node * (self._vocab_size + 1) + recent[length - 1]
                node = int(np.searchsorted(contexts, key))
                if node == len(contexts) or contexts[node] != key:
                    break
            seen = slice(starts[node], starts[node + 1])
            p *= spread[node]
            p[grams[seen] % self._vocab_size] += kept[seen]
            p /= total[node]
        return p

    def step(self, symbols: Array) -> Array:
        """The same after one symbol more of each row, (B,)."""
        order = self._recent.shape[1]
        self._recent = np.concatenate([symbols[:, None], self._recent], axis=1)[:, :order]
        return self.logits()

    def choose(self, rows: Array) -> None:
        """The rows become these of the rows there were."""
        self._recent = self._recent[rows]
