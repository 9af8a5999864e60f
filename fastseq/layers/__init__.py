"""The layers, over the compiled operations."""

from fastseq.layers.recurrent import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN"]
