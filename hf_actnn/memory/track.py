"""Count every byte that autograd holds for the backward pass, of plain and of converted models."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from hf_actnn.errors import ConversionError, message
from hf_actnn.nn.mixin import membership
from hf_actnn.saving import boundaries, scope
from hf_actnn.saving.call import Slot
from hf_actnn.saving.identity import storage_key
from hf_actnn.saving.kept import Exact, Leaf
from hf_actnn.saving.sharded import parameter_of


class MemoryReport:
    """Bytes held for the backward pass; filled while the context is open, readable for ever after.

    Attributes:
        saved_bytes: the most that was held at one time: packed codes, metadata and exact tensors, each storage once;
            parameters and buffers of the model excluded, and so is what was on the host alone.
        swapped_bytes: the most that was on the host alone at one time; 0 where nothing is swapped.
        checkpoint_bytes: the most that gradient checkpoints held at one time of what they will run again from, other
            saves of the same tensors included; a part of ``saved_bytes``.
        uncompressed_bytes: the same for the tensors as autograd meant to save them.
        by_module: module path -> (bytes held, bytes uncompressed), each storage at the module that saved it first;
            swapped or not.
        allocated_bytes, reserved_bytes: what tensors have, and what torch has taken from the driver, on the CUDA
            devices of the model: when the context was left, or now while it is open. None for a model that is on none.
        unused_bytes: their difference: reserved, and in no tensor.
    """

    def __init__(self, own: set[int], devices: Iterable[torch.device] = ()) -> None:
        self.saved_bytes = 0
        self.swapped_bytes = 0
        self.checkpoint_bytes = 0
        self.uncompressed_bytes = 0
        self._held = self._held_raw = self._away = 0
        #: Bytes that checkpoints hold, by the keys of their holders.
        self._at_checkpoints: dict[Any, int] = {}
        self._devices = [device for device in devices if device.type == "cuda"]
        self._at_end: tuple[int, int] | None = None
        self._own = own
        self._by_module: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self._holders: dict[Any, int] = {}
        self._raw: dict[int, tuple[StorageWeakRef, int]] = {}
        #: How to stop counting a leaf that may be swapped: where it is now.
        self._places: weakref.WeakKeyDictionary[Leaf, Any] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()

    @property
    def ratio(self) -> float:
        """How many times fewer bytes are held than autograd meant to."""
        return self.uncompressed_bytes / self.saved_bytes if self.saved_bytes else 1.0

    @property
    def allocated_bytes(self) -> int | None:
        found = self._of_allocator()
        return None if found is None else found[0]

    @property
    def reserved_bytes(self) -> int | None:
        found = self._of_allocator()
        return None if found is None else found[1]

    @property
    def unused_bytes(self) -> int | None:
        found = self._of_allocator()
        return None if found is None else found[1] - found[0]

    def _of_allocator(self) -> tuple[int, int] | None:
        if self._at_end is not None or not self._devices:
            return self._at_end
        allocated = sum(torch.cuda.memory_allocated(device) for device in self._devices)
        return allocated, sum(torch.cuda.memory_reserved(device) for device in self._devices)

    def close(self) -> None:
        """The context is left."""
        self._at_end = self._of_allocator()

    @property
    def by_module(self) -> dict[str, tuple[int, int]]:
        return {path: (held, raw) for path, (held, raw) in self._by_module.items()}

    def __str__(self) -> str:
        rows = sorted(self.by_module.items(), key=lambda item: -item[1][1])
        width = max([len("(model)"), *(len(path) for path, _ in rows)])
        lines = [f"{'module'.ljust(width)}  {'held MB':>10}  {'plain MB':>10}  {'ratio':>6}"]
        lines += [
            f"{(path or '(model)').ljust(width)}  {held / 1e6:10.3f}  {raw / 1e6:10.3f}  "
            f"{raw / held if held else float('inf'):6.1f}"
            for path, (held, raw) in rows
        ]
        lines.append(
            f"{'total'.ljust(width)}  {self.saved_bytes / 1e6:10.3f}  {self.uncompressed_bytes / 1e6:10.3f}  "
            f"{self.ratio:6.1f}"
        )
        if self.checkpoint_bytes:
            lines.append(f"{'of checkpoints'.ljust(width)}  {self.checkpoint_bytes / 1e6:10.3f}")
        if self.swapped_bytes:
            lines.append(f"{'on the host'.ljust(width)}  {self.swapped_bytes / 1e6:10.3f}")
        found = self._of_allocator()
        if found is not None:
            allocated, reserved = (nbytes / 1e6 for nbytes in found)
            lines.append(
                f"the device's allocator: {allocated:.3f} MB allocated, {reserved:.3f} MB reserved, "
                f"{reserved - allocated:.3f} MB of them unused"
            )
        return "\n".join(lines)

    # -- counting ------------------------------------------------------------------------------------------------------

    def saved(self, slot: Slot, tensor: Tensor, path: str, function: str) -> None:
        """One save of a converted model was decided on."""
        with self._lock:
            self._count_raw(tensor, path, slot)
            kept = slot.kept
            assert kept is not None
            for leaf in kept.leaves():
                if isinstance(leaf, Leaf) and leaf.swapped is not None:
                    continue  # counted when it was decided on; `moved` tells what became of it
                if isinstance(leaf, Exact):
                    if not leaf.parameter:
                        self._count_storage(leaf.tensor, path, leaf, function)
                elif leaf.nbytes:
                    self._hold(("leaf", id(leaf)), leaf.nbytes, path, leaf, function)

    def moved(self, leaf: Leaf, to_host: bool) -> None:
        """What a leaf holds left the device, or came back."""
        with self._lock:
            let_go = self._places.pop(leaf, None)
            if let_go is None:
                return  # kept before this report began
            let_go()
            if to_host:
                self._away += leaf.nbytes
                self.swapped_bytes = max(self.swapped_bytes, self._away)
                self._places[leaf] = weakref.finalize(leaf, self._let_go_away, leaf.nbytes)
                self._places[leaf].atexit = False
            else:
                self._hold(("leaf", id(leaf)), leaf.nbytes, None, leaf)

    def _let_go_away(self, nbytes: int) -> None:
        with self._lock:
            self._away -= nbytes

    def copied(self, kept: Exact, path: str) -> None:
        """A tensor that recipes read was copied before it was written to."""
        with self._lock:
            self._count_storage(kept.tensor, path, kept)

    def saved_plain(self, tensor: Tensor, path: str, holder: Any, function: str) -> None:
        """One save that autograd keeps as it is."""
        with self._lock:
            self._count_raw(tensor, path, holder)
            self._count_storage(tensor, path, holder, function)

    def _is_own(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory is a parameter's or a buffer's: also a parameter's that is gathered from shards."""
        return storage_key(tensor) in self._own or parameter_of(tensor) is not None

    def _count_storage(self, tensor: Tensor, path: str, holder: Any, function: str = "") -> None:
        storage = tensor.untyped_storage()
        if not self._is_own(tensor):
            self._hold(("storage", storage._cdata), storage.nbytes(), path, holder, function)

    def _hold(self, key: Any, nbytes: int, path: str | None, holder: Any, function: str = "") -> None:
        """Count bytes once while any of their holders lives; at a module, if they are new."""
        if function == boundaries.NAME:
            self._at_checkpoints[key] = nbytes
            self.checkpoint_bytes = max(self.checkpoint_bytes, sum(self._at_checkpoints.values()))
        count = self._holders.get(key, 0)
        if count == 0:
            self._held += nbytes
            if path is not None:
                self._by_module[path][0] += nbytes
            self.saved_bytes = max(self.saved_bytes, self._held)
        self._holders[key] = count + 1
        if key[0] == "leaf" and count:
            self._holders[key] = count  # the leaf itself is the holder, however many saves it stands behind
            return
        let_go = weakref.finalize(holder, self._let_go, key, nbytes)
        let_go.atexit = False
        if isinstance(holder, Leaf):
            self._places[holder] = let_go

    def _let_go(self, key: Any, nbytes: int) -> None:
        with self._lock:
            self._holders[key] -= 1
            if self._holders[key] == 0:
                del self._holders[key]
                self._at_checkpoints.pop(key, None)
                self._held -= nbytes

    def _count_raw(self, tensor: Tensor, path: str, holder: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if self._is_own(tensor):
            return
        raw = self._raw.get(key)
        if raw is None:
            # The weak reference keeps the address from being given to another storage while this one is counted.
            nbytes = storage.nbytes()
            self._raw[key] = (StorageWeakRef(storage), 1)
            self._held_raw += nbytes
            self._by_module[path][1] += nbytes
            self.uncompressed_bytes = max(self.uncompressed_bytes, self._held_raw)
        else:
            nbytes = storage.nbytes()
            self._raw[key] = (raw[0], raw[1] + 1)
        weakref.finalize(holder, self._let_go_raw, key, nbytes).atexit = False

    def _let_go_raw(self, key: int, nbytes: int) -> None:
        with self._lock:
            weak, count = self._raw[key]
            if count == 1:
                del self._raw[key]
                self._held_raw -= nbytes
            else:
                self._raw[key] = (weak, count - 1)


def own_storages(model: nn.Module) -> set[int]:
    """The storages of a model's parameters and buffers, as the keys that `MemoryReport` does not count. Sparse tensors
    have none."""
    return {
        tensor.untyped_storage()._cdata
        for tensor in [*model.parameters(), *model.buffers()]
        if tensor.layout == torch.strided
    }


class _Plain:
    """A saved tensor of a plain model or of code outside the model, as autograd would hold it."""

    __slots__ = ("exact", "__weakref__")

    def __init__(self, tensor: Tensor) -> None:
        self.exact = Exact(tensor, where="a tensor saved under track_memory")


@contextmanager
def track_memory(model: nn.Module) -> Iterator[MemoryReport]:
    """Count what autograd holds for the backward pass while the context is open.

    Args:
        model: plain or converted. What is saved outside it (a loss, say) is counted too, under the path ``""``.

    Yields:
        The report. Its figures are maxima over time, so they may be read before or after ``backward()``.

    Note:
        What is saved inside a gradient checkpoint is not seen: nothing is held there until it recomputes. What the
        checkpoint itself holds, the arguments of its function, is.
        On a plain model the tensors are counted by saved-tensor hooks, which makes the step a little slower.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(
            message(
                "there is no memory to track",
                expected="a torch.nn.Module",
                received=type(model).__name__,
                next_step="Pass the model",
            )
        )
    memory = MemoryReport(own_storages(model), {tensor.device for tensor in [*model.parameters(), *model.buffers()]})
    stack: list[str] = [""]
    handles = []
    for path, module in model.named_modules():
        if membership(module) is None:
            handles.append(module.register_forward_pre_hook(_entering(stack, path)))
            handles.append(module.register_forward_hook(_leaving(stack), always_call=True))

    def pack(tensor: Tensor) -> _Plain:
        plain = _Plain(tensor)
        memory.saved_plain(tensor, stack[-1], plain, boundaries.NAME if boundaries.is_saving() else "")
        return plain

    watching = scope.observers()
    watching.append(memory)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda plain: plain.exact.get()):
            yield memory
    finally:
        watching.remove(memory)
        memory.close()
        for handle in handles:
            handle.remove()


def _entering(stack: list[str], path: str) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        stack.append(path)

    return hook


def _leaving(stack: list[str]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if len(stack) > 1:
            stack.pop()

    return hook
