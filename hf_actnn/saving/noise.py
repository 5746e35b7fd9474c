"""Noise that a quantised tensor is disturbed with, to measure what its rounding does."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from hf_actnn import codec

#: Random signs are drawn once per tape and used again from another place: a length that no row is a multiple of, and
#: four times a prime, for mirror images are two values apart.
SIGNS = 4 * 16381
#: Share of the roundings of two values by a dither and its mirror image that go opposite ways: their correlation is
#: minus one half where values lie anywhere between two codes (docs/codec.md, "Mirrored roundings").
OPPOSITE = 0.75
#: Values of it that are made at a time, on a CPU and elsewhere, where each piece costs some launches.
PIECE, PIECE_ELSEWHERE = 2**20, 2**24


def random_signs(generator: torch.Generator) -> Tensor:
    """``[SIGNS]`` of them, each independent of the others."""
    return torch.randint(0, 2, (SIGNS,), generator=generator).mul_(2).sub_(1).float()


def mirrored(signs: Tensor, generator: torch.Generator) -> Tensor:
    """``[SIGNS]`` random signs that are related as the roundings of a group's values are: element ``e + 2`` has that of
    element ``e`` the other way round, :data:`OPPOSITE` of the times, for ``e % 4`` 0 and 1."""
    opposite = torch.rand(len(signs) // 2, generator=generator) < OPPOSITE
    found = signs.clone().view(-1, 2, 2)
    found[:, 1] = torch.where(opposite.view(-1, 2), -found[:, 0], found[:, 0])
    return found.view(-1)


class Noise:
    """Noise of the variance that the rounding of a quantised tensor has: in each group by its step, in each sample by
    what was measured. The same values each time, and made where they are asked for.

    Args:
        packed: the tensor.
        variance: ``[S]``, of its rounding, of each sample.
        signs: ``[SIGNS]`` random signs, and such that are :func:`mirrored`. Groups that do not begin at a multiple of
            four take the former: their roundings count as independent.
        start: which of them is the first value's.
    """

    def __init__(self, packed: codec.PackedTensor, variance: Tensor, signs: tuple[Tensor, Tensor], start: int) -> None:
        step = packed.meta[:, 1].to(torch.float64 if packed.dtype == torch.float64 else torch.float32)
        step = torch.where((step > 0) & step.isfinite(), step, 0.0)
        twin = copy.copy(packed)
        twin.meta = torch.stack([torch.zeros_like(step), step], 1).to(packed.meta.dtype)
        twin.codes = torch.full_like(packed.codes, 255)  # the largest code everywhere: 2^bits - 1 steps
        twin.patch, twin.dtype = None, step.dtype
        at = packed.layout
        sizes = step.new_full((at.groups_per_row,), float(at.group))
        sizes[-1] = at.tail
        assumed = (
            (step.view(-1, at.groups_per_row).square() * sizes).view(len(variance), -1).sum(1, dtype=torch.float64)
        )
        self._factors = torch.where(assumed > 0, variance.to(assumed.device) / assumed, 0.0).sqrt().to(step.dtype)
        if packed.widths is None:
            self._factors /= 2**packed.bits - 1
        else:
            each = len(variance) // len(packed.widths)
            top = (torch.exp2(packed.widths.to(step.dtype)) - 1).to(step.device)
            self._factors /= top.repeat_interleave(each)
        aligned = at.group % 4 == 0 and packed.row_length % 4 == 0
        self._signs, self._start = signs[aligned].to(step.dtype), start // 4 * 4 if aligned else start
        self._twin = twin
        self._each = packed.numel // len(variance)

    def add_to(self, value: Tensor) -> None:
        """Disturb all values, in place, in the shape and strides of the tensor. Piece by piece: another one as large
        would be the peak of the step."""
        flat = value.as_strided((value.numel(),), (1,), value.storage_offset())
        piece, unit = PIECE if value.is_cpu else PIECE_ELSEWHERE, self._twin.unit
        samples = math.lcm(unit, self._each)  # whole ones have their factors in one pass
        unit = samples if samples <= piece else unit
        piece = max(1, piece // unit) * unit
        for start in range(0, len(flat), piece):
            stop = min(start + piece, len(flat))
            flat[start:stop].add_(self.part(start, stop))

    def part(self, start: int, stop: int) -> Tensor:
        """Some of the values in storage order, as `PackedTensor.part` gives those of the tensor."""
        flat = self._twin.part(start, stop)
        self._finish(flat, start)
        return flat

    def _finish(self, flat: Tensor, start: int) -> None:
        each, stop = self._each, start + flat.numel()
        if start % each == 0 and stop % each == 0:
            flat.view(-1, each).mul_(self._factors[start // each : stop // each, None])
        else:
            for sample in range(start // each, -(-stop // each)):
                flat[max(sample * each - start, 0) : (sample + 1) * each - start].mul_(self._factors[sample])
        sign_(flat, self._signs, self._start + start)


def sign_(flat: Tensor, signs: Tensor, start: int) -> None:
    """Give the values of a tensor of one dimension signs, in place: at the peak there is no room for more."""
    signs = signs.roll(-(start % len(signs)))
    whole = flat.numel() // len(signs) * len(signs)
    flat[:whole].view(-1, len(signs)).mul_(signs)
    flat[whole:].mul_(signs[: flat.numel() - whole])
