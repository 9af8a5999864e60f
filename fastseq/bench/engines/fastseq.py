"""fastseq, compiled."""

from __future__ import annotations

from fastseq.bench.engines import own

BUILDERS = own.builders("fastseq")
