"""What is written into a graph that inductor has made: calls with what later passes look up about them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import _extract_tensor_metadata


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A call, with what compilers look up about it."""
    node = graph.call_function(target, args)
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
    mode = torch._guards.detect_fake_mode([value for value in values if isinstance(value, Tensor)])
    assert mode is not None  # of the tensors, or of the compilation that is going on
    with mode:
        node.meta["val"] = target(*values)
    node.meta["tensor_meta"] = _extract_tensor_metadata(node.meta["val"])
    return node


def like(graph: fx.Graph, node: fx.Node, other: Tensor) -> fx.Node:
    """A node's values in the shape and the dtype of another tensor."""
    value = node.meta["val"]
    if value.dtype != other.dtype:
        node = call(graph, torch.ops.prims.convert_element_type.default, node, other.dtype)
    return node if value.shape == other.shape else call(graph, torch.ops.aten.view.default, node, list(other.shape))
