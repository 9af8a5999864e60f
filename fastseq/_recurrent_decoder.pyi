from collections.abc import Sequence

from fastseq._dense import Packed
from fastseq._recurrent import Cell
from fastseq.checks import Array

class Weights:
    def __init__(
        self,
        embedding: Array,
        inputs: Cell,
        cells: Sequence[Cell],
        output: Packed | Cell,
        n_threads: int,
        *,
        attention: str | None = None,
        combine: Cell | None = None,
        query: Packed | None = None,
        score: Array | None = None,
    ) -> None: ...

class Decoder:
    def __init__(
        self,
        weights: Weights,
        h: Array,
        c: Array | None,
        copies: int,
        n_threads: int,
        keys: Array | None = None,
        projected: Array | None = None,
        lengths: Array | None = None,
    ) -> None: ...
    def capsule(self) -> object: ...
    def step(self, symbols: Array) -> Array: ...
    def choose(self, rows: Array) -> None: ...
