"""The codec's specification, in plain torch.

Every function here is the definition that the compiled kernels must reproduce byte for byte (docs/codec.md explains the
choices). It runs on any device torch runs on and serves where no kernel does. Shapes: ``N`` rows, ``K`` groups of a
row, ``G`` elements of a group.

Source of the scheme: Chen et al., "ActNN", ICML 2021, section 3.2 (per-group quantisation with stochastic rounding).
What differs from the paper is said where it is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

#: Widest group. Kernels keep one group's codes in the first-level cache.
MAX_GROUP = 4096
#: Elements of a group that four calls of the generator serve.
DITHER_BLOCK = 256
#: Rows of so many values are taken for images, whose neighbours lie side by side; shorter ones for tokens.
IMAGE_FROM = 4096
#: Rounds of the generator, as its authors recommend.
ROUNDS = 10
#: Masks and small integers are packed in groups of this many elements of the flat tensor.
MASK_GROUP = 256
#: From this magnitude on, ``hi - lo`` or a product with the step could overflow fp32: such groups are kept exact.
EXACT_FROM = 2.0**126
#: Below this step the differences are scaled up, so that ``1 / step`` stays finite and no product is subnormal.
SMALL_STEP = 2.0**-64
SCALE_UP = 2.0**64
#: Planes of each width in bits; the first plane holds the lowest bits of a code.
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
#: Step written for a group that is kept exact; a group with nan or inf has ``nan`` there.
EXACT_STEP = -1.0
PREDICATES = ("not_le", "gt", "inside", "strict_inside", "nonzero")

_MASK32 = 0xFFFFFFFF


class Layout(NamedTuple):
    """Where the groups of a flat tensor and their codes lie; all sizes are in elements or bytes as named."""

    n_rows: int
    groups_per_row: int
    group: int  #: elements of every group of a row but the last
    tail: int  #: elements of a row's last group
    group_bytes: int
    tail_bytes: int
    row_bytes: int
    n_groups: int
    nbytes: int  #: bytes of all codes

    @property
    def rows_mirrored(self) -> int:
        """Groups of a row where rows mirror each other, 0 where elements of a row do."""
        length = (self.groups_per_row - 1) * self.group + self.tail
        return self.groups_per_row if length < IMAGE_FROM else 0


def _ceil(a: int, b: int) -> int:
    return (a + b - 1) // b


def group_bytes(group: int, bits: int) -> int:
    """Bytes that the planes of one group of ``group`` elements take."""
    return sum(_ceil(group * width, 8) for width in PLANES[bits])


def layout(numel: int, row_length: int, bits: int, group_size: int) -> Layout:
    """Cut rows into equal groups of at most ``group_size`` elements, the last one of a row possibly shorter.

    A row is never cut into one nearly empty group beside full ones: 257 elements at ``group_size=256`` make groups of
    129 and 128. Works on symbolic sizes too.
    """
    if numel == 0:
        return Layout(0, 0, 0, 0, 0, 0, 0, 0, 0)
    group = _ceil(row_length, _ceil(row_length, group_size))
    k = _ceil(row_length, group)
    tail = row_length - (k - 1) * group
    full, last = group_bytes(group, bits), group_bytes(tail, bits)
    n_rows = numel // row_length
    row_bytes = (k - 1) * full + last
    return Layout(n_rows, k, group, tail, full, last, row_bytes, n_rows * k, n_rows * row_bytes)


def philox(q: Tensor, seed: int, stream: int | Tensor, rounds: int = ROUNDS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 (Salmon et al., SC 2011) at counters ``(q, stream)`` under the key ``seed``.

    Args:
        q: ``[n]`` int64, the low 64 bits of the counter.
        seed: 64-bit key, as any Python integer.
        stream: the high 64 bits of the counter; an int64 of any sign, if it is a tensor.
        rounds: of the generator; only its own tests ask for another number.

    Returns:
        Four ``[n]`` int64 tensors holding the 32-bit output words.
    """

    def mul(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
        # In two halves, so that no product leaves the range of int64.
        low, high = (a & 0xFFFF) * m, (a >> 16) * m
        return ((high + (low >> 16)) >> 16) & _MASK32, (((high & 0xFFFF) << 16) + low) & _MASK32

    c0, c1 = q & _MASK32, (q >> 32) & _MASK32
    c2, c3 = torch.zeros_like(q) + (stream & _MASK32), torch.zeros_like(q) + (stream >> 32 & _MASK32)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(rounds):
        hi0, lo0 = mul(c0, 0xD2511F53)
        hi1, lo1 = mul(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def dither(
    n_groups: int,
    group: int,
    seed: int,
    stream: int | Tensor,
    device: torch.device | str = "cpu",
    rows_mirrored: int = 0,
) -> Tensor:
    """Dither of every element of ``n_groups`` groups of up to ``group`` elements: ``[n_groups, group]`` fp32,
    ``(byte + 1/2) / 256``, so centred within a step.

    A group has ``K = ceil(group / 256)`` blocks of 256 elements, each with four calls of the generator. The call with
    counter ``4 (K g + e / 256) + e % 16 / 4`` serves element ``e`` of group ``g``, ``k = e / 64 % 4``.

    Where elements mirror each other (``rows_mirrored`` is 0) and ``e % 4`` is 0 or 1, the element takes byte
    ``i = 8 (k % 2) + 4 (e % 4) + e / 16 % 4`` of the call, from ``k = 2`` on xor byte ``(i + 1) % 16``. Element
    ``e + 2`` has the mirror image of that, ``1 - u``.

    Where rows of ``rows_mirrored`` groups do, the element takes byte ``i = 4 (e % 4) + e / 16 % 4``, from ``k = 1`` on
    xor byte ``(i + k) % 16``, if the number of its row is 0 or 1 modulo 4. Row ``r + 2`` has the mirror image of row
    ``r``.

    The errors of two that mirror each other are as far apart as they can be, and in what sums over both, as the
    gradient of a convolution's weight does over places and that of a linear layer's over tokens, they largely cancel.
    Each byte is uniform, and any two that are no mirror images are independent.
    """
    blocks = _ceil(group, DITHER_BLOCK)
    words = torch.stack(philox(torch.arange(n_groups * blocks * 4, device=device), seed, stream), -1)  # [calls, 4]
    shifts = torch.arange(0, 32, 8, device=device)
    drawn = ((words.unsqueeze(-1) >> shifts) & 0xFF).flatten(1)  # [calls, 16 bytes]
    if rows_mirrored:
        values = torch.stack([drawn, *(drawn ^ drawn.roll(-k, 1) for k in range(1, 4))], 1)
    else:
        halves = torch.cat([drawn, drawn ^ drawn.roll(-1, 1)], 1).view(-1, 4, 1, 8)  # call, k, 1, two words of bytes
        values = torch.cat([halves, 255 - halves], 2)
    values = values.view(n_groups, blocks, 4, 4, 4, 4)  # group, block, call, k, word, byte
    values = values.permute(0, 1, 3, 5, 2, 4).reshape(n_groups, blocks * DITHER_BLOCK)[:, :group]  # k, byte, call, word
    if rows_mirrored:
        at = torch.arange(n_groups, device=device)
        mirrored = at // rows_mirrored % 4 >= 2
        values = torch.where(mirrored[:, None], 255 - values[at - 2 * rows_mirrored * mirrored], values)
    return (values.to(torch.float32) + 0.5) / 256


def _bf16_bits(x: Tensor, up: bool) -> Tensor:
    """Directed rounding of fp32 to bf16. Down for any sign, up for non-negative values only (that is all we need)."""
    bits = x.view(torch.int32)
    high = bits & -65536
    inexact = (bits & 0xFFFF) != 0
    bump = inexact if up else inexact & (bits < 0)
    return (high + bump.to(torch.int32) * 65536).view(torch.float32)


def _difference(x: Tensor, minimum: Tensor) -> Tensor:
    """``x - minimum`` rounded towards zero, for ``x`` no less than the minimum.

    To nearest, then one down where the exact remainder (Knuth's two-sum) says that this went up. So kernels whose
    processor has rounding as a mode, not in each instruction, need one mode for all of their arithmetic.
    """
    d = x - minimum
    back = d - x
    rest = (x - (d - back)) + (-minimum - back)
    return (d.view(torch.int32) - (rest < 0).to(torch.int32)).view(torch.float32)


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)`` with one bit pattern for nan: torch's own depends on where in a vector the element lies."""
    return x.to(dtype).masked_fill(x.isnan(), float("nan"))


def _metadata(x: Tensor, bits: int, huge: Tensor, broken: Tensor) -> tuple[Tensor, Tensor]:
    """Group minimum and step, rounded to bf16 before anything is packed: ``[N, K]`` fp32 each.

    ActNN rounds them afterwards, which biases every value of the group.
    """
    top = 2**bits - 1
    lo, hi = x.amin(-1), x.amax(-1)
    bad = huge | broken
    lo, hi = lo.masked_fill(bad, 0.0), hi.masked_fill(bad, 0.0)
    m = _bf16_bits(lo, up=False) + 0.0  # -0 becomes +0: the sign of a zero must not depend on the order of a reduction
    span = hi - m + 0.0
    small = span < SMALL_STEP
    # A quotient in the subnormal range would lose bits, even become 0: it is taken scaled up and rounded upwards by
    # hand.
    quotient = torch.where(small, span * SCALE_UP, span) / top
    step = torch.where(small, quotient * SMALL_STEP, quotient)
    short = small & (step * SCALE_UP < quotient)
    step = (step.view(torch.int32) + short.to(torch.int32)).view(torch.float32)
    return m, _bf16_bits(step, up=True)


def _quantize_groups(x: Tensor, u: Tensor, bits: int, huge: Tensor, broken: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[N, K, G]`` uint8 and metadata ``[N, K]`` of groups ``x`` ``[N, K, G]`` fp32."""
    m, step = _metadata(x, bits, huge, broken)
    tiny = step < SMALL_STEP
    d = _difference(x, m.unsqueeze(-1))
    d = torch.where(tiny.unsqueeze(-1), d * SCALE_UP, d)
    r = 1.0 / torch.where(tiny, step * SCALE_UP, step)
    # Stochastic rounding (ActNN, eq. 5) with a dither of 256 values. The product is exact in double, and so are both
    # sides of the comparison: floor(d r + u), with no rounding on the way. It never passes the top code.
    t = d.double() * r.double().unsqueeze(-1)
    below = t.floor()
    codes = below + (t - below >= 1 - u)
    zero = (huge | broken | (step == 0)).unsqueeze(-1)
    codes = codes.masked_fill(zero, 0.0).to(torch.uint8)
    m = m.masked_fill(huge | broken, float("nan"))
    step = step.masked_fill(huge, EXACT_STEP).masked_fill(broken, float("nan"))
    return codes, m, step


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Pack ``[..., G]`` uint8 codes into ``[..., group_bytes(G, bits)]``: element ``e`` of a plane of width ``w`` and
    ``n`` bytes sits in byte ``e % n`` at bit ``w * (e // n)``; the planes follow each other."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        n = _ceil(codes.shape[-1] * width, 8)
        part = (codes >> shift) & (2**width - 1)
        part = torch.nn.functional.pad(part, (0, n * per_byte - codes.shape[-1]))
        part = part.view(*codes.shape[:-1], per_byte, n)
        plane = part[..., 0, :].clone()
        for j in range(1, per_byte):
            plane |= part[..., j, :] << (width * j)
        planes.append(plane)
        shift += width
    return torch.cat(planes, -1)


def unpack_planes(packed: Tensor, bits: int, group: int) -> Tensor:
    """Inverse of :func:`pack_planes`: ``[..., group_bytes(G, bits)]`` to ``[..., G]`` uint8."""
    codes, shift, start = None, 0, 0
    for width in PLANES[bits]:
        n = _ceil(group * width, 8)
        plane = packed[..., start : start + n]
        part = torch.stack([(plane >> (width * j)) & (2**width - 1) for j in range(8 // width)], -2)
        part = part.flatten(-2)[..., :group] << shift
        codes = part if codes is None else codes | part
        shift += width
        start += n
    assert codes is not None
    return codes


def _sequence(stream: int, advance: Tensor | None) -> int | Tensor:
    """The stream that dither is drawn from, modulo 2^64."""
    if advance is None:
        return stream
    stream &= 0xFFFFFFFFFFFFFFFF
    return advance + (stream - (1 << 64) if stream >> 63 else stream)


def quantize(
    x: Tensor,
    bits: int,
    row_length: int,
    group_size: int,
    seed: int,
    stream: int,
    advance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a flat tensor.

    Args:
        x: ``[numel]`` floating point, values in storage order.
        bits: 1 to 8 bits of each code.
        row_length: elements of a row; ``numel`` is a multiple of it.
        group_size: the most elements that share a minimum and a step.
        seed: key of the dither's generator.
        stream: which of the key's 2^64 sequences; one per tensor kept.
        advance: None, or one int64 that is added to the stream, modulo 2^64. It is read where the tensor lies, so a
            captured CUDA graph that counts there draws other numbers in each replay.

    Returns:
        Codes ``[nbytes]`` uint8, metadata ``[n_groups, 2]`` bf16 (minimum, step) and the number of groups that must be
        kept exact, ``[1]`` int32.
    """
    at = layout(x.numel(), row_length, bits, group_size)
    u = dither(at.n_groups, at.group, seed, _sequence(stream, advance), x.device, at.rows_mirrored)
    return quantize_with(x, u, bits, row_length, group_size)


def quantize_with(x: Tensor, u: Tensor, bits: int, row_length: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`quantize` with the dither ``u`` ``[n_groups, group]`` given; a shorter group uses the start of its own."""
    device = x.device
    at = layout(x.numel(), row_length, bits, group_size)
    if at.n_groups == 0:
        empty = torch.empty(0, 2, dtype=torch.bfloat16, device=device)
        return torch.empty(0, dtype=torch.uint8, device=device), empty, torch.zeros(1, dtype=torch.int32, device=device)
    finite = torch.isfinite(x)
    x32 = x.to(torch.float32)
    huge = finite & (x32.abs() >= EXACT_FROM)  # includes a finite float64 that became inf
    body = (at.groups_per_row - 1) * at.group
    dithers = u.view(at.n_rows, at.groups_per_row, at.group)
    packed, metas = [], []
    k = at.groups_per_row
    for start, count, size, first in ((0, k - 1, at.group, 0), (body, 1, at.tail, k - 1)):
        if count == 0:
            continue

        def cut(t: Tensor, start: int = start, count: int = count, size: int = size) -> Tensor:
            return t.view(at.n_rows, row_length)[:, start : start + count * size].reshape(at.n_rows, count, size)

        broken = ~cut(finite).all(-1)
        codes, m, step = _quantize_groups(
            cut(x32), dithers[:, first : first + count, :size], bits, cut(huge).any(-1) & ~broken, broken
        )
        packed.append(pack_planes(codes, bits).flatten(1))
        metas.append(torch.stack([m, step], -1))
    meta = torch.cat(metas, 1).view(-1, 2)
    status = (meta[:, 1] == EXACT_STEP).sum().to(torch.int32).view(1)
    return torch.cat(packed, 1).view(-1), _narrow(meta, torch.bfloat16), status


def dequantize(
    codes: Tensor, meta: Tensor, bits: int, row_length: int, group_size: int, numel: int, dtype: torch.dtype
) -> Tensor:
    """``minimum + code * step`` for every element: ``[numel]`` of ``dtype``.

    A product, then a sum, both rounded to fp32 and then to ``dtype`` (to float64: computed in double, so exact before
    rounding). fp16 saturates at 65504, since a step rounded up may lead past it.
    """
    at = layout(numel, row_length, bits, group_size)
    if at.n_groups == 0:
        return torch.empty(0, dtype=dtype, device=codes.device)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    rows = codes.view(at.n_rows, at.row_bytes)
    m, step = meta.to(work).view(at.n_rows, at.groups_per_row, 2).unsqueeze(-2).unbind(-1)  # [N, K, 1]
    body = (at.groups_per_row - 1) * at.group_bytes
    parts = []
    for start, count, size, nbytes, first in (
        (0, at.groups_per_row - 1, at.group, at.group_bytes, 0),
        (body, 1, at.tail, at.tail_bytes, at.groups_per_row - 1),
    ):
        if count == 0:
            continue
        part = rows[:, start : start + count * nbytes].reshape(at.n_rows, count, nbytes)
        level = unpack_planes(part, bits, size).to(work) * step[:, first : first + count]
        parts.append((m[:, first : first + count] + level).flatten(1))
    out = torch.cat(parts, 1).view(-1)
    if dtype == torch.float16:
        out = out.clamp(-65504.0, 65504.0)  # leaves nan as it is
    return _narrow(out, dtype)


def sample_nbytes(sample_length: int, row_length: int, group_size: int) -> list[int]:
    """Bytes of a sample's codes by their width; the first entry, for 0 bits, stands for none."""
    return [0] + [layout(sample_length, row_length, bits, group_size).nbytes for bits in sorted(PLANES)]


def _by_width(widths: Tensor, sizes: list[int], device: torch.device) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each width that occurs, its samples ``[n]`` and the places of their codes in the buffer ``[n, size]``."""
    size = torch.tensor(sizes)[widths.long()]
    start = size.cumsum(0) - size
    for bits in sorted(set(widths.tolist())):
        samples = (widths == bits).nonzero().view(-1)
        # Moved before they are spread out: one number per sample goes to the device, not one per byte.
        starts, within = start[samples].to(device), torch.arange(sizes[bits], device=device)
        yield bits, samples.to(device), starts.unsqueeze(-1) + within


def quantize_mixed(
    x: Tensor,
    widths: Tensor,
    row_length: int,
    group_size: int,
    seed: int,
    stream: int,
    advance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`quantize` with a width for each of ``S`` equal, consecutive samples.

    Args:
        x: ``[numel]`` floating point; ``numel / S`` is a multiple of ``row_length``.
        widths: ``[S]`` uint8 on the CPU, 1 to 8.
        row_length: as for :func:`quantize`, and so all that follows.
        group_size: the most elements that share a minimum and a step.
        seed: key of the dither's generator.
        stream: which of the key's sequences.
        advance: what is added to it, or None.

    Returns:
        As :func:`quantize` does. A sample's codes and metadata are those of the uniform call with its width; codes
        follow each other without gaps.
    """
    n, device = widths.numel(), x.device
    at = layout(x.numel(), row_length, 1, group_size)
    if at.n_groups == 0:
        return quantize(x, 1, row_length, group_size, seed, stream, advance)
    sizes = sample_nbytes(x.numel() // n, row_length, group_size)
    u = dither(at.n_groups, at.group, seed, _sequence(stream, advance), device, at.rows_mirrored).view(n, -1, at.group)
    nbytes = sum(sizes[bits] for bits in widths.tolist())
    codes = torch.empty(nbytes, dtype=torch.uint8, device=device)
    meta = torch.empty(n, at.n_groups // n, 2, dtype=torch.bfloat16, device=device)
    status = torch.zeros(1, dtype=torch.int32, device=device)
    for bits, samples, places in _by_width(widths, sizes, device):
        values, dithers = x.view(n, -1)[samples].view(-1), u[samples].view(-1, at.group)
        part, part_meta, exact = quantize_with(values, dithers, bits, row_length, group_size)
        codes[places] = part.view(places.shape)
        meta[samples] = part_meta.view(len(samples), -1, 2)
        status += exact
    return codes, meta.view(-1, 2), status


def dequantize_mixed(
    codes: Tensor, meta: Tensor, widths: Tensor, row_length: int, group_size: int, numel: int, dtype: torch.dtype
) -> Tensor:
    """:func:`dequantize` of what :func:`quantize_mixed` returns: ``[numel]`` of ``dtype``."""
    n = widths.numel()
    out = torch.empty(n, numel // n, dtype=dtype, device=codes.device)
    if numel == 0:
        return out.view(-1)
    sizes = sample_nbytes(numel // n, row_length, group_size)
    for bits, samples, places in _by_width(widths, sizes, codes.device):
        part, part_meta = codes[places].view(-1), meta.view(n, -1, 2)[samples].view(-1, 2)
        values = dequantize(part, part_meta, bits, row_length, group_size, len(samples) * (numel // n), dtype)
        out[samples] = values.view(len(samples), -1)
    return out.view(-1)


def sample_spread(x: Tensor, samples: int, row_length: int, group_size: int) -> Tensor:
    """For each of ``samples`` equal parts of the flat tensor ``x`` the sum over its groups of the number of elements
    times the square of their range: ``[samples]`` float64. Groups that no step serves count as 0.

    Ranges are differences of fp32 values, rounded to nearest; squares and sums are taken in double, group by group.
    """
    at = layout(x.numel(), row_length, 1, group_size)
    total = torch.zeros(samples, dtype=torch.float64, device=x.device)
    if at.n_groups == 0:
        return total
    rows = x.to(torch.float32).view(at.n_rows, row_length)
    body = (at.groups_per_row - 1) * at.group
    for start, count, size in ((0, at.groups_per_row - 1, at.group), (body, 1, at.tail)):
        if count == 0:
            continue
        groups = rows[:, start : start + count * size].unflatten(1, (count, size))
        lo, hi = groups.amin(-1), groups.amax(-1)  # nan if there is one, which then fails both comparisons
        span = torch.where((lo > -EXACT_FROM) & (hi < EXACT_FROM), hi - lo, 0.0).to(torch.float64)
        total += (size * (span * span)).view(samples, -1).sum(1)
    return total


def predicate(x: Tensor, name: str, lo: float, hi: float) -> Tensor:
    """Evaluate a mask's predicate; ``not_le`` and ``inside`` are true for nan, as torch's own backward functions
    are.
    """
    if name == "nonzero":
        return x != 0
    # Thresholds are compared in fp32 (float64 for float64), whatever the tensor's own width.
    x = x if x.dtype == torch.float64 else x.to(torch.float32)
    low = torch.tensor(lo, dtype=x.dtype, device=x.device)
    high = torch.tensor(hi, dtype=x.dtype, device=x.device)
    if name == "not_le":
        return ~(x <= low)
    if name == "gt":
        return x > low
    if name == "inside":
        return ~((x <= low) | (x >= high))
    return (x > low) & (x < high)


def pack_uint(values: Tensor, bits: int) -> Tensor:
    """Pack ``[numel]`` uint8 values below ``2 ** bits`` in groups of 256 (the last one shorter); higher bits are
    dropped.
    """
    full = values.numel() // MASK_GROUP * MASK_GROUP
    head = pack_planes(values[:full].view(-1, MASK_GROUP), bits).view(-1)
    return torch.cat([head, pack_planes(values[full:], bits)]) if full < values.numel() else head


def unpack_uint(packed: Tensor, bits: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`pack_uint`: ``[numel]`` of ``dtype``."""
    full, rest = divmod(numel, MASK_GROUP)
    nbytes = full * group_bytes(MASK_GROUP, bits)
    head = unpack_planes(
        packed[:nbytes].view(full, -1) if full else packed[:0].view(0, group_bytes(MASK_GROUP, bits)), bits, MASK_GROUP
    )
    parts = [head.reshape(-1)]
    if rest:
        parts.append(unpack_planes(packed[nbytes:], bits, rest))
    return torch.cat(parts).to(dtype)


def uint_nbytes(numel: int, bits: int) -> int:
    """Bytes of ``numel`` small integers packed by :func:`pack_uint`."""
    full, rest = numel // MASK_GROUP, numel % MASK_GROUP
    return full * group_bytes(MASK_GROUP, bits) + group_bytes(rest, bits)


def pack_mask(x: Tensor, name: str, lo: float, hi: float) -> Tensor:
    """One bit per element of the flat tensor ``x``: whether the predicate holds."""
    return pack_uint(predicate(x, name, lo, hi).to(torch.uint8), 1)


def unpack_mask(packed: Tensor, numel: int, on: float, off: float, dtype: torch.dtype) -> Tensor:
    """``on`` where the bit is set, ``off`` elsewhere: ``[numel]`` of ``dtype``.

    Both are rounded to ``dtype``: beyond its range a value becomes infinite, also in fp16, where dequantised values
    saturate.
    """
    bits = unpack_uint(packed, 1, numel, torch.bool)
    values = torch.tensor([off, on], dtype=torch.float64, device=packed.device)
    values = _narrow(values, dtype) if dtype.is_floating_point else values.to(dtype)
    return values[bits.to(torch.int64)]
