"""Nobody imports upwards: ARCHITECTURE.md draws the floors, and this holds the imports to them."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from common import ROOT

import fastseq

SOURCES = ROOT / "fastseq"

# Each floor, from the ground up: its modules may import from floors below theirs, and from their own package.
FLOORS = [
    ["fastseq.version", "fastseq._simd", "fastseq._parallel"],
    [
        "fastseq.checks",
        "fastseq.elsewhere",
        "fastseq._recurrent",
        "fastseq._dense",
        "fastseq._losses",
        "fastseq._optimisers",
        "fastseq._autoregression",
        "fastseq._markov",
        "fastseq._decoding",
        "fastseq._recurrent_decoder",
        "fastseq._attention",
        "fastseq._additive_attention",
        "fastseq._transformer",
    ],
    [
        "fastseq.threads",
        "fastseq.plotting",
        "fastseq.io",
        "fastseq.convert",
        "fastseq.over_time",
        "fastseq.splitmix",
        "fastseq.reference._recurrent",
        "fastseq.reference._dense",
        "fastseq.reference._additive_attention",
        "fastseq.reference._pooling",
        "fastseq.reference._optimisers",
        "fastseq.reference._autoregression",
        "fastseq.reference._markov",
    ],
    ["fastseq.backend", "fastseq.reference._attention", "fastseq.reference._losses", "fastseq.reference._decoding"],
    ["fastseq.state", "fastseq.losses", "fastseq.reference._transformer"],
    ["fastseq.layers"],
    ["fastseq.training", "fastseq.init"],
    ["fastseq.models"],
    ["fastseq.reference"],
    ["fastseq"],
    ["fastseq.bench"],
    ["fastseq.cli"],
    ["fastseq.__main__"],
]
# What each floor may import from outside besides NumPy and the standard library.
OUTSIDE = {
    "fastseq.io": {"safetensors"},
    "fastseq.plotting": {"matplotlib"},
    "fastseq.training": {"matplotlib", "safetensors", "tqdm"},
    "fastseq.cli": {"matplotlib", "safetensors"},
    "fastseq.bench": {
        "ctranslate2",
        "gguf",
        "llama_cpp",
        "onnx",
        "onnxruntime",
        "openvino",
        "safetensors",
        "torch",
        "transformers",
    },
}
# `load` gives back layers, which stand above it: it finds them by name, when it is called.
LATE = {
    ("fastseq.io", "fastseq"),
    ("fastseq.state", "fastseq.io"),
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def home(module):
    """The entry of FLOORS that a module belongs to, and its height."""
    found = [(len(name), height, name) for height, floor in enumerate(FLOORS) for name in floor]
    found = [entry for entry in found if module == entry[2] or module.startswith(entry[2] + ".")]
    _, height, name = max(found)
    return name, height


MODULES = sorted(module_name(path) for path in SOURCES.rglob("*.py"))


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists() or path.with_suffix(".pyi").exists()


def imports(path):
    """Every (module, whether it is imported late, that is inside a function) in a file."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in late
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (name if is_module(name) else node.module), id(node) in late


@pytest.mark.parametrize("module", MODULES)
def test_nobody_imports_upwards(module):
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    here, height = home(module)
    for name, late in imports(path):
        top = name.split(".")[0]
        if top != "fastseq":
            allowed = {"numpy", "__future__"} | OUTSIDE.get(here, set())
            assert top in sys.stdlib_module_names or top in allowed, f"{module} imports {name}"
            continue
        there, other = home(name)
        fine = there == here or other < height or (late and (here, there) in LATE)
        assert fine, f"{module} (on floor {height}) imports {name} (on floor {other})"


def test_only_the_package_and_the_programs_import_the_reference():
    """Whatever else needs an operation in NumPy is given a backend."""
    for module in MODULES:
        path = ROOT.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        imported = {name for name, _ in imports(path) if name.startswith("fastseq.reference")}
        fine = module == "fastseq" or module.startswith(("fastseq.reference", "fastseq.cli"))
        assert fine or not imported, f"{module}: {imported}"


def test_every_reference_module_is_named_as_what_it_mirrors():
    for path in (SOURCES / "reference").glob("_*.py"):
        if path.stem not in ("__init__", "_backend", "_pooling"):
            assert (SOURCES / f"{path.stem}.pyi").exists(), path


def test_every_module_has_a_floor_of_its_own():
    named = {name for floor in FLOORS for name in floor}
    assert all(is_module(name) for name in named)
    for module in MODULES:
        assert home(module)[0] != "fastseq" or module == "fastseq", f"{module} is on no floor"


def test_the_kernels_know_neither_python_nor_threads_nor_memory():
    standard = {"stddef.h", "stdint.h", "string.h", "immintrin.h", "arm_neon.h"}
    files = [path for path in (ROOT / "src" / "kernels").rglob("*") if path.suffix in (".c", ".h", ".inc")]
    own = {path.name for path in files} | {"../kernels.inc"}
    assert own
    for path in files:
        text = path.read_text()
        included = set(re.findall(r'#\s*include\s*[<"](.*?)[>"]', text))
        assert included <= standard | own, path
        code = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
        assert not re.search(r"\b(malloc|calloc|realloc|alloca|free|Py\w+|omp\w*|pthread\w*)\b", code), path


def test_compiled_modules_import_only_the_kernels():
    for path in (ROOT / "src").rglob("*.pyx"):
        for line in re.findall(r"^(?:from|import|cimport) .*fastseq.*$", path.read_text(), re.MULTILINE):
            assert line.startswith(("from fastseq import _simd", "from fastseq._parallel cimport ")), path


def test_no_flag_lets_the_compiler_change_the_arithmetic():
    text = (ROOT / "setup.py").read_text()
    assert "-ffp-contract=off" in text
    assert not re.search("fast-math|Ofast|unsafe-math|associative-math|reciprocal-math|finite-math", text)


COMPILED = [
    "_simd",
    "_recurrent",
    "_dense",
    "_losses",
    "_optimisers",
    "_autoregression",
    "_markov",
    "_decoding",
    "_recurrent_decoder",
    "_attention",
    "_additive_attention",
    "_transformer",
]


@pytest.mark.parametrize("module", COMPILED)
def test_stubs_name_what_the_compiled_modules_have(module):
    compiled = importlib.import_module(f"fastseq.{module}")
    has = {n for n, value in vars(compiled).items() if not n.startswith("_") and not isinstance(value, ModuleType)}
    stub = ast.parse((SOURCES / f"{module}.pyi").read_text())
    named = {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    named |= {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    assert named == has
    for node in stub.body:
        if isinstance(node, ast.FunctionDef):
            assert [a.arg for a in node.args.args] == list(inspect.signature(getattr(compiled, node.name)).parameters)


@pytest.mark.parametrize(
    "package", ["safetensors", "onnx", "onnxruntime", "torch", "matplotlib", "tqdm", "fastseq.cli"]
)
def test_import_of_fastseq_does_not_import(package):
    code = f"import sys, fastseq; sys.exit({package!r} in sys.modules)"
    folder = Path(fastseq.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, timeout=300, check=False).returncode == 0
