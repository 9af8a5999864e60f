"""The losses of `fastseq.losses`, with the same signatures, over NumPy. They take any floating dtype."""

from __future__ import annotations

from fastseq import losses
from fastseq.reference._backend import NUMPY

__all__ = ["binary_cross_entropy_with_logits", "huber", "mean_squared_error", "softmax_cross_entropy"]

binary_cross_entropy_with_logits = NUMPY.over(losses.binary_cross_entropy_with_logits, __name__)
huber = NUMPY.over(losses.huber, __name__)
mean_squared_error = NUMPY.over(losses.mean_squared_error, __name__)
softmax_cross_entropy = NUMPY.over(losses.softmax_cross_entropy, __name__)
