"""Recurrent models from one sequence of symbols to another: a layer that reads, and one that writes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastseq import checks, layers, threads
from fastseq.backend import RecurrentDecoder
from fastseq.checks import Array
from fastseq.layers.additive_attention import AllSteps
from fastseq.layers.attention import Frame
from fastseq.layers.base import Tape, child_seed, mask_seed, seeds_of
from fastseq.models.base import ParameterCache
from fastseq.models.decoding import Decoder, StateDecoder
from fastseq.models.recurrent_parts import CELLS, Reader, recurrent_layer
from fastseq.models.sequence_pairs import Pairs, SequencePairModel
from fastseq.models.symbols import TokenRows, ids_array
from fastseq.state import Seq2SeqState, State, adopt, adopt_pair

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

    projected: Array
    key: Tape
    keys: Array
    score: Array
    firsts: Array
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

    Parameters
    ----------
    source_vocab_size, target_vocab_size : int
        S and V.
    embedding_dim, hidden_size : int
        Of the vector of a symbol, and of the state of encoder and decoder.
    num_layers : int
        Recurrent layers of either, stacked.
    cell : {"gru", "lstm", "rnn"}
        Which recurrent layer.
    bidirectional : bool
        Whether the encoder reads the source from both ends.
    attention : {"additive", "multiplicative"}, optional
        What the decoder sees of the source beside its initial state.
    dropout : float in [0, 1)
        Share that training drops of the vectors of symbols, of what passes between layers, and of what the logits are
        made from.
    dtype : {"float32", "float64"}
        Of parameters and logits.
    seed : int, optional
        Fixes the initial parameters.

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

    # The set of operations of what has no layer of its own.

    embedding_dim: int
    hidden_size: int
    num_layers: int
    cell: str
    bidirectional: bool
    attention: str | None
    dropout: float
    seed: int | None

    def __init__(
        self,
        source_vocab_size: int,
        target_vocab_size: int,
        embedding_dim: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        cell: str = "gru",
        bidirectional: bool = True,
        attention: str | None = None,
        dropout: float = 0.0,
        dtype: Any = "float32",
        seed: int | None = None,
    ) -> None:
        self.source_vocab_size = checks.size("source_vocab_size", source_vocab_size, 1)
        self.target_vocab_size = checks.size("target_vocab_size", target_vocab_size, 1)
        self.embedding_dim = checks.size("embedding_dim", embedding_dim, 1)
        self.hidden_size = checks.size("hidden_size", hidden_size, 1)
        self.num_layers = checks.size("num_layers", num_layers, 1)
        self.cell = checks.choice("cell", cell, CELLS)
        self.bidirectional = checks.flag("bidirectional", bidirectional)
        self.attention = None if attention is None else checks.choice("attention", attention, ATTENTIONS)
        self.dropout = checks.fraction("dropout", dropout)
        self.dtype = checks.real_dtype("dtype", dtype, self._backend.dtypes)
        self.seed = checks.seed("seed", seed)
        config = {
            "source_vocab_size": self.source_vocab_size,
            "target_vocab_size": self.target_vocab_size,
            "embedding_dim": self.embedding_dim,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "cell": self.cell,
            "bidirectional": self.bidirectional,
            "attention": self.attention,
            "dropout": self.dropout,
            "dtype": self.dtype.name,
            "seed": self.seed,
        }
        of = self._backend.of
        of_type: dict[str, Any] = {"dtype": self.dtype}
        hidden, keys = self.hidden_size, self.hidden_size * (2 if self.bidirectional else 1)
        seeds = seeds_of(self.seed, 7)
        more = {"dropout": self.dropout, **of_type}
        context = keys if self.attention == "additive" else 0
        children: dict[str, Any] = {
            "source_embedding": of(layers.Embedding)(
                self.source_vocab_size, self.embedding_dim, seed=seeds[0], **of_type
            ),
            "target_embedding": of(layers.Embedding)(
                self.target_vocab_size + 1, self.embedding_dim, seed=seeds[1], **of_type
            ),
            "encoder": recurrent_layer(
                self._backend,
                self.cell,
                self.embedding_dim,
                hidden,
                self.num_layers,
                bidirectional=self.bidirectional,
                seed=seeds[2],
                **more,
            ),
        }
        self._bridges: dict[str, Any] = {}
        if self.bidirectional:
            names = [f"bridge_{array}_l{layer}" for array in self._states() for layer in range(self.num_layers)]
            of_bridges = [None] * len(names) if seeds[3] is None else seeds_of(seeds[3], len(names))
            for name, own in zip(names, of_bridges, strict=True):
                self._bridges[name] = of(layers.Linear)(keys, hidden, seed=own, **of_type)
            children |= self._bridges
        children["decoder"] = recurrent_layer(
            self._backend, self.cell, self.embedding_dim + context, hidden, self.num_layers, seed=seeds[4], **more
        )
        if self.attention == "multiplicative":
            children["attention"] = of(layers.MultiplicativeAttention)(hidden, keys, seed=seeds[5], **of_type)
            own = None if seeds[5] is None else child_seed(seeds[5], 0)
            children["combine"] = of(layers.Linear)(keys + hidden, hidden, False, seed=own, **of_type)
        elif self.attention == "additive":
            children["attention"] = of(layers.AdditiveAttention)(hidden, keys, hidden, seed=seeds[5], **of_type)
        children["output"] = of(layers.Linear)(hidden + context, self.target_vocab_size + 1, seed=seeds[6], **of_type)
        self._start(config, **children)
        self._source_embedding: Any = children["source_embedding"]
        self._target_embedding: Any = children["target_embedding"]
        self._encoder_layer: Any = children["encoder"]
        self._decoder_layer: Any = children["decoder"]
        attention_layer: Any = children.get("attention")
        self._attention: Any = attention_layer
        self._combine: Any = children.get("combine")
        self._output: Any = children["output"]
        self._drop = of(layers.Dropout)(self.dropout, **of_type)
        walked = [self._target_embedding, self._decoder_layer, self._output, self._combine]
        if self.attention == "additive":
            walked += [attention_layer._query, attention_layer._score]
        self._source_reader = Reader(self._source_embedding, self._encoder_layer)
        # Not with additive attention, with which the decoder is given more than a symbol.
        self._target_reader = Reader(self._target_embedding, self._decoder_layer)
        self._for_decoders = ParameterCache(*(layer for layer in walked if layer is not None))

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
            projected = self._attention._projected(read.keys)
            frame = Frame(rows, pairs.source.rows, False)
            context, weights = self._attention._run(h, read.keys, projected, frame, want_weights)
            h = self._tanh(self._combine(np.concatenate([context, h], axis=1)))
        return self._output(h), weights

    def _walk(self, pairs: Pairs, read: _Read, x: Array, want_weights: bool) -> tuple[Array, Any]:
        """Steps of additive attention and the decoder one after another: [s; c] (B, T, H + K), and the weights."""
        rows, (firsts, counts, lengths) = pairs.begun.rows, _places(pairs)
        projected, state = self._attention._projected(read.keys), read.state
        width = read.keys.shape[1]
        both = np.zeros((rows.batch, rows.time, self.hidden_size + width), self.dtype)
        maps = np.zeros((rows.batch, rows.time, pairs.source.rows.time), self.dtype) if want_weights else None
        for t in range(rows.longest):
            running = lengths > t
            context, weights = self._attention._at(
                _top(state), projected, read.keys, firsts, np.where(running, counts, 0)
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
        projected, of_key = self._attention._key.forward(read.keys)
        state, steps = read.state, []
        both = np.zeros((rows.batch, rows.time, self.hidden_size + read.keys.shape[1]), self.dtype)
        for t in range(rows.longest):
            running = lengths > t
            context, of_attention = self._attention._at_forward(
                _top(state), projected, read.keys, firsts, np.where(running, counts, 0)
            )
            entering = np.concatenate([x[:, t], context], axis=1)[:, None]
            y, state, of_step = self._decoder_layer.forward(
                entering, state, lengths=_running(running), seed=child_seed(seed, t)
            )
            both[:, t, : self.hidden_size] = y[:, 0]
            both[:, t, self.hidden_size :] = context
            steps.append((of_attention, of_step))
        score = self._attention._score._arrays["weight"][0]
        return both, _KeptWalk(projected, of_key, read.keys, score, firsts, steps)

    def _walk_backward(self, dboth: Array, kept: _KeptWalk, targets: dict[str, Any]) -> tuple[Array, Array, State]:
        """`_walk_forward`, from its end: the gradients of x, of the keys and of the initial state."""
        (batch, time, _), width = dboth.shape, self.embedding_dim
        of_attention = self._attention._child_targets(self._attention._targets(targets["attention"]))
        of_all = AllSteps(
            kept.projected, kept.keys, kept.score, np.zeros_like(kept.projected), np.zeros_like(kept.keys)
        )
        dx = np.zeros((batch, time, width), self.dtype)
        dstate: State | None = None
        for t in reversed(range(len(kept.steps))):
            of_alignment, of_step = kept.steps[t]
            dentering, dstate = self._decoder_layer.backward(
                dboth[:, t : t + 1, : self.hidden_size], of_step, dstate=dstate, grads=targets["decoder"]
            )
            dx[:, t] = dentering[:, 0, :width]
            dcontext = dentering[:, 0, width:] + dboth[:, t, self.hidden_size :]
            dquery = self._attention._at_backward(dcontext, of_alignment, of_all, kept.firsts, of_attention)
            dstate = _added(dstate, dquery)
        dkeys = of_all.dkeys + self._attention._key.backward(of_all.dprojected, kept.key, grads=of_attention["key"])
        return dx, dkeys, self._decoder_layer.initial_state(batch) if dstate is None else dstate

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
            frame = Frame(rows, pairs.source.rows, False)
            context, of_attention = self._attention._run_forward(h, read.keys, frame)
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
            dquery, dkeys = self._attention._run_backward(
                np.ascontiguousarray(dboth[:, :width]), kept.attention, self._attention._targets(targets["attention"])
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
        projected = self._attention._projected(read.keys)
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
        found = state._named()
        for name in state._fields:
            if (name in found) != (name in wanted):
                should = f"an array of shape {wanted[name]}" if name in wanted else "None"
                was = f"an array of shape {found[name].shape}" if name in found else "None"
                raise ValueError(f"state.{name} should be {should} for this model, not {was}")
            if name in wanted and found[name].shape != wanted[name]:
                raise ValueError(f"state.{name} should be of shape {wanted[name]}, not {found[name].shape}")
        if state.dtype == self.dtype:
            return state
        arrays = [
            array if array is None or name == "lengths" else checks.real_array(f"state.{name}", array, self.dtype)
            for name, array in zip(state._fields, state._all(), strict=True)
        ]
        return adopt_pair(*arrays)

    def _said(self, ids: Array, state: Seq2SeqState) -> tuple[Array, Seq2SeqState]:
        """`step` with arguments that are checked."""
        keys, projected, lengths = state.keys, state.projected, state.lengths
        before, x = adopt(state.h, state.c), self._target_embedding(ids)
        if self.attention == "additive":
            context, _ = self._attention._step(_top(before), keys, projected, lengths, False)
            y, after = self._decoder_layer.step(np.concatenate([x, context], axis=1), before)
            h = np.concatenate([y, context], axis=1)
        else:
            h, after = self._decoder_layer.step(x, before)
            if self._attention is not None:
                context, _ = self._attention._step(h, keys, projected, lengths, False)
                h = self._tanh(self._combine(np.concatenate([context, h], axis=1)))
        return self._output(h), adopt_pair(after.h, getattr(after, "c", None), keys, projected, lengths)

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
        cells = [cell for (cell,) in self._decoder_layer._cells()]
        inputs, output = cells[0], self._output._weights()
        more: dict[str, Any] = {}
        if self.attention == "multiplicative":
            more["combine"] = compiled.pack_pair(self._combine._arrays["weight"], None, -self.hidden_size)
        elif self.attention == "additive":
            pack = self._backend.recurrent.pack
            ((weight_ih, weight_hh, *biases),) = self._decoder_layer._by_direction(self._decoder_layer._arrays, 0)
            if isinstance(weight_ih, np.ndarray):  # narrow weights take the vector of a symbol and a context as one row
                of_symbol, of_context = _parts(weight_ih, self.embedding_dim)
                inputs = pack(self._decoder_layer._cell, of_symbol, weight_hh[:, :0], *biases)
                cells[0] = pack(self._decoder_layer._cell, of_context, weight_hh, *biases)
            arrays = self._output._arrays
            output = compiled.pack_pair(arrays["weight"], arrays["bias"], self.hidden_size)
            more["query"] = self._attention._query._weights()
            more["score"] = self._attention._score._arrays["weight"][0]
        embedding = self._target_embedding._arrays["weight"]
        if self.attention == "additive":
            table = self._decoder_layer._backend.recurrent.input_table(inputs, embedding, threads.get_num_threads())
        else:
            tables = self._target_reader.tables()
            table = tables and tables[0]
        return compiled.Weights(embedding, inputs, table, cells, output, attention=self.attention, **more)


def _parts(weight: Array, columns: int) -> tuple[Array, Array]:
    """The columns of a matrix before one, and those from it on."""
    return np.ascontiguousarray(weight[:, :columns]), np.ascontiguousarray(weight[:, columns:])


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
