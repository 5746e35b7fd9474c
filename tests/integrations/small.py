"""Small models and a small data set, shared by the tests of this folder."""

from __future__ import annotations

import torch
import transformers
from torch.utils.data import Dataset

LABELS = 4


class Pictures(Dataset):
    """Bright squares in one of four corners, on noise: learnable in a few steps, different for every index."""

    def __init__(self, count: int, size: int = 16) -> None:
        generator = torch.Generator().manual_seed(7)
        self.labels = torch.arange(count) % LABELS
        self.pixels = 0.3 * torch.randn(count, 3, size, size, generator=generator)
        half = size // 2
        for index, label in enumerate(self.labels.tolist()):
            top, left = half * (label // 2), half * (label % 2)
            self.pixels[index, :, top : top + half, left : left + half] += 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def make_vit(dropout: float = 0.1, layers: int = 2) -> torch.nn.Module:
    transformers.set_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=16,
            patch_size=4,
            hidden_size=64,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=128,
            hidden_dropout_prob=dropout,
            num_labels=LABELS,
        )
    )


def make_resnet() -> torch.nn.Module:
    transformers.set_seed(0)
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=LABELS
        )
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different
