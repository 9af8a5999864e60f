"""Names of other libraries: refused, with what they are called here, by constructors, calls and `fit`."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import numpy as np
import pytest

import fastseq as fs
from fastseq import elsewhere

BOTH = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
X = np.zeros((2, 3, 4), "float32")


@BOTH
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: m.LSTM(4, 8, batch_first=True), "LSTM has no argument batch_first: the batch is always axis 0$"),
        (lambda m: m.GRU(4, 8, return_sequences=False), r"GRU has no .*for the last one put fastseq.LastStep\(\)"),
        (lambda m: m.GRU(4, 8, return_state=True), r"return_state: .*y, state = layer\(x\)$"),
        (lambda m: m.RNN(units=8, input_dim=4), "units: here it is hidden_size; and no input_dim: here it is input_s"),
        (lambda m: m.RNN(4, 8, activation="relu"), "activation: here it is nonlinearity$"),
        (lambda m: m.Linear(4, 8, activation="relu"), r"activation: an activation is a layer, fastseq.ReLU\(\)"),
        (lambda m: m.Linear(4, 8, device="cpu"), "device: everything runs on the CPU"),
        (lambda m: m.Embedding(input_dim=4, output_dim=8), "input_dim: here it is num_embeddings; and no output_dim: "),
        (lambda m: m.TransformerEncoder(2, 4, 2, nlayers=2), "nlayers: here it is num_layers"),
        (lambda m: m.LSTM(4, 8, hiden_size=8), r"hiden_size: did you mean hidden_size\?"),
        (lambda m: m.LSTM(4, 8, xyzzy=8), "xyzzy; its arguments are input_size, hidden_size, num_layers, proj_size"),
        (
            lambda m: m.LSTM(4, 8)(X, initial_state=None),
            "a call of LSTM has no argument initial_state: here it is stat",
        ),
        (lambda m: m.GRU(4, 8)(X, training=True), "training: a call is inference, and forward is training"),
        (lambda m: m.Sequential(m.GRU(4, 8))(X, mask=None), "a call of Sequential has no argument mask: here it is le"),
        (
            lambda m: m.TransformerEncoder(1, 4, 2)(X, src_key_padding_mask=None),
            "a call of TransformerEncoder has no argument src_key_padding_mask: here it is lengths, the number of real",
        ),
        (lambda m: m.MultiheadAttention(4, 2)(X, attn_mask=None), "attn_mask: here it is mask, in which True is what"),
        (lambda m: m.MultiheadAttention(4, 2)(X, is_causal=True), "is_causal: here it is causal$"),
        (lambda m: m.MultiheadAttention(4, 2)(X, key_padding_mask=None), "key_padding_mask: here it is lengths, the "),
        (lambda m: m.attention(X, X, X, is_causal=True), "attention has no argument is_causal: here it is causal"),
    ],
)
def test_names_of_other_libraries_lead_to_ours(make: Any, said: str, module: Any) -> None:
    with pytest.raises(TypeError, match=said) as caught:
        make(module)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: m.RecurrentLM(5, 4, 6, nlayers=2), "RecurrentLM has no argument nlayers: here it is num_layers"),
        (lambda m: m.RecurrentLM(5, hidden_dim=4, embed_dim=3), "hidden_dim: here it is hidden_size; and no embed_dim"),
        (lambda m: m.TransformerLM(5, 4, 2, 1, block_size=8), "block_size: here it is context"),
        (lambda m: m.TransformerLM(5, embedding_dim=4), "embedding_dim: here it is d_model"),
        (lambda m: m.RecurrentLM(5, 4, 6).generate([1], max_new_tokens=3), "generate has no .*: here it is max_new$"),
        (
            lambda m: m.RecurrentLM(5, 4, 6).generate([1], max_length=3),
            "here it is max_new, which does not count the p",
        ),
        (lambda m: m.RecurrentLM(5, 4, 6).generate([1], 3, do_sample=False), "do_sample: .* with temperature=0 the li"),
        (lambda m: m.MarkovChain(5).generate([1], 3, num_return_sequences=2), "here it is num_results"),
        (
            lambda m: m.MarkovChain(5).stream([1], 3, eos_token_id=2),
            "stream has no argument eos_token_id: here it is s",
        ),
        (lambda m: m.RecurrentForecaster(1, 4).forecast([1.0], n_steps=3), "forecast has no .* here it is horizon"),
    ],
)
def test_so_do_models(make: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        make(fs.models)


def test_other_type_errors_are_what_they_were() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'hidden_size'"):
        fs.LSTM(4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        fs.Sequential(fs.LSTM(4, 4))(lengths=[1])
    with pytest.raises(TypeError, match="input_size should be an integer"):
        fs.LSTM("4", 4)  # type: ignore[arg-type]

    class Own(fs.Layer):
        def __init__(self, size: int, **more: Any) -> None:
            super().__init__(size=size)
            raise TypeError("my own")

    with pytest.raises(TypeError, match="my own"):
        Own(3, units=4)


@BOTH
def test_signatures_hide_nothing_and_show_nothing_else(module: Any) -> None:
    for function in (module.LSTM.__call__, module.MultiheadAttention.__call__, module.Sequential.__call__):
        kinds = {one.kind for one in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds and function.__doc__
    assert list(inspect.signature(module.attention).parameters)[:4] == ["q", "k", "v", "mask"]
    layer = module.Sequential(module.LSTM(4, 4, seed=0))
    assert np.array_equal(pickle.loads(pickle.dumps(layer))(X), layer(X))
    assert pickle.loads(pickle.dumps(module.attention)) is module.attention


def test_the_table_leads_to_names_that_there_are() -> None:
    """Every name of ours is one that something public takes, and none is an argument of `fit` under another name."""
    spaces = (fs, fs.models, fs.training)
    things = [thing for space in spaces for name, thing in vars(space).items() if not name.startswith("_")]
    taken: set[str] = set()
    for thing in [thing for thing in things if callable(thing)]:
        verbs = [getattr(thing, verb, None) for verb in ("__call__", "generate", "forecast", "fit")]
        for one in [thing, *verbs] if isinstance(thing, type) else [thing]:
            if inspect.isfunction(one) or isinstance(one, type):
                taken |= set(inspect.signature(one).parameters)
    ours = {name for here in elsewhere.ARGUMENTS.values() for name in here.names.split()}
    assert ours <= taken
    for there, here in elsewhere.ARGUMENTS.items():
        assert there == there.lower() and (here.names or here.otherwise), there
        assert here.names != there, there
    fits = set(inspect.signature(fs.training.fit).parameters)
    assert set(elsewhere.ARGUMENTS) & fits <= {"steps", "loss"}
