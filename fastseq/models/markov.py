"""Markov chains: the distribution of a symbol given the τ before it, counted."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.layers.settings import KW_ONLY, checked, size
from fastseq.models.decoding import Decoder
from fastseq.models.forms import no_targets
from fastseq.models.sums import sums
from fastseq.models.symbol_model import SymbolModel
from fastseq.models.symbols import Symbols, ids_array, symbols
from fastseq.training import History

_SMOOTHINGS = ("witten_bell", "kneser_ney")
_CRITERIA = ("bic", "aic", "held_out")
MAX_SYMBOLS = 1 << 31  # a context and a symbol make one 64-bit key


class _Level(NamedTuple):
    """The contexts of one length that were seen, and what followed them.

    A context has a number, its place among `contexts`. It is the context one symbol shorter, and one symbol more,
    further back; so whatever the order, a key is a number and a symbol.
    """

    contexts: Array  # sorted: number of the context one shorter * (V + 1) + its oldest symbol
    grams: Array  # sorted: number of the context * V + the symbol that followed
    counts: Array  # how often each gram was seen
    starts: Array  # (contexts + 1,): where the grams of each context start


class _Weights(NamedTuple):
    """What makes counts a distribution: P(s | c) = (kept(c, s) + spread(c) P'(s)) / total(c), P' one level below."""

    kept: Array  # of each gram
    spread: Array  # of each context
    total: Array  # of each context


def _check_smoothing(name: str, value: Any) -> float | str:
    if isinstance(value, str):
        return checks.choice(name, value, _SMOOTHINGS)
    return checks.number(name, value, least=0)


class MarkovChain(SymbolModel):
    """The discrete autoregressive model of order τ: P(x_t | x_<t) = P(x_t | x_{t-τ}, ..., x_{t-1}), by counting.

    Every sequence is preceded by begin symbols, so that its first symbols have contexts, too. Only contexts that
    were seen take memory.

    References
    ----------
    .. [1] I. H. Witten and T. C. Bell, "The zero-frequency problem", IEEE Transactions on Information Theory 37, 1991.
    .. [2] S. F. Chen and J. Goodman, "An empirical study of smoothing techniques for language modeling", Computer
       Speech & Language 13, 1999: interpolated modified Kneser-Ney, discounts by their closed form.
    """

    _measured = ("grams", "counts")

    order: int = size(default=1, least=0, doc="τ, 0 or more.")
    _: KW_ONLY
    smoothing: float | str = checked(
        _check_smoothing,
        default=1.0,
        takes="float | str",
        form='float or {"witten_bell", "kneser_ney"}',
        doc="A number is added to every count; at 0 the estimate is that of maximum likelihood, and a context that was"
        " not seen is followed by anything. The two names interpolate with the distributions of all lower orders, down"
        " to the uniform one: by the number of different symbols that followed a context [1]_, or by absolute"
        " discounts and the number of different contexts a symbol followed [2]_. Orders beyond two or three need one"
        " of them.",
    )

    def _resolve(self) -> None:
        if self.vocab_size > MAX_SYMBOLS:
            raise OverflowError(f"vocab_size should be at most {MAX_SYMBOLS}, not {self.vocab_size}")

    def _build(self) -> None:
        self.dtype = np.dtype(np.float64)
        self._start()
        self._levels: list[tuple[_Level, _Weights]] = []

    @checks.short_traceback
    def fit(self, sequences: Any, lengths: Any = None) -> History:
        """Count; what was counted before is forgotten. Where this fails, the model is as it was.

        Parameters
        ----------
        sequences : list of sequences of ids, or array of shape (B, T), or (T,) for one
            Ids in 0..V-1.
        lengths : array of shape (B,), optional
            The real symbols of each row.

        Returns
        -------
        History
            Of one step: its loss is the mean of -log P of a symbol that was counted, in nats.
        """
        no_targets("sequences", sequences, lengths)
        begin = time.perf_counter()
        given = symbols("sequences", sequences, lengths, self.vocab_size)
        columns = _columns(given, self.order, self.vocab_size)
        self._take_fitted({"grams": columns.T, "counts": np.ones(columns.shape[1], np.int64)})
        loss = -float(self._log_probs(given).sum()) / max(len(given.ids), 1)
        seconds = time.perf_counter() - begin
        return History.of_one_step(loss, tokens=len(given.ids), seconds=seconds, unit=self.loss_unit)

    def _take_fitted(self, fitted: Mapping[str, Array]) -> None:
        """Take grams, one a row, the last symbol first, and how often each was seen; a gram may stand there twice."""
        if not fitted:
            return
        columns = np.ascontiguousarray(fitted["grams"].T)
        levels, first = _count(columns, fitted["counts"], self.vocab_size)
        weights = _weigh(levels, self.vocab_size, self.smoothing)
        super()._take_fitted({"grams": np.ascontiguousarray(columns[:, first].T), "counts": levels[-1].counts})
        self._levels = list(zip(levels, weights, strict=True))

    def _check_fitted(self, given: Mapping[str, Any]) -> dict[str, Array]:
        begin, width = self.vocab_size, self.order + 1
        grams = checks.ids("grams", given["grams"], begin + 1)
        counts = checks.ids("counts", given["counts"], 1 << 62)
        if grams.ndim != 2 or grams.shape[1] != width:
            raise ValueError(f"grams should be of shape (n, {width}), not {grams.shape}")
        if counts.shape != grams.shape[:1]:
            raise ValueError(f"counts should be of shape ({len(grams)},), not {counts.shape}")
        begins = grams == begin
        if begins[:, 0].any() or (begins[:, :-1] & ~begins[:, 1:])[:, 1:].any():
            raise ValueError("grams should have begin symbols before all others only")
        if not counts.all() or len(np.unique(grams, axis=0)) != len(grams):
            raise ValueError("grams should be different, each with a count of at least 1")
        return {"grams": grams, "counts": counts}

    def _used(self) -> list[tuple[_Level, _Weights]]:
        self._needs_fit()
        return self._levels

    def _nodes(self, columns: Array) -> list[Array]:
        """The number of each context at every level, -1 where it was not seen; columns as of `_columns`."""
        nodes = [np.zeros(columns.shape[1], np.int64)]
        for (level, _), symbol in zip(self._used()[1:], columns[1:], strict=True):
            nodes.append(_find(level.contexts, nodes[-1] * (self.vocab_size + 1) + symbol, nodes[-1] >= 0))
        return nodes

    def _probabilities(self, columns: Array) -> Array:
        """P of the first symbol of each column given the others."""
        p = np.full(columns.shape[1], 1 / self.vocab_size)
        for (level, weights), node in zip(self._used(), self._nodes(columns), strict=True):
            gram = _find(level.grams, node * self.vocab_size + columns[0], node >= 0)
            p = np.where(node >= 0, p * _at(weights.spread, node) + _at(weights.kept, gram), p)
            p /= np.where(node >= 0, _at(weights.total, node), 1)
        return p

    def _distributions(self, columns: Array) -> Array:
        """P of every symbol given all but the first of each column, (n, V)."""
        p = np.full((columns.shape[1], self.vocab_size), 1 / self.vocab_size)
        for (level, weights), node in zip(self._used(), self._nodes(columns), strict=True):
            rows = np.flatnonzero(node >= 0)
            node = node[rows]
            counts = level.starts[node + 1] - level.starts[node]
            gram = np.arange(counts.sum()) + np.repeat(level.starts[node] - np.cumsum(counts) + counts, counts)
            p[rows] *= weights.spread[node, None]
            p[np.repeat(rows, counts), level.grams[gram] % self.vocab_size] += weights.kept[gram]
            p[rows] /= weights.total[node, None]
        return p

    def __call__(self, x: Any, *, lengths: Any = None) -> Array:
        """The whole predictive distribution at every step.

        Parameters
        ----------
        x : array of shape (B, T), or (T,) for one sequence
            Ids in 0..V-1.
        lengths : array of shape (B,), optional
            The real symbols of each row.

        Returns
        -------
        ndarray of shape (B, T, V), or (T, V)
            At step t the log-probability of each symbol to be the next, x_{t+1}; 0 past the end of a row.
        """
        array = ids_array("x", x)
        given = symbols("x", array, lengths, self.vocab_size)
        with np.errstate(divide="ignore"):
            found = np.log(self._distributions(_columns(given, self.order, self.vocab_size, after=True)))
        result = np.zeros((*array.shape, self.vocab_size))
        result.reshape(len(given.lengths), array.shape[-1], self.vocab_size)[given.rows(), given.steps()] = found
        return result

    def _log_probs(self, given: Symbols) -> Array:
        with np.errstate(divide="ignore"):
            return np.log(self._probabilities(_columns(given, self.order, self.vocab_size)))

    def _decoder(self, prompts: list[Array], copies: int) -> tuple[Array, Decoder]:
        recent = np.full((len(prompts), self.order), self.vocab_size)
        for row, prompt in zip(recent, prompts, strict=True):
            last = prompt[max(0, len(prompt) - self.order) :]
            row[: len(last)] = last[::-1]
        levels = [(level.contexts, level.grams, level.starts, *weights) for level, weights in self._used()]
        decoder = self._backend.markov.Decoder(levels, recent, self.vocab_size)
        return decoder.logits(), decoder

    def aic(self) -> float:
        """Akaike's criterion of the counts: 2 p - 2 log L; less is better.

        L is the likelihood of maximum likelihood, smoothing left aside, conditional on the first τ symbols of each
        sequence; p is V^τ (V - 1).
        """
        return self._criterion("aic")

    def bic(self) -> float:
        """Schwarz's criterion of the counts [1]_: p log n - 2 log L; less is better.

        L and p as of `aic`; n is the number of symbols L is of.

        References
        ----------
        .. [1] I. Csiszár and P. C. Shields, "The consistency of the BIC Markov order estimator", Annals of Statistics
           28, 2000.
        """
        return self._criterion("bic")

    def _criterion(self, criterion: str) -> float:
        level, _ = self._used()[-1]
        oldest = level.contexts % (self.vocab_size + 1)
        return _information(level, oldest < self.vocab_size, self.order, self.vocab_size, criterion)

    @classmethod
    def choose(
        cls,
        sequences: Any,
        vocab_size: int,
        orders: Iterable[int] = range(1, 6),
        criterion: str = "bic",
        held_out: Any = None,
        *,
        lengths: Any = None,
        smoothing: float | str = 1.0,
    ) -> MarkovChain:
        """The chain of the best order, fitted to all of the sequences.

        Parameters
        ----------
        sequences, lengths
            As of `fit`.
        vocab_size : int
            V.
        orders : iterable of int
            What to choose from; the lower of two that are equally good.
        criterion : {"bic", "aic", "held_out"}
            The first two as the methods of these names, but for all orders on the same symbols: those that have the
            highest order's number of symbols before them. Or the probability of `held_out`.
        held_out : list of sequences, or array of shape (B, T) or (T,), optional
            What the orders are judged by if `criterion` is "held_out".
        smoothing
            As of the class.
        """
        checks.choice("criterion", criterion, _CRITERIA)
        if (held_out is None) != (criterion != "held_out"):
            raise ValueError("held_out should be given if criterion is 'held_out', and only then")
        chains = [cls(vocab_size, order, smoothing=smoothing) for order in sorted(set(orders))]
        if not chains:
            raise ValueError("orders should hold at least one order")
        vocab_size, limit = chains[0].vocab_size, chains[-1].order
        given = symbols("sequences", sequences, lengths, vocab_size)
        if criterion == "held_out":
            for chain in chains:
                chain.fit(sequences, lengths)
            scores = [chain.bits_per_symbol(held_out) for chain in chains]
        else:
            columns = _columns(given, limit, vocab_size)[:, given.steps() >= limit]
            if not columns.shape[1]:
                raise ValueError(
                    f"sequences should hold symbols with {limit} others before them, as many as orders has"
                )
            levels, _ = _count(columns, np.ones(columns.shape[1], np.int64), vocab_size)
            scores = []
            for chain in chains:
                level = levels[chain.order]
                everything = np.ones(len(level.contexts), bool)
                scores.append(_information(level, everything, chain.order, vocab_size, criterion))
        chosen = chains[int(np.argmin(scores))]
        chosen.fit(sequences, lengths)
        return chosen

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._config.items())
        seen = f"with {len(self._fitted['counts']):,} different grams" if self._fitted else "not fitted"
        return f"MarkovChain({settings}) {seen}"


def _columns(given: Symbols, order: int, begin: int, after: bool = False) -> Array:
    """For every symbol x_t a column x_t, x_{t-1}, ..., x_{t-order}; `begin` stands before the first.

    With `after`, for every x_t what follows it: the columns are ?, x_t, ..., x_{t-order+1}.
    """
    steps = given.steps()
    result = np.full((order + 1, len(given.ids)), begin, np.int64)
    for back in range(order + 1):
        distance = back - after
        if distance < 0:
            result[back] = 0  # not known, and not used
            continue
        there = np.flatnonzero(steps >= distance)
        if not len(there):
            break
        result[back, there] = given.ids[there - distance]
    return result


def _count(columns: Array, counts: Array, vocab_size: int) -> tuple[list[_Level], Array]:
    """The levels of all lengths of context; and for each gram of the last the first column that holds it."""
    node = np.zeros(columns.shape[1], np.int64)
    contexts = np.zeros(1, np.int64)  # the empty context, which is always there
    levels = []
    first = node
    for k, symbol in enumerate(columns):
        if k:
            contexts, node = np.unique(node * (vocab_size + 1) + symbol, return_inverse=True)
        grams, first, gram = np.unique(node * vocab_size + columns[0], return_index=True, return_inverse=True)
        seen = np.zeros(len(grams), np.int64)
        np.add.at(seen, gram, counts)
        starts = np.searchsorted(grams // vocab_size, np.arange(len(contexts) + 1))
        levels.append(_Level(contexts, grams, seen, starts))
    return levels, first


def _weigh(levels: list[_Level], vocab_size: int, smoothing: float | str) -> list[_Weights]:
    """The smoothing, written so that all kinds of it are one formula."""
    result = []
    for k, level in enumerate(levels):
        context = level.grams // vocab_size
        n = len(level.contexts)
        counts = level.counts.astype(np.float64)
        if smoothing == "witten_bell":
            spread = sums(context, np.ones(len(context)), n)
            kept, total = counts, sums(context, counts, n) + spread
        elif smoothing == "kneser_ney":
            if k + 1 < len(levels):
                counts = _continuations(level, levels[k + 1], vocab_size)
            discount = _discounts(counts)[np.minimum(counts, 3).astype(np.int64) - 1]
            spread = sums(context, discount, n)
            kept, total = counts - discount, sums(context, counts, n)
        elif k + 1 < len(levels):  # nothing of it is used: the level above is spread over the uniform distribution
            kept, spread, total = np.zeros_like(counts), np.ones(n), np.ones(n)
        else:
            spread = np.full(n, float(smoothing) * vocab_size)
            kept, total = counts, sums(context, counts, n) + spread
        nothing = total == 0  # only the empty context of no data
        result.append(_Weights(kept, np.where(nothing, 1.0, spread), np.where(nothing, 1.0, total)))
    return result


def _continuations(level: _Level, above: _Level, vocab_size: int) -> Array:
    """In how many contexts one symbol longer each gram was seen; its count, where nothing can stand before it."""
    longer = above.grams // vocab_size
    gram = above.contexts[longer] // (vocab_size + 1) * vocab_size + above.grams % vocab_size
    different = np.bincount(np.searchsorted(level.grams, gram), minlength=len(level.grams))
    begins = level.contexts % (vocab_size + 1) == vocab_size  # the empty context, 0, is not among them
    return np.where(begins[level.grams // vocab_size], level.counts, different).astype(np.float64)


def _discounts(counts: Array) -> Array:
    """What is taken off counts of 1, 2 and more; a half where there are too few to estimate it from."""
    n = [int((counts == c).sum()) for c in range(1, 5)]
    if not all(n[:3]):
        return np.full(3, 0.5)
    y = n[0] / (n[0] + 2 * n[1])
    discounts = np.array([c - (c + 1) * y * n[c] / n[c - 1] for c in (1, 2, 3)])
    result: Array = np.clip(discounts, 0.1, [1, 2, 3])
    return result


def _information(level: _Level, used: Array, order: int, vocab_size: int, criterion: str) -> float:
    """AIC or BIC of the counts of the contexts that are `used`."""
    context = level.grams // vocab_size
    counts = level.counts[used[context]]
    context = context[used[context]]
    totals = np.bincount(context, counts, len(level.contexts))[context]
    log_likelihood = float((counts * np.log(counts / totals)).sum())
    n = int(counts.sum())
    if not n:
        raise ValueError(f"sequences should hold symbols with {order} others before them")
    with np.errstate(over="ignore"):  # beyond any number, and then the order is chosen never
        parameters = float(np.power(float(vocab_size), order) * (vocab_size - 1))
    return parameters * (2.0 if criterion == "aic" else float(np.log(n))) - 2 * log_likelihood


def _find(keys: Array, wanted: Array, possible: Array) -> Array:
    """The place of each wanted key among sorted keys, -1 where it is not there or not `possible`."""
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    place = np.searchsorted(keys, wanted)
    place[place == len(keys)] = 0
    return np.where(possible & (keys[place] == wanted), place, -1)


def _at(values: Array, place: Array) -> Array:
    """`values` at each place, 0 at -1."""
    return np.append(values, 0.0)[place]
