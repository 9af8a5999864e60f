"""Data for training: what is in the batches, that seed and epoch decide it, and that any of them can come first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from common import assert_same_bits
from learners import series

from fastseq.training import Batch, PaddedBatches, PairedBatches, Streams, TextWindows, Windows

RNG = np.random.default_rng(0)
LENGTHS = [int(n) for n in RNG.integers(1, 40, 203)]
# Every id says which sequence it is of, and where in it.
IDS = [np.arange(n) + 1000 * (i + 1) for i, n in enumerate(LENGTHS)]
# Of other lengths than those, one of them 0.
OTHERS = [-np.arange(n) - 1000 * (i + 1) for i, n in enumerate(RNG.permutation([0, *LENGTHS[1:]]))]
VALUES = [np.stack([ids, -ids], 1).astype("float32") for ids in IDS]


def kinds(seed: int) -> dict[str, Any]:
    return {
        "padded": PaddedBatches(IDS, batch_size=10, seed=seed),
        "padded_ungrouped": PaddedBatches(IDS, IDS, batch_size=10, seed=seed, group=False),
        "paired": PairedBatches(IDS, OTHERS, batch_size=10, seed=seed),
        "streams": Streams(np.arange(1000), batch_size=7, steps=9, seed=seed),
        "text_windows": TextWindows(np.arange(1000), steps=11, batch_size=16, seed=seed),
        "windows": Windows(series(), steps=11, batch_size=16, seed=seed),
    }


KINDS = pytest.mark.parametrize("kind", kinds(0))


def arrays(batches: Any) -> list[Any]:
    return [array for batch in batches for array in batch if array is not None]


@KINDS
def test_an_epoch_is_the_same_again_and_can_start_anywhere(kind: str) -> None:
    one, other = kinds(3)[kind], kinds(3)[kind]
    for epoch in (0, 1, 5):
        whole = list(one.batches(epoch))
        assert len(whole) == len(one)
        assert all(isinstance(batch, Batch) for batch in whole)
        for start in (0, 1, len(one) // 2, len(one) - 1, len(one)):
            assert_same_bits(arrays(other.batches(epoch, start)), arrays(whole[start:]))


@KINDS
def test_epochs_and_seeds_differ(kind: str) -> None:
    firsts = [next(data.batches(epoch)).inputs for data in (kinds(3)[kind], kinds(4)[kind]) for epoch in range(3)]
    distinct = {array.tobytes() for array in firsts}
    assert len(distinct) > 3


@KINDS
def test_a_state_brings_the_seed(kind: str) -> None:
    one, other = kinds(3)[kind], kinds(4)[kind]
    other.load_state_dict(one.state_dict())
    assert_same_bits(arrays(other.batches(2)), arrays(one.batches(2)))
    for wrong in ({**one.state_dict(), "batches": 1}, {**one.state_dict(), "kind": "Others"}, {"seed": 3}):
        with pytest.raises(ValueError, match="mapping"):
            other.load_state_dict(wrong)
    with pytest.raises(ValueError, match="seed"):
        other.load_state_dict({**one.state_dict(), "seed": None})


@KINDS
def test_bad_positions(kind: str) -> None:
    data = kinds(0)[kind]
    with pytest.raises(ValueError, match="epoch"):
        data.batches(-1)
    with pytest.raises(TypeError, match="start"):
        data.batches(0, 0.5)
    with pytest.raises(ValueError, match="start"):
        data.batches(0, len(data) + 1)


def test_a_seed_that_nobody_chose_is_that_of_the_run() -> None:
    for make in (
        lambda **seed: PaddedBatches(IDS, batch_size=10, **seed),
        lambda **seed: PairedBatches(IDS, OTHERS, batch_size=10, **seed),
        lambda **seed: TextWindows(np.arange(1000), steps=11, batch_size=16, **seed),
        lambda **seed: Windows(series(), steps=11, batch_size=16, **seed),
    ):
        free, chosen = make(), make(seed=4)
        assert_same_bits(arrays(free.batches(0)), arrays(free.batches(0)))
        before = free.state_dict()
        assert_same_bits(arrays(free.seeded(4).batches(1)), arrays(chosen.batches(1)))
        assert_same_bits(arrays(chosen.seeded(9).batches(1)), arrays(chosen.batches(1)))
        assert free.state_dict() == before
    stream = Streams(np.arange(1000), batch_size=7, steps=9)
    assert_same_bits(arrays(stream.seeded(4).batches(1)), arrays(stream.batches(0)))


# Padded batches


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("group", [True, False])
def test_every_sequence_comes_once_whole_and_padded(shuffle: bool, group: bool) -> None:
    labels = np.arange(len(IDS))
    targets = [-ids for ids in IDS]
    plain = PaddedBatches(IDS, targets, batch_size=10, seed=1, shuffle=shuffle, group=group)
    labelled = PaddedBatches(VALUES, labels, batch_size=10, seed=1, shuffle=shuffle, group=group)
    seen: list[int] = []
    for ids, values in zip(plain.batches(0), labelled.batches(0), strict=True):
        assert ids.lengths is not None and ids.targets is not None and values.targets is not None
        assert_same_bits(values.lengths, ids.lengths)
        assert ids.inputs.shape == (len(ids.lengths), ids.lengths.max()) == values.inputs.shape[:2]
        assert values.targets.shape == (len(ids.lengths),)
        assert ids.fresh is None and ids.tokens == ids.lengths.sum()
        for row, length in enumerate(ids.lengths):
            which = int(ids.inputs[row, 0]) // 1000 - 1
            seen.append(which)
            assert values.targets[row] == which
            np.testing.assert_array_equal(ids.inputs[row, :length], IDS[which])
            np.testing.assert_array_equal(ids.targets[row, :length], targets[which])
            np.testing.assert_array_equal(values.inputs[row, :length], VALUES[which])
            assert not ids.inputs[row, length:].any() and not ids.targets[row, length:].any()
            assert not values.inputs[row, length:].any()
    assert sorted(seen) == list(range(len(IDS)))
    if not shuffle and not group:
        assert seen == list(range(len(IDS)))
    if not shuffle:
        assert_same_bits(arrays(plain.batches(1)), arrays(plain.batches(0)))


def test_grouping_saves_padding() -> None:
    def padding(**options: bool) -> int:
        data = PaddedBatches(IDS, batch_size=10, seed=1, **options)
        return sum(batch.inputs.size - batch.tokens for batch in data.batches(0))

    assert padding(group=True) < padding(group=False) / 4
    assert padding(group=True, shuffle=False) < padding(group=False) / 4
    # Of more sequences than are sorted together, too.
    many = [IDS[i] for i in np.random.default_rng(1).integers(len(IDS), size=1500)]

    def share(group: bool) -> float:
        batches = list(PaddedBatches(many, batch_size=10, seed=1, group=group).batches(0))
        return 1 - sum(batch.tokens for batch in batches) / sum(batch.inputs.size for batch in batches)

    assert share(group=True) < 0.1 < 0.3 < share(group=False)
    # And yet batches do not come by their length.
    longest = [batch.inputs.shape[1] for batch in PaddedBatches(IDS, batch_size=10, seed=1).batches(0)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_sequences_may_be_lists_rows_or_empty() -> None:
    (batch,) = PaddedBatches([[1, 2, 3], [4], np.zeros(0, int)], batch_size=5, shuffle=False, group=False).batches(0)
    np.testing.assert_array_equal(batch.inputs, [[1, 2, 3], [4, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(batch.lengths, [3, 1, 0])
    assert batch.targets is None
    (batch,) = PaddedBatches(np.arange(6).reshape(2, 3), batch_size=5, shuffle=False).batches(0)
    np.testing.assert_array_equal(batch.inputs, [[0, 1, 2], [3, 4, 5]])
    mixed = [np.arange(3, dtype=np.uint64), np.arange(2, dtype=np.int8), []]
    (batch,) = PaddedBatches(mixed, [np.uint64(1), np.int64(2), 3], batch_size=5, shuffle=False, group=False).batches(0)
    assert batch.inputs.dtype.kind == batch.targets.dtype.kind == "i"
    np.testing.assert_array_equal(batch.inputs, [[0, 1, 2], [0, 1, 0], [0, 0, 0]])
    (batch,) = PaddedBatches([[], [[1.0, 2.0]]], [[], [1]], batch_size=5, shuffle=False, group=False).batches(0)
    np.testing.assert_array_equal(batch.inputs, [[[0, 0]], [[1, 2]]])
    np.testing.assert_array_equal(batch.targets, [[0], [1]])
    (batch,) = PaddedBatches([[1.0, 2.0], [3.0]], batch_size=5, shuffle=False, group=False).batches(0)
    assert batch.inputs.shape == (2, 2, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"sequences": "abc"}, TypeError, "sequences"),
        ({"sequences": 3}, TypeError, "sequences"),
        ({"sequences": []}, ValueError, "sequences"),
        ({"sequences": [[1, 2], ["a"]]}, TypeError, r"sequences\[1\]"),
        ({"sequences": [[True, False]]}, TypeError, r"sequences\[0\]"),
        ({"sequences": [[[1, 2], [3, 4]]]}, ValueError, r"sequences\[0\]"),
        ({"sequences": [[[[1.0]]]]}, ValueError, r"sequences\[0\]"),
        ({"sequences": [[1, 2], [1.0]]}, ValueError, r"sequences\[1\]"),
        ({"sequences": [np.zeros((2, 3)), np.zeros((2, 4))]}, ValueError, r"sequences\[1\]"),
        ({"targets": [1]}, ValueError, "targets"),
        ({"targets": 3}, TypeError, "targets"),
        ({"targets": [[1, 2], [1, 2]]}, ValueError, r"targets\[0\]"),
        ({"targets": [[1, 2, 3], 4]}, ValueError, r"targets\[1\]"),
        ({"targets": ["a", "b"]}, TypeError, r"targets\[0\]"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"batch_size": 2.0}, TypeError, "batch_size"),
        ({"seed": -1}, ValueError, "seed"),
        ({"shuffle": 1}, TypeError, "shuffle"),
        ({"group": None}, TypeError, "group"),
    ],
)
def test_bad_padded_batches(arguments: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        PaddedBatches(**{"sequences": [[1, 2, 3], [4, 5]], "batch_size": 2, **arguments})


# Pairs


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("group", [True, False])
def test_every_pair_comes_once_whole_and_padded(shuffle: bool, group: bool) -> None:
    data = PairedBatches(IDS, OTHERS, batch_size=10, seed=1, shuffle=shuffle, group=group)
    seen: list[int] = []
    for batch in data.batches(0):
        assert batch.lengths is not None and batch.target_lengths is not None and batch.targets is not None
        assert batch.inputs.shape == (len(batch.lengths), batch.lengths.max())
        assert batch.targets.shape == (len(batch.lengths), batch.target_lengths.max())
        assert batch.fresh is None and batch.tokens == batch.lengths.sum() + batch.target_lengths.sum()
        for row, (length, other) in enumerate(zip(batch.lengths, batch.target_lengths, strict=True)):
            which = int(batch.inputs[row, 0]) // 1000 - 1
            seen.append(which)
            np.testing.assert_array_equal(batch.inputs[row, :length], IDS[which])
            np.testing.assert_array_equal(batch.targets[row, :other], OTHERS[which])
            assert not batch.inputs[row, length:].any() and not batch.targets[row, other:].any()
    assert sorted(seen) == list(range(len(IDS)))
    if not shuffle and not group:
        assert seen == list(range(len(IDS)))
    if not shuffle:
        assert_same_bits(arrays(data.batches(1)), arrays(data.batches(0)))


def test_grouping_of_pairs_saves_padding() -> None:
    def padding(**options: bool) -> int:
        targets = [ids[: max(1, len(ids) - 3)] for ids in IDS]
        data = PairedBatches(IDS, targets, batch_size=10, seed=1, **options)
        return sum(batch.inputs.size + batch.targets.size - batch.tokens for batch in data.batches(0))

    assert padding(group=True) < padding(group=False) / 4
    assert padding(group=True, shuffle=False) < padding(group=False) / 4


def test_pairs_may_be_lists_rows_or_have_no_target() -> None:
    (batch,) = PairedBatches([[1, 2], [3]], [[], [4, 5, 6]], batch_size=5, shuffle=False, group=False).batches(0)
    np.testing.assert_array_equal(batch.inputs, [[1, 2], [3, 0]])
    np.testing.assert_array_equal(batch.targets, [[0, 0, 0], [4, 5, 6]])
    np.testing.assert_array_equal(batch.target_lengths, [0, 3])
    assert batch.targets.dtype.kind == "i"
    whole = np.arange(6).reshape(2, 3)
    (batch,) = PairedBatches(whole, whole[:, :2] + 1, batch_size=5, shuffle=False).batches(0)
    np.testing.assert_array_equal(batch.inputs, whole)
    np.testing.assert_array_equal(batch.targets, whole[:, :2] + 1)
    assert Batch(whole, whole, None, None, np.array([3, 2])).tokens == 11


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"sources": "abc"}, TypeError, "sources"),
        ({"sources": []}, ValueError, "sources"),
        ({"sources": [[1, 2], ["a"]]}, TypeError, r"sources\[1\]"),
        ({"sources": [[1, 2], [1.0]]}, TypeError, r"sources\[1\]"),
        ({"sources": [[1, 2], []]}, ValueError, r"sources\[1\] should have at least one symbol"),
        ({"sources": [[[1, 2]], [1]]}, ValueError, r"sources\[0\] should be ids of shape"),
        ({"targets": 3}, TypeError, "targets"),
        ({"targets": None}, TypeError, "targets"),
        ({"targets": [[1]]}, ValueError, "targets should have one for each of the 2 sources, not 1"),
        ({"targets": [1, 2]}, ValueError, r"targets\[0\] should be ids of shape"),
        ({"targets": [[True], [1]]}, TypeError, r"targets\[0\]"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"seed": -1}, ValueError, "seed"),
        ({"shuffle": 1}, TypeError, "shuffle"),
        ({"group": None}, TypeError, "group"),
    ],
)
def test_bad_paired_batches(arguments: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        PairedBatches(**{"sources": [[1, 2, 3], [4, 5]], "targets": [[1], [2]], "batch_size": 2, **arguments})


# Streams


@pytest.mark.parametrize("seed", [None, 2])
@pytest.mark.parametrize(
    ("count", "rows", "steps"), [(1000, 7, 9), (100, 32, 64), (100, 1, 64), (129, 2, 8), (50, 7, 2), (33, 4, 1)]
)
def test_streams_go_on_and_an_epoch_has_every_step_once(count: int, rows: int, steps: int, seed: int | None) -> None:
    data = Streams(np.arange(count), batch_size=rows, steps=steps, seed=seed)
    heads = set()
    for epoch in range(6):
        batches = list(data.batches(epoch))
        streams: list[list[int]] = [[] for _ in range(rows)]
        for index, batch in enumerate(batches):
            assert batch.inputs.shape[0] == rows and 1 <= batch.inputs.shape[1] <= steps
            np.testing.assert_array_equal(batch.fresh, [index == 0] * rows)
            # In the padding too: whoever reads it reads what comes next.
            np.testing.assert_array_equal(batch.targets, batch.inputs + 1)
            assert batch.lengths is None or index == len(batches) - 1
            lengths = [batch.inputs.shape[1]] * rows if batch.lengths is None else batch.lengths
            assert batch.tokens == sum(lengths) > 0 and max(lengths) == batch.inputs.shape[1]
            for stream, row, length in zip(streams, batch.inputs, lengths, strict=True):
                stream.extend(row[:length])
        assert list(np.concatenate(streams)) == list(range(count - 1))  # one after the other, each once
        assert max(map(len, streams)) - min(map(len, streams)) <= 1
        assert all(batch.inputs.shape[1] == steps for batch in batches[1:-1])
        heads.add(batches[0].inputs.shape[1])
    longest = -(-(count - 1) // rows)
    if seed is None or longest <= steps:
        assert heads == {min(steps, longest)}
    if seed is not None and longest > steps > 2:
        assert len(heads) > 1


def test_no_chunk_is_much_shorter_than_its_share() -> None:
    for length in range(2, 80):
        for steps in range(2, 20):
            for epoch in range(3):
                batches = list(Streams(np.arange(length), batch_size=1, steps=steps, seed=0).batches(epoch))
                ends = (batches[0].inputs.shape[1], batches[-1].inputs.shape[1])
                if length - 1 > steps and ends[0] != steps:
                    assert min(ends) >= steps / 8, (length, steps, ends)


def test_streams_of_values_and_the_shortest() -> None:
    values = series(50, 2)
    batches = list(Streams(values, batch_size=3, steps=5).batches(0))
    assert_same_bits(batches[1].inputs[1], values[16 + 5 : 16 + 10])
    assert_same_bits(batches[1].targets[1], values[16 + 6 : 16 + 11])
    for seed in (None, 0):
        (batch,) = Streams([5, 6, 7, 8], batch_size=3, steps=5, seed=seed).batches(0)
        np.testing.assert_array_equal(batch.inputs, [[5], [6], [7]])
        np.testing.assert_array_equal(batch.targets, [[6], [7], [8]])


@pytest.mark.parametrize(("count", "rows"), [(2, 1), (50, 1), (100, 1), (129, 2), (1101, 17), (2048, 31), (5000, 32)])
def test_fitting_takes_as_many_streams_as_have_full_chunks(count: int, rows: int) -> None:
    data = Streams.fitting(np.arange(count), batch_size=32, steps=64, seed=1)
    assert data.batch_size == rows
    same = Streams(np.arange(count), batch_size=rows, steps=64, seed=1)
    assert_same_bits(arrays(data.batches(3)), arrays(same.batches(3)))
    with pytest.raises(ValueError, match="batch_size"):
        Streams.fitting(np.arange(count), batch_size=0, steps=64)
    with pytest.raises(ValueError, match="ids"):
        Streams.fitting([1], batch_size=2, steps=64)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"ids": ["a"]}, TypeError, "ids"),
        ({"ids": np.zeros((3, 4), int)}, ValueError, "ids"),
        ({"ids": [1, 2]}, ValueError, "ids"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"steps": 0}, ValueError, "steps"),
        ({"seed": 1.0}, TypeError, "seed"),
    ],
)
def test_bad_streams(arguments: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        Streams(**{"ids": [1, 2, 3, 4], "batch_size": 2, "steps": 2, **arguments})


# Windows over texts


@pytest.mark.parametrize("begin", [None, 5000])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("count", "steps"), [(1, 8), (7, 8), (8, 8), (9, 8), (16, 8), (17, 8), (21, 8), (40, 8), (39, 8), (33, 8), (500, 7)]
)
def test_windows_over_a_text_have_every_symbol_and_every_position(
    count: int, steps: int, shuffle: bool, begin: int | None
) -> None:
    text = np.arange(count + (begin is None))  # so many symbols are targets
    data = TextWindows(text, steps=steps, batch_size=3, begin=begin, seed=1, shuffle=shuffle)
    before = text[:-1] if begin is None else np.concatenate([[begin], text[:-1]])
    after = text[1:] if begin is None else text
    orders, places = set(), set()
    for epoch in range(8):
        batches = list(data.batches(epoch))
        assert len(batches) == len(data)
        inputs, targets = (np.concatenate([batch[i] for batch in batches]) for i in (0, 1))
        assert inputs.shape == targets.shape == (len(inputs), min(count, steps))
        assert all(batch.lengths is None and batch.fresh is None for batch in batches)
        starts = targets[:, 0] - after[0]
        for start, row, following in zip(starts, inputs, targets, strict=True):
            np.testing.assert_array_equal(row, before[start : start + steps])
            np.testing.assert_array_equal(following, after[start : start + steps])
        assert set(targets.ravel()) == set(after)
        assert len(inputs) * steps < count + (1.25 * steps if count > 3 * steps else steps)
        assert shuffle or list(starts) == sorted(starts)
        orders.add(tuple(starts))
        places.add(tuple(sorted(starts)))
    assert (len(orders) > 1) == (shuffle and count > steps)
    assert (len(places) > 1) == (shuffle and count > 2 * steps)


def test_windows_over_texts_of_unequal_length() -> None:
    texts = [np.arange(3), np.arange(100, 120), [200]]
    (batch,) = TextWindows(texts, steps=8, batch_size=9, begin=999, shuffle=False).batches(0)
    np.testing.assert_array_equal(batch.lengths, [3, 8, 8, 8, 1])
    np.testing.assert_array_equal(batch.targets[0], [0, 1, 2, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.inputs[0], [999, 0, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.targets[1:4, 0], [100, 106, 112])
    np.testing.assert_array_equal(batch.inputs[4], [999] + [0] * 7)
    assert batch.tokens == 28


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"ids": "abc"}, TypeError, "ids"),
        ({"ids": [0.5]}, TypeError, r"ids\[0\]"),
        ({"ids": np.zeros((3, 4), int)}, ValueError, "ids should be ids of shape"),
        ({"ids": [1]}, ValueError, "ids should have at least 2 symbols, not 1"),
        ({"ids": [[1, 2], [3]]}, ValueError, r"ids\[1\] should have at least 2 symbols, not 1"),
        ({"ids": [[1, 2], []], "begin": 7}, ValueError, r"ids\[1\] should have at least 1 symbols, not 0"),
        ({"steps": 0}, ValueError, "steps"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"begin": -1}, ValueError, "begin"),
        ({"begin": 1.0}, TypeError, "begin"),
        ({"seed": 1.0}, TypeError, "seed"),
        ({"shuffle": 0}, TypeError, "shuffle"),
    ],
)
def test_bad_text_windows(arguments: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        TextWindows(**{"ids": [1, 2, 3, 4], "batch_size": 2, "steps": 2, **arguments})


# Windows


@pytest.mark.parametrize("horizon", [1, 3])
def test_every_window_comes_once_with_what_follows(horizon: int) -> None:
    many = [np.arange(30.0), np.arange(200.0, 260.0)]
    data = Windows(many, steps=6, horizon=horizon, batch_size=8, seed=1)
    batches = list(data.batches(0))
    inputs, targets = (np.concatenate([batch[i] for batch in batches]) for i in (0, 1))
    assert inputs.shape == targets.shape == (30 - 6 - horizon + 1 + 60 - 6 - horizon + 1, 6, 1)
    np.testing.assert_array_equal(targets, inputs + horizon)
    assert (np.diff(inputs[..., 0], axis=1) == 1).all()
    firsts = inputs[:, 0, 0]
    assert sorted(firsts) == [*range(30 - 6 - horizon + 1), *range(200, 260 - 6 - horizon + 1)]
    assert list(firsts) != sorted(firsts)
    in_order = Windows(many, steps=6, horizon=horizon, batch_size=8, shuffle=False)
    firsts = np.concatenate([batch.inputs[:, 0, 0] for batch in in_order.batches(7)])
    assert list(firsts) == sorted(firsts)


def test_a_series_shorter_than_a_window_is_a_shorter_window() -> None:
    many = [np.arange(100.0, 105.0), np.arange(30.0), np.arange(200.0, 203.0)]
    data = Windows(many, steps=6, horizon=2, batch_size=4, seed=1)
    seen = []
    for batch in data.batches(0):
        lengths = np.full(len(batch.inputs), 6) if batch.lengths is None else batch.lengths
        assert batch.tokens == lengths.sum()
        for row, following, length in zip(batch.inputs, batch.targets, lengths, strict=True):
            np.testing.assert_array_equal(following[:length], row[:length] + 2)
            assert not row[length:].any() and not following[length:].any()
            seen.append((row[0, 0], length))
    assert sorted(seen) == [*((float(i), 6) for i in range(30 - 6 - 2 + 1)), (100.0, 3), (200.0, 1)]
    whole = Windows([np.arange(9.0), np.arange(30.0)], steps=6, horizon=2, batch_size=4)
    assert all(batch.lengths is None for batch in whole.batches(0))
    with pytest.raises(
        ValueError, match=r"series\[1\] should have at least horizon \+ 1 = 3 steps, not 2, as of 2 of 3"
    ):
        Windows([np.arange(9.0), np.arange(2.0), np.arange(1.0)], steps=6, horizon=2, batch_size=4)


def test_integers_are_values_in_windows() -> None:
    wanted = list(Windows([float(i) for i in range(9)], steps=3, batch_size=4, seed=0).batches(0))
    for given in (list(range(9)), np.arange(9), np.arange(9, dtype=np.uint8), [np.arange(9)]):
        batches = list(Windows(given, steps=3, batch_size=4, seed=0).batches(0))
        assert_same_bits(arrays(batches), arrays(wanted))
    (batch,) = Windows([[1, 2, 3], [0.5, 1.5, 2.5]], steps=2, batch_size=4, shuffle=False).batches(0)
    np.testing.assert_array_equal(batch.inputs[..., 0], [[1, 2], [0.5, 1.5]])


def test_one_series_of_several_values() -> None:
    values = series(20, 3)
    (batch,) = Windows(values, steps=18, batch_size=4, shuffle=False).batches(0)
    assert_same_bits(batch.inputs, np.stack([values[:18], values[1:19]]))
    assert_same_bits(batch.targets, np.stack([values[1:19], values[2:20]]))
    assert batch.lengths is None and batch.fresh is None and batch.tokens == 36


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"series": [True, False, True, True]}, TypeError, "series"),
        ({"series": "abc"}, TypeError, "series"),
        ({"series": []}, ValueError, "series"),
        ({"series": [1.0, 2.0]}, ValueError, "series"),
        ({"series": [[1.0, 2.0, 3.0], ["a"]]}, TypeError, r"series\[1\]"),
        ({"series": [np.zeros((5, 1)), np.zeros((5, 2))]}, ValueError, r"series\[1\]"),
        ({"series": np.zeros((2, 3, 4))}, ValueError, "series"),
        ({"steps": 0}, ValueError, "steps"),
        ({"horizon": 0}, ValueError, "horizon"),
        ({"batch_size": None}, TypeError, "batch_size"),
        ({"seed": "1"}, TypeError, "seed"),
        ({"shuffle": 0}, TypeError, "shuffle"),
    ],
)
def test_bad_windows(arguments: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        Windows(**{"series": [1.0, 2.0, 3.0, 4.0], "steps": 2, "batch_size": 2, **arguments})


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", ["sequences", "pairs"])
def test_all_of_an_epoch_is_sorted(kind: str, shuffle: bool) -> None:
    """There is as little padding in the last of many buckets as in the first."""
    lengths = np.random.default_rng(0).integers(1, 100, 2000)
    sequences = [np.zeros(n, np.int64) for n in lengths]
    if kind == "pairs":
        data: Any = PairedBatches(sequences, sequences, batch_size=8, seed=1, shuffle=shuffle)
    else:
        data = PaddedBatches(sequences, batch_size=8, seed=1, shuffle=shuffle)
    padding = [1 - batch.lengths.sum() / batch.inputs.size for batch in data.batches(0)]
    assert len(padding) == 250 and np.mean(padding) < 0.1
