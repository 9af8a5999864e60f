"""The losses of `fastseq.losses`, with the same signatures, over NumPy. They take any floating dtype."""

from __future__ import annotations

from typing import Any

from fastseq import checks, losses
from fastseq.checks import Array
from fastseq.reference import loss_operations

__all__ = ["binary_cross_entropy_with_logits", "huber", "mean_squared_error", "softmax_cross_entropy"]

_ENGINE: losses.Engine = (loss_operations, None)


def softmax_cross_entropy(  # noqa: D103
    logits: Any,
    targets: Any,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    lengths: Any = None,
) -> tuple[float, Array]:
    return losses.over_softmax_cross_entropy(_ENGINE, logits, targets, ignore_index, label_smoothing, lengths)


def binary_cross_entropy_with_logits(  # noqa: D103
    logits: Any, targets: Any, *, lengths: Any = None
) -> tuple[float, Array]:
    return losses.over_elements(_ENGINE, "binary_cross_entropy_with_logits", "logits", logits, targets, (), lengths)


def mean_squared_error(predictions: Any, targets: Any, *, lengths: Any = None) -> tuple[float, Array]:  # noqa: D103
    return losses.over_elements(_ENGINE, "mean_squared_error", "predictions", predictions, targets, (), lengths)


def huber(  # noqa: D103
    predictions: Any, targets: Any, *, delta: float = 1.0, lengths: Any = None
) -> tuple[float, Array]:
    more = (checks.number("delta", delta, above=0),)
    return losses.over_elements(_ENGINE, "huber", "predictions", predictions, targets, more, lengths)


for _name in __all__:
    globals()[_name].__doc__ = getattr(losses, _name).__doc__
