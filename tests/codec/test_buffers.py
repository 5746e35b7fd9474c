"""Recycled memory: no two live tensors share any, and nothing idle is kept."""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from hf_actnn.codec import buffers, quantize

BIG = buffers.SMALLEST  # elements of fp32: well above the size from which memory is recycled


@pytest.fixture(autouse=True)
def clean():
    gc.collect()
    buffers.release()
    yield
    gc.collect()
    buffers.release()


def address(x):
    return x.untyped_storage().data_ptr()


def test_live_tensors_never_share():
    live = [buffers.empty(BIG, torch.float32) for _ in range(4)]
    assert len({address(x) for x in live}) == 4
    spot = address(live.pop(1))
    assert address(buffers.empty(BIG, torch.float32)) == spot


@pytest.mark.parametrize(
    "holder",
    [
        lambda x: x[5:9],
        lambda x: x.detach(),
        lambda x: x.view(2, -1).t(),
        lambda x: x.numpy()[3:],
        lambda x: memoryview(x.numpy()),
        lambda x: x.untyped_storage(),
        lambda x: torch.utils.dlpack.to_dlpack(x),
        lambda x: x.view(torch.int32),
        lambda x: torch.ones(BIG, requires_grad=True) * x,  # autograd's own reference, in C++
    ],
    ids=["view", "detach", "transpose", "numpy", "memoryview", "storage", "dlpack", "dtype view", "graph"],
)
def test_whoever_holds_it_keeps_it(holder):
    x = buffers.empty(BIG, torch.float32)
    spot = address(x)
    held = holder(x)
    del x
    assert address(buffers.empty(BIG, torch.float32)) != spot
    buffers.release()
    assert buffers.nbytes()[0] == BIG * 4
    del held
    gc.collect()
    assert buffers.nbytes()[0] == 0


def test_a_new_storage_every_time():
    """A cache keyed by storage must not take the next tensor on the memory for the one before."""
    import weakref

    x = buffers.empty(BIG, torch.float32)
    spot, storage = address(x), weakref.ref(x.untyped_storage())
    del x
    gc.collect()
    y = buffers.empty(BIG, torch.float32)
    assert address(y) == spot
    assert storage() is None


def test_release():
    a, b = buffers.empty(BIG, torch.float32), buffers.empty(2 * BIG, torch.float32)
    assert buffers.nbytes() == (12 * BIG, 0)
    del a, b
    assert buffers.nbytes() == (0, 12 * BIG)
    buffers.release()
    assert buffers.nbytes() == (0, 0)


def test_free_blocks_go_before_a_new_one_comes():
    """The pool never holds more than was alive at one time."""
    del [buffers.empty(BIG, torch.float32) for _ in range(3)][:]
    big = buffers.empty(8 * BIG, torch.float32)
    assert buffers.nbytes() == (32 * BIG, 0)
    del big


