"""The NumPy reference, in float32."""

from __future__ import annotations

from fastseq.bench.engines import own

BUILDERS = own.builders("reference")
