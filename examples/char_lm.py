"""A character model of English: Markov chains and an LSTM beside each other, then samples.

The text is the documentation that every CPython brings for `help()`, each paragraph once; the last tenth is held out.
The chains are given the smoothing and the order that suit the held-out text best; the LSTM sees none of it.

    python examples/char_lm.py --plot char_lm.png
    python examples/char_lm.py --quick                 # a small LSTM, some seconds
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import fastseq as fs

SMOOTHINGS: dict[str, float | str] = {
    "add one": 1.0,
    "add 0.01": 0.01,
    "Witten-Bell": "witten_bell",
    "Kneser-Ney": "kneser_ney",
}
ORDERS = range(1, 6)


class Text(NamedTuple):
    characters: list[str]
    ids: np.ndarray
    held_out: np.ndarray

    def encode(self, text: str) -> np.ndarray:
        return np.array([self.characters.index(c) for c in text])

    def decode(self, ids: np.ndarray) -> str:
        return "".join(self.characters[i] for i in ids)


def read_text() -> Text:
    """The topics of `help()`. Some share paragraphs, and one that was learnt by heart should not be held out."""
    topics = pydoc_data.topics.topics
    paragraphs = (p.strip("\n") for name in sorted(topics) for p in topics[name].split("\n\n"))
    text = "\n\n".join(dict.fromkeys(p for p in paragraphs if p))
    characters = sorted(set(text))
    places = {c: i for i, c in enumerate(characters)}
    ids = np.array([places[c] for c in text])
    split = len(ids) * 9 // 10
    return Text(characters, ids[:split], ids[split:])


def fit_chains(text: Text) -> dict[str, list[fs.models.MarkovChain]]:
    size = len(text.characters)
    chains = {
        name: [fs.models.MarkovChain(size, order, smoothing=smoothing) for order in ORDERS]
        for name, smoothing in SMOOTHINGS.items()
    }
    for chain in (chain for each in chains.values() for chain in each):
        chain.fit(text.ids)
    return chains


def fit_lstm(text: Text, hidden: int, steps: int, seed: int) -> tuple[fs.models.RecurrentLM, fs.training.History]:
    """Two layers; the state is carried along 16 streams, in chunks of 64 characters."""
    model = fs.models.RecurrentLM(len(text.characters), 64, hidden, 2, cell="lstm", dropout=0.15, seed=seed)
    fs.init.initialise(model, forget_bias=1.0, seed=seed)
    rate = 4e-3
    history = model.fit(
        text.ids,
        batch_size=16,
        chunk=64,
        steps=steps,
        optimiser=fs.training.AdamW(model, rate),
        schedule=fs.training.CosineSchedule(rate, steps, warmup_steps=steps // 50),
        clip_norm=1.0,
        validation=fs.training.Streams(text.held_out, batch_size=16, steps=64),
        validate_every=max(1, steps // 20),
        seed=seed,
    )
    return model, history


def draw(path: str, bits: dict[str, list[float]], lstm: float, history: fs.training.History) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, values in bits.items():
        left.plot(ORDERS, values, "o-", markersize=4, label=f"Markov chain, {name}")
    left.axhline(lstm, color="black", label="LSTM, trained to its end")
    left.set(
        xlabel="characters that a Markov chain looks back (order)",
        ylabel="bits per character of held-out text",
        xticks=list(ORDERS),
        title="Markov chains by order and smoothing",
    )
    left.legend(frameon=False, fontsize=8)
    best = min(min(values) for values in bits.values())
    right.plot(
        history.validation_step, history.validation_loss / np.log(2), "o-", color="black", markersize=3, label="LSTM"
    )
    right.axhline(best, color="C3", linestyle="--", label="best Markov chain")
    right.set(xlabel="steps of training, of 1,024 characters each", title="The LSTM as it learns")
    right.tick_params(labelleft=True)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    figure.suptitle("Predicting the next character of Python's documentation (fewer bits are better)")
    figure.savefig(path, dpi=150)


def threads() -> str:
    count = fs.get_num_threads()
    return f"{count} thread{'' if count == 1 else 's'}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Markov chains and an LSTM on the same text.")
    parser.add_argument("--steps", type=int, default=5000, metavar="N", help="steps the LSTM is trained for (5000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of parameters, data and samples (0)")
    parser.add_argument("--plot", metavar="FILE", help="write a picture")
    parser.add_argument("--quick", action="store_true", help="a small LSTM and few steps")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.seed < 0:
        parser.error("--steps should be at least 1, --seed at least 0")
    hidden, steps = (64, min(options.steps, 150)) if options.quick else (256, options.steps)

    text = read_text()
    print(
        f"{len(text.ids) + len(text.held_out):,} characters, {len(text.characters)} different;"
        f" the last {len(text.held_out):,} are held out. Bits per character of those:\n"
    )
    chains = fit_chains(text)
    bits = {name: [chain.bits_per_symbol(text.held_out) for chain in row] for name, row in chains.items()}
    print("Markov chain, order  " + "".join(f"{order:7d}" for order in ORDERS))
    for name, values in bits.items():
        print(f"{name:>20} " + "".join(f"{value:7.3f}" for value in values))
    scored = [pair for name in bits for pair in zip(bits[name], chains[name], strict=True)]
    best, chain = min(scored, key=lambda pair: pair[0])

    start = time.perf_counter()
    model, history = fit_lstm(text, hidden, steps, options.seed)
    seconds = time.perf_counter() - start
    lstm = model.bits_per_symbol(text.held_out)
    print(f"\n{f'LSTM 2×{hidden}':>20} {lstm:7.3f}   after {seconds:.0f} s on {threads()}")
    print(f"That is {abs(best - lstm):.3f} bits {'less' if lstm < best else 'more'} than the best chain needs.")

    prompt = text.encode("The ")
    for name, one in ((f"the chain of order {chain.order}", chain), ("the LSTM", model)):
        said = one.generate(prompt, 400, temperature=0.8, seed=options.seed)
        print(f"\n--- {name} says:\nThe {text.decode(said)}")
    if options.plot:
        draw(options.plot, bits, lstm, history)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
