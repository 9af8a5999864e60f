"""Every public callable that takes lengths: a padded batch beside each of its rows, cut and alone.

Finite differences do not see lengths that are lost in loss and gradient alike, and a comparison with the reference does
not see them lost above the operations. This does. `CONTRACTS` says of each callable how it is called; one that is not
there turns `test_nothing_is_left_out` red, and one whose call would not notice that its lengths are gone turns
`test_lengths_that_are_lost_are_seen` red.

What the padding holds is NaN, or an id that there is not, and then again what might as well stand in a row: nothing is
zeroed beforehand.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
from common import Array, assert_close, assert_same_bits, bits, threads

import fastseq as fs

F = fs.training
COUNTS = (3, 5, 0, 1, 4)  # steps of each row
SOME = (3, 5, 2, 1, 4)  # where no row may be empty
OTHERS = (4, 1, 2, 5, 3)  # of a second argument
LONG = (7, 6, 8, 5, 7)  # of series that have to be longer
ROWS = len(COUNTS)
SYMBOLS, SOURCES = 7, 6  # how many there are
FAR = 1 << 40  # an id that there is not


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Everything here is small, and threads are the matter of other tests."""
    with threads(1):
        yield


# What a call gives.


class Steps(NamedTuple):
    """An array with a row for each of the batch and steps on an axis, or on some one after another.

    `of` names the arguments whose steps they are. Past a row's length it holds `past`, to the bit; None: anything.
    """

    array: Array
    of: str | tuple[str, ...]
    axis: int = 1
    more: int | tuple[int, ...] = 0  # steps beside those of the argument
    past: float | None = 0.0
    exact: bool = True  # whether a row's bits are promised

    @property
    def names(self) -> tuple[str, ...]:
        return (self.of,) if isinstance(self.of, str) else self.of

    @property
    def extra(self) -> tuple[int, ...]:
        return self.more if isinstance(self.more, tuple) else (self.more,) * len(self.names)


class Each(NamedTuple):
    """Something for each row, `values[row]`: an array, a list, a state."""

    values: Any


class Summed(NamedTuple):
    """Arrays to which every row adds something."""

    arrays: Mapping[str, Array]


class Mean(NamedTuple):
    """A mean over `count` things of all rows."""

    value: float
    count: float


@dataclass
class Case:
    """A call, and what it is called with."""

    rows: dict[str, list[Array]]  # by argument: the steps of each row, which the batch has padded
    lengths: dict[str, str]  # by parameter: whose lengths it takes
    run: Callable[..., dict[str, Any]]  # run(**arguments, **lengths)
    whole: dict[str, Any] = field(default_factory=dict)  # arguments that have something for each row, `value[i : i+1]`
    far: dict[str, Any] = field(
        default_factory=dict
    )  # what stands in the padding of an argument; else what `_far` says
    # Where a row alone is not called: all rows as lists, which take another way through the code. The same results.
    listed: Callable[..., dict[str, Any]] | None = None


def _far(array: Array) -> Any:
    return {"f": math.nan, "i": FAR, "b": True}[array.dtype.kind]


def padded(rows: list[Array], filling: Any, extra: int, seed: int) -> Array:
    """Rows of one array; in the padding `filling`, or what might stand in a row, where that is None."""
    rng = np.random.default_rng([seed, 9])
    longest = max(len(row) for row in rows) + extra
    shape = (len(rows), longest, *rows[0].shape[1:])
    if filling is None:
        whole = rng.choice(np.concatenate([row.reshape(-1) for row in rows]), shape)
    else:
        whole = np.full(shape, filling, rows[0].dtype)
    for into, row in zip(whole, rows, strict=True):
        into[: len(row)] = row
    return whole


def together(case: Case, far: bool, extra: int, lost: str | None = None) -> dict[str, Any]:
    """The results of the padded batch, without the lengths that are `lost`."""
    arguments = {
        name: padded(rows, case.far.get(name, _far(rows[0])) if far else None, extra, seed)
        for seed, (name, rows) in enumerate(case.rows.items())
    }
    lengths = {
        parameter: np.array([len(row) for row in case.rows[name]])
        for parameter, name in case.lengths.items()
        if parameter != lost
    }
    return case.run(**arguments, **case.whole, **lengths)


def alone(case: Case, row: int) -> dict[str, Any]:
    """The results of one row, without padding and without lengths."""
    arguments = {name: rows[row][None] for name, rows in case.rows.items()}
    return case.run(**arguments, **{name: value[row : row + 1] for name, value in case.whole.items()})


def same(actual: Any, expected: Any, exact: bool, what: str) -> None:
    """Equal, to the bit where that is promised."""
    if isinstance(expected, Mapping):
        assert list(actual) == list(expected)
        for name, value in expected.items():
            same(actual[name], value, exact, f"{what}.{name}")
        return
    if isinstance(expected, list | tuple):
        assert len(actual) == len(expected), f"{what}: {len(actual)} in place of {len(expected)}"
        for i, value in enumerate(expected):
            same(actual[i], value, exact, f"{what}[{i}]")
        return
    if hasattr(expected, "batch_size"):
        assert actual == expected or not exact, f"{what}: another state"
        if not isinstance(expected, fs.AttentionState):
            same(tuple(actual), tuple(expected), exact, what)
        return
    a, e = np.asarray(actual), np.asarray(expected)
    if exact or e.dtype.kind != "f":
        assert_same_bits(a, e, what)
    else:
        assert_close(a, e, 1e-10 if e.dtype == np.float64 else 2e-5, what)


def cut(case: Case, steps: Steps, row: int) -> Array:
    """One row of an array without its padding, which is looked at."""
    counts = [len(case.rows[name][row]) + more for name, more in zip(steps.names, steps.extra, strict=True)]
    own = steps.array[row]
    inside = tuple([slice(None)] * (steps.axis - 1) + [slice(0, count) for count in counts])
    if steps.past is not None:
        past = np.ones(own.shape, bool)
        past[inside] = False
        wanted = np.full(int(past.sum()), steps.past, own.dtype)
        np.testing.assert_array_equal(bits(own[past]), bits(wanted), err_msg="the padding")
    return own[inside]


def compare(case: Case, whole: dict[str, Any], exact: bool) -> None:
    """The results of a padded batch beside those of its rows."""
    if case.listed is not None:
        expected = case.listed(**case.rows, **case.whole)
        assert list(whole) == list(expected)
        for name, value in expected.items():
            same(whole[name], value, exact, name)
        return
    parts = [alone(case, row) for row in range(ROWS)]
    for name, value in whole.items():
        own = [part[name] for part in parts]
        if isinstance(value, Steps):
            for row, part in enumerate(own):
                same(cut(case, value, row), part.array[0], exact and value.exact, f"{name} of row {row}")
        elif isinstance(value, Each):
            for row, part in enumerate(own):
                same(of_row(value.values, row), of_row(part.values, 0), exact, f"{name} of row {row}")
        elif isinstance(value, Summed):
            for key, array in value.arrays.items():
                total = np.sum([part.arrays[key] for part in own], axis=0)
                same(array, total.astype(array.dtype), False, f"{name} {key}")
        else:
            assert value.count == sum(part.count for part in own), f"{name}: how many counted"
            mean = sum(part.value * part.count for part in own if part.count) / value.count
            assert value.value == pytest.approx(mean, rel=1e-5), name


def of_row(values: Any, row: int) -> Any:
    """What is one row's."""
    if isinstance(values, Mapping):
        return {name: value[row] for name, value in values.items()}
    return values[row : row + 1] if hasattr(values, "batch_size") else values[row]


# The callables.


Maker = Callable[[Any, str], Case]
# By callable: variants by name.
CONTRACTS: dict[str, dict[str, Maker]] = {}


def contract(*names: str, **variants: Any) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """Registers what makes the case of a callable, from the module, the dtype and the variant's setting."""

    def registered(make: Callable[..., Case]) -> Callable[..., Case]:
        for name in names:
            own = CONTRACTS.setdefault(name, {})
            for variant, setting in (variants or {make.__name__.strip("_"): None}).items():
                given = () if setting is None else (setting,)
                own[variant] = lambda root, dtype, name=name, given=given: make(root, dtype, name, *given)
        return make

    return registered


def values(counts: tuple[int, ...], width: int, dtype: str, seed: int = 0) -> list[Array]:
    """The steps of each row, of real numbers."""
    rng = np.random.default_rng([seed, 1])
    return [rng.normal(size=(count, width)).astype(dtype) for count in counts]


def series(counts: tuple[int, ...], dtype: str, seed: int = 0) -> list[Array]:
    """The same without an axis of values."""
    return [row[:, 0] for row in values(counts, 1, dtype, seed)]


def ids(counts: tuple[int, ...], size: int, seed: int = 0) -> list[Array]:
    """The steps of each row, of symbols."""
    rng = np.random.default_rng([seed, 2])
    return [rng.integers(0, size, count) for count in counts]


def alive(layer: Any, seed: int = 0) -> Any:
    """A layer whose every parameter matters."""
    rng = np.random.default_rng([seed, 3])
    for name, array in layer.parameters.items():
        size = 0.6 if array.ndim == 1 else 1.2 / math.sqrt(array.shape[1])
        if "embedding" in name or name.startswith("word"):
            size = 1.0
        layer.parameters[name] = rng.normal(0, size, array.shape) + ("norm" in name and name.endswith("weight"))
    return layer


def no_grads(layer: Any) -> dict[str, Array]:
    return {name: np.zeros_like(array) for name, array in layer.parameters.items()}


def states(layer: Any, seed: int = 0) -> Any:
    """A state of all rows."""
    rng = np.random.default_rng([seed, 4])
    state = layer.initial_state(ROWS)
    return type(state)(*(rng.normal(size=array.shape).astype(array.dtype) for array in state))


def resolved(root: Any, name: str) -> Any:
    """The class or function of a name like models.RecurrentLM.fit, without its method."""
    parts = name.split(".")
    found = root
    for part in parts:
        found = getattr(found, part)
        if inspect.isclass(found):
            break
    return found


# Recurrent layers.

RECURRENT = {
    "plain": {},
    "both_ways": {"num_layers": 2, "bidirectional": True},
}


