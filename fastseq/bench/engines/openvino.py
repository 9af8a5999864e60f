"""OpenVINO, from ONNX files of standard operators."""

from __future__ import annotations

from fastseq.bench.cases import Case
from fastseq.bench.cases.attention import Attention
from fastseq.bench.cases.encoder import Encoder
from fastseq.bench.cases.recurrent import Recurrent
from fastseq.bench.engines import Builder, Model, onnx_graphs
from fastseq.bench.engines.onnx_graphs import Exported


def _run(exported: Exported, threads: int) -> Model:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(exported.model), "CPU", settings).create_infer_request()
    # Inputs are read where they lie. Results are copied out of the request, which writes over them next time.
    return Model(
        lambda: request.infer(exported.inputs, share_inputs=True, share_outputs=False),
        lambda result: exported.outputs(result.to_tuple()),
    )


BUILDERS: dict[type[Case], Builder] = {
    Recurrent: lambda case, threads: _run(onnx_graphs.of_recurrent(case), threads),
    Attention: lambda case, threads: _run(onnx_graphs.of_attention(case), threads),
    Encoder: lambda case, threads: _run(onnx_graphs.of_encoder(case, fused=False), threads),
}
