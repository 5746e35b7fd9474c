"""Gradients that kernels make of codes, executed on a CPU as in ``test_on_cpu.py``, are those of what the codes stand
for: a mask's bit for bit, and an activation's within what its formula may lose to rounding."""

import math
from functools import partial

import pytest
import torch

from hf_actnn.codec import ops, reference
from tests.cuda import shim
from tests.cuda.test_on_cpu import BITS, CUTS, DTYPES, SIZES, Large, same, sample

GELU, GELU_TANH, SILU = range(3)  # as csrc/codec.h numbers them
ATEN = {
    GELU: torch.ops.aten.gelu_backward,
    GELU_TANH: partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    SILU: torch.ops.aten.silu_backward,
}
WIDTHS = torch.tensor([1, 8, 2, 2, 3, 7, 5, 4, 6, 1], dtype=torch.uint8)


def gradients(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Of several magnitudes, with nan, infinities, zeros, the largest and the smallest here and there."""
    grad = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grad *= 10.0 ** (torch.arange(n) // 100 % 7 - 5)
    limits = torch.finfo(dtype)
    special = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, limits.max, -limits.max, limits.tiny, -limits.tiny / 4)
    for i, value in enumerate(special):
        grad[37 * (i + 1) :: 997] = value
    return grad.to(dtype)


def sensitivity(function: int, x: torch.Tensor, eps: float) -> torch.Tensor:
    """How much of a rounding error of its parts, relative to 1, the derivative at ``x`` (float64) has: the largest of
    the terms that are added up, or that two numbers near each other leave. A tail of GELU is ``1 + erf``, or ``1 +
    tanh``, so its error does not shrink as it does; SiLU's is a product, and its error does."""
    distance = x.abs()
    if function == GELU:
        return torch.ones_like(x)
    if function == GELU_TANH:
        # 1 - tanh^2 has the error of 1, and is multiplied by this. From 8 on tanh is 1 in float64 too.
        steep = distance / 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
        return 1 + steep.masked_fill(distance > 8, 0.0)
    # 1 - sigmoid is 0 when exp(-x) is less than half of eps.
    return x.sigmoid() * (1 + torch.where(x > 0, distance.clamp(max=-math.log(eps / 2)), distance))


def check_gradient(got: torch.Tensor, function: int, grad: torch.Tensor, values: torch.Tensor) -> None:
    """``got`` is ``grad * f'(values)``: nan where torch's own kernel says nan, and elsewhere what the float64 result,
    give or take the error of the arithmetic that the dtype is computed in, is rounded to.

    That error is six units of the :func:`sensitivity`: functions of the C library and of CUDA are wrong by two at most,
    the sums and products around them by a half each. Where an exponential leaves the range of normal numbers, its error
    is that of the smallest of them, and products of tiny gradients have the error of the smallest number there is.
    """
    assert got.dtype == grad.dtype
    infinite, broken = grad.isinf(), ATEN[function](grad, values).isnan()
    assert torch.equal(got.isnan() & ~infinite, broken & ~infinite)
    g, x = grad.double(), values.double()
    exact = ATEN[function](g, x)
    # An infinite gradient is nan where the derivative is 0, and which tiny ones are 0 is a matter of rounding.
    sloped = infinite & (ATEN[function](torch.ones_like(x), x).abs() > 1e-3)
    assert torch.equal(got[sloped].double(), exact[sloped])
    assert not got[infinite].isfinite().any()
    limits = torch.finfo(torch.float64 if grad.dtype == torch.float64 else torch.float32)
    error = g.abs() * (6 * limits.eps * sensitivity(function, x, limits.eps) + 1024 * limits.tiny)
    error += 8 * limits.smallest_normal * limits.eps * (1 + x.abs().clamp(max=100))
    low, high = (exact - error).to(grad.dtype), (exact + error).to(grad.dtype)
    wrong = ((got < low) | (got > high)) & ~broken & ~infinite
    assert not wrong.any(), (function, grad[wrong][:5], values[wrong][:5], got[wrong][:5], exact[wrong][:5])


def check_activations(kernels, x: torch.Tensor, bits, row_length: int, group_size: int = 256) -> None:
    """All three, for the codes of ``x`` and gradients of its dtype."""
    uniform = isinstance(bits, int)
    codes, meta, _ = (reference.quantize if uniform else reference.quantize_mixed)(
        x, bits, row_length, group_size, 1, 2
    )
    back = reference.dequantize if uniform else reference.dequantize_mixed
    values = back(codes, meta, bits, row_length, group_size, x.numel(), x.dtype)
    grad = gradients(x.numel(), x.dtype, 1)
    for function in ATEN:
        got = kernels.activation_backward(codes, meta, bits, row_length, group_size, function, grad)
        check_gradient(got, function, grad, values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CUTS)
def test_cuts(kernels, name, dtype):
    row_length, group_size, rows = CUTS[name]
    for count in rows:
        for bits in BITS:
            check_activations(kernels, 2 * sample(count * row_length, dtype, count), bits, row_length, group_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row_length", [256, 96, 100])
def test_every_kind_of_value(kernels, dtype, row_length):
    x = sample(row_length * 90, dtype, 1)
    for bits in BITS:
        check_activations(kernels, x, bits, row_length)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_is_not_aligned(kernels, dtype):
    for kernels.offset in (1, 3):
        for bits in BITS:
            check_activations(kernels, sample(256 * 5, dtype, bits), bits, 256)
            check_activations(kernels, sample(64 * 5, dtype, bits), bits, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("buffer", ["_of", "_out"])
def test_one_tensor_that_is_not_aligned(kernels, dtype, buffer, monkeypatch):
    """The gradient that comes in, or the one that goes out."""
    aligned = getattr(kernels, buffer)
    monkeypatch.setattr(kernels, buffer, lambda *args: aligned(*args)._replace(offset=dtype.itemsize))
    check_activations(kernels, sample(256 * 5, dtype, 1), 2, 256)
    x, codes = sample(1000, dtype, 1), reference.pack_mask(sample(1000, dtype, 2), "gt", 0.0, 0.0)
    assert same(kernels.select_by_mask(x, codes), selected(x, codes))


@pytest.mark.parametrize("order", shim.ORDERS)
def test_order_of_lanes(kernels, order):
    kernels.order = order
    for dtype in DTYPES:
        for row_length in (256, 64, 250):
            check_activations(kernels, sample(row_length * 37, dtype, 1), 3, row_length)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row_length", [256, 192, 250, 7])
def test_mixed_widths(kernels, row_length, dtype):
    check_activations(kernels, sample(len(WIDTHS) * 11 * row_length, dtype, 1), WIDTHS, row_length)


def test_values_are_finite_and_gradients_need_not_be(kernels):
    """In fp16 a value beyond the largest is the largest, as dequantised; a product beyond it is inf, as torch's is."""
    x = torch.full((512,), 65504.0, dtype=torch.float16)
    x[256:] = 1.5  # where GELU has a slope of 1.13
    x[0], x[256] = -65504.0, 1.0
    grad = torch.full_like(x, 65504.0)
    for row_length in (256, 128, 512):
        codes, meta, _ = reference.quantize(x, 2, row_length, 4096, 1, 2)
        values = reference.dequantize(codes, meta, 2, row_length, 4096, 512, x.dtype)
        assert values.isfinite().all()
        for function in ATEN:
            got = kernels.activation_backward(codes, meta, 2, row_length, 4096, function, grad)
            check_gradient(got, function, grad, values)
            assert row_length == 512 or got[256:].isinf().any()


def test_groups_without_values_have_gradients_that_are_nan(kernels):
    for dtype in DTYPES:
        for row_length in (256, 64, 50):
            x = sample(row_length * 4, dtype, 1)
            x[0], x[row_length] = torch.nan, torch.inf
            codes, meta, _ = reference.quantize(x, 2, row_length, 256, 1, 2)
            grad = torch.zeros_like(x)
            for function in ATEN:
                got = kernels.activation_backward(codes, meta, 2, row_length, 256, function, grad)
                assert got[: 2 * row_length].isnan().all()
                assert not got[2 * row_length :].isnan().any()


@pytest.mark.parametrize(
    ("dtype", "row_length", "bits", "in_block"),
    [(torch.float32, 256, 2, 32), (torch.bfloat16, 192, 3, 64), (torch.float16, 250, 5, 8)],
)
def test_more_than_2_to_the_32_elements(kernels, dtype, row_length, bits, in_block):
    """And so more than 65,535 blocks."""
    large = Large(dtype, row_length, bits)
    nothing, nbytes = shim.Buffer(0, b""), large.numel * dtype.itemsize
    grad = gradients(large.x.numel(), dtype, 1)
    values = reference.dequantize(large.codes, large.meta, bits, row_length, 256, large.x.numel(), dtype)
    for function in ATEN:
        got = kernels.run(
            "activation_backward",
            [
                nothing,
                large.window(large.at.nbytes, shim.bytes_of(large.codes)),
                large.window(4 * large.at.n_groups, shim.bytes_of(large.meta)),
                large.window(nbytes, shim.bytes_of(grad)),
                large.window(nbytes, grad.nbytes),
            ],
            blocks=large.last_blocks(kernels, in_block),
            dtype=ops._CODE[dtype],
            function=function,
            **large.fields(),
        )
        check_gradient(shim.tensor(got[0], dtype), function, grad, values)


# ---------------------------------------------------------------- masks


def selected(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """What torch makes of a mask that is unpacked."""
    if x.is_floating_point():
        return torch.ops.aten.threshold_backward(x, reference.unpack_mask(codes, x.numel(), 1.0, 0.0, x.dtype), 0.0)
    return torch.where(reference.unpack_mask(codes, x.numel(), 1.0, 0.0, torch.bool), x, torch.zeros_like(x))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", (*DTYPES, torch.bool, torch.uint8, torch.int32, torch.int64), ids=str)
def test_selection(kernels, dtype, offset):
    kernels.offset = offset
    for n in SIZES:
        mask = torch.rand(n, generator=torch.Generator().manual_seed(n)) > 0.4
        codes = reference.pack_mask(mask, "nonzero", 0.0, 0.0)
        x = gradients(n, dtype, n) if dtype.is_floating_point else (torch.arange(n) * 77_777_777_777).to(dtype)
        for order in shim.ORDERS:
            kernels.order = order
            assert same(kernels.select_by_mask(x, codes), selected(x, codes)), (n, order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_keeps_every_bit(kernels, dtype):
    """Of nan too, whichever it is; and what is not selected is +0."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    patterns = torch.randint(-(2**62), 2**62, (1000,), generator=torch.Generator().manual_seed(1)).to(width)
    patterns[::2] |= torch.tensor(-torch.inf, dtype=dtype).view(width)  # nan with something in it
    for which in (torch.ones(1000, dtype=torch.bool), torch.zeros(1000, dtype=torch.bool), torch.arange(1000) % 3 == 0):
        codes = reference.pack_mask(which, "nonzero", 0.0, 0.0)
        got = kernels.select_by_mask(patterns.view(dtype), codes)
        assert torch.equal(got.view(width), torch.where(which, patterns, 0))


def test_selection_among_more_than_2_to_the_32_elements(kernels):
    n, tail = 2**32 + 256 + 9, 256 + 9
    x, mask = gradients(tail, torch.float32, 1), torch.arange(tail) % 3 == 0
    codes, nbytes = shim.bytes_of(reference.pack_mask(mask, "nonzero", 0.0, 0.0)), reference.uint_nbytes(n, 1)
    got = kernels.run(
        "select_by_mask",
        [
            shim.Buffer(4 * n, shim.bytes_of(x), window=4 * (n - tail)),
            shim.Buffer(nbytes, codes, window=nbytes - len(codes)),
            shim.Buffer(4 * n, window=4 * (n - tail), length=4 * tail),
        ],
        blocks=((n // 256 + 1) // 32, 1),
        dtype=ops._CODE[x.dtype],
        numel=n,
    )
    assert same(shim.tensor(got[0], x.dtype), torch.where(mask, x, torch.zeros_like(x)))
