"""States of recurrent layers and of attention: immutable values that belong to whoever holds them."""

from fastseq.state.attention import AttentionState, attention_state, pages_for
from fastseq.state.recurrent import LSTMState, Seq2SeqState, State, adopt, adopt_pair

__all__ = [
    "AttentionState",
    "LSTMState",
    "Seq2SeqState",
    "State",
    "adopt",
    "adopt_pair",
    "attention_state",
    "pages_for",
]
