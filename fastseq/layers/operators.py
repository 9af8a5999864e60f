"""Operators of ONNX as layers for graphs, in NumPy and for inference alone.

`ONNX` has by the name of an operator what makes its layer; arguments are the attributes of the operator, and those
inputs that are constant in files (shapes, axes). Semantics are those of operator set 18. What a layer with compiled
operations computes, as ReLU, is that layer.

An operator computes on whole arrays, whatever their axes, and of any real, integer or boolean dtype: it takes no
`lengths`, and a graph with one has no `step`. For another one write a subclass of `Operator` with ``_call(*arrays)``.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.layers.activation import ReLU, Sigmoid, Tanh
from fastseq.layers.base import SEQUENCE, Configured
from fastseq.layers.connectable import OUTPUT, Timed
from fastseq.layers.settings import KW_ONLY, Dtype, checked, choice, flag, floating

__all__ = [
    "ONNX",
    "Apply",
    "ArgReduce",
    "Cast",
    "ConcatAxis",
    "Constant",
    "Expand",
    "Flatten",
    "Gather",
    "MatMul",
    "Operator",
    "Reduce",
    "Reshape",
    "Shape",
    "SliceAxes",
    "SoftmaxAxis",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
]

MANY = 1 << 16  # inputs, where an operator takes any number
_INT64 = np.iinfo(np.int64)


class Operator(Configured):
    """The base of operators; a subclass implements `_call`."""

    time = SEQUENCE

    _counts: ClassVar[tuple[int, int]] = (1, 1)  # the least and the largest number of inputs

    _: KW_ONLY
    dtype: Dtype = floating(default="float32", of="the graph")

    @abstractmethod
    def _call(self, *arrays: Array) -> Any:
        """Return the result; an error of NumPy about shapes, axes or indices becomes a ValueError."""

    def __call__(self, *arrays: Any, lengths: Any = None) -> Array:
        """Apply the operator; inference.

        Parameters
        ----------
        *arrays : arrays
            Real numbers, integers or booleans.
        lengths
            None: an operator computes on whole arrays, padding included.

        Returns
        -------
        y : ndarray

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be.
        """
        if lengths is not None:
            raise ValueError(f"lengths should be None: {self._making()} computes on whole arrays, padding included")
        fault = self._arity_fault(len(arrays))
        if fault is not None:
            raise ValueError(f"{self._making()} {fault}")
        given = [checks.as_array(f"arrays[{place}]", array) for place, array in enumerate(arrays)]
        for place, array in enumerate(given):
            if array.dtype.kind not in "fiub":
                raise TypeError(f"arrays[{place}] should hold real numbers, integers or booleans, not {array.dtype}")
        try:
            with np.errstate(all="ignore"):
                return np.asarray(self._call(*given))
        except (ValueError, IndexError, TypeError) as error:
            shapes = " and ".join(f"{array.dtype} {array.shape}" for array in given)
            raise ValueError(f"arrays do not fit {self._making()}: {shapes}: {error}") from None

    def unstreamable(self) -> str | None:
        """Return why the operator cannot be used on consecutive chunks of streams."""
        return f"{self._making()} computes on whole arrays"

    def _arity_fault(self, count: int) -> str | None:
        least, limit = self._counts
        if least <= count <= limit:
            return None
        wanted = least if least == limit else f"at least {least}" if limit == MANY else f"{least} to {limit}"
        return f"takes {wanted} input{'s' * (wanted != 1)}, not {count}"

    def _times_after(self, timed: Sequence[Timed]) -> dict[str, Timed]:
        return {OUTPUT: None}

    def _time_fault(self, timed: Sequence[Timed]) -> str | None:
        return None

    def _widths_through(self, widths: Sequence[int | None]) -> tuple[dict[str, int | None], str | None]:
        return {OUTPUT: None}, None


# Settings.


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} should be an integer, not {checks.describe(value)}")
    return int(min(max(value, _INT64.min), _INT64.max))


def _integers(name: str, value: Any) -> list[int]:
    if not isinstance(value, list | tuple | np.ndarray):
        raise TypeError(f"{name} should be a list of integers, not {checks.describe(value)}")
    return [_integer(f"{name}[{place}]", one) for place, one in enumerate(value)]


def integers(*, doc: str, **options: Any) -> Any:
    """Declare a list of integers."""
    return checked(_integers, takes="Sequence[int]", form="list of int", doc=doc, **options)


def axis(*, default: int, doc: str) -> Any:
    """Declare an axis; negative ones count from the last."""
    return checked(_integer, default=default, takes="int", form="int", doc=doc)


# Functions of elements.


def _divide(x: Array, y: Array) -> Array:
    """The quotient; of integers the one towards zero."""
    if x.dtype.kind == "f":
        return x / y
    if not np.all(y):
        raise ValueError("an integer is divided by 0")
    return np.asarray(np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y)), x.dtype)


def _erf(x: Array) -> Array:
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(x), x.dtype)


def _clip(x: Array, low: float | None, high: float | None) -> Array:
    x = x if low is None else np.maximum(x, x.dtype.type(low))
    return x if high is None else np.minimum(x, x.dtype.type(high))


def _of_all(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arrays: functools.reduce(function, arrays)


# By the name in ONNX: the number of inputs, and the function of them.
_PLAIN: dict[str, tuple[int, Callable[..., Any]]] = {
    "Identity": (1, lambda x: x),
    "Abs": (1, np.abs),
    "Neg": (1, np.negative),
    "Exp": (1, np.exp),
    "Log": (1, np.log),
    "Sqrt": (1, np.sqrt),
    "Reciprocal": (1, lambda x: 1 / x),
    "Floor": (1, np.floor),
    "Ceil": (1, np.ceil),
    "Round": (1, np.rint),
    "Sign": (1, np.sign),
    "Sin": (1, np.sin),
    "Cos": (1, np.cos),
    "Tan": (1, np.tan),
    "Erf": (1, _erf),
    "Softplus": (1, lambda x: np.logaddexp(x, x.dtype.type(0))),
    "Softsign": (1, lambda x: x / (1 + np.abs(x))),
    "HardSwish": (1, lambda x: x * np.clip(x / 6 + x.dtype.type(0.5), 0, 1)),
    "Not": (1, np.logical_not),
    "IsNaN": (1, np.isnan),
    "Add": (2, np.add),
    "Sub": (2, np.subtract),
    "Mul": (2, np.multiply),
    "Div": (2, _divide),
    "Pow": (2, lambda x, y: np.power(x, y).astype(x.dtype)),
    "PRelu": (2, lambda x, slope: np.where(x < 0, slope * x, x)),
    "Equal": (2, np.equal),
    "Greater": (2, np.greater),
    "GreaterOrEqual": (2, np.greater_equal),
    "Less": (2, np.less),
    "LessOrEqual": (2, np.less_equal),
    "And": (2, np.logical_and),
    "Or": (2, np.logical_or),
    "Xor": (2, np.logical_xor),
    "Where": (3, np.where),
    "Min": (MANY, _of_all(np.minimum)),
    "Max": (MANY, _of_all(np.maximum)),
    "Sum": (MANY, _of_all(np.add)),
}
# Of one input, alpha and beta.
_SHAPED: dict[str, Callable[[Array, Any, Any], Any]] = {
    "LeakyRelu": lambda x, alpha, beta: np.where(x < 0, x * x.dtype.type(alpha), x),
    "Elu": lambda x, alpha, beta: np.where(x < 0, np.expm1(x) * x.dtype.type(alpha), x),
    "HardSigmoid": lambda x, alpha, beta: np.clip(x * x.dtype.type(alpha) + x.dtype.type(beta), 0, 1),
    "Clip": _clip,
}
_ALPHA = {"LeakyRelu": 0.01, "Elu": 1.0, "HardSigmoid": 0.2}  # by default
_BETA = {"HardSigmoid": 0.5}


def _real(name: str, value: Any) -> float:
    return checks.number(name, value)


class Apply(Operator):
    """A function of elements; arrays broadcast by NumPy's rules."""

    function: str = choice((*_PLAIN, *_SHAPED), default=None, doc="Its name in ONNX.")
    alpha: float | None = checked(
        _real,
        default=None,
        takes="float",
        form="float",
        doc="As in ONNX, where the function has it; the minimum of Clip.",
    )
    beta: float | None = checked(
        _real,
        default=None,
        takes="float",
        form="float",
        doc="As in ONNX, where the function has it; the maximum of Clip.",
    )

    def _resolve(self) -> None:
        if self.function is None:
            raise TypeError("function should be the name of an operator of ONNX, not None")
        for name in ("alpha", "beta"):
            if getattr(self, name) is not None and self.function not in _SHAPED:
                raise ValueError(f"{name} should be None: {self.function} has none")
        self.alpha = _ALPHA.get(self.function) if self.alpha is None else self.alpha
        self.beta = _BETA.get(self.function) if self.beta is None else self.beta

    def _arity_fault(self, count: int) -> str | None:
        wanted = _PLAIN[self.function][0] if self.function in _PLAIN else 1
        fits = count >= 1 if wanted == MANY else count == wanted
        return None if fits else f"takes {'at least 1' if wanted == MANY else wanted} input(s), not {count}"

    def _call(self, *arrays: Array) -> Any:
        if self.function in _SHAPED:
            return _SHAPED[self.function](arrays[0], self.alpha, self.beta)
        return _PLAIN[self.function][1](*arrays)


