from fastseq._bptt import Tape
from fastseq._bptt import backward as backward
from fastseq._bptt import gates as gates
from fastseq._cells import Cell
from fastseq._cells import pack as pack
from fastseq.checks import Array
from fastseq.narrow import Weight

def input_table(cell: Cell, embedding: Weight, n_threads: int) -> Array | None: ...
def run(
    cells: tuple[tuple[Cell, ...], ...],
    x: Array,
    h: Array,
    c: Array | None,
    lengths: Array | None,
    resets: Array | None,
    n_threads: int,
    tables: tuple[Array, ...] | None = None,
) -> tuple[Array, Array, Array | None]: ...
def fits(cells: tuple[tuple[Cell, ...], ...], x: object, dims: int, state: object, out: object) -> bool: ...
def step(
    cells: tuple[tuple[Cell, ...], ...],
    x: Array,
    h: Array,
    c: Array | None,
    out: Array | None,
    n_threads: int,
) -> tuple[Array, Array, Array | None]: ...
def rollout(
    cells: tuple[tuple[Cell, ...], ...],
    weight: Weight,
    bias: Array,
    x: Array,
    h: Array,
    c: Array | None,
    steps: int,
    n_threads: int,
) -> tuple[Array, Array, Array | None]: ...
def forward(
    cells: tuple[Cell, ...],
    x: Array,
    h: Array,
    c: Array | None,
    lengths: Array | None,
    resets: Array | None,
    n_threads: int,
) -> tuple[Array, Array, Array | None, Tape]: ...
