"""What the models share: files, sequences of symbols as they may be given, what is measured on them, sampling."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastseq import checks, io
from fastseq.checks import Array
from fastseq.layers.base import Composite


class Model(Composite):
    """Layers with trained parameters, none in some models, and what `fit` measured beside them."""

    # The names of what `fit` measures: all of them are there, or none.
    _measured: tuple[str, ...] = ()
    _fitted: Mapping[str, Array]

    def _start(self, config: dict[str, Any], **children: Any) -> None:
        self._config = config
        self._children = children
        self._fitted = {}

    def _check_fitted(self, given: Mapping[str, Any]) -> dict[str, Array]:
        """What `fit` measured, from a file or a state dict, looked at; a fault is a `ValueError`."""
        return {name: np.array(value) for name, value in given.items()}

    def _take_fitted(self, fitted: Mapping[str, Array]) -> None:
        for array in fitted.values():
            array.flags.writeable = False
        self._fitted = fitted

    def _needs_fit(self) -> Mapping[str, Array]:
        if not self._fitted:
            raise ValueError(f"this {type(self).__name__} should be fitted first")
        return self._fitted

    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters by name, and of what `fit` measured."""
        return {**super().state_dict(), **{name: np.array(array) for name, array in self._fitted.items()}}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Take all parameters, and what `fit` measured, from what `state_dict` returned.

        Parameters
        ----------
        mapping : mapping from str to array
            Without anything that `fit` measured, that stays as it is.

        Raises
        ------
        ValueError
            Naming every name that is unknown, missing or does not fit; the model is as it was then.
        """
        given = checks.mapping("mapping", mapping)
        measured = {name: given[name] for name in self._measured if name in given}
        if measured and len(measured) < len(self._measured):
            missing = [name for name in self._measured if name not in given]
            raise ValueError(f"mapping does not fit {self!r}: {', '.join(missing)} should be there too")
        fitted = self._check_fitted(measured) if measured else self._fitted
        super().load_state_dict({name: value for name, value in given.items() if name not in measured})
        self._take_fitted(fitted)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a safetensors file, whole or not at all; `fastseq.load` reads it back."""
        io.save(path, type(self).__name__, self._config, {**self._arrays, **self._fitted})

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self._config, "arrays": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["config"])  # type: ignore[misc]
        self.load_state_dict(state["arrays"])


