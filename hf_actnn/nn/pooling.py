"""Pooling."""

from torch import nn

from hf_actnn.nn.registry import named

MaxPool1d, MaxPool2d, MaxPool3d = named("pooling", nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AvgPool1d, AvgPool2d, AvgPool3d = named("pooling", nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
AdaptiveAvgPool1d, AdaptiveAvgPool2d, AdaptiveAvgPool3d = named(
    "pooling", nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d
)
AdaptiveMaxPool1d, AdaptiveMaxPool2d, AdaptiveMaxPool3d = named(
    "pooling", nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d
)
