"""The mean over many draws is the value itself: the property that everything else in the package rests on.

Rows of a tensor are independent draws, since every row has groups and dither of its own.
"""

import pytest
import torch

from hf_actnn.codec import ops, quantize, reference

DRAWS = 100_000
SUB = 2.0**-149  # the smallest positive fp32 value
GROUPS = {
    "zero": [0.0, 0.0],
    "constant, not a bf16 number": [3.3, 3.3, 3.3],
    "constant, negative": [-0.1] * 4,
    "one element": [0.7],
    "tiny range on a large offset": [1e6, 1e6 + 0.0625, 1e6 + 0.125, 1e6 + 0.5],
    "tiny range on a bf16 number": [1.0, 1.0 + 2**-23, 1.0 + 2**-22],
    "1e-38": [1e-38, 1.5e-38, 1.1754943508222875e-38, -1e-38],
    "subnormals": [SUB, 3 * SUB, 1000 * SUB, 2**-130, 0.0],
    "smallest range there is": [0.0, SUB, SUB],
    "subnormals below zero": [-SUB, SUB, -5 * SUB],
    "large": [3e37, -8.4e37, 1e30, 8e37],
    "mixed signs": [-1.5, 0.1, 0.2, 2.9, -0.3],
    "mixed magnitudes": [1e-30, 1.0, 1e10, -1e3],
    "bf16 neighbours": [1.0, 1.0078125, 1.00390625, 1.005],
    "near the ends": [0.0, 1e-4, 0.9999, 1.0],
}


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("name", GROUPS)
def test_hard_values(name, bits):
    x = torch.tensor(GROUPS[name])
    n = len(x)
    p = quantize(x.repeat(DRAWS, 1), bits, seed=bits, stream=1, row_length=n)
    assert p.patch is None
    got = p.dequantize(torch.float64)
    minimum, step = (float(v) for v in p.meta[0])
    for i, value in enumerate(x.double().tolist()):
        part = (value - minimum) / step % 1.0 if step else 0.0
        expected_error = step * (part * (1 - part) / DRAWS) ** 0.5
        assert abs(got[:, i].mean().item() - value) <= 4 * expected_error + 2**-9 * step, (value, minimum, step)


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype, bits):
    x = torch.tensor([-1.5, 0.1, 0.2, 2.9, -0.3]).to(dtype)
    p = quantize(x.repeat(DRAWS, 1), bits, seed=1, row_length=5)
    step = float(p.meta[0, 1])
    error = (p.dequantize(torch.float64).mean(0) - x.double()).abs()
    assert (error <= 4 * step * 0.5 / DRAWS**0.5 + 2**-9 * step).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_huge_values_are_exact(bits):
    """From 2^126 on a range may overflow: such groups are kept as they are."""
    x = torch.randn(600)
    x[300], x[301] = 3e38, -3.4e38
    p = quantize(x, bits, group_size=100)
    y = p.dequantize()
    assert torch.equal(y[300:400], x[300:400])
    assert p.patch is not None
    assert len(p.patch[0]) == 1
    assert p.nbytes == p.codes.nbytes + p.meta.nbytes + 8 + 400
    assert torch.isfinite(y).all()


def test_float64_outside_fp32_is_exact():
    x = torch.randn(600, dtype=torch.float64)
    x[5] = 1e300
    assert torch.equal(quantize(x, 2, group_size=200).dequantize()[:200], x[:200])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_non_finite_groups_stay_non_finite(bits, dtype, bad):
    x = torch.randn(4, 256).to(dtype)
    x[2, 77] = bad  # beside a huge value the group is broken, not exact
    if dtype == torch.float32:
        x[2, 3] = 3e38
    y = quantize(x, bits).dequantize()
    assert not torch.isfinite(y[2]).any()
    assert torch.isfinite(y[[0, 1, 3]]).all()


POSITIONS, REPEATS = 1000, 10_000  # 10^7 draws


def pooled_error(quantise, bits: int) -> float:
    """Mean error in steps over random positions within a step: where a dither that is off centre shows."""
    top = 2**bits - 1
    x = torch.rand(POSITIONS, generator=torch.Generator().manual_seed(bits)) * top
    x[0], x[1] = 0.0, top  # so that the step is exactly 1
    total, rows = 0.0, REPEATS // 10
    for part in range(10):
        codes, meta, _ = quantise(x.repeat(rows), bits, POSITIONS, 1000, 100 + part, 0)
        assert (meta[:, 1] == 1).all()
        y = ops.dequantize(codes, meta, bits, POSITIONS, 1000, POSITIONS * rows, torch.float64)
        total += float((y.view(rows, POSITIONS) - x.double()).sum())
    return total / (POSITIONS * REPEATS)


# Standard error of the mean: a position's variance is 1/6 on average. Half a dither step off would be 1/512.
POOLED = 5 * (1 / 6 / (POSITIONS * REPEATS)) ** 0.5


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_pooled_over_positions(bits):
    assert abs(pooled_error(ops.quantize, bits)) < POOLED


def test_pooled_catches_an_uncentred_dither(monkeypatch):
    centred = reference.dither
    monkeypatch.setattr(reference, "dither", lambda *args: centred(*args) - 1 / 512)
    assert abs(pooled_error(reference.quantize, 2)) > POOLED


def test_draws_differ():
    """Another seed, another stream, another position: another draw."""
    x = torch.full((512,), 0.3)
    x[0], x[256], x[1], x[257] = 0.0, 0.0, 3.0, 3.0
    first = quantize(x, 2, seed=1, stream=1).codes
    assert not torch.equal(first, quantize(x, 2, seed=2, stream=1).codes)
    assert not torch.equal(first, quantize(x, 2, seed=1, stream=2).codes)
    assert not torch.equal(first[:64], first[64:])
    assert torch.equal(first, quantize(x, 2, seed=1, stream=1).codes)
    assert torch.equal(first, quantize(x, 2, seed=1 + 2**64, stream=1).codes)
