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
from fastseq.layers.transformer import ACTIVATIONS, MAX_LAYERS, NORMS
from fastseq.models.decoding import Decoder, StateDecoder
from fastseq.models.sequence_pairs import Pairs, SequencePairModel
from fastseq.models.symbols import TokenRows, ids_array
from fastseq.models.transformer_parts import POSITIONS
from fastseq.splitmix import mixed, uniform
from fastseq.state import AttentionState, contents


class _Kept(NamedTuple):
    """The tapes of the layers of one side, encoder or decoder."""

    embedding: Tape
    positions: Tape | None
    entering: Tape | None  # of dropout
    tower: Any


class TransformerSeq2Seq(SequencePairModel):
    """From sequence to sequence by attention: an encoder looks at the source, a decoder says the target [1]_.

    The decoder is given what was said so far, looks back at all of it, and at all that the encoder made of the source.
    One more symbol, the boundary V, is what it is given first, and what it says last.

    Parameters
    ----------
    source_vocab_size, target_vocab_size : int
        S and V; symbols are 0..S-1 and 0..V-1.
    d_model, nhead : int
        The size of a symbol's vector, and the number of heads, each of size d_model / nhead.
    num_encoder_layers, num_decoder_layers : int
        How many layers.
    dim_feedforward : int, optional
        The size between the two linear maps of the feed-forward; 4 d_model by default.
    max_length : int
        The most symbols of a source, and of a target with the boundary.
    dropout : float in [0, 1)
        Share that training drops: of what enters the first layers, and in the layers as `TransformerEncoder` has it.
    activation : {"gelu_tanh", "gelu", "relu", "swiglu", "geglu"}
        Between the two linear maps.
    norm : {"layer", "rms"}
        `LayerNorm` or `RMSNorm`.
    norm_first : bool
        Whether norms stand before attention and feed-forward, and one after the last layer; else after each sum.
    positions : {"sinusoidal", "learned", "rotary"} or None
        How a symbol knows where it stands; None: only by what it may attend to. Sinusoidal ones are added to vectors
        that are multiplied by sqrt(d_model) [1]_, so that neither drowns the other.
    num_kv_heads : int, optional
        Heads of keys and values, a divisor of `nhead`; as many as there are heads by default.
    bias : bool
        Whether linear maps and layer norms of the layers have biases.
    tied : bool
        Whether the output has the matrix of the target's embedding [2]_; else one of its own, without bias.
    dtype : {"float32", "float64"}
        Of parameters and logits.
    seed : int, optional
        Fixes the initial parameters: embeddings are normal of deviation 1 / sqrt(d_model), linear maps as of
        `fastseq.init.xavier_uniform`, their biases 0.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
    .. [2] O. Press and L. Wolf, "Using the output embedding to improve language models", EACL 2017.
    """

    d_model: int
    nhead: int
    num_encoder_layers: int
    num_decoder_layers: int
    dim_feedforward: int
    max_length: int
    dropout: float
    activation: str
    norm: str
    norm_first: bool
    positions: str | None
    num_kv_heads: int
    bias: bool
    tied: bool
    seed: int | None

    def __init__(
        self,
        source_vocab_size: int,
        target_vocab_size: int,
        d_model: int,
        nhead: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        *,
        dim_feedforward: int | None = None,
        max_length: int = 256,
        dropout: float = 0.0,
        activation: str = "gelu_tanh",
        norm: str = "layer",
        norm_first: bool = True,
        positions: str | None = "sinusoidal",
        num_kv_heads: int | None = None,
        bias: bool = True,
        tied: bool = True,
        dtype: Any = "float32",
        seed: int | None = None,
    ) -> None:
        self.source_vocab_size = checks.size("source_vocab_size", source_vocab_size, 1)
        self.target_vocab_size = checks.size("target_vocab_size", target_vocab_size, 1)
        self.d_model = checks.size("d_model", d_model, 1)
        self.num_encoder_layers = checks.size("num_encoder_layers", num_encoder_layers, 1)
        self.num_decoder_layers = checks.size("num_decoder_layers", num_decoder_layers, 1)
        counts = {"num_encoder_layers": self.num_encoder_layers, "num_decoder_layers": self.num_decoder_layers}
        for name, count in counts.items():
            if count > MAX_LAYERS:
                raise ValueError(f"{name} should be at most {MAX_LAYERS}, not {count}")
        self.max_length = checks.size("max_length", max_length, 1)
        self.dropout = checks.fraction("dropout", dropout)
        self.activation = checks.choice("activation", activation, ACTIVATIONS)
        self.norm = checks.choice("norm", norm, NORMS)
        self.norm_first = checks.flag("norm_first", norm_first)
        self.positions = None if positions is None else checks.choice("positions", positions, POSITIONS)
        self.bias = checks.flag("bias", bias)
        self.tied = checks.flag("tied", tied)
        self.dtype = checks.real_dtype("dtype", dtype, self._backend.dtypes)
        self.seed = checks.seed("seed", seed)
        of = self._backend.of
        of_type: dict[str, Any] = {"dtype": self.dtype}
        seeds = seeds_of(self.seed, 7)
        settings = {
            "dropout": self.dropout,
            "activation": self.activation,
            "norm_first": self.norm_first,
            "final_norm": self.norm_first,
            "bias": self.bias,
            "norm": self.norm,
            "num_kv_heads": num_kv_heads,
            "rotary": 10000.0 if self.positions == "rotary" else None,
            **of_type,
        }
        sizes = self.d_model, nhead, 4 * self.d_model if dim_feedforward is None else dim_feedforward
        encoder = of(layers.TransformerEncoder)(self.num_encoder_layers, *sizes, seed=seeds[0], **settings)
        decoder = of(layers.TransformerDecoder)(self.num_decoder_layers, *sizes, seed=seeds[1], **settings)
        self.nhead, self.num_kv_heads = encoder.nhead, encoder.num_kv_heads
        self.dim_feedforward = encoder.dim_feedforward
        config = {
            "source_vocab_size": self.source_vocab_size,
            "target_vocab_size": self.target_vocab_size,
            "d_model": self.d_model,
            "nhead": self.nhead,
            **counts,
            "dim_feedforward": self.dim_feedforward,
            "max_length": self.max_length,
            "dropout": self.dropout,
            "activation": self.activation,
            "norm": self.norm,
            "norm_first": self.norm_first,
            "positions": self.positions,
            "num_kv_heads": self.num_kv_heads,
            "bias": self.bias,
            "tied": self.tied,
            "dtype": self.dtype.name,
            "seed": self.seed,
        }
        children: dict[str, Any] = {
            "source_embedding": of(layers.Embedding)(self.source_vocab_size, self.d_model, seed=seeds[2], **of_type),
            "target_embedding": of(layers.Embedding)(
                self.target_vocab_size + 1, self.d_model, seed=seeds[3], **of_type
            ),
        }
        self._source_positions: Any = None
        self._target_positions: Any = None
        if self.positions == "learned":
            of_source, of_target = (
                of(layers.LearnedPositions)(self.max_length, self.d_model, seed=own, **of_type) for own in seeds[4:6]
            )
            children |= {"source_positions": of_source, "target_positions": of_target}
            self._source_positions, self._target_positions = of_source, of_target
        elif self.positions == "sinusoidal":
            self._source_positions = self._target_positions = of(layers.SinusoidalPositions)(self.d_model, **of_type)
        children |= {"encoder": encoder, "decoder": decoder}
        if not self.tied:
            children["output"] = of(layers.Linear)(
                self.d_model, self.target_vocab_size + 1, False, seed=seeds[6], **of_type
            )
        self._start(config, **children)
        self._source_embedding: Any = children["source_embedding"]
        self._target_embedding: Any = children["target_embedding"]
        self._encoder: Any = encoder
        self._decoder_layers: Any = decoder
        self._output: Any = children.get("output")
        if self.tied:
            operations = self._backend.dense
            self._output = inside.TiedOutput(self._target_embedding, operations, self.target_vocab_size + 1)
        self._drop = of(layers.Dropout)(self.dropout, **of_type)
        # What embeddings are multiplied by.
        self._scale = self.dtype.type(math.sqrt(self.d_model) if self.positions == "sinusoidal" else 1)
        # Attention that starts nearly uniform, as with weights much smaller, is long in finding out where to look.
        for name, place in {"encoder": 0, "decoder": 1, "output": 6}.items():
            if name in children:
                init.initialise(children[name], "xavier_uniform", seed=seeds[place])
        for place, name in enumerate(("source_embedding", "target_embedding"), 2):
            rng, shape = np.random.default_rng(seeds[place]), children[name].parameters["weight"].shape
            children[name].parameters["weight"] = rng.normal(0, 1 / math.sqrt(self.d_model), shape)

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
            self._target_embedding.parameters["weight"] * self._scale,
            None if positions is None else inside.position_table(positions, self.max_length),
            inside.packed(self._output),
            pages.own,
            pages.memory,
            self.max_length,
            lambda _: self._check_room(self.max_length + 1),
            threads.get_num_threads(),
        )
