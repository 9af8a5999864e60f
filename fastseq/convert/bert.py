"""BERT of the package transformers: names of its parameters, settings of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array

_BERT_EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "word.weight",
    "embeddings.position_embeddings.weight": "position.weight",
    "embeddings.token_type_embeddings.weight": "type.weight",
    "embeddings.LayerNorm.weight": "norm.weight",
    "embeddings.LayerNorm.bias": "norm.bias",
    "pooler.dense.weight": "pooler.weight",
    "pooler.dense.bias": "pooler.bias",
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
}
_BERT_LAYER = {
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "norm2",
}
# What this arrangement has no use for: the heads of the pretraining, and numbers that are no weights.
_BERT_UNUSED = ("cls.", "embeddings.position_ids", "embeddings.token_type_ids")
# Settings of `TransformerEncoderModel` and their names in config.json.
_NEEDED = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "nhead": "num_attention_heads",
    "num_layers": "num_hidden_layers",
}
_OPTIONAL = {
    "dim_feedforward": "intermediate_size",
    "max_length": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "dropout": "hidden_dropout_prob",
    "layer_norm_eps": "layer_norm_eps",
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def settings_and_arrays(
    config: Any, weights: Any, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return the settings and parameters of the `TransformerEncoderModel` that a BERT is.

    Parameters
    ----------
    config, weights
        As of `TransformerEncoderModel.from_bert`.
    settings : mapping from str
        Of the model; they come before what `config` says.
    """
    if not isinstance(config, Mapping) and hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(
            "config should be a mapping, what config.json holds, or a BertConfig of transformers,"
            f" not {checks.describe(config)}"
        )
    if not isinstance(weights, Mapping) and hasattr(weights, "state_dict"):
        weights = weights.state_dict()
    made = _settings_of(checks.mapping("config", config))
    arrays = bert_state_dict(weights, pooler=True)
    return {**made, **_with_head(arrays, settings)}, arrays


def _settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the model that a config.json describes."""
    missing = [name for name in _NEEDED.values() if name not in given]
    if missing:
        raise ValueError(f"config should have {', '.join(missing)}, too")
    if given.get("model_type", "bert") != "bert":
        raise ValueError(f"config should have model_type='bert', not {given['model_type']!r}")
    made = {own: given[name] for own, name in (_NEEDED | _OPTIONAL).items() if name in given}
    kind = given.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(f"config should have position_embedding_type='absolute', not {kind!r}")
    for name in ("is_decoder", "add_cross_attention"):
        if given.get(name):
            raise ValueError(f"config should have {name}=False, not {given[name]!r}")
    activation = checks.choice("hidden_act of config", given.get("hidden_act", "gelu"), tuple(_ACTIVATIONS))
    return {**made, "activation": _ACTIVATIONS[activation]}


def _with_head(arrays: Mapping[str, Array], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model whose head is the one that weights hold; refused where it would be left out."""
    made = dict(settings)
    if "head.weight" not in arrays:
        return made
    if made.get("num_labels") is None:
        raise ValueError(
            f"num_labels should be {len(arrays['head.weight'])} where weights hold that many labels in classifier.*;"
            " or leave classifier.* out of them"
        )
    of_sequences = "pooler.weight" in arrays
    if of_sequences and "pooling" not in made:
        made |= {"pooling": "cls", "pooler": True, **settings}
    made.setdefault("pooling", None)
    if made["pooling"] is not None and not (of_sequences and made.get("pooler")):
        raise ValueError(
            "pooling should be None, or 'cls' with pooler=True, where weights hold classifier.*, which is a head over"
            f" tokens or over BERT's pooler, not {made['pooling']!r}; or leave classifier.* out of weights for a head"
            " that starts anew"
        )
    return made


def bert_state_dict(mapping: Mapping[str, Any], *, pooler: bool = False) -> dict[str, Array]:
    """The state dict of a BERT of the package transformers under the names of `TransformerEncoderModel`.

    Parameters
    ----------
    mapping : mapping from str to array
        Names like ``encoder.layer.0.attention.self.query.weight``, with ``bert.`` in front of them or not. The
        heads of the pretraining are left out.
    pooler : bool
        Whether to keep the pooler, for a model that has one.

    Returns
    -------
    dict from str to ndarray

    Raises
    ------
    ValueError
        Naming what is unknown or missing.
    """
    given = {name.removeprefix("bert."): value for name, value in checks.mapping("mapping", mapping).items()}
    unused = _BERT_UNUSED if checks.flag("pooler", pooler) else (*_BERT_UNUSED, "pooler.")
    given = {name: value for name, value in given.items() if not name.startswith(unused)}
    result: dict[str, Array] = {}
    parts: dict[str, dict[str, Array]] = {}  # of what is one matrix here: queries, keys and values
    unknown = []
    for name, value in given.items():
        array = checks.as_array(name, value)
        head, _, rest = name.removeprefix("encoder.layer.").partition(".")
        stem, _, kind = rest.rpartition(".")
        if name in _BERT_EMBEDDINGS:
            result[_BERT_EMBEDDINGS[name]] = array
        elif not (name.startswith("encoder.layer.") and head.isdecimal() and kind in ("weight", "bias")):
            unknown.append(name)
        elif stem in _BERT_LAYER:
            result[f"encoder.layers.{head}.{_BERT_LAYER[stem]}.{kind}"] = array
        elif stem in ("attention.self.query", "attention.self.key", "attention.self.value"):
            whole = f"encoder.layers.{head}.self_attn.in_proj_{kind}"
            parts.setdefault(whole, {})[stem.rpartition(".")[2]] = array
        else:
            unknown.append(name)
    faults = [f"{name} is unknown" for name in unknown]
    for whole, three in parts.items():
        faults += [f"{part} is missing for {whole}" for part in ("query", "key", "value") if part not in three]
    if faults:
        raise ValueError(f"mapping is no state dict of BERT: {'; '.join(faults)}")
    for whole, three in parts.items():
        result[whole] = np.concatenate([three["query"], three["key"], three["value"]])
    return result
