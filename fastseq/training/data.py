"""Data for training: batches of padded sequences, streams of one long sequence, windows over series.

``data.batches(epoch, start=0)`` gives the batches of an epoch from the `start`-th on. Which they are depends on the
seed and the epoch alone, so a run can be taken up again anywhere.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastseq import checks
from fastseq.checks import Array

BUCKET = 32  # batches whose sequences are sorted by length together


class Batch(NamedTuple):
    """What a model learns from in one step.

    Attributes
    ----------
    inputs : ndarray of shape (B, T) or (B, T, I), or dict of ndarray
        Ids, or values; of a graph with several inputs by name.
    targets : ndarray, dict of ndarray, or None
        What should come out: with a time axis as `inputs`, or (B,), one for each sequence; with one of its own where
        there are `target_lengths`; of a graph with several outputs by name. None where the model knows by itself.
    lengths : ndarray of shape (B,) or None
        The real steps of each row; None: all of them.
    fresh : ndarray of shape (B,), bool, or None
        Rows that do not go on where the row of the batch before ended: their carried state is zeroed before this
        batch. None: no state is carried.
    target_lengths : ndarray of shape (B,) or None
        The real steps of each row of targets, where those are sequences of other lengths than the inputs.
    """

    inputs: Any
    targets: Any = None
    lengths: Array | None = None
    fresh: Array | None = None
    target_lengths: Array | None = None

    @property
    def tokens(self) -> int:
        """Time steps in all rows, without the padding; of pairs those of inputs and targets."""
        more = 0 if self.target_lengths is None else int(self.target_lengths.sum())
        if self.lengths is not None:
            return int(self.lengths.sum()) + more
        arrays = list(self.inputs.values()) if isinstance(self.inputs, Mapping) else [self.inputs]
        timed = [array for array in arrays if array.ndim > 2 or array.dtype.kind in "iu"]  # not a vector for each row
        return max(int(np.prod(array.shape[:2])) for array in timed or arrays) + more


class Data(ABC):
    """What the kinds of data share: a seed, and the order of an epoch."""

    _seed: int | None
    _drawn = False  # whether the seed is one that nobody chose

    @abstractmethod
    def __len__(self) -> int:
        """Batches in an epoch."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, counted from 0, from the `start`-th on."""
        checks.size("epoch", epoch)
        if checks.size("start", start) > len(self):
            raise ValueError(f"start should be at most {len(self)}, not {start}")
        return self._batches(epoch, start)

    @abstractmethod
    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The same, of arguments that are checked."""

    def _random(self, epoch: int) -> np.random.Generator:
        """The random numbers of an epoch."""
        assert self._seed is not None
        return np.random.default_rng([self._seed, epoch])

    def _choose_seed(self, seed: Any) -> None:
        known = checks.seed("seed", seed)
        self._drawn = known is None
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if known is None else known

    def seeded(self, seed: int) -> Data:
        """The data as a run takes it: a value of its own, with this seed if nobody chose another."""
        taken = copy.copy(self)
        if self._drawn:
            taken._seed, taken._drawn = checks.size("seed", seed), False
        return taken

    def state_dict(self) -> dict[str, Any]:
        """What a later epoch depends on beside the arrays: the seed; and the number of batches, to know it by."""
        return {"kind": type(self).__name__, "batches": len(self), "seed": self._seed}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave, of data of the same kind and size: the seed, that is."""
        given, own = checks.mapping("mapping", mapping), self.state_dict()
        for name in own:
            if name not in given or (name != "seed" and given[name] != own[name]):
                raise ValueError(f"mapping should have {name}={own[name]!r}, not {given.get(name)!r}")
        seed = checks.seed("seed", given["seed"])
        if (seed is None) != (self._seed is None):
            raise ValueError(f"mapping should have a seed like {self._seed!r}, not {seed!r}")
        self._seed = seed


