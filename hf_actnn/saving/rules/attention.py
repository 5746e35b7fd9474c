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
from hf_actnn.saving.call import exact
from hf_actnn.saving.identity import LAST
from hf_actnn.saving.kept import Recipe, Rerun, Rerunnable
from hf_actnn.saving.rules.rule import Rule, functions, nothing, register

if TYPE_CHECKING:
    from hf_actnn.saving.call import Call, Slot

_BACKENDS = {
    "ScaledDotProductFlashAttentionForCpuBackward0": SDPBackend.FLASH_ATTENTION,
    "ScaledDotProductFlashAttentionBackward0": SDPBackend.FLASH_ATTENTION,
    "ScaledDotProductEfficientAttentionBackward0": SDPBackend.EFFICIENT_ATTENTION,
    "ScaledDotProductCudnnAttentionBackward0": SDPBackend.CUDNN_ATTENTION,
}


def _keep_attention(call: Call) -> None:
    node = call.output.grad_fn
    # A padded head is sliced off after the fused operation.
    for _ in range(2):
        name = node.name() if node is not None else ""
        if name in _BACKENDS:
            _keep_fused(call, _BACKENDS[name])
            return
        following = node.next_functions if node is not None else ()
        node = following[0][0] if len(following) == 1 else None
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
        matches = [
            slot
            for slot, tensor in slots
            if slot not in inputs
            and tensor.shape == argument.shape
            and (call.same_storage(tensor, argument) or tensor.dtype != argument.dtype)
        ]
        same_view = [
            slot
            for slot in matches
            if slot.tensor is not None
            and slot.tensor.stride() == argument.stride()
            and slot.tensor.storage_offset() == argument.storage_offset()
        ]
        if not matches:
            call.exact_rest("the fused attention saved copies of its inputs")
            return
        inputs.append((same_view or matches)[0])
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
        parents.append(call.exact(mask_slot, "an attention mask"))
    elif isinstance(mask, Tensor):
        parents.append(exact(call.scope, mask, call.where))  # a boolean mask, which torch saves a float copy of
    again = _again(
        backend,
        [argument.requires_grad for argument in (query, key, value)],
        len(slots),
        is_causal=at(5, "is_causal", False),
        scale=call.kwargs.get("scale"),
        enable_gqa=call.kwargs.get("enable_gqa", False),
        where=call.where,
    )
    group = Rerun(
        again, [parent for parent in parents if parent is not None], owned=len(slots) - (mask_slot is not None)
    )
    for index, (slot, tensor) in enumerate(slots):
        if slot is mask_slot:
            continue
        slot.kept = Rerunnable(group, index, own=True)
        if slot not in inputs and call.same_storage(tensor, call.output):
            call.scope.registry.learn(tensor, Rerunnable(group, index, own=False), LAST)


def _again(
    backend: SDPBackend,
    needs_grad: list[bool],
    count: int,
    *,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    where: str,
) -> Callable[..., list[Tensor]]:
    """A function from (q, k, v[, mask]) to all that the operation saves, in its order."""
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale}
    if enable_gqa:
        options["enable_gqa"] = True

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        if query.device.type == "cpu":
            # By name: choosing a backend sets flags of the whole process, which other threads would meet.
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
            )
        else:
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(query, key, value, mask, **options)

    def run(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> list[Tensor]:
        saved: list[Tensor] = []

        def record(tensor: Tensor) -> int:
            saved.append(
                tensor.detach()
            )  # not the output itself: its graph would hold this list, and the list the graph
            return len(saved) - 1

        query, key, value = (
            tensor.detach().requires_grad_(flag) for tensor, flag in zip((query, key, value), needs_grad, strict=True)
        )
        device = query.device.type
        with (
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
            torch.autograd.graph.saved_tensors_hooks(record, lambda index: saved[index]),
        ):
            attend(query, key, value, rest[0] if rest else None)
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
        return saved

    return run


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


def _opened(function: Callable) -> Callable:
    """A composite written in Python, without its own dispatch, so that its parts are seen one by one."""
    hidden = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *_: False
    )

    def opened(*args: Any, **kwargs: Any) -> Any:
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

    return opened


MULTI_HEAD = register(
    Rule(
        "multi_head_attention_forward",
        nothing,
        bounded="its parts meet their own rules",
        opened=_opened(F.multi_head_attention_forward),
    ),
    [F.multi_head_attention_forward],
)
