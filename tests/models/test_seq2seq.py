"""Models from sequence to sequence: against PyTorch, differences, and themselves pair by pair."""

import copy
import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
from common import assert_close, assert_same_bits, threads, tolerance
from protocol import check_gradients, log_softmax, random_ids

import fastseq as fs
from fastseq.layers.rows import Rows
from fastseq.models import TransformerSeq2Seq
from fastseq.models.sequence_pairs import SequencePairModel
from fastseq.training import Batch

ENGINES = pytest.mark.parametrize("engine", [fs, fs.reference], ids=["compiled", "reference"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])

# Every kind of Transformer: what makes it that kind.
KINDS = {
    "vaswani": {},
    "post": {"norm_first": False, "positions": "learned", "activation": "relu", "tied": False},
    "bare": {"positions": None, "bias": False, "activation": "gelu"},
    "llama": {"norm": "rms", "positions": "rotary", "num_kv_heads": 1, "tied": False, "bias": False},
}
IN_TORCH = ("vaswani", "post", "bare")
EACH = pytest.mark.parametrize("kind", KINDS)
SOURCES, TARGETS = 6, 5  # symbols
S, T = np.array([4, 1, 7, 3, 2]), np.array([2, 6, 0, 3, 1])  # lengths


@pytest.fixture(autouse=True)
def one_thread():
    """So small as most models here are, more would be in each other's way on a busy machine."""
    fs.set_num_threads(1)


def spread_out(model, seed=0):
    """Weights so far from 0, and from each other, that no exchange goes unseen."""
    rng = np.random.default_rng([seed, 21])
    for name, old in model.parameters.items():
        model.parameters[name] = old + rng.normal(0, 0.2, old.shape)
    return model


def transformer(kind="vaswani", engine=fs, dtype="float64", **more):
    settings = {"max_length": 12, "dim_feedforward": 10, **KINDS[kind], **more}
    return spread_out(engine.models.TransformerSeq2Seq(SOURCES, TARGETS, 8, 2, 1, 2, dtype=dtype, seed=6, **settings))


def padded_pairs(seed=0):
    """Sources (5, 7) and targets (5, 6) of unequal lengths, with what is no id in the padding."""
    source, target = random_ids(SOURCES, (5, 7), seed), random_ids(TARGETS, (5, 6), seed + 1)
    source[np.arange(7) >= S[:, None]] = -7
    target[np.arange(6) >= T[:, None]] = 99
    return source, target


def pairs(seed=0):
    """The same as lists of rows."""
    source, target = padded_pairs(seed)
    return [row[:n] for row, n in zip(source, S, strict=True)], [row[:n] for row, n in zip(target, T, strict=True)]


def lengths():
    return {"source_lengths": S, "lengths": T}


def real_steps():
    """Where the logits of the pairs stand, (5, 7)."""
    return np.arange(7) <= T[:, None]


# --- Against PyTorch


def torch_or_skip():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, while it starts
        return pytest.importorskip("torch", reason="PyTorch is not installed: take the extra 'peers'")


def sinusoids(time, width):
    angle = np.arange(time)[:, None] / 10000 ** (np.arange(0, width, 2) / width)
    return np.stack([np.sin(angle), np.cos(angle)], 2).reshape(time, width)


def in_torch(torch, model, source, target, dlogits):
    """Logits, and the gradients of parameters, by PyTorch's encoder and decoder over the padded batch."""
    w = {name: torch.tensor(a, requires_grad=True) for name, a in model.state_dict().items()}
    dtype = w["source_embedding.weight"].dtype
    activation = {
        "relu": torch.nn.functional.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }[model.activation]

    def tower(side, count):
        kinds = getattr(torch.nn, f"Transformer{side.title()}Layer"), getattr(torch.nn, f"Transformer{side.title()}")
        layer = kinds[0](
            model.d_model,
            model.nhead,
            model.dim_feedforward,
            0.0,
            activation,
            batch_first=True,
            norm_first=model.norm_first,
            bias=model.bias,
            dtype=dtype,
        )
        norm = torch.nn.LayerNorm(model.d_model, bias=model.bias, dtype=dtype) if model.norm_first else None
        more = {"enable_nested_tensor": False} if side == "encoder" else {}
        own = {name.partition(".")[2]: a for name, a in w.items() if name.startswith(f"{side}.")}
        return lambda *args, **named: torch.func.functional_call(kinds[1](layer, count, norm, **more), own, args, named)

    def entering(side, ids):
        x = w[f"{side}_embedding.weight"][torch.tensor(ids)]
        if model.positions == "sinusoidal":
            x = x * math.sqrt(model.d_model) + torch.tensor(sinusoids(ids.shape[1], model.d_model), dtype=dtype)
        if model.positions == "learned":
            x = x + w[f"{side}_positions.weight"][: ids.shape[1]]
        return x

    real_source, begun = np.arange(7) < S[:, None], np.full((5, 7), TARGETS)
    begun[:, 1:] = np.where(np.arange(6) < T[:, None], target, 0)
    padding = torch.tensor(~real_source)
    memory = tower("encoder", 1)(entering("source", np.where(real_source, source, 0)), src_key_padding_mask=padding)
    later = torch.ones(7, 7).triu(1).bool()
    y = tower("decoder", 2)(entering("target", begun), memory, tgt_mask=later, memory_key_padding_mask=padding)
    logits = y @ (w["target_embedding.weight"] if model.tied else w["output.weight"]).T
    real = torch.tensor(real_steps())[..., None]
    (torch.where(real, logits, 0.0) * torch.tensor(dlogits)).sum().backward()
    wanted = torch.where(real, logits, 0.0).detach().numpy()
    return wanted, {name: a.grad.numpy() for name, a in w.items()}


