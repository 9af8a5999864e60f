"""Whole models over Transformer layers: a language model, as GPT-2 is put together, and an encoder, as BERT is.

Both see the real tokens of a batch alone, as rows one after another, from the embedding to what is returned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fastseq import _additive_attention, checks, layers, losses, threads, training
from fastseq.checks import Array
from fastseq.layers.attention import Frame
from fastseq.layers.base import POOLING, SEQUENCE, Layer, Tape, child_seed, mask_seed, seeds_of
from fastseq.layers.rows import Rows, rows_of
from fastseq.layers.transformer import ACTIVATIONS, NORMS, Context
from fastseq.models.base import (
    BATCH_SIZE,
    Model,
    SymbolModel,
    Symbols,
    batched_already,
    held_out,
    ids_array,
    is_data,
    is_list_of_rows,
    log_softmax_at,
    no_targets,
    padded_pair,
    real_steps,
    sums,
    symbols,
    text_split,
    whole_sequences,
)
from fastseq.models.decoding import Decoder, StateDecoder
from fastseq.state import AttentionState
from fastseq.training import Batch, History

POSITIONS = ("learned", "sinusoidal", "rotary")
POOLINGS = ("mean", "cls", "max")
_DEVIATION = 0.02  # of initial weights, in both families
_TOKENS = 1 << 13  # that go through the layers together where there is no batch to keep together
_LOGITS = 1 << 22  # that are looked at together
_SMALLEST = 1e-12  # norms below it are taken for it, where vectors are made of length 1
_IGNORED = -1  # a target that does not count


class _Tokens(NamedTuple):
    """Sequences in the form they were given in."""

    ids: Array  # (N,) int64, of all real tokens one sequence after another
    rows: Rows
    unbatched: bool  # there was no batch

    def spread(self, values: Array, padding: Any = 0) -> Array:
        """Values (N, ...) of the tokens as (B, T, ...), or (T, ...)."""
        rows = self.rows
        array = np.full((rows.batch, rows.time, *values.shape[1:]), padding, values.dtype)
        if rows.lengths is None:
            array = values.reshape(array.shape)
        else:
            array[real_steps(rows.lengths, rows.time)] = values
        return array[0] if self.unbatched else array

    def gather(self, array: Array) -> Array:
        """The values of the real tokens, (N, W), of an array (B, T, W), or (T, W)."""
        return self.rows.gather(array[None] if self.unbatched else array)


def _tokens(name: str, value: Any, lengths: Any, count: int, lengths_name: str = "lengths") -> _Tokens:
    """Sequences of ids in any form: a list of them, an array (T,), or (B, T) with or without lengths."""
    given = symbols(name, value, lengths, count, lengths_name)
    is_list = lengths is None and is_list_of_rows(value)
    shape: tuple[int, ...] = () if is_list else np.shape(value)
    time = max(map(len, value), default=0) if is_list else shape[-1]
    return _Tokens(given.ids, rows_of(len(given.lengths), time, given.lengths), len(shape) == 1)


def _maps(weights: list[Array], rows: Rows, unbatched: bool) -> list[Array]:
    """Attention of every layer, (B, heads, longest, longest), with zeros up to (B, heads, T, T)."""
    maps = []
    for own in weights:
        whole = np.zeros((*own.shape[:2], rows.time, rows.time), own.dtype)
        whole[:, :, : own.shape[2], : own.shape[3]] = own
        maps.append(whole[0] if unbatched else whole)
    return maps


def _encode(encoder: Any, x: Array, rows: Rows, causal: bool, want_weights: bool = False) -> tuple[Array, Any]:
    """An encoder over rows: outputs as rows, and the attention of every layer."""
    y, weights = encoder._run(x, Context(Frame(rows, rows, False), None, causal), want_weights)
    return y, weights


def _initialise(model: Model, num_layers: int, residual: float) -> None:
    """Normal weights of deviation 0.02, those that end a residual branch times `residual`; biases 0, norms 1."""
    rng = np.random.default_rng(model._config["seed"])
    arrays: dict[str, Array] = {}
    for name, old in model._arrays.items():
        if old.ndim == 2:
            ends = name.endswith(("out_proj.weight", "linear2.weight"))
            arrays[name] = np.asarray(rng.normal(0, _DEVIATION * (residual if ends else 1.0), old.shape))
        elif name.endswith("bias"):
            arrays[name] = np.zeros(old.shape)
    model._replace(arrays)


class _Tied:
    """The output map whose matrix is the embedding's, but for the row of the begin symbol: y = E x."""

    def __init__(self, embedding: Any, operations: Any, count: int) -> None:
        self._embedding, self._operations, self._count = embedding, operations, count
        self._packed: tuple[Mapping[str, Array], Any] | None = None

    def _weights(self) -> Any:
        arrays, packed = self._embedding._arrays, self._packed
        if packed is not None and packed[0] is arrays:
            return packed[1]
        weights = self._operations.linear_pack(arrays["weight"][: self._count], None)
        self._packed = (arrays, weights)
        return weights

    def __call__(self, x: Array) -> Array:
        y: Array = self._operations.linear_forward(self._weights(), x, threads.get_num_threads())
        return y

    def forward(self, x: Array) -> tuple[Array, Any]:
        """The outputs, and what `backward` needs."""
        return self(x), (self._weights(), x)

    def backward(self, dy: Array, kept: Any, grads: Mapping[str, Array] | None) -> Array:
        """The gradient of x; that of the matrix is added to the embedding's."""
        weights, x = kept
        dweight = self._embedding._targets(grads)["weight"][: self._count]
        dx: Array = self._operations.linear_backward(weights, x, dy, dweight, None, threads.get_num_threads())
        return dx


class _Kept(NamedTuple):
    """The tapes of the layers of a language model."""

    embedding: Tape
    positions: Tape | None
    entering: Tape | None  # of dropout
    encoder: Any
    output: Any


