"""How many bits each kept tensor, or each part of one, gets: a separable convex integer programme.

Minimise ``sum_i costs_i * h(bits_i)`` with ``h(b) = 1 / (2^b - 1)^2`` over whole bits within limits, while
``sum_i weights_i * bits_i`` stays within a budget. ``h`` is what the variance of stochastic rounding is proportional
to: the step of a code of ``b`` bits is the range over ``2^b - 1``.

Source: Chen et al., "ActNN", ICML 2021, section 4.2 (the allocation of bits, by a greedy algorithm). Different here:

* every width from ``low`` to ``high`` may be chosen, and the limits may differ between items;
* what the greedy order leaves of the budget is spent too, and some ways around the step at which the budget ran out
  are tried;
* up to :data:`EXACT_ITEMS` items the result is an optimum;
* the dual problem, the fewest bytes for a given variance, is solved as well.

An item's step from ``b`` to ``b + 1`` bits costs the same bytes at every ``b`` and gains less at each, so both problems
are knapsacks of steps in which the order of gain per byte already respects the order within an item.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_actnn.precision.problem import (
    MAX_BITS,
    MIN_BITS,
    Problem,
    as_number,
    as_problem,
    as_reals,
    as_widths,
    capacity_of,
    difference,
)

#: Up to this many items the result is an optimum.
EXACT_ITEMS = 16
#: Items on either side of the step that no longer fits which are tried with another width: at most so many, and fewer
#: where a try is slow: so many steps in all. With that many items there is next to nothing to gain.
REPAIRS = 24
REPAIR_STEPS = 100_000
#: Items with more than this part of all weights are combined in every way worth it, heaviest first, until there are
#: more ways than :data:`HEAVY_WAYS`.
HEAVY = 0.01
HEAVY_WAYS = 256
#: Below this part of the largest cost, an item cannot be seen in the objective, which is at least 2^-16 of that cost.
NEGLIGIBLE = 2.0**-100

# h of 0 bits is never used; it keeps index and bits the same.
_H = torch.tensor([math.inf] + [1.0 / (2**b - 1) ** 2 for b in range(MIN_BITS, MAX_BITS + 1)], dtype=torch.float64)


class _Choice(NamedTuple):
    """A width of one item: what it takes of the limit, and what is to be least. Both also as exact whole numbers."""

    bits: int
    size: float
    size_exact: int
    value: float
    value_exact: int


class _Steps(NamedTuple):
    """Single steps of one bit in the order of gain per byte, each of shape [S]."""

    items: Tensor  #: int64
    gains: Tensor  #: float64, by how much the step lowers the objective
    weights: Tensor  #: float64


# -- public -----------------------------------------------------------------------------------------------------------


def objective(costs: Tensor, bits: Tensor) -> float:
    """``sum_i costs_i * h(bits_i)``, rounded once.

    Args:
        costs: [I], finite and not negative; the variance at one bit.
        bits: [I], whole numbers from 1 to 8.

    Raises:
        ConfigError: costs or bits that cannot mean anything.
    """
    costs = as_reals(costs, "costs")
    bits = as_widths(bits, costs.numel(), "bits")
    return math.fsum(_values(costs, bits).tolist())


def solve(costs: Tensor, weights: Tensor, budget: float, low: Tensor | int = 1, high: Tensor | int = 8) -> Tensor:
    """The bits with which the objective is least within a budget.

    Guaranteed:

    * the exact sum of ``weights * bits`` is at most ``budget``;
    * up to :data:`EXACT_ITEMS` items, no other bits within the budget have a smaller objective (but for items of a
      cost below :data:`NEGLIGIBLE` of the largest, which stay at ``low``);
    * beyond that, a larger budget never gives a larger objective, but for rounding: up to the last digits of the
      objective, and of weights that are no multiples of the budget's last binary digit (whole numbers are). A proof is
      in the comments of the code;
    * beyond that, the distance to the optimum is at most the gain of one step. With a thousand items and more it is
      far below a thousandth of the objective (``benchmarks/solver.py``). Where a few items outweigh all others together
      it is so too, but :func:`lower_bound` may be far below: it counts what a fraction of a step would gain;
    * the same arguments give the same bits; between equal items, the one of the lower index gets more.

    Args:
        costs: [I], finite and not negative; an item's part of the objective at one bit. Zero leaves it at ``low``.
        weights: [I], finite and above zero; bytes that one bit more of an item costs.
        budget: bytes; may be infinite.
        low: fewest bits, of all or [I], from 1 to 8.
        high: most bits, of all or [I], from ``low`` to 8.

    Returns:
        [I], int64, on the CPU.

    Raises:
        ConfigError: arguments that cannot mean anything, or a budget below the bytes of ``low`` everywhere.
    """
    problem = as_problem(costs, weights, low, high)
    capacity = capacity_of(problem, budget)
    # Bytes spent on what cannot be seen would not be missed in the objective, but would be missed by the user.
    seen = problem.costs > problem.costs.amax() * NEGLIGIBLE if len(problem.costs) else problem.costs > 0
    problem = problem._replace(high=torch.where(seen, problem.high, problem.low))
    steps = _steps(problem)
    taken = _pack(steps.items, steps.weights, steps.gains, capacity)
    if len(problem.costs) > EXACT_ITEMS:
        taken = _heavy(problem, steps, capacity, taken)
    bits = problem.low + _count(steps.items, taken, problem)
    if len(problem.costs) <= EXACT_ITEMS and not bool(taken.all()):
        limit, rows = _table(problem, budget=as_number(budget, "budget"))
        return _exact(rows, bits, limit)
    return bits


def solve_for_target(
    costs: Tensor, weights: Tensor, target: float, low: Tensor | int = 1, high: Tensor | int = 8
) -> Tensor:
    """The bits with the fewest bytes whose objective is at most a target.

    Steps are given back from ``high`` downwards in the order of the least gain per byte, each that the target still
    allows; so no single step more could be given back (but for rounding). Up to :data:`EXACT_ITEMS` items, no other
    bits that meet the target take fewer bytes.

    Args:
        costs: [I], finite and not negative; an item's part of the objective at one bit.
        weights: [I], finite and above zero; bytes that one bit more of an item costs.
        target: the largest :func:`objective` allowed, in the unit of ``costs``; may be infinite.
        low: fewest bits, of all or [I], from 1 to 8.
        high: most bits, of all or [I], from ``low`` to 8.

    Returns:
        [I], int64, on the CPU; ``high`` everywhere if even that does not meet the target.

    Raises:
        ConfigError: arguments that cannot mean anything.
    """
    problem = as_problem(costs, weights, low, high)
    target = as_number(target, "target")
    free = problem.costs == 0
    least = torch.where(free, problem.low, problem.high)
    if objective(problem.costs, least) > target:
        return problem.high
    if objective(problem.costs, problem.low) <= target:
        return problem.low
    problem = problem._replace(high=least)
    room = difference(target, _values(problem.costs, problem.high).tolist())
    steps = _steps(problem)
    # Gains are off from differences of the objective's rounded terms by three roundings at most.
    losses = torch.nextafter(steps.gains * (1 + 2.0**-50), torch.tensor(math.inf, dtype=torch.float64))
    items = steps.items.flip(0)
    taken = _pack(items, losses.flip(0), steps.weights.flip(0), room)
    bits = problem.high - _count(items, taken, problem)
    if len(problem.costs) <= EXACT_ITEMS:
        limit, rows = _table(problem, target=target)
        return _exact(rows, bits, limit)
    return bits


def lower_bound(costs: Tensor, weights: Tensor, budget: float, low: Tensor | int = 1, high: Tensor | int = 8) -> float:
    """What no bits within the budget can go below: the objective where the last step may be taken in part.

    It is the maximum of the Lagrangian dual, and the optimum of the linear programme over the items' convex hulls; of
    weights that are whole numbers, for the largest budget that a sum of them can use up to the last byte.

    Args:
        costs: [I], finite and not negative; an item's part of the objective at one bit.
        weights: [I], finite and above zero; bytes that one bit more of an item costs.
        budget: bytes; may be infinite.
        low: fewest bits, of all or [I], from 1 to 8.
        high: most bits, of all or [I], from ``low`` to 8.

    Raises:
        ConfigError: as :func:`solve`.
    """
    problem = as_problem(costs, weights, low, high)
    capacity = capacity_of(problem, budget)
    return _bound(problem, _steps(problem), capacity)


# -- the greedy order -------------------------------------------------------------------------------------------------


def _values(costs: Tensor, bits: Tensor) -> Tensor:
    """Each item's part of the objective, [I]."""
    return costs * _H[bits]


