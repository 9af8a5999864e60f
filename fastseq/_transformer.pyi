from collections.abc import Callable, Mapping
from typing import Any

from fastseq._kv_pages import Pages as Pages
from fastseq.checks import Array
from fastseq.narrow import Weight

class Block: ...

def block_pack(settings: Mapping[str, Any], sublayers: list[tuple[str, Mapping[str, Any], Any]]) -> Block: ...
def run_blocks(
    blocks: list[Block],
    x: Array,
    starts: Array,
    positions: Array | None,
    causal: bool,
    mask: Array | None,
    memory: Array | None,
    memory_starts: Array | None,
    memory_mask: Array | None,
    final_norm: tuple[str, float, Array | None, Array | None] | None,
    want_weights: bool,
    n_threads: int,
) -> tuple[Array, list[Any] | None]: ...

class Decoder:
    def __init__(
        self,
        blocks: list[Block],
        final_norm: tuple[str, float, Array | None, Array | None] | None,
        embedding: Weight,
        positions: Array | None,
        output: Any,
        pages: Pages,
        memory: Pages | None,
        max_tokens: int,
        prefill: Callable[[list[Array]], Pages],
        n_threads: int,
    ) -> None: ...
    def capsule(self) -> Any: ...
    def renew(self, symbols: list[Array]) -> None: ...

def no_pages(blocks: list[Block], dtype: Any, rows: int) -> Pages: ...
def memory_pages(blocks: list[Block], memory: Array, starts: Array, n_threads: int) -> Pages: ...
def run_cached(
    blocks: list[Block],
    x: Array,
    starts: Array,
    pages: Pages,
    memory: Pages | None,
    final_norm: tuple[str, float, Array | None, Array | None] | None,
    n_threads: int,
) -> tuple[Array, Pages]: ...
