"""How models learn: optimisers, gradient clipping, schedules, data, the trainer, checkpoints."""

from fastseq.training import metrics
from fastseq.training.checkpoints import load_checkpoint, save_checkpoint
from fastseq.training.clipping import clip_grad_norm, clip_grad_value
from fastseq.training.data import Batch, PaddedBatches, PairedBatches, Streams, TextWindows, Windows
from fastseq.training.flow import gradient_flow
from fastseq.training.history import History
from fastseq.training.optimisers import SGD, Adam, AdamW, RMSProp
from fastseq.training.schedules import ConstantSchedule, CosineSchedule, PlateauSchedule, StepSchedule
from fastseq.training.trainer import DivergenceError, StepInfo, fit

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Batch",
    "ConstantSchedule",
    "CosineSchedule",
    "DivergenceError",
    "History",
    "PaddedBatches",
    "PairedBatches",
    "PlateauSchedule",
    "RMSProp",
    "StepInfo",
    "StepSchedule",
    "Streams",
    "TextWindows",
    "Windows",
    "clip_grad_norm",
    "clip_grad_value",
    "fit",
    "gradient_flow",
    "load_checkpoint",
    "metrics",
    "save_checkpoint",
]
