"""Models from one sequence of symbols to another: what they share, and the Transformer with encoder and decoder.

Like the models of `fastseq.models.transformer` they see the real symbols of a batch alone, as rows one after another.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fastseq import _decoding, checks, init, layers, losses, threads, training
from fastseq.checks import Array
from fastseq.layers.attention import Frame
from fastseq.layers.base import Tape, child_seed, mask_seed, seeds_of
from fastseq.layers.rows import Rows, rows_of
from fastseq.layers.transformer import ACTIVATIONS, MAX_LAYERS, NORMS, Context, Tokens
from fastseq.models import decoding
from fastseq.models.base import BATCH_SIZE, Model, batched_already, held_out, ids_array, is_data, log_softmax_at, sums
from fastseq.models.decoding import Decoder, StateDecoder
from fastseq.models.transformer import POSITIONS, _Tied, _Tokens, _tokens
from fastseq.reference.decoding import mixed, uniform
from fastseq.state import AttentionState
from fastseq.training import Batch, History

_TOKENS = 1 << 13  # that go through the layers together where there is no batch to keep together
_LOGITS = 1 << 22  # that are looked at together


class Pairs(NamedTuple):
    """Sources, and what a decoder is given and should say of their targets."""

    source: _Tokens  # S symbols of each, at least one
    begun: _Tokens  # T + 1 of each: the boundary, then the target
    following: Array  # (N,) what comes after each symbol of `begun`: the target, then the boundary

    def some(self, first: int, last: int) -> Pairs:
        """The pairs from `first` up to `last`."""
        source, begun = (_some(tokens, first, last) for tokens in (self.source, self.begun))
        starts = self.begun.rows.starts
        return Pairs(source, begun, self.following[starts[first] : starts[last]])

    def parts(self, limit: int) -> Iterator[tuple[Array, Pairs]]:
        """A few pairs at a time, of about `limit` symbols, and which of all rows of `begun` theirs are."""
        starts = self.begun.rows.starts
        ends = np.maximum(self.source.rows.starts, starts)[1:]
        group = (ends - 1) // limit
        cuts = [0, *(np.flatnonzero(np.diff(group)) + 1), len(ends)] if len(ends) else []
        for first, last in itertools.pairwise(cuts):
            yield np.arange(starts[first], starts[last]), self.some(int(first), int(last))


def _some(tokens: _Tokens, first: int, last: int) -> _Tokens:
    """The sequences from `first` up to `last`."""
    starts, time = tokens.rows.starts, tokens.rows.time
    rows = rows_of(last - first, time, np.diff(starts[first : last + 1]))
    return _Tokens(tokens.ids[starts[first] : starts[last]], rows, tokens.unbatched)


class SequencePairModel(Model):
    """The probability of a target, given a source of another length: prod over t of P(y_t | y_<t, source).

    Symbols of the source are 0..S-1, of the target 0..V-1. One more, the boundary V, stands before the first symbol of
    a target where the decoder is given it, and comes after the last where it says it; so logits have V + 1 columns.

    A subclass says what the layers make of pairs of sequences: rows (N, V + 1) of logits, one for each symbol that the
    decoder is given.
    """

    _losses: ClassVar[Any] = losses
    _decoding: ClassVar[Any] = _decoding

    source_vocab_size: int
    target_vocab_size: int

    def _scores(self, pairs: Pairs) -> Array:
        """The logits (N, V + 1) of what follows each symbol; inference."""
        raise NotImplementedError

    def _attended(self, pairs: Pairs) -> tuple[Array, Any]:
        """The same, and what each step attended to in the form that a call returns, but with a batch."""
        raise NotImplementedError

    def _through(self, pairs: Pairs, seed: int | None, sampling: float) -> tuple[Array, Any]:
        """All layers, forward, with dropout: the logits, and what `_back` needs."""
        raise NotImplementedError

    def _back(self, dlogits: Array, kept: Any, grads: Any) -> None:
        """All layers, in the reverse order of `_through`."""
        raise NotImplementedError

    @property
    def begin(self) -> int:
        """The id of the boundary as the first symbol that the decoder is given: V."""
        return self.target_vocab_size

    @property
    def end(self) -> int:
        """The id of the boundary as the last symbol that the decoder says: V."""
        return self.target_vocab_size

    def _source(self, name: str, source: Any, lengths_name: str, lengths: Any) -> _Tokens:
        """Sources in any form."""
        given = _tokens(name, source, lengths, self.source_vocab_size, lengths_name)
        starts = given.rows.starts
        if np.count_nonzero(starts[1:] > starts[:-1]) < given.rows.batch:
            empty = np.flatnonzero(np.diff(starts) == 0)
            which = name if given.unbatched else f"{name}[{empty[0]}]"
            raise ValueError(f"{which} should have at least one symbol, not none")
        return given

    def _pairs(
        self,
        source: Any,
        target: Any,
        source_lengths: Any,
        lengths: Any,
        names: tuple[str, str, str, str] = ("source", "target", "source_lengths", "lengths"),
    ) -> Pairs:
        """Sources and targets in any form; `names` is what they are called."""
        given = self._source(names[0], source, names[2], source_lengths)
        wanted = _tokens(names[1], target, lengths, self.target_vocab_size, names[3])
        batches = ["no batch" if one.unbatched else f"a batch of {one.rows.batch}" for one in (given, wanted)]
        if batches[0] != batches[1]:
            raise ValueError(f"{names[1]} should be {batches[0]}, as {names[0]} is, not {batches[1]}")
        counts = np.diff(wanted.rows.starts) + 1
        rows = rows_of(wanted.rows.batch, wanted.rows.time + 1, counts)
        begun = np.full(rows.starts[-1], self.begin, np.int64)
        others = np.ones(len(begun), bool)
        others[rows.starts[:-1]] = False
        begun[others] = wanted.ids
        following = np.append(begun[1:], np.full(min(1, len(begun)), self.end))
        return Pairs(given, _Tokens(begun, rows, wanted.unbatched), following)

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
        weights : ndarray or list of ndarrays
            With `return_weights`.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        pairs = self._pairs(source, target, source_lengths, lengths)
        if checks.flag("return_weights", return_weights):
            logits, weights = self._attended(pairs)
            if pairs.begun.unbatched:
                weights = [own[0] for own in weights] if isinstance(weights, list) else weights[0]
            return pairs.begun.spread(logits), weights
        logits = np.empty((len(pairs.following), self.target_vocab_size + 1), self.dtype)
        for places, some in pairs.parts(_TOKENS):
            logits[places] = self._scores(some)
        return pairs.begun.spread(logits)

    def forward(
        self, source: Any, target: Any, *, source_lengths: Any = None, lengths: Any = None, seed: int | None = None
    ) -> tuple[Array, Tape]:
        """Call for training: with dropout, and what `backward` needs.

        Parameters
        ----------
        source, target, source_lengths, lengths
            As of a call.
        seed : int, optional
            Fixes what dropout drops; drawn where it is not given.

        Returns
        -------
        logits : ndarray of shape (B, T + 1, V + 1), or (T + 1, V + 1)
        tape : Tape
        """
        pairs = self._pairs(source, target, source_lengths, lengths)
        rows, kept = self._through(pairs, seed, 0.0)
        logits = pairs.begun.spread(rows)
        return logits, Tape(self, (kept, pairs.begun, logits.shape))

    def backward(self, dlogits: Any, tape: Tape, *, grads: Any = None) -> None:
        """Add the gradients of all parameters; symbols have none, and there is nothing to return.

        Parameters
        ----------
        dlogits : array of the shape of the logits
            Past the end of a row nothing in it matters.
        tape : Tape
            What `forward` returned.
        grads : mapping from str to ndarray, optional
            Where the gradients are added; `grads` of the model by default.
        """
        kept, begun, shape = self._kept(tape)
        self._back(begun.gather(checks.like("dlogits", dlogits, self.dtype, shape)), kept, grads)

    def log_prob(self, source: Any, target: Any, *, source_lengths: Any = None, lengths: Any = None) -> Array:
        """The log-probability of each target, its end included: the sum over t of log P(y_t | y_<t, source).

        Parameters
        ----------
        source, target, source_lengths, lengths
            As of a call.

        Returns
        -------
        ndarray of shape (B,)
            Natural logarithms, float64.
        """
        pairs = self._pairs(source, target, source_lengths, lengths)
        result = np.empty(len(pairs.following))
        for places, some in pairs.parts(max(1, min(_TOKENS, _LOGITS // (self.target_vocab_size + 1)))):
            result[places] = log_softmax_at(self._scores(some), some.following)
        rows = pairs.begun.rows
        return sums(np.repeat(np.arange(rows.batch), np.diff(rows.starts)), result, rows.batch)

    def _decoder(self, source: _Tokens, copies: int) -> tuple[Array, Decoder]:
        """The logits (B, V + 1) of the first symbol said of each source, and a decoder whose rows stand there."""
        raise NotImplementedError

    def generate(
        self,
        source: Any,
        max_new: int,
        *,
        lengths: Any = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        num_results: int = 1,
        stop: Any = None,
        seed: Any = None,
        return_log_probs: bool = False,
    ) -> Any:
        """Say a target of each source: drawn, the likeliest symbol after symbol, or by beam search.

        Parameters
        ----------
        source : array of shape (B, S), (S,) for one sequence, or list of sequences
            Ids in 0..S-1; no source may be empty.
        max_new : int
            How many symbols at most, the end among them.
        lengths : array of shape (B,), optional
            The real symbols of each row of source.
        temperature, top_k, top_p, num_beams, length_penalty, num_results, stop, seed, return_log_probs
            As of `fastseq.models.TransformerLM.generate`.
        repetition_penalty : float
            As there; what the source holds does not count.

        Returns
        -------
        ids : list of B arrays of their own lengths, or one array for a source (S,)
            int64, without the end. With `num_results` above 1 a list of results for each row, best first.
        log_probs : of the same form, with `return_log_probs`
            float64, of each symbol, and of the end where a row has one.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be; of a source and a step at which logits are NaN, or
            nothing is left to choose from.
        """
        return decoding.generated(
            self,
            self._given(source, lengths, max_new),
            max_new,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            num_beams=num_beams,
            length_penalty=length_penalty,
            num_results=num_results,
            stop=stop,
            seed=seed,
            return_log_probs=return_log_probs,
        )

    def stream(
        self,
        source: Any,
        max_new: int,
        *,
        lengths: Any = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: Any = None,
        seed: Any = None,
    ) -> Iterator[Any]:
        """The symbols of `generate`, one after another, each as soon as it is chosen and none before it is asked for.

        Parameters
        ----------
        source, max_new, lengths, temperature, top_k, top_p, repetition_penalty, stop, seed
            As of `generate`; looked at by the call, not when the first symbol is asked for.

        Returns
        -------
        iterator of int, for a source (S,); else of ndarrays of shape (B,)
            int64; -1 where a row has ended.
        """
        return decoding.streamed(
            self,
            self._given(source, lengths, max_new),
            max_new,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            seed=seed,
        )

    def _given(self, source: Any, lengths: Any, max_new: Any) -> decoding.Given:
        """The sources, looked at, and how many symbols are asked for."""
        given = self._source("source", source, "lengths", lengths)
        self._check_new(max_new)
        sequences = [given.ids[first:last] for first, last in itertools.pairwise(given.rows.starts)]
        return decoding.Given(sequences, functools.partial(self._decoder, given), given.unbatched, self.end)

    def _check_new(self, max_new: Any) -> None:
        """Refuse more new symbols than a target can have."""

    def _batch(self, batch: Batch) -> Pairs:
        """The pairs of a batch."""
        if batch.targets is None:
            raise ValueError("targets should be given: from a source to its target is what the model learns")
        for name, value in (("inputs", batch.inputs), ("targets", batch.targets)):
            if np.ndim(value) != 2:
                raise ValueError(f"{name} should be a batch of ids, (B, T), not of shape {np.shape(value)}")
        return self._pairs(
            batch.inputs,
            batch.targets,
            batch.lengths,
            batch.target_lengths,
            ("inputs", "targets", "lengths", "target_lengths"),
        )

    def training_forward(
        self,
        batch: Batch,
        state: Any = None,
        seed: int | None = None,
        *,
        sampling: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> tuple[float, int, Any, Any]:
        """The mean cross-entropy of the targets of a batch and their ends, for `fastseq.training.fit`.

        Parameters
        ----------
        batch : Batch
            Of `PairedBatches`.
        state : None
            Pairs carry none.
        seed : int, optional
            Fixes what dropout drops, and what is sampled.
        sampling, label_smoothing : float
            As of `fit`.

        Returns
        -------
        loss : float
        count : int
            Over how many symbols, ends included.
        tape : object
            For `training_backward`.
        state : None
        """
        pairs = self._batch(batch)
        logits, kept = self._through(pairs, seed, _share("sampling", sampling))
        loss, gradient = self._losses.softmax_cross_entropy(logits, pairs.following, label_smoothing=label_smoothing)
        return loss, len(pairs.following), (gradient, kept), None

    def training_backward(self, tape: Any, grads: Any = None) -> None:
        """Add the gradients of the loss that `training_forward` returned."""
        gradient, kept = tape
        self._back(gradient, kept, grads)

    def evaluation_forward(self, batch: Batch, state: Any = None) -> tuple[float, int, Any]:
        """Loss, count and state as of `training_forward`, without dropout, sampling and smoothing."""
        pairs = self._batch(batch)
        loss, _ = self._losses.softmax_cross_entropy(self._scores(pairs), pairs.following)
        return loss, len(pairs.following), None

    @checks.short_traceback
    def fit(
        self,
        sources: Any,
        targets: Any = None,
        *,
        source_lengths: Any = None,
        lengths: Any = None,
        batch_size: int | None = None,
        seed: int | None = 0,
        sampling: float = 0.0,
        label_smoothing: float = 0.0,
        validation_split: float | None = None,
        **settings: Any,
    ) -> History:
        """Train; what was learnt before is where it starts. Where this fails, the model is as it was.

        Parameters
        ----------
        sources : list of sequences of ids, array of shape (B, S), or data of `fastseq.training`
            Sequences become `PairedBatches` together with their targets.
        targets : list of sequences of ids, or array of shape (B, T)
            One for each source.
        source_lengths, lengths : arrays of shape (B,), optional
            The real symbols of each row of sources, and of targets.
        batch_size : int, optional
            Pairs in a batch; 32 by default.
        seed : int, optional
            Fixes the order of the data, what dropout drops and what is sampled.
        sampling : float in [0, 1]
            The probability that the decoder is given, in place of a symbol of the target, one that it drew itself
            after what came before [1]_.
        label_smoothing : float in [0, 1]
            The share of each target's probability that is spread over all symbols; a validation has none.
        validation_split : float in (0, 1), optional
            The share of the pairs, drawn by the seed, that the model is validated on.
        **settings
            As of `fastseq.training.fit`: ``epochs``, ``optimiser``, ``validation``, ``checkpoint``, ...
            ``validation`` may be a tuple of sources and targets, with source_lengths and lengths or without. Its loss
            is the mean of -log P of a symbol of the targets, ends included, as of `log_prob`.

        Returns
        -------
        History

        References
        ----------
        .. [1] S. Bengio et al., "Scheduled sampling for sequence prediction with recurrent neural networks",
           NeurIPS 2015.
        """
        options = {
            "sampling": _share("sampling", sampling),
            "label_smoothing": _share("label_smoothing", label_smoothing),
        }
        size = BATCH_SIZE if batch_size is None else checks.size("batch_size", batch_size, 1)
        raw = settings.get("validation")
        if isinstance(raw, tuple) and not is_data(raw) and len(raw) in (2, 4):
            settings["validation"] = training.PairedBatches(
                *self._pairs_of("validation ", *raw), batch_size=size, shuffle=False
            )
        if targets is None:
            if not is_data(sources):
                raise ValueError("targets should be given: from a source to its target is what the model learns")
            batched_already(
                source_lengths=source_lengths,
                lengths=lengths,
                batch_size=batch_size,
                validation_split=validation_split,
            )
            return self._train(sources, {"seed": seed, "options": options, **settings})
        pairs = self._pairs_of("", sources, targets, source_lengths, lengths)
        if validation_split is not None:
            if raw is not None:
                raise ValueError("validation_split should not be given with validation")
            learnt, out = held_out(len(pairs[0]), validation_split, seed)
            held = [[rows[i] for i in out] for rows in pairs]
            settings["validation"] = training.PairedBatches(*held, batch_size=size, shuffle=False)
            pairs = [pairs[0][i] for i in learnt], [pairs[1][i] for i in learnt]
        data = training.PairedBatches(*pairs, batch_size=size, seed=seed)
        return self._train(data, {"seed": seed, "options": options, **settings})

    def _pairs_of(
        self, where: str, sources: Any, targets: Any, source_lengths: Any = None, lengths: Any = None
    ) -> tuple[list[Array], list[Array]]:
        """Sources and targets without padding."""
        names = f"{where}sources", f"{where}targets", f"{where}source_lengths", f"{where}lengths"
        pairs = self._pairs(sources, targets, source_lengths, lengths, names)
        if pairs.source.unbatched:
            raise ValueError(f"{where}sources should be a batch of sequences, not one of shape {np.shape(sources)}")
        starts = pairs.begun.rows.starts
        wanted = [pairs.begun.ids[first + 1 : last] for first, last in itertools.pairwise(starts)]
        return np.split(pairs.source.ids, pairs.source.rows.starts[1:-1]), wanted


def _share(name: str, value: Any) -> float:
    """A number in [0, 1]."""
    result = checks.number(name, value, least=0)
    if result > 1:
        raise ValueError(f"{name} should be at most 1, not {checks.describe(value)}")
    return result


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

    _layers: ClassVar[Any] = layers
    _dtypes: ClassVar[tuple[str, ...] | None] = ("float32", "float64")

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
        self.dtype = checks.real_dtype("dtype", dtype, self._dtypes)
        self.seed = checks.seed("seed", seed)
        kinds, of_type = self._layers, {"dtype": self.dtype}
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
        encoder = kinds.TransformerEncoder(self.num_encoder_layers, *sizes, seed=seeds[0], **settings)
        decoder = kinds.TransformerDecoder(self.num_decoder_layers, *sizes, seed=seeds[1], **settings)
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
        children = {
            "source_embedding": kinds.Embedding(self.source_vocab_size, self.d_model, seed=seeds[2], **of_type),
            "target_embedding": kinds.Embedding(self.target_vocab_size + 1, self.d_model, seed=seeds[3], **of_type),
        }
        self._source_positions: Any = None
        self._target_positions: Any = None
        if self.positions == "learned":
            of_source, of_target = (
                kinds.LearnedPositions(self.max_length, self.d_model, seed=own, **of_type) for own in seeds[4:6]
            )
            children |= {"source_positions": of_source, "target_positions": of_target}
            self._source_positions, self._target_positions = of_source, of_target
        elif self.positions == "sinusoidal":
            self._source_positions = self._target_positions = kinds.SinusoidalPositions(self.d_model, **of_type)
        children |= {"encoder": encoder, "decoder": decoder}
        if not self.tied:
            children["output"] = kinds.Linear(self.d_model, self.target_vocab_size + 1, False, seed=seeds[6], **of_type)
        self._start(config, **children)
        self._source_embedding: Any = children["source_embedding"]
        self._target_embedding: Any = children["target_embedding"]
        self._encoder: Any = encoder
        self._decoder_layers: Any = decoder
        self._output: Any = children.get("output")
        if self.tied:
            operations = kinds.Linear._operations
            self._output = _Tied(self._target_embedding, operations, self.target_vocab_size + 1)
        self._drop = kinds.Dropout(self.dropout, **of_type)
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

    def _source(self, name: str, source: Any, lengths_name: str, lengths: Any) -> _Tokens:
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

    def _encoded(self, source: _Tokens) -> Array:
        """What the encoder makes of the sources, as rows (N, d_model)."""
        rows = source.rows
        x = self._embedded(self._source_embedding, self._source_positions, source.ids, rows)
        y: Array = self._encoder._run(x, Context(Frame(rows, rows, False), None, False), False)[0]
        return y

    @staticmethod
    def _context(pairs: Pairs, memory: Array) -> Context:
        """What the layers of the decoder are told besides the symbols."""
        rows, keys = pairs.begun.rows, pairs.source.rows
        return Context(Frame(rows, rows, False), None, True, memory, Frame(rows, keys, False), None)

    def _decoded(self, pairs: Pairs, want_weights: bool = False) -> tuple[Array, Any]:
        """The logits (N, V + 1), and what each layer attended to."""
        context = self._context(pairs, self._encoded(pairs.source))
        begun = pairs.begun
        x = self._embedded(self._target_embedding, self._target_positions, begun.ids, begun.rows)
        y, weights = self._decoder_layers._run(x, context, want_weights)
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
        of_encoder = Context(Frame(source.rows, source.rows, False), None, False)
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
        self, parts: tuple[Any, Any, Any], tokens: _Tokens, context: Context, seeds: tuple[int, int]
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
        y, of_tower = tower._forward_rows(x, context, seeds[1])
        return y, _Kept(of_embedding, of_positions, entering, of_tower)

    def _back(self, dlogits: Array, kept: Any, grads: Any) -> None:
        of_source, of_target, of_output = kept
        targets = self._child_targets(grads)
        dy = self._output.backward(dlogits, of_output, grads=targets["target_embedding" if self.tied else "output"])
        dx, dmemory = self._decoder_layers._backward_rows(dy, of_target.tower, targets["decoder"])
        self._entered_backward("target", self._target_embedding, self._target_positions, dx, of_target, targets)
        dx, _ = self._encoder._backward_rows(dmemory, of_source.tower, targets["encoder"])
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

    def _encoded_state(self, source: _Tokens) -> AttentionState:
        state: AttentionState = self._decoder_layers._remembering(Tokens(self._encoded(source), source.rows, False))
        return state

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
        state = self._decoder_layers._kept_by(state, len(ids))
        self._check_room(int(state.lengths.max(initial=-1)) + 1)
        x = self._target_embedding(ids) * self._scale
        x = x if self._target_positions is None else self._target_positions(x, positions=state.lengths)
        y, state = self._decoder_layers._go_on(x, np.arange(len(ids) + 1), state, None)
        return self._output(y), state

    def _check_new(self, max_new: Any) -> None:
        if checks.size("max_new", max_new) > self.max_length:
            raise ValueError(f"max_new should be at most max_length={self.max_length}, not {max_new}")

    def _check_room(self, tokens: int) -> None:
        if tokens > self.max_length:
            raise ValueError(f"a target should have at most max_length={self.max_length} symbols, not {tokens}")

    def _decoder(self, source: _Tokens, copies: int) -> tuple[Array, Decoder]:
        state = self._encoded_state(source)
        logits, state = self.step(np.full(source.rows.batch, self.begin), state)
        operations = self._decoder_layers._operations
        if not hasattr(operations, "Decoder"):
            return logits, StateDecoder(self, state)
        positions = self._target_positions
        return logits, operations.Decoder(
            self._decoder_layers._packed_blocks(self.max_length),
            self._decoder_layers._final_norm(),
            self._target_embedding._arrays["weight"] * self._scale,
            None if positions is None else positions._table(self.max_length),
            self._output._weights(),
            state._own,
            state._memory,
            self.max_length,
            lambda _: self._check_room(self.max_length + 1),
            threads.get_num_threads(),
        )
