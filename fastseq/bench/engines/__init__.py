"""The engines that are timed, one file each: what each needs, and how a case is built in it.

The file of an engine bears its name and has `BUILDERS`: by class of case, what builds it. An engine's own package is
imported only where a case is built, which is in a process of its own.

Builders of cases that engines compute with narrow weights are given the type of these; they raise `NotNarrow` where the
engine would compute with float32 all the same.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from fastseq.bench.cases import Case, Outputs, name_and_weights
from fastseq.bench.cases.language import STEPS_COMPARED
from fastseq.checks import Array

# fastseq compared with itself: as many greedy rows beside beam search.
GREEDY = "greedy"
# What may stand after --vs, and the packages that each needs.
NEEDS = {
    "reference": (),
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "onnx"),
    "ctranslate2": ("ctranslate2",),
    "llamacpp": ("llama_cpp", "gguf"),
    GREEDY: (),
}
_MODULES = {"reference": "numpy", "exact": "numpy", GREEDY: "fastseq", "llamacpp": "llama_cpp"}  # of other names


@dataclass(frozen=True)
class Model:
    """A case in one engine.

    Attributes
    ----------
    call : callable
        What is timed: inputs lie ready in the layout of the engine, results are new arrays every time.
    outputs : callable
        Converts the result of `call` to arrays that are the same in every engine: first those of the forward, in
        training also the gradients. Not timed.
    margins : callable, optional
        Of `exact`, where symbols are chosen: by how much each symbol (B, T) that another engine chose is likelier than
        any other, after the same text; below zero where another one is likelier.
    """

    call: Callable[[], Any]
    outputs: Callable[[Any], Outputs]
    margins: Callable[[Array], Array] | None = None


# Builds a case on a number of threads, and with narrow weights of a type where that is given.
Builder = Callable[..., Model]


class NotNarrow(Exception):
    """An engine leaves a case in float32, or has not the instructions to compute it with narrow weights."""


def builders(engine: str) -> dict[type[Case], Builder]:
    """What builds cases in an engine, by class of case; the dictionary may be extended."""
    found: dict[type[Case], Builder] = importlib.import_module(f"fastseq.bench.engines.{engine}").BUILDERS
    return found


def build(engine: str, case: Case, threads: int) -> Model:
    """Build a case in an engine, in the process of the engine."""
    name, weights = name_and_weights(engine)
    builder = builders(name)[type(case)]
    return builder(case, threads) if weights == "float32" else builder(case, threads, weights)


def missing(engine: str, more: Sequence[str] = ()) -> list[str]:
    """The modules an engine needs that are not installed, of `more` too."""
    needed = dict.fromkeys((*NEEDS[engine], *more))
    return [name for name in needed if importlib.util.find_spec(name) is None]


def version(engine: str) -> str:
    """The version of an engine, in its own process."""
    name, _ = name_and_weights(engine)
    module: ModuleType = importlib.import_module(_MODULES.get(name, name))
    return str(module.__version__)


def step_outputs(
    call: Callable[[], Any], gradients: Callable[[], Iterable[Array]], parameters: Callable[[], Iterable[Array]]
) -> Callable[[Any], Outputs]:
    """Return loss, norm and gradients of the first step, which was taken, and the parameters some steps later."""

    def outputs(result: Any) -> Outputs:
        first = [np.array(array) for array in (*result, *gradients())]
        for _ in range(1, STEPS_COMPARED):
            call()
        return (*first, *map(np.array, parameters()))

    return outputs
