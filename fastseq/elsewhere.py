"""What other libraries call things, and what they are called here: one table, for every message that refuses a name.

Nothing here makes a foreign name work. A call with one fails as any call with an unknown argument does, and only then
the message is made: calls that succeed are not looked at.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Here(NamedTuple):
    """What stands here for an argument of another library."""

    names: str = ""  # of ours, with spaces between; that one is meant which the function has
    note: str = ""  # what else there is to know
    otherwise: str = ""  # what there is instead where a function has none of these arguments


_SIZE = Here("input_size in_features", "the size of one step alone")
_INPUTS = "hidden_size out_features d_model"
_WIDTH = "d_model embed_dim embedding_dim hidden_size"
_HEADS = "num_heads nhead"
_LAYERS = "num_layers num_encoder_layers"
_LENGTHS = "the number of real steps of each row, instead of a mask of the padding"
_MASK = Here("mask", "in which True is what a query may attend to")
_RATE = Here("dropout p")
_STATE = Here("state")
_TRAINING = Here(otherwise="a call is inference, and forward is training")
_SHUFFLED = Here(otherwise="every epoch has an order of its own; training.PaddedBatches(..., shuffle=False) has one")
_NEW = Here("max_new horizon")
_RESULTS = Here("num_results")
_STOP = Here("stop")

ARGUMENTS: dict[str, Here] = {
    # Sizes and settings of layers and models.
    "units": Here("hidden_size out_features"),
    "hidden_dim": Here("hidden_size dim_feedforward"),
    "hidden_units": Here("hidden_size"),
    "n_hidden": Here("hidden_size"),
    "hidden": Here("hidden_size"),
    "hidden_size": Here(_WIDTH),
    "input_dim": Here("input_size in_features num_embeddings vocab_size"),
    "input_shape": _SIZE,
    "batch_input_shape": _SIZE,
    "n_features": _SIZE,
    "num_features": Here("input_size in_features normalized_shape"),
    "in_dim": Here("in_features input_size"),
    "input_features": Here("in_features input_size"),
    "output_dim": Here("out_features embedding_dim"),
    "output_size": Here("out_features"),
    "out_dim": Here("out_features"),
    "output_features": Here("out_features"),
    "num_classes": Here("num_labels out_features"),
    "embedding_dim": Here("embedding_dim d_model embed_dim"),
    "embed_dim": Here(_WIDTH),
    "embed_size": Here(_WIDTH),
    "embedding_size": Here(_WIDTH),
    "emb_dim": Here(_WIDTH),
    "d_model": Here(_WIDTH),
    "dim": Here(_WIDTH),
    "n_embd": Here(_WIDTH),
    "model_dim": Here(_WIDTH),
    "intermediate_size": Here("dim_feedforward"),
    "ffn_dim": Here("dim_feedforward"),
    "d_ff": Here("dim_feedforward"),
    "nhid": Here("dim_feedforward hidden_size"),
    "vocab": Here("vocab_size num_embeddings"),
    "n_vocab": Here("vocab_size num_embeddings"),
    "n_tokens": Here("vocab_size num_embeddings"),
    "ntoken": Here("vocab_size num_embeddings"),
    "num_tokens": Here("vocab_size num_embeddings"),
    "num_symbols": Here("vocab_size num_embeddings"),
    "vocab_size": Here("vocab_size num_embeddings"),
    "nlayers": Here(_LAYERS),
    "n_layers": Here(_LAYERS),
    "n_layer": Here(_LAYERS),
    "num_hidden_layers": Here(_LAYERS),
    "layers": Here(_LAYERS),
    "depth": Here(_LAYERS),
    "encoder_layer": Here(otherwise="the whole takes its settings: TransformerEncoder(6, d_model, nhead)"),
    "decoder_layer": Here(otherwise="the whole takes its settings: TransformerDecoder(6, d_model, nhead)"),
    "n_head": Here(_HEADS),
    "n_heads": Here(_HEADS),
    "nhead": Here(_HEADS),
    "nheads": Here(_HEADS),
    "heads": Here(_HEADS),
    "num_heads": Here(_HEADS),
    "num_attention_heads": Here(_HEADS),
    "key_dim": Here(otherwise="a head has the size embed_dim / num_heads"),
    "use_bias": Here("bias"),
    "dropout_p": _RATE,
    "dropout_rate": _RATE,
    "drop_prob": _RATE,
    "rate": _RATE,
    "recurrent_dropout": Here("dropout", "between the layers"),
    "activation": Here("nonlinearity", otherwise="an activation is a layer, fastseq.ReLU() for example"),
    "dropout": Here("p", otherwise="dropout is a layer, fastseq.Dropout(p)"),
    "epsilon": Here("eps layer_norm_eps"),
    "mask_zero": Here("padding_idx lengths", "and lengths= in a call says where rows end"),
    "max_len": Here("max_length context max_new"),
    "max_seq_len": Here("max_length context"),
    "block_size": Here("context"),
    "context_length": Here("context"),
    "n_positions": Here("max_length context"),
    "rnn_type": Here("cell"),
    "cell_type": Here("cell"),
    "random_state": Here("seed"),
    "random_seed": Here("seed"),
    "generator": Here("seed"),
    # What there is no argument for.
    "batch_first": Here(otherwise="the batch is always axis 0"),
    "time_major": Here(otherwise="the batch is always axis 0, and time axis 1"),
    "return_sequences": Here(otherwise="every step has an output; for the last one put fastseq.LastStep() after it"),
    "return_state": Here(otherwise="a recurrent layer always returns its state, y, state = layer(x)"),
    "stateful": Here(otherwise="a state is a value: y, state = layer(x, state)"),
    "unroll": Here(otherwise="a layer runs over any number of steps"),
    "device": Here(otherwise="everything runs on the CPU"),
    "merge_mode": Here(otherwise="outputs of both directions stand side by side, in the last axis"),
    "kernel_initializer": Here(otherwise="fastseq.init.initialise(layer, ...) gives it other parameters to start from"),
    "kernel_regularizer": Here(otherwise="weight_decay= of fastseq.training.AdamW keeps weights small"),
    "weights": Here(otherwise="layer.load_state_dict(weights) gives it its parameters"),
    "enable_nested_tensor": Here(otherwise="padding costs nothing where lengths are given"),
    "scale_grad_by_freq": Here(otherwise="gradients of an embedding are not scaled"),
    # Calls.
    "hx": _STATE,
    "h0": _STATE,
    "h_0": _STATE,
    "initial_state": _STATE,
    "hidden_state": _STATE,
    "past_key_values": _STATE,
    "training": _TRAINING,
    "train": _TRAINING,
    "mask": Here("mask lengths", "the number of real steps of each row where it is about padding"),
    "attention_mask": Here("lengths", _LENGTHS),
    "padding_mask": Here("lengths", _LENGTHS),
    "key_padding_mask": Here("lengths", _LENGTHS),
    "src_key_padding_mask": Here("src_lengths lengths", _LENGTHS),
    "tgt_key_padding_mask": Here("tgt_lengths lengths", _LENGTHS),
    "memory_key_padding_mask": Here("memory_lengths", _LENGTHS),
    "sequence_length": Here("lengths"),
    "seq_lengths": Here("lengths"),
    "seq_len": Here("lengths"),
    "attn_mask": _MASK,
    "src_mask": _MASK,
    "tgt_mask": _MASK,
    "is_causal": Here("causal"),
    "src_is_causal": Here("causal"),
    "tgt_is_causal": Here("causal"),
    "use_causal_mask": Here("causal"),
    "need_weights": Here("return_weights"),
    "average_attn_weights": Here("return_weights", "of every head"),
    "output_attentions": Here("return_weights"),
    "return_attention_scores": Here("return_weights"),
    "enable_gqa": Here(otherwise="fewer heads in k and v need no switch"),
    "token_type_ids": Here("type_ids"),
    "input_ids": Here("prompt ids x source"),
    "inputs": Here("prompt x ids source"),
    "input": Here("prompt x ids source"),
    # Generating.
    "max_new_tokens": _NEW,
    "max_tokens": _NEW,
    "max_length": Here("max_length context max_new", "which does not count the prompt"),
    "num_tokens_to_generate": _NEW,
    "steps": _NEW,
    "n_steps": _NEW,
    "do_sample": Here(otherwise="symbols are drawn, and with temperature=0 the likeliest is taken"),
    "greedy": Here("temperature", "0 takes the likeliest"),
    "num_return_sequences": _RESULTS,
    "num_samples": _RESULTS,
    "beam_size": Here("num_beams"),
    "beam_width": Here("num_beams"),
    "eos_token_id": _STOP,
    "eos": _STOP,
    "stop_token": _STOP,
    "stopping_criteria": _STOP,
    "pad_token_id": Here(otherwise="prompts are lists of any lengths, and results without padding"),
    "streamer": Here(otherwise="model.stream(prompt, max_new) gives symbol after symbol"),
    # `fit`.
    "learning_rate": Here("lr"),
    "eta": Here("lr"),
    "n_epochs": Here("epochs"),
    "num_epochs": Here("epochs"),
    "max_epochs": Here("epochs"),
    "nb_epoch": Here("epochs"),
    "num_train_epochs": Here("epochs"),
    "max_iter": Here("steps"),
    "max_steps": Here("steps"),
    "n_iter": Here("steps"),
    "iterations": Here("steps"),
    "validation_data": Here("validation"),
    "val_data": Here("validation"),
    "eval_set": Here("validation"),
    "valid": Here("validation"),
    "val_split": Here("validation_split"),
    "validation_fraction": Here("validation_split"),
    "validation_freq": Here("validate_every"),
    "verbose": Here("progress"),
    "verbosity": Here("progress"),
    "early_stopping": Here("patience"),
    "early_stopping_rounds": Here("patience"),
    "n_iter_no_change": Here("patience"),
    "minibatch": Here("batch_size"),
    "bs": Here("batch_size"),
    "criterion": Here("loss"),
    "loss_fn": Here("loss"),
    "objective": Here("loss"),
    "scheduler": Here("schedule"),
    "lr_scheduler": Here("schedule"),
    "max_norm": Here("clip_norm"),
    "max_grad_norm": Here("clip_norm"),
    "grad_clip": Here("clip_norm"),
    "gradient_clip_val": Here("clip_norm"),
    "bptt": Here("truncate"),
    "checkpoint_dir": Here("checkpoint"),
    "output_dir": Here("checkpoint"),
    "save_every": Here("checkpoint_every"),
    "resume_from": Here("resume"),
    "initial_epoch": Here("resume"),
    "shuffle": _SHUFFLED,
    "y": Here(otherwise="data and targets are one argument, a tuple (x, y)"),
    "class_weight": Here(otherwise="a loss of your own can weigh: loss(outputs, targets) -> (mean, gradient)"),
    "sample_weight": Here(otherwise="a loss of your own can weigh: loss(outputs, targets) -> (mean, gradient)"),
}

# Short names that say exactly what ours do; where a library has no settings that change the meaning.
LOSSES = {"mse": "mean_squared_error", "ce": "cross_entropy"}
METRICS = {"acc": "accuracy", "mse": "mean_squared_error", "mae": "mean_absolute_error"}

_LOGITS = "'binary_cross_entropy' is nearest, whose outputs are logits: leave out the last sigmoid"
_CLASSES = "'cross_entropy' is nearest, whose outputs are logits: leave out the last softmax"
_ABSOLUTE = "'huber' is nearest: it is the absolute error, less 1/2, where that is more than 1"
# Names of losses that are near ours, and mean something else.
OTHER_LOSSES = {
    "bce": _LOGITS,
    "binary_crossentropy": "'binary_cross_entropy' may be meant, whose outputs are logits: leave out the last sigmoid",
    "bce_with_logits": "'binary_cross_entropy' is meant, whose outputs are logits",
    "nll": _CLASSES,
    "nll_loss": _CLASSES,
    "sparse_categorical_crossentropy": _CLASSES,
    "categorical_crossentropy": f"{_CLASSES}; its targets are classes, labels.argmax(-1) of one-hot labels",
    "mae": _ABSOLUTE,
    "l1": _ABSOLUTE,
    "l1_loss": _ABSOLUTE,
    "mean_absolute_error": _ABSOLUTE,
    "smooth_l1": "'huber' is meant",
    "smooth_l1_loss": "'huber' is meant",
}


def refuse(function: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raise for arguments that a function does not have, each with what there is instead.

    Parameters
    ----------
    function : str
        What the function is called, ``"fit"`` for example.
    unknown : iterable of str
        Names of the arguments that were left over; nothing happens where there are none.
    known : iterable of str
        Names of the arguments that there are.

    Raises
    ------
    TypeError
        Naming every unknown argument.
    """
    names, faults, listed = list(known), [], False
    for name in unknown:
        plain = name.lower().replace("_", "")
        same = [other for other in names if other.replace("_", "") == plain]
        there = ARGUMENTS.get(name.lower(), Here())
        ours = [other for other in there.names.split() if other in names]
        near = difflib.get_close_matches(name.lower(), names, 1)
        if same and not ours:
            faults.append(f"{name}: here it is {same[0]}")
        elif ours:
            faults.append(f"{name}: here it is {ours[0]}{', ' if there.note else ''}{there.note}")
        elif there.otherwise:
            faults.append(f"{name}: {there.otherwise}")
        elif near:
            faults.append(f"{name}: did you mean {near[0]}?")
        else:
            faults.append(name)
            listed = True
    if faults:
        more = f"; its arguments are {', '.join(names)}" if names else "; it takes none"
        raise TypeError(f"{function} has no argument {'; and no '.join(faults)}{more if listed else ''}") from None


