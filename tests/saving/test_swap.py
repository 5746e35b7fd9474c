"""Swapping, on a simulated device: gradients are those without it, bit for bit, and no copy could go wrong."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import hf_actnn
from hf_actnn.errors import ActNNWarning, SavedTensorError
from hf_actnn.saving import swap
from hf_actnn.saving.kept import Exact, Geometry, Mask, Quantized
from hf_actnn.saving.swap import Bounds, Order, Swapper
from tests.models import batch, logits, make
from tests.saving.bench import Bench
from tests.saving.simulated import Hazard, SimulatedEngine
from tests.threads import in_threads

#: So tight that nearly everything leaves the device, and comes back a few leaves at a time.
TIGHT = Bounds(smallest=1, pending=3000, ahead=4000, recent=2000, slab=2**14)


class Simulation:
    """The engines that were made; hand out another kind, or other bounds, before the first forward pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engines: list[SimulatedEngine] = []
        self.swappers: list[Swapper] = []
        self.make = SimulatedEngine
        self._patch = monkeypatch
        self.bounds(TIGHT)
        monkeypatch.setattr(swap, "engine_for", self._engine)
        original, swappers = Swapper.get, self.swappers

        def get(swapper, taken):
            parts = original(swapper, taken)
            swapper._engine.check_readable(parts)
            return parts

        initialize = Swapper.__init__

        def init(swapper, *args, **kwargs):
            initialize(swapper, *args, **kwargs)
            swappers.append(swapper)

        monkeypatch.setattr(Swapper, "get", get)
        monkeypatch.setattr(Swapper, "__init__", init)

    def bounds(self, bounds: Bounds) -> None:
        self._patch.setattr(swap, "BOUNDS", bounds)

    def _engine(self, device: torch.device) -> SimulatedEngine:
        engine = self.make()
        self.engines.append(engine)
        return engine

    @property
    def engine(self) -> SimulatedEngine:
        (engine,) = self.engines
        return engine

    @property
    def swapper(self) -> Swapper:
        (swapper,) = self.swappers
        return swapper

    def finish(self) -> None:
        """All copies are made, and nothing is left of what they were made for."""
        gc.collect()
        for engine, swapper in zip(self.engines, self.swappers, strict=True):
            engine.finish()
            assert swapper.waiting == 0
            assert swapper.host.used == 0
            assert swapper.on_device() == (0, 0, 0)
            engine.finish()


@pytest.fixture
def simulation(monkeypatch):
    return Simulation(monkeypatch)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.LayerNorm(16 * 8 * 8),
        nn.Linear(16 * 8 * 8, 64),
        nn.SiLU(),
        nn.Linear(64, 5),
    )


def images(seed: int, samples: int = 6) -> torch.Tensor:
    return torch.randn(samples, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def through(model, x, begin, end):
    """Some of the model's parts, each with a forward pass of its own."""
    for number in range(begin, end):
        x = model[number](x)
    return x


def ordinary(model, step):
    model(images(step)).square().mean().backward()


def accumulating(model, step):
    for part in range(3):
        model(images(3 * step + part, 4)).square().mean().backward()


def forwards_first(model, step):
    """Both graphs live at once, and one backward pass goes through both."""
    (model(images(step)).square().mean() + model(images(step + 50, 3)).square().mean()).backward()


def retaining(model, step):
    loss = model(images(step)).square().mean()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()


def in_parts(model, step):
    """Two backward passes, each through a part of the graph, and some of it twice."""
    out = model(images(step))
    out[:, 0].mean().backward(retain_graph=True)
    out[:, 1].square().mean().backward()


def forward_raises(model, step):
    handle = model[9].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images(step + 9))
    handle.remove()
    ordinary(model, step)


def backward_raises(model, step):
    def stop(grad):
        raise RuntimeError("stopped")

    handle = model[4].register_forward_hook(lambda m, args, out: out.register_hook(stop) and None)
    out = model(images(step + 9))
    handle.remove()
    with pytest.raises(RuntimeError, match="stopped"):
        out.sum().backward()
    del out
    model.zero_grad()
    ordinary(model, step)


def never_backward(model, step):
    model(images(step + 30))
    ordinary(model, step)


