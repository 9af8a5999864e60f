"""The forms in which data may be given to `fit`, and the part of it that is held out."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.training import Batch, arguments

BATCH_SIZE = arguments.BATCH_SIZE  # of `fit`, where none is given


def is_list_of_rows(value: Any) -> bool:
    """Whether sequences were given as a list of them."""
    return isinstance(value, list | tuple) and any(isinstance(row, list | tuple | np.ndarray) for row in value)


def is_data(value: Any) -> bool:
    """Whether it is data of the trainer, which already is in batches."""
    batches = isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(one, Batch) for one in value)
    return hasattr(value, "batches") or batches


def batched_already(**settings: Any) -> None:
    """Refuse what says how data is put into batches, of data that already is."""
    for name, value in settings.items():
        if value is not None:
            raise ValueError(f"{name} should not be given with data that already is in batches, but is {value!r:.80}")


def padded_pair(value: Any) -> tuple[Any, Any]:
    """Sequences and their lengths, given as a tuple of a padded array (B, T) and (B,); or as they are, and None."""
    if isinstance(value, tuple) and len(value) == 2 and not isinstance(value, Batch):
        first = value[0]
        if np.ndim(first) == 2 if isinstance(first, np.ndarray) else is_list_of_rows(first):
            return value
    return value, None


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of an array, or of a list of numbers; () of anything else."""
    return (len(value),) if isinstance(value, list | tuple) else tuple(getattr(value, "shape", ()))


def no_targets(name: str, value: Any, lengths: Any) -> None:
    """Refuse targets in the place of lengths: a model that goes on from what it is given makes them itself."""
    if lengths is None or is_data(value):
        return
    if is_list_of_rows(value) or is_list_of_rows(lengths):
        targets = is_list_of_rows(lengths)
    else:
        shape = _shape(value)
        targets = shape not in ((), (1,)) and _shape(lengths) == shape
    if targets:
        raise ValueError(
            "lengths should be the number of real steps of each row, not targets: the model makes these itself, each"
            f" step being the target of the one before; give all steps unbatched, as in fit({name})"
        )


def held_out(count: int, share: Any, seed: int | None) -> tuple[Array, Array]:
    """Which of `count` sequences a model learns from, and which it is validated on: a share of them, at least one."""
    known = checks.seed("seed", seed)
    drawn = int(np.random.SeedSequence().generate_state(1)[0]) if known is None else known
    return arguments.held_out(count, arguments.split_share(share), drawn)


def last_part(length: int, share: Any, least: int) -> int:
    """Where the last part of one long sequence begins, on which a model is validated; each part has `least` steps."""
    fraction = arguments.split_share(share)
    if length < 2 * least:
        raise ValueError(f"validation_split should be given with at least {2 * least} steps, not {length}")
    return min(max(length - round(fraction * length), least), length - least)
