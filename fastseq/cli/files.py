"""Files that options name."""

from __future__ import annotations

import os
from pathlib import Path

from fastseq.bench import UsageError


def writable(option: str, text: str) -> Path:
    """The path an option names, if a file can be put there."""
    path = Path(text)
    try:
        if path.is_dir():
            raise UsageError(f"{option} should name a file, but {text} is a directory")
        if path.exists() and not path.is_file():
            # It will be replaced by renaming, which must not happen to a device.
            raise UsageError(f"{option} should name a plain file, which {text} is not")
        target = path.resolve()
        if not os.access(target if target.exists() else target.parent, os.W_OK) or not target.parent.is_dir():
            raise UsageError(f"{option}: {text} cannot be written")
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{option}: {text!r} cannot be written: {error}") from None
    return path
