"""What a registry knows of tensors: by storage, version and view."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import hf_actnn
from hf_actnn.codec import PackedTensor
from hf_actnn.saving.identity import LAST, Registry
from hf_actnn.saving.kept import Blank, Exact, Kept
from hf_actnn.saving.recipes import View
from tests.saving.bench import Bench


@pytest.fixture
def registry():
    return Registry(set())


def code_of(tensor: torch.Tensor) -> Kept:
    """Something that gives the tensor back and is no reference to it."""
    return View(Exact(tensor.clone(memory_format=torch.preserve_format)), tensor.shape, tensor.stride(), 0)


@pytest.mark.parametrize("learnt", ["own", "permuted", "flat"])
@pytest.mark.parametrize("asked", ["own", "permuted", "flat", "part"])
def test_any_view_of_what_is_kept_is_found(registry, learnt, asked):
    x = torch.arange(24.0).view(2, 3, 4)
    views = {"own": x, "permuted": x.permute(2, 0, 1), "flat": x.view(-1), "part": x[1, :, 1:3]}
    registry.produced(x, LAST)
    registry.learn(views[learnt], code_of(views[learnt]))
    for _ in range(2):
        found = registry.find(views[asked])
        assert found is not None
        assert torch.equal(found.get(), views[asked])
        assert found.get().stride() == views[asked].stride()
    assert registry.find(views[asked]) is found  # one object, however often it is asked for
    assert registry.rows(views[asked]) == LAST


def test_the_newest_of_a_view_holds_and_others_keep_theirs(registry):
    x = torch.arange(6.0).view(2, 3)
    kept, other = code_of(x), code_of(x.t())
    registry.produced(x, None)
    registry.learn(x, kept)
    registry.learn(x.t(), other)
    assert registry.find(x) is kept and registry.find(x.t()) is other
    registry.learn(x, other := code_of(x))
    assert registry.find(x) is other


def test_of_a_part_nothing_follows_for_the_whole(registry):
    x = torch.arange(6.0).view(2, 3)
    registry.produced(x, None)
    registry.learn(x[0], code_of(x[0]))
    assert registry.find(x[0]) is not None
    assert registry.find(x) is None and registry.find(x[1]) is None


def test_another_dtype_is_another_tensor(registry):
    x = torch.zeros(4)
    registry.learn(x, code_of(x))
    assert registry.find(x.view(torch.int32)) is None and registry.layout(x.view(torch.int32)) is None


@pytest.mark.parametrize("end", ["write", "close"])
def test_what_may_hold_other_values_is_forgotten(registry, end):
    x = torch.zeros(2, 3)
    registry.learn(x, code_of(x))
    registry.learn(x.t(), code_of(x.t()))
    if end == "write":
        x.add_(1)
    else:
        registry.close(x)
    assert registry.find(x) is None and registry.find(x.t()) is None
    registry.learn(x, Blank(x))
    assert (registry.find(x) is None) == (end == "close")  # for good


def test_constants_that_were_written_to_are_constants_no_more(registry):
    x = torch.zeros(3)
    registry.mark_derived(x)
    assert registry.is_weight(x) and registry.is_weight(x[1:]) and not registry.is_stored_weight(x)
    x.add_(1)
    assert not registry.is_weight(x)


def test_memory_is_not_held_and_addresses_are_let_go():
    registry = Registry(set())
    x = torch.zeros(1000)
    weak = StorageWeakRef(x.untyped_storage())
    registry.produced(x, None)
    del x
    assert weak.expired()
    # The key of what is gone is not given to another tensor while the registry lives, so nothing is mistaken for it.
    assert all(registry.find(torch.zeros(1000)) is None for _ in range(100))
    registry.release()
    registry.release()
    assert registry.find(torch.zeros(1000)) is None


def registries() -> set[int]:
    gc.collect()
    return {id(one) for one in gc.get_objects() if type(one) is Registry}


def test_a_forward_pass_leaves_no_registry_behind():
    before = registries()
    model = hf_actnn.convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), bits=2, min_numel=0)
    model(torch.randn(4, 8)).sum().backward()
    assert registries() <= before


def test_a_projection_is_rebuilt_once_for_q_k_and_v(monkeypatch):
    """They are views of one code, and attention is run again on all three."""
    torch.manual_seed(0)

    def attention(m, x):
        q, k, v = m.op(x).view(2, 16, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v)

    model = hf_actnn.convert(Bench(attention, op=nn.Linear(32, 96)), bits=4, min_numel=0)
    out = model(torch.randn(2, 16, 32))
    rebuilt = []
    dequantize = PackedTensor.dequantize

    def count(self, *args):
        rebuilt.append(self.numel)
        return dequantize(self, *args)

    monkeypatch.setattr(PackedTensor, "dequantize", count)
    out.sum().backward()
    assert sorted(rebuilt) == [2 * 16 * 32, 2 * 16 * 96]  # the layer's input, and its output
