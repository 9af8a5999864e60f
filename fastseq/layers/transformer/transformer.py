"""The whole Transformer: an encoder, and a decoder that attends to its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastseq import checks
from fastseq.checks import Array
from fastseq.layers.attention import Frame
from fastseq.layers.base import Tape, child_seed, mask_seed, seeds_of
from fastseq.layers.settings import size
from fastseq.layers.transformer.block import (
    D_MODEL,
    FEEDFORWARD,
    MAX_LAYERS,
    NHEAD,
    Context,
    Stack,
    Tokens,
    output_gradient,
    same_batch,
    single,
)
from fastseq.layers.transformer.decoder import TransformerDecoder
from fastseq.layers.transformer.encoder import TransformerEncoder
from fastseq.state import AttentionState


class Transformer(Stack):
    """The Transformer [1]_: an encoder, and a decoder that attends to what the encoder made; both end with a norm.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
    .. [2] R. Xiong et al., "On layer normalization in the Transformer architecture", ICML 2020.
    .. [3] N. Shazeer, "GLU variants improve Transformer", arXiv:2002.05202, 2020.
    """

    _length_names: ClassVar[tuple[str, ...]] = ("src_lengths", "tgt_lengths")

    d_model: int = size(default=512, doc=D_MODEL)
    nhead: int = size(default=8, doc=NHEAD)
    num_encoder_layers: int = size(default=6, limit=MAX_LAYERS, doc="How many layers the encoder has.")
    num_decoder_layers: int = size(default=6, limit=MAX_LAYERS, doc="How many layers the decoder has.")
    dim_feedforward: int = size(default=2048, doc=FEEDFORWARD)

    def _build(self) -> None:
        config = {**self._of_layers(), "final_norm": True}
        first, second = seeds_of(self.seed, 2)
        of = self._backend.of
        self.encoder = of(TransformerEncoder)(num_layers=self.num_encoder_layers, seed=first, **config)
        self.decoder = of(TransformerDecoder)(num_layers=self.num_decoder_layers, seed=second, **config)
        self._children = {"encoder": self.encoder, "decoder": self.decoder}

    def _opened(
        self,
        src: Any,
        tgt: Any,
        src_mask: Any,
        tgt_mask: Any,
        memory_mask: Any,
        src_lengths: Any,
        tgt_lengths: Any,
        causal: Any,
    ) -> tuple[Tokens, Context, Tokens, Context]:
        """Check arguments: tokens and context of source and target, without the memory, which is not computed yet."""
        source = self._tokens("src", src, "src_lengths", src_lengths, "S")
        target = self._tokens("tgt", tgt, "tgt_lengths", tgt_lengths)
        same_batch("tgt", tgt, "src", source, target)
        keys, rows = source.rows, target.rows
        of_encoder = Context(Frame(keys, keys, False), self._mask("src_mask", src_mask, keys, keys), False)
        of_decoder = Context(
            Frame(rows, rows, False),
            self._mask("tgt_mask", tgt_mask, rows, rows),
            checks.flag("causal", causal),
            None,
            Frame(rows, keys, False),
            self._mask("memory_mask", memory_mask, rows, keys),
        )
        return source, of_encoder, target, of_decoder

    def __call__(
        self,
        src: Any,
        tgt: Any,
        *,
        src_mask: Any = None,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        src_lengths: Any = None,
        tgt_lengths: Any = None,
        causal: bool = True,
        return_weights: bool = False,
    ) -> Any:
        """Encode the sources and decode the targets; inference.

        Parameters
        ----------
        src : array of shape (B, S, d_model), or (S, d_model)
            Real floating numbers.
        tgt : array of shape (B, T, d_model), or (T, d_model)
        src_mask, tgt_mask, memory_mask : arrays that broadcast to (B, heads, S, S), (B, heads, T, T), (B, heads, T, S)
            Optional. Booleans: True = may attend. Or real numbers, which are added to the scaled scores; -inf forbids.
        src_lengths, tgt_lengths : arrays of shape (B,), optional
            The real tokens of each row; nothing is computed for those past them, and nothing in them matters.
        causal : bool
            Whether each token of the target may attend only to those of the target before it and itself.
        return_weights : bool
            Whether to return what each token attends to, too.

        Returns
        -------
        y : ndarray of shape (B, T, d_model)
            0 past a row's length.
        weights : pair of lists
            With `return_weights`: of the encoder's layers (B, heads, S, S), and of the decoder's the pairs
            (B, heads, T, T) and (B, heads, T, S).

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        source, of_encoder, target, of_decoder = self._opened(
            src, tgt, src_mask, tgt_mask, memory_mask, src_lengths, tgt_lengths, causal
        )
        wanted = checks.flag("return_weights", return_weights)
        memory, encoder_weights = self.encoder._run_rows(source.x, of_encoder, wanted)
        y, decoder_weights = self.decoder._run_rows(target.x, of_decoder._replace(memory=memory), wanted)
        out = single(target.rows.scatter(y), target.unbatched)
        if encoder_weights is None or decoder_weights is None:
            return out
        return out, tuple(
            [single(own, target.unbatched) for own in maps] for maps in (encoder_weights, decoder_weights)
        )

    def forward(
        self,
        src: Any,
        tgt: Any,
        *,
        src_mask: Any = None,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        src_lengths: Any = None,
        tgt_lengths: Any = None,
        causal: bool = True,
        seed: int | None = None,
    ) -> tuple[Array, Tape]:
        """Encode and decode for training: what a call gives, except dropout, and what `backward` needs.

        Parameters
        ----------
        src, tgt, src_mask, tgt_mask, memory_mask, src_lengths, tgt_lengths, causal
            As for a call. Arrays are not to be changed as long as the tape is used.
        seed : int, optional
            Fixes what dropout drops; drawn where it is not given.

        Returns
        -------
        y : ndarray of shape (B, T, d_model)
        tape : Tape
        """
        source, of_encoder, target, of_decoder = self._opened(
            src, tgt, src_mask, tgt_mask, memory_mask, src_lengths, tgt_lengths, causal
        )
        seed = mask_seed(seed)
        memory, encoded = self.encoder._forward_rows(source.x, of_encoder, child_seed(seed, 0))
        y, decoded = self.decoder._forward_rows(target.x, of_decoder._replace(memory=memory), child_seed(seed, 1))
        kept = encoded, decoded, source.rows, target.rows, target.unbatched
        return single(target.rows.scatter(y), target.unbatched), Tape(self, kept)

    def backward(self, dy: Any, tape: Tape, *, grads: Mapping[str, Array] | None = None) -> tuple[Array, Array]:
        """Gradients, given that of the outputs.

        Parameters
        ----------
        dy : array of the shape of y
            Past a row's length nothing in it matters.
        tape : Tape
            What `forward` returned.
        grads : mapping from str to ndarray, optional
            Where the gradients of the parameters are added; `grads` of the layers by default.

        Returns
        -------
        dsrc, dtgt : ndarrays of the shapes of src and tgt
            0 past a row's length.
        """
        encoded, decoded, source, target, unbatched = self._kept(tape)
        targets = self._child_targets(grads)
        gradient = target.gather(output_gradient(dy, self.dtype, target, self.d_model, unbatched))
        dtgt, dmemory = self.decoder._backward_rows(gradient, decoded, targets["decoder"])
        assert dmemory is not None
        dsrc, _ = self.encoder._backward_rows(dmemory, encoded, targets["encoder"])
        return single(source.scatter(dsrc), unbatched), single(target.scatter(dtgt), unbatched)

    def initial_state(self, src: Any, *, src_mask: Any = None, src_lengths: Any = None) -> AttentionState:
        """The state before the first token of the target: the sources encoded.

        Parameters
        ----------
        src : array of shape (B, S, d_model)
            Real floating numbers.
        src_mask, src_lengths
            As for a call.
        """
        memory = self.encoder(src, mask=src_mask, lengths=src_lengths)
        state: AttentionState = self.decoder.initial_state(memory, memory_lengths=src_lengths)
        return state

    def step(self, tgt_t: Any, state: Any) -> tuple[Array, AttentionState]:
        """One token more of each target, (B, d_model): outputs of that shape, and the state for the next step."""
        stepped: tuple[Array, AttentionState] = self.decoder.step(tgt_t, state)
        return stepped
