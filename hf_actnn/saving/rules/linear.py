"""Linear layers and convolutions: the input is coded, the weight is the model's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_actnn.saving.identity import LAST, SAMPLE
from hf_actnn.saving.rules.rule import Rule, functions, register

if TYPE_CHECKING:
    from hf_actnn.saving.call import Call


def _keep(rows: str, call: Call) -> None:
    data, weight = call.argument(0, "input"), call.argument(1, "weight")
    # Autograd saves the input first. A frozen weight's autocast copy comes as an anonymous tensor, so position tells
    # the two apart; and without a gradient for the weight a linear layer does not save its input at all.
    slots = call.open_slots()
    input_saved = rows == SAMPLE or weight.requires_grad
    for position, (slot, tensor) in enumerate(slots):
        if call.is_weight(tensor) or not tensor.is_floating_point():
            continue
        if call.same_storage(tensor, data) or (position == 0 and input_saved):
            call.data_argument(slot, data, rows)
        elif not call.is_weight(weight):
            call.data(slot)  # another activation used as a weight


def _keep_linear(call: Call) -> None:
    _keep(LAST, call)


def _keep_convolution(call: Call) -> None:
    _keep(SAMPLE, call)


LINEAR = register(
    Rule("linear", _keep_linear, rows=LAST, bounded="the weight's gradient is linear in the input"),
    functions("linear"),
)
CONVOLUTION = register(
    Rule("convolution", _keep_convolution, rows=SAMPLE, bounded="the weight's gradient is linear in the input"),
    functions("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
)
