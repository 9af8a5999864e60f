"""Nobody imports upwards or reaches into another package's objects; ARCHITECTURE.md names paths that exist."""

import ast
import functools
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
        "fastseq._weight_gradient",
        "fastseq._packing",
        "fastseq._cells",
        "fastseq._bptt",
        "fastseq._recurrent",
        "fastseq._dense",
        "fastseq._convolution",
        "fastseq._losses",
        "fastseq._optimisers",
        "fastseq._autoregression",
        "fastseq._markov",
        "fastseq._decoding",
        "fastseq._recurrent_decoder",
        "fastseq._attention",
        "fastseq._additive_attention",
        "fastseq._schedule",
        "fastseq._kv_pages",
        "fastseq._transformer",
    ],
    ["fastseq.narrow", "fastseq.windows"],
    ["fastseq.formats"],
    [
        "fastseq.threads",
        "fastseq.plotting",
        "fastseq.io",
        "fastseq.convert",
        "fastseq.over_time",
        "fastseq.joining",
        "fastseq.splitmix",
        "fastseq.reference._recurrent",
        "fastseq.reference._dense",
        "fastseq.reference._convolution",
        "fastseq.reference._additive_attention",
        "fastseq.reference._pooling",
        "fastseq.reference._joining",
        "fastseq.reference._optimisers",
        "fastseq.reference._autoregression",
        "fastseq.reference._markov",
    ],
    ["fastseq.backend", "fastseq.reference._attention", "fastseq.reference._losses", "fastseq.reference._decoding"],
    ["fastseq.state", "fastseq.losses", "fastseq.reference._transformer"],
    ["fastseq.layers"],
    [
        "fastseq.training",
        "fastseq.init",
        "fastseq.convert.pytorch",
        "fastseq.convert.keras",
        "fastseq.convert.onnx_recurrent",
    ],
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
    "fastseq.layers": {"typing_extensions"},  # for type checkers alone, which know it without its being installed
    "fastseq.formats": {"h5py", "onnx"},
    "fastseq.plotting": {"matplotlib"},
    "fastseq.training": {"matplotlib", "tqdm"},
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
        if path.stem not in ("__init__", "_backend", "_joining", "_pooling"):
            assert (SOURCES / f"{path.stem}.pyi").exists(), path


def test_every_module_has_a_floor_of_its_own():
    named = {name for floor in FLOORS for name in floor}
    assert all(is_module(name) for name in named)
    for module in MODULES:
        assert home(module)[0] != "fastseq" or module == "fastseq", f"{module} is on no floor"


NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}  # public, for all their underscores


def room(module):
    """The package that a module belongs to, or the module where it stands alone: fastseq.<name>."""
    return ".".join(module.split(".")[:2])


def underscored(name):
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLE


def private_members(tree):
    """The underscored members of the classes of a module: methods, class attributes, slots, attributes of self."""
    for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(kind):
            if isinstance(node, ast.FunctionDef):
                yield node.name
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                yield node.id if isinstance(node, ast.Name) else node.attr


def inherits_from(tree):
    """The rooms that the classes of a module have base classes of."""
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        yield from (room(imported.get(ast.unparse(base).split(".")[0], "")) for base in kind.bases)


@functools.cache
def source_trees():
    found = {}
    for module in MODULES:
        path = ROOT.joinpath(*module.split("."))
        found[module] = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    return found


@functools.cache
def members_and_bases():
    """The rooms whose classes have an underscored member, by its name; and the rooms that a room inherits from."""
    members, bases = {}, {}
    for module, tree in source_trees().items():
        for name in filter(underscored, private_members(tree)):
            members.setdefault(name, set()).add(room(module))
        bases.setdefault(room(module), set()).update(inherits_from(tree))
    return members, bases


def reaches(module, tree):
    """Every use of an underscored member of another object whose class is in another room.

    A room may use its own members. Those it inherits, or gives a name that a class it inherits from has, it may use of
    self alone: of any other object the name may mean the other room's.
    """
    here = room(module)
    members, bases = members_and_bases()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and room(node.module) not in (here, "fastseq", "__future__"):
            yield from (f"{module}:{node.lineno} {alias.name}" for alias in node.names if underscored(alias.name))
        if not isinstance(node, ast.Attribute) or not underscored(node.attr):
            continue
        code = ast.unparse(node)
        of = members.get(node.attr, set())
        own = re.match(r"(self|cls|super\(\)|type\(self\))\._\w+$", code)
        if of and not own and (here not in of or of & (bases[here] - {here})):
            yield f"{module}:{node.lineno} {code}"


def test_nobody_reaches_into_objects_of_another_package():
    assert not [place for module, tree in source_trees().items() for place in reaches(module, tree)]


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("fastseq.models.recurrent_parts", "self._layer._cells()"),
        ("fastseq.models.recurrent_parts", "self._layer._weights()"),
        ("fastseq.models.transformer_lm", "encoder._opened"),  # a name that models have, too
        ("fastseq.training.trainer", "self.model._adopt({})"),
        ("fastseq.init", "layer._config"),
        ("fastseq.layers.inside", "state._own"),
        ("fastseq.plotting", "layer._arrays['weight']"),
        ("fastseq.training.flow", "from fastseq.layers.recurrent import _suffix"),
    ],
)
def test_a_planted_reach_is_found(module, code):
    assert len(list(reaches(module, ast.parse(code)))) == 1


