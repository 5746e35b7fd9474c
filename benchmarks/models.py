"""The full-size models that benchmarks run on, from their configurations: no weights are fetched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000))


def vit_b16() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=1000, attn_implementation="sdpa"))


def convnext_t() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(ConvNextConfig(num_labels=1000))


#: name -> (builder, batch size of the step benchmark)
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet50": (resnet50, 8),
    "vit_b16": (vit_b16, 4),
    "convnext_t": (convnext_t, 4),
}


def make(name: str) -> nn.Module:
    """A model in training mode, with the same weights each time."""
    torch.manual_seed(0)
    return MODELS[name][0]().train()


def batch(size: int, resolution: int = 224) -> dict[str, torch.Tensor]:
    """Images ``[size, 3, resolution, resolution]`` and labels."""
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(size, 3, resolution, resolution, generator=generator),
        "labels": torch.randint(0, 1000, (size,), generator=generator),
    }
