"""States of recurrent layers, of attention and of convolutions: immutable values that belong to whoever holds them."""

from fastseq.checks import Array
from fastseq.state.arrays import ArrayState
from fastseq.state.attention import AttentionState, attention_state, contents, pages_for
from fastseq.state.recurrent import LSTMState, Seq2SeqState, State, adopt, adopt_pair
from fastseq.state.windows import ConvState, adopt_frames

__all__ = [
    "ArrayState",
    "AttentionState",
    "ConvState",
    "LSTMState",
    "Seq2SeqState",
    "State",
    "adopt",
    "adopt_frames",
    "adopt_pair",
    "attention_state",
    "contents",
    "named_arrays",
    "pages_for",
]


def named_arrays(state: AttentionState | ArrayState) -> dict[str, Array]:
    """Return the arrays that a state is made of again, by the arguments of its class; without those that are None."""
    return state._arrays()
