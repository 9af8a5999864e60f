"""Greedy decoding with a language model in the arrangement of GPT-2 [1]_: a prompt, then one symbol after another.

References
----------
.. [1] A. Radford et al., "Language models are unsupervised multitask learners", 2019.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastseq.bench import UsageError
from fastseq.bench.cases import ERROR_OF_SYMBOLS, ITEM, Case, Outputs, Verdict, compare_symbols, language, shapes
from fastseq.checks import Array
from fastseq.narrow import TYPES

AXES = "layers,width,heads,V,context,B"
SHAPES = (
    (12, 768, 12, 50257, 1024, 1),
    (12, 768, 12, 50257, 1024, 8),
    (4, 128, 4, 96, 256, 1),
    (4, 128, 4, 96, 256, 8),
)
PROMPT, NEW = 32, 128
# Of embedding and positions: what the layers add is larger, or each symbol would be the likeliest to follow itself.
DEVIATION = 0.05
# Of queries and keys: where attention is a mean of all keys, every text ends in the same few symbols.
SHARPNESS = 4.0
EPS = 1e-5  # of the norms
COARSE = 0.02  # how far off llama.cpp may be: it looks GELU up in a table of half precision
Weights = Mapping[str, Array]


@dataclass(frozen=True)
class Transformer:
    """A language model: how many layers, how wide, and what it may be given.

    Parameters
    ----------
    layers, width, heads : int
        The feed-forward is four times as wide within.
    symbols : int
        The symbols that are predicted; one more begins every text.
    context : int
        The most tokens that are looked at together, and rows of the embedding of positions.
    """

    layers: int
    width: int
    heads: int
    symbols: int
    context: int

    @property
    def label(self) -> str:
        """Display name of the case within its group."""
        return f"{self.layers}×{self.width}×{self.heads}"

    @property
    def layer_weights(self) -> int:
        """How many weights there are in the products of all layers."""
        return 12 * self.layers * self.width * self.width

    @property
    def output_weights(self) -> int:
        """How many there are in the output, which is the embedding."""
        return self.width * self.symbols

    @property
    def cached(self) -> int:
        """How many numbers of a token are kept: its key and its value in every layer."""
        return 2 * self.layers * self.width

    def weights(self) -> dict[str, Array]:
        """Random weights, float32, which depend on the model alone."""
        rng = np.random.default_rng([self.layers, self.width, self.heads, self.symbols, self.context])
        return language.weights(rng, self.layers, self.width, self.symbols, self.context, DEVIATION, SHARPNESS)

    def flops(self, batch: int, first: int, last: int) -> int:
        """Those of tokens `first` up to `last` of every row, through all layers; without the output."""
        pairs = (last * (last + 1) - first * (first + 1)) // 2
        return batch * (2 * self.layer_weights * (last - first) + 2 * self.cached * pairs)

    def memory(self, engines: int, batch: int, length: int) -> int:
        """About how many bytes it takes in all processes together."""
        # Plain and packed weights; a file of them, or what they are made of.
        weights = 3 * (self.layer_weights + self.output_weights + self.width * self.context)
        return (engines * ITEM + 2 * ITEM) * (weights + batch * (length * 2 * self.cached + 4 * self.symbols))


@dataclass(frozen=True)
class Decode(Case):
    """Greedy decoding.

    Parameters
    ----------
    model : Transformer
    batch : int
        Rows, each with a prompt of its own.
    prompt, new : int
        Symbols of a prompt, and how many are chosen.

    Notes
    -----
    The output is what was chosen, (B, new); of the float64 reference also the margins of it.
    """

    model: Transformer
    batch: int
    prompt: int = PROMPT
    new: int = NEW

    @property
    def group(self) -> str:
        """Rows that share a geometric mean and a panel of the plot."""
        return f"decode {self.model.label}"

    @property
    def name(self) -> str:
        """Display name of the case."""
        return f"decode {self.label}"

    @property
    def label(self) -> str:
        """Display name of the case within its group."""
        return f"{self.model.label}, batch {self.batch}"

    @property
    def axes(self) -> str:
        """Names of the numbers in the label."""
        return "layers×width×heads, batch"

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines printed above the table."""
        m = self.model
        notes = [
            f"decode {m.label}: vocabulary {m.symbols}, context {m.context}, {self.new} symbols after {self.prompt},"
            " greedy, random weights"
        ]
        if importlib.util.find_spec("transformers") is not None:
            version = importlib.metadata.version("transformers")
            notes.append(f"torch: GPT2LMHeadModel of transformers {version}, with its cache")
        if all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "gguf")):
            notes.append("llamacpp: float32, except GELU, which it looks up in half precision")
        return tuple(notes)

    @property
    def engines(self) -> tuple[str, ...]:
        """Those that can compute it."""
        return ("reference", "torch", "ctranslate2", "llamacpp")

    @property
    def narrow(self) -> Mapping[str, tuple[str, ...]]:
        """Those that have both types."""
        return dict.fromkeys(TYPES[1:], ("fastseq", "reference", "torch", "ctranslate2"))

    @property
    def choices(self) -> int:
        """Those of the model."""
        return self.model.symbols

    @property
    def error_means(self) -> str:
        """Symbols have no difference."""
        return ERROR_OF_SYMBOLS

    def needs(self, engine: str) -> tuple[str, ...]:
        """PyTorch's GPT-2 is that of transformers."""
        return ("transformers",) if engine == "torch" else ()

    def compare(self, engine: str, outputs: Outputs, expected: Outputs, allowed: float) -> Verdict:
        """All symbols have to be the same, up to where two are as good as equally likely."""
        ids, margins = expected
        if engine == "llamacpp":
            allowed = max(allowed, COARSE)
        return compare_symbols(outputs[0], ids, margins, allowed)

    @property
    def terms(self) -> int:
        """How many terms a logit sums, in one layer after another."""
        return self.model.layers * (8 * self.model.width + self.length)

    @property
    def length(self) -> int:
        """How many tokens of a row go through the layers: begin symbol, prompt, and all that is chosen but the last."""
        return self.prompt + self.new

    @property
    def unit(self) -> str:
        """Unit of speed."""
        return "symbols/s"

    @property
    def work(self) -> float:
        """The symbols that are chosen."""
        return self.batch * self.new

    @property
    def flops(self) -> int:
        """Those of all linear maps and of causal attention."""
        return self._prompt_flops + self._step_flops

    @property
    def _prompt_flops(self) -> int:
        """Of what goes through the layers at once; only what comes after the last of it is predicted."""
        return self.model.flops(self.batch, 0, self.prompt + 1) + 2 * self.batch * self.model.output_weights

    @property
    def _step_flops(self) -> int:
        """Of what goes through them one by one."""
        outputs = 2 * self.batch * self.model.output_weights * (self.new - 1)
        return self.model.flops(self.batch, self.prompt + 1, self.length) + outputs

    @property
    def bytes_read(self) -> int:
        """Bytes that have to be read: all weights for each symbol, and keys and values of all tokens before."""
        return self._prompt_bytes + self._step_bytes

    @property
    def _prompt_bytes(self) -> int:
        return ITEM * (self.model.layer_weights + self.model.output_weights)

    @property
    def _step_bytes(self) -> int:
        steps, past = self.new - 1, (self.length * (self.length - 1) - self.prompt * (self.prompt + 1)) // 2
        return steps * self._prompt_bytes + ITEM * self.batch * self.model.cached * past

    @property
    def working_set(self) -> int:
        """Bytes of the weights, and of keys and values at the end."""
        return self._prompt_bytes + ITEM * self.batch * self.model.cached * self.length

    def floor(self, multiply_adds: float, read: float) -> float:
        """The least seconds it can take.

        Parameters
        ----------
        multiply_adds : float
            Floating-point operations a second.
        read : float
            Bytes a second out of a buffer of `working_set`.

        Notes
        -----
        The prompt goes through the layers at once, what is chosen one by one; for each of the two counts what takes
        longer, to read or to multiply.
        """
        prompt = max(self._prompt_flops / multiply_adds, self._prompt_bytes / read)
        return prompt + max(self._step_flops / multiply_adds, self._step_bytes / read)

    def memory(self, engines: int) -> int:
        """About how many bytes the arrays take in all processes together."""
        return self.model.memory(engines, self.batch, self.length)

    def describe(self) -> dict[str, Any]:
        """Kind and sizes of the case, for JSON."""
        return {
            "kind": "decode",
            "train": self.train,
            **vars(self.model),
            "batch": self.batch,
            "prompt": self.prompt,
            "new": self.new,
            "bytes_read": self.bytes_read,
        }

    def prompts(self) -> Array:
        """The prompts, (B, prompt); they depend on the sizes alone."""
        return random_symbols(self.model.symbols, self.batch, self.prompt)

    def prompts_with_begin(self) -> Array:
        """The prompts behind a begin symbol, which is what peers are given."""
        return with_begin(self.prompts(), self.model.symbols)


def random_symbols(symbols: int, batch: int, length: int) -> Array:
    """Prompts (B, T), which depend on these numbers alone."""
    return np.random.default_rng([symbols, batch, length]).integers(0, symbols, (batch, length))


def with_begin(prompts: Array, begin: int) -> Array:
    """Put the begin symbol in front of prompts (B, T)."""
    return np.concatenate([np.full((len(prompts), 1), begin), prompts], axis=1)


def chosen(texts: Sequence[str]) -> list[Case]:
    """The cases that the values of --shape ask for, or the usual ones."""
    wanted = shapes(texts, AXES)
    for _, width, heads, _, context, _ in wanted:
        if width % heads:
            raise UsageError(f"--shape should have a number of heads that divides the width {width}, not {heads}")
        if context < PROMPT + NEW:
            raise UsageError(f"--shape should have a context of at least {PROMPT + NEW} symbols, not {context}")
    return [Decode(Transformer(*sizes), batch) for *sizes, batch in wanted or SHAPES]
