"""Kept tensors that are made of others: views, and what a function gives of them once more."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_actnn import codec
from hf_actnn.codec import rebuild
from hf_actnn.saving.kept import (
    Exact,
    Geometry,
    Kept,
    Mask,
    Quantized,
    at_end_of_backward,
    fills_its_memory,
    is_dense,
    probe,
)


class Masking(NamedTuple):
    """What a mask does to a tensor that is made of codes, in the order of `codec.rebuild.by_channel`: its set bits are
    times ``on`` and the others times 0, or it holds the signs of what the codes stand for."""

    codes: Tensor
    on: float = 1.0
    signs: bool = False


#: (packed, values of the other parents, dtype of the result, mask) -> flat in storage order, or None; see
#: `codec.rebuild`.
AtOnce = Callable[[codec.PackedTensor, list[Tensor], torch.dtype, Masking | None], Tensor | None]


class _Form(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _dtype_of(kept: Kept) -> torch.dtype | None:
    """Of what gives itself back from codes; None where it is not known."""
    while type(kept) is View:
        kept = kept.parent
    return kept.form.dtype if type(kept) in (Recipe, Quantized) else None


class View(Kept):
    """Another view of a tensor that is kept."""

    __slots__ = ("parent", "shape", "stride", "offset")

    def __init__(self, parent: Kept, shape: torch.Size, stride: tuple[int, ...], offset: int) -> None:
        self.parent, self.shape, self.stride, self.offset = parent, shape, stride, offset

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.parent.kind

    @property
    def fresh(self) -> bool:  # type: ignore[override]
        return self.parent.fresh

    @property
    def same_bits(self) -> bool:  # type: ignore[override]
        return self.parent.same_bits

    def get(self) -> Tensor:
        return self.of(self.parent.get())

    def get_as(self, dtype: torch.dtype) -> Tensor:
        return self.of(self.parent.get_as(dtype))

    @property
    def form(self) -> Any:
        """Of a view that has all values of what it is a view of, in whatever shape."""
        form = self.parent.form
        if form is None or self.offset or self.shape.numel() != math.prod(form.shape):
            return None
        if not is_dense(self.shape, self.stride):
            return None
        return _Form(self.shape, self.stride, form.dtype, form.device)

    @property
    def unit(self) -> int:
        return self.parent.unit

    def part(self, start: int, stop: int) -> Tensor:
        return self.parent.part(start, stop)

    def of(self, value: Tensor) -> Tensor:
        """This view of what the parent has given back."""
        return value.as_strided(self.shape, self.stride, value.storage_offset() + self.offset)

    def leaves(self) -> Iterator[Kept]:
        return self.parent.leaves()


class Recipe(Kept):
    """A tensor rebuilt from others that are kept. ``function`` gets their values, each of them the recipe's own to
    overwrite when ``writes`` is set, and returns the tensor; its strides are made those that were saved. No function:
    the first parent itself, in these strides and this dtype. No name: what the first parent is called is what this is
    called, as its values are the same but for a scale. ``repeats``: the function is what the forward pass ran, so
    that parents of the same bits give a result of the same bits. ``linear``: of parents that are right on average it
    gives a result that is. ``samples``: which parents run along the samples, as the first one does; the function may
    then be called with some of these. ``elementwise``: it may be called with any run of values of its parents.
    ``moves``: it only moves values, whatever their dtype. ``at_once``: computes the tensor from the codes of the first
    parent, where a kernel can; see :data:`AtOnce`. ``half``: what a ReLU of it gives, where that is known already."""

    __slots__ = (
        "name",
        "function",
        "parents",
        "geometry",
        "writes",
        "repeats",
        "linear",
        "samples",
        "elementwise",
        "moves",
        "at_once",
        "half",
    )

    def __init__(
        self,
        name: str,
        function: Callable[..., Tensor] | None,
        parents: Sequence[Kept],
        like: Tensor,
        *,
        writes: bool = False,
        repeats: bool = False,
        linear: bool = False,
        samples: tuple[bool, ...] = (),
        elementwise: bool = False,
        moves: bool = False,
        at_once: AtOnce | None = None,
    ) -> None:
        self.name, self.function, self.parents, self.writes = name, function, tuple(parents), writes
        self.repeats, self.linear, self.samples, self.elementwise = repeats, linear, samples, elementwise
        self.moves, self.at_once = moves, at_once
        self.half: Masked | None = None
        self.geometry = Geometry(like)

    def of(self, parents: Sequence[Kept]) -> Recipe:
        """The same recipe of other parents."""
        made = copy.copy(self)
        made.parents = tuple(parents)
        return made

    @property
    def fresh(self) -> bool:  # type: ignore[override]
        return self.function is not None or self.parents[0].fresh

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.parents[0].kind if self.function is None or not self.name else f"recipe: {self.name}"

    @property
    def same_bits(self) -> bool:  # type: ignore[override]
        return self.repeats and all(parent.same_bits for parent in self.parents)

    def get(self) -> Tensor:
        geometry = self.geometry
        if self.function is None:
            source = self.parents[0]
            casts = geometry.dtype.itemsize == 2 and _dtype_of(source) == torch.float32
            return geometry.fit(source.get_as(geometry.dtype) if casts else source.get())
        flat = self.from_codes(geometry.dtype)
        if flat is not None:
            return geometry.from_flat(flat)
        values = [parent.get() for parent in self.parents]
        if self.writes and not (self.parents[0].fresh and fills_its_memory(values[0])):
            values[0] = values[0].clone()
        return geometry.fit(self._moved(values) if self.moves else self.function(*values))

    def _moved(self, values: list[Tensor]) -> Tensor:
        """Moved as they are: autocast would have a say in the dtype of what is joined."""
        assert self.function is not None
        if not torch._C._is_any_autocast_enabled():
            return self.function(*values)
        with torch.autocast(self.geometry.device.type, enabled=False):
            return self.function(*values)

    def get_as(self, dtype: torch.dtype) -> Tensor:
        geometry = self.geometry
        if geometry.dtype == torch.float32:  # what is rounded in between is rounded to no less
            if self.function is None:
                return geometry.fit(self.parents[0].get_as(dtype), dtype)
            if self.moves:
                return geometry.fit(self._moved([parent.get_as(dtype) for parent in self.parents]), dtype)
            flat = self.from_codes(dtype)
            if flat is not None:
                return geometry.from_flat(flat)
        return self.get().to(dtype)

    def from_codes(self, dtype: torch.dtype, mask: Mask | None = None, on: float = 1.0) -> Tensor | None:
        """The values in storage order and in a dtype, made of the first parent's codes in one pass; with a mask, times
        ``on`` where its bit is set and times 0 elsewhere. None where there is no kernel for it."""
        if self.at_once is None:
            return None
        source = self.parents[0]
        if type(source) is Recipe and source.widens:  # autocast had a normalisation read an fp32 copy
            source = source.parents[0]
        signs = False
        if mask is None and isinstance(source, Masked) and source.holds_signs and self.geometry.like(source.geometry):
            mask, signs = source.mask, True
            source = source.source
        if type(source) is not Quantized or probe.kept is source:  # what disturbs a tensor is not in its codes
            return None
        if not self.geometry.like(source.form) or not rebuild.may_be(source.form):
            return None
        packed = source.packed
        values = [parent.get() for parent in self.parents[1:]]
        return self.at_once(packed, values, dtype, None if mask is None else Masking(mask.codes, on, signs))

    @property
    def widens(self) -> bool:
        """Whether this is its parent's values in fp32, at the same places, which half precision goes into exactly."""
        form = self.parents[0].form
        exact = form is not None and form.dtype.is_floating_point and form.dtype.itemsize <= 2
        return self.function is None and exact and self.geometry.dtype == torch.float32 and self.geometry.like(form)

    @property
    def form(self) -> Geometry:
        return self.geometry

    @property
    def unit(self) -> int:
        if self.elementwise:
            return math.lcm(*(self._unit_of(parent) for parent in self.parents))
        if not self.samples:
            return 0
        units = [self._unit_of(self.parents[0]), self.geometry.per_sample]
        for parent, along in zip(self.parents[1:], self.samples[1:], strict=True):
            units.append((along and self._unit_of(parent)) or int(self._is_cheap(parent)))
        return math.lcm(*units)

    def _unit_of(self, parent: Kept) -> int:
        return parent.unit if parent.form is not None and self.geometry.like(parent.form) else 0

    def _is_cheap(self, parent: Kept) -> bool:
        """Whether a parent may be given back as a whole for each part."""
        form = parent.form
        small = form is not None and 16 * math.prod(form.shape) <= self.geometry.shape.numel()
        return small or type(parent) is Exact

    def part(self, start: int, stop: int) -> Tensor:
        assert self.function is not None
        if self.elementwise:
            value = self.function(*(parent.part(start, stop) for parent in self.parents))
            return value.to(self.geometry.dtype)
        geometry = self.geometry
        first, last = start // geometry.per_sample, stop // geometry.per_sample
        shape = (last - first, *geometry.shape[1:])
        values = []
        for parent, along in zip(self.parents, self.samples, strict=True):
            if along and self._unit_of(parent):
                values.append(parent.part(start, stop).as_strided(shape, geometry.stride))
            else:
                values.append(parent.get()[first:last] if along else parent.get())
        value = self.function(*values)
        if value.stride() != values[0].stride() or value.dtype != geometry.dtype:
            value = torch.empty_strided(shape, geometry.stride, dtype=geometry.dtype, device=value.device).copy_(value)
        return value.as_strided((stop - start,), (1,), value.storage_offset())

    def leaves(self) -> Iterator[Kept]:
        for parent in self.parents:
            yield from parent.leaves()


