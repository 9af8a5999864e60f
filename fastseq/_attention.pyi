from typing import Any

from fastseq.checks import Array

def attention(
    q: Array,
    k: Array,
    v: Array,
    spans: tuple[Array, Array] | None,
    lengths: Array | None,
    mask: Array | None,
    causal: bool,
    window: int | None,
    scale: float,
    want_weights: bool,
    n_threads: int,
) -> tuple[Array, Array | None]: ...
def usual_attention(q: Any, k: Any, v: Any, causal: bool, n_threads: int) -> Array | None: ...
def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    spans: tuple[Array, Array] | None,
    lengths: Array | None,
    mask: Array | None,
    causal: bool,
    window: int | None,
    scale: float,
    dropout: float,
    seed: int,
    n_threads: int,
) -> tuple[Array, Any]: ...
def attention_backward(kept: Any, dout: Array, n_threads: int) -> tuple[Array, Array, Array]: ...
def rotary(
    x: Array, cos: Array, sin: Array, positions: Array, interleaved: bool, inverse: bool, n_threads: int
) -> Array: ...
