"""The models over Transformer layers: against PyTorch by hand, differences, and themselves row by row."""

import copy
import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
from common import assert_close, assert_same_bits, run_python, threads
from protocol import check_generate, check_gradients, log_softmax, random_ids, random_sequences

import fastseq as fs

ENGINES = pytest.mark.parametrize("engine", [fs, fs.reference], ids=["compiled", "reference"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])

# Every kind of language model: what makes it that kind.
LMS = {
    "gpt2": {},
    "untied": {"tied": False, "bias": False},
    "post": {"norm_first": False, "positions": "sinusoidal", "activation": "relu"},
    "llama": {"norm": "rms", "positions": "rotary", "num_kv_heads": 1, "tied": False, "bias": False},
    "window": {"positions": None, "window": 3, "activation": "gelu"},
}
# Every kind of encoder model.
ENCODERS = {
    "tokens": {"pooling": None},
    "mean": {"type_vocab_size": 3},
    "cls": {"pooling": "cls", "norm_first": True, "activation": "relu"},
    "max": {"pooling": "max", "activation": "gelu_tanh"},
    "unit": {"normalize": True, "type_vocab_size": 2},
    "unit_tokens": {"normalize": True, "pooling": None},
    "labels": {"num_labels": 4},
    "labels_max": {"num_labels": 2, "pooling": "max"},
    "tags": {"num_labels": 3, "pooling": None, "type_vocab_size": 2},
}
EACH_LM, EACH_ENCODER = pytest.mark.parametrize("kind", LMS), pytest.mark.parametrize("kind", ENCODERS)


@pytest.fixture(autouse=True)
def one_thread():
    """So small as most models here are, more would be in each other's way on a busy machine."""
    fs.set_num_threads(1)


def spread_out(model, seed=0):
    """Weights so far from 0, and from each other, that no exchange goes unseen."""
    rng = np.random.default_rng([seed, 21])
    for name, old in model.parameters.items():
        model.parameters[name] = old + rng.normal(0, 0.3, old.shape)
    return model


def language_model(kind="gpt2", engine=fs, dtype="float64", vocab=5, **more):
    settings = {"context": 12, **LMS[kind], **more}
    return spread_out(engine.models.TransformerLM(vocab, 8, 2, 2, dtype=dtype, seed=3, **settings))


def encoder_model(kind="mean", engine=fs, dtype="float64", **more):
    settings = {"max_length": 9, "dropout": 0.0, "dim_feedforward": 10, **ENCODERS[kind], **more}
    return spread_out(engine.models.TransformerEncoderModel(7, 8, 2, 2, dtype=dtype, seed=4, **settings))


def batch_of(vocab=7, seed=0):
    """Ids of unequal lengths, one of them 0, with what is no id in the padding."""
    lengths = np.array([6, 0, 9, 1, 4])
    ids = random_ids(vocab, (5, 9), seed)
    ids[np.arange(9) >= lengths[:, None]] = -7
    return ids, lengths


def types_of(model, ids):
    return None if not model.type_vocab_size else np.random.default_rng(5).integers(0, model.type_vocab_size, ids.shape)


# --- TransformerLM


def in_torch(torch, model, ids):
    """GPT-2 after its paper, written out over PyTorch's functions: logits (B, T, V) for tokens (B, T)."""
    f = torch.nn.functional
    w = {name: torch.tensor(a) for name, a in model.state_dict().items()}
    heads, size, time = model.nhead, model.d_model // model.nhead, ids.shape[1]

    def norm(x, name):
        return f.layer_norm(x, (model.d_model,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embedding.weight"][torch.tensor(ids)] + w["positions.weight"][:time]
    for i in range(model.num_layers):
        own = f"encoder.layers.{i}"
        z = norm(x, f"{own}.norm1")
        qkv = z @ w[f"{own}.self_attn.in_proj_weight"].T + w[f"{own}.self_attn.in_proj_bias"]
        q, k, v = (part.unflatten(2, (heads, size)).transpose(1, 2) for part in qkv.chunk(3, 2))
        scores = q @ k.transpose(2, 3) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), -math.inf)
        x = x + linear((scores.softmax(3) @ v).transpose(1, 2).flatten(2), f"{own}.self_attn.out_proj")
        z = linear(norm(x, f"{own}.norm2"), f"{own}.linear1")
        x = x + linear(f.gelu(z, approximate="tanh"), f"{own}.linear2")
    x = norm(x, "encoder.norm")
    return (x @ (w["embedding.weight"][:-1] if model.tied else w["output.weight"]).T).numpy()


def torch_or_skip():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, while it starts
        return pytest.importorskip("torch", reason="PyTorch is not installed: take the extra 'peers'")


@DTYPES
@pytest.mark.parametrize("tied", [True, False])
def test_lm_is_gpt2(dtype, tied):
    torch = torch_or_skip()
    model = language_model(dtype=dtype, tied=tied)
    x = random_ids(5, (3, 11))
    wanted = in_torch(torch, model, np.concatenate([np.full((3, 1), model.begin), x], 1))
    assert_close(model(x), wanted[:, 1:], 1e-5 if dtype == "float32" else 1e-12)
    chain = np.take_along_axis(log_softmax(wanted)[:, :-1], x[..., None], 2)[..., 0].sum(1)
    np.testing.assert_allclose(model.log_prob(x), chain, rtol=1e-5 if dtype == "float32" else 1e-12)


def test_lm_starts_as_gpt2_does():
    model = fs.models.TransformerLM(500, 64, 4, 8, context=300, seed=0)
    w = model.state_dict()
    for name, a in w.items():
        if a.ndim == 2:
            wanted = 0.02 / 4 if name.endswith(("out_proj.weight", "linear2.weight")) else 0.02
            assert a.std() == pytest.approx(wanted, rel=0.05), name
        else:
            assert (a == ("norm" in name and name.endswith("weight"))).all(), name
    assert "output.weight" not in w and w["embedding.weight"].shape == (501, 64)
    assert_same_bits(
        fs.models.TransformerLM(500, 64, 4, 8, context=300, seed=0).state_dict()["embedding.weight"],
        w["embedding.weight"],
    )
    other = fs.models.TransformerLM(500, 64, 4, 8, context=300, seed=1).state_dict()
    assert (other["embedding.weight"] != w["embedding.weight"]).any()


@pytest.mark.parametrize("positions, base", [("rotary", 10000.0), ("learned", None), ("sinusoidal", None)])
def test_only_rotary_positions_turn_and_by_the_base_of_their_authors(positions, base):
    assert language_model(positions=positions)._encoder.rotary == base


@ENGINES
@EACH_LM
def test_lm_probabilities_of_all_sequences_sum_to_one(kind, engine):
    model = language_model(kind, engine, vocab=3, context=3)  # so that windows move on
    everything = np.array(list(itertools.product(range(3), repeat=5)))
    assert np.exp(model.log_prob(everything)).sum() == pytest.approx(1, abs=1e-12)


