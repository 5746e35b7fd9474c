"""Sampling between pixels: the map is coded, the places are kept in half precision, or exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_actnn.saving.identity import SAMPLE
from hf_actnn.saving.kept import Exact, Kept
from hf_actnn.saving.recipes import Recipe
from hf_actnn.saving.rules.rule import Rule, functions, register

if TYPE_CHECKING:
    from hf_actnn.saving.call import Call, Slot

#: From this many bits on, whoever chose them wants no error of another kind.
_FINE = 8


def _keep_grid_sample(call: Call) -> None:
    """Weights between pixels are continuous in a place, and the gradient of a place is linear in the map's values.

    In half precision a place is off by 2^-12 of half a map at most, a hundredth of a pixel, which beside codes of the
    map below 8 bits is nothing; a code of few bits would be off by tenths of a pixel. Which pixel is nearest is no
    continuous question: there places stay exact.
    """
    data, grid = call.argument(0, "input"), call.argument(1, "grid")
    mode = call.argument(2, "mode", "bilinear")
    source = places = None
    for slot, tensor in call.open_slots():
        # Autocast samples in fp32, and saves copies.
        copied = not call.same_storage(tensor, data) and not call.same_storage(tensor, grid)
        if call.same_storage(tensor, grid) or copied and tensor.shape == grid.shape != data.shape:
            places = _keep_places(call, slot, tensor, mode)
        elif not call.is_weight(tensor) and (call.same_storage(tensor, data) or tensor.shape == data.shape):
            source = call.data_argument(slot, data, SAMPLE)
    if source is None and isinstance(data, Tensor):
        source = call.kept_of(data)
    padding, corners = call.argument(3, "padding_mode", "zeros"), call.argument(4, "align_corners")
    call.output_recipe(
        call.name,
        lambda value, at: F.grid_sample(value, at.to(value.dtype), mode, padding, bool(corners)),
        [source, places],
    )


def _keep_places(call: Call, slot: Slot, grid: Tensor, mode: str) -> Kept:
    bits = call.policy.bits
    fine = bits is None or bits >= _FINE or mode == "nearest" or grid.dtype != torch.float32
    if fine or grid.numel() < call.policy.min_numel or call.is_weight(grid):
        return call.exact(slot, "places to sample at")
    half = Exact(grid.detach().half(), where=call.where)
    slot.reason = "places to sample at, in half precision"
    return call.keep(slot, Recipe("half precision", lambda value: value.float(), [half], grid))


GRID_SAMPLE = register(
    Rule(
        "grid_sample",
        _keep_grid_sample,
        bounded="weights are continuous in a place, and its gradient is linear in the map",
        exact_reason="places to sample at",
    ),
    functions("grid_sample"),
)