def compare_with_torch(model, wanted, gradients, dlogits, relative):
    """What `in_torch` found, against what the model gives."""
    source, target = padded_pairs()
    assert_close(model(source, target, **lengths()), wanted, relative, "logits")
    chain = log_softmax(wanted)
    following = np.where(np.arange(7) < T[:, None], np.c_[target, np.zeros(5, int)], TARGETS)
    each = np.where(real_steps(), np.take_along_axis(chain, following[..., None], 2)[..., 0], 0)
    np.testing.assert_allclose(model.log_prob(source, target, **lengths()), each.sum(1), rtol=10 * relative)
    logits, tape = model.forward(source, target, **lengths())
    assert_close(logits, wanted, relative, "logits of forward")
    model.zero_grad()
    model.backward(np.where(real_steps()[..., None], dlogits, np.nan), tape)
    for name, gradient in model.grads.items():
        assert_close(gradient, gradients[name], 10 * relative, name)
    loss, count, _, _ = model.training_forward(Batch(source, target, S, target_lengths=T))
    assert count == T.sum() + 5
    np.testing.assert_allclose(loss, -each.sum() / count, rtol=10 * relative)


def torch_case(kind, dtype="float64"):
    torch = torch_or_skip()
    model = transformer(kind, dtype=dtype)
    dlogits = np.random.default_rng(0).normal(size=(5, 7, TARGETS + 1)).astype(dtype)
    return model, *in_torch(torch, model, *padded_pairs(), dlogits), dlogits


@DTYPES
@pytest.mark.parametrize("kind", IN_TORCH)
def test_logits_probabilities_and_gradients_are_pytorchs(kind, dtype):
    compare_with_torch(*torch_case(kind, dtype), 1e-5 if dtype == "float32" else 1e-12)


def without_source_lengths(monkeypatch):
    whole = TransformerSeq2Seq._context

    def context(pairs, memory):  # each target may look at the source of the row before, too
        made = whole(pairs, memory)
        keys = made.memory_frame.keys
        starts = np.maximum(keys.starts - np.r_[0, np.ones(len(keys.starts) - 1, int)], 0)
        return made._replace(memory_frame=made.memory_frame._replace(keys=keys._replace(starts=starts)))

    monkeypatch.setattr(TransformerSeq2Seq, "_context", staticmethod(context))


def boundary_is(begin, end):
    """The boundary exchanged for an id of a symbol."""

    def plant(monkeypatch):
        whole = SequencePairModel._pairs

        def made(self, *args):
            pairs = whole(self, *args)
            begun, following = pairs.begun.ids, pairs.following
            begun = pairs.begun._replace(ids=np.where(begun == TARGETS, begin, begun))
            return pairs._replace(begun=begun, following=np.where(following == TARGETS, end, following))

        monkeypatch.setattr(SequencePairModel, "_pairs", made)

    return plant


def a_decoder_that_looks_ahead(monkeypatch):
    whole = TransformerSeq2Seq._context
    monkeypatch.setattr(
        TransformerSeq2Seq,
        "_context",
        staticmethod(lambda pairs, memory: whole(pairs, memory)._replace(causal=False)),
    )


def positions_of_the_batch(monkeypatch):
    monkeypatch.setattr(Rows, "steps", lambda self: np.arange(self.starts[-1]))


def positions_that_begin_at_one(monkeypatch):
    whole = Rows.steps
    monkeypatch.setattr(Rows, "steps", lambda self: whole(self) + 1)


def embeddings_not_scaled(monkeypatch):
    whole = TransformerSeq2Seq._embedded

    def embedded(self, embedding, positions, ids, rows):
        return whole(self, lambda ids: embedding(ids) / self._scale, positions, ids, rows)

    monkeypatch.setattr(TransformerSeq2Seq, "_embedded", embedded)


def gradients_not_scaled(monkeypatch):
    whole = TransformerSeq2Seq._entered_backward

    def entered(self, side, embedding, positions, dx, kept, targets):
        whole(self, side, embedding, positions, dx / self._scale, kept, targets)

    monkeypatch.setattr(TransformerSeq2Seq, "_entered_backward", entered)


def no_gradient_of_the_memory(monkeypatch):
    whole = fs.TransformerDecoder._backward_rows
    monkeypatch.setattr(
        fs.TransformerDecoder, "_backward_rows", lambda *args: (lambda dx, dm: (dx, 0 * dm))(*whole(*args))
    )


def a_tied_matrix_that_learns_as_output_alone(monkeypatch):
    whole = TransformerSeq2Seq._entered_backward

    def entered(self, side, *args):
        if side == "source":
            whole(self, side, *args)

    monkeypatch.setattr(TransformerSeq2Seq, "_entered_backward", entered)


def targets_of_the_next_row(monkeypatch):
    whole = SequencePairModel._source
    monkeypatch.setattr(
        SequencePairModel,
        "_source",
        lambda self, name, source, lengths_name, lengths: whole(
            self, name, np.roll(source, 1, 0), lengths_name, np.roll(lengths, 1)
        ),
    )


