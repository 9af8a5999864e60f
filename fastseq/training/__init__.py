"""How models learn."""

from fastseq.training.flow import gradient_flow

__all__ = ["gradient_flow"]
