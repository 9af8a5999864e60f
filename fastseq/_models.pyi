from fastseq.checks import Array

def triangle(x: Array, lengths: Array, order: int, first: int, n_threads: int) -> Array: ...
def predict(x: Array, lengths: Array, intercept: Array, coefficients: Array, n_threads: int) -> Array: ...
def rollout(recent: Array, intercept: Array, coefficients: Array, horizon: int, n_threads: int) -> Array: ...
def rollout_perceptron(
    recent: Array,
    hidden_weight: Array,
    hidden_bias: Array,
    output_weight: Array,
    output_bias: Array,
    activation: str,
    horizon: int,
    n_threads: int,
) -> Array: ...
