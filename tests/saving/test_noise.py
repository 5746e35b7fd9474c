"""The noise that a kept tensor is disturbed with: of the variance that was measured, the same in parts as in whole."""

from __future__ import annotations

import pytest
import torch

from hf_actnn import codec
from hf_actnn.saving import noise as noises
from hf_actnn.saving.noise import SIGNS as COUNT
from hf_actnn.saving.noise import Noise, Signs
from hf_actnn.saving.tape import Tape

SIGNS = Signs.draw(torch.Generator().manual_seed(2))
HALF = torch.tensor(-0.5)


def packed_of(bits, shape=(6, 4, 300), dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    x *= torch.arange(1, shape[0] + 1).view(-1, *[1] * (len(shape) - 1))
    widths = torch.tensor([1, 8, 3, 2, 2, 5], dtype=torch.uint8) if bits == "mixed" else bits
    return codec.quantize(x, widths, seed=3)


def whole(noise, packed):
    dtype = torch.float64 if packed.dtype == torch.float64 else torch.float32
    value = torch.empty_strided(packed.shape, packed.stride, dtype=dtype).zero_()
    noise.add_to(value)
    return value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(6, 4, 300), (6, 3, 10, 10), (6, 70000)])
@pytest.mark.parametrize("bits", [1, 2, 3, 8, "mixed"])
def test_each_sample_has_its_variance(bits, shape, dtype):
    packed = packed_of(bits, shape, dtype)
    variance = torch.tensor([1.0, 4.0, 0.0, 9.0, 1e-3, 2.0], dtype=torch.float64)
    noise = whole(Noise(packed, variance, HALF, SIGNS, 17), packed)
    found = noise.double().reshape(6, -1).square().sum(1)
    torch.testing.assert_close(found, variance, rtol=2e-2 if dtype == torch.bfloat16 else 1e-3, atol=0)
    assert noise.double().mean().abs() < 4 * noise.double().std() / noise.numel() ** 0.5


def test_groups_have_noise_as_large_as_their_steps():
    packed = packed_of(2)
    noise = whole(Noise(packed, torch.ones(6, dtype=torch.float64), HALF, SIGNS, 0), packed)
    sizes = noise.abs().view(24, 2, 150)  # two groups in each row
    assert torch.equal(sizes[..., :1].expand_as(sizes), sizes)
    relative = sizes[:4, :, 0].flatten() / packed.meta[:8, 1].float()
    torch.testing.assert_close(relative, relative[:1].expand(8), rtol=1e-5, atol=0)


@pytest.mark.parametrize("start", [0, 17, COUNT - 3])
@pytest.mark.parametrize(("bits", "shape"), [(2, (6, 70000)), (3, (6, 4, 300)), ("mixed", (6, 3, 10, 10))])
def test_parts_are_those_of_the_whole(bits, shape, start):
    packed = packed_of(bits, shape)
    noise = Noise(packed, torch.arange(6, dtype=torch.float64), HALF, SIGNS, start)
    flat, unit = whole(noise, packed).view(-1), packed.unit
    for first in range(0, flat.numel(), unit):
        for last in (first + unit, min(first + 2 * unit, flat.numel()), flat.numel()):
            assert torch.equal(noise.part(first, last), flat[first:last])


@pytest.mark.parametrize("piece", [1, 1000, 131_072, 2**20])
@pytest.mark.parametrize(
    ("bits", "shape", "dtype"),
    [
        (2, (6, 70000), torch.float32),
        (3, (6, 4, 300), torch.bfloat16),
        ("mixed", (6, 3, 10, 10), torch.float32),
        (2, "channels last", torch.float32),
    ],
)
def test_pieces_are_added_as_all_steps_at_once_would_be(bits, shape, dtype, piece, monkeypatch):
    if shape == "channels last":
        x = torch.randn(6, 16, 9, 9).contiguous(memory_format=torch.channels_last)
        packed = codec.quantize(x, bits, seed=3)
    else:
        packed = packed_of(bits, shape, dtype)
    noise = Noise(packed, torch.arange(6, dtype=torch.float64), HALF, SIGNS, 5)
    steps = noise._twin.dequantize()
    noise._finish(steps.as_strided((steps.numel(),), (1,)), 0)
    monkeypatch.setattr(noises, "PIECE", piece)
    value = packed.dequantize()
    expected = value.clone()
    expected += steps
    noise.add_to(value)
    assert steps.any() and value.stride() == tuple(packed.stride) and torch.equal(value, expected)


