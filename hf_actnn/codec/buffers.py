"""CPU memory: recycles what dequantised tensors live in, and returns what coded ones have left.

Faulting in fresh pages costs several times what the dequantising kernel does. Memory is reused by lifetime, never by
position: a block is free when no tensor, view, numpy array or C++ holder is left on it, which its reference count says,
since every tensor handed out holds a reference to the Python object that owns the block (``torch.frombuffer``). Each
hand-out makes a new storage, so nothing that identifies tensors by their storage can mistake a recycled block for the
tensor that lived there before.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Smaller tensors come from torch: its allocator reuses small blocks well.
SMALLEST = 64 * 1024
#: A block serves a request this many times smaller at most. A backward pass begins with the small tensors of the
#: deepest layers and needs the large ones of the first layers later: blocks that refused the former would be made
#: several times in a step.
LARGEST_FIT = 512
#: Each time so many bytes of activations were replaced by codes, and less than this share of memory is unused, the C
#: library is asked to return what it holds of them.
TRIM_AFTER, SCARCE = 256 * 2**20, 0.25
#: From this size on tensors then stay out of the C library's heap.
OUT_OF_HEAP = 2**20

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_HUGE_PAGE = 2 * 1024 * 1024
_M_MMAP_THRESHOLD = -3  # malloc.h
# Windows has no private anonymous maps: there every tensor comes from torch.
_ANONYMOUS = hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANONYMOUS")


class Pool:
    """Blocks by lifetime. A new block is made only after all free ones, too small for it, were given back; a small
    tensor may hold a block up to ``LARGEST_FIT`` times its size for as long as it lives, which in a backward pass is
    one operation. Free blocks stay until :meth:`release`, which a forward pass that is trained begins with: it decodes
    nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[mmap.mmap] = []

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised flat CPU tensor that nothing else shares."""
        need = numel * dtype.itemsize
        if need < SMALLEST or _FREE is None:
            return torch.empty(numel, dtype=dtype)
        with self._lock:
            free = self._free()
            fits = [block for block in free if need <= len(block) <= LARGEST_FIT * need]
            if fits:
                block = min(fits, key=len)
            else:
                self._forget(free)
                free.clear()  # or this list would keep them
                block = _block(need)
                self._blocks.append(block)
            del free, fits
            # Inside the lock: the new tensor's reference is what marks the block as used.
            return torch.frombuffer(block, dtype=dtype, count=numel)

    def release(self) -> None:
        """Give back every free block."""
        with self._lock:
            self._forget(self._free())

    def nbytes(self) -> tuple[int, int]:
        """Bytes of the blocks in use, and of those free."""
        with self._lock:
            free = sum(map(len, self._free()))
            return sum(map(len, self._blocks)) - free, free

    def _free(self) -> list[mmap.mmap]:
        return [block for block, count in zip(self._blocks, _counts(self._blocks), strict=True) if count == _FREE]

    def _forget(self, blocks: list[mmap.mmap]) -> None:
        gone = set(map(id, blocks))
        self._blocks = [block for block in self._blocks if id(block) not in gone]


def _block(nbytes: int) -> mmap.mmap:
    size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    # Private: a shared map would let a forked worker write into its parent's tensors.
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)  # a fault per 2 MiB instead of 512
    return block


@lru_cache(maxsize=1)
def _glibc() -> tuple[Callable[[int], int], Callable[[int, int], int]] | None:
    """glibc's ``malloc_trim`` and ``mallopt``, where that is the C library."""
    try:
        library = ctypes.CDLL(None)
        return library.malloc_trim, library.mallopt
    except (AttributeError, OSError, TypeError):
        return None


@lru_cache(maxsize=1)
def _keep_out_of_heap() -> None:
    """From now on large tensors get pages of their own, which go back to the system as they are freed."""
    found = _glibc()
    if found is not None and not _threshold_is_set():
        found[1](_M_MMAP_THRESHOLD, OUT_OF_HEAP)


def _threshold_is_set() -> bool:
    """Whether whoever started the process has decided on it."""
    return "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")


def _unused_memory() -> float:
    """The share of memory that is still to be had, by the machine's count and by that of a version 2 control
    group; 1 if unknown."""
    shares = [1.0]
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        shares.append(int(lines["MemAvailable"].split()[0]) / int(lines["MemTotal"].split()[0]))
    except (OSError, KeyError, ValueError):
        pass
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max" where there is none
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # Pages of files that nobody uses give way before anyone runs out of memory.
        used = int((_CGROUP / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
        shares.append(1 - used / limit)
    except (OSError, ValueError, ZeroDivisionError):
        pass
    return min(shares)


def total_memory() -> int:
    """Bytes that there are for this process, by the machine's count and by that of a version 2 control group."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int((_CGROUP / "memory.max").read_text()))  # "max" where there is none
    except (OSError, ValueError):
        return machine


_dropped = 0


def dropped(nbytes: int) -> None:
    """Count CPU memory that was freed before its time, and where memory is scarce have it returned to the system.

    Once it has seen a few large tensors freed, glibc serves all below 32 MiB from a heap, where small allocations
    beside a freed activation keep its pages, and where an aligned request never fits the hole that one of its size has
    left: a process may peak almost as if nothing had been freed. Pages that go back have to be faulted in again, in
    every step, so this is left alone until less than a quarter of the memory is unused. Then the free pages of the heap
    are returned, and large tensors stay out of it from there on, as with ``MALLOC_MMAP_THRESHOLD_`` in the environment.
    """
    global _dropped
    _dropped += nbytes  # a lost update between threads costs nothing but precision
    if _dropped >= TRIM_AFTER:
        settle()


def settle() -> None:
    """Where memory is scarce, have what was dropped since the last time returned: a backward pass is about to begin."""
    global _dropped
    if _dropped < TRIM_AFTER // 8:
        return
    _dropped = 0
    found = _glibc()
    if found is not None and _unused_memory() < SCARCE:
        _keep_out_of_heap()
        found[0](0)


def _counts(blocks: list[Any]) -> list[int]:
    return [sys.getrefcount(block) for block in blocks]


def _count_of_free() -> int | None:
    """What :func:`_counts` says of a block that only its list holds. Interpreters differ in the references they hold
    themselves, and one that does not count exactly leaves no way to know: then nothing is recycled."""
    blocks = [mmap.mmap(-1, mmap.PAGESIZE)]
    free = _counts(blocks)[0]
    tensor = torch.frombuffer(blocks[0], dtype=torch.uint8)
    view = tensor[1:]
    del tensor
    held = _counts(blocks)[0]
    del view
    exact = held > free and _counts(blocks)[0] == free and getattr(sys, "_is_gil_enabled", lambda: True)()
    return free if exact else None


_FREE = _count_of_free() if _ANONYMOUS else None
_pool = Pool()
if hasattr(os, "register_at_fork"):
    # Another thread may have held the lock while this one forked.
    os.register_at_fork(after_in_child=lambda: setattr(_pool, "_lock", threading.Lock()))
empty = _pool.empty
release = _pool.release
nbytes = _pool.nbytes
