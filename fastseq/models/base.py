"""What the models share: files, sequences of symbols as they may be given, what is measured on them, and the verbs."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastseq import checks, io, training
from fastseq.checks import Array
from fastseq.layers.base import SEQUENCE, Composite
from fastseq.models import decoding
from fastseq.training import Batch, History, arguments

BATCH_SIZE = arguments.BATCH_SIZE  # of `fit`, where none is given
_MOST_EXTENT = 1e150  # of series: its square, and that of its reciprocal, are ordinary numbers


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

    @property
    def loss_unit(self) -> str:
        """What the losses of a training are counted in."""
        return "nats a symbol"

    def _check_fitted(self, given: Mapping[str, Any]) -> dict[str, Array]:
        """What `fit` measured, from a file or a state dict, looked at; a fault is a `ValueError`."""
        return {name: np.array(value) for name, value in given.items()}

    def _take_fitted(self, fitted: Mapping[str, Array]) -> None:
        for array in fitted.values():
            array.flags.writeable = False
        self._fitted = fitted

    def _refresh(self) -> None:
        """Bring up to date what was measured; while a model is trained, its parameters change with every step."""

    def _needs_fit(self) -> Mapping[str, Array]:
        if not self._fitted:
            raise ValueError(f"this {type(self).__name__} should be fitted first")
        self._refresh()
        return self._fitted

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Put parameters and what was measured back to what they were where the block fails, by Ctrl-C too."""
        arrays, fitted = dict(self._arrays), self._fitted
        try:
            yield
        except BaseException:
            self._adopt(arrays)
            self._fitted = fitted
            raise

    def _train(self, data: Any, settings: Mapping[str, Any]) -> History:
        """`fastseq.training.fit`; where it fails, the model is as it was."""
        with self._all_or_nothing():
            return training.fit(self, data, **settings)

    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters by name, and of what `fit` measured."""
        self._refresh()
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
        self._refresh()
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

    @classmethod
    def of(cls, rows: list[Array]) -> Symbols:
        """Some sequences."""
        return cls(np.concatenate(rows), np.array([len(row) for row in rows], np.int64))

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


def is_data(value: Any) -> bool:
    """Whether it is data of the trainer, which already is in batches."""
    batches = isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(one, Batch) for one in value)
    return hasattr(value, "batches") or batches


def batched_already(**settings: Any) -> None:
    """Refuse what says how data is put into batches, of data that already is."""
    for name, value in settings.items():
        if value is not None:
            raise ValueError(f"{name} should not be given with data that already is in batches, but is {value!r:.80}")


def no_text(name: str, value: Any) -> None:
    """Refuse text where ids belong, in any form: a string, bytes, a list or an array of strings."""
    one = value
    while isinstance(one, list | tuple) and len(one):
        one = one[0]
    if isinstance(one, str | bytes) or (isinstance(one, np.ndarray) and one.dtype.kind in "US"):
        raise TypeError(
            f"{name} should be ids, integers, not text: {checks.describe(one)}; give each symbol a number first,"
            " as in [symbols.index(s) for s in text]"
        )


def ids_array(name: str, value: Any) -> Array:
    """An array that may hold ids; text is refused."""
    no_text(name, value)
    return checks.as_array(name, value)


def padded_pair(value: Any) -> tuple[Any, Any]:
    """Sequences and their lengths, given as a tuple of a padded array (B, T) and (B,); or as they are, and None."""
    if isinstance(value, tuple) and len(value) == 2 and not isinstance(value, Batch):
        first = value[0]
        if np.ndim(first) == 2 if isinstance(first, np.ndarray) else is_list_of_rows(first):
            return value
    return value, None


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of an array, or of a list of numbers; () of anything else."""
    return (len(value),) if isinstance(value, list | tuple) else tuple(getattr(value, "shape", ()))


def no_targets(name: str, value: Any, lengths: Any) -> None:
    """Refuse targets in the place of lengths: a model that goes on from what it is given makes them itself."""
    if lengths is None or is_data(value):
        return
    if is_list_of_rows(value) or is_list_of_rows(lengths):
        targets = is_list_of_rows(lengths)
    else:
        shape = _shape(value)
        targets = shape not in ((), (1,)) and _shape(lengths) == shape
    if targets:
        raise ValueError(
            "lengths should be the number of real steps of each row, not targets: the model makes these itself, each"
            f" step being the target of the one before; give all steps unbatched, as in fit({name})"
        )


def held_out(count: int, share: Any, seed: int | None) -> tuple[Array, Array]:
    """Which of `count` sequences a model learns from, and which it is validated on: a share of them, at least one."""
    known = checks.seed("seed", seed)
    drawn = int(np.random.SeedSequence().generate_state(1)[0]) if known is None else known
    return arguments.held_out(count, arguments.split_share(share), drawn)


def text_split(given: Symbols, share: Any, seed: int | None) -> tuple[Symbols, Symbols | None]:
    """What is learnt from, and what is validated on: some of the sequences; of one the last part."""
    if share is None:
        return given, None
    if len(given.lengths) == 1:
        cut = last_part(len(given.ids), share, 1)
        return given.of([given.ids[:cut]]), given.of([given.ids[cut:]])
    rows = given.split()
    return tuple(given.of([rows[i] for i in which]) for which in held_out(len(rows), share, seed))  # type: ignore[return-value]


