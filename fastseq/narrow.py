"""Narrow weights: matrices of bfloat16 or int8 in the place of float32, and what a product with them is.

bfloat16 is the upper half of a float32. int8 is whole numbers from -127 to 127 and a scale for each row of the matrix,
which is an output of the product. What enters a product is made narrow, too: rounded to bfloat16, or divided by a scale
of its own row and rounded to whole numbers. Sums are float32 or, of int8, integers and exact.

The compiled operations pack a `NarrowArray` (src/packing/_packing.pyx); ``x @ array.T`` is the same in NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastseq.checks import Array

TYPES = ("float32", "bfloat16", "int8")
LIMIT = 127
# Rows whose numbers are all below are rows of zeros: the inverse of their scale would be infinite.
SMALL = np.float32(2.0**-100)


def to_bfloat16(x: Array) -> npt.NDArray[np.uint16]:
    """The bits of float32 numbers rounded to bfloat16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> Array:
    """The float32 numbers that bits of bfloat16 stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def quantize(x: Array) -> tuple[npt.NDArray[np.int8], Array]:
    """Rows (N, K) as whole numbers and a scale for each row: x is about numbers * scale.

    A row with NaN has the scale NaN. One with an infinity has the scale inf, and 1 or -1 for each infinity.
    """
    x = np.asarray(x, np.float32)
    with np.errstate(all="ignore"):
        most = np.abs(x).max(axis=1, initial=0)
        usual = (most >= SMALL) & (most < np.inf)
        inverse = np.where(usual, np.float32(LIMIT) / most, np.float32(0))
        scaled = np.rint(x * inverse[:, None])
        numbers = np.where(np.isfinite(most)[:, None], scaled, np.where(np.isinf(x), np.sign(x), 0)).astype(np.int8)
        scales = np.where(usual, most / np.float32(LIMIT), np.where(most < SMALL, np.float32(0), most))
    return numbers, scales.astype(np.float32)


class NarrowArray:
    """A matrix of narrow weights, (outputs, inputs), or of convolutions (outputs, inputs, size). Immutable.

    Attributes
    ----------
    type : {"bfloat16", "int8"}
    values : ndarray of uint16 or int8, (outputs, ...)
    scales : ndarray of float32, (outputs,), or None
        int8: what the numbers of each row are multiplied by.
    factor : float
        What a row of a table of vectors is multiplied by when it is read as float32.
    """

    __array_ufunc__ = None  # ndarray @ NarrowArray is left to `_Transposed`

    def __init__(self, type: str, values: Array, scales: Array | None = None, factor: float = 1.0) -> None:
        self.type, self.values, self.scales, self.factor = type, values, scales, factor
        for array in (values, scales):
            if array is not None:
                array.flags.writeable = False

    def __reduce__(self) -> Any:
        return NarrowArray, (self.type, self.values, self.scales, self.factor)

    dtype = np.dtype(np.float32)
    itemsize = 4

    @property
    def ndim(self) -> int:
        """How many axes."""
        return self.values.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """Outputs, inputs, and of convolutions the size of windows."""
        shape: tuple[int, ...] = self.values.shape
        return shape

    @property
    def size(self) -> int:
        """How many weights."""
        return int(self.values.size)

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers and scales."""
        return int(self.values.nbytes) + (0 if self.scales is None else int(self.scales.nbytes))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> NarrowArray:
        """Some outputs."""
        scales = None if self.scales is None else self.scales[rows]
        return NarrowArray(self.type, self.values[rows], scales, self.factor)

    def times(self, factor: float) -> NarrowArray:
        """The same table, whose vectors are multiplied by a factor."""
        return NarrowArray(self.type, self.values, self.scales, factor)

    def rows(self, ids: Array) -> Array:
        """Some rows as float32: vectors of symbols."""
        if self.scales is None:
            return from_bfloat16(self.values[ids]) * np.float32(self.factor)
        scales = self.scales[ids].reshape(-1, *[1] * (self.ndim - 1))
        return self.values[ids].astype(np.float32) * scales * np.float32(self.factor)

    def matrix(self, *axes: int) -> NarrowArray:
        """The same weights as (outputs, inputs), of more axes in the order `axes`."""
        values = np.ascontiguousarray(self.values.transpose(axes)).reshape(len(self), -1)
        return NarrowArray(self.type, values, self.scales, self.factor)

    def real(self) -> Array:
        """All weights as float32."""
        return self.rows(np.arange(len(self)))

    @property
    def T(self) -> _Transposed:
        """What a product has on its right."""
        return _Transposed(self)


class _Transposed:
    """The right side of ``x @ weight.T``."""

    __array_ufunc__ = None

    def __init__(self, weight: NarrowArray) -> None:
        self.weight = weight

    def __rmatmul__(self, x: Array) -> Array:
        weight = self.weight
        rows = np.asarray(x, np.float32).reshape(-1, weight.shape[1])
        if weight.scales is None:
            with np.errstate(all="ignore"):
                y = from_bfloat16(to_bfloat16(rows)) @ from_bfloat16(weight.values).T
        else:
            y = _int8_product(rows, weight.values, weight.scales)
        outputs: Array = y.reshape(*x.shape[:-1], weight.shape[0])
        return outputs


def _flushed(x: Array) -> Array:
    """Denormal numbers as 0, as kernels take them."""
    plain: Array = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)
    return plain


def _int8_product(x: Array, values: Array, scales: Array) -> Array:
    """x (N, K) times numbers (outputs, K) with a scale an output. Sums are exact: float64 holds them."""
    numbers, row_scales = quantize(x)
    with np.errstate(all="ignore"):
        sums = (numbers.astype(np.float64) @ values.T.astype(np.float64)).astype(np.float32)
        y = _flushed(sums * _flushed(row_scales[:, None] * scales))
        # Several infinities give what they give one by one: NaN where their signs differ.
        for row in np.flatnonzero(np.isinf(x).sum(axis=1) > 1):
            if not np.isnan(row_scales[row]):
                infinite = np.isinf(x[row])
                y[row] = (values[:, infinite] * x[row, infinite]).sum(axis=1) * np.sign(scales)
    products: Array = y
    return products


Weight = Array | NarrowArray  # what packers and tables take


def narrowed(weight: Array, type: str) -> NarrowArray:
    """A float32 matrix (outputs, inputs), or (outputs, inputs, size), as one of "bfloat16" or "int8"."""
    if type == "bfloat16":
        return NarrowArray(type, to_bfloat16(weight))
    values, scales = quantize(weight.reshape(len(weight), -1))
    return NarrowArray(type, values.reshape(weight.shape), scales)


def scaled(table: Any, factor: float) -> Any:
    """A table of vectors, an ndarray or narrow, whose vectors are multiplied by a factor."""
    return table.times(factor) if isinstance(table, NarrowArray) else table * factor


def split_rows(weight: Any, parts: int) -> list[Any]:
    """A matrix, an ndarray or narrow, as so many of equal height; views."""
    each = len(weight) // parts
    return [weight[i * each : (i + 1) * each] for i in range(parts)]
