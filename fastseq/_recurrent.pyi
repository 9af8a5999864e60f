from typing import Final

from fastseq.checks import Array

KINDS: Final[dict[str, tuple[int, int]]]
GATE_NAMES: Final[dict[int, str]]

class Cell:
    def weights(self) -> object: ...
    def panels(self) -> object: ...

class Rows: ...
class Tape: ...

def pack(
    kind: str,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None,
    bias_hh: Array | None,
    weight_hr: Array | None,
) -> Cell: ...
def input_table(cell: Cell, embedding: Array, n_threads: int) -> Array | None: ...
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
    weight: Array,
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
def gates(tape: Tape) -> dict[str, Array]: ...
def backward(
    tape: Tape,
    dy: Array,
    dh: Array | None,
    dc: Array | None,
    truncate: int | None,
    grads: tuple[tuple[Array | None, ...], ...],
    keep: bool,
    n_threads: int,
) -> tuple[Array, Array, Array | None, tuple[Array, Array | None] | None]: ...
