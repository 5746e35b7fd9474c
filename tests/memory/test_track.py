"""track_memory against an independent count, on plain and converted models."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_actnn
from hf_actnn.errors import ConversionError
from tests.memory.counting import StorageCount
from tests.models import batch, logits, make
from tests.saving.bench import Bench

MODELS = [
    "hf_vit_sdpa",
    "hf_vit_sdpa_dropout",
    "hf_vit_eager",
    "hf_resnet",
    "hf_convnext",
    "hf_swin",
    "timm_convnext",
    "timm_efficientnet",
]


def measure(model: nn.Module, name: str) -> tuple[hf_actnn.MemoryReport, int]:
    images, labels = batch(name, 8)
    torch.manual_seed(3)
    gc.collect()
    with StorageCount(model) as count, hf_actnn.track_memory(model) as memory:
        # What no one but the graph holds; the loss's own result is held by this function.
        total = F.cross_entropy(logits(model, images + 0), labels)
        del images
        alive = count.alive(total)
    held = memory.saved_bytes
    total.backward()
    assert memory.saved_bytes == held, "the figure is what was held before backward"
    return memory, alive


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", [None, 2, 4, 8], ids=lambda bits: f"{bits or 'plain'}")
def test_equals_an_independent_count(name, bits):
    model = make(name)
    if bits:
        hf_actnn.convert(model, bits=bits, min_numel=0)
    memory, alive = measure(model, name)
    # Labels and the loss's weights are a few bytes that both count; scalars of drop path are the rest.
    assert memory.saved_bytes == pytest.approx(alive, rel=0.03)
    if bits:
        plain, _ = measure(hf_actnn.revert(model), name)
        assert memory.uncompressed_bytes == pytest.approx(plain.saved_bytes, rel=0.01)
        assert memory.ratio == pytest.approx(memory.uncompressed_bytes / memory.saved_bytes)
        assert memory.ratio > {2: 4, 4: 3, 8: 2}[bits]
    else:
        assert memory.ratio == pytest.approx(1.0)
        assert memory.uncompressed_bytes == memory.saved_bytes


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "converted"])
def test_modules_sum_to_the_total(bits):
    model = make("hf_vit_sdpa")
    if bits:
        hf_actnn.convert(model, bits=bits, min_numel=0)
    memory, _ = measure(model, "hf_vit_sdpa")
    table = memory.by_module
    assert sum(held for held, _ in table.values()) == memory.saved_bytes
    assert sum(raw for _, raw in table.values()) == memory.uncompressed_bytes
    assert set(table) <= {name for name, _ in model.named_modules()}
    assert any("mlp" in name for name in table)
    text = str(memory)
    assert "total" in text and all((name or "(model)") in text for name in table)


def chain(bits: int | None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    return model if bits is None else hf_actnn.convert(model, bits=bits, min_numel=0)


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "converted"])
def test_peak_over_steps(bits):
    """Two equal steps have the peak of one; two forwards before one backward have twice that."""
    model = chain(bits)
    with hf_actnn.track_memory(model) as one:
        model(torch.randn(32, 64)).sum().backward()
    with hf_actnn.track_memory(model) as two:
        for _ in range(2):
            model(torch.randn(32, 64)).sum().backward()
    with hf_actnn.track_memory(model) as both:
        (model(torch.randn(32, 64)).sum() + model(torch.randn(32, 64)).sum()).backward()
    assert two.saved_bytes == one.saved_bytes > 0
    assert both.saved_bytes == 2 * one.saved_bytes
    assert both.uncompressed_bytes == 2 * one.uncompressed_bytes


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "converted"])
def test_a_loss_outside_the_model_is_counted_at_the_root(bits):
    model = chain(bits)
    x, y = torch.randn(32, 64), torch.randn(32, 64)
    with hf_actnn.track_memory(model) as without:
        model(x).sum().backward()
    with hf_actnn.track_memory(model) as memory:
        (model(x) / y.exp()).square().sum().backward()
    assert memory.saved_bytes > without.saved_bytes
    assert memory.by_module[""][0] >= 2 * 32 * 64 * 4


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "converted"])
def test_two_trackers(bits):
    """One inside the other, and one for each of two models."""
    model, other = chain(bits), chain(bits)
    with hf_actnn.track_memory(model) as alone:
        model(torch.randn(32, 64)).sum().backward()
    with hf_actnn.track_memory(model) as outer, hf_actnn.track_memory(model) as inner:
        model(torch.randn(32, 64)).sum().backward()
    assert inner.saved_bytes == alone.saved_bytes
    assert outer.saved_bytes in (alone.saved_bytes, 0), "hooks that do not see a save count nothing, never half of it"
    with hf_actnn.track_memory(model) as memory:
        model(torch.randn(32, 64)).sum().backward()
    with hf_actnn.track_memory(other) as second:
        other(torch.randn(32, 64)).sum().backward()
    assert memory.saved_bytes == second.saved_bytes == alone.saved_bytes


def test_shared_storage_counts_once():
    w = torch.randn(64, 64)
    model = Bench(lambda m, x: torch.exp(x).sum() + F.linear(x, m.w).sum() + F.linear(x.view(-1, 64), m.w).sum(), w=w)
    with hf_actnn.track_memory(model) as memory:
        model(torch.randn(4, 8, 64) + 0).backward()
    assert memory.saved_bytes == 4 * 8 * 64 * 4  # x once: exp's own result would be another, were x to want a gradient


def test_parameters_and_buffers_are_not_counted():
    model = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512).eval())
    with hf_actnn.track_memory(model) as memory:
        model(torch.randn(2, 512)).sum().backward()
    assert memory.saved_bytes < 3 * 2 * 512 * 4


def test_the_tracker_changes_nothing():
    model = chain(4)
    x = torch.randn(32, 64)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(ZeroDivisionError), hf_actnn.track_memory(model):
        model(x)
        1 / 0  # noqa: B018
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    model(x).sum().backward()


def test_a_kept_tensor_changed_in_place_still_raises_under_the_tracker():
    model = chain(None)
    with hf_actnn.track_memory(model):
        total = model(torch.randn(32, 64)).sum()
        with torch.no_grad():
            model[2].weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


def test_sparse_buffers_have_no_storage_to_leave_out():
    model = chain(4)
    model.register_buffer("graph", torch.eye(4).to_sparse())
    ratios = []
    hf_actnn.memory.measure_next_forward(model, lambda memory, samples: ratios.append(memory.ratio))
    with hf_actnn.track_memory(model) as memory:
        model(torch.randn(32, 64))
    assert ratios == [memory.ratio] and memory.ratio > 1


def test_not_a_module():
    with (
        pytest.raises(ConversionError, match=r"Expected a torch\.nn\.Module.*Received int.*Pass the model"),
        hf_actnn.track_memory(3),
    ):
        pass
