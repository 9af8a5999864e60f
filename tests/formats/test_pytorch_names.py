"""Arrays named as PyTorch names them become layers with the outputs of PyTorch's; what they do not say is asked."""

import numpy as np
import pytest

import fastseq as fs
from fastseq.convert import pytorch


def of(layer, prefix=""):
    """The state dict of a layer, under a prefix; names and layouts are PyTorch's."""
    return {f"{prefix}{name}": array for name, array in layer.state_dict().items()}


def check_same(made, layer):
    left = {**made._config, "seed": None, "dropout": 0}
    right = {**layer._config, "seed": None, "dropout": 0}
    assert type(made) is type(layer) and left == right
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(made.parameters[name], array)


pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

LAYERS = {
    "RNN": (lambda: fs.RNN(3, 4, 2, nonlinearity="relu", seed=0), {"nonlinearity": "relu"}),
    "LSTM": (lambda: fs.LSTM(3, 4, 3, bidirectional=True, seed=0), {}),
    "LSTM, square": (lambda: fs.LSTM(4, 4, seed=0), {}),
    "LSTM, projected": (lambda: fs.LSTM(5, 12, 2, proj_size=3, bidirectional=True, seed=0), {}),
    "LSTM, projected to the size of a GRU": (lambda: fs.LSTM(5, 4, proj_size=3, seed=0), {}),
    "GRU": (lambda: fs.GRU(3, 4, 2, bias=False, seed=0), {}),
    "GRU, float64": (lambda: fs.GRU(3, 4, dtype="float64", seed=0), {}),
    "Linear": (lambda: fs.Linear(3, 4, seed=0), {}),
    "Linear without bias": (lambda: fs.Linear(3, 4, bias=False, seed=0), {"kind": "Linear"}),
    "Embedding": (lambda: fs.Embedding(9, 4, seed=0), {"kind": "Embedding"}),
    "LayerNorm": (lambda: fs.LayerNorm(4, eps=1e-3), {"eps": 1e-3}),
    "LayerNorm of two axes": (lambda: fs.LayerNorm((3, 4)), {"eps": 1e-5}),
    "LayerNorm without bias": (lambda: fs.LayerNorm(4, bias=False), {"eps": 1e-5, "kind": "LayerNorm"}),
    "RMSNorm": (lambda: fs.RMSNorm(4, eps=1e-6), {"eps": 1e-6, "kind": "RMSNorm"}),
    "MultiheadAttention": (lambda: fs.MultiheadAttention(6, 3, seed=0), {"num_heads": 3}),
    "MultiheadAttention of other widths": (
        lambda: fs.MultiheadAttention(6, 2, kdim=5, vdim=7, bias=False, seed=0),
        {"num_heads": 2},
    ),
}
TOLD = {"nhead": 2, "activation": "gelu", "norm_first": True, "layer_norm_eps": 1e-4}
LAYERS |= {
    "TransformerEncoderLayer": (lambda: fs.TransformerEncoderLayer(4, dim_feedforward=7, seed=0, **TOLD), TOLD),
    "TransformerDecoderLayer": (lambda: fs.TransformerDecoderLayer(4, dim_feedforward=7, seed=0, **TOLD), TOLD),
    "TransformerEncoder": (
        lambda: fs.TransformerEncoder(11, 4, dim_feedforward=7, final_norm=True, seed=0, **TOLD),
        TOLD,
    ),
    "TransformerDecoder": (lambda: fs.TransformerDecoder(2, 4, dim_feedforward=7, bias=False, seed=0, **TOLD), TOLD),
    "Transformer": (
        lambda: fs.Transformer(4, 2, 2, 3, 7, seed=0, **{n: v for n, v in TOLD.items() if n != "nhead"}),
        TOLD,
    ),
}


@pytest.mark.parametrize("prefix", ["", "model.encoder"])
@pytest.mark.parametrize("name", LAYERS)
def test_sizes_layers_and_directions_come_from_the_arrays(name, prefix):
    make, told = LAYERS[name]
    layer = make()
    arrays = of(layer, f"{prefix}." if prefix else "")
    if prefix:
        arrays |= of(fs.Linear(2, 2), "other.")
    check_same(pytorch.layer(arrays, prefix, **told), layer)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_have_no_number_of_a_layer(kind, bias):
    layer = getattr(fs, kind)(3, 4, bias=bias, seed=0)
    arrays = {f"cell.{name.removesuffix('_l0')}": array for name, array in layer.state_dict().items()}
    check_same(pytorch.layer(arrays, "cell", **({"nonlinearity": "tanh"} if kind == "RNN" else {})), layer)


