"""What kernels make of codes in one pass, executed on a CPU as in ``test_on_cpu.py``, is what decoding and plain
operations give: bit for bit, and an activation within the rounding of its formula."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from hf_actnn.codec import reference
from tests.cuda import shim
from tests.cuda.test_backward_on_cpu import GELU, GELU_TANH, SILU, WIDTHS
from tests.cuda.test_on_cpu import BITS, CUTS, Large, sample

NARROW = (torch.float32, torch.float16, torch.bfloat16)
#: Of channels: how many, and how many values one has before the next.
SHAPES = ((5, 3), (3, 16), (8, 1), (64, 1), (1, 1), (7, 49))
ACTIVATIONS = {GELU: F.gelu, GELU_TANH: partial(F.gelu, approximate="tanh"), SILU: F.silu}


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits, whichever nan."""
    nan = b.isnan()
    width = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.isnan(), nan) and torch.equal(a.view(width)[~nan], b.view(width)[~nan])


def coded(x: torch.Tensor, bits, row_length: int, group_size: int):
    """Codes, metadata, how they are cut, and the values that they stand for."""
    uniform = isinstance(bits, int)
    codes, meta, _ = (reference.quantize if uniform else reference.quantize_mixed)(
        x, bits, row_length, group_size, 1, 2
    )
    cut = (codes, meta, bits, row_length, group_size, x.numel())
    values = (reference.dequantize if uniform else reference.dequantize_mixed)(*cut, x.dtype)
    return (*cut, x.dtype), values


