"""The single-operator cases that the onnx package builds, for what the API has an operator of.

Every case is in one of two groups: those that the API can express, which pass over both engines, and `OTHERS`, with the
reason why it cannot.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from common import Array
from onnx.backend.test.loader import load_model_tests

import fastseq as fs
from fastseq import _attention, _dense
from fastseq.reference import _attention as in_numpy
from fastseq.reference import _dense as dense

pytestmark = pytest.mark.every_isa

SOFTCAP = "softcap: fastseq squashes no scores"
SCORES = "qk_matmul_output before the softmax: the scores are never held"
# What the API cannot express, and why.
OTHERS = {
    "test_attention_3d_diff_heads_sizes_softcap": SOFTCAP,
    "test_attention_3d_gqa_softcap": SOFTCAP,
    "test_attention_3d_softcap": SOFTCAP,
    "test_attention_3d_with_past_and_present_qk_matmul": SCORES,
    "test_attention_3d_with_past_and_present_qk_matmul_bias": SCORES,
    "test_attention_3d_with_past_and_present_qk_matmul_softcap": SOFTCAP,
    "test_attention_4d_diff_heads_sizes_softcap": SOFTCAP,
    "test_attention_4d_gqa_softcap": SOFTCAP,
    "test_attention_4d_softcap": SOFTCAP,
    "test_attention_4d_softcap_neginf_mask": SOFTCAP,
    "test_attention_4d_softcap_neginf_mask_poison": SOFTCAP,
    "test_attention_4d_with_past_and_present_qk_matmul": SCORES,
    "test_attention_4d_with_past_and_present_qk_matmul_bias": SCORES,
    "test_attention_4d_with_past_and_present_qk_matmul_bias_3d_mask": SCORES,
    "test_attention_4d_with_past_and_present_qk_matmul_bias_3d_mask_causal": SCORES,
    "test_attention_4d_with_past_and_present_qk_matmul_bias_4d_mask": SCORES,
    "test_attention_4d_with_past_and_present_qk_matmul_bias_4d_mask_causal": SCORES,
    "test_attention_4d_with_qk_matmul": SCORES,
    "test_attention_4d_with_qk_matmul_bias": SCORES,
    "test_attention_4d_with_qk_matmul_softcap": SOFTCAP,
    "test_attention_local_window_gqa_rank4_mask": SOFTCAP,
}

Run = Callable[[Any, dict[str, Array], dict[str, Any]], list[Array]]


def attention(module: Any, given: dict[str, Array], settings: dict[str, Any]) -> list[Array]:
    """Attention of ONNX: a causal query stands after what is in the cache, and not at the end of the keys."""
    wide = {
        name: array.astype("float32") if array.dtype.kind not in "bi" and array.dtype != "float64" else array
        for name, array in given.items()
    }
    q, k, v = wide["Q"], wide["K"], wide["V"]
    merged = q.ndim == 3
    if merged:
        heads = settings["q_num_heads"], settings["kv_num_heads"], settings["kv_num_heads"]
        q, k, v = (a.reshape(len(a), a.shape[1], n, -1).swapaxes(1, 2) for a, n in zip((q, k, v), heads, strict=True))
    past = 0
    if "past_key" in wide:
        past = wide["past_key"].shape[2]
        k = np.concatenate([wide["past_key"], k], axis=2)
        v = np.concatenate([wide["past_value"], v], axis=2)
    tq, tk = q.shape[2], k.shape[2]
    lengths = wide.get("nonpad_kv_seqlen")
    # Where query i of each row stands among the keys.
    own = np.arange(tq)[:, None] + (past if lengths is None else (lengths - tq)[:, None, None, None])
    at_the_end = own.ndim == 2 and past == tk - tq
    options: dict[str, Any] = {"scale": settings.get("scale"), "lengths": lengths}
    left, right = (settings.get(f"{side}_window_size", -1) for side in ("left", "right"))
    allowed = np.ones((tq, tk), bool)
    keys = np.arange(tk)
    causal = bool(settings.get("is_causal", 0))
    if at_the_end and causal:
        options["causal"] = True
        options["window"] = left + 1 if left >= 0 else None
    else:
        allowed = allowed & (keys <= own) if causal else allowed
        allowed = allowed & (keys >= own - left) if left >= 0 else allowed
        allowed = allowed & (keys <= own + right) if right >= 0 else allowed
    mask = wide.get("attn_mask")
    if mask is None:
        options["mask"] = allowed
    else:
        short = [(0, 0)] * (mask.ndim - 1) + [(0, tk - mask.shape[-1] if mask.shape[-1] > 1 else 0)]
        mask = np.pad(mask, short, constant_values=False if mask.dtype == bool else -np.inf)
        options["mask"] = mask & allowed if mask.dtype == bool else np.where(allowed, mask, -np.inf)
    out, weights = module.attention(q, k, v, **options, return_weights=True)
    if merged:
        out = out.swapaxes(1, 2).reshape(len(out), tq, -1)
    return [out, k, v, weights]


def layer_norm(module: Any, given: dict[str, Array], settings: dict[str, Any]) -> list[Array]:
    """The layer gives what is normalised; mean and scale are what its operation keeps for backward."""
    x = given["X"]
    axis = settings.get("axis", -1) % x.ndim
    last, eps = x.shape[axis:], settings.get("epsilon", 1e-5)
    layer = module.LayerNorm(last, eps=eps)
    layer.load_state_dict({"weight": given["W"].reshape(last), "bias": given["B"].reshape(last)})
    operations = _dense if module is fs else dense
    rows = np.ascontiguousarray(x).reshape(-1, int(np.prod(last)))
    _, means, scales = operations.layer_norm_forward(rows, None, None, eps, 1)
    shape = (*x.shape[:axis], *(1 for _ in last))
    return [layer(x), means.reshape(shape), scales.reshape(shape)]


def rms_norm(module: Any, given: dict[str, Array], settings: dict[str, Any]) -> list[Array]:
    x = given["X"]
    last = x.shape[settings.get("axis", -1) % x.ndim :]
    layer = module.RMSNorm(last, eps=settings.get("epsilon", 1e-5))
    layer.load_state_dict({"weight": given["W"].reshape(last)})
    return [layer(x)]


def rotary(module: Any, given: dict[str, Array], settings: dict[str, Any]) -> list[Array]:
    """ONNX gives the cosines and sines, which the operation takes; the layers make them from a base."""
    x, cos, sin = given["input"], given["cos_cache"], given["sin_cache"]
    merged = x.ndim == 3
    if merged:
        x = x.reshape(*x.shape[:2], settings["num_heads"], -1).swapaxes(1, 2)
    positions = np.arange(x.shape[0] * x.shape[2])
    if "position_ids" in given:
        positions = given["position_ids"].reshape(-1)
    else:
        cos, sin = (table.reshape(len(positions), -1) for table in (cos, sin))
    rows = np.ascontiguousarray(x.swapaxes(1, 2)).reshape(len(positions), x.shape[1], x.shape[3])
    operations = _attention if module is fs else in_numpy
    y = operations.rotary(rows, cos, sin, positions, bool(settings.get("interleaved", 0)), False, 1)
    y = y.reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3])
    return [y.reshape(given["input"].shape) if merged else y.swapaxes(1, 2)]


def softmax(module: Any, given: dict[str, Array], settings: dict[str, Any]) -> list[Array]:
    axis = settings.get("axis", -1)
    return [np.moveaxis(module.Softmax()(np.moveaxis(given["x"], axis, -1)), -1, axis)]


def gelu(module: Any, given: dict[str, Array], settings: dict[str, Any]) -> list[Array]:
    return [module.GELU(settings.get("approximate", b"none").decode())(given["x"])]


OPERATORS: dict[str, Run] = {
    "Attention": attention,
    "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm,
    "RotaryEmbedding": rotary,
    "Softmax": softmax,
    "Gelu": gelu,
}


@cache
def cases() -> dict[str, tuple[Any, Any]]:
    """Every case of one node that is of one of the operators, and that node."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package's own arithmetic, in other cases
        loaded = load_model_tests(kind="node")
    found = {}
    for case in loaded:
        nodes = () if case.model is None else case.model.graph.node
        if len(nodes) == 1 and nodes[0].op_type in OPERATORS:
            found[case.name] = case, nodes[0]
    return found


