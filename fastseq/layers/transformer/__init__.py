"""Encoder and decoder of the Transformer: layers made of layers."""

from fastseq.layers.transformer.block import ACTIVATIONS, D_MODEL, FEEDFORWARD, MAX_LAYERS, NHEAD, NORMS
from fastseq.layers.transformer.decoder import TransformerDecoder, TransformerDecoderLayer
from fastseq.layers.transformer.encoder import TransformerEncoder, TransformerEncoderLayer
from fastseq.layers.transformer.transformer import Transformer

__all__ = [
    "ACTIVATIONS",
    "D_MODEL",
    "FEEDFORWARD",
    "MAX_LAYERS",
    "NHEAD",
    "NORMS",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
