"""What is kept goes to pinned host memory while the forward pass goes on, and comes back ahead of need.

A leaf's tensors are copied to the host on a stream of their own as soon as the leaf is decided on. The tensors on the
device are let go in the order in which they were packed, once more than so many bytes wait: the stream that computes is
first made to wait for the copy, so that whoever gets the memory next cannot overwrite what is still being read. The
host waits for nothing. On the way back the memory is allocated on the stream that computes, the copy waits for what
that stream did before, and the stream waits for the copy when the leaf is asked for.

Which leaf is asked for after which is learnt: each forward pass numbers its leaves, and notes the order in which their
numbers were asked for; the next pass of the same module fetches in this order, some bytes ahead. In the first step
there is no order, and all is fetched on demand.

What comes back stays on the device until its leaf dies or until others were used more recently: a graph that is kept
for another backward pass does not pull everything back for good. The copy on the host stays as it is until the leaf
dies.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_actnn.codec import arena, buffers
from hf_actnn.errors import ActNNWarning, NotAvailableError, message
from hf_actnn.saving.kept import Exact, Leaf
from hf_actnn.saving.replays import is_capturing


class Bounds(NamedTuple):
    """How much is where.

    Attributes:
        smallest: leaves of fewer bytes stay on the device: a copy of them takes longer to start than to make.
        pending: bytes that may lie on the device although they are meant to leave it.
        ahead: bytes fetched and not asked for yet.
        recent: bytes fetched and asked for that stay on the device.
        slab: bytes of pinned memory asked for at a time, a power of two: torch rounds up to one.
        host: the most pinned memory of one device of one model; None for :func:`host_limit`, which all share.
    """

    smallest: int = 64 * 2**10
    pending: int = 256 * 2**20
    ahead: int = 256 * 2**20
    recent: int = 128 * 2**20
    slab: int = 64 * 2**20
    host: int | None = None


BOUNDS = Bounds()


# -- the device ----------------------------------------------------------------------------------------------------


class Engine(Protocol):
    """Streams, events and memory of one device; the only part that knows CUDA. Streams compare equal if they are the
    same; an event stands for everything its stream was given before."""

    device: torch.device
    #: The stream that copies.
    side: Any

    def current(self) -> Any:
        """The stream that computes, as this thread has it now."""
        ...

    def record(self, stream: Any) -> Any:
        """An event of what the stream was given so far."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """What the stream is given from here on begins after the event."""
        ...

    def empty(self, like: Tensor) -> Tensor:
        """Memory of the device for a tensor of the sizes of ``like``, on the current stream."""
        ...

    def pinned(self, nbytes: int) -> Tensor:
        """``[nbytes]`` uint8 of host memory that copies may run to and from. A ``RuntimeError`` if there is none."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy on the side stream, without waiting for it."""
        ...


