"""Have I kept this tensor already?

Keyed by storage, version and view. A storage is followed by a weak reference, whose control block keeps its address
from being used again, for as long as the registry lives: one forward pass.

All of this is asked several times for every operation, so lookups are few and plain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_actnn.saving.kept import Exact, Kept, fills_its_memory
from hf_actnn.saving.recipes import View
from hf_actnn.saving.sharded import parameter_of

LAST, SAMPLE = "last", "sample"
_NEVER = -1


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Layout:
    """The dense tensor that first filled a storage: the shape in which its rows are known."""

    __slots__ = ("shape", "stride", "offset", "dtype", "rows", "numel")

    def __init__(self, tensor: Tensor, rows: str | None) -> None:
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        self.offset, self.numel = int(tensor.storage_offset()), tensor.numel()
        self.rows = rows

    def is_of(self, tensor: Tensor) -> bool:
        """Whether a tensor of this storage is the very one that filled it."""
        return (
            tensor.shape == self.shape
            and tensor.stride() == self.stride
            and tensor.storage_offset() == self.offset
            and tensor.dtype == self.dtype
        )

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor of this storage and dtype lies within the memory of the one that filled it."""
        start = int(tensor.storage_offset()) - self.offset
        if start < 0:
            return False
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.numel() == 0 or start + last < self.numel


class _Entry:
    """What is known of one storage.

    Attributes:
        version: that the storage had.
        layout: None where no dense tensor filled it.
        own: gives the layout's tensor back.
        whole: gives it back, or the same values in the same memory in another shape.
        views: (offset, shape, strides, dtype) -> what gives back that view of the storage.
        derived: version at which it was computed from parameters and constants alone.
        differentiated: an operation of the graph made it.
        held: some of it is kept by reference.
        closed: nothing is trusted any more.
    """

    __slots__ = ("version", "layout", "own", "whole", "views", "derived", "differentiated", "held", "closed")

    def __init__(self, version: int) -> None:
        self.version = version
        self.layout: Layout | None = None
        self.own: Kept | None = None
        self.whole: Kept | None = None
        self.views: dict[tuple, Kept] | None = None
        self.derived = _NEVER
        self.differentiated = self.held = self.closed = False

    def forget(self) -> None:
        self.own = self.whole = self.views = None


def _view_key(tensor: Tensor) -> tuple:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


