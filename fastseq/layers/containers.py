"""What containers of any layers share: `Sequential`, `Graph`."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

from fastseq import checks
from fastseq.layers.base import Composite, Layer, is_ours

SHOWN_WIDTH = 80  # characters of layers in a `repr`, at most


class Container(Composite):
    """A layer made of layers that the caller chose."""

    @property
    def carries_state(self) -> bool:  # type: ignore[override]
        """Whether one of the layers carries a state."""
        return any(layer.carries_state for layer in self._children.values())

    def unstreamable(self) -> str | None:
        """Return why the layers cannot be trained on consecutive chunks of streams; None where they can."""
        return next((why for part in self._children.values() if (why := part.unstreamable()) is not None), None)

    def _become_twin_of_twins(self) -> None:
        """Refuse layers with narrow weights of different types; become a twin where they have those of one type."""
        types = sorted({layer._weight_type for layer in self._children.values()} - {"float32"})
        if len(types) > 1:
            raise ValueError(f"layers should have narrow weights of one type, not of {' and '.join(types)}")
        if types:
            Layer._become_twin(self, types[0])

    @abstractmethod
    def _summary_rows(
        self, prefix: str, timed: bool = True, width: int | None = None
    ) -> list[tuple[str, str, str, int]]:
        """Return the rows, given whether inputs have an axis of time, and the size of their vectors."""

    def _saved_parts(self) -> list[Layer]:
        return [self, *(part for layer in self._children.values() for part in layer._saved_parts())]


def found_twice(layers: Iterable[Layer]) -> Layer | None:
    """Return the first layer that is there twice, itself or in another; None without one."""
    seen: set[int] = set()
    for part in (part for layer in layers for part in _parts(layer)):
        if id(part) in seen:
            return part
        seen.add(id(part))
    return None


def _parts(layer: Layer) -> Iterator[Layer]:
    """Yield a layer and, recursively, its children."""
    yield layer
    if isinstance(layer, Composite):
        for child in layer._children.values():
            yield from _parts(child)


def declares_widths(layer: Layer) -> bool:
    """Return whether the sizes that a layer declares hold: not where a user's subclass has its own ``__call__``."""
    return is_ours(type(layer).__call__)


def locate(error: Exception, name: str, layer: Layer) -> None:
    """Add to the message of an error in which layer it occurred; `name` is what the container calls the layer."""
    if len(error.args) == 1 and isinstance(error.args[0], str):
        error.args = (f"{name}, a {type(layer).__name__}: {error.args[0]}",)


def describe_no_layer(value: object) -> str:
    """Describe a value that should be a layer, with a hint where it is a list."""
    hint = "; layers are given one by one: Sequential(*layers)" if isinstance(value, list | tuple) else ""
    return f"{checks.describe(value)}{hint}"


def check_takes(name: str, layer: Any, count: int) -> None:
    """Raise an error for a layer that cannot be called with `count` inputs."""
    if not callable(layer):
        raise TypeError(f"{name} should be a layer that can be called, not {layer!r}")
    try:
        inspect.signature(layer).bind(*[None] * count)
    except TypeError as error:
        what = "one input" if count == 1 else f"{count} inputs"
        raise TypeError(f"{name} should take {what}, not as a {type(layer).__name__} does: {error}") from None


def shortened(made: list[str]) -> list[str]:
    """Return descriptions of layers for a `repr`: as many as fit, and how many more there are."""
    shown = len(made)
    while shown > 1 and sum(len(text) + 2 for text in made[:shown]) > SHOWN_WIDTH:
        shown -= 1
    return [*made[:shown], *([f"... {len(made) - shown} more"] if shown < len(made) else [])]
