"""A problem of the solver: its arguments, checked, and sums of bytes that are never rounded up."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_actnn.errors import ConfigError, message

MIN_BITS, MAX_BITS = 1, 8


class Problem(NamedTuple):
    """Checked arguments on the CPU, each of shape [I]."""

    costs: Tensor  #: float64
    weights: Tensor  #: float64
    low: Tensor  #: int64
    high: Tensor  #: int64


def as_number(value: float, name: str) -> float:
    """The largest float that is not above ``value``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(
            message(
                f"`{name}` is not a number",
                expected="an int or a float",
                received=repr(value),
                next_step="Give a number",
            )
        )
    number = float(value)
    if math.isnan(number):
        raise ConfigError(
            message(
                f"`{name}` is not a number", expected="an int or a float", received="nan", next_step="Give a number"
            )
        )
    return number if number <= value else math.nextafter(number, -math.inf)


def as_reals(values: Tensor, name: str, above_zero: bool = False) -> Tensor:
    """Checked values in float64 on the CPU, [I]."""
    wanted = "finite numbers above zero" if above_zero else "finite numbers, none of them negative"
    if not isinstance(values, Tensor) or values.dim() != 1 or values.is_complex() or values.dtype == torch.bool:
        received = f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)
        raise ConfigError(
            message(
                f"`{name}` is not a list of numbers",
                expected=f"a tensor of one dimension with {wanted}",
                received=received,
                next_step="Give one number per item",
            )
        )
    reals = values.detach().to("cpu", torch.float64)
    bad = ~torch.isfinite(reals) | ((reals <= 0) if above_zero else (reals < 0))
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise ConfigError(
            message(
                f"`{name}` cannot be used",
                where=f"{name}[{index}]",
                expected=wanted,
                received=f"{reals[index].item()!r} ({int(bad.sum())} of {len(reals)} are wrong)",
                next_step="Look at how it was computed",
            )
        )
    if not math.isfinite(MAX_BITS * float(reals.sum())) or (not values.is_floating_point() and (reals > 2**53).any()):
        raise ConfigError(
            message(
                f"`{name}` is too large to be added up exactly",
                expected="sums within the range of float64, and whole numbers up to 2^53",
                received=f"up to {float(reals.max())!r}",
                next_step="Give it in a larger unit",
            )
        )
    return reals


def as_widths(bits: Tensor | int, count: int, name: str) -> Tensor:
    """Checked bits in int64 on the CPU, [I]."""
    whole = isinstance(bits, int) and not isinstance(bits, bool)
    if isinstance(bits, Tensor):
        whole = not (bits.is_floating_point() or bits.is_complex() or bits.dtype == torch.bool)
        whole = whole and bits.shape in (torch.Size([]), torch.Size([count]))
    if not whole:
        received = f"{bits.dtype} of shape {tuple(bits.shape)}" if isinstance(bits, Tensor) else repr(bits)
        raise ConfigError(
            message(
                f"`{name}` is not a number of bits",
                expected=f"an int, or a tensor of ints of shape ({count},)",
                received=received,
                next_step="Give one for all items or one per item",
            )
        )
    widths = torch.as_tensor(bits).detach().to("cpu", torch.int64).expand(count)
    bad = (widths < MIN_BITS) | (widths > MAX_BITS)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise ConfigError(
            message(
                f"`{name}` is out of range",
                where=f"{name}[{index}]",
                expected=f"{MIN_BITS} to {MAX_BITS}",
                received=str(int(widths[index])),
                next_step="Choose bits that the codec has",
            )
        )
    return widths


def as_problem(costs: Tensor, weights: Tensor, low: Tensor | int, high: Tensor | int) -> Problem:
    """The arguments of a problem, checked.

    Raises:
        ConfigError: they are none.
    """
    costs, weights = as_reals(costs, "costs"), as_reals(weights, "weights", above_zero=True)
    if len(costs) != len(weights):
        raise ConfigError(
            message(
                "`costs` and `weights` are not of the same items",
                expected="the same length",
                received=f"{len(costs)} and {len(weights)}",
                next_step="Give one number of each per item",
            )
        )
    low, high = as_widths(low, len(costs), "low"), as_widths(high, len(costs), "high")
    if bool((low > high).any()):
        index = int((low > high).nonzero()[0])
        raise ConfigError(
            message(
                "`low` is above `high`",
                where=f"item {index}",
                expected="low <= high",
                received=f"{int(low[index])} and {int(high[index])}",
                next_step="Exchange them or leave one out",
            )
        )
    return Problem(costs, weights, low, high)


def difference(total: float, parts: list[float]) -> float:
    """The largest float that is not above ``total - sum(parts)``."""
    terms = [total, *(-part for part in parts)]
    difference = math.fsum(terms)
    # The sign of a sum that is rounded once is exact.
    return math.nextafter(difference, -math.inf) if math.fsum([*terms, -difference]) < 0 else difference


def terms(weights: Tensor, bits: Tensor) -> list[float]:
    """Floats whose exact sum is the exact sum of ``weights * bits``."""
    if bool((weights == weights.floor()).all()) and MAX_BITS * float(weights.sum()) < 2**53:
        return [float((weights * bits).sum())]
    # A weight times a power of two is exact, times other whole numbers it is not.
    return [part for k in range(4) for part in (weights * 2.0**k)[(bits >> k & 1).bool()].tolist()]


def capacity_of(problem: Problem, budget: float) -> float:
    """Bytes left of the budget above ``low`` everywhere, rounded down."""
    budget = as_number(budget, "budget")
    parts = terms(problem.weights, problem.low)
    # More than all can take is no different from that.
    most = 2.0 * float((problem.weights * (problem.high - problem.low)).sum())
    capacity = difference(budget, parts) if math.isfinite(budget) else budget
    if capacity < 0:
        least = -difference(0.0, parts)
        raise ConfigError(
            message(
                "The budget is too small for the fewest bits of every item",
                where="budget",
                expected=f"at least {least!r} bytes",
                received=repr(budget),
                next_step="Raise the budget or lower `low`",
            )
        )
    return _usable(problem.weights, min(capacity, most))


def _usable(weights: Tensor, capacity: float) -> float:
    """Of whole weights: the capacity without what no sum of them can use, as all sums are multiples of a divisor."""
    # Of one weight or few different ones it is a good part of a step. Any divisor serves, and int64 ends at 2^63.
    if capacity >= 2**53 or not len(weights) or bool((weights != weights.floor()).any()):
        return capacity
    units = weights.long()
    while len(units) > 1:
        half = (len(units) + 1) // 2
        units = torch.cat([torch.gcd(units[: len(units) - half], units[half:]), units[len(units) - half : half]])
    unit = int(units[0])
    return float(int(capacity) // unit * unit)