class Registry:
    """What one forward pass knows of the tensors it has seen. :meth:`release` it at the end.

    Args:
        weights: storages of parameters and buffers; alive as long as the model.
        sharded: whether parameters are gathered for the time that their module runs, as `fully_shard` does: they then
            come to be known while the forward pass runs, and their memory is empty in between.
    """

    def __init__(self, weights: set[int], sharded: bool = False) -> None:
        self._entries: dict[int, _Entry] = {}  # by storage; each key is a weak reference too
        self._weights = weights
        self._references: dict[int, Exact] = {}
        self._copies: dict[tuple, Exact] = {}
        self.sharded = sharded

    def release(self) -> None:
        """Let the storages' addresses be used again; nothing is known afterwards."""
        entries, self._entries = self._entries, {}
        for weak in entries:
            torch.UntypedStorage._free_weak_ref(weak)

    def __del__(self) -> None:
        if self._entries:
            self.release()

    # -- parameters, buffers, and what is computed from them alone ----------------------------------------------------

    def is_weight(self, tensor: Tensor) -> bool:
        key = tensor.untyped_storage()._cdata
        if key in self._weights:
            return True
        entry = self._entries.get(key)
        return entry is not None and entry.derived == tensor._version  # since written to: it may hold anything

    def is_stored_weight(self, tensor: Tensor) -> bool:
        """Whether the bytes belong to the model itself."""
        return tensor.untyped_storage()._cdata in self._weights

    def gathered(self, parameter: torch.nn.Parameter) -> bool:
        """Take note of a parameter that an operation is given. Whether it was not known yet."""
        key = storage_key(parameter)
        if key in self._weights:
            return False
        self._weights.add(key)
        return True

    def reference(self, weight: Tensor, where: str) -> Exact:
        """A parameter or buffer by reference, one for all that save it."""
        if self.sharded and weight.numel() == max(weight.shape, default=1) and parameter_of(weight) is not None:
            return self._copy(weight, where)
        kept = self._references.get(id(weight))  # which the kept tensor keeps from being used again
        if kept is None or kept.tensor is not weight or kept.version != weight._version:
            kept = Exact(weight, parameter=True, where=where)
            if kept.tensor is weight:
                self._references[id(weight)] = kept
        return kept

    def _copy(self, weight: Tensor, where: str) -> Exact:
        """A copy of a parameter that is a vector, one for all that save it.

        A recipe may be asked for while the module that gave it this parameter has it scattered over the processes: the
        normalisation before a linear layer, each gathered for itself. A vector's copy costs next to nothing.
        """
        key = (storage_key(weight), weight._version, *_view_key(weight))
        kept = self._copies.get(key)
        if kept is None:
            kept = self._copies[key] = Exact(weight.detach().clone(), where=where)
        return kept

    def mark_derived(self, tensor: Tensor) -> None:
        if tensor.untyped_storage()._cdata not in self._weights:
            self._entry(tensor).derived = tensor._version

    # -- data --------------------------------------------------------------------------------------------------------

    def _entry(self, tensor: Tensor) -> _Entry:
        storage = tensor.untyped_storage()
        entry = self._entries.get(storage._cdata)
        if entry is None:
            entry = _Entry(tensor._version)
            self._entries[storage._weak_ref()] = entry  # type: ignore[index]
        elif entry.version != tensor._version:
            # Written in place since: what was kept holds the old values.
            entry.version = tensor._version
            entry.forget()
        return entry

    def close(self, tensor: Tensor) -> None:
        """Trust nothing about this memory any more: ``tensor.data`` was read, and writes through it are not counted."""
        entry = self._entry(tensor)
        entry.forget()
        entry.layout, entry.closed = None, True

    def produced(self, tensor: Tensor, rows: str | None, differentiated: bool = False) -> None:
        """Note the shape in which an operation made a tensor, before views of it are saved."""
        entry = self._entry(tensor)
        if differentiated:
            entry.differentiated = True
        if entry.layout is None and not entry.closed and fills_its_memory(tensor):
            entry.layout = Layout(tensor, rows)

    def is_differentiated(self, tensor: Tensor) -> bool:
        """Whether a tensor is of the memory of one that an operation of the graph made."""
        entry = self._entries.get(storage_key(tensor))
        return entry is not None and entry.differentiated

    def is_held(self, key: int) -> bool:
        """Whether a storage is held for the backward pass anyway."""
        entry = self._entries.get(key)
        return entry is not None and entry.held

    def layout(self, tensor: Tensor) -> Layout | None:
        """The layout this tensor is a view of, if it is known and of the tensor's dtype."""
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        if entry is None or entry.layout is None or entry.layout.dtype != tensor.dtype:
            return None
        return entry.layout if entry.layout.holds(tensor) else None

    def rows(self, tensor: Tensor) -> str | None:
        """How the rows of a tensor's storage run, where its producer said so."""
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        return None if entry is None or entry.layout is None else entry.layout.rows

    def find(self, tensor: Tensor) -> Kept | None:
        """What gives this very tensor back, if it is kept already in whatever view."""
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        if entry is None or entry.version != tensor._version:
            return None
        layout, views, whole = entry.layout, entry.views, entry.whole
        if views is None and whole is None:
            return None
        if layout is not None and layout.is_of(tensor):
            if entry.own is None and whole is not None:
                entry.own = View(whole, layout.shape, layout.stride, 0)
            return entry.own
        key = _view_key(tensor)
        kept = None if views is None else views.get(key)
        if kept is not None or whole is None or layout is None or layout.dtype != tensor.dtype:
            return kept
        if not layout.holds(tensor):
            return None  # another part of the storage
        kept = View(whole, tensor.shape, tensor.stride(), int(tensor.storage_offset()) - layout.offset)
        if views is None:
            views = entry.views = {}
        views[key] = kept
        return kept

    def learn(self, tensor: Tensor, kept: Kept, rows: str | None = None) -> None:
        """Remember that ``kept`` gives ``tensor`` back."""
        entry = self._entry(tensor)
        if entry.closed:
            return
        if type(kept) is Exact:
            entry.held = True
        dense = fills_its_memory(tensor)
        layout = entry.layout
        if layout is None and dense:
            layout = entry.layout = Layout(tensor, rows)
        if layout is not None and layout.is_of(tensor):
            entry.own = entry.whole = kept
            return
        if entry.views is None:
            entry.views = {}
        entry.views[_view_key(tensor)] = kept
        if (
            dense
            and layout is not None
            and layout.numel == tensor.numel()
            and layout.dtype == tensor.dtype
            and layout.offset == tensor.storage_offset()
        ):
            entry.whole = kept
