"""States that a user or a file can make: those the package could have made and no others; which states are equal."""

from __future__ import annotations

import pickle
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import assert_same_bits, inputs, run_python

import fastseq as fs


def arrays(state: Any) -> dict[str, Any]:
    return {name: np.array(array) for name, array in state._arrays().items()}


def windowed(window: int | None = 5, dtype: str = "float32", engine: Any = fs) -> Any:
    return engine.TransformerEncoder(2, 8, 2, 8, window=window, dropout=0.0, dtype=dtype, seed=0)


def stepped(layer: Any, count: int, rows: int = 2) -> Any:
    state = layer.initial_state(rows)
    for t in range(count):
        _, state = layer.step(inputs((rows, 8), layer.dtype, seed=t), state)
    return state


def test_what_crashed_the_process(tmp_path: Path) -> None:
    code = """
        import numpy as np, fastseq as fs
        from safetensors.numpy import save_file
        k = np.zeros((1, 1, 1, 1, 1), "f4")
        for lengths, firsts in (([2**63 - 1], [2**63 - 2]), ([2**62], [2**62]), ([2**40], [2**40 - 1]), ([40], [38])):
            for window in (0, 1, 2**62):
                for make in ("constructor", "file"):
                    given = dict(lengths=np.array(lengths), firsts=np.array(firsts), keys=k, values=k,
                                 window=np.array([window]))
                    try:
                        if make == "constructor":
                            fs.AttentionState(**given)
                        else:
                            metadata = {"fastseq.class": "AttentionState", "fastseq.config": "{}"}
                            save_file(given, "state", {"fastseq.format": "1", **metadata})
                            fs.load("state")
                    except ValueError as error:
                        assert "should be" in str(error), error
                    else:
                        raise AssertionError((lengths, firsts, window))
        big = np.zeros((9, 1, 1, 1, 1), "f4")
        try:
            fs.AttentionState([2**31 - 1] * 9, [2**31 - 2] * 9, big, big, 1)
        except MemoryError:
            print("done")
    """
    done = run_python(f"import os\nos.chdir({str(tmp_path)!r})\n{textwrap.dedent(code)}")
    assert done.stdout.strip() == "done", done.stderr


@pytest.mark.parametrize("engine", [fs, fs.reference], ids=["compiled", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_any_state_is_refused_or_goes_on_as_it_should(dtype: str, engine: Any) -> None:
    """Drawn lengths, firsts and windows: refused, or a step is that of the real state of that length."""
    rng = np.random.default_rng(0)
    layers = {window: windowed(window or None, dtype, engine) for window in (0, 1, 3, 70)}
    most = 150 if engine is fs else 80
    whole = stepped(windowed(None, dtype, engine), most, 1)
    x = inputs((1, 8), dtype, seed=999)
    seen = {True: 0, False: 0}
    for _ in range(150):
        window, n = int(rng.choice([0, 1, 3, 70])), int(rng.integers(0, most))
        first = int(rng.integers(0, n + 1)) if rng.random() < 0.5 else max(0, n - window + int(rng.integers(-3, 3)))
        first = min(first, n)
        keys, values = (np.array(a[:, :, :, first:n]) for a in (whole.keys, whole.values))
        possible = first <= (max(0, n - window + 1) if window else 0)
        seen[possible] += 1
        if not possible:
            with pytest.raises(
                ValueError, match="firsts should be at most the first token that the next one looks back"
            ):
                fs.AttentionState([n], [first], keys, values, window)
            continue
        state = fs.AttentionState([n], [first], keys, values, window)
        full = fs.AttentionState([n], [0], *(np.array(a[:, :, :, :n]) for a in (whole.keys, whole.values)), window)
        assert state == full and state.firsts.tolist() == [first]
        assert_same_bits(state.keys, keys)
        assert pickle.loads(pickle.dumps(state)) == state and state[[0, 0]].firsts.tolist() == [first] * 2
        assert_same_bits(layers[window].step(x, state)[0], layers[window].step(x, full)[0])
        if n > 2:
            back = n - 2
            if first <= (max(0, back - window + 1) if window else 0):
                assert state.rolled_back(back) == full.rolled_back(back)
            else:
                with pytest.raises(ValueError, match=r"lengths\[0\] should be at least"):
                    state.rolled_back(np.array([back], "u1"))
    assert min(seen.values()) > 20


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("lengths", [np.nan, 1.0], TypeError),
        ("lengths", [True, False], TypeError),
        ("lengths", [-1, 0], ValueError),
        ("lengths", np.array([2**64 - 1, 0], "u8"), ValueError),
        ("lengths", [9, 9], ValueError),
        ("lengths", 3, ValueError),
        ("firsts", [-1, 0], ValueError),
        ("firsts", [1, 0], ValueError),
        ("window", [1, 2], ValueError),
        ("window", -1, ValueError),
        ("window", 1.5, TypeError),
        ("window", None, TypeError),
        ("window", 2**63, (OverflowError, TypeError)),
        ("keys", np.zeros((2, 0, 2, 3, 4), "f4"), ValueError),
        ("keys", np.zeros((2, 1, 2, 3), "f4"), ValueError),
        ("keys", None, TypeError),
        ("memory_keys", np.zeros((2, 2, 2, 1, 4), "f4"), ValueError),
        ("memory_lengths", [1, 1], ValueError),
        ("tokens", [[1], [2]], ValueError),
        ("tokens", [[-1, 2, 3], [1, 2, 3]], ValueError),
        ("tokens", np.full((2, 3), 2**63, "u8"), ValueError),
        ("tokens", np.zeros((2, 3)), TypeError),
    ],
)
def test_impossible_arrays(name: str, value: Any, error: Any) -> None:
    given = arrays(stepped(windowed(None), 3))
    assert fs.AttentionState(**given) == stepped(windowed(None), 3)
    if name == "keys" and value is not None:
        given["values"] = value
    with pytest.raises(error):
        fs.AttentionState(**{**given, name: value})


