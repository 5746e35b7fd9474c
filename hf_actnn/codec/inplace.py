"""What recipes do to a tensor they own, in one pass over it where a compiled kernel can.

Plain torch takes a pass, and on a CPU a temporary of the tensor's size, for each step; these passes are what rebuilding
costs.
"""

from __future__ import annotations

import math
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


def scale_by_mask_(values: Tensor, codes: Tensor, on: float, off: float = 0.0) -> Tensor:
    """Multiply by ``on`` where a mask's bit is set and by ``off`` elsewhere; nan times 0 stays nan.

    Args:
        values: any shape without gaps, whose storage order is the mask's.
        codes: from :func:`~hf_actnn.codec.pack_mask`.
        on: the factor of the set bits.
        off: that of the others.

    Returns:
        ``values``, changed in place.
    """
    kernels, numel = _kernels(values), values.numel()
    if kernels is None:
        flat = values.as_strided((numel,), (1,), values.storage_offset())
        flat.mul_(ops.unpack_mask(codes, numel, on, off, values.dtype))
    elif ops._on_cpu(values):
        kernels.scale_by_mask(values.data_ptr(), codes.data_ptr(), numel, on, off, torch.get_num_threads())
    else:
        arguments = (values.data_ptr(), ops._CODE[values.dtype], codes.data_ptr(), numel, on, off)
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
    channels, side_by_side = values.shape[1], inner(values.shape, values.stride())
    kernels = _kernels(values, scale, shift) if side_by_side else None
    if kernels is None:
        view = (1, channels) + (1,) * (values.dim() - 2)
        return values.mul_(scale.view(view)).add_(shift.view(view))
    cut = (values.numel(), channels, side_by_side, scale.data_ptr(), shift.data_ptr())
    if ops._on_cpu(values):
        kernels.affine(values.data_ptr(), *cut, torch.get_num_threads())
    else:
        at = values.data_ptr()
        ops._launch(kernels.affine, values, at, ops._CODE[values.dtype], *cut, 0, 1.0, 1.0, at)
    return values


def channel_affine(
    values: Tensor, scale: Tensor, shift: Tensor, codes: Tensor | None = None, off: float = -1.0
) -> Tensor:
    """The same, elsewhere, and rounded once; with a mask, times ``off`` where its bit is not set. One pass on CUDA.

    Args:
        values: ``[N, C, ...]`` without gaps, in any order.
        scale: ``[C]``.
        shift: ``[C]``.
        codes: from :func:`~hf_actnn.codec.pack_mask`, of as many values in storage order.
        off: the factor.

    Returns:
        A new tensor in the order of ``values``.
    """
    channels, side_by_side = values.shape[1], inner(values.shape, values.stride())
    kernels = _kernels(values, scale, shift) if side_by_side and not ops._on_cpu(values) else None
    if kernels is None:
        wide = torch.promote_types(values.dtype, scale.dtype)  # as the kernels do: rounded once, at the end
        made = channel_affine_(values.to(wide, copy=True), scale, shift).to(values.dtype)
        return made if codes is None else scale_by_mask_(made, codes, 1.0, off)
    made = torch.empty_like(values)
    mask = 0 if codes is None else codes.data_ptr()
    cut = (values.numel(), channels, side_by_side, scale.data_ptr(), shift.data_ptr(), mask, 1.0, off)
    ops._launch(kernels.affine, values, values.data_ptr(), ops._CODE[values.dtype], *cut, made.data_ptr())
    return made


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


def is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether a tensor of these sizes lies in memory as it is written, without gaps."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def inner(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many values of a channel, the second dimension, lie side by side, after them those of the next; 0 where there
    is no such order, or nothing."""
    if len(shape) < 2 or 0 in shape:
        return 0
    if is_contiguous(shape, stride):
        return math.prod(shape[2:])
    last = (0, *range(2, len(shape)), 1)
    return 1 if is_contiguous(tuple(shape[i] for i in last), tuple(stride[i] for i in last)) else 0
