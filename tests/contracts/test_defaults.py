"""The defaults that people rely on without saying so: one that is changed by mistake changes what their programs do."""

from __future__ import annotations

import functools
import inspect

import pytest

import fastseq as fs

# Without those that are None, and `dtype`.
DEFAULTS = {
    "AdditiveAttention": "bias=True",
    "AttentionState": "window=0",
    "AvgPool1d": "padding=0, count_include_pad=True",
    "Conv1d": "stride=1, padding=0, dilation=1, groups=1, bias=True",
    "Dropout": "p=0.5",
    "Graph": "without_time=()",
    "GELU": "approximate='none'",
    "GRU": "num_layers=1, reset_after=True, bias=True, dropout=0.0, bidirectional=False",
    "LSTM": "num_layers=1, proj_size=0, layer_norm=False, bias=True, dropout=0.0, bidirectional=False",
    "LayerNorm": "eps=1e-05, elementwise_affine=True, bias=True",
    "Linear": "bias=True",
    "MaxPool1d": "padding=0, dilation=1",
    "MultiheadAttention": "bias=True, dropout=0.0",
    "RMSNorm": "eps=1e-05, elementwise_affine=True",
    "RNN": "num_layers=1, nonlinearity='tanh', bias=True, dropout=0.0, bidirectional=False",
    "RotaryPositions": "base=10000.0, interleaved=False",
    "SinusoidalPositions": "base=10000.0",
    "Transformer": (
        "d_model=512, nhead=8, num_encoder_layers=6, num_decoder_layers=6, dim_feedforward=2048, dropout=0.1, "
        "activation='relu', norm_first=False, layer_norm_eps=1e-05, bias=True, norm='layer'"
    ),
    "TransformerDecoder": (
        "dim_feedforward=2048, dropout=0.1, activation='relu', norm_first=False, layer_norm_eps=1e-05, "
        "final_norm=False, bias=True, norm='layer'"
    ),
    "TransformerDecoderLayer": (
        "dim_feedforward=2048, dropout=0.1, activation='relu', norm_first=False, layer_norm_eps=1e-05, "
        "bias=True, norm='layer'"
    ),
    "TransformerEncoder": (
        "dim_feedforward=2048, dropout=0.1, activation='relu', norm_first=False, layer_norm_eps=1e-05, "
        "final_norm=False, bias=True, norm='layer'"
    ),
    "TransformerEncoderLayer": (
        "dim_feedforward=2048, dropout=0.1, activation='relu', norm_first=False, layer_norm_eps=1e-05, "
        "bias=True, norm='layer'"
    ),
    "attention": "causal=False, return_weights=False",
    "attention_forward": "causal=False",
    "load": "classes=()",
    "models.AutoRegressive": "activation='sigmoid'",
    "models.AutoRegressive.fit": "seed=0",
    "models.AutoRegressive.choose": "criterion='bic', activation='sigmoid'",
    "models.MarkovChain": "order=1, smoothing=1.0",
    "models.MarkovChain.generate": (
        "temperature=1.0, repetition_penalty=1.0, num_beams=1, length_penalty=1.0, num_results=1, "
        "return_log_probs=False"
    ),
    "models.MarkovChain.choose": "orders=range(1, 6), criterion='bic', smoothing=1.0",
    "models.RecurrentForecaster": "num_layers=1, cell='lstm', dropout=0.0",
    "models.RecurrentForecaster.fit": "seed=0",
    "models.RecurrentLM": "num_layers=1, cell='lstm', dropout=0.0",
    "models.RecurrentLM.generate": (
        "temperature=1.0, repetition_penalty=1.0, num_beams=1, length_penalty=1.0, num_results=1, "
        "return_log_probs=False"
    ),
    "models.RecurrentLM.fit": "seed=0",
    "models.Seq2Seq": "num_layers=1, cell='gru', bidirectional=True, dropout=0.0",
    "models.Seq2Seq.generate": (
        "temperature=1.0, repetition_penalty=1.0, num_beams=1, length_penalty=1.0, num_results=1, "
        "return_log_probs=False"
    ),
    "models.Seq2Seq.fit": "seed=0, sampling=0.0, label_smoothing=0.0",
    "models.TransformerEncoderModel": (
        "max_length=512, type_vocab_size=0, dropout=0.1, activation='gelu', norm_first=False, "
        "layer_norm_eps=1e-12, pooling='mean', normalize=False, pooler=False"
    ),
    "models.TransformerEncoderModel.fit": "seed=0",
    "models.TransformerLM": (
        "context=1024, dropout=0.0, activation='gelu_tanh', norm='layer', norm_first=True, "
        "positions='learned', bias=True, tied=True"
    ),
    "models.TransformerLM.generate": (
        "temperature=1.0, repetition_penalty=1.0, num_beams=1, length_penalty=1.0, num_results=1, "
        "return_log_probs=False"
    ),
    "models.TransformerLM.fit": "seed=0",
    "models.TransformerSeq2Seq": (
        "max_length=256, dropout=0.0, activation='gelu_tanh', norm='layer', norm_first=True, "
        "positions='sinusoidal', bias=True, tied=True"
    ),
    "models.TransformerSeq2Seq.generate": (
        "temperature=1.0, repetition_penalty=1.0, num_beams=1, length_penalty=1.0, num_results=1, "
        "return_log_probs=False"
    ),
    "models.TransformerSeq2Seq.fit": "seed=0, sampling=0.0, label_smoothing=0.0",
    "models.bert_state_dict": "pooler=False",
    "training.Adam": "lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0",
    "training.AdamW": "lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01",
    "training.CosineSchedule": "warmup_steps=0, final_lr=0.0",
    "training.PaddedBatches": "shuffle=True, group=True",
    "training.PairedBatches": "shuffle=True, group=True",
    "training.PlateauSchedule": "factor=0.1, patience=10, threshold=0.0001, min_lr=0.0",
    "training.RMSProp": "lr=0.01, alpha=0.99, eps=1e-08, momentum=0.0, weight_decay=0.0",
    "training.SGD": "momentum=0.0, nesterov=False, weight_decay=0.0",
    "training.StepSchedule": "gamma=0.1",
    "training.TextWindows": "shuffle=True",
    "training.Windows": "horizon=1, shuffle=True",
    "training.fit": "metrics=(), callbacks=(), progress=True, keep=3, resume=False, seed=0",
    "losses.huber": "delta=1.0",
    "losses.softmax_cross_entropy": "label_smoothing=0.0",
    "init.he_normal": "gain=1.4142135623730951",
    "init.he_uniform": "gain=1.4142135623730951",
    "init.initialise": "weights='default'",
    "init.orthogonal": "gain=1.0",
    "init.xavier_normal": "gain=1.0",
    "init.xavier_uniform": "gain=1.0",
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name: str) -> None:
    thing = functools.reduce(getattr, name.split("."), fs)
    parameters = inspect.signature(thing).parameters.values()
    said = [
        one for one in parameters if one.default is not one.empty and one.default is not None and one.name != "dtype"
    ]
    assert ", ".join(f"{one.name}={one.default!r}" for one in said) == DEFAULTS[name]