class CudaEngine:
    """:class:`Engine` of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        return stream.record_event()

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def empty(self, like: Tensor) -> Tensor:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self.device)

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.side):
            target.copy_(source, non_blocking=True)


def engine_for(device: torch.device) -> Engine | None:
    """The engine of a device; None where device memory is host memory, or there is no engine for its kind."""
    return CudaEngine(device) if device.type == "cuda" else None


# -- the host ------------------------------------------------------------------------------------------------------


def host_limit() -> int:
    """Half of the memory there is, shared among the processes that torchrun started here, for all devices and models of
    this one: pages that are pinned cannot be had by anyone else."""
    return buffers.total_memory() // (2 * max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class Room(NamedTuple):
    """Bytes of a slab."""

    slab: int
    start: int


class HostMemory:
    """Slabs of pinned memory, cut first fit.

    What is given back may be taken again at once, even with a copy from or to it still under way: all copies are made
    on one stream, in order. Slabs stay as long as the model's session: to pin memory is slow.
    """

    #: All that there are: together they pin no more than the host's limit.
    _all: ClassVar[weakref.WeakSet[HostMemory]] = weakref.WeakSet()
    _all_lock = threading.Lock()

    def __init__(self, engine: Engine, bounds: Bounds) -> None:
        self._engine, self._slab = engine, bounds.slab
        self._is_shared = bounds.host is None
        self._limit = host_limit() if bounds.host is None else bounds.host
        self._slabs: list[tuple[Tensor, arena.Space]] = []
        self._refused = False
        with self._all_lock:
            self._all.add(self)

    @property
    def nbytes(self) -> int:
        """Bytes that are pinned."""
        return sum(space.size for _, space in self._slabs)

    @property
    def used(self) -> int:
        """Bytes of them that hold something."""
        return sum(space.used for _, space in self._slabs)

    def take(self, nbytes: int) -> Room | None:
        """Room for so many bytes, or None where the host has no more."""
        for number, (_, space) in enumerate(self._slabs):
            start = space.take(nbytes)
            if start is not None:
                return Room(number, start)
        size = max(self._slab, 1 << (arena.aligned(nbytes) - 1).bit_length())
        pinned = self._pinned_by_all() if self._is_shared else self.nbytes
        if pinned + size > self._limit:
            self._refuse(f"{pinned} of at most {self._limit} bytes are in use")
            return None
        try:
            memory = self._engine.pinned(size)
        except RuntimeError as error:
            self._limit = self.nbytes  # not asked for again
            self._refuse(str(error).splitlines()[0])
            return None
        space = arena.Space(size)
        self._slabs.append((memory, space))
        start = space.take(nbytes)
        assert start is not None
        return Room(len(self._slabs) - 1, start)

    def give(self, room: Room) -> None:
        self._slabs[room.slab][1].give(room.start)

    def views(self, room: Room, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Tensors in this room, one like each of the parts."""
        memory, at, views = self._slabs[room.slab][0], room.start, []
        for part in parts:
            view = memory[at : at + part.nbytes].view(part.dtype)
            views.append(view.as_strided(part.shape, part.stride()))
            at += arena.aligned(part.nbytes)
        return tuple(views)

    @classmethod
    def _pinned_by_all(cls) -> int:
        with cls._all_lock:
            return sum(memory.nbytes for memory in cls._all)

    def _refuse(self, why: str) -> None:
        if not self._refused:
            self._refused = True
            warnings.warn(
                message(
                    "there is no pinned host memory left to swap to, so the rest stays on the device",
                    expected="room for what a step keeps",
                    received=why,
                    next_step="Reduce the batch, or give the process more memory",
                ),
                ActNNWarning,
                stacklevel=2,
            )


def room_for(parts: Sequence[Tensor]) -> int:
    """Bytes of host memory that :meth:`HostMemory.views` needs."""
    return sum(arena.aligned(part.nbytes) for part in parts)


# -- one device's leaves --------------------------------------------------------------------------------------------


class Watcher(Protocol):
    """Told where a leaf's bytes are."""

    def moved(self, leaf: Leaf, to_host: bool) -> None: ...


