"""Elementwise activations.

Smooth ones read their input, coded, and their output is rebuilt from it. Those whose derivative is piecewise constant
keep the exact piece of each value, in one bit: a derivative must never be read off a coded value's side of a corner
(a 2-bit code loses the sign of a third of a ReLU's positives).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_actnn.codec import rebuild
from hf_actnn.saving.identity import LAST
from hf_actnn.saving.kept import Exact, Geometry
from hf_actnn.saving.recipes import Masking, Recipe
from hf_actnn.saving.rules.rule import Rule, functions, register

if TYPE_CHECKING:
    from hf_actnn import codec
    from hf_actnn.saving.call import Call, Slot
    from hf_actnn.saving.kept import Kept
    from hf_actnn.saving.recipes import AtOnce


class Sides(NamedTuple):
    """Where a derivative jumps: one bit per value, and how a coded value is brought back to its side.

    Attributes:
        predicate, low, high: of the bit; see :func:`hf_actnn.codec.reference.predicate`.
        bring: from the coded values and the bits, as booleans, to values on the side they belong to.
    """

    predicate: str
    low: float
    high: float
    bring: Callable[[Tensor, Tensor], Tensor]


def _sided(call: Call, slot: Slot, tensor: Tensor, kept: Kept, sides: Sides | None) -> Kept:
    """What was coded, with the exact side of each value. Read off the code alone, the derivative of a value near a jump
    would be wrong by the jump, at random and, since values gather on one side of it, not zero on average."""
    if sides is None or isinstance(kept, Exact):
        return kept
    mask = call.mask(slot, tensor, sides.predicate, sides.low, sides.high, on=1.0, off=0.0)
    mask.geometry.dtype = torch.bool
    return call.keep(slot, Recipe("side", sides.bring, [kept, mask], tensor))


def _smooth(
    names: tuple[str, ...],
    again: Callable[[Call], Callable[[Tensor], Tensor]],
    bounded: str = "the derivative is bounded and continuous in the input",
    sides: Callable[[Call], Sides | None] = lambda call: None,
    fused: str = "",
) -> Rule:
    """A rule for a function that saves its input and whose derivative is bounded in it.

    Args:
        again: from the call, the function that computes its output from its input once more, in place: an MLP's hidden
            layer is the largest tensor there is, and a second one beside it would be the peak.
        sides: from the call, what to do where the derivative jumps; None where it does not.
        fused: the function's name for kernels that read codes, where there are some for both passes.
    """

    def keep(call: Call) -> None:
        for slot, tensor in call.open_slots():
            if call.same_storage(tensor, call.output):
                _sided(call, slot, tensor, call.data(slot), sides(call))  # the in-place form of elu saves its result
                return
            kept = call.data_argument(slot, call.argument(0, "input"))
            kept = _sided(call, slot, tensor, kept, sides(call))
            if fused:
                call.fuse(slot, on_cuda=True)
            at_once = _at_once(fused, call.argument(1, "approximate", "none") if fused == "gelu" else "none")
            call.output_recipe(call.name, again(call), [kept], writes=True, elementwise=True, at_once=at_once)

    return register(
        Rule(names[0], keep, bounded=bounded, needs_before=True),
        functions(*names),
    )


def _at_once(name: str, approximate: str) -> AtOnce | None:
    """An activation of what codes stand for, in one pass."""
    if not name:
        return None

    def made(
        packed: codec.PackedTensor, others: list[Tensor], dtype: torch.dtype, mask: Masking | None
    ) -> Tensor | None:
        return rebuild.activation(packed, name, approximate) if mask is None and dtype == packed.dtype else None

    return made


def _plain(function: Callable[..., Tensor]) -> Callable[[Call], Callable[[Tensor], Tensor]]:
    return lambda call: lambda value: function(value, inplace=True)


def _gelu(call: Call) -> Callable[[Tensor], Tensor]:
    approximate = call.argument(1, "approximate", "none")
    return lambda value: torch.ops.aten.gelu_(value, approximate=approximate)


def _elu(call: Call) -> Callable[[Tensor], Tensor]:
    alpha = call.argument(1, "alpha", 1.0)
    return lambda value: F.elu(value, alpha, inplace=True)


def _softplus(call: Call) -> Callable[[Tensor], Tensor]:
    beta, threshold = call.argument(1, "beta", 1), call.argument(2, "threshold", 20)
    return lambda value: torch.ops.aten.softplus.out(value, beta, threshold, out=value)


GELU = _smooth(("gelu",), _gelu, fused="gelu")
SILU = _smooth(("silu",), _plain(F.silu), fused="silu")
MISH = _smooth(("mish",), _plain(F.mish))


def _within_three(value: Tensor, inside: Tensor) -> Tensor:
    """Outside, the sign of the code says on which side: codes of opposite sign would have to be 3 apart or more."""
    size = value.abs()
    size = torch.where(inside, size.clamp_max(3 - 3 * torch.finfo(value.dtype).eps), size.clamp_min(3.0))
    return size.copysign_(value)


def _of_sign(value: Tensor, positive: Tensor) -> Tensor:
    return torch.where(positive, value.clamp_min(torch.finfo(value.dtype).tiny), value.clamp_max(0.0))


_AT_ZERO = Sides("gt", 0.0, 0.0, _of_sign)
HARDSWISH = _smooth(
    ("hardswish",),
    _plain(F.hardswish),
    "the derivative lies in [-0.5, 1.5]; of its jumps of 0.5, at -3 and 3, the side is exact",
    lambda call: Sides("strict_inside", -3.0, 3.0, _within_three),
)
ELU = _smooth(
    ("elu",),
    _elu,
    "the derivative lies between 0 and max(1, alpha); if it jumps, at 0, the side is exact",
    lambda call: None if call.argument(1, "alpha", 1.0) == 1 else _AT_ZERO,
)
SOFTPLUS = _smooth(("softplus",), _softplus)
SELU = _smooth(
    ("selu",),
    lambda call: torch.selu_,
    "the derivative lies between 0 and 1.76; of its jump of 0.7, at 0, the side is exact",
    lambda call: _AT_ZERO,
)


def _celu(call: Call) -> Callable[[Tensor], Tensor]:
    alpha = call.argument(1, "alpha", 1.0)
    return lambda value: torch.celu_(value, alpha)


CELU = _smooth(("celu",), _celu, "the derivative lies in [0, 1]")


def _keep_glu(call: Call) -> None:
    dim = call.argument(1, "dim", -1)
    for slot, _ in call.open_slots():
        kept = call.data_argument(slot, call.argument(0, "input"))
        call.output_recipe("glu", lambda value: F.glu(value, dim), [kept])


GLU = register(
    Rule("glu", _keep_glu, bounded="linear in one half, and the sigmoid of the other is bounded"), functions("glu")
)


def _keep_logsigmoid(call: Call) -> None:
    """On a CPU a buffer is saved beside the input, a function of it."""
    data = call.argument(0, "input")
    kept: Kept | None = None
    for slot, tensor in call.open_slots():
        if call.same_storage(tensor, data):
            kept = call.data(slot)
        elif kept is not None and tensor.numel() == data.numel():
            call.keep(slot, Recipe("logsigmoid", lambda value: value.abs().neg().exp(), [kept], tensor))
    call.output_recipe("logsigmoid", F.logsigmoid, [kept])


LOGSIGMOID = register(
    Rule("logsigmoid", _keep_logsigmoid, bounded="the derivative lies in [0, 1]"), functions("logsigmoid")
)


def _keep_result(call: Call) -> None:
    for slot, _ in call.open_slots():
        call.data(slot)


SIGMOID = register(Rule("sigmoid", _keep_result, bounded="y (1 - y), y in [0, 1]"), functions("sigmoid"))
TANH = register(Rule("tanh", _keep_result, bounded="1 - y^2, y in [-1, 1]"), functions("tanh"))


def _keep_softmax(call: Call) -> None:
    for slot, _ in call.open_slots():
        call.data(slot, LAST)


SOFTMAX = register(
    Rule("softmax", _keep_softmax, rows=LAST, bounded="y (dy - sum y dy), quadratic in y in [0, 1]"),
    functions("softmax", "softmin"),
)


def _keep_relu(call: Call) -> None:
    half = call.before.half if type(call.before) is Recipe else None
    for slot, result in call.open_slots():
        if half is not None and half.geometry.like(Geometry(result)) and half.geometry.dtype == result.dtype:
            call.keep(slot, half.mask)
            call.fuse(slot, on_cuda=True)
            call.scope.registry.learn(call.output, half)
            continue
        # threshold_backward passes the gradient where not (y <= 0): nan passes it.
        mask = call.mask(slot, result, "not_le", 0.0, 0.0, on=1.0, off=0.0)
        call.fuse(slot, on_cuda=True)
        call.output_masked(call.before, mask, 1.0)


RELU = register(
    Rule("relu", _keep_relu, bounded="one exact bit per value", needs_before=True, lossless=True), functions("relu")
)


def _keep_threshold(call: Call) -> None:
    limit = float(call.argument(1, "threshold"))
    for slot, tensor in call.open_slots():
        if abs(limit) < 128:  # beyond, limit + 1 may be limit in the narrowest dtype
            call.mask(slot, tensor, "not_le", limit, 0.0, on=limit + 1, off=limit - 1)
            call.fuse(slot, on_cuda=True)


THRESHOLD = register(
    Rule("threshold", _keep_threshold, bounded="one exact bit per value", lossless=True), functions("threshold")
)


def _keep_leaky_relu(call: Call) -> None:
    slope = call.argument(1, "negative_slope", 0.01)
    if not slope > 0:
        return
    for slot, tensor in call.open_slots():
        mask = call.mask(slot, tensor, "gt", 0.0, 0.0, on=1.0, off=-1.0)
        call.output_recipe(
            "leaky_relu", lambda value, side: torch.where(side > 0, value, value * slope), [call.before, mask]
        )


LEAKY_RELU = register(
    Rule(
        "leaky_relu",
        _keep_leaky_relu,
        bounded="one exact bit per value",
        needs_before=True,
        exact_reason="a slope that is not positive has no in-place derivative",
    ),
    functions("leaky_relu"),
)


def _keep_between(call: Call, low: float, high: float, predicate: str, line: tuple[float, float] = (1.0, 0.0)) -> None:
    """The derivative is constant between two corners and zero outside: one bit.

    Between them the output is made of the code along the line, slope and offset, wherever the code may lie: cut off at
    the corners it would not be right on average.
    """
    on, off = inside_and_outside(low, high)
    slope, offset = line
    # Where no bit tells which, a code beyond this is taken for one above the upper corner.
    middle = math.inf if math.isinf(high) else -math.inf if math.isinf(low) else (low + high) / 2

    ends = [end * slope + offset for end in (low, high)]

    def again(value: Tensor, side: Tensor) -> Tensor:
        """Both are its own to write to."""
        assert on is not None
        inside = side.eq(on)
        side.fill_(ends[0]).masked_fill_(value > middle, ends[1])
        if line != (1.0, 0.0):
            value.mul_(slope).add_(offset)
        return torch.where(inside, value, side, out=value)

    for slot, tensor in call.open_slots():
        limit = torch.finfo(tensor.dtype).max if tensor.is_floating_point() else 0.0
        if on is None or off is None or not max(abs(on), abs(off)) * (1 + _MARGIN) < limit:
            continue
        mask = call.mask(slot, tensor, predicate, low, high, on=on, off=off)
        if slope == 1:
            call.fuse(slot, on_cuda=True)
        call.output_recipe(call.name, again, [call.before, mask], writes=True)


#: Further apart, relative to its size, than bfloat16 rounds any number.
_MARGIN = 1 / 64


def inside_and_outside(low: float, high: float) -> tuple[float | None, float | None]:
    """A finite value strictly between the corners and one beyond them, in any dtype; None where there is none."""
    if math.isinf(low) and math.isinf(high):
        return None, None
    if math.isinf(low):
        low = high - 2 * max(1.0, abs(high) * _MARGIN)
        return low, 2 * high - low
    if math.isinf(high):
        high = low + 2 * max(1.0, abs(low) * _MARGIN)
        return high, 2 * low - high
    middle = (low + high) / 2
    narrow = high - low <= 4 * _MARGIN * max(abs(low), abs(high))
    return None if narrow else middle, low - max(1.0, abs(low) * _MARGIN)


def _keep_hardtanh(call: Call) -> None:
    low, high = call.argument(1, "min_val", -1.0), call.argument(2, "max_val", 1.0)
    _keep_between(call, float(low), float(high), _within(call))


def _keep_relu6(call: Call) -> None:
    _keep_between(call, 0.0, 6.0, _within(call))


def _within(call: Call) -> str:
    """hardtanh_backward passes the gradient of nan where it is written out (not x <= low), and stops it where it is
    vectorised, on the CPU."""
    return "strict_inside" if call.output.device.type == "cpu" else "inside"


def _keep_hardsigmoid(call: Call) -> None:
    # hardsigmoid_backward passes the gradient where -3 < x < 3: nan stops it.
    _keep_between(call, -3.0, 3.0, "strict_inside", (1 / 6, 0.5))


_ONE_BIT: dict[str, Any] = {"bounded": "one exact bit per value", "needs_before": True, "lossless": True}
HARDTANH = register(Rule("hardtanh", _keep_hardtanh, **_ONE_BIT), functions("hardtanh"))
RELU6 = register(Rule("relu6", _keep_relu6, **_ONE_BIT), functions("relu6"))
HARDSIGMOID = register(Rule("hardsigmoid", _keep_hardsigmoid, **_ONE_BIT), functions("hardsigmoid"))