def asks_for_more(node: Any) -> bool:
    """Whether a node asks for what the reasons in `OTHERS` say."""
    settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    scores = len(node.output) > 3 and bool(node.output[3])
    return bool(settings.get("softcap")) or (scores and settings.get("qk_matmul_output_mode", 0) != 3)


def test_every_case_is_in_one_group() -> None:
    loaded = cases()
    assert len(loaded) > 100 and {node.op_type for _, node in loaded.values()} == set(OPERATORS)
    assert set(OTHERS) == {name for name, (_, node) in loaded.items() if asks_for_more(node)}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
def test_cases(module: Any, operator: str) -> None:
    chosen = {n: entry for n, entry in cases().items() if entry[1].op_type == operator and n not in OTHERS}
    assert chosen
    wrong = []
    for name, (case, node) in chosen.items():
        settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for inputs, outputs in case.data_sets:
            given = dict(zip((n for n in node.input if n), inputs, strict=True))
            named = [place for place, n in enumerate(node.output) if n]
            results = OPERATORS[operator](module, given, settings)
            for place, expected in zip(named, outputs, strict=True):
                # In 16 bits ONNX rounds in between, too.
                short = expected.dtype.name in ("float16", "bfloat16")
                relative, absolute = (2e-2, 2e-2) if short else (case.rtol, max(case.atol, 1e-6))
                result = np.asarray(results[place], "float64")
                if result.shape != expected.shape or not np.allclose(
                    result, expected.astype("float64"), relative, absolute
                ):
                    wrong.append(f"{name}: {node.output[place]}")
    assert not wrong