MISTAKES = {
    "source lengths": without_source_lengths,
    "another begin": boundary_is(0, TARGETS),
    "another end": boundary_is(TARGETS, 0),
    "looking ahead": a_decoder_that_looks_ahead,
    "positions of the batch": positions_of_the_batch,
    "positions from one": positions_that_begin_at_one,
    "no scale": embeddings_not_scaled,
    "no scale of gradients": gradients_not_scaled,
    "no gradient of the memory": no_gradient_of_the_memory,
    "tied as output alone": a_tied_matrix_that_learns_as_output_alone,
    "other rows": targets_of_the_next_row,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake, monkeypatch):
    case = torch_case("vaswani")
    compare_with_torch(*case, 1e-12)
    MISTAKES[mistake](monkeypatch)
    with pytest.raises(AssertionError):
        compare_with_torch(*case, 1e-12)


def test_initial_parameters():
    model = fs.models.TransformerSeq2Seq(300, 400, 64, 4, 2, 3, seed=0)
    w = model.state_dict()
    assert w["source_embedding.weight"].shape == (300, 64) and w["target_embedding.weight"].shape == (401, 64)
    for name, a in w.items():
        if name.endswith("embedding.weight"):
            assert a.std() == pytest.approx(1 / 8, rel=0.05), name
        elif a.ndim == 2:
            fans = 128 if "attn" in name else sum(a.shape)
            assert a.std() == pytest.approx(math.sqrt(2 / fans), rel=0.05), name
        else:
            assert (a == ("norm" in name and name.endswith("weight"))).all(), name
    assert (w["source_embedding.weight"] != w["target_embedding.weight"][:300]).any()
    again = fs.models.TransformerSeq2Seq(300, 400, 64, 4, 2, 3, seed=0).state_dict()
    other = fs.models.TransformerSeq2Seq(300, 400, 64, 4, 2, 3, seed=1).state_dict()
    for name, a in w.items():
        assert_same_bits(again[name], a)
        assert a.ndim == 1 or (other[name] != a).any(), name


@pytest.mark.parametrize(
    "positions, base", [("rotary", 10000.0), ("learned", None), ("sinusoidal", None), (None, None)]
)
def test_only_rotary_positions_turn_and_by_the_base_of_their_authors(positions, base):
    model = transformer(positions=positions)
    assert model._encoder.rotary == model._decoder_layers.rotary == base


# --- Against the reference, differences, and themselves


@EACH
def test_compiled_and_reference_agree(kind):
    model, twin = transformer(kind), transformer(kind, fs.reference)
    wanted = twin(*padded_pairs(), **lengths())
    assert_close(model(*padded_pairs(), **lengths()), wanted, 1e-12)
    wide = transformer(kind, fs.reference, np.longdouble)
    assert wide(*padded_pairs(), **lengths()).dtype == np.longdouble
    narrow = transformer(kind, dtype="float32")
    wide.load_state_dict(narrow.state_dict())
    dlogits = np.where(real_steps()[..., None], np.random.default_rng(0).normal(size=(5, 7, 6)), 0)
    results = []
    for one in narrow, wide:
        logits, tape = one.forward(*padded_pairs(), **lengths())
        one.zero_grad()
        one.backward(dlogits.astype(one.dtype), tape)
        results.append((logits, one.grads))
    contract = tolerance("float32", 10, 4 * 7)
    assert_close(results[0][0], results[1][0], contract)
    for name, gradient in results[0][1].items():
        assert_close(gradient, results[1][1][name], 4 * contract, name)


@ENGINES
@EACH
def test_probabilities_of_all_targets_sum_to_one(kind, engine):
    settings = {**KINDS[kind], "max_length": 5}
    model = spread_out(engine.models.TransformerSeq2Seq(3, 2, 8, 2, 1, 1, dtype="float64", seed=0, **settings))
    total = 0.0
    for n in range(4):
        every = np.array(list(itertools.product(range(2), repeat=n)), int).reshape(2**n, n)
        total += np.exp(model.log_prob(np.tile([0, 2, 1], (len(every), 1)), every)).sum()
    # What is longer: the first four of them are these, and anything may follow.
    longest = np.array(list(itertools.product(range(2), repeat=4)))
    chain = log_softmax(model(np.tile([0, 2, 1], (16, 1)), longest))[:, :4]
    rest = np.exp(np.take_along_axis(chain, longest[..., None], 2)[..., 0].sum(1)).sum()
    assert total + rest == pytest.approx(1, abs=1e-12)


@DTYPES
@EACH
def test_pairs_have_the_same_bits_alone_and_padded(kind, dtype, monkeypatch):
    model = transformer(kind, dtype=dtype)
    source, target = padded_pairs()
    logits, p = model(source, target, **lengths()), model.log_prob(source, target, **lengths())
    assert logits.dtype == dtype and logits.shape == (5, 7, 6) and p.dtype == np.float64 and p.shape == (5,)
    assert (logits[~real_steps()] == 0).all()
    rows = pairs()
    assert_same_bits(model(*rows), logits)
    assert_same_bits(model.log_prob(*rows), p)
    assert_same_bits(model.forward(*rows)[0], logits)
    wide = np.pad(source, ((0, 0), (0, 9)), constant_values=1234), np.pad(target, ((0, 0), (0, 8)), constant_values=-1)
    assert_same_bits(np.ascontiguousarray(model(*wide, **lengths())[:, :7]), logits)
    for i, (one, other) in enumerate(zip(*rows, strict=True)):
        assert_same_bits(model(one, other), logits[i, : len(other) + 1])
        assert_same_bits(model.log_prob(one, other), p[i : i + 1])
        assert_same_bits(model(one[None], other[None])[0], logits[i, : len(other) + 1])
    order = [3, 0, 4, 2, 1]
    shuffled = model([rows[0][i] for i in order], [rows[1][i] for i in order])
    assert_same_bits(shuffled, logits[order])
    monkeypatch.setattr("fastseq.models.sequence_pairs._TOKENS", 5)
    assert_same_bits(model(*rows), logits)
    assert_same_bits(model.log_prob(*rows), p)
    monkeypatch.setattr("fastseq.models.sequence_pairs._LOGITS", 1)
    assert_same_bits(model.log_prob(*rows), p)
    with threads(2):
        assert_same_bits(model(source, target, **lengths()), logits)


