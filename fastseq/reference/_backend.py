"""The backend in NumPy: every operation once more, in code that reads like its equations."""

from __future__ import annotations

from fastseq.backend import Backend, register
from fastseq.reference import (
    _additive_attention,
    _attention,
    _autoregression,
    _convolution,
    _decoding,
    _dense,
    _joining,
    _losses,
    _markov,
    _optimisers,
    _pooling,
    _recurrent,
    _transformer,
)

NUMPY = Backend(
    name="numpy",
    dtypes=None,
    recurrent=_recurrent,
    dense=_dense,
    convolution=_convolution,
    attention=_attention,
    additive_attention=_additive_attention,
    pooling=_pooling,
    joining=_joining,
    transformer=_transformer,
    losses=_losses,
    optimisers=_optimisers,
    decoding=_decoding,
    autoregression=_autoregression,
    markov=_markov,
)
register(NUMPY)
