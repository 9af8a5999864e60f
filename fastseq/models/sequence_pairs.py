"""Models from one sequence of symbols to another: what they share.

They compute the real symbols of a batch only, as rows (`fastseq.layers.rows`).
"""

from __future__ import annotations

import functools
import itertools
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fastseq import checks, losses, training
from fastseq.checks import Array
from fastseq.layers.base import Tape
from fastseq.layers.rows import rows_of
from fastseq.layers.settings import size
from fastseq.models import decoding
from fastseq.models.base import Task, TrainedModel
from fastseq.models.decoding import Decoder
from fastseq.models.forms import BATCH_SIZE, batched_already, held_out, is_data
from fastseq.models.sums import sums
from fastseq.models.symbols import TokenRows, log_softmax_at, token_rows
from fastseq.training import Batch, History

_TOKENS = 1 << 13  # symbols that go through the layers together where there is no batch to keep together
_LOGITS = 1 << 22  # logits that are computed together


class Pairs(NamedTuple):
    """Sources, and what a decoder is given and should say of their targets."""

    source: TokenRows  # S symbols of each, at least one
    begun: TokenRows  # T + 1 of each: the boundary, then the target
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


def _some(tokens: TokenRows, first: int, last: int) -> TokenRows:
    """The sequences from `first` up to `last`."""
    starts, time = tokens.rows.starts, tokens.rows.time
    rows = rows_of(last - first, time, np.diff(starts[first : last + 1]))
    return TokenRows(tokens.ids[starts[first] : starts[last]], rows, tokens.unbatched)


class SequencePairModel(TrainedModel):
    """The probability of a target, given a source of another length: prod over t of P(y_t | y_<t, source).

    Symbols of the source are 0..S-1, of the target 0..V-1. One more, the boundary V, stands before the first symbol of
    a target where the decoder is given it, and comes after the last where it says it; so logits have V + 1 columns.

    A subclass says what the layers make of pairs of sequences: rows (N, V + 1) of logits, one for each symbol that the
    decoder is given.
    """

    source_vocab_size: int = size(doc="S; symbols of sources are 0..S-1.")
    target_vocab_size: int = size(doc="V; symbols of targets are 0..V-1.")

    @abstractmethod
    def _scores(self, pairs: Pairs) -> Array:
        """The logits (N, V + 1) of what follows each symbol; inference."""

    @abstractmethod
    def _attended(self, pairs: Pairs) -> tuple[Array, Any]:
        """The same, and what each step attended to in the form that a call returns, but with a batch."""

    @abstractmethod
    def _through(self, pairs: Pairs, seed: int | None, sampling: float) -> tuple[Array, Any]:
        """All layers, forward, with dropout: the logits, and what `_back` needs."""

    @property
    def begin(self) -> int:
        """The id of the boundary as the first symbol that the decoder is given: V."""
        return self.target_vocab_size

    @property
    def end(self) -> int:
        """The id of the boundary as the last symbol that the decoder says: V."""
        return self.target_vocab_size

    def _source(self, name: str, source: Any, lengths_name: str, lengths: Any) -> TokenRows:
        """Sources in any form."""
        given = token_rows(name, source, lengths, self.source_vocab_size, lengths_name)
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
        wanted = token_rows(names[1], target, lengths, self.target_vocab_size, names[3])
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
        return Pairs(given, TokenRows(begun, rows, wanted.unbatched), following)

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

    @abstractmethod
    def _decoder(self, source: TokenRows, copies: int) -> tuple[Array, Decoder]:
        """The logits (B, V + 1) of the first symbol said of each source, and a decoder whose rows stand there."""

    @decoding.documented
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
        """Generate a target for each source, by sampling, greedy decoding or beam search.

        The end counts as one of the `max_new` symbols.

        Parameters
        ----------
        source : array of shape (B, S), (S,) for one sequence, or list of sequences
            Ids in 0..S-1; no source may be empty.
        lengths : array of shape (B,), optional
            The real symbols of each row of source.
        {options}

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

        References
        ----------
        {references}
        """
        given = self._given(source, lengths, max_new)
        options = decoding.Options(
            max_new,
            temperature,
            top_k,
            top_p,
            repetition_penalty,
            num_beams,
            length_penalty,
            num_results,
            stop,
            seed,
            return_log_probs,
        )
        return decoding.generated(given, options)

    @decoding.documented
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
        """Yield the symbols of `generate` one by one, each computed when it is asked for.

        Arguments are checked by the call, not when the first symbol is asked for.

        Parameters
        ----------
        source, lengths
            As of `generate`.
        {options}

        Returns
        -------
        iterator of int, for a source (S,); else of ndarrays of shape (B,)
            int64; -1 where a row has ended.

        References
        ----------
        {references}
        """
        given = self._given(source, lengths, max_new)
        options = decoding.Options(max_new, temperature, top_k, top_p, repetition_penalty, stop=stop, seed=seed)
        return decoding.streamed(given, options)

    def _given(self, source: Any, lengths: Any, max_new: Any) -> decoding.Given:
        """Check the sources, and how many symbols are asked for."""
        given = self._source("source", source, "lengths", lengths)
        self._check_new(max_new)
        sequences = [given.ids[first:last] for first, last in itertools.pairwise(given.rows.starts)]
        begin = functools.partial(self._decoder, given)
        return decoding.Given(
            sequences, begin, given.unbatched, self.target_vocab_size, self._backend.decoding, self.end
        )

    def _check_new(self, max_new: Any) -> None:
        """Refuse more new symbols than a target can have."""

    def _task(self, batch: Batch, state: Any) -> Task:
        if batch.targets is None:
            raise ValueError("targets should be given: from a source to its target is what the model learns")
        for name, value in (("inputs", batch.inputs), ("targets", batch.targets)):
            if np.ndim(value) != 2:
                raise ValueError(f"{name} should be a batch of ids, (B, T), not of shape {np.shape(value)}")
        names = "inputs", "targets", "lengths", "target_lengths"
        pairs = self._pairs(batch.inputs, batch.targets, batch.lengths, batch.target_lengths, names)
        return Task(pairs, pairs.following, len(pairs.following))

    def _evaluated(self, task: Task, state: Any) -> tuple[Array, Any]:
        return self._scores(task.inputs), None

    def _taped(self, task: Task, state: Any, seed: int | None, sampling: float = 0.0) -> tuple[Array, Any, Any]:
        logits, kept = self._through(task.inputs, seed, sampling)
        return logits, None, kept

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
        task = self._task(batch, state)
        logits, state, kept = self._taped(task, state, seed, _share("sampling", sampling))
        loss, gradient = losses.softmax_cross_entropy(
            logits, task.targets, label_smoothing=label_smoothing, _backend=self._backend
        )
        return loss, task.elements, (gradient, kept), state

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
