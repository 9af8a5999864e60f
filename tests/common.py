"""What the tests share: layers with weights that mean something, inputs, and the two comparisons.

Everything random is distinct and nonzero, so that no exchange of two arrays, gates or rows goes unseen.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import fastseq as fs

Array = npt.NDArray[Any]
ROOT = Path(__file__).resolve().parent.parent

# Every kind of recurrent layer: its class, and what makes it that kind.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "rnn_sigmoid": ("RNN", {"nonlinearity": "sigmoid"}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": None}),
    "lstm_ln": ("LSTM", {"layer_norm": True}),
    "gru_after": ("GRU", {"reset_after": True}),
    "gru_before": ("GRU", {"reset_after": False}),
}
# Those that other libraries have no layer for.
NOT_IN_PYTORCH = ("rnn_sigmoid", "lstm_ln", "gru_before")
NOT_IN_ONNX = ("lstm_proj", "lstm_ln")
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


def make(
    kind: str,
    input_size: int,
    hidden_size: int,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    bias: bool = True,
    dtype: Any = "float32",
    seed: int = 0,
    module: Any = fs,
) -> Any:
    """A layer of a kind, with the weights of `fill`."""
    name, settings = KINDS[kind]
    settings = dict(settings)
    if "proj_size" in settings:
        settings["proj_size"] = max(1, hidden_size // 2) if hidden_size > 1 else 0
    layer = getattr(module, name)(
        input_size,
        hidden_size,
        num_layers,
        bias=bias,
        bidirectional=bidirectional,
        dtype=dtype,
        seed=seed,
        **settings,
    )
    fill(layer, seed)
    return layer


def fill(layer: Any, seed: int = 0) -> None:
    """Random weights of usual size: the map from one state to the next does not expand.

    The matrix of each gate has a spectral norm of about 0.9, each bias lies in 0.1 to 0.5 with either sign.
    """
    rng = np.random.default_rng([seed, 1])
    gates = GATES[type(layer).__name__]
    arrays: dict[str, Array] = {}
    for name, old in layer.parameters.items():
        if old.ndim == 1:
            arrays[name] = rng.uniform(0.1, 0.5, old.shape) * rng.choice([-1, 1], old.shape)
            continue
        blocks = np.split(rng.normal(size=old.shape), 1 if "weight_hr" in name else gates)
        arrays[name] = np.concatenate([0.9 * block / spectral_norm(block) for block in blocks])
    layer.load_state_dict(arrays)


def spectral_norm(matrix: Array) -> float:
    """About the largest singular value, by power iteration: a fraction of the time that finding all takes."""
    vector = np.ones(matrix.shape[1])
    for _ in range(12):
        vector = (matrix @ vector) @ matrix
        vector /= np.linalg.norm(vector)
    return float(np.linalg.norm(matrix @ vector))


def reference(layer: Any, dtype: Any = None) -> Any:
    """The same layer over NumPy, in a wider dtype: float64 for float32, long double for float64."""
    config = dict(layer._config)
    config["dtype"] = dtype or ("float64" if layer.dtype == np.float32 else np.longdouble)
    twin = getattr(fs.reference, type(layer).__name__)(**config)
    twin.load_state_dict(layer.state_dict())
    return twin


def inputs(shape: tuple[int, ...], dtype: Any = "float32", seed: int = 0) -> Array:
    """Inputs of size about 1."""
    return np.random.default_rng([seed, 2]).normal(size=shape).astype(dtype)


def random_state(layer: Any, batch: int, seed: int = 0) -> Any:
    """A state of distinct numbers, none near zero."""
    rng = np.random.default_rng([seed, 3])
    arrays = [
        (rng.uniform(0.1, 0.9, a.shape) * rng.choice([-1, 1], a.shape)).astype(layer.dtype)
        for a in layer.initial_state(batch)
    ]
    return type(layer.initial_state(0))(*arrays)


def random_lengths(batch: int, time: int, seed: int = 0) -> Array:
    """Unequal lengths in no order: 0, 1 and all of `time` among them, where there are enough rows."""
    rng = np.random.default_rng([seed, 4])
    lengths = rng.integers(0, time + 1, batch)
    some = np.array([(time + 1) // 2] if batch == 1 else [time, (time + 1) // 2, 0, min(1, time)])[:batch]
    lengths[: len(some)] = some
    return rng.permutation(lengths)


def random_resets(batch: int, time: int, seed: int = 0) -> Array:
    """About one step in five."""
    return np.random.default_rng([seed, 5]).random((batch, time)) < 0.2


def example(layer: Any, batch: int, time: int, seed: int = 0) -> tuple[Array, Any, Array, Any]:
    """x, state, dy and dstate."""
    x, state = inputs((batch, time, layer.input_size), layer.dtype, seed), random_state(layer, batch, seed)
    dy = inputs((batch, time, layer._directions * layer._output_size), layer.dtype, seed + 100)
    return x, state, dy, random_state(layer, batch, seed + 100)


def train(
    layer: Any, x: Array, state: Any, dy: Array, dstate: Any, truncate: int | None = None, **options: Any
) -> dict[str, Array]:
    """All that a forward and a backward give, by name."""
    y, end, tape = layer.forward(x, state, **options)
    grads = {name: np.zeros_like(array) for name, array in layer.parameters.items()}
    dx, dstart = layer.backward(dy, tape, dstate=dstate, truncate=truncate, grads=grads)
    ends = {f"end.{name}": array for name, array in zip(end._fields, end, strict=True)}
    starts = {f"dstart.{name}": array for name, array in zip(dstart._fields, dstart, strict=True)}
    return {"y": y, "dx": dx, **ends, **starts, **grads}


def misplaced(array: Array) -> Array:
    """A copy that begins at an odd address."""
    copy = np.frombuffer(bytearray(array.nbytes + 1), array.dtype, array.size, offset=1).reshape(array.shape)
    copy[...] = array
    assert not copy.flags.aligned or not array.size
    return copy


def strange(array: Array) -> dict[str, Array]:
    """The same numbers lying in memory in every way."""
    swapped = array.astype(array.dtype.newbyteorder())
    wide = np.full([2 * n + 1 for n in array.shape], np.nan, array.dtype)
    every_other = wide[tuple(slice(1, None, 2) for _ in array.shape)]
    every_other[...] = array
    frozen = array.copy()
    frozen.flags.writeable = False
    record = np.zeros(array.shape, [("tag", "u1"), ("value", array.dtype)])
    record["value"] = array
    misaligned_swapped = misplaced(swapped)
    misaligned_transposed = misplaced(array.swapaxes(0, 1))
    return {
        "byte-swapped": swapped,
        "misaligned": misplaced(array),
        "misaligned and byte-swapped": misaligned_swapped,
        "misaligned and transposed": misaligned_transposed.swapaxes(0, 1),
        "every other": every_other,
        "backwards": np.flip(np.ascontiguousarray(np.flip(array))),
        "time first": np.ascontiguousarray(array.swapaxes(0, 1)).swapaxes(0, 1),
        "Fortran-ordered": np.asfortranarray(array),
        "read-only": frozen,
        "field of a record": record["value"],
        "subclass": array.view(type("Subclass", (np.ndarray,), {})),
    }


def unchanged(arrays: list[Array], before: list[bytes]) -> None:
    assert [array.tobytes() for array in arrays] == before, "an input was modified"


def tolerance(dtype: Any, k: int, time: int) -> float:
    """The numeric contract: how far, relative to the largest magnitude in the result, a result may be off."""
    return 16 * float(np.finfo(dtype).eps) * math.ceil(math.log2(2 + k * time))


def reduction(layer: Any) -> int:
    """The longest reduction in a layer."""
    outputs = layer.proj_size or layer.hidden_size
    widest = layer.input_size if layer.num_layers == 1 else max(layer.input_size, layer._directions * outputs)
    return max(widest + outputs, layer.hidden_size if layer.proj_size else 0)


def assert_close(actual: Array, expected: Array, relative: float, what: str = "result") -> None:
    """Equal within `relative` times the largest finite magnitude expected; NaN and inf at the same places."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    wide = np.promote_types(np.promote_types(actual.dtype, expected.dtype), np.float64)
    a, e = actual.astype(wide), expected.astype(wide)
    finite = np.isfinite(e)
    np.testing.assert_array_equal(a[~finite], e[~finite], err_msg=what)
    assert np.isfinite(a[finite]).all(), f"{what}: not finite where it should be"
    if finite.any():
        bound = relative * np.abs(e[finite]).max()
        error = np.abs(a[finite] - e[finite]).max()
        assert error <= bound, f"{what}: off by {error:.3g}, allowed {bound:.3g}"


