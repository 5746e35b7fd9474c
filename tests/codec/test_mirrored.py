"""Two values are rounded by mirror images of one dither: the variance of their sum is the least that two unbiased
roundings can have. In a row as long as an image's these are elements two apart, else the same elements of rows two
apart.
"""

from __future__ import annotations

import pytest
import torch

from hf_actnn.codec import ops, quantize, reference, rounding_correlation, variance

LONG, SHORT = 4096, 64


def variance_of_sums(quantise, bits: int, row: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Of the errors of each two values that are rounded together, in squared steps: found, and the least there is; and
    the number of draws.

    With ``s`` the fraction of a step that the two are above a code together, the sum of their codes is one of the two
    integers around it, above it with probability ``s``: ``s (1 - s)``.
    """
    places, draws = (256, 1250 * 16) if row == LONG else (4 * row, 20_000)
    top = 2**bits - 1
    x = torch.rand(places, generator=torch.Generator().manual_seed(bits)) * top
    x.view(-1, min(row, 256))[:, 0] = 0.0
    x.view(-1, min(row, 256))[:, 1] = top  # so that each step is exactly 1
    numel = places * draws
    codes, meta, _ = quantise(x.repeat(draws), bits, row, 256, 7, 0)
    assert (meta[:, 1] == 1).all()
    errors = ops.dequantize(codes, meta, bits, row, 256, numel, torch.float64).view(draws, places) - x.double()
    apart = 2 if row == LONG else 2 * row
    pairs = errors.view(draws, -1, 2, apart).sum(2)
    together = x.double().view(-1, 2, apart).sum(1) % 1.0
    return pairs.square().mean(0), together * (1 - together), draws


def farthest(found: torch.Tensor, least: torch.Tensor, draws: int) -> float:
    """In standard errors and what the dither's coarseness allows. A sum is off by ``1 - s`` or by ``s``, so its square
    has the variance ``s (1-s) (1-2s)^2``, and the dither's 256 values move ``s`` by up to 1/256."""
    spread = (least * (1 - 4 * least) / draws).clamp(min=0).sqrt()
    return float(((found - least).abs() / (spread + 1 / 256)).max())


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("quantise", [ops.quantize, reference.quantize])
@pytest.mark.parametrize("row", [LONG, SHORT])
def test_errors_of_two_cancel_as_far_as_they_can(quantise, bits, row):
    assert farthest(*variance_of_sums(quantise, bits, row)) < 4


@pytest.mark.parametrize("row", [LONG, SHORT])
def test_independent_roundings_are_seen(monkeypatch, row):
    """Sums of independent ones have ``f (1 - f)`` of each, 1/3 on average instead of 1/6."""

    def independent(n_groups, group, seed, stream, device="cpu", rows_mirrored=0):
        return torch.randint(256, (n_groups, group), generator=torch.Generator().manual_seed(1)).add(0.5) / 256

    monkeypatch.setattr(reference, "dither", independent)
    found, least, draws = variance_of_sums(reference.quantize, 2, row)
    assert farthest(found, least, draws) > 4
    assert 1.5 < found.mean() / least.mean() < 2.5


@pytest.mark.parametrize("row", [LONG, SHORT])
def test_what_a_smooth_weight_makes_of_it(row):
    """A sum with weights that change slowly over places or rows, as those are that a weight's gradient is a sum of."""
    x = torch.randn(LONG, generator=torch.Generator().manual_seed(3))
    weights = 1 + 0.3 * torch.sin(torch.arange(LONG) / 20 if row == LONG else torch.arange(LONG) // row / 5)
    for bits, most in ((1, 0.45), (2, 0.6), (4, 0.6)):
        packed = quantize(x.repeat(1_000, 1), bits, seed=bits, stream=1, row_length=row)
        errors = (packed.dequantize(torch.float64) - x.double()).view(1000, -1, row)
        minimum, step = packed.meta[: LONG // min(row, 256)].double().repeat_interleave(min(row, 256), 0).unbind(1)
        f = ((x.double() - minimum) / step) % 1
        variance = (weights.double().square() * f * (1 - f) * step**2).view(-1, row)
        products = errors * weights.double().view(-1, row)
        if row == SHORT:  # of each channel over tokens
            errors, variance = products.sum(1), variance.sum(0)
        else:
            errors, variance = products.sum(2), variance.sum(1)
        assert 0.2 < float(errors.var(0).sum() / variance.sum()) < most


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("row", [LONG, SHORT])
def test_the_correlation_is_that_of_the_roundings(row, zeros, bits):
    top, places = 2**bits - 1, 4 * row if row == SHORT else row
    x = torch.rand(places, generator=torch.Generator().manual_seed(bits)) * top
    if zeros:
        x[torch.rand(places, generator=torch.Generator().manual_seed(5)) < 0.4] = 0.0
    x.view(-1, min(row, 256))[:, 0], x.view(-1, min(row, 256))[:, 1] = 0.0, top
    draws = 4_000_000 // places
    packed = quantize(x.repeat(draws, 1), bits, seed=3, stream=4, row_length=row)
    errors = (packed.dequantize(torch.float64) - x.double()).view(draws, -1, 2, 2 if row == LONG else 2 * row)
    one, other = errors.unbind(2)
    found = float(2 * (one * other).sum() / (one.square() + other.square()).sum())
    expected = float(rounding_correlation(x.repeat(draws, 1), packed))
    assert -0.8 < expected < -0.2
    assert found == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(("rows", "row"), [(128, LONG), (256, LONG), (256, 1024), (512, 768), (131, 8300)])
def test_a_correlation_is_of_all_places_in_a_row(monkeypatch, rows, row):
    """Also where so many rows are looked at as there are, and their first groups are not like the others."""
    x = torch.randn(rows, row, generator=torch.Generator().manual_seed(1))
    x[:, :256] = 0.0
    packed = quantize(x, 2)
    found = rounding_correlation(x, packed)
    monkeypatch.setattr(variance, "_SEEN", 10**9)
    assert float(found) == pytest.approx(float(rounding_correlation(x, packed)), abs=0.03)
    assert -0.6 < float(found) < -0.4
