"""A compiled layer and the reference with the same weights, and how far they may be apart."""

import math

import numpy as np

import fastseq as fs

KINDS = ("LSTM", "GRU", "RNN")


def pair(kind, *sizes, **settings):
    """A layer of fastseq and the one of the reference, float32, with the same weights."""
    compiled = getattr(fs, kind)(*sizes, **settings, seed=0)
    reference = getattr(fs.reference, kind)(*sizes, **settings)
    reference.load_state_dict(compiled.state_dict())
    return compiled, reference


def exact(layer):
    """The reference in float64 with the weights of a layer."""
    kind = getattr(fs.reference, type(layer).__name__)
    double = kind(**{**layer._config, "dtype": "float64"})
    double.load_state_dict(layer.state_dict())
    return double


def assert_close(result, expected, terms, gradient=False):
    """Within what float32 results, or gradients, that are sums of so many terms may be off."""
    times = 64 if gradient else 16
    allowed = times * np.finfo(np.float32).eps * math.ceil(math.log2(2 + terms)) * np.abs(expected).max()
    np.testing.assert_allclose(result, expected, rtol=0, atol=allowed)
