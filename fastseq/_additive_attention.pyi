from fastseq.checks import Array

def tanh_forward(x: Array, n_threads: int) -> Array: ...
def tanh_backward(y: Array, dy: Array, n_threads: int) -> Array: ...
def align(
    query: Array, projected: Array, keys: Array, score: Array, firsts: Array, counts: Array, n_threads: int
) -> tuple[Array, Array]: ...
def align_backward(
    query: Array,
    projected: Array,
    keys: Array,
    score: Array,
    starts: Array | None,
    firsts: Array,
    counts: Array,
    weights: Array,
    dcontext: Array,
    dprojected: Array,
    dkeys: Array,
    dscore: Array,
    n_threads: int,
) -> Array: ...
