"""The models over the layers of `fastseq.reference`; they take any floating dtype.

`MarkovChain` and `bert_state_dict` are the same here: one counts, the other renames.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fastseq import models, reference
from fastseq.models import MarkovChain, bert_state_dict
from fastseq.reference import alignment_operations, autoregression, losses

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


class RecurrentLM(models.RecurrentLM):  # noqa: D101
    __doc__ = models.RecurrentLM.__doc__
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
    _layers: ClassVar[Any] = reference
    _losses: ClassVar[Any] = losses
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class TransformerEncoderModel(models.TransformerEncoderModel):  # noqa: D101
    __doc__ = models.TransformerEncoderModel.__doc__
    _layers: ClassVar[Any] = reference
    _losses: ClassVar[Any] = losses
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class TransformerSeq2Seq(models.TransformerSeq2Seq):  # noqa: D101
    __doc__ = models.TransformerSeq2Seq.__doc__
    _layers: ClassVar[Any] = reference
    _losses: ClassVar[Any] = losses
    _dtypes: ClassVar[tuple[str, ...] | None] = None


class Seq2Seq(models.Seq2Seq):  # noqa: D101
    __doc__ = models.Seq2Seq.__doc__
    _layers: ClassVar[Any] = reference
    _losses: ClassVar[Any] = losses
    _operations: ClassVar[Any] = alignment_operations
    _dtypes: ClassVar[tuple[str, ...] | None] = None
