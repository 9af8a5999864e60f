"""What the tests of the models share: sequences, and what every model of a kind promises."""

import math

import numpy as np
import pytest
from common import assert_same_bits


def random_ids(vocab, shape, seed=0):
    """Ids of unequal frequency."""
    rng = np.random.default_rng([seed, 11])
    return np.minimum(rng.integers(0, vocab, shape), rng.integers(0, vocab, shape))


def random_sequences(vocab, seed=0):
    return [random_ids(vocab, n, seed + n) for n in (17, 0, 40, 1, 3, 25)]


def fitted(model, *data, **settings):
    """The model, after its `fit`."""
    model.fit(*data, **settings)
    return model


def check_generate(model, vocab):
    """What every `generate` promises."""
    prompts = [random_ids(vocab, n, seed=n) for n in (5, 0, 2, 9)]
    lengths = [len(p) for p in prompts]
    padded = np.full((4, 9), -1)
    for row, p in zip(padded, prompts, strict=True):
        row[: len(p)] = p
    together = model.generate(prompts, 12, seed=7)
    assert together.shape == (4, 12) and together.dtype == np.int64
    assert_same_bits(model.generate(padded, 12, lengths=lengths, seed=7), together)
    for p, row in zip(prompts, together, strict=True):
        assert_same_bits(model.generate(p[None], 12, seed=7), row[None])
        assert_same_bits(model.generate(p, 12, seed=7), row)
        assert_same_bits(model.generate(p, 5, seed=7), row[:5])
    assert (model.generate(prompts, 12, seed=8) != together).any()
    assert (model.generate(prompts, 12) != model.generate(prompts, 12)).any()
    many = model.generate(np.zeros((6, 3), int), 12, seed=1)
    assert len(np.unique(many, axis=0)) > 1
    assert_same_bits(many[:3], model.generate(np.zeros((3, 3), int), 12, seed=1))
    likeliest = model.generate(prompts, 3, temperature=0)
    for p, row in zip(prompts, likeliest, strict=True):
        if len(p):
            assert row[0] == np.ravel(model(p)[-1]).argmax()
    assert model.generate(prompts, 0).shape == (4, 0)
    assert model.generate(np.zeros((0, 3), int), 4).shape == (0, 4)
    for wrong, kind, message in [
        ({"max_new": -1}, ValueError, "max_new should be at least 0"),
        ({"max_new": 2.0}, TypeError, "max_new should be an integer"),
        ({"temperature": -1}, ValueError, "temperature should be at least 0"),
        ({"temperature": math.nan}, ValueError, "temperature should be at least 0"),
        ({"temperature": "hot"}, TypeError, "temperature should be a number"),
        ({"seed": -1}, ValueError, "seed should be at least 0"),
        ({"prompt": [[0, vocab]]}, ValueError, rf"but prompt\[0\]\[1\] is {vocab}"),
    ]:
        with pytest.raises(kind, match=message):
            model.generate(**{"prompt": [[0]], "max_new": 3, **wrong})


def check_gradients(model, forward, tape_backward, seed=0):
    """Slopes along random directions, one for each parameter, against central differences."""
    rng = np.random.default_rng([seed, 13])
    _, tape = forward()
    grads = {name: np.zeros_like(a) for name, a in model.parameters.items()}
    tape_backward(tape, grads)
    for name, before in dict(model.parameters).items():
        direction = rng.normal(size=before.shape)
        ends = []
        for step in (3e-6, -3e-6):
            model.parameters[name] = before + step * direction
            ends.append(forward()[0])
        model.parameters[name] = before
        slope, wanted = (grads[name] * direction).sum(), (ends[0] - ends[1]) / 6e-6
        assert abs(slope - wanted) <= 1e-6 * max(abs(wanted), 1e-2), f"{name}: {slope}, by differences {wanted}"


def log_softmax(logits):
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))
