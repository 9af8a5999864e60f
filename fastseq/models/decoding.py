"""`generate` and `stream`: arguments, the decoder of a model, the search over it, and the form of what comes back.

A model of symbols begins with ``begin(copies)``: the logits (B, V) of what follows each of B prompts, and a `Decoder`
whose rows stand there; `copies` says how many rows each prompt may be forked to. A compiled decoder has a method
``capsule`` (src/decoding/decoder.h), and what goes on from it runs compiled; any other is driven by
the searches of `fastseq.reference`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from fastseq import backend, checks
from fastseq.checks import Array
from fastseq.splitmix import mixed


class Decoder(Protocol):
    """The states of some rows of symbols."""

    def step(self, symbols: Array) -> Array:
        """The logits (B, V) of what follows one symbol more of each row, (B,)."""
        ...

    def choose(self, rows: Array) -> None:
        """The rows become these of the rows there were: forked, in another order, without some."""
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
    """What a model is asked to go on from."""

    prompts: list[Array]  # int64, one a row
    begin: Callable[[int], tuple[Array, Decoder]]  # begin(copies) reads them
    unbatched: bool  # there is one, and it was given without a batch
    # An output that ends a row, is no symbol and not part of the result. Where there is one, results are lists and
    # prompts are of other symbols: the repetition penalty does not count them. Symbols are 0..end-1 then, and those of
    # `model.vocab_size` else.
    end: int | None = None


class Settings(NamedTuple):
    """The arguments of `generate`, checked."""

    max_new: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    num_results: int = 1
    stop: tuple[tuple[int, ...], ...] = ()  # sequences that end a row, each once
    log_probs: bool = False

    @property
    def draws(self) -> bool:
        """Whether symbols are drawn, and not chosen."""
        return self.temperature > 0 and self.num_beams == 1

    @property
    def copies(self) -> int:
        """To how many rows each prompt may be forked."""
        return self.num_beams if self.num_beams > 1 else self.num_results


def checked(
    vocab_size: int,
    max_new: Any,
    *,
    end: int | None = None,
    temperature: Any = 1.0,
    top_k: Any = None,
    top_p: Any = None,
    repetition_penalty: Any = 1.0,
    num_beams: Any = 1,
    length_penalty: Any = 1.0,
    num_results: Any = 1,
    stop: Any = None,
    return_log_probs: Any = False,
) -> Settings:
    """The arguments of `generate` that do not depend on the prompts, looked at.

    Parameters
    ----------
    vocab_size : int
        `stop` is of symbols 0..vocab_size-1.
    end : int, optional
        An output of the model that ends a row and is no symbol.
    **settings
        As of `generate`.
    """
    max_new = checks.size("max_new", max_new)
    temperature = checks.number("temperature", temperature, least=0)
    top_k = None if top_k is None else checks.size("top_k", top_k, 1)
    top_p = None if top_p is None else checks.number("top_p", top_p, least=0)
    if top_p is not None and top_p > 1:
        raise ValueError(f"top_p should be at most 1, not {top_p}")
    num_beams = checks.size("num_beams", num_beams, 1)
    num_results = checks.size("num_results", num_results, 1)
    if num_beams > 1:
        if temperature not in (0, 1):
            raise ValueError(f"temperature should be 0 or 1 where num_beams is {num_beams}, not {temperature}")
        for name, value in (("top_k", top_k), ("top_p", top_p)):
            if value is not None:
                raise ValueError(f"{name} should be None where num_beams is {num_beams}, not {value}")
        if num_results > num_beams:
            raise ValueError(f"num_results should be at most num_beams, {num_beams}, not {num_results}")
    sequences = [] if stop is None else _stop_sequences(stop, vocab_size)
    if end is not None:
        sequences.append((end,))
    return Settings(
        max_new,
        temperature,
        top_k,
        top_p,
        checks.number("repetition_penalty", repetition_penalty, above=0),
        num_beams,
        checks.number("length_penalty", length_penalty, least=0),
        num_results,
        tuple(dict.fromkeys(sequences)),
        checks.flag("return_log_probs", return_log_probs),
    )


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


def keys(prompts: list[Array], seed: Any, settings: Settings) -> Array | None:
    """A number for each copy of each prompt, (B * num_results,) uint64: its random numbers follow from it.

    A row depends on its prompt, its seed, and how often the same prompt stood before it: of rows with the same prompt
    each draws numbers of its own. With a seed a row, only copies of one row are counted. None where nothing is drawn.
    """
    many = seed is not None and np.ndim(checks.as_array("seed", seed)) > 0
    if many:
        array = checks.integers("seed", seed)
        if array.shape != (len(prompts),):
            raise ValueError(f"seed should be an integer, or of shape ({len(prompts)},), one a row, not {array.shape}")
        seeds: list[int | None] = [checks.size(f"seed[{i}]", one) for i, one in enumerate(array)]
    else:
        seeds = [checks.seed("seed", seed)]
    if not settings.draws:
        return None
    of_rows = np.array([np.random.SeedSequence(one).generate_state(1, np.uint64)[0] for one in seeds], np.uint64)
    seen: dict[bytes, int] = {}
    result = np.empty((len(prompts), settings.num_results), np.uint64)
    for i, prompt in enumerate(prompts):
        if many:
            seen.clear()
        symbols = prompt.astype("<i8").tobytes()
        for copy in range(settings.num_results):
            seen[symbols] = seen.get(symbols, 0) + 1
            digest = hashlib.blake2b(symbols + seen[symbols].to_bytes(8, "little"), digest_size=8).digest()
            result[i, copy] = int.from_bytes(digest, "little")
    return mixed(of_rows[:, None] + mixed(result)).reshape(-1)


def generated(model: Any, given: Given, max_new: Any, *, seed: Any, **settings: Any) -> Any:
    """What `generate` of a model returns.

    Parameters
    ----------
    model : Model
        Its backend has the search.
    given : Given
    max_new, seed, **settings
        As of `generate`.
    """
    of_search, found = _begun(model, given, max_new, seed, settings)
    if found is not None:
        found.advance(of_search.max_new)
        results = found.results()
    else:
        nothing = np.empty(0, np.int64), np.empty(0) if of_search.log_probs else None
        results = [[nothing] * of_search.num_results for _ in given.prompts]
    as_lists = given.end is not None or settings.get("stop") is not None
    ids = [[_without(one, given.end) for one, _ in each] for each in results]
    formed = _formed(ids, given.unbatched, of_search, as_lists, np.int64)
    if not of_search.log_probs:
        return formed
    return formed, _formed([[p for _, p in each] for each in results], given.unbatched, of_search, as_lists, np.float64)


def streamed(model: Any, given: Given, max_new: Any, *, seed: Any, **settings: Any) -> Iterator[Any]:
    """What `stream` of a model returns; parameters as of `generated`. Arguments are checked before the first symbol."""
    _, found = _begun(model, given, max_new, seed, settings)
    return iter(()) if found is None else _stream(found, given.unbatched, given.end)


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


def _begun(model: Any, given: Given, max_new: Any, seed: Any, settings: Mapping[str, Any]) -> tuple[Settings, Any]:
    """The arguments, checked, and the search over the decoder of a model, at its beginning; None: nothing to do."""
    prompts, end = given.prompts, given.end
    of_search = checked(model.vocab_size if end is None else end, max_new, end=end, **settings)
    of_rows = keys(prompts, seed, of_search)
    if not of_search.max_new or not prompts:
        return of_search, None
    logits, decoder = given.begin(of_search.copies)
    operations = (model._backend if isinstance(decoder, CompiledDecoder) else backend.general()).decoding
    histories = prompts if end is None else [np.empty(0, np.int64)] * len(prompts)
    return of_search, operations.search(decoder, logits, histories, of_rows, of_search)


def _without(ids: Array, end: int | None) -> Array:
    return ids[:-1] if end is not None and len(ids) and ids[-1] == end else ids


def _formed(results: list[list[Any]], unbatched: bool, settings: Settings, as_lists: bool, dtype: Any) -> Any:
    """Results in the form that `generate` promises."""
    if settings.num_results > 1:
        return results[0] if unbatched else results
    rows = [row for (row,) in results]
    if unbatched:
        return rows[0]
    if as_lists:
        return rows
    return np.stack(rows) if rows else np.empty((0, settings.max_new), dtype)
