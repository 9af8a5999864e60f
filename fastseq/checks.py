"""The door: every argument of a public call is checked here, once, before anything is computed.

A check returns the value in the form the operations want, or raises a `TypeError` or `ValueError` that names
the argument, what it was and what it should be; sizes that overflow are an `OverflowError`. Below the door nothing
is checked again.
"""

from __future__ import annotations

import dis
import functools
import math
import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_MAX_INT64 = np.iinfo(np.int64).max
_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_RAISE = dis.opmap["RAISE_VARARGS"]

P = ParamSpec("P")
R = TypeVar("R")


def short_traceback(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function so that the traceback of an argument error ends at the line of its caller.

    That is an error which a ``raise`` statement of this package raised: then the frames of the package are left out of
    the traceback, and those of others in between, as of a callback, stay. All other errors keep every frame. Where one
    decorated function calls another, the outermost decides.
    """

    @functools.wraps(function)
    def short(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError, OverflowError, OSError) as error:
            if not is_of_package(sys._getframe(1)):
                error.__traceback__ = _shortened(error.__traceback__)
            raise  # of an error with this traceback; a `raise` without an argument adds no frame to it

    return short


def _shortened(whole: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames of this package, if it ends in a ``raise`` of the package."""
    steps = []
    while whole is not None:
        steps.append(whole)
        whole = whole.tb_next
    last = steps[-1]
    code = last.tb_frame.f_code
    if not code.co_filename.startswith(_PACKAGE) or code.co_code[last.tb_lasti] != _RAISE:
        return steps[0]
    result = None
    for step in reversed(steps):
        if not is_of_package(step.tb_frame):
            result = TracebackType(result, step.tb_frame, step.tb_lasti, step.tb_lineno)
    return result


def is_of_package(frame: FrameType) -> bool:
    """Whether it is code of this package that runs there."""
    return frame.f_code.co_filename.startswith(_PACKAGE)


def warn(message: str) -> None:
    """Warn of what is allowed and can hardly be meant, at the line of the caller of this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and is_of_package(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def are(names: Iterable[str], what: str) -> list[str]:
    """What is the matter with some names, as a list of no or one phrase: "bias is missing", "a and b are missing"."""
    *others, last = [*names] or [""]
    if not last:
        return []
    return [f"{', '.join(others)} and {last} are {what}" if others else f"{last} is {what}"]


def describe(value: object) -> str:
    """What a value is, for a message: its type, and for arrays the dtype and shape."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} of shape {value.shape}"
    try:
        return f"{type(value).__name__} {value!r:.80}"
    except Exception:  # a repr may do anything; Python's own integers refuse from 4300 digits on
        return f"a {type(value).__name__}"


def size(name: str, value: Any, least: int = 0) -> int:
    """A whole number, at least `least`; Python's and NumPy's integers, no bool."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} should be an integer, not {describe(value)}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} should be an integer, not {describe(value)}") from None
    if number < least:
        raise ValueError(f"{name} should be at least {least}, not {describe(number)}")
    if number > _MAX_INT64:
        raise OverflowError(f"{name} should fit 64 bits, not be {describe(number)}")
    return number


def flag(name: str, value: Any) -> bool:
    """True or False, Python's or NumPy's."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} should be True or False, not {describe(value)}")
    return bool(value)


def fraction(name: str, value: Any) -> float:
    """A real number in 0 <= value < 1."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} should be a number, not {describe(value)}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} should be in [0, 1), not {describe(value)}")
    return float(value)


def number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> float:
    """A finite real number: at least `least`, more than `above`, less than `below`, where those are given."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} should be a number, not {describe(value)}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    fits = (least is None or result >= least) and (above is None or result > above)
    if not (math.isfinite(result) and fits and (below is None or result < below)):
        bounds = [f"at least {least:g}"] if least is not None else []
        bounds += [f"more than {above:g}"] if above is not None else []
        bounds += [f"less than {below:g}"] if below is not None else []
        raise ValueError(f"{name} should be {' and '.join(bounds) or 'finite'}, not {describe(value)}")
    return result


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """One of some names."""
    if not isinstance(value, str):
        raise TypeError(f"{name} should be one of {', '.join(map(repr, allowed))}, not {describe(value)}")
    if value not in allowed:
        raise ValueError(f"{name} should be one of {', '.join(map(repr, allowed))}, not {describe(value)}")
    return value


