"""Attention, Transformer blocks, and what training needs, operation by operation, beside the same in NumPy."""

import numpy as np
import pytest
from pairs import assert_close, exact, pair

from fastseq import _attention, _dense, _losses, _optimisers
from fastseq.layers.positions import turns
from fastseq.reference import _attention as attention_in_numpy
from fastseq.reference import _dense as dense
from fastseq.reference import _losses as losses_in_numpy
from fastseq.reference import _optimisers as optimisers

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
@pytest.mark.parametrize("rows, width", [(64, 256), (2048, 256)])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def bench_rms_norm(benchmark, rng, direction, rows, width, engine):
    benchmark.group = f"rms norm {direction} {rows}×{width}"
    x, dy = rng.standard_normal((2, rows, width), np.float32)
    weight = rng.standard_normal(width, np.float32)
    if direction == "forward":
        operations, arguments = (_dense.rms_norm_forward, dense.rms_norm_forward), (x, weight, 1e-5, THREADS)
    else:
        _, scales = dense.rms_norm_forward(x, weight, 1e-5, THREADS)
        operations = _dense.rms_norm_backward, dense.rms_norm_backward
        arguments = (x, weight, scales, dy, np.zeros_like(weight), THREADS)
    compared(benchmark, engine, *operations, arguments, max(rows, width))


@both
@pytest.mark.parametrize("kind", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def bench_activation(benchmark, rng, direction, kind, engine):
    rows, width = 256, 1024
    benchmark.group = f"{kind} {direction} {rows}×{width}"
    x, dy = rng.standard_normal((2, rows, width), np.float32)
    if direction == "forward":
        operations, arguments = (_dense.activation_forward, dense.activation_forward), (x, kind, THREADS)
    else:
        operations, arguments = (_dense.activation_backward, dense.activation_backward), (x, dy, kind, THREADS)
    compared(benchmark, engine, *operations, arguments, 1)


@both
@pytest.mark.parametrize("rows, width", [(2048, 64), (512, 1024)])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def bench_softmax(benchmark, rng, direction, rows, width, engine):
    benchmark.group = f"softmax {direction} {rows}×{width}"
    x, dy = rng.standard_normal((2, rows, width), np.float32)
    if direction == "forward":
        operations, arguments = (_dense.softmax_forward, dense.softmax_forward), (x, THREADS)
    else:
        y = dense.softmax_forward(x, THREADS)
        operations, arguments = (_dense.softmax_backward, dense.softmax_backward), (y, dy, THREADS)
    compared(benchmark, engine, *operations, arguments, width)


@both
@pytest.mark.parametrize("interleaved", [False, True])
def bench_rotary(benchmark, rng, interleaved, engine):
    rows, heads, size = 1024, 8, 64
    benchmark.group = f"rotary {rows}×{heads}×{size}{', interleaved' if interleaved else ''}"
    x = rng.standard_normal((rows, heads, size), np.float32)
    cos, sin = turns(size, 10000.0, np.dtype("float32")).up_to(rows)
    operations = _attention.rotary, attention_in_numpy.rotary
    compared(benchmark, engine, *operations, (x, cos, sin, np.arange(rows), interleaved, False, THREADS), 2)


@both
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch, heads, time, width", [(8, 4, 64, 32), (1, 8, 512, 64)])
@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
def bench_attention(benchmark, rng, direction, batch, heads, time, width, causal, engine):
    benchmark.group = f"attention {direction} {batch}×{heads}×{time}×{width}{', causal' if causal else ''}"
    q, k, v, dout = rng.standard_normal((4, batch, heads, time, width), np.float32)

    def of(module):
        def forward(q, k, v, dout):
            return module.attention(q, k, v, None, None, None, causal, None, width**-0.5, False, THREADS)[0]

        def forward_backward(q, k, v, dout):
            settings = None, None, None, causal, None, width**-0.5, 0.0, 0, THREADS
            out, kept = module.attention_forward(q, k, v, *settings)
            return out, *module.attention_backward(kept, dout, THREADS)

        return forward if direction == "forward" else forward_backward

    compared(benchmark, engine, of(_attention), of(attention_in_numpy), (q, k, v, dout), time + width)


@both
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch, time, width, heads", [(1, 32, 128, 4), (8, 64, 256, 8)])
@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
def bench_encoder_block(benchmark, rng, direction, batch, time, width, heads, norm_first, engine):
    benchmark.group = f"encoder block {direction} {batch}×{time}×{width}, {'pre' if norm_first else 'post'}-norm"
    settings = {"dropout": 0.0, "activation": "gelu", "norm_first": norm_first}
    layer = pair("TransformerEncoderLayer", width, heads, 4 * width, **settings)[engine == "numpy"]
    x, dy = rng.standard_normal((2, batch, time, width), np.float32)

    def forward(layer):
        return (layer(x),)

    def forward_backward(layer):
        layer.zero_grad()
        y, tape = layer.forward(x)
        return y, layer.backward(dy, tape), *layer.grads.values()

    run = forward if direction == "forward" else forward_backward
    for i, (array, expected_array) in enumerate(zip(run(layer), run(exact(layer)), strict=True)):
        assert_close(array, expected_array, max(batch * time, 4 * width), gradient=i > 0)
    benchmark(run, layer)


@both
@pytest.mark.parametrize("batch, time, width, heads", [(1, 100, 128, 4), (8, 100, 128, 4), (8, 1000, 256, 4)])
def bench_encoder_step(benchmark, rng, batch, time, width, heads, engine):
    benchmark.group = f"encoder step {batch}×{time}×{width}"
    layers = pair("TransformerEncoderLayer", width, heads, 4 * width, dropout=0.0)
    x = rng.standard_normal((batch, time, width), np.float32)
    state = layers[0].initial_state(batch)
    for t in range(time - 1):
        state = layers[0].step(x[:, t], state)[1]
    layer = layers[engine == "numpy"]
    expected, _ = layers[1].step(x[:, -1], state)  # a state of another dtype would be refused
    assert_close(layer.step(x[:, -1], state)[0], expected, max(time, 4 * width))
    benchmark(lambda: layer.step(x[:, -1], state)[0])


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
    operations = _losses.softmax_cross_entropy, losses_in_numpy.softmax_cross_entropy
    compared(benchmark, engine, *operations, (logits, targets, rows, 0.1, THREADS), classes)


@both
@pytest.mark.parametrize("loss", ["binary_cross_entropy_with_logits", "mean_squared_error", "huber"])
def bench_loss(benchmark, rng, loss, engine):
    shape = (32, 64, 16)
    benchmark.group = f"{loss} {'×'.join(map(str, shape))}"
    x = rng.standard_normal(shape, np.float32)
    t = rng.random(shape, np.float32)
    more = (1.0,) if loss == "huber" else ()
    operations = getattr(_losses, loss), getattr(losses_in_numpy, loss)
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
