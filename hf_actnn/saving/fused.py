"""Saved tensors that are never decoded as a whole, where their backward function can do without.

Autograd hands what a saved-tensor hook returns to the operation's backward function. A `Deferred` has the sizes of the
tensor and none of its memory: a function of the table below is dispatched to one that reads codes, or the values of
some samples after the other, and any other function gets all values as ever. So a backward pass holds the incoming and
the outgoing gradient of a layer, and no third tensor of their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hf_actnn import codec
from hf_actnn.codec import backward
from hf_actnn.saving.kept import Kept, Mask, Quantized, probe

#: Fewest elements for which it pays, by kind of device: a tensor that is dispatched on costs some 20 microseconds.
SMALLEST = {"cpu": 2**18, "cuda": 2**20}
#: Elements that an elementwise function reads at a time: a megabyte in float32, about what a core's own cache holds.
RUN = 2**18
#: Parts of a batch that products and convolutions are cut into at most. Each adds to the gradient of the weight, so a
#: part is no smaller than that.
PARTS = 8
#: Dtypes in which sums over a batch may be made of sums over its parts; narrower ones would be rounded once for each.
_WIDE = (torch.float32, torch.float64)

aten = torch.ops.aten


class Deferred(Tensor):
    """Stands for what a kept tensor gives back."""

    kept: Kept
    #: Gives all values.
    whole: Callable[[], Tensor]
    #: The tensor's sizes, where it is not to be read in parts.
    form: Any

    @staticmethod
    def __new__(cls, kept: Kept, whole: Callable[[], Tensor], form: Any = None) -> Deferred:
        like = kept.form if form is None else form
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride, dtype=like.dtype, device=like.device
        )
        made.kept, made.whole, made.form = kept, whole, form
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if function is aten.detach.default:  # autograd makes its own tensor of what a hook returns
            return cls(args[0].kept, args[0].whole, args[0].form)
        fused = _FUSED.get(function)
        if fused is not None and type(args[0]) is Tensor and type(args[1]) is cls and args[1].form is None:
            found = fused(function, *args, **kwargs)
            if found is not None:
                return found
        args, kwargs = tree_map(_values, (args, kwargs))
        return function(*args, **kwargs)


def _values(value: Any) -> Any:
    return value.whole() if isinstance(value, Deferred) else value


def pays(saved: Tensor, on_cuda: bool, summed: int) -> bool:
    """Whether the backward function of an operation is to read what it saved in parts.

    Args:
        on_cuda: whether one reads codes on CUDA.
        summed: elements of a gradient that it sums up over the parts: two, of no fewer elements, have to be there. 0
            where there is none.
    """
    if saved.numel() < SMALLEST.get(saved.device.type, math.inf) or not (on_cuda or saved.is_cpu):
        return False
    return not summed or (saved.dtype in _WIDE and saved.numel() >= 2 * summed)


def deferred(kept: Kept, whole: Callable[[], Tensor]) -> Deferred | None:
    """A stand-in for what ``kept`` gives back to a backward pass that is under way; None where it cannot be had in
    parts.

    Args:
        whole: gives all values, where they are asked for.
    """
    if torch._C._current_graph_task_id() == -1 or not _is_readable(kept):
        return None
    return Deferred(kept, whole)


def handed_on(kept: Kept, whole: Callable[[], Tensor], form: Any, fuses: bool) -> Deferred:
    """A stand-in for whoever holds tensors and not what makes them, until a backward pass reads it.

    Args:
        form: has the shape, stride, dtype and device.
        fuses: whether the backward function may read the tensor in parts.
    """
    return Deferred(kept, whole, None if fuses and _is_readable(kept) else form)


def _is_readable(kept: Kept) -> bool:
    """Whether there is more to have than all values at once."""
    form = kept.form
    if form is None:
        return False
    return type(kept) is Mask or type(kept) is Quantized or bool(kept.unit and form.device.type == "cpu")


def _runs(kept: Kept, numel: int, least: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Where to cut the values, in storage order, into runs of about so many; a run is a multiple of ``multiple``.
    Empty where that is not possible."""
    unit = math.lcm(kept.unit, multiple)
    if not unit or numel % unit:
        return []
    step = -(-least // unit) * unit
    return [(start, min(start + step, numel)) for start in range(0, numel, step)]


def _flat(tensor: Tensor) -> Tensor:
    """In storage order, of a tensor without gaps."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _alike(grad: Tensor, saved: Tensor) -> bool:
    """Whether a gradient has the very layout of the saved tensor."""
    return (grad.shape, grad.dtype, grad.device) == (saved.shape, saved.dtype, saved.device) and (
        grad.stride() == saved.stride()
    )


# -- elementwise ------------------------------------------------------------------------------------------------------


def _activation(function: Any, grad: Tensor, saved: Deferred, **options: Any) -> Tensor | None:
    if not _alike(grad, saved):
        return None
    kept, flat = saved.kept, _flat(grad)
    if not grad.is_cpu:
        if type(kept) is not Quantized or probe.kept is kept:  # what disturbs a tensor is not in its codes
            return None
        out = backward.activation_backward(function, flat, kept.packed, **options)
        return None if out is None else out.as_strided(grad.shape, grad.stride())
    runs = _runs(kept, grad.numel(), RUN)
    if not runs:
        return None
    if probe.undisturbed is not None and _alike(probe.undisturbed, grad):
        expected, found = _flat(probe.undisturbed), torch.empty_like(flat[: runs[0][1]])
        probe.energy = torch.zeros((), dtype=torch.float64)
        for start, stop in runs:
            some = found[: stop - start]
            _INTO[function](flat[start:stop], kept.part(start, stop), grad_input=some, **options)
            probe.energy += torch.linalg.vector_norm(some.sub_(expected[start:stop]), dtype=torch.float64).square()
        return grad.new_zeros(()).expand(grad.shape)
    out = torch.empty_like(flat)
    for start, stop in runs:
        _INTO[function](flat[start:stop], kept.part(start, stop), grad_input=out[start:stop], **options)
    return out.as_strided(grad.shape, grad.stride())


def _times(function: Any, grad: Tensor, saved: Deferred) -> Tensor | None:
    """The gradient of one factor, which is the other one times what comes in."""
    runs = _runs(saved.kept, saved.numel(), RUN) if _alike(grad, saved) else []
    if not runs:
        return None
    flat = _flat(grad)
    out = torch.empty_like(flat)
    for start, stop in runs:
        torch.mul(flat[start:stop], saved.kept.part(start, stop), out=out[start:stop])
    return out.as_strided(grad.shape, grad.stride())


def _select(function: Any, grad: Tensor, saved: Deferred, *limits: float) -> Tensor | None:
    """The derivative is one where the bit is set and zero elsewhere: masks of such functions alone are deferred."""
    if not _alike(grad, saved) or type(saved.kept) is not Mask:
        return None
    return backward.select_by_mask(_flat(grad), saved.kept.codes).as_strided(grad.shape, grad.stride())


# -- gradients of weights ---------------------------------------------------------------------------------------------


def _parts(kept: Kept, numel: int, multiple: int, weight: int) -> list[tuple[int, int]]:
    """:func:`_runs` for sums over a batch; fewer than two where it would not pay."""
    count = min(PARTS, numel // max(weight, 1))
    return _runs(kept, numel, max(-(-numel // count), RUN), multiple) if count > 1 else []


def _product(function: Any, left: Tensor, saved: Deferred) -> Tensor | None:
    """``left [M, R] @ saved [R, K]``, the gradient of a linear layer's weight, some of the `R` rows at a time."""
    width = saved.shape[1]
    if left.dtype != saved.dtype or not saved.is_contiguous():
        return None
    parts = _parts(saved.kept, saved.numel(), width, left.shape[0] * width)
    if len(parts) < 2:
        return None
    out: Tensor | None = None
    for start, stop in parts:
        columns = left[:, start // width : stop // width]
        values = saved.kept.part(start, stop).view(-1, width)
        out = torch.mm(columns, values) if out is None else out.addmm_(columns, values)
    return out


def _convolution(
    function: Any, grad: Tensor, saved: Deferred, weight: Tensor, bias: Any, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
    """Gradients of a convolution, some samples at a time.

    A tape that asks for less than that of the input gets less, without its memory: it runs this several times over.
    """
    samples = saved.shape[0]
    each = saved.numel() // samples
    if saved.stride(0) != each:
        return None
    parts = _parts(saved.kept, saved.numel(), each, weight.numel())
    if len(parts) < 2:
        return None
    settings, wanted = rest[:-1], rest[-1]
    if probe.others == "nothing":
        wanted = [False, *wanted[1:]]
    inner: Tensor | None = None
    sums: list[Tensor | None] = [None, None]
    for start, stop in parts:
        some = slice(start // each, stop // each)
        shape = (some.stop - some.start, *saved.shape[1:])
        values = saved.kept.part(start, stop).as_strided(shape, saved.stride())
        found = function(grad[some], values, weight, bias, *settings, wanted)
        if found[0] is not None and probe.others == "size":
            square = torch.linalg.vector_norm(found[0], dtype=torch.float64).square()
            probe.energy = square if probe.energy is None else probe.energy + square
        elif found[0] is not None:
            if inner is None:
                inner = _room_for(found[0], samples)
            inner[some].copy_(found[0])
        sums = [_sum(known, one) for known, one in zip(sums, found[1:], strict=True)]
    return inner, sums[0], sums[1]


def _sum(known: Tensor | None, one: Tensor | None) -> Tensor | None:
    return one if known is None or one is None else known.add_(one)


def _room_for(part: Tensor, samples: int) -> Tensor:
    """For as many samples as there are, each as in the part."""
    return torch.empty_strided((samples, *part.shape[1:]), part.stride(), dtype=part.dtype, device=part.device)


# -- normalisations ---------------------------------------------------------------------------------------------------


def _layer_norm(
    function: Any,
    grad: Tensor,
    saved: Deferred,
    normalized: list[int],
    mean: Tensor,
    factor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
    """Gradients of a layer normalisation, some rows at a time."""
    if not _alike(grad, saved) or not saved.is_contiguous():
        return None
    width = math.prod(normalized)
    runs = _runs(saved.kept, saved.numel(), RUN, width)
    if not runs:
        return None
    flat, means, factors = _flat(grad), mean.reshape(-1, 1), factor.reshape(-1, 1)
    parameters = [None if one is None else one.reshape(-1) for one in (weight, bias)]
    out = torch.empty_like(flat) if wanted[0] else None
    sums: list[Tensor | None] = [None, None]
    for start, stop in runs:
        rows = slice(start // width, stop // width)
        values = saved.kept.part(start, stop).view(-1, width)
        some = flat[start:stop].view(-1, width)
        found = function(some, values, [width], means[rows], factors[rows], *parameters, wanted)
        if out is not None:
            out[start:stop].copy_(found[0].view(-1))
        sums = [_sum(known, one) for known, one in zip(sums, found[1:], strict=True)]
    inner = None if out is None else out.as_strided(grad.shape, grad.stride())
    return inner, *(None if one is None else one.view(normalized) for one in sums)  # type: ignore[return-value]


def _batch_norm(
    function: Any,
    grad: Tensor,
    saved: Deferred,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    factor: Tensor | None,
    training: bool,
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
    """Gradients of a batch normalisation in training, the values being looked at twice, some samples at a time.

    With `x' = x - mean`, `r` the reciprocal of the standard deviation and `M` values per channel,
    `dx = w r (dy - sum(dy) / M - x' r^2 sum(dy x') / M)` (Ioffe and Szegedy 2015, section 3).
    """
    each = saved.numel() // saved.shape[0]
    plain = _alike(grad, saved) and grad.dtype == torch.float32 and saved.dim() > 1
    if not plain or not training or mean is None or factor is None or saved.stride(0) != each:
        return None
    runs = _runs(saved.kept, saved.numel(), RUN, each)
    if not runs:
        return None

    def parts() -> Iterator[tuple[slice, Tensor]]:
        for start, stop in runs:
            some = slice(start // each, stop // each)
            yield some, saved.kept.part(start, stop).as_strided((some.stop - some.start, *shape[1:]), saved.stride())

    shape = saved.shape
    others, view = (0, *range(2, len(shape))), (1, -1) + (1,) * (len(shape) - 2)
    total, product = torch.zeros_like(mean), torch.zeros_like(mean)
    one = torch.ones_like(mean)
    for some, values in parts():
        total += grad[some].sum(others)
        product += codec.channel_affine_(values, one, -mean).mul_(grad[some]).sum(others)
    out = None
    if wanted[0]:
        count = saved.numel() // shape[1]
        scale = factor if weight is None else factor * weight
        slope = -scale * factor.square() * product / count
        shift = -scale * total / count - slope * mean
        out = torch.empty_like(grad)
        for some, values in parts():
            torch.addcmul(codec.channel_affine_(values, slope, shift), grad[some], scale.view(view), out=out[some])
    return out, product * factor if wanted[1] else None, total if wanted[2] else None


_INTO = {
    aten.gelu_backward.default: aten.gelu_backward.grad_input,
    aten.silu_backward.default: aten.silu_backward.grad_input,
}
_FUSED: dict[Any, Callable[..., Any]] = {
    aten.gelu_backward.default: _activation,
    aten.silu_backward.default: _activation,
    aten.threshold_backward.default: _select,
    aten.hardtanh_backward.default: _select,
    aten.mul.Tensor: _times,
    aten.mm.default: _product,
    aten.convolution_backward.default: _convolution,
    aten.native_layer_norm_backward.default: _layer_norm,
    aten.native_batch_norm_backward.default: _batch_norm,
}
