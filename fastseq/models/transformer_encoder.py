"""The encoder model over Transformer layers, as BERT is put together."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastseq import checks, layers, losses, threads, training
from fastseq.checks import Array
from fastseq.convert import bert
from fastseq.layers import inside
from fastseq.layers.base import POOLING, SEQUENCE, Tape, child_seed, mask_seed, seeds_of
from fastseq.layers.rows import Rows
from fastseq.layers.settings import (
    KW_ONLY,
    Dtype,
    Resolved,
    choice,
    flag,
    floating,
    fraction,
    number,
    random_seed,
    size,
)
from fastseq.layers.transformer import ACTIVATIONS, D_MODEL, MAX_LAYERS, NHEAD
from fastseq.models.base import Task, TrainedModel
from fastseq.models.forms import BATCH_SIZE, batched_already, held_out, is_data
from fastseq.models.sums import sums
from fastseq.models.symbols import TokenRows, log_softmax_at, real_steps, token_rows
from fastseq.models.transformer_parts import ACTIVATION, INNER, NORM_FIRST, attention_maps, encode, initialise
from fastseq.training import Batch, History

POOLINGS = ("mean", "cls", "max")
_SMALLEST = 1e-12  # lengths of vectors below it count as it where vectors are normalised
_IGNORED = -1  # a target that does not count


class _EncoderKept(NamedTuple):
    """The tapes of the layers of an encoder model, and what its pooling needs."""

    rows: Rows
    word: Tape
    position: Tape
    type: Tape | None
    norm: Tape
    entering: Tape | None  # of dropout
    encoder: Any
    pooled: Any
    leaving: Tape | None
    head: Tape | None


class TransformerEncoderModel(TrainedModel):
    """A bidirectional Transformer encoder: a vector of each token, one vector of a sequence, or scores of labels.

    The architecture is that of BERT [1]_: embeddings of word, position and type are summed and normalised, and layers
    follow. Their outputs may be pooled, and a head of one linear map may give scores of labels.

    References
    ----------
    .. [1] J. Devlin et al., "BERT: pre-training of deep bidirectional transformers for language understanding",
       NAACL 2019.
    .. [2] N. Reimers and I. Gurevych, "Sentence-BERT: sentence embeddings using Siamese BERT-networks", EMNLP 2019.
    """

    vocab_size: int = size(doc="V; ids are 0..V-1.")
    d_model: int = size(doc=D_MODEL)
    nhead: int = size(doc=NHEAD)
    num_layers: int = size(limit=MAX_LAYERS, doc="Layers of attention and feed-forward.")
    _: KW_ONLY
    dim_feedforward: Resolved[int | None, int] = size(default=None, doc=INNER)
    max_length: int = size(default=512, doc="The most tokens of a sequence.")
    type_vocab_size: int = size(
        default=0, least=0, doc="Kinds of tokens, in BERT the first and the second sentence; 0: no embedding of them."
    )
    dropout: float = fraction(
        default=0.1,
        doc="Share that training drops: of the embeddings, in the layers as `TransformerEncoder` has it, and of what"
        " enters the head.",
    )
    activation: str = choice(ACTIVATIONS, default="gelu", doc=ACTIVATION)
    norm_first: bool = flag(default=False, doc=NORM_FIRST)
    layer_norm_eps: float = number(default=1e-12, least=0, doc="Keeps the roots in the norms away from 0.")
    pooling: str | None = choice(
        POOLINGS,
        default="mean",
        optional=True,
        doc="One vector of a sequence: the mean of its tokens' [2]_, the first one, or the largest of each element."
        " None: a vector of each token.",
    )
    normalize: bool = flag(default=False, doc="Whether the vectors that come out are divided by their length.")
    num_labels: int | None = size(
        default=None,
        doc="A head: scores of so many labels, of each sequence or, without pooling, of each token.",
    )
    dtype: Dtype = floating(default="float32", doc="Of parameters and outputs.")
    seed: int | None = random_seed(default=None, doc="Fixes the initial parameters: normal, of deviation 0.02 [1]_.")
    pooler: bool = flag(
        default=False,
        doc='Whether the vector of a sequence goes through a linear map and tanh, as in BERT; with ``pooling="cls"``.',
    )

    def _resolve(self) -> None:
        if self.pooler and self.pooling != "cls":
            raise ValueError(f"pooling should be 'cls' with pooler=True, not {self.pooling!r}")
        if self.normalize and self.num_labels is not None:
            raise ValueError("normalize should be False where num_labels gives the model a head")
        self.dim_feedforward = self.dim_feedforward or 4 * self.d_model

    def _build(self) -> None:
        seeds = seeds_of(self.seed, 6)
        width, kinds, labels = self.d_model, self.type_vocab_size, self.num_labels
        self._word: Any = self._part(layers.Embedding, self.vocab_size, width, seed=seeds[1])
        self._position: Any = self._part(layers.LearnedPositions, self.max_length, width, seed=seeds[2])
        self._type: Any = self._part(layers.Embedding, kinds, width, seed=seeds[3]) if kinds else None
        self._norm: Any = self._part(layers.LayerNorm, width, eps=self.layer_norm_eps)
        self._encoder: Any = self._part(
            layers.TransformerEncoder,
            self.num_layers,
            width,
            self.nhead,
            self.dim_feedforward,
            dropout=self.dropout,
            activation=self.activation,
            norm_first=self.norm_first,
            layer_norm_eps=self.layer_norm_eps,
            final_norm=self.norm_first,
            seed=seeds[0],
        )
        self._pooler: Any = self._part(layers.Linear, width, width, seed=seeds[5]) if self.pooler else None
        self._head: Any = None if labels is None else self._part(layers.Linear, width, labels, seed=seeds[4])
        self._drop: Any = self._part(layers.Dropout, self.dropout)
        self._start(
            word=self._word,
            position=self._position,
            type=self._type,
            norm=self._norm,
            encoder=self._encoder,
            pooler=self._pooler,
            head=self._head,
        )
        initialise(self, self.num_layers, 1.0)

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
        made, arrays = bert.settings_and_arrays(config, weights, settings)
        model = cls(**made)
        if not model.pooler:
            arrays = {name: array for name, array in arrays.items() if not name.startswith("pooler.")}
        if model.num_labels is not None and "head.weight" not in arrays:
            arrays |= {name: array for name, array in model.state_dict().items() if name.startswith("head.")}
        model.load_state_dict(arrays)
        return model

    def _opened(self, ids: Any, lengths: Any, type_ids: Any) -> tuple[TokenRows, Array | None]:
        """The real tokens, and the type of each."""
        given = token_rows("ids", ids, lengths, self.vocab_size)
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
        types = token_rows("type_ids", type_ids, lengths, self.type_vocab_size)
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
        return out if weights is None else (out, attention_maps(weights, given.rows, given.unbatched))

    def _encoded(self, given: TokenRows, types: Array | None, want_weights: bool = False) -> tuple[Array, Any]:
        """What comes out last, (N or B, d_model or num_labels), and the attention of every layer."""
        rows = given.rows
        x = self._word(given.ids)
        if types is not None:
            x = x + self._type(types)
        x = self._norm(self._position(x, positions=rows.steps()))
        y, weights = encode(self._encoder, x, rows, False, want_weights)
        y, _ = self._pool(y, rows)
        return y if self._head is None else self._head(y), weights

    def _returned(self, y: Array, given: TokenRows) -> Array:
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
            y = self._backend.additive_attention.tanh_forward(z, threads.get_num_threads())
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
            dz = self._backend.additive_attention.tanh_backward(y, np.ascontiguousarray(dy), threads.get_num_threads())
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

    def _through(self, given: TokenRows, types: Array | None, seed: int | None) -> tuple[Array, _EncoderKept]:
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
        context = inside.Context.of(rows, False)
        y, of_encoder = inside.forward_rows(self._encoder, x, context, child_seed(seed, 1))
        y, pooled = self._pool(y, rows, taped=True)
        if self._head is not None:
            if self.dropout:
                y, leaving = self._drop.forward(y, seed=child_seed(seed, 2))
            y, of_head = self._head.forward(y)
        kept = _EncoderKept(
            rows, of_word, of_position, of_type, of_norm, entering, of_encoder, pooled, leaving, of_head
        )
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
        self._back(gradient, kept, grads)

    def _back(self, dy: Array, kept: _EncoderKept, grads: Any) -> None:
        """All layers, in the reverse order of `_through`."""
        targets = self._child_targets(grads)
        if kept.head is not None:
            dy = self._head.backward(dy, kept.head, grads=targets["head"])
            if kept.leaving is not None:
                dy = self._drop.backward(dy, kept.leaving)
        dy = self._unpool(dy, kept.rows, kept.pooled, targets)
        dx, _ = inside.backward_rows(self._encoder, dy, kept.encoder, targets["encoder"])
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

    def _labels(self, name: str, value: Any, given: TokenRows, least: int) -> Array:
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

    def _task(self, batch: Batch, state: Any) -> Task:
        """Return tokens and their types, and as targets the label of each sequence or token; -1 does not count."""
        self._needs_head()
        if batch.targets is None:
            raise ValueError("targets should be given: labels are what the model learns")
        given, types = self._opened(batch.inputs, batch.lengths, None)
        targets = self._labels("targets", batch.targets, given, _IGNORED)
        return Task((given, types), targets, int((targets != _IGNORED).sum()))

    def _taped(self, task: Task, state: Any, seed: int | None) -> tuple[Array, Any, Any]:
        given, types = task.inputs
        scores, kept = self._through(given, types, seed)
        return scores, None, kept

    def _evaluated(self, task: Task, state: Any) -> tuple[Array, Any]:
        return self._encoded(*task.inputs)[0], None

    def _loss(self, outputs: Array, task: Task) -> tuple[float, Array]:
        return losses.softmax_cross_entropy(outputs, task.targets, ignore_index=_IGNORED, _backend=self._backend)

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
        given = token_rows(name, data, lengths, self.vocab_size)
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