@DTYPES
@EACH_LM
def test_lm_rows_have_the_same_bits_alone_and_padded(kind, dtype, monkeypatch):
    model = language_model(kind, dtype=dtype)
    rows = random_sequences(5)
    lengths = np.array([len(r) for r in rows])
    padded = np.full((len(rows), 44), 99)
    for into, row in zip(padded, rows, strict=True):
        into[: len(row)] = row
    y, p = model(padded, lengths=lengths), model.log_prob(padded, lengths)
    assert p[1] == 0 and y.dtype == dtype and p.dtype == np.float64 and y.shape == (6, 44, 5)
    assert_same_bits(model(rows), y[:, :40])
    assert_same_bits(model.log_prob(rows), p)
    for row, logits, one in zip(rows, y, p, strict=True):
        assert (logits[len(row) :] == 0).all()
        assert_same_bits(logits[: len(row)], model(row))
        assert_same_bits(model.log_prob(row), one[None])
    short = np.minimum(lengths, 11)
    assert_same_bits(model.forward(padded, lengths=short)[0], model(padded, lengths=short))
    monkeypatch.setattr("fastseq.models.transformer_lm._TOKENS", 7)
    monkeypatch.setattr("fastseq.models.transformer_lm._LOGITS", 9)
    assert_same_bits(model.log_prob(rows), p)
    with threads(2):
        assert_same_bits(model(padded, lengths=lengths), y)