class TransformerLM(SymbolModel):
    """The autoregressive model of symbols by attention: P(x_t | x_<t) from a Transformer that looks back.

    It is put together as GPT-2 [1]_: embedding, positions, layers with the norm first, a last norm, and the embedding
    once more as the output. Every sequence starts with a begin symbol, which stands before x_1 and is never predicted.

    At most `context` tokens are looked at together, the begin symbol among them. Of a longer sequence the last ones
    count: the window moves on by half of `context` whenever it is full, so that every symbol but the first ones has
    at least half of `context` before it. A call, `log_prob` and `generate` have the same windows.

    Parameters
    ----------
    vocab_size : int
        V; symbols are 0..V-1.
    d_model, nhead : int
        The size of a token's vector, and the number of heads, each of size d_model / nhead.
    num_layers : int
        Layers of attention and feed-forward.
    dim_feedforward : int, optional
        The size between the two linear maps of the feed-forward; 4 d_model by default.
    context : int
        The most tokens that are looked at together.
    dropout : float in [0, 1)
        Share that training drops: of what enters the first layer, and in the layers as `TransformerEncoder` has it.
    activation : {"gelu_tanh", "gelu", "relu", "swiglu", "geglu"}
        Between the two linear maps.
    norm : {"layer", "rms"}
        `LayerNorm` or `RMSNorm`.
    norm_first : bool
        Whether norms stand before attention and feed-forward, and one after the last layer; else after each sum.
    positions : {"learned", "sinusoidal", "rotary"} or None
        How a token knows where it stands; None: only by what it may attend to.
    num_kv_heads : int, optional
        Heads of keys and values, a divisor of `nhead`; as many as there are heads by default.
    window : int, optional
        A token may attend only to the last this many, itself among them.
    bias : bool
        Whether linear maps and layer norms of the layers have biases.
    tied : bool
        Whether the output has the matrix of the embedding [2]_; else one of its own, without bias.
    dtype : {"float32", "float64"}
        Of parameters and logits.
    seed : int, optional
        Fixes the initial parameters: normal, of deviation 0.02, divided by sqrt(2 num_layers) where a residual branch
        ends [1]_.

    References
    ----------
    .. [1] A. Radford et al., "Language models are unsupervised multitask learners", 2019.
    .. [2] O. Press and L. Wolf, "Using the output embedding to improve language models", EACL 2017.
    """

    _layers: ClassVar[Any] = layers
    _losses: ClassVar[Any] = losses
    _dtypes: ClassVar[tuple[str, ...] | None] = ("float32", "float64")

    vocab_size: int
    d_model: int
    nhead: int
    num_layers: int
    dim_feedforward: int
    context: int
    dropout: float
    activation: str
    norm: str
    norm_first: bool
    positions: str | None
    num_kv_heads: int
    window: int | None
    bias: bool
    tied: bool
    seed: int | None

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        nhead: int,
        num_layers: int,
        *,
        dim_feedforward: int | None = None,
        context: int = 1024,
        dropout: float = 0.0,
        activation: str = "gelu_tanh",
        norm: str = "layer",
        norm_first: bool = True,
        positions: str | None = "learned",
        num_kv_heads: int | None = None,
        window: int | None = None,
        bias: bool = True,
        tied: bool = True,
        dtype: Any = "float32",
        seed: int | None = None,
    ) -> None:
        self.vocab_size = checks.size("vocab_size", vocab_size, 1)
        self.d_model = checks.size("d_model", d_model, 1)
        self.context = checks.size("context", context, 1)
        self.dropout = checks.fraction("dropout", dropout)
        self.positions = None if positions is None else checks.choice("positions", positions, POSITIONS)
        self.bias = checks.flag("bias", bias)
        self.tied = checks.flag("tied", tied)
        self.norm_first = checks.flag("norm_first", norm_first)
        self.activation = checks.choice("activation", activation, ACTIVATIONS)
        self.norm = checks.choice("norm", norm, NORMS)
        self.dtype = checks.real_dtype("dtype", dtype, self._dtypes)
        self.seed = checks.seed("seed", seed)
        first, second, third, fourth = seeds_of(self.seed, 4)
        kinds, of_type = self._layers, {"dtype": self.dtype}
        encoder = kinds.TransformerEncoder(
            num_layers,
            self.d_model,
            nhead,
            4 * self.d_model if dim_feedforward is None else dim_feedforward,
            dropout=self.dropout,
            activation=self.activation,
            norm_first=self.norm_first,
            final_norm=self.norm_first,
            bias=self.bias,
            norm=self.norm,
            num_kv_heads=num_kv_heads,
            rotary=10000.0 if self.positions == "rotary" else None,
            window=window,
            seed=first,
            **of_type,
        )
        self.nhead, self.num_layers = encoder.nhead, encoder.num_layers
        self.dim_feedforward, self.num_kv_heads = encoder.dim_feedforward, encoder.num_kv_heads
        self.window = encoder.window
        config = {
            "vocab_size": self.vocab_size,
            "d_model": self.d_model,
            "nhead": self.nhead,
            "num_layers": self.num_layers,
            "dim_feedforward": self.dim_feedforward,
            "context": self.context,
            "dropout": self.dropout,
            "activation": self.activation,
            "norm": self.norm,
            "norm_first": self.norm_first,
            "positions": self.positions,
            "num_kv_heads": self.num_kv_heads,
            "window": self.window,
            "bias": self.bias,
            "tied": self.tied,
            "dtype": self.dtype.name,
            "seed": self.seed,
        }
        children = {"embedding": kinds.Embedding(self.vocab_size + 1, self.d_model, seed=second, **of_type)}
        self._positions: Any = None
        if self.positions == "learned":
            self._positions = kinds.LearnedPositions(self.context, self.d_model, seed=third, **of_type)
            children["positions"] = self._positions
        elif self.positions == "sinusoidal":
            self._positions = kinds.SinusoidalPositions(self.d_model, **of_type)
        children["encoder"] = encoder
        if not self.tied:
            children["output"] = kinds.Linear(self.d_model, self.vocab_size, False, seed=fourth, **of_type)
        self._start(config, **children)
        self._embedding: Any = children["embedding"]
        self._encoder: Any = encoder
        self._output: Any = children.get("output")
        if self.tied:
            self._output = _Tied(self._embedding, kinds.Linear._operations, self.vocab_size)
        self._drop = kinds.Dropout(self.dropout, **of_type)
        _initialise(self, self.num_layers, 1 / math.sqrt(2 * self.num_layers))

    @property
    def begin(self) -> int:
        """The id of the begin symbol: V."""
        return self.vocab_size

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
            y, _ = _encode(self._encoder, self._embedded(tokens.ids[places], rows), rows, True)
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
        given = _tokens("x", x, lengths, self.vocab_size)
        rows = given.rows
        counts = np.diff(rows.starts)
        begun = self._begun(given.ids, counts)
        after_begin = begun.steps() > 0
        if checks.flag("return_weights", return_weights):
            self._check_fits("x", rows.longest + 1)
            whole = rows_of(rows.batch, rows.time + 1, begun.lengths)
            hidden, weights = _encode(self._encoder, self._embedded(begun.ids, whole), whole, True, True)
            return given.spread(self._output(hidden[after_begin])), _maps(weights, whole, given.unbatched)
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
        given = _tokens("x", x, lengths, self.vocab_size)
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
        context = Context(Frame(rows, rows, False), None, True)
        y, of_encoder = self._encoder._forward_rows(x, context, child_seed(seed, 1))
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
        dx, _ = self._encoder._backward_rows(dy, kept.encoder, targets["encoder"])
        if kept.entering is not None:
            dx = self._drop.backward(dx, kept.entering)
        if kept.positions is not None:
            dx = self._positions.backward(dx, kept.positions, grads=targets.get("positions"))
        self._embedding.backward(dx, kept.embedding, grads=targets["embedding"])

    def _batch(self, batch: Batch) -> tuple[Array, Rows, Array]:
        """Tokens (N,), where they are, and what comes after each (N,)."""
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
        return tokens[real], rows, following[real]

    def training_forward(self, batch: Batch, state: Any = None, seed: int | None = None) -> tuple[float, int, Any, Any]:
        """The mean cross-entropy of a batch, for `fastseq.training.fit`.

        Parameters
        ----------
        batch : Batch
            Of `PaddedBatches` without targets: whole sequences of at most `context` symbols, each after a begin
            symbol. Of `Streams`: a window; those that are fresh are taken for whole sequences.
        state : None
            A Transformer carries none.
        seed : int, optional
            Fixes what dropout drops.

        Returns
        -------
        loss : float
        count : int
            Over how many symbols.
        tape : object
            For `training_backward`.
        state : None
        """
        tokens, rows, following = self._batch(batch)
        logits, kept = self._through(tokens, rows, seed)
        loss, gradient = self._losses.softmax_cross_entropy(logits, following)
        return loss, len(following), (gradient, kept), None

    def training_backward(self, tape: Any, grads: Any = None) -> None:
        """Add the gradients of the loss that `training_forward` returned."""
        gradient, kept = tape
        self._back(gradient, kept, grads)

    def evaluation_forward(self, batch: Batch, state: Any = None) -> tuple[float, int, Any]:
        """Loss, count and state as of `training_forward`, without dropout.

        Whole sequences may be longer than `context` here: their windows are those of `log_prob`.
        """
        if batch.targets is None and np.ndim(batch.inputs) == 2 and np.shape(batch.inputs)[1] > self.context:
            given = symbols("inputs", batch.inputs, batch.lengths, self.vocab_size)
            return -float(self._log_probs(given).sum()) / max(len(given.ids), 1), len(given.ids), None
        tokens, rows, following = self._batch(batch)
        y, _ = _encode(self._encoder, self._embedded(tokens, rows), rows, True)
        loss, _ = self._losses.softmax_cross_entropy(self._output(y), following)
        return loss, len(following), None

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
        no_targets("data", data, lengths)
        steps = self.context if chunk is None else checks.size("chunk", chunk, 1)
        if steps > self.context:
            raise ValueError(f"chunk should be at most context={self.context}, not {steps}")
        size = BATCH_SIZE if batch_size is None else checks.size("batch_size", batch_size, 1)
        raw = settings.get("validation")
        if is_data(data):
            batched_already(lengths=lengths, batch_size=batch_size, chunk=chunk, validation_split=validation_split)
        else:
            given, held = text_split(symbols("data", data, lengths, self.vocab_size), validation_split, seed)
            if held is not None:
                if raw is not None:
                    raise ValueError("validation_split should not be given with validation")
                settings["validation"] = whole_sequences("validation", held, size)
            rows = [row for row in given.split() if len(row)]
            if not rows:
                raise ValueError("data should hold at least one symbol")
            data = training.TextWindows(rows, steps=steps, batch_size=size, begin=self.begin, seed=seed)
        if raw is not None and not is_data(raw):
            held = symbols("validation", *padded_pair(raw), self.vocab_size)
            settings["validation"] = whole_sequences("validation", held, size)
        return self._train(data, {"seed": seed, **settings})

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
        state = self.initial_state(len(ids)) if state is None else self._encoder._kept_by(state, len(ids), tokens=True)
        state = self._with_room(state)
        places = state.lengths
        x = self._embedding(ids)
        x = x if self._positions is None else self._positions(x, positions=places)
        room = int(places.max(initial=-1)) + 1
        tokens = np.zeros((len(ids), room), np.int64)
        tokens[:, : room - 1] = state._tokens[:, : room - 1]
        tokens[np.arange(len(ids)), places] = ids
        y, state = self._encoder._go_on(x, np.arange(len(ids) + 1), state, tokens)
        return self._output(y), state

    def _with_room(self, state: AttentionState) -> AttentionState:
        """A state whose rows have room for a token: the window of those that had none moved on."""
        full = np.flatnonzero(state.lengths >= self.context)
        if not len(full):
            return state
        tokens: Any = state._tokens
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
        start = self._encoder._started(rows.batch, tokens=tokens)
        y, state = self._encoder._go_on(self._embedded(ids, rows), rows.starts, start, tokens)
        return y[rows.starts[1:] - 1] if len(y) else y, state

    def _decoder(self, prompts: list[Array], copies: int) -> tuple[Array, Decoder]:
        y, state = self._prefilled([self._with_begin(row) for row in prompts])
        logits: Array = self._output(y)
        operations = self._encoder._operations
        if not hasattr(operations, "Decoder"):
            return logits, StateDecoder(self, state)
        return logits, operations.Decoder(
            self._encoder._packed_blocks(self.context),
            self._encoder._final_norm(),
            self._embedding._arrays["weight"],
            None if self._positions is None else self._positions._table(self.context),
            self._output._weights(),
            state._own,
            None,
            self.context,
            lambda rows: self._prefilled([self._with_begin(row) for row in rows], 1)[1]._own,
            threads.get_num_threads(),
        )

    def _with_begin(self, row: Array) -> Array:
        return np.concatenate([[self.begin], row])