def recurrent(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Any:
    return alive(resolved(root, name)(3, 6, dtype=dtype, seed=0, **setting))


def resets() -> list[Array]:
    return [np.random.default_rng([row, 5]).random(count) < 0.3 for row, count in enumerate(COUNTS)]


@contract("RNN.__call__", "LSTM.__call__", "GRU.__call__", **RECURRENT)
def _called(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    layer = recurrent(root, dtype, name, setting)

    def run(x: Any, state: Any, resets: Any, lengths: Any = None) -> dict[str, Any]:
        y, end = layer(x, state, lengths=lengths)
        _, of_resets = layer(x, state, lengths=lengths, resets=resets)
        _, _, gates = layer(x, state, lengths=lengths, return_gates=True)
        steps = {f"gate {name}": Steps(gate, "x") for name, gate in gates.items()}
        return {"y": Steps(y, "x"), "state": Each(end), "with resets": Each(of_resets), **steps}

    x = values(COUNTS, 3, dtype)
    return Case({"x": x, "resets": resets()}, {"lengths": "x"}, run, {"state": states(layer)})


@contract("RNN.forward", "LSTM.forward", "GRU.forward", **RECURRENT)
def _trained(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    layer = recurrent(root, dtype, name, setting)

    def run(x: Any, dy: Any, resets: Any, state: Any, dstate: Any, lengths: Any = None) -> dict[str, Any]:
        results: dict[str, Any] = {}
        for way, more, k in (("", {}, None), (" truncated", {}, 2), (" reset", {"resets": resets}, None)):
            y, end, tape = layer.forward(x, state, lengths=lengths, **more)
            grads = no_grads(layer)
            dx, start = layer.backward(dy, tape, dstate=dstate, truncate=k, grads=grads)
            found = {"y": Steps(y, "x"), "state": Each(end), "dx": Steps(dx, "x"), "dstate": Each(start)}
            results |= {f"{part}{way}": value for part, value in found.items()} | {f"grads{way}": Summed(grads)}
        return results

    width = 6 * (2 if setting.get("bidirectional") else 1)
    rows = {"x": values(COUNTS, 3, dtype), "dy": values(COUNTS, width, dtype, 1), "resets": resets()}
    return Case(rows, {"lengths": "x"}, run, {"state": states(layer), "dstate": states(layer, 1)})


# Attention.


def heads(rows: list[Array], count: int) -> list[Array]:
    """(T, heads D) as (T, heads, D), which `turned` makes (B, heads, T, D) of in a batch."""
    return [row.reshape(len(row), count, row.shape[1] // count) for row in rows]


def turned(array: Array) -> Array:
    return np.ascontiguousarray(array.swapaxes(1, 2))


# Without `causal` and `window`, which count from the end of the array of keys, padding and all.


@contract("attention")
def _attention(root: Any, dtype: str, name: str) -> Case:
    def run(k: Any, v: Any, q: Any, lengths: Any = None) -> dict[str, Any]:
        arrays = turned(q), turned(k), turned(v)
        out, weights = root.attention(*arrays, lengths=lengths, return_weights=True)
        plain = root.attention(*arrays, lengths=lengths)
        return {"out": Each(out), "plain": Each(plain), "weights": Steps(weights, "k", axis=3)}

    rows = {"k": heads(values(COUNTS, 4, dtype), 2), "v": heads(values(COUNTS, 6, dtype, 1), 2)}
    q = np.stack(heads(values((3,) * ROWS, 8, dtype, 2), 4))
    return Case(rows, {"lengths": "k"}, run, {"q": q})


@contract("attention_forward")
def _attention_trained(root: Any, dtype: str, name: str) -> Case:
    def run(k: Any, v: Any, q: Any, dout: Any, lengths: Any = None) -> dict[str, Any]:
        out, tape = root.attention_forward(turned(q), turned(k), turned(v), lengths=lengths)
        dq, dk, dv = root.attention_backward(turned(dout), tape)
        return {"out": Each(out), "dq": Each(dq), "dk": Steps(dk, "k", axis=2), "dv": Steps(dv, "k", axis=2)}

    rows = {"k": heads(values(COUNTS, 4, dtype), 2), "v": heads(values(COUNTS, 6, dtype, 1), 2)}
    q, dout = (np.stack(heads(values((3,) * ROWS, width, dtype, width), 4)) for width in (8, 12))
    return Case(rows, {"lengths": "k"}, run, {"q": q, "dout": dout})


SELF = {"plain": {}, "grouped_rotary": {"num_kv_heads": 1, "rotary": 100.0}, "windowed": {"window": 2}}


def called_self(layer: Any, causal: bool, lengths: Any, x: Any) -> dict[str, Any]:
    y, weights = layer(x, causal=causal, lengths=lengths, return_weights=True)
    plain = layer(x, causal=causal, lengths=lengths)
    of_layers = weights if isinstance(weights, list) else [weights]
    maps = {f"weights {i}": Steps(own, ("x", "x"), axis=2) for i, own in enumerate(of_layers)}
    return {"y": Steps(y, "x"), "plain": Steps(plain, "x"), **maps}


def trained(layer: Any, dy: Any, *arguments: Any, **settings: Any) -> tuple[Any, Any, dict[str, Array]]:
    """Outputs, the gradients of the arguments, and those of the parameters."""
    y, tape = layer.forward(*arguments, **settings)
    grads = no_grads(layer)
    return y, layer.backward(dy, tape, grads=grads), grads


@contract("MultiheadAttention.__call__", **SELF)
def _self_attention(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    layer = alive(root.MultiheadAttention(8, 2, dtype=dtype, seed=0, **setting))
    return Case(
        {"x": values(COUNTS, 8, dtype)},
        {"lengths": "x"},
        lambda x, lengths=None: called_self(layer, bool(setting.get("window")), lengths, x),
    )


@contract("MultiheadAttention.__call__", cross={})
def _cross_attention(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    layer = alive(root.MultiheadAttention(8, 2, kdim=6, vdim=4, dtype=dtype, seed=0))

    def run(key: Any, value: Any, query: Any, lengths: Any = None) -> dict[str, Any]:
        y, weights = layer(query, key, value, lengths=lengths, return_weights=True)
        plain = layer(query, key, value, lengths=lengths)
        return {"y": Each(y), "plain": Each(plain), "weights": Steps(weights, "key", axis=3)}

    rows = {"key": values(COUNTS, 6, dtype), "value": values(COUNTS, 4, dtype, 1)}
    return Case(rows, {"lengths": "key"}, run, {"query": np.stack(values((3,) * ROWS, 8, dtype, 2))})


@contract("MultiheadAttention.forward", **SELF)
def _self_attention_trained(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    layer = alive(root.MultiheadAttention(8, 2, dtype=dtype, seed=0, **setting))

    def run(x: Any, dy: Any, lengths: Any = None) -> dict[str, Any]:
        y, dx, grads = trained(layer, dy, x, causal=bool(setting.get("window")), lengths=lengths)
        return {"y": Steps(y, "x"), "dx": Steps(dx, "x"), "grads": Summed(grads)}

    return Case({"x": values(COUNTS, 8, dtype), "dy": values(COUNTS, 8, dtype, 1)}, {"lengths": "x"}, run)


@contract("MultiheadAttention.forward", cross={})
def _cross_attention_trained(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    layer = alive(root.MultiheadAttention(8, 2, kdim=6, vdim=4, dtype=dtype, seed=0))

    def run(key: Any, value: Any, query: Any, dy: Any, lengths: Any = None) -> dict[str, Any]:
        y, (dquery, dkey, dvalue), grads = trained(layer, dy, query, key, value, lengths=lengths)
        of_keys = {"dkey": Steps(dkey, "key"), "dvalue": Steps(dvalue, "key")}
        return {"y": Each(y), "dquery": Each(dquery), **of_keys, "grads": Summed(grads)}

    rows = {"key": values(COUNTS, 6, dtype), "value": values(COUNTS, 4, dtype, 1)}
    query, dy = (np.stack(values((3,) * ROWS, 8, dtype, seed)) for seed in (2, 3))
    return Case(rows, {"lengths": "key"}, run, {"query": query, "dy": dy})


QUERIES = {"one_query": 0, "queries": 3}


@contract("AdditiveAttention.__call__", "MultiplicativeAttention.__call__", **QUERIES)
def _additive_attention(root: Any, dtype: str, name: str, queries: int) -> Case:
    kind, sizes = resolved(root, name), (5, 4, 6) if name.startswith("Add") else (5, 4)
    layer = alive(kind(*sizes, dtype=dtype, seed=0))

    def run(keys: Any, query: Any, lengths: Any = None) -> dict[str, Any]:
        context, weights = layer(query, keys, lengths=lengths, return_weights=True)
        plain = layer(query, keys, lengths=lengths)
        return {
            "context": Each(context),
            "plain": Each(plain),
            "weights": Steps(weights, "keys", axis=2 if queries else 1),
        }

    query = np.stack(values((max(1, queries),) * ROWS, 5, dtype, 1))
    query = query if queries else query[:, 0]
    return Case({"keys": values(COUNTS, 4, dtype)}, {"lengths": "keys"}, run, {"query": query})


@contract("AdditiveAttention.forward", "MultiplicativeAttention.forward", **QUERIES)
def _alignment_trained(root: Any, dtype: str, name: str, queries: int) -> Case:
    kind, sizes = resolved(root, name), (5, 4, 6) if name.startswith("Add") else (5, 4)
    layer = alive(kind(*sizes, dtype=dtype, seed=0))

    def run(keys: Any, query: Any, dcontext: Any, lengths: Any = None) -> dict[str, Any]:
        context, (dquery, dkeys), grads = trained(layer, dcontext, query, keys, lengths=lengths)
        found = {"context": Each(context), "dquery": Each(dquery)}
        return {**found, "dkeys": Steps(dkeys, "keys"), "grads": Summed(grads)}

    query, dcontext = (np.stack(values((max(1, queries),) * ROWS, width, dtype, 1)) for width in (5, 4))
    given = {"query": query, "dcontext": dcontext}
    given = given if queries else {name: array[:, 0] for name, array in given.items()}
    return Case({"keys": values(COUNTS, 4, dtype)}, {"lengths": "keys"}, run, given)


# Transformers.

ENCODERS = ("TransformerEncoder", "TransformerEncoderLayer")
DECODERS = ("TransformerDecoder", "TransformerDecoderLayer")
ORDERS = {"plain": {}, "first_causal": {"norm_first": True, "causal": True}}


def tower(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Any:
    kind = name.partition(".")[0]
    sizes = (8, 2, 12) if kind.endswith("Layer") else (2, 8, 2, 12)
    more = {"norm_first": setting.get("norm_first", False)}
    if not kind.endswith("Layer"):
        more["final_norm"] = True
    return alive(getattr(root, kind)(*sizes, dropout=0.0, dtype=dtype, seed=0, **more))


@contract(*(f"{name}.__call__" for name in ENCODERS), **ORDERS)
def _encoder(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    layer, causal = tower(root, dtype, name, setting), setting.get("causal", False)
    return Case(
        {"x": values(COUNTS, 8, dtype)},
        {"lengths": "x"},
        lambda x, lengths=None: called_self(layer, causal, lengths, x),
    )


@contract(*(f"{name}.forward" for name in ENCODERS), **ORDERS)
def _encoder_trained(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    layer, causal = tower(root, dtype, name, setting), setting.get("causal", False)

    def run(x: Any, dy: Any, lengths: Any = None) -> dict[str, Any]:
        y, dx, grads = trained(layer, dy, x, causal=causal, lengths=lengths)
        return {"y": Steps(y, "x"), "dx": Steps(dx, "x"), "grads": Summed(grads)}

    return Case({"x": values(COUNTS, 8, dtype), "dy": values(COUNTS, 8, dtype, 1)}, {"lengths": "x"}, run)


BOTH = {"lengths": "x", "memory_lengths": "memory"}
FREE = {"plain": {}, "first_free": {"norm_first": True, "free": True}}


@contract(*(f"{name}.__call__" for name in DECODERS), **FREE)
def _decoder(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    layer, causal = tower(root, dtype, name, setting), not setting.get("free", False)

    def run(x: Any, memory: Any, **lengths: Any) -> dict[str, Any]:
        y, weights = layer(x, memory, causal=causal, return_weights=True, **lengths)
        plain = layer(x, memory, causal=causal, **lengths)
        found = {"y": Steps(y, "x"), "plain": Steps(plain, "x")}
        for i, (own, other) in enumerate(weights if isinstance(weights, list) else [weights]):
            found |= {f"{i} own": Steps(own, ("x", "x"), 2), f"{i} other": Steps(other, ("x", "memory"), 2)}
        return found

    rows = {"x": values(COUNTS, 8, dtype), "memory": values(OTHERS, 8, dtype, 1)}
    return Case(rows, BOTH, run)


@contract(*(f"{name}.forward" for name in DECODERS), **FREE)
def _decoder_trained(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    layer, causal = tower(root, dtype, name, setting), not setting.get("free", False)

    def run(x: Any, memory: Any, dy: Any, **lengths: Any) -> dict[str, Any]:
        y, (dx, dmemory), grads = trained(layer, dy, x, memory, causal=causal, **lengths)
        steps = {"y": Steps(y, "x"), "dx": Steps(dx, "x"), "dmemory": Steps(dmemory, "memory")}
        return {**steps, "grads": Summed(grads)}

    rows = {"x": values(COUNTS, 8, dtype), "memory": values(OTHERS, 8, dtype, 1), "dy": values(COUNTS, 8, dtype, 2)}
    return Case(rows, BOTH, run)


@contract(*(f"{name}.initial_state" for name in DECODERS))
def _memory(root: Any, dtype: str, name: str) -> Case:
    layer = tower(root, dtype, name, {})

    def run(memory: Any, x: Any, memory_lengths: Any = None) -> dict[str, Any]:
        state = layer.initial_state(memory, memory_lengths=memory_lengths)
        begun, outputs = state, []
        for t in range(x.shape[1]):
            y, state = layer.step(x[:, t], state)
            outputs.append(y)
        return {"begun": Each(begun), "y": Each(np.stack(outputs, axis=1)), "state": Each(state)}

    return Case(
        {"memory": values(COUNTS, 8, dtype)},
        {"memory_lengths": "memory"},
        run,
        {"x": np.stack(values((3,) * ROWS, 8, dtype, 1))},
    )


def pair(root: Any, dtype: str) -> Any:
    return alive(root.Transformer(8, 2, 2, 1, 12, dropout=0.0, dtype=dtype, seed=0))


OF_PAIR = {"src_lengths": "src", "tgt_lengths": "tgt"}


@contract("Transformer.__call__")
def _pair(root: Any, dtype: str, name: str) -> Case:
    layer = pair(root, dtype)

    def run(src: Any, tgt: Any, **lengths: Any) -> dict[str, Any]:
        y, (encoder, decoder) = layer(src, tgt, return_weights=True, **lengths)
        found = {"y": Steps(y, "tgt"), "plain": Steps(layer(src, tgt, **lengths), "tgt")}
        found |= {f"encoder {i}": Steps(own, ("src", "src"), 2) for i, own in enumerate(encoder)}
        for i, (own, other) in enumerate(decoder):
            found |= {f"{i} own": Steps(own, ("tgt", "tgt"), 2), f"{i} other": Steps(other, ("tgt", "src"), 2)}
        return found

    return Case({"src": values(OTHERS, 8, dtype), "tgt": values(COUNTS, 8, dtype, 1)}, OF_PAIR, run)


@contract("Transformer.forward")
def _pair_trained(root: Any, dtype: str, name: str) -> Case:
    layer = pair(root, dtype)

    def run(src: Any, tgt: Any, dy: Any, **lengths: Any) -> dict[str, Any]:
        y, (dsrc, dtgt), grads = trained(layer, dy, src, tgt, **lengths)
        return {"y": Steps(y, "tgt"), "dsrc": Steps(dsrc, "src"), "dtgt": Steps(dtgt, "tgt"), "grads": Summed(grads)}

    rows = {"src": values(OTHERS, 8, dtype), "tgt": values(COUNTS, 8, dtype, 1), "dy": values(COUNTS, 8, dtype, 2)}
    return Case(rows, OF_PAIR, run)


@contract("Transformer.initial_state")
def _pair_begun(root: Any, dtype: str, name: str) -> Case:
    layer = pair(root, dtype)

    def run(src: Any, x: Any, src_lengths: Any = None) -> dict[str, Any]:
        y, state = layer.step(x, layer.initial_state(src, src_lengths=src_lengths))
        return {"y": Each(y), "state": Each(state)}

    x = np.stack(values((1,) * ROWS, 8, dtype, 1))[:, 0]
    return Case({"src": values(COUNTS, 8, dtype)}, {"src_lengths": "src"}, run, {"x": x})


# Layers one after another. Embeddings are random and an id in the padding has a row of its own, so that what stands
# there matters to every layer that looks at it.


def of_symbols(root: Any, dtype: str) -> Any:
    return root.Embedding(SYMBOLS, 8, dtype=dtype, seed=1)


CHAINS: dict[str, Callable[[Any, str], list[Any]]] = {
    "recurrent": lambda root, dtype: [
        of_symbols(root, dtype),
        root.LSTM(8, 4, 2, bidirectional=True, dtype=dtype, seed=2),
        root.Linear(8, 8, dtype=dtype, seed=3),
    ],
    "ending_recurrent": lambda root, dtype: [
        of_symbols(root, dtype),
        root.Linear(8, 5, dtype=dtype, seed=2),
        root.ReLU(dtype=dtype),
        root.GRU(5, 4, bidirectional=True, dtype=dtype, seed=3),
    ],
    "nested": lambda root, dtype: [
        root.Sequential(of_symbols(root, dtype), root.GRU(8, 4, bidirectional=True, dtype=dtype, seed=2)),
        root.Sequential(root.LayerNorm(8, dtype=dtype), root.Sequential(root.RNN(8, 8, dtype=dtype, seed=3))),
        root.Linear(8, 8, dtype=dtype, seed=4),
    ],
    "nested_last": lambda root, dtype: [
        of_symbols(root, dtype),
        root.LayerNorm(8, dtype=dtype),
        root.Sequential(
            root.Sequential(root.GRU(8, 4, bidirectional=True, dtype=dtype, seed=3)),
            root.Linear(8, 8, dtype=dtype, seed=4),
        ),
    ],
    "encoder": lambda root, dtype: [
        of_symbols(root, dtype),
        root.SinusoidalPositions(8, dtype=dtype),
        root.TransformerEncoder(2, 8, 2, 12, dropout=0.0, dtype=dtype, seed=2),
        root.Linear(8, 8, dtype=dtype, seed=3),
    ],
    "encoder_layer": lambda root, dtype: [
        of_symbols(root, dtype),
        root.TransformerEncoderLayer(8, 2, 12, dropout=0.0, dtype=dtype, seed=2),
    ],
    "self_attention": lambda root, dtype: [
        of_symbols(root, dtype),
        root.MultiheadAttention(8, 2, dtype=dtype, seed=2),
        root.LayerNorm(8, dtype=dtype),
    ],
    "pointwise": lambda root, dtype: [of_symbols(root, dtype), root.Linear(8, 8, dtype=dtype, seed=2)],
    "windows": lambda root, dtype: [
        of_symbols(root, dtype),
        root.Conv1d(8, 8, 3, padding=1, dtype=dtype, seed=2),
        root.MaxPool1d(3, 1, padding="same", dtype=dtype),
        root.Conv1d(8, 8, 2, padding="same", dilation=3, dtype=dtype, seed=3),
    ],
}


def encoder_of_tokens(root: Any, dtype: str) -> Any:
    sizes = {"dropout": 0.0, "max_length": 12, "dtype": dtype, "seed": 2}
    return root.models.TransformerEncoderModel(SYMBOLS, 8, 2, 1, pooling=None, **sizes)


CHAINS["model"] = lambda root, dtype: [encoder_of_tokens(root, dtype), root.Linear(8, 8, dtype=dtype, seed=3)]
# These give one output a row, and nothing after them has steps.
POOLING: dict[str, Callable[[Any, str], list[Any]]] = {
    **{
        name: lambda root, dtype, name=name: [
            of_symbols(root, dtype),
            root.GRU(8, 4, bidirectional=True, dtype=dtype, seed=2),
            getattr(root, name)(dtype=dtype),
            root.Tanh(dtype=dtype),
            root.Linear(8, 8, dtype=dtype, seed=3),
        ]
        for name in ("LastStep", "MeanOverTime", "MaxOverTime")
    },
    "nested_pooling": lambda root, dtype: [
        root.Sequential(of_symbols(root, dtype), root.LayerNorm(8, dtype=dtype), root.MaxOverTime(dtype=dtype)),
        root.Sequential(root.Linear(8, 8, dtype=dtype, seed=3)),
    ],
    "pooling_model": lambda root, dtype: [
        root.models.TransformerEncoderModel(
            SYMBOLS, 8, 2, 1, pooling="mean", dropout=0.0, max_length=12, dtype=dtype, seed=2
        ),
        root.Linear(8, 8, dtype=dtype, seed=3),
    ],
}


def chain(root: Any, dtype: str, variant: str) -> Any:
    return alive(root.Sequential(*(CHAINS | POOLING)[variant](root, dtype)))


NAMES = {name: name for name in CHAINS | POOLING}


def given_by(variant: str, y: Array) -> Any:
    return Each(y) if variant in POOLING else Steps(y, "x")


def first_steps(state: Any) -> dict[str, Each]:
    """What each layer's state is, where one is carried."""
    return {f"state {i}": Each(own) for i, own in enumerate(state or ()) if own is not None}


@contract("Sequential.__call__", **NAMES)
def _chain(root: Any, dtype: str, name: str, variant: str) -> Case:
    layer = chain(root, dtype, variant)

    def run(x: Any, lengths: Any = None) -> dict[str, Any]:
        return {"y": given_by(variant, layer(x, lengths=lengths))}

    return Case({"x": ids(COUNTS, SYMBOLS)}, {"lengths": "x"}, run)


@contract("Sequential.run", **{name: name for name in CHAINS if "nested" not in name})
def _chain_run(root: Any, dtype: str, name: str, variant: str) -> Case:
    layer = chain(root, dtype, variant)

    def run(x: Any, resets: Any, lengths: Any = None) -> dict[str, Any]:
        y, state = layer.run(x, lengths=lengths, resets=resets if layer.carries_state else None)
        on, state = layer.run(x, state, lengths=lengths)
        return {"y": given_by(variant, y), "on": given_by(variant, on), **first_steps(state)}

    return Case({"x": ids(COUNTS, SYMBOLS), "resets": resets()}, {"lengths": "x"}, run)


def chain_trained(root: Any, dtype: str, variant: str, forward: Callable[..., Any]) -> Case:
    layer = chain(root, dtype, variant)

    def run(x: Any, dy: Any, lengths: Any = None) -> dict[str, Any]:
        y, more, tape = forward(layer, x, lengths)
        grads = no_grads(layer)
        assert layer.backward(dy, tape, grads=grads) is None
        return {"y": given_by(variant, y), **more, "grads": Summed(grads)}

    if variant in POOLING:
        whole = {"dy": np.stack(values((1,) * ROWS, 8, dtype))[:, 0]}
        return Case({"x": ids(COUNTS, SYMBOLS)}, {"lengths": "x"}, run, whole)
    return Case({"x": ids(COUNTS, SYMBOLS), "dy": values(COUNTS, 8, dtype)}, {"lengths": "x"}, run)


@contract("Sequential.forward", **NAMES)
def _chain_trained(root: Any, dtype: str, name: str, variant: str) -> Case:
    def forward(layer: Any, x: Any, lengths: Any) -> Any:
        y, tape = layer.forward(x, lengths=lengths)
        return y, {}, tape

    return chain_trained(root, dtype, variant, forward)


@contract("Sequential.forward_carrying", **{name: name for name in ("recurrent", "nested", "LastStep", "encoder")})
def _chain_carrying(root: Any, dtype: str, name: str, variant: str) -> Case:
    def forward(layer: Any, x: Any, lengths: Any) -> Any:
        _, state = layer.run(x, lengths=lengths)
        y, state, tape = layer.forward_carrying(x, state, lengths=lengths)
        return y, first_steps(state) if variant != "nested" else {}, tape

    return chain_trained(root, dtype, variant, forward)


@contract("Sequential.forward", of_values={})
def _chain_of_values(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    layers = [
        root.Linear(3, 8, dtype=dtype, seed=1),
        root.Sequential(root.LSTM(8, 4, bidirectional=True, dtype=dtype, seed=2)),
        root.MultiheadAttention(8, 2, dtype=dtype, seed=3),
        root.Linear(8, 2, dtype=dtype, seed=4),
    ]
    layer = alive(root.Sequential(*layers))

    def run(x: Any, dy: Any, lengths: Any = None) -> dict[str, Any]:
        y, dx, grads = trained(layer, dy, x, lengths=lengths)
        called = layer(x, lengths=lengths)
        steps = {"y": Steps(y, "x"), "called": Steps(called, "x"), "dx": Steps(dx, "x")}
        return {**steps, "grads": Summed(grads)}

    return Case({"x": values(COUNTS, 3, dtype), "dy": values(COUNTS, 2, dtype, 1)}, {"lengths": "x"}, run)


# Layers that read each other's outputs: with an axis of time, without, and both joined.


def graph(root: Any, dtype: str, pooled: bool) -> Any:
    of = {"dtype": dtype}
    nodes = {
        "embedded": (of_symbols(root, dtype), "ids"),
        "joined": (root.Concatenate(**of), "embedded", "x", "speaker"),
        "hidden": (root.GRU(13, 6, seed=2, **of), "joined"),
        "gate": (root.Sigmoid(**of), "skip"),
        "skip": (root.Linear(13, 6, seed=3, **of), "joined"),
        "gated": (root.Multiply(**of), "hidden", "gate"),
        "inner": (
            root.Graph("a", {"b": (root.MultiheadAttention(6, 2, seed=4, **of), "a")}, "b"),
            "gated",
        ),
        "mean": (root.MeanOverTime(**of), "inner"),
        "steps": (root.Add(**of), "mean", "gated", "inner"),
        "row": (root.Linear(6, 4, seed=5, **of), "mean"),
    }
    outputs = {"end": "row"} if pooled else {"steps": "steps", "row": "row"}
    if pooled:
        del nodes["steps"]
    return alive(root.Graph(("ids", "x", "speaker"), nodes, outputs, without_time="speaker"))


def graph_case(root: Any, dtype: str, pooled: bool, run: Callable[..., Any]) -> Case:
    layer = graph(root, dtype, pooled)

    def run_all(ids: Any, x: Any, speaker: Any, lengths: Any = None, **more: Any) -> dict[str, Any]:
        return dict(run(layer, {"ids": ids, "x": x, "speaker": speaker}, lengths, **more))

    whole = {"speaker": np.stack(values((1,) * ROWS, 2, dtype, 7))[:, 0]}
    if run is graph_trained:
        whole["drow"] = np.stack(values((1,) * ROWS, 4, dtype, 8))[:, 0]
    rows = {"ids": ids(COUNTS, SYMBOLS), "x": values(COUNTS, 3, dtype, 6)}
    return Case(rows, {"lengths": "x"}, run_all, whole)


def graph_outputs(y: Any) -> dict[str, Any]:
    return {"steps": Steps(y["steps"], "x"), "row": Each(y["row"])} if isinstance(y, dict) else {"row": Each(y)}


def graph_called(layer: Any, x: Any, lengths: Any) -> dict[str, Any]:
    return graph_outputs(layer(x, lengths=lengths))


def graph_run(layer: Any, x: Any, lengths: Any) -> dict[str, Any]:
    _, state = layer.run(x, lengths=lengths)
    y, state = layer.run(x, state, lengths=lengths)
    return graph_outputs(y) | {"state": Each(state["hidden"])}


def graph_trained(layer: Any, x: Any, lengths: Any, drow: Any) -> dict[str, Any]:
    y, tape = layer.forward(x, lengths=lengths)
    grads = no_grads(layer)
    dy = {"row": drow, "steps": np.cos(y["steps"])} if isinstance(y, dict) else drow
    dx = layer.backward(dy, tape, grads=grads)
    assert dx["ids"] is None
    return graph_outputs(y) | {"dx": Steps(dx["x"], "x"), "dspeaker": Each(dx["speaker"]), "grads": Summed(grads)}


def graph_carried(layer: Any, x: Any, lengths: Any) -> dict[str, Any]:
    _, state = layer.run(x, lengths=lengths)
    y, state, _ = layer.forward_carrying(x, state, lengths=lengths)
    return graph_outputs(y) | {"state": Each(state["hidden"])}


for _name, _run in {
    "__call__": graph_called,
    "run": graph_run,
    "forward": graph_trained,
    "forward_carrying": graph_carried,
}.items():
    CONTRACTS[f"Graph.{_name}"] = {
        variant: lambda root, dtype, pooled=pooled, run=_run: graph_case(root, dtype, pooled, run)
        for variant, pooled in (("of_steps_and_rows", False), ("of_rows", True))
    }


# One output for each row.

OVER_TIME = ("LastStep", "MeanOverTime", "MaxOverTime")


@contract(*(f"{name}.__call__" for name in OVER_TIME))
def _over_time(root: Any, dtype: str, name: str) -> Case:
    layer = resolved(root, name)(dtype=dtype)
    return Case(
        {"x": values(COUNTS, 3, dtype)},
        {"lengths": "x"},
        lambda x, lengths=None: {"y": Each(layer(x, lengths=lengths))},
    )


@contract(*(f"{name}.forward" for name in OVER_TIME))
def _over_time_trained(root: Any, dtype: str, name: str) -> Case:
    layer = resolved(root, name)(dtype=dtype)

    def run(x: Any, dy: Any, lengths: Any = None) -> dict[str, Any]:
        y, dx, _ = trained(layer, dy, x, lengths=lengths)
        return {"y": Each(y), "dx": Steps(dx, "x")}

    whole = {"dy": np.stack(values((1,) * ROWS, 3, dtype, 1))[:, 0]}
    return Case({"x": values(COUNTS, 3, dtype)}, {"lengths": "x"}, run, whole)


WINDOWS: dict[str, Callable[[Any, str], Any]] = {
    "Conv1d": lambda root, dtype: root.Conv1d(3, 3, 3, padding=(1, 1), dtype=dtype, seed=0),
    "MaxPool1d": lambda root, dtype: root.MaxPool1d(3, 1, padding=1, dtype=dtype),
    "AvgPool1d": lambda root, dtype: root.AvgPool1d(3, 1, padding=1, dtype=dtype),
}


@contract(*(f"{name}.__call__" for name in WINDOWS))
def _windows(root: Any, dtype: str, name: str) -> Case:
    layer = alive(WINDOWS[name.split(".")[0]](root, dtype))
    return Case(
        {"x": values(COUNTS, 3, dtype)},
        {"lengths": "x"},
        lambda x, lengths=None: {"y": Steps(layer(x, lengths=lengths), "x")},
    )


@contract(*(f"{name}.forward" for name in WINDOWS))
def _windows_trained(root: Any, dtype: str, name: str) -> Case:
    layer = alive(WINDOWS[name.split(".")[0]](root, dtype))

    def run(x: Any, dy: Any, lengths: Any = None) -> dict[str, Any]:
        y, dx, grads = trained(layer, dy, x, lengths=lengths)
        return {"y": Steps(y, "x"), "dx": Steps(dx, "x"), "grads": Summed(grads)}

    return Case({"x": values(COUNTS, 3, dtype), "dy": values(COUNTS, 3, dtype, 1)}, {"lengths": "x"}, run)


@contract("LastOfDirections.__call__")
def _last_of_directions(root: Any, dtype: str, name: str) -> Case:
    layer = root.LastOfDirections(dtype=dtype)
    return Case(
        {"x": values(COUNTS, 4, dtype)},
        {"lengths": "x"},
        lambda x, lengths=None: {"y": Each(layer(x, lengths=lengths))},
    )


@contract("LastOfDirections.forward")
def _last_of_directions_trained(root: Any, dtype: str, name: str) -> Case:
    layer = root.LastOfDirections(dtype=dtype)

    def run(x: Any, dy: Any, lengths: Any = None) -> dict[str, Any]:
        y, dx, _ = trained(layer, dy, x, lengths=lengths)
        return {"y": Each(y), "dx": Steps(dx, "x")}

    whole = {"dy": np.stack(values((1,) * ROWS, 4, dtype, 1))[:, 0]}
    return Case({"x": values(COUNTS, 4, dtype)}, {"lengths": "x"}, run, whole)


@contract("Reverse.__call__", "Reverse.forward")
def _reverse(root: Any, dtype: str, name: str) -> Case:
    layer = root.Reverse(dtype=dtype)

    def run(x: Any, dy: Any, lengths: Any = None) -> dict[str, Any]:
        if name == "Reverse.__call__":
            return {"y": Steps(layer(x, lengths=lengths), "x")}
        y, dx, _ = trained(layer, dy, x, lengths=lengths)
        return {"y": Steps(y, "x"), "dx": Steps(dx, "x")}

    return Case({"x": values(COUNTS, 3, dtype), "dy": values(COUNTS, 3, dtype, 1)}, {"lengths": "x"}, run)


@contract("Conv1d.run", "Conv1d.forward_carrying")
def _windows_carried(root: Any, dtype: str, name: str) -> Case:
    layer = alive(root.Conv1d(3, 3, 3, padding="causal", dtype=dtype, seed=0))
    begun = layer.run(np.stack(values((4,) * ROWS, 3, dtype, 2)))[1]

    def run(x: Any, state: Any, lengths: Any = None) -> dict[str, Any]:
        y, end, *_ = getattr(layer, name.split(".")[1])(x, state, lengths=lengths)
        return {"y": Steps(y, "x"), "state": Each(end)}

    return Case({"x": values(COUNTS, 3, dtype)}, {"lengths": "x"}, run, {"state": begun})


@contract(*(f"ZeroPadded.{verb}" for verb in ("__call__", "run", "forward", "forward_carrying")))
def _zero_padded(root: Any, dtype: str, name: str) -> Case:
    layer = alive(root.ZeroPadded(of_symbols(root, dtype), root.GRU(8, 4, bidirectional=True, dtype=dtype, seed=2)))
    verb = getattr(layer, name.partition(".")[2])

    def run(x: Any, lengths: Any = None) -> dict[str, Any]:
        found = verb(x, lengths=lengths)
        return {"y": Steps(found[0] if isinstance(found, tuple) else found, "x")}

    return Case({"x": [np.maximum(row, 1) for row in ids(COUNTS, SYMBOLS)]}, {"lengths": "x"}, run)


# The one form that every layer has, which containers and the trainer use: here it is asked of layers of each kind. What
# a pointwise layer makes of 0 is not 0, and so its outputs have to be cleared.

EVERY: dict[str, tuple[int | None, int | None, Callable[[Any, str], Any]]] = {  # values a step of x, and of y
    "embedding": (None, 8, of_symbols),
    "linear": (3, 8, lambda root, dtype: root.Linear(3, 8, dtype=dtype, seed=0)),
    "layer_norm": (4, 4, lambda root, dtype: root.LayerNorm(4, dtype=dtype)),
    "sigmoid": (4, 4, lambda root, dtype: root.Sigmoid(dtype=dtype)),
    "positions": (4, 4, lambda root, dtype: root.SinusoidalPositions(4, dtype=dtype)),
    "recurrent": (3, 8, lambda root, dtype: root.LSTM(3, 4, bidirectional=True, dtype=dtype, seed=0)),
    "self_attention": (8, 8, lambda root, dtype: root.MultiheadAttention(8, 2, dtype=dtype, seed=0)),
    "encoder": (8, 8, lambda root, dtype: root.TransformerEncoder(1, 8, 2, 12, dropout=0.0, dtype=dtype, seed=0)),
    "over_time": (3, None, lambda root, dtype: root.MeanOverTime(dtype=dtype)),
    "convolution": (3, 8, lambda root, dtype: root.Conv1d(3, 8, 3, padding=1, dtype=dtype, seed=0)),
    "causal convolution": (3, 8, lambda root, dtype: root.Conv1d(3, 8, 3, padding="causal", dtype=dtype, seed=0)),
    "average": (4, 4, lambda root, dtype: root.AvgPool1d(3, 1, padding=1, dtype=dtype)),
    "model": (None, 8, encoder_of_tokens),
}


@contract("Layer.run", "Layer.forward_carrying", **{name: name for name in EVERY})
def _every(root: Any, dtype: str, name: str, variant: str) -> Case:
    takes, gives, make = EVERY[variant]
    layer = alive(make(root, dtype))

    def run(x: Any, dy: Any, lengths: Any = None) -> dict[str, Any]:
        if name == "Layer.run":
            y, state = layer.run(x, lengths=lengths)
            found: dict[str, Any] = {}
        else:
            y, state, tape = layer.forward_carrying(x, lengths=lengths)
            grads = no_grads(layer)
            real = np.ones(x.shape[:2], bool) if lengths is None else np.arange(x.shape[1]) < lengths[:, None]
            dx = layer.backward_carrying(np.where(real[..., None], dy, 0) if gives else dy, tape, grads=grads)
            found = {"grads": Summed(grads)}
            if dx is not None:
                # A pointwise layer knows no padding in its backward; whoever calls this clears it before and after.
                found["dx"] = Steps(dx, "x", past=None if layer.time == "pointwise" else 0.0)
        found["y"] = Each(y) if gives is None else Steps(y, "x")
        return found if state is None else {**found, "state": Each(state)}

    rows = {"x": ids(COUNTS, SYMBOLS) if takes is None else values(COUNTS, takes, dtype)}
    if gives is None:
        return Case(rows, {"lengths": "x"}, run, {"dy": np.stack(values((1,) * ROWS, 3, dtype, 1))[:, 0]})
    return Case({**rows, "dy": values(COUNTS, gives, dtype, 1)}, {"lengths": "x"}, run)


# Losses.


@contract("losses.softmax_cross_entropy", plain={}, ignoring={"ignore_index": 2, "label_smoothing": 0.1})
def _cross_entropy(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    def run(logits: Any, targets: Any, lengths: Any = None) -> dict[str, Any]:
        loss, gradient = root.losses.softmax_cross_entropy(logits, targets, lengths=lengths, **setting)
        real = np.ones(targets.shape, bool) if lengths is None else np.arange(targets.shape[1]) < lengths[:, None]
        count = int((real & (targets != setting.get("ignore_index", -1))).sum())
        # The gradient of a mean: that of the sum is compared.
        return {"loss": Mean(loss, count), "gradient": Steps(gradient * count, "logits", exact=False)}

    rows = {"logits": values(COUNTS, SYMBOLS, dtype), "targets": ids(COUNTS, SYMBOLS)}
    return Case(rows, {"lengths": "logits"}, run)


ELEMENTS = ("binary_cross_entropy_with_logits", "huber", "mean_squared_error")


@contract(*(f"losses.{name}" for name in ELEMENTS))
def _of_elements(root: Any, dtype: str, name: str) -> Case:
    def run(x: Any, targets: Any, lengths: Any = None) -> dict[str, Any]:
        loss, gradient = resolved(root, name)(x, targets, lengths=lengths)
        count = x.size if lengths is None else int(lengths.sum()) * x.shape[2]
        return {"loss": Mean(loss, count), "gradient": Steps(gradient * count, "x", exact=False)}

    x, targets = values(COUNTS, 2, dtype), [1 / (1 + np.exp(-row)) for row in values(COUNTS, 2, dtype, 1)]
    return Case({"x": x, "targets": targets}, {"lengths": "x"}, run)


METRICS = ("accuracy", "binary_accuracy", "mean_absolute_error", "mean_squared_error")


@contract(*(f"training.metrics.{name}" for name in METRICS))
def _metric(root: Any, dtype: str, name: str) -> Case:
    metric = getattr(F.metrics, name.split(".")[-1])

    def run(outputs: Any, targets: Any, lengths: Any = None) -> dict[str, Any]:
        real = np.ones(targets.shape[:2], bool) if lengths is None else np.arange(targets.shape[1]) < lengths[:, None]
        if name.endswith("accuracy"):
            real = real & (targets != -1)
        return {"metric": Mean(metric(outputs, targets, lengths=lengths), int(real.sum()))}

    if name.endswith(".accuracy"):
        targets = [np.where(np.arange(len(row)) == 1, -1, row) for row in ids(COUNTS, 3, 1)]
        return Case({"outputs": values(COUNTS, 3, dtype), "targets": targets}, {"lengths": "outputs"}, run)
    targets = ids(COUNTS, 2, 1) if name.endswith("binary_accuracy") else series(COUNTS, dtype, 1)
    return Case({"outputs": series(COUNTS, dtype), "targets": targets}, {"lengths": "outputs"}, run)


# Models of symbols.


def markov(root: Any, dtype: str) -> Any:
    model = root.models.MarkovChain(SYMBOLS, 2)
    model.fit(ids((40, 30, 9), SYMBOLS, 8))
    return model


LANGUAGE: dict[str, Callable[[Any, str], Any]] = {
    "MarkovChain": markov,
    "RecurrentLM": lambda root, dtype: alive(
        root.models.RecurrentLM(SYMBOLS, 4, 6, 2, cell="gru", dtype=dtype, seed=0)
    ),
    "TransformerLM": lambda root, dtype: alive(
        root.models.TransformerLM(SYMBOLS, 8, 2, 2, context=16, dtype=dtype, seed=0)
    ),
}
METHODS = tuple(f"models.{name}" for name in LANGUAGE)


def language(root: Any, dtype: str, name: str) -> Any:
    return LANGUAGE[name.split(".")[1]](root, dtype)


@contract(*(f"{name}.__call__" for name in METHODS))
def _language(root: Any, dtype: str, name: str) -> Case:
    model = language(root, dtype, name)

    def run(x: Any, lengths: Any = None) -> dict[str, Any]:
        found = {"logits": Steps(model(x, lengths=lengths), "x")}
        if name.startswith("models.TransformerLM"):
            logits, weights = model(x, lengths=lengths, return_weights=True)
            found["beside weights"] = Steps(logits, "x")
            found |= {f"weights {i}": Steps(own, ("x", "x"), 2, more=1) for i, own in enumerate(weights)}
        return found

    return Case({"x": ids(COUNTS, SYMBOLS)}, {"lengths": "x"}, run)


@contract("models.RecurrentLM.__call__", going_on={})
def _going_on(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    model = language(root, dtype, name)
    state = states(model._recurrent)

    def run(x: Any, state: Any, lengths: Any = None) -> dict[str, Any]:
        return {"logits": Steps(model(x, state, lengths=lengths), "x")}

    return Case({"x": ids(COUNTS, SYMBOLS)}, {"lengths": "x"}, run, {"state": state})


@contract(*(f"{name}.log_prob" for name in METHODS))
def _log_prob(root: Any, dtype: str, name: str) -> Case:
    model = language(root, dtype, name)
    return Case(
        {"x": ids(COUNTS, SYMBOLS)},
        {"lengths": "x"},
        lambda x, lengths=None: {"log_prob": Each(model.log_prob(x, lengths))},
    )


@contract(*(f"{name}.bits_per_symbol" for name in METHODS), *(f"{name}.perplexity" for name in METHODS))
def _measured(root: Any, dtype: str, name: str) -> Case:
    model = language(root, dtype, name)

    def run(x: Any, lengths: Any = None) -> dict[str, Any]:
        found = getattr(model, name.split(".")[-1])(x, lengths)
        count = x.size if lengths is None else int(lengths.sum())
        return {"bits": Mean(math.log2(found) if name.endswith("perplexity") else found, count)}

    return Case({"x": ids(SOME, SYMBOLS)}, {"lengths": "x"}, run)


SEEDS = np.arange(10, 10 + ROWS)
WAYS = {
    "likeliest": {"temperature": 0.0},
    "drawn": {"seed": SEEDS},
    "beams": {"num_beams": 3},
    "penalised": {"temperature": 0.0, "repetition_penalty": 1.7},
}


@contract(*(f"{name}.generate" for name in METHODS), **WAYS)
def _generated(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    model = language(root, dtype, name)

    def run(prompt: Any, lengths: Any = None, **seed: Any) -> dict[str, Any]:
        found, chances = model.generate(prompt, 4, lengths=lengths, return_log_probs=True, **{**setting, **seed})
        return {"ids": Each(found), "log_probs": Each(chances)}

    whole = {"seed": setting["seed"]} if "seed" in setting else {}
    return Case({"prompt": ids(COUNTS, SYMBOLS)}, {"lengths": "prompt"}, run, whole)


@contract(*(f"{name}.stream" for name in METHODS), drawn={"seed": SEEDS})
def _streamed(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    model = language(root, dtype, name)

    def run(prompt: Any, lengths: Any = None, **seed: Any) -> dict[str, Any]:
        found = list(model.stream(prompt, 6, lengths=lengths, **{**setting, **seed}))
        return {"ids": Each(np.stack(found, axis=1))}

    whole = {"seed": setting["seed"]} if "seed" in setting else {}
    return Case({"prompt": ids(COUNTS, SYMBOLS)}, {"lengths": "prompt"}, run, whole)


@contract("models.RecurrentLM.forward", begun=False, going_on=True)
def _recurrent_language(root: Any, dtype: str, name: str, goes_on: bool) -> Case:
    model = language(root, dtype, name)

    def run(x: Any, dy: Any, dstate: Any, state: Any, lengths: Any = None) -> dict[str, Any]:
        logits, end, tape = model.forward(x, state if goes_on else None, lengths=lengths)
        grads = no_grads(model)
        real = np.ones(x.shape, bool) if lengths is None else np.arange(x.shape[1]) < lengths[:, None]
        start = model.backward(np.where(real[..., None], dy, 0), tape, dstate=dstate, grads=grads)
        steps = Steps(logits, "x", past=None)  # documented: they mean nothing there
        return {"logits": steps, "state": Each(end), "dstate": Each(start), "grads": Summed(grads)}

    rows = {"x": ids(COUNTS, SYMBOLS), "dy": values(COUNTS, SYMBOLS, dtype)}
    both = {"state": states(model._recurrent), "dstate": states(model._recurrent, 1)}
    return Case(rows, {"lengths": "x"}, run, both)


@contract("models.TransformerLM.forward")
def _transformer_language(root: Any, dtype: str, name: str) -> Case:
    model = language(root, dtype, name)

    def run(x: Any, dy: Any, lengths: Any = None) -> dict[str, Any]:
        logits, nothing, grads = trained(model, dy, x, lengths=lengths)
        assert nothing is None
        return {"logits": Steps(logits, "x"), "grads": Summed(grads)}

    return Case({"x": ids(COUNTS, SYMBOLS), "dy": values(COUNTS, SYMBOLS, dtype)}, {"lengths": "x"}, run)


def learnt(model: Any, history: Any = None) -> dict[str, Any]:
    """All that a fit found."""
    found = {name: np.asarray(array) for name, array in sorted(model.state_dict().items())}
    if history is not None:
        found["loss"] = np.asarray(history.loss)
    return found


@contract("models.RecurrentLM.fit", "models.TransformerLM.fit")
def _language_fitted(root: Any, dtype: str, name: str) -> Case:
    def run(x: Any, lengths: Any = None) -> dict[str, Any]:
        model = language(root, dtype, name)
        settings = {"batch_size": 2, "epochs": 2, "optimiser": F.SGD(model, 0.1), "progress": False}
        return learnt(model, model.fit(x, lengths, **settings))

    return Case({"x": ids(SOME, SYMBOLS)}, {"lengths": "x"}, run, listed=run)


@contract("models.MarkovChain.fit")
def _markov_fitted(root: Any, dtype: str, name: str) -> Case:
    def run(x: Any, lengths: Any = None) -> dict[str, Any]:
        model = root.models.MarkovChain(SYMBOLS, 2)
        model.fit(x, lengths)
        return learnt(model)

    return Case({"x": ids(COUNTS, SYMBOLS)}, {"lengths": "x"}, run, listed=run)


@contract("models.MarkovChain.choose", bic={}, aic={"criterion": "aic"}, held_out={"criterion": "held_out"})
def _markov_chosen(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    """What follows from two symbols, and padding in which nothing does."""
    rng = np.random.default_rng(0)
    rows = []
    for count in (60, 41, 20, 80, 33):
        row = [0, 1]
        while len(row) < count:
            row.append(int((row[-1] + row[-2]) % 3) if rng.random() < 0.9 else int(rng.integers(3)))
        rows.append(np.array(row))
    more = {**setting, "held_out": rows[:2]} if setting.get("criterion") == "held_out" else setting

    def run(x: Any, lengths: Any = None) -> dict[str, Any]:
        model = root.models.MarkovChain.choose(x, 3, range(1, 4), lengths=lengths, **more)
        return {"order": np.array(model.order), **learnt(model)}

    return Case({"x": rows}, {"lengths": "x"}, run, listed=run)


# Models of series.


def forecaster(root: Any, dtype: str) -> Any:
    """One whose mean and deviation are not 0 and 1."""
    model = alive(root.models.RecurrentForecaster(2, 5, dtype=dtype, seed=0))
    measured = {"mean": np.array([0.3, -0.2]), "deviation": np.array([1.5, 0.7]), "sigma2": np.array([0.4, 0.9])}
    model.load_state_dict({**model.state_dict(), **measured})
    return model


@contract("models.RecurrentForecaster.__call__")
def _forecaster(root: Any, dtype: str, name: str) -> Case:
    model = forecaster(root, dtype)

    def run(x: Any, state: Any, lengths: Any = None) -> dict[str, Any]:
        fresh, on = model(x, lengths=lengths), model(x, state, lengths=lengths)
        return {"fresh": Steps(fresh, "x"), "going on": Steps(on, "x")}

    return Case({"x": values(COUNTS, 2, dtype)}, {"lengths": "x"}, run, {"state": states(model._recurrent)})


@contract("models.RecurrentForecaster.forward")
def _forecaster_trained(root: Any, dtype: str, name: str) -> Case:
    model = forecaster(root, dtype)

    def run(x: Any, dy: Any, state: Any, dstate: Any, lengths: Any = None) -> dict[str, Any]:
        y, end, tape = model.forward(x, state, lengths=lengths)
        grads = no_grads(model)
        real = np.ones(x.shape[:2], bool) if lengths is None else np.arange(x.shape[1]) < lengths[:, None]
        dx, start = model.backward(np.where(real[..., None], dy, 0), tape, dstate=dstate, grads=grads)
        steps = {"y": Steps(y, "x", past=None), "dx": Steps(dx, "x")}  # documented: y means nothing there
        return {**steps, "state": Each(end), "dstate": Each(start), "grads": Summed(grads)}

    rows = {"x": values(COUNTS, 2, dtype), "dy": values(COUNTS, 2, dtype, 1)}
    both = {"state": states(model._recurrent), "dstate": states(model._recurrent, 1)}
    return Case(rows, {"lengths": "x"}, run, both)


@contract("models.RecurrentForecaster.log_prob", "models.RecurrentForecaster.forecast")
def _forecast(root: Any, dtype: str, name: str) -> Case:
    model = forecaster(root, dtype)

    def run(x: Any, lengths: Any = None) -> dict[str, Any]:
        if name.endswith("log_prob"):
            return {"log_prob": Each(model.log_prob(x, lengths))}
        return {"forecast": Each(model.forecast(x, 3, lengths=lengths))}

    return Case({"x": values(SOME, 2, dtype)}, {"lengths": "x"}, run)


@contract("models.RecurrentForecaster.fit")
def _forecaster_fitted(root: Any, dtype: str, name: str) -> Case:
    def run(x: Any, lengths: Any = None) -> dict[str, Any]:
        model = alive(root.models.RecurrentForecaster(2, 5, dtype=dtype, seed=0))
        settings = {"batch_size": 2, "window": 3, "epochs": 2, "optimiser": F.SGD(model, 0.05), "progress": False}
        return learnt(model, model.fit(x, lengths, **settings))

    return Case({"x": values(LONG, 2, dtype)}, {"lengths": "x"}, run, listed=run)


def linear(root: Any, dtype: str, **settings: Any) -> Any:
    model = root.models.AutoRegressive(2, dtype=dtype, **settings)
    model.fit(series((30,), "float64", 7))
    return model


def perceptron(root: Any, dtype: str) -> Any:
    model = root.models.AutoRegressive(2, 4, dtype=dtype, seed=0)
    model.fit(series((30,), "float64", 7), epochs=1, progress=False)
    return alive(model)


KINDS_OF_SERIES = {"linear": linear, "perceptron": perceptron}


@contract("models.AutoRegressive.__call__", **KINDS_OF_SERIES)
def _auto(root: Any, dtype: str, name: str, make: Any) -> Case:
    model = make(root, dtype)
    return Case(
        {"x": series(COUNTS, dtype)},
        {"lengths": "x"},
        lambda x, lengths=None: {"y": Steps(model(x, lengths=lengths), "x")},
    )


@contract("models.AutoRegressive.log_prob", **KINDS_OF_SERIES)
def _auto_log_prob(root: Any, dtype: str, name: str, make: Any) -> Case:
    model = make(root, dtype)
    return Case(
        {"x": series(COUNTS, dtype)},
        {"lengths": "x"},
        lambda x, lengths=None: {"log_prob": Each(model.log_prob(x, lengths))},
    )


@contract("models.AutoRegressive.forecast", **KINDS_OF_SERIES)
def _auto_forecast(root: Any, dtype: str, name: str, make: Any) -> Case:
    model = make(root, dtype)
    return Case(
        {"x": series(LONG, dtype)},
        {"lengths": "x"},
        lambda x, lengths=None: {"forecast": Each(model.forecast(x, 3, lengths=lengths))},
    )


@contract("models.AutoRegressive.fit")
def _auto_fitted(root: Any, dtype: str, name: str) -> Case:
    def run(x: Any, lengths: Any = None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for hold_back in (None, 3):
            model = root.models.AutoRegressive(1, dtype=dtype)
            model.fit(x, lengths, hold_back=hold_back)
            own = {name: getattr(model, name) for name in ("coefficients", "intercept", "sigma2")}
            own |= {"aic": model.aic(), "bic": model.bic()}
            found |= {f"{part} {hold_back}": Each(array) for part, array in own.items()}
        return found

    return Case({"x": series((12, 9, 14, 8, 10), dtype)}, {"lengths": "x"}, run)


@contract("models.AutoRegressive.fit", perceptron={})
def _perceptron_fitted(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    def run(x: Any, lengths: Any = None) -> dict[str, Any]:
        model = alive(root.models.AutoRegressive(2, 4, dtype=dtype, seed=0))
        model.fit(x, lengths, epochs=2, batch_size=2, optimiser=F.SGD(model, 0.05), progress=False)
        return learnt(model)

    return Case({"x": series(LONG, "float64")}, {"lengths": "x"}, run, listed=run)


@contract("models.AutoRegressive.choose", bic={}, aic={"criterion": "aic"})
def _auto_chosen(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    rng = np.random.default_rng(1)
    rows = []
    for count in (60, 50, 70, 45, 80):
        row = list(rng.normal(size=2))
        while len(row) < count:
            row.append(0.5 * row[-1] - 0.6 * row[-2] + 0.3 * rng.normal())
        rows.append(np.array(row))

    def run(x: Any, lengths: Any = None) -> dict[str, Any]:
        model = root.models.AutoRegressive.choose(x, range(1, 5), lengths=lengths, dtype=dtype, **setting)
        return {"order": np.array(model.order), **learnt(model)}

    return Case({"x": rows}, {"lengths": "x"}, run, listed=run)


# Encoders of whole models.

ENCODER_MODELS = {
    "mean": {"pooling": "mean"},
    "max": {"pooling": "max", "normalize": True},
    "cls": {"pooling": "cls"},
    "tokens": {"pooling": None},
}
LABELS = 3
LABELLED = {"mean": {"pooling": "mean"}, "tokens": {"pooling": None}}


def encoder_model(root: Any, dtype: str, **settings: Any) -> Any:
    sizes = (SYMBOLS, 8, 2, 2)
    given = {"type_vocab_size": 2, "dropout": 0.0, "max_length": 12, **settings}
    return alive(root.models.TransformerEncoderModel(*sizes, dtype=dtype, seed=0, **given))


def typed(counts: tuple[int, ...]) -> dict[str, list[Array]]:
    return {"x": ids(counts, SYMBOLS), "type_ids": ids(counts, 2, 1)}


@contract("models.TransformerEncoderModel.__call__", **ENCODER_MODELS)
def _encoder_model(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    model = encoder_model(root, dtype, **setting)

    def run(x: Any, type_ids: Any, lengths: Any = None) -> dict[str, Any]:
        y, weights = model(x, lengths=lengths, type_ids=type_ids, return_weights=True)
        plain = model(x, lengths=lengths, type_ids=type_ids)
        untyped = model(x, lengths=lengths)
        found = {"y": y, "plain": plain, "untyped": untyped}
        maps = {f"weights {i}": Steps(own, ("x", "x"), 2) for i, own in enumerate(weights)}
        return {
            **{part: Each(value) if setting["pooling"] else Steps(value, "x") for part, value in found.items()},
            **maps,
        }

    return Case(typed(COUNTS), {"lengths": "x"}, run)


@contract("models.TransformerEncoderModel.forward", **ENCODER_MODELS)
def _encoder_model_trained(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    model = encoder_model(root, dtype, **setting)

    def run(x: Any, type_ids: Any, dy: Any, lengths: Any = None) -> dict[str, Any]:
        y, nothing, grads = trained(model, dy, x, lengths=lengths, type_ids=type_ids)
        assert nothing is None
        return {"y": Each(y) if setting["pooling"] else Steps(y, "x"), "grads": Summed(grads)}

    rows = typed(COUNTS)
    if setting["pooling"]:
        return Case(rows, {"lengths": "x"}, run, {"dy": np.stack(values((1,) * ROWS, 8, dtype))[:, 0]})
    return Case({**rows, "dy": values(COUNTS, 8, dtype)}, {"lengths": "x"}, run)


@contract("models.TransformerEncoderModel.log_prob", **LABELLED)
def _encoder_log_prob(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    model = encoder_model(root, dtype, num_labels=LABELS, **setting)

    def run(x: Any, type_ids: Any, labels: Any, lengths: Any = None) -> dict[str, Any]:
        return {"log_prob": Each(model.log_prob(x, labels, lengths, type_ids=type_ids))}

    if setting["pooling"]:
        return Case(typed(COUNTS), {"lengths": "x"}, run, {"labels": np.array([0, 2, 1, 1, 0])})
    return Case({**typed(COUNTS), "labels": ids(COUNTS, LABELS, 2)}, {"lengths": "x"}, run)


@contract("models.TransformerEncoderModel.predict", **LABELLED)
def _predicted(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    model = encoder_model(root, dtype, num_labels=LABELS, **setting)

    def run(x: Any, type_ids: Any, lengths: Any = None) -> dict[str, Any]:
        found = model.predict(x, lengths, type_ids=type_ids)
        return {"labels": Each(found) if setting["pooling"] else Steps(found, "x", past=-1)}

    return Case(typed(COUNTS), {"lengths": "x"}, run)


@contract("models.TransformerEncoderModel.fit", **LABELLED)
def _encoder_fitted(root: Any, dtype: str, name: str, setting: dict[str, Any]) -> Case:
    def run(x: Any, labels: Any, lengths: Any = None) -> dict[str, Any]:
        model = encoder_model(root, dtype, num_labels=LABELS, **setting)
        settings = {"batch_size": 2, "epochs": 2, "optimiser": F.SGD(model, 0.1), "progress": False}
        return learnt(model, model.fit(x, labels, lengths, **settings))

    if setting["pooling"]:
        return Case({"x": ids(SOME, SYMBOLS)}, {"lengths": "x"}, run, {"labels": np.array([0, 2, 1, 1, 0])}, listed=run)
    return Case({"x": ids(SOME, SYMBOLS), "labels": ids(SOME, LABELS, 2)}, {"lengths": "x"}, run, listed=run)


# Models of pairs of sequences.

SEQ2SEQ: dict[str, Callable[[Any, str], Any]] = {
    "recurrent": lambda root, dtype: root.models.Seq2Seq(
        SOURCES, SYMBOLS, 4, 5, 2, cell="lstm", dtype=dtype, seed=0, bidirectional=True, attention=None
    ),
    "multiplicative": lambda root, dtype: root.models.Seq2Seq(
        SOURCES, SYMBOLS, 4, 5, attention="multiplicative", dtype=dtype, seed=0
    ),
    "additive": lambda root, dtype: root.models.Seq2Seq(
        SOURCES, SYMBOLS, 4, 5, attention="additive", dtype=dtype, seed=0
    ),
}
PAIRS = {"Seq2Seq": tuple(SEQ2SEQ), "TransformerSeq2Seq": ("transformer",)}


def pair_model(root: Any, dtype: str, variant: str) -> Any:
    if variant == "transformer":
        return alive(root.models.TransformerSeq2Seq(SOURCES, SYMBOLS, 8, 2, 2, 1, max_length=12, dtype=dtype, seed=0))
    return alive(SEQ2SEQ[variant](root, dtype))


def of_pairs(method: str, **ways: Any) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """Registers for both models, over their variants and ways."""

    def registered(make: Callable[..., Case]) -> Callable[..., Case]:
        for model, variants in PAIRS.items():
            own = {
                "_".join(filter(None, [variant, way])): (variant, setting)
                for variant in variants
                for way, setting in (ways or {"": {}}).items()
            }
            contract(f"models.{model}.{method}", **own)(
                lambda root, dtype, name, setting, make=make: make(root, dtype, *setting)
            )
        return make

    return registered


OF_TARGET = {"source_lengths": "source", "lengths": "target"}


def sources() -> list[Array]:
    return ids(OTHERS, SOURCES, 3)


@of_pairs("__call__")
def _pair_model(root: Any, dtype: str, variant: str, setting: dict[str, Any]) -> Case:
    model = pair_model(root, dtype, variant)

    def run(source: Any, target: Any, **lengths: Any) -> dict[str, Any]:
        found = {"logits": Steps(model(source, target, **lengths), "target", more=1)}
        if variant != "recurrent":
            logits, weights = model(source, target, return_weights=True, **lengths)
            found["beside weights"] = Steps(logits, "target", more=1)
            axes = 2 if isinstance(weights, list) else 1
            for i, own in enumerate(weights if isinstance(weights, list) else [weights]):
                found[f"weights {i}"] = Steps(own, ("target", "source"), axes, more=(1, 0))
        return found

    return Case({"source": sources(), "target": ids(COUNTS, SYMBOLS)}, OF_TARGET, run)


@of_pairs("forward")
def _pair_model_trained(root: Any, dtype: str, variant: str, setting: dict[str, Any]) -> Case:
    model = pair_model(root, dtype, variant)

    def run(source: Any, target: Any, dy: Any, **lengths: Any) -> dict[str, Any]:
        logits, nothing, grads = trained(model, dy, source, target, **lengths)
        assert nothing is None
        return {"logits": Steps(logits, "target", more=1), "grads": Summed(grads)}

    one_more = tuple(count + 1 for count in COUNTS)
    rows = {"source": sources(), "target": ids(COUNTS, SYMBOLS), "dy": values(one_more, SYMBOLS + 1, dtype)}
    return Case(rows, OF_TARGET, run)


@of_pairs("log_prob")
def _pair_log_prob(root: Any, dtype: str, variant: str, setting: dict[str, Any]) -> Case:
    model = pair_model(root, dtype, variant)
    return Case(
        {"source": sources(), "target": ids(COUNTS, SYMBOLS)},
        OF_TARGET,
        lambda source, target, **lengths: {"log_prob": Each(model.log_prob(source, target, **lengths))},
    )


@of_pairs("generate", likeliest={"temperature": 0.0}, drawn={"seed": SEEDS}, beams={"num_beams": 3})
def _pair_generated(root: Any, dtype: str, variant: str, setting: dict[str, Any]) -> Case:
    model = pair_model(root, dtype, variant)

    def run(source: Any, lengths: Any = None, **seed: Any) -> dict[str, Any]:
        found, chances = model.generate(source, 5, lengths=lengths, return_log_probs=True, **{**setting, **seed})
        return {"ids": Each(found), "log_probs": Each(chances)}

    whole = {"seed": setting["seed"]} if "seed" in setting else {}
    return Case({"source": sources()}, {"lengths": "source"}, run, whole)


@of_pairs("stream", drawn={"seed": SEEDS})
def _pair_streamed(root: Any, dtype: str, variant: str, setting: dict[str, Any]) -> Case:
    model = pair_model(root, dtype, variant)

    def run(source: Any, lengths: Any = None, **seed: Any) -> dict[str, Any]:
        found = list(model.stream(source, 6, lengths=lengths, **{**setting, **seed}))
        rows = np.stack(found, axis=1) if found else np.empty((len(source), 0), np.int64)
        return {"ids": Each([row[row >= 0] for row in rows])}

    whole = {"seed": setting["seed"]} if "seed" in setting else {}
    return Case({"source": sources()}, {"lengths": "source"}, run, whole)


@of_pairs("initial_state")
def _pair_state(root: Any, dtype: str, variant: str, setting: dict[str, Any]) -> Case:
    model = pair_model(root, dtype, variant)

    def run(source: Any, y: Any, lengths: Any = None) -> dict[str, Any]:
        state = model.initial_state(source, lengths=lengths)
        found: dict[str, Any] = {"begun": Each(state)} if variant == "transformer" else {}
        for t in range(2):
            logits, state = model.step(y[:, t], state)
            found[f"logits {t}"] = Each(logits)
        if variant != "transformer":
            found |= {name: Each(array) for name, array in state._arrays().items() if name in "hc"}
        return found

    y = np.random.default_rng(6).integers(0, SYMBOLS, (ROWS, 2))
    return Case({"source": sources()}, {"lengths": "source"}, run, {"y": y})


@of_pairs("fit", plain={}, sampled={"sampling": 0.5})
def _pair_fitted(root: Any, dtype: str, variant: str, setting: dict[str, Any]) -> Case:
    def run(source: Any, target: Any, **lengths: Any) -> dict[str, Any]:
        model = pair_model(root, dtype, variant)
        settings = {"batch_size": 2, "epochs": 2, "optimiser": F.SGD(model, 0.1), "progress": False, **setting}
        return learnt(model, model.fit(source, target, **lengths, **settings))

    return Case({"source": sources(), "target": ids(COUNTS, SYMBOLS)}, OF_TARGET, run, listed=run)


# States that are made of arrays.


@contract("Seq2SeqState.__init__")
def _made_state(root: Any, dtype: str, name: str) -> Case:
    def run(keys: Any, projected: Any, h: Any, lengths: Any = None) -> dict[str, Any]:
        lengths = np.full(len(keys), keys.shape[1]) if lengths is None else lengths
        state = root.Seq2SeqState(h, None, keys, projected, lengths)
        return {"keys": Steps(state.keys, "keys"), "projected": Steps(state.projected, "keys"), "h": Each(state.h)}

    rows = {"keys": values(COUNTS, 4, dtype), "projected": values(COUNTS, 5, dtype, 1)}
    return Case(rows, {"lengths": "keys"}, run, {"h": np.stack(values((2,) * ROWS, 5, dtype, 2))})


def of_layers(rows: list[Array]) -> Array:
    return np.ascontiguousarray(np.moveaxis(rows, 1, 3))


@contract("AttentionState.__init__")
def _made_attention_state(root: Any, dtype: str, name: str) -> Case:
    def run(keys: Any, values: Any, others: Any, **lengths: Any) -> dict[str, Any]:
        own = lengths.get("lengths", np.full(len(keys), keys.shape[1]))
        of_memory = lengths.get("memory_lengths", np.full(len(others), others.shape[1]))
        memory = {"memory_keys": of_layers(others), "memory_values": of_layers(others)}
        state = root.AttentionState(
            own, np.zeros_like(own), of_layers(keys), of_layers(values), memory_lengths=of_memory, **memory
        )
        steps = {"keys": Steps(state.keys, "keys", 3), "values": Steps(state.values, "keys", 3)}
        return {"state": Each(state), **steps, "memory": Steps(state.memory_keys, "others", 3)}

    rows = {
        name: values(counts, 12, dtype, seed)
        for seed, (name, counts) in enumerate({"keys": COUNTS, "values": COUNTS, "others": OTHERS}.items())
    }
    split = {name: [row.reshape(len(row), 1, 2, 6) for row in own] for name, own in rows.items()}
    return Case(split, {"lengths": "keys", "memory_lengths": "others"}, run)


@contract("AttentionState.rolled_back")
def _rolled_back(root: Any, dtype: str, name: str) -> Case:
    """The padding here is what a row has seen past its length."""
    layer = tower(root, dtype, "TransformerEncoder", {"causal": True})

    def run(x: Any, more: Any, lengths: Any = None) -> dict[str, Any]:
        state = layer.initial_state(len(x))
        for t in range(x.shape[1]):
            _, state = layer.step(x[:, t], state)
        state = state if lengths is None else state.rolled_back(lengths)
        y, end = layer.step(more, state)
        return {"state": Each(state), "y": Each(y), "end": Each(end)}

    x = values(COUNTS, 8, dtype)
    more = np.stack(values((1,) * ROWS, 8, dtype, 1))[:, 0]
    return Case({"x": x}, {"lengths": "x"}, run, {"more": more}, {"x": 0.5})


# Batches that carry their lengths.


@contract("training.Batch.__new__")
def _batch(root: Any, dtype: str, name: str) -> Case:
    def run(inputs: Any, targets: Any, **lengths: Any) -> dict[str, Any]:
        lengths.setdefault("target_lengths", np.full(len(targets), targets.shape[1]))
        return {"tokens": Summed({"": np.array(float(F.Batch(inputs, targets, **lengths).tokens))})}

    rows = {"inputs": ids(SOME, SYMBOLS), "targets": ids(OTHERS, SYMBOLS)}
    return Case(rows, {"lengths": "inputs", "target_lengths": "targets"}, run)


def by_batch(name: str, **variants: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers `training_forward`, with its backward, and `evaluation_forward`: what makes the model, and the rows."""

    def registered(make: Callable[..., Any]) -> Callable[..., Any]:
        def case(root: Any, dtype: str, of: str, setting: Any) -> Case:
            model, rows, whole, lengths, carried = make(root, dtype, setting)
            trains = of.endswith("training_forward")

            def run(**given: Any) -> dict[str, Any]:
                state = given.pop("state", None)
                if state is not None:
                    given["fresh"] = np.zeros(len(given["inputs"]), bool)
                batch = F.Batch(**given)
                if not trains:
                    loss, count, end = model.evaluation_forward(batch, state)
                    return {"loss": Mean(loss, count), **({"state": Each(end)} if carried else {})}
                loss, count, tape, end = model.training_forward(batch, state=state, seed=1)
                grads = no_grads(model)
                if count:
                    model.training_backward(tape, grads)
                # The gradient of a mean: that of the sum is compared.
                grads = {name: array * count for name, array in grads.items()}
                found = {"loss": Mean(loss, count), "grads": Summed(grads)}
                return {**found, **({"state": Each(end)} if carried else {})}

            return Case(rows, lengths, run, whole)

        for method in ("training_forward", "evaluation_forward"):
            contract(f"{name}.{method}", **variants)(case)
        return make

    return registered


OF_INPUTS = {"lengths": "inputs"}


@by_batch("models.RecurrentLM", sequences="", chunks="targets", going_on="state")
def _of_recurrent_lm(root: Any, dtype: str, way: str) -> Any:
    model = language(root, dtype, "models.RecurrentLM")
    rows = {"inputs": ids(SOME, SYMBOLS)}
    if way:
        rows["targets"] = ids(SOME, SYMBOLS, 1)
    return model, rows, {"state": states(model._recurrent)} if way == "state" else {}, OF_INPUTS, True


@by_batch("models.TransformerLM", sequences=False, windows=True)
def _of_transformer_lm(root: Any, dtype: str, with_targets: bool) -> Any:
    model = language(root, dtype, "models.TransformerLM")
    rows = {"inputs": ids(COUNTS if not with_targets else SOME, SYMBOLS)}
    if with_targets:
        rows["targets"] = ids(SOME, SYMBOLS, 1)
    return model, rows, {}, OF_INPUTS, False


@by_batch("models.RecurrentForecaster", series=False, windows=True)
def _of_forecaster(root: Any, dtype: str, with_targets: bool) -> Any:
    model = forecaster(root, dtype)
    rows = {"inputs": values(SOME, 2, dtype)}
    if with_targets:
        rows["targets"] = values(SOME, 2, dtype, 1)
    return model, rows, {"state": states(model._recurrent)}, OF_INPUTS, True


@by_batch("models.TransformerEncoderModel", **LABELLED)
def _of_encoder(root: Any, dtype: str, setting: dict[str, Any]) -> Any:
    model = encoder_model(root, dtype, num_labels=LABELS, **setting)
    rows = {"inputs": ids(SOME, SYMBOLS)}
    if setting["pooling"]:
        return model, rows, {"targets": np.array([0, 2, -1, 1, 0])}, OF_INPUTS, False
    rows["targets"] = [np.where(np.arange(len(row)) == 1, -1, row) for row in ids(SOME, LABELS, 1)]
    return model, rows, {}, OF_INPUTS, False


def _of_pair_model(root: Any, dtype: str, variant: str) -> Any:
    rows = {"inputs": sources(), "targets": ids(COUNTS, SYMBOLS)}
    return pair_model(root, dtype, variant), rows, {}, {"lengths": "inputs", "target_lengths": "targets"}, False


for _model, _variants in PAIRS.items():
    by_batch(f"models.{_model}", **{variant: variant for variant in _variants})(_of_pair_model)


# Without lengths to take: batches of a perceptron are windows, all of one length. And lengths that no rows belong to.
WITHOUT = {"models.AutoRegressive.training_forward", "Layer.output_lengths"}


# What there is.


def surface() -> dict[str, dict[str, list[Any]]]:
    """Every public callable that takes lengths: its parameters, and the roots that it is found at."""
    found: dict[str, dict[str, list[Any]]] = {}
    for root in (fs, fs.reference):
        modules: dict[str, Any] = {"": root}
        for name in ("models", "losses", "training", "init", "plotting"):
            if hasattr(root, name):
                modules[f"{name}."] = getattr(root, name)
        for prefix, module in list(modules.items()):
            for name, thing in vars(module).items():
                if isinstance(thing, types.ModuleType) and prefix == "training." and not name.startswith("_"):
                    modules[f"{prefix}{name}."] = thing
        for prefix, module in modules.items():
            for name in sorted(getattr(module, "__all__", ())):
                thing = getattr(module, name)
                for key, function in callables(f"{prefix}{name}", thing):
                    for parameter in taken(function):
                        roots = found.setdefault(key, {}).setdefault(parameter, [])
                        if root not in roots:
                            roots.append(root)
    return found


def callables(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """A function; of a class its public methods, and what makes one."""
    if inspect.isclass(thing):
        for attribute in dir(thing):
            if not attribute.startswith("_") or attribute in ("__call__", "__init__", "__new__"):
                function = getattr(thing, attribute)
                if inspect.isroutine(function):
                    of_every = function is getattr(fs.Layer, attribute, None)  # once, and not of each layer again
                    yield f"Layer.{attribute}" if of_every else f"{name}.{attribute}", function
    elif inspect.isroutine(thing):
        yield name, thing


def taken(function: Any) -> list[str]:
    """The parameters that are lengths; a batch carries its own."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []
    found = [name for name in names if name.endswith("lengths")]
    if "batch" in names:
        found.append("lengths")
    return found


SURFACE = surface()


def test_nothing_is_left_out() -> None:
    """Whoever adds a callable that takes lengths says here how it is called."""
    missing = [name for name in SURFACE if name not in CONTRACTS and name not in WITHOUT]
    assert not missing, f"not in CONTRACTS: {', '.join(missing)}"
    gone = [name for name in [*CONTRACTS, *WITHOUT] if name not in SURFACE]
    assert not gone, f"in CONTRACTS, but not there: {', '.join(gone)}"
    for name, parameters in SURFACE.items():
        if name in CONTRACTS:
            covered = {p for make in CONTRACTS[name].values() for p in make(fs, "float64").lengths}
            assert set(parameters) <= covered, f"{name}: {set(parameters) - covered}"


def test_much_is_found() -> None:
    """The search itself: what is known to be there."""
    assert len(SURFACE) > 80
    for name in ("LSTM.__call__", "attention", "losses.huber", "models.Seq2Seq.stream", "models.MarkovChain.choose"):
        assert "lengths" in SURFACE[name]
        assert SURFACE[name]["lengths"] == [fs, fs.reference]
    assert set(SURFACE["Transformer.__call__"]) == {"src_lengths", "tgt_lengths"}


def everything() -> Iterator[Any]:
    for name, variants in CONTRACTS.items():
        roots = next(iter(SURFACE.get(name, {"": [fs]}).values()))
        for variant, make in variants.items():
            for root in roots:
                side, dtype = ("compiled", "float32") if root is fs else ("reference", "float64")
                yield pytest.param(make, root, dtype, id=f"{name}-{variant}-{side}")


@pytest.mark.parametrize(("make", "root", "dtype"), list(everything()))
def test_a_padded_batch_beside_its_rows(make: Maker, root: Any, dtype: str) -> None:
    case = make(root, dtype)
    for far in (True, False):
        for extra in (0, 2):
            compare(case, together(case, far, extra), exact=root is fs)


def once() -> Iterator[Any]:
    for name, variants in CONTRACTS.items():
        for variant, make in variants.items():
            yield pytest.param(make, id=f"{name}-{variant}")


@pytest.mark.parametrize("make", list(once()))
def test_lengths_that_are_lost_are_seen(make: Maker) -> None:
    """The comparison can fail: without one of the lengths, what might as well stand in a row changes something."""
    case = make(fs, "float64")
    for lost in case.lengths:
        try:
            whole = together(case, False, 2, lost)
        except (ValueError, TypeError):
            continue  # another way to see it
        with pytest.raises((AssertionError, IndexError)):
            compare(case, whole, exact=True)


# Training: two steps on padded batches are two steps on what stands in their rows.


def weighed(forward: Callable[[int], tuple[float, int, Any]], rows: int, parameters: Any) -> tuple[float, int, Any]:
    """The mean loss over rows taken one by one, how much counted, and its gradient."""
    total, count = 0.0, 0
    sums = {name: np.zeros(array.shape) for name, array in parameters.items()}
    for row in range(rows):
        loss, own, grads = forward(row)
        if own:
            total, count = total + loss * own, count + own
            for name, array in grads.items():
                sums[name] += array.astype(np.float64) * own
    return total / count, count, {name: array / count for name, array in sums.items()}


def of_model(model: Any, batch: Any) -> Callable[[int], tuple[float, int, Any]]:
    """Each row of a batch, cut, through a model that has its own loss."""

    def forward(row: int) -> tuple[float, int, Any]:
        loss, count, tape, _ = model.training_forward(of_rows(batch, row), state=None, seed=1)
        grads = no_grads(model)
        if count:
            model.training_backward(tape, grads)
        return loss, count, grads

    return forward


def of_layer(layer: Any, loss: Any, batch: Any) -> Callable[[int], tuple[float, int, Any]]:
    """The same through a layer and a loss, which see no lengths."""

    def forward(row: int) -> tuple[float, int, Any]:
        one = of_rows(batch, row)
        y, *_, tape = layer.forward(one.inputs)
        value, gradient = loss(y, one.targets)
        grads = no_grads(layer)
        layer.backward(gradient, tape, grads=grads)
        return value, int(np.prod(one.targets.shape[:2])), grads

    return forward


def of_rows(batch: Any, row: int) -> Any:
    """One row of a batch, without its padding."""
    inputs, targets = batch.inputs[row : row + 1, : batch.lengths[row]], batch.targets
    if targets is not None:
        counts = batch.lengths if batch.target_lengths is None else batch.target_lengths
        targets = targets[row : row + 1] if targets.ndim == 1 else targets[row : row + 1, : counts[row]]
    return F.Batch(inputs, targets)


def filled(rows: list[Array], far: bool, extra: int, seed: int) -> Array:
    return padded(rows, _far(rows[0]) if far else None, extra, seed)


def batch_of(inputs: Any, targets: Any, far: bool, seed: int, paired: bool = False) -> Any:
    """A padded batch of rows."""
    whole = targets if targets is None or not isinstance(targets, list) else filled(targets, far, seed, seed)
    counts = [np.array([len(row) for row in rows]) for rows in (inputs, targets if paired else inputs)]
    return F.Batch(filled(inputs, far, seed, seed), whole, counts[0], None, counts[1] if paired else None)


TRAINED: dict[str, Callable[[int], tuple[Any, Any, Any]]] = {
    "models.RecurrentLM": lambda s: (language(fs, "float64", "models.RecurrentLM"), ids(SOME, SYMBOLS, s), None),
    "models.TransformerLM": lambda s: (language(fs, "float64", "models.TransformerLM"), ids(SOME, SYMBOLS, s), None),
    "models.RecurrentForecaster": lambda s: (forecaster(fs, "float64"), values(SOME, 2, "float64", s), None),
    "models.TransformerEncoderModel": lambda s: (
        encoder_model(fs, "float64", num_labels=LABELS, pooling=None),
        ids(SOME, SYMBOLS, s),
        [np.where(np.arange(len(row)) == 1, -1, row) for row in ids(SOME, LABELS, s + 9)],
    ),
    "a model of classes": lambda s: (
        encoder_model(fs, "float64", num_labels=LABELS, pooling="mean"),
        ids(SOME, SYMBOLS, s),
        np.array([0, 2, 1, -1, 0]),
    ),
    "models.TransformerSeq2Seq": lambda s: (
        pair_model(fs, "float64", "transformer"),
        ids(OTHERS, SOURCES, s),
        ids(COUNTS, SYMBOLS, s + 9),
    ),
    "models.Seq2Seq": lambda s: (
        pair_model(fs, "float64", "multiplicative"),
        ids(OTHERS, SOURCES, s),
        ids(COUNTS, SYMBOLS, s + 9),
    ),
    **{
        f"fs.Sequential, {variant}": lambda s, variant=variant: (
            chain(fs, "float64", variant),
            ids(SOME, SYMBOLS, s),
            ids(SOME, 8, s + 9) if variant in CHAINS else np.array([3, 0, 7, 1, 1]),
        )
        for variant in CHAINS | POOLING
    },
    "fs.LSTM": lambda s: (
        alive(fs.LSTM(2, 3, bidirectional=True, dtype="float64", seed=0)),
        values(SOME, 2, "float64", s),
        values(SOME, 6, "float64", s + 9),
    ),
}


@pytest.mark.parametrize("far", [True, False], ids=["far", "near"])
@pytest.mark.parametrize("name", TRAINED)
def test_training_on_padded_batches(name: str, far: bool) -> None:
    """Losses of training and validation, and the parameters after two steps, beside the cut rows with their weights."""
    batches = []
    for seed in (0, 1):
        model, inputs, targets = TRAINED[name](seed)
        batches.append(batch_of(inputs, targets, far, seed, paired="Seq2Seq" in name))
    twin = TRAINED[name](0)[0]
    whole = hasattr(model, "training_forward")
    loss = None if whole else fs.losses.mean_squared_error if name == "fs.LSTM" else fs.losses.softmax_cross_entropy

    def one_by_one(batch: Any) -> tuple[float, int, Any]:
        forward = of_model(twin, batch) if whole else of_layer(twin, loss, batch)
        return weighed(forward, ROWS, twin.parameters)

    settings = {} if whole else {"loss": loss}
    optimiser = F.SGD(model, 0.1)
    history = F.fit(
        model, batches, **settings, optimiser=optimiser, epochs=1, validation=batches, validate_every=1, progress=False
    )
    losses, validations = [], []
    for batch in batches:
        value, _, gradient = one_by_one(batch)
        losses.append(value)
        twin.load_state_dict(
            {**twin.state_dict(), **{name: array - 0.1 * gradient[name] for name, array in twin.parameters.items()}}
        )
        parts = [one_by_one(other)[:2] for other in batches]
        validations.append(sum(value * count for value, count in parts) / sum(count for _, count in parts))
    np.testing.assert_allclose(history.loss, losses, rtol=1e-9)
    np.testing.assert_allclose(history.validation_loss, validations, rtol=1e-9)
    for key, array in model.parameters.items():
        assert_close(np.asarray(array), np.asarray(twin.parameters[key]), 1e-8, key)
