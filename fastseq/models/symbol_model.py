"""Models of sequences of symbols: the chain rule, generation."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.layers.settings import size
from fastseq.models import decoding
from fastseq.models.base import Model, TrainedModel
from fastseq.models.forms import batched_already, is_data, is_list_of_rows, no_targets, padded_pair
from fastseq.models.sums import sums
from fastseq.models.symbols import Symbols, symbols, text_split, whole_sequences
from fastseq.training import Batch, History


class SymbolModel(Model):
    """A model of sequences of symbols 0..V-1: the chain rule, and what follows from it."""

    vocab_size: int = size(doc="V; symbols are 0..V-1.")

    @abstractmethod
    def _log_probs(self, given: Symbols) -> Array:
        """log P(x_s | x_<s) of every symbol, (N,), in float64."""

    @abstractmethod
    def _decoder(self, prompts: list[Array], copies: int) -> tuple[Array, decoding.Decoder]:
        """The logits (B, V) of what follows each prompt, and a decoder whose rows stand there.

        Parameters
        ----------
        prompts : list of int64 arrays
            At least one; each may be empty.
        copies : int
            To how many rows each may be forked.
        """

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

    @decoding.documented
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
        """Continue each prompt by sampling, greedy decoding or beam search.

        Parameters
        ----------
        prompt : list of sequences of ids, or array of shape (B, T), or (T,) for one
            What to go on from; an empty prompt goes on from the begin symbol.
        lengths : array of shape (B,), optional
            The real symbols of each row of the prompt.
        {options}

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
        {references}
        """
        given = self._given(prompt, lengths)
        options = decoding.Options(
            max_new,
            temperature,
            top_k,
            top_p,
            repetition_penalty,
            num_beams,
            length_penalty,
            num_results,
            stop,
            seed,
            return_log_probs,
        )
        return decoding.generated(given, options)

    @decoding.documented
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
        """Yield the symbols of `generate` one by one, each computed when it is asked for.

        Arguments are checked by the call, not when the first symbol is asked for.

        Parameters
        ----------
        prompt, lengths
            As of `generate`.
        {options}

        Returns
        -------
        iterator of int, for a prompt (T,); else of ndarrays of shape (B,)
            int64; -1 where a row had ended before.

        References
        ----------
        {references}
        """
        given = self._given(prompt, lengths)
        options = decoding.Options(max_new, temperature, top_k, top_p, repetition_penalty, stop=stop, seed=seed)
        return decoding.streamed(given, options)

    def _given(self, prompt: Any, lengths: Any) -> decoding.Given:
        """Check the prompts."""
        rows = symbols("prompt", prompt, lengths, self.vocab_size).split()
        unbatched = not is_list_of_rows(prompt) and np.ndim(prompt) == 1
        begin = functools.partial(self._decoder, rows)
        return decoding.Given(rows, begin, unbatched, self.vocab_size, self._backend.decoding)


class LanguageModel(SymbolModel, TrainedModel):
    """A model of symbols that is trained on text, one long sequence or many."""

    @property
    def begin(self) -> int:
        """The id of the begin symbol: V."""
        return self.vocab_size

    @abstractmethod
    def _most_steps(self) -> int:
        """Return how many steps of whole sequences an evaluation takes through the layers at once."""

    @abstractmethod
    def _text_data(self, given: Symbols, batch_size: int | None, chunk: int | None, seed: int | None) -> Any:
        """Make data of the trainer of the sequences to learn from."""

    def evaluation_forward(self, batch: Batch, state: Any = None) -> tuple[float, int, Any]:
        """Return loss, count and state as of `training_forward`, without dropout.

        Whole sequences of any length are evaluated as by `log_prob`; the state is None then.
        """
        if batch.targets is None and np.ndim(batch.inputs) == 2 and np.shape(batch.inputs)[1] > self._most_steps():
            given = symbols("inputs", batch.inputs, batch.lengths, self.vocab_size)
            return -float(self._log_probs(given).sum()) / max(len(given.ids), 1), len(given.ids), None
        return super().evaluation_forward(batch, state)

    def _fit_text(
        self,
        data: Any,
        lengths: Any,
        batch_size: int | None,
        chunk: int | None,
        seed: int | None,
        share: float | None,
        settings: dict[str, Any],
    ) -> History:
        """Train on text; `share` of it is held out for validation, and raw data to validate on is put into batches."""
        no_targets("data", data, lengths)
        raw = settings.get("validation")
        size = None if batch_size is None else checks.size("batch_size", batch_size, 1)
        if is_data(data):
            batched_already(lengths=lengths, batch_size=batch_size, chunk=chunk, validation_split=share)
        else:
            given, held = text_split(symbols("data", data, lengths, self.vocab_size), share, seed)
            if held is not None:
                if raw is not None:
                    raise ValueError("validation_split should not be given with validation")
                settings["validation"] = whole_sequences("validation", held, size)
            data = self._text_data(given, size, chunk, seed)
        if raw is not None and not is_data(raw):
            held = symbols("validation", *padded_pair(raw), self.vocab_size)
            settings["validation"] = whole_sequences("validation", held, size)
        return self._train(data, {"seed": seed, **settings})
