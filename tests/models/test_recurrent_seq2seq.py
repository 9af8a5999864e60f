"""Seq2Seq: against PyTorch, differences and its reference; bits; steps and their states; training; bad input."""

import copy
import itertools
import pickle

import numpy as np
import pytest
from common import assert_close, assert_same_bits, run_python, threads, tolerance
from protocol import check_gradients, log_softmax

import fastseq as fs
from fastseq.training import Batch, PairedBatches

S, V, E, H = 7, 5, 6, 9
CELLS = ["gru", "lstm", "rnn"]
ATTENTIONS = [None, "multiplicative", "additive"]
SIDES = pytest.mark.parametrize("bidirectional", [True, False], ids=["both", "one"])
CELL = pytest.mark.parametrize("cell", CELLS)
ATTENTION = pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
ENGINE = pytest.mark.parametrize("engine", [fs, fs.reference], ids=["compiled", "reference"])
DTYPE = pytest.mark.parametrize("dtype", ["float32", "float64"])

SOURCES = [[1, 2, 3, 6], [0], [4, 4, 1, 2, 3, 5], [6, 5]]
TARGETS = [[1, 2], [], [3, 4, 0, 0, 2], [1]]
COUNTS, TARGET_COUNTS = [len(row) for row in SOURCES], [len(row) for row in TARGETS]


def model(engine=fs, dtype="float64", layers=1, **settings):
    made = engine.models.Seq2Seq(S, V, E, H, layers, dtype=dtype, seed=3, **settings)
    rng = np.random.default_rng(8)
    for name, array in made.parameters.items():  # biases count, and nothing is like anything else
        made.parameters[name] = array + rng.uniform(0.05, 0.2, array.shape) * rng.choice([-1, 1], array.shape)
    return made


def padded(rows, filling, width=None):
    array = np.full((len(rows), max(len(row) for row in rows) if width is None else width), filling)
    for into, row in zip(array, rows, strict=True):
        into[: len(row)] = row
    return array


def dlogits_of(logits, seed=0):
    return np.random.default_rng([seed, 17]).normal(size=logits.shape).astype(logits.dtype)


def assert_same(actual, expected, engine):
    """Of the compiled model the same bits; the products of NumPy depend on what stands beside a row."""
    if engine is fs:
        assert_same_bits(actual, expected)
    else:
        assert_close(actual, expected, 1e-13)


def trained(made, source, target, **lengths):
    """Logits, and the gradients of a loss of random weights."""
    logits, tape = made.forward(source, target, **lengths)
    grads = {name: np.zeros_like(a) for name, a in made.parameters.items()}
    assert made.backward(dlogits_of(logits), tape, grads=grads) is None
    return logits, grads


# Against PyTorch


def torch_model(torch, made, mistake=None):
    """The same model of one pair, written in PyTorch; with a mistake, if one is wanted."""
    p = {name: torch.tensor(np.array(a), requires_grad=True) for name, a in made.parameters.items()}
    layers, sides, cell, attention = made.num_layers, 2 if made.bidirectional else 1, made.cell, made.attention
    kind = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM, "rnn": torch.nn.RNN}[cell]

    def recurrent(prefix, x, state, sides):
        module = kind(x.shape[-1], H, layers, batch_first=True, bidirectional=sides == 2, dtype=torch.float64)
        own = {name[len(prefix) :]: a for name, a in p.items() if name.startswith(prefix)}
        return torch.func.functional_call(module, own, (x[None], *(() if state is None else (state,))))

    def bridged(array, name):
        """(L D, 1, H) -> (L, 1, H)"""
        if sides == 1:
            return array
        ends = [torch.cat([array[2 * i, 0], array[2 * i + 1, 0]]) for i in range(layers)]
        if mistake == "directions exchanged":
            ends = [torch.cat([array[2 * i + 1, 0], array[2 * i, 0]]) for i in range(layers)]
        if mistake == "directions outermost":
            ends = [torch.cat([array[i, 0], array[layers + i, 0]]) for i in range(layers)]
        if mistake == "one bridge":
            name = "h"
        weights = [(p[f"bridge_{name}_l{i}.weight"], p[f"bridge_{name}_l{i}.bias"]) for i in range(layers)]
        crossed = [w @ end + b for end, (w, b) in zip(ends, weights, strict=True)]
        crossed = [x if mistake == "no tanh" else torch.tanh(x) for x in crossed]
        return torch.stack(crossed)[:, None]

    def logits(source, target):
        keys, state = recurrent("encoder.", p["source_embedding.weight"][source], None, sides)
        keys = keys[0]
        state = (
            tuple(bridged(a, n) for a, n in zip(state, "hc", strict=True)) if cell == "lstm" else bridged(state, "h")
        )
        symbols = [V, *target] if mistake != "no begin" else [*target, V]
        x = p["target_embedding.weight"][symbols]
        W, b = p["output.weight"], p["output.bias"]
        if attention == "additive":
            rows = []
            context = torch.zeros(keys.shape[1], dtype=torch.float64)
            for own in x:
                of = state
                if mistake == "query after the step":  # with the context before
                    _, of = recurrent("decoder.", torch.cat([own, context])[None], state, 1)
                s = (of[0] if cell == "lstm" else of)[-1, 0]
                hidden = p["attention.query.weight"] @ s + keys @ p["attention.key.weight"].T
                hidden = hidden + p["attention.key.bias"]
                context = torch.softmax(torch.tanh(hidden) @ p["attention.score.weight"][0], 0) @ keys
                entering = [context, own] if mistake == "context first" else [own, context]
                _, state = recurrent("decoder.", torch.cat(entering)[None], state, 1)
                rows.append(torch.cat([(state[0] if cell == "lstm" else state)[-1, 0], context]))
            return torch.stack(rows) @ W.T + b
        h = recurrent("decoder.", x, state, 1)[0][0]
        if attention == "multiplicative":
            scores = h @ p["attention.weight"] @ keys.T
            if mistake == "scaled":
                scores = scores / H**0.5
            context = torch.softmax(scores, 1) @ keys
            both = [h, context] if mistake == "h first" else [context, h]
            h = torch.cat(both, 1) @ p["combine.weight"].T
            h = h if mistake == "no tanh" else torch.tanh(h)
        return h @ W.T + b

    return p, logits


