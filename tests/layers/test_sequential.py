"""Sequential: what goes to which layer follows from what each declares, and from nothing else."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from common import assert_close, assert_same_bits

import fastseq as fs

BOTH = pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
LENGTHS = np.array([6, 2, 0, 5])
PAST = np.arange(6) >= LENGTHS[:, None]
F64 = {"dtype": "float64"}


class Own(fs.Layer):
    """A layer that tells what it was given."""

    def __init__(self, kind: str = "pointwise", add: float = 0.0) -> None:
        super().__init__(kind=kind, add=add, dtype="float64")
        self.time = kind
        self.seen: list[Any] = []

    def __call__(self, x: Any, *, lengths: Any = None) -> Any:
        self.seen.append((np.array(x), lengths))
        y = x + self.add
        return y.sum(axis=1) if self.time == "pooling" else y

    def forward(self, x: Any, *, lengths: Any = None, seed: int | None = None) -> Any:
        return self(x, lengths=lengths), self.tape(np.shape(x))

    def backward(self, dy: Any, tape: Any, *, grads: Any = None) -> Any:
        (shape,) = self.kept(tape)
        self.seen.append((np.array(dy), None))
        return np.broadcast_to(dy[:, None], shape) if self.time == "pooling" else dy


STACKS: dict[str, Callable[[Any], list[Any]]] = {
    "encoder model": lambda m: [
        _models(m).TransformerEncoderModel(11, 8, 2, 1, pooling=None, dropout=0, seed=1, **F64)
    ],
    "encoder model, linear": lambda m: [
        _models(m).TransformerEncoderModel(11, 8, 2, 1, pooling=None, dropout=0, seed=1, **F64),
        m.Linear(8, 3, seed=2, **F64),
    ],
    "pooled": lambda m: [
        _models(m).TransformerEncoderModel(11, 8, 2, 1, pooling="mean", dropout=0, seed=1, **F64),
        m.Linear(8, 3, seed=2, **F64),
    ],
    "recurrent": lambda m: [
        m.Embedding(11, 4, seed=1, **F64),
        m.LSTM(4, 3, bidirectional=True, seed=2, **F64),
        m.Linear(6, 4, seed=3, **F64),
        m.GRU(4, 3, seed=4, **F64),
    ],
    "attention": lambda m: [
        m.Embedding(11, 4, seed=1, **F64),
        m.Sequential(m.LayerNorm(4, **F64), m.MultiheadAttention(4, 2, seed=2, **F64)),
        m.Sequential(m.Sequential(m.TransformerEncoder(1, 4, 2, 8, dropout=0, seed=3, **F64)), m.GELU(**F64)),
    ],
    "pointwise": lambda m: [
        m.Embedding(11, 4, seed=1, **F64),
        m.Sequential(m.Linear(4, 4, seed=2, **F64), m.ReLU(**F64)),
    ],
    "nested and pooled": lambda m: [
        m.Sequential(
            m.Embedding(11, 4, seed=1, **F64),
            m.Sequential(m.GRU(4, 4, bidirectional=True, seed=2, **F64), Own("pooling")),
        ),
        m.Linear(8, 3, seed=3, **F64),
    ],
}


def _models(module: Any) -> Any:
    return fs.models if module is fs else module.models


@BOTH
@pytest.mark.parametrize("stack", STACKS)
def test_a_padded_batch_is_its_rows_cut(stack: str, module: Any) -> None:
    """Outputs, and gradients of all parameters; whatever stands in the padding of ids."""
    model = module.Sequential(*STACKS[stack](module))
    pooling = model.time == "pooling"
    ids = np.random.default_rng(0).integers(0, 11, (4, 6))
    y = model(ids, lengths=LENGTHS)
    for b, n in enumerate(LENGTHS):
        row = model(ids[b : b + 1, :n]) if n or not pooling else model(ids[b : b + 1], lengths=[0])
        assert_close(y[b] if pooling else y[b, :n], row[0], 1e-13)
    if not pooling:
        assert not y[PAST].any() and not np.signbit(y[PAST]).any()
    for garbage in (ids, np.where(PAST, 99, ids)):
        out, tape = model.forward(garbage, lengths=LENGTHS, seed=1)
        dy = np.cos(np.arange(out.size, dtype=np.float64)).reshape(out.shape)
        if not pooling:
            dy[PAST] = np.nan
        grads = {name: np.zeros_like(array) for name, array in model.parameters.items()}
        assert model.backward(dy, tape, grads=grads) is None
        if garbage is ids:
            first, first_out = grads, out
    assert_same_bits(out, first_out)
    for name, array in first.items():
        assert_same_bits(grads[name], array, name)
    sums = {name: np.zeros_like(array) for name, array in model.parameters.items()}
    for b, n in enumerate(LENGTHS):
        if n:
            _, tape = model.forward(ids[b : b + 1, :n])
            model.backward(dy[b : b + 1] if pooling else dy[b : b + 1, :n], tape, grads=sums)
        elif pooling:  # the row without a step has outputs, too
            _, tape = model.forward(ids[b : b + 1], lengths=[0])
            model.backward(dy[b : b + 1], tape, grads=sums)
    for name, array in first.items():
        assert np.abs(array - sums[name]).max() <= 1e-11 * max(1, np.abs(array).max()), name
        assert array.any() or "bias" in name, name


@BOTH
@pytest.mark.parametrize("pooling", ["cls", "mean", None])
def test_lengths_reach_a_model(pooling: str | None, module: Any) -> None:
    """Columns of what a pooled model gives are no steps."""
    encoder = _models(module).TransformerEncoderModel(9, 8, 2, 1, pooling=pooling, seed=0)
    linear = module.Linear(8, 8, seed=1)
    model = module.Sequential(encoder, linear)
    assert model.time == ("sequence" if pooling is None else "pooling")
    ids = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 8, 8]])
    y = model(ids, lengths=[5, 2])
    expected = linear(encoder(ids, lengths=[5, 2]))
    if pooling is None:
        expected[1, 2:] = 0
    assert_same_bits(y, expected)
    assert (np.count_nonzero(y[1], axis=-1) == 8).sum() == (2 if pooling is None else 1)
    assert_same_bits(model(np.where(ids == 8, 0, ids), lengths=[5, 2]), y)


def test_every_layer_gets_what_it_declares() -> None:
    layers = [Own("pointwise", 1.0), Own("sequence", 2.0), Own("pointwise", 4.0), Own("pooling"), Own("pointwise", 8.0)]
    model = fs.Sequential(layers[0], fs.Sequential(*layers[1:3]), *layers[3:])
    x = np.ones((4, 6, 2))
    x[PAST] = np.nan
    y = model(x, lengths=LENGTHS)
    for layer, real in zip(layers, (1, 2, 4, 8), strict=False):
        seen, lengths = layer.seen[0]
        assert not seen[PAST].any() and (seen[~PAST] == real).all()
        assert (lengths is None) == (layer.time == "pointwise")
        if lengths is not None:
            assert_same_bits(np.asarray(lengths), LENGTHS)
    assert layers[4].seen[0][0].shape == (4, 2) and layers[4].seen[0][1] is None
    assert_same_bits(y, np.repeat(LENGTHS[:, None] * 8.0 + 8, 2, axis=1))
    out, tape = model.forward(x, lengths=LENGTHS)
    assert_same_bits(out, y)
    for layer in layers:
        layer.seen.clear()
    dx = model.backward(np.ones_like(y), tape)
    assert not dx[PAST].any() and (dx[~PAST] == 1).all()
    for layer in layers[:3]:
        assert not layer.seen[0][0][PAST].any() and (layer.seen[0][0][~PAST] == 1).all()


@BOTH
def test_states_are_carried(module: Any) -> None:
    """Chunks are the whole, in bits; resets and states of every layer, nested ones too."""

    def make() -> Any:
        return module.Sequential(
            module.Linear(3, 4, seed=1, **F64),
            module.Sequential(module.LSTM(4, 5, 2, seed=2, **F64), module.Linear(5, 4, seed=3, **F64)),
            module.GRU(4, 3, seed=4, **F64),
        )

    model = make()
    assert model.carries_state and model.time == "sequence" and model.unstreamable() is None
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8, 3))
    resets = rng.random((3, 8)) < 0.3
    linear, (lstm, inner), gru = model[0], model[1], model[2]
    h, of_lstm = lstm(linear(x), resets=resets)
    expected, of_gru = gru(inner(h), resets=resets)
    y, state = model.run(x, resets=resets)
    assert_same_bits(y, expected)
    assert_same_bits(model(x, resets=resets), expected)
    assert state == (None, (of_lstm, None), of_gru)
    start = tuple(model.run(rng.normal(size=(3, 4, 3)))[1])
    whole, end = model.run(x, start)
    assert not np.array_equal(whole, model(x))
    one, middle = model.run(x[:, :5], start)
    other, last = model.run(x[:, 5:], middle)
    assert_same_bits(np.concatenate([one, other], axis=1), whole)
    assert last == end
    assert_same_bits(model(x, start), whole)
    out, after, tape = model.forward_carrying(x, start, seed=1)
    assert_same_bits(out, whole)
    assert after == end
    assert_same_bits(model.forward(x, start, resets=resets)[0], model(x, start, resets=resets))
    assert not np.array_equal(model(x, start, resets=resets), whole)
    assert model.backward(np.ones_like(out), tape).shape == x.shape
    assert model.initial_state(3)[1][0] == lstm.initial_state(3)
    assert_same_bits(model(x, model.initial_state(3)), model(x))


@BOTH
def test_truncation_reaches_the_recurrent_layers(module: Any) -> None:
    gru = module.GRU(3, 4, seed=1, **F64)
    model = module.Sequential(module.Linear(3, 3, seed=2, **F64), module.Sequential(gru))
    x = np.random.default_rng(0).normal(size=(2, 5, 3))
    y, tape = model.forward(x)
    dy = np.cos(np.arange(y.size, dtype=np.float64)).reshape(y.shape)
    found = {}
    for k in (1, 2, None):
        grads = {name: np.zeros_like(array) for name, array in model.parameters.items()}
        model.backward(dy, tape, truncate=k, grads=grads)
        _, _, own = gru.forward(model[0](x))
        expected = {name: np.zeros_like(array) for name, array in gru.parameters.items()}
        gru.backward(dy, own, truncate=k, grads=expected)
        for name, array in expected.items():
            assert_same_bits(grads[f"1.0.{name}"], array)
        found[k] = grads["1.0.weight_hh_l0"]
    assert not np.array_equal(found[1], found[2]) and not np.array_equal(found[2], found[None])
    with pytest.raises(ValueError, match="truncate should be None"):
        still = module.Sequential(module.Linear(3, 3))
        still.backward(np.zeros((2, 3), "f4"), still.forward(np.zeros((2, 3), "f4"))[1], truncate=1)


@BOTH
def test_what_cannot_stand_in_a_sequential(module: Any) -> None:
    gru = module.GRU(3, 3)
    encoder = _models(module).TransformerEncoderModel(9, 3, 1, 1)
    with pytest.raises(ValueError, match=r"layers\[1\], a GRU, should stand before layers\[0\], a Transformer"):
        module.Sequential(encoder, gru)
    with pytest.raises(ValueError, match=r"layers\[2\], a GRU"):
        module.Sequential(module.Sequential(encoder), module.Linear(3, 3), gru)
    with pytest.raises(TypeError, match=r"layers\[1\] should take one input, not as a TransformerDecoder does.*memory"):
        module.Sequential(gru, module.TransformerDecoder(1, 3, 1))
    with pytest.raises(TypeError, match=r"layers\[0\] should take one input"):
        module.Sequential(module.Transformer(3, 1, 1, 1))
    with pytest.raises(ValueError, match=r"layers\[0\].time should be one of"):
        module.Sequential(Own("static"))
    with pytest.raises(TypeError, match="a layer needs a forward to be trained"):
        fs.Sequential(fs.models.MarkovChain(3)).forward(np.array([[1, 2]]))


@BOTH
def test_what_a_sequential_refuses_to_be_given(module: Any) -> None:
    still = module.Sequential(module.Linear(3, 3))
    x = np.zeros((2, 4, 3), "f4")
    for options, name in (({"state": (None,)}, "state"), ({"resets": np.zeros((2, 4), bool)}, "resets")):
        for verb in (still, still.forward, still.run, still[0].run, module.Sequential(still)):
            with pytest.raises(ValueError, match=f"{name} should be None: .* carries no state"):
                verb(x, **options)
    model = module.Sequential(module.Linear(3, 3), module.GRU(3, 3))
    for state in (model.initial_state(2)[1], (None,), [None] * 3, 3):
        with pytest.raises(ValueError, match="state should be a tuple of 2"):
            model(x, state)
    with pytest.raises(ValueError, match=r"state\[0\] should be None: Linear"):
        model(x, (model.initial_state(2)[1], None))
    with pytest.raises(ValueError, match=r"state.h should be of shape \(2, 1, 3\)"):
        model(x, model.initial_state(3))
    with pytest.raises(ValueError, match="resets should be of shape"):
        model(x, resets=np.zeros((2, 3), bool))


@BOTH
def test_an_axis_of_time_is_never_guessed(module: Any) -> None:
    """A layer that takes the axis of time for one of features is refused where lengths are given."""
    x = np.zeros((2, 4), "f4")
    for layer in (module.Linear(4, 4), module.LayerNorm(4), module.RMSNorm(4), module.Softmax()):
        with pytest.raises(ValueError, match="x should be of shape .* of 3 axes at least"):
            module.Sequential(layer)(x, lengths=[1, 4])
        assert layer(x).shape == (2, 4)
    with pytest.raises(ValueError, match="4 axes at least"):
        module.Sequential(module.LayerNorm((4, 3)))(np.zeros((2, 4, 3), "f4"), lengths=[1, 4])
    assert module.Sequential(module.ReLU())(x + 1, lengths=[1, 4]).sum() == 5

    class Flat(Own):
        def __call__(self, x: Any, *, lengths: Any = None) -> Any:
            return x.reshape(len(x), -1)

    with pytest.raises(ValueError, match="should give an output for every step, since its time is 'pointwise'"):
        fs.Sequential(Flat())(np.zeros((2, 4, 3)), lengths=[1, 4])


@BOTH
def test_what_each_layer_declares(module: Any) -> None:
    pointwise = (
        module.Linear(2, 2),
        module.Embedding(3, 2),
        module.LayerNorm(2),
        module.RMSNorm(2),
        module.ReLU(),
        module.GELU(),
        module.Softmax(),
        module.Dropout(),
        module.SinusoidalPositions(2),
        module.LearnedPositions(3, 2),
        module.RotaryPositions(2),
        module.Sequential(module.Linear(2, 2)),
    )
    for layer in pointwise:
        assert layer.time == "pointwise" and not layer.carries_state and layer.unstreamable() is None
    for layer in (module.RNN(2, 2), module.LSTM(2, 2), module.GRU(2, 2), module.Sequential(module.GRU(2, 2))):
        assert layer.time == "sequence" and layer.carries_state and layer.unstreamable() is None
    both = module.LSTM(2, 2, bidirectional=True)
    mixing = (module.MultiheadAttention(2, 1), module.TransformerEncoder(1, 2, 1), module.TransformerEncoderLayer(2, 1))
    for layer in mixing:
        assert layer.time == "sequence" and not layer.carries_state
        assert "would see nothing of the chunks before" in layer.unstreamable()
    assert "bidirectional" in module.Sequential(module.Linear(2, 2), both).unstreamable()
    assert "one output" in _models(module).TransformerEncoderModel(9, 2, 1, 1).unstreamable()


@BOTH
def test_neighbours_have_to_fit(module: Any) -> None:
    """Where both say how wide their vectors are, whatever stands between them that keeps the width."""
    lstm, linear = module.LSTM(8, 32), module.Linear(16, 3)
    said = r"layers\[1\] should take vectors of 32, which layers\[0\], LSTM\(input_size=8, hidden_size=32\), gives, but"
    with pytest.raises(ValueError, match=said + r" Linear\(in_features=16, out_features=3\) takes vectors of 16"):
        module.Sequential(lstm, linear)
    between = (module.Dropout(0.1), module.ReLU(), module.Softmax(), module.LayerNorm(32), module.LastStep())
    with pytest.raises(ValueError, match=r"layers\[6\] .* layers\[0\], LSTM"):
        module.Sequential(lstm, *between, linear)
    for one in (module.GRU(16, 8), module.LayerNorm(16), module.RMSNorm(16), module.LearnedPositions(9, 16)):
        with pytest.raises(ValueError, match="takes vectors of 16"):
            module.Sequential(lstm, one)
    for one in (module.MultiheadAttention(16, 2), module.TransformerEncoder(1, 16, 2), module.Sequential(linear)):
        with pytest.raises(ValueError, match="takes vectors of 16"):
            module.Sequential(module.Sequential(lstm, module.ReLU()), one)
    both = module.LSTM(8, 8, bidirectional=True)
    assert len(module.Sequential(module.Embedding(5, 8), both, module.SinusoidalPositions(16), linear)) == 4

    class Halves(Own):
        def __call__(self, x: Any, *, lengths: Any = None) -> Any:
            return x[..., ::2]

    class Wide(module.Linear):
        def __call__(self, x: Any) -> Any:
            return super().__call__(x)[..., :1].repeat(16, axis=-1)

    fs.Sequential(fs.LSTM(8, 32, **F64), Halves(), fs.Linear(16, 3, **F64))  # what says nothing is not judged
    module.Sequential(lstm, Wide(32, 5), module.Linear(16, 3))


@BOTH
def test_errors_say_of_which_layer_they_are(module: Any) -> None:
    model = module.Sequential(module.ReLU(), module.Sequential(module.GRU(4, 4), module.Linear(4, 3)))
    for verb in (model, model.run, model.forward, model.forward_carrying, lambda x: model.step(x[:, 0])):
        with pytest.raises(
            ValueError, match=r"^layers\[1\], a Sequential: layers\[0\], a GRU: x\w* should be of shape"
        ):
            verb(np.zeros((2, 3, 5), "f4"))
        with pytest.raises(TypeError, match=r"^layers\[0\], a ReLU: x should hold real"):
            verb(np.zeros((2, 3, 4), int))


@BOTH
def test_steps_are_the_call(module: Any) -> None:
    """In bits: one step after another, from any state, and with states that a run returned."""
    layers = [
        module.Embedding(11, 4, seed=1),
        module.Dropout(0.5),
        module.LSTM(4, 5, 2, seed=2),
        module.Sequential(module.LayerNorm(5), module.Linear(5, 4, seed=3), module.GRU(4, 6, seed=4), module.ReLU()),
        module.Linear(6, 3, seed=5),
        module.Softmax(),
    ]
    model = module.Sequential(*layers)
    ids = np.random.default_rng(0).integers(0, 11, (3, 9))
    whole, end = model.run(ids)
    for start in (None, model.initial_state(3)):
        state, steps = start, []
        for t in range(9):
            y, state = model.step(ids[:, t], state)
            steps.append(y)
        assert_same_bits(np.stack(steps, axis=1), whole)
        assert state == end
    _, middle = model.run(ids[:, :5])
    before = pickle.dumps(middle)
    y, after = model.step(ids[:, 5], middle)
    assert_same_bits(y, whole[:, 5])
    assert after == model.run(ids[:, :6])[1] and pickle.dumps(middle) == before
    assert_same_bits(model.run(ids[:, 6:], after)[0], whole[:, 6:])
    y, state = model.step(ids[:0, 0])
    assert y.shape == (0, 3) and state[2].h.shape[0] == 0


@BOTH
def test_steps_of_layers_without_a_state(module: Any) -> None:
    model = module.Sequential(module.Linear(3, 4, seed=1), module.Tanh(), module.Linear(4, 2, seed=2))
    x = np.random.default_rng(0).normal(size=(5, 7, 3)).astype("f4")
    y, state = model.step(x[:, 2])
    assert state is None and model.initial_state(5) is None
    assert_same_bits(y, model(x)[:, 2])


def test_steps_of_a_layer_of_ones_own() -> None:
    """A pointwise one sees x (B, 1, ...), a state one (B, 1, ...) and its state."""
    seen = Own("pointwise", 1.0)
    model = fs.Sequential(seen, fs.GRU(2, 2, **F64))
    model.step(np.zeros((3, 2)))
    assert seen.seen[0][0].shape == (3, 1, 2)

    class Sum(fs.Layer):
        time, carries_state = "sequence", True

        def __init__(self) -> None:
            super().__init__(dtype="float64")

        def __call__(self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None) -> Any:
            y = np.cumsum(x, axis=1) + (0 if state is None else state[:, None])
            return y, y[:, -1]

        def initial_state(self, batch_size: int) -> Any:
            return np.zeros((batch_size, 2))

    total = fs.Sequential(Sum(), fs.Linear(2, 2, seed=1, **F64))
    x = np.arange(12.0).reshape(1, 6, 2)
    state = total.initial_state(1)
    for t in range(6):
        y, state = total.step(x[:, t], state)
        assert_same_bits(y, total(x)[:, t])


@BOTH
def test_what_cannot_step(module: Any) -> None:
    x = np.zeros((2, 4), "f4")
    for layer, why in (
        (module.GRU(4, 4, bidirectional=True), "is bidirectional"),
        (module.LastStep(), "gives one output for all steps"),
        (module.MultiheadAttention(4, 2), "carries no state"),
        (module.TransformerEncoder(1, 4, 2), "carries no state"),
        (module.SinusoidalPositions(4), "has to know where a step stands"),
        (module.RotaryPositions(4), "has to know where a step stands"),
    ):
        kind = type(layer).__name__
        with pytest.raises(ValueError, match=rf"step needs layers .* but layers\[1\]: {kind}\(.* {why}"):
            module.Sequential(module.Linear(4, 4), layer).step(x)
        with pytest.raises(ValueError, match=rf"layers\[0\]: layers\[0\]: {kind}\("):
            module.Sequential(module.Sequential(layer)).step(x)
    model = module.Sequential(module.Linear(4, 4), module.GRU(4, 4))
    for value, error, said in (
        (x[0, 0], ValueError, "x_t should be of shape"),
        (x[:, :3], ValueError, r"layers\[0\], a Linear: x should be of shape \(..., 4\)"),
        (x.astype(int), TypeError, "should hold real floating numbers"),
        ("x", ValueError, "x_t should be of shape"),
    ):
        with pytest.raises(error, match=said):
            model.step(value)
    for state in (model.initial_state(2)[1], (None,), 3):
        with pytest.raises(ValueError, match="state should be a tuple of 2"):
            model.step(x, state)
    with pytest.raises(ValueError, match=r"state.h should be of shape \(2, 1, 4\)"):
        model.step(x, model.initial_state(3))


def test_a_list_of_layers() -> None:
    with pytest.raises(TypeError, match=r"layers\[0\] should be a layer, not list .*; layers are given one by one"):
        fs.Sequential([fs.Linear(3, 3)])  # type: ignore[arg-type]
