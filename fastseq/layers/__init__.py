"""The layers, over the compiled operations."""

from fastseq.layers.dropout import Dropout
from fastseq.layers.embedding import Embedding
from fastseq.layers.linear import Linear
from fastseq.layers.norm import LayerNorm
from fastseq.layers.recurrent import GRU, LSTM, RNN
from fastseq.layers.sequential import Sequential

__all__ = ["GRU", "LSTM", "RNN", "Dropout", "Embedding", "LayerNorm", "Linear", "Sequential"]
