"""The compiled kernels give the bytes of the specification, whatever the variant and the number of threads."""

import pytest
import torch

from hf_actnn.codec import native, ops, packed, reference
from tests.codec import masks

kernels = pytest.importorskip("hf_actnn._native_cpu")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
VARIANTS = kernels.supported()
# 31 to 33: around a vector of codes; 255 to 257: around blocks of dither and a full group; 257 also makes two
# groups.
SMALL = (0, 1, 31, 32, 33, 255, 256, 257)
# Prime, so no group or chunk of it is even; large enough for four threads.
LARGE = 1_000_003
LAYOUTS = ("contiguous", "transposed", "channels_last", "strided")


@pytest.fixture(autouse=True)
def restore():
    variant, threads = kernels.variant(), torch.get_num_threads()
    yield
    kernels.use_variant(variant)
    torch.set_num_threads(threads)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def sample(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Values of several magnitudes, with what is special in some groups: nan, inf, huge, subnormal, -0."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x *= 10.0 ** (torch.arange(n) // 300 % 5 - 2)
    if n > 31000:
        for at, value in ((400, torch.nan), (5000, torch.inf), (9000, 1e38), (13000, 1e300)):
            x[at] = value
        x[20000:20600] *= 1e-42
        x[30000:30600] = -0.0
    elif n > 300:
        x[300:] = 1e38
        x[-1] = torch.nan
    return x.to(dtype)


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    n = x.numel()
    a = next((d for d in (16, 15, 11, 3) if n and n % d == 0), 1)
    if layout == "transposed":
        return x.view(a, n // a).t()
    if layout == "channels_last":
        return x.view(1, n // a, a, 1).permute(0, 2, 3, 1)
    if layout == "strided":
        return torch.stack([x, -x], -1)[:, 0]
    return x


def check(x: torch.Tensor, bits: int, row_length: int, group_size: int, seed: int, threads=(1,)) -> None:
    expected = reference.quantize(x, bits, row_length, group_size, seed, seed + 7)
    outputs = DTYPES if x.numel() < 1000 else {x.dtype, torch.float32}  # the specification is slow
    values = {
        dtype: reference.dequantize(*expected[:2], bits, row_length, group_size, x.numel(), dtype) for dtype in outputs
    }
    for variant in VARIANTS:
        kernels.use_variant(variant)
        for count in threads:
            torch.set_num_threads(count)
            codes, meta, exact = ops.quantize(x, bits, row_length, group_size, seed, seed + 7)
            assert same(codes, expected[0]), (variant, count, "codes")
            assert same(meta, expected[1]), (variant, count, "metadata")
            assert exact == int(expected[2]), (variant, count, "exact groups")
            for dtype in outputs:
                got = ops.dequantize(codes, meta, bits, row_length, group_size, x.numel(), dtype)
                assert same(got, values[dtype]), (variant, count, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_small(bits, dtype):
    for n in SMALL:
        # Seeds: none, ordinary, above 32 bits, and negative, which stands for one above 2^63.
        for seed in (0, 3, 2**40 + 1, -5):
            check(sample(n, dtype, n), bits, max(n, 1), 256, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_large(bits, dtype):
    check(sample(LARGE, dtype, bits), bits, LARGE, 256, bits, threads=(1, 2, 4))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    ("row_length", "group_size"),
    [
        (197, 64),  # tokens of a ViT cut unevenly: groups of 50 and a last one of 47
        (1000, 256),  # even groups that are no multiple of a vector
        (7, 3),  # groups smaller than any vector, one shorter than the others
        (5, 1),  # one element a group
        (9000, 4096),  # the widest groups: the buffers' limits
        (4096, 256),  # images
        (768, 256),  # tokens whose pairs of rows fit side by side
        (3072, 256),  # and such whose do not
        (3, 256),  # rows shorter than a vector
    ],
)
def test_rows(bits, row_length, group_size):
    rows = 40_000 // row_length
    for dtype in DTYPES:
        check(sample(rows * row_length, dtype, bits), bits, row_length, group_size, 11, threads=(1, 4))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_layouts(bits, layout):
    for n in (*SMALL, LARGE if bits == 2 else 3003):
        for dtype in DTYPES:
            x = arrange(sample(n, dtype, n), layout)
            p = packed.quantize(x, bits, seed=9, stream=2)
            stored = x.clone() if layout == "strided" else x
            flat = stored.as_strided((n,), (1,))
            codes, meta, _ = reference.quantize(flat, bits, max(p.row_length, 1), 256, 9, 2)
            assert same(p.codes, codes)
            assert same(p.meta, meta)
            assert p.dequantize().stride() == stored.stride()
            values = reference.dequantize(codes, meta, bits, max(p.row_length, 1), 256, n, dtype)
            if p.patch is not None:
                at = packed._positions(p.patch[0], n, p.row_length, 256)
                values[at] = flat[at]
            assert same(p.dequantize().as_strided((n,), (1,)), values)


@pytest.mark.parametrize("variant", VARIANTS)
def test_masks(variant):
    kernels.use_variant(variant)
    for n in (*SMALL, 100_003):
        for dtype in DTYPES:
            x = sample(n, dtype, 1)
            if n > 31:
                x[3], x[5], x[7], x[9] = torch.nan, 0.0, 0.5, -0.25  # nan and both thresholds themselves
            for name in reference.PREDICATES:
                expected = reference.pack_mask(x, name, -0.25, 0.5)
                assert same(ops.pack_mask(x, name, -0.25, 0.5), expected), (n, dtype, name)
        for x in (torch.arange(n) % 3 == 0, (torch.arange(n) % 5).to(torch.uint8)):
            assert same(ops.pack_mask(x, "nonzero"), reference.pack_mask(x, "nonzero", 0.0, 0.0))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.bool, torch.uint8), ids=str)
def test_what_masks_stand_for(variant, dtype):
    kernels.use_variant(variant)
    for n in (*SMALL, 100_003):
        codes = reference.pack_mask(torch.arange(n) % 3 == 0, "nonzero", 0.0, 0.0)
        for on, off in masks.pairs(dtype):
            want = reference.unpack_mask(codes, n, on, off, dtype)
            assert same(ops.unpack_mask(codes, n, on, off, dtype), want), (n, on, off)


def test_masks_do_not_saturate():
    mask = torch.tensor([True, False])
    codes = ops.pack_mask(mask, "nonzero")
    for dtype in DTYPES:
        for unpack in (ops.unpack_mask, reference.unpack_mask):
            shut = unpack(codes, 2, 0.0, -torch.inf, dtype)
            assert same(shut, torch.zeros(2, dtype=dtype).masked_fill(~mask, -torch.inf)), dtype


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_small_integers(variant, bits):
    kernels.use_variant(variant)
    for n in (*SMALL, 100_003):
        values = (torch.arange(n) * 37 % 256).to(torch.uint8)  # also values too wide, whose high bits are dropped
        codes = ops.pack_uint(values, bits)
        assert same(codes, reference.pack_uint(values, bits))
        for dtype in ops.INTS:
            assert torch.equal(ops.unpack_uint(codes, bits, n, dtype), (values & (2**bits - 1)).to(dtype))


def test_denormals_switched_off():
    """torch.set_flush_denormal must not reach the kernels: tiny groups would lose their step."""
    x = torch.full((512,), 1e-40)
    expected = reference.quantize(x, 2, 512, 256, 0, 0)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        got = ops.quantize(x, 2, 512, 256, 0, 0)
    finally:
        torch.set_flush_denormal(False)
    assert same(got[0], expected[0])
    assert same(got[1], expected[1])


def test_forked_child():
    """A forked child has OpenMP's state but not its threads; it must neither hang nor differ."""
    import os

    torch.set_num_threads(2)
    x = sample(200_000, torch.float32, 1)
    expected = ops.quantize(x, 2, 200_000, 256, 0, 0)[0]
    child = os.fork()
    if child == 0:
        got = kernels_quantize(x)
        os._exit(0 if bytes(got) == bytes(expected.numpy()) else 1)
    assert os.waitpid(child, 0)[1] == 0


def kernels_quantize(x: torch.Tensor) -> bytearray:
    import ctypes

    codes, meta = bytearray(50_000), bytearray(4 * 782)
    at = [ctypes.addressof(ctypes.c_char.from_buffer(b)) for b in (codes, meta)]
    n = x.numel()
    kernels.quantize(x.data_ptr(), 0, n, n, 256, 2, 0, 0, at[0], at[1], 2)
    return codes


def test_native_is_used():
    assert native.module() is kernels
