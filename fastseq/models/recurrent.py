"""Latent autoregressive models: the past in the state of a recurrent layer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastseq import checks, layers, losses, threads, training
from fastseq.backend import Backend, RecurrentDecoder
from fastseq.checks import Array
from fastseq.layers.base import Tape, child_seed, mask_seed, seeds_of
from fastseq.layers.recurrent import advice_on_dropout
from fastseq.models.base import (
    BATCH_SIZE,
    ScaledModel,
    Series,
    SymbolModel,
    Symbols,
    batched_already,
    gaussian,
    held_out,
    ids_array,
    is_data,
    last_part,
    log_softmax_at,
    no_targets,
    padded_pair,
    real_steps,
    series_of,
    symbols,
    text_split,
    whole_sequences,
)
from fastseq.models.decoding import Decoder, StateDecoder
from fastseq.training import Batch, History

CELLS = ("rnn", "lstm", "gru")
_ROWS, _CHUNK = 32, 512  # sequences, and steps of them, that `log_prob` looks at together
_CHUNKS = 16  # of each stream in an epoch, at least, before there is another stream beside it


def recurrent_layer(backend: Backend, cell: str, *sizes: int, **settings: Any) -> Any:
    """A recurrent layer by the name of its cell."""
    classes: dict[str, Any] = {"rnn": layers.RNN, "lstm": layers.LSTM, "gru": layers.GRU}
    return backend.of(classes[cell])(*sizes, **settings)


class OfParameters:
    """What was made of the parameters of some layers, as long as they stay what they are."""

    def __init__(self, *layers: Any) -> None:
        self._layers = layers
        self._kept: tuple[list[Mapping[str, Array]], Any] | None = None

    def get(self, make: Callable[[], Any]) -> Any:
        """What there is, or what `make` makes."""
        arrays, kept = [layer._arrays for layer in self._layers], self._kept
        if kept is None or any(map(operator.is_not, kept[0], arrays)):
            kept = self._kept = arrays, make()
        return kept[1]


class Reader:
    """An embedding and the recurrent layer over it, in inference.

    What the first layer makes of a symbol, before it looks at its state, is looked up: a table has it of all symbols,
    unless that would be large.

    Parameters
    ----------
    embedding, layer
        The layers.
    """

    def __init__(self, embedding: Any, layer: Any) -> None:
        self._embedding, self._layer = embedding, layer
        self._tables = OfParameters(embedding, layer)

    def tables(self) -> tuple[Array, ...] | None:
        """One for each direction; None where there are none."""
        tables: tuple[Array, ...] | None = self._tables.get(self._make)
        return tables

    def _make(self) -> tuple[Array, ...] | None:
        operations, n_threads = self._layer._backend.recurrent, threads.get_num_threads()
        weight = self._embedding._arrays["weight"]
        tables = [operations.input_table(cell, weight, n_threads) for cell in self._layer._cells()[0]]
        return None if any(table is None for table in tables) else tuple(tables)

    def __call__(self, ids: Array, state: Any = None, lengths: Array | None = None) -> tuple[Array, Any]:
        """Outputs (B, T, D * H) and state after symbols (B, T), all as the layer has them; ids are checked."""
        tables = self.tables()
        if tables is None:
            outputs: tuple[Array, Any] = self._layer(self._embedding(ids), state, lengths=lengths)
            return outputs
        read: tuple[Array, Any] = self._layer._read(np.ascontiguousarray(ids), tables, state, lengths)
        return read


class _Kept(NamedTuple):
    """The tapes of the layers of a language model."""

    embedding: Tape
    entering: Tape | None  # of dropout
    recurrent: Tape
    leaving: Tape | None
    output: Tape


class RecurrentLM(SymbolModel):
    """The latent autoregressive model of symbols: P(x_t | x_<t) = softmax(W h_t + b), h_t = f(x_{t-1}, h_{t-1}).

    Every sequence starts with a begin symbol of its own, which stands before x_1 and is never predicted.

    Parameters
    ----------
    vocab_size : int
        V; symbols are 0..V-1.
    embedding_dim, hidden_size : int
        Of the vector of a symbol, and of the state.
    num_layers : int
        Recurrent layers, stacked.
    cell : {"lstm", "gru", "rnn"}
        Which recurrent layer.
    dropout : float in [0, 1)
        Share of what enters and leaves each recurrent layer that training drops [1]_.
    dtype : {"float32", "float64"}
        Of parameters and logits.
    seed : int, optional
        Fixes the initial parameters.

    References
    ----------
    .. [1] W. Zaremba, I. Sutskever and O. Vinyals, "Recurrent neural network regularization", arXiv:1409.2329, 2014.
    """

    vocab_size: int
    embedding_dim: int
    hidden_size: int
    num_layers: int
    cell: str
    dropout: float
    seed: int | None

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        cell: str = "lstm",
        dropout: float = 0.0,
        dtype: Any = "float32",
        seed: int | None = None,
    ) -> None:
        self.vocab_size = checks.size("vocab_size", vocab_size, 1)
        self.embedding_dim = checks.size("embedding_dim", embedding_dim, 1)
        self.hidden_size = checks.size("hidden_size", hidden_size, 1)
        self.num_layers = checks.size("num_layers", num_layers, 1)
        self.cell = checks.choice("cell", cell, CELLS)
        self.dropout = checks.fraction("dropout", dropout)
        self.dtype = checks.real_dtype("dtype", dtype, self._backend.dtypes)
        self.seed = checks.seed("seed", seed)
        first, second, third = seeds_of(self.seed, 3)
        of = self._backend.of
        of_type: dict[str, Any] = {"dtype": self.dtype}
        config = {
            "vocab_size": self.vocab_size,
            "embedding_dim": self.embedding_dim,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "cell": self.cell,
            "dropout": self.dropout,
            "dtype": self.dtype.name,
            "seed": self.seed,
        }
        sizes = self.embedding_dim, self.hidden_size, self.num_layers
        self._start(
            config,
            embedding=of(layers.Embedding)(self.vocab_size + 1, self.embedding_dim, seed=first, **of_type),
            recurrent=recurrent_layer(self._backend, self.cell, *sizes, dropout=self.dropout, seed=second, **of_type),
            output=of(layers.Linear)(self.hidden_size, self.vocab_size, seed=third, **of_type),
        )
        self._embedding: Any = self._children["embedding"]
        self._recurrent: Any = self._children["recurrent"]
        self._output: Any = self._children["output"]
        self._drop = of(layers.Dropout)(self.dropout, **of_type)
        self._reader = Reader(self._embedding, self._recurrent)
        self._for_decoders = OfParameters(self._embedding, self._recurrent, self._output)

    @property
    def begin(self) -> int:
        """The id of the begin symbol: V."""
        return self.vocab_size

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
        return self._back(dlogits, kept, dstate, truncate, grads)

    def _back(self, dlogits: Array, kept: _Kept, dstate: Any, truncate: int | None, grads: Any) -> Any:
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

    def _batch(self, batch: Batch, state: Any) -> tuple[Array, Array, Array | None]:
        """Inputs, targets and lengths of a batch, with the begin symbol where there is one."""
        given = checks.as_array("inputs", batch.inputs)
        if given.ndim != 2:
            raise ValueError(f"inputs should be ids of shape (B, T), not {given.shape}")
        counts = None if batch.lengths is None else checks.lengths(batch.lengths, *given.shape)
        real = None if counts is None else real_steps(counts, given.shape[1])
        inputs = np.maximum(checks.ids("inputs", given, self.vocab_size, real), 0)
        if batch.targets is None:
            return self._after_begin(inputs[:, :-1])[:, : given.shape[1]], inputs, counts
        targets = np.maximum(checks.ids("targets", batch.targets, self.vocab_size, real), 0)
        if targets.shape != inputs.shape:
            raise ValueError(f"targets should be of shape {inputs.shape}, as inputs, not {targets.shape}")
        if state is None and batch.fresh is not None and np.all(batch.fresh):
            targets = np.concatenate([inputs[:, :1], targets], axis=1)
            return self._after_begin(inputs), targets, None if counts is None else counts + 1
        return inputs, targets, counts

    def training_forward(self, batch: Batch, state: Any = None, seed: int | None = None) -> tuple[float, int, Any, Any]:
        """The mean cross-entropy of a batch, for `fastseq.training.fit`.

        Parameters
        ----------
        batch : Batch
            Of `PaddedBatches` without targets: whole sequences, each after a begin symbol. Of `Streams`: a chunk;
            the first of an epoch comes after a begin symbol.
        state : state, optional
            Where the chunk before ended.
        seed : int, optional
            Fixes what dropout drops.

        Returns
        -------
        loss : float
        count : int
            Over how many symbols.
        tape : object
            For `training_backward`.
        state : State or LSTMState
        """
        inputs, targets, counts = self._batch(batch, state)
        logits, state, kept = self._through(inputs, state, counts, seed)
        loss, gradient = losses.softmax_cross_entropy(logits, targets, lengths=counts, _backend=self._backend)
        return loss, targets.size if counts is None else int(counts.sum()), (gradient, kept), state

    def training_backward(self, tape: Any, grads: Any = None, *, truncate: int | None = None) -> None:
        """Add the gradients of the loss that `training_forward` returned; `truncate` as of `backward`."""
        gradient, kept = tape
        self._back(gradient, kept, None, truncate, grads)

    def evaluation_forward(self, batch: Batch, state: Any = None) -> tuple[float, int, Any]:
        """Loss, count and state as of `training_forward`, without dropout; the state is None of long sequences."""
        inputs, targets, counts = self._batch(batch, state)
        if batch.targets is None and targets.shape[1] > _CHUNK:  # too long to have all logits at once
            lengths = np.full(len(targets), targets.shape[1]) if counts is None else counts
            given = Symbols(targets[real_steps(lengths, targets.shape[1])], lengths)
            return -float(self._log_probs(given).sum()) / max(len(given.ids), 1), len(given.ids), None
        y, state = self._reader(inputs, state, counts)
        loss, _ = losses.softmax_cross_entropy(self._output(y), targets, lengths=counts, _backend=self._backend)
        return loss, targets.size if counts is None else int(counts.sum()), state

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
        no_targets("data", data, lengths)
        if is_data(data):
            batched_already(lengths=lengths, batch_size=batch_size, chunk=chunk, validation_split=validation_split)
        else:
            size = None if batch_size is None else checks.size("batch_size", batch_size, 1)
            given, validation = text_split(symbols("data", data, lengths, self.vocab_size), validation_split, seed)
            if validation is not None:
                if settings.get("validation") is not None:
                    raise ValueError("validation_split should not be given with validation")
                settings["validation"] = whole_sequences("validation", validation, size)
            data = self._data(given, size, chunk, seed)
        raw = settings.get("validation")
        if raw is not None and not is_data(raw):
            held = symbols("validation", *padded_pair(raw), self.vocab_size)
            settings["validation"] = whole_sequences("validation", held, batch_size)
        return self._train(data, {"seed": seed, **settings})

    def _data(self, given: Symbols, batch_size: int | None, chunk: int | None, seed: int | None) -> Any:
        """Data of the trainer: streams of one text, or whole sequences."""
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
        cells = [cell for (cell,) in self._recurrent._cells()]
        tables = self._reader.tables()
        return compiled.Weights(
            self._embedding._arrays["weight"], cells[0], tables and tables[0], cells, self._output._weights()
        )


def rollout(recurrent: Any, output: Any, x: Array, state: Any, steps: int) -> Array:
    """Go on from `x` (B, I), each output taken for the next input: (B, steps, I)."""
    weight, bias = output.parameters["weight"], output.parameters["bias"]
    h, c = state.h, getattr(state, "c", None)
    y: Array
    y, _, _ = recurrent._backend.recurrent.rollout(
        recurrent._cells(), weight, bias, np.ascontiguousarray(x), h, c, steps, threads.get_num_threads()
    )
    return y


class RecurrentForecaster(ScaledModel):
    """The latent autoregressive model of series: x_{t+1} = W h_t + b + e_t, h_t = f(x_t, h_{t-1}), e_t Gaussian.

    Inputs and outputs of the layers are standardised by mean and deviation of what was fitted; what comes in and goes
    out of the model is not. That is done in float64, and what goes out has the wider dtype of the model's and of what
    came in.

    Parameters
    ----------
    input_size : int
        I, values a step. Where it is 1, the axis of values may be left out.
    hidden_size, num_layers : int
        Of the recurrent layer.
    cell : {"lstm", "gru", "rnn"}
        Which recurrent layer.
    dropout : float in [0, 1)
        Share of the outputs between layers that training drops; of two layers or more.
    dtype : {"float32", "float64"}
        Of parameters and states.
    seed : int, optional
        Fixes the initial parameters.

    Attributes
    ----------
    sigma2 : ndarray of shape (I,)
        The variance of e, the mean of the squared residuals of what was fitted.
    """

    _measured = ("mean", "deviation", "sigma2")

    input_size: int
    hidden_size: int
    num_layers: int
    cell: str
    dropout: float
    seed: int | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        cell: str = "lstm",
        dropout: float = 0.0,
        dtype: Any = "float32",
        seed: int | None = None,
    ) -> None:
        self.input_size = checks.size("input_size", input_size, 1)
        self.hidden_size = checks.size("hidden_size", hidden_size, 1)
        self.num_layers = checks.size("num_layers", num_layers, 1)
        self.cell = checks.choice("cell", cell, CELLS)
        self.dropout = checks.fraction("dropout", dropout)
        self.dtype = checks.real_dtype("dtype", dtype, self._backend.dtypes)
        self.seed = checks.seed("seed", seed)
        first, second = seeds_of(self.seed, 2)
        config = {
            "input_size": self.input_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "cell": self.cell,
            "dropout": self.dropout,
            "dtype": self.dtype.name,
            "seed": self.seed,
        }
        sizes = self.input_size, self.hidden_size, self.num_layers
        of = self._backend.of
        of_type: dict[str, Any] = {"dtype": self.dtype}
        self._start(
            config,
            recurrent=recurrent_layer(self._backend, self.cell, *sizes, dropout=self.dropout, seed=first, **of_type),
            output=of(layers.Linear)(self.hidden_size, self.input_size, seed=second, **of_type),
        )
        self._recurrent: Any = self._children["recurrent"]
        self._output: Any = self._children["output"]

    def _advice(self) -> str | None:
        return advice_on_dropout(self.dropout, self.num_layers)

    @property
    def sigma2(self) -> Array:  # noqa: D102  see the class
        return self._needs_fit()["sigma2"]

    def _check_fitted(self, given: Mapping[str, Any]) -> dict[str, Array]:
        fitted = {name: np.array(checks.real_array(name, given[name], np.dtype(np.float64))) for name in given}
        for name, array in fitted.items():
            if array.shape != (self.input_size,):
                raise ValueError(f"{name} should be of shape ({self.input_size},), not {array.shape}")
        return fitted

    def _given(self, name: str, series: Any, lengths: Any) -> Series:
        return series_of(name, series, lengths, self.dtype, self.input_size)

    def __call__(self, x: Any, state: Any = None, *, lengths: Any = None) -> Array:
        """The value expected next, at every step.

        Parameters
        ----------
        x : array of shape (B, T, I), or (T, I) for one series, or list of arrays
            Real floating numbers. If I is 1, the last axis may be left out.
        state : state, optional
            Where each row goes on; zeros by default.
        lengths : array of shape (B,), optional
            The real steps of each row.

        Returns
        -------
        ndarray of the shape of x
            At step t the expectation of x_{t+1}; 0 past the end of a row.
        """
        self._needs_units()
        given = self._given("x", x, lengths)
        return given.like(self._predict(given, state)[0])

    def _predict(self, given: Series, state: Any = None) -> tuple[Array, Any]:
        """What a call returns, (B, T, I), in float64, and where each row ends."""
        y, state = self._recurrent(self._standard(given.values), state, lengths=given.lengths)
        predicted = self._raw(self._output(y))
        predicted[~given.real()] = 0
        return predicted, state

    def step(self, x_t: Any, state: Any = None) -> tuple[Array, Any]:
        """The value expected after x_t (B, I), of the same shape, and the state for the next step."""
        self._needs_units()
        if np.shape(checks.as_array("x_t", x_t))[1:] != (self.input_size,):
            raise ValueError(f"x_t should be of shape (B, {self.input_size}), not {np.shape(x_t)}")
        # Rows of one step each; of one value a step, the axis of values stands for time.
        given = series_of("x_t", x_t, None, self.dtype)
        y, state = self._recurrent.step(self._standard(given.values), state)
        return given.like(self._raw(self._output(y))), state

    def forward(
        self, x: Any, state: Any = None, *, lengths: Any = None, seed: int | None = None
    ) -> tuple[Array, Any, Tape]:
        """Call for training: with dropout, and what `backward` needs; also the state each row ends in.

        What is predicted past the end of a row is not 0 here, but means nothing.
        """
        given = self._given("x", x, lengths)
        z, state, tapes = self._through(given.values, state, given.lengths, seed)
        y = given.like(self._raw(z))
        return y, state, Tape(self, (tapes, given, y.shape))

    def _through(
        self, values: Array, state: Any, lengths: Array | None, seed: int | None
    ) -> tuple[Array, Any, tuple[Tape, Tape]]:
        """All layers, forward; the outputs as they come from the last."""
        y, state, recurrent = self._recurrent.forward(self._standard(values), state, lengths=lengths, seed=seed)
        z, output = self._output.forward(y)
        return z, state, (recurrent, output)

    def backward(
        self, dy: Any, tape: Tape, *, dstate: Any = None, truncate: int | None = None, grads: Any = None
    ) -> tuple[Array, Any]:
        """Add the gradients of all parameters; return those of x and of the state that was given."""
        tapes, given, shape = self._kept(tape)
        dy = checks.like("dy", dy, given.values.dtype, shape).reshape(given.values.shape)
        _, deviation = self._units()
        with np.errstate(all="ignore"):
            dz = (dy * deviation).astype(self.dtype)
        dx, dstate = self._back(dz, tapes, dstate, truncate, grads)
        return given.like(dx / deviation), dstate

    def _back(
        self, dz: Array, tapes: tuple[Tape, Tape], dstate: Any, truncate: int | None, grads: Any
    ) -> tuple[Array, Any]:
        """All layers, in the reverse order of `_through`."""
        targets = self._child_targets(grads)
        recurrent, output = tapes
        dy = self._output.backward(dz, output, grads=targets["output"])
        result: tuple[Array, Any] = self._recurrent.backward(
            dy, recurrent, dstate=dstate, truncate=truncate, grads=targets["recurrent"]
        )
        return result

    def training_forward(self, batch: Batch, state: Any = None, seed: int | None = None) -> tuple[float, int, Any, Any]:
        """The mean squared error of a batch in units of the deviation, for `fastseq.training.fit`.

        A batch without targets holds whole series, each step of which is the target of the step before.
        """
        inputs, targets, lengths = self._batch(batch)
        z, state, tapes = self._through(inputs, state, lengths, seed)
        loss, gradient = losses.mean_squared_error(z, self._standard(targets), lengths=lengths, _backend=self._backend)
        return loss, int(lengths.sum()), (gradient, tapes), state

    def _batch(self, batch: Batch) -> tuple[Array, Array, Array]:
        """Inputs, targets and lengths of a batch."""
        given = self._given("inputs", batch.inputs, batch.lengths)
        if batch.targets is None:
            return given.values[:, :-1], given.values[:, 1:], np.maximum(given.lengths - 1, 0)
        targets = self._given("targets", batch.targets, batch.lengths).values
        if targets.shape != given.values.shape:
            raise ValueError(f"targets should be of shape {given.values.shape}, as inputs, not {targets.shape}")
        return given.values, targets, given.lengths

    def evaluation_forward(self, batch: Batch, state: Any = None) -> tuple[float, int, Any]:
        """Loss, count and state as of `training_forward`, without dropout."""
        inputs, targets, lengths = self._batch(batch)
        y, state = self._recurrent(self._standard(inputs), state, lengths=lengths)
        loss, _ = losses.mean_squared_error(
            self._output(y), self._standard(targets), lengths=lengths, _backend=self._backend
        )
        return loss, int(lengths.sum()), state

    def training_backward(self, tape: Any, grads: Any = None, *, truncate: int | None = None) -> None:
        """Add the gradients of the loss that `training_forward` returned; `truncate` as of the recurrent layers."""
        gradient, tapes = tape
        self._back(gradient, tapes, None, truncate, grads)

    @checks.short_traceback
    def fit(
        self,
        series: Any,
        lengths: Any = None,
        *,
        window: int | None = None,
        batch_size: int | None = None,
        seed: int | None = 0,
        validation_split: float | None = None,
        **settings: Any,
    ) -> History:
        """Train, and measure what is left: `sigma2`. Where this fails, the model is as it was.

        Parameters
        ----------
        series : array of shape (S, T, I), or (T, I) for one, or list of arrays
            Finite real numbers, of which `fastseq.training.Windows` are made. If I is 1, the last axis may be left
            out.
        lengths : array of shape (S,), optional
            The real steps of each series.
        window : int, optional
            Steps of a window, 64 by default; a shorter series is a window as it is.
        batch_size : int, optional
            Windows in a batch; 32 by default.
        seed : int, optional
            Fixes the order of the windows and what dropout drops.
        validation_split : float in (0, 1), optional
            The share of the series, drawn by the seed, that the model is validated on; of one series the last part.
        **settings
            As of `fastseq.training.fit`: ``epochs``, ``validation``, which may be raw, as `series`, or a tuple of a
            padded array and lengths, ... The optimiser is Adam with a learning rate of 0.01, unless another is given.
            A validation loss is the mean squared error of the predictions that a call makes, in units of the
            deviation.

        Returns
        -------
        History
        """
        no_targets("series", series, lengths)
        given = self._given("series", series, lengths)
        given.check_finite("series")
        settings["seed"] = seed
        size = BATCH_SIZE if batch_size is None else checks.size("batch_size", batch_size, 1)
        steps = 64 if window is None else checks.size("window", window, 1)
        validation: Series | None = None
        if validation_split is not None:
            if settings.get("validation") is not None:
                raise ValueError("validation_split should not be given with validation")
            given, validation = self._split(given, validation_split, seed)
        elif settings.get("validation") is not None and not is_data(settings["validation"]):
            raw, counts = padded_pair(settings["validation"])
            validation = self._given("validation", raw, counts)
            validation.check_finite("validation")
        if validation is not None:
            whole = self._predictable("validation", validation)
            inputs, targets = [row[:-1] for row in whole], [row[1:] for row in whole]
            settings["validation"] = training.PaddedBatches(inputs, targets, batch_size=size, shuffle=False)
        rows = self._predictable("series", given)
        steps = min(steps, max(map(len, rows)) - 1)  # a series that is shorter is a window as it is
        data = training.Windows(rows, steps=steps, batch_size=size, seed=seed)
        self._optimised(settings)
        return self._learn(given, "series", data, {}, settings)

    def _split(self, given: Series, share: Any, seed: int | None) -> tuple[Series, Series]:
        """What is learnt from, and what is validated on."""
        if len(given.values) > 1:
            learnt, out = held_out(len(given.values), share, seed)
            return given.some(learnt), given.some(out)
        length = int(given.lengths.sum())
        cut = last_part(length, share, 2)
        return given.steps(0, cut), given.steps(cut, length)

    @staticmethod
    def _predictable(name: str, given: Series) -> list[Array]:
        """The series one by one, all but those in which nothing comes after anything."""
        rows = [row for row in given.rows() if len(row) > 1]
        if not rows:
            raise ValueError(f"{name} should have at least 2 steps, not {given.lengths.max(initial=0)}")
        return rows

    def _variance(self, given: Series) -> Array:
        residuals, counts = self._residuals(given)
        squares = np.square(residuals[real_steps(counts, residuals.shape[1])], dtype=np.float64)
        return np.asarray(squares.mean(axis=0))

    def _residuals(self, given: Series) -> tuple[Array, Array]:
        """What was predicted less what came, (S, T - 1, I), and how many steps of each series that is."""
        predicted, _ = self._predict(given)
        return given.values[:, 1:] - predicted[:, :-1], np.maximum(given.lengths - 1, 0)

    def log_prob(self, series: Any, lengths: Any = None) -> Array:
        """The Gaussian log-density of each series given its first step; arguments as of a call.

        Returns
        -------
        ndarray of shape (S,)
            float64.
        """
        given = self._given("series", series, lengths)
        sigma2 = self.sigma2
        residuals, counts = self._residuals(given)
        parts = [gaussian(residuals[..., i], counts, sigma2[i : i + 1]) for i in range(self.input_size)]
        return np.asarray(sum(parts))

    def forecast(self, series: Any, horizon: int, *, lengths: Any = None) -> Array:
        """Go on from the end of each series, each prediction taken for a value.

        Parameters
        ----------
        series, lengths
            As of a call; at least one step each.
        horizon : int
            How many steps.

        Returns
        -------
        ndarray of shape (S, horizon, I), or in the form the series were given in
        """
        self._needs_units()
        given = self._given("series", series, lengths)
        horizon = checks.size("horizon", horizon)
        given.check_lengths("series", 1)
        if horizon == 0:
            return given.like(np.empty((len(given.values), 0, self.input_size)))
        y, state = self._recurrent(self._standard(given.values), lengths=given.lengths)
        x = self._output(y[np.arange(len(y)), given.lengths - 1])
        later = rollout(self._recurrent, self._output, x, state, horizon - 1)
        return given.like(self._raw(np.concatenate([x[:, None], later], axis=1)))
