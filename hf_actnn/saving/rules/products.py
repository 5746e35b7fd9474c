"""Products of two tensors: each factor's gradient is linear in the other factor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hf_actnn.saving.identity import LAST
from hf_actnn.saving.rules.rule import Rule, functions, register

if TYPE_CHECKING:
    from hf_actnn.saving.call import Call, Slot

_LINEAR = "the gradient of each factor is linear in the other"


def _keep_matmul(call: Call) -> None:
    """Autograd saves the left factor if the right one needs a gradient, then the right one if the left does.

    Factors that cannot be viewed as a batch of matrices are saved as copies; order tells which is which.
    """
    first = 1 if call.name == "baddbmm" else 0
    left = call.argument(first, "batch1" if first else "input")
    right = call.argument(first + 1, "batch2" if first else "mat2" if "mat2" in call.kwargs else "other")
    factors = [factor for factor, other in ((left, right), (right, left))
               if isinstance(factor, Tensor) and isinstance(other, Tensor) and other.requires_grad]
    slots: list[tuple[Slot, Tensor]] = call.open_slots()
    data = [slot for slot, tensor in slots if not call.is_weight(tensor)]
    if len(factors) != len(slots):
        call.data_all(data, LAST)
        return
    copies = {id(slot) for slot, tensor in slots if not any(call.same_storage(tensor, f) for f in factors)}
    call.data_all([slot for slot in data if id(slot) not in copies], LAST)
    for (slot, _), factor in zip(slots, factors, strict=True):
        if slot.kept is None and slot in data:
            call.data_argument(slot, factor, LAST)


def _keep_mul(call: Call) -> None:
    call.data_all([slot for slot, tensor in call.open_slots() if not call.is_weight(tensor)])
    left, right = call.argument(0, "input"), call.argument(1, "other")
    if isinstance(left, Tensor) and isinstance(right, Tensor) and not call.in_place:
        # Both factors are kept: their product, coded independently, is unbiased.
        parents = [call.kept_of(factor) for factor in (left, right)]
        if parents[0] is not parents[1]:
            call.output_recipe("mul", lambda a, b: a * b, parents)


MATMUL = register(Rule("matmul", _keep_matmul, _LINEAR, rows=LAST), functions("matmul", "bmm", "mm"))
register(MATMUL, [Tensor.__matmul__, Tensor.__rmatmul__])
BADDBMM = register(Rule("baddbmm", _keep_matmul, _LINEAR, rows=LAST), functions("baddbmm"))
MUL = register(Rule("mul", _keep_mul, _LINEAR), functions("mul", "multiply"))
register(MUL, [Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__])
