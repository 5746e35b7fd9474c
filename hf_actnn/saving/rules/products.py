"""Products of two tensors: each factor's gradient is linear in the other factor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_actnn.saving.identity import LAST
from hf_actnn.saving.kept import Exact, Quantized
from hf_actnn.saving.recipes import Recipe, View
from hf_actnn.saving.rules.rule import Rule, functions, register
from hf_actnn.saving.writes import tensors_in

if TYPE_CHECKING:
    from hf_actnn.saving.call import Call, Slot
    from hf_actnn.saving.kept import Kept

_LINEAR = "the gradient of each factor is linear in the other"


def _keep_matmul(call: Call) -> None:
    """Factors that cannot be viewed as a batch of matrices are saved as copies, which are kept as the factor.

    Which copy is which factor's: mm and bmm save the right factor first, baddbmm its first batch first; a factor is
    saved if the other needs a gradient. Shapes must agree with that, or the copy is kept by itself.
    """
    joined = call.name == "baddbmm"
    left = call.argument(1, "batch1") if joined else call.argument(0, "input")
    right = call.argument(2, "batch2") if joined else call.argument(1, "mat2" if "mat2" in call.kwargs else "other")
    if call.function is Tensor.__rmatmul__:
        left, right = right, left
    slots: list[tuple[Slot, Tensor]] = call.open_slots()
    data = _not_of_weights(call, slots, [left, right])
    pairs = [(left, right), (right, left)] if joined else [(right, left), (left, right)]
    saved = [factor for factor, other in pairs if isinstance(other, Tensor) and other.requires_grad]
    call.data_all(
        [
            slot
            for slot in data
            if slot.tensor is not None and any(call.same_storage(slot.tensor, factor) for factor in (left, right))
        ],
        LAST,
    )
    # Matrices of different rank are multiplied transposed and folded: then order says nothing.
    if len(saved) == len(slots) and left.dim() == right.dim():
        for (slot, tensor), factor in zip(slots, saved, strict=True):
            if slot.kept is None and slot in data and tensor.shape[-2:] == factor.shape[-2:]:
                call.data_argument(slot, factor, LAST)
    call.data_all([slot for slot in data if slot.kept is None], LAST)


def _keep_mul(call: Call) -> None:
    factors = [slot for slot, tensor in call.open_slots() if not call.is_weight(tensor)]
    call.data_all(factors)
    for slot in factors:
        call.fuse(slot)
    left, right = call.argument(0, "input"), call.argument(1, "other")
    if call.in_place:
        return
    if not isinstance(right, Tensor):  # by a number: nothing is saved
        source = call.kept_of(left)
        if source is not None and not isinstance(source, Exact):
            call.output_recipe("mul", lambda value: value * right, [source], elementwise=True)
    elif isinstance(left, Tensor):
        # Both factors are kept: their product, coded independently, is unbiased.
        parents = [call.kept_of(factor) for factor in (left, right)]
        if _origin(parents[0]) != _origin(parents[1]):
            alike = left.shape == right.shape
            samples = () if alike else _along_samples(call.output, left, right)
            call.output_recipe("mul", lambda a, b: a * b, parents, elementwise=alike, samples=samples)


def _along_samples(output: Tensor, *factors: Tensor) -> tuple[bool, ...]:
    """Which factors have a first dimension of samples, as the first one must."""
    if not output.dim() or factors[0].shape != output.shape:
        return ()
    return tuple(one.dim() == output.dim() and one.shape[0] == len(output) for one in factors)


def _origin(kept: Kept | None) -> tuple:
    """Tells codes and parts of codes apart: of a code and a copy of it the product would be biased."""
    place: tuple = ()
    while isinstance(kept, View) or (isinstance(kept, Recipe) and kept.function is None):
        if isinstance(kept, View):
            place = (kept.offset, kept.shape, kept.stride)
            kept = kept.parent
        else:
            kept = kept.parents[0]
    if isinstance(kept, Quantized) and place == (0, kept.form.shape, kept.form.stride):
        place = ()
    return id(kept), place


def _keep_einsum(call: Call) -> None:
    # Factors come permuted and folded, as views or as copies whose order only einsum knows.
    operands = [value for value in tensors_in(call.args[1:]) if isinstance(value, Tensor)]
    call.data_all(_not_of_weights(call, call.open_slots(), operands), LAST)


def _not_of_weights(call: Call, slots: list[tuple[Slot, Tensor]], operands: list[Tensor]) -> list[Slot]:
    """The saves that hold data. Where some operand is a weight, a save may be a folded copy of it: to count as data it
    has to be a view of a data operand, or of the size of one and of no weight, or a copy whose graph leads to one."""
    slots = [(slot, tensor) for slot, tensor in slots if not call.is_weight(tensor)]
    weights = [value for value in operands if call.is_weight(value)]
    if not weights:
        return [slot for slot, _ in slots]
    data = [value for value in operands if not call.is_weight(value)]
    sizes = {value.numel() for value in data} - {value.numel() for value in weights}
    return [
        slot
        for slot, tensor in slots
        if tensor.numel() in sizes
        or any(call.same_storage(tensor, value) for value in data)
        or _copied_from(tensor, data, weights)
    ]


def _copied_from(tensor: Tensor, data: list[Tensor], weights: list[Tensor]) -> bool:
    if tensor.grad_fn is None:
        return not tensor.requires_grad and all(value.requires_grad for value in weights)
    sources = [value.grad_fn for value in data if value.grad_fn is not None]
    node = tensor.grad_fn
    for _ in range(6):  # a cast, and what einsum and matmul do to an operand: permute, expand, clone, view
        if any(node is source for source in sources):
            return True
        following = node.next_functions
        if len(following) != 1 or following[0][0] is None:
            return False
        node = following[0][0]
    return False


EINSUM = register(Rule("einsum", _keep_einsum, _LINEAR, rows=LAST), [torch.einsum])
MATMUL = register(Rule("matmul", _keep_matmul, _LINEAR, rows=LAST), functions("matmul", "bmm", "mm"))
register(MATMUL, [Tensor.__matmul__, Tensor.__rmatmul__])
BADDBMM = register(Rule("baddbmm", _keep_matmul, _LINEAR, rows=LAST), functions("baddbmm"))
MUL = register(Rule("mul", _keep_mul, _LINEAR, without_saves=True), functions("mul", "multiply"))
register(MUL, [Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__])
