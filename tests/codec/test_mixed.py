"""Widths that differ from sample to sample: the bytes, what comes back, and the variance that goes with them."""

import copy
import pickle

import pytest
import torch

from hf_actnn.codec import (
    CODES,
    Code,
    mixed,
    native,
    ops,
    packed,
    packed_nbytes,
    quantize,
    reference,
    rounding_variance,
    sample_spread,
)
from hf_actnn.errors import CodecError

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
VARIANTS = native.module().supported() if native.module() else []
OPS = torch.ops.hf_actnn
needs_kernels = pytest.mark.skipif(not VARIANTS, reason="the compiled kernels are not built")

# Samples of so many rows of so many elements, at this group size.
SHAPES = [
    (1, 257, 256),  # groups of 129 and 128: planes end within a byte
    (5, 197, 64),  # groups of 50 and 47
    (3, 7, 3),  # groups narrower than any vector
    (2, 1000, 256),
    (1, 9000, 4096),
    (1, 4096, 256),
    (4, 512, 256),  # what the kernels have tables for
    (3, 1, 256),
]
PATTERNS = {
    "each": lambda n: [s % 8 + 1 for s in range(n)],
    "runs": lambda n: [(1, 8, 2, 4)[4 * s // n] for s in range(n)],
    "equal": lambda n: [3] * n,
    "one apart": lambda n: [2] * (n - 1) + [7],
}


@pytest.fixture(autouse=True)
def restore():
    module, threads = native.module(), torch.get_num_threads()
    variant = module.variant() if module else None
    yield
    if module:
        module.use_variant(variant)
    torch.set_num_threads(threads)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def widths_of(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def values_of(n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Several magnitudes; some groups hold nan, inf, huge or subnormal values."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x *= 10.0 ** (torch.arange(n) // 300 % 5 - 2)
    for place, value in ((0.1, torch.nan), (0.3, torch.inf), (0.5, 1e38), (0.7, 1e300), (0.71, 3e38)):
        x[int(place * n)] = value
    x[int(0.8 * n) : int(0.85 * n)] *= 1e-42
    x[int(0.9 * n) : int(0.95 * n)] = -0.0
    return x.to(dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("rows", "row_length", "group_size"), SHAPES)
def test_kernels_give_the_bytes_of_the_reference(rows, row_length, group_size, pattern, dtype):
    samples = max(9, 140_000 // (rows * row_length) if row_length > 100 else 40)  # four threads' worth
    widths = widths_of(PATTERNS[pattern](samples))
    x = values_of(samples * rows * row_length, dtype)
    codes, meta, exact = reference.quantize_mixed(x, widths, row_length, group_size, 5, -3)
    expected = reference.dequantize_mixed(codes, meta, widths, row_length, group_size, x.numel(), dtype)
    for variant in VARIANTS:
        native.module().use_variant(variant)
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found = mixed.quantize(x, widths, row_length, group_size, 5, -3)
            assert same(found[0], codes), (variant, threads)
            assert same(found[1], meta), (variant, threads)
            assert found[2] == int(exact)
            back = mixed.dequantize(codes, meta, widths, row_length, group_size, x.numel(), dtype)
            assert same(back, expected), (variant, threads)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [[2, 4, 1], [3, 4, 8]])
def test_large_tensors_are_written_around_the_caches(bits, dtype):
    """Above 32 MiB the kernels write in another way, which asks for aligned places."""
    samples, length = 6, 3 << 20
    x = torch.randn(samples * length).to(dtype)
    widths = widths_of(bits * 2)
    for row_length in (length, 768):
        codes, meta, _ = mixed.quantize(x, widths, row_length, 256, 1, 2)
        back = mixed.dequantize(codes, meta, widths, row_length, 256, x.numel(), dtype).view(samples, -1)
        for width in set(bits):
            whole = ops.quantize(x, width, row_length, 256, 1, 2)
            uniform = ops.dequantize(*whole[:2], width, row_length, 256, x.numel(), dtype).view(samples, -1)
            assert torch.equal(back[widths == width], uniform[widths == width])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "row_length", "group_size"), SHAPES)
@pytest.mark.parametrize("quantizers", [(mixed.quantize, ops.quantize), (reference.quantize_mixed, reference.quantize)])
def test_a_sample_has_the_bytes_of_the_uniform_call(quantizers, rows, row_length, group_size, dtype):
    samples = 10
    widths = widths_of([s % 8 + 1 for s in range(samples)])
    x = values_of(samples * rows * row_length, dtype)
    codes, meta, _ = quantizers[0](x, widths, row_length, group_size, 1, 2)
    start = 0
    for s, bits in enumerate(widths.tolist()):
        whole, whole_meta, _ = quantizers[1](x, bits, row_length, group_size, 1, 2)
        expected = whole.view(samples, -1)[s]
        assert torch.equal(codes[start : start + len(expected)], expected)
        assert same(meta.view(samples, -1, 2)[s], whole_meta.view(samples, -1, 2)[s])
        start += len(expected)
    assert start == len(codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_equal_widths_are_the_uniform_call(bits):
    x = values_of(6 * 500, torch.float32).view(6, 500)
    uniform, equal = quantize(x, bits, seed=3), quantize(x, widths_of([bits] * 6), seed=3)
    assert same(equal.codes, uniform.codes)
    assert same(equal.meta, uniform.meta)
    assert equal.bits == bits
    assert same(equal.dequantize(), uniform.dequantize())


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(6, 8, 10),
        torch.randn(6, 4, 5, 7).to(memory_format=torch.channels_last),
        torch.randn(6, 4, 5, 7)[:, ::2],
        torch.randn(8, 6, 10).transpose(0, 1)[:, :4],
        torch.randn(6, 9).double(),
    ],
    ids=["tokens", "channels_last", "strided", "transposed", "double"],
)
def test_shapes_and_strides(x):
    widths = widths_of([8, 1, 6, 7, 8, 2])
    p = quantize(x, widths, seed=1)
    y = p.dequantize()
    assert (y.shape, y.stride(), y.dtype) == (x.shape, x.clone().stride(), x.dtype)
    assert p.nbytes == packed_nbytes(p.numel, p.row_length, widths) == len(p.codes) + p.meta.nbytes + 6
    for s in range(6):  # of the dense copy's storage
        part = slice(s * x.numel() // 6, (s + 1) * x.numel() // 6)
        uniform = quantize(x, int(widths[s]), seed=1).dequantize()
        flat = [t.as_strided((x.numel(),), (1,)) for t in (y, uniform)]
        assert torch.equal(flat[0][part], flat[1][part])


def test_object():
    x = torch.randn(4, 300)
    x[1, 5] = 3e38
    widths = widths_of([1, 2, 8, 3])
    p = quantize(x, widths, group_size=64, seed=5)
    assert repr(p) == (
        "PackedTensor(shape=(4, 300), float32, cpu, uniform 3.5 bits on average over 4 samples, groups of 64 in rows "
        f"of 300, {p.nbytes} bytes, 1 groups exact)"
    )
    expected = p.dequantize()
    widths.fill_(8)  # the caller's own
    for other in (p, pickle.loads(pickle.dumps(p)), copy.deepcopy(p)):
        assert other.widths.tolist() == [1, 2, 8, 3]
        assert torch.equal(other.dequantize(), expected)
    assert p.bits == 3.5
    assert p.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert quantize(x, 3).widths is None


def test_strided_widths():
    x, every = torch.randn(3, 40), widths_of([1, 9, 4, 9, 8, 9])
    p, q = quantize(x, every[::2]), quantize(x, widths_of([1, 4, 8]))
    assert torch.equal(p.codes, q.codes)
    assert torch.equal(mixed.dequantize(q.codes, q.meta, every[::2], 40, 256, 120, x.dtype), q.dequantize().view(-1))
    assert packed_nbytes(120, 40, every[::2]) == p.nbytes


def test_nothing_to_code():
    p = quantize(torch.empty(0, 3), widths_of([2, 3]))
    assert p.dequantize().shape == (0, 3)
    assert p.nbytes == packed_nbytes(0, 0, widths_of([2, 3])) == 2
    assert sample_spread(torch.empty(0, 3), 2).tolist() == [0, 0]
    assert rounding_variance(torch.empty(0, 3), p).tolist() == [0, 0]


def test_huge_and_broken_groups():
    x = torch.randn(4, 500)
    x[1, 3], x[2, 7], x[3, 1], x[3, 400] = 3e38, torch.nan, torch.inf, -2e38
    p = quantize(x, widths_of([1, 8, 2, 5]), group_size=100)
    y = p.dequantize()
    assert p.patch is not None
    assert p.patch[0].tolist() == [5, 19]
    assert torch.equal(y[1, :100], x[1, :100])
    assert torch.equal(y[3, 400:], x[3, 400:])
    assert y[2, :100].isnan().all()
    assert y[3, :100].isnan().all()
    assert torch.isfinite(y).sum() == 1800
    assert p.nbytes == packed_nbytes(2000, 500, p.widths, 100) + 2 * 8 + 2 * 400


def test_unbiased():
    """The mean of many draws, sample by sample, and the variance that is said to go with it."""
    draws, x = 4000, torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    widths = widths_of([1, 4, 2, 7])
    total = torch.zeros(4, 30, dtype=torch.float64)
    squares = torch.zeros(4, dtype=torch.float64)
    for seed in range(draws):
        p = quantize(x, widths, seed=seed, stream=1)
        error = p.dequantize(torch.float64) - x.double()
        total += error
        squares += (error * error).sum(1)
    variance = rounding_variance(x, p)
    step = p.meta[:, 1].double().view(4, 1)
    f = (x.double() - p.meta[:, 0].double().view(4, 1)) / step % 1
    standard_error = step * (f * (1 - f) / draws).sqrt()
    assert ((total / draws).abs() <= 4 * standard_error + 2**-9 * step).all()  # 256 dithers: within 2^-9 of a step
    torch.testing.assert_close(squares / draws, variance, rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 50, 300, 2000, 1 << 18])
def test_rounding_variance(chunk, dtype, monkeypatch):
    """Against a draw of every dither at once, whatever fits a chunk: a part of a row, rows, or samples."""
    monkeypatch.setattr("hf_actnn.codec.variance._CHUNK", chunk)
    x = torch.randn(6, 2, 150, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    x[3] = 0.5
    x[4, 1, 7], x[5, 0, 149] = torch.nan, 6e4 if dtype == torch.float16 else 3e38
    p = quantize(x, widths_of([1, 2, 3, 4, 5, 8]), group_size=40)
    found = rounding_variance(x, p)
    assert found.shape == (6,)
    assert found.dtype == torch.float64
    assert found[3] == 0
    expected = torch.zeros(6, dtype=torch.float64)
    for g, group in enumerate(g for row in x.view(12, 150).float().double() for g in row.split(38)):
        minimum, step = p.meta[g].double()
        if step > 0:
            f = (group - minimum) / step % 1
            expected[g // 8] += (step**2 * f * (1 - f)).sum()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(rounding_variance(x, p, samples=2), expected.view(2, 3).sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_rounding_variance_against_draws(bits):
    x = torch.rand(2, 3, 50, generator=torch.Generator().manual_seed(bits)) * torch.tensor([1.0, 30.0]).view(2, 1, 1)
    squares = torch.zeros(2, dtype=torch.float64)
    for seed in range(2500):
        p = quantize(x, bits, group_size=25, seed=seed)
        squares += (p.dequantize(torch.float64) - x.double()).square().sum((1, 2))
    torch.testing.assert_close(squares / 2500, rounding_variance(x, p, samples=2), rtol=0.05, atol=0)
    torch.testing.assert_close(rounding_variance(x, p), rounding_variance(x, p, samples=2).sum().view(1))


def test_rounding_variance_follows_storage_order():
    x = torch.randn(4, 6, 5, 3)
    p = quantize(x.to(memory_format=torch.channels_last), widths_of([1, 2, 4, 8]))
    expected = rounding_variance(x.to(memory_format=torch.channels_last), p)
    assert torch.equal(rounding_variance(x, p), expected)
    wide = torch.zeros(4, 6, 5, 6)
    wide[..., ::2] = x
    assert torch.equal(rounding_variance(wide[..., ::2].requires_grad_(), p), expected)
    assert (expected[:-1] > expected[1:]).all()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "row_length", "group_size"), SHAPES)
def test_spread(rows, row_length, group_size, dtype):
    samples = 140_000 // (rows * row_length) if row_length > 100 else 40
    x = values_of(samples * rows * row_length, dtype)
    expected = reference.sample_spread(x, samples, row_length, group_size)
    assert torch.isfinite(expected).all()
    for variant in VARIANTS:
        native.module().use_variant(variant)
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(sample_spread(x, samples, row_length, group_size))
            torch.testing.assert_close(found[-1], expected, rtol=1e-12, atol=0)
        assert same(found[0], found[1])
        assert same(found[0], found[2])


def test_spread_of_strides_and_special_groups():
    x = torch.zeros(3, 2, 4, 4).to(memory_format=torch.channels_last)
    x[0, 0, 0, 0], x[0, 1, 3, 3], x[1, 0, 0, 0] = 2.0, -1.0, 5.0  # storage: groups of 16 values, half a sample each
    assert sample_spread(x, 3, group_size=16).tolist() == [16 * 4.0 + 16.0, 16 * 25.0, 0.0]
    assert sample_spread(x[:, :, :, ::2], 3, group_size=8).tolist() == [32.0, 200.0, 0.0]
    x[0, 0, 0, 0], x[1, 0, 0, 0], x[2, 0, 0, 0] = torch.nan, 3e38, -torch.inf
    assert sample_spread(x, 3, group_size=16).tolist() == [16.0, 0.0, 0.0]
    assert sample_spread(x.requires_grad_(), 1, group_size=16).tolist() == [16.0]


X = torch.randn(600)
WIDTHS = widths_of([1, 8, 3])
CODED = reference.quantize_mixed(X, WIDTHS, 100, 64, 1, 2)
CALLS = {
    "quantize_mixed": (OPS.quantize_mixed.default, (X, WIDTHS, 100, 64, CODED[0].numel(), 1, 2)),
    "dequantize_mixed": (OPS.dequantize_mixed.default, (*CODED[:2], WIDTHS, 100, 64, 600, torch.float16)),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    torch.library.opcheck(*CALLS[name])


def test_operators_agree_with_the_reference():
    for found, expected in zip(OPS.quantize_mixed(*CALLS["quantize_mixed"][1]), CODED, strict=True):
        assert torch.equal(found, expected)
    expected = reference.dequantize_mixed(*CALLS["dequantize_mixed"][1])
    assert torch.equal(OPS.dequantize_mixed(*CALLS["dequantize_mixed"][1]), expected)


@pytest.mark.parametrize("name", CALLS)
def test_other_devices_keep_widths_on_the_cpu(name):
    op, args = CALLS[name]
    moved = [a.to("meta") if isinstance(a, torch.Tensor) and a is not WIDTHS else a for a in args]
    leaves = torch.utils._pytree.tree_leaves
    for a, b in zip(leaves(op(*moved)), leaves(op(*args)), strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")


def test_compiles_without_a_break():
    nbytes = mixed.plan(600, 100, WIDTHS, 256).nbytes

    def step(x, widths):
        codes, meta, _ = OPS.quantize_mixed(x.view(-1), widths, x.shape[-1], 256, nbytes, 0, 0)
        return OPS.dequantize_mixed(codes, meta, widths, x.shape[-1], 256, x.numel(), x.dtype).view_as(x)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(X.view(6, 100), WIDTHS), step(X.view(6, 100), WIDTHS))


def test_fake_mode_takes_the_operator():
    with torch._subclasses.FakeTensorMode():
        p = quantize(torch.empty(3, 200), WIDTHS)
        y = p.dequantize()
    assert p.codes.numel() == quantize(torch.empty(3, 200), WIDTHS).codes.numel()
    assert y.shape == (3, 200)
    assert isinstance(y, torch._subclasses.FakeTensor)


def test_without_kernels(monkeypatch):
    x = torch.randn(3, 200)
    expected, spread = quantize(x, WIDTHS), sample_spread(x, 3)
    monkeypatch.setattr(native, "module", lambda: None)
    found = quantize(x, WIDTHS)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.dequantize(), expected.dequantize())
    torch.testing.assert_close(sample_spread(x, 3), spread, rtol=1e-12, atol=0)


F32 = torch.randn(4, 12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quantize(F32, widths_of([1, 2, 0, 4])), ("bits", "from 1 to 8", "Received 0")),
        (lambda: quantize(F32, widths_of([1, 9, 3, 4])), ("bits", "from 1 to 8", "Received 9")),
        (lambda: quantize(F32, torch.tensor([1, 2, 3, 4])), ("widths", "uint8", "torch.int64")),
        (lambda: quantize(F32, widths_of([[1, 2, 3, 4]])), ("widths", "[samples]", "(1, 4)")),
        (lambda: quantize(F32, widths_of([])), ("widths", "at least one", "(0,)")),
        (lambda: quantize(F32, widths_of([1, 2, 3, 4]).to("meta")), ("widths", "CPU", "meta")),
        (lambda: quantize(F32, widths_of([1] * 5)), ("widths", "48 elements", "5 samples")),
        (lambda: quantize(F32, widths_of([1] * 8)), ("widths", "whole rows of 12", "8 samples")),
        (lambda: quantize(F32, widths_of([1] * 4), group_size=0), ("group_size", "1 to 4096")),
        (lambda: quantize(F32, widths_of([1] * 4), row_length=7), ("row_length", "divisor of 48")),
        (lambda: packed_nbytes(48, 12, widths_of([1] * 8)), ("widths", "8 samples")),
        (lambda: sample_spread(F32, 8), ("samples", "whole rows of 12", "8 samples")),
        (lambda: sample_spread(F32, 0), ("samples", "0 samples")),
        (lambda: sample_spread(torch.arange(4), 2), ("dtype", "torch.int64")),
        (lambda: rounding_variance(F32[:2], quantize(F32, 2)), ("(4, 12)", "(2, 12)")),
        (lambda: rounding_variance(F32, quantize(F32, 2), samples=5), ("samples", "5 samples")),
        (lambda: OPS.quantize_mixed(X, WIDTHS, 100, 64, 7, 1, 2), ("nbytes", "Received 7", "plan")),
        (lambda: OPS.quantize_mixed(X[::2], WIDTHS, 100, 64, 7, 1, 2), ("contiguous", "strides (2,)")),
        (
            lambda: OPS.dequantize_mixed(CODED[0][1:], CODED[1], WIDTHS, 100, 64, 600, torch.float32),
            ("codes", "bytes"),
        ),
        (
            lambda: OPS.dequantize_mixed(CODED[0], CODED[1], WIDTHS.flip(0)[:2], 100, 64, 600, torch.float32),
            ("codes", "bytes"),
        ),
        (
            lambda: OPS.dequantize_mixed(CODED[0], CODED[1][1:], WIDTHS, 100, 64, 600, torch.float32),
            ("metadata", "(12, 2)", "(11, 2)"),
        ),
        (lambda: OPS.dequantize_mixed(*CODED[:2], WIDTHS, 100, 64, 600, torch.int32), ("dtype", "torch.int32")),
    ],
)
def test_refusals_say_what_where_and_what_next(call, words):
    with pytest.raises(CodecError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_a_code_without_mixed_widths(monkeypatch):
    monkeypatch.setitem(CODES, "plain", Code(ops.quantize, ops.dequantize))
    with pytest.raises(CodecError, match="one width for all samples"):
        quantize(F32, widths_of([1, 2, 3, 4]), code="plain")
    with pytest.raises(CodecError, match="the code 'uniform'"):
        rounding_variance(F32, quantize(F32, 2, code="plain"))
    assert packed.CODES is CODES
