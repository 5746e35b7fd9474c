"""Backward passes of activations that read codes as they are.

They do what autograd's own functions do with the decoded tensor, which is their reference: `threshold_backward`,
`gelu_backward` and `silu_backward` of `torch.ops.aten`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_actnn.codec import mixed, ops, reference
from hf_actnn.codec.packed import PackedTensor

#: Activations that the CUDA kernels know, and their derivatives, by name and the value of `approximate`
#: (csrc/codec.h has the numbers).
FUNCTIONS = {("gelu", "none"): 0, ("gelu", "tanh"): 1, ("silu", "none"): 2}
_NAMES = {torch.ops.aten.gelu_backward.default: "gelu", torch.ops.aten.silu_backward.default: "silu"}


def select_by_mask(x: Tensor, codes: Tensor) -> Tensor:
    """The values where a mask's bit is set, and 0 elsewhere, whatever the value: the backward pass of a ReLU.

    Args:
        x: flat, of a dtype that masks have.
        codes: from :func:`~hf_actnn.codec.pack_mask`, of as many elements.

    Returns:
        Flat, of the same dtype.
    """
    kernels = ops._direct(x)
    if kernels is None:
        return torch.where(ops.unpack_mask(codes, x.numel()), x, torch.zeros((), dtype=x.dtype, device=x.device))
    out = torch.empty_like(x)
    arguments = (x.data_ptr(), ops._CODE[x.dtype], codes.data_ptr(), x.numel(), out.data_ptr())
    ops._launch(kernels.select_by_mask, x, *arguments)
    return out


def mask_part(codes: Tensor, numel: int, start: int, stop: int) -> tuple[Tensor, int, int]:
    """The codes of some elements of a mask, which are those of whole groups.

    Args:
        codes: of a mask of ``numel`` elements.

    Returns:
        Codes that are a mask of their own, and how many elements it has before ``start`` and from ``stop`` on.
    """
    first = start // reference.MASK_GROUP * reference.MASK_GROUP
    last = min(-(-stop // reference.MASK_GROUP) * reference.MASK_GROUP, numel)
    return codes[first // 8 : -(-last // 8)], start - first, last - stop


def activation_backward(function: Any, grad: Tensor, packed: PackedTensor, approximate: str = "none") -> Tensor | None:
    """What ``function(grad, packed.dequantize())`` returns, where a kernel computes it in one pass.

    Args:
        function: the operator, `gelu_backward` or `silu_backward`.
        grad: flat, in the storage order and the dtype of the packed tensor.
        approximate: as GELU has it.

    Returns:
        Flat; None where there is no such kernel, as on a CPU.
    """
    number = FUNCTIONS.get((_NAMES.get(function, ""), approximate))
    kernels = ops._direct(grad) if grad.is_cuda and packed.is_uniform else None
    if number is None or kernels is None:
        return None
    out = torch.empty_like(grad)
    cut = (packed.codes.data_ptr(), packed.meta.data_ptr(), packed.numel, packed.row_length, packed.group_size)
    last = (ops._CODE[grad.dtype], number, grad.data_ptr(), out.data_ptr())
    if packed.widths is None:
        ops._launch(kernels.activation_backward, grad, *cut, packed.bits, *last)
    else:
        places = mixed._places(packed.widths, mixed._room(packed.widths, grad))
        ops._launch(kernels.activation_backward_mixed, grad, *cut, *places, *last)
    return out
