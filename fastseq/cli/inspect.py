"""``fastseq inspect``: what a file or folder holds, of any format that is read."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastseq import formats
from fastseq.bench import UsageError
from fastseq.cli.files import writable
from fastseq.cli.table import counted, size
from fastseq.formats import pytorch
from fastseq.io import write_whole

_LINES = 40  # of the description


def run(options: Namespace) -> int:
    """The command; returns the exit status."""
    path = Path(options.file)
    target = None if options.json is None else writable("--json", options.json)
    try:
        found = report(path, options.key)
        text, whole = "\n".join(lines(path, found)), json.dumps(found, indent=2, default=str)
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(printable(str(error))) from None
    except RecursionError:
        raise UsageError(f"{printable(str(path))}: what it says of itself is nested too deep") from None
    if target is not None:
        write_whole(target, f"{whole}\n".encode())
    print(text)
    return 0


def report(path: Path, key: str | None) -> dict[str, Any]:
    """What a file holds, as JSON has it."""
    format = formats.recognise(path)
    if key is not None and format != "pytorch":
        raise UsageError(f"--key is for checkpoints of PyTorch, and {path} is {formats.FORMATS[format][0]}")
    contents = formats.read(path) if key is None else pytorch.read(path, key=key)
    description = dict(contents.description)
    stored = description.pop("tensors", None)
    if stored is None:
        stored = {name: {"type": array.dtype.name, "shape": array.shape} for name, array in contents.arrays.items()}
    tensors = {
        name: {"type": one["type"], "shape": list(one["shape"]), "bytes": bytes_of(one["type"], one["shape"])}
        for name, one in stored.items()
    }
    return {"file": str(path), "format": contents.format, "tensors": tensors, "description": description}


def bytes_of(type: str, shape: Iterable[int]) -> int:
    """The bytes of a tensor before compression; the name of its type ends in the bits of a number."""
    digits = "".join(filter(str.isdigit, type))
    return math.prod(shape) * int(digits or 8) // 8


def lines(path: Path, found: Mapping[str, Any]) -> list[str]:
    """The report as text."""
    tensors = found["tensors"]
    stored = sum(tensor["bytes"] for tensor in tensors.values())
    numbers = sum(math.prod(tensor["shape"]) for tensor in tensors.values())
    cells = [
        (printable(name), " × ".join(map(str, tensor["shape"])) or "one number", tensor["type"], size(tensor["bytes"]))
        for name, tensor in tensors.items()
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    table = [
        f"  {name:{widths[0]}}  {shape:{widths[1]}}  {type:{widths[2]}}  {octets:>{widths[3]}}"
        for name, shape, type, octets in cells
    ]
    return [
        f"{printable(str(path))}: {formats.FORMATS[found['format']][0]}",
        f"{counted(len(tensors), 'tensor')}, {numbers:,} numbers, {size(stored)}",
        *table,
        *described(found["description"]),
    ]


def described(description: Mapping[str, Any]) -> list[str]:
    """The description as lines, an entry each, the first of them where there are many."""
    written = list(entries("", description))
    more = len(written) - _LINES
    return written[:_LINES] if more <= 0 else [*written[:_LINES], f"and {more} more, which --json FILE writes"]


def entries(prefix: str, value: Any) -> Iterable[str]:
    """A line for each value in a description, with the names that lead to it."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from entries(f"{prefix}.{name}" if prefix else str(name), inner)
    elif value not in (None, "", {}, []):
        text = printable(value if isinstance(value, str) else json.dumps(value))
        yield f"{printable(prefix)}: {text if len(text) <= 100 else text[:97] + '...'}"


def printable(text: str) -> str:
    """Text of a file without what a terminal would obey."""
    return text if text.isprintable() else ascii(text)[1:-1]
