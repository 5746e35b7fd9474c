"""Which module classes have a counterpart with a public name, by kind."""

from __future__ import annotations

from torch import nn

from hf_actnn.nn.mixin import counterpart

#: Class of torch.nn -> kind, as the report shows it.
KINDS: dict[type[nn.Module], str] = {}


def named(kind: str, *originals: type[nn.Module]) -> tuple[type[nn.Module], ...]:
    """Register classes under a kind and return their counterparts in order."""
    for original in originals:
        KINDS[original] = kind
    return tuple(counterpart(original) for original in originals)


def kind_of(module: nn.Module) -> str:
    """The kind of a module: that of the known class it derives from, else ``"container"`` or ``"other"``."""
    for cls in type(module).__mro__:
        if cls in KINDS:
            return KINDS[cls]
    return "container" if any(True for _ in module.children()) else "other"