def whole_sequences(name: str, given: Symbols, batch_size: int | None) -> training.PaddedBatches:
    """Sequences to validate on, each from its begin symbol on; empty ones have no symbol that could count."""
    rows = [row for row in given.split() if len(row)]
    if not rows:
        raise ValueError(f"{name} should hold at least one symbol")
    return training.PaddedBatches(rows, batch_size=batch_size or BATCH_SIZE, shuffle=False)


def last_part(length: int, share: Any, least: int) -> int:
    """Where the last part of one long sequence begins, on which a model is validated; each part has `least` steps."""
    fraction = arguments.split_share(share)
    if length < 2 * least:
        raise ValueError(f"validation_split should be given with at least {2 * least} steps, not {length}")
    return min(max(length - round(fraction * length), least), length - least)


def symbols(name: str, value: Any, lengths: Any, vocab_size: int, lengths_name: str = "lengths") -> Symbols:
    """Sequences of ids in any form they may be given in.

    A list of sequences; an array (T,), which is one; or (B, T), with `lengths` where the rows are padded.
    """
    no_text(name, value)
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
        unbatched = not is_list_of_rows(prompt) and np.ndim(prompt) == 1
        return decoding.Given(rows, functools.partial(self._decoder, rows), unbatched)


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

    values: Array  # (S, T), or (S, T, I) of I values a step; contiguous, at least float64
    lengths: Array  # (S,) int64
    unbatched: bool  # given without the axis of series
    flat: bool  # given without the axis of values, though `values` has it
    dtype: np.dtype[Any]  # of results: no narrower than that of the model, and of what was given
    precision: float  # the relative distance of two numbers next to each other, as they were given

    def like(self, result: Array) -> Array:
        """A result in the form and the dtype the series were given in."""
        if self.flat:
            result = result[..., 0]
        with np.errstate(over="ignore"):  # beyond float32 it is inf
            result = result.astype(self.dtype, copy=False)
        return result[0] if self.unbatched else result

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

    def some(self, which: Array) -> Series:
        """Some of the series."""
        return self._replace(values=self.values[which], lengths=self.lengths[which], unbatched=False)

    def steps(self, first: int, last: int) -> Series:
        """The steps from `first` up to `last` of the one series there is."""
        values = np.ascontiguousarray(self.values[:, first:last])
        return self._replace(values=values, lengths=np.array([last - first]))


def series_of(name: str, value: Any, lengths: Any, dtype: np.dtype[Any], width: int | None = None) -> Series:
    """Series in any form they may be given in: (T,), (S, T) with or without lengths, or a list of arrays.

    Of `width` values a step each form has an axis more, which may be left out where that is one. They are kept in
    float64 whatever the `dtype` of the model, so that centring loses nothing of values far from 0.
    """
    axes = 2 if width is not None and width > 1 else 1
    form = "(T,)" if axes == 1 else f"(T, {width})"
    wide = np.result_type(dtype, np.float64)
    if lengths is None and is_list_of_rows(value):
        given = [_real_values(f"{name}[{i}]", row) for i, row in enumerate(value)]
        if width == 1 and all(row.ndim == 2 for row in given):
            axes, form = 2, "(T, 1)"
        for i, row in enumerate(given):
            if row.ndim != axes or (axes == 2 and row.shape[1] != width):
                raise ValueError(f"{name}[{i}] should be of shape {form}, not {row.shape}")
        counts = np.array([len(row) for row in given], np.int64)
        own = np.result_type(*(row.dtype for row in given))
        array = np.zeros((len(given), int(counts.max()), *given[0].shape[1:]), wide)
        for into, row in zip(array, given, strict=True):
            into[: len(row)] = row
        unbatched = False
    else:
        array = _real_values(name, value)
        column = array.ndim == 2 and array.shape[1] == 1 < len(array)  # (T, 1): one series, not T of a step
        if width == 1 and (array.ndim == 3 or (column and lengths is None)):
            axes, form = 2, "(T, 1)"
        if array.ndim not in (axes, axes + 1) or (axes == 2 and array.shape[-1] != width):
            raise ValueError(f"{name} should be of shape (S, {form[1:]} or {form}, or a list, not {array.shape}")
        own = array.dtype
        unbatched = array.ndim == axes
        array = checks.real_array(name, array.astype(wide, copy=False), wide)
        array = array[None] if unbatched else array
        counts = np.full(len(array), array.shape[1], np.int64)
        if lengths is not None:
            counts = checks.lengths(lengths, *array.shape[:2])
    flat = width is not None and array.ndim == 2
    values = np.ascontiguousarray(array[..., None] if flat else array)
    precision = float(np.finfo(own if own.kind == "f" else np.float64).eps)
    own = own if own.itemsize <= wide.itemsize else wide
    return Series(values, counts, unbatched, flat, np.result_type(own, dtype), precision)


