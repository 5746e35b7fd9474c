"""What coding a tensor costs in variance: what to expect of a sample before it is coded, and what it came to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_actnn.codec import mixed, ops, reference
from hf_actnn.codec.packed import PackedTensor, default_row_length, flatten
from hf_actnn.errors import CodecError, message

#: Elements whose rounding is worked out at a time: a few temporaries of float64, which stay in a cache.
_CHUNK = 1 << 18
#: Where each operation is a launch of its own.
_CHUNK_ELSEWHERE = 1 << 22
#: Groups that a tensor's correlation of roundings is taken from: of many rows, and of all places in a row alike.
_SEEN = 128


def sample_spread(x: Tensor, samples: int, row_length: int | None = None, group_size: int = 256) -> Tensor:
    """How much variance each sample's groups would give its codes, but for the width: the sum of
    ``n * (maximum - minimum)^2`` over groups of ``n`` elements.

    Rounding at random from steps of ``range / (2^bits - 1)`` has a variance of about ``1/6`` of the step's square per
    element, so a sample's is near ``spread / (6 (2^bits - 1)^2)`` where its values are spread evenly over a step.

    Args:
        x: floating point, as in :func:`hf_actnn.codec.quantize`.
        samples: equal parts that ``x`` consists of in storage order.
        row_length: as in :func:`hf_actnn.codec.quantize`.
        group_size: as in :func:`hf_actnn.codec.quantize`.

    Returns:
        ``[samples]`` float64 on the device of ``x``. Groups without a step, those with nan, inf or a magnitude from
        2^126 on, count as 0.
    """
    if x.requires_grad:
        x = x.detach()
    flat, shape, stride = flatten(x)
    if row_length is None:
        row_length = default_row_length(shape, stride)
    ops._check_flat(flat, "x", ops.FLOATS)
    ops.plan(flat.numel(), row_length, 1, group_size)
    mixed.check_samples(flat.numel(), samples, row_length, "samples")
    kernels = ops._direct(flat)
    if kernels is None:
        return reference.sample_spread(flat, samples, row_length, group_size)
    out = torch.zeros(samples, dtype=torch.float64, device=flat.device)
    cut = (flat.data_ptr(), ops._CODE[flat.dtype], flat.numel(), row_length, group_size, samples)
    if ops._on_cpu(flat):
        ops._launch(kernels.sample_spread, flat, *cut, out.data_ptr())
    else:
        ranges = torch.empty(
            reference.layout(flat.numel(), row_length, 1, group_size).n_groups, dtype=torch.float32, device=flat.device
        )
        ops._launch(kernels.sample_spread, flat, *cut, ranges.data_ptr(), out.data_ptr())
    return out


def rounding_variance(x: Tensor, packed: PackedTensor, samples: int | None = None) -> Tensor:
    """The variance that coding ``x`` as ``packed`` has over the dither, summed over the elements of each sample.

    An element at the fraction ``f`` of a step rounds up with probability ``f``: its variance is ``step^2 f (1 - f)``.

    Args:
        x: what was quantised, in any strides.
        packed: what :func:`hf_actnn.codec.quantize` made of it, in its uniform code.
        samples: equal parts of whole rows, in the storage order of ``packed``; by default one per width, or one.

    Returns:
        ``[samples]`` float64 on the device of ``x``. Groups that are kept exact, not finite or constant count as 0.
    """
    _check(x, packed)
    if samples is None:
        samples = 1 if packed.widths is None else packed.widths.numel()
    numel, length = packed.numel, packed.row_length
    mixed.check_samples(numel, samples, length, "samples")
    total = torch.zeros(samples, dtype=torch.float64, device=x.device)
    if numel == 0:
        return total
    flat = _in_order(x, packed)
    at = reference.layout(numel, length, 1, packed.group_size)
    kernels = None if ops._on_cpu(flat) else ops._direct(flat)
    if kernels is not None:
        sums = torch.empty(at.n_groups, dtype=torch.float64, device=x.device)
        cut = (packed.meta.data_ptr(), numel, length, packed.group_size)
        ops._launch(kernels.rounding_variance, flat, flat.data_ptr(), ops._CODE[flat.dtype], *cut, sums.data_ptr())
        return sums.view(samples, -1).sum(1)
    chunk = _CHUNK if ops._on_cpu(flat) else _CHUNK_ELSEWHERE
    rows, k = at.n_rows // samples, at.groups_per_row
    meta = packed.meta.view(samples, rows, k, 2)
    base = flat.storage_offset()
    for first, count, size in ((0, k - 1, at.group), (k - 1, 1, at.tail)):
        if count == 0:
            continue
        groups = flat.as_strided(
            (samples, rows, count, size), (rows * length, length, at.group, 1), base + first * at.group
        )
        # Whole samples at a time, or whole rows of one, or groups of one row: whichever fits.
        by_sample = max(1, chunk // (rows * length))
        by_row, by_group = max(1, chunk // length), max(1, chunk // size)
        for s in range(0, samples, by_sample):
            for r in range(0, rows, by_row):
                for g in range(0, count, by_group):
                    part = groups[s : s + by_sample, r : r + by_row, g : g + by_group]
                    last = min(g + by_group, count)
                    scale = meta[s : s + by_sample, r : r + by_row, first + g : first + last].to(torch.float64)
                    total[s : s + by_sample] += _variance(part, *scale.unbind(-1)).sum((1, 2))
    return total


def rounding_correlation(x: Tensor, packed: PackedTensor) -> Tensor:
    """How far the errors of two values of ``x`` that mirror images of one dither round cancel: twice their covariances
    over their variances, in units of the product of their two steps, each summed over such pairs of some groups.

    With the fractions ``f`` and ``g`` of a step, both are rounded up with probability ``max(f + g - 1, 0)``, so that
    the covariance is ``-f g`` or ``-(1 - f) (1 - g)`` squared steps, whichever is smaller. It is minus one half of the
    variance where values lie anywhere between two codes, more halfway, and nothing beside a value that lies on a code,
    as a zero behind a ReLU does.

    Args:
        x: what was quantised, in any strides.
        packed: what :func:`hf_actnn.codec.quantize` made of it, in its uniform code.

    Returns:
        Between -1 and 0, float64 without dimensions on the device of ``x``; 0 where no two values are rounded together.
    """
    _check(x, packed)
    nothing = torch.zeros((), dtype=torch.float64, device=x.device)
    if packed.numel == 0:
        return nothing
    at = reference.layout(packed.numel, packed.row_length, 1, packed.group_size)
    full = at.groups_per_row - (at.tail < at.group)  # groups of a row
    if at.rows_mirrored:
        rows, elements = at.n_rows // 4 * 2 + max(at.n_rows % 4 - 2, 0), list(range(at.group))
    else:
        rows, elements = at.n_rows, [e for e in range(at.group - 2) if e % 4 < 2]
    count = rows * full
    if count == 0 or not elements:
        return nothing
    # A step that has no divisor in common with the count comes to every place in a row alike.
    step = next(n for n in range(max(1, round(0.618 * count)), 2 * count + 1) if math.gcd(n, count) == 1)
    picked = torch.arange(min(count, _SEEN), device=x.device) * step % count
    row, within = picked // full, picked % full
    if at.rows_mirrored:
        row = row // 2 * 4 + row % 2
    flat = _in_order(x, packed)
    one, step_of_one = _fractions(flat, packed, row, within, torch.tensor(elements, device=x.device))
    if at.rows_mirrored:
        other, step_of_other = _fractions(flat, packed, row + 2, within, torch.tensor(elements, device=x.device))
    else:
        other, step_of_other = _fractions(flat, packed, row, within, torch.tensor(elements, device=x.device) + 2)
    weight = step_of_one * step_of_other
    covariance = -(torch.minimum(one * other, (1 - one) * (1 - other)) * weight).sum()
    variance = ((one * (1 - one) + other * (1 - other)) * weight).sum()
    return torch.where(variance > 0, 2 * covariance / variance, 0.0).clamp(-1.0, 0.0)


def _fractions(
    flat: Tensor, packed: PackedTensor, row: Tensor, within: Tensor, elements: Tensor
) -> tuple[Tensor, Tensor]:
    """Of some elements of a group of each of some rows: the fraction of a step that each lies above a code, ``[n, e]``,
    and the step ``[n, 1]``, 0 where there is none."""
    at = packed.layout
    minimum, step = packed.meta[row * at.groups_per_row + within].to(torch.float64)[..., None].unbind(1)
    place = (row * packed.row_length + within * at.group)[:, None] + elements
    fraction = flat[place].to(torch.float32).to(torch.float64).sub_(minimum).div_(step).frac_()
    coded = step > 0  # not 0, nan, or the mark of an exact group
    return torch.where(coded, fraction, 0.0), torch.where(coded, step, 0.0)


def _check(x: Tensor, packed: PackedTensor) -> None:
    if packed.code != "uniform" or x.shape != packed.shape or x.dtype not in ops.FLOATS:
        raise CodecError(
            message(
                "This is not what was quantised",
                where="x",
                expected=f"a floating-point tensor of shape {tuple(packed.shape)}, and the code 'uniform'",
                received=f"{x.dtype} of shape {tuple(x.shape)}, and the code {packed.code!r}",
                next_step="Pass the tensor that quantize was called with",
            )
        )


def _in_order(x: Tensor, packed: PackedTensor) -> Tensor:
    """The values ``[numel]`` in the storage order of the codes."""
    x = x.detach()
    flat, _, stride = flatten(x)
    if stride != packed.stride:
        flat = torch.empty_strided(packed.shape, packed.stride, dtype=x.dtype, device=x.device).copy_(x)
        flat = flat.as_strided((packed.numel,), (1,))
    return flat


def _variance(x: Tensor, minimum: Tensor, step: Tensor) -> Tensor:
    """Summed over the last dimension of ``x`` ``[..., G]``, for metadata ``[...]`` float64."""
    coded = step > 0  # not 0, nan, or the mark of an exact group
    t = x.to(torch.float32).to(torch.float64).sub_(minimum.unsqueeze(-1)).div_(step.unsqueeze(-1))
    t.frac_()
    return torch.where(coded, t.addcmul_(t, t, value=-1).sum(-1) * step * step, 0.0)
