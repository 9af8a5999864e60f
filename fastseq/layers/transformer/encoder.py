"""The encoder of the Transformer, and a layer of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastseq import checks
from fastseq.checks import Array
from fastseq.layers.attention import Frame
from fastseq.layers.base import Tape
from fastseq.layers.transformer.block import Block, Context, Runs, Tokens
from fastseq.layers.transformer.tower import Tower
from fastseq.state import AttentionState


class Encodes(Runs):
    """The verbs of an encoder and of its layers."""

    _attends_memory: ClassVar[bool] = False

    def initial_state(self, batch_size: int) -> AttentionState:
        """The state before the first token.

        Parameters
        ----------
        batch_size : int
            Rows of the batch, 0 or more.
        """
        return self._start_state(checks.size("batch_size", batch_size), None, None)

    def step(self, x_t: Any, state: Any = None) -> tuple[Array, AttentionState]:
        """One token more of each row; the bits are those of a causal call over all tokens.

        Parameters
        ----------
        x_t : array of shape (B, d_model)
            Real floating numbers.
        state : AttentionState, optional
            Where each row stands, which may be at different lengths; before the first token by default.

        Returns
        -------
        y_t : ndarray of shape (B, d_model)
        state : AttentionState
            For the next step. The one that was given still is what it was.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        return self._stepped(x_t, state)

    def _opened(self, x: Any, mask: Any, causal: Any, lengths: Any) -> tuple[Tokens, Context]:
        tokens = self._tokens("x", x, "lengths", lengths)
        rows = tokens.rows
        allowed = self._mask("mask", mask, rows, rows)
        return tokens, Context(Frame(rows, rows, False), allowed, checks.flag("causal", causal))

    def __call__(
        self, x: Any, *, mask: Any = None, causal: bool = False, lengths: Any = None, return_weights: bool = False
    ) -> Any:
        """Encode a batch of sequences; inference.

        Parameters
        ----------
        x : array of shape (B, T, d_model), or (T, d_model)
            Real floating numbers.
        mask : array that broadcasts to (B, heads, T, T), optional
            Booleans: True = may attend. Or real numbers, which are added to the scaled scores; -inf forbids.
        causal : bool
            Whether each token may attend only to those before it and itself.
        lengths : array of shape (B,), optional
            The real tokens of each row, integers in 0..T in any order. Nothing is computed for those past them, and
            nothing in them matters: outputs are 0 there.
        return_weights : bool
            Whether to return what each token attends to, too.

        Returns
        -------
        y : ndarray of shape (B, T, d_model)
        weights : ndarray of shape (B, heads, T, T); of an encoder a list of them, one a layer
            With `return_weights`.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        tokens, context = self._opened(x, mask, causal, lengths)
        y, weights = self._run_rows(tokens.x, context, checks.flag("return_weights", return_weights))
        return self._returned(y, weights, tokens.rows, tokens.unbatched)

    def forward(
        self, x: Any, *, mask: Any = None, causal: bool = False, lengths: Any = None, seed: int | None = None
    ) -> tuple[Array, Tape]:
        """Encode for training: what a call gives, except dropout, and what `backward` needs.

        Parameters
        ----------
        x, mask, causal, lengths
            As for a call. Arrays are not to be changed as long as the tape is used.
        seed : int, optional
            Fixes what dropout drops; drawn where it is not given.

        Returns
        -------
        y : ndarray of shape (B, T, d_model)
        tape : Tape
        """
        return self._forward_padded(*self._opened(x, mask, causal, lengths), seed)

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> Array:
        """Gradients, given that of the outputs.

        Parameters
        ----------
        dy : array of the shape of y
            Past a row's length nothing in it matters.
        tape : Tape
            What `forward` returned.
        grads : mapping from str to ndarray, optional
            Where the gradients of the parameters are added; `grads` of the layer by default.

        Returns
        -------
        dx : ndarray of the shape of x
            0 past a row's length.
        """
        return self._backward_padded(dy, tape, grads)[0]


class TransformerEncoderLayer(Encodes, Block):
    """A layer of an encoder [1]_: self-attention and feed-forward, each added to its input.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
    .. [2] R. Xiong et al., "On layer normalization in the Transformer architecture", ICML 2020.
    .. [3] N. Shazeer, "GLU variants improve Transformer", arXiv:2002.05202, 2020.
    """

    _cross: ClassVar[bool] = False


class TransformerEncoder(Encodes, Tower):
    """The encoder of the Transformer [1]_: layers of self-attention and feed-forward.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
    .. [2] R. Xiong et al., "On layer normalization in the Transformer architecture", ICML 2020.
    .. [3] N. Shazeer, "GLU variants improve Transformer", arXiv:2002.05202, 2020.
    """

    _block = TransformerEncoderLayer
