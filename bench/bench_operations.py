"""What training needs beside recurrent layers, operation by operation, beside the same in NumPy."""

import numpy as np
import pytest
from pairs import assert_close, exact, pair

from fastseq import _dense, _losses, _optimisers
from fastseq.reference import dense, loss_operations, optimisers

both = pytest.mark.parametrize("engine", ["fastseq", "numpy"])
THREADS = 1


def compared(benchmark, engine, compiled, in_numpy, arguments, terms):
    """Check that the compiled operation gives what NumPy gives in float64, then time one of the two.

    Some operations write into their arguments: they get copies, and what they leave there is compared as well.
    """

    def copies(dtype):
        return [
            a.astype(dtype if a.dtype.kind == "f" else a.dtype) if isinstance(a, np.ndarray) else a for a in arguments
        ]

    def everything(operation, given):
        result = operation(*given)
        results = result if isinstance(result, tuple) else (result,)
        return [a for a in (*results, *given) if isinstance(a, float | np.ndarray)]

    arrays, expected = everything(compiled, copies("float32")), everything(in_numpy, copies("float64"))
    for array, expected_array in zip(arrays, expected, strict=True):
        assert_close(array, expected_array, terms)
    benchmark(compiled if engine == "fastseq" else in_numpy, *copies("float32"))


@both
@pytest.mark.parametrize("rows, inputs, outputs", [(64, 256, 256), (2048, 256, 96)])
def bench_linear(benchmark, rng, rows, inputs, outputs, engine):
    benchmark.group = f"linear, forward and backward {rows}×{inputs}×{outputs}"
    layer = pair("Linear", inputs, outputs)[engine == "numpy"]
    x, dy = rng.standard_normal((rows, inputs), np.float32), rng.standard_normal((rows, outputs), np.float32)

    def forward_backward(layer):
        layer.zero_grad()
        y, tape = layer.forward(x)
        return y, layer.backward(dy, tape), *layer.grads.values()

    for array, expected_array in zip(forward_backward(layer), forward_backward(exact(layer)), strict=True):
        assert_close(array, expected_array, max(rows, inputs, outputs))
    benchmark(forward_backward, layer)


@both
@pytest.mark.parametrize("symbols, width, rows", [(97, 256, 2048), (10000, 256, 2048)])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def bench_embedding(benchmark, rng, direction, symbols, width, rows, engine):
    benchmark.group = f"embedding {direction} {symbols}×{width}, {rows} rows"
    weight, ids = rng.standard_normal((symbols, width), np.float32), rng.integers(0, symbols, rows)
    if direction == "forward":
        operations, arguments = (_dense.embedding_forward, dense.embedding_forward), (weight, ids, THREADS)
    else:
        dy = rng.standard_normal((rows, width), np.float32)
        operations = _dense.embedding_backward, dense.embedding_backward
        arguments = (ids, dy, np.zeros_like(weight), -1, THREADS)
    compared(benchmark, engine, *operations, arguments, rows)


@both
@pytest.mark.parametrize("rows, width", [(64, 256), (2048, 256)])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def bench_layer_norm(benchmark, rng, direction, rows, width, engine):
    benchmark.group = f"layer norm {direction} {rows}×{width}"
    x, dy = rng.standard_normal((2, rows, width), np.float32)
    weight, bias = rng.standard_normal((2, width), np.float32)
    if direction == "forward":
        operations = _dense.layer_norm_forward, dense.layer_norm_forward
        arguments = (x, weight, bias, 1e-5, THREADS)
    else:
        _, means, scales = dense.layer_norm_forward(x, weight, bias, 1e-5, THREADS)
        operations = _dense.layer_norm_backward, dense.layer_norm_backward
        arguments = (x, weight, means, scales, dy, np.zeros_like(weight), np.zeros_like(bias), THREADS)
    compared(benchmark, engine, *operations, arguments, max(rows, width))


@both
@pytest.mark.parametrize("size", [4096, 524288])
def bench_dropout(benchmark, rng, size, engine):
    benchmark.group = f"dropout {size}"
    x = rng.standard_normal(size, np.float32)
    compared(benchmark, engine, _dense.dropout, dense.dropout, (x, 0.3, 7, 1, THREADS), 1)


@both
@pytest.mark.parametrize("rows, classes", [(2048, 96), (2048, 10000)])
def bench_softmax_cross_entropy(benchmark, rng, rows, classes, engine):
    benchmark.group = f"softmax cross-entropy {rows}×{classes}"
    logits, targets = rng.standard_normal((rows, classes), np.float32), rng.integers(0, classes, rows)
    operations = _losses.softmax_cross_entropy, loss_operations.softmax_cross_entropy
    compared(benchmark, engine, *operations, (logits, targets, rows, 0.1, THREADS), classes)


@both
@pytest.mark.parametrize("loss", ["binary_cross_entropy_with_logits", "mean_squared_error", "huber"])
def bench_loss(benchmark, rng, loss, engine):
    shape = (32, 64, 16)
    benchmark.group = f"{loss} {'×'.join(map(str, shape))}"
    x = rng.standard_normal(shape, np.float32)
    t = rng.random(shape, np.float32)
    more = (1.0,) if loss == "huber" else ()
    operations = getattr(_losses, loss), getattr(loss_operations, loss)
    compared(benchmark, engine, *operations, (x, t, *more, None, x.size, THREADS), x.size)


# After parameter, gradient, what is kept and the result.
PASSES = {
    "sgd": (1, (1e-2, 0.9, True, 1e-2)),
    "rmsprop": (2, (1e-2, 0.99, 1e-4, 0.9, 1e-2)),
    "adam": (2, (3, 1e-2, 0.9, 0.999, 1e-4, 1e-2, True)),
}


@both
@pytest.mark.parametrize("size", [1024, 262144])
@pytest.mark.parametrize("optimiser", PASSES)
def bench_optimiser(benchmark, rng, optimiser, size, engine):
    benchmark.group = f"{optimiser} {size}"
    kept, settings = PASSES[optimiser]
    p, g, *arrays = np.abs(rng.standard_normal((2 + kept, size), np.float32))
    operations = getattr(_optimisers, optimiser), getattr(optimisers, optimiser)
    compared(benchmark, engine, *operations, (p, g, *arrays, np.zeros_like(p), *settings, THREADS), 1)


@both
@pytest.mark.parametrize("size", [1024, 262144])
def bench_clipping(benchmark, rng, size, engine):
    benchmark.group = f"norm and scale {size}"

    def of(module):
        def clip(x):
            # Neither more nor less, or it would be 0 before long.
            module.scale(x, -1.0, THREADS)
            return module.sum_of_squares(x, THREADS)

        return clip

    x = rng.standard_normal(size, np.float32)
    compared(benchmark, engine, of(_optimisers), of(optimisers), (x,), size)
