"""Files: layers, models and states as safetensors, with the class and its configuration in the metadata.

Every file has a checksum over all of its bytes in its metadata. One that an older version wrote without is read, too.

The file of a twin (`Layer.with_weights`) says its type of weights. Of bfloat16 it has BF16 arrays, of int8 I8 arrays
and for each the scales of its rows, float32, named as the array with ".scale" behind.

What only files need is imported when one is read or written: importing fastseq costs little more than NumPy.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fastseq import checks
from fastseq.checks import Array
from fastseq.formats import safetensors
from fastseq.formats.source import FormatError
from fastseq.narrow import TYPES, NarrowArray

_FORMAT = "1"
CHECKSUM = "fastseq.crc32"  # of the file with zeros in the place of this
_NO_CHECKSUM = "00000000"
_CHUNK = 1 << 20
_LAYERS = (
    "RNN",
    "LSTM",
    "GRU",
    "Linear",
    "Conv1d",
    "Embedding",
    "LayerNorm",
    "RMSNorm",
    "ReLU",
    "GELU",
    "SiLU",
    "Tanh",
    "Sigmoid",
    "Softmax",
    "LastStep",
    "MeanOverTime",
    "MaxOverTime",
    "LastOfDirections",
    "MergeDirections",
    "Reverse",
    "MaxPool1d",
    "AvgPool1d",
    "Dropout",
    "SinusoidalPositions",
    "LearnedPositions",
    "RotaryPositions",
    "MultiheadAttention",
    "MultiplicativeAttention",
    "AdditiveAttention",
    "TransformerEncoderLayer",
    "TransformerEncoder",
    "TransformerDecoderLayer",
    "TransformerDecoder",
    "Transformer",
    "Add",
    "Multiply",
    "Concatenate",
    "Slice",
    "Sequential",
    "ZeroPadded",
    "Graph",
)
_STATES = ("State", "LSTMState", "AttentionState", "Seq2SeqState", "ConvState")
_MODELS = (
    "MarkovChain",
    "AutoRegressive",
    "RecurrentLM",
    "RecurrentForecaster",
    "TransformerLM",
    "TransformerEncoderModel",
    "TransformerSeq2Seq",
    "Seq2Seq",
)
_OPERATORS = (
    "Apply",
    "ArgReduce",
    "Cast",
    "ConcatAxis",
    "Constant",
    "Expand",
    "Flatten",
    "Gather",
    "MatMul",
    "Reduce",
    "Reshape",
    "Shape",
    "SliceAxes",
    "SoftmaxAxis",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
_CLASSES = _LAYERS + _STATES + _MODELS + _OPERATORS
# Containers, and where their configuration has their layers.
_PARTS = {"Sequential": "layers", "ZeroPadded": "layers", "Graph": "nodes"}
_registered: dict[str, Any] = {}  # classes of layers that are not ours, by name
_DTYPES = {"F16": "float16", "F32": "float32", "F64": "float64", "I64": "int64"}
_NARROW_DTYPES = {"bfloat16": "BF16", "int8": "I8"}
_SCALE = ".scale"
_WEIGHTS = "fastseq.weights"


def save(
    path: str | os.PathLike[str],
    class_name: str,
    config: Mapping[str, Any],
    arrays: Mapping[str, Any],
    own: Collection[str] = (),
    weights: str = "float32",
) -> None:
    """Write arrays and what they belong to, whole or not at all; `own` are names of classes that are not ours.

    `weights` is the type of those arrays that are narrow.
    """
    import json

    target = checks.path("path", path)
    arrays, narrow = _plain(arrays)
    for unknown in _classes(class_name, config) - {*_CLASSES, *own}:
        raise TypeError(
            f"a file can hold {', '.join(_CLASSES)}, not a {unknown}, unless it is given to fastseq.register"
        )
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES.values() and name not in narrow:
            raise TypeError(f"a file can hold {', '.join(_DTYPES.values())}, but {name} is {array.dtype}")
        if name == "__metadata__":
            raise ValueError("a file can hold arrays of any name except '__metadata__'")
    metadata = {"fastseq.format": _FORMAT, "fastseq.class": class_name, "fastseq.config": json.dumps(config)}
    if weights != "float32":
        metadata[_WEIGHTS] = weights
    write_whole(target, to_bytes(arrays, metadata, narrow if weights == "bfloat16" else ()))


def _plain(arrays: Mapping[str, Any]) -> tuple[dict[str, Array], set[str]]:
    """What a file has in the place of narrow arrays, and their names."""
    plain, narrow = {}, set()
    for name, array in arrays.items():
        if not isinstance(array, NarrowArray):
            plain[name] = array
            continue
        narrow.add(name)
        plain[name] = array.values
        if array.scales is not None:
            plain[name + _SCALE] = array.scales
    return plain, narrow


def _narrow(arrays: dict[str, Array], weights: str) -> dict[str, Any]:
    """`_plain`, undone; a fault is a ValueError."""
    made: dict[str, Any] = dict(arrays)
    for name, array in arrays.items():
        if array.dtype.name not in ("uint16", "int8"):
            continue
        scales = made.pop(name + _SCALE, None) if weights == "int8" else None
        if array.ndim < 2 or (weights == "int8") != (array.dtype == np.int8):
            raise ValueError(f"{name} is no matrix of {weights}")
        if weights == "int8" and (scales is None or scales.shape != array.shape[:1] or scales.dtype != np.float32):
            raise ValueError(f"{name}{_SCALE} should be {len(array)} scales of float32, one for each row")
        made[name] = NarrowArray(weights, array, scales)
    return made


def _classes(class_name: str, config: Mapping[str, Any]) -> set[str]:
    """A class, and those of the layers that a container of this configuration is made of."""
    children = config[_PARTS[class_name]] if class_name in _PARTS else ()
    return {class_name}.union(*(_classes(child["class"], child["config"]) for child in children))


def own_class(cls: type[Any], declares: bool) -> str | None:
    """The name by which `load` finds a class that is not ours, which may be saved; None of one of ours.

    A class says itself what makes a layer of it, where it `declares` that; any other is to be registered.
    """
    name = cls.__name__
    if cls.__module__.partition(".")[0] == "fastseq":
        return None
    if name in _CLASSES:
        raise TypeError(f"a file can hold a class of your own under a name of its own, not as {name}, one of fastseq")
    return name if declares or _registered.get(name) is cls else None


def register(cls: Any) -> Any:
    """Let `load` find a class of layers of your own by its name.

    Parameters
    ----------
    cls : class
        A subclass of `fastseq.Layer`. One of the same name that was registered before is replaced.

    Returns
    -------
    cls
        As it was given, so that this can be used as a decorator.
    """
    _own_classes("cls", [cls])
    _registered[cls.__name__] = cls
    return cls


def _own_classes(name: str, classes: Any) -> dict[str, Any]:
    """Classes by their names, looked at."""
    import fastseq

    if not isinstance(classes, list | tuple):
        raise TypeError(f"{name} should be a list of classes of layers, not {checks.describe(classes)}")
    for cls in classes:
        if not isinstance(cls, type) or not issubclass(cls, fastseq.Layer):
            raise TypeError(f"{name} should hold subclasses of fastseq.Layer, not {checks.describe(cls)}")
        if cls.__name__ in _CLASSES:
            raise ValueError(
                f"{name} should hold classes with names of their own, but {cls.__name__} is one of fastseq"
            )
    return {cls.__name__: cls for cls in classes}


def to_bytes(arrays: Mapping[str, Array], metadata: Mapping[str, str], bfloat16: Collection[str] = ()) -> bytearray:
    """A safetensors file, with its checksum; those arrays of uint16 that are said to be are bits of bfloat16."""
    from safetensors.numpy import save as to_safetensors

    plain = {n: np.asarray(array, array.dtype.newbyteorder("="), order="C") for n, array in arrays.items()}
    data = bytearray(to_safetensors(plain, {**metadata, CHECKSUM: _NO_CHECKSUM}))
    if bfloat16:
        header, _ = _header(data)
        for name in bfloat16:
            header[name]["dtype"] = "BF16"  # a dtype that NumPy has not; they were written as U16
        _replace_header(data, header)
    _seal(data)
    return data


def metadata_of_others(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a file has in its metadata that fastseq did not write: the names of symbols, say."""
    metadata = safetensors.File(path).metadata
    return {name: text for name, text in metadata.items() if not name.startswith("fastseq.")}


