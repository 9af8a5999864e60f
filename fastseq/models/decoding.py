"""`generate` and `stream`: arguments, the decoder of a model, the search over it, and the form of what comes back.

A model of symbols begins with ``begin(copies)``: the logits (B, V) of what follows each of B prompts, and a `Decoder`
whose rows stand there; `copies` says how many rows each prompt may be forked to. A compiled decoder has a method
``capsule`` (src/decoding/decoder.h), and what goes on from it runs compiled; any other is driven by
the searches of `fastseq.reference`.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from fastseq import backend, checks
from fastseq.checks import Array
from fastseq.splitmix import mixed

F = TypeVar("F", bound=Callable[..., Any])


class Decoder(Protocol):
    """The states of the rows of symbols that are being generated."""

    def step(self, symbols: Array) -> Array:
        """Append one symbol to each row, (B,); return the logits (B, V) of what follows."""
        ...

    def choose(self, rows: Array) -> None:
        """Replace the rows by these of them: forked, reordered or fewer."""
        ...


class Search(Protocol):
    """Sampling, greedy decoding or beam search over a decoder."""

    def advance(self, steps: int) -> bool:
        """Take at most so many steps; return whether any row goes on."""
        ...

    def results(self) -> list[list[tuple[Array, Array | None]]]:
        """Return ids, and log-probabilities if asked for, of each result of each prompt."""
        ...


class Searches(Protocol):
    """A set of operations that search: `fastseq._decoding`, or its twin in `fastseq.reference`."""

    def search(self, decoder: Any, logits: Array, prompts: list[Array], keys: Array | None, settings: Any) -> Search:
        """Start the search that the options ask for."""
        ...


@runtime_checkable
class CompiledDecoder(Protocol):
    """A decoder that a compiled search drives."""

    def capsule(self) -> Any:
        """A capsule with its `fs_decoder` (src/decoding/decoder.h)."""
        ...


class StateDecoder:
    """The decoder of a model with ``step(x_t, state)`` whose states have rows: ``state[rows]``."""

    def __init__(self, model: Any, state: Any) -> None:
        self._model = model
        self._state = state

    def step(self, symbols: Array) -> Array:  # noqa: D102
        logits: Array
        logits, self._state = self._model.step(symbols, self._state)
        return logits

    def choose(self, rows: Array) -> None:  # noqa: D102
        self._state = self._state[rows]


class Given(NamedTuple):
    """What a model is asked to continue."""

    prompts: list[Array]  # int64, one a row
    begin: Callable[[int], tuple[Array, Decoder]]  # begin(copies) reads them
    unbatched: bool  # there is one, and it was given without a batch
    vocab_size: int  # symbols that may be generated are 0..vocab_size-1
    searches: Searches  # for compiled decoders
    # An output that ends a row, is no symbol and not part of the result. Where there is one, results are lists and
    # prompts are of other symbols: the repetition penalty does not count them.
    end: int | None = None


@dataclass(frozen=True)
class Options:
    """Options of `generate` and `stream`: how symbols are chosen. Checked when made.

    Parameters
    ----------
    max_new : int
        How many symbols; at most, where something ends a row.
    temperature : float, 0 or more
        Logits are divided by it; at 0 the most probable symbol is chosen, of equals that of the lowest id.
    top_k : int, optional
        Draw from the k most probable symbols only [1]_; of equals, the lower id comes first.
    top_p : float in [0, 1], optional
        Draw from the smallest set of the most probable symbols whose probability, after `top_k`, reaches p [2]_; at
        least one symbol.
    repetition_penalty : float, more than 0
        The logit of every symbol chosen before, and of a language model every symbol of the prompt, is divided by it if
        it is above 0, else multiplied by it [3]_; before all else, and once however often the symbol occurs.
    num_beams : int
        Above 1, beam search with so many hypotheses of each row; needs `temperature` 0 or 1, and no `top_k` or
        `top_p`. The repetition penalty changes the probabilities.
    length_penalty : float, 0 or more
        Hypotheses of beam search are ranked by log P / n ** length_penalty, n their symbols [4]_.
    num_results : int
        Above 1, so many results of each row: the best hypotheses, or draws as if the row were given that often.
    stop : int, list of ints, or list of sequences of ints, optional
        Symbols, or sequences of them, that end a row. The last is part of the result. A sequence counts only where
        all of it was chosen, not where it began in the prompt.
    seed : int, or array of shape (B,) of ints, optional
        Fixes what is drawn. A row's result depends on its prompt and its seed, not on the other rows; of rows with the
        same prompt and one seed, each draws numbers of its own.
    return_log_probs : bool
        Whether to return the log-probabilities of the chosen symbols, too.

    References
    ----------
    .. [1] A. Fan, M. Lewis and Y. Dauphin, "Hierarchical neural story generation", ACL 2018.
    .. [2] A. Holtzman, J. Buys, L. Du, M. Forbes and Y. Choi, "The curious case of neural text degeneration", ICLR
       2020.
    .. [3] N. S. Keskar, B. McCann, L. R. Varshney, C. Xiong and R. Socher, "CTRL: a conditional transformer
       language model for controllable generation", 2019.
    .. [4] Y. Wu et al., "Google's neural machine translation system", 2016; without its offset and its coverage.
    """

    max_new: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    num_results: int = 1
    stop: Any = None
    seed: Any = None  # checked by `keys`, which knows the number of rows
    return_log_probs: bool = False

    def __post_init__(self) -> None:
        checked = {
            "max_new": checks.size("max_new", self.max_new),
            "temperature": checks.number("temperature", self.temperature, least=0),
            "top_k": None if self.top_k is None else checks.size("top_k", self.top_k, 1),
            "top_p": None if self.top_p is None else checks.number("top_p", self.top_p, least=0),
            "repetition_penalty": checks.number("repetition_penalty", self.repetition_penalty, above=0),
            "num_beams": checks.size("num_beams", self.num_beams, 1),
            "length_penalty": checks.number("length_penalty", self.length_penalty, least=0),
            "num_results": checks.size("num_results", self.num_results, 1),
            "return_log_probs": checks.flag("return_log_probs", self.return_log_probs),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.top_p is not None and self.top_p > 1:
            raise ValueError(f"top_p should be at most 1, not {self.top_p}")
        if self.num_beams > 1:
            self._check_beams()

    def _check_beams(self) -> None:
        """Refuse what beam search cannot do."""
        if self.temperature not in (0, 1):
            raise ValueError(
                f"temperature should be 0 or 1 where num_beams is {self.num_beams}, not {self.temperature}"
            )
        for name, value in (("top_k", self.top_k), ("top_p", self.top_p)):
            if value is not None:
                raise ValueError(f"{name} should be None where num_beams is {self.num_beams}, not {value}")
        if self.num_results > self.num_beams:
            raise ValueError(f"num_results should be at most num_beams, {self.num_beams}, not {self.num_results}")

    @property
    def draws(self) -> bool:
        """Whether symbols are drawn at random."""
        return self.temperature > 0 and self.num_beams == 1

    @property
    def copies(self) -> int:
        """To how many rows each prompt may be forked."""
        return self.num_beams if self.num_beams > 1 else self.num_results

    def for_vocabulary(self, vocab_size: int, end: int | None = None) -> Options:
        """Return the options with `stop` as a tuple of sequences of ids, each once, as a search takes it.

        Parameters
        ----------
        vocab_size : int
            `stop` is of symbols 0..vocab_size-1.
        end : int, optional
            An output of the model that ends a row and is no symbol.
        """
        sequences = [] if self.stop is None else _stop_sequences(self.stop, vocab_size)
        if end is not None:
            sequences.append((end,))
        return replace(self, stop=tuple(dict.fromkeys(sequences)))


def documented(function: F) -> F:
    """Write the documentation of `Options` into that of a function.

    The line ``{options}`` becomes the entries of those options that the function takes, the line ``{references}``
    becomes what they refer to.
    """
    if function.__doc__ is None or Options.__doc__ is None:  # python -OO
        return function
    _, entries, references = inspect.cleandoc(Options.__doc__).split("\n----------\n")
    entries = entries.removesuffix("References").rstrip()
    of_option = {one.partition(" : ")[0]: one for one in re.split(r"\n(?! )", entries)}
    taken = [of_option[name] for name in inspect.signature(function).parameters if name in of_option]
    text = inspect.cleandoc(function.__doc__)
    function.__doc__ = text.replace("{options}", "\n".join(taken)).replace("{references}", references)
    return function


def _stop_sequences(stop: Any, vocab_size: int) -> list[tuple[int, ...]]:
    """What ends a row: a symbol, a list of symbols, a list of sequences, or a mix of the last two."""
    if isinstance(stop, str | bytes):
        raise TypeError(f"stop should be ids or sequences of ids, not {checks.describe(stop)}")
    several = isinstance(stop, list | tuple) or (isinstance(stop, np.ndarray) and stop.ndim > 0)
    named = [(f"stop[{i}]", one) for i, one in enumerate(stop)] if several else [("stop", stop)]
    found = []
    for name, one in named:
        sequence = checks.ids(name, one, vocab_size)
        if sequence.ndim > 1 or not sequence.size:
            raise ValueError(f"{name} should be an id or a sequence of at least one id, not {checks.describe(one)}")
        found.append(tuple(int(symbol) for symbol in np.atleast_1d(sequence)))
    return found


def keys(prompts: list[Array], options: Options) -> Array | None:
    """Return a number for each copy of each prompt, (B * num_results,) uint64, from which its random numbers follow.

    A row depends on its prompt, its seed, and how often the same prompt stood before it: of rows with the same prompt
    each draws numbers of its own. With a seed a row, only copies of one row are counted. None where nothing is drawn.
    """
    seed = options.seed
    many = seed is not None and np.ndim(checks.as_array("seed", seed)) > 0
    if many:
        array = checks.integers("seed", seed)
        if array.shape != (len(prompts),):
            raise ValueError(f"seed should be an integer, or of shape ({len(prompts)},), one a row, not {array.shape}")
        seeds: list[int | None] = [checks.size(f"seed[{i}]", one) for i, one in enumerate(array)]
    else:
        seeds = [checks.seed("seed", seed)]
    if not options.draws:
        return None
    of_rows = np.array([np.random.SeedSequence(one).generate_state(1, np.uint64)[0] for one in seeds], np.uint64)
    seen: dict[bytes, int] = {}
    result = np.empty((len(prompts), options.num_results), np.uint64)
    for i, prompt in enumerate(prompts):
        if many:
            seen.clear()
        symbols = prompt.astype("<i8").tobytes()
        for copy in range(options.num_results):
            seen[symbols] = seen.get(symbols, 0) + 1
            digest = hashlib.blake2b(symbols + seen[symbols].to_bytes(8, "little"), digest_size=8).digest()
            result[i, copy] = int.from_bytes(digest, "little")
    return mixed(of_rows[:, None] + mixed(result)).reshape(-1)


def generated(given: Given, options: Options) -> Any:
    """Return what `generate` of a model returns."""
    search = _begun(given, options)
    if search is not None:
        search.advance(options.max_new)
        results = search.results()
    else:
        nothing = np.empty(0, np.int64), np.empty(0) if options.return_log_probs else None
        results = [[nothing] * options.num_results for _ in given.prompts]
    as_lists = given.end is not None or options.stop is not None
    ids = [[_without(one, given.end) for one, _ in each] for each in results]
    formed = _formed(ids, given.unbatched, options, as_lists, np.int64)
    if not options.return_log_probs:
        return formed
    return formed, _formed([[p for _, p in each] for each in results], given.unbatched, options, as_lists, np.float64)


def streamed(given: Given, options: Options) -> Iterator[Any]:
    """Return what `stream` of a model returns."""
    search: Any = _begun(given, options)  # no beam search: it has `latest`
    return iter(()) if search is None else _stream(search, given.unbatched, given.end)


def _stream(search: Any, unbatched: bool, end: int | None) -> Iterator[Any]:
    going_on = True
    while going_on:
        going_on = search.advance(1)
        symbols = search.latest()
        if end is not None:
            symbols[symbols == end] = -1
            if (symbols < 0).all():
                continue
        yield int(symbols[0]) if unbatched else symbols


def _begun(given: Given, options: Options) -> Search | None:
    """Start the search over the decoder of a model; None where there is nothing to do."""
    prompts, end = given.prompts, given.end
    options = options.for_vocabulary(given.vocab_size, end)
    of_rows = keys(prompts, options)
    if not options.max_new or not prompts:
        return None
    logits, decoder = given.begin(options.copies)
    searches: Searches = given.searches if isinstance(decoder, CompiledDecoder) else backend.general().decoding
    histories = prompts if end is None else [np.empty(0, np.int64)] * len(prompts)
    return searches.search(decoder, logits, histories, of_rows, options)


def _without(ids: Array, end: int | None) -> Array:
    return ids[:-1] if end is not None and len(ids) and ids[-1] == end else ids


def _formed(results: list[list[Any]], unbatched: bool, options: Options, as_lists: bool, dtype: Any) -> Any:
    """Return results in the form that `generate` promises."""
    if options.num_results > 1:
        return results[0] if unbatched else results
    rows = [row for (row,) in results]
    if unbatched:
        return rows[0]
    if as_lists:
        return rows
    return np.stack(rows) if rows else np.empty((0, options.max_new), dtype)