def test_arrays_in_any_layout():
    model = transformer()
    source, target = padded_pairs()
    logits = model(source, target, **lengths())
    for kind in (">i4", "uint8", "int16"):
        assert_same_bits(model(np.abs(source).astype(kind), target.astype(kind), **lengths()), logits)
    frozen = np.asfortranarray(source)
    frozen.flags.writeable = False
    before = frozen.tobytes()
    assert_same_bits(model(frozen, target[:, ::-1][:, ::-1], source_lengths=S.astype("u1"), lengths=list(T)), logits)
    assert frozen.tobytes() == before


def test_a_step_knows_nothing_of_what_comes_later():
    model = transformer()
    source, target = pairs()
    whole = model(source[0], np.array([1, 3, 0, 4]))
    for n in range(4):
        assert_same_bits(np.ascontiguousarray(model(source[0], np.array([1, 3, 0, 4][:n]))), whole[: n + 1])
    assert (model(source[0][::-1], target[1]) != model(source[0], target[1])).any()


@ENGINES
@EACH
@pytest.mark.parametrize("sampling", [0.0, 0.5])
def test_gradients_of_the_loss(kind, engine, sampling):
    model = transformer(kind, engine, dropout=0.2)
    source, target = padded_pairs()
    batch = Batch(source, target, S, target_lengths=T)
    if sampling:  # what the model draws is no function of its parameters that has a slope
        drawn = model._resampled(model._task(batch, None).inputs, 3, sampling)
        model._resampled = lambda *args: drawn

    def forward():
        loss, count, tape, state = model.training_forward(batch, seed=7, sampling=sampling, label_smoothing=0.1)
        assert count == T.sum() + 5 and state is None
        return loss, tape

    check_gradients(model, forward, lambda tape, grads: model.training_backward(tape, grads))


@EACH
def test_gradients_of_forward(kind):
    model = transformer(kind, dropout=0.3)
    source, target = padded_pairs()
    real = real_steps()
    dlogits = np.where(real[..., None], np.random.default_rng(0).normal(size=(5, 7, 6)), np.nan)

    def forward():
        logits, tape = model.forward(source, target, **lengths(), seed=5)
        return (logits * dlogits)[real].sum(), tape

    check_gradients(model, forward, lambda tape, grads: model.backward(dlogits, tape, grads=grads))
    one, other = (row[2] for row in pairs())
    for args, gradient in ((one, other), dlogits[2, :1]), ((one[None], other[None]), dlogits[2:3, :1]):
        model.zero_grad()
        tape = model.forward(*args, seed=5)[1]
        model.backward(gradient, tape)
        model.backward(gradient, tape)
        twice = {name: a / 2 for name, a in model.grads.items()}
        if args[0].ndim == 1:
            alone = twice
    for name, a in twice.items():
        assert_same_bits(a, alone[name], name)


def test_gradients_do_not_depend_on_threads_or_padding():
    model = transformer(dtype="float32")
    source, target = padded_pairs()
    results = []
    for n, more in (1, 0), (2, 0), (1, 5):
        with threads(n):
            wide = np.pad(source, ((0, 0), (0, more))), np.pad(target, ((0, 0), (0, more)))
            logits, tape = model.forward(*wide, **lengths())
            model.zero_grad()
            model.backward(np.where(logits == 0, np.float32(np.nan), logits), tape)
            results.append(tuple(a.copy() for a in model.grads.values()))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_gradient_of_a_tied_matrix_is_the_sum_of_both():
    tied, untied = transformer(), transformer(tied=False)
    w = tied.state_dict()
    untied.load_state_dict({**w, "output.weight": w["target_embedding.weight"]})
    batch = Batch(*padded_pairs(), S, target_lengths=T)
    for model in tied, untied:
        model.training_backward(model.training_forward(batch)[2])
    both = untied.grads["output.weight"] + untied.grads["target_embedding.weight"]
    np.testing.assert_allclose(tied.grads["target_embedding.weight"], both, rtol=1e-12, atol=1e-15)
    assert len(tied.parameters) == len(untied.parameters) - 1


def test_evaluation_is_training_without_what_training_adds():
    batch = Batch(*padded_pairs(), S, target_lengths=T)
    dropping, plain = transformer(dropout=0.5), transformer()
    plain.load_state_dict(dropping.state_dict())
    loss, count, _, _ = plain.training_forward(batch)
    assert dropping.evaluation_forward(batch) == (loss, count, None)
    assert loss * count == pytest.approx(-plain.log_prob(*pairs()).sum())
    assert dropping.training_forward(batch, seed=1)[0] != loss
    assert dropping.training_forward(batch, seed=1)[0] == dropping.training_forward(batch, seed=1)[0]
    assert dropping.training_forward(batch, seed=1)[0] != dropping.training_forward(batch, seed=2)[0]
    # With smoothing a share of every target's weight is spread over all symbols.
    chain = log_softmax(plain(*pairs()))
    spread = -chain.mean(2)[real_steps()].mean()
    assert plain.training_forward(batch, label_smoothing=0.3)[0] == pytest.approx(0.7 * loss + 0.3 * spread)


