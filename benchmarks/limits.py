"""The largest size that fits into a limit of memory, by trying."""

from __future__ import annotations

import math
from collections.abc import Callable

#: How many times the largest size that fitted the next one may be: a line through small sizes is not to be trusted far.
JUMP = 16


def search(
    attempt: Callable[[int], float | None], limit: float, first: int, cap: int, power: int = 1, tolerance: float = 0.02
) -> int:
    """The largest size that fits, to within a share of it or 1; 0 where nothing fits.

    Args:
        attempt: size -> peak in bytes, or None where it does not fit.
        limit: in bytes; it only aims the tries.
        first: size tried first.
        cap: the largest size to try.
        power: memory is about linear in this power of the size.
        tolerance: share of the size that may lie between what fits and what does not.
    """
    fits: dict[int, float] = {}
    low, high, size, pushed = 0, cap + 1, min(first, cap), 0
    while True:
        peak = attempt(size)
        if peak is None:
            high = size
        else:
            low, fits[size] = size, peak
        gap = max(1, int(tolerance * low))
        if high - low <= gap:
            return low
        aimed = _aimed(fits, low, high, limit, power, tolerance)
        # Away from the last try by at least the gap, and by twice as much each time the line leads nowhere. What lay
        # far ahead and did not fit leaves the line in doubt by a part of the way.
        if peak is None:
            bottom, top = low + gap, high - (max(gap, (high - low) // 8) << pushed)
        else:
            bottom, top = low + (gap << pushed), high - gap
        size = min(max(aimed, bottom), top) if bottom <= top else (low + high) // 2
        pushed = pushed + 1 if size != aimed else 0


def _aimed(fits: dict[int, float], low: int, high: int, limit: float, power: int, tolerance: float) -> int:
    """The size a little below where a line through two that fitted meets the limit: one that fits says more than one
    that does not."""
    if not fits:
        return high // 2
    if len(fits) == 1:
        return 2 * low
    # Far enough apart that noise does not tilt the line.
    before = max((size for size in fits if size <= low / 2), default=min(fits))
    slope = (fits[low] - fits[before]) / (low**power - before**power)
    # Where it does not rise, other things set the peak so far.
    room = (limit - fits[low]) / slope if slope > 0 else math.inf
    return int(min((low**power + room) ** (1 / power) * (1 - tolerance / 2), JUMP * low))
