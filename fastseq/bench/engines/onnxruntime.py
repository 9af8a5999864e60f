"""ONNX Runtime, with its fused operators where it has them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fastseq.bench.cases import Case
from fastseq.bench.cases.attention import Attention
from fastseq.bench.cases.encoder import Encoder
from fastseq.bench.cases.recurrent import Recurrent
from fastseq.bench.engines import Builder, Model, NotNarrow, onnx_graphs
from fastseq.bench.engines.onnx_graphs import Exported


def _run(exported: Exported, threads: int, weights: str) -> Model:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    model = exported.model if weights == "float32" else _quantised(exported.model)
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    return Model(lambda: session.run(None, exported.inputs), exported.outputs)


def _quantised(model: bytes) -> bytes:
    """A graph with int8 weights, by the settings that `quantize_dynamic` has of its own.

    It does not know the types of what the fused operators give unless it is told.
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        before.write_bytes(model)
        quantize_dynamic(before, after, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
        quantised = after.read_bytes()
    nodes = onnx.load_model_from_string(quantised).graph.node
    if not any(node.op_type in _QUANTISED for node in nodes):
        raise NotNarrow("not quantised")
    return quantised


# Operators that have int8 weights; tables of embeddings, which it quantises too, are no products.
_QUANTISED = ("DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QAttention")


def _recurrent(case: Recurrent, threads: int, weights: str = "float32") -> Model:
    return _run(onnx_graphs.of_recurrent(case), threads, weights)


def _encoder(case: Encoder, threads: int, weights: str = "float32") -> Model:
    return _run(onnx_graphs.of_encoder(case, fused=True), threads, weights)


BUILDERS: dict[type[Case], Builder] = {
    Recurrent: _recurrent,
    Attention: lambda case, threads: _run(onnx_graphs.of_attention(case), threads, "float32"),
    Encoder: _encoder,
}