def test_sampling_takes_what_the_model_expects():
    model = transformer()
    batch = Batch(*padded_pairs(), S, target_lengths=T)
    given = model._task(batch, None).inputs
    assert_same_bits(model._resampled(given, 1, 0.0).begun.ids, given.begun.ids)
    steps = given.begun.rows.steps()
    counts = np.zeros((len(steps), TARGETS + 1))
    for seed in range(400):
        ids = model._resampled(given, seed, 1.0).begun.ids
        counts[np.arange(len(ids)), ids] += 1
    probabilities = np.exp(log_softmax(model(*pairs())))[real_steps()]
    assert (counts[steps == 0, TARGETS] == 400).all()  # what begins a target is no guess
    later = np.flatnonzero(steps)
    wanted = 400 * probabilities[later - 1]
    assert (np.abs(counts[later] - wanted) < 4.5 * np.sqrt(wanted) + 1).all()
    some = np.mean(
        [model._resampled(given, seed, 0.25).begun.ids[later] != given.begun.ids[later] for seed in range(99)]
    )
    differing = 0.25 * (1 - probabilities[later - 1, given.begun.ids[later]]).mean()
    assert some == pytest.approx(differing, rel=0.2)
    losses = {seed: model.training_forward(batch, seed=seed, sampling=1.0)[0] for seed in (1, 2)}
    assert losses[1] == model.training_forward(batch, seed=1, sampling=1.0)[0] != losses[2]
    assert model.training_forward(batch, seed=1)[0] not in losses.values()


def test_sampling_of_logits_beyond_exp():
    """exp of the logits themselves would be inf."""
    model = transformer(tied=False)
    model.parameters["output.weight"] = 4000 * model.parameters["output.weight"]
    given = model._task(Batch(*padded_pairs(), S, target_lengths=T), None).inputs
    logits = model(*pairs())[real_steps()]
    assert logits.max() > 800
    steps = given.begun.rows.steps()
    clear = np.flatnonzero(steps)[np.diff(np.sort(logits, 1)[:, -2:], axis=1)[np.flatnonzero(steps) - 1, 0] > 40]
    assert len(clear) > 5
    ids = model._resampled(given, 1, 1.0).begun.ids
    assert_same_bits(ids[clear], logits.argmax(1)[clear - 1])


def recurrent(**more):
    return spread_out(fs.models.Seq2Seq(SOURCES, TARGETS, 5, 6, dtype="float64", seed=2, **more), 3)


PAIR_MODELS = pytest.mark.parametrize(
    "make",
    [transformer, recurrent, lambda: recurrent(attention="additive"), lambda: recurrent(attention="multiplicative")],
    ids=["transformer", "recurrent", "additive", "multiplicative"],
)


@PAIR_MODELS
@pytest.mark.parametrize("settings", [{"seed": 4}, {"temperature": 0}, {"num_beams": 3, "num_results": 2}])
def test_generate_of_padded_sources(make, settings):
    """Padded sources with lengths say what the sources alone say, and others say something else."""
    model = make()
    (source, _), rows = padded_pairs(), pairs()[0]
    padding = np.maximum(source, 0)  # ids, so that lengths that are lost are no error, but other results
    wanted = model.generate(rows, 9, **settings)
    for given in (source, padding):
        found = model.generate(given, 9, lengths=S, **settings)
        for one, other in zip(found, wanted, strict=True):
            for a, b in zip(*((one, other) if isinstance(one, list) else ([one], [other])), strict=True):
                assert_same_bits(a, b)
    without = model.generate(padding, 9, return_log_probs=True, **settings)[1]
    scores = model.generate(rows, 9, return_log_probs=True, **settings)[1]
    assert any(not np.array_equal(np.ravel(a), np.ravel(b)) for a, b in zip(_flat(without), _flat(scores), strict=True))


def _flat(results):
    """The arrays in lists of lists of them."""
    return [array for one in results for array in _flat(one)] if isinstance(results, list) else [results]


@PAIR_MODELS
def test_stream_of_padded_sources(make):
    model = make()
    (source, _), rows = padded_pairs(), pairs()[0]
    wanted = list(model.stream(rows, 9, seed=4))
    for given in (source, np.maximum(source, 0)):
        assert_same_bits(np.array(list(model.stream(given, 9, lengths=S, seed=4))), np.array(wanted))
    whole = model.generate(rows, 9, seed=4)
    for i, row in enumerate(whole):
        said = np.array([step[i] for step in wanted])
        assert_same_bits(said[: len(row)], row)
        assert (said[len(row) :] == -1).all()


@PAIR_MODELS
def test_hypotheses_are_ranked_by_their_mean_by_default(make):
    model = make()
    settings = {"num_beams": 6, "num_results": 6, "stop": [1, 2], "return_log_probs": True}
    _, log_probs = model.generate(pairs()[0], 6, **settings)
    sums = 0
    for each in log_probs:
        means = [p.sum() / len(p) for p in each]
        assert (np.diff(means) < 1e-12).all()
        sums += (np.diff([p.sum() for p in each]) > 0).sum()
    assert sums  # which another penalty would not have