def test_the_kernels_know_neither_python_nor_threads_nor_memory():
    standard = {"stddef.h", "stdint.h", "string.h", "immintrin.h", "arm_neon.h", "cpuid.h"}
    standard |= {"sys/syscall.h", "unistd.h"}  # by which the system is asked for tiles
    files = [path.resolve() for path in (ROOT / "src" / "kernels").rglob("*") if path.suffix in (".c", ".h", ".inc")]
    assert files
    for path in files:
        text = path.read_text()
        included = set(re.findall(r'#\s*include\s*[<"](.*?)[>"]', text))
        assert all((path.parent / name).resolve() in files for name in included - standard), path
        code = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
        assert not re.search(r"\b(malloc|calloc|realloc|alloca|free|Py\w+|omp\w*|pthread\w*)\b", code), path


def test_compiled_modules_import_only_compiled_modules_below_them():
    for path in (ROOT / "src").rglob("*.pyx"):
        below = COMPILED[: COMPILED.index(path.stem)]
        for line in re.findall(r"^(?:from|import|cimport) .*fastseq.*$", path.read_text(), re.MULTILINE):
            module = re.fullmatch(r"from fastseq\.(\w+) c?import .*|from fastseq import ([\w, ]+)", line)
            assert module, f"{path}: {line}"
            names = {module[1]} if module[1] else set(module[2].split(", "))
            assert names <= set(below), f"{path}: {line}"


def test_no_flag_lets_the_compiler_change_the_arithmetic():
    text = (ROOT / "setup.py").read_text()
    assert "-ffp-contract=off" in text
    assert not re.search("fast-math|Ofast|unsafe-math|associative-math|reciprocal-math|finite-math", text)


PAGE = (ROOT / "ARCHITECTURE.md").read_text()
RECIPES = ["A new cell", "A new weight type", "A new layer", "A new setting of Transformers", "A new file format"]


def paths(text):
    """What stands in backticks and looks like a path, or like the name of a file."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for name in re.findall(r"`([\w./<>-]+)`", text):
        if name.split("/")[0] in folders and "/" in name:
            yield name
        elif re.fullmatch(r"\w+\.(h|c|inc|pyx|pxd|pxi|py)", name):
            yield f"*/{name}"


@pytest.mark.parametrize("name", sorted(set(paths(PAGE))))
def test_every_path_of_the_architecture_exists(name):
    pattern = re.sub("<.*?>", "*", name)
    if pattern.startswith("*/"):
        tops = (ROOT / top for top in ("src", "fastseq", "bench", "tests"))
        assert (ROOT / pattern[2:]).exists() or any(next(top.rglob(pattern[2:]), None) for top in tops), name
    else:
        assert next(ROOT.glob(pattern.rstrip("/")), None), name
        assert not name.endswith("/") or (ROOT / name).is_dir()


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_list_the_files_they_touch(recipe):
    steps = PAGE.split(f"### {recipe}\n")[1].split("\n#")[0]
    assert len(list(paths(steps))) >= 3


# From the ground up: each may import from those before it.
COMPILED = [
    "_simd",
    "_parallel",
    "_weight_gradient",
    "_packing",
    "_cells",
    "_bptt",
    "_dense",
    "_convolution",
    "_recurrent",
    "_losses",
    "_optimisers",
    "_autoregression",
    "_markov",
    "_decoding",
    "_recurrent_decoder",
    "_attention",
    "_additive_attention",
    "_schedule",
    "_kv_pages",
    "_transformer",
]


@pytest.mark.parametrize("module", COMPILED)
def test_stubs_name_what_the_compiled_modules_have(module):
    compiled = importlib.import_module(f"fastseq.{module}")
    has = {n for n, value in vars(compiled).items() if not n.startswith("_") and not isinstance(value, ModuleType)}
    stub = ast.parse((SOURCES / f"{module}.pyi").read_text())
    named = {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    named |= {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    imported = [alias for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    named |= {alias.asname for alias in imported if alias.asname}  # what it gives on from a module below
    assert named == has
    for node in stub.body:
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.args, *([node.args.vararg] if node.args.vararg else [])]
            assert [a.arg for a in arguments] == list(inspect.signature(getattr(compiled, node.name)).parameters)


@pytest.fixture(scope="module")
def imported():
    """What an import of fastseq imports, in a process of its own."""
    code = "import sys, fastseq; print(*sys.modules)"
    folder = Path(fastseq.__file__).parent.parent
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, timeout=300, check=True, capture_output=True, text=True).stdout.split()


@pytest.mark.parametrize(
    "package", ["safetensors", "onnx", "onnxruntime", "torch", "matplotlib", "tqdm", "fastseq.cli"]
)
def test_import_of_fastseq_does_not_import(package, imported):
    assert "fastseq" in imported and package not in imported