class Cast(Operator):
    """The elements in another dtype; real numbers become integers towards zero."""

    to: str = choice(
        ("float32", "float64", "int64", "int32", "int8", "uint8", "bool"), default="float32", doc="The dtype."
    )

    def _call(self, *arrays: Array) -> Any:
        return arrays[0].astype(self.to)


class Constant(Operator):
    """An array that does not depend on an input: real numbers as the parameter `value`, integers as a setting."""

    _counts = (0, 0)

    shape: list[int] = integers(default=(), doc="Its shape.")
    values: list[Any] | None = checked(
        _integers, default=None, takes="Sequence[int]", form="list of int", doc="Its elements, of integers or booleans."
    )
    kind: str = choice(("float", "int64", "bool"), default="float", doc="What it holds; real numbers are of `dtype`.")

    def _resolve(self) -> None:
        for size in self.shape:
            checks.size("shape", size)
        count = math.prod(self.shape)
        if count > _INT64.max:
            raise OverflowError(f"shape should have a product of 64 bits, not be {self.shape}")
        given = None if self.values is None else len(self.values)
        if given != (None if self.kind == "float" else count):
            wanted = "None, since real numbers are the parameter value" if self.kind == "float" else f"{count} elements"
            raise ValueError(f"values should be {wanted}, not {given}")

    def _initial(self, rng: np.random.Generator) -> dict[str, Array]:
        return {"value": np.zeros(self.shape)} if self.kind == "float" else {}

    def _times_after(self, timed: Sequence[Timed]) -> dict[str, Timed]:
        return {OUTPUT: False}

    def _call(self, *arrays: Array) -> Any:
        return self._arrays["value"] if self.kind == "float" else np.array(self.values, self.kind).reshape(self.shape)