def _steps(problem: Problem) -> _Steps:
    """All steps between ``low`` and ``high`` that gain anything; equal gains per byte in the order of the items."""
    costs, weights, low, high = problem
    # Sorted by cost per byte first, the steps from each width lie in order: a stable sort of seven sorted runs takes a
    # quarter of the time of one of them all shuffled.
    ratio, items = torch.sort(costs / weights, descending=True, stable=True)
    gain = _H[MIN_BITS:-1] - _H[MIN_BITS + 1 :]
    widths = torch.arange(MIN_BITS, MAX_BITS)[:, None]
    valid = ((widths >= low[items]) & (widths < high[items]) & (costs[items] > 0)).flatten()
    # Whatever is invalid sorts behind all that is valid.
    ratios = torch.where(valid, (gain[:, None] * ratio).flatten(), -1.0)
    order = torch.sort(ratios, descending=True, stable=True).indices[: int(valid.sum())]
    gains = (gain[:, None] * costs[items]).flatten()[order]
    items = items.repeat(len(gain))[order]
    return _Steps(items, gains, weights[items])


def _bound(problem: Problem, steps: _Steps, capacity: float) -> float:
    total = steps.weights.cumsum(0)
    cut = int(torch.searchsorted(total, capacity, right=True))
    taken = torch.zeros_like(total, dtype=torch.bool)
    taken[:cut] = True
    bits = problem.low + _count(steps.items, taken, problem)
    bound = math.fsum(_values(problem.costs, bits).tolist())
    if cut < len(total):
        rest = capacity - (float(total[cut - 1]) if cut else 0.0)
        bound -= float(steps.gains[cut]) * (rest / float(steps.weights[cut]))
    return bound


