"""Norms and variances over dimensions: linear in their input beside a small exact result."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_actnn.saving.kept import Exact, Quantized
from hf_actnn.saving.recipes import Recipe, View
from hf_actnn.saving.rows import row_length
from hf_actnn.saving.rules.attention import opened
from hf_actnn.saving.rules.rule import Rule, functions, nothing, register

if TYPE_CHECKING:
    from hf_actnn.saving.call import Call

_LINEAR = "the gradient is linear in the input, and what it is divided by is exact and lies within the code's groups"


def _keep_input(call: Call) -> None:
    data = call.argument(0, "input")
    for slot, tensor in call.open_slots():
        if call.same_storage(tensor, data):
            call.data(slot)


def _keep_deviation(call: Call) -> None:
    """The gradient is divided by the result: values coded beside much larger ones, which another result is of, would be
    multiplied up together with their error."""
    if _groups_lie_within(call, _reduced(call)):
        _keep_input(call)


def _keep_norm(call: Call) -> None:
    """Only Euclidean norms: others have powers or signs of the input in their gradient.

    The gradient is ``x / norm``. Where a group of the code would span values of several norms, what is coded is this
    quotient, at most 1 in size: with few bits a small vector beside a large one is coded as well as the large one.
    """
    order = call.argument(1, "p", call.kwargs.get("ord", 2))
    if order not in (2, 2.0, None, "fro"):
        return
    dims = _reduced(call)
    if _groups_lie_within(call, dims):
        return _keep_input(call)
    data, result = call.argument(0, "input"), call.output.detach()
    if 4 * result.numel() > data.numel() or result.dtype != data.dtype:
        return  # the norms, kept exactly, would be dearer than the code
    if result.dim() != data.dim():
        for dim in sorted(dims):
            result = result.unsqueeze(dim)
    for slot, tensor in call.open_slots():
        if call.same_view(tensor, data):
            unit = tensor.detach() / result.clamp_min(torch.finfo(result.dtype).tiny)
            code = call.pack(unit, None)
            if isinstance(code, Exact):
                return
            kept = Recipe("norm", lambda value, norm: value.mul_(norm), [code, Exact(result, where=call.where)], tensor)
            call.scope.registry.learn(tensor, kept)
            call.keep(slot, kept)


def _reduced(call: Call) -> set[int]:
    """The dimensions that a reduction runs over."""
    data = call.argument(0, "input")
    names = ("dim", "axis")
    position = 2 if call.name == "norm" else 1
    dims: Any = next((call.kwargs[name] for name in names if name in call.kwargs), None)
    if dims is None and len(call.args) > position:
        dims = call.args[position]
    if dims is None or isinstance(dims, bool) or (not isinstance(dims, int) and not len(dims)):
        return set(range(data.dim()))
    return {dim % data.dim() for dim in ((dims,) if isinstance(dims, int) else dims)}


def _groups_lie_within(call: Call, dims: set[int]) -> bool:
    """Whether no group of the input's code holds values of two results."""
    data = call.argument(0, "input")
    if len(dims) == data.dim():
        return True
    found = call.kept_of(data)
    while isinstance(found, View):
        found = found.parent
    if found is not None and not isinstance(found, (Quantized, Exact)):
        return False  # coded in some other shape
    inner = 1  # the stretch of memory that one result is of
    for step, size, dim in sorted((data.stride(dim), data.shape[dim], dim) for dim in range(data.dim())):
        if size == 1:
            continue
        if dim not in dims or step != inner:
            break
        inner *= size
    if inner != math.prod(data.shape[dim] for dim in dims):
        return False
    registry = call.scope.registry
    layout = registry.layout(data)
    shape, stride = (data.shape, data.stride()) if layout is None else (layout.shape, layout.stride)
    row, group = row_length(shape, stride, registry.rows(data)), call.policy.group_size
    return inner % row == 0 or (inner % group == 0 and row % group == 0)


def _keep_largest(call: Call) -> None:
    """The gradient goes, in equal parts, to the values that equal the result: one exact bit says which."""
    slots = call.open_slots()
    data = call.argument(0, "input")
    if len(slots) != 2 or not call.same_storage(slots[0][1], data) or call.same_storage(slots[1][1], data):
        return
    (source, value), (result, largest) = slots
    shape = largest.shape
    if largest.dim() != value.dim():
        dims = call.argument(1, "dim", ())
        dims = (dims,) if isinstance(dims, int) else tuple(dims) or range(value.dim())
        for dim in sorted(dim % value.dim() for dim in dims):
            largest = largest.unsqueeze(dim)
    call.mask(source, value == largest, "nonzero", 0.0, 0.0, on=1.0, off=0.0)
    call.keep(result, Exact(torch.ones((), dtype=value.dtype, device=value.device).expand(shape), where=call.where))


LARGEST = register(
    Rule("amax", _keep_largest, bounded="one exact bit per value", exact_reason="values to be compared"),
    functions("amax", "amin"),
)


def _keep_indices(call: Call) -> None:
    """Where along a dimension the values chosen stood: whole numbers below its length, lossless in a few bits."""
    data, indices = call.argument(0, "input"), call.out[1] if isinstance(call.out, tuple) else None
    for slot, tensor in call.open_slots():
        if indices is None or not call.same_storage(tensor, indices):
            continue
        dim = call.argument(2 if call.function in _BY_COUNT else 1, "dim", -1)
        call.whole_numbers(slot, data.shape[dim] if isinstance(dim, int) and data.dim() else 0)


_BY_COUNT = frozenset(functions("topk", "kthvalue"))
CHOICE = register(
    Rule(
        "max", _keep_indices, bounded="exact places", exact_reason="places along a dimension of more than 256, or few"
    ),
    functions("max", "min", "median", "topk", "kthvalue", "sort"),
)


def _keep_gather(call: Call) -> None:
    """The backward pass reads the shape of what was gathered from, and the places."""
    data = call.argument(0, "input")
    for slot, tensor in call.open_slots():
        if call.same_storage(tensor, data) and tensor.is_floating_point():
            call.blank(slot)


GATHER = register(
    Rule("gather", _keep_gather, bounded="the backward pass reads the input's shape alone", exact_reason="places"),
    functions("gather"),
)
NORM = register(
    Rule("norm", _keep_norm, bounded=_LINEAR, exact_reason="the result, or a norm other than the Euclidean"),
    [torch.norm, Tensor.norm, torch.linalg.vector_norm],
)
VARIANCE = register(
    Rule("var", _keep_input, bounded="the gradient is linear in the input", exact_reason="the result"),
    functions("var", "var_mean"),
)
DEVIATION = register(
    Rule("std", _keep_deviation, bounded=_LINEAR, exact_reason="the result, or values of several results in a group"),
    functions("std", "std_mean"),
)
NORMALIZE = register(
    Rule("normalize", nothing, bounded="its parts meet their own rules", opened=opened(F.normalize)), [F.normalize]
)