class _EncoderKept(NamedTuple):
    """The tapes of the layers of an encoder model, and what its pooling needs."""

    word: Tape
    position: Tape
    type: Tape | None
    norm: Tape
    entering: Tape | None  # of dropout
    encoder: Any
    pooled: Any
    leaving: Tape | None
    head: Tape | None


class TransformerEncoderModel(Model):
    """A Transformer that looks both ways: vectors of tokens, one vector of a sequence, or scores of labels.

    It is put together as BERT [1]_: the embeddings of word, position and type are summed and normed, layers follow;
    then the tokens are pooled, or not, and a head of one linear map gives the scores of labels, if there is one.

    Parameters
    ----------
    vocab_size : int
        V; ids are 0..V-1.
    d_model, nhead : int
        The size of a token's vector, and the number of heads, each of size d_model / nhead.
    num_layers : int
        Layers of attention and feed-forward.
    dim_feedforward : int, optional
        The size between the two linear maps of the feed-forward; 4 d_model by default.
    max_length : int
        The most tokens of a sequence.
    type_vocab_size : int
        Kinds of tokens, in BERT the first and the second sentence; 0: tokens have none.
    dropout : float in [0, 1)
        Share that training drops: of the embeddings, in the layers as `TransformerEncoder` has it, and of what enters
        the head.
    activation : {"gelu", "gelu_tanh", "relu", "swiglu", "geglu"}
        Between the two linear maps.
    norm_first : bool
        Whether norms stand before attention and feed-forward, and one after the last layer; else after each sum.
    layer_norm_eps : float
        Keeps the roots in the norms away from 0.
    pooling : {"mean", "cls", "max"} or None
        One vector of a sequence: the mean of its tokens' [2]_, the first one, or the largest of each element. None:
        a vector of each token.
    pooler : bool
        Whether the vector of a sequence goes through a linear map and tanh, as in BERT; with ``pooling="cls"``.
    normalize : bool
        Whether the vectors that come out are divided by their length.
    num_labels : int, optional
        A head: scores of so many labels, of each sequence or, without pooling, of each token.
    dtype : {"float32", "float64"}
        Of parameters and outputs.
    seed : int, optional
        Fixes the initial parameters: normal, of deviation 0.02 [1]_.

    References
    ----------
    .. [1] J. Devlin et al., "BERT: pre-training of deep bidirectional transformers for language understanding",
       NAACL 2019.
    .. [2] N. Reimers and I. Gurevych, "Sentence-BERT: sentence embeddings using Siamese BERT-networks", EMNLP 2019.
    """

    _layers: ClassVar[Any] = layers
    _losses: ClassVar[Any] = losses
    # The set of operations of what has no layer of its own.
    _operations: ClassVar[Any] = _additive_attention
    _dtypes: ClassVar[tuple[str, ...] | None] = ("float32", "float64")

    vocab_size: int
    d_model: int
    nhead: int
    num_layers: int
    dim_feedforward: int
    max_length: int
    type_vocab_size: int
    dropout: float
    activation: str
    norm_first: bool
    layer_norm_eps: float
    pooling: str | None
    pooler: bool
    normalize: bool
    num_labels: int | None
    seed: int | None

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        nhead: int,
        num_layers: int,
        *,
        dim_feedforward: int | None = None,
        max_length: int = 512,
        type_vocab_size: int = 0,
        dropout: float = 0.1,
        activation: str = "gelu",
        norm_first: bool = False,
        layer_norm_eps: float = 1e-12,
        pooling: str | None = "mean",
        normalize: bool = False,
        num_labels: int | None = None,
        dtype: Any = "float32",
        seed: int | None = None,
        pooler: bool = False,
    ) -> None:
        self.vocab_size = checks.size("vocab_size", vocab_size, 1)
        self.d_model = checks.size("d_model", d_model, 1)
        self.max_length = checks.size("max_length", max_length, 1)
        self.type_vocab_size = checks.size("type_vocab_size", type_vocab_size)
        self.dropout = checks.fraction("dropout", dropout)
        self.activation = checks.choice("activation", activation, ACTIVATIONS)
        self.norm_first = checks.flag("norm_first", norm_first)
        self.layer_norm_eps = checks.number("layer_norm_eps", layer_norm_eps, least=0)
        self.pooling = None if pooling is None else checks.choice("pooling", pooling, POOLINGS)
        self.pooler = checks.flag("pooler", pooler)
        if self.pooler and self.pooling != "cls":
            raise ValueError(f"pooling should be 'cls' with pooler=True, not {self.pooling!r}")
        self.normalize = checks.flag("normalize", normalize)
        self.num_labels = None if num_labels is None else checks.size("num_labels", num_labels, 1)
        if self.normalize and self.num_labels is not None:
            raise ValueError("normalize should be False where num_labels gives the model a head")
        self.dtype = checks.real_dtype("dtype", dtype, self._dtypes)
        self.seed = checks.seed("seed", seed)
        seeds = seeds_of(self.seed, 6)
        kinds, of_type = self._layers, {"dtype": self.dtype}
        encoder = kinds.TransformerEncoder(
            num_layers,
            self.d_model,
            nhead,
            4 * self.d_model if dim_feedforward is None else dim_feedforward,
            dropout=self.dropout,
            activation=self.activation,
            norm_first=self.norm_first,
            layer_norm_eps=self.layer_norm_eps,
            final_norm=self.norm_first,
            seed=seeds[0],
            **of_type,
        )
        self.nhead, self.num_layers = encoder.nhead, encoder.num_layers
        self.dim_feedforward = encoder.dim_feedforward
        config = {
            "vocab_size": self.vocab_size,
            "d_model": self.d_model,
            "nhead": self.nhead,
            "num_layers": self.num_layers,
            "dim_feedforward": self.dim_feedforward,
            "max_length": self.max_length,
            "type_vocab_size": self.type_vocab_size,
            "dropout": self.dropout,
            "activation": self.activation,
            "norm_first": self.norm_first,
            "layer_norm_eps": self.layer_norm_eps,
            "pooling": self.pooling,
            "normalize": self.normalize,
            "num_labels": self.num_labels,
            "dtype": self.dtype.name,
            "seed": self.seed,
            "pooler": self.pooler,
        }
        children: dict[str, Layer] = {
            "word": kinds.Embedding(self.vocab_size, self.d_model, seed=seeds[1], **of_type),
            "position": kinds.LearnedPositions(self.max_length, self.d_model, seed=seeds[2], **of_type),
        }
        if self.type_vocab_size:
            children["type"] = kinds.Embedding(self.type_vocab_size, self.d_model, seed=seeds[3], **of_type)
        children["norm"] = kinds.LayerNorm(self.d_model, eps=self.layer_norm_eps, **of_type)
        children["encoder"] = encoder
        if self.pooler:
            children["pooler"] = kinds.Linear(self.d_model, self.d_model, seed=seeds[5], **of_type)
        if self.num_labels is not None:
            children["head"] = kinds.Linear(self.d_model, self.num_labels, seed=seeds[4], **of_type)
        self._start(config, **children)
        self._word: Any = children["word"]
        self._position: Any = children["position"]
        self._type: Any = children.get("type")
        self._norm: Any = children["norm"]
        self._encoder: Any = encoder
        self._pooler: Any = children.get("pooler")
        self._head: Any = children.get("head")
        self._drop = kinds.Dropout(self.dropout, **of_type)
        _initialise(self, self.num_layers, 1.0)

    @property
    def time(self) -> str:  # type: ignore[override]
        """Whether there is a vector for every token or one for a sequence."""
        return SEQUENCE if self.pooling is None else POOLING

    @classmethod
    def from_bert(cls, config: Any, weights: Any, **settings: Any) -> TransformerEncoderModel:
        """The model that a BERT of the package transformers is.

        Parameters
        ----------
        config : mapping, or BertConfig
            What its config.json holds: ``vocab_size``, ``hidden_size``, ...
        weights : mapping from str to array, or model of transformers
            Its state dict, as `bert_state_dict` takes it. Where it holds a classifier, the model gives the same scores:
            of sequences, if it holds a pooler, too, and of tokens otherwise; `num_labels` has to say how many. Without
            a classifier `num_labels` makes a head that starts anew, and a pooler is taken with ``pooler=True`` only.
        **settings
            Of the model; what they say comes before what `config` says. Dropout is that of ``hidden_dropout_prob``
            everywhere.

        Returns
        -------
        TransformerEncoderModel

        Raises
        ------
        ValueError, TypeError
            Naming what is missing, or of another kind than this model has.
        """
        if not isinstance(config, Mapping) and hasattr(config, "to_dict"):
            config = config.to_dict()
        if not isinstance(config, Mapping):
            raise TypeError(
                "config should be a mapping, what config.json holds, or a BertConfig of transformers,"
                f" not {checks.describe(config)}"
            )
        if not isinstance(weights, Mapping) and hasattr(weights, "state_dict"):
            weights = weights.state_dict()
        given = checks.mapping("config", config)
        names = {
            "vocab_size": "vocab_size",
            "d_model": "hidden_size",
            "nhead": "num_attention_heads",
            "num_layers": "num_hidden_layers",
        }
        missing = [name for name in names.values() if name not in given]
        if missing:
            raise ValueError(f"config should have {', '.join(missing)}, too")
        if given.get("model_type", "bert") != "bert":
            raise ValueError(f"config should have model_type='bert', not {given['model_type']!r}")
        more = {
            "dim_feedforward": "intermediate_size",
            "max_length": "max_position_embeddings",
            "type_vocab_size": "type_vocab_size",
            "dropout": "hidden_dropout_prob",
            "layer_norm_eps": "layer_norm_eps",
        }
        made = {own: given[name] for own, name in (names | more).items() if name in given}
        kind = given.get("position_embedding_type", "absolute")
        if kind != "absolute":
            raise ValueError(f"config should have position_embedding_type='absolute', not {kind!r}")
        for name in ("is_decoder", "add_cross_attention"):
            if given.get(name):
                raise ValueError(f"config should have {name}=False, not {given[name]!r}")
        activations = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
        activation = checks.choice("hidden_act of config", given.get("hidden_act", "gelu"), tuple(activations))
        arrays = bert_state_dict(weights, pooler=True)
        settings = _with_head(arrays, settings)
        model = cls(**{**made, "activation": activations[activation], **settings})
        if not model.pooler:
            arrays = {name: array for name, array in arrays.items() if not name.startswith("pooler.")}
        if model.num_labels is not None and "head.weight" not in arrays:
            arrays |= {name: array for name, array in model.state_dict().items() if name.startswith("head.")}
        model.load_state_dict(arrays)
        return model

    def _opened(self, ids: Any, lengths: Any, type_ids: Any) -> tuple[_Tokens, Array | None]:
        """The real tokens, and the type of each."""
        given = _tokens("ids", ids, lengths, self.vocab_size)
        if given.rows.longest > self.max_length:
            raise ValueError(
                f"ids should have at most max_length={self.max_length} tokens a row, not {given.rows.longest}"
            )
        if not self.type_vocab_size:
            if type_ids is not None:
                raise ValueError("type_ids should not be given to a model of type_vocab_size=0")
            return given, None
        if type_ids is None:
            return given, np.zeros(len(given.ids), np.int64)
        types = _tokens("type_ids", type_ids, lengths, self.type_vocab_size)
        if len(types.ids) != len(given.ids) or (types.rows.starts != given.rows.starts).any():
            raise ValueError(f"type_ids should be of the shape of ids, not {checks.describe(type_ids)}")
        return given, types.ids

    def __call__(self, ids: Any, *, lengths: Any = None, type_ids: Any = None, return_weights: bool = False) -> Any:
        """Encode sequences; nothing is computed for padding.

        Parameters
        ----------
        ids : array of shape (B, T), (T,) for one sequence, or list of sequences
            Ids in 0..V-1.
        lengths : array of shape (B,), optional
            The real tokens of each row; what stands past them does not matter.
        type_ids : of the form of ids, optional
            The type of each token, in 0..type_vocab_size-1; 0 by default.
        return_weights : bool
            Whether to return what each token attends to, too.

        Returns
        -------
        y : ndarray
            Without a head the pooled vectors (B, d_model), or (B, T, d_model) without pooling; with one the scores
            (B, num_labels), or (B, T, num_labels). 0 past the end of a row; a sequence without tokens has the
            vector 0. The axis of sequences is missing for one sequence.
        weights : list of ndarrays of shape (B, heads, T, T), or (heads, T, T)
            With `return_weights`, one a layer.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        given, types = self._opened(ids, lengths, type_ids)
        y, weights = self._encoded(given, types, checks.flag("return_weights", return_weights))
        out = self._returned(y, given)
        return out if weights is None else (out, _maps(weights, given.rows, given.unbatched))

    def _encoded(self, given: _Tokens, types: Array | None, want_weights: bool = False) -> tuple[Array, Any]:
        """What comes out last, (N or B, d_model or num_labels), and the attention of every layer."""
        rows = given.rows
        x = self._word(given.ids)
        if types is not None:
            x = x + self._type(types)
        x = self._norm(self._position(x, positions=rows.steps()))
        y, weights = _encode(self._encoder, x, rows, False, want_weights)
        y, _ = self._pool(y, rows)
        return y if self._head is None else self._head(y), weights

    def _returned(self, y: Array, given: _Tokens) -> Array:
        """An output in the form of the ids."""
        if self.pooling is None:
            return given.spread(y)
        return y[0] if given.unbatched else y

    def _pool(self, y: Array, rows: Rows, taped: bool = False) -> tuple[Array, Any]:
        """From the tokens (N, d_model) to what the model is asked for, and if `taped` what `_unpool` needs."""
        kept: Any = None
        of_pooler: Any = None
        if self.pooling is not None:
            y, kept = _pooled(self.pooling, y, rows)
        if self._pooler is not None:
            z, tape = self._pooler.forward(y) if taped else (self._pooler(y), None)
            y = self._operations.tanh_forward(z, threads.get_num_threads())
            y[np.diff(rows.starts) == 0] = 0
            of_pooler = y, tape
        if not self.normalize:
            return y, (kept, of_pooler, None)
        lengths = np.maximum(np.sqrt(np.square(y).sum(axis=1, keepdims=True)), y.dtype.type(_SMALLEST))
        y = y / lengths
        return y, (kept, of_pooler, (y, lengths))

    def _unpool(self, dy: Array, rows: Rows, kept: Any, targets: dict[str, Any]) -> Array:
        """The gradient of the tokens."""
        of_pooling, of_pooler, of_length = kept
        if of_length is not None:
            y, lengths = of_length
            # Too short a vector was divided by a constant.
            along = np.where(lengths > _SMALLEST, y * (y * dy).sum(axis=1, keepdims=True), 0)
            dy = (dy - along) / lengths
        if of_pooler is not None:
            y, tape = of_pooler
            dz = self._operations.tanh_backward(y, np.ascontiguousarray(dy), threads.get_num_threads())
            dz[np.diff(rows.starts) == 0] = 0
            dy = self._pooler.backward(dz, tape, grads=targets["pooler"])
        if self.pooling is None:
            return dy
        return _spread(self.pooling, dy, rows, of_pooling)

    def forward(
        self, ids: Any, *, lengths: Any = None, type_ids: Any = None, seed: int | None = None
    ) -> tuple[Array, Tape]:
        """Call for training: with dropout, and what `backward` needs.

        Parameters
        ----------
        ids, lengths, type_ids
            As of a call.
        seed : int, optional
            Fixes what dropout drops.

        Returns
        -------
        y : ndarray
            As of a call.
        tape : Tape
        """
        given, types = self._opened(ids, lengths, type_ids)
        y, kept = self._through(given, types, seed)
        out = self._returned(y, given)
        return out, Tape(self, (kept, given, out.shape))

    def _through(self, given: _Tokens, types: Array | None, seed: int | None) -> tuple[Array, _EncoderKept]:
        """All layers, forward."""
        seed, rows = mask_seed(seed), given.rows
        of_type = entering = leaving = of_head = None
        x, of_word = self._word.forward(given.ids)
        if types is not None:
            more, of_type = self._type.forward(types)
            x = x + more
        x, of_position = self._position.forward(x, positions=rows.steps())
        x, of_norm = self._norm.forward(x)
        if self.dropout:
            x, entering = self._drop.forward(x, seed=child_seed(seed, 0))
        context = Context(Frame(rows, rows, False), None, False)
        y, of_encoder = self._encoder._forward_rows(x, context, child_seed(seed, 1))
        y, pooled = self._pool(y, rows, taped=True)
        if self._head is not None:
            if self.dropout:
                y, leaving = self._drop.forward(y, seed=child_seed(seed, 2))
            y, of_head = self._head.forward(y)
        kept = _EncoderKept(of_word, of_position, of_type, of_norm, entering, of_encoder, pooled, leaving, of_head)
        return y, kept

    def backward(self, dy: Any, tape: Tape, *, grads: Any = None) -> None:
        """Add the gradients of all parameters; ids have none, and there is nothing to return.

        Parameters
        ----------
        dy : array of the shape of y
            Past the end of a row nothing in it matters.
        tape : Tape
            What `forward` returned.
        grads : mapping from str to ndarray, optional
            Where the gradients are added; `grads` of the model by default.
        """
        kept, given, shape = self._kept(tape)
        dy = checks.like("dy", dy, self.dtype, shape)
        gradient = given.gather(dy) if self.pooling is None else dy[None] if given.unbatched else dy
        self._back(gradient, given.rows, kept, grads)

    def _back(self, dy: Array, rows: Rows, kept: _EncoderKept, grads: Any) -> None:
        """All layers, in the reverse order of `_through`."""
        targets = self._child_targets(grads)
        if kept.head is not None:
            dy = self._head.backward(dy, kept.head, grads=targets["head"])
            if kept.leaving is not None:
                dy = self._drop.backward(dy, kept.leaving)
        dy = self._unpool(dy, rows, kept.pooled, targets)
        dx, _ = self._encoder._backward_rows(dy, kept.encoder, targets["encoder"])
        if kept.entering is not None:
            dx = self._drop.backward(dx, kept.entering)
        dx = self._norm.backward(dx, kept.norm, grads=targets["norm"])
        dx = self._position.backward(dx, kept.position, grads=targets["position"])
        if kept.type is not None:
            self._type.backward(dx, kept.type, grads=targets["type"])
        self._word.backward(dx, kept.word, grads=targets["word"])

    @property
    def loss_unit(self) -> str:
        """What the losses of a training are counted in."""
        return "nats a label"

    def _needs_head(self) -> int:
        if self.num_labels is None:
            raise ValueError("num_labels should be given to a model that knows labels; this one has no head")
        return self.num_labels

    def _labels(self, name: str, value: Any, given: _Tokens, least: int) -> Array:
        """Labels of all sequences (B,), or of all tokens (N,); -1 where `least` allows it."""
        count, rows = self._needs_head(), given.rows
        if self.pooling is None and isinstance(value, list | tuple) and not given.unbatched:
            each = [checks.integers(f"{name}[{i}]", row) for i, row in enumerate(value)]
            sizes = [(n,) for n in np.diff(rows.starts)]
            if [row.shape for row in each] != sizes:
                raise ValueError(f"{name} should have a label for each token of each of the {rows.batch} sequences")
            array = np.concatenate([np.zeros(0, np.int64), *each])
        else:
            array = checks.integers(name, value)
            shape = (rows.batch,) if self.pooling is not None else (rows.batch, rows.time)
            wanted = shape[1:] if given.unbatched else shape
            if array.shape != wanted:
                of = "token" if self.pooling is None else "sequence"
                raise ValueError(f"{name} should be of shape {wanted}, a label for each {of}, not {array.shape}")
            array = array.reshape(shape)
            if self.pooling is None:
                array = array[real_steps(np.diff(rows.starts), rows.time)]
        return checks.ids(name, array, count, array != _IGNORED if least < 0 else None)

    def log_prob(self, ids: Any, labels: Any, lengths: Any = None, *, type_ids: Any = None) -> Array:
        """The log-probability of the labels of each sequence.

        Parameters
        ----------
        ids, lengths, type_ids
            As of a call.
        labels : array of shape (B,), or without pooling of the form of ids
            Integers in 0..num_labels-1.

        Returns
        -------
        ndarray of shape (B,)
            Natural logarithms, float64. Without pooling the sum over the tokens.
        """
        given, types = self._opened(ids, lengths, type_ids)
        wanted = self._labels("labels", labels, given, 0)
        scores, _ = self._encoded(given, types)
        each = log_softmax_at(scores, wanted)
        if self.pooling is not None:
            return each
        return sums(np.repeat(np.arange(given.rows.batch), np.diff(given.rows.starts)), each, given.rows.batch)

    def predict(self, ids: Any, lengths: Any = None, *, type_ids: Any = None) -> Array:
        """The likeliest labels.

        Parameters
        ----------
        ids, lengths, type_ids
            As of a call.

        Returns
        -------
        ndarray of shape (B,), or (B, T) without pooling
            Integers in 0..num_labels-1, int64; -1 past the end of a row.
        """
        self._needs_head()
        given, types = self._opened(ids, lengths, type_ids)
        labels = self._encoded(given, types)[0].argmax(axis=1)
        if self.pooling is None:
            return given.spread(labels, _IGNORED)
        return np.asarray(labels[0] if given.unbatched else labels)

    def _batch(self, batch: Batch) -> tuple[_Tokens, Array | None, Array]:
        """Tokens and their types, and the targets."""
        self._needs_head()
        if batch.targets is None:
            raise ValueError("targets should be given: labels are what the model learns")
        given, types = self._opened(batch.inputs, batch.lengths, None)
        return given, types, self._labels("targets", batch.targets, given, _IGNORED)

    def training_forward(self, batch: Batch, state: Any = None, seed: int | None = None) -> tuple[float, int, Any, Any]:
        """The mean cross-entropy of the labels of a batch, for `fastseq.training.fit`.

        Parameters
        ----------
        batch : Batch
            Ids, and a label for each sequence or, without pooling, each token. A label of -1 does not count.
        state : None
            A Transformer carries none.
        seed : int, optional
            Fixes what dropout drops.

        Returns
        -------
        loss : float
        count : int
            Over how many labels.
        tape : object
            For `training_backward`.
        state : None
        """
        given, types, targets = self._batch(batch)
        scores, kept = self._through(given, types, seed)
        loss, gradient = self._losses.softmax_cross_entropy(scores, targets, ignore_index=_IGNORED)
        return loss, int((targets != _IGNORED).sum()), (gradient, given.rows, kept), None

    def training_backward(self, tape: Any, grads: Any = None) -> None:
        """Add the gradients of the loss that `training_forward` returned."""
        gradient, rows, kept = tape
        self._back(gradient, rows, kept, grads)

    def evaluation_forward(self, batch: Batch, state: Any = None) -> tuple[float, int, Any]:
        """Loss, count and state as of `training_forward`, without dropout."""
        given, types, targets = self._batch(batch)
        scores, _ = self._encoded(given, types)
        loss, _ = self._losses.softmax_cross_entropy(scores, targets, ignore_index=_IGNORED)
        return loss, int((targets != _IGNORED).sum()), None

    @checks.short_traceback
    def fit(
        self,
        data: Any,
        targets: Any = None,
        lengths: Any = None,
        *,
        batch_size: int | None = None,
        seed: int | None = 0,
        validation_split: float | None = None,
        **settings: Any,
    ) -> History:
        """Train to tell labels; what was learnt before is where it starts. Where this fails, the model is as it was.

        Parameters
        ----------
        data : data of `fastseq.training`, list of sequences, or array of shape (B, T)
            Ids, which become `PaddedBatches`. All tokens have type 0.
        targets : array of shape (B,), or without pooling of the form of data
            Labels in 0..num_labels-1; one of -1 does not count.
        lengths : array of shape (B,), optional
            The real tokens of each row.
        batch_size : int, optional
            Sequences in a batch; 32 by default.
        seed : int, optional
            Fixes the order of the data and what dropout drops.
        validation_split : float in (0, 1), optional
            The share of the sequences, drawn by the seed, that the model is validated on.
        **settings
            As of `fastseq.training.fit`: ``epochs``, ``optimiser``, ``validation``, ``checkpoint``, ...
            ``validation`` may be a tuple of data and targets, or of data, targets and lengths. Its loss is the mean
            of -log P of a label, as of `log_prob`.

        Returns
        -------
        History
        """
        self._needs_head()
        raw = settings.get("validation")
        if targets is None and isinstance(data, tuple) and not is_data(data) and len(data) in (2, 3):
            data, targets, *more = data
            lengths = more[0] if more else lengths
        if targets is None:
            if not is_data(data):
                raise ValueError("targets should be given: labels are what the model learns")
            batched_already(lengths=lengths, batch_size=batch_size, validation_split=validation_split)
            self._with_validation(settings, BATCH_SIZE)
            return self._train(data, {"seed": seed, **settings})
        size = BATCH_SIZE if batch_size is None else checks.size("batch_size", batch_size, 1)
        sequences, labels = self._labelled("data", data, "targets", targets, lengths)
        if validation_split is not None:
            if raw is not None:
                raise ValueError("validation_split should not be given with validation")
            learnt, out = held_out(len(sequences), validation_split, seed)
            held = [[rows[i] for i in out] for rows in (sequences, labels)]
            settings["validation"] = training.PaddedBatches(*held, batch_size=size, shuffle=False)
            sequences, labels = ([rows[i] for i in learnt] for rows in (sequences, labels))
        self._with_validation(settings, size)
        made = training.PaddedBatches(sequences, labels, batch_size=size, seed=seed)
        return self._train(made, {"seed": seed, **settings})

    def _with_validation(self, settings: dict[str, Any], batch_size: int) -> None:
        """Put raw data to validate on into batches."""
        raw = settings.get("validation")
        if isinstance(raw, tuple) and not is_data(raw) and len(raw) in (2, 3):
            data, targets, *more = raw
            sequences, labels = self._labelled(
                "validation[0]", data, "validation[1]", targets, more[0] if more else None
            )
            settings["validation"] = training.PaddedBatches(sequences, labels, batch_size=batch_size, shuffle=False)

    def _labelled(
        self, name: str, data: Any, targets_name: str, targets: Any, lengths: Any
    ) -> tuple[list[Array], list[Any]]:
        """Sequences without padding, and the label of each, or those of its tokens."""
        given = _tokens(name, data, lengths, self.vocab_size)
        if given.unbatched:
            raise ValueError(f"{name} should be a batch of sequences, not one of shape {np.shape(data)}")
        labels = self._labels(targets_name, targets, given, _IGNORED)
        ends = given.rows.starts[1:-1]
        return np.split(given.ids, ends), np.split(labels, ends) if self.pooling is None else list(labels)


def _pooled(kind: str, y: Array, rows: Rows) -> tuple[Array, Any]:
    """One vector of each sequence, (B, D), and for the largest elements where they were."""
    starts, counts = rows.starts, np.diff(rows.starts)
    result = np.zeros((rows.batch, y.shape[1]), y.dtype)
    some = np.flatnonzero(counts)
    if kind == "cls":
        result[some] = y[starts[some]]
        return result, None
    places = np.zeros(result.shape, np.int64)
    for i in some:  # each by itself, so that no sequence beside it changes a bit
        own = y[starts[i] : starts[i + 1]]
        if kind == "mean":
            result[i] = own.sum(axis=0) / y.dtype.type(counts[i])
        else:
            places[i] = own.argmax(axis=0)
            result[i] = own.max(axis=0)
    return result, places + starts[:-1, None] if kind == "max" else None


def _spread(kind: str, dy: Array, rows: Rows, places: Any) -> Array:
    """The gradient of the tokens, (N, D), given that of what was pooled."""
    starts, counts = rows.starts, np.diff(rows.starts)
    if kind == "mean":
        share: Array = dy / np.maximum(counts, 1).astype(dy.dtype)[:, None]
        return np.repeat(share, counts, axis=0)
    result = np.zeros((int(starts[-1]), dy.shape[1]), dy.dtype)
    some = np.flatnonzero(counts)
    if kind == "cls":
        result[starts[some]] = dy[some]
    else:
        result[places[some], np.arange(dy.shape[1])] = dy[some]
    return result


_BERT_EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "word.weight",
    "embeddings.position_embeddings.weight": "position.weight",
    "embeddings.token_type_embeddings.weight": "type.weight",
    "embeddings.LayerNorm.weight": "norm.weight",
    "embeddings.LayerNorm.bias": "norm.bias",
    "pooler.dense.weight": "pooler.weight",
    "pooler.dense.bias": "pooler.bias",
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
}
_BERT_LAYER = {
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "norm2",
}
# What this arrangement has no use for: the heads of the pretraining, and numbers that are no weights.
_BERT_UNUSED = ("cls.", "embeddings.position_ids", "embeddings.token_type_ids")


def _with_head(arrays: Mapping[str, Array], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model whose head is the one that weights hold; refused where it would be left out."""
    made = dict(settings)
    if "head.weight" not in arrays:
        return made
    if made.get("num_labels") is None:
        raise ValueError(
            f"num_labels should be {len(arrays['head.weight'])} where weights hold that many labels in classifier.*;"
            " or leave classifier.* out of them"
        )
    of_sequences = "pooler.weight" in arrays
    if of_sequences and "pooling" not in made:
        made |= {"pooling": "cls", "pooler": True, **settings}
    made.setdefault("pooling", None)
    if made["pooling"] is not None and not (of_sequences and made.get("pooler")):
        raise ValueError(
            "pooling should be None, or 'cls' with pooler=True, where weights hold classifier.*, which is a head over"
            f" tokens or over BERT's pooler, not {made['pooling']!r}; or leave classifier.* out of weights for a head"
            " that starts anew"
        )
    return made