# Products, choices of elements, shapes.


class MatMul(Operator):
    """The product of two arrays of matrices, as `numpy.matmul`."""

    _counts = (2, 2)

    def _call(self, *arrays: Array) -> Any:
        return np.matmul(*arrays)


class Gather(Operator):
    """The parts of an array along an axis that indices name; negative indices count from the end."""

    _counts = (2, 2)

    axis: int = axis(default=0, doc="The axis.")

    def _call(self, *arrays: Array) -> Any:
        return np.take(arrays[0], arrays[1], axis=self.axis)


class Transpose(Operator):
    """Axes in another order."""

    perm: list[int] | None = integers(default=None, doc="The axis of x that each axis of y is; None: in reverse.")

    def _call(self, *arrays: Array) -> Any:
        return np.ascontiguousarray(np.transpose(arrays[0], self.perm))


class Reshape(Operator):
    """The same elements in another shape."""

    _counts = (1, 2)

    shape: list[int] | None = integers(
        default=None, doc="The shape; -1 stands for what is left, 0 for the size of x. None: the second input."
    )
    allowzero: bool = flag(default=False, doc="Whether 0 is a size of 0.")

    def _arity_fault(self, count: int) -> str | None:
        wanted = 1 if self.shape is not None else 2
        return None if count == wanted else f"takes {wanted} input(s), not {count}"

    def _call(self, *arrays: Array) -> Any:
        x = arrays[0]
        wanted = arrays[1].tolist() if self.shape is None else self.shape
        if not self.allowzero:
            wanted = [x.shape[place] if size == 0 else size for place, size in enumerate(wanted)]
        return np.reshape(x, wanted)


