"""The NumPy reference in float64, which all engines are compared with."""

from __future__ import annotations

from fastseq.bench.engines import own

BUILDERS = own.builders("exact")
