"""The gradients of each engine against central differences of its own forward, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from common import KINDS, Array, inputs, make, random_lengths, random_state

import fastseq as fs

ENGINES = {"compiled": fs, "reference": fs.reference}
B, T, WIDTH, H = 4, 5, 3, 4
RELATIVE = 1e-6

Values = dict[str, Array]


class Setting:
    """A layer, all that a loss depends on, and the options of the forward and backward."""

    def __init__(
        self,
        engine: str,
        kind: str,
        *,
        lengths: bool,
        resets: bool,
        truncate: int | None,
        dropout: float = 0.0,
        **config: Any,
    ) -> None:
        layer = make(kind, WIDTH, H, dtype="float64", module=ENGINES[engine], **config)
        if dropout:
            other = type(layer)(**{**layer._config, "dropout": dropout})
            other.load_state_dict(layer.state_dict())
            layer = other
        self.layer = layer
        self.options: dict[str, Any] = {
            "lengths": random_lengths(B, T) if lengths else None,
            "resets": np.random.default_rng(5).random((B, T)) < 0.3 if resets else None,
        }
        self.truncate = truncate
        start = random_state(layer, B)
        self.state_class = type(start)
        self.state_names = [f"state.{name}" for name in start._fields]
        self.values: Values = {
            "x": inputs((B, T, WIDTH), "float64"),
            **dict(zip(self.state_names, start, strict=True)),
            **layer.parameters,
        }
        # A loss that is linear in outputs and final state. Garbage stands where nothing may matter.
        rng = np.random.default_rng(6)
        y, end = layer(self.values["x"], start, **self.options)
        self.dy = rng.normal(size=y.shape)
        self.dstate = type(end)(*(rng.normal(size=array.shape) for array in end))
        self.gradients = self.backward()
        self.frozen: list[Any] | None = None
        if truncate is not None:
            self.frozen = []
            again, last = self.chunked(self.values, record=True)
            np.testing.assert_allclose(again, y, rtol=1e-12, atol=1e-14)
            for one, expected in zip(last, end, strict=True):
                np.testing.assert_allclose(one, expected, rtol=1e-12, atol=1e-14)

    def backward(self) -> Values:
        start = self.state_class(*(self.values[name] for name in self.state_names))
        dy = self.dy
        if self.options["lengths"] is not None:
            dy = np.where((np.arange(T) < self.options["lengths"][:, None])[..., None], dy, np.nan)
        _, _, tape = self.layer.forward(self.values["x"], start, **self.options, seed=7)
        dx, dstart = self.layer.backward(dy, tape, dstate=self.dstate, truncate=self.truncate)
        return {"x": dx, **dict(zip(self.state_names, dstart, strict=True)), **self.layer.grads}

    def loss(self, values: Values) -> float:
        y, end = self.chunked(values) if self.truncate is not None else self.whole(values)
        return float((y * self.dy).sum() + sum((a * b).sum() for a, b in zip(end, self.dstate, strict=True)))

    def whole(self, values: Values) -> tuple[Array, Any]:
        for name in self.layer.parameters:
            if self.layer.parameters[name] is not values[name]:
                self.layer.parameters[name] = values[name]
        start = self.state_class(*(values[name] for name in self.state_names))
        y, end, _ = self.layer.forward(values["x"], start, **self.options, seed=7)
        return y, end

    def chunked(self, values: Values, record: bool = False) -> tuple[Array, list[Array]]:
        """The forward as `truncate` sees it: each chunk of a direction starts from a state that is a constant.

        Every layer and direction on its own, through a layer of one direction over each row in its own order, chunk
        by chunk. The states between chunks are those of the unchanged values, which `record` puts aside.
        """
        lengths = self.options["lengths"]
        lengths = np.full(B, T) if lengths is None else lengths
        resets = self.options["resets"]
        frozen = iter([] if record else self.frozen)
        x, ends = values["x"], []
        places = np.arange(T)
        turned = np.where(places < lengths[:, None], lengths[:, None] - 1 - places, places)
        rows = np.arange(B)[:, None]
        for number in range(self.layer.num_layers):
            outputs = []
            for direction in range(self.layer._directions):
                suffix = f"_l{number}" + ("_reverse" if direction else "")
                single = self.single(values, suffix, x.shape[2])
                order = turned if direction else np.broadcast_to(places, (B, T))
                own, own_resets = x[rows, order], None if resets is None else resets[rows, order]
                slot = number * self.layer._directions + direction
                state: Any = self.state_class(*(values[name][:, slot : slot + 1] for name in self.state_names))
                pieces = []
                for begin in range(0, T, self.truncate):
                    if begin and record:
                        self.frozen.append(state)
                    elif begin:
                        given = next(frozen)
                        # A row that has ended keeps the state it ended with: that is its result, not a new chunk.
                        over = (lengths <= begin)[:, None, None]
                        state = self.state_class(*(np.where(over, a, b) for a, b in zip(state, given, strict=True)))
                    piece = slice(begin, begin + self.truncate)
                    steps = np.clip(lengths - begin, 0, own[:, piece].shape[1])
                    more = None if own_resets is None else own_resets[:, piece]
                    y, state = single(own[:, piece], state, lengths=steps, resets=more)
                    pieces.append(y)
                outputs.append(np.concatenate(pieces, axis=1)[rows, order])
                ends.append(state)
            x = np.concatenate(outputs, axis=2)
        return x, [np.concatenate(arrays, axis=1) for arrays in zip(*ends, strict=True)]

    def single(self, values: Values, suffix: str, width: int) -> Any:
        """A layer of one direction with the weights of one here."""
        config = {**self.layer._config, "input_size": width, "num_layers": 1, "bidirectional": False, "dropout": 0.0}
        layer = type(self.layer)(**config)
        layer.load_state_dict({name: values[name.removesuffix("_l0") + suffix] for name in layer.parameters})
        return layer


def difference(loss: Callable[[float], float], step: float) -> float:
    """The derivative of a loss at 0, by central differences of fourth order."""
    one, two = loss(step) - loss(-step), loss(2 * step) - loss(-2 * step)
    return (8 * one - two) / (12 * step)


def along(setting: Setting, directions: Values, step: float) -> float:
    return difference(
        lambda e: setting.loss({**setting.values, **{n: setting.values[n] + e * d for n, d in directions.items()}}),
        step,
    )


def step_for(kind: str) -> float:
    """A ReLU is linear, but only as far as its kink."""
    return 1e-6 if kind == "rnn_relu" else 1e-4


OPTIONS = [
    {"num_layers": num_layers, "bidirectional": bidirectional, "bias": bias}
    for num_layers, bidirectional, bias in itertools.product((1, 2), (False, True), (True, False))
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_combination_of_options(engine: str, kind: str) -> None:
    """Along one direction of everything at once."""
    for config, lengths, resets, truncate in itertools.product(OPTIONS, (False, True), (False, True), (None, 1, 2)):
        setting = Setting(engine, kind, lengths=lengths, resets=resets, truncate=truncate, **config)
        rng = np.random.default_rng(8)
        directions = {name: rng.normal(size=array.shape) for name, array in setting.values.items()}
        terms = [float((directions[name] * setting.gradients[name]).sum()) for name in directions]
        numeric = along(setting, directions, step_for(kind) / 4)
        error = abs(sum(terms) - numeric)
        what = f"{config} {lengths=} {resets=} {truncate=}"
        assert error <= RELATIVE * max(abs(numeric), np.linalg.norm(terms)), f"{what}: {sum(terms)}, not {numeric}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [
        {"lengths": False, "resets": False, "truncate": None},
        {"lengths": True, "resets": True, "truncate": None, "num_layers": 2, "bidirectional": True},
        {"lengths": True, "resets": True, "truncate": None, "num_layers": 3, "bidirectional": True, "dropout": 0.4},
        {"lengths": True, "resets": False, "truncate": 2, "bidirectional": True, "bias": False},
    ],
    ids=["plain", "stacked", "dropout", "truncated"],
)
def test_every_gradient(engine: str, kind: str, options: dict[str, Any]) -> None:
    """Every array by itself: along a direction, and two of its elements."""
    setting = Setting(engine, kind, **options)
    rng = np.random.default_rng(9)
    for name, gradient in setting.gradients.items():
        assert gradient.shape == setting.values[name].shape
        assert np.isfinite(gradient).all() and gradient.any(), name
        elements = [np.zeros(gradient.shape) for _ in range(2)]
        elements[0].flat[np.abs(gradient).argmax()] = 1
        elements[1].flat[rng.integers(gradient.size)] = 1
        scale = np.abs(gradient).max()
        for direction in (rng.normal(size=gradient.shape), *elements):
            analytic = float((gradient * direction).sum())
            numeric = along(setting, {name: direction}, step_for(kind))
            error = abs(analytic - numeric)
            assert error <= RELATIVE * max(abs(numeric), scale), f"{name}: {analytic}, not {numeric}"