class Masked(Kept):
    """A kept tensor times ``on`` where a mask's bit is set and times ``off`` elsewhere: the output of a ReLU, or of
    dropout, or what was folded by the sign. No name: it is called what the tensor is called."""

    __slots__ = ("name", "source", "mask", "geometry", "on", "off")

    def __init__(self, name: str, source: Kept, mask: Mask, on: float, like: Tensor, off: float = 0.0) -> None:
        self.name, self.source, self.mask, self.on, self.off = name, source, mask, on, off
        self.geometry = Geometry(like)

    @property
    def kind(self) -> str:  # type: ignore[override]
        return f"recipe: {self.name}" if self.name else self.source.kind

    @property
    def holds_signs(self) -> bool:
        """Whether the mask says which of the source's values are negative, in the order of both."""
        return (self.on, self.off) == (1.0, -1.0) and self.geometry.like(self.mask.geometry)

    def get(self) -> Tensor:
        source, geometry = self.source, self.geometry
        plain = not self.off and geometry.like(self.mask.geometry)
        if plain and type(source) is Recipe and geometry.like(source.geometry):
            flat = source.from_codes(geometry.dtype, self.mask, self.on)
            if flat is not None:
                return geometry.from_flat(flat)
        value = self.source.get()
        if not (self.source.fresh and fills_its_memory(value)):
            value = value.clone()
        value = self.geometry.fit(value)
        mask = self.mask
        if value.stride() == mask.geometry.stride and value.shape == mask.geometry.shape:
            return codec.scale_by_mask_(value, mask.codes, self.on, self.off)
        return self._scaled(value, mask.get() != mask.off)

    def _scaled(self, value: Tensor, bits: Tensor) -> Tensor:
        return value.mul_(torch.where(bits, self.on, self.off)) if self.off else value.mul_(bits).mul_(self.on)

    @property
    def form(self) -> Geometry:
        return self.geometry

    @property
    def unit(self) -> int:
        form, geometry = self.source.form, self.geometry
        alike = form is not None and geometry.like(form) and geometry.like(self.mask.geometry)
        return self.source.unit if alike and form.dtype == geometry.dtype else 0

    def part(self, start: int, stop: int) -> Tensor:
        value, mask = self.source.part(start, stop), self.mask
        codes, before, after = codec.mask_part(mask.codes, mask.geometry.shape.numel(), start, stop)
        if not before and not after:
            return codec.scale_by_mask_(value, codes, self.on, self.off)
        bits = codec.unpack_mask(codes, before + stop - start + after)[before : before + stop - start]
        return self._scaled(value, bits)

    def leaves(self) -> Iterator[Kept]:
        yield from self.source.leaves()
        yield from self.mask.leaves()


