"""One allocation for all the codes of a step.

Codes differ in size from tensor to tensor and, where bits are chosen, from step to step. Each with an allocation of its
own would cut a caching allocator's memory into pieces that nothing else fits. So they are cut out of one buffer, which
is as large as the last steps needed, and a block is free again when the tensor that was made of it dies.

Everything here is bookkeeping on the host: memory is reused in the order of the stream that the buffer was made on, as
the caching allocator does, and a tensor that is asked for on another stream is allocated as usual.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_actnn.errors import ActNNWarning, message

#: Blocks begin and end at multiples of this many bytes; the kernels' widest access is 16.
ALIGNMENT = 256
#: An arena is this much larger than what was needed, for bits that move between tensors within a budget.
MARGIN = 1 / 16
#: Its size is a multiple of this.
UNIT = 2 * 2**20
#: Forward passes that are looked back at: the buffer follows the most that one of them needed.
REMEMBERED = 16
#: A buffer is given up for a smaller one if it is this many times as large as what was needed.
FAR_TOO_LARGE = 2


def aligned(nbytes: int, to: int = ALIGNMENT) -> int:
    """The least multiple of ``to`` that holds so many bytes."""
    return -(-nbytes // to) * to


class Space:
    """Which bytes of a buffer are free: first fit, and neighbours that are free become one.

    Args:
        size: bytes of the buffer.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        #: Bytes that are taken, and where the block that ended furthest ended, since this was last set to 0.
        self.used = self.top = 0
        self._starts, self._sizes = ([0], [size]) if size else ([], [])  # free stretches, in order
        self._taken: dict[int, int] = {}

    def take(self, nbytes: int) -> int | None:
        """Where a block of so many bytes begins, or None if there is no stretch for it."""
        need = aligned(max(nbytes, 1))
        at = next((at for at, size in enumerate(self._sizes) if size >= need), None)
        if at is None:
            return None
        start, size = self._starts[at], self._sizes[at]
        if size == need:
            del self._starts[at], self._sizes[at]
        else:
            self._starts[at], self._sizes[at] = start + need, size - need
        self._taken[start] = need
        self.used += need
        self.top = max(self.top, start + need)
        return start

    def give(self, start: int) -> None:
        """Free the block that begins here. A block that was not taken is a ``KeyError``."""
        size = self._taken.pop(start)
        self.used -= size
        at = bisect_left(self._starts, start)
        if at < len(self._starts) and start + size == self._starts[at]:
            size += self._sizes[at]
            del self._starts[at], self._sizes[at]
        if at and self._starts[at - 1] + self._sizes[at - 1] == start:
            self._sizes[at - 1] += size
        else:
            self._starts.insert(at, start)
            self._sizes.insert(at, size)


