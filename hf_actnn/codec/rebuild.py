"""What was computed of a coded tensor, computed again of its codes in one pass, where a kernel can: on CUDA.

Each stands for decoding followed by plain operations, and gives the same bits, but for activations, whose formula is
torch's, compiled by another compiler. All return None where there is no such kernel: then the two steps do it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_actnn.codec import mixed, ops
from hf_actnn.codec.backward import FUNCTIONS
from hf_actnn.codec.inplace import NARROW, TOO_MANY, inner, is_contiguous
from hf_actnn.codec.packed import PackedTensor


def may_be(packed: PackedTensor) -> bool:
    """Whether there can be kernels for this tensor, whose codes need not be at hand."""
    plain = packed.is_uniform and packed.dtype in NARROW and packed.numel < TOO_MANY
    return plain and not ops._on_cpu(packed.codes)


def possible(packed: PackedTensor) -> bool:
    """Whether there are kernels for this tensor."""
    return may_be(packed) and ops._direct(packed.codes) is not None


def by_channel(
    packed: PackedTensor,
    scale: Tensor,
    shift: Tensor,
    mask: Tensor | None = None,
    on: float = 1.0,
    signs: bool = False,
) -> Tensor | None:
    """``values * scale + shift`` by channel, rounded to the packed tensor's dtype; with a mask, times ``on`` where its
    bit is set and times 0 elsewhere, or with ``signs`` of values that are negative where its bit is not set.

    Args:
        packed: ``[N, C, ...]``, contiguous or in channels_last.
        scale: ``[C]`` fp32, on the same device.
        shift: ``[C]`` fp32.
        mask: codes of a mask in the same storage order; see :func:`~hf_actnn.codec.pack_mask`.

    Returns:
        Flat, in storage order.
    """
    kernels, side_by_side = _kernels(packed, scale, shift), inner(packed.shape, packed.stride)
    if kernels is None or not side_by_side:
        return None
    arguments = (
        scale.data_ptr(),
        shift.data_ptr(),
        scale.numel(),
        side_by_side,
        0 if mask is None else mask.data_ptr(),
        on,
        signs,
    )
    return _made(kernels.rebuild_by_channel, packed, packed.dtype, *arguments)


def by_row(
    packed: PackedTensor, mean: Tensor, factor: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """``(values - mean) * factor * weight + bias`` by row, each step rounded to fp32.

    Args:
        packed: contiguous.
        mean: ``[rows]`` values of fp32, in any shape.
        factor: the same, the reciprocal of the standard deviation.
        weight: as many values as a row has, or None.
        bias: the same.
        dtype: of the result: the packed tensor's, or any narrower one if that is fp32.

    Returns:
        Flat, in storage order.
    """
    rows = mean.numel()
    narrower = packed.dtype == torch.float32 and dtype in NARROW
    if not rows or not (narrower or dtype == packed.dtype) or not is_contiguous(packed.shape, packed.stride):
        return None
    kernels = _kernels(packed, *(one for one in (mean, factor, weight, bias) if one is not None))
    if kernels is None:
        return None
    parameters = (0 if one is None else one.data_ptr() for one in (weight, bias))
    arguments = (ops._CODE[dtype], mean.data_ptr(), factor.data_ptr(), *parameters, packed.numel // rows)
    return _made(kernels.rebuild_by_row, packed, dtype, *arguments)


def activation(packed: PackedTensor, name: str, approximate: str = "none") -> Tensor | None:
    """An activation of the values, ``name`` being "gelu" or "silu" and ``approximate`` as GELU has it. Flat, in storage
    order and the packed tensor's dtype."""
    number = FUNCTIONS.get((name, approximate))
    kernels = None if number is None else _kernels(packed)
    return None if kernels is None else _made(kernels.rebuild_activation, packed, packed.dtype, number)


def _kernels(packed: PackedTensor, *others: Tensor) -> Any:
    """Those of CUDA, where they can read the tensor and what else goes in; else None."""
    codes = packed.codes
    for one in others:
        if one.dtype != torch.float32 or one.device != codes.device or not one.is_contiguous():
            return None
    return ops._direct(codes) if possible(packed) else None


def _made(kernel: Any, packed: PackedTensor, dtype: torch.dtype, *arguments: Any) -> Tensor:
    out = torch.empty(packed.numel, dtype=dtype, device=packed.device)
    cut = (packed.codes.data_ptr(), packed.meta.data_ptr(), packed.numel, packed.row_length, packed.group_size)
    widths: tuple[Any, ...] = (packed.bits, 0, 0, 0)
    if packed.widths is not None:
        room = mixed._room(packed.widths, packed.codes)
        widths = (0, *mixed._places(packed.widths, room))
    ops._launch(kernel, packed.codes, *cut, *widths, ops._CODE[packed.dtype], *arguments, out.data_ptr())
    return out
