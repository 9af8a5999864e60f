"""Layers of one's own: the page in docs/ as it stands, and what it promises."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import ROOT, assert_same_bits

import fastseq as fs
from fastseq import io
from fastseq.bench.cases import Case
from fastseq.layers.base import Pointwise
from fastseq.models.base import TrainedModel
from fastseq.models.sequence_pairs import SequencePairModel
from fastseq.models.series import ScaledModel
from fastseq.models.symbol_model import LanguageModel, SymbolModel
from fastseq.training.data import Data
from fastseq.training.optimisers import Optimiser
from fastseq.training.schedules import Schedule


class Scale(fs.Layer):
    def __init__(self, size: int, *, dtype: Any = "float32", seed: int | None = None) -> None:
        super().__init__(size=size, dtype=dtype, seed=seed)
        self.add_parameter("scale", 1 + np.random.default_rng(seed).random(size))

    def __call__(self, x: Any) -> Any:
        return x * self.parameters["scale"]

    def forward(self, x: Any, *, seed: int | None = None) -> Any:
        return self(x), self.tape(x)

    def backward(self, dy: Any, tape: Any, *, grads: Any = None) -> Any:
        (x,) = self.kept(tape)
        self.targets(grads)["scale"] += (dy * x).sum((0, 1))
        return dy * self.parameters["scale"]


class Decay(fs.Layer):
    """Carries a state: y_t = x_t + y_{t-1} / 2."""

    time = "sequence"
    carries_state = True

    def __init__(self, size: int) -> None:
        super().__init__(size=size)

    def __call__(self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None) -> Any:
        y, h = np.zeros_like(x), np.zeros((len(x), self.size), x.dtype) if state is None else state.h[:, 0]
        for t in range(x.shape[1]):
            real = np.ones(len(x), bool) if lengths is None else lengths > t
            h = np.where((real & resets[:, t])[:, None], 0, h) if resets is not None else h
            h = np.where(real[:, None], x[:, t] + h / 2, h).astype(x.dtype)
            y[:, t] = np.where(real[:, None], h, 0)
        return y, fs.State(h[:, None])


@pytest.fixture(autouse=True)
def nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "_registered", {})


def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "own_layers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, "docs/own_layers.md", "exec"), names)
    example = blocks[0].split("class Scale")[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 16
    assert np.allclose(names["model"][1].parameters["scale"], names["loaded"][1].parameters["scale"])


@pytest.mark.parametrize("nested", [False, True])
def test_saved_and_loaded(nested: bool, tmp_path: Path) -> None:
    layer = Scale(3, seed=1)
    layer.parameters["scale"] = [1.0, 2.0, 4.0]
    model: Any = fs.Sequential(fs.Linear(3, 3, seed=0), fs.Sequential(layer)) if nested else layer
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")
    path = tmp_path / "model"
    model.save(path)
    with pytest.raises(ValueError, match=r"holds a 'Scale', which .* classes=\[\.\.\.\], or to fastseq\.register"):
        fs.load(path)
    loaded = [fs.load(path, classes=[Scale]), fs.reference.load(path, classes=(Scale,))]
    assert fs.register(Scale) is Scale
    loaded += [fs.load(path), pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)]
    for other in loaded:
        assert_same_bits(np.asarray(other(x), "f4"), model(x)) if other is not loaded[1] else None
        assert repr(other) == repr(model) and other._config == model._config
        for name, array in model.parameters.items():
            assert_same_bits(other.parameters[name], array)
            if other is not model:
                other.parameters[name] = array + 1
                assert_same_bits(model.parameters[name], array)


def test_trained_by_fit() -> None:
    model = fs.Sequential(fs.Linear(3, 3, seed=0), Scale(3))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 5, 3)).astype("float32")
    batches = [fs.training.Batch(x, (3 * x).astype("float32"))]
    history = fs.training.fit(
        model,
        batches,
        loss=fs.losses.mean_squared_error,
        optimiser=fs.training.AdamW(model, lr=0.05),
        steps=200,
        progress=False,
    )
    assert history.loss[-1] < 0.05 * history.loss[0]


def test_padding_of_a_layer_that_knows_no_lengths() -> None:
    model = fs.Sequential(Scale(3, dtype="float64"), fs.GRU(3, 2, dtype="float64", seed=0), Scale(2, dtype="float64"))
    x = np.random.default_rng(0).normal(size=(3, 4, 3))
    lengths = [4, 1, 0]
    past = np.arange(4) >= np.array(lengths)[:, None]
    x[past] = np.nan
    y, tape = model.forward(x, lengths=lengths)
    dx = model.backward(np.where(past[..., None], np.nan, 1.0) * np.ones_like(y), tape)
    assert not y[past].any() and not dx[past].any()
    assert all(np.isfinite(array).all() and array.any() for name, array in model.grads.items() if "bias_hh" not in name)


def test_a_layer_that_carries_a_state() -> None:
    model = fs.Sequential(fs.Linear(2, 2, seed=0), Decay(2), fs.GRU(2, 3, seed=1))
    assert model.carries_state and model.time == "sequence"
    x = np.random.default_rng(0).normal(size=(2, 6, 2)).astype("float32")
    y, end = model.run(x)
    one, middle = model.run(x[:, :4])
    other, last = model.run(x[:, 4:], middle)
    assert_same_bits(np.concatenate([one, other], axis=1), y)
    assert last == end and end[0] is None
    resets = np.zeros((2, 6), bool)
    resets[:, 4] = True
    assert_same_bits(model(x, resets=resets)[:, 4:], model(x[:, 4:]))


def test_what_is_refused(tmp_path: Path) -> None:
    class Forgets(fs.Layer):
        def __init__(self, size: int) -> None:
            pass

    with pytest.raises(TypeError, match=r"Forgets.__init__ should call super\(\).__init__"):
        Forgets(3)

    class Partly(fs.Layer):
        def __init__(self, size: int, other: int = 2) -> None:
            super().__init__(other=other, colour=3)

    with pytest.raises(TypeError, match="size is missing; colour is no argument of it"):
        Partly(3)

    class Holds(fs.Layer):
        def __init__(self, what: Any) -> None:
            super().__init__(what=what)

    for what in (np.zeros(2), object(), {1, 2}, fs.Linear(2, 2)):
        with pytest.raises(TypeError, match="what should be a number, a string"):
            Holds(what)
    Holds(np.int64(3)).save(tmp_path / "holds")
    assert fs.load(tmp_path / "holds", classes=[Holds]).what == 3

    layer = Scale(3)
    with pytest.raises(TypeError, match="parameters are added in __init__"):
        layer.add_parameter("more", np.ones(3))

    class Names(fs.Layer):
        def __init__(self, name: Any, value: Any, twice: bool = False) -> None:
            super().__init__(name=None, value=None, twice=False)
            self.add_parameter(name, value)
            if twice:
                self.add_parameter(name, value)

    for name, value, twice, error, message in (
        (3, [1.0], False, TypeError, "name should be a string"),
        ("", [1.0], False, TypeError, "name should be a string"),
        ("a", [1.0], True, ValueError, "name should be of no parameter that is there"),
        ("a", ["x"], False, TypeError, "array should hold real numbers"),
        ("a", [True], False, TypeError, "array should hold real numbers"),
    ):
        with pytest.raises(error, match=message):
            Names(name, value, twice)

    class LSTM(fs.Layer):
        def __init__(self) -> None:
            super().__init__()

    with pytest.raises(TypeError, match="under a name of its own, not as LSTM"):
        LSTM().save(tmp_path / "lstm")
    for classes, error in ((Scale, TypeError), ([3], TypeError), ([dict], TypeError), ([LSTM], ValueError)):
        with pytest.raises(error, match="classes should"):
            fs.load(tmp_path / "holds", classes=classes)
    with pytest.raises(TypeError, match="cls should"):
        fs.register(3)
    with pytest.raises(ValueError, match="cls should hold classes with names of their own"):
        fs.register(LSTM)


def test_a_registered_subclass_of_one_of_ours(tmp_path: Path) -> None:
    class Own(fs.Linear):
        pass

    with pytest.raises(TypeError, match="Own"):
        Own(2, 3).save(tmp_path / "own")
    fs.register(Own)
    layer = Own(2, 3, seed=0)
    layer.save(tmp_path / "own")
    loaded = fs.load(tmp_path / "own")
    assert type(loaded) is Own
    assert_same_bits(loaded.parameters["weight"], layer.parameters["weight"])


def test_attributes_of_layers() -> None:
    """Parameters are set in `parameters`; what is no attribute cannot become one, but on a class of one's own."""
    for layer, name in (
        (fs.LSTM(2, 3), "weight_ih_l0"),
        (fs.Linear(2, 3), "weight"),
        (fs.reference.GRU(2, 3), "bias_hh_l0"),
        (Scale(3), "scale"),
    ):
        with pytest.raises(AttributeError, match=rf'{name} is a parameter: set it by layer.parameters\["{name}"\] = '):
            setattr(layer, name, 3)
    layer = fs.LSTM(2, 3)
    with pytest.raises(AttributeError, match="hidden_size is fixed"):
        layer.hidden_size = 4
    for other in (layer, fs.models.RecurrentLM(5, 2, 3), fs.Sequential(layer), copy.deepcopy(fs.Sequential(layer))):
        for again in (other, pickle.loads(pickle.dumps(other))):
            with pytest.raises(AttributeError, match=f"learning_rate is no attribute of a {type(other).__name__}"):
                again.learning_rate = 3
    own = Scale(3)
    assert own.size == 3
    with pytest.raises(AttributeError, match="size is fixed once a Scale is made"):
        own.size = 4
    own.note = "of one's own"


