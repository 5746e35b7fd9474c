"""A tensor in a few bits per element, and back, with its shape and strides."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_actnn.codec import ops, reference
from hf_actnn.errors import CodecError, message


class Code(NamedTuple):
    """How flat values become codes and come back. Register one in :data:`CODES` to use it by name."""

    #: (flat, bits, row_length, group_size, seed, stream) -> codes, meta, number of groups to keep exact
    quantize: Callable[..., tuple[Tensor, Tensor, Tensor | int]]
    #: (codes, meta, bits, row_length, group_size, numel, dtype) -> flat
    dequantize: Callable[..., Tensor]


#: Codes by name. "uniform": equal steps between a group's minimum and maximum, as in ActNN.
CODES: dict[str, Code] = {"uniform": Code(ops.quantize, ops.dequantize)}


class PackedTensor:
    """A tensor kept as codes: what :func:`quantize` returns.

    Attributes:
        code: name in :data:`CODES`.
        codes: ``[nbytes]`` uint8, planes of each group in storage order.
        meta: ``[n_groups, 2]`` bf16, a group's minimum and step.
        bits: width of a code.
        group_size: the most elements that share minimum and step.
        row_length: elements of a row, which no group straddles.
        shape, stride, dtype, device: of the tensor that comes back.
        patch: None, or the groups that are kept exact: their indices ``[P]`` int64 and their values, one group after
            the other.
    """

    __slots__ = (
        "__weakref__",
        "bits",
        "code",
        "codes",
        "device",
        "dtype",
        "group_size",
        "meta",
        "patch",
        "row_length",
        "shape",
        "stride",
    )

    def __init__(
        self,
        codes: Tensor,
        meta: Tensor,
        *,
        bits: int,
        group_size: int,
        row_length: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype,
        patch: tuple[Tensor, Tensor] | None = None,
        code: str = "uniform",
    ) -> None:
        self.code = code
        self.codes = codes
        self.meta = meta
        self.bits = bits
        self.group_size = group_size
        self.row_length = row_length
        self.shape = shape
        self.stride = stride
        self.dtype = dtype
        self.device = codes.device
        self.patch = patch

    @property
    def numel(self) -> int:
        """Number of elements."""
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def nbytes(self) -> int:
        """Every byte held: codes, metadata and groups kept exact."""
        held = self.codes.nbytes + self.meta.nbytes
        return held if self.patch is None else held + self.patch[0].nbytes + self.patch[1].nbytes

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, in the original shape and strides.

        Args:
            dtype: floating dtype of the result; by default that of the tensor quantised.
        """
        dtype = self.dtype if dtype is None else dtype
        flat = CODES[self.code].dequantize(
            self.codes, self.meta, self.bits, self.row_length, self.group_size, self.numel, dtype
        )
        if self.patch is not None:
            groups, values = self.patch
            flat[_positions(groups, self.numel, self.row_length, self.group_size)] = values.to(dtype)
        return flat.as_strided(self.shape, self.stride)

    def __repr__(self) -> str:
        exact = "" if self.patch is None else f", {len(self.patch[0])} groups exact"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"PackedTensor(shape={tuple(self.shape)}, {dtype}, {self.device}, {self.code} {self.bits} bits, "
            f"groups of {self.group_size} in rows of {self.row_length}, {self.nbytes} bytes{exact})"
        )


