from collections.abc import Mapping
from typing import Any

from fastseq.checks import Array

class Block: ...

def block_pack(settings: Mapping[str, Any], parts: Mapping[str, Any]) -> Block: ...
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
