"""What parameters start from: PyTorch's defaults, Xavier, He, orthogonal, and the bias of the forget gate.

The functions return arrays; `initialise` gives a layer, or all layers of a model, new parameters.

>>> import fastseq as fs
>>> layer = fs.LSTM(64, 128)
>>> fs.init.initialise(layer, "orthogonal", forget_bias=1.0, seed=0)
>>> float(layer.parameters["bias_ih_l0"][128])
1.0
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.layers import LSTM, Conv1d, Graph, Linear, MultiheadAttention, Sequential, inside
from fastseq.layers.base import Composite, Layer, child_seed
from fastseq.layers.recurrent import Recurrent

__all__ = ["he_normal", "he_uniform", "initialise", "orthogonal", "xavier_normal", "xavier_uniform"]


def xavier_uniform(
    shape: tuple[int, ...], *, gain: float = 1.0, seed: int | None = None, dtype: Any = "float32"
) -> Array:
    """Uniform in ±gain sqrt(6 / (fan_in + fan_out)): for tanh and sigmoid [1]_.

    Parameters
    ----------
    shape : tuple of int
        (outputs, inputs, ...); what follows the first two multiplies both fans.
    gain : float
        What the deviation is multiplied by.
    seed : int, optional
        Fixes the numbers.
    dtype : floating dtype

    Returns
    -------
    array : ndarray

    References
    ----------
    .. [1] X. Glorot, Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks",
       AISTATS 2010.
    """
    return _drawn("xavier_uniform", shape, gain, seed, dtype)


def xavier_normal(
    shape: tuple[int, ...], *, gain: float = 1.0, seed: int | None = None, dtype: Any = "float32"
) -> Array:
    """Normal with deviation gain sqrt(2 / (fan_in + fan_out)); else as `xavier_uniform`.

    Parameters
    ----------
    shape, gain, seed, dtype
        As for `xavier_uniform`.

    Returns
    -------
    array : ndarray
    """
    return _drawn("xavier_normal", shape, gain, seed, dtype)


def he_uniform(
    shape: tuple[int, ...], *, gain: float = math.sqrt(2), seed: int | None = None, dtype: Any = "float32"
) -> Array:
    """Uniform in ±gain sqrt(3 / fan_in): for ReLU, whose gain is sqrt(2) [1]_.

    Parameters
    ----------
    shape, gain, seed, dtype
        As for `xavier_uniform`.

    Returns
    -------
    array : ndarray

    References
    ----------
    .. [1] K. He et al., "Delving deep into rectifiers: surpassing human-level performance on ImageNet
       classification", ICCV 2015.
    """
    return _drawn("he_uniform", shape, gain, seed, dtype)


def he_normal(
    shape: tuple[int, ...], *, gain: float = math.sqrt(2), seed: int | None = None, dtype: Any = "float32"
) -> Array:
    """Normal with deviation gain / sqrt(fan_in); else as `he_uniform`.

    Parameters
    ----------
    shape, gain, seed, dtype
        As for `xavier_uniform`.

    Returns
    -------
    array : ndarray
    """
    return _drawn("he_normal", shape, gain, seed, dtype)


def orthogonal(shape: tuple[int, ...], *, gain: float = 1.0, seed: int | None = None, dtype: Any = "float32") -> Array:
    """A random matrix Q with orthonormal rows or columns, whichever are fewer, times gain [1]_.

    Parameters
    ----------
    shape : tuple of int
        (outputs, inputs, ...); what follows the first axis is taken as one.
    gain, seed, dtype
        As for `xavier_uniform`.

    Returns
    -------
    array : ndarray

    References
    ----------
    .. [1] A. M. Saxe, J. L. McClelland, S. Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep
       linear neural networks", ICLR 2014.
    """
    return _drawn("orthogonal", shape, gain, seed, dtype)


SCHEMES = ("xavier_uniform", "xavier_normal", "he_uniform", "he_normal", "orthogonal")


def initialise(
    layer: Layer, weights: str = "default", *, forget_bias: float | None = None, seed: int | None = None
) -> None:
    """Give a layer, or every layer of a model, new parameters.

    Parameters
    ----------
    layer : layer or model
    weights : {"default", "xavier_uniform", "xavier_normal", "he_uniform", "he_normal", "orthogonal"}
        How the matrices of linear, convolutional and recurrent layers and of attention are drawn, those of each gate,
        and of queries, keys and values, on their own; their biases are 0 then. All else, as embeddings, positions,
        norms and the outputs of models, and everything with "default", starts as it does when layer or model is made.
    forget_bias : float, optional
        The bias of the forget gates of LSTMs [1]_: `bias_ih` has it, `bias_hh` 0.
    seed : int, optional
        Fixes the numbers. With "default" they are those of a layer or model made with this seed; the layers of a
        `Sequential` or `Graph` have each a seed of their own that follows from it.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it should be; also a `forget_bias` that no layer has a place for.

    References
    ----------
    .. [1] R. Jozefowicz, W. Zaremba, I. Sutskever, "An empirical exploration of recurrent network architectures",
       ICML 2015.
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"layer should be a layer or a model, not {checks.describe(layer)}")
    checks.choice("weights", weights, ("default", *SCHEMES))
    seed = checks.seed("seed", seed)
    if forget_bias is not None:
        forget_bias = checks.number("forget_bias", forget_bias)
        if not any(isinstance(part, LSTM) and part.bias for part in _leaves(layer)):
            raise ValueError(f"forget_bias should be None: no LSTM with biases is in {layer!r}")
    _renew(layer, seed)
    if weights != "default":
        _draw_matrices(layer, weights, seed)
    if forget_bias is not None:
        for part in _leaves(layer):
            if isinstance(part, LSTM):
                _set_forget_bias(part, forget_bias)