class Rerun:
    """All that one operation saved, made again by running it on what was kept of its inputs.

    Attention must be differentiated at what was kept: with coded q and k, an exact logsumexp gives probabilities that
    do not sum to one. So output and logsumexp come from the same coded q, k, v that the backward formula reads.

    The values are held from the first request until each of the operation's own saves was handed out, or until the
    backward pass ends.
    """

    __slots__ = ("function", "parents", "owned", "_values", "_taken", "_lock", "__weakref__")

    def __init__(self, function: Callable[..., list[Tensor]], parents: Sequence[Kept], owned: int) -> None:
        self.function, self.parents, self.owned = function, tuple(parents), owned
        self._values: list[Tensor] | None = None
        self._taken: set[int] = set()
        self._lock = threading.RLock()

    def take(self, index: int, own: bool) -> Tensor:
        if probe.values is not None:
            if id(self) not in probe.values:
                probe.values[id(self)] = self._run()
            return probe.values[id(self)][index]
        with self._lock:
            values = self._values
            if values is None:
                values = self._run()
                if at_end_of_backward(self.clear):
                    self._values = values
            value = values[index]
            if own:
                self._taken.add(index)
                if len(self._taken) == self.owned:
                    self.clear()
            return value

    def _run(self) -> list[Tensor]:
        """Its parents are views of one tensor as a rule, the projection to q, k and v, which is rebuilt once."""
        wholes: dict[int, Tensor] = {}
        values = []
        for parent in self.parents:
            if type(parent) is not View:
                values.append(parent.get())
                continue
            whole = wholes.get(id(parent.parent))
            if whole is None:
                whole = wholes[id(parent.parent)] = parent.parent.get()
            values.append(parent.of(whole))
        return self.function(*values)

    def clear(self) -> None:
        with self._lock:
            self._values = None
            self._taken = set()

    def __reduce__(self) -> Any:
        raise TypeError("a rerun lives with its autograd graph and cannot be pickled")


class Rerunnable(Kept):
    """One of the tensors a :class:`Rerun` gives back; ``own`` where the operation itself saved it."""

    __slots__ = ("group", "index", "own")
    kind = "recipe: rerun"
    fresh = False

    def __init__(self, group: Rerun, index: int, own: bool) -> None:
        self.group, self.index, self.own = group, index, own

    def get(self) -> Tensor:
        return self.group.take(self.index, self.own)

    def leaves(self) -> Iterator[Kept]:
        for parent in self.group.parents:
            yield from parent.leaves()