class Order:
    """The leaves of one forward pass on one device, and the order in which they are asked for.

    Attributes:
        numbers: of the leaves, as the swapper counts them, in the order of packing.
        sequence: places in ``numbers``, in the order in which they were first asked for.
        expected: the sequence of the last pass of this kind.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.numbers: list[int] = []
        self.sequence: list[int] = []
        self._asked: set[int] = set()
        self.expected: list[int] | None = None
        self._where: dict[int, int] = {}  # place -> where in the expected sequence
        self._at = self._next = -1

    def expect(self, sequence: list[int]) -> None:
        self.expected = list(sequence)
        self._where = {place: at for at, place in enumerate(self.expected)}

    def asked(self, place: int) -> None:
        """A leaf is asked for."""
        if place not in self._asked:
            self._asked.add(place)
            self.sequence.append(place)
        at = self._where.get(place)
        if at is not None:
            # Going back means another backward pass; going on, what was fetched already is not looked at again.
            self._next = at + 1 if at <= self._at else max(self._next, at + 1)
            self._at = at

    def following(self) -> int | None:
        """The leaf that is to be fetched next, by its number, if one is known."""
        expected = self.expected or ()
        while 0 <= self._next < len(expected):
            place = expected[self._next]
            if place < len(self.numbers):
                return self.numbers[place]
            self._next += 1  # the graph has changed
        return None

    def fetched(self) -> None:
        """The one that :meth:`following` names needs no more care."""
        self._next += 1


class Taken:
    """A leaf's parts, wherever they are: what the leaf holds in their place. Changed by its swapper alone."""

    __slots__ = (
        "swapper",
        "number",
        "place",
        "order",
        "leaf",
        "watchers",
        "room",
        "hosts",
        "nbytes",
        "parts",
        "is_original",
        "version",
        "stream",
        "ready",
    )

    def __init__(
        self, swapper: Swapper, number: int, place: int, order: Order, leaf: Leaf, watchers: list[Any]
    ) -> None:
        self.swapper, self.number, self.place, self.order = swapper, number, place, order
        self.leaf = weakref.ref(leaf, partial(swapper.died, number))
        self.watchers = watchers
        #: The tensors on the device, if there are any; whether they are those that were saved.
        self.parts: tuple[Tensor, ...] | None = leaf.parts()
        self.is_original = True
        self.version = leaf.version if isinstance(leaf, Exact) else self.parts[0]._version
        self.nbytes = sum(part.nbytes for part in self.parts)
        self.room: Room | None = None
        self.hosts: tuple[Tensor, ...] = ()
        #: The stream whose memory the parts are, and the event of the copy from or to them.
        self.stream: Any = None
        self.ready: Any = None

    def get(self) -> tuple[Tensor, ...]:
        return self.swapper.get(self)

    def original(self) -> Tensor | None:
        parts = self.parts
        return parts[0] if self.is_original and parts is not None else None

    def drop(self) -> None:
        self.swapper.drop(self)

    @property
    def was_written(self) -> bool:
        original = self.original()
        return original is not None and original._version != self.version


