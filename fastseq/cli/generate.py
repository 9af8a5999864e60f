"""Drawing from an LSTM language model, symbol by symbol, and beam search with a Transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastseq.checks import Array
from fastseq.cli import decode, engines
from fastseq.cli.cases import ITEM, Case, Verdict, compare_symbols, shapes
from fastseq.cli.decode import Decode, Transformer
from fastseq.cli.engines import Model, Outputs

AXES = "layers,hidden,V,B,symbols"
SHAPES = ((2, 256, 96, 1, 1000),)
BEAMS, SEARCHED = 4, Transformer(4, 128, 4, 96, 256)
PROMPT, COMPARED = 32, 128
Weights = Mapping[str, Array]


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
        """For people."""
        return "sample LSTM"

    @property
    def name(self) -> str:
        """For people."""
        return f"sample {self.label}"

    @property
    def label(self) -> str:
        """For people."""
        return f"LSTM {self.layers}×{self.hidden}, batch {self.batch}"

    @property
    def axes(self) -> str:
        """For people."""
        return "layers×width"

    @property
    def notes(self) -> tuple[str, ...]:
        """For people."""
        return (
            f"sample {self.label}: {self.new} symbols, drawn at temperature 1 out of {self.symbols}; compared are"
            f" {self.compared} that are chosen greedily",
        )

    @property
    def engines(self) -> tuple[str, ...]:
        """Those that can compute it."""
        return ("reference", *_PEERS)

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
        """For people."""
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
        """For programs."""
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

    @property
    def compared(self) -> int:
        """How many symbols are compared."""
        return min(self.new, COMPARED)

    def build(self, engine: str, threads: int) -> Model:
        """The case in an engine; its output is what is chosen greedily, and of exact the margins of it."""
        weights, prompts = self.weights(), decode.random_symbols(self.symbols, self.batch, PROMPT)
        if engine not in engines.OURS:
            return _PEERS[engine](self, weights, prompts, threads)
        module, dtype = engines.ours(engine, threads)
        model = module.models.RecurrentLM(self.symbols, self.hidden, self.hidden, self.layers, dtype=dtype)
        model.load_state_dict(weights)

        def outputs(drawn: Array) -> Outputs:
            ids = model.generate(prompts, self.compared, temperature=0)
            return (ids, decode.margins(model, prompts, ids)) if engine == "exact" else (ids,)

        return Model(lambda: model.generate(prompts, self.new, seed=0), outputs)


@dataclass(frozen=True)
class Beams(Decode):
    """Beam search for one prompt, beside as many rows that are decoded greedily at once.

    Parameters
    ----------
    model, batch, prompt, new
        As of `Decode`; `batch` is the number of beams.
    """

    @property
    def group(self) -> str:
        """For people."""
        return "beams"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.batch} beams {self.model.label}"

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.model.label}, {self.batch} beams"

    @property
    def notes(self) -> tuple[str, ...]:
        """For people."""
        m = self.model
        return (
            f"{self.name}: vocabulary {m.symbols}, {self.new} symbols after {self.prompt}; greedy: fastseq,"
            f" {self.batch} rows, each with a prompt of its own",
        )

    @property
    def engines(self) -> tuple[str, ...]:
        """fastseq, in both ways."""
        return ("reference", engines.GREEDY)

    def needs(self, engine: str) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def compare(self, engine: str, outputs: Outputs, expected: Outputs, allowed: float) -> Verdict:
        """The best text has to be as likely as that of the reference, and of greedy rows all symbols the same."""
        text, log_prob, ids, margins = expected
        if engine == engines.GREEDY:
            return compare_symbols(outputs[0], ids, margins, allowed)
        verdict = super(Decode, self).compare(engine, outputs[1:], (log_prob,), allowed)
        if outputs[0].shape != text.shape:
            return verdict._replace(fault=f"found a text of shape {outputs[0].shape}, and the reference {text.shape}")
        different = np.flatnonzero(outputs[0] != text)
        return verdict._replace(symbols=(int(different[0]) if len(different) else text.size, text.size))

    @property
    def _prompt_flops(self) -> int:
        return self.model.flops(1, 0, self.prompt + 1) + 2 * self.model.output_weights

    def describe(self) -> dict[str, Any]:
        """For programs."""
        return {**super().describe(), "kind": "beams"}

    def build(self, engine: str, threads: int) -> Model:
        """The case in an engine; its outputs are the best text (1, new) and its log-probability (1,).

        Of exact also those of `Decode`, which are what greedy has.
        """
        prompts = decode.random_symbols(self.model.symbols, self.batch, self.prompt)
        greedy = super().build(engine, threads)
        if engine == engines.GREEDY:
            return greedy
        model = self.model.build(*engines.ours(engine, threads))

        def outputs(result: Any) -> Outputs:
            ids, log_probs = result
            more = greedy.outputs(greedy.call()) if engine == "exact" else ()
            return (ids, log_probs.sum(axis=1), *more)

        settings: dict[str, Any] = {"num_beams": self.batch, "return_log_probs": True}
        return Model(lambda: model.generate(prompts[:1], self.new, **settings), outputs)


def chosen(texts: Sequence[str]) -> list[Case]:
    """The cases that the values of --shape ask for, of the LSTM alone, or the usual ones."""
    cases: list[Case] = [Sample(*shape) for shape in shapes(texts, AXES) or SHAPES]
    return cases if texts else [*cases, Beams(SEARCHED, BEAMS)]


def _torch(case: Sample, weights: Weights, prompts: Array, threads: int) -> Model:
    """The loop that one writes by hand."""
    torch = engines.torch(threads)
    embedding = torch.nn.Embedding(case.symbols + 1, case.hidden)
    lstm = torch.nn.LSTM(case.hidden, case.hidden, case.layers, batch_first=True)
    output = torch.nn.Linear(case.hidden, case.symbols)
    parts = torch.nn.ModuleDict({"embedding": embedding, "recurrent": lstm, "output": output}).eval()
    parts.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    begin = np.full((case.batch, 1), case.symbols)
    tokens = torch.from_numpy(np.concatenate([begin, prompts], axis=1))

    def loop(new: int, choose: Callable[[Any], Any]) -> Any:
        with torch.inference_mode():
            y, state = lstm(embedding(tokens))
            symbols = [choose(output(y[:, -1]))]
            for _ in range(1, new):
                y, state = lstm(embedding(symbols[-1]), state)
                symbols.append(choose(output(y[:, -1])))
            return torch.cat(symbols, 1)

    def draw(logits: Any) -> Any:
        return torch.multinomial(torch.softmax(logits, 1), 1)

    def likeliest(logits: Any) -> Any:
        return logits.argmax(1, keepdim=True)

    return Model(lambda: loop(case.new, draw), lambda drawn: (loop(case.compared, likeliest).numpy(),))


_PEERS: dict[str, Callable[[Sample, Weights, Array, int], Model]] = {"torch": _torch}