class Symbols(NamedTuple):
    """Sequences of symbols one after another, without padding."""

    ids: Array  # (N,) int64
    lengths: Array  # (S,) int64, of each sequence

    def rows(self) -> Array:
        """Which sequence each symbol is of, (N,)."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def steps(self) -> Array:
        """Where in its sequence each symbol stands, (N,)."""
        starts = np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        result: Array = np.arange(len(self.ids)) - starts
        return result

    def padded(self) -> Array:
        """The sequences as rows (S, T), zeros past their ends."""
        longest = int(self.lengths.max(initial=0))
        result = np.zeros((len(self.lengths), longest), np.int64)
        result[self.rows(), self.steps()] = self.ids
        return result


def is_list_of_rows(value: Any) -> bool:
    """Whether sequences were given as a list of them."""
    return isinstance(value, list | tuple) and any(isinstance(row, list | tuple | np.ndarray) for row in value)


def symbols(name: str, value: Any, lengths: Any, vocab_size: int, lengths_name: str = "lengths") -> Symbols:
    """Sequences of ids in any form they may be given in.

    A list of sequences; an array (T,), which is one; or (B, T), with `lengths` where the rows are padded.
    """
    if lengths is None and is_list_of_rows(value):
        rows = [checks.ids(f"{name}[{i}]", row, vocab_size) for i, row in enumerate(value)]
        for i, row in enumerate(rows):
            if row.ndim != 1:
                raise ValueError(f"{name}[{i}] should be a sequence of ids, not {checks.describe(row)}")
        counts = np.array([len(row) for row in rows], np.int64)
        return Symbols(np.concatenate(rows), counts)
    array = checks.as_array(name, value)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2:
        raise ValueError(f"{name} should be of shape (B, T) or (T,), or a list of sequences, not {array.shape}")
    batch, time = array.shape
    if lengths is None:
        checked = checks.ids(name, value, vocab_size)
        return Symbols(checked.reshape(-1), np.full(batch, time, np.int64))
    counts = checks.lengths(lengths, batch, time, lengths_name)
    real = np.arange(time) < counts[:, None]
    return Symbols(checks.ids(name, array, vocab_size, real)[real], counts)


class SymbolModel(Model):
    """A model of sequences of symbols 0..V-1: the chain rule, what follows from it, and sampling."""

    vocab_size: int

    def _log_probs(self, given: Symbols) -> Array:
        """log P(x_s | x_<s) of every symbol, (N,), in float64."""
        raise NotImplementedError

    def _begin(self, prompt: Symbols) -> tuple[Array, Any]:
        """The logits (B, V) of the symbol after each prompt, and what `_go_on` needs."""
        raise NotImplementedError

    def _go_on(self, chosen: Array, carried: Any) -> tuple[Array, Any]:
        """The same after one more symbol of each row, (B,)."""
        raise NotImplementedError

    def log_prob(self, sequences: Any, lengths: Any = None) -> Array:
        """The log-probability of each sequence: the sum over s of log P(x_s | x_<s).

        The first symbol follows a begin symbol, which is not counted.

        Parameters
        ----------
        sequences : list of sequences of ids, or array of shape (B, T), or (T,) for one
            Ids in 0..V-1.
        lengths : array of shape (B,), optional
            The real symbols of each row; what stands past them does not matter.

        Returns
        -------
        ndarray of shape (B,)
            Natural logarithms, float64. An empty sequence has 0.
        """
        given = symbols("sequences", sequences, lengths, self.vocab_size)
        return sums(given.rows(), self._log_probs(given), len(given.lengths))

    def bits_per_symbol(self, sequences: Any, lengths: Any = None) -> float:
        """The mean over all symbols of -log2 P(x_s | x_<s); arguments as of `log_prob`."""
        given = symbols("sequences", sequences, lengths, self.vocab_size)
        if not len(given.ids):
            raise ValueError("sequences should hold at least one symbol")
        return float(-self._log_probs(given).mean() / math.log(2))

    def perplexity(self, sequences: Any, lengths: Any = None) -> float:
        """2 to the bits per symbol; arguments as of `log_prob`."""
        with np.errstate(over="ignore"):
            return float(np.exp2(self.bits_per_symbol(sequences, lengths)))

    def generate(
        self, prompt: Any, max_new: int, *, lengths: Any = None, temperature: float = 1.0, seed: int | None = None
    ) -> Array:
        """Draw one symbol after another from the distribution the model predicts.

        Parameters
        ----------
        prompt : list of sequences of ids, or array of shape (B, T), or (T,) for one
            What to go on from; an empty prompt goes on from the begin symbol.
        max_new : int
            How many symbols.
        lengths : array of shape (B,), optional
            The real symbols of each row of the prompt.
        temperature : float, 0 or more
            Logits are divided by it; at 0 the likeliest symbol is taken.
        seed : int, optional
            Fixes what is drawn. A row's result depends on its prompt and the seed, not on the rows beside it; of
            rows with the same prompt, each draws numbers of its own.

        Returns
        -------
        ndarray of shape (B, max_new), or (max_new,) for a prompt (T,)
            Ids, int64.
        """
        given = symbols("prompt", prompt, lengths, self.vocab_size)
        max_new = checks.size("max_new", max_new)
        temperature = checks.number("temperature", temperature, least=0)
        result = np.empty((len(given.lengths), max_new), np.int64)
        if result.size:
            numbers = Uniforms(seed, _streams(given))
            logits, carried = self._begin(given)
            for i in range(max_new):
                if i:
                    logits, carried = self._go_on(result[:, i - 1], carried)
                result[:, i] = sample(logits, temperature, numbers.draw(i))
        return result if is_list_of_rows(prompt) or np.ndim(prompt) == 2 else result[0]


def _streams(given: Symbols) -> Array:
    """A number for each row that its symbols and how many earlier rows are equal determine."""
    seen: dict[bytes, int] = {}
    result = np.empty(len(given.lengths), np.uint64)
    for i, row in enumerate(np.split(given.ids, np.cumsum(given.lengths)[:-1])):
        key = row.astype("<i8").tobytes()
        seen[key] = seen.get(key, 0) + 1
        digest = hashlib.blake2b(key + seen[key].to_bytes(8, "little"), digest_size=8).digest()
        result[i] = int.from_bytes(digest, "little")
    return result


class Uniforms:
    """Random numbers in [0, 1), each a function of the seed, the stream of its row and the step alone [1]_.

    References
    ----------
    .. [1] G. L. Steele, D. Lea and C. H. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """

    def __init__(self, seed: int | None, streams: Array) -> None:
        seed = checks.seed("seed", seed)
        key = np.random.SeedSequence(seed).generate_state(1, np.uint64)
        self._streams = _mixed(key + _mixed(streams))

    def draw(self, step: int) -> Array:
        """The numbers of one step, one a row."""
        # 52 bits, so that the largest number times any total is less than the total.
        numbers: Array = (_mixed(self._streams + _mixed(np.array([step], np.uint64))) >> np.uint64(12)) * 2.0**-52
        return numbers


def _mixed(x: Array) -> Array:
    """The output function of SplitMix64, after one step of its counter."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: Array = x ^ (x >> np.uint64(31))
    return result


def sample(logits: Array, temperature: float, uniform: Array) -> Array:
    """One symbol a row of `logits` (B, V): where the cumulative distribution passes `uniform` (B,)."""
    if temperature == 0:
        return np.asarray(logits.argmax(axis=1))
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):  # a temperature near 0 sends what is less likely to -inf, as it should
        cumulative = np.exp(scores / temperature).cumsum(axis=1)
    result: Array = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(axis=1)
    return result


