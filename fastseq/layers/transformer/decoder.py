"""The decoder of the Transformer, and a layer of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fastseq import checks, threads
from fastseq.checks import Array
from fastseq.layers.attention import Frame
from fastseq.layers.base import Tape
from fastseq.layers.rows import Rows
from fastseq.layers.transformer.block import Block, Context, Runs, Tokens, same_batch
from fastseq.layers.transformer.tower import Tower
from fastseq.state import AttentionState


class Decodes(Runs):
    """The verbs of a decoder and of its layers."""

    _length_names: ClassVar[tuple[str, ...]] = ("lengths", "memory_lengths")

    _attends_memory: ClassVar[bool] = True

    def initial_state(self, memory: Any, *, memory_lengths: Any = None) -> AttentionState:
        """The state before the first token: the keys and values of a memory.

        Parameters
        ----------
        memory : array of shape (B, Tm, d_model)
            What the tokens attend to besides each other.
        memory_lengths : array of shape (B,), optional
            The real tokens of each row of memory.
        """
        if np.ndim(memory) != 3:
            raise ValueError(f"memory should be of shape (B, Tm, {self.d_model}), not {np.shape(memory)}")
        tokens = self._tokens("memory", memory, "memory_lengths", memory_lengths, "Tm")
        return self._memory_state(tokens.x, tokens.rows)

    def _memory_state(self, memory: Array, rows: Rows) -> AttentionState:
        """Return the state before the first token, given a memory (M, d_model)."""
        pages = self._backend.transformer.memory_pages(
            self._packed_blocks(1), memory, rows.starts, threads.get_num_threads()
        )
        return self._start_state(rows.batch, pages, None)

    def step(self, x_t: Any, state: Any) -> tuple[Array, AttentionState]:
        """One token more of each row; the bits are those of a causal call over all tokens.

        Parameters
        ----------
        x_t : array of shape (B, d_model)
            Real floating numbers.
        state : AttentionState
            Where each row stands, which may be at different lengths: what `initial_state` or an earlier step gave.

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
        if state is None:
            raise TypeError("state should be what initial_state or a step gave, not None")
        return self._stepped(x_t, state)

    def _opened(
        self, x: Any, memory: Any, mask: Any, causal: Any, lengths: Any, memory_mask: Any, memory_lengths: Any
    ) -> tuple[Tokens, Context]:
        tokens = self._tokens("x", x, "lengths", lengths)
        other = self._tokens("memory", memory, "memory_lengths", memory_lengths, "Tm")
        rows, keys = tokens.rows, other.rows
        same_batch("memory", memory, "x", tokens, other)
        allowed = self._mask("mask", mask, rows, rows)
        frame, memory_frame = Frame(rows, rows, False), Frame(rows, keys, False)
        of_memory = self._mask("memory_mask", memory_mask, rows, keys)
        return tokens, Context(frame, allowed, checks.flag("causal", causal), other.x, memory_frame, of_memory)

    def __call__(
        self,
        x: Any,
        memory: Any,
        *,
        mask: Any = None,
        causal: bool = True,
        lengths: Any = None,
        memory_mask: Any = None,
        memory_lengths: Any = None,
        return_weights: bool = False,
    ) -> Any:
        """Decode a batch of sequences, each with what an encoder made of another; inference.

        Parameters
        ----------
        x : array of shape (B, T, d_model), or (T, d_model)
            Real floating numbers.
        memory : array of shape (B, Tm, d_model), or (Tm, d_model)
            What the tokens of x attend to besides each other.
        mask : array that broadcasts to (B, heads, T, T), optional
            Booleans: True = may attend. Or real numbers, which are added to the scaled scores; -inf forbids.
        causal : bool
            Whether each token may attend only to those before it and itself.
        lengths : array of shape (B,), optional
            The real tokens of each row of x, integers in 0..T in any order. Past them outputs are 0 and nothing
            matters.
        memory_mask : array that broadcasts to (B, heads, T, Tm), optional
            As `mask`, of the attention to memory.
        memory_lengths : array of shape (B,), optional
            The real tokens of each row of memory.
        return_weights : bool
            Whether to return what each token attends to, too.

        Returns
        -------
        y : ndarray of shape (B, T, d_model)
        weights : pair of ndarrays of shapes (B, heads, T, T) and (B, heads, T, Tm); of a decoder a list of pairs
            With `return_weights`.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        tokens, context = self._opened(x, memory, mask, causal, lengths, memory_mask, memory_lengths)
        y, weights = self._run_rows(tokens.x, context, checks.flag("return_weights", return_weights))
        return self._returned(y, weights, tokens.rows, tokens.unbatched)

    def forward(
        self,
        x: Any,
        memory: Any,
        *,
        mask: Any = None,
        causal: bool = True,
        lengths: Any = None,
        memory_mask: Any = None,
        memory_lengths: Any = None,
        seed: int | None = None,
    ) -> tuple[Array, Tape]:
        """Decode for training: what a call gives, except dropout, and what `backward` needs.

        Parameters
        ----------
        x, memory, mask, causal, lengths, memory_mask, memory_lengths
            As for a call. Arrays are not to be changed as long as the tape is used.
        seed : int, optional
            Fixes what dropout drops; drawn where it is not given.

        Returns
        -------
        y : ndarray of shape (B, T, d_model)
        tape : Tape
        """
        return self._forward_padded(*self._opened(x, memory, mask, causal, lengths, memory_mask, memory_lengths), seed)

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> tuple[Array, Array]:
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
        dx, dmemory : ndarrays of the shapes of x and memory
            0 past a row's length.
        """
        dx, dmemory = self._backward_padded(dy, tape, grads)
        assert dmemory is not None
        return dx, dmemory


class TransformerDecoderLayer(Decodes, Block):
    """A layer of a decoder [1]_: self-attention, attention to a memory and feed-forward, each added to its input.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
    .. [2] R. Xiong et al., "On layer normalization in the Transformer architecture", ICML 2020.
    .. [3] N. Shazeer, "GLU variants improve Transformer", arXiv:2002.05202, 2020.
    """

    _cross: ClassVar[bool] = True


class TransformerDecoder(Decodes, Tower):
    """The decoder of the Transformer [1]_: layers of self-attention, attention to a memory and feed-forward.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
    .. [2] R. Xiong et al., "On layer normalization in the Transformer architecture", ICML 2020.
    .. [3] N. Shazeer, "GLU variants improve Transformer", arXiv:2002.05202, 2020.
    """

    _block = TransformerDecoderLayer
