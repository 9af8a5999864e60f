from collections.abc import Sequence

from fastseq._cells import Cell
from fastseq._packing import PackedWeight
from fastseq.checks import Array
from fastseq.narrow import Weight

def pack_pair(weight: Weight, bias: Array | None, columns: int) -> PackedWeight: ...

class Weights:
    def __init__(
        self,
        embedding: Weight,
        inputs: Cell,
        table: Array | None,
        cells: Sequence[Cell],
        output: PackedWeight,
        *,
        attention: str | None = None,
        combine: PackedWeight | None = None,
        query: PackedWeight | None = None,
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
