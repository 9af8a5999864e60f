"""The models over the layers of `fastseq.reference`; they take any floating dtype.

`bert_state_dict` is the same here: it renames.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fastseq import models, reference
from fastseq.models import bert_state_dict
from fastseq.reference import alignment_operations, autoregression, decoding, losses, markov

__all__ = [
    "AutoRegressive",
    "MarkovChain",
    "RecurrentForecaster",
    "RecurrentLM",
    "Seq2Seq",
    "TransformerEncoderModel",
    "TransformerLM",
    "TransformerSeq2Seq",
    "bert_state_dict",
]


class AutoRegressive(models.AutoRegressive):  # noqa: D101
    __doc__ = models.AutoRegressive.__doc__
    _operations: ClassVar[Any] = autoregression
    _layers: ClassVar[Any] = reference
    _losses: ClassVar[Any] = losses
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class MarkovChain(models.MarkovChain):  # noqa: D101
    __doc__ = models.MarkovChain.__doc__
    _decoding: ClassVar[Any] = decoding
    _operations: ClassVar[Any] = markov


class RecurrentLM(models.RecurrentLM):  # noqa: D101
    __doc__ = models.RecurrentLM.__doc__
    _decoding: ClassVar[Any] = decoding
    _decoders: ClassVar[Any] = None
    _layers: ClassVar[Any] = reference
    _losses: ClassVar[Any] = losses
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class RecurrentForecaster(models.RecurrentForecaster):  # noqa: D101
    __doc__ = models.RecurrentForecaster.__doc__
    _layers: ClassVar[Any] = reference
    _losses: ClassVar[Any] = losses
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class TransformerLM(models.TransformerLM):  # noqa: D101
    __doc__ = models.TransformerLM.__doc__
    _decoding: ClassVar[Any] = decoding
    _layers: ClassVar[Any] = reference
    _losses: ClassVar[Any] = losses
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class TransformerEncoderModel(models.TransformerEncoderModel):  # noqa: D101
    __doc__ = models.TransformerEncoderModel.__doc__
    _layers: ClassVar[Any] = reference
    _losses: ClassVar[Any] = losses
    _operations: ClassVar[Any] = alignment_operations
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class TransformerSeq2Seq(models.TransformerSeq2Seq):  # noqa: D101
    __doc__ = models.TransformerSeq2Seq.__doc__
    _layers: ClassVar[Any] = reference
    _losses: ClassVar[Any] = losses
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class Seq2Seq(models.Seq2Seq):  # noqa: D101
    __doc__ = models.Seq2Seq.__doc__
    _decoding: ClassVar[Any] = decoding
    _decoders: ClassVar[Any] = None
    _layers: ClassVar[Any] = reference
    _losses: ClassVar[Any] = losses
    _operations: ClassVar[Any] = alignment_operations
    _dtypes: ClassVar[tuple[str, ...] | None] = None
