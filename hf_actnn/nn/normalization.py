"""Normalisations."""

from torch import nn

from hf_actnn.nn.registry import named

BatchNorm1d, BatchNorm2d, BatchNorm3d, LayerNorm, GroupNorm = named(
    "normalization", nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm
)
InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, RMSNorm = named(
    "normalization", nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.RMSNorm
)