def test_as_many_symbols_are_generated_as_a_target_may_have():
    model = transformer()
    weight = model.parameters["target_embedding.weight"].copy()
    weight[TARGETS] = 0  # the logit of the end, which is never the largest
    model.parameters["target_embedding.weight"] = weight
    assert len(model.generate(pairs()[0][0], 12, temperature=0)) == 12


@EACH
def test_maps_of_attention(kind):
    model = transformer(kind)
    source, target = padded_pairs()
    logits, maps = model(source, target, **lengths(), return_weights=True)
    assert_same_bits(logits, model(source, target, **lengths()))
    assert isinstance(maps, list) and len(maps) == 2 and maps[0].shape == (5, 2, 7, 7)
    for one in maps:
        np.testing.assert_allclose(one.sum(3), np.broadcast_to(real_steps()[:, None], (5, 2, 7)), atol=1e-12)
        assert (one[np.broadcast_to((np.arange(7) >= S[:, None])[:, None, None], one.shape)] == 0).all()
    rows = pairs()
    listed = model(*rows, return_weights=True)[1]
    assert_same_bits(listed[1], maps[1])
    for i, (one, other) in enumerate(zip(*rows, strict=True)):
        own, alone = model(one, other, return_weights=True)
        assert_same_bits(own, logits[i, : len(other) + 1])
        assert_same_bits(alone[1], np.ascontiguousarray(maps[1][i, :, : len(other) + 1, : len(one)]))


# --- Training


def reversed_pairs():
    """All words of up to four of three symbols, and those backwards; some of them apart."""
    rows = [np.array(row) for n in range(1, 5) for row in itertools.product(range(3), repeat=n)]
    np.random.default_rng(0).shuffle(rows)
    backwards = [row[::-1] for row in rows]
    return rows[12:], backwards[12:], rows[:12], backwards[:12]


def test_it_learns_to_reverse_and_is_kept(tmp_path):
    source, target, other_source, other_target = reversed_pairs()
    model = fs.models.TransformerSeq2Seq(3, 3, 32, 4, 1, 1, positions="learned", max_length=8, seed=0)
    history = model.fit(
        source,
        target,
        batch_size=12,
        epochs=90,
        optimiser=fs.training.Adam(model, 5e-3),
        schedule=fs.training.CosineSchedule(5e-3, 90 * 9),
        validation=(other_source, other_target),
        progress=False,
    )
    assert len(history.validation_loss) == 90 and len(history.loss) == 90 * 9
    assert np.exp(model.log_prob(source, target)).min() > 0.9
    assert np.exp(model.log_prob(other_source, other_target)).mean() > 0.7  # nobody told it these
    model.save(tmp_path / "m.safetensors")
    for twin in fs.load(tmp_path / "m.safetensors"), pickle.loads(pickle.dumps(model)), copy.deepcopy(model):
        assert repr(twin) == repr(model) and "max_length=8" in repr(twin)
        assert_same_bits(twin.log_prob(source, target), model.log_prob(source, target))
    reference = fs.reference.load(tmp_path / "m.safetensors")
    assert type(reference) is fs.reference.models.TransformerSeq2Seq
    assert_close(reference.log_prob(source, target), model.log_prob(source, target), 1e-4)


def test_it_fits_pairs_in_any_form():
    source, target = random_ids(4, (9, 5)), random_ids(3, (9, 4))
    results = []
    for data, more in (
        ((source, target), {"batch_size": 4}),
        ((list(source), [list(row) for row in target]), {"batch_size": 4}),
        ((fs.training.PairedBatches(source, target, batch_size=4, seed=0),), {}),
    ):
        model = fs.models.TransformerSeq2Seq(4, 3, 8, 2, 1, 1, seed=0)
        model.fit(*data, epochs=3, label_smoothing=0.1, progress=False, **more)
        results.append(model.log_prob(source, target))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])
    batch = Batch(source, target)  # all of whose symbols are real
    model.fit([batch], steps=1, validation=[batch], progress=False)
    assert model.evaluation_forward(batch)[1] == 9 * 5


@pytest.mark.parametrize("options", [{}, {"sampling": 0.3, "label_smoothing": 0.1}], ids=["plain", "sampling"])
def test_it_resumes(options, tmp_path):
    source, target = pairs()
    source, target = source * 3, target * 3

    def make():
        return fs.models.TransformerSeq2Seq(SOURCES, TARGETS, 8, 2, 1, 1, dropout=0.1, seed=0)

    whole, half, other = make(), make(), make()
    settings = {"batch_size": 4, "progress": False, "validation": (source, target), **options}
    whole.fit(source, target, epochs=4, **settings)
    half.fit(source, target, steps=7, checkpoint=tmp_path, **settings)
    history = other.fit(source, target, epochs=4, checkpoint=tmp_path, resume=True, **settings)
    assert_same_bits(tuple(other.state_dict().values()), tuple(whole.state_dict().values()))
    assert len(history.loss) == 16 and history.stopped == "epochs"


def test_options_of_fit_reach_every_step():
    source, target = pairs()
    seen = []

    class Model(fs.models.TransformerSeq2Seq):
        def training_forward(self, batch, state=None, seed=None, *, sampling=0.0, label_smoothing=0.0):
            seen.append((sampling, label_smoothing))
            return super().training_forward(batch, state, seed, sampling=sampling, label_smoothing=label_smoothing)

    Model(SOURCES, TARGETS, 8, 2, 1, 1).fit(
        source, target, steps=2, sampling=0.25, label_smoothing=0.125, progress=False
    )
    assert seen == [(0.25, 0.125)] * 2


