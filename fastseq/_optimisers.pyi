from fastseq.checks import Array

def sgd(
    p: Array,
    g: Array,
    momenta: Array | None,
    out: Array,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    n_threads: int,
) -> None: ...
def rmsprop(
    p: Array,
    g: Array,
    squares: Array,
    momenta: Array | None,
    out: Array,
    lr: float,
    alpha: float,
    eps: float,
    momentum: float,
    weight_decay: float,
    n_threads: int,
) -> None: ...
def adam(
    p: Array,
    g: Array,
    means: Array,
    squares: Array,
    out: Array,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    n_threads: int,
) -> None: ...
def scale(x: Array, factor: float, n_threads: int) -> None: ...
def sum_of_squares(x: Array, n_threads: int) -> float: ...
