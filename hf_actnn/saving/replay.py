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
from hf_actnn.saving.kept import Blank, Exact, Kept, fills_its_memory
from hf_actnn.saving.recipes import Recipe
from hf_actnn.saving.rules.rule import functions

if TYPE_CHECKING:
    from hf_actnn.saving.call import Call

#: A constant that nothing can give back is held itself where the result is so many times larger.
WORTH_HOLDING = 4

# Without their in-place forms: `learn` asks.
_BY_ELEMENT = frozenset(
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
        *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "bitwise_not"),
    )
) | frozenset(
    {
        *(Tensor.__add__, Tensor.__radd__, Tensor.__sub__, Tensor.__rsub__, Tensor.__mul__, Tensor.__rmul__),
        *(Tensor.__eq__, Tensor.__ne__, Tensor.__lt__, Tensor.__le__, Tensor.__gt__, Tensor.__ge__, Tensor.__invert__),
        *(Tensor.__truediv__, Tensor.__rtruediv__, Tensor.__neg__, Tensor.__pow__),
        *(Tensor.to, Tensor.float, Tensor.type_as),
        *(Tensor.__and__, Tensor.__or__),
    }
)
_FUNCTIONS = (
    _BY_ELEMENT
    | frozenset(
        functions(
            *("mean", "var", "std", "norm", "sum", "softmax", "normalize", "layer_norm"),
            *("matmul", "bmm", "mm", "linear", "outer"),
            *("gather", "index_select", "take_along_dim", "embedding"),
            *("cat", "stack", "pad", "roll", "flip", "repeat_interleave", "interpolate"),
            *("clone", "reshape", "flatten", "tile"),
        )
    )
    | frozenset(
        {
            *(Tensor.__matmul__, Tensor.__getitem__, Tensor.contiguous, Tensor.repeat),
            F.batch_norm,
            torch.relu,
            F.relu,
            F.gelu,
            torch.linalg.vector_norm,
            F.scaled_dot_product_attention,
        }
    )
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
    made = call.function in _CREATION or call.function in _CREATION_LIKE
    if not (made or call.function in _FUNCTIONS) or not isinstance(call.out, Tensor):
        return
    if call.out.is_floating_point() or call.out.dtype == torch.bool:
        _learn(call, made, _parent)


def learn_by_element(call: Call) -> None:
    """Remember what is computed value by value from tensors that have no gradient: a mask, the targets and weights of a
    loss."""
    one_hot = call.function is F.one_hot and call.argument(1, "num_classes", -1) > 0  # else it asks the device
    if (one_hot or call.function in _BY_ELEMENT) and isinstance(call.out, Tensor):
        _learn(call, False, _parent_without_gradient)


def _learn(call: Call, made: bool, parent_of: Callable[[Call, Tensor], Kept | None]) -> None:
    """Make the output a recipe, if ``parent_of`` finds what gives every tensor among the arguments back.

    Args:
        made: out of nothing, or out of the shape of the first argument.
    """
    out = call.out
    like = call.function in _CREATION_LIKE
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
                parent = parent_of(call, leaf)
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


def _parent(call: Call, tensor: Tensor) -> Kept | None:
    """What gives an argument back and holds no bytes for it, or few against those of the result."""
    registry = call.scope.registry
    if registry.is_stored_weight(tensor):
        return registry.reference(tensor, call.where)
    found = registry.find(tensor)
    if found is not None and registry.is_weight(tensor):
        return found
    if WORTH_HOLDING * tensor.untyped_storage().nbytes() <= call.out.nbytes:
        return Exact(tensor, where=call.where)
    return None


def _parent_without_gradient(call: Call, tensor: Tensor) -> Kept | None:
    """The same of data: to the bit, from bits where it is a mask, or from what the graph is likely to hold anyway.

    Where the graph does not hold it, whoever saves the result does without the recipe.
    """
    registry = call.scope.registry
    found = registry.find(tensor)
    if found is not None and found.same_bits:
        return found
    if tensor.dtype == torch.bool and (bits := call.two_valued(tensor)) is not None:
        return bits
    if found is None and registry.is_differentiated(tensor) and tensor.nbytes <= call.out.nbytes:
        return Exact(tensor, where=call.where)
    return _parent(call, tensor)


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
