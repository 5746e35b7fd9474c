"""Attention: q, k and v are kept; what else is needed is computed from them again, so that the backward pass
differentiates the attention of the coded q, k, v. With an exact logsumexp and coded q and k the probabilities would
not sum to one, and the gradients of a trained model explode."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_actnn.errors import SavedTensorError, message
from hf_actnn.saving.call import Slot, exact
from hf_actnn.saving.identity import LAST
from hf_actnn.saving.kept import Exact, Kept, fills_its_memory
from hf_actnn.saving.recipes import Recipe, Rerun, Rerunnable
from hf_actnn.saving.rules.rule import Rule, functions, nothing, register

if TYPE_CHECKING:
    from hf_actnn.saving.call import Call

_BACKENDS = {
    "ScaledDotProductFlashAttentionForCpuBackward0": SDPBackend.FLASH_ATTENTION,
    "ScaledDotProductFlashAttentionBackward0": SDPBackend.FLASH_ATTENTION,
    "ScaledDotProductEfficientAttentionBackward0": SDPBackend.EFFICIENT_ATTENTION,
    "ScaledDotProductCudnnAttentionBackward0": SDPBackend.CUDNN_ATTENTION,
}


def _keep_attention(call: Call) -> None:
    node: Any = call.output.grad_fn
    # A padded head is sliced off after the fused operation.
    for _ in range(2):
        name = node.name() if node is not None else ""
        if name in _BACKENDS:
            _keep_fused(call, _BACKENDS[name])
            return
        following: tuple = node.next_functions if node is not None else ()
        node = following[0][0] if len(following) == 1 else None
    if not _keep_mathematical(call):
        _keep_composite(call)


def _keep_fused(call: Call, backend: SDPBackend) -> None:
    at = call.argument
    if at(4, "dropout_p", 0.0) != 0.0:
        call.exact_rest("dropout inside a fused attention: its random state cannot be set back")
        return
    query, key, value, mask = at(0, "query"), at(1, "key"), at(2, "value"), at(3, "attn_mask")
    slots = call.open_slots()
    inputs: list[Slot] = []
    for argument in (query, key, value):
        found = _save_of(call, argument, [pair for pair in slots if pair[0] not in inputs])
        if found is None:
            call.exact_rest("the fused attention saved copies of its inputs")
            return
        inputs.append(found)
    call.data_all(inputs, LAST)
    parents = [slot.kept for slot in inputs]
    mask_slot = next(
        (
            slot
            for slot, tensor in slots
            if slot not in inputs and isinstance(mask, Tensor) and call.same_storage(tensor, mask)
        ),
        None,
    )
    if mask_slot is not None:
        parents.append(_keep_mask(call, mask_slot))
    elif isinstance(mask, Tensor):
        parents.append(_kept_mask(call, mask))  # a boolean mask, which torch saves a float copy of
    again = _again(
        call, _fused(call, backend), [argument.requires_grad for argument in (query, key, value)], len(slots)
    )
    group = Rerun(
        again, [parent for parent in parents if parent is not None], owned=len(slots) - (mask_slot is not None)
    )
    if mask_slot is None and len(parents) > len(inputs):
        call.scope.session.lend(parents[-1])  # type: ignore[arg-type]
    for index, (slot, tensor) in enumerate(slots):
        if slot is mask_slot:
            continue
        slot.kept = Rerunnable(group, index, own=True)
        if slot not in inputs and call.same_storage(tensor, call.output):
            call.scope.registry.learn(tensor, Rerunnable(group, index, own=False), LAST)


def _save_of(call: Call, argument: Tensor, slots: list[tuple[Slot, Tensor]]) -> Slot | None:
    """The save that is an argument: the very tensor, or else the same view of its memory, another of that memory, or a
    cast."""
    for slot, tensor in slots:
        if tensor is argument:
            return slot
    matches = [
        (slot, tensor)
        for slot, tensor in slots
        if tensor.shape == argument.shape and (call.same_storage(tensor, argument) or tensor.dtype != argument.dtype)
    ]
    for slot, tensor in matches:
        if tensor.stride() == argument.stride() and tensor.storage_offset() == argument.storage_offset():
            return slot
    return matches[0][0] if matches else None


def _keep_mask(call: Call, slot: Slot) -> Kept:
    assert slot.tensor is not None
    kept = call.two_valued(slot.tensor)
    return call.exact(slot, "an attention mask") if kept is None else call.keep(slot, kept)


def _kept_mask(call: Call, mask: Tensor) -> Kept:
    """A mask that autograd does not save, to the bit."""
    return call.two_valued(mask) or exact(call.scope, mask, call.where)


#: Runs the attention of (query, key, value, mask); returns its output.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _fused(call: Call, backend: SDPBackend) -> Attend:
    options: dict[str, Any] = {
        "is_causal": call.argument(5, "is_causal", False),
        "scale": call.kwargs.get("scale"),
    }
    if call.kwargs.get("enable_gqa", False):
        options["enable_gqa"] = True

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if query.device.type == "cpu":
            # By name: choosing a backend sets flags of the whole process, which other threads would meet.
            mask = _additive(mask, query.dtype)
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, options["is_causal"], attn_mask=mask, scale=options["scale"]
            )[0]
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, mask, **options)

    return attend


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), -torch.inf)


class _Recording:
    """Gradients on, autocast off, and these hooks on what is saved: three contexts in one, for the sake of the many
    small attentions that a model with windows has."""

    __slots__ = ("pack", "unpack", "device", "before")

    def __init__(self, pack: Callable[[Tensor], int], unpack: Callable[[int], Tensor], device: str) -> None:
        self.pack, self.unpack, self.device = pack, unpack, device

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled(), torch.is_autocast_enabled(self.device)
        # First, for where hooks are switched off this raises, and nothing may be left changed.
        torch._C._autograd._push_saved_tensors_default_hooks(self.pack, self.unpack)
        torch._C._set_grad_enabled(True)
        torch.set_autocast_enabled(self.device, False)

    def __exit__(self, *_: Any) -> None:
        torch.set_autocast_enabled(self.device, self.before[1])
        torch._C._set_grad_enabled(self.before[0])
        torch._C._autograd._pop_saved_tensors_default_hooks()


def _again(
    call: Call, attend: Attend, needs_grad: list[bool], count: int, *, with_output: bool = False
) -> Callable[..., list[Tensor]]:
    """A function from (q, k, v[, mask]) to all that the operation saves, in its order, and its output if asked for."""
    where = call.where

    def run(*inputs: Tensor) -> list[Tensor]:
        saved: list[Tensor] = []

        def record(tensor: Tensor) -> int:
            saved.append(
                tensor.detach()
            )  # not the output itself: its graph would hold this list, and the list the graph
            return len(saved) - 1

        # What is not asked about, a boolean mask say, takes part as it is.
        flags = [*needs_grad, *[False] * (len(inputs) - len(needs_grad))]
        leaves = [
            tensor.detach().requires_grad_(flag) if flag else tensor.detach()
            for tensor, flag in zip(inputs, flags, strict=True)
        ]
        with _Recording(record, saved.__getitem__, leaves[0].device.type):
            output = attend(leaves[0], leaves[1], leaves[2], leaves[3] if len(leaves) > 3 else None)
        if len(saved) != count:
            raise SavedTensorError(
                message(
                    "attention saved other tensors when it was run again",
                    where=where,
                    expected=f"{count} tensors",
                    received=str(len(saved)),
                    next_step="Leave this module out with skip=(...)",
                )
            )
        return [*saved, output.detach()] if with_output else saved

    return run


#: A mask that nothing can give back is held where the probabilities are so many times larger.
_MASK_SHARE = 8


def _keep_mathematical(call: Call) -> bool:
    """The mathematical form without dropout: q, k, v and the mask are kept, all else is computed from them again.

    Left to itself it would save scaled copies of q and k, cut into heads, and the probabilities.
    """
    at = call.argument
    query, key, value, mask = at(0, "query"), at(1, "key"), at(2, "value"), at(3, "attn_mask")
    slots = call.open_slots()
    if at(4, "dropout_p", 0.0) or not slots or len(slots) != len(call.slots):
        return False
    # Under autocast it saves copies in another precision than that of its arguments.
    if any(tensor.is_floating_point() and tensor.dtype != query.dtype for _, tensor in slots):
        return False
    if any(call.is_weight(tensor) for tensor in (query, key, value)):
        return False  # learned queries
    probabilities = query.shape[:-1].numel() * key.shape[-2]
    kept_mask = _kept_mask(call, mask) if isinstance(mask, Tensor) else None
    if isinstance(kept_mask, Exact) and not call.is_weight(mask) and _MASK_SHARE * mask.numel() > probabilities:
        return False
    inputs = [Slot(tensor, call.where) for tensor in (query, key, value)]
    call.data_all(inputs, LAST)
    parents = [slot.kept for slot in inputs if slot.kept is not None]
    flags = [tensor.requires_grad for tensor in (query, key, value)]
    if kept_mask is not None:
        parents.append(kept_mask)
        flags.append(mask.requires_grad)
    options = {"scale": call.kwargs.get("scale")}
    if call.kwargs.get("enable_gqa", False):
        options["enable_gqa"] = True
    causal = at(5, "is_causal", False)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        mask = _additive(mask, query.dtype)
        return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, mask, 0.0, causal, None, **options)[
            0
        ]

    again = _again(call, attend, flags, len(slots), with_output=True)
    group = Rerun(again, parents, owned=len(slots))
    for parent in parents:
        call.scope.session.lend(parent)
    for index, (slot, _) in enumerate(slots):
        slot.kept = Rerunnable(group, index, own=True)
    output = call.output
    if fills_its_memory(output):
        call.scope.registry.learn(output, Rerunnable(group, len(slots), own=False), LAST)
    return True


def _keep_composite(call: Call) -> None:
    """The mathematical form: scaled copies of q and k, probabilities, dropout's noise, v; each is coded."""
    p = call.argument(4, "dropout_p", 0.0)
    probabilities = noise = None
    for slot, tensor in call.open_slots():
        if call.is_weight(tensor) or not tensor.is_floating_point():
            continue
        name = tensor.grad_fn.name() if tensor.grad_fn is not None else ""
        if name in ("SafeSoftmaxBackward0", "SoftmaxBackward0"):
            probabilities = call.data(slot, LAST)
            shape = tensor.shape
        elif (
            p
            and tensor.grad_fn is None
            and not tensor.requires_grad
            and probabilities is not None
            and (tensor.shape == shape)
        ):
            scale = torch.ones((), dtype=tensor.dtype).div_(1 - p).item()
            noise = call.mask(slot, tensor, "nonzero", 0.0, 0.0, on=scale, off=0.0) if p < 1 else None
        elif (
            noise is not None
            and probabilities is not None
            and tensor.numel() == shape.numel()
            and (tensor.shape[-2:] == shape[-2:])
        ):
            call.keep(slot, Recipe("dropout", lambda value, kept: value * kept, [probabilities, noise], tensor))
        else:
            call.data(slot, LAST)


ATTENTION = register(
    Rule(
        "scaled_dot_product_attention",
        _keep_attention,
        rows=LAST,
        bounded="differentiated at the coded q, k and v, where probabilities sum to one",
    ),
    functions("scaled_dot_product_attention"),
)


def opened(function: Callable) -> Callable:
    """A composite written in Python, without its own dispatch, so that its parts are seen one by one."""
    hidden = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *_: False
    )

    def run(*args: Any, **kwargs: Any) -> Any:
        # The globals of this moment: users put functions of their own into torch.nn.functional.
        copy = types.FunctionType(
            function.__code__,
            {**function.__globals__, **hidden},
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        return copy(*args, **kwargs)

    return run


MULTI_HEAD = register(
    Rule(
        "multi_head_attention_forward",
        nothing,
        bounded="its parts meet their own rules",
        opened=opened(F.multi_head_attention_forward),
    ),
    [F.multi_head_attention_forward],
)
