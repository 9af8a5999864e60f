"""A character Transformer beside the LSTM and the Markov chains of char_lm.py: the same text, held out alike.

Four layers of width 128, put together as GPT-2 is but for rotary positions, with which it learns much faster here. An
RNN walks through a text step by step, a Transformer looks at all of it at once: the picture shows how long one forward
takes as the text gets longer.

    python examples/char_gpt.py --plot char_gpt.png
    python examples/char_gpt.py --quick                # few steps, some seconds
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from char_lm import Text, fit_chains, fit_lstm, read_text, threads

import fastseq as fs

LAYERS, WIDTH, HEADS, CONTEXT = 4, 128, 4, 128
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)


class Row(NamedTuple):
    """A line of the table."""

    name: str
    bits: float
    seconds: float
    parameters: int


def transformer(size: int, context: int, seed: int) -> fs.models.TransformerLM:
    return fs.models.TransformerLM(
        size, WIDTH, HEADS, LAYERS, context=context, positions="rotary", dropout=0.1, seed=seed
    )


def fit_transformer(
    text: Text, steps: int, seed: int, callbacks: Sequence[Callable[..., bool]] = ()
) -> fs.models.TransformerLM:
    """16 windows of 128 characters a step."""
    model = transformer(len(text.characters), CONTEXT, seed)
    rate = 3e-3
    model.fit(
        text.ids,
        batch_size=16,
        steps=steps,
        optimiser=fs.training.AdamW(model, rate),
        schedule=fs.training.CosineSchedule(rate, steps, warmup_steps=steps // 20),
        clip_norm=1.0,
        callbacks=callbacks,
        seed=seed,
    )
    return model


def timed(name: str, text: Text, fit: Callable[[], Any]) -> tuple[Row, Any]:
    """A model, how long it took to get it, and what it knows of the text that was held out."""
    start = time.perf_counter()
    model = fit()
    seconds = time.perf_counter() - start
    size = sum(array.size for array in model.parameters.values())
    return Row(name, model.bits_per_symbol(text.held_out), seconds, size), model


def forward_times(size: int, hidden: int, lengths: Sequence[int], seed: int, rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of one call over one text of each length, the best of some rounds. What is learnt does not matter."""
    models = {
        f"LSTM 2×{hidden}": fs.models.RecurrentLM(size, 64, hidden, 2, cell="lstm", seed=seed),
        f"Transformer {LAYERS}×{WIDTH}": transformer(size, max(lengths) + 1, seed),
    }
    random = np.random.default_rng(seed)
    times: dict[str, list[float]] = {name: [] for name in models}
    for length in lengths:
        x = random.integers(0, size, (1, length))
        best = dict.fromkeys(models, np.inf)
        for _ in range(1 + rounds):  # in turn, so that what else the machine does meets both
            for name, model in models.items():
                start = time.perf_counter()
                model(x)
                best[name] = min(best[name], time.perf_counter() - start)
        for name in models:
            times[name].append(best[name])
    return times


def draw(path: str, lengths: Sequence[int], times: dict[str, list[float]]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, seconds), colour in zip(times.items(), ("black", "C0"), strict=True):
        axes.plot(lengths, 1e3 * np.array(seconds), "o-", color=colour, markersize=4, label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="characters of the text",
        ylabel="milliseconds",
        title="Time of one forward over a whole text",
    )
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.grid(color="#e8ebee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A Transformer, an LSTM and Markov chains on the same text.")
    parser.add_argument("--steps", type=int, default=4000, metavar="N", help="steps of the Transformer (4000)")
    parser.add_argument("--lstm-steps", type=int, default=5000, metavar="N", help="steps of the LSTM (5000)")
    parser.add_argument("--seconds", type=float, metavar="S", help="train the Transformer no longer than this")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of parameters, data and samples (0)")
    parser.add_argument("--plot", metavar="FILE", help="write a picture of the times of one forward")
    parser.add_argument("--quick", action="store_true", help="a small LSTM, few steps, short texts")
    options = parser.parse_args(arguments)
    if min(options.steps, options.lstm_steps) < 1 or options.seed < 0:
        parser.error("--steps and --lstm-steps should be at least 1, --seed at least 0")
    if options.seconds is not None and not options.seconds > 0:
        parser.error("--seconds should be more than 0")
    hidden, lengths = (64, LENGTHS[:4]) if options.quick else (256, LENGTHS)
    steps, lstm_steps = options.steps, options.lstm_steps
    if options.quick:
        steps, lstm_steps = min(steps, 40), min(lstm_steps, 150)

    text = read_text()
    size, seed = len(text.characters), options.seed
    print(
        f"{len(text.ids) + len(text.held_out):,} characters, {size} different; the last {len(text.held_out):,} are"
        f" held out. {threads()}.\n"
    )
    start = time.perf_counter()
    chains = [(name, chain) for name, row in fit_chains(text).items() for chain in row]
    seconds = time.perf_counter() - start
    scored = [(chain.bits_per_symbol(text.held_out), name, chain) for name, chain in chains]
    bits, name, chain = min(scored, key=lambda one: one[0])
    counts = len(chain.state_dict()["counts"])
    rows = [Row(f"best Markov chain: {name}, order {chain.order}", bits, seconds, counts)]

    row, _ = timed(f"LSTM 2×{hidden}", text, lambda: fit_lstm(text, hidden, lstm_steps, seed)[0])
    rows.append(row)
    deadline = None if options.seconds is None else time.perf_counter() + options.seconds
    late = [] if deadline is None else [lambda info: time.perf_counter() >= deadline]
    row, model = timed(f"Transformer {LAYERS}×{WIDTH}", text, lambda: fit_transformer(text, steps, seed, late))
    rows.append(row)
    print(f"{'':42}{'bits/character':>15}{'seconds':>9}{'numbers':>10}")
    for row in rows:
        print(f"{row.name:42}{row.bits:15.3f}{row.seconds:9.1f}{row.parameters:10,}")

    said = model.generate(text.encode("The "), 300, temperature=0.8, seed=seed)
    print(f"\n--- the Transformer says:\nThe {text.decode(said)}\n")
    times = forward_times(size, hidden, lengths, seed)
    print(f"{'ms for one forward over':24}" + "".join(f"{length:9d}" for length in lengths))
    for name, values in times.items():
        print(f"{name:24}" + "".join(f"{1e3 * value:9.2f}" for value in values))
    if options.plot:
        draw(options.plot, lengths, times)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
