"""The same layers over NumPy: what the compiled ones are compared with, and what there is to read.

Every class here is the class of the same name in `fastseq`, with the same signature and parameters, over the
operations in `fastseq.reference.operations` and `fastseq.reference.dense`. It takes any floating dtype.
"""

from __future__ import annotations

import os
import sys
from typing import Any, ClassVar

from fastseq import layers
from fastseq.io import load_into
from fastseq.reference import dense, losses, operations
from fastseq.state import LSTMState, State

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Dropout",
    "Embedding",
    "LSTMState",
    "LayerNorm",
    "Linear",
    "Sequential",
    "State",
    "load",
    "losses",
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


class Sequential(layers.Sequential):  # noqa: D101
    __doc__ = layers.Sequential.__doc__


def load(path: str | os.PathLike[str]) -> Any:
    """`fastseq.load`, with the classes of this module."""
    return load_into(path, sys.modules[__name__])
