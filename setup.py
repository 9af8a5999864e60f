"""The build: one object for each instruction set and real type, and the compiled modules that use them.

Switches, environment variables set to 1: FASTSEQ_DEBUG (no optimisation, debug symbols), FASTSEQ_SANITIZE (address
and undefined-behaviour sanitizers), FASTSEQ_COVERAGE (gcov, and line tracing in Cython), FASTSEQ_NO_OPENMP.
"""

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86_64 = platform.machine().lower() in ("x86_64", "amd64")
# The flags of each instruction set; a set is simd/<name>_f32.c and simd/<name>_f64.c.
SETS = {"baseline": ["-march=x86-64-v2"] if X86_64 else []}
if X86_64:
    SETS["avx2"] = ["-mavx2", "-mfma"]
    SETS["avx512"] = ["-mavx512f", "-mavx512dq", "-mprefer-vector-width=512"]

# What is fused is written in the source; the compiler fuses nothing of its own.
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]

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


class Build(build_ext):
    """Builds the leaves of every instruction set, each with its own flags, and links them into `_simd`."""

    def build_extensions(self) -> None:
        flags, link = list(FLAGS), []
        if switch("FASTSEQ_DEBUG"):
            flags += ["-O0", "-g"]
        if switch("FASTSEQ_SANITIZE"):
            sanitize = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
            flags += sanitize
            link += sanitize
        if switch("FASTSEQ_COVERAGE"):
            flags += ["--coverage"]
            link += ["--coverage"]
        openmp = self.openmp_flags()
        objects = self.leaves(flags)
        for extension in self.extensions:
            # Generated code has parameters it does not use.
            extension.extra_compile_args = [*flags, *openmp, "-Wno-unused-parameter"]
            extension.extra_link_args = [*link, *openmp]
            if extension.name == "fastseq._simd":
                extension.extra_objects = objects
        super().build_extensions()

    def leaves(self, flags: list[str]) -> list[str]:
        objects = []
        for name, set_flags in SETS.items():
            sources = [f"src/simd/{name}_f32.c", f"src/simd/{name}_f64.c"]
            objects += self.compile(sources, [*flags, *set_flags])
        return objects + self.compile(["src/simd/find.c"], flags)

    def compile(self, sources: list[str], flags: list[str]) -> list[str]:
        headers = [str(path) for path in Path("src").rglob("*.[hi]*")]
        return self.compiler.compile(
            sources, output_dir=self.build_temp, include_dirs=["src"], depends=headers, extra_postargs=flags
        )

    def openmp_flags(self) -> list[str]:
        """The flags that make OpenMP work, found by compiling, linking and running a program; else none."""
        if switch("FASTSEQ_NO_OPENMP"):
            return []
        candidates = [["-fopenmp"], ["-Xpreprocessor", "-fopenmp", "-lomp"]]
        for flags in candidates:
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder, "probe.c")
                source.write_text(PROBE)
                try:
                    objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
                    program = str(Path(folder, "probe"))
                    self.compiler.link_executable(objects, program, extra_postargs=flags)
                    subprocess.run([program], check=True, timeout=60)
                    return flags
                except Exception as error:  # whatever goes wrong here, the build goes on without OpenMP
                    print(f"OpenMP not found with {' '.join(flags)}: {error}", file=sys.stderr)
        print("building without OpenMP: everything will run on one thread", file=sys.stderr)
        return []


def extension(name: str) -> Extension:
    return Extension(
        f"fastseq.{name}",
        [f"src/{name}.pyx"],
        include_dirs=["src", numpy.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")]
        + ([("CYTHON_TRACE_NOGIL", "1")] if switch("FASTSEQ_COVERAGE") else []),
        depends=["src/leaves.pxd", "src/team.h", "src/simd/leaves.h"],
    )


setup(
    cmdclass={"build_ext": Build},
    ext_modules=cythonize(
        [extension("_simd"), extension("_recurrent")],
        include_path=["src"],
        compiler_directives={
            "language_level": 3,
            "cdivision": True,
            "linetrace": switch("FASTSEQ_COVERAGE"),
        },
    ),
)
