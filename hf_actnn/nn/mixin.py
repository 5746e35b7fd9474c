"""A compressed module: the original class plus one mixin, and no arithmetic of its own."""

from __future__ import annotations

import inspect
import itertools
import types
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from hf_actnn.config import ActNNConfig
from hf_actnn.errors import ConversionError, message
from hf_actnn.saving import compiled, scope
from hf_actnn.saving.policy import Policy, policies
from hf_actnn.saving.session import Session

#: Where a module keeps its membership; not a parameter, buffer or submodule, so state_dict does not see it.
ATTRIBUTE = "_actnn"


#: Keyword by which a training loop says which samples of the data set a batch holds.
SAMPLE_ID = "sample_id"


class Member(NamedTuple):
    """What a converted module knows: its path, what the configuration says of it, and what the model shares.

    ``adapts``: the module was made by itself and told nothing, so inside a converted model it does as that model does.
    Adapters are made in this way, by libraries that call the class of the layer they are put beside.
    """

    path: str
    policy: Policy
    session: Session
    adapts: bool = False
    label: str = ""


class Compressed:
    """The mixin. Its only work is to say where the forward pass is, and to open the scope when it is the outermost."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().__call__  # type: ignore[misc]
        member: Member | None = self.__dict__.get(ATTRIBUTE)
        if kwargs and SAMPLE_ID in kwargs:
            kwargs = _without_ids(self, member, kwargs)
        if torch.compiler.is_compiling():
            return _traced(self, member, forward, args, kwargs)
        if member is None or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if "forward" in self.__dict__:
            check_forward(self, member.path or type(self).__name__)
        current = scope.current()
        if self._compiled_call_impl is not None:  # type: ignore[attr-defined]
            with scope.suspended(current):
                return forward(*args, **kwargs)
        if current is not None:
            if member.adapts:
                return forward(*args, **kwargs)
            current.enter(member.path, member.policy)
            try:
                return forward(*args, **kwargs)
            finally:
                current.places.pop()
        if not self.training or scope.leaves_alone(member.session) or compiled.is_running_for_compiler():  # type: ignore[attr-defined]
            return forward(*args, **kwargs)
        scope.check_can_open()
        scope.prepare_compiled_parts(self)  # type: ignore[arg-type]
        opened = scope.Scope(member.session, self)  # type: ignore[arg-type]
        return opened.run((member.path, member.policy), forward, args, kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As in :class:`torch.nn.Module`; the graph begins with this module's mark."""
        marked = types.MethodType(_marked_call_of(type(self)), self)
        self._compiled_call_impl = torch.compile(marked, *args, **kwargs)

    def _marked_call(self, *args: Any, **kwargs: Any) -> Any:
        return _traced(self, self.__dict__.get(ATTRIBUTE), self._call_impl, args, kwargs)  # type: ignore[attr-defined]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Stop here: what a class does for its subclasses (registries, annotations) was done for the original already.
        pass

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        made = getattr(type(self), "_actnn_original", None)
        if made is None or not isinstance(reduced, tuple) or len(reduced) < 2 or reduced[1][:1] != (type(self),):
            return reduced
        # The made class has no importable name of its own: name the original, and make the counterpart when loading.
        return (_new, (made, *reduced[1][1:]), *reduced[2:])


def check_forward(module: Any, where: str) -> None:
    """Raise where a module's forward was compiled by itself: the tracer would follow our own code from within."""
    if hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable"):
        raise ConversionError(
            message(
                "the forward method of a converted model is compiled by itself",
                where=where,
                expected="model.compile(), or torch.compile(model)",
                received="model.forward = torch.compile(model.forward)",
                next_step="Convert the model as it was, and compile it as a whole or block by block",
            )
        )


@lru_cache(maxsize=256)
def _takes_ids(forward: Any) -> bool:
    return SAMPLE_ID in inspect.signature(forward).parameters


