"""How the values of a tensor lie in rows, which no group of a code straddles."""

from __future__ import annotations

from functools import lru_cache

import torch

from hf_actnn import codec
from hf_actnn.codec.inplace import inner
from hf_actnn.saving.identity import LAST, SAMPLE
from hf_actnn.saving.policy import Policy

#: A code that does not reach this share of the tensor's own bytes is not worth its error.
WORTHWHILE = 0.75
#: The input of a normalisation is normalised before it is coded where fewer than so many groups of a code fit among the
#: values that share their statistics. Elsewhere nearly every group has values of one spread alone.
GROUPS_OF_ONE_SPREAD = 4


@lru_cache(maxsize=4096)
def row_length(shape: torch.Size, stride: tuple[int, ...], rows: str | None) -> int:
    """Values in a row, which no group straddles: a token, or one sample of a convolution's activation."""
    numel = shape.numel()
    sizes = [size for _, size in sorted(zip(stride, shape, strict=True)) if size > 1]
    if not sizes or numel == 0:
        return max(numel, 1)
    if rows is None:
        rows = SAMPLE if len(shape) >= 4 else LAST
    if rows == SAMPLE:
        return numel // shape[0] if len(shape) > 1 else numel
    return sizes[0]


@lru_cache(maxsize=4096)
def coded_row_length(
    shape: torch.Size, stride: tuple[int, ...], rows: str | None, within: int, itemsize: int, policy: Policy
) -> int:
    """Length of the rows in which a tensor is coded; 0 where a code would not pay."""
    numel = shape.numel()
    if numel < max(policy.min_numel, 1):
        return 0
    length = row_length(shape, stride, rows)
    if length < within:
        length = max(length, length_in_row(shape, stride, within))
    nbytes = codec.packed_nbytes(numel, length, policy.uniform, policy.group_size)
    return 0 if nbytes > WORTHWHILE * numel * itemsize else length


@lru_cache(maxsize=4096)
def length_in_row(shape: torch.Size, stride: tuple[int, ...], within: int) -> int:
    """How much of a row of ``within`` values a view takes in one stretch: the heads of a projection cut into heads are
    one stretch of a token, though each is a dimension of its own. 1 where a stretch would run over a row's end."""
    dims = sorted((step, size) for step, size in zip(stride, shape, strict=True) if size > 1)
    length = 1
    for at, (step, size) in enumerate(dims):
        if step != length or length * size > within:
            return length if all(later % within == 0 for later, _ in dims[at:]) else 1
        length *= size
    return length


def mixes_spreads(shape: torch.Size, stride: tuple[int, ...], channels: int, policy: Policy) -> bool:
    """Whether groups of a code would hold values that are normalised apart from each other; those that are normalised
    together are of so many channels."""
    side_by_side = channels * inner(shape, stride)
    return 0 < side_by_side < GROUPS_OF_ONE_SPREAD * policy.group_size
