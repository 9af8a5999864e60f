from fastseq.checks import Array

class Rows: ...
class Tape: ...

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
