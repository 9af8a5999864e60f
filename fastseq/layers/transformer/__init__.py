"""Encoder and decoder of the Transformer: layers made of layers."""

from fastseq.layers.transformer.block import ACTIVATIONS, MAX_LAYERS, NORMS
from fastseq.layers.transformer.decoder import TransformerDecoder, TransformerDecoderLayer
from fastseq.layers.transformer.encoder import TransformerEncoder, TransformerEncoderLayer
from fastseq.layers.transformer.transformer import Transformer

__all__ = [
    "ACTIVATIONS",
    "MAX_LAYERS",
    "NORMS",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
