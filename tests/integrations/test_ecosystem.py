"""Libraries that wrap, copy, average or export models do so with converted ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import hf_actnn
from tests import models

peft = pytest.importorskip("peft")
timm_utils = pytest.importorskip("timm.utils")

NAMES = {"vit": "hf_vit_sdpa", "resnet": "hf_resnet"}
LORA = {"vit": ["q_proj", "v_proj", "query", "value"], "resnet": ["convolution"]}


def _lora(name: str, model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules=LORA[name], modules_to_save=["classifier"], init_lora_weights=False)
    torch.manual_seed(1)  # both factors are random: with one of them zero half of the gradients would be
    return peft.get_peft_model(model, config)


def _gradients(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model(pixel_values=inputs, labels=torch.arange(len(inputs)) % 3).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_lora(name, order):
    """Conversion before and after `get_peft_model`: only adapters and the head get gradients, and the right ones."""
    torch.manual_seed(0)
    plain = models.make(NAMES[name]).train()
    inputs = models.batch(NAMES[name], 4)[0]
    expected = _gradients(_lora(name, copy.deepcopy(plain)), inputs)
    assert expected and all("lora_" in key or "classifier" in key for key in expected)
    model = copy.deepcopy(plain)
    if order == "before":
        model = _lora(name, hf_actnn.convert(model, bits=8, min_numel=0))
    else:
        model = hf_actnn.convert(_lora(name, model), bits=8, min_numel=0)
    model.train()
    exact = hf_actnn.convert(copy.deepcopy(plain), "L0") if order == "before" else copy.deepcopy(plain)
    exact = hf_actnn.convert(_lora(name, exact), "L0") if order == "after" else _lora(name, exact)
    for key, gradient in _gradients(exact.train(), inputs).items():
        assert torch.equal(gradient, expected[key]), key
    with hf_actnn.track_memory(model) as memory:
        found = _gradients(model, inputs)
    assert memory.ratio > 1.5
    assert found.keys() == expected.keys()
    product = sum((found[key].double() * expected[key].double()).sum() for key in found)
    norms = [sum(one[key].double().square().sum() for key in one) ** 0.5 for one in (found, expected)]
    assert product / (norms[0] * norms[1]) > 0.999

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(pixel_values=inputs, labels=torch.arange(4) % 3).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def test_lora_is_saved_without_traces(tmp_path):
    torch.manual_seed(0)
    base = models.make("hf_vit_sdpa")
    model = _lora("vit", hf_actnn.convert(copy.deepcopy(base), bits=2, min_numel=0))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path))
    inputs = models.batch("hf_vit_sdpa", 2)[0]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(inputs).logits, model.eval()(inputs).logits)
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(merged.eval()(inputs).logits, loaded(inputs).logits, atol=1e-4)


def _train(model: nn.Module, steps: int, after) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    inputs = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        loss = model.train()(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(model)


@pytest.mark.parametrize("level", [None, "L0", "L2"])
def test_timm_average(level):
    """The copy that ModelEmaV3 makes follows the model, evaluates like any other, and carries plain names."""
    torch.manual_seed(0)
    model = models.make("timm_resnet")
    plain_keys = list(model.state_dict())
    if level is not None:
        hf_actnn.convert(model, level, min_numel=0)
    average = timm_utils.ModelEmaV3(model, decay=0.5)
    _train(model, 3, average.update)
    assert list(average.module.state_dict()) == plain_keys
    weight, followed = next(model.parameters()), next(average.module.parameters())
    assert not torch.equal(weight, followed)
    assert (weight - followed).norm() < (weight.norm())
    with torch.no_grad():
        assert average(torch.randn(2, 3, 64, 64)).isfinite().all()
    models.make("timm_resnet").load_state_dict(average.module.state_dict())


def _averaged(level: str | None) -> nn.Module:
    from torch.optim.swa_utils import AveragedModel, update_bn

    torch.manual_seed(0)
    model = models.make("timm_resnet")
    if level is not None:
        hf_actnn.convert(model, level, min_numel=0)
    averaged = AveragedModel(model)
    torch.manual_seed(2)
    _train(model, 3, averaged.update_parameters)
    loader = [torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    update_bn(loader, averaged)
    return averaged.eval()


def test_stochastic_weight_averaging():
    plain, exact, coded = (_averaged(level) for level in (None, "L0", "L2"))
    assert int(coded.n_averaged) == 3
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        expected = plain(images)
        assert torch.equal(exact(images), expected)
        assert torch.allclose(coded(images), expected, atol=0.1 * expected.abs().max())


@pytest.mark.parametrize("name", ["hf_vit_sdpa", "hf_resnet", "timm_convnext", "timm_vit"])
def test_export(name):
    """In eval mode a converted model is exported as if it were not converted."""
    torch.manual_seed(0)
    model = models.make(name).eval()
    inputs = models.batch(name, 2)[0]
    expected = torch.export.export(copy.deepcopy(model), (inputs,))
    exported = torch.export.export(hf_actnn.convert(model, "L2"), (inputs,))
    assert [node.target for node in exported.graph.nodes] == [node.target for node in expected.graph.nodes]
    with torch.no_grad():
        found, right = exported.module()(inputs), model(inputs)
    pick = (lambda out: out) if isinstance(right, Tensor) else (lambda out: out.logits)
    assert torch.equal(pick(found), pick(right))
