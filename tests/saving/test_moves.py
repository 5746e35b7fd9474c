"""What is cast to a narrower dtype behind moves is cast in front of them in the backward pass."""

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
