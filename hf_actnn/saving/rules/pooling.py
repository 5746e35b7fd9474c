"""Pooling, padding and resizing: shapes, and the winner's place in its window in a few bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_actnn import codec
from hf_actnn.saving.kept import Exact, Geometry, Kept, Offsets
from hf_actnn.saving.rules.rule import Rule, functions, register

if TYPE_CHECKING:
    from hf_actnn.saving.call import Call


class Windows(NamedTuple):
    """The pooling windows along one dimension: their first positions, the step within one, and their length."""

    starts: Tensor  # [output size] int64
    dilation: int
    length: int


class _Plane:
    """Flat index into the input plane = index of the window's first place + a step that depends on the offset alone.

    Args:
        sizes: of the input plane.
        windows: one per dimension.
    """

    def __init__(self, sizes: Sequence[int], windows: Sequence[Windows]) -> None:
        device = windows[0].starts.device
        first = torch.zeros((), dtype=torch.int64, device=device)
        steps = torch.zeros((), dtype=torch.int64, device=device)
        for size, window in zip(sizes, windows, strict=True):
            first = first.unsqueeze(-1) * size + window.starts
            steps = steps.unsqueeze(-1) * size + torch.arange(window.length, device=device) * window.dilation
        self.first = first  # [*output]
        largest = 0
        for size, window in zip(sizes, windows, strict=True):
            largest = largest * size + (window.length - 1) * window.dilation
        self.largest = largest  # step; known here without asking the device
        self.steps = steps.reshape(-1)  # [places in a window]

    def encode(self, indices: Tensor) -> Tensor:
        """Flat indices ``[..., *output]`` int64 -> places in the window, uint8.

        Two places with the same step, which a dilated window wider than the plane can have, are the same index.
        """
        place = torch.zeros(self.largest + 1, dtype=torch.uint8, device=indices.device)
        place[self.steps] = torch.arange(len(self.steps), dtype=torch.uint8, device=indices.device)
        step = indices - self.first
        return place.index_select(0, step.view(-1)).view(step.shape)

    def decode(self, places: Tensor) -> Tensor:
        """The inverse of :meth:`encode`; ``places`` ``[..., *output]``, any integer type."""
        return self.steps.index_select(0, places.reshape(-1)).view(places.shape).add_(self.first)


def _each(value: Any, dimensions: int) -> list[int]:
    if isinstance(value, int):
        return [value] * dimensions
    value = list(value)
    return value * dimensions if len(value) == 1 else value


def _pool_windows(
    call: Call, dimensions: int, output: Sequence[int], device: torch.device
) -> Callable[[], list[Windows]]:
    at = call.argument
    kernel = _each(at(1, "kernel_size"), dimensions)
    stride = at(2, "stride")
    steps = _each(stride, dimensions) if stride not in (None, [], ()) else kernel
    padding, dilation = _each(at(3, "padding", 0), dimensions), _each(at(4, "dilation", 1), dimensions)

    def make() -> list[Windows]:
        return [
            Windows(torch.arange(output[i], device=device) * steps[i] - padding[i], dilation[i], kernel[i])
            for i in range(dimensions)
        ]

    return make


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
        make = (
            partial(_adaptive_windows, sizes, output, indices.device)
            if adaptive
            else _pool_windows(call, dimensions, output, indices.device)
        )
        windows = make()
        count = math.prod(window.length for window in windows)
        if count > 256:
            continue
        bits = max(1, (count - 1).bit_length())
        plane = _Plane(sizes, windows)
        shape = (-1, *output)  # without the dimensions of size one that a 1-D pooling's indices have
        places = plane.encode(indices.reshape(shape))
        geometry, coded = Geometry(indices), places.shape

        # Made again when asked for: a plane holds an index per output position.
        def decode(
            flat: Tensor, make: Callable = make, geometry: Geometry = geometry, coded: torch.Size = coded
        ) -> Tensor:
            return geometry.fit(_Plane(sizes, make()).decode(flat.view(coded)))

        call.keep(slot, Offsets(codec.pack_uint(places.reshape(-1), bits), bits, places.numel(), decode))


def _max_rule(name: str, dimensions: int, targets: list[Any], adaptive: bool = False) -> Rule:
    def keep(call: Call) -> None:
        _keep_max(call, dimensions, adaptive)

    return register(
        Rule(name, keep, bounded="exact offsets within the window", exact_reason="windows of more than 256 places"),
        targets,
    )


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
    functions(
        "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"
    ),
)


def _keep_pad(call: Call) -> None:
    _keep_shape(call)
    # Other values may be none of a narrower dtype.
    moves = call.argument(2, "mode", "constant") != "constant" or call.argument(3, "value") in (None, 0, 1)
    _repeat(call, call.before, moves=moves)


def _repeat(call: Call, source: Kept | None, linear: bool = False, moves: bool = False) -> None:
    """The output is made again from what gives the input back."""
    if source is not None and isinstance(call.out, Tensor) and not call.in_place:
        again = call.again_on_first()
        if again is not None:
            call.output_recipe(call.name, again, [source], repeats=True, linear=linear, moves=moves)


#: Where its resized form is so many times larger, an input that is not kept may be kept exactly in its stead.
_ENLARGED = 2


def _keep_resized(call: Call) -> None:
    data, output = call.argument(0, "input"), call.output
    source = call.before
    if source is None and output.numel() >= _ENLARGED * data.numel() and not call.is_weight(data):
        source = Exact(data, where=call.where)  # not learnt: whoever saves the input itself may code it
    if isinstance(source, Exact) and output.numel() < _ENLARGED * data.numel():
        return
    _repeat(call, source, linear=True)


PAD = register(
    Rule(
        "pad",
        _keep_pad,
        bounded="the backward pass reads the input's shape alone",
        without_saves=True,
        needs_before=True,
    ),
    functions("pad"),
)
RESIZE = register(
    Rule(
        "interpolate",
        _keep_resized,
        bounded="nothing is saved",
        without_saves=True,
        needs_before=True,
        exact_reason="nothing but shapes is saved",
    ),
    functions("interpolate"),
)
REPEAT = register(
    Rule("repeat", _keep_resized, bounded="nothing is saved", without_saves=True, needs_before=True, integers=True),
    [*functions("repeat_interleave", "tile"), Tensor.repeat],
)


def _keep_joined(call: Call) -> None:
    parts = call.argument(0, "tensors")
    if not isinstance(parts, (list, tuple)):
        return
    sources = [call.kept_of(part) for part in parts]
    if any(source is None or isinstance(source, Exact) for source in sources):
        return
    again = call.again_on_first() if call.args else None
    if again is not None:
        call.output_recipe(call.name, lambda *values: again(values), sources, repeats=True, moves=True)


JOIN = register(
    Rule(
        "cat",
        _keep_joined,
        bounded="nothing is saved",
        without_saves=True,
        exact_reason="nothing but shapes is saved",
    ),
    functions("cat", "concat", "stack"),
)