def with_metadata(data: bytes, more: Mapping[str, str]) -> bytearray:
    """A file that `save` wrote, with more in its metadata."""
    changed = bytearray(data)
    header, _ = _header(changed)
    header["__metadata__"] |= {**more, CHECKSUM: _NO_CHECKSUM}
    _replace_header(changed, header)
    _seal(changed)
    return changed


def _seal(data: bytearray) -> None:
    """Write the checksum of a file in the place of the zeros it was computed with."""
    place = _place_of_checksum(bytes(data[8 : 8 + int.from_bytes(data[:8], "little")]))
    data[place : place + 8] = f"{zlib.crc32(data):08x}".encode()


def _header(data: bytes | bytearray) -> tuple[dict[str, Any], int]:
    """What the beginning of a safetensors file says, and where its arrays begin."""
    import json

    end = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(bytes(data[8:end]))
    return header, end


def _replace_header(data: bytearray, header: Mapping[str, Any]) -> None:
    """Put another header before the arrays of a file."""
    import json

    _, end = _header(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data[:end] = len(text).to_bytes(8, "little") + text


def _place_of_checksum(header: bytes) -> int:
    """Where in a file with this header the digits of the checksum are; 0: nowhere."""
    key = f'"{CHECKSUM}":"'.encode()  # nothing that the header quotes can look like this
    found = header.find(key)
    return 0 if found < 0 else 8 + found + len(key)


def check_whole(path: str) -> None:
    """Raise a `ValueError` where a file has a checksum, and not the one of its bytes."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(safetensors.HEADER_LIMIT, os.fstat(file.fileno()).st_size):
            return  # no safetensors file
        header = file.read(size)
        place = _place_of_checksum(header)
        if not place:
            return
        file.seek(0)
        start = bytearray(file.read(place + 8))
        written = bytes(start[place:])
        start[place:] = _NO_CHECKSUM.encode()
        value = zlib.crc32(start)
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    if f"{value:08x}".encode() != written:
        raise ValueError(f"path: {path!r} is damaged: its content does not have the checksum it was written with")


def check_names(path: str, metadata: Mapping[str, str], known: set[str]) -> None:
    """Raise a `ValueError` where the metadata has names like ours that are not: what the checksum's has become, say."""
    for name in metadata.keys() - known - {CHECKSUM}:
        if name.startswith("fastseq") or name.endswith("crc32"):  # one byte cannot change both
            raise ValueError(f"path: {path!r} is damaged, or of a newer version of fastseq: its metadata has {name!r}")


def write_whole(path: str | os.PathLike[str], data: bytes | bytearray) -> None:
    """Write a file, whole or not at all: beside `path` under another name, flushed to the disk and renamed."""
    target = Path(path).resolve()  # through links, which stay
    temporary = target.parent / f".fastseq-{os.urandom(8).hex()}.part"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str], *, classes: Any = (), weights: str | None = None) -> Any:
    """Read a layer, a model or a state that its `save` wrote.

    Parameters
    ----------
    path : path
        A file written by ``layer.save``, ``model.save`` or ``state.save``.
    classes : list of classes, optional
        Classes of layers of your own that the file may hold, besides those given to `register`.
    weights : {"float32", "bfloat16", "int8"}, optional
        Type of the weights of products, as of `Layer.with_weights`; as they are in the file by default.

    Returns
    -------
    layer, model or state
        Of the class and the configuration that were saved.

    Raises
    ------
    ValueError
        The file is damaged, or holds something that fastseq did not write.
    OSError
        The file cannot be read.
    """
    import fastseq

    return load_into(path, fastseq, classes, weights)