def seed(name: str, value: Any) -> int | None:
    """A seed: None or an integer from 0 on."""
    return None if value is None else size(name, value)


def real_dtype(name: str, value: Any, allowed: Sequence[str] | None) -> np.dtype[Any]:
    """A real floating dtype in native byte order; one of `allowed`, where that is given."""
    try:
        dtype: np.dtype[Any] = np.dtype(value)
    except Exception:  # NumPy parses strings, and raises what its parser raises
        raise TypeError(f"{name} should be a floating dtype, not {describe(value)}") from None
    if value is None or dtype.kind != "f":
        raise TypeError(f"{name} should be a floating dtype, not {describe(value)}")
    dtype = np.dtype(dtype.type)  # in native byte order, and the one object that arrays of this dtype share
    if allowed is not None and dtype.name not in allowed:
        raise TypeError(f"{name} should be {' or '.join(allowed)}, not {dtype.name}")
    return dtype


def as_array(name: str, value: Any) -> Array:
    """Any array; what cannot be one is named."""
    try:
        return np.asarray(value)
    except MemoryError:
        raise
    except TypeError as error:
        raise TypeError(f"{name} should be an array, not a {type(value).__name__}: {error}") from None
    except Exception as error:  # a foreign __array__ may raise anything
        raise ValueError(f"{name} should be an array, not a {type(value).__name__}: {error}") from None


def real_array(name: str, value: Any, dtype: np.dtype[Any]) -> Array:
    """A real array as `dtype`, aligned and in native byte order, its last axis contiguous.

    Integers are none: they are more likely to be ids, given to the wrong layer.
    An array that is all that already comes back as it is; others are copied, inputs are never modified.
    """
    if type(value) is np.ndarray and value.dtype is dtype and value.flags.carray:
        return value  # nearly always, and worth a microsecond to a stream of single steps
    if type(value) is not np.ndarray or value.dtype is not dtype:
        given, value = value, as_array(name, value)
        if value.dtype.kind != "f":
            whole = value.dtype.kind in "iu" and isinstance(given, np.ndarray)
            hint = f'; {name}.astype("{dtype.name}") makes them of integers' if whole else ""
            raise TypeError(f"{name} should hold real floating numbers, not {value.dtype}{hint}")
        with np.errstate(all="ignore"):
            value = value.astype(dtype, copy=False)
    flags = value.flags
    if (not flags.c_contiguous and value.ndim and value.strides[-1] != dtype.itemsize) or not flags.aligned:
        value = np.ascontiguousarray(value) if flags.aligned else value.copy()
    array: Array = value
    return array


def ragged(name: str, value: Any, lengths: Any) -> tuple[Any, Any]:
    """A list of rows of unequal lengths as one array, padded with zeros, and the lengths; all else as it is."""
    if not isinstance(value, list | tuple) or not all(isinstance(row, list | tuple | np.ndarray) for row in value):
        return value, lengths
    if any(isinstance(row, np.ndarray) and not row.ndim for row in value) or len({len(row) for row in value}) < 2:
        return value, lengths
    if lengths is not None:
        raise ValueError(f"lengths should be None where {name} is a list of rows of unequal lengths, which tell them")
    rows = [as_array(f"{name}[{i}]", row) for i, row in enumerate(value)]
    first = next(i for i, row in enumerate(rows) if len(row))
    rest = rows[first].shape[1:]
    for i, row in enumerate(rows):
        if len(row) and row.shape[1:] != rest:
            form = ", ".join(["T", *map(str, rest)]) + ("" if rest else ",")
            raise ValueError(f"{name}[{i}] should be of shape ({form}) as {name}[{first}] is, not {row.shape}")
        if len(row) and row.dtype.kind not in "fiu":
            raise TypeError(f"{name}[{i}] should hold numbers, not {row.dtype}")
    counts = np.array([len(row) for row in rows], np.int64)
    array = np.zeros((len(rows), int(counts.max()), *rest), np.result_type(*(row for row in rows if len(row))))
    for into, row in zip(array, rows, strict=True):
        into[: len(row)] = row.reshape(len(row), *rest)
    return array, counts


