"""Codes whose width differs from sample to sample, as operators: ``quantize_mixed`` and ``dequantize_mixed``.

A sample is one of ``S`` equal, consecutive parts of the flat tensor, and ``widths`` ``[S]`` holds the bits of each
one's codes. It stays on the CPU whatever the device, so that the size of the buffer is known before anything is
computed. An operator cannot read it where it is traced: hence the argument ``nbytes``. Otherwise as in ``ops.py``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_actnn.codec import ops, reference

# --------------------------------------------------------------------------- checks


def check_samples(numel: int, samples: int, row_length: int, where: str) -> None:
    """Raise unless ``samples`` equal parts, each of whole rows, make up ``numel`` elements."""
    whole = isinstance(samples, int) and not isinstance(samples, bool) and samples >= 1
    if not whole or numel % samples != 0 or (numel and numel // samples % row_length != 0):
        ops._fail(
            "The samples do not fill the tensor",
            where=where,
            expected=f"a number of samples that cuts {numel} elements into equal parts of whole rows of {row_length}",
            received=f"{samples!r} samples",
            next_step="Pass one width per sample, and a row_length that no sample cuts",
        )


@lru_cache(maxsize=4096, typed=True)
def _plan(numel: int, row_length: int, widths: bytes, group_size: int) -> reference.Layout:
    """The layout of a uniform call, whose groups are the same, with the mixed call's ``nbytes``; or an error."""
    for bits in set(widths):
        ops.check_bits(bits)
    at = ops.plan(numel, row_length, 1, group_size)
    check_samples(numel, len(widths), row_length, "widths")
    sizes = reference.sample_nbytes(numel // len(widths), row_length, group_size)
    return at._replace(nbytes=sum(sizes[bits] for bits in widths))


def plan(numel: int, row_length: int, widths: Tensor, group_size: int) -> reference.Layout:
    """Where the groups of a tensor coded in these widths lie, and how many bytes all codes take.

    The sizes in bytes of one group or row mean nothing here: they differ from sample to sample.
    """
    _check_widths(widths)
    return _plan(numel, row_length, bytes(widths.tolist()), group_size)


def _check_widths(widths: Tensor) -> None:
    if widths.dtype != torch.uint8 or widths.device.type != "cpu" or widths.dim() != 1 or widths.numel() == 0:
        ops._fail(
            "These are no widths",
            where="widths",
            expected="a uint8 tensor of shape [samples] on the CPU, with at least one element",
            received=f"{widths.dtype} of shape {tuple(widths.shape)} on {widths.device}",
            next_step="Pass one width from 1 to 8 per sample, or an integer for all of them",
        )


def _check_quantize(
    x: Tensor,
    widths: Tensor,
    row_length: int,
    group_size: int,
    advance: Tensor | None,
    nbytes: int | None = None,
):
    ops._check_flat(x, "x", ops.FLOATS)
    ops._check_advance(advance, x)
    at = plan(x.numel(), row_length, widths, group_size)
    if nbytes is not None and nbytes != at.nbytes:
        ops._fail(
            "The buffer does not fit the widths",
            where="nbytes",
            expected=str(at.nbytes),
            received=str(nbytes),
            next_step="Pass the nbytes of hf_actnn.codec.mixed.plan for these widths",
        )
    return at


def _check_dequantize(
    codes: Tensor, meta: Tensor, widths: Tensor, row_length: int, group_size: int, numel: int, dtype: torch.dtype
) -> None:
    ops._check_coded(codes, meta, plan(numel, row_length, widths, group_size), dtype)


# --------------------------------------------------------------------------- kernels behind the operators


def _room(widths: Tensor, beside: Tensor) -> Tensor | None:
    """Room for where each sample's codes begin, which CUDA's kernels look up."""
    return None if ops._on_cpu(beside) else torch.empty(widths.numel(), dtype=torch.int64, device=beside.device)


def _places(widths: Tensor, room: Tensor | None) -> tuple[int, ...]:
    """The widths as a kernel takes them."""
    samples = (widths.data_ptr(), widths.numel())
    return samples if room is None else (*samples, room.data_ptr())


def _native_quantize(
    kernels: Any,
    x: Tensor,
    at: reference.Layout,
    widths: Tensor,
    row_length: int,
    group_size: int,
    seed: int,
    stream: int,
    advance: Tensor | None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, int | None]:
    widths, room = widths.contiguous(), _room(widths, x)
    codes, meta = ops._room(at, x)
    exact = ops._launch(
        kernels.quantize_mixed,
        x,
        x.data_ptr(),
        ops._CODE[x.dtype],
        x.numel(),
        row_length,
        group_size,
        *_places(widths, room),
        *ops._draw(x, seed, stream, advance),
        *ops._coded(codes, meta, count),
    )
    return codes, meta, exact


def _native_dequantize(
    kernels: Any,
    codes: Tensor,
    meta: Tensor,
    widths: Tensor,
    row_length: int,
    group_size: int,
    numel: int,
    dtype: torch.dtype,
) -> Tensor:
    widths, room = widths.contiguous(), _room(widths, codes)
    out = ops._empty(numel, dtype, codes)
    ops._launch(
        kernels.dequantize_mixed,
        codes,
        codes.data_ptr(),
        meta.data_ptr(),
        numel,
        row_length,
        group_size,
        *_places(widths, room),
        ops._CODE[dtype],
        out.data_ptr(),
    )
    return out


# --------------------------------------------------------------------------- operators


def _quantize_compiled(x, widths, row_length, group_size, nbytes, seed, stream, advance=None):
    at = _check_quantize(x, widths, row_length, group_size, advance, nbytes)
    kernels = ops._kernels(x)
    if kernels is None:
        return reference.quantize_mixed(x, widths, row_length, group_size, seed, stream, advance)
    count = None if ops._on_cpu(x) else torch.zeros(1, dtype=torch.int32, device=x.device)
    codes, meta, exact = _native_quantize(kernels, x, at, widths, row_length, group_size, seed, stream, advance, count)
    return codes, meta, torch.tensor([exact], dtype=torch.int32) if count is None else count


def _quantize_elsewhere(x, widths, row_length, group_size, nbytes, seed, stream, advance=None):
    _check_quantize(x, widths, row_length, group_size, advance, nbytes)
    return reference.quantize_mixed(x, widths, row_length, group_size, seed, stream, advance)


def _quantize_fake(x, widths, row_length, group_size, nbytes, seed, stream, advance=None):
    at = reference.layout(x.numel(), row_length, 1, group_size)
    return (
        x.new_empty(nbytes, dtype=torch.uint8),
        x.new_empty((at.n_groups, 2), dtype=torch.bfloat16),
        x.new_empty(1, dtype=torch.int32),
    )


def _dequantize_compiled(codes, meta, widths, row_length, group_size, numel, dtype):
    _check_dequantize(codes, meta, widths, row_length, group_size, numel, dtype)
    kernels = ops._kernels(codes)
    if kernels is None:
        return reference.dequantize_mixed(codes, meta, widths, row_length, group_size, numel, dtype)
    return _native_dequantize(kernels, codes, meta, widths, row_length, group_size, numel, dtype)


def _dequantize_elsewhere(codes, meta, widths, row_length, group_size, numel, dtype):
    _check_dequantize(codes, meta, widths, row_length, group_size, numel, dtype)
    return reference.dequantize_mixed(codes, meta, widths, row_length, group_size, numel, dtype)


ops._operator(
    "quantize_mixed(Tensor x, Tensor widths, SymInt row_length, int group_size, SymInt nbytes, int seed, int stream, "
    "Tensor? advance=None) -> (Tensor, Tensor, Tensor)",
    _quantize_compiled,
    _quantize_elsewhere,
    _quantize_fake,
)
ops._operator(
    "dequantize_mixed(Tensor codes, Tensor meta, Tensor widths, SymInt row_length, int group_size, SymInt numel, "
    "ScalarType dtype) -> Tensor",
    _dequantize_compiled,
    _dequantize_elsewhere,
    lambda codes, meta, widths, row_length, group_size, numel, dtype: codes.new_empty(numel, dtype=dtype),
)


# --------------------------------------------------------------------------- the way in


def quantize(
    x: Tensor,
    widths: Tensor,
    row_length: int,
    group_size: int,
    seed: int = 0,
    stream: int = 0,
    advance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | int | None]:
    """Quantise a flat tensor; see :func:`hf_actnn.codec.reference.quantize_mixed`. The count of exact groups comes as
    :func:`hf_actnn.codec.ops.quantize` gives it."""
    seed, stream = ops._signed(seed), ops._signed(stream)
    kernels = ops._direct(x)
    at = _check_quantize(x, widths, row_length, group_size, advance)
    if kernels is None:
        widths = owned(widths)
        return torch.ops.hf_actnn.quantize_mixed(x, widths, row_length, group_size, at.nbytes, seed, stream, advance)
    return _native_quantize(kernels, x, at, widths, row_length, group_size, seed, stream, advance)


def dequantize(
    codes: Tensor, meta: Tensor, widths: Tensor, row_length: int, group_size: int, numel: int, dtype: torch.dtype
) -> Tensor:
    """Values of a flat tensor; see :func:`hf_actnn.codec.reference.dequantize_mixed`."""
    kernels = ops._direct(codes)
    if kernels is None:
        return torch.ops.hf_actnn.dequantize_mixed(codes, meta, widths, row_length, group_size, numel, dtype)
    _check_dequantize(codes, meta, widths, row_length, group_size, numel, dtype)
    return _native_dequantize(kernels, codes, meta, widths, row_length, group_size, numel, dtype)


def owned(widths: Tensor) -> Tensor:
    """A copy that nobody else writes to; a fake one where all tensors are, in which operators take no real one."""
    _check_widths(widths)
    if ops._plain(widths):
        return widths.clone(memory_format=torch.contiguous_format)
    return torch.tensor(widths.tolist(), dtype=torch.uint8)
