"""An independent count of what a forward pass leaves behind: weak references to every storage it made."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class StorageCount(TorchDispatchMode):
    """Follows every storage that an operator returns while it is on.

    Args:
        model: its parameters and buffers are not counted.
        inputs: nor are these.
    """

    def __init__(self, model: nn.Module, *inputs: Tensor) -> None:
        super().__init__()
        self._ignored = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers(), *inputs]}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._ignored and storage._cdata not in self._made:
            # The weak reference keeps the address from being given to another storage.
            self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def alive(self, *excluded: Tensor) -> int:
        """Bytes of the storages that still live, but for those of some tensors (outputs that the test itself holds)."""
        without = {tensor.untyped_storage()._cdata for tensor in excluded}
        return sum(nbytes for key, (weak, nbytes) in self._made.items() if key not in without and not weak.expired())
