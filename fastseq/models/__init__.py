"""Whole models, from the Markov chain to the Transformer, under one protocol.

`fit`, a call for what a model predicts at every step, `log_prob`, `generate` or `forecast`, `save`.
"""

from fastseq.convert.bert import bert_state_dict
from fastseq.models.autoregressive import AutoRegressive
from fastseq.models.markov import MarkovChain
from fastseq.models.recurrent_forecaster import RecurrentForecaster
from fastseq.models.recurrent_lm import RecurrentLM
from fastseq.models.recurrent_seq2seq import Seq2Seq
from fastseq.models.transformer_encoder import TransformerEncoderModel
from fastseq.models.transformer_lm import TransformerLM
from fastseq.models.transformer_seq2seq import TransformerSeq2Seq

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
