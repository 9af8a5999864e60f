"""Pictures of what models make; matplotlib, the extra ``plot``, is imported when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastseq import checks

__all__ = ["attention_map"]

_COLUMNS = 4  # panels beside each other


def attention_map(
    weights: Any,
    row_tokens: Sequence[str],
    column_tokens: Sequence[str] | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
    title: str | None = None,
) -> Any:
    """Draw what tokens attend to: a heat map with a row for each query and a column for each key.

    Parameters
    ----------
    weights : array of shape (Tq, Tk), or (heads, Tq, Tk)
        Attention weights of one sequence, as ``return_weights=True`` gives them; a panel for each head.
    row_tokens : sequence of str
        Labels of the Tq rows.
    column_tokens : sequence of str, optional
        Labels of the Tk columns; those of the rows by default.
    path : path, optional
        Where the picture is written.
    title : str, optional
        What stands above it.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        matplotlib is not installed: take the extra ``plot``.
    TypeError, ValueError
        Naming the argument, what it was and what it should be.

    Examples
    --------
    >>> import numpy as np
    >>> import fastseq as fs
    >>> figure = fs.plotting.attention_map(np.eye(2), ["to", "be"])  # doctest: +SKIP
    """
    array = checks.as_array("weights", weights)
    if array.dtype.kind != "f":
        raise TypeError(f"weights should hold real floating numbers, not {array.dtype}")
    if array.ndim not in (2, 3) or not array.size:
        hint = "; draw the sequences of a batch one by one" if array.ndim == 4 else ""
        raise ValueError(f"weights should be of shape (Tq, Tk) or (heads, Tq, Tk), not {array.shape}{hint}")
    heads = array[None] if array.ndim == 2 else array
    rows = _labels("row_tokens", row_tokens, heads.shape[1])
    columns = _labels(
        "column_tokens" if column_tokens is not None else "row_tokens, which label the columns too,",
        row_tokens if column_tokens is None else column_tokens,
        heads.shape[2],
    )
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "attention_map draws with matplotlib, which is not installed: pip install 'fastseq[plot]'"
        ) from None

    across = min(_COLUMNS, len(heads))
    down = -(-len(heads) // across)
    width, height = 1.2 + 0.22 * len(columns), 1.0 + 0.22 * len(rows)
    figure = Figure(figsize=(max(3.0, width) * across, max(2.6, height) * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    image: Any = None
    for head, axes in enumerate(panels.flat):
        if head >= len(heads):
            axes.set_axis_off()
            continue
        image = axes.imshow(heads[head].astype(np.float64), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.tick_params(length=0)
        if len(heads) > 1:
            axes.set_title(f"head {head}", fontsize=9)
    figure.colorbar(image, ax=panels, shrink=0.8, label="weight")
    if title is not None:
        figure.suptitle(title)
    if path is not None:
        figure.savefig(checks.path("path", path), dpi=110)
    return figure


def _labels(name: str, tokens: Any, count: int) -> list[str]:
    """Labels as text in which nothing is markup; a line break is shown as one."""
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Sequence | np.ndarray):
        raise TypeError(f"{name} should be a sequence of strings, not {checks.describe(tokens)}")
    if len(tokens) != count:
        raise ValueError(f"{name} should have {count} tokens, as weights has, not {len(tokens)}")
    return [str(token).replace("\n", "⏎").replace("$", r"\$") for token in tokens]
