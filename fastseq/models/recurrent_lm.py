"""The language model over recurrent layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastseq import checks, layers, threads, training
from fastseq.backend import RecurrentDecoder
from fastseq.checks import Array
from fastseq.layers import inside
from fastseq.layers.base import Tape, child_seed, mask_seed, seeds_of
from fastseq.layers.settings import KW_ONLY, Dtype, choice, floating, fraction, random_seed, size
from fastseq.models.base import ParameterCache, Task
from fastseq.models.decoding import Decoder, StateDecoder
from fastseq.models.forms import BATCH_SIZE
from fastseq.models.recurrent_parts import CELLS, Reader
from fastseq.models.symbol_model import LanguageModel
from fastseq.models.symbols import Symbols, ids_array, log_softmax_at, real_steps
from fastseq.training import Batch, History

_ROWS, _CHUNK = 32, 512  # sequences, and steps of them, that `log_prob` computes together
_CHUNKS = 16  # of each stream in an epoch, at least, before there is another stream beside it


class _Kept(NamedTuple):
    """The tapes of the layers of a language model."""

    embedding: Tape
    entering: Tape | None  # of dropout
    recurrent: Tape
    leaving: Tape | None
    output: Tape


class RecurrentLM(LanguageModel):
    """The latent autoregressive model of symbols: P(x_t | x_<t) = softmax(W h_t + b), h_t = f(x_{t-1}, h_{t-1}).

    Every sequence starts with a begin symbol of its own, which stands before x_1 and is never predicted.

    References
    ----------
    .. [1] W. Zaremba, I. Sutskever and O. Vinyals, "Recurrent neural network regularization", arXiv:1409.2329, 2014.
    """

    embedding_dim: int = size(doc="The size of the vector of a symbol.")
    hidden_size: int = size(doc="The size of the state.")
    num_layers: int = size(default=1, doc="Recurrent layers, stacked.")
    _: KW_ONLY
    cell: str = choice(tuple(CELLS), default="lstm", doc="Which recurrent layer.")
    dropout: float = fraction(
        default=0.0, doc="Share of what enters and leaves each recurrent layer that training drops [1]_."
    )
    dtype: Dtype = floating(default="float32", doc="Of parameters and logits.")
    seed: int | None = random_seed(default=None, doc="Fixes the initial parameters.")

    def _build(self) -> None:
        first, second, third = seeds_of(self.seed, 3)
        sizes = self.embedding_dim, self.hidden_size, self.num_layers
        self._embedding: Any = self._part(layers.Embedding, self.vocab_size + 1, self.embedding_dim, seed=first)
        self._recurrent: Any = self._part(CELLS[self.cell], *sizes, dropout=self.dropout, seed=second)
        self._output: Any = self._part(layers.Linear, self.hidden_size, self.vocab_size, seed=third)
        self._drop: Any = self._part(layers.Dropout, self.dropout)
        self._start(embedding=self._embedding, recurrent=self._recurrent, output=self._output)
        self._reader = Reader(self._embedding, self._recurrent)
        self._for_decoders = ParameterCache(self._embedding, self._recurrent, self._output)

    def initial_state(self, batch_size: int) -> Any:
        """The state after the begin symbol, where every sequence starts.

        Parameters
        ----------
        batch_size : int
            Rows of the batch, 0 or more.
        """
        rows = np.zeros(checks.size("batch_size", batch_size), np.int64)
        return self._begun()[1][rows]

    def _begun(self) -> tuple[Array, Any]:
        """What comes out of the recurrent layer at the begin symbol, (1, H), and its state."""
        y, state = self._recurrent.step(self._embedding(np.array([self.begin])))
        return y, state

    def _ids(self, x: Any, lengths: Any) -> tuple[Array, Array | None, bool]:
        """Symbols (B, T), zeros in the padding; their lengths; whether there was a batch."""
        array = ids_array("x", x)
        if array.ndim not in (1, 2):
            raise ValueError(f"x should be of shape (B, T) or (T,), not {array.shape}")
        batched = array.ndim == 2
        if lengths is None:
            ids = checks.ids("x", array, self.vocab_size)
            return ids if batched else ids[None], None, batched
        rows = array if batched else array[None]
        counts = checks.lengths(lengths, *rows.shape)
        return np.maximum(checks.ids("x", rows, self.vocab_size, real_steps(counts, rows.shape[1])), 0), counts, batched

    def __call__(self, x: Any, state: Any = None, *, lengths: Any = None) -> Array:
        """The whole predictive distribution at every step.

        Parameters
        ----------
        x : array of shape (B, T), or (T,) for one sequence
            Ids in 0..V-1.
        state : state, optional
            Where each row goes on; by default it starts, after a begin symbol.
        lengths : array of shape (B,), optional
            The real symbols of each row.

        Returns
        -------
        ndarray of shape (B, T, V), or (T, V)
            At step t the logits of the next symbol, x_{t+1}; 0 past the end of a row.
        """
        ids, counts, batched = self._ids(x, lengths)
        state = self.initial_state(len(ids)) if state is None else state
        y, _ = self._reader(ids, state, counts)
        logits: Array = self._output(y)
        if counts is not None:
            logits[~real_steps(counts, ids.shape[1])] = 0
        return logits if batched else logits[0]

    def step(self, x_t: Any, state: Any = None) -> tuple[Array, Any]:
        """The logits (B, V) of what follows one symbol of each row, (B,), and the state for the next step."""
        array = ids_array("x_t", x_t)
        if array.ndim != 1:
            raise ValueError(f"x_t should be of shape (B,), not {array.shape}")
        ids = checks.ids("x_t", array, self.vocab_size)
        state = self.initial_state(len(ids)) if state is None else state
        y, state = self._recurrent.step(self._embedding(ids), state)
        return self._output(y), state

    def forward(
        self, x: Any, state: Any = None, *, lengths: Any = None, seed: int | None = None
    ) -> tuple[Array, Any, Tape]:
        """Call for training: with dropout, and what `backward` needs.

        Parameters
        ----------
        x, state, lengths
            As of a call. The logits past the end of a row are not 0 here, but mean nothing.
        seed : int, optional
            Fixes what dropout drops.

        Returns
        -------
        logits : ndarray of shape (B, T, V), or (T, V)
        state : State or LSTMState
            Where each row ends.
        tape : Tape
        """
        ids, counts, batched = self._ids(x, lengths)
        begins = state is None
        if begins:
            ids = self._after_begin(ids)
            counts = None if counts is None else counts + 1
        logits, state, kept = self._through(ids, state, counts, seed)
        if begins:
            logits = logits[:, 1:]
        logits = logits if batched else logits[0]
        return logits, state, Tape(self, (kept, begins, logits.shape))

    def _after_begin(self, ids: Array) -> Array:
        return np.concatenate([np.full((len(ids), 1), self.begin), ids], axis=1)

    def _through(self, ids: Array, state: Any, lengths: Array | None, seed: int | None) -> tuple[Array, Any, _Kept]:
        """All layers, forward."""
        seed = mask_seed(seed)
        entering = leaving = None
        x, embedding = self._embedding.forward(ids)
        if self.dropout:
            x, entering = self._drop.forward(x, seed=child_seed(seed, 0))
        y, state, recurrent = self._recurrent.forward(x, state, lengths=lengths, seed=child_seed(seed, 1))
        if self.dropout:
            y, leaving = self._drop.forward(y, seed=child_seed(seed, 2))
        logits, output = self._output.forward(y)
        return logits, state, _Kept(embedding, entering, recurrent, leaving, output)

    def backward(
        self, dlogits: Any, tape: Tape, *, dstate: Any = None, truncate: int | None = None, grads: Any = None
    ) -> Any:
        """Add the gradients of all parameters.

        Parameters
        ----------
        dlogits : array of the shape of the logits
        tape : Tape
            What `forward` returned.
        dstate : state, optional
            The gradient of the state that was returned.
        truncate : int, optional
            As of the recurrent layers; a begin symbol is a step, too.
        grads : mapping from str to ndarray, optional
            Where the gradients are added; `grads` of the model by default.

        Returns
        -------
        State or LSTMState
            The gradient of the state that was given.
        """
        kept, begun, shape = self._kept(tape)
        dlogits = checks.like("dlogits", dlogits, self.dtype, shape)
        if len(shape) == 2:
            dlogits = dlogits[None]
        if begun:  # what is predicted after the begin symbol was not returned
            nothing = np.zeros((len(dlogits), 1, self.vocab_size), self.dtype)
            dlogits = np.concatenate([nothing, dlogits], axis=1)
        return self._back(dlogits, kept, grads, dstate, truncate)

    def _back(self, dlogits: Array, kept: _Kept, grads: Any, dstate: Any = None, truncate: int | None = None) -> Any:
        """All layers, in the reverse order of `_through`."""
        targets = self._child_targets(grads)
        dy = self._output.backward(dlogits, kept.output, grads=targets["output"])
        if kept.leaving is not None:
            dy = self._drop.backward(dy, kept.leaving)
        dx, dstate = self._recurrent.backward(
            dy, kept.recurrent, dstate=dstate, truncate=truncate, grads=targets["recurrent"]
        )
        if kept.entering is not None:
            dx = self._drop.backward(dx, kept.entering)
        self._embedding.backward(dx, kept.embedding, grads=targets["embedding"])
        return dstate

    def _task(self, batch: Batch, state: Any) -> Task:
        """Return symbols (B, T), and as targets what comes after each.

        Of `PaddedBatches` without targets: whole sequences, each after a begin symbol. Of `Streams`: a chunk; the first
        of an epoch comes after a begin symbol.
        """
        given = checks.as_array("inputs", batch.inputs)
        if given.ndim != 2:
            raise ValueError(f"inputs should be ids of shape (B, T), not {given.shape}")
        counts = None if batch.lengths is None else checks.lengths(batch.lengths, *given.shape)
        real = None if counts is None else real_steps(counts, given.shape[1])
        inputs = np.maximum(checks.ids("inputs", given, self.vocab_size, real), 0)
        if batch.targets is None:
            inputs, targets = self._after_begin(inputs[:, :-1])[:, : given.shape[1]], inputs
        else:
            targets = np.maximum(checks.ids("targets", batch.targets, self.vocab_size, real), 0)
            if targets.shape != inputs.shape:
                raise ValueError(f"targets should be of shape {inputs.shape}, as inputs, not {targets.shape}")
            if state is None and batch.fresh is not None and np.all(batch.fresh):
                inputs, targets = self._after_begin(inputs), np.concatenate([inputs[:, :1], targets], axis=1)
                counts = None if counts is None else counts + 1
        return Task(inputs, targets, targets.size if counts is None else int(counts.sum()), counts)

    def _taped(self, task: Task, state: Any, seed: int | None) -> tuple[Array, Any, Any]:
        return self._through(task.inputs, state, task.lengths, seed)

    def _evaluated(self, task: Task, state: Any) -> tuple[Array, Any]:
        y, state = self._reader(task.inputs, state, task.lengths)
        return self._output(y), state

    def training_backward(self, tape: Any, grads: Any = None, *, truncate: int | None = None) -> None:
        """Add the gradients of the loss that `training_forward` returned; `truncate` as of `backward`."""
        gradient, kept = tape
        self._back(gradient, kept, grads, None, truncate)

    def _most_steps(self) -> int:
        return _CHUNK

    @checks.short_traceback
    def fit(
        self,
        data: Any,
        lengths: Any = None,
        *,
        batch_size: int | None = None,
        chunk: int | None = None,
        seed: int | None = 0,
        validation_split: float | None = None,
        **settings: Any,
    ) -> History:
        """Train; what was learnt before is where it starts. Where this fails, the model is as it was.

        Parameters
        ----------
        data : data of `fastseq.training`, array of shape (T,), list of sequences, or array of shape (B, T)
            One long text (T,) becomes `Streams`, sequences become `PaddedBatches`.
        lengths : array of shape (B,), optional
            The real symbols of each row.
        batch_size : int, optional
            Sequences in a batch, 32 by default; or streams side by side, by default up to 32, as many as have at
            least 16 chunks each.
        chunk : int, optional
            Steps of a chunk of a stream; 64 by default.
        seed : int, optional
            Fixes the order of the data and what dropout drops.
        validation_split : float in (0, 1), optional
            The share of the sequences, drawn by the seed, that the model is validated on; of one text the last part.
        **settings
            As of `fastseq.training.fit`: ``epochs``, ``optimiser``, ``validation``, ``checkpoint``, ...
            ``validation`` may be raw, as `data`, or a tuple of a padded array and lengths. It is taken whole, each
            sequence after a begin symbol: the loss is the mean of -log P of a symbol, as of `log_prob`.

        Returns
        -------
        History
        """
        return self._fit_text(data, lengths, batch_size, chunk, seed, validation_split, settings)

    def _text_data(self, given: Symbols, batch_size: int | None, chunk: int | None, seed: int | None) -> Any:
        if len(given.lengths) == 1 and len(given.ids) > 1:
            steps = 64 if chunk is None else checks.size("chunk", chunk, 1)
            fitting = min(BATCH_SIZE, max(1, (len(given.ids) - 1) // (_CHUNKS * steps)))
            streams = fitting if batch_size is None else batch_size
            return training.Streams(given.ids, batch_size=streams, steps=steps, seed=seed)
        if chunk is not None:
            raise ValueError(f"chunk should be given with one text alone, which becomes streams, but is {chunk!r:.80}")
        rows = [row for row in given.split() if len(row)]
        return training.PaddedBatches(rows, batch_size=batch_size or BATCH_SIZE, seed=seed)

    def _log_probs(self, given: Symbols) -> Array:
        result = np.empty(len(given.ids))
        ends = np.cumsum(given.lengths)
        order = np.argsort(-given.lengths, kind="stable")
        for first in range(0, len(order), _ROWS):
            rows = order[first : first + _ROWS]
            lengths, starts = given.lengths[rows], ends[rows] - given.lengths[rows]
            state = None
            for at in range(0, int(lengths.max()), _CHUNK):
                counts = np.clip(lengths - at, 0, _CHUNK)
                real = real_steps(counts, int(counts.max()))
                places = (starts[:, None] + at + np.arange(real.shape[1]))[real]
                before = np.zeros(real.shape, np.int64)
                before[real] = given.ids[places - 1]  # of the first symbol of all, the last: it is replaced
                if at == 0:
                    before[:, 0] = self.begin
                y, state = self._reader(before, state, counts)
                result[places] = log_softmax_at(self._output(y[real]), given.ids[places])
        return result

    def _decoder(self, prompts: list[Array], copies: int) -> tuple[Array, Decoder]:
        given = Symbols(np.concatenate(prompts), np.array([len(row) for row in prompts]))
        ids = self._after_begin(given.padded())
        y, state = self._reader(ids, None, given.lengths + 1)
        logits = self._output(y[np.arange(len(ids)), given.lengths])
        compiled = self._backend.recurrent_decoder
        if compiled is None:
            return logits, StateDecoder(self, state)
        weights = self._for_decoders.get(lambda: self._decoder_weights(compiled))
        n_threads = threads.get_num_threads()
        return logits, compiled.Decoder(weights, state.h, getattr(state, "c", None), copies, n_threads)

    def _decoder_weights(self, compiled: RecurrentDecoder) -> Any:
        """The weights as a compiled decoder wants them."""
        cells = [cell for (cell,) in inside.cells(self._recurrent)]
        tables, embedding = self._reader.tables(), inside.arrays(self._embedding)["weight"]
        return compiled.Weights(embedding, cells[0], tables and tables[0], cells, inside.packed(self._output))
