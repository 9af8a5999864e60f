"""The build: one object for each instruction set and real type, and the compiled modules that use them.

Switches, environment variables set to 1: FASTSEQ_DEBUG (made for a debugger), FASTSEQ_SANITIZE (address
and undefined-behaviour sanitizers), FASTSEQ_COVERAGE (gcov, by lines of C and of Cython), FASTSEQ_NO_OPENMP.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

X86_64 = platform.machine().lower() in ("x86_64", "amd64")
# The flags of each instruction set; a set is src/kernels/isa/<name>_f32.c and <name>_f64.c.
SETS = {"baseline": ["-march=x86-64-v2"] if X86_64 else []}
if X86_64:
    SETS["avx2"] = ["-mavx2", "-mfma"]
    SETS["avx512"] = ["-mavx512f", "-mavx512dq", "-mprefer-vector-width=512"]
# The same of products of narrow weights, src/kernels/isa/<name>_narrow.c: more sets, which share kernels of reals.
NARROW_SETS = {"baseline": SETS["baseline"], "amx_in_c": SETS["baseline"]}
if X86_64:
    NARROW_SETS["avx2"] = SETS["avx2"]
    NARROW_SETS["avx_vnni"] = [*SETS["avx2"], "-mavxvnni"]
    NARROW_SETS["avx512"] = [*SETS["avx512"], "-mavx512bw"]
    NARROW_SETS["avx512_vnni"] = [*NARROW_SETS["avx512"], "-mavx512vnni"]
    NARROW_SETS["avx512_bf16"] = [*NARROW_SETS["avx512_vnni"], "-mavx512bf16"]
    NARROW_SETS["amx"] = [*NARROW_SETS["avx512_bf16"], "-mamx-tile", "-mamx-int8", "-mamx-bf16"]

# What is fused is written in the source; the compiler fuses nothing of its own.
FLAGS = ["-std=gnu11", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]

OPENMP = "fastseq._parallel", "fastseq._simd"  # the modules that use it, or say whether it is there

PROBE = """
#include <omp.h>
int main(void)
{
    int n = 0;
    #pragma omp parallel reduction(+ : n)
    n += omp_get_num_threads() > 0;
    return n > 0 ? 0 : 1;
}
"""


def switch(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def digest(command: str) -> str:
    """A short name for the way in which something is compiled."""
    return hashlib.sha256(command.encode()).hexdigest()[:16]


def content(files: list[str]) -> str:
    """A short name for the contents of files; in what Cython wrote, without its first comment, which has paths."""
    parts = (Path(name).read_bytes().partition(b"END: Cython Metadata") for name in sorted(files))
    return hashlib.sha256(b"".join(after or before for before, _, after in parts)).hexdigest()[:16]


class Build(build_ext):
    """Builds the kernels of every instruction set, each with its own flags, and links them into `_simd`.

    Kernels and modules stay in build/kernels and build/modules, in a folder for each set of flags. A kernel that is
    newer than everything it is made of is taken from there, and a module that was made of the same text.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()
        self.force = True  # setuptools compares dates alone; the flags may be others than those of the last build
        self.headers = [str(path) for path in Path("src").rglob("*.[hi]*")]

    def build_extensions(self) -> None:
        flags, link = list(FLAGS), []
        if switch("FASTSEQ_DEBUG"):
            flags += ["-Og", "-g"]  # without any optimisation the kernels do not compile: they must be inlined
        if switch("FASTSEQ_SANITIZE"):
            flags += [*SANITIZE, "-O1"]  # more takes GCC many minutes, for the widest kernels
            link += SANITIZE
        if switch("FASTSEQ_COVERAGE"):
            flags += ["--coverage"]
            link += ["--coverage"]
        if flags == FLAGS and sys.platform == "linux":
            link += ["-Wl,-s"]  # names of functions, which nobody reads, would be 2 % of a wheel
        openmp = self.openmp_flags()
        objects = self.kernels(flags)
        for extension in self.extensions:
            own = openmp if extension.name in OPENMP else []  # so that without OpenMP the others are the same
            # Generated code has parameters it does not use.
            extension.extra_compile_args = [*flags, *own, "-Wno-unused-parameter"]
            extension.extra_link_args = [*link, *own]
            if extension.name == "fastseq._simd":
                extension.extra_objects = objects
        super().build_extensions()

    def build_extension(self, extension: Extension) -> None:
        """Build a module, or take the one that an earlier build left as it would be now."""
        target = Path(self.get_ext_fullpath(extension.name))
        versions = platform.platform(), sys.version, numpy.__version__
        commands = self.compiler.compiler_so, self.compiler.linker_so
        flags = extension.extra_compile_args, extension.extra_link_args
        folder = Path("build/modules", digest(f"{versions} {commands} {flags} {extension.sources}"))
        # By content and not by date: Cython writes the same text again wherever it was installed later than that text.
        kept = folder / f"{content([*extension.sources, *self.headers, *extension.extra_objects])}-{target.name}"
        if not kept.exists():
            super().build_extension(extension)
            folder.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(f".{os.getpid()}")
            shutil.copyfile(target, partial)
            for old in folder.glob(f"*-{target.name}"):
                old.unlink(missing_ok=True)
            partial.replace(kept)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(kept, target)

    def kernels(self, flags: list[str]) -> list[str]:
        """Compile the kernels, side by side, except those that an earlier build left as they would be now."""
        if switch("FASTSEQ_SANITIZE"):
            # Python's own -fwrapv would hide overflow from the sanitizer.
            flags = [*flags, "-fno-wrapv"]
        files = {"src/kernels/dispatch.c": flags}
        for name, set_flags in reversed(SETS.items()):  # the widest takes longest, and is begun first
            files |= {f"src/kernels/isa/{name}_{real}.c": [*flags, *set_flags] for real in ("f32", "f64")}
        files |= {f"src/kernels/isa/{name}_narrow.c": [*flags, *own] for name, own in reversed(NARROW_SETS.items())}

        def kernel(source: str) -> str:
            folder = f"build/kernels/{digest(f'{platform.platform()} {self.compiler.compiler_so} {files[source]}')}"
            (target,) = self.compiler.object_filenames([source], output_dir=folder)
            if newer_group([source, *self.headers], target):
                self.compiler.compile([source], folder, include_dirs=["src"], extra_postargs=files[source])
            return target

        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(kernel, files))

    def openmp_flags(self) -> list[str]:
        """The flags that make OpenMP work, found by compiling, linking and running a program; else none."""
        if switch("FASTSEQ_NO_OPENMP"):
            return []
        for flags in ["-fopenmp"], ["-Xpreprocessor", "-fopenmp", "-lomp"]:
            with tempfile.TemporaryDirectory() as folder:
                source, program = Path(folder, "probe.c"), Path(folder, "probe")
                source.write_text(PROBE)
                try:
                    objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
                    self.compiler.link_executable(objects, str(program), extra_postargs=flags)
                    subprocess.run([program], check=True, timeout=60)
                    return flags
                except Exception as error:  # whatever goes wrong here, the build goes on without OpenMP
                    print(f"OpenMP not found with {' '.join(flags)}: {error}", file=sys.stderr)
        print("building without OpenMP: everything will run on one thread", file=sys.stderr)
        return []