def _values(name: str, value: Any) -> Array:
    """Ids (N,), or values (N, I); series of one value a step may be (N,) real numbers."""
    array = checks.as_array(name, value)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} should hold integers or real floating numbers, not {array.dtype}")
    if array.dtype.kind == "f" and array.ndim == 1:
        array = array[:, None]
    if array.ndim != (2 if array.dtype.kind == "f" else 1):
        whole = array.dtype.kind in "iu" and array.ndim == 2
        hint = f'; {name}.astype("float32") makes values of integers' if whole else ""
        raise ValueError(
            f"{name} should be ids of shape (N,) or real floating values of shape (N, I), not {array.dtype} of shape"
            f" {array.shape}{hint}"
        )
    return array


def _real(name: str, value: Any) -> Array:
    """Values (N, I), of integers too."""
    array = checks.as_array(name, value)
    return _values(name, array.astype(np.float64) if array.dtype.kind in "iu" else array)


class PaddedBatches(Data):
    """Sequences of any lengths, padded with zeros to the longest of their batch.

    Parameters
    ----------
    sequences : sequence of arrays
        Each (T,) ids or (T, I) values.
    targets : sequence, optional
        One for each sequence: an array whose first axis is the time of its sequence, or a single number. Without
        them ``batch.targets`` is None.
    batch_size : int
        Sequences in a batch; the last of an epoch may have fewer.
    seed : int, optional
        Fixes the order of every epoch. If not given, the seed of the run does.
    shuffle : bool
        Whether every epoch has an order of its own.
    group : bool
        Whether sequences of similar lengths come together, which saves padding: with `shuffle` among those of
        some tens of batches, else among all.
    """

    # What messages call them, and where each stands in what has that name; None: where it stands here.
    _called: tuple[str, str] = ("sequences", "targets")
    _places: Any = None

    def __init__(
        self,
        sequences: Sequence[Any],
        targets: Sequence[Any] | None = None,
        *,
        batch_size: int,
        seed: int | None = None,
        shuffle: bool = True,
        group: bool = True,
    ) -> None:
        if isinstance(sequences, str | bytes) or not isinstance(sequences, Sequence | np.ndarray):
            raise TypeError(f"sequences should be a list of arrays, not {checks.describe(sequences)}")
        if len(sequences) == 0:
            raise ValueError("sequences should hold at least one sequence")
        self._batch_size = checks.size("batch_size", batch_size, 1)
        self._choose_seed(seed)
        self._shuffle = checks.flag("shuffle", shuffle)
        self._group = checks.flag("group", group)
        arrays = [_values(f"sequences[{i}]", sequence) for i, sequence in enumerate(sequences)]
        self._sequences = _with_empty(sequences, arrays)
        _alike("sequences", self._sequences)
        self._targets = None if targets is None else self._checked_targets(targets)
        self._lengths = np.array([len(sequence) for sequence in self._sequences])
        self._sizes = self._lengths  # what sequences are sorted by

    def _not_finite(self) -> str | None:
        """Where the first number stands that is not finite; None: nowhere."""
        for name, rows in zip(self._called, (self._sequences, self._targets or []), strict=True):
            for i, row in enumerate(rows):
                found = _first_not_finite(row)
                if found is not None:
                    place = i if self._places is None else self._places[i]
                    return f"{name}[{place}]{_index(found)} is {row[found]}"
        return None

    def _checked_targets(self, targets: Any) -> list[Array]:
        if isinstance(targets, str | bytes) or not isinstance(targets, Sequence | np.ndarray):
            raise TypeError(f"targets should be a list, one for each sequence, not {checks.describe(targets)}")
        if len(targets) != len(self._sequences):
            raise ValueError(
                f"targets should have one for each of the {len(self._sequences)} sequences, not {len(targets)}"
            )
        arrays = [checks.as_array(f"targets[{i}]", target) for i, target in enumerate(targets)]
        arrays = _with_empty(targets, arrays)
        for i, (target, sequence) in enumerate(zip(arrays, self._sequences, strict=True)):
            if target.dtype.kind not in "iuf":
                hint = f"; targets[{i}].astype(int) makes them of booleans" if target.dtype.kind == "b" else ""
                raise TypeError(f"targets[{i}] should hold integers or real floating numbers, not {target.dtype}{hint}")
            if target.ndim and len(target) != len(sequence):
                hint = "; labels.argmax(-1) makes classes of one-hot labels" if _is_one_hot(target) else ""
                raise ValueError(
                    f"targets[{i}] should be a number or have the {len(sequence)} steps of its sequence,"
                    f" not the shape {target.shape}{hint}"
                )
        _alike("targets", arrays)
        return arrays

    def __len__(self) -> int:
        return -(-len(self._sequences) // self._batch_size)

    def _order(self, epoch: int) -> list[Array]:
        """The indices of the sequences of every batch of an epoch."""
        count, size = len(self._sequences), self._batch_size
        if not self._shuffle:
            order = np.argsort(self._sizes, kind="stable") if self._group else np.arange(count)
            return [order[i : i + size] for i in range(0, count, size)]
        random = self._random(epoch)
        order = random.permutation(count)
        if not self._group:
            return [order[i : i + size] for i in range(0, count, size)]
        for i in range(0, count, BUCKET * size):
            bucket = order[i : i + BUCKET * size]  # a view
            bucket[:] = bucket[np.argsort(self._sizes[bucket], kind="stable")]
        batches = [order[i : i + size] for i in range(0, count, size)]
        return [batches[i] for i in random.permutation(len(batches))]

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        for rows in self._order(epoch)[start:]:
            targets = None
            if self._targets is not None:
                targets = _padded([self._targets[row] for row in rows])
            yield Batch(_padded([self._sequences[row] for row in rows]), targets, self._lengths[rows])


class PairedBatches(PaddedBatches):
    """Pairs of sequences, source and target, each of any length; padded with zeros to the longest of their batch.

    Parameters
    ----------
    sources : sequence of arrays
        Each (S,) ids; at least one.
    targets : sequence of arrays
        Each (T,) ids, one for each source.
    batch_size : int
        Pairs in a batch; the last of an epoch may have fewer.
    seed : int, optional
        Fixes the order of every epoch. If not given, the seed of the run does.
    shuffle : bool
        Whether every epoch has an order of its own; else pairs keep theirs.
    group : bool
        Whether pairs of about the same length, source and target together, stand in one batch, so that there is little
        padding: sorted, with `shuffle` among those of some tens of batches, else among all.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        targets: Sequence[Any],
        *,
        batch_size: int,
        seed: int | None = None,
        shuffle: bool = True,
        group: bool = True,
    ) -> None:
        inputs, outputs = _sequences_of_ids("sources", sources), _sequences_of_ids("targets", targets)
        if len(outputs) != len(inputs):
            raise ValueError(f"targets should have one for each of the {len(inputs)} sources, not {len(outputs)}")
        for i, source in enumerate(inputs):
            if not len(source):
                raise ValueError(f"sources[{i}] should have at least one symbol")
        super().__init__(inputs, outputs, batch_size=batch_size, seed=seed, shuffle=shuffle, group=group)
        self._target_lengths = np.array([len(target) for target in outputs])
        self._sizes = self._lengths + self._target_lengths

    def _checked_targets(self, targets: Any) -> list[Array]:
        return list(targets)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        for rows, batch in zip(self._order(epoch)[start:], super()._batches(epoch, start), strict=True):
            yield batch._replace(target_lengths=self._target_lengths[rows])


def _sequences_of_ids(name: str, value: Any) -> list[Array]:
    """Sequences of ids, each (T,)."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        raise TypeError(f"{name} should be a list of arrays, not {checks.describe(value)}")
    if len(value) == 0:
        raise ValueError(f"{name} should hold at least one sequence")
    arrays = [checks.integers(f"{name}[{i}]", row) for i, row in enumerate(value)]
    for i, array in enumerate(arrays):
        if array.ndim != 1:
            raise ValueError(f"{name}[{i}] should be ids of shape (T,), not {array.shape}")
    # An empty list is an array of floats.
    return [array if array.size else array.astype(np.int64) for array in arrays]


def _with_empty(given: Any, arrays: list[Array]) -> list[Array]:
    """Arrays of what was given; empty lists, which say nothing of what they would hold, are as the others."""
    first = next((array for array in arrays if array.size), None)
    if first is None:
        return arrays
    return [
        np.zeros((0, *first.shape[1:]), first.dtype) if isinstance(one, list | tuple) and len(one) == 0 else array
        for one, array in zip(given, arrays, strict=True)
    ]


def _alike(name: str, arrays: Sequence[Array]) -> None:
    """Arrays that may stand in one: of one kind, and alike beyond their first axis."""
    first = arrays[0]
    for i, array in enumerate(arrays):
        if array.ndim != first.ndim or array.shape[1:] != first.shape[1:] or _is_float(array) != _is_float(first):
            raise ValueError(
                f"{name} should be alike except for their lengths, but {name}[0] is {checks.describe(first)}"
                f" and {name}[{i}] {checks.describe(array)}"
            )


def _is_one_hot(array: Array) -> bool:
    """Whether it looks like one label, or several, of as many numbers as there are classes."""
    return array.shape[-1] > 1 and bool(((array == 0) | (array == 1)).all() and (array.sum(axis=-1) == 1).all())


def _first_not_finite(array: Array) -> tuple[int, ...] | None:
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return None
    return tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])


