"""A device for `saving.swap` on a CPU: what copies in the background may do wrong, it does, and every hazard raises.

The stream that computes runs at once, as a CPU does. The stream that copies runs as late as it may: a copy is made
when somebody waits for its event, or at random before. Clocks tell what each stream knows of the others, so that a wait
that is missing is noticed even where the copy happens to have been made in time. Device and host memory is handed out
full of rubbish. Copies hold no reference to what they read and write, as those of a GPU do not.
"""

from __future__ import annotations

import random
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

SIDE = "side"
RUBBISH = 0xA5


class Hazard(AssertionError):
    """A real device could have computed something else."""


class _Memory:
    """The memory of a tensor, without keeping it."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage, self.tensor = StorageWeakRef(tensor.untyped_storage()), weakref.ref(tensor)
        self.is_part = tensor.nbytes < tensor.untyped_storage().nbytes()
        self.form = tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()

    @property
    def is_gone(self) -> bool:
        """Someone else may have it: the storage was freed, or the block of an arena whose tensor died."""
        return self.storage.expired() or (self.is_part and self.tensor() is None)

    def view(self) -> Tensor:
        dtype, *place = self.form
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=dtype).set_(storage, *place)


class _Copy:
    def __init__(self, tick: int, device: _Memory, host: Tensor, out: bool) -> None:
        self.tick, self.device, self.host, self.out, self.done = tick, device, host, out, False

    def run(self) -> None:
        if self.device.is_gone:
            raise Hazard(f"memory was let go before the copy {'out of' if self.out else 'into'} it was made")
        if self.out:
            self.host.copy_(self.device.view())
        else:
            self.device.view().copy_(self.host)
        self.done = True


class SimulatedEngine:
    """`swap.Engine` for CPU tensors.

    Args:
        eagerness: how likely the copies that wait are made at any call.
        pinnable: bytes of host memory there are.
    """

    side = SIDE

    def __init__(self, seed: int = 0, eagerness: float = 0.1, pinnable: int = 2**40) -> None:
        self.device = torch.device("cpu")
        self.stream = "compute"  # what `current` says; a test may change it
        self._random, self._eagerness, self._pinnable = random.Random(seed), eagerness, pinnable
        self._clocks: dict[str, dict[str, int]] = {}
        self._copies: list[_Copy] = []  # those that are not made, or that a stream does not know to be
        self._slabs: list[Tensor] = []
        self._writers: dict[tuple[int, int], Any] = {}  # bytes of the host -> who wrote them last
        self.bytes_out = self.bytes_in = 0

    # -- the protocol ------------------------------------------------------------------------------------------------

    def current(self) -> str:
        self._tick(self.stream)
        self._look()
        return self.stream

    def record(self, stream: str) -> dict[str, int]:
        self._look()
        return dict(self._clock(stream))

    def wait(self, stream: str, event: dict[str, int]) -> None:
        self._look()
        clock = self._clock(stream)
        for other, tick in event.items():
            clock[other] = max(clock.get(other, 0), tick)
        if stream != SIDE:
            self._run_until(clock.get(SIDE, 0))

    def empty(self, like: Tensor) -> Tensor:
        self._tick(self.stream)
        tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        tensor.untyped_storage().fill_(RUBBISH)
        return tensor

    def pinned(self, nbytes: int) -> Tensor:
        self._pinnable -= nbytes
        if self._pinnable < 0:
            raise RuntimeError("CUDA error: out of memory")
        slab = torch.full((nbytes,), RUBBISH, dtype=torch.uint8)
        self._slabs.append(slab)
        return slab

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._look()
        if torch.is_grad_enabled() and source.requires_grad:
            raise Hazard("autograd would record a copy, and hold what it was made of")
        if self._clock(SIDE).get(self.stream, 0) < self._clock(self.stream).get(self.stream, 0):
            raise Hazard("a copy may begin before what the stream that computes did with this memory")
        out = self._is_host(target)
        host, device = (target, source) if out else (source, target)
        assert self._is_host(host) and not self._is_host(device)
        if out:
            self._write(host)
            self.bytes_out += host.nbytes
        else:
            self._check_content(host)
            self.bytes_in += host.nbytes
        self._copies.append(_Copy(self._tick(SIDE), _Memory(device), host, out))

    # -- checks --------------------------------------------------------------------------------------------------------

    def check_readable(self, tensors: tuple[Tensor, ...]) -> None:
        """The current stream is about to read these."""
        knows = self._clock(self.stream).get(SIDE, 0)
        for tensor in tensors:
            for copy in self._copies:
                if not copy.out and copy.device.tensor() is tensor and copy.tick > knows:
                    raise Hazard("a tensor is read before it has arrived")

    def check_writable(self, tensor: Tensor) -> None:
        """The current stream is about to write to this."""
        knows = self._clock(self.stream).get(SIDE, 0)
        for copy in self._copies:
            if copy.out and copy.device.storage.cdata == tensor.untyped_storage()._cdata and copy.tick > knows:
                raise Hazard("a tensor is written to while it is copied")

    def finish(self) -> None:
        """All copies are made; whatever was wrong shows by now."""
        self._look()
        self._run_until(self._clock(SIDE).get(SIDE, 0))

    def _look(self) -> None:
        """Whether memory was let go that a copy, for all that the streams that compute know, is still to read."""
        known = max((clock.get(SIDE, 0) for name, clock in self._clocks.items() if name != SIDE), default=0)
        self._copies = [copy for copy in self._copies if not copy.done or copy.tick > known]
        for copy in self._copies:
            if copy.device.is_gone:
                raise Hazard(
                    f"memory was let go before the copy {'out of' if copy.out else 'into'} it is known to be made"
                )
        if self._random.random() < self._eagerness and self._copies:
            self._run_until(self._random.choice(self._copies).tick)

    def _run_until(self, tick: int) -> None:
        for copy in self._copies:
            if copy.tick <= tick and not copy.done:
                copy.run()

    def _write(self, host: Tensor) -> None:
        begin, end = host.data_ptr(), host.data_ptr() + host.nbytes
        self._writers = {place: who for place, who in self._writers.items() if place[1] <= begin or end <= place[0]}
        self._writers[begin, end] = weakref.ref(host)

    def _check_content(self, host: Tensor) -> None:
        writer = self._writers.get((host.data_ptr(), host.data_ptr() + host.nbytes))
        if writer is None or writer() is not host:
            raise Hazard("room on the host was used again while its leaf lived")

    def _is_host(self, tensor: Tensor) -> bool:
        return any(slab.data_ptr() <= tensor.data_ptr() < slab.data_ptr() + slab.nbytes for slab in self._slabs)

    def _clock(self, stream: str) -> dict[str, int]:
        return self._clocks.setdefault(stream, {})

    def _tick(self, stream: str) -> int:
        clock = self._clock(stream)
        clock[stream] = clock.get(stream, 0) + 1
        return clock[stream]
