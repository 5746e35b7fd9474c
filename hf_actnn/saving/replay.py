"""Tensors computed from parameters and constants alone: computed again when the backward pass asks for them.

Standardised weights, tables of relative positions spread over windows and heads, masks added to them: none of it is
data, so none of it may be coded, and it can be as large as an activation. What an operation made of parameters it makes
again, bit for bit, as long as it is no random one and writes to none of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_actnn.saving.call import as_now
from hf_actnn.saving.kept import Blank, Exact, Kept, Recipe, fills_its_memory
from hf_actnn.saving.rules.rule import functions

if TYPE_CHECKING:
    from hf_actnn.saving.call import Call
    from hf_actnn.saving.identity import Registry

#: A constant that nothing can give back is held itself where the result is so many times larger.
WORTH_HOLDING = 4

# Without their in-place forms: `learn` asks.
_FUNCTIONS = frozenset(
    functions(
        *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "neg", "rsub", "addcmul", "pow", "square"),
        *(
            "sqrt",
            "rsqrt",
            "reciprocal",
            "exp",
            "log",
            "log1p",
            "abs",
            "sign",
            "sin",
            "cos",
            "sigmoid",
            "tanh",
            "softplus",
        ),
        *("clamp", "clip", "where", "masked_fill", "maximum", "minimum"),
        *("mean", "var", "std", "norm", "sum", "softmax", "normalize", "layer_norm"),
        *("matmul", "bmm", "mm", "linear", "outer"),
        *("gather", "index_select", "take_along_dim", "embedding"),
        *("cat", "stack", "pad", "roll", "flip", "repeat_interleave", "interpolate"),
        *("clone", "reshape", "flatten", "tile"),
        *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "bitwise_not"),
    )
) | frozenset(
    {
        *(Tensor.__add__, Tensor.__radd__, Tensor.__sub__, Tensor.__rsub__, Tensor.__mul__, Tensor.__rmul__),
        *(Tensor.__eq__, Tensor.__ne__, Tensor.__lt__, Tensor.__le__, Tensor.__gt__, Tensor.__ge__, Tensor.__invert__),
        *(Tensor.__truediv__, Tensor.__rtruediv__, Tensor.__neg__, Tensor.__pow__, Tensor.__matmul__),
        *(Tensor.__getitem__, Tensor.contiguous, Tensor.repeat, Tensor.to, Tensor.float, Tensor.type_as),
        F.batch_norm,
        torch.relu,
        F.relu,
        F.gelu,
        torch.linalg.vector_norm,
        F.scaled_dot_product_attention,
    }
)
#: They make constants out of nothing,
_CREATION = frozenset(getattr(torch, name) for name in ("zeros", "ones", "full", "arange", "linspace"))
#: or out of the shape of their first argument.
_CREATION_LIKE = frozenset(
    {torch.zeros_like, torch.ones_like, torch.full_like, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full}
)
#: Copies that a user asked for, most likely because the original is about to change.
_CLONES = frozenset(functions("clone"))


def learn(call: Call) -> None:
    """Remember the output of an operation on parameters and constants as a recipe."""
    out = call.out
    like = call.function in _CREATION_LIKE
    made = like or call.function in _CREATION
    if not (made or call.function in _FUNCTIONS) or not isinstance(out, Tensor):
        return
    if not (out.is_floating_point() or out.dtype == torch.bool):
        return
    if out.numel() < max(call.policy.min_numel, 1) or not fills_its_memory(out) or "out" in call.kwargs:
        return
    if call.function is F.scaled_dot_product_attention and call.argument(4, "dropout_p", 0.0):
        return
    if call.function is F.batch_norm and any(isinstance(call.argument(at, ""), Tensor) for at in (1, 2)):
        return  # running statistics would be updated again
    if call.function is F.embedding and call.argument(3, "max_norm") is not None:
        return  # it writes to its table
    kwargs = call.kwargs
    if made:  # whatever torch's defaults are by then
        kwargs = {**kwargs, "dtype": out.dtype, "device": out.device}
    leaves, structure = tree_flatten((call.args, kwargs))
    registry = call.scope.registry
    places, parents = [], []
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            if call.same_storage(out, leaf):
                return  # in place, or a view
            if like and place == 0 and call.args:
                parent: Kept | None = Blank(leaf)  # its values are not read
            elif call.function in _CLONES and registry.is_stored_weight(leaf):
                return
            else:
                parent = _parent(registry, leaf, out, call.where)
            if parent is None:
                return
            places.append(place)
            parents.append(parent)
            leaves[place] = None  # the recipe must not hold it
    if parents or made:
        again = as_now(_again(call.function, leaves, places, structure), out.device.type)
        registry.learn(out, Recipe("computed again", again, parents, out, repeats=True))
        for parent in parents:
            call.scope.session.lend(parent)


def _parent(registry: Registry, tensor: Tensor, out: Tensor, where: str) -> Kept | None:
    """What gives an argument back and holds no bytes for it, or few against those of the result."""
    if registry.is_stored_weight(tensor):
        return registry.reference(tensor, where)
    found = registry.find(tensor)
    if found is not None and registry.is_weight(tensor):
        return found
    if WORTH_HOLDING * tensor.untyped_storage().nbytes() <= out.numel() * out.itemsize:
        return Exact(tensor, where=where)
    return None


def _again(
    function: Callable[..., Tensor], leaves: list[Any], places: list[int], structure: Any
) -> Callable[..., Tensor]:
    def again(*values: Tensor) -> Tensor:
        filled = list(leaves)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        args, kwargs = tree_unflatten(filled, structure)
        return function(*args, **kwargs)

    return again
