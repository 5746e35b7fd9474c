"""The tensors that torch functions are given, and those of them that they write to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among arguments, one level of lists and tuples deep."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            for item in argument:
                if isinstance(item, Tensor):
                    yield item


_NEVER, _ALWAYS, _OTHERS = -1, 0, -2


class _Writes(dict[Any, int]):
    """Torch function -> whether it writes to its first argument: never, always (by torch's naming), or if the argument
    of this position, called ``inplace``, says so; or to others."""

    def __missing__(self, function: Any) -> int:
        name = getattr(function, "__name__", "").partition(".")[0]
        own = name.endswith("_") and not name.endswith("__")
        code = getattr(function, "__code__", None)
        names = code.co_varnames[: code.co_argcount] if code is not None else ()
        if function in (F.batch_norm, F.embedding):
            self[function] = _OTHERS
        elif own or name == "__setitem__" or name in _IN_PLACE_OPERATORS:
            self[function] = _ALWAYS
        else:
            self[function] = names.index("inplace") if "inplace" in names else _NEVER
        return self[function]


_IN_PLACE_OPERATORS = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
)
_WRITES = _Writes()


def written_by(function: Callable, args: tuple, kwargs: dict) -> Sequence[Tensor]:
    """The tensors that a torch function is about to write to."""
    when = _WRITES[function]
    if when == _NEVER and not (kwargs and "out" in kwargs):
        return ()
    found: list[Any] = []
    if when == _ALWAYS or (when > 0 and (args[when] if when < len(args) else kwargs.get("inplace", False))):
        found = [*args[:1], kwargs.get("input")]
    elif function is F.batch_norm:
        found = [*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")]
    elif function is F.embedding and (len(args) > 3 or "max_norm" in kwargs):
        found = [*args[1:2], kwargs.get("weight")]
    if "out" in kwargs:
        found.append(kwargs["out"])
    return list(tensors_in(found)) if found else ()
