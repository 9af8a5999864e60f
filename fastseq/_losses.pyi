from fastseq.checks import Array

def softmax_cross_entropy(
    logits: Array, targets: Array, count: int, label_smoothing: float, n_threads: int
) -> tuple[float, Array]: ...
def binary_cross_entropy_with_logits(
    logits: Array, targets: Array, lengths: Array | None, count: int, n_threads: int
) -> tuple[float, Array]: ...
def mean_squared_error(
    predictions: Array, targets: Array, lengths: Array | None, count: int, n_threads: int
) -> tuple[float, Array]: ...
def huber(
    predictions: Array, targets: Array, delta: float, lengths: Array | None, count: int, n_threads: int
) -> tuple[float, Array]: ...
