"""The Transformer with encoder and decoder."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastseq import checks, init, layers, threads
from fastseq.checks import Array
from fastseq.layers import inside
from fastseq.layers.base import Tape, child_seed, mask_seed, seeds_of
from fastseq.layers.rows import Rows
from fastseq.layers.settings import KW_ONLY, choice, random_seed, size
from fastseq.layers.transformer import D_MODEL, MAX_LAYERS, NHEAD
from fastseq.models.decoding import Decoder, StateDecoder
from fastseq.models.sequence_pairs import Pairs, SequencePairModel
from fastseq.models.symbols import TokenRows, ids_array
from fastseq.models.transformer_parts import POSITIONS, GenerativeTransformer
from fastseq.narrow import scaled
from fastseq.splitmix import mixed, uniform
from fastseq.state import AttentionState, contents


class _Kept(NamedTuple):
    """The tapes of the layers of one side, encoder or decoder."""

    embedding: Tape
    positions: Tape | None
    entering: Tape | None  # of dropout
    tower: Any


class TransformerSeq2Seq(GenerativeTransformer, SequencePairModel):
    """The Transformer with encoder and decoder [1]_, from a source sequence to a target sequence.

    The decoder attends to the symbols of the target so far, and to all outputs of the encoder. One more symbol, the
    boundary V, is its first input and its last output.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
    .. [2] O. Press and L. Wolf, "Using the output embedding to improve language models", EACL 2017.
    """

    d_model: int = size(doc=D_MODEL)
    nhead: int = size(doc=NHEAD)
    num_encoder_layers: int = size(limit=MAX_LAYERS, doc="How many layers the encoder has.")
    num_decoder_layers: int = size(limit=MAX_LAYERS, doc="How many layers the decoder has.")
    _: KW_ONLY
    max_length: int = size(
        default=256, before="dropout", doc="The most symbols of a source, and of a target with the boundary."
    )
    positions: str | None = choice(
        POSITIONS,
        default="sinusoidal",
        optional=True,
        doc="Encoding of positions. None: a token's position shows only in what it may attend to. Sinusoidal ones are"
        " added to vectors that are multiplied by sqrt(d_model) [1]_, so that neither drowns the other.",
    )
    seed: int | None = random_seed(
        default=None,
        doc="Fixes the initial parameters: embeddings are normal of deviation 1 / sqrt(d_model), linear maps as of"
        " `fastseq.init.xavier_uniform`, their biases 0.",
    )

    def _build(self) -> None:
        seeds = seeds_of(self.seed, 7)
        count = self.target_vocab_size + 1
        self._source_embedding: Any = self._part(layers.Embedding, self.source_vocab_size, self.d_model, seed=seeds[2])
        self._target_embedding: Any = self._part(layers.Embedding, count, self.d_model, seed=seeds[3])
        learned = self.positions == "learned"
        self._source_positions: Any = self._positions_layer(self.max_length, seeds[4])
        self._target_positions: Any = (
            self._positions_layer(self.max_length, seeds[5]) if learned else self._source_positions
        )
        self._encoder: Any = self._stack(layers.TransformerEncoder, self.num_encoder_layers, seed=seeds[0])
        self._decoder_layers: Any = self._stack(layers.TransformerDecoder, self.num_decoder_layers, seed=seeds[1])
        self._output: Any = self._output_map(self._target_embedding, count, seeds[6])
        self._drop: Any = self._part(layers.Dropout, self.dropout)
        self._start(
            source_embedding=self._source_embedding,
            target_embedding=self._target_embedding,
            source_positions=self._source_positions if learned else None,
            target_positions=self._target_positions if learned else None,
            encoder=self._encoder,
            decoder=self._decoder_layers,
            output=None if self.tied else self._output,
        )
        # What embeddings are multiplied by.
        self._scale = self.dtype.type(math.sqrt(self.d_model) if self.positions == "sinusoidal" else 1)
        # Attention that starts nearly uniform, as with weights much smaller, takes long to learn where to look.
        for name, place in {"encoder": 0, "decoder": 1, "output": 6}.items():
            if name in self._children:
                init.initialise(self._children[name], "xavier_uniform", seed=seeds[place])
        for place, embedding in enumerate((self._source_embedding, self._target_embedding), 2):
            rng, shape = np.random.default_rng(seeds[place]), embedding.parameters["weight"].shape
            embedding.parameters["weight"] = rng.normal(0, 1 / math.sqrt(self.d_model), shape)

    def _check_fits(self, name: str, tokens: int) -> None:
        if tokens > self.max_length:
            boundary = ", the boundary among them" if name.endswith(("target", "targets")) else ""
            raise ValueError(f"{name} should have at most max_length={self.max_length} symbols{boundary}, not {tokens}")

    def _source(self, name: str, source: Any, lengths_name: str, lengths: Any) -> TokenRows:
        given = super()._source(name, source, lengths_name, lengths)
        self._check_fits(name, given.rows.longest)
        return given

    def _pairs(
        self,
        source: Any,
        target: Any,
        source_lengths: Any,
        lengths: Any,
        names: tuple[str, str, str, str] = ("source", "target", "source_lengths", "lengths"),
    ) -> Pairs:
        pairs = super()._pairs(source, target, source_lengths, lengths, names)
        self._check_fits(names[1], pairs.begun.rows.longest)
        return pairs

    def _embedded(self, embedding: Any, positions: Any, ids: Array, rows: Rows) -> Array:
        """What enters the layers of one side, (N, d_model)."""
        x: Array = embedding(ids) * self._scale
        return x if positions is None else positions(x, positions=rows.steps())

    def _encoded(self, source: TokenRows) -> Array:
        """What the encoder makes of the sources, as rows (N, d_model)."""
        rows = source.rows
        x = self._embedded(self._source_embedding, self._source_positions, source.ids, rows)
        return inside.run_rows(self._encoder, x, inside.Context.of(rows, False))[0]

    @staticmethod
    def _context(pairs: Pairs, memory: Array) -> inside.Context:
        """What the layers of the decoder receive besides the symbols."""
        return inside.Context.of(pairs.begun.rows, True, memory, pairs.source.rows)

    def _decoded(self, pairs: Pairs, want_weights: bool = False) -> tuple[Array, Any]:
        """The logits (N, V + 1), and what each layer attended to."""
        context = self._context(pairs, self._encoded(pairs.source))
        begun = pairs.begun
        x = self._embedded(self._target_embedding, self._target_positions, begun.ids, begun.rows)
        y, weights = inside.run_rows(self._decoder_layers, x, context, want_weights)
        return self._output(y), weights

    def _scores(self, pairs: Pairs) -> Array:
        return self._decoded(pairs)[0]

    def _attended(self, pairs: Pairs) -> tuple[Array, Any]:
        logits, weights = self._decoded(pairs, True)
        return logits, [of_source for _, of_source in weights]

    def __call__(
        self,
        source: Any,
        target: Any,
        *,
        source_lengths: Any = None,
        lengths: Any = None,
        return_weights: bool = False,
    ) -> Any:
        """What the model expects after each symbol of a target that is known.

        Parameters
        ----------
        source : array of shape (B, S), (S,) for one sequence, or list of sequences
            Ids in 0..S-1; no source may be empty.
        target : array of shape (B, T), (T,) for one sequence, or list of sequences
            Ids in 0..V-1.
        source_lengths, lengths : arrays of shape (B,), optional
            The real symbols of each row of source, and of target. Nothing past them matters.
        return_weights : bool
            Whether to return what each step attends to in the source, too.

        Returns
        -------
        logits : ndarray of shape (B, T + 1, V + 1), or (T + 1, V + 1)
            At step t those of target[t], at the one after the last symbol those of the end, which is id V; 0 past it.
        weights : list of ndarrays of shape (B, heads, T + 1, S), or (heads, T + 1, S)
            With `return_weights`, one for each layer of the decoder.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        return super().__call__(
            source, target, source_lengths=source_lengths, lengths=lengths, return_weights=return_weights
        )

    def _through(self, pairs: Pairs, seed: int | None, sampling: float) -> tuple[Array, Any]:
        seed = mask_seed(seed)
        if sampling:
            pairs = self._resampled(pairs, child_seed(seed, 4), sampling)
        source, begun = pairs.source, pairs.begun
        of_encoder = inside.Context.of(source.rows, False)
        memory, of_source = self._side_forward(
            (self._source_embedding, self._source_positions, self._encoder),
            source,
            of_encoder,
            (child_seed(seed, 0), child_seed(seed, 1)),
        )
        y, of_target = self._side_forward(
            (self._target_embedding, self._target_positions, self._decoder_layers),
            begun,
            self._context(pairs, memory),
            (child_seed(seed, 2), child_seed(seed, 3)),
        )
        logits, of_output = self._output.forward(y)
        return logits, (of_source, of_target, of_output)

    def _side_forward(
        self, parts: tuple[Any, Any, Any], tokens: TokenRows, context: inside.Context, seeds: tuple[int, int]
    ) -> tuple[Array, _Kept]:
        """Embedding, positions and layers of one side, forward."""
        embedding, positions, tower = parts
        of_positions = entering = None
        x, of_embedding = embedding.forward(tokens.ids)
        x = x * self._scale
        if positions is not None:
            x, of_positions = positions.forward(x, positions=tokens.rows.steps())
        if self.dropout:
            x, entering = self._drop.forward(x, seed=seeds[0])
        y, of_tower = inside.forward_rows(tower, x, context, seeds[1])
        return y, _Kept(of_embedding, of_positions, entering, of_tower)

    def _back(self, dlogits: Array, kept: Any, grads: Any) -> None:
        of_source, of_target, of_output = kept
        targets = self._child_targets(grads)
        dy = self._output.backward(dlogits, of_output, grads=targets["target_embedding" if self.tied else "output"])
        dx, dmemory = inside.backward_rows(self._decoder_layers, dy, of_target.tower, targets["decoder"])
        assert dmemory is not None
        self._entered_backward("target", self._target_embedding, self._target_positions, dx, of_target, targets)
        dx, _ = inside.backward_rows(self._encoder, dmemory, of_source.tower, targets["encoder"])
        self._entered_backward("source", self._source_embedding, self._source_positions, dx, of_source, targets)

    def _entered_backward(
        self, side: str, embedding: Any, positions: Any, dx: Array, kept: _Kept, targets: dict[str, Any]
    ) -> None:
        """What enters the layers of one side, in the reverse order of `_side_forward`."""
        if kept.entering is not None:
            dx = self._drop.backward(dx, kept.entering)
        if kept.positions is not None:
            dx = positions.backward(dx, kept.positions, grads=targets.get(f"{side}_positions"))
        embedding.backward(dx * self._scale, kept.embedding, grads=targets[f"{side}_embedding"])

    def _resampled(self, pairs: Pairs, seed: int, share: float) -> Pairs:
        """Pairs in which about this share of what the decoder is given was drawn by the model, in one pass before [1]_.

        References
        ----------
        .. [1] T. Mihaylova and A. F. T. Martins, "Scheduled sampling for Transformers", ACL SRW 2019.
        """
        begun = pairs.begun
        keys = mixed(np.uint64(seed) + mixed(np.arange(len(begun.ids), dtype=np.uint64)))
        scores = self._scores(pairs).astype(np.float64)
        cumulative = np.exp(scores - scores.max(axis=1, keepdims=True)).cumsum(axis=1)
        drawn = (cumulative <= uniform(keys, 0)[:, None] * cumulative[:, -1:]).sum(axis=1)
        replaced = (uniform(keys, 1) < share) & (begun.rows.steps() > 0)
        ids = np.where(replaced, np.concatenate([drawn[:1], drawn[:-1]]), begun.ids)
        return pairs._replace(begun=begun._replace(ids=ids))

    def initial_state(self, source: Any, *, lengths: Any = None) -> AttentionState:
        """The sources encoded, and nothing said yet.

        Parameters
        ----------
        source, lengths
            As of `generate`; a batch.
        """
        given = self._source("source", source, "lengths", lengths)
        if given.unbatched:
            raise ValueError(f"source should be a batch, (B, S) or a list of sequences, not {checks.describe(source)}")
        return self._encoded_state(given)

    def _encoded_state(self, source: TokenRows) -> AttentionState:
        return inside.memory_state(self._decoder_layers, self._encoded(source), source.rows)

    def step(self, y_t: Any, state: Any) -> tuple[Array, AttentionState]:
        """One symbol more of each target; the bits are those of a call over all symbols.

        Parameters
        ----------
        y_t : array of shape (B,)
            Ids in 0..V; the first is the boundary, `begin`.
        state : AttentionState
            What `initial_state` or an earlier step gave.

        Returns
        -------
        logits : ndarray of shape (B, V + 1)
            Of the symbol that follows.
        state : AttentionState
            For the next step. The one that was given still is what it was.
        """
        array = ids_array("y_t", y_t)
        if array.ndim != 1:
            raise ValueError(f"y_t should be of shape (B,), not {array.shape}")
        ids = checks.ids("y_t", array, self.target_vocab_size + 1)
        if state is None:
            raise TypeError("state should be what initial_state or a step gave, not None")
        state = inside.check_state(self._decoder_layers, state, len(ids))
        self._check_room(int(state.lengths.max(initial=-1)) + 1)
        x = self._target_embedding(ids) * self._scale
        x = x if self._target_positions is None else self._target_positions(x, positions=state.lengths)
        y, state = inside.append_tokens(self._decoder_layers, x, np.arange(len(ids) + 1), state)
        return self._output(y), state

    def _check_new(self, max_new: Any) -> None:
        if checks.size("max_new", max_new) > self.max_length:
            raise ValueError(f"max_new should be at most max_length={self.max_length}, not {max_new}")

    def _check_room(self, tokens: int) -> None:
        if tokens > self.max_length:
            raise ValueError(f"a target should have at most max_length={self.max_length} symbols, not {tokens}")

    def _decoder(self, source: TokenRows, copies: int) -> tuple[Array, Decoder]:
        state = self._encoded_state(source)
        logits, state = self.step(np.full(source.rows.batch, self.begin), state)
        compiled = self._backend.transformer_decoder
        if compiled is None:
            return logits, StateDecoder(self, state)
        positions, pages = self._target_positions, contents(state)
        return logits, compiled(
            *inside.packed_stack(self._decoder_layers, self.max_length),
            scaled(inside.arrays(self._target_embedding)["weight"], self._scale),
            None if positions is None else inside.position_table(positions, self.max_length),
            inside.packed(self._output),
            pages.own,
            pages.memory,
            self.max_length,
            lambda _: self._check_room(self.max_length + 1),
            threads.get_num_threads(),
        )
