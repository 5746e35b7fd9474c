"""The values of a tensor as they lie in memory, and whether there are more than two."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_actnn.saving.kept import fills_its_memory


def flat_storage(tensor: Tensor) -> Tensor | None:
    """The values of a dense tensor in storage order, as a flat view; None where it has gaps or overlaps."""
    if not fills_its_memory(tensor):
        return None
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def without_repeats(tensor: Tensor) -> Tensor:
    """A view of an expanded tensor in which each value of its memory stands once."""
    steps = tensor.stride()
    if 0 not in steps:
        return tensor
    shape = [1 if step == 0 else size for step, size in zip(steps, tensor.shape, strict=True)]
    return tensor.as_strided(shape, steps, tensor.storage_offset())


class Split(NamedTuple):
    """A tensor of two values: where it holds ``on``; elsewhere it holds ``off``."""

    upper: Tensor
    on: float
    off: float


_AS_INTEGERS = {
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float64: torch.int64,
}


def two_values(flat: Tensor) -> Split | None:
    """How a flat tensor splits in two values; None where it does not, or where to tell would stall its device.

    Bits are compared: zeros of both signs are two values.
    """
    if flat.dtype == torch.bool:
        return Split(flat, 1.0, 0.0)
    integers = _AS_INTEGERS.get(flat.dtype)
    if integers is None or flat.device.type != "cpu":
        return None
    bits = flat.view(integers)
    least, most = bits.aminmax()
    upper = bits == most
    if not bool((upper | (bits == least)).all()):
        return None
    on, off = most.view(flat.dtype).item(), least.view(flat.dtype).item()
    return None if math.isnan(on) or math.isnan(off) else Split(upper, on, off)  # there are many kinds of nan