def _without_ids(module: Any, member: Member | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Hand the samples' numbers to whom chooses bits; the model gets them only if it has a parameter of that name."""
    adaptation = None if member is None or torch.compiler.is_compiling() else member.session.adaptation
    if adaptation is not None and module.training and torch.is_grad_enabled():
        adaptation.identify(kwargs[SAMPLE_ID])
    if _takes_ids(type(module).forward):
        return kwargs
    return {key: value for key, value in kwargs.items() if key != SAMPLE_ID}


def _traced(module: Any, member: Member | None, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A module's call as torch.compile sees it."""
    if member is None or not module.training or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return compiled.run_marked(member.session.name, member.label, forward, args, kwargs)


def _new(original: type, *args: Any) -> Any:
    made = counterpart(original)
    return made.__new__(made, *args)


_numbers = itertools.count(1)
_numbers_of_code = itertools.count(1)
_marked: dict[type, Any] = {}
_made: dict[type, type] = {}  # for good: a counterpart refers to its original, so a weak key would never die


def counterpart(original: type[nn.Module]) -> Any:
    """The compressed class of a module class: the same class, with :class:`Compressed` in front.

    It keeps ``__name__``, ``__qualname__`` and ``__module__``, which saved ``architectures`` and look-ups by class name
    rely on. Instances made by its constructor, outside :func:`hf_actnn.convert`, compress at the default level.
    """
    made = _made.get(original)
    if made is None:
        names = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "_actnn_original": original,
            "__init__": _make_init(original),
            "__call__": _with_code_of_its_own(Compressed.__call__, original),
        }
        metaclass: Any = type(original)
        made = _made[original] = metaclass(original.__name__, (Compressed, original), names)
    return made


def _with_code_of_its_own(function: Any, cls: type) -> Any:
    """A copy of a function for a class. Torch counts the graphs of one code object, and compiles no more beyond some:
    classes that shared one would use up each other's."""
    code = function.__code__
    own = code.replace(co_consts=(*code.co_consts, f"for {cls.__qualname__} {next(_numbers_of_code)}"))
    made = types.FunctionType(own, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__, made.__doc__ = function.__kwdefaults__, function.__doc__
    made.__qualname__ = function.__qualname__
    return made


def _marked_call_of(cls: type) -> Any:
    if cls not in _marked:
        _marked[cls] = _with_code_of_its_own(Compressed._marked_call, cls)
    return _marked[cls]


def _make_init(original: type[nn.Module]) -> Any:
    def __init__(self: Any, *args: Any, actnn: ActNNConfig | str | None = None, **kwargs: Any) -> None:
        original.__init__(self, *args, **kwargs)
        config = ActNNConfig.resolve(actnn)
        join(self, Member("", policies(config, [""])[""], Session(config, next(_numbers)), actnn is None))

    __init__.__wrapped__ = original.__init__  # type: ignore[attr-defined]
    __init__.__doc__ = original.__init__.__doc__
    return __init__


def join(module: nn.Module, member: Member) -> None:
    """Make a module a converted one, or give a converted one another membership."""
    original = type(module)
    if getattr(original, "_actnn_original", None) is None:
        if parametrize.is_parametrized(module):
            _join_beneath_parametrization(module)
        else:
            module.__class__ = counterpart(original)
    module.__dict__[ATTRIBUTE] = member._replace(label=compiled.label(member.policy, member.session))


def _join_beneath_parametrization(module: nn.Module) -> None:
    """Torch takes a parametrised class apart as "the class over its first base": so the counterpart goes beneath it."""
    parametrised = type(module)
    base = counterpart(parametrised.__bases__[0])
    names = {**_own_names(parametrised), "_actnn_original": parametrised}
    metaclass: Any = type(parametrised)
    module.__class__ = metaclass(parametrised.__name__, (base,), names)


def _own_names(cls: type) -> dict[str, Any]:
    return {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}


def leave(module: nn.Module) -> None:
    """Undo :func:`join`."""
    present = type(module)
    if "_actnn_original" in vars(present):
        module.__class__ = vars(present)["_actnn_original"]
    elif (original := getattr(present, "_actnn_original", None)) is not None:
        # Parametrised or sharded since: torch's class stands over the counterpart, and goes over the original instead.
        metaclass: Any = type(present)
        bases = tuple(original if base is counterpart(original) else base for base in present.__bases__)
        module.__class__ = metaclass(present.__name__, bases, _own_names(present))
    module.__dict__.pop(ATTRIBUTE, None)


def membership(module: nn.Module) -> Member | None:
    """The membership of a converted module, None of any other."""
    return module.__dict__.get(ATTRIBUTE)
