"""Have I kept this tensor already?

Keyed by storage, version and view. A storage is followed by a weak reference, whose control block keeps its address
from being used again, for as long as the registry lives: one forward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hf_actnn.saving.kept import Exact, Kept, View, fills_its_memory

LAST, SAMPLE = "last", "sample"


class Layout(NamedTuple):
    """The dense tensor that first filled a storage: the shape in which its rows are known."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    rows: str | None

    @property
    def numel(self) -> int:
        return self.shape.numel()


class _Entry:
    __slots__ = ("weak", "version", "layout", "whole", "known", "closed", "differentiated", "held")

    def __init__(self, weak: StorageWeakRef, version: int) -> None:
        self.weak = weak
        self.version = version
        self.layout: Layout | None = None
        self.whole: Kept | None = None
        self.known: dict[tuple, Kept] = {}
        self.closed = False
        self.differentiated = False  # an operation that is differentiated made it
        self.held = False  # some of it is kept by reference


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _view_key(tensor: Tensor) -> tuple:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


class Registry:
    """What one forward pass knows of the tensors it has seen."""

    def __init__(self, weights: set[int]) -> None:
        self._entries: dict[int, _Entry] = {}
        self._weights = weights  # storages of parameters and buffers; alive as long as the model
        self._derived: dict[int, tuple[StorageWeakRef, int]] = {}
        self._references: dict[int, Exact] = {}

    # -- parameters, buffers, and what is computed from them alone ----------------------------------------------------

    def is_weight(self, tensor: Tensor) -> bool:
        key = storage_key(tensor)
        if key in self._weights:
            return True
        derived = self._derived.get(key)
        return derived is not None and derived[1] == tensor._version  # since written to: it may hold anything

    def is_stored_weight(self, tensor: Tensor) -> bool:
        """Whether the bytes belong to the model itself."""
        return storage_key(tensor) in self._weights

    def reference(self, weight: Tensor, where: str) -> Exact:
        """A parameter or buffer by reference, one for all that save it."""
        kept = self._references.get(id(weight))  # which the kept tensor keeps from being used again
        if kept is None or kept.tensor is not weight or kept.version != weight._version:
            kept = Exact(weight, parameter=True, where=where)
            if kept.tensor is weight:
                self._references[id(weight)] = kept
        return kept

    def mark_derived(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self._derived[storage._cdata] = (StorageWeakRef(storage), tensor._version)

    # -- data --------------------------------------------------------------------------------------------------------

    def _entry(self, tensor: Tensor) -> _Entry:
        storage = tensor.untyped_storage()
        entry = self._entries.get(storage._cdata)
        if entry is None:
            entry = self._entries[storage._cdata] = _Entry(StorageWeakRef(storage), tensor._version)
        elif entry.version != tensor._version:
            # Written in place since: what was kept holds the old values.
            entry.version, entry.whole, entry.known = tensor._version, None, {}
        return entry

    def close(self, tensor: Tensor) -> None:
        """Trust nothing about this memory any more: ``tensor.data`` was read, and writes through it are not counted."""
        entry = self._entry(tensor)
        entry.layout, entry.whole, entry.known, entry.closed = None, None, {}, True

    def produced(self, tensor: Tensor, rows: str | None, differentiated: bool = False) -> None:
        """Note the shape in which an operation made a tensor, before views of it are saved."""
        entry = self._entry(tensor)
        entry.differentiated |= differentiated
        if entry.layout is None and not entry.closed and fills_its_memory(tensor):
            entry.layout = Layout(tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype, rows)

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
        entry = self._entries.get(storage_key(tensor))
        if entry is None or entry.layout is None or entry.layout.dtype != tensor.dtype:
            return None
        return entry.layout

    def rows(self, tensor: Tensor) -> str | None:
        """How the rows of a tensor's storage run, where its producer said so."""
        entry = self._entries.get(storage_key(tensor))
        return entry.layout.rows if entry is not None and entry.layout is not None else None

    def find(self, tensor: Tensor) -> Kept | None:
        """What gives this very tensor back, if it is kept already in whatever view."""
        entry = self._entries.get(storage_key(tensor))
        if entry is None or entry.version != tensor._version:
            return None
        kept = entry.known.get(_view_key(tensor))
        if kept is not None:
            return kept
        layout = entry.layout
        if entry.whole is None or layout is None or layout.dtype != tensor.dtype:
            return None
        kept = View(entry.whole, tensor.shape, tensor.stride(), int(tensor.storage_offset()) - layout.offset)
        entry.known[_view_key(tensor)] = kept
        return kept

    def learn(self, tensor: Tensor, kept: Kept, rows: str | None = None) -> None:
        """Remember that ``kept`` gives ``tensor`` back."""
        entry = self._entry(tensor)
        if entry.closed:
            return
        if isinstance(kept, Exact):
            entry.held = True
        if entry.layout is None and fills_its_memory(tensor):
            entry.layout = Layout(tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype, rows)
        entry.known[_view_key(tensor)] = kept
        layout = entry.layout
        if (
            layout is not None
            and layout.numel == tensor.numel()
            and layout.dtype == tensor.dtype
            and (layout.offset == tensor.storage_offset() and fills_its_memory(tensor))
        ):
            entry.whole = kept
