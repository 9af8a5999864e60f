"""exp, tanh, sigmoid and both GELUs at every finite float32, for each instruction set of this machine
that has kernels of reals of its own.

    python tests/exhaustive_ulp.py [--function NAME] [--isa NAME]

Prints the worst error of each in units in the last place, and where; exits with 1 if one is more than 2, or if
a result is NaN, infinite or large where it should not be. An error of a GELU y counts in ulp of the larger of |y| and
2^-24 |x|, and what is beyond |x| = 16, where y is x or 0, is looked at apart. Takes some minutes for each instruction
set; the erf form needs SciPy.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

FUNCTIONS = ("exp", "tanh", "sigmoid", "gelu", "gelu_tanh")
BLOCK = 1 << 18  # a block and its float64 copies stay in a cache
FINITE = 0x7F800000  # bit patterns of one sign, up to infinity
SIXTEEN = 0x41800000  # the bit pattern of 16
MOST = 2.0


def worst(name: str) -> tuple[float, float, list[float]]:
    """The worst error of a function over all finite float32, its argument, and arguments of results that are wrong.

    Wrong is what `ulp.errors` cannot say in ulp: NaN, infinite or large where that should not be.
    """
    import ulp

    from fastseq import _dense, _simd

    gelu = name.startswith("gelu")
    function = (lambda x: _dense.activation_forward(x, name, 1)) if gelu else getattr(_simd, name)
    found, where = -1.0, 0.0
    wrong: list[float] = []
    started = shown = time.monotonic()
    for first in range(0, 2 * FINITE, BLOCK):
        sign, pattern = divmod(first, FINITE)
        x = np.arange(pattern, pattern + BLOCK, dtype=np.uint32)
        x |= np.uint32(sign << 31)
        x = x.view(np.float32)
        y = function(x)
        ends = [0, -1]
        if gelu and pattern > SIXTEEN:
            # x, or next to nothing.
            away = np.abs(y - (0 if sign else x)) > 2.0**-46 * np.abs(x)
            wrong += [float(value) for value in x[away][:1]]
            continue
        if (y.view(np.uint32) == y.view(np.uint32)[0]).all():
            # The true function never turns back, so a constant is furthest off at one of the ends.
            x, y = x[ends], y[ends]
        elif name == "tanh" and sign and (y == -function(-x)).all():
            continue  # what it is for the positive ones, of which all were seen
        wide = x.astype(np.float64)
        error = ulp.errors(y, ulp.exact(name, wide), np.abs(wide) * 2.0**-24 if gelu else 0)
        broken = np.isinf(error)
        if broken.any():
            wrong += [float(x[broken].min()), float(x[broken].max())]
            error[broken] = 0
        at = int(error.argmax())
        if error[at] > found:
            found, where = float(error[at]), float(x[at])
        if sys.stderr.isatty() and time.monotonic() > shown + 1:
            shown = time.monotonic()
            share = (first + BLOCK) / (2 * FINITE)
            left = (shown - started) * (1 / share - 1)
            print(f"\r{name}: {share:4.0%}, {left:.0f} s left ", end="", file=sys.stderr)
    return found, where, [min(wrong), max(wrong)] if wrong else []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--function", choices=FUNCTIONS, action="append", help="only this one; may be repeated")
    parser.add_argument("--isa", action="append", help="only this instruction set; may be repeated")
    options = parser.parse_args(arguments)

    from fastseq import _simd

    functions = options.function or FUNCTIONS
    sets = options.isa or _simd.available_reals
    if list(sets) != [_simd.chosen]:
        status = 0
        for isa in sets:
            command = [sys.executable, __file__, "--isa", isa]
            command += [word for name in functions for word in ("--function", name)]
            status |= subprocess.run(command, env={**os.environ, "FASTSEQ_ISA": isa}).returncode
        return 1 if status else 0

    status = 0
    for name in functions:
        found, where, wrong = worst(name)
        print(f"\r{_simd.chosen:10} {name:8} worst {found:.4f} ulp at {where!r} ({where.hex()})", flush=True)
        if wrong:
            print(f"{_simd.chosen:10} {name:8} wrong at {wrong[0]!r} to {wrong[1]!r}", flush=True)
        status |= found > MOST or bool(wrong)
    return status


if __name__ == "__main__":
    sys.exit(main())