def test_a_far_larger_block_is_not_taken():
    del [buffers.empty((buffers.LARGEST_FIT + 1) * buffers.SMALLEST // 4, torch.float32)][:]
    small = buffers.empty(buffers.SMALLEST // 4, torch.float32)
    assert buffers.nbytes() == (buffers.SMALLEST, 0)
    del small
    buffers.release()


_SCARCE = """
import mmap
from pathlib import Path

import torch
from hf_actnn.codec import buffers

SIZE = 2**20


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def holes(count=256):
    "Every eighth of many tensors, and what was resident before the others died."
    tensors = [torch.ones(SIZE // 4) for _ in range(count)]
    kept, before = tensors[::8], resident()
    del tensors
    return kept, before


holes()  # the C library's threshold is above this size from now on
kept, before = holes()
buffers._unused_memory = lambda: 0.5
buffers.dropped(buffers.TRIM_AFTER)
assert resident() > before - 100 * SIZE, "nothing to show: the blocks went back by themselves"
buffers._unused_memory = lambda: 0.1
buffers.dropped(buffers.TRIM_AFTER)
assert resident() < before - 200 * SIZE
assert all(bool((tensor == 1).all()) for tensor in kept)
more, before = holes(1024)  # more than the holes that the heap has already
assert resident() < before - 512 * SIZE, "freed blocks stay in the heap"
"""


def test_freed_heap_goes_back_where_memory_is_scarce():
    """Freed blocks below malloc's mapping threshold leave the resident set, live ones between them stay as they are;
    from then on they leave by themselves. In a process of its own, whose malloc it changes."""
    if buffers._glibc() is None or not Path("/proc/self/statm").exists():
        pytest.skip("this C library cannot give freed heap back")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", _SCARCE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("extra", [lambda held: 2 + held, lambda held: 7 + held, lambda held: 2**30])
def test_reference_counts_of_other_interpreters(monkeypatch, extra):
    """Python 3.14 counts one reference less; some count none. Blocks in use are never handed out."""
    real = buffers._counts

    def counts(blocks):
        base = real([object()])[0]  # held by its list alone
        return [extra(count - base) for count in real(blocks)]

    monkeypatch.setattr(buffers, "_counts", counts)
    monkeypatch.setattr(buffers, "_FREE", buffers._count_of_free())
    tensors = [buffers.empty(BIG, torch.float32).fill_(value) for value in range(3)]
    assert [float(tensor.mean()) for tensor in tensors] == [0.0, 1.0, 2.0]
    assert len({tensor.data_ptr() for tensor in tensors}) == 3
    address = tensors[1].data_ptr()
    del tensors[1]
    if buffers._FREE is not None:
        assert buffers.empty(BIG, torch.float32).data_ptr() == address


def test_unused_memory_is_the_least_of_machine_and_control_group(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  1000 kB\nMemFree: 10 kB\nMemAvailable:  600 kB\n")
    monkeypatch.setattr(buffers, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(buffers, "_CGROUP", tmp_path)
    assert buffers._unused_memory() == 0.6
    machine = buffers.total_memory()
    (tmp_path / "memory.max").write_text("max\n")
    assert buffers.total_memory() == machine > 1000
    (tmp_path / "memory.current").write_text("750\n")
    assert buffers._unused_memory() == 0.6
    (tmp_path / "memory.max").write_text("1000\n")
    assert buffers.total_memory() == 1000
    (tmp_path / "memory.stat").write_text("anon 700\ninactive_file 0\n")
    assert buffers._unused_memory() == 0.25
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 400\n")  # what a data loader has read
    assert buffers._unused_memory() == 0.6
    (tmp_path / "meminfo").unlink()
    (tmp_path / "memory.max").unlink()
    assert buffers._unused_memory() == 1.0


def test_small_tensors_bypass():
    buffers.release()
    buffers.empty(100, torch.float32)
    assert buffers.nbytes() == (0, 0)


class Saved(torch.autograd.Function):
    """Keeps its input packed; what backward gives back is the dequantised tensor itself, edited or not."""

    @staticmethod
    def forward(ctx, x, edit):
        ctx.packed, ctx.edit = quantize(x, 8), edit
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        x = ctx.packed.dequantize()
        if ctx.edit:
            x.mul_(2)
        return x, None


@pytest.mark.parametrize("edit", [False, True])
def test_a_function_that_returns_its_saved_tensor(edit):
    inputs = [torch.randn(BIG, requires_grad=True) for _ in range(3)]
    sum(Saved.apply(x, edit).sum() for x in inputs).backward()
    for x in inputs:
        expected = quantize(x, 8).dequantize() * (2 if edit else 1)
        assert torch.equal(x.grad, expected)


def test_create_graph():
    """Dequantised tensors that a second graph keeps must outlive the first backward pass."""
    x = torch.randn(BIG, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: quantize(t, 8), lambda p: p.dequantize())
    with hooks:
        y = (x**3).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        buffers.release()
        noise = [buffers.empty(BIG, torch.float32).fill_(torch.nan) for _ in range(3)]
        (second,) = torch.autograd.grad(first.sum(), x)
    del noise
    assert torch.isfinite(second).all()
    torch.testing.assert_close(second, 6 * x.detach(), atol=0.5, rtol=0)  # steps of 1/40, times 6, twice


def test_threads():
    """Two threads that fill and check their own tensors."""
    failures = []

    def work(value):
        for _ in range(200):
            x = buffers.empty(BIG, torch.float32).fill_(value)
            if not (x == value).all():
                failures.append(value)

    threads = [threading.Thread(target=work, args=(v,)) for v in (1.0, 2.0)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
