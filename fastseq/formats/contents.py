"""What a file holds, as every reader of `fastseq.formats` returns it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Contents:
    """Named arrays of a file, and what the file says of itself.

    Attributes
    ----------
    format : str
        Name of the format, as `fastseq.formats.recognise` returns it.
    arrays : mapping from str to ndarray
        Read when they are asked for, where the format allows; bfloat16 and float16 come as float32.
    description : dict
        ``"tensors"`` has the stored type and the shape of each array; the rest depends on the format.
    """

    format: str
    arrays: Mapping[str, np.ndarray[Any, np.dtype[Any]]]
    description: dict[str, Any]
