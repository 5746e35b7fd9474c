"""The allocation of bits: how far from the lower bound, and how long it takes on one core.

    python benchmarks/solver.py [--seeds 40]

Costs are log-normal, their sigma 0.5, 1, 2, 3 and 4 in turn; budgets are one to eight bits on average, drawn uniformly.
Weights are equal, whole numbers from 1 to 10^6, or from 1 to 999 but for five items that weigh 10^4 times as much: of
those the gap is also given to a bound that combines the five in every way and relaxes the others only. The plain order
of gain per byte, without repair, is there to compare with.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import timing
import torch
from torch import Tensor

from hf_actnn.precision import problem, solver

SIZES = (16, 100, 1000, 5000, 20_000)
FAMILIES = ("equal", "random", "huge", "huge, costs in proportion")
SIGMAS = (0.5, 1.0, 2.0, 3.0, 4.0)
HUGE = 5


def instance(family: str, n: int, seed: int) -> tuple[Tensor, Tensor, int]:
    g = torch.Generator().manual_seed(seed)
    costs = torch.exp(SIGMAS[seed % len(SIGMAS)] * torch.randn(n, generator=g, dtype=torch.float64))
    if family == "equal":
        weights = torch.full((n,), 1000.0, dtype=torch.float64)
    elif family == "random":
        weights = torch.randint(1, 10**6 + 1, (n,), generator=g).double()
    else:
        weights = torch.randint(1, 1000, (n,), generator=g).double()
        weights[torch.randperm(n, generator=g)[:HUGE]] *= 10**4
        if family != "huge":
            costs = costs * weights
    return costs, weights, int(float(weights.sum()) * (1 + 7 * float(torch.rand((), generator=g))))


def with_huge(costs: Tensor, weights: Tensor, budget: int) -> float:
    """A lower bound: the heaviest items in every combination, the others relaxed."""
    order = torch.argsort(weights, descending=True)
    heavy, rest = order[:HUGE], order[HUGE:]
    h = torch.tensor([1 / (2**b - 1) ** 2 for b in range(1, 9)], dtype=torch.float64)
    every = torch.cartesian_prod(*[torch.arange(8)] * HUGE)
    room = budget - ((every + 1) * weights[heavy]).sum(1) - weights[rest].sum()
    base = (costs[heavy] * h[every]).sum(1)[room >= 0] + costs[rest].sum()
    gains = (costs[rest, None] * (h[:-1] - h[1:])).flatten()
    sizes = weights[rest].repeat_interleave(7)
    down = torch.argsort(gains / sizes, descending=True)
    zero = torch.zeros(1, dtype=torch.float64)
    size, gain = torch.cat([zero, sizes[down].cumsum(0)]), torch.cat([zero, gains[down].cumsum(0)])
    slope = torch.cat([(gains / sizes)[down], zero])
    room = room[room >= 0]
    cut = torch.searchsorted(size, room, right=True) - 1
    return float((base - gain[cut] - slope[cut] * (room - size[cut])).min())


def plain(costs: Tensor, weights: Tensor, budget: int) -> Tensor:
    """The order of gain per byte up to the first step that does not fit."""
    given = problem.as_problem(costs, weights, 1, 8)
    steps = solver._steps(given)
    cut = int(torch.searchsorted(steps.weights.cumsum(0), budget - weights.sum(), right=True))
    return 1 + torch.bincount(steps.items[:cut], minlength=len(costs))


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {name: ordered[int(part * (len(ordered) - 1))] for name, part in (("p50", 0.5), ("p95", 0.95), ("max", 1.0))}


def milliseconds(call: Any) -> float:
    """The median of some runs, in processor time: the arithmetic is of one thread."""
    runs = []
    for _ in range(5):
        start = time.process_time()
        call()
        runs.append(1e3 * (time.process_time() - start))
    return statistics.median(runs)


def measure(family: str, n: int, seeds: int) -> dict[str, Any]:
    gaps: list[float] = []
    tighter: list[float] = []
    without: list[float] = []
    times: list[float] = []
    for_target: list[float] = []
    for seed in range(seeds):
        costs, weights, budget = instance(family, n, seed)
        bits = solver.solve(costs, weights, budget)
        assert int((weights * bits).sum()) <= budget
        value, least = solver.objective(costs, bits), solver.lower_bound(costs, weights, budget)
        gaps.append(value / least - 1)
        without.append(solver.objective(costs, plain(costs, weights, budget)) / least - 1)
        if family.startswith("huge"):
            tighter.append(value / max(least, with_huge(costs, weights, budget)) - 1)
        if seed < 10:
            times.append(milliseconds(lambda: solver.solve(costs, weights, budget)))  # noqa: B023
            for_target.append(milliseconds(lambda: solver.solve_for_target(costs, weights, value)))  # noqa: B023
    row: dict[str, Any] = {"gap": percentiles(gaps), "gap without repair": percentiles(without)}
    if tighter:
        row["gap to the bound with the heaviest combined"] = percentiles(tighter)
    return {**row, "solve_ms": percentiles(times), "solve_for_target_ms": percentiles(for_target)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {}
    for n in SIZES:
        results[str(n)] = {}
        for family in FAMILIES:
            row = results[str(n)][family] = measure(family, n, options.seeds)
            print(
                n,
                family,
                {key: {k: float(f"{v:.2g}") for k, v in part.items()} for key, part in row.items()},
                flush=True,
            )
    print(timing.write("solver", {"seeds": options.seeds, "items": results}).name)


if __name__ == "__main__":
    main()
