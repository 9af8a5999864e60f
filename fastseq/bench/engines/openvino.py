"""OpenVINO, from ONNX files of standard operators."""

from __future__ import annotations

from fastseq.bench.cases import Case
from fastseq.bench.cases.attention import Attention
from fastseq.bench.cases.encoder import Encoder
from fastseq.bench.cases.recurrent import Recurrent
from fastseq.bench.engines import Builder, Model, NotNarrow, onnx_graphs
from fastseq.bench.engines.onnx_graphs import Exported

_HINTS = {"float32": "f32", "bfloat16": "bf16"}


def _run(exported: Exported, threads: int, weights: str = "float32") -> Model:
    import openvino

    core = openvino.Core()
    if weights == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise NotNarrow("no bfloat16 on this machine")
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": _HINTS[weights],
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(exported.model), "CPU", settings).create_infer_request()
    # Inputs are read where they lie. Results are copied out of the request, which writes over them next time.
    return Model(
        lambda: request.infer(exported.inputs, share_inputs=True, share_outputs=False),
        lambda result: exported.outputs(result.to_tuple()),
    )


def _recurrent(case: Recurrent, threads: int, weights: str = "float32") -> Model:
    return _run(onnx_graphs.of_recurrent(case), threads, weights)


def _encoder(case: Encoder, threads: int, weights: str = "float32") -> Model:
    return _run(onnx_graphs.of_encoder(case, fused=False), threads, weights)


BUILDERS: dict[type[Case], Builder] = {
    Recurrent: _recurrent,
    Attention: lambda case, threads: _run(onnx_graphs.of_attention(case), threads),
    Encoder: _encoder,
}