class Squeeze(Operator):
    """x without axes of size 1."""

    axes: list[int] | None = integers(default=None, doc="The axes; None: all of size 1.")

    def _call(self, *arrays: Array) -> Any:
        return np.squeeze(arrays[0], None if self.axes is None else tuple(self.axes))


class Unsqueeze(Operator):
    """x with more axes of size 1."""

    axes: list[int] = integers(doc="Which axes of y they are.")

    def _call(self, *arrays: Array) -> Any:
        return np.expand_dims(arrays[0], tuple(self.axes))


class Flatten(Operator):
    """x as a matrix: the axes before `axis` as one, and the others."""

    axis: int = axis(default=1, doc="The first axis of the second part.")

    def _call(self, *arrays: Array) -> Any:
        x = arrays[0]
        if not -x.ndim <= self.axis <= x.ndim:
            raise ValueError(f"axis {self.axis} is out of bounds")
        rows = math.prod(x.shape[: self.axis]) if self.axis else 1
        return np.reshape(x, (rows, math.prod(x.shape[self.axis :] if self.axis else x.shape)))


class Expand(Operator):
    """x broadcast with a shape; no copy is made."""

    _counts = (1, 2)

    shape: list[int] | None = integers(default=None, doc="The shape; None: the second input.")

    def _arity_fault(self, count: int) -> str | None:
        wanted = 1 if self.shape is not None else 2
        return None if count == wanted else f"takes {wanted} input(s), not {count}"

    def _call(self, *arrays: Array) -> Any:
        wanted = tuple(arrays[1].tolist() if self.shape is None else self.shape)
        return np.broadcast_to(arrays[0], np.broadcast_shapes(arrays[0].shape, wanted))


class Shape(Operator):
    """The shape of x, int64."""

    start: int = axis(default=0, doc="The first axis.")
    end: int | None = checked(
        _integer, default=None, takes="int", form="int", doc="After the last axis; None: all that follow."
    )

    def _call(self, *arrays: Array) -> Any:
        return np.array(arrays[0].shape[self.start : self.end], np.int64)


class SliceAxes(Operator):
    """A part of x along some axes, as slices of Python."""

    starts: list[int] = integers(doc="The first element along each axis.")
    ends: list[int] = integers(doc="After the last one.")
    axes: list[int] | None = integers(default=None, doc="The axes; None: the first ones.")
    steps: list[int] | None = integers(default=None, doc="From one element to the next, not 0; None: 1.")

    def _resolve(self) -> None:
        for name in ("ends", "axes", "steps"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.starts):
                raise ValueError(f"{name} should be {len(self.starts)} as starts are, not {len(given)}")
        if self.steps is not None and 0 in self.steps:
            raise ValueError("steps should not be 0")

    def _call(self, *arrays: Array) -> Any:
        x = arrays[0]
        axes = range(len(self.starts)) if self.axes is None else self.axes
        steps = [1] * len(self.starts) if self.steps is None else self.steps
        index: list[Any] = [slice(None)] * x.ndim
        for place, start, end, step in zip(axes, self.starts, self.ends, steps, strict=True):
            index[place] = slice(start, end, step)
        return x[tuple(index)]


class ConcatAxis(Operator):
    """Arrays one after another along an axis."""

    _counts = (1, MANY)

    axis: int = axis(default=-1, doc="The axis.")

    def _call(self, *arrays: Array) -> Any:
        return np.concatenate(arrays, axis=self.axis)


# Reductions.


def _bounds(dtype: np.dtype[Any]) -> tuple[Any, Any]:
    """The least and the largest value of a dtype."""
    if dtype.kind == "f":
        return -np.inf, np.inf
    return (False, True) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)