@pytest.mark.parametrize("context", [1, 2, 5, 6, 50])
def test_lm_looks_at_the_window_and_no_further(context):
    """Each symbol by itself, from the tokens that its window has before it."""
    model = language_model(context=context, vocab=4)
    x = random_ids(4, 17)
    tokens, hop = np.r_[model.begin, x], max(1, context // 2)
    y = model(x)
    for n in range(2, 19):  # tokens so far
        first = 0
        while n - first > context:
            first += hop
        w, own = model.state_dict(), tokens[first:n]
        h = w["embedding.weight"][own] + w["positions.weight"][: len(own)]
        logits = model._encoder(h[None], causal=True)[0, -1] @ w["embedding.weight"][:-1].T
        np.testing.assert_allclose(y[n - 2], logits, rtol=1e-12)
        assert len(own) > context // 2 or n <= context
    chain = np.take_along_axis(log_softmax(y)[:-1], x[1:, None], 1).sum()
    assert model.log_prob(x)[0] - model.log_prob(x[:1])[0] == pytest.approx(chain, rel=1e-12)
    drawn = model.generate(x, 14, temperature=0)
    whole = np.r_[x, drawn]
    assert_same_bits(drawn, model(whole)[16:-1].argmax(1))


@ENGINES
def test_lm_of_layers_with_a_window(engine):
    """Two layers that each look at a token and the two before reach four tokens back."""
    model, x = language_model("window", engine), random_ids(5, 10)
    moved = np.r_[(x[0] + 1) % 5, x[1:]]
    assert_same_bits(model(moved)[5:], model(x)[5:])
    assert not np.array_equal(model(moved)[4], model(x)[4])


@ENGINES
def test_lm_generates_from_a_whole_window(engine):
    """A prompt that fills it, with the begin symbol, is not cut."""
    model, prompt = language_model(engine=engine), random_ids(5, 11)
    found, log_probs = model.generate(prompt, 1, num_beams=5, num_results=5, return_log_probs=True)
    expected = log_softmax(model(prompt))[-1]
    np.testing.assert_allclose(np.ravel(log_probs), expected[np.ravel(found)], rtol=1e-9)


@EACH_LM
def test_lm_compiled_and_reference_agree(kind):
    model, twin = language_model(kind), language_model(kind, fs.reference)
    twin.load_state_dict(model.state_dict())
    x = random_ids(5, (3, 20))
    np.testing.assert_allclose(model(x), twin(x), rtol=1e-9, atol=1e-12)
    assert_same_bits(model.generate(x, 20, seed=4), twin.generate(x, 20, seed=4))
    wide = language_model(kind, fs.reference, np.longdouble)
    assert wide(x).dtype == np.longdouble


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lm_generate(kind):
    check_generate(language_model(kind, dtype="float32"), 5)


def batches(vocab):
    """What the trainer gives: streams, fresh and not, padded sequences, and windows of longer ones."""
    streams = list(fs.training.Streams(random_ids(vocab, 60), batch_size=3, steps=5).batches(0))
    short = [row for row in random_sequences(vocab, 1) if 0 < len(row) <= 17]
    padded = fs.training.PaddedBatches([row[:12] for row in short], batch_size=4, seed=0)
    texts = [row for row in random_sequences(vocab) if len(row)]
    windows = fs.training.TextWindows(texts, steps=12, batch_size=20, begin=vocab, seed=0)
    return {
        "fresh": streams[0],
        "later": streams[1],
        "padded": next(padded.batches(0)),
        "windows": next(windows.batches(0)),
    }


COUNTS = {"fresh": 15, "later": 15, "padded": 12 + 1 + 3, "windows": 2 * 12 + 4 * 12 + 1 + 3 + 3 * 12}


@ENGINES
@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("model_kind", LMS)
def test_lm_gradients(model_kind, kind, engine):
    model = language_model(model_kind, engine, dropout=0.2)
    batch = batches(5)[kind]

    def forward():
        loss, count, tape, state = model.training_forward(batch, seed=7)
        assert count == COUNTS[kind] and state is None
        return loss, tape

    check_gradients(model, forward, lambda tape, grads: model.training_backward(tape, grads))


@EACH_LM
def test_lm_gradients_of_forward(kind):
    model = language_model(kind)
    rng = np.random.default_rng(0)
    x, lengths = random_ids(5, (3, 6)), np.array([6, 0, 4])
    real = (np.arange(6) < lengths[:, None])[..., None]
    dlogits = np.where(real, rng.normal(size=(3, 6, 5)), np.nan)

    def forward():
        logits, tape = model.forward(x, lengths=lengths)
        assert (logits[~real[..., 0]] == 0).all()
        return (logits * dlogits)[real[..., 0]].sum(), tape

    check_gradients(model, forward, lambda tape, grads: model.backward(dlogits, tape, grads=grads))
    model.zero_grad()
    model.backward(dlogits[0], model.forward(x[0])[1])
    one = {name: a.copy() for name, a in model.grads.items()}
    model.zero_grad()
    model.backward(dlogits[:1], model.forward(x[:1])[1])
    for name, a in model.grads.items():
        assert_same_bits(a, one[name], name)


def test_lm_gradient_of_a_tied_matrix_is_the_sum_of_both():
    tied, untied = language_model(), language_model(tied=False)
    w = tied.state_dict()
    untied.load_state_dict({**w, "output.weight": w["embedding.weight"][:-1]})
    batch = batches(5)["padded"]
    for model in tied, untied:
        model.training_backward(model.training_forward(batch)[2])
    two = np.vstack([untied.grads["output.weight"], np.zeros((1, 8))]) + untied.grads["embedding.weight"]
    np.testing.assert_allclose(tied.grads["embedding.weight"], two, rtol=1e-12, atol=1e-15)
    assert len(tied.parameters) == len(untied.parameters) - 1


@pytest.mark.parametrize("kind", COUNTS)
def test_lm_evaluation_is_training_without_dropout(kind):
    batch = batches(5)[kind]
    dropping, plain = language_model(dropout=0.5), language_model()
    plain.load_state_dict(dropping.state_dict())
    loss, count, _, _ = plain.training_forward(batch)
    assert dropping.evaluation_forward(batch) == (loss, count, None)
    assert dropping.training_forward(batch, seed=1)[0] != loss
    if kind == "fresh":
        assert loss * count == pytest.approx(-plain.log_prob(batch.inputs).sum())
    if kind == "padded":
        assert loss * count == pytest.approx(-plain.log_prob(batch.inputs, batch.lengths).sum())
    if kind == "later":  # without a begin symbol
        step = plain._encoder(
            plain.state_dict()["embedding.weight"][batch.inputs] + plain.state_dict()["positions.weight"][:5],
            causal=True,
        )
        chain = log_softmax(step @ plain.state_dict()["embedding.weight"][:-1].T)
        assert loss == pytest.approx(-np.take_along_axis(chain, batch.targets[..., None], 2).mean())


def test_lm_maps_of_attention():
    model = language_model()
    ids, lengths = batch_of(5)
    logits, maps = model(ids, lengths=lengths, return_weights=True)
    assert_same_bits(logits, model(ids, lengths=lengths))
    assert len(maps) == 2 and maps[0].shape == (5, 2, 10, 10)
    for one in maps:
        real = np.arange(10) < (lengths + 1)[:, None]
        np.testing.assert_allclose(one.sum(3), np.broadcast_to(real[:, None], (5, 2, 10)), atol=1e-12)
        assert (np.triu(one, 1) == 0).all()
    alone, own = model(ids[4, :4], return_weights=True)
    assert_same_bits(alone, logits[4, :4])
    assert_same_bits(own[1], np.ascontiguousarray(maps[1][4, :, :5, :5]))
    with pytest.raises(
        ValueError, match="x should have at most context=12 tokens, the begin symbol among them, not 13"
    ):
        model(np.zeros((1, 12), int), return_weights=True)


def test_lm_learns_and_is_kept(tmp_path):
    cycle = np.tile([0, 1, 2, 0, 2, 1, 1], 60)  # what follows 0, 1 or 2 depends on what came before
    model = fs.models.TransformerLM(3, 16, 2, 2, context=16, seed=0)
    history = model.fit(
        cycle,
        batch_size=8,
        epochs=40,
        optimiser=fs.training.Adam(model, 0.01),
        validation=cycle[:70],
        progress=False,
    )
    assert min(history.loss) < 0.2 * history.loss[0] and len(history.validation_loss) == 40
    assert model.bits_per_symbol(cycle) < 0.1  # windows of the text itself have enough before them
    assert model.generate(cycle[:21], 30, temperature=0).tolist() == np.tile(cycle[:7], 5)[:30].tolist()
    model.save(tmp_path / "m.safetensors")
    for twin in fs.load(tmp_path / "m.safetensors"), pickle.loads(pickle.dumps(model)), copy.deepcopy(model):
        assert repr(twin) == repr(model)
        assert_same_bits(twin.log_prob(cycle), model.log_prob(cycle))
    reference = fs.reference.load(tmp_path / "m.safetensors")
    assert type(reference) is fs.reference.models.TransformerLM
    assert reference.bits_per_symbol(cycle) == pytest.approx(model.bits_per_symbol(cycle), abs=1e-4)


def test_lm_fits_sequences_in_any_form():
    rows = [np.tile([0, 1, 2], 9)[:n] for n in (25, 0, 5, 9)]
    lengths = [len(r) for r in rows]
    padded = np.full((4, 27), 77)
    for into, row in zip(padded, rows, strict=True):
        into[: len(row)] = row
    results = []
    for data in (rows,), (padded, lengths):
        model = fs.models.TransformerLM(3, 4, 2, 1, context=8, seed=0)
        model.fit(*data, epochs=10, batch_size=2, progress=False)
        results.append(model.log_prob(rows))
    assert_same_bits(results[1], results[0])
    assert (results[0] > fs.models.TransformerLM(3, 4, 2, 1, context=8, seed=0).log_prob(rows))[[0, 2, 3]].all()
    model.fit([batches(3)["fresh"]], steps=1, progress=False)


@pytest.mark.parametrize("data", ["stream", "sequences"])
def test_lm_resumes(data, tmp_path):
    x = random_ids(4, 300) if data == "stream" else random_sequences(4)

    def make():
        return fs.models.TransformerLM(4, 8, 2, 2, context=10, dropout=0.1, seed=0)

    whole, half, other = make(), make(), make()
    settings = {"batch_size": 4, "progress": False}
    whole.fit(x, epochs=4, **settings)
    half.fit(x, epochs=2, checkpoint=tmp_path, **settings)
    other.fit(x, epochs=4, checkpoint=tmp_path, resume=True, **settings)
    assert_same_bits(tuple(other.state_dict().values()), tuple(whole.state_dict().values()))


def test_trained_models_have_the_same_bits_on_any_number_of_threads():
    x, labels = random_ids(30, (64, 20)), random_ids(3, 64)
    results = []
    for n in (1, 2, 3):
        with threads(n):
            one = fs.models.TransformerLM(30, 32, 4, 2, context=21, dropout=0.2, seed=0)
            one.fit(x, epochs=1, progress=False)
            two = fs.models.TransformerEncoderModel(30, 32, 4, 2, num_labels=3, seed=0)
            two.fit(x, labels, epochs=1, progress=False)
            results.append((*one.state_dict().values(), one.log_prob(x), *two.state_dict().values(), two(x)))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m: m([[0, 5]]), ValueError, r"should be in 0..4, but x\[0\]\[1\] is 5"),  # 5 begins
        (lambda m: m(np.array([[0.5]])), TypeError, "x should hold integers"),
        (lambda m: m(np.zeros((1, 2, 3), int)), ValueError, "x should be of shape"),
        (lambda m: m([[0, 1]], lengths=[3]), ValueError, "lengths should be in 0..2"),
        (lambda m: m([[0, 1]], return_weights=1), TypeError, "return_weights should be True or False"),
        (lambda m: m.forward(np.zeros((1, 12), int)), ValueError, "x should have at most context=12 tokens"),
        (lambda m: m.log_prob([[0, -1]]), ValueError, r"sequences\[0\]\[1\] is -1"),
        (lambda m: m.backward(np.zeros((1, 3, 5)), m.forward([[0, 1]])[1]), ValueError, "dlogits should be of shape"),
        (
            lambda m: m.backward(np.zeros((1, 2, 5)), fs.Linear(2, 2).forward(np.ones(2))[1]),
            ValueError,
            "tape should be",
        ),
        (lambda m: m.backward(np.zeros((1, 2, 5)), None), TypeError, "tape should be"),
        (lambda m: m.backward(np.zeros((1, 2, 5)), m.forward([[0, 1]])[1], grads={}), ValueError, "are missing"),
        (lambda m: m.fit([0, 1, 2, 9], epochs=1), ValueError, r"but data\[3\] is 9|but data\[0, 3\] is 9"),
        (lambda m: m.fit([0, 1, 2], steps=1, batch_size=0), ValueError, "batch_size should be at least 1"),
        (lambda m: m.fit([0, 1, 2], steps=1, chunk=13), ValueError, "chunk should be at most context=12, not 13"),
        (lambda m: m.fit([0, 1, 2], steps=1, truncate=2), ValueError, "truncate should be None"),
        (lambda m: m.training_forward(fs.training.Batch(np.zeros((1, 2)))), TypeError, "inputs should hold integers"),
        (
            lambda m: m.training_forward(fs.training.Batch(np.zeros(2, int))),
            ValueError,
            "inputs should be ids of shape",
        ),
        (
            lambda m: m.training_forward(fs.training.Batch(np.zeros((1, 13), int))),
            ValueError,
            "inputs should have at most context=12 steps, not 13",
        ),
        (
            lambda m: m.training_forward(fs.training.Batch(np.zeros((1, 2), int), np.array([[0, 5]]))),
            ValueError,
            r"targets should be in 0..4, but targets\[0, 1\] is 5",
        ),
        (
            lambda m: m.training_forward(fs.training.Batch(np.full((1, 2), 6), np.zeros((1, 2), int))),
            ValueError,
            r"inputs should be in 0..5, but inputs\[0, 0\] is 6",
        ),
        (
            lambda m: m.training_forward(fs.training.Batch(np.zeros((1, 2), int), np.zeros((1, 3), int))),
            ValueError,
            "targets should be of shape",
        ),
        (lambda m: type(m)(0, 4, 2, 1), ValueError, "vocab_size should be at least 1"),
        (lambda m: type(m)(3, 0, 2, 1), ValueError, "d_model should be at least 1"),
        (lambda m: type(m)(3, 4, 3, 1), ValueError, "nhead"),
        (lambda m: type(m)(3, 4, 2, 0), ValueError, "num_layers should be at least 1"),
        (lambda m: type(m)(3, 4, 2, 1, context=0), ValueError, "context should be at least 1"),
        (lambda m: type(m)(3, 4, 2, 1, dim_feedforward=0), ValueError, "dim_feedforward should be at least 1"),
        (lambda m: type(m)(3, 4, 2, 1, dropout=1), ValueError, "dropout should be in"),
        (lambda m: type(m)(3, 4, 2, 1, activation="tanh"), ValueError, "activation should be one of"),
        (lambda m: type(m)(3, 4, 2, 1, norm="batch"), ValueError, "norm should be one of"),
        (lambda m: type(m)(3, 4, 2, 1, positions="none"), ValueError, "positions should be one of"),
        (lambda m: type(m)(3, 4, 4, 1, positions="rotary"), ValueError, "rotary"),
        (lambda m: type(m)(3, 4, 2, 1, num_kv_heads=3), ValueError, "num_kv_heads"),
        (lambda m: type(m)(3, 4, 2, 1, window=0), ValueError, "window should be at least 1"),
        (lambda m: type(m)(3, 4, 2, 1, tied=None), TypeError, "tied should be True or False"),
        (lambda m: type(m)(3, 4, 2, 1, dtype="float16"), TypeError, "dtype should be float32 or float64"),
        (lambda m: m.load_state_dict({}), ValueError, "embedding.weight, .* are missing"),
    ],
)
def test_lm_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call(language_model())


