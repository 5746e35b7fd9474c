"""The CUDA kernels, executed on a CPU from their own sources, give the bytes of the specification.

The address and undefined-behaviour sanitizers watch, memory ends where tensors end, and shared memory starts as
rubbish.
"""

import pytest
import torch

from hf_actnn.codec import ops, reference, rounding_variance
from hf_actnn.codec.packed import PackedTensor
from tests.codec import masks
from tests.cuda import shim

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BITS = range(1, 9)
# Rows and groups, what is near a boundary: a lane's four elements, a run of 32, a group, a block's 32 or 64 groups.
CUTS = {
    "full groups": (256, 256, (1, 31, 32, 33, 63, 64, 65)),
    "groups of whole runs": (192, 256, (1, 33, 65)),  # ViT-tiny's tokens
    "one run": (32, 32, (1, 33)),
    "seven runs": (224, 256, (3,)),
    "several groups a row": (768, 256, (1, 11, 22)),
    "wide rows cut evenly": (512, 128, (9,)),
    "around a run": (31, 256, (5,)),
    "above a run": (33, 256, (5,)),
    "below a group": (255, 256, (5,)),
    "above a group": (257, 256, (5,)),  # 129 and 128
    "uneven groups": (1000, 256, (3,)),
    "tokens cut unevenly": (197, 64, (7,)),  # 50, 50, 50, 47
    "tiny groups": (7, 3, (100,)),
    "one element a group": (5, 1, (101,)),
    "below four": (3, 256, (300,)),
    "two blocks of dither": (300, 512, (4,)),
    "widest groups": (9000, 4096, (2,)),
    "images": (4096, 256, (3, 6)),
    "images cut evenly": (9216, 192, (3,)),
    "images cut unevenly": (8200, 256, (3,)),
}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def sample(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Values of several magnitudes, with what is special here and there: nan, inf, huge, tiny, -0, constant."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x *= 10.0 ** (torch.arange(n) // 300 % 5 - 2)
    special = (torch.nan, torch.inf, -torch.inf, 1e38, -1e300)
    for i, value in enumerate(special):
        if n > 1500 * (i + 1):
            x[1500 * (i + 1)] = value
    if n > 4000:
        x[600:900] *= 1e-42
        x[1000:1300] = -0.0
        x[2000:2300] = 0.625
        x[2400:2700] = x[2400:2700].abs() * 1e33
    return x.to(dtype)


def check(kernels, x, bits, row_length, group_size, seed=3, stream=2**33 + 7, advance=None) -> None:
    n = x.numel()
    specified = reference.quantize if isinstance(bits, int) else reference.quantize_mixed
    expected = specified(x, bits, row_length, group_size, seed, stream, advance)
    got = kernels.quantize(x, bits, row_length, group_size, seed, stream, advance)
    for name, a, b in zip(("codes", "metadata", "exact groups"), got, expected, strict=True):
        assert same(a, b), name
    back = reference.dequantize if isinstance(bits, int) else reference.dequantize_mixed
    for dtype in DTYPES:
        values = kernels.dequantize(*expected[:2], bits, row_length, group_size, n, dtype)
        assert same(values, back(*expected[:2], bits, row_length, group_size, n, dtype)), dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CUTS)
def test_cuts(kernels, name, dtype):
    row_length, group_size, rows = CUTS[name]
    for count in rows:
        for bits in BITS:
            check(kernels, sample(count * row_length, dtype, count), bits, row_length, group_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row_length", [256, 96, 100])
def test_every_kind_of_value(kernels, dtype, row_length):
    x = sample(row_length * 90, dtype, 1)
    for bits in BITS:
        check(kernels, x, bits, row_length, 256)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_is_not_aligned(kernels, dtype):
    for kernels.offset in (1, 3):
        for bits in BITS:
            check(kernels, sample(256 * 5, dtype, bits), bits, 256, 256)
            check(kernels, sample(64 * 5, dtype, bits), bits, 64, 256)


@pytest.mark.parametrize("order", shim.ORDERS)
@pytest.mark.parametrize("row_length", [256, 64, 250])
def test_order_of_lanes(kernels, order, row_length):
    """A kernel that reads what another lane has not been made to write yet differs in one of them."""
    kernels.order = order
    for dtype in DTYPES:
        for bits in (2, 3, 8):
            check(kernels, sample(row_length * 37, dtype, 1), bits, row_length, 256)


@pytest.mark.parametrize("seed", [0, 2**40 + 1, -5, 2**63 + 9])
def test_seeds(kernels, seed):
    for row_length in (256, 64, 100):
        check(kernels, sample(row_length * 3, torch.float32, 1), 4, row_length, 256, seed, -seed)


@pytest.mark.parametrize("row_length", [256, 64, 100])
def test_a_stream_that_advances_in_memory(kernels, row_length):
    x = sample(row_length * 3, torch.float32, 1)
    plain = kernels.quantize(x, 2, row_length, 256, 3, 4)
    for advance in (0, 1, 2**32, -9):
        moved = torch.tensor([advance])
        check(kernels, x, 2, row_length, 256, 3, 4, moved)
        assert same(kernels.quantize(x, 2, row_length, 256, 3, 4, moved)[0], plain[0]) == (advance == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("row_length", "rows"),
    [(256, 1), (256, 7), (768, 5), (64, 3), (192, 21), (250, 3), (7, 11)],  # rows of a sample
)
def test_mixed_widths(kernels, row_length, rows, dtype):
    widths = torch.tensor([1, 8, 2, 2, 3, 7, 5, 4, 6, 1], dtype=torch.uint8)
    check(kernels, sample(len(widths) * rows * row_length, dtype, rows), widths, row_length, 256)


def test_mixed_widths_of_many_samples(kernels):
    """More than travel with one launch."""
    widths = (torch.arange(1001) % 8 + 1).to(torch.uint8)
    for row_length in (64, 9):
        check(kernels, sample(1001 * row_length, torch.float32, 1), widths, row_length, 256)


def test_more_rows_than_a_grid_is_high(kernels):
    """65,535 is the limit of a grid's second and third dimension, and was of ActNN's."""
    row_length, rows = 3, 65_537
    x = torch.randn(rows * row_length, generator=torch.Generator().manual_seed(1))
    expected = reference.quantize(x, 2, row_length, 256, 1, 2)
    got = kernels.quantize(x, 2, row_length, 256, 1, 2)
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))
    values = kernels.dequantize(*expected[:2], 2, row_length, 256, x.numel(), torch.float32)
    assert same(values, reference.dequantize(*expected[:2], 2, row_length, 256, x.numel(), torch.float32))


