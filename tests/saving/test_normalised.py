"""Batch and group normalisations whose input is normalised before it is coded: channels side by side may differ
as they like."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_actnn
from hf_actnn.saving import rows
from hf_actnn.saving.rules import norms

#: Channels that a group normalisation takes together; 0 is a batch normalisation.
TOGETHER = (0, 1, 4)
KINDS = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class Scaled(nn.Module):
    """Channels of very different deviation and mean, normalised, and read by a convolution through an activation.

    With ``together`` as many channels are alike, and normalised together.
    """

    def __init__(self, dimensions: int = 4, affine: bool = True, spread: float = 100.0, together: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        different = 64 // max(together, 1)
        exponents = math.log10(spread) * torch.linspace(-1, 1, different)[torch.randperm(different)]
        self.scale = nn.Parameter(10 ** exponents.repeat_interleave(max(together, 1)))
        self.norm: nn.Module
        if together:
            self.norm = nn.GroupNorm(different, 64, affine=affine)
        else:
            self.norm = KINDS[dimensions](64, affine=affine)
        if affine:
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)
        self.convolution = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[dimensions](64, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.view(1, -1, *[1] * (x.dim() - 2)).to(x.dtype)
        return self.convolution(F.gelu(self.norm(x * scale + 3 * scale)))


def gradients(model: nn.Module, x: Tensor, **autocast: Any) -> Tensor:
    model.zero_grad()
    weights = torch.randn(256, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", **autocast) if autocast else torch.enable_grad():
        out = model(x)
    (out.flatten().float()[:256] * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def picture(dimensions: int = 4, samples: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(samples, 64, *[4] * (dimensions - 2), generator=generator)


def variance(bits: int, together: int, draws: int = 40) -> float:
    x, exact = picture(), gradients(Scaled(together=together), picture())
    found = []
    for seed in range(draws):
        model = hf_actnn.convert(Scaled(together=together), bits=bits, min_numel=64, seed=seed)
        found.append(float((gradients(model, x) - exact).square().sum() / exact.square().sum()))
    return sum(found) / draws


@pytest.mark.parametrize("together", TOGETHER)
@pytest.mark.parametrize("bits", [2, 4])
def test_narrow_channels_are_not_drowned(bits, together, monkeypatch):
    """In groups of sixteen channels, whose deviations differ by four orders of magnitude."""
    found = variance(bits, together)
    monkeypatch.setattr(rows, "GROUPS_OF_ONE_SPREAD", 0)  # as if each group were of one channel
    assert variance(bits, together, draws=8) > 30 * found


@pytest.mark.parametrize("together", TOGETHER)
def test_bytes_are_those_of_the_input(together, monkeypatch):
    def held() -> float:
        model = hf_actnn.convert(Scaled(together=together), bits=4, min_numel=64)
        with hf_actnn.track_memory(model) as memory:
            model(picture()).sum().backward()
        return memory.saved_bytes

    found = held()
    monkeypatch.setattr(rows, "GROUPS_OF_ONE_SPREAD", 0)
    assert held() == found


@pytest.mark.parametrize("together", TOGETHER)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dimensions", [3, 4, 5])
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "bfloat16 in", "autocast", "float64"])
def test_gradients_are_close_at_eight_bits(form, dimensions, affine, together, monkeypatch):
    x, autocast = picture(dimensions), {}
    model, exact = (Scaled(dimensions, affine, 10.0, together) for _ in range(2))
    if form == "channels_last":
        if dimensions != 4:
            pytest.skip("has no such layout")
        x = x.contiguous(memory_format=torch.channels_last)
    elif form == "float64":
        x, model, exact = x.double(), model.double(), exact.double()
    elif form != "contiguous":
        autocast = {"dtype": torch.bfloat16}
        x = x.bfloat16() if form == "bfloat16 in" else x
    hf_actnn.convert(model, bits=8, min_numel=64)
    ran: list[bool] = []
    keep = norms._keep_normalised
    monkeypatch.setattr(norms, "_keep_normalised", lambda *args: ran.append(keep(*args)) or ran[-1])
    found, expected = gradients(model, x, **autocast), gradients(exact, x, **autocast)
    assert F.cosine_similarity(found, expected, dim=0) > 0.999
    assert ran == [True]
    assert float(found.norm()) == pytest.approx(float(expected.norm()), rel=0.02)


def test_a_view_of_all_values_and_the_input_of_the_model_are_normalised_too():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.first = nn.BatchNorm1d(64), nn.BatchNorm1d(64)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm((self.first(x) * 10 ** torch.linspace(-2, 2, 64)).view(4, 4, 64).flatten(0, 1))

    x = picture(2) * 10 ** torch.linspace(2, -2, 64)
    weights = torch.randn(16, 64)
    (Tokens()(x) * weights).sum().backward()
    found = []
    for model in (Tokens(), hf_actnn.convert(Tokens(), bits=4, min_numel=64)):
        (model(x) * weights).sum().backward()
        found.append(torch.cat([p.grad for p in model.parameters()]))
    assert F.cosine_similarity(*found, dim=0) > 0.98


def test_halves_do_not_overflow_on_the_way():
    """A value times the reciprocal of a small deviation is more than a half holds, before the mean is taken off."""
    x = 1000 + 0.5 * torch.randn(8, 4, 6, 6).half()
    middle = x.float().mean((0, 2, 3))
    found = norms._normalised(x, middle, torch.full((4,), 300.0))
    assert found.dtype == torch.float16 and found.isfinite().all()
    assert torch.allclose(found.float(), (x.float() - middle.view(1, -1, 1, 1)) * 300, rtol=1e-2, atol=0.5)


def test_an_input_that_is_kept_already_is_not_coded_again():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(64)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            return x.square() + self.norm(x)

    x = picture().requires_grad_()
    model = hf_actnn.convert(Twice(), bits=8, min_numel=64)
    with hf_actnn.track_memory(model) as memory:
        loss = model(x).square().sum()
    loss.backward()
    assert memory.saved_bytes < (1.2 + 4) * x.numel()  # a byte for the input; what is squared outside is exact
    found, x.grad = x.grad, None
    hf_actnn.revert(model)
    model(x).square().sum().backward()
    assert F.cosine_similarity(found.flatten(), x.grad.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("together", TOGETHER)
def test_the_report_shows_bits_of_the_input(together):
    model = hf_actnn.convert(Scaled(together=together), bits=3, min_numel=64)
    model(picture()).sum().backward()
    found = [row for row in hf_actnn.report(model).rows if row.module == "norm" and row.kept == "quantized"]
    assert [row.bits for row in found] == [3]