def _sum_of(function: Callable[[Array], Array]) -> Callable[..., Any]:
    return lambda x, **options: np.sum(function(x), **options)


def _log_sum_exp(x: Array, axis: Any, keepdims: bool) -> Array:
    largest = np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    shift = np.where(np.isfinite(largest), largest, x.dtype.type(0))
    total = np.log(np.sum(np.exp(x - shift), axis=axis, keepdims=True)) + shift
    result: Array = total if keepdims else np.squeeze(total, axis)
    return result


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceSum": np.sum,
    "ReduceMean": np.mean,
    "ReduceMax": lambda x, **options: np.max(x, initial=_bounds(x.dtype)[0], **options),
    "ReduceMin": lambda x, **options: np.min(x, initial=_bounds(x.dtype)[1], **options),
    "ReduceProd": np.prod,
    "ReduceL1": _sum_of(np.abs),
    "ReduceL2": lambda x, **options: np.sqrt(np.sum(np.square(x), **options)),
    "ReduceSumSquare": _sum_of(np.square),
    "ReduceLogSumExp": _log_sum_exp,
}


class Reduce(Operator):
    """A sum, mean or another function of all elements along axes."""

    function: str = choice(tuple(_REDUCTIONS), default="ReduceSum", doc="Its name in ONNX.")
    axes: list[int] | None = integers(default=None, doc="The axes; None: all.")
    keepdims: bool = flag(default=True, doc="Whether they stay, with the size 1.")

    def _call(self, *arrays: Array) -> Any:
        x = arrays[0]
        axes = tuple(range(x.ndim)) if self.axes is None else tuple(self.axes)
        return np.asarray(_REDUCTIONS[self.function](x, axis=axes, keepdims=self.keepdims), x.dtype)


class ArgReduce(Operator):
    """The index of the largest or smallest element along an axis, int64."""

    function: str = choice(("ArgMax", "ArgMin"), default="ArgMax", doc="Its name in ONNX.")
    axis: int = axis(default=0, doc="The axis.")
    keepdims: bool = flag(default=True, doc="Whether it stays, with the size 1.")
    select_last_index: bool = flag(default=False, doc="Whether of equals the last is meant, and not the first.")

    def _call(self, *arrays: Array) -> Any:
        x = arrays[0]
        function = np.argmax if self.function == "ArgMax" else np.argmin
        if not self.select_last_index:
            return function(x, axis=self.axis, keepdims=self.keepdims).astype(np.int64)
        places = function(np.flip(x, self.axis), axis=self.axis, keepdims=self.keepdims)
        return (x.shape[self.axis] - 1 - places).astype(np.int64)


class SoftmaxAxis(Operator):
    """exp(x) over its sum along an axis, or the logarithm of that."""

    axis: int = axis(default=-1, doc="The axis.")
    log: bool = flag(default=False, doc="Whether to return the logarithm.")

    def _call(self, *arrays: Array) -> Any:
        x = arrays[0]
        shifted = x - np.max(x, axis=self.axis, keepdims=True)
        exponentials = np.exp(shifted)
        total = np.sum(exponentials, axis=self.axis, keepdims=True)
        return shifted - np.log(total) if self.log else exponentials / total


ONNX: dict[str, Callable[..., Any]] = {
    **{name: functools.partial(Apply, name) for name in (*_PLAIN, *_SHAPED)},
    **{name: functools.partial(Reduce, name) for name in _REDUCTIONS},
    "Relu": ReLU,
    "Sigmoid": Sigmoid,
    "Tanh": Tanh,
    "ArgMax": functools.partial(ArgReduce, "ArgMax"),
    "ArgMin": functools.partial(ArgReduce, "ArgMin"),
    "Cast": Cast,
    "Concat": ConcatAxis,
    "Constant": Constant,
    "Expand": Expand,
    "Flatten": Flatten,
    "Gather": Gather,
    "LogSoftmax": functools.partial(SoftmaxAxis, log=True),
    "MatMul": MatMul,
    "Reshape": Reshape,
    "Shape": Shape,
    "Slice": SliceAxes,
    "Softmax": SoftmaxAxis,
    "Squeeze": Squeeze,
    "Transpose": Transpose,
    "Unsqueeze": Unsqueeze,
}
