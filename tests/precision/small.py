"""A small network and what the tests of adaptive bits ask of it: steps, gradients, bytes, and the codes themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_actnn
from hf_actnn.codec import PackedTensor
from hf_actnn.precision.controller import Controller
from hf_actnn.saving import scope
from hf_actnn.saving.kept import Quantized

LABELS = 8


def net(deeper: int = 0) -> nn.Sequential:
    """Five kept tensors and ``deeper`` more, in groups whose codes fill whole bytes at any width."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()),
        *(nn.Linear(512, 64), nn.GELU()),
        *(layer for _ in range(deeper) for layer in (nn.Linear(64, 64), nn.GELU())),
        nn.Linear(64, LABELS),
    ).train()


def batch(count: int = 16, seed: int = 0, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, size, size, generator=generator)
    return x, torch.randint(0, LABELS, (count,), generator=generator)


def adaptive(model: nn.Module | None = None, **settings: Any) -> tuple[nn.Module, Controller]:
    """A converted network, L3 and an update in every step unless said otherwise, and its controller."""
    settings = {"level": "L3", "update_interval": 1, "min_numel": 64, **settings}
    model = hf_actnn.convert(net() if model is None else model, **settings)
    return model, hf_actnn.controller(model)


def backward(model: nn.Module, count: int = 16, seed: int = 0, scale: float = 1.0, **kwargs: Any) -> Tensor:
    """Forward and backward pass; the gradient as one vector."""
    x, y = batch(count, seed)
    model.zero_grad()
    (F.cross_entropy(model(x, **kwargs), y) * scale).backward()
    return gradient(model)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def train(model: nn.Module, controller: Controller, steps: range, count: int = 16, lr: float = 0.05) -> list[Tensor]:
    """Plain gradient descent, a new batch per step; the gradients."""
    found = []
    for step in steps:
        found.append(backward(model, count, step))
        controller.step()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= lr * p.grad
    return found


def held(model: nn.Module, count: int, seed: int = 0, size: int = 16) -> int:
    """Bytes kept for one backward pass."""
    x, y = batch(count, seed, size)
    with hf_actnn.track_memory(model) as memory:
        F.cross_entropy(model(x), y).backward()
    return memory.saved_bytes


class _Codes:
    def __init__(self) -> None:
        self.found: dict[str, PackedTensor] = {}

    def saved(self, slot: Any, tensor: Tensor, path: str, function: str) -> None:
        for leaf in slot.kept.leaves():
            if isinstance(leaf, Quantized):
                self.found[leaf.name] = leaf.packed

    def copied(self, kept: Any, path: str) -> None: ...


def codes(run: Callable[[], Any]) -> dict[str, PackedTensor]:
    """The codes that a forward pass makes, by the names that the controller gives the tensors."""
    watching = _Codes()
    scope.observers().append(watching)
    try:
        run()
    finally:
        scope.observers().remove(watching)
    return watching.found


def widths(packed: PackedTensor, samples: int) -> Tensor:
    """``[S]`` bits of each sample."""
    return torch.full((samples,), packed.bits) if packed.widths is None else packed.widths.long()
