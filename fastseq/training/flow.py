"""How the gradient flows back through time: where it vanishes, where it explodes."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.layers import inside
from fastseq.layers.base import Tape
from fastseq.layers.recurrent import Recurrent


def gradient_flow(layer: Recurrent, tape: Tape, dy: Any, *, dstate: Any = None) -> Array:
    """The norm of the loss gradient with respect to the state at every step.

    One backpropagation through time, which leaves `layer.grads` as they are.

    Parameters
    ----------
    layer : RNN, LSTM or GRU
    tape : Tape
        What `layer.forward` returned.
    dy : array of the shape of y
        The gradient of the loss with respect to the `y` of `forward`. Zero except at the last step, it shows how far
        back what matters there is felt.
    dstate : state, array (RNN, GRU) or pair of arrays (LSTM), optional
        The gradient with respect to the state that `forward` returned; zeros by default.

    Returns
    -------
    ndarray of shape (T, num_layers * D)
        The norm over batch and units, of h and, for an LSTM, c together. Each with all that follows from it: of c
        also the output of the same step, of a lower layer also what those above make of it. Layers outermost,
        forward before reverse. float64 for layers of narrower dtypes.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it should be.
    """
    if not isinstance(layer, Recurrent):
        raise TypeError(f"layer should be an RNN, LSTM or GRU, not {checks.describe(layer)}")
    wide = np.promote_types(layer.dtype, np.float64)
    parts = [part.astype(wide) for part in inside.flow(layer, dy, tape, dstate) if part is not None]
    # Scaled by the largest, since squares of what has vanished underflow and of what has exploded overflow.
    largest = np.max([np.abs(part).max(axis=(0, 3), initial=0) for part in parts], axis=0)
    scale = np.where((largest > 0) & np.isfinite(largest), largest, 1)
    squares = [((part / scale[:, :, None]) ** 2).sum(axis=(0, 3)) for part in parts]
    norms: Array = scale * np.sqrt(np.sum(squares, axis=0))
    return norms