def check_against_torch(made, mistake=None):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: take the extra 'peers'")
    p, logits_of = torch_model(torch, made, mistake)
    ours, grads = trained(made, SOURCES, TARGETS)
    dlogits = dlogits_of(ours)
    total = 0
    for i, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        theirs = logits_of(source, target)
        assert_close(ours[i, : len(target) + 1], theirs.detach().numpy(), 1e-12, f"logits of {i}")
        total = total + (theirs * torch.tensor(dlogits[i, : len(target) + 1])).sum()
    total.backward()
    assert set(grads) == set(p)
    for name, gradient in grads.items():
        assert_close(gradient, p[name].grad.numpy(), 1e-11, name)


@pytest.mark.parametrize("layers", [1, 2])
@ATTENTION
@SIDES
@CELL
def test_is_pytorch(cell, bidirectional, attention, layers):
    check_against_torch(model(cell=cell, bidirectional=bidirectional, attention=attention, layers=layers))


MISTAKES = [
    ("directions exchanged", {}),
    ("directions outermost", {"layers": 2}),
    ("one bridge", {"cell": "lstm"}),
    ("no tanh", {}),
    ("no begin", {}),
    ("scaled", {"attention": "multiplicative"}),
    ("h first", {"attention": "multiplicative", "bidirectional": False}),
    ("no tanh", {"attention": "multiplicative", "bidirectional": False}),
    ("context first", {"attention": "additive", "bidirectional": False}),
    ("query after the step", {"attention": "additive"}),
]


