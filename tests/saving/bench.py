"""What the tests of rules share: a module around any function, and its gradients at some bit width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import hf_actnn


class Bench(nn.Module):
    """Runs ``function(module, *inputs)``; its keyword arguments become parameters and submodules."""

    def __init__(self, function: Callable[..., Tensor], **members: Any) -> None:
        super().__init__()
        self.function = function
        self.unused = nn.Parameter(torch.zeros(()))  # a model without parameters is not trained, and not converted
        for name, member in members.items():
            setattr(self, name, nn.Parameter(member) if isinstance(member, Tensor) else member)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def run(model: nn.Module, inputs: Sequence[Tensor], seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of a fixed random projection of it, by name; inputs are named x0, x1, ..."""
    leaves = [value.detach().clone().requires_grad_(value.is_floating_point()) for value in inputs]
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = model(*leaves)
    projection = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    out.backward(projection)
    found = {f"x{index}": leaf.grad for index, leaf in enumerate(leaves) if leaf.grad is not None}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), found


def kinds(model: nn.Module) -> dict[str, set[str]]:
    """Operation -> how its saves were kept, in the last training forward pass."""
    found: dict[str, set[str]] = {}
    for row in hf_actnn.report(model).rows:
        found.setdefault(row.kind, set()).add(row.kept)
    return found


def assert_unbiased(model: nn.Module, inputs: Sequence[Tensor], names: Sequence[str], draws: int = 200) -> None:
    """The mean gradient over many draws agrees with the exact one, as far as its own scatter allows."""
    _, exact = run(hf_actnn.revert(model), inputs)
    hf_actnn.convert(model, bits=4, min_numel=0)
    samples: dict[str, list[Tensor]] = {name: [] for name in names}
    for _ in range(draws):
        _, found = run(model, inputs)
        for name in names:
            samples[name].append(found[name].double())
    for name in names:
        stacked = torch.stack(samples[name]).flatten(1)
        expected = exact[name].double().flatten()
        scatter = stacked.std(0)
        assert scatter.any(), f"{name} does not vary: nothing was coded"
        # A value beside a level moves in one draw of hundreds, or in none: its own scatter says nothing of its error.
        typical = scatter.median()
        z = (stacked.mean(0) - expected) / (scatter.clamp_min(0.5 * typical) / draws**0.5)
        # All values together: a bias of half a standard error everywhere would give 1.12. Values that share one draw,
        # such as those behind one gate, count once.
        first = (stacked[0] - stacked.mean(0)).abs() / scatter.clamp_min(1e-12)
        independent = first.mul(1e4).round().unique().numel()
        assert z.pow(2).mean().sqrt() < 1.12 + 3 / independent**0.5, (name, z.pow(2).mean().sqrt())
        # Four standard errors have odds of 1 in 16,000 for one value: more where there are many, and draws are few.
        worst = z[scatter > 0.5 * typical].abs().max()
        assert worst < 4.5 + 0.5 * torch.log10(torch.tensor(float(expected.numel()))), (name, worst)
        # Along the exact gradient, where a shrinking or growing gradient shows best.
        along = stacked @ (expected / expected.norm())
        error = (along.mean() - expected.norm()) / (along.std() / draws**0.5)
        assert error.abs() < 4, (name, error)
