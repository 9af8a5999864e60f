"""The same layers over NumPy: what the compiled ones are compared with, and what there is to read.

Every class here is the class of the same name in `fastseq`, with the same signature and parameters, over the
operations in `fastseq.reference.operations`, `dense`, `attention_operations` and `transformer_operations` beside it. It
takes any floating dtype. The six steps of attention are in `attention_operations.attend`.
"""

from __future__ import annotations

import os
import sys
from typing import Any, ClassVar

from fastseq import elsewhere, layers
from fastseq.checks import Array
from fastseq.io import load_into, register
from fastseq.layers import attention as _layers_attention
from fastseq.layers.attention import AttentionTape, Engine
from fastseq.layers.base import Layer
from fastseq.reference import (
    alignment_operations,
    attention_operations,
    dense,
    losses,
    operations,
    pooling_operations,
    transformer_operations,
)
from fastseq.state import AttentionState, LSTMState, Seq2SeqState, State

__all__ = [
    "GELU",
    "GRU",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "AttentionState",
    "Dropout",
    "Embedding",
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
    "RMSNorm",
    "ReLU",
    "RotaryPositions",
    "Seq2SeqState",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "SinusoidalPositions",
    "Softmax",
    "State",
    "Tanh",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "attention",
    "attention_backward",
    "attention_forward",
    "load",
    "losses",
    "register",
]


class RNN(layers.RNN):  # noqa: D101
    __doc__ = layers.RNN.__doc__
    _operations: ClassVar[Any] = operations
    _dense: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class LSTM(layers.LSTM):  # noqa: D101
    __doc__ = layers.LSTM.__doc__
    _operations: ClassVar[Any] = operations
    _dense: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class GRU(layers.GRU):  # noqa: D101
    __doc__ = layers.GRU.__doc__
    _operations: ClassVar[Any] = operations
    _dense: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class Linear(layers.Linear):  # noqa: D101
    __doc__ = layers.Linear.__doc__
    _operations: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class Embedding(layers.Embedding):  # noqa: D101
    __doc__ = layers.Embedding.__doc__
    _operations: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class LayerNorm(layers.LayerNorm):  # noqa: D101
    __doc__ = layers.LayerNorm.__doc__
    _operations: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class Dropout(layers.Dropout):  # noqa: D101
    __doc__ = layers.Dropout.__doc__
    _operations: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class RMSNorm(layers.RMSNorm):  # noqa: D101
    __doc__ = layers.RMSNorm.__doc__
    _operations: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class ReLU(layers.ReLU):  # noqa: D101
    __doc__ = layers.ReLU.__doc__
    _operations: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class GELU(layers.GELU):  # noqa: D101
    __doc__ = layers.GELU.__doc__
    _operations: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class SiLU(layers.SiLU):  # noqa: D101
    __doc__ = layers.SiLU.__doc__
    _operations: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class Tanh(layers.Tanh):  # noqa: D101
    __doc__ = layers.Tanh.__doc__
    _operations: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class Sigmoid(layers.Sigmoid):  # noqa: D101
    __doc__ = layers.Sigmoid.__doc__
    _operations: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class LastStep(layers.LastStep):  # noqa: D101
    __doc__ = layers.LastStep.__doc__
    _operations: ClassVar[Any] = pooling_operations
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class MeanOverTime(layers.MeanOverTime):  # noqa: D101
    __doc__ = layers.MeanOverTime.__doc__
    _operations: ClassVar[Any] = pooling_operations
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class MaxOverTime(layers.MaxOverTime):  # noqa: D101
    __doc__ = layers.MaxOverTime.__doc__
    _operations: ClassVar[Any] = pooling_operations
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class Softmax(layers.Softmax):  # noqa: D101
    __doc__ = layers.Softmax.__doc__
    _operations: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class SinusoidalPositions(layers.SinusoidalPositions):  # noqa: D101
    __doc__ = layers.SinusoidalPositions.__doc__
    _operations: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class LearnedPositions(layers.LearnedPositions):  # noqa: D101
    __doc__ = layers.LearnedPositions.__doc__
    _operations: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class RotaryPositions(layers.RotaryPositions):  # noqa: D101
    __doc__ = layers.RotaryPositions.__doc__
    _operations: ClassVar[Any] = attention_operations
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class MultiheadAttention(layers.MultiheadAttention):  # noqa: D101
    __doc__ = layers.MultiheadAttention.__doc__
    _operations: ClassVar[Any] = attention_operations
    _dense: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class AdditiveAttention(layers.AdditiveAttention):  # noqa: D101
    __doc__ = layers.AdditiveAttention.__doc__
    _operations: ClassVar[Any] = alignment_operations
    _linear: ClassVar[Any] = Linear
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class MultiplicativeAttention(layers.MultiplicativeAttention):  # noqa: D101
    __doc__ = layers.MultiplicativeAttention.__doc__
    _operations: ClassVar[Any] = attention_operations
    _dense: ClassVar[Any] = dense
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class TransformerEncoderLayer(layers.TransformerEncoderLayer):  # noqa: D101
    __doc__ = layers.TransformerEncoderLayer.__doc__
    _operations: ClassVar[Any] = transformer_operations
    _layers: ClassVar[Any] = sys.modules[__name__]
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class TransformerDecoderLayer(layers.TransformerDecoderLayer):  # noqa: D101
    __doc__ = layers.TransformerDecoderLayer.__doc__
    _operations: ClassVar[Any] = transformer_operations
    _layers: ClassVar[Any] = sys.modules[__name__]
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class TransformerEncoder(layers.TransformerEncoder):  # noqa: D101
    __doc__ = layers.TransformerEncoder.__doc__
    _operations: ClassVar[Any] = transformer_operations
    _layers: ClassVar[Any] = sys.modules[__name__]
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class TransformerDecoder(layers.TransformerDecoder):  # noqa: D101
    __doc__ = layers.TransformerDecoder.__doc__
    _operations: ClassVar[Any] = transformer_operations
    _layers: ClassVar[Any] = sys.modules[__name__]
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class Transformer(layers.Transformer):  # noqa: D101
    __doc__ = layers.Transformer.__doc__
    _operations: ClassVar[Any] = transformer_operations
    _layers: ClassVar[Any] = sys.modules[__name__]
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class Sequential(layers.Sequential):  # noqa: D101
    __doc__ = layers.Sequential.__doc__


_ENGINE: Engine = (attention_operations, None)


@elsewhere.naming
def attention(  # noqa: D103
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    causal: bool = False,
    lengths: Any = None,
    scale: float | None = None,
    window: int | None = None,
    return_weights: bool = False,
) -> Any:
    return _layers_attention.over_attention(_ENGINE, q, k, v, mask, causal, lengths, scale, window, return_weights)


def attention_forward(  # noqa: D103
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    causal: bool = False,
    lengths: Any = None,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Array, AttentionTape]:
    return _layers_attention.over_attention_forward(_ENGINE, q, k, v, mask, causal, lengths, scale, window)


def attention_backward(  # noqa: D103
    dout: Any, tape: AttentionTape
) -> tuple[Array, Array, Array]:
    return _layers_attention.over_attention_backward(_ENGINE, dout, tape)


for _name in ("attention", "attention_forward", "attention_backward"):
    globals()[_name].__doc__ = getattr(_layers_attention, _name).__doc__


def load(path: str | os.PathLike[str], *, classes: Any = ()) -> Any:
    """`fastseq.load`, with the classes of this module."""
    return load_into(path, sys.modules[__name__], classes)
