"""What the tests of training train: small layers of their own, in NumPy, and the data for them."""

from __future__ import annotations

from typing import Any

import numpy as np

import fastseq as fs
from fastseq.layers.base import Layer, Tape


class Several(Layer):
    """Parameters of several shapes, without any use."""

    def __init__(self, dtype: Any = "float32", seed: int = 0, sizes: Any = ((3, 5), (5,), (1,), (4, 0))) -> None:
        self.dtype = np.dtype(dtype)
        self._config = {"dtype": self.dtype.name, "seed": seed, "sizes": sizes}
        rng = np.random.default_rng(seed)
        names = ["one.weight", "one.bias", "two.weight", "two.bias"]
        self._arrays = {}
        self._assign({name: rng.normal(size=size) for name, size in zip(names, sizes, strict=False)})


class Tiny(Layer):
    """A leaky sum of the inputs, dropped at random, through one matrix: a model with a state and a seed."""

    size: int
    drop: float

    def __init__(self, size: int = 3, drop: float = 0.2, dtype: Any = "float32", seed: int = 0) -> None:
        self.size, self.drop, self.dtype = size, drop, np.dtype(dtype)
        self._config = {"size": size, "drop": drop, "dtype": self.dtype.name, "seed": seed}
        rng = np.random.default_rng(seed)
        self._arrays = {}
        self._assign({"weight": rng.normal(size=(size, size)), "bias": rng.normal(size=size)})
        self.seeds: list[int] = []

    def training_forward(self, batch: Any, state: Any = None, seed: Any = None) -> Any:
        self.seeds.append(seed)
        return self._forward(batch, state, np.random.default_rng(seed).random(batch.inputs.shape) >= self.drop)

    def evaluation_forward(self, batch: Any, state: Any = None) -> Any:
        loss, count, _, state = self._forward(batch, state, np.ones(batch.inputs.shape, bool))
        return loss, count, state

    def _forward(self, batch: Any, state: Any, keep: Any) -> Any:
        x = batch.inputs.astype(self.dtype) * keep
        h = np.zeros((len(x), self.size), self.dtype) if state is None else state.h[:, 0]
        hs = np.empty_like(x)
        for t in range(x.shape[1]):
            h = hs[:, t] = self.dtype.type(0.5) * h + x[:, t]
        error = hs @ self._arrays["weight"].T + self._arrays["bias"] - batch.targets.astype(self.dtype)
        return float(np.mean(error**2, dtype="float64")), error.size, Tape(self, (hs, error)), fs.State(h[:, None])

    def training_backward(self, tape: Any, grads: Any = None) -> None:
        hs, error = self._kept(tape)
        targets = self._targets(grads)
        dy = error * self.dtype.type(2 / error.size)
        targets["weight"][...] += np.einsum("bti,btj->ij", dy, hs)
        targets["bias"][...] += dy.sum((0, 1))


class Affine(Layer):
    """A plain layer: y = W x + b."""

    def __init__(self, size: int = 3, dtype: Any = "float32", seed: int = 0) -> None:
        self.dtype = np.dtype(dtype)
        self._config = {"size": size, "dtype": self.dtype.name, "seed": seed}
        rng = np.random.default_rng(seed)
        self._arrays = {}
        self._assign({"weight": rng.normal(size=(size, size)), "bias": rng.normal(size=size)})

    def __call__(self, x: Any) -> Any:
        return x.astype(self.dtype) @ self._arrays["weight"].T + self._arrays["bias"]

    def forward(self, x: Any, seed: Any = None) -> Any:
        return self(x), Tape(self, x.astype(self.dtype))

    def backward(self, dy: Any, tape: Any, *, grads: Any = None) -> Any:
        x, targets = self._kept(tape), self._targets(grads)
        targets["weight"][...] += np.einsum("bti,btj->ij", dy, x)
        targets["bias"][...] += dy.sum((0, 1))
        return dy @ self._arrays["weight"]


class Leaky(Affine):
    """A recurrent layer, to the trainer: h' = h / 2 + x, y = W h + b; records what it is called with."""

    time = "sequence"
    carries_state = True

    def __init__(self, size: int = 3, dtype: Any = "float32", seed: int = 0) -> None:
        super().__init__(size, dtype, seed)
        self.calls: list[dict[str, Any]] = []

    def _walk(self, x: Any, state: Any) -> Any:
        h = np.zeros((len(x), x.shape[2]), self.dtype) if state is None else state.h[:, 0]
        hs = np.empty(x.shape, self.dtype)
        for t in range(x.shape[1]):
            h = hs[:, t] = self.dtype.type(0.5) * h + x[:, t]
        return hs, fs.State(h[:, None])

    def __call__(self, x: Any, state: Any = None, *, lengths: Any = None) -> Any:
        hs, state = self._walk(x, state)
        return super().__call__(hs), state

    def forward(self, x: Any, state: Any = None, *, lengths: Any = None, seed: Any = None) -> Any:
        self.calls.append({"state": state, "lengths": lengths, "seed": seed})
        hs, state = self._walk(x, state)
        return super().__call__(hs), state, Tape(self, hs)

    def backward(self, dy: Any, tape: Any, *, truncate: Any = None, grads: Any = None) -> Any:
        self.calls[-1]["truncate"] = truncate
        return super().backward(dy, tape, grads=grads), None


def squared_error(y: Any, targets: Any) -> Any:
    """The mean squared error and its gradient."""
    error = y - targets.astype(y.dtype)
    return float(np.mean(error**2, dtype="float64")), error * y.dtype.type(2 / error.size)


def padded_squared_error(y: Any, targets: Any, lengths: Any = None) -> Any:
    """The same over what is no padding."""
    if lengths is None:
        return squared_error(y, targets)
    real = np.arange(y.shape[1]) < lengths[:, None]
    error = np.where(real[..., None], y - targets.astype(y.dtype), 0)
    count = max(1, int(real.sum()) * y.shape[2])
    return float(np.sum(error**2, dtype="float64") / count), error.astype(y.dtype) * y.dtype.type(2 / count)


def series(steps: int = 400, size: int = 3, seed: int = 1) -> Any:
    """Values in which each step says something of the next."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(steps, size))
    for t in range(1, steps):
        values[t] += 0.8 * np.roll(values[t - 1], 1)
    return values.astype("float32")


def streams(seed: Any = 5) -> Any:
    """Epochs of 19 chunks."""
    return fs.training.Streams(series(388), batch_size=3, steps=7, seed=seed)
