"""The steps of the optimisers in NumPy: the equations of the compiled passes, in the same order, for any dtype.

p is a parameter, g its gradient; what an optimiser keeps is changed in place, and the new parameter is written to
`out`. In float32 and float64 the results have the bits of the compiled passes, except for denormal numbers, which those
take for zero. `n_threads` is for them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastseq.checks import Array


def _decayed(p: Array, g: Array, weight_decay: float) -> Array:
    return g + p.dtype.type(weight_decay) * p if weight_decay else g


def _squarable(g: Array) -> Array:
    """g where it can be squared, else the largest number that is: or a mean of squares would stay infinite."""
    limit: Any = g.dtype.type(2) ** (np.finfo(g.dtype).maxexp // 2 - 1)
    return np.where((np.abs(g) > limit) & np.isfinite(g), np.copysign(limit, g), g)


def sgd(
    p: Array,
    g: Array,
    momenta: Array | None,
    out: Array,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    n_threads: int,
) -> None:
    """Gradient descent.

    g' = g + weight_decay p

    m' = momentum m + g'

    p' = p - lr m', or, with Nesterov's momentum, p - lr (g' + momentum m')
    """
    number = p.dtype.type
    with np.errstate(all="ignore"):
        g = _decayed(p, g, weight_decay)
        if momenta is not None:
            momenta[...] = number(momentum) * momenta + g
            g = g + number(momentum) * momenta if nesterov else momenta
        out[...] = p - number(lr) * g


def rmsprop(
    p: Array,
    g: Array,
    squares: Array,
    momenta: Array | None,
    out: Array,
    lr: float,
    alpha: float,
    eps: float,
    momentum: float,
    weight_decay: float,
    n_threads: int,
) -> None:
    """RMSProp.

    g' = g + weight_decay p

    v' = alpha v + (1 - alpha) g'²

    m' = momentum m + g' / (√v' + eps)

    p' = p - lr m'
    """
    number = p.dtype.type
    with np.errstate(all="ignore"):
        g = _squarable(_decayed(p, g, weight_decay))
        squares[...] = number(alpha) * squares + number(1 - alpha) * (g * g)
        direction = g / (np.sqrt(squares) + number(eps))
        if momenta is not None:
            momenta[...] = number(momentum) * momenta + direction
            direction = momenta
        out[...] = p - number(lr) * direction


def adam(
    p: Array,
    g: Array,
    means: Array,
    squares: Array,
    out: Array,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    n_threads: int,
) -> None:
    """Adam, the `step`-th step counted from 1; `decoupled`: AdamW.

    g' = g + weight_decay p, p unchanged; or, decoupled, g unchanged and p replaced by (1 - lr weight_decay) p

    m' = m + (1 - beta1) (g' - m) = g' - beta1 (g' - m)

    v' = beta2 v + (1 - beta2) g'²

    p' = p - lr / (1 - beta1^step) m' / (√(v' / (1 - beta2^step)) + eps)
    """
    number = p.dtype.type
    keep = 1 - lr * weight_decay if decoupled else 1
    unbias = 1 / math.sqrt(1 - beta2**step)
    with np.errstate(all="ignore"):
        g = _squarable(g if decoupled else _decayed(p, g, weight_decay))
        take = 1 - beta1
        # From whichever is nearer: of a mean that hardly stays, nothing must.
        means[...] = means + number(take) * (g - means) if take < 0.5 else g - number(1 - take) * (g - means)
        squares[...] = number(beta2) * squares + number(1 - beta2) * (g * g)
        direction = means / (np.sqrt(squares) * number(unbias) + number(eps))
        out[...] = number(keep) * p - number(lr / (1 - beta1**step)) * direction


def scale(x: Array, factor: float, n_threads: int) -> None:
    """Multiply an array by a number, in place."""
    with np.errstate(all="ignore"):
        x *= x.dtype.type(factor)


def sum_of_squares(x: Array, n_threads: int) -> float:
    """The sum of the squares of all elements, in double."""
    with np.errstate(all="ignore"):
        return float(np.sum(np.square(x, dtype=np.promote_types(x.dtype, np.float64))))