def like(name: str, value: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """A real array as `dtype`, contiguous, of a shape that is known: a gradient, targets."""
    array = real_array(name, value, dtype)
    if array.shape != shape:
        raise ValueError(f"{name} should be of shape {shape}, not {array.shape}")
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def integers(name: str, value: Any) -> Array:
    """An array of any integer dtype; bool is none."""
    array = as_array(name, value)
    if array.dtype.kind not in "iu" and (array.size or array.dtype.kind == "b"):
        raise TypeError(f"{name} should hold integers, not {array.dtype}")
    return array


def ids(name: str, value: Any, count: int, counted: Array | None = None) -> Array:
    """Numbers of `count` things, of any integer dtype: a contiguous copy as int64.

    Only those where `counted` is True are looked at, if it is given; the others become -1.
    """
    array = integers(name, value)
    wrong = (array < 0) | (array >= count)
    if counted is not None:
        wrong &= counted
    if wrong.any():
        place = np.unravel_index(int(np.argmax(wrong)), array.shape)
        where = f"{name}[{', '.join(map(str, place))}]" if place else name
        raise ValueError(f"{name} should be in 0..{count - 1}, but {where} is {array[place]}")
    numbers = array.astype(np.int64, order="C")  # always a copy: a tape may keep it, and it is aligned
    return numbers if counted is None else np.where(counted, numbers, -1)


def lengths(value: Any, batch: int, time: int, name: str = "lengths") -> Array:
    """Lengths of the rows of a batch: (batch,) of any integer dtype, each in 0..time."""
    array = integers(name, value)
    if array.shape != (batch,):
        hint = ""
        if array.shape == (time,):
            hint = "; x looks like (T, B, I): the batch comes first here, pass x.swapaxes(0, 1)"
        raise ValueError(f"{name} should be of shape ({batch},), one a row of the batch, not {array.shape}{hint}")
    if batch and (array.min() < 0 or array.max() > time):
        row = int(np.flatnonzero((array < 0) | (array > time))[0])
        raise ValueError(f"{name} should be in 0..{time}, but {name}[{row}] is {array[row]}")
    return array.astype(np.int64)


def resets(value: Any, batch: int, time: int, batched: bool) -> Array:
    """Where states go back to zeros: (batch, time) booleans; (time,) where x has no batch."""
    array = as_array("resets", value)
    if array.dtype.kind != "b" and (array.size or isinstance(value, np.ndarray)):
        raise TypeError(f"resets should hold booleans, not {array.dtype}")
    wanted = (batch, time) if batched else (time,)
    if array.shape != wanted:
        hint = ""
        if array.shape == (time, batch):
            hint = "; it looks like (T, B): the batch comes first here, pass swapaxes(0, 1)"
        raise ValueError(f"resets should be of shape {wanted}, one a step, not {array.shape}{hint}")
    return np.array(array, dtype=bool, order="C").reshape(batch, time)


def mask(name: str, value: Any, dtype: np.dtype[Any], shape: tuple[int, int, int, int]) -> Array:
    """A mask of scores (B, heads, Tq, Tk), with its own sizes on four axes, the last one contiguous.

    Booleans, True = may attend; or real numbers, which come as `dtype`, to add to the scores.
    """
    array = as_array(name, value)
    if array.dtype.kind not in "bf":
        raise TypeError(
            f"{name} should hold booleans, True where a query may attend to a key, or real floating numbers to add to"
            f" the scores, not {array.dtype}"
        )
    own = (1,) * (4 - array.ndim) + array.shape
    if len(own) != 4 or any(n not in (1, whole) for n, whole in zip(own, shape, strict=True)):
        raise ValueError(f"{name} should be of a shape that broadcasts to {shape}, not {array.shape}")
    if array.dtype.kind == "f":
        array = real_array(name, array, dtype)
    elif array.ndim and array.strides[-1] != 1:
        array = np.ascontiguousarray(array)
    return array.reshape(own)


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """A mapping from strings."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} should be a mapping from names to arrays, not {describe(value)}")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{name} should have strings as names, not {describe(key)}")
    return value


def path(name: str, value: Any) -> str:
    """A path of the file system; not a file descriptor."""
    try:
        return os.fsdecode(value)
    except TypeError:
        raise TypeError(f"{name} should be a path, not {describe(value)}") from None