def changing(model, step):
    """The graph differs from step to step: its sizes, and what is part of it."""
    model[6].p = 0.2 * (step % 2)
    x = through(model, images(step, 3 + step), 0, 7)
    if step % 2:
        x = model[10](x)
    through(model, x, 7, 12).square().mean().backward()


def checkpointed(reentrant):
    def run(model, step):
        x = images(step).requires_grad_()
        x = checkpoint(partial(through, model, begin=0, end=4), x, use_reentrant=reentrant)
        through(model, x, 4, 12).square().mean().backward()

    return run


def second_order(model, step):
    x = images(step).requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
    grad.square().sum().backward()


WAYS = {
    "ordinary": ordinary,
    "accumulation": accumulating,
    "forward passes first": forwards_first,
    "retain_graph": retaining,
    "backward in parts": in_parts,
    "exception in forward": forward_raises,
    "exception in backward": backward_raises,
    "no backward": never_backward,
    "changing graph": changing,
    "checkpoint": checkpointed(False),
    "reentrant checkpoint": checkpointed(True),
    "create_graph": second_order,
}


def train(config, way, steps: int = 4, build=network, **fields) -> list[list[torch.Tensor]]:
    """Gradients of each of some steps, with the parameters moved and the bits chosen in between."""
    model = hf_actnn.convert(build(), config, min_numel=0, update_interval=2, **fields)
    controller = hf_actnn.controller(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        way(model, step)
        controller.step()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        optimizer.step()
    return found


def equal(got, wanted) -> bool:
    return all(
        len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(got, wanted, strict=True)
    )


@pytest.mark.filterwarnings("ignore::UserWarning")  # bits chosen without what they need; create_graph and its leak
@pytest.mark.parametrize("level", ["L4", "L5"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_l3(way, level, simulation):
    wanted = train("L3", WAYS[way])
    assert not simulation.engines
    got = train(level, WAYS[way])
    assert equal(got, wanted)
    assert simulation.engine.bytes_out > 0 and simulation.engine.bytes_in > 0
    simulation.finish()


@pytest.mark.parametrize("seed", range(5))
def test_however_early_the_copies_are_made(seed, simulation):
    simulation.make = lambda: SimulatedEngine(seed, eagerness=(0.0, 0.05, 0.3, 0.7, 1.0)[seed])
    assert equal(train("L4", accumulating), train("L3", accumulating))
    simulation.finish()


@pytest.mark.parametrize("bits", [None, 1, 4, 8], ids=["exact", "1", "4", "8"])
def test_any_bits_and_none(bits, simulation):
    fields = {"config": "L0"} if bits is None else {"config": "L2", "bits": bits}
    assert equal(train(swap=True, way=retaining, **fields), train(way=retaining, **fields))
    assert simulation.engine.bytes_in > 0
    simulation.finish()


@pytest.mark.parametrize("name", ["hf_vit_sdpa", "hf_vit_eager", "hf_swin", "timm_efficientnet", "timm_convnext"])
def test_models(name, simulation):
    def way(model, step):
        pixels, labels = batch(name, 4, step)
        F.cross_entropy(logits(model, pixels), labels).backward()

    def run(level):
        return train(level, way, 3, lambda: make(name))

    assert equal(run("L4"), run("L3"))
    assert simulation.engine.bytes_in > 0
    simulation.finish()


# -- mistakes that must be noticed -----------------------------------------------------------------------------------


def copies_start_at_once(patch):
    """The stream that copies does not wait for the one that computes."""
    wait = SimulatedEngine.wait
    patch.setattr(SimulatedEngine, "wait", lambda e, s, event: None if s == e.side else wait(e, s, event))


def dropped_without_waiting(patch):
    def vacate(swapper, taken):
        taken.parts, taken.is_original = None, False

    patch.setattr(Swapper, "_vacate", vacate)


def read_without_waiting(patch):
    fetch = Swapper._fetch

    def early(swapper, taken, stream):
        before = swapper._engine.record(stream)
        fetch(swapper, taken, stream)
        taken.ready = before

    patch.setattr(Swapper, "_fetch", early)


def room_given_back_while_it_is_needed(patch):
    vacate = Swapper._vacate

    def early(swapper, taken):
        vacate(swapper, taken)
        if taken.room is not None:
            swapper.host.give(taken.room)
            taken.room = None

    patch.setattr(Swapper, "_vacate", early)


def dead_without_waiting(patch):
    bury = Swapper._bury

    def early(swapper):
        for number in swapper._dead:
            swapper._taken[number].parts = None
        bury(swapper)

    patch.setattr(Swapper, "_bury", early)


def parts_of_another(patch):
    """Fetched from the wrong leaf's copy."""
    fetch = Swapper._fetch

    def wrong(swapper, taken, stream):
        for other in swapper._taken.values():
            if other.parts is None and [h.shape for h in other.hosts] == [h.shape for h in taken.hosts]:
                taken.hosts = other.hosts
        fetch(swapper, taken, stream)

    patch.setattr(Swapper, "_fetch", wrong)


MISTAKES = [
    copies_start_at_once,
    dropped_without_waiting,
    read_without_waiting,
    room_given_back_while_it_is_needed,
    dead_without_waiting,
    parts_of_another,
]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a hazard in a leaf's last moment
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_simulation_notices(mistake, simulation, monkeypatch):
    def way(model, step):
        never_backward(model, step)
        retaining(model, step)

    wanted = train("L3", way)
    simulation.make = lambda: SimulatedEngine(eagerness=0.0)
    mistake(monkeypatch)
    try:
        noticed = not equal(train("L4", way), wanted)
        simulation.finish()
    except Hazard:
        noticed = True
    assert noticed


# -- what was saved and then written to ------------------------------------------------------------------------------


def keep_exact(simulation, bounds: Bounds = TIGHT):
    """A swapper and an exact leaf of its own."""
    swapper = Swapper(SimulatedEngine(eagerness=0.0), bounds)
    tensor = torch.arange(64.0)
    leaf = Exact(tensor, where="here")
    swapper.take(leaf, Order("key"), [])
    return swapper, tensor, leaf


def another(swapper, nbytes: int = 4000) -> Exact:
    leaf = Exact(torch.zeros(nbytes // 4))
    swapper.take(leaf, Order("other"), [])
    return leaf


def test_a_write_before_the_tensor_is_dropped_is_refused(simulation):
    swapper, tensor, leaf = keep_exact(simulation)
    tensor.add_(1)
    with pytest.raises(SavedTensorError, match="modified by an inplace operation"):
        leaf.get()
    held = another(swapper)  # would have it dropped
    with pytest.raises(SavedTensorError, match=r"\(64,\) torch.float32 is at version 1"):
        leaf.get()
    del leaf, held
    assert swapper.waiting == swapper.host.used == 0


def test_after_a_write_when_it_is_gone_the_old_values_come_back(simulation):
    swapper, tensor, leaf = keep_exact(simulation)
    held = another(swapper)
    assert leaf.original() is None
    tensor.add_(1)
    assert torch.equal(leaf.get(), torch.arange(64.0))
    del held


def test_what_recipes_read_is_let_go_of_before_a_write(simulation):
    _, tensor, leaf = keep_exact(simulation)
    assert leaf.secure() is False  # nothing was copied on the device
    assert leaf.original() is None
    tensor.add_(1)
    assert torch.equal(leaf.get(), torch.arange(64.0))


def test_a_write_waits_on_whatever_stream(simulation):
    swapper, tensor, leaf = keep_exact(simulation)
    engine = swapper._engine
    engine.stream = "another"
    with pytest.raises(Hazard):
        engine.check_writable(tensor)
    leaf.secure()
    engine.check_writable(tensor)


class Enlarged(nn.Module):
    """Saves a recipe of `grown`, and writes to that; torch is in the right with it, for nobody saved it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.op, self.w = nn.Linear(32, 32), nn.Parameter(torch.randn(128))

    def forward(self, x):
        grown = self.op(x)[:, None] + 1
        enlarged = F.interpolate(grown, scale_factor=4)
        out = enlarged[:, 0] * self.w
        grown.mul_(2.0)
        return out + grown.mean()


@pytest.mark.filterwarnings("ignore::hf_actnn.errors.ActNNWarning")
@pytest.mark.parametrize("config", ["L0", "L3"])
def test_a_write_in_the_forward_pass(config, simulation):
    def way(model, step):
        model(torch.randn(16, 32, generator=torch.Generator().manual_seed(step))).square().mean().backward()

    assert equal(train(config, way, swap=True, build=Enlarged), train(config, way, build=Enlarged))
    simulation.finish()


class Seen(torch.autograd.Function):
    """Saves its input, which is kept exact."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad + 0 * ctx.saved_tensors[0]


class MadeOfSwapped(nn.Module):
    """What is kept exact has left the device when recipes are made of it: an enlarged map, and a loss's weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        small = self.first(x) + 1
        other = self.second(small) + 1
        seen = Seen.apply(small) + Seen.apply(other)
        large = self.second(F.interpolate(small, scale_factor=2))
        weights = small.detach() * other.detach()
        loss = F.binary_cross_entropy_with_logits(seen, torch.ones_like(seen), weights)
        return large.square().mean() + loss


@pytest.mark.parametrize("level", ["L1", "L2", "L3"])
def test_recipes_of_what_was_swapped(level, simulation):
    """They are the same, and neither a stand-in is coded nor a result held that costs nothing to make again."""

    def way(model, step):
        model(images(step)).backward()
        kinds.append([(row.kind, row.kept) for row in hf_actnn.report(model).rows])

    kinds: list[list[tuple[str, str]]] = []
    wanted, got = train(level, way, 2, MadeOfSwapped), train(level, way, 2, MadeOfSwapped, swap=True)
    assert equal(got, wanted)
    assert kinds[2:] == kinds[:2]
    assert ("convolution", "recipe: interpolate") in kinds[0] and ("loss", "recipe: computed again") in kinds[0]
    simulation.finish()


def test_an_input_that_asks_for_a_gradient_is_not_held(simulation):
    model = hf_actnn.convert(network(), "L0", swap=True, min_numel=0)
    x = images(0).requires_grad_()
    gone = StorageWeakRef(x.untyped_storage())
    out = model(x).square().mean()
    assert not any(host.requires_grad for taken in simulation.swapper._taken.values() for host in taken.hosts)
    (grad,) = torch.autograd.grad(out, x)
    assert grad.isfinite().all() and grad.abs().sum() > 0
    del x, out, grad
    assert gone.expired()
    simulation.finish()


def test_parameters_and_views_with_gaps_stay(simulation):
    swapper = Swapper(SimulatedEngine(), TIGHT)
    for leaf in (
        Exact(nn.Parameter(torch.ones(64)), parameter=True),
        Exact(nn.Parameter(torch.ones(64))),  # of another model, say
        Exact(torch.ones(64, 64)[:, ::2]),
        Exact(torch.ones(64, dtype=torch.complex64)),
    ):
        assert leaf.parts() == ()
    assert swapper.waiting == 0
    model = hf_actnn.convert(network(), "L0", swap=True)
    owned = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    taken, take = [], Swapper.take

    def watch(swapper, leaf, *more):
        taken.append(leaf.parts()[0].untyped_storage()._cdata)
        take(swapper, leaf, *more)

    Swapper.take = watch
    try:
        model(images(0)).sum().backward()
    finally:
        Swapper.take = take
    assert taken and not owned & set(taken)


# -- how much is where -----------------------------------------------------------------------------------------------


def test_the_device_holds_no_more_than_its_bounds(simulation):
    largest = 0
    seen = []
    get = Swapper.get

    def watch(swapper, taken):
        parts = get(swapper, taken)
        seen.append(swapper.on_device())
        return parts

    model = hf_actnn.convert(network(), "L3", swap=True, min_numel=0)
    out = model(images(0, 32))
    swapper = simulation.swapper
    largest = max(taken.nbytes for taken in swapper._taken.values())
    pending, *rest = swapper.on_device()
    assert rest == [0, 0] and pending <= max(TIGHT.pending, largest)
    Swapper.get = watch
    try:
        for _ in range(3):
            out.square().mean().backward(retain_graph=True)
    finally:
        Swapper.get = get
    assert len(seen) > 20
    assert max(ahead for _, ahead, _ in seen) <= max(TIGHT.ahead, largest)
    assert max(recent for _, _, recent in seen) <= max(TIGHT.recent, largest)
    total = sum(taken.nbytes for taken in swapper._taken.values())
    assert sum(swapper.on_device()) < total / 2
    del out
    simulation.finish()


def fetched_on_demand(simulation, way, steps: int = 3) -> list[int]:
    """Leaves that were not there when they were asked for, step by step."""
    misses = [0]
    get = Swapper.get

    def watch(swapper, taken):
        misses[-1] += taken.parts is None
        return get(swapper, taken)

    Swapper.get = watch
    try:
        model = hf_actnn.convert(network(), "L2", swap=True, min_numel=0)
        for step in range(steps):
            way(model, step)
            misses.append(0)
    finally:
        Swapper.get = get
    return misses[:-1]


@pytest.mark.parametrize("way", [ordinary, accumulating, retaining, forwards_first], ids=lambda way: way.__name__)
def test_the_order_is_learnt(way, simulation):
    """In later steps only the first request of a pass, before which nothing could be known, finds nothing there."""
    simulation.bounds(TIGHT._replace(pending=1, ahead=2**20, recent=2**20))
    first, *later = fetched_on_demand(simulation, way)
    passes = {"accumulating": 3, "forwards_first": 2, "retaining": 3}.get(way.__name__, 1)
    assert first >= 8
    assert all(step <= passes for step in later), (first, later)
    simulation.finish()


class Full(SimulatedEngine):
    """Has no memory on the device for anything but what is asked for at the moment."""

    refused = 0
    ahead = False

    def empty(self, like):
        if self.ahead:
            self.refused += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return super().empty(like)


def test_where_the_device_has_no_room_nothing_is_fetched_ahead(simulation, monkeypatch):
    look_ahead = Swapper._look_ahead

    def watch(swapper, order, stream):
        swapper._engine.ahead = True
        look_ahead(swapper, order, stream)
        swapper._engine.ahead = False

    monkeypatch.setattr(Swapper, "_look_ahead", watch)
    simulation.make = Full
    simulation.bounds(TIGHT._replace(pending=1))
    assert equal(train("L4", ordinary), train("L3", ordinary))
    assert simulation.engine.refused == 3  # once in each pass that knew an order
    simulation.finish()


def test_an_order_survives_changes_of_the_graph():
    order = Order("key")
    order.numbers = [10, 11, 12]
    order.expect([4, 2, 9, 1, 0])
    order.asked(2)
    assert order.following() == 11  # 9 is of a larger graph
    order.fetched()
    assert order.following() == 10
    order.fetched()
    assert order.following() is None
    order.asked(7)  # unknown: nothing follows from it
    assert order.following() is None
    order.asked(2)  # again: another backward pass
    assert order.following() == 11
    assert order.sequence == [2, 7]


def test_where_the_host_has_no_room_the_rest_stays(simulation):
    wanted, few = train("L3", accumulating), TIGHT._replace(slab=2**12)
    for limits in (
        {"bounds": few._replace(host=2**13)},
        {"make": lambda: SimulatedEngine(pinnable=2**13)},
        {"make": lambda: SimulatedEngine(pinnable=0)},
    ):
        simulation.bounds(limits.get("bounds", few))
        simulation.make = limits.get("make", SimulatedEngine)
        with pytest.warns(ActNNWarning, match="no pinned host memory left.*stays on the device") as caught:
            assert equal(train("L4", accumulating), wanted)
        assert sum("pinned" in str(one.message) for one in caught) == 1
        assert simulation.swappers[-1].host.nbytes <= 2**13
    simulation.finish()


def test_half_of_the_host_is_for_all_processes_together(monkeypatch):
    monkeypatch.setattr(swap.buffers, "total_memory", lambda: 2**30)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert swap.host_limit() == 2**29
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert swap.host_limit() == 2**26


def test_models_share_the_host(simulation, monkeypatch):
    gc.collect()
    monkeypatch.setattr(swap, "host_limit", lambda: before + 3 * TIGHT.slab)
    before = swap.HostMemory._pinned_by_all()
    first, second = (swap.HostMemory(SimulatedEngine(), TIGHT) for _ in range(2))
    assert first.take(TIGHT.slab) and second.take(TIGHT.slab) and first.take(TIGHT.slab)
    with pytest.warns(ActNNWarning, match="no pinned host memory left"):
        assert second.take(TIGHT.slab) is None
    del first
    assert second.take(TIGHT.slab)


def test_host_memory_is_used_again(simulation):
    model = hf_actnn.convert(network(), "L2", swap=True, min_numel=0)
    ordinary(model, 0)
    pinned = simulation.swapper.host.nbytes
    for step in range(5):
        ordinary(model, step)
    assert simulation.swapper.host.nbytes == pinned > 0
    simulation.finish()


def test_small_leaves_stay(simulation):
    simulation.bounds(TIGHT._replace(smallest=64 * 1024))
    model = hf_actnn.convert(network(), "L2", swap=True)
    ordinary(model, 0)
    assert simulation.engine.bytes_out == 0


def test_track_memory_tells_host_from_device(simulation):
    model = hf_actnn.convert(network(), "L2", min_numel=0)
    with hf_actnn.track_memory(model) as before:
        model(images(0, 16)).sum().backward()
    assert before.swapped_bytes == 0 and "on the host" not in str(before)
    assert before.allocated_bytes is before.reserved_bytes is before.unused_bytes is None
    hf_actnn.convert(model, "L2", swap=True, min_numel=0)
    with hf_actnn.track_memory(model) as memory:
        out = model(images(0, 16)).sum()
        swapper = simulation.swapper
        away = sum(taken.nbytes for taken in swapper._taken.values() if taken.parts is None)
        assert memory.swapped_bytes == away > 0
        held = memory.saved_bytes
        assert held < before.saved_bytes - away / 3  # the first of them are the largest, and held before they leave
        out.backward()
    assert held <= memory.saved_bytes < before.saved_bytes
    assert f"on the host  {memory.swapped_bytes / 1e6:10.3f}".split() == str(memory).splitlines()[-1].split()
    assert memory._away == 0 and memory._held == 0
    assert sum(found for found, _ in memory.by_module.values()) == before.saved_bytes
    del out
    simulation.finish()


# -- lives -----------------------------------------------------------------------------------------------------------


def test_nothing_refers_to_a_graph_that_is_gone(simulation):
    model = hf_actnn.convert(network(), "L2", swap=True, min_numel=0)
    ordinary(model, 0)
    gc.collect()
    gc.disable()
    try:
        out = model(images(1))
        swapper = simulation.swapper
        assert swapper.waiting > 5
        del out
        assert swapper.waiting == 0 and swapper.host.used == 0
    finally:
        gc.enable()


RAISES_AND_ENDS = """
import sys
import torch
from torch import nn

import hf_actnn
from hf_actnn.saving import swap
from tests.saving.simulated import SimulatedEngine

swap.engine_for = lambda device: SimulatedEngine()
swap.BOUNDS = swap.Bounds(smallest=1)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        x = self.first(x) + 1
        return self.left(x) * self.right(x)


def stop(grad):
    raise RuntimeError("stopped")


model = hf_actnn.convert(Twice(), "L2", swap=True, min_numel=0)
model.first.weight.register_hook(stop)
leaf = swap.Exact(torch.zeros(64))
swap.Swapper(SimulatedEngine(), swap.BOUNDS).take(leaf, swap.Order("key"), [])
exec("model(torch.randn(64, 64)).sum().backward()")
"""


def test_a_process_ends_with_leaves_alive():
    """A backward pass that raises leaves the last one rebuilt; the interpreter's end must not wait for its burial."""
    ended = subprocess.run([sys.executable, "-c", RAISES_AND_ENDS], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("RuntimeError: stopped"), ended.stderr


def test_a_model_may_go_before_its_graph(simulation):
    model = hf_actnn.convert(network(), "L2", swap=True, min_numel=0)
    torch.manual_seed(3)
    weight, out = model[0].weight, model(images(0)).square().mean()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    out.backward()
    plain = hf_actnn.convert(network(), "L2", min_numel=0)
    torch.manual_seed(3)
    plain(images(0)).square().mean().backward()
    assert torch.equal(weight.grad, plain[0].weight.grad)
    del out
    simulation.finish()


def test_two_models_at_once(simulation):
    models = [hf_actnn.convert(network(), "L2", swap=True, min_numel=0) for _ in range(2)]
    plain = hf_actnn.convert(network(), "L2", min_numel=0)
    outs = []
    for model in (*models, plain):
        torch.manual_seed(7)
        outs.append(model(images(1)))
    for out in reversed(outs):
        out.square().mean().backward()
    for model in models:
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    assert len(simulation.engines) == 2
    del outs, out
    simulation.finish()


def test_threads(simulation):
    """Each thread has a graph of its own; swapper, room and order are those of one model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    hf_actnn.convert(model, bits=8, swap=True, min_numel=0)
    plain = hf_actnn.revert(copy.deepcopy(model))
    weights = list(model.parameters())
    found: dict[int, list[torch.Tensor]] = {}

    def work(number):
        for turn in range(8):
            x = torch.randn(32, 32, generator=torch.Generator().manual_seed(number))
            loss = model(x).square().mean()
            found[number] = torch.autograd.grad(loss, weights, retain_graph=bool(turn % 2))

    in_threads(work, 4)
    for number, grads in found.items():
        x = torch.randn(32, 32, generator=torch.Generator().manual_seed(number))
        exact = torch.autograd.grad(plain(x).square().mean(), list(plain.parameters()))
        for got, wanted in zip(grads, exact, strict=True):
            assert (got - wanted).norm() < 0.05 * wanted.norm()
    simulation.finish()


def test_each_stream_reads_memory_of_its_own(simulation):
    """What was fetched for one stream is used again in its order, whatever another that read it is still doing."""
    swapper, _, leaf = keep_exact(simulation)
    held = another(swapper)
    engine = swapper._engine
    first = leaf.get()
    assert leaf.get() is first
    engine.stream = "another"
    second = leaf.get()
    assert second is not first and leaf.get() is second
    assert torch.equal(first, torch.arange(64.0)) and torch.equal(second, first)
    engine.finish()
    del held


def test_copies_and_pickles_of_a_model_begin_anew(simulation):
    model = hf_actnn.convert(network(), "L4", min_numel=0)
    ordinary(model, 0)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for one in (model, twin, loaded):
        one.zero_grad()
        torch.manual_seed(2)
        ordinary(one, 1)
        for p, q in zip(one.parameters(), model.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    assert len(simulation.engines) == 3
    simulation.finish()


@pytest.mark.parametrize(("before", "after", "fits"), [("L3", "L4", True), ("L5", "L3", True), ("L2.5", "L4", False)])
def test_a_state_does_not_depend_on_where_codes_wait(before, after, fits):
    state = hf_actnn.controller(hf_actnn.convert(network(), before)).state_dict()
    controller = hf_actnn.controller(hf_actnn.convert(network(), after))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        controller.load_state_dict(state)
    assert (not caught) is fits


def test_stand_ins_say_what_they_stand_for(simulation):
    swapper = Swapper(SimulatedEngine(), TIGHT)
    x = torch.randn(8, 256)
    packed, codes = hf_actnn.codec.quantize(x, 3), hf_actnn.codec.pack_mask(x.view(-1), "gt")
    for leaf in (Quantized(packed), Mask(codes, Geometry(x), 1.0, 0.0)):
        nbytes, before = leaf.nbytes, leaf.get()
        swapper.take(leaf, Order("key"), [])
        assert leaf.nbytes == nbytes
        assert all(part.device.type == "meta" for part in leaf.parts())
        assert torch.equal(leaf.get(), before)
    assert packed.codes.device.type == "cpu"  # whoever else has it keeps it


# -- without anything to swap to -------------------------------------------------------------------------------------


def test_a_cpu_has_nothing_to_swap_to():
    wanted = train("L3", ordinary)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = train("L4", ordinary)
    assert equal(got, wanted)
    texts = [str(one.message) for one in caught if "swap" in str(one.message)]
    assert len(texts) == 1
    for part in ("nothing to swap to on cpu", "as it would without swapping", "level 'L3'", "Expected", "Received"):
        assert part in texts[0]


def test_nobody_is_warned_who_did_not_ask():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ActNNWarning)
        model = hf_actnn.convert(Bench(lambda m, x: x @ m.w, w=torch.randn(16, 16)), "L4", swap=False)
        model(torch.randn(8, 16)).sum().backward()
