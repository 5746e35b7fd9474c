"""What recipes do to a tensor they own, against plain torch, for every variant of the kernels."""

import pytest
import torch

from hf_actnn.codec import channel_affine, channel_affine_, native, normalize_, pack_mask, scale_by_mask_


@pytest.fixture(params=native.module().supported() if native.module() else [])
def variant(request):
    module = native.module()
    before = module.variant()
    module.use_variant(request.param)
    yield request.param
    module.use_variant(before)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# Around a group of 256 and a vector; the last is large enough for a second thread.
@pytest.mark.parametrize("numel", [1, 31, 255, 256, 257, 70001])
def test_scale_by_mask(variant, threads, numel):
    x = torch.randn(numel)
    x[numel // 2] = float("nan")
    mask = torch.rand(numel) > 0.4
    codes = pack_mask(mask, "nonzero")
    for on, off in ((1.25, 0.0), (1.0, -1.0)):
        found = scale_by_mask_(x.clone(), codes, on, off)
        torch.testing.assert_close(found, x * torch.where(mask, on, off), rtol=1e-6, atol=0, equal_nan=True)


def test_scale_by_mask_follows_storage_order():
    x = torch.randn(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)
    mask = x > 0
    flat = mask.as_strided((mask.numel(),), (1,))
    assert torch.equal(scale_by_mask_(x.clone(), pack_mask(flat, "nonzero"), 1.0), x * mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_scale_by_mask_of_other_dtypes(dtype):
    x = torch.randn(300).to(dtype)
    mask = torch.rand(300) > 0.5
    assert torch.equal(scale_by_mask_(x.clone(), pack_mask(mask, "nonzero"), 2.0), x * mask * 2)
    signs = torch.where(mask, 1, -1)
    assert torch.equal(scale_by_mask_(x.clone(), pack_mask(mask, "nonzero"), 1.0, -1.0), x * signs)


# One value per channel and sample, one channel, planes wider and narrower than a vector, two threads' worth.
@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1, 1), (2, 1, 3, 3), (3, 7, 5, 3), (2, 33, 4), (4, 19, 32, 33)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_channel_affine(variant, threads, shape, layout):
    x = torch.randn(shape)
    if layout == "channels_last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        x = torch.randn(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    scale, shift = torch.randn(shape[1]), torch.randn(shape[1])
    view = (1, -1) + (1,) * (x.dim() - 2)
    owned = x.clone()
    found = channel_affine_(owned, scale, shift)
    assert found.data_ptr() == owned.data_ptr() and found.stride() == x.stride()
    torch.testing.assert_close(found, x * scale.view(view) + shift.view(view), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_channel_affine_elsewhere(layout, dtype):
    """Rounded once: in halves a product beyond the largest one comes back below it."""
    x = (torch.rand(3, 5, 7, 6) * 40 + 1000).to(dtype).to(memory_format=layout)
    before, scale, shift = x.clone(), torch.rand(5) + 100, -torch.full((5,), 1e5)
    bits = torch.randn(3, 5, 7, 6).to(memory_format=layout)
    expected = (x.float() * scale.view(1, 5, 1, 1) + shift.view(1, 5, 1, 1)).to(dtype)
    got = channel_affine(x, scale, shift)
    assert got.stride() == x.stride() and got.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)
    codes = pack_mask(bits.permute(0, 2, 3, 1).reshape(-1) if layout is torch.channels_last else bits.view(-1), "gt")
    signed = channel_affine(x, scale, shift, codes)
    assert torch.equal(signed, torch.where(bits > 0, got, -got)) and torch.equal(x, before)


def test_channel_affine_of_nothing():
    assert channel_affine_(torch.empty(0, 3, 2, 2), torch.ones(3), torch.ones(3)).numel() == 0


# Narrower and wider than a vector, and two threads' worth.
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 16), (7, 4, 97), (300, 192)])
@pytest.mark.parametrize("has", [(True, True), (True, False), (False, True), (False, False)])
def test_normalize(variant, threads, shape, has):
    x, mean, factor = torch.randn(shape), torch.randn(*shape[:-1], 1), torch.rand(*shape[:-1], 1)
    weight, bias = (torch.randn(shape[-1]) if one else None for one in has)
    expected = (x - mean) * factor * (1 if weight is None else weight) + (0 if bias is None else bias)
    torch.testing.assert_close(normalize_(x.clone(), mean, factor, weight, bias), expected, rtol=1e-5, atol=1e-6)


def test_normalize_over_several_dimensions_and_strides():
    x, mean, factor = torch.randn(4, 5, 6, 7), torch.randn(4, 1, 1, 1), torch.rand(4, 1, 1, 1)
    weight = torch.randn(5, 6, 7)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = normalize_(x.clone(memory_format=layout), mean, factor, weight, None)
        torch.testing.assert_close(found, (x - mean) * factor * weight, rtol=1e-5, atol=1e-6)
