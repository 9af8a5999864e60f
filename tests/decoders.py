"""Decoders for tests: of any function from a history to logits, driven compiled or by NumPy, with a record of calls."""

import ctypes
from dataclasses import replace

import numpy as np

from fastseq import _decoding
from fastseq.backend import COMPILED
from fastseq.models.symbol_model import SymbolModel
from fastseq.reference import _decoding as numpy_decoding

STEP = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.POINTER(ctypes.c_int64), ctypes.c_void_p
)
CHOOSE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.POINTER(ctypes.c_int64))
DONE, NO_MEMORY, FULL, AGAIN = 0, -1, 1, 2


class Struct(ctypes.Structure):
    """fs_decoder of src/decoding/decoder.h."""

    _fields_ = [
        ("self", ctypes.c_void_p),
        ("vocab", ctypes.c_ssize_t),
        ("item_size", ctypes.c_int),
        ("step", STEP),
        ("choose", CHOOSE),
    ]


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Spy:
    """A decoder that knows the history of every row."""

    def __init__(self, function, histories):
        self.function = function
        self.histories = [list(map(int, history)) for history in histories]
        self.calls = []  # ("step", rows) and ("choose", rows of the old ones)

    def logits(self):
        return np.stack([self.function(tuple(history)) for history in self.histories])

    def step(self, symbols):
        assert len(symbols) == len(self.histories) > 0
        self.calls.append(("step", len(symbols)))
        for history, symbol in zip(self.histories, symbols, strict=True):
            history.append(int(symbol))
        return self.logits()

    def choose(self, rows):
        self.calls.append(("choose", list(map(int, rows))))
        self.histories = [list(self.histories[row]) for row in rows]

    def steps(self):
        """How many rows each step was of."""
        return [n for name, n in self.calls if name == "step"]


class CompiledSpy(Spy):
    """The same behind the struct that the compiled search drives.

    With `full_at`, a step of that number finds no room, and `renew` is called. With `no_memory_at`, there is none.
    """

    def __init__(self, function, histories, full_at=None, no_memory_at=None):
        super().__init__(function, histories)
        self.full_at, self.no_memory_at = full_at, no_memory_at
        self.renewed = []
        first = self.logits()
        assert first.dtype in (np.float32, np.float64)
        self.struct = Struct(None, first.shape[1], first.itemsize, STEP(self._step), CHOOSE(self._choose))

    def capsule(self):
        return new_capsule(ctypes.addressof(self.struct), b"fastseq.decoder", None)

    def _step(self, _, rows, symbols, logits):
        here = len(self.steps())
        if here == self.no_memory_at:
            return NO_MEMORY
        if here == self.full_at and not self.renewed:
            self.told = [list(history) for history in self.histories]
            self.histories = None
            return FULL
        result = np.ascontiguousarray(self.step(symbols[:rows]))
        ctypes.memmove(logits, result.ctypes.data, result.nbytes)
        return DONE

    def _choose(self, _, rows, parents):
        self.choose(parents[:rows])
        return DONE

    def renew(self, rows):
        assert [list(map(int, row)) for row in rows] == self.told
        self.histories = self.told
        self.renewed.append(len(rows))


class Whim(SymbolModel):
    """Logits that are random numbers, a function of the whole history and a seed; `shape` changes them."""

    def __init__(self, vocab_size, seed=0, *, dtype="float64", engine="compiled", shape=None, logits=None, **of_spy):
        self._config = {"vocab_size": vocab_size, "seed": seed}
        self._start()
        self.vocab_size = vocab_size
        self.outputs = vocab_size if logits is None else logits
        self.seed, self.engine, self.dtype, self.shape, self.of_spy = seed, engine, dtype, shape, of_spy
        self._backend = replace(COMPILED, decoding=_decoding if engine == "compiled" else numpy_decoding)
        self.spies = []

    def function(self, history):
        logits = np.random.default_rng([self.seed, *history, 77]).normal(size=self.outputs) * 2
        logits = logits if self.shape is None else self.shape(logits, history)
        return logits.astype(self.dtype)

    def _log_probs(self, given):
        raise AssertionError("nothing here asks for probabilities of sequences that are known")

    def _decoder(self, prompts, copies):
        spy = (CompiledSpy if self.engine == "compiled" else Spy)(self.function, prompts, **self.of_spy)
        self.spies.append(spy)
        return spy.logits(), spy

    def __repr__(self):
        return f"Whim({self.engine})"