def _count(items: Tensor, taken: Tensor, problem: Problem) -> Tensor:
    """Steps taken of each item, [I]."""
    return torch.bincount(items[taken], minlength=len(problem.costs))


def _on_grid(sizes: Tensor, capacity: float) -> Tensor:
    """Sizes rounded up to multiples of the capacity's last binary digit, so that sums up to it are exact."""
    if capacity <= 0:
        return sizes
    grid = math.ulp(capacity)
    # What alone does not fit needs no rounding, and could overflow.
    return torch.where(sizes > capacity, sizes, (sizes.clamp(max=capacity) / grid).ceil() * grid)


def _first_fit(sizes: Tensor, capacity: float) -> tuple[Tensor, int]:
    """Down the list, take each step that still fits.

    Returns:
        mask [S] of the steps taken, and the index of the first that did not fit.
    """
    taken = torch.zeros(len(sizes), dtype=torch.bool)
    total = sizes.cumsum(0)
    cut = int(torch.searchsorted(total, capacity, right=True))
    taken[:cut] = True
    rest = capacity - (float(total[cut - 1]) if cut else 0.0)
    left = (sizes[cut:] <= rest).nonzero().squeeze(1) + cut
    # A pass takes all up to the next step that does not fit. Few passes do, unless sizes are chosen to need many.
    passes = 0
    while len(left) > 64 and passes < 12:
        part = sizes[left]
        total = part.cumsum(0)
        fit = int(torch.searchsorted(total, rest, right=True))
        taken[left[:fit]] = True
        rest -= float(total[fit - 1])
        left = left[fit:][part[fit:] <= rest]
        passes += 1
    places = []
    for place, size in zip(left.tolist(), sizes[left].tolist(), strict=True):
        if size <= rest:
            rest -= size
            places.append(place)
    taken[places] = True
    return taken, cut


