"""Forecast the yearly number of sunspots, 1700 to 2008: from the last value up to LSTM and GRU.

All models learn from the same years and are judged by the same later ones: by one-step forecasts, and by closed loops
that start anew in each of those years and take their own forecasts for values. The series comes with the package
statsmodels, whose own least squares the coefficients of the autoregressive model are compared with.

    python examples/forecast.py --plot forecast.png
    python examples/forecast.py --quick                # little training, some seconds
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

import fastseq as fs

SPLIT = 1920  # the first year that no model learns from
VALIDATION = 30  # the years before it that say when to stop training
HORIZON = 12
ORDERS = range(1, 21)  # of the autoregressive model: BIC chooses
PERCEPTRON_ORDER = 9  # most of a cycle of 11 years
CELLS = {"RNN": "rnn", "LSTM": "lstm", "GRU": "gru"}


class Missing(Exception):
    """A package that this example needs is not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(f'this example needs the package {package}: pip install -e ".[examples]"')


def read_sunspots() -> tuple[np.ndarray, np.ndarray]:
    """Years and the mean number of sunspots in each."""
    if importlib.util.find_spec("statsmodels") is None:
        raise Missing("statsmodels")
    from statsmodels.datasets import sunspots

    data = sunspots.load().data
    return data["YEAR"].to_numpy(int), data["SUNACTIVITY"].to_numpy(float)


def compare_with_statsmodels(model: fs.models.AutoRegressive, x: np.ndarray) -> float:
    """The largest difference between our coefficients and those of statsmodels."""
    from statsmodels.tsa.ar_model import AutoReg

    theirs = AutoReg(x, model.order, trend="c").fit().params
    difference = float(np.abs(np.r_[model.intercept, model.coefficients[0]] - theirs).max())
    if difference > 1e-6:
        raise AssertionError(f"coefficients differ from those of statsmodels by {difference}")
    return difference


class LastValue:
    """The naive forecast: what is, stays."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return x

    def forecast(self, x: np.ndarray, horizon: int, lengths: Any = None) -> np.ndarray:
        return np.repeat(x[np.arange(len(x)), np.asarray(lengths) - 1][:, None], horizon, axis=1)


def fit_models(x: np.ndarray, quick: bool, seed: int, progress: bool) -> dict[str, Any]:
    """Every model, fitted to the series."""
    models: dict[str, Any] = {"last value": LastValue()}
    linear = fs.models.AutoRegressive.choose(x, ORDERS, "bic")
    models[f"AR({linear.order})"] = linear
    training: dict[str, Any] = {
        "epochs": 5 if quick else 200,
        "patience": 20,
        "seed": seed,
        "progress": progress,
    }
    shown = x[:-VALIDATION]

    perceptron = fs.models.AutoRegressive(PERCEPTRON_ORDER, 8, seed=seed)
    perceptron.fit(shown, validation=x[-VALIDATION - PERCEPTRON_ORDER :], **training)
    models[f"perceptron({PERCEPTRON_ORDER})"] = perceptron
    for name, cell in CELLS.items():
        model = fs.models.RecurrentForecaster(1, 16, cell=cell, seed=seed)
        model.fit(shown, window=48, validation=x[-VALIDATION - 48 :], **training)
        models[name] = model
    return models


def errors(model: Any, x: np.ndarray, first: int) -> tuple[float, np.ndarray]:
    """Root mean squared errors from index `first` on: of one step, and of closed loops by how far ahead they are."""
    one_step = x[first:] - model(x)[first - 1 : -1] if not isinstance(model, LastValue) else np.diff(x)[first - 1 :]
    starts = np.arange(first, len(x) - HORIZON + 1)  # a loop for each, all in one call
    loops = model.forecast(np.tile(x, (len(starts), 1)), HORIZON, lengths=starts)
    wanted = x[starts[:, None] + np.arange(HORIZON)]
    return float(np.sqrt(np.mean(one_step**2))), np.sqrt(np.mean((loops - wanted) ** 2, axis=0))


def draw(path: str, years: np.ndarray, x: np.ndarray, models: dict[str, Any], found: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 2])
    first = int(np.flatnonzero(years == SPLIT)[0])
    top.plot(years[first - 40 :], x[first - 40 :], color="black", linewidth=1, label="observed")
    top.axvline(SPLIT - 0.5, color="grey", linewidth=0.8, linestyle=":")
    ahead = 45
    best = min(found, key=lambda name: float(found[name][1].mean()))  # thick in both panels, the others pale
    for i, (name, model) in enumerate(models.items()):
        how: dict[str, Any] = {"color": f"C{i}", "label": name}
        how |= {"linewidth": 2.6, "zorder": 3} if name == best else {"linewidth": 1, "alpha": 0.45}
        loop = model.forecast(x[None, :first], ahead, lengths=[first])[0]
        if i:  # a straight line says nothing
            top.plot(years[first - 1 : first + ahead], [x[first - 1], *loop], **how)
        bottom.plot(range(1, HORIZON + 1), found[name][1], "o-", markersize=3, **how)
    top.set(
        xlabel="year",
        ylabel="sunspots, mean of the year",
        title=f"Forecasts made in {SPLIT - 1}, each prediction fed back",
        xlim=(years[first - 40], years[first] + ahead),
    )
    top.legend(frameon=False, fontsize=8, ncols=4, loc="upper left")
    top.set_ylim(top=top.get_ylim()[1] * 1.15)
    bottom.set(
        xlabel="years ahead",
        ylabel="root mean squared error",
        title=f"Errors of such forecasts, made in every year from {SPLIT - 1} to {years[-1] - HORIZON}",
        xticks=range(1, HORIZON + 1),
    )
    bottom.legend(frameon=False, fontsize=8)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Forecast sunspots with autoregressive and recurrent models.")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of parameters and data (0)")
    parser.add_argument("--plot", metavar="FILE", help="write a picture")
    parser.add_argument("--quick", action="store_true", help="little training")
    parser.add_argument("--progress", action="store_true", help="show a bar for each training")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error("--seed should be at least 0")
    try:
        years, x = read_sunspots()
    except Missing as error:
        parser.exit(1, f"{error}\n")

    first = int(np.flatnonzero(years == SPLIT)[0])
    models = fit_models(x[:first], options.quick, options.seed, options.progress)
    linear = next(model for model in models.values() if isinstance(model, fs.models.AutoRegressive))
    difference = compare_with_statsmodels(linear, x[:first])
    print(f"{len(x)} years; {years[0]} to {SPLIT - 1} to learn from, {SPLIT} to {years[-1]} to judge by")
    print(f"order {linear.order} by BIC; its coefficients differ from those of statsmodels by {difference:.1e}\n")
    found = {name: errors(model, x, first) for name, model in models.items()}
    print("root mean squared error    one step   closed loop: " + "".join(f"{h:>4} years" for h in (2, 5, 11)))
    for name, (one_step, loop) in found.items():
        print(f"{name:>22} {one_step:12.1f} {'':14}" + "".join(f"{loop[h - 1]:10.1f}" for h in (2, 5, 11)))
    if options.plot:
        draw(options.plot, years, x, models, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