def test_lm_edges():
    model = language_model()
    assert model(np.zeros((2, 0), int)).shape == (2, 0, 5)
    assert model(np.zeros((0, 3), int)).shape == (0, 3, 5)
    assert model(np.zeros(0, int)).shape == (0, 5)
    assert model.log_prob([[], []]).tolist() == [0, 0]
    assert model.log_prob(np.zeros((0, 3), int)).shape == (0,)
    logits, maps = model(np.zeros((0, 3), int), return_weights=True)
    assert logits.shape == (0, 3, 5) and maps[0].shape == (0, 2, 4, 4)
    for shape in (2, 0), (0, 3):
        logits, tape = model.forward(np.zeros(shape, int))
        model.backward(logits, tape)
    assert all((a == 0).all() for a in model.grads.values())
    loss, count, tape, _ = model.training_forward(fs.training.Batch(np.zeros((2, 0), int)))
    assert (loss, count) == (0, 0)
    model.training_backward(tape)


# --- TransformerEncoderModel


def bert_in_torch(torch, model, ids, lengths, types):
    """BERT after its paper, written out over PyTorch's functions: one sequence at a time, without padding."""
    f = torch.nn.functional
    w = {name: torch.tensor(a) for name, a in model.state_dict().items()}
    heads, size = model.nhead, model.d_model // model.nhead

    def norm(x, name):
        return f.layer_norm(x, (model.d_model,), w[f"{name}.weight"], w[f"{name}.bias"], model.layer_norm_eps)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    rows = []
    for i, length in enumerate(lengths):
        x = w["word.weight"][torch.tensor(ids[i, :length])] + w["position.weight"][:length]
        if types is not None:
            x = x + w["type.weight"][torch.tensor(types[i, :length])]
        x = norm(x, "norm")
        for j in range(model.num_layers):
            own = f"encoder.layers.{j}"
            qkv = x @ w[f"{own}.self_attn.in_proj_weight"].T + w[f"{own}.self_attn.in_proj_bias"]
            q, k, v = (part.unflatten(1, (heads, size)).transpose(0, 1) for part in qkv.chunk(3, 1))
            z = (q @ k.transpose(1, 2) / math.sqrt(size)).softmax(2) @ v
            x = norm(x + linear(z.transpose(0, 1).flatten(1), f"{own}.self_attn.out_proj"), f"{own}.norm1")
            z = linear(f.gelu(linear(x, f"{own}.linear1")), f"{own}.linear2")
            x = norm(x + z, f"{own}.norm2")
        rows.append(x.numpy())
    return rows


