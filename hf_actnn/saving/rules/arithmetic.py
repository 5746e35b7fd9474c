"""Arithmetic by element: quotients, powers, exponentials, bounds, choices."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_actnn.saving.rules.rule import Rule, functions, nothing, register

if TYPE_CHECKING:
    from hf_actnn.saving.call import Call


def _factors(call: Call) -> None:
    call.data_all([slot for slot, tensor in call.open_slots() if not call.is_weight(tensor)])


ADDCMUL = register(
    Rule("addcmul", _factors, bounded="the gradient of each factor is linear in the other"), functions("addcmul")
)


def _keep_quotient(call: Call) -> None:
    """The numerator is coded. The divisor stays: its reciprocal is squared in the backward formula, and not bounded."""
    above, below = call.argument(0, "input"), call.argument(1, "other")
    if call.function is Tensor.__rtruediv__:
        above, below = below, above
    if not isinstance(above, Tensor) or not isinstance(below, Tensor) or call.in_place:
        return
    if call.kwargs.get("rounding_mode") is not None:
        return
    # Two parts of one tensor, or a tensor by itself: then the view tells which is meant.
    same = call.same_view if call.same_storage(above, below) else call.same_storage
    divisor = None
    for slot, tensor in call.open_slots():
        if same(tensor, below):
            divisor = call.exact(slot, _EXACT_DIVISOR)
        elif same(tensor, above):
            call.data(slot)
    if divisor is not None:
        call.output_recipe("div", lambda a, b: a / b, [call.kept_of(above), divisor])


_EXACT_DIVISOR = "a divisor, whose reciprocal is not bounded"
DIV = register(
    Rule(
        "div", _keep_quotient, bounded="the divisor's gradient is linear in the numerator", exact_reason=_EXACT_DIVISOR
    ),
    [*functions("div", "divide", "true_divide"), Tensor.__truediv__, Tensor.__rtruediv__],
)


def _keep_result(call: Call) -> None:
    for slot, tensor in call.open_slots():
        if call.same_storage(tensor, call.output):
            call.data(slot)


EXP = register(Rule("exp", _keep_result, bounded="the gradient is linear in the result"), functions("exp"))


def _keep_power(call: Call) -> None:
    """Squares and cubes: their derivatives are polynomials of degree one and two."""
    exponent = 2 if call.name == "square" else call.argument(1, "exponent")
    data = call.argument(0, "input")
    if not isinstance(exponent, (int, float)) or exponent not in (2, 3):
        return
    if not isinstance(data, Tensor) or call.in_place:
        return
    for slot, _ in call.open_slots():
        kept = call.data_argument(slot, data)
        call.output_recipe("pow", lambda value: value.pow(exponent), [kept], elementwise=True)


_POLYNOMIAL = "the derivative is a polynomial of degree one or two"
POW = register(
    Rule("pow", _keep_power, bounded=_POLYNOMIAL, exact_reason="a power whose derivative is not bounded"),
    [*functions("pow"), Tensor.__pow__],
)
SQUARE = register(Rule("square", _keep_power, bounded=_POLYNOMIAL), functions("square"))


def _bound(call: Call, position: int, name: str, none: float) -> float | None:
    """A bound as a number, ``none`` where there is none; None where it is a tensor."""
    value: Any = call.kwargs.get(name)
    if value is None and len(call.args) > position:
        value = call.args[position]
    if value is None:
        return none
    return None if isinstance(value, Tensor) else float(value)


@lru_cache(maxsize=256)
def _within(low: float, high: float, dtype: torch.dtype) -> float | None:
    """A value of a dtype that torch finds between two bounds, these included."""
    for candidate in (0.0, low / 2 + high / 2, low, high):
        value = torch.tensor(candidate, dtype=dtype)
        if value.isfinite() and value >= low and value <= high:
            return value.item()
    return None


def _keep_clamp(call: Call) -> None:
    """The gradient passes between the bounds, these included, and is stopped elsewhere and for nan: one bit."""
    name = getattr(call.function, "__name__", "")
    low = -math.inf if "max" in name else _bound(call, 1, "min", -math.inf)
    high = math.inf if "min" in name else _bound(call, 1 if "max" in name else 2, "max", math.inf)
    if low is None or high is None:
        return
    for slot, tensor in call.open_slots():
        on = _within(low, high, tensor.dtype) if tensor.is_floating_point() else None
        if on is None:
            continue
        inside = (tensor >= low) & (tensor <= high)
        # A comparison with nan is false, whatever the bounds.
        call.mask(slot, inside, "nonzero", 0.0, 0.0, on=on, off=math.nan)
        parents = [call.before]
        call.output_recipe("clamp", lambda value: value.clamp(low, high), parents, repeats=True, elementwise=True)


CLAMP = register(
    Rule(
        "clamp",
        _keep_clamp,
        bounded="one exact bit per value",
        needs_before=True,
        exact_reason="bounds that are tensors",
    ),
    functions("clamp", "clip", "clamp_min", "clamp_max"),
)

# What they save is a condition, which is kept as exact bits whatever the operation.
WHERE = register(
    Rule("where", nothing, bounded="one exact bit per value", exact_reason="a condition"),
    functions("where", "masked_fill"),
)
