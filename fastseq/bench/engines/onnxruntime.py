"""ONNX Runtime, with its fused operators where it has them."""

from __future__ import annotations

from fastseq.bench.cases import Case
from fastseq.bench.cases.attention import Attention
from fastseq.bench.cases.encoder import Encoder
from fastseq.bench.cases.recurrent import Recurrent
from fastseq.bench.engines import Builder, Model, onnx_graphs
from fastseq.bench.engines.onnx_graphs import Exported


def _run(exported: Exported, threads: int) -> Model:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(exported.model, options, ["CPUExecutionProvider"])
    return Model(lambda: session.run(None, exported.inputs), exported.outputs)


BUILDERS: dict[type[Case], Builder] = {
    Recurrent: lambda case, threads: _run(onnx_graphs.of_recurrent(case), threads),
    Attention: lambda case, threads: _run(onnx_graphs.of_attention(case), threads),
    Encoder: lambda case, threads: _run(onnx_graphs.of_encoder(case, fused=True), threads),
}