@DTYPES
@pytest.mark.parametrize("types", [0, 3])
def test_encoder_is_bert(dtype, types):
    torch = torch_or_skip()
    model = encoder_model("tokens", dtype=dtype, type_vocab_size=types)
    ids, lengths = batch_of()
    kinds = types_of(model, ids)
    wanted = bert_in_torch(torch, model, ids, lengths, kinds)
    y = model(ids, lengths=lengths, type_ids=kinds)
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    for row, own, length in zip(y, wanted, lengths, strict=True):
        assert_close(row[:length], own, tolerance)
        assert (row[length:] == 0).all()
    if types:  # the type of what has none is 0
        wanted = bert_in_torch(torch, model, ids, lengths, np.zeros_like(ids))
        assert_close(model(ids, lengths=lengths)[2], wanted[2], tolerance)
    for pooling, by_hand in {
        "mean": lambda own: own.mean(0),
        "cls": lambda own: own[0],
        "max": lambda own: own.max(0),
    }.items():
        for normalize in (False, True):
            other = encoder_model("tokens", dtype=dtype, type_vocab_size=types, pooling=pooling, normalize=normalize)
            other.load_state_dict(model.state_dict())
            pooled = other(ids, lengths=lengths, type_ids=kinds)
            assert pooled.shape == (5, 8) and (pooled[1] == 0).all()
            for row, own, length in zip(pooled, y, lengths, strict=True):
                if length:
                    vector = by_hand(own[:length])
                    vector = vector / np.linalg.norm(vector) if normalize else vector
                    assert_close(row, vector, 1e-6 if dtype == "float32" else 1e-14)


def bert_names(model):
    """The weights of a model under the names of the package transformers, with those that nobody needs here."""
    w = {"pooler.dense.weight": np.ones((8, 8)), "embeddings.position_ids": np.arange(9)}
    names = {"word": "word_embeddings", "position": "position_embeddings", "type": "token_type_embeddings"}
    for own, name in names.items():
        w[f"embeddings.{name}.weight"] = model.parameters[f"{own}.weight"]
    for kind in "weight", "bias":
        w[f"embeddings.LayerNorm.{kind}"] = model.parameters[f"norm.{kind}"]
        for i in range(model.num_layers):
            own, name = f"encoder.layers.{i}", f"encoder.layer.{i}"
            three = np.split(model.parameters[f"{own}.self_attn.in_proj_{kind}"], 3)
            for part, array in zip(("query", "key", "value"), three, strict=True):
                w[f"{name}.attention.self.{part}.{kind}"] = array
            w[f"{name}.attention.output.dense.{kind}"] = model.parameters[f"{own}.self_attn.out_proj.{kind}"]
            w[f"{name}.attention.output.LayerNorm.{kind}"] = model.parameters[f"{own}.norm1.{kind}"]
            w[f"{name}.intermediate.dense.{kind}"] = model.parameters[f"{own}.linear1.{kind}"]
            w[f"{name}.output.dense.{kind}"] = model.parameters[f"{own}.linear2.{kind}"]
            w[f"{name}.output.LayerNorm.{kind}"] = model.parameters[f"{own}.norm2.{kind}"]
    return w


CONFIG = {
    "vocab_size": 7,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 10,
    "max_position_embeddings": 9,
    "type_vocab_size": 3,
    "hidden_dropout_prob": 0.2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-11,
    "model_type": "bert",
}


def test_encoder_from_bert():
    model = encoder_model("mean", layer_norm_eps=1e-11)
    names = bert_names(model)
    ids, lengths = batch_of()
    build = fs.models.TransformerEncoderModel.from_bert
    twin = build(CONFIG, names, dtype="float64")
    assert twin.dropout == 0.2 and twin.layer_norm_eps == 1e-11 and twin.activation == "gelu"
    assert_same_bits(twin(ids, lengths=lengths), model(ids, lengths=lengths))
    twin = build(CONFIG, {f"bert.{name}": a for name, a in names.items()}, dtype="float64", dropout=0.0)
    assert_same_bits(twin(ids, lengths=lengths), model(ids, lengths=lengths))
    assert twin.dropout == 0
    reference = fs.reference.models.TransformerEncoderModel.from_bert(CONFIG, names, dtype="float64")
    assert type(reference) is fs.reference.models.TransformerEncoderModel
    head = {"classifier.weight": np.full((4, 8), 2.0), "classifier.bias": np.arange(4.0)}
    tagger = build(CONFIG, {**names, **head}, num_labels=4, pooling=None)
    assert (tagger.parameters["head.weight"] == 2).all()
    bare = {name: array for name, array in {**names, **head}.items() if not name.startswith("pooler.")}
    assert build(CONFIG, bare, num_labels=4).pooling is None  # no pooler: the classifier was over tokens
    with pytest.raises(ValueError, match="num_labels should be 4 where weights hold that many labels in classifier"):
        build(CONFIG, bare)
    with pytest.raises(ValueError, match=r"pooling should be None, or 'cls' with pooler=True, .* not 'mean'"):
        build(CONFIG, bare, num_labels=4, pooling="mean")
    with pytest.raises(ValueError, match="head.weight should be of shape"):
        build(CONFIG, bare, num_labels=5)
    with pytest.raises(ValueError, match="pooler.bias is missing"):
        build(CONFIG, {**names, **head}, num_labels=4)  # over a pooler, of which half is there
    with pytest.raises(ValueError, match="model_type='bert', not 'roberta'"):
        build({**CONFIG, "model_type": "roberta"}, names)
    with pytest.raises(ValueError, match="is_decoder=False, not True"):
        build({**CONFIG, "is_decoder": True}, names)
    assert build(CONFIG, names, num_labels=2, pooling=None).num_labels == 2
    assert build({**CONFIG, "hidden_act": "gelu_new"}, names).activation == "gelu_tanh"
    more = {"encoder.layer.0.crossattention.self.query.weight": np.ones(3), "encoder.layer.x.y.weight": np.ones(3)}
    with pytest.raises(ValueError, match=r"encoder.layer.0.crossattention.* is unknown; encoder.layer.x.* is unknown"):
        fs.models.bert_state_dict({**names, **more})
    names.pop("encoder.layer.1.attention.self.key.bias")
    with pytest.raises(ValueError, match="key is missing for encoder.layers.1.self_attn.in_proj_bias"):
        build(CONFIG, names)
    with pytest.raises(ValueError, match="config should have vocab_size, hidden_size, too"):
        build({name: v for name, v in CONFIG.items() if name not in ("vocab_size", "hidden_size")}, names)
    with pytest.raises(ValueError, match="hidden_act of config should be one of"):
        build({**CONFIG, "hidden_act": "swish"}, names)
    with pytest.raises(ValueError, match="position_embedding_type='absolute', not 'relative_key'"):
        build({**CONFIG, "position_embedding_type": "relative_key"}, names)