class Arena:
    """The codes of one device.

    A tensor that is handed out owns its block until its Python object, or whatever holds it in C++, is gone. Its views
    do not: nothing here may keep a view of a code for longer than the code.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._buffer: Tensor | None = None
        self._space = Space(0)
        self._stream = _stream(device)
        self._blocks: dict[int, weakref.ref[Tensor]] = {}  # where a block begins -> the tensor made of it
        self._outside: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # number -> a tensor that found no room, bytes
        self._numbers = 0
        self._outside_used = self._outside_peak = 0
        self._needs: deque[int] = deque(maxlen=REMEMBERED)
        #: What died since; a callback may come at any moment, also while the lock is held.
        self._dead: deque[tuple[bool, int]] = deque()
        self._refused = False

    @property
    def size(self) -> int:
        """Bytes of the buffer."""
        return self._space.size

    @property
    def used(self) -> int:
        """Bytes of the buffer that are taken."""
        with self._lock:
            self._bury()
            return self._space.used

    def begin(self) -> None:
        """A forward pass begins. Where nothing of the last one is left, the buffer is fitted to what was needed, and
        where all of that found another stream than the buffer's, to the stream of this pass."""
        with self._lock:
            self._bury()
            stream = _stream(self.device)
            if self._blocks or self._outside or self._refused or stream is None:
                return
            need = self._space.top + self._outside_peak
            if not need:
                return
            self._needs.append(need)
            elsewhere = not self._space.top and stream != self._stream
            self._space.top = self._outside_peak = 0
            need = max(self._needs)
            wanted = aligned(int(need * (1 + MARGIN)), UNIT)
            if need > self.size or FAR_TOO_LARGE * wanted < self.size or elsewhere:
                self._resize(wanted)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor, of the buffer where there is room and the current stream is the
        buffer's."""
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        with self._lock:
            self._bury()
            start = None
            if nbytes and self._buffer is not None and self._stream == _stream(self.device):
                start = self._space.take(nbytes)
            if start is not None and self._buffer is not None:
                return self._inside(start, shape, dtype)
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        if nbytes:
            with self._lock:
                self._count_outside(tensor, aligned(nbytes))
        return tensor

    def _inside(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert self._buffer is not None
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= size
        # Set, not viewed: a view would share one count of versions with all other codes.
        tensor = torch.empty(0, dtype=dtype, device=self.device)
        tensor.set_(self._buffer.untyped_storage(), start // dtype.itemsize, shape, tuple(reversed(strides)))
        dead = self._dead
        self._blocks[start] = weakref.ref(tensor, lambda _: dead.append((True, start)))
        return tensor

    def _count_outside(self, tensor: Tensor, nbytes: int) -> None:
        number, dead = self._numbers, self._dead
        self._numbers += 1
        self._outside[number] = (weakref.ref(tensor, lambda _: dead.append((False, number))), nbytes)
        self._outside_used += nbytes
        self._outside_peak = max(self._outside_peak, self._outside_used)

    def _bury(self) -> None:
        """Free the blocks whose tensors died."""
        while self._dead:
            inside, number = self._dead.popleft()
            if inside:
                del self._blocks[number]
                self._space.give(number)
            else:
                self._outside_used -= self._outside.pop(number)[1]

    def _resize(self, size: int) -> None:
        self._buffer = None  # first, so that the new one may lie where it was
        self._space, self._stream = Space(0), _stream(self.device)
        try:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        except RuntimeError as error:  # torch's OutOfMemoryError is one
            self._refused = True  # for good: a request that fails makes the allocator give up all that it has cached
            warnings.warn(
                message(
                    "there is no room for one buffer for all codes of a step, so each is allocated by itself",
                    where=str(self.device),
                    expected=f"{size} bytes",
                    received=str(error).splitlines()[0],
                    next_step="Reduce the batch, or pass arena=False",
                ),
                ActNNWarning,
                stacklevel=2,
            )
            return
        self._space = Space(size)


def _stream(device: torch.device) -> int | None:
    """What tells the current stream apart from others; a CPU has one. None while it is captured in a CUDA graph, whose
    replays would write to blocks that others have by then."""
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch._C._cuda_getCurrentRawStream(_index(device))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


class Arenas:
    """An arena for each device that a model's codes lie on, made when the first of them is asked for."""

    def __init__(self) -> None:
        self._arenas: dict[torch.device, Arena] = {}
        self._lock = threading.Lock()

    def on(self, device: torch.device) -> Arena:
        with self._lock:
            found = self._arenas.get(device)
            if found is None:
                found = self._arenas[device] = Arena(device)
            return found

    def begin(self) -> None:
        """A forward pass begins."""
        for arena in list(self._arenas.values()):
            arena.begin()

    @property
    def size(self) -> int:
        """Bytes of all buffers."""
        return sum(arena.size for arena in self._arenas.values())

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """What this thread codes meanwhile is put here."""
        before = _thread.arenas
        _thread.arenas = self
        try:
            yield
        finally:
            _thread.arenas = before


class _Thread(threading.local):
    arenas: Arenas | None = None


_thread = _Thread()


def serving() -> Arenas | None:
    """What serves this thread, if anything does."""
    return _thread.arenas


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for codes: of the arena that serves this thread, if one does."""
    arenas = _thread.arenas
    if arenas is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return arenas.on(device).empty(shape, dtype)