def _positions(groups: Tensor, numel: int, row_length: int, group_size: int) -> Tensor:
    """Flat positions of every element of the groups with these indices, in order."""
    at = reference.layout(numel, row_length, 1, group_size)
    k = at.groups_per_row
    start = (groups // k) * row_length + (groups % k) * at.group
    size = torch.where(groups % k == k - 1, at.tail, at.group)
    first = torch.repeat_interleave(start - (size.cumsum(0) - size), size)
    return first + torch.arange(first.numel(), device=groups.device)


def _dense(x: Tensor) -> Tensor:
    """``x`` itself if its elements fill a block of memory once, else a copy with the same order of strides that
    does.
    """
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return x.clone()  # preserve_format: dense, dimensions in the same order
        expected *= size
    return x


def _count(exact: Tensor | int) -> int:
    """How many groups to keep exact, where that can be read for nothing; elsewhere they come back as nan."""
    if isinstance(exact, int):
        return exact
    readable = exact.device.type == "cpu" and type(exact) is Tensor and not torch.compiler.is_compiling()
    return int(exact) if readable else 0


@lru_cache(maxsize=4096)
def default_row_length(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Rows that groups stay within: a sample of an image batch (4 or more dimensions), else the innermost dimension.

    "Innermost" and "sample" mean the order in storage; dimensions of size one count for neither, except that a batch of
    one is one sample.
    """
    numel = 1
    for size in shape:
        numel *= size
    order = [size for _, size in sorted((s, n) for s, n in zip(stride, shape, strict=True) if n != 1)]
    if numel == 0 or not order:
        return numel
    if len(shape) < 4:
        return order[0]
    return numel if shape[0] == 1 else numel // order[-1]


def quantize(
    x: Tensor,
    bits: int,
    group_size: int = 256,
    seed: int = 0,
    stream: int = 0,
    row_length: int | None = None,
    code: str = "uniform",
) -> PackedTensor:
    """Keep a tensor in ``bits`` bits per element; its expectation over seeds is the tensor itself.

    Args:
        x: floating point, any shape and strides. A tensor without gaps is read where it lies, in storage order.
        bits: 1 to 8.
        group_size: the most elements that share a minimum and a step, 1 to 4096. 256 costs 1/8 bit per element.
        seed: key of the dither, any integer (its low 64 bits count).
        stream: sequence under that key; give every tensor its own.
        row_length: elements of a row in storage order, which no group straddles. By default one sample of a tensor of
            four or more dimensions, else the innermost dimension in storage.
        code: name in :data:`CODES`.

    Returns:
        The packed tensor. On a CPU, groups with values from 2^126 on are kept exact; on other devices, where finding
        out would stall the device, they come back as nan.
    """
    if x.dtype not in ops.FLOATS:
        raise CodecError(
            message(
                "Only floating-point tensors are quantised",
                where="x",
                expected=ops._names(ops.FLOATS),
                received=str(x.dtype),
                next_step="Use pack_mask for booleans and pack_uint for small integers, or keep the tensor exact",
            )
        )
    if code not in CODES:
        raise CodecError(
            message(
                "No such code",
                where="code",
                expected=", ".join(CODES),
                received=repr(code),
                next_step="Add it to hf_actnn.codec.CODES",
            )
        )
    if x.requires_grad:
        x = x.detach()
    contiguous = x.is_contiguous()
    if not contiguous:
        x = _dense(x)
    shape, stride, numel = x.shape, x.stride(), x.numel()
    if row_length is None:
        row_length = default_row_length(shape, stride)
    flat = x.view(-1) if contiguous else x.as_strided((numel,), (1,), x.storage_offset())
    codes, meta, exact = CODES[code].quantize(flat, bits, row_length, group_size, seed, stream)
    patch = None
    if _count(exact):
        groups = (meta[:, 1] == reference.EXACT_STEP).nonzero().view(-1)
        patch = (groups, flat[_positions(groups, numel, row_length, group_size)])
    return PackedTensor(
        codes,
        meta,
        bits=bits,
        group_size=group_size,
        row_length=row_length,
        shape=shape,
        stride=stride,
        dtype=x.dtype,
        patch=patch,
        code=code,
    )


def packed_nbytes(numel: int, row_length: int, bits: int, group_size: int = 256) -> int:
    """Bytes that :func:`quantize` keeps for a tensor, codes and metadata."""
    at = ops.plan(numel, row_length, bits, group_size)
    return at.nbytes + 4 * at.n_groups