@pytest.mark.parametrize("head", ["sequences", "tokens", "none"])
def test_encoder_is_bert_of_transformers(head):
    """Scores, or what the pooler makes, from the configuration and the weights as that package has them."""
    torch = torch_or_skip()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that package's own
        transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
        sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 10}
        config = transformers.BertConfig(vocab_size=7, max_position_embeddings=9, num_labels=3, **sizes)
        torch.manual_seed(0)
        kinds = {
            "sequences": transformers.BertForSequenceClassification,
            "tokens": transformers.BertForTokenClassification,
            "none": transformers.BertModel,
        }
        theirs = kinds[head](config).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    ids, lengths = random_ids(7, (4, 9)), np.array([6, 9, 1, 4])
    mask = torch.tensor(np.arange(9) < lengths[:, None])
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor(ids), attention_mask=mask.long())
    wanted = (out.pooler_output if head == "none" else out.logits).numpy()
    build = fs.models.TransformerEncoderModel.from_bert
    settings = {"pooling": "cls", "pooler": True} if head == "none" else {"num_labels": 3}
    for own, weights in ((config, theirs), (config.to_dict(), theirs.state_dict())):
        model = build(own, weights, **settings)
        y = model(ids, lengths=lengths)
        for row, expected, length in zip(y, wanted, lengths, strict=True):
            if head == "tokens":
                row, expected = row[:length], expected[:length]
            assert_close(row, expected, 2e-5)
    if head != "none":
        with pytest.raises(ValueError, match="num_labels should be 3"):
            build(config, theirs)


def test_encoder_config_of_another_kind():
    build = fs.models.TransformerEncoderModel.from_bert
    for wrong in ([], "bert-base-uncased", 3):
        with pytest.raises(TypeError, match="config should be a mapping, what config.json holds, or a BertConfig"):
            build(wrong, {})


@ENGINES
@pytest.mark.parametrize("normalize", [False, True])
def test_encoder_with_a_pooler(engine, normalize, tmp_path):
    model = encoder_model("cls", engine, pooler=True, normalize=normalize)
    plain = encoder_model("cls", engine)
    plain.load_state_dict({name: a for name, a in model.state_dict().items() if not name.startswith("pooler")})
    ids, lengths = batch_of()
    w = model.state_dict()
    wanted = np.tanh(plain(ids, lengths=lengths) @ w["pooler.weight"].T + w["pooler.bias"])
    wanted[lengths == 0] = 0  # what has no tokens
    if normalize:
        wanted /= np.maximum(np.linalg.norm(wanted, axis=1, keepdims=True), 1e-12)
    np.testing.assert_allclose(model(ids, lengths=lengths), wanted, rtol=1e-11, atol=1e-13)
    dy = np.random.default_rng(0).normal(size=(5, 8))

    def forward():
        y, tape = model.forward(ids, lengths=lengths)
        return (y * dy).sum(), tape

    check_gradients(model, forward, lambda tape, grads: model.backward(dy, tape, grads=grads))
    if engine is fs:
        model.save(tmp_path / "m.safetensors")
        assert_same_bits(fs.load(tmp_path / "m.safetensors")(ids, lengths=lengths), model(ids, lengths=lengths))
    with pytest.raises(ValueError, match="pooling should be 'cls' with pooler=True, not 'mean'"):
        encoder_model("mean", engine, pooler=True)


@DTYPES
def test_encoder_labels_of_tokens_that_do_not_count(dtype):
    """In training and in evaluation: a label of -1 counts neither in the mean nor as an element."""
    model = encoder_model("tags", dtype=dtype)
    ids, lengths = batch_of()
    labels = random_ids(model.num_labels, (5, 9), 3)
    labels[:, 1::2] = -1
    batch = fs.training.Batch(ids, labels, lengths)
    counted = (np.arange(9) < lengths[:, None]) & (labels >= 0)
    scores = log_softmax(model(ids, lengths=lengths))
    wanted = -np.take_along_axis(scores, np.maximum(labels, 0)[..., None], -1)[..., 0][counted].mean()
    for loss, count, *_ in (model.training_forward(batch), model.evaluation_forward(batch)):
        assert count == counted.sum() and loss == pytest.approx(wanted, rel=1e-5)
    history = model.fit(
        [row[:n] for row, n in zip(ids, lengths, strict=True)],
        [row[:n] for row, n in zip(labels, lengths, strict=True)],
        steps=1,
        lr=0,
        batch_size=2,
        validation=(ids, labels, lengths),
        validate_every=1,
        progress=False,
    )
    assert history.validation_loss[0] == pytest.approx(wanted, rel=1e-5)


@DTYPES
@EACH_ENCODER
def test_encoder_rows_have_the_same_bits_alone_and_padded(kind, dtype):
    model = encoder_model(kind, dtype=dtype)
    ids, lengths = batch_of()
    types = types_of(model, ids)
    y, maps = model(ids, lengths=lengths, type_ids=types, return_weights=True)
    assert y.dtype == dtype and len(maps) == 2 and maps[0].shape == (5, 2, 9, 9)
    real = np.arange(9) < lengths[:, None]
    np.testing.assert_allclose(maps[1].sum(3), np.broadcast_to(real[:, None], (5, 2, 9)), atol=1e-6)
    assert_same_bits(model(ids, lengths=lengths, type_ids=types), y)
    assert_same_bits(model.forward(ids, lengths=lengths, type_ids=types)[0], y)
    rows = [row[:n] for row, n in zip(ids, lengths, strict=True)]
    of_rows = None if types is None else [row[:n] for row, n in zip(types, lengths, strict=True)]
    assert_same_bits(model(rows, type_ids=of_rows), y)
    for i, row in enumerate(rows):
        own = None if types is None else of_rows[i]
        one, weights = model(row, type_ids=own, return_weights=True)
        assert_same_bits(one, y[i, : len(row)] if model.pooling is None else y[i])
        assert_same_bits(weights[0], np.ascontiguousarray(maps[0][i, :, : len(row), : len(row)]))
    wider = np.concatenate([ids, np.full((5, 4), 99)], 1)  # more than max_length, but in the padding
    if types is None:
        assert_same_bits(
            model(wider, lengths=lengths)[:, :9] if model.pooling is None else model(wider, lengths=lengths), y
        )
    with threads(2):
        assert_same_bits(model(ids, lengths=lengths, type_ids=types), y)


@EACH_ENCODER
def test_encoder_compiled_and_reference_agree(kind):
    model, twin = encoder_model(kind), encoder_model(kind, fs.reference)
    ids, lengths = batch_of()
    np.testing.assert_allclose(model(ids, lengths=lengths), twin(ids, lengths=lengths), rtol=1e-9, atol=1e-12)
    assert encoder_model(kind, fs.reference, np.longdouble)(ids, lengths=lengths).dtype == np.longdouble


