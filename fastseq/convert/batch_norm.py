"""Batch normalisation in inference, folded into the layer before it.

With fixed statistics it is one factor and one summand for each channel,

    y = (x - running_mean) / sqrt(running_var + eps) * weight + bias,

and a convolution or a linear map that it follows takes both into its own parameters. Between them there may be nothing,
not even an activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array

_OF_NORM = ("running_mean", "running_var", "weight", "bias")


def factors(
    running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, *, eps: float
) -> tuple[Any, Any]:
    """Return batch normalisation as a factor and a summand of each channel.

    A norm that no convolution stands before is ``Conv1d(C, C, 1, groups=C)`` with the weight ``factor[:, None, None]``
    and the bias `summand`.

    Parameters
    ----------
    running_mean, running_var : arrays of shape (C,)
    weight, bias : arrays of shape (C,), optional
        Of a norm without them: None.
    eps : float
        What the norm adds to the variance; files of parameters seldom say it.

    Returns
    -------
    factor, summand : ndarrays of float64, (C,)

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it should be.
    """
    eps = checks.number("eps", eps, least=0)
    given = dict(zip(_OF_NORM, (running_mean, running_var, weight, bias), strict=True))
    arrays = {name: _real(name, array) for name, array in given.items() if array is not None}
    shape = arrays["running_mean"].shape
    for name, array in arrays.items():
        if array.ndim != 1 or array.shape != shape:
            raise ValueError(f"{name} should be of shape (C,) as running_mean {shape}, not {array.shape}")
    if not (arrays["running_var"] >= 0).all():
        raise ValueError("running_var should hold variances, 0 or more")
    with np.errstate(divide="ignore"):
        factor = arrays.get("weight", np.ones(shape)) / np.sqrt(arrays["running_var"] + eps)
    return factor, arrays.get("bias", np.zeros(shape)) - arrays["running_mean"] * factor


def folded(
    layer_weight: Any,
    layer_bias: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float,
) -> tuple[Array, Array]:
    """Return the parameters of a convolution or a linear map that batch normalisation follows, with both in one.

    Parameters
    ----------
    layer_weight : array of shape (C, ...)
        Of `Conv1d` (C, inputs / groups, size) or `Linear` (C, inputs).
    layer_bias : array of shape (C,), or None
    running_mean, running_var, weight, bias, eps
        As for `factors`.

    Returns
    -------
    weight, bias : ndarrays of the shapes of `layer_weight` and (C,), of its dtype
        Computed in float64.
    """
    factor, summand = factors(running_mean, running_var, weight, bias, eps=eps)
    given = checks.as_array("layer_weight", layer_weight)
    matrix = _real("layer_weight", given)
    if matrix.ndim < 2 or len(matrix) != len(factor):
        raise ValueError(f"layer_weight should be of shape ({len(factor)}, ...), not {matrix.shape}")
    if layer_bias is not None:
        start = _real("layer_bias", layer_bias)
        if start.shape != factor.shape:
            raise ValueError(f"layer_bias should be of shape {factor.shape}, not {start.shape}")
        summand = summand + start * factor
    whole = matrix * factor.reshape(-1, *[1] * (matrix.ndim - 1))
    return whole.astype(given.dtype), summand.astype(given.dtype)


def fold(arrays: Mapping[str, Any], norms: Mapping[str, str], *, eps: float) -> dict[str, Any]:
    """Return a state dict without its batch norms, each folded into the layer before it.

    Parameters
    ----------
    arrays : mapping from str to array
        A PyTorch state dict, for example. It stays as it is.
    norms : mapping from str to str
        For the name of a norm that of the layer before it: ``{"1": "0"}`` of a Sequential of both.
    eps : float
        Of all these norms.

    Returns
    -------
    arrays : dict from str to array
        Those of the layers have a bias afterwards, where they had none; all that is not of a norm or its layer is as
        it was.

    Raises
    ------
    ValueError
        Naming all arrays that are missing.
    """
    result = dict(checks.mapping("arrays", arrays))
    wanted = [f"{layer}.weight" for layer in norms.values()]
    wanted += [f"{norm}.{name}" for norm in norms for name in _OF_NORM[:2]]
    faults = checks.are((name for name in wanted if name not in result), "missing")
    if faults:
        raise ValueError(f"arrays should have what norms names: {'; '.join(faults)}")
    for norm, layer in norms.items():
        own = {name: result.pop(f"{norm}.{name}", None) for name in _OF_NORM}
        result.pop(f"{norm}.num_batches_tracked", None)
        weight, bias = folded(result[f"{layer}.weight"], result.get(f"{layer}.bias"), **own, eps=eps)
        result[f"{layer}.weight"], result[f"{layer}.bias"] = weight, bias
    return result


def _real(name: str, value: Any) -> Array:
    array = checks.as_array(name, value)
    if array.dtype.kind != "f":
        raise TypeError(f"{name} should hold real floating numbers, not {array.dtype}")
    return array.astype(np.float64)
