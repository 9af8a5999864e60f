"""Softmax attention over heads: full, causal, and causal forward and backward, in every engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastseq.checks import Array
from fastseq.cli import engines, graphs
from fastseq.cli.cases import ITEM, Case, shapes
from fastseq.cli.engines import Model, Outputs

AXES = "B,heads,T,D"
SHAPES = ((1, 12, 128, 64), (8, 8, 128, 64), (1, 12, 1024, 64), (2, 12, 1024, 64))


@dataclass(frozen=True)
class Attention(Case):
    """Attention over a shape.

    Parameters
    ----------
    batch, heads, time, width : int
        Of queries, keys and values, all (B, heads, T, D).
    causal : bool
        Whether each query attends only to the keys up to its own.
    train : bool
        Whether it is forward and backward: the gradients of queries, keys and values.
    """

    batch: int
    heads: int
    time: int
    width: int
    causal: bool = False
    train: bool = False

    @property
    def group(self) -> str:
        """For people."""
        return f"{'causal' if self.causal else 'full'}{' train' if self.train else ''}"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.group} {self.label}"

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.batch}×{self.heads}×{self.time}×{self.width}"

    @property
    def axes(self) -> str:
        """For people."""
        return "B×heads×T×D"

    @property
    def engines(self) -> tuple[str, ...]:
        """Those that can compute it: a graph does not train."""
        return ("reference", "torch") if self.train else ("reference", *_PEERS)

    @property
    def usual(self) -> tuple[str, ...]:
        """All of them."""
        return self.engines

    @property
    def terms(self) -> int:
        """How many terms a result sums: those of a score, and the keys."""
        return self.width + self.time

    @property
    def pairs(self) -> int:
        """Of a query and a key that it may attend to."""
        each = self.time * (self.time + 1) // 2 if self.causal else self.time * self.time
        return self.batch * self.heads * each

    @property
    def flops(self) -> int:
        """Those of q k and of weights v; on the way back, of each product the gradients of both factors.

        Scores that are computed once more on the way back, so that they need not be kept, are not counted.
        """
        return 2 * (6 if self.train else 2) * self.pairs * self.width

    @property
    def bytes_read(self) -> int:
        """Bytes of queries, keys and values; in training once more on the way back, with the gradient."""
        return ITEM * (7 if self.train else 3) * self._size

    @property
    def working_set(self) -> int:
        """Bytes of queries, keys and values."""
        return ITEM * 3 * self._size

    @property
    def _size(self) -> int:
        return self.batch * self.heads * self.time * self.width

    def memory(self, engines: int) -> int:
        """About how many bytes the arrays take in all processes together: most hold all the scores."""
        scores = self.batch * self.heads * self.time * self.time
        return (engines * ITEM + 2 * ITEM) * ((10 if self.train else 4) * self._size + 2 * scores)

    def describe(self) -> dict[str, Any]:
        """For programs."""
        return {
            "kind": "attention",
            "causal": self.causal,
            "train": self.train,
            "batch": self.batch,
            "heads": self.heads,
            "time": self.time,
            "width": self.width,
            "bytes_read": self.bytes_read,
        }

    def build(self, engine: str, threads: int) -> Model:
        """The case in an engine; its outputs are those of attention, in training with the gradients of q, k and v."""
        given = numbers(self)
        if engine in engines.OURS:
            return _function(*engines.ours(engine, threads), self, given)
        return _PEERS[engine](self, given, threads)


def chosen(texts: Sequence[str]) -> list[Case]:
    """The cases that the values of --shape ask for, or the usual ones."""
    return [
        Attention(batch, heads, time, width, causal, train)
        for causal, train in ((False, False), (True, False), (True, True))
        for batch, heads, time, width in shapes(texts, AXES) or SHAPES
    ]


def numbers(case: Attention) -> Array:
    """Queries, keys, values, and the gradient of the outputs, float32; they depend on the shape alone."""
    shape = case.batch, case.heads, case.time, case.width
    return np.random.default_rng(shape).standard_normal((4, *shape), np.float32)


def _function(module: Any, dtype: str, case: Attention, numbers: Array) -> Model:
    q, k, v, dout = numbers.astype(dtype)
    if not case.train:
        return Model(lambda: module.attention(q, k, v, causal=case.causal), lambda out: (out,))

    def call() -> Outputs:
        out, tape = module.attention_forward(q, k, v, causal=case.causal)
        return (out, *module.attention_backward(dout, tape))

    return Model(call, lambda result: result)


def _torch(case: Attention, numbers: Array, threads: int) -> Model:
    torch = engines.torch(threads)
    attention = torch.nn.functional.scaled_dot_product_attention
    q, k, v, dout = map(torch.from_numpy, numbers)

    def infer() -> Any:
        with torch.inference_mode():
            return attention(q, k, v, is_causal=case.causal)

    def train() -> Any:
        for leaf in (q, k, v):
            leaf.grad = None
        out = attention(q, k, v, is_causal=case.causal)
        out.backward(dout)
        return out

    if not case.train:
        return Model(infer, lambda out: (out.numpy(),))
    for leaf in (q, k, v):
        leaf.requires_grad_()
    return Model(train, lambda out: (out.detach().numpy(), *(leaf.grad.numpy() for leaf in (q, k, v))))


def _graph(run: Callable[..., Model]) -> Callable[[Attention, Array, int], Model]:
    def build(case: Attention, numbers: Array, threads: int) -> Model:
        shape = case.batch, case.heads, case.time, case.width
        return run(graphs.attention(shape, case.causal), dict(zip("qkv", numbers, strict=False)), threads, tuple)

    return build


_PEERS: dict[str, Callable[[Attention, Array, int], Model]] = {
    "torch": _torch,
    "onnxruntime": _graph(engines.onnxruntime),
    "openvino": _graph(engines.openvino),
}