def assert_agree(actual: tuple[Array, Any], expected: tuple[Array, Any], relative: float, what: str = "") -> None:
    """`assert_close` over what a call returns: outputs and each array of the state."""
    assert_close(actual[0], expected[0], relative, f"{what} y")
    assert type(actual[1]) is type(expected[1])
    for name, a, e in zip(actual[1]._fields, actual[1], expected[1], strict=True):
        assert_close(a, e, relative, f"{what} state.{name}")


def bits(array: Array) -> Array:
    """The same memory as integers, so that +0 is not -0."""
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def assert_same_bits(actual: Any, expected: Any, what: str = "result") -> None:
    """Equal in shape, dtype and every bit; arrays, states, or tuples of them."""
    if isinstance(expected, np.ndarray):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape, (
            f"{what}: {actual.dtype}{actual.shape}, expected {expected.dtype}{expected.shape}"
        )
        differing = int((bits(actual) != bits(expected)).sum())
        assert not differing, f"{what}: {differing} of {expected.size} elements differ in their bits"
        return
    assert type(actual) is type(expected)
    for part, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(a, e, f"{what}[{part}]")


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Up to n threads inside, and what there was before after it."""
    before = fs.get_num_threads()
    fs.set_num_threads(n)
    try:
        yield
    finally:
        fs.set_num_threads(before)


def run_python(
    code: str, *, timeout: float = 120, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, with `common` importable; the environment is added to ours.

    What it forked ends with it, also where it fails or takes too long: a child that hangs would hold our pipes open,
    and a processor busy.
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(
        command,
        env=child_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, by which all of it can be ended
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    result = subprocess.CompletedProcess(command, process.returncode, output, errors)
    if check:
        assert result.returncode == 0, f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def child_environment(**more: str) -> dict[str, str]:
    """Our environment for a child, which finds what we find."""
    path = [str(Path(__file__).parent), *(p for p in sys.path if p)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **more}
