"""The package as a whole: what it imports, what it offers, and that both sets of layers offer the same."""

from __future__ import annotations

import importlib.metadata
import inspect
import sys
from typing import Any

import pytest
from common import run_python

import fastseq as fs

# The contract, as it is written down.
SIGNATURES = {
    "RNN": "(input_size, hidden_size, num_layers=1, *, nonlinearity='tanh', bias=True, dropout=0.0, "
    "bidirectional=False, dtype='float32', seed=None)",
    "LSTM": "(input_size, hidden_size, num_layers=1, *, proj_size=0, layer_norm=False, bias=True, dropout=0.0, "
    "bidirectional=False, dtype='float32', seed=None)",
    "GRU": "(input_size, hidden_size, num_layers=1, *, reset_after=True, bias=True, dropout=0.0, "
    "bidirectional=False, dtype='float32', seed=None)",
}
METHODS = {
    "__call__": "(self, x, state=None, *, lengths=None, resets=None, return_gates=False)",
    "forward": "(self, x, state=None, *, lengths=None, resets=None, seed=None)",
    "backward": "(self, dy, tape, *, dstate=None, truncate=None, grads=None)",
    "step": "(self, x_t, state=None, *, out=None)",
    "state_dict": "(self)",
    "load_state_dict": "(self, mapping)",
    "initial_state": "(self, batch_size)",
    "save": "(self, path)",
}


def bare(function: Any) -> str:
    """A signature without its annotations."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("module", [fs, fs.reference], ids=["compiled", "reference"])
@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str, module: Any) -> None:
    cls = getattr(module, name)
    assert bare(cls) == SIGNATURES[name]
    for method, signature in METHODS.items():
        assert bare(getattr(cls, method)) == signature
    assert isinstance(cls.parameters, property)


def test_the_reference_offers_every_public_layer_and_function() -> None:
    not_of_the_reference = {"reference", "__version__", "get_num_threads", "set_num_threads"}
    pairs = {name: (getattr(fs, name), getattr(fs.reference, name, None)) for name in fs.__all__}
    for name in [name for name, (ours, _) in pairs.items() if inspect.ismodule(ours)]:
        del pairs[name]
    pairs |= {name: (getattr(fs.losses, name), getattr(fs.reference.losses, name)) for name in fs.losses.__all__}
    for name in set(pairs) - not_of_the_reference:
        ours, theirs = pairs[name]
        assert inspect.signature(ours) == inspect.signature(theirs), name
        assert inspect.getdoc(ours) and inspect.getdoc(theirs), name
        if inspect.isclass(ours):
            public = {member for member in dir(ours) if not member.startswith("_")}
            assert public == {member for member in dir(theirs) if not member.startswith("_")}
            for member in public:
                one, other = getattr(ours, member), getattr(theirs, member)
                if callable(one):
                    assert inspect.signature(one) == inspect.signature(other), (name, member)
    assert fs.reference.State is fs.State and fs.reference.LSTMState is fs.LSTMState
    assert set(fs.reference.__all__) <= set(fs.__all__)


def test_the_reference_layers_are_not_the_compiled_ones() -> None:
    """A comparison of a thing with itself would see nothing."""
    for name in SIGNATURES:
        ours, theirs = getattr(fs, name), getattr(fs.reference, name)
        assert ours is not theirs and ours._backend is not theirs._backend
        for operation in ("pack", "run", "step", "forward", "gates", "backward"):
            assert getattr(ours._backend.recurrent, operation) is not getattr(theirs._backend.recurrent, operation)
        assert "fastseq._recurrent" not in vars(theirs._backend.recurrent).values()


def test_every_public_name_is_there_and_documented() -> None:
    for name in fs.__all__:
        assert hasattr(fs, name)
        if name != "__version__":
            assert inspect.getdoc(getattr(fs, name)), name
    for name in ("RNN", "LSTM", "GRU", "State", "LSTMState"):
        for member, value in vars(getattr(fs, name)).items():
            if not member.startswith("_") and callable(value):
                assert inspect.getdoc(value), f"{name}.{member}"


def test_the_version() -> None:
    assert fs.__version__.count(".") >= 2
    try:
        installed = importlib.metadata.version("fastseq")
    except importlib.metadata.PackageNotFoundError:
        return  # run from the tree
    assert installed == fs.__version__


IMPORTED = """
import sys
before = set(sys.modules)
import fastseq as fs
{then}
names = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(names - set(sys.stdlib_module_names)))
"""


def imported(then: str = "") -> set[str]:
    """The packages from outside the standard library that are imported."""
    names = run_python(IMPORTED.format(then=then)).stdout.split()
    return {name for name in names if not name.startswith(("_cython", "cython_runtime"))}


def test_import_takes_numpy_alone() -> None:
    assert imported() == {"fastseq", "numpy"}


def test_running_takes_numpy_alone() -> None:
    then = "for m in (fs, fs.reference): print(m.LSTM(2, 3)([[1.0, 2.0]])[0].shape, file=sys.stderr)"
    assert imported(then) == {"fastseq", "numpy"}


def test_files_take_safetensors_then() -> None:
    then = """
import os, tempfile
path = os.path.join(tempfile.mkdtemp(), "layer")
fs.GRU(2, 3).save(path)
fs.load(path)
os.remove(path)
"""
    assert {"fastseq", "numpy", "safetensors"} == imported(then)


def test_import_starts_no_thread_and_reads_no_policy() -> None:
    """Only what the machine says is asked for, and only when it is needed."""
    code = """
    import threading, os, numpy
    before = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    import fastseq
    after = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    assert after == before, (before, after)
    """
    run_python(code, FASTSEQ_NUM_THREADS="nonsense")


def test_it_can_be_imported_where_warnings_are_errors() -> None:
    import subprocess

    from common import child_environment

    command = [sys.executable, "-W", "error", "-c", "import fastseq"]
    subprocess.run(command, check=True, env=child_environment())


def test_the_example_of_the_package() -> None:
    import doctest

    result = doctest.testmod(fs)
    assert result.attempted and not result.failed
