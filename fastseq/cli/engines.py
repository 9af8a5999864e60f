"""The engines: what each needs, and how a computation is put into it, the same for whatever is computed.

An engine is imported where its model is built, which is in a process of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fastseq.checks import Array

Outputs = tuple[Array, ...]

# fastseq, where it is compared with itself: what does more with what does less.
GREEDY = "greedy"
# What may stand after --vs, and what each needs.
NEEDS = {
    "reference": (),
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "onnx"),
    "ctranslate2": ("ctranslate2",),
    "llamacpp": ("llama_cpp", "gguf"),
    GREEDY: (),
}
OURS = ("fastseq", "reference", "exact", GREEDY)  # exact: the reference in float64, which all are compared with
_MODULES = {"reference": "numpy", "exact": "numpy", GREEDY: "fastseq", "llamacpp": "llama_cpp"}  # of other names


@dataclass(frozen=True)
class Model:
    """A case in one engine.

    Attributes
    ----------
    call : callable
        What is timed: inputs lie ready in the layout of the engine, results are new arrays every time.
    outputs : callable
        Takes what `call` returned to arrays that are the same in every engine: first those of the forward, in training
        also the gradients. Not timed.
    """

    call: Callable[[], Any]
    outputs: Callable[[Any], Outputs]


def missing(engine: str, more: Sequence[str] = ()) -> list[str]:
    """The modules an engine needs that are not installed, of `more` too."""
    needed = dict.fromkeys((*NEEDS[engine], *more))
    return [name for name in needed if importlib.util.find_spec(name) is None]


def version(engine: str) -> str:
    """The version of an engine, in its own process."""
    module: ModuleType = importlib.import_module(_MODULES.get(engine, engine))
    return str(module.__version__)


def ours(engine: str, threads: int) -> tuple[Any, str]:
    """The package that has the layers, and their dtype: one of `OURS`."""
    import fastseq

    if engine in ("fastseq", GREEDY):
        fastseq.set_num_threads(threads)
        return fastseq, "float32"
    # NumPy takes its threads from the environment.
    return fastseq.reference, "float64" if engine == "exact" else "float32"


def torch(threads: int) -> Any:
    """PyTorch, on so many threads."""
    import torch

    torch.set_num_threads(threads)
    return torch


# Takes what the outputs of a graph are, in order, to those of a `Model`.
Arranged = Callable[[Sequence[Array]], Outputs]


def onnxruntime(model: bytes, inputs: Mapping[str, Array], threads: int, outputs: Arranged) -> Model:
    """A graph in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    given = dict(inputs)
    return Model(lambda: session.run(None, given), outputs)


def openvino(model: bytes, inputs: Mapping[str, Array], threads: int, outputs: Arranged) -> Model:
    """A graph in OpenVINO."""
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    given = dict(inputs)
    # Inputs are read where they lie. Results are copied out of the request, which writes over them next time.
    return Model(
        lambda: request.infer(given, share_inputs=True, share_outputs=False),
        lambda result: outputs(result.to_tuple()),
    )