def bert_state_dict(mapping: Mapping[str, Any], *, pooler: bool = False) -> dict[str, Array]:
    """The state dict of a BERT of the package transformers under the names of `TransformerEncoderModel`.

    Parameters
    ----------
    mapping : mapping from str to array
        Names like ``encoder.layer.0.attention.self.query.weight``, with ``bert.`` in front of them or not. The
        heads of the pretraining are left out.
    pooler : bool
        Whether to keep the pooler, for a model that has one.

    Returns
    -------
    dict from str to ndarray

    Raises
    ------
    ValueError
        Naming what is unknown or missing.
    """
    given = {name.removeprefix("bert."): value for name, value in checks.mapping("mapping", mapping).items()}
    unused = _BERT_UNUSED if checks.flag("pooler", pooler) else (*_BERT_UNUSED, "pooler.")
    given = {name: value for name, value in given.items() if not name.startswith(unused)}
    result: dict[str, Array] = {}
    parts: dict[str, dict[str, Array]] = {}  # of what is one matrix here: queries, keys and values
    unknown = []
    for name, value in given.items():
        array = checks.as_array(name, value)
        head, _, rest = name.removeprefix("encoder.layer.").partition(".")
        stem, _, kind = rest.rpartition(".")
        if name in _BERT_EMBEDDINGS:
            result[_BERT_EMBEDDINGS[name]] = array
        elif not (name.startswith("encoder.layer.") and head.isdecimal() and kind in ("weight", "bias")):
            unknown.append(name)
        elif stem in _BERT_LAYER:
            result[f"encoder.layers.{head}.{_BERT_LAYER[stem]}.{kind}"] = array
        elif stem in ("attention.self.query", "attention.self.key", "attention.self.value"):
            whole = f"encoder.layers.{head}.self_attn.in_proj_{kind}"
            parts.setdefault(whole, {})[stem.rpartition(".")[2]] = array
        else:
            unknown.append(name)
    faults = [f"{name} is unknown" for name in unknown]
    for whole, three in parts.items():
        faults += [f"{part} is missing for {whole}" for part in ("query", "key", "value") if part not in three]
    if faults:
        raise ValueError(f"mapping is no state dict of BERT: {'; '.join(faults)}")
    for whole, three in parts.items():
        result[whole] = np.concatenate([three["query"], three["key"], three["value"]])
    return result
