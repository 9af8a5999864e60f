"""What encoder and decoder share: some blocks, and a norm after the last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastseq.checks import Array
from fastseq.layers.base import Layer, child_seed, seeds_of
from fastseq.layers.settings import KW_ONLY, flag, size
from fastseq.layers.transformer.block import D_MODEL, FEEDFORWARD, MAX_LAYERS, NHEAD, Block, Context, Runs


class Tower(Runs):
    """What encoder and decoder share: some layers, and a norm after the last."""

    _block: ClassVar[type[Block]]  # the class of a layer

    num_layers: int = size(limit=MAX_LAYERS, doc="How many layers.")
    d_model: int = size(doc=D_MODEL)
    nhead: int = size(doc=NHEAD)
    dim_feedforward: int = size(default=2048, doc=FEEDFORWARD)
    _: KW_ONLY
    final_norm: bool = flag(default=False, before="bias", doc="Whether there is a norm after the last layer.")

    def _build(self) -> None:
        kind, config = self._backend.of(self._block), self._of_layers()
        seeds = seeds_of(self.seed, self.num_layers)
        self._children = {f"layers.{i}": kind(**config, seed=seed) for i, seed in enumerate(seeds)}
        self._each: Any = tuple(self._children.values())
        if self.final_norm:
            self._children["norm"] = self._norm_layer()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, first to last."""
        layers: tuple[Layer, ...] = self._each
        return layers

    def _blocks(self) -> tuple[Block, ...]:
        blocks: tuple[Block, ...] = self._each
        return blocks

    def _last_norm(self) -> Any:
        return self._children.get("norm")

    def _forward_rows(self, x: Array, context: Context, seed: int) -> tuple[Array, Any]:
        kept = []
        for i, block in enumerate(self._blocks()):
            x, of_block = block._forward_rows(x, context, child_seed(seed, i))
            kept.append(of_block)
        norm = self._last_norm()
        if norm is None:
            return x, (kept, None)
        x, of_norm = norm.forward(x)
        return x, (kept, of_norm)

    def _backward_rows(self, dy: Array, kept: Any, grads: Mapping[str, Array] | None) -> tuple[Array, Array | None]:
        targets, (of_blocks, of_norm) = self._child_targets(grads), kept
        norm = self._last_norm()
        dx = dy if norm is None else norm.backward(dy, of_norm, grads=targets["norm"])
        dmemory = None
        for i in reversed(range(self.num_layers)):
            dx, more = self._blocks()[i]._backward_rows(dx, of_blocks[i], targets[f"layers.{i}"])
            dmemory = more if dmemory is None or more is None else dmemory + more
        return dx, dmemory