def test_trained_models_have_the_same_bits_on_any_number_of_threads():
    source, target = random_ids(30, (64, 12)), random_ids(20, (64, 9))
    results = []
    for n in (1, 2, 3):
        with threads(n):
            model = fs.models.TransformerSeq2Seq(30, 20, 32, 4, 1, 1, dropout=0.2, seed=0)
            model.fit(source, target, epochs=1, sampling=0.5, progress=False)
            results.append((*model.state_dict().values(), model.log_prob(source, target)))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


# --- Bad input


def make(**changed):
    sizes = {
        "source_vocab_size": 4,
        "target_vocab_size": 3,
        "d_model": 4,
        "nhead": 2,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
    }
    return fs.models.TransformerSeq2Seq(**{**sizes, **changed})


def of_batch(m, **changed):
    whole = {"inputs": np.zeros((1, 2), int), "targets": np.zeros((1, 3), int)}
    return m.training_forward(Batch(**{**whole, **changed}))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m: m([[0, 6]], [[0]]), ValueError, r"should be in 0..5, but source\[0\]\[1\] is 6"),
        (lambda m: m([[0, 1]], [[0, 5]]), ValueError, r"should be in 0..4, but target\[0\]\[1\] is 5"),  # the boundary
        (lambda m: m([[0], []], [[0], [1]]), ValueError, r"source\[1\] should have at least one symbol"),
        (lambda m: m([], []), ValueError, "source should have at least one symbol"),
        (
            lambda m: m(np.zeros((2, 3), int), np.zeros((2, 1), int), source_lengths=[3, 0]),
            ValueError,
            r"source\[1\] should have at least one symbol",
        ),
        (lambda m: m(np.array([[0.5]]), [[0]]), TypeError, "source should hold integers"),
        (lambda m: m([[0]], np.array([[0.5]])), TypeError, "target should hold integers"),
        (lambda m: m(np.zeros((1, 2, 3), int), [[0]]), ValueError, "source should be of shape"),
        (lambda m: m([[0]], np.zeros((1, 2, 3), int)), ValueError, "target should be of shape"),
        (lambda m: m([[0], [1]], [[0]]), ValueError, "target should be a batch of 2, as source is, not a batch of 1"),
        (lambda m: m([0, 1], [[0]]), ValueError, "target should be no batch, as source is, not a batch of 1"),
        (lambda m: m([[0]], [0]), ValueError, "target should be a batch of 1, as source is, not no batch"),
        (lambda m: m([[0, 1]], [[0]], source_lengths=[3]), ValueError, r"source_lengths should be in 0..2"),
        (lambda m: m([[0, 1]], [[0]], lengths=[2]), ValueError, r"^lengths should be in 0..1"),
        (lambda m: m([[0, 1]], [[0]], source_lengths=[[1]]), ValueError, "source_lengths should be of shape"),
        (lambda m: m([[0, 1]], [[0]], lengths=[True]), TypeError, "lengths should hold integers"),
        (lambda m: m([[0, 1]], [[0]], return_weights=1), TypeError, "return_weights should be True or False"),
        (
            lambda m: m(np.zeros((1, 13), int), [[0]]),
            ValueError,
            "source should have at most max_length=12 symbols, not",
        ),
        (
            lambda m: m([[0]], np.zeros((1, 12), int)),
            ValueError,
            "target should have at most max_length=12 symbols, the boundary among them, not 13",
        ),
        (lambda m: m.log_prob([[0]], [[-1]]), ValueError, r"target\[0\]\[0\] is -1"),
        (lambda m: m.log_prob([[0]], [[1]], lengths=[-1]), ValueError, "lengths should be in 0..1"),
        (lambda m: m.forward([[0]], [[1]], seed=-1), ValueError, "seed should be at least 0"),
        (
            lambda m: m.backward(np.zeros((1, 2, 5)), m.forward([[0]], [[1]])[1]),
            ValueError,
            r"dlogits should be of shape \(1, 2, 6\)",
        ),
        (
            lambda m: m.backward(np.zeros((1, 2, 6)), transformer().forward([[0]], [[1]])[1]),
            ValueError,
            "tape should be",
        ),
        (lambda m: m.backward(np.zeros((1, 2, 6)), None), TypeError, "tape should be"),
        (
            lambda m: m.backward(np.zeros((1, 2, 6)), m.forward([[0]], [[1]])[1], grads={}),
            ValueError,
            "(is|are) missing",
        ),
        (lambda m: m.fit([[0], [9]], [[0], [1]], steps=1), ValueError, r"but sources\[1\]\[0\] is 9"),
        (lambda m: m.fit([[0], [1]], [[0], [7]], steps=1), ValueError, r"but targets\[1\]\[0\] is 7"),
        (lambda m: m.fit([[0], []], [[0], [1]], steps=1), ValueError, r"sources\[1\] should have at least one symbol"),
        (lambda m: m.fit([[0], [1]], [[0]], steps=1), ValueError, "targets should be a batch of 2, as sources is"),
        (lambda m: m.fit([0, 1], [0, 1], steps=1), ValueError, "sources should be a batch of sequences, not one"),
        (lambda m: m.fit([[0]], steps=1), (TypeError, ValueError), "targets should be given"),
        (lambda m: m.fit([[0]], [[0]], steps=1, batch_size=0), ValueError, "batch_size should be at least 1"),
        (lambda m: m.fit([[0]], [[0]], steps=1, sampling=1.5), ValueError, "sampling should be at most 1"),
        (lambda m: m.fit([[0]], [[0]], steps=1, sampling=-1), ValueError, "sampling should be at least 0"),
        (lambda m: m.fit([[0]], [[0]], steps=1, sampling="no"), TypeError, "sampling should be a number"),
        (lambda m: m.fit([[0]], [[0]], steps=1, label_smoothing=2), ValueError, "label_smoothing should be at most 1"),
        (lambda m: m.fit([[0]], [[0]], steps=1, truncate=2), ValueError, "truncate should be None"),
        (
            lambda m: m.fit([[0]], [[0]], steps=1, validation=([[0]], [[5]])),
            ValueError,
            r"but validation targets\[0\]\[0\] is 5",
        ),
        (
            lambda m: m.fit([[0]], [[0]], steps=1, validation=([[0] * 13], [[1]])),
            ValueError,
            "validation sources should have at most max_length=12 symbols",
        ),
        (lambda m: of_batch(m, targets=None), ValueError, "targets should be given"),
        (lambda m: of_batch(m, inputs=np.zeros(2, int)), ValueError, "inputs should be a batch of ids"),
        (lambda m: of_batch(m, targets=np.zeros(2, int)), ValueError, "targets should be a batch of ids"),
        (lambda m: of_batch(m, inputs=np.zeros((1, 2))), TypeError, "inputs should hold integers"),
        (lambda m: of_batch(m, lengths=[3]), ValueError, "^lengths should be in 0..2"),
        (lambda m: of_batch(m, target_lengths=[4]), ValueError, "target_lengths should be in 0..3"),
        (lambda m: of_batch(m, targets=np.full((1, 1), 5)), ValueError, r"but targets\[0, 0\] is 5"),
        (
            lambda m: of_batch(m, targets=np.zeros((1, 12), int)),
            ValueError,
            "targets should have at most max_length=12",
        ),
        (lambda m: make(source_vocab_size=0), ValueError, "source_vocab_size should be at least 1"),
        (lambda m: make(target_vocab_size=0), ValueError, "target_vocab_size should be at least 1"),
        (lambda m: make(target_vocab_size=2.0), TypeError, "target_vocab_size should be an integer"),
        (lambda m: make(d_model=0), ValueError, "d_model should be at least 1"),
        (lambda m: make(nhead=3), ValueError, "nhead"),
        (lambda m: make(num_encoder_layers=0), ValueError, "num_encoder_layers should be at least 1"),
        (lambda m: make(num_decoder_layers=0), ValueError, "num_decoder_layers should be at least 1"),
        (lambda m: make(num_decoder_layers=10**9), ValueError, "num_decoder_layers should be at most 1024"),
        (lambda m: make(dim_feedforward=0), ValueError, "dim_feedforward should be at least 1"),
        (lambda m: make(max_length=0), ValueError, "max_length should be at least 1"),
        (lambda m: make(dropout=1), ValueError, "dropout should be in"),
        (lambda m: make(activation="tanh"), ValueError, "activation should be one of"),
        (lambda m: make(norm="batch"), ValueError, "norm should be one of"),
        (lambda m: make(positions="none"), ValueError, "positions should be one of"),
        (lambda m: make(nhead=4, positions="rotary"), ValueError, "rotary"),
        (lambda m: make(num_kv_heads=3), ValueError, "num_kv_heads"),
        (lambda m: make(bias=1), TypeError, "bias should be True or False"),
        (lambda m: make(tied=None), TypeError, "tied should be True or False"),
        (lambda m: make(norm_first=0), TypeError, "norm_first should be True or False"),
        (lambda m: make(dtype="float16"), TypeError, "dtype should be float32 or float64"),
        (lambda m: make(seed=-1), ValueError, "seed should be at least 0"),
        (lambda m: m.load_state_dict({}), ValueError, "source_embedding.weight.* are missing"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call(transformer())


@EACH
def test_edges(kind):
    model = transformer(kind)
    assert model.begin == model.end == TARGETS
    logits = model(np.zeros((2, 1), int), np.zeros((2, 0), int))
    assert logits.shape == (2, 1, 6)
    assert_same_bits(model([[0], [0]], [[], []]), logits)
    assert_same_bits(model([0], []), logits[0])
    np.testing.assert_allclose(model.log_prob([[0], [0]], [[], []]), log_softmax(logits)[:, 0, TARGETS])
    assert model(np.zeros((0, 3), int), np.zeros((0, 4), int)).shape == (0, 5, 6)
    assert model.log_prob(np.zeros((0, 3), int), np.zeros((0, 4), int)).shape == (0,)
    logits, maps = model(np.zeros((0, 3), int), np.zeros((0, 4), int), return_weights=True)
    assert logits.shape == (0, 5, 6) and maps[0].shape == (0, 2, 5, 3)
    logits, tape = model.forward(np.zeros((0, 3), int), np.zeros((0, 4), int))
    model.backward(logits, tape)
    assert all((a == 0).all() for a in model.grads.values())
    loss, count, tape, _ = model.training_forward(Batch(np.zeros((0, 3), int), np.zeros((0, 4), int)))
    assert (loss, count) == (0, 0)
    model.training_backward(tape)
    longest = np.zeros(12, int), np.zeros(11, int)
    assert model(*longest).shape == (12, 6)
