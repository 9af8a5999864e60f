"""What a recurrent decoder needs beside its cells, as the papers write it.

Nothing here is shared with the compiled operations of `fastseq._alignment`, which has the same functions.
"""

from __future__ import annotations

import numpy as np

from fastseq.checks import Array


def tanh_forward(x: Array, n_threads: int) -> Array:
    """y = tanh(x)"""
    return np.tanh(x)


def tanh_backward(y: Array, dy: Array, n_threads: int) -> Array:
    """dx = dy (1 - y^2)"""
    return dy * (1 - y * y)