def real_steps(lengths: Array, time: int) -> Array:
    """Where rows have steps and no padding, (B, T)."""
    result: Array = np.arange(time) < lengths[:, None]
    return result


def log_softmax_at(logits: Array, ids: Array) -> Array:
    """The log-probability of one symbol of each row of (N, V), in float64."""
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    result: Array = scores[np.arange(len(ids)), ids] - np.log(np.exp(scores).sum(axis=1))
    return result


class Series(NamedTuple):
    """Real-valued series as rows, padded."""

    values: Array  # (S, T), or (S, T, I) of I values a step; contiguous
    lengths: Array  # (S,) int64
    alone: bool  # given without the axis of series
    flat: bool  # given without the axis of values, though `values` has it

    def like(self, result: Array) -> Array:
        """A result in the form the series were given in."""
        if self.flat:
            result = result[..., 0]
        return result[0] if self.alone else result

    def real(self) -> Array:
        """Where there are values and no padding, (S, T)."""
        result: Array = np.arange(self.values.shape[1]) < self.lengths[:, None]
        return result

    def check_finite(self, name: str) -> None:
        """Refuse what is not finite among the real values."""
        wrong = ~np.isfinite(self.values)
        wrong[~self.real()] = False
        if wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            where = ", ".join(map(str, place[: wrong.ndim - self.flat]))
            raise ValueError(f"{name} should be finite, but {name}[{where}] is {self.values[place]}")

    def check_lengths(self, name: str, least: int) -> None:
        """Refuse series shorter than `least`."""
        if (self.lengths < least).any():
            row = int(np.flatnonzero(self.lengths < least)[0])
            raise ValueError(f"{name}[{row}] should have at least {least} values, not {self.lengths[row]}")

    def rows(self) -> list[Array]:
        """The series one by one, without padding."""
        return [row[:length] for row, length in zip(self.values, self.lengths, strict=True)]


def series_of(name: str, value: Any, lengths: Any, dtype: np.dtype[Any], width: int | None = None) -> Series:
    """Series in any form they may be given in: (T,), (S, T) with or without lengths, or a list of arrays.

    Of `width` values a step each form has an axis more, which may be left out where that is one.
    """
    axes = 2 if width is not None and width > 1 else 1
    form = "(T,)" if axes == 1 else f"(T, {width})"
    if lengths is None and is_list_of_rows(value):
        rows = [checks.real_array(f"{name}[{i}]", row, dtype) for i, row in enumerate(value)]
        for i, row in enumerate(rows):
            if row.ndim != axes or (axes == 2 and row.shape[1] != width):
                raise ValueError(f"{name}[{i}] should be of shape {form}, not {row.shape}")
        counts = np.array([len(row) for row in rows], np.int64)
        array = np.zeros((len(rows), int(counts.max()), *rows[0].shape[1:]), dtype)
        for into, row in zip(array, rows, strict=True):
            into[: len(row)] = row
        alone = False
    else:
        array = checks.real_array(name, value, dtype)
        if width == 1 and array.ndim == 3:
            axes, form = 2, "(T, 1)"
        if array.ndim not in (axes, axes + 1) or (axes == 2 and array.shape[-1] != width):
            raise ValueError(f"{name} should be of shape (S, {form[1:]} or {form}, or a list, not {array.shape}")
        alone = array.ndim == axes
        array = array[None] if alone else array
        counts = np.full(len(array), array.shape[1], np.int64)
        if lengths is not None:
            counts = checks.lengths(lengths, *array.shape[:2])
    flat = width is not None and array.ndim == 2
    return Series(np.ascontiguousarray(array[..., None] if flat else array), counts, alone, flat)


def spread_of(values: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of each column of (N, I), in float64; a column of one value has 1."""
    wide = values.astype(np.float64)
    mean = wide.mean(axis=0)
    deviation = wide.std(axis=0)
    return mean, np.where(deviation > 0, deviation, 1.0)


def gaussian(residuals: Array, counts: Array, sigma2: Array) -> Array:
    """The log-density of the first `counts` residuals of each row of (S, T), of variance (S,) or (1,)."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = row_sums(np.square(residuals, dtype=np.float64), counts)
        variance = bounded(sigma2)
        result: Array = -0.5 * (counts * np.log(2 * np.pi * variance) + squares / variance)
    return result


def bounded(sigma2: Array) -> Array:
    """A variance that can be divided by: what is predicted without any error has a density without bound."""
    return np.maximum(sigma2, np.finfo(np.float64).tiny)


def row_sums(values: Array, counts: Array) -> Array:
    """The sum of the first `counts` values of every row."""
    real = np.arange(values.shape[1]) < counts[:, None]
    return sums(np.repeat(np.arange(len(values)), counts), values[real], len(values))


def sums(rows: Array, values: Array, count: int) -> Array:
    """The sum of the values of each of `count` rows, added in order, so that no row beside it changes a bit."""
    result: Array = np.bincount(rows, values, count).astype(np.float64, copy=False)
    return result
