"""What recipes do to a tensor they own, in one pass over it where a compiled kernel can.

Plain torch takes a pass, and a temporary of the tensor's size, for each step; on a CPU these passes are what rebuilding
costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_actnn.codec import ops


def scale_by_mask_(values: Tensor, codes: Tensor, on: float) -> Tensor:
    """Multiply by ``on`` where a mask's bit is set and by 0 elsewhere; nan times 0 stays nan.

    Args:
        values: any shape without gaps, whose storage order is the mask's.
        codes: from :func:`~hf_actnn.codec.pack_mask`.
        on: the factor of the set bits.

    Returns:
        ``values``, changed in place.
    """
    kernels = ops._direct(values) if ops._on_cpu(values) and values.dtype == torch.float32 else None
    if kernels is None:
        flat = values.as_strided((values.numel(),), (1,), values.storage_offset())
        flat.mul_(ops.unpack_mask(codes, values.numel(), on, 0.0, values.dtype))
    else:
        kernels.scale_by_mask(values.data_ptr(), codes.data_ptr(), values.numel(), on, torch.get_num_threads())
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
    channels = values.shape[1]
    inner = _inner(values)
    same = values.dtype == scale.dtype == shift.dtype == torch.float32 and ops._on_cpu(values) and scale.is_cpu
    kernels = ops._direct(values) if same and inner and scale.is_contiguous() and shift.is_contiguous() else None
    if kernels is None:
        view = (1, channels) + (1,) * (values.dim() - 2)
        return values.mul_(scale.view(view)).add_(shift.view(view))
    kernels.affine(
        values.data_ptr(),
        values.numel(),
        channels,
        inner,
        scale.data_ptr(),
        shift.data_ptr(),
        torch.get_num_threads(),
    )
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
    kernels = ops._direct(values) if width and ops._on_cpu(values) else None
    for part in (values, mean, factor, weight, bias):
        if part is not None and not (part.dtype is torch.float32 and ops._on_cpu(part) and part.is_contiguous()):
            kernels = None
    if kernels is None:
        values.sub_(mean).mul_(factor)
        if weight is not None:
            values.mul_(weight)
        return values if bias is None else values.add_(bias)
    kernels.normalize(
        values.data_ptr(),
        values.numel(),
        width,
        mean.data_ptr(),
        factor.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        torch.get_num_threads(),
    )
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
