"""The layers, over the compiled operations.

The function `attention` is in `fastseq.layers.attention`; here it would hide that module.
"""

from fastseq.layers.activation import GELU, ReLU, Sigmoid, SiLU, Softmax, Tanh
from fastseq.layers.additive_attention import AdditiveAttention, MultiplicativeAttention
from fastseq.layers.attention import MultiheadAttention
from fastseq.layers.base import Layer
from fastseq.layers.conv import Conv1d
from fastseq.layers.directions import LastOfDirections, MergeDirections, Reverse
from fastseq.layers.dropout import Dropout
from fastseq.layers.embedding import Embedding
from fastseq.layers.graph import Graph
from fastseq.layers.joining import Add, Concatenate, Multiply, Slice
from fastseq.layers.linear import Linear
from fastseq.layers.norm import LayerNorm, RMSNorm
from fastseq.layers.pooling import AvgPool1d, LastStep, MaxOverTime, MaxPool1d, MeanOverTime
from fastseq.layers.positions import LearnedPositions, RotaryPositions, SinusoidalPositions
from fastseq.layers.recurrent import GRU, LSTM, RNN
from fastseq.layers.sequential import Sequential, ZeroPadded
from fastseq.layers.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "GELU",
    "GRU",
    "LSTM",
    "RNN",
    "Add",
    "AdditiveAttention",
    "AvgPool1d",
    "Concatenate",
    "Conv1d",
    "Dropout",
    "Embedding",
    "Graph",
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
    "Sequential",
    "SiLU",
    "Sigmoid",
    "SinusoidalPositions",
    "Slice",
    "Softmax",
    "Tanh",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "ZeroPadded",
]
