"""Arguments of `fit` in the forms that people give them: names of optimisers, losses and metrics, arrays as data."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastseq import backend, checks, elsewhere, losses
from fastseq.checks import Array
from fastseq.layers.base import Layer
from fastseq.training import metrics as known_metrics
from fastseq.training.data import Batch, PaddedBatches
from fastseq.training.optimisers import SGD, Adam, AdamW, Optimiser, RMSProp

EPOCHS = 10  # where neither epochs nor steps are given
BATCH_SIZE = 32

OPTIMISERS = {"sgd": SGD, "rmsprop": RMSProp, "adam": Adam, "adamw": AdamW}


def named(
    name: str, value: str, known: Mapping[str, Any], *, short: Mapping[str, str] = {}, others: Mapping[str, str] = {}
) -> Any:
    """What stands under a name, if need be written otherwise: "Adam", "mean-squared-error".

    Parameters
    ----------
    name, value : str
        The argument, and what it was.
    known : mapping from str
        What there is.
    short : mapping from str to str
        Other names of what there is.
    others : mapping from str to str
        What to say of names of what there is not.
    """
    plain = {_plain(key): key for key in known} | {_plain(key): meant for key, meant in short.items()}
    key = plain.get(_plain(value))
    if key is None:
        near = difflib.get_close_matches(value.lower(), list(known), 1)
        hint = f"; {near[0]!r} may be meant" if near else ""
        hint = next((f"; {hint}" for other, hint in others.items() if _plain(other) == _plain(value)), hint)
        raise ValueError(f"{name} should be one of {', '.join(map(repr, known))}, not {value!r}{hint}")
    return known[key]


def _plain(name: str) -> str:
    """A name however it is written."""
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


def optimiser_of(model: Layer, optimiser: Any, optimizer: Any, lr: Any, scheduled: bool) -> Optimiser:
    """The optimiser: as given, made of its name, or AdamW."""
    if optimizer is not None:
        if optimiser is not None:
            raise TypeError("optimiser and optimizer are one argument in two spellings; give one of them")
        optimiser = optimizer
    rate = None if lr is None else checks.number("lr", lr, least=0)
    if isinstance(optimiser, Optimiser):
        if rate is not None:
            raise ValueError(
                f"lr should be None where optimiser is {type(optimiser).__name__}(lr={optimiser.lr:g}), which has one;"
                f" not {rate:g}"
            )
        if optimiser.layer is not model:
            raise ValueError("optimiser should be of the model that is trained, not of another layer")
        return optimiser
    if rate is not None and scheduled:
        raise ValueError(f"lr should be None with a schedule, which says the rate of every step; not {rate:g}")
    if optimiser is None:
        kind: Any = AdamW
    elif isinstance(optimiser, str):
        kind = named("optimiser", optimiser, OPTIMISERS)
    else:
        made = isinstance(optimiser, type) and issubclass(optimiser, Optimiser)
        hint = f"; give one that is made, {optimiser.__name__}(model, lr)" if made else ""
        raise TypeError(
            f"optimiser should be an optimiser of fastseq.training or one of {', '.join(map(repr, OPTIMISERS))},"
            f" not {checks.describe(optimiser)}{hint}"
        )
    if kind is SGD and rate is None:
        if not scheduled:
            raise ValueError("lr should be given with optimiser='sgd', which has no rate that suits many models")
        rate = 1.0  # that of every step is the schedule's
    made_of: Optimiser = kind(model) if rate is None else kind(model, rate)
    return made_of


class Loss(NamedTuple):
    """A loss function, and what its value is called."""

    function: Callable[..., Any]
    label: str = "loss"
    unit: str = ""


_LABELS = {
    "softmax_cross_entropy": ("cross-entropy", "nats"),
    "binary_cross_entropy_with_logits": ("binary cross-entropy", "nats"),
    "mean_squared_error": ("mean squared error", ""),
    "huber": ("Huber loss", ""),
}
_LOSSES = {
    "cross_entropy": "softmax_cross_entropy",
    "mean_squared_error": "mean_squared_error",
    "binary_cross_entropy": "binary_cross_entropy_with_logits",
    "huber": "huber",
}


def loss_of(value: Any, dtype: np.dtype[Any]) -> Loss:
    """A loss that was given as a function or by its name."""
    if isinstance(value, str):
        known = {**_LOSSES, **{name: name for name in _LABELS}}
        offered = {key: known[key] for key in _LOSSES} if value not in known else known
        name = named("loss", value, offered, short=elsewhere.LOSSES, others=elsewhere.OTHER_LOSSES)
        return Loss(_by_name(name, dtype), *_LABELS[name])
    if not callable(value):
        raise TypeError(
            f"loss should be a function or one of {', '.join(map(repr, _LOSSES))} where a layer is trained,"
            f" not {checks.describe(value)}"
        )
    function = value
    while hasattr(function, "func"):  # as of functools.partial
        function = function.func
    own = getattr(function, "__module__", "") in ("fastseq.losses", "fastseq.reference.losses")
    return Loss(value, *_LABELS.get(getattr(function, "__name__", "") if own else "", ()))


def _by_name(name: str, dtype: np.dtype[Any]) -> Callable[..., Any]:
    """A loss of ours that takes targets as people have them: integers for reals, the last axis of 1 left out."""
    function: Callable[..., Any] = backend.for_dtype(dtype).over(getattr(losses, name), losses.__name__)
    if name == "softmax_cross_entropy":
        return function

    def loss(outputs: Array, targets: Any, *, lengths: Any = None) -> tuple[float, Array]:
        array = checks.as_array("targets", targets)
        if outputs.shape == (*array.shape, 1):
            array = array[..., None]
        if array.dtype.kind in "iu":
            array = array.astype(outputs.dtype)
        result: tuple[float, Array] = function(outputs, array, lengths=lengths)
        return result

    return loss


def metrics_of(value: Any) -> dict[str, Callable[..., Any]]:
    """Metrics by name: of a mapping from names to functions, or of names and functions."""
    known = {name: getattr(known_metrics, name) for name in known_metrics.__all__}
    if isinstance(value, Mapping):
        for name, function in checks.mapping("metrics", value).items():
            if not callable(function):
                raise TypeError(f"metrics[{name!r}] should be a function, not {checks.describe(function)}")
        return dict(value)
    if isinstance(value, str) or callable(value):
        value = [value]
    if not isinstance(value, Sequence):
        raise TypeError(
            f"metrics should be a list of names and functions, or a mapping from names to functions,"
            f" not {checks.describe(value)}"
        )
    result: dict[str, Callable[..., Any]] = {}
    for i, one in enumerate(value):
        if isinstance(one, str):
            one = named(f"metrics[{i}]", one, known, short=elsewhere.METRICS)
        name = getattr(one, "__name__", "")
        if not callable(one):
            raise TypeError(f"metrics[{i}] should be a function or a name, not {checks.describe(one)}")
        if not name.isidentifier():
            raise ValueError(f"metrics should be a mapping from names where a function has none, as metrics[{i}]")
        if name in result:
            raise ValueError(f"metrics should have every name once, but {name!r} is there twice")
        result[name] = one
    return result


class Rows(NamedTuple):
    """Sequences and their targets, given as arrays or lists."""

    sequences: list[Any]
    targets: list[Any]
    name: str = "data"
    places: Any = None  # of each among those that were given; None: they are those

    def batches(self, batch_size: int, *, shuffle: bool = True) -> PaddedBatches:
        """The rows as data of the trainer."""
        made = PaddedBatches(self.sequences, self.targets, batch_size=batch_size, shuffle=shuffle)
        made._called, made._places = (f"{self.name}: x", f"{self.name}: y"), self.places
        return made

    def split(self, share: float, seed: int) -> tuple[Rows, Rows]:
        """Those to learn from and those held out."""
        parts = held_out(len(self.sequences), share, seed)
        one, other = (Rows([self.sequences[i] for i in p], [self.targets[i] for i in p], self.name, p) for p in parts)
        return one, other


def held_out(count: int, share: float, seed: int) -> tuple[Array, Array]:
    """The indices of the sequences to learn from, and of those held out for validation, at least one of each.

    Parameters
    ----------
    count : int
        How many sequences there are.
    share : float
        Of them are held out, rounded.
    seed : int
        Fixes which.
    """
    if count < 2:
        raise ValueError(f"validation_split should be None where there are less than 2 sequences, not {share:g}")
    held = min(max(round(share * count), 1), count - 1)
    order = np.random.default_rng([seed, 2, count]).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


def split_share(value: Any) -> float:
    """The argument validation_split."""
    return checks.number("validation_split", value, above=0, below=1)


def rows_of(name: str, value: Any) -> Rows | None:
    """Sequences and targets, where data is a tuple of them: (x, y) or (x, y, lengths); else None."""
    if not isinstance(value, tuple) or isinstance(value, Batch) or all(isinstance(one, Batch) for one in value):
        return None
    if len(value) not in (2, 3):
        raise ValueError(f"{name} should be (x, y) or (x, y, lengths) where it is a tuple, not {len(value)} things")
    x, y, *more = value
    for part, what in ((x, "x"), (y, "y")):
        if isinstance(part, str | bytes) or not (isinstance(part, list | tuple) or hasattr(part, "__array__")):
            raise TypeError(f"{name}: {what} should be an array or a list of arrays, not {checks.describe(part)}")
    sequences = _split_up(f"{name}: x", x)
    targets = _split_up(f"{name}: y", y)
    if len(sequences) != len(targets):
        raise ValueError(
            f"{name}: y should have a target for each of the {len(sequences)} sequences, not {len(targets)}"
        )
    if more:
        sequences, targets = _cut(name, sequences, targets, more[0])
    return Rows(sequences, targets, name)


def _split_up(name: str, value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return list(value)
    array = checks.as_array(name, value)
    if not array.ndim:
        raise ValueError(f"{name} should have an axis of sequences, not the shape ()")
    return list(array)


def _cut(name: str, sequences: list[Any], targets: list[Any], lengths: Any) -> tuple[list[Any], list[Any]]:
    """Rows without their padding; targets with a time axis too."""
    rows = [checks.as_array(f"{name}: x[{i}]", row) for i, row in enumerate(sequences)]
    sizes = {row.shape[:1] for row in rows}
    if len(sizes) > 1 or () in sizes:
        raise ValueError(f"{name}: x should be an array of padded rows where lengths are given")
    ((time,),) = sizes or {(0,)}
    known = checks.lengths(lengths, len(rows), time, f"{name}: lengths")
    wanted = [checks.as_array(f"{name}: y[{i}]", target) for i, target in enumerate(targets)]
    cut = [one[:n] if one.ndim and len(one) == time else one for one, n in zip(wanted, known, strict=True)]
    return [row[:n] for row, n in zip(rows, known, strict=True)], cut
