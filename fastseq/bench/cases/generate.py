"""Drawing from an LSTM language model, symbol by symbol, and beam search with a Transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastseq.bench.cases import ERROR_OF_SYMBOLS, ITEM, Case, Outputs, Verdict, compare_symbols, decode, shapes
from fastseq.bench.cases.decode import Decode, Transformer
from fastseq.checks import Array
from fastseq.narrow import TYPES

AXES = "layers,hidden,V,B,symbols"
SHAPES = ((2, 256, 96, 1, 1000),)
BEAMS, SEARCHED = 4, Transformer(4, 128, 4, 96, 256)
GREEDY = "greedy"  # the engine that decodes as many rows greedily
PROMPT, COMPARED = 32, 128


@dataclass(frozen=True)
class Sample(Case):
    """Drawing from an LSTM language model at temperature 1, from the whole distribution.

    What was drawn is another text in every engine. So what is compared is what they choose where they are greedy.

    Parameters
    ----------
    layers, hidden : int
        The embedding is as wide as the layers.
    symbols : int
        How many there are.
    batch : int
    new : int
        How many are drawn, after a prompt of 32.
    """

    layers: int
    hidden: int
    symbols: int
    batch: int
    new: int

    @property
    def group(self) -> str:
        """Rows that share a geometric mean and a panel of the plot."""
        return "sample LSTM"

    @property
    def name(self) -> str:
        """Display name of the case."""
        return f"sample {self.label}"

    @property
    def label(self) -> str:
        """Display name of the case within its group."""
        return f"LSTM {self.layers}×{self.hidden}, batch {self.batch}"

    @property
    def axes(self) -> str:
        """Names of the numbers in the label."""
        return "layers×width"

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines printed above the table."""
        return (
            f"sample {self.label}: {self.new} symbols, drawn at temperature 1 out of {self.symbols}; compared are"
            f" {self.compared} that are chosen greedily",
        )

    @property
    def engines(self) -> tuple[str, ...]:
        """Those that can compute it."""
        return ("reference", "torch")

    @property
    def narrow(self) -> Mapping[str, tuple[str, ...]]:
        """Those that have both types."""
        return dict.fromkeys(TYPES[1:], ("fastseq", "reference", "torch"))

    @property
    def choices(self) -> int:
        """Those of the model."""
        return self.symbols

    @property
    def error_means(self) -> str:
        """Symbols have no difference."""
        return ERROR_OF_SYMBOLS

    def compare(self, engine: str, outputs: Outputs, expected: Outputs, allowed: float) -> Verdict:
        """All greedy symbols have to be the same, up to where two are as good as equally likely."""
        ids, margins = expected
        return compare_symbols(outputs[0], ids, margins, allowed)

    @property
    def terms(self) -> int:
        """How many terms a logit sums: in one layer after another, over all steps."""
        return self.layers * 2 * self.hidden * (PROMPT + self.new)

    @property
    def unit(self) -> str:
        """Unit of speed."""
        return "symbols/s"

    @property
    def work(self) -> float:
        """The symbols that are drawn."""
        return self.batch * self.new

    @property
    def flops(self) -> int:
        """Those of all products; what follows is predicted only after the prompt."""
        outputs = self.batch * self.new * self.hidden * self.symbols
        return 2 * (self.batch * (PROMPT + self.new) * self._layer_weights + outputs)

    @property
    def _layer_weights(self) -> int:
        return self.layers * 8 * self.hidden * self.hidden

    @property
    def bytes_read(self) -> int:
        """Bytes of weights: all for every symbol that is drawn, those of the state for every symbol of the prompt."""
        return self.new * self.working_set + ITEM * PROMPT * self._layer_weights // 2

    @property
    def working_set(self) -> int:
        """Bytes of weights."""
        return ITEM * (self._layer_weights + self.hidden * self.symbols)

    def memory(self, engines: int) -> int:
        """About how many bytes the arrays take in all processes together."""
        weights = 3 * (self._layer_weights + 2 * self.hidden * self.symbols)
        return (engines * ITEM + 2 * ITEM) * (weights + self.batch * (PROMPT * 16 * self.hidden + self.new))

    def describe(self) -> dict[str, Any]:
        """Kind and sizes of the case, for JSON."""
        return {
            "kind": "generate",
            "train": self.train,
            "layers": self.layers,
            "hidden": self.hidden,
            "symbols": self.symbols,
            "batch": self.batch,
            "new": self.new,
            "bytes_read": self.bytes_read,
        }

    def weights(self) -> dict[str, Array]:
        """Random weights, float32, which depend on the case alone, by the names of `fastseq.models.RecurrentLM`."""
        rng = np.random.default_rng([self.layers, self.hidden, self.symbols])

        def normal(deviation: float, *shape: int) -> Array:
            return np.float32(deviation) * rng.standard_normal(shape, np.float32)

        rows, width = 4 * self.hidden, self.hidden
        # Large, so that a text does not end in one symbol. One symbol more: the begin of a text.
        result = {"embedding.weight": normal(2.0, self.symbols + 1, width)}
        for i in range(self.layers):
            result |= {
                f"recurrent.weight_ih_l{i}": normal(3 * width**-0.5, rows, width),
                f"recurrent.weight_hh_l{i}": normal(width**-0.5, rows, width),
                f"recurrent.bias_ih_l{i}": normal(0.1, rows),
                f"recurrent.bias_hh_l{i}": normal(0.1, rows),
            }
        return result | {
            "output.weight": normal(4 * width**-0.5, self.symbols, width),
            "output.bias": normal(0.1, self.symbols),
        }

    def prompts(self) -> Array:
        """The prompts, (B, T); they depend on the sizes alone."""
        return decode.random_symbols(self.symbols, self.batch, PROMPT)

    def prompts_with_begin(self) -> Array:
        """The prompts behind a begin symbol, which is what peers are given."""
        return decode.with_begin(self.prompts(), self.symbols)

    @property
    def compared(self) -> int:
        """How many symbols are compared."""
        return min(self.new, COMPARED)


