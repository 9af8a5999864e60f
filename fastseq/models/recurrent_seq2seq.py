"""Recurrent models from one sequence of symbols to another: a layer that reads, and one that writes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastseq import checks, layers, threads
from fastseq.backend import RecurrentDecoder
from fastseq.checks import Array
from fastseq.layers import inside
from fastseq.layers.base import Tape, child_seed, mask_seed, seeds_of
from fastseq.layers.settings import KW_ONLY, Dtype, choice, flag, floating, fraction, random_seed, size
from fastseq.models.base import ParameterCache
from fastseq.models.decoding import Decoder, StateDecoder
from fastseq.models.recurrent_parts import CELLS, Reader
from fastseq.models.sequence_pairs import Pairs, SequencePairModel
from fastseq.models.symbols import TokenRows, ids_array
from fastseq.state import Seq2SeqState, State, adopt, adopt_pair, named_arrays

ATTENTIONS = ("additive", "multiplicative")


class _Read(NamedTuple):
    """What the decoder has of the sources."""

    keys: Array  # the outputs of the encoder, as rows (M, K)
    state: State  # where the decoder starts


class _KeptRead(NamedTuple):
    """Tapes of the encoder and of the bridge."""

    embedding: Tape
    entering: Tape | None  # of dropout
    encoder: Tape
    bridge: tuple[tuple[Tape, Array], ...]  # of each state array and layer: the linear map, and what tanh gave


class _KeptSpoken(NamedTuple):
    """Tapes of the decoder."""

    embedding: Tape
    entering: Tape | None
    decoder: Any  # a tape, or what `_walk_backward` needs
    attention: Any
    combine: tuple[Tape, Array] | None  # the linear map, and what tanh gave
    leaving: Tape | None
    output: Tape


class _KeptWalk(NamedTuple):
    """Tapes of the steps of a decoder with additive attention."""

    attention: inside.AttentionSteps
    steps: list[tuple[Any, Tape]]  # of each step: of the attention, and of the recurrent layer


class Seq2Seq(SequencePairModel):
    """A recurrent encoder and a recurrent decoder [1]_, with attention between them or not.

    The decoder starts where the encoder ended. Of a bidirectional encoder, each state array of each layer goes through
    a bridge: tanh(W [forward; reverse] + b). Of one that is not, the states are taken as they are.

    - Without attention the logits are a linear map of the decoder's output h.
    - ``"multiplicative"`` [2]_: scores h W k of the decoder's output and every encoder's output k give a context c;
      the logits are a linear map of tanh(W_c [c; h]).
    - ``"additive"`` [3]_: scores v tanh(W s + U k + b) of the decoder's state before the step give c, which enters the
      decoder beside the symbol; the logits are a linear map of [s; c], s the state after the step.

    Notes
    -----
    Scheduled sampling gives the decoder the likeliest symbol after what it was given before, of all but the end, found
    without dropout.

    References
    ----------
    .. [1] I. Sutskever, O. Vinyals and Q. V. Le, "Sequence to sequence learning with neural networks", NeurIPS 2014.
    .. [2] M.-T. Luong, H. Pham and C. D. Manning, "Effective approaches to attention-based neural machine
       translation", EMNLP 2015.
    .. [3] D. Bahdanau, K. Cho and Y. Bengio, "Neural machine translation by jointly learning to align and translate",
       ICLR 2015.
    """

    embedding_dim: int = size(doc="The size of the vector of a symbol.")
    hidden_size: int = size(doc="The size of the state of encoder and decoder.")
    num_layers: int = size(default=1, doc="Recurrent layers of either, stacked.")
    _: KW_ONLY
    cell: str = choice(tuple(CELLS), default="gru", doc="Which recurrent layer.")
    bidirectional: bool = flag(default=True, doc="Whether the encoder reads the source from both ends.")
    attention: str | None = choice(
        ATTENTIONS, default=None, doc="What the decoder sees of the source beside its initial state."
    )
    dropout: float = fraction(
        default=0.0,
        doc="Share that training drops of the vectors of symbols, of what passes between layers, and of what the"
        " logits are made from.",
    )
    dtype: Dtype = floating(default="float32", doc="Of parameters and logits.")
    seed: int | None = random_seed(default=None, doc="Fixes the initial parameters.")

    def _build(self) -> None:
        hidden, keys = self.hidden_size, self.hidden_size * (2 if self.bidirectional else 1)
        context = keys if self.attention == "additive" else 0
        seeds = seeds_of(self.seed, 7)
        symbol, recurrent = self.embedding_dim, CELLS[self.cell]
        stacked: dict[str, Any] = {"num_layers": self.num_layers, "dropout": self.dropout}
        self._source_embedding: Any = self._part(layers.Embedding, self.source_vocab_size, symbol, seed=seeds[0])
        self._target_embedding: Any = self._part(layers.Embedding, self.begin + 1, symbol, seed=seeds[1])
        self._encoder_layer: Any = self._part(
            recurrent, symbol, hidden, bidirectional=self.bidirectional, seed=seeds[2], **stacked
        )
        self._bridges: dict[str, Any] = {}
        if self.bidirectional:
            names = [f"bridge_{array}_l{layer}" for array in self._states() for layer in range(self.num_layers)]
            for name, own in zip(names, seeds_of(seeds[3], len(names)), strict=True):
                self._bridges[name] = self._part(layers.Linear, keys, hidden, seed=own)
        self._decoder_layer: Any = self._part(recurrent, symbol + context, hidden, seed=seeds[4], **stacked)
        self._attention: Any = None
        self._combine: Any = None
        scores: list[Any] = []  # layers of the scores, which decoders read
        if self.attention == "multiplicative":
            (own,) = seeds_of(seeds[5], 1)
            self._attention = self._part(layers.MultiplicativeAttention, hidden, keys, seed=seeds[5])
            self._combine = self._part(layers.Linear, keys + hidden, hidden, False, seed=own)
            scores = [self._combine]
        elif self.attention == "additive":
            self._attention = self._part(layers.AdditiveAttention, hidden, keys, hidden, seed=seeds[5])
            scores = [inside.children(self._attention)[name] for name in ("query", "score")]
        self._output: Any = self._part(layers.Linear, hidden + context, self.end + 1, seed=seeds[6])
        self._drop: Any = self._part(layers.Dropout, self.dropout)
        self._start(
            source_embedding=self._source_embedding,
            target_embedding=self._target_embedding,
            encoder=self._encoder_layer,
            **self._bridges,
            decoder=self._decoder_layer,
            attention=self._attention,
            combine=self._combine,
            output=self._output,
        )
        self._source_reader = Reader(self._source_embedding, self._encoder_layer)
        # Not with additive attention, with which the decoder is given more than a symbol.
        self._target_reader = Reader(self._target_embedding, self._decoder_layer)
        self._for_decoders = ParameterCache(self._target_embedding, self._decoder_layer, self._output, *scores)

    def _states(self) -> str:
        """The names of the arrays of a recurrent state."""
        return "hc" if self.cell == "lstm" else "h"

    # The encoder and the bridge.

    def _read(self, source: TokenRows) -> _Read:
        """What the decoder has of the sources; inference."""
        rows = source.rows
        y, state = self._source_reader(rows.scatter(source.ids[:, None])[:, :, 0], None, rows.lengths)
        if self._bridges:
            state = self._crossed([self._tanh(bridge(x)) for bridge, x in self._ends(state)])
        return _Read(rows.gather(y), state)

    def _read_forward(self, source: TokenRows, seeds: tuple[int, int]) -> tuple[_Read, _KeptRead]:
        """`_read` for training."""
        rows, entering = source.rows, None
        x, of_embedding = self._source_embedding.forward(source.ids)
        if self.dropout:
            x, entering = self._drop.forward(x, seed=seeds[0])
        y, state, of_encoder = self._encoder_layer.forward(rows.scatter(x), lengths=rows.lengths, seed=seeds[1])
        of_bridge = []
        if self._bridges:
            for bridge, end in self._ends(state):
                z, tape = bridge.forward(end)
                of_bridge.append((tape, self._tanh(z)))
            state = self._crossed([z for _, z in of_bridge])
        kept = _KeptRead(of_embedding, entering, of_encoder, tuple(of_bridge))
        return _Read(rows.gather(y), state), kept

    def _read_backward(
        self, dkeys: Array | None, dstate: State, source: TokenRows, kept: _KeptRead, targets: dict[str, Any]
    ) -> None:
        """`_read_forward`, from its end."""
        rows = source.rows
        width = self.hidden_size * (2 if self.bidirectional else 1)
        dy = np.zeros((rows.batch, rows.time, width), self.dtype) if dkeys is None else rows.scatter(dkeys)
        if self._bridges:
            parts = [part for array in dstate for part in np.moveaxis(array, 1, 0)]
            dends = []
            for (name, bridge), part, (tape, z) in zip(self._bridges.items(), parts, kept.bridge, strict=True):
                dz = self._backend.additive_attention.tanh_backward(
                    z, np.ascontiguousarray(part), threads.get_num_threads()
                )
                dends.append(bridge.backward(dz, tape, grads=targets[name]))
            dstate = self._parted(dends)
        dx, _ = self._encoder_layer.backward(dy, kept.encoder, dstate=dstate, grads=targets["encoder"])
        dx = rows.gather(dx)
        if kept.entering is not None:
            dx = self._drop.backward(dx, kept.entering)
        self._source_embedding.backward(dx, kept.embedding, grads=targets["source_embedding"])

    def _ends(self, state: State) -> list[tuple[Any, Array]]:
        """Each bridge and what enters it: the last states of a layer, (B, 2 H)."""
        ends = []
        for array in state:
            sides = array.reshape(len(array), self.num_layers, 2 * self.hidden_size)
            ends += [np.ascontiguousarray(sides[:, layer]) for layer in range(self.num_layers)]
        return list(zip(self._bridges.values(), ends, strict=True))

    def _crossed(self, ends: list[Array]) -> State:
        """What left the bridges as the state of the decoder."""
        count = self.num_layers
        return _state([np.stack(ends[i : i + count], axis=1) for i in range(0, len(ends), count)])

    def _parted(self, dends: list[Array]) -> State:
        """Gradients of what entered the bridges as that of the encoder's last state."""
        count, shape = self.num_layers, (len(dends[0]), 2 * self.num_layers, self.hidden_size)
        return _state([np.stack(dends[i : i + count], axis=1).reshape(shape) for i in range(0, len(dends), count)])

    def _tanh(self, x: Array) -> Array:
        y: Array = self._backend.additive_attention.tanh_forward(x, threads.get_num_threads())
        return y

    # The decoder.

    def _spoken(self, pairs: Pairs, read: _Read, want_weights: bool) -> tuple[Array, Any]:
        """The logits (N, V + 1) of what follows each symbol, and if wanted the weights (B, T + 1, S); inference."""
        rows, weights = pairs.begun.rows, None
        ids = rows.scatter(pairs.begun.ids[:, None])[:, :, 0]
        if self.attention == "additive":
            x = self._target_embedding(ids)
            h, weights = self._walk(pairs, read, x, want_weights)
            return self._output(rows.gather(h)), weights
        h = rows.gather(self._target_reader(ids, read.state, rows.lengths)[0])
        if self._attention is not None:
            projected = inside.project_keys(self._attention, read.keys)
            context, weights = inside.attend(
                self._attention, h, rows, read.keys, projected, pairs.source.rows, want_weights
            )
            h = self._tanh(self._combine(np.concatenate([context, h], axis=1)))
        return self._output(h), weights

    def _walk(self, pairs: Pairs, read: _Read, x: Array, want_weights: bool) -> tuple[Array, Any]:
        """Steps of additive attention and the decoder one after another: [s; c] (B, T, H + K), and the weights."""
        rows, (firsts, counts, lengths) = pairs.begun.rows, _places(pairs)
        projected, state = inside.project_keys(self._attention, read.keys), read.state
        width = read.keys.shape[1]
        both = np.zeros((rows.batch, rows.time, self.hidden_size + width), self.dtype)
        maps = np.zeros((rows.batch, rows.time, pairs.source.rows.time), self.dtype) if want_weights else None
        for t in range(rows.longest):
            running = lengths > t
            context, weights = inside.attend_step(
                self._attention, _top(state), read.keys, projected, firsts, np.where(running, counts, 0)
            )
            entering = np.concatenate([x[:, t], context], axis=1)[:, None]
            y, state = self._decoder_layer(entering, state, lengths=_running(running))
            both[:, t, : self.hidden_size] = y[:, 0]
            both[:, t, self.hidden_size :] = context
            if maps is not None:
                maps[:, t, : weights.shape[1]] = weights
        return both, maps

    def _walk_forward(self, pairs: Pairs, read: _Read, x: Array, seed: int) -> tuple[Array, _KeptWalk]:
        """`_walk` for training."""
        rows, (firsts, counts, lengths) = pairs.begun.rows, _places(pairs)
        attention, state, steps = inside.AttentionSteps(self._attention, read.keys), read.state, []
        both = np.zeros((rows.batch, rows.time, self.hidden_size + read.keys.shape[1]), self.dtype)
        for t in range(rows.longest):
            running = lengths > t
            context, of_attention = attention.step(_top(state), firsts, np.where(running, counts, 0))
            entering = np.concatenate([x[:, t], context], axis=1)[:, None]
            y, state, of_step = self._decoder_layer.forward(
                entering, state, lengths=_running(running), seed=child_seed(seed, t)
            )
            both[:, t, : self.hidden_size] = y[:, 0]
            both[:, t, self.hidden_size :] = context
            steps.append((of_attention, of_step))
        return both, _KeptWalk(attention, steps)

    def _walk_backward(self, dboth: Array, kept: _KeptWalk, targets: dict[str, Any]) -> tuple[Array, Array, State]:
        """`_walk_forward`, from its end: the gradients of x, of the keys and of the initial state."""
        (batch, time, _), width = dboth.shape, self.embedding_dim
        attention = kept.attention.backward(targets["attention"])
        dx = np.zeros((batch, time, width), self.dtype)
        dstate: State | None = None
        for t in reversed(range(len(kept.steps))):
            of_attention, of_step = kept.steps[t]
            dentering, dstate = self._decoder_layer.backward(
                dboth[:, t : t + 1, : self.hidden_size], of_step, dstate=dstate, grads=targets["decoder"]
            )
            dx[:, t] = dentering[:, 0, :width]
            dcontext = dentering[:, 0, width:] + dboth[:, t, self.hidden_size :]
            dstate = _added(dstate, attention.step(dcontext, of_attention))
        return dx, attention.finish(), self._decoder_layer.initial_state(batch) if dstate is None else dstate

    def _spoken_forward(self, pairs: Pairs, read: _Read, seeds: tuple[int, int, int]) -> tuple[Array, _KeptSpoken]:
        """`_spoken` for training."""
        rows = pairs.begun.rows
        entering = leaving = of_attention = of_combine = None
        x, of_embedding = self._target_embedding.forward(pairs.begun.ids)
        if self.dropout:
            x, entering = self._drop.forward(x, seed=seeds[0])
        of_decoder: Any
        if self.attention == "additive":
            both, of_decoder = self._walk_forward(pairs, read, rows.scatter(x), seeds[1])
            h = rows.gather(both)
        else:
            y, _, of_decoder = self._decoder_layer.forward(
                rows.scatter(x), read.state, lengths=rows.lengths, seed=seeds[1]
            )
            h = rows.gather(y)
        if self.attention == "multiplicative":
            context, of_attention = inside.attend_forward(self._attention, h, rows, read.keys, pairs.source.rows)
            z, tape = self._combine.forward(np.concatenate([context, h], axis=1))
            h = self._tanh(z)
            of_combine = tape, h
        if self.dropout:
            h, leaving = self._drop.forward(h, seed=seeds[2])
        logits, of_output = self._output.forward(h)
        return logits, _KeptSpoken(of_embedding, entering, of_decoder, of_attention, of_combine, leaving, of_output)

    def _spoken_backward(
        self, dlogits: Array, pairs: Pairs, kept: _KeptSpoken, targets: dict[str, Any]
    ) -> tuple[Array | None, State]:
        """`_spoken_forward`, from its end: the gradients of keys and of the initial state."""
        rows, dkeys = pairs.begun.rows, None
        dh = self._output.backward(dlogits, kept.output, grads=targets["output"])
        if kept.leaving is not None:
            dh = self._drop.backward(dh, kept.leaving)
        if kept.combine is not None:
            tape, h = kept.combine
            dz = self._backend.additive_attention.tanh_backward(h, dh, threads.get_num_threads())
            dboth = self._combine.backward(dz, tape, grads=targets["combine"])
            width = dboth.shape[1] - self.hidden_size
            dquery, dkeys = inside.attend_backward(
                self._attention, np.ascontiguousarray(dboth[:, :width]), kept.attention, targets["attention"]
            )
            dh = dboth[:, width:] + dquery
        if self.attention == "additive":
            dx, dkeys, dstate = self._walk_backward(rows.scatter(dh), kept.decoder, targets)
        else:
            dx, dstate = self._decoder_layer.backward(rows.scatter(dh), kept.decoder, grads=targets["decoder"])
        dx = rows.gather(dx)
        if kept.entering is not None:
            dx = self._drop.backward(dx, kept.entering)
        self._target_embedding.backward(dx, kept.embedding, grads=targets["target_embedding"])
        return dkeys, dstate

    def _scores(self, pairs: Pairs) -> Array:
        return self._spoken(pairs, self._read(pairs.source), False)[0]

    def _attended(self, pairs: Pairs) -> tuple[Array, Any]:
        if self._attention is None:
            raise ValueError("return_weights should be False where the model has no attention")
        return self._spoken(pairs, self._read(pairs.source), True)

    def _through(self, pairs: Pairs, seed: int | None, sampling: float) -> tuple[Array, Any]:
        seed = mask_seed(seed)
        if sampling:
            pairs = self._resampled(pairs, child_seed(seed, 5), sampling)
        read, of_read = self._read_forward(pairs.source, (child_seed(seed, 0), child_seed(seed, 1)))
        seeds = child_seed(seed, 2), child_seed(seed, 3), child_seed(seed, 4)
        logits, of_spoken = self._spoken_forward(pairs, read, seeds)
        return logits, (pairs, of_read, of_spoken)

    def _back(self, dlogits: Array, kept: Any, grads: Any) -> None:
        pairs, of_read, of_spoken = kept
        targets = self._child_targets(grads)
        dkeys, dstate = self._spoken_backward(dlogits, pairs, of_spoken, targets)
        self._read_backward(dkeys, dstate, pairs.source, of_read, targets)

    def _resampled(self, pairs: Pairs, seed: int, share: float) -> Pairs:
        """Pairs in which about this share of what the decoder is given is the likeliest symbol after what came before.

        The end is none of them: the target goes on.
        """
        rows = pairs.begun.rows
        ids = rows.scatter(pairs.begun.ids[:, None])[:, :, 0].copy()
        replaced = np.random.default_rng(seed).random((rows.longest, rows.batch)) < share
        state = adopt_pair(*self._begun(pairs.source))
        for t in range(1, rows.longest):
            logits, state = self._said(ids[:, t - 1], state)
            likeliest = logits[:, : self.target_vocab_size].argmax(axis=1)
            ids[:, t] = np.where(replaced[t], likeliest, ids[:, t])
        return pairs._replace(begun=pairs.begun._replace(ids=rows.gather(ids[:, :, None])[:, 0]))

    # Steps.

    def initial_state(self, source: Any, *, lengths: Any = None) -> Seq2SeqState:
        """The state before the first symbol: the source is read, and nothing said.

        Parameters
        ----------
        source : array of shape (B, S), (S,) for one sequence, or list of sequences
            Ids in 0..S-1; no source may be empty.
        lengths : array of shape (B,), optional
            The real symbols of each row.

        Returns
        -------
        Seq2SeqState
            For `step`, whose first symbol is `begin`.
        """
        return adopt_pair(*self._begun(self._source("source", source, "lengths", lengths)))

    def _begun(self, source: TokenRows) -> tuple[Array | None, ...]:
        """The arrays of the state before the first symbol."""
        read, rows = self._read(source), source.rows
        h, c = read.state.h, getattr(read.state, "c", None)
        if self._attention is None:
            return h, c, None, None, None
        projected = inside.project_keys(self._attention, read.keys)
        # Rows without padding are not copied, and an output of the encoder is nobody else's.
        return h, c, rows.scatter(read.keys), rows.scatter(projected), np.diff(rows.starts)

    def step(self, y_t: Any, state: Any) -> tuple[Array, Seq2SeqState]:
        """The logits of what follows one symbol of each row.

        Parameters
        ----------
        y_t : array of shape (B,)
            Ids in 0..V-1, or V, the boundary, with which every target begins.
        state : Seq2SeqState
            What `initial_state` or the step before returned.

        Returns
        -------
        logits : ndarray of shape (B, V + 1)
        state : Seq2SeqState
            To be given to the next step.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        array = ids_array("y_t", y_t)
        if array.ndim != 1:
            raise ValueError(f"y_t should be of shape (B,), not {array.shape}")
        ids = checks.ids("y_t", array, self.target_vocab_size + 1)
        return self._said(ids, self._own_state(state, len(ids)))

    def _own_state(self, state: Any, batch: int) -> Seq2SeqState:
        """A state that was given, looked at, in the dtype of the model."""
        if not isinstance(state, Seq2SeqState):
            raise TypeError(f"state should be a Seq2SeqState, not {checks.describe(state)}")
        wanted: dict[str, tuple[int, ...]] = dict.fromkeys(self._states(), (batch, self.num_layers, self.hidden_size))
        if self._attention is not None:
            time = 0 if state.keys is None else state.keys.shape[1]
            wanted["keys"] = batch, time, self._attention.key_size
            wanted["projected"] = batch, time, self.hidden_size
            wanted["lengths"] = (batch,)
        found = named_arrays(state)
        for name in state._fields:
            if (name in found) != (name in wanted):
                should = f"an array of shape {wanted[name]}" if name in wanted else "None"
                was = f"an array of shape {found[name].shape}" if name in found else "None"
                raise ValueError(f"state.{name} should be {should} for this model, not {was}")
            if name in wanted and found[name].shape != wanted[name]:
                raise ValueError(f"state.{name} should be of shape {wanted[name]}, not {found[name].shape}")
        if state.dtype == self.dtype:
            return state
        given = {n: a if n == "lengths" else checks.real_array(f"state.{n}", a, self.dtype) for n, a in found.items()}
        return adopt_pair(*(given.get(name) for name in state._fields))

    def _said(self, ids: Array, state: Seq2SeqState) -> tuple[Array, Seq2SeqState]:
        """`step` with arguments that are checked."""
        of_source: Any = state.keys, state.projected, state.lengths
        before, x = adopt(state.h, state.c), self._target_embedding(ids)
        if self.attention == "additive":
            context = inside.attend_padded(self._attention, _top(before), *of_source)
            y, after = self._decoder_layer.step(np.concatenate([x, context], axis=1), before)
            h = np.concatenate([y, context], axis=1)
        else:
            h, after = self._decoder_layer.step(x, before)
            if self._attention is not None:
                context = inside.attend_padded(self._attention, h, *of_source)
                h = self._tanh(self._combine(np.concatenate([context, h], axis=1)))
        return self._output(h), adopt_pair(after.h, getattr(after, "c", None), *of_source)

    def _decoder(self, source: TokenRows, copies: int) -> tuple[Array, Decoder]:
        begun = self._begun(source)
        decoder: Any
        compiled = self._backend.recurrent_decoder
        if compiled is None:
            decoder = StateDecoder(self, adopt_pair(*begun))
        else:
            weights = self._for_decoders.get(lambda: self._decoder_weights(compiled))
            n_threads = threads.get_num_threads()
            decoder = compiled.Decoder(weights, *begun[:2], copies, n_threads, *begun[2:])
        begin = np.empty(source.rows.batch, np.int64)
        begin.fill(self.begin)
        return decoder.step(begin), decoder

    def _decoder_weights(self, compiled: RecurrentDecoder) -> Any:
        """The weights as a compiled decoder wants them."""
        embedding = inside.arrays(self._target_embedding)["weight"]
        if self.attention == "additive":
            parts, output = inside.children(self._attention), inside.arrays(self._output)
            inputs, cells = inside.split_cells(self._decoder_layer, self.embedding_dim)
            return compiled.Weights(
                embedding,
                inputs,
                inside.input_table(self._decoder_layer, inputs, embedding),
                cells,
                compiled.pack_pair(output["weight"], output["bias"], self.hidden_size),
                attention=self.attention,
                query=inside.packed(parts["query"]),
                score=parts["score"].parameters["weight"][0],
            )
        more: dict[str, Any] = {}
        if self.attention == "multiplicative":
            more["combine"] = compiled.pack_pair(inside.arrays(self._combine)["weight"], None, -self.hidden_size)
        cells, tables = [cell for (cell,) in inside.cells(self._decoder_layer)], self._target_reader.tables()
        output = inside.packed(self._output)
        return compiled.Weights(
            embedding, cells[0], tables and tables[0], cells, output, attention=self.attention, **more
        )


def _state(arrays: list[Array]) -> State:
    """A state of the arrays h, and c where there is one."""
    for array in arrays:
        array.flags.writeable = False
    return adopt(arrays[0], arrays[1] if len(arrays) > 1 else None)


def _top(state: State) -> Array:
    """The output of the last layer, (B, H)."""
    return np.ascontiguousarray(state.h[:, -1])


def _added(dstate: State, dtop: Array) -> State:
    """The gradient of a state, and one more of the output of its last layer."""
    arrays = [np.array(array) for array in dstate]
    arrays[0][:, -1] += dtop
    return _state(arrays)


def _places(pairs: Pairs) -> tuple[Array, Array, Array]:
    """Of each pair the first of its keys among all, how many those are, and how many symbols the decoder is given."""
    starts = pairs.source.rows.starts
    return starts[:-1], np.diff(starts), np.diff(pairs.begun.rows.starts)


def _running(running: Array) -> Array | None:
    """Lengths for one step that some rows take."""
    return None if running.all() else running.astype(np.int64)
