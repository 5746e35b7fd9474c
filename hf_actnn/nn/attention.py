"""Attention and the transformer layers built on it."""

from torch import nn

from hf_actnn.nn.registry import named

MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer = named(
    "attention", nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
)
