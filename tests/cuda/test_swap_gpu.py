"""Levels L4 and L5 on a GPU: gradients of L3 bit for bit, less memory, and nothing waits for the device."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hf_actnn
from hf_actnn.codec import native
from hf_actnn.errors import NotAvailableError, SavedTensorError
from hf_actnn.saving import swap
from hf_actnn.saving.kept import Exact
from hf_actnn.saving.swap import Bounds, CudaEngine, Order, Swapper

pytestmark = pytest.mark.gpu
MB = 2**20
#: Tight enough for small models to be swapped out and in.
TIGHT = Bounds(smallest=2**12, pending=2**16, ahead=2**17, recent=2**16, slab=2**20)


@pytest.fixture(autouse=True)
def built(monkeypatch):
    if native.cuda(0) is None:
        pytest.skip("the CUDA kernels are not built")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(swap, "BOUNDS", TIGHT)


def network() -> nn.Module:
    """Of operations whose backward pass is the same in every run."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.LayerNorm(32 * 16 * 16),
        nn.Linear(32 * 16 * 16, 256),
        nn.SiLU(),
        nn.Linear(256, 10),
    ).cuda()


def images(seed: int, samples: int = 16) -> torch.Tensor:
    return torch.randn(samples, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).cuda()


def ordinary(model, step):
    model(images(step)).square().mean().backward()


def accumulating(model, step):
    for part in range(3):
        model(images(3 * step + part)).square().mean().backward()


def forwards_first(model, step):
    (model(images(step)).square().mean() + model(images(step + 50, 8)).square().mean()).backward()


def retaining(model, step):
    loss = model(images(step)).square().mean()
    for retain in (True, True, False):
        loss.backward(retain_graph=retain)


def raising(model, step):
    handle = model[9].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images(step))
    handle.remove()

    def stop(grad):
        raise RuntimeError("stopped")

    handle = model[3].register_forward_hook(lambda m, args, out: out.register_hook(stop) and None)
    out = model(images(step))
    handle.remove()
    with pytest.raises(RuntimeError, match="stopped"):
        out.sum().backward()
    model.zero_grad()
    ordinary(model, step)


def through(model, x, begin, end):
    for number in range(begin, end):
        x = model[number](x)
    return x


def checkpointed(model, step):
    x = checkpoint(partial(through, model, begin=0, end=5), images(step).requires_grad_(), use_reentrant=True)
    through(model, x, 5, 11).square().mean().backward()


