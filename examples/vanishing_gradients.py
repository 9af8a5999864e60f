"""Where gradients vanish, explode and survive on their way back through time, and what that means.

Left: the norm of the gradient with respect to the state, one backpropagation over 200 steps from a loss at the last
one. Right: what a layer learns of it. A symbol is shown, noise follows, and then the symbol is to be said again; the
delay grows. Mean accuracy of three trainings.

The plain networks start from He's initialisation, the gates of LSTM and GRU from biases that spread their memory
over all delays up to 200 steps [1]; the dashed LSTM from the usual forget bias of 1.

    python examples/vanishing_gradients.py --plot vanishing_gradients.png
    python examples/vanishing_gradients.py --quick     # short delays and little training, some seconds

[1] C. Tallec and Y. Ollivier, "Can recurrent neural networks warp time?", ICLR 2018.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

import fastseq as fs

STEPS = 200
HIDDEN = 64
SYMBOLS, NOISE = 8, 8  # what is to be remembered, and what comes after it
LAYERS = ["sigmoid RNN", "tanh RNN", "ReLU RNN", "LSTM", "GRU"]
FORGET_BIAS_1 = "LSTM, forget bias 1"


def make_layer(name: str, inputs: int, dtype: str, seed: int) -> Any:
    if name.endswith("RNN"):
        layer: Any = fs.RNN(inputs, HIDDEN, nonlinearity=name.split()[0].lower(), dtype=dtype)
        fs.init.initialise(layer, "he_normal", seed=seed)
        return layer
    layer = (fs.GRU if name == "GRU" else fs.LSTM)(inputs, HIDDEN, dtype=dtype, seed=seed)
    if name == FORGET_BIAS_1:
        fs.init.initialise(layer, forget_bias=1.0, seed=seed)
        return layer
    # A gate that keeps sigmoid(log t) of a state keeps it for about t steps.
    keeps = np.log(np.random.default_rng(seed).uniform(1, STEPS - 1, HIDDEN))
    bias = layer.parameters["bias_ih_l0"].copy()
    bias[HIDDEN : 2 * HIDDEN] = keeps  # the forget gate of the LSTM, z of the GRU
    if name == "LSTM":
        bias[:HIDDEN] = -keeps  # what is kept long is written seldom
    layer.parameters["bias_ih_l0"] = bias
    return layer


def gradient_norms(name: str, seed: int) -> np.ndarray:
    """The norm at every step, relative to that at the last. In float64, where 1e-100 is still a number."""
    rng = np.random.default_rng(seed)
    layer = make_layer(name, SYMBOLS + NOISE, "float64", seed)
    y, _, tape = layer.forward(rng.normal(size=(16, STEPS, SYMBOLS + NOISE)))
    dy = np.zeros_like(y)
    dy[:, -1] = rng.normal(size=dy[:, -1].shape)
    norms = fs.training.gradient_flow(layer, tape, dy)[:, 0]
    return norms / norms[-1]


class Recall:
    """Batches of the task, as many as are asked for, each drawn from the seed and its number."""

    def __init__(self, delay: int, count: int, batch_size: int = 64, seed: int = 0) -> None:
        self.delay, self.count, self.batch_size, self.seed = delay, count, batch_size, seed

    def __len__(self) -> int:
        return self.count

    def batches(self, epoch: int, start: int = 0) -> Iterator[fs.training.Batch]:
        for index in range(start, self.count):
            rng = np.random.default_rng([self.seed, epoch, index])
            shown = rng.integers(SYMBOLS, size=self.batch_size)
            ids = rng.integers(SYMBOLS, SYMBOLS + NOISE, (self.batch_size, self.delay + 1))
            ids[:, 0] = shown
            targets = np.full(ids.shape, -1)  # nothing is to be said
            targets[:, -1] = shown
            yield fs.training.Batch(np.eye(SYMBOLS + NOISE, dtype="float32")[ids], targets)


def recall_accuracy(name: str, delay: int, steps: int, seed: int) -> float:
    """The share of symbols that a trained layer remembers."""
    model = fs.Sequential(make_layer(name, SYMBOLS + NOISE, "float32", seed), fs.Linear(HIDDEN, SYMBOLS, seed=seed))
    fs.training.fit(
        model,
        Recall(delay, steps, seed=seed),
        loss=partial(fs.losses.softmax_cross_entropy, ignore_index=-1),
        optimiser=fs.training.Adam(model, 5e-3),
        clip_norm=1.0,
        epochs=1,
        progress=False,
        seed=seed,
    )
    batch = next(Recall(delay, 1, 1024, seed + 1).batches(0))
    assert batch.targets is not None
    return float((model(batch.inputs)[:, -1].argmax(axis=1) == batch.targets[:, -1]).mean())


def draw(path: str, norms: dict[str, np.ndarray], delays: Sequence[int], accuracies: dict[str, list[float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = {name: f"C{i}" for i, name in enumerate(LAYERS)} | {FORGET_BIAS_1: f"C{LAYERS.index('LSTM')}"}
    for name, values in norms.items():
        style = "--" if name == FORGET_BIAS_1 else "-"
        left.semilogy(np.arange(len(values)) - len(values) + 1, values, style, color=colors[name], label=name)
    left.set(
        ylim=(1e-24, 1e18),
        xlabel="steps from the loss",
        ylabel="norm of the gradient, relative to the last step",
        title="The gradient on its way back",
    )
    left.axhline(1, color="grey", linewidth=0.6)
    left.legend(frameon=False, fontsize=8, loc="upper right")
    for name, shares in accuracies.items():
        right.plot(delays, shares, "o-", markersize=4, color=colors[name], label=name)
    right.axhline(1 / SYMBOLS, color="grey", linestyle=":", linewidth=1, label="guessing")
    right.set(
        xscale="log",
        xlabel="delay in steps",
        ylabel="accuracy",
        ylim=(0, 1.05),
        title="What is remembered after training",
    )
    right.set_xticks(delays, [str(delay) for delay in delays])
    right.minorticks_off()
    right.legend(frameon=False, fontsize=8, loc=(0.68, 0.16))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Vanishing and exploding gradients, and delayed recall.")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of parameters and data (0)")
    parser.add_argument("--plot", metavar="FILE", help="write a picture")
    parser.add_argument("--quick", action="store_true", help="short delays and little training")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error("--seed should be at least 0")

    norms = {name: gradient_norms(name, options.seed) for name in [*LAYERS, FORGET_BIAS_1]}
    back = (10, 50, 100, STEPS - 1)
    print("norm of the gradient, steps back " + "".join(f"{steps:>10}" for steps in back))
    for name, values in norms.items():
        print(f"{name:>32} " + "".join(f"{values[-1 - steps]:>10.1e}" for steps in back))

    delays, steps, runs = ((2, 20), 80, 1) if options.quick else ((5, 10, 20, 40, 80, 160), 400, 3)
    print(f"\naccuracy at recall, delay {'':7}" + "".join(f"{delay:>10}" for delay in delays))
    accuracies: dict[str, list[float]] = {}
    for name in LAYERS:
        seeds = range(options.seed, options.seed + runs)
        accuracies[name] = [fmean(recall_accuracy(name, delay, steps, seed) for seed in seeds) for delay in delays]
        print(f"{name:>32} " + "".join(f"{share:>10.0%}" for share in accuracies[name]), flush=True)
    if options.plot:
        draw(options.plot, norms, delays, accuracies)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