def _index(place: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, place))}]" if place else ""


def not_finite(data: Any, batch: Batch) -> str | None:
    """Where data holds a number that is not finite, for the message of a step whose loss is not; None: nowhere.

    It is looked for in what `data` was made of, where that is known, and else in the batch of the step.
    """
    if isinstance(data, PaddedBatches):
        return data._not_finite()
    for name in ("inputs", "targets"):
        array = getattr(batch, name)
        found = None if array is None else _first_not_finite(np.asarray(array))
        if found is not None:
            return f"{name}{_index(found)} of the batch is {np.asarray(array)[found]}"
    return None


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f"


def _padded(arrays: Sequence[Array]) -> Array:
    """One array of some, with zeros after those that are shorter; of numbers, an array of them."""
    dtype = np.result_type(*(array.dtype for array in arrays))
    if dtype.kind == "f" and not _is_float(arrays[0]):  # what NumPy makes of int64 and uint64
        dtype = np.dtype(np.int64)
    if arrays[0].ndim == 0:
        return np.array(arrays, dtype)
    whole = np.zeros((len(arrays), max(len(array) for array in arrays), *arrays[0].shape[1:]), dtype)
    for row, array in zip(whole, arrays, strict=True):
        row[: len(array)] = array
    return whole


class Streams(Data):
    """One long sequence as several streams side by side, in chunks; the state is carried from chunk to chunk.

    The targets are the inputs one step later. Every row of a chunk goes on where the same row of the chunk before
    ended; in the first chunk of an epoch all rows are fresh. An epoch has every step once: where the sequence does not
    divide into streams of one length, the last ones are a step longer, and the last chunk has ``lengths``.

    Parameters
    ----------
    ids : array of shape (N,), or (N, I)
        Ids, or values.
    batch_size : int
        Streams, whatever their length; `fitting` takes fewer where they would be short.
    steps : int
        Time steps of a chunk; the last of an epoch may have fewer.
    seed : int, optional
        With it, chunks begin and end elsewhere in every epoch: the first one has fewer steps, as many as are drawn.
        Without, chunks are the same in every epoch.
    """

    def __init__(self, ids: Any, *, batch_size: int, steps: int, seed: int | None = None) -> None:
        self._ids = _values("ids", ids)
        self._batch_size = checks.size("batch_size", batch_size, 1)
        self._steps = checks.size("steps", steps, 1)
        self._seed = checks.seed("seed", seed)
        pairs = len(self._ids) - 1
        if pairs < self._batch_size:
            raise ValueError(
                f"ids should have at least batch_size + 1 = {self._batch_size + 1} steps, not {len(self._ids)}"
            )
        time, longer = divmod(pairs, self._batch_size)
        self._times = np.full(self._batch_size, time)
        # The last ones, so that where a row has ended there still is a step to fill the chunk with.
        self._times[self._batch_size - longer :] += 1
        self._time = int(self._times[-1])
        self._least, self._limit = self._first_chunk()

    @classmethod
    def fitting(cls, ids: Any, *, batch_size: int, steps: int, seed: int | None = None) -> Streams:
        """As many streams, up to `batch_size`, as have at least `steps` steps each; one, if there are none.

        Parameters
        ----------
        ids, steps, seed
            As of `Streams`.
        batch_size : int
            The most streams there may be.

        Returns
        -------
        Streams
        """
        most, pairs = checks.size("batch_size", batch_size, 1), len(_values("ids", ids)) - 1
        fitting = max(1, pairs // checks.size("steps", steps, 1))
        return cls(ids, batch_size=min(most, fitting), steps=steps, seed=seed)

    @property
    def batch_size(self) -> int:
        """Streams side by side."""
        return self._batch_size

    def _first_chunk(self) -> tuple[int, int]:
        """The fewest and the most steps that the first chunk of an epoch may have.

        The first and the last chunk share what the full ones between them leave, so that every epoch has as many
        chunks as the others, and none of them is much shorter than a quarter of the longest.
        """
        rest = (self._time - 1) % self._steps + 1
        if self._seed is None or self._time <= self._steps:
            return self._steps, self._steps
        ends = rest if 2 * rest > self._steps else rest + self._steps
        least = max(ends - self._steps, -(-ends // 4))
        return (least, ends - least) if least < ends - least else (self._steps, self._steps)

    def __len__(self) -> int:
        # However long the first chunk, there are as many.
        return 1 + max(0, -(-(self._time - self._least) // self._steps))

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        head = self._least
        if self._least < self._limit:
            head = int(self._random(epoch).integers(self._least, self._limit + 1))
        first = (np.cumsum(self._times) - self._times)[:, None]
        for index in range(start, len(self)):
            begin = head + (index - 1) * self._steps if index else 0
            end = min(head + index * self._steps, self._time)
            lengths = np.minimum(self._times, end) - begin
            places = first + np.arange(begin, end)
            fresh = np.full(self._batch_size, index == 0)
            ragged = lengths[0] < end - begin
            yield Batch(self._ids[places], self._ids[places + 1], lengths if ragged else None, fresh)


class TextWindows(Data):
    """Windows over texts, each with what follows every symbol; for models that carry no state, as Transformers.

    An epoch has every symbol at least once as a target. A text of at most `steps` symbols is one window, shorter than
    the others, which are all full: a longer text has as many as it takes to cover it, and one more where there would
    be little room to move them, the first at its beginning and the last at its end. They overlap where the text does
    not divide, at places that every epoch draws anew.

    Parameters
    ----------
    ids : array of shape (N,), or list of them
        Texts: ids. A window lies within one text.
    steps : int
        Symbols in a window.
    batch_size : int
        Windows in a batch; the last of an epoch may have fewer.
    begin : int, optional
        The symbol that the first one of a text follows. None: nothing is learnt about the first one, which then is an
        input only.
    seed : int, optional
        Fixes the windows and the order of every epoch. If not given, the seed of the run does.
    shuffle : bool
        Whether windows move and come in an order of their own in every epoch; else they are spaced evenly, and come
        one after the other.
    """

    def __init__(
        self,
        ids: Any,
        *,
        steps: int,
        batch_size: int,
        begin: int | None = None,
        seed: int | None = None,
        shuffle: bool = True,
    ) -> None:
        several = isinstance(ids, list | tuple) and any(not isinstance(one, int | np.integer) for one in ids)
        names = [f"ids[{i}]" for i in range(len(ids))] if several else ["ids"]
        texts = [checks.integers(n, one) for n, one in zip(names, ids if several else [ids], strict=True)]
        self._steps = checks.size("steps", steps, 1)
        self._batch_size = checks.size("batch_size", batch_size, 1)
        first = None if begin is None else checks.size("begin", begin)
        self._choose_seed(seed)
        self._shuffle = checks.flag("shuffle", shuffle)
        least = 1 if begin is not None else 2
        for name, text in zip(names, texts, strict=True):
            if text.ndim != 1:
                raise ValueError(f"{name} should be ids of shape (N,), not {text.shape}")
            if len(text) < least:
                raise ValueError(f"{name} should have at least {least} symbols, not {len(text)}")
        self._texts = [text if first is None else np.concatenate([[first], text]) for text in texts]
        self._counts = np.array([self._windows_of(len(text) - 1) for text in self._texts])

    def _windows_of(self, symbols: int) -> int:
        """In how many windows so many symbols are."""
        count = -(-symbols // self._steps)
        room = count * self._steps - symbols
        return count + (count >= 4 and 4 * room < self._steps)

    def __len__(self) -> int:
        return -(-int(self._counts.sum()) // self._batch_size)

    def _starts(self, symbols: int, count: int, random: np.random.Generator | None) -> Array:
        """Where the windows of a text begin, in their order; none is further from the one before than its steps."""
        last = max(0, symbols - self._steps)
        if random is None or count < 3:
            return np.linspace(0, last, count).astype(np.int64)
        # What is too much is taken off the distances, in shares that are drawn.
        much = (count - 1) * self._steps - last
        taken = np.sort(random.integers(0, much + 1, count - 2))
        starts = np.arange(count) * self._steps - np.concatenate([[0], taken, [much]])
        inside: Array = np.clip(starts, 0, last)
        return inside

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        random = self._random(epoch) if self._shuffle else None
        windows = [
            (text, int(at))
            for text, count in zip(self._texts, self._counts, strict=True)
            for at in self._starts(len(text) - 1, int(count), random)
        ]
        order = np.arange(len(windows)) if random is None else random.permutation(len(windows))
        for index in range(start, len(self)):
            rows = [windows[i] for i in order[index * self._batch_size : (index + 1) * self._batch_size]]
            cut = [text[at : at + self._steps + 1] for text, at in rows]
            yield _batch_of([one[:-1] for one in cut], [one[1:] for one in cut])


class Windows(Data):
    """Windows over series of values; the targets are the same windows some steps later.

    An epoch has every window of every series. A series too short for one, where others are not, is in it as a shorter
    window: whole, with zeros after it, and its batch has ``lengths``.

    Parameters
    ----------
    series : array of shape (N,) or (N, I), or list of them
        Real numbers; a window lies within one series, of at least ``horizon + 1`` steps. Integers become float64.
    steps : int
        Time steps of a window.
    horizon : int
        How many steps later the targets are.
    batch_size : int
        Windows in a batch; the last of an epoch may have fewer.
    seed : int, optional
        Fixes the order of every epoch. If not given, the seed of the run does.
    shuffle : bool
        Whether every epoch has an order of its own; else windows come one after the other.
    """

    def __init__(
        self,
        series: Any,
        *,
        steps: int,
        horizon: int = 1,
        batch_size: int,
        seed: int | None = None,
        shuffle: bool = True,
    ) -> None:
        several = isinstance(series, list | tuple) and any(
            not isinstance(one, int | float | np.number) for one in series
        )
        names = [f"series[{i}]" for i in range(len(series))] if several else ["series"]
        self._series = [_real(n, one) for n, one in zip(names, series if several else [series], strict=True)]
        _alike("series", self._series)
        self._steps = checks.size("steps", steps, 1)
        self._horizon = checks.size("horizon", horizon, 1)
        self._batch_size = checks.size("batch_size", batch_size, 1)
        self._choose_seed(seed)
        self._shuffle = checks.flag("shuffle", shuffle)
        least = self._horizon + 1
        short = [i for i, one in enumerate(self._series) if len(one) < least]
        if short:
            others = f", as of {len(short)} of {len(self._series)} series" if len(short) > 1 else ""
            raise ValueError(
                f"{names[short[0]]} should have at least horizon + 1 = {least} steps,"
                f" not {len(self._series[short[0]])}{others}"
            )
        counts = [len(one) - self._steps - self._horizon + 1 for one in self._series]
        if max(counts) < 1:
            raise ValueError(
                f"series should have at least steps + horizon = {self._steps + self._horizon} steps in one series,"
                f" not {max(len(one) for one in self._series)}"
            )
        counts = [max(1, count) for count in counts]
        self._ends = np.cumsum(counts)  # windows in this series and those before it

    def __len__(self) -> int:
        return -(-int(self._ends[-1]) // self._batch_size)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        count = int(self._ends[-1])
        order = self._random(epoch).permutation(count) if self._shuffle else np.arange(count)
        for index in range(start, len(self)):
            windows = order[index * self._batch_size : (index + 1) * self._batch_size]
            which = np.searchsorted(self._ends, windows, side="right")
            firsts = windows - np.concatenate([[0], self._ends])[which]
            inputs, targets = [], []
            for number, first in zip(which, firsts, strict=True):
                one = self._series[number]
                targets.append(one[first + self._horizon : first + self._horizon + self._steps])
                inputs.append(one[first : first + len(targets[-1])])
            yield _batch_of(inputs, targets)


def _batch_of(inputs: Sequence[Array], targets: Sequence[Array]) -> Batch:
    """A batch of windows; with lengths, unless all have as many steps."""
    lengths = np.array([len(one) for one in inputs])
    return Batch(_padded(inputs), _padded(targets), None if (lengths == lengths[0]).all() else lengths)


class Listed(Data):
    """Batches that somebody made, in their order."""

    def __init__(self, name: str, batches: Sequence[Any]) -> None:
        self._made = []
        self._seed = None
        for i, batch in enumerate(batches):
            if not isinstance(batch, tuple) or not 1 <= len(batch) <= len(Batch._fields):
                raise TypeError(f"{name}[{i}] should be a Batch, not {checks.describe(batch)}{_AS_TUPLE}")
            made = Batch(*batch)
            arrays = {field: _arrays(f"{name}[{i}].{field}", value) for field, value in made._asdict().items()}
            self._made.append(Batch(**arrays))

    def __len__(self) -> int:
        return len(self._made)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        yield from self._made[start:]


def _arrays(name: str, value: Any) -> Any:
    """An array, or arrays by name; None stays None."""
    if isinstance(value, Mapping):
        return {key: checks.as_array(f"{name}[{key!r}]", one) for key, one in value.items()}
    return None if value is None else checks.as_array(name, value)


_AS_TUPLE = "; x and y are given as a tuple (x, y) of arrays or lists of rows"


def _is_of_torch(value: Any) -> bool:
    return any(cls.__module__.partition(".")[0] == "torch" for cls in type(value).__mro__)


def checked(name: str, value: Any) -> Any:
    """Data as `fit` takes it: anything with `batches` and a length, or a list of batches."""
    if isinstance(value, list | tuple) and not isinstance(value, Batch):
        value = Listed(name, value)
    if not callable(getattr(value, "batches", None)) or not hasattr(value, "__len__"):
        parts = " of NumPy, as in tuple(part.numpy() for part in dataset.tensors)" if _is_of_torch(value) else ""
        raise TypeError(
            f"{name} should be PaddedBatches, PairedBatches, Streams, TextWindows, Windows, a list of Batch or anything"
            f" with batches(epoch, start) and a length, not {checks.describe(value)}{_AS_TUPLE}{parts}"
        )
    if len(value) == 0:
        raise ValueError(f"{name} should have at least one batch")
    return value


def seeded(data: Any, seed: int) -> Any:
    """Data as a run takes it: what it does with it changes nothing of what was given."""
    return data.seeded(seed) if isinstance(data, Data) else data