class Swapper:
    """Takes the leaves of one device to the host and back.

    Args:
        engine: of the device.
        bounds: of what is where.
        arenas: where codes that come back are put; None for the device's allocator.
    """

    #: Whether the interpreter ends: then nothing is done any more. Bound here, for a module's globals end before its
    #: objects do.
    _is_ending = staticmethod(sys.is_finalizing)

    def __init__(self, engine: Engine, bounds: Bounds = BOUNDS, arenas: arena.Arenas | None = None) -> None:
        self._engine, self._bounds, self._arenas = engine, bounds, arenas
        self.host = HostMemory(engine, bounds)
        self._lock = threading.Lock()
        self._count = 0
        self._taken: dict[int, Taken] = {}
        #: Those with parts on the device, by why: not let go yet; fetched ahead; asked for. In order.
        self._pending, self._ahead, self._recent = _Queue(), _Queue(), _Queue()
        self._learnt: dict[str, list[int]] = {}
        #: Leaves that died. The garbage collector may say so while this thread holds the lock.
        self._dead: deque[int] = deque()

    @property
    def waiting(self) -> int:
        """Leaves that are held."""
        return len(self._taken)

    def on_device(self) -> tuple[int, int, int]:
        """Bytes on the device: not let go yet, fetched ahead, and asked for."""
        return self._pending.nbytes, self._ahead.nbytes, self._recent.nbytes

    # -- out ----------------------------------------------------------------------------------------------------------

    def take(self, leaf: Leaf, order: Order, watchers: list[Any]) -> None:
        """Copy a leaf's parts to the host, and be what gives them from here on."""
        parts = leaf.parts()
        if sum(part.nbytes for part in parts) < self._bounds.smallest:
            return
        # An input of the model may ask for a gradient: autograd would record the copy, and hold the input for it.
        with self._lock, torch._C.DisableTorchFunction(), torch.no_grad():
            self._bury()
            room = self.host.take(room_for(parts))
            if room is None:
                return
            taken = Taken(self, self._count, len(order.numbers), order, leaf, watchers)
            taken.room, taken.hosts = room, self.host.views(room, parts)
            engine = self._engine
            taken.stream = engine.current()
            engine.wait(engine.side, engine.record(taken.stream))
            for host, part in zip(taken.hosts, parts, strict=True):
                engine.copy(host, part)
            taken.ready = engine.record(engine.side)
            order.numbers.append(taken.number)
            self._count += 1
            self._taken[taken.number] = taken
            self._pending.add(taken)
            leaf.hand_over(taken)
            del parts, part
            # The last one stays: to wait for a copy that has just begun is to wait for all of it.
            while self._pending.nbytes > self._bounds.pending and len(self._pending) > 1:
                self._leave(self._pending.first())
        self._clean()

    def _leave(self, taken: Taken) -> None:
        """Let go of the tensors that were saved."""
        self._pending.remove(taken)
        if taken.was_written:
            # What is on its way to the host may be anything. The tensor stays, for its leaf to refuse it.
            self._forget_host(taken)
        else:
            self._vacate(taken)

    def _vacate(self, taken: Taken) -> None:
        """Have the memory used again only after the copy from or to it."""
        self._engine.wait(taken.stream, taken.ready)
        taken.parts, taken.is_original = None, False
        self._tell(taken, True)

    def _forget_host(self, taken: Taken) -> None:
        if taken.room is not None:
            self.host.give(taken.room)
        taken.room, taken.hosts = None, ()

    def drop(self, taken: Taken) -> None:
        """Let go of the tensors that were saved now: the next thing that happens to them is a write."""
        with self._lock:
            if taken in self._pending:
                self._leave(taken)
                # Whoever writes need not be on the stream that computed.
                self._engine.wait(self._engine.current(), taken.ready)
        self._clean()

    # -- back ---------------------------------------------------------------------------------------------------------

    def get(self, taken: Taken) -> tuple[Tensor, ...]:
        """The parts, ready for the current stream; and fetch what is likely to be asked for next."""
        with self._lock, torch._C.DisableTorchFunction():
            self._bury()
            stream, order = self._engine.current(), taken.order
            if order.expected is None:
                order.expect(self._learnt.get(order.key, []))
                self._learnt[order.key] = order.sequence
            if taken.parts is not None and not taken.is_original and stream != taken.stream:
                # Its memory is used again in the order of the stream for which it was fetched, which this one is not.
                self._return(taken)
            if taken.parts is None:
                self._fetch(taken, stream)
                # Nothing expected this one: what else was fetched ahead may be in the way of what will be needed.
                self._shrink(self._ahead, self._bounds.ahead // 2)
            parts = taken.parts
            assert parts is not None
            if not taken.is_original:
                self._ahead.discard(taken)
                self._recent.discard(taken)
                self._recent.add(taken)
                self._engine.wait(stream, taken.ready)
                self._shrink(self._recent, max(self._bounds.recent, taken.nbytes))
            order.asked(taken.place)
            self._look_ahead(order, stream)
        self._clean()
        return parts

    def _fetch(self, taken: Taken, stream: Any) -> None:
        engine = self._engine
        parts = self._room_on_device(taken)
        engine.wait(engine.side, engine.record(stream))  # whoever had this memory before may still be at work
        for part, host in zip(parts, taken.hosts, strict=True):
            engine.copy(part, host)
        taken.parts, taken.stream, taken.ready = parts, stream, engine.record(engine.side)
        self._tell(taken, False)

    def _room_on_device(self, taken: Taken) -> tuple[Tensor, ...]:
        if self._arenas is None or isinstance(taken.leaf(), Exact):
            return tuple(self._engine.empty(host) for host in taken.hosts)
        with self._arenas.serving():
            return tuple(arena.empty(host.shape, host.dtype, self._engine.device) for host in taken.hosts)

    def _look_ahead(self, order: Order, stream: Any) -> None:
        while (number := order.following()) is not None:
            taken = self._taken.get(number)
            if taken is not None and taken.parts is None:
                if len(self._ahead) and self._ahead.nbytes + taken.nbytes > self._bounds.ahead:
                    return
                try:
                    self._fetch(taken, stream)
                except torch.cuda.OutOfMemoryError:
                    # It may be had when it is needed. Not tried again in this pass: a request that fails makes the
                    # allocator wait, and give up all that it has cached.
                    order.expect([])
                    return
                self._ahead.add(taken)
            order.fetched()

    def _shrink(self, queue: _Queue, nbytes: int) -> None:
        while queue.nbytes > nbytes:
            self._return(queue.first())

    def _return(self, taken: Taken) -> None:
        """Let go of what was fetched; the host still has it."""
        self._ahead.discard(taken)
        self._recent.discard(taken)
        self._vacate(taken)

    # -- the end of a leaf --------------------------------------------------------------------------------------------

    def died(self, number: int, _: Any = None) -> None:
        """A leaf is gone. Comes at any moment, in any thread."""
        self._dead.append(number)
        self._clean()

    def _clean(self) -> None:
        """Forget the leaves that died, unless someone is at work who will do so: never wait, this thread may be it."""
        while self._dead and not self._is_ending() and self._lock.acquire(blocking=False):
            try:
                self._bury()
            finally:
                self._lock.release()

    def _bury(self) -> None:
        while self._dead:
            taken = self._taken.pop(self._dead.popleft())
            for queue in (self._pending, self._ahead, self._recent):
                queue.discard(taken)
            if taken.parts is not None:
                self._engine.wait(taken.stream, taken.ready)
            taken.parts = None
            self._forget_host(taken)

    def _tell(self, taken: Taken, to_host: bool) -> None:
        leaf = taken.leaf()
        if leaf is not None:
            for watcher in list(taken.watchers):
                watcher.moved(leaf, to_host)


class _Queue:
    """Leaves in order, and their bytes."""

    def __init__(self) -> None:
        self._taken: dict[int, Taken] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._taken)

    def __contains__(self, taken: Taken) -> bool:
        return taken.number in self._taken

    def add(self, taken: Taken) -> None:
        self._taken[taken.number] = taken
        self.nbytes += taken.nbytes

    def first(self) -> Taken:
        return next(iter(self._taken.values()))

    def remove(self, taken: Taken) -> None:
        del self._taken[taken.number]
        self.nbytes -= taken.nbytes

    def discard(self, taken: Taken) -> None:
        if taken in self:
            self.remove(taken)