@dataclass(frozen=True)
class Beams(Decode):
    """Beam search for one prompt, beside as many rows that are decoded greedily at once.

    Parameters
    ----------
    model, batch, prompt, new
        As of `Decode`; `batch` is the number of beams.

    Notes
    -----
    Outputs are the best text (1, new) and its log-probability (1,); of the float64 reference also those of `Decode`,
    which are what `greedy` has.
    """

    @property
    def group(self) -> str:
        """Rows that share a geometric mean and a panel of the plot."""
        return "beams"

    @property
    def name(self) -> str:
        """Display name of the case."""
        return f"{self.batch} beams {self.model.label}"

    @property
    def label(self) -> str:
        """Display name of the case within its group."""
        return f"{self.model.label}, {self.batch} beams"

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines printed above the table."""
        m = self.model
        return (
            f"{self.name}: vocabulary {m.symbols}, {self.new} symbols after {self.prompt}; greedy: fastseq,"
            f" {self.batch} rows, each with a prompt of its own",
        )

    @property
    def engines(self) -> tuple[str, ...]:
        """fastseq, in both ways."""
        return ("reference", GREEDY)

    @property
    def narrow(self) -> Mapping[str, tuple[str, ...]]:
        """fastseq alone; greedy rows are there for the search, whatever the weights."""
        return dict.fromkeys(TYPES[1:], ("fastseq", "reference"))

    @property
    def choices(self) -> int:
        """A search chooses texts, not symbol by symbol."""
        return 0

    @property
    def error_means(self) -> str:
        """What is compared."""
        return "the difference of log-probability of the best text, over its magnitude"

    def needs(self, engine: str) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def compare(self, engine: str, outputs: Outputs, expected: Outputs, allowed: float) -> Verdict:
        """The best text has to be as likely as that of the reference, and of greedy rows all symbols the same."""
        text, log_prob, ids, margins = expected
        if engine == GREEDY:
            return compare_symbols(outputs[0], ids, margins, allowed)
        verdict = super(Decode, self).compare(engine, outputs[1:], (log_prob,), allowed)
        if outputs[0].shape != text.shape:
            return verdict._replace(fault=f"found a text of shape {outputs[0].shape}, and the reference {text.shape}")
        different = np.flatnonzero(outputs[0] != text)
        compared = int(different[0]) if len(different) else text.size
        return verdict._replace(symbols=(compared, text.size), alike=(int(not len(different)), 1))

    @property
    def _prompt_flops(self) -> int:
        return self.model.flops(1, 0, self.prompt + 1) + 2 * self.model.output_weights

    def describe(self) -> dict[str, Any]:
        """Kind and sizes of the case, for JSON."""
        return {**super().describe(), "kind": "beams"}


def chosen(texts: Sequence[str]) -> list[Case]:
    """The cases that the values of --shape ask for, of the LSTM alone, or the usual ones."""
    cases: list[Case] = [Sample(*shape) for shape in shapes(texts, AXES) or SHAPES]
    return cases if texts else [*cases, Beams(SEARCHED, BEAMS)]
