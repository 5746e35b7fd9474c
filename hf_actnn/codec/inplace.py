"""What recipes do to a tensor they own, in one pass over it where a compiled kernel can.

Plain torch takes a pass, and on a CPU a temporary of the tensor's size, for each step; these passes are what rebuilding
costs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_actnn.codec import ops

#: Dtypes of values that CUDA's kernels change; on a CPU it is fp32 alone.
NARROW = (torch.float32, torch.float16, torch.bfloat16)
#: Positions are numbers of 32 bits in CUDA's kernels.
TOO_MANY = 2**31


def _kernels(values: Tensor, *others: Tensor) -> Any:
    """Those for a tensor and what else goes in, fp32 without gaps on the same device; else None."""
    on_cpu = ops._on_cpu(values)
    if values.dtype != torch.float32 if on_cpu else values.dtype not in NARROW or values.numel() >= TOO_MANY:
        return None
    for one in others:
        if one.dtype != torch.float32 or one.device != values.device or not one.is_contiguous():
            return None
    return ops._direct(values)


def scale_by_mask_(values: Tensor, codes: Tensor, on: float) -> Tensor:
    """Multiply by ``on`` where a mask's bit is set and by 0 elsewhere; nan times 0 stays nan.

    Args:
        values: any shape without gaps, whose storage order is the mask's.
        codes: from :func:`~hf_actnn.codec.pack_mask`.
        on: the factor of the set bits.

    Returns:
        ``values``, changed in place.
    """
    kernels, numel = _kernels(values), values.numel()
    if kernels is None:
        flat = values.as_strided((numel,), (1,), values.storage_offset())
        flat.mul_(ops.unpack_mask(codes, numel, on, 0.0, values.dtype))
    elif ops._on_cpu(values):
        kernels.scale_by_mask(values.data_ptr(), codes.data_ptr(), numel, on, torch.get_num_threads())
    else:
        arguments = (values.data_ptr(), ops._CODE[values.dtype], codes.data_ptr(), numel, on)
        ops._launch(kernels.scale_by_mask, values, *arguments)
    return values


def channel_affine_(values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``values * scale + shift`` by channel.

    Args:
        values: ``[N, C, ...]``.
        scale: ``[C]``.
        shift: ``[C]``.

    Returns:
        ``values``, changed in place.
    """
    channels, inner = values.shape[1], _inner(values)
    kernels = _kernels(values, scale, shift) if inner else None
    if kernels is None:
        view = (1, channels) + (1,) * (values.dim() - 2)
        return values.mul_(scale.view(view)).add_(shift.view(view))
    cut = (values.numel(), channels, inner, scale.data_ptr(), shift.data_ptr())
    if ops._on_cpu(values):
        kernels.affine(values.data_ptr(), *cut, torch.get_num_threads())
    else:
        ops._launch(kernels.affine, values, values.data_ptr(), ops._CODE[values.dtype], *cut)
    return values


def normalize_(values: Tensor, mean: Tensor, factor: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``(values - mean) * factor * weight + bias`` by row.

    Args:
        values: ``[..., *normalized]``.
        mean: ``[..., 1, 1]``: as many dimensions, of size one where the rows run.
        factor: the same shape, the reciprocal of the standard deviation.
        weight: ``[*normalized]`` or None.
        bias: ``[*normalized]`` or None.

    Returns:
        ``values``, changed in place.
    """
    width = values.numel() // mean.numel() if mean.numel() else 0
    others = [one for one in (mean, factor, weight, bias) if one is not None]
    plain = width and values.dtype == torch.float32 and values.is_contiguous()
    kernels = _kernels(values, *others) if plain else None
    if kernels is None:
        values.sub_(mean).mul_(factor)
        if weight is not None:
            values.mul_(weight)
        return values if bias is None else values.add_(bias)
    parameters = (0 if one is None else one.data_ptr() for one in (weight, bias))
    arguments = (values.data_ptr(), values.numel(), width, mean.data_ptr(), factor.data_ptr(), *parameters)
    if ops._on_cpu(values):
        kernels.normalize(*arguments, torch.get_num_threads())
    else:
        ops._launch(kernels.normalize, values, *arguments)
    return values


def _inner(values: Tensor) -> int:
    """How many values of a channel lie side by side; 0 where storage has no such order, or nothing in it."""
    if values.numel() == 0:
        return 0
    if values.is_contiguous():
        return values[0, 0].numel()
    if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
        return 1
    return 0
