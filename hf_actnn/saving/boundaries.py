"""What a gradient checkpoint keeps: the arguments of the block that it will run again.

Both kinds of `torch.utils.checkpoint` hand them to the saved-tensor hooks that are on around the checkpoint: the
reentrant one as saves of its `autograd.Function`, the other as saves that belong to no operation. Nothing about these
tensors tells what they are, but the code that saves them does, whichever name a library has imported the function by.

They are coded more finely than other saves: what is run again is not linear in them, so their error comes back as a
bias too, and it goes through everything that the block computes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from hf_actnn.saving.call import Call, exact, extra_nbytes
from hf_actnn.saving.kept import Kept, Quantized, fills_its_memory
from hf_actnn.saving.recipes import View
from hf_actnn.saving.rows import coded_row_length

if TYPE_CHECKING:
    from hf_actnn.saving.call import Slot
    from hf_actnn.saving.scope import Scope

#: What these saves are listed as.
NAME = "checkpoint"
_CHECKPOINT = vars(torch.utils.checkpoint)
_FUNCTION = vars(torch.autograd.function)
#: Whose hooks are on while a block runs again; any others of a checkpoint are left alone.
_AGAIN = "_recomputation_hook."


def is_saving(depth: int = 1) -> bool:
    """Whether a checkpoint keeps an argument here.

    Args:
        depth: frames between this function's caller and the pack hook that autograd has called.
    """
    frame: FrameType | None = sys._getframe(depth + 1)
    if frame is not None and frame.f_globals is _FUNCTION:  # autograd.Function.apply
        frame = frame.f_back
    return frame is not None and frame.f_globals is _CHECKPOINT


def is_recomputing() -> bool:
    """Whether a reentrant checkpoint runs its block again: a forward pass inside a node of a backward pass."""
    return isinstance(torch._C._current_autograd_node(), torch.autograd.function.BackwardCFunction)


def hooks() -> tuple[Callable, Callable] | None:
    """The saved-tensor hooks that are on here, if they are a non-reentrant checkpoint's."""
    found = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return (
        found if found is not None and getattr(found[0], "__module__", "") == torch.utils.checkpoint.__name__ else None
    )


def is_selective() -> bool:
    """Whether a checkpoint keeps the results of some operations, and counts all of them: the codec's would be among
    them, in one of the two runs."""
    modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else ()
    return any(type(mode).__module__ == torch.utils.checkpoint.__name__ for mode in modes)


def receiver() -> Callable[[Tensor], Any] | None:
    """Where a non-reentrant checkpoint collects what its block saves when it runs again in a backward pass; None
    elsewhere, a checkpoint's forward pass included."""
    found = hooks()
    if found is None or not getattr(found[0], "__qualname__", "").startswith(_AGAIN):
        return None
    return found[0] if torch._C._current_graph_task_id() != -1 else None


class Boundary(Kept):
    """An argument of a checkpoint, made of a code.

    The block may write to it when it runs again, so each request gets memory of its own, and no other save is given
    what this one was.
    """

    __slots__ = ("source",)

    def __init__(self, source: Kept) -> None:
        self.source = source

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.source.kind

    def get(self) -> Tensor:
        return self.source.get()

    def leaves(self) -> Iterator[Kept]:
        return self.source.leaves()


def keep(scope: Scope, slot: Slot) -> None:
    """Decide on an argument that a checkpoint keeps."""
    tensor = slot.tensor
    assert tensor is not None
    call = Call(scope, torch.utils.checkpoint.checkpoint, None, (), {})
    with torch.no_grad(), torch._C.DisableTorchFunction():
        slot.kept, slot.reason = _kept(call, tensor)


def _kept(call: Call, tensor: Tensor) -> tuple[Kept, str]:
    scope, bits = call.scope, call.policy.checkpoint_bits
    registry = scope.registry
    if bits is None:
        return exact(scope, tensor, call.where), call.policy.reason or "checkpoint_bits='exact'"
    if not tensor.is_floating_point() or tensor.grad_fn is None or call.is_weight(tensor):
        # Masks, indices, parameters and what is computed from these; a leaf is held by the graph in any case.
        return exact(scope, tensor, call.where), "no activation with a gradient"
    found = registry.find(tensor)
    if found is not None and found.same_bits and 8 * extra_nbytes(registry, found) <= bits * tensor.numel():
        return exact(scope, tensor, call.where), "held exactly anyway"
    if found is not None and _bits_of(found) >= bits:
        return Boundary(found), ""
    call.policy = call.policy._replace(bits=bits, low=bits, high=bits)
    length = _row_length(call, tensor)
    if length == 0:
        return exact(scope, tensor, call.where), "too small to pay"
    kept = Quantized(call.packed(tensor, bits, length))
    registry.learn(tensor, kept)
    return Boundary(kept), ""


def _bits_of(kept: Kept) -> float:
    """Bits of a code of the tensor itself; 0 of anything else."""
    while type(kept) is View:
        kept = kept.parent
    if type(kept) is not Quantized:
        return 0
    widths = kept.form.widths
    return kept.form.bits if widths is None else int(widths.min())


def _row_length(call: Call, tensor: Tensor) -> int:
    """Length of the rows in which a tensor is coded, in the shape in which an operation made it; 0: a code would not
    pay."""
    layout = call.scope.registry.layout(tensor)
    shape, stride, rows = tensor.shape, tensor.stride(), None
    if layout is not None:
        rows = layout.rows
        whole = layout.numel == tensor.numel() and layout.offset == tensor.storage_offset()
        if whole and fills_its_memory(tensor):
            shape, stride = layout.shape, layout.stride
    return coded_row_length(shape, stride, rows, 0, tensor.itemsize, call.policy)
