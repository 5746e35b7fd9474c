"""Copies, casts and moves: autograd saves nothing, but whoever saves the copy can have it from the original."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_actnn.saving.kept import Exact
from hf_actnn.saving.rules.rule import Rule, functions, register

if TYPE_CHECKING:
    from hf_actnn.saving.call import Call


def _keep_copy(call: Call) -> None:
    source = call.before
    output = call.output
    if source is None or isinstance(source, Exact) or call.in_place or not output.is_floating_point():
        return
    if output.numel() == call.args[0].numel():
        call.output_recipe("copy", None, [source])


def _keep_move(call: Call) -> None:
    source = call.before
    if source is None or isinstance(source, Exact):
        return
    again = call.again_on_first()
    if again is not None:
        call.output_recipe(call.name, again, [source], repeats=True, moves=True)


MOVE = register(
    Rule("roll", _keep_move, bounded="nothing is saved", without_saves=True, needs_before=True),
    functions("roll", "flip"),
)
COPY = register(
    Rule("copy", _keep_copy, bounded="nothing is saved", without_saves=True, needs_before=True),
    [
        *functions("clone", "reshape", "flatten", "ravel"),
        Tensor.contiguous,
        Tensor.to,
        Tensor.float,
        Tensor.half,
        Tensor.bfloat16,
        Tensor.double,
        Tensor.type_as,
        torch.Tensor.reshape_as,
    ],
)
