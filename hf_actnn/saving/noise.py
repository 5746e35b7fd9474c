"""Noise that a quantised tensor is disturbed with, to measure what its rounding does."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_actnn import codec

#: Random signs are drawn once per tape and used again from another place. Four times a prime, for roundings are related
#: two values apart within fours: rows that four divides meet the same signs again after 65,521 of them, others later.
SIGNS = 4 * 65521
#: Values of it that are made at a time, on a CPU and elsewhere, where each piece costs some launches.
PIECE, PIECE_ELSEWHERE = 2**20, 2**24


class Signs(NamedTuple):
    """Random signs of a tape.

    Attributes:
        independent: ``[SIGNS]``, each independent of the others.
        uniform: ``[SIGNS]`` in 0..1, which says how the sign of a value goes on to its mirror image.
    """

    independent: Tensor
    uniform: Tensor

    @classmethod
    def draw(cls, generator: torch.Generator) -> Signs:
        """From a generator of the CPU, whatever torch's default device is."""
        signs = torch.randint(0, 2, (SIGNS,), generator=generator, device="cpu").mul_(2).sub_(1).float()
        return cls(signs, torch.rand(SIGNS, generator=generator, device="cpu"))

    def to(self, device: torch.device, dtype: torch.dtype) -> Signs:
        return Signs(self.independent.to(device, dtype), self.uniform.to(device))

    def images(self, correlation: Tensor) -> Tensor:
        """``[SIGNS]``, the signs of mirror images: each has this correlation with the independent one in its place."""
        opposite = (1 - correlation.to(self.uniform)) / 2  # the share of values whose sign is the other one
        return self.independent.copysign(self.independent * (self.uniform - opposite))

    def within_fours(self, correlation: Tensor) -> Tensor:
        """``[SIGNS]`` that are related as the roundings of a long row's values are: those of elements ``e`` and
        ``e + 2``, ``e % 4`` 0 and 1, have this correlation, and all others none."""
        found = self.independent.clone().view(-1, 2, 2)
        found[:, 1] = self.images(correlation).view(-1, 2, 2)[:, 0]
        return found.view(-1)


class Noise:
    """Noise of the variance that the rounding of a quantised tensor has: in each group by its step, in each sample by
    what was measured. The same values each time, and made where they are asked for.

    Args:
        packed: the tensor.
        variance: ``[S]``, of its rounding, of each sample.
        correlation: of roundings that mirror each other, without dimensions. Where elements of a row do and groups do
            not begin at multiples of four, all count as independent.
        signs: of the tape.
        start: which of the signs is the first value's.
    """

    def __init__(
        self, packed: codec.PackedTensor, variance: Tensor, correlation: Tensor, signs: Signs, start: int
    ) -> None:
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
        self._row, self._start = packed.row_length, start
        self._signs = signs.independent.to(step.dtype)
        self._images: Tensor | None = None
        if at.rows_mirrored:
            self._images = signs.images(correlation).to(step.dtype)
        elif at.group % 4 == 0 and packed.row_length % 4 == 0:
            self._signs, self._start = signs.within_fours(correlation).to(step.dtype), start // 4 * 4
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
        if self._images is None:
            sign_(flat, self._signs, self._start + start)
        else:
            self._sign_rows(flat, start, self._images)

    def _sign_rows(self, flat: Tensor, start: int, images: Tensor) -> None:
        """Rows 2 and 3 of every four have the signs of the mirror images of rows 0 and 1: fours of rows together, and
        what is before and after them by twos."""
        two, at, stop = 2 * self._row, start, start + flat.numel()
        while at < stop:
            if at % (2 * two) == 0 and stop - at >= 2 * two:
                # On a CPU seldom beyond the last sign, elsewhere in few launches.
                n = min(stop - at, SIGNS // 4 if flat.is_cpu else SIGNS) // (2 * two) * (2 * two)
                fours = flat[at - start : at - start + n].view(-1, 2, two)
                fours[:, 0].mul_(self._run(self._signs, at, n).view(-1, 2, two)[:, 0])
                fours[:, 1].mul_(self._run(images, at - two, n).view(-1, 2, two)[:, 1])
            else:
                n = min(stop, (at // two + 1) * two) - at
                mirrored = at // two % 2 == 1
                signs = self._run(images, at - two, n) if mirrored else self._run(self._signs, at, n)
                flat[at - start : at - start + n].mul_(signs)
            at += n

    def _run(self, signs: Tensor, place: int, count: int) -> Tensor:
        """Those of so many values, no more than there are signs, from a place of the tensor on."""
        first = (self._start + place) % SIGNS
        if first + count <= SIGNS:
            return signs[first : first + count]
        return torch.cat((signs[first:], signs[: first + count - SIGNS]))


def sign_(flat: Tensor, signs: Tensor, start: int) -> None:
    """Give the values of a tensor of one dimension signs, in place: at the peak there is no room for more."""
    signs = signs.roll(-(start % len(signs)))
    whole = flat.numel() // len(signs) * len(signs)
    flat[:whole].view(-1, len(signs)).mul_(signs)
    flat[whole:].mul_(signs[: flat.numel() - whole])