def refuse_unknown(name: str, function: Callable[..., Any], given: Iterable[str]) -> None:
    """Raise what `refuse` does for names that a function does not take; nothing if it takes all of them."""
    takes = inspect.signature(function).parameters
    if not any(one.kind is one.VAR_KEYWORD for one in takes.values()):
        names = [one.name for one in takes.values() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        names = [one for one in names if one != "self"]
        refuse(name, [one for one in given if one not in names], names)


def hiding_unknown(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that takes unknown arguments only to refuse them: they are no part of its signature.

    For calls of a few microseconds: `naming` adds a call, and this adds none.
    """
    return _hiding(function, lambda one: one.kind is one.VAR_KEYWORD)


def hiding_private(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function with arguments that only this package passes, ``_name``; its signature has none."""
    return _hiding(function, lambda one: one.name.startswith("_"))


def _hiding(function: Callable[P, R], hidden: Callable[[inspect.Parameter], bool]) -> Callable[P, R]:
    signature = inspect.signature(function)
    takes = [one for one in signature.parameters.values() if not hidden(one)]
    function.__signature__ = signature.replace(parameters=takes)  # type: ignore[attr-defined]
    return function


def naming(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that an argument which it does not have is refused by `refuse`."""
    name = function.__name__

    @functools.wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError:
            if kwargs:
                called = f"a call of {type(args[0]).__name__}" if name == "__call__" else name
                refuse_unknown(called, function, kwargs)
            raise

    return named
