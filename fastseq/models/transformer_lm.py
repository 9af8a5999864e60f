"""The language model over Transformer layers, as GPT-2 is put together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fastseq import checks, layers, threads, training
from fastseq.checks import Array
from fastseq.layers import inside
from fastseq.layers.base import Tape, child_seed, mask_seed, seeds_of
from fastseq.layers.rows import Rows, rows_of
from fastseq.layers.settings import KW_ONLY, random_seed, size
from fastseq.layers.transformer import D_MODEL, MAX_LAYERS, NHEAD
from fastseq.models.base import Task
from fastseq.models.decoding import Decoder, StateDecoder
from fastseq.models.forms import BATCH_SIZE
from fastseq.models.symbol_model import LanguageModel
from fastseq.models.symbols import Symbols, ids_array, log_softmax_at, real_steps, token_rows
from fastseq.models.transformer_parts import GenerativeTransformer, attention_maps, encode, initialise
from fastseq.state import AttentionState, contents
from fastseq.training import Batch, History

_TOKENS = 1 << 13  # tokens that go through the layers together where there is no batch to keep together
_LOGITS = 1 << 22  # logits that are computed together


class _Kept(NamedTuple):
    """The tapes of the layers of a language model."""

    embedding: Tape
    positions: Tape | None
    entering: Tape | None  # of dropout
    encoder: Any
    output: Any


class TransformerLM(GenerativeTransformer, LanguageModel):
    """An autoregressive Transformer of symbols: P(x_t | x_<t) by causal attention.

    The architecture is that of GPT-2 [1]_: embedding, positions, layers with the norm first, a last norm, and the
    matrix of the embedding as the output map. Every sequence starts with a begin symbol, which stands before x_1 and is
    never predicted.

    A symbol is predicted from at most `context` tokens, the begin symbol among them. In longer sequences this window
    moves on by half of `context` whenever it is full, so that every symbol except the first ones has at least half of
    `context` before it. A call, `log_prob` and `generate` have the same windows.

    References
    ----------
    .. [1] A. Radford et al., "Language models are unsupervised multitask learners", 2019.
    .. [2] O. Press and L. Wolf, "Using the output embedding to improve language models", EACL 2017.
    """

    d_model: int = size(doc=D_MODEL)
    nhead: int = size(doc=NHEAD)
    num_layers: int = size(limit=MAX_LAYERS, doc="Layers of attention and feed-forward.")
    _: KW_ONLY
    context: int = size(default=1024, before="dropout", doc="The most tokens that a symbol is predicted from.")
    window: int | None = size(
        default=None,
        before="bias",
        doc="A token may attend only to the last this many, itself among them.",
    )
    seed: int | None = random_seed(
        default=None,
        doc="Fixes the initial parameters: normal, of deviation 0.02, divided by sqrt(2 num_layers) where a residual"
        " branch ends [1]_.",
    )

    def _build(self) -> None:
        first, second, third, fourth = seeds_of(self.seed, 4)
        self._embedding: Any = self._part(layers.Embedding, self.vocab_size + 1, self.d_model, seed=second)
        self._positions: Any = self._positions_layer(self.context, third)
        self._encoder: Any = self._stack(layers.TransformerEncoder, self.num_layers, window=self.window, seed=first)
        self._output: Any = self._output_map(self._embedding, self.vocab_size, fourth)
        self._drop: Any = self._part(layers.Dropout, self.dropout)
        self._start(
            embedding=self._embedding,
            positions=self._positions if self.positions == "learned" else None,
            encoder=self._encoder,
            output=None if self.tied else self._output,
        )
        initialise(self, self.num_layers, 1 / math.sqrt(2 * self.num_layers))

    def _begun(self, ids: Array, lengths: Array) -> Symbols:
        """Sequences with the begin symbol in front of each."""
        counts = lengths + 1
        result = np.empty(len(ids) + len(lengths), np.int64)
        firsts = np.cumsum(counts) - counts
        others = np.ones(len(result), bool)
        others[firsts] = False
        result[firsts], result[others] = self.begin, ids
        return Symbols(result, counts)

    def _embedded(self, ids: Array, rows: Rows) -> Array:
        """What enters the layers, (N, d_model)."""
        x: Array = self._embedding(ids)
        return x if self._positions is None else self._positions(x, positions=rows.steps())

    def _windows(self, counts: Array) -> tuple[Array, Array, Array, Array]:
        """The windows of sequences of so many tokens: whose, first token, past the last, and from where it is new."""
        hop = max(1, self.context // 2)
        past = np.maximum(counts - self.context, 0)
        each = np.where(counts > 0, 1 + -(-past // hop), 0)
        whose = np.repeat(np.arange(len(counts)), each)
        index = np.arange(len(whose)) - np.repeat(np.cumsum(each) - each, each)
        first = hop * index
        last = np.minimum(first + self.context, counts[whose])
        return whose, first, last, np.where(index, first + self.context - hop, 0)

    def _hidden(self, tokens: Symbols) -> Iterator[tuple[Array, Array]]:
        """What comes out of the last layer, (M, d_model), at some places of all tokens (M,), each place once."""
        whose, first, last, new = self._windows(tokens.lengths)
        offsets = (np.cumsum(tokens.lengths) - tokens.lengths)[whose]
        group = (np.cumsum(last - first) - 1) // _TOKENS
        for some in np.split(np.arange(len(whose)), np.flatnonzero(np.diff(group)) + 1):
            if not len(some):
                continue
            lengths = last[some] - first[some]
            rows = rows_of(len(some), int(lengths.max()), lengths)
            steps = rows.steps()
            places = np.repeat(offsets[some] + first[some], lengths) + steps
            y, _ = encode(self._encoder, self._embedded(tokens.ids[places], rows), rows, True)
            wanted = steps >= np.repeat(new[some] - first[some], lengths)
            yield places[wanted], y[wanted]

    def __call__(self, x: Any, *, lengths: Any = None, return_weights: bool = False) -> Any:
        """The whole predictive distribution at every step.

        Parameters
        ----------
        x : array of shape (B, T), (T,) for one sequence, or list of sequences
            Ids in 0..V-1.
        lengths : array of shape (B,), optional
            The real symbols of each row.
        return_weights : bool
            Whether to return what each token attends to, too; of sequences of less than `context` symbols.

        Returns
        -------
        logits : ndarray of shape (B, T, V), or (T, V)
            At step t those of the next symbol, x_{t+1}; 0 past the end of a row.
        weights : list of ndarrays of shape (B, heads, T + 1, T + 1), or (heads, T + 1, T + 1)
            With `return_weights`, one a layer; the first of the tokens is the begin symbol.
        """
        given = token_rows("x", x, lengths, self.vocab_size)
        rows = given.rows
        counts = np.diff(rows.starts)
        begun = self._begun(given.ids, counts)
        after_begin = begun.steps() > 0
        if checks.flag("return_weights", return_weights):
            self._check_fits("x", rows.longest + 1)
            whole = rows_of(rows.batch, rows.time + 1, begun.lengths)
            hidden, weights = encode(self._encoder, self._embedded(begun.ids, whole), whole, True, True)
            return given.spread(self._output(hidden[after_begin])), attention_maps(weights, whole, given.unbatched)
        hidden = np.empty((len(begun.ids), self.d_model), self.dtype)
        for places, some in self._hidden(begun):
            hidden[places] = some
        return given.spread(self._output(hidden[after_begin]))

    def _check_fits(self, name: str, tokens: int) -> None:
        if tokens > self.context:
            raise ValueError(
                f"{name} should have at most context={self.context} tokens, the begin symbol among them, not {tokens}"
            )

    def forward(self, x: Any, *, lengths: Any = None, seed: int | None = None) -> tuple[Array, Tape]:
        """Call for training: with dropout, and what `backward` needs.

        Parameters
        ----------
        x, lengths
            As of a call, of less than `context` symbols.
        seed : int, optional
            Fixes what dropout drops.

        Returns
        -------
        logits : ndarray of shape (B, T, V), or (T, V)
        tape : Tape
        """
        given = token_rows("x", x, lengths, self.vocab_size)
        self._check_fits("x", given.rows.longest + 1)
        begun = self._begun(given.ids, np.diff(given.rows.starts))
        rows = rows_of(given.rows.batch, given.rows.time + 1, begun.lengths)
        after_begin = begun.steps() > 0
        logits, kept = self._through(begun.ids, rows, seed)
        logits = given.spread(logits[after_begin])
        return logits, Tape(self, (kept, given, after_begin, logits.shape))

    def _through(self, ids: Array, rows: Rows, seed: int | None) -> tuple[Array, _Kept]:
        """All layers, forward: logits (N, V) of the next token."""
        seed = mask_seed(seed)
        of_positions = entering = None
        x, of_embedding = self._embedding.forward(ids)
        if self._positions is not None:
            x, of_positions = self._positions.forward(x, positions=rows.steps())
        if self.dropout:
            x, entering = self._drop.forward(x, seed=child_seed(seed, 0))
        context = inside.Context.of(rows, True)
        y, of_encoder = inside.forward_rows(self._encoder, x, context, child_seed(seed, 1))
        logits, of_output = self._output.forward(y)
        return logits, _Kept(of_embedding, of_positions, entering, of_encoder, of_output)

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
        kept, given, after_begin, shape = self._kept(tape)
        dlogits = given.gather(checks.like("dlogits", dlogits, self.dtype, shape))
        # What is predicted after the begin symbol was not returned.
        whole = np.zeros((len(after_begin), self.vocab_size), self.dtype)
        whole[after_begin] = dlogits
        self._back(whole, kept, grads)

    def _back(self, dlogits: Array, kept: _Kept, grads: Any) -> None:
        """All layers, in the reverse order of `_through`."""
        targets = self._child_targets(grads)
        of_output = targets["embedding" if self.tied else "output"]
        dy = self._output.backward(dlogits, kept.output, grads=of_output)
        dx, _ = inside.backward_rows(self._encoder, dy, kept.encoder, targets["encoder"])
        if kept.entering is not None:
            dx = self._drop.backward(dx, kept.entering)
        if kept.positions is not None:
            dx = self._positions.backward(dx, kept.positions, grads=targets.get("positions"))
        self._embedding.backward(dx, kept.embedding, grads=targets["embedding"])

    def _task(self, batch: Batch, state: Any) -> Task:
        """Return tokens (N,) and their rows, and as targets what comes after each, (N,).

        Of `PaddedBatches` without targets: whole sequences of at most `context` symbols, each after a begin symbol. Of
        `Streams`: a window; those that are fresh are taken for whole sequences.
        """
        given = checks.as_array("inputs", batch.inputs)
        if given.ndim != 2:
            raise ValueError(f"inputs should be ids of shape (B, T), not {given.shape}")
        counts = None if batch.lengths is None else checks.lengths(batch.lengths, *given.shape)
        rows = rows_of(given.shape[0], given.shape[1], counts)
        real = real_steps(np.diff(rows.starts), given.shape[1])
        if rows.longest > self.context:
            raise ValueError(f"inputs should have at most context={self.context} steps, not {rows.longest}")
        # Windows that `fit` cuts of sequences may hold the begin symbol; a stream has none.
        with_begin = batch.targets is not None and batch.fresh is None
        inputs = checks.ids("inputs", given, self.vocab_size + with_begin, real)
        starts = np.full(len(inputs), batch.targets is None)
        following = inputs
        if batch.targets is not None:
            following = checks.integers("targets", batch.targets)
            if following.shape != inputs.shape:
                raise ValueError(f"targets should be of shape {inputs.shape}, as inputs, not {following.shape}")
            following = checks.ids("targets", following, self.vocab_size, real)
            if batch.fresh is not None:
                starts = checks.resets(np.reshape(batch.fresh, (-1, 1)), len(inputs), 1, True)[:, 0]
        shifted = np.concatenate([np.full((len(inputs), 1), self.begin), inputs[:, :-1]], axis=1)[:, : inputs.shape[1]]
        tokens = np.where(starts[:, None], shifted, inputs)
        following = np.where(starts[:, None], inputs, following)
        return Task((tokens[real], rows), following[real], int(rows.starts[-1]))

    def _taped(self, task: Task, state: Any, seed: int | None) -> tuple[Array, Any, Any]:
        tokens, rows = task.inputs
        logits, kept = self._through(tokens, rows, seed)
        return logits, None, kept

    def _evaluated(self, task: Task, state: Any) -> tuple[Array, Any]:
        tokens, rows = task.inputs
        y, _ = encode(self._encoder, self._embedded(tokens, rows), rows, True)
        return self._output(y), None

    def _most_steps(self) -> int:
        return self.context

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
            They become `TextWindows`: a sequence that is longer than a window is covered by some, at other places in
            every epoch. The first of them comes after a begin symbol.
        lengths : array of shape (B,), optional
            The real symbols of each row.
        batch_size : int, optional
            Windows in a batch; 32 by default.
        chunk : int, optional
            Symbols in a window; `context` by default.
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
        steps = self.context if chunk is None else checks.size("chunk", chunk, 1)
        if steps > self.context:
            raise ValueError(f"chunk should be at most context={self.context}, not {steps}")
        rows = [row for row in given.split() if len(row)]
        if not rows:
            raise ValueError("data should hold at least one symbol")
        size = BATCH_SIZE if batch_size is None else batch_size
        return training.TextWindows(rows, steps=steps, batch_size=size, begin=self.begin, seed=seed)

    def _log_probs(self, given: Symbols) -> Array:
        result = np.empty(len(given.ids))
        before = np.roll(given.ids, 1)
        before[given.steps() == 0] = self.begin
        size = max(1, _LOGITS // self.vocab_size)
        for places, hidden in self._hidden(Symbols(before, given.lengths)):
            for at in range(0, len(places), size):
                some = places[at : at + size]
                result[some] = log_softmax_at(self._output(hidden[at : at + size]), given.ids[some])
        return result

    def initial_state(self, batch_size: int) -> AttentionState:
        """The state after the begin symbol, where every sequence starts.

        Parameters
        ----------
        batch_size : int
            Rows of the batch, 0 or more.
        """
        rows = np.zeros(checks.size("batch_size", batch_size), np.int64)
        return self._prefilled([np.array([self.begin])])[1][rows]

    def step(self, x_t: Any, state: Any = None) -> tuple[Array, AttentionState]:
        """One symbol more of each row; the bits are those of a call over all symbols.

        Parameters
        ----------
        x_t : array of shape (B,)
            Ids in 0..V-1.
        state : AttentionState, optional
            Where each row stands, which may be at different lengths; after the begin symbol by default.

        Returns
        -------
        logits : ndarray of shape (B, V)
            Of the symbol that follows.
        state : AttentionState
            For the next step. The one that was given still is what it was.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        array = ids_array("x_t", x_t)
        if array.ndim != 1:
            raise ValueError(f"x_t should be of shape (B,), not {array.shape}")
        ids = checks.ids("x_t", array, self.vocab_size)
        if state is None:
            state = self.initial_state(len(ids))
        else:
            state = inside.check_state(self._encoder, state, len(ids), tokens=True)
        state = self._with_room(state)
        places = state.lengths
        x = self._embedding(ids)
        x = x if self._positions is None else self._positions(x, positions=places)
        room = int(places.max(initial=-1)) + 1
        tokens = np.zeros((len(ids), room), np.int64)
        before: Any = contents(state).tokens
        tokens[:, : room - 1] = before[:, : room - 1]
        tokens[np.arange(len(ids)), places] = ids
        y, state = inside.append_tokens(self._encoder, x, np.arange(len(ids) + 1), state, tokens)
        return self._output(y), state

    def _with_room(self, state: AttentionState) -> AttentionState:
        """A state whose rows have room for a token: the window of those that had none moved on."""
        full = np.flatnonzero(state.lengths >= self.context)
        if not len(full):
            return state
        tokens: Any = contents(state).tokens
        _, fresh = self._prefilled([tokens[row, : self.context] for row in full], 1)
        index = np.arange(state.batch_size)
        index[full] = state.batch_size + np.arange(len(full))
        return AttentionState.concatenate([state, fresh])[index]

    def _prefilled(self, sequences: list[Array], more: int = 0) -> tuple[Array, AttentionState]:
        """What comes out last, (B, d_model), of sequences that start with the begin symbol, and where they stand.

        Of a long one the last window counts that has room for `more` tokens; where `context` is 1, that is empty.
        """
        whose, first, _, _ = self._windows(np.array([len(row) for row in sequences]) + more)
        begins = np.zeros(len(sequences), np.int64)
        begins[whose] = first  # of windows of one sequence, the last one stays
        windows = [row[begin:] for row, begin in zip(sequences, begins, strict=True)]
        lengths = np.array([len(row) for row in windows])
        rows = rows_of(len(windows), int(lengths.max()), lengths)
        ids = np.concatenate(windows)
        tokens = np.zeros((rows.batch, rows.time), np.int64)
        tokens[real_steps(lengths, rows.time)] = ids
        start = inside.start_state(self._encoder, rows.batch, tokens)
        y, state = inside.append_tokens(self._encoder, self._embedded(ids, rows), rows.starts, start, tokens)
        return y[rows.starts[1:] - 1] if len(y) else y, state

    def _decoder(self, prompts: list[Array], copies: int) -> tuple[Array, Decoder]:
        y, state = self._prefilled([self._with_begin(row) for row in prompts])
        logits: Array = self._output(y)
        compiled = self._backend.transformer_decoder
        if compiled is None:
            return logits, StateDecoder(self, state)
        return logits, compiled(
            *inside.packed_stack(self._encoder, self.context),
            inside.arrays(self._embedding)["weight"],
            None if self._positions is None else inside.position_table(self._positions, self.context),
            inside.packed(self._output),
            contents(state).own,
            None,
            self.context,
            lambda rows: contents(self._prefilled([self._with_begin(row) for row in rows], 1)[1]).own,
            threads.get_num_threads(),
        )

    def _with_begin(self, row: Array) -> Array:
        return np.concatenate([[self.begin], row])
