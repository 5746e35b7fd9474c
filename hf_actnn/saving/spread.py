"""How a compiled graph normalises what it takes statistics of, so that a code of it spends its levels on one channel.

Eager mode has it in `rules.norms`; here the operations are taken apart, and what was one is found again.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor, fx

from hf_actnn.saving.nodes import call, like
from hf_actnn.saving.policy import Policy
from hf_actnn.saving.rows import mixes_spreads

aten = torch.ops.aten


class Spread(NamedTuple):
    """The statistics by which an input is normalised, as nodes of the forward graph that are saved.

    Attributes:
        operand: what they were taken of, the input in another shape or dtype.
    """

    operand: fx.Node
    mean: fx.Node
    scale: fx.Node

    def normalise(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        needed = {self.operand, self.mean, self.scale}
        last = [one for one in graph.nodes if one in needed][-1]
        with graph.inserting_before(last.next):
            wide = call(graph, aten.mul.Tensor, call(graph, aten.sub.Tensor, self.operand, self.mean), self.scale)
            return like(graph, wide, node.meta["val"])

    def undo(self, graph: fx.Graph, back: fx.Node, received: dict[str, fx.Node]) -> None:
        """Make the input of what came back, for all who read it."""
        readers = set(back.users)
        mean, scale = (received[node.name] for node in (self.mean, self.scale))
        with graph.inserting_before(next(node for node in graph.nodes if node in readers)):
            wide = like(graph, back, self.operand.meta["val"])
            wide = call(graph, aten.add.Tensor, call(graph, aten.div.Tensor, wide, scale), mean)
            found = like(graph, wide, back.meta["val"])
        back.replace_all_uses_with(found, delete_user_cb=lambda user: user in readers)


def spread_of(node: fx.Node, policy: Policy, exact: set[fx.Node]) -> Spread | None:
    """How a batch or group normalisation normalises a tensor, where groups of a code of it would mix what it takes
    apart, and its statistics are saved as they are; see `rules.norms`."""
    value = node.meta["val"]
    waiting = [(node, user) for user in node.users]
    while waiting:
        operand, user = waiting.pop()
        if user.target in (aten.view.default, torch.ops.prims.convert_element_type.default):
            waiting += [(user, further) for further in user.users]
        elif user.target is aten.var_mean.correction:
            together = _channels_together(value, operand.meta["val"], user)
            parts = [part for part in user.users if part.target is operator.getitem]
            mean = next((part for part in parts if part.args[1] == 1 and part in exact), None)
            scale = next((one for part in parts if part.args[1] == 0 for one in _rsqrt(part) if one in exact), None)
            mixed = together and mixes_spreads(value.shape, value.stride(), together, policy)
            if mixed and mean is not None and scale is not None:
                return Spread(operand, mean, scale)
    return None


def _channels_together(value: Tensor, operand: Tensor, node: fx.Node) -> int:
    """How many channels of a tensor are normalised together; 0 where it is otherwise."""
    axes, rest = node.args[1], value.dim() - 2
    if not node.kwargs.get("keepdim") or rest < 0 or not isinstance(axes, list | tuple):
        return 0
    axes = sorted(axis % operand.dim() for axis in axes)  # type: ignore[operator]
    if operand.shape == value.shape and axes == [0, *range(2, value.dim())]:
        return 1
    grouped = operand.dim() == 4 and axes == [2, 3] and operand.shape[0] == value.shape[0]
    together = operand.shape[2] if grouped else 0
    return together if together and operand.shape[1] * together == value.shape[1] else 0


def _rsqrt(variance: fx.Node) -> list[fx.Node]:
    """The reciprocals of a deviation that are made of a variance and an epsilon."""
    sums = [user for user in variance.users if user.target is aten.add.Tensor]
    return [user for one in sums for user in one.users if user.target is aten.rsqrt.default]
