"""Settings of layers and models, each declared once: a line in the body of a class.

>>> class Linear(Configured):
...     in_features: int = size(doc="I.")
...     bias: bool = flag(default=True, doc="Whether there is b.")
...     _: KW_ONLY
...     seed: int | None = random_seed(default=None, doc="Fixes the initial parameters.")

From it follow an argument of ``__init__``, its check, an attribute, an entry of the saved configuration and of `repr`,
and an entry of the class's documentation. Type checkers see the arguments as those of a dataclass: settings of base
classes come first, those after ``_: KW_ONLY`` are passed by name. `Configured._resolve` checks what depends on several.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY as KW_ONLY
from dataclasses import dataclass, replace
from types import FunctionType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from fastseq import checks

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform as dataclass_transform
else:

    def dataclass_transform(**_):
        """Mark a class for type checkers, as `typing.dataclass_transform` does from Python 3.11 on."""
        return lambda kind: kind


REQUIRED: Any = inspect.Parameter.empty

Given = TypeVar("Given")
Kept = TypeVar("Kept")


class Resolved(Generic[Given, Kept]):
    """The type of a setting whose attribute is of another type than the argument: ``Resolved[int | None, int]``."""

    if TYPE_CHECKING:

        def __get__(self, layer: object, kind: Any = None) -> Kept: ...

        def __set__(self, layer: object, value: Given) -> None: ...


Dtype = Resolved[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Setting:
    """One setting: its check, default and documentation."""

    check: Callable[[str, Any], Any]  # of name and value: the attribute
    default: Any
    takes: str  # the type of the argument, for the signature
    form: str  # the same, for the documentation
    doc: str
    before: str | None = None  # the setting that it precedes in the signature; None: the order of declaration
    by_name: bool = False  # whether it is passed by name only

    def documented(self, name: str) -> str:
        """Return its entry of the documentation."""
        text = textwrap.fill(self.doc, 115, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
        return f"{name} : {self.form}{', optional' if self.default is None else ''}\n{text}"


def checked(
    check: Callable[[str, Any], Any],
    *,
    default: Any = REQUIRED,
    takes: str,
    form: str,
    doc: str,
    before: str | None = None,
    optional: bool = False,
) -> Any:
    """Declare a setting whose attribute is what `check` returns for name and value.

    None stays None where it is the default, or where `optional` allows it beside another default.
    """
    if default is not None and not optional:
        return Setting(check, default, takes, form, doc, before)

    def check_given(name: str, value: Any) -> Any:
        return None if value is None else check(name, value)

    form = form if default is None else f"{form} or None"
    return Setting(check_given, default, f"{takes} | None", form, doc, before)


def size(*, default: Any = REQUIRED, least: int = 1, limit: int | None = None, doc: str, before: str = "") -> Any:
    """Declare a whole number, from `least` to `limit`."""

    def check(name: str, value: Any) -> int:
        number = checks.size(name, value, least)
        if limit is not None and number > limit:
            raise ValueError(f"{name} should be at most {limit}, not {number}")
        return number

    return checked(check, default=default, takes="int", form="int", doc=doc, before=before or None)


def flag(*, default: bool, doc: str, before: str | None = None) -> Any:
    """Declare True or False."""
    return checked(checks.flag, default=default, takes="bool", form="bool", doc=doc, before=before)


def fraction(*, default: float, doc: str) -> Any:
    """Declare a number in [0, 1)."""
    return checked(checks.fraction, default=default, takes="float", form="float in [0, 1)", doc=doc)


def number(*, default: float | None, least: float | None = None, above: float | None = None, doc: str) -> Any:
    """Declare a finite number, at least `least` or more than `above`."""

    def check(name: str, value: Any) -> float:
        return checks.number(name, value, least=least, above=above)

    return checked(check, default=default, takes="float", form="float", doc=doc)


def choice(
    allowed: Sequence[str], *, default: str | None, doc: str, before: str | None = None, optional: bool = False
) -> Any:
    """Declare one of some names."""

    def check(name: str, value: Any) -> str:
        return checks.choice(name, value, allowed)

    form = _either(allowed)
    return checked(check, default=default, takes="str", form=form, doc=doc, before=before, optional=optional)


def floating(*, default: str = "float32", of: str = "parameters and outputs", doc: str = "") -> Any:
    """Declare the dtype of a layer or model; `Configured._settle` asks the backend whether it takes it."""
    doc = doc or f"Of {of}. Inputs of another real dtype are converted."
    return Setting(lambda _, value: value, default, "Any", _either(("float32", "float64")), doc)


def random_seed(*, default: int | None = None, doc: str) -> Any:
    """Declare a seed: an integer from 0 on, or None."""
    return Setting(checks.seed, default, "int | None", "int", doc)


def _either(names: Sequence[str]) -> str:
    return "{" + ", ".join(f'"{name}"' for name in names) + "}"


def declared(namespace: dict[str, Any]) -> dict[str, Setting]:
    """Take the settings out of the body of a class."""
    by_name, found = False, {}
    for name in namespace.get("__annotations__", {}):
        by_name = by_name or name == "_"
        if isinstance(namespace.get(name), Setting):
            found[name] = replace(namespace.pop(name), by_name=by_name)
    return found


def collected(kind: type) -> dict[str, Setting]:
    """Return the settings of a class and its bases, in the order of the signature."""
    found: dict[str, Setting] = {}
    for base in reversed(kind.__mro__):
        found.update(vars(base).get("_declared", {}))
    names = sorted(found, key=lambda name: found[name].by_name)
    for name in names.copy():
        before = found[name].before
        if before is not None:
            names.remove(name)
            names.insert(names.index(before), name)
    return {name: found[name] for name in names}


def constructor(kind: type, settings: Mapping[str, Setting]) -> FunctionType:
    """Write ``__init__`` of a class, as `dataclasses` does."""
    arguments = []
    for name, one in settings.items():
        if one.by_name and "*" not in arguments:
            arguments.append("*")
        arguments.append(name if one.default is REQUIRED else f"{name}=_defaults[{name!r}]")
    given = ", ".join(f"{name!r}: {name}" for name in settings)
    defaults = {name: one.default for name, one in settings.items()}
    names: dict[str, Any] = {"_defaults": defaults, "__name__": kind.__module__}
    exec(f"def __init__(self, {', '.join(arguments)}):\n    self._settle({{{given}}})", names)
    made: FunctionType = names["__init__"]
    made.__annotations__ = {**{name: one.takes for name, one in settings.items()}, "return": "None"}
    made.__qualname__ = f"{kind.__qualname__}.__init__"
    made.generated = True  # type: ignore[attr-defined]
    return made


def documentation(doc: str, settings: Mapping[str, Setting]) -> str:
    """Return the documentation of a class with an entry for each setting, before its other sections."""
    text = inspect.cleandoc(doc)
    titles = ("Attributes", "Notes", "References")
    places = [place for title in titles if (place := text.find(f"\n{title}\n{'-' * len(title)}")) >= 0]
    place = min(places, default=len(text))
    entries = "\n".join(one.documented(name) for name, one in settings.items())
    head, rest = text[:place].rstrip(), text[place:].lstrip("\n")
    return f"{head}\n\nParameters\n----------\n{entries}\n" + (f"\n{rest}\n" if rest else "")