def test_a_step_that_is_none_makes_no_noise():
    packed = codec.quantize(torch.cat([torch.full((1, 256), 3.0), torch.randn(1, 256)]), 2)
    noise = whole(Noise(packed, torch.ones(2, dtype=torch.float64), HALF, SIGNS, 0), packed)
    assert not noise[0].any() and noise[1].all() and noise.isfinite().all()


def products(signs: torch.Tensor, apart: int) -> torch.Tensor:
    """``[4]``, by the place in a quad of the first: the mean product of signs so far apart."""
    return (signs * signs.roll(-apart))[: len(signs) - 4].view(-1, 4).mean(0)


@pytest.mark.parametrize("correlation", [0.0, -0.3, -0.5, -1.0])
@pytest.mark.parametrize("apart", [1, 2, 3, 4])
def test_signs_that_are_mirrored(apart, correlation):
    """Two apart within fours they have the correlation that is asked for, and otherwise none."""
    signs = SIGNS.within_fours(torch.tensor(correlation, dtype=torch.float64))
    assert (signs.abs() == 1).all() and signs.mean().abs() < 4 / COUNT**0.5
    expected = torch.tensor([correlation] * 2 + [0.0, 0.0]) if apart == 2 else torch.zeros(4)
    assert (products(signs, apart) - expected).abs().max() < 4 / (COUNT // 4) ** 0.5


def test_signs_are_drawn_on_the_cpu():
    """Whatever torch's default device is: their generator is the CPU's."""
    with torch.device("meta"):
        tape = Tape(3)
        assert {part.device.type for part in tape._signs} == {"cpu"} and tape._place() < COUNT


@pytest.mark.parametrize("correlation", [0.0, -0.3, -1.0])
def test_signs_of_mirror_images(correlation):
    images = SIGNS.images(torch.tensor(correlation, dtype=torch.float64))
    assert (images * SIGNS.independent).mean().item() == pytest.approx(correlation, abs=4 / COUNT**0.5)
    assert abs((images * SIGNS.independent.roll(1)).mean().item()) < 4 / COUNT**0.5


@pytest.mark.parametrize(("row", "aligned"), [(4096, True), (8300, True), (8444, True), (8200, False), (8302, False)])
def test_mirror_images_of_long_rows_are_within_groups(row, aligned):
    packed = codec.quantize(torch.randn(6, row), 2)
    noise = whole(Noise(packed, torch.ones(6, dtype=torch.float64), HALF, SIGNS, 18), packed)
    signs = noise.flatten().sign()
    expected = SIGNS.within_fours(HALF).roll(-16) if aligned else SIGNS.independent.roll(-18)
    assert torch.equal(signs, expected[: len(signs)])


@pytest.mark.parametrize("row", [3, 64, 300, 4095])
@pytest.mark.parametrize("start", [0, 17, COUNT - 3])
def test_mirror_images_of_short_rows_are_rows(row, start):
    packed = codec.quantize(torch.randn(11, row), 2)
    noise = whole(Noise(packed, torch.ones(1, dtype=torch.float64), torch.tensor(-1.0), SIGNS, start), packed)
    signs = noise.sign()
    assert torch.equal(signs[[2, 3, 6, 7, 10]], -signs[[0, 1, 4, 5, 8]])
    drawn = SIGNS.independent.roll(-start)[: 11 * row].view(11, row)
    assert torch.equal(signs[[0, 1, 4, 5, 8, 9]], drawn[[0, 1, 4, 5, 8, 9]])
