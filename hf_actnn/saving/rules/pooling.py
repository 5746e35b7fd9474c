"""Pooling, padding and resizing: shapes, and the winner's place in its window in a few bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_actnn import codec
from hf_actnn.saving.kept import Geometry, Offsets
from hf_actnn.saving.rules.rule import Rule, functions, nothing, register

if TYPE_CHECKING:
    from hf_actnn.saving.call import Call


class Windows(NamedTuple):
    """The pooling windows along one dimension: their first positions, the step within one, and their length."""

    starts: Tensor  # [output size] int64
    dilation: int
    length: int


def _encode(indices: Tensor, sizes: Sequence[int], windows: Sequence[Windows]) -> Tensor:
    """Flat indices ``[..., *output]`` into the input plane ``sizes`` -> offsets within the window, uint8."""
    offset = torch.zeros_like(indices)
    rest = indices
    for axis in reversed(range(len(sizes))):
        place = rest % sizes[axis]
        rest = torch.div(rest, sizes[axis], rounding_mode="floor")
        window = windows[axis]
        shape = [-1 if axis == i else 1 for i in range(len(sizes))]
        within = (place - window.starts.view(shape)) // window.dilation
        offset += within * math.prod(w.length for w in windows[axis + 1:])
    return offset.to(torch.uint8)


def _decode(offset: Tensor, sizes: Sequence[int], windows: Sequence[Windows]) -> Tensor:
    """The inverse of :func:`_encode`; ``offset`` int64 ``[..., *output]``."""
    index = torch.zeros_like(offset)
    for axis, window in enumerate(windows):
        trailing = math.prod(w.length for w in windows[axis + 1:])
        within = torch.div(offset, trailing, rounding_mode="floor") % window.length
        shape = [-1 if axis == i else 1 for i in range(len(sizes))]
        index = index * sizes[axis] + window.starts.view(shape) + within * window.dilation
    return index


def _each(value: Any, dimensions: int) -> list[int]:
    if isinstance(value, int):
        return [value] * dimensions
    value = list(value)
    return value * dimensions if len(value) == 1 else value


def _pool_windows(call: Call, dimensions: int, output: Sequence[int], device: torch.device) -> list[Windows]:
    at = call.argument
    kernel = _each(at(1, "kernel_size"), dimensions)
    stride = at(2, "stride")
    steps = _each(stride, dimensions) if stride not in (None, [], ()) else kernel
    padding, dilation = _each(at(3, "padding", 0), dimensions), _each(at(4, "dilation", 1), dimensions)
    return [Windows(torch.arange(output[i], device=device) * steps[i] - padding[i], dilation[i], kernel[i])
            for i in range(dimensions)]


def _adaptive_windows(sizes: Sequence[int], output: Sequence[int], device: torch.device) -> list[Windows]:
    made = []
    for size, count in zip(sizes, output, strict=True):
        position = torch.arange(count, device=device)
        starts = torch.div(position * size, count, rounding_mode="floor")
        longest = max(-(-(i + 1) * size // count) - i * size // count for i in range(count))
        made.append(Windows(starts, 1, longest))
    return made


def _keep_max(call: Call, dimensions: int, adaptive: bool) -> None:
    data = call.argument(0, "input")
    sizes = list(data.shape[-dimensions:])
    for slot, tensor in call.open_slots():
        if tensor.is_floating_point():
            call.blank(slot)  # max_pool's backward reads the input's shape and memory format alone
            continue
        indices = tensor
        output = list(call.output.shape[-dimensions:])
        windows = (_adaptive_windows(sizes, output, indices.device) if adaptive
                   else _pool_windows(call, dimensions, output, indices.device))
        count = math.prod(window.length for window in windows)
        if count > 256:
            continue
        bits = max(1, (count - 1).bit_length())
        shape = indices.shape
        offsets = _encode(indices.reshape(*shape[: indices.dim() - dimensions], *output) if dimensions > 1
                          else indices.reshape(-1, *output), sizes, windows)
        geometry = Geometry(indices)
        coded_shape = offsets.shape

        def decode(flat: Tensor, coded_shape: torch.Size = coded_shape, windows: list[Windows] = windows,
                   geometry: Geometry = geometry) -> Tensor:
            return geometry.fit(_decode(flat.view(coded_shape), sizes, windows))

        codes = codec.pack_uint(offsets.reshape(-1), bits)
        call.keep(slot, Offsets(codes, bits, offsets.numel(), decode))


def _max_rule(name: str, dimensions: int, targets: list[Any], adaptive: bool = False) -> Rule:
    def keep(call: Call) -> None:
        _keep_max(call, dimensions, adaptive)

    return register(Rule(name, keep, bounded="exact offsets within the window",
                         exact_reason="windows of more than 256 places"), targets)


def _forms(name: str) -> list[Any]:
    return [*functions(name), getattr(F, name + "_with_indices")]


MAX_POOL1D = _max_rule("max_pool1d", 1, _forms("max_pool1d"))
MAX_POOL2D = _max_rule("max_pool2d", 2, _forms("max_pool2d"))
MAX_POOL3D = _max_rule("max_pool3d", 3, _forms("max_pool3d"))
ADAPTIVE_MAX_POOL1D = _max_rule("adaptive_max_pool1d", 1, _forms("adaptive_max_pool1d"), adaptive=True)
ADAPTIVE_MAX_POOL2D = _max_rule("adaptive_max_pool2d", 2, _forms("adaptive_max_pool2d"), adaptive=True)
ADAPTIVE_MAX_POOL3D = _max_rule("adaptive_max_pool3d", 3, _forms("adaptive_max_pool3d"), adaptive=True)


def _keep_shape(call: Call) -> None:
    for slot, tensor in call.open_slots():
        if call.same_storage(tensor, call.argument(0, "input")):
            call.blank(slot)


AVERAGE_POOL = register(
    Rule("avg_pool", _keep_shape, bounded="the backward pass reads the input's shape alone"),
    functions("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
              "adaptive_avg_pool3d"),
)
PAD = register(Rule("pad", _keep_shape, bounded="the backward pass reads the input's shape alone"), functions("pad"))
RESIZE = register(
    Rule("interpolate", nothing, bounded="nothing is saved", exact_reason="nothing but shapes is saved"),
    functions("interpolate"),
)
JOIN = register(
    Rule("cat", nothing, bounded="nothing is saved", exact_reason="nothing but shapes is saved"),
    functions("cat", "concat", "stack"),
)