def tagger():
    parts = {
        "words": fs.Embedding(9, 4, seed=0),
        "lstm": fs.LSTM(4, 3, bidirectional=True, seed=1),
        "rnn.top": fs.RNN(6, 5, seed=2),
        "encoder": fs.TransformerEncoder(2, 4, 2, 8, seed=3),
        "attention": fs.MultiheadAttention(4, 2, seed=3),
        "layers.0": fs.Linear(4, 4, seed=3),
        "norm": fs.LayerNorm(4),
        "out": fs.Linear(5, 2, seed=4),
    }
    return parts, {name: array for prefix, layer in parts.items() for name, array in of(layer, f"{prefix}.").items()}


def test_all_layers_of_a_model():
    parts, arrays = tagger()
    told = {
        "nhead": 2,
        "activation": "relu",
        "norm_first": False,
        "layer_norm_eps": 1e-5,
        "num_heads": {"attention": 2},
    }
    made = pytorch.all_layers(arrays, kinds={"words": "Embedding"}, nonlinearity="tanh", eps=1e-5, dropout=0.1, **told)
    assert list(made) == list(parts)
    for prefix, layer in parts.items():
        check_same(made[prefix], layer)
    assert made["encoder"].dropout == made["attention"].dropout == 0.1


def test_everything_that_is_asked_is_named_at_once():
    _, arrays = tagger()
    arrays |= {
        "crf.transitions": np.zeros((3, 3), "f4"),
        "positions": np.arange(4),
        "deep.rnn.weight_ih_l0": np.ones((2, 2)),
    }
    with pytest.raises(ValueError) as error:
        pytorch.all_layers(arrays, kinds={"wrods": "Embedding"}, colour="red")
    message = str(error.value)
    for told in (
        "crf.transitions is of no layer",
        "positions is of no layer",
        "deep.rnn: the shapes of weight_ih and weight_hh are of no recurrent layer",
        "kinds has 'wrods'",
        "colour is no setting",
        "words: kind should be given, 'Embedding' or 'Linear'",
        "rnn.top: nonlinearity should be given",
        "encoder: nhead should be given",
        "encoder: norm_first should be given",
        "attention: num_heads should be given",
        "norm: eps should be given",
    ):
        assert told in message


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda a: a.pop("weight_hh_l1"), "weight_hh_l1 is missing"),
        (lambda a: a.pop("bias_hh_l0_reverse"), "bias_hh_l0_reverse is missing"),
        (lambda a: a.update(weight_hh_l1=a["weight_hh_l1"][:8]), "weight_hh should be of shape"),
        (lambda a: a.update(weight_ih_l1=a["weight_ih_l1"][:, 1:]), "weight_ih_l1 should be of shape"),
        (lambda a: a.update(weight_ih_l999=a["weight_ih_l1"]), "weight_ih_l2"),
        (lambda a: a.update(weight_hh_l0=a["weight_hh_l0"][:7]), "of no recurrent layer"),
    ],
)
def test_faulty_recurrent_arrays(change, what):
    arrays = of(fs.LSTM(3, 4, 2, bidirectional=True))
    change(arrays)
    with pytest.raises(ValueError, match=what):
        pytorch.layer(arrays)


def test_a_prefix_of_several_layers_is_refused_with_their_prefixes():
    _, arrays = tagger()
    with pytest.raises(ValueError, match="no single layer.*'words'.*'rnn.top'"):
        pytorch.layer(arrays)
    with pytest.raises(ValueError, match="prefix should be that of some arrays"):
        pytorch.layer(arrays, "nowhere")
    with pytest.raises(ValueError, match="kind should be 'Embedding' or 'Linear', not 'LSTM'"):
        pytorch.layer(arrays, "words", kind="LSTM")


