"""Two values with one between them are rounded by mirror images of one dither: the variance of their sum is the least
that two unbiased roundings can have."""

from __future__ import annotations

import pytest
import torch

from hf_actnn.codec import ops, quantize, reference

PLACES, DRAWS = 256, 20_000


def variance_of_sums(quantise, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the errors of each two values that are rounded together, in squared steps: found, and the least there is.

    With ``s`` the fraction of a step that the two are above a code together, the sum of their codes is one of the two
    integers around it, above it with probability ``s``: ``s (1 - s)``.
    """
    top = 2**bits - 1
    x = torch.rand(PLACES, generator=torch.Generator().manual_seed(bits)) * top
    x[0], x[1] = 0.0, top  # so that the step is exactly 1
    codes, meta, _ = quantise(x.repeat(DRAWS), bits, PLACES, PLACES, 7, 0)
    assert (meta[:, 1] == 1).all()
    y = ops.dequantize(codes, meta, bits, PLACES, PLACES, PLACES * DRAWS, torch.float64)
    errors = (y.view(DRAWS, PLACES) - x.double()).view(DRAWS, PLACES // 4, 2, 2)
    together = x.double().view(PLACES // 4, 2, 2).sum(1) % 1.0
    return errors.sum(2).square().mean(0), together * (1 - together)


def farthest(found: torch.Tensor, least: torch.Tensor) -> float:
    """In standard errors and what the dither's coarseness allows. A sum is off by ``1 - s`` or by ``s``, so its square
    has the variance ``s (1-s) (1-2s)^2``, and the dither's 256 values move ``s`` by up to 1/256."""
    spread = (least * (1 - 4 * least) / DRAWS).clamp(min=0).sqrt()
    return float(((found - least).abs() / (spread + 1 / 256)).max())


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("quantise", [ops.quantize, reference.quantize])
def test_errors_of_two_cancel_as_far_as_they_can(quantise, bits):
    assert farthest(*variance_of_sums(quantise, bits)) < 4


def test_independent_roundings_are_seen(monkeypatch):
    """Sums of independent ones have ``f (1 - f)`` of each, 1/3 on average instead of 1/6."""

    def independent(n_groups, group, seed, stream, device="cpu"):
        return torch.randint(256, (n_groups, group), generator=torch.Generator().manual_seed(1)).add(0.5) / 256

    monkeypatch.setattr(reference, "dither", independent)
    found, least = variance_of_sums(reference.quantize, 2)
    assert farthest(found, least) > 4
    assert 1.5 < found.mean() / least.mean() < 2.5


def test_what_a_smooth_weight_makes_of_it():
    """A sum with weights that change slowly over the places, as the gradient of a convolution's weight is."""
    x = torch.randn(256, generator=torch.Generator().manual_seed(3))
    weights = 1 + 0.3 * torch.sin(torch.arange(256) / 20)
    for bits, most in ((1, 0.45), (2, 0.6), (4, 0.6)):
        packed = quantize(x.repeat(20_000, 1), bits, seed=bits, stream=1)
        step = float(packed.meta[0, 1])
        errors = packed.dequantize(torch.float64) - x.double()
        f = ((x.double() - float(packed.meta[0, 0])) / step) % 1
        alone = float((weights.double().square() * f * (1 - f)).sum()) * step**2
        assert 0.2 < float((errors @ weights.double()).var()) / alone < most