# The compiled modules of each room of src/.
ROOMS = {
    "runtime": ["_simd", "_parallel"],
    "packing": ["_packing"],
    "dense": ["_weight_gradient", "_dense"],
    "convolution": ["_convolution"],
    "recurrent": ["_cells", "_bptt", "_recurrent"],
    "attention": ["_attention", "_additive_attention"],
    "transformer": ["_schedule", "_kv_pages", "_transformer"],
    "training": ["_losses", "_optimisers"],
    "autoregression": ["_autoregression", "_markov"],
    "decoding": ["_decoding", "_recurrent_decoder"],
}


def extension(room: str, name: str) -> Extension:
    return Extension(
        f"fastseq.{name}",
        [f"src/{room}/{name}.pyx"],
        include_dirs=["src", numpy.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
    )


setup(
    cmdclass={"build_ext": Build},
    ext_modules=cythonize(
        [extension(room, name) for room, names in ROOMS.items() for name in names],
        include_path=["src", "."],
        compiler_directives={"language_level": 3, "cdivision": True},
        # Where coverage is counted, lines of C say which line of Cython they stand for.
        emit_linenums=switch("FASTSEQ_COVERAGE"),
        build_dir="build/coverage" if switch("FASTSEQ_COVERAGE") else None,
    ),
)
