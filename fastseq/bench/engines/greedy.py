"""Greedy decoding in fastseq, beside its beam search."""

from __future__ import annotations

from fastseq.bench.engines import own

BUILDERS = own.greedy()
