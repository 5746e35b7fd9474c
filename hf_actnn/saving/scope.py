"""What is on while a converted module runs: one pair of saved-tensor hooks and one function mode per thread.

The outermost converted call opens the scope, inner ones only say where they are. Innermost hooks win, as always in
torch: inside a non-reentrant checkpoint its own hooks see the saves. Where what is saved is to be coded when its block
runs again, the outermost converted modules in there open scopes of their own, which hand on to the checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hf_actnn import codec
from hf_actnn.errors import NotAvailableError, message
from hf_actnn.saving import boundaries, replay, rules
from hf_actnn.saving.call import Call, Slot, exact
from hf_actnn.saving.fused import deferred, handed_on
from hf_actnn.saving.identity import Registry
from hf_actnn.saving.kept import Exact, Geometry, Kept, Leaf, at_end_of_backward, probe
from hf_actnn.saving.policy import Policy, again
from hf_actnn.saving.replays import STREAMS
from hf_actnn.saving.sharded import check_local, is_sharded, parameter_of
from hf_actnn.saving.swap import ForwardPass
from hf_actnn.saving.tape import Tape, batch_size, seed_of
from hf_actnn.saving.writes import tensors_in, written_by

if TYPE_CHECKING:
    from hf_actnn.saving.rules import Rule
    from hf_actnn.saving.session import Adaptation, Session


class _Thread(threading.local):
    """What is on in a thread."""

    scope: Scope | None = None

    def __init__(self) -> None:
        self.observers: list[Observer] = []
        self.pauses: list[contextlib.AbstractContextManager[None]] = []


_thread = _Thread()
_prepared: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_STRIDED = torch.strided
_DATA = vars(torch._C.TensorBase)["data"]
_GETTER = type(vars(torch._C.TensorBase)["requires_grad"].__get__)  # reading x.shape arrives as a torch function too


class Observer(Protocol):
    """Told of every save a scope decides on; what memory tracking is made of."""

    def saved(self, slot: Slot, tensor: Tensor, path: str, function: str) -> None: ...

    def copied(self, kept: Exact, path: str) -> None:
        """A tensor that recipes refer to was copied before it was written to."""
        ...

    def moved(self, leaf: Leaf, to_host: bool) -> None:
        """What a leaf holds left the device, or came back; the copy on the host stays."""
        ...


def current() -> Scope | None:
    """The scope that is on in this thread."""
    return _thread.scope


def observers() -> list[Observer]:
    """The observers of this thread."""
    return _thread.observers


class Scope:
    """One forward pass of the outermost converted module."""

    def __init__(self, session: Session, root: torch.nn.Module) -> None:
        self.session = session
        self.seed = session.key()
        self._streams = itertools.count(session.next_step() * STREAMS)
        self.registry = Registry(*_weights(root))
        self.root = root
        self.places: list[tuple[str, Policy]] = []
        self.call: Call | None = None
        #: A call that is decided on when the next one begins, and the version that its output had.
        self._waiting: Call | None = None
        self._version = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._mode = _Watch(self)
        self._observers = observers()
        self._first: dict[int, Slot] = {}  # kept -> the first slot it stands behind; the slot keeps the id taken
        self._notes: list[tuple[str, str, str, str, int]] = []
        #: Where a checkpoint that runs its block again wants what is saved; whether any kind of checkpoint does so.
        self._receiver = boundaries.receiver()
        self._again = self._receiver is not None or boundaries.is_recomputing()
        #: Who chooses bits, if anyone does; the batch it chooses for; what is measured, on a collecting step.
        self.adaptation = None if self._again else session.adaptation
        self.samples = 1
        self.tape: Tape | None = None
        self._packed: dict[tuple[str, str], int] = {}
        self._swapping: ForwardPass | None = None
        #: What captured passes add to their streams.
        self.advance: Tensor | None = None
        #: Whether backward functions may read codes.
        self.fuses = session.config.fused_backward
        session.opened()

    def next_stream(self) -> int:
        return next(self._streams)

    def position(self) -> tuple[str, Policy]:
        return self.places[-1]

    def enter(self, path: str, policy: Policy) -> None:
        """A converted module begins; whoever calls this takes the last of ``places`` away in the end."""
        self.places.append((path, again(policy) if self._again else policy))

    def run(self, place: tuple[str, Policy], forward: Callable, args: tuple, kwargs: dict) -> Any:
        """Run the outermost module's own call with this scope on."""
        session = self.session
        device = _device_of(self.root)
        where = place[0] or type(self.root).__name__
        self.advance = session.replays.begin(device, where)
        if session.swappers is not None and not self._again:
            self._swapping = session.swappers.begin(device, where)
        if session.arenas is not None:
            session.arenas.begin()
        if not self._again:
            codec.release()  # what the last backward pass decoded into: a forward pass peaks without it
        self.enter(*place)
        _thread.scope = self
        try:
            with contextlib.nullcontext() if session.arenas is None else session.arenas.serving():
                if self.adaptation is not None and self.advance is None:
                    return self._adapting(self.adaptation, forward, args, kwargs)
                with self._hooks, self._mode:
                    return self._called(forward, args, kwargs)
        finally:
            _thread.scope = None
            self.places.pop()
            self.session.observed(self._notes, self._again)
            self._close()

    def _called(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        try:
            out = forward(*args, **kwargs)
            self._settle()
            return out
        except BaseException:
            with contextlib.suppress(Exception):  # what was made so far may still be differentiated
                self._settle()
            # Of a part that was interrupted no hook runs behind it.
            while _thread.pauses and _thread.scope is not self:
                _thread.pauses.pop().__exit__(None, None, None)
            raise

    def _adapting(self, adaptation: Adaptation, forward: Callable, args: tuple, kwargs: dict) -> Any:
        self.samples = batch_size(args, kwargs, getattr(self.root, "main_input_name", ""))
        tape = adaptation.begin(self.samples, self.root)
        if tape is not False:
            self.tape = tape or Tape(seed_of(self.seed, adaptation.steps))
        try:
            with self._hooks, self._mode:
                out = self._called(forward, args, kwargs)
        except BaseException:
            adaptation.failed()
            raise
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if self.tape is not None:
            self.tape.listen(outputs, self.samples)
            adaptation.recorded(self.tape)
        adaptation.end(outputs, self.samples)
        return out

    def item(self, call: Call) -> str:
        """Name of the tensor that is about to be quantised, the same in every step: where, by what, and the how
        manieth there."""
        place = call.path, call.name
        number = self._packed.get(place, 0)
        self._packed[place] = number + 1
        name = f"{call.path}:{call.name}" if call.path else f":{call.name}"
        return f"{name}#{number}" if number else name

    def _close(self) -> None:
        """Let go of what refers back here: a cycle would hold every code until the collector runs."""
        self.registry.release()
        del self._hooks, self._mode, self.registry, self._first
        del self.root
        self.tape = self._waiting = None
        codec.settle()

    # -- autograd saves ------------------------------------------------------------------------------------------------

    #: Whether autocast is on, and copies of weights may come along: reading a graph from Python is slow.
    is_casting = staticmethod(torch._C._is_any_autocast_enabled)

    def _pack(self, tensor: Tensor) -> Slot:
        call = self.call
        if call is None:
            self._settle()
            if self.registry.sharded:
                self._gather((tensor,))
            # An autograd.Function or a scripted function: nothing is known of what it does with its saves.
            path, _ = self.position()
            if self._receiver is None and boundaries.is_saving():
                slot = Slot(tensor, f"{path or 'the model'}, an argument of a checkpoint")
                boundaries.keep(self, slot)
                self._decided([slot], path, boundaries.NAME)
                return slot
            slot = Slot(tensor, f"{path or 'the model'}, an operation that is no torch function")
            slot.kept = exact(self, tensor, slot.where)
            slot.reason = "saved by an autograd.Function or a scripted function"
            self._decided([slot], path, "autograd.Function")
            return slot
        if type(tensor) is not Tensor and call.policy.bits is not None:
            check_local(tensor, call.where)
        slot = Slot(tensor, call.where)
        call.slots.append(slot)
        return slot

    def _decided(self, slots: list[Slot], path: str, function: str) -> None:
        handed = () if self._receiver is None else [_handed(slot) for slot in slots]
        replaced = 0  # bytes on the CPU that codes stand for from here on
        for slot in slots:
            kept, tensor = slot.kept, slot.tensor
            assert tensor is not None and kept is not None
            nbytes = tensor.nbytes
            first = slot
            if type(kept) is Exact:
                kind = "parameter" if kept.parameter else "exact"
            else:
                kind = kept.kind
                first = self._first.setdefault(id(kept), slot)
                if first is not slot:
                    first.shared = slot.shared = True
                elif tensor.is_cpu:
                    replaced += nbytes
            self._notes.append((path, function, kind, slot.reason, nbytes))
            for observer in self._observers:
                observer.saved(slot, tensor, path, function)
            slot.tensor = None
            if self._swapping is not None and first is slot:
                for leaf in kept.leaves():
                    if isinstance(leaf, Leaf):
                        self._swapping.take(leaf, self._observers)
        if replaced:
            del tensor
            codec.dropped(replaced)
        for one in handed:  # the last of a block ends it, by an exception
            self._receiver(one)  # type: ignore[misc]

    # -- torch functions -----------------------------------------------------------------------------------------------

    def intercept(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        rule = rules.find(function)
        if self._waiting is not None:
            self._settle(rule, args)
        if rule is not None and rule.opened is not None:
            with self._mode:
                return rule.opened(*args, **kwargs)
        if self.registry.sharded:
            self._gather(tensors_in((*args, *kwargs.values())))
        written = written_by(function, args, kwargs)
        for tensor in written:
            for kept in self.session.before_write(tensor):
                for observer in self._observers:
                    observer.copied(kept, self.position()[0])
        outer = self.call
        call = self.call = Call(self, function, rule, args, kwargs)
        constant = self._from_weights_alone(call)  # asked before an in-place operation changes what it was given
        try:
            out = call.out = function(*args, **kwargs)
        finally:
            self.call = outer
        if constant and out is None:  # an assignment to a part of a constant, which stays one
            for tensor in written:
                self.registry.mark_derived(tensor)
        looks_ahead = rule is not None and rule.looks_ahead and not constant
        here = self._receiver is None and not self.registry.sharded and isinstance(out, Tensor)
        if looks_ahead and here and call.slots and call.policy.bits is not None:
            self._waiting, self._version = call, out._version
        else:
            self._finish(call, constant)
        return out

    def _settle(self, rule: Rule | None = None, args: tuple = ()) -> None:
        """Decide on the call that waits, if one does: a function of this rule and these arguments begins."""
        call, self._waiting = self._waiting, None
        if call is None:
            return
        call.changed = call.out._version != self._version  # by scripted code, say, which no function mode sees
        follows = rule is not None and args and isinstance(args[0], Tensor) and not call.changed
        if follows and self.position()[1].bits is not None and call.same_view(call.out, args[0]):
            call.next = rule
        with torch._C.DisableTorchFunction():  # where it is not the function mode that asks
            self._finish(call, False)

    def _gather(self, tensors: Iterable[Tensor]) -> None:
        """Note the parameters among what an operation is given that were not there when the forward pass began."""
        for tensor in tensors:
            parameter = parameter_of(tensor)
            if parameter is not None and self.registry.gathered(parameter) and self.adaptation is not None:
                self.adaptation.gathered(parameter)

    def _finish(self, call: Call, constant: bool) -> None:
        out, rule = call.out, call.rule
        if isinstance(out, Tensor):
            output, alive = out, out.requires_grad
        else:
            output = out[0] if isinstance(out, (tuple, list)) and out else out
            alive = out is None or any(tensor.requires_grad for tensor in tensors_in((out,)))
        call.output = output
        differentiable = isinstance(output, Tensor) and output.is_floating_point()
        if call.slots and not alive:
            _drop(call)
            if not differentiable:
                return
        if not call.slots and not differentiable:
            self._finish_integers(call, constant)
        elif constant:
            self._finish_constant(call, differentiable)
        else:
            if differentiable and output.layout is _STRIDED:
                self.registry.produced(output, self._rows(call), alive)
            if call.slots or (rule is not None and rule.without_saves):
                # As torch.no_grad does, without the microseconds of a context manager written in Python.
                before = torch.is_grad_enabled()
                torch._C._set_grad_enabled(False)
                try:
                    self._keep(call)
                finally:
                    torch._C._set_grad_enabled(before)
            if not alive:
                self._learn_by_element(call)
        if call.slots:
            self._decided(call.slots, call.path, call.name)

    def _finish_integers(self, call: Call, constant: bool) -> None:
        """An operation that saved nothing, and whose results are no floating-point numbers."""
        out, rule = call.out, call.rule
        if constant and isinstance(out, Tensor) and _has_storage(out):
            self.registry.mark_derived(out)
            if call.policy.bits is not None:
                replay.learn(call)
        elif rule is not None and rule.integers and isinstance(call.output, Tensor):
            rule.keep(call)
        else:
            self._learn_by_element(call)

    def _finish_constant(self, call: Call, differentiable: bool) -> None:
        """An operation on parameters and constants alone."""
        out, rule = call.out, call.rule
        for tensor in tensors_in(out if isinstance(out, (tuple, list)) else (out,)):
            if _has_storage(tensor):
                self.registry.mark_derived(tensor)
        if call.policy.bits is not None and differentiable:
            with torch.no_grad():
                if rule is not None and rule.lossless:
                    rule.keep(call)
                else:
                    replay.learn(call)
        call.exact_rest("computed from parameters and constants alone")

    @staticmethod
    def _learn_by_element(call: Call) -> None:
        if call.policy.bits is not None and torch.is_grad_enabled():
            with torch.no_grad():
                replay.learn_by_element(call)

    def _keep(self, call: Call) -> None:
        rule = call.rule
        if call.policy.bits is None:
            call.exact_rest(call.policy.reason)
        elif rule is None:
            call.exact_rest("no rule for this operation")
        else:
            rule.keep(call)
            call.exact_rest(rule.exact_reason)

    def _from_weights_alone(self, call: Call) -> bool:
        # Which of a weight's values an index picks may depend on data; they are the weight's all the same.
        args = call.args[:1] if call.function is Tensor.__getitem__ else call.args
        is_weight = self.registry.is_weight
        for value in args:
            if isinstance(value, Tensor):
                if value.layout is not _STRIDED or not is_weight(value):
                    return False
            elif isinstance(value, (list, tuple)):
                for tensor in value:
                    if isinstance(tensor, Tensor) and not (_has_storage(tensor) and is_weight(tensor)):
                        return False
        if not call.kwargs:
            return True
        return all(_has_storage(tensor) and is_weight(tensor) for tensor in tensors_in(call.kwargs.values()))

    def _rows(self, call: Call) -> str | None:
        rule = call.rule
        if rule is not None and rule.rows is not None:
            return rule.rows
        for value in call.args:
            if isinstance(value, Tensor):
                if value.is_floating_point() and value.layout is _STRIDED:
                    return self.registry.rows(value)
            elif isinstance(value, (list, tuple)):
                for tensor in tensors_in(value):
                    if tensor.is_floating_point() and _has_storage(tensor):
                        return self.registry.rows(tensor)
        return None


class _Watch(TorchFunctionMode):
    """Shows the scope every torch function; torch switches it off while it handles one."""

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self._scope = scope

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if type(func) is _GETTER:
            if getattr(func, "__self__", None) is _DATA and _has_storage(args[0]):
                self._scope._settle()
                self._scope.registry.close(args[0])
            return func(*args, **(kwargs or {}))
        if func in rules.TRANSPARENT and not (func is Tensor.__getitem__ and _gathers(args[1])):
            return func(*args, **(kwargs or {}))
        return self._scope.intercept(func, args, kwargs or {})


class _Rebuilt(threading.local):
    """The tensor last given back for several saves, until another of them is asked for or the backward pass ends.

    The three projections of an attention layer save one input and ask for it one after the other.
    """

    kept: Kept | None = None
    value: Tensor | None = None

    def get(self, slot: Slot) -> Tensor:
        if not slot.shared or probe.values is not None:
            return slot.get()
        if self.kept is slot.kept and self.value is not None:
            return self.value
        self.clear()
        value = slot.get()
        if at_end_of_backward(self.clear):
            self.kept, self.value = slot.kept, value
        return value

    def clear(self) -> None:
        self.kept = self.value = None


_rebuilt = _Rebuilt()


def _unpack(slot: Slot) -> Tensor:
    if torch._C._is_any_autocast_enabled():
        # A backward pass inside autocast: what the forward pass computed outside is not computed again inside.
        with contextlib.ExitStack() as stack:
            for device in ("cpu", torch._C._get_accelerator().type):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return _given_back(slot)
    return _given_back(slot)


def _given_back(slot: Slot) -> Tensor:
    if probe.read is not None:
        probe.saw(slot)
    if torch.is_grad_enabled():  # create_graph=True
        with torch.no_grad():
            return slot.get()
    kept = slot.kept
    if slot.fused and kept is not None:
        stand_in = deferred(kept, partial(_whole, slot))
        if stand_in is not None:
            return stand_in
    return _whole(slot)


def _handed(slot: Slot) -> Tensor:
    """What a checkpoint that runs its block again gets for a save."""
    kept, tensor = slot.kept, slot.tensor
    assert kept is not None and tensor is not None
    if type(kept) is Exact:
        return kept.get()  # which need not be what was saved: some rules keep another tensor in its place
    with torch._C.DisableTorchFunction():
        return handed_on(kept, partial(_whole_in_dispatch, slot), Geometry(tensor), slot.fused)


def _whole_in_dispatch(slot: Slot) -> Tensor:
    """Where an operation of a backward function is dispatched, autograd is off for good; attention that is run again
    needs it."""
    keys = torch._C.DispatchKey
    with (
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
        torch.no_grad(),
    ):
        return _whole(slot)


def _whole(slot: Slot) -> Tensor:
    return _rebuilt.get(slot) if slot.shared else slot.get()


#: Types of attributes that are no tensors, of all modules seen.
_PLAIN_TYPES: set[type] = set()


def _tensors_among(attributes: Collection[Any]) -> list[Tensor]:
    """Asked of all types at once: most modules have none, and a model has hundreds of modules."""
    if _PLAIN_TYPES.issuperset(map(type, attributes)):
        return []
    found = [value for value in attributes if isinstance(value, Tensor)]
    _PLAIN_TYPES.update(kind for kind in map(type, attributes) if not issubclass(kind, Tensor))
    return found


def _device_of(root: torch.nn.Module) -> torch.device:
    """Where the first of a module's tensors is."""
    return next((one.device for one in itertools.chain(root.parameters(), root.buffers())), torch.device("cpu"))


def _weights(root: torch.nn.Module) -> tuple[set[int], bool]:
    """Storages of all parameters and buffers, looked up afresh: modules may have been added since conversion. And
    whether parameters are sharded.

    Tensors that are plain attributes count too: the replicas of DataParallel, and modules whose parameters were
    flattened into one, have their weights there.
    """
    found: set[int] = set()
    sharded = False
    seen: set[torch.nn.Module | None] = {None}  # a module may be registered as None
    open_modules: list[torch.nn.Module] = [root]
    while open_modules:
        module = open_modules.pop()
        if module in seen:
            continue
        seen.add(module)
        attributes = vars(module)
        sharded = is_sharded(module) or sharded
        tensors = _tensors_among(attributes.values())
        tensors.extend(attributes["_parameters"].values())
        tensors.extend(attributes["_buffers"].values())
        for tensor in tensors:
            if tensor is not None and tensor.layout is _STRIDED:
                found.add(tensor.untyped_storage()._cdata)
        open_modules.extend(attributes["_modules"].values())
    return found, sharded


def _drop(call: Call) -> None:
    """No backward pass leads to these saves: what isfinite saves in passing, say, is gone with its graph. (An
    assignment to a part of a tensor returns nothing, and is none of these.)"""
    for slot in call.slots:
        assert slot.tensor is not None
        slot.kept, slot.tensor = Exact(slot.tensor, where=slot.where), None
    call.slots = []


def _gathers(index: Any) -> bool:
    """Whether indexing with this copies what it picks, where plain indices and slices make a view."""
    parts = index if isinstance(index, tuple) else (index,)
    return not all(part is None or part is Ellipsis or type(part) in (int, slice) for part in parts)


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout is _STRIDED


@contextlib.contextmanager
def suspended(scope: Scope | None) -> Iterator[None]:
    """Run a compiled part of a model: there its own graph has what is saved coded, and no function mode may be on.

    The hooks stay: what the graph keeps is counted, and kept as it is.
    """
    if scope is None:
        yield
        return
    scope._settle()
    mode, _thread.scope = scope._mode, None
    mode.__exit__(None, None, None)
    try:
        yield
    finally:
        mode.__enter__()
        _thread.scope = scope


def prepare_compiled_parts(root: torch.nn.Module) -> None:
    """Have the parts of a model that were given to `torch.compile` one by one run with the scope suspended."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:  # nothing was compiled in this process
        return
    for module in root.modules():
        if isinstance(module, dynamo.OptimizedModule) and module not in _prepared:
            _prepared.add(module)
            module.register_forward_pre_hook(_suspend)
            module.register_forward_hook(_resume, always_call=True)


def _suspend(module: torch.nn.Module, args: Any) -> None:
    pause = suspended(_thread.scope)
    pause.__enter__()
    _thread.pauses.append(pause)


def _resume(module: torch.nn.Module, args: Any, output: Any) -> None:
    if _thread.pauses:  # there is none where a hook before ours has raised
        _thread.pauses.pop().__exit__(None, None, None)


def check_can_open() -> None:
    """Raise where saved-tensor hooks cannot work."""
    if torch._C._functorch.maybe_current_level() is not None:
        raise NotAvailableError(
            message(
                "torch.func transforms cannot run over a converted model: they reject saved-tensor hooks",
                where="torch.func.grad, vjp, jacrev or vmap",
                expected="loss.backward() or torch.autograd.grad",
                next_step="Call hf_actnn.revert(model) first, or put the model in eval mode",
            )
        )


def leaves_alone(session: Session) -> bool:
    """Whether a checkpoint is what sees saved tensors here: while it runs its function for the first time nothing is
    held, and when it does so again nothing is coded unless it was asked for."""
    if session.config.effective_recompute_bits is None or boundaries.is_selective():
        return boundaries.hooks() is not None or boundaries.is_recomputing()
    return boundaries.hooks() is not None and boundaries.receiver() is None