@ENGINES
@EACH_ENCODER
def test_encoder_gradients(kind, engine):
    model = encoder_model(kind, engine, dropout=0.2)
    ids, lengths = batch_of()
    types = types_of(model, ids)
    y, _ = model.forward(ids, lengths=lengths, type_ids=types, seed=3)
    dy = np.random.default_rng(0).normal(size=y.shape)
    real = np.ones(5, bool)
    if model.pooling is None:
        real = np.arange(9) < lengths[:, None]
        dy[~real] = np.nan

    def forward():
        y, tape = model.forward(ids, lengths=lengths, type_ids=types, seed=3)
        return (y * dy)[real].sum(), tape

    check_gradients(model, forward, lambda tape, grads: model.backward(dy, tape, grads=grads))
    gradients = []
    for rows in (4, slice(4, None)):  # one sequence, and a batch of it alone
        of_rows = None if types is None else types[rows, ..., :4]
        y, tape = model.forward(ids[rows, ..., :4], type_ids=of_rows, seed=3)
        model.zero_grad()
        model.backward(y, tape)
        gradients.append(tuple(a.copy() for a in model.grads.values()))
    assert_same_bits(gradients[1], gradients[0])


@pytest.mark.parametrize("kind", ["labels", "labels_max", "tags"])
def test_encoder_loss_and_labels(kind):
    plain, dropping = encoder_model(kind), encoder_model(kind, dropout=0.5)
    ids, lengths = batch_of()
    per_token = plain.pooling is None
    labels = random_ids(plain.num_labels, (5, 9) if per_token else 5)
    batch = fs.training.Batch(ids, labels, lengths)
    loss, count, _, state = plain.training_forward(batch)
    assert count == (lengths.sum() if per_token else 5) and state is None
    assert dropping.evaluation_forward(batch) == (loss, count, None)
    assert dropping.training_forward(batch, seed=1)[0] != loss
    log_prob = plain.log_prob(ids, labels, lengths)
    assert log_prob.shape == (5,) and loss * count == pytest.approx(-log_prob.sum())
    scores = log_softmax(plain(ids, lengths=lengths))
    each = np.take_along_axis(scores, labels[..., None], -1)[..., 0]
    if per_token:
        each = np.where(np.arange(9) < lengths[:, None], each, 0).sum(1)
        lists = [row[:n] for row, n in zip(labels, lengths, strict=True)]
        assert_same_bits(plain.log_prob([i[:n] for i, n in zip(ids, lengths, strict=True)], lists), log_prob)
    np.testing.assert_allclose(log_prob, each, rtol=1e-12)
    predicted = plain.predict(ids, lengths)
    assert predicted.dtype == np.int64
    if per_token:
        assert (predicted[np.arange(9) >= lengths[:, None]] == -1).all()
        assert (predicted[2] == scores[2].argmax(1)).all()
    else:
        assert (predicted == scores.argmax(1)).all()
    assert_same_bits(np.asarray(plain.predict(ids[2])), np.asarray(predicted[2]))

    def forward():
        loss, _, tape, _ = dropping.training_forward(batch, seed=5)
        return loss, tape

    check_gradients(dropping, forward, lambda tape, grads: dropping.training_backward(tape, grads))
    some = labels.copy()
    some[[0, 3]] = -1
    loss, count, _, _ = plain.training_forward(fs.training.Batch(ids, some, lengths))
    assert count == ((lengths[1] + lengths[2] + lengths[4]) if per_token else 3)
    assert loss * count == pytest.approx(-log_prob[[1, 2, 4]].sum())


