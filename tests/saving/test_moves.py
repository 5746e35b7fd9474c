"""What is cast to a narrower dtype behind moves is cast in front of them in the backward pass."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_actnn
from hf_actnn.saving.kept import Kept, Quantized
from hf_actnn.saving.recipes import Recipe, View


class Moved(nn.Module):
    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, nn.Linear(48, 16, bias=False)

    def forward(self, x):
        y = self.first(x).roll(3, 1).view(4, 5, 6, 48).permute(0, 2, 1, 3).contiguous().view(-1, 48)
        y = F.pad(torch.cat([y, y.flip(0)]), (0, 0, 1, 2))
        return F.linear(y.to(torch.bfloat16), self.last.weight.to(torch.bfloat16)).float()


FIRST = {
    "a normalisation": lambda: nn.LayerNorm(48),
    "an activation": lambda: nn.GELU(),
    "dropout": lambda: nn.Sequential(nn.LayerNorm(48), nn.Dropout(0.3)),
}


class Rolls(TorchDispatchMode):
    """Notes the dtypes of what is rolled."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.roll.default:
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("name", FIRST)
def test_the_cast_comes_first_and_changes_nothing(name, bits, monkeypatch):
    def gradient():
        torch.manual_seed(0)
        model = hf_actnn.convert(Moved(FIRST[name]()), "L2", bits=bits, min_numel=1)
        x = torch.randn(4, 30, 48, requires_grad=True)
        torch.manual_seed(1)
        loss = model(x).square().sum()
        with Rolls() as rolls:
            loss.backward()
        return torch.cat([one.grad.flatten() for one in (x, *model.parameters())]), rolls.dtypes

    first, dtypes = gradient()
    for kind in (Recipe, View, Quantized):
        monkeypatch.setattr(kind, "get_as", Kept.get_as)
    after, plain = gradient()
    assert torch.equal(first, after)
    # Among them the backward pass of the forward pass's own.
    assert torch.bfloat16 in dtypes and torch.bfloat16 not in plain


class Coded(nn.Module):
    """What is moved and cast is coded itself, for GELU saves it."""

    def __init__(self, size: float = 1.0) -> None:
        super().__init__()
        self.size, self.first, self.last = size, nn.Linear(48, 48), nn.Linear(48, 16, bias=False)

    def forward(self, x, dtype=torch.bfloat16, value=0.0):
        y = self.size * self.first(x)
        rolled = F.pad(y.roll(3, 1), (0, 0, 1, 2), value=value).to(dtype)
        return F.gelu(y).float().sum() + F.linear(rolled, self.last.weight.to(dtype)).float().square().mean()


def gradient_of(model, x, **options):
    model.zero_grad()
    model(x, **options).backward()
    return torch.cat([one.grad.flatten() for one in model.parameters()])


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (1.0, {}),
        (1.0, {"dtype": torch.float16}),
        (1e5, {"dtype": torch.float16}),  # which fp16 does not hold
        (1.0, {"dtype": torch.float16, "value": -1e5}),
        (1.0, {"value": float(torch.finfo(torch.float32).min)}),
    ],
    ids=str,
)
def test_what_is_coded_itself(size, options, monkeypatch):
    """Its cast is that of the forward pass: what became infinite is, and a value that a narrower dtype lacks is no
    error."""
    torch.manual_seed(0)
    model, x = Coded(size), torch.randn(4, 30, 48)
    plain = gradient_of(copy.deepcopy(model), x, **options)
    hf_actnn.convert(model, "L2", bits=8, min_numel=1, seed=3)
    first = gradient_of(model, x, **options)
    hf_actnn.revert(model)
    for kind in (Recipe, View, Quantized):
        monkeypatch.setattr(kind, "get_as", Kept.get_as)
    hf_actnn.convert(model, "L2", bits=8, min_numel=1, seed=3)
    assert torch.equal(first.nan_to_num(7.0), gradient_of(model, x, **options).nan_to_num(7.0))
    assert first.isfinite().all() == plain.isfinite().all()
    if plain.isfinite().all():
        assert float((first - plain).norm() / plain.norm()) < 0.02


def test_a_cast_between_two_narrow_dtypes_is_made():
    """bf16 keeps less of a value than fp16 does: it cannot be left out."""
    torch.manual_seed(0)
    model = nn.Linear(48, 48, bias=False)
    weight = torch.randn(16, 48)

    def loss(x):
        y = model(x)
        through = y.to(torch.bfloat16).float().roll(1, 0).to(torch.float16)
        return F.gelu(y).sum() + (through.float() @ weight.T).square().mean()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return loss(x)

    x = torch.randn(8, 30, 48)
    model.zero_grad()
    loss(x).backward()
    exact = model.weight.grad.clone()
    wrapped = hf_actnn.convert(Wrapped(), "L2", bits=8, min_numel=1)
    model.zero_grad()
    wrapped(x).backward()
    assert float((model.weight.grad - exact).norm() / exact.norm()) < 0.02


def test_a_copy_on_another_device_comes_back_there():
    kept = Quantized(hf_actnn.codec.quantize(torch.randn(4, 256), 4))
    like = torch.empty(4, 256, dtype=torch.bfloat16, device="meta")
    assert Recipe("copy", None, [kept], like).get().device.type == "meta"
    assert Recipe("copy", None, [kept], like.float()).get().device.type == "meta"


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_has_no_say_in_what_is_joined(narrow):
    """Joined under autocast of one narrow dtype, cast by hand to the other."""
    other = torch.float16 if narrow is torch.bfloat16 else torch.bfloat16

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.last = nn.LayerNorm(48), nn.Linear(48, 8, bias=False)

        def forward(self, x):
            y = self.norm(x)
            with torch.autocast("cpu", narrow):
                joined = torch.cat([y, y.flip(0)])
            return F.linear(joined.to(other), self.last.weight.to(other)).float()

    torch.manual_seed(0)
    model, x = Joined(), torch.randn(4, 30, 48)
    plain = copy.deepcopy(model)
    plain(x).square().mean().backward()
    hf_actnn.convert(model, "L2", bits=8, min_numel=1)
    model(x).square().mean().backward()
    exact, coded = plain.last.weight.grad, model.last.weight.grad
    assert float((coded - exact).norm() / exact.norm()) < 0.02