def test_summary() -> None:
    model = fs.Sequential(fs.GRU(1, 32), fs.LastStep(), fs.Sequential(Scale(32), fs.Linear(32, 3)))
    text = model.summary()
    lines = text.splitlines()
    assert lines[-1].split() == ["in", "all", "3,491"]
    assert "(B, T, 32)" in lines[1] and "(B, 32)" in lines[2] and "(B, 3)" in lines[4]
    assert any("GRU(input_size=1, hidden_size=32)" in line for line in lines)
    assert any("Scale" in line and "32" in line.split()[-1] for line in lines)
    assert max(map(len, lines)) <= 100
    for layer in (fs.LSTM(2, 3), fs.models.TransformerLM(100, 64, 4, 2), fs.models.MarkovChain(4)):
        assert type(layer).__name__ in layer.summary()


@pytest.mark.parametrize(
    ("base", "missing"),
    [
        (Pointwise, "_backward"),
        (TrainedModel, "_back"),
        (SymbolModel, "_log_probs"),
        (LanguageModel, "_text_data"),
        (SequencePairModel, "_scores"),
        (ScaledModel, "_variance"),
        (Data, "_batches"),
        (Schedule, "lr_at"),
        (Optimiser, "_pass"),
        (Case, "flops"),
    ],
)
def test_a_class_that_misses_what_it_has_to_write_cannot_be_made(base: type, missing: str) -> None:
    with pytest.raises(TypeError, match=rf"abstract class Incomplete.* {missing}\b"):
        type(base)("Incomplete", (base,), {})()
