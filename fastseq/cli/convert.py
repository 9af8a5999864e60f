"""``fastseq convert``: the file of a layer or model, again with narrow weights."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path

from fastseq import io
from fastseq.bench import UsageError
from fastseq.cli.files import writable
from fastseq.cli.table import size


def run(options: Namespace) -> int:
    """The command; returns the exit status."""
    source, target = Path(options.source), writable("OUT", options.target)
    if target.exists() and source.exists() and target.samefile(source):
        raise UsageError("OUT should be another file than IN: what was rounded does not come back")
    try:
        data = converted(source, options.weights, options.keep)
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(str(error)) from None
    before = source.stat().st_size
    io.write_whole(target, data)
    print(f"{source}: {size(before)}\n{target}: {size(len(data))}, {len(data) / before:.0%}, {options.weights} weights")
    return 0


def converted(source: Path, weights: str, keep: list[str]) -> bytearray:
    """The file of the twin of what a file holds, with everything that others wrote into its metadata."""
    layer = io.load(source)
    if not hasattr(layer, "with_weights"):
        raise ValueError(f"{str(source)!r} holds a {type(layer).__name__}, which has no weights")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "twin.safetensors"
        layer.with_weights(weights, keep=keep).save(path)
        return io.with_metadata(path.read_bytes(), io.metadata_of_others(source))
