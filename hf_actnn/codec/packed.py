"""A tensor in a few bits per element, and back, with its shape and strides."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_actnn.codec import mixed, ops, reference
from hf_actnn.errors import CodecError, message


class Code(NamedTuple):
    """How flat values become codes and come back. Register one in :data:`CODES` to use it by name."""

    #: (flat, bits, row_length, group_size, seed, stream) -> codes, meta, number of groups to keep exact, where known;
    #: advance, a tensor, is passed by name where there is one
    quantize: Callable[..., tuple[Tensor, Tensor, Tensor | int | None]]
    #: (codes, meta, bits, row_length, group_size, numel, dtype) -> flat
    dequantize: Callable[..., Tensor]
    #: The same with widths ``[samples]`` in place of bits, where the code has such a thing.
    quantize_mixed: Callable[..., tuple[Tensor, Tensor, Tensor | int | None]] | None = None
    dequantize_mixed: Callable[..., Tensor] | None = None


#: Codes by name. "uniform": equal steps between a group's minimum and maximum, as in ActNN.
CODES: dict[str, Code] = {"uniform": Code(ops.quantize, ops.dequantize, mixed.quantize, mixed.dequantize)}


class PackedTensor:
    """A tensor kept as codes: what :func:`quantize` returns.

    Attributes:
        code: name in :data:`CODES`.
        codes: ``[nbytes]`` uint8, planes of each group in storage order.
        meta: ``[n_groups, 2]`` bf16, a group's minimum and step.
        bits: width of a code; with widths, their mean.
        widths: None, or the width of each sample's codes: ``[samples]`` uint8 on the CPU.
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
        "widths",
    )

    def __init__(
        self,
        codes: Tensor,
        meta: Tensor,
        *,
        bits: int | float,
        group_size: int,
        row_length: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype,
        patch: tuple[Tensor, Tensor] | None = None,
        code: str = "uniform",
        widths: Tensor | None = None,
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
        self.widths = widths

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Every byte held: codes, metadata, widths and groups kept exact."""
        held = self.codes.nbytes + self.meta.nbytes + (0 if self.widths is None else self.widths.nbytes)
        return held if self.patch is None else held + self.patch[0].nbytes + self.patch[1].nbytes

    def holding(self, codes: Tensor, meta: Tensor) -> PackedTensor:
        """The same with these codes and metadata, wherever they are, in place of its own."""
        twin = copy.copy(self)
        twin.codes, twin.meta = codes, meta
        return twin

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, in the original shape and strides.

        Args:
            dtype: floating dtype of the result; by default that of the tensor quantised.
        """
        dtype = self.dtype if dtype is None else dtype
        code = CODES[self.code]
        back, bits = (code.dequantize, self.bits) if self.widths is None else (code.dequantize_mixed, self.widths)
        assert back is not None  # quantize refuses widths otherwise
        flat = back(self.codes, self.meta, bits, self.row_length, self.group_size, self.numel, dtype)
        if self.patch is not None:
            groups, values = self.patch
            flat[_positions(groups, self.numel, self.row_length, self.group_size)] = values.to(dtype)
        return flat.as_strided(self.shape, self.stride)

    @property
    def layout(self) -> reference.Layout:
        """Where groups lie among the values; its sizes in bytes are those of one bit."""
        return ops.plan(self.numel, self.row_length, 1, self.group_size)

    @property
    def is_uniform(self) -> bool:
        """Whether all of it is in codes of equal steps, and no group is kept exact."""
        return self.patch is None and self.code == "uniform"

    @property
    def unit(self) -> int:
        """Elements of which :meth:`part` gives any number in a row: a row, or a sample where widths differ. 0 where
        there are only the values of the whole."""
        if not self.is_uniform:
            return 0
        return self.row_length if self.widths is None else self.numel // self.widths.numel()

    def part(self, start: int, stop: int) -> Tensor:
        """Some of the values in storage order: one dimension. Both ends are multiples of :attr:`unit`."""
        length = self.row_length
        before: Any = self.bits
        bits: Any = self.bits
        if self.widths is not None:
            first, last = start // self.unit, stop // self.unit
            before, bits = self.widths[:first], self.widths[first:last]
        skipped, here = self._plan(start, before), self._plan(stop - start, bits)
        at, group = skipped.nbytes, skipped.n_groups
        codes, meta = self.codes[at : at + here.nbytes], self.meta[group : group + here.n_groups]
        back: Any = ops.dequantize if self.widths is None else mixed.dequantize
        return back(codes, meta, bits, length, self.group_size, stop - start, self.dtype)

    def _plan(self, numel: int, bits: Any) -> reference.Layout:
        """Where some of the groups lie: the first of the tensor, or any from a sample's first on."""
        plan: Any = mixed.plan if numel and isinstance(bits, Tensor) else ops.plan
        return plan(numel, self.row_length, bits if numel else 1, self.group_size)

    def __repr__(self) -> str:
        exact = "" if self.patch is None else f", {len(self.patch[0])} groups exact"
        dtype = str(self.dtype).removeprefix("torch.")
        bits = f"{self.bits} bits"
        if self.widths is not None:
            bits = f"{self.bits:.4g} bits on average over {self.widths.numel()} samples"
        return (
            f"PackedTensor(shape={tuple(self.shape)}, {dtype}, {self.device}, {self.code} {bits}, "
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


def flatten(x: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """The values in storage order ``[numel]``, and the shape and strides that they then have. Copies only a tensor that
    has gaps or overlaps."""
    if x.is_contiguous():
        return x.view(-1), x.shape, x.stride()
    x = _dense(x)
    return x.as_strided((x.numel(),), (1,), x.storage_offset()), x.shape, x.stride()


def _count(exact: Tensor | int | None) -> int:
    """How many groups to keep exact, where that can be read for nothing; elsewhere they come back as nan."""
    if exact is None or isinstance(exact, int):
        return exact or 0
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
    bits: int | Tensor,
    group_size: int = 256,
    seed: int = 0,
    stream: int = 0,
    row_length: int | None = None,
    code: str = "uniform",
    advance: Tensor | None = None,
) -> PackedTensor:
    """Keep a tensor in ``bits`` bits per element; its expectation over seeds is the tensor itself.

    Args:
        x: floating point, any shape and strides. A tensor without gaps is read where it lies, in storage order.
        bits: 1 to 8, or widths: a uint8 tensor ``[samples]`` on the CPU with one such number for each of as many equal,
            consecutive parts of the tensor in storage order, none of which cuts a row. What comes back is then, sample
            by sample, what the call with that number gives.
        group_size: the most elements that share a minimum and a step, 1 to 4096. 256 costs 1/8 bit per element.
        seed: key of the dither, any integer (its low 64 bits count).
        stream: sequence under that key; give every tensor its own.
        row_length: elements of a row in storage order, which no group straddles. By default one sample of a tensor of
            four or more dimensions, else the innermost dimension in storage.
        code: name in :data:`CODES`.
        advance: None, or one int64 on the device of ``x`` that is added to ``stream`` when the values are coded. A
            CUDA graph that captures this call and counts there draws other numbers in each replay.

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
    flat, shape, stride = flatten(x)
    if row_length is None:
        row_length = default_row_length(shape, stride)
    widths = None
    more = {} if advance is None else {"advance": advance}
    if isinstance(bits, Tensor):
        to_codes = CODES[code].quantize_mixed
        if to_codes is None:
            raise CodecError(
                message(
                    "This code has one width for all samples",
                    where="bits",
                    expected="an integer from 1 to 8",
                    received=f"a tensor of {bits.numel()} widths",
                    next_step=f"Register {code!r} with quantize_mixed and dequantize_mixed, or pass an integer",
                )
            )
        codes, meta, exact = to_codes(flat, bits, row_length, group_size, seed, stream, **more)
        widths = mixed.owned(bits)
        width: int | float = sum(bits.tolist()) / bits.numel()
    else:
        codes, meta, exact = CODES[code].quantize(flat, bits, row_length, group_size, seed, stream, **more)
        width = bits
    patch = None
    if _count(exact):
        groups = (meta[:, 1] == reference.EXACT_STEP).nonzero().view(-1)
        patch = (groups, flat[_positions(groups, flat.numel(), row_length, group_size)])
    return PackedTensor(
        codes,
        meta,
        bits=width,
        group_size=group_size,
        row_length=row_length,
        shape=shape,
        stride=stride,
        dtype=x.dtype,
        patch=patch,
        code=code,
        widths=widths,
    )


def packed_nbytes(numel: int, row_length: int, bits: int | Tensor, group_size: int = 256) -> int:
    """Bytes that :func:`quantize` keeps for a tensor: codes, metadata and, where ``bits`` are widths, these."""
    if isinstance(bits, Tensor):
        at = mixed.plan(numel, row_length, bits, group_size)
        return at.nbytes + 4 * at.n_groups + bits.numel()
    at = ops.plan(numel, row_length, bits, group_size)
    return at.nbytes + 4 * at.n_groups