def test_encoder_learns_labels_and_is_kept(tmp_path):
    """Whether the first symbol comes once more: no bag of symbols and no single one tells."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 7, rng.integers(3, 9)) for _ in range(400)]
    labels = np.array([int(row[0] in row[1:]) for row in rows])
    model = fs.models.TransformerEncoderModel(
        7, 16, 4, 2, num_labels=2, dropout=0.0, max_length=9, pooling="cls", norm_first=True, seed=0
    )
    history = model.fit(
        rows[:300],
        labels[:300],
        epochs=100,
        optimiser=fs.training.AdamW(model, 3e-3),
        validation=(rows[300:], labels[300:]),
        progress=False,
    )
    assert len(history.validation_loss) == 100
    assert (model.predict(rows[300:]) == labels[300:]).mean() > 0.9
    ids = rows[:30]
    model.save(tmp_path / "m.safetensors")
    for twin in fs.load(tmp_path / "m.safetensors"), pickle.loads(pickle.dumps(model)), copy.deepcopy(model):
        assert repr(twin) == repr(model)
        assert_same_bits(twin(ids), model(ids))
    reference = fs.reference.load(tmp_path / "m.safetensors")
    assert type(reference) is fs.reference.models.TransformerEncoderModel
    assert_close(reference(ids), model(ids), 1e-4)


def test_encoder_learns_tags_and_resumes(tmp_path):
    """The tag of a token is the token before it, modulo 3."""
    rows = [np.random.default_rng(i).integers(0, 7, 3 + i % 6) for i in range(120)]
    tags = [np.r_[0, row[:-1] % 3] for row in rows]

    def make():
        model = fs.models.TransformerEncoderModel(
            7, 16, 2, 1, pooling=None, num_labels=3, dropout=0.1, max_length=8, seed=0
        )
        return model, {"optimiser": fs.training.Adam(model, 0.01), "batch_size": 30, "progress": False}

    whole, settings = make()
    whole.fit(rows, tags, epochs=30, **settings)
    right = [(whole.predict(row) == own).mean() for row, own in zip(rows, tags, strict=True)]
    assert np.mean(right) > 0.9
    half, settings = make()
    half.fit(rows, tags, epochs=15, checkpoint=tmp_path, **settings)
    other, settings = make()
    other.fit(rows, tags, epochs=30, checkpoint=tmp_path, resume=True, **settings)
    assert_same_bits(tuple(other.state_dict().values()), tuple(whole.state_dict().values()))
    lengths = np.array([len(row) for row in rows])
    padded, targets = np.full((120, 8), -5), np.full((120, 8), -5)
    for i, (row, own) in enumerate(zip(rows, tags, strict=True)):
        padded[i, : len(row)], targets[i, : len(row)] = row, own
    other, settings = make()
    other.fit(padded, targets, lengths, epochs=1, **settings)
    one, settings = make()
    one.fit(rows, tags, epochs=1, **settings)
    assert_same_bits(tuple(other.state_dict().values()), tuple(one.state_dict().values()))


def test_encoder_of_nothing():
    for kind, shape in ("mean", (8,)), ("tags", (0, 3)):
        model = encoder_model(kind)
        assert model(np.zeros(0, int)).shape == shape
        wanted = (0, 8) if kind == "mean" else (0, 3, 3)
        assert model(np.zeros((0, 3), int)).shape == wanted
    unit = encoder_model("unit")
    y, tape = unit.forward(np.zeros((2, 3), int), lengths=[0, 0])
    assert (y == 0).all()
    unit.backward(np.ones_like(y), tape)
    assert all((a == 0).all() for a in unit.grads.values())


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m: m([[0, 7]]), ValueError, r"but ids\[0\]\[1\] is 7"),
        (lambda m: m(np.zeros((1, 10), int)), ValueError, "ids should have at most max_length=9 tokens a row, not 10"),
        (lambda m: m(np.array([[0.5]])), TypeError, "ids should hold integers"),
        (lambda m: m([[0, 1]], lengths=[3]), ValueError, "lengths should be in 0..2"),
        (lambda m: m([[0, 1]], type_ids=[[0, 2]]), ValueError, r"but type_ids\[0\]\[1\] is 2"),
        (lambda m: m([[0, 1]], type_ids=[[0]]), ValueError, "type_ids should be of the shape of ids"),
        (lambda m: encoder_model("cls")([[0]], type_ids=[[0]]), ValueError, "type_ids should not be given"),
        (lambda m: m([[0]], return_weights="yes"), TypeError, "return_weights should be True or False"),
        (lambda m: m.backward(np.zeros((2, 1, 3)), m.forward([[0, 1]])[1]), ValueError, "dy should be of shape"),
        (lambda m: m.backward(np.zeros((1, 2, 3)), None), TypeError, "tape should be"),
        (lambda m: m.log_prob([[0, 1]], [[0, 3]]), ValueError, "labels should be in 0..2"),
        (lambda m: m.log_prob([[0, 1]], [[0, -1]]), ValueError, "labels should be in 0..2"),
        (lambda m: m.log_prob([[0, 1]], [[0]]), ValueError, "labels should have a label for each token"),
        (lambda m: m.log_prob([[0, 1]], np.zeros((1, 3), int)), ValueError, r"labels should be of shape \(1, 2\)"),
        (lambda m: m.log_prob([[0, 1]], np.zeros((1, 2))), TypeError, "labels should hold integers"),
        (lambda m: m.fit([[0, 1]], [[0, 3]], epochs=1), ValueError, "targets should be in 0..2"),
        (lambda m: m.fit([0, 1], [0, 1], epochs=1), ValueError, "data should be a batch of sequences"),
        (lambda m: m.fit([[0, 9]], [[0, 1]], epochs=1), ValueError, r"but data\[0\]\[1\] is 9"),
        (lambda m: m.training_forward(fs.training.Batch([[0]])), ValueError, "targets should be given"),
        (lambda m: encoder_model("mean").fit([[0]], [0], epochs=1), ValueError, "num_labels should be given"),
        (lambda m: encoder_model("mean").predict([[0]]), ValueError, "num_labels should be given"),
        (lambda m: encoder_model("mean").log_prob([[0]], [0]), ValueError, "num_labels should be given"),
        (lambda m: encoder_model("labels").log_prob([[0]], [0, 1]), ValueError, r"labels should be of shape \(1,\)"),
        (lambda m: type(m)(0, 8, 2, 1), ValueError, "vocab_size should be at least 1"),
        (lambda m: type(m)(3, 8, 3, 1), ValueError, "nhead"),
        (lambda m: type(m)(3, 8, 2, 0), ValueError, "num_layers should be at least 1"),
        (lambda m: type(m)(3, 8, 2, 1, max_length=0), ValueError, "max_length should be at least 1"),
        (lambda m: type(m)(3, 8, 2, 1, type_vocab_size=-1), ValueError, "type_vocab_size should be at least 0"),
        (lambda m: type(m)(3, 8, 2, 1, pooling="sum"), ValueError, "pooling should be one of 'mean'"),
        (lambda m: type(m)(3, 8, 2, 1, normalize=1), TypeError, "normalize should be True or False"),
        (lambda m: type(m)(3, 8, 2, 1, normalize=True, num_labels=2), ValueError, "normalize should be False"),
        (lambda m: type(m)(3, 8, 2, 1, num_labels=0), ValueError, "num_labels should be at least 1"),
        (lambda m: type(m)(3, 8, 2, 1, dtype="int8"), TypeError, "dtype should be a floating dtype"),
        (lambda m: fs.models.bert_state_dict([1]), TypeError, "mapping should be a mapping"),
        (lambda m: m.from_bert([], {}), TypeError, "config should be a mapping, what config.json holds"),
    ],
)
def test_encoder_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call(encoder_model("tags"))


# --- Maps of attention as pictures


def test_attention_map(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: take the extra 'plot'")
    model = encoder_model("mean")
    _, maps = model(np.arange(6), return_weights=True)
    words = ["[CLS]", "sold", "for", "$5", "to", "a\nb"]
    figure = fs.plotting.attention_map(maps[0], words, path=tmp_path / "map.png", title="layer 0")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    first, second = (axes for axes in figure.axes if axes.get_title().startswith("head"))
    for head, axes in enumerate((first, second)):
        np.testing.assert_array_equal(axes.images[0].get_array(), maps[0][head])
        assert [label.get_text() for label in axes.get_yticklabels()] == ["[CLS]", "sold", "for", r"\$5", "to", "a⏎b"]
        assert [label.get_text() for label in axes.get_xticklabels()][1] == "sold"
    one = fs.plotting.attention_map(maps[0][0, :2].astype("float32"), words[:2], words)
    assert [len(axes.get_yticklabels()) for axes in one.axes if axes.images][:1] == [2]
    five = fs.plotting.attention_map(np.full((5, 2, 2), 0.5), ["a", "b"])
    assert sum(axes.get_title().startswith("head") for axes in five.axes) == 5


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((np.ones((2, 2), int), ["a", "b"]), TypeError, "weights should hold real floating numbers"),
        ((np.ones((1, 2, 2, 2)), ["a", "b"]), ValueError, r"weights should be of shape .*one by one"),
        ((np.ones((0, 2)), []), ValueError, "weights should be of shape"),
        ((np.ones((2, 2)), ["a"]), ValueError, "row_tokens should have 2 tokens, as weights has, not 1"),
        ((np.ones((2, 3)), ["a", "b"]), ValueError, "row_tokens, which label the columns too, should have 3 tokens"),
        ((np.ones((2, 3)), ["a", "b"], ["c"]), ValueError, "column_tokens should have 3 tokens"),
        ((np.ones((2, 2)), "ab"), TypeError, "row_tokens should be a sequence of strings"),
        ((np.ones((2, 2)), None), TypeError, "row_tokens should be a sequence of strings"),
    ],
)
def test_attention_map_bad_input(arguments, kind, message):
    with pytest.raises(kind, match=message):
        fs.plotting.attention_map(*arguments)


def test_attention_map_names_what_is_missing():
    run_python(
        """
        import sys
        sys.modules["matplotlib"] = None
        import numpy as np
        import fastseq as fs
        try:
            fs.plotting.attention_map(np.ones((1, 1)), ["a"])
        except ImportError as error:
            assert "matplotlib, which is not installed" in str(error) and "fastseq[plot]" in str(error)
        else:
            raise AssertionError("it drew without matplotlib")
        """
    )