def _pack(items: Tensor, sizes: Tensor, values: Tensor, capacity: float) -> Tensor:
    """Steps of much value within a capacity.

    Args:
        items: [S], whose step it is.
        sizes: [S]; those of an item do not fall down the list.
        values: [S]; value per size falls down the list.
        capacity: what the sizes of the steps taken sum up to at most.

    Returns:
        mask [S] of the steps taken; of each item, its first ones.
    """
    # Why a larger capacity never gives less value:
    # (1) First fit, by induction over the list. If the first step fits into both capacities or into neither, what
    #     remains is the same list less that step. If it fits into the larger only, it alone is worth more than
    #     anything of less value per size that the smaller one could hold.
    # (2) So it is with the width of one item held fixed: that is first fit among the others with the rest.
    # (3) Between two capacities with the same first step that does not fit, the same widths are tried, and the best of
    #     functions that never fall never falls. With another such step, the larger capacity holds at least all before
    #     it, which is the optimum for their size, and that size exceeds the smaller capacity.
    # (4) :func:`_heavy` finds the best of (2) over widths that do not depend on the capacity.
    # The steps of an item are taken in order: once one is too large for the rest, so are those after it.
    sizes = _on_grid(sizes, capacity)
    best, cut = _first_fit(sizes, capacity)
    if cut == len(sizes):
        return best
    most = float(values[best].sum())
    tries = min(REPAIRS, REPAIR_STEPS // len(sizes))
    after = list(dict.fromkeys(items[cut : cut + 4 * tries].tolist()))[:tries]
    before = list(dict.fromkeys(items[max(0, cut - 4 * tries) : cut].flip(0).tolist()))[:tries]
    for item, change in [(item, 1) for item in after] + [(item, -1) for item in before]:
        own = (items == item).nonzero().squeeze(1)
        count = int((own < cut).sum()) + change
        rest = capacity - math.fsum(sizes[own[:count]].tolist())
        if rest < 0:
            continue
        others = sizes.clone()
        others[own] = 0.0
        taken, _ = _first_fit(others, rest)
        taken[own[:count]] = True
        taken[own[count:]] = False
        value = float(values[taken].sum())
        if value > most:
            best, most = taken, value
    return best


def _heavy(problem: Problem, steps: _Steps, capacity: float, best: Tensor) -> Tensor:
    """The better of ``best`` and first fit under every Pareto-optimal choice of widths for the heaviest items.

    One step of such an item is as large as many steps of others; around it the order of gain per byte says little.

    Args:
        best: mask [S] of the steps taken so far.

    Returns:
        mask [S] of the steps taken.
    """
    weights, order = torch.sort(problem.weights, descending=True, stable=True)
    heavy = order[: int((weights > HEAVY * weights.sum()).sum())].tolist()
    if not heavy or bool(best.all()):
        return best
    sizes = _on_grid(steps.weights, capacity)
    used, gained = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    counts: list[Tensor] = []  # of each heavy item, the steps in each way [ways]
    owns: list[Tensor] = []
    for item in heavy:
        if len(used) > HEAVY_WAYS:
            break
        own = (steps.items == item).nonzero().squeeze(1)
        zero = torch.zeros(1, dtype=torch.float64)
        size = (used[:, None] + torch.cat([zero, sizes[own].cumsum(0)])).flatten()
        gain = (gained[:, None] + torch.cat([zero, steps.gains[own].cumsum(0)])).flatten()
        # By size, and of equal sizes the most gain first: Pareto-optimal is what exceeds all before it.
        way = torch.sort(gain, descending=True, stable=True).indices
        way = way[torch.sort(size[way], stable=True).indices]
        top = gain[way].cummax(0).values
        keep = torch.ones_like(top, dtype=torch.bool)
        keep[1:] = top[1:] > top[:-1]
        way = way[keep]
        used, gained = size[way], gain[way]
        parent = way // (len(own) + 1)
        counts = [count[parent] for count in counts] + [way % (len(own) + 1)]
        owns.append(own)
    mine = torch.cat(owns)
    others, gains = sizes.clone(), steps.gains.clone()
    others[mine], gains[mine] = 0.0, 0.0
    total = torch.cat([torch.zeros(1, dtype=torch.float64), others.cumsum(0)])
    value = torch.cat([torch.zeros(1, dtype=torch.float64), gains.cumsum(0)])
    slopes = torch.cat([steps.gains / steps.weights, torch.zeros(1, dtype=torch.float64)])
    rest = capacity - used
    ways = int((rest >= 0).sum())
    rest = rest[:ways]
    cut = torch.searchsorted(total, rest, right=True) - 1
    bounds, order = torch.sort(
        gained[:ways] + value[cut] + slopes[cut] * (rest - total[cut]), descending=True, stable=True
    )
    most = float(steps.gains[best].sum())
    for bound, way in zip(bounds.tolist(), order.tolist(), strict=True):
        if bound <= most * (1 + 1e-12):
            break
        taken, _ = _first_fit(others, float(rest[way]))
        taken[mine] = False
        for own, count in zip(owns, counts, strict=True):
            taken[own[: int(count[way])]] = True
        found = float(steps.gains[taken].sum())
        if found > most:
            best, most = taken, found
    return best


# -- few items: an optimum --------------------------------------------------------------------------------------------


def _exponent(numbers: Iterable[float]) -> int:
    """The least power of two by which all become whole."""
    return max((number.as_integer_ratio()[1].bit_length() - 1 for number in numbers), default=0)


def _whole(number: float, exponent: int) -> int:
    """``number * 2^exponent``, rounded down."""
    numerator, denominator = number.as_integer_ratio()
    return (numerator << exponent) // denominator


def _table(
    problem: Problem, *, budget: float | None = None, target: float | None = None
) -> tuple[int, list[list[_Choice]]]:
    """The limit and every item's widths by size: bytes under a budget, or parts of the objective under a target."""
    weights = problem.weights.tolist()
    values = (problem.costs[:, None] * _H[MIN_BITS:]).tolist()
    by_weight = _exponent(weights)
    by_value = _exponent(number for row in values for number in row)
    rows = []
    for weight, row, low, high in zip(weights, values, problem.low.tolist(), problem.high.tolist(), strict=True):
        choices = []
        for bits in range(low, high + 1):
            value = row[bits - MIN_BITS]
            in_bytes = (weight * bits, _whole(weight, by_weight) * bits)
            in_cost = (value, _whole(value, by_value))
            choices.append(_Choice(bits, *in_bytes, *in_cost) if target is None else _Choice(bits, *in_cost, *in_bytes))
        rows.append(choices if target is None else choices[::-1])
    if target is not None:
        return _whole(target, by_value), rows
    assert budget is not None
    return _whole(budget, by_weight), rows


def _multiplier(rows: Sequence[Sequence[_Choice]], limit: float) -> float:
    """Value per size at which the linear programme uses up the limit."""
    steps = []
    for row in rows:
        for a, b in itertools.pairwise(row):
            if b.size > a.size:
                steps.append(((a.value - b.value) / (b.size - a.size), b.size - a.size))
    steps.sort(reverse=True)
    rest = limit - sum(row[0].size for row in rows)
    for slope, size in steps:
        rest -= size
        if rest < 0:
            return slope
    return 0.0


def _front(rows: Sequence[tuple[int, Sequence[tuple[int, int, float, int]]]], gap: float) -> list[tuple]:
    """Pareto-optimal sums over some items: size, value, reduced cost, and the widths in four binary digits each.

    Args:
        rows: per item its index and ``(size, value, reduced cost, bits)`` of each width.
        gap: sums of a larger reduced cost cannot be part of an optimum.
    """
    front = [(0, 0, 0.0, 0)]
    for index, row in rows:
        sums = [
            (size + s, value + v, reduced + r, code | bits << 4 * index)
            for size, value, reduced, code in front
            for s, v, r, bits in row
            if reduced + r <= gap
        ]
        sums.sort()
        front = []
        for entry in sums:
            if not front or entry[1] < front[-1][1]:
                front.append(entry)
    return front


def _exact(rows: list[list[_Choice]], bits: Tensor, limit: int) -> Tensor:
    """The widths of the least sum of values whose sizes sum up to at most ``limit``.

    Half of the items each are combined into Pareto fronts, which are then searched for the best pair.

    Args:
        rows: per item its widths, sizes rising and values falling, both convex.
        bits: [I], a good solution within the limit.
        limit: in the unit of the exact sizes.
    """
    scale = next((c.size / c.size_exact for row in rows for c in row if c.size_exact), 1.0)
    multiplier = _multiplier(rows, limit * scale)
    chosen = [next(c for c in row if c.bits == b) for row, b in zip(rows, bits.tolist(), strict=True)]
    # Any width adds its reduced cost to the Lagrangian bound, so an optimum has no more than this one in all.
    least = [min(c.value + multiplier * c.size for c in row) for row in rows]
    gap = math.fsum(c.value for c in chosen) - (math.fsum(least) - multiplier * (limit * scale))
    gap += 1e-9 * (math.fsum(least) + multiplier * (limit * scale))
    table = []
    for index, row in enumerate(rows):
        reduced = [(c, c.value + multiplier * c.size - least[index]) for c in row]
        table.append((index, [(c.size_exact, c.value_exact, r, c.bits) for c, r in reduced if r <= gap]))
    # The largest fronts come of items with much left to choose; they go to both halves alike.
    table.sort(key=lambda entry: -len(entry[1]))
    first, second = _front(table[::2], gap), _front(table[1::2], gap)
    sizes = [entry[0] for entry in second]
    best = (sum(c.value_exact for c in chosen), sum(c.size_exact for c in chosen))
    code = sum(c.bits << 4 * index for index, c in enumerate(chosen))
    for size, value, _, part in first:
        place = bisect_right(sizes, limit - size) - 1
        if place >= 0:
            found = (value + second[place][1], size + second[place][0])
            if found < best:
                best, code = found, part | second[place][3]
    return torch.tensor([code >> 4 * index & 15 for index in range(len(rows))], dtype=torch.int64)