def _real_values(name: str, value: Any) -> Array:
    """Real numbers, integers among them."""
    array = checks.as_array(name, value)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} should hold real numbers, not {array.dtype}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def spread_of(given: Series, name: str) -> tuple[Array, Array]:
    """Mean and standard deviation of each column of the real values, (I,), in float64.

    A column that varies by no more than rounding counts as constant, and has deviation 1. Values are centred around
    the first one before anything is summed, and scaled by their range before anything is squared.
    """
    values = given.values[given.real()]
    values = values.reshape(len(values), -1).astype(np.float64)
    count, width = values.shape
    mean, deviation = np.zeros(width), np.ones(width)
    for i in range(width if count else 0):
        column = values[:, i]
        size = np.abs(column).max()
        unit = np.exp2(np.floor(np.log2(size))) if size else 1.0  # which divides without rounding
        first = column[0] / unit
        apart = column / unit - first
        extent = np.abs(apart).max()
        if not extent:
            mean[i] = column[0]
            continue
        middle = (apart / extent).mean()
        mean[i] = (first + middle * extent) * unit
        found = (apart / extent - middle).std() * extent  # less than 2
        if found * unit <= max(4 * np.finfo(np.float64).eps, given.precision) * size:
            continue
        deviation[i] = found * unit
    check_extent(name, deviation)
    return mean, deviation


def check_extent(name: str, extents: Array) -> None:
    """Refuse series that vary by so much, or so little, that float64 does not have the square of it."""
    wrong = (extents > _MOST_EXTENT) | ((extents > 0) & (extents < 1 / _MOST_EXTENT)) | np.isnan(extents)
    if wrong.any():
        raise ValueError(
            f"{name} should vary by between {1 / _MOST_EXTENT:g} and {_MOST_EXTENT:g}, or not at all, so that float64"
            f" has the square of it, not by {extents[wrong][0]:g}; scale them first"
        )


class ScaledModel(Model):
    """A model of series whose layers see values less their mean and divided by their deviation, as `fit` found them.

    What comes in and goes out is scaled in float64; the layers see their own dtype. A subclass measures ``mean``,
    ``deviation`` and ``sigma2``, the variance of what its predictions leave.
    """

    # While it is trained: the series, and for which arrays sigma2 was measured.
    _learning_from: Series | None = None
    _measured_for: tuple[Array, ...] = ()
    _untouched: tuple[Array, ...] = ()  # the parameters it was made with

    @property
    def loss_unit(self) -> str:
        """What the losses of a training are counted in."""
        return "squared deviations a value"

    def _start(self, config: dict[str, Any], **children: Any) -> None:
        super()._start(config, **children)
        self._untouched = tuple(self._arrays.values())

    def _variance(self, given: Series) -> Array:
        """The mean square of what predictions leave of some series, as `sigma2` has it."""
        raise NotImplementedError

    def _refresh(self) -> None:
        given = self._learning_from
        if given is None:
            return
        now = (*self._arrays.values(), self._fitted["mean"], self._fitted["deviation"])
        if len(now) == len(self._measured_for) and all(a is b for a, b in zip(now, self._measured_for, strict=True)):
            return
        self._measured_for = now  # before the predictions, which ask for nothing that is out of date
        self._take_fitted({**self._fitted, "sigma2": self._variance(given)})

    def _learn(self, given: Series, name: str, data: Any, measured: Mapping[str, Array], settings: Any) -> History:
        """Train on what was made of some series, with their mean and deviation; measure what is left."""
        with self._all_or_nothing():
            mean, deviation = spread_of(given, name)
            self._take_fitted({"mean": mean, "deviation": deviation, "sigma2": np.square(deviation), **measured})
            self._learning_from = given
            try:
                history = training.fit(self, data, **settings)
                self._refresh()
            finally:
                self._learning_from, self._measured_for = None, ()
        return history

    def _optimised(self, settings: dict[str, Any]) -> None:
        """Adam with a learning rate of 0.01, where no other optimiser is given."""
        if settings.get("optimiser") is None and settings.get("optimizer") is None:
            rate = settings.pop("lr", None)
            settings["optimiser"] = training.Adam(self, 0.01 if rate is None else rate)

    def _needs_units(self) -> None:
        """Refuse to predict before anything was learnt, loaded or set."""
        if not self._fitted and all(a is b for a, b in zip(self._arrays.values(), self._untouched, strict=True)):
            self._needs_fit()

    def _units(self) -> tuple[Array, Array]:
        """Mean and deviation, (I,) of float64; none have been measured of what was trained without `fit`."""
        if not self._fitted:
            return np.zeros(1), np.ones(1)
        return self._fitted["mean"], self._fitted["deviation"]

    def _standard(self, values: Array) -> Array:
        """What the layers see of some values (..., I)."""
        mean, deviation = self._units()
        with np.errstate(over="ignore", invalid="ignore"):
            return ((values - mean) / deviation).astype(self.dtype, order="C")

    def _raw(self, values: Array) -> Array:
        """What the layers' outputs (..., I) are, in float64."""
        mean, deviation = self._units()
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(values * deviation + mean)


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
