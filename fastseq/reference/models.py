"""The models over the layers of `fastseq.reference`; they take any floating dtype.

`bert_state_dict` is the same here: it renames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastseq import models
from fastseq.models import bert_state_dict
from fastseq.reference._backend import NUMPY

if TYPE_CHECKING:  # each class here is a subclass of the one it is made from, and has its type
    from fastseq.models import (
        AutoRegressive,
        MarkovChain,
        RecurrentForecaster,
        RecurrentLM,
        Seq2Seq,
        TransformerEncoderModel,
        TransformerLM,
        TransformerSeq2Seq,
    )

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

for _name in __all__:
    if _name != "bert_state_dict":
        globals()[_name] = NUMPY.made_from(getattr(models, _name), __name__)
