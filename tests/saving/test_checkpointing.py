"""Gradient checkpointing of a converted model: gradients right, bytes and recomputations no more than without us."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

import hf_actnn
from tests.memory.counting import StorageCount
from tests.models import batch, cosine, gradients, logits, make, step

KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


class Block(nn.Module):
    """Counts its forward passes."""

    runs = 0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        Block.runs += 1
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Stack(nn.Module):
    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.reentrant: bool | None = None
        self.sequential = False

    def forward(self, x):
        x = self.stem(x)
        if self.reentrant is None:
            return self.blocks(x)
        if self.sequential:
            return checkpoint_sequential(self.blocks, 2, x, use_reentrant=self.reentrant)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def measure(model: nn.Module, run) -> tuple[dict, int, int]:
    """Gradients, block runs, and the bytes of storages made by the forward pass that are alive before backward."""
    Block.runs = 0
    model.zero_grad()
    torch.manual_seed(5)
    leaf = torch.randn(8, 16, 32, requires_grad=True)  # a reentrant checkpoint needs an input that wants a gradient
    with StorageCount(model, leaf) as count:
        # Only the graph holds the sum: a loop, too, lets go of its batch.
        total = run(leaf + 0).square().mean()
    held = count.alive()
    total.backward()
    return gradients(model), Block.runs, held


def pair(bits: int = 8, **attributes) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Stack()
    for name, value in attributes.items():
        setattr(plain, name, value)
    return plain, hf_actnn.convert(copy.deepcopy(plain), bits=bits, min_numel=0, recompute_bits=8)


@KINDS
@pytest.mark.parametrize("sequential", [False, True], ids=["blocks", "checkpoint_sequential"])
def test_checkpoints_inside_the_model(reentrant, sequential):
    plain, model = pair(reentrant=reentrant, sequential=sequential)
    expected, runs, held = measure(plain, plain)
    found, found_runs, found_held = measure(model, model)
    assert cosine(found, expected) > 0.999
    assert found_runs == runs
    assert found_held <= 1.05 * held
    assert runs > 4, "nothing was recomputed: the count itself does not work"


@KINDS
def test_checkpoint_around_the_model(reentrant):
    plain, model = pair()
    expected, runs, held = measure(plain, lambda x: checkpoint(plain, x, use_reentrant=reentrant))
    found, found_runs, found_held = measure(model, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert cosine(found, expected) > 0.999
    assert found_runs == runs == 8
    assert found_held <= 1.05 * held


@KINDS
def test_checkpoint_around_a_part(reentrant):
    def around(model):
        return lambda x: checkpoint(model.blocks, model.stem(x), use_reentrant=reentrant)

    plain, model = pair()
    expected, runs, held = measure(plain, around(plain))
    found, found_runs, found_held = measure(model, around(model))
    assert cosine(found, expected) > 0.999
    assert found_runs == runs == 8
    assert found_held <= 1.05 * held


class Seen(Block):
    """Notes what is alive when its own backward pass has begun: by then it has been run again."""

    count: StorageCount | None = None

    def forward(self, x):
        hidden = F.gelu(self.up(self.norm(x)))
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.alive.append(Seen.count.alive()) if Seen.count else None)
        return x + self.dropout(self.down(hidden))


@KINDS
def test_what_a_block_saves_when_it_runs_again_is_coded(reentrant):
    """Both kinds: until it is differentiated, what is held of a block is codes where that was asked for."""
    held = {}
    for bits in ("plain", "exact", 8, 2):
        plain = pair(reentrant=reentrant)[0]
        plain.blocks = nn.Sequential(Seen(32))
        Seen.alive = plain.blocks[0].alive = []
        x = torch.randn(64, 16, 32, requires_grad=True)
        if bits != "plain":
            hf_actnn.convert(plain, bits=2, recompute_bits=bits, min_numel=0)
        total = plain(x).square().mean()
        with StorageCount(plain, x) as Seen.count:
            total.backward()
        Seen.count = None
        held[bits] = Seen.alive[-1]
    assert held["exact"] == pytest.approx(held["plain"], rel=0.05)
    assert held[2] < held[8] < held["plain"] / 1.4


@KINDS
def test_bits_that_are_chosen(reentrant):
    """Blocks that run again take no part in the choice, and no draw of noise is measured there."""
    plain, model = pair(reentrant=reentrant)
    hf_actnn.convert(model, "L3", update_interval=1, min_numel=0, recompute_bits=8)
    controller = hf_actnn.controller(model)
    for _ in range(3):
        found, _, _ = measure(model, model)
        controller.step()
    expected, _, _ = measure(plain, plain)
    assert cosine(found, expected) > 0.99
    names = controller.bits()
    assert names and not any(name.startswith("blocks") for name in names)


def test_no_early_stop():
    """A block that is run to its end hands on no more than it saved at first."""
    plain, model = pair(reentrant=False)
    expected, runs, _ = measure(plain, plain)
    with set_checkpoint_early_stop(False):
        found, found_runs, _ = measure(model, model)
    assert cosine(found, expected) > 0.999 and found_runs == runs


def test_gradients_of_gradients():
    """Through the non-reentrant kind, which can."""
    plain, model = pair(reentrant=False)
    results = []
    for one in (plain, model):
        torch.manual_seed(5)
        x = torch.randn(8, 16, 32, generator=torch.Generator().manual_seed(2), requires_grad=True)
        (slope,) = torch.autograd.grad(one(x).square().mean(), x, create_graph=True)
        one.zero_grad()
        slope.square().sum().backward()
        results.append(gradients(one))
    assert cosine(results[1], results[0]) > 0.99


class Halve(torch.autograd.Function):
    """Saves for itself, and reads it."""

    @staticmethod
    def forward(ctx, x, at):
        ctx.save_for_backward(x, at)
        return x * x / 2

    @staticmethod
    def backward(ctx, grad):
        x, at = ctx.saved_tensors
        assert at.dtype == torch.int64 and int(at[1]) == 1
        return grad * x, None


@KINDS
def test_a_block_with_functions_of_its_own(reentrant):
    """Saves of an autograd.Function, indices, in-place operations and a softmax, between those that are coded."""

    class Own(Block):
        def forward(self, x):
            Block.runs += 1
            y = F.relu(self.up(self.norm(x)), inplace=True)
            y = Halve.apply(y, torch.arange(4)).softmax(-1) * y.amax(-1, keepdim=True)
            return x + self.dropout(self.down(y))[..., torch.arange(31, -1, -1)]

    plain, model = pair(reentrant=reentrant)
    for one in (plain, model):
        for block in one.blocks:
            block.__class__ = Own
    hf_actnn.convert(model, bits=8, min_numel=0, recompute_bits=8)
    expected, _, _ = measure(plain, plain)
    found, _, _ = measure(model, model)
    assert cosine(found, expected) > 0.999


@KINDS
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", ["hf_vit_sdpa", "hf_vit_sdpa_dropout", "hf_vit_eager", "hf_swin"])
def test_hugging_face_checkpointing(name, reentrant):
    plain = make(name)
    assert plain.supports_gradient_checkpointing
    images, labels = batch(name)
    images.requires_grad_()  # a reentrant checkpoint needs an input that wants a gradient
    unchecked = step(copy.deepcopy(plain), images, labels)[2]
    plain.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model = hf_actnn.convert(copy.deepcopy(plain), bits=8, min_numel=0, recompute_bits=8)
    results = []
    for one in (plain, model):
        calls: list[str] = []
        handles = [
            module.register_forward_pre_hook(lambda *_, path=path, calls=calls: calls.append(path))
            for path, module in one.named_modules()
        ]
        one.zero_grad()
        torch.manual_seed(3)
        with StorageCount(one, images) as count:
            total = F.cross_entropy(logits(one, images + 0), labels)
        held = count.alive()
        forward_calls = len(calls)
        total.backward()
        for handle in handles:
            handle.remove()
        results.append((gradients(one), held, forward_calls, sorted(calls)))
        gc.collect()
    (expected, held, first, calls), (found, found_held, found_first, found_calls) = results
    assert cosine(expected, unchecked) > 0.9999
    assert cosine(found, expected) > 0.999
    assert found_calls == calls and found_first == first
    assert len(calls) > first, "nothing was recomputed"
    assert found_held <= 1.05 * held
