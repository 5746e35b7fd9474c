"""From the peaks of some small batches to the largest one under a limit.

The peak of the passes is the largest of several moments: the end of the forward pass, when all activations are held;
the first layers' backward functions, when all gradients are there; and others between. Each is about linear in the
batch, so their largest is convex: its slope rises with the batch until one moment has taken over for good. Below that,
other things bend it too: tensors under 2^18 values (1 MiB in float32) are decoded as a whole, lie in the heap's odd
places and not in pages of their own, and a layer's batch is not cut into all its parts. So batches grow until the
slopes of two stretches agree, each long enough that the noise of a measurement does not tilt it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

#: Least batch of the first run: in fewer than eight samples a layer's batch cannot be cut into its eight parts.
FIRST = 8
#: And the most.
MOST_FIRST = 128
#: Bytes from which on a tensor is in pages of its own, and may be decoded in parts. Smaller ones lie in the C library's
#: heap, which peaks higher with many of them than with a larger batch's large ones: such batches tell nothing.
LARGE = 2**20
#: Bytes by which the peak is to grow over a stretch, by kind of device: peaks scatter by some MB, and a GPU's allocator
#: takes 20 MB at a time and more.
STRETCH = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
#: But no more than this share of what the limit leaves.
SHARE = 1 / 6
#: How many times the last batch the next may be: a line through small ones is not to be trusted far.
JUMP = 4
#: No further run where the line leaves room for so much of the last batch: its tilt then makes little difference.
NEAR = 0.2
#: Share by which the slopes of two stretches may differ.
STRAIGHT = 0.04
#: No batch is larger.
CAP = 2**20


class Line(NamedTuple):
    """Peak bytes of the passes of a step, by batch; and what was measured to know.

    Attributes:
        fixed: bytes at no samples.
        per_sample: bytes that a sample adds.
        update: peak bytes of the optimizer's step, whatever the batch.
        largest: samples under the limit; 0 where nothing fits, :data:`CAP` where samples cost nothing.
        straight: whether the slopes of the last two stretches agreed, or the answer was bracketed by tries.
        runs: batch -> what was measured.
        failed: smallest batch that did not fit.
    """

    fixed: float
    per_sample: float
    update: float
    largest: int
    straight: bool
    runs: dict[int, dict[str, Any]]
    failed: int | None = None


def first_batch(grain: float) -> int:
    """Batch of the first run.

    Args:
        grain: bytes per sample of the smallest of the tensors that hold most of what is saved.
    """
    return min(max(FIRST, math.ceil(LARGE / max(grain, 1.0))), MOST_FIRST)


class Failed(Exception):
    """A run ended in something else than a want of memory. Its argument is what the run said."""


def largest(
    attempt: Callable[[int], dict[str, Any]],
    limit: int,
    kind: str = "cpu",
    there: int | None = None,
    first: int = FIRST,
) -> Line:
    """Find the largest batch by running small ones.

    Args:
        attempt: batch -> ``status`` "ok" with ``passes`` and ``update`` in bytes, or "out of memory".
        limit: bytes.
        kind: of device.
        there: bytes that a run may take; ``limit`` if None, or where it is more. What does not fit into less says
            nothing of what fits under the limit.
        first: batch of the first run; halved until one fits.

    Raises:
        Failed: a run ended in an error, or not one sample could be run.
    """
    bound = limit if there is None else min(limit, there)
    runs: dict[int, dict[str, Any]] = {}
    failed: int | None = None
    batch = first
    while True:
        found = attempt(batch)
        if found["status"] == "ok":
            runs[batch] = found
        elif found["status"] == "out of memory":
            failed = batch
        else:
            raise Failed(found)
        following = _next(runs, failed, bound, STRETCH[kind])
        if following is not None:
            batch = following
        elif bound == limit:
            return _line(runs, failed, limit, STRETCH[kind])
        elif runs:
            return _line(runs, None, limit, STRETCH[kind])
        else:
            raise Failed(
                {"status": "error", "error": f"the machine's {bound / 1e6:.0f} MB are too little for a sample"}
            )


def _points(runs: dict[int, dict[str, Any]]) -> list[tuple[int, float]]:
    return sorted((batch, run["passes"]) for batch, run in runs.items())


def _least_growth(points: list[tuple[int, float]], limit: int, stretch: float) -> float:
    """Bytes that the peak is to grow by over a stretch that tells something."""
    return min(stretch, max(0.0, limit - points[0][1]) * SHARE)


def _spaced(points: list[tuple[int, float]], limit: int, stretch: float) -> list[tuple[int, float]]:
    """The last point, and those before it over whose stretches the peak grew by enough to tell something."""
    least = _least_growth(points, limit, stretch)
    kept = [points[-1]]
    for point in reversed(points[:-1]):
        if kept[0][1] - point[1] >= least:
            kept.insert(0, point)
    return kept


def _slope(before: tuple[int, float], after: tuple[int, float]) -> float:
    return (after[1] - before[1]) / (after[0] - before[0])


def _last_slope(points: list[tuple[int, float]], limit: int, stretch: float) -> float:
    """Of the last stretch that is long enough; of all points where none is."""
    spaced = _spaced(points, limit, stretch)
    return _slope(spaced[-2] if len(spaced) > 1 else points[0], points[-1])


def _is_straight(points: list[tuple[int, float]], limit: int, stretch: float) -> bool:
    spaced = _spaced(points, limit, stretch)
    if len(spaced) < 3:
        return False
    before, after = _slope(spaced[-3], spaced[-2]), _slope(spaced[-2], spaced[-1])
    return abs(after - before) <= STRAIGHT * after


def _next(runs: dict[int, dict[str, Any]], failed: int | None, limit: int, stretch: float) -> int | None:
    """The batch to run next, or None where enough is known."""
    if not runs:
        assert failed is not None
        return failed // 2 if failed > 1 else None
    points = _points(runs)
    last, peak = points[-1]
    if last >= CAP or _is_bracketed(last, failed) or _is_straight(points, limit, stretch):
        return None
    if len(points) == 1:
        following = 2 * last
    else:
        slope = _last_slope(points, limit, stretch)
        wanted = 1.1 * _least_growth(points, limit, stretch) / slope if slope > 0 else math.inf
        following = last + int(min(max(wanted, last), (JUMP - 1) * last))
        room = (limit - peak) / slope if slope > 0 else math.inf
        if room <= NEAR * last:
            return None
        # What would hardly fit may not fit, and says nothing then.
        following = min(following, last + int(min(room, CAP) / 2))
    if failed is not None:
        following = min(following, (last + failed) // 2)
    return min(following, CAP) if following > last else None


def _is_bracketed(last: int, failed: int | None) -> bool:
    return failed is not None and failed - last <= max(1, last // 16)


def _line(runs: dict[int, dict[str, Any]], failed: int | None, limit: int, stretch: float) -> Line:
    if not runs:
        return Line(math.nan, math.nan, math.nan, 0, True, runs, failed)
    points = _points(runs)
    update = max(run["update"] for run in runs.values())
    last, peak = points[-1]
    slope = math.nan
    count: float = last
    straight = _is_straight(points, limit, stretch)
    if len(points) > 1:
        # Over two stretches that agree, noise tilts the line less than over one.
        start = _spaced(points, limit, stretch)[-3] if straight else None
        slope = max(0.0, _slope(start, points[-1]) if start else _last_slope(points, limit, stretch))
        count = last + (limit - peak) / slope if slope > 0 else CAP
    count = min(max(int(min(count, CAP)), last), math.inf if failed is None else failed - 1)
    if update > limit:
        count = 0
    return Line(peak - slope * last, slope, update, int(count), straight or _is_bracketed(last, failed), runs, failed)