def test_gaps_and_unlike_layers_of_a_stack():
    arrays = of(fs.TransformerEncoder(3, 4, 2, 8))
    gap = {name: array for name, array in arrays.items() if not name.startswith("layers.1")}
    with pytest.raises(ValueError, match="numbered from 0 on without a gap, not 0, 2"):
        pytorch.layer(gap, **TOLD)
    other = of(fs.TransformerEncoderLayer(4, 2, 9), "layers.1.")
    with pytest.raises(ValueError, match="one kind and size"):
        pytorch.layer(arrays | other, **TOLD)


def random_module(torch, rng):
    """A module of PyTorch, what its arrays do not say, and how both are called."""
    draw = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
    kind = draw(
        "RNN",
        "LSTM",
        "GRU",
        "RNNCell",
        "LSTMCell",
        "GRUCell",
        "Linear",
        "Embedding",
        "LayerNorm",
        "Attention",
        "Encoder",
    )
    inputs, hidden, batch, time = (int(rng.integers(1, 9)) for _ in range(4))
    x = rng.normal(size=(batch, time, inputs)).astype("f4")
    if kind in ("RNN", "LSTM", "GRU"):
        settings = {"num_layers": draw(1, 2, 3), "bidirectional": draw(True, False), "bias": draw(True, False)}
        told = {"nonlinearity": draw("tanh", "relu")} if kind == "RNN" else {}
        if kind == "LSTM" and hidden > 1 and draw(True, False):
            settings["proj_size"] = int(rng.integers(1, hidden))
        module = getattr(torch.nn, kind)(inputs, hidden, batch_first=True, **settings, **told)
        return module, told, lambda m, a: m(a)[0], x
    if kind.endswith("Cell"):
        told = {"nonlinearity": draw("tanh", "relu")} if kind == "RNNCell" else {}
        module = getattr(torch.nn, kind)(inputs, hidden, bias=draw(True, False), **told)

        def call(m, a):
            if not isinstance(m, torch.nn.Module):
                return m.step(a)[0]
            h = m(a)
            return h[0] if isinstance(h, tuple) else h

        return module, told, call, x[:, 0]
    if kind == "Linear":
        bias = draw(True, False)
        return torch.nn.Linear(inputs, hidden, bias=bias), {} if bias else {"kind": kind}, lambda m, a: m(a), x
    if kind == "Embedding":
        return torch.nn.Embedding(9, hidden), {"kind": kind}, lambda m, a: m(a), rng.integers(0, 9, (batch, time))
    if kind == "LayerNorm":
        return torch.nn.LayerNorm(inputs, eps=1e-3), {"eps": 1e-3}, lambda m, a: m(a), x
    width, heads = 2 * inputs, draw(1, 2)
    x = rng.normal(size=(batch, time, width)).astype("f4")
    if kind == "Attention":
        module = torch.nn.MultiheadAttention(width, heads, batch_first=True, bias=draw(True, False))
        return module, {"num_heads": heads}, lambda m, a: m(a, a, a)[0] if isinstance(m, torch.nn.Module) else m(a), x
    told = {"nhead": heads, "activation": draw("relu", "gelu"), "norm_first": draw(True, False), "layer_norm_eps": 1e-4}
    block = torch.nn.TransformerEncoderLayer(width, dim_feedforward=hidden, batch_first=True, dropout=0, **told)
    module = torch.nn.TransformerEncoder(block, draw(1, 2), enable_nested_tensor=False)
    return module, told, lambda m, a: m(a), x


def compare(count, seed):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: take the extra 'peers'")
    for trial in range(count):
        rng = np.random.default_rng((seed, trial))
        torch.manual_seed(trial)
        module, told, call, x = random_module(torch, rng)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.as_tensor(rng.normal(size=parameter.shape) * 0.5))
            wanted = call(module.eval(), torch.as_tensor(x)).numpy()
        made = pytorch.layer({f"m.{name}": array for name, array in module.state_dict().items()}, "m", **told)
        error = np.abs(call(made, x) - wanted).max()
        assert error <= 1e-5 * max(np.abs(wanted).max(), 1e-3), f"trial {trial}: {module}: {error}"


def test_the_outputs_are_those_of_torch():
    compare(100, 0)


@pytest.mark.slow
def test_the_outputs_of_500_modules_are_those_of_torch():
    compare(500, 1)
