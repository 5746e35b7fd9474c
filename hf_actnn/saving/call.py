"""One torch function that is running: what it was given, what it saves, and how a rule says to keep that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_actnn import codec
from hf_actnn.errors import SavedTensorError, message
from hf_actnn.saving import fused
from hf_actnn.saving.identity import LAST, storage_key
from hf_actnn.saving.kept import (
    Blank,
    Exact,
    Geometry,
    Kept,
    Mask,
    Offsets,
    Quantized,
    TwoValued,
    fills_its_memory,
    is_dense,
)
from hf_actnn.saving.recipes import AtOnce, Masked, Recipe, View
from hf_actnn.saving.replays import STREAMS
from hf_actnn.saving.rows import coded_row_length, row_length
from hf_actnn.saving.tape import Item, samples_in_order
from hf_actnn.saving.values import flat_storage, two_values, without_repeats

if TYPE_CHECKING:
    from hf_actnn.saving.identity import Registry
    from hf_actnn.saving.rules import Rule
    from hf_actnn.saving.scope import Scope

#: Share of an input that views show from which on all of it is coded: other views of it then cost nothing.
NEARLY = 0.9


class Slot:
    """What autograd holds in place of one saved tensor.

    ``tensor`` is there only until the operation has returned: only then are its output and the order of its saves
    known, and with them the role of each save.
    """

    __slots__ = ("tensor", "kept", "reason", "where", "shared", "fused", "__weakref__")

    def __init__(self, tensor: Tensor, where: str) -> None:
        self.tensor: Tensor | None = tensor
        self.kept: Kept | None = None
        self.reason = ""
        self.where = where
        #: Whether other saves are given back by the same object; see `scope._Rebuilt`.
        self.shared = False
        #: Whether the operation's backward function may read codes; see `saving.fused`.
        self.fused = False

    def get(self) -> Tensor:
        if self.kept is None:
            raise SavedTensorError(
                message(
                    "a saved tensor was asked for before its operation had finished",
                    where=self.where,
                    expected="backward() after the operation has returned",
                    received="a request while it runs",
                    next_step="Do not call backward() inside the operation",
                )
            )
        return self.kept.get()

    def __reduce__(self) -> Any:
        raise TypeError("a saved tensor lives with its autograd graph and cannot be pickled or copied")


class Call:
    """A torch function while it runs. Rules read it and fill its slots."""

    __slots__ = (
        *("scope", "function", "rule", "args", "kwargs", "slots", "out", "output", "policy", "path", "before"),
        *("name", "next", "changed", "_where"),
    )

    def __init__(self, scope: Scope, function: Callable, rule: Rule | None, args: tuple, kwargs: dict) -> None:
        self.scope, self.function, self.rule = scope, function, rule
        self.args, self.kwargs = args, kwargs
        self.slots: list[Slot] = []
        self.path, self.policy = scope.places[-1]
        #: What the function returned; of several results the first.
        self.out: Any = None
        self.output: Any = None
        #: The rule of the next function, where the rule of this one asks for it and its output is what that is given.
        self.next: Rule | None = None
        #: Whether the output holds something else by now.
        self.changed = False
        #: What gives the first argument back, asked before an in-place operation overwrites it.
        self.before: Kept | None = None
        if rule is None:
            self.name = getattr(function, "__name__", "") or str(function)
        else:
            self.name = rule.name
            if rule.needs_before and args and isinstance(args[0], Tensor):
                self.before = scope.registry.find(args[0])
        self._where = ""

    @property
    def where(self) -> str:
        """For messages. Most calls save nothing, and need none."""
        if not self._where:
            self._where = f"{self.path or 'the model'}, {self.name}"
        return self._where

    # -- what the function was given ---------------------------------------------------------------------------------

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter, a buffer, or computed from these alone (casts included)."""
        scope = self.scope
        if scope.registry.is_weight(tensor):
            return True
        return scope.is_casting() and _cast_parameter(tensor, scope) is not None

    @property
    def in_place(self) -> bool:
        return bool(self.args) and self.same_storage(self.output, self.args[0])

    @staticmethod
    def same_storage(a: Tensor, b: Any) -> bool:
        if a is b:
            return True
        return isinstance(b, Tensor) and a.untyped_storage()._cdata == b.untyped_storage()._cdata

    @classmethod
    def same_view(cls, a: Tensor, b: Any) -> bool:
        """Whether two tensors are the same values of the same memory."""
        return cls.same_storage(a, b) and (
            (a.storage_offset(), a.shape, a.stride()) == (b.storage_offset(), b.shape, b.stride())
        )

    def open_slots(self) -> list[tuple[Slot, Tensor]]:
        """The slots that no one has decided on yet, each with its tensor."""
        return [(slot, slot.tensor) for slot in self.slots if slot.kept is None and slot.tensor is not None]

    # -- ways to keep ------------------------------------------------------------------------------------------------

    def exact(self, slot: Slot, reason: str) -> Kept:
        """Keep a save by reference; autocast's copy of a parameter as a recipe of that parameter."""
        tensor = slot.tensor
        assert tensor is not None
        slot.reason = reason
        kept = self.two_valued(tensor) if tensor.dtype == torch.bool and not self.is_weight(tensor) else None
        slot.kept = kept or exact(self.scope, tensor, slot.where)
        return slot.kept

    def own(self, slot: Slot, reason: str) -> Kept:
        """Keep by reference what the operation made for its own backward pass; nobody else can save or write to it."""
        tensor = slot.tensor
        assert tensor is not None
        slot.reason = reason
        slot.kept = kept = Exact(tensor, where=self.where)
        kept.lent = True
        return kept

    def two_valued(self, tensor: Tensor) -> Kept | None:
        """What gives a tensor back, to the bit, from one bit for each value; None where there are more than two values.

        Booleans have two. Elsewhere one has to look, for which a device other than the CPU would have to be waited for.
        """
        registry = self.scope.registry
        if self.policy.bits is None or tensor.requires_grad or registry.is_stored_weight(tensor):
            return None
        found = registry.find(tensor)
        if found is not None:
            return found if found.same_bits and not isinstance(found, Exact) else None
        once = without_repeats(tensor.detach())
        flat = flat_storage(once)
        if flat is None or flat.numel() < max(self.policy.min_numel, 1):
            return None
        split = two_values(flat)
        if split is None:
            return None
        kept: Kept = TwoValued(codec.pack_mask(split.upper, "nonzero"), Geometry(once), split.on, split.off)
        registry.learn(once, kept)
        if once.shape != tensor.shape:
            kept = View(kept, tensor.shape, tensor.stride(), 0)
            registry.learn(tensor, kept)
        return kept

    def whole_numbers(self, slot: Slot, count: int, other: int | None = None) -> None:
        """Keep an int64 save, whose values lie in ``[0, count)`` or equal ``other``, in as many bits as these need.

        What is kept already, has gaps, is small, or has more than 256 values is left.
        """
        tensor = slot.tensor
        assert tensor is not None
        symbols = count + (other is not None)
        registry = self.scope.registry
        if tensor.dtype != torch.int64 or not 0 < symbols <= 256 or registry.find(tensor) is not None:
            return
        flat = flat_storage(tensor)
        if self.policy.bits is None or flat is None or flat.numel() < max(self.policy.min_numel, 1):
            return
        geometry, bits = Geometry(tensor), max(1, (symbols - 1).bit_length())
        if other is not None:
            flat = torch.where(flat == other, count, flat)

        def decode(values: Tensor) -> Tensor:
            values = values.to(torch.int64)
            return geometry.from_flat(values if other is None else torch.where(values == count, other, values))

        kept = Offsets(codec.pack_uint(flat.to(torch.uint8), bits), bits, tensor.numel(), decode)
        registry.learn(tensor, kept)
        slot.kept = kept

    def exact_rest(self, reason: str) -> None:
        for slot in self.slots:
            if slot.kept is None:
                self.exact(slot, reason)

    def blank(self, slot: Slot) -> None:
        """Keep the shape alone."""
        assert slot.tensor is not None
        slot.kept = Blank(slot.tensor)

    def keep(self, slot: Slot, kept: Kept) -> Kept:
        slot.kept = kept
        return kept

    def data(self, slot: Slot, rows: str | None = None) -> Kept:
        """Keep activation data: as what is kept already, or as a code."""
        self.data_all([slot], rows)
        assert slot.kept is not None
        return slot.kept

    def data_all(self, slots: Sequence[Slot], rows: str | None = None) -> None:
        """Keep several saves of one operation; views that cover most of one storage are kept as that storage, once.

        Of a storage that no operation here made, an input's, that is so where they show nearly all of it; of a crop
        the crop is coded. Parts that overlap, and that separate operations read, are then kept each for itself.
        """
        registry = self.scope.registry
        pending: dict[int, list[Slot]] = {}
        for slot in slots:
            tensor = slot.tensor
            assert tensor is not None
            if not tensor.is_floating_point():
                self.exact(slot, "not floating point")
            elif self.is_weight(tensor):
                self.exact(slot, "computed from parameters alone")
            else:
                found = registry.find(tensor)
                if found is not None:
                    found = self._affordable(found, tensor)
                if found is not None:
                    slot.kept = found
                elif not self._data_of_its_own(slot, rows):
                    pending.setdefault(storage_key(tensor), []).append(slot)
        for group in pending.values():
            self._data_of_one_storage(group, rows)

    def _data_of_its_own(self, slot: Slot, rows: str | None) -> bool:
        """The usual case of :meth:`_data_of_one_storage`: the save is all that its storage holds, in whatever shape.
        False for any other.

        Groups follow the rows of the shape in which an operation made it. Whose values are whose, where bits are
        chosen by sample, is told by that shape too: then any other is left.
        """
        tensor, registry = slot.tensor, self.scope.registry
        assert tensor is not None
        layout = registry.layout(tensor)
        if layout is None:
            return False
        if not layout.is_of(tensor) and (
            self.scope.adaptation is not None
            or layout.numel != tensor.numel()
            or layout.offset != tensor.storage_offset()
            or not fills_its_memory(tensor)
        ):
            return False
        kept = self.code(tensor, self.length_of_rows(layout.shape, layout.stride, layout.rows or rows, tensor.itemsize))
        self._packed(slot, kept)
        registry.learn(tensor, kept)
        return True

    def _packed(self, slot: Slot, kept: Kept) -> None:
        slot.kept = kept
        if isinstance(kept, Exact):
            slot.reason = "too small to pay" if self.policy.bits else self.policy.reason

    def _data_of_one_storage(self, slots: list[Slot], rows: str | None) -> None:
        registry = self.scope.registry
        first = slots[0].tensor
        assert first is not None
        distinct = {
            (s.tensor.storage_offset(), s.tensor.shape, s.tensor.stride()): s.tensor.numel()
            for s in slots
            if s.tensor is not None
        }
        whole = first._base if registry.layout(first) is None and first._is_view() else None
        if whole is not None and sum(distinct.values()) >= NEARLY * whole.numel():
            registry.produced(whole, None)
        layout = registry.layout(first)
        within = 0
        if layout is not None and (layout.rows == LAST or len(layout.shape) < 4):
            within = row_length(layout.shape, layout.stride, LAST)
        if (
            layout is not None
            and (layout.numel != first.numel() or not fills_its_memory(first))
            and 2 * sum(distinct.values()) < layout.numel
        ):
            layout = None  # a small part of a large tensor: the part alone is cheaper
        for slot in slots:
            tensor = slot.tensor
            assert tensor is not None
            found = registry.find(tensor)
            if found is None or self._dearer_than_code(found, tensor):
                base = tensor
                if layout is not None and layout.holds(tensor):
                    base = tensor.detach().as_strided(layout.shape, layout.stride, layout.offset)
                kept = self.pack(base, (layout.rows if layout is not None else None) or rows, within)
                if isinstance(kept, Exact) and base is not tensor:
                    registry.learn(base, kept)
                    found = registry.find(tensor)
                else:
                    registry.learn(base, kept, rows)
                    found = registry.find(tensor)
                if found is None:
                    found = kept if base is tensor else self.pack(tensor, rows, within)
                    registry.learn(tensor, found, rows)
            self._packed(slot, found)

    def _affordable(self, found: Kept, tensor: Tensor) -> Kept | None:
        """What gives back a tensor that may be coded, other than a code of it.

        That is ``found`` where it is the cheaper, or a code of the smaller tensor that it was enlarged from; or None.
        """
        if not self._dearer_than_code(found, tensor):
            return found
        if not isinstance(found, Recipe) or not found.linear:
            return None
        source = found.parents[0]
        policy = self.policy
        if not isinstance(source, Exact) or policy.bits is None or source.tensor.numel() >= tensor.numel():
            return None
        times = tensor.numel() / max(source.tensor.numel(), 1)
        finer = policy.for_source_of(times)
        if finer.uniform >= times * policy.uniform:
            return None
        if source.swapped is not None:
            return found  # kept for another save already, and where it is it costs nothing
        self.policy = finer
        try:
            kept = found.of([self.data(Slot(source.tensor, self.where))])
        finally:
            self.policy = policy
        self.scope.registry.learn(tensor, kept)
        return kept

    def _dearer_than_code(self, found: Kept, tensor: Tensor) -> bool:
        """Whether a recipe holds more bytes, in tensors kept exactly for its sake, than a code of its result would."""
        if isinstance(found, Exact) or not found.same_bits or self.policy.bits is None:
            return False
        held = sum(leaf.nbytes for leaf in found.leaves() if isinstance(leaf, Exact))
        return 8 * held > self.policy.bits * tensor.numel()

    def pack(self, tensor: Tensor, rows: str | None, within: int = 0) -> Kept:
        """A code of the tensor, or the tensor itself where a code would not pay.

        Args:
            within: length of the rows of the memory that the tensor is a part of; 0 if it is all there is.
        """
        return self.code(tensor, self.length_of_rows(tensor.shape, tensor.stride(), rows, tensor.itemsize, within))

    def length_of_rows(
        self, shape: torch.Size, stride: tuple[int, ...], rows: str | None, itemsize: int, within: int = 0
    ) -> int:
        """Of the rows that a tensor is coded in; 0 where it is not to be coded."""
        policy = self.policy
        return 0 if policy.bits is None else coded_row_length(shape, stride, rows, within, itemsize, policy)

    def code(self, tensor: Tensor, length: int) -> Kept:
        """A code of the tensor in rows of this length; 0: the tensor itself."""
        if length == 0:
            return Exact(tensor, where=self.where)
        policy = self.policy
        assert policy.bits is not None  # else no row would be coded
        bits: int | Tensor = policy.uniform
        scope, item, samples = self.scope, "", 1
        if scope.adaptation is not None:
            item = scope.item(self)
            if scope.adaptation.keeps(item):
                return Exact(tensor, where=self.where)
            if tensor.device.type == "cpu":  # elsewhere to know the samples' bits would mean to wait for the device
                samples = samples_in_order(tensor, scope.samples, length)
            if not policy.is_fixed:
                spread = partial(codec.sample_spread, tensor, samples, length, policy.group_size)
                bits = scope.adaptation.widths(item, samples, policy, spread)
        packed = self.packed(tensor, bits, length)
        if scope.tape is not None:
            found = Item(
                scope.tape, item, packed, tensor, samples, scope.samples, policy.low, policy.high, float(policy.bits)
            )
            scope.tape.add(found)
            return Quantized(packed, item, found)
        return Quantized(packed, item)

    def packed(self, tensor: Tensor, bits: int | Tensor, length: int) -> codec.PackedTensor:
        """The codes of a tensor in rows of this length, under a random stream of their own."""
        scope = self.scope
        advance, stream = scope.advance, scope.next_stream()
        if advance is not None and advance.device != tensor.device:
            advance = None
        elif advance is not None:
            stream %= STREAMS  # the count numbers the passes; with a number of their own added, some would meet
        size = self.policy.group_size
        return codec.quantize(tensor, bits, size, scope.seed, stream, row_length=length, advance=advance)

    def data_argument(self, slot: Slot, argument: Any, rows: str | None = None) -> Kept:
        """Keep a save that is an argument, or a cast or a reshaped copy of it, so that the argument is kept once."""
        tensor = slot.tensor
        assert tensor is not None
        if self.same_storage(tensor, argument):
            return self.data(slot, rows)
        registry = self.scope.registry
        if self.in_place and argument is self.args[0]:
            # The argument holds the output by now; autograd saved a copy of what it held, which `before` gives back.
            return self.keep(slot, self.before) if self.before is not None else self.data(slot, rows)
        copied = (
            isinstance(argument, Tensor)
            and argument.numel() == tensor.numel()
            and argument.is_floating_point()
            and registry.find(tensor) is None
            and not self.is_weight(argument)
        )
        if not copied:
            return self.data(slot, rows)
        source = Slot(argument, slot.where)
        self.data(source, rows)
        assert source.kept is not None
        if isinstance(source.kept, Exact):
            return self.data(slot, rows)  # nothing gained: two exact tensors for one
        kept = Recipe("copy", None, [source.kept], tensor)
        registry.learn(tensor, kept, rows)
        return self.keep(slot, kept)

    def mask(self, slot: Slot, source: Tensor, predicate: str, lo: float, hi: float, on: float, off: float) -> Mask:
        """Keep one bit per value of ``source``; the save comes back as ``on`` or ``off``."""
        assert slot.tensor is not None
        flat = flat_storage(source)
        if flat is None:
            source = source.detach().contiguous()
            flat = source.view(-1)
        codes = codec.pack_mask(flat, predicate, lo, hi)
        geometry = Geometry(source)
        geometry.dtype = slot.tensor.dtype
        slot.kept = mask = Mask(codes, geometry, on, off)
        return mask

    def fuse(self, slot: Slot, *, on_cuda: bool = False, summed: int = 0) -> None:
        """Let the backward function read this save in parts, where that pays; see :func:`fused.pays`."""
        assert slot.tensor is not None
        slot.fused = self.scope.fuses and fused.pays(slot.tensor, on_cuda, summed)

    # -- recipes for outputs ---------------------------------------------------------------------------------------

    def kept_of(self, tensor: Any) -> Kept | None:
        """What already gives a tensor back, if it is kept."""
        return self.scope.registry.find(tensor) if isinstance(tensor, Tensor) else None

    def output_recipe(
        self,
        name: str,
        function: Callable[..., Tensor] | None,
        parents: Sequence[Kept | None],
        *,
        writes: bool = False,
        repeats: bool = False,
        linear: bool = False,
        samples: tuple[bool, ...] = (),
        elementwise: bool = False,
        moves: bool = False,
        at_once: AtOnce | None = None,
        output: Tensor | None = None,
    ) -> Recipe | None:
        """Whoever saves the output from here on need not: it is rebuilt from ``parents``. The recipe, or None where the
        output is kept for itself."""
        output = self.output if output is None else output
        if self.policy.bits is None or None in parents or self.changed or not fills_its_memory(output):
            return None
        if type(parents[0]) is Exact and all(type(one) is Exact and one.parameter for one in parents):
            return None
        if repeats and function is not None and not moves:
            function = as_now(function, output.device.type)
        known: Sequence[Kept] = parents  # type: ignore[assignment]
        how: dict[str, Any] = {"repeats": repeats, "linear": linear, "samples": samples, "elementwise": elementwise}
        kept = Recipe(name, function, known, output, writes=writes, moves=moves, at_once=at_once, **how)
        scope = self.scope
        scope.registry.learn(output, kept)
        for parent in known:
            if type(parent) is Exact or type(parent) is View:
                scope.session.lend(parent)
        return kept

    def again_on_first(self) -> Callable[[Any], Tensor] | None:
        """This function of another first argument, all others being as they are now; None where one is a tensor.

        Lists among the arguments are copied: their owner may go on to change them.
        """
        leaves, structure = tree_flatten((self.args[1:], self.kwargs))
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            return None
        function = self.function

        def again(value: Any) -> Tensor:
            args, kwargs = tree_unflatten(leaves, structure)
            return function(value, *args, **kwargs)

        return again

    def output_masked(self, source: Kept | None, mask: Mask, on: float) -> None:
        """The output is what ``source`` gives back, times ``on`` where the mask's bit is set and 0 elsewhere."""
        output = self.output
        if self.policy.bits is not None and source is not None and fills_its_memory(output):
            self.scope.registry.learn(output, Masked(self.name, source, mask, on, output))


