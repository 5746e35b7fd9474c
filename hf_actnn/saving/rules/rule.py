"""What a rule is, and the table of all of them, keyed by torch function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from hf_actnn.saving.call import Call


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """How what one torch function saves may be kept.

    Attributes:
        name: of the operation, as reports show it.
        keep: decides on the call's slots; whatever it leaves stays exact.
        bounded: why the backward formula stays bounded in what is quantised.
        rows: how rows run in the output's storage: ``"last"`` (the innermost dimension), ``"sample"``, or ``None`` for
            as in the input.
        opened: a function to call instead, under which the composite's parts meet their own rules.
        without_saves: whether ``keep`` has something to do even where autograd saves nothing.
        needs_before: whether ``keep`` asks what gave the first argument back before the call.
        looks_ahead: whether ``keep`` asks which function comes next; it then decides when that one begins.
        integers: whether ``keep`` has something to do with outputs that are no floating-point numbers.
        lossless: whether what ``keep`` does loses nothing, so that it may be done to what is computed from parameters.
        exact_reason: the report's reason for what stays exact.
    """

    name: str
    keep: Callable[[Call], None]
    bounded: str
    rows: str | None = None
    opened: Callable[..., Any] | None = None
    without_saves: bool = False
    needs_before: bool = False
    lossless: bool = False
    integers: bool = False
    looks_ahead: bool = False
    exact_reason: str = "a statistic, an index or a parameter"


_RULES: dict[Callable, Rule] = {}
_SPACES = (F, torch, torch.Tensor, torch._C._nn, torch.special)


def functions(*names: str) -> list[Callable]:
    """Every public form of the named functions: ``F.x``, ``torch.x``, ``Tensor.x`` and those in place.

    A name that this torch does not have is passed over; one that none of the places has is a mistake.
    """
    found: list[Callable] = []
    for name in names:
        forms = [
            getattr(space, form)
            for space in _SPACES
            for form in (name, name + "_")
            if callable(getattr(space, form, None))
        ]
        if not forms and name not in _NEWER:
            raise AttributeError(f"torch has no function named {name!r}")
        found.extend(forms)
    return found


#: Functions that the oldest supported torch lacks.
_NEWER = frozenset({"rms_norm"})


def register(rule: Rule, targets: Iterable[Callable]) -> Rule:
    """Add a rule for some torch functions; the newest rule of a function holds.

    Args:
        rule: the rule.
        targets: function objects as a ``TorchFunctionMode`` receives them; see :func:`functions`.
    """
    for target in targets:
        _RULES[target] = rule
    return rule


#: The rule of a torch function, or None.
find = _RULES.get


def all_rules() -> list[Rule]:
    """Each rule once, by name."""
    return sorted({id(rule): rule for rule in _RULES.values()}.values(), key=lambda rule: rule.name)


def nothing(call: Call) -> None:
    """Leave every save exact."""


#: Functions that read a property or make a view: no save, no new values.
TRANSPARENT = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        "size",
        "dim",
        "numel",
        "stride",
        "view",
        "permute",
        "transpose",
        "unbind",
        "chunk",
        "split",
        "expand",
        "squeeze",
        "unsqueeze",
        "is_contiguous",
        "is_floating_point",
        "element_size",
        "data_ptr",
        "detach",
        "requires_grad_",
        "__len__",
        "__getitem__",
        "storage_offset",
        "untyped_storage",
        "view_as",
        "expand_as",
        "narrow",
        "select",
        "unflatten",
        "swapaxes",
        "t",
        "movedim",
        "is_complex",
        "get_device",
        "ndimension",
        "__hash__",
        "__repr__",
        "__format__",
        "item",
        "tolist",
        "__bool__",
        "__int__",
        "__float__",
    )
) | frozenset(
    {
        torch.transpose,
        torch.permute,
        torch.squeeze,
        torch.unsqueeze,
        torch.unbind,
        torch.chunk,
        torch.split,
        torch.is_grad_enabled,
        torch.is_tensor,
    }
)