# -- a model's leaves -----------------------------------------------------------------------------------------------


class ForwardPass:
    """What one forward pass hands over.

    Args:
        swappers: of the model.
        key: what the pass has in common with those before it from which its order may be learnt.
    """

    def __init__(self, swappers: Swappers, key: str) -> None:
        self._swappers, self._key = swappers, key
        self._orders: dict[torch.device, tuple[Swapper | None, Order]] = {}

    def take(self, leaf: Leaf, watchers: list[Any]) -> None:
        """Hand over a leaf that was decided on, once."""
        parts = leaf.parts() if leaf.swapped is None else ()
        if not parts:
            return
        device = parts[0].device
        del parts
        if device not in self._orders:
            self._orders[device] = self._swappers.on(device), Order(self._key)
        swapper, order = self._orders[device]
        if swapper is not None:
            swapper.take(leaf, order, watchers)


class Swappers:
    """The swappers of a model, one for each device."""

    def __init__(self, arenas: arena.Arenas | None = None) -> None:
        self._arenas = arenas
        self._by_device: dict[torch.device, Swapper | None] = {}
        self._lock = threading.Lock()
        self._warned = False

    def on(self, device: torch.device) -> Swapper | None:
        """The swapper of a device, or None where there is nothing to swap to."""
        with self._lock:
            if device not in self._by_device:
                engine = engine_for(device)
                self._by_device[device] = None if engine is None else Swapper(engine, BOUNDS, self._arenas)
            return self._by_device[device]

    def begin(self, device: torch.device, where: str) -> ForwardPass:
        """A training forward pass of a module begins.

        Args:
            device: where its parameters are.
            where: what it is, the same in every step.

        Raises:
            NotAvailableError: a CUDA graph is being captured. Its replays would copy to and from memory that others
                have by then.
        """
        if is_capturing(device):
            raise NotAvailableError(
                message(
                    "a forward pass that swaps cannot be captured in a CUDA graph",
                    where=where,
                    expected="an ordinary forward pass, or swap=False",
                    received="a stream that is being captured",
                    next_step="Convert the model at level 'L3'",
                )
            )
        if self.on(device) is None and not self._warned:
            self._warned = True
            warnings.warn(
                message(
                    f"there is nothing to swap to on {device.type}, so the model trains as it would without swapping",
                    expected="a model on a CUDA device",
                    received=f"parameters on {device}",
                    next_step="Move the model to the GPU, or use level 'L3'",
                ),
                ActNNWarning,
                stacklevel=2,
            )
        return ForwardPass(self, where)