def as_now(function: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """A function that computes under the autocast of this moment, which the backward pass switches off."""
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(device):
        return function
    dtype = torch.get_autocast_dtype(device)

    def run(*values: Tensor) -> Tensor:
        with torch.autocast(device, dtype, cache_enabled=False):
            return function(*values)

    return run


def _cast_parameter(tensor: Tensor, scope: Scope) -> Tensor | None:
    """The parameter that autocast's copy was made from, read off the copy's graph."""
    node = tensor.grad_fn
    for _ in range(4):
        if node is None:
            return None
        variable = getattr(node, "variable", None)
        if variable is not None:
            return variable if scope.registry.is_stored_weight(variable) else None
        following = node.next_functions
        if len(following) != 1 or node.name() not in _CASTS_AND_VIEWS:
            return None
        node = following[0][0]
    return None


_CASTS_AND_VIEWS = frozenset(
    {
        "ToCopyBackward0",
        "TBackward0",
        "TransposeBackward0",
        "ViewBackward0",
        "UnsafeViewBackward0",
        "ReshapeAliasBackward0",
        "PermuteBackward0",
    }
)


def exact(scope: Scope, tensor: Tensor, where: str) -> Kept:
    """A tensor by reference. A cast copy of a parameter, as autocast makes it, becomes a recipe of the parameter."""
    registry = scope.registry
    if registry.is_stored_weight(tensor):
        return registry.reference(tensor, where)
    found = registry.find(tensor)
    # Whatever is known of a tensor computed from parameters and constants gives it back exactly: none of it is coded.
    if found is not None and (found.kind == "recipe: cast" or registry.is_weight(tensor)):
        return found
    if found is not None and found.same_bits and extra_nbytes(registry, found) <= tensor.untyped_storage().nbytes():
        return found
    parameter = _cast_parameter(tensor, scope) if scope.is_casting() else None
    if parameter is not None and parameter.dtype != tensor.dtype:
        recipe = recast(Exact(parameter, parameter=True, where=where), parameter, tensor)
        if recipe is not None:
            return recipe
    kept = Exact(tensor, where=where)
    if not registry.is_weight(tensor):
        registry.learn(tensor, kept)
    return kept


def extra_nbytes(registry: Registry, found: Kept) -> int:
    """Bytes of tensors that a recipe would hold and nothing else does. What was swapped is another save's."""
    leaves = [leaf for leaf in found.leaves() if isinstance(leaf, Exact) and leaf.swapped is None]
    extra = {storage_key(leaf.tensor): leaf.nbytes for leaf in leaves}
    return sum(nbytes for key, nbytes in extra.items() if not registry.is_held(key))


def recast(source: Kept, weight: Tensor, copy: Tensor) -> Kept | None:
    """A recipe that casts a weight again, in the copy's geometry; None where the copy is no plain view of it."""
    if (
        copy.numel() != weight.numel()
        or not is_dense(weight.shape, weight.stride())
        or not is_dense(copy.shape, copy.stride())
    ):
        return None
    dtype, shape, stride = copy.dtype, copy.shape, copy.stride()

    def cast(value: Tensor) -> Tensor:
        value = value.detach().to(dtype)
        return value.as_strided(shape, stride, value.storage_offset())

    return Recipe("cast", cast, [source], copy)
