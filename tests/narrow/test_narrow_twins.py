"""A twin with narrow weights as an object: what it refuses, what it keeps, what it holds, copies, threads, words."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import assert_same_bits
from twins import ALL, EACH_TYPE, GENERATE, MODELS, SIZE, arrays_in, ids_of, narrow_bytes

import fastseq as fs
from fastseq.narrow import NarrowArray

SOME = [
    "lstm_proj, both ways",
    "gru_before, one",
    "Linear",
    "Conv1d",
    "Embedding",
    "MultiheadAttention, other keys",
    "AdditiveAttention",
    "MultiplicativeAttention",
    "TransformerEncoderLayer, swiglu",
    "TransformerDecoder",
    "Transformer",
    "Sequential",
    "Graph",
    *(name for name in MODELS if name.split(", ")[-1] not in ("rnn", "lstm", "window", "untied", "tokens")),
]
EACH = pytest.mark.parametrize("name", SOME)
VERBS = ("forward", "backward", "fit", "training_forward", "training_backward", "zero_grad")


def parts_of(layer: Any) -> list[Any]:
    """The layer and all that it is made of."""
    return [layer, *(part for child in getattr(layer, "_children", {}).values() for part in parts_of(child))]


@EACH
def test_training_is_refused_by_name(name: str) -> None:
    twin = ALL[name].original().with_weights("int8")
    before = {key: np.array(a) for key, a in twin.parameters.items()}
    for part in parts_of(twin):
        kind = type(part).__name__
        for verb in VERBS:
            if hasattr(part, verb):
                with pytest.raises(
                    TypeError, match=rf"^{verb} needs float32 weights, and this {kind} is a twin with int8"
                ):
                    getattr(part, verb)()
        with pytest.raises(TypeError, match=f"^grads needs float32 weights, and this {kind} is a twin"):
            _ = part.grads
        with pytest.raises(TypeError, match=f"^load_state_dict needs float32 weights, and this {kind} is a twin"):
            part.load_state_dict(part.state_dict())
        for key in part.parameters:
            with pytest.raises(
                TypeError, match=f"^setting a parameter needs float32 weights, and this {kind} is a twin"
            ):
                part.parameters[key] = part.parameters[key]
        with pytest.raises(TypeError, match=f"^with_weights needs float32 weights, and this {kind} is a twin"):
            part.with_weights("bfloat16")
        assert part.weights == "int8"
    for key, array in twin.parameters.items():
        assert_same_bits(array, before[key])


def test_trainers_and_optimisers_refuse_twins() -> None:
    twin = ALL["Sequential"].original().with_weights("bfloat16")
    data = (ids_of(13), ids_of(5))
    with pytest.raises(TypeError, match="^AdamW needs float32 weights"):
        fs.training.fit(twin, data, loss="cross_entropy", epochs=1, progress=False)
    with pytest.raises(TypeError, match="^SGD needs float32 weights, and this Sequential is a twin"):
        fs.training.SGD(twin, 0.1)


def test_layers_that_are_twins_make_a_twin(tmp_path: Path) -> None:
    parts = [fs.Linear(5, SIZE, seed=0).with_weights("int8"), fs.GRU(SIZE, 7, seed=1)]
    whole = fs.Sequential(*parts)
    assert whole.weights == "int8" and parts[1].weights == "float32"
    with pytest.raises(TypeError, match="^forward needs float32 weights, and this Sequential is a twin"):
        whole.forward(np.zeros((1, 2, 5), "float32"))
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype("float32")
    whole.save(tmp_path / "a-file")
    for other in (fs.load(tmp_path / "a-file"), copy.copy(whole), pickle.loads(pickle.dumps(whole))):
        assert other.weights == "int8" and narrow_bytes(other) == narrow_bytes(whole)
        assert_same_bits(other(x), whole(x))
    with pytest.raises(ValueError, match="narrow weights of one type, not of bfloat16 and int8"):
        fs.Sequential(parts[0], fs.GRU(SIZE, 7).with_weights("bfloat16"))


def test_types_that_there_are_not() -> None:
    layer = fs.LSTM(3, 4)
    assert layer.weights == "float32" and fs.LSTM(3, 4, dtype="float64").weights == "float64"
    for wrong in ("float32", "int4", "", None, np.int8, 8):
        with pytest.raises(ValueError, match="type should be 'bfloat16' or 'int8', not"):
            layer.with_weights(wrong)
    for made in (
        fs.LSTM(3, 4, dtype="float64"),
        fs.models.AutoRegressive(2),
        fs.Sequential(fs.Linear(2, 3, dtype="float64")),
    ):
        with pytest.raises(ValueError, match="should be of float32 to have int8 weights"):
            made.with_weights("int8")


@EACH_TYPE
def test_patterns_of_what_stays(weights: str) -> None:
    model = ALL["TransformerLM, gpt2"].original()
    every = set(narrow_bytes(model.with_weights(weights)))
    assert every == {
        name
        for name in model.parameters
        if name == "embedding.weight"
        or name.endswith(("in_proj_weight", "out_proj.weight", "linear1.weight", "linear2.weight"))
    }
    for keep, stays in (
        (["*self_attn*"], "self_attn"),
        ("*self_attn*", "self_attn"),
        (["*.linear1.weight"], "linear1"),
        (["embedding.weight"], "embedding"),
    ):
        twin = model.with_weights(weights, keep=keep)
        assert set(narrow_bytes(twin)) == {name for name in every if stays not in name}
        for name in every - set(narrow_bytes(twin)):
            assert_same_bits(twin.parameters[name], model.parameters[name])
        assert twin.weights == weights
    assert set(narrow_bytes(model.with_weights(weights, keep=["*layers.0*", "*layers.1*"]))) == {"embedding.weight"}
    assert not narrow_bytes(model.with_weights(weights, keep=["*"]))
    for keep, error, message in (
        (["*nothing*"], ValueError, r"keep should hold patterns that fit a parameter, and '\*nothing\*' fits none"),
        (["*self_attn*", "embeding"], ValueError, "'embeding' fits none"),
        ([3], TypeError, "keep should hold patterns of names, not"),
    ):
        with pytest.raises(error, match=message):
            model.with_weights(weights, keep=keep)


@EACH_TYPE
def test_what_is_one_sum_stays_together(weights: str) -> None:
    layer = ALL["lstm_proj, both ways"].original()
    for pattern in ("weight_ih_l0", "weight_hh_l0"):
        kept = set(layer.parameters) - set(narrow_bytes(layer.with_weights(weights, keep=[pattern])))
        assert {name for name in kept if name.startswith("weight")} == {"weight_ih_l0", "weight_hh_l0"}
    kept = set(layer.parameters) - set(narrow_bytes(layer.with_weights(weights, keep=["weight_hr_l1_reverse"])))
    assert {name for name in kept if name.startswith("weight")} == {"weight_hr_l1_reverse"}


@EACH_TYPE
@pytest.mark.parametrize("name", ["lstm, one", "TransformerLM, gpt2", "Seq2Seq, additive, gru"])
def test_keeping_all_is_the_layer_itself(name: str, weights: str) -> None:
    """And keeping some is nearer to it than keeping none."""
    case = ALL[name]
    layer = case.original()
    whole = case.run(layer)
    assert_same_bits(list(arrays_in(case.run(layer.with_weights(weights, keep=["*"])))), list(arrays_in(whole)))
    exact = next(arrays_in(whole))
    errors = [
        np.abs(next(arrays_in(case.run(layer.with_weights(weights, keep=k)))) - exact).mean()
        for k in ([], ["*weight*"])
    ]
    assert errors[0] > 0 and errors[1] == 0


@EACH
@EACH_TYPE
def test_a_twin_holds_narrow_weights_alone(name: str, weights: str) -> None:
    original = ALL[name].original()
    before = original.state_dict()
    refs = [weakref.ref(a) for a in original._arrays.values() if a.ndim == 2]
    twin = original.with_weights(weights)
    for key, array in original.parameters.items():
        assert_same_bits(array, before[key])
    assert original.weights == "float32"
    matrices = 0
    for key, array in twin._arrays.items():
        if isinstance(array, NarrowArray):
            matrices += array.size
            wanted = before[key].size * (2 if weights == "bfloat16" else 1)
            assert array.nbytes == wanted + (0 if weights == "bfloat16" else 4 * len(before[key]))
            np.testing.assert_allclose(twin.parameters[key], before[key], atol=np.abs(before[key]).max() / 100)
        else:
            assert_same_bits(array, before[key])
    assert matrices > 0 or name == "AutoRegressive"
    list(arrays_in(ALL[name].run(twin)))  # packs
    del original
    gc.collect()
    kept = {id(a) for a in twin._arrays.values() if isinstance(a, np.ndarray)}
    assert not [ref for ref in refs if ref() is not None and id(ref()) not in kept]


def test_a_model_without_narrow_weights() -> None:
    model = fs.models.AutoRegressive(3, 5, dtype="float32", seed=1)
    series = np.random.default_rng(0).normal(size=(2, 30)).cumsum(1)
    model.fit(series, epochs=2, progress=False)
    twin = model.with_weights("int8")
    assert twin.weights == "int8" and not narrow_bytes(twin)
    assert_same_bits(twin.forecast(series, 4), model.forecast(series, 4))


@EACH
@EACH_TYPE
def test_pickles_and_copies(name: str, weights: str) -> None:
    case = ALL[name]
    twin = case.original().with_weights(weights)
    wanted = list(arrays_in(case.run(twin)))
    for other in (pickle.loads(pickle.dumps(twin)), copy.deepcopy(twin), copy.copy(twin)):
        assert type(other) is type(twin) and other is not twin and other.weights == weights
        assert narrow_bytes(other) == narrow_bytes(twin)
        assert_same_bits(list(arrays_in(case.run(other))), wanted)
        with pytest.raises(TypeError, match="zero_grad needs float32 weights"):
            other.zero_grad()
        for array in other._arrays.values():
            values = array.values if isinstance(array, NarrowArray) else array
            assert not values.flags.writeable
    assert len(pickle.dumps(twin)) < 40 * sum(narrow_bytes(twin).values()) + 60000


@EACH_TYPE
@pytest.mark.parametrize("name", ["Sequential", "TransformerLM, llama", "Seq2Seq, additive, gru", "gru_before, one"])
def test_eight_threads_at_once(name: str, weights: str) -> None:
    case = ALL[name]
    fs.set_num_threads(2)
    wanted = list(arrays_in(case.run(case.original().with_weights(weights))))
    twin = case.original().with_weights(weights)  # nothing is packed yet
    prompt = ids_of(11, 4, batch=2)

    def work(_: int) -> Any:
        found = list(arrays_in(case.run(twin)))
        symbols = twin.generate(prompt, 4, temperature=0) if name in GENERATE else None
        return found, symbols

    with ThreadPoolExecutor(8) as pool:
        for found, symbols in pool.map(work, range(16)):
            assert_same_bits(found, wanted)
            if symbols is not None:
                assert_same_bits(list(symbols), list(twin.generate(prompt, 4, temperature=0)))


@EACH
def test_words_about_a_twin(name: str) -> None:
    original = ALL[name].original()
    twin = original.with_weights("bfloat16")
    assert type(original).__name__ in repr(twin)
    assert repr(twin.parameters) == repr(original.parameters)
    assert len(twin.parameters) == len(original.parameters) and list(twin.parameters) == list(original.parameters)
    if hasattr(twin, "summary"):
        assert str(original.summary()).splitlines()[-1] == str(twin.summary()).splitlines()[-1]


def test_parameters_of_a_twin_are_read_as_float32() -> None:
    layer = fs.Linear(SIZE, 5, seed=0)
    for weights in ("bfloat16", "int8"):
        twin = layer.with_weights(weights)
        array = twin.parameters["weight"]
        assert array.dtype == np.float32 and not array.flags.writeable
        state = twin.state_dict()
        assert state["weight"].flags.writeable
        again = fs.Linear(SIZE, 5)
        again.load_state_dict(state)
        assert_same_bits(again.with_weights(weights).parameters["weight"], array)
    with pytest.raises(AttributeError):
        twin.weights = "float32"