def load_into(
    path: str | os.PathLike[str], namespace: ModuleType, classes: Any = (), weights: str | None = None
) -> Any:
    """`load`, with the classes of `namespace`."""
    import json

    import fastseq

    name = checks.path("path", path)
    if weights is not None and weights not in TYPES:
        raise ValueError(f"weights should be {', '.join(map(repr, TYPES))} or None, not {weights!r}")
    own = {**_registered, **_own_classes("classes", classes)}
    check_whole(name)  # a file that is missing or not ours to read raises Python's own error
    try:
        file = safetensors.File(name)
        class_name = _class_name(name, file.metadata, own)
        stored = file.metadata.get(_WEIGHTS, "float32")
        narrow = [_NARROW_DTYPES[stored]] if stored in _NARROW_DTYPES else []
        arrays = arrays_of(file, name, [*_DTYPES, *narrow])
    except FormatError as error:
        raise ValueError(
            f"path: {name!r} is not a whole safetensors file: {error.place}: {error.what}{_foreign(name)}"
        ) from None
    try:
        if class_name in _STATES:
            if weights is not None:
                raise ValueError(f"it holds a {class_name}, which has no weights")
            return getattr(namespace, class_name)(**arrays)
        layer = _made(class_name, json.loads(file.metadata["fastseq.config"]), namespace, own)
        if stored == "float32":
            layer.load_state_dict(arrays)
        else:
            fastseq.layers.inside.become_twin(layer, _narrow(arrays, stored), stored)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"path: {name!r} is damaged: {error}") from None
    if weights is None or weights == stored:
        return layer
    if stored != "float32":
        raise ValueError(f"weights should be {stored!r}, as {name!r} has them, or None, not {weights!r}")
    return layer.with_weights(weights)


