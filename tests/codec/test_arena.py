"""One buffer for all codes: blocks never overlap, what is free is found, and nothing of it shows in the results."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import warnings

import pytest
import torch
from torch import nn

import hf_actnn
from hf_actnn.codec import arena, native, pack_mask, pack_uint, quantize, unpack_mask, unpack_uint
from hf_actnn.codec.arena import ALIGNMENT, REMEMBERED, UNIT, Arena, Arenas, Space, aligned
from hf_actnn.errors import ActNNWarning
from tests.threads import in_threads

CPU = torch.device("cpu")


class Naive:
    """The same by a list of units, each free or of some block."""

    def __init__(self, size: int) -> None:
        self.units: list[int | None] = [None] * (size // ALIGNMENT)

    def take(self, nbytes: int) -> int | None:
        need = max(1, -(-nbytes // ALIGNMENT))
        for start in range(len(self.units) - need + 1):
            if all(unit is None for unit in self.units[start : start + need]):
                self.units[start : start + need] = [start] * need
                return start * ALIGNMENT
        return None

    def give(self, start: int) -> None:
        self.units = [None if unit == start // ALIGNMENT else unit for unit in self.units]

    @property
    def used(self) -> int:
        return ALIGNMENT * sum(unit is not None for unit in self.units)

    def stretches(self) -> list[tuple[int, int]]:
        runs = itertools.groupby(enumerate(self.units), key=lambda one: one[1] is None)
        found = [list(run) for free, run in runs if free]
        return [(run[0][0] * ALIGNMENT, len(run) * ALIGNMENT) for run in found]


@pytest.mark.parametrize("seed", range(40))
def test_space_against_a_naive_model(seed):
    chance = random.Random(seed)
    size = ALIGNMENT * chance.choice([0, 1, 7, 64, 200])
    space, naive, blocks, top = Space(size), Naive(size), [], 0
    for _ in range(400):
        if blocks and chance.random() < 0.45:
            start = blocks.pop(chance.randrange(len(blocks)))
            space.give(start)
            naive.give(start)
        else:
            nbytes = chance.choice([0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, chance.randrange(20 * ALIGNMENT)])
            start = space.take(nbytes)
            assert start == naive.take(nbytes)
            if start is not None:
                blocks.append(start)
                top = max(top, start + aligned(max(nbytes, 1)))
        assert space.used == naive.used
        assert space.top == top
        assert list(zip(space._starts, space._sizes, strict=True)) == naive.stretches()
    for start in blocks:
        space.give(start)
    assert space.used == 0
    if size:
        assert space.take(size) == 0  # all that was free is one stretch again


def test_a_block_is_given_once():
    space = Space(4096)
    start = space.take(100)
    space.give(start)
    for wrong in (start, 256, -1):
        with pytest.raises(KeyError):
            space.give(wrong)


def filled(shape, value: int) -> torch.Tensor:
    return arena.empty(shape, torch.uint8, CPU).fill_(value)


def sized(nbytes: int) -> Arenas:
    """Arenas whose buffer on the CPU has been fitted to so many bytes."""
    arenas = Arenas()
    with arenas.serving():
        held = arena.empty((nbytes,), torch.uint8, CPU)
    arenas.begin()
    assert arenas.size == 0, "a step that lives is not disturbed"
    del held
    arenas.begin()
    assert arenas.size == aligned(int(nbytes * 17 / 16), UNIT)
    return arenas


@pytest.mark.parametrize("seed", range(6))
def test_tensors_never_share_a_byte(seed):
    """Random lives, each tensor full of a number of its own, which is still there at its end."""
    chance, arenas = random.Random(seed), sized(UNIT)
    alive: dict[int, tuple[torch.Tensor, int]] = {}
    with arenas.serving():
        for step in range(600):
            if alive and chance.random() < 0.48:
                tensor, value = alive.pop(chance.choice(list(alive)))
                assert (tensor == value).all()
                del tensor
            else:
                shape = chance.choice([(0,), (1,), (255,), (3, 2), (70_000,), (chance.randrange(1, 300_000),)])
                alive[step] = filled(shape, step % 251), step % 251
        for tensor, value in alive.values():
            assert (tensor == value).all()
    one = arenas.on(CPU)
    inside = [t for t, _ in alive.values() if t.numel() and t.untyped_storage().nbytes() == one.size]
    assert len(inside) > 3
    assert one.used == sum(aligned(tensor.nbytes) for tensor in inside)
    del tensor, inside
    alive.clear()
    assert one.used == 0


def test_a_block_ends_with_its_tensor():
    arenas = sized(1000)
    with arenas.serving():
        first = arena.empty((10, 2), torch.bfloat16, CPU)
        place, again = first.data_ptr(), first
        assert first.shape == (10, 2) and first.is_contiguous() and first.dtype == torch.bfloat16
        del first
        gc.collect()
        assert arena.empty((10, 2), torch.bfloat16, CPU).data_ptr() != place
        parameter = nn.Parameter(torch.zeros(10, 2, dtype=torch.bfloat16))
        parameter.grad = again  # now C++ alone holds it
        del again
        assert arena.empty((10, 2), torch.bfloat16, CPU).data_ptr() != place
        parameter.grad = None
        assert arena.empty((10, 2), torch.bfloat16, CPU).data_ptr() == place


def test_versions_are_each_tensors_own():
    arenas = sized(1000)
    with arenas.serving():
        one, other = filled((10,), 1), filled((10,), 2)
    version = other._version
    one.add_(1)
    assert other._version == version
    assert other._base is None


def test_what_does_not_fit_is_allocated_as_usual_and_the_buffer_grows():
    arenas = sized(UNIT // 2)
    assert arenas.size == UNIT
    with arenas.serving():
        held = [filled((UNIT // 2,), value) for value in range(5)]
    assert arenas.on(CPU).used == UNIT
    for value, tensor in enumerate(held):
        assert (tensor == value).all()
    arenas.begin()
    assert arenas.size == UNIT, "not while codes live"
    del held, tensor
    arenas.begin()
    assert arenas.size == aligned(int(2.5 * UNIT * 17 / 16), UNIT)
    with arenas.serving():
        again = [filled((UNIT // 2,), value) for value in range(5)]
    assert arenas.on(CPU).used == sum(tensor.nbytes for tensor in again)


def test_the_buffer_follows_the_most_of_some_passes_and_shrinks():
    arenas = sized(20 * UNIT)
    full = arenas.size
    for _ in range(REMEMBERED - 1):
        with arenas.serving():
            filled((UNIT,), 1)
        arenas.begin()
        assert arenas.size == full
    with arenas.serving():
        filled((UNIT,), 1)
    arenas.begin()
    assert arenas.size == 2 * UNIT


def test_a_pass_without_codes_changes_nothing():
    arenas = sized(3 * UNIT)
    full = arenas.size
    for _ in range(2 * REMEMBERED):
        arenas.begin()
    assert arenas.size == full


def test_no_room_for_the_buffer(monkeypatch):
    arenas = Arenas()
    empty = torch.empty

    def refuse(*args, **kwargs):
        if args and isinstance(args[0], int) and args[0] >= UNIT:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refuse)
    with arenas.serving():
        filled((1000,), 1)
    with pytest.warns(
        ActNNWarning, match=r"no room for one buffer.*cpu.*2097152 bytes.*Tried to allocate.*arena=False"
    ):
        arenas.begin()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with arenas.serving():
            filled((1000,), 1)
        arenas.begin()
        assert arenas.size == 0


def test_another_stream_is_not_served(monkeypatch):
    arenas = sized(1000)
    monkeypatch.setattr(arena, "_stream", lambda device: 7)
    with arenas.serving():
        assert filled((100,), 1).untyped_storage().nbytes() == 100
    assert arenas.on(CPU).used == 0


def test_the_buffer_follows_to_a_stream_that_took_over(monkeypatch):
    """After a warm-up elsewhere, say; but it does not go to and fro between two that take turns."""
    arenas, now = sized(1000), [0]
    monkeypatch.setattr(arena, "_stream", lambda device: now[0])

    def one_pass(stream):
        now[0] = stream
        arenas.begin()
        with arenas.serving():
            return filled((1000,), 1).untyped_storage().nbytes() == arenas.size

    assert [one_pass(stream) for stream in (0, 7, 0, 7, 0)] == [True, False, True, False, True]
    assert [one_pass(7) for _ in range(3)] == [False, True, True]


def test_nothing_of_a_capture_lies_in_the_buffer(monkeypatch):
    monkeypatch.setattr(arena, "_stream", lambda device: None)
    arenas = Arenas()
    for _ in range(3):
        with arenas.serving():
            filled((1000,), 1)
        arenas.begin()
    assert arenas.size == 0
    monkeypatch.undo()
    arenas.begin()
    assert arenas.size == UNIT
    monkeypatch.setattr(arena, "_stream", lambda device: None)
    with arenas.serving():
        assert filled((1000,), 1).untyped_storage().nbytes() == 1000


def test_only_the_thread_that_serves():
    arenas, found = sized(1000), []
    with arenas.serving():
        thread = threading.Thread(target=lambda: found.append(filled((100,), 1).untyped_storage().nbytes()))
        thread.start()
        thread.join()
        with Arenas().serving():
            found.append(filled((100,), 1).untyped_storage().nbytes())
        found.append(filled((100,), 1).untyped_storage().nbytes())
    found.append(filled((100,), 1).untyped_storage().nbytes())
    assert found == [100, 100, UNIT, 100]


def test_threads_share_an_arena():
    one = Arena(CPU)
    one._resize(8 * UNIT)

    def work(number):
        chance, alive = random.Random(number), []
        for _ in range(400):
            if alive and chance.random() < 0.5:
                assert (alive.pop(chance.randrange(len(alive))) == number).all()
            else:
                alive.append(one.empty((chance.randrange(1, 60_000),), torch.uint8).fill_(number))

    in_threads(work, 4)
    assert one.used == 0


@pytest.mark.skipif(native.module() is None, reason="the CPU kernels are not built")
def test_codes_are_the_same_in_an_arena():
    x, widths = torch.randn(8, 3000), torch.tensor([1, 2, 3, 8], dtype=torch.uint8)
    flat, values = x.view(-1), torch.randint(0, 15, (5000,), dtype=torch.uint8)

    def code():
        return quantize(x, 3), quantize(x, widths), pack_mask(flat, "gt"), pack_uint(values, 4)

    arenas, wanted = sized(UNIT // 2), code()
    with arenas.serving():
        got = code()
        assert arenas.on(CPU).used == sum(aligned(t.nbytes) for p in got[:2] for t in (p.codes, p.meta)) + aligned(
            got[2].nbytes
        ) + aligned(got[3].nbytes)
        for mine, theirs in zip(got[:2], wanted[:2], strict=True):
            assert torch.equal(mine.codes, theirs.codes) and torch.equal(mine.meta, theirs.meta)
            assert mine.nbytes == theirs.nbytes
            assert torch.equal(mine.dequantize(), theirs.dequantize())
        assert torch.equal(unpack_mask(got[2], flat.numel()), flat > 0)
        assert torch.equal(unpack_uint(got[3], 4, 5000), values)
    del got, mine
    assert arenas.on(CPU).used == 0


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1024, 9)
    )


def train(**fields):
    model = hf_actnn.convert(network(), "L3", min_numel=0, update_interval=2, **fields)
    controller, found = hf_actnn.controller(model), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(5):
        x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        for part in x.chunk(2):
            model(part).square().mean().backward()
        controller.step()
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
        found.append([p.detach().clone() for p in model.parameters()])
    return model, found


@pytest.mark.filterwarnings("ignore::hf_actnn.errors.ActNNWarning")
def test_training_is_the_same():
    (_, wanted), (model, got) = train(), train(arena=True)
    assert all(torch.equal(a, b) for x, y in zip(got, wanted, strict=True) for a, b in zip(x, y, strict=True))
    arenas = model._actnn.session.arenas
    assert arenas.size >= UNIT
    with hf_actnn.track_memory(model) as memory:
        out = model(torch.randn(4, 3, 16, 16))
        used = arenas.on(CPU).used
        assert 0 < used <= arenas.size
    assert memory.saved_bytes < used + 200_000, "a code counts its own bytes, not the buffer's"
    del out
    assert arenas.on(CPU).used == 0
