"""The same layers over NumPy: what the compiled ones are compared with, and what there is to read.

Every class here is the class of the same name in `fastseq`, with the same signature and parameters, over the operations
in NumPy. Those are in files named as the compiled modules: `fastseq/reference/_recurrent.py` has the cells,
`_attention.py` the six steps of attention, in `attend`. They take any floating dtype.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from fastseq import elsewhere, layers
from fastseq.io import load_into, register
from fastseq.layers import Layer
from fastseq.layers import attention as _layers_attention
from fastseq.reference import losses
from fastseq.reference._backend import NUMPY
from fastseq.state import AttentionState, ConvState, LSTMState, Seq2SeqState, State

if TYPE_CHECKING:  # each class here is a subclass of the one it is made from, and has its type
    from fastseq.layers import (
        GELU,
        GRU,
        LSTM,
        RNN,
        Add,
        AdditiveAttention,
        AvgPool1d,
        Concatenate,
        Conv1d,
        Dropout,
        Embedding,
        Graph,
        LastOfDirections,
        LastStep,
        LayerNorm,
        LearnedPositions,
        Linear,
        MaxOverTime,
        MaxPool1d,
        MeanOverTime,
        MergeDirections,
        MultiheadAttention,
        MultiplicativeAttention,
        Multiply,
        ReLU,
        Reverse,
        RMSNorm,
        RotaryPositions,
        Sequential,
        Sigmoid,
        SiLU,
        SinusoidalPositions,
        Slice,
        Softmax,
        Tanh,
        Transformer,
        TransformerDecoder,
        TransformerDecoderLayer,
        TransformerEncoder,
        TransformerEncoderLayer,
        ZeroPadded,
    )

__all__ = [
    "GELU",
    "GRU",
    "LSTM",
    "RNN",
    "Add",
    "AdditiveAttention",
    "AttentionState",
    "AvgPool1d",
    "Concatenate",
    "Conv1d",
    "ConvState",
    "Dropout",
    "Embedding",
    "Graph",
    "LSTMState",
    "LastOfDirections",
    "LastStep",
    "Layer",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "MaxOverTime",
    "MaxPool1d",
    "MeanOverTime",
    "MergeDirections",
    "MultiheadAttention",
    "MultiplicativeAttention",
    "Multiply",
    "RMSNorm",
    "ReLU",
    "Reverse",
    "RotaryPositions",
    "Seq2SeqState",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "SinusoidalPositions",
    "Slice",
    "Softmax",
    "State",
    "Tanh",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "ZeroPadded",
    "attention",
    "attention_backward",
    "attention_forward",
    "load",
    "losses",
    "register",
]

for _name in layers.__all__:
    if _name != "Layer":
        globals()[_name] = NUMPY.made_from(getattr(layers, _name), __name__)

attention = elsewhere.naming(NUMPY.over(_layers_attention.attention.__wrapped__, __name__))  # type: ignore[attr-defined]
attention_forward = NUMPY.over(_layers_attention.attention_forward, __name__)
attention_backward = NUMPY.over(_layers_attention.attention_backward, __name__)


def load(path: str | os.PathLike[str], *, classes: Any = (), weights: str | None = None) -> Any:
    """`fastseq.load`, with the classes of this module."""
    return load_into(path, sys.modules[__name__], classes, weights)
