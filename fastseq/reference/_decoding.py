"""From logits to the next symbol in plain NumPy: what the compiled search is compared with, and what to read.

Nothing here is shared with `fastseq._decoding`, which has the same `search`. A search drives a decoder: its ``step``
takes one symbol of each row, (B,), and gives the logits (B, V) of what follows; its ``choose`` makes of its rows
others: forked, in another order, without some. Decoders that are not compiled are driven by the searches here.

References
----------
.. [1] A. Fan, M. Lewis and Y. Dauphin, "Hierarchical neural story generation", ACL 2018: top-k.
.. [2] A. Holtzman, J. Buys, L. Du, M. Forbes and Y. Choi, "The curious case of neural text degeneration", ICLR 2020:
   top-p, there called nucleus sampling.
.. [3] N. S. Keskar, B. McCann, L. R. Varshney, C. Xiong and R. Socher, "CTRL: a conditional transformer language model
   for controllable generation", 2019: the repetition penalty.
.. [4] Y. Wu et al., "Google's neural machine translation system", 2016: beams whose finished hypotheses are ranked by
   log P over a power of their length. Its offset of the length and its coverage penalty are not used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastseq.checks import Array
from fastseq.splitmix import uniform

# The share of top_p that counts as all of it: a sum of float64 is that exact.
_REACHED = 1 - 1e-11


def penalised(logits: Array, seen: Array, penalty: float) -> Array:
    """Logits (V,) with the penalty on the symbols that were seen: they become less likely, if it is above 1 [3]_."""
    result = logits.copy()
    with np.errstate(over="ignore"):
        result[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return result


def with_temperature(logits: Array, temperature: float) -> Array:
    """Scores of which the largest is 0; a temperature below 1 makes the others less, one above 1 more likely."""
    with np.errstate(over="ignore"):  # near 0 it sends what is less likely to -inf, as it should
        scores: Array = (logits - logits.max()) / temperature
    return scores


def top_k(scores: Array, k: int) -> Array:
    """Only the k best scores are left [1]_, the others become -inf; of equals the lower id stays."""
    return _only(scores, _best_first(scores)[:k])


def top_p(scores: Array, p: float) -> Array:
    """Only the smallest set of the best scores is left whose probability reaches p [2]_; one at least."""
    order = _best_first(scores)
    cumulative = np.exp(scores[order] - scores.max()).cumsum()
    enough = np.flatnonzero(cumulative >= p * _REACHED * cumulative[-1])[0]
    return _only(scores, order[: enough + 1])


def _best_first(scores: Array) -> Array:
    return np.argsort(-scores, kind="stable")


def _only(scores: Array, ids: Array) -> Array:
    result = np.full_like(scores, -np.inf)
    result[ids] = scores[ids]
    return result


def draw(scores: Array, number: float) -> int:
    """The symbol at which the cumulative distribution, in the order of ids, passes a number in [0, 1)."""
    cumulative = np.exp(scores - scores.max()).cumsum()
    return int((cumulative <= number * cumulative[-1]).sum())


def log_softmax(logits: Array) -> Array:
    """The log-probabilities that logits (V,) stand for."""
    scores = logits - logits.max()
    result: Array = scores - np.log(np.exp(scores).sum())
    return result


def ends_with(symbols: Sequence[int], stop: Sequence[tuple[int, ...]]) -> bool:
    """Whether the last symbols are one of the sequences that end a row."""
    return any(len(one) <= len(symbols) and tuple(symbols[-len(one) :]) == one for one in stop)


def _sound(logits: Array, prompt: int, step: int) -> Array:
    """Logits in float64, if there is something to choose from."""
    result = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        largest = result.max()
    where = f"the logits of prompt {prompt} at step {step} are"
    if largest == -np.inf:
        raise ValueError(f"{where} all -inf: nothing is left to choose from")
    if not largest < np.inf:
        raise ValueError(f"{where} NaN or infinite: the weights of the model should be looked at")
    return result


class _Rows:
    """The rows of a decoder, and their logits."""

    def __init__(self, decoder: Any, logits: Array) -> None:
        self._decoder = decoder
        self._count = len(logits)
        self.logits = logits

    def go_on(self, sources: list[int], symbols: list[int]) -> None:
        """The rows become these of the rows there were, each with one more symbol."""
        if sources != list(range(self._count)):
            self._decoder.choose(np.array(sources))
            self._count = len(sources)
        self.logits = self._decoder.step(np.array(symbols))


class _Row(NamedTuple):
    """A row that goes on, of draws."""

    number: int  # which of all rows it is
    source: int  # the row of logits that says what follows it


class Draws:
    """One symbol after another of every row, drawn or the likeliest; see `search`."""

    def __init__(self, decoder: Any, logits: Array, prompts: list[Array], keys: Array | None, settings: Any) -> None:
        self._settings = settings
        self._rows = _Rows(decoder, logits)
        copies = settings.num_results
        self._prompt = np.repeat(np.arange(len(prompts)), copies)  # of each row
        self._histories = [list(prompts[prompt]) for prompt in self._prompt]
        self._keys = keys
        self._chosen: list[list[int]] = [[] for _ in self._prompt]
        self._log_probs: list[list[float]] = [[] for _ in self._prompt]
        self._active = [_Row(number, int(prompt)) for number, prompt in enumerate(self._prompt)]
        self._step = 0

    def advance(self, steps: int) -> bool:
        """Choose up to so many symbols more of every row; whether any row goes on after them."""
        for _ in range(min(steps, self._settings.max_new - self._step)):
            if not self._active:
                break
            if self._step:
                last = [self._chosen[row.number][-1] for row in self._active]
                self._rows.go_on([row.source for row in self._active], last)
                self._active = [_Row(row.number, i) for i, row in enumerate(self._active)]
            numbers = None if self._keys is None else uniform(self._keys, self._step)
            for row in self._active:
                self._choose(row, None if numbers is None else numbers[row.number])
            self._active = [row for row in self._active if not self._ended(row.number)]
            self._step += 1
        return bool(self._active) and self._step < self._settings.max_new

    def _choose(self, row: _Row, number: float | None) -> None:
        settings = self._settings
        logits = _sound(self._rows.logits[row.source], self._prompt[row.number], self._step)
        history, chosen = self._histories[row.number], self._chosen[row.number]
        scores = penalised(logits, np.unique(history + chosen).astype(np.int64), settings.repetition_penalty)
        scores = _sound(scores, self._prompt[row.number], self._step)
        if number is None:
            symbol = int(scores.argmax())
        else:
            scores = with_temperature(scores, settings.temperature)
            if settings.top_k is not None:
                scores = top_k(scores, settings.top_k)
            if settings.top_p is not None and settings.top_p < 1:
                scores = top_p(scores, settings.top_p)
            symbol = draw(scores, number)
        chosen.append(symbol)
        if settings.return_log_probs:
            self._log_probs[row.number].append(log_softmax(logits)[symbol])

    def _ended(self, number: int) -> bool:
        return ends_with(self._chosen[number], self._settings.stop)

    def latest(self) -> Array:
        """The symbols of the last step (rows,), -1 where a row had ended before it."""
        return np.array([c[-1] if len(c) == self._step else -1 for c in self._chosen], np.int64)

    def results(self) -> list[list[tuple[Array, Array | None]]]:
        """For each prompt a list of what was chosen: ids, and their log P or None."""
        wanted = self._settings.return_log_probs
        found: list[tuple[Array, Array | None]] = [
            (np.array(ids, np.int64), np.array(log_probs, np.float64) if wanted else None)
            for ids, log_probs in zip(self._chosen, self._log_probs, strict=True)
        ]
        copies = self._settings.num_results
        return [found[i : i + copies] for i in range(0, len(found), copies)]


class Hypothesis(NamedTuple):
    """Symbols that may follow a prompt."""

    total: float  # log P of all symbols, after the repetition penalty
    symbols: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()  # of each symbol, under the model itself
    beam: int = 0  # the row that all but the last symbol are of

    def rank(self, length_penalty: float) -> float:
        """What finished hypotheses are compared by [4]_."""
        return _ranked(self.total, len(self.symbols), length_penalty)


def _ranked(total: float, length: int, length_penalty: float) -> float:
    with np.errstate(over="ignore"):
        return float(total / np.float64(length) ** length_penalty)


class Beams:
    """Some hypotheses of every prompt side by side, the likeliest; see `search`.

    A step extends every hypothesis by every symbol. Of these the likeliest go on that do not end, as many as there
    are beams; those that end and are likelier than the last of them are finished. Finished hypotheses are ranked by
    log P / n ** length_penalty, n their symbols, and the best are kept. A prompt is done when none that goes on can
    become better than all that are kept: log P never rises, so that log P / max_new ** length_penalty is the most it
    can come to. After `max_new` symbols those that go on are finished, too.

    Of equals, the likelier is that of the lower beam, then that of the lower id; of finished ones that are equal,
    the one that was finished first.
    """

    def __init__(self, decoder: Any, logits: Array, prompts: list[Array], settings: Any) -> None:
        self._settings = settings
        self._rows = _Rows(decoder, logits)
        self._prompts = prompts
        self._running = [[Hypothesis(0.0)] for _ in prompts]
        self._finished: list[list[Hypothesis]] = [[] for _ in prompts]
        self._step = 0

    def advance(self, steps: int) -> bool:
        """Choose up to so many symbols more of every row; whether any row goes on after them."""
        for _ in range(min(steps, self._settings.max_new - self._step)):
            running = [hypothesis for beams in self._running for hypothesis in beams]
            if not running:
                break
            if self._step:
                self._rows.go_on([one.beam for one in running], [one.symbols[-1] for one in running])
            row = 0
            for prompt, beams in enumerate(self._running):
                if beams:
                    self._running[prompt] = self._go_on(prompt, row)
                row += len(beams)
            self._step += 1
        return any(self._running) and self._step < self._settings.max_new

    def _go_on(self, prompt: int, first: int) -> list[Hypothesis]:
        """One step of the beams of one prompt, whose logits are `first` and those after it: what goes on."""
        width, power, max_new = self._settings.num_beams, self._settings.length_penalty, self._settings.max_new
        ending: list[Hypothesis] = []
        going: list[Hypothesis] = []
        for row, beam in enumerate(self._running[prompt], first):
            for one in self._extended(prompt, beam, row):
                (ending if ends_with(one.symbols, self._settings.stop) else going).append(one)
        best_first = sorted(going, key=lambda one: -one.total)  # stable: lower beams and ids stay before their equals
        going = best_first[:width]
        if len(going) == width:
            last = going[-1]
            worst = (-last.total, last.beam, last.symbols[-1])
            ending = [one for one in ending if (-one.total, one.beam, one.symbols[-1]) < worst]
        if self._step + 1 == max_new:
            ending, going = ending + going, []
        kept = sorted(self._finished[prompt] + ending, key=lambda one: -one.rank(power))[:width]
        self._finished[prompt] = kept
        if going and len(kept) == width and _ranked(going[0].total, max_new, power) <= kept[-1].rank(power):
            return []
        return going

    def _extended(self, prompt: int, beam: Hypothesis, row: int) -> list[Hypothesis]:
        """A hypothesis with each symbol that may follow it."""
        logits = _sound(self._rows.logits[row], prompt, self._step)
        history = np.unique([*self._prompts[prompt], *beam.symbols]).astype(np.int64)
        scores = _sound(penalised(logits, history, self._settings.repetition_penalty), prompt, self._step)
        totals = beam.total + log_softmax(scores)
        log_probs = log_softmax(logits)
        return [
            Hypothesis(totals[id], (*beam.symbols, int(id)), (*beam.log_probs, log_probs[id]), row)
            for id in np.flatnonzero(totals > -np.inf)
        ]

    def results(self) -> list[list[tuple[Array, Array | None]]]:
        """For each prompt a list of the best hypotheses: ids, and their log P or None."""
        wanted = self._settings.return_log_probs
        return [
            [
                (np.array(one.symbols, np.int64), np.array(one.log_probs, np.float64) if wanted else None)
                for one in kept[: self._settings.num_results]
            ]
            for kept in self._finished
        ]


def search(decoder: Any, logits: Array, prompts: list[Array], keys: Array | None, settings: Any) -> Draws | Beams:
    """What goes on from some prompts, a few steps at a time.

    Parameters
    ----------
    decoder : Decoder
        Its rows stand at the ends of the prompts.
    logits : array of shape (B, V)
        Of what follows each prompt.
    prompts : list of int64 arrays
        B of them; what the repetition penalty counts as seen.
    keys : uint64 array of shape (B * num_results,), or None where nothing is drawn
        Of the random numbers of each row; the rows of a prompt stand together.
    settings : Options
        Checked. Of equal symbols that end a row, or that a penalty is on, nothing is counted twice.

    Raises
    ------
    ValueError
        While it goes on: of logits that are NaN, infinite, or all -inf, naming prompt and step.
    """
    if settings.num_beams > 1:
        return Beams(decoder, logits, prompts, settings)
    return Draws(decoder, logits, prompts, keys, settings)
