"""The allocation of bits: optima of few items, the distance to the bound of many, and what is guaranteed of both."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from hf_actnn.errors import ConfigError
from hf_actnn.precision import problem, solver
from hf_actnn.precision.solver import lower_bound, objective, solve, solve_for_target

H = torch.tensor([1 / (2**b - 1) ** 2 for b in range(1, 9)], dtype=torch.float64)
FAMILIES = ["equal", "random", "float", "huge", "heavy and costly"]
SIGMAS = [0.5, 1.0, 2.0, 4.0]


def instance(family: str, n: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """Costs, weights and a budget of one to eight bits on average."""
    g = torch.Generator().manual_seed(seed)
    costs = torch.exp(SIGMAS[seed % 4] * torch.randn(n, generator=g, dtype=torch.float64))
    if family == "equal":
        weights = torch.full((n,), 1000.0, dtype=torch.float64)
    elif family == "float":
        weights = torch.rand(n, generator=g, dtype=torch.float64) + 0.01
    elif family == "random":
        weights = torch.randint(1, 10**6 + 1, (n,), generator=g).double()
    else:
        weights = torch.randint(1, 1000, (n,), generator=g).double()
        weights[torch.randperm(n, generator=g)[:4]] *= 10**4
        if family == "heavy and costly":
            costs = costs * weights
    return costs, weights, float(weights.sum()) * (1 + 7 * float(torch.rand((), generator=g)))


def spent(weights: Tensor, bits: Tensor) -> Fraction:
    """The exact bytes."""
    return sum((Fraction(w) * b for w, b in zip(weights.tolist(), bits.tolist(), strict=True)), Fraction(0))


def brute(costs: Tensor, weights: Tensor, budget: float, low: int = 1, high: int = 8) -> float:
    """The least objective of all combinations."""
    every = torch.cartesian_prod(*[torch.arange(low, high + 1)] * len(costs)).reshape(-1, len(costs))
    values = (costs * H[every - 1]).sum(1)
    return float(values[(weights * every).sum(1) <= budget].min())


def table(costs: list[float], weights: list[int], budget: int) -> list[float]:
    """The least objective of every whole budget up to ``budget``, by dynamic programming over bytes."""
    best = [0.0] * (budget + 1)
    for cost, weight in zip(costs, weights, strict=True):
        best = [
            min(
                (best[at - weight * b] + cost / (2**b - 1) ** 2 for b in range(1, 9) if at >= weight * b),
                default=math.inf,
            )
            for at in range(budget + 1)
        ]
    return best


def bound_with_heavy(costs: Tensor, weights: Tensor, budget: float) -> float:
    """A bound above the Lagrangian one: the four heaviest items in every combination, the others relaxed."""
    order = torch.argsort(weights, descending=True)
    heavy, rest = order[:4], order[4:]
    every = torch.cartesian_prod(*[torch.arange(8)] * 4)
    room = budget - ((every + 1) * weights[heavy]).sum(1) - weights[rest].sum()
    base = (costs[heavy] * H[every]).sum(1)[room >= 0] + costs[rest].sum()
    gains = (costs[rest, None] * (H[:-1] - H[1:])).flatten()
    sizes = weights[rest].repeat_interleave(7)
    down = torch.argsort(gains / sizes, descending=True)
    zero = torch.zeros(1, dtype=torch.float64)
    size, gain = torch.cat([zero, sizes[down].cumsum(0)]), torch.cat([zero, gains[down].cumsum(0)])
    slope = torch.cat([(gains / sizes)[down], zero])
    room = room[room >= 0]
    cut = torch.searchsorted(size, room, right=True) - 1
    return float((base - gain[cut] - slope[cut] * (room - size[cut])).min())


# -- optima -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["equal", "random", "float"])
@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_few_items_are_solved_as_by_trying_all(family, n):
    for seed in range(12):
        costs, weights, budget = instance(family, n, seed)
        bits = solve(costs, weights, budget)
        assert spent(weights, bits) <= Fraction(budget)
        assert objective(costs, bits) == pytest.approx(brute(costs, weights, budget), rel=1e-12)


def test_six_items_are_solved_as_by_trying_all():
    for seed in range(6):
        costs, weights, _ = instance("random", 6, seed)
        budget = float(weights.sum()) * (2 + 0.5 * seed)
        found = objective(costs, solve(costs, weights, budget, 1, 6))
        assert found == pytest.approx(brute(costs, weights, budget, 1, 6), rel=1e-12)


@pytest.mark.parametrize("n", [8, 12])
def test_twelve_items_are_solved_as_by_dynamic_programming(n):
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        costs = torch.exp(SIGMAS[seed] * torch.randn(n, generator=g, dtype=torch.float64))
        weights = torch.randint(1, 30, (n,), generator=g)
        least = int(weights.sum())
        best = table(costs.tolist(), weights.tolist(), 4 * least)
        for budget in range(least, 4 * least + 1, max(1, least // 7)):
            assert objective(costs, solve(costs, weights, budget)) == pytest.approx(best[budget], rel=1e-12)


def test_the_greedy_order_alone_would_not_do():
    """What the tests above compare with tells an optimum from a good solution."""
    worse = 0
    for seed in range(24):
        costs, weights, budget = instance("random", 5, seed)
        given = problem.as_problem(costs, weights, 1, 8)
        steps = solver._steps(given)
        taken, _ = solver._first_fit(steps.weights, problem.capacity_of(given, budget))
        greedy = objective(costs, 1 + torch.bincount(steps.items[taken], minlength=5))
        worse += greedy > brute(costs, weights, budget) * (1 + 1e-9)
    assert worse >= 3


def test_sixteen_items_with_many_equal_gains_per_byte():
    """Costs in proportion to weights: all items ask for the same bits, and sums of weights decide."""
    for seed in range(4):
        weights = torch.randint(1, 40, (16,), generator=torch.Generator().manual_seed(seed))
        budget = int(weights.sum() * 5 // 2)
        best = table(weights.double().tolist(), weights.tolist(), budget)[budget]
        assert objective(weights, solve(weights.double(), weights, budget)) == pytest.approx(best, rel=1e-12)


# -- many items -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n, seeds", [(1000, 16), (5000, 4), (20_000, 2)])
def test_many_items_are_near_the_bound(family, n, seeds):
    for seed in range(seeds):
        costs, weights, budget = instance(family, n, seed)
        bits = solve(costs, weights, budget)
        assert spent(weights, bits) <= Fraction(budget)
        least = lower_bound(costs, weights, budget)
        found = objective(costs, bits)
        assert found >= least * (1 - 1e-12)
        if weights.max() > 0.01 * weights.sum():  # a fraction of a heavy step is in the bound and in no solution
            least = max(least, bound_with_heavy(costs, weights, math.floor(budget)))
        assert found <= least * 1.005


@pytest.mark.parametrize("n", [17, 24, 60])
def test_some_more_items_are_near_the_optimum(n):
    """Where the bound is too far away to tell, whole budgets are few enough for dynamic programming."""
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        costs = torch.exp(SIGMAS[seed] * torch.randn(n, generator=g, dtype=torch.float64))
        weights = torch.randint(1, 20, (n,), generator=g)
        budget = int(weights.sum()) * 3
        best = table(costs.tolist(), weights.tolist(), budget)
        for at in range(int(weights.sum()), budget + 1, budget // 7):
            assert best[at] * (1 - 1e-12) <= objective(costs, solve(costs, weights, at)) <= best[at] * 1.01


def test_the_bound_is_below_every_optimum():
    gaps = []
    for seed in range(20):
        costs, weights, budget = instance("random", 4, seed)
        gaps.append(brute(costs, weights, budget) / lower_bound(costs, weights, budget) - 1)
    assert min(gaps) >= -1e-12 and min(gaps) < 0.2  # and it is a bound worth having


def test_the_bound_is_reached_where_the_budget_ends_with_a_step():
    costs, weights, _ = instance("equal", 300, 1)
    for steps in (0, 1, 299, 300, 1234, 2100):
        budget = 1000 * (300 + steps)
        assert objective(costs, solve(costs, weights, budget)) == pytest.approx(lower_bound(costs, weights, budget))
        assert lower_bound(costs, weights, budget + 999) == lower_bound(costs, weights, budget)


# -- guarantees -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n, budgets", [(5, 20), (16, 12), (17, 25), (60, 25), (400, 25)])
def test_more_bytes_are_never_worse(family, n, budgets):
    for seed in range(2 if n < 60 else 1):
        costs, weights, _ = instance(family, n, seed)
        least = float(weights.sum()) * (1 + 1e-12)
        before, exceeding = math.inf, 0
        # Coarse over all budgets, and fine over the width of some steps.
        fine = 3 * float(weights.median()) / budgets
        sweep = [least * (1 + 7 * k / budgets) for k in range(budgets + 1)]
        for budget in sorted(sweep + [3.1 * least + fine * k for k in range(budgets)]):
            bits = solve(costs, weights, budget)
            exceeding += spent(weights, bits) > Fraction(budget)
            value = objective(costs, bits)
            assert value <= before * (1 + 1e-12)
            before = value
        assert not exceeding
        assert bits.tolist() == [8] * n or family == "float"


@pytest.mark.parametrize("n", [3, 16, 200])
def test_never_over_budget_by_the_last_digit(n):
    """Weights whose float sums round: the exact sum decides, and a budget that it just meets is used."""
    weights = torch.full((n,), 0.1, dtype=torch.float64)
    costs = torch.arange(1, n + 1, dtype=torch.float64)
    exact = Fraction(0.1) * 3 * n
    above = float(exact) if Fraction(float(exact)) >= exact else math.nextafter(float(exact), math.inf)
    below = math.nextafter(above, 0.0)
    assert spent(weights, solve(costs, weights, below)) <= Fraction(below)
    assert spent(weights, solve(costs, weights, above)) <= Fraction(above)
    if n <= 16:
        assert int(solve(costs, weights, below).sum()) == 3 * n - 1
        assert int(solve(costs, weights, above).sum()) == 3 * n
    for k in range(50):
        budget = 0.1 * n * (1 + 7 * k / 49) + 1e-9
        assert spent(weights, solve(costs, weights, budget)) <= Fraction(budget)


@pytest.mark.parametrize("n", [6, 16, 500])
def test_limits_hold(n):
    g = torch.Generator().manual_seed(n)
    costs, weights, _ = instance("random", n, 3)
    low = torch.randint(1, 5, (n,), generator=g)
    high = low + torch.randint(0, 4, (n,), generator=g)
    least, most = float((weights * low).sum()), float((weights * high).sum())
    for part in (0.0, 0.2, 0.6, 1.0):
        budget = least + part * (most - least)
        bits = solve(costs, weights, budget, low, high)
        assert bits.dtype == torch.int64 and bits.shape == (n,)
        assert bool((bits >= low).all()) and bool((bits <= high).all())
        target = objective(costs, bits)
        back = solve_for_target(costs, weights, target, low, high)
        assert bool((back >= low).all()) and bool((back <= high).all()) and objective(costs, back) <= target
        if part in (0.0, 1.0):
            assert torch.equal(bits, low if part == 0 else high)
    assert solve(costs, weights, math.inf, 2, 6).tolist() == [6] * n
    assert solve(costs, weights, float(weights.sum()) * 3, 3).min() == 3


@pytest.mark.parametrize("n", [8, 100])
def test_items_without_cost_stay_low_and_are_in_nobodys_way(n):
    costs, weights, budget = instance("random", n, 2)
    free = torch.arange(n) % 3 == 0
    alone = solve(costs[~free], weights[~free], budget - float(2 * weights[free].sum()), 2)
    for tiny in (0.0, 1e-250):
        bits = solve(torch.where(free, tiny, costs), weights, budget, 2)
        assert bits[free].tolist() == [2] * int(free.sum())
        assert torch.equal(bits[~free], alone)
    target = objective(costs[~free], alone)
    back = solve_for_target(torch.where(free, 0.0, costs), weights, target, 2)
    assert bits[free].max() == back[free].max() == 2
    assert solve(torch.zeros(n), weights, math.inf).tolist() == [1] * n


def test_the_same_arguments_give_the_same_bits():
    for n in (10, 30, 3000):
        costs, weights, budget = instance("random", n, 5)
        assert torch.equal(solve(costs, weights, budget), solve(costs.clone(), weights.clone(), budget))
        assert torch.equal(solve_for_target(costs, weights, 1.0), solve_for_target(costs, weights, 1.0))


@pytest.mark.parametrize("n", [20, 1000])
def test_of_equal_items_the_first_get_more(n):
    bits = solve(torch.ones(n), torch.ones(n), 2 * n + 5)
    assert bits.tolist() == [3] * 5 + [2] * (n - 5)


def test_other_types_are_taken():
    costs, weights = torch.tensor([4, 1, 9]), torch.tensor([3, 5, 2], dtype=torch.int32)
    wanted = solve(costs.double(), weights.double(), 30.0)
    assert torch.equal(solve(costs, weights, 30), wanted)
    assert torch.equal(
        solve(costs.float().requires_grad_(), weights.half(), 30, torch.tensor(1), torch.tensor([8] * 3)), wanted
    )
    assert solve(torch.empty(0), torch.empty(0), 0).tolist() == []
    assert solve_for_target(torch.empty(0), torch.empty(0), 0.0).tolist() == []
    assert objective(torch.tensor([3.0, 9.0]), torch.tensor([1, 2])) == 4.0


def test_packing_falls_back_to_single_steps():
    """Sizes that need a pass per step, which are taken one by one after some passes; the result is the same."""
    n = 4000
    small, large = torch.full((n,), 0.001, dtype=torch.float64), 1000 - 0.001 * torch.arange(n, dtype=torch.float64)
    sizes = torch.cat([torch.tensor([1.0]), torch.stack([small, large], 1).flatten()])
    taken, _ = solver._first_fit(sizes, 1001.0)
    rest, wanted = 1001.0, []
    for size in sizes.tolist():
        wanted.append(size <= rest)
        rest -= size if size <= rest else 0.0
    assert taken.tolist() == wanted and 1 < sum(wanted) < len(wanted)


# -- a target ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [5, 12, 30, 1000, 20_000])
def test_a_target_is_met_and_nothing_could_be_given_back(family, n):
    for seed in range(1 if n > 1000 else 4):
        costs, weights, _ = instance(family, n, seed)
        for average in (1.5, 3.0, 6.0):
            target = float((costs / (2**average - 1) ** 2).sum())
            bits = solve_for_target(costs, weights, target)
            value = objective(costs, bits)
            assert value <= target
            more = costs * (H[(bits - 2).clamp(min=0)] - H[bits - 1])
            assert bool((value + more[bits > 1] > target * (1 - 1e-12)).all())
            if n >= 1000 and weights.max() < 0.01 * weights.sum():
                # 1 % fewer bytes could not do it, whatever the bits.
                assert (
                    lower_bound(costs, weights, max(0.99 * float(spent(weights, bits)), float(weights.sum()))) > target
                )


def test_a_target_takes_the_fewest_bytes_of_few_items():
    for seed in range(10):
        costs, weights, _ = instance(["equal", "random", "float"][seed % 3], 5, seed)
        every = torch.cartesian_prod(*[torch.arange(1, 9)] * 5)
        values, sizes = (costs * H[every - 1]).sum(1), (weights * every).sum(1)
        target = float(values.sort().values[len(values) // (2 + seed)]) * (1 + 1e-9)
        bits = solve_for_target(costs, weights, target)
        assert objective(costs, bits) <= target
        assert float(spent(weights, bits)) == pytest.approx(float(sizes[values <= target].min()), rel=1e-12)


@pytest.mark.parametrize("n", [4, 40])
def test_targets_at_the_ends(n):
    costs, weights, _ = instance("random", n, 1)
    ones, eights = torch.ones(n, dtype=torch.int64), torch.full((n,), 8)
    assert torch.equal(solve_for_target(costs, weights, objective(costs, ones)), ones)
    assert torch.equal(solve_for_target(costs, weights, math.inf), ones)
    assert torch.equal(solve_for_target(costs, weights, objective(costs, eights)), eights)
    assert torch.equal(solve_for_target(costs, weights, 0.0), eights)
    assert torch.equal(solve_for_target(torch.zeros(n), weights, 0.0), ones)


# -- errors -----------------------------------------------------------------------------------------------------------

ONE = torch.ones(3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_costs_that_are_no_costs(value):
    costs = torch.tensor([1.0, value, 2.0])
    for call in (
        lambda: solve(costs, ONE, 9),
        lambda: solve_for_target(costs, ONE, 1.0),
        lambda: objective(costs, ONE.long()),
    ):
        with pytest.raises(ConfigError, match=r"costs\[1\].*none of them negative.*Received " + str(value)):
            call()


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: solve(ONE, torch.tensor([1.0, 0.0, 1.0]), 9), r"weights\[1\]\).*above zero.*0\.0"),
        (lambda: solve(ONE, torch.ones(2), 9), "same items.*3 and 2"),
        (lambda: solve(ONE[None], ONE, 9), r"one dimension.*\(1, 3\)"),
        (lambda: solve([1.0], ONE, 9), r"list of numbers.*\[1\.0\]"),
        (lambda: solve(ONE, ONE, math.nan), "`budget` is not a number.*nan"),
        (lambda: solve(ONE, ONE, "9"), "`budget` is not a number.*'9'"),
        (lambda: solve_for_target(ONE, ONE, math.nan), "`target` is not a number"),
        (lambda: solve(ONE, ONE, 9, low=0), r"`low` is out of range \(at low\[0\]\).*1 to 8.*0"),
        (lambda: solve(ONE, ONE, 9, high=torch.tensor([8, 9, 8])), r"high\[1\].*9"),
        (lambda: solve(ONE, ONE, 9, high=torch.tensor([8, 8])), r"shape \(3,\).*\(2,\)"),
        (lambda: solve(ONE, ONE, 9, high=4.0), "`high` is not a number of bits.*4.0"),
        (lambda: solve(ONE, ONE, 9, torch.tensor([1, 5, 1]), 4), r"`low` is above `high` \(at item 1\).*5 and 4"),
        (lambda: solve(ONE, torch.tensor([1, 2**60, 1]), 9), "too large to be added up exactly"),
        (lambda: solve(ONE.double() * 1e308, ONE, 9), "too large to be added up exactly"),
        (lambda: objective(ONE, torch.tensor([0, 1, 1])), r"bits\[0\]"),
        (lambda: solve(ONE, ONE, 5, low=2), r"too small .*\(at budget\).*at least 6\.0 bytes.*5\.0"),
        (lambda: lower_bound(ONE, ONE, -1), r"at least 3\.0 bytes.*-1\.0"),
    ],
)
def test_what_is_refused_and_how(call, text):
    with pytest.raises(ConfigError, match=text):
        call()


def test_the_smallest_budget_that_is_named_will_do():
    for n in range(2, 60):
        weights = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        costs = torch.ones(n)
        with pytest.raises(ConfigError) as caught:
            solve(costs, weights, 0.0, 3)
        named = float(str(caught.value).split("at least ")[1].split(" bytes")[0])
        assert solve(costs, weights, named, 3).tolist() == [3] * n
        with pytest.raises(ConfigError, match="too small"):
            solve(costs, weights, math.nextafter(named, 0.0), 3)


def test_exact_sums_of_pairs_are_searched_in_full():
    """Half of the items each make a front; the best pair may lie anywhere on both."""
    for seed in range(5):
        costs, weights, budget = instance("random", 2, seed)
        wanted = min(
            objective(costs, torch.tensor(pair))
            for pair in itertools.product(range(1, 9), repeat=2)
            if spent(weights, torch.tensor(pair)) <= Fraction(budget)
        )
        assert objective(costs, solve(costs, weights, budget)) == wanted
