"""The codec inside compiled graphs: one tensor of bytes for one tensor kept, by operators no compiler looks into.

What a partitioner could see through it would compute again in the backward pass instead of keeping the bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_actnn.codec import ops, packed, reference

_ANY_LAYOUT = (torch.Tag.flexible_layout,)
_library = torch.library.Library("hf_actnn", "FRAGMENT")


def _operator(schema: str, kernel, fake, tags: tuple[torch.Tag, ...] = ()) -> None:
    name = schema.partition("(")[0]
    _library.define(schema, tags=tags)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_actnn::{name}", fake, lib=_library)


def _in_order(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The values in the order of the strides a tensor had when it was traced: compilers lay it out as they like."""
    if x.stride() != tuple(stride):
        x = torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)
    return packed.flatten(x)[0]


def _keep(x, stride, bits, row_length, group_size, seed, index, step):
    flat = _in_order(x, stride)
    codes, meta, _ = ops.quantize(flat, bits, row_length, group_size, seed, index, step)
    return torch.cat([codes, meta.view(torch.uint8).view(-1)])


def _keep_fake(x, stride, bits, row_length, group_size, seed, index, step):
    at = reference.layout(x.numel(), row_length, bits, group_size)
    return x.new_empty(at.nbytes + 4 * at.n_groups, dtype=torch.uint8)


def _give_back(kept, bits, row_length, group_size, size, stride, dtype):
    numel = math.prod(size)
    at = ops.plan(numel, row_length, bits, group_size)
    # A copy of the metadata, which may lie at an odd address behind the codes.
    meta = kept[at.nbytes :].clone().view(torch.bfloat16).view(at.n_groups, 2)
    return ops.dequantize(kept[: at.nbytes], meta, bits, row_length, group_size, numel, dtype).as_strided(size, stride)


def _give_back_fake(kept, bits, row_length, group_size, size, stride, dtype):
    return kept.new_empty_strided(size, stride, dtype=dtype)


def _keep_mask(x, stride):
    return ops.pack_mask(_in_order(x, stride), "nonzero")


def _keep_mask_fake(x, stride):
    return x.new_empty(reference.uint_nbytes(x.numel(), 1), dtype=torch.uint8)


def _give_mask_back(kept, size, stride):
    return ops.unpack_mask(kept, math.prod(size)).as_strided(size, stride)


def _give_mask_back_fake(kept, size, stride):
    return kept.new_empty_strided(size, stride, dtype=torch.bool)


_operator(
    "keep(Tensor x, SymInt[] stride, int bits, SymInt row_length, int group_size, int seed, int index, Tensor step) "
    "-> Tensor",
    _keep,
    _keep_fake,
    _ANY_LAYOUT,
)
_operator(
    "give_back(Tensor kept, int bits, SymInt row_length, int group_size, SymInt[] size, SymInt[] stride, "
    "ScalarType dtype) -> Tensor",
    _give_back,
    _give_back_fake,
)
_operator("keep_mask(Tensor x, SymInt[] stride) -> Tensor", _keep_mask, _keep_mask_fake, _ANY_LAYOUT)
_operator(
    "give_mask_back(Tensor kept, SymInt[] size, SymInt[] stride) -> Tensor", _give_mask_back, _give_mask_back_fake
)
