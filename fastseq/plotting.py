"""Pictures of what models make; matplotlib, the extra ``plot``, is imported when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array

__all__ = ["attention_map", "forecast", "gates"]

_COLUMNS, _WIDEST = 4, 20.0  # panels beside each other, and inches of all of them together
_UPRIGHT = 8.0  # inches of the widest panel whose labels stand side by side; those of a wider one are turned
_DPI = 150
_LETTER = 0.08  # inches of a character of a label
_GATES = {
    "i": "input gate i",
    "f": "forget gate f",
    "g": "candidate g",
    "o": "output gate o",
    "r": "reset gate r",
    "z": "update gate z",
    "n": "candidate n",
    "c": "cell state c",
    "h": "output h",
}
_SIGMOIDS = ("i", "f", "o", "r", "z")


def attention_map(
    weights: Any,
    row_tokens: Sequence[str],
    column_tokens: Sequence[str] | None = None,
    *,
    row_label: str = "token that attends (query)",
    column_label: str = "token attended to (key)",
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Draw what tokens attend to: a heat map with a row for each query and a column for each key.

    A weight of 0 is white, the largest weight of all panels is darkest.

    Parameters
    ----------
    weights : array of shape (Tq, Tk), or (heads, Tq, Tk)
        Attention weights of one sequence, as ``return_weights=True`` gives them; a panel for each head.
    row_tokens : sequence of str
        Labels of the Tq rows.
    column_tokens : sequence of str, optional
        Labels of the Tk columns; those of the rows by default.
    row_label, column_label : str
        What rows and columns are, written beside the axes.
    title : str, optional
        What stands above it; that these are attention weights by default.
    path : path, optional
        Where the picture is written.

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
    array = _real("weights", weights)
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
    row_label, column_label = _text("row_label", row_label), _text("column_label", column_label)
    if title is None:
        title = "Attention weights" + (" of each head" if len(heads) > 1 else "")

    upright = max(0.22, 0.06 + _LETTER * max(map(len, columns)))
    margin = 1.1 + _LETTER * max(map(len, rows))
    turned = margin + upright * len(columns) > _UPRIGHT
    width = max(4.0, margin + (0.22 if turned else upright) * len(columns))
    height = max(2.6, 1.1 + 0.22 * len(rows) + (_LETTER * max(map(len, columns)) if turned else 0))
    across = min(_COLUMNS, len(heads), max(1, int(_WIDEST / width)))
    down = -(-len(heads) // across)
    figure = _figure("attention_map", (width * across, height * down))
    panels = figure.subplots(down, across, squeeze=False)
    largest = float(np.max(heads, initial=0, where=np.isfinite(heads))) or 1.0
    image: Any = None
    for head, axes in enumerate(panels.flat):
        if head >= len(heads):
            axes.set_axis_off()
            continue
        image = axes.imshow(heads[head].astype(np.float64), cmap="Greys", vmin=0, vmax=largest, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, rotation=90 if turned else 0, fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.tick_params(length=0)
        if len(heads) > 1:
            axes.set_title(f"head {head}", fontsize=9)
    figure.supxlabel(column_label, fontsize=9)
    figure.supylabel(row_label, fontsize=9)
    _scale(figure, image, panels, min(0.8, 4 / (height * down)), "attention weight")
    return _finished(figure, title, path)


def gates(
    gates: Mapping[str, Any],
    tokens: Sequence[str] | None = None,
    *,
    row: int = 0,
    layer: int = 0,
    length: int | None = None,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Draw the gates and states of a recurrent layer over time: a heat map for each, a row for each hidden unit.

    Gates are white where they are closed (0) and dark where they are open (1); candidates and states are blue where
    they are negative, white at 0 and red where they are positive.

    Parameters
    ----------
    gates : mapping from str to arrays of shape (B, T, layers, H), or (T, layers, H)
        What ``layer(x, return_gates=True)`` returned last.
    tokens : sequence of str, optional
        Labels of the steps; their numbers by default.
    row : int
        Which sequence of the batch.
    layer : int
        Which layer; of a bidirectional one forward and reverse count as two.
    length : int, optional
        How many steps are drawn; all by default.
    title : str, optional
        What stands above it.
    path : path, optional
        Where the picture is written.

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
    >>> y, state, gates = fs.LSTM(2, 8, seed=0)(np.ones((1, 20, 2), "float32"), return_gates=True)
    >>> figure = fs.plotting.gates(gates)  # doctest: +SKIP
    """
    if not isinstance(gates, Mapping) or not gates:
        raise TypeError(f"gates should be what return_gates=True gives, a mapping, not {checks.describe(gates)}")
    arrays = {str(name): _real(f"gates[{name!r}]", array) for name, array in gates.items()}
    shape = next(iter(arrays.values())).shape
    if len(shape) not in (3, 4) or 0 in shape or any(array.shape != shape for array in arrays.values()):
        shapes = ", ".join(str(array.shape) for array in arrays.values())
        raise ValueError(f"gates should hold arrays of one shape, (B, T, layers, H) or (T, layers, H), not {shapes}")
    if len(shape) == 3:
        arrays = {name: array[None] for name, array in arrays.items()}
    batch, time, layers, _ = next(iter(arrays.values())).shape
    row, layer = _index("row", row, batch), _index("layer", layer, layers)
    shown = time if length is None else checks.size("length", length, 1)
    if shown > time:
        raise ValueError(f"length should be at most {time}, the steps of gates, not {shown}")
    labels = None if tokens is None else _labels("tokens", tokens, shown, "gates")
    if title is None:
        title = "Gates and states over time" + (f", layer {layer}" if layers > 1 else "")

    across = 2
    down = -(-len(arrays) // across)
    width = min(_WIDEST / across, max(4.2, 1.4 + 0.2 * shown))
    figure = _figure("gates", (width * across, 2.1 * down + 0.5))
    from matplotlib.ticker import MaxNLocator

    panels = figure.subplots(down, across, squeeze=False, sharex=True)
    for axes, (name, array) in zip(panels.flat, arrays.items(), strict=False):
        values = array[row, :shown, layer].T.astype(np.float64)
        limit = float(np.max(np.abs(values), initial=0, where=np.isfinite(values))) or 1.0
        how = (
            {"cmap": "Greys", "vmin": 0, "vmax": 1}
            if name in _SIGMOIDS
            else {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
        )
        image = axes.imshow(values, aspect="auto", interpolation="nearest", **how)
        axes.set_title(_GATES.get(name, name), fontsize=9)
        axes.tick_params(labelsize=8, labelbottom=True)
        if labels is not None:
            turned = max(map(len, labels)) * _LETTER * shown > width - 1.2
            axes.set_xticks(range(shown), labels, rotation=90 if turned else 0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        _scale(figure, image, axes)
    for axes in list(panels.flat)[len(arrays) :]:
        axes.set_axis_off()
    figure.supxlabel("time step" if labels is None else "input", fontsize=9)
    figure.supylabel("hidden unit", fontsize=9)
    return _finished(figure, title, path)


def forecast(
    history: Any,
    forecasts: Any,
    *,
    bands: Any = None,
    observed: Any = None,
    times: Any = None,
    label: str = "value",
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Draw a series and the forecasts that go on from its end.

    Parameters
    ----------
    history : array of shape (T,)
        The series up to where the forecasts were made.
    forecasts : array of shape (horizon,), or mapping from str to such arrays
        What was forecast; by name where there are several. The first is drawn thick, the others pale.
    bands : pair of arrays (horizon,), or mapping from str to pairs, optional
        The lower and upper ends of an interval around each step of a forecast, shaded.
    observed : array of shape (n,), optional
        What came after `history`, to compare with.
    times : array of shape (T + horizon,) or longer, optional
        Where the values of the series and then of the forecasts stand on the axis of time; 0, 1, ... by default.
    label : str
        What the values are, written beside the axis.
    title : str, optional
        What stands above it.
    path : path, optional
        Where the picture is written.

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
    >>> t = np.arange(60)
    >>> figure = fs.plotting.forecast(np.sin(t[:40]), np.sin(t[40:]))  # doctest: +SKIP
    """
    series = _line("history", history)
    lines = {
        name: _line(f"forecasts[{name!r}]" if name else "forecasts", line) for name, line in _named(forecasts).items()
    }
    if not lines:
        raise ValueError("forecasts should hold at least one, not none")
    intervals: dict[str, tuple[Array, Array]] = {}
    for name, pair in ({} if bands is None else _named(bands)).items():
        which = f"bands[{name!r}]" if name else "bands"
        if name not in lines:
            raise ValueError(f"{which} should belong to one of the forecasts {list(lines)}")
        if not isinstance(pair, Sequence | np.ndarray) or len(pair) != 2:
            raise TypeError(f"{which} should be a pair of arrays, lower and upper, not {checks.describe(pair)}")
        lower, upper = (_line(which, end) for end in pair)
        if not len(lower) == len(upper) == len(lines[name]):
            raise ValueError(f"{which} should have {len(lines[name])} steps, not {len(lower)} and {len(upper)}")
        intervals[name] = lower, upper
    later = None if observed is None else _line("observed", observed)
    end = len(series)
    last = end + max(len(line) for line in [*lines.values(), *([] if later is None else [later])])
    where = np.arange(last) if times is None else checks.as_array("times", times)
    if where.ndim != 1 or len(where) < last:
        raise ValueError(f"times should have at least {last} values, those of the forecasts too, not {where.shape}")

    figure = _figure("forecast", (9.0, 3.8))
    axes = figure.subplots()
    axes.plot(where[:end], series, color="black", linewidth=1, label="observed")
    # All that follows begins with the last value, so that no line has a gap.
    if later is not None:
        axes.plot(where[end - 1 : end + len(later)], [series[-1], *later], color="black", linewidth=1, linestyle=":")
    for i, (name, line) in enumerate(lines.items()):
        at = where[end - 1 : end + len(line)]
        if name in intervals:
            ends = [[series[-1], *end_of] for end_of in intervals[name]]
            axes.fill_between(at, *ends, color=f"C{i}", alpha=0.2, linewidth=0)
        how = {"linewidth": 2.4, "zorder": 3} if i == 0 else {"linewidth": 1.1, "alpha": 0.5}
        axes.plot(at, [series[-1], *line], color=f"C{i}", label=_shown(name) or "forecast", **how)
    axes.axvline(where[end - 1], color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="time", ylabel=_text("label", label))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return _finished(figure, "Forecast from the end of the series" if title is None else title, path)


def _figure(function: str, inches: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            f"{function} draws with matplotlib, which is not installed: pip install 'fastseq[plot]'"
        ) from None
    return Figure(figsize=inches, layout="constrained")


def _scale(figure: Any, image: Any, axes: Any, shrink: float = 1.0, label: str = "") -> None:
    """Say beside some panels which colour is which value."""
    bar = figure.colorbar(image, ax=axes, shrink=shrink)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _finished(figure: Any, title: str, path: str | os.PathLike[str] | None) -> Any:
    """Put a title above a figure, in lines that its width has room for, and write it where that is asked for."""
    figure.suptitle(fill(_text("title", title), max(20, int(11 * figure.get_figwidth()))), fontsize=11)
    if path is not None:
        figure.savefig(checks.path("path", path), dpi=_DPI)
    return figure


def _real(name: str, value: Any) -> Array:
    array = checks.as_array(name, value)
    if array.dtype.kind != "f":
        raise TypeError(f"{name} should hold real floating numbers, not {array.dtype}")
    return array


def _line(name: str, value: Any) -> Array:
    """A series of real or whole numbers, (T,) or (T, 1), with something in it."""
    array = checks.as_array(name, value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} should hold real numbers, not {array.dtype}")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} should be of shape (T,), with at least one value, not {array.shape}")
    return array.astype(np.float64)


def _named(value: Any) -> dict[str, Any]:
    """What stands in a mapping by name; anything else has no name."""
    return {str(name): one for name, one in value.items()} if isinstance(value, Mapping) else {"": value}


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} should be a string, not {checks.describe(value)}")
    return _shown(value)


def _shown(text: str) -> str:
    """A text in which nothing is markup; a line break is shown as one."""
    return text.replace("\n", "⏎").replace("$", r"\$")


def _index(name: str, value: Any, count: int) -> int:
    index = checks.size(name, value)
    if index >= count:
        raise ValueError(f"{name} should be from 0 to {count - 1}, as gates has {count}, not {index}")
    return index


def _labels(name: str, tokens: Any, count: int, where: str = "weights") -> list[str]:
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Sequence | np.ndarray):
        raise TypeError(f"{name} should be a sequence of strings, not {checks.describe(tokens)}")
    if len(tokens) != count:
        raise ValueError(f"{name} should have {count} tokens, as {where} has, not {len(tokens)}")
    return [_shown(str(token)) for token in tokens]
