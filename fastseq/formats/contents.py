"""What a reader of a file returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastseq.checks import Array


@dataclass(frozen=True)
class Contents:
    """Named arrays of a file, and what the file says of itself.

    Attributes
    ----------
    format : str
        Name of the format, that of the module which read it.
    arrays : mapping from str to ndarray
        The arrays by name; bfloat16 and float16 as float32.
    description : dict from str
        Stored types, metadata, and for ONNX and Keras the structure.
    """

    format: str
    arrays: Mapping[str, Array]
    description: dict[str, Any]
