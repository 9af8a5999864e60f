"""Sequence models on a CPU: recurrent layers, attention and Transformers, compiled, beside a NumPy reference.

>>> import numpy as np
>>> import fastseq as fs
>>> layer = fs.LSTM(64, 128, seed=0)
>>> y, state = layer(np.zeros((8, 100, 64), "float32"))
>>> y.shape, state.h.shape
((8, 100, 128), (8, 1, 128))
"""

from fastseq import init, losses, models, plotting, reference, training
from fastseq.io import load, register
from fastseq.layers import (
    GELU,
    GRU,
    LSTM,
    RNN,
    Add,
    AdditiveAttention,
    Concatenate,
    Dropout,
    Embedding,
    Graph,
    LastStep,
    Layer,
    LayerNorm,
    LearnedPositions,
    Linear,
    MaxOverTime,
    MeanOverTime,
    MultiheadAttention,
    MultiplicativeAttention,
    Multiply,
    ReLU,
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
    operators,
)
from fastseq.layers.attention import attention, attention_backward, attention_forward
from fastseq.reference import models as _reference_models  # noqa: F401  so that it is there
from fastseq.reference import operators as _reference_operators  # noqa: F401
from fastseq.state import AttentionState, LSTMState, Seq2SeqState, State
from fastseq.threads import get_num_threads, set_num_threads
from fastseq.version import __version__

__all__ = [
    "GELU",
    "GRU",
    "LSTM",
    "RNN",
    "Add",
    "AdditiveAttention",
    "AttentionState",
    "Concatenate",
    "Dropout",
    "Embedding",
    "Graph",
    "LSTMState",
    "LastStep",
    "Layer",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "MaxOverTime",
    "MeanOverTime",
    "MultiheadAttention",
    "MultiplicativeAttention",
    "Multiply",
    "RMSNorm",
    "ReLU",
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
    "__version__",
    "attention",
    "attention_backward",
    "attention_forward",
    "get_num_threads",
    "init",
    "load",
    "losses",
    "models",
    "operators",
    "plotting",
    "reference",
    "register",
    "set_num_threads",
    "training",
]
