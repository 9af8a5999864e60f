"""What the models share: files, sequences of symbols as they may be given, what is measured on them, and the verbs."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fastseq import _decode, checks, io
from fastseq.checks import Array
from fastseq.layers.base import SEQUENCE, Composite
from fastseq.models import decoding


class Model(Composite):
    """Layers with trained parameters, none in some models, and what `fit` measured beside them."""

    time = SEQUENCE
    _by_own_rule = ("output", "head")  # with another start the first losses are far from what chance gives

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
        self._freeze()


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

    def split(self) -> list[Array]:
        """The sequences one by one."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []

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
        rows = [checks.integers(f"{name}[{i}]", row) for i, row in enumerate(value)]
        for i, row in enumerate(rows):
            if row.ndim != 1:
                raise ValueError(f"{name}[{i}] should be a sequence of ids, not {checks.describe(row)}")
        ids = np.concatenate(rows, dtype=np.int64, casting="unsafe")  # what does not fit becomes negative
        if np.count_nonzero((ids < 0) | (ids >= vocab_size)):
            for i, row in enumerate(rows):
                checks.ids(f"{name}[{i}]", row, vocab_size)  # says where
        return Symbols(ids, np.array([len(row) for row in rows], np.int64))
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
    """A model of sequences of symbols 0..V-1: the chain rule, and what follows from it."""

    _decoding: ClassVar[Any] = _decode

    vocab_size: int

    def _log_probs(self, given: Symbols) -> Array:
        """log P(x_s | x_<s) of every symbol, (N,), in float64."""
        raise NotImplementedError

    def _decoder(self, prompts: list[Array], copies: int) -> tuple[Array, decoding.Decoder]:
        """The logits (B, V) of what follows each prompt, and a decoder whose rows stand there.

        Parameters
        ----------
        prompts : list of int64 arrays
            At least one; each may be empty.
        copies : int
            To how many rows each may be forked.
        """
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
        self,
        prompt: Any,
        max_new: int,
        *,
        lengths: Any = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        num_results: int = 1,
        stop: Any = None,
        seed: Any = None,
        return_log_probs: bool = False,
    ) -> Any:
        """Choose one symbol after another: drawn, the likeliest, or by beam search.

        Parameters
        ----------
        prompt : list of sequences of ids, or array of shape (B, T), or (T,) for one
            What to go on from; an empty prompt goes on from the begin symbol.
        max_new : int
            How many symbols; at most, with `stop`.
        lengths : array of shape (B,), optional
            The real symbols of each row of the prompt.
        temperature : float, 0 or more
            Logits are divided by it; at 0 the likeliest symbol is taken, of equals that of the lowest id.
        top_k : int, optional
            Draw from the k likeliest only [1]_; of equals, the lower id is likelier.
        top_p : float in [0, 1], optional
            Draw from the smallest set of the likeliest whose probability, after `top_k`, reaches p [2]_; that is one
            symbol at least.
        repetition_penalty : float, more than 0
            The logit of every symbol of the prompt and of what was chosen is divided by it if it is above 0, else
            multiplied by it [3]_; before all else, and once for a symbol that stands there often.
        num_beams : int
            Above 1, so many hypotheses of each row are followed side by side, the likeliest; needs `temperature` 0 or
            1, and no `top_k` or `top_p`. The repetition penalty changes what is likely.
        length_penalty : float, 0 or more
            Hypotheses of beam search are ranked by log P / n ** length_penalty, n their symbols [4]_.
        num_results : int
            Above 1, so many results of each row: the best hypotheses, or draws as if the prompt stood there that often.
        stop : int, list of ints, or list of sequences of ints, optional
            Symbols, or sequences of them, that end a row. The last is part of the result. A sequence counts only where
            all of it was chosen, not where it began in the prompt.
        seed : int, or array of shape (B,) of ints, optional
            Fixes what is drawn. A row's result depends on its prompt and its seed, not on the rows beside it; of rows
            with the same prompt and one seed, each draws numbers of its own.
        return_log_probs : bool
            Whether to return the log-probabilities of what was chosen, too.

        Returns
        -------
        ids : ndarray of shape (B, max_new), or (max_new,) for a prompt (T,)
            int64. With `stop` a list of B arrays of their own lengths, or one array. With `num_results` above 1 a list
            of results for each row, or one list, best first; fewer, if there are not so many.
        log_probs : of the same form, with `return_log_probs`
            float64: log P(x_t | x_<t) of the model itself, whatever was done to the logits.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it should be; of a prompt and a step at which logits are NaN, or
            nothing is left to choose from.

        References
        ----------
        .. [1] A. Fan, M. Lewis and Y. Dauphin, "Hierarchical neural story generation", ACL 2018.
        .. [2] A. Holtzman, J. Buys, L. Du, M. Forbes and Y. Choi, "The curious case of neural text degeneration", ICLR
           2020.
        .. [3] N. S. Keskar, B. McCann, L. R. Varshney, C. Xiong and R. Socher, "CTRL: a conditional transformer
           language model for controllable generation", 2019.
        .. [4] Y. Wu et al., "Google's neural machine translation system", 2016; without its offset and its coverage.
        """
        return decoding.generated(
            self,
            self._given(prompt, lengths),
            max_new,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            num_beams=num_beams,
            length_penalty=length_penalty,
            num_results=num_results,
            stop=stop,
            seed=seed,
            return_log_probs=return_log_probs,
        )

    def stream(
        self,
        prompt: Any,
        max_new: int,
        *,
        lengths: Any = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: Any = None,
        seed: Any = None,
    ) -> Iterator[Any]:
        """The symbols of `generate`, one after another, each as soon as it is chosen and none before it is asked for.

        Parameters
        ----------
        prompt, max_new, lengths, temperature, top_k, top_p, repetition_penalty, stop, seed
            As of `generate`; looked at by the call, not when the first symbol is asked for.

        Returns
        -------
        iterator of int, for a prompt (T,); else of ndarrays of shape (B,)
            int64; -1 where a row had ended before.
        """
        return decoding.streamed(
            self,
            self._given(prompt, lengths),
            max_new,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            seed=seed,
        )

    def _given(self, prompt: Any, lengths: Any) -> decoding.Given:
        """The prompts, looked at."""
        rows = symbols("prompt", prompt, lengths, self.vocab_size).split()
        alone = not is_list_of_rows(prompt) and np.ndim(prompt) == 1
        return decoding.Given(rows, functools.partial(self._decoder, rows), alone)


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
