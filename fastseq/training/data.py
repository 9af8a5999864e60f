"""Data for training: batches of padded sequences, streams of one long sequence, windows over series.

``data.batches(epoch, start=0)`` gives the batches of an epoch from the `start`-th on. Which they are depends on the
seed and the epoch alone, so a run can be taken up again anywhere.
"""

from __future__ import annotations

import copy
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
    inputs : ndarray of shape (B, T) or (B, T, I)
        Ids, or values.
    targets : ndarray or None
        What should come out: with a time axis as `inputs`, or (B,), one for each sequence; with one of its own where
        there are `target_lengths`. None where the model knows by itself.
    lengths : ndarray of shape (B,) or None
        The real steps of each row; None: all of them.
    fresh : ndarray of shape (B,), bool, or None
        Rows that do not go on where the row of the batch before ended: their carried state is zeroed before this
        batch. None: no state is carried.
    target_lengths : ndarray of shape (B,) or None
        The real steps of each row of targets, where those are sequences of other lengths than the inputs.
    """

    inputs: Array
    targets: Array | None = None
    lengths: Array | None = None
    fresh: Array | None = None
    target_lengths: Array | None = None

    @property
    def tokens(self) -> int:
        """Time steps in all rows, without the padding; of pairs those of inputs and targets."""
        more = 0 if self.target_lengths is None else int(self.target_lengths.sum())
        if self.lengths is not None:
            return int(self.lengths.sum()) + more
        return int(np.prod(self.inputs.shape[:2])) + more


class Data:
    """What the kinds of data share: a seed, and the order of an epoch."""

    _seed: int | None
    _drawn = False  # whether the seed is one that nobody chose

    def __len__(self) -> int:
        """Batches in an epoch."""
        raise NotImplementedError

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, counted from 0, from the `start`-th on."""
        checks.size("epoch", epoch)
        if checks.size("start", start) > len(self):
            raise ValueError(f"start should be at most {len(self)}, not {start}")
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        raise NotImplementedError

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
        raise ValueError(f"{name} should be ids of shape (N,) or values of shape (N, I), not {array.shape}")
    return array


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
        self._sequences = [_values(f"sequences[{i}]", sequence) for i, sequence in enumerate(sequences)]
        _alike("sequences", self._sequences)
        self._targets = None if targets is None else self._checked_targets(targets)
        self._lengths = np.array([len(sequence) for sequence in self._sequences])
        self._sizes = self._lengths  # what sequences are sorted by

    def _checked_targets(self, targets: Any) -> list[Array]:
        if isinstance(targets, str | bytes) or not isinstance(targets, Sequence | np.ndarray):
            raise TypeError(f"targets should be a list, one for each sequence, not {checks.describe(targets)}")
        if len(targets) != len(self._sequences):
            raise ValueError(
                f"targets should have one for each of the {len(self._sequences)} sequences, not {len(targets)}"
            )
        arrays = [checks.as_array(f"targets[{i}]", target) for i, target in enumerate(targets)]
        for i, (target, sequence) in enumerate(zip(arrays, self._sequences, strict=True)):
            if target.dtype.kind not in "iuf":
                raise TypeError(f"targets[{i}] should hold integers or real floating numbers, not {target.dtype}")
            if target.ndim and len(target) != len(sequence):
                raise ValueError(
                    f"targets[{i}] should be a number or have the {len(sequence)} steps of its sequence,"
                    f" not the shape {target.shape}"
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


def _alike(name: str, arrays: Sequence[Array]) -> None:
    """Arrays that may stand in one: of one kind, and alike beyond their first axis."""
    first = arrays[0]
    for i, array in enumerate(arrays):
        if array.ndim != first.ndim or array.shape[1:] != first.shape[1:] or _is_float(array) != _is_float(first):
            raise ValueError(
                f"{name} should be alike but for their lengths, but {name}[0] is {checks.describe(first)}"
                f" and {name}[{i}] {checks.describe(array)}"
            )


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f"


def _padded(arrays: Sequence[Array]) -> Array:
    """One array of some, with zeros after those that are shorter; of numbers, an array of them."""
    dtype = np.result_type(*(array.dtype for array in arrays))
    if arrays[0].ndim == 0:
        return np.array(arrays, dtype)
    whole = np.zeros((len(arrays), max(len(array) for array in arrays), *arrays[0].shape[1:]), dtype)
    for row, array in zip(whole, arrays, strict=True):
        row[: len(array)] = array
    return whole


class Streams(Data):
    """One long sequence as several streams side by side, in chunks; the state is carried from chunk to chunk.

    The targets are the inputs one step later. Every row of a chunk goes on where the same row of the chunk before
    ended; in the first chunk of an epoch all rows are fresh.

    Parameters
    ----------
    ids : array of shape (N,), or (N, I)
        Ids, or values.
    batch_size : int
        Streams.
    steps : int
        Time steps of a chunk; the last of an epoch may have fewer.
    seed : int, optional
        With it, every epoch starts at a place of its own within the first `steps`, so that chunks begin and end
        elsewhere. Without, at the first step.
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
        # Starting later may not cost any stream its last step.
        self._shifts = 1 if self._seed is None else min(self._steps, pairs - self._batch_size + 1)
        self._time = (pairs - (self._shifts - 1)) // self._batch_size

    def __len__(self) -> int:
        return -(-self._time // self._steps)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        shift = 0 if self._seed is None else int(self._random(epoch).integers(self._shifts))
        first = shift + self._time * np.arange(self._batch_size)[:, None]
        for index in range(start, len(self)):
            places = np.arange(index * self._steps, min((index + 1) * self._steps, self._time))
            fresh = np.full(self._batch_size, index == 0)
            yield Batch(self._ids[first + places], self._ids[first + places + 1], None, fresh)


class Windows(Data):
    """Windows over series of values; the targets are the same windows some steps later.

    Parameters
    ----------
    series : array of shape (N,) or (N, I), or list of them
        Real floating numbers; a window lies within one series.
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
        self._series = [_values(n, one) for n, one in zip(names, series if several else [series], strict=True)]
        for name, one in zip(names, self._series, strict=True):
            if one.dtype.kind != "f":
                raise TypeError(f"{name} should hold real floating numbers, not {one.dtype}")
        _alike("series", self._series)
        self._steps = checks.size("steps", steps, 1)
        self._horizon = checks.size("horizon", horizon, 1)
        self._batch_size = checks.size("batch_size", batch_size, 1)
        self._choose_seed(seed)
        self._shuffle = checks.flag("shuffle", shuffle)
        counts = [max(0, len(one) - self._steps - self._horizon + 1) for one in self._series]
        self._ends = np.cumsum(counts)  # windows in this series and those before it
        if not self._ends[-1]:
            raise ValueError(
                f"series should have at least steps + horizon = {self._steps + self._horizon} steps,"
                f" not {max(len(one) for one in self._series)}"
            )

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
                inputs.append(one[first : first + self._steps])
                targets.append(one[first + self._horizon : first + self._horizon + self._steps])
            yield Batch(_padded(inputs), _padded(targets))


class Listed(Data):
    """Batches that somebody made, in their order."""

    def __init__(self, name: str, batches: Sequence[Any]) -> None:
        self._made = []
        self._seed = None
        for i, batch in enumerate(batches):
            if not isinstance(batch, tuple) or not 1 <= len(batch) <= len(Batch._fields):
                raise TypeError(f"{name}[{i}] should be a Batch, not {checks.describe(batch)}")
            made = Batch(*batch)
            arrays = {
                field: None if value is None else checks.as_array(f"{name}[{i}].{field}", value)
                for field, value in made._asdict().items()
            }
            self._made.append(Batch(**arrays))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._made)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        yield from self._made[start:]


def checked(name: str, value: Any) -> Any:
    """Data as `fit` takes it: anything with `batches` and a length, or a list of batches."""
    if isinstance(value, list | tuple) and not isinstance(value, Batch):
        value = Listed(name, value)
    if not callable(getattr(value, "batches", None)) or not hasattr(value, "__len__"):
        raise TypeError(
            f"{name} should be PaddedBatches, PairedBatches, Streams, Windows, a list of Batch or anything with"
            f" batches(epoch, start) and a length, not {checks.describe(value)}"
        )
    if len(value) == 0:
        raise ValueError(f"{name} should have at least one batch")
    return value


def seeded(data: Any, seed: int) -> Any:
    """Data as a run takes it: what it does with it changes nothing of what was given."""
    return data.seeded(seed) if isinstance(data, Data) else data
