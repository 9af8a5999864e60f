"""Whole models, from the Markov chain to the Transformer, under one protocol.

`fit`, a call for what a model predicts at every step, `log_prob`, `generate` or `forecast`, `save`.
"""

from fastseq.models.autoregressive import AutoRegressive
from fastseq.models.markov import MarkovChain
from fastseq.models.recurrent import RecurrentForecaster, RecurrentLM
from fastseq.models.seq2seq import TransformerSeq2Seq
from fastseq.models.transformer import TransformerEncoderModel, TransformerLM, bert_state_dict

__all__ = [
    "AutoRegressive",
    "MarkovChain",
    "RecurrentForecaster",
    "RecurrentLM",
    "TransformerEncoderModel",
    "TransformerLM",
    "TransformerSeq2Seq",
    "bert_state_dict",
]