def test_equality_of_states_of_attention() -> None:
    """Values, the oldest token, windows and lengths count, keys and tokens too; what is out of the window does not."""
    state = stepped(windowed(5), 9)
    given = arrays(state)
    assert fs.AttentionState(**given) == state
    last = int(given["lengths"][0] - given["firsts"][0])
    for name in ("keys", "values"):
        for token, equal in ((last - 1, False), (last - 4, False), (last - 5, True)):
            changed = np.array(given[name])
            changed[1, 1, 1, token, 2] += 1
            assert (fs.AttentionState(**{**given, name: changed}) == state) is equal, (name, token)
    assert fs.AttentionState(**{**given, "window": 4}) != state
    longer = stepped(windowed(5), 10)
    assert longer != state and longer.rolled_back(9) == state and state.rolled_back(8) != state
    same = np.zeros((1, 1, 1, 3, 2), "f4")
    assert fs.AttentionState([3], [0], same, same) != fs.AttentionState([2], [0], same, same)
    lm = fs.models.TransformerLM(9, 8, 2, 1, seed=0)
    one, other = (lm.step([3], lm.step([first], None)[1])[1] for first in (1, 1))
    assert one == other
    assert fs.AttentionState(**{**arrays(one), "tokens": np.array(one.tokens) + 1}) != one


@pytest.mark.parametrize("kind", ["State", "LSTMState", "Seq2SeqState", "AttentionState", "with memory", "with tokens"])
def test_replaced(kind: str) -> None:
    def some(rows: int, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        h = rng.normal(size=(rows, 2, 3))
        if kind in ("State", "LSTMState"):
            return getattr(fs, kind)(*([h] if kind == "State" else [h, h + 1]))
        if kind == "Seq2SeqState":
            keys = rng.normal(size=(rows, 2 + seed, 4))
            return fs.Seq2SeqState(h, h + 1, keys, keys + 1, rng.integers(1, 3 + seed, rows))
        if kind == "with tokens":
            lm = fs.models.TransformerLM(9, 8, 2, 1, seed=0)
            state = None
            for _ in range(2 + seed):
                _, state = lm.step(rng.integers(0, 9, rows), state)
            return state
        if kind == "with memory":
            decoder = fs.TransformerDecoder(1, 8, 2, 8, seed=0)
            return decoder.step(inputs((rows, 8)), decoder.initial_state(inputs((rows, 2 + seed, 8), seed=seed)))[1]
        return stepped(windowed(), 5 + seed, rows)

    state, other = some(5, 1), some(2, 2)
    before = state.copy()
    for rows in ([3, 0], [-2, -5], np.array([3, 0])):
        result = state.replaced(rows, other)
        assert result[3] == other[0] and result[0] == other[1] and result[[1, 2, 4]] == state[[1, 2, 4]]
    assert state.replaced([True, False, False, False, True], other)[[0, 4]] == other
    assert state.replaced(slice(1, 3), other)[1:3] == other and state.replaced(2, other[1])[2] == other[1]
    assert state.replaced([], other[[]]) == state == before
    for rows, given, error, message in (
        ([1, 1], other, ValueError, "rows should name each row once"),
        ([1, -4], other, ValueError, "rows should name each row once"),
        ([1], other, ValueError, "other should have 1 rows"),
        ([1, 5], other, ValueError, "rows should be in"),
        ([1, 2], fs.State(np.zeros((2, 1, 1))) if kind != "State" else 3, TypeError, "other should be a"),
    ):
        with pytest.raises(error, match=message):
            state.replaced(rows, given)
    if kind in ("State", "LSTMState"):
        small = type(state)(*(np.zeros((2, 2, 4)) for _ in state))
        with pytest.raises(ValueError, match="other should agree with"):
            state.replaced([1, 2], small)


def test_arrays_of_either_byte_order_make_a_state_of_two_sequences(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=shape).astype("f4") for shape in ((2, 1, 3), (2, 1, 3), (2, 4, 5), (2, 4, 3))]
    state = fs.Seq2SeqState(*parts, [4, 2])
    other = fs.Seq2SeqState(*(part.astype(">f4") for part in parts), np.array([4, 2], ">i4"))
    assert other == state
    for name in ("h", "c", "keys", "projected"):
        assert getattr(other, name).dtype == np.dtype("float32") and getattr(other, name).dtype.isnative
        assert_same_bits(getattr(other, name), getattr(state, name))
    other.save(tmp_path / "state")
    assert fs.load(tmp_path / "state") == state
    for lengths, error in (([5, 1], ValueError), ([-1, 1], ValueError), ([np.nan, 1], TypeError), ([1], ValueError)):
        with pytest.raises(error, match="lengths"):
            fs.Seq2SeqState(*parts, lengths)
    with pytest.raises(ValueError, match="given together: projected, lengths are None"):
        fs.Seq2SeqState(*parts[:3])
    with pytest.raises(ValueError, match="given together: lengths is None"):
        fs.Seq2SeqState(*parts)