def second_stream(model, step):
    """A whole step on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ordinary(model, step)
    torch.cuda.current_stream().wait_stream(stream)


def train(config: str, way, **fields) -> list[list[torch.Tensor]]:
    model = hf_actnn.convert(network(), config, update_interval=2, **fields)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.01), []
    for step in range(4):
        torch.manual_seed(step)
        optimizer.zero_grad()
        way(model, step)
        hf_actnn.controller(model).step()
        found.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    assert all(grad.isfinite().all() for grads in found for grad in grads)
    return found


WAYS = [ordinary, accumulating, forwards_first, retaining, raising, checkpointed, second_stream]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("level", ["L4", "L5"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_gradients_are_those_of_l3(way, level):
    wanted, got = train("L3", way), train(level, way)
    for step, (a, b) in enumerate(zip(got, wanted, strict=True)):
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert torch.equal(x, y), (step, number)


def test_exact_tensors_are_those_that_were_saved():
    wanted, got = train("L0", retaining), train("L0", retaining, swap=True)
    assert all(torch.equal(x, y) for a, b in zip(got, wanted, strict=True) for x, y in zip(a, b, strict=True))


def deep(level: str, **fields) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(16) for layer in (nn.Linear(1024, 1024), nn.GELU())]
    return hf_actnn.convert(nn.Sequential(*layers), level, **fields).cuda()


def peak(model: nn.Module) -> int:
    """Bytes that a step needs above what is there before it, after the order was learnt."""
    x = torch.randn(8192, 1024, device="cuda")
    for _ in range(3):
        model.zero_grad(set_to_none=False)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(x).square().mean().backward()
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_memory_is_lower(monkeypatch):
    monkeypatch.setattr(swap, "BOUNDS", Bounds(pending=8 * MB, ahead=8 * MB, recent=4 * MB))
    plain, swapped = peak(deep("L2")), peak(deep("L2", swap=True))
    assert swapped < plain - 40 * MB, (swapped / MB, plain / MB)  # of 16 codes of 4.5 MB
    exact, away = peak(deep("L0")), peak(deep("L0", swap=True))
    assert away < exact / 2, (away / MB, exact / MB)


def test_track_memory_says_what_is_where(monkeypatch):
    monkeypatch.setattr(swap, "BOUNDS", Bounds(pending=8 * MB, ahead=8 * MB, recent=4 * MB))
    model = deep("L2", swap=True)
    with hf_actnn.track_memory(model) as memory:
        model(torch.randn(8192, 1024, device="cuda")).sum().backward()
    assert memory.swapped_bytes > memory.saved_bytes > 0
    assert memory.reserved_bytes >= memory.allocated_bytes > 0
    assert memory.unused_bytes == memory.reserved_bytes - memory.allocated_bytes
    assert "on the host" in str(memory) and "reserved" in str(memory)


@pytest.mark.parametrize("fields", [{"swap": True}, {"arena": True}, {"swap": True, "arena": True}], ids=str)
def test_a_step_does_not_wait_for_the_device(fields):
    model = hf_actnn.convert(network(), "L2", **fields)
    x = images(0)

    def step():
        for _ in range(2):
            loss = model(x).square().mean()
            loss.backward(retain_graph=True)
            loss.backward()

    step()
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_copies_that_the_device_is_slow_to_make():
    """The side stream is kept busy, so that a wait that is missing shows in the values."""
    engine = CudaEngine(torch.device("cuda", torch.cuda.current_device()))
    swapper = Swapper(engine, Bounds(smallest=1, pending=1, ahead=1, recent=1))
    order, leaves, wanted = Order("key"), [], []
    for number in range(6):
        tensor = torch.full((1 << 20,), float(number), device="cuda")
        with torch.cuda.stream(engine.side):
            torch.cuda._sleep(20_000_000)
        leaf = Exact(tensor)
        del tensor
        swapper.take(leaf, order, [])
        leaves.append(leaf)
        torch.full((1 << 20,), -1.0, device="cuda")  # would lie where one that was let go too early lay
    for turn in range(2):
        for number, leaf in reversed(list(enumerate(leaves))):
            with torch.cuda.stream(engine.side):
                torch.cuda._sleep(20_000_000)
            wanted.append((leaf.get().double().mean(), number))
            torch.full((1 << 20,), -2.0 - turn, device="cuda")
    assert all(float(mean) == number for mean, number in wanted)


def test_a_write_is_refused():
    swapper = Swapper(CudaEngine(torch.device("cuda", 0)), TIGHT)
    tensor = torch.ones(1 << 16, device="cuda:0")
    leaf = Exact(tensor)
    swapper.take(leaf, Order("key"), [])
    tensor.add_(1)
    with pytest.raises(SavedTensorError, match="modified by an inplace operation"):
        leaf.get()


def test_a_capture_is_refused():
    model = hf_actnn.convert(network(), "L2", swap=True)
    x = images(0)
    ordinary(model, 0)  # a capture as the very first step is refused for that reason
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            with pytest.raises(NotAvailableError, match="cannot be captured"):
                model(x)
        finally:
            graph.capture_end()


def test_an_arena_holds_the_codes():
    model = hf_actnn.convert(network(), "L2", arena=True)
    ordinary(model, 0)
    out = model(images(1))
    one = model._actnn.session.arenas.on(torch.device("cuda", 0))
    assert 0 < one.used <= one.size
    del out
    assert one.used == 0


def test_other_streams_do_not_get_the_arenas_memory():
    model = hf_actnn.convert(network(), "L2", arena=True)
    ordinary(model, 0)
    ordinary(model, 1)
    one = model._actnn.session.arenas.on(torch.device("cuda", 0))
    with torch.cuda.stream(torch.cuda.Stream()):
        out = model(images(2))
        assert one.used == 0
        del out


def test_a_capture_does_not_use_the_arena():
    """Replays would write to blocks that others have by then."""
    model = hf_actnn.convert(network(), "L2", arena=True)
    x, stream = images(0), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(x).square().mean().backward()
    one = model._actnn.session.arenas.on(torch.device("cuda", 0))
    graph, size = torch.cuda.CUDAGraph(), one.size
    with torch.cuda.graph(graph, stream=stream):
        out = model(x)
        assert one.used == 0 and one.size == size > 0
    graph.replay()
    torch.cuda.synchronize()
    assert out.isfinite().all()
