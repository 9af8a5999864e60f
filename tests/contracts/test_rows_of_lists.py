"""Lists where arrays are usual: of rows of unequal lengths, and of integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from common import assert_same_bits

import fastseq as fs

BOTH = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
LENGTHS = [3, 0, 5, 1]
TAKES_ROWS = {
    "RNN": lambda m: m.RNN(2, 4, seed=0),
    "LSTM": lambda m: m.LSTM(2, 4, bidirectional=True, seed=0),
    "GRU": lambda m: m.GRU(2, 4, seed=0),
    "TransformerEncoder": lambda m: m.TransformerEncoder(1, 2, 1, 4, dropout=0.0, seed=0),
    "TransformerEncoderLayer": lambda m: m.TransformerEncoderLayer(2, 1, 4, dropout=0.0, seed=0),
    "MultiheadAttention": lambda m: m.MultiheadAttention(2, 1, seed=0),
    "LastStep": lambda m: m.LastStep(),
    "MeanOverTime": lambda m: m.MeanOverTime(),
    "MaxOverTime": lambda m: m.MaxOverTime(),
    "Conv1d": lambda m: m.Conv1d(2, 3, 2, padding="causal", seed=0),
    "MaxPool1d": lambda m: m.MaxPool1d(2, 1, padding="same"),
    "AvgPool1d": lambda m: m.AvgPool1d(2, 1, padding="same"),
    "Sequential": lambda m: m.Sequential(m.Linear(2, 3, seed=0), m.Sequential(m.GRU(3, 4, seed=0))),
    "Graph": lambda m: m.Graph(
        "x", {"a": (m.Linear(2, 3, seed=0), "x"), "b": (m.Concatenate(), "a", "x"), "y": (m.GRU(5, 4), "b")}, "y"
    ),
    "pointwise": lambda m: m.Sequential(m.Linear(2, 3, seed=0), m.ReLU()),
    "classifier": lambda m: m.Sequential(m.GRU(2, 3, seed=0), m.LastStep(), m.Linear(3, 2, seed=1)),
}


def rows() -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(n, 2)).astype("float32") for n in LENGTHS]


@BOTH
@pytest.mark.parametrize("kind", TAKES_ROWS)
def test_rows_of_unequal_lengths(kind: str, module: Any) -> None:
    layer = TAKES_ROWS[kind](module)
    x = np.full((4, 5, 2), np.nan, "float32")
    for into, row in zip(x, rows(), strict=True):
        into[: len(row)] = row
    expected, given = layer(x, lengths=LENGTHS), layer(rows())
    if isinstance(expected, tuple):
        assert given[1] == expected[1]
        expected, given = expected[0], given[0]
    assert_same_bits(given, expected)
    for form in (tuple(rows()), [row.tolist() for row in rows()], [row.astype("float64") for row in rows()]):
        again = layer(form)
        assert_same_bits(again[0] if isinstance(again, tuple) else again, expected)
    y, *_, tape = layer.forward(rows(), seed=0)
    assert_same_bits(np.array(y), expected)
    dx = layer.backward(np.ones_like(y), tape)
    dx = dx[0] if isinstance(dx, tuple) else dx
    assert dx.shape == x.shape and not dx[np.isnan(x)].any()
    with pytest.raises(ValueError, match="lengths should be None where .* is a list of rows of unequal lengths"):
        layer(rows(), lengths=LENGTHS)
    for bad, error in (
        ([np.zeros((2, 2)), np.zeros((3, 4))], ValueError),
        ([np.zeros((2, 2)), np.zeros(3)], ValueError),
        ([np.zeros((2, 2), bool), np.zeros((3, 2), bool)], TypeError),
        ([["a"], ["b", "c"]], TypeError),
    ):
        with pytest.raises(error, match="should"):
            layer(bad)


@BOTH
def test_ids_of_unequal_lengths(module: Any) -> None:
    layer = module.Embedding(9, 3, seed=0)
    ids = [[1, 2, 3], [], [4, 0, 0, 8]]
    y, tape = layer.forward(ids)
    assert_same_bits(layer(ids), y)
    assert y.shape == (3, 4, 3)
    for b, row in enumerate(ids):
        assert_same_bits(y[b, : len(row)], layer(np.array(row, int)))
        assert not y[b, len(row) :].any()
    dy = np.ones_like(y)
    dy[1] = np.nan
    layer.backward(dy, tape)
    assert layer.grads["weight"][:, 0].tolist() == [2, 1, 1, 1, 1, 0, 0, 0, 1]
    model = module.Sequential(layer, module.GRU(3, 2, seed=1), module.MeanOverTime())
    for b, row in enumerate(ids):
        if row:
            assert_same_bits(model(ids)[b], model(np.array([row]))[0])
    with pytest.raises(ValueError, match=r"ids should be in 0..8, but ids\[1, 0\] is 9"):
        layer([[1, 2], [9]])


@BOTH
def test_integers_are_no_real_numbers(module: Any) -> None:
    """In arrays and lists alike; of an array the message says what to do. Beside real numbers they are such."""
    x = [[[1, 2], [3, 4]], [[0, -1], [5, 2]]]
    for layer in (module.GRU(2, 3, seed=0), module.Linear(2, 3, seed=0), module.ReLU(), module.LastStep()):
        with pytest.raises(TypeError, match=r'x should hold real floating numbers, not int64; x.astype\("float32"\)'):
            layer(np.array(x))
        for bad in (x, np.array(x) > 0, [[[True, False]]], np.array(x, complex), np.array(x, object)):
            with pytest.raises(TypeError, match="x should hold real floating numbers"):
                layer(bad)
    layer = module.GRU(2, 3, seed=0)
    with pytest.raises(TypeError, match="x should hold real floating numbers"):
        layer([[[1, 2]], [[3, 4], [5, 6]]])
    assert_same_bits(layer([[[1, 2.5]], [[3, 4]]])[0], layer(np.array([[[1, 2.5]], [[3, 4]]]))[0])
    padded = np.array([[[1, 2], [0, 0]], [[3, 4], [5, 6.5]]], "f4")
    assert_same_bits(layer([[[1, 2]], [[3, 4], [5, 6.5]]])[0], layer(padded, lengths=[1, 2])[0])