def arrays_of(file: safetensors.File, name: str, dtypes: Collection[str]) -> dict[str, Array]:
    """All arrays of a file, which may be of some dtypes, in the names of safetensors, those of bfloat16 as bits."""
    for key, entry in file.entries.items():
        if entry.dtype not in dtypes:
            raise ValueError(f"path: {name!r} is damaged: {key} is {entry.dtype}")
    return {key: file.stored(key) for key in file.entries}


_OF_TORCH = (
    "fastseq.convert.pytorch.layer(fastseq.formats.read(path).arrays) makes a layer of a state dict; or make the layer,"
    " then layer.load_state_dict(torch.load(path, weights_only=True))"
)
_OF_KERAS = (
    "fastseq.convert.keras.model(fastseq.formats.read(path)) makes layers of Keras' files; or give"
    " layer.load_state_dict arrays by the names of its parameters"
)
_FOREIGN = {
    ".pt": _OF_TORCH,
    ".pth": _OF_TORCH,
    ".bin": _OF_TORCH,
    ".ckpt": _OF_TORCH,
    ".onnx": "fastseq.formats.read(path).arrays is what an ONNX file holds: give layer.load_state_dict its"
    " initializers by the names of its parameters",
    ".h5": _OF_KERAS,
    ".keras": _OF_KERAS,
    ".npz": "make the layer, then layer.load_state_dict(numpy.load(path))",
}


def _foreign(path: str) -> str:
    """What to do with a file of another library, told by how its name ends."""
    hint = _FOREIGN.get(os.path.splitext(path)[1].lower())
    return "" if hint is None else f"; {hint}"


def _made(class_name: str, config: Mapping[str, Any], namespace: ModuleType, own: Mapping[str, Any]) -> Any:
    """A layer from its configuration; one made of layers has theirs in it."""
    if class_name in own:
        return own[class_name](**config)
    if class_name not in _LAYERS + _MODELS + _OPERATORS:
        raise ValueError(_unknown(class_name))
    home = {**dict.fromkeys(_MODELS, "models"), **dict.fromkeys(_OPERATORS, "operators")}.get(class_name)
    made = getattr(namespace if home is None else getattr(namespace, home), class_name)
    if class_name not in _PARTS:
        return made(**config)
    parts = config[_PARTS[class_name]]
    layers = [_made(child["class"], child["config"], namespace, own) for child in parts]
    if class_name != "Graph":
        return made(*layers)
    nodes = [(part["name"], (layer, *part["inputs"])) for part, layer in zip(parts, layers, strict=True)]
    return made(config["inputs"], nodes, config["outputs"], without_time=config["without_time"])


def _unknown(class_name: Any) -> str:
    return (
        f"it holds a {class_name!r}, which this version does not know; if it is a class of your own, give it as"
        " classes=[...], or to fastseq.register before"
    )


def _class_name(path: str, metadata: Mapping[str, str], own: Mapping[str, Any]) -> str:
    """The class that a file says it holds."""
    name = metadata.get("fastseq.class")
    if "fastseq.checkpoint" in metadata:
        raise ValueError(
            f"path: {path!r} is a checkpoint of a training: read it with fastseq.training.load_checkpoint, and give"
            " its ['model'] to load_state_dict"
        )
    if name is None:
        raise ValueError(
            f"path: {path!r} is a safetensors file that fastseq did not write;"
            " read its arrays with safetensors and give them to load_state_dict"
        )
    if metadata.get("fastseq.format") != _FORMAT:
        raise ValueError(f"path: {path!r} was written by another version of fastseq")
    check_names(path, metadata, {"fastseq.format", "fastseq.class", "fastseq.config", _WEIGHTS})
    if metadata.get(_WEIGHTS, "float32") not in TYPES:
        raise ValueError(f"path: {path!r} has weights of a type that this version does not know")
    if name not in _CLASSES and name not in own:
        raise ValueError(f"path: {path!r} cannot be read: {_unknown(name)}")
    return name
