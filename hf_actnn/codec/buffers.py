"""Recycles the CPU buffers that dequantised tensors live in."""

from __future__ import annotations

import torch
from torch import Tensor


def empty(numel: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised flat CPU tensor."""
    return torch.empty(numel, dtype=dtype)


def release() -> None:
    """Free every buffer that nobody uses."""