class Large:
    """The last rows of a tensor of more than ``elements`` elements: their values, codes and metadata."""

    def __init__(self, dtype: torch.dtype, row_length: int, bits: int, rows: int = 4, elements: int = 2**32) -> None:
        self.dtype, self.row_length, self.bits, self.rows = dtype, row_length, bits, rows
        self.n_rows = (elements // row_length + 3) // 4 * 4 + 4  # whole fours, in which rows mirror each other
        self.numel = self.n_rows * row_length
        self.x = sample(rows * row_length, dtype, 1)
        at = reference.layout(self.numel, row_length, bits, 256)
        self.at, self.per_row = at, at.groups_per_row
        first = (self.n_rows - rows) * self.per_row
        blocks = -(-at.group // 256)
        q = torch.arange(first * blocks * 4, at.n_groups * blocks * 4)
        # The dither of these groups: that of as many groups from 0 on, with the calls of theirs.
        drawn, philox = reference.dither, reference.philox
        try:
            reference.philox = lambda _, seed, stream: philox(q, seed, stream)
            u = drawn(rows * self.per_row, at.group, 5, 6, rows_mirrored=at.rows_mirrored)
        finally:
            reference.philox = philox
        self.codes, self.meta, _ = reference.quantize_with(self.x, u, bits, row_length, 256)

    def window(self, nbytes: int, tail: bytes | int) -> shim.Buffer:
        """A buffer of ``nbytes`` whose end is what matters."""
        length = tail if isinstance(tail, int) else len(tail)
        contents = None if isinstance(tail, int) else tail
        return shim.Buffer(nbytes, contents, window=nbytes - length, length=length)

    def fields(self) -> dict[str, int]:
        return {"numel": self.numel, "row_length": self.row_length, "group_size": 256, "bits": self.bits}

    def last_blocks(self, kernels, in_block: int) -> tuple[int, int]:
        """The blocks that hold the groups of these rows."""
        first = (self.n_rows - self.rows) * self.per_row // in_block
        return first, -(-self.at.n_groups // in_block) - first


@pytest.mark.parametrize(
    ("dtype", "row_length", "bits", "in_block"),
    [
        (torch.float32, 256, 2, 32),
        (torch.bfloat16, 256, 8, 64),
        (torch.bfloat16, 192, 3, 64),
        (torch.float16, 250, 5, 8),
        (torch.float32, 64, 1, 32),
    ],
)
def test_more_than_2_to_the_32_elements(kernels, dtype, row_length, bits, in_block):
    large = Large(dtype, row_length, bits)
    item, nothing = dtype.itemsize, shim.Buffer(0, b"")
    codes, meta = (
        large.window(large.at.nbytes, large.codes.numel()),
        large.window(4 * large.at.n_groups, large.meta.nbytes),
    )
    # The first of these blocks begins a few rows earlier, in memory that is zero.
    got = kernels.run(
        "quantize",
        [nothing, nothing, large.window(large.numel * item, shim.bytes_of(large.x)), codes, meta, nothing],
        blocks=large.last_blocks(kernels, in_block),
        dtype=ops._CODE[dtype],
        seed=5,
        stream=6,
        **large.fields(),
    )
    assert got[0] == shim.bytes_of(large.codes)
    assert got[1] == shim.bytes_of(large.meta)
    got = kernels.run(
        "dequantize",
        [
            nothing,
            large.window(large.at.nbytes, shim.bytes_of(large.codes)),
            large.window(4 * large.at.n_groups, shim.bytes_of(large.meta)),
            large.window(large.numel * item, large.x.nbytes),
        ],
        blocks=large.last_blocks(kernels, in_block),
        dtype=ops._CODE[dtype],
        **large.fields(),
    )
    values = reference.dequantize(large.codes, large.meta, bits, row_length, 256, large.x.numel(), dtype)
    assert got[0] == shim.bytes_of(values)


def test_masks_of_more_than_2_to_the_32_elements(kernels):
    n = 2**32 + 256 + 9
    x = torch.randn(256 + 9)
    x_bytes = shim.bytes_of(x)
    nbytes = reference.uint_nbytes(n, 1)
    last = ((n // 256 + 1) // 32, 1)
    expected = shim.bytes_of(reference.pack_mask(x, "gt", 0.0, 0.0))
    got = kernels.run(
        "pack_mask",
        [
            shim.Buffer(4 * n, x_bytes, window=4 * n - len(x_bytes)),
            shim.Buffer(nbytes, window=nbytes - len(expected), length=len(expected)),
        ],
        blocks=last,
        dtype=0,
        numel=n,
        predicate=reference.PREDICATES.index("gt"),
    )
    assert got[0] == expected
    got = kernels.run(
        "unpack_mask",
        [
            shim.Buffer(nbytes, expected, window=nbytes - len(expected)),
            shim.Buffer(4 * n, window=4 * n - len(x_bytes), length=len(x_bytes)),
        ],
        blocks=last,
        dtype=0,
        numel=n,
        hi=1.0,
    )
    assert got[0] == shim.bytes_of((x > 0).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample_spread(kernels, dtype):
    for row_length, rows, samples in ((256, 6, 3), (100, 9, 9), (1000, 4, 2), (7, 1200, 2)):
        x = sample(row_length * rows, dtype, 1)
        got = kernels.sample_spread(x, samples, row_length, 64)
        torch.testing.assert_close(got, reference.sample_spread(x, samples, row_length, 64), rtol=1e-12, atol=0)


SIZES = (1, 7, 8, 9, 255, 256, 257, 8191, 8192, 8193, 20_003)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(kernels, dtype, offset):
    kernels.offset = offset
    for n in SIZES:
        x = sample(n, dtype, 1)
        if n > 9:
            x[3], x[5], x[7], x[9] = torch.nan, 0.0, 0.5, -0.25  # nan and both thresholds themselves
        for name in reference.PREDICATES:
            assert same(kernels.pack_mask(x, name, -0.25, 0.5), reference.pack_mask(x, name, -0.25, 0.5)), (n, name)


@pytest.mark.parametrize("offset", [0, 1])
def test_masks_of_booleans_and_what_they_stand_for(kernels, offset):
    kernels.offset = offset
    for n in SIZES:
        for x in (torch.arange(n) % 3 == 0, (torch.arange(n) % 5).to(torch.uint8)):
            codes = reference.pack_mask(x, "nonzero", 0.0, 0.0)
            assert same(kernels.pack_mask(x, "nonzero", 0.0, 0.0), codes)
        for dtype in (*DTYPES, torch.bool, torch.uint8):
            for on, off in masks.pairs(dtype):
                expected = reference.unpack_mask(codes, n, on, off, dtype)
                assert same(kernels.unpack_mask(codes, n, on, off, dtype), expected), (n, dtype, on, off)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("bits", BITS)
def test_small_integers(kernels, bits, offset):
    kernels.offset = offset
    for n in SIZES:
        values = (torch.arange(n) * 37 % 256).to(torch.uint8)  # also values too wide, whose high bits are dropped
        codes = reference.pack_uint(values, bits)
        assert same(kernels.pack_uint(values, bits), codes)
        for dtype in ops.INTS:
            assert same(kernels.unpack_uint(codes, bits, n, dtype), reference.unpack_uint(codes, bits, n, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CUTS)
def test_variance_of_rounding(kernels, name, dtype):
    """Summed over each group, as the specification has it for its samples."""
    row_length, group_size, rows = CUTS[name]
    for bits in (1, 3, 8):
        x = sample(rows[-1] * row_length, dtype, bits)
        codes, meta, _ = reference.quantize(x, bits, row_length, group_size, 1, 2)
        packed = PackedTensor(
            codes,
            meta,
            bits=bits,
            group_size=group_size,
            row_length=row_length,
            shape=(x.numel(),),
            stride=(1,),
            dtype=dtype,
        )
        expected = rounding_variance(x, packed, samples=rows[-1])
        got = kernels.rounding_variance(x, meta, row_length, group_size)
        torch.testing.assert_close(got.view(rows[-1], -1).sum(1), expected, rtol=1e-9, atol=0.0)