@pytest.mark.parametrize(("mistake", "settings"), MISTAKES, ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_are_seen(mistake, settings):
    made = model(**settings)
    if mistake == "context first":  # of one size, so that they can be exchanged
        made = fs.models.Seq2Seq(S, V, H, H, cell="gru", seed=1, dtype="float64", **settings)
    check_against_torch(made)
    with pytest.raises(AssertionError, match="off by"):
        check_against_torch(made, mistake)


# Gradients by differences


@ENGINE
@ATTENTION
@SIDES
@CELL
def test_gradients(cell, bidirectional, attention, engine):
    made = model(engine, cell=cell, bidirectional=bidirectional, attention=attention, dropout=0.3, layers=2)
    batch = Batch(padded(SOURCES, 0), padded(TARGETS, 0), np.array(COUNTS), target_lengths=np.array(TARGET_COUNTS))

    def forward():
        loss, count, tape, state = made.training_forward(batch, seed=4, label_smoothing=0.1)
        assert count == sum(TARGET_COUNTS) + len(TARGETS) and state is None
        return loss, tape

    check_gradients(made, forward, lambda tape, grads: made.training_backward(tape, grads))
    weights = dlogits_of(made.forward(SOURCES, TARGETS, seed=4)[0])

    def other():
        logits, tape = made.forward(SOURCES, TARGETS, seed=4)
        return float((logits * weights).sum()), tape

    check_gradients(made, other, lambda tape, grads: made.backward(weights, tape, grads=grads))


# Engines


@pytest.mark.every_isa
@DTYPE
@ATTENTION
@SIDES
@CELL
def test_compiled_and_reference_agree(cell, bidirectional, attention, dtype):
    settings = {"cell": cell, "bidirectional": bidirectional, "attention": attention, "dtype": dtype}
    made = fs.models.Seq2Seq(S, V, 24, 40, 1, seed=1, **settings)
    wide = "float64" if dtype == "float32" else np.longdouble
    other = fs.reference.models.Seq2Seq(**{**made._config, "dtype": wide})
    other.load_state_dict(made.state_dict())
    ours, theirs = trained(made, SOURCES, TARGETS), trained(other, SOURCES, TARGETS)
    relative = tolerance(dtype, 24 + 2 * 40 + 40, sum(COUNTS))
    assert_close(ours[0], theirs[0], relative, "logits")
    # The loss has the same weights in both: those of one seed, in either dtype.
    for name, gradient in ours[1].items():
        assert_close(gradient, theirs[1][name], 4 * relative, name)
    assert_close(made.log_prob(SOURCES, TARGETS), other.log_prob(SOURCES, TARGETS), relative)
    if attention is not None:
        weights = [one(SOURCES, TARGETS, return_weights=True)[1] for one in (made, other)]
        assert_close(*weights, relative, "weights")
    state, wanted = (one.initial_state(SOURCES) for one in (made, other))
    for symbols in ([V] * 4, [1, 2, 3, 4], [0] * 4):
        logits, state = made.step(symbols, state)
        expected, wanted = other.step(symbols, wanted)
        assert_close(logits, expected, relative)
        for a, b in zip(state, wanted, strict=True):
            assert_close(a.astype(wide), b.astype(wide), relative)


# Bits


@pytest.mark.every_isa
@DTYPE
@pytest.mark.parametrize("layers", [1, 2])
@ATTENTION
@SIDES
@CELL
def test_rows_have_the_same_bits_alone_padded_and_step_by_step(cell, bidirectional, attention, layers, dtype):
    made = model(dtype=dtype, cell=cell, bidirectional=bidirectional, attention=attention, layers=layers)
    logits = made(SOURCES, TARGETS)
    assert logits.shape == (4, 6, V + 1) and logits.dtype == dtype
    padding = np.arange(6) > np.array(TARGET_COUNTS)[:, None]
    assert not logits[padding].any() and not np.signbit(logits[padding]).any()
    assert_same_bits(made.forward(SOURCES, TARGETS)[0], logits)
    wide = made(
        padded(SOURCES, -1, 9), padded(TARGETS, 99, 8), source_lengths=COUNTS, lengths=np.array(TARGET_COUNTS, "u1")
    )
    assert_same_bits(wide[:, :6], logits)
    assert not wide[:, 6:].any()
    state = made.initial_state(SOURCES)
    given = padded([[V, *row] for row in TARGETS], 0)
    for t in range(6):
        step, state = made.step(given[:, t], state)
        for i in np.flatnonzero(~padding[:, t]):
            assert_same_bits(step[i], logits[i, t])
    for i, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        n = len(target) + 1
        assert_same_bits(made(source, target), logits[i, :n])
        assert_same_bits(made(np.array(source)[None], np.array([target], int)), logits[i : i + 1, :n])
        state = made.initial_state(source)
        for t, symbol in enumerate([V, *target]):
            step, state = made.step([symbol], state)
            assert_same_bits(step[0], logits[i, t])
    assert_same_bits(
        made.log_prob(SOURCES, TARGETS),
        np.array([made.log_prob(s, t)[0] for s, t in zip(SOURCES, TARGETS, strict=True)]),
    )


@ATTENTION
@CELL
def test_gradients_do_not_depend_on_padding(cell, attention):
    made = model(dtype="float32", cell=cell, attention=attention, layers=2)
    logits, grads = trained(made, SOURCES, TARGETS)
    wide, tape = made.forward(
        padded(SOURCES, -1, 11), padded(TARGETS, -7, 9), source_lengths=COUNTS, lengths=TARGET_COUNTS
    )
    dlogits = np.full(wide.shape, np.nan, wide.dtype)
    dlogits[:, :6] = dlogits_of(logits)
    dlogits[:, :6][np.arange(6) > np.array(TARGET_COUNTS)[:, None]] = np.nan
    found = {name: np.zeros_like(a) for name, a in made.parameters.items()}
    made.backward(dlogits, tape, grads=found)
    for name, gradient in found.items():
        assert_same_bits(gradient, grads[name], name)


@ATTENTION
def test_the_same_bits_on_any_number_of_threads(attention):
    made = fs.models.Seq2Seq(S, V, 32, 64, 2, attention=attention, dropout=0.2, seed=0)
    rng = np.random.default_rng(0)
    sources = [rng.integers(0, S, n) for n in rng.integers(1, 12, 50)]
    targets = [rng.integers(0, V, n) for n in rng.integers(0, 12, 50)]
    results = []
    for n in (1, 2, 3):
        with threads(n):
            logits, tape = made.forward(sources, targets, seed=1)
            grads = {name: np.zeros_like(a) for name, a in made.parameters.items()}
            made.backward(dlogits_of(logits), tape, grads=grads)
            results.append((logits, made(sources, targets), *grads.values()))
    for other in results[1:]:
        assert_same_bits(other, results[0])


# What a call gives


@ENGINE
@pytest.mark.parametrize("attention", ATTENTIONS[1:])
def test_weights(attention, engine):
    made = model(engine, attention=attention)
    logits, weights = made(SOURCES, TARGETS, return_weights=True)
    assert_same(logits, made(SOURCES, TARGETS), engine)
    assert weights.shape == (4, 6, 6)
    for own, s, t in zip(weights, COUNTS, TARGET_COUNTS, strict=True):
        np.testing.assert_allclose(own[: t + 1].sum(1), 1, rtol=1e-12)
        assert not own[t + 1 :].any() and not own[:, s:].any()
    assert np.ptp(weights[2, 0]) > 0.003
    wide = made(
        padded(SOURCES, 0, 9), padded(TARGETS, 0, 7), source_lengths=COUNTS, lengths=TARGET_COUNTS, return_weights=True
    )[1]
    assert wide.shape == (4, 8, 9)
    assert_same(np.ascontiguousarray(wide[:, :6, :6]), weights, engine)
    alone = made(SOURCES[0], TARGETS[0], return_weights=True)[1]
    assert_same(alone, np.ascontiguousarray(weights[0, :3, :4]), engine)
    with pytest.raises(ValueError, match="return_weights should be False where the model has no attention"):
        model(engine)(SOURCES, TARGETS, return_weights=True)


@ENGINE
@ATTENTION
def test_log_prob_is_the_chain_rule(attention, engine):
    made = model(engine, attention=attention)
    logits = log_softmax(made(SOURCES, TARGETS))
    for i, target in enumerate(TARGETS):
        wanted = sum(logits[i, t, symbol] for t, symbol in enumerate([*target, V]))
        np.testing.assert_allclose(made.log_prob(SOURCES[i], target), [wanted], rtol=1e-12)
    # All targets of up to 2 symbols, and those that go on after 3.
    whole = [list(t) for n in range(3) for t in itertools.product(range(V), repeat=n)]
    more = [list(t) for t in itertools.product(range(V), repeat=3)]
    ended = np.exp(made.log_prob([SOURCES[0]] * len(whole), whole)).sum()
    going = log_softmax(made([SOURCES[0]] * len(more), more))
    rows = np.arange(len(more))
    going_on = np.exp(sum(going[rows, t, np.array(more)[:, t]] for t in range(3))).sum()
    np.testing.assert_allclose(ended + going_on, 1, rtol=1e-10)


@ENGINE
@ATTENTION
def test_the_source_matters_to_its_end(attention, engine):
    made = model(engine, attention=attention)
    base = made([1, 2, 3, 4], [1, 2])
    for i in range(4):
        other = [1, 2, 3, 4]
        other[i] = 6
        assert np.abs(made(other, [1, 2]) - base).max() > 1e-4


@ENGINE
@ATTENTION
def test_nothing_to_do(attention, engine):
    made = model(engine, attention=attention)
    empty = np.zeros((0, 3), int)
    assert made(empty, empty).shape == (0, 4, V + 1)
    logits, tape = made.forward(empty, empty)
    made.backward(logits, tape)
    assert made.log_prob(empty, empty).shape == (0,)
    assert not any(a.any() for a in made.grads.values())
    assert made(SOURCES, [[]] * 4).shape == (4, 1, V + 1)
    state = made.initial_state(empty)
    assert made.step(np.zeros(0, int), state)[0].shape == (0, V + 1)


# Training


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@ATTENTION
def test_evaluation_is_training_without_dropout(cell, attention):
    made = model(cell=cell, attention=attention, layers=2)
    batch = Batch(padded(SOURCES, 0), padded(TARGETS, 0), np.array(COUNTS), target_lengths=np.array(TARGET_COUNTS))
    loss, count, _, _ = made.training_forward(batch, seed=1)
    assert made.evaluation_forward(batch) == (loss, count, None)
    np.testing.assert_allclose(loss, -made.log_prob(SOURCES, TARGETS).sum() / count, rtol=1e-12)
    dropped = fs.models.Seq2Seq(**{**made._config, "dropout": 0.5})
    dropped.load_state_dict(made.state_dict())
    assert dropped.evaluation_forward(batch) == (loss, count, None)
    losses = [dropped.training_forward(batch, seed=seed)[0] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    assert loss not in losses
    theirs = fs.reference.models.Seq2Seq(**dropped._config)
    theirs.load_state_dict(made.state_dict())
    np.testing.assert_allclose(theirs.training_forward(batch, seed=1)[0], losses[0], rtol=1e-12)


def fed(made, share, seed=5):
    """What the decoder is given, padded, when a share of it is its own."""
    pairs = made._pairs(SOURCES, TARGETS, None, None)
    sampled = made._resampled(pairs, seed, share)
    assert sampled.following is pairs.following
    return np.split(sampled.begun.ids, sampled.begun.rows.starts[1:-1])


@ENGINE
@ATTENTION
@CELL
def test_scheduled_sampling(cell, attention, engine):
    made = model(engine, cell=cell, attention=attention)
    batch = Batch(padded(SOURCES, 0), padded(TARGETS, 0), np.array(COUNTS), target_lengths=np.array(TARGET_COUNTS))
    for row, target in zip(fed(made, 0.0), TARGETS, strict=True):
        assert row.tolist() == [V, *target]
    assert made.training_forward(batch, seed=1, sampling=0.0)[0] == made.training_forward(batch, seed=1)[0]
    # At 1 it is given the likeliest symbol after what it was given before, from the boundary on.
    own = []
    for source, target in zip(SOURCES, TARGETS, strict=True):
        state, row = made.initial_state(source), [V]
        for _ in target:
            logits, state = made.step([row[-1]], state)
            row.append(int(logits[0, :V].argmax()))
        own.append(row)
    assert [row.tolist() for row in fed(made, 1.0)] == own
    assert own != [[V, *target] for target in TARGETS]
    logits = log_softmax(np.concatenate([made(s, row[1:]) for s, row in zip(SOURCES, own, strict=True)]))
    following = np.concatenate([[*target, V] for target in TARGETS])
    loss, count, tape, _ = made.training_forward(batch, seed=1, sampling=1.0)
    np.testing.assert_allclose(loss, -logits[np.arange(count), following].mean(), rtol=1e-12)
    grads = {name: np.zeros_like(a) for name, a in made.parameters.items()}
    made.training_backward(tape, grads)
    # What it was given is no function of the parameters: the gradient is that of the targets it was given.
    rows = [row[1:] for row in own]
    dlogits, forced = made.forward(SOURCES, rows)
    wanted = {name: np.zeros_like(a) for name, a in made.parameters.items()}
    places = np.arange(6) <= np.array(TARGET_COUNTS)[:, None]
    _, dlogits[places] = fs.losses.softmax_cross_entropy(dlogits[places], following)
    made.backward(dlogits, forced, grads=wanted)
    for name, gradient in grads.items():
        np.testing.assert_allclose(gradient, wanted[name], rtol=1e-9, atol=1e-13, err_msg=name)


def test_a_share_is_sampled():
    made = model(attention="additive")
    many = [[1, 2, 3]] * 200
    pairs = made._pairs(many, [[4, 4, 4, 4, 4]] * 200, None, None)
    own = made._resampled(pairs, 0, 1.0).begun.ids.reshape(200, 6)
    assert (own[:, 1:] != 4).all()  # so that what is replaced can be told
    some = made._resampled(pairs, 7, 0.3).begun.ids.reshape(200, 6)
    assert (some[:, 0] == V).all()
    share = (some[:, 1:] != 4).mean()
    assert 0.25 < share < 0.35
    assert_same_bits(made._resampled(pairs, 7, 0.3).begun.ids.reshape(200, 6), some)
    assert (made._resampled(pairs, 8, 0.3).begun.ids.reshape(200, 6) != some).any()
    batch = Batch(np.array(many), np.full((200, 5), 4), np.full(200, 3), target_lengths=np.full(200, 5))
    losses = [made.training_forward(batch, seed=s, sampling=0.5)[0] for s in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    for wrong in (-0.1, 1.1, "half"):
        with pytest.raises((ValueError, TypeError), match="sampling should be"):
            made.training_forward(batch, sampling=wrong)


def reversals(count, seed):
    rng = np.random.default_rng(seed)
    sources = [rng.integers(0, 6, rng.integers(1, 7)) for _ in range(count)]
    return sources, [row[::-1] for row in sources]


def spoken(made, sources, most=8):
    """The likeliest symbol after symbol, to the end."""
    state = made.initial_state(sources)
    symbols, rows = np.full(len(sources), made.begin), [[] for _ in sources]
    going = np.ones(len(sources), bool)
    for _ in range(most):
        logits, state = made.step(symbols, state)
        symbols = logits.argmax(1)
        going &= symbols != made.end
        for i in np.flatnonzero(going):
            rows[i].append(int(symbols[i]))
    return rows


@pytest.mark.parametrize(
    ("cell", "attention", "sampling"),
    [
        ("gru", "multiplicative", 0.0),
        ("lstm", "multiplicative", 0.0),
        ("gru", "additive", 0.0),
        ("rnn", "additive", 0.2),
    ],
)
def test_learns_to_reverse(cell, attention, sampling, tmp_path):
    made = fs.models.Seq2Seq(6, 6, 24, 48, cell=cell, attention=attention, seed=0)
    sources, targets = reversals(2000, 1)
    history = made.fit(
        sources,
        targets,
        batch_size=50,
        epochs=8,
        optimiser=fs.training.Adam(made, 5e-3),
        validation=reversals(200, 2),
        sampling=sampling,
        progress=False,
        seed=1,
    )
    assert history.validation_loss[-1] < 0.25 < 1 < history.loss[0]
    unseen, wanted = reversals(300, 3)
    right = np.mean([row == list(want) for row, want in zip(spoken(made, unseen), wanted, strict=True)])
    assert right > 0.8
    made.save(tmp_path / "model")
    for other in (fs.load(tmp_path / "model"), pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert type(other) is fs.models.Seq2Seq and repr(other) == repr(made)
        assert_same_bits(other(unseen, wanted), made(unseen, wanted))
    assert type(fs.reference.load(tmp_path / "model")) is fs.reference.models.Seq2Seq


@ATTENTION
def test_resumes(attention, tmp_path):
    sources, targets = reversals(60, 1)

    def run(folder, **settings):
        made = fs.models.Seq2Seq(6, 6, 8, 12, attention=attention, dropout=0.2, seed=0)
        made.fit(sources, targets, batch_size=9, sampling=0.4, seed=3, checkpoint=folder, progress=False, **settings)
        return made

    whole = run(tmp_path / "whole", epochs=3)
    run(tmp_path / "parts", steps=8, checkpoint_every=3)
    resumed = run(tmp_path / "parts", epochs=3, resume=True)
    for name, array in whole.parameters.items():
        assert_same_bits(resumed.parameters[name], array, name)


def test_fits_data_in_any_form():
    sources, targets = reversals(40, 1)
    finals = []
    for data, more in (
        ((sources, targets), {"batch_size": 8}),
        ((PairedBatches(sources, targets, batch_size=8, seed=0),), {}),
    ):
        made = fs.models.Seq2Seq(6, 6, 8, 12, seed=0)
        made.fit(*data, **more, steps=4, seed=0, progress=False)
        finals.append(made.state_dict())
    for name, array in finals[0].items():
        assert_same_bits(finals[1][name], array, name)


# States


def states(made):
    """Some states, of sources of other lengths and after other symbols."""
    state = made.initial_state(SOURCES)
    yield state
    for symbols in ([V] * 4, [1, 0, 4, 2]):
        _, state = made.step(symbols, state)
        yield state


@ENGINE
@ATTENTION
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_states(cell, attention, engine, tmp_path):
    made = model(engine, cell=cell, attention=attention, layers=2)
    for n, state in enumerate(states(made)):
        assert type(state) is fs.Seq2SeqState and state.batch_size == 4 and state.dtype == made.dtype
        assert (state.c is None) == (cell == "gru") and (state.keys is None) == (attention is None)
        state.save(tmp_path / f"{n}")
        for other in (
            state.copy(),
            copy.copy(state),
            copy.deepcopy(state),
            pickle.loads(pickle.dumps(state)),
            fs.load(tmp_path / f"{n}"),
            fs.Seq2SeqState(**state._arrays()),
            fs.Seq2SeqState(*(getattr(state, name) for name in ("h", "c", "keys", "projected", "lengths"))),
            state[:],
            fs.Seq2SeqState.concatenate([state[:1], state[1:1], state[1:]]),
            fs.Seq2SeqState.concatenate([state[i] for i in range(4)]),
        ):
            assert other == state and other is not state
            assert_same_bits(made.step([1, 2, 3, 4], other)[0], made.step([1, 2, 3, 4], state)[0])
        rows = [2, 0, 2, 2, 3]
        forked = state[rows]
        assert forked.batch_size == 5 and forked != state
        logits = made.step([1, 1, 2, 3, 4], forked)[0]
        for i, (row, symbol) in enumerate(zip(rows, [1, 1, 2, 3, 4], strict=True)):
            assert_same(made.step([symbol], state[row])[0], logits[i : i + 1], engine)
        assert state[np.array([True, False, False, True])] == state[[0, 3]] == state[[0, -1]]
        assert state[[]].batch_size == 0
        for array in state:
            assert not array.flags.writeable
        with pytest.raises(AttributeError, match="immutable"):
            state.h = state.h
        with pytest.raises(AttributeError, match="immutable"):
            del state.h
        with pytest.raises(TypeError, match="unhashable"):
            hash(state)
        assert repr(state).startswith("Seq2SeqState(h=(4, 2, 9)")
        with pytest.raises(ValueError, match="rows should be in -4..3"):
            state[4]


@pytest.mark.parametrize("attention", ATTENTIONS[1:])
def test_states_of_sources_of_other_lengths(attention):
    made = model(attention=attention)
    together = made.initial_state(SOURCES)
    apart = [made.initial_state([source]) for source in SOURCES]
    assert [state.keys.shape[1] for state in apart] == COUNTS
    joined = fs.Seq2SeqState.concatenate(apart)
    assert joined == together
    for state, row in zip(apart, range(4), strict=True):
        assert together[row] == state and state == together[row]
    other = made.initial_state([[1, 2, 3, 5], *SOURCES[1:]])
    assert other != together and other[1:] == together[1:]
    wide = made.initial_state(padded(SOURCES, 5, 9), lengths=COUNTS)
    assert wide.keys.shape[1] == 9 and wide == together
    named = wide._arrays()
    dirty = {name: np.array(a) for name, a in named.items()}
    dirty["keys"][1, 1:], dirty["projected"][0, 4:] = np.nan, np.inf
    assert fs.Seq2SeqState(**dirty) == together
    assert together != "state" and together != fs.State(together.h)


def test_a_state_is_a_value():
    made = model(attention="additive", cell="lstm")
    state = made.initial_state(SOURCES)
    before = [array.tobytes() for array in state]
    _, first = made.step([V] * 4, state)
    _, second = made.step([V] * 4, state)
    made.step([1] * 4, first)
    assert first == second
    assert [array.tobytes() for array in state] == before
    h = np.array(state.h)
    own = fs.Seq2SeqState(h, state.c, state.keys, state.projected, state.lengths)
    h[:] = 0
    assert own == state


def test_states_of_another_dtype_are_converted():
    made, other = model(attention="additive", cell="lstm"), model(dtype="float32", attention="additive", cell="lstm")
    other.load_state_dict(made.state_dict())
    logits, _ = made.step([V] * 4, other.initial_state(SOURCES))
    assert logits.dtype == "float64"
    assert_close(logits, made.step([V] * 4, made.initial_state(SOURCES))[0], 1e-5)


@ENGINE
def test_bad_states(engine):
    made = model(engine, attention="additive", cell="lstm")
    state = made.initial_state(SOURCES)
    h, c, keys, projected, lengths = state
    for call, error, message in [
        (lambda: made.step([V] * 4, None), TypeError, "state should be a Seq2SeqState, not NoneType"),
        (lambda: made.step([V] * 4, fs.LSTMState(h, c)), TypeError, "state should be a Seq2SeqState, not LSTMState"),
        (lambda: made.step([V] * 3, state), ValueError, r"state.h should be of shape \(3, 1, 9\), not \(4, 1, 9\)"),
        (
            lambda: model(engine, attention="additive").step([V] * 4, state),
            ValueError,
            r"state.c should be None for this model, not an array of shape \(4, 1, 9\)",
        ),
        (lambda: model(engine, cell="lstm").step([V] * 4, state), ValueError, "state.keys should be None"),
        (
            lambda: made.step([V] * 4, model(engine, cell="lstm").initial_state(SOURCES)),
            ValueError,
            r"state.keys should be an array of shape \(4, 0, 18\) for this model, not None",
        ),
        (
            lambda: model(engine, attention="additive", cell="lstm", bidirectional=False).step([V] * 4, state),
            ValueError,
            r"state.keys should be of shape \(4, 6, 9\), not \(4, 6, 18\)",
        ),
        (lambda: fs.Seq2SeqState(h, c, keys), ValueError, "together: projected, lengths are None"),
        (lambda: fs.Seq2SeqState(h[0]), ValueError, "h should be of shape"),
        (lambda: fs.Seq2SeqState(h.astype(int)), TypeError, "h should hold real floating numbers"),
        (lambda: fs.Seq2SeqState(h, c[:2]), ValueError, "should agree in batch and layers"),
        (lambda: fs.Seq2SeqState(h, c.astype("float32")), TypeError, "h and c should have one dtype"),
        (
            lambda: fs.Seq2SeqState(h, c, keys[:2], projected, lengths),
            ValueError,
            r"keys should be of shape \(4, S, K\)",
        ),
        (lambda: fs.Seq2SeqState(h, c, keys, projected[0], lengths), ValueError, "projected should be of shape"),
        (
            lambda: fs.Seq2SeqState(h, c, keys, projected[:, :2], lengths),
            ValueError,
            "projected should have the 6 steps",
        ),
        (lambda: fs.Seq2SeqState(h, c, keys.astype(int), projected, lengths), TypeError, "keys should hold real"),
        (lambda: fs.Seq2SeqState(h, c, keys, projected, lengths + 6), ValueError, "lengths should be in 0..6"),
        (lambda: fs.Seq2SeqState(h, c, keys.astype("f4"), projected, lengths), TypeError, "h and keys should have one"),
        (lambda: fs.Seq2SeqState.concatenate(state), TypeError, "states should hold only Seq2SeqState"),
        (lambda: fs.Seq2SeqState.concatenate([]), ValueError, "at least one state"),
        (lambda: fs.Seq2SeqState.concatenate(3), TypeError, "states should be an iterable"),
        (
            lambda: fs.Seq2SeqState.concatenate([state, model(engine, cell="lstm").initial_state(SOURCES)]),
            ValueError,
            "states should agree in all but the batch and the lengths",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()


# Bad input


@ENGINE
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"source_vocab_size": 0}, ValueError, "source_vocab_size should be at least 1"),
        ({"target_vocab_size": 1.5}, TypeError, "target_vocab_size should be an integer"),
        ({"embedding_dim": -1}, ValueError, "embedding_dim should"),
        ({"hidden_size": True}, TypeError, "hidden_size should"),
        ({"num_layers": 0}, ValueError, "num_layers should"),
        ({"cell": "LSTM"}, ValueError, "cell should be one of 'rnn', 'lstm', 'gru', not"),
        ({"bidirectional": 1}, TypeError, "bidirectional should be True or False"),
        ({"attention": "dot"}, ValueError, "attention should be one of 'additive', 'multiplicative', not"),
        ({"attention": True}, TypeError, "attention should be one of"),
        ({"dropout": 1.0}, ValueError, r"dropout should be in \[0, 1\)"),
        ({"dtype": "int64"}, TypeError, "dtype should be a floating dtype"),
        ({"seed": -1}, ValueError, "seed should be at least 0"),
    ],
)
def test_bad_settings(engine, change, error, message):
    usual = {"source_vocab_size": 3, "target_vocab_size": 4, "embedding_dim": 2, "hidden_size": 3}
    with pytest.raises(error, match=message):
        engine.models.Seq2Seq(**{**usual, **change})


@ENGINE
@ATTENTION
def test_bad_input(attention, engine):
    made = model(engine, attention=attention)
    state = made.initial_state(SOURCES)
    logits, tape = made.forward(SOURCES, TARGETS)
    batch = Batch(padded(SOURCES, 0), padded(TARGETS, 0), np.array(COUNTS), target_lengths=np.array(TARGET_COUNTS))
    for call, error, message in [
        (lambda: made([[1], []], [[1], [1]]), ValueError, r"source\[1\] should have at least one symbol, not none"),
        (lambda: made([], [1]), ValueError, "source should have at least one symbol"),
        (lambda: made([[S]], [[1]]), ValueError, rf"source\[0\]\[0\] is {S}"),
        (lambda: made([[1]], [[V]]), ValueError, rf"target\[0\]\[0\] is {V}"),
        (lambda: made([[1.5]], [[1]]), TypeError, "source"),
        (lambda: made([[1], [2]], [[1]]), ValueError, "target should be a batch of 2, as source is, not a batch of 1"),
        (lambda: made([1], [[1]]), ValueError, "target should be no batch, as source is"),
        (lambda: made([[1, 2]], [[1]], source_lengths=[3]), ValueError, "source_lengths should be in 0..2"),
        (lambda: made([[1, 2]], [[1]], lengths=[2]), ValueError, "lengths should be in 0..1"),
        (lambda: made(SOURCES, TARGETS, return_weights=1), TypeError, "return_weights should be True or False"),
        (lambda: made.initial_state([[1], []]), ValueError, r"source\[1\] should have at least one symbol"),
        (lambda: made.initial_state([[S]]), ValueError, rf"source\[0\]\[0\] is {S}"),
        (lambda: made.initial_state([[1, 2]], lengths=[0]), ValueError, r"source\[0\] should have at least one"),
        (lambda: made.step([V + 1] * 4, state), ValueError, rf"but y_t\[0\] is {V + 1}"),
        (lambda: made.step([-1] * 4, state), ValueError, r"y_t\[0\] is -1"),
        (lambda: made.step([[1]] * 4, state), ValueError, r"y_t should be of shape \(B,\), not \(4, 1\)"),
        (lambda: made.step([1.0] * 4, state), TypeError, "y_t should hold integers"),
        (lambda: made.backward(logits[:, :2], tape), ValueError, "dlogits should be of shape"),
        (lambda: made.backward(logits, None), TypeError, "tape should be what forward returned"),
        (lambda: model(engine).backward(logits, tape), ValueError, "tape should be of a forward of this"),
        (lambda: made.backward(logits, tape, grads={}), ValueError, "grads does not fit"),
        (lambda: made.forward(SOURCES, TARGETS, seed=-1), ValueError, "seed should be at least 0"),
        (lambda: made.training_forward(batch._replace(targets=None)), ValueError, "targets should be given"),
        (lambda: made.training_forward(batch, label_smoothing=2), ValueError, "label_smoothing should be"),
        (lambda: made.load_state_dict({}), ValueError, "are missing"),
    ]:
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(AttributeError, match="cell is fixed once a Seq2Seq is made"):
        made.cell = "rnn"
    assert made.begin == made.end == V


def test_names_and_sizes_of_parameters():
    made = fs.models.Seq2Seq(3, 4, 5, 6, 2, cell="lstm", attention="additive")
    shapes = {name: a.shape for name, a in made.parameters.items() if not name.startswith(("encoder", "decoder"))}
    assert shapes == {
        "source_embedding.weight": (3, 5),
        "target_embedding.weight": (5, 5),
        **{f"bridge_{array}_l{layer}.weight": (6, 12) for array in "hc" for layer in range(2)},
        **{f"bridge_{array}_l{layer}.bias": (6,) for array in "hc" for layer in range(2)},
        "attention.query.weight": (6, 6),
        "attention.key.weight": (6, 12),
        "attention.key.bias": (6,),
        "attention.score.weight": (1, 6),
        "output.weight": (5, 18),
        "output.bias": (5,),
    }
    assert made.parameters["decoder.weight_ih_l0"].shape == (24, 17)
    made = fs.models.Seq2Seq(3, 4, 5, 6, bidirectional=False, attention="multiplicative")
    shapes = {name: a.shape for name, a in made.parameters.items() if not name.startswith(("encoder", "decoder"))}
    assert shapes == {
        "source_embedding.weight": (3, 5),
        "target_embedding.weight": (5, 5),
        "attention.weight": (6, 6),
        "combine.weight": (6, 12),
        "output.weight": (5, 6),
        "output.bias": (5,),
    }
    one, other = (fs.models.Seq2Seq(3, 4, 5, 6, attention="additive", seed=s) for s in (1, 2))
    same = fs.models.Seq2Seq(3, 4, 5, 6, attention="additive", seed=1)
    for name, array in one.parameters.items():
        assert_same_bits(same.parameters[name], array)
        assert (other.parameters[name] != array).any()


def test_memory_that_cannot_be_had():
    code = """
    import numpy as np, resource, fastseq as fs
    model = fs.models.Seq2Seq(4, 4, 8, 16, attention="additive", seed=0)
    small = model([[1, 2]], [[1]])
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, -1))
    big = np.zeros((400, 3000), int)
    try:
        model.forward(big, big)
    except MemoryError:
        print("MemoryError")
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    assert (model([[1, 2]], [[1]]) == small).all()
    """
    assert run_python(code).stdout.strip() == "MemoryError"
