"""The specification itself, against independent scalar code and published vectors."""

import math

import pytest
import torch

from hf_actnn.codec import reference

_COUNTERS = {
    "zeros": ((0, 0), 0),
    "ones": ((2**64 - 1, 2**64 - 1), 2**64 - 1),
    "pi": ((0x85A308D3243F6A88, 0x0370734413198A2E), 0x299F31D0A4093822),
}


@pytest.mark.parametrize(
    ("rounds", "counter", "words"),
    [  # known answers of Random123, the authors' own library
        (7, "zeros", (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (7, "ones", (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (7, "pi", (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
        (10, "zeros", (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, "ones", (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (10, "pi", (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox(rounds, counter, words):
    (low, high), key = _COUNTERS[counter]
    q = torch.tensor([low - 2**64 if low >= 2**63 else low])
    assert tuple(int(w) for w in reference.philox(q, key, high, rounds)) == words
    if rounds == reference.ROUNDS:
        assert reference.philox(q, key, high) == reference.philox(q, key, high, rounds)


def _byte(drawn: bytes, e: int, rows_mirrored: bool) -> int:
    """The byte of element ``e`` of a group, from those of its call."""
    k = e // 64 % 4
    if rows_mirrored:
        i = 4 * (e % 4) + e // 16 % 4
        return drawn[i] ^ (drawn[(i + k) % 16] if k else 0)
    i = 8 * (k % 2) + 4 * (e % 2) + e // 16 % 4
    byte = drawn[i] ^ (drawn[(i + 1) % 16] if k >= 2 else 0)
    return 255 - byte if e % 4 >= 2 else byte


@pytest.mark.parametrize("rows_mirrored", [0, 1, 2])
@pytest.mark.parametrize("group", [64, 200, 256, 300])
def test_dither_positions(group, rows_mirrored):
    u = reference.dither(9, group, 5, 6, rows_mirrored=rows_mirrored)
    assert u.shape == (9, group)
    blocks = math.ceil(group / 256)
    for g in range(9):
        mirrored = rows_mirrored and g // rows_mirrored % 4 >= 2
        of = g - 2 * rows_mirrored if mirrored else g
        # Neighbours of one word, of one call, runs, rotations, blocks.
        for e in {0, 3, 4, 15, 16, 63, 64, 79, 150, 191, 192, 255, 256, 299, group - 1} & set(range(group)):
            words = reference.philox(torch.tensor([4 * (of * blocks + e // 256) + e % 16 // 4]), 5, 6)
            drawn = b"".join(int(word).to_bytes(4, "little") for word in words)
            byte = _byte(drawn, e, rows_mirrored > 0)
            assert u[g, e] == ((255 - byte if mirrored else byte) + 0.5) / 256


@pytest.mark.parametrize(("row", "groups"), [(1, 1), (256, 1), (257, 2), (4095, 16), (4096, 0), (100_000, 0)])
def test_rows_of_tokens_mirror_each_other_and_images_within(row, groups):
    assert reference.layout(8 * row, row, 2, 256).rows_mirrored == groups


def _sources(e: int, rows_mirrored: bool) -> frozenset[tuple[int, int]]:
    """The bytes, each (call, place), whose exclusive or is the dither of element ``e`` of a block that is drawn."""
    call, k = e % 16 // 4, e // 64
    i = 4 * (e % 4) + e // 16 % 4 if rows_mirrored else 8 * (k % 2) + 4 * (e % 4) + e // 16 % 4
    turn = k if rows_mirrored else k // 2
    return frozenset({(call, i), (call, (i + turn) % 16)})


@pytest.mark.parametrize("rows_mirrored", [True, False])
def test_dithers_but_mirror_images_are_pairwise_independent(rows_mirrored):
    """Exclusive ors of independent uniform bytes are independent in pairs just where no two are of the same bytes."""
    drawn = [e for e in range(256) if rows_mirrored or e % 4 < 2]
    assert len({_sources(e, rows_mirrored) for e in drawn}) == len(drawn)


@pytest.mark.parametrize("group", [3, 4, 7, 64, 255, 300])
def test_mirror_images(group):
    within = reference.dither(50, group, 5, 6)
    first = [e for e in range(group - 2) if e % 4 < 2]
    assert torch.equal(within[:, [e + 2 for e in first]], 1 - within[:, first])
    rows = reference.dither(51, group, 5, 6, rows_mirrored=3).view(17, 3, group)
    drawn = [row for row in range(15) if row % 4 < 2]
    assert torch.equal(rows[[row + 2 for row in drawn]], 1 - rows[drawn])


@pytest.mark.parametrize("rows_mirrored", [0, 1])
def test_pairs_of_dithers_in_practice(rows_mirrored):
    """Over many groups each pair of elements but mirror images has uncorrelated dithers, and uncorrelated squares."""
    u = reference.dither(20_000, 256, 3, 4, rows_mirrored=rows_mirrored).double() - 0.5
    one, other = torch.triu_indices(256, 256, 1)
    mirrored = (one % 4 < 2) & (other == one + 2) & (rows_mirrored == 0)
    for values, of_mirrored in ((u, -1), (u.square() - u.square().mean(), 1)):  # squares of mirror images are equal
        if rows_mirrored:
            values = values.view(-1, 2, 2, 256)[:, 0].reshape(-1, 256)  # the others are mirror images
        scaled = values / values.square().mean().sqrt()
        correlations = (scaled.T @ scaled / len(values))[one, other]
        # 32,512 pairs: beyond six standard errors one in 10^4 runs would show, and the seed is fixed.
        assert correlations[~mirrored].abs().max() < 6 / len(values) ** 0.5
        if not rows_mirrored:
            assert mirrored.sum() == 128 and (correlations[mirrored] - of_mirrored).abs().max() < 0.05


@pytest.mark.parametrize(
    ("x", "minimum", "expected"),
    [
        (1.0, -1.0, 2.0),
        (1.0, 2.0**-60, 1 - 2.0**-24),  # to nearest: 1
        (1.0, -(2.0**-60), 1.0),
        (2.0**-140, 0.0, 2.0**-140),
        (3.0, 3.0, 0.0),
        (16777218.0, -1.0, 16777218.0),  # 16777219 lies between two floats; to nearest, the one above
    ],
)
def test_differences_round_towards_zero(x, minimum, expected):
    assert reference._difference(torch.tensor([x]), torch.tensor([minimum])).item() == expected


def test_rounding_is_exact_where_floats_would_round_up():
    """The product and u add up to just below 1: in fp32 the sum is 1, and the code would be too large."""
    d, r = torch.tensor([1 / 512 - 2**-26]), torch.tensor([1.0])
    u = torch.tensor([511 / 512])
    assert d + u == 1
    # A group from 0 to 3 with a step of 1, at 2 bits.
    x = torch.cat([torch.tensor([0.0, 3.0]), d * r])
    codes, _, _ = reference.quantize_with(x, u.expand(1, 3), 2, 3, 256)
    assert reference.unpack_planes(codes, 2, 3).tolist() == [0, 3, 0]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [1, 7, 8, 31, 256, 257])  # less than a byte, odd sizes, full groups
def test_planes(bits, group):
    codes = (torch.arange(group) * 91 % 2**bits).to(torch.uint8)
    out, shift = [], 0
    for width in (w for w in (8, 4, 2, 1) if bits & w):
        n = math.ceil(group * width / 8)
        plane = [0] * n
        for e in range(group):
            plane[e % n] |= (int(codes[e]) >> shift & (2**width - 1)) << (width * (e // n))
        out += plane
        shift += width
    got = reference.pack_planes(codes, bits)
    assert got.tolist() == out
    assert len(out) == reference.group_bytes(group, bits)
    assert torch.equal(reference.unpack_planes(got, bits, group), codes)


def test_layout_cuts_rows_evenly():
    at = reference.layout(3 * 257, 257, 2, 256)
    assert (at.groups_per_row, at.group, at.tail) == (2, 129, 128)
    # Three groups of at most 2 elements cover 5; sizes are never more than one apart unless the rest demands it.
    at = reference.layout(5, 5, 2, 2)
    assert (at.groups_per_row, at.group, at.tail) == (3, 2, 1)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("sign", ["mixed", "positive"])  # a minimum of 0 leaves subnormal ranges as small as they are
def test_metadata_is_rounded_outwards(sign, bits):
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(1))
    x *= 10 ** torch.linspace(-44, 37, 1000).unsqueeze(-1)
    if sign == "positive":
        x = x.abs()
        x[:, 0] = 0.0
    m, step = reference._metadata(x, bits, *(torch.zeros(1000, dtype=torch.bool) for _ in "ab"))
    m, step, x64 = m.double(), step.double(), x.double()
    assert (m <= x64.amin(-1)).all()
    top = (2**bits - 1) * step
    assert (top * (1 + 2**-21) >= x64.amax(-1) - m).all()
    # No wider than needed: within bf16's spacing, which is 2^-133 at the bottom.
    assert (step <= (x64.amax(-1) - m) / (2**bits - 1) * (1 + 2**-6) + 2.0**-132).all()


def test_error_is_below_a_step():
    x = torch.randn(64, 256)
    for bits in range(1, 9):
        codes, meta, _ = reference.quantize(x.view(-1), bits, 256, 256, 1, 2)
        y = reference.dequantize(codes, meta, bits, 256, 256, x.numel(), torch.float64).view_as(x)
        assert ((y - x).abs() <= meta[:, 1:].double() * (1 + 1e-6)).all()
