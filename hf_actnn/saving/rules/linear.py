"""Linear layers and convolutions: the input is coded, the weight is the model's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hf_actnn.saving.call import recast
from hf_actnn.saving.identity import LAST, SAMPLE
from hf_actnn.saving.kept import Exact
from hf_actnn.saving.rules.rule import Rule, functions, register

if TYPE_CHECKING:
    from hf_actnn.saving.call import Call, Slot


def _unknown(call: Call) -> list[tuple[Slot, Tensor]]:
    """The saves that are not known to be weights, in autograd's order."""
    return [
        (slot, tensor)
        for slot, tensor in call.open_slots()
        if tensor.is_floating_point() and not call.is_weight(tensor)
    ]


def _keep_linear(call: Call) -> None:
    data, weight = call.argument(0, "input"), call.argument(1, "weight")
    weight_is_ours = call.is_weight(weight)
    for slot, tensor in _unknown(call):
        if call.same_storage(tensor, data):
            call.data_argument(slot, data, LAST)
            call.fuse(slot, summed=weight.numel())
        elif not weight_is_ours:
            call.data(slot)  # another activation used as a weight
        elif weight.requires_grad and not _is_transposed_copy(tensor, weight):
            # Without a gradient for its weight a linear layer does not save its input. What is left then, as here, is
            # autocast's copy of a frozen or computed weight, which comes as an anonymous tensor.
            call.data_argument(slot, data, LAST)
    _keep_cast_weight(call, weight)


def _is_transposed_copy(tensor: Tensor, weight: Tensor) -> bool:
    """Whether a tensor lies in memory as a cast of the weight does, which a linear layer saves transposed."""
    return (
        tensor.dtype != weight.dtype
        and tensor.shape == weight.shape[::-1]
        and (tensor.stride() == weight.stride()[::-1])
    )


def _keep_cast_weight(call: Call, weight: Tensor) -> None:
    """Autocast's copy of a weight that was itself computed, and can be again."""
    source = call.kept_of(weight)
    if source is None or not source.same_bits or isinstance(source, Exact) or not call.is_weight(weight):
        return
    for slot, tensor in call.open_slots():
        if tensor.dtype != weight.dtype and tensor.is_floating_point() and tensor.numel() == weight.numel():
            recipe = recast(source, weight, tensor)
            if recipe is not None:
                call.keep(slot, recipe)


def _keep_convolution(call: Call) -> None:
    data, weight = call.argument(0, "input"), call.argument(1, "weight")
    # Autograd saves input and weight, in this order, whichever of them needs a gradient.
    slots = _unknown(call)
    for slot, _ in slots[:1]:
        call.data_argument(slot, data, SAMPLE)
        call.fuse(slot, summed=weight.numel())
    if not call.is_weight(weight):
        call.data_all([slot for slot, _ in slots[1:]])
    _keep_cast_weight(call, weight)


LINEAR = register(
    Rule("linear", _keep_linear, rows=LAST, bounded="the weight's gradient is linear in the input"),
    functions("linear"),
)
CONVOLUTION = register(
    Rule("convolution", _keep_convolution, rows=SAMPLE, bounded="the weight's gradient is linear in the input"),
    functions("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
)