def coefficients(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 2


def mapped(values: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, inner: int) -> torch.Tensor:
    """In plain operations; the last channels may have fewer values than ``inner``, where a tensor is no multiple."""
    channel = torch.arange(values.numel()) // inner % scale.numel()
    return values.float().mul(scale[channel]).add_(shift[channel]).to(values.dtype)


def check_by_channel(kernels, x, bits, row_length: int, group_size: int, channels: int, inner: int) -> None:
    cut, values = coded(x, bits, row_length, group_size)
    scale, shift = coefficients(channels, 1), coefficients(channels, 2)
    expected = mapped(values, scale, shift, inner)
    assert alike(kernels.rebuild_by_channel(*cut, scale, shift, inner), expected), (channels, inner)
    mask = reference.pack_mask(expected, "not_le", 0.0, 0.0)
    for on in (1.0, 1 / 0.9):
        masked = (expected.float() * reference.unpack_mask(mask, x.numel(), on, 0.0, torch.float32)).to(x.dtype)
        assert alike(kernels.rebuild_by_channel(*cut, scale, shift, inner, mask, on), masked), (channels, inner, on)
    sign = reference.unpack_mask(mask, x.numel(), 1.0, -1.0, x.dtype)
    signed = kernels.rebuild_by_channel(*cut, scale, shift, inner, mask, 1.0, True)
    assert alike(signed, mapped(values * sign, scale, shift, inner)), (channels, inner, "signs")


def check_by_row(kernels, x, bits, row_length: int, group_size: int, width: int) -> None:
    cut, values = coded(x, bits, row_length, group_size)
    rows = x.numel() // width
    mean, factor = coefficients(rows, 1), coefficients(rows, 2).abs()
    for weight, bias in (
        (coefficients(width, 3), coefficients(width, 4)),
        (None, coefficients(width, 4)),
        (None, None),
    ):
        expected = values.float().view(rows, width).sub(mean[:, None]).mul_(factor[:, None])
        if weight is not None:
            expected.mul_(weight)
        if bias is not None:
            expected.add_(bias)
        for dtype in NARROW if x.dtype == torch.float32 else (x.dtype,):
            got = kernels.rebuild_by_row(*cut, dtype, mean, factor, weight, bias, width)
            assert alike(got, expected.flatten().to(dtype)), (dtype, width)


def check_activation(kernels, x, bits, row_length: int, group_size: int = 256) -> None:
    """The float64 result, give or take eight roundings of its largest part, rounded to the dtype."""
    cut, values = coded(x, bits, row_length, group_size)
    wide = values.double()
    for number, function in ACTIVATIONS.items():
        got, exact = kernels.rebuild_activation(*cut, number), function(wide)
        broken = function(values).isnan()
        assert torch.equal(got.isnan(), broken)
        error = 8 * torch.finfo(torch.float32).eps * wide.abs() + 1e-37
        low, high = (exact - error).to(x.dtype), (exact + error).to(x.dtype)
        wrong = ((got < low) | (got > high)) & ~broken
        assert not wrong.any(), (number, values[wrong][:5], got[wrong][:5], exact[wrong][:5])


def check_in_place(kernels, n: int, dtype: torch.dtype) -> None:
    values = sample(n, dtype, n)
    mask = reference.pack_mask(sample(n, dtype, n + 1), "gt", 0.0, 0.0)
    for channels, inner in SHAPES:
        scale, shift = coefficients(channels, 1), coefficients(channels, 2)
        plain = mapped(values, scale, shift, inner)
        assert alike(kernels.affine(values, scale, shift, inner), plain)
        for off in (-1.0, 0.0):
            expected = (plain.float() * reference.unpack_mask(mask, n, 1.0, off, torch.float32)).to(dtype)
            assert alike(kernels.affine(values, scale, shift, inner, mask, off), expected)
    for on, off in ((1.0, 0.0), (1 / 0.9, 0.0), (1.0, -1.0)):
        expected = (values.float() * reference.unpack_mask(mask, n, on, off, torch.float32)).to(dtype)
        assert alike(kernels.scale_by_mask(values, mask, on, off), expected)
    if dtype != torch.float32:
        return
    for width in (width for width in (1, 5, 16, 100, 256) if n % width == 0):
        mean, factor = coefficients(n // width, 1), coefficients(n // width, 2).abs()
        for weight in (None, coefficients(width, 3)):
            for bias in (None, coefficients(width, 4)):
                expected = values.view(-1, width).sub(mean[:, None]).mul_(factor[:, None])
                expected = expected if weight is None else expected.mul_(weight)
                expected = expected if bias is None else expected.add_(bias)
                assert alike(kernels.normalize(values, mean, factor, weight, bias), expected.flatten())


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_in_place(kernels, dtype, offset):
    kernels.offset = offset
    for n in (1, 3, 255, 256, 257, 1000, 8000, 2560):
        for order in shim.ORDERS:
            kernels.order = order
            check_in_place(kernels, n, dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", CUTS)
def test_cuts(kernels, name, dtype):
    """A width of codes meets two of the shapes of channels at a number of rows, all six over numbers or dtypes."""
    row_length, group_size, rows = CUTS[name]
    for number, count in enumerate(rows[:3], start=NARROW.index(dtype)):
        for bits in BITS:
            x = sample(count * row_length, dtype, count)
            for shape in (SHAPES[(bits + number) % 3], SHAPES[(bits + number) % 3 + 3]):
                check_by_channel(kernels, x, bits, row_length, group_size, *shape)
            check_by_row(kernels, x, bits, row_length, group_size, row_length)
            check_activation(kernels, x, bits, row_length, group_size)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("row_length", [256, 96, 100])
def test_every_kind_of_value(kernels, dtype, row_length):
    """Rows of a normalisation that are not those of the codes, too."""
    x = sample(row_length * 90, dtype, 1)
    for bits in (1, 2, 5, 8):
        check_by_channel(kernels, x, bits, row_length, 256, 32, 8)
        check_by_channel(kernels, x, bits, row_length, 256, 100, 9)
        for width in (row_length, 3 * row_length, 5, 1, 90 * row_length):
            check_by_row(kernels, x, bits, row_length, 256, width)
        check_activation(kernels, x, bits, row_length)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_memory_that_is_not_aligned(kernels, dtype):
    for kernels.offset in (1, 3):
        for row_length in (256, 64):
            x = sample(row_length * 8, dtype, 1)
            for channels, inner in ((16, 1), (4, 16), (5, 7)):
                check_by_channel(kernels, x, 3, row_length, 256, channels, inner)
            check_by_row(kernels, x, 3, row_length, 256, row_length)
            check_activation(kernels, x, 3, row_length)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("buffer", ["_of", "_out"])
def test_one_tensor_that_is_not_aligned(kernels, dtype, buffer, monkeypatch):
    """What goes in, such as weights, or what comes out."""
    aligned = getattr(kernels, buffer)
    monkeypatch.setattr(kernels, buffer, lambda *args: aligned(*args)._replace(offset=4))
    x = sample(256 * 8, dtype, 1)
    for channels, inner in ((16, 1), (4, 16)):
        check_by_channel(kernels, x, 3, 256, 256, channels, inner)
    check_by_row(kernels, x, 3, 256, 256, 256)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_mask_that_is_not_aligned(kernels, dtype):
    """It alone: it is read as words."""
    x = sample(256 * 8, dtype, 1)
    cut, values = coded(x, 3, 256, 256)
    scale, shift = coefficients(4, 1), coefficients(4, 2)
    plain = mapped(values, scale, shift, 16)
    mask = reference.pack_mask(plain, "gt", 0.0, 0.0)
    expected = (plain.float() * reference.unpack_mask(mask, x.numel(), 1.0, 0.0, torch.float32)).to(dtype)
    run = kernels.run

    def shifted(kernel, buffers, **fields):
        buffers[5] = buffers[5]._replace(offset=1)
        return run(kernel, buffers, **fields)

    kernels.run = shifted
    assert alike(kernels.rebuild_by_channel(*cut, scale, shift, 16, mask, 1.0), expected)


def test_what_is_too_large_is_infinite(kernels):
    """As it would be without a mask: what a bit selects is not cut off at the largest value of the dtype."""
    x = torch.full((512,), 60000.0, dtype=torch.float16)
    x[::2] = 1.0
    cut, values = coded(x, 8, 256, 256)
    scale, shift = torch.full((4,), 3.0), torch.zeros(4)
    plain = mapped(values, scale, shift, 16)
    assert plain.isinf().any()
    mask = reference.pack_mask(torch.ones(512), "gt", 0.0, 0.0)
    assert alike(kernels.rebuild_by_channel(*cut, scale, shift, 16, mask, 1.0), plain)


@pytest.mark.parametrize("order", shim.ORDERS)
def test_order_of_lanes(kernels, order):
    kernels.order = order
    for dtype in NARROW:
        for row_length in (256, 64, 250):
            x = sample(row_length * 36, dtype, 1)
            check_by_channel(kernels, x, 3, row_length, 256, 6, 5)
            check_by_row(kernels, x, 3, row_length, 256, row_length)
            check_activation(kernels, x, 3, row_length)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("row_length", [256, 192, 250, 7])
def test_mixed_widths(kernels, row_length, dtype):
    x = sample(len(WIDTHS) * 11 * row_length, dtype, 1)
    check_by_channel(kernels, x, WIDTHS, row_length, 256, 11, row_length)
    check_by_row(kernels, x, WIDTHS, row_length, 256, row_length)
    check_activation(kernels, x, WIDTHS, row_length)


@pytest.mark.parametrize("channels", [1, 3, 2**16 + 1, 10**6])
def test_division_by_any_number(kernels, channels):
    """Of positions up to the largest, by a multiplication that must not be off by one anywhere."""
    large = Large(torch.bfloat16, 256, 2, elements=2**31 - 2048)
    n = large.numel
    start = n - large.x.numel()
    for inner in (1, 5, 49, 255, 256, 65_537, 2**30, 2**31 - 1):
        scale, shift = torch.arange(channels) / 7, torch.zeros(channels)
        got = kernels.run(
            "rebuild_by_channel",
            [
                shim.Buffer(0, b""),
                large.window(large.at.nbytes, shim.bytes_of(large.codes)),
                large.window(4 * large.at.n_groups, shim.bytes_of(large.meta)),
                shim.Buffer(scale.nbytes, shim.bytes_of(scale)),
                shim.Buffer(shift.nbytes, shim.bytes_of(shift)),
                shim.Buffer(0, b""),
                large.window(2 * n, 2 * large.x.numel()),
            ],
            blocks=large.last_blocks(kernels, 64),
            dtype=2,
            channels=channels,
            inner=inner,
            **large.fields(),
        )
        values = reference.dequantize(large.codes, large.meta, 2, 256, 256, large.x.numel(), torch.bfloat16)
        channel = (torch.arange(large.x.numel()) + start) // inner % channels
        expected = values.float().mul_(scale[channel]).to(torch.bfloat16)
        assert alike(shim.tensor(got[0], torch.bfloat16) + 0.0, expected + 0.0), inner


def test_more_elements_than_positions_have_numbers_for(kernels):
    buffers = [shim.Buffer(0, b"")] * 6 + [shim.Buffer(4)]
    with pytest.raises(RuntimeError, match="2\\^31 elements or more"):
        kernels.run("rebuild_by_channel", buffers, numel=2**31, row_length=256, group_size=256, bits=2)
