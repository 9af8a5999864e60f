from typing import Final

from fastseq.checks import Array

KINDS: Final[dict[str, tuple[int, int]]]

class Cell: ...

def pack(
    kind: str,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None,
    bias_hh: Array | None,
    weight_hr: Array | None,
) -> Cell: ...
def run(
    cells: tuple[tuple[Cell, ...], ...],
    x: Array,
    h: Array,
    c: Array | None,
    lengths: Array | None,
    n_threads: int,
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
