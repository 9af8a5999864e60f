"""The operators of `fastseq.operators`, for graphs of the reference; they take any floating dtype."""

from __future__ import annotations

from fastseq.layers import operators
from fastseq.reference._backend import NUMPY

for _name in operators.__all__:
    if _name not in ("ONNX", "Operator"):
        globals()[_name] = NUMPY.made_from(getattr(operators, _name), __name__)
