"""One step of a stream, whole sequences, and training on them, beside the reference."""

import numpy as np
import pytest
from pairs import KINDS, assert_close, exact, pair


@pytest.mark.parametrize("engine", ["fastseq", "reference"])
@pytest.mark.parametrize("inputs, hidden", [(16, 32), (64, 128), (256, 256)])
@pytest.mark.parametrize("kind", KINDS)
def bench_step(benchmark, rng, kind, inputs, hidden, engine):
    benchmark.group = f"step {kind} {inputs}/{hidden}"
    layer = pair(kind, inputs, hidden)[engine == "reference"]
    x = rng.standard_normal((1, inputs), np.float32)
    out = np.empty((1, hidden), np.float32)
    _, state = layer.step(x)
    _, expected_state = exact(layer).step(x)
    y, _ = layer.step(x, state, out=out)
    expected, _ = exact(layer).step(x, expected_state)
    assert y is out
    assert_close(out, expected, 2 * (inputs + hidden))
    benchmark(layer.step, x, state, out=out)


@pytest.mark.parametrize("engine", ["fastseq", "reference"])
@pytest.mark.parametrize("batch, time, inputs, hidden", [(1, 100, 64, 128), (8, 50, 64, 128), (32, 20, 128, 256)])
@pytest.mark.parametrize("kind", KINDS)
def bench_sequence(benchmark, rng, kind, batch, time, inputs, hidden, engine):
    benchmark.group = f"sequence {kind} {batch}×{time}×{inputs}×{hidden}"
    layer = pair(kind, inputs, hidden)[engine == "reference"]
    x = rng.standard_normal((batch, time, inputs), np.float32)
    y, state = layer(x)
    expected, expected_state = exact(layer)(x)
    assert_close(y, expected, time * (inputs + hidden))
    for array, expected_array in zip(state, expected_state, strict=True):
        assert_close(array, expected_array, time * (inputs + hidden))
    benchmark(layer, x)


@pytest.mark.parametrize("engine", ["fastseq", "reference"])
@pytest.mark.parametrize("batch, time, inputs, hidden", [(1, 100, 64, 128), (8, 50, 64, 128), (32, 20, 128, 256)])
@pytest.mark.parametrize("kind", KINDS)
def bench_training(benchmark, rng, kind, batch, time, inputs, hidden, engine):
    benchmark.group = f"training {kind} {batch}×{time}×{inputs}×{hidden}"
    layer = pair(kind, inputs, hidden)[engine == "reference"]
    x = rng.standard_normal((batch, time, inputs), np.float32)
    dy = rng.standard_normal((batch, time, hidden), np.float32)

    def forward_backward(layer):
        layer.zero_grad()
        y, _, tape = layer.forward(x)
        dx, dstate = layer.backward(dy, tape)
        return y, dx, *dstate, *layer.grads.values()

    arrays, expected = forward_backward(layer), forward_backward(exact(layer))
    for array, expected_array in zip(arrays, expected, strict=True):
        assert_close(array, expected_array, time * (inputs + hidden), gradient=array is not arrays[0])
    benchmark(forward_backward, layer)