def _leaves(layer: Layer) -> list[Layer]:
    """The layers that are not made of layers."""
    if not isinstance(layer, Composite):
        return [layer]
    return [leaf for child in inside.children(layer).values() for leaf in _leaves(child)]


def _renew(layer: Layer, seed: int | None) -> None:
    """The parameters of one that is made anew."""
    if isinstance(layer, Sequential | Graph):
        for place, child in enumerate(inside.children(layer).values()):
            _renew(child, None if seed is None else child_seed(seed, place))
        return
    inside.copy_parameters(layer, inside.initial_arrays(layer, seed))


def _draw_matrices(layer: Layer, weights: str, seed: int | None) -> None:
    """Draw what a scheme is for."""
    if isinstance(layer, Composite):
        for place, child in inside.drawn_children(layer):
            _draw_matrices(child, weights, None if seed is None else child_seed(seed, place))
    elif isinstance(layer, Linear | Conv1d | Recurrent | MultiheadAttention):
        rng = np.random.default_rng(seed)
        arrays = inside.arrays(layer)
        own = inside.norm_parameters(layer)  # start as in a new layer
        drawn = {
            name: _matrices(layer, name, old.shape, weights, rng) for name, old in arrays.items() if name not in own
        }
        inside.copy_parameters(layer, drawn)


def _set_forget_bias(layer: LSTM, bias: float) -> None:
    size = layer.hidden_size
    arrays = {name: np.array(array) for name, array in layer.parameters.items() if name.startswith("bias")}
    for name, array in arrays.items():  # gates i, f, g, o
        array[size : 2 * size] = bias if name.startswith("bias_ih") else 0
    inside.copy_parameters(layer, arrays)


def _matrices(layer: Layer, name: str, shape: tuple[int, ...], scheme: str, rng: np.random.Generator) -> Array:
    """One parameter: a bias of zeros, or a matrix drawn, where it has gates one gate after another."""
    if len(shape) == 1:
        return np.zeros(shape)
    gain = math.sqrt(2) if scheme.startswith("he_") else 1.0
    blocks = inside.row_blocks(layer, name)
    return np.concatenate([_draw(scheme, (count, *shape[1:]), gain, rng) for count in blocks])


def _drawn(scheme: str, shape: Any, gain: Any, seed: Any, dtype: Any) -> Array:
    if not isinstance(shape, tuple | list) or len(shape) < 2:
        raise TypeError(f"shape should be a tuple of at least two sizes, not {checks.describe(shape)}")
    sizes = tuple(checks.size("shape", size, 1) for size in shape)
    kind = checks.real_dtype("dtype", dtype, None)
    rng = np.random.default_rng(checks.seed("seed", seed))
    return _draw(scheme, sizes, checks.number("gain", gain), rng).astype(kind, copy=False)


def _draw(scheme: str, shape: tuple[int, ...], gain: float, rng: np.random.Generator) -> Array:
    field = math.prod(shape[2:])
    fan_out, fan_in = shape[0] * field, shape[1] * field
    if scheme == "orthogonal":
        return gain * _orthonormal(shape[0], fan_in, rng).reshape(shape)
    variance = 2 / (fan_in + fan_out) if scheme.startswith("xavier") else 1 / fan_in
    deviation = gain * math.sqrt(variance)
    if scheme.endswith("normal"):
        return rng.normal(0, deviation, shape)
    bound = math.sqrt(3) * deviation
    return rng.uniform(-bound, bound, shape)


def _orthonormal(rows: int, columns: int, rng: np.random.Generator) -> Array:
    """Orthonormal rows or columns, of all such matrices each as likely: Q R with the signs of R's diagonal taken."""
    normal = rng.normal(size=(max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(normal)
    q *= np.where(np.diagonal(r) < 0, -1, 1)
    return q if rows >= columns else np.ascontiguousarray(q.T)
